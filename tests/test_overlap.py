"""Which controls stand in the training text after all."""

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.overlap import BLOCK, drop_shared, read_training_text, shared_words
from workbench.table import InputError


def frame(*texts, group="never"):
    groups = [group] * len(texts) if isinstance(group, str) else group
    names = [f"i{k}" for k in range(len(texts))]
    return pd.DataFrame({"item": names, "text": list(texts), "group": groups})


def test_by_hand():
    # "a b c d" has the trigrams abc and bcd; the training text holds bcd alone, across a comma
    # and in capitals. "b c" is shorter than three words and is looked for whole.
    items = frame("a b c d", "b c", "x y z", "c b")
    found = shared_words(items, ["q B C, D e"], words=3)
    assert found["value"].tolist() == [0.5, 1.0, 0.0, 0.0]
    assert found.attrs["words_read"] == 5


def test_an_ngram_that_stands_twice_in_an_item_counts_once():
    # "a b a b a": the bigrams ab and ba; ab is met
    assert shared_words(frame("a b a b a"), ["a b"], words=2)["value"].tolist() == [0.5]


def test_ngrams_do_not_reach_over_two_pieces():
    assert shared_words(frame("a b"), ["x a", "b y"], words=2)["value"].tolist() == [0.0]


def test_no_word_is_undefined():
    found = shared_words(frame("...", "a b"), ["a b"], words=2)
    assert np.isnan(found["value"][0]) and found["reason"][0] == "no word in the text"


@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=8), min_size=1, max_size=4),
    st.lists(st.lists(st.sampled_from("abc"), max_size=12), min_size=1, max_size=3),
    st.integers(1, 5),
)
def test_against_a_plain_loop(items, training, words):
    if not any(training):
        return
    texts = [" ".join(each) + f" {k}z" for k, each in enumerate(items)]  # no two texts alike
    found = shared_words(frame(*texts), [" ".join(each) for each in training], words=words)
    for text, value in zip(texts, found["value"], strict=True):
        own = text.split()
        length = min(words, len(own))
        grams = {tuple(own[i : i + length]) for i in range(len(own) - length + 1)}
        met = {
            gram
            for gram in grams
            for piece in training
            for i in range(len(piece) - length + 1)
            if tuple(piece[i : i + length]) == gram
        }
        assert value == pytest.approx(len(met) / len(grams))


def test_controls_are_dropped_counted_and_named():
    items = frame("a b c", "d e f", "g h i", group=["never", "never", "seen"])
    shared = shared_words(items, ["a b c g h i"], words=2)
    with pytest.warns(UserWarning, match=r"dropped 1 of 2 controls .* \(first: i0, 100% of its"):
        kept = drop_shared(items, shared)
    # the trained text stands there too, and is meant to
    assert kept["item"].tolist() == ["i1", "i2"] and kept.attrs["dropped"] == 1


def test_the_limit_is_let_pass():
    items = frame("a b c", "x y z")
    shared = shared_words(items, ["a b"], words=2)  # one of the two bigrams of the first
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(drop_shared(items, shared, limit=0.5)) == 2
    with pytest.warns(UserWarning):
        assert len(drop_shared(items, shared, limit=0.49)) == 1


def test_errors():
    items = frame("a b c")
    with pytest.raises(InputError, match="^shared_words: words is 0, it must be at least 1$"):
        shared_words(items, ["a"], words=0)
    with pytest.raises(InputError, match="^shared_words: the training texts hold no word"):
        shared_words(items, ["..."], words=2)
    with pytest.raises(InputError, match="^drop_shared: all 1 controls share more than 0% of"):
        drop_shared(items, shared_words(items, ["a b c"], words=2))


def test_a_plain_text_is_read_in_blocks_that_lap(tmp_path):
    # the text looked for is laid across the border of two blocks
    path = tmp_path / "corpus.txt"
    text = "one two three\nfour five"
    path.write_text("x " * (BLOCK // 2 - 4) + text + " y" * 100, encoding="utf-8")
    assert len(list(read_training_text(path))) == 2
    assert shared_words(frame(text), read_training_text(path), words=5)["value"].tolist() == [1.0]


def test_other_files_are_read_text_by_text(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a b"}\n{"text": "c d"}\n', encoding="utf-8")
    assert list(read_training_text(path)) == ["a b", "c d"]
    with pytest.raises(InputError, match=r"^load_items: no file at .*nothing\.txt"):
        list(read_training_text(tmp_path / "nothing.txt"))
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"^read_training_text: cannot read .*latin\.txt"):
        list(read_training_text(path))


def test_the_suite_knows_what_it_trained_on(tiny):
    items = tiny.suite.items("base")
    found = shared_words(items, tiny.suite.training_texts("base"), words=13)
    share = items.assign(value=found["value"].to_numpy()).groupby("group")["value"]
    # each planted text stands there whole, and no text that was held out does
    assert share.min()[["seen", "drip"]].eq(1).all()
    assert share.max()[["never", "partner"]].eq(0).all()
