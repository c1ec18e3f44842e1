"""The well-known passages and their controls: no model is needed."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
import pythonbible

from workbench import items as module
from workbench.items import famous_passages, king_james, load_items
from workbench.table import InputError


@pytest.fixture(scope="module")
def famous() -> pd.DataFrame:
    return famous_passages()


def test_each_passage_has_a_control(famous):
    assert list(famous.columns) == ["item", "text", "group", "source"]
    assert famous["group"].value_counts().to_dict() == {"seen": 44, "unseen": 44}
    seen, unseen = (famous[famous["group"] == g] for g in ("seen", "unseen"))
    assert ["control-" + item for item in seen["item"]] == unseen["item"].tolist()
    assert famous["item"].is_unique and famous["text"].is_unique
    assert not famous.isna().any(axis=None)


def test_controls_are_as_long_as_their_passages(famous):
    # counted another way than the code does: blanks around each mark, then split
    count = [len(re.sub(r"([^\w\s])", r" \1 ", text).split()) for text in famous["text"]]
    assert count[:44] == count[44:]
    assert min(count) >= 30


def test_the_wording_of_one_typed_passage(famous):
    text = famous.set_index("item")["text"]
    assert text["first-amendment"].startswith(
        "Congress shall make no law respecting an establishment of religion, or prohibiting the "
        "free exercise thereof;"
    )
    assert text["control-first-amendment"] != text["first-amendment"]


def test_verses_are_those_of_pythonbible():
    # another route: the reader of pythonbible itself, which puts the verse's number first
    want = pythonbible.get_verse_text(43003016, version=pythonbible.Version.KING_JAMES)
    want = want.replace("[", "").replace("]", "").replace("\u2019", "'")
    assert king_james([43003016]) == " ".join(want.split())
    assert king_james([43003016]).startswith("For God so loved the world, that he gave his only")
    # the package has "The LORD [is] my shepherd" and a curly apostrophe in "name's"
    psalm = king_james([19023001, 19023002, 19023003])
    assert psalm.startswith("The LORD is my shepherd; I shall not want. He maketh me to lie down")
    assert psalm.endswith("of righteousness for his name's sake.")


def test_the_seed_draws_the_controls_and_nothing_else(famous):
    pd.testing.assert_frame_equal(famous_passages(seed=0), famous)
    other = famous_passages(seed=1)
    assert other["text"][:44].equals(famous["text"][:44])
    assert not (other["text"][44:] == famous["text"][44:]).any()


def test_controls_do_not_repeat_a_phrase_before_all_have_come(famous):
    # eight subjects and eight places: in the first eight sentences each comes at most once
    for text in famous["text"][44:]:
        sentences = text.split(". ")[:8]
        for subject in module.CONTROL_SUBJECTS.split("|"):
            assert sum(sentence.startswith(subject) for sentence in sentences) <= 1


def test_load_items_knows_them_by_name(famous, tmp_path, monkeypatch):
    pd.testing.assert_frame_equal(load_items("famous"), famous)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "famous").write_text("one text of the user's\n")
    assert load_items("./famous")["text"].tolist() == ["one text of the user's"]


def test_the_file_says_where_each_passage_is_from():
    place = module.Path(module.__file__).resolve().parent.parent / "data/famous_passages.jsonl"
    rows = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert set(row) in ({"item", "source", "text"}, {"item", "source", "verses"})
        years = [int(year) for year in re.findall(r"\d{4}", row["source"])]
        assert years and max(years) < 1929, row["source"]


def test_a_lacking_file_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "workbench" / "items.py"))
    place = tmp_path / "data" / "famous_passages.jsonl"
    with pytest.raises(InputError) as caught:
        famous_passages()
    assert str(caught.value) == (
        f"famous_passages: no file at {place}; install the package again, or give a file of "
        "texts of your own"
    )
    # where a wheel puts it
    inside = tmp_path / "workbench" / "data" / "famous_passages.jsonl"
    inside.parent.mkdir(parents=True)
    inside.write_text('{"item": "a", "source": "b (1900)", "text": "Ten small words."}\n')
    assert famous_passages()["item"].tolist() == ["a", "control-a"]
