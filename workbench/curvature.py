"""Eigenbases of the loss curvature's Kronecker factors, and reversible edits in them.

Merullo et al. (2025), "From memorization to reasoning in the spectrum of loss curvature":
memorized text lives where ``A (x) G`` is flat, and removing those components of W removes the
recitation.

Here are only the mathematics; the factors come from ``workbench.factors``, and what is read out of
a model stands in ``workbench.probes.curvature``.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from workbench.factors import Factors, Layer, keyed
from workbench.table import InputError

METHODS = ("kfac", "saliency", "svd", "magnitude", "random")
TIE = 1e-12  # masses closer than this, relatively, are one group and are cut together


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
    """

    layer: Layer
    input_values: Float[np.ndarray, " in"]
    input_vectors: Float[torch.Tensor, "in in"]
    output_values: Float[np.ndarray, " out"]
    output_vectors: Float[torch.Tensor, "out out"]
    coefficients: Float[torch.Tensor, "out in"]
    clamped: float
    hash: str

    def matrix(self, coefficients: Float[torch.Tensor, "out in"]) -> torch.Tensor:
        """Back from the eigenbases: ``U_G C U_A^T``."""
        return self.output_vectors @ coefficients @ self.input_vectors.T

    @cached_property
    def masses(self) -> Float[np.ndarray, "out in"]:
        """``lambda_i mu_j`` of every component."""
        return self.output_values[:, None] * self.input_values[None, :]

    @cached_property
    def singular(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Singular value decomposition of C, which is that of W turned into the eigenbases."""
        return torch.linalg.svd(self.coefficients, full_matrices=False)


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


def largest(scores: Float[np.ndarray, "out in"], rho: float) -> Bool[np.ndarray, "out in"]:
    """The smallest set of largest scores that holds the share ``rho`` of their sum; ties together.

    Raises:
        InputError: ``rho`` outside (0, 1], or scores that are all 0.
    """
    refuse_share(rho, "largest")
    if rho == 1:
        return np.ones(scores.shape, dtype=bool)
    ordered = np.sort(scores, axis=None)[::-1]
    held = np.cumsum(ordered)
    if not held[-1] > 0:
        raise InputError("largest: all scores are 0; needs some that are not")
    last = min(np.searchsorted(held, rho * held[-1]), len(ordered) - 1)
    return scores >= ordered[last] * (1 - TIE)


def component_mask(
    basis: Basis, *, method: str, rho: float, seed: int = 0
) -> Bool[np.ndarray, "out in"]:
    """Components of C that an edit in the Kronecker basis keeps.

    Args:
        method: ``kfac`` ranks by mass ``lambda mu`` (Merullo et al. 2025) and keeps the share
            ``rho`` of it; ``saliency`` ranks by ``C^2 lambda mu``, twice the second-order damage,
            and keeps its share; ``random`` keeps each component with probability ``rho``,
            nested in ``rho``.

    Raises:
        InputError: An unknown method, ``rho`` outside (0, 1].
    """
    refuse_share(rho, "component_mask")
    if method == "kfac":
        steps = staircase(basis.input_values, basis.output_values, rho)
        return stairs_mask(steps, len(basis.input_values))
    if method == "saliency":
        return largest(basis.coefficients.cpu().numpy() ** 2 * basis.masses, rho)
    if method == "random":
        name = np.frombuffer(basis.layer.name.encode(), dtype=np.uint8)
        return keyed(seed, name).random(tuple(basis.coefficients.shape)) < rho
    raise InputError(f"component_mask: method {method!r}; choose kfac, saliency or random")


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
        weight = basis.matrix(basis.coefficients)
        entries = int(np.ceil(rho * weight.numel() - 1e-9))
        size = weight.abs()
        smallest_kept = size.flatten().kthvalue(weight.numel() - entries + 1).values
        keep = size >= smallest_kept * (1 - TIE)
        kept = basis.output_vectors.T @ (weight * keep) @ basis.input_vectors
        return kept, float(keep.double().mean())
    mask = component_mask(basis, method=method, rho=rho, seed=seed)
    kept = basis.coefficients * torch.from_numpy(mask).to(basis.coefficients.device)
    return kept, float(mask.mean())


def predicted_damage(basis: Basis, coefficients: Float[torch.Tensor, "out in"]) -> float:
    """Second-order rise of the mean loss when C becomes ``coefficients``, in nats per token.

    ``1/2 tr(R^T G R A)`` with R the part of W that went, which in the eigenbases is
    ``1/2 sum (C - C')^2 lambda mu``. 0 for no edit, and never negative.
    """
    gone = (basis.coefficients - coefficients).cpu().numpy()
    return float(0.5 * (gone**2 * basis.masses).sum())


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
        if weight_hash(basis.layer) != basis.hash:
            raise InputError(
                f"edited: {basis.layer.name} holds other weights than were decomposed; "
                "decompose these, or leave the edit they are in"
            )
    before = [basis.layer.module.weight.detach().clone() for basis in bases]
    kept, damage, size = 0.0, 0.0, 0
    try:
        for basis in bases:
            coefficients, share = edited_coefficients(basis, method=method, rho=rho, seed=seed)
            if share < 1:
                _write(basis.layer, basis.matrix(coefficients))
                damage += predicted_damage(basis, coefficients)
            kept += share * coefficients.numel()
            size += coefficients.numel()
        yield Edit(method, rho, kept / size, damage)
    finally:
        for basis, weight in zip(bases, before, strict=True):
            with torch.no_grad():
                basis.layer.module.weight.copy_(weight)


def _write(layer: Layer, matrix: Float[torch.Tensor, "out in"]) -> None:
    with torch.no_grad():
        layer.matrix.copy_(matrix.to(layer.matrix.device))
