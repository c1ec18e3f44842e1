"""Eigenbases and edits: identities that a right implementation satisfies, and controls that fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.curvature_models import (
    build,
    collect,
    random_basis,
    texts,
)
from workbench import curvature as cv
from workbench import factors as fc
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


# Edits


def kronecker_edit(basis: cv.Basis, method: str, rho: float) -> tuple[torch.Tensor, torch.Tensor]:
    coefficients, _ = cv.edited_coefficients(basis, method=method, rho=rho)
    return basis.matrix(coefficients), basis.matrix(basis.coefficients - coefficients)


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
    sums = fc.FactorSums({"l": "l"}, torch.float64)
    with fc.gradients_seen([layer], sums.see):
        for output in range(2):
            sums.begin(torch.ones(1, dtype=torch.bool))
            module(x)[:, output].sum().backward()
    a, g = sums.inputs["l"] / sums.count, sums.outputs["l"]
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
        "edited_coefficients: method 'prune'; choose from kfac, saliency, svd, magnitude, random"
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
