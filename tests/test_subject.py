"""What a notebook's ``model`` and ``items`` mean, for the suite and for the user's own."""

import json

import pandas as pd
import pytest

from workbench.stats.exposure import align_exposures
from workbench.subject import load_subject
from workbench.table import InputError, rows


def texts(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_a_model_of_ones_own_needs_texts_of_ones_own(model_folder):
    with pytest.raises(InputError) as caught:
        load_subject(str(model_folder))
    assert str(caught.value) == (
        "load_subject: your own model needs your own texts: add -p items=FILE, a CSV, JSONL, "
        "Parquet or text file with a column `text` and, for controls, `group` (seen, unseen)"
    )


def test_one_checkpoint_says_what_it_cannot_tell(model_folder, tmp_path):
    items = texts(
        tmp_path / "items.jsonl", [{"text": "one two", "label": 1}, {"text": "three", "label": 0}]
    )
    subject = load_subject(str(model_folder), items)
    assert not subject.causal and subject.controlled and subject.suite is None
    assert subject.items["dose"].tolist() == [1, 0]
    assert "One checkpoint: no causal profile and no forgetting curve" in subject.says()
    only = texts(tmp_path / "only.jsonl", [{"text": "one two", "label": 1}])
    assert "No held-out texts" in load_subject(str(model_folder), only).says()


def test_cohorts_of_the_user_become_exposures(model_folder, tmp_path):
    items = texts(
        tmp_path / "items.jsonl",
        [{"text": "one two", "cohort": 7}, {"text": "three four"}],
    )
    subject = load_subject(str(model_folder), items)
    assert subject.exposures.to_dict("records") == [{"update": 7, "item": "items-00001"}]
    assert subject.items["dose"].tolist() == [1, 0]
    assert not subject.causal  # one checkpoint compares nothing


def test_doses_of_the_user_lie_at_the_one_update_that_is_known(model_folder, tmp_path):
    entries = [
        {"text": "one", "cohort": 7, "dose": 2},
        {"text": "two", "cohort": 9},
        {"text": "no"},
    ]
    subject = load_subject(str(model_folder), texts(tmp_path / "items.jsonl", entries))
    assert subject.items["dose"].tolist() == [2, 1, 0]  # where none is given, as without the column
    assert subject.exposures["item"].str[-1].tolist() == ["1", "1", "2"]
    assert subject.exposures["update"].tolist() == [7, 7, 9]


@pytest.mark.parametrize("dose", ["often", -1])
def test_a_dose_that_is_no_number_of_exposures(model_folder, tmp_path, dose):
    items = texts(tmp_path / "items.jsonl", [{"text": "one", "dose": dose}])
    with pytest.raises(InputError) as caught:
        load_subject(str(model_folder), items)
    assert str(caught.value) == (
        f"load_subject: dose is {dose!r} for item 'items-00001'; give numbers of exposures, 0 or more"
    )


def test_ones_own_texts_put_to_the_suite_are_completed_too(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.subject.load_suite", lambda corpus: tiny.suite)
    entries = [{"text": "one two", "group": "seen"}, {"text": "three", "group": "unseen"}]
    subject = load_subject(items=texts(tmp_path / "items.jsonl", entries))
    assert subject.items[["kind", "dose"]].to_numpy().tolist() == [["text", 1], ["text", 0]]
    assert subject.exposures.empty and not subject.causal


def test_the_suite_is_causal_and_its_runs_see_what_they_planted(tiny, monkeypatch):
    monkeypatch.setattr("workbench.subject.load_suite", lambda corpus: tiny.suite)
    subject = load_subject()
    assert subject.causal and subject.controlled
    planted = set(subject.items.loc[subject.items["dose"] > 0, "item"])
    assert planted == set(subject.exposures["item"])


def test_lags_that_are_shown(model_folder, tmp_path):
    items = texts(tmp_path / "items.jsonl", [{"text": "one two", "cohort": 7}])
    subject = load_subject(str(model_folder), items)
    parts = [rows("top1", 0.5, run="r", step=s, item="items-00001") for s in (5, 7, 10)]
    table = align_exposures(pd.concat(parts), subject.exposures)
    assert subject.lags(table) == [0, 3]  # step 5 lies before the exposure
    assert subject.lags(table, [3, 9]) == [3]
    with pytest.raises(InputError) as caught:
        subject.lags(table, [4])
    assert (
        str(caught.value) == "lags: no checkpoint lies 4 updates after an exposure; there are 0, 3"
    )


# --- controls that are none -----------------------------------------------------------------------


def met_in(tmp_path, training, **options):
    """Two trained texts and two controls of four words, against a training text of that many words."""
    entries = [
        {"item": "a", "text": "one two three four", "group": "seen"},
        {"item": "b", "text": "ten ten ten ten", "group": "seen"},
        {"item": "c", "text": "five six seven eight", "group": "unseen"},
        {"item": "d", "text": "nine two three four", "group": "unseen"},
    ]
    place = tmp_path / "training.txt"
    place.write_text(training)
    items = texts(tmp_path / "items.jsonl", entries)
    return lambda model: (load_subject(str(model), items), str(place))


def test_controls_that_stand_in_the_training_text_are_dropped(model_folder, tmp_path):
    # "a" stands there whole, "b" not; of the controls "c" does and goes, "d" shares three words
    said = "Zero one two three four. Five, six, seven, EIGHT! Nine."
    subject, place = met_in(tmp_path, said)(model_folder)
    with pytest.warns(UserWarning, match=r"^drop_shared: dropped 1 of 2 controls .*first: c, 100%"):
        found = subject.drop_met_controls(place, words=4)
    assert subject.items["item"].tolist() == ["a", "b", "d"]
    assert found.set_index("group")["value"].to_dict() == {"seen": 0.5, "unseen": 0.5}
    # as three words in a row "d" was met as well, and no control is left
    subject, place = met_in(tmp_path, said)(model_folder)
    with pytest.raises(InputError, match=r"^drop_shared: all 2 controls share more than 0%"):
        subject.drop_met_controls(place, words=3)
    assert subject.items["item"].tolist() == ["a", "b", "c", "d"]


def test_without_a_training_text_nothing_is_known_and_nothing_dropped(model_folder, tmp_path):
    subject, _ = met_in(tmp_path, "")(model_folder)
    found = subject.drop_met_controls()
    assert found.empty and {"group", "value", "lo", "hi", "n"} <= set(found.columns)
    assert len(subject.items) == 4


def test_the_suite_knows_what_it_was_trained_on(tiny, monkeypatch):
    monkeypatch.setattr("workbench.subject.load_suite", lambda corpus: tiny.suite)
    subject = load_subject()
    before = subject.items["group"].value_counts()
    found = subject.drop_met_controls().set_index("group")["value"]
    assert found["seen"] == 1.0 and found["never"] == 0.0
    assert subject.items["group"].value_counts().equals(before)
    # the twin was trained on the partners of what this run holds
    other = load_subject(run="twin").drop_met_controls().set_index("group")["value"]
    assert other["seen"] == 1.0 and other["never"] == 0.0
