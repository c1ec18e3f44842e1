"""What a scan of a long text says: heat along it, shares of its windows, its longest runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from workbench.stats.summarise import wilson_interval
from workbench.table import InputError, coordinates, rows, validate

THRESHOLDS = (0.001, 0.01, 0.1, 0.5)  # of p_z: a sample in a thousand, hundred, ten, two


def scan_heat(scan: pd.DataFrame) -> pd.DataFrame:
    """The probability of extraction along the text, from all windows that cover a place.

    Args:
        scan: What ``probe_scan`` gives.

    Returns:
        Rows of ``p_z``, two for each cell (the tokens between two ends of suffixes): the largest
        and the mean p_z of the windows whose suffix covers the cell, told apart by the coordinate
        ``pooled`` (max, mean). ``lo`` and ``hi`` are the smallest and largest of them, a range and
        no interval; ``n`` counts them. Coordinates ``position`` (first token) and ``tokens``.

    Raises:
        InputError: Rows that are no scan.
    """
    parts = []
    for where, part in _texts(scan, "log_p_z", "scan_heat"):
        position, p_z = part["position"].to_numpy(dtype=int), np.exp(part["value"].to_numpy())
        ends = np.unique(np.concatenate([position, position + where["suffix"]]))
        first = np.searchsorted(position, ends[:-1] - where["suffix"], side="right")
        after = np.searchsorted(position, ends[:-1], side="right")
        there = after > first  # windows further apart than their suffixes leave gaps
        first, after = first[there], after[there]
        low, high = (_over(pool, p_z, first, after) for pool in (np.minimum, np.maximum))
        mean = np.add.reduceat(np.append(p_z, 0.0), np.c_[first, after].ravel())[::2]
        mean = np.clip(mean / (after - first), low, high)
        beside = {"position": ends[:-1][there], "tokens": np.diff(ends)[there]}
        for pooled, value in (("max", high), ("mean", mean)):
            parts.append(
                _rows("p_z", value, where, {**beside, "pooled": pooled}, low, high, after - first)
            )
    return validate(pd.concat(parts, ignore_index=True))


def scan_shares(
    scan: pd.DataFrame, *, thresholds: Sequence[float] = THRESHOLDS, level: float = 0.95
) -> pd.DataFrame:
    """Share of a text's windows that one sample gives with at least a probability.

    Args:
        scan: What ``probe_scan`` gives.
        thresholds: Probabilities p_z, above 0 and at most 1.
        level: Of the interval.

    Returns:
        Rows of ``discoverable`` with ``tries`` 1 and ``p`` the threshold; items are windows. The
        interval is Wilson's for as many windows as fit beside each other without overlap, for
        overlapping ones say nearly the same thing; ``n`` counts all windows. 0 without memory.

    Raises:
        InputError: Rows that are no scan, a threshold out of range.
    """
    limits = np.atleast_1d(thresholds).astype(float)
    if not len(limits) or not ((limits > 0) & (limits <= 1)).all():
        raise InputError(f"scan_shares: thresholds {list(thresholds)} must lie above 0 and up to 1")
    parts = []
    for where, part in _texts(scan, "log_p_z", "scan_shares"):
        value = np.sort(part["value"].to_numpy())
        share = 1 - np.searchsorted(value, np.log(limits), side="left") / len(value)
        apart = len(value) * min(1.0, where["stride"] / (where["prefix"] + where["suffix"]))
        low, high = wilson_interval(share, np.full(len(share), max(1.0, apart)), level)
        parts.append(
            _rows("discoverable", share, where, {"tries": 1, "p": limits}, low, high, len(value))
        )
    return validate(pd.concat(parts, ignore_index=True))


def longest_runs(scan: pd.DataFrame, *, threshold: float = 0.5, top: int = 3) -> pd.DataFrame:
    """The longest stretches of a text that the model gives back, nearly and word for word.

    A near-verbatim run is a union of suffixes with p_z at or above the threshold that overlap or
    touch: each of its tokens lies in a window that a sample gives with that probability. A verbatim
    run is made of greedy matches in the same way: each window adds the tokens right before the
    first miss, if it begins inside the run or at its end. Since its prompt is then text that was
    given or was said, the run is what greedy decoding says from one prompt on, cut back to its
    own last ``prefix`` tokens from time to time.

    Args:
        scan: What ``probe_scan`` gives.
        threshold: Of p_z for near-verbatim runs, above 0 and at most 1.
        top: How many of each kind are given, the longest first; ties in the order of the text.

    Returns:
        Rows of ``near_verbatim_run`` (coordinate ``p``: the threshold) and ``verbatim_run``, in
        tokens, with the coordinates ``place`` (1 the longest), ``position`` (first token, NaN if
        there is no run: then the value is 0) and ``tokens``. A longest run is a maximum, so it has
        no interval; ``n`` counts windows. A control text gives the floor.

    Raises:
        InputError: Rows that are no scan, a threshold out of range, ``top`` below 1.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"longest_runs: threshold is {threshold}, it must lie above 0 and up to 1")
    if top < 1:
        raise InputError(f"longest_runs: top is {top}, it must be at least 1")
    parts = []
    for metric, kept in (("near_verbatim_run", "log_p_z"), ("verbatim_run", "verbatim_length")):
        for where, part in _texts(scan, kept, "longest_runs"):
            position, value = part["position"].to_numpy(dtype=int), part["value"].to_numpy()
            if metric == "verbatim_run":
                length = value.astype(int)
            else:
                length = np.where(value >= np.log(threshold), where["suffix"], 0)
            begin, end = merge(position[length > 0], (position + length)[length > 0])
            order = np.argsort(begin - end, kind="stable")[:top]
            begin, size = begin[order].astype(float), (end - begin)[order]
            if not len(size):
                begin, size = np.array([np.nan]), np.array([0])
            beside = {"place": 1 + np.arange(len(size)), "position": begin, "tokens": size}
            if metric == "near_verbatim_run":
                beside["p"] = threshold
            parts.append(_rows(metric, size, where, beside, np.nan, np.nan, len(part)))
    return validate(pd.concat(parts, ignore_index=True))


def merge(
    begin: Int[np.ndarray, " piece"], end: Int[np.ndarray, " piece"]
) -> tuple[Int[np.ndarray, " run"], Int[np.ndarray, " run"]]:
    """Unions of pieces that overlap or touch; pieces in order of their beginnings."""
    if not len(begin):
        return begin, end
    reach = np.maximum.accumulate(end)
    new = np.append(True, begin[1:] > reach[:-1])
    return begin[new], reach[np.append(new[1:], True)]


def _over(
    pool: np.ufunc,
    value: Float[np.ndarray, " window"],
    first: Int[np.ndarray, " cell"],
    after: Int[np.ndarray, " cell"],
) -> Float[np.ndarray, " cell"]:
    """``pool`` of ``value[first:after]`` for each cell."""
    # reduceat takes the stretch up to the next index, so every other result is the gap between
    return pool.reduceat(np.append(value, 0.0), np.c_[first, after].ravel())[::2]


def _texts(scan: pd.DataFrame, metric: str, asker: str):
    """The windows of each text in order, with the coordinates they share."""
    scan = validate(scan)
    lacking = [c for c in ("position", "prefix", "suffix", "stride") if c not in scan.columns]
    found = scan[scan["metric"] == metric]
    if lacking or found.empty:
        what = f"no column {lacking[0]!r}" if lacking else f"no rows of {metric}"
        raise InputError(f"{asker}: {what}; give the table that probe_scan made")
    keys = [c for c in coordinates(found) if c not in ("item", "metric", "position")]
    for values, part in found.groupby(keys, observed=True, dropna=False, sort=False):
        yield dict(zip(keys, values, strict=True)), part.sort_values("position")


def _rows(metric: str, value, where: dict, beside: dict, lo, hi, n) -> pd.DataFrame:
    place = {name: where[name] for name in ("run", "step", "group")}
    others = {name: held for name, held in where.items() if name not in place}
    return rows(metric, value, **place, lo=lo, hi=hi, n=n, beside=others | beside)
