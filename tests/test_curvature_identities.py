"""What the curvature must satisfy whatever its numbers, on real architectures, and what it must not.

Each identity says how far it is missed, and how far its negative control misses it: the same with
one thing wrong, which must show. The deep linear net, for which K-FAC is exact, and the layers one
position at a time stand in test_factors.py; agreement with a peer in test_curvature_oracle.py.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from tests.curvature_models import KINDS, build, collect, texts
from workbench import curvature as cv
from workbench import factors as fc
from workbench import hessian as hs
from workbench.fisher import diagonal_fisher
from workbench.models import LanguageModel

# relative, in float64; but attention's softmax is float32 in GPT-NeoX and Llama whatever the
# weights are, which shows wherever a text runs again in another batch
ALGEBRA = 1e-9
RUN_AGAIN = 1e-6
CONTROL = 0.01
LENGTHS = (30, 9, 17, 4)
RHO = 0.9


@cache
def made(kind: str) -> tuple[LanguageModel, fc.Factors, tuple[cv.Basis, ...]]:
    model = build(kind)
    factors = collect(model, texts(*LENGTHS), labels="gold")
    return model, factors, tuple(cv.decompose(factors))


def gap(got, expected) -> float:
    got, expected = (torch.as_tensor(np.asarray(each)).double() for each in (got, expected))
    return float((got - expected).norm() / expected.norm())


def gap_of_factors(one: fc.Factors, other: fc.Factors) -> float:
    pairs = zip(one.layers, other.layers, strict=True)
    return max(
        max(
            gap(one.inputs[a.name], other.inputs[b.name]),
            gap(one.outputs[a.name], other.outputs[b.name]),
        )
        for a, b in pairs
    )


def with_factors(layer: fc.Layer, a: torch.Tensor, g: torch.Tensor) -> cv.Basis:
    return cv.decompose(fc.Factors((layer,), {layer.name: a}, {layer.name: g}, 1, "gold", 0))[0]


def kept(basis: cv.Basis, method: str = "kfac", rho: float = RHO) -> torch.Tensor:
    return basis.matrix(cv.edited_coefficients(basis, method=method, rho=rho)[0])


def each_layer(kind: str, missed_and_control) -> tuple[float, float]:
    """The worst layer for the identity, and the best for the control."""
    _, factors, bases = made(kind)
    found = [
        missed_and_control(
            basis, factors.inputs[basis.layer.name], factors.outputs[basis.layer.name]
        )
        for basis in bases
    ]
    return max(missed for missed, _ in found), min(control for _, control in found)


# Masses


def masses_sum_to_the_product_of_traces(kind):
    def of_layer(basis, a, g):
        total = basis.masses.sum()
        return gap(total, float(a.trace() * g.trace())), gap(total, float((g.trace() * a).norm()))

    return each_layer(kind, of_layer)


def masses_are_eigenvalues_of_the_kronecker_product(kind):
    def of_layer(basis, a, g):
        # G (u v^T) A = lambda mu u v^T for every pair at once
        u, v, masses = basis.output_vectors, basis.input_vectors, torch.as_tensor(basis.masses)
        quotients = (u.T @ g @ u).diagonal()[:, None] * (v.T @ a @ v).diagonal()
        along = (u.T @ g @ u)[:, :, None, None] * (v.T @ a @ v)
        off = along.clone()
        off.diagonal(dim1=0, dim2=1).zero_()  # u_i G u_j with i != j
        swapped = (u.T @ g @ u).diagonal()[:, None] * (v @ a @ v.T).diagonal()  # rows for columns
        missed = max(gap(quotients, masses), float(off.norm() / masses.norm()))
        return missed, gap(swapped, masses)

    return each_layer(kind, of_layer)


def the_whole_curvature_is_a_sum_over_components(kind):
    def of_layer(basis, a, g):
        # sum over components of mass times its projector, applied to a random matrix
        d = torch.as_tensor(np.random.default_rng(0).normal(size=basis.coefficients.shape))
        parts = basis.output_vectors.T @ d @ basis.input_vectors * torch.as_tensor(basis.masses)
        product = basis.output_vectors @ parts @ basis.input_vectors.T
        return gap(product, g @ d @ a), gap(product, d * (g.trace() * a.trace() / d.numel()))

    return each_layer(kind, of_layer)


# Edits


def a_share_of_one_is_the_identity(kind):
    model, _, bases = made(kind)
    before, missed, control = model.weights_hash(), 0.0, []
    for method in ("kfac", "saliency", "svd", "magnitude", "random"):
        with cv.edited(bases, method=method, rho=1):
            missed = max(missed, float(model.weights_hash() != before))
        weights = [basis.layer.matrix.detach().clone() for basis in bases]
        with cv.edited(bases, method=method, rho=0.5):
            changed = [gap(b.layer.matrix.detach(), w) for b, w in zip(bases, weights, strict=True)]
        control.append(float(np.mean(changed)))
        missed = max(missed, float(model.weights_hash() != before))
    return missed, min(control)


def kept_and_removed_are_orthogonal(kind):
    def of_layer(basis, a, g):
        def cosines(method):
            stays = kept(basis, method, 0.5)
            goes = basis.layer.matrix.detach() - stays
            plain = (stays * goes).sum() / (stays.norm() * goes.norm())
            by_curvature = (stays * (g @ goes @ a)).sum().abs()
            scale = ((stays * (g @ stays @ a)).sum() * (goes * (g @ goes @ a)).sum()).sqrt()
            return float(plain.abs()), float(by_curvature / scale)

        # largest entries are orthogonal too, but not in the metric of the curvature
        return max(cosines("kfac")), cosines("magnitude")[1]

    missed, _ = each_layer(kind, of_layer)
    _, factors, bases = made(kind)
    control = [
        of_layer(b, factors.inputs[b.layer.name], factors.outputs[b.layer.name])[1] for b in bases
    ]
    return missed, float(np.median(control))


def an_edit_twice_is_that_edit(kind):
    def of_layer(basis, a, g):
        once = kept(basis, "kfac", 0.7)
        again = replace(basis, coefficients=basis.project(once))
        return gap(kept(again, "kfac", 0.7), once), gap(kept(again, "kfac", 0.3), once)

    return each_layer(kind, of_layer)


def shares_are_nested(kind):
    def of_layer(basis, a, g):
        outside, by_chance = [], []
        masks = [cv.component_mask(basis, method="kfac", rho=r) for r in (0.3, 0.6, 0.9, 0.99)]
        for inner, outer in itertools.pairwise(masks):
            outside.append(float((inner & ~outer).mean()))
            shuffled = np.random.default_rng(0).permutation(outer.ravel()).reshape(outer.shape)
            by_chance.append(float((inner & ~shuffled).mean()))
        assert 0 < masks[0].sum() < masks[-1].sum() < masks[-1].size
        return max(outside), max(by_chance)

    return each_layer(kind, of_layer)


def what_is_kept_is_the_smallest_set(kind):
    def of_layer(basis, a, g):
        masses = np.sort(basis.masses, axis=None)[::-1]
        needed = int(np.searchsorted(np.cumsum(masses), RHO * masses.sum())) + 1
        sizes = {m: cv.component_mask(basis, method=m, rho=RHO).sum() for m in ("kfac", "random")}
        return abs(sizes["kfac"] - needed) / needed, abs(sizes["random"] - needed) / needed

    return each_layer(kind, of_layer)


def predicted_damage_is_half_the_trace(kind):
    def of_layer(basis, a, g):
        coefficients, _ = cv.edited_coefficients(basis, method="kfac", rho=0.7)
        predicted = cv.predicted_damage(basis, coefficients)
        gone = basis.layer.matrix.detach() - basis.matrix(coefficients)
        by_trace = 0.5 * float((gone.T @ g @ gone @ a).trace())
        mask = cv.component_mask(basis, method="kfac", rho=0.7)
        by_sum = 0.5 * (basis.coefficients.numpy() ** 2 * basis.masses)[~mask].sum()
        kept_instead = 0.5 * (basis.coefficients.numpy() ** 2 * basis.masses)[mask].sum()
        return max(gap(predicted, by_trace), gap(predicted, by_sum)), gap(predicted, kept_instead)

    return each_layer(kind, of_layer)


def scales_of_the_factors_change_no_edit(kind):
    def of_layer(basis, a, g):
        scaled = with_factors(basis.layer, 1e3 * a, 1e-4 * g)
        # a constant added to A is not a scale
        shifted = with_factors(basis.layer, a + a.trace() * torch.eye(len(a)), g)
        return gap(kept(scaled), kept(basis)), gap(kept(shifted), kept(basis))

    return each_layer(kind, of_layer)


def rotations_turn_the_edit_with_them(kind):
    def of_layer(basis, a, g):
        torch.manual_seed(0)
        p, q = (torch.linalg.qr(torch.randn(len(m), len(m)).double()).Q for m in (a, g))
        weight = basis.layer.matrix.detach().clone()

        def turned(matrix):
            layer = basis.layer
            with torch.no_grad():
                layer.matrix.copy_(matrix)
            try:
                return q.T @ kept(with_factors(layer, p @ a @ p.T, q @ g @ q.T)) @ p
            finally:
                with torch.no_grad():
                    layer.matrix.copy_(weight)

        return gap(turned(q @ weight @ p.T), kept(basis)), gap(turned(weight), kept(basis))

    return each_layer(kind, of_layer)


# The other storage of a weight, other batches, padding


def exchanged(model: LanguageModel) -> LanguageModel:
    """A copy whose Conv1D are Linear and whose Linear are Conv1D, each weight transposed."""
    copied = replace(model, module=copy.deepcopy(model.module))
    for layer in fc.linear_layers(copied.module):
        wide, high = layer.matrix.shape[::-1]
        linear = isinstance(layer.module, Conv1D)
        other = torch.nn.Linear(wide, high) if linear else Conv1D(high, wide)
        other = other.double()
        with torch.no_grad():
            other.weight.copy_(layer.module.weight.T)
            bias = layer.module.bias
            other.bias.copy_(torch.zeros(high) if bias is None else bias)
        parent, _, last = layer.name.rpartition(".")
        setattr(copied.module.get_submodule(parent), last, other)
    return copied


def conv1d_is_the_transpose(kind):
    model, factors, bases = made(kind)
    other = exchanged(model)
    again = collect(other, texts(*LENGTHS), labels="gold")
    missed, control = gap_of_factors(again, factors), []
    for one, two in zip(bases, cv.decompose(again), strict=True):
        missed = max(missed, gap(kept(two), kept(one)))
        if len(set(kept(one).shape)) == 1:  # a square weight could be read the wrong way round
            control.append(gap(kept(two).T, kept(one)))
    return missed, min(control)


def batches_and_order_change_nothing(kind):
    model, factors, _ = made(kind)
    tokens = texts(*LENGTHS)
    parts = [collect(model, [each], labels="gold") for each in tokens[::-1]]
    counts = np.array([part.tokens for part in parts])

    def mean_of(weights: Sequence[float]) -> fc.Factors:
        def mixed(kind_of_factor):
            names = [layer.name for layer in factors.layers]
            every = [getattr(part, kind_of_factor) for part in parts]
            return {n: sum(w * m[n] for w, m in zip(weights, every, strict=True)) for n in names}

        return replace(factors, inputs=mixed("inputs"), outputs=mixed("outputs"))

    # one text at a time, the last first, weighted by tokens; a mean of means is another number
    by_token, by_text = mean_of(counts / counts.sum()), mean_of(np.full(4, 0.25))
    return gap_of_factors(by_token, factors), gap_of_factors(by_text, factors)


def padding_is_not_there(kind):
    model, factors, _ = made(kind)
    ids, targets, mask = fc.padded(model, texts(*LENGTHS))  # 30, 9, 17 and 4 in one batch

    def with_mask(counted) -> fc.Factors:
        inputs, outputs = {}, {}

        def see(layer, a, g):
            inputs[layer.name] = a[counted].T @ a[counted] / counted.sum()
            outputs[layer.name] = g[counted].T @ g[counted] / counted.sum()

        with fc.frozen(model.module), fc.gradients_seen(factors.layers, see):
            fc.summed_loss(model, ids, targets, mask, "gold", 0).backward()
        return replace(factors, inputs=inputs, outputs=outputs)

    everything = with_mask(torch.ones_like(mask))
    return gap_of_factors(with_mask(mask), factors), gap_of_factors(everything, factors)


# Fisher


def kfac_is_the_fisher_of_one_prediction(kind):
    model, _, _ = made(kind)
    gaps = {}
    for length in (2, 8):
        factors = collect(model, texts(length), labels="gold")
        ids = torch.as_tensor(texts(length)[0])[None]
        with fc.frozen(model.module):
            weights = [layer.module.weight.requires_grad_(True) for layer in factors.layers]
            log_p = model.module(input_ids=ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
            losses = -log_p[range(length - 1), ids[0, 1:]]
            rows = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
        gaps[length] = []
        for number, layer in enumerate(factors.layers):
            each = torch.stack([row[number].T if kind == "gpt2" else row[number] for row in rows])
            block = torch.einsum("nij,nkl->ijkl", each, each) / len(each)
            product = torch.einsum(
                "ik,jl->ijkl", factors.outputs[layer.name], factors.inputs[layer.name]
            )
            if block.any():  # one position attends to itself alone: q and k have no gradient
                gaps[length].append(gap(product, block))
    return max(gaps[2]), min(gaps[8])


def diagonal_fisher_after_the_last_attention_is_a_product_of_squares(kind):
    # what the last block's MLP gives at a position reaches the loss of that position alone: there
    # the diagonal of a token Fisher is the mean of g^2 a^2, but not the product of the means
    model, factors, _ = made(kind)
    layers = fc.linear_layers(model.module, roles=["mlp.down"], blocks=[1])
    name, squares, total = layers[0].name + ".weight", [], 0

    def see(layer, a, g):
        squares.append((g[mask] ** 2).T @ (a[mask] ** 2))

    ids, targets, mask = fc.padded(model, texts(*LENGTHS))
    with fc.frozen(model.module), fc.gradients_seen(layers, see):
        fc.summed_loss(model, ids, targets, mask, "gold", 0).backward()
    with pytest.warns() if kind == "gpt2" else contextlib.nullcontext():
        fisher = diagonal_fisher(model, texts(*LENGTHS), example="token", labels="gold")
    total = fisher.diagonal[name].T if kind == "gpt2" else fisher.diagonal[name]
    of_means = (
        factors.outputs[layers[0].name].diagonal()[:, None]
        * factors.inputs[layers[0].name].diagonal()
    )
    return gap(squares[0] / int(mask.sum()), total), gap(of_means, total)


# Hessian


def the_hessian_is_symmetric(kind):
    model, _, _ = made(kind)
    with hs.loss_hessian(model, texts(*LENGTHS)) as hessian:
        v, w = np.random.default_rng(0).normal(size=(2, hessian.size))
        of_v, of_w = hessian.products(np.stack([v, w]))
        weight = next(iter(hessian.parameters.values()))
        with torch.no_grad():
            weight *= 1.1  # the Hessian elsewhere
        elsewhere = hessian.product(w)
        with torch.no_grad():
            weight /= 1.1
    scale = np.linalg.norm(of_v) * np.linalg.norm(w)
    missed, control = abs(w @ of_v - v @ of_w), abs(w @ of_v - v @ elsewhere)
    return missed / scale, control / abs(w @ of_v)


def central_differences_leave_h_squared(kind):
    model, _, _ = made(kind)
    with hs.loss_hessian(model, texts(12, 5)) as hessian:
        leaves = list(hessian.parameters.values())
        starts = [leaf.detach().clone() for leaf in leaves]
        v = hs.rademacher(hessian.size, 1, seed=2)[0]
        exact = hessian.product(v)

        def gradient_at(distance):
            pieces = torch.as_tensor(v).split([leaf.numel() for leaf in leaves])
            with torch.no_grad():
                for leaf, start, piece in zip(leaves, starts, pieces, strict=True):
                    leaf.copy_(start + distance * piece.view_as(start))
            return hessian.gradient()

        def errors(h):
            ahead, here, behind = (gradient_at(d) for d in (h, 0.0, -h))
            return gap((ahead - behind) / (2 * h), exact), gap((ahead - here) / h, exact)

        (central, one_sided), (half_central, half_one_sided) = errors(2e-3), errors(1e-3)
        gradient_at(0.0)
    # halving h leaves a quarter, and of the one-sided difference a half
    assert central < 0.01
    return abs(central / half_central - 4) / 4, abs(one_sided / half_one_sided - 4) / 4


ROWS = {
    masses_sum_to_the_product_of_traces: ALGEBRA,
    masses_are_eigenvalues_of_the_kronecker_product: ALGEBRA,
    the_whole_curvature_is_a_sum_over_components: ALGEBRA,
    a_share_of_one_is_the_identity: ALGEBRA,
    kept_and_removed_are_orthogonal: ALGEBRA,
    an_edit_twice_is_that_edit: ALGEBRA,
    shares_are_nested: ALGEBRA,
    what_is_kept_is_the_smallest_set: ALGEBRA,
    predicted_damage_is_half_the_trace: ALGEBRA,
    scales_of_the_factors_change_no_edit: ALGEBRA,
    rotations_turn_the_edit_with_them: ALGEBRA,
    conv1d_is_the_transpose: RUN_AGAIN,
    batches_and_order_change_nothing: RUN_AGAIN,
    padding_is_not_there: RUN_AGAIN,
    kfac_is_the_fisher_of_one_prediction: RUN_AGAIN,
    diagonal_fisher_after_the_last_attention_is_a_product_of_squares: RUN_AGAIN,
    the_hessian_is_symmetric: RUN_AGAIN,
    central_differences_leave_h_squared: 0.1,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("row", "within"), ROWS.items(), ids=lambda each: getattr(each, "__name__", "")
)
def test_identity(row, within, kind):
    missed, control = row(kind)
    assert missed < within
    assert control > max(CONTROL, within)
