"""Memorization profiles: difference-in-differences over a panel of items and checkpoints.

Lesci et al. (2024), "Causal estimation of memorisation profiles", ACL, after Callaway & Sant'Anna
(2021), "Difference-in-differences with multiple time periods", J. Econometrics 225. What training
on an item did to it is the change since the last checkpoint before its first exposure, minus the
same change in items that were not trained on.

Every estimate, a cell or an aggregate of cells, is one linear contrast of the groups' mean curves.
So one covariance over steps and one product of bootstrap draws per group serve all of them, and
no array of items x cells is ever made. With holes in the panel the contrasts differ from item to
item, and the influence functions are made in chunks of items instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import sparse, stats

from workbench.table import InputError, rows

BY = ("cell", "lag", "step", "cohort", "overall")
CONTROLS = ("never", "not_yet")
BASES = ("varying", "universal")
NEVER = np.inf  # the cohort of items that are never trained on
IQR_OF_NORMAL = 1.34898  # interquartile range of a standard normal
CHUNK = 500_000  # numbers in one temporary array
BLOCK = 256  # rows of the result that are perturbed at a time
NO_SPREAD = 1e-12  # of the largest outcome: below it a spread is rounding


@dataclass(frozen=True)
class Panel:
    """Outcomes of all items at all checkpoints, items sorted by cohort, the never-trained last."""

    outcome: Float[np.ndarray, "item step"]  # NaN where not observed
    steps: Int[np.ndarray, " step"]
    cohorts: Float[np.ndarray, " group"]  # ascending; NEVER, if there is one, last
    starts: Int[np.ndarray, " group_and_end"]  # items of group j: starts[j] to starts[j + 1]
    lag: Float[np.ndarray, "group step"]  # updates since the last exposure; NaN before the first
    settled: Bool[np.ndarray, "group step"]  # after the last exposure
    run: str
    group: str

    @property
    def sizes(self) -> Int[np.ndarray, " group"]:
        return np.diff(self.starts)

    def members(self, group: int) -> Float[np.ndarray, "member step"]:
        return self.outcome[self.starts[group] : self.starts[group + 1]]


@dataclass(frozen=True)
class Cells:
    """The contrasts (cohort, step) of a panel, as indices into its groups and steps."""

    group: Int[np.ndarray, " cell"]
    step: Int[np.ndarray, " cell"]
    base: Int[np.ndarray, " cell"]
    placebo: Bool[np.ndarray, " cell"]
    controls: Bool[np.ndarray, "group cell"]  # which groups a cell is compared with


@dataclass(frozen=True)
class Means:
    """Mean changes since the base on both sides of each cell, and how many items they rest on."""

    treated: Float[np.ndarray, " cell"]
    control: Float[np.ndarray, " cell"]
    treated_n: Int[np.ndarray, " cell"]
    control_n: Int[np.ndarray, " cell"]

    @property
    def effect(self) -> Float[np.ndarray, " cell"]:
        return self.treated - self.control


@dataclass(frozen=True)
class Aggregate:
    """Rows of a result as weighted means of cells, weights being cohort shares."""

    weight: sparse.csr_array  # [row, cell], rows sum to 1
    share_term: Float[np.ndarray, "row group"]  # influence of estimating the shares, per item
    label: pd.DataFrame  # step, cohort, lag, metric of each row


def memorization_profile(
    table: pd.DataFrame,
    *,
    by: str = "cell",
    control: str = "never",
    base: str = "varying",
    draws: int = 999,
    level: float = 0.95,
    simultaneous: bool = True,
    exclude_initial: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Estimate what training on each cohort did to it, at each checkpoint, with its uncertainty.

    ``ATT(g, t) = mean over cohort g of (Y_t - Y_b) - mean over controls of (Y_t - Y_b)`` with b
    the last checkpoint before g. Before the exposure (t < g) the same contrast is a placebo.

    Args:
        table: One run, one metric, one row per item and checkpoint, with the column ``cohort``:
            the update whose batch first held the item, missing = never. A column ``lag`` (updates
            since the item's last exposure) replaces ``step - cohort`` as lag; it must agree within
            a cohort. Columns ``copies`` (so far) and ``dose`` (in all) then say which checkpoints
            lie after the last exposure; without them the lags do.
        by: "cell" gives ATT(g, t); "lag" the event study, over checkpoints after the last exposure;
            "step", "cohort" and "overall" are means over the cells with t >= g. Every cell weighs
            as its cohort's share of items, whichever the aggregate.
        control: "never" trained on, or "not_yet" trained on at t and b (the never-trained included).
        base: Of placebo cells: "varying" is the checkpoint before t; "universal" is b for all, and
            the cell t = b, zero by definition, is left out.
        draws: Rademacher multiplier draws for the simultaneous bands.
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
        the items seen at both of their checkpoints) and ``critical_value`` (half-width / ``se``).
        ``se`` and band are NaN with a reason where one item, or no spread, gives no error.

    Raises:
        InputError: Several metrics or runs, repeated or infinite values, an item in two cohorts, no
            controls, cohorts exposed before the first checkpoint, disagreeing lags.
    """
    _check_choices("memorization_profile", by=by, control=control, base=base)
    _check_numbers("memorization_profile", draws=draws, level=level)
    panel, excluded, holes = read_panel(table, "memorization_profile", exclude_initial)
    cells = make_cells(panel, control, base)
    means = cell_means(panel, cells)
    aggregate = make_aggregate(panel, cells, means, by)
    result = _result_rows(panel, cells, means, aggregate)
    spread = Influence(panel, cells, means, aggregate)
    result["se"], result["reason"] = _errors(spread)
    critical = float(stats.norm.ppf((1 + level) / 2))
    if simultaneous:
        largest = max_statistics(spread, result["se"].to_numpy(), draws=draws, seed=seed)
        critical = max(critical, float(np.quantile(largest, level)))
    result["lo"] = result["value"] - critical * result["se"]
    result["hi"] = result["value"] + critical * result["se"]
    result.attrs |= {
        "cohort_sizes": _sizes(panel),
        "excluded": excluded,
        "dropped": holes,
        "critical_value": critical,
    }
    return result


def profile_by(
    table: pd.DataFrame,
    *,
    strata: Sequence[str],
    dose: str | None = "dose",
    by: str = "cell",
    control: str = "never",
    base: str = "varying",
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
        by, control, base, draws, level, simultaneous, exclude_initial, seed: See
            :func:`memorization_profile`; bands are simultaneous within a stratum and dose.

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


def pretrend_test(
    table: pd.DataFrame,
    *,
    control: str = "never",
    base: str = "varying",
    exclude_initial: bool = True,
    draws: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """Test whether all placebo effects are 0, as they are where cohort and controls move alike.

    The Wald statistic ``theta' V^+ theta`` is chi-square with as many degrees of freedom as V has
    rank. It rejects too often where cells are not few against the items of a cohort; the largest
    ``|theta| / se`` against its multiplier draws does so far less, so both p-values are given.

    Returns:
        Rows "wald", "p_value" (of it) and "p_value_max_t", pooled over cohorts; ``n`` counts the
        placebo cells tested. ``.attrs`` hold ``degrees_of_freedom``, ``cells`` and ``singular``:
        whether V had less than full rank, so that a pseudo-inverse was used. NaN with a reason
        where no placebo cell has a standard error.

    Raises:
        InputError: As :func:`memorization_profile`.
    """
    _check_choices("pretrend_test", by="cell", control=control, base=base)
    _check_numbers("pretrend_test", draws=draws, level=0.95)
    panel, _, _ = read_panel(table, "pretrend_test", exclude_initial)
    cells = make_cells(panel, control, base)
    keep = np.flatnonzero(cells.placebo)
    cells = _take(cells, keep)
    means = cell_means(panel, cells)
    spread = Influence(panel, cells, means, make_aggregate(panel, cells, means, "cell"))
    se, _ = _errors(spread)
    usable = np.isfinite(se)
    if not usable.any():
        reason = "no placebo cell with a standard error: too few checkpoints before the exposures"
        wald = p_value = max_t = np.nan
        rank, reasons = 0, [reason] * 3
    else:
        effect = means.effect[usable]
        wald, rank = _wald(effect, spread.covariance()[np.ix_(usable, usable)])
        p_value = stats.chi2.sf(wald, rank)
        largest = max_statistics(spread, se, draws=draws, seed=seed)
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


def detectable_effect(
    table: pd.DataFrame,
    *,
    by: str = "cell",
    control: str = "never",
    base: str = "varying",
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
    _check_numbers("detectable_effect", draws=1, level=level)
    _check_numbers("detectable_effect", draws=1, level=power)
    profile = memorization_profile(
        table,
        by=by,
        control=control,
        base=base,
        simultaneous=False,
        exclude_initial=exclude_initial,
    )
    multiple = stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(power)
    return profile.assign(
        value=multiple * profile["se"],
        metric="detectable",
        lo=np.nan,
        hi=np.nan,
    ).drop(columns="se")


# --- the panel ------------------------------------------------------------------------------------


def read_panel(
    table: pd.DataFrame, asker: str, exclude_initial: bool
) -> tuple[Panel, list[int], int]:
    """Spread item rows into a panel; also give the cohorts left out and the number of holes.

    Raises:
        InputError: See :func:`memorization_profile`.
    """
    run, group = _labels(table, asker)
    # by name, so that the order of rows in a table changes no draw
    item, names = _codes(table["item"], asker)
    step, steps = _codes(table["step"], asker)
    steps = steps.astype(np.int64)
    cohort = _cohort_of_items(table, item, names, asker)
    _refuse_without_base(cohort, steps, asker)
    cohorts, which = np.unique(cohort, return_inverse=True)
    lag, settled = _lags(table, which, item, step, cohorts, steps, asker)
    order = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[order], np.arange(len(cohorts)))
    place = np.argsort(order).astype(item.dtype)
    outcome = _spread_out(table, place[item], step, names[order], steps, asker)
    panel = Panel(outcome, steps, cohorts, np.append(starts, len(order)), lag, settled, run, group)
    excluded: list[int] = []
    if exclude_initial and steps[0] == 0:
        panel, excluded = _without_initial(panel, asker)
    holes = int(np.isnan(panel.outcome).sum())
    return panel, excluded, holes


def _labels(table: pd.DataFrame, asker: str) -> tuple[str, str]:
    needed = ("run", "group", "item", "step", "metric", "value", "cohort")
    for name in needed:
        if name not in table.columns:
            meaning = ": the update that first held the item, missing = never"
            raise InputError(
                f"{asker}: no column {name!r}{meaning if name == 'cohort' else ''}; "
                f"it needs {', '.join(needed)}"
            )
    if not len(table):
        raise InputError(f"{asker}: the table is empty; it needs one row per item and checkpoint")
    for name in ("metric", "run"):
        held = list(map(str, table[name].unique()))
        if len(held) != 1:
            raise InputError(
                f"{asker}: needs rows of one {name}, got {', '.join(held)}; select one first"
            )
    groups = table.loc[table["cohort"].notna(), "group"].unique()
    return str(table["run"].iloc[0]), str(groups[0]) if len(groups) == 1 else "all"


def _codes(column: pd.Series, asker: str) -> tuple[Int[np.ndarray, " row"], np.ndarray]:
    """Which of its sorted values each row has, in 32 bits: a panel has millions of rows."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.cat.remove_unused_categories()
        code, names = column.cat.codes.to_numpy(), np.asarray(column.cat.categories)
        missing, order = (code < 0).any(), np.argsort(names)
        code = np.argsort(order).astype(np.int32)[code]
        names = names[order]
    else:
        code, names = pd.factorize(column, sort=True)
        missing, code, names = (code < 0).any(), code.astype(np.int32), np.asarray(names)
    if missing:
        raise InputError(f"{asker}: {column.name} is missing in some rows; drop those rows")
    return code, names


def _cohort_of_items(
    table: pd.DataFrame, item: np.ndarray, names: np.ndarray, asker: str
) -> Float[np.ndarray, " item"]:
    given = _floats(table["cohort"])
    cohort = np.empty(len(names))
    cohort[item] = given
    expected = cohort[item]
    # missing is never equal, so two missing ones must be let through
    wrong = np.flatnonzero((expected != given) & ~(np.isnan(expected) & np.isnan(given)))
    if len(wrong):
        first = item[wrong[0]]
        both = sorted(set(np.nan_to_num(given[item == first], nan=NEVER, posinf=NEVER)))
        told = " and ".join("never" if g == NEVER else f"{g:g}" for g in both)
        raise InputError(
            f"{asker}: item {names[first]} has the cohorts {told}; an item has one, the update "
            "that first held it"
        )
    return np.where(np.isnan(cohort), NEVER, cohort)


def _floats(column: pd.Series) -> Float[np.ndarray, " row"]:
    """A view where it can be one."""
    if column.dtype == np.float64:
        return column.to_numpy()
    return column.to_numpy(dtype=float, na_value=np.nan)


def _refuse_without_base(cohort: np.ndarray, steps: np.ndarray, asker: str) -> None:
    early = np.unique(cohort[cohort <= steps[0]])
    if len(early):
        told = ", ".join(f"{g:g}" for g in early)
        raise InputError(
            f"{asker}: cohorts {told} were exposed before the first checkpoint (step {steps[0]}), "
            "so there is nothing to compare with; add an earlier checkpoint or drop them"
        )


def _spread_out(
    table: pd.DataFrame,
    item: np.ndarray,
    step: np.ndarray,
    names: np.ndarray,
    steps: np.ndarray,
    asker: str,
) -> Float[np.ndarray, "item step"]:
    value = table["value"].to_numpy()
    if value.dtype not in (np.float32, np.float64):
        value = value.astype(float)
    infinite = np.flatnonzero(np.isinf(value))
    if len(infinite):
        at = infinite[0]
        raise InputError(
            f"{asker}: item {names[item[at]]} is {value[at]} at step {steps[step[at]]}, and "
            f"{len(infinite)} values are infinite; drop them or score them again"
        )
    flat = item * len(steps) + step if len(names) * len(steps) < 2**31 else None
    if flat is None:
        flat = item.astype(np.int64) * len(steps) + step
    seen = np.zeros(len(names) * len(steps), dtype=bool)
    seen[flat] = True
    if seen.sum() < len(flat):
        at = np.flatnonzero(pd.Series(flat).duplicated())[0]
        raise InputError(
            f"{asker}: item {names[item[at]]} has several rows at step {steps[step[at]]}; "
            "needs one per item and step, so select one of their other coordinates"
        )
    outcome = np.full(len(seen), np.nan, dtype=value.dtype)
    outcome[flat] = value
    return outcome.reshape(len(names), len(steps))


def _lags(
    table: pd.DataFrame,
    which: np.ndarray,
    item: np.ndarray,
    step: np.ndarray,
    cohorts: np.ndarray,
    steps: np.ndarray,
    asker: str,
) -> tuple[Float[np.ndarray, "group step"], Bool[np.ndarray, "group step"]]:
    """Lag of each (cohort, step), and whether the cohort's last exposure lies behind it."""
    since = steps[None, :] - np.where(np.isinf(cohorts), np.nan, cohorts)[:, None]
    lag = np.where(since >= 0, since, np.nan)
    if "lag" not in table.columns:
        return lag, since >= 0
    which = which[item]
    trained = since[which, step] >= 0
    given = _floats(table["lag"])[trained]
    at = (which[trained], step[trained])
    lag = np.full(since.shape, np.nan)
    lag[at] = given
    wrong = np.flatnonzero(~(lag[at] == given))
    if len(wrong):
        group, late = at[0][wrong[0]], at[1][wrong[0]]
        raise InputError(
            f"{asker}: items of cohort {cohorts[group]:g} have no common lag at step "
            f"{steps[late]}; split the items by their schedule, as profile_by does by dose"
        )
    last_seen = steps[None, :] - lag
    final = np.fmax.reduce(last_seen, axis=1, keepdims=True)
    settled = (lag >= 0) & (last_seen == final)
    if "copies" in table.columns and "dose" in table.columns:
        done = (table["copies"] == table["dose"]).to_numpy(dtype=bool, na_value=False)[trained]
        settled = np.zeros(since.shape, dtype=bool)
        settled[at] = done
        if (settled[at] != done).any():
            group = at[0][settled[at] != done][0]
            raise InputError(
                f"{asker}: items of cohort {cohorts[group]:g} differ in dose; use profile_by"
            )
        settled &= lag >= 0
    return lag, settled


def _without_initial(panel: Panel, asker: str) -> tuple[Panel, list[int]]:
    """Drop step 0, and the cohorts that had no other base."""
    if len(panel.steps) == 1:
        raise InputError(f"{asker}: the only checkpoint is step 0; it needs later ones")
    keep = panel.cohorts > panel.steps[1]
    excluded = [int(g) for g in panel.cohorts[~keep]]
    if not (keep & np.isfinite(panel.cohorts)).any() and excluded:
        told = ", ".join(map(str, excluded))
        raise InputError(
            f"{asker}: cohorts {told} have only the random initialisation (step 0) as base; add a "
            "checkpoint between, or pass exclude_initial=False"
        )
    first = panel.starts[len(excluded)]  # cohorts ascend, so the early ones come first
    return (
        Panel(
            panel.outcome[first:, 1:],
            panel.steps[1:],
            panel.cohorts[keep],
            panel.starts[len(excluded) :] - first,
            panel.lag[keep, 1:],
            panel.settled[keep, 1:],
            panel.run,
            panel.group,
        ),
        excluded,
    )


# --- cells and their aggregates -------------------------------------------------------------------


def make_cells(panel: Panel, control: str, base: str) -> Cells:
    """List the contrasts of a panel.

    Raises:
        InputError: No treated cohort, or no item to compare with.
    """
    steps, cohorts = panel.steps, panel.cohorts
    treated = np.flatnonzero(np.isfinite(cohorts))
    if not len(treated):
        raise InputError(
            "memorization_profile: no item has a cohort; it needs items that were trained on"
        )
    if control == "never" and np.isfinite(cohorts[-1]):
        raise InputError(
            "memorization_profile: no never-trained items (cohort missing) to compare with; add "
            'some, or pass control="not_yet"'
        )
    if len(cohorts) == 1:
        raise InputError(
            "memorization_profile: one cohort and nothing to compare it with; add never-trained "
            "items (cohort missing) or a later cohort"
        )
    group, step, before = [], [], []
    for j in treated:
        last_before = np.searchsorted(steps, cohorts[j]) - 1  # s >= g has seen it, so s < g
        for t in range(len(steps)):
            early = t <= last_before
            b = t - 1 if early and base == "varying" else last_before
            if b >= 0 and b != t:
                group.append(j)
                step.append(t)
                before.append(b)
    group, step, before = (np.array(index, dtype=np.int64) for index in (group, step, before))
    if control == "never":
        controls = np.repeat(np.isinf(cohorts)[:, None], len(group), axis=1)
    else:
        late = steps[np.maximum(step, before)]
        controls = (cohorts[:, None] > late) & (np.arange(len(cohorts))[:, None] != group)
    return Cells(group, step, before, steps[step] < cohorts[group], controls)


def _take(cells: Cells, keep: np.ndarray) -> Cells:
    return Cells(
        cells.group[keep],
        cells.step[keep],
        cells.base[keep],
        cells.placebo[keep],
        cells.controls[:, keep],
    )


def cell_means(panel: Panel, cells: Cells) -> Means:
    """Mean change since the base among the treated and the controls of each cell."""
    count = np.zeros((2, len(cells.group)), dtype=np.int64)
    total = np.zeros((2, len(cells.group)))
    balanced = _balanced(panel)
    for j in range(len(panel.cohorts)):
        for side, inside in enumerate((cells.group == j, cells.controls[j])):
            at = np.flatnonzero(inside)
            if not len(at):
                continue
            if balanced:
                curve = panel.members(j).mean(axis=0, dtype=float)
                count[side, at] += panel.sizes[j]
                total[side, at] += panel.sizes[j] * (curve[cells.step[at]] - curve[cells.base[at]])
                continue
            for change in _changes(panel, cells, j, at):
                count[side, at] += np.isfinite(change).sum(axis=0)
                total[side, at] += np.nansum(change, axis=0)
    mean = np.full(total.shape, np.nan)
    np.divide(total, count, out=mean, where=count > 0)
    return Means(mean[0], mean[1], count[0], count[1])


def _balanced(panel: Panel) -> bool:
    return not np.isnan(panel.outcome).any()


def _changes(
    panel: Panel, cells: Cells, group: int, at: np.ndarray
) -> Iterator[Float[np.ndarray, "member cell"]]:
    """Change since the base of a group's items in the given cells, a chunk of items at a time."""
    members = panel.members(group)
    size = max(1, CHUNK // len(at))
    for start in range(0, len(members), size):
        part = members[start : start + size].astype(float)
        yield part[:, cells.step[at]] - part[:, cells.base[at]]


def make_aggregate(panel: Panel, cells: Cells, means: Means, by: str) -> Aggregate:
    """Which cells each row of the result averages, how, and what estimating the weights adds."""
    effect = means.effect
    lag = panel.lag[cells.group, cells.step]
    first_lag = panel.steps[cells.step] - panel.cohorts[cells.group]
    label = pd.DataFrame(
        {
            "step": panel.steps[cells.step],
            "cohort": panel.cohorts[cells.group],
            "lag": np.where(cells.placebo, first_lag, lag),
            "metric": np.where(cells.placebo, "placebo", "memorization"),
        }
    )
    if by == "cell":
        nothing = np.zeros((len(label), len(panel.cohorts)))
        return Aggregate(sparse.eye_array(len(label), format="csr"), nothing, label)
    keep = np.isfinite(effect)
    if by == "lag":
        keep &= cells.placebo | panel.settled[cells.group, cells.step]
    else:
        keep &= ~cells.placebo
    columns = {"lag": ["lag", "metric"], "step": ["step"], "cohort": ["cohort"], "overall": []}[by]
    used = np.flatnonzero(keep)
    if not len(used):
        raise InputError(
            f"memorization_profile: no cell to average by {by}; it needs checkpoints after an "
            "exposure, with controls"
        )
    kept = label.iloc[used]
    row = kept.groupby(columns).ngroup().to_numpy() if columns else np.zeros(len(used), dtype=int)
    label = _aggregate_label(kept, row, columns, panel)
    size = panel.sizes[cells.group[used]].astype(float)
    total = np.bincount(row, weights=size)
    weight = sparse.csr_array((size / total[row], (row, used)), shape=(len(total), len(effect)))
    value = weight @ np.where(keep, effect, 0.0)
    # Callaway & Sant'Anna's wif, simplified: cohort g moves the mean by its own distance from it
    share_term = np.zeros((len(total), len(panel.cohorts)))
    np.add.at(share_term, (row, cells.group[used]), (effect[used] - value[row]) / total[row])
    return Aggregate(weight, share_term, label)


def _aggregate_label(
    kept: pd.DataFrame, row: np.ndarray, columns: list[str], panel: Panel
) -> pd.DataFrame:
    first = kept.iloc[np.unique(row, return_index=True)[1]].reset_index(drop=True)
    fixed = {"step": int(panel.steps[-1]), "cohort": np.nan, "lag": np.nan}
    for name, value in fixed.items():
        if name not in columns:
            first[name] = value
    return first


def _result_rows(panel: Panel, cells: Cells, means: Means, aggregate: Aggregate) -> pd.DataFrame:
    used = aggregate.weight != 0
    row, cell = used.nonzero()
    counts = pd.DataFrame(
        {
            "row": row,
            "cohort": cells.group[cell],
            "treated": means.treated_n[cell],
            "control": means.control_n[cell],
        }
    )
    per_cohort = counts.groupby(["row", "cohort"])["treated"].max()
    label = aggregate.label
    effect = np.where(np.isfinite(means.effect), means.effect, 0.0)
    value = aggregate.weight @ effect
    hollow = aggregate.weight @ np.isnan(means.effect).astype(float) > 0
    result = rows(
        "memorization",
        np.where(hollow, np.nan, value),
        run=panel.run,
        step=label["step"],
        group=panel.group,
        n=per_cohort.groupby("row").sum(),
        beside={
            "se": np.nan,
            "cohort": label["cohort"],
            "lag": label["lag"],
            "n_control": counts.groupby("row")["control"].max(),
        },
    )
    result["metric"] = label["metric"].to_numpy()
    return result


# --- uncertainty ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Influence:
    """Per-item influence on each row, never held whole: variances, covariances and perturbations.

    An item of group j moves row r by ``contrast_j[r] @ (Y_i - mean_j) / n_j + shift_j[r]``, where
    the shift holds how far j lies from its cell's pooled controls, and the shares' estimation.
    """

    panel: Panel
    cells: Cells
    means: Means
    aggregate: Aggregate

    def contrast(self, group: int) -> tuple[sparse.csr_array, Float[np.ndarray, " row"]]:
        """Balanced panels: weights on the steps of a group's items, and their common shift."""
        cells, panel = self.cells, self.panel
        curve = panel.members(group).mean(axis=0, dtype=float)
        own, control = cells.group == group, cells.controls[group]
        over = np.maximum(self.means.control_n, 1)
        weight = own - control * panel.sizes[group] / over
        distance = curve[cells.step] - curve[cells.base] - self.means.control
        shift = np.where(control, -distance / over, 0.0)
        at = np.flatnonzero(weight)
        columns = np.concatenate([cells.step[at], cells.base[at]])
        entries = np.concatenate([weight[at], -weight[at]])
        per_cell = sparse.csr_array(
            (entries, (np.concatenate([at, at]), columns)),
            shape=(len(cells.group), len(panel.steps)),
        )
        total = self.aggregate.weight @ shift + self.aggregate.share_term[:, group]
        return self.aggregate.weight @ per_cell, total

    def centred(self, group: int) -> Iterator[Float[np.ndarray, "member step"]]:
        """Balanced panels: a group's items around its mean curve, a chunk of items at a time."""
        members = self.panel.members(group)
        # contrasts sum to zero over steps, so an item's level is taken out before rounding costs
        level = members.mean(axis=1, dtype=float)
        curve = members.mean(axis=0, dtype=float) - level.mean()
        size = max(1, CHUNK // members.shape[1])
        for start in range(0, len(members), size):
            part = members[start : start + size].astype(float)
            yield part - level[start : start + size, None] - curve

    def direct(self, group: int) -> Iterator[Float[np.ndarray, "member row"]]:
        """Panels with holes: the influence itself, a chunk of items at a time."""
        cells, means = self.cells, self.means
        own = cells.group == group
        at = np.flatnonzero(own | cells.controls[group])
        sign = np.where(own[at], 1.0, -1.0)
        mean = np.where(own, means.treated, means.control)[at]
        over = np.maximum(np.where(own, means.treated_n, means.control_n)[at], 1)
        weight = self.aggregate.weight[:, at].T
        size = max(1, CHUNK // max(len(at), weight.shape[1], 1))
        members = self.panel.members(group)
        for start in range(0, len(members), size):
            part = members[start : start + size].astype(float)
            change = part[:, cells.step[at]] - part[:, cells.base[at]]
            scaled = np.nan_to_num((change - mean) * (sign / over), nan=0.0)
            yield scaled @ weight + self.aggregate.share_term[:, group]

    def variance(self) -> Float[np.ndarray, " row"]:
        """Squared standard error of each row: the sum of squared influences."""
        total = np.zeros(len(self.aggregate.label))
        balanced = _balanced(self.panel)
        for j, n in enumerate(self.panel.sizes):
            if not balanced:
                for influence in self.direct(j):
                    total += np.square(influence).sum(axis=0)
                continue
            contrast, shift = self.contrast(j)
            touched = np.flatnonzero(np.diff(contrast.indptr))
            dense = contrast[touched].toarray()
            total[touched] += ((dense @ self._scatter(j)) * dense).sum(axis=1) / n**2
            total += n * shift**2
        return total

    def covariance(self) -> Float[np.ndarray, "row row"]:
        """Of the rows' estimates: the sum of outer products of influences."""
        size = len(self.aggregate.label)
        total = np.zeros((size, size))
        balanced = _balanced(self.panel)
        for j, n in enumerate(self.panel.sizes):
            if not balanced:
                for influence in self.direct(j):
                    total += influence.T @ influence
                continue
            contrast, shift = self.contrast(j)
            touched = np.flatnonzero(np.diff(contrast.indptr))
            dense = contrast[touched].toarray()
            total[np.ix_(touched, touched)] += dense @ self._scatter(j) @ dense.T / n**2
            total += n * np.outer(shift, shift)
        return total

    def _scatter(self, group: int) -> Float[np.ndarray, "step step"]:
        return sum(part.T @ part for part in self.centred(group))

    def perturbed(self, draws: int, seed: int) -> Iterator[Float[np.ndarray, "row draw"]]:
        """Estimates' errors under Rademacher multipliers, a block of rows at a time."""
        rng = np.random.default_rng(seed)
        if not _balanced(self.panel):
            total = np.zeros((len(self.aggregate.label), draws))
            for j in range(len(self.panel.cohorts)):
                for influence in self.direct(j):
                    total += influence.T @ _signs(rng, len(influence), draws)
            yield total
            return
        groups = range(len(self.panel.cohorts))
        moved = np.zeros((len(groups), len(self.panel.steps), draws), dtype=np.float32)
        summed = np.zeros((len(groups), draws))
        for j in groups:
            for part in self.centred(j):
                # single precision: a band's width is known to no more than three digits anyway
                part = part.astype(np.float32) / self.panel.sizes[j]
                for start in range(0, len(part), 512):
                    signs = _signs(rng, len(part[start : start + 512]), draws)
                    moved[j] += part[start : start + 512].T @ signs
                    summed[j] += signs.sum(axis=0)
        contrasts = [self.contrast(j) for j in groups]
        for start in range(0, len(self.aggregate.label), BLOCK):
            block = slice(start, start + BLOCK)
            shift = np.stack([shift[block] for _, shift in contrasts], axis=1)
            total = shift @ summed
            for j, (contrast, _) in enumerate(contrasts):
                part = contrast[block]
                touched = np.flatnonzero(np.diff(part.indptr))
                if len(touched):
                    total[touched] += part[touched] @ moved[j]
            yield total


def _signs(rng: np.random.Generator, items: int, draws: int) -> Float[np.ndarray, "item draw"]:
    bits = np.unpackbits(np.frombuffer(rng.bytes(-(-items * draws // 8)), dtype=np.uint8))
    signs = bits[: items * draws].reshape(items, draws).astype(np.float32)
    signs *= 2
    signs -= 1
    return signs


def _errors(spread: Influence) -> tuple[Float[np.ndarray, " row"], np.ndarray]:
    """Standard error of each row, and why it is NaN where it is."""
    weight, means = spread.aggregate.weight, spread.means
    se = np.sqrt(spread.variance())
    used = (weight != 0).astype(float)
    reason = np.full(len(se), "", dtype=object)
    outcome = spread.panel.outcome
    # the extremes, not abs(), which would copy the panel
    largest = max(abs(float(np.nanmax(outcome))), abs(float(np.nanmin(outcome))))
    reason[se <= NO_SPREAD * largest] = "no spread: every item moved alike"
    for count, side in ((means.control_n, "controls"), (means.treated_n, "a cohort")):
        reason[used @ (count == 1).astype(float) > 0] = f"no error: one item in {side}"
        reason[used @ (count == 0).astype(float) > 0] = f"no estimate: no item left in {side}"
    return np.where(reason == "", se, np.nan), reason


def max_statistics(
    spread: Influence, se: Float[np.ndarray, " row"], *, draws: int, seed: int
) -> Float[np.ndarray, " draw"]:
    """The largest standardised error over all rows, in each multiplier draw.

    Errors are scaled by their interquartile range over 1.34898, which outlying draws do not move.
    """
    largest, start = np.zeros(draws), 0
    for block in spread.perturbed(draws, seed):
        error = se[start : start + len(block)]
        start += len(block)
        block = block[np.isfinite(error)]
        if not len(block):
            continue
        low, high = np.quantile(block, [0.25, 0.75], axis=1)
        sigma = (high - low) / IQR_OF_NORMAL
        # with two or three items the draws take few values, and their quartiles may coincide
        sigma = np.where(sigma > 0, sigma, error[np.isfinite(error)])
        np.maximum(largest, (np.abs(block) / sigma[:, None]).max(axis=0), out=largest)
    return largest


def _wald(
    effect: Float[np.ndarray, " cell"], covariance: Float[np.ndarray, "cell cell"]
) -> tuple[float, int]:
    """Wald statistic and its degrees of freedom, the rank of the covariance."""
    scale = np.sqrt(np.diag(covariance))  # correlations, so that the rank ignores units
    eigenvalue, vector = np.linalg.eigh(covariance / np.outer(scale, scale))
    keep = eigenvalue > eigenvalue[-1] * len(eigenvalue) * np.finfo(float).eps * 10
    along = vector[:, keep].T @ (effect / scale)
    return float((along**2 / eigenvalue[keep]).sum()), int(keep.sum())


def _sizes(panel: Panel) -> dict[str, int]:
    names = ["never" if np.isinf(g) else f"{g:g}" for g in panel.cohorts]
    return dict(zip(names, map(int, panel.sizes), strict=True))


def _check_choices(asker: str, *, by: str, control: str, base: str) -> None:
    for name, given, known in (
        ("by", by, BY),
        ("control", control, CONTROLS),
        ("base", base, BASES),
    ):
        if given not in known:
            raise InputError(f"{asker}: {name} is {given!r}, it can be {', '.join(known)}")


def _check_numbers(asker: str, *, draws: int, level: float) -> None:
    if draws < 1:
        raise InputError(f"{asker}: draws is {draws}, it must be at least 1")
    if not 0 < level < 1:
        raise InputError(f"{asker}: level is {level}, it must lie between 0 and 1")
