"""Study a list, train on with new text, and ask at growing lags what is left of it.

Orhan (2023), "Recognition, recall, and retention of few-shot memories in large language models".
The caller's model is never touched: a copy is trained, and handed to the probes at each lag.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int

from workbench.foils import CONTROL, ITSELF, STUDIED, audit_lists
from workbench.items import check_items, items_hash, load_items, python_documentation
from workbench.models import LanguageModel
from workbench.probes.recall import prepare_recall
from workbench.probes.recognition import prepare_recognition
from workbench.suite import Suite
from workbench.table import InputError, load, save, validate
from workbench.training import (
    TextStream,
    Trainer,
    load_states,
    plant,
    read_ledger,
    save_states,
    train,
)

LAGS = (0, 1, 2, 3, 5, 7, 10, 20, 50, 100)
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
# choose_learning_rate's answer for the suite's run "base" at 10 exposures of 48 verses that the
# lists of seed 0 leave out: 1e-3 studied loss 2.76, drift .24; 3e-3 1.48, .93; 1e-2 1.22, 2.32
SUITE_RATE = 3e-3
BATCH = 64  # studied texts in an update
ROWS, CONTEXT = 8, 128  # interference text in an update, and its width where the context allows
INTERFERENCE = 900  # texts of about 120 tokens: a hundred updates
PADDING = 0  # any id: padded positions weigh nothing
KNOWN = 0.95  # recognised against every kind of foil, or recalled: no room for a memory
CHECKPOINT = 60.0  # seconds of training between two writes of a run that is kept in a folder
STATE, TABLE = "state.safetensors", "table.parquet"


@dataclass(frozen=True)
class Retention:
    """What :func:`study_and_retain` saw and did.

    Attributes:
        table: Every measurement; see there.
        ledger: Every exposure, read back from the batches: ``update, row, offset, item, hash``.
        losses: Training loss of each update in nats per token: ``update, phase, loss``.
        audit: What :func:`workbench.foils.audit_lists` found and left out.
    """

    table: pd.DataFrame
    ledger: pd.DataFrame
    losses: pd.DataFrame
    audit: pd.DataFrame


def study_and_retain(
    model: LanguageModel,
    items: pd.DataFrame,
    foils: pd.DataFrame,
    interference: Sequence[str],
    *,
    exposures: int,
    learning_rate: float,
    lags: Sequence[int] = LAGS,
    batch: int = BATCH,
    seed: int = 0,
    recall: bool = True,
    folder: str | Path | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Retention:
    """Pass a list ``exposures`` times, then train on with new text, and probe at each lag.

    One fresh AdamW serves both phases. An exposure is one pass over the studied items in random
    order, ``batch`` texts an update, padding out of the loss. Texts that stand in two lists are
    left out first, with a warning: :func:`workbench.foils.audit_lists`. Several arms are several
    calls, told apart by a column of their own::

        arms = [retention_curve(study_and_retain(..., exposures=k).table).assign(exposures=k)
                for k in (1, 3, 10)]

    Args:
        model: Any causal model; a float32 copy of it is trained.
        items: Items frame; ``group`` is ``studied`` or ``control`` (matched, never trained on).
        foils: Foils of both, from :func:`workbench.foils.make_foils`.
        interference: New texts.
        exposures: Times each studied item is trained on.
        learning_rate: Constant. Choose it on other lists: :func:`choose_learning_rate`.
        lags: Updates since the study ended, increasing, 0 right after it; where a pass takes
            several an item's own last exposure is a little earlier (the ledger says when).
        seed: Of the order of items, the interference and dropout.
        recall: Ask for recall too, which costs as much again.
        folder: Where to keep the run, written at each lag and every minute: the rows so far
            (Parquet), weights and optimiser (safetensors). A run that was interrupted goes on
            from there and ends with the same numbers; a finished one is read. None keeps none.
        progress: Called with (update, loss) after each update.

    Returns:
        Its table holds the rows of the two probes before study (``phase`` "before", ``lag``
        missing) and at each lag ("after"); ``copies`` is how often an item had been trained on.
        A list that before study is recognised against each kind of foil, or recalled, in 95 % of
        its texts is warned of: it is known already, and a gain has no room.

    Raises:
        InputError: Settings out of range, a group without items (or none left), too little
            interference, texts too long or short, a loss that is not finite (update and batch are
            named), or a folder that holds a run with other settings (the first is named).
    """
    items = check_items(items)
    _refuse(items, exposures=exposures, batch=batch, lags=lags, learning_rate=learning_rate)
    settings = {
        "exposures": exposures, "learning_rate": learning_rate, "batch": batch,
        "lags": [int(lag) for lag in lags], "seed": seed, "recall": recall,
        "items": items_hash(items), "foils": _hash(*foils["item"], *foils["foil"], *foils["text"]),
        "interference": _hash(*interference) if max(lags) else "", "weights": model.weights_hash(),
    }  # fmt: skip
    asker = "study_and_retain"
    items, foils, interference, audit = without_shared(items, foils, interference, asker=asker)
    _refuse_groups(items)
    new = interference_stream(model, interference, seed=seed, asker=asker) if max(lags) else None
    student = model.copy()
    run = _Run(
        Trainer(student.module, learning_rate),
        settings,
        folder and Path(folder).expanduser(),
        progress,
    )
    run.resume()
    ask = _asker(student, items, foils, exposures=exposures, recall=recall)
    if not run.tables:
        run.tables.append(ask(None, 0))
        run.keep()
    _warn_of_known(run.tables[0])
    plan = _study_plan(items, exposures, batch, seed)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        try:
            _study(run, student, items, plan)
            _retain(run, new, len(plan), lags, ask)
        except FloatingPointError as error:
            raise InputError(
                f"study_and_retain: {str(error).removeprefix('train: ')} (it is "
                f"{learning_rate:g}); {_batch_of(run.trainer.update, plan)}"
            ) from None
    table = validate(pd.concat(run.tables, ignore_index=True))
    table.attrs["passport"] = {**model.passport(), **settings}
    losses = pd.DataFrame(run.losses, columns=["update", "phase", "loss"])
    return Retention(table, pd.DataFrame(run.ledger), losses, audit)


@dataclass
class _Run:
    """How far a run has come, and where it is kept."""

    trainer: Trainer
    settings: dict
    folder: Path | None
    progress: Callable[[int, float], None] | None

    def __post_init__(self):
        self.tables: list[pd.DataFrame] = []  # before study, and at each lag
        self.losses: list[tuple[int, str, float]] = []  # update, phase, loss
        self.ledger: list[dict] = []  # an exposure each
        self.written = time.monotonic()

    def begin(self, update: int) -> None:
        """Dropout of an update depends on nothing before it, so that a resumed run draws the same."""
        torch.manual_seed(int.from_bytes(bytes.fromhex(_hash(self.settings["seed"], update))[:4]))

    def note(self, update: int, loss: float, phase: str) -> None:
        self.losses.append((update, phase, loss))
        if self.progress:
            self.progress(update, loss)
        if time.monotonic() - self.written > CHECKPOINT:
            self.keep()

    def keep(self) -> None:
        if self.folder is None:
            return
        save(pd.concat(self.tables, ignore_index=True), self.folder / TABLE, passport=self.settings)
        # last: rows that are newer than it are asked again
        about = {"settings": self.settings, "losses": self.losses, "ledger": self.ledger}
        save_states(self.folder / STATE, {"run": self.trainer.state()}, about=about)
        self.written = time.monotonic()

    def resume(self) -> None:
        """Go on from the folder, where there is a run in it.

        Raises:
            InputError: It is another run, or its files are damaged.
        """
        if self.folder is None or not (self.folder / STATE).is_file():
            return
        states, about = load_states(self.folder / STATE)
        for name, asked in self.settings.items():
            held = about["settings"].get(name)
            if held != asked:
                raise InputError(
                    f"study_and_retain: {self.folder} holds a run with {name} {held}, asked for "
                    f"{asked}; ask for the same, or give another folder"
                )
        self.trainer.restore(states["run"])
        self.losses = [tuple(each) for each in about["losses"]]
        self.ledger = about["ledger"]
        table = load(self.folder / TABLE)
        first = table["step"].min()
        table = table[table["step"] <= first + self.trainer.update]
        lags = table["lag"].fillna(-1.0)
        self.tables = [table[lags == lag] for lag in sorted(lags.unique())]


def _hash(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=8).hexdigest()


def without_shared(items, foils, interference, *, asker: str):
    """The lists without what stands in two of them, and what was found; a warning counts it."""
    items, foils, interference, audit = audit_lists(items, foils, interference)
    found = audit[audit["dropped"] > 0]
    if len(found):
        said = ", ".join(
            f"{row.dropped} of {row.texts} against {row.against} ({row.found})"
            for row in found.itertuples()
        )
        warnings.warn(f"{asker}: left out texts that stand in two lists: {said}", stacklevel=3)
    return items, foils, interference, audit


def _warn_of_known(before: pd.DataFrame) -> None:
    studied = before[before["group"] == STUDIED]
    kinds = studied[studied["metric"] == "recognition"].groupby("foil", observed=True)["value"]
    recognised = float(kinds.mean().min())
    recalled = float(studied.loc[studied["metric"] == "recall_exact", "value"].mean())
    if recognised >= KNOWN or recalled >= KNOWN:
        also = "" if np.isnan(recalled) else f", {recalled:.0%} are recalled exactly"
        warnings.warn(
            f"study_and_retain: the list may be known already: before study {recognised:.0%} of "
            f"its texts or more are recognised against every kind of foil{also}; a gain has no "
            "room, so study other texts or give harder foils",
            stacklevel=3,
        )


def _study_plan(items, exposures: int, batch: int, seed: int) -> list[list[str]]:
    """The items of each update of the study."""
    names = items.loc[items["group"] == STUDIED, "item"].to_numpy(dtype=object)
    plan = []
    for exposure in range(exposures):
        order = np.random.default_rng([seed, 9, exposure]).permutation(len(names))
        plan += [list(names[order[at : at + batch]]) for at in range(0, len(order), batch)]
    return plan


def _study(run: _Run, model: LanguageModel, items: pd.DataFrame, plan: list[list[str]]) -> None:
    """Train on the planned items from where the run stands, and read back each exposure."""
    studied = items[items["group"] == STUDIED]
    texts = dict(zip(studied["item"], model.encode(studied["text"].tolist()), strict=True))
    if model.bos is not None:  # as the model meets every text, and as it is scored
        texts = {name: np.insert(ids, 0, model.bos) for name, ids in texts.items()}
    trainer = run.trainer
    trainer.module.train()
    while trainer.update < len(plan):
        update = trainer.update + 1
        chosen = plan[update - 1]
        filled, weight = pad_texts([texts[name] for name in chosen])
        due = pd.DataFrame({"update": update, "row": np.arange(len(chosen)), "offset": 0})
        due = due.assign(item=chosen)
        filled = plant(filled, due, texts)
        run.ledger += read_ledger(filled, due, texts).to_dict("records")
        run.begin(update)
        run.note(update, trainer.step(filled, weight), "study")
    trainer.module.eval()


def _retain(run: _Run, new: TextStream | None, end: int, lags: Sequence[int], ask) -> None:
    """Train on with new text from where the run stands, and ask at each lag that is to come."""
    asked = {float(table["lag"].iloc[0]) for table in run.tables}

    def batch(update: int) -> np.ndarray:
        run.begin(update)
        return new.batch(update - end)

    def at_stop(update: int) -> None:
        run.tables.append(ask(update - end, update))
        run.keep()

    train(
        run.trainer,
        batch,
        until=end + max(lags),
        stops={end + lag for lag in lags if lag not in asked},
        at_stop=at_stop,
        progress=lambda update, loss: run.note(update, loss, "retention"),
    )


def _batch_of(update: int, plan: list[list[str]]) -> str:
    if update > len(plan):
        return f"its batch is number {update - len(plan)} of the new text"
    names = plan[update - 1]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"its batch holds the studied items {', '.join(names[:3])}{more}"


def pad_texts(
    texts: Sequence[Int[np.ndarray, " pos"]],
) -> tuple[Int[np.ndarray, "row pos"], Int[np.ndarray, "row pos"]]:
    """An empty batch as wide as the longest text, and weights: 1 where a text stands, else 0."""
    lengths = np.array([len(each) for each in texts])
    weight = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    return np.full(weight.shape, PADDING, dtype=np.int64), weight


def _asker(student, items, foils, *, exposures, recall) -> Callable[..., pd.DataFrame]:
    """What asks the student, ``updates`` updates after it was copied; without lag: before study."""
    recognised = prepare_recognition(student, items, foils)
    recalled = prepare_recall(student, items) if recall else None

    def ask(lag: int | None, updates: int) -> pd.DataFrame:
        model = replace(student, step=student.step + updates)
        parts = [recognised(model)]
        if recalled:
            parts.append(recalled(model).assign(foil=ITSELF))
        table = pd.concat([part.astype({"group": str}) for part in parts], ignore_index=True)
        return table.assign(
            phase="before" if lag is None else "after",
            lag=np.nan if lag is None else float(lag),
            copies=np.where((table["group"] == STUDIED) & (lag is not None), exposures, 0),
        )

    return ask


def choose_learning_rate(
    model: LanguageModel,
    items: pd.DataFrame,
    foils: pd.DataFrame,
    *,
    exposures: int,
    rates: Sequence[float] = LEARNING_RATES,
    drift: float = 1.0,
    batch: int = BATCH,
    seed: int = 0,
) -> pd.DataFrame:
    """Study *another* list at each rate; the best teaches it most without breaking the rest.

    Settings picked on the list that is reported flatter it. Loss is asked because recognition is
    soon perfect at any rate; the controls set the limit because the highest rate always teaches
    the list best, at the cost of everything else. Costs one study and two probes a rate.

    Args:
        items, foils: A list that is not the one to be reported, with controls.
        rates: Learning rates to try.
        drift: What the controls' loss may rise by, in nats per token.

    Returns:
        Columns ``learning_rate, studied_loss, control_drift, recognition, best``: right after
        study, the mean loss of the studied list, the rise of the controls' since before (both in
        nats per token), and the share of pairs recognised over all kinds of foil. ``best`` marks
        the lowest studied loss within the limit. A rate at which training broke has NaN.

    Raises:
        InputError: As :func:`study_and_retain`, or no rate is within the limit.
    """
    tried = pd.DataFrame({"learning_rate": sorted(rates), "studied_loss": np.nan})
    tried = tried.assign(control_drift=np.nan, recognition=np.nan)
    settings = {"exposures": exposures, "batch": batch, "seed": seed, "lags": (0,), "recall": False}
    for row, rate in enumerate(tried["learning_rate"]):
        try:
            table = study_and_retain(model, items, foils, (), learning_rate=rate, **settings).table
        except InputError as error:
            if "lower the learning rate" not in str(error):
                raise
            continue
        keys = ["metric", "group", table["foil"] == ITSELF, "phase"]
        mean = table.groupby(keys, observed=True)["value"].mean()
        control = mean["loss", CONTROL, True]
        tried.loc[row, "studied_loss"] = mean["loss", STUDIED, True, "after"]
        tried.loc[row, "control_drift"] = control["after"] - control["before"]
        tried.loc[row, "recognition"] = mean["recognition", STUDIED, False, "after"]
    within = tried["studied_loss"].where(tried["control_drift"] <= drift)
    if within.isna().all():
        raise InputError(
            f"choose_learning_rate: every rate from {min(rates):g} up breaks the training or costs "
            f"the controls more than {drift:g} nats per token; give smaller rates"
        )
    return tried.assign(best=tried.index == within.idxmin())


def interference_texts(suite: Suite | None, source: str = "", *, seed: int) -> list[str]:
    """What is trained on after the study.

    Args:
        suite: Its training text is taken where there is a suite and no file; without either it is
            Python's own documentation.
        source: A file that ``load_items`` reads, or empty.
        seed: Of the draw from the suite's text.
    """
    if source:
        return load_items(source)["text"].tolist()
    if suite is not None:
        return suite.corpus_texts(INTERFERENCE, seed=seed)
    return python_documentation(INTERFERENCE)


def interference_stream(
    model: LanguageModel, texts: Sequence[str], *, seed: int, asker: str
) -> TextStream:
    """The new text as batches of ``ROWS`` rows.

    Raises:
        InputError: It does not fill one of them.
    """
    encoded = model.encode(["\n".join(texts)])[0]
    context = min(CONTEXT, model.context)
    if len(encoded) < ROWS * context:
        raise InputError(
            f"{asker}: the interference has {len(encoded)} tokens, an update takes "
            f"{ROWS} x {context}; give more text"
        )
    return TextStream(encoded, ROWS, context, seed)


def _refuse(items, *, exposures, batch, lags, learning_rate) -> None:
    for name, value in (("exposures", exposures), ("batch", batch)):
        if value < 1:
            raise InputError(f"study_and_retain: {name} is {value}, but must be at least 1")
    if not 0 < learning_rate < np.inf:
        raise InputError(f"study_and_retain: learning_rate is {learning_rate}, but must be above 0")
    if not len(lags) or min(lags) < 0 or any(b <= a for a, b in pairwise(lags)):
        raise InputError(
            f"study_and_retain: lags are {list(lags)}; give whole numbers from 0 up, increasing, "
            "such as 0, 1, 2, 5, 10"
        )
    unknown = ~items["group"].isin([STUDIED, CONTROL])
    if unknown.any():
        raise InputError(
            f"study_and_retain: group {items['group'][unknown].iloc[0]!r} of item "
            f"{items['item'][unknown].iloc[0]!r}; groups are {STUDIED} and {CONTROL}"
        )
    _refuse_groups(items)


def _refuse_groups(items: pd.DataFrame) -> None:
    for group in (STUDIED, CONTROL):
        if not (items["group"] == group).any():
            raise InputError(
                f"study_and_retain: no items in group {group!r}; without controls drift reads as "
                "forgetting, without studied items there is nothing to forget"
            )
