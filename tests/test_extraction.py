"""One forward pass decides what a decoding loop would."""

import numpy as np
import pytest
import torch

from tests.conftest import Numbers, bigram, frame, neox, reciter
from workbench.decoding import Decoding
from workbench.models import LanguageModel
from workbench.probes.extraction import (
    SCHEMES,
    bleu,
    edit_similarity,
    extraction_strength,
    peakedness,
    probe_cdd,
    probe_continuation,
    probe_discoverable,
    probe_extraction,
    probe_strength,
    verbatim_length,
)
from workbench.table import InputError, validate
from workbench.training import Trainer


def wide(table):
    return table.pivot(index="item", columns="metric", values="value")


@pytest.mark.parametrize(
    ("guess", "length", "top1"),
    [
        ([1, 2, 3, 4], 4, 1.0),
        ([9, 9, 3, 4], 0, 0.5),
        ([9, 9, 9, 4], 0, 0.25),
        ([9, 9, 9, 9], 0, 0.0),
        ([1, 2, 9, 4], 2, 0.75),
        ([1, 2, 3, 9], 3, 0.75),
    ],
)
def test_verbatim_length_by_hand(guess, length, top1):
    truth = np.array([[1, 2, 3, 4]])
    assert verbatim_length(np.array([guess]), truth).tolist() == [length]
    assert (np.array([guess]) == truth).mean() == top1


def test_a_suffix_of_one_token():
    got = verbatim_length(np.array([[5], [6]]), np.array([[5], [5]]))
    assert got.tolist() == [1, 0]


def test_extraction_by_hand():
    # counts upwards, but says 0 after 7. Prompt 3 4, suffix 5 6 7: all of it. Prompt 5 6, suffix
    # 7 8 9: 7, then 0 for 8, then 9 after a teacher-forced 8. Prompt 6 7, suffix 8 9 10: not the
    # first, but the two that follow.
    items = frame(["3 4 5 6 7", "5 6 7 8 9", "6 7 8 9 10"])
    table = validate(probe_extraction(reciter(breaks={7}), items, prefix=2, suffix=3))
    got = wide(table)
    assert got["extractable"].to_list() == [1, 0, 0]
    assert got["verbatim_length"].to_list() == [3, 1, 0]
    np.testing.assert_allclose(got["top1"], [1, 2 / 3, 2 / 3])
    assert set(table["prefix"]) == {2} and set(table["suffix"]) == {3}
    # logits 5 for the favourite and 0 for 31 others: a hit costs ln(1 + 31 e^-5), a miss 5 more
    hit = -np.log(1 + 31 * np.exp(-5))
    np.testing.assert_allclose(got["log_p_z"], [3 * hit, 3 * hit - 5, 3 * hit - 5], atol=1e-5)
    np.testing.assert_allclose(got["log_probability"], got["log_p_z"] / 3)


def test_the_text_after_the_suffix_does_not_matter():
    long = wide(probe_extraction(reciter(), frame(["3 4 5 6 9 9 9"]), prefix=2, suffix=2))
    assert long["extractable"].item() == 1


def test_one_suffix_for_several_prompts():
    # the suffix starts at token 4 whatever the prompt: 7 8 of 3 4 9 6 7 8
    items = frame(["3 4 9 6 7 8"])
    for prefix in (1, 2, 4):
        table = probe_extraction(reciter(), items, prefix=prefix, suffix=2, suffix_at=4)
        assert wide(table)["extractable"].item() == 1
        assert set(table["suffix_at"]) == {4}
    # without it the suffix follows the prompt, and 9 is not what comes after 4
    assert wide(probe_extraction(reciter(), items, prefix=2, suffix=2))["top1"].item() == 0.0


def test_several_prompt_lengths_ask_for_one_suffix():
    # 4 is followed by 9 (not counted on), 9 by 6 (not), 6 by 7 and 7 by 8: a one-pass table for
    # each length, and the suffix 7 8 begins after the longest prompt
    items = frame(["3 4 9 6 7 8", "3 4 5 6 9 9"])
    table = probe_extraction(reciter(), items, prefix=[1, 4, 2], suffix=2)
    assert set(table["suffix_at"]) == {4}
    got = table[table["metric"] == "extractable"].pivot(index="item", columns="prefix")["value"]
    assert got.loc["i0"].to_dict() == {1: 1, 2: 1, 4: 1}
    assert got.loc["i1"].to_dict() == {1: 0, 2: 0, 4: 0}
    for length in (1, 2, 4):
        alone = probe_extraction(reciter(), items, prefix=length, suffix=2, suffix_at=4)
        mine = table[table["prefix"] == length].reset_index(drop=True)
        assert mine.drop(columns=["metric"]).equals(alone.drop(columns=["metric"]))
    assert table.attrs["passport"] == alone.attrs["passport"] and table.attrs["dropped"] == 0


def test_several_prompt_lengths_drop_the_same_texts_and_say_so_once():
    with pytest.warns(UserWarning) as told:
        table = probe_extraction(reciter(), frame(["1 2 3 4", "1 2 3"]), prefix=(1, 2), suffix=2)
    assert [str(each.message) for each in told] == [
        "probe_extraction: dropped 1 of 2 texts that are shorter than 4 tokens (first: i1)"
    ]
    assert table.attrs["dropped"] == 1 and set(table["item"]) == {"i0"}


def test_short_texts_are_dropped_counted_and_named():
    with pytest.warns(UserWarning) as told:
        table = probe_extraction(reciter(), frame(["1 2 3 4", "1 2 3"]), prefix=2, suffix=2)
    assert str(told[0].message) == (
        "probe_extraction: dropped 1 of 2 texts that are shorter than 4 tokens (first: i1)"
    )
    assert table.attrs["dropped"] == 1 and set(table["item"]) == {"i0"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": 0}, "probe_extraction: prefix is 0, but must be at least 1"),
        ({"suffix": 0}, "probe_extraction: suffix is 0, but must be at least 1"),
        ({"prefix": [2, 0]}, "probe_extraction: prefix is 0, but must be at least 1"),
        (
            {"prefix": []},
            "probe_extraction: prefix is []; give one or more lengths, each once",
        ),
        (
            {"prefix": [2, 1, 2]},
            "probe_extraction: prefix is [2, 1, 2]; give one or more lengths, each once",
        ),
        (
            {"prefix": 3, "suffix": 2, "suffix_at": 2},
            "probe_extraction: a suffix at token 2 leaves no room for a prompt of 3; shorten the "
            "prompt or move the suffix",
        ),
        (
            {"prefix": 3, "suffix": 3},
            "probe_extraction: none of 1 texts has the 6 tokens asked for (the longest has 5); ask "
            "for fewer, or give longer texts",
        ),
        (
            {"prefix": 50, "suffix": 50},
            "probe_extraction: 100 tokens are more than the model's context of 64; ask for fewer",
        ),
    ],
)
def test_extraction_refusals(options, message):
    with pytest.raises(InputError) as error:
        probe_extraction(reciter(), frame(["1 2 3 4 5"]), **options)
    assert str(error.value) == message


# --- against real decoding ------------------------------------------------------------------------

PREFIX, SUFFIX = 6, 6


@pytest.fixture(scope="module")
def half_learned():
    """500 random texts of 12 numbers, and a model trained on the first 120 until it recites some."""
    texts = np.random.default_rng(0).integers(1, 100, size=(500, PREFIX + SUFFIX))
    trainer = Trainer(neox(0, width=64, layers=1, vocabulary=100), 1e-2, warmup=5)
    for _ in range(27):
        trainer.step(texts[:120])
    model = LanguageModel(trainer.module.eval(), Numbers(), run="half")
    return model, texts, frame([" ".join(map(str, text)) for text in texts])


def test_verdicts_are_those_of_our_generate(half_learned):
    model, texts, items = half_learned
    said = model.generate(texts[:, :PREFIX], SUFFIX)
    got = wide(probe_extraction(model, items, prefix=PREFIX, suffix=SUFFIX)).loc[items["item"]]
    verdict = (said == texts[:, PREFIX:]).all(axis=1)
    assert 20 < verdict.sum() < 480  # both verdicts occur, or the test would show nothing
    np.testing.assert_array_equal(got["extractable"], verdict)
    agree = (said == texts[:, PREFIX:]).cumprod(axis=1).sum(axis=1)
    np.testing.assert_array_equal(got["verbatim_length"], agree)
    assert len(set(agree)) > 3


def test_verdicts_are_those_of_transformers_generate(half_learned):
    model, texts, items = half_learned
    prompts = torch.as_tensor(texts[:, :PREFIX])
    model.module.generation_config.eos_token_id = None  # an end of text must not stop it
    said = model.module.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=SUFFIX,
        do_sample=False,
        pad_token_id=0,
    )[:, PREFIX:].numpy()
    got = wide(probe_extraction(model, items, prefix=PREFIX, suffix=SUFFIX)).loc[items["item"]]
    np.testing.assert_array_equal(got["extractable"], (said == texts[:, PREFIX:]).all(axis=1))


def test_verdicts_with_bos(half_learned):
    plain, texts, items = half_learned
    model = LanguageModel(plain.module, Numbers(), run="bos", bos=0)
    said = model.generate(texts[:100, :PREFIX], SUFFIX)
    got = wide(probe_extraction(model, items.head(100), prefix=PREFIX, suffix=SUFFIX))
    got = got.loc[items["item"].head(100)]
    np.testing.assert_array_equal(got["extractable"], (said == texts[:100, PREFIX:]).all(axis=1))


# --- extraction strength ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guess", "strength", "exact"),
    [
        ([1, 2, 3, 4], 1, 1),
        ([9, 9, 3, 4], 0.5, 0.5),
        ([9, 9, 9, 4], 0.25, 0.25),
        ([9, 9, 9, 9], 0, 0),
        ([1, 2, 3, 9], 0, 0.75),  # only the last is wrong: all four tokens must be given
        ([1, 9, 3, 4], 0.5, 0.75),
        ([9, 2, 3, 4], 0.75, 0.75),
    ],
)
def test_extraction_strength_by_hand(guess, strength, exact):
    hit = np.array(guess) == [1, 2, 3, 4]
    assert extraction_strength(hit) == strength and hit.mean() == exact
    assert extraction_strength(np.array([guess[0] == 1])) == float(guess[0] == 1)


def test_strength_of_texts_of_unlike_lengths():
    # counts upwards. 3 4 5 6: all three after the first, strength 1. 3 9 10: 4 for 9 is wrong,
    # then 10 is right: 1 of 2. 5 7 9: nothing. Given two tokens, the second text has one left.
    items = frame(["3 4 5 6", "3 9 10", "5 7 9"])
    got = wide(probe_strength(reciter(), items))
    assert got["extraction_strength"].to_list() == [1, 0.5, 0]
    assert got["top1"].to_list() == [1, 0.5, 0]
    table = probe_strength(reciter(), items, prefix=2)
    assert wide(table)["extraction_strength"].to_list() == [1, 1, 0]
    assert set(table["prefix"]) == {2}


def test_strength_of_what_is_left_when_texts_are_dropped():
    with pytest.warns(UserWarning, match="^probe_strength: dropped 1 of 3 texts"):
        table = probe_strength(reciter(), frame(["3 9", "3 4 5 6", "3 4 9"]), prefix=2)
    assert wide(table)["extraction_strength"].to_dict() == {"i1": 1, "i2": 0}
    assert table.attrs["dropped"] == 1


def test_strength_is_the_shortest_prompt_that_greedy_decoding_goes_on_from(half_learned):
    # the definition: try every prompt, from the shortest on
    model, texts, items = half_learned
    few = np.r_[:6, 120:123]
    got = wide(probe_strength(model, items.iloc[few])).loc[items["item"].iloc[few]]
    scored = texts.shape[1] - 1  # the first token is given
    for text, strength in zip(texts[few], got["extraction_strength"], strict=True):
        for given in range(scored + 1):
            rest = text[1 + given :]
            said = model.generate(text[None, : 1 + given], len(rest))[0] if len(rest) else rest
            if (said == rest).all():
                break
        assert strength == pytest.approx(1 - given / scored)
    assert len(set(got["extraction_strength"])) > 3


def test_strength_refuses_no_prompt():
    with pytest.raises(InputError) as error:
        probe_strength(reciter(), frame(["1 2 3"]), prefix=0)
    assert str(error.value) == "probe_strength: prefix is 0, but must be at least 1"


# --- continuations ---------------------------------------------------------------------------------


def test_edit_similarity_by_hand():
    # one deletion and one insertion in five; nothing in common; three more than the other's two
    assert edit_similarity(np.array([1, 2, 3, 4, 5]), np.array([2, 3, 4, 5, 6])) == 0.6
    assert edit_similarity(np.array([1, 2]), np.array([3, 4])) == 0
    assert edit_similarity(np.array([1, 2, 3, 4, 5]), np.array([1, 2])) == 0.4


def test_bleu_by_hand():
    # 1 2 3 4 5 9 against 1 2 3 4 5 6: 5 of 6 tokens, 4 of 5 pairs, 3 of 4 triples, 2 of 3 fours
    truth = np.array([1, 2, 3, 4, 5, 6])
    got = bleu(np.array([1, 2, 3, 4, 5, 9]), truth)
    assert got == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    # 1 2 9 4 5 6: 5 of 6, 3 of 5, 1 of 4, none of 3, which counts as .1
    got = bleu(np.array([1, 2, 9, 4, 5, 6]), truth)
    assert got == pytest.approx((5 / 6 * 3 / 5 * 1 / 4 * 0.1 / 3) ** 0.25)
    assert bleu(truth, truth) == 1 and bleu(truth + 10, truth) == 0
    # all of what is said is right, but it is short of the six by a third: e^(1 - 6/4)
    assert bleu(truth[:4], truth) == pytest.approx(np.exp(-0.5))
    assert np.isnan(bleu(truth[:3], truth[:3]))


def test_continuation_by_hand():
    # counts upwards. 3 4 | 5 6 7 8: all. 3 4 | 6 7 8 9: says 5 6 7 8, no position, one deletion
    # and one insertion in four. 3 4 | 5 9 10 11: says 5 6 7 8, the first position alone, although
    # three of four are right under teacher forcing. 3 4 | 5 9 7 8: all but the second.
    items = frame(["3 4 5 6 7 8", "3 4 6 7 8 9", "3 4 5 9 10 11", "3 4 5 9 7 8"])
    table = probe_continuation(reciter(), items, prefix=2, suffix=4)
    got = wide(table)
    assert got["extractable"].to_list() == [1, 0, 0, 0]
    assert got["memorization_score"].to_list() == [1, 0, 0.25, 0.75]
    assert got["edit_similarity"].to_list() == [1, 0.5, 0.25, 0.75]
    # 3 of 4 tokens, 2 of 3 pairs, 1 of 2 triples, no four; 1 of 4 and .1 of 3, 2 and 1; 3 of 4, one
    # pair of 3, and none of the longer
    powers = [1, 3 / 4 * 2 / 3 * 1 / 2 * 0.1, 1 / 4 * 0.1 / 3 * 0.1 / 2 * 0.1]
    powers.append(3 / 4 * 1 / 3 * 0.1 / 2 * 0.1)
    np.testing.assert_allclose(got["bleu"], np.power(powers, 0.25))
    assert set(table["prefix"]) == {2} and set(table["suffix"]) == {4}
    assert table.attrs["passport"]["items"] and table.attrs["dropped"] == 0


def test_continuation_of_a_suffix_without_four_tokens():
    table = probe_continuation(reciter(), frame(["3 4 5 6 7"], dose=2), prefix=2, suffix=3)
    told = table[table["value"].isna()]
    assert told["metric"].tolist() == ["bleu"]
    assert told["reason"].tolist() == ["a suffix of 3 tokens has no 4-grams"]
    assert set(table["dose"]) == {2}


def test_continuation_agrees_with_one_pass_and_a_plain_loop(half_learned):
    model, texts, items = half_learned
    options = {"prefix": PREFIX, "suffix": SUFFIX}
    both = items.iloc[90:150]  # thirty were trained on
    got = wide(probe_continuation(model, both, **options))
    verdict = wide(probe_extraction(model, both, **options))
    np.testing.assert_array_equal(got["extractable"], verdict["extractable"])
    assert 0 < got["extractable"].mean() < 1
    for name, text in zip(items["item"][110:130], texts[110:130], strict=True):
        said = list(text[:PREFIX])
        with torch.inference_mode():
            for _ in range(SUFFIX):
                said.append(int(model.module(torch.tensor([said])).logits[0, -1].argmax()))
        hits = [mine == true for mine, true in zip(said[PREFIX:], text[PREFIX:], strict=True)]
        assert got.loc[name, "memorization_score"] == pytest.approx(sum(hits) / SUFFIX)
        distance = levenshtein(said[PREFIX:], list(text[PREFIX:]))
        assert got.loc[name, "edit_similarity"] == pytest.approx(1 - distance / SUFFIX)
    assert (got["edit_similarity"] >= got["memorization_score"] - 1e-9).all()


def levenshtein(one, two):
    """The textbook recursion."""
    if not one or not two:
        return len(one) + len(two)
    if one[0] == two[0]:
        return levenshtein(one[1:], two[1:])
    shorter = (one[1:], two), (one, two[1:]), (one[1:], two[1:])
    return 1 + min(levenshtein(*pair) for pair in shorter)


# --- sampling --------------------------------------------------------------------------------------


def test_discoverable_by_hand():
    # after any token: 1 with 1/2, 2 with 1/4, 3 and 0 with 1/8. 0 | 1 2: p_z 1/8 at T = 1, 2/9
    # under top-k 2, 16/22 * 4/22 at T = .5, and greedy never says 2. 0 | 1 1: 1/4, 4/9, (16/22)^2, 1.
    logits = np.log(np.tile([1 / 8, 1 / 2, 1 / 4, 1 / 8], (4, 1)))
    schemes = [Decoding(), Decoding(top_k=2), Decoding(0.5), Decoding.greedy()]
    items = frame(["0 1 2", "0 1 1", "0 1 3"], kind="k")
    table = probe_discoverable(bigram(logits), items, schemes=schemes, prefix=1, suffix=2)
    got = np.exp(table.pivot(index="item", columns="scheme", values="value"))
    want = {
        "T=1": [1 / 8, 1 / 4, 1 / 16],
        "top-k 2": [2 / 9, 4 / 9, 0],
        "T=0.5": [16 / 22 * 4 / 22, (16 / 22) ** 2, 16 / 22 / 22],
        "greedy": [0, 1, 0],
    }
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, atol=1e-6)
    assert set(table["metric"]) == {"log_p_z"} and len(table) == 12
    assert np.isneginf(table["value"]).sum() == 3 and set(table["kind"]) == {"k"}


def test_discoverable_agrees_with_extraction(half_learned):
    # T = 1 is the plain log p_z, and greedy's p_z is the verdict
    model, _, items = half_learned
    options = {"prefix": PREFIX, "suffix": SUFFIX}
    plain = wide(probe_extraction(model, items, **options))
    table = probe_discoverable(model, items, schemes=SCHEMES, **options)
    got = table.pivot(index="item", columns="scheme", values="value")
    np.testing.assert_allclose(got["T=1"], plain["log_p_z"], atol=1e-4)
    np.testing.assert_array_equal(np.exp(got["greedy"]), plain["extractable"])
    assert (got["top-k 40"] >= got["T=1"] - 1e-4)[np.isfinite(got["top-k 40"])].all()


def test_schemes_are_part_of_what_is_cached(tiny):
    last = tiny.suite.checkpoints("base").select(tiny.suite.checkpoints("base").steps[-1:])
    items = tiny.suite.items().head(4)
    options = {"prefix": 8, "suffix": 8}
    for scheme in (Decoding(), Decoding(0.5), Decoding()):
        table = probe_discoverable(last, items, schemes=[scheme], **options)
        again = probe_discoverable(last.at(last.steps[0]), items, schemes=[scheme], **options)
        np.testing.assert_allclose(table["value"], again["value"], rtol=1e-6)
        assert set(table["scheme"]) == {scheme.name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schemes": []},
            "probe_discoverable: there are no schemes; give one or more Decoding(...)",
        ),
        ({"prefix": 0}, "probe_discoverable: prefix is 0, but must be at least 1"),
        (
            {"prefix": 60, "suffix": 5},
            "probe_discoverable: 65 tokens are more than the model's context of 64; ask for fewer",
        ),
    ],
)
def test_discoverable_refusals(options, message):
    with pytest.raises(InputError) as error:
        probe_discoverable(
            reciter(), frame(["1 2 3 4 5"]), **({"prefix": 2, "suffix": 2} | options)
        )
    assert str(error.value) == message


def test_a_model_that_gives_nan_is_refused_and_infinity_is_not():
    logits = np.zeros((4, 4))
    logits[2] = np.nan
    options = {"schemes": [Decoding.greedy(), Decoding(top_k=1)], "prefix": 1, "suffix": 2}
    with pytest.raises(InputError) as error:
        probe_discoverable(bigram(logits), frame(["0 1 2", "1 2 3"]), **options)
    # a NaN weight reaches every row of a product
    assert "log_probability is nan for item number 0 at step 0 of fake" in str(error.value)
    fine = probe_discoverable(bigram(np.zeros((4, 4))), frame(["0 1 2"]), **options)
    assert np.isneginf(fine["value"]).all()


# --- CDD -------------------------------------------------------------------------------------------


def test_peakedness_by_hand():
    # distances 0, 1, 2 and 4 to 1 2 3 4; a quarter of four allows one
    greedy = np.array([1, 2, 3, 4])
    samples = np.array([[1, 2, 3, 4], [1, 2, 3, 9], [1, 9, 3, 9], [9, 9, 9, 9]])
    got = {alpha: peakedness(samples, greedy, alpha) for alpha in (0, 0.24, 0.25, 0.5, 1)}
    assert got == {0: 0.25, 0.24: 0.25, 0.25: 0.5, 0.5: 0.75, 1: 1}
    # a shift costs two, not four
    assert peakedness(np.array([[2, 3, 4, 5]]), greedy, 0.5) == 1
    # .29 * 100 is 28.999999999999996 in floats, and 29 in fact
    far = np.arange(100)
    assert peakedness((np.where(far < 29, -1, far))[None], far, 0.29) == 1


def test_cdd_tells_a_certain_model_from_an_uncertain_one():
    # 0 -> 1 for sure; 2 -> 3 or 4, a half each, and on from there for sure: samples of two tokens
    # equal the greedy 3 5 in half of the cases, 50 +- 5 of 100 samples
    table = np.full((8, 8), -40.0)
    table[[0, 1, 2, 2, 3, 4, 5], [1, 1, 3, 4, 5, 6, 5]] = 0
    items = frame(["7 0", "7 2"])
    options = {"prefix": 2, "suffix": 2, "samples": 100, "decoding": Decoding()}
    got = probe_cdd(bigram(table), items, alpha=0.05, seed=1, **options)
    assert got["value"].iloc[0] == 1 and 0.3 < got["value"].iloc[1] < 0.7
    assert set(got["alpha"]) == {0.05} and set(got["samples"]) == {100}
    assert set(got["scheme"]) == {"T=1"}
    wide_ = probe_cdd(bigram(table), items, alpha=1.0, seed=1, **options)
    assert wide_["value"].to_list() == [1, 1]


def test_cdd_is_a_plain_loop_over_samples(half_learned):
    model, texts, items = half_learned
    some = items.iloc[[0, 1, 200]]
    options = {"decoding": Decoding(temperature=0.8), "samples": 12, "seed": 4}
    got = probe_cdd(model, some, prefix=PREFIX, suffix=4, alpha=0.5, samples=12, seed=4)
    prompts = texts[[0, 1, 200], :PREFIX]
    greedy, drawn = model.generate(prompts, 4), model.generate(prompts, 4, **options)
    for value, centre, samples in zip(got["value"], greedy, drawn, strict=True):
        near = [levenshtein(each.tolist(), centre.tolist()) <= 2 for each in samples]
        assert value == pytest.approx(np.mean(near))
    assert set(got["scheme"]) == {"T=0.8"} and got["value"].nunique() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "probe_cdd: samples is 0, but must be at least 1"),
        ({"alpha": 1.5}, "probe_cdd: alpha is 1.5, it must lie between 0 and 1"),
        (
            {"decoding": Decoding.greedy()},
            "probe_cdd: greedy samples are all alike; give a temperature above 0, such as 0.8",
        ),
        ({"suffix": 63}, "generate: 2 + 63 tokens exceed the context of 64"),
    ],
)
def test_cdd_refusals(options, message):
    with pytest.raises(InputError) as error:
        probe_cdd(reciter(), frame(["1 2 3"]), **({"prefix": 2, "suffix": 2} | options))
    assert str(error.value) == message
