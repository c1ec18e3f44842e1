"""Sharpness of the whole model: Hessian-vector products, top eigenvalues, trace and density.

Pearlmutter (1994), "Fast exact multiplication by the Hessian": ``H v`` costs about two to four
times a gradient, and H is never formed. Each product differentiates twice backwards; the fused
attention kernels cannot do that, so attention is switched to ``eager`` and back.

The Hessian here is that of the loss itself, negative curvature included; ``workbench.curvature``
has the Kronecker approximation of its Gauss-Newton part.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int

from workbench.factors import DTYPES, LOGITS_PER_BATCH, padded, summed_loss, usable_lengths
from workbench.models import LanguageModel, buckets
from workbench.table import InputError

REDUCTIONS = ("mean", "sum")
# a graph of the gradient holds about four times what a forward pass holds
TOKENS_PER_PASS = {"cpu": 2048, "cuda": 16384, "mps": 4096}
GRAPH = 4
VECTORS = 8  # multiplied at once: they share the forward pass and the graph of the gradient
RESTARTS = 100  # of the eigenvalue iteration before it gives up
TOLERANCE = 1e-3  # of an eigenvalue, relatively; its interval says what was reached
BREAKDOWN = 1e-10  # of the norm: a Lanczos step this short has found an invariant space
LEVEL = 0.95  # of all intervals
GRID = 201  # points of a density
SMOOTHING = 0.01  # of the range of the nodes: standard deviation of what is put at each


@dataclass(frozen=True)
class Hessian:
    """Second derivatives of a token loss by some parameters, laid end to end; made by
    :func:`loss_hessian` and usable inside its ``with`` block.

    Attributes:
        tokens: The texts of the loss, as ids.
        parameters: By name; vectors hold them flattened, in this order.
        scale: What the loss summed over predicted tokens is multiplied by: 1, or 1 / their number.
    """

    model: LanguageModel
    tokens: Sequence[Int[np.ndarray, " pos"]]
    parameters: dict[str, torch.nn.Parameter]
    scale: float
    # the gradient of the last products and what it was of; one a block, also after replace()
    _kept: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def size(self) -> int:
        """Number of rows and columns."""
        return sum(each.numel() for each in self.parameters.values())

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    def loss(self) -> float:
        """The loss, in nats: per token or summed, as the reduction says."""
        with torch.no_grad():
            return sum(float(loss) for loss in self._losses())

    @torch.enable_grad()  # also inside a caller's no_grad, where it would be 0 without a word
    def gradient(self) -> Float[np.ndarray, " size"]:
        """The loss's first derivatives; what is not used has 0."""
        out = torch.zeros(self.size, dtype=self.dtype, device=self.model.device)
        for loss in self._losses():
            out += self._flat(_grad(loss, self._leaves))
        return out.cpu().double().numpy()

    def products(
        self, vectors: Float[np.ndarray, "vector size"]
    ) -> Float[np.ndarray, "vector size"]:
        """``H v`` for each row, exact but for rounding (1e-6 of its norm in float32).

        Texts are taken in chunks, and each chunk's gradient is built once for up to eight
        vectors; neither the chunks nor the vectors beside one another change a product. Texts of a
        single chunk have it built once for all calls, until a weight changes: a product then costs
        a third less, and the graph stays in memory for the length of the block.
        """
        vectors = np.atleast_2d(vectors)
        if vectors.ndim != 2 or vectors.shape[1] != self.size:
            raise InputError(
                f"products: vectors of shape {vectors.shape}, needs [vector, {self.size}]: one "
                "number for each parameter"
            )
        out = np.zeros(vectors.shape)
        for at in range(0, len(vectors), VECTORS):
            few = slice(at, at + VECTORS)
            self._add_products(torch.as_tensor(vectors[few]), torch.from_numpy(out[few]))
        return out

    def product(self, vector: Float[np.ndarray, " size"]) -> Float[np.ndarray, " size"]:
        """``H v`` of one vector."""
        return self.products(np.ravel(vector))[0]

    @torch.enable_grad()
    def _add_products(
        self,
        vectors: Float[torch.Tensor, "vector size"],
        out: Float[torch.Tensor, "vector size"],
    ) -> None:
        device = self.model.device
        on_cpu = device.type == "cpu"
        totals = out if on_cpu else torch.zeros(out.shape, dtype=self.dtype, device=device)
        for gradients, retain in self._gradients():
            # the gradient of what the loss does not use has no graph: its second derivative is 0,
            # and autograd refuses to be asked for it
            curved = [i for i, each in enumerate(gradients) if each.requires_grad]
            for row, vector in enumerate(vectors):
                # piece by piece: copies of whole vectors cost as much as the product they are for
                pieces = self._pieces(vector)
                second = _grad(
                    [gradients[i] for i in curved],
                    self._leaves,
                    vectors=[pieces[i].to(device, self.dtype) for i in curved],
                    retain_graph=retain or row + 1 < len(vectors),
                )
                for total, piece in zip(self._pieces(totals[row]), second, strict=True):
                    total += piece
        if not on_cpu:
            out += totals.cpu()

    def _gradients(self) -> Iterator[tuple[Sequence[torch.Tensor], bool]]:
        """The gradient of each chunk, with its graph, and whether that is kept for later calls."""
        self._refuse_ended()
        keep = len(self._chunks()) == 1
        weights = self.model.weights_hash() if keep else ""
        if keep and self._kept.get("of") is self and self._kept["weights"] == weights:
            yield self._kept["gradients"], True
            return
        self._kept.clear()  # before the next is built: two at once are twice the memory
        for loss in self._losses():
            gradients = _grad(loss, self._leaves, create_graph=True)
            if keep:
                self._kept.update(of=self, weights=weights, gradients=gradients)
            yield gradients, keep

    @property
    def _leaves(self) -> list[torch.nn.Parameter]:
        return list(self.parameters.values())

    def _flat(self, pieces: Sequence[torch.Tensor]) -> Float[torch.Tensor, " size"]:
        return torch.cat([each.detach().reshape(-1) for each in pieces])

    def _pieces(self, vector: Float[torch.Tensor, " size"]) -> list[torch.Tensor]:
        parts = vector.split([each.numel() for each in self._leaves])
        return [part.view_as(leaf) for part, leaf in zip(parts, self._leaves, strict=True)]

    def _refuse_ended(self) -> None:
        if not all(each.requires_grad for each in self._leaves):
            raise InputError(
                "loss_hessian: its parameters take no gradients (any more); use it inside its "
                "with block, and leave their flags alone"
            )

    def _chunks(self) -> list[Int[np.ndarray, " text"]]:
        lengths = np.array([len(each) for each in self.tokens])
        return list(buckets(lengths, tokens_per_pass(self.model)))

    def _losses(self) -> Iterator[Float[torch.Tensor, ""]]:
        self._refuse_ended()
        for batch, index in enumerate(self._chunks()):
            ids, targets, mask = padded(self.model, [self.tokens[i] for i in index])
            loss = summed_loss(self.model, ids, targets, mask, "gold", 0) * self.scale
            if not bool(torch.isfinite(loss)):
                raise InputError(
                    f"loss_hessian: the loss of batch {batch} is {float(loss)}; the weights or "
                    "the texts of that batch hold NaN or Inf, or the dtype overflows"
                )
            yield loss


def _grad(
    outputs, leaves, *, vectors=None, create_graph: bool = False, retain_graph: bool | None = None
) -> Sequence[torch.Tensor]:
    if isinstance(outputs, torch.Tensor) and not outputs.requires_grad:
        return [torch.zeros_like(each) for each in leaves]  # a loss that uses none of them
    return torch.autograd.grad(
        outputs,
        leaves,
        grad_outputs=vectors,
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def tokens_per_pass(model: LanguageModel) -> int:
    """How many tokens, padding included, a graph of the gradient is built for at once."""
    kind = model.device.type
    logits = LOGITS_PER_BATCH.get(kind, LOGITS_PER_BATCH["cpu"]) // GRAPH
    return min(TOKENS_PER_PASS.get(kind, 2048), max(1, logits // model.vocabulary))


@contextlib.contextmanager
def loss_hessian(
    model: LanguageModel,
    tokens: Sequence[Int[np.ndarray, " pos"]],
    *,
    parameters: Sequence[str] | None = None,
    reduction: str = "mean",
    dtype: str | None = None,
) -> Iterator[Hessian]:
    """The Hessian of the loss on some texts, for the length of a ``with`` block.

    The loss is the cross-entropy of each text's own next tokens, in nats. Every position that
    predicts a token counts once; the last one, padding and a BOS never do. Within the block
    attention is ``eager``, dropout is off and only the chosen parameters take gradients; after it
    all is as it was, also on an exception.

    Args:
        tokens: Token ids of each text, as ``model.encode`` gives them; at least 2 each.
        parameters: Names of parameters, or of modules, of which it takes all parameters; None
            takes all. Tied weights are one parameter, under their first name.
        reduction: ``mean`` over all predicted tokens of all texts, or their ``sum``.
        dtype: ``float32`` or ``float64``; another than the model's own is computed on a copy. None
            is the model's own, and float32 for half precision, whose products would be noise.

    Raises:
        InputError: Unknown arguments, names the model lacks, quantised weights, no texts, texts
            too short or too long; while it is used, a loss that is not finite.
    """
    if reduction not in REDUCTIONS:
        raise InputError(
            f"loss_hessian: reduction {reduction!r}; choose from {', '.join(REDUCTIONS)}"
        )
    usable_lengths(model, tokens, "loss_hessian")
    model = in_dtype(model, dtype)
    chosen = _chosen(model.module, parameters)
    counted = sum(len(each) - 1 for each in tokens)
    with twice_differentiable(model.module, chosen):
        hessian = Hessian(model, tokens, chosen, 1.0 if reduction == "sum" else 1.0 / counted)
        try:
            yield hessian
        finally:
            hessian._kept.clear()


def in_dtype(model: LanguageModel, dtype: str | None, asker: str = "loss_hessian") -> LanguageModel:
    """The model, or a copy of it in the dtype asked for.

    None is the model's own; half precision is cast to float32, with a warning that says so.

    Raises:
        InputError: An unknown dtype, or quantised weights.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"{asker}: dtype {dtype!r}; choose from {', '.join(DTYPES)}")
    for name, each in model.module.named_parameters():
        if not each.is_floating_point():
            raise InputError(
                f"{asker}: {name} holds {each.dtype} weights; second derivatives need float "
                "weights: load the model without quantisation"
            )
    own = {each.dtype for each in model.module.parameters()}
    if dtype is None and (len(own) > 1 or not own <= set(DTYPES.values())):
        dtype = "float32"
        held = ", ".join(sorted(str(each).removeprefix("torch.") for each in own))
        warnings.warn(
            f"{asker}: the weights are {held}, whose second derivatives would be noise; computed "
            "on a float32 copy",
            stacklevel=4,
        )
    if dtype is None or own == {DTYPES[dtype]}:
        return model
    copied = model.copy()
    return replace(copied, module=copied.module.to(DTYPES[dtype]))


def _chosen(module: torch.nn.Module, names: Sequence[str] | None) -> dict[str, torch.nn.Parameter]:
    found = dict(module.named_parameters())
    if names is None:
        return found
    if isinstance(names, str):
        raise InputError(f"loss_hessian: parameters is the text {names!r}, needs a list of names")
    for name in names:
        if not any(_under(each, name) for each in found):
            raise InputError(
                f"loss_hessian: this model has no parameter or module {name!r} with parameters; "
                f"it has {', '.join(sorted({_numberless(each) for each in found}))}"
            )
    chosen = {each: p for each, p in found.items() if any(_under(each, name) for name in names)}
    if not chosen:
        raise InputError("loss_hessian: no parameters were asked for, needs at least one")
    return chosen


def _numberless(parameter: str) -> str:
    """The module of a parameter, the same for all blocks, so that a list of them stays short."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", parameter.rpartition(".")[0] or parameter)


def _under(parameter: str, name: str) -> bool:
    return parameter == name or parameter.startswith(name + ".")


@contextlib.contextmanager
def twice_differentiable(
    module: torch.nn.Module, chosen: dict[str, torch.nn.Parameter]
) -> Iterator[None]:
    """Eager attention, no dropout, gradients for the chosen parameters alone, TF32 off.

    Attention of another kind is switched, with a warning that says so, and switched back.
    """
    flags = [(each, each.requires_grad) for each in module.parameters()]
    modes = [(each, each.training) for each in module.modules()]
    tf32 = torch.backends.cuda.matmul.allow_tf32
    switch = getattr(module, "set_attn_implementation", None)
    attention = module.config._attn_implementation if switch else None
    try:
        module.requires_grad_(False).eval()
        for each in chosen.values():
            each.requires_grad_(True)
        torch.backends.cuda.matmul.allow_tf32 = False
        if attention not in (None, "eager"):
            switch("eager")
            warnings.warn(
                f"second derivatives: attention is {attention}, which has none; it is eager for as "
                "long as they are taken",
                stacklevel=4,
            )
        with torch.enable_grad():
            yield
    finally:
        if attention not in (None, "eager"):
            switch(attention)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for each, flag in flags:
            each.requires_grad_(flag)
        for each, mode in modes:
            each.training = mode


# Numbers from products alone


def rademacher(
    size: int, count: int, *, seed: int, first: int = 0
) -> Float[np.ndarray, "vector size"]:
    """Vectors of fair signs. Number i depends on (seed, i) alone: more begin with the same ones."""
    draws = [np.random.default_rng([seed, first + i]).integers(0, 2, size) for i in range(count)]
    return 2.0 * np.array(draws, dtype=float).reshape(count, size) - 1.0


def top_eigenvalues(
    hessian: Hessian, count: int, *, tolerance: float = TOLERANCE, seed: int = 0
) -> tuple[Float[np.ndarray, " rank"], Float[np.ndarray, " rank"]]:
    """The largest eigenvalues, descending, and how far each may be off.

    Implicitly restarted Lanczos (ARPACK). At a minimum none is negative; the largest is the
    curvature along the sharpest direction there is.

    Args:
        tolerance: Relative precision asked of each eigenvalue.

    Returns:
        Eigenvalues, and the norms ``|H v - lambda v|`` of their unit vectors v: within that
        distance of lambda there is an eigenvalue for certain.

    Raises:
        InputError: Fewer than 1 asked for, or as many as there are parameters or more; no
            convergence.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    if not 1 <= count < hessian.size:
        raise InputError(
            f"top_eigenvalues: {count} eigenvalues of {hessian.size} parameters; needs at least 1 "
            "and fewer than there are parameters"
        )
    operator = LinearOperator((hessian.size,) * 2, matvec=hessian.product, dtype=np.float64)
    start = rademacher(hessian.size, 1, seed=seed)[0]
    try:
        _, vectors = eigsh(operator, k=count, which="LA", v0=start, tol=tolerance, maxiter=RESTARTS)
    except ArpackNoConvergence as stopped:
        raise InputError(
            f"top_eigenvalues: {len(stopped.eigenvalues)} of {count} eigenvalues reached the "
            f"tolerance of {tolerance:g} in {RESTARTS} restarts; ask for fewer, or raise it"
        ) from None
    images = hessian.products(vectors.T)
    values = np.einsum("nk,kn->k", vectors, images)
    residuals = np.linalg.norm(images - values[:, None] * vectors.T, axis=1)
    order = np.argsort(-values, kind="stable")
    return values[order], residuals[order]


def trace_samples(hessian: Hessian, probes: int, *, seed: int = 0) -> Float[np.ndarray, " probe"]:
    """``v^T H v`` for Rademacher vectors v; their mean estimates the trace without bias.

    Hutchinson (1990). The variance is twice the sum of the squared off-diagonal entries: a
    diagonal H is exact from one probe.
    """
    if probes < 1:
        raise InputError(f"trace_samples: probes is {probes}, needs at least 1")
    out = np.empty(probes)
    for at in range(0, probes, VECTORS):
        some = rademacher(hessian.size, min(VECTORS, probes - at), seed=seed, first=at)
        out[at : at + len(some)] = (some * hessian.products(some)).sum(axis=1)
    return out


def mean_interval(
    samples: Float[np.ndarray, "draw ..."],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean over draws, its standard error, and a 95 % interval by Student's t.

    Samples 1, 2, 3: mean 2, error 1 / sqrt(3), interval 2 -+ 4.3026527 / sqrt(3). One draw has no
    error: NaN.
    """
    from scipy.stats import t

    draws = len(samples)
    mean = samples.mean(axis=0)
    if draws < 2:
        empty = mean * np.nan  # a number stays one: full_like would make an array without a length
        return mean, empty, empty, empty
    error = samples.std(axis=0, ddof=1) / np.sqrt(draws)
    half = t.ppf((1 + LEVEL) / 2, draws - 1) * error
    return mean, error, mean - half, mean + half


def lanczos(
    product: Callable[[Float[np.ndarray, " size"]], Float[np.ndarray, " size"]],
    start: Float[np.ndarray, " size"],
    steps: int,
) -> tuple[Float[np.ndarray, " node"], Float[np.ndarray, " node"]]:
    """Gauss quadrature of a symmetric matrix's spectrum as seen from ``start``.

    Every new vector is made orthogonal to all before it, twice: without that, eigenvalues come
    back as ghosts. Memory is ``steps`` vectors in float64.

    Returns:
        Nodes, ascending, and weights, which sum to 1: ``sum w x^p = v^T H^p v / v^T v`` for every
        p up to ``2 steps - 1``. Fewer nodes where the start reaches fewer directions than
        ``steps``; then this holds for every p.

    Raises:
        InputError: Fewer than 1 step, or a product that is not finite.
    """
    from scipy.linalg import eigh_tridiagonal

    if steps < 1:
        raise InputError(f"lanczos: steps is {steps}, needs at least 1")
    steps = min(steps, len(start))
    basis = np.empty((steps, len(start)))
    basis[0] = start / np.linalg.norm(start)
    diagonal, beside, scale = [], [], 0.0
    for step in range(steps):
        image = np.asarray(product(basis[step]), dtype=float)
        if not np.isfinite(image).all():
            raise InputError(f"lanczos: the product of step {step} is not finite")
        scale = max(scale, np.linalg.norm(image))
        diagonal.append(basis[step] @ image)
        for _ in range(2):
            image -= basis[: step + 1].T @ (basis[: step + 1] @ image)
        length = np.linalg.norm(image)
        if step + 1 == steps or length <= BREAKDOWN * scale:
            break
        beside.append(length)
        basis[step + 1] = image / length
    nodes, vectors = eigh_tridiagonal(diagonal, beside)
    return nodes, vectors[0] ** 2


def smoothed(
    nodes: Float[np.ndarray, " node"],
    weights: Float[np.ndarray, " node"],
    grid: Float[np.ndarray, " point"],
    width: float,
) -> Float[np.ndarray, " point"]:
    """A Gaussian of standard deviation ``width`` at each node, weighted: a density over the grid.

    One node of weight 1 has its peak at ``1 / (width sqrt(2 pi))``.
    """
    from scipy.stats import norm

    return norm.pdf(grid[:, None], nodes[None, :], width) @ weights


def spectral_density(
    hessian: Hessian, *, starts: int, steps: int, seed: int = 0
) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, "start point"]]:
    """Density of the eigenvalues over a grid, once for each random start.

    Ghorbani et al. (2019): stochastic Lanczos quadrature. The integral of each is 1; their mean
    estimates how the eigenvalues of all directions lie. Nearly all lie near 0, so plot it on a
    logarithmic axis.

    Returns:
        The grid: :data:`GRID` points over all nodes and four smoothing widths around them; and a
        density for each start, per unit of eigenvalue.
    """
    if starts < 1:
        raise InputError(f"spectral_density: starts is {starts}, needs at least 1")
    found = []
    for number in range(starts):
        start = rademacher(hessian.size, 1, seed=seed, first=number)[0]
        found.append(lanczos(hessian.product, start, steps))
    every = np.concatenate([nodes for nodes, _ in found])
    # one node alone has no range; its own size, or 1, then gives the width
    span = np.ptp(every) or abs(every[0]) or 1.0
    width = SMOOTHING * span
    grid = np.linspace(every.min() - 4 * width, every.max() + 4 * width, GRID)
    return grid, np.array([smoothed(*each, grid, width) for each in found])
