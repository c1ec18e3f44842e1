"""Interference of gradients, against hand values, plain loops over autograd, and real steps."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from tests.conftest import ENGLISH, bigram, byte_level_tokenizer, frame, neox
from tests.test_weights import llama
from workbench.models import LanguageModel, load_checkpoints
from workbench.plots import plot_interference, plot_step
from workbench.probes.interference import (
    jackknife_half,
    pair_mean,
    probe_interference,
    text_losses,
)
from workbench.table import InputError
from workbench.tensors import weight_tensors

MORE = [
    "The clerk counts kettles in the attic.",
    "A model in want of text went to sea.",
    "Fathers brought forth a lazy nation.",
]
ITEMS = frame([*ENGLISH, *MORE], group=["old", "old", "new"] * 3, kind=["a", "b", "c"] * 3)


def language(module, tokenizer, *, run="a", step=0) -> LanguageModel:
    return LanguageModel(module, tokenizer, run=run, step=step)


def one(table: pd.DataFrame, metric: str, **where) -> pd.Series:
    table = table[table["metric"] == metric]
    for name, value in ({"item": "all"} | where).items():
        table = table[table[name] == value]
    assert len(table) == 1, table
    return table.iloc[0]


# Arithmetic


def test_pair_mean_by_hand():
    # g = (1, 0), (1, 1), (0, 2), sum (2, 3): products with it 2, 5, 6, squares 1, 2, 4. Pairs have
    # 1, 0, 2: mean 1. Without the first only the 2, the second the 0, the third the 1
    mean, left = pair_mean(np.array([2.0, 5.0, 6.0]), np.array([1.0, 2.0, 4.0]))
    assert mean == 1
    np.testing.assert_allclose(left, [2, 0, 1])
    mean, left = pair_mean(np.array([3.0, 4.0]), np.array([1.0, 2.0]))
    assert mean == 2 and np.isnan(left).all()
    mean, left = pair_mean(np.array([3.0]), np.array([3.0]))
    assert np.isnan(mean) and np.isnan(left).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(3, 8), st.integers(1, 5), st.integers(0, 10**6))
def test_pair_mean_is_the_loop_over_pairs_and_sees_no_order(n, dimensions, seed):
    g = np.random.default_rng(seed).normal(size=(n, dimensions))
    products, squares = g @ g.sum(axis=0), (g**2).sum(axis=1)

    def plain(rows):
        return np.mean([a @ b for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j])

    mean, left = pair_mean(products, squares)
    np.testing.assert_allclose(mean, plain(g), atol=1e-12)
    want = [plain(np.delete(g, i, axis=0)) for i in range(n)]
    np.testing.assert_allclose(left, want, atol=1e-12)
    turned, _ = pair_mean(products[::-1], squares[::-1])
    np.testing.assert_allclose(turned, mean, atol=1e-12)


def test_pair_mean_of_unrelated_gradients_is_zero_on_average_where_the_square_is_not():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(2000, 5, 10))
    total = draws.sum(axis=1, keepdims=True)
    got = np.array([pair_mean(p, s)[0] for p, s in zip(
        (draws * total).sum(axis=2), (draws**2).sum(axis=2), strict=True
    )])  # fmt: skip
    # five standard errors are met by accident once in two million
    assert abs(got.mean()) < 5 * got.std() / 2000**0.5
    naive = ((total[:, 0] / 5) ** 2).sum(axis=1)
    assert naive.mean() > 1.9  # 10 / 5 of nothing


def test_an_interval_by_hand():
    # values 1 and 3 without each text: variance 1/2 (1 + 1) = 1; t(.975, 1) = 12.7062047
    np.testing.assert_allclose(jackknife_half(np.array([1.0, 3.0])), 12.7062047, atol=1e-6)
    # beside it 0, 0, 3: 2/3 (1 + 1 + 4) = 4; variances add up, the smaller group's t
    half = jackknife_half(np.array([1.0, 3.0]), np.array([0.0, 0.0, 3.0]))
    np.testing.assert_allclose(half, 12.7062047 * 5**0.5, atol=1e-6)
    assert np.isnan(jackknife_half(np.array([1.0]), np.array([0.0, 1.0])))
    # of a mean it is Student's interval
    x = np.array([1.0, 2.0, 4.0, 9.0])
    without = (x.sum() - x) / 3
    np.testing.assert_allclose(jackknife_half(without), t.ppf(0.975, 3) * x.std(ddof=1) / 2)


# By hand


def test_interference_by_hand():
    # Three tokens, all logits 0. "0 1": softmax less the truth, (1, -2, 1)/3 for input 0; "0 2":
    # (1, 1, -2)/3; "1 0": (-2, 1, 1)/3 for input 1. Squares 2/3; "0 1" with "0 2" -1/3, "1 0"
    # meets neither
    model = bigram(np.zeros((3, 3)))
    texts = ["0 1", "0 1", "0 2", "0 2", "1 0", "1 0 1"]
    items = frame(texts, group=["one", "one", "two", "two", "three", "three"])
    table = probe_interference(model, items)
    assert set(table["module"]) == {"head", "all"} and set(table["dimensions"]) == {9}
    head = {"module": "head"}
    np.testing.assert_allclose(
        one(table, "gradient_product", group="one", against="one", **head)["value"],
        2 / 3,
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        one(table, "gradient_product", group="two", against="one", **head)["value"],
        -1 / 3,
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        one(table, "gradient_cosine", group="two", against="one", **head)["value"], -0.5, rtol=1e-6
    )
    np.testing.assert_allclose(
        one(table, "gradient_coherence", group="one", against="one", **head)["value"], 1, rtol=1e-6
    )
    # "1 0 1" is half of "1 0" and half of "0 1": with "1 0" 1/3, its square 1/2 * 1/2 * 4/3 = 1/3
    three = one(table, "gradient_coherence", group="three", against="three", **head)
    np.testing.assert_allclose(three["value"], (1 / 3) / ((2 / 3 + 1 / 3) / 2), rtol=1e-6)
    # with the mean of "one": 0 and half of 2/3, so 1/6; "one" has length sqrt(2/3), "three" 1/sqrt3
    with_one = one(table, "gradient_cosine", group="three", against="one", **head)
    np.testing.assert_allclose(with_one["value"], (1 / 6) / (2 / 3 * 1 / 3) ** 0.5, rtol=1e-6)
    # of two texts each, none can be left out under a mean over pairs
    assert np.isnan(with_one["lo"]) and with_one["n"] == 2
    product = one(table, "gradient_product", group="three", against="one", **head)
    # without each of "three" 1/3 and 0; without either of "one" no change
    half = 12.7062047 * (0.5 * 2 * (1 / 6) ** 2) ** 0.5
    np.testing.assert_allclose(
        [product["lo"], product["hi"]], [1 / 6 - half, 1 / 6 + half], atol=1e-6
    )
    items_of = table[(table["item"] != "all") & (table["group"] == "three")]
    found = items_of.set_index(["item", "against"])["value"]
    np.testing.assert_allclose(found["i4", "one"], 0, atol=1e-7)
    np.testing.assert_allclose(found["i5", "one"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(found["i5", "three"], 1 / 3, rtol=1e-6)  # with "1 0", not itself


def test_a_step_by_hand():
    # one logit pair: "0 1" at 0 has gradient (1/2, -1/2); a step of .1 on it lifts the difference
    # of the logits to .1: from ln 2 to ln(1 + exp -.1) = .6443967, foretold -.1 * 1/2 = -.05; back
    # it is ln(1 + exp .1) = .7443967, half the way -.05 up to the third power
    model = bigram(np.zeros((2, 2)))
    before = model.module.head.weight.detach().clone()
    table = probe_interference(
        model, frame(["0 1", "0 0"], group=["one", "two"]), learning_rate=0.1
    )
    own = {"group": "one", "against": "one"}
    np.testing.assert_allclose(one(table, "step_predicted", **own)["value"], -0.05, atol=1e-7)
    measured = one(table, "step_measured", **own)
    np.testing.assert_allclose(measured["value"], 0.6443967 - np.log(2), atol=1e-6)
    np.testing.assert_allclose(one(table, "step_central", **own)["value"], -0.05, atol=1e-6)
    other = {"group": "two", "against": "one"}
    np.testing.assert_allclose(one(table, "step_predicted", **other)["value"], 0.05, atol=1e-7)
    gained = 0.7443967 - np.log(2)
    np.testing.assert_allclose(one(table, "step_measured", **other)["value"], gained, atol=1e-6)
    np.testing.assert_allclose(
        one(table, "step_measured", item="i1", **other)["value"], gained, atol=1e-6
    )
    assert np.isnan(measured["lo"]) and measured["n"] == 1
    assert torch.equal(model.module.head.weight, before)


# Real models


def plain_gradients(model, items) -> list[dict[str, np.ndarray]]:
    """One text at a time by autograd, taken apart by role, in float64."""
    found = []
    for text in items["text"]:
        module = copy.deepcopy(model.module)
        ids = model.tokenizer(text)["input_ids"]
        module(torch.tensor(ids)[None], labels=torch.tensor(ids)[None]).loss.backward()
        values = {n: p.grad for n, p in module.named_parameters()}
        by_role: dict[str, list] = {}
        for _, role, _, value in weight_tensors(module, values):
            by_role.setdefault(role, []).append(value.double().numpy().ravel())
        whole = {role: np.concatenate(parts) for role, parts in by_role.items()}
        found.append(whole | {"all": np.concatenate(list(whole.values()))})
    return found


def pairs(a: np.ndarray) -> float:
    return np.mean([x @ y for i, x in enumerate(a) for j, y in enumerate(a) if i != j])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        return a.mean(axis=0) @ b.mean(axis=0) / np.sqrt(pairs(a) * pairs(b))


def drop(a: np.ndarray) -> list[np.ndarray]:
    return [np.delete(a, i, axis=0) for i in range(len(a))]


def plain_half(f, a, b) -> float:
    squares = 0.0
    for left in ([f(x, b) for x in drop(a)], [f(a, y) for y in drop(b)]):
        squares += (len(left) - 1) / len(left) * ((left - np.mean(left)) ** 2).sum()
    return t.ppf(0.975, min(len(a), len(b)) - 1) * squares**0.5


@pytest.mark.parametrize("make", [neox, llama])
def test_interference_is_that_of_plain_gradients(make, tokenizer):
    model = language(make(1), tokenizer, step=7)
    table = probe_interference(model, ITEMS)
    gradients = plain_gradients(model, ITEMS)
    assert set(table["module"]) == set(gradients[0])
    assert (table["step"] == 7).all()
    for module in gradients[0]:
        old, new = (
            np.array([g[module] for g, name in zip(gradients, ITEMS["group"], strict=True) if name == each])
            for each in ("old", "new")
        )  # fmt: skip
        where = {"group": "new", "against": "old", "module": module}
        row = one(table, "gradient_product", **where)
        want = old.mean(axis=0) @ new.mean(axis=0)
        scale = np.abs(old).sum(axis=1).max()
        np.testing.assert_allclose(row["value"], want, rtol=1e-4, atol=1e-7 * scale)
        half = plain_half(lambda a, b: a.mean(axis=0) @ b.mean(axis=0), old, new)
        np.testing.assert_allclose((row["hi"] - row["lo"]) / 2, half, rtol=1e-3)
        assert row["dimensions"] == old.shape[1] and row["n"] == 3
        within = {"group": "old", "against": "old", "module": module}
        row = one(table, "gradient_product", **within)
        np.testing.assert_allclose(row["value"], pairs(old), rtol=1e-4, atol=1e-7 * scale)
        row = one(table, "gradient_coherence", **within)
        coherence = pairs(old) / (old**2).sum(axis=1).mean()
        np.testing.assert_allclose(row["value"], coherence, rtol=1e-4, atol=1e-6)
        left = np.array([pairs(x) / (x**2).sum(axis=1).mean() for x in drop(old)])
        half = t.ppf(0.975, 5) * (5 / 6 * ((left - left.mean()) ** 2).sum()) ** 0.5
        np.testing.assert_allclose(row["hi"] - row["value"], half, rtol=1e-3, atol=1e-6)
        row = one(table, "gradient_cosine", **where)
        if min(pairs(old), pairs(new)) > 0:
            np.testing.assert_allclose(row["value"], np.clip(cosine(old, new), -1, 1), rtol=1e-3)
            half = plain_half(cosine, old, new)
            if np.isfinite(half):
                low, high = np.clip([cosine(old, new) - half, cosine(old, new) + half], -1, 1)
                np.testing.assert_allclose([row["lo"], row["hi"]], [low, high], rtol=1e-3)
        else:
            assert np.isnan(row["value"])
            assert row["reason"] == "the texts of a group share no direction beyond chance"
    rows = table[(table["item"] != "all") & (table["against"] == "old")].set_index("item")["value"]
    whole = np.array([g["all"] for g in gradients])
    old = whole[(ITEMS["group"] == "old").to_numpy()]
    np.testing.assert_allclose(rows["i2"], whole[2] @ old.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(rows["i0"], old[0] @ old[1:].mean(axis=0), rtol=1e-4)


def test_a_step_is_that_of_plain_gradient_descent(tokenizer):
    model = language(neox(3), tokenizer)
    before = model.weights_hash()
    rate = 0.05
    table = probe_interference(model, ITEMS, learning_rate=rate)
    assert model.weights_hash() == before
    assert not any(p.grad is not None for p in model.module.parameters())
    stepped = copy.deepcopy(model.module)
    descent = torch.optim.SGD(stepped.parameters(), lr=rate)
    old = ITEMS[ITEMS["group"] == "old"]

    def losses(module, texts):
        found = []
        for text in texts:
            ids = torch.tensor(tokenizer(text)["input_ids"])[None]
            found.append(module(ids, labels=ids).loss)
        return torch.stack(found)

    with torch.no_grad():
        at_first = losses(stepped, ITEMS["text"]).numpy()
    losses(stepped, old["text"]).mean().backward()
    descent.step()
    with torch.no_grad():
        change = losses(stepped, ITEMS["text"]).numpy() - at_first
    for place, item in enumerate(ITEMS["item"]):
        where = {"item": item, "against": "old", "group": ITEMS["group"][place]}
        got = one(table, "step_measured", **where)
        np.testing.assert_allclose(got["value"], change[place], atol=3e-6)
        assert got["kind"] == ITEMS["kind"][place]
    mine = change[(ITEMS["group"] == "new").to_numpy()]
    pooled = one(table, "step_measured", group="new", against="old")
    np.testing.assert_allclose(pooled["value"], mine.mean(), atol=3e-6)
    half = t.ppf(0.975, 2) * mine.std(ddof=1) / 3**0.5
    np.testing.assert_allclose(pooled["hi"] - pooled["value"], half, rtol=1e-2)


def test_what_was_foretold_comes_true_the_better_the_smaller_the_step(tokenizer):
    module = neox(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    model = language(module.double(), tokenizer)
    gaps = []
    for rate in (0.02, 0.01):
        table = probe_interference(model, ITEMS, learning_rate=rate)
        told, got, central = (
            table[table["metric"] == m].set_index(["item", "group", "against"])["value"]
            for m in ("step_predicted", "step_measured", "step_central")
        )
        scale = told.abs().max()
        gaps.append([(told - each).abs().max() / scale for each in (got, central)])
    (first, first_central), (second, second_central) = gaps
    # one-sided differences miss by the step, central ones by its square
    assert 1.7 < first / second < 2.3 and 3.4 < first_central / second_central < 4.6
    assert second_central < 0.01


def test_losses_are_those_of_the_models_own_scores(tokenizer):
    begun = byte_level_tokenizer(ENGLISH, bos=True)
    for reader, bos in ((tokenizer, None), (begun, begun.bos_token_id)):
        model = LanguageModel(neox(2), reader, run="a", bos=bos)
        tokens = model.encode(ENGLISH)
        scores = model.score(tokens)
        want = -np.nansum(scores.log_probability, axis=1) / scores.length
        with torch.no_grad():
            together = text_losses(model, tokens).numpy()
            alone = [float(text_losses(model, [each])[0]) for each in tokens]
        np.testing.assert_allclose(together, want, rtol=1e-5)
        np.testing.assert_allclose(alone, want, rtol=1e-5)


def test_order_and_batches_change_nothing(tokenizer, monkeypatch):
    model = language(neox(1), tokenizer)
    key = ["item", "group", "metric", "against", "module"]
    plain = probe_interference(model, ITEMS, learning_rate=0.1).set_index(key)["value"]
    turned = probe_interference(model, ITEMS[::-1], learning_rate=0.1).set_index(key)["value"]
    monkeypatch.setattr(
        "workbench.probes.interference.buckets",
        lambda lengths, limit: [np.array([i]) for i in range(len(lengths))],
    )
    alone = probe_interference(model, ITEMS, learning_rate=0.1).set_index(key)["value"]
    for other in (turned, alone):
        other = other.reindex(plain.index)
        np.testing.assert_allclose(other, plain, rtol=1e-3, atol=2e-6)


def test_along_checkpoints_each_step_is_as_if_alone(tmp_path, tokenizer):
    for step in (3, 8):
        neox(step).save_pretrained(tmp_path / f"step{step}")
    tokenizer.save_pretrained(tmp_path)
    run = load_checkpoints(tmp_path)
    table = probe_interference(run, ITEMS)
    for step in (3, 8):
        alone = probe_interference(run.at(step), ITEMS)
        got = table[table["step"] == step]
        np.testing.assert_allclose(got["value"], alone["value"], rtol=1e-6)
    assert table.attrs["passport"]["steps"] == [3, 8] and table.attrs["dropped"] == 0


def test_a_group_of_one_has_no_pairs(tokenizer):
    model = language(neox(), tokenizer)
    table = probe_interference(model, frame(ENGLISH[:3], group=["one", "more", "more"]))
    own = {"group": "one", "against": "one", "module": "all"}
    for metric in ("gradient_product", "gradient_coherence"):
        row = one(table, metric, **own)
        assert np.isnan(row["value"]) and row["reason"] == "one text in a group, needs two"
    assert (
        one(table, "gradient_product", item="i0", **own)["reason"]
        == "one text in a group, needs two"
    )
    across = {"group": "more", "against": "one", "module": "all"}
    assert one(table, "gradient_cosine", **across)["reason"] == "one text in a group, needs two"
    row = one(table, "gradient_product", **across)
    assert np.isfinite(row["value"]) and np.isnan(row["lo"])


def test_weights_below_float32_are_cast_and_it_is_said(tokenizer):
    module = neox(1).bfloat16()
    model = language(module, tokenizer)
    with pytest.warns(UserWarning) as told:
        table = probe_interference(model, ITEMS)
    assert str(told[0].message) == (
        "probe_interference: the weights of a are torch.bfloat16; a float32 copy is taken"
    )
    want = probe_interference(model.copy(), ITEMS)
    np.testing.assert_allclose(table["value"], want["value"], rtol=1e-6)
    assert module.gpt_neox.embed_in.weight.dtype == torch.bfloat16


def test_errors(tokenizer):
    model = language(neox(), tokenizer)
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError) as error:
            probe_interference(model, ITEMS, learning_rate=rate)
        assert str(error.value) == (
            f"probe_interference: learning_rate is {rate}, needs a positive number or None"
        )
    broken = neox(1)
    with torch.no_grad():
        broken.gpt_neox.embed_in.weight.fill_(float("nan"))
    with pytest.raises(InputError) as error:
        probe_interference(language(broken, tokenizer, run="b", step=4), ITEMS)
    assert str(error.value) == (
        "probe_interference: the gradient of item 'i0' is not finite at step 4 of b; the weights "
        "or their dtype give NaN or Inf"
    )
    quantised = neox()
    quantised.whole = torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError) as error:
        probe_interference(language(quantised, tokenizer), ITEMS)
    assert str(error.value) == (
        "probe_interference: whole holds torch.int8 weights, needs floats; load the model without "
        "quantisation"
    )


def test_interference_is_drawn_as_a_matrix():
    model = bigram(np.zeros((3, 3)))
    texts = ["0 1", "0 1", "0 2", "0 2", "0 2", "1 0"]
    items = frame(texts, group=["one"] * 2 + ["two"] * 3 + ["three"])
    table = probe_interference(model, items, learning_rate=0.01)
    heat = plot_interference(table).data[0]
    assert list(heat.x) == list(heat.y) == ["one", "two", "three"]
    assert heat.z[0][0] is None and heat.z[0][2] is None
    np.testing.assert_allclose([heat.z[0][1], heat.z[1][0]], -0.5, rtol=1e-6)
    assert heat.text[0][1] == "-0.50" and heat.customdata[0][2] == "one text in a group, needs two"
    # a step that lowers the loss is blue: the scale is turned round
    steps = plot_interference(table, metric="step_predicted").data[0]
    assert steps.reversescale and not heat.reversescale
    np.testing.assert_allclose(steps.z[0], [-0.01 * 2 / 3, 0.01 / 3, 0], atol=1e-9)
    own, others, _ = plot_step(table).data
    np.testing.assert_allclose(sorted(own.x), [-0.01 * 2 / 3] * 3, atol=1e-8)
    assert len(others.x) == 6 and list(own.customdata[0]) == ["one", "one"]
    twice = pd.concat([table, table.assign(step=1)])
    with pytest.raises(InputError) as error:
        plot_interference(twice)
    assert str(error.value) == (
        "plot_interference: several rows per (group, against); select one step"
    )
    with pytest.raises(InputError) as error:
        plot_step(twice)
    assert str(error.value) == "plot_step: several rows per (group, against); select one step"
    with pytest.raises(InputError) as error:
        plot_step(table[table["metric"] == "gradient_product"])
    assert str(error.value) == (
        "plot_step: the table has no rows of step_predicted; it has gradient_product"
    )
