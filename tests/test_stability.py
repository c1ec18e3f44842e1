"""Are two decompositions, and the edits that follow, alike? By hand, and by second routes."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from tests.curvature_models import build, collect, random_basis, texts
from workbench import curvature as cv
from workbench.plots.stability import plot_edit_overlap, plot_principal_angles
from workbench.probes import stability as probe
from workbench.probes.stability import kappa, leading, overlap, principal_angles, random_angles
from workbench.table import METRICS, InputError, validate

# Subspaces


def orthonormal(n: int, k: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng([seed, n, k])
    return torch.linalg.qr(torch.from_numpy(rng.normal(size=(n, k)))).Q


def test_principal_angles_by_hand():
    # the plane of e1 and e2, with e1 turned by 70 degrees towards e3 and e2 by 30 towards e4
    a, b = np.radians([70, 30])
    axes = torch.eye(4, dtype=torch.float64)
    turned = [[np.cos(a), 0], [0, np.cos(b)], [np.sin(a), 0], [0, np.sin(b)]]
    got = principal_angles(axes[:, :2], torch.tensor(turned))
    np.testing.assert_allclose(got, [30, 70], rtol=1e-12)
    # the cosine of a millionth of a degree is 1 to the last digit: it is read from the sine
    a = np.radians(1e-6)
    line = torch.tensor([[np.cos(a)], [np.sin(a)]])
    got = principal_angles(torch.eye(2, 1, dtype=torch.float64), line)
    np.testing.assert_allclose(got, [1e-6], rtol=1e-9)


def test_same_and_orthogonal_spaces():
    first = orthonormal(7, 3, seed=1)
    np.testing.assert_allclose(principal_angles(first, first), [0, 0, 0], atol=1e-12)
    axes = torch.eye(7, dtype=torch.float64)
    np.testing.assert_allclose(principal_angles(axes[:, :3], axes[:, 3:5]), [90, 90])
    # a line of the plane has one angle with it, 0; e3 has 90; both ways round
    np.testing.assert_allclose(principal_angles(axes[:, :2], axes[:, 1:2]), [0], atol=1e-12)
    np.testing.assert_allclose(principal_angles(axes[:, 1:2], axes[:, :2]), [0], atol=1e-12)
    np.testing.assert_allclose(principal_angles(axes[:, 2:3], axes[:, :2]), [90])


@given(st.integers(2, 9), st.data())
@settings(max_examples=40, deadline=None)
def test_angles_against_scipy_and_any_basis_of_the_same_space(n, data):
    k, m = data.draw(st.integers(1, n)), data.draw(st.integers(1, n))
    first, second = orthonormal(n, k, seed=2), orthonormal(n, m, seed=3)
    got = principal_angles(first, second)
    expected = np.degrees(scipy.linalg.subspace_angles(first.numpy(), second.numpy()))[::-1]
    np.testing.assert_allclose(got, expected, atol=1e-5)  # scipy reads some zeros from a cosine
    # signs, order and rotations among the columns leave the span; a turn of both leaves the angles
    turn, signs = orthonormal(k, k, seed=4), torch.from_numpy(np.sign(np.arange(m) % 2 - 0.5))
    order = torch.from_numpy(np.random.default_rng(n).permutation(m))
    both = orthonormal(n, n, seed=5)
    np.testing.assert_allclose(principal_angles(first @ turn, second), got, atol=1e-6)
    np.testing.assert_allclose(
        principal_angles(both @ first, both @ (second * signs)[:, order]), got, atol=1e-6
    )


def test_chance_of_random_subspaces():
    # the mean squared cosine is k / n; a line in the plane makes any angle up to 90 alike
    for n, k in ((12, 3), (9, 6)):
        squared = np.cos(np.radians(random_angles(n, k, draws=400, seed=0))) ** 2
        means = squared.mean(axis=1)
        # four standard errors: one false alarm in 16,000
        assert abs(means.mean() - k / n) < 4 * means.std() / 20
    drawn = random_angles(9, 6, draws=5, seed=0)
    assert (drawn[:, :3] < 1e-6).all() and (drawn[:, 3] > 1e-3).all()  # 6 + 6 - 9 are in common
    drawn = random_angles(2, 1, draws=1000, seed=0)
    # uniform on 0..90: mean 45, standard error 90 / sqrt(12 * 1000) = .82
    assert abs(drawn.mean() - 45) < 3.5 and drawn.min() < 2 and drawn.max() > 88
    np.testing.assert_array_equal(drawn, random_angles(2, 1, draws=1000, seed=0))
    assert not np.array_equal(drawn, random_angles(2, 1, draws=1000, seed=1))


def test_leading_by_hand():
    values = np.array([5.0, 3.0, 1.0, 1.0])
    # 5 and 8 of 10: .5 is reached by one, .51 and .8 by two, .81 by three, and the fourth is a tie
    got = [leading(values, share=s, dimensions=None) for s in (0.5, 0.51, 0.8, 0.81)]
    assert got == [1, 2, 2, 4]
    assert [leading(values, share=0.5, dimensions=d) for d in (1, 2, 3, 9)] == [1, 2, 4, 4]
    with pytest.raises(InputError, match="^probe_stability: a factor holds no mass; needs texts"):
        leading(np.zeros(3), share=0.5, dimensions=None)


# Edits


def plain_basis(weight) -> cv.Basis:
    """A basis whose eigenvectors are the axes, so that C is the weight."""
    weight = torch.as_tensor(weight, dtype=torch.float64)
    out, width = weight.shape
    made = random_basis(out, width)
    return replace(
        made,
        input_vectors=torch.eye(width, dtype=torch.float64),
        output_vectors=torch.eye(out, dtype=torch.float64),
        coefficients=weight,
    )


def test_overlap_by_hand():
    basis = plain_basis([[1.0, 2.0], [3.0, 4.0]])
    first, second = np.array([[1, 0], [0, 0]], bool), np.array([[1, 1], [0, 0]], bool)
    got = overlap(basis, first, basis, second).measures()
    # R1 = [[0, 2], [3, 4]] and R2 = [[0, 0], [3, 4]]: |R1|^2 = 29, |R2|^2 = 25 = <R1, R2>, and
    # 25 of R1's 29 are removed by the second too. By chance half of all is removed: <R1, R2> is
    # 29 / 2, |R2|^2 is 30 / 2.
    np.testing.assert_allclose(got["edit_cosine"], [25 / np.sqrt(29 * 25), 14.5 / np.sqrt(29 * 15)])
    np.testing.assert_allclose(got["edit_shared"], [25 / 29, 0.5])
    # W1' = [[1, 0], [0, 0]], W2' = [[1, 2], [0, 0]] differ by 2. By chance |W2'|^2 = 15 and
    # <W1', W2'> = 1 / 2: 1 + 15 - 1.
    np.testing.assert_allclose(got["edit_difference"], [2, np.sqrt(15)])
    # kept: one of two; by chance 4 * .25 * .5 = .5 both and 1 + 2 - .5 either
    np.testing.assert_allclose(got["mask_jaccard"], [0.5, 0.2])


def test_overlap_extremes():
    basis = plain_basis([[1.0, 2.0], [3.0, 4.0]])
    keep = np.array([[1, 0], [0, 1]], bool)
    same = overlap(basis, keep, basis, keep).measures()
    assert [same[m][0] for m in ("edit_cosine", "edit_shared", "edit_difference")] == [1, 1, 0]
    assert same["mask_jaccard"][0] == 1
    # complementary edits share nothing
    other = overlap(basis, keep, basis, ~keep).measures()
    assert [other[m][0] for m in ("edit_cosine", "edit_shared", "mask_jaccard")] == [0, 0, 0]
    # the opposite weight, edited alike, loses the opposite; in another basis masks say nothing
    against = overlap(basis, keep, plain_basis([[-1.0, -2.0], [-3.0, -4.0]]), keep).measures()
    assert against["edit_cosine"][0] == -1
    nothing = overlap(basis, np.ones((2, 2), bool), basis, keep).measures()
    assert np.isnan([nothing["edit_cosine"][0], nothing["edit_shared"][0]]).all()
    turned = replace(basis, input_vectors=basis.input_vectors.flip(1))
    assert np.isnan(overlap(basis, keep, turned, keep).measures()["mask_jaccard"]).all()


def two_bases(out: int = 6, width: int = 5) -> tuple[cv.Basis, cv.Basis]:
    """One weight in two unrelated eigenbases."""
    first = random_basis(out, width, seed=0)
    input_vectors, output_vectors = orthonormal(width, width, 7), orthonormal(out, out, 8)
    weight = first.matrix(first.coefficients)
    second = replace(
        first,
        input_vectors=input_vectors,
        output_vectors=output_vectors,
        coefficients=output_vectors.T @ weight @ input_vectors,
    )
    return first, second


def masks(out: int = 6, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.random((out, width)) < 0.3, rng.random((out, width)) < 0.4


def test_overlap_component_by_component():
    (first, second), (keep, keep_other) = two_bases(), masks()
    gone, gone_other, shared = np.zeros((6, 5)), np.zeros((6, 5)), 0.0
    parts = []
    for basis, mask, into in ((first, keep, gone), (second, keep_other, gone_other)):
        for j in range(6):
            for i in range(5):
                u, v = basis.output_vectors[:, j].numpy(), basis.input_vectors[:, i].numpy()
                if not mask[j, i]:
                    into += float(basis.coefficients[j, i]) * np.outer(u, v)
                    parts += [(u, v)] if basis is second else []
    shared = sum(float(u @ gone @ v) ** 2 for u, v in parts)
    weight = first.layer.matrix.detach().numpy()
    got = overlap(first, keep, second, keep_other).measures()
    norm = np.linalg.norm
    assert got["edit_cosine"][0] == pytest.approx(
        (gone * gone_other).sum() / norm(gone) / norm(gone_other), rel=1e-12
    )
    assert got["edit_shared"][0] == pytest.approx(shared / norm(gone) ** 2, rel=1e-12)
    assert got["edit_difference"][0] == pytest.approx(
        norm(gone - gone_other) / norm(weight - gone), rel=1e-12
    )


def test_chance_of_edits_by_random_rotations_and_by_random_masks():
    first, second = random_basis(24, 20, seed=0), random_basis(24, 20, seed=1)
    weight = second.matrix(second.coefficients)
    rng = np.random.default_rng(0)
    keep, other = rng.random((24, 20)) < 0.3, rng.random((24, 20)) < 0.4
    by_chance = {k: v[1] for k, v in overlap(first, keep, second, other).measures().items()}
    for one in ("rotations", "masks"):
        found = []
        for draw in range(120):
            if one == "rotations":
                a, g = orthonormal(20, 20, 100 + draw), orthonormal(24, 24, 300 + draw)
                turned = {"input_vectors": a, "output_vectors": g}
                basis = replace(second, coefficients=g.T @ weight @ a, **turned)
                mask = other
            else:
                basis, mask = second, rng.permuted(other.ravel()).reshape(24, 20)
            got = overlap(first, keep, basis, mask).measures()
            found.append([got[m][0] for m in ("edit_cosine", "edit_shared", "edit_difference")])
        mean, error = np.mean(found, axis=0), np.std(found, axis=0) / np.sqrt(120)
        expected = [by_chance[m] for m in ("edit_cosine", "edit_shared", "edit_difference")]
        # four standard errors, and for the two ratios of expectations a hundredth
        assert (np.abs(mean - expected) < 4 * error + [0.01, 0, 0.01]).all(), (one, mean, expected)
    # of one weight with itself, in one basis, chance is far from 0
    assert overlap(first, keep, first, keep).measures()["edit_cosine"][1] > 0.5


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_overlap_ignores_signs_order_and_rotations_in_eigenspaces(seed):
    (first, second), (keep, keep_other) = two_bases(), masks()
    rng = np.random.default_rng(seed)
    expected = overlap(first, keep, second, keep_other).measures()
    # columns of the second basis change sign and place, and its mask goes with them
    rows, columns = rng.permutation(6), rng.permutation(5)
    sign_a, sign_g = (torch.from_numpy(rng.choice([-1.0, 1.0], size=n)) for n in (5, 6))
    a, g = (second.input_vectors * sign_a)[:, columns], (second.output_vectors * sign_g)[:, rows]
    weight = second.matrix(second.coefficients)
    moved = replace(
        second, input_vectors=a, output_vectors=g, coefficients=g.T @ weight @ a
    )  # fmt: skip
    got = overlap(first, keep, moved, keep_other[rows][:, columns]).measures()
    for measure in ("edit_cosine", "edit_shared", "edit_difference"):
        np.testing.assert_allclose(got[measure], expected[measure], rtol=1e-9)
    # two input directions whose components are kept alike may be turned into each other
    alike = keep_other.copy()
    alike[:, 1] = alike[:, 0]
    turn = torch.eye(5, dtype=torch.float64)
    turn[:2, :2] = orthonormal(2, 2, seed)
    a = second.input_vectors @ turn
    moved = replace(second, input_vectors=a, coefficients=second.output_vectors.T @ weight @ a)
    expected = overlap(first, keep, second, alike).measures()
    got = overlap(first, keep, moved, alike).measures()
    for measure in ("edit_cosine", "edit_shared", "edit_difference"):
        np.testing.assert_allclose(got[measure], expected[measure], rtol=1e-9)


def test_overlaps_of_layers_add_up_to_one_vector():
    (first, second), (keep, keep_other) = two_bases(), masks()
    big = overlap(plain_basis(np.full((2, 3), 9.0)), np.zeros((2, 3), bool),
                  plain_basis(np.full((2, 3), 9.0)), np.eye(2, 3, dtype=bool))  # fmt: skip
    got = (overlap(first, keep, second, keep_other) + big).measures()

    def gone(basis, mask):
        return basis.matrix(basis.coefficients * ~torch.from_numpy(mask)).flatten().numpy()

    one = np.concatenate([gone(first, keep), np.full(6, 9.0)])
    two = np.concatenate([gone(second, keep_other), 9.0 * (np.eye(2, 3) == 0).ravel()])
    assert got["edit_cosine"][0] == pytest.approx(
        one @ two / np.linalg.norm(one) / np.linalg.norm(two), rel=1e-12
    )


# Verdicts


def verdicts(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    counts = [both, first, second, neither]
    return tuple(np.repeat(np.array(each, bool), counts) for each in ([1, 1, 0, 0], [1, 0, 1, 0]))


def test_kappa_by_hand():
    # 8 in both, 2 in one, 10 in neither: rate 18 / 40 = .45, chance .2025 + .3025 = .505,
    # agreement .9, so (.9 - .505) / .495 = .797980
    value, low, high = kappa(*verdicts(8, 1, 1, 10))
    assert value == pytest.approx(0.797980, abs=1e-6)
    # at both ends the counts expected pass a chi-square of 3.841459 just so
    for end in (low, high):
        expected = [20 * (0.2025 + 0.2475 * end), 40 * 0.2475 * (1 - end),
                    20 * (0.3025 + 0.2475 * end)]  # fmt: skip
        gaps = np.array([8, 2, 10]) - expected
        assert (gaps**2 / expected).sum() == pytest.approx(3.841459, abs=1e-5)
    assert low < value < high < 1
    # where both call as many items, it is Cohen's
    first, second = verdicts(5, 3, 3, 9)
    assert kappa(first, second)[0] == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)
    assert kappa(first, second) == kappa(second, first) == pytest.approx(kappa(~first, ~second))


def test_kappa_at_its_ends():
    # all agree: n (1 - kappa) p (1 - p) (...) -> the lower end lies below 1 and rises with n
    lows = []
    for n in (3, 10, 100):
        value, low, high = kappa(*verdicts(n, 0, 0, n))
        assert (value, high) == (1, 1)
        lows.append(low)
    assert 0 < lows[0] < lows[1] < lows[2] < 1
    # none agree: rate 1/2, so -1 is the least there is
    value, low, high = kappa(*verdicts(0, 3, 3, 0))
    assert (value, low) == (-1, -1) and -1 < high < 0
    for constant in (verdicts(4, 0, 0, 0), verdicts(0, 0, 0, 4), verdicts(0, 0, 0, 0)):
        assert np.isnan(kappa(*constant)).all()


def test_kappa_interval_holds_the_truth():
    # 17 items recited, as on the suite; kappa .6 at rate .4. Of 400 intervals 95 % hold it, give
    # or take 1.1 %; asked for are nine in ten.
    rng = np.random.default_rng(0)
    chances = [0.16 + 0.24 * 0.6, 2 * 0.24 * 0.4, 0.36 + 0.24 * 0.6]
    held = []
    for both, one, neither in rng.multinomial(17, chances, size=400):
        value, low, high = kappa(*verdicts(both, one, 0, neither))
        held += [low <= 0.6 <= high] if np.isfinite(value) else []
    assert 0.9 < np.mean(held) < 0.99


# The probe


def items_of(tokens, group="seen") -> pd.DataFrame:
    text = [" ".join(f"w{i}" for i in each) for each in tokens]
    return pd.DataFrame({"item": [f"i{k}" for k in range(len(text))], "text": text, "group": group})


def reciting(model, n: int = 20) -> pd.DataFrame:
    """Texts that the model recites, and three that it does not."""
    prompts = np.stack(texts(*[5] * n, seed=8))
    said = np.concatenate([prompts, model.generate(prompts, 4)], axis=1)
    return items_of([*said, *texts(*[9] * 3, seed=9)])


ORDINARY = items_of(texts(*[30] * 24))["text"].tolist()
SMALL = {"seeds": 1, "shares": (0.5,), "rho": (0.99, 0.9), "prefix": 5, "suffix": 4,
         "progress": False}  # fmt: skip


def asked(model, **options) -> pd.DataFrame:
    given = {"items": reciting(model), "texts": ORDINARY} | SMALL | options
    return probe.probe_stability(model, **given)


def pick(table: pd.DataFrame, metric: str, **where) -> pd.DataFrame:
    found = table[table["metric"] == metric]
    for name, value in where.items():
        found = found[found[name] == value]
    return found


class Steps:
    """Two checkpoints around one module, as Checkpoints gives them."""

    def __init__(self, model, other):
        self.model = model
        self.weights = [
            {k: v.clone() for k, v in each.module.state_dict().items()} for each in (other, model)
        ]

    def __iter__(self):
        for step, weights in zip((7, 9), self.weights, strict=True):
            self.model.module.load_state_dict(weights)
            yield replace(self.model, step=step)


@pytest.fixture(scope="module")
def made():
    model, other = build("neox"), build("neox", seed=1)
    items = reciting(model)
    table = probe.probe_stability(
        model, items, texts=ORDINARY, edits=[("saliency", 0.9)],
        others={"steps": Steps(model, other), "apart": [build("neox", seed=1)]}, **SMALL,
    )  # fmt: skip
    return model, items, table


def test_the_same_model_again_is_the_same(made):
    _, _, table = made
    validate(table)
    # the second step holds the weights of the reference itself
    again = table[(table["varied"] == "steps") & (table["step"] == 9) & (table["item"] == "all")]
    again = again[again["group"] == "observed"]
    value = again.groupby("metric", observed=True)["value"]
    np.testing.assert_allclose(value.get_group("principal_angle"), 0, atol=1e-6)
    np.testing.assert_allclose(value.get_group("subspace_overlap"), 1)
    np.testing.assert_allclose(value.get_group("edit_cosine"), 1)
    np.testing.assert_allclose(value.get_group("edit_shared"), 1)
    np.testing.assert_allclose(value.get_group("edit_difference"), 0, atol=1e-6)
    np.testing.assert_allclose(value.get_group("verdict_agreement"), 1)
    # the first step is another model, as is the one of its own module: the same numbers
    step, apart = (table[table["varied"] == v] for v in ("steps", "apart"))
    step, apart = (
        t[t["metric"].isin(["edit_cosine", "principal_angle"])] for t in (step[step["step"] == 7], apart)
    )  # fmt: skip
    np.testing.assert_allclose(step["value"], apart["value"], atol=1e-6)
    assert step[step["group"] == "observed"]["value"].std() > 0.1


def test_what_varies_and_what_does_not(made):
    _, _, table = made
    # labels change G and not A
    side = {"varied": "seed", "role": "all", "group": "observed"}
    assert (pick(table, "principal_angle", side="input", **side)["value"] < 1e-6).all()
    assert (pick(table, "principal_angle", side="output", **side)["value"] > 0.1).any()
    for varied in ("seed", "labels", "tokens", "halves"):
        drawn = pick(table, "edit_cosine", varied=varied, role="all", group="observed")
        assert len(drawn) == 2 and ((drawn["value"] > 0.3) & (drawn["value"] < 1 - 1e-9)).all()
    tokens = table.groupby("varied", observed=True)["tokens"].first()
    # 24 texts of 30 tokens predict 29 each
    assert tokens["seed"] == tokens["labels"] == 24 * 29
    assert tokens["tokens"] == tokens["halves"] == 12 * 29
    # masks are compared in one basis only: that of the reference, which its own weights give again
    jaccard = pick(table, "mask_jaccard", group="observed")
    assert set(jaccard["varied"]) == {"edit", "steps"}
    again = jaccard["varied"] == "steps"
    assert (jaccard["value"][again] == 1).all() and (jaccard["value"][~again] < 1).all()
    assert set(jaccard["setting"][~again]) == {"same factors, saliency at 0.9"}


def test_angles_and_edits_by_a_second_route(made):
    model, _, table = made
    order = np.random.default_rng([0, 24]).permutation(24)
    shuffled = model.encode([ORDINARY[i] for i in order])
    settings_of = {
        "seed": ((shuffled, 0, "sampled"), (shuffled, 1, "sampled")),
        "labels": ((shuffled, 0, "sampled"), (shuffled, 0, "gold")),
        "tokens": ((shuffled, 0, "sampled"), (shuffled[:12], 0, "sampled")),
        "halves": ((shuffled[::2], 0, "sampled"), (shuffled[1::2], 0, "sampled")),
    }
    for varied, pair in settings_of.items():
        factors = [collect(model, t, labels=la, seed=s, dtype="float32") for t, s, la in pair]
        bases = [cv.decompose(each) for each in factors]
        whole = [[], []]
        for place, basis in enumerate(bases[0]):
            name, where = basis.layer.name, {"block": basis.layer.block, "role": basis.layer.role}
            got = pick(table, "principal_angle", varied=varied, group="observed", side="output")
            got = got[(got["block"] == where["block"]) & (got["role"] == where["role"])]
            k = int(got["dimensions"].iloc[0])
            vectors = [
                np.linalg.eigh(f.outputs[name].double().numpy())[1][:, ::-1][:, :k] for f in factors
            ]
            angles = np.degrees(scipy.linalg.subspace_angles(*vectors))[::-1]
            ends = got.sort_values("place")["value"].iloc[[0, -1]]
            np.testing.assert_allclose(ends, [angles[0], angles[-1]], atol=1e-4)
            before, gone = basis.layer.matrix.detach().clone(), []
            for each in bases:
                with cv.edited([each[place]], method="kfac", rho=0.9):
                    gone.append((before - basis.layer.matrix.detach()).flatten().numpy())
            got = pick(table, "edit_cosine", varied=varied, group="observed", rho=0.9, **where)
            expected = gone[0] @ gone[1] / np.linalg.norm(gone[0]) / np.linalg.norm(gone[1])
            assert got["value"].item() == pytest.approx(expected, abs=1e-5)
            for parts, part in zip(whole, gone, strict=True):
                parts.append(part)
        one, two = (np.concatenate(parts) for parts in whole)
        got = pick(table, "edit_cosine", varied=varied, group="observed", rho=0.9, role="all")
        expected = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
        assert got["value"].item() == pytest.approx(expected, abs=1e-5) and got["n"].item() == 8


def test_pooled_angles_are_the_mean_over_factors_a_shared_one_once():
    model = build("llama")
    table = asked(model, seeds=0, shares=(), rho=(0.9,))
    for metric in ("principal_angle", "subspace_overlap"):
        got = pick(table, metric, varied="halves", group="observed", side="input")
        got = got[got["place"].isna() | (got["place"] == 0.5)]
        single, pooled = got[got["role"] != "all"], got[got["role"] == "all"]
        # q, k and v read one tensor, gate and up another: 4 factors a block, not 7
        assert len(single) == 8 and pooled["n"].item() == 8
        assert "attn.q, attn.k, attn.v" in set(single["role"])
        assert pooled["value"].item() == pytest.approx(single["value"].mean())
        assert pooled["lo"].item() < pooled["value"].item() < pooled["hi"].item()


def test_chance_rows_are_of_the_sizes_compared(made):
    _, _, table = made
    rows = pick(table, "subspace_overlap", group="chance")
    rows = rows[rows["role"] != "all"]
    sizes = {"mlp.up": (8, 12), "mlp.down": (12, 8), "attn.qkv": (8, 24), "attn.o": (8, 8)}
    for row in rows.itertuples():
        n = sizes[row.role][0 if row.side == "input" else 1]
        assert row.value == pytest.approx(row.dimensions / n)
    # as many dimensions were compared in every setting
    used = pick(table, "subspace_overlap").groupby(["block", "role", "side"], observed=True)
    assert (used["dimensions"].nunique() <= 1).all()
    angle = pick(table, "principal_angle", group="chance", role="attn.o", side="output", block=0)
    k = int(angle["dimensions"].iloc[0])
    drawn = np.sort(random_angles(8, k, draws=20, seed=0), axis=1)
    np.testing.assert_allclose(angle.sort_values("place")["value"].iloc[-1], drawn[:, -1].mean())


def test_verdicts_are_of_the_edited_model_and_agreement_of_what_was_recited():
    model = build("neox")
    items = reciting(model)
    table = asked(model, items=items, seeds=0, rho=(0.999, 0.98))
    kept = model.encode(items["text"].tolist())
    tokens = np.stack(kept)
    order = np.random.default_rng([0, 24]).permutation(24)
    shuffled = model.encode([ORDINARY[i] for i in order])
    found = {}
    for name, part in (("whole", shuffled), ("part", shuffled[:12])):
        bases = cv.decompose(collect(model, part, dtype="float32"))
        with cv.edited(bases, method="kfac", rho=0.98):
            found[name] = (model.generate(tokens[:, :5], 4) == tokens[:, 5:]).all(axis=1)
    unedited = (model.generate(tokens[:, :5], 4) == tokens[:, 5:]).all(axis=1)
    assert unedited.sum() == 20  # of 23
    for setting, name in (("reference", "whole"), ("0.5 of the texts", "part")):
        got = pick(table, "recitation_strict", setting=setting, rho=0.98)
        single = got[got["item"] != "all"].astype({"item": str}).set_index("item")["value"]
        np.testing.assert_array_equal(single[items["item"]], found[name])
        pooled = got[got["item"] == "all"].iloc[0]
        assert pooled["value"] == pytest.approx(found[name].mean()) and pooled["n"] == 23
        assert pooled["lo"] < pooled["value"] < pooled["hi"]
    one, two = found["whole"][unedited], found["part"][unedited]
    assert 0 < one.sum() < 20  # so that agreement says something
    got = pick(table, "verdict_agreement", varied="tokens", rho=0.98, group="observed").iloc[0]
    assert (got["value"], got["n"]) == (pytest.approx((one == two).mean()), 20)
    rate = (one.mean() + two.mean()) / 2
    chance = pick(table, "verdict_agreement", varied="tokens", rho=0.98, group="chance")
    assert chance["value"].item() == pytest.approx(rate**2 + (1 - rate) ** 2)
    kappas = pick(table, "verdict_kappa", varied="tokens", rho=0.98).iloc[0]
    np.testing.assert_allclose(kappas[["value", "lo", "hi"]].astype(float), kappa(one, two))


def test_weights_come_back_and_labels_of_other_texts_do_not_matter(made):
    model, items, table = made
    assert model.weights_hash() == build("neox").weights_hash()
    assert table.attrs["dropped"] == 0
    assert table.attrs["passport"]["factor_tokens"] == 24 * 29
    assert len(table.attrs["passport"]["layers"]) == 8
    # with gold labels seeds say nothing
    gold = asked(model, items=items, labels="gold", seeds=2)
    assert "seed" not in set(gold["varied"])
    assert "sampled labels" in set(gold["setting"])


def test_corrected_masses_are_made_where_asked(made):
    model, items, _ = made
    table = asked(model, items=items, seeds=0, shares=(), edits=[("ekfac", 0.9)], rho=(0.9,))
    value = pick(table, "mask_jaccard", role="all", group="observed")["value"].item()
    assert 0 < value < 1


def test_an_edit_that_removes_nothing_is_undefined_with_its_reason(made):
    model, items, _ = made
    table = asked(model, items=items, seeds=0, shares=(), rho=(1.0,))
    got = pick(table, "edit_cosine", varied="halves", group="observed")
    assert got["value"].isna().all()
    assert set(got["reason"]) == {"an edit removes or leaves nothing"}
    kappas = pick(table, "verdict_kappa", varied="halves")
    assert kappas["value"].isna().all()
    assert set(kappas["reason"]) == {"all items have one verdict"}


def test_no_common_items_is_undefined_with_its_reason():
    model, other = build("neox"), build("neox", seed=1)
    table = asked(model, seeds=0, shares=(), others={"apart": [other]})
    got = pick(table, "verdict_agreement", varied="apart")
    assert got["value"].isna().all() and (got["n"] == 0).all()
    assert set(got["reason"]) == {"no item is recited by both unedited models"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "svd"},
         "probe_stability: method 'svd' does not come from the factors; choose from "
         "kfac, saliency, random, ekfac"),
        ({"edits": [("magnitude", 0.5)]},
         "probe_stability: method 'magnitude' does not come from the factors; choose from "
         "kfac, saliency, random, ekfac"),
        ({"rho": ()}, "probe_stability: rho holds no shares, needs at least one"),
        ({"rho": (0.0,)},
         "probe_stability: rho is 0.0, the share that is kept; needs 0 < rho <= 1"),
        ({"labels": "true"}, "probe_stability: labels 'true'; choose from sampled, gold"),
        ({"shares": (1.0,)},
         "probe_stability: shares holds 1.0, needs a share above 0 and below 1"),
        ({"mass": 0.0}, "probe_stability: mass is 0.0, needs a share above 0 and below 1"),
        ({"dimensions": 0}, "probe_stability: dimensions is 0, needs at least 1"),
        ({"memorized": "drip"},
         "probe_stability: no items of group 'drip'; there are groups seen"),
        ({"texts": ["w1", "w2"]},
         "probe_stability: none of 2 texts has two tokens; give more text"),
        ({"items": items_of(texts(*[9] * 3, seed=9))},
         "probe_stability: the unedited model recites none of 3 items of group 'seen', so no edit "
         "can stop it; give items that it recites"),
        ({"others": {"step": [build("neox")] * 2}},
         "probe_stability: models under 'step' share one module, which holds the weights of the "
         "last one read; give the checkpoints themselves, as checkpoints.select(steps)"),
        ({"others": {"kind": [build("llama")]}},
         "probe_stability: llama at step 0 has other layers than neox: 14 of them, first "
         "('model.layers.0.self_attn.q_proj', (8, 8)), against 8, first "
         "('gpt_neox.layers.0.attention.query_key_value', (24, 8)); give models of one shape"),
    ],
)  # fmt: skip
def test_errors(options, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(InputError) as caught:
            asked(build("neox"), **options)
    assert str(caught.value) == message


def test_one_text_cannot_be_halved():
    with pytest.raises(InputError) as caught:
        asked(build("neox"), texts=ORDINARY[:1])
    assert str(caught.value) == (
        "probe_stability: got 1 texts, needs at least two, which are compared with each other"
    )


# Figures


def test_figures_draw_what_the_table_says(made):
    _, _, table = made
    figure = plot_principal_angles(table, title="Angles")
    chance = [t for t in figure.data if t.name == "random subspaces"]
    settings_drawn = {t.name for t in figure.data if t.name} - {"random subspaces"}
    assert len(chance) == 2 and "labels drawn again, 1" in settings_drawn
    line = next(t for t in figure.data if t.name == "gold labels" and t.xaxis == "x2")
    rows = pick(table, "principal_angle", setting="gold labels", role="all", side="output")
    np.testing.assert_allclose(line.y, rows.sort_values("place")["value"], atol=1e-3)
    assert figure.layout.yaxis.title.text == METRICS["principal_angle"].axis
    figure = plot_edit_overlap(table, title="Edits")
    first = next(t for t in figure.data if t.name == "rho 0.9" and t.xaxis == "x")
    rows = pick(table, "edit_cosine", rho=0.9, role="all", group="observed")
    np.testing.assert_allclose(first.x, rows["value"], atol=1e-5)
    assert [figure.layout.yaxis.ticktext[round(y)] for y in first.y] == list(rows["setting"])
    whisker = next(t for t in figure.data if t.name == "rho 0.9" and t.xaxis == "x3")
    rows = pick(table, "verdict_agreement", rho=0.9, group="observed")
    np.testing.assert_allclose(whisker.error_x.array, rows["hi"] - rows["value"], atol=1e-5)
    grey = [t for t in figure.data if t.name == "by chance" and t.xaxis == "x"]
    assert len(grey) == 2 and all(t.error_x.array is None for t in grey)
    for plot in (plot_principal_angles, plot_edit_overlap):
        with pytest.raises(InputError, match=f"^{plot.__name__}: the table has no rows of "):
            plot(table[table["metric"] == "recitation_strict"])
