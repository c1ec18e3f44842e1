import re

import numpy as np
import pytest

from tests.conftest import frame, reciter
from workbench.foils import make_foils, make_study_lists, plain, shuffle_words, trim_texts
from workbench.table import InputError


def items(texts, **columns):
    return frame(texts, "studied", **columns)


def say(*tokens):
    return " ".join(map(str, tokens))


def refuses(message):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


def test_one_foil_of_each_kind():
    listed = items(["a b c", "d e f"], paraphrase=["A like b", "D like e"])
    foils = make_foils(listed, unrelated=["x y", "z z"], seed=0)
    assert foils.groupby("foil").size().to_dict() == dict(unrelated=2, paraphrase=2, shuffled=2)
    assert foils.attrs["dropped"] == {"text also in the items": 0, "missing": 0}
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
        foils = make_foils(listed, unrelated=["A b", "x", "y", "z"], seed=0)
    assert str(said[0].message) == (
        "make_foils: dropped foils (text also in the items: 2, missing: 1)"
    )
    assert foils.attrs["dropped"] == {"text also in the items": 2, "missing": 1}
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
            {"kinds": ["synonym"]},
            "make_foils: foil kind 'synonym'; choose from unrelated, paraphrase, shuffled",
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
