"""Effects item by item: against controls in the same run, and against a crossover twin.

The first is what a single run allows (and what the causal profile averages); the second is the
truth that the embedded suite knows, since the twin never trained on the item.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from workbench.table import InputError, one_metric, validate


def item_gains(table: pd.DataFrame, *, strata: Sequence[str] = ()) -> pd.DataFrame:
    """Each trained item's change since before its first exposure, less the controls' mean change.

    ``(Y_it - Y_ib) - mean over never-trained of (Y_jt - Y_jb)``, b the last checkpoint before the
    item's cohort: the item's own term of ATT(g, t) (Lesci et al. 2024).

    Args:
        table: Item rows of one metric and run, with ``cohort`` (missing: a control).
        strata: Columns within which controls are matched, such as ``("kind",)``.

    Returns:
        The trained items' rows with metric "memorization" (0: training did nothing); ``.attrs``
        count ``without_base`` (items first seen at or before the first checkpoint: dropped) and
        ``controls``.

    Raises:
        InputError: No ``cohort`` column, or no controls in a stratum.
    """
    one_metric(table, "item_gains")
    if "cohort" not in table.columns:
        raise InputError("item_gains: no column 'cohort'; align_exposures or the items give it")
    steps = np.sort(table["step"].unique())
    trained = table["cohort"].notna()
    control = table[~trained].groupby([*strata, "step"], observed=True)["value"].mean()
    control = control.rename("control").reset_index()
    mine = table[trained].copy()
    # the last checkpoint before the first exposure
    at = np.searchsorted(steps, mine["cohort"].to_numpy()) - 1
    mine["base_step"] = np.where(at >= 0, steps[np.maximum(at, 0)], -1)
    based = mine["base_step"] >= 0
    dropped = mine.loc[~based, "item"].nunique()
    mine = mine[based]
    before = mine.loc[mine["step"] == mine["base_step"], ["item", "value"]]
    mine = mine.merge(before.rename(columns={"value": "own_base"}), on="item", how="left")
    mine = mine.merge(control, on=[*strata, "step"], how="left")
    base_control = control.rename(columns={"step": "base_step", "control": "control_base"})
    mine = mine.merge(base_control, on=[*strata, "base_step"], how="left")
    if mine["control"].isna().any():
        first = mine[mine["control"].isna()].iloc[0]
        where = ", ".join(f"{name}={first[name]}" for name in strata)
        raise InputError(f"item_gains: no never-trained items at {where or 'any step'}")
    value = mine["value"] - mine["own_base"] - (mine["control"] - mine["control_base"])
    extra = ["own_base", "control", "control_base", "base_step"]
    out = validate(mine.drop(columns=extra).assign(metric="memorization", value=value))
    out.attrs = {"without_base": dropped, "controls": table.loc[~trained, "item"].nunique()}
    return out


def twin_effects(table: pd.DataFrame, twin: pd.DataFrame) -> pd.DataFrame:
    """The truth: each trained item's score less its score in the run that never trained on it.

    Args:
        table: Item rows of one metric of a run, with ``cohort``.
        twin: The same metric of the run that shares everything but the planted items.

    Returns:
        Rows of the items that only ``table``'s run trained on, with metric "memorization".

    Raises:
        InputError: Several metrics, or the runs share no item and step.
    """
    one_metric(table, "twin_effects")
    one_metric(twin, "twin_effects")
    other = twin.loc[twin["cohort"].isna(), ["item", "step", "value"]]
    other = other.assign(item=other["item"].astype(str))
    mine = table[table["cohort"].notna()].assign(item=table["item"].astype(str))
    both = mine.merge(other.rename(columns={"value": "without"}), on=["item", "step"])
    if both.empty:
        raise InputError("twin_effects: the runs share no item and step; are they twins?")
    value = both["value"] - both["without"]
    return validate(both.drop(columns="without").assign(metric="memorization", value=value))


def compare_with_truth(
    estimate: pd.DataFrame, truth: pd.DataFrame, *, on: Sequence[str], level: float = 0.95
) -> pd.DataFrame:
    """Set estimates beside the truth's item mean, cell by cell.

    Args:
        estimate: Rows with ``value`` and ``se`` and the coordinates ``on``.
        truth: Item rows of :func:`twin_effects`.
        on: Coordinates that name a cell, such as ``("kind", "dose", "lag")``.

    Returns:
        One row a cell: ``on``, ``estimate, truth, se, se_truth, n``, ``inside`` (the difference is
        within its ``level`` interval, both errors added in quadrature) and ``inside_alone`` (the
        estimate's error alone). Intervals use Student's t with n - 1 degrees of freedom, since
        cells of many exposures hold few items. Cells with fewer than two items have no error and are left out;
        ``.attrs["left_out"]`` counts them.
    """
    on = list(on)
    pooled = truth.groupby(on, observed=True)["value"].agg(["mean", "sem", "size"]).reset_index()
    pooled.columns = [*on, "truth", "se_truth", "n"]
    cells = estimate[[*on, "value", "se"]].rename(columns={"value": "estimate"})
    for name in on:  # categoricals of two tables need not share their categories
        if isinstance(cells[name].dtype, pd.CategoricalDtype):
            cells[name], pooled[name] = cells[name].astype(str), pooled[name].astype(str)
    cells = cells.merge(pooled, on=on)
    known = cells["se"].notna() & cells["se_truth"].notna()
    left_out, cells = int((~known).sum()), cells[known].reset_index(drop=True)
    width = stats.t.ppf((1 + level) / 2, df=cells["n"] - 1)
    gap = (cells["estimate"] - cells["truth"]).abs()
    cells["inside"] = gap <= width * np.hypot(cells["se"], cells["se_truth"])
    cells["inside_alone"] = gap <= width * cells["se"]
    cells.attrs = {"left_out": left_out}
    return cells
