"""Membership scores, each by hand and by its definition."""

import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ENGLISH, bigram, byte_level_tokenizer, frame, neox, reciter
from workbench.models import LanguageModel
from workbench.probes.membership import (
    gradient_norms,
    min_k,
    probe_membership,
    standardised,
    zlib_bytes,
)
from workbench.table import InputError, validate


def values(table):
    return {m: part.set_index("item")["value"].to_dict() for m, part in table.groupby("metric", observed=True)}  # fmt: skip


@pytest.mark.parametrize(("k", "want"), [(0.2, -5.0), (0.4, -4.5), (0.6, -4.0), (1.0, -3.0), (0.01, -5.0)])  # fmt: skip
def test_min_k_by_hand(k, want):
    # log p of -1..-5: the lowest is -5; the lowest two average -4.5; all of them -3, the loss
    # score; and never fewer than one token
    score = np.array([[-2.0, -5.0, -1.0, -4.0, -3.0]])
    assert min_k(score, np.array([5]), k) == pytest.approx([want])


def test_min_k_counts_as_decimals_do():
    # .29 * 100 is 28.999999999999996 in floating point, but means 29 tokens
    score = -np.arange(100.0)[None]
    assert min_k(score, np.array([100]), 0.29) == pytest.approx([-np.arange(71, 100).mean()])


def test_min_k_looks_at_no_padding():
    score = np.array([[-1.0, -2.0, np.nan, np.nan], [-1.0, -2.0, -3.0, -4.0]])
    got = min_k(score, np.array([2, 4]), 1.0)
    assert got == pytest.approx([-1.5, -2.5])


@given(
    st.lists(st.lists(st.floats(-30, 0), min_size=1, max_size=12), min_size=1, max_size=5),
    st.floats(0.01, 1),
)
def test_min_k_is_its_definition(lists, k):
    length = np.array([len(each) for each in lists])
    score = np.full((len(lists), length.max()), np.nan)
    for row, each in enumerate(lists):
        score[row, : len(each)] = each
    want = [np.mean(sorted(e)[: max(1, int(np.floor(k * len(e) + 1e-9)))]) for e in lists]
    np.testing.assert_allclose(min_k(score, length, k), want, atol=1e-9)


def test_standardised_by_hand():
    # vocabulary of two, p = (.9, .1): ln .9 - mu = .1 ln 9, ln .1 - mu = -.9 ln 9 and
    # sigma = sqrt(.9 * .1) ln 9 = .3 ln 9, so z = 1/3 and -3
    log_p = np.log([[0.9, 0.1]])
    mu = np.full((1, 2), 0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    sigma = np.full((1, 2), 0.3 * np.log(9))
    np.testing.assert_allclose(standardised(log_p, mu, sigma), [[1 / 3, -3]], atol=1e-12)


def test_a_uniform_model_has_z_of_zero():
    log_p = np.log(np.full((1, 3), 0.25))
    np.testing.assert_array_equal(standardised(log_p, log_p, np.zeros((1, 3))), np.zeros((1, 3)))


def test_zlib_by_hand():
    assert zlib_bytes("hello world") == 19
    assert zlib_bytes("é") == len(zlib.compress("é".encode(), 6))


def test_the_probe_by_hand():
    # "0 0 1" with p = (.9, .1): log p ln .9 and ln .1, z 1/3 and -3
    model = bigram(np.log([[0.9, 0.1], [0.9, 0.1]]))
    got = values(probe_membership(model, frame(["0 0 1"]), k=1.0))
    mean = (np.log(0.9) + np.log(0.1)) / 2
    assert got["member_loss"]["i0"] == pytest.approx(mean, abs=1e-6)
    assert got["member_mink"]["i0"] == pytest.approx(mean, abs=1e-6)
    assert got["member_minkpp"]["i0"] == pytest.approx((1 / 3 - 3) / 2, abs=1e-5)
    assert got["member_zlib"]["i0"] == pytest.approx(mean / zlib_bytes("0 0 1"), abs=1e-6)
    lowest = values(probe_membership(model, frame(["0 0 1"]), k=0.5))
    assert lowest["member_mink"]["i0"] == pytest.approx(np.log(0.1), abs=1e-6)
    assert lowest["member_minkpp"]["i0"] == pytest.approx(-3, abs=1e-5)


def test_a_uniform_model_knows_no_member():
    got = values(probe_membership(bigram(np.zeros((4, 4))), frame(["0 1 2", "3 3"])))
    assert got["member_minkpp"] == {"i0": 0.0, "i1": 0.0}
    assert got["member_loss"] == pytest.approx({"i0": -np.log(4), "i1": -np.log(4)}, abs=1e-6)


def test_what_is_known_scores_higher():
    got = values(probe_membership(reciter(), frame(["3 4 5 6", "3 9 1 6"])))
    for metric, value in got.items():
        assert value["i0"] > value["i1"], metric


def test_the_probe_is_the_plain_loop_and_items_keep_their_own_bytes(tokenizer):
    # texts of different lengths land in the batch in another order than they came
    module = neox(5)
    model = LanguageModel(module, tokenizer, run="m")
    texts = sorted(ENGLISH, key=len)
    table = validate(probe_membership(model, frame(texts), k=0.3))
    assert set(table["k"]) == {0.3}
    got = values(table)
    for number, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        with torch.inference_mode():
            rows = module(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        log_p, z = [], []
        for position in range(1, len(ids)):
            row = rows[position - 1]
            mu = (row.exp() * row).sum()
            sigma = ((row.exp() * (row - mu) ** 2).sum()) ** 0.5
            log_p.append(row[ids[position]].item())
            z.append(((row[ids[position]] - mu) / sigma).item())
        few = max(1, int(0.3 * len(log_p)))
        item = f"i{number}"
        assert got["member_loss"][item] == pytest.approx(np.mean(log_p), abs=1e-5)
        assert got["member_mink"][item] == pytest.approx(np.mean(sorted(log_p)[:few]), abs=1e-5)
        assert got["member_minkpp"][item] == pytest.approx(np.mean(sorted(z)[:few]), abs=1e-3)
        assert got["member_zlib"][item] == pytest.approx(
            np.mean(log_p) / len(zlib.compress(text.encode(), 6)), abs=1e-6
        )


def test_one_token_is_no_text():
    with pytest.warns(UserWarning, match="probe_membership: dropped 1 of 2 texts"):
        got = values(probe_membership(reciter(), frame(["5", "3 4"])))
    assert list(got["member_loss"]) == ["i1"]


@pytest.mark.parametrize("k", [0.0, -0.1, 1.01])
def test_membership_refusals(k):
    with pytest.raises(InputError) as error:
        probe_membership(reciter(), frame(["1 2"]), k=k)
    assert str(error.value) == f"probe_membership: k is {k}, but must be above 0 and at most 1"


def plain(model, ids, before=()):
    """Log-probabilities of all tokens but the first, one text at a time, after a prefix."""
    whole = [*([] if model.bos is None else [model.bos]), *before, *ids]
    with torch.inference_mode():
        logits = model.module(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    first = len(whole) - len(ids) + 1
    return [logits[at - 1, whole[at]].item() for at in range(first, len(whole))]


def test_the_dearer_scores_by_hand():
    # "0 0 1" with p = (.9, .1): mean log p (ln .9 + ln .1) / 2. A reference that guesses gives
    # ln .5. One neighbour "0 1 1" has ln .1, the other, "0 0 0", ln .9: their mean is the item's
    # own, so 0. A bigram forgets a prefix at once, so its ratio is 1.
    model = bigram(np.log([[0.9, 0.1], [0.9, 0.1]]))
    near = pd.DataFrame({"item": ["i0", "i0", "i1"], "text": ["0 1 1", "0 0 0", "0 1"]})
    table = validate(
        probe_membership(
            model,
            frame(["0 0 1", "0 0 0 0", "1 1"]),
            reference=bigram(np.zeros((2, 2))),
            non_members=["1 1 1", "0"],
            neighbours=near,
            gradient=True,
        )
    )
    got = values(table)
    mean = (np.log(0.9) + np.log(0.1)) / 2
    assert got["member_reference"]["i0"] == pytest.approx(mean - np.log(0.5), abs=1e-6)
    assert got["member_reference"]["i1"] == pytest.approx(np.log(0.9 / 0.5), abs=1e-6)
    assert got["member_recall"] == pytest.approx({"i0": 1.0, "i1": 1.0, "i2": 1.0}, abs=1e-6)
    assert got["member_neighbourhood"]["i0"] == pytest.approx(0, abs=1e-6)
    assert got["member_neighbourhood"]["i1"] == pytest.approx(np.log(9), abs=1e-6)
    assert np.isnan(got["member_neighbourhood"]["i2"])
    told = table[table["reason"] != ""]
    assert list(zip(told["item"], told["metric"], told["reason"], strict=True)) == [
        ("i2", "member_neighbourhood", "no neighbours")
    ]
    assert set(table["k"]) == {0.2}


def test_gradients_by_hand():
    # Uniform over two tokens: the gradient of -log p(b | a) by column a of the weights is
    # (.5, -.5) towards b. "0 1": sqrt(1/2). "0 1 0 1" averages columns 0, 1, 0 with weights 2/3
    # and 1/3: sqrt(1/2) sqrt(4/9 + 1/9) = .5270463. Where b comes half the time: 0.
    model = bigram(np.zeros((2, 2)))
    texts = model.encode(["0 1", "0 1 0 1", "0 1 1 0 0 1"])
    got = gradient_norms(model, texts[:2])
    np.testing.assert_allclose(got, [0.5**0.5, 0.5270463], atol=1e-6)
    even = gradient_norms(model, model.encode(["0 0 1 1 0"]))
    np.testing.assert_allclose(even, [0.0], atol=1e-7)
    table = values(probe_membership(model, frame(["0 1"]), gradient=True))
    assert table["member_gradient"]["i0"] == pytest.approx(-(0.5**0.5), abs=1e-6)


def test_gradients_leave_the_model_as_it_was(tokenizer):
    module = neox(3)
    module.requires_grad_(False)
    frozen, first = list(module.parameters()), next(iter(module.parameters()))
    first.requires_grad_(True)
    model = LanguageModel(module, tokenizer, run="m")
    before = model.weights_hash()
    gradient_norms(model, model.encode(ENGLISH[:1]))
    assert [p.requires_grad for p in frozen] == [True] + [False] * (len(frozen) - 1)
    assert all(p.grad is None for p in frozen)
    assert model.weights_hash() == before


@pytest.mark.parametrize("bos", [False, True])
def test_the_dearer_scores_are_plain_loops(bos):
    # texts of different lengths, so that batches come in another order than the items
    tokenizer = byte_level_tokenizer(ENGLISH, bos=bos)
    begin = 1 if bos else None
    # weights so large that the prefix matters
    model, other = (
        LanguageModel(neox(seed, initializer_range=0.3), tokenizer, run=str(seed), bos=begin)
        for seed in (1, 2)
    )
    texts, prefix = sorted(ENGLISH[:4], key=len), ["So", "it is."]
    near = pd.DataFrame(
        {"item": ["i0", "i2", "i0"], "text": ["Call me back.", "So it is.", "Call us."]}
    )
    got = values(
        probe_membership(
            model, frame(texts), reference=other, non_members=prefix, neighbours=near, gradient=True
        )
    )
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    before = encode(prefix[0]) + encode(prefix[1])
    for number, text in enumerate(texts):
        item, ids = f"i{number}", encode(text)
        mean = np.mean(plain(model, ids))
        gap = mean - np.mean(plain(other, ids))
        assert got["member_reference"][item] == pytest.approx(gap, abs=1e-5)
        ratio = np.mean(plain(model, ids, before)) / mean
        assert got["member_recall"][item] == pytest.approx(ratio, abs=1e-5)
        around = [np.mean(plain(model, encode(t))) for t in near["text"][near["item"] == item]]
        if around:
            gap = mean - np.mean(around)
            assert got["member_neighbourhood"][item] == pytest.approx(gap, abs=1e-5)
        module = model.module.requires_grad_(True)
        module.zero_grad()
        whole = torch.tensor([([begin] if bos else []) + ids])
        logits = module(input_ids=whole).logits[0, :-1][-(len(ids) - 1) :]
        torch.nn.functional.cross_entropy(logits, whole[0, -(len(ids) - 1) :]).backward()
        norm = sum(p.grad.double().square().sum().item() for p in module.parameters()) ** 0.5
        assert got["member_gradient"][item] == pytest.approx(-norm, rel=1e-4)


def test_tokenizers_that_differ_compare_totals():
    # the reference cuts the same texts into fewer tokens; both totals go over the model's count
    few, many = byte_level_tokenizer(ENGLISH, 300), byte_level_tokenizer(ENGLISH, 500)
    model = LanguageModel(neox(1), few, run="m")
    other = LanguageModel(neox(2, vocabulary=500), many, run="r")
    got = values(probe_membership(model, frame(ENGLISH[:3]), reference=other))
    for number, text in enumerate(ENGLISH[:3]):
        mine = plain(model, few(text)["input_ids"])
        theirs = plain(other, many(text)["input_ids"])
        assert len(mine) > len(theirs)
        want = (sum(mine) - sum(theirs)) / len(mine)
        assert got["member_reference"][f"i{number}"] == pytest.approx(want, abs=1e-5)


def test_contexts_that_differ(tokenizer):
    long, short = " ".join(ENGLISH[:2]), "Call me"
    model = LanguageModel(neox(1), tokenizer, run="m")
    small = LanguageModel(neox(2, max_position_embeddings=32), tokenizer, run="r")
    assert len(tokenizer(long)["input_ids"]) > 32
    table = probe_membership(model, frame([long, short]), reference=small)
    rows = table[table["metric"] == "member_reference"].set_index("item")
    assert rows.loc["i0", "reason"] == "longer than the reference's context"
    assert np.isnan(rows.loc["i0", "value"])
    want = np.mean(plain(model, tokenizer(short)["input_ids"]))
    want -= np.mean(plain(small, tokenizer(short)["input_ids"]))
    assert rows.loc["i1", "value"] == pytest.approx(want, abs=1e-5)
    # the other way round the text is cut at the model's own context, for both
    cut = tokenizer(long)["input_ids"][:32]
    got = values(probe_membership(small, frame([long]), reference=model))
    want = np.mean(plain(small, cut)) - np.mean(plain(model, cut))
    assert got["member_reference"]["i0"] == pytest.approx(want, abs=1e-5)


def test_a_reference_that_is_the_model_says_nothing(tokenizer):
    model = LanguageModel(neox(1), tokenizer, run="m")
    again = LanguageModel(neox(1), tokenizer, run="another name")
    assert model.weights_hash() == again.weights_hash()
    table = probe_membership(model, frame(ENGLISH), reference=again)
    rows = table[table["metric"] == "member_reference"]
    assert rows["value"].isna().all()
    assert set(rows["reason"]) == {
        "the reference scores every text as the model: it is the same one"
    }
    assert table.attrs["passport"]["reference"] == again.weights_hash()


def test_a_reference_may_agree_on_a_text():
    # the two differ only in what follows a 1
    model = bigram(np.log([[0.9, 0.1], [0.2, 0.8]]))
    other = bigram(np.log([[0.9, 0.1], [0.5, 0.5]]))
    got = values(probe_membership(model, frame(["0 0", "1 1"]), reference=other))
    want = {"i0": 0.0, "i1": np.log(0.8 / 0.5)}
    assert got["member_reference"] == pytest.approx(want, abs=1e-6)


def test_checkpoints_of_a_run_and_a_reference_among_them(tiny):
    base = tiny.suite.checkpoints("base")
    steps = base.steps[-3:]
    items = tiny.suite.items("base").groupby("kind").head(3)
    near = pd.DataFrame({"item": items["item"], "text": items["text"].str.replace("the", "a")})
    options = {"non_members": ["Known to none."], "neighbours": near, "gradient": True}
    # the reference shares its module with the checkpoints that are read after it
    table = probe_membership(base.select(steps), items, reference=base.at(steps[0]), **options)
    of = table[table["metric"] == "member_reference"]
    assert of.loc[of["step"] == steps[0], "value"].isna().all()
    apart = tiny.suite.checkpoints("base")
    for step in steps[1:]:
        alone = probe_membership(apart.at(step), items, reference=base.at(steps[0]), **options)
        both = table[table["step"] == step].merge(alone, on=["item", "metric"])
        assert len(both) == len(alone) == 8 * len(items)
        np.testing.assert_allclose(both["value_x"], both["value_y"], atol=2e-5, rtol=1e-5)
    again = probe_membership(base.select(steps), items, reference=base.at(steps[0]), **options)
    pd.testing.assert_frame_equal(table, again)  # from the cache, but for reference and gradients


def test_two_prefixes_are_two_questions(tiny):
    # as long as each other, so that only what they say tells them apart in the cache
    run, items = tiny.suite.checkpoints("base"), tiny.suite.items("base").head(4)
    last, texts = run.select(run.steps[-1:]), ["And it came", "to pass that he"]
    one, two = (
        values(probe_membership(last, items, non_members=order))["member_recall"]
        for order in (texts, texts[::-1])
    )
    assert all(one[item] != two[item] for item in one)


def test_prefixes_that_do_not_fit(tokenizer):
    model = LanguageModel(neox(1), tokenizer, run="m")
    prefix = tokenizer.decode(tokenizer(ENGLISH[1])["input_ids"][:40])
    room = model.context - len(tokenizer(prefix)["input_ids"])
    texts = ["Call me", ENGLISH[0]]
    assert len(tokenizer(texts[1])["input_ids"]) > room
    table = probe_membership(model, frame(texts), non_members=[prefix])
    rows = table[table["metric"] == "member_recall"].set_index("item")
    assert rows.loc["i0", "value"] > 0
    assert rows.loc["i1", "reason"] == "text and prefix exceed the context"
    alone = probe_membership(model, frame(texts[1:]), non_members=[prefix])
    assert alone.loc[alone["metric"] == "member_recall", "value"].isna().all()
    # a text that exactly fills the room is still scored
    full = tokenizer.decode(tokenizer(ENGLISH[3])["input_ids"][:room])
    assert len(tokenizer(full)["input_ids"]) == room
    assert (
        values(probe_membership(model, frame([full]), non_members=[prefix]))["member_recall"]["i0"]
        > 0
    )


def test_a_text_known_by_heart_has_no_ratio():
    # logits so far apart that log p is 0 in float32
    model = bigram(np.array([[0.0, 200.0], [200.0, 0.0]]))
    table = probe_membership(model, frame(["0 1 0", "0 0 1"]), non_members=["1 1"])
    rows = table[table["metric"] == "member_recall"].set_index("item")
    assert np.isnan(rows.loc["i0", "value"])
    assert rows.loc["i0", "reason"] == "log p without the prefix is 0, so there is no ratio"
    assert rows.loc["i1", "value"] == 1.0


def test_refusals_of_the_dearer_scores():
    model, items = reciter(), frame(["1 2 3", "4 5"])
    infinite = bigram(np.array([[0.0, -np.inf], [0.0, 0.0]]))
    for message, options in (
        (
            "probe_membership: item 'i1' is also a text of the prefix (non_members); take it out of "
            "the items, for it makes itself likely",
            {"non_members": ["7 8", "4 5"]},
        ),
        (
            "probe_membership: the prefix (non_members) has 63 tokens, which leaves room for 1 of "
            "the context's 64; give fewer or shorter texts",
            {"non_members": [" ".join(["7"] * 63)]},
        ),
        (
            "probe_membership: neighbours have no column 'text'; make_neighbours gives item and text",
            {"neighbours": pd.DataFrame({"item": ["i0"]})},
        ),
        (
            "probe_membership: no neighbour belongs to an item; their column item must hold the "
            "items' ids",
            {"neighbours": pd.DataFrame({"item": ["x"], "text": ["1 2"]})},
        ),
    ):
        with pytest.raises(InputError) as error:
            probe_membership(model, items, **options)
        assert str(error.value) == message
    with pytest.raises(InputError) as error:
        probe_membership(bigram(np.zeros((2, 2))), frame(["0 0", "0 1"]), reference=infinite)
    assert str(error.value) == (
        "probe_membership: the reference fake gives NaN or infinite log-probabilities (first: item "
        "'i1'); its weights or its dtype are damaged"
    )
    with pytest.raises(
        InputError, match="^probe_membership: log_probability is -inf for item number 0"
    ):
        probe_membership(infinite, frame(["0 1"]))
