"""Which texts fall first: the price at which an edit ends the recitation of each.

Edits along a sweep grow stronger and dearer, as time goes by for a memory, so the statistics are
those of survival: what is still recited under the strongest edit is known to stand at least so far
(right-censored), and what the unedited model does not recite cannot fall and says nothing.

Some texts come back: not recited under one edit, and recited again under a stronger one. As for
memories the first fall counts, for whoever edits that far no longer has the text; ``returned`` says
how many stronger edits recite it again, and ``end="last"`` counts from the last edit that does, so
that a result can be seen to hold either way.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from workbench.stats.frontier import edit_path, item_sweeps
from workbench.stats.summarise import percentile_tail
from workbench.stats.survival import survival_curve
from workbench.table import InputError, rows, validate

LEVEL = 0.95
ENDS = ("first", "last")
MEASURES = ("fall_price", "fall_removed")


def item_falls(
    table: pd.DataFrame,
    *,
    metric: str = "recitation_strict",
    group: str | Sequence[str] | None = None,
    end: str = "first",
) -> pd.DataFrame:
    """The price, and the share removed, at which each item's recitation ends under each method.

    The price of an edit is the largest rise of perplexity up to it, so that it grows along a sweep
    also where perplexity falls again. Edits are a grid: the fall lies after the last edit that left
    the item recited (``lo``) and not after the first that did not (``hi`` and the value).

    Args:
        table: What ``probe_curvature`` returned, rows of single items included.
        metric: A verdict, ``recitation_strict`` or ``recitation_loose``.
        group: Of the items; one or several, None takes all.
        end: ``first``: the recitation ends with the first edit that stops it. ``last``: with the
            first edit from which on none lets it come back.

    Returns:
        For each item that the unedited model recites, and each method, ``fall_price`` (0.1 where
        perplexity had to rise by a tenth) and ``fall_removed`` (1 - rho), with the coordinates
        ``event`` ("lost" or "kept": ``hi`` infinite, the value that of the strongest edit) and
        ``returned``, and the columns of the items (``kind``, ``dose``), with ``margin``, the
        ``recitation_margin`` under the unedited model, where the table has it. ``.attrs`` count the
        items ``not_recited``, and by method those that ``returned``.

    Raises:
        InputError: No verdicts, no unedited model, several models, an unknown ``end`` or group, or
            no item that is recited to begin with.
    """
    if end not in ENDS:
        raise InputError(f"item_falls: end is {end!r}; choose {' or '.join(ENDS)}")
    verdicts, price, about = item_sweeps(table, metric, group, "item_falls")
    if not np.isin(verdicts.to_numpy(), (0.0, 1.0)).all():
        raise InputError(f"item_falls: {metric} is no verdict; give recitation_strict or _loose")
    start = verdicts.loc["none"].iloc[0].to_numpy() == 1
    if not start.any():
        raise InputError(
            f"item_falls: the unedited model recites none of {len(start)} items, so none can fall"
        )
    named = {"run": str(table["run"].iloc[0]), "step": int(table["step"].iloc[0])}
    items = verdicts.columns[start]
    about = about.loc[items]
    margin = table[(table["metric"] == "recitation_margin") & (table["method"] == "none")]
    margin = margin[margin["item"].isin(items)].astype({"item": str}).set_index("item")["value"]
    if len(margin):
        about = about.assign(margin=margin)
    beside = {name: about[name].to_numpy() for name in about if name != "group"}
    parts, back = [], {}
    for method in [m for m in price.index.unique("method") if m != "none"]:
        path = edit_path(price, method)
        stands = verdicts.loc[path, items].to_numpy() == 1
        cost = np.maximum.accumulate(price.loc[path].to_numpy()) / price.loc[path].iloc[0] - 1
        removed = 1 - np.array([rho for _, rho in path])
        fell, at, returned = _falls(stands, end)
        back[str(method)] = int((returned > 0).sum())
        told = {
            "method": str(method),
            "event": np.where(fell, "lost", "kept"),
            "returned": returned,
            **beside,
        }
        for measure, scale in zip(MEASURES, (cost, removed), strict=True):
            value = scale[np.where(fell, at, len(path) - 1)]
            lo = scale[np.where(fell, at - 1, len(path) - 1)]
            hi = np.where(fell, value, np.inf)
            bounds = {"lo": lo, "hi": hi, "group": about["group"].to_numpy(), "item": items}
            parts.append(rows(measure, value, **bounds, **named, beside=told))
    falls = validate(pd.concat(parts, ignore_index=True))
    falls.attrs = {"not_recited": int((~start).sum()), "returned": back}
    return falls


def _falls(stands: Bool[np.ndarray, "edit item"], end: str):
    """Whether each item fell, at which edit, and how many stronger ones recite it again.

    The first edit is none, under which all stand.
    """
    missed = ~stands
    first = np.where(missed.any(axis=0), missed.argmax(axis=0), len(stands))
    beyond = np.arange(len(stands))[:, None] > first
    returned = (stands & beyond).sum(axis=0)
    if end == "last":
        # counted from the far end, the first that stands is the last that does
        first = len(stands) - stands[::-1].argmax(axis=0)
    return first < len(stands), first, returned


def fall_curve(
    falls: pd.DataFrame, *, by: Sequence[str] = ("method",), measure: str = "fall_price"
) -> pd.DataFrame:
    """Share of items still recited, by the price paid or the share removed, and where half is lost.

    Kaplan & Meier (1958), with the bands and intervals of :func:`survival_curve`.

    Args:
        falls: What :func:`item_falls` gives.
        by: Coordinates that name a curve, such as ``("method", "dose")``; method always does.
        measure: ``fall_price`` or ``fall_removed``.

    Returns:
        Rows of "survival" with the coordinates ``by`` and ``price`` (or ``removed``): 1 at 0, n
        the items at risk; and one of the measure itself for each curve, its median: the first
        price at which at most half are recited. As prices are a grid it is late by up to a gap.
        NaN with a reason where more than half stand to the end.

    Raises:
        InputError: Other rows than falls, an unknown column or measure, missing values in ``by``.
    """
    times = _of_measure(falls, measure, "fall_curve")
    x = measure.removeprefix("fall_")
    by = ["method", *(name for name in by if name != "method")]
    for name in by:
        if name not in times.columns:
            raise InputError(f"fall_curve: no column {name!r}; there are {', '.join(times)}")
    # survival_curve has a coordinate method of its own
    curve = survival_curve(
        times.assign(metric="survival_time").rename(columns={"method": "edit"}),
        by=["edit" if name == "method" else name for name in by],
    )
    curve = curve[curve["metric"] != "hazard"].drop(columns=["method", "since"], errors="ignore")
    curve = curve.rename(columns={"edit": "method", "time": x})
    metric = curve["metric"].astype(str).replace("median_survival", measure)
    return validate(curve.assign(metric=metric))


def fall_ranks(
    falls: pd.DataFrame,
    covariates: Sequence[str],
    *,
    strata: Sequence[str] = (),
    measure: str = "fall_price",
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Do items with more of something fall later? Somers' D of the fall on each covariate.

    Over the pairs of items whose order of fall is known (one had fallen before the other's last
    recitation): those where the item with more of the covariate falls later, less those where it
    falls earlier, over all of them. A pair equal in the covariate counts in neither, so copies
    that come in a few doses cannot reach 1. It is twice Harrell's concordance less 1.

    Args:
        falls: What :func:`item_falls` gives, with the covariates as columns.
        covariates: Columns with numbers, such as ``("dose", "causal", "margin")``.
        strata: Columns within which pairs are formed: items of one kind, or of one dose.
        draws, seed: Of the bootstrap over items.

    Returns:
        "rank_correlation" with the coordinates ``method`` and ``covariate``: 1 where more always
        falls later, 0 without relation, -1 where more always falls first. ``n`` counts items;
        interval at 95 % by bootstrap over items, widened for few of them. NaN with a reason where
        no pair's order is known or all items are equal in the covariate. Items without the covariate are left out, counted in ``.attrs``.

    Raises:
        InputError: Other rows than falls, an unknown column or measure, a covariate that is text.
    """
    times = _of_measure(falls, measure, "fall_ranks")
    for name in (*covariates, *strata):
        if name not in times.columns:
            raise InputError(f"fall_ranks: no column {name!r}; there are {', '.join(times)}")
    parts, dropped = [], {}
    for covariate in covariates:
        if not pd.api.types.is_numeric_dtype(times[covariate].dtype):
            raise InputError(f"fall_ranks: {covariate} is text; ranks need numbers")
        has = times[covariate].notna()
        dropped[covariate] = int(times.loc[~has, "item"].nunique())
        for method, part in times[has].groupby("method", observed=True):
            value, lo, hi, why = _ranks(part, covariate, strata, draws, seed)
            beside = {"method": str(method), "covariate": covariate, "reason": why}
            named = {"run": str(part["run"].iloc[0]), "step": int(part["step"].iloc[0])}
            told = {"lo": lo, "hi": hi, "n": len(part), "beside": beside}
            parts.append(rows("rank_correlation", value, **named, **told))
    if any(dropped.values()):
        told = ", ".join(f"{count} without {name}" for name, count in dropped.items() if count)
        warnings.warn(f"fall_ranks: left out items: {told}", stacklevel=2)
    if not parts:
        raise InputError("fall_ranks: no item has any of the covariates")
    table = validate(pd.concat(parts, ignore_index=True))
    table.attrs = {"dropped": dropped}
    return table


def _ranks(part: pd.DataFrame, covariate: str, strata: Sequence[str], draws: int, seed: int):
    sign, known = pair_orders(part["lo"].to_numpy(), part["hi"].to_numpy())
    for name in strata:
        label = part[name].astype(str).to_numpy()
        known = known & (label[:, None] == label[None, :])
    value = part[covariate].to_numpy(dtype=float)
    agree = np.where(known, sign * np.sign(value[:, None] - value[None, :]), 0.0)
    pairs = known.astype(float)
    if not known.any():
        return np.nan, np.nan, np.nan, "no two items are known to fall one after the other"
    if (value == value[0]).all():
        return np.nan, np.nan, np.nan, f"{covariate} is the same for all items"
    n = len(part)
    weights = np.random.default_rng([seed, n]).multinomial(n, np.full(n, 1 / n), size=draws)
    with np.errstate(invalid="ignore"):  # a resample may hold no pair in order
        drawn = ((weights @ agree) * weights).sum(axis=1) / ((weights @ pairs) * weights).sum(
            axis=1
        )
    tail = percentile_tail(n, LEVEL)
    lo, hi = np.nanquantile(drawn, [tail, 1 - tail])
    found = agree.sum() / pairs.sum()
    return found, min(lo, found), max(hi, found), None


def pair_orders(
    lo: Float[np.ndarray, " item"], hi: Float[np.ndarray, " item"]
) -> tuple[Float[np.ndarray, "item item"], Bool[np.ndarray, "item item"]]:
    """For items i and j: 1 where i is known to fall later than j, -1 where earlier, else 0."""
    later = lo[:, None] >= hi[None, :]
    sign = later.astype(float) - later.T
    return sign, sign != 0


def _of_measure(falls: pd.DataFrame, measure: str, asker: str) -> pd.DataFrame:
    if measure not in MEASURES:
        raise InputError(f"{asker}: measure is {measure!r}; choose {' or '.join(MEASURES)}")
    falls = validate(falls)
    found = falls[(falls["metric"] == measure) & (falls["item"] != "all")]
    if found.empty or "event" not in found.columns:
        held = ", ".join(sorted(falls["metric"].astype(str).unique())) or "no rows"
        raise InputError(f"{asker}: needs what item_falls gives, got {held}")
    return found
