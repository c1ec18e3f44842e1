"""The diagonal Fisher and dampening: by hand, against one backward pass an example, and undone."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.conftest import Numbers, bigram, neox
from workbench import factors
from workbench import fisher as fs
from workbench.fisher import (
    Fisher,
    dampened,
    dampening_factor,
    diagonal_fisher,
    load_fisher,
    merge_fishers,
    save_fisher,
)
from workbench.models import LanguageModel
from workbench.table import InputError

VOCABULARY = 23
LENGTHS = (9, 4, 4, 12, 2, 6)


def build(kind: str, *, bos: int | None = None, **options) -> LanguageModel:
    """A tiny model in float64 with weights large enough that every layer matters."""
    torch.manual_seed(0)
    if kind == "neox":
        module = neox(width=8, vocabulary=VOCABULARY, **options)
    elif kind == "gpt2":  # Conv1D, positions that all texts share, a head tied to the embedding
        module = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=8, n_layer=1, n_head=2)
        )
    else:
        size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        size |= {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
        if kind == "gemma":
            size |= {"head_dim": 4, "tie_word_embeddings": False, "pad_token_id": None}
            module = GemmaForCausalLM(GemmaConfig(**size, **heads))
        else:
            module = LlamaForCausalLM(LlamaConfig(**size, **heads, **options))
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
            else:
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return LanguageModel(module, Numbers(), run=kind, bos=bos)


def texts(*lengths: int, seed: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, size=n) for n in lengths]


def collect(model: LanguageModel, tokens, **options) -> Fisher:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="diagonal_fisher: .* one example at a time")
        return diagonal_fisher(model, tokens, **options)


def slow_fisher(model, tokens, *, example, labels, seed=0, mean_first=False):
    """One text at a time by autograd, all parameters alike: shares only the key of the draws."""
    module = model.module.requires_grad_(True)
    parameters = dict(module.named_parameters())
    found = []
    for text in tokens:
        before = 0 if model.bos is None else 1
        ids = torch.tensor(([model.bos] if before else []) + list(text))[None]
        logits = module(input_ids=ids, use_cache=False).logits[0, before:-1]
        target = torch.tensor(text[1:])
        if labels == "sampled":
            draws = factors.keyed(seed, text).random(len(text) - 1)
            cumulative = logits.detach().double().softmax(-1).cumsum(-1).numpy()
            target = torch.tensor(
                [(c <= u * c[-1]).sum() for c, u in zip(cumulative, draws, strict=True)]
            )
        losses = -logits.log_softmax(-1)[range(len(target)), target]
        for loss in losses if example == "token" else [losses.sum()]:
            found.append(torch.autograd.grad(loss, list(parameters.values()), retain_graph=True))
    module.requires_grad_(False)
    columns = [torch.stack(each) for each in zip(*found, strict=True)]
    squares = [c.mean(0) ** 2 if mean_first else (c**2).mean(0) for c in columns]
    return dict(zip(parameters, squares, strict=True)), len(found)


def assert_same(one, other, *, rtol=1e-6) -> None:
    assert one.keys() == other.keys()
    for name in one:
        size = float(other[name].abs().max())
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=rtol * size, msg=name)


# By hand


def test_a_single_linear_layer_by_hand():
    # W = 0 over two tokens, so p = (1/2, 1/2) and g = p - label. The text 0 0 1 predicts 0 after
    # 0 (g = (-.5, .5)) and 1 after 0 (g = (.5, -.5)); a is (1, 0) both times.
    # token: the mean of g^2 a^2 = (g^2)^T (a^2) / N is .25 in column 0, for both outputs.
    # sequence: the two gradients cancel, the square of their sum is 0.
    model, text = bigram(np.zeros((2, 2))), [np.array([0, 0, 1])]
    token = diagonal_fisher(model, text, example="token", labels="gold")
    assert (token.examples, token.passport["tokens"], token.passport["sequences"]) == (2, 2, 1)
    assert token.diagonal["head.weight"].tolist() == [[0.25, 0.0], [0.25, 0.0]]
    sequence = diagonal_fisher(model, text, example="sequence", labels="gold")
    assert sequence.examples == 1
    assert sequence.diagonal["head.weight"].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    # 0 0 0 predicts 0 twice: the sum is (-1, 1), its square 1; over both texts 1 / 2
    both = diagonal_fisher(model, [*text, np.array([0, 0, 0])], labels="gold")
    assert both.diagonal["head.weight"].tolist() == [[0.5, 0.0], [0.5, 0.0]]


def test_tokens_of_a_single_layer_are_the_product_of_squares():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(5, 5))
    tokens = [rng.integers(0, 5, size=n) for n in (7, 3)]
    a = np.concatenate([np.eye(5)[t[:-1]] for t in tokens])
    odds = np.exp(a @ table)
    g = odds / odds.sum(1, keepdims=True) - np.concatenate([np.eye(5)[t[1:]] for t in tokens])
    got = diagonal_fisher(bigram(table), tokens, example="token", labels="gold")
    expected = (g**2).T @ (a**2) / 8
    np.testing.assert_allclose(got.diagonal["head.weight"], expected, rtol=1e-5, atol=1e-7)


def test_sampled_labels_average_to_the_true_fisher():
    # two tokens with p = (.8, .2) after 0: the Fisher of each logit is p (1 - p) = .16; the share
    # k of 1s gives .8^2 k + .2^2 (1 - k), se .6 sqrt(.16 / 4000) = .0038: false alarm 6e-5 at 4 se
    table = np.log([[0.8, 0.2], [0.8, 0.2]])
    tokens = [np.array([*map(int, f"{i:07b}"), *[0] * 44]) for i in range(80)]  # 80 other keys
    model = bigram(table)
    got = diagonal_fisher(model, tokens, example="token", seed=1)
    diagonal = got.diagonal["head.weight"].sum(1)  # over both inputs: every token follows one
    assert got.examples == 80 * 50
    np.testing.assert_allclose(diagonal, 0.16, atol=4 * 0.0038)
    gold = diagonal_fisher(model, tokens, example="token", labels="gold")
    assert abs(float(gold.diagonal["head.weight"][0].sum()) - 0.16) > 0.05


# Against one backward pass an example


@pytest.mark.parametrize("kind", ["neox", "llama", "gpt2"])
@pytest.mark.parametrize("example", fs.EXAMPLES)
@pytest.mark.parametrize("labels", factors.LABELS)
def test_equals_one_backward_pass_an_example(kind, example, labels):
    model, tokens = build(kind, bos=1 if kind == "llama" else None), texts(*LENGTHS)
    got = collect(model, tokens, example=example, labels=labels, seed=5)
    expected, count = slow_fisher(model, tokens, example=example, labels=labels, seed=5)
    assert got.examples == count == (6 if example == "sequence" else sum(LENGTHS) - 6)
    assert all(each.dtype == torch.float64 for each in got.sums.values())
    assert_same(got.diagonal, expected)


def test_the_usual_families_need_no_example_alone_and_others_are_named():
    for kind in ("neox", "llama"):
        model, tokens = build(kind), [np.array([1, 2, 1, 3])]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = diagonal_fisher(model, tokens, labels="gold")
        assert_same(got.diagonal, slow_fisher(model, tokens, example="sequence", labels="gold")[0])
    # the tied head and the positions, which all texts of a batch share: also seen on one text;
    # Gemma scales its embedding, and its norms multiply by 1 + w, which takes no detour
    for kind, said in (
        ("gpt2", "2 parameters (first: transformer.wte.weight)"),
        ("gemma", "1 parameters (first: model.embed_tokens.weight)"),
    ):
        model, tokens = build(kind), texts(5)
        with pytest.warns(UserWarning) as record:
            got = diagonal_fisher(model, tokens, labels="gold")
        assert [str(each.message) for each in record] == [
            f"diagonal_fisher: {said} are tied, or used in a way that examples cannot share; they "
            "go one example at a time, which is slower"
        ]
        assert_same(got.diagonal, slow_fisher(model, tokens, example="sequence", labels="gold")[0])


def test_a_padding_index_has_no_gradient():
    model = build("llama", pad_token_id=3)
    # the one that holds it stands in the middle of the batch, where the self-check looks not
    tokens = [np.array([1, 2, 4, 5]), np.array([3, 3, 6]), np.array([7, 8])]
    got = collect(model, tokens, labels="gold")
    expected, _ = slow_fisher(model, tokens, example="sequence", labels="gold")
    assert_same(got.diagonal, expected)
    assert not got.sums["model.embed_tokens.weight"][3].any()


def test_the_square_of_the_mean_gradient_is_another_number():
    model, tokens = build("neox"), texts(*LENGTHS)
    got = collect(model, tokens).diagonal
    mistaken, _ = slow_fisher(model, tokens, example="sequence", labels="sampled", mean_first=True)
    for name, each in got.items():
        assert (mistaken[name] <= each * (1 + 1e-6) + 1e-15).all()  # Jensen
        assert float(mistaken[name].sum()) < 0.9 * float(each.sum()), name


def test_float32_sums_agree_with_float64():
    model, tokens = build("neox"), texts(*LENGTHS)
    double = collect(model, tokens, labels="gold").diagonal
    single = collect(model.copy(), tokens, labels="gold").diagonal
    assert all(each.dtype == torch.float32 for each in single.values())
    assert_same({name: each.double() for name, each in single.items()}, double, rtol=1e-3)


# What must change nothing, and what must


@settings(max_examples=8, deadline=None)
@given(
    order=st.permutations(range(len(LENGTHS))),
    budget=st.sampled_from([1, 12, 25, 1000]),
    example=st.sampled_from(fs.EXAMPLES),
)
def test_batches_and_order_change_nothing(order, budget, example):
    model, tokens = build("neox"), texts(*LENGTHS)
    whole = collect(model, tokens, example=example)
    again = collect(model, [tokens[i] for i in order], example=example, tokens_per_batch=budget)
    assert again.passport == whole.passport and again.examples == whole.examples
    assert_same(again.sums, whole.sums)


def test_seed_and_labels_do_change_it():
    model, tokens = build("neox"), texts(*LENGTHS)
    one = collect(model, tokens).sums["lm_head.weight"]
    for options in ({"seed": 1}, {"labels": "gold"}, {"example": "token"}):
        other = collect(model, tokens, **options).sums["lm_head.weight"]
        assert float((one - other).norm() / one.norm()) > 0.01, options


def test_texts_and_items_frames_are_taken_and_the_model_is_left_as_it_was():
    model = build("neox")
    model.module.lm_head.weight.requires_grad_(False)
    model.module.train()
    model.module.gpt_neox.layers[0].eval()
    flags = [p.requires_grad for p in model.module.parameters()]
    words, before = ["3 4 5", "6 7 8 9"], model.weights_hash()
    one = diagonal_fisher(model, words)
    two = diagonal_fisher(model, pd.DataFrame({"text": words}))
    three = diagonal_fisher(model, model.encode(words))
    assert_same(one.sums, two.sums, rtol=1e-12)
    assert_same(one.sums, three.sums, rtol=1e-12)
    assert one.passport == two.passport == three.passport
    assert one.passport["weights"] == before == model.weights_hash()
    assert flags == [p.requires_grad for p in model.module.parameters()]
    assert model.module.training and not model.module.gpt_neox.layers[0].training
    assert all(p.grad is None for p in model.module.parameters())


def test_half_precision_is_computed_in_float32_and_said():
    model = LanguageModel(neox(width=8, vocabulary=VOCABULARY).bfloat16(), Numbers(), run="half")
    with pytest.warns(UserWarning) as record:
        got = diagonal_fisher(model, texts(6, 3))
    assert str(record[0].message) == (
        "diagonal_fisher: the weights are bfloat16, in which squared gradients underflow; "
        "a float32 copy of the model is used"
    )
    assert_same(got.sums, diagonal_fisher(model.copy(), texts(6, 3)).sums)
    assert got.passport["weights"] == model.weights_hash()
    assert model.module.dtype == torch.bfloat16


# Shards


@pytest.mark.parametrize("example", fs.EXAMPLES)
def test_shards_merge_to_the_whole_and_survive_the_disk(tmp_path, example):
    model, tokens = build("neox"), texts(*LENGTHS)
    whole = collect(model, tokens, example=example, seed=2)
    for name, part in (("a", tokens[:1]), ("b", tokens[1:4]), ("c", tokens[4:])):
        save_fisher(collect(model, part, example=example, seed=2), tmp_path / name)
    shards = [load_fisher(tmp_path / name) for name in "cab"]
    merged = merge_fishers(shards)
    assert merged.passport == whole.passport and merged.examples == whole.examples
    assert_same(merged.diagonal, whole.diagonal)
    kept = collect(model, tokens[:1], example=example, seed=2)
    for name, each in shards[1].sums.items():
        assert torch.equal(each, kept.sums[name])
    assert sorted(path.name for path in tmp_path.glob("[!c]*")) == ["a", "b"]


def test_unlike_shards_are_refused_by_the_difference():
    model = build("neox")
    one, other = texts(4, seed=1), texts(4, seed=2)
    first = collect(model, one)
    for options, said in (
        ({"seed": 1}, "seed 1, shard 0 with 0"),
        ({"labels": "gold"}, "labels gold, shard 0 with sampled"),
        ({"example": "token"}, "example token, shard 0 with sequence"),
    ):
        with pytest.raises(InputError) as error:
            merge_fishers([first, collect(model, other, **options)])
        assert str(error.value) == f"merge_fishers: shard 1 was made with {said}; make both alike"
    second = build("llama")
    with pytest.raises(InputError) as error:
        merge_fishers([first, collect(second, other)])
    assert str(error.value) == (
        f"merge_fishers: shard 1 was made with weights {second.weights_hash()}, shard 0 with "
        f"{model.weights_hash()}; make both alike"
    )
    with pytest.raises(InputError) as error:
        merge_fishers([first, collect(model, other), collect(model, one)])
    assert str(error.value) == ("merge_fishers: shards 0 and 2 hold the same texts; give each once")
    with pytest.raises(InputError) as error:
        merge_fishers([])
    assert str(error.value) == "merge_fishers: got no shards, needs at least one"


def test_files_that_are_no_fisher_are_refused(tmp_path):
    with pytest.raises(InputError) as error:
        load_fisher(tmp_path / "none")
    assert (
        str(error.value) == f"load_fisher: no file at {tmp_path / 'none'}; save_fisher writes one"
    )
    path = tmp_path / "damaged"
    path.write_bytes(b"no tensors")
    with pytest.raises(
        InputError, match=rf"^load_fisher: {path} is not a whole Fisher file \(.+\)$"
    ):
        load_fisher(path)


# Bad input


def test_what_cannot_be_used_is_refused():
    model = build("neox")
    for arguments, message in (
        ({"texts": []}, "got no texts, needs at least one of two tokens"),
        (
            {"texts": texts(5, 1, 1)},
            "2 of 3 texts are shorter than 2 or longer than the context of 64 tokens "
            "(first: number 1, 1 tokens); drop or cut them",
        ),
        (
            {"texts": texts(65)},
            "1 of 1 texts are shorter than 2 or longer than the context of 64 tokens "
            "(first: number 0, 65 tokens); drop or cut them",
        ),
        (
            {"texts": texts(5), "example": "batch"},
            "example 'batch'; choose from sequence, token",
        ),
        ({"texts": texts(5), "labels": "soft"}, "labels 'soft'; choose from sampled, gold"),
        ({"texts": texts(5), "tokens_per_batch": 0}, "tokens_per_batch is 0, needs at least 1"),
    ):
        with pytest.raises(InputError) as error:
            diagonal_fisher(model, **arguments)
        assert str(error.value) == f"diagonal_fisher: {message}"
    head = model.module.lm_head
    head.weight = torch.nn.Parameter(head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError) as error:
        diagonal_fisher(model, texts(5))
    assert str(error.value) == (
        "diagonal_fisher: lm_head.weight holds torch.int8 weights, which have no gradient; "
        "load the model without quantisation"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_named_with_their_batch(value):
    model = build("neox")
    with torch.no_grad():
        model.module.gpt_neox.embed_in.weight[7] = value
    fine, bad = np.array([1, 2, 3, 4]), np.array([7, 1])
    for batch, tokens in ((0, [bad]), (1, [fine, bad])):
        with pytest.raises(InputError) as error:
            diagonal_fisher(model, tokens, labels="gold", tokens_per_batch=1)
        assert str(error.value) == (
            "diagonal_fisher: the gradient of gpt_neox.embed_in.weight is not finite in batch "
            f"{batch}; the weights hold NaN or Inf, or the squares overflow"
        )
    assert all(p.requires_grad for p in model.module.parameters())


def test_squares_that_overflow_are_not_finite_either():
    model = build("neox").copy()
    with torch.no_grad():
        model.module.lm_head.weight.mul_(1e25)  # gradients of 1e25, squares beyond float32
    with pytest.raises(InputError, match="the gradient of gpt_neox.* is not finite in batch 0; "):
        diagonal_fisher(model, texts(5), labels="gold")


# Dampening


def made(model: LanguageModel, values, **passport) -> Fisher:
    """A Fisher of a bigram model's one matrix with the given sums over two examples."""
    about = {"weights": model.weights_hash(), "example": "sequence", "labels": "sampled"}
    sums = {"head.weight": torch.tensor(values, dtype=torch.float32)}
    return Fisher(sums, 2, about | passport)


def test_dampening_by_hand():
    # means: forget 4, 2, 1, 0; all 1, 1, 1, 0. alpha 2: only 4 > 2 (2 > 2 is a tie, not above);
    # strength 1: times 1 / 4. strength 3: times 3 / 4. strength 8: min(8 / 4, 1) = 1, untouched.
    model = bigram([[8.0, 8.0], [8.0, 8.0]])
    forget, everything = made(model, [[8, 4], [2, 0]]), made(model, [[2, 2], [2, 0]])
    weight = model.module.head.weight
    for strength, first, share in ((1, 2.0, 0.25), (3, 6.0, 0.25), (8, 8.0, 0.0), (0, 0.0, 0.25)):
        with dampened(model, forget, everything, alpha=2, strength=strength) as report:
            assert weight.tolist() == [[first, 8.0], [8.0, 8.0]]
            assert (report.touched, report.by_parameter) == (share, {"head.weight": share})
        assert weight.tolist() == [[8.0, 8.0], [8.0, 8.0]]
    # alpha 1: 2 > 1 as well
    with dampened(model, forget, everything, alpha=1) as report:
        assert weight.tolist() == [[2.0, 4.0], [8.0, 8.0]] and report.touched == 0.5


def test_the_factor_at_its_extremes():
    forget, nothing = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 1.0])
    # what matters to nothing else goes; what matters to neither stays
    factor = dampening_factor(forget, nothing, alpha=1.0, strength=1.0)
    assert factor.tolist() == [0.0, 1.0, 0.5]
    factor = dampening_factor(forget, nothing, alpha=1.0, strength=9.0)  # never made larger
    assert factor.tolist() == [0.0, 1.0, 1.0]
    for alpha, strength in ((math.inf, 1.0), (1.0, math.inf), (math.inf, 0.0)):
        kept = dampening_factor(forget, nothing, alpha=alpha, strength=strength)
        assert kept.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["neox", "llama"])
def test_dampening_a_model_is_undone_to_the_bit(kind):
    model = build(kind)
    forget, everything = collect(model, texts(6, seed=8)), collect(model, texts(*LENGTHS))
    before, held = model.weights_hash(), {n: p.clone() for n, p in model.module.named_parameters()}
    with pytest.raises(KeyError), dampened(model, forget, everything, alpha=2.0) as report:
        assert 0 < report.touched < 1 and model.weights_hash() != before
        changed = 0
        for name, parameter in model.module.named_parameters():
            ratio = everything.diagonal[name] / forget.diagonal[name]
            chosen = forget.diagonal[name] > 2 * everything.diagonal[name]
            expected = torch.where(chosen, held[name] * ratio.clamp(max=1), held[name])
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=0)
            changed += int(chosen.sum())
        count = sum(each.numel() for each in held.values())
        assert report.touched == pytest.approx(changed / count, rel=1e-12)
        raise KeyError  # whatever goes wrong inside
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, held[name])
    assert model.weights_hash() == before
    with dampened(model, forget, everything, alpha=math.inf) as report:
        assert report.touched == 0 and model.weights_hash() == before
    with dampened(model, forget, forget, alpha=1.0) as report:  # equal is not above
        assert report.touched == 0
    # 1 of 7 examples: I_all is at least I_forget / 7, so no ratio is above 7
    whole = merge_fishers([forget, everything])
    for alpha, touched in ((7.0 * (1 + 1e-9), False), (6.5, True)):
        with dampened(model, forget, whole, alpha=alpha) as report:
            assert (report.touched > 0) == touched


def test_dampening_raises_the_loss_of_what_is_forgotten_most():
    # a bigram that knows two chains well; their weights lie apart, so only the first suffers
    logits = np.zeros((8, 8))
    logits[[0, 1, 4, 5], [1, 0, 5, 4]] = 3.0
    model = bigram(logits)
    first, second = np.tile([0, 1], 8), np.tile([4, 5], 8)
    forget, everything = diagonal_fisher(model, [first]), diagonal_fisher(model, [first, second])
    before = model.score([first, second]).log_probability.mean(1)
    with dampened(model, forget, everything, alpha=1.5, strength=0.1):
        after = model.score([first, second]).log_probability.mean(1)
    assert before[0] - after[0] > 1
    assert after[1] == before[1]


def test_dampening_refuses_what_does_not_fit():
    model = bigram(np.ones((2, 2)))
    fisher = made(model, [[1, 1], [1, 1]])
    for alpha, strength, said in (
        (-1.0, 1.0, "alpha is -1.0"),
        (math.nan, 1.0, "alpha is nan"),
        (1.0, -0.5, "strength is -0.5"),
    ):
        with (
            pytest.raises(InputError) as error,
            dampened(model, fisher, fisher, alpha=alpha, strength=strength),
        ):
            pass
        assert str(error.value) == f"dampened: {said}; needs a number of at least 0"
    for other, said in (
        ({"weights": "00"}, f"weights 00, forget with {model.weights_hash()}"),
        ({"example": "token"}, "example token, forget with sequence"),
        ({"labels": "gold"}, "labels gold, forget with sampled"),
    ):
        unlike = made(model, [[1, 1], [1, 1]], **other)
        with pytest.raises(InputError) as error, dampened(model, fisher, unlike, alpha=1.0):
            pass
        assert str(error.value) == f"dampened: everything was made with {said}; make both alike"
    larger, smaller = made(model, [[4, 1], [1, 1]]), model.weights_hash()
    with dampened(model, larger, fisher, alpha=1.0):
        inside = model.weights_hash()
        with pytest.raises(InputError) as error, dampened(model, fisher, fisher, alpha=1.0):
            pass
    assert str(error.value) == (
        f"dampened: the Fishers were made of weights {smaller}, the model holds {inside}; "
        "make them of these, or leave the edit they are in"
    )
