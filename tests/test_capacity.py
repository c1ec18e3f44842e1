import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from tests.conftest import Numbers, bigram
from workbench import capacity
from workbench.capacity import (
    Run,
    capacity_runs,
    load_capacity,
    memorized_bits,
    random_sequences,
    rate,
    train_run,
)
from workbench.models import LanguageModel
from workbench.table import InputError
from workbench.training import Trainer

# learns in a second, and has an uneven number of updates so that halves are not whole by luck
SMALL = Run(width=4, sequences=6, seed=3, updates=21, vocabulary=8, length=4, warmup=2)


def refuses(message):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


# --- bits ----------------------------------------------------------------------------------------


def test_memorized_bits_by_hand():
    # two sequences of one token of four, said with 1/2 and 1/4: 2 * 2 bits of data less 1 + 2
    assert memorized_bits(np.log([[0.5], [0.25]]), 4) == pytest.approx(1.0, abs=1e-12)
    # 3 sequences of 5 tokens of 8: nothing at 1/8 each, all 45 bits at 1, below 0 if worse
    assert memorized_bits(np.full((3, 5), np.log(1 / 8)), 8) == pytest.approx(0.0, abs=1e-12)
    assert memorized_bits(np.zeros((3, 5)), 8) == 45.0
    assert memorized_bits(np.full((3, 5), np.log(1 / 16)), 8) == pytest.approx(-15.0, abs=1e-12)


def test_every_token_is_scored_and_the_beginning_is_not():
    run = replace(SMALL, sequences=1)  # 0..7 are tokens, 8 begins
    tokens = np.array([[8, 5, 2, 7, 1]])
    none = np.zeros((9, 9))
    none[:, 8] = -200.0  # nothing but the eight tokens, all alike
    assert capacity._held(bigram(none), tokens, run) == pytest.approx(0.0, abs=1e-5)
    whole = np.full((9, 9), -200.0)
    whole[[8, 5, 2, 7], [5, 2, 7, 1]] = 0.0
    # one sequence known by heart: 4 tokens of 3 bits
    assert capacity._held(bigram(whole), tokens, run) == 12.0
    whole[8] = np.where(np.arange(9) < 8, 0.0, -200.0)  # and one that does not know the first
    assert capacity._held(bigram(whole), tokens, run) == pytest.approx(9.0, abs=1e-5)


def test_bits_agree_with_a_loop_over_forward_passes():
    run = replace(SMALL, heads=1)
    module, tokens = capacity._new_module(run).eval(), random_sequences(run)
    total = 0.0
    for sequence in tokens:
        for at in range(1, len(sequence)):
            with torch.no_grad():
                logits = module(torch.tensor(sequence[None, :at])).logits[0, -1].double()
            total -= (logits.log_softmax(-1)[sequence[at]] / math.log(2)).item()
    model = LanguageModel(module, Numbers(), "tiny")
    assert capacity._held(model, tokens, run) == pytest.approx(6 * 4 * 3 - total, abs=1e-4)


def test_the_most_a_model_can_hold_by_hand():
    # 8 - 4 * 2 bits for four different ones; with two alike the entropy is 1.5 bits each
    run = replace(SMALL, sequences=4, length=1, vocabulary=4)
    assert capacity._ceiling(run, np.array([[4, 0], [4, 1], [4, 2], [4, 3]])) == 0.0
    assert capacity._ceiling(run, np.array([[4, 0], [4, 0], [4, 2], [4, 3]])) == 2.0
    assert capacity._ceiling(replace(run, sequences=1), np.array([[4, 3]])) == 2.0


def test_sequences_are_uniform_and_drawn_from_the_seed():
    run = replace(SMALL, sequences=2000, length=8)
    tokens = random_sequences(run)
    assert tokens.shape == (2000, 9) and (tokens[:, 0] == 8).all()
    count = np.bincount(tokens[:, 1:].ravel(), minlength=9)
    # 16,000 draws: 2,000 of each, standard deviation 42; five of them is one in 200,000
    assert count[8] == 0 and np.abs(count[:8] - 2000).max() < 210
    np.testing.assert_array_equal(tokens, random_sequences(run))
    assert (tokens != random_sequences(replace(run, seed=4))).any()
    np.testing.assert_array_equal(tokens, random_sequences(replace(run, width=8, updates=5)))


# --- one run -------------------------------------------------------------------------------------


def test_rate_by_hand():
    run = replace(SMALL, learning_rate=1.0, warmup=2, updates=10)
    # ten updates: warm-up over two, constant to the sixth, then a fifth less each
    told = [rate(run, update, 10) for update in range(1, 11)]
    np.testing.assert_allclose(told, [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert rate(replace(run, warmup=0), 1, 10) == 1.0
    # five: constant to the third
    np.testing.assert_allclose([rate(run, u, 5) for u in range(3, 6)], [1, 2 / 3, 1 / 3])


@pytest.fixture(scope="module")
def whole():
    return train_run(SMALL)


def test_the_fork_is_the_run_of_half_the_updates(whole):
    alone = train_run(replace(SMALL, updates=10))
    assert whole["half"] == alone["memorized_bits"]
    assert whole["memorized_bits"] > whole["half"] > 0


def test_training_is_the_plain_loop(whole):
    # every sequence is in every batch, so only the order of rows in it is drawn
    module, tokens = capacity._new_module(SMALL), random_sequences(SMALL)
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for update in range(1, 22):
        optimizer.param_groups[0]["lr"] = 0.03 * min(1, update / 2, (22 - update) / 9)
        logits = module(torch.tensor(tokens)).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.tensor(tokens[:, 1:]).flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    held = capacity._held(LanguageModel(module, None, "plain"), tokens, SMALL)
    assert whole["memorized_bits"] == pytest.approx(held, abs=0.05)


def test_a_model_large_enough_reaches_the_ceiling_and_never_passes_it():
    run = replace(SMALL, width=16, sequences=4, length=6, updates=160)
    held = train_run(run)["memorized_bits"]
    ceiling = capacity._ceiling(run, random_sequences(run))
    assert ceiling == 4 * 6 * 3 - 4 * 2
    assert 0.97 * ceiling < held <= ceiling


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train_run(replace(SMALL, updates=4))
    assert torch.equal(state, torch.get_rng_state())


def test_a_batch_smaller_than_the_data_sees_all_of_it(monkeypatch):
    seen = []
    step = Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda self, batch: seen.append(batch) or step(self, batch)
    )
    train_run(replace(SMALL, rows=2, updates=6))
    rows_seen = {tuple(row) for batch in seen[:3] for row in batch}
    assert rows_seen == {tuple(row) for row in random_sequences(SMALL)}


# --- interrupted ---------------------------------------------------------------------------------


class Stop(Exception):
    pass


def interrupted(run, place, after):
    """Train with a checkpoint after every update and die after ``after`` of them."""
    done = []

    def progress(tokens):
        done.append(tokens)
        if len(done) == after:
            raise Stop

    with pytest.raises(Stop):
        train_run(run, place, progress)


# stable to update 6 of the half's 10, then its four updates of decay, then 7 to 21
@pytest.mark.parametrize("after", [2, 6, 7, 9, 11, 12, 24])
def test_a_killed_run_goes_on_to_the_same_numbers(whole, tmp_path, monkeypatch, after):
    monkeypatch.setattr(capacity, "CHECKPOINT", -1.0)
    place = tmp_path / "checkpoint"
    interrupted(SMALL, place, after)
    again = []
    assert train_run(SMALL, place, again.append) == whole
    # what was done before, and the rest: all of the work, none of it twice
    assert sum(again) == SMALL.work == 25 * 6 * 4
    assert len(again) == 1 + 25 - (after - 1)


def test_a_damaged_checkpoint_is_left_with_a_warning(whole, tmp_path):
    place = tmp_path / "checkpoint"
    place.write_bytes(b"no checkpoint")
    with pytest.warns(UserWarning, match=r"checkpoint .* cannot be read .*; from the beginning$"):
        assert train_run(SMALL, place) == whole


def test_a_loss_that_is_not_finite_names_the_run(monkeypatch):
    def breaks(self, batch):
        raise FloatingPointError("train: the loss is nan at update 1; lower the learning rate")

    monkeypatch.setattr(Trainer, "step", breaks)
    with refuses(
        "load_capacity: train: the loss is nan at update 1; lower the learning rate of the run of "
        f"{SMALL}"
    ):
        train_run(SMALL)


# --- an experiment -------------------------------------------------------------------------------

PAIR = [SMALL, replace(SMALL, sequences=2)]


def value(table, metric, sequences):
    chosen = (table["metric"] == metric) & (table["sequences"] == sequences)
    return table.loc[chosen, "value"].item()


def test_the_table_of_an_experiment(whole):
    table = load_capacity(PAIR, progress=False)
    assert value(table, "memorized_bits", 6) == whole["memorized_bits"]
    gain = 1 - whole["half"] / whole["memorized_bits"]
    assert value(table, "doubling_gain", 6) == pytest.approx(gain, abs=1e-12)
    first = table.iloc[0]
    # blocks of width 4: q, k, v 4 * 12 + 12; out 16 + 4; up 64 + 16; down 64 + 4; three norms of 8
    assert first["non_embedding"] == 60 + 20 + 80 + 68 + 24
    assert first["parameters"] == 252 + 2 * 9 * 4
    assert first["dataset_bits"] == 6 * 4 * 3
    assert first["ceiling_bits"] == pytest.approx(72 - 6 * math.log2(6))
    assert table.attrs["passport"]["cpu_seconds"] >= 0
    told = table[table["metric"] == "memorized_bits"]
    assert (told["value"] <= told["ceiling_bits"]).all() and (told["step"] == 21).all()


def test_a_run_that_memorized_nothing_has_no_gain():
    made = capacity._rows(SMALL, {"memorized_bits": -1.0, "half": -2.0}).set_index("metric")
    assert made.loc["memorized_bits", "value"] == -1.0
    assert math.isnan(made.loc["doubling_gain", "value"])
    assert made.loc["doubling_gain", "reason"] == "nothing was memorized"


def test_what_is_cached_is_not_trained_again_and_a_killed_experiment_goes_on(monkeypatch):
    trained = []
    train = capacity.train_run

    def once(run, *others):
        if len(trained) == 1 and stopping:
            raise KeyboardInterrupt
        trained.append(run)
        return train(run, *others)

    monkeypatch.setattr(capacity, "CHECKPOINT", -1.0)
    monkeypatch.setattr(capacity, "train_run", once)
    stopping = True
    with pytest.raises(KeyboardInterrupt):
        load_capacity(PAIR, progress=False)
    assert trained == PAIR[:1]
    stopping = False
    table = load_capacity(PAIR, progress=False)
    assert trained == PAIR
    left = {place.suffix for place in capacity._place(SMALL).parent.iterdir()}
    assert left == {".parquet", ".sums"}
    pd.testing.assert_frame_equal(load_capacity(PAIR, progress=False), table)
    assert trained == PAIR


def test_a_damaged_cache_file_is_made_again_with_a_warning(whole):
    load_capacity(PAIR[:1], progress=False)
    place = capacity._place(SMALL)
    place.write_bytes(place.read_bytes()[:-200])
    with pytest.warns(UserWarning) as warned:
        table = load_capacity(PAIR[:1], progress=False)
    (said,) = [str(each.message) for each in warned]
    assert re.match(
        r"load_capacity: .* is not what was written \(its hash differs\); training again$", said
    )
    assert value(table, "memorized_bits", 6) == whole["memorized_bits"]
    pd.testing.assert_frame_equal(load_capacity(PAIR[:1], progress=False), table)


def test_each_setting_has_a_place_of_its_own():
    one = replace(SMALL, heads=1)
    changed = [replace(one, **{name: getattr(one, name) * 2}) for name in vars(one)]
    assert len({run.hash for run in [one, *changed]}) == 1 + len(changed)


def test_sizes():
    mini, default, full = (capacity_runs(size) for size in ("mini", "default", "full"))
    assert {run.width for run in default} == {8, 16} and len(default) == 20
    for runs in (mini, default, full):
        load = [run.sequences * run.length * math.log2(run.vocabulary) for run in runs]
        assert len({run.hash for run in runs}) == len(runs)
        # some data sets are far above what published models hold of it, some below
        parameters = [12 * run.width**2 + 2 * run.vocabulary * run.width for run in runs]
        share = np.array(load) / np.array(parameters)
        assert share.min() < 1.5 and share.max() > 7


def test_what_an_experiment_refuses():
    with refuses("capacity_runs: size 'huge'; choose mini, default, full"):
        load_capacity("huge")
    with refuses("load_capacity: no runs; give some, or a size such as default"):
        load_capacity([])
    with refuses("load_capacity: the same run is asked for twice; leave one out"):
        load_capacity([SMALL, SMALL])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sequences": 0}, "Run: sequences is 0, needs at least 1"),
        ({"vocabulary": 1}, "Run: vocabulary is 1, needs at least 2"),
        (
            {"updates": 3},
            "Run: updates is 3, needs at least 4: half of them, too, must end with a falling "
            "learning rate",
        ),
        (
            {"width": 6},
            "Run: a width of 6 does not give each of 2 heads an even share; rotary positions need "
            "one",
        ),
    ],
)
def test_what_a_run_refuses(change, message):
    with refuses(message):
        replace(SMALL, **change)
