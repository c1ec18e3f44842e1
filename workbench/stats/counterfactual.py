"""Counterfactual memorization: models trained with an item against models trained without it.

Zhang et al. (2021), "Counterfactual memorization in neural language models", after Feldman & Zhang
(2020), "What neural networks memorize and why". It needs many models and no assumption on how
trained and untrained items would have moved, so it is a second truth to hold a causal estimate to.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from workbench.table import InputError, rows, validate

LEAST = 2  # models on each side; one gives no spread
NO_SPREAD = 1e-12  # of the largest score: below it a spread is rounding


def counterfactual_memorization(
    table: pd.DataFrame,
    membership: pd.DataFrame,
    *,
    by: Sequence[str] = ("step",),
    level: float = 0.95,
) -> pd.DataFrame:
    """Each item's mean score over runs trained with it, less that over runs trained without it.

    The interval is Welch's: ``se = sqrt(s_in^2 / n_in + s_out^2 / n_out)`` and Student's t with his
    degrees of freedom. It takes runs as independent draws, of the other items and of whatever else
    differs between them; runs that share initial weights say nothing about other initial weights.
    Pool items by ``summarise``: whether an item is in a run was drawn item by item, so that what a
    run does to all its items is spread over items like any other noise.

    Args:
        table: Scores with ``item, run, value``; ``metric`` (else "outcome") and any coordinates.
        membership: Columns ``item, run, inside``: whether the run trained on the item.
        by: Columns that tell apart several scores of one item in one run, as far as there are any.

    Returns:
        Rows of "counterfactual" with the coordinate ``of`` for the metric scored, in its unit and
        direction: 0 where training did nothing, at most the metric's range. ``n`` counts runs,
        ``n_in`` and ``n_out`` those of either side. Further coordinates are kept where the runs
        trained on an item agree on them. ``value`` is NaN, with a reason, where a side has fewer
        than two runs, ``se`` also where no side has any spread. ``.attrs`` count ``dropped``
        (scores that are NaN) and ``unknown`` (whose membership is not known); both are left out.

    Raises:
        InputError: Missing columns, a membership given twice, several scores for one item and run,
            no score whose membership is known, or a level outside 0 to 1.
    """
    if not 0 < level < 1:
        raise InputError(
            f"counterfactual_memorization: level is {level}, it must lie between 0 and 1"
        )
    scores, counts = _scores(table, membership)
    keys = ["item", "of", *(name for name in by if name in scores.columns)]
    repeated = scores.duplicated([*keys, "run"])
    if repeated.any():
        first = scores[repeated].iloc[0]
        raise InputError(
            f"counterfactual_memorization: item {first['item']} has several scores of {first['of']} "
            f"in run {first['run']}; name the columns that tell them apart in by"
        )
    sides = scores.groupby([*keys, "inside"], observed=True)["value"]
    sides = sides.agg(["mean", "var", "size"]).unstack("inside")
    mean, var, size = (
        sides[name].reindex(columns=[True, False]).to_numpy() for name in ("mean", "var", "size")
    )
    size = np.nan_to_num(size).astype(int)
    value, se, half = _welch(mean, var, size, level)
    result = rows(
        "counterfactual",
        value,
        run="all",
        item=sides.index.get_level_values("item"),
        lo=value - half,
        hi=value + half,
        n=size.sum(axis=1),
        beside={
            "se": se,
            "n_in": size[:, 0],
            "n_out": size[:, 1],
            "reason": [_reason(*each) for each in zip(*size.T, value, se, strict=True)],
            **{name: sides.index.get_level_values(name) for name in keys[1:]},
        },
    )
    result = result.drop(columns="group").merge(_coordinates(scores, keys), on=keys, how="left")
    result = validate(result)
    result.attrs = counts
    return result


def _scores(table: pd.DataFrame, membership: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """Scores that are numbers, with ``inside``; items and runs are matched as text."""
    asker = "counterfactual_memorization"
    for told, frame, needed in (
        ("table", table, ("item", "run", "value")),
        ("membership", membership, ("item", "run", "inside")),
    ):
        for name in needed:
            if name not in frame.columns:
                raise InputError(
                    f"{asker}: the {told} has no column {name!r}; it needs {', '.join(needed)}"
                )
    known = membership[["item", "run", "inside"]].astype({"item": str, "run": str})
    again = known.duplicated(["item", "run"])
    if again.any():
        first = known[again].iloc[0]
        raise InputError(
            f"{asker}: the membership says twice whether {first['item']} is in {first['run']}"
        )
    metric = table["metric"].astype(str) if "metric" in table.columns else "outcome"
    scores = table.drop(columns=["metric", "lo", "hi", "n", "se", "reason"], errors="ignore")
    scores = scores.astype({"item": str, "run": str}).assign(of=metric)
    scores = scores.merge(known, on=["item", "run"], how="left")
    missing, unknown = scores["value"].isna(), scores["inside"].isna()
    counts = {"dropped": int(missing.sum()), "unknown": int((unknown & ~missing).sum())}
    if counts["unknown"]:
        first = scores[unknown & ~missing].iloc[0]
        warnings.warn(
            f"{asker}: {counts['unknown']} scores left out, of which the membership says nothing; "
            f"the first is of {first['item']} in {first['run']}",
            stacklevel=3,
        )
    scores = scores[~missing & ~unknown]
    if scores.empty:
        raise InputError(
            f"{asker}: no score is of an item and run that the membership knows; do both name "
            "items and runs alike?"
        )
    return scores.assign(inside=scores["inside"].astype(bool)), counts


def _welch(mean, var, size, level: float):
    """Difference of the sides [row, (in, out)], its error, and half the width of its interval."""
    enough = (size >= LEAST).all(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        part = var / size
        total = part.sum(axis=1)
        freedom = total**2 / (part**2 / (size - 1)).sum(axis=1)
        value = np.where(enough, mean[:, 0] - mean[:, 1], np.nan)
        spread = enough & (np.sqrt(total) > NO_SPREAD * np.abs(mean).max(axis=1))
        se = np.where(spread, np.sqrt(total), np.nan)
        return value, se, stats.t.ppf((1 + level) / 2, freedom) * se


def _reason(inside: int, outside: int, value: float, se: float) -> str:
    if np.isnan(value):
        return f"in {inside} and out of {outside} runs: each needs {LEAST}"
    return "" if np.isfinite(se) else "no error: all runs of a side scored alike"


def _coordinates(scores: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """What the runs trained on an item, or all where there are none, agree on."""
    trained = scores.groupby(keys, observed=True)["inside"].transform("any")
    there = scores[scores["inside"] | ~trained].drop(columns=["inside", "run", "value"])
    grouped = there.groupby(keys, observed=True)
    agreed = (grouped.nunique(dropna=False) == 1).all()
    first = grouped.first()[agreed.index[agreed]].reset_index()
    return first if "group" in first.columns else first.assign(group="all")


def agreement(
    first: pd.DataFrame,
    second: pd.DataFrame,
    *,
    on: Sequence[str] = ("item",),
    by: Sequence[str] = (),
    level: float = 0.95,
) -> pd.DataFrame:
    """Do two estimates of the same items agree: mean difference, and Pearson's correlation.

    Args:
        first, second: Rows with ``value``; NaN values and rows without a partner are left out.
        on: Columns that name a measurement in both.
        by: Columns of ``first`` to split by, such as ``("kind", "dose")``.

    Returns:
        Rows of "difference" (first minus second; 0 where they agree on average; Student's t
        interval over the pairs) and "correlation" (1 where one orders and spaces the items as the
        other, 0 by chance, -1 reversed; Fisher's z interval). ``n`` counts pairs. NaN with a reason
        under two pairs, or under four or without spread for the correlation.

    Raises:
        InputError: Missing columns, a measurement given twice, or nothing in common.
    """
    on, by = list(on), list(by)
    for told, table, needed in (("first", first, [*on, *by]), ("second", second, on)):
        for name in [*needed, "value"]:
            if name not in table.columns:
                raise InputError(f"agreement: the {told} table has no column {name!r}")
        if table.duplicated(on).any():
            raise InputError(
                f"agreement: the {told} table has several rows per ({', '.join(on)}); select one"
            )
    texts = {n: str for n in on if not pd.api.types.is_numeric_dtype(first[n])}
    one = first[list(dict.fromkeys([*on, *by, "value"]))].astype(texts)
    two = second[[*on, "value"]].astype(texts).rename(columns={"value": "other"})
    both = one.merge(two, on=on).dropna(subset=["value", "other"])
    if both.empty:
        raise InputError(f"agreement: the tables share no ({', '.join(on)}) with a value in both")
    parts = []
    split = both.groupby(by, observed=True) if by else [((), both)]
    for where, pairs in split:
        beside = dict(zip(by, where, strict=True))
        a, b = pairs["value"].to_numpy(), pairs["other"].to_numpy()
        for metric, interval in (("difference", _difference), ("correlation", _correlation)):
            value, lo, hi, reason = interval(a, b, level)
            parts.append(
                rows(
                    metric,
                    value,
                    run="all",
                    lo=lo,
                    hi=hi,
                    n=len(a),
                    beside=beside | {"reason": reason},
                )
            )
    return validate(pd.concat(parts, ignore_index=True))


def _difference(a: np.ndarray, b: np.ndarray, level: float) -> tuple[float, float, float, str]:
    gap = a - b
    mean = float(gap.mean())
    if len(gap) < 2:
        return mean, np.nan, np.nan, "one pair: no interval"
    half = stats.t.ppf((1 + level) / 2, len(gap) - 1) * gap.std(ddof=1) / np.sqrt(len(gap))
    return mean, mean - half, mean + half, ""


def _correlation(a: np.ndarray, b: np.ndarray, level: float) -> tuple[float, float, float, str]:
    if len(a) < 4 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return np.nan, np.nan, np.nan, "no correlation: under four pairs, or no spread"
    value = float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))
    if abs(value) == 1:
        return value, value, value, ""
    half = stats.norm.ppf((1 + level) / 2) / np.sqrt(len(a) - 3)
    return value, *(float(np.tanh(np.arctanh(value) + side * half)) for side in (-1, 1)), ""
