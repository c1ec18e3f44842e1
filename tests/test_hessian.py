"""Sharpness: every number against the dense Hessian of a model small enough to have one."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import Numbers, bigram, neox
from workbench import hessian as hs
from workbench.models import LanguageModel
from workbench.table import InputError

VOCABULARY = 7
TEXTS = [np.array([1, 2, 3, 4, 5, 6]), np.array([2, 2, 0]), np.array([5, 1, 4, 3])]


class Little(torch.nn.Module):
    """Causal by its construction: a running mean of embeddings, a curved layer, a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCABULARY, 3)
        self.inner = torch.nn.Linear(3, 4)
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(4, VOCABULARY, bias=False)
        self.unused = torch.nn.Parameter(torch.ones(2))
        self.config = type("Config", (), {"max_position_embeddings": 8})()
        self.double()

    @property
    def dtype(self):
        return self.head.weight.dtype

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        places = torch.arange(1, input_ids.shape[1] + 1, dtype=self.dtype)[None, :, None]
        mixed = self.embed(input_ids).cumsum(dim=1) / places
        return type("Out", (), {"logits": self.head(self.drop(torch.tanh(self.inner(mixed))))})()


def little(bos: int | None = None) -> LanguageModel:
    return LanguageModel(Little(), Numbers(), run="little", step=3, bos=bos)


def written_out(model, tokens, weights: dict, bos=()) -> torch.Tensor:
    """The mean loss text by text and position by position, from its definition."""
    losses = []
    for text in tokens:
        ids = torch.as_tensor([*bos, *text[:-1].tolist()])[None]
        out = torch.func.functional_call(model.module, weights, (), {"input_ids": ids})
        for place, token in enumerate(text[1:]):
            losses.append(-out.logits[0, place + len(bos)].log_softmax(dim=0)[token])
    return torch.stack(losses).mean()


def dense(model, tokens, names=None, bos=()) -> np.ndarray:
    """The Hessian by autograd over the flattened parameters, column by column."""
    every = {k: p.detach() for k, p in model.module.named_parameters()}
    names = list(names or every)
    sizes = [every[k].numel() for k in names]

    def loss(flat):
        parts = flat.split(sizes)
        mine = {k: p.view_as(every[k]) for k, p in zip(names, parts, strict=True)}
        return written_out(model, tokens, every | mine, bos)

    model.module.eval()
    flat = torch.cat([every[k].flatten() for k in names])
    return torch.autograd.functional.hessian(loss, flat).numpy()


def whole(hessian: hs.Hessian) -> np.ndarray:
    return hessian.products(np.eye(hessian.size))


def known(matrix) -> hs.Hessian:
    """A stand-in that multiplies by a matrix."""

    class Known:
        size = len(matrix)

        def products(self, vectors):
            return vectors @ matrix

        def product(self, vector):
            return matrix @ np.ravel(vector)

    return Known()


def symmetric(n: int, seed: int = 0) -> np.ndarray:
    matrix = np.random.default_rng(seed).normal(size=(n, n))
    return (matrix + matrix.T) / 2


# Products


def test_one_softmax_by_hand():
    # logits of token 0 are the row (0, ln 3) of the table: p = (1/4, 3/4). The Hessian of -log p by
    # that row is diag(p) - p p^T = 3/16 [[1, -1], [-1, 1]]; it does not depend on the label. The
    # text 0 1 0 0 predicts thrice, twice from token 0: 2/3 of it is left. Token 1's row is (0, 0):
    # p = (1/2, 1/2) gives 1/4 [[1, -1], [-1, 1]], of which 1/3. The weight is [label, token].
    model = bigram([[0.0, np.log(3.0)], [0.0, 0.0]])
    expected = np.zeros((2, 2, 2, 2))
    expected[:, 0, :, 0] = 2 / 3 * 3 / 16 * np.array([[1, -1], [-1, 1]])
    expected[:, 1, :, 1] = 1 / 3 * 1 / 4 * np.array([[1, -1], [-1, 1]])
    with hs.loss_hessian(model, [np.array([0, 1, 0, 0])]) as hessian:
        np.testing.assert_allclose(whole(hessian), expected.reshape(4, 4), atol=1e-7)
        # -(log 3/4 + log 1/2 + log 1/4) / 3
        assert hessian.loss() == pytest.approx((2 * np.log(4) - np.log(3) + np.log(2)) / 3)
        # by logit (label 1, token 0): (3/4 - 1) + (3/4 - 0) = 1/2; by (1, 1): 1/2; a third of each
        np.testing.assert_allclose(hessian.gradient(), [-1 / 6, -1 / 6, 1 / 6, 1 / 6], atol=1e-7)
    with hs.loss_hessian(model, [np.array([0, 1, 0, 0])], reduction="sum") as hessian:
        np.testing.assert_allclose(whole(hessian), 3 * expected.reshape(4, 4), atol=1e-6)


@pytest.mark.parametrize("bos", [None, 0])
def test_products_are_those_of_the_dense_hessian(bos, monkeypatch):
    model = little(bos)
    expected = dense(model, TEXTS, bos=() if bos is None else (bos,))
    assert np.abs(expected).max() > 0.01 and np.linalg.eigvalsh(expected)[0] < -0.001
    for budget in (2048, 7):  # all texts in one padded chunk, or one at a time
        monkeypatch.setitem(hs.TOKENS_PER_PASS, "cpu", budget)
        with hs.loss_hessian(model, TEXTS) as hessian:
            got = whole(hessian)
            alone = hessian.product(np.eye(hessian.size)[5])
        np.testing.assert_allclose(got, expected, atol=1e-15)
        np.testing.assert_array_equal(alone, got[5])
        np.testing.assert_allclose(got, got.T, atol=1e-15)


@pytest.mark.parametrize("kind", ["little", "neox", "llama"])
def test_products_are_those_of_torch(kind):
    model = little() if kind == "little" else real(kind)
    texts = TEXTS if kind == "little" else some_texts(12, 5, 9)
    with hs.loss_hessian(model, texts) as hessian:
        names, leaves = list(hessian.parameters), tuple(hessian.parameters.values())
        vector = np.random.default_rng(1).normal(size=hessian.size)
        _, expected = torch.autograd.functional.hvp(
            lambda *w: written_out(model, texts, dict(zip(names, w, strict=True))),
            leaves,
            tuple(hessian._pieces(torch.as_tensor(vector))),
        )
        got = hessian.product(vector)
    expected = torch.cat([each.flatten() for each in expected]).numpy()
    # attention's softmax is in float32 whatever the weights are
    share = 1e-14 if kind == "little" else 1e-6
    np.testing.assert_allclose(got, expected, atol=share * np.abs(expected).max())


def test_some_parameters_are_a_block_of_all():
    model = little()
    every = [k for k, p in model.module.named_parameters() for _ in range(p.numel())]
    full = dense(model, TEXTS)
    for asked, held in (
        (["inner"], ["inner.weight", "inner.bias"]),
        (["head.weight", "unused"], ["unused", "head.weight"]),
        (["unused"], ["unused"]),
    ):
        at = np.flatnonzero(np.isin(every, held))
        with hs.loss_hessian(model, TEXTS, parameters=asked) as hessian:
            assert list(hessian.parameters) == [k for k in dict.fromkeys(every) if k in held]
            np.testing.assert_allclose(whole(hessian), full[np.ix_(at, at)], atol=1e-15)


def differences(hessian, vector, step: float) -> np.ndarray:
    """Central difference of the gradient along a vector, through the weights themselves."""

    def at(distance):
        with torch.no_grad():
            for leaf, piece in zip(hessian.parameters.values(), pieces, strict=True):
                leaf += distance * piece
            return None

    pieces = hessian._pieces(torch.as_tensor(vector, dtype=hessian.dtype))
    at(step)
    ahead = hessian.gradient()
    at(-2 * step)
    behind = hessian.gradient()
    at(step)
    return (ahead - behind) / (2 * step)


def llama() -> torch.nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def real(kind: str) -> LanguageModel:
    """A random model of an architecture, in float64, with weights that make it curved."""
    module = neox(width=8, layers=2, vocabulary=40) if kind == "neox" else llama()
    with torch.no_grad():
        for each in module.parameters():
            each.mul_(4.0 if each.dim() == 2 else 1.0)
    return LanguageModel(module.double().eval(), Numbers(), run=kind)


def some_texts(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 40, n) for n in lengths]


@pytest.mark.parametrize("kind", ["little", "neox", "llama"])
def test_central_differences_approach_the_product_as_h_squared(kind):
    model = little() if kind == "little" else real(kind)
    texts = TEXTS if kind == "little" else some_texts(12, 5, 9)
    with hs.loss_hessian(model, texts) as hessian:
        vector = hs.rademacher(hessian.size, 1, seed=2)[0]
        exact = hessian.product(vector)
        # the third and next derivatives leave h^2 and h^4; halving h leaves a quarter. The
        # softmax of attention rounds to float32, 1e-7 / h, so h stays well above
        errors = [
            np.linalg.norm(differences(hessian, vector, h) - exact) / np.linalg.norm(exact)
            for h in (2e-3, 1e-3, 5e-4)
        ]
    ratios = np.array(errors[:-1]) / errors[1:]
    assert errors[-1] < 2e-3 and (np.abs(ratios - 4) < 0.3).all(), (errors, ratios)


@pytest.mark.parametrize("kind", ["neox", "llama"])
def test_padded_texts_count_as_one_at_a_time(kind):
    model, texts = real(kind), some_texts(12, 3, 7)
    with hs.loss_hessian(model, texts, reduction="sum") as hessian:
        vectors = np.random.default_rng(0).normal(size=(2, hessian.size))
        together = hessian.products(vectors)
        apart = sum(replace(hessian, tokens=[each]).products(vectors) for each in texts)
    # attention's softmax is in float32 whatever the weights are
    np.testing.assert_allclose(together, apart, atol=1e-6 * np.abs(apart).max())
    cross = vectors @ together.T
    assert cross[0, 1] == pytest.approx(cross[1, 0], rel=1e-5)
    with hs.loss_hessian(model, texts) as mean:
        # 11 + 2 + 6 predicted tokens
        np.testing.assert_allclose(
            mean.products(vectors) * 19, together, atol=1e-6 * np.abs(together).max()
        )


def test_float32_and_half_precision():
    exact = real("neox")
    half = LanguageModel(real("neox").module.bfloat16(), Numbers(), run="half")
    half.module.set_attn_implementation("eager")  # or the switch would be said as well
    rounded = LanguageModel(real("neox").module.bfloat16().double(), Numbers(), run="rounded")
    texts = some_texts(12, 5)
    with hs.loss_hessian(exact, texts, dtype="float32") as hessian:
        assert hessian.dtype == torch.float32 and hessian.model is not exact
        vector = hs.rademacher(hessian.size, 1, seed=0)[0]
        single = hessian.product(vector)
    with hs.loss_hessian(exact, texts) as hessian:
        assert hessian.dtype == torch.float64 and hessian.model is exact
        double = hessian.product(vector)
    np.testing.assert_allclose(single, double, atol=1e-5 * np.abs(double).max())
    with pytest.warns(UserWarning) as said, hs.loss_hessian(half, texts) as hessian:
        assert hessian.dtype == torch.float32
        single = hessian.product(vector)
    assert [str(each.message) for each in said] == [
        "loss_hessian: the weights are bfloat16, whose second derivatives would be noise; computed "
        "on a float32 copy"
    ]
    with hs.loss_hessian(rounded, texts) as other:
        wanted = other.product(vector)
    np.testing.assert_allclose(single, wanted, atol=1e-5 * np.abs(wanted).max())
    assert half.module.dtype == torch.bfloat16


def test_a_switch_of_attention_is_said():
    module = neox(width=8, layers=1, vocabulary=40)
    model = LanguageModel(module, Numbers(), run="r")
    for attention, expected in (
        ("eager", []),
        (
            "sdpa",
            [
                "second derivatives: attention is sdpa, which has none; it is eager for as long as "
                "they are taken"
            ],
        ),
    ):
        module.set_attn_implementation(attention)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with hs.loss_hessian(model, some_texts(6)):
                assert module.config._attn_implementation == "eager"
        assert [str(each.message) for each in said] == expected
        assert module.config._attn_implementation == attention


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    module = neox(width=8, layers=1, vocabulary=40)
    module.set_attn_implementation("sdpa")
    module.gpt_neox.embed_in.weight.requires_grad_(False)
    module.gpt_neox.layers.train()  # a part alone in training mode stays so
    model = LanguageModel(module, Numbers(), run="r")
    flags = [p.requires_grad for p in module.parameters()]
    modes = [m.training for m in module.modules()]
    before = model.weights_hash()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        with hs.loss_hessian(model, some_texts(6), parameters=["lm_head"]) as hessian:
            assert module.config._attn_implementation == "eager"
            assert not any(m.training for m in module.modules())
            wanted = [k for k, p in module.named_parameters() if p.requires_grad]
            assert wanted == ["lm_head.weight"]
            assert not torch.backends.cuda.matmul.allow_tf32
            one = np.arange(float(hessian.size))
            with torch.no_grad():
                without = hessian.product(one)
            assert np.abs(without).max() > 0
            np.testing.assert_array_equal(without, hessian.product(one))
            if fails:
                raise RuntimeError("stop")
    except RuntimeError as error:
        assert fails and str(error) == "stop"
    assert torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    assert module.config._attn_implementation == "sdpa"
    assert [p.requires_grad for p in module.parameters()] == flags
    assert [m.training for m in module.modules()] == modes
    assert all(p.grad is None for p in module.parameters())
    assert model.weights_hash() == before


# Eigenvalues, trace, density


def test_top_eigenvalues_are_those_of_the_dense_hessian():
    model = little()
    expected = np.linalg.eigvalsh(dense(model, TEXTS))[::-1]
    with hs.loss_hessian(model, TEXTS) as hessian:
        values, residuals = hs.top_eigenvalues(hessian, 4)
        loose, distance = hs.top_eigenvalues(hessian, 4, tolerance=0.5)
    np.testing.assert_allclose(values, expected[:4], rtol=1e-5)
    for value, within in [*zip(values, residuals, strict=True), *zip(loose, distance, strict=True)]:
        assert np.abs(expected - value).min() <= within + 1e-14
    assert residuals.max() < 1e-3 * values[0]


def test_the_largest_eigenvalues_not_those_of_largest_size():
    values, _ = hs.top_eigenvalues(known(np.diag([-9.0, 2.0, 1.0, -5.0, 0.5, 0.0])), 2)
    np.testing.assert_allclose(values, [2.0, 1.0], rtol=1e-6)


def test_trace_by_hand():
    # diagonal: v_i^2 = 1, so each probe gives the trace 6. [[0, 1], [1, 0]]: v^T H v = 2 v_1 v_2,
    # which is 2 or -2, never the trace 0
    np.testing.assert_array_equal(
        hs.trace_samples(known(np.diag([1.0, 2.0, 3.0])), 9), np.full(9, 6.0)
    )
    swap = hs.trace_samples(known(np.array([[0.0, 1.0], [1.0, 0.0]])), 20)
    assert set(swap) == {-2.0, 2.0}


def test_trace_is_unbiased_with_its_error():
    matrix = symmetric(12)
    samples = hs.trace_samples(known(matrix), 4000)
    off = matrix - np.diag(np.diag(matrix))
    # variance 2 |off|^2; the mean of 4000 within 4 standard errors fails once in 16,000, their
    # standard deviation within 8 % more rarely still
    deviation = np.sqrt(2 * (off**2).sum())
    assert abs(samples.mean() - np.trace(matrix)) < 4 * deviation / np.sqrt(4000)
    assert samples.std(ddof=1) == pytest.approx(deviation, rel=0.08)


def test_trace_of_a_model_by_all_signs():
    model = little()
    with hs.loss_hessian(model, TEXTS, parameters=["inner.bias"]) as hessian:
        signs = 2.0 * np.indices((2,) * 4).reshape(4, -1).T - 1
        every = (signs * hessian.products(signs)).sum(axis=1)
    # over all 16 sign vectors the off-diagonal entries cancel
    expected = np.trace(dense(model, TEXTS, ["inner.bias"]))
    assert every.mean() == pytest.approx(expected, rel=1e-12)


def test_more_probes_begin_with_the_same():
    matrix = known(symmetric(30))
    few, many = hs.trace_samples(matrix, 3), hs.trace_samples(matrix, 19)
    np.testing.assert_allclose(many[:3], few, rtol=1e-12)
    assert len(set(many)) == 19
    assert not np.isin(few, hs.trace_samples(matrix, 3, seed=1)).any()
    signs = hs.rademacher(1000, 2, seed=0)
    assert set(signs.ravel()) == {-1.0, 1.0} and abs(signs.mean()) < 0.1
    np.testing.assert_array_equal(hs.rademacher(1000, 1, seed=0, first=1)[0], signs[1])


def test_interval_of_a_mean_by_hand():
    # 1, 2, 3: deviation 1, error 1 / sqrt(3) = .5773503; t_{.975, 2} = 4.3026527, half-width 2.4841377
    got = hs.mean_interval(np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(got, [2.0, 0.5773503, -0.4841377, 4.4841377], atol=1e-7)
    mean, *rest = hs.mean_interval(np.array([[1.0, 5.0]]))
    np.testing.assert_array_equal(mean, [1.0, 5.0])
    assert np.isnan(rest).all()


def test_lanczos_by_hand():
    # diag(1, 3) from (1, 1): reaches both, each with weight 1/2. From (1, 0): one node
    nodes, weights = hs.lanczos(lambda v: np.array([1.0, 3.0]) * v, np.ones(2), 5)
    np.testing.assert_allclose(nodes, [1.0, 3.0], atol=1e-14)
    np.testing.assert_allclose(weights, [0.5, 0.5], atol=1e-14)
    nodes, weights = hs.lanczos(lambda v: np.array([1.0, 3.0]) * v, np.array([5.0, 0.0]), 5)
    assert nodes.tolist() == [1.0] and weights.tolist() == [1.0]
    nodes, weights = hs.lanczos(np.zeros_like, np.ones(4), 3)
    assert nodes.tolist() == [0.0] and weights.tolist() == [1.0]


@given(seed=st.integers(0, 10**6), size=st.integers(2, 14), steps=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_lanczos_keeps_the_moments(seed, size, steps):
    matrix = symmetric(size, seed)
    matrix /= np.linalg.norm(matrix, 2)
    start = np.random.default_rng(seed + 1).normal(size=size)
    nodes, weights = hs.lanczos(lambda v: matrix @ v, start, steps)
    assert len(nodes) == min(steps, size) and (np.diff(nodes) > 0).all()
    power = start / np.linalg.norm(start)
    for p in range(2 * min(steps, size)):
        along = (start / np.linalg.norm(start)) @ np.linalg.matrix_power(matrix, p) @ power
        assert weights @ nodes**p == pytest.approx(along, abs=1e-12)


def test_lanczos_has_no_ghosts():
    # one eigenvalue far out is found at once; without orthogonalisation it comes back as copies
    values = np.concatenate([[100.0], np.linspace(0, 1, 199)])
    nodes, weights = hs.lanczos(lambda v: values * v, np.ones(200), 60)
    assert (nodes > 50).sum() == 1 and nodes[-1] == pytest.approx(100.0)
    assert weights[-1] == pytest.approx(1 / 200, rel=1e-9)


def test_smoothing_by_hand():
    # a quarter at 0, three at 2, width 1/2: at 0 the peak .7978846 / 4 and three quarters of what
    # is left 4 widths away, .7978846 exp(-8) = .0002677
    got = hs.smoothed(np.array([0.0, 2.0]), np.array([0.25, 0.75]), np.array([0.0]), 0.5)
    np.testing.assert_allclose(got, [0.19967191], atol=1e-8)


def test_density_is_that_of_the_eigenvalues():
    matrix = np.diag(np.repeat([-1.0, 0.0, 4.0], [2, 5, 3]))
    grid, density = hs.spectral_density(known(matrix), starts=2, steps=10)
    # three nodes and no more; every start of signs has the weights 2, 5, 3 of 10 exactly
    expected = hs.smoothed(np.array([-1.0, 0.0, 4.0]), np.array([0.2, 0.5, 0.3]), grid, 0.05)
    np.testing.assert_allclose(density, [expected, expected], atol=1e-9)
    assert grid[0] == pytest.approx(-1.2) and grid[-1] == pytest.approx(4.2)
    np.testing.assert_allclose(np.trapezoid(density, grid, axis=1), 1.0, atol=1e-3)
    _, density = hs.spectral_density(known(symmetric(30)), starts=2, steps=3)
    assert np.abs(density[0] - density[1]).max() > 0.01  # another start sees other weights
    grid, density = hs.spectral_density(known(np.eye(3) * 2.0), starts=1, steps=4)
    assert grid[100] == pytest.approx(2.0) and density[0].argmax() == 100


# What cannot be done


def message(call) -> str:
    with pytest.raises(InputError) as error:
        call()
    return str(error.value)


def opened(model=None, tokens=TEXTS, **options):
    with hs.loss_hessian(model or little(), tokens, **options) as hessian:
        return hessian.products(np.zeros((1, 3)))


def test_what_cannot_be_used_is_refused():
    assert message(lambda: opened(reduction="max")) == (
        "loss_hessian: reduction 'max'; choose from mean, sum"
    )
    assert message(lambda: opened(dtype="bfloat16")) == (
        "loss_hessian: dtype 'bfloat16'; choose from float32, float64"
    )
    assert message(lambda: opened(tokens=[])) == (
        "loss_hessian: got no texts, needs at least one of two tokens"
    )
    for wrong, length in ((np.arange(1), 1), (np.zeros(9, dtype=int), 9)):
        assert message(lambda each=wrong: opened(tokens=[TEXTS[0], each])) == (
            "loss_hessian: 1 of 2 texts are shorter than 2 or longer than the context of 8 tokens "
            f"(first: number 1, {length} tokens); drop or cut them"
        )
    assert message(lambda: opened(parameters=["head", "inn"])) == (
        "loss_hessian: this model has no parameter or module 'inn' with parameters; it has embed, "
        "head, inner, unused"
    )
    assert message(lambda: opened(parameters="head")) == (
        "loss_hessian: parameters is the text 'head', needs a list of names"
    )
    assert message(lambda: opened(parameters=[])) == (
        "loss_hessian: no parameters were asked for, needs at least one"
    )
    assert message(lambda: opened(parameters=["head"])) == (
        "products: vectors of shape (1, 3), needs [vector, 28]: one number for each parameter"
    )


def test_weights_that_cannot_be_differentiated_are_refused():
    broken = little()
    with torch.no_grad():
        broken.module.head.weight[0, 0] = np.nan
    with hs.loss_hessian(broken, TEXTS) as hessian:
        assert message(hessian.loss) == (
            "loss_hessian: the loss of batch 0 is nan; the weights or the texts of that batch hold "
            "NaN or Inf, or the dtype overflows"
        )
    packed = little()
    packed.module.head.weight = torch.nn.Parameter(
        torch.ones(7, 4, dtype=torch.int8), requires_grad=False
    )
    assert message(lambda: opened(packed)) == (
        "loss_hessian: head.weight holds torch.int8 weights; second derivatives need float "
        "weights: load the model without quantisation"
    )


def test_a_hessian_whose_block_has_ended_is_refused():
    model = little()
    model.module.requires_grad_(False)
    with hs.loss_hessian(model, TEXTS) as hessian:
        hessian.gradient()
    for call in (hessian.gradient, hessian.loss, lambda: hessian.product(np.ones(hessian.size))):
        assert message(call) == (
            "loss_hessian: its parameters take no gradients (any more); use it inside its with "
            "block, and leave their flags alone"
        )


def test_numbers_that_cannot_be_had_are_refused():
    matrix = known(symmetric(5))
    for count in (0, 5):
        assert message(lambda each=count: hs.top_eigenvalues(matrix, each)) == (
            f"top_eigenvalues: {count} eigenvalues of 5 parameters; needs at least 1 and fewer "
            "than there are parameters"
        )
    assert message(lambda: hs.trace_samples(matrix, 0)) == (
        "trace_samples: probes is 0, needs at least 1"
    )
    assert message(lambda: hs.lanczos(matrix.product, np.ones(5), 0)) == (
        "lanczos: steps is 0, needs at least 1"
    )
    assert message(lambda: hs.lanczos(lambda v: v * np.nan, np.ones(5), 2)) == (
        "lanczos: the product of step 0 is not finite"
    )
    assert message(lambda: hs.spectral_density(matrix, starts=0, steps=2)) == (
        "spectral_density: starts is 0, needs at least 1"
    )


def test_eigenvalues_that_do_not_settle_are_refused(monkeypatch):
    monkeypatch.setattr(hs, "RESTARTS", 1)
    crowd = known(np.diag(np.linspace(0.99999, 1.0, 400)))
    assert message(lambda: hs.top_eigenvalues(crowd, 3, tolerance=1e-14)) == (
        "top_eigenvalues: 0 of 3 eigenvalues reached the tolerance of 1e-14 in 1 restarts; ask for "
        "fewer, or raise it"
    )


# The graph that a block keeps


def counted_passes(model) -> list:
    passes: list = []
    model.module.register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_texts_of_one_chunk_run_once_a_block(monkeypatch):
    model = little()
    passes = counted_passes(model)
    with hs.loss_hessian(model, TEXTS) as hessian:
        vectors = np.random.default_rng(0).normal(size=(10, hessian.size))
        together = hessian.products(vectors)  # eight vectors, then two
        one_by_one = np.array([hessian.product(each) for each in vectors])
        assert len(passes) == 1
        hessian.gradient()
        np.testing.assert_array_equal(hessian.product(vectors[0]), together[0])
        assert len(passes) == 2
    np.testing.assert_array_equal(one_by_one, together)
    assert hessian._kept == {}  # the memory goes with the block
    monkeypatch.setitem(hs.TOKENS_PER_PASS, "cpu", 7)  # a chunk for each text: none is kept
    with hs.loss_hessian(model, TEXTS) as hessian:
        hessian.product(vectors[0])
        assert len(passes) == 2 + 3 and hessian._kept == {}
        hessian.product(vectors[0])
        assert len(passes) == 2 + 6


def test_a_changed_weight_is_seen_in_the_same_block():
    model = little()
    with hs.loss_hessian(model, TEXTS) as hessian:
        vector = np.random.default_rng(0).normal(size=hessian.size)
        hessian.product(vector)
        for change in (
            lambda: model.module.inner.weight.mul_(1.5),
            lambda: model.module.embed.weight.data.mul_(1.5),  # which torch does not count
        ):
            with torch.no_grad():
                change()
            got = hessian.product(vector)
            with hs.loss_hessian(model, TEXTS) as fresh:
                np.testing.assert_array_equal(got, fresh.product(vector))
            for leaf in hessian.parameters.values():  # the inner block has put them back
                leaf.requires_grad_(True)


def test_hessians_of_one_block_keep_one_graph_and_do_not_mix():
    model = little()
    with hs.loss_hessian(model, TEXTS, reduction="sum") as hessian:
        each = [replace(hessian, tokens=[text]) for text in TEXTS]
        vector = np.random.default_rng(0).normal(size=hessian.size)
        first = hessian.product(vector)
        for _ in range(2):
            apart = [one.product(vector) for one in each]
            assert all(one._kept is hessian._kept for one in each)
            np.testing.assert_allclose(np.sum(apart, axis=0), first, atol=1e-14)
            np.testing.assert_array_equal(hessian.product(vector), first)
    for text, got in zip(TEXTS, apart, strict=True):
        with hs.loss_hessian(model, [text], reduction="sum") as alone:
            np.testing.assert_array_equal(alone.product(vector), got)
