"""Memorization profiles: difference-in-differences over a panel of items and checkpoints.

Lesci et al. (2024), "Causal estimation of memorisation profiles", ACL, after Callaway & Sant'Anna
(2021), "Difference-in-differences with multiple time periods", J. Econometrics 225. What training
on an item did to it is the change since the last checkpoint before its first exposure, minus the
same change in items that were not trained on.

Reading is in :mod:`panel`, the contrasts and their means in :mod:`cells`, errors and bands in
:mod:`influence`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats
from threadpoolctl import threadpool_limits

from workbench.stats.cells import (
    Aggregate,
    Cells,
    Means,
    cell_means,
    make_aggregate,
    make_cells,
    result_rows,
    take,
)
from workbench.stats.influence import (
    bootstrap,
    critical_values,
    errors_and_reasons,
    estimates,
    few_items,
    wald_statistic,
)
from workbench.stats.panel import Panel, read_panel
from workbench.table import InputError, rows

BY = ("cell", "lag", "step", "cohort", "overall")
CONTROLS = ("never", "not_yet")
BASES = ("varying", "universal")
ERRORS = ("analytic", "bootstrap")
QUANTILES = ("normal", "t")
# the products are small and many: on a busy machine threads wait for one another longer than they work
one_thread = threadpool_limits.wrap(limits=1, user_api="blas")


@one_thread
def memorization_profile(
    table: pd.DataFrame,
    *,
    by: str = "cell",
    control: str = "never",
    base: str = "varying",
    cluster: str | None = None,
    errors: str = "analytic",
    quantile: str = "normal",
    draws: int = 999,
    level: float = 0.95,
    simultaneous: bool = True,
    exclude_initial: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Estimate what training on each cohort did to it, at each checkpoint, with its uncertainty.

    ``ATT(g, t) = mean over cohort g of (Y_t - Y_b) - mean over controls of (Y_t - Y_b)`` with b
    the last checkpoint before g. Before the exposure (t < g) the same contrast is a placebo.

    Any panel will do, whatever was measured and wherever::

        panel = pd.read_parquet("panel.parquet")  # columns item, step, cohort, value
        profile = memorization_profile(panel, by="lag")

    Args:
        table: One row per item and checkpoint: ``item``, ``step``, ``value`` and ``cohort``, the
            update whose batch first held the item, missing = never. Where there are columns
            ``run`` and ``metric``, they hold one value each. A column ``lag`` (updates since the
            item's last exposure) replaces ``step - cohort`` as lag; it must agree within a cohort.
            Columns ``copies`` (so far) and ``dose`` (in all) then say which checkpoints lie after
            the last exposure; without them the lags do.
        by: "cell" gives ATT(g, t); "lag" the event study, over checkpoints after the last exposure;
            "step", "cohort" and "overall" are means over the cells with t >= g. Every cell weighs
            as its cohort's share of items, whichever the aggregate.
        control: "never" trained on, or "not_yet" trained on at t and b (the never-trained included).
        base: Of placebo cells: "varying" is the checkpoint before t; "universal" is b for all, and
            the cell t = b, zero by definition, is left out.
        cluster: A column that says which items belong together, such as the document they were cut
            from: their influences are summed before squaring, and they share their draws. Clusters
            may lie within cohorts or across them.
        errors: "analytic", the root of the sum of squared influences; or "bootstrap", the
            interquartile range of the multiplier draws over 1.34898.
        quantile: "normal" bands hold for many items a cohort. With few (say under 20), "t" takes
            n - 1 for n in the variances, and Student's t with Welch-Satterthwaite's degrees of
            freedom, each row's own. Simultaneous bands take Sidak's level for as many rows, and for
            rows of one cohort the smaller sample's n - 1: wide, but they hold. It needs clusters,
            if any, that lie within cohorts.
        draws: Rademacher multiplier draws for bootstrap errors and simultaneous normal bands.
        simultaneous: Bands that hold for all rows of the result at once; else for each alone.
        exclude_initial: Leave out step 0. At random initialisation all texts have one loss, so a
            difference from there is the difference in level between texts. Cohorts left without a
            base are named in ``.attrs["excluded"]``.

    Returns:
        Rows of "memorization", and for "cell" and "lag" of "placebo" (0 where trends are parallel),
        in the outcome's unit: 0 where training did nothing, positive where it raised the outcome.
        ``n`` counts treated items, ``n_control`` controls. ``lag`` of a placebo is counted from the
        first exposure and negative. ``step`` of a mean over steps is the last checkpoint.
        ``.attrs`` hold ``cohort_sizes``, ``excluded``, ``dropped`` (holes in the panel; cells use
        the items seen at both of their checkpoints) and ``critical_value`` (half-width / ``se``;
        with "t", what it would be with many items). ``se`` and band are NaN with a reason where
        one item or cluster, or no spread, gives no error.

    Raises:
        InputError: Several metrics or runs, repeated or infinite values, an item in two cohorts or
            clusters, no controls, cohorts exposed before the first checkpoint, disagreeing lags.
    """
    asker = "memorization_profile"
    _check_choices(asker, by=by, control=control, base=base, errors=errors, quantile=quantile)
    _check_numbers(asker, draws=draws, level=level)
    panel, excluded = read_panel(table, asker, exclude_initial=exclude_initial, cluster=cluster)
    _refuse_crossed(panel, quantile, cluster, asker)
    parts = _estimate(panel, by=by, control=control, base=base, asker=asker)
    result, spread = result_rows(panel, *parts), estimates(panel, *parts)
    variance = spread.variance()
    se, result["reason"] = errors_and_reasons(spread, variance)
    critical, freedom = float(stats.norm.ppf((1 + level) / 2)), None
    if errors == "bootstrap" or (simultaneous and quantile == "normal"):
        sigma, largest = bootstrap(spread, se, draws=draws, seed=seed)
        se = sigma if errors == "bootstrap" else se
        if simultaneous:
            critical = max(critical, float(np.quantile(largest, level)))
    if quantile == "t":
        factor, freedom = few_items(spread, variance, far=simultaneous)
        se = se * factor
        if simultaneous:  # the draws of few items take too few values to have a tail
            each = level ** (1 / max(1, np.isfinite(se).sum()))
            critical = float(stats.norm.ppf((1 + each) / 2))
    half = critical_values(critical, freedom) * se
    result = result.assign(se=se, lo=result["value"] - half, hi=result["value"] + half)
    result.attrs |= {
        "cohort_sizes": _sizes(panel),
        "excluded": excluded,
        "dropped": panel.holes,
        "critical_value": critical,
    }
    return result


def _estimate(
    panel: Panel, *, by: str, control: str, base: str, asker: str
) -> tuple[Cells, Means, Aggregate]:
    cells = make_cells(panel, control=control, base=base, asker=asker)
    means = cell_means(panel, cells)
    return cells, means, make_aggregate(panel, cells, means, by=by, asker=asker)


def profile_by(
    table: pd.DataFrame,
    *,
    strata: Sequence[str],
    dose: str | None = "dose",
    by: str = "cell",
    control: str = "never",
    base: str = "varying",
    cluster: str | None = None,
    errors: str = "analytic",
    quantile: str = "normal",
    draws: int = 999,
    level: float = 0.95,
    simultaneous: bool = True,
    exclude_initial: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """One :func:`memorization_profile` per stratum and dose, against the stratum's own controls.

    Args:
        strata: Columns that tell texts apart whether trained on or not, such as ``("kind",)``.
        dose: Column with the exposures an item gets in all; None estimates all doses together.
        by, control, base, cluster, errors, quantile, draws, level, simultaneous, exclude_initial,
            seed: See :func:`memorization_profile`; bands are simultaneous within a stratum and
            dose.

    Returns:
        The profiles on top of each other with the strata and the dose as coordinates; ``.attrs``
        hold those of each, keyed by its coordinates.

    Raises:
        InputError: An unknown column, a stratum without controls, or as in the profile.
    """
    strata, split = list(strata), [*strata, *([dose] if dose else [])]
    for name in [*split, "cohort"]:
        if name not in table.columns:
            raise InputError(f"profile_by: no column {name!r}; there are {', '.join(table)}")
    trained = table["cohort"].notna()
    parts, attrs = [], {}
    for values, part in table[trained].groupby(split, observed=True, sort=True, dropna=False):
        where = dict(zip(split, values, strict=True))
        same = ~trained
        for name in strata:
            same &= (table[name] == where[name]).fillna(False)
        told = ", ".join(f"{name}={value}" for name, value in where.items())
        try:
            profile = memorization_profile(
                pd.concat([part, table[same]], ignore_index=True),
                by=by,
                control=control,
                base=base,
                cluster=cluster,
                errors=errors,
                quantile=quantile,
                draws=draws,
                level=level,
                simultaneous=simultaneous,
                exclude_initial=exclude_initial,
                seed=seed,
            )
        except InputError as error:
            raise InputError(f"profile_by: at {told}: {error}") from None
        attrs[told] = dict(profile.attrs)
        profile.attrs = {}
        parts.append(profile.assign(**where))
    if not parts:
        raise InputError("profile_by: no item has a cohort, so there is nothing to estimate")
    result = pd.concat(parts, ignore_index=True)
    result.attrs["profiles"] = attrs
    return result


@one_thread
def pretrend_test(
    table: pd.DataFrame,
    *,
    control: str = "never",
    base: str = "varying",
    cluster: str | None = None,
    quantile: str = "normal",
    exclude_initial: bool = True,
    draws: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Test whether all placebo effects are 0, as they are where cohort and controls move alike.

    The Wald statistic ``theta' V^+ theta`` is chi-square with as many degrees of freedom as V has
    rank. It rejects too often where cells are not few against the items of a cohort; the largest
    ``|theta| / se`` against its multiplier draws does so far less, so both p-values are given.

    Args:
        quantile: With few items a cohort (say under 20) the draws too are misled by errors that are
            too small by chance; "t" takes Sidak's p-value of the largest by Student's t instead,
            with the degrees of freedom of simultaneous bands.
        control, base, cluster, exclude_initial, draws, seed: See :func:`memorization_profile`.

    Returns:
        Rows "wald", "p_value" (of it) and "p_value_max_t", pooled over cohorts; ``n`` counts the
        placebo cells tested. ``.attrs`` hold ``degrees_of_freedom``, ``cells`` and ``singular``:
        whether V had less than full rank, so that a pseudo-inverse was used. NaN with a reason
        where no placebo cell has a standard error.

    Raises:
        InputError: As :func:`memorization_profile`.
    """
    asker = "pretrend_test"
    _check_choices(asker, control=control, base=base, quantile=quantile)
    _check_numbers(asker, draws=draws)
    panel, _ = read_panel(table, asker, exclude_initial=exclude_initial, cluster=cluster)
    _refuse_crossed(panel, quantile, cluster, asker)
    cells = make_cells(panel, control=control, base=base, asker=asker)
    cells = take(cells, np.flatnonzero(cells.placebo))
    means = cell_means(panel, cells)
    aggregate = make_aggregate(panel, cells, means, by="cell", asker=asker)
    spread = estimates(panel, cells, means, aggregate)
    variance = spread.variance()
    se, _ = errors_and_reasons(spread, variance)
    usable = np.isfinite(se)
    if not usable.any():
        reason = "no placebo cell with a standard error: too few checkpoints before the exposures"
        wald = p_value = max_t = np.nan
        rank, reasons = 0, [reason] * 3
    else:
        effect = means.effect[usable]
        wald, rank = wald_statistic(effect, spread.covariance()[np.ix_(usable, usable)])
        p_value = stats.chi2.sf(wald, rank)
        if quantile == "t":
            factor, freedom = few_items(spread, variance, far=True)
            each = 2 * stats.t.sf(np.abs(effect) / (se * factor)[usable], freedom[usable])
            max_t = -np.expm1(len(each) * np.log1p(-each.min()))
        else:
            _, largest = bootstrap(spread, se, draws=draws, seed=seed)
            max_t = (1 + (largest >= np.abs(effect / se[usable]).max()).sum()) / (1 + draws)
        reasons = [""] * 3
    result = rows(
        "wald",
        [wald, p_value, max_t],
        run=panel.run,
        step=int(panel.steps[-1]),
        group=panel.group,
        n=int(usable.sum()),
        beside={"reason": reasons},
    )
    result["metric"] = ["wald", "p_value", "p_value_max_t"]
    result.attrs |= {
        "degrees_of_freedom": rank,
        "cells": int(usable.sum()),
        "singular": bool(rank < usable.sum()),
    }
    return result


@one_thread
def detectable_effect(
    table: pd.DataFrame,
    *,
    by: str = "cell",
    control: str = "never",
    base: str = "varying",
    cluster: str | None = None,
    exclude_initial: bool = True,
    level: float = 0.95,
    power: float = 0.8,
) -> pd.DataFrame:
    """The smallest true effect that a two-sided test of each row alone would find.

    ``(z_{(1 + level) / 2} + z_power) * se``, which is ``2.8016 * se`` at the defaults.

    Returns:
        Rows "detectable" with the coordinates of the profile; smaller is a sharper design.

    Raises:
        InputError: As :func:`memorization_profile`.
    """
    asker = "detectable_effect"
    _check_choices(asker, by=by, control=control, base=base)
    _check_numbers(asker, level=level, power=power)
    panel, _ = read_panel(table, asker, exclude_initial=exclude_initial, cluster=cluster)
    parts = _estimate(panel, by=by, control=control, base=base, asker=asker)
    spread = estimates(panel, *parts)
    se, reason = errors_and_reasons(spread, spread.variance())
    multiple = stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(power)
    result = result_rows(panel, *parts).drop(columns="se")
    return result.assign(metric="detectable", value=multiple * se, reason=reason)


def _refuse_crossed(panel: Panel, quantile: str, cluster: str | None, asker: str) -> None:
    if quantile == "t" and panel.crossed:
        raise InputError(
            f'{asker}: quantile="t" needs clusters within cohorts, and {cluster} crosses them; '
            'pass quantile="normal"'
        )


def _sizes(panel: Panel) -> dict[str, int]:
    names = ["never" if np.isinf(g) else f"{g:g}" for g in panel.cohorts]
    return dict(zip(names, map(int, panel.sizes), strict=True))


def _check_choices(asker: str, **given: str) -> None:
    choices = dict(by=BY, control=CONTROLS, base=BASES, errors=ERRORS, quantile=QUANTILES)
    for name, value in given.items():
        if value not in choices[name]:
            raise InputError(f"{asker}: {name} is {value!r}, it can be {', '.join(choices[name])}")


def _check_numbers(asker: str, *, draws: int = 1, level: float = 0.95, power: float = 0.8) -> None:
    if draws < 1:
        raise InputError(f"{asker}: draws is {draws}, it must be at least 1")
    for name, share in (("level", level), ("power", power)):
        if not 0 < share < 1:
            raise InputError(f"{asker}: {name} is {share}, it must lie between 0 and 1")
