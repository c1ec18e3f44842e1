"""From the probability that one sample is a text to what n samples give (Hayes et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from workbench.stats.summarise import wilson_interval
from workbench.table import InputError, coordinates, rows, validate

SAMPLES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
CHANCES = (0.1, 0.5, 0.9)
TIE = 1e-12  # relative rounding below which a probability counts as reached


def log_miss(log_p_z: Float[np.ndarray, " item"]) -> Float[np.ndarray, " item"]:
    """``log(1 - p_z)``, exact where p_z is near 0 and where it is near 1.

    0 for p_z = 0 (a sample always misses), -inf for p_z = 1. Mächler (2012), accurate computation
    of log(1 - exp(-|a|)): two forms, each good on its side of p_z = 1/2.
    """
    log_p_z = np.asarray(log_p_z, dtype=float)
    with np.errstate(divide="ignore"):
        return np.where(
            log_p_z > -np.log(2), np.log(-np.expm1(log_p_z)), np.log1p(-np.exp(log_p_z))
        )


def extraction_chance(log_p_z: Float[np.ndarray, " item"], n: float) -> Float[np.ndarray, " item"]:
    """``1 - (1 - p_z)^n``: the chance that at least one of n samples is the text."""
    return -np.expm1(n * log_miss(log_p_z))


def samples_needed(log_p_z: Float[np.ndarray, " item"], p: float) -> Float[np.ndarray, " item"]:
    """Fewest samples that hold the text with probability p or more; inf where p_z is 0.

    ``ceil(log(1 - p) / log(1 - p_z))``: p_z = .05 and p = .4 need 10, for nine give .3698.
    """
    miss = log_miss(log_p_z)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log1p(-p) / miss
    ratio = np.where(miss == 0, np.inf, ratio)
    return np.where(np.isnan(log_p_z), np.nan, np.maximum(1.0, np.ceil(ratio * (1 - TIE))))


def discoverable(
    table: pd.DataFrame,
    *,
    n: Sequence[int] = SAMPLES,
    p: Sequence[float] = CHANCES,
    by: Sequence[str] | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """Share of items that are (n, p)-discoverable: n samples give them with probability p or more.

    Hayes et al. (2024): an item counts if ``1 - (1 - p_z)^n >= p``, computed from ``log p_z``
    throughout, so that a p_z of 1e-200 is not 0. Greedy decoding is the limit of temperature 0:
    its p_z is 1 or 0 and its share the same for all n and p.

    Args:
        table: Item rows that hold ``log_p_z``; other metrics are left aside.
        n: Numbers of samples, at least 1.
        p: Probabilities, above 0 and at most 1.
        by: Columns that stay, such as ``group`` and ``scheme``; None keeps all coordinates.
        level: Of the interval.

    Returns:
        Rows of ``discoverable`` for each (n, p) and combination of the other coordinates, with
        the coordinates ``tries`` (n) and ``p``. Wilson's interval, for texts like these; the
        table's ``n`` counts items. 0 without memory while n is small: every text comes out in the
        end, so that controls tell where memory stops. Items without a value are counted in
        ``.attrs["dropped"]``.

    Raises:
        InputError: No ``log_p_z``, pooled rows, an item twice, ``n`` or ``p`` out of range.
    """
    n, p = np.atleast_1d(n).astype(float), np.atleast_1d(p).astype(float)
    _refuse("discoverable", n=n, p=p)
    grid_n, grid_p = (each.ravel() for each in np.meshgrid(n, p, indexing="ij"))
    # 1 - (1 - p_z)^n >= p  iff  -log(1 - p_z) >= -log(1 - p) / n
    with np.errstate(divide="ignore"):
        needed = -np.log1p(-grid_p) / grid_n * (1 - TIE)
    parts, dropped = [], 0
    for where, part in _groups(table, by, "discoverable"):
        hazard = -log_miss(part["value"].dropna().to_numpy())
        dropped += len(part) - len(hazard)
        count = len(hazard) - np.searchsorted(np.sort(hazard), needed, side="left")
        with np.errstate(invalid="ignore"):
            share = count / np.float64(len(hazard))
        low, high = wilson_interval(share, np.full(len(share), len(hazard)), level)
        beside = where | {"tries": grid_n, "p": grid_p}
        made = rows("discoverable", share, run=beside.pop("run"), step=beside.pop("step"),
                    group=beside.pop("group"), lo=low, hi=high, n=len(hazard), beside=beside)  # fmt: skip
        parts.append(made if len(hazard) else made.assign(reason="no item has a value"))
    result = validate(pd.concat(parts, ignore_index=True))
    result.attrs = {"interval": "Wilson", "dropped": dropped}
    return result


def tries_needed(
    table: pd.DataFrame,
    *,
    p: float = 0.5,
    by: Sequence[str] | None = None,
    level: float = 0.95,
) -> pd.DataFrame:
    """How many samples it takes to extract the median item with probability p.

    The median, since a single text that never comes out makes the mean infinite. Its interval are
    the order statistics that hold it with the probability of ``level`` or more, whatever the
    distribution (binomial; below six items at 95 % it has no finite ends and is NaN).

    Args:
        table: Item rows that hold ``log_p_z``; other metrics are left aside.
        p: Probability to be reached, above 0 and below 1.
        by: Columns that stay, such as ``group`` and ``scheme``; None keeps all coordinates.
        level: Of the interval.

    Returns:
        Rows of ``tries``, lower = better remembered, 1 at best, inf with a ``reason`` where at
        least half of the texts cannot come out under the scheme. Coordinate ``p``.

    Raises:
        InputError: No ``log_p_z``, pooled rows, an item twice, ``p`` out of range.
    """
    if not 0 < p < 1:
        raise InputError(f"tries_needed: p is {p}, it must lie between 0 and 1")
    parts, dropped = [], 0
    for where, part in _groups(table, by, "tries_needed"):
        needed = np.sort(samples_needed(part["value"].dropna().to_numpy(), p))
        dropped += len(part) - len(needed)
        value, low, high, reason = _median(needed, level)
        beside = where | {"p": p, "reason": reason}
        parts.append(
            rows("tries", value, run=beside.pop("run"), step=beside.pop("step"),
                 group=beside.pop("group"), lo=low, hi=high, n=len(needed), beside=beside)
        )  # fmt: skip
    result = validate(pd.concat(parts, ignore_index=True))
    result.attrs = {"interval": "order statistics", "dropped": dropped}
    return result


def _median(ordered: np.ndarray, level: float) -> tuple[float, float, float, str]:
    size = len(ordered)
    if not size:
        return np.nan, np.nan, np.nan, "no item has a value"
    # the lower of two middle ones: half a step between 3 samples and never is no number
    value = ordered[(size - 1) // 2]
    reason = "most items cannot come out under the scheme" if np.isinf(value) else ""
    below = int(stats.binom.ppf((1 - level) / 2, size, 0.5))
    if stats.binom.cdf(below, size, 0.5) > (1 - level) / 2:
        below -= 1  # of the items, this many at most may lie outside on either side
    if below < 0:
        return value, np.nan, np.nan, reason or f"{size} items: too few for an interval"
    return value, ordered[below], ordered[size - 1 - below], reason


def _groups(table: pd.DataFrame, by: Sequence[str] | None, asker: str):
    """The log_p_z rows of each combination of what stays, with what their rows are to say."""
    table = validate(table)
    found = table[table["metric"] == "log_p_z"]
    if found.empty:
        held = ", ".join(sorted(table["metric"].astype(str).unique()))
        raise InputError(f"{asker}: the table has no rows of log_p_z; it has {held or 'none'}")
    pooled = (found["item"] == "all").sum()
    if pooled:
        raise InputError(f"{asker}: {pooled} rows are pooled already (item is all); leave them out")
    there = [name for name in coordinates(found) if name not in ("item", "metric")]
    keys = there if by is None else [name for name in by if name != "metric"] or ["run"]
    lacking = [name for name in keys if name not in there]
    if lacking:
        raise InputError(f"{asker}: no column {lacking[0]!r}; there are {', '.join(there)}")
    for values, part in found.groupby(keys, observed=True, dropna=False, sort=False):
        where = dict(zip(keys, values, strict=True))
        twice = part["item"].duplicated()
        if twice.any():
            raise InputError(
                f"{asker}: item {part['item'][twice].iloc[0]} has several rows; add to by the "
                "column that tells them apart"
            )
        alone = {name: part[name].unique() for name in ("run", "group")}
        pooled = {name: each[0] if len(each) == 1 else "all" for name, each in alone.items()}
        yield {**pooled, "step": part["step"].max(), **where}, part


def _refuse(asker: str, *, n: np.ndarray, p: np.ndarray) -> None:
    if not len(n) or not (n >= 1).all():
        raise InputError(f"{asker}: n is {n.tolist()}, samples must be at least 1")
    if not len(p) or not ((p > 0) & (p <= 1)).all():
        raise InputError(f"{asker}: p is {p.tolist()}, probabilities lie above 0 and up to 1")
