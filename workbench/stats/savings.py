"""What relearning saves, and how much of what was forgotten was only out of reach.

All means and shares of one curve come from the same resampled items, so that an item is compared
with itself: how fast it was learned first, what it was before the model forgot.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float

from workbench.foils import CONTROL, STUDIED
from workbench.table import METRICS, InputError, rows, validate

LEVEL = 0.95
NET = "net of controls"
PHASES = ("initial", "observed", "recovered")


def savings_curve(table: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Pool the updates that learning took over items, and say what relearning saved.

    Ebbinghaus (1885). With S and C the mean updates of studied and control items, b before study,
    t at a lag: ``1 - S_t / S_b`` is what the studied list saves, ``1 - C_t / C_b`` what a list
    saves that is learned for the first time both times, and net of that
    ``1 - (S_t / S_b) / (C_t / C_b)``.

    Args:
        table: As :func:`workbench.savings.relearn` gives it; rows of ``updates_to_criterion``.
        draws: Bootstrap draws over items; the groups are drawn independently.
        seed: Of the draws.

    Returns:
        Rows with ``item`` "all", by ``lag`` (missing: learning first) and ``phase``, with 95 %
        percentile intervals (of few items they are too narrow: by a tenth at 20, a quarter at 8):

        - ``updates_to_criterion``, the mean by ``group``. Items that never got there count with
          the updates they had, so the mean is one within that many updates, and a ``reason`` says
          how many;
        - ``savings`` by ``group``: "studied", "control", "net of controls". 1 where nothing has
          to be learned again, 0 without memory, below 0 where learning has become slower. NaN with
          a ``reason`` where a divisor is 0.

    Raises:
        InputError: No such rows, a group or the learning before study missing, an item that was
            not asked at every lag, draws below 2.
    """
    table = validate(table)
    if draws < 2:
        raise InputError(f"savings_curve: {draws} draws, an interval needs at least 2")
    asked = table[table["metric"] == "updates_to_criterion"]
    lacking = [name for name in ("phase", "lag") if name not in table.columns]
    if lacking or asked.empty:
        what = f"no column {lacking[0]!r}" if lacking else "no rows of updates_to_criterion"
        raise InputError(f"savings_curve: {what}; relearn gives such a table")
    _refuse_lacking(asked)
    # a censored item has no value; lo is how many updates it had
    asked = asked.assign(
        time=np.where(asked["phase"] == "before", -1.0, asked["lag"]),
        censored=asked["value"].isna(),
        value=asked["value"].fillna(asked["lo"]),
    )
    times = np.sort(asked["time"].unique())
    mean, boots, late, n = {}, {}, {}, {}
    for place, group in enumerate((STUDIED, CONTROL)):
        mine = asked[asked["group"] == group]
        panel = _panel(mine, times)
        _refuse_gaps(panel, mine, times)
        weight = _resample(len(panel), draws, [seed, 12, place])
        mean[group], boots[group] = panel.mean(axis=0), weight @ panel
        late[group] = mine.groupby("time")["censored"].sum()[times].to_numpy()
        n[group] = len(panel)
    most = asked.loc[asked["censored"], "lo"].max()
    parts = []
    for group in mean:
        why = [
            f"{k} of {n[group]} not learned in {most:g} updates" if k else "" for k in late[group]
        ]
        parts.append(
            _pooled("updates_to_criterion", mean[group], boots[group], n[group], group, why)
        )
    point = {group: _share(mean[group][None])[0] for group in mean}
    drawn = {group: _share(boots[group]) for group in mean}
    with np.errstate(divide="ignore", invalid="ignore"):
        point[NET] = _finite(point[STUDIED] / point[CONTROL])
        drawn[NET] = _finite(drawn[STUDIED] / drawn[CONTROL])
    n[NET], late[NET] = n[STUDIED] + n[CONTROL], late[STUDIED] + late[CONTROL]
    for group in point:
        why = np.select(
            [np.isnan(point[group]), late[group] + late[group][0] > 0, point[group] == 0],
            [
                "learned in 0 updates at first, so there is nothing to save",
                f"items not learned in {most:g} updates count with those",
                "no item has to be learned again, so the interval has no width",
            ],
            default="",
        )
        part = _pooled("savings", 1 - point[group], 1 - drawn[group], n[group], group, why)
        parts.append(part[part["at"] > 0])  # before study nothing can be saved: no row
    made = pd.concat(parts, ignore_index=True)
    made["step"] = asked.groupby("time")["step"].first()[times].to_numpy()[made["at"]]
    made["lag"] = np.where(times[made["at"]] < 0, np.nan, times[made["at"]])
    made["phase"] = np.where(made["lag"].isna(), "before", "after")
    made["run"] = str(table["run"].iloc[0])
    return validate(made.drop(columns="at"))


def spurious_forgetting(table: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How much of what was forgotten a little training on other texts brings back.

    Zheng et al. (2025): ``(recovered - observed) / (initial - observed)``, of means over items.

    Args:
        table: As :func:`workbench.savings.realign` gives it: item rows with ``phase`` "initial",
            "observed" and "recovered".
        draws: Bootstrap draws over items; the groups are drawn independently.
        seed: Of the draws.

    Returns:
        Rows with ``item`` "all", ``of`` the metric and ``group`` "studied" (every group but the
        controls is) and, where there are controls, "net of controls": the same of the difference
        between the two, so that what helps any text of the kind is not read as memory that came
        back. 0 where nothing comes back (really lost), 1 where all does (never lost), below 0
        where re-alignment does more harm; 95 % percentile intervals. NaN with a ``reason`` where
        the interval of what was forgotten, ``initial - observed``, holds 0 or is below it; no
        interval, and a ``reason``, where a few draws of the items had forgotten nothing. Items
        without a score are left out, ``.attrs["dropped"]`` counts them by metric.

    Raises:
        InputError: Missing column or phase, nothing but controls, draws below 2.
    """
    table = validate(table)
    if draws < 2:
        raise InputError(f"spurious_forgetting: {draws} draws, an interval needs at least 2")
    held = set(table["phase"]) if "phase" in table.columns else set()
    for phase in PHASES:
        if phase not in held:
            raise InputError(
                f"spurious_forgetting: no rows of phase {phase!r}; realign gives such a table"
            )
    if (table["group"] == CONTROL).all():
        raise InputError(
            "spurious_forgetting: all rows are of controls; give items of the old task as well"
        )
    made, dropped = [], {}
    for metric, part in table.groupby("metric", observed=True, sort=False):
        sign = -1.0 if METRICS[str(metric)].better == "low" else 1.0
        control = part["group"] == CONTROL
        means, boots, n = {}, {}, {}
        for place, (name, mine) in enumerate(((STUDIED, part[~control]), (CONTROL, part[control]))):
            if mine.empty:
                continue
            panel = sign * _panel(mine.assign(time=mine["phase"].astype(str)), PHASES)
            without = np.isnan(panel).any(axis=1)  # too few words for a ROUGE
            dropped[str(metric)] = dropped.get(str(metric), 0) + int(without.sum())
            panel = panel[~without]
            if not len(panel):
                continue
            weight = _resample(len(panel), draws, [seed, 13, place])
            means[name], boots[name], n[name] = panel.mean(axis=0), weight @ panel, len(panel)
        if STUDIED not in means:
            continue
        if CONTROL in means:
            means[NET] = means[STUDIED] - means.pop(CONTROL)
            boots[NET] = boots[STUDIED] - boots.pop(CONTROL)
            n[NET] = n[STUDIED] + n.pop(CONTROL)
        for name in means:
            made.append(
                _recovered(means[name], boots[name]).assign(group=name, of=str(metric), n=n[name])
            )
    found = pd.concat(made, ignore_index=True)
    found = found.assign(run=str(table["run"].iloc[0]), step=int(table["step"].iloc[0]))
    found = validate(found)
    found.attrs["dropped"] = {metric: count for metric, count in dropped.items() if count}
    return found


def _recovered(mean: Float[np.ndarray, " phase"], boots: Float[np.ndarray, "draw phase"]):
    forgotten, low, high = mean[0] - mean[1], *_interval(boots[:, 0] - boots[:, 1])
    if low > 0:
        with np.errstate(divide="ignore", invalid="ignore"):
            value = (mean[2] - mean[1]) / forgotten
            lo, hi = _interval(_finite((boots[:, 2] - boots[:, 1]) / (boots[:, 0] - boots[:, 1])))
        why = "in some draws nothing was forgotten: no interval" if np.isnan(lo) else ""
    else:
        value = lo = hi = np.nan
        why = f"forgotten {forgotten:.3g} [{low:.3g}, {high:.3g}] is not told from nothing"
    return rows("spurious_forgetting", value, run="", lo=lo, hi=hi, beside={"reason": why})


def _refuse_lacking(asked: pd.DataFrame) -> None:
    if not (asked["phase"] == "before").any():
        raise InputError(
            "savings_curve: no rows of phase 'before'; savings are shares of learning first"
        )
    for group in (STUDIED, CONTROL):
        if not (asked["group"] == group).any():
            raise InputError(
                f"savings_curve: no rows of group {group!r}; savings are told from practice by a "
                "list that is learned for the first time each time"
            )


def _refuse_gaps(panel: np.ndarray, mine: pd.DataFrame, times: np.ndarray) -> None:
    if np.isnan(panel).any():
        row, at = np.argwhere(np.isnan(panel))[0]
        item = sorted(mine["item"].astype(str).unique())[row]
        told = "before study" if times[at] < 0 else f"at lag {times[at]:g}"
        raise InputError(
            f"savings_curve: item {item!r} of group {str(mine['group'].iloc[0])!r} was not asked "
            f"{told}; keep items that were asked at all lags"
        )


def _share(updates: Float[np.ndarray, "draw time"]) -> Float[np.ndarray, "draw time"]:
    """Updates over those of learning first, time 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return _finite(updates / updates[:, :1])


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _panel(part: pd.DataFrame, times) -> Float[np.ndarray, "item time"]:
    named = part.assign(item=part["item"].astype(str))  # the order of names, not of appearance
    wide = named.pivot(index="item", columns="time", values="value")
    return wide.reindex(columns=list(times)).to_numpy()


def _resample(n: int, draws: int, seed) -> Float[np.ndarray, "draw item"]:
    """Weights that sum to 1."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) / n


def _interval(boots: np.ndarray) -> tuple:
    """Percentiles, NaN where a draw is undefined; rounded, as weights sum to 1 but for a bit."""
    lo, hi = np.quantile(boots, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).round(12)
    return lo, hi


def _pooled(metric, value, boots, n, group, why) -> pd.DataFrame:
    lo, hi = _interval(boots)
    beside = {"at": np.arange(len(value)), "reason": why}
    return rows(metric, value.round(12), run="", group=group, lo=lo, hi=hi, n=n, beside=beside)
