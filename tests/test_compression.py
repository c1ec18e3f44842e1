"""Shortest prompts: known where the model is a table, enumerated where it is small."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from tests.conftest import Bigram, Numbers, frame, neox
from workbench.models import LanguageModel
from workbench.probes import compression
from workbench.probes.compression import compression_ratio, probe_compression, token_slopes
from workbench.table import InputError, validate
from workbench.training import Trainer


class Embedded(Bigram):
    """A bigram table that can be asked with embeddings, which are one-hot."""

    def __init__(self, table):
        super().__init__(table)
        self.embedding = torch.nn.Embedding.from_pretrained(torch.eye(len(table)))

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids=None, inputs_embeds=None, **options):
        if inputs_embeds is None:
            return super().forward(input_ids, **options)
        return SimpleNamespace(logits=self.head(inputs_embeds))


def counter(breaks=(), vocabulary=32) -> LanguageModel:
    """Counts upwards, but says 0 after each number in ``breaks``."""
    logits = np.zeros((vocabulary, vocabulary))
    for token in range(vocabulary):
        logits[token, 0 if token in breaks else (token + 1) % vocabulary] = 5.0
    return LanguageModel(Embedded(logits), Numbers(), run="counter")


def wide(table):
    return table.pivot(index="item", columns="metric", values="value")


def quick(model, items, **options):
    return probe_compression(model, items, progress=False, **options)


def test_ratio_by_hand():
    # METRICS section 2: 12 and 5 give 2.4
    assert compression_ratio(12, 5) == 2.4
    assert compression_ratio(5, 5) == 1.0
    assert np.isnan(compression_ratio(12, 0))


def test_known_answers():
    # 9 10 11 12 is said after 8, whatever comes before it: one token, 4 / 1. After 6 the model says
    # 0, so that nothing makes it say 5 6 7 8.
    items = frame(["5 6 7 8 1", "9 10 11 12"], kind="count", dose=[3, 0])
    table = validate(quick(counter(breaks={6}), items, target=4, budget=40))
    got = wide(table)
    assert got.loc["i1"].to_dict() == {
        "compressible": 1.0, "compression_ratio": 4.0, "prompt_tokens": 1.0,
    }  # fmt: skip
    assert table.attrs["prompts"] == {"i1": "8"}
    assert got.loc["i0", "compressible"] == 0
    assert got.loc["i0", ["compression_ratio", "prompt_tokens"]].isna().all()
    ratio = table[table["metric"] == "compression_ratio"].set_index("item")
    assert ratio["reason"].tolist() == ["no prompt found in 40 steps", ""]
    assert ratio.loc["i1", ["lo", "hi"]].tolist() == [4.0, 4.0]  # shorter than 1 there is none
    assert set(table["target"]) == {4} and set(table["budget"]) == {40}
    assert table["dose"].tolist() == [3, 0] * 3


def test_replacements_go_where_the_loss_falls():
    # one choice at each place: at the last it is 8, which the logits' slope points to; the
    # others do not matter to a bigram model, so their slope is 0 and the lowest token is taken
    model = counter()
    settings = {"choices": 1, "candidates": 9}
    rng, allowed = np.random.default_rng(0), np.arange(32)
    goal, prompt = np.array([9, 10, 11]), np.array([20, 21])
    got = compression._replacements(model, goal, prompt, settings, allowed, rng)
    assert got.tolist() == [[0, 21], [20, 8]]
    # more than are wanted: so many are drawn, each of one token, none twice
    settings = {"choices": 20, "candidates": 9}
    got = compression._replacements(model, goal, prompt, settings, allowed, rng)
    assert 5 <= len(np.unique(got, axis=0)) == len(got) <= 9
    assert ((got != prompt).sum(axis=1) <= 1).all()


def test_a_prompt_counts_only_if_decoding_says_so(monkeypatch):
    monkeypatch.setattr(LanguageModel, "generate", lambda self, prompts, new: np.zeros((1, new)))
    got = wide(quick(counter(), frame(["9 10 11 12"]), target=4, budget=8)).iloc[0]
    assert got["compressible"] == 0.0 and np.isnan(got["compression_ratio"])


def test_a_budget_spent_leaves_a_bound():
    # the first step draws a prompt, the second finds that one token at its end does it
    table = quick(counter(), frame(["9 10 11 12 13 14"]), target=6, budget=2, candidates=999)
    ratio = table[table["metric"] == "compression_ratio"].iloc[0]
    assert (ratio["value"], ratio["lo"], ratio["hi"]) == (1.2, 1.2, np.inf)  # 6 / 5


def test_a_prompt_as_long_as_the_text_compresses_nothing():
    # the search begins at five tokens, or at the target's length, and ends before a shorter one
    table = quick(counter(), frame(["9 10 11"]), target=3, budget=2, candidates=999)
    got = wide(table).iloc[0]
    assert got["compression_ratio"] == 1.0 and got["compressible"] == 0.0


@pytest.fixture(scope="module")
def half_learned():
    """40 texts of 8 numbers, 20 of them learned, each after another, so that some can be elicited."""
    rng = np.random.default_rng(0)
    texts = rng.integers(1, 40, size=(40, 8))
    trainer = Trainer(neox(0, width=48, vocabulary=40), 1e-2, warmup=5)
    for _ in range(60):
        before = texts[rng.permutation(20)][:, -3:]  # what a text comes after changes
        trainer.step(np.concatenate([before, texts[:20]], axis=1))
    module = trainer.module.eval().requires_grad_(False)
    items = frame([" ".join(map(str, text)) for text in texts])
    return LanguageModel(module, Numbers(), run="half"), texts, items


@torch.inference_mode()
def says(model, prompt, goal) -> bool:
    """Greedy decoding, a token and a whole forward pass at a time."""
    ids = list(prompt)
    for token in goal:
        if int(model.module(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) != token:
            return False
        ids.append(int(token))
    return True


def test_prompts_of_one_token_against_all_of_them(half_learned, monkeypatch):
    model, texts, items = half_learned
    monkeypatch.setattr(compression, "FIRST", 1)
    # 40 choices at one place are the whole vocabulary: two steps have tried all
    options = {"target": 3, "budget": 3, "candidates": 40, "choices": 40}
    got = wide(quick(model, items, **options)).loc[items["item"], "prompt_tokens"]
    want = [any(says(model, [t], text[:3]) for t in range(40)) for text in texts]
    assert 2 <= sum(want) <= 38  # both occur, or the test would show nothing
    assert (got == 1).tolist() == want


def test_what_was_found_is_said(half_learned):
    model, texts, items = half_learned
    table = quick(model, items.iloc[[0, 1, 2, 30, 31, 32]], target=5, budget=40)
    got = wide(table)
    prompts = table.attrs["prompts"]
    assert len(prompts) >= 2
    for item, prompt in prompts.items():
        tokens = [int(word) for word in prompt.split()]
        assert says(model, tokens, texts[int(item[1:])][:5])
        assert got.loc[item, "prompt_tokens"] == len(tokens) <= 5
        assert got.loc[item, "compression_ratio"] == 5 / len(tokens)
    found = got["compressible"]
    assert found[["i0", "i1", "i2"]].sum() > found[["i30", "i31", "i32"]].sum()


def test_a_worse_prompt_is_not_taken(half_learned, tmp_path, monkeypatch):
    # one random replacement a step, most of them worse
    model, _, items = half_learned
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    losses = []
    for budget in range(2, 40, 4):
        quick(model, items.iloc[[30]], target=5, budget=budget, candidates=1, choices=40)
        (file,) = (tmp_path / "compression").glob("*.json")
        losses.append(json.loads(file.read_text())["loss"])
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_first_prompts_of_a_length():
    rng, allowed = np.random.default_rng(0), np.arange(5, 9)
    shorter = compression._beginnings([1, 2, 3], 2, allowed, rng)
    assert shorter.tolist() == [[2, 3], [1, 3], [1, 2]]  # any one token left out
    longer = compression._beginnings([1, 2], 4, allowed, rng)
    assert longer.shape == (1, 4) and longer[0, 2:].tolist() == [1, 2]
    assert set(longer[0, :2]) <= set(allowed)
    assert compression._beginnings(None, 3, allowed, rng).shape == (1, 3)


def test_seeds_search_apart(half_learned):
    model, _, items = half_learned
    first, second = (
        quick(model, items.head(3), target=5, budget=12, seed=seed).attrs["prompts"]
        for seed in (0, 1)
    )
    assert first != second


def test_a_search_ends_by_itself(half_learned, tmp_path, monkeypatch):
    # 9 steps a length, 5 tokens the first and the longest: with nothing found it ends after 9
    model, _, items = half_learned
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    quick(model, items.iloc[[0, 1, 2, 3, 30, 31]], target=5, budget=500, patience=9)
    ends = [json.loads(file.read_text()) for file in (tmp_path / "compression").glob("*.json")]
    assert all(end["done"] and end["step"] < 60 for end in ends)
    found = [end for end in ends if end["found"]]
    assert 0 < len(found) < len(ends)
    for end in found:
        # a length, each one shorter than the last, until one fails or none is shorter
        lengths = [len(prompt) for _, prompt in end["found"]]
        assert lengths == list(range(5, lengths[-1] - 1, -1))
        assert end["length"] == max(lengths[-1] - 1, 1)
    assert all(end["step"] == 9 for end in ends if not end["found"])


def test_no_length_is_beaten_by_trying_all(half_learned):
    # where one of the 40 + 1,600 prompts of one or two tokens does it, none is found shorter
    model, texts, items = half_learned
    got = wide(quick(model, items.head(3), target=4, budget=60, candidates=999))["prompt_tokens"]
    for item, length in got.items():
        goal = texts[int(item[1:])][:4]
        tried = itertools.chain(*(itertools.product(range(40), repeat=k) for k in (1, 2)))
        prompts = np.array([list(p) for p in tried if len(p) == 2])
        whole = np.concatenate([prompts, np.repeat(goal[None], len(prompts), axis=0)], axis=1)
        hit = (model.score(whole, start=2).guess == goal).all(axis=1).any()
        if not hit:
            assert not length <= 2


@pytest.mark.parametrize("bos", [None, 7])
def test_slopes_are_those_of_a_one_hot_prompt(half_learned, bos):
    model, texts, _ = half_learned
    model = LanguageModel(model.module, Numbers(), run="half", bos=bos)
    prompt, goal = np.array([3, 9]), texts[0][:4]
    layer = model.module.get_input_embeddings().weight
    one_hot = torch.nn.functional.one_hot(torch.tensor(prompt), 40).float().requires_grad_(True)
    front = layer[[bos]] if bos is not None else layer[:0]
    whole = torch.cat([front, one_hot @ layer, layer[torch.tensor(goal)]])
    log_p = model.module(inputs_embeds=whole[None]).logits[0].log_softmax(-1)
    first = len(front) + 2
    loss = -sum(log_p[first - 1 + i, token] for i, token in enumerate(goal)) / 4
    loss.backward()
    np.testing.assert_allclose(token_slopes(model, prompt, goal), one_hot.grad, atol=1e-6)


class Killed(Exception):
    pass


def test_a_killed_search_goes_on_where_it_was(half_learned, monkeypatch, tmp_path):
    model, _, items = half_learned
    items, options = items.head(4), {"target": 5, "budget": 25, "seed": 4}
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "whole"))
    whole = quick(model, items, **options)
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "killed"))
    monkeypatch.setattr(compression, "SAVED_EVERY", 0.0)
    asked, best = [], compression._best

    def mortal(*arguments):
        asked.append(1)
        if len(asked) == 33:
            raise Killed
        return best(*arguments)

    monkeypatch.setattr(compression, "_best", mortal)
    with pytest.raises(Killed):
        quick(model, items, **options)
    again = quick(model, items, **options)
    pd.testing.assert_frame_equal(again, whole)
    assert again.attrs["prompts"] == whole.attrs["prompts"]
    # one step was lost, none was made twice
    searched = len(asked) - 1
    asked.clear()
    quick(model, items, **options)
    assert asked == [] and 33 < searched <= 100


def test_a_budget_can_be_raised_and_lowered(half_learned, monkeypatch, tmp_path):
    model, _, items = half_learned
    items = items.head(4)
    tables = {}
    for name, budgets in (("up", (6, 25)), ("down", (25, 6)), ("one", (25,)), ("other", (6,))):
        monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / name))
        for budget in budgets:
            tables[name, budget] = quick(model, items, target=5, budget=budget)
    for one, two in ((("up", 6), ("down", 6)), (("up", 25), ("down", 25))):
        pd.testing.assert_frame_equal(tables[one], tables[two])
    pd.testing.assert_frame_equal(tables["up", 25], tables["one", 25])
    pd.testing.assert_frame_equal(tables["down", 6], tables["other", 6])
    found = [tables["up", b]["value"].notna().sum() for b in (6, 25)]
    assert found[0] < found[1]


def test_a_damaged_search_is_begun_again(half_learned, monkeypatch, tmp_path):
    model, _, items = half_learned
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    whole = quick(model, items.head(1), target=5, budget=6)
    (place,) = (tmp_path / "compression").glob("*.json")
    place.write_text(place.read_text()[:20])
    with pytest.warns(UserWarning, match=r"\.json is not what was written .*; searching again$"):
        again = quick(model, items.head(1), target=5, budget=6)
    pd.testing.assert_frame_equal(whole, again)


def test_prompts_hold_no_special_tokens(model_folder):
    from workbench.models import load_model

    model = load_model(str(model_folder))
    allowed = compression._allowed(model)
    special = set(model.tokenizer.all_special_ids)
    assert special and not special & set(allowed.tolist())
    assert len(allowed) == min(len(model.tokenizer), model.vocabulary) - len(special)
    # and the search runs on a real tokenizer and module
    texts = frame(["In the beginning was the word, and the word was with the reader."])
    got = wide(quick(model, texts, target=6, budget=3)).iloc[0]
    assert got["compressible"] in (0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1}, "probe_compression: target is 1, but must be at least 2"),
        ({"target": 2, "budget": 0}, "probe_compression: budget is 0, but must be at least 1"),
        ({"target": 2, "patience": 0}, "probe_compression: patience is 0, but must be at least 1"),
        ({"target": 2, "choices": 0}, "probe_compression: choices is 0, but must be at least 1"),
        (
            {"target": 2, "candidates": 0},
            "probe_compression: candidates is 0, but must be at least 1",
        ),
        (
            {"target": 33},
            "probe_compression: 33 target tokens and a prompt as long exceed the model's context "
            "of 64; ask for 32 at most",
        ),
        (
            {"target": 5},
            "probe_compression: none of 1 texts has the 5 tokens asked for (the longest has 3); "
            "ask for fewer, or give longer texts",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(InputError) as told:
        quick(counter(), frame(["1 2 3"]), **options)
    assert str(told.value) == message
