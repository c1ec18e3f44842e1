"""Eigenbases of the loss curvature's Kronecker factors, and reversible edits in them.

Merullo et al. (2025), "From memorization to reasoning in the spectrum of loss curvature":
memorized text lives where ``A (x) G`` is flat, and removing those components of W removes the
recitation. George et al. (2018) correct the masses of the components in the same eigenbases.

The factors come from ``workbench.factors``, and what is read out of an edited model stands in
``workbench.probes.curvature``; ``workbench.patches`` keeps edits on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from workbench.factors import (
    LABELS,
    Factors,
    Layer,
    frozen,
    gradients_seen,
    keyed,
    padded,
    summed_loss,
    tokens_per_batch,
    with_full_digits,
)
from workbench.models import WEIGHTS_SAMPLED, LanguageModel, buckets
from workbench.table import InputError

METHODS = ("kfac", "saliency", "svd", "magnitude", "random", "ekfac")
MASKED = ("kfac", "saliency", "random", "ekfac")  # those that keep or drop whole components
EXAMPLES = ("token", "sequence")
TIE = 1e-12  # masses closer than this, relatively, are one group and are cut together
MIN_POWER = -1000  # of two; float64 does not hold the reciprocals of much smaller numbers
BLOCK = 2**17  # scores ranked at once: they stay in the processor's cache


# Eigenbases


@dataclass
class Basis:
    """A weight in the eigenbases of its factors, ``W = U_G C U_A^T``; all in float64.

    Component (i, j) is ``C[j, i] u_j v_i^T``; its curvature mass is ``lambda_i mu_j``.

    Attributes:
        input_values: lambda, eigenvalues of A, descending, none negative.
        input_vectors: U_A, one eigenvector a column.
        output_values, output_vectors: mu and U_G, the same of G.
        coefficients: C.
        clamped: Negative eigenvalue mass that was set to 0, as a share of all absolute mass; of
            the worse factor. 0 but for rounding: a factor is a sum of squares.
        hash: Of the weight that was decomposed.
        corrected: Second moments of the gradient in the eigenbases, as :func:`correct_masses`
            adds them; None before.
    """

    layer: Layer
    input_values: Float[np.ndarray, " in"]
    input_vectors: Float[torch.Tensor, "in in"]
    output_values: Float[np.ndarray, " out"]
    output_vectors: Float[torch.Tensor, "out out"]
    coefficients: Float[torch.Tensor, "out in"]
    clamped: float
    hash: str
    corrected: Float[np.ndarray, "out in"] | None = None
    _seen: tuple | None = field(default=None, init=False, repr=False, compare=False)

    def matrix(self, coefficients: Float[torch.Tensor, "out in"]) -> torch.Tensor:
        """Back from the eigenbases: ``U_G C U_A^T``; rows and columns of zeros cost nothing."""
        used = coefficients != 0
        rows, columns = (_last(used.any(dim=1 - axis)) for axis in (0, 1))
        return torch.linalg.multi_dot(
            (
                self.output_vectors[:, :rows],
                coefficients[:rows, :columns],
                self.input_vectors[:, :columns].T,
            )
        )

    def project(self, matrix: Float[torch.Tensor, "out in"]) -> torch.Tensor:
        """Into the eigenbases: ``U_G^T W U_A``."""
        return self.output_vectors.T @ matrix @ self.input_vectors

    @cached_property
    def masses(self) -> Float[np.ndarray, "out in"]:
        """``lambda_i mu_j`` of every component."""
        return self.output_values[:, None] * self.input_values[None, :]

    @cached_property
    def singular(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Singular value decomposition of C, which is that of W turned into the eigenbases."""
        return torch.linalg.svd(self.coefficients, full_matrices=False)

    @cached_property
    def by_saliency(self) -> Ranking:
        """Components ranked by ``C^2 lambda mu``, once for all shares."""
        return Ranking(
            lambda places, rows, columns: (
                self._coefficients[places] ** 2
                * self.output_values[rows]
                * self.input_values[columns]
            ),
            self._coefficients.shape,
        )

    @cached_property
    def by_corrected_mass(self) -> Ranking:
        """Components ranked by their corrected masses, once for all shares."""
        return Ranking(lambda places, *_: self.corrected[places], self.corrected.shape)

    @cached_property
    def _coefficients(self) -> Float[np.ndarray, "out in"]:
        return self.coefficients.cpu().numpy()


def _last(used: Bool[torch.Tensor, " n"]) -> int:
    """How many entries there are up to the last that is used."""
    places = used.nonzero()
    return int(places[-1]) + 1 if len(places) else 0


def decompose(factors: Factors) -> list[Basis]:
    """Eigenbases of every layer's factors, and its weight as it is now in them.

    Raises:
        InputError: A factor that is not finite; the layer is named.
    """
    known: dict[int, tuple] = {}
    bases = []
    for layer in factors.layers:
        parts = []
        for factor, what in ((factors.inputs, "input"), (factors.outputs, "output")):
            matrix = factor[layer.name]
            if id(matrix) not in known:
                known[id(matrix)] = spectrum(matrix, f"the {what} factor of {layer.name}")
            parts.append(known[id(matrix)])
        (a_values, a_vectors, a_clamped), (g_values, g_vectors, g_clamped) = parts
        weight = layer.matrix.detach().to(a_vectors.device, torch.float64)
        bases.append(
            Basis(
                layer=layer,
                input_values=a_values,
                input_vectors=a_vectors,
                output_values=g_values,
                output_vectors=g_vectors,
                coefficients=g_vectors.T @ weight @ a_vectors,
                clamped=max(a_clamped, g_clamped),
                hash=weight_hash(layer),
            )
        )
    return bases


def spectrum(
    matrix: Float[torch.Tensor, "n n"], name: str
) -> tuple[Float[np.ndarray, " n"], Float[torch.Tensor, "n n"], float]:
    """Eigenvalues (descending, negatives clamped to 0), eigenvectors as columns, clamped share."""
    if not bool(torch.isfinite(matrix).all()):
        raise InputError(f"decompose: {name} holds NaN or Inf; collect the factors again")
    if matrix.device.type == "mps":  # has no float64
        matrix = matrix.cpu()
    matrix = matrix.double()
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values, vectors = values.flip(0).cpu().numpy(), vectors.flip(1).contiguous()
    total = np.abs(values).sum()
    clamped = float(np.maximum(-values, 0.0).sum() / total) if total > 0 else 0.0
    return np.maximum(values, 0.0), vectors, clamped


def weight_hash(layer: Layer) -> str:
    """Hash of a layer's weight as it is now, 16 hexadecimal digits."""
    flat = layer.module.weight.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.blake2b(memoryview(flat.numpy()), digest_size=8).hexdigest()


# Which components are kept


def refuse_share(rho: float, asker: str) -> None:
    """A share kept lies in (0, 1]; a NaN does not."""
    if not 0 < rho <= 1:
        raise InputError(f"{asker}: rho is {rho}, the share that is kept; needs 0 < rho <= 1")


def staircase(
    input_values: Float[np.ndarray, " in"], output_values: Float[np.ndarray, " out"], rho: float
) -> Int[np.ndarray, " out"]:
    """How many input directions each output direction keeps: the smallest set with mass ``rho``.

    The set holds the largest masses ``lambda_i mu_j``, both descending, so it is a staircase: row
    j keeps the first ``k_j``. Its threshold is found by bisection over the floats themselves (at
    most 64 steps), the mass above a threshold by prefix sums: nothing of size out x in is made.

    Returns:
        ``k_j``, descending. Masses equal to the last one kept (to 1e-12) are kept as well. At
        ``rho = 1`` everything is kept, components without mass included.

    Raises:
        InputError: ``rho`` outside (0, 1], or no mass at all.
    """
    refuse_share(rho, "staircase")
    total = input_values.sum() * output_values.sum()
    if rho == 1:
        return np.full(len(output_values), len(input_values))
    if not total > 0:
        raise InputError("staircase: the factors hold no mass; needs texts with a gradient")
    upward, sums = -input_values, np.concatenate([[0.0], np.cumsum(input_values)])

    def count(threshold: float) -> Int[np.ndarray, " out"]:
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            return np.searchsorted(upward, -(threshold / output_values), side="right")

    # float64 bit patterns of positive numbers are ordered as the numbers are
    top = input_values[0] * output_values[0]
    low, high = 0, int(np.float64(top).view(np.int64)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        threshold = np.int64(middle).view(np.float64)
        if output_values @ sums[count(threshold)] >= rho * total:
            low = middle
        else:
            high = middle
    return count(np.int64(low).view(np.float64) * (1 - TIE))


def stairs_mask(steps: Int[np.ndarray, " out"], width: int) -> Bool[np.ndarray, "out in"]:
    """The staircase as a mask: row j keeps its first ``steps[j]`` columns."""
    return np.arange(width)[None, :] < steps[:, None]


class Ranking:
    """Scores by size, for one pass over them and then a cut at any share.

    Each score's leading digits (as float32: exponent and 8 binary digits) are kept, with the
    sums of the scores that begin alike. A cut needs the exact values only of those that begin as
    the last one kept does, so nothing is ever sorted as a whole.

    Args:
        scores: Their values, float64 and at least 0, at ``(places, rows, columns)``: an index into
            the matrix, and the numbers of its rows and columns; of a block, or of single places.
    """

    def __init__(self, scores: Callable[..., np.ndarray], shape: tuple[int, int]):
        self.scores, self.shape = scores, shape
        self._digits = np.empty(shape, dtype=np.uint16)
        rows = max(1, BLOCK // shape[1])
        self._blocks = [slice(at, at + rows) for at in range(0, shape[0], rows)]
        # into float32's range, as far as the first rows tell: scores beyond it begin alike, which
        # costs time and no digits
        power = int(np.frexp(self._block(self._blocks[0]).max())[1])
        self._scale = 2.0 ** -max(power, MIN_POWER)
        sums = np.zeros(2**16)
        for rows in self._blocks:
            block = self._block(rows)
            digits = self._leading(block)
            self._digits[rows] = digits
            found = np.bincount(digits.ravel(), weights=block.ravel())
            sums[: len(found)] += found
        self._held = np.cumsum(sums[::-1])  # of all that begin alike or larger, from the largest

    def _block(self, rows: slice) -> Float[np.ndarray, "row in"]:
        return self.scores(
            rows, np.arange(self.shape[0])[rows, None], np.arange(self.shape[1])[None]
        )

    def _at(self, places: tuple[np.ndarray, np.ndarray]) -> Float[np.ndarray, " place"]:
        return self.scores(places, *places)

    def _leading(self, scores: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return (scores * self._scale).astype(np.float32).view(np.uint32) >> 15

    def _places(self, digits: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the scores that begin so."""
        same = [np.flatnonzero(self._digits[rows] == digits) for rows in self._blocks]
        starts = [rows.start * self.shape[1] for rows in self._blocks]
        flat = np.concatenate([at + start for at, start in zip(same, starts, strict=True)])
        return np.divmod(flat, self.shape[1])

    def threshold(self, rho: float) -> float:
        """The least score kept by the smallest set that holds the share ``rho`` of the sum.

        Raises:
            InputError: ``rho`` outside (0, 1], or scores that are all 0.
        """
        refuse_share(rho, "largest")
        total = self._held[-1]
        if rho == 1:
            return 0.0
        if not total > 0:
            raise InputError("largest: all scores are 0; needs some that are not")
        place = int(np.searchsorted(self._held, rho * total))
        ordered = np.sort(self._at(self._places(len(self._held) - 1 - place)))[::-1]
        before = self._held[place - 1] if place else 0.0
        last = np.searchsorted(before + np.cumsum(ordered), rho * total)
        return float(ordered[min(last, len(ordered) - 1)])

    def mask(self, rho: float) -> Bool[np.ndarray, "out in"]:
        """That set; scores equal to the last one (to 1e-12) belong to it. All, where rho is 1."""
        least = self.threshold(rho) * (1 - TIE)
        digits = int(self._leading(np.array([least]))[0])
        kept = self._digits > digits
        places = self._places(digits)
        kept[places] = self._at(places) >= least
        return kept


def largest(scores: Float[np.ndarray, "out in"], rho: float) -> Bool[np.ndarray, "out in"]:
    """The smallest set of largest scores that holds the share ``rho`` of their sum; ties together.

    Raises:
        InputError: ``rho`` outside (0, 1], or scores that are all 0.
    """
    return Ranking(lambda places, *_: scores[places], scores.shape).mask(rho)


def component_mask(
    basis: Basis, *, method: str, rho: float, seed: int = 0
) -> Bool[np.ndarray, "out in"]:
    """Components of C that an edit in the Kronecker basis keeps.

    Args:
        method: ``kfac`` ranks by mass ``lambda mu`` (Merullo et al. 2025) and keeps the share
            ``rho`` of it; ``saliency`` ranks by ``C^2 lambda mu``, twice the second-order damage,
            and keeps its share; ``ekfac`` ranks by corrected mass and keeps its share; ``random``
            keeps each component with probability ``rho``, nested in ``rho``.

    Raises:
        InputError: An unknown method, ``rho`` outside (0, 1], or ``ekfac`` with bases that carry
            no corrected masses.
    """
    refuse_share(rho, "component_mask")
    if method == "kfac":
        steps = staircase(basis.input_values, basis.output_values, rho)
        return stairs_mask(steps, len(basis.input_values))
    if method == "saliency":
        return basis.by_saliency.mask(rho)
    if method == "ekfac":
        if basis.corrected is None:
            raise InputError(
                "component_mask: method ekfac needs corrected masses, which these bases do not "
                "carry; make them with correct_masses(model, bases, tokens)"
            )
        return basis.by_corrected_mass.mask(rho)
    if method == "random":
        name = np.frombuffer(basis.layer.name.encode(), dtype=np.uint8)
        return keyed(seed, name).random(tuple(basis.coefficients.shape)) < rho
    raise InputError(f"component_mask: method {method!r}; choose from {', '.join(MASKED)}")


def edited_coefficients(
    basis: Basis, *, method: str, rho: float, seed: int = 0
) -> tuple[Float[torch.Tensor, "out in"], float]:
    """C after an edit, and the share of what was kept: of components, ranks or weights.

    Args:
        method: As :func:`component_mask`, or ``svd``, which keeps the share ``rho`` of the ranks
            (the largest singular values; at least one), or ``magnitude``, which keeps the share
            ``rho`` of the entries of W, the largest.

    Raises:
        InputError: An unknown method, ``rho`` outside (0, 1].
    """
    refuse_share(rho, "edited_coefficients")
    if method not in METHODS:
        raise InputError(
            f"edited_coefficients: method {method!r}; choose from {', '.join(METHODS)}"
        )
    if method == "svd":
        left, values, right = basis.singular
        ranks = int(np.ceil(rho * len(values) - 1e-9))  # .3 * 10 is 3.0000000000000004
        return (left[:, :ranks] * values[:ranks]) @ right[:ranks], ranks / len(values)
    if method == "magnitude":
        kept, share = _pruned(basis.matrix(basis.coefficients), rho)
        return basis.project(kept), share
    mask = component_mask(basis, method=method, rho=rho, seed=seed)
    kept = basis.coefficients * torch.from_numpy(mask).to(basis.coefficients.device)
    return kept, float(mask.mean())


def _pruned(
    weight: Float[torch.Tensor, "out in"], rho: float
) -> tuple[Float[torch.Tensor, "out in"], float]:
    """A weight without all but the share ``rho`` of its largest entries, and the share kept."""
    entries = int(np.ceil(rho * weight.numel() - 1e-9))
    size = weight.abs()
    smallest_kept = size.flatten().kthvalue(weight.numel() - entries + 1).values
    keep = size >= smallest_kept * (1 - TIE)
    return weight * keep, float(keep.double().mean())


def predicted_damage(basis: Basis, coefficients: Float[torch.Tensor, "out in"]) -> float:
    """Second-order rise of the mean loss when C becomes ``coefficients``, in nats per token.

    ``1/2 tr(R^T G R A)`` with R the part of W that went, which in the eigenbases is
    ``1/2 sum (C - C')^2 lambda mu``; where the bases carry corrected masses, these stand in the
    place of ``lambda mu``, whatever the edit. 0 for no edit, and never negative.
    """
    gone = (basis.coefficients - coefficients).square_().cpu().numpy()
    if basis.corrected is not None:
        return 0.5 * float(np.vdot(gone, basis.corrected))
    return 0.5 * float(basis.output_values @ gone @ basis.input_values)


# Corrected masses


def correct_masses(
    model: LanguageModel,
    bases: Sequence[Basis],
    tokens: Sequence[Int[np.ndarray, " pos"]],
    *,
    labels: str = "sampled",
    seed: int = 0,
    example: str = "token",
) -> list[Basis]:
    """The same bases with the second moments of the gradient in them, ``E[(u_j^T D v_i)^2]``.

    George et al. (2018), "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis": the best diagonal there is in these bases, in the Frobenius norm, where
    ``lambda_i mu_j`` supposes that inputs and gradients are independent. One more pass over texts.

    Args:
        tokens: Token ids of each text, at least 2 each: those of the factors, or others like them.
        labels, seed: As ``collect_factors``.
        example: What D is the gradient of. ``token``: one position, ``D = g a^T``, the average
            that K-FAC splits in two; the masses then sum to ``E |g|^2 |a|^2``. ``sequence``: a
            text's summed loss, ``D = sum g a^T`` over its positions, whose diagonal is that of the
            Fisher itself (with sampled labels), what positions share included.

    Returns:
        Bases with ``corrected``, both ways divided by the number of predicted tokens, so that
        damage stays in nats per token: independent tokens give ``lambda_i mu_j``.

    Raises:
        InputError: Unknown arguments, texts too short or too long, another model or other weights
            than were decomposed, or gradients that are not finite.
    """
    asker = "correct_masses"
    for what, given, known in (("labels", labels, LABELS), ("example", example, EXAMPLES)):
        if given not in known:
            raise InputError(f"{asker}: {what} {given!r}; choose from {', '.join(known)}")
    lengths = np.array([len(each) for each in tokens], dtype=np.int64)
    wrong = (lengths < 2) | (lengths > model.context)
    if wrong.any() or not len(lengths):
        raise InputError(
            f"{asker}: {wrong.sum()} of {len(lengths)} texts are shorter than 2 or longer than the "
            f"context of {model.context} tokens; needs at least one text, and none such"
        )
    refuse_other_model(model, bases, asker)
    for basis in bases:
        _refuse_other_weights(basis, asker)
    sums = MassSums({basis.layer.name: basis for basis in bases}, example)
    model = with_full_digits(model, asker)  # a copy, where the weights are in half precision
    layers = [
        replace(basis.layer, module=model.module.get_submodule(basis.layer.name)) for basis in bases
    ]
    with frozen(model.module), gradients_seen(layers, sums.see):
        for index in buckets(lengths, tokens_per_batch(model)):
            ids, targets, mask = padded(model, [tokens[i] for i in index])
            sums.begin(mask)
            summed_loss(model, ids, targets, mask, labels, seed).backward()
    return [replace(basis, corrected=sums.mean(basis.layer.name)) for basis in bases]


@dataclass
class MassSums:
    """Running sums of ``(u_j^T D v_i)^2`` over examples, in float64, and the count of tokens."""

    bases: dict[str, Basis]
    example: str
    count: int = 0
    mask: Bool[torch.Tensor, "item pos"] | None = None
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def begin(self, mask: Bool[torch.Tensor, "item pos"]) -> None:
        """The loss mask of the coming batch."""
        self.mask = mask
        self.count += int(mask.sum())

    def see(
        self,
        layer: Layer,
        given: Float[torch.Tensor, "item pos in"],
        gradient: Float[torch.Tensor, "item pos out"],
    ) -> None:
        """What :func:`gradients_seen` calls."""
        basis = self.bases[layer.name]
        device = basis.coefficients.device
        if self.example == "token":
            given, gradient = given[self.mask], gradient[self.mask]
        # what is not counted has no gradient, but for a BOS, which the text's gradient runs through
        a = given.to(device) @ basis.input_vectors.to(given.dtype)
        g = gradient.detach().to(device) @ basis.output_vectors.to(gradient.dtype)
        if layer.name not in self.sums:
            self.sums[layer.name] = torch.zeros_like(basis.coefficients)
        total = self.sums[layer.name]
        if self.example == "token":
            total += g.square().T @ a.square()
        else:
            for inputs, outputs in zip(a, g, strict=True):
                total += (outputs.T @ inputs).square()

    def mean(self, name: str) -> Float[np.ndarray, "out in"]:
        """The sums by the token; they are let go."""
        mean = (self.sums.pop(name) / self.count).cpu().numpy()
        if not np.isfinite(mean).all():
            raise InputError(
                f"correct_masses: the gradients of {name} are not finite; the weights or the texts "
                "hold NaN or Inf, or its dtype overflows"
            )
        return mean


# Edits


@dataclass(frozen=True)
class Edit:
    """What an edit did: the share kept over all layers, and the damage it predicts."""

    method: str
    rho: float
    kept: float
    predicted_damage: float


@contextlib.contextmanager
def edited(
    bases: Sequence[Basis], *, method: str = "kfac", rho: float, seed: int = 0
) -> Iterator[Edit]:
    """Edit the weights for the length of a ``with`` block; they come back even on an exception.

    ``rho = 1`` leaves every weight as it is, to the bit. Nothing is written to disk.

    Yields:
        The share kept (weighted by the size of the layers) and the predicted damage, summed over
        layers, in nats per token.

    Raises:
        InputError: An unknown method, ``rho`` outside (0, 1], or weights other than those that
            were decomposed (another checkpoint, or an edit inside an edit).
    """
    for basis in bases:
        _refuse_other_weights(basis, "edited")
    before = [basis.layer.module.weight.detach().clone() for basis in bases]
    kept, damage, size = 0.0, 0.0, 0
    try:
        for basis in bases:
            matrix, coefficients, share = _edited_matrix(basis, method, rho, seed)
            if share < 1:
                _write(basis.layer, matrix)
                damage += predicted_damage(basis, coefficients)
            kept += share * coefficients.numel()
            size += coefficients.numel()
        yield Edit(method, rho, kept / size, damage)
    finally:
        for basis, weight in zip(bases, before, strict=True):
            with torch.no_grad():
                basis.layer.module.weight.copy_(weight)
            basis._seen = _seen(basis.layer.module.weight)


def _edited_matrix(basis: Basis, method: str, rho: float, seed: int):
    if method == "magnitude" and 0 < rho <= 1:
        # of the weight itself, so that the entries kept are so to the bit
        device = basis.coefficients.device
        matrix, share = _pruned(basis.layer.matrix.detach().to(device, torch.float64), rho)
        return matrix, basis.project(matrix), share
    coefficients, share = edited_coefficients(basis, method=method, rho=rho, seed=seed)
    return (basis.matrix(coefficients) if share < 1 else None), coefficients, share


def refuse_other_model(model: LanguageModel, bases: Sequence[Basis], asker: str) -> None:
    """Bases belong to the module whose layers were decomposed, not to one that looks like it."""
    modules = dict(model.module.named_modules())
    for basis in bases:
        if modules.get(basis.layer.name) is not basis.layer.module:
            raise InputError(
                f"{asker}: {basis.layer.name} was decomposed in another model than the one given; "
                "give that one"
            )


def _refuse_other_weights(basis: Basis, asker: str) -> None:
    """By the hash; not again for weights that nobody has touched, as ``weights_hash`` does."""
    seen = _seen(basis.layer.module.weight)
    if (seen is None or seen != basis._seen) and weight_hash(basis.layer) != basis.hash:
        raise InputError(
            f"{asker}: {basis.layer.name} holds other weights than were decomposed; "
            "decompose these, or leave the edit they are in"
        )
    basis._seen = seen


def _seen(weight: torch.Tensor) -> tuple | None:
    """Where a weight lies, how often it was written to, and some of its values."""
    if weight.is_inference():  # which is not counted
        return None
    flat = weight.detach().flatten()
    some = flat[:: max(1, len(flat) // WEIGHTS_SAMPLED)].cpu().contiguous()
    return weight.data_ptr(), weight._version, some.view(torch.uint8).numpy().tobytes()


def _write(layer: Layer, matrix: Float[torch.Tensor, "out in"]) -> None:
    with torch.no_grad():
        layer.matrix.copy_(matrix.to(layer.matrix.device))
