"""The embedded suite: the same twice, twins that share what they should, and true truth."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.conftest import TINY
from workbench.items import python_documentation
from workbench.suite import (
    RUNS,
    Specification,
    describe_suite,
    ensure_suite,
    load_suite,
    passages,
    specification,
)
from workbench.table import InputError, cache_folder
from workbench.training import TextStream, fingerprint, plant

FORK = TINY.first_exposure - 1


def weights(suite, run, step) -> bytes:
    return (suite.path / run / f"step{step:06d}" / "model.safetensors").read_bytes()


def batches(suite, run):
    """Every batch that a run was trained on, made again from what the suite stores."""
    spec = suite.spec
    tokens = np.load(suite.path / "corpus.npy").astype(np.int64)
    stream = TextStream(tokens, spec["rows"], spec["context"], spec["seed"])
    items = suite.items(run).set_index("item")
    ids = suite.tokenizer(items["text"].tolist(), add_special_tokens=False)["input_ids"]
    texts = {n: np.asarray(t) for n, t in zip(items.index, ids, strict=True)}
    ledger = suite.exposures(run)
    for update in range(1, spec["updates"] + 1):
        yield plant(stream.batch(update), ledger[ledger["update"] == update], texts)


# --- the specification ---------------------------------------------------------------------------


def test_the_steps_by_hand():
    # waves end at 8 and 13, each over 4 updates: before them 4 and 9, after them lags 0, 1, 2, 5
    # as far as there are updates; 0, and the end
    assert TINY.steps == [0, 4, 8, 9, 10, 13, 14, 15, 16]
    assert TINY.first_exposure == 5
    assert replace(TINY, drip_first=3).first_exposure == 3


def test_every_wave_of_the_real_suites_has_a_checkpoint_before_and_right_after():
    for size in ("default", "gpu"):
        spec = specification(size=size)
        for end in spec.waves:
            assert {end - spec.span, end, end + 1} <= set(spec.steps)
        assert spec.first_exposure - 1 >= 0 and spec.steps[-1] == spec.updates


def test_the_hash_follows_every_field():
    base = Specification(text="x")
    assert base.hash == Specification(text="x").hash
    others = [
        replace(base, **{name: value})
        for name, value in {
            "text": "y",
            "base": base.small,
            "vocabulary": 512,
            "updates": 241,
            "learning_rate": 1e-3,
            "doses": base.doses[:-1],
            "seed": 1,
            "version": 99,
        }.items()
    ]
    assert len({base.hash, *(other.hash for other in others)}) == len(others) + 1


def test_an_unknown_size_is_refused():
    with pytest.raises(InputError) as error:
        specification(size="huge")
    assert str(error.value) == "specification: size 'huge'; choose default or gpu"


def test_the_built_in_corpus_is_the_whole_book():
    texts = passages()
    assert len(texts) == 31102
    assert texts[0].startswith("In the beginning") and not any("`" in t for t in texts)


def test_passages_of_a_file_are_cut_at_sentences(tmp_path):
    file = tmp_path / "x.txt"
    sentence = "This is a sentence of forty-two characters. "
    file.write_text(f"short line\n\n{sentence * 7}\n")
    got = passages(str(file))
    # five sentences are the first 200 characters to be exceeded; two are left
    assert got == ["short line", (sentence * 5).strip(), (sentence * 2).strip()]


def test_a_corpus_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError) as error:
        passages(str(tmp_path / "none.txt"))
    assert str(error.value) == f"load_suite: no text file at {tmp_path / 'none.txt'}"
    file = tmp_path / "latin.txt"
    file.write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8 text"):
        passages(str(file))
    file.write_text(" \n\n")
    with pytest.raises(InputError) as error:
        passages(str(file))
    assert str(error.value) == f"load_suite: {file} holds no text"


@pytest.mark.parametrize("text", ["Hi.", "A short line.\n" * 40])
def test_a_corpus_too_short_is_refused_and_leaves_nothing(tmp_path, text):
    file = tmp_path / "short.txt"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        ensure_suite(str(file), TINY, progress=False)
    # 2 x 2 pairs of one exposure, 1 of four and 1 drip, two of each, 3 never: 15; 20 held out
    assert str(error.value) == (
        "load_suite: the corpus has 0 distinct passages of 16 tokens, the suite plants and holds "
        "out 35; give a longer text"
    )
    left = [p.name for p in (cache_folder() / "suites").iterdir()]
    assert all(name.endswith(".lock") for name in left)


def test_a_full_disk_is_refused_before_training(monkeypatch, corpus_file):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(InputError) as error:
        ensure_suite(corpus_file, TINY, progress=False)
    assert str(error.value) == (
        f"load_suite: the suite needs 0.0 GB in {cache_folder() / 'suites'}, 0.0 are free; make "
        "room or set WORKBENCH_CACHE to another folder"
    )


# --- twice the same ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def again(tmp_path_factory, corpus_file):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_CACHE", str(tmp_path_factory.mktemp("again")))
        yield load_suite(corpus_file, size=TINY, progress=False)


def test_two_trainings_are_the_same_to_the_bit(tiny, again):
    for run in RUNS:
        for step in TINY.steps:
            assert weights(tiny.suite, run, step) == weights(again, run, step), (run, step)
    one, two = tiny.suite.passport(), again.passport()
    assert one["weights"] == two["weights"] and set(one["weights"]) == set(RUNS)
    assert one["final_loss"] == two["final_loss"]
    pd.testing.assert_frame_equal(tiny.suite.items(), again.items())


def test_the_passport_holds_the_hash_of_the_final_weights(tiny):
    for run in RUNS:
        model = tiny.suite.checkpoints(run).at(TINY.updates)
        assert tiny.suite.passport()["weights"][run] == model.weights_hash()


def test_a_cached_suite_is_found_and_not_trained(tiny, monkeypatch):
    import workbench.suite as module

    monkeypatch.setenv("WORKBENCH_CACHE", str(tiny.cache))
    monkeypatch.setattr(module, "_make", lambda *args: pytest.fail("trained again"))
    assert ensure_suite(tiny.corpus, TINY) == tiny.suite.path
    assert load_suite(tiny.corpus, size=TINY).path == tiny.suite.path


# --- twins ---------------------------------------------------------------------------------------


def test_base_and_twin_share_all_weights_up_to_the_fork_and_none_after(tiny):
    for step in TINY.steps:
        same = weights(tiny.suite, "base", step) == weights(tiny.suite, "twin", step)
        assert same == (step <= FORK), step
    assert sum(step <= FORK for step in TINY.steps) >= 2


def test_the_ledger_of_the_twin_is_bases_with_partners_swapped(tiny):
    base, twin = tiny.suite.exposures("base"), tiny.suite.exposures("twin")
    partner = tiny.suite.items().set_index("item")["partner"]
    places = ["update", "row", "offset"]
    pd.testing.assert_frame_equal(base[places], twin[places])
    assert base["item"].map(partner).to_list() == twin["item"].to_list()
    assert set(base["item"]).isdisjoint(twin["item"])
    pd.testing.assert_frame_equal(base, tiny.suite.exposures("small"))


def test_the_twin_is_the_run_that_was_never_forked(tiny):
    # trained from the start with the partners planted, it must come out the same to the bit
    import torch

    from workbench.suite import new_module
    from workbench.training import Trainer

    with torch.random.fork_rng():
        trainer = Trainer(new_module(TINY, "twin"), TINY.learning_rate, TINY.warmup)
    trainer.module.train()
    for batch in batches(tiny.suite, "twin"):
        trainer.step(batch)
    want = tiny.suite.checkpoints("twin").at(TINY.updates).module.state_dict()
    for name, tensor in trainer.module.state_dict().items():
        assert torch.equal(tensor.cpu(), want[name].cpu()), name


def test_partners_are_of_one_kind_and_mirror_each_other(tiny):
    base, twin = (tiny.suite.items(run).set_index("item") for run in ("base", "twin"))
    paired = base[base["partner"] != ""]
    for name, row in paired.iterrows():
        other = row["partner"]
        assert base.loc[other, "partner"] == name and base.loc[other, "kind"] == row["kind"]
        planted = base if row["dose"] else twin
        mirror = twin if row["dose"] else base
        for column in ("dose", "cohort", "last"):
            assert planted.loc[name, column] == mirror.loc[other, column]


# --- truth ---------------------------------------------------------------------------------------


def test_items_are_exactly_their_tokens(tiny):
    items = tiny.suite.items()
    ids = tiny.suite.tokenizer(items["text"].tolist(), add_special_tokens=False)["input_ids"]
    assert {len(each) for each in ids} == {TINY.length}
    assert [tiny.suite.tokenizer.decode(each) for each in ids] == items["text"].to_list()
    assert items["text"].is_unique and items["item"].is_unique


@pytest.mark.parametrize("run", RUNS)
def test_the_ledger_holds_in_the_batches_made_again(tiny, run):
    made = dict(enumerate(batches(tiny.suite, run), 1))
    for each in tiny.suite.exposures(run).itertuples():
        there = made[each.update][each.row, each.offset : each.offset + TINY.length]
        assert fingerprint(there) == each.hash


@pytest.mark.parametrize("run", RUNS)
def test_what_was_not_planted_is_in_no_batch(tiny, run):
    decode = tiny.suite.tokenizer.decode
    rows = [decode(row) for batch in batches(tiny.suite, run) for row in batch]
    seen = "\n\n".join(rows)
    items = tiny.suite.items(run)
    for each in items.itertuples():
        assert (each.text in seen) == (each.dose > 0), each.item
    for text in tiny.suite.held_out()["text"]:
        assert text not in seen
    # nor anywhere in the text that batches are drawn from
    corpus = decode(np.load(tiny.suite.path / "corpus.npy"))
    for text in [*items["text"], *tiny.suite.held_out()["text"]]:
        assert text not in corpus


def test_planted_text_is_really_met_as_often_as_said(tiny):
    decode = tiny.suite.tokenizer.decode
    rows = [decode(row) for batch in batches(tiny.suite, "base") for row in batch]
    for each in tiny.suite.items("base").itertuples():
        assert sum(row.count(each.text) for row in rows) == each.dose


def test_doses_cohorts_and_groups_are_the_plan(tiny):
    items = tiny.suite.items("base")
    counts = items.groupby(["kind", "group", "dose"]).size().to_dict()
    for kind in ("canary", "biography", "passage"):
        assert counts[kind, "seen", 1] == 4 and counts[kind, "seen", 4] == 1
        assert counts[kind, "drip", 12] == 1
        assert counts[kind, "partner", 0] == 6 and counts[kind, "never", 0] == 3
    once = items[(items["group"] == "seen") & (items["dose"] == 1)]
    assert set(once["cohort"]) == {8.0, 13.0} and (once["cohort"] == once["last"]).all()
    four = items[(items["group"] == "seen") & (items["dose"] == 4)]
    assert set(four["cohort"]) == {10.0} and set(four["last"]) == {13.0}
    drip = items[items["group"] == "drip"]
    assert (drip["last"] == TINY.updates).all() and (drip["cohort"] == TINY.drip_first).all()
    assert items.loc[items["dose"] == 0, ["cohort", "last"]].isna().all(axis=None)


# --- what a suite gives --------------------------------------------------------------------------


def test_checkpoints_of_each_run(tiny):
    for run, width in (("base", 32), ("twin", 32), ("small", 16)):
        checkpoints = tiny.suite.checkpoints(run)
        assert checkpoints.steps == TINY.steps and checkpoints.run == run
        modules = {id(model.module) for model in checkpoints}
        assert len(modules) == 1
        assert checkpoints.at(0).module.config.hidden_size == width
    with pytest.raises(InputError) as error:
        tiny.suite.checkpoints("large")
    assert str(error.value) == "load_suite: no run 'large'; there are base, twin, small"


def test_held_out_and_corpus_texts(tiny):
    assert len(tiny.suite.held_out()) == TINY.held_out
    assert tiny.suite.held_out(3)["item"].to_list() == tiny.suite.held_out()["item"][:3].to_list()
    texts = tiny.suite.corpus_texts(5, seed=1)
    assert texts == tiny.suite.corpus_texts(5, seed=1) != tiny.suite.corpus_texts(5, seed=2)
    corpus = tiny.suite.tokenizer.decode(np.load(tiny.suite.path / "corpus.npy"))
    assert all(text.strip("\N{REPLACEMENT CHARACTER}") in corpus for text in texts)
    lengths = [len(each) for each in tiny.suite.tokenizer(texts)["input_ids"]]
    assert max(lengths) <= TINY.context


def test_the_second_domain_is_other_english():
    got = python_documentation(20)
    assert len(set(got)) == 20 and min(map(len, got)) >= 200
    assert got == python_documentation(20)


def test_describe_suite(tiny):
    lines = describe_suite(tiny.suite.path).splitlines()
    assert lines[0] == f"suite {tiny.suite.path.name}" and len(lines) == 6
    # 4 items once, 1 four times and 1 drip twelve times, of each kind
    assert re.search(r"9 checkpoints, 18 items planted 60 times", lines[2])


# --- two processes, and one that dies ------------------------------------------------------------

START = """
import sys, time
import workbench.suite as suite
SPEC = suite.Specification(text="")
marker, corpus, action = sys.argv[1:4]
def make(folder, spec, corpus, progress):
    open(marker, "a").write("trained ")
    (folder / "half").write_text("half")
    time.sleep(1.0)
    exec(action)
    (folder / "spec.json").write_text("{}")
suite._make = make
print(suite.ensure_suite(corpus, SPEC, progress=False))
"""


def start(marker, corpus, action="pass"):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(START), str(marker), corpus, action],
        cwd=Path(__file__).parent.parent,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_at_once_train_once(tmp_path, corpus_file):
    both = [start(tmp_path / "marker", corpus_file) for _ in range(2)]
    paths = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert (tmp_path / "marker").read_text() == "trained "
    assert len(paths) == 1 and (Path(paths.pop()) / "spec.json").is_file()


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_training_leaves_nothing_that_counts(tmp_path, corpus_file):
    killed = start(tmp_path / "marker", corpus_file, "import os; os.kill(os.getpid(), 9)")
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    suites = cache_folder() / "suites"
    left = [p for p in suites.iterdir() if p.is_dir()]
    assert left and all(p.name.startswith(".") for p in left)
    process = start(tmp_path / "marker", corpus_file)
    path = Path(process.communicate(timeout=120)[0].strip())
    assert process.returncode == 0 and json.loads((path / "spec.json").read_text()) == {}
    assert [p.name for p in suites.iterdir() if p.is_dir()] == [path.name]
