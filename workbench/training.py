"""One training loop: a schedule of exposures in, checkpoints and an exposure ledger out.

Updates are numbered from 1: update ``u`` trains on batch ``u``, and the checkpoint at step ``u``
is taken right after it. So a checkpoint at step ``s`` has seen an item exactly if the item stood
in a batch ``u <= s``. Batches come from a function of the update number and nothing else; that is
what lets two runs share everything but the planted items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from workbench.table import InputError, whole_file

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01
CLIP = 1.0  # gradient norm
SCHEDULE = ("update", "row", "offset", "item")


@dataclass(frozen=True)
class TextStream:
    """Rows of text as a function of the update: windows without overlap, shuffled every epoch.

    Attributes:
        tokens: The corpus as one sequence of ids.
        rows: Rows of a batch.
        context: Tokens of a row.
        seed: Of the shuffle.
    """

    tokens: Int[np.ndarray, " token"]
    rows: int
    context: int
    seed: int

    def __post_init__(self):
        if len(self.tokens) < self.rows * self.context:
            raise InputError(
                f"TextStream: {len(self.tokens)} tokens of text do not fill one batch of "
                f"{self.rows} x {self.context}; give a longer text"
            )

    def batch(self, update: int) -> Int[np.ndarray, "row pos"]:
        """The batch of one update, numbered from 1."""
        windows = len(self.tokens) // self.context
        per_epoch = windows // self.rows
        epoch, place = divmod(update - 1, per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(windows)
        chosen = order[place * self.rows : (place + 1) * self.rows]
        return self.tokens[: windows * self.context].reshape(windows, -1)[chosen].copy()


def schedule_exposures(
    items: pd.DataFrame, *, rows: int, context: int, length: int, seed: int
) -> pd.DataFrame:
    """Place every exposure of every item in an update, a row and an offset.

    Exposures of an item are spread evenly over ``first..last`` and the final one falls on
    ``last``. Slots of an update are drawn without replacement, so no two exposures overlap.

    Args:
        items: Columns ``item``, ``first``, ``last`` (updates) and ``dose`` (exposures in all).
        rows, context: Shape of a batch.
        length: Tokens of an item; a row holds ``context // length`` slots.

    Returns:
        Columns ``update, row, offset, item``, ordered by them.

    Raises:
        InputError: More exposures in an update than there are slots.
    """
    planned = []
    for each in items.itertuples():
        updates = spread(int(each.first), int(each.last), int(each.dose))
        planned.append(pd.DataFrame({"update": updates, "item": each.item}))
    plan = pd.concat(planned).sort_values(["update", "item"], kind="stable", ignore_index=True)
    per_row = context // length
    placed = []
    for update, part in plan.groupby("update"):
        if len(part) > rows * per_row:
            raise InputError(
                f"schedule_exposures: update {update} would hold {len(part)} exposures, a batch "
                f"has {rows * per_row} slots; plant fewer, or over more updates"
            )
        slots = np.random.default_rng([seed, int(update)]).permutation(rows * per_row)[: len(part)]
        placed.append(part.assign(row=slots // per_row, offset=slots % per_row * length))
    out = pd.concat(placed)[list(SCHEDULE)]
    return out.sort_values(["update", "row", "offset"], ignore_index=True)


def spread(first: int, last: int, dose: int) -> Int[np.ndarray, " exposure"]:
    """``dose`` updates, evenly over ``first..last`` (both may be used), the final one on ``last``.

    A single exposure falls on ``last``; more than there are updates share them as evenly as can be.
    """
    width = last - first + 1
    return last - np.arange(dose)[::-1] * width // dose


def fingerprint(tokens: Int[np.ndarray, " pos"]) -> str:
    """Eight hexadecimal digits of a token sequence, as the ledger records them."""
    data = np.ascontiguousarray(tokens, dtype="<i8").tobytes()
    return hashlib.blake2b(data, digest_size=4).hexdigest()


def plant(
    batch: Int[np.ndarray, "row pos"],
    exposures: pd.DataFrame,
    texts: Mapping[str, Int[np.ndarray, " pos"]],
) -> Int[np.ndarray, "row pos"]:
    """A copy of the batch that holds the items in their slots."""
    batch = batch.copy()
    for each in exposures.itertuples():
        tokens = texts[each.item]
        batch[each.row, each.offset : each.offset + len(tokens)] = tokens
    return batch


def read_ledger(
    batch: Int[np.ndarray, "row pos"],
    exposures: pd.DataFrame,
    texts: Mapping[str, Int[np.ndarray, " pos"]],
) -> pd.DataFrame:
    """Read back, from the very batch that is trained on, what the schedule says it holds.

    Raises:
        RuntimeError: The batch holds something else; an injection that does not happen must not
            pass as one.
    """
    found = []
    for each in exposures.itertuples():
        there = batch[each.row, each.offset : each.offset + len(texts[each.item])]
        found.append(fingerprint(there))
        if found[-1] != fingerprint(texts[each.item]):
            raise RuntimeError(
                f"train: update {each.update} should hold {each.item} at row {each.row}, "
                f"offset {each.offset}, but the batch holds other tokens there"
            )
    return exposures.assign(hash=found)


@dataclass
class Trainer:
    """A module, its optimiser, and how far it has come; what is forked when two runs part.

    AdamW with linear warm-up to a constant rate, gradients clipped at norm 1.
    """

    module: torch.nn.Module
    learning_rate: float
    warmup: int = 0
    update: int = 0

    def __post_init__(self):
        self.module.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=self.learning_rate,
            betas=BETAS,
            weight_decay=WEIGHT_DECAY,
            fused=True,
        )

    def state(self) -> dict:
        """A copy of weights, optimiser state and position, to resume or fork from."""
        weights = {k: v.detach().clone() for k, v in self.module.state_dict().items()}
        moments = self.optimizer.state_dict()
        moments["state"] = {
            k: {n: t.detach().clone() for n, t in v.items()} for k, v in moments["state"].items()
        }
        return {"weights": weights, "optimizer": moments, "update": self.update}

    def restore(self, state: dict) -> None:
        """Go on from what :meth:`state` gave, which stays untouched."""
        self.module.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        for moments in self.optimizer.state.values():
            for name, tensor in moments.items():
                moments[name] = tensor.clone()  # load_state_dict shares tensors of equal dtype
        self.update = state["update"]

    def step(self, batch: Int[np.ndarray, "row pos"], weight=None) -> float:
        """One update; returns the batch's mean loss in nats per predicted token, before it.

        Args:
            weight: ``[row, pos]``, 1 for real tokens and 0 for padding; None: all are real.

        Raises:
            FloatingPointError: The loss is not finite; the weights were not touched.
        """
        device = next(self.module.parameters()).device
        self.update += 1
        rate = self.learning_rate * min(1.0, self.update / self.warmup if self.warmup else 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = sequence_loss(
            self.module,
            torch.as_tensor(batch, device=device),
            None if weight is None else torch.as_tensor(weight, device=device),
        )
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"train: the loss is {loss.item()} at update {self.update}; lower the learning rate"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        self.optimizer.step()
        return float(loss.detach())


def save_states(path: Path, states: Mapping[str, dict], *, about: Mapping | None = None) -> None:
    """Write what :meth:`Trainer.state` gave into one safetensors file, whole or not at all.

    Args:
        path: The file.
        states: States by name; one name for each fork.
        about: What JSON can hold, to know the run by when it is resumed.
    """
    tensors, header = {}, {}
    for fork, state in states.items():
        moments = state["optimizer"]
        header[fork] = {"update": state["update"], "param_groups": moments["param_groups"]}
        tensors |= {f"{fork}/weights//{name}": t for name, t in state["weights"].items()}
        for index, kept in moments["state"].items():
            tensors |= {f"{fork}/optimizer/{index}/{name}": t for name, t in kept.items()}
    metadata = {"states": json.dumps(header), "about": json.dumps(dict(about or {}))}
    with whole_file(path) as temporary:
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, temporary, metadata)


def load_states(path: Path) -> tuple[dict[str, dict], dict]:
    """Read what :func:`save_states` wrote: the states by name, and what was said about them.

    Raises:
        InputError: The file is not one of those, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            header, about = json.loads(metadata["states"]), json.loads(metadata["about"])
            states = {
                fork: {
                    "weights": {},
                    "optimizer": {"state": {}, "param_groups": kept["param_groups"]},
                    "update": kept["update"],
                }
                for fork, kept in header.items()
            }
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                fork, part, index, name = key.split("/", 3)
                held = states[fork][part]
                if part == "optimizer":
                    held = held["state"].setdefault(int(index), {})
                held[name] = file.get_tensor(key)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"load_states: {path} cannot be read ({reason})") from None
    return states, about


def sequence_loss(
    module: torch.nn.Module, ids: Int[torch.Tensor, "row pos"], weight: torch.Tensor | None = None
) -> Float[torch.Tensor, ""]:
    """Mean cross-entropy in nats over predicted tokens; ``weight`` 0 leaves a token out."""
    logits = module(input_ids=ids, use_cache=False).logits[:, :-1].float()
    targets = ids[:, 1:]
    if weight is not None:
        targets = targets.masked_fill(weight[:, 1:] == 0, -100)  # cross_entropy's ignore_index
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(
    trainer: Trainer,
    stream: Callable[[int], Int[np.ndarray, "row pos"]],
    *,
    until: int,
    exposures: pd.DataFrame | None = None,
    texts: Mapping[str, Int[np.ndarray, " pos"]] | None = None,
    stops: Iterable[int] = (),
    at_stop: Callable[[int], None] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> pd.DataFrame:
    """Train from where the trainer stands to update ``until``.

    Args:
        stream: The batch of an update, such as :meth:`TextStream.batch`.
        exposures: Columns ``update, row, offset, item``: what is planted over the batch, and where.
        texts: Token ids of each planted item.
        stops: Steps at which ``at_stop(step)`` is called; the step a run starts from counts.
        progress: Called with (update, loss) after each update.

    Returns:
        The ledger: the exposures that happened, read back from the batches, with their hashes.

    Raises:
        RuntimeError: A batch did not hold what the schedule said.
        FloatingPointError: The loss was not finite.
    """
    empty = pd.DataFrame(columns=list(SCHEDULE))
    exposures = empty if exposures is None else exposures
    due = dict(list(exposures.groupby("update")))
    stops, ledger = set(stops), []
    if trainer.update in stops and at_stop:
        at_stop(trainer.update)
    trainer.module.train()
    while trainer.update < until:
        update = trainer.update + 1
        batch = stream(update)
        if update in due:
            batch = plant(batch, due[update], texts)
            ledger.append(read_ledger(batch, due[update], texts))
        loss = trainer.step(batch)
        if progress:
            progress(update, loss)
        if update in stops and at_stop:
            trainer.module.eval()
            at_stop(update)
            trainer.module.train()
    trainer.module.eval()
    return pd.concat(ledger, ignore_index=True) if ledger else empty.assign(hash="")
