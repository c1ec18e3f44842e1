"""Streams of tasks: what a model keeps of each while it learns the next.

``R[t, i]`` is the score on task i after training task t. Every published summary of it is computed
under its own key, since one matrix gives three values called forgetting in three toolkits. Losses
turn round in one place, :func:`turn`; from there on, higher is better.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from workbench.stats.summarise import GEOMETRIC, wilson_interval
from workbench.table import METRICS, InputError, one_metric, rows, validate

LEVEL = 0.95
MATRIX = (
    "acc",
    "average_incremental_accuracy",
    "bwt",
    "bwt_gem_code",
    "fwt",
    "forgetting",
    "forgetting_mammoth",
    "forgetting_avalanche",
    "intransigence",
    "lca",
)
IN_UNIT = ("acc", "average_incremental_accuracy", "lca", "min_acc", "wc_acc")  # levels, as R
# what each says of the tasks left behind: +1 where above zero means better, -1 where worse
BACKWARD = {
    "bwt": 1,
    "bwt_gem_code": 1,
    "forgetting": -1,
    "forgetting_mammoth": -1,
    "forgetting_avalanche": -1,
}
HIGHER, LOWER = "higher is better", "lower is better"
DIRECTION = {
    **dict.fromkeys(("bwt", "bwt_gem_code", "fwt", "wp", "accumulation", "savings"), HIGHER),
    **dict.fromkeys(
        ("forgetting", "forgetting_mammoth", "forgetting_avalanche", "intransigence", "wf"), LOWER
    ),
    **dict.fromkeys(("forgotten_between", "plasticity_loss", "plasticity_trend"), LOWER),
}
SAME = 1e-9  # differences below are rounding, and have no sign
NO_INTERVAL = "one matrix of pooled scores: no interval"
ONE_ITEM = "a task of one item: no interval"
CRITERION = 0.9  # share of what the first presentation gained that counts as learned


# --- the accuracy matrix -------------------------------------------------------------------------


def accuracy_matrix(
    R,
    *,
    initial=None,
    joint=None,
    curves=None,
    better: str | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """All usual summaries of one accuracy matrix, side by side, with those marked that disagree.

    With T tasks, b the scores before any training and a* those of joint training (losses with
    their sign turned): ``acc`` mean of the last row; ``average_incremental_accuracy`` mean over t
    of the mean over i <= t; ``bwt`` mean over i < T of R[T,i] - R[i,i] (Lopez-Paz & Ranzato 2017;
    their code divides by T: ``bwt_gem_code``); ``fwt`` mean over i > 1 of R[i-1,i] - b_i;
    ``forgetting`` mean over j < T of max over l < T of R[l,j], less R[T,j] (Chaudhry et al. 2018a);
    ``forgetting_mammoth`` with the max over all rows, so never below 0; ``forgetting_avalanche``
    R[j,j] - R[T,j]; ``intransigence`` mean of a*_k - R[k,k]; ``lca`` mean over tasks and over
    b = 0, 1, ... of the score after b updates (Chaudhry et al. 2018b).

    Args:
        R: T x T array or frame (columns name the tasks), a stack of them by run, or the table of
            a stream of tasks (:func:`workbench.streams.train_stream`), of one metric, whose own
            rows give ``initial``, ``joint`` and ``curves``. Cells above the diagonal may be
            missing: they are left out of the maxima, and ``fwt`` is then NaN.
        initial: Score of each task as the stream begins; [task], or [run, task].
        joint: Score of each task when all are trained on together.
        curves: ``[task, b]``: score of each task after b = 0, 1, 2, ... updates of its own.
        better: "high" (the default) for shares in 0 to 1, "low" for losses and perplexities. Not
            for a table, whose metric knows.
        draws, seed: Of the bootstrap over items.

    Returns:
        One row a summary. ``better`` says which way is good: levels stay in the unit of R, so for
        losses "lower is better"; differences are turned so that a positive ``bwt`` is always a
        gain and a positive forgetting a loss: 0 where nothing moved. ``disagrees`` names the
        summaries whose point value says the opposite of the tasks left behind. Undefined is NaN
        with a ``reason``. Intervals (95 %): for several runs Student's t over runs, n runs; for a
        table of one run percentiles over items drawn with replacement within each task, the same
        items in every row, n items; else none, n tasks. Further rows of the metric itself (of
        "outcome" for an array) are the cells: ``presentation`` t (0: ``initial``; T + 1:
        ``joint``), ``current`` and ``task``, and ``change`` since the task was learned.

    Raises:
        InputError: Not T x T, a missing or impossible score, names that do not fit, a table with
            recurring tasks or without the needed rows.
    """
    if isinstance(R, pd.DataFrame) and {"metric", "value"} <= set(R.columns):
        if any(each is not None for each in (initial, joint, curves, better)):
            raise InputError(
                "accuracy_matrix: the table of a stream brings initial, joint, curves and better "
                "with it; give the table alone"
            )
        scores = _of_table(R, draws, seed)
    else:
        scores = _of_array(R, initial, joint, curves, better)
    table = validate(pd.concat([_summaries(scores), _cells(scores)], ignore_index=True))
    table.attrs["interval"] = _interval_of(scores)
    return table


@dataclass(frozen=True)
class _Scores:
    """Everything a matrix is summarised from; NaN where it was not given.

    The arrays lead with ``run``, those of ``boot`` with ``draw``.
    """

    names: list[str]
    parts: tuple  # R [run, t, i], initial [run, i], joint [run, i], curves [run, i, b]
    boot: tuple | None
    better: str
    of: str
    run: str
    items: dict  # task to items, empty for an array
    step: int = 0
    bounds: Sequence | None = None  # (lo, hi) of R, of initial and of joint


def turn(better: str) -> float:
    """What a score is multiplied by so that higher is better: -1 for losses, else 1."""
    return -1.0 if better == "low" else 1.0


def matrix_measures(
    R: Float[np.ndarray, "*lead t i"],
    initial: Float[np.ndarray, "*lead i"],
    joint: Float[np.ndarray, "*lead i"],
    curves: Float[np.ndarray, "*lead i b"],
    *,
    better: str,
) -> dict[str, Float[np.ndarray, " *lead"]]:
    """The summaries of :func:`accuracy_matrix`, over leading axes (runs, draws); no checks.

    R = [[.6,.1,.2],[.9,.8,.1],[.95,.5,.85]] gives bwt .025 and forgetting .125.
    """
    score, start, best = (turn(better) * each for each in (R, initial, joint))
    tasks = R.shape[-1]
    own, final = np.diagonal(score, axis1=-2, axis2=-1), score[..., -1, :]
    seen = np.tril(np.ones((tasks, tasks), dtype=bool))
    upto = np.where(seen, R, 0.0).sum(axis=-1) / np.arange(1, tasks + 1)
    nothing = np.full(R.shape[:-2], np.nan)
    found = {
        "acc": R[..., -1, :].mean(axis=-1),
        "average_incremental_accuracy": upto.mean(axis=-1),
        **dict.fromkeys([*BACKWARD, "fwt"], nothing),
        "intransigence": (best - own).mean(axis=-1),
        "lca": curves.mean(axis=(-2, -1)) if curves.shape[-1] else nothing,
    }
    if tasks > 1:
        old = slice(None, -1)
        left = final[..., old] - own[..., old]
        before = np.diagonal(score, offset=1, axis1=-2, axis2=-1)
        peak = {
            "forgetting": np.fmax.reduce(score[..., :-1, old], axis=-2),
            "forgetting_mammoth": np.fmax.reduce(score[..., old], axis=-2),
            "forgetting_avalanche": own[..., old],
        }
        found |= {
            "bwt": left.mean(axis=-1),
            "bwt_gem_code": left.sum(axis=-1) / tasks,
            "fwt": (before - start[..., 1:]).mean(axis=-1),
            **{key: (top - final[..., old]).mean(axis=-1) for key, top in peak.items()},
        }
    return {key: found[key] for key in MATRIX}


def _summaries(scores: _Scores) -> pd.DataFrame:
    runs = matrix_measures(*scores.parts, better=scores.better)
    count, tasks = len(next(iter(runs.values()))), len(scores.names)
    value = {key: found.mean() for key, found in runs.items()}
    if count > 1:
        (lo, hi), n = _over_runs(np.array(list(runs.values()))), count
    elif scores.boot is not None:
        boots = matrix_measures(*scores.boot, better=scores.better)
        lo, hi = _percentiles(np.array(list(boots.values())), axis=1)
        n = sum(scores.items.values())
    else:
        lo, hi, n = np.full(len(value), np.nan), np.full(len(value), np.nan), tasks
    reasons = _reasons(scores)
    table = rows(
        "acc", list(value.values()), run=scores.run, step=scores.step, lo=lo, hi=hi, n=n,
        beside={
            "of": scores.of,
            "task": "all",
            "current": scores.names[-1],
            "presentation": tasks,
            "better": [_direction(key, scores.better) for key in value],
            "disagrees": [_against(key, value) for key in value],
            "reason": [
                reasons.get(key, "") if np.isnan(v) else _no_interval(scores) if np.isnan(low) else ""
                for (key, v), low in zip(value.items(), lo, strict=True)
            ],
        },
    )  # fmt: skip
    return table.assign(metric=list(value))


def _interval_of(scores: _Scores) -> str:
    if len(scores.parts[0]) > 1:
        return "Student's t over runs"
    return "percentiles over items drawn within tasks" if scores.boot is not None else "none"


def _no_interval(scores: _Scores) -> str:
    return ONE_ITEM if scores.boot is not None else NO_INTERVAL


def _direction(key: str, better: str) -> str:
    if key in IN_UNIT:
        return LOWER if better == "low" else HIGHER
    return DIRECTION[key]


def _against(key: str, value: dict[str, float]) -> str:
    """Which of the others say the opposite of the tasks left behind; 0 contradicts nobody."""
    if key not in BACKWARD:
        return ""
    said = {k: np.sign(sign * value[k]) * (abs(value[k]) > SAME) for k, sign in BACKWARD.items()}
    return ", ".join(other for other in BACKWARD if said[other] * said[key] < 0)


def _reasons(scores: _Scores) -> dict[str, str]:
    R, initial, joint, curves = scores.parts
    found = {}
    if np.isnan(np.diagonal(R, offset=1, axis1=-2, axis2=-1)).any():
        found["fwt"] = "the cells above the diagonal are missing"
    if np.isnan(initial[..., 1:]).any():
        found["fwt"] = "no `initial`: the score of each task as the stream begins"
    if np.isnan(joint).any():
        found["intransigence"] = "no `joint`: the score of each task when all are trained together"
    if not curves.shape[-1]:
        found["lca"] = "no `curves`: the score of each task after 0, 1, 2, ... updates of its own"
    if len(scores.names) == 1:
        found |= dict.fromkeys([*BACKWARD, "fwt"], "one task: nothing came before or after it")
    return found


def _cells(scores: _Scores) -> pd.DataFrame:
    """The matrix itself, with the rows before and beside it, for the eye."""
    names, sign = scores.names, turn(scores.better)
    R, initial, joint, _ = (part.mean(axis=0) for part in scores.parts)
    own = np.diagonal(R)
    grid = np.vstack([initial, R, joint])
    if scores.bounds is None:
        lo = hi = np.full(grid.shape, np.nan)
    else:
        after, before, beside = scores.bounds
        lo, hi = (np.vstack([before[k], after[k], beside[k]]) for k in (0, 1))
    at, task = np.indices(grid.shape).reshape(2, -1)
    current = ["", *names, "jointly"]
    count = len(scores.parts[0])
    n = [scores.items.get(name, count) if count == 1 else count for name in names]
    metric = scores.of if scores.of in METRICS else "outcome"
    table = rows(
        metric, grid.ravel(), run=scores.run, step=scores.step, lo=lo.ravel(), hi=hi.ravel(),
        n=np.array(n)[task],
        beside={
            "of": scores.of,
            "task": np.array(names, dtype=object)[task],
            "current": np.array(current, dtype=object)[at],
            "presentation": at,
            "better": _direction("acc", scores.better),
            "disagrees": "",
            "reason": "",
            "change": (sign * (grid - own)).ravel(),
        },
    )  # fmt: skip
    return table[table["value"].notna()]


def _over_runs(values: Float[np.ndarray, "measure run"]) -> tuple[np.ndarray, np.ndarray]:
    n = values.shape[1]
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * values.std(axis=1, ddof=1) / np.sqrt(n)
    mean = values.mean(axis=1)
    return mean - half, mean + half


def _percentiles(boots: np.ndarray, *, axis: int) -> tuple[np.ndarray, np.ndarray]:
    # weights sum to 1 but for the last bit, which must not leave a metric's range
    lo, hi = np.quantile(boots, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=axis).round(12)
    return lo, hi


def _of_array(R, initial, joint, curves, better) -> _Scores:
    better = "high" if better is None else better
    if better not in ("high", "low"):
        raise InputError(f"accuracy_matrix: better is {better!r}; say high or low")
    names = _names(R)
    array = _numbers(R, "R")
    if array.ndim not in (2, 3) or array.shape[-1] != array.shape[-2] or not array.shape[-1]:
        shape = " x ".join(map(str, array.shape))
        raise InputError(
            f"accuracy_matrix: R is {shape}; it needs a row for each task trained and a column for "
            "each task, T x T, or runs x T x T"
        )
    array = array if array.ndim == 3 else array[None]
    tasks = array.shape[-1]
    names = names or [f"task {i + 1}" for i in range(tasks)]
    _refuse_scores(array, better, names)
    given = [
        _beside(each, name, array.shape, better)
        for each, name in ((initial, "initial"), (joint, "joint"))
    ]
    if curves is None:
        lines = np.empty((len(array), tasks, 0))
    else:
        lines = _numbers(curves, "curves")
        lines = lines if lines.ndim == 3 else lines[None]
        if lines.shape[-2:-1] != (tasks,) or len(lines) not in (1, len(array)):
            raise InputError(
                f"accuracy_matrix: curves is {' x '.join(map(str, np.shape(curves)))}; it needs a "
                f"row for each of {tasks} tasks, and a column for each update from 0"
            )
        _refuse_range(lines, "curves", better, allow_missing=False)
        lines = np.broadcast_to(lines, (len(array), *lines.shape[1:]))
    of = "share" if better == "high" else "loss or perplexity"
    return _Scores(names, (array, *given, lines), None, better, of, "matrix", {})


def _names(R) -> list[str]:
    """A frame's task names; its rows must not name the same tasks in another order."""
    if not isinstance(R, pd.DataFrame):
        return []
    names, after = list(map(str, R.columns)), list(map(str, R.index))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"accuracy_matrix: task {twice!r} has several columns; names are unique")
    if sorted(names) == sorted(after) and names != after:
        raise InputError(
            f"accuracy_matrix: the rows say {', '.join(after)}, the columns {', '.join(names)}; "
            "put both in the order of training"
        )
    return names


def _numbers(given, name: str) -> np.ndarray:
    try:
        return np.asarray(given, dtype=float)
    except (TypeError, ValueError):
        raise InputError(
            f"accuracy_matrix: {name} holds something that is no number, or rows of unlike "
            "length; give scores alone"
        ) from None


def _refuse_scores(R: np.ndarray, better: str, names: list[str]) -> None:
    lower = np.tril(np.ones(R.shape[-2:], dtype=bool))
    missing = ~np.isfinite(R) & lower
    if missing.any():
        _, t, i = np.argwhere(missing)[0]
        raise InputError(
            f"accuracy_matrix: no score of {names[i]!r} after training {names[t]!r}; every task "
            "must be scored after its own training and after all that follow"
        )
    _refuse_range(R, "R", better, allow_missing=True)


def _refuse_range(values: np.ndarray, name: str, better: str, *, allow_missing: bool) -> None:
    bad = values < 0 if better == "low" else (values < 0) | (values > 1)
    bad |= np.isinf(values) | (np.isnan(values) & (not allow_missing))
    if bad.any():
        first = values[bad].flat[0]
        hint = (
            "losses and perplexities are not negative; turn log-probabilities round"
            if better == "low"
            else 'give shares in 0 to 1 (95 % is .95), or say better="low" for losses'
        )
        raise InputError(f"accuracy_matrix: {name} holds {first:g}; {hint}")


def _beside(given, name: str, shape: tuple, better: str) -> np.ndarray:
    runs, tasks = shape[0], shape[-1]
    if given is None:
        return np.full((runs, tasks), np.nan)
    array = _numbers(given, name)
    if array.shape not in ((tasks,), (runs, tasks)):
        raise InputError(
            f"accuracy_matrix: {name} has the shape {array.shape}; it needs one score for each of "
            f"{tasks} tasks"
        )
    _refuse_range(array, name, better, allow_missing=False)
    return np.broadcast_to(array, (runs, tasks))


def load_matrix(source: str | os.PathLike) -> dict:
    """Read an accuracy matrix from CSV: a column a task, a row a training, in order.

    A first column of text names the rows; rows named ``initial`` and ``joint`` are taken out. Empty
    cells above the diagonal are allowed.

    Returns:
        ``R``, ``initial`` and ``joint``: what :func:`accuracy_matrix` takes.

    Raises:
        InputError: No such file, or nothing in it that is a matrix.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"load_matrix: no file at {source}; give a CSV with a column a task")
    try:
        frame = pd.read_csv(path)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"load_matrix: cannot read {path}: {reason}") from None
    if frame.empty:
        raise InputError(f"load_matrix: {path} holds no rows under its head line")
    if not pd.api.types.is_numeric_dtype(frame.iloc[:, 0]):
        frame = frame.set_index(frame.columns[0])
    words = frame.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]]
    if len(words):
        raise InputError(f"load_matrix: column {words[0]!r} of {path} holds words; give scores")
    beside = {
        name: frame.loc[name].to_numpy() if name in frame.index else None
        for name in ("initial", "joint")
    }
    return {"R": frame.drop(index=["initial", "joint"], errors="ignore"), **beside}


# --- from the table of a stream ------------------------------------------------------------------


def _of_table(table: pd.DataFrame, draws: int, seed: int) -> _Scores:
    table, metric = _one(table, "accuracy_matrix")
    order, ends = _order(table, "accuracy_matrix")
    _refuse_recurring(order, "accuracy_matrix")
    lags = _lags_of_all(table, order)
    runs = list(table["run"].unique())
    found = [_panels(table[table["run"] == run], order, lags, metric) for run in runs]
    parts = _assemble(
        [np.stack([p.mean(axis=0) for p in each]) for each in zip(*found, strict=True)], metric
    )
    if len(runs) > 1:
        bounds = [_over_runs(part.reshape(len(runs), -1).T) for part in parts[:3]]
        bounds = [
            np.reshape(b, (2, *part.shape[1:])) for b, part in zip(bounds, parts[:3], strict=True)
        ]
        boot, run, items = None, "all", {}
    else:
        drawn = [_weights(len(p), draws, seed, at) @ p for at, p in enumerate(found[0])]
        boot, run = _assemble(drawn, metric), str(runs[0])
        bounds = _spread(boot, parts, found[0], metric)
        items = {name: len(panel) for name, panel in zip(order, found[0], strict=True)}
    better = METRICS[metric].better
    return _Scores(order, parts, boot, better, metric, run, items, ends[-1], bounds)


def _one(table: pd.DataFrame, asker: str) -> tuple[pd.DataFrame, str]:
    """The table with its texts as plain text, and its metric."""
    table = validate(table)
    metric = one_metric(table, asker)
    key = str(table["metric"].iloc[0])
    lacking = [n for n in ("task", "presentation", "current", "phase") if n not in table.columns]
    if lacking:
        raise InputError(f"{asker}: no column {lacking[0]!r}; train_stream gives such a table")
    if metric.better not in ("high", "low"):
        raise InputError(f"{asker}: neither direction of {key} is better; choose another metric")
    if key in GEOMETRIC and asker != "accuracy_matrix":
        raise InputError(f"{asker}: the mean of perplexities is no perplexity; give rows of loss")
    if table["value"].isna().any():
        bad = table[table["value"].isna()].iloc[0]
        raise InputError(
            f"{asker}: the {key} of item {bad['item']} is missing at step {bad['step']}"
        )
    text = ("run", "item", "task", "current", "phase")
    return table.astype(dict.fromkeys(text, str)), key


def _order(table: pd.DataFrame, asker: str) -> tuple[list[str], list[int]]:
    """The task of each presentation, and the update at which it ended."""
    after = table[table["phase"] == "after"]
    ends = after.groupby("presentation")[["current", "step"]].first().sort_index()
    if ends.empty or list(ends.index) != list(range(1, len(ends) + 1)):
        raise InputError(
            f"{asker}: rows of phase 'after' are there for presentations "
            f"{', '.join(map(str, ends.index)) or 'none'}; all from 1 on are needed"
        )
    return ends["current"].astype(str).tolist(), ends["step"].tolist()


def _refuse_recurring(order: list[str], asker: str) -> None:
    if len(set(order)) < len(order):
        at = next(i for i, name in enumerate(order) if name in order[:i])
        raise InputError(
            f"{asker}: task {order[at]!r} comes again as presentation {at + 1}; select the rows "
            f"with presentation <= {at}, or ask knowledge_accumulation"
        )


def _lags_of_all(table: pd.DataFrame, order: list[str]) -> list[int]:
    """The lags 1, 2, ... up to the last before a gap at which every task was scored itself."""
    during = table[(table["phase"] == "during") & (table["task"] == table["current"])]
    have = [set(during.loc[during["task"] == name, "lag"]) for name in order]
    lag = 0
    while all(lag + 1 in each for each in have):
        lag += 1
    return list(range(1, lag + 1))


def _panels(part: pd.DataFrame, order: list[str], lags: list[int], metric: str) -> list[np.ndarray]:
    """For each task ``[item, place]``: initial, T rows of R, joint, then its own curve."""
    made = []
    for at, name in enumerate(order):
        mine = part[part["task"] == name]
        curve = mine[(mine["phase"] == "during") & (mine["current"] == name)]
        first = mine[(mine["phase"] == "before") | (mine["phase"] == "after")]
        # the curve's b = 0 is what the task scored just before its own training
        columns = [
            *(_items(first[first["presentation"] == t]) for t in range(len(order) + 1)),
            _items(mine[mine["phase"] == "joint"]),
            *([_items(first[first["presentation"] == at])] if lags else []),
            *(_items(curve[curve["lag"] == lag]) for lag in lags),
        ]
        panel = pd.concat(columns, axis=1).to_numpy()
        there = ~np.isnan(panel).all(axis=0)
        needed = np.zeros(panel.shape[1], dtype=bool)
        needed[at + 1 : len(order) + 1] = True
        if (needed & ~there).any() or np.isnan(panel[:, there]).any():
            raise InputError(
                f"accuracy_matrix: task {name!r} is not scored on the same items after its own "
                "training and after all that follow; train_stream does"
            )
        made.append(np.log(panel) if metric in GEOMETRIC else panel)
    return made


def _items(part: pd.DataFrame) -> pd.Series:
    if part["item"].duplicated().any():
        raise InputError(
            "accuracy_matrix: an item has several scores in a cell; select one of them"
        )
    return part.set_index(part["item"].astype(str))["value"].sort_index()


def _assemble(means: Sequence[np.ndarray], metric: str) -> tuple:
    """From ``[lead, place]`` of each task to R, initial, joint and curves over ``lead``."""
    tasks = len(means)
    whole = np.stack(means, axis=-1)  # [lead, place, task]
    whole = np.exp(whole) if metric in GEOMETRIC else whole
    R, initial, joint = whole[:, 1 : tasks + 1], whole[:, 0], whole[:, tasks + 1]
    return R, initial, joint, np.moveaxis(whole[:, tasks + 2 :], 1, 2)


def _weights(n: int, draws: int, seed: int, at: int) -> Float[np.ndarray, "draw item"]:
    if n == 1:
        return np.full((draws, 1), np.nan)  # one item says nothing of others
    rng = np.random.default_rng([seed, 11, at])
    return rng.multinomial(n, np.full(n, 1 / n), size=draws) / n


def _spread(boot, parts, panels, metric) -> list:
    """Lower and upper bounds of R, initial and joint: of verdicts Wilson's, which has a width at 0."""
    if all(_is_verdict(metric, panel) for panel in panels):
        n = np.array([len(panel) for panel in panels])
        return [wilson_interval(p[0], np.broadcast_to(n, p[0].shape), LEVEL) for p in parts[:3]]
    return [_percentiles(part, axis=0) for part in boot[:3]]


# --- the stability gap ---------------------------------------------------------------------------


def stability_gap(
    table: pd.DataFrame,
    *,
    windows: Sequence[int] = (2, 3, 5),
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How far old tasks fall right after a new one begins, before they come back.

    De Lange et al. (2023), "Continual evaluation for lifelong learning: identifying the stability
    gap". A drop that is over when the new task ends does not show in the accuracy matrix; it takes
    evaluation at every update or nearly so.

    Args:
        table: Of a stream of tasks that do not recur, of one metric, with rows of phase "during".
        windows: Lengths w of the windows, in evaluations, at least 2.
        draws, seed: Of the bootstrap and of the noise below.

    Returns:
        After each task k >= 2, ``min_acc``: mean over old tasks of the worst score since their
        own training ended; ``wc_acc``: score(k) / k + (1 - 1/k) min_acc; both in the metric's unit. For
        each window ``wf`` and ``wp``: the largest drop and gain inside any w consecutive
        evaluations of a task since its training began, floored at 0 and averaged over tasks;
        ``window`` in evaluations, ``window_updates`` the most updates such a window spans.
        Intervals are percentiles over items drawn within tasks. Extremes of noisy curves are too
        extreme: ``floor`` (``floor_lo`` to ``floor_hi``) is what as many items and evaluations give
        when each item's ups and downs are kept and its sign is drawn by chance, so that they have
        no direction in common; a value inside it is no evidence of a gap. Rows of the metric
        itself are the traces, with the binomial (Wilson) band where an item is right or wrong, and
        the normal one of the mean over items otherwise.

    Raises:
        InputError: No dense evaluation, recurring tasks, one task, or a window below 2.
    """
    table, metric = _one(table, "stability_gap")
    order, ends = _order(table, "stability_gap")
    _refuse_recurring(order, "stability_gap")
    _refuse_gap(table, order, windows)
    sign = turn(METRICS[metric].better)
    curves = [_curve(table, name, order, ends) for name in order]
    weights = [_weights(len(panel), draws, seed, at) for at, (panel, _) in enumerate(curves)]
    # row 0 is the measurement itself, the rest are draws
    lines = [
        (np.vstack([panel.mean(axis=0)[None], w @ panel]), steps)
        for (panel, steps), w in zip(curves, weights, strict=True)
    ]
    made = [_worst(lines, order, ends, k, sign) for k in range(2, len(order) + 1)]
    floors = _flat(curves, draws, seed)
    made += [_window(lines, floors, sign, w) for w in windows]
    measures = pd.concat(made, ignore_index=True)
    measures = measures.assign(
        of=metric,
        run=str(table["run"].iloc[0]),
        n=sum(len(panel) for panel, _ in curves),
        current=[order[k - 1] for k in measures["presentation"]],
        step=[ends[k - 1] for k in measures["presentation"]],
        better=[_direction(key, METRICS[metric].better) for key in measures["metric"]],
    )
    trace = pd.concat([_trace(table, name, metric) for name in order], ignore_index=True)
    trace = trace.assign(of=metric, better=_direction("acc", METRICS[metric].better))
    return validate(pd.concat([measures, trace], ignore_index=True))


def windowed_change(
    curve: Float[np.ndarray, "*lead evaluation"], window: int
) -> tuple[Float[np.ndarray, " *lead"], Float[np.ndarray, " *lead"]]:
    """Largest drop and largest gain inside any ``window`` consecutive evaluations, at least 0.

    Higher is better. .90, .60, .75, .85: drop .30 and gain .15 in windows of 2, gain .25 in 3.
    """
    drop = gain = np.zeros(curve.shape[:-1])
    for apart in range(1, min(window, curve.shape[-1])):
        change = curve[..., apart:] - curve[..., :-apart]
        drop = np.maximum(drop, -change.min(axis=-1))
        gain = np.maximum(gain, change.max(axis=-1))
    return drop, gain


def _refuse_gap(table: pd.DataFrame, order: list[str], windows: Sequence[int]) -> None:
    if len(order) < 2:
        raise InputError("stability_gap: one task; a gap needs an old task and a new one")
    for window in windows:
        if window < 2:
            raise InputError(
                f"stability_gap: a window of {window} evaluations holds no change; give 2 or more"
            )
    if not (table["phase"] == "during").any():
        raise InputError(
            "stability_gap: no rows of phase 'during'; train_stream(..., lags=(1, 2, 3, 5)) asks "
            "in between"
        )
    if table["run"].nunique() > 1:
        raise InputError("stability_gap: several runs; select one")


def _curve(table, name, order, ends) -> tuple[np.ndarray, np.ndarray]:
    """``[item, evaluation]`` of a task since its training began, and the updates of it."""
    at = order.index(name)
    began = ends[at - 1] if at else table.loc[table["phase"] == "before", "step"].min()
    mine = table[(table["task"] == name) & table["phase"].isin(["before", "during", "after"])]
    mine = mine[mine["step"] >= began]
    panel = mine.pivot(index="item", columns="step", values="value")
    if panel.isna().any(axis=None) or panel.empty:
        raise InputError(
            f"stability_gap: task {name!r} is not scored on the same items each time; "
            "train_stream does"
        )
    return panel.to_numpy(), panel.columns.to_numpy()


def _worst(lines, order, ends, k, sign) -> pd.DataFrame:
    lowest = [
        (sign * line[:, (steps > ends[i]) & (steps <= ends[k - 1])]).min(axis=1)
        for i, (line, steps) in enumerate(lines[: k - 1])
    ]
    worst = np.mean(lowest, axis=0) * sign
    current, steps = lines[k - 1]
    now = current[:, np.flatnonzero(steps == ends[k - 1])[0]]
    found = {"min_acc": worst, "wc_acc": now / k + (1 - 1 / k) * worst}
    made = []
    for key, values in found.items():
        lo, hi = _percentiles(values[1:], axis=0)
        made.append(rows(key, values[0], run="", lo=lo, hi=hi, beside={"presentation": k}))
    return pd.concat(made).assign(task="all")


def _window(lines, floors, sign, window) -> pd.DataFrame:
    changes = [np.array(windowed_change(sign * line, window)) for line, _ in lines]
    flat = [np.array(windowed_change(line, window)) for line in floors]
    reach = [(steps, min(window, len(steps)) - 1) for _, steps in lines]
    span = max(int((steps[apart:] - steps[: len(steps) - apart]).max()) for steps, apart in reach)
    made = []
    for key, values, noise in zip(
        ("wf", "wp"), np.mean(changes, axis=0), np.mean(flat, axis=0), strict=True
    ):
        lo, hi = _percentiles(values[1:], axis=0)
        low, high = _percentiles(noise, axis=0)
        beside = {"floor": noise.mean(), "floor_lo": low, "floor_hi": high}
        beside |= {"window": window, "window_updates": span, "presentation": len(lines)}
        made.append(rows(key, values[0], run="", lo=lo, hi=hi, beside=beside))
    return pd.concat(made).assign(task="all")


def _flat(curves, draws, seed) -> list[np.ndarray]:
    """``[draw, evaluation]`` of each task: its items' ups and downs, each with a sign by chance."""
    rng = np.random.default_rng([seed, 12])
    made = []
    for panel, _ in curves:
        signs = rng.choice([-1.0, 1.0], size=(draws, len(panel)))
        made.append(signs @ (panel - panel.mean(axis=1, keepdims=True)) / len(panel))
    return made


def _is_verdict(metric: str, values: np.ndarray) -> bool:
    share = (METRICS[metric].low, METRICS[metric].high) == (0.0, 1.0)
    return share and bool(np.isin(values[~np.isnan(values)], (0.0, 1.0)).all())


def _trace(table: pd.DataFrame, name: str, metric: str) -> pd.DataFrame:
    mine = table[(table["task"] == name) & table["phase"].isin(["before", "during", "after"])]
    keys = ["step", "presentation", "current", "phase"]
    pooled = mine.groupby(keys, observed=True)["value"].agg(["mean", "count", "std"]).reset_index()
    n = pooled["count"].to_numpy()
    if _is_verdict(metric, mine["value"].to_numpy()):
        lo, hi = wilson_interval(pooled["mean"].to_numpy(), n, LEVEL)
    else:
        half = stats.norm.ppf((1 + LEVEL) / 2) * pooled["std"].to_numpy() / np.sqrt(n)
        lo, hi = pooled["mean"].to_numpy() - half, pooled["mean"].to_numpy() + half
    table = rows(
        metric, pooled["mean"], run=str(mine["run"].iloc[0]), step=pooled["step"], lo=lo, hi=hi, n=n,
        beside={name: pooled[name].to_numpy() for name in keys[1:]},
    )  # fmt: skip
    return table.assign(task=name)


# --- tasks that recur ----------------------------------------------------------------------------


def knowledge_accumulation(
    table: pd.DataFrame, *, criterion: float = CRITERION, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """What is left, and what is gained, when a task comes again.

    Lesort et al. (2023), "Challenging common assumptions about catastrophic forgetting and
    knowledge accumulation", ask of a stream whose tasks recur whether knowledge piles up although
    each task is forgotten in between. With E_j the score right after a task's j-th presentation
    and B_j the one just before it.

    Args:
        table: Of a stream of tasks in which some recur, of one metric and run.
        criterion: Share of E_1 - B_1 at which a task counts as learned, for ``savings``.
        draws, seed: Of the bootstrap over items.

    Returns:
        For each task and for their mean (``task`` "all"), by ``recurrence`` j >= 2, losses turned
        so that more is more: ``forgotten_between``, E_{j-1} - B_j; ``accumulation``, E_j - E_1 (0:
        nothing beyond the first time); ``savings``, 1 - u_j / u_1 with u_j the first update of the
        presentation at which an evaluation meets the criterion (Ebbinghaus 1885): 0 where it takes
        as long as the first time, 1 where nothing had to be learned again, as fine as the lags
        asked at. NaN with a ``reason`` where it was not met, or the first time taught nothing. Rows
        of the metric itself are B_j and E_j (``phase`` "before" and "after"). Intervals are
        percentiles over items drawn within tasks, n items.

    Raises:
        InputError: No task comes twice, several runs, or a criterion outside 0 to 1.
    """
    table, metric = _one(table, "knowledge_accumulation")
    order, ends = _order(table, "knowledge_accumulation")
    _one_run(table, "knowledge_accumulation")
    if not 0 < criterion <= 1:
        raise InputError(
            f"knowledge_accumulation: criterion is {criterion}, it must lie above 0, up to 1"
        )
    if len(set(order)) == len(order):
        raise InputError(
            "knowledge_accumulation: no task comes twice; train_stream takes the order, such as "
            "order=[*tasks, *tasks]"
        )
    sign = turn(METRICS[metric].better)
    made, pooled = [], {}
    for at, name in enumerate(dict.fromkeys(order)):
        lines, n = _presentations(table, name, order, ends, draws, [seed, at])
        for found in _recurrences(lines, sign, criterion):
            j, key, phase, values, reason = found
            if phase == "":
                pooled.setdefault((j, key), []).append((name, values, reason, n))
            made.append(_line(key or metric, values, n, name, j, phase, reason))
    for (j, key), parts in pooled.items():
        values = np.mean([values for _, values, _, _ in parts], axis=0)
        why = [f"{name}: {reason}" for name, _, reason, _ in parts if reason]
        reason = "; ".join(why)
        made.append(_line(key, values, sum(p[3] for p in parts), "all", j, "", reason))
    out = pd.concat(made, ignore_index=True)
    level = DIRECTION | {metric: _direction("acc", METRICS[metric].better)}
    return validate(
        out.assign(
            of=metric, run=str(table["run"].iloc[0]), step=ends[-1],
            better=[level[key] for key in out["metric"]],
        )
    )  # fmt: skip


def _one_run(table: pd.DataFrame, asker: str) -> None:
    if table["run"].nunique() > 1:
        raise InputError(f"{asker}: several runs; select one")


def _presentations(table, name, order, ends, draws, seed) -> tuple[list, int]:
    """Of each presentation of a task: its curve ``[1 + draw, evaluation]``, and the lags of it."""
    mine = table[(table["task"] == name) & table["phase"].isin(["before", "during", "after"])]
    panel = mine.pivot(index="item", columns="step", values="value")
    n = len(panel)
    weights = np.vstack([np.full((1, n), 1 / n), _weights(n, draws, *seed)])
    steps = panel.columns.to_numpy()
    values = weights @ panel.to_numpy()
    lines = []
    for at in (p for p, task in enumerate(order) if task == name):
        began = ends[at - 1] if at else table.loc[table["phase"] == "before", "step"].min()
        inside = (steps >= began) & (steps <= ends[at])
        lines.append((values[:, inside], steps[inside] - began))
    return lines, n


def _recurrences(lines, sign: float, criterion: float):
    """(j, measure, phase, values over draws, reason): levels have no measure, measures no phase."""
    (first, _), *_ = lines
    goal = first[:, 0] + criterion * (first[:, -1] - first[:, 0])
    taught = sign * (first[:, -1] - first[:, 0]) > 0
    took = [_updates_to(goal, line, lags, sign) for line, lags in lines]
    for j, (line, _) in enumerate(lines, 1):
        yield j, "", "before", line[:, 0], ""
        yield j, "", "after", line[:, -1], ""
        if j == 1:
            continue
        earlier = lines[j - 2][0][:, -1]
        yield j, "forgotten_between", "", sign * (earlier - line[:, 0]), ""
        yield j, "accumulation", "", sign * (line[:, -1] - first[:, -1]), ""
        with np.errstate(divide="ignore", invalid="ignore"):  # where nothing was taught
            saved = np.where(taught, 1 - took[j - 1] / took[0], np.nan)
        reason = "" if taught[0] else "the first presentation taught nothing"
        if taught[0] and np.isnan(saved[0]):
            reason = "not learned again within the presentation"
        yield j, "savings", "", saved, reason


def _updates_to(goal, line, lags, sign) -> Float[np.ndarray, " draw"]:
    met = sign * line >= sign * goal[:, None] - SAME
    return np.where(met.any(axis=1), lags[met.argmax(axis=1)], np.nan)


def _line(key, values, n, name, j, phase, reason) -> pd.DataFrame:
    lo, hi = _percentiles(values[1:], axis=0)  # NaN where a draw has no value
    beside = {"task": name, "recurrence": j, "phase": phase, "reason": reason}
    if np.isnan(lo) and not reason:
        beside["reason"] = "undefined in some draws: no interval"
    return rows(key, values[0] + 0.0, run="", lo=lo, hi=hi, n=n, beside=beside)  # no -0


# --- loss of plasticity --------------------------------------------------------------------------


def plasticity(table: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How well a new task is learned after t - 1 others, beside a copy that learns it first.

    Loss of plasticity (Lyle et al. 2023; Dohare et al. 2024): a network that has learned many tasks
    learns the next one worse. Tasks differ in difficulty, so each is compared with itself: the same
    updates from the model as the stream began.

    Args:
        table: Of a stream with rows of phase "alone" (``train_stream(..., alone=True)``), of one
            metric and run; only first presentations count.
        draws, seed: Of the bootstrap.

    Returns:
        By ``presentation`` t, with ``task``: ``plasticity_loss``, score learned alone less score
        learned in the stream (losses turned): 0 for the first task, above 0 where the stream has
        made learning harder, below 0 where earlier tasks help. ``plasticity_trend``: its
        least-squares slope over t; NaN with a ``reason`` under three tasks. Rows of the metric
        itself are the two scores (``phase`` "after" in the stream, "alone"). Intervals are
        percentiles over items, drawn within tasks and paired; they do not speak for other tasks
        or another order.

    Raises:
        InputError: No rows of phase "alone", several runs, or items that do not match.
    """
    table, metric = _one(table, "plasticity")
    order, _ = _order(table, "plasticity")
    _one_run(table, "plasticity")
    sign = turn(METRICS[metric].better)
    made, losses, count = [], [], 0
    places = [at for at, name in enumerate(order, 1) if order.index(name) == at - 1]
    for at in places:
        name = order[at - 1]
        mine = table[(table["task"] == name) & (table["presentation"] == at)]
        mine = mine[mine["phase"].isin(["after", "alone"])]
        pair = mine.pivot(index="item", columns="phase", values="value")
        if set(pair.columns) != {"after", "alone"} or pair.isna().any(axis=None):
            raise InputError(
                f"plasticity: task {name!r} was not learned alone on the same items; "
                "train_stream(..., alone=True) does that"
            )
        n, count = len(pair), count + len(pair)
        weights = np.vstack([np.full((1, n), 1 / n), _weights(n, draws, seed, at)])
        scores = {phase: weights @ pair[phase].to_numpy() for phase in ("after", "alone")}
        losses.append(sign * (scores["alone"] - scores["after"]) + 0.0)  # no -0
        for key, phase, values in (
            (metric, "after", scores["after"]),
            (metric, "alone", scores["alone"]),
            ("plasticity_loss", "", losses[-1]),
        ):
            lo, hi = _percentiles(values[1:], axis=0)
            beside = {"task": name, "presentation": at, "phase": phase, "reason": ""}
            made.append(rows(key, values[0], run="", lo=lo, hi=hi, n=n, beside=beside))
    made.append(_trend(places, losses, count))
    out = pd.concat(made, ignore_index=True)
    level = DIRECTION | {metric: _direction("acc", METRICS[metric].better)}
    return validate(
        out.assign(
            of=metric, run=str(table["run"].iloc[0]), step=int(table["step"].max()),
            better=[level[key] for key in out["metric"]],
        )
    )  # fmt: skip


def _trend(places, losses, count) -> pd.DataFrame:
    beside = {"task": "all", "presentation": places[-1], "phase": ""}
    if len(places) < 3:
        beside["reason"] = "fewer than three tasks: no trend"
        return rows("plasticity_trend", np.nan, run="", n=count, beside=beside)
    away = np.array(places) - np.mean(places)
    slope = away @ np.array(losses) / (away**2).sum()
    lo, hi = _percentiles(slope[1:], axis=0)
    beside["reason"] = ""
    return rows("plasticity_trend", slope[0], run="", lo=lo, hi=hi, n=count, beside=beside)
