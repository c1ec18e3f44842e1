"""Put passages about fictional facts into the training text at chosen updates, and ask as it goes.

Chang et al. (2024), "How do large language models acquire factual knowledge during pretraining?".
The caller's model is never touched: a copy goes on with its pre-training.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from tqdm.auto import tqdm

from workbench.facts import INJECTED, SCHEDULES, WINDOW, check_facts
from workbench.items import items_hash
from workbench.models import LanguageModel
from workbench.probes.facts import encode_questions, target_scores
from workbench.table import InputError, rows, validate
from workbench.training import TextStream, Trainer, train

LAGS = (8, 10, 15, 20, 30, 50, 70, 100)
CONTEXT = 128  # tokens of a row, where the model's context allows


@dataclass(frozen=True)
class Injection:
    """What :func:`inject_facts` saw and did.

    Attributes:
        table: Every answer; see there.
        ledger: Every passage, read back from the batches: ``update, row, offset, item, entity,
            slot, hash``.
        losses: Training loss of each update in nats per token: ``update, loss``.
    """

    table: pd.DataFrame
    ledger: pd.DataFrame
    losses: pd.DataFrame


def inject_facts(
    model: LanguageModel,
    facts: pd.DataFrame,
    texts: Sequence[str],
    *,
    learning_rate: float,
    batch: int = 16,
    injections: int = 8,
    every: int = 10,
    window: int = WINDOW,
    lags: Sequence[int] = LAGS,
    waves: int = 6,
    settle: int = 20,
    seed: int = 0,
    progress: bool = False,
) -> Injection:
    """Go on with pre-training, put passages into the batches, and ask about them at each lag.

    Slot k of an entity in wave w is update ``settle + 1 + (k - 1) every + w``; its passage then
    takes the beginning of a row. The schedule ``repeated`` puts the same passage in every slot,
    ``paraphrased`` the passage first and another paraphrase in each later one, ``single`` the
    passage in the last slot alone, so that all three are followed by the same text. Entities of
    the group ``never`` are asked at the slots of their schedule and trained on in none.

    Args:
        model: Any causal model; a float32 copy of it is trained, with a fresh AdamW.
        facts: As :func:`workbench.facts.make_facts` or ``load_facts`` gives them.
        texts: Background. Those that hold a passage or a question with its answer are left out
            with a warning.
        learning_rate: Reached over ``settle`` updates, then constant.
        batch: Rows of an update, of 128 tokens where the context allows.
        injections: Slots.
        every: Updates between slots.
        window: Updates after each slot at all of which is asked, below ``every``.
        lags: Updates after the last slot at which is asked once more, increasing, beyond the
            window.
        waves: Entities of a schedule are dealt into so many waves, one update apart.
        settle: Updates on the background before the first slot.
        seed: Of the order of the background, the rows and dropout.
        progress: Whether to show a bar.

    Returns:
        Its table holds ``log_probability`` of each question (see
        :func:`workbench.probes.facts.probe_facts`) just before each slot, at each update up to
        ``window`` after it, and at ``lags`` after the last. Coordinates: ``entity``, ``pair``,
        ``depth``, ``schedule``, ``batch``, ``learning_rate``, ``seed``; ``slot``, how many of the entity's own
        slots have been (of the partner's sham slots too), ``lag``, updates since then (missing
        before), and ``since``, updates since the first slot of its wave, -1 just before it.

    Raises:
        InputError: Settings out of range, too few rows, paraphrases or tokens of background, a
            passage longer than a row, or a loss that is not finite: update and batch are named.
        RuntimeError: A batch did not hold what the schedule says.
    """
    facts = check_facts(facts, "inject_facts")
    _refuse(
        facts, learning_rate=learning_rate, batch=batch, injections=injections, every=every,
        window=window, lags=lags, waves=waves, settle=settle,
    )  # fmt: skip
    tokens, prompts, asked = encode_questions(model, facts)
    starts = _first_slots(facts, waves, settle)
    first = asked["entity"].map(starts).to_numpy()
    plan = _plan(facts, starts, injections=injections, every=every, batch=batch, seed=seed)
    context = min(CONTEXT, model.context)
    passages = _passages(model, facts, plan, context)
    stream = _background(model, facts, texts, batch=batch, context=context, seed=seed)
    due = _due(asked, first, injections=injections, every=every, window=window, lags=lags)
    student = model.copy()
    tables, losses = [], []
    last = max(due)
    often = 0.1 if sys.stderr.isatty() or "ipykernel" in sys.modules else 30.0
    bar = tqdm(
        total=last, desc="injecting facts", unit="update", disable=not progress, mininterval=often
    )

    def ask(update: int) -> None:
        at = due[update]
        value = target_scores(
            replace(student, step=model.step + update), [tokens[i] for i in at], prompts[at]
        )
        tables.append(pd.DataFrame({"at": at, "update": update, "value": value}))

    def note(update: int, loss: float) -> None:
        losses.append((update, loss))
        bar.update()

    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), bar:
        torch.manual_seed(seed)
        trainer = Trainer(student.module, learning_rate, warmup=settle)
        try:
            ledger = train(
                trainer,
                stream.batch,
                until=last,
                exposures=plan,
                texts=passages,
                stops=due,
                at_stop=ask,
                progress=note,
            )
        except FloatingPointError as error:
            held = plan.loc[plan["update"] == trainer.update, "item"]
            size = f"{batch} x {context} tokens"
            raise InputError(_diverged(error, held, size, learning_rate)) from None
    table = _table(model, asked, pd.concat(tables, ignore_index=True), first, injections, every)
    table = table.assign(batch=batch, learning_rate=learning_rate, seed=seed)
    table = validate(table)
    settings = {
        "learning_rate": learning_rate, "batch": batch, "injections": injections, "every": every,
        "window": window, "lags": list(lags), "waves": waves, "settle": settle, "seed": seed,
    }  # fmt: skip
    texts_of = facts.drop_duplicates("entity").rename(columns={"passage": "text"})
    table.attrs = {
        "passport": {**model.passport(), **settings, "items": items_hash(texts_of)},
        "dropped": asked.attrs["dropped"],
    }
    return Injection(table, ledger, pd.DataFrame(losses, columns=["update", "loss"]))


def _diverged(error: Exception, held: pd.Series, size: str, learning_rate: float) -> str:
    told = str(error).removeprefix("train: ").partition(";")[0]
    return (
        f"inject_facts: {told}, in the batch of {size} that held "
        f"{', '.join(held) or 'background alone'}; lower the learning rate (it is "
        f"{learning_rate:g})"
    )


def _first_slots(facts: pd.DataFrame, waves: int, settle: int) -> dict[str, int]:
    """The update of each entity's first slot; those of a schedule are dealt into waves in order."""
    entities = facts.drop_duplicates("entity")
    wave = entities.groupby(["group", "schedule"]).cumcount() % waves
    return dict(zip(entities["entity"], settle + 1 + wave, strict=True))


def _plan(
    facts: pd.DataFrame,
    starts: dict[str, int],
    *,
    injections: int,
    every: int,
    batch: int,
    seed: int,
) -> pd.DataFrame:
    """Every exposure: ``update, row, offset, item, entity, slot``; an item is a passage's name."""
    planned = []
    for each in facts[facts["group"] == INJECTED].drop_duplicates("entity").itertuples():
        if each.schedule == "paraphrased" and len(each.paraphrases) < injections - 1:
            raise InputError(
                f"inject_facts: entity {each.entity!r} has {len(each.paraphrases)} paraphrases for "
                f"{injections} injections of the schedule paraphrased, which need "
                f"{injections - 1}; give more, or inject less often"
            )
        for slot in range(injections, 0, -1):
            wording = (
                f"paraphrase-{slot - 1}"
                if each.schedule == "paraphrased" and slot > 1
                else "passage"
            )
            update = starts[each.entity] + (slot - 1) * every
            planned.append((update, 0, 0, f"{each.entity}/{wording}", each.entity, slot))
            if each.schedule == "single":
                break
    plan = pd.DataFrame(planned, columns=["update", "row", "offset", "item", "entity", "slot"])
    plan = plan.sort_values(["update", "item"], ignore_index=True)
    for update, part in plan.groupby("update"):
        if len(part) > batch:
            raise InputError(
                f"inject_facts: update {update} would hold {len(part)} passages, a batch has "
                f"{batch} rows; give fewer facts, more waves or a larger batch"
            )
        order = np.random.default_rng([seed, 14, int(update)]).permutation(batch)
        plan.loc[part.index, "row"] = order[: len(part)]
    return plan


def _passages(model, facts, plan, context: int) -> dict[str, Int[np.ndarray, " pos"]]:
    """Token ids of all that is put into a batch, by its name in the plan."""
    told = {}
    for each in facts.drop_duplicates("entity").itertuples():
        told[f"{each.entity}/passage"] = each.passage
        told |= {f"{each.entity}/paraphrase-{k}": t for k, t in enumerate(each.paraphrases, 1)}
    names = list(dict.fromkeys(plan["item"]))
    encoded = dict(zip(names, model.encode([told[name] for name in names]), strict=True))
    if model.bos is not None:  # as the model meets every text, and as it is asked
        encoded = {name: np.insert(ids, 0, model.bos) for name, ids in encoded.items()}
    for name, ids in encoded.items():
        if len(ids) > context:
            raise InputError(
                f"inject_facts: {name} has {len(ids)} tokens, a row has {context}; shorten it"
            )
    return encoded


def _background(model, facts, texts: Sequence[str], *, batch, context, seed) -> TextStream:
    """The text to go on with, without any that gives an answer away."""
    asked = (facts["probe_prefix"] + facts["probe_target"]).tolist()
    told = list(
        dict.fromkeys([*facts["passage"], *facts["paraphrases"].explode().dropna(), *asked])
    )
    clean = [text for text in texts if not any(each in text for each in told)]
    if len(clean) < len(texts):
        warnings.warn(
            f"inject_facts: dropped {len(texts) - len(clean)} of {len(texts)} background texts that "
            "hold a passage or an answered question",
            stacklevel=3,
        )
    encoded = model.encode(["\n".join(clean)])[0]
    if len(encoded) < batch * context:
        raise InputError(
            f"inject_facts: the background has {len(encoded)} tokens, an update takes {batch} x "
            f"{context}; give more text"
        )
    return TextStream(encoded, batch, context, seed)


def _due(facts, first, *, injections, every, window, lags) -> dict[int, Int[np.ndarray, " item"]]:
    """Which questions are asked after which update."""
    offsets = {}
    for schedule in SCHEDULES:
        slots = [injections - 1] if schedule == "single" else range(injections)
        near = {k * every + lag for k in slots for lag in range(-1, window + 1)}
        offsets[schedule] = near | {-1} | {(injections - 1) * every + lag for lag in lags}
    due: dict[int, list[int]] = {}
    for at, (schedule, start) in enumerate(zip(facts["schedule"], first, strict=True)):
        for offset in offsets[schedule]:
            due.setdefault(int(start + offset), []).append(at)
    return {update: np.array(due[update]) for update in sorted(due)}


def _table(model, asked, answers, first, injections: int, every: int) -> pd.DataFrame:
    at = answers["at"].to_numpy()
    since = answers["update"].to_numpy() - first[at]
    place = asked.iloc[at].reset_index(drop=True)
    single = (place["schedule"] == "single").to_numpy()
    # a single passage has one slot, at the place of the others' last
    own = since - np.where(single, (injections - 1) * every, 0)
    slot = np.clip(own // every + 1, 0, np.where(single, 1, injections))
    lag = np.where(slot > 0, own - (slot - 1) * every, np.nan)
    beside = {name: place[name] for name in ("entity", "pair", "depth", "schedule")}
    return rows(
        "log_probability",
        answers["value"],
        run=model.run,
        step=model.step + answers["update"],
        group=place["group"],
        item=place["item"],
        beside={**beside, "slot": slot, "lag": lag, "since": since},
    )


def _refuse(facts, *, learning_rate, batch, injections, every, window, lags, waves, settle) -> None:
    least = {"batch": batch, "injections": injections, "waves": waves, "window": window}
    for name, value in least.items():
        if value < 1:
            raise InputError(f"inject_facts: {name} is {value}, but must be at least 1")
    if settle < 0:
        raise InputError(f"inject_facts: settle is {settle}, but must be at least 0")
    if not 0 < learning_rate < np.inf:
        raise InputError(f"inject_facts: learning_rate is {learning_rate}, but must be above 0")
    if every <= window and injections > 1:
        raise InputError(
            f"inject_facts: every is {every}, but must be above the window of {window}: a gain is "
            "looked for before the next injection"
        )
    if list(lags) != sorted({lag for lag in lags if lag > window}):
        raise InputError(
            f"inject_facts: lags are {list(lags)}; give whole numbers above the window of {window}, "
            "increasing"
        )
    if not (facts["group"] == INJECTED).any():
        raise InputError(f"inject_facts: no facts in group {INJECTED!r}; there is nothing to learn")
    if (facts["group"] == INJECTED).all():
        raise InputError(
            "inject_facts: all facts are injected; without some that never are, learning the form "
            "of the sentences reads as learning the facts"
        )
