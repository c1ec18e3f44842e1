"""The diagonal of the Fisher information, and weights dampened by the ratio of two of them.

Kirkpatrick et al. (2017), "Overcoming catastrophic forgetting in neural networks": how much a
weight matters to a text is the mean square of its gradient over **examples**. Foster et al. (2024),
"Fast machine unlearning without retraining through selective synaptic dampening": weights that
matter far more to what is to be forgotten than to everything are made smaller.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from workbench import factors
from workbench.factors import (
    LABELS,
    TEXTS_HASH,
    Layer,
    frozen,
    gradients_seen,
    padded,
    sampled_labels,
    summed_loss,
    texts_hash,
    usable_lengths,
    with_full_digits,
)
from workbench.models import LanguageModel, buckets
from workbench.table import InputError, whole_file

EXAMPLES = ("sequence", "token")
CHECK_TOLERANCE = 1e-3  # relative; rounding is far below, a wrong route far above
SETTINGS = ("weights", "example", "labels", "seed")  # in which shards must agree
COMPARABLE = ("weights", "example", "labels")  # in which two Fishers must agree to be compared


@dataclass(frozen=True)
class Fisher:
    """Sums of squared per-example gradients, by the parameter's name, and of how many examples.

    Attributes:
        sums: One tensor a parameter, of its shape; never negative.
        examples: Sequences or tokens, as the passport's ``example`` says.
        passport: The model's, and ``example``, ``labels``, ``seed``, ``texts`` (a hash that does
            not depend on their order), ``sequences`` and ``tokens`` (predicted ones).
    """

    sums: Mapping[str, torch.Tensor] = field(repr=False)
    examples: int
    passport: Mapping[str, object]

    @cached_property
    def diagonal(self) -> dict[str, torch.Tensor]:
        """The mean of the squares, in squared nats per squared weight; 0 where nothing matters."""
        return {name: total / self.examples for name, total in self.sums.items()}


@dataclass(frozen=True)
class _Batch:
    """Examples that run together; each is a row, and its loss is summed over its own mask."""

    ids: Int[torch.Tensor, "item pos"]
    targets: Int[torch.Tensor, "item pos"]
    mask: Bool[torch.Tensor, "item pos"]
    labels: str
    seed: int

    def __getitem__(self, rows: slice | list[int]) -> _Batch:
        return _Batch(self.ids[rows], self.targets[rows], self.mask[rows], self.labels, self.seed)

    def loss(self, model: LanguageModel) -> Float[torch.Tensor, ""]:
        return summed_loss(model, self.ids, self.targets, self.mask, self.labels, self.seed)


def diagonal_fisher(
    model: LanguageModel,
    texts: pd.DataFrame | Sequence[str] | Sequence[Int[np.ndarray, " pos"]],
    *,
    example: str = "sequence",
    labels: str = "sampled",
    seed: int = 0,
    tokens_per_batch: int | None = None,
) -> Fisher:
    """Mean squared gradient of every parameter, example by example; never the batch mean's.

    Kirkpatrick et al. (2017). The square of a mean gradient, which some code takes instead, is
    smaller by up to the batch size, and tends to 0 at a minimum. A linear layer's gradient of one
    example is ``sum g a^T`` over its positions, so a batch needs one backward pass; embeddings and
    norms go the same way. On the first examples each parameter is checked against autograd: those
    that fail (tied weights, layers that run twice) are done one example at a time, which is said.

    Args:
        texts: An items frame, texts, or token ids as ``model.encode`` gives them; at least 2 each.
        example: ``sequence`` squares the gradient of a text's summed loss, in which its tokens
            may cancel; ``token`` that of each predicted token's own loss, through all positions
            before it: as many passes as texts have tokens, on half their length.
        labels: ``sampled`` from the model (the true Fisher) or ``gold``, the text's own next
            tokens (the empirical Fisher, which is 0 for a text known by heart).
        seed: Of the sampling, keyed with each text's content: batching and order change nothing.
        tokens_per_batch: Positions run together; None takes what suits the device.

    Returns:
        Sums in float32 (float64 where the weights are), with counts and passport.

    Raises:
        InputError: Unknown arguments, no texts, texts too short or too long, quantised weights,
            or a gradient that is not finite (the parameter and the batch are named).
    """
    _refuse_options(example, labels, tokens_per_batch)
    tokens = _usable_tokens(model, texts)
    passport = model.passport()  # of the weights that came, not of a copy in float32
    model = with_full_digits(model, "diagonal_fisher")
    budget = tokens_per_batch or factors.tokens_per_batch(model)
    kind = torch.float64 if model.module.dtype == torch.float64 else torch.float32
    sums = {
        name: torch.zeros_like(each, dtype=kind, requires_grad=False)
        for name, each in model.module.named_parameters()
    }
    examples, together, alone = 0, None, ()
    with frozen(model.module):
        for number, batch in enumerate(_batches(model, tokens, example, labels, seed, budget)):
            if together is None:
                # twice the same where there is one: what mixes examples shows only among several
                together, alone = _routes(model, batch[[0, -1]])
            if together:
                _add_together(model, batch, together, sums)
            if alone:
                _add_alone(model, batch, alone, sums)
            examples += len(batch.ids)
            _refuse_undefined(sums, number)
    return Fisher(
        sums=sums,
        examples=examples,
        passport=passport
        | {
            "example": example,
            "labels": labels,
            "seed": seed,
            "texts": texts_hash(tokens),
            "sequences": len(tokens),
            "tokens": sum(len(each) - 1 for each in tokens),
        },
    )


def _refuse_options(example: str, labels: str, tokens_per_batch: int | None) -> None:
    for what, given, known in (("example", example, EXAMPLES), ("labels", labels, LABELS)):
        if given not in known:
            raise InputError(f"diagonal_fisher: {what} {given!r}; choose from {', '.join(known)}")
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise InputError(
            f"diagonal_fisher: tokens_per_batch is {tokens_per_batch}, needs at least 1"
        )


def _usable_tokens(model: LanguageModel, texts) -> list[Int[np.ndarray, " pos"]]:
    texts = list(texts["text"]) if isinstance(texts, pd.DataFrame) else list(texts)
    if not texts:
        raise InputError("diagonal_fisher: got no texts, needs at least one of two tokens")
    tokens = model.encode(texts) if isinstance(texts[0], str) else [np.asarray(t) for t in texts]
    usable_lengths(model, tokens, "diagonal_fisher")
    for name, each in model.module.named_parameters():
        if not each.is_floating_point():
            raise InputError(
                f"diagonal_fisher: {name} holds {each.dtype} weights, which have no gradient; "
                "load the model without quantisation"
            )
    return tokens


def _batches(model, tokens, example: str, labels: str, seed: int, budget: int) -> Iterator[_Batch]:
    for index in buckets(np.array([len(each) for each in tokens]), budget):
        ids, targets, mask = padded(model, [tokens[i] for i in index])
        if example == "sequence":
            yield _Batch(ids, targets, mask, labels, seed)
            continue
        if labels == "sampled":
            with torch.no_grad():
                logits = model.module(input_ids=ids, use_cache=False).logits
            targets = sampled_labels(logits, ids, targets, mask, seed)
        # one row a predicted token, which sees what stands before it: the rest need not be run
        rows, places = mask.nonzero(as_tuple=True)
        for few in buckets(places.cpu().numpy() + 1, budget):
            row, place = rows[few], places[few]
            width = int(place.max()) + 1
            own = torch.arange(width, device=place.device) == place[:, None]
            yield _Batch(ids[row, :width], targets[row, :width], own, "gold", seed)


# Two routes to the sum of squared per-example gradients


def _add_alone(
    model: LanguageModel, batch: _Batch, names: Sequence[str], sums: Mapping[str, torch.Tensor]
) -> None:
    """By the definition: one example, one backward pass."""
    parameters = [model.module.get_parameter(name) for name in names]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for row in range(len(batch.ids)):
            loss = batch[row : row + 1].loss(model)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    sums[name].add_(gradient.to(sums[name].dtype).square())
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _add_together(
    model: LanguageModel,
    batch: _Batch,
    layers: Sequence[Layer],
    sums: Mapping[str, torch.Tensor],
) -> None:
    """One backward pass a batch; each example's gradient is put together from its positions."""

    def see(layer: Layer, given: torch.Tensor, gradient: torch.Tensor) -> None:
        before = f"{layer.name}." if layer.name else ""
        with torch.no_grad():
            for own, index, each in _gradients(layer.module, given, gradient):
                total = sums[before + own]
                square = each.to(total.dtype).square()
                if index is None:
                    total.add_(square)
                else:
                    total.index_add_(0, index, square)

    with gradients_seen(layers, see):
        batch.loss(model).backward()


def _gradients(
    module: torch.nn.Module, given: torch.Tensor, gradient: Float[torch.Tensor, "item pos ..."]
) -> Iterator[tuple[str, torch.Tensor | None, torch.Tensor]]:
    """Each example's gradient of a module's parameters, and the rows it is of (None: all).

    One example's is alive at a time: nothing of size items x out x in is made.
    """
    if isinstance(module, torch.nn.Embedding):
        for ids, each in zip(given, gradient, strict=True):
            index, place = ids.unique(return_inverse=True)
            total = each.new_zeros(len(index), each.shape[-1]).index_add_(0, place, each)
            yield "weight", index, total
    elif isinstance(module, (torch.nn.Linear, Conv1D)):
        if given.dim() != 3:  # positions of all examples in one row, as experts take them
            return
        for a, g in zip(given, gradient, strict=True):
            yield "weight", None, a.T @ g if isinstance(module, Conv1D) else g.T @ a
            if module.bias is not None:
                yield "bias", None, g.sum(0)
    elif all(p.shape == gradient.shape[-1:] for p in module.parameters()):
        zeros = {name: torch.zeros_like(each) for name, each in module.named_parameters()}
        ones = zeros | {"weight": torch.ones_like(module.weight)}
        # a norm is affine in its weight, whether that is w or 1 + w
        slope, start = (torch.func.functional_call(module, p, (given,)) for p in (ones, zeros))
        for a, g in zip(slope - start, gradient, strict=True):
            yield "weight", None, (g * a).flatten(0, -2).sum(0)
            if "bias" in zeros:
                yield "bias", None, g.flatten(0, -2).sum(0)


def _candidates(module: torch.nn.Module) -> list[Layer]:
    """Modules whose parameters may go by :func:`_gradients`; nothing that is tied."""
    shared = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    found = []
    for name, each in module.named_modules():
        own = dict(each.named_parameters(recurse=False))
        if not own or list(each.children()) or any(shared.count(id(p)) > 1 for p in own.values()):
            continue
        if isinstance(each, torch.nn.Embedding):
            # whose gradient is not the sum over its positions
            known = each.padding_idx is None and not each.scale_grad_by_freq
        elif isinstance(each, (torch.nn.Linear, Conv1D)):
            known = set(own) <= {"weight", "bias"}
        else:
            known = "weight" in own and set(own) <= {"weight", "bias"}
            known = known and all(p.dim() == 1 for p in own.values())
        if known:
            found.append(Layer(name, 0, "", each))
    return found


def _routes(model: LanguageModel, batch: _Batch) -> tuple[list[Layer], list[str]]:
    """Modules that go together, and names of the parameters that must go one example at a time."""
    candidates = _candidates(model.module)
    names = [name for name, _ in model.module.named_parameters()]
    fast, slow = (
        {name: torch.zeros_like(each) for name, each in model.module.named_parameters()}
        for _ in range(2)
    )
    _add_alone(model, batch, names, slow)
    _refuse_undefined(slow, 0)
    if candidates:
        _add_together(model, batch, candidates, fast)
    together = []
    for layer in candidates:
        own = [f"{layer.name}.{n}".lstrip(".") for n, _ in layer.module.named_parameters()]
        gaps = [(fast[n] - slow[n]).norm() <= CHECK_TOLERANCE * slow[n].norm() for n in own]
        if all(gaps):
            together.append(layer)
            names = [name for name in names if name not in own]
    if names:
        warnings.warn(
            f"diagonal_fisher: {len(names)} parameters (first: {names[0]}) are tied, or used in a "
            "way that examples cannot share; they go one example at a time, which is slower",
            stacklevel=3,
        )
    return together, names


def _refuse_undefined(sums: Mapping[str, torch.Tensor], batch: int) -> None:
    finite = torch.stack([each.isfinite().all() for each in sums.values()]).cpu().numpy()
    if not finite.all():
        raise InputError(
            f"diagonal_fisher: the gradient of {list(sums)[int(finite.argmin())]} is not finite "
            f"in batch {batch}; the weights hold NaN or Inf, or the squares overflow"
        )


# Shards


def merge_fishers(shards: Sequence[Fisher]) -> Fisher:
    """One Fisher of shards that were made of other texts, with the same settings.

    Raises:
        InputError: No shards, shards of other weights, examples, labels or seed (the difference
            is named), or the same texts twice.
    """
    if not shards:
        raise InputError("merge_fishers: got no shards, needs at least one")
    first, seen = shards[0], {}
    for number, shard in enumerate(shards):
        _refuse_difference("merge_fishers", SETTINGS, f"shard {number}", shard, "shard 0", first)
        twin = seen.setdefault(shard.passport["texts"], number)
        if twin != number:
            raise InputError(
                f"merge_fishers: shards {twin} and {number} hold the same texts; give each once"
            )
    passports = [shard.passport for shard in shards]
    hashes = sum(int(each["texts"], 16) for each in passports)
    return Fisher(
        sums={name: sum(shard.sums[name] for shard in shards) for name in first.sums},
        examples=sum(shard.examples for shard in shards),
        passport={
            **first.passport,
            "texts": f"{hashes % TEXTS_HASH:016x}",
            "sequences": sum(each["sequences"] for each in passports),
            "tokens": sum(each["tokens"] for each in passports),
        },
    )


def _refuse_difference(
    asker: str, keys: Sequence[str], name: str, one: Fisher, other_name: str, other: Fisher
) -> None:
    for key in keys:
        if one.passport[key] != other.passport[key]:
            raise InputError(
                f"{asker}: {name} was made with {key} {one.passport[key]}, {other_name} with "
                f"{other.passport[key]}; make both alike"
            )


def save_fisher(fisher: Fisher, path: str | os.PathLike) -> None:
    """Write one safetensors file, whole or not at all; counts and passport as JSON in its header."""
    about = json.dumps({"examples": fisher.examples, "passport": dict(fisher.passport)})
    with whole_file(path) as temporary:
        tensors = {name: each.cpu().contiguous() for name, each in fisher.sums.items()}
        save_file(tensors, temporary, {"fisher": about})


def load_fisher(path: str | os.PathLike) -> Fisher:
    """Read what :func:`save_fisher` wrote, onto the CPU.

    Raises:
        InputError: The file is not one of those, or is damaged.
    """
    if not Path(path).is_file():
        raise InputError(f"load_fisher: no file at {path}; save_fisher writes one")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["fisher"])
            sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return Fisher(sums, about["examples"], about["passport"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"load_fisher: {path} is not a whole Fisher file ({reason})") from None


# Selective synaptic dampening


@dataclass(frozen=True)
class Dampening:
    """What a dampening did: the share of all weights that it touched, and of each parameter's."""

    alpha: float
    strength: float
    touched: float
    by_parameter: Mapping[str, float] = field(repr=False)


@contextlib.contextmanager
def dampened(
    model: LanguageModel,
    forget: Fisher,
    everything: Fisher,
    *,
    alpha: float,
    strength: float = 1.0,
) -> Iterator[Dampening]:
    """Shrink the weights that matter most to some texts, for the length of a ``with`` block.

    Foster et al. (2024): where ``I_forget > alpha I_all`` a weight is multiplied by
    ``min(strength I_all / I_forget, 1)``. The weights come back to the bit, also on an exception.

    Args:
        forget, everything: Fishers of the texts to forget and of all texts, made of the weights
            that the model holds now.
        alpha: How many times more a weight must matter; infinity touches nothing, 0 all weights
            that matter to ``forget`` at all. Where all texts include those to forget, as in the
            paper, no ratio exceeds (all examples) / (examples to forget): choose alpha below it.
            Where they do not, weights that only the forgotten use (rows of rare tokens) go to 0
            at any finite alpha.
        strength: Lambda of the paper; 0 removes what is selected, infinity touches nothing.

    Yields:
        The share of weights that were made smaller, from 0 (none) to 1 (all).

    Raises:
        InputError: alpha or strength negative or NaN, or Fishers of other weights, or of unlike
            examples or labels.
    """
    for name, value in (("alpha", alpha), ("strength", strength)):
        if math.isnan(value) or value < 0:
            raise InputError(f"dampened: {name} is {value}; needs a number of at least 0")
    held = model.weights_hash()
    if forget.passport["weights"] != held:
        raise InputError(
            f"dampened: the Fishers were made of weights {forget.passport['weights']}, the model "
            f"holds {held}; make them of these, or leave the edit they are in"
        )
    _refuse_difference("dampened", COMPARABLE, "everything", everything, "forget", forget)
    parameters = dict(model.module.named_parameters())
    before: dict[str, torch.Tensor] = {}
    shares: dict[str, float] = {}
    try:
        for name, parameter in parameters.items():
            factor = dampening_factor(
                forget.diagonal[name], everything.diagonal[name], alpha=alpha, strength=strength
            )
            smaller = (factor < 1).to(parameter.device)
            shares[name] = float(smaller.double().mean())
            if shares[name]:
                before[name] = parameter.detach().clone()
                with torch.no_grad():
                    less = parameter.cpu().double() * factor
                    parameter.copy_(torch.where(smaller, less.to(parameter), parameter))
        count = sum(shares[name] * each.numel() for name, each in parameters.items())
        total = sum(each.numel() for each in parameters.values())
        yield Dampening(alpha, strength, count / total, shares)
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                parameters[name].copy_(weight)


def dampening_factor(
    forget: torch.Tensor, everything: torch.Tensor, *, alpha: float, strength: float
) -> torch.Tensor:
    """What each weight is multiplied by, in float64: in [0, 1], and 1 where it is not selected."""
    forget, everything = forget.cpu().double(), everything.cpu().double()
    # infinity times 0 is NaN, which nothing exceeds: what alpha or strength rules out stays
    factor = (strength * everything / forget).nan_to_num(nan=1.0, posinf=1.0).clamp(max=1.0)
    return torch.where(forget > alpha * everything, factor, torch.ones_like(factor))
