"""Learn one task after another, and ask after each, and on the way, what is left of the others.

A task is a list of texts, part of it trained on, part held out and asked about. The caller's model
is never touched: a copy of it goes through the stream, and only measurements are kept.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int

from workbench.items import (
    check_items,
    items_hash,
    load_items,
    make_biographies,
    make_canaries,
    python_documentation,
)
from workbench.models import LanguageModel
from workbench.overlap import drop_shared, shared_words
from workbench.suite import Suite
from workbench.sweep import Question, sweep
from workbench.table import InputError, validate
from workbench.training import TextStream, Trainer, train

TRAINED, HELD_OUT = "seen", "unseen"  # groups of a tasks frame
LAGS = (1, 2, 3, 5, 8, 12, 20)  # updates after each boundary
UPDATES = 24  # of each task, by default
ROWS, CONTEXT = 4, 128  # texts' tokens in an update
TOKENS = 48  # of each held-out text that are scored
WORDS = 8  # a held-out text that shares half of its runs of so many words was trained on
SHARED = 0.5
SUITE_TEXTS = 400  # of each of the suite's tasks: more than the default updates get through


@dataclass(frozen=True)
class Stream:
    """What :func:`train_stream` saw.

    Attributes:
        table: Every measurement; see there.
        losses: Training loss in nats per token: ``update, task, part, loss``.
    """

    table: pd.DataFrame
    losses: pd.DataFrame


def stream_tasks(
    suite: Suite | None = None, source: str | Path = "", *, held_out: int = 48, seed: int = 0
) -> pd.DataFrame:
    """Tasks as an items frame with the column ``task``, split, and with the split audited.

    Args:
        suite: Without a file, four tasks unlike each other: biographies made from a template,
            Python's documentation, the King James version of verses that the suite's model never
            trained on in any wording, and random words of its tokenizer.
        source: A file that ``load_items`` reads, with a column ``task``; its order is that of the
            stream. Where a task has no held-out texts (``group`` unseen), some are drawn.
        held_out: Texts of each task asked about and not trained on.
        seed: Of the draw.

    Returns:
        ``item, text, group, task``; ``group`` is ``seen`` (trained on) or ``unseen``. Held-out
        texts that stand in the training text of any task, or share half of their runs of eight
        words with it, are dropped with a warning and counted in ``.attrs["dropped"]``.

    Raises:
        InputError: Neither suite nor file, no column ``task``, or a task too small to split.
    """
    if source:
        items = load_items(source)
        if "task" not in items.columns:
            raise InputError(
                f"stream_tasks: {source} has no column 'task'; it has {', '.join(items)}"
            )
        blank = items["task"].isna()
        if blank.any():
            raise InputError(
                f"stream_tasks: item {items['item'][blank].iloc[0]!r} of {source} has no task"
            )
        items = items.assign(task=items["task"].astype(str))
    elif suite is not None:
        items = _suite_tasks(suite, seed)
    else:
        raise InputError("stream_tasks: give a file of texts with a column `task`, or a suite")
    parts = [
        _split(part, str(name), held_out, seed) for name, part in items.groupby("task", sort=False)
    ]
    return audit_tasks(pd.concat(parts, ignore_index=True)[["item", "text", "group", "task"]])


def _suite_tasks(suite: Suite, seed: int) -> pd.DataFrame:
    lists = {
        "biographies": make_biographies(SUITE_TEXTS, seed=seed + 1000),
        "Python documentation": python_documentation(SUITE_TEXTS),
        "random words": make_canaries(
            suite.tokenizer, SUITE_TEXTS, length=TOKENS, seed=seed + 1000
        ),
    }
    held = suite.held_out()
    if "paraphrase" in held.columns:
        lists["King James verses"] = held["paraphrase"].tolist()[:SUITE_TEXTS]
    made = [
        pd.DataFrame({"item": [f"{name} {i:03d}" for i in range(len(texts))], "text": texts})
        .assign(group=TRAINED, task=name)
        for name, texts in lists.items()
    ]  # fmt: skip
    return pd.concat(made, ignore_index=True)


def _split(part: pd.DataFrame, name: str, held_out: int, seed: int) -> pd.DataFrame:
    if (part["group"] == HELD_OUT).any():
        return part
    texts = part["text"].drop_duplicates()
    if len(texts) < 2 * held_out:
        raise InputError(
            f"stream_tasks: task {name!r} has {len(texts)} texts, none marked as held out; "
            f"{held_out} are to be held out, which takes {2 * held_out}: give more, or hold out fewer"
        )
    away = texts.sample(held_out, random_state=seed)
    return part.assign(group=np.where(part["text"].isin(away), HELD_OUT, TRAINED))


def audit_tasks(tasks: pd.DataFrame) -> pd.DataFrame:
    """The same tasks without held-out texts that any task trains on, exactly or nearly.

    Raises:
        InputError: No column ``task``, a group that is neither, a task left without either.
    """
    tasks = check_items(tasks)
    _refuse_no_task(tasks, "audit_tasks")
    odd = ~tasks["group"].isin([TRAINED, HELD_OUT])
    if odd.any():
        raise InputError(
            f"audit_tasks: group {tasks['group'][odd].iloc[0]!r} of item "
            f"{tasks['item'][odd].iloc[0]!r}; groups are {TRAINED} (trained on) and {HELD_OUT} "
            "(asked about)"
        )
    asked = tasks[tasks["group"] == HELD_OUT]
    trained = tasks[tasks["group"] == TRAINED]
    if asked.empty or trained.empty:
        lacking = HELD_OUT if asked.empty else TRAINED
        raise InputError(f"audit_tasks: no text in group {lacking!r}")
    shared = shared_words(asked, trained["text"], words=WORDS)
    kept = drop_shared(tasks, shared, controls=(HELD_OUT,), limit=SHARED)
    for name in tasks["task"].unique():
        for group in (TRAINED, HELD_OUT):
            if not ((kept["task"] == name) & (kept["group"] == group)).any():
                raise InputError(
                    f"audit_tasks: task {name!r} has no text in group {group!r} that no task "
                    "trains on; give it others"
                    if group == HELD_OUT
                    else f"audit_tasks: task {name!r} has no text in group {group!r}; give it some"
                )
    return kept


def train_stream(
    model: LanguageModel,
    tasks: pd.DataFrame,
    *,
    learning_rate: float,
    updates: int = UPDATES,
    order: Sequence[str] = (),
    lags: Sequence[int] = LAGS,
    rows: int = ROWS,
    tokens: int = TOKENS,
    replay: float = 0.0,
    joint: bool = False,
    alone: bool = False,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Stream:
    """Train a copy on one task after another; ask all after each, and those met after each lag.

    Each presentation has a fresh AdamW, as one fine-tuning after another has, and the same batches
    whenever its task comes again.

    Args:
        model: Any causal model; a float32 copy of it is trained.
        tasks: As :func:`stream_tasks` or :func:`audit_tasks` give them.
        learning_rate: Constant.
        updates: Of each presentation.
        order: Tasks as they come, by name; they may come again. Empty: each once, in the order of
            the frame. All of ``tasks`` are asked about.
        lags: Updates after each boundary at which the tasks met so far, the current one too, are
            asked about; 1, 2, 3, ... without a gap also give the learning-curve area.
        rows: Rows of an update, each as wide as the context but at most 128 tokens.
        tokens: Held-out texts are cut here.
        replay: Share of the rows of an update that earlier tasks give, in turn.
        joint: Also train a copy on all tasks at once, in turn by row, for as many updates as the
            stream's first presentations take together.
        alone: Also train a copy from the start on each task alone, with the very same batches
            (and without replay).
        seed: Of the batches and dropout.
        progress: Called with (update, loss) after each update of any of the copies.

    Returns:
        Its table has, for each held-out text and asking, ``loss`` (nats per token) and ``top1``
        (share of tokens), the first token not scored. Coordinates: ``task`` of the text;
        ``presentation`` under way or just ended, from 1, and its task, ``current``; ``lag``,
        updates since it began; ``phase``: "before" any (presentation 0), "during", "after", "joint"
        (presentation 0) and "alone". ``step`` counts the updates of the copy.

    Raises:
        InputError: Settings out of range, an unknown task in ``order``, too little text, or a loss
            that is not finite (update and task are named).
    """
    tasks = check_items(tasks)
    _refuse_no_task(tasks, "train_stream")
    order = list(order) or list(dict.fromkeys(tasks["task"]))
    least = {"updates": (updates, 1), "rows": (rows, 1), "tokens": (tokens, 2)}
    _refuse(tasks, order, least, learning_rate=learning_rate, lags=lags, replay=replay)
    plan = _Plan(
        model, tasks, order, updates=updates, learning_rate=learning_rate, lags=lags, rows=rows,
        tokens=tokens, replay=replay, seed=seed,
    )  # fmt: skip
    losses: list[tuple[int, str, str, float]] = []  # update, task, part, loss
    note = _noting(losses, progress)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        parts = _stream(plan, note)
        if alone:
            parts += _alone(plan, note, parts)
        if joint:
            parts += _joint(plan, note)
    table = validate(pd.concat(parts, ignore_index=True))
    table.attrs["passport"] = {
        **model.passport(), "items": items_hash(tasks), "order": order, "updates": updates,
        "learning_rate": learning_rate, "rows": rows, "replay": replay, "seed": seed,
    }  # fmt: skip
    return Stream(table, pd.DataFrame(losses, columns=["update", "task", "part", "loss"]))


class _Plan:
    """What all copies share: batches, held-out tokens, settings."""

    def __init__(
        self, model, tasks, order, *, updates, learning_rate, lags, rows, tokens, replay, seed
    ):
        self.model, self.order, self.updates = model, order, updates
        self.learning_rate, self.seed = learning_rate, seed
        self.lags = [lag for lag in lags if lag < updates]
        self.replayed = round(replay * rows)
        self.batches = {
            name: _batches(model, tasks, name, rows=rows, seed=seed)
            for name in dict.fromkeys(order)
        }
        asked = tasks[tasks["group"] == HELD_OUT]
        limit = min(tokens, model.context)
        texts = [each[:limit] for each in model.encode(asked["text"].tolist())]
        long = np.array([len(each) > 1 for each in texts])
        self.items = asked[long].reset_index(drop=True)
        self.texts = [each for each in texts if len(each) > 1]
        if not long.all():
            warnings.warn(
                f"train_stream: dropped {(~long).sum()} held-out texts of a single token, which "
                f"leaves nothing to score (first: {asked['item'][~long].iloc[0]})",
                stacklevel=4,
            )
        for name in tasks["task"].unique():
            if not (self.items["task"] == name).any():
                raise InputError(f"train_stream: no held-out text of task {name!r} can be scored")

    def trainer(self, student: LanguageModel) -> Trainer:
        torch.manual_seed(self.seed)  # dropout; the same for a task in the stream and alone
        return Trainer(student.module, self.learning_rate)

    def ask(
        self, student, step, phase, *, presentation=0, current="", lag=0, only=None
    ) -> pd.DataFrame:
        """One row a held-out text and metric; ``only`` names the tasks asked about."""
        here = self.items["task"].isin(list(only or self.items["task"].unique()))
        at = np.flatnonzero(here)
        texts, items = [self.texts[i] for i in at], self.items.iloc[at].reset_index(drop=True)
        student.module.eval()
        table = sweep(
            replace(student, step=student.step + step), items, lambda *_: (texts, items), ASKED
        )
        task = items.set_index("item")["task"]
        return table.assign(
            task=table["item"].astype(str).map(task).to_numpy(), presentation=presentation,
            current=current, lag=lag, phase=phase,
        )  # fmt: skip


def _reduce(scores, tokens, index) -> dict:
    hits = scores.guess[:, : max(map(len, tokens)) - 1] == _padded(tokens)
    return {
        "loss": -np.nansum(scores.log_probability, axis=1) / scores.length,
        "top1": hits.sum(axis=1) / scores.length,
    }


def _padded(tokens) -> Int[np.ndarray, "item next"]:
    wide = np.full((len(tokens), max(map(len, tokens)) - 1), -2)  # no guess is -2
    for row, each in enumerate(tokens):
        wide[row, : len(each) - 1] = each[1:]
    return wide


ASKED = Question(
    asker="train_stream",
    start=1,
    keep=("log_probability", "guess"),
    settings={},
    reduce=_reduce,
    cached=False,
)


def _noting(losses: list, progress):
    """Makes, for a part of the training, what notes each update's loss and passes it on."""

    def of(part: str, task: str, *, start: int = 0):
        def note(update: int, loss: float) -> None:
            losses.append((start + update, task, part, loss))
            if progress:
                progress(start + update, loss)

        return note

    return of


def _batches(model, tasks, name, *, rows, seed) -> TextStream:
    texts = tasks.loc[(tasks["task"] == name) & (tasks["group"] == TRAINED), "text"]
    encoded = model.encode(["\n".join(texts)])[0]
    context = min(CONTEXT, model.context)
    if len(encoded) < rows * context:
        raise InputError(
            f"train_stream: task {name!r} has {len(encoded)} tokens to train on, an update takes "
            f"{rows} x {context}; give more text, or fewer rows"
        )
    return TextStream(encoded, rows, context, seed)


def _stream(plan: _Plan, note: Callable) -> list[pd.DataFrame]:
    student = plan.model.copy()
    parts = [plan.ask(student, 0, "before")]
    for at, name in enumerate(plan.order):
        start, met = at * plan.updates, plan.order[: at + 1]
        place = {"presentation": at + 1, "current": name}
        _present(
            plan, student,
            batch=_mixed(plan, name, plan.order[:at]),
            note=note("stream", name, start=start),
            told=f"of task {name!r} (presentation {at + 1})",
            at_lag=lambda lag: parts.append(
                plan.ask(student, start + lag, "during", lag=lag, only=met, **place)  # noqa: B023
            ),
        )  # fmt: skip
        end = start + plan.updates
        parts.append(plan.ask(student, end, "after", lag=plan.updates, **place))
    return parts


def _present(plan, student, *, batch, note, told, at_lag=None, updates=None) -> None:
    with _named(told, plan.learning_rate):
        train(
            plan.trainer(student),
            batch,
            until=updates or plan.updates,
            stops=plan.lags if at_lag else (),
            at_stop=at_lag,
            progress=note,
        )


def _mixed(plan: _Plan, name: str, earlier: Sequence[str]):
    """The task's own batches, with rows of earlier tasks in turn where there is replay."""
    old = [other for other in dict.fromkeys(earlier) if other != name]
    if not plan.replayed or not old:
        return plan.batches[name].batch

    def batch(update: int) -> np.ndarray:
        mixed = plan.batches[name].batch(update)
        for row in range(plan.replayed):
            place = (update - 1) * plan.replayed + row
            other = plan.batches[old[place % len(old)]]
            mixed[row] = other.batch(1 + place // len(old))[row]
        return mixed

    return batch


def _alone(plan: _Plan, note: Callable, stream: list[pd.DataFrame]) -> list[pd.DataFrame]:
    """Each task from the start; the first of the stream was alone already."""
    first = next(part for part in stream if (part["phase"] == "after").all())
    parts = [first[first["task"] == plan.order[0]].assign(phase="alone")]
    for name in dict.fromkeys(plan.order[1:]):
        if name == plan.order[0]:
            continue
        student = plan.model.copy()
        _present(
            plan, student,
            batch=plan.batches[name].batch,
            note=note("alone", name),
            told=f"of task {name!r} alone",
        )  # fmt: skip
        place = {"presentation": plan.order.index(name) + 1, "current": name, "only": [name]}
        parts.append(plan.ask(student, plan.updates, "alone", lag=plan.updates, **place))
    return parts


def _joint(plan: _Plan, note: Callable) -> list[pd.DataFrame]:
    """All tasks at once: row r of update u is the next row of task (u rows + r) modulo tasks."""
    names, rows = list(plan.batches), next(iter(plan.batches.values())).rows

    def batch(update: int) -> np.ndarray:
        made = []
        for row in range(rows):
            turn, which = divmod((update - 1) * rows + row, len(names))
            there, at = divmod(turn, rows)
            made.append(plan.batches[names[which]].batch(there + 1)[at])
        return np.stack(made)

    student, updates = plan.model.copy(), len(names) * plan.updates
    _present(
        plan, student, batch=batch, note=note("joint", "all"),
        told="of all tasks together", updates=updates,
    )  # fmt: skip
    return [plan.ask(student, updates, "joint", lag=updates)]


@contextlib.contextmanager
def _named(told: str, learning_rate: float):
    try:
        yield
    except FloatingPointError as error:
        said = str(error).removeprefix("train: ")
        reason, _, advice = said.partition(";")
        raise InputError(
            f"train_stream: {reason} {told};{advice} (it is {learning_rate:g})"
        ) from None


def _refuse_no_task(tasks: pd.DataFrame, asker: str) -> None:
    if "task" not in tasks.columns:
        raise InputError(f"{asker}: no column 'task'; there are {', '.join(tasks)}")


def _refuse(tasks, order, least: dict, *, learning_rate, lags, replay) -> None:
    known = list(dict.fromkeys(tasks["task"]))
    for name in order:
        if name not in known:
            raise InputError(f"train_stream: no task {name!r}; there are {', '.join(known)}")
    for name, (value, low) in least.items():
        if value < low:
            raise InputError(f"train_stream: {name} is {value}, but must be at least {low}")
    if not 0 < learning_rate < np.inf:
        raise InputError(f"train_stream: learning_rate is {learning_rate}, but must be above 0")
    if any(lag < 1 for lag in lags):
        raise InputError(f"train_stream: lags are {list(lags)}; they count updates from 1")
    if not 0 <= replay < 1:
        raise InputError(f"train_stream: replay is {replay}, a share of the rows from 0, below 1")
