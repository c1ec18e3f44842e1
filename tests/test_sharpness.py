"""Sharpness of groups and of items: every number against a dense Hessian or a plain loop."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from tests.conftest import Numbers, frame
from tests.curvature_models import KINDS, build, collect, texts
from tests.test_hessian import TEXTS, dense, little, message
from workbench import curvature as cv
from workbench import factors as fc
from workbench import hessian as hs
from workbench.models import LanguageModel
from workbench.plots import plot_density, plot_item_sharpness, plot_sharpness
from workbench.probes import sharpness as sh
from workbench.stats.sharpness import rank_correlation, sharpness_auc, sharpness_correlation
from workbench.table import rows

# Groups


def items() -> pd.DataFrame:
    texts = [" ".join(map(str, each)) for each in TEXTS]
    return frame([*texts, "4", "6 5 4 3 2 1"], group=["a", "a", "b", "a", "b"])


def test_sharpness_of_groups():
    model = little()
    with pytest.warns(UserWarning) as said:
        table = sh.probe_sharpness(model, items(), top=2, probes=3, starts=2, steps=4, seed=7)
    assert [str(each.message) for each in said] == [
        "probe_sharpness: dropped 1 of 5 texts that are shorter than two tokens"
    ]
    assert table.attrs["dropped"] == 1 and set(table["run"]) == {"little"}
    assert set(table["step"]) == {3} and set(table["item"]) == {"all"}
    for group, few in (("a", TEXTS[:2]), ("b", [TEXTS[2], TEXTS[0][::-1].copy()])):
        full = dense(model, few)
        mine = table[table["group"] == group].set_index("metric")
        top = mine.loc["hessian_eigenvalue"].sort_values("rank")
        np.testing.assert_allclose(top["value"], np.linalg.eigvalsh(full)[:-3:-1], rtol=1e-5)
        assert top["rank"].tolist() == [1, 2] and top["n"].tolist() == [2, 2]
        assert (top["hi"] + top["lo"] - 2 * top["value"]).abs().max() < 1e-12
        signs = hs.rademacher(len(full), 3, seed=7)
        samples = np.einsum("ki,ij,kj->k", signs, full, signs)
        trace = mine.loc["hessian_trace"]
        assert trace["value"] == pytest.approx(samples.mean(), rel=1e-9) and trace["n"] == 3
        assert trace["se"] == pytest.approx(samples.std(ddof=1) / np.sqrt(3), rel=1e-9)
        assert trace["hi"] - trace["value"] == pytest.approx(4.3026527 * trace["se"], rel=1e-6)
        density = mine.loc["hessian_density"]
        assert len(density) == hs.GRID and (density["lo"] >= 0).all() and set(density["n"]) == {2}
        under = np.trapezoid(density["value"], density["eigenvalue"])
        assert under == pytest.approx(1.0, abs=2e-3)
        with hs.loss_hessian(model, few) as hessian:
            norm = np.linalg.norm(hessian.gradient())
        assert mine.loc["gradient_norm", "value"] == pytest.approx(norm, rel=1e-12)
    passport = table.attrs["passport"]
    assert passport["attention"] == "eager" and passport["seed"] == 7
    assert passport["parameters"] == "all" and passport["weights"] == model.weights_hash()


def test_sharpness_of_items_and_of_a_run(model_folder, tokenizer):
    from workbench.models import load_checkpoints

    text = ["the quick brown fox", "call me"]
    checkpoints = load_checkpoints(model_folder)
    options = {"parameters": ["lm_head"], "probes": 4}
    options |= {"measures": ["gradient_norm", "hessian_trace"]}
    table = sh.probe_item_sharpness(checkpoints, frame(text, group=["a", "b"]), **options)
    del options["measures"]
    model = checkpoints.at(0)
    for name, each in zip(["i0", "i1"], text, strict=True):
        one = sh.probe_sharpness(model, frame([each]), top=1, starts=0, **options).set_index(
            "metric"
        )
        mine = table[table["item"] == name].set_index("metric")
        for metric in ("gradient_norm", "hessian_trace"):
            for column in ("value", "lo", "hi"):
                got, wanted = mine.loc[metric, column], one.loc[metric, column]
                assert got == pytest.approx(wanted, rel=1e-5, nan_ok=True), (metric, column)
        assert mine.loc["hessian_trace", "n"] == 4
    assert table.attrs["passport"]["parameters"] == ["lm_head"]
    # the head is linear: its loss is convex, so no probe gives a negative number
    assert (table["value"] > 0).all() and set(table["group"]) == {"a", "b"}


def test_texts_without_a_prediction_are_refused():
    assert message(lambda: sh.probe_sharpness(little(), frame(["1", "2"]))) == (
        "probe_sharpness: none of 2 texts has two tokens; give longer texts"
    )


# The embeddings


class Apart(torch.nn.Module):
    """Positions that know nothing of one another: an embedding and a head."""

    def __init__(self, embedding, head):
        super().__init__()
        embedding, head = (torch.as_tensor(each, dtype=torch.float64) for each in (embedding, head))
        self.embed = torch.nn.Embedding.from_pretrained(embedding)
        self.head = torch.nn.Linear(*head.T.shape, bias=False).double()
        self.head.weight.data = head
        self.config = SimpleNamespace(max_position_embeddings=32)

    @property
    def dtype(self):
        return self.head.weight.dtype

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))


def apart(bos: int | None = None) -> LanguageModel:
    """Logits of token 0 are (0, ln 3), those of token 1 (0, 0), each its own embedding."""
    module = Apart([[0.0, np.log(3.0)], [0.0, 0.0]], np.eye(2))
    return LanguageModel(module, Numbers(), run="apart", bos=bos)


@pytest.mark.parametrize("bos", [None, 1])
def test_input_curvature_by_hand(bos):
    # after token 0 p = (1/4, 3/4), so H = 3/16 [[1, -1], [-1, 1]]: v = (1, 1) gives 0, (1, -1)
    # gives (3/8, -3/8), whose square is 9/32. After token 1 p = (1/2, 1/2): 0 or 1/2. Each is as
    # likely, so a text 0 1 0 0, whose inputs are 0, 1, 0, expects (9/64 + 1/4 + 9/64) / 3 = 17/96
    text = np.array([0, 1, 0, 0])
    draws = sh.input_curvature(apart(bos), [text], probes=64, seed=4)[:, 0]
    signs = hs.rademacher(6, 64, seed=4).reshape(64, 3, 2)
    uneven = signs[:, :, 0] != signs[:, :, 1]
    np.testing.assert_allclose(draws, uneven @ [9 / 32, 1 / 2, 9 / 32] / 3, atol=1e-15)
    many = sh.input_curvature(apart(bos), [text], probes=1000)
    # the deviation of a draw is at most .12, so of their mean .004
    assert many.mean() == pytest.approx(17 / 96, abs=0.016)


def test_a_text_said_again_has_its_input_curvature():
    # inputs 0 1 0 against 0 1 0 0 1 0: the same positions twice
    once, twice = np.array([0, 1, 0, 0]), np.array([0, 1, 0, 0, 1, 0, 0])
    got = sh.input_curvature(apart(), [once, twice], probes=2000).mean(axis=0)
    assert got[1] == pytest.approx(got[0], abs=0.02) and got[1] == pytest.approx(17 / 96, abs=0.01)


def bent(model: LanguageModel, text: np.ndarray) -> np.ndarray:
    """The Hessian of a text's summed loss by its own input embeddings, whole."""
    before = [] if model.bos is None else [model.bos]
    ids = torch.as_tensor([*before, *text[:-1].tolist()])
    embedded = model.module.get_input_embeddings()(ids).detach()
    start = len(before)

    def loss(moved):
        every = torch.cat([embedded[:start], moved.view(len(text) - 1, -1)])
        logits = model.module(inputs_embeds=every[None], use_cache=False).logits[0]
        right = torch.as_tensor(text[1:])[:, None]
        return -logits[start:].log_softmax(dim=1).gather(1, right).sum()

    return torch.autograd.functional.hessian(loss, embedded[start:].flatten()).numpy()


@pytest.mark.parametrize("bos", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_input_curvature_is_that_of_the_dense_hessian(kind, bos):
    model = build(kind, bos=bos)
    tokens = texts(7, 2, 5)
    got = sh.input_curvature(model, tokens, probes=3, seed=2)
    model.module.requires_grad_(False).set_attn_implementation("eager")
    for column, text in enumerate(tokens):
        matrix = bent(model, text)
        assert np.abs(matrix).max() > 0.01
        signs = hs.rademacher(len(matrix), 3, seed=2)
        expected = ((signs @ matrix) ** 2).sum(axis=1) / (len(text) - 1)
        # attention's softmax is in float32 whatever the weights are
        np.testing.assert_allclose(got[:, column], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_measures_of_padded_texts_are_those_of_one_alone(kind, monkeypatch):
    model, tokens = build(kind), texts(9, 3, 6)
    bases = cv.decompose(collect(model, texts(20, 20, 20)))
    draws = sh.input_curvature(model, tokens, probes=2)
    both = np.array(sh.self_influence(model, bases, tokens))
    monkeypatch.setattr(sh, "COMPONENTS", 1)  # one text's gradient at a time
    np.testing.assert_allclose(sh.self_influence(model, bases, tokens), both, rtol=1e-6)
    monkeypatch.setitem(hs.TOKENS_PER_PASS, "cpu", 9)
    np.testing.assert_allclose(sh.input_curvature(model, tokens, probes=2), draws, rtol=1e-6)
    np.testing.assert_allclose(sh.self_influence(model, bases, tokens), both, rtol=1e-6)
    alone = [sh.self_influence(model, bases, [each]) for each in tokens]
    np.testing.assert_allclose(np.array(alone)[:, :, 0].T, both, rtol=1e-6)


# The Kronecker basis


def test_self_influence_by_hand():
    # the text 0 1: a = (0, ln 3), g = p - (0, 1) = (1/4, -1/4), so D = ln 3 / 4 [[0, 1], [0, -1]].
    # lambda = (2, 1), mu = (3, 1): masses 3 and 1 in the second column, on average 1.5 * 2 = 3.
    # delta = .5 * 3 = 1.5: (ln 3 / 4)^2 (1 / 4.5 + 1 / 2.5); the unit gradient meets (3 + 1) / 2 / 3
    model = apart()
    basis = flat_basis(model, [2.0, 1.0], [3.0, 1.0])
    own, met = sh.self_influence(model, [basis], [np.array([0, 1])], damping=0.5)
    expected = (np.log(3) / 4) ** 2 * (1 / 4.5 + 1 / 2.5)
    assert own[0] == pytest.approx(expected, rel=1e-12)
    assert met[0] == pytest.approx(2 / 3, rel=1e-12)
    # three tokens predicted, all of the mean loss: 0 0 1 adds a label 0 after token 0, whose
    # gradient is (-3/4, 3/4) and the sum (-1/2, 1/2) / 2
    longer = sh.self_influence(model, [basis], [np.array([0, 0, 1])], damping=0.5)[0]
    assert longer[0] == pytest.approx(expected, rel=1e-12)
    # token 1 has the embedding 0: no gradient, so no direction
    own, met = sh.self_influence(model, [basis], [np.array([1, 0])], damping=0.5)
    assert own[0] == 0 and np.isnan(met[0])


def flat_basis(model, input_values, output_values) -> cv.Basis:
    layer = fc.Layer("head", 0, "mlp.up", model.module.head)
    ones = torch.eye(2, dtype=torch.float64)
    values = (np.array(each) for each in (input_values, output_values))
    first, second = values
    weight = model.module.head.weight.detach()
    return cv.Basis(layer, first, ones, second, ones, weight, 0.0, cv.weight_hash(layer))


def gradients(model, layers, text) -> list[np.ndarray]:
    """Gradient of the mean loss by each weight as it is written in ``A (x) G``: [in, out], flat."""
    before = [] if model.bos is None else [model.bos]
    ids = torch.as_tensor([*before, *text[:-1].tolist()])[None]
    weights = [layer.module.weight for layer in layers]
    for weight in weights:
        weight.requires_grad_(True)
    logits = model.module(input_ids=ids, use_cache=False).logits[0, len(before) :]
    loss = torch.nn.functional.cross_entropy(logits, torch.as_tensor(text[1:]))
    found = torch.autograd.grad(loss, weights)
    transposed = [
        each if isinstance(layer.module, fc.Conv1D) else each.T
        for layer, each in zip(layers, found, strict=True)
    ]
    return [each.flatten().numpy() for each in transposed]


@pytest.mark.parametrize("bos", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_self_influence_is_that_of_dense_blocks(kind, bos):
    model = build(kind, bos=bos)
    factors = collect(model, texts(20, 20, 20, 20))
    bases = cv.decompose(factors)
    tokens = texts(7, 2, 5, seed=8)
    own, met = sh.self_influence(model, bases, tokens, damping=0.1)
    for column, text in enumerate(tokens):
        found, along, size, mass, count = 0.0, 0.0, 0.0, 0.0, 0
        for layer, d in zip(factors.layers, gradients(model, factors.layers, text), strict=True):
            block = np.kron(factors.inputs[layer.name], factors.outputs[layer.name])
            mean = np.trace(block) / len(block)
            found += d @ np.linalg.solve(block + 0.1 * mean * np.eye(len(block)), d)
            along, size = along + d @ block @ d, size + d @ d
            mass, count = mass + np.trace(block), count + len(block)
        assert own[column] == pytest.approx(found, rel=1e-5)
        assert met[column] == pytest.approx(along / size / (mass / count), rel=1e-5)


def test_damping_has_its_two_limits():
    # RMS norms and gates leave no direction out, so these factors have full rank
    model = build("llama")
    factors = collect(model, texts(*[30] * 8), roles=["mlp.up", "mlp.gate"])
    bases, text = cv.decompose(factors), texts(9, seed=8)
    found = gradients(model, factors.layers, text[0])
    own, _ = sh.self_influence(model, bases, text, damping=0.0)
    solved, over = 0.0, 0.0
    for layer, d in zip(factors.layers, found, strict=True):
        block = np.kron(factors.inputs[layer.name], factors.outputs[layer.name])
        solved += d @ np.linalg.solve(block, d)
        over += d @ d / (1e9 * np.trace(block) / len(block))
    assert own[0] == pytest.approx(solved, rel=1e-4)
    large, _ = sh.self_influence(model, bases, text, damping=1e9)
    assert large[0] == pytest.approx(over, rel=1e-6)
    between = [sh.self_influence(model, bases, text, damping=d)[0][0] for d in (0.0, 0.01, 0.1, 1)]
    assert (np.diff(between) < 0).all()


def test_flat_curvature_weighs_every_direction_alike():
    model = build("neox")
    bases = cv.decompose(collect(model, texts(20, 20), roles=["mlp.up"]))
    flat = [replace(b, input_values=np.full(8, 2.0), output_values=np.full(12, 3.0)) for b in bases]
    tokens = texts(6, 4, seed=8)
    own, met = sh.self_influence(model, flat, tokens, damping=0.5)
    layers = [b.layer for b in bases]
    squared = [sum(d @ d for d in gradients(model, layers, each)) for each in tokens]
    np.testing.assert_allclose(own, np.array(squared) / (6 * 1.5), rtol=1e-6)
    np.testing.assert_allclose(met, 1.0, rtol=1e-9)


def test_factors_ten_times_as_large_leave_a_tenth():
    model = build("llama")
    factors = collect(model, texts(20, 20))
    larger = {name: 10 * each for name, each in factors.inputs.items()}
    both = [
        sh.self_influence(model, cv.decompose(each), texts(6, seed=8))
        for each in (factors, replace(factors, inputs=larger))
    ]
    assert both[1][0][0] == pytest.approx(both[0][0][0] / 10, rel=1e-9)
    assert both[1][1][0] == pytest.approx(both[0][1][0], rel=1e-9)


# All measures in one table


def words(*lengths: int, seed: int = 3) -> list[str]:
    return [" ".join(f"w{token}" for token in each) for each in texts(*lengths, seed=seed)]


def quietly(*given, **options) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few tokens for the factors
        return sh.probe_item_sharpness(*given, **options)


def test_every_measure_of_an_item_stands_in_one_table():
    model = build("llama")
    tokens, ordinary = texts(6, 4, seed=8), texts(20, 20)
    table = quietly(
        model,
        frame(words(6, 4, seed=8), group=["a", "b"], dose=[3, 0], other="left out"),
        texts=words(20, 20),
        probes=3,
        seed=1,
        damping=0.2,
        roles=["mlp.up"],
    )
    assert set(table.attrs["passport"]["layers"]) == {
        f"model.layers.{n}.mlp.up_proj" for n in (0, 1)
    }
    kept = {k: table.attrs["passport"][k] for k in ("damping", "factor_tokens", "seed")}
    assert kept == {"damping": 0.2, "factor_tokens": 38, "seed": 1}
    cells = table.astype({"item": str, "metric": str}).set_index(["item", "metric"])
    assert len(cells) == 2 * 5 and set(cells.index.get_level_values("metric")) == {
        *sh.MEASURES,
        "curvature_met",
    }
    factors = collect(model, ordinary, roles=["mlp.up"], seed=1, dtype="float32")
    own, met = sh.self_influence(model, cv.decompose(factors), tokens, damping=0.2)
    draws = sh.input_curvature(model, tokens, probes=3, seed=1)
    for n, name in enumerate(("i0", "i1")):
        mine = cells.loc[name]
        assert mine.loc["self_influence", "value"] == pytest.approx(own[n], rel=1e-6)
        assert mine.loc["curvature_met", "value"] == pytest.approx(met[n], rel=1e-6)
        bend = mine.loc["input_curvature"]
        assert bend["value"] == pytest.approx(draws[:, n].mean(), rel=1e-6) and bend["n"] == 3
        error = draws[:, n].std(ddof=1) / np.sqrt(3)
        assert bend["se"] == pytest.approx(error, rel=1e-6)
        assert bend["lo"] == pytest.approx(max(0, bend["value"] - 4.3026527 * error), rel=1e-5)
        with hs.loss_hessian(model, [tokens[n]]) as hessian:
            assert mine.loc["gradient_norm", "value"] == pytest.approx(
                np.linalg.norm(hessian.gradient()), rel=1e-6
            )
            trace = hs.trace_samples(hessian, 3, seed=1).mean()
        assert mine.loc["hessian_trace", "value"] == pytest.approx(trace, rel=1e-4)
    assert (table["reason"] == "").all() and "other" not in table.columns
    assert (table["dose"] == np.where(table["item"] == "i0", 3, 0)).all()


def test_what_is_not_asked_for_is_not_computed():
    model, asked = build("neox"), frame(words(5))
    assert set(sh.probe_item_sharpness(model, asked, probes=1)["metric"]) == {
        "gradient_norm",
        "hessian_trace",
        "input_curvature",
    }
    table = sh.probe_item_sharpness(model, asked, measures=["input_curvature"], probes=1)
    assert set(table["metric"]) == {"input_curvature"} and table["se"].isna().all()


def test_half_precision_is_cast_and_said():
    model = build("neox")
    half = replace(model, module=model.module.bfloat16())
    half.module.set_attn_implementation("eager")  # or the switch would be said as well
    rounded = replace(model, module=build("neox").module.bfloat16().float())
    before = half.weights_hash()
    with pytest.warns(UserWarning) as said:
        table = sh.probe_item_sharpness(half, frame(words(6)), probes=2)
    assert [str(each.message) for each in said] == [
        "probe_item_sharpness: the weights are bfloat16, whose second derivatives would be noise; "
        "computed on a float32 copy"
    ]
    wanted = sh.probe_item_sharpness(rounded, frame(words(6)), probes=2)
    np.testing.assert_allclose(table["value"], wanted["value"], rtol=1e-4)
    assert half.weights_hash() == before == table.attrs["passport"]["weights"]
    assert table.attrs["passport"]["dtype"] == "bfloat16"


def test_the_model_is_left_as_it_was_by_every_measure():
    model = build("neox")
    model.module.set_attn_implementation("sdpa")
    model.module.train()
    quietly(model, frame(words(6)), texts=words(20), probes=1)
    assert model.module.training and model.module.config._attn_implementation == "sdpa"
    assert all(p.requires_grad and p.grad is None for p in model.module.parameters())
    assert not model.module.get_input_embeddings()._forward_hooks


# What cannot be measured


def test_what_cannot_be_measured_is_refused():
    model, asked = build("neox"), frame(words(5))

    def told(**options):
        return message(lambda: quietly(model, asked, **options))

    assert told(measures=["sharpness"]) == (
        "probe_item_sharpness: 'sharpness'; choose from gradient_norm, hessian_trace, "
        "input_curvature, self_influence"
    )
    assert told(measures=[]) == (
        "probe_item_sharpness: no measure; choose from gradient_norm, hessian_trace, "
        "input_curvature, self_influence"
    )
    assert told(measures=["self_influence"]) == (
        "probe_item_sharpness: self_influence needs the curvature of ordinary text; give some as "
        "texts"
    )
    assert told(texts="w1 w2") == ("probe_item_sharpness: texts is one text, needs a list of texts")
    assert told(texts=["w1"]) == (
        "probe_item_sharpness: none of 1 texts for the curvature has two tokens; give longer texts"
    )
    assert told(probes=0) == "probe_item_sharpness: probes is 0, needs at least 1"
    assert message(lambda: sh.input_curvature(model, texts(5), probes=0)) == (
        "input_curvature: probes is 0, needs at least 1"
    )
    assert message(lambda: sh.input_curvature(model, texts(5, 1), probes=1)) == (
        "input_curvature: 1 of 2 texts are shorter than 2 or longer than the context of 32 tokens "
        "(first: number 1, 1 tokens); drop or cut them"
    )
    assert message(lambda: sh.input_curvature(little(), TEXTS, probes=1)) == (
        "input_curvature: Little names no layer of input embeddings; leave input_curvature out of "
        "the measures"
    )


def test_bases_that_do_not_fit_are_refused():
    model, tokens = build("neox"), texts(5)
    bases = cv.decompose(collect(model, texts(20, 20), roles=["mlp.up"], blocks=[0]))
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h"

    def told(*given, **options):
        return message(lambda: sh.self_influence(*given, **options))

    assert told(model, [], tokens) == "self_influence: got no bases, needs at least one layer's"
    for wrong in (-0.1, float("nan")):
        assert told(model, bases, tokens, damping=wrong) == (
            f"self_influence: damping is {wrong}, needs at least 0"
        )
    other = (
        f"self_influence: {name} holds other weights than were decomposed, or is another model's; "
        "collect the factors of this one"
    )
    assert told(build("neox"), bases, tokens) == other
    empty = (
        f"self_influence: {name} has components without mass, whose influence without damping is "
        "infinite; give more texts for the factors, or damping above 0"
    )
    hollow = [replace(bases[0], input_values=np.r_[np.ones(7), 0.0])]
    assert told(model, hollow, tokens, damping=0.0) == empty
    sh.self_influence(model, hollow, tokens, damping=0.1)
    assert told(model, [replace(bases[0], output_values=np.zeros(12))], tokens) == empty
    assert told(model, bases, texts(5, 33)) == (
        "self_influence: 1 of 2 texts are shorter than 2 or longer than the context of 32 tokens "
        "(first: number 1, 33 tokens); drop or cut them"
    )
    with torch.no_grad():
        model.module.gpt_neox.layers[1].mlp.dense_h_to_4h.weight[0, 0] = np.nan
    undefined = (
        "the loss of batch 0 is nan; the weights or the texts of that batch hold NaN or Inf, or "
        "the dtype overflows"
    )
    assert told(model, bases, tokens) == f"self_influence: {undefined}"
    assert message(lambda: sh.input_curvature(model, tokens, probes=1)) == (
        f"input_curvature: {undefined}"
    )
    with torch.no_grad():
        model.module.gpt_neox.layers[0].mlp.dense_h_to_4h.weight[0, 0] += 1
    assert told(model, bases, tokens) == other


# Which texts are sharper


def measured(values, groups, metric="gradient_norm", **columns) -> pd.DataFrame:
    names = [f"i{n}" for n in range(len(values))]
    return rows(metric, values, run="r", step=5, item=names, group=groups, beside=columns)


def test_area_by_hand():
    # trained 3, 1 against 2, 1, 0: 3 beats all, 1 beats one and ties one: 4.5 of 6. Shares of the
    # others below 3 and 1 are 1 and 1/2: variance 1/8, over 2; of the trained above 2, 1, 0: 1/2,
    # 3/4, 1: variance 1/16, over 3. The error is sqrt(1/16 + 1/48) = .2886751
    table = measured([3.0, 1.0, 2.0, 1.0, 0.0, np.nan], "a", member=[1, 1, 0, 0, 0, 0])
    found = sharpness_auc(table)
    row = found.iloc[0]
    assert row["metric"] == "auc" and row["score"] == "gradient_norm" and row["n"] == 5
    assert (row["run"], row["step"]) == ("r", 5) and found.attrs == {"dropped": 1}
    assert row["value"] == pytest.approx(0.75) and row["se"] == pytest.approx(0.2886751)
    assert row["lo"] == pytest.approx(0.75 - 1.959964 * 0.2886751) and row["hi"] == 1.0
    assert row["reason"] == ""
    turned = sharpness_auc(table.assign(value=-table["value"] + 3))
    assert turned["value"].item() == pytest.approx(0.25)


def test_areas_that_have_no_error_say_why():
    apart = sharpness_auc(measured([3.0, 2.0, 1.0, 0.0], "a", member=[True, True, False, False]))
    assert apart["value"].item() == 1 and np.isnan(apart["lo"].item())
    assert apart["reason"].item() == "no error: the classes do not overlap"
    single = sharpness_auc(measured([3.0, 2.0, 1.0], "a", member=["seen", "never", "never"]))
    assert single["reason"].item() == "no error: one text in a class" and np.isnan(single["se"][0])
    none = sharpness_auc(measured([3.0, 2.0], "a", member=[1, 1]))
    assert np.isnan(none["value"].item()) and none["reason"].item() == "texts of one class only"
    kinds = measured([3.0, 0.0, 1.0, 2.0], "a", member=[1, 0, 1, 0], kind=["p", "p", "c", "c"])
    found = sharpness_auc(kinds, by=("run", "step", "kind")).set_index("kind")["value"]
    assert found.to_dict() == {"p": 1.0, "c": 0.0}


def test_rank_correlation_by_hand():
    # ranks 1 2 3 and 1 3 2: 1 - 6 (0 + 1 + 1) / (3 * 8) = 1/2
    assert rank_correlation(np.array([[5.0, 6, 7], [1, 9, 4]])) == pytest.approx(0.5)
    # beside z = x nothing of x is left; beside z: x 1 2 3 4, y 2 1 4 3, z 1 2 2 1
    x, y, z = np.arange(4.0), np.array([2.0, 1, 4, 3]), np.array([1.0, 2, 2, 1])
    assert np.isnan(rank_correlation(np.array([x, y, x])))
    assert np.isnan(rank_correlation(np.array([x, np.ones(4)])))
    # z has ranks 1.5 3.5 3.5 1.5, uncorrelated with both: the plain value, 1 - 6 * 4 / 60 = .6
    assert rank_correlation(np.array([x, y, z])) == pytest.approx(0.6)


def test_partial_rank_correlation_is_that_of_the_formula():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    sides = rng.normal(size=(3, 30))
    sides[:2] += sides[2]
    r = spearmanr(sides.T).statistic
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert rank_correlation(sides) == pytest.approx(expected, rel=1e-12)
    assert rank_correlation(sides[:2]) == pytest.approx(r[0, 1], rel=1e-12)


def test_correlation_with_what_training_did():
    rng = np.random.default_rng(1)
    effect, loss = rng.normal(size=(2, 40))
    sharp = measured(np.exp(effect + loss), "a", loss=loss)
    truth = measured(np.r_[effect[:39], np.nan], "a", metric="memorization")
    plain = sharpness_correlation(sharp, truth).iloc[0]
    given = sharpness_correlation(sharp, truth, given=("loss",)).iloc[0]
    assert plain["metric"] == "spearman" and plain["n"] == 39 and plain["given"] == ""
    assert given["given"] == "loss" and given["value"] > plain["value"] + 0.1
    # Bonett & Wright: z half width 1.96 sqrt((1 + r^2 / 2) / (39 - 3)), one less with a confound
    for found, spare in ((plain, 36), (given, 35)):
        half = 1.959964 * np.sqrt((1 + found["value"] ** 2 / 2) / spare)
        ends = np.tanh(np.arctanh(found["value"]) + np.array([-half, half]))
        np.testing.assert_allclose([found["lo"], found["hi"]], ends, rtol=1e-6)
    few = sharpness_correlation(sharp.head(3), truth).iloc[0]
    assert np.isnan(few["value"]) and few["reason"] == "3 items, fewer than 4"
    few = sharpness_correlation(sharp.head(4), truth, given=("loss",)).iloc[0]
    assert np.isnan(few["value"]) and few["reason"] == "4 items, fewer than 5"
    same = sharpness_correlation(sharp.assign(value=1.0), truth).iloc[0]
    assert np.isnan(same["value"]) and same["reason"] == "no spread: the items do not differ"
    perfect = sharpness_correlation(sharp.assign(value=np.exp(effect)), truth).iloc[0]
    assert perfect["value"] == 1 and np.isnan(perfect["lo"])
    assert perfect["reason"] == "no error: the ranks agree entirely"


@pytest.mark.parametrize("confounds", [0, 1])
def test_the_interval_covers_the_true_correlation(confounds):
    rng = np.random.default_rng(0)

    def drawn(n: int) -> np.ndarray:
        sides = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=n).T
        if not confounds:
            return sides
        z = rng.normal(size=n)
        return np.stack([*(sides + 0.7 * z * np.array([[1], [-1]])), z])

    true, hits = rank_correlation(drawn(20_000)), 0
    for _ in range(300):
        sides = drawn(12)
        sharp = measured(np.exp(sides[0]), "a", **({"loss": sides[2]} if confounds else {}))
        truth = measured(sides[1], "a", metric="memorization")
        row = sharpness_correlation(sharp, truth, given=["loss"][:confounds]).iloc[0]
        hits += row["lo"] <= true <= row["hi"]
    assert 0.92 <= hits / 300 <= 0.98  # two and a half standard errors about .95


def test_what_cannot_be_compared_is_refused():
    table = measured([1.0, 2.0], "a", member=[1, 0])
    truth = measured([1.0, 2.0], "a", metric="memorization")
    held = "run, step, group, item, metric, value, lo, hi, n, member"
    assert message(lambda: sharpness_auc(table, member="seen")) == (
        f"sharpness_auc: no column 'seen'; there are {held}"
    )
    assert message(lambda: sharpness_auc(table.assign(member="perhaps"))) == (
        "sharpness_auc: member is 'perhaps', which says neither member nor non-member; use True "
        "and False, or seen and unseen"
    )
    assert message(lambda: sharpness_auc(table.assign(value=np.nan))) == (
        "sharpness_auc: no item has a score; there is nothing to compare"
    )
    assert message(lambda: sharpness_correlation(table, truth, given=["loss"])) == (
        f"sharpness_correlation: no column 'loss'; there are {held}"
    )
    twice = pd.concat([truth, truth.assign(step=6)])
    assert message(lambda: sharpness_correlation(table, twice)) == (
        "sharpness_correlation: the truth has several rows of i0; select one step"
    )
    assert message(lambda: sharpness_correlation(table, truth.assign(item=["x", "y"]))) == (
        "sharpness_correlation: no item of the table has a truth; do both name items alike?"
    )


# Figures


def density(group: str, values) -> pd.DataFrame:
    beside = {"eigenvalue": np.arange(len(values)) - 1.0}
    place = {"run": "r", "group": group}
    return rows("hessian_density", values, lo=0.0, hi=np.array(values) + 1, beside=beside, **place)


def test_density_is_drawn_with_the_largest_eigenvalues():
    top = rows("hessian_eigenvalue", [9.0, 4.0], run="r", group="b", beside={"rank": [1, 2]})
    table = pd.concat([density("a", [0.0, 1e3, 1.0]), density("b", [1.0, 2.0, 3.0]), top])
    figure = plot_density(table, title="T")
    lines = [trace for trace in figure.data if trace.mode == "lines" and trace.fill is None]
    assert [trace.name for trace in lines] == ["a", "b"] and figure.layout.title.text == "T"
    np.testing.assert_allclose(lines[1].y, [1, 2, 3])
    # the peak is 1e3: seven decades below it stands what would be 0
    np.testing.assert_allclose(lines[0].y, [1e-4, 1e3, 1.0])
    assert figure.layout.yaxis.type == "log" and figure.layout.yaxis.range == (-3.0, 3.3)
    ticks = [trace for trace in figure.data if trace.mode == "markers"]
    assert [list(trace.x) for trace in ticks] == [[], [9.0, 4.0]]
    assert (
        figure.layout.yaxis.title.text
        == "density of Hessian eigenvalues<br>[per unit of eigenvalue]"
    )
    assert figure.layout.xaxis.title.text == "Hessian eigenvalue [nats per token]"


def course() -> pd.DataFrame:
    made = [
        rows(metric, value, run="r", step=step, group=group, lo=value - 1, hi=value + 1, n=7)
        for metric, base in (("gradient_norm", 3.0), ("hessian_trace", -0.5), ("auc", 0.5))
        for step in (4, 0)
        for group, value in (("seen", base), ("never", base + (step if base > 1 else 0) / 8))
    ]
    return pd.concat(made, ignore_index=True)


def test_the_course_of_sharpness_is_drawn_panel_by_panel():
    table = course()
    table = table[table["metric"] != "auc"]
    figure = plot_sharpness(table, marks={"planted": 2.0})
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [(each.name, each.showlegend) for each in lines] == [
        ("seen", True), ("never", True), ("seen", False), ("never", False)
    ]  # fmt: skip
    assert list(lines[1].x) == [0, 4] and list(lines[1].y) == [3.0, 3.5]
    # where a value or bound is below 0 the axis is plain
    assert figure.layout.yaxis.type == "log" and figure.layout.yaxis2.type != "log"
    assert figure.layout.yaxis.title.text == "norm of the loss gradient<br>[nats per token]"
    assert figure.layout.xaxis2.title.text == "checkpoint [updates]"
    assert [each.text for each in figure.layout.annotations] == ["planted"]
    assert [(each.x0, each.xref) for each in figure.layout.shapes] == [(2.0, "x"), (2.0, "x2")]
    chance = plot_sharpness(course(), metrics=["auc"])
    assert [(each.y0, each.y1) for each in chance.layout.shapes] == [(0.5, 0.5)]


def test_items_are_drawn_as_points():
    table = pd.concat(
        measured([3.0, 1.0, 2.0], ["seen", "never", "seen"], metric=metric, kind=list("ppc"),
                 dose=[8, 0, 2]) for metric in ("gradient_norm", "hessian_trace")
    )  # fmt: skip
    figure = plot_item_sharpness(table, metrics=["hessian_trace"])
    assert [(each.name, list(each.y)) for each in figure.data] == [("p", [3.0, 1.0]), ("c", [2.0])]
    assert list(figure.layout.xaxis.ticktext) == ["seen", "never"]
    # the points keep to their columns, each at another place
    assert [round(x) for x in (*figure.data[0].x, *figure.data[1].x)] == [0, 1, 0]
    assert figure.data[0].x[0] != figure.data[1].x[0]
    doses = plot_item_sharpness(table, x="dose")
    assert list(doses.layout.xaxis.ticktext) == ["0", "2", "8"]
    assert [round(x) for x in doses.data[0].x] == [2, 0]
    assert doses.layout.xaxis2.title.text == "exposures"
    # 1, 2, 3 are less than a decade; with the chance of 1 beside 200 to 600 there are over two
    assert doses.layout.yaxis.dtick == "D1" and doses.layout.yaxis.type == "log"
    met = measured([200.0, 600.0], "a", metric="curvature_met", kind="p")
    axis = plot_item_sharpness(met).layout
    assert axis.yaxis.dtick == 1 and axis.shapes[0].y0 == 1.0


def test_figures_without_their_rows_are_refused():
    assert message(lambda: plot_density(course())) == (
        "plot_density: the table has no rows of hessian_density; it has auc, gradient_norm, "
        "hessian_trace"
    )
    twice = pd.concat([density("a", [1.0]), density("a", [1.0]).assign(step=2)])
    assert message(lambda: plot_density(twice)) == (
        "plot_density: several densities per group; select one step or group"
    )
    columns = "run, step, group, item, metric, value, lo, hi, n"
    assert message(lambda: plot_sharpness(course(), color="kind")) == (
        f"plot_sharpness: the rows have no column 'kind'; {columns}"
    )
    more = pd.concat([course(), course().assign(run="s")])
    assert message(lambda: plot_sharpness(more)) == (
        "plot_sharpness: several rows of gradient_norm per (step, group); summarise first"
    )
    items = measured([1.0], "a", kind="p")
    assert message(lambda: plot_item_sharpness(items, metrics=["auc"])) == (
        "plot_item_sharpness: the table has no rows of auc; it has gradient_norm"
    )
    again = pd.concat([items, items.assign(step=9)])
    assert message(lambda: plot_item_sharpness(again)) == (
        "plot_item_sharpness: several rows of gradient_norm per item; select one step and run"
    )
