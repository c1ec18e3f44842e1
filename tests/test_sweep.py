"""Checkpoints and items through one question, and the cache of its answers."""

import re
import warnings

import numpy as np
import pytest

from tests.conftest import ENGLISH, frame, neox, reciter
from workbench.models import LanguageModel, load_checkpoints
from workbench.probes.extraction import probe_extraction
from workbench.probes.likelihood import probe_likelihood
from workbench.table import cache_folder, validate


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("runs") / "my-run"
    for step in (0, 3, 12):
        neox(step).save_pretrained(folder / f"step{step}")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def passes(monkeypatch):
    """Counts the calls that score anything."""
    calls = []
    score = LanguageModel.score_batches

    def counted(self, tokens, **options):
        calls.append(self.step)
        return score(self, tokens, **options)

    monkeypatch.setattr(LanguageModel, "score_batches", counted)
    return calls


ITEMS = frame(ENGLISH, cohort=[1, 2, 3, 4, 5, np.nan], kind=list("aabbcc"), note="private")


def test_each_checkpoint_is_scored_once_and_named(run, passes):
    table = validate(probe_likelihood(load_checkpoints(run), ITEMS))
    assert passes == [0, 3, 12]
    assert len(table) == 3 * 6 * 2
    assert set(table["run"]) == {"my-run"}
    for step in (0, 3, 12):
        alone = probe_likelihood(load_checkpoints(run / f"step{step}"), ITEMS)
        part = table[table["step"] == step]
        np.testing.assert_array_equal(part["value"], alone["value"])
        assert part["item"].to_list() == alone["item"].to_list()


def test_usual_columns_ride_along_and_others_do_not(run):
    table = probe_likelihood(load_checkpoints(run), ITEMS)
    assert "note" not in table.columns
    first = table[(table["step"] == 3) & (table["metric"] == "top1")].set_index("item")
    np.testing.assert_array_equal(first.loc[ITEMS["item"], "cohort"], ITEMS["cohort"])
    assert first.loc[ITEMS["item"], "kind"].to_list() == list("aabbcc")


def test_the_passport_of_a_sweep(run):
    passport = probe_likelihood(load_checkpoints(run), ITEMS).attrs["passport"]
    assert passport["steps"] == [0, 3, 12] and re.fullmatch("[0-9a-f]{16}", passport["items"])


def test_the_second_call_scores_nothing(run, passes):
    one = probe_likelihood(load_checkpoints(run), ITEMS)
    del passes[:]
    two = probe_likelihood(load_checkpoints(run), ITEMS)
    assert passes == []
    assert two.attrs == one.attrs
    assert two.drop(columns="kind").equals(one.drop(columns="kind")) or one.equals(two)
    np.testing.assert_array_equal(one["value"], two["value"])


def test_the_cache_follows_items_settings_steps_and_weights(run, passes, tmp_path):
    checkpoints = load_checkpoints(run)
    probe_likelihood(checkpoints, ITEMS)
    for other in (
        lambda: probe_likelihood(checkpoints, ITEMS.head(5)),
        lambda: probe_likelihood(checkpoints, ITEMS.assign(cohort=9)),
        lambda: probe_likelihood(checkpoints, ITEMS.assign(group="never")),
        lambda: probe_likelihood(checkpoints, ITEMS, prefix=2),
        lambda: probe_likelihood(checkpoints, ITEMS, length=5),
        lambda: probe_extraction(checkpoints, ITEMS, prefix=2, suffix=2),
        lambda: probe_extraction(checkpoints, ITEMS, prefix=2, suffix=2, suffix_at=3),
        lambda: probe_likelihood(checkpoints.select([0, 3]), ITEMS),
    ):
        del passes[:]
        other()
        assert passes, "answered from the cache of another question"
        del passes[:]
        other()
        assert not passes
    import shutil

    copy = tmp_path / "my-run"
    shutil.copytree(run, copy)
    neox(99).save_pretrained(copy / "step3")
    del passes[:]
    probe_likelihood(load_checkpoints(copy), ITEMS)
    assert passes == [0, 3, 12]


def damage(place, how):
    data = bytearray(place.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "inside":
        data[len(data) // 4 : len(data) // 4 + 60] = b"\xff" * 60
    else:
        data = b""
    place.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "inside", "empty"])
def test_a_damaged_entry_is_made_again_and_said(run, passes, how):
    one = probe_likelihood(load_checkpoints(run), ITEMS)
    (place,) = (cache_folder() / "panels").glob("*.parquet")
    damage(place, how)
    del passes[:]
    with pytest.warns(
        UserWarning, match=r"^sweep: load: .* is not a whole Parquet file .*; scoring again$"
    ):
        two = probe_likelihood(load_checkpoints(run), ITEMS)
    assert passes == [0, 3, 12]
    np.testing.assert_array_equal(one["value"], two["value"])
    del passes[:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe_likelihood(load_checkpoints(run), ITEMS)
    assert passes == []


def test_a_full_disk_costs_the_cache_and_not_the_numbers(run, monkeypatch):
    import workbench.sweep as sweep

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep, "save", full)
    with pytest.warns(UserWarning) as told:
        table = probe_likelihood(load_checkpoints(run), ITEMS)
    assert len(table) == 36
    assert str(told[0].message) == "sweep: not cached ([Errno 28] No space left on device)"


def test_a_single_model_is_not_cached(passes):
    for _ in range(2):
        probe_likelihood(reciter(), frame(["1 2 3"]))
    assert len(passes) == 2 and not (cache_folder() / "panels").exists()


def test_dropped_items_are_counted_from_the_cache_too(run):
    items = frame([*ENGLISH, "x"])
    with pytest.warns(UserWarning, match="dropped 1 of 7"):
        probe_likelihood(load_checkpoints(run), items, prefix=5)
    assert probe_likelihood(load_checkpoints(run), items, prefix=5).attrs["dropped"] == 1
