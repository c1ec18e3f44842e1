"""Learn a list, let it be forgotten, learn it again: what was kept shows in the updates it saves.

Ebbinghaus (1885), "Über das Gedächtnis". A text that can no longer be said, nor told from another,
may still be learned faster the second time. The caller's model is never touched: copies learn.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from workbench.foils import CONTROL, ITSELF, STUDIED, plain
from workbench.items import check_items, items_hash
from workbench.models import LanguageModel
from workbench.probes.recall import probe_recall
from workbench.probes.recognition import mean_loss, probe_recognition
from workbench.retention import BATCH, interference_stream, pad_texts, without_shared
from workbench.table import InputError, rows, validate
from workbench.training import Trainer, plant, read_ledger, train

CRITERION = 0.25  # of a text's own loss before study: on the suite most of it is recited there
LAGS = (0, 1, 3, 10, 30, 100)
MOST = 60  # updates after which a list is given up
COARSE = 10  # updates of first learning below which one update is more than a tenth of savings
REALIGNMENT = 5  # updates: far fewer than learning takes


@dataclass(frozen=True)
class Relearning:
    """What :func:`relearn` saw and did.

    Attributes:
        table: Every measurement; see there.
        ledger: Every exposure of the study, read back: ``update, row, offset, item, hash``.
        studied: The model right after study.
        forgot: The model at the last lag, before it relearned.
    """

    table: pd.DataFrame
    ledger: pd.DataFrame
    studied: LanguageModel
    forgot: LanguageModel


def relearn(
    model: LanguageModel,
    items: pd.DataFrame,
    foils: pd.DataFrame,
    interference: Sequence[str],
    *,
    learning_rate: float,
    criterion: float = CRITERION,
    lags: Sequence[int] = LAGS,
    most: int = MOST,
    batch: int = BATCH,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Relearning:
    """Count the updates it takes to learn a list, and to learn it again at each lag.

    An item is learned at the update after which its own loss is at most ``criterion`` of what it
    was before study. The list is studied until all items are, or for ``most`` updates; then the
    model trains on with new text, and at each lag two copies part from it: one learns the studied
    list again, one the controls for the first time. Controls also learn before study, so that
    what makes *any* list quicker or slower to learn can be taken out. Every learning starts from a
    fresh AdamW; the new text goes on with that of the study. Losses are asked without dropout
    after every pass over the list, one update where ``batch`` holds it.

    Args:
        model: Any causal model; float32 copies of it are trained, up to three at a time.
        items: Items frame; as many of ``group`` ``studied`` as of ``control``, drawn alike.
        foils: Foils of both, from :func:`workbench.foils.make_foils`.
        interference: New texts. Texts that stand in two lists are left out first, with a warning:
            :func:`workbench.foils.audit_lists`.
        learning_rate: Constant. Small enough that learning takes some twenty updates: under ten,
            which is warned of, one update is a tenth of savings.
        criterion: Share of an item's loss before study, above 0 and below 1.
        lags: Updates since the study ended, increasing.
        most: Updates after which a list is given up; who is not there then is right-censored.
        batch: Texts in an update.
        seed: Of the order of items, the new text and dropout.
        progress: Called with (update, loss) after each update, over all that are made.

    Returns:
        Its table holds the rows of :func:`probe_recognition` and :func:`probe_recall` before study
        (``phase`` "before", ``lag`` missing) and at each lag ("after"), and beside them
        ``updates_to_criterion`` of each item: to learn it first before study, from there on at
        each lag. The value is where a line between two askings crosses the criterion, ``lo`` and
        ``hi`` are the two askings; 0 for an item that is there already; NaN with a ``reason``,
        ``lo`` the updates made and ``hi`` infinite, where it is not reached.

    Raises:
        InputError: Settings out of range, lists of unlike length, an item known to the last token,
            too little interference, texts too long or short, or a loss that is not finite (update
            and list are named).
    """
    items = check_items(items)
    _refuse(items, learning_rate=learning_rate, criterion=criterion, lags=lags, most=most, batch=batch)  # fmt: skip
    items, foils, interference, _ = without_shared(items, foils, interference, asker="relearn")
    items, foils = _equally_many(items, foils)
    new = (
        interference_stream(model, interference, seed=seed, asker="relearn") if max(lags) else None
    )
    lists = {group: items[items["group"] == group] for group in (STUDIED, CONTROL)}
    student = model.copy()
    base = probe_recognition(student, items, foils)
    goal = _goals(base, lists, criterion)
    made, ledger = [], []
    note = _counting(progress)
    updates = 0

    def ask(lag: float) -> None:
        asked = replace(student, step=model.step + updates)
        recognised = probe_recognition(asked, items, foils) if updates else base
        recalled = probe_recall(asked, items).assign(foil=ITSELF)
        made.extend(part.assign(lag=lag).astype({"group": str}) for part in (recognised, recalled))

    def learn(of: str, asked: LanguageModel, trainer: Trainer, lag: float, keep=None) -> None:
        told = f"of learning the {of} list " + ("first" if np.isnan(lag) else f"at lag {lag:g}")
        steps = _learn(
            trainer, asked, lists[of], goal[of], most=most, batch=batch, seed=seed, told=told,
            note=note, keep=keep,
        )  # fmt: skip
        at = {"run": model.run, "step": model.step + updates, "group": of}
        made.append(_crossings(*steps, lists[of]["item"], at).assign(lag=lag))

    def learn_apart(of: str, lag: float) -> None:
        fork = student.copy()
        with _dropout(model, seed):  # the same whichever lags are asked
            learn(of, fork, Trainer(fork.module, learning_rate), lag)

    def stop(update: int) -> None:
        nonlocal updates
        updates = update
        ask(float(update - end))
        for group in lists:
            learn_apart(group, float(update - end))

    ask(np.nan)
    learn_apart(CONTROL, np.nan)
    with _dropout(model, seed):
        trainer = Trainer(student.module, learning_rate)
        learn(STUDIED, student, trainer, np.nan, keep=ledger)
        end = trainer.update
        studied = replace(student.copy(), step=model.step + end)
        try:
            train(
                trainer,
                lambda update: new.batch(update - end),
                until=end + max(lags),
                stops={end + lag for lag in lags},
                at_stop=stop,
                progress=note,
            )
        except FloatingPointError as error:
            raise InputError(
                f"relearn: {str(error).removeprefix('train: ')} (it is {learning_rate:g}, the "
                f"study ends with update {end})"
            ) from None
    exposures = pd.concat(ledger, ignore_index=True)
    table = _assembled(made, exposures)
    _warn_coarse(table, learning_rate)
    table.attrs["passport"] = {
        **model.passport(), "learning_rate": learning_rate, "criterion": criterion,
        "lags": list(lags), "most": most, "batch": batch, "seed": seed, "items": items_hash(items),
    }  # fmt: skip
    forgot = replace(student, step=model.step + updates)
    return Relearning(table, exposures, studied, forgot)


def realign(
    initial: LanguageModel,
    observed: LanguageModel,
    items: pd.DataFrame,
    texts: Sequence[str],
    *,
    learning_rate: float,
    updates: int = REALIGNMENT,
    batch: int = BATCH,
    seed: int = 0,
) -> pd.DataFrame:
    """Train on a small other part of the old task, and see whether the measured part comes back.

    Zheng et al. (2025), "Spurious forgetting in continual learning of language models": what a few
    updates on *other* texts of the old task bring back was out of reach, not lost.

    Args:
        initial: The model when it still knew the old task, such as ``Relearning.studied``.
        observed: The model that forgot; a float32 copy of it is trained, from a fresh AdamW.
        items: What is measured: items of the old task, and as a control texts of its kind that
            were never trained on, ``group`` "control".
        texts: The other part of the old task. None may hold a measured item, nor be held by one.
        learning_rate: Constant.
        updates: Of re-alignment, ``batch`` texts each, passed again when they are through.
        batch: Texts in an update.
        seed: Of the order of the texts and dropout.

    Returns:
        Rows of ``loss`` and ``recall_*`` of each item with the coordinate ``phase``: "initial",
        "observed", "recovered".

    Raises:
        InputError: A text that holds an item, no texts, settings out of range, texts too long or
            short, or a loss that is not finite.
    """
    items = check_items(items)
    for name, value in (("updates", updates), ("batch", batch)):
        if value < 1:
            raise InputError(f"realign: {name} is {value}, but must be at least 1")
    if not 0 < learning_rate < np.inf:
        raise InputError(f"realign: learning_rate is {learning_rate}, but must be above 0")
    _refuse_shared(items, texts)
    taught = pd.DataFrame({"item": [f"text {i}" for i in range(len(texts))], "text": list(texts)})
    models = {"initial": initial, "observed": observed, "recovered": observed.copy()}
    student = models["recovered"]
    with _dropout(student, seed):
        trainer = Trainer(student.module, learning_rate)
        passes = _passes(student, taught, batch, seed)
        try:
            student.module.train()
            while trainer.update < updates:
                for filled, weight, _ in next(passes)[: updates - trainer.update]:
                    trainer.step(filled, weight)
        except FloatingPointError as error:
            raise InputError(
                f"realign: {str(error).removeprefix('train: ')} (it is {learning_rate:g})"
            ) from None
        student.module.eval()
    parts = []
    for phase, asked in models.items():
        asked = replace(asked, run=observed.run, step=observed.step)
        loss = mean_loss(asked, items["text"].tolist(), named=_named(items))
        at = {"run": asked.run, "step": asked.step, "group": items["group"], "item": items["item"]}
        parts += [
            part.assign(phase=phase).astype({"group": str})
            for part in (rows("loss", loss, **at), probe_recall(asked, items))
        ]
    table = validate(pd.concat(parts, ignore_index=True))
    table.attrs["passport"] = {
        **observed.passport(), "learning_rate": learning_rate, "updates": updates, "batch": batch,
        "seed": seed, "items": items_hash(items), "texts": len(texts),
    }  # fmt: skip
    return table


# --- pieces --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _dropout(model: LanguageModel, seed: int):
    """Dropout drawn from the seed; what the caller draws goes on as if nothing had happened."""
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _learn(
    trainer: Trainer,
    student: LanguageModel,
    items: pd.DataFrame,
    goal: Float[np.ndarray, " item"],
    *,
    most: int,
    batch: int,
    seed: int,
    told: str,
    note: Callable[[int, float], None],
    keep: list | None,
) -> tuple[list[int], Float[np.ndarray, "asking item"]]:
    """Pass the list until every item has met its goal; the updates of each asking and the losses."""
    texts, named = items["text"].tolist(), _named(items)
    asked, losses = [0], [mean_loss(student, texts, named=named)]
    met = losses[0] <= goal
    passes = _passes(student, items, batch, seed)
    while not met.all() and trainer.update < most:
        student.module.train()
        for filled, weight, ledger in next(passes)[: most - trainer.update]:
            try:
                note(trainer.update + 1, trainer.step(filled, weight))
            except FloatingPointError as error:
                said = str(error).removeprefix("train: ").replace("; ", f" {told}; ")
                raise InputError(f"relearn: {said}") from None
            if keep is not None:
                keep.append(ledger.assign(update=trainer.update))
        student.module.eval()
        asked.append(trainer.update)
        losses.append(mean_loss(student, texts, named=named))
        met |= losses[-1] <= goal
    return asked, np.array(losses) - goal


def _passes(student: LanguageModel, items: pd.DataFrame, batch: int, seed: int):
    """Passes over the texts in random order: lists of batch, weights, ledger of the batch."""
    texts = dict(zip(items["item"], student.encode(items["text"].tolist()), strict=True))
    if student.bos is not None:  # as the model meets every text, and as it is scored
        texts = {name: np.insert(ids, 0, student.bos) for name, ids in texts.items()}
    names = np.array(list(texts), dtype=object)
    number = 0
    while True:
        order = np.random.default_rng([seed, 11, number]).permutation(len(names))
        number += 1
        made = []
        for at in range(0, len(order), batch):
            chosen = names[order[at : at + batch]]
            filled, weight = pad_texts([texts[name] for name in chosen])
            plan = pd.DataFrame({"update": 0, "row": np.arange(len(chosen)), "offset": 0})
            plan = plan.assign(item=chosen)
            filled = plant(filled, plan, texts)
            made.append((filled, weight, read_ledger(filled, plan, texts)))
        yield made


def crossing(
    asked: Sequence[int], above: Float[np.ndarray, "asking item"]
) -> tuple[Float[np.ndarray, " item"], Float[np.ndarray, " item"], Float[np.ndarray, " item"]]:
    """Where each column first comes down to 0, on a line between askings, and the two askings.

    Args:
        asked: Updates made at each asking, increasing from 0.
        above: What the loss is above its goal; at or below 0 is there.

    Returns:
        Updates, and their bounds: the last asking above and the first at or below. All are 0 for
        a column that starts there; (NaN, last asking, inf) for one that never gets there.
    """
    asked = np.asarray(asked, dtype=float)
    there = above <= 0
    first = there.argmax(axis=0)
    before = np.maximum(first - 1, 0)
    item = np.arange(above.shape[1])
    high, low = above[before, item], above[first, item]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(high > low, high / (high - low), 1.0)
    value = asked[before] + share * (asked[first] - asked[before])
    never = ~there.any(axis=0)
    return (
        np.where(never, np.nan, value),
        np.where(never, asked[-1], asked[before]),
        np.where(never, np.inf, asked[first]),
    )


def _assembled(made: list[pd.DataFrame], exposures: pd.DataFrame) -> pd.DataFrame:
    """All that was measured, with its phase and how often each item had been trained on."""
    table = pd.concat(made, ignore_index=True)
    after = table["lag"].notna()
    copies = table["item"].map(exposures["item"].value_counts()).fillna(0).astype(int)
    table["phase"] = np.where(after, "after", "before")
    table["copies"] = np.where(after, copies, 0)
    return validate(table)


def _crossings(asked, above, names, at: Mapping) -> pd.DataFrame:
    value, lo, hi = crossing(asked, above)
    why = np.where(np.isnan(value), f"not learned in {asked[-1]} updates", "")
    beside = {"foil": ITSELF, "reason": why}
    return rows(
        "updates_to_criterion", value, lo=lo, hi=hi, item=names, beside=beside, run=at["run"],
        step=at["step"], group=at["group"],
    )  # fmt: skip


def _counting(progress: Callable[[int, float], None] | None):
    """Numbers the updates of all copies through, for a progress bar."""
    count = 0

    def note(update: int, loss: float) -> None:
        nonlocal count
        count += 1
        if progress:
            progress(count, loss)

    return note


def _named(items: pd.DataFrame) -> dict[str, str]:
    return {i.text: f"item {i.item}" for i in items.itertuples()}


def _equally_many(items: pd.DataFrame, foils: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """As many studied items as controls, with their foils."""
    size = items["group"].value_counts().reindex([STUDIED, CONTROL], fill_value=0).min()
    if not size:
        raise InputError(
            "relearn: no list is left without the texts that stand in two; give others"
        )
    items = items.groupby("group", sort=False).head(size).reset_index(drop=True)
    return items, foils[foils["item"].isin(items["item"])]


def _goals(base: pd.DataFrame, lists: dict, criterion: float) -> dict[str, np.ndarray]:
    """The loss at which each item of a list is learned."""
    own = base[(base["metric"] == "loss") & (base["foil"] == ITSELF)].set_index("item")["value"]
    known = own.index[own == 0]
    if len(known):
        raise InputError(
            f"relearn: item {known[0]!r} has a loss of 0 before study, so there is nothing to learn; "
            f"drop it ({len(known)} of {len(own)} items)"
        )
    return {group: criterion * own[part["item"]].to_numpy() for group, part in lists.items()}


def _warn_coarse(table: pd.DataFrame, learning_rate: float) -> None:
    first = table[(table["metric"] == "updates_to_criterion") & (table["phase"] == "before")]
    typical = first["value"].fillna(np.inf).median()
    if typical < COARSE:
        warnings.warn(
            f"relearn: half of the items were first learned in {typical:.1f} updates or fewer, so "
            f"one update is much of their savings; lower the learning rate (it is "
            f"{learning_rate:g}) or the criterion",
            stacklevel=3,
        )


def _refuse_shared(items: pd.DataFrame, texts: Sequence[str]) -> None:
    if not len(texts):
        raise InputError("realign: no texts to re-align on; give a part of the old task")
    others = [plain(text) for text in texts]
    for each in items.itertuples():
        mine = plain(each.text)
        shared = [i for i, other in enumerate(others) if mine in other or other in mine]
        if shared:
            raise InputError(
                f"realign: text {shared[0]} and item {each.item!r} hold one another; re-align on "
                "texts that are not measured, or recovery is learning again"
            )


def _refuse(items, *, learning_rate, criterion, lags, most, batch) -> None:
    for name, value in (("most", most), ("batch", batch)):
        if value < 1:
            raise InputError(f"relearn: {name} is {value}, but must be at least 1")
    if not 0 < learning_rate < np.inf:
        raise InputError(f"relearn: learning_rate is {learning_rate}, but must be above 0")
    if not 0 < criterion < 1:
        raise InputError(
            f"relearn: criterion is {criterion}, a share of the loss before study; choose one "
            "above 0 and below 1"
        )
    if not len(lags) or min(lags) < 0 or any(b <= a for a, b in pairwise(lags)):
        raise InputError(
            f"relearn: lags are {list(lags)}; give whole numbers from 0 up, increasing, such as 0, "
            "1, 10, 100"
        )
    unknown = ~items["group"].isin([STUDIED, CONTROL])
    if unknown.any():
        raise InputError(
            f"relearn: group {items['group'][unknown].iloc[0]!r} of item "
            f"{items['item'][unknown].iloc[0]!r}; groups are {STUDIED} and {CONTROL}"
        )
    size = {group: int((items["group"] == group).sum()) for group in (STUDIED, CONTROL)}
    if size[STUDIED] != size[CONTROL] or not size[STUDIED]:
        raise InputError(
            f"relearn: {size[STUDIED]} studied items and {size[CONTROL]} controls; a longer list "
            "takes more updates, so give as many of each"
        )
