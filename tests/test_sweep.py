"""Checkpoints and items through one question, and the cache of its answers."""

import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.conftest import ENGLISH, byte_level_tokenizer, frame, neox, reciter
from workbench.models import LanguageModel, load_checkpoints, load_model
from workbench.probes.extraction import probe_cdd, probe_continuation, probe_extraction
from workbench.probes.guesses import probe_guesses
from workbench.probes.likelihood import probe_likelihood
from workbench.probes.unintended import probe_unintended
from workbench.sweep import Question, sweep
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
        UserWarning,
        match=r"^probe_likelihood: .*\.parquet is not what was written \(its hash differs\); "
        "scoring again$",
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
    assert str(told[0].message) == (
        "probe_likelihood: not cached ([Errno 28] No space left on device)"
    )


def _ask_in_a_process(run, marker, start):
    score = LanguageModel.score_batches

    def counted(self, tokens, **options):
        with marker.open("a") as file:
            file.write(f"{self.step}\n")
        time.sleep(0.2)
        return score(self, tokens, **options)

    LanguageModel.score_batches = counted
    start.wait()
    table = probe_likelihood(load_checkpoints(run), ITEMS)
    (marker.parent / f"{os.getpid()}.json").write_text(table["value"].to_json())


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
@pytest.mark.parametrize("killed", [False, True])
def test_four_processes_score_once_and_a_kill_costs_only_what_was_begun(run, tmp_path, killed):
    probe_likelihood(load_checkpoints(run), ITEMS.head(3))  # what only a first call imports
    fork = multiprocessing.get_context("fork")
    marker, start = tmp_path / "marker", fork.Event()
    four = [fork.Process(target=_ask_in_a_process, args=(run, marker, start)) for _ in range(4)]
    for process in four:
        process.start()
    start.set()
    if killed:
        while not marker.exists():
            time.sleep(0.01)
        (first,) = [p for p in four if p.pid in _lockers(panels_folder())]
        os.kill(first.pid, signal.SIGKILL)
    for process in four:
        process.join(120)
    passes = marker.read_text().split()
    assert passes[-3:] == ["0", "3", "12"] and len(passes) <= (5 if killed else 3)
    answers = {file.read_text() for file in tmp_path.glob("*.json")}
    assert len(answers) == 1 and len(list(tmp_path.glob("*.json"))) == 4 - killed


def panels_folder():
    return cache_folder() / "panels"


def _lockers(folder) -> set[int]:
    """Processes that hold a lock in a folder, as the kernel lists them."""
    here = {lock.stat().st_ino for lock in folder.glob("*.lock")}
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    held = [line for line in lines if "->" not in line]
    return {int(line[4]) for line in held if int(line[5].split(":")[2]) in here}


def panels() -> list:
    return sorted(panels_folder().glob("*.parquet"))


def test_a_model_that_was_made_by_hand_is_not_cached(passes):
    for _ in range(2):
        probe_likelihood(reciter(), frame(["1 2 3"]))
    assert len(passes) == 2 and not panels()


def test_a_single_model_is_scored_once(run, passes):
    one = probe_likelihood(load_model(run / "step3"), ITEMS)
    two = probe_likelihood(load_model(run / "step3"), ITEMS)
    assert passes == [3] and len(panels()) == 1
    pd.testing.assert_frame_equal(one, two)
    assert one.attrs == two.attrs


class Shifted:
    """Cuts a text where another tokenizer does, and gives the pieces other ids."""

    def __init__(self, other):
        self.other = other

    def __call__(self, texts, **options):
        ids = self.other(texts, **options)["input_ids"]
        return {"input_ids": [[(each + 1) % 280 for each in few] for few in ids]}


def test_the_cache_of_a_single_model_follows_all_that_changes_its_answers(run, passes, tokenizer):
    """Weights, another place for them, configuration, dtype, step, texts, tokens."""
    probe_likelihood(load_model(run / "step3"), ITEMS)
    edited, shaped, stepped = (load_model(run / "step3") for _ in range(3))
    with torch.no_grad():
        next(edited.module.parameters())[0, 0] += 1e-3
    shaped.module.config.rope_theta = 5.0
    stepped = replace(stepped, step=4)
    for model, items in (
        (edited, ITEMS),
        (shaped, ITEMS),
        (stepped, ITEMS),
        (load_model(run / "step12"), ITEMS),
        (load_model(run / "step3", dtype="bfloat16"), ITEMS),
        (replace(load_model(run / "step3"), source="elsewhere"), ITEMS),
        (load_model(run / "step3"), ITEMS.assign(cohort=9)),
        (load_model(run / "step3"), ITEMS.assign(text=ITEMS["text"] + ".")),
        (replace(load_model(run / "step3"), tokenizer=byte_level_tokenizer(["x y"], 280)), ITEMS),
        (replace(load_model(run / "step3"), tokenizer=Shifted(tokenizer)), ITEMS),
    ):
        del passes[:]
        probe_likelihood(model, items)
        assert passes, "answered from the cache of another question"


def test_what_weights_do_not_tell_is_not_cached(run, passes):
    hooked, training, patched = (load_model(run / "step3") for _ in range(3))
    hooked.module.gpt_neox.layers[0].register_forward_hook(lambda module, given, out: out)
    training.module.train()
    patched.module.gpt_neox.layers[0].forward = patched.module.gpt_neox.layers[0].forward
    for model in (hooked, training, patched):
        probe_likelihood(model, ITEMS)
    assert len(passes) == 3 and not panels()


def test_a_question_from_a_notebook_or_of_a_model_in_training_is_not_cached(run, passes):
    model = load_model(run / "step3")

    def mean(scores, tokens, index):
        return {"log_probability": np.nanmean(scores.log_probability, axis=1)}

    def cut(model, items):
        return model.encode(items["text"].tolist()), items

    typed = {"np": np}
    exec(
        "def mean(s, t, i): return {'log_probability': np.nanmean(s.log_probability, axis=1)}",
        typed,
    )
    asked = Question("asker", 1, ("log_probability",), {}, mean)
    sweep(model, ITEMS, cut, replace(asked, cached=False))
    sweep(model, ITEMS, cut, replace(asked, reduce=typed["mean"]))
    assert not panels()
    one = sweep(model, ITEMS, cut, asked)
    del passes[:]
    np.testing.assert_array_equal(sweep(model, ITEMS, cut, asked)["value"], one["value"])
    assert not passes
    sweep(model, ITEMS, cut, replace(asked, also="other"))
    assert passes == [3]


def test_an_edited_probe_is_asked_anew(run, passes, monkeypatch):
    probe_likelihood(load_checkpoints(run), ITEMS)
    del passes[:]
    monkeypatch.setattr("workbench.sweep._hash_of_files", lambda names: "edited")
    probe_likelihood(load_checkpoints(run), ITEMS)
    assert passes == [0, 3, 12]


def test_a_tokenizer_that_is_replaced_is_noticed(run, passes, tmp_path):
    copy = tmp_path / "my-run"
    shutil.copytree(run, copy)
    probe_likelihood(load_checkpoints(copy), ITEMS)
    byte_level_tokenizer(["another language"], 290).save_pretrained(copy)
    del passes[:]
    probe_likelihood(load_checkpoints(copy), ITEMS)
    assert passes == [0, 3, 12]


def test_what_is_generated_is_kept_too(run, monkeypatch):
    """Three probes of a notebook, asked again by another: no token is said twice."""
    said = []
    generate = LanguageModel.generate
    monkeypatch.setattr(
        LanguageModel, "generate", lambda *args, **more: said.append(1) or generate(*args, **more)
    )
    short = {"prefix": 4, "suffix": 4}
    asks = [
        lambda model: probe_continuation(model, ITEMS, **short),
        lambda model: probe_cdd(model, ITEMS, samples=3, **short),
        lambda model: probe_guesses(model, ITEMS, **short),
    ]
    first = [ask(load_model(run / "step3")) for ask in asks]
    assert len(said) == 4  # cdd once greedily and once drawn
    for ask, one in zip(asks, first, strict=True):
        two = ask(load_model(run / "step3"))
        pd.testing.assert_frame_equal(one, two)
        assert one.attrs == two.attrs
    assert len(said) == 4
    probe_cdd(load_model(run / "step3"), ITEMS, samples=3, seed=1, **short)
    assert len(said) == 6


def test_a_reference_with_other_tokens_has_a_panel_of_its_own(run, passes, tmp_path):
    """What is scored depends on where both tokenizers end a token, not on the model's alone."""
    other = tmp_path / "other"
    neox(5, vocabulary=280).save_pretrained(other)
    byte_level_tokenizer(["In The It Four Call All"], 280).save_pretrained(other)
    model, near, far = (load_model(each) for each in (run / "step3", run / "step12", other))
    short = ITEMS.assign(text=ITEMS["text"].str[:30])  # whole in both, so the tokens are the same
    fresh = probe_unintended(model, short, reference=near)
    unlike = probe_unintended(model, short, reference=far)
    shutil.rmtree(cache_folder())
    alone = probe_unintended(model, short, reference=far)
    np.testing.assert_array_equal(alone["value"], unlike["value"])
    assert not np.array_equal(fresh["value"], unlike["value"])


def test_dropped_items_are_counted_from_the_cache_too(run):
    items = frame([*ENGLISH, "x"])
    with pytest.warns(UserWarning, match="dropped 1 of 7"):
        probe_likelihood(load_checkpoints(run), items, prefix=5)
    assert probe_likelihood(load_checkpoints(run), items, prefix=5).attrs["dropped"] == 1
