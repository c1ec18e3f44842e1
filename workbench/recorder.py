"""Probe chosen texts at growing lags while somebody's own training runs, and leave it undisturbed.

:class:`RetentionRecorder` serves a plain loop, :class:`RetentionCallback` transformers' Trainer.
The table is rewritten whole at every probe and each exposure is appended to a ledger at once, so
that a run may be killed at any moment; resumed in the same folder, it goes on where it stood::

    from transformers import Trainer
    from workbench import RetentionCallback, RetentionRecorder, load, load_items

    items = load_items("texts.jsonl")  # `text`, and `group`: trained on, or held out
    recorder = RetentionRecorder(module, items, tokenizer=tokenizer, folder="recorded")
    trainer = Trainer(
        model=module, args=arguments, train_dataset=dataset,
        callbacks=[RetentionCallback(recorder)],
    )
    trainer.train()
    table = load("recorded/table.parquet")

In a loop of one's own: ``with recorder:`` around it, ``recorder.step(update)`` after each update.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from transformers import TrainerCallback

from workbench.foils import ITSELF
from workbench.items import check_items, cut_items, items_hash
from workbench.models import Checkpoints, LanguageModel, bos_of, buckets, versions
from workbench.probes.recognition import DECIMALS, forced_choice, refuse_strange_foils
from workbench.table import InputError, load, save, validate, whole_file
from workbench.training import fingerprint

# 0, 1, 2, 3, 5, 7, then 10, 20, 50 and their tens without end, in updates
LAGS = (0, 1, 2, 3, 5, 7, *(digit * 10**power for power in range(1, 9) for digit in (1, 2, 5)))
BUDGET = 0.10  # of the training's own seconds
TABLE, LEDGER = "table.parquet", "ledger.jsonl"
PROBE_TOKENS = 8192  # scored at once: small beside what a training step keeps for its gradients
SAMPLED = 256  # values of each parameter that tell whether it is the one that was saved
ANCHOR = 4  # tokens by which an item is first looked for in a batch
RIDES = ("kind", "dose")  # columns of the items that ride along
START, EXPOSURE = "start", "exposure"
NOT_FINITE = "the model gives NaN or Inf"
MEASURED = ("item", "metric", "value", "foil", "reason", "step")  # the rest is known without them


# --- what is asked of a model --------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """What is put to a model at each probe, cut into tokens once.

    Attributes:
        items: Those long enough; ``.attrs["dropped"]`` counts the others.
        foils: Columns ``item, foil`` and ``at``, the place of the foil's text in ``tokens``.
        tokens: Ids of the items' texts in order, then of the foils'.
        prompt: Tokens of each item that are given when the rest is asked for.
    """

    items: pd.DataFrame
    foils: pd.DataFrame | None
    tokens: list[Int[np.ndarray, " pos"]]
    prompt: Int[np.ndarray, " item"]


def cut_texts(
    model: LanguageModel,
    items: pd.DataFrame,
    foils: pd.DataFrame | None,
    prefix: int | None,
    *,
    asker: str,
) -> Texts:
    """Encode items and foils, cut to the context; items too short are dropped, counted and named.

    Raises:
        InputError: ``prefix`` below 1, no item long enough, a foil of no item or of one token, two
            foils of a kind for one item.
    """
    if prefix is not None and prefix < 1:
        raise InputError(f"{asker}: prefix is {prefix}, but must be at least 1")
    # as the table has them: a resumed run reads its names back as text
    items = check_items(items).astype({"item": str})
    _, kept = cut_items(model, items, (prefix or 1) + 1, asker=asker)
    tokens = [each[: model.context] for each in model.encode(kept["text"].tolist())]
    half = np.array([len(each) // 2 for each in tokens])
    prompt = half if prefix is None else np.full(len(tokens), prefix)
    pairs = None
    if foils is not None:
        _refuse_foils(items, foils, asker)
        foils = foils.astype({"item": str})
        pairs = foils[foils["item"].isin(kept["item"])].reset_index(drop=True)
        said = [each[: model.context] for each in model.encode(pairs["text"].tolist())]
        short = [i for i, each in enumerate(said) if len(each) < 2]
        if short:
            first = pairs.iloc[short[0]]
            raise InputError(
                f"{asker}: the {first['foil']} foil of item {first['item']!r} has "
                f"{len(said[short[0]])} token(s), and at least 2 are needed; leave it out"
            )
        pairs = pairs[["item", "foil"]].assign(at=len(tokens) + np.arange(len(said)))
        tokens = tokens + said
    return Texts(kept, pairs, tokens, prompt)


def _refuse_foils(items: pd.DataFrame, foils: pd.DataFrame, asker: str) -> None:
    lacking = [name for name in ("item", "foil", "text") if name not in foils.columns]
    if lacking:
        raise InputError(
            f"{asker}: the foils have no column {lacking[0]!r}; make_foils gives item, foil and text"
        )
    refuse_strange_foils(items, foils, asker=asker)


def ask(model: LanguageModel, texts: Texts) -> pd.DataFrame:
    """One forward pass over each text, and all that is measured by it.

    Returns:
        Columns ``item, metric, value, reason`` and, with foils, ``foil``: ``loss``, ``top1`` and
        ``extractable`` of each item, ``loss`` of each foil and ``recognition`` against it. NaN
        with a reason where the model gives no finite number.
    """
    size = len(texts.items)
    loss = np.full(len(texts.tokens), np.nan)
    hits, said = np.full(size, np.nan), np.full(size, np.nan)
    lengths = np.array([len(each) for each in texts.tokens])
    for some in buckets(lengths, PROBE_TOKENS):
        for part, scores in model.score_batches([texts.tokens[i] for i in some]):
            for row, i in enumerate(some[part]):
                text, end = texts.tokens[i], lengths[i] - 1
                loss[i] = -scores.log_probability[row, :end].astype(np.float64).mean()
                if i < size and np.isfinite(loss[i]):
                    right = scores.guess[row, :end] == text[1:]
                    hits[i] = right.mean()
                    # the guess for token t stands at t - 1: the prompt's own guesses are left out
                    said[i] = right[texts.prompt[i] - 1 :].all()
    loss = np.where(np.isfinite(loss), loss.round(DECIMALS), np.nan)  # a tie is a tie
    names = texts.items["item"].to_numpy(dtype=object)
    own = {"loss": loss[:size], "top1": hits, "extractable": said}
    parts = [pd.DataFrame({"item": names, "metric": k, "value": v}) for k, v in own.items()]
    if texts.foils is not None:
        parts = [part.assign(foil=ITSELF) for part in parts]
        foil = loss[texts.foils["at"]]
        beside = texts.foils["item"].map(dict(zip(names, loss[:size], strict=True))).to_numpy()
        known = np.isfinite(beside) & np.isfinite(foil)
        choice = np.where(known, forced_choice(beside, foil), np.nan)
        for metric, value in (("loss", foil), ("recognition", choice)):
            parts.append(texts.foils[["item", "foil"]].assign(metric=metric, value=value))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(reason=np.where(table["value"].isna(), NOT_FINITE, ""))


def probe_texts(
    source: LanguageModel | Checkpoints,
    items: pd.DataFrame,
    *,
    foils: pd.DataFrame | None = None,
    prefix: int | None = None,
) -> pd.DataFrame:
    """What the recorder measures, of a model or of the checkpoints of a run.

    Args:
        source: A model, or checkpoints.
        items: Items frame; texts longer than the context are cut to it.
        foils: Foils of them, from :func:`workbench.foils.make_foils`; None asks no recognition.
        prefix: Tokens of a text that are given where the rest is asked for word for word; None:
            half of each text.

    Returns:
        Table with, for each item and step, ``loss`` (nats per token after the first, 0 at best),
        ``top1`` (share of the same tokens that are the argmax, 1 at best), ``extractable`` (1 if
        all tokens after the prompt are, else 0; 0 by chance). With foils also their ``loss`` and
        ``recognition`` (1 where the item is likelier, 1/2 for a tie), and the coordinate ``foil``.

    Raises:
        InputError: As :func:`cut_texts`, or a model that gives NaN.
    """
    parts, texts = [], None
    for model in source if isinstance(source, Checkpoints) else [source]:
        texts = texts or cut_texts(model, items, foils, prefix, asker="probe_texts")
        found = ask(model, texts)
        if found["value"].isna().any():
            first = found[found["value"].isna()].iloc[0]
            raise InputError(
                f"probe_texts: {first['metric']} of item {first['item']!r} is not a number at step "
                f"{model.step} of {model.run}; the model's weights or its dtype give NaN or Inf"
            )
        parts.append(found.assign(step=model.step))
    table = validate(_assemble(parts, texts.items, model.run).drop(columns="reason"))
    table.attrs = {
        "passport": {**model.passport(), "items": items_hash(items), "prefix": prefix},
        "dropped": texts.items.attrs["dropped"],
    }
    return table


def _assemble(parts: Sequence[pd.DataFrame], items: pd.DataFrame, run: str) -> pd.DataFrame:
    table = pd.concat(parts, ignore_index=True)
    of = items.set_index("item")
    table = table.assign(run=run, lo=np.nan, hi=np.nan, n=1, group=table["item"].map(of["group"]))
    for name in [c for c in RIDES if c in items.columns]:
        table[name] = table["item"].map(of[name])
    return table


# --- while a training runs -----------------------------------------------------------------------


@contextlib.contextmanager
def undisturbed(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients or autocast; every flag and generator as before at the end.

    The flag of each submodule is set and put back by itself: ``train()`` would thaw what its owner
    has frozen, and some modules do more than set a flag when it is called.
    """
    flags = [(each, each.training) for each in module.modules()]
    # accelerate puts its autocast into the module's own forward and the original beside it
    own = vars(module).get("forward")
    plain = vars(module).get("_original_forward")
    device = next(module.parameters()).device
    try:
        for each, _ in flags:
            each.training = False
        if plain is not None:
            module.forward = plain
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        for each, flag in flags:
            each.training = flag
        if plain is not None:
            module.forward = own


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside torch.compile's, accelerate's, DDP's or an adapter's wrapper.

    Raises:
        InputError: There is none inside, or an adapter that works by a learned prompt.
    """
    inner = module
    while True:
        if any(each.is_prompt_learning for each in getattr(inner, "peft_config", {}).values()):
            raise InputError(
                "RetentionRecorder: the adapter is a learned prompt, without which its model is "
                "another; record adapters in the weights, such as LoRA"
            )
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", None), torch.nn.Module):
            inner = inner._orig_mod
        elif hasattr(inner, "get_output_embeddings"):
            return inner
        elif isinstance(getattr(inner, "module", None), torch.nn.Module):
            inner = inner.module
        else:
            raise InputError(
                f"RetentionRecorder: {type(module).__name__} holds no causal model of transformers; "
                "give the module that AutoModelForCausalLM loads"
            )


class RetentionRecorder:
    """Probe lists of texts at geometric lags while a training goes on.

    ``with recorder:`` around the loop makes the first probe and the last; ``recorder.step(update)``
    after each update makes those that are due. Lags count from the start, from each
    :meth:`mark`, from the items' ``cohort`` where they have one, and from the last batch in which
    :meth:`saw` found any of them.

    The training is not touched: not its weights, gradients, optimiser, random numbers, nor the
    mode of any submodule. A probe that would take the time spent on probing above ``budget`` waits
    until there is room; where the next one is due before that, it is left out and said to be. The
    first, the last and the one at a mark are always made.

    Args:
        model: A :class:`LanguageModel`, or the module that is trained (wrapped or not).
        items: Items frame, with groups such as ``studied`` and ``control``; without controls
            drift reads as forgetting. ``cohort``: the update that first holds the item.
        folder: Where table and ledger are kept; the same folder again goes on with them.
        tokenizer: Of the module; a :class:`LanguageModel` brings its own.
        foils: Foils of the items (:func:`make_foils`); None asks no recognition.
        lags: Updates since an origin at which to probe, increasing.
        prefix: As in :func:`probe_texts`.
        budget: Seconds of probing allowed for one second of training; ``math.inf`` for no bound.
        updates: Updates the training will have, if known: then the time still to come counts, and
            short lags need not wait. A Trainer says so by itself.
        run: Name of the run; None takes the model's, or the folder's.

    Raises:
        InputError: Settings out of range, or items and foils that :func:`cut_texts` refuses.
    """

    def __init__(
        self,
        model: LanguageModel | torch.nn.Module,
        items: pd.DataFrame,
        *,
        folder: str | Path,
        tokenizer=None,
        foils: pd.DataFrame | None = None,
        lags: Sequence[int] = LAGS,
        prefix: int | None = None,
        budget: float = BUDGET,
        updates: int | None = None,
        run: str | None = None,
    ):
        _refuse(lags, budget)
        self.folder = Path(folder).expanduser()
        self.budget, self.updates, self.lags = budget, updates, tuple(int(lag) for lag in lags)
        self._model = _live(model, tokenizer, run or getattr(model, "run", self.folder.name))
        self._texts = cut_texts(self._model, items, foils, prefix, asker="RetentionRecorder")
        self._asked = {
            "items": items_hash(check_items(items)),
            "foils": "" if foils is None else _digest(foils[["item", "foil", "text"]].to_csv()),
            "tokens": _digest("\n".join(" ".join(map(str, each)) for each in self._texts.tokens)),
            "lags": list(self.lags),
            "prefix": prefix,
            "run": self._model.run,
        }
        cohorts = items["cohort"].dropna() if "cohort" in items.columns else []
        self._cohorts = sorted({int(update) for update in cohorts})
        self._needles = _needles(self._texts)
        self._versions = versions()
        self._running = False
        self._forget()

    def _forget(self) -> None:
        self._parts: list[pd.DataFrame] = []
        self._events: list[dict] = []
        self.marks: dict[str, int] = {}
        self._watched, self._seen = False, None
        self._begun = self._update = 0
        self._probing = self._trained = self._cost = 0.0
        self._pending: int | None = None
        self._warned: set[str] = set()

    # --- the training says where it is ---

    def start(
        self,
        update: int = 0,
        *,
        module: torch.nn.Module | None = None,
        updates: int | None = None,
    ) -> RetentionRecorder:
        """Begin, or go on from a checkpoint; what was recorded after it is done again.

        Args:
            update: Updates taken so far: 0, or those of the checkpoint that was loaded.
            module: What is trained, where it is not the one given at first.
            updates: As in the class.

        Raises:
            InputError: The folder holds other settings, items or models, or a finished run.
        """
        self._forget()
        self._take(module)
        self.updates = updates or self.updates
        self._begun = self._update = int(update)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume(int(update))
        self._session = (time.perf_counter(), self._update, self._trained, self._probing)
        self._running = True
        due = self._due(self._update - 1, self._update)
        if not self._parts or (due is not None and self._update not in self.steps):
            self._probe()
        elif self._update not in self.steps:
            self._pending = self._due(self.steps[-1], self._update)
        return self

    def saw(self, input_ids) -> int:
        """Look for the items in a batch of the update to come, and note those it holds.

        An item is found where all its tokens but the first and last stand in one row: those two
        change with what is around them.

        Args:
            input_ids: Token ids, ``[row, pos]``, a tensor, an array or lists.

        Returns:
            How many exposures the batch holds.
        """
        self._refuse_idle("saw")
        began = time.perf_counter()
        if not self._watched:
            self._note({"event": "watched", "update": self._update + 1})
        ids = input_ids.detach().cpu().numpy() if torch.is_tensor(input_ids) else input_ids
        ids = [ids] if np.ndim(ids[0]) == 0 else ids
        found = 0
        for row, each in enumerate(ids):
            for item, offset, tokens in _find(np.asarray(each, dtype=np.int64), *self._needles):
                where = {"update": self._update + 1, "item": item, "row": row, "offset": offset}
                self._note({"event": EXPOSURE, **where, "hash": fingerprint(tokens)})
                found += 1
        self._probing += time.perf_counter() - began
        return found

    def step(
        self, update: int, module: torch.nn.Module | None = None, *, loss: float | None = None
    ) -> None:
        """Say that an update was taken; probes if one is due and the budget has room.

        Args:
            update: Number of updates taken, higher than at the call before; not every one need be
                told.
            module: What is trained, where it is another one than before.
            loss: The training loss; one that is not finite is noted and warned of. The training
                goes on: it is not ours to stop.

        Raises:
            InputError: Not started, or ``update`` is not above the last one.
        """
        self._refuse_idle("step")
        if update <= self._update:
            raise InputError(
                f"step: update {update} after update {self._update}; count upwards, and begin a "
                "resumed training with start(update)"
            )
        self._take(module)
        due = self._due(self._update, int(update))
        self._update = int(update)
        if loss is not None:
            self.check_loss(loss)
        if due is not None:
            self._skip()
            self._pending = due
        if self._pending is not None and self._affordable():
            self._probe()

    def check_loss(self, loss: float) -> None:
        """Note a training loss that is not finite, and warn of the first."""
        if not math.isfinite(loss):
            self._note({"event": "loss", "update": self._update, "loss": str(float(loss))})
            self._warn("loss", f"the training loss is {loss} at update {self._update}")

    def saved(self) -> None:
        """Note that a checkpoint of this update was written, with a fingerprint of the weights.

        A training that goes on from it with other weights is then refused. A Trainer has been seen
        to lose the output head of a GPT-NeoX on the way, without an error.
        """
        self._refuse_idle("saved")
        weights = _fingerprints(self._model.module)
        self._note({"event": "saved", "update": self._update, "weights": weights})

    def mark(self, name: str) -> None:
        """Count lags from here too, under this name, and probe.

        Raises:
            InputError: Not started, or the name stands for another update already.
        """
        self._refuse_idle("mark")
        at = self.marks.get(name, self._update)
        if at != self._update or name == START:
            raise InputError(
                f"mark: {name!r} is update {at} already, this is update {self._update}; give "
                "another name"
            )
        if name not in self.marks:
            self._note({"event": "mark", "update": self._update, "name": name})
        if self._update not in self.steps:
            self._probe()

    def finish(self) -> pd.DataFrame | None:
        """Make the last probe, if it is not made, and write all.

        Returns:
            The table; None where there was never the memory for a probe.
        """
        self._refuse_idle("finish")
        if self._update not in self.steps:
            self._probe()
        if self._watched and self._seen is None:
            self._warn("unseen", "none of the items stood in any batch that was handed to saw()")
        self._write(finished=True)
        self._trained = self._trained_now()
        self._running = False
        return self.table if self._parts else None

    def __enter__(self) -> RetentionRecorder:
        return self if self._running else self.start()

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.finish()
        self._running = False  # what was recorded before an error is on disk

    # --- what it knows ---

    @property
    def steps(self) -> list[int]:
        """Updates at which a probe was made."""
        return [int(part["step"].iloc[0]) for part in self._parts]

    @property
    def exposures(self) -> pd.DataFrame:
        """The ledger: ``update, row, offset, item, hash`` of each exposure that was seen."""
        columns = ["update", "row", "offset", "item", "hash"]
        seen = [{k: e[k] for k in columns} for e in self._events if e["event"] == EXPOSURE]
        return pd.DataFrame(seen, columns=columns)

    @property
    def skipped(self) -> pd.DataFrame:
        """Probes that were due and made later (``made``) or not at all (``made`` missing), and why."""
        return pd.DataFrame(self._late(), columns=["due", "made", "why"]).astype(
            {"due": "Int64", "made": "Int64"}
        )

    def _late(self) -> list[dict]:
        late = [event for event in self._events if event["event"] == "skipped"]
        return [{key: event[key] for key in ("due", "made", "why")} for event in late]

    @property
    def overhead(self) -> float:
        """Seconds of probing for one second of training so far; NaN before any."""
        trained = self._trained_now()
        return self._probing / trained if trained else math.nan

    @property
    def table(self) -> pd.DataFrame:
        """All measurements so far.

        Returns:
            Rows of :func:`probe_texts` at each probe, ``step`` the update, with the coordinates
            ``origin`` and ``since`` (the last mark, or "start", and updates since), ``lag`` and
            ``copies`` (updates since the item's last exposure and how often it was seen; NaN where
            not known). ``.attrs["passport"]`` has settings, seconds, marks and what was skipped.
        """
        if not self._parts:
            raise InputError(
                "table: nothing is recorded yet; begin with start() or `with recorder:`"
            )
        table = validate(self._joined())
        table.attrs["passport"] = self._passport()
        table.attrs["dropped"] = self._texts.items.attrs["dropped"]
        return table

    def _joined(self) -> pd.DataFrame:
        table = _assemble(self._parts, self._texts.items, self._model.run)
        return pd.concat([table, self._clocks(table)], axis=1)

    def _clocks(self, table: pd.DataFrame) -> pd.DataFrame:
        """Origin, updates since it, lag and copies of each row."""
        origins = sorted([(self._begun, START), *((at, name) for name, at in self.marks.items())],
                         key=lambda each: each[0])  # fmt: skip
        step = table["step"].to_numpy()
        place = np.searchsorted([at for at, _ in origins], step, side="right") - 1
        since = step - np.array([at for at, _ in origins])[place]
        clocks = {"origin": [origins[i][1] for i in place], "since": since}
        names = {str(item): code for code, item in enumerate(self._texts.items["item"])}
        code = table["item"].astype(str).map(names).to_numpy(dtype=np.int64)
        met = self.exposures
        far = max(self._update, int(met["update"].max()) if len(met) else 0) + 1
        keys = np.sort(
            met["item"].map(names).to_numpy(np.int64) * far + met["update"].to_numpy(np.int64)
        )
        at = np.searchsorted(keys, code * far + step, side="right")
        copies = at - np.searchsorted(keys, code * far)
        last = np.append(keys, 0)[at - 1] - code * far
        lag = np.where(copies > 0, step - last, np.nan)
        if "cohort" in self._texts.items.columns:
            cohort = self._texts.items["cohort"].to_numpy(dtype=float)[code]
            lag = np.where((copies == 0) & (cohort <= step), step - cohort, lag)
        copies = copies.astype(float) if self._watched else np.nan
        return pd.DataFrame({**clocks, "lag": lag, "copies": copies})

    def _passport(self, finished: bool = False) -> dict:
        return {
            **self._asked,
            **_shape(self._model.module),
            **self._versions,
            "device": str(self._model.device),
            "dtype": str(self._model.module.dtype).removeprefix("torch."),
            "begun": self._begun,
            "updates": self._update,
            "probes": self.steps,
            "marks": self.marks,
            "skipped": self._late(),
            "budget": self.budget if math.isfinite(self.budget) else None,
            "probing_seconds": self._probing,
            "training_seconds": self._trained_now(),
            "cost": self._cost,
            "finished": finished,
        }

    # --- when and how to probe ---

    def _due(self, after: int, until: int) -> int | None:
        """The last update in ``after < update <= until`` at which a lag is reached."""
        found = []
        for origin in (self._begun, *self.marks.values(), *self._cohorts):
            at = bisect.bisect_right(self.lags, until - origin) - 1
            if at >= 0:
                found.append(origin + self.lags[at])
        if self._seen is not None:
            at = bisect.bisect_right(self.lags, until - self._seen) - 1
            # not lag 0: while the items are trained on, it is always now
            if at >= 0 and self.lags[at]:
                found.append(self._seen + self.lags[at])
        last = max(found, default=after)
        return last if last > after else None

    def _affordable(self) -> bool:
        """Whether one more probe, and the last, stay within the budget."""
        trained = self._trained_now()
        if self.updates is None:
            return self._probing + self._cost <= self.budget * trained
        began, first, _, probed = self._session
        pace = (time.perf_counter() - began - (self._probing - probed)) / (self._update - first)
        whole = trained + pace * max(0, self.updates - self._update)
        last = self._cost * (self._update < self.updates)
        return self._probing + self._cost + last <= self.budget * whole

    def _trained_now(self) -> float:
        if not self._running:
            return self._trained
        began, _, before, probed = self._session
        return before + time.perf_counter() - began - (self._probing - probed)

    def _probe(self) -> None:
        device = self._model.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the training's own work is not ours
        began = time.perf_counter()
        try:
            with undisturbed(self._model.module):
                found = ask(self._model, self._texts)
            self._keep(found)
        except torch.OutOfMemoryError as error:
            reason = " ".join(str(error).split())[:120]
            self._warn("memory", f"no memory for a probe at update {self._update} ({reason})")
            self._pending = self._update if self._pending is None else self._pending
            self._skip(why="out of memory")
        finally:
            spent = time.perf_counter() - began
            self._probing += spent
            self._cost = min(self._cost or spent, spent)  # a cold or crowded moment is no measure

    def _keep(self, found: pd.DataFrame) -> None:
        if found["value"].isna().any():
            first = found[found["value"].isna()].iloc[0]
            self._warn(
                "value",
                f"{first['metric']} of item {first['item']!r} is not a number at update "
                f"{self._update}: {NOT_FINITE}",
            )
        if self._pending not in (None, self._update):
            self._skip(made=self._update)
        self._pending = None
        self._parts.append(found.assign(step=self._update))
        self._write()

    def _skip(self, *, made: int | None = None, why: str = "budget") -> None:
        """Note that the probe that is due comes later, or not at all."""
        if self._pending is not None:
            note = {"due": self._pending, "made": made, "why": why}
            self._note({"event": "skipped", "update": self._update, **note})
            self._pending = None

    def _take(self, module: torch.nn.Module | None) -> None:
        if module is not None and (inner := unwrapped(module)) is not self._model.module:
            self._model.module, self._model._own_head = inner, {}

    def _refuse_idle(self, asker: str) -> None:
        if not self._running:
            raise InputError(
                f"{asker}: the recorder is not running; call start(), or put the loop in `with recorder:`"
            )

    def _warn(self, kind: str, what: str) -> None:
        """Once a kind: a training of a million updates must not print a million lines."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"RetentionRecorder: {what}; the training goes on", stacklevel=4)

    # --- on disk ---

    def _refuse_other_weights(self, update: int) -> None:
        saved = [e for e in self._events if e["event"] == "saved" and e["update"] == update]
        if not saved:
            return
        now = _fingerprints(self._model.module)
        other = [name for name, value in saved[-1]["weights"].items() if now.get(name) != value]
        if other:
            raise InputError(
                f"RetentionRecorder: {len(other)} of {len(now)} parameters are not those that were "
                f"saved at update {update} (first: {other[0]}); the checkpoint was not read back "
                "whole, so that this would be another training: load its weights, or give another "
                "folder"
            )

    def _know(self, event: dict) -> None:
        self._events.append(event)
        if event["event"] == "mark":
            self.marks[event["name"]] = event["update"]
        self._seen = event["update"] if event["event"] == EXPOSURE else self._seen
        self._watched = self._watched or event["event"] == "watched"

    def _note(self, event: dict) -> None:
        self._know(event)
        try:
            with (self.folder / LEDGER).open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            self._warn("disk", f"cannot write to {self.folder} ({error.strerror})")

    def _write(self, *, finished: bool = False) -> None:
        if not self._parts:
            return
        try:
            save(self._joined(), self.folder / TABLE, passport=self._passport(finished))
        except OSError as error:
            self._warn("disk", f"cannot write to {self.folder} ({error.strerror})")

    def _resume(self, update: int) -> None:
        """Take over what a run before this one recorded up to ``update``, and nothing later."""
        for left_over in self.folder.glob(f".{TABLE}.*"):
            left_over.unlink(missing_ok=True)  # of a run that was killed while it wrote
        place = self.folder / TABLE
        if not place.is_file():
            (self.folder / LEDGER).unlink(missing_ok=True)  # of a run killed before its first probe
            return
        table = load(place)
        before = table.attrs["passport"]
        for name, now in {**self._asked, **_shape(self._model.module)}.items():
            if before.get(name) != now:
                raise InputError(
                    f"RetentionRecorder: {self.folder} was begun with {name} {_brief(before.get(name))}, "
                    f"now it is {_brief(now)}; go on with the same, or give another folder"
                )
        if before["finished"] and update < before["updates"]:
            raise InputError(
                f"RetentionRecorder: {self.folder} holds a finished run of {before['updates']} "
                f"updates, and this one is at {update}; give another folder, or start(update="
                f"{before['updates']}) to go on"
            )
        self._begun = before["begun"]
        self._probing, self._trained = before["probing_seconds"], before["training_seconds"]
        self._cost = before["cost"]
        kept = table[table["step"] <= update]
        columns = [name for name in MEASURED if name in kept.columns]
        kept = kept[columns].astype({n: object for n in columns if n not in ("step", "value")})
        self._parts = [part.reset_index(drop=True) for _, part in kept.groupby("step")]
        for event in _read_ledger(self.folder / LEDGER):
            if event["update"] <= update:
                self._know(event)
        self._refuse_other_weights(update)
        with whole_file(self.folder / LEDGER) as temporary:
            lines = (json.dumps(event) + "\n" for event in self._events)
            temporary.write_text("".join(lines), encoding="utf-8")


def _fingerprints(module: torch.nn.Module) -> dict[str, str]:
    """A hash of some of the values of each parameter: another training's differ in all of them."""
    found = {}
    for name, tensor in module.named_parameters():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous().view(torch.uint8)
        found[name] = hashlib.blake2b(some.numpy().tobytes(), digest_size=4).hexdigest()
    return found


def _refuse(lags: Sequence[int], budget: float) -> None:
    whole = all(float(lag).is_integer() and lag >= 0 for lag in lags)
    if not len(lags) or not whole or any(b <= a for a, b in pairwise(lags)):
        raise InputError(
            f"RetentionRecorder: lags are {list(lags)}; give whole numbers from 0 up, increasing, "
            "such as 0, 1, 2, 5, 10"
        )
    if not budget > 0:
        raise InputError(
            f"RetentionRecorder: budget is {budget}; give the share of the training's time that "
            "probing may add, such as 0.1"
        )


def _live(model: LanguageModel | torch.nn.Module, tokenizer, run: str) -> LanguageModel:
    """A view of the module in training."""
    if isinstance(model, LanguageModel):
        return LanguageModel(unwrapped(model.module), model.tokenizer, run=run, bos=model.bos)
    if tokenizer is None:
        raise InputError(
            "RetentionRecorder: a module does not know its tokenizer; give tokenizer=..."
        )
    return LanguageModel(unwrapped(model), tokenizer, run=run, bos=bos_of(tokenizer))


def _needles(texts: Texts) -> tuple[int, dict[int, list]]:
    """What is looked for in a batch: the length of the anchor, and the items by their anchor's hash."""
    inner = []
    for item, tokens in zip(texts.items["item"], texts.tokens, strict=False):
        ends = len(tokens) >= ANCHOR + 2
        inner.append((str(item), tokens[1:-1] if ends else tokens, int(ends)))
    width = min(ANCHOR, *(len(tokens) for _, tokens, _ in inner))
    by_hash: dict[int, list] = {}
    for each in inner:
        by_hash.setdefault(int(_rolling(each[1][:width], width)[0]), []).append(each)
    return width, by_hash


def _rolling(tokens: Int[np.ndarray, " pos"], width: int) -> Int[np.ndarray, " start"]:
    """A hash of each run of ``width`` tokens; equal runs have equal hashes."""
    starts = len(tokens) - width + 1
    total = np.zeros(max(0, starts), dtype=np.uint64)
    for at in range(width if starts > 0 else 0):
        total = total * np.uint64(6364136223846793005) + tokens[at : at + starts].astype(np.uint64)
    return total


def _find(row: Int[np.ndarray, " pos"], width: int, by_hash: dict) -> Iterator[tuple]:
    """Item, offset of its first token and the tokens found, for each occurrence in a row."""
    rolled = _rolling(row, width)
    for at in np.flatnonzero(np.isin(rolled, np.array(list(by_hash), dtype=np.uint64))):
        for item, tokens, lead in by_hash[int(rolled[at])]:
            if np.array_equal(row[at : at + len(tokens)], tokens):
                yield item, int(at) - lead, tokens


def _shape(module: torch.nn.Module) -> dict:
    """How many parameters a model has, and a hash of their names and shapes."""
    named = [(name, tuple(each.shape)) for name, each in module.named_parameters()]
    return {"parameters": sum(math.prod(s) for _, s in named), "shape": _digest(repr(named))}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _brief(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_ledger(path: Path) -> list[dict]:
    """Whole lines of a ledger; a last one that was cut short when the run was killed is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


class RetentionCallback(TrainerCallback):
    """A :class:`RetentionRecorder` for transformers' Trainer: ``Trainer(callbacks=[...])``.

    Resumed by ``resume_from_checkpoint`` the table goes on from the checkpoint. In training over
    several processes the first one records.

    Args:
        recorder: What to record; the Trainer tells it the module and the number of updates.
        watch: Look for the items in the batches that go through the model, for lags and copies.
    """

    def __init__(self, recorder: RetentionRecorder, *, watch: bool = True):
        self.recorder, self.watch = recorder, watch
        self._hook = None

    def on_train_begin(self, args, state, control, *, model, **rest):
        if not state.is_world_process_zero:
            return
        self._unhook()  # of a training that was broken off
        if self.watch:
            inner = unwrapped(model)
            self._hook = inner.register_forward_pre_hook(self._saw, with_kwargs=True)
        updates = state.max_steps if state.max_steps > 0 else None
        self.recorder.start(state.global_step, module=model, updates=updates)

    def _saw(self, module, positional, named):
        ids = named.get("input_ids", positional[0] if positional else None)
        if module.training and ids is not None and self.recorder._running:
            self.recorder.saw(ids)

    def on_step_end(self, args, state, control, *, model, **rest):
        if state.is_world_process_zero:
            self.recorder.step(state.global_step, model)

    def on_save(self, args, state, control, **rest):
        if state.is_world_process_zero:
            self.recorder.saved()

    def on_log(self, args, state, control, *, logs=None, **rest):
        if state.is_world_process_zero and self.recorder._running and "loss" in (logs or {}):
            self.recorder.check_loss(float(logs["loss"]))

    def on_train_end(self, args, state, control, **rest):
        self._unhook()
        if state.is_world_process_zero:
            self.recorder.finish()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
