"""Study a list, train on with new text, and ask at growing lags what is left of it.

Orhan (2023), "Recognition, recall, and retention of few-shot memories in large language models".
The caller's model is never touched: a copy is trained, and handed to the probes at each lag.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int

from workbench.foils import CONTROL, ITSELF, STUDIED, plain
from workbench.items import check_items, items_hash, load_items, python_documentation
from workbench.models import LanguageModel
from workbench.probes.recall import probe_recall
from workbench.probes.recognition import probe_recognition
from workbench.suite import Suite
from workbench.table import InputError, validate
from workbench.training import TextStream, Trainer, plant, read_ledger, train

LAGS = (0, 1, 2, 3, 5, 7, 10, 20, 50, 100)
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
# choose_learning_rate's answer for the suite's run "base" at 10 exposures of 48 verses that the
# lists of seed 0 leave out: 1e-3 studied loss 2.76, drift .24; 3e-3 1.48, .93; 1e-2 1.22, 2.32
SUITE_RATE = 3e-3
BATCH = 64  # studied texts in an update
ROWS, CONTEXT = 8, 128  # interference text in an update, and its width where the context allows
INTERFERENCE = 900  # texts of about 120 tokens: a hundred updates
PADDING = 0  # any id: padded positions weigh nothing


@dataclass(frozen=True)
class Retention:
    """What :func:`study_and_retain` saw and did.

    Attributes:
        table: Every measurement; see there.
        ledger: Every exposure, read back from the batches: ``update, row, offset, item, hash``.
        losses: Training loss of each update in nats per token: ``update, phase, loss``.
    """

    table: pd.DataFrame
    ledger: pd.DataFrame
    losses: pd.DataFrame


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
    progress: Callable[[int, float], None] | None = None,
) -> Retention:
    """Pass a list ``exposures`` times, then train on with new text, and probe at each lag.

    One fresh AdamW serves both phases. An exposure is one pass over the studied items in random
    order, ``batch`` texts an update, padding out of the loss.

    Args:
        model: Any causal model; a float32 copy of it is trained.
        items: Items frame; ``group`` is ``studied`` or ``control`` (matched, never trained on).
        foils: Foils of both, from :func:`workbench.foils.make_foils`.
        interference: New texts. Those that hold an item or a foil are left out with a warning.
        exposures: Times each studied item is trained on.
        learning_rate: Constant. Choose it on other lists: :func:`choose_learning_rate`.
        lags: Updates since the study ended, increasing, 0 right after it; where a pass takes
            several an item's own last exposure is a little earlier (the ledger says when).
        seed: Of the order of items, the interference and dropout.
        recall: Ask for recall too, which costs as much again.
        progress: Called with (update, loss) after each update.

    Returns:
        Its table holds the rows of the two probes before study (``phase`` "before", ``lag``
        missing) and at each lag ("after"); ``copies`` is how often an item had been trained on.

    Raises:
        InputError: Settings out of range, a group without items, too little interference, texts
            too long or short, or a loss that is not finite (the update is named).
    """
    items = check_items(items)
    _refuse(items, exposures=exposures, batch=batch, lags=lags, learning_rate=learning_rate)
    new = _interference(model, items, foils, interference, seed=seed) if max(lags) else None
    student = replace(model, module=copy.deepcopy(model.module).float(), _own_head={})
    ask = partial(_probe, student, items, foils, exposures=exposures, recall=recall)
    losses: list[tuple[int, str, float]] = []  # update, phase, loss
    note = _noting(losses, progress)
    tables = [ask(None, 0)]
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        trainer = Trainer(student.module, learning_rate)
        with _named_update(learning_rate, exposures * _updates_of_a_pass(items, batch)):
            ledger = _study(trainer, student, items, exposures, batch, seed, note)
            tables += _retain(trainer, new, lags, ask, note)
    table = validate(pd.concat(tables, ignore_index=True))
    settings = {"exposures": exposures, "learning_rate": learning_rate, "batch": batch}
    table.attrs["passport"] = {
        **model.passport(), **settings, "lags": list(lags), "seed": seed, "items": items_hash(items)
    }  # fmt: skip
    return Retention(table, ledger, pd.DataFrame(losses, columns=["update", "phase", "loss"]))


def _updates_of_a_pass(items: pd.DataFrame, batch: int) -> int:
    return -(-int((items["group"] == STUDIED).sum()) // batch)


@contextlib.contextmanager
def _named_update(learning_rate: float, study: int):
    try:
        yield
    except FloatingPointError as error:
        raise InputError(
            f"study_and_retain: {str(error).removeprefix('train: ')} (it is {learning_rate:g}, "
            f"the study ends with update {study})"
        ) from None


def _retain(trainer: Trainer, new: TextStream | None, lags, ask, note) -> list[pd.DataFrame]:
    """Train on with new text from where the study ended, and ask at each lag."""
    end, tables = trainer.update, []
    train(
        trainer,
        lambda update: new.batch(update - end),
        until=end + max(lags),
        stops={end + lag for lag in lags},
        at_stop=lambda update: tables.append(ask(update - end, update)),
        progress=note,
    )
    return tables


def _study(
    trainer: Trainer,
    model: LanguageModel,
    items: pd.DataFrame,
    exposures: int,
    batch: int,
    seed: int,
    note: Callable[[int, float, str], None],
) -> pd.DataFrame:
    """Pass the studied list ``exposures`` times; returns the ledger."""
    studied = items[items["group"] == STUDIED]
    texts = dict(zip(studied["item"], model.encode(studied["text"].tolist()), strict=True))
    if model.bos is not None:  # as the model meets every text, and as it is scored
        texts = {name: np.insert(ids, 0, model.bos) for name, ids in texts.items()}
    names = np.array(list(texts), dtype=object)
    ledger = []
    trainer.module.train()
    for exposure in range(exposures):
        order = np.random.default_rng([seed, 9, exposure]).permutation(len(names))
        for at in range(0, len(order), batch):
            chosen = names[order[at : at + batch]]
            filled, weight = pad_texts([texts[name] for name in chosen])
            plan = pd.DataFrame({"update": trainer.update + 1, "row": np.arange(len(chosen))})
            plan = plan.assign(offset=0, item=chosen)
            filled = plant(filled, plan, texts)
            ledger.append(read_ledger(filled, plan, texts))
            note(trainer.update + 1, trainer.step(filled, weight), "study")
    trainer.module.eval()
    return pd.concat(ledger, ignore_index=True)


def pad_texts(
    texts: Sequence[Int[np.ndarray, " pos"]],
) -> tuple[Int[np.ndarray, "row pos"], Int[np.ndarray, "row pos"]]:
    """An empty batch as wide as the longest text, and weights: 1 where a text stands, else 0."""
    lengths = np.array([len(each) for each in texts])
    weight = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    return np.full(weight.shape, PADDING, dtype=np.int64), weight


def _probe(student, items, foils, lag, updates, *, exposures, recall) -> pd.DataFrame:
    """What the student says ``updates`` updates after it was copied; without lag: before study."""
    model = replace(student, step=student.step + updates)
    parts = [probe_recognition(model, items, foils)]
    if recall:
        parts.append(probe_recall(model, items).assign(foil=ITSELF))
    table = pd.concat([part.astype({"group": str}) for part in parts], ignore_index=True)
    return table.assign(
        phase="before" if lag is None else "after",
        lag=np.nan if lag is None else float(lag),
        copies=np.where((table["group"] == STUDIED) & (lag is not None), exposures, 0),
    )


def _noting(losses: list, progress: Callable[[int, float], None] | None):
    def note(update: int, loss: float, phase: str = "retention") -> None:
        losses.append((update, phase, loss))
        if progress:
            progress(update, loss)

    return note


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


def _interference(model, items, foils, texts: Sequence[str], *, seed: int) -> TextStream:
    """The new text as batches, without any text that holds an item or a foil."""
    probed = {plain(text) for text in [*items["text"], *foils["text"]]}
    clean = [
        text for text, bare in ((t, plain(t)) for t in texts) if not any(p in bare for p in probed)
    ]
    if len(clean) < len(texts):
        warnings.warn(
            f"study_and_retain: dropped {len(texts) - len(clean)} of {len(texts)} interference "
            "texts that hold an item or a foil",
            stacklevel=3,
        )
    encoded = model.encode(["\n".join(clean)])[0]
    context = min(CONTEXT, model.context)
    if len(encoded) < ROWS * context:
        raise InputError(
            f"study_and_retain: the interference has {len(encoded)} tokens, an update takes "
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
    for group in (STUDIED, CONTROL):
        if not (items["group"] == group).any():
            raise InputError(
                f"study_and_retain: no items in group {group!r}; without controls drift reads as "
                "forgetting, without studied items there is nothing to forget"
            )
