"""Edits compared at the same price: the recitation they leave at equal perplexity."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from workbench.stats.summarise import wilson_interval
from workbench.table import InputError, rows, validate

RATIOS = (1.02, 1.05, 1.10, 1.20)  # perplexity over that of the unedited model
LEVEL = 0.95
DRAWS = 2000
VERDICTS = ("recitation_strict", "recitation_loose")
CARRIED = ("kind", "dose", "copies")  # columns of the items on their rows
NONE = "none"  # the method of the rows of the unedited model


def matched_frontier(
    table: pd.DataFrame,
    *,
    metric: str = "recitation_strict",
    ratios: Sequence[float] = RATIOS,
    against: str = "svd",
    group: str | Sequence[str] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """What each kind of edit leaves of the recitation once perplexity has risen so far.

    Any edit strong enough stops recitation, so Merullo et al. (2025) compare edits at matched
    perplexity. Here :func:`at_price` reads the verdict of each item off each sweep, from the
    unedited model and the gentlest edit to the strongest; the mean over items is the value.

    Args:
        table: What ``probe_curvature`` returned, rows of single items included.
        metric: ``recitation_strict``, ``recitation_loose`` or ``edit_distance``.
        ratios: Perplexities at which to compare, as multiples of the unedited one; at least 1.
        against: The method that the others are compared with.
        group: Of the items; one or several, None takes all.

    Returns:
        For each ``method`` and ``ratio`` (coordinates) a row of ``metric``, and one of
        ``difference``, the method minus ``against`` on the same items: negative where the method
        removes more recitation, 0 where they are alike. Intervals: bootstrap over items, paired
        (Wilson where every verdict is 0 or 1, as on an edit of the sweep itself); perplexities count as known. NaN with a reason where a sweep ends before it costs so much.

    Raises:
        InputError: Rows of several models, no such metric or group, no unedited rows, ratios
            below 1.
    """
    if any(not ratio >= 1 for ratio in ratios):
        raise InputError(f"matched_frontier: ratios are {list(ratios)}, needs at least 1 each")
    verdicts, price, _ = item_sweeps(table, metric, group, "matched_frontier")
    items = verdicts.shape[1]
    weights = np.random.default_rng([seed, items]).multinomial(
        items, np.full(items, 1 / items), size=DRAWS
    )
    methods = [m for m in price.index.unique("method") if m != NONE]
    made = []
    for ratio in ratios:
        at = {m: _at(verdicts, price, m, ratio) for m in methods}
        for method in methods:
            beside = {"method": method, "ratio": ratio}
            made.append(_pooled(table, metric, at[method], weights / items, beside))
            if against in at and method != against:
                gap = at[method] - at[against]
                made.append(_pooled(table, "difference", gap, weights / items, beside))
    return validate(pd.concat(made, ignore_index=True))


def at_price(
    verdicts: Float[np.ndarray, "edit item"], price: Float[np.ndarray, " edit"], ratio: float
) -> Float[np.ndarray, " item"]:
    """Each item's verdict where a sweep first costs ``ratio`` times its first price.

    Linear in log price between the two edits around the crossing; what happens beyond is not
    looked at, so a sweep whose price falls again is read at its first crossing. All NaN if it
    never gets there. At prices 100 and 120, verdicts 1 and 0, the ratio 1.1 gives
    ``1 - ln 1.1 / ln 1.2 = 0.477``.
    """
    # 1.1 * 100 is a rounding above 110, and that edit is the crossing
    above = np.flatnonzero(price >= ratio * price[0] * (1 - 1e-12))
    if not len(above):
        return np.full(verdicts.shape[1], np.nan)
    after = above[0]
    if after == 0:
        return verdicts[0].copy()
    low, high = np.log(price[after - 1]), np.log(price[after])
    share = min((np.log(ratio * price[0]) - low) / (high - low), 1.0)
    return (1 - share) * verdicts[after - 1] + share * verdicts[after]


def choose_layers(
    table: pd.DataFrame,
    *,
    metric: str = "recitation_strict",
    ratio: float = 1.10,
    group: str | Sequence[str] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Choose on some items which layers to edit, and report on the others.

    The best of several sets of layers looks better on the items it was chosen by than it is. So
    the items are split in two, within kinds and groups, by a hash that depends on the seed and
    their names alone. The set that leaves the least recitation of the first half at the price is
    chosen (of equals the one with the larger edit distance, then the first); the other half says
    what it is worth. A set whose strongest edit costs less than the price is taken at that.

    Args:
        table: What ``sweep_layers`` returned.
        metric: ``recitation_strict`` or ``recitation_loose``.
        ratio: Of perplexity to the unedited model's, at which sets are compared.
        group: Of the items; one or several, None takes all.

    Returns:
        For each set (coordinate ``layers``) a row of ``metric`` for each ``half``, "choosing" and
        "reporting", with ``chosen`` "yes" or "no"; and a row of ``difference``, reporting less
        choosing, of the chosen one: its optimism, above 0 where the choice flattered itself.
        ``price`` is the ratio at which a set was read. Intervals: as of :func:`matched_frontier`,
        halves apart, the choice taken as made. ``.attrs["chosen"]`` names the set.

    Raises:
        InputError: No ``layers``, fewer than two items, a ratio not above 1, or as
            :func:`matched_frontier`.
    """
    if not ratio > 1:
        raise InputError(f"choose_layers: ratio is {ratio}, it must be above 1")
    if "layers" not in table.columns:
        raise InputError("choose_layers: no column 'layers'; give the table of sweep_layers")
    layers = table["layers"].astype(str)
    names = [name for name in dict.fromkeys(layers) if name != NONE]
    at, apart, paid = {}, {}, {}
    for name in names:
        part = table[layers.isin([NONE, name])].drop(columns="layers")
        verdicts, price, about = item_sweeps(part, metric, group, "choose_layers")
        distance, _, _ = item_sweeps(part, "edit_distance", group, "choose_layers")
        method = next(m for m in price.index.unique("method") if m != NONE)
        path, paid[name] = edit_path(price, method), ratio
        at[name] = _at(verdicts, price, method, ratio)
        apart[name] = _at(distance, price, method, ratio)
        if np.isnan(at[name]).any():
            paid[name] = price.loc[path[-1]] / price.loc[path[0]]
            at[name], apart[name] = (each.loc[path[-1]].to_numpy() for each in (verdicts, distance))
        about = about.loc[verdicts.columns]
    if len(about) < 2:
        raise InputError(f"choose_layers: {len(about)} item, needs two to choose and to report")
    first = halves(about, seed)
    chosen = min(names, key=lambda name: (at[name][first].mean(), -apart[name][first].mean()))
    made = []
    drawn = {  # halves are different items, so they are resampled apart
        half: np.random.default_rng([seed, k]).multinomial(n, np.full(n, 1 / n), size=DRAWS) / n
        for k, (half, n) in enumerate((("choosing", first.sum()), ("reporting", (~first).sum())))
    }
    for name in names:
        for half, members in (("choosing", first), ("reporting", ~first)):
            told = {"layers": name, "half": half, "ratio": ratio, "price": paid[name]}
            told["chosen"] = "yes" if name == chosen else "no"
            made.append(_pooled(table, metric, at[name][members], drawn[half], told))
    both = [drawn[h] @ at[chosen][m] for h, m in (("choosing", first), ("reporting", ~first))]
    gap = at[chosen][~first].mean() - at[chosen][first].mean()
    lo, hi = np.quantile(both[1] - both[0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    told = {"layers": chosen, "half": "reporting - choosing", "ratio": ratio, "chosen": "yes"}
    told["price"] = paid[chosen]
    named = {"run": str(table["run"].iloc[0]), "step": int(table["step"].iloc[0])}
    bounds = {"lo": min(lo, gap), "hi": max(hi, gap), "n": len(about), "beside": told}
    made.append(rows("difference", gap, **named, **bounds))
    result = validate(pd.concat(made, ignore_index=True))
    result.attrs = {"chosen": chosen}
    return result


def halves(about: pd.DataFrame, seed: int) -> Bool[np.ndarray, " item"]:
    """Half of the items, those of each kind and group too; true for the first half.

    Within a kind and group every second item in the order of a hash of (seed, name), kinds with an
    odd number taking turns, so that the split depends on the names and not on their order.
    """
    strata = [name for name in ("group", "kind") if name in about.columns]
    names = about.index.astype(str)
    digest = [
        hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).hexdigest() for name in names
    ]
    order = about.reset_index(drop=True).assign(digest=digest)
    order = order.astype(dict.fromkeys(strata, str)).sort_values([*strata, "digest"])
    first = np.zeros(len(about), dtype=bool)
    first[order.index[::2]] = True
    return first


def item_sweeps(
    table: pd.DataFrame, metric: str, group: str | Sequence[str] | None, asker: str
) -> tuple[pd.DataFrame, pd.Series, pd.DataFrame]:
    """Verdicts ``[(method, rho), item]``, the perplexity of each edit, and the items' own columns.

    Raises:
        InputError: Rows of several models, no such metric or group, no unedited rows.
    """
    table = validate(table)
    if len(table[["run", "step"]].drop_duplicates()) != 1:
        raise InputError(f"{asker}: the table holds several models or steps; select one")
    items = table[(table["metric"] == metric) & (table["item"] != "all")]
    price = table[table["metric"] == "perplexity"]
    if items.empty or price.empty or NONE not in set(price.get("method", ())):
        raise InputError(
            f"{asker}: needs rows of {metric} for each item and of perplexity, with those "
            f"of the unedited model (method {NONE!r}); give the table of probe_curvature"
        )
    if group is not None:
        groups, there = [group] if isinstance(group, str) else list(group), items["group"]
        lacking = [name for name in groups if name not in set(there)]
        if lacking:
            told = ", ".join(sorted(there.astype(str).unique()))
            raise InputError(f"{asker}: no items of group {lacking[0]!r}; there are {told}")
        items = items[there.isin(groups)]
    edit = ["method", "rho"]
    wide = items.astype({"method": str}).pivot(index=edit, columns="item", values="value")
    own = items[items["method"] == NONE].astype({"item": str}).set_index("item")
    carried = [name for name in CARRIED if name in own.columns]
    return wide, price.astype({"method": str}).set_index(edit)["value"], own[["group", *carried]]


def edit_path(price: pd.Series, method: str) -> list[tuple[str, float]]:
    """A method's edits in order of strength, the unedited model first."""
    shares = sorted(price.loc[method].index, reverse=True)
    return [*((NONE, rho) for rho in price.loc[NONE].index), *((method, rho) for rho in shares)]


def _at(verdicts: pd.DataFrame, price: pd.Series, method: str, ratio: float) -> np.ndarray:
    path = edit_path(price, method)
    return at_price(verdicts.loc[path].to_numpy(), price.loc[path].to_numpy(), ratio)


def _pooled(table, metric, values, weights, beside: dict) -> pd.DataFrame:
    first = table[table["metric"] == "perplexity"].iloc[0]
    low, high = np.nan, np.nan
    if np.isfinite(values).all():
        verdicts = metric in VERDICTS and np.isin(values, (0.0, 1.0)).all()
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(weights @ values, [tail, 1 - tail])
        if verdicts:  # resamples of items that are all alike would claim to be sure
            low, high = wilson_interval(values.mean(), np.array(len(values)), LEVEL)
        # a mean of equal numbers may land a rounding beyond them
        low, high = min(low, values.mean()), max(high, values.mean())
        reason = None
    else:
        reason = f"a sweep ends before perplexity has risen to {beside['ratio']:g} times"
    return rows(
        metric,
        values.mean(),
        run=str(first["run"]),
        step=int(first["step"]),
        lo=low,
        hi=high,
        n=len(values),
        beside=beside | {"reason": reason},
    )
