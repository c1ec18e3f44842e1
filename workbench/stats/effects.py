"""Effects item by item: against controls in the same run, and against a crossover twin.

The first is what a single run allows (and what the causal profile averages); the second is the
truth that the embedded suite knows, since the twin never trained on the item.

Which error is the right one depends on what the estimate is held to. Write an item's change since
its base as ``d + tau``: what it would have done untrained, and what training did to it.

- The effect on texts like these (the profile's): the trained items are a draw, so the error is the
  spread of ``d + tau`` over them and of ``d`` over the controls. That is what a profile reports.
- The effect on these very items, ``mean(tau)``, which a twin measures: ``tau`` cancels, and the
  error is the spread of ``d`` alone, on both sides. The profile's error is too wide for it where
  effects differ between texts, and too narrow where training evens scores out, so that ``tau`` is
  large where ``d`` is low: well memorized texts all stand near 0, their counterfactuals do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import stats

from workbench.table import InputError, one_metric, rows, validate

LEAST_TEXTS = 5  # items of a curve below which an interval from resampling them is too narrow


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
    trained = table["cohort"].notna()
    control = table[~trained].groupby([*strata, "step"], observed=True)["value"].mean()
    control = control.rename("control").reset_index()
    mine = table[trained].copy()
    mine["base_step"] = _base_steps(mine["cohort"], table["step"])
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


def same_at_every_lag(
    table: pd.DataFrame, *, x: str = "lag", by: Sequence[str] = ("group",), least: int = LEAST_TEXTS
) -> pd.DataFrame:
    """Keep the items that are watched at every lag of their curve, so that one set makes it whole.

    Where exposures come in waves, the late ones are not watched for long: a mean over all items
    then changes with who is left in it, also where no item does. Callaway & Sant'Anna (2021),
    "Difference-in-differences with multiple time periods", balance an event study likewise, by
    the groups that are exposed for long enough. How long an item is watched hangs on when it was
    last trained on, not on what it kept: items are chosen by wave, not by outcome, and the curve
    is that of the waves kept and says nothing of the others. Holes that hang on the outcome (a
    score that could not be taken) would choose by outcome: look at who has them.

    Args:
        table: Item rows. Those without a value or without ``x`` watch nothing and are dropped.
        x: Updates since the last exposure.
        by: Coordinates that tell curves apart; run and metric always do. The lags of a curve are
            those at which any of its items is watched.
        least: Curves with fewer items left than this keep all. An interval from resampling n items
            ends at the lowest and the highest of them, and all n lie on one side of their
            population's median once in 2^(n - 1) times: 2 miss it in half, 4 in 12 %, 5 in 6 %.

    Returns:
        The rows of items kept, all of them where none leaves. ``.attrs`` adds ``left_out``, how
        many items were left out of a curve; ``changing``, the curves that kept all though their
        items change with ``x``; and ``dropped``, the rows that watch nothing.

    Raises:
        InputError: An unknown column, pooled rows, or ``least`` below 1.
    """
    attrs, table = table.attrs, validate(table)
    for name in (x, *by):
        if name not in table.columns:
            raise InputError(f"same_at_every_lag: no column {name!r}; there are {', '.join(table)}")
    if least < 1:
        raise InputError(f"same_at_every_lag: least is {least}, it must be at least 1")
    pooled = int((table["item"] == "all").sum())
    if pooled:
        raise InputError(
            f"same_at_every_lag: {pooled} rows are pooled already (item is all); give item rows"
        )
    watched = table[table["value"].notna() & table[x].notna()]
    kept, left_out, changing = [], set(), []
    curves = watched.groupby(["run", "metric", *by], observed=True, dropna=False, sort=False)
    for (run, _, *values), part in curves:
        seen = part.groupby("item", observed=True)[x].nunique()
        whole = seen.index[seen == part[x].nunique()]
        if len(whole) == len(seen) or len(whole) >= least:
            left_out |= {(run, item) for item in seen.index.difference(whole)}
            part = part[part["item"].isin(whole)]
        else:
            changing.append(", ".join(map(str, values)) or "all")
        kept.append(part)
    out = pd.concat(kept).sort_index() if kept else watched
    told = {"left_out": len(left_out), "changing": list(dict.fromkeys(changing))}
    out.attrs = attrs | told | {"dropped": len(table) - len(watched)}
    return out.reset_index(drop=True)


def _base_steps(cohort: pd.Series, step: pd.Series) -> Int[np.ndarray, " row"]:
    """The last checkpoint before each cohort's first exposure, -1 where there is none."""
    steps = np.sort(step.unique())
    at = np.searchsorted(steps, cohort.to_numpy()) - 1
    return np.where(at >= 0, steps[np.maximum(at, 0)], -1)


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
    estimate: pd.DataFrame,
    truth: pd.DataFrame,
    *,
    panel: pd.DataFrame,
    on: Sequence[str],
    strata: Sequence[str] = (),
    level: float = 0.95,
) -> pd.DataFrame:
    """Set estimates beside the truth's item mean, cell by cell.

    An estimate less the truth is ``mean over items of (Y0_t - Y_b) - mean over controls of
    (Y_t - Y_b)``, Y0 the twin's score: the trained scores cancel. Its error is therefore the spread
    of each item's own difference, gain less true effect, and of the controls' changes; adding the
    errors of estimate and truth would count the spread of effects twice, which is not in it at all.

    Args:
        estimate: Rows with ``value, se, lo, hi`` and the coordinates ``on``: means of the gains of
            a cell's items, as a profile gives them.
        truth: Item rows of :func:`twin_effects`, those of the cells' items and steps.
        panel: What the estimates were made of: item rows of the run, with ``cohort``.
        on: Coordinates that name a cell, such as ``("kind", "dose", "lag")``.
        strata: Columns within which controls are matched, as for the estimates; each must be in
            ``on``.
        level: Of the interval for the difference.

    Returns:
        One row a cell: ``on``; ``estimate, se, lo, hi`` as given; ``truth`` and ``n`` (items);
        ``se_truth`` (of the truth as a mean for texts like these; that for these very texts has
        none); ``se_difference`` (of estimate less truth, see above) and its ``freedom``
        (Welch-Satterthwaite's); ``inside`` (the difference lies within its interval, Student's t:
        about ``level`` of cells where the estimator is unbiased); ``covered`` (the estimate's own
        ``lo`` to ``hi`` holds the truth). Cells without an error on either side are left out;
        ``.attrs["left_out"]`` counts them.

    Raises:
        InputError: Missing columns, strata that are not in ``on``, or as :func:`item_gains`.
    """
    on, strata = list(on), list(strata)
    for name in [*on, "value", "se", "lo", "hi"]:
        if name not in estimate.columns:
            raise InputError(f"compare_with_truth: the estimates have no column {name!r}")
    for name in strata:
        if name not in on:
            raise InputError(f"compare_with_truth: the stratum {name!r} is not in on")
    gains = item_gains(panel, strata=strata).astype({"item": str})
    pairs = truth.astype({"item": str}).merge(
        gains[["item", "step", "value"]].rename(columns={"value": "gain"}), on=["item", "step"]
    )
    pairs["base_step"] = _base_steps(pairs["cohort"], panel["step"])
    pairs["difference"] = pairs["gain"] - pairs["value"]
    cells = pairs.groupby(on, observed=True).agg(
        truth=("value", "mean"),
        se_truth=("value", "sem"),
        n=("item", "size"),
        own=("difference", "var"),
    )
    cells["control"], cells["n_control"] = _control_errors(pairs, panel, on, strata)
    own = cells["own"] / cells["n"]
    total = own + cells["control"]
    freedom = own**2 / (cells["n"] - 1) + cells["control"] ** 2 / (cells["n_control"] - 1)
    cells = cells.assign(se_difference=np.sqrt(total), freedom=total**2 / freedom).reset_index()
    told = estimate[[*on, "value", "se", "lo", "hi"]].rename(columns={"value": "estimate"})
    for name in on:  # categoricals of two tables need not share their categories
        if isinstance(told[name].dtype, pd.CategoricalDtype):
            told[name], cells[name] = told[name].astype(str), cells[name].astype(str)
    cells = told.merge(cells, on=on)
    known = cells["se"].notna() & (cells["se_difference"] > 0)
    left_out, cells = int((~known).sum()), cells[known].reset_index(drop=True)
    width = stats.t.ppf((1 + level) / 2, df=cells["freedom"]) * cells["se_difference"]
    cells["inside"] = (cells["estimate"] - cells["truth"]).abs() <= width
    cells["covered"] = cells["truth"].between(cells["lo"], cells["hi"])
    cells = cells.drop(columns=["own", "control", "n_control"])
    cells.attrs = {"left_out": left_out}
    return cells


def _control_errors(pairs: pd.DataFrame, panel: pd.DataFrame, on: list[str], strata: list[str]):
    """Squared error of the controls' mean change in each cell, and how many controls there are."""
    controls = panel[panel["cohort"].isna()].astype({name: str for name in ("item", *strata)})
    wide = controls.pivot(index="item", columns="step", values="value")
    label = controls.drop_duplicates("item").set_index("item").loc[wide.index, strata]
    errors, counts = [], []
    for where, part in pairs.groupby(on, observed=True):
        wanted = dict(zip(on, map(str, where), strict=True))
        same = wide[(label == [wanted[name] for name in strata]).all(axis=1)]
        # each control's change, averaged over the cell's items: they differ in step and base
        change = same[part["step"]].to_numpy() - same[part["base_step"]].to_numpy()
        change = change.mean(axis=1)
        change = change[np.isfinite(change)]
        errors.append(change.var(ddof=1) / len(change) if len(change) > 1 else np.nan)
        counts.append(len(change))
    return errors, counts


def truth_of_others(cells: pd.DataFrame, *, on: Sequence[str], over: str = "seed") -> pd.DataFrame:
    """Hold each run's estimate to the truth of the other runs: the effect on texts like these.

    Runs with other texts, weights and batches share nothing with the estimate, so their errors do
    add up, and an estimate that reports the error for texts like these must cover their mean.

    Args:
        cells: Rows of :func:`compare_with_truth` of several runs, with ``over``.
        on: Coordinates that name a cell.
        over: Column that names the run.

    Returns:
        The cells with ``truth`` the mean over the other runs, ``lo`` and ``hi`` widened by its
        error (``se_truth`` in quadrature over the number of runs), and ``covered`` accordingly.
        Cells that no other run has are left out.
    """
    together = cells.assign(squared=cells["se_truth"] ** 2).groupby(list(on), observed=True)
    count = together["truth"].transform("size") - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        truth = (together["truth"].transform("sum") - cells["truth"]) / count
        error = np.sqrt(together["squared"].transform("sum") - cells["se_truth"] ** 2) / count
    wider = np.hypot(cells["se"], error) / cells["se"]
    lo = cells["estimate"] - wider * (cells["estimate"] - cells["lo"])
    hi = cells["estimate"] + wider * (cells["hi"] - cells["estimate"])
    held = cells.assign(truth=truth, lo=lo, hi=hi, covered=truth.between(lo, hi))
    return held[count > 0].reset_index(drop=True)


def calibration(
    cells: pd.DataFrame,
    *,
    on: Sequence[str],
    by: Sequence[str] = (),
    over: str = "seed",
    level: float = 0.95,
) -> pd.DataFrame:
    """Over trainings with other seeds: is the estimate right on average, and its error the real one?

    Cells of one training share its texts and weights, so they are averaged first, and the training
    is the unit of every interval (Student's t over trainings; for the ratio, of the jackknife's
    logarithm).

    Args:
        cells: Rows of :func:`compare_with_truth` of several trainings: ``estimate, truth, se, lo,
            covered``.
        on: Coordinates that name a cell.
        by: Coordinates of the result; none pools all cells.
        over: Column that names the training.

    Returns:
        Rows of "bias" (mean of estimate less truth; 0 at best), "error_ratio" (the spread of
        estimate less truth over trainings, cell by cell, over the mean reported variance, rooted: 1
        where the error is right, above where it is too small), "coverage" (share of ``covered``)
        and "power" (share of cells whose ``lo`` is above 0). ``n`` counts trainings; one gives no
        interval and no ratio.

    Raises:
        InputError: Unknown columns, or several rows of a cell in one training.
    """
    on, by = list(on), list(by)
    for name in [*on, *by, over]:
        if name not in cells.columns:
            raise InputError(f"calibration: no column {name!r}")
    if cells.duplicated([*on, over]).any():
        raise InputError(
            f"calibration: several rows per ({', '.join([*on, over])}); name what tells them apart "
            "in on"
        )
    cells = cells.assign(
        bias=cells["estimate"] - cells["truth"],
        coverage=cells["covered"].astype(float),
        power=(cells["lo"] > 0).astype(float),
        squared=cells["se"] ** 2,
    )
    parts = []
    for where, part in cells.groupby(by, observed=True) if by else [((), cells)]:
        beside = dict(zip(by, where, strict=True))
        mean = part.groupby(over)[["bias", "coverage", "power"]].mean()
        for metric in mean:
            value, lo, hi = _t_interval(mean[metric].to_numpy(), level)
            if metric != "bias":
                lo, hi = np.clip((lo, hi), 0, 1)
            parts.append(rows(metric, value, run="all", lo=lo, hi=hi, n=len(mean), beside=beside))
        value, lo, hi = _error_ratio(part, on, over, level)
        reason = "" if np.isfinite(value) else f"one {over}: no spread"
        beside = beside | {"reason": reason}
        parts.append(
            rows("error_ratio", value, run="all", lo=lo, hi=hi, n=len(mean), beside=beside)
        )
    return validate(pd.concat(parts, ignore_index=True).fillna({"reason": ""}))


def _t_interval(value: Float[np.ndarray, " run"], level: float) -> tuple[float, float, float]:
    mean = float(value.mean())
    if len(value) < 2:
        return mean, np.nan, np.nan
    half = stats.t.ppf((1 + level) / 2, len(value) - 1) * value.std(ddof=1) / np.sqrt(len(value))
    return mean, mean - half, mean + half


def _error_ratio(part: pd.DataFrame, on: list[str], over: str, level: float):
    """Spread of the difference over runs against the reported error; jackknife over runs."""
    apart = part.pivot(index=on, columns=over, values="bias").to_numpy()
    squared = part.pivot(index=on, columns=over, values="squared").to_numpy()
    runs = apart.shape[1]
    if runs < 2:
        return np.nan, np.nan, np.nan

    def ratio(keep: Bool[np.ndarray, " run"]) -> float:
        spread = pd.DataFrame(apart[:, keep]).var(axis=1, ddof=1)
        return float(np.sqrt(spread.mean() / np.nanmean(squared)))

    value = ratio(np.ones(runs, dtype=bool))
    if runs < 3 or value == 0:  # leaving one of two out leaves no spread
        return value, np.nan, np.nan
    without = np.log([ratio(np.arange(runs) != each) for each in range(runs)])
    error = np.sqrt((runs - 1) / runs * ((without - without.mean()) ** 2).sum())
    half = stats.t.ppf((1 + level) / 2, runs - 1) * error
    return value, value * np.exp(-half), value * np.exp(half)
