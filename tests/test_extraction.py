"""One forward pass decides what a decoding loop would."""

import numpy as np
import pytest
import torch

from tests.conftest import Numbers, frame, neox, reciter
from workbench.models import LanguageModel
from workbench.probes.extraction import probe_extraction, verbatim_length
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
