"""The contrasts of a causal profile, cohort by checkpoint, and the means that are made of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import sparse

from workbench.stats.panel import Panel
from workbench.table import InputError, rows

CHUNK = 100_000  # numbers in one temporary array


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
    """Mean changes since the base on both sides of each cell, and how much they rest on."""

    treated: Float[np.ndarray, " cell"]
    control: Float[np.ndarray, " cell"]
    treated_n: Int[np.ndarray, " cell"]
    control_n: Int[np.ndarray, " cell"]
    treated_units: Int[np.ndarray, " cell"]  # clusters; items where there are none
    control_units: Int[np.ndarray, " cell"]

    @property
    def effect(self) -> Float[np.ndarray, " cell"]:
        return self.treated - self.control


@dataclass(frozen=True)
class Aggregate:
    """Rows of a result as weighted means of cells, weights being cohort shares."""

    weight: sparse.csr_array  # [row, cell], rows sum to 1
    share_term: Float[np.ndarray, "row group"]  # influence of estimating the shares, per item
    label: pd.DataFrame  # step, cohort, lag, metric of each row


def make_cells(panel: Panel, *, control: str, base: str, asker: str) -> Cells:
    """List the contrasts of a panel.

    Raises:
        InputError: No treated cohort, or no item to compare with.
    """
    steps, cohorts = panel.steps, panel.cohorts
    treated = np.flatnonzero(np.isfinite(cohorts))
    if not len(treated):
        raise InputError(f"{asker}: no item has a cohort; it needs items that were trained on")
    if control == "never" and np.isfinite(cohorts[-1]):
        raise InputError(
            f"{asker}: no never-trained items (cohort missing) to compare with; add some, or pass "
            'control="not_yet"'
        )
    if len(cohorts) == 1:
        raise InputError(
            f"{asker}: one cohort and nothing to compare it with; add never-trained items (cohort "
            "missing) or a later cohort"
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


def take(cells: Cells, keep: np.ndarray) -> Cells:
    """The cells that ``keep`` selects, by mask or by index."""
    return Cells(
        cells.group[keep],
        cells.step[keep],
        cells.base[keep],
        cells.placebo[keep],
        cells.controls[:, keep],
    )


def cell_means(panel: Panel, cells: Cells) -> Means:
    """Mean change since the base among the treated and the controls of each cell."""
    # 0 treated, 1 control; a cluster with items in two control groups counts in each
    count = np.zeros((2, len(cells.group)), dtype=np.int64)
    units, total = np.zeros_like(count), np.zeros(count.shape)
    all_units = panel.units
    for j, size in enumerate(panel.sizes):
        both = [np.flatnonzero(cells.group == j), np.flatnonzero(cells.controls[j])]
        curve = panel.members(j).mean(axis=0, dtype=float)
        for side, at in enumerate(both):
            if not panel.holes:
                count[side, at] += size
                units[side, at] += all_units[j]
                total[side, at] += size * (curve[cells.step[at]] - curve[cells.base[at]])
                continue
            for chunk in panel.chunks(j, CHUNK // max(len(at), 1)):
                change = changes(panel, cells, j, at, chunk)
                seen = np.isfinite(change)
                count[side, at] += seen.sum(axis=0)
                total[side, at] += np.nansum(change, axis=0)
                if panel.cluster is not None:
                    seen = np.logical_or.reduceat(seen, firsts(panel.numbers(j)[chunk]))
                units[side, at] += seen.sum(axis=0)
    mean = np.full(total.shape, np.nan)
    np.divide(total, count, out=mean, where=count > 0)
    return Means(*mean, *count, *units)


def changes(
    panel: Panel, cells: Cells, group: int, at: Int[np.ndarray, " cell"], chunk: slice
) -> Float[np.ndarray, "member cell"]:
    """Change since the base of some of a group's items in the given cells."""
    part = panel.members(group)[chunk].astype(float)
    return part[:, cells.step[at]] - part[:, cells.base[at]]


def firsts(number: Int[np.ndarray, " member"]) -> Int[np.ndarray, " cluster"]:
    """Where each run of equal numbers begins."""
    return np.flatnonzero(np.diff(number, prepend=number[0] - 1))


def make_aggregate(panel: Panel, cells: Cells, means: Means, *, by: str, asker: str) -> Aggregate:
    """Which cells each row of the result averages, how, and what estimating the weights adds.

    Raises:
        InputError: No cell to average.
    """
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
            f"{asker}: no cell to average by {by}; it needs checkpoints after an exposure, with "
            "controls"
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


def result_rows(panel: Panel, cells: Cells, means: Means, aggregate: Aggregate) -> pd.DataFrame:
    """The estimates as table rows, their errors still to come."""
    row, cell = aggregate.weight.nonzero()
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
    hollow = aggregate.weight @ np.isnan(means.effect).astype(float) > 0
    result = rows(
        "memorization",
        np.where(hollow, np.nan, aggregate.weight @ effect),
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
