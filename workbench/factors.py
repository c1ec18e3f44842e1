"""Kronecker factors of the loss curvature: which layers, what comes in, what gradient goes out.

Martens & Grosse (2015), "Optimizing neural networks with Kronecker-factored approximate
curvature": the curvature block of a weight ``W [out, in]`` is about ``A (x) G``, the second
moments of what comes into the layer and of the loss gradients at what goes out of it.
``workbench.curvature`` turns them into eigenbases and edits.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from transformers.pytorch_utils import Conv1D

from workbench.models import TOKENS_PER_BATCH, LanguageModel, buckets
from workbench.table import InputError

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
}
IN_A_BLOCK = re.compile(r"(?:^|\.)(\d+)\.(" + "|".join(map(re.escape, ROLES)) + ")$")
LABELS = ("sampled", "gold")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
LOGITS_PER_BATCH = {"cpu": 2**25, "cuda": 2**28, "mps": 2**26}  # alive, with their gradients
TOKENS_PER_DIMENSION = 10  # fewer tokens estimate a factor badly
CHECK_TEXTS = 2  # of the first batch, for the self-check
CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # relative; rounding is far below


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
            ``attn.o``, and ``attn.qkv`` where the three are one matrix; None takes all there are.
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
            "GPT-NeoX, GPT-2, Llama, OLMo-2, Qwen and Gemma have"
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
    """Running sums of ``a a^T`` and ``g g^T`` over the positions of ``mask``, and their count.

    ``leader`` names, for each layer, the layer that collects its input's moments: gate and up, or
    q, k and v, read one tensor and share one A.
    """

    leader: Mapping[str, str]
    dtype: torch.dtype = torch.float32
    count: int = 0
    mask: Bool[torch.Tensor, "item pos"] | None = None
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def begin(self, mask: Bool[torch.Tensor, "item pos"]) -> None:
        """The loss mask of the coming batch; the same for a, for g and for the count."""
        self.mask = mask
        self.count += int(mask.sum())

    def see(
        self,
        layer: Layer,
        given: Float[torch.Tensor, "item pos in"],
        gradient: Float[torch.Tensor, "item pos out"],
    ) -> None:
        """What :func:`gradients_seen` calls."""
        if self.leader[layer.name] == layer.name:
            _add_moments(self.inputs, layer.name, given[self.mask], self.dtype)
        _add_moments(self.outputs, layer.name, gradient.detach()[self.mask], self.dtype)

    def refuse_undefined(self, batch: int) -> None:
        """Name the first factor that is not finite; one look at the device for all of them."""
        named = [(n, "input", m) for n, m in self.inputs.items()]
        named += [(n, "gradient", m) for n, m in self.outputs.items()]
        finite = torch.stack([m.sum() for _, _, m in named]).isfinite().cpu().numpy()
        if not finite.all():
            name, what, _ = named[int(finite.argmin())]
            raise InputError(
                f"collect_factors: the {what} of {name} is not finite in batch {batch}; "
                "the weights or the texts of that batch hold NaN or Inf, or its dtype overflows"
            )


def _add_moments(sums: dict, name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    values = values.to(dtype)
    if name not in sums:
        sums[name] = values.new_zeros(values.shape[1], values.shape[1])
    sums[name].addmm_(values.T, values)


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


def collect_factors(
    model: LanguageModel,
    tokens: Sequence[Int[np.ndarray, " pos"]],
    *,
    roles: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    labels: str = "sampled",
    seed: int = 0,
    dtype: str = "float32",
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

    Raises:
        InputError: Unknown arguments, no texts, texts too short or too long, or a factor that is
            not finite (the layer and the batch are named).
        RuntimeError: On the first texts, sum g a^T is not the gradient of the weight: the model
            uses a layer in a way that the hooks do not see.
    """
    layers = linear_layers(model.module, roles=roles, blocks=blocks)
    lengths = _usable_lengths(model, tokens, labels, dtype)
    with frozen(model.module):
        leader = check_gradients(model, layers, list(tokens[:CHECK_TEXTS]))
        sums = FactorSums(leader, DTYPES[dtype])
        with gradients_seen(layers, sums.see):
            for batch, index in enumerate(buckets(lengths, _tokens_per_batch(model))):
                ids, targets, mask = padded(model, [tokens[i] for i in index])
                sums.begin(mask)
                summed_loss(model, ids, targets, mask, labels, seed).backward()
                sums.refuse_undefined(batch)
    _warn_if_few(sums)
    inputs = {name: total / sums.count for name, total in sums.inputs.items()}
    return Factors(
        layers=tuple(layers),
        inputs={layer.name: inputs[leader[layer.name]] for layer in layers},
        outputs={name: total / sums.count for name, total in sums.outputs.items()},
        tokens=sums.count,
        labels=labels,
        seed=seed,
    )


def _usable_lengths(model, tokens, labels: str, dtype: str) -> Int[np.ndarray, " item"]:
    if labels not in LABELS:
        raise InputError(f"collect_factors: labels {labels!r}; choose from {', '.join(LABELS)}")
    if dtype not in DTYPES:
        raise InputError(f"collect_factors: dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    if not len(tokens):
        raise InputError("collect_factors: got no texts, needs at least one of two tokens")
    lengths = np.array([len(each) for each in tokens], dtype=np.int64)
    wrong = (lengths < 2) | (lengths > model.context)
    if wrong.any():
        raise InputError(
            f"collect_factors: {wrong.sum()} of {len(lengths)} texts are shorter than 2 or longer "
            f"than the context of {model.context} tokens (first: number {wrong.argmax()}, "
            f"{lengths[wrong][0]} tokens); drop or cut them"
        )
    return lengths


def _tokens_per_batch(model: LanguageModel) -> int:
    kind = model.device.type
    logits = LOGITS_PER_BATCH.get(kind, LOGITS_PER_BATCH["cpu"])
    return min(TOKENS_PER_BATCH.get(kind, 4096), max(1, logits // model.vocabulary))


def _warn_if_few(sums: FactorSums) -> None:
    widest = max(len(m) for m in (*sums.inputs.values(), *sums.outputs.values()))
    if sums.count < TOKENS_PER_DIMENSION * widest:
        warnings.warn(
            f"collect_factors: {sums.count} tokens for factors of up to {widest} dimensions, "
            f"under {TOKENS_PER_DIMENSION} a dimension ({TOKENS_PER_DIMENSION * widest}); "
            "small eigenvalues are noise, give more text",
            stacklevel=3,
        )


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
    out = torch.zeros_like(ids)
    for row in range(len(ids)):
        here = mask[row]
        text = torch.cat([ids[row, here][:1], targets[row, here]]).cpu().numpy()
        draws = torch.from_numpy(keyed(seed, text).random(len(text) - 1)).to(logits.device)
        if logits.device.type == "mps":  # has no float64
            cumulative = logits[row, here].softmax(-1).cumsum(-1)
        else:
            cumulative = logits[row, here].double().softmax(-1).cumsum(-1)
        draws = draws.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
        label = torch.searchsorted(cumulative, draws, right=True)[:, 0]
        out[row, here] = label.clamp(max=logits.shape[-1] - 1)
    return out


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
    weights = [layer.module.weight for layer in layers]
    ids, targets, mask = padded(model, tokens)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with gradients_seen(layers, lambda layer, a, g: seen.update({layer.name: (a, g)})):
            loss = summed_loss(model, ids, targets, mask, "gold", 0)
            expected = torch.autograd.grad(loss, weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    if model.bos is not None:
        mask[:, 0] = True  # not counted in the factors, but the weight's gradient runs through it
    for layer, gradient in zip(layers, expected, strict=True):
        a, g = seen[layer.name]
        product = g[mask].T @ a[mask]
        gradient = gradient.T if isinstance(layer.module, Conv1D) else gradient
        gap = (product - gradient).norm() / gradient.norm().clamp(min=1e-30)
        # half precision is only as good as its digits; NaN weights are named by the first batch
        if gap > CHECK_TOLERANCE.get(gradient.dtype, 0.05):
            raise RuntimeError(
                f"collect_factors: sum g a^T of {layer.name} misses the weight's gradient by "
                f"{float(gap):.1e} of its norm; this model uses the layer in a way that factors "
                "cannot describe"
            )
    first: dict[tuple, str] = {}
    places = {name: (a.data_ptr(), a.shape) for name, (a, _) in seen.items()}
    return {layer.name: first.setdefault(places[layer.name], layer.name) for layer in layers}
