"""Item rows to means with intervals: over texts, not over tokens or runs.

Items are what is resampled, so an item's several rows (prompt lengths, layers) go together. Groups
with equally many items share their resamples, which makes thousands of groups one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats

from workbench.table import METRICS, InputError, coordinates, validate

# the mean of perplexities is no perplexity; e to the mean of the items' losses is
GEOMETRIC = ("perplexity",)
CHUNK = 4_000_000  # numbers in one temporary array


def summarise(
    table: pd.DataFrame,
    *,
    by: Sequence[str] | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    pair: tuple[str, str, str] | None = None,
) -> pd.DataFrame:
    """Pool item rows to means, each with an interval for texts like these.

    Verdicts (a share whose values are all 0 or 1, one row per item) get Wilson's interval, all
    else percentiles of means over items drawn with replacement. Perplexities are averaged as
    logarithms. ``.attrs["interval"]`` says which interval each metric has.

    Args:
        by: Columns that stay; None keeps all coordinates but ``item``. The metric always stays.
        pair: ``(column, first, second)`` adds rows of "difference", first minus second item by
            item, with the coordinate ``of`` for the metric compared; items without a partner are
            counted in ``.attrs["unpaired"]``.

    Returns:
        One row per combination: ``n`` counts the rows pooled; NaN values are left out of it and
        counted in ``.attrs["dropped"]``. Means over steps carry the last one. An interval over one
        item is NaN with a reason. Values mean what the item rows mean, chance included.

    Raises:
        InputError: An unknown column, rows that are pooled already, or a pair not in the table.
    """
    if not 0 < level < 1:
        raise InputError(f"summarise: level is {level}, it must lie between 0 and 1")
    if draws < 1:
        raise InputError(f"summarise: draws is {draws}, it must be at least 1")
    table = validate(table)
    pooled = table[table["item"] == "all"]
    if len(pooled):
        raise InputError(
            f"summarise: {len(pooled)} rows, the first of {pooled['metric'].iloc[0]}, are pooled "
            "already (item is all); leave them out"
        )
    keys = _keys(table, by)
    result, used = _means(table, keys, level, draws, seed)
    result.attrs |= {"interval": used, "dropped": int(table["value"].isna().sum())}
    if pair is None:
        return result
    differences, unpaired = _differences(table, keys, pair)
    apart, used = _means(differences, [*keys, "of"], level, draws, seed)
    attrs = result.attrs
    result = pd.concat([result.assign(of=result["metric"]), apart], ignore_index=True)
    result.attrs = attrs | {"unpaired": unpaired, "interval": attrs["interval"] | used}
    return result


def _keys(table: pd.DataFrame, by: Sequence[str] | None) -> list[str]:
    if by is None:
        return [name for name in coordinates(table) if name != "item"]
    for name in by:
        if name not in table.columns:
            raise InputError(f"summarise: no column {name!r}; there are {', '.join(table)}")
    return [*by, *(["metric"] if "metric" not in by else [])]


def _differences(
    table: pd.DataFrame, keys: list[str], pair: tuple[str, str, str]
) -> tuple[pd.DataFrame, int]:
    """One row per item and combination: its value at ``first`` minus that at ``second``."""
    column, *sides = pair
    if column not in table.columns:
        raise InputError(f"summarise: no column {column!r} to pair; there are {', '.join(table)}")
    told = table[column].astype(str)
    for side in sides:
        if not (told == str(side)).any():
            raise InputError(
                f"summarise: no rows with {column}={side} to pair; "
                f"there are {', '.join(sorted(told.unique()))}"
            )
    match = list(dict.fromkeys([*(name for name in keys if name != column), "item"]))
    halves = []
    for side in sides:
        half = table[(told == str(side)) & table["value"].notna()]
        if half.duplicated(match).any():
            raise InputError(
                f"summarise: items have several rows at {column}={side}; add the coordinate that "
                "tells them apart to by"
            )
        halves.append(half)
    both = halves[0].merge(halves[1][[*match, "value"]], on=match, suffixes=("", "_second"))
    both["value"] = both["value"] - both.pop("value_second")
    both["of"] = both["metric"].astype(str)
    both[column] = f"{sides[0]} - {sides[1]}"
    both[["lo", "hi"]] = np.nan
    both = both.assign(metric="difference")
    return both, len(halves[0]) + len(halves[1]) - 2 * len(both)


def _means(
    table: pd.DataFrame, keys: list[str], level: float, draws: int, seed: int
) -> tuple[pd.DataFrame, dict[str, str]]:
    group = table.groupby(keys, observed=True, dropna=False, sort=False).ngroup().to_numpy()
    result = table.iloc[np.unique(group, return_index=True)[1]].reset_index(drop=True)
    metric = table["metric"].astype(str).to_numpy()
    geometric = np.isin(metric, GEOMETRIC)
    value = table["value"].to_numpy()
    value = np.where(geometric, np.log(np.where(geometric, value, 1.0)), value)
    seen = ~np.isnan(value)
    item = pd.factorize(table["item"].astype(str), sort=True)[0]
    where, total, count = _per_item(group[seen], item[seen], value[seen])
    size = len(result)
    n = np.bincount(where, weights=count, minlength=size).astype(int)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(where, weights=total, minlength=size) / n
    verdicts = _verdict_metrics(metric[seen], value[seen], group[seen], item[seen])
    low, high = _bootstrap(where, total, count, size, level, draws, seed)
    wilson = result["metric"].astype(str).isin(verdicts).to_numpy()
    low[wilson], high[wilson] = wilson_interval(mean[wilson], n[wilson], level)
    power = result["metric"].astype(str).isin(GEOMETRIC).to_numpy()
    mean, low, high = (np.where(power, np.exp(np.where(power, v, 0)), v) for v in (mean, low, high))
    result = result.assign(value=mean, lo=low, hi=high, n=n, item="all")
    result = _unkept(result, table, keys)
    reason = np.full(size, "", dtype=object)
    reason[(np.bincount(where, minlength=size) == 1) & ~wilson] = "one item: no interval"
    reason[np.isinf(mean)] = "an item's value is infinite, so the mean is and has no interval"
    reason[n == 0] = "no item has a value"
    result = result.drop(columns=["se", "reason"], errors="ignore")
    if (reason != "").any():
        result["reason"] = reason
    return result, {key: _interval_name(key, verdicts) for key in sorted(set(metric))}


def _unkept(result: pd.DataFrame, table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Give the table's own columns a value where they were pooled over, and drop all others."""
    for name in ("run", "group"):
        if name not in keys:
            held = table[name].unique()
            result[name] = str(held[0]) if len(held) == 1 else "all"
    if "step" not in keys:
        result["step"] = table["step"].max()
    extra = set(coordinates(table)) - set(keys) - {"run", "step", "group", "item", "metric"}
    return result.drop(columns=list(extra))


def _per_item(
    group: Int[np.ndarray, " row"], item: Int[np.ndarray, " row"], value: Float[np.ndarray, " row"]
):
    """Sum and count of each item in each group, sorted by group and then item."""
    pairs, which = np.unique(group * (item.max(initial=0) + 1) + item, return_inverse=True)
    total = np.bincount(which, weights=value, minlength=len(pairs))
    count = np.bincount(which, minlength=len(pairs)).astype(float)
    return pairs // (item.max(initial=0) + 1), total, count


def _verdict_metrics(metric, value, group, item) -> list[str]:
    """Shares whose values are all 0 or 1 and whose items have one row in each group."""
    found = []
    for key in np.unique(metric):
        rows_of = metric == key
        once = not pd.DataFrame({"g": group[rows_of], "i": item[rows_of]}).duplicated().any()
        share = (METRICS[key].low, METRICS[key].high) == (0.0, 1.0)
        if share and once and np.isin(value[rows_of], (0.0, 1.0)).all():
            found.append(str(key))
    return found


def _interval_name(key: str, verdicts: list[str]) -> str:
    if key in verdicts:
        return "Wilson"
    return "bootstrap over items" + (" of the mean logarithm" if key in GEOMETRIC else "")


def _bootstrap(
    where: Int[np.ndarray, " pair"],
    total: Float[np.ndarray, " pair"],
    count: Float[np.ndarray, " pair"],
    groups: int,
    level: float,
    draws: int,
    seed: int,
) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, " group"]]:
    """Percentile intervals; groups with as many items share one matrix of multinomial weights."""
    low, high = np.full(groups, np.nan), np.full(groups, np.nan)
    size = np.bincount(where, minlength=groups)
    start = np.concatenate([[0], np.cumsum(size)])
    for items in np.unique(size[size > 1]):
        rng = np.random.default_rng([seed, int(items)])
        alike = np.flatnonzero(size == items)
        at = start[alike][:, None] + np.arange(items)
        step = max(1, CHUNK // draws)
        parts = max(1, CHUNK // items)
        weights = np.concatenate(
            [
                rng.multinomial(items, np.full(items, 1 / items), size=min(parts, draws - done))
                for done in range(0, draws, parts)
            ]
        ).astype(np.float32).T  # fmt: skip
        for begin in range(0, len(alike), step):
            pick = at[begin : begin + step]
            with np.errstate(invalid="ignore"):  # infinite values give NaN, with a reason
                mean = (total[pick] @ weights) / (count[pick] @ weights)
                bounds = np.quantile(mean, [(1 - level) / 2, (1 + level) / 2], axis=1)
            low[alike[begin : begin + step]], high[alike[begin : begin + step]] = bounds
    return low, high


def wilson_interval(
    share: Float[np.ndarray, " group"], n: Int[np.ndarray, " group"], level: float
) -> tuple[Float[np.ndarray, " group"], Float[np.ndarray, " group"]]:
    """Wilson (1927): the shares a score test would not reject, never outside 0 to 1.

    8 of 10 at .95 gives .4901625 to .9433178; NaN for n = 0.
    """
    z = stats.norm.ppf((1 + level) / 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # at 0 and 1 of n the bound is exact, but for rounding
    return np.maximum(middle - half, 0.0), np.minimum(middle + half, 1.0)


def percentile_tail(n: int, level: float) -> float:
    """Share of the draws beyond each end of a bootstrap interval over ``n`` items.

    Hesterberg (2015), "What teachers should know about the bootstrap", section 5.2: plain
    percentiles are too narrow, by a factor sqrt((n - 1) / n) and by the normal's quantile in place
    of Student's; these are ``Phi(-sqrt(n / (n - 1)) t)``. Level .95: .0024 for n = 6, .0183 for 30,
    .025 as n grows; also .025 for a single item, of which nothing can be resampled.
    """
    tail = (1 - level) / 2
    if n < 2:
        return tail
    return float(stats.norm.cdf(stats.t.ppf(tail, n - 1) * np.sqrt(n / (n - 1))))
