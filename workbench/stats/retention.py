"""What is left of a studied list, with drift taken out and intervals over items.

All means, differences and shares of one curve come from the same resampled items, so that a
difference between lags, or between an item and its foil, keeps its pairing.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float

from workbench.foils import CONTROL, ITSELF, STUDIED
from workbench.table import InputError, rows, validate

MINUS_CONTROL, GAIN, DRIFT, NET = (
    "studied - control",
    "studied - before",
    "control - before",
    "net gain",
)
ALL_OR_NONE = ("recognition", "recall_exact")  # one verdict an item: 0 or 1, seldom a tie
LEVEL = 0.95


def retention_curve(table: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Pool the measurements of a study-and-retain experiment over items, at each lag.

    With S and C the means over studied and control items, b before study, t at a lag and 0 at the
    first lag: ``difference`` holds S_t - C_t, S_t - S_b, C_t - C_b and their net gain
    ``(S_t - S_b) - (C_t - C_b)``, and ``retention`` the share of the net gain that is left,
    ``net_t / net_0``.

    Args:
        table: As :func:`workbench.retention.study_and_retain` gives it: one row an item, with
            ``phase``, ``lag`` and ``foil``; loss, recognition, recall.
        draws: Bootstrap draws over items; the groups are drawn independently.
        seed: Of the draws.

    Returns:
        Rows with ``item`` "all" and 95 % percentile intervals (where all items agree, which leaves
        a bootstrap no width, the exact binomial bound):

        - every metric's mean by ``group``, and per foil kind ``recognition_auc`` (:func:`auc`) and
          ``d_prime`` (:func:`d_prime`);
        - ``difference``, ``group`` saying which, ``of`` the metric: 0 without memory;
        - ``retention``, ``of`` the metric: 1 at the first lag, 0 when nothing is left, below 0 or
          above 1 where the list is worse or better off than it ever was. NaN with a ``reason``
          where the first net gain is not told from 0.

    Raises:
        InputError: Missing columns, a group at some lag, or the measurement before study; draws
            below 2.
    """
    table = validate(table)
    _refuse(table, draws)
    table = table.assign(time=np.where(table["phase"] == "before", -1.0, table["lag"]))
    times = np.sort(table["time"].unique())
    clock = table.groupby("time")["step"].first()[times].to_numpy()
    weights: dict = {}
    parts = []
    for (metric, foil), part in table.groupby(["metric", "foil"], observed=True, sort=False):
        panels = {g: _panel(part, g, times) for g in (STUDIED, CONTROL)}
        boots = {g: _resample(weights, g, p.shape[0], draws, seed) @ p for g, p in panels.items()}
        place = {"foil": str(foil), "of": str(metric)}
        parts += _levels(str(metric), panels, boots, place)
        parts += _contrasts(panels, boots, place)
        if metric == "loss" and foil != ITSELF:
            parts += _apart(table, str(foil), times, weights, draws, seed)
    made = pd.concat(parts, ignore_index=True)
    made["step"] = clock[made["at"]]
    made["lag"] = np.where(times[made["at"]] < 0, np.nan, times[made["at"]])
    made["phase"] = np.where(made["lag"].isna(), "before", "after")
    made["run"] = str(table["run"].iloc[0])
    made["of"] = made["of"].where(made["metric"].isin(["difference", "retention"]), "")
    return validate(made.drop(columns="at"))


def auc(
    item: Float[np.ndarray, " item"], foil: Float[np.ndarray, " foil"]
) -> Float[np.ndarray, ""]:
    """Chance that a studied text's loss is below a foil's, drawn apart; ties count a half.

    .5 where the two are distributed alike, 1 where every item is below every foil.
    """
    below = item[:, None] < foil[None, :]
    return (below + 0.5 * (item[:, None] == foil[None, :])).mean()


def d_prime(
    item: Float[np.ndarray, " item"], foil: Float[np.ndarray, " foil"]
) -> Float[np.ndarray, ""]:
    """Distance between the two distributions of loss, in their standard deviations.

    ``(mean foil - mean item) / sqrt((var item + var foil) / 2)``, variances with n - 1, which is
    d_a of Macmillan & Creelman (2005), "Detection theory": 0 where they have one mean; for normal
    losses the unpaired AUC is Phi(d' / sqrt 2). NaN where neither varies, or of single items.
    """
    if min(len(item), len(foil)) < 2:
        return np.nan
    spread = np.sqrt((item.var(ddof=1) + foil.var(ddof=1)) / 2)
    return (foil.mean() - item.mean()) / spread if spread > 0 else np.nan


def _panel(part: pd.DataFrame, group: str, times: np.ndarray) -> Float[np.ndarray, "item time"]:
    mine = part[part["group"] == group]
    panel = mine.pivot(index="item", columns="time", values="value").sort_index()
    return panel.reindex(columns=times).dropna(how="all").to_numpy()


def _resample(weights: dict, group: str, n: int, draws: int, seed: int) -> np.ndarray:
    """``[draw, item]`` weights that sum to 1, the same whenever the same items are asked for."""
    if (group, n) not in weights:
        rng = np.random.default_rng([seed, 10, (STUDIED, CONTROL).index(group), n])
        weights[group, n] = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n
    return weights[group, n]


def _interval(boots: Float[np.ndarray, "draw time"]) -> tuple[np.ndarray, np.ndarray]:
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    # resampling weights sum to 1 but for the last bit, which must not leave a metric's range
    lo, hi = np.quantile(boots, tails, axis=0).round(12)
    return lo, hi


def _levels(metric, panels, boots, place) -> list[pd.DataFrame]:
    made = []
    for group, panel in panels.items():
        n = len(panel)
        value, (lo, hi) = panel.mean(axis=0), _interval(boots[group])
        if metric in ALL_OR_NONE:
            rest = ((1 - LEVEL) / 2) ** (1 / n)  # Clopper-Pearson with n of n
            lo, hi = np.where(value == 1, rest, lo), np.where(value == 0, 1 - rest, hi)
        made.append(_rows(metric, value, lo, hi, n, group, place))
    return made


def _contrasts(panels, boots, place) -> list[pd.DataFrame]:
    means = {g: p.mean(axis=0)[None] for g, p in panels.items()}
    n = {g: len(p) for g, p in panels.items()}
    pooled = {GAIN: n[STUDIED], DRIFT: n[CONTROL]}  # the others pool both lists
    made, nets = [], []
    for which in (means, boots):
        s, c = which[STUDIED], which[CONTROL]
        gain, drift = s - s[:, :1], c - c[:, :1]  # time 0 is before study
        nets.append({MINUS_CONTROL: s - c, GAIN: gain, DRIFT: drift, NET: gain - drift})
    for name in nets[0]:
        lo, hi = _interval(nets[1][name])
        value = nets[0][name][0]
        # before study the changes are 0 by definition: nothing was measured, so no row
        first = 0 if name == MINUS_CONTROL else 1
        made.append(
            _rows("difference", value, lo, hi, pooled.get(name, sum(n.values())), name, place).iloc[
                first:
            ]
        )
    start = nets[0][NET][0, 1]
    lo, hi = _interval(nets[1][NET][:, 1:2])
    told = bool(lo[0] > 0 or hi[0] < 0)
    share = nets[0][NET][0, 1:] / start if told else np.full(len(nets[0][NET][0]) - 1, np.nan)
    if told:
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = _interval(nets[1][NET][:, 1:] / nets[1][NET][:, 1:2])
    else:
        low = high = share
    share, low, high = (np.insert(each, 0, np.nan) for each in (share, low, high))
    kept = _rows("retention", share, low, high, sum(n.values()), NET, place).iloc[1:]
    return [*made, kept.assign(reason="" if told else "the first gain is not told from 0")]


def _apart(table, foil, times, weights, draws, seed) -> list[pd.DataFrame]:
    """Unpaired AUC and d' of items and their foils of one kind, by group."""
    made = []
    losses = table[table["metric"] == "loss"]
    theirs = losses[losses["foil"] == foil]
    own = losses[(losses["foil"] == ITSELF) & losses["item"].isin(theirs["item"])]
    for group in (STUDIED, CONTROL):
        items, foils = _panel(own, group, times), _panel(theirs, group, times)
        n = len(items)
        weight = _resample(weights, group, n, draws, seed)
        measured = {
            "recognition_auc": (auc, _auc_draws(weight, items, foils)),
            "d_prime": (d_prime, _d_prime_draws(weight, items, foils)),
        }
        for metric, (statistic, boots) in measured.items():
            value = [statistic(items[:, t], foils[:, t]) for t in range(len(times))]
            lo, hi = _interval(boots)
            made.append(_rows(metric, value, lo, hi, n, group, {"foil": foil, "of": ""}))
    return made


def _auc_draws(weight, items, foils) -> Float[np.ndarray, "draw time"]:
    draws = []
    for item, foil in zip(items.T, foils.T, strict=True):
        below = (item[:, None] < foil) + 0.5 * (item[:, None] == foil)
        draws.append(((weight @ below) * weight).sum(axis=1))
    return np.stack(draws, axis=1)


def _d_prime_draws(weight, items, foils) -> Float[np.ndarray, "draw time"]:
    n = len(items)
    mean_i, mean_f = weight @ items, weight @ foils
    var = (weight @ items**2 - mean_i**2 + weight @ foils**2 - mean_f**2) * n / max(n - 1, 1) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(var > 1e-12, (mean_f - mean_i) / np.sqrt(np.maximum(var, 0)), np.nan)


def _rows(metric, value, lo, hi, n, group, place) -> pd.DataFrame:
    value, lo, hi = (np.asarray(each, dtype=float) for each in (value, lo, hi))
    beside = {**place, "at": np.arange(len(value)), "reason": ""}
    return rows(metric, value, run="", group=group, lo=lo, hi=hi, n=n, beside=beside)


def _refuse(table: pd.DataFrame, draws: int) -> None:
    lacking = [name for name in ("phase", "lag", "foil") if name not in table.columns]
    if lacking:
        raise InputError(
            f"retention_curve: no column {lacking[0]!r}; study_and_retain gives such a table"
        )
    if draws < 2:
        raise InputError(f"retention_curve: {draws} draws, an interval needs at least 2")
    for group in (STUDIED, CONTROL):
        for phase in ("before", "after"):
            if not ((table["group"] == group) & (table["phase"] == phase)).any():
                raise InputError(
                    f"retention_curve: no rows of group {group!r} in phase {phase!r}; drift needs "
                    "controls, and a gain needs the measurement before study"
                )
    after = table[table["phase"] == "after"]
    for group in (STUDIED, CONTROL):
        absent = set(after["lag"]) - set(after.loc[after["group"] == group, "lag"])
        if absent:
            raise InputError(
                f"retention_curve: no rows of group {group!r} at lag {min(absent):g}; drift needs "
                "controls at every lag"
            )
