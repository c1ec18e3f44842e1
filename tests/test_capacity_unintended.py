import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import ENGLISH, bigram, byte_level_tokenizer, frame, neox
from workbench.models import LanguageModel
from workbench.probes.unintended import SIGNED, probe_unintended
from workbench.table import InputError


def refuses(message):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


def values(table, metric=SIGNED):
    return table.loc[table["metric"] == metric].set_index("item")["value"].to_dict()


class Pieces:
    """A tokenizer that cuts a text every ``size`` characters; ids by the piece's first letter."""

    bos_token_id = None

    def __init__(self, size):
        self.size = size

    def __call__(self, texts, add_special_tokens=True, return_offsets_mapping=False):
        spans = [
            [(at, min(at + self.size, len(text))) for at in range(0, len(text), self.size)]
            for text in texts
        ]
        ids = [
            [ord(text[at]) % 4 for at, _ in each] for text, each in zip(texts, spans, strict=True)
        ]
        told = {"input_ids": ids}
        return told | ({"offset_mapping": spans} if return_offsets_mapping else {})


def uniform(vocabulary, tokenizer=None, **options):
    """``log2(vocabulary)`` bits for each token."""
    model = bigram(np.zeros((vocabulary, vocabulary)), **options)
    model.tokenizer = tokenizer or model.tokenizer
    return model


def test_bits_by_hand_and_their_sign():
    # all but the first token, at 2 and at 3 bits each: 3 and 1 bits saved; the other way round lost
    items = frame(["0 1 2 3", "3 3"], dose=[4, 0])
    table = probe_unintended(uniform(4), items, reference=uniform(8))
    assert values(table) == pytest.approx({"i0": 3.0, "i1": 1.0}, abs=1e-5)
    assert values(table, "unintended_bits") == values(table)
    assert set(table["dose"]) == {4, 0} and set(table["run"]) == {"fake"}
    lost = probe_unintended(uniform(8), items, reference=uniform(4))
    assert values(lost) == pytest.approx({"i0": -3.0, "i1": -1.0}, abs=1e-5)
    assert values(lost, "unintended_bits") == {"i0": 0.0, "i1": 0.0}


def test_a_text_known_by_heart_against_a_uniform_reference():
    sure = np.full((8, 8), -200.0)
    sure[[0, 1, 2], [1, 2, 3]] = 0.0
    table = probe_unintended(bigram(sure), frame(["0 1 2 3"]), reference=uniform(8))
    assert values(table)["i0"] == pytest.approx(9.0, abs=1e-5)


def test_two_tokenizers_score_the_same_stretch_of_text():
    # single letters against pairs. Of "abcdef" pairs end at 2, 4, 6, letters everywhere: scored is
    # "cdef", 4 letters at 2 bits against 2 pairs at 3: -2. Of "abcde" it is "cde": 3 * 2 - 2 * 3.
    items = frame(["abcdef", "abcde"])
    letters, pairs = uniform(4, Pieces(1)), uniform(8, Pieces(2))
    got = values(probe_unintended(letters, items, reference=pairs))
    assert got == pytest.approx({"i0": -2.0, "i1": 0.0}, abs=1e-5)
    back = values(probe_unintended(pairs, items, reference=letters))
    assert back == pytest.approx({"i0": 2.0, "i1": 0.0}, abs=1e-5)


class Words(Pieces):
    """Cuts before each space; ``size`` is not asked."""

    def __call__(self, texts, add_special_tokens=True, return_offsets_mapping=False):
        spans = [[each.span() for each in re.finditer(r"^\S+| \S+", text)] for text in texts]
        told = {"input_ids": [[len(each) for _ in each] for each in spans]}
        return told | ({"offset_mapping": spans} if return_offsets_mapping else {})


def test_each_text_begins_where_its_own_first_token_ends():
    # words end at 1, 6 and at 3, 6, 10: scored are 5 letters against a word, 7 against two
    items = frame(["a bbbb", "ccc dd eee"])
    letters, words = uniform(4, Pieces(1)), uniform(8, Words(0))
    got = values(probe_unintended(letters, items, reference=words))
    assert got == pytest.approx({"i0": 3 - 5 * 2, "i1": 2 * 3 - 7 * 2}, abs=1e-5)


def test_a_context_too_short_cuts_both():
    # four letters of context: of "abcdefgh" pairs and letters share the ends 2 and 4 within it
    letters, pairs = uniform(4, Pieces(1)), uniform(8, Pieces(2))
    letters.module.config = SimpleNamespace(max_position_embeddings=4)
    got = values(probe_unintended(letters, frame(["abcdefgh"]), reference=pairs))
    assert got["i0"] == pytest.approx(-2 * 2 + 3.0, abs=1e-5)


def brute(model, text, start):
    """Bits of a text's tokens from the one that begins at character ``start``, one pass a token."""
    told = model.tokenizer([text], add_special_tokens=False, return_offsets_mapping=True)
    ids, bits = told["input_ids"][0], 0.0
    before = [] if model.bos is None else [model.bos]
    ends = [0, *(end for _, end in told["offset_mapping"][0])]
    for at in range(1, len(ids)):
        if ends[at] < start:
            continue
        with torch.no_grad():
            logits = model.module(torch.tensor([before + ids[:at]])).logits[0, -1].double()
        bits -= logits.log_softmax(-1)[ids[at]].item() / math.log(2)
    return bits


def test_two_real_tokenizers_against_a_loop():
    one = byte_level_tokenizer(ENGLISH, vocabulary=400)
    two = byte_level_tokenizer(ENGLISH[:2], vocabulary=290, bos=True)
    model = LanguageModel(neox(1, vocabulary=400), one, "one")
    other = LanguageModel(neox(2, vocabulary=290), two, "two", bos=1)
    texts = ["All happy families", "Call me a word, naïve — or not"]
    got = values(probe_unintended(model, frame(texts), reference=other))
    for item, text in zip(("i0", "i1"), texts, strict=True):
        ends = [
            {end for _, end in t([text], return_offsets_mapping=True)["offset_mapping"][0]} - {0}
            for t in (one, two)
        ]
        start = min(ends[0] & ends[1])
        want = brute(other, text, start) - brute(model, text, start)
        assert got[item] == pytest.approx(want, abs=1e-4)
        assert start >= max(min(each) for each in ends)


def test_the_twin_is_the_counterfactual_on_real_models(tiny):
    base, twin = (tiny.suite.checkpoints(run) for run in ("base", "twin"))
    model, reference = base.at(base.steps[-1]), twin.at(twin.steps[-1])
    items = tiny.suite.items("base")
    table = probe_unintended(model, items, reference=reference)
    got = values(table)
    for row in items.iloc[::7].itertuples():
        want = brute(reference, row.text, 1) - brute(model, row.text, 1)
        assert got[row.item] == pytest.approx(want, abs=1e-3)
        assert values(table, "unintended_bits")[row.item] == max(0.0, got[row.item])
    assert table.attrs["passport"]["weights"] == model.weights_hash()
    assert table.attrs["passport"]["reference"]["weights"] == reference.weights_hash()
    swapped = values(probe_unintended(reference, items, reference=model))
    for item, value in got.items():
        assert swapped[item] == pytest.approx(-value, abs=1e-9)


def test_against_itself_there_is_nothing_to_say():
    table = probe_unintended(uniform(4), frame(["0 1", "2 3"]), reference=uniform(4))
    assert table["value"].isna().all()
    assert set(table["reason"]) == {"the reference is the model itself"}


def test_texts_of_one_token_are_dropped_and_named():
    items = frame(["0", "1 2", "3"])
    with pytest.warns(
        UserWarning,
        match=r"^probe_unintended: dropped 2 of 3 texts without two places where a token ends in "
        r"both models \(first: i0, i2\)$",
    ):
        table = probe_unintended(uniform(4), items, reference=uniform(8))
    assert list(values(table)) == ["i1"] and table.attrs["dropped"] == 2


def test_what_it_refuses(tiny):
    checkpoints = tiny.suite.checkpoints("base")
    items = frame(["0 1"])
    with refuses("probe_unintended: source is a series of checkpoints; give one, .at(step)"):
        probe_unintended(checkpoints, items, reference=uniform(4))
    with refuses("probe_unintended: reference is a series of checkpoints; give one, .at(step)"):
        probe_unintended(uniform(4), items, reference=checkpoints)
    with refuses(
        "probe_unintended: none of 1 texts has two places where a token ends in both models; give "
        "longer texts"
    ):
        probe_unintended(uniform(4), frame(["1"]), reference=uniform(8))
    silent = uniform(8, Pieces(2), run="silent")
    whole = silent.tokenizer

    def no_offsets(texts, add_special_tokens=True, return_offsets_mapping=False):
        if return_offsets_mapping:
            raise NotImplementedError
        return whole(texts)

    silent.tokenizer = no_offsets
    with refuses(
        "probe_unintended: the models have different tokenizers, and that of silent does not say "
        "where its tokens end; give a reference with the same tokenizer"
    ):
        probe_unintended(uniform(4, Pieces(1)), frame(["abcd"]), reference=silent)
    broken = bigram(np.full((4, 4), np.nan), run="broken")
    with refuses(
        "probe_unintended: log_probability is nan for item number 0 at step 0 of broken; the "
        "model's weights or its dtype give NaN or Inf"
    ):
        probe_unintended(broken, items, reference=uniform(8))
