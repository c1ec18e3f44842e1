"""The recorder: what it measures, when, and that the training does not notice."""

import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench.recorder as recorder_module
from tests.conftest import (
    ENGLISH,
    Bigram,
    Numbers,
    bigram,
    byte_level_tokenizer,
    frame,
    neox,
    reciter,
)
from workbench.models import LanguageModel
from workbench.recorder import (
    LAGS,
    LEDGER,
    TABLE,
    RetentionCallback,
    RetentionRecorder,
    ask,
    cut_texts,
    probe_texts,
    undisturbed,
    unwrapped,
)
from workbench.table import InputError, load, validate
from workbench.training import fingerprint

ROOT = Path(__file__).parent.parent
HIT = np.log(np.exp(5) + 31) - 5  # .1896915 nats: a reciter's next number, of 32
MISS = HIT + 5
FOREVER = float("inf")


def refuses(message):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


@contextlib.contextmanager
def says(message):
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        yield


@pytest.fixture(scope="module")
def words():
    return byte_level_tokenizer(ENGLISH)


@pytest.fixture
def english():
    return frame(ENGLISH, ["studied"] * 3 + ["control"] * 3)


def recording(folder, items=None, model=None, **options):
    """A recorder of two numbers' texts, without a bound unless one is given."""
    items = frame(["1 2 3 4", "5 6 9 10"], ["studied", "control"]) if items is None else items
    options = {"budget": FOREVER, "lags": (0, 1, 3), "run": "fake"} | options
    return RetentionRecorder(model or reciter(), items, folder=folder, **options)


def walk(recorder, updates, *, marks=(), batches=None):
    with recorder:
        for update in range(1, updates + 1):
            if batches and update in batches:
                recorder.saw(batches[update])
            recorder.step(update)
            if update in marks:
                recorder.mark(f"mark {update}")
    return recorder.table


# --- what is measured ----------------------------------------------------------------------------


def values(table, item="i0", **where):
    part = table[table["item"] == item]
    for name, value in where.items():
        part = part[part[name] == value]
    return dict(zip(part["metric"], part["value"], strict=True))


def test_measures_by_hand():
    # The reciter says t + 1. i0 "3 4 5 6": three hits. i1 "3 4 9 10": hit, miss, hit: loss
    # (2 * .1896915 + 5.1896915) / 3 = 1.8563582. Half of four tokens is a prompt of two, so that
    # i1 must give 9 and 10 and says 5 for 9; given three tokens it must give 10 alone, and does.
    items = frame(["3 4 5 6", "3 4 9 10"])
    table = probe_texts(reciter(), items)
    assert values(table, "i0") == {
        "loss": pytest.approx(HIT, abs=1e-6),
        "top1": 1,
        "extractable": 1,
    }
    i1 = {
        "loss": pytest.approx(1.8563582, abs=1e-6),
        "top1": pytest.approx(2 / 3),
        "extractable": 0,
    }
    assert values(table, "i1") == i1
    assert values(probe_texts(reciter(), items, prefix=3), "i1")["extractable"] == 1
    assert values(probe_texts(reciter(), items, prefix=2), "i1")["extractable"] == 0


def test_an_odd_text_is_prompted_with_the_lesser_half():
    # three tokens: the prompt is one, so that both others must be right
    table = probe_texts(reciter(), frame(["3 9 10", "3 4 5", "7 8"]))
    assert [values(table, i)["extractable"] for i in ("i0", "i1", "i2")] == [0, 1, 1]


def test_recognition_by_hand_with_a_tie():
    # i0 (all hits) against 9 9 9 (all misses): 1; against 7 8 (a hit, the same mean): 1/2.
    # i1 (all misses) against 3 4: 0. Lengths differ, means decide.
    items = frame(["1 2 3 4", "9 9 9"])
    foils = pd.DataFrame(
        [("i0", "far", "9 9 9"), ("i0", "near", "7 8"), ("i1", "far", "3 4")],
        columns=["item", "foil", "text"],
    )
    table = probe_texts(reciter(), items, foils=foils)
    won = table[table["metric"] == "recognition"]
    told = {(r.item, r.foil): r.value for r in won.itertuples()}
    assert told == {("i0", "far"): 1.0, ("i0", "near"): 0.5, ("i1", "far"): 0.0}
    loss = {(r.item, r.foil): r.value for r in table[table["metric"] == "loss"].itertuples()}
    assert loss["i0", "far"] == pytest.approx(MISS, abs=1e-6)
    assert loss["i0", "itself"] == loss["i0", "near"] == pytest.approx(HIT, abs=1e-6)
    assert loss["i1", "itself"] == pytest.approx(MISS, abs=1e-6)


def test_measures_are_those_of_a_plain_loop_over_logits(tiny):
    model = tiny.suite.checkpoints("base").at(16)
    items = tiny.suite.items("base").head(9)
    foils = pd.DataFrame({"item": items["item"], "foil": "next", "text": items["text"].shift(-1)})
    table = probe_texts(model, items, foils=foils.iloc[:-1])
    loss = {}
    for item, text in zip(items["item"], items["text"], strict=True):
        ids = model.tokenizer(text)["input_ids"][: model.context]
        with torch.no_grad():
            log_p = model.module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        right = [int(log_p[t - 1].argmax()) == ids[t] for t in range(1, len(ids))]
        loss[item] = -np.mean([float(log_p[t - 1, ids[t]]) for t in range(1, len(ids))])
        got = values(table[table["foil"] == "itself"], item)
        assert got["loss"] == pytest.approx(loss[item], abs=2e-5)
        assert got["top1"] == pytest.approx(np.mean(right))
        assert got["extractable"] == all(right[len(ids) // 2 - 1 :])
    won = table[table["metric"] == "recognition"].set_index("item")["value"]
    for item, other in zip(items["item"], items["item"].shift(-1).iloc[:-1], strict=False):
        assert won[item] == float(loss[item] < loss[other])


def test_probe_texts_takes_checkpoints_and_keeps_kind(tiny):
    source = tiny.suite.checkpoints("base").select([0, 16])
    items = tiny.suite.items("base").head(6)
    table = probe_texts(source, items)
    assert sorted(table["step"].unique()) == [0, 16]
    last = probe_texts(source.at(16), items)
    pd.testing.assert_series_equal(
        table[table["step"] == 16]["value"].reset_index(drop=True), last["value"]
    )
    assert dict(zip(table["item"], table["kind"], strict=True)) == dict(
        zip(items["item"], items["kind"], strict=True)
    )


def test_short_texts_are_dropped_with_their_foils_and_long_ones_cut():
    long = " ".join(map(str, [1, 2, 3, 4] * 20))  # 80 tokens; the context is 64
    items = frame(["1 2 3", "7", long])
    foils = pd.DataFrame({"item": items["item"], "foil": "f", "text": ["1 3", "5 6", long]})
    with pytest.warns(UserWarning, match="dropped 1 of 3 texts"):
        table = probe_texts(reciter(), items, foils=foils)
    assert set(table["item"]) == {"i0", "i2"} and table.attrs["dropped"] == 1
    # 63 guesses over 1 2 3 4 1 2 ...: of every four one (4 -> 5, not 1) is wrong, so 15 of 63
    top1 = values(table[table["foil"] == "itself"], "i2")["top1"]
    assert top1 == pytest.approx(48 / 63)


def test_a_model_that_gives_nan_is_refused():
    with refuses(
        "probe_texts: loss of item 'i0' is not a number at step 0 of fake; the model's weights or "
        "its dtype give NaN or Inf"
    ):
        probe_texts(bigram(np.full((32, 32), np.nan)), frame(["1 2 3"]))


@pytest.mark.parametrize(
    ("foils", "message"),
    [
        ([("i0", "f", "9")], "the f foil of item 'i0' has 1 token(s), and at least 2 are needed; leave it out"),
        ([("x", "f", "1 2")], "1 foils belong to none of the items (first: 'x'); make the foils from these items"),
        ([("i0", "f", "1 2"), ("i0", "f", "1 3")], "item 'i0' has several f foils; keep one"),
    ],
)  # fmt: skip
def test_foils_that_are_refused(foils, message):
    foils = pd.DataFrame(foils, columns=["item", "foil", "text"])
    with refuses(f"probe_texts: {message}"):
        probe_texts(reciter(), frame(["1 2 3"]), foils=foils)
    with refuses(
        "probe_texts: the foils have no column 'foil'; make_foils gives item, foil and text"
    ):
        probe_texts(reciter(), frame(["1 2 3"]), foils=foils.drop(columns="foil"))


def test_a_prompt_of_no_tokens_is_refused():
    with refuses("probe_texts: prefix is 0, but must be at least 1"):
        probe_texts(reciter(), frame(["1 2 3"]), prefix=0)


# --- the training does not notice ----------------------------------------------------------------


def trained(words, folder, *, record: bool):
    """Eight updates with dropout; weights, moments and random state at the end."""
    module = neox(hidden_dropout=0.2, attention_dropout=0.1, layers=2).train()
    module.gpt_neox.layers[0].eval()  # its owner keeps one layer's dropout off
    module.gpt_neox.embed_in.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    ids = [torch.tensor([words(text)["input_ids"][:16]]) for text in ENGLISH]
    items = frame([words.decode(each[0]) for each in ids], ["studied"] * 3 + ["control"] * 3)
    recorder = RetentionRecorder(
        module, items, tokenizer=words, folder=folder, budget=FOREVER, lags=range(20)
    )
    torch.manual_seed(3)
    with recorder if record else contextlib.nullcontext():
        for update in range(1, 9):
            module(input_ids=ids[update % 6], labels=ids[update % 6]).loss.backward()
            if record:
                recorder.saw(ids[update % 6])
                recorder.step(update)  # between gradient and step: it must leave the gradient too
            optimizer.step()
            optimizer.zero_grad()
    flags = [each.training for each in module.modules()]
    return module, optimizer, flags, torch.get_rng_state(), recorder


def test_a_recorded_training_is_the_same_bit_by_bit(words, tmp_path):
    plain = trained(words, tmp_path / "a", record=False)
    noted = trained(words, tmp_path / "b", record=True)
    assert noted[4].steps == list(range(9))
    for (name, one), other in zip(
        plain[0].state_dict().items(), noted[0].state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    for one, other in zip(plain[1].state.values(), noted[1].state.values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert plain[2] == noted[2] and False in noted[2] and True in noted[2]
    assert torch.equal(plain[3], noted[3])
    assert not noted[0].gpt_neox.embed_in.weight.requires_grad


class Stubborn(torch.nn.Module):
    """Does more than set a flag when its mode is changed."""

    def train(self, mode=True):
        raise AssertionError("the mode was changed by train()")


def test_undisturbed_puts_everything_back_after_an_error():
    module = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 2), Stubborn())
    module[1].training = False
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        contextlib.suppress(ZeroDivisionError),
        undisturbed(module),
    ):
        assert not any(each.training for each in module.modules())
        assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        torch.rand(3)
        raise ZeroDivisionError
    assert [each.training for each in module.modules()] == [True, True, False, True]
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


class Caching(Bigram):
    """Makes a tensor in its first forward pass and multiplies by it ever after."""

    kept = None

    def base_model(self, input_ids, use_cache=False):
        if self.kept is None:
            self.kept = torch.ones(self.head.in_features)
        out = super().base_model(input_ids)
        return SimpleNamespace(last_hidden_state=out.last_hidden_state * self.kept)


def test_what_a_module_keeps_from_a_probe_can_be_trained_with(tmp_path):
    module = Caching(np.zeros((32, 32)))
    scale = torch.nn.Parameter(torch.ones(32))
    recording(tmp_path, model=LanguageModel(module, Numbers(), run="caching")).start()
    (scale * module.kept).sum().backward()  # an inference tensor cannot be saved for this
    assert torch.equal(scale.grad, torch.ones(32))


def test_no_tensor_is_kept_between_probes(words, tmp_path, english):
    module, met = neox().train(), []
    hook = lambda module, given, out: met.append(weakref.ref(out.last_hidden_state))  # noqa: E731
    module.gpt_neox.register_forward_hook(hook)
    recorder = RetentionRecorder(
        module, english, tokenizer=words, folder=tmp_path, budget=FOREVER, lags=range(9)
    ).start()
    recorder.step(1)
    gc.collect()
    alive = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    for update in range(2, 9):
        recorder.saw(torch.tensor([words(ENGLISH[0])["input_ids"]]))
        recorder.step(update)
    gc.collect()
    assert len(met) >= 9 and not any(ref() is not None for ref in met)
    assert sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()) == alive


def test_autocast_and_wrappers_change_no_number(words, tmp_path, english):
    from accelerate import Accelerator

    module = neox(layers=2)
    model = LanguageModel(module, words, run="neox")
    plain = ask(model, cut_texts(model, english, None, None, asker="test"))["value"]

    def recorded(wrapped, name):
        made = RetentionRecorder(
            wrapped, english, tokenizer=words, folder=tmp_path / name, run="neox", budget=FOREVER
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made.start()
        return made.table["value"]

    holder = torch.nn.Module()
    holder.module = module  # as DistributedDataParallel holds it
    for name, wrapped in {
        "plain": module,
        "held": holder,
        "compiled": torch.compile(module),
    }.items():
        pd.testing.assert_series_equal(recorded(wrapped, name), plain)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(module)
    forward = prepared.forward
    pd.testing.assert_series_equal(recorded(prepared, "accelerate"), plain)
    assert vars(unwrapped(prepared))["forward"] is forward


def test_half_precision_weights_are_probed_as_they_are(words, tmp_path, english):
    module = neox(layers=2)
    exact = probe_texts(LanguageModel(module, words, run="x"), english)["value"]
    made = RetentionRecorder(
        module.bfloat16(), english, tokenizer=words, folder=tmp_path, run="x", budget=FOREVER
    )
    near = made.start().table
    assert near.attrs["passport"]["dtype"] == "bfloat16"
    loss = near["metric"] == "loss"
    gap = (near["value"] - exact)[loss].abs()
    assert 0 < gap.max() < 0.02  # bfloat16 has 8 bits: 2**-8 of a loss near 5.7


def test_adapters_are_looked_through_and_prompts_refused():
    inner = reciter().module
    adapter = torch.nn.Module()
    adapter.peft_config = {"default": SimpleNamespace(is_prompt_learning=False)}
    adapter.get_base_model = lambda: inner
    adapter.get_output_embeddings = lambda: None  # an adapter answers for its model
    assert unwrapped(adapter) is inner
    adapter.peft_config["default"].is_prompt_learning = True
    with refuses(
        "RetentionRecorder: the adapter is a learned prompt, without which its model is another; "
        "record adapters in the weights, such as LoRA"
    ):
        unwrapped(adapter)
    with refuses(
        "RetentionRecorder: Linear holds no causal model of transformers; give the module that "
        "AutoModelForCausalLM loads"
    ):
        unwrapped(torch.nn.Linear(2, 2))


# --- when it probes ------------------------------------------------------------------------------


def test_the_default_lags_are_geometric_and_without_end():
    assert LAGS[:14] == (0, 1, 2, 3, 5, 7, 10, 20, 50, 100, 200, 500, 1000, 2000)
    assert LAGS[-1] == 500_000_000 and list(LAGS) == sorted(set(LAGS))


def test_lags_count_from_start_and_from_marks(tmp_path):
    # lags 0, 1, 3 from the start: 0, 1, 3; from the mark at 4: 4, 5, 7; the last update: 10
    recorder = recording(tmp_path)
    table = walk(recorder, 10, marks=[4])
    assert recorder.steps == [0, 1, 3, 4, 5, 7, 10]
    clock = table.drop_duplicates("step").set_index("step")[["origin", "since"]]
    assert clock["since"].to_dict() == {0: 0, 1: 1, 3: 3, 4: 0, 5: 1, 7: 3, 10: 6}
    assert clock["origin"].tolist() == ["start"] * 3 + ["mark 4"] * 4
    assert recorder.marks == {"mark 4": 4}


def test_a_mark_at_a_probe_renames_it_and_makes_no_second(tmp_path):
    recorder = recording(tmp_path)
    table = walk(recorder, 4, marks=[3])
    assert recorder.steps == [0, 1, 3, 4]
    assert table[table["step"] == 3]["since"].unique().tolist() == [0]


def test_lags_count_from_cohorts(tmp_path):
    # lags 0, 1, 3 from updates 5 and 6, and none from a text that is never met
    items = frame(["1 2 3", "2 3 4", "4 5 6"], "studied", cohort=[5, 6, np.nan])
    recorder = recording(tmp_path, items)
    table = walk(recorder, 12)
    assert recorder.steps == [0, 1, 3, 5, 6, 7, 8, 9, 12]
    lag = table[table["metric"] == "loss"].set_index(["item", "step"])["lag"]
    assert lag["i0"].tolist() == pytest.approx([np.nan] * 3 + [0, 1, 2, 3, 4, 7], nan_ok=True)
    assert np.isnan(lag["i1", 5]) and lag["i1", 6] == 0 and lag["i2"].isna().all()
    assert table["copies"].isna().all()  # no batch was looked at


def test_steps_may_be_told_now_and_then(tmp_path):
    # of lags 0, 1, 3: at update 2 lag 1 has gone by, at 5 lag 3; at 8 nothing is new; 9 is last
    recorder = recording(tmp_path)
    with recorder:
        for update in (2, 5, 8, 9):
            recorder.step(update)
    assert recorder.steps == [0, 2, 5, 9]


def test_lags_count_from_the_last_batch_that_held_an_item(tmp_path):
    # exposures in updates 4 and 5: 1 and 3 after the first are 5 (overtaken: seen again) and 7;
    # after the last they are 6 and 8; lag 0 is not asked for
    recorder = recording(tmp_path, lags=(0, 1, 3))
    table = walk(recorder, 11, batches={4: [[1, 2, 3, 4]], 5: [[0, 1, 2, 3, 4, 0], [1, 2, 3, 4]]})
    assert recorder.steps == [0, 1, 3, 6, 8, 11]
    met = table[(table["item"] == "i0") & (table["metric"] == "loss")].set_index("step")
    assert met["copies"].to_dict() == {0: 0, 1: 0, 3: 0, 6: 3, 8: 3, 11: 3}
    assert met["lag"].dropna().to_dict() == {6: 1, 8: 3, 11: 6}
    never = table[table["item"] == "i1"]
    assert (never["copies"] == 0).all() and never["lag"].isna().all()


def test_an_exposure_counts_at_its_own_update(tmp_path):
    # in the batch of update 2 and probed right after it: one copy, lag 0
    table = walk(recording(tmp_path, lags=(0, 1, 2)), 2, batches={2: [[1, 2, 3, 4]]})
    met = table[(table["item"] == "i0") & (table["metric"] == "loss")].set_index("step")
    assert met["copies"].to_dict() == {0: 0, 1: 0, 2: 1} and met["lag"].dropna().to_dict() == {2: 0}


def test_begun_late_the_start_is_there(tmp_path):
    recorder = recording(tmp_path).start(100)
    for update in range(101, 106):
        recorder.step(update)
    assert recorder.finish()["since"].unique().tolist() == [0, 1, 3, 5]
    assert recorder.steps == [100, 101, 103, 105]


# --- the budget ----------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but where it is told to go on."""
    now = SimpleNamespace(at=0.0)
    monkeypatch.setattr(recorder_module.time, "perf_counter", lambda: now.at)
    slow = recorder_module.ask

    def asking(model, texts):
        now.at += now.cost
        return slow(model, texts)

    monkeypatch.setattr(recorder_module, "ask", asking)
    return now


def timed(recorder, clock, updates, cost, pace=1.0):
    clock.cost = cost
    with recorder:
        for update in range(1, updates + 1):
            clock.at += pace
            recorder.step(update)
    return recorder


def test_over_budget_probes_wait_or_are_left_out(tmp_path, clock):
    # A probe costs 1 s, an update 1 s, the budget is .25. The one at 0 is free to be made. A second
    # one (2 s) fits from update 8 on: 1, 2, 3 and 5 are each overtaken by the next, 7 is made at 8.
    # A third fits from 12 on: 10 is made then. The fourth, 16, from 16 on. 20 ends it: always made.
    recorder = recording(tmp_path, lags=(0, 1, 2, 3, 5, 7, 10, 16), budget=0.25)
    timed(recorder, clock, 20, cost=1.0)
    assert recorder.steps == [0, 8, 12, 16, 20]
    late = [(1, None), (2, None), (3, None), (5, None), (7, 8), (10, 12)]
    assert [
        (r.due, None if pd.isna(r.made) else r.made) for r in recorder.skipped.itertuples()
    ] == late
    assert set(recorder.skipped["why"]) == {"budget"}
    assert recorder.overhead == pytest.approx(5 / 20)


def test_with_the_end_known_short_lags_need_not_wait(tmp_path, clock):
    # 40 updates of 1 s and .15 leave 6 s; the last probe is kept back, so five can be made before
    recorder = recording(tmp_path, lags=(0, 1, 2, 3, 5, 7, 10), budget=0.15, updates=40)
    timed(recorder, clock, 40, cost=1.0)
    assert recorder.steps == [0, 1, 2, 3, 5, 40]
    assert recorder.skipped["due"].tolist() == [7, 10] and recorder.skipped[
        "made"
    ].isna().tolist() == [True, False]
    assert recorder.overhead == pytest.approx(6 / 40)


def test_the_share_never_passes_the_budget_but_for_first_and_last(tmp_path, clock):
    recorder = recording(tmp_path, lags=range(200), budget=0.2)
    clock.cost = 0.7
    recorder.start()
    shares = []
    for update in range(1, 100):
        clock.at += 0.9
        recorder.step(update)
        shares.append(recorder.overhead)
    assert len(recorder.steps) > 20  # 89 s * .2 / .7 s = 25
    assert max(shares[4:]) <= 0.2 + 1e-9  # the first probe is paid for after .7 / .2 / .9 updates


def test_one_slow_probe_does_not_stand_for_the_others(tmp_path, clock):
    # 1 s, 8 s at the mark, 1 s again: at update 20 half of 20 s has room for 9 + 1, not for 9 + 8
    recorder = recording(tmp_path, lags=(0, 20), budget=0.5)
    clock.cost = 1.0
    recorder.start()
    for update in range(1, 21):
        clock.at, clock.cost = clock.at + 1.0, 8.0 if update == 10 else 1.0
        recorder.step(update)
        if update == 10:
            recorder.mark("busy")
    assert recorder.steps == [0, 10, 20]


def test_a_mark_is_probed_whatever_it_costs(tmp_path, clock):
    clock.cost = 100.0
    recorder = recording(tmp_path, budget=0.01)
    table = walk(recorder, 6, marks=[2])
    assert recorder.steps == [0, 2, 6] and recorder.skipped["due"].tolist() == [1, 3, 5]
    assert table.attrs["passport"]["skipped"][0] == {"due": 1, "made": 2, "why": "budget"}


def test_looking_for_items_counts_as_probing(tmp_path, clock, monkeypatch):
    def slow(*given):
        clock.at += 2.0
        return iter(())

    clock.cost = 0.0
    recorder = recording(tmp_path).start()
    monkeypatch.setattr(recorder_module, "_find", slow)
    recorder.saw([[1, 2]])
    clock.at += 8.0
    assert recorder.overhead == pytest.approx(2 / 8)


def test_seconds_of_the_run_before_count(tmp_path, clock):
    recorder = recording(tmp_path, budget=0.5)
    timed(recorder, clock, 4, cost=1.0)
    again = recording(tmp_path, budget=0.5, lags=(0, 1, 3)).start(4)
    clock.at += 6.0
    again.step(10)
    again.finish()
    before = load(tmp_path / TABLE).attrs["passport"]
    assert before["training_seconds"] == pytest.approx(10.0)
    assert before["probing_seconds"] == pytest.approx(len(again.steps) * 1.0)


# --- exposures -----------------------------------------------------------------------------------


def test_an_item_is_found_whatever_stands_around_it(tmp_path):
    # but for its ends (1 and 8), which the text around may have changed: 31 in place of the first
    items = frame(["1 2 3 4 5 6 7 8", "20 21 22"])
    recorder = recording(tmp_path, items).start()
    rows = [[9, 31, 2, 3, 4, 5, 6, 7, 8], [0] * 5, [2, 3, 4, 5, 6, 7], [20, 21, 22, 20, 21, 22]]
    assert recorder.saw(rows) == 4  # rows of unlike lengths
    assert recorder.saw(torch.tensor([[2, 3, 4, 5, 6, 0]])) == 0  # broken off
    assert recorder.saw(np.array([20, 21, 23])) == 0  # a short text counts whole; one row
    assert recorder.saw([7, 20, 21, 22]) == 1
    ledger = recorder.exposures
    assert ledger["row"].tolist() == [0, 2, 3, 3, 0]
    assert ledger["offset"].tolist() == [1, -1, 0, 3, 1]  # -1: the first token is cut off
    assert ledger["item"].tolist() == ["i0", "i0", "i1", "i1", "i1"]
    assert (ledger["update"] == 1).all()
    assert ledger["hash"][0] == fingerprint(np.arange(2, 8))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_finding_is_what_a_plain_search_finds(data):
    number = st.integers(0, 2)  # three tokens, so that runs repeat and overlap
    texts = data.draw(st.lists(st.lists(number, min_size=2, max_size=8), min_size=1, max_size=4))
    rows = data.draw(st.lists(st.lists(number, max_size=30), min_size=1, max_size=3))
    items = frame([" ".join(map(str, text)) for text in texts])
    needles = recorder_module._needles(cut_texts(reciter(), items, None, None, asker="test"))
    got = set()
    for number, row in enumerate(rows):
        found = recorder_module._find(np.array(row, dtype=np.int64), *needles)
        got |= {(number, item, at) for item, at, _ in found}
    wanted = set()
    for name, text in zip(items["item"], texts, strict=True):
        lead = int(len(text) >= 6)
        needle = text[1:-1] if lead else text
        for number, row in enumerate(rows):
            for at in range(len(row) - len(needle) + 1):
                if row[at : at + len(needle)] == needle:
                    wanted.add((number, name, at - lead))
    assert got == wanted


def test_nothing_found_is_said(tmp_path):
    recorder = recording(tmp_path).start()
    recorder.saw([[9, 9, 9]])
    recorder.step(1)
    with says(
        "RetentionRecorder: none of the items stood in any batch that was handed to saw(); the "
        "training goes on"
    ):
        recorder.finish()


# --- killed, resumed, refused --------------------------------------------------------------------


def played(folder, first=0, last=12, finish=True, batches=None):
    """Updates of a training whose weights are a function of the update alone."""
    module = Bigram(np.zeros((32, 32)))
    model = LanguageModel(module, Numbers(), run="played")
    recorder = recording(folder, model=model, lags=(0, 1, 2, 5, 10))
    batches = batches or {3: [[0, 1, 2, 3, 4]], 6: [[1, 2, 3, 4], [5, 6, 9, 10]]}

    def weights(update):
        table = np.random.default_rng(update).normal(size=(32, 32))
        module.head.weight.data = torch.as_tensor(table, dtype=torch.float32)

    weights(first)
    recorder.start(first)
    for update in range(first + 1, last + 1):
        recorder.saw(batches.get(update, [[9, 9]]))
        weights(update)
        recorder.step(update)
        if update == 4:
            recorder.mark("four")
    return recorder.finish() if finish else recorder


def test_a_run_that_ends_anywhere_goes_on_to_the_same_table(tmp_path):
    whole = played(tmp_path / "whole")
    ledger = (tmp_path / "whole" / LEDGER).read_text()
    assert whole["step"].unique().tolist() == [0, 1, 2, *range(4, 13)]
    for killed, checkpoint in ((12, 12), (8, 6), (5, 4), (5, 3), (0, 0)):
        folder = tmp_path / f"{killed}-{checkpoint}"
        played(folder, last=killed, finish=False)  # gone, without a word
        with (folder / LEDGER).open("a") as file:
            file.write('{"event": "expos')  # killed while it wrote
        (folder / f".{TABLE}.left").write_text("half a table")
        played(folder, first=checkpoint)
        pd.testing.assert_frame_equal(load(folder / TABLE), load(tmp_path / "whole" / TABLE))
        assert (folder / LEDGER).read_text() == ledger
        assert not list(folder.glob(f".{TABLE}.*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child that shares what is imported")
def test_killed_at_any_moment_a_whole_table_is_left(tmp_path):
    whole = played(tmp_path / "whole")
    folder, seen = tmp_path / "killed", set()
    rng = np.random.default_rng(5)
    for _ in range(8):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                played(folder, last=12, finish=False)
            os._exit(0)
        time.sleep(rng.uniform(0.02, 0.4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (folder / TABLE).is_file():
            seen.add(int(load(folder / TABLE)["step"].max()))  # each time a whole one
    pd.testing.assert_frame_equal(played(folder), whole)
    assert seen


def test_names_that_are_numbers_survive_a_resumed_run(tmp_path):
    items = frame(["1 2 3 4", "5 6 9 10"], ["studied", "control"]).assign(item=[7, 8])
    foils = pd.DataFrame({"item": [7, 8], "foil": "f", "text": "9 9"})
    one, two = (recording(tmp_path / name, items, foils=foils).start() for name in ("one", "two"))
    one.step(1)
    two.step(1)
    two = recording(tmp_path / "two", items, foils=foils).start(1)
    for recorder in (one, two):
        recorder.saw([[1, 2, 3, 4]])
        recorder.step(3)
    pd.testing.assert_frame_equal(one.finish(), two.finish())
    assert set(one.table["item"]) == {"7", "8"} and one.table["group"].notna().all()


def test_killed_between_checkpoint_and_step_the_probe_is_made_up_for(tmp_path):
    # the checkpoint of update 5 was written, but step(5), at which a probe was due, never came
    whole = played(tmp_path / "whole")
    played(tmp_path / "cut", last=4, finish=False)
    pd.testing.assert_frame_equal(played(tmp_path / "cut", first=5), whole)


def test_a_table_names_each_measurement_once(tmp_path):
    table = played(tmp_path)
    pd.testing.assert_frame_equal(validate(table), table)
    assert not table.duplicated(["step", "item", "metric"]).any()
    pd.testing.assert_frame_equal(load(tmp_path / TABLE), table)
    assert table.attrs["passport"]["finished"] is False
    passport = load(tmp_path / TABLE).attrs["passport"]
    assert passport["finished"] and passport["probes"] == sorted(passport["probes"])
    assert passport["marks"] == {"four": 4} and passport["updates"] == 12


def test_other_settings_are_refused_by_name(tmp_path):
    recording(tmp_path).start()
    way = "; go on with the same, or give another folder"
    begun = f"RetentionRecorder: {tmp_path} was begun with "
    with refuses(f"{begun}lags [0, 1, 3], now it is [0, 1, 2]{way}"):
        recording(tmp_path, lags=(0, 1, 2)).start()
    with refuses(f"{begun}prefix None, now it is 2{way}"):
        recording(tmp_path, prefix=2).start()
    with refuses(f"{begun}run fake, now it is other{way}"):
        recording(tmp_path, run="other").start()
    foils = pd.DataFrame({"item": ["i0"], "foil": "f", "text": "5 6"})
    with pytest.raises(InputError, match="was begun with foils , now it is [0-9a-f]{16}; go on"):
        recording(tmp_path, foils=foils).start()
    items = frame(["1 2 3 4", "5 6 9 11"], ["studied", "control"])
    with pytest.raises(InputError, match="was begun with items [0-9a-f]{16}, now it is"):
        recording(tmp_path, items).start()
    with refuses(f"{begun}parameters 1024, now it is 4096{way}"):
        recording(tmp_path, model=reciter(vocabulary=64)).start()
    turned = bigram(np.zeros((16, 64)), run="reciter")  # as many parameters
    with pytest.raises(InputError, match="was begun with shape [0-9a-f]{16}, now it is"):
        recording(tmp_path, model=turned).start()
    recording(tmp_path, budget=3.0).start()  # how much it may cost can change


def test_another_tokenizer_is_refused(tmp_path):
    class Shifted(Numbers):
        def __call__(self, text, add_special_tokens=True):
            ids = super().__call__(text)["input_ids"]
            return {"input_ids": [[i + 1 for i in each] if isinstance(each, list) else each + 1
                                  for each in ids]}  # fmt: skip

    recording(tmp_path).start()
    with pytest.raises(InputError, match="was begun with tokens [0-9a-f]{16}, now it is"):
        recording(tmp_path, model=LanguageModel(reciter().module, Shifted(), run="x")).start()


def test_a_finished_run_is_not_begun_again_but_goes_on(tmp_path):
    walk(recording(tmp_path), 5)
    with refuses(
        f"RetentionRecorder: {tmp_path} holds a finished run of 5 updates, and this one is at 0; "
        "give another folder, or start(update=5) to go on"
    ):
        recording(tmp_path).start()
    recorder = recording(tmp_path).start(5)
    recorder.step(6)
    recorder.finish()
    assert recorder.steps == [0, 1, 3, 5, 6]


def test_a_checkpoint_that_was_not_read_back_whole_is_refused(tmp_path):
    # as when a Trainer resumes a GPT-NeoX, whose checkpoint calls the head by another name
    module = neox(vocabulary=32)
    model = LanguageModel(module, Numbers(), run="x")
    recorder = recording(tmp_path, model=model).start()
    recorder.step(4)
    recorder.saved()
    recording(tmp_path, model=model).start(4)  # the same weights are those that were saved
    torch.nn.init.normal_(module.lm_head.weight)
    with refuses(
        "RetentionRecorder: 1 of 16 parameters are not those that were saved at update 4 (first: "
        "lm_head.weight); the checkpoint was not read back whole, so that this would be another "
        "training: load its weights, or give another folder"
    ):
        recording(tmp_path, model=model).start(4)
    recording(tmp_path, model=model).start(0)  # begun again, it is another training by intent


def test_misuse_is_said(tmp_path):
    recorder = recording(tmp_path)
    idle = ": the recorder is not running; call start(), or put the loop in `with recorder:`"
    for name, call in {
        "step": lambda: recorder.step(1),
        "saw": lambda: recorder.saw([[1, 2]]),
        "mark": lambda: recorder.mark("m"),
        "finish": lambda: recorder.finish(),
    }.items():
        with refuses(name + idle):
            call()
    with refuses("table: nothing is recorded yet; begin with start() or `with recorder:`"):
        _ = recorder.table
    recorder.start()
    recorder.step(2)
    with refuses(
        "step: update 2 after update 2; count upwards, and begin a resumed training with start(update)"
    ):
        recorder.step(2)
    recorder.mark("m")
    recorder.mark("m")  # the same again is no other
    recorder.step(3)
    with refuses("mark: 'm' is update 2 already, this is update 3; give another name"):
        recorder.mark("m")
    lags = "; give whole numbers from 0 up, increasing, such as 0, 1, 2, 5, 10"
    for bad in ([], [1, 1], [-1, 2], [0.5, 1]):
        with refuses(f"RetentionRecorder: lags are {bad}{lags}"):
            recording(tmp_path, lags=bad)
    for bad in (0, -1.0, float("nan")):
        with refuses(
            f"RetentionRecorder: budget is {bad}; give the share of the training's time that "
            "probing may add, such as 0.1"
        ):
            recording(tmp_path, budget=bad)
    with refuses("RetentionRecorder: a module does not know its tokenizer; give tokenizer=..."):
        recording(tmp_path, model=reciter().module)


def test_after_an_error_in_the_loop_nothing_more_is_probed(tmp_path):
    recorder = recording(tmp_path)
    with pytest.raises(ZeroDivisionError), recorder:
        recorder.step(1)
        recorder.step(2)
        raise ZeroDivisionError
    assert load(tmp_path / TABLE)["step"].unique().tolist() == [0, 1]
    with recorder.start(2):  # and it can go on
        recorder.step(3)
    assert recorder.steps == [0, 1, 3]


# --- what must not end somebody's training -------------------------------------------------------


def test_a_loss_that_is_not_finite_is_noted_and_the_training_goes_on(tmp_path):
    recorder = recording(tmp_path).start()
    with says("RetentionRecorder: the training loss is nan at update 1; the training goes on"):
        recorder.step(1, loss=float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, noted each time
        recorder.step(2, loss=float("inf"))
        recorder.step(3, loss=1.5)
    noted = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines()]
    assert noted == [
        {"event": "loss", "update": 1, "loss": "nan"},
        {"event": "loss", "update": 2, "loss": "inf"},
    ]


def test_weights_that_break_give_nan_with_a_reason(tmp_path):
    model = reciter()
    recorder = recording(tmp_path, model=model).start()
    model.module.head.weight.data[2] = float("nan")
    with says(
        "RetentionRecorder: loss of item 'i0' is not a number at update 1: the model gives NaN or "
        "Inf; the training goes on"
    ):
        recorder.step(1)
    broken = recorder.finish().query("step == 1")
    assert broken["value"].isna().all() and set(broken["reason"]) == {"the model gives NaN or Inf"}
    assert load(tmp_path / TABLE).query("step == 0")["value"].notna().all()


def test_without_memory_a_probe_is_left_out(tmp_path, monkeypatch):
    recorder = recording(tmp_path).start()
    full = lambda *given: (_ for _ in ()).throw(torch.OutOfMemoryError("2 GiB wanted"))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(recorder_module, "ask", full)
        with says(
            "RetentionRecorder: no memory for a probe at update 1 (2 GiB wanted); the training goes on"
        ):
            recorder.step(1)
        recorder.step(2)
    recorder.step(3)
    assert recorder.steps == [0, 3]
    assert recorder.skipped.to_dict("records") == [{"due": 1, "made": None, "why": "out of memory"}]
    with monkeypatch.context() as patch:
        patch.setattr(recorder_module, "ask", full)
        never = recording(tmp_path / "never")
        with pytest.warns(UserWarning, match="no memory for a probe at update 0"):
            never.start()
        assert never.finish() is None


def test_a_full_disk_costs_no_number(tmp_path, monkeypatch):
    recorder = recording(tmp_path).start()
    with monkeypatch.context() as patch:
        full = lambda *given, **named: (_ for _ in ()).throw(OSError(28, "No space left"))  # noqa: E731
        patch.setattr(recorder_module, "save", full)
        with says(
            f"RetentionRecorder: cannot write to {tmp_path} (No space left); the training goes on"
        ):
            recorder.step(1)
    recorder.step(3)
    assert load(tmp_path / TABLE)["step"].unique().tolist() == [0, 1, 3]


# --- a real Trainer, killed ----------------------------------------------------------------------


class KillAt(recorder_module.TrainerCallback):
    def __init__(self, update):
        self.update = update

    def on_step_end(self, args, state, control, **rest):
        if state.global_step == self.update:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer_for(folder, *, kill=None, record=True, updates=14, accumulate=1):
    """A fine-tuning of a tiny Llama with dropout by transformers' Trainer, a checkpoint every 4."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.set_num_threads(1)
    words = byte_level_tokenizer(ENGLISH)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        attention_dropout=0.1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    module = LlamaForCausalLM(shape)
    texts = words(ENGLISH[:4])["input_ids"]
    data = [{"input_ids": ids[:20], "labels": ids[:20]} for ids in texts] * 4
    items = frame([words.decode(ids[:20]) for ids in words(ENGLISH)["input_ids"]],
                  ["studied"] * 4 + ["control"] * 2)  # fmt: skip
    recorder = RetentionRecorder(
        module, items, tokenizer=words, folder=Path(folder) / "recorded", budget=FOREVER, run="t"
    )
    callbacks = [RetentionCallback(recorder)] if record else []
    arguments = TrainingArguments(
        output_dir=str(Path(folder) / "trainer"), max_steps=updates, save_steps=4, use_cpu=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=accumulate, report_to=[],
        disable_tqdm=True, logging_steps=5, learning_rate=1e-3, seed=1,
    )  # fmt: skip
    callbacks += [KillAt(kill)] if kill else []
    return Trainer(model=module, args=arguments, train_dataset=data, callbacks=callbacks), recorder


@pytest.fixture(scope="module")
def quiet_trainer(tmp_path_factory):
    trainer, recorder = trainer_for(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer, recorder


def test_a_trainer_killed_and_resumed_gives_the_same_table(quiet_trainer, tmp_path):
    code = f"from tests.test_recorder import trainer_for; trainer_for({str(tmp_path)!r}, kill=11)[0].train()"
    killed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    cut = load(tmp_path / "recorded" / TABLE)
    assert sorted(cut["step"].unique()) == [0, 1, 2, 3, 5, 7, 10]
    trainer, recorder = trainer_for(tmp_path)
    trainer.train(resume_from_checkpoint=True)  # from 8, so that 10 is done again
    whole = quiet_trainer[1]
    assert whole.steps == recorder.steps == [0, 1, 2, 3, 5, 7, 10, 14]
    pd.testing.assert_frame_equal(recorder.table, whole.table)
    pd.testing.assert_frame_equal(recorder.exposures, whole.exposures)
    saved = [load(r.folder / TABLE) for r in (recorder, whole)]
    pd.testing.assert_frame_equal(*saved)


def test_the_trainer_does_not_notice_and_every_exposure_is_seen(quiet_trainer, tmp_path):
    trainer, recorder = quiet_trainer
    plain, _ = trainer_for(tmp_path, record=False)
    plain.train()
    for (name, one), other in zip(
        plain.model.state_dict().items(), trainer.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    # 14 updates of 2 texts, each of them a studied one
    met = recorder.exposures
    assert len(met) == 28 and met.groupby("update").size().eq(2).all()
    assert set(met["item"]) == {"i0", "i1", "i2", "i3"}
    last = recorder.table.query("step == 14 and metric == 'loss'")
    assert last.groupby("group", observed=True)["copies"].sum().to_dict() == {
        "control": 0,
        "studied": 28,
    }
    assert not trainer.model._forward_pre_hooks  # taken away again


def test_accumulated_batches_belong_to_one_update(tmp_path):
    trainer, recorder = trainer_for(tmp_path, updates=3, accumulate=2)
    trainer.train()
    assert recorder.exposures.groupby("update").size().to_dict() == {1: 4, 2: 4, 3: 4}
    assert recorder.table.attrs["passport"]["updates"] == 3


def test_the_callback_knows_the_end_and_minds_losses(tmp_path):
    recorder = recording(tmp_path)
    callback = RetentionCallback(recorder)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=7)
    model = reciter().module
    callback.on_train_begin(None, state, None, model=model)
    assert recorder.updates == 7 and recorder._model.module is model
    state.global_step = 1
    callback.on_step_end(None, state, None, model=model)
    with pytest.warns(UserWarning, match="the training loss is nan at update 1"):
        callback.on_log(None, state, None, logs={"loss": float("nan")})
    callback.on_log(None, state, None, logs={"eval_loss": 1.0})
    model.train()(torch.tensor([[1, 2, 3, 4]]))
    model.eval()(torch.tensor([[1, 2, 3, 4]]))  # evaluation is no exposure
    assert recorder.exposures["update"].tolist() == [2]
    state.global_step = 1
    callback.on_train_begin(None, state, None, model=model)  # broken off, and begun again
    assert len(model._forward_pre_hooks) == 1
    other = SimpleNamespace(is_world_process_zero=False, global_step=2, max_steps=7)
    callback.on_step_end(None, other, None, model=model)
    assert recorder.steps == [0, 1]


SNIPPETS = [recorder_module.__doc__, (ROOT / "README.md").read_text(encoding="utf-8")]


@pytest.mark.parametrize("text", [t for t in SNIPPETS if "callbacks=[RetentionCallback" in t])
def test_the_example_runs_as_it_stands(text, tmp_path, monkeypatch, model_folder):
    """The lines that the documentation shows, with a small model and two texts in place of theirs."""
    block = next(
        b for b in re.split(r"```python|```|\n\n(?=    from)", text) if "RetentionCallback(" in b
    )
    lines = [line for line in block.split("\n") if line.strip()]
    indent = len(lines[0]) - len(lines[0].lstrip())
    kept = [line[indent:] for line in lines if line[:indent].strip() == ""]
    monkeypatch.chdir(tmp_path)
    rows = [
        {"text": t, "group": g} for t, g in zip(ENGLISH, ["seen"] * 3 + ["unseen"] * 3, strict=True)
    ]
    Path("texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = byte_level_tokenizer(ENGLISH)
    data = [{"input_ids": ids, "labels": ids} for ids in words(ENGLISH[:3])["input_ids"]]
    known = {"module": neox(), "tokenizer": words, "dataset": data}
    from transformers import TrainingArguments

    known["arguments"] = TrainingArguments(output_dir="out", max_steps=3, use_cpu=True, report_to=[],
                                           disable_tqdm=True, per_device_train_batch_size=1)  # fmt: skip
    exec("\n".join(kept), known)
    assert 1 < len(kept) <= 12
    table = load(tmp_path / "recorded" / TABLE)
    assert {0, 3} <= set(table["step"]) and set(table["group"]) == {"seen", "unseen"}
