"""What is wrong with a set of evaluation results, before anything is concluded from their curves.

Published checkpoint series have held the same weights under many names, one checkpoint in place of
another, few-shot runs recorded as zero-shot and gaps. Each is looked for here, with the probability
that chance alone would show it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from workbench.table import METRICS, InputError, rows, validate

A_FACT = "a fact of the files, chance has no part in it"
# what one finding says; the order is that of a report
KINDS = (
    "identical_weights",
    "partly_identical",
    "identical_values",
    "step_record",
    "shots_record",
    "shots_change",
    "checkpoint_off",
    "value_off",
    "missing_step",
    "missing_task",
    "repeated",
    "mixed_harness",
    "mixed_precision",
    "mixed_task_version",
    "limited",
    "constant",
    "at_chance",
    "frozen",
    "not_read",
)
SURE = 1e-6  # a probability by chance below this is called certain
OFF = 0.01  # a task counts towards a whole checkpoint being off at this p
CONSTANT = 4  # equal values in a row that are no longer taken for coincidence
MAD_TO_SD = 1.4826  # of a normal distribution
MAD_EFFICIENCY = 0.37  # of the median absolute deviation against the standard deviation
ROUGHER = 1.5  # roughness over sampling error that is no longer put down to its estimation
PRIOR = 5.0  # values that the run's other curves count for in the roughness of one
FEWEST_DIFFERENCES = 4  # that a curve's own roughness is estimated from


def finding(
    kind: str,
    *,
    run: str,
    step: int,
    what: str,
    remedy: str,
    group: str = "all",
    file: str = "",
    by_chance: float = np.nan,
) -> dict:
    """One finding; ``by_chance`` is the probability that chance shows it anywhere, NaN for a fact."""
    sure = "certain" if not by_chance >= SURE else "likely"
    return dict(kind=kind, run=run, step=int(step), group=group, value=by_chance, sure=sure,
                what=what, remedy=remedy, file=file)  # fmt: skip


def findings_table(found: Sequence[dict], *, run: str) -> pd.DataFrame:
    """Findings as the one table, gravest kind first; empty where there are none."""
    if not found:
        text = dict.fromkeys(("kind", "sure", "what", "remedy", "file", "reason"), "")
        return validate(rows("by_chance", [], run=run, beside=text))
    frame = pd.DataFrame(found)
    order = frame["kind"].map(KINDS.index)
    frame = frame.assign(order=order).sort_values(["order", "run", "step", "group"], kind="stable")
    same = frame.drop(columns="order").groupby(["kind", "run", "step", "group", "file"], sort=False)
    frame = same.agg({"value": "max", "sure": "first", "what": "; ".join, "remedy": "first"})
    frame = frame.reset_index()
    frame["reason"] = np.where(frame["value"].isna(), A_FACT, "")
    frame = frame.assign(item="all", metric="by_chance", lo=np.nan, hi=np.nan, n=1)
    return validate(frame)


def audit_results(table: pd.DataFrame, *, alarm: float = 0.05) -> pd.DataFrame:
    """Look for faults in pooled results over checkpoints, such as ``load_results`` gives.

    Facts of the files: a name that says another step (``step_record``) or number of shots
    (``shots_record``) than the file; shots that change along a run (``shots_change``); several
    evaluations of one checkpoint (``repeated``); harness versions, precisions or task versions that
    differ within a run (``mixed_*``); evaluations of a part of the items (``limited``); a step
    missing in a grid that is regular or geometric on both sides of the gap (``missing_step``); a
    task missing at a step though it is there before, after and at most others (``missing_task``);
    a value equal at all of four or more steps (``constant``).

    Judged against chance:

    - ``identical_values``: two checkpoints with the same values of the same tasks to the last
      digit. A task ties by chance at the rate r at which its neighbouring steps tie elsewhere; the
      probability is the product of all r, times the pairs compared. The model may also not have
      changed between them (very first updates).
    - ``value_off``: a value beyond both its neighbours and beyond the median of the three on either
      side. On a curve that rises, falls or stays, however steeply, no true value does that; the
      excess is judged by Fisher's exact test for shares (else by the standard error) and by the
      curve's own roughness (median absolute second difference), whichever is larger, times the
      values tested. The first and last step of a curve cannot be judged, and two faulty
      neighbours hide each other.
    - ``checkpoint_off``: more tasks beyond p = .01 at one step than a binomial allows, times the
      steps; says to which step the values are nearest. Its tasks are not listed again.
    - ``at_chance``: no value of the curve is above guessing (exact binomial, times the steps):
      neither learning nor forgetting can be read from it. The one finding for which
      ``value`` is the probability of the best value under guessing.

    Args:
        table: Pooled rows (item "all"); ``task``, ``source_metric``, ``shots`` and what else
            ``load_results`` adds are used where they are there.
        alarm: Share of faultless sets of results in which any of the first three kinds may be
            reported by chance: a third for each kind, over all tests of the set (Bonferroni).
            Checkpoints answer the same items, which makes false alarms rarer still.

    Returns:
        One row a finding: metric ``by_chance`` (probability that chance shows it; NaN for facts),
        ``run, step, group`` ("all": the whole checkpoint), and ``kind, sure`` ("certain" or
        "likely"), ``what, remedy, file``. No rows where nothing was found. ``.attrs`` count the
        ``values`` and ``steps`` tested and the ``pairs`` compared.

    Raises:
        InputError: No pooled rows, or ``alarm`` outside 0 to 1.
    """
    if not 0 < alarm < 1:
        raise InputError(f"audit_results: alarm is {alarm}, it must lie between 0 and 1")
    table = validate(table)
    pooled = table[table["item"] == "all"]
    if pooled.empty:
        raise InputError("audit_results: no pooled rows (item 'all'); summarise the items first")
    pooled = _with_coordinates(pooled)
    place = ["run", "step", "task", "source_metric", "shots"]
    one = pooled.drop_duplicates(place, keep="last").assign(items=_share_n)
    tied, pairs = _identical(one, alarm / 3)
    off, values, steps = _off_curve(one, alarm / 3)
    found = [*_records(pooled), *_repeated(pooled, place), *_mixed(pooled), *_gaps(one)]
    found += [*tied, *off, *_flat(one)]
    made = findings_table(found, run=str(one["run"].iloc[0]))
    made.attrs = {"alarm": alarm, "values": values, "steps": steps, "pairs": pairs}
    return made


def _with_coordinates(pooled: pd.DataFrame) -> pd.DataFrame:
    """Plain columns, with those that are not there filled by what they stand for."""
    texts = {"task": "group", "source_metric": "metric"}
    made = {name: pooled[name if name in pooled else of] for name, of in texts.items()}
    for name in ("file", "harness", "precision", "task_version", "how"):
        made[name] = pooled[name] if name in pooled else pd.Series("", index=pooled.index)
    for name in ("run", "group", "metric"):
        made[name] = pooled[name]
    made = {name: column.astype(str).astype(object) for name, column in made.items()}
    for name in ("shots", "declared_shots", "declared_step", "limit", "chance", "se"):
        made[name] = pooled[name].astype(float) if name in pooled else np.nan
    plain = pooled.assign(**made)
    return plain.sort_values(["run", "step", "file"], kind="stable").reset_index(drop=True)


def listed(names, *, most: int = 4) -> str:
    """The first few of many names, and how many more."""
    told = [f"{n:g}" if isinstance(n, float) else str(n) for n in names]
    return ", ".join(told[:most]) + (f" and {len(told) - most} more" if len(told) > most else "")


def _group(part: pd.DataFrame) -> str:
    return part["group"].iloc[0] if part["group"].nunique() == 1 else "all"


# --- facts of the files --------------------------------------------------------------------------


def _records(pooled: pd.DataFrame) -> list[dict]:
    """What names say against what files record, and shots that change along a run."""
    found = []
    wrong = pooled[pooled["declared_step"].notna() & (pooled["declared_step"] != pooled["step"])]
    for (run, step, file), part in wrong.groupby(["run", "step", "file"], sort=False):
        found.append(finding(
            "step_record", run=run, step=step, file=file,
            what=f"the name says step {part['declared_step'].iloc[0]:g}, the file records {step}",
            remedy="find out which is right; steps={file: step} settles it",
        ))  # fmt: skip
    both = pooled["declared_shots"].notna() & pooled["shots"].notna()
    wrong = pooled[both & (pooled["declared_shots"] != pooled["shots"])]
    for (run, step, file), part in wrong.groupby(["run", "step", "file"], sort=False):
        tasks = part["task"].unique()
        found.append(finding(
            "shots_record", run=run, step=step, file=file, group=_group(part),
            what=f"the name says {part['declared_shots'].iloc[0]:g} shots, the file records "
            f"{listed(part['shots'].unique())} for {len(tasks)} tasks ({listed(tasks)})",
            remedy="compare with neighbouring steps of either kind, or evaluate again",
        ))  # fmt: skip
    known = pooled[pooled["shots"].notna()]
    for (run, _task), part in known.groupby(["run", "task"], sort=False):
        # both kinds at one step are two experiments; one after the other is a change of set-up
        if part["shots"].nunique() < 2 or part.groupby("step")["shots"].nunique().max() > 1:
            continue
        usual = part.drop_duplicates("step")["shots"].mode().iloc[0]
        for (step, shots), few in part[part["shots"] != usual].groupby(["step", "shots"]):
            found.append(finding(
                "shots_change", run=run, step=step, group=_group(few), file=few["file"].iloc[0],
                what=f"{shots:g} shots here, {usual:g} at most steps of this task",
                remedy="leave the step out of the curve, or evaluate it again",
            ))  # fmt: skip
    return found


def _repeated(pooled: pd.DataFrame, place: list[str]) -> list[dict]:
    found = []
    again = pooled[pooled.duplicated(place, keep=False)]
    for (run, step), part in again.groupby(["run", "step"], sort=False):
        spread = part.groupby(place, dropna=False)["value"].agg(lambda v: v.max() - v.min())
        same = "all with the same values" if spread.max() == 0 else (
            f"values differ by up to {spread.max():.3g} ({spread.idxmax()[2]})")  # fmt: skip
        files = part["file"].unique()
        found.append(finding(
            "repeated", run=run, step=step, file=files[-1], group=_group(part),
            what=f"{len(files)} evaluations of one checkpoint, {same}: {listed(files)}",
            remedy="choose one by `file`, or load with repeats='latest'",
        ))  # fmt: skip
    return found


def _mixed(pooled: pd.DataFrame) -> list[dict]:
    """Set-ups that differ within a run, told at the first step of the rarer one."""
    found = []
    for run, part in pooled.groupby("run", sort=False):
        files = part.drop_duplicates("file")
        for name in ("harness", "precision"):
            counts = files[files[name] != ""][name].value_counts()
            if len(counts) > 1:
                rare = files[files[name].isin(counts.index[1:])]
                told = ", ".join(f"{value} in {count} files" for value, count in counts.items())
                found.append(finding(
                    f"mixed_{name}", run=run, step=rare["step"].min(), file=rare["file"].iloc[0],
                    what=f"{told}; the rarer at steps {listed(sorted(rare['step'].unique()))}",
                    remedy="differences between these files may be the tool's, not the model's",
                ))  # fmt: skip
        known = part[part["task_version"] != ""]
        versions = known.groupby("task")["task_version"].nunique()
        changed = list(versions.index[versions > 1])
        if changed:
            mine = known[known["task"].isin(changed)]
            usual = mine.groupby("task")["task_version"].transform(lambda v: v.mode().iloc[0])
            rare = mine[mine["task_version"] != usual]
            found.append(finding(
                "mixed_task_version", run=run, step=rare["step"].min(), group=_group(rare),
                file=rare["file"].iloc[0],
                what=f"{len(changed)} tasks have several versions ({listed(changed)}); the rarer at "
                f"steps {listed(sorted(rare['step'].unique()))}",
                remedy="versions of a task are different tasks: do not join them to one curve",
            ))  # fmt: skip
        limited = files[files["limit"].notna()]
        if len(limited):
            found.append(finding(
                "limited", run=run, step=limited["step"].min(), file=limited["file"].iloc[0],
                what=f"{len(limited)} of {len(files)} files are of a part of the items (limit "
                f"{listed(sorted(limited['limit'].unique()))})",
                remedy="fine for a look; compare only files of one limit, and report none of them",
            ))  # fmt: skip
    return found


def _gaps(one: pd.DataFrame) -> list[dict]:
    found = []
    for run, part in one.groupby("run", sort=False):
        steps = np.unique(part["step"])
        for missing in missing_steps(steps):
            found.append(finding(
                "missing_step", run=run, step=missing,
                what=f"steps go {listed(_around(steps, missing))}, without {missing}",
                remedy="look for its file, or evaluate it; curves are drawn across the gap",
            ))  # fmt: skip
        series = part.groupby(["group", "source_metric"], sort=False)["step"].unique()
        lacking: dict[int, list[str]] = {}
        for (group, _), mine in series.items():
            span = steps[(steps >= mine.min()) & (steps <= mine.max())]
            # evaluated at half of the steps or fewer, it has a grid of its own
            if len(mine) > len(span) / 2:
                for step in np.setdiff1d(span, mine):
                    lacking.setdefault(int(step), []).append(group)
        for step, groups in lacking.items():
            groups = list(dict.fromkeys(groups))
            here = part[part["step"] == step]
            found.append(finding(
                "missing_task", run=run, step=step, group=groups[0] if len(groups) == 1 else "all",
                file=here["file"].iloc[0],
                what=f"{len(groups)} of {part['group'].nunique()} tasks are missing: {listed(groups)}",
                remedy="means over tasks at this step are of other tasks than elsewhere",
            ))  # fmt: skip
    return found


def _around(steps: np.ndarray, missing: int) -> list[int]:
    at = int(np.searchsorted(steps, missing))
    return [int(s) for s in steps[max(0, at - 2) : at + 2]]


def missing_steps(steps: Sequence[int]) -> list[int]:
    """Steps left out of a grid that goes on with the same stride, or the same ratio, after the gap.

    1000, 2000, 4000, 5000, 6000 lacks 3000; 1, 2, 8, 16, 32 lacks 4. A grid that becomes coarser
    (1000, 2000, 3000, 10000, 20000) lacks nothing, nor does 256, 512, 1000, 2000, where powers of
    two give way to a stride. Nothing is known of gaps at either end.
    """
    steps = np.unique(np.asarray(steps, dtype=np.int64))
    stride = np.diff(steps).astype(float)
    with np.errstate(divide="ignore"):
        ratio = np.diff(np.log(steps.astype(float)))
    found = set()
    for at in range(len(stride)):
        for gap, even in ((stride, 0.0), (ratio, 0.02)):
            before, after = gap[max(0, at - 3) : at], gap[at + 1 : at + 4]
            if (
                not len(before)
                or not len(after)
                or not np.isfinite([*before, *after, gap[at]]).all()
            ):
                continue
            unit = before.min()
            times = gap[at] / unit if unit else 0
            regular = abs(after.min() - unit) <= even * unit and times > 1.5
            # two strides of the unit must be seen on one side, or any three steps make a grid
            near = [g for g in (*before, *after) if abs(g - unit) <= even * unit]
            if not regular or len(near) < 3 or abs(times - round(times)) > even * times:
                continue
            for k in range(1, round(times)):
                if gap is stride:
                    found.add(int(steps[at] + k * unit))
                else:
                    found.add(round(steps[at] * np.exp(k * gap[at] / round(times))))
            break
    return sorted(found - set(steps.tolist()))


# --- against chance ------------------------------------------------------------------------------


def _identical(one: pd.DataFrame, alarm: float) -> tuple[list[dict], int]:
    """Checkpoints (run, step, shots) whose values all equal those of another."""
    where = ["run", "step", "shots"]
    known = one[one["value"].notna()].assign(shots=one["shots"].fillna(-1.0))
    key = known["task"] + "\n" + known["source_metric"]
    wide = known.assign(key=key).pivot_table(
        index=where, columns="key", values="value", aggfunc="last", observed=True
    )
    matrix = wide.to_numpy()
    pairs = len(matrix) * (len(matrix) - 1) // 2
    labels = np.unique([row.tobytes() for row in np.nan_to_num(matrix, nan=-7e300)],
                       return_inverse=True)[1]  # fmt: skip
    run = wide.index.get_level_values("run")
    next_to = (run[1:] == run[:-1]) & (labels[1:] != labels[:-1])
    ties = (matrix[1:] == matrix[:-1])[next_to].sum(axis=0)
    both = (~np.isnan(matrix[1:]) & ~np.isnan(matrix[:-1]))[next_to].sum(axis=0)
    shares = known.groupby(key)["metric"].first().reindex(wide.columns).isin(_shares())
    rate = (ties + np.where(shares, 0.5, 0.001)) / (both + 1)
    found = []
    files = known.groupby(where)["file"].first()
    for label in np.flatnonzero(np.bincount(labels) > 1):
        members = np.flatnonzero(labels == label)
        held = ~np.isnan(matrix[members[0]])
        by_chance = float(min(1.0, np.prod(rate[held]) * pairs))
        if by_chance >= alarm:
            continue
        for at in members:
            name, step, few = wide.index[at]
            others = [wide.index[m] for m in members if m != at]
            told = listed([_named(other, name, few) for other in others])
            found.append(finding(
                "identical_values", run=name, step=step, by_chance=by_chance,
                file=files.loc[(name, step, few)],
                what=f"all {held.sum()} values equal those of {told} to the last digit",
                remedy="one checkpoint under several names, or a result copied: compare the weights "
                "(audit_checkpoints), evaluate again",
            ))  # fmt: skip
    return found, pairs


def _shares() -> list[str]:
    return [key for key, metric in METRICS.items() if (metric.low, metric.high) == (0.0, 1.0)]


def _named(other: tuple, run: str, shots: float) -> str:
    name = f"step {other[1]}" if other[0] == run else f"{other[0]} step {other[1]}"
    return name if other[2] == shots else f"{name} ({other[2]:g} shots)"


def _off_curve(one: pd.DataFrame, alarm: float) -> tuple[list[dict], int, int]:
    """Single values, and whole checkpoints, that lie beyond what their neighbours allow."""
    curves = []
    series = ["run", "task", "source_metric", "shots"]
    for (run, *_), line in one[one["value"].notna()].groupby(series, sort=False, dropna=False):
        if len(line) >= 4:
            line = line.sort_values("step")
            drawn = tuple(line[name].to_numpy() for name in ("value", "items", "se"))
            curves.append((run, line, drawn, _roughness_ratio(*drawn)))
    usual = pd.Series([c[3] for c in curves], dtype=float).groupby([c[0] for c in curves]).median()
    parts = [
        line.assign(p=off_curve(value, n=n, se=se, usual=float(usual[run])))
        for run, line, (value, n, se), _ in curves
    ]
    if not parts:
        return [], 0, 0
    tested = pd.concat(parts)
    tested = tested[tested["p"].notna()]
    whole, steps = _whole_checkpoints(one, tested, alarm)
    taken = {(f["run"], f["step"]) for f in whole}
    found = list(whole)
    beyond = tested[tested["p"] * len(tested) < alarm]
    for row in beyond.itertuples():
        if (row.run, row.step) not in taken:
            found.append(finding(
                "value_off", run=row.run, step=row.step, group=row.group, file=row.file,
                by_chance=row.p * len(tested),
                what=f"{row.source_metric} is {row.value:.4g}, beyond the steps around it "
                f"({_beside(one, row)})",
                remedy="evaluate this task at this step again",
            ))  # fmt: skip
    return found, len(tested), steps


def _beside(one: pd.DataFrame, row) -> str:
    same = one[(one["run"] == row.run) & (one["group"] == row.group)]
    same = same[same["source_metric"] == row.source_metric].sort_values("step")
    at = int(np.searchsorted(same["step"], row.step))
    near = pd.concat([same.iloc[max(0, at - 2) : at], same.iloc[at + 1 : at + 3]])
    return ", ".join(f"{v:.4g}" for v in near["value"])


def _share_n(table: pd.DataFrame) -> pd.Series:
    """Items behind each share; NaN where the number is no share of items or n is not known."""
    share = table["how"].str.startswith("wilson")
    share |= (table["how"] == "") & table["metric"].isin(_shares())
    return table["n"].astype(float).where(share & (table["n"] > 1))


def off_curve(
    value: Float[np.ndarray, " step"],
    *,
    n: Float[np.ndarray, " step"],
    se: Float[np.ndarray, " step"],
    usual: float = np.nan,
) -> Float[np.ndarray, " step"]:
    """Two-sided p of each value against the steps around it; NaN where it cannot be judged.

    With U (L) the largest (smallest) of the two neighbours and of the medians of up to three
    values on either side, the excess is ``value - U`` if positive, else ``value - L`` if negative,
    else 0 and p is 1. A share of n items is judged by Fisher's exact test against n items at U (or
    L), any other number by a normal of ``sqrt(2) se``; and then by the curve's roughness in place
    of the sampling error: the larger p counts. Roughness is the median absolute second difference
    of the values away from the one judged, drawn towards what is usual of the run's curves as
    though that were five values more (Smyth 2004, moderated variances). Where it is above the
    sampling error by half or more it is judged as Student's t.

    For values that scatter by no more than that around a curve that is monotone there, p is at
    most uniform: shares (.5, .5, .9, .5, .5) of 100 have U = .5, and p = 2 P(X >= 90) of a
    hypergeometric of 200 with 140 marked, 100 drawn: 5.5e-10 (roughness needs more values).

    Args:
        value: Along the steps.
        n: Items behind each share, NaN for other numbers.
        se: Standard errors of those, NaN where unknown: then roughness alone decides.
        usual: Roughness over sampling error that is usual of the run, NaN for none.
    """
    inner = slice(1, len(value) - 1)
    around = np.stack([value[:-2], value[2:], *_medians(value)])
    up, down = value[inner] - around.max(axis=0), value[inner] - around.min(axis=0)
    excess = np.where(up > 0, up, np.minimum(down, 0.0))
    limit = np.where(excess > 0, around.max(axis=0), around.min(axis=0))
    p = _sampling_p(value[inner], limit, excess, n[inner], se[inner])
    sampling = _sampling_sd(value, n, se)[inner]
    steps = np.arange(len(excess))
    rough, df = roughness(value, np.abs(steps[:, None] - steps) > 1)
    if usual > 0 and df.any():
        pooled = np.sqrt((PRIOR * (usual * sampling) ** 2 + df * rough**2) / (PRIOR + df))
        rough = np.where((sampling > 0) & (df > 0), pooled, rough)
        df = np.where(sampling > 0, PRIOR + df, df)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.abs(excess) / (np.sqrt(2) * rough)
        own = 2 * np.where(rough < ROUGHER * sampling, stats.norm.sf(z), stats.t.sf(z, df))
    p = np.where(rough > 0, np.fmax(p, own), p)
    return np.concatenate([[np.nan], np.minimum(p, 1.0), [np.nan]])


def _medians(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Medians of up to three values before and after each value but the first and last."""
    wide = np.concatenate([[np.nan] * 2, value, [np.nan] * 2])
    threes = np.nanmedian(np.lib.stride_tricks.sliding_window_view(wide, 3), axis=1)
    # window k covers the values k - 2 to k
    return threes[: len(value) - 2], threes[4:]


def roughness(value: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scatter of single values around a locally straight line, and its degrees of freedom.

    One result for each row of ``used``, which says what second differences count.
    """
    bend = np.abs(value[1:-1] - (value[2:] + value[:-2]) / 2)
    count = used.sum(axis=1)
    enough = count >= FEWEST_DIFFERENCES
    rough = np.zeros(len(used))
    if enough.any():
        middle = np.nanmedian(np.where(used[enough], bend, np.nan), axis=1)
        # a second difference of values of variance 1 has 1 + 1/4 + 1/4
        rough[enough] = MAD_TO_SD * middle / np.sqrt(1.5)
    return rough, np.where(enough, MAD_EFFICIENCY * count, 0.0)


def _roughness_ratio(value: np.ndarray, n: np.ndarray, se: np.ndarray) -> float:
    sampling = np.median(_sampling_sd(value, n, se))
    rough = roughness(value, np.ones((1, len(value) - 2), dtype=bool))[0][0]
    return rough / sampling if sampling > 0 else np.nan


def _sampling_sd(value: np.ndarray, n: np.ndarray, se: np.ndarray) -> np.ndarray:
    q = (n * value + 2) / (n + 4)  # not 0 at 0 and 1
    with np.errstate(invalid="ignore"):
        return np.where(n > 1, np.sqrt(q * (1 - q) / n), np.nan_to_num(se))


def _sampling_p(value, limit, excess, n, se) -> np.ndarray:
    """Two-sided p of the excess by sampling error alone: exact for shares, else normal."""
    with np.errstate(divide="ignore", invalid="ignore"):
        normal = 2 * stats.norm.sf(np.abs(excess) / (np.sqrt(2) * se))
    p = np.where(se > 0, normal, np.nan)
    share = n > 1
    if share.any():
        all_of = n[share]
        right, other = np.rint(value[share] * all_of), np.rint(limit[share] * all_of)
        below = excess[share] < 0
        right, other = (
            np.where(below, all_of - right, right),
            np.where(below, all_of - other, other),
        )
        p[share] = 2 * stats.hypergeom.sf(right - 1, 2 * all_of, right + other, all_of)
    return np.where(excess == 0, np.where(share | (se > 0), 1.0, np.nan), p)


def _whole_checkpoints(one, tested: pd.DataFrame, alarm: float) -> tuple[list[dict], int]:
    first = tested.drop_duplicates(["run", "step", "task", "shots"])
    found, counts = [], first.groupby(["run", "step"], sort=False)["p"]
    for (run, step), p in counts:
        off = int((p < OFF).sum())
        by_chance = float(min(1.0, stats.binom.sf(off - 1, len(p), OFF) * len(counts)))
        if off < 2 or by_chance >= alarm:
            continue
        names = first.loc[p.index[p < OFF], "group"]
        found.append(finding(
            "checkpoint_off", run=run, step=step, by_chance=by_chance,
            file=first.loc[p.index[0], "file"],
            what=f"{off} of {len(p)} tasks lie beyond the steps around it ({listed(names)}); its "
            f"values are nearest those of step {_nearest(one, run, step)}",
            remedy="a damaged or exchanged checkpoint, or another set-up: compare weights, "
            "evaluate again",
        ))  # fmt: skip
    return found, len(counts)


def _nearest(one: pd.DataFrame, run: str, step: int) -> int:
    mine = one[one["run"] == run]
    wide = mine.pivot_table(index="step", columns=["task", "source_metric", "shots"],
                            values="value", dropna=False)  # fmt: skip
    spread = wide.std()
    away = ((wide - wide.loc[step]) / spread.where(spread > 0)) ** 2
    return int(away.mean(axis=1).drop(step).idxmin())


def _flat(one: pd.DataFrame) -> list[dict]:
    found = []
    series = ["run", "group", "source_metric"]
    for (run, group, key), line in one[one["value"].notna()].groupby(series, sort=False):
        last = line.iloc[-1]
        if len(line) >= CONSTANT and line["value"].nunique() == 1:
            found.append(finding(
                "constant", run=run, step=last["step"], group=group, file=last["file"],
                what=f"{key} is {last['value']:.4g} at all {len(line)} steps",
                remedy="one answer to everything, or results copied: this curve says nothing",
            ))  # fmt: skip
            continue
        judged = line[line["items"].notna() & line["chance"].notna()]
        if judged.empty or not (judged["chance"] > 0).any():
            continue
        right = (judged["value"] * judged["items"]).round()
        p = stats.binom.sf(right - 1, judged["items"], judged["chance"]).min() * len(judged)
        if p >= 0.05:
            best = judged["value"].max()
            found.append(finding(
                "at_chance", run=run, step=last["step"], group=group, file=last["file"],
                by_chance=float(min(1.0, p)),
                what=f"{key} is at most {best:.3g} at {len(judged)} steps, guessing gives "
                f"{judged['chance'].iloc[0]:.3g}",
                remedy="neither learning nor forgetting can be read from this curve",
            ))  # fmt: skip
    return found
