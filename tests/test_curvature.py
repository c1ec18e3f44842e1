"""Eigenbases and edits: identities that a right implementation satisfies, and controls that fail."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.pytorch_utils import Conv1D

from tests.curvature_models import (
    KINDS,
    build,
    collect,
    random_basis,
    texts,
)
from workbench import curvature as cv
from workbench import factors as fc
from workbench.models import TOKENS_PER_BATCH, LanguageModel
from workbench.table import InputError

# Eigenbases


def test_masses_are_rayleigh_quotients_and_sum_to_the_traces():
    basis = random_basis()
    a = basis.input_vectors * torch.from_numpy(basis.input_values) @ basis.input_vectors.T
    g = basis.output_vectors * torch.from_numpy(basis.output_values) @ basis.output_vectors.T
    np.testing.assert_allclose(basis.masses.sum(), float(a.trace() * g.trace()), rtol=1e-13)
    curvature = torch.kron(g, a)
    for j in range(6):
        for i in range(5):
            u, v = basis.output_vectors[:, j], basis.input_vectors[:, i]
            direction = torch.outer(u, v).flatten()
            np.testing.assert_allclose(
                float(direction @ curvature @ direction), basis.masses[j, i], rtol=1e-11
            )
            # and it is an eigenvector: the quotient alone would not say so
            torch.testing.assert_close(
                curvature @ direction, basis.masses[j, i] * direction, rtol=1e-9, atol=1e-12
            )


def test_spectrum_clamps_and_reports():
    # eigenvalues 3, 1, -1: a quarter... |-1| / (3 + 1 + 1) = .2 of the absolute mass is clamped
    values, vectors, clamped = cv.spectrum(torch.diag(torch.tensor([1.0, 3.0, -1.0])), "it")
    np.testing.assert_allclose(values, [3.0, 1.0, 0.0])
    assert clamped == pytest.approx(0.2)
    np.testing.assert_allclose(vectors.abs().numpy(), [[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    with pytest.raises(InputError) as error:
        cv.spectrum(torch.tensor([[torch.nan]]), "the input factor of x")
    assert str(error.value) == (
        "decompose: the input factor of x holds NaN or Inf; collect the factors again"
    )


# Selection


def test_staircase_by_hand():
    # masses of lambda (3, 1) and mu (2, 1): 6, 3 / 2, 1; total 12. Half is the 6 alone; 9 is .75
    # (6 + 3); 11 is .9166; a share of .76 needs 6 + 3 + 2.
    lam, mu = np.array([3.0, 1.0]), np.array([2.0, 1.0])
    for rho, steps in ((0.5, (1, 0)), (0.75, (1, 1)), (0.76, (2, 1)), (0.92, (2, 2)), (1, (2, 2))):
        assert tuple(cv.staircase(lam, mu, rho)) == steps
    # lambda = mu = (2, 1): masses 4, 2, 2, 1. A share of .5 needs 4 + 2 = 6 > 4.5: both 2s go in.
    assert tuple(cv.staircase(np.array([2.0, 1.0]), np.array([2.0, 1.0]), 0.5)) == (2, 1)


def brute_force(masses: np.ndarray, rho: float) -> np.ndarray:
    """Add masses from the largest down until the share is reached, then those tied with the last."""
    order = np.argsort(-masses, axis=None, kind="stable")
    held, last = 0.0, None
    for place in order:
        if held >= rho * masses.sum():
            break
        last = masses.flat[place]
        held += last
    return masses >= last * (1 - 1e-12)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=7),
    st.lists(st.integers(0, 6), min_size=1, max_size=7),
    st.sampled_from([0.013, 0.1, 0.37, 0.5, 0.83, 0.99]),
)
@settings(max_examples=200, deadline=None)
def test_staircase_is_the_smallest_set_ties_included(lam, mu, rho):
    lam, mu = np.sort(np.array(lam, float))[::-1], np.sort(np.array(mu, float))[::-1]
    if lam.sum() * mu.sum() == 0:
        with pytest.raises(InputError, match="hold no mass"):
            cv.staircase(lam, mu, rho)
        return
    mask = cv.stairs_mask(cv.staircase(lam, mu, rho), len(lam))
    masses = mu[:, None] * lam
    # thirds and sevenths of a sum of small integers: rho * total is never within rounding of a
    # partial sum unless equal to it, and then both routes take it
    np.testing.assert_array_equal(mask, brute_force(masses, rho - 1e-12))
    np.testing.assert_array_equal(mask, cv.largest(masses, rho - 1e-12))


def test_staircase_on_a_decaying_spectrum_is_smallest_and_nested():
    rng = np.random.default_rng(0)
    lam = np.sort(np.exp(rng.normal(0, 3, 60)))[::-1]
    mu = np.sort(np.exp(rng.normal(0, 3, 80)))[::-1]
    masses, inner = mu[:, None] * lam, None
    for rho in (0.05, 0.5, 0.9, 0.99, 0.9999, 1):
        mask = cv.stairs_mask(cv.staircase(lam, mu, rho), 60)
        held = masses[mask].sum() / masses.sum()
        assert held >= rho - 1e-12
        if rho < 1:
            assert held - masses[mask].min() / masses.sum() < rho  # one fewer would not do
            np.testing.assert_array_equal(mask, brute_force(masses, rho))
        assert inner is None or (mask | inner == mask).all()
        inner = mask


@pytest.mark.parametrize("rho", [0.0, -0.1, 1.5, float("nan")])
def test_shares_outside_are_refused(rho):
    basis = random_basis()
    for call in (
        lambda: cv.staircase(basis.input_values, basis.output_values, rho),
        lambda: cv.largest(basis.masses, rho),
        lambda: cv.edited_coefficients(basis, method="svd", rho=rho),
        lambda: cv.edited([basis], rho=rho).__enter__(),
    ):
        with pytest.raises(InputError, match=f"rho is {rho}, the share that is kept; needs 0 <"):
            call()


def test_largest_by_hand():
    # 5 + 3 of 10 hold .8; a share of .81 needs one of the two 1s, and takes both
    scores = np.array([[5.0, 1.0], [1.0, 3.0]])
    np.testing.assert_array_equal(cv.largest(scores, 0.8), [[True, False], [False, True]])
    assert cv.largest(scores, 0.81).all()
    with pytest.raises(InputError, match="all scores are 0"):
        cv.largest(np.zeros((2, 2)), 0.5)


spread = st.one_of(
    st.integers(0, 5).map(float),  # ties
    st.floats(1.0, 1.1),  # that begin alike
    st.floats(-320, 250).map(lambda power: 10.0**power),  # far beyond float32
)


@given(
    st.lists(spread, min_size=1, max_size=40),
    st.integers(1, 5),
    st.sampled_from([0.013, 0.1, 0.37, 0.5, 0.83, 0.99, 0.9999]),
)
@settings(max_examples=150, deadline=None)
def test_ranking_is_the_smallest_set_whatever_the_scores(values, height, rho):
    rng = np.random.default_rng(len(values))
    scores = rng.choice(values, size=(height, len(values)))
    if scores.sum() == 0:
        return
    ranking = cv.Ranking(lambda places, *_: scores[places], scores.shape)
    np.testing.assert_array_equal(ranking.mask(rho - 1e-12), brute_force(scores, rho - 1e-12))
    assert ranking.mask(1).all()


def test_ranking_in_blocks_and_nested(monkeypatch):
    rng = np.random.default_rng(2)
    scores = np.exp(rng.normal(0, 4, (37, 53)))
    whole = {rho: cv.largest(scores, rho) for rho in (0.2, 0.5, 0.9, 0.99, 0.9999)}
    monkeypatch.setattr(cv, "BLOCK", 128)
    ranking = cv.Ranking(lambda places, *_: scores[places], scores.shape)
    inner = np.zeros(scores.shape, dtype=bool)
    for rho, mask in whole.items():
        np.testing.assert_array_equal(ranking.mask(rho), mask)
        np.testing.assert_array_equal(mask, brute_force(scores, rho))
        assert (inner <= mask).all() and inner.sum() < mask.sum()
        inner = mask
    # control: masks of other scores are no smallest sets of these, nor nested in theirs
    other = cv.largest(rng.permuted(scores), 0.99)
    assert not (whole[0.2] <= other).all()
    assert scores[other].sum() < 0.99 * scores.sum() or other.sum() > whole[0.99].sum()


def test_a_cut_among_scores_that_begin_alike():
    # 1 + 3/1024, 1 + 2/1024 and 1 have their first nine binary digits in common; four pieces make
    # the first two exactly half of all, and the third is not needed
    first, second = 1 + 3 / 1024, 1 + 2 / 1024
    piece = (first + second - 1) / 4
    scores = np.array([[1.0, piece, first], [piece, piece, piece], [second, 0.0, 0.0]])
    assert cv.largest(scores, 0.5).nonzero()[0].tolist() == [0, 2]
    assert cv.largest(scores, 0.25).sum() == 1  # 1 + 3/1024 is more than a quarter of 4.01
    assert cv.largest(scores, 0.51).sum() == 3
    # 2 and 1 are 3 of 4 in the least numbers there are
    least = np.array([[1.0, 2.0, 1.0]]) * 5e-324
    np.testing.assert_array_equal(cv.largest(least, 0.5), [[False, True, False]])


def test_rounding_asks_for_no_more_than_there_is():
    # all but the last rounding error of the sum, which is one number in one order of the terms and
    # another in another
    rng = np.random.default_rng(0)
    for _ in range(100):
        scores = 1 + rng.random((1, 200)) / 300
        assert cv.largest(scores, np.nextafter(1, 0)).sum() >= 199


def test_a_tie_that_begins_otherwise_is_cut_with_its_group():
    # these two lie at either side of where float32 rounds, so their leading digits differ, and are
    # one group: half of 5 needs the 2 and one of them. What is 1e-11 below is another group
    middle = 1 - 2.0**-25
    scores = np.array([[2.0, middle + 5e-14, middle - 5e-14, middle - 1e-11]])
    ranking = cv.Ranking(lambda places, *_: scores[places], scores.shape)
    assert len(set(ranking._digits[0])) == 3
    np.testing.assert_array_equal(ranking.mask(0.5), [[True, True, True, False]])
    # exact even when the last score kept is where another group of leading digits starts
    np.testing.assert_array_equal(cv.largest(np.array([[4.0, 2.0, 1.99]]), 0.75), [[1, 1, 0]])


def test_a_ranking_by_one_factor_is_no_smallest_set():
    # control of the staircase: whole columns by lambda alone hold the share in more components
    rng = np.random.default_rng(0)
    lam = np.sort(np.exp(rng.normal(0, 3, 60)))[::-1]
    mu = np.sort(np.exp(rng.normal(0, 3, 80)))[::-1]
    columns = np.searchsorted(np.cumsum(lam), 0.9 * lam.sum()) + 1
    assert cv.staircase(lam, mu, 0.9).sum() < columns * len(mu) / 2


def test_saliency_and_corrected_masses_rank_as_their_definitions():
    basis = random_basis(14, 11)
    rng = np.random.default_rng(1)
    basis = replace(basis, corrected=basis.masses * np.exp(rng.normal(size=(14, 11))))
    saliency = basis.coefficients.numpy() ** 2 * basis.masses
    masks = {}
    for method, scores in (
        ("kfac", basis.masses),
        ("saliency", saliency),
        ("ekfac", basis.corrected),
    ):
        masks[method] = cv.component_mask(basis, method=method, rho=0.8)
        np.testing.assert_array_equal(masks[method], brute_force(scores, 0.8))
    assert len({mask.tobytes() for mask in masks.values()}) == 3


# Edits


def kronecker_edit(basis: cv.Basis, method: str, rho: float) -> tuple[torch.Tensor, torch.Tensor]:
    coefficients, _ = cv.edited_coefficients(basis, method=method, rho=rho)
    return basis.matrix(coefficients), basis.matrix(basis.coefficients - coefficients)


def moments(basis: cv.Basis) -> tuple[torch.Tensor, torch.Tensor]:
    """A and G, put together from their eigenbases."""
    a = basis.input_vectors * torch.from_numpy(basis.input_values) @ basis.input_vectors.T
    g = basis.output_vectors * torch.from_numpy(basis.output_values) @ basis.output_vectors.T
    return a, g


def test_back_from_the_eigenbases_whatever_is_zero():
    basis = random_basis(7, 4)
    back = basis.output_vectors, basis.input_vectors.T
    for rows, columns in ((7, 4), (3, 4), (7, 1), (2, 3), (0, 0)):
        kept = basis.coefficients.clone()
        kept[rows:], kept[:, columns:] = 0, 0
        torch.testing.assert_close(
            basis.matrix(kept), back[0] @ kept @ back[1], rtol=1e-13, atol=1e-15
        )
    hole = basis.coefficients.clone()
    hole[2], hole[:, 1] = 0, 0
    torch.testing.assert_close(basis.matrix(hole), back[0] @ hole @ back[1])
    torch.testing.assert_close(basis.project(basis.layer.matrix), basis.coefficients)


@pytest.mark.parametrize("method", ["kfac", "saliency", "random"])
def test_kept_and_removed_are_orthogonal_and_sum_to_the_weight(method):
    basis = random_basis()
    weight = basis.layer.matrix.detach()
    kept, removed = kronecker_edit(basis, method, 0.7)
    assert float(kept.norm()) > 0.01 and float(removed.norm()) > 0.01
    torch.testing.assert_close(kept + removed, weight, rtol=1e-13, atol=1e-14)
    assert abs(float((kept * removed).sum())) < 1e-14
    # also in the metric of the curvature
    a = basis.input_vectors * torch.from_numpy(basis.input_values) @ basis.input_vectors.T
    g = basis.output_vectors * torch.from_numpy(basis.output_values) @ basis.output_vectors.T
    assert abs(float((removed.T @ g @ kept @ a).trace())) < 1e-13


def test_pruned_parts_are_not_orthogonal_where_it_counts():
    # control: entries of W kept and removed share nothing, but the curvature couples them
    basis = random_basis()
    kept, removed = kronecker_edit(basis, "magnitude", 0.5)
    a, g = moments(basis)
    assert abs(float((kept * removed).sum())) < 1e-13
    coupled = float((removed.T @ g @ kept @ a).trace())
    assert abs(coupled) > 0.05 * float((removed.T @ g @ removed @ a).trace())


def test_a_second_cut_by_saliency_takes_more():
    # control of idempotence: its share is of what the weight holds, which the first cut made less
    basis = random_basis()
    once, _ = cv.edited_coefficients(basis, method="saliency", rho=0.8)
    twice, _ = cv.edited_coefficients(replace(basis, coefficients=once), method="saliency", rho=0.8)
    assert int((twice != 0).sum()) < int((once != 0).sum())


def test_idempotent():
    basis = random_basis()
    once, _ = cv.edited_coefficients(basis, method="kfac", rho=0.7)
    with torch.no_grad():
        basis.layer.module.weight.copy_(basis.matrix(once))
    a = basis.input_vectors * torch.from_numpy(basis.input_values) @ basis.input_vectors.T
    g = basis.output_vectors * torch.from_numpy(basis.output_values) @ basis.output_vectors.T
    again = cv.decompose(fc.Factors((basis.layer,), {"layer": a}, {"layer": g}, 1, "gold", 0))[0]
    twice, _ = cv.edited_coefficients(again, method="kfac", rho=0.7)
    torch.testing.assert_close(again.matrix(twice), basis.matrix(once), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("method", cv.METHODS)
def test_a_share_of_one_is_the_identity_to_the_bit(method):
    basis = random_basis()
    basis = replace(basis, corrected=basis.masses**2)
    weight = basis.layer.matrix.detach().clone()
    coefficients, share = cv.edited_coefficients(basis, method=method, rho=1)
    assert share == 1
    torch.testing.assert_close(basis.matrix(coefficients), weight, rtol=1e-13, atol=1e-14)
    with cv.edited([basis], method=method, rho=1) as edit:
        assert torch.equal(basis.layer.matrix, weight)
    assert (edit.kept, edit.predicted_damage) == (1.0, 0.0)


def test_predicted_damage_three_ways():
    basis = random_basis()
    coefficients, _ = cv.edited_coefficients(basis, method="kfac", rho=0.7)
    mask = cv.component_mask(basis, method="kfac", rho=0.7)
    got = cv.predicted_damage(basis, coefficients)
    by_sum = 0.5 * (basis.coefficients.numpy() ** 2 * basis.masses)[~mask].sum()
    removed = basis.matrix(basis.coefficients - coefficients)
    a = basis.input_vectors * torch.from_numpy(basis.input_values) @ basis.input_vectors.T
    g = basis.output_vectors * torch.from_numpy(basis.output_values) @ basis.output_vectors.T
    by_trace = 0.5 * float((removed.T @ g @ removed @ a).trace())
    flat = removed.flatten()
    by_curvature = 0.5 * float(flat @ torch.kron(g, a) @ flat)
    assert got > 1e-3
    np.testing.assert_allclose([by_sum, by_trace, by_curvature], got, rtol=1e-11)


@pytest.mark.parametrize("method", ["svd", "magnitude"])
def test_predicted_damage_needs_no_mask(method):
    basis = random_basis()
    coefficients, _ = cv.edited_coefficients(basis, method=method, rho=0.5)
    removed = basis.layer.matrix.detach() - basis.matrix(coefficients)
    a, g = moments(basis)
    got = cv.predicted_damage(basis, coefficients)
    np.testing.assert_allclose(got, 0.5 * float((removed.T @ g @ removed @ a).trace()), rtol=1e-11)
    # controls: the sum over small coefficients only, and the other factor at either side
    mask = (coefficients.abs() < 1e-9).numpy()
    assert 0.5 * (basis.coefficients.numpy() ** 2 * basis.masses)[mask].sum() < 0.9 * got
    turned = replace(basis, input_values=basis.input_values[::-1].copy())
    assert abs(cv.predicted_damage(turned, coefficients) - got) > 0.05 * got


def test_saliency_does_the_least_damage_for_its_size():
    basis, rho = random_basis(), 0.9
    mask = cv.component_mask(basis, method="saliency", rho=rho)
    damages = np.sort(0.5 * (basis.coefficients.numpy() ** 2 * basis.masses), axis=None)
    coefficients, _ = cv.edited_coefficients(basis, method="saliency", rho=rho)
    got = cv.predicted_damage(basis, coefficients)
    removed = int((~mask).sum())
    # no other set of that many components costs less, and what is left holds the share asked for
    np.testing.assert_allclose(got, damages[:removed].sum(), rtol=1e-12)
    assert got <= (1 - rho) * damages.sum() < damages[: removed + 1].sum()
    by_mass, _ = cv.edited_coefficients(basis, method="kfac", rho=rho)
    assert not torch.equal(by_mass, coefficients)


def test_predicted_damage_is_the_rise_of_the_loss_where_kfac_is_exact():
    # a linear layer under a squared loss with one input: the loss is quadratic and K-FAC exact, so
    # at a minimum the predicted damage is the rise itself
    torch.manual_seed(4)
    module = torch.nn.Linear(3, 2, bias=False).double()
    x = torch.randn(1, 3).double()
    target = module(x).detach()
    layer = fc.Layer("l", 0, "mlp.up", module)
    seen = []
    with fc.gradients_seen([layer], lambda _, given, gradient: seen.append((given, gradient))):
        for output in range(2):
            module(x)[:, output].sum().backward()
    a, g = x.T @ x, sum(gradient.T @ gradient for _, gradient in seen)
    assert len(seen) == 2 and torch.equal(seen[0][0], x)
    basis = cv.decompose(fc.Factors((layer,), {"l": a}, {"l": g}, 1, "gold", 0))[0]
    with cv.edited([basis], method="magnitude", rho=0.5) as edit:
        rise = 0.5 * float(((module(x) - target) ** 2).sum().detach())
    assert rise > 1e-3
    np.testing.assert_allclose(edit.predicted_damage, rise, rtol=1e-12)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_scaling_and_rotation_change_nothing(scale_a, scale_g, seed):
    basis = random_basis(seed=seed)
    a = basis.input_vectors * torch.from_numpy(basis.input_values) @ basis.input_vectors.T
    g = basis.output_vectors * torch.from_numpy(basis.output_values) @ basis.output_vectors.T
    kept, _ = kronecker_edit(basis, "kfac", 0.8)
    layer = basis.layer
    scaled = cv.decompose(
        fc.Factors((layer,), {"layer": a * scale_a}, {"layer": g * scale_g}, 1, "gold", 0)
    )[0]
    torch.testing.assert_close(kronecker_edit(scaled, "kfac", 0.8)[0], kept, rtol=1e-9, atol=1e-12)
    # rotate inputs by P and outputs by Q: A -> P A P^T, G -> Q G Q^T, W -> Q W P^T
    p = torch.linalg.qr(torch.randn(5, 5).double()).Q
    q = torch.linalg.qr(torch.randn(6, 6).double()).Q
    weight = layer.matrix.detach().clone()
    with torch.no_grad():
        layer.matrix.copy_(q @ weight @ p.T)
    turned = cv.decompose(
        fc.Factors((layer,), {"layer": p @ a @ p.T}, {"layer": q @ g @ q.T}, 1, "gold", 0)
    )[0]
    got = q.T @ kronecker_edit(turned, "kfac", 0.8)[0] @ p
    torch.testing.assert_close(got, kept, rtol=1e-9, atol=1e-12)


def test_a_damped_factor_and_a_pruned_weight_do_change():
    # controls of the invariances: a multiple of the identity added is no rescaling, and what is
    # cut by size depends on the axes
    basis = random_basis(9, 8)
    a, g = moments(basis)
    layer, eye = basis.layer, torch.eye(8).double()
    kept, _ = kronecker_edit(basis, "kfac", 0.8)
    damped = cv.decompose(fc.Factors((layer,), {"layer": a + 3 * eye}, {"layer": g}, 1, "gold", 0))[
        0
    ]
    assert not torch.allclose(kronecker_edit(damped, "kfac", 0.8)[0], kept, atol=1e-3)
    pruned, _ = kronecker_edit(basis, "magnitude", 0.5)
    p = torch.linalg.qr(torch.randn(8, 8).double()).Q
    with torch.no_grad():
        layer.matrix.copy_(layer.matrix.detach().clone() @ p.T)
    turned = cv.decompose(fc.Factors((layer,), {"layer": p @ a @ p.T}, {"layer": g}, 1, "gold", 0))[
        0
    ]
    again, _ = kronecker_edit(turned, "magnitude", 0.5)
    assert not torch.allclose(again @ p, pruned, atol=1e-3)


def test_a_conv1d_is_edited_as_its_transpose():
    conv = build("gpt2")
    linear = build("gpt2")
    for block in linear.module.transformer.h:
        for owner, name in (
            (block.attn, "c_attn"),
            (block.attn, "c_proj"),
            (block.mlp, "c_fc"),
            (block.mlp, "c_proj"),
        ):
            old = getattr(owner, name)
            new = torch.nn.Linear(*old.weight.shape).double()
            with torch.no_grad():
                new.weight.copy_(old.weight.T)
                new.bias.copy_(old.bias)
            setattr(owner, name, new)
    tokens = texts(20, 17, 9)
    one, other = (cv.decompose(collect(model, tokens)) for model in (conv, linear))
    for method in ("kfac", "saliency", "svd", "magnitude"):
        with (
            cv.edited(one, method=method, rho=0.8) as here,
            cv.edited(other, method=method, rho=0.8) as there,
        ):
            for mine, twin in zip(one, other, strict=True):
                weight = mine.layer.module.weight
                assert weight.shape == twin.layer.module.weight.T.shape
                torch.testing.assert_close(weight.T, twin.layer.module.weight, rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(here.predicted_damage, there.predicted_damage, rtol=1e-6)
    # control: the transpose was not there before
    assert not torch.equal(
        conv.module.transformer.h[0].attn.c_attn.weight[:8, :8],
        linear.module.transformer.h[0].attn.c_attn.weight[:8, :8],
    )


def test_pruning_keeps_entries_to_the_bit():
    basis = random_basis(30, 20)
    weight = basis.layer.matrix.detach().clone()
    with cv.edited([basis], method="magnitude", rho=0.4) as edit:
        now = basis.layer.matrix.detach().clone()
    assert edit.kept == 0.4 == float((now != 0).double().mean())
    assert torch.equal(now[now != 0], weight[now != 0])
    coefficients, _ = cv.edited_coefficients(basis, method="magnitude", rho=0.4)
    torch.testing.assert_close(basis.matrix(coefficients), now, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        edit.predicted_damage, cv.predicted_damage(basis, coefficients), rtol=1e-11
    )


def test_a_sweep_hashes_ranks_and_turns_once(monkeypatch):
    bases = cv.decompose(collect(build("neox"), texts(20, 20)))
    hashed, ranked = [], []
    own_hash, own_ranking = cv.weight_hash, cv.Ranking
    monkeypatch.setattr(cv, "weight_hash", lambda layer: hashed.append(1) or own_hash(layer))
    monkeypatch.setattr(cv, "Ranking", lambda *given: ranked.append(1) or own_ranking(*given))
    for rho in (0.5, 0.7, 0.9):
        with cv.edited(bases, method="saliency", rho=rho):
            pass
    assert (len(hashed), len(ranked)) == (len(bases), len(bases))
    # what goes past torch's counter of writes is seen all the same
    bases[0].layer.module.weight.data.mul_(2.0)
    with pytest.raises(InputError, match="holds other weights"), cv.edited(bases, rho=0.5):
        pass


def test_baselines_by_hand():
    # eye factors, so the eigenbases are permutations and signs: edits are those of W itself
    module = torch.nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, 0.0], [1.0, -2.0]]))
    layer, eye = fc.Layer("l", 0, "mlp.up", module), torch.eye(2).double()
    basis = cv.decompose(fc.Factors((layer,), {"l": eye}, {"l": eye}, 1, "gold", 0))[0]
    coefficients, share = cv.edited_coefficients(basis, method="magnitude", rho=0.5)
    torch.testing.assert_close(
        basis.matrix(coefficients), torch.tensor([[3.0, 0.0], [0.0, -2.0]]).double()
    )
    assert share == 0.5
    coefficients, share = cv.edited_coefficients(basis, method="svd", rho=0.5)
    left, values, right = np.linalg.svd(np.array([[3.0, 0.0], [1.0, -2.0]]))
    np.testing.assert_allclose(
        basis.matrix(coefficients).numpy(), values[0] * np.outer(left[:, 0], right[0]), atol=1e-12
    )
    assert share == 0.5
    with pytest.raises(InputError) as error:
        cv.edited_coefficients(basis, method="prune", rho=0.5)
    assert str(error.value) == (
        "edited_coefficients: method 'prune'; choose from kfac, saliency, svd, magnitude, "
        "random, ekfac"
    )


def test_svd_is_the_best_of_its_rank_in_any_basis():
    basis = random_basis()
    coefficients, share = cv.edited_coefficients(basis, method="svd", rho=0.6)
    left, values, right = np.linalg.svd(basis.layer.matrix.detach().numpy(), full_matrices=False)
    np.testing.assert_allclose(
        basis.matrix(coefficients).numpy(), (left[:, :3] * values[:3]) @ right[:3], atol=1e-12
    )
    assert share == 3 / 5


def test_random_masks_are_keyed_and_nested():
    basis = random_basis(40, 50)
    masks = [cv.component_mask(basis, method="random", rho=r, seed=1) for r in (0.3, 0.6)]
    assert (masks[0] <= masks[1]).all()
    # 2000 components at .3: 4 standard errors are .041
    assert abs(masks[0].mean() - 0.3) < 0.041
    other = cv.component_mask(basis, method="random", rho=0.3, seed=2)
    assert not np.array_equal(masks[0], other)


def test_weights_come_back_even_after_an_exception():
    model = build("gpt2")
    bases = cv.decompose(collect(model, texts(20, 20)))
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    with pytest.raises(ZeroDivisionError), cv.edited(bases, rho=0.9):
        assert not torch.equal(
            bases[0].layer.module.weight, before[bases[0].layer.name + ".weight"]
        )
        raise ZeroDivisionError
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_other_weights_than_were_decomposed_are_refused():
    model = build("neox")
    bases = cv.decompose(collect(model, texts(20, 20)))
    message = r"edited: .*query_key_value holds other weights than were decomposed"
    with (
        cv.edited(bases, rho=0.9),
        pytest.raises(InputError, match=message),
        cv.edited(bases, rho=0.8),
    ):
        pass
    with torch.no_grad():
        bases[0].layer.module.weight.add_(1e-9)
    with pytest.raises(InputError, match=message), cv.edited(bases, rho=0.9):
        pass


# Corrected masses


@contextlib.contextmanager
def weight_of_its_own_at_each_position(layer: fc.Layer, text: np.ndarray):
    """A zero matrix a position, added to the layer there: its gradient is that position's D."""
    own = torch.zeros(len(text) - 1, *layer.matrix.shape, dtype=torch.float64, requires_grad=True)
    handle = layer.module.register_forward_hook(
        lambda module, inputs, output: output + torch.einsum("poi,bpi->bpo", own, inputs[0])
    )
    try:
        yield own
    finally:
        handle.remove()


def slow_gradients(
    model: LanguageModel, layer: fc.Layer, tokens, *, labels: str, seed: int, example: str
) -> torch.Tensor:
    """D of every example, one text at a time, by autograd on the weight itself."""
    found = []
    model.module.requires_grad_(True)
    for text in tokens:
        ids = torch.tensor(([] if model.bos is None else [model.bos]) + list(text[:-1]))[None]
        with contextlib.ExitStack() as stack:
            if example == "token":
                variable = stack.enter_context(weight_of_its_own_at_each_position(layer, text))
            else:
                variable = layer.module.weight
            logits = model.module(ids).logits[0, -(len(text) - 1) :]
            target = torch.tensor(text[1:])
            if labels == "sampled":
                draws = fc.keyed(seed, text).random(len(text) - 1)
                cumulative = logits.detach().softmax(-1).cumsum(-1).numpy()
                target = torch.tensor(
                    [(c <= u * c[-1]).sum() for c, u in zip(cumulative, draws, strict=True)]
                )
            loss = -logits.log_softmax(-1)[range(len(target)), target].sum()
            gradient = torch.autograd.grad(loss, variable)[0]
        if example == "token":
            found += list(gradient)
        else:
            found.append(gradient.T if isinstance(layer.module, Conv1D) else gradient)
    model.module.requires_grad_(False)
    return torch.stack(found)


@pytest.mark.parametrize("example", cv.EXAMPLES)
@pytest.mark.parametrize("kind", KINDS)
def test_corrected_masses_are_second_moments_of_gradients(kind, example):
    model, tokens = build(kind), texts(9, 14, 2, 14)
    own = {"labels": "gold" if kind == "llama" else "sampled", "seed": 5}
    bases = cv.decompose(collect(model, tokens, **own))
    got = cv.correct_masses(model, bases, tokens, example=example, **own)
    predicted = 8 + 13 + 1 + 13
    for basis in got:
        gradients = slow_gradients(model, basis.layer, tokens, example=example, **own)
        assert len(gradients) == (predicted if example == "token" else 4)
        turned = basis.output_vectors.T @ gradients @ basis.input_vectors
        expected = (turned**2).sum(0).numpy() / predicted
        np.testing.assert_allclose(basis.corrected, expected, rtol=1e-6, atol=1e-9 * expected.max())
        # what is no mean of products is neither: the product of means
        assert np.abs(basis.corrected - basis.masses).max() > 0.02 * expected.max()
    # nothing else about the bases is new, and their own masses are as they were
    assert all(a.coefficients is b.coefficients for a, b in zip(got, bases, strict=True))
    assert bases[0].corrected is None


def test_a_text_that_begins_with_a_bos_has_its_gradient_too():
    model, tokens = build("neox", bos=0), texts(9, 14)
    bases = cv.decompose(collect(model, tokens, labels="gold"))
    basis = cv.correct_masses(model, bases, tokens, labels="gold", example="sequence")[1]
    gradients = slow_gradients(
        model, basis.layer, tokens, labels="gold", seed=0, example="sequence"
    )
    turned = basis.output_vectors.T @ gradients @ basis.input_vectors
    np.testing.assert_allclose(
        basis.corrected, (turned**2).sum(0).numpy() / 21, rtol=1e-6, atol=1e-12
    )


def test_corrected_masses_of_tokens_sum_to_the_mean_product_of_squares():
    model, tokens = build("gpt2"), texts(20, 11)
    factors, gaps = collect(model, tokens), []
    for basis in cv.correct_masses(model, cv.decompose(factors), tokens):
        gradients = slow_gradients(
            model, basis.layer, tokens, labels="sampled", seed=0, example="token"
        )
        mean = float((gradients**2).sum((1, 2)).mean())  # |g a^T|^2 = |g|^2 |a|^2
        np.testing.assert_allclose(basis.corrected.sum(), mean, rtol=1e-6)
        # the factors' own masses sum to the product of the means
        product = float(factors.inputs[basis.layer.name].trace())
        product *= float(factors.outputs[basis.layer.name].trace())
        np.testing.assert_allclose(basis.masses.sum(), product, rtol=1e-9)
        gaps.append(abs(product - mean) / mean)
    # control: that is another number, but behind a norm, where all |a|^2 are alike
    assert min(gaps) < 1e-3 and max(gaps) > 0.01


def summed(basis: cv.Basis, a: torch.Tensor, g: torch.Tensor, example: str = "token"):
    sums = cv.MassSums({"layer": basis}, example)
    sums.begin(torch.ones(a.shape[:2], dtype=torch.bool))
    sums.see(basis.layer, a, g)
    return sums.mean("layer")


def test_independent_inputs_and_gradients_give_the_products():
    torch.manual_seed(3)
    a, g = torch.randn(12, 5).double(), torch.randn(9, 6).double()
    layer = fc.Layer("layer", 0, "mlp.up", torch.nn.Linear(5, 6, bias=False).double())
    basis = cv.decompose(
        fc.Factors((layer,), {"layer": a.T @ a / 12}, {"layer": g.T @ g / 9}, 1, "gold", 0)
    )[0]
    # each a with each g, once: independent to the last digit
    every_a, every_g = a.repeat_interleave(9, 0)[None], g.repeat(12, 1)[None]
    np.testing.assert_allclose(
        summed(basis, every_a, every_g), basis.masses, rtol=1e-11, atol=1e-14
    )
    # control: the first nine of each, in pairs, are not
    assert np.abs(summed(basis, a[None, :9], g[None]) - basis.masses).max() > 0.1


def test_one_position_a_text_makes_tokens_and_sequences_the_same():
    basis = random_basis()
    a, g = torch.randn(7, 1, 5).double(), torch.randn(7, 1, 6).double()
    one, other = summed(basis, a, g), summed(basis, a, g, "sequence")
    np.testing.assert_allclose(one, other, rtol=1e-12)
    # by hand: two positions of one text, a = g = e1 in the eigenbases, gradients that cancel
    a = basis.input_vectors[:, 0].repeat(1, 2, 1)
    g = basis.output_vectors[:, 0] * torch.tensor([[[1.0], [-1.0]]])
    by_token = summed(basis, a, g)
    np.testing.assert_allclose(by_token[0, 0], 1.0)  # (1 + 1) / 2 tokens
    np.testing.assert_allclose(by_token.sum(), 1.0)
    np.testing.assert_allclose(summed(basis, a, g, "sequence"), 0.0, atol=1e-25)
    np.testing.assert_allclose(  # (1 + 1)^2 / 2 tokens
        summed(basis, a, g.abs() * basis.output_vectors[:, 0].sign(), "sequence")[0, 0], 2.0
    )


@pytest.mark.parametrize("example", cv.EXAMPLES)
def test_corrected_masses_are_the_best_diagonal_in_the_bases(example):
    model, tokens = build("llama"), texts(12, 9, 12, 5, 7)
    own = {"labels": "sampled", "seed": 1}
    bases = cv.decompose(collect(model, tokens, **own))
    basis = cv.correct_masses(model, bases, tokens, example=example, **own)[-1]
    gradients = slow_gradients(model, basis.layer, tokens, example=example, **own).flatten(1)
    fisher = gradients.T @ gradients / 40
    directions = torch.kron(basis.output_vectors, basis.input_vectors)

    def error(masses: np.ndarray) -> float:
        diagonal = torch.from_numpy(masses.copy()).flatten()
        return float((directions * diagonal @ directions.T - fisher).norm())

    best = error(basis.corrected)
    assert best < 0.999 * error(basis.masses)
    rng = np.random.default_rng(0)
    for _ in range(5):  # and than any other, not only K-FAC's
        noise = rng.normal(size=basis.corrected.shape) * 0.01 * basis.corrected.max()
        assert best < error(basis.corrected + noise)


def test_damage_by_corrected_masses():
    basis = random_basis()
    rng = np.random.default_rng(0)
    corrected = replace(basis, corrected=basis.masses * np.exp(rng.normal(size=(6, 5))))
    coefficients, share = cv.edited_coefficients(corrected, method="ekfac", rho=0.7)
    mask = cv.component_mask(corrected, method="ekfac", rho=0.7)
    assert 0 < share < 1 and share == mask.mean()
    got = cv.predicted_damage(corrected, coefficients)
    # by the curvature itself, Q diag(s) Q^T
    directions = torch.kron(basis.output_vectors, basis.input_vectors)
    curvature = directions * torch.from_numpy(corrected.corrected).flatten() @ directions.T
    removed = basis.matrix(basis.coefficients - coefficients).flatten()
    np.testing.assert_allclose(got, 0.5 * float(removed @ curvature @ removed), rtol=1e-11)
    assert abs(got - cv.predicted_damage(basis, coefficients)) > 0.05 * got
    # of another method's edit too, where the bases carry them
    by_mass, _ = cv.edited_coefficients(corrected, method="kfac", rho=0.7)
    saliency = 0.5 * basis.coefficients.numpy() ** 2 * corrected.corrected
    gone = ~cv.component_mask(corrected, method="kfac", rho=0.7)
    np.testing.assert_allclose(cv.predicted_damage(corrected, by_mass), saliency[gone].sum())


def test_order_and_batches_change_no_corrected_mass(monkeypatch):
    model, tokens = build("neox"), texts(9, 14, 5, 14)
    bases = cv.decompose(collect(model, tokens))
    for example in cv.EXAMPLES:
        one = cv.correct_masses(model, bases, tokens, example=example)
        with monkeypatch.context() as patch:
            patch.setitem(TOKENS_PER_BATCH, "cpu", 16)
            other = cv.correct_masses(model, bases, tokens[::-1], example=example)
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a.corrected, b.corrected, rtol=1e-6, atol=1e-14)
        seeded = cv.correct_masses(model, bases, tokens, example=example, seed=1)
        assert np.abs(seeded[0].corrected - one[0].corrected).max() > 1e-6


def test_half_precision_is_corrected_in_a_copy():
    model = build("llama")
    model.module.to(torch.bfloat16)
    tokens = texts(9, 14)
    bases = cv.decompose(collect(model, tokens, labels="gold"))
    with pytest.warns(UserWarning, match="correct_masses: the weights are bfloat16, in which"):
        got = cv.correct_masses(model, bases, tokens, labels="gold")
    model.module.float()
    for basis in bases:
        basis.hash = cv.weight_hash(basis.layer)
    exact = cv.correct_masses(model, bases, tokens, labels="gold")
    for one, other in zip(got, exact, strict=True):
        np.testing.assert_array_equal(one.corrected, other.corrected)


def test_what_corrected_masses_refuse():
    model, tokens = build("neox"), texts(20, 20)
    bases = cv.decompose(collect(model, tokens))
    for options, message in (
        ({"example": "batch"}, "correct_masses: example 'batch'; choose from token, sequence"),
        ({"labels": "true"}, "correct_masses: labels 'true'; choose from sampled, gold"),
    ):
        with pytest.raises(InputError) as error:
            cv.correct_masses(model, bases, tokens, **options)
        assert str(error.value) == message
    for wrong, counted in (([], "0 of 0"), (texts(20, 1), "1 of 2"), (texts(40), "1 of 1")):
        with pytest.raises(InputError) as error:
            cv.correct_masses(model, bases, wrong)
        assert str(error.value) == (
            f"correct_masses: {counted} texts are shorter than 2 or longer than the context of 32 "
            "tokens; needs at least one text, and none such"
        )
    with pytest.raises(InputError) as error, cv.edited(bases, method="ekfac", rho=0.9):
        pass
    assert str(error.value) == (
        "component_mask: method ekfac needs corrected masses, which these bases do not carry; make "
        "them with correct_masses(model, bases, tokens)"
    )
    with pytest.raises(InputError) as error:
        cv.correct_masses(build("neox"), bases, tokens)
    assert str(error.value) == (
        f"correct_masses: {bases[0].layer.name} was decomposed in another model than the one given; "
        "give that one"
    )
    with cv.edited(bases, rho=0.5), pytest.raises(InputError, match="correct_masses: .* holds oth"):
        cv.correct_masses(model, bases, tokens)
    with torch.no_grad():
        model.module.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(InputError, match=r"the gradients of .* are not finite; the weights or the"):
        cv.correct_masses(model, bases, tokens)
