"""Kronecker factors of the loss curvature: which layers, what comes in, what gradient goes out.

Martens & Grosse (2015), "Optimizing neural networks with Kronecker-factored approximate
curvature": the curvature block of a weight ``W [out, in]`` is about ``A (x) G``, the second
moments of what comes into the layer and of the loss gradients at what goes out of it.
``workbench.curvature`` turns them into eigenbases and edits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.linalg import blas
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from workbench.models import TOKENS_PER_BATCH, LanguageModel, buckets
from workbench.table import InputError, whole_file

ROLES = {
    "attention.query_key_value": "attn.qkv",  # GPT-NeoX
    "attention.dense": "attn.o",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
    "attn.c_attn": "attn.qkv",  # GPT-2
    "attn.c_proj": "attn.o",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
    "self_attn.q_proj": "attn.q",  # Llama, OLMo-2, Qwen, Gemma
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "mlp.up_proj": "mlp.up",
    "mlp.gate_proj": "mlp.gate",
    "mlp.down_proj": "mlp.down",
    "self_attn.qkv_proj": "attn.qkv",  # Phi-3
    "mlp.gate_up_proj": "mlp.gate_up",
}
IN_A_BLOCK = re.compile(r"(?:^|\.)(\d+)\.(" + "|".join(map(re.escape, ROLES)) + ")$")
LABELS = ("sampled", "gold")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
LOGITS_PER_BATCH = {"cpu": 2**25, "cuda": 2**28, "mps": 2**26}  # alive, with their gradients
MIRRORED_ROWS = 512  # of a triangle at a time: no second matrix is made
LOSS_ELEMENTS = {"cpu": 2**24, "cuda": 2**27, "mps": 2**24}  # of the logits, alive at once
SHOWN_AFTER = 2.0  # seconds, before which no bar is drawn
FEWEST_ROWS = 16  # of logits at once: fewer would read the head's matrix for next to nothing
TOKENS_PER_DIMENSION = 10  # fewer tokens estimate a factor badly
SPAN = 256  # labels summed before one of them is drawn
CHECK_TEXTS = 2  # for the self-check, and so many tokens of each
CHECK_TOKENS = 16
CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # relative; rounding is far below
SETTINGS = ("weights", "labels", "seed", "sums", "layers")  # in which shards must agree
TEXTS_HASH = 2**64  # hashes of texts are added modulo this, so that their order changes nothing
SAVE_SECONDS = 60.0  # between two writings of the sums of an unfinished run
GIB = 2**30


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block; ``role`` says what it does, whatever the architecture calls it."""

    name: str
    block: int
    role: str
    module: torch.nn.Module = field(repr=False, compare=False)

    @property
    def matrix(self) -> Float[torch.Tensor, "out in"]:
        """The weight as ``[out, in]``; a view, also of a Conv1D, which stores ``[in, out]``."""
        weight = self.module.weight
        return weight.T if isinstance(self.module, Conv1D) else weight


def linear_layers(
    module: torch.nn.Module,
    *,
    roles: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
) -> list[Layer]:
    """The linear layers of a model's blocks, in the order of the blocks.

    Args:
        roles: Which of ``mlp.up``, ``mlp.gate``, ``mlp.down``, ``attn.q``, ``attn.k``, ``attn.v``,
            ``attn.o``, and ``attn.qkv`` or ``mlp.gate_up`` where those are one matrix; None takes
            all there are.
        blocks: Numbers of blocks, from 0; None takes all.

    Raises:
        InputError: An architecture without known layers, a role or block the model lacks (those
            it has are listed), quantised weights, or one weight under two names.
    """
    found = [
        Layer(name, int(match.group(1)), ROLES[match.group(2)], each)
        for name, each in module.named_modules(remove_duplicate=False)
        if (match := IN_A_BLOCK.search(name)) and hasattr(each, "weight")
    ]
    if not found:
        raise InputError(
            f"linear_layers: {type(module).__name__} has no linear layers under names known here; "
            "GPT-NeoX, GPT-2, Llama, OLMo-2, Qwen, Gemma and Phi-3 have"
        )
    for asked, kind, has in (
        (roles, "role", sorted({layer.role for layer in found})),
        (blocks, "block", sorted({layer.block for layer in found})),
    ):
        lacking = [each for each in asked or () if each not in has]
        if lacking:
            raise InputError(
                f"linear_layers: this model has no {kind} {lacking[0]}; "
                f"it has {', '.join(map(str, has))}"
            )
    chosen = [
        layer
        for layer in found
        if (roles is None or layer.role in roles) and (blocks is None or layer.block in blocks)
    ]
    _refuse_weights(chosen, found)
    return chosen


def _refuse_weights(chosen: Sequence[Layer], found: Sequence[Layer]) -> None:
    if not chosen:
        raise InputError("linear_layers: no roles or no blocks were asked for, needs at least one")
    for layer in chosen:
        if not layer.module.weight.is_floating_point():
            raise InputError(
                f"linear_layers: {layer.name} holds {layer.module.weight.dtype} weights; "
                "curvature needs float weights: load the model without quantisation"
            )
    first: dict[int, str] = {}
    for layer in found:
        other = first.setdefault(id(layer.module.weight), layer.name)
        if other != layer.name:
            raise InputError(
                f"linear_layers: {layer.name} and {other} share one weight, whose curvature is "
                "not that of either; such models are not supported"
            )


# Factors


@contextlib.contextmanager
def gradients_seen(
    layers: Sequence[Layer], see: Callable[[Layer, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Call ``see(layer, input, output_gradient)`` once a layer and backward pass.

    Everything happens in the backward hook, so that a forward pass that is run twice (gradient
    checkpointing) counts once. Where nothing below a layer needs a gradient, the graph starts at
    that layer's output; with frozen parameters no weight gradient is ever formed.
    """

    def at_forward(layer: Layer, given: torch.Tensor, output: torch.Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if not output.requires_grad:
            output.requires_grad_(True)
        given = given.detach()
        output.register_hook(lambda gradient: see(layer, given, gradient))

    with forward_seen(layers, at_forward):
        yield


@contextlib.contextmanager
def forward_seen(
    layers: Sequence[Layer], see: Callable[[Layer, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Call ``see(layer, input, output)`` whenever a layer has run."""

    def hook_of(layer: Layer):
        return lambda module, inputs, output: see(layer, inputs[0], output)

    handles = [layer.module.register_forward_hook(hook_of(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class FactorSums:
    """Running sums of ``a a^T`` and ``g g^T`` over the positions of a mask, and their count.

    ``leader`` names, for each layer, the layer that collects its input's moments: gate and up, or
    q, k and v, read one tensor and share one A. ``upper`` holds the sums' upper triangles.
    """

    leader: Mapping[str, str]
    dtype: torch.dtype = torch.float32
    count: int = 0
    rows: Int[torch.Tensor, " row"] | None = None
    upper: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    def begin(self, mask: Bool[torch.Tensor, "item pos"]) -> None:
        """The loss mask of the coming batch; the same for a, for g and for the count."""
        rows = mask.flatten().nonzero()[:, 0]
        self.count += len(rows)
        self.rows = None if len(rows) == mask.numel() else rows  # None: all, nothing is copied

    def see(
        self,
        layer: Layer,
        given: Float[torch.Tensor, "item pos in"],
        gradient: Float[torch.Tensor, "item pos out"],
    ) -> None:
        """What :func:`gradients_seen` calls."""
        if self.leader[layer.name] == layer.name:
            self._add((layer.name, "input"), given)
        self._add((layer.name, "gradient"), gradient)

    def _add(self, key: tuple[str, str], values: torch.Tensor) -> None:
        values = values.detach().flatten(0, -2)
        values = (values if self.rows is None else values[self.rows]).to(self.dtype).contiguous()
        if key not in self.upper:
            self.upper[key] = values.new_zeros(values.shape[1], values.shape[1])
        add_upper(self.upper[key], values)

    def refuse_undefined(self, batch: int) -> None:
        """Name the first factor that is not finite; one look at the device for all of them."""
        # a value that is not finite stands in the sum of its own squares
        sums = torch.stack([total.diagonal().sum() for total in self.upper.values()])
        finite = sums.isfinite().cpu().numpy()
        if not finite.all():
            name, what = list(self.upper)[int(finite.argmin())]
            raise InputError(
                f"collect_factors: the {what} of {name} is not finite in batch {batch}; "
                "the weights or the texts of that batch hold NaN or Inf, or its dtype overflows"
            )

    @property
    def inputs(self) -> dict[str, Float[torch.Tensor, "in in"]]:
        """The sums of ``a a^T``, whole, by the names of the leaders."""
        return {name: mirror(m) for (name, what), m in self.upper.items() if what == "input"}

    @property
    def outputs(self) -> dict[str, Float[torch.Tensor, "out out"]]:
        """The sums of ``g g^T``, whole."""
        return {name: mirror(m) for (name, what), m in self.upper.items() if what == "gradient"}

    def divide(self) -> None:
        """From sums to means, in place: a second copy of all factors may not fit."""
        for total in self.upper.values():
            total.div_(self.count)


def mirror(total: Float[torch.Tensor, "n n"]) -> Float[torch.Tensor, "n n"]:
    """Copy the upper triangle into the lower, in place."""
    for at in range(0, len(total), MIRRORED_ROWS):
        end = at + MIRRORED_ROWS
        total[at:end, :at] = total[:at, at:end].T
        own = total[at:end, at:end]
        own.copy_(own.triu() + own.triu(1).T)
    return total


def add_upper(total: Float[torch.Tensor, "n n"], rows: Float[torch.Tensor, "row n"]) -> None:
    """Add ``rows^T rows`` to the upper triangle of a total; what comes to lie below is undefined.

    On one thread SciPy's BLAS does half the work for it. On several its threads and those of torch
    get in each other's way and it takes twice as long as torch's product of the whole; cuBLAS's
    is not at hand in torch.
    """
    if total.device.type != "cpu" or torch.get_num_threads() > 1:
        total.addmm_(rows.T, rows)
        return
    update = blas.dsyrk if total.dtype == torch.float64 else blas.ssyrk
    # what is by rows for us is by columns, and so transposed, for Fortran: upper is lower
    update(1.0, rows.numpy().T, beta=1.0, c=total.numpy().T, lower=1, overwrite_c=1)


@dataclass(frozen=True)
class Factors:
    """``A = mean a a^T [in, in]`` and ``G = mean g g^T [out, out]`` of each layer, by its name.

    Layers that read one tensor share one A. ``tokens`` is how many predicted tokens were averaged.
    """

    layers: tuple[Layer, ...]
    inputs: Mapping[str, Float[torch.Tensor, "in in"]]
    outputs: Mapping[str, Float[torch.Tensor, "out out"]]
    tokens: int
    labels: str
    seed: int
    passport: Mapping[str, object] = field(default_factory=dict, repr=False)


def collect_factors(
    model: LanguageModel,
    tokens: Sequence[Int[np.ndarray, " pos"]],
    *,
    roles: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    labels: str = "sampled",
    seed: int = 0,
    dtype: str = "float32",
    memory: float | None = None,
    recompute: bool = False,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
) -> Factors:
    """Kronecker factors of the mean loss per token, averaged over all predicted tokens.

    Martens & Grosse (2015); uncentred, over the gradients of the **summed** loss. Every position
    that predicts a token counts once; the last one, padding and a BOS never do. The texts are
    streamed: memory is the factors and the activations of one batch.

    Args:
        tokens: Token ids of each text, as ``model.encode`` gives them; at least 2 each.
        roles, blocks: As :func:`linear_layers`.
        labels: ``sampled`` from the model (the true Fisher, which is the Gauss-Newton matrix) or
            ``gold``, the text's own next tokens (the empirical Fisher, which is neither).
        seed: Of the sampling, keyed with each text's content: batching and order change nothing.
        dtype: ``float32`` or ``float64``, in which the sums are kept.
        memory: GiB for factors and activations beside the model's weights; None takes batches as
            large as suits the device. Batches are made smaller first; then layers are done in
            groups, one pass over the texts each, which needs a ``folder`` to put them.
        recompute: Keep only what goes into each block and run it again on the way back: about a
            third slower, with the activations of one block instead of all.
        folder: Sums are written there once a minute, so that the same call goes on where it was
            interrupted, with the same result to the bit. A finished folder is read, not run.
        progress: Show a bar where it takes longer than seconds.

    Returns:
        The means. From a folder they are mapped, not loaded: they take memory when they are used.

    Raises:
        InputError: Unknown arguments, no texts, texts too short or too long, a factor that is not
            finite (the layer and the batch are named), a folder of other settings, or too little
            memory (how much is needed is said).
        RuntimeError: On the first texts, sum g a^T is not the gradient of the weight: the model
            uses a layer in a way that the hooks do not see.
    """
    asked = linear_layers(model.module, roles=roles, blocks=blocks)
    lengths = _usable_lengths(model, tokens, labels, dtype)
    passport = {
        **model.passport(),  # of the weights that came, not of a copy in float32
        "labels": labels,
        "seed": seed,
        "sums": dtype,
        "layers": [layer.name for layer in asked],
        "texts": texts_hash(tokens),
        "sequences": len(tokens),
        "tokens": int((lengths - 1).sum()),
    }
    run = _Run(with_full_digits(model, "collect_factors"), asked, tokens, labels, seed, dtype)
    with frozen(run.model.module), run.recomputing(recompute):
        leader = run.check()
        store = None if folder is None else Path(folder)
        options = {"memory": memory, "recompute": recompute}
        plan = _stored_plan(store, passport | options) if store else None
        if plan is None:
            plan = run.plan(leader, memory, store is not None)
            if store:
                _store_plan(store, passport | options, plan)
        total = passport["tokens"] * len(plan.groups)
        bar = _bar(total, progress)
        with bar:
            parts = [
                run.sum_up(leader, plan, group, store and store / f"group-{number:03}", bar)
                for number, group in enumerate(plan.groups)
            ]
    inputs = {name: each for part in parts for name, each in part[0].items()}
    outputs = {name: each for part in parts for name, each in part[1].items()}
    _warn_if_few(passport["tokens"], (*inputs.values(), *outputs.values()))
    return Factors(
        layers=tuple(asked),
        inputs={layer.name: inputs[leader[layer.name]] for layer in asked},
        outputs={layer.name: outputs[layer.name] for layer in asked},
        tokens=passport["tokens"],
        labels=labels,
        seed=seed,
        passport=passport,
    )


def _bar(total: int, progress: bool) -> tqdm:
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(
        total=total,
        desc="curvature factors",
        unit="token",
        unit_scale=True,
        disable=not progress,
        delay=SHOWN_AFTER,
        mininterval=0.1 if watched else 30.0,  # seconds; a log file wants few lines
    )


@dataclass(frozen=True)
class Plan:
    """How a run goes: positions a batch, rows of the vocabulary at once, layers of each pass."""

    tokens_per_batch: int
    rows: int
    groups: tuple[tuple[str, ...], ...]


@dataclass
class _Run:
    """A model in full digits, the layers asked for, and the texts in an order of their own."""

    model: LanguageModel
    layers: Sequence[Layer]
    tokens: Sequence[Int[np.ndarray, " pos"]]
    labels: str
    seed: int
    dtype: str

    def __post_init__(self) -> None:
        # of a copy in float32 it is the copy's layers that run
        self.layers = [
            replace(layer, module=self.model.module.get_submodule(layer.name))
            for layer in self.layers
        ]
        # an order that does not depend on the caller's, so that the same batches come again
        self.tokens = sorted(self.tokens, key=lambda each: (-len(each), _hash_of(each)))

    @property
    def longest(self) -> int:
        """Positions of the longest text when it runs."""
        return len(self.tokens[0]) - 1 + (self.model.bos is not None)

    def check(self) -> dict[str, str]:
        few = [each[:CHECK_TOKENS] for each in self.tokens[:CHECK_TEXTS]]
        return check_gradients(self.model, self.layers, few)

    def recomputing(self, wanted: bool) -> contextlib.AbstractContextManager:
        if not wanted:
            return contextlib.nullcontext()
        return blocks_recomputed(self.model.module, self.layers)

    def batches(self, tokens_per_batch: int) -> list[Int[np.ndarray, " item"]]:
        return list(buckets(np.array([len(each) for each in self.tokens]), tokens_per_batch))

    def add(self, texts: Sequence[Int[np.ndarray, " pos"]], sums: FactorSums, rows: int) -> None:
        """One batch; the hooks of :func:`gradients_seen` must be in place."""
        ids, targets, mask = padded(self.model, texts)
        sums.begin(mask)
        add_gradients(self.model, ids, targets, mask, self.labels, self.seed, rows=rows)

    def sum_up(
        self,
        leader: Mapping[str, str],
        plan: Plan,
        group: Sequence[str],
        place: Path | None,
        bar: tqdm,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """One pass over the texts for a group of layers: means of ``a a^T`` and ``g g^T``."""
        file, done = place and place.with_suffix(".safetensors"), 0
        sums = FactorSums(leader, DTYPES[self.dtype])
        if file and file.is_file():
            inputs, outputs, about = _read(file, "collect_factors")
            bar.update(about["count"])
            if about["whole"]:
                return inputs, outputs
            done, sums.count = about["batches"], about["count"]
            # mapped tensors are the file itself: what is added to must be a copy
            for what, stored in (("input", inputs), ("gradient", outputs)):
                for name, total in stored.items():
                    sums.upper[name, what] = total.to(self.model.device, copy=True)
        written = time.monotonic()
        with gradients_seen([layer for layer in self.layers if layer.name in group], sums.see):
            for batch, index in enumerate(self.batches(plan.tokens_per_batch)):
                if batch < done:
                    continue
                before = sums.count
                self.add([self.tokens[i] for i in index], sums, plan.rows)
                sums.refuse_undefined(batch)
                bar.update(sums.count - before)
                if file and time.monotonic() - written > SAVE_SECONDS:
                    about = {"batches": batch + 1, "count": sums.count, "whole": False}
                    _write(file, sums.inputs, sums.outputs, about)
                    written = time.monotonic()
        sums.divide()
        if not file:
            return sums.inputs, sums.outputs
        _write(file, sums.inputs, sums.outputs, {"count": sums.count, "whole": True})
        del sums
        return _read(file, "collect_factors")[:2]

    def plan(self, leader: Mapping[str, str], memory: float | None, stored: bool) -> Plan:
        """Batches and groups of layers that fit a memory, in as few passes as can be."""
        names = tuple(layer.name for layer in self.layers)
        tokens, rows = tokens_per_batch(self.model), _rows_at_once(self.model)
        if memory is None:
            return Plan(tokens, rows, (names,))
        per_token, per_row = self._activations()
        bundles = self._bundles(leader)
        factors = sum(bundles.values())

        def room(tokens: int) -> float:  # for factors
            return memory * GIB - per_token * tokens - per_row * min(rows, tokens)

        tokens = max(tokens, self.longest)
        while room(tokens) < factors and tokens > self.longest:
            tokens = max(tokens // 2, self.longest)
        while room(tokens) < factors and rows > FEWEST_ROWS:
            rows = max(rows // 2, FEWEST_ROWS)
        if room(tokens) < max(bundles.values()):
            least = (memory * GIB - room(tokens) + max(bundles.values())) / GIB
            raise InputError(
                f"collect_factors: memory is {memory:.3g} GiB, one text of {self.longest} "
                f"positions and one layer's factors need {least:.3g}; give more, or shorter texts"
            )
        if room(tokens) < factors and not stored:
            least = (memory * GIB - room(tokens) + factors) / GIB
            raise InputError(
                f"collect_factors: memory is {memory:.3g} GiB, all factors together need "
                f"{least:.3g}; give a folder, where they are put group by group, or fewer layers"
            )
        groups, held = [[]], 0.0
        for bundle, size in bundles.items():
            if held + size > room(tokens):
                groups.append([])
                held = 0.0
            groups[-1] += bundle
            held += size
        return Plan(tokens, rows, tuple(tuple(each) for each in groups))

    def _bundles(self, leader: Mapping[str, str]) -> dict[tuple[str, ...], int]:
        """Layers that share an A, in order, and how many bytes their factors take."""
        bundles: dict[str, list[Layer]] = {}
        for layer in self.layers:
            bundles.setdefault(leader[layer.name], []).append(layer)
        item = DTYPES[self.dtype].itemsize
        return {
            tuple(each.name for each in own): item
            * (own[0].matrix.shape[1] ** 2 + sum(each.matrix.shape[0] ** 2 for each in own))
            for own in bundles.values()
        }

    def _activations(self) -> tuple[float, float]:
        """Bytes at the peak for each position of a batch, and for each row at the head."""
        whole = self.tokens[0]
        half = whole[: len(whole) // 2 + 1]
        rows = min(len(half) - 1, _rows_at_once(self.model))
        sizes, peaks = [], []
        for text in (half, whole):
            ids, targets, mask = padded(self.model, [text])

            def see(layer, given, gradient, mask=mask):
                # what FactorSums copies on the way, without its sums
                _ = given[mask], gradient[mask]

            with gradients_seen(self.layers, see), peak_bytes(self.model.device) as peak:
                add_gradients(self.model, ids, targets, mask, self.labels, self.seed, rows=rows)
            sizes.append(ids.shape[1])
            peaks.append(peak())
        per_token = (peaks[1] - peaks[0]) / max(1, sizes[1] - sizes[0])
        return per_token, max(0.0, peaks[1] - per_token * sizes[1]) / rows


def _usable_lengths(model, tokens, labels: str, dtype: str) -> Int[np.ndarray, " item"]:
    if labels not in LABELS:
        raise InputError(f"collect_factors: labels {labels!r}; choose from {', '.join(LABELS)}")
    if dtype not in DTYPES:
        raise InputError(f"collect_factors: dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    return usable_lengths(model, tokens, "collect_factors")


def usable_lengths(
    model: LanguageModel, tokens: Sequence[Int[np.ndarray, " pos"]], asker: str
) -> Int[np.ndarray, " item"]:
    """The length of each text, all of them such that they predict a token and fit the model.

    Raises:
        InputError: No texts, or some that are too short or too long.
    """
    if not len(tokens):
        raise InputError(f"{asker}: got no texts, needs at least one of two tokens")
    lengths = np.array([len(each) for each in tokens], dtype=np.int64)
    wrong = (lengths < 2) | (lengths > model.context)
    if wrong.any():
        raise InputError(
            f"{asker}: {wrong.sum()} of {len(lengths)} texts are shorter than 2 or longer "
            f"than the context of {model.context} tokens (first: number {wrong.argmax()}, "
            f"{lengths[wrong][0]} tokens); drop or cut them"
        )
    return lengths


def tokens_per_batch(model: LanguageModel) -> int:
    """Positions that suit the device, so few that all their logits would fit."""
    kind = model.device.type
    logits = LOGITS_PER_BATCH.get(kind, LOGITS_PER_BATCH["cpu"])
    return min(TOKENS_PER_BATCH.get(kind, 4096), max(1, logits // model.vocabulary))


def _warn_if_few(tokens: int, factors: Sequence[torch.Tensor]) -> None:
    widest = max(len(each) for each in factors)
    if tokens < TOKENS_PER_DIMENSION * widest:
        warnings.warn(
            f"collect_factors: {tokens} tokens for factors of up to {widest} dimensions, "
            f"under {TOKENS_PER_DIMENSION} a dimension ({TOKENS_PER_DIMENSION * widest}); "
            "small eigenvalues are noise, give more text",
            stacklevel=3,
        )


def with_full_digits(model: LanguageModel, asker: str) -> LanguageModel:
    """A float32 copy of a model in half precision, whose squared gradients would underflow."""
    kind = model.module.dtype
    if kind in (torch.float32, torch.float64):
        return model
    warnings.warn(
        f"{asker}: the weights are {str(kind).removeprefix('torch.')}, in which squared "
        "gradients underflow; a float32 copy of the model is used",
        stacklevel=3,
    )
    return model.copy()


def texts_hash(tokens: Sequence[Int[np.ndarray, " pos"]]) -> str:
    """Of all texts together, whatever their order."""
    return f"{sum(map(_hash_of, tokens)) % TEXTS_HASH:016x}"


def _hash_of(tokens: Int[np.ndarray, " pos"]) -> int:
    data = np.ascontiguousarray(tokens, dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


@contextlib.contextmanager
def blocks_recomputed(module: torch.nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """From the lowest tracked block up, keep a block's input and run it again on the way back.

    Hooks see the second run only: in the first no gradient is asked for.
    """
    lowest = min(layers, key=lambda layer: layer.block)
    parent = module.get_submodule(lowest.name[: IN_A_BLOCK.search(lowest.name).start(1) - 1])
    changed = list(parent)[lowest.block :]

    def again(plain: Callable) -> Callable:
        def forward(hidden: torch.Tensor, *rest, **named):
            if not torch.is_grad_enabled():
                return plain(hidden, *rest, **named)
            if not hidden.requires_grad:  # or nothing would be asked of the lowest block
                hidden = hidden.detach().requires_grad_(True)
            run = lambda given: plain(given, *rest, **named)  # noqa: E731
            return checkpoint(run, hidden, use_reentrant=True, preserve_rng_state=False)

        return forward

    try:
        for block in changed:
            block.forward = again(block.forward)
        yield
    finally:
        for block in changed:
            vars(block).pop("forward", None)  # the class's own shows again


@contextlib.contextmanager
def frozen(module: torch.nn.Module) -> Iterator[None]:
    """Parameters without gradients, no dropout, gradients on, TF32 off; all as before after."""
    flags = [(p, p.requires_grad) for p in module.parameters()]
    modes = [(each, each.training) for each in module.modules()]
    tf32 = torch.backends.cuda.matmul.allow_tf32
    module.requires_grad_(False).eval()
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for each, training in modes:
            each.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def padded(model: LanguageModel, tokens: Sequence[Int[np.ndarray, " pos"]]):
    """Ids ``[item, pos]``, the tokens they predict, and the loss mask.

    Position ``p`` of the ids predicts ``targets[p]``. The last token of a text predicts nothing;
    nor is a BOS counted, though it stands in the ids: its prediction is nobody's memory.
    """
    before = int(model.bos is not None)
    width = max(len(each) for each in tokens) - 1 + before
    ids = np.zeros((len(tokens), width), dtype=np.int64)
    targets, mask = np.zeros_like(ids), np.zeros(ids.shape, dtype=bool)
    for row, each in enumerate(tokens):
        end = before + len(each) - 1
        ids[row, :before] = model.bos if before else 0
        ids[row, before:end] = each[:-1]
        targets[row, before:end] = each[1:]
        mask[row, before:end] = True
    return (torch.from_numpy(each).to(model.device) for each in (ids, targets, mask))


def summed_loss(
    model: LanguageModel,
    ids: Int[torch.Tensor, "item pos"],
    targets: Int[torch.Tensor, "item pos"],
    mask: Bool[torch.Tensor, "item pos"],
    labels: str,
    seed: int,
) -> Float[torch.Tensor, ""]:
    """Cross-entropy in nats, summed over the mask, against gold or sampled labels."""
    logits = model.module(input_ids=ids, use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if labels == "sampled":
        targets = sampled_labels(logits.detach(), ids, targets, mask, seed)
    # right padding under a causal mask reaches no counted position, so no attention mask is needed
    targets = targets.masked_fill(~mask, -100)  # cross_entropy's ignore_index
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )


def add_gradients(
    model: LanguageModel,
    ids: Int[torch.Tensor, "item pos"],
    targets: Int[torch.Tensor, "item pos"],
    mask: Bool[torch.Tensor, "item pos"],
    labels: str,
    seed: int,
    *,
    rows: int | None = None,
) -> None:
    """The backward pass of :func:`summed_loss`, ``rows`` positions of the vocabulary at a time.

    The loss has the gradient ``p - onehot(label)`` at the logits, which are made, turned into it
    and let go before the next ones: what lies below the head sees one backward pass.
    """
    hidden = model._hidden(ids)
    if not model._head_agrees(hidden):  # more than a matrix and a cap: by the definition
        summed_loss(model, ids, targets, mask, labels, seed).backward()
        return
    rows = rows or _rows_at_once(model)
    counted = mask.flatten().nonzero()[:, 0]
    flat, wanted = hidden.detach().flatten(0, 1), targets.flatten()
    draws = uniform_draws(ids, targets, mask, seed).flatten() if labels == "sampled" else None
    below = torch.zeros_like(flat)
    for few in counted.split(rows):
        own = flat[few].requires_grad_(True)
        logits = _logits(model, own)
        p = logits.detach().softmax(-1)
        label = wanted[few] if draws is None else label_at(p, draws[few])
        p[torch.arange(len(few), device=p.device), label] -= 1
        below[few] = torch.autograd.grad(logits, own, p)[0]
        del logits, p  # before the next ones are made
    hidden.backward(below.view_as(hidden))


def _rows_at_once(model: LanguageModel) -> int:
    return max(1, LOSS_ELEMENTS.get(model.device.type, 2**24) // model.vocabulary)


def _logits(model: LanguageModel, hidden: torch.Tensor) -> torch.Tensor:
    """As ``model.head``, but in float64 where the model is."""
    if hidden.dtype != torch.float64:
        return model.head(hidden)
    logits = model.module.get_output_embeddings()(hidden)
    cap = getattr(model.module.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def sampled_labels(
    logits: Float[torch.Tensor, "item pos vocab"],
    ids: Int[torch.Tensor, "item pos"],
    targets: Int[torch.Tensor, "item pos"],
    mask: Bool[torch.Tensor, "item pos"],
    seed: int,
) -> Int[torch.Tensor, "item pos"]:
    """One label a position from the model's own distribution, by inverting its cumulative sum.

    The uniform draws of a text come from (seed, its tokens) alone.
    """
    out, draws = torch.zeros_like(ids), uniform_draws(ids, targets, mask, seed)
    for row, here in enumerate(mask):
        p = logits[row, here].softmax(-1)
        out[row, here] = label_at(p, draws[row, here])
    return out


def uniform_draws(
    ids: Int[torch.Tensor, "item pos"],
    targets: Int[torch.Tensor, "item pos"],
    mask: Bool[torch.Tensor, "item pos"],
    seed: int,
) -> Float[torch.Tensor, "item pos"]:
    """A number from [0, 1) for each counted position, which the seed and its text decide."""
    own, following, counted = (each.cpu().numpy() for each in (ids, targets, mask))
    draws = np.zeros(own.shape)
    for row, here in enumerate(counted):
        text = np.concatenate([own[row, here][:1], following[row, here]])
        draws[row, here] = keyed(seed, text).random(len(text) - 1)
    # mps has no float64
    return torch.from_numpy(draws).to(ids.device, _exact(ids.device))


def label_at(
    p: Float[torch.Tensor, "row vocab"], draws: Float[torch.Tensor, " row"]
) -> Int[torch.Tensor, " row"]:
    """The first label whose cumulative probability exceeds the draw; never one of probability 0.

    Spans of labels are summed and one is chosen, then a label in it: the cumulative sum in float64
    of a whole vocabulary would cost more than its softmax.
    """
    rows, vocabulary = p.shape
    full = vocabulary // SPAN
    spans = p[:, : full * SPAN].reshape(rows, full, SPAN).sum(-1)
    if vocabulary % SPAN:
        spans = torch.cat([spans, p[:, full * SPAN :].sum(-1, keepdim=True)], 1)
    span, rest = _cell_at(spans.to(draws.dtype), draws)
    labels = span[:, None] * SPAN + torch.arange(SPAN, device=p.device)
    beyond = labels >= vocabulary
    inside = p.gather(1, labels.clamp(max=vocabulary - 1)).masked_fill(beyond, 0)
    place, _ = _cell_at(inside.to(draws.dtype), rest)
    return (span * SPAN + place).clamp(max=vocabulary - 1)  # NaN lies nowhere


def _cell_at(
    mass: Float[torch.Tensor, "row cell"], draws: Float[torch.Tensor, " row"]
) -> tuple[Int[torch.Tensor, " row"], Float[torch.Tensor, " row"]]:
    """Which cell a draw falls into, and how far into it, from 0 to 1."""
    cumulative = mass.cumsum(1)
    aim = draws[:, None] * cumulative[:, -1:]
    # rounding may bring the aim to the total: then the last cell that holds anything
    last = (cumulative < cumulative[:, -1:]).sum(1)
    cell = torch.minimum((cumulative <= aim).sum(1), last)[:, None]
    own = mass.gather(1, cell)
    rest = (aim - (cumulative.gather(1, cell) - own)) / own
    return cell[:, 0], rest[:, 0].clamp(0.0, 1.0)


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def keyed(seed: int, tokens: Int[np.ndarray, " pos"]) -> np.random.Generator:
    """A random generator that depends on the seed and on a text's tokens, and on nothing else."""
    data = f"{seed}:".encode() + np.ascontiguousarray(tokens, dtype="<i8").tobytes()
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(data, digest_size=16).digest()))


def check_gradients(
    model: LanguageModel, layers: Sequence[Layer], tokens: Sequence[Int[np.ndarray, " pos"]]
) -> dict[str, str]:
    """Check on a few texts that ``sum g a^T`` over the counted positions is the weight's gradient.

    Returns:
        For each layer the first that reads the same input tensor (itself, where none does).

    Raises:
        RuntimeError: They differ; the layer is named.
    """
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    gaps: dict[str, float] = {}
    ids, targets, mask = padded(model, tokens)
    everywhere = mask.clone()
    if model.bos is not None:
        everywhere[:, 0] = True  # not counted in the factors, but the gradient runs through it

    def compare(layer: Layer, weight: torch.nn.Parameter) -> None:
        a, g = seen[layer.name]
        product = g[everywhere].T @ a[everywhere]
        gradient = weight.grad.T if isinstance(layer.module, Conv1D) else weight.grad
        gap = (product - gradient).norm() / gradient.norm().clamp(min=1e-30)
        gaps[layer.name] = float(gap)
        weight.grad = None  # the gradients of all weights together may not fit

    def looking(layer: Layer) -> Callable[[torch.nn.Parameter], None]:
        return lambda weight: compare(layer, weight)

    handles = []
    try:
        for layer in layers:
            weight = layer.module.weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(looking(layer)))
        with gradients_seen(layers, lambda layer, a, g: seen.update({layer.name: (a, g)})):
            summed_loss(model, ids, targets, mask, "gold", 0).backward()
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.module.weight.requires_grad_(False)
    for layer in layers:
        # NaN weights pass: they are named by the first batch
        gap = gaps.get(layer.name, np.inf)
        if gap > CHECK_TOLERANCE[layer.module.weight.dtype]:
            raise RuntimeError(
                f"collect_factors: sum g a^T of {layer.name} misses the weight's gradient by "
                f"{gap:.1e} of its norm; this model uses the layer in a way that factors "
                "cannot describe"
            )
    first: dict[tuple, str] = {}
    places = {name: (a.data_ptr(), a.shape) for name, (a, _) in seen.items()}
    return {layer.name: first.setdefault(places[layer.name], layer.name) for layer in layers}


# Forecast


@dataclass(frozen=True)
class Forecast:
    """What a run of :func:`collect_factors` will take, beside the model's weights.

    Attributes:
        factors: Bytes of all factors; with several passes they lie in the folder.
        peak: Bytes at the worst moment: the factors of one pass and the activations of one batch.
        seconds: Of all passes, on a machine as busy as now.
        passes: Over the texts; one group of layers each.
        tokens_per_batch: Positions that run together.
        tokens: Predicted tokens.
    """

    factors: int
    peak: int
    seconds: float
    passes: int
    tokens_per_batch: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"factors of {self.tokens} tokens: {self.seconds:.0f} s in {self.passes} "
            f"pass{'es' if self.passes > 1 else ''}, "
            f"{self.peak / GIB:.2f} GiB beside the model at the peak, {self.factors / GIB:.2f} GiB "
            "of them to keep"
        )


def forecast_factors(
    model: LanguageModel,
    tokens: Sequence[Int[np.ndarray, " pos"]],
    *,
    roles: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    labels: str = "sampled",
    seed: int = 0,
    dtype: str = "float32",
    memory: float | None = None,
    recompute: bool = False,
) -> Forecast:
    """Time and memory of :func:`collect_factors` with the same arguments, from its largest batch.

    That batch runs twice, once with every allocation counted and once with the clock.

    Raises:
        InputError: As :func:`collect_factors`; too little memory for one pass asks for no folder.
    """
    asked = linear_layers(model.module, roles=roles, blocks=blocks)
    lengths = _usable_lengths(model, tokens, labels, dtype)
    run = _Run(with_full_digits(model, "forecast_factors"), asked, tokens, labels, seed, dtype)
    with frozen(run.model.module), run.recomputing(recompute):
        leader = run.check()
        plan = run.plan(leader, memory, True)
        sizes = run._bundles(leader)
        largest = max(
            plan.groups, key=lambda group: sum(sizes[b] for b in sizes if set(b) <= set(group))
        )
        texts = [run.tokens[i] for i in run.batches(plan.tokens_per_batch)[0]]
        # the first group reaches down the farthest, the largest holds the most
        lowest, own = (
            [layer for layer in run.layers if layer.name in group]
            for group in (plan.groups[0], largest)
        )
        sums = FactorSums(leader, DTYPES[dtype])
        sums.begin(torch.ones(1, 1, dtype=torch.bool))
        for layer in lowest:  # sums of nothing: from the second batch on they are there before it
            out, width = layer.matrix.shape
            none = (layer.matrix.new_zeros(1, 1, size) for size in (width, out))
            sums.see(layer, *none)
        with gradients_seen(lowest, sums.see), peak_bytes(run.model.device) as peak:
            run.add(texts, sums, plan.rows)
        most = sum(sizes[b] for b in sizes if set(b) <= {layer.name for layer in own})
        started = time.perf_counter()
        with gradients_seen(lowest, sums.see):
            run.add(texts, sums, plan.rows)
            sums.refuse_undefined(0)
        seconds = time.perf_counter() - started
    total = int((lengths - 1).sum())
    return Forecast(
        factors=sum(sizes.values()),
        peak=int(peak() + most),
        seconds=seconds * total / sum(len(each) - 1 for each in texts) * len(plan.groups),
        passes=len(plan.groups),
        tokens_per_batch=plan.tokens_per_batch,
        tokens=total,
    )


@contextlib.contextmanager
def peak_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """Count the bytes of all tensors made in a ``with`` block that are alive at once.

    Yields:
        A function that gives the most there have been, beside what was there before.
    """
    if device.type == "cuda":  # whose backward pass runs in a thread of its own
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    watch = _Allocations()
    with watch:
        yield lambda: watch.peak


class _Allocations(TorchDispatchMode):
    """Every operation's results, by the storage they lie in, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for each in tree_leaves((args, kwargs)):
            self._note(each, new=False)  # what is given and not known was there before
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            self._note(each, new=True)
        return out

    def _note(self, value: object, *, new: bool) -> None:
        if not isinstance(value, torch.Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes() if new else 0
        weakref.finalize(storage, self._let_go, key)
        self.now += self.alive[key]
        self.peak = max(self.peak, self.now)

    def _let_go(self, key: int) -> None:
        self.now -= self.alive.pop(key)


# Files


def save_factors(factors: Factors, path: str | os.PathLike) -> None:
    """Write one safetensors file, whole or not at all; the passport as JSON in its header."""
    _write(
        Path(path),
        factors.inputs,
        factors.outputs,
        {"passport": dict(factors.passport), "tokens": factors.tokens},
    )


def load_factors(path: str | os.PathLike, model: LanguageModel) -> Factors:
    """Read what :func:`save_factors` wrote, for the model that it was made of; mapped on the CPU.

    Raises:
        InputError: The file is not one of those, is damaged, or was made of other weights.
    """
    if not Path(path).is_file():
        raise InputError(f"load_factors: no file at {path}; save_factors writes one")
    inputs, outputs, about = _read(Path(path), "load_factors")
    passport, held = about.get("passport", {}), model.weights_hash()
    if passport.get("weights") != held:
        raise InputError(
            f"load_factors: {path} was made of weights {passport.get('weights')}, the model "
            f"holds {held}; load that model, or collect the factors of this one"
        )
    layers = {layer.name: layer for layer in linear_layers(model.module)}
    return Factors(
        layers=tuple(layers[name] for name in passport["layers"]),
        inputs=inputs,
        outputs=outputs,
        tokens=about["tokens"],
        labels=passport["labels"],
        seed=passport["seed"],
        passport=passport,
    )


def merge_factors(shards: Sequence[Factors]) -> Factors:
    """One set of factors of shards that were made of other texts, with the same settings.

    A mean over all tokens: each shard weighs as many as it holds.

    Raises:
        InputError: No shards, shards of other weights, layers, labels, seed or sums (the
            difference is named), or the same texts twice.
    """
    if not shards:
        raise InputError("merge_factors: got no shards, needs at least one")
    first, seen = shards[0], {}
    for number, shard in enumerate(shards):
        for key in SETTINGS:
            if shard.passport[key] != first.passport[key]:
                raise InputError(
                    f"merge_factors: shard {number} was made with "
                    f"{_difference(key, shard.passport[key], first.passport[key])} of shard 0; "
                    "make both alike"
                )
        twin = seen.setdefault(shard.passport["texts"], number)
        if twin != number:
            raise InputError(
                f"merge_factors: shards {twin} and {number} hold the same texts; give each once"
            )
    tokens = sum(shard.tokens for shard in shards)
    passports = [shard.passport for shard in shards]
    hashes = sum(int(each["texts"], 16) for each in passports)

    def mean(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        pairs = zip(parts, shards, strict=True)
        return (sum(p.double() * (s.tokens / tokens) for p, s in pairs)).to(parts[0].dtype)

    shared: dict[int, torch.Tensor] = {}
    for name, each in first.inputs.items():
        if id(each) not in shared:
            shared[id(each)] = mean([shard.inputs[name] for shard in shards])
    return replace(
        first,
        inputs={name: shared[id(each)] for name, each in first.inputs.items()},
        outputs={name: mean([s.outputs[name] for s in shards]) for name in first.outputs},
        tokens=tokens,
        passport={
            **first.passport,
            "texts": f"{hashes % TEXTS_HASH:016x}",
            "sequences": sum(each["sequences"] for each in passports),
            "tokens": tokens,
        },
    )


def _difference(key: str, one: object, other: object) -> str:
    return "layers other than those" if key == "layers" else f"{key} {one}, not the {other}"


def _write(
    path: Path,
    inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[str, torch.Tensor],
    about: Mapping[str, object],
) -> None:
    first: dict[int, str] = {}
    leader = {name: first.setdefault(id(each), name) for name, each in inputs.items()}
    tensors = {f"input:{name}": inputs[name] for name in first.values()}
    tensors |= {f"gradient:{name}": each for name, each in outputs.items()}
    with whole_file(path) as temporary:
        save_file(
            {name: each.cpu().contiguous() for name, each in tensors.items()},
            temporary,
            {"factors": json.dumps({**about, "leader": leader})},
        )


def _read(
    path: Path, asker: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, object]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["factors"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        inputs = {name: tensors[f"input:{own}"] for name, own in about["leader"].items()}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{asker}: {path} is not a whole file of factors ({reason})") from None
    named = (name.partition(":") for name in tensors)
    outputs = {own: tensors[f"gradient:{own}"] for what, _, own in named if what == "gradient"}
    return inputs, outputs, about


def _stored_plan(folder: Path, settings: Mapping[str, object]) -> Plan | None:
    """The plan of a folder that an earlier call began, None where none did."""
    place = folder / "settings.json"
    if not place.is_file():
        return None
    stored = json.loads(place.read_text(encoding="utf-8"))
    for key in (*SETTINGS, "texts", "memory", "recompute"):
        if stored["settings"][key] != settings[key]:
            raise InputError(
                f"collect_factors: {folder} was begun with "
                f"{_difference(key, stored['settings'][key], settings[key])} asked for; "
                "give another folder"
            )
    plan = stored["plan"]
    groups = tuple(tuple(each) for each in plan["groups"])
    return Plan(plan["tokens_per_batch"], plan["rows"], groups)


def _store_plan(folder: Path, settings: Mapping[str, object], plan: Plan) -> None:
    kept = {"settings": dict(settings), "plan": vars(plan)}
    with whole_file(folder / "settings.json") as temporary:
        temporary.write_text(json.dumps(kept, indent=1), encoding="utf-8")
