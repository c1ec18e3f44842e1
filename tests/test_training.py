"""One training loop: what is planted where, that it happened, and that it can be resumed."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.conftest import neox
from workbench.table import InputError
from workbench.training import (
    TextStream,
    Trainer,
    fingerprint,
    load_states,
    plant,
    read_ledger,
    save_states,
    schedule_exposures,
    sequence_loss,
    spread,
    train,
)

ITEMS = pd.DataFrame(
    {"item": ["a", "b", "c"], "first": [2, 1, 5], "last": [5, 5, 5], "dose": [2, 5, 1]}
)
TEXTS = {"a": np.array([7, 8, 9, 10]), "b": np.array([1, 2, 3, 4]), "c": np.array([5, 5, 6, 6])}


def stream(rows=4, context=8, tokens=200, seed=0):
    return TextStream(np.arange(20, 20 + tokens) % 300, rows, context, seed)


# --- the stream ----------------------------------------------------------------------------------


def test_the_stream_covers_each_window_once_an_epoch():
    # 200 tokens are 25 windows of 8, 6 batches of 4 an epoch; one window waits for the next epoch
    text = stream()
    for epoch in range(3):
        batches = [text.batch(6 * epoch + u) for u in range(1, 7)]
        starts = np.concatenate([b[:, 0] for b in batches])
        assert len(set(starts.tolist())) == 24 and ((starts - 20) % 8 == 0).all()
        assert all((np.diff(b, axis=1) == 1).all() for b in batches)  # whole windows, in order


def test_the_stream_is_a_function_of_the_update():
    np.testing.assert_array_equal(stream().batch(9), stream().batch(9))
    assert (stream().batch(1) != stream().batch(7)).any()  # shuffled anew in the second epoch
    assert (stream().batch(1) != stream(seed=1).batch(1)).any()


def test_writing_into_a_batch_leaves_the_text_alone():
    text = stream()
    before = text.tokens.copy()
    text.batch(1)[:] = -1
    np.testing.assert_array_equal(text.tokens, before)


def test_one_batch_of_text_is_the_least():
    assert stream(tokens=32).batch(5).shape == (4, 8)
    with pytest.raises(InputError) as error:
        stream(tokens=31)
    assert str(error.value) == (
        "TextStream: 31 tokens of text do not fill one batch of 4 x 8; give a longer text"
    )


# --- the schedule --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "dose", "updates"),
    [
        (1, 8, 4, [2, 4, 6, 8]),
        (5, 8, 1, [8]),
        (1, 8, 3, [3, 6, 8]),  # 8 - 5, 8 - 2, 8: floor of 16/3 and 8/3
        (3, 4, 5, [3, 3, 4, 4, 4]),  # 4 - (1, 1, 0, 0, 0): floor of (8, 6, 4, 2, 0) / 5
        (6, 6, 3, [6, 6, 6]),
    ],
)
def test_spread_by_hand(first, last, dose, updates):
    assert spread(first, last, dose).tolist() == updates


@given(st.integers(1, 50), st.integers(0, 60), st.integers(1, 200))
def test_spread_is_even_and_ends_on_the_last(first, width, dose):
    got = spread(first, first + width, dose)
    assert len(got) == dose and got[-1] == first + width and got[0] >= first
    counts = np.bincount(got - first, minlength=width + 1)
    if dose >= width + 1:
        assert counts.max() - counts.min() <= 1  # as evenly as can be
    else:
        assert counts.max() == 1 and np.ptp(np.diff(got)) <= 1 if dose > 1 else True


def test_the_schedule_by_hand():
    # a twice over updates 2..5: at 3 and 5; b in each of 1..5; c once, at 5
    got = schedule_exposures(ITEMS, rows=4, context=8, length=4, seed=0)
    assert list(got.columns) == ["update", "row", "offset", "item"]
    assert got.groupby("item")["update"].agg(list).to_dict() == {
        "a": [3, 5],
        "b": [1, 2, 3, 4, 5],
        "c": [5],
    }


def test_the_schedule_is_a_function_of_items_and_seed():
    one = schedule_exposures(ITEMS, rows=4, context=8, length=4, seed=0)
    again = schedule_exposures(ITEMS, rows=4, context=8, length=4, seed=0)
    pd.testing.assert_frame_equal(one, again)
    other = schedule_exposures(ITEMS, rows=4, context=8, length=4, seed=1)
    assert not one.equals(other)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3), st.integers(1, 4)), min_size=1,
             max_size=5),
    st.integers(0, 99),
)  # fmt: skip
def test_no_two_exposures_overlap(plans, seed):
    items = pd.DataFrame(
        [(f"i{n}", f, f + w, d) for n, (f, w, d) in enumerate(plans)],
        columns=["item", "first", "last", "dose"],
    )
    got = schedule_exposures(items, rows=8, context=11, length=4, seed=seed)
    assert len(got) == items["dose"].sum()
    assert (got["row"] < 8).all() and (got["offset"] + 4 <= 11).all()
    cells = [
        (e.update, e.row, position)
        for e in got.itertuples()
        for position in range(e.offset, e.offset + 4)
    ]
    assert len(cells) == len(set(cells))


def test_too_many_exposures_for_one_update_are_refused():
    items = pd.DataFrame({"item": ["a"], "first": [3], "last": [3], "dose": [9]})
    with pytest.raises(InputError) as error:
        schedule_exposures(items, rows=4, context=8, length=4, seed=0)
    assert str(error.value) == (
        "schedule_exposures: update 3 would hold 9 exposures, a batch has 8 slots; plant fewer, "
        "or over more updates"
    )
    assert len(schedule_exposures(items.assign(dose=8), rows=4, context=8, length=4, seed=0)) == 8


# --- planting and the ledger ---------------------------------------------------------------------


def test_plant_by_hand():
    batch = np.zeros((2, 8), int)
    exposures = pd.DataFrame(
        {"update": [1, 1], "row": [0, 1], "offset": [4, 0], "item": ["a", "b"]}
    )
    got = plant(batch, exposures, TEXTS)
    assert got.tolist() == [[0, 0, 0, 0, 7, 8, 9, 10], [1, 2, 3, 4, 0, 0, 0, 0]]
    assert not batch.any()
    ledger = read_ledger(got, exposures, TEXTS)
    assert ledger["hash"].to_list() == [fingerprint(TEXTS["a"]), fingerprint(TEXTS["b"])]


def test_a_fingerprint_is_of_the_numbers_not_of_their_storage():
    assert fingerprint(np.array([1, 2], np.int32)) == fingerprint(np.array([1, 2], np.int64))
    assert fingerprint(np.array([1, 2])) != fingerprint(np.array([2, 1]))
    assert fingerprint(np.arange(10)[::2]) == fingerprint(np.array([0, 2, 4, 6, 8]))


def small(seed=0):
    return Trainer(neox(seed), learning_rate=1e-2, warmup=2)


SCHEDULE = schedule_exposures(ITEMS, rows=4, context=8, length=4, seed=0)


def test_the_ledger_is_the_schedule():
    ledger = train(small(), stream().batch, until=6, exposures=SCHEDULE, texts=TEXTS)
    pd.testing.assert_frame_equal(ledger[list(SCHEDULE.columns)], SCHEDULE)
    assert ledger["hash"].to_list() == [fingerprint(TEXTS[i]) for i in ledger["item"]]


def test_the_trainer_sees_what_the_ledger_says(monkeypatch):
    seen = {}
    step = Trainer.step

    def watched(self, batch):
        seen[self.update + 1] = batch.copy()
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", watched)
    ledger = train(small(), stream().batch, until=6, exposures=SCHEDULE, texts=TEXTS)
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]
    for e in ledger.itertuples():
        np.testing.assert_array_equal(seen[e.update][e.row, e.offset : e.offset + 4], TEXTS[e.item])
        seen[e.update][e.row, e.offset : e.offset + 4] = -1
    for update, batch in seen.items():  # and what is not planted is the stream
        there = batch != -1
        np.testing.assert_array_equal(batch[there], stream().batch(update)[there])


def test_training_fails_if_an_injection_does_not_happen(monkeypatch):
    import workbench.training as training

    def forgetful(batch, exposures, texts):
        return batch if (exposures["update"] == 3).all() else plant(batch, exposures, texts)

    monkeypatch.setattr(training, "plant", forgetful)
    first = SCHEDULE[SCHEDULE["update"] == 3].iloc[0]
    with pytest.raises(RuntimeError) as error:
        train(small(), stream().batch, until=6, exposures=SCHEDULE, texts=TEXTS)
    assert str(error.value) == (
        f"train: update 3 should hold {first['item']} at row {first['row']}, "
        f"offset {first['offset']}, but the batch holds other tokens there"
    )


def test_without_exposures_the_ledger_is_empty():
    ledger = train(small(), stream().batch, until=2)
    assert list(ledger.columns) == ["update", "row", "offset", "item", "hash"] and ledger.empty


# --- training ------------------------------------------------------------------------------------


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.module.parameters()])


def test_stops_and_progress_come_in_order():
    calls, modes = [], []
    trainer = small()

    def stop(step):
        calls.append(("stop", step))
        modes.append(trainer.module.training)

    train(
        trainer,
        stream().batch,
        until=3,
        stops=[0, 2, 3],
        at_stop=stop,
        progress=lambda update, loss: calls.append(("done", update)),
    )
    done = [("done", u) for u in (1, 2, 3)]
    assert calls == [("stop", 0), *done[:2], ("stop", 2), done[2], ("stop", 3)]
    assert modes[1:] == [False, False] and not trainer.module.training


def test_the_same_run_twice_is_the_same_to_the_bit():
    one, two = small(), small()
    for trainer in (one, two):
        train(trainer, stream().batch, until=5, exposures=SCHEDULE, texts=TEXTS)
    assert torch.equal(weights(one), weights(two))


def test_a_fork_continues_to_the_bit():
    straight, forked = small(), small(seed=9)
    states = []
    train(
        straight,
        stream().batch,
        until=8,
        stops=[3],
        at_stop=lambda step: states.append(straight.state()),
    )
    for _ in range(2):  # the state is a copy: it can be forked from again
        forked.restore(states[0])
        assert forked.update == 3
        train(forked, stream().batch, until=8)
        assert torch.equal(weights(forked), weights(straight))
    assert states[0]["update"] == 3


def test_warmup_is_linear_then_constant():
    trainer = Trainer(neox(), learning_rate=1.0, warmup=4)
    rates = []
    for update in range(1, 7):
        trainer.step(stream().batch(update))
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    trainer = small()
    with torch.no_grad():
        trainer.module.get_input_embeddings().weight[25] = torch.nan
    before = weights(trainer)
    with pytest.raises(FloatingPointError) as error:
        train(trainer, stream(tokens=32).batch, until=3)
    assert str(error.value) == "train: the loss is nan at update 1; lower the learning rate"
    torch.testing.assert_close(weights(trainer), before, rtol=0, atol=0, equal_nan=True)


def test_the_loss_is_the_mean_over_predicted_tokens():
    module, ids = neox(), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    log_p = module(input_ids=ids).logits.log_softmax(-1)
    each = [[-log_p[r, t, ids[r, t + 1]].item() for t in range(3)] for r in range(2)]
    assert sequence_loss(module, ids).item() == pytest.approx(np.mean(each), abs=1e-6)
    # padding: the last token of row one and the last two of row two are left out
    weight = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    want = np.mean([each[0][0], each[0][1], each[1][0]])
    assert sequence_loss(module, ids, weight).item() == pytest.approx(want, abs=1e-6)


def test_a_step_returns_the_loss_before_it_and_learns():
    trainer, batch = small(), stream().batch(1)
    before = sequence_loss(trainer.module, torch.as_tensor(batch)).item()
    assert trainer.step(batch) == pytest.approx(before, abs=1e-6)
    for _ in range(30):
        loss = trainer.step(batch)
    assert loss < before / 2


# --- states on disk ------------------------------------------------------------------------------


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_states_come_back_from_disk_bit_by_bit_and_training_goes_on(tmp_path):
    trainer, place = small(), tmp_path / "state"
    train(trainer, stream().batch, until=3)
    early = trainer.state()
    trainer.step(stream().batch(4))
    later = trainer.state()
    save_states(place, {"early": early, "later": later}, about={"seed": 4, "half": None})
    states, about = load_states(place)
    assert about == {"seed": 4, "half": None} and list(states) == ["early", "later"]
    for name, kept in (("early", early), ("later", later)):
        assert states[name]["update"] == kept["update"]
        assert same(states[name]["weights"], kept["weights"])
        moments, found = kept["optimizer"]["state"], states[name]["optimizer"]["state"]
        assert moments.keys() == found.keys() and len(moments) > 4
        assert all(same(moments[index], found[index]) for index in moments)
    resumed = small(seed=1)
    resumed.restore(states["early"])
    resumed.step(stream().batch(4))
    assert same(resumed.state()["weights"], later["weights"])
    assert resumed.update == 4


def test_a_state_without_moments_is_one_of_before_the_first_update(tmp_path):
    # AdamW keeps nothing before its first step
    save_states(tmp_path / "state", {"start": small().state()})
    states, about = load_states(tmp_path / "state")
    assert about == {} and states["start"]["optimizer"]["state"] == {}
    resumed = Trainer(small(seed=1).module, 5.0)
    resumed.restore(states["start"])
    assert resumed.update == 0 and resumed.optimizer.param_groups[0]["lr"] == small().learning_rate


def test_a_damaged_state_is_refused(tmp_path):
    place = tmp_path / "state"
    save_states(place, {"start": small().state()})
    whole = place.read_bytes()
    foreign = tmp_path / "foreign"
    save_file({"weight": torch.zeros(2)}, foreign)
    place.write_bytes(whole[:-100])
    for damaged in (place, foreign, tmp_path / "absent"):
        with pytest.raises(InputError, match=rf"^load_states: {damaged} cannot be read \(.+\)$"):
            load_states(damaged)
