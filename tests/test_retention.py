import re
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from scipy.stats import mannwhitneyu, norm

from tests.conftest import Numbers, bigram, frame, neox
from workbench import retention
from workbench.foils import make_foils
from workbench.models import LanguageModel, Scores
from workbench.plots import plot_recall, plot_recognition, plot_retention
from workbench.probes.recall import probe_recall
from workbench.probes.recognition import (
    forced_choice,
    mean_loss,
    prepare_recognition,
    probe_recognition,
)
from workbench.retention import choose_learning_rate, pad_texts, study_and_retain
from workbench.stats.retention import auc, d_prime, retention_curve
from workbench.table import InputError, load, rows, save
from workbench.training import TextStream, Trainer, fingerprint, sequence_loss


def refuses(message):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


# --- recognition, with a model that says what it is told -----------------------------------------


class Told:
    """Scores each text with the token losses it was told; remembers what it was asked."""

    run, step, context = "told", 3, 12

    def __init__(self, losses):
        self.losses, self.names, self.asked = losses, list(losses), []

    def encode(self, texts):
        return [np.array([self.names.index(t)] + [0] * len(self.losses[t])) for t in texts]

    def score_batches(self, tokens, *, keep, start=1):
        self.asked += [self.names[each[0]] for each in tokens]
        losses = [self.losses[self.names[each[0]]] for each in tokens]
        padded = np.full((len(losses), max(map(len, losses))), np.nan)
        for row, each in enumerate(losses):
            padded[row, : len(each)] = -np.array(each, dtype=float)
        yield np.arange(len(tokens)), Scores(np.array([len(each) for each in losses]), padded)


def foils_of(items, texts, kind="unrelated"):
    return pd.DataFrame({"item": items["item"], "foil": kind, "text": texts})


def test_recognition_by_hand_with_a_tie():
    # i0: mean 1 against 2, though its sum is 4 against 2: recognised. i1: mean 2 against mean 2
    # over other lengths: a half. i2: 3 against 1: taken for the foil. Mean 1/2.
    told = {"a": [1, 1, 1, 1], "x": [2], "b": [2, 2], "y": [1, 3, 2], "c": [3], "z": [1, 1]}
    items = frame(["a", "b", "c"], "studied")
    table = probe_recognition(Told(told), items, foils_of(items, ["x", "y", "z"]))
    said = table[table["metric"] == "recognition"]
    assert dict(zip(said["item"], said["value"], strict=True)) == {"i0": 1.0, "i1": 0.5, "i2": 0.0}
    assert set(said["foil"]) == {"unrelated"} and set(said["step"]) == {3}
    loss = table[table["metric"] == "loss"].set_index(["item", "foil"])["value"]
    assert loss["i0", "itself"] == 1 and loss["i0", "unrelated"] == 2 and loss["i2", "itself"] == 3


def test_rounding_below_a_millionth_of_a_nat_is_a_tie():
    told = {"a": [1.0, 1.0 + 4e-7], "x": [1.0], "b": [1.0], "y": [1.0 + 4e-6]}
    items = frame(["a", "b"], "studied")
    table = probe_recognition(Told(told), items, foils_of(items, ["x", "y"]))
    assert table[table["metric"] == "recognition"]["value"].tolist() == [0.5, 1.0]


def test_swapping_the_texts_turns_the_verdict_round():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 4, (2, 200))  # many ties
    np.testing.assert_array_equal(forced_choice(one, other) + forced_choice(other, one), 1)
    brute = [1 if a < b else 0.5 if a == b else 0 for a, b in zip(one, other, strict=True)]
    np.testing.assert_array_equal(forced_choice(one, other), brute)


def test_a_text_in_many_pairs_is_scored_once():
    told = Told({"a": [1], "b": [2], "x": [3], "y": [1]})
    items = frame(["a", "b"], "studied")
    foils = pd.concat([foils_of(items, ["x", "x"]), foils_of(items, ["y", "x"], "shuffled")])
    probe_recognition(told, items, foils)
    assert sorted(told.asked) == ["a", "b", "x", "y"]


def test_first_token_and_bos_are_not_scored():
    ids = [np.array([5, 6, 7]), np.array([1, 2, 3, 4])]
    for bos in (None, 9):
        model = LanguageModel(neox(vocabulary=64), Numbers(), run="tiny", bos=bos)
        got = mean_loss(model, ["5 6 7", "1 2 3 4"], named={})
        for text, loss in zip(ids, got, strict=True):
            before = [] if bos is None else [bos]
            logits = model.module(torch.tensor([[*before, *text]])).logits[0].log_softmax(-1)
            at = [logits[len(before) + k - 1, text[k]].item() for k in range(1, len(text))]
            assert loss == pytest.approx(-np.mean(at), abs=2e-6)


@pytest.mark.parametrize(
    "told, message",
    [
        (
            {"x": []},
            "probe_recognition: the unrelated foil of item i0 has 1 tokens, needs at least 2, the "
            "first is not scored; drop it (1 of 2 texts)",
        ),
        (
            {"x": [1.0] * 12},
            "probe_recognition: the unrelated foil of item i0 has 13 tokens, the context holds 12; "
            "cut it (1 of 2 texts)",
        ),
        (
            {"x": [1.0, np.nan]},
            "probe_recognition: the loss of the unrelated foil of item i0 is nan at step 3 of told; "
            "the weights or their dtype give NaN or Inf",
        ),
    ],
)
def test_texts_that_recognition_refuses(told, message):
    items = frame(["a"], "studied")
    with refuses(message):
        probe_recognition(Told({"a": [1.0], **told}), items, foils_of(items, ["x"]))


def test_foils_that_recognition_refuses():
    items, model = frame(["a"], "studied"), Told({"a": [1], "x": [2]})
    foils = foils_of(items, ["x"])
    with refuses("probe_recognition: no foils; make_foils gives a frame with item, foil and text"):
        probe_recognition(model, items, foils[:0])
    with refuses(
        "probe_recognition: 1 foils belong to none of the items (first: 'other'); make the foils "
        "from these items"
    ):
        probe_recognition(model, items, foils.assign(item="other"))
    with refuses("probe_recognition: item 'i0' has several unrelated foils; keep one"):
        probe_recognition(model, items, pd.concat([foils, foils]))


# --- study and retain ----------------------------------------------------------------------------


def number_texts(n, seed, words=(4, 9)):
    rng = np.random.default_rng(seed)
    return [" ".join(map(str, rng.integers(0, 64, rng.integers(*words)))) for _ in range(n)]


@pytest.fixture(scope="module")
def experiment():
    """A random model, six studied and six control texts with foils, and new text."""
    items = frame(number_texts(12, 0)).assign(group=["studied"] * 6 + ["control"] * 6)
    return SimpleNamespace(
        model=LanguageModel(neox(vocabulary=64), Numbers(), run="tiny", step=100),
        items=items,
        foils=make_foils(
            items, unrelated=number_texts(6, 1), kinds=["unrelated", "shuffled"], seed=0
        ),
        interference=number_texts(60, 2, words=(40, 50)),
    )


def ask(experiment, **changes):
    asked = dict(exposures=3, learning_rate=1e-2, lags=(0, 1, 3), batch=4, seed=5) | changes
    parts = (experiment.model, experiment.items, experiment.foils, experiment.interference)
    return study_and_retain(*parts, **asked)


@pytest.fixture(scope="module")
def studied(experiment):
    return ask(experiment)


def test_the_callers_weights_are_left_alone(experiment):
    module = experiment.model.module
    module.requires_grad_(False)
    before = experiment.model.weights_hash()
    ask(experiment)
    assert experiment.model.weights_hash() == before
    assert not any(p.requires_grad for p in module.parameters()) and not module.training


def test_twice_the_same(experiment, studied):
    torch.manual_seed(77)  # whatever the caller drew before
    again = ask(experiment)
    pd.testing.assert_frame_equal(again.table, studied.table)
    pd.testing.assert_frame_equal(again.losses, studied.losses)


def test_dropout_is_drawn_from_the_seed_and_leaves_the_callers_alone(experiment):
    wet = SimpleNamespace(**vars(experiment))
    wet.model = LanguageModel(neox(vocabulary=64, hidden_dropout=0.3), Numbers(), run="wet")
    made = []
    for callers in (1, 2):
        torch.manual_seed(callers)
        state = torch.get_rng_state()
        made.append(ask(wet, lags=(0,)).losses)
        assert torch.equal(state, torch.get_rng_state())
    pd.testing.assert_frame_equal(*made)
    # of a single studied item the seed orders nothing, so that it shows in dropout alone
    wet.items = experiment.items[5:]
    wet.foils = experiment.foils[experiment.foils["item"].isin(wet.items["item"])]
    one, other = (ask(wet, lags=(0,), seed=seed).losses for seed in (5, 6))
    assert not one.equals(other)


def test_the_ledger_is_what_was_trained(experiment, monkeypatch):
    batches = []
    step = Trainer.step

    def spy(self, batch, weight=None):
        batches.append((self.update + 1, batch, weight))
        return step(self, batch, weight)

    monkeypatch.setattr(Trainer, "step", spy)
    made = ask(experiment)
    texts = dict(
        zip(
            experiment.items["item"], experiment.model.encode(experiment.items["text"]), strict=True
        )
    )
    seen = []
    for update, batch, weight in batches[:6]:  # six items, four an update: two updates a pass
        for row, (tokens, real) in enumerate(zip(batch, weight, strict=True)):
            seen.append((update, row, 0, fingerprint(tokens[real == 1])))
    ledger = made.ledger
    assert seen == list(
        ledger[["update", "row", "offset", "hash"]].itertuples(index=False, name=None)
    )
    assert ledger["hash"].tolist() == [fingerprint(texts[name]) for name in ledger["item"]]
    studied = experiment.items.query("group == 'studied'")["item"]
    assert ledger["item"].value_counts().to_dict() == dict.fromkeys(studied, 3)
    # afterwards: windows of new text in which none of the items stands
    assert [update for update, *_ in batches[6:]] == [7, 8, 9]
    assert all(weight is None for *_, weight in batches[6:])
    assert made.losses["phase"].tolist() == ["study"] * 6 + ["retention"] * 3


def test_lags_against_a_plain_loop(experiment, studied):
    # the same updates by hand: 6 of study, as the ledger says, then L of new text
    module = neox(vocabulary=64)
    trainer = Trainer(module, 1e-2)
    texts = dict(
        zip(
            experiment.items["item"], experiment.model.encode(experiment.items["text"]), strict=True
        )
    )
    for _, part in studied.ledger.groupby("update"):
        batch, weight = pad_texts([texts[name] for name in part["item"]])
        for row, name in enumerate(part["item"]):
            batch[row, : len(texts[name])] = texts[name]
        trainer.step(batch, weight)
    tokens = experiment.model.encode(["\n".join(experiment.interference)])[0]
    stream = TextStream(tokens, retention.ROWS, 64, seed=5)
    table = studied.table[(studied.table["metric"] == "loss") & (studied.table["foil"] == "itself")]
    for lag in range(4):
        if lag:
            trainer.step(stream.batch(lag))
        at = table[table["lag"] == lag].set_index("item")
        for name, value in at["value"].items():
            with torch.no_grad():
                loss = sequence_loss(module.eval(), torch.tensor(texts[name])[None])
            module.train()
            assert value == pytest.approx(loss.item(), abs=2e-5)
            assert at.loc[name, "step"] == 100 + 6 + lag
    assert sorted(table["lag"].dropna().unique()) == [0, 1, 3]


def test_before_study_is_the_model_as_given(experiment, studied):
    before = studied.table[studied.table["phase"] == "before"]
    plain = probe_recognition(experiment.model, experiment.items, experiment.foils)
    merged = before.merge(plain, on=["group", "item", "metric", "foil"])
    np.testing.assert_array_equal(merged["value_x"], merged["value_y"])
    assert len(merged) == len(plain) and set(before["step"]) == {100}
    assert before["lag"].isna().all() and (before["copies"] == 0).all()


def test_only_what_was_studied_is_learned(experiment, studied):
    loss = studied.table.query("metric == 'loss' and foil == 'itself'")
    mean = loss.groupby([loss["group"].astype(str), loss["lag"].fillna(-1)])["value"].mean()
    assert mean["studied", 0] < mean["studied", -1] - 0.2
    assert mean["control", 0] > mean["studied", 0] + 0.2
    copies = studied.table[studied.table["lag"] == 0].groupby("group", observed=True)["copies"]
    assert copies.unique().map(list).to_dict() == {"studied": [3], "control": [0]}


def test_a_model_with_a_beginning_of_text_studies_with_it(experiment, monkeypatch):
    batches = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, *a: [batches.append(a), step(self, *a)][1])
    with_bos = SimpleNamespace(**vars(experiment))
    with_bos.model = LanguageModel(neox(vocabulary=64), Numbers(), run="tiny", bos=63)
    ask(with_bos, lags=(0,))
    for batch, weight in batches:
        assert (batch[:, 0] == 63).all() and (weight[:, 0] == 1).all()


def test_probes_meet_the_model_without_dropout(experiment, monkeypatch):
    met = []

    def spy(*parts):
        asked = prepare_recognition(*parts)
        return lambda model: [met.append((model.step, model.module.training)), asked(model)][1]

    monkeypatch.setattr(retention, "prepare_recognition", spy)
    ask(experiment)
    assert met == [(100, False), (106, False), (107, False), (109, False)]


def test_texts_are_encoded_once_however_many_the_lags(experiment, monkeypatch):
    met = []

    def spy(self, text, add_special_tokens=True):
        met.append(text)
        return numbers(self, text, add_special_tokens)

    numbers = Numbers.__call__
    monkeypatch.setattr(Numbers, "__call__", spy)
    ask(experiment, lags=(0, 1))
    few, met[:] = len(met), []
    ask(experiment, lags=(0, 1, 2, 3))
    assert len(met) == few


def test_asked_again_of_other_weights_it_is_the_same_as_asked_afresh(experiment):
    ask_again = prepare_recognition(experiment.model, experiment.items, experiment.foils)
    other = LanguageModel(neox(seed=1, vocabulary=64), Numbers(), run="other", step=7)
    for model in (experiment.model, other, experiment.model):
        fresh = probe_recognition(model, experiment.items, experiment.foils)
        pd.testing.assert_frame_equal(ask_again(model), fresh)
        assert set(fresh["run"]) == {model.run} and set(fresh["step"]) == {model.step}


def test_padding_weighs_nothing(experiment, studied, monkeypatch):
    monkeypatch.setattr(retention, "PADDING", 17)
    pd.testing.assert_frame_equal(ask(experiment).table, studied.table)
    batch, weight = pad_texts([np.array([3, 4, 5]), np.array([6])])
    assert weight.tolist() == [[1, 1, 1], [1, 0, 0]] and batch.shape == (2, 3)


def test_interference_that_holds_an_item_is_left_out(experiment, studied):
    leak = [experiment.interference[0] + " " + experiment.items["text"][0]]
    leak += [experiment.foils["text"][0] + " 1 2 3"]
    leaky = SimpleNamespace(**vars(experiment))
    leaky.interference = leak + experiment.interference
    with pytest.warns(UserWarning) as said:
        made = ask(leaky)
    assert str(said[0].message) == (
        "study_and_retain: left out texts that stand in two lists: 2 of interference against items "
        "and foils (holds one)"
    )
    pd.testing.assert_frame_equal(made.table, studied.table)
    assert made.audit["dropped"].sum() == 2 and studied.audit["dropped"].sum() == 0


def test_a_control_that_is_a_studied_text_goes_with_its_foils(experiment):
    twice = SimpleNamespace(**vars(experiment))
    twice.items = experiment.items.assign(
        text=[*experiment.items["text"][:11], "  " + experiment.items["text"][0]]
    )
    with pytest.warns(UserWarning, match=r"1 of control against studied \(the same text\)"):
        made = ask(twice, lags=(0,))
    assert "i11" not in set(made.table["item"]) and "i10" in set(made.table["item"])
    lonely = SimpleNamespace(**vars(twice))
    lonely.items = twice.items[[*[True] * 6, *[False] * 5, True]]
    lonely.foils = experiment.foils[experiment.foils["item"].isin(lonely.items["item"])]
    message = (
        "study_and_retain: no items in group 'control'; without controls drift reads as "
        "forgetting, without studied items there is nothing to forget"
    )
    with pytest.warns(UserWarning), refuses(message):
        ask(lonely, lags=(0,))


def test_a_list_that_is_known_before_study_is_warned_of(experiment, studied):
    knowing = SimpleNamespace(**vars(experiment))
    knowing.model = bigram(np.eye(64, k=1) * 9, run="counts")  # counts upwards
    texts = [" ".join(map(str, range(k, k + 8))) for k in range(12)]
    knowing.items = experiment.items.assign(text=texts)
    before = probe_recognition(knowing.model, knowing.items, knowing.foils)
    recalled = probe_recall(knowing.model, knowing.items)
    table = pd.concat([before, recalled.assign(foil="itself")], ignore_index=True)
    with pytest.warns(UserWarning) as said:
        retention._warn_of_known(table)
    assert str(said[0].message) == (
        "study_and_retain: the list may be known already: before study 100% of its texts or more "
        "are recognised against every kind of foil, 100% are recalled exactly; a gain has no room, "
        "so study other texts or give harder foils"
    )
    for half in (
        table[~table["metric"].str.startswith("recall")],  # recall was not asked for
        table.assign(value=table["value"].where(table["metric"] != "recognition", 0.5)),
    ):
        with pytest.warns(UserWarning, match="known already"):
            retention._warn_of_known(half)
    # one kind of foil that leaves room is enough
    hard = table["foil"] == "shuffled"
    mine = (table["metric"] == "recognition") & hard & (table["item"] == "i0")
    table.loc[mine, "value"] = 0.5  # of six: .92
    table.loc[table["metric"] == "recall_exact", "value"] = 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        retention._warn_of_known(table)
        retention._warn_of_known(studied.table[studied.table["phase"] == "before"])


def interrupted(experiment, folder, after, **changes):
    """A run that is stopped once it has taken ``after`` updates."""

    def stop(update, loss):
        if update == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(experiment, folder=folder, progress=stop, **changes)


@pytest.mark.parametrize("after", [1, 4, 7, 8])
def test_an_interrupted_run_goes_on_where_it_was(experiment, studied, tmp_path, after, monkeypatch):
    # written at every update: in the study (6), right after it, between two lags (7 and 9)
    monkeypatch.setattr(retention, "CHECKPOINT", -1.0)
    interrupted(experiment, tmp_path, after + 1)
    seen = []
    again = ask(experiment, folder=tmp_path, progress=lambda update, loss: seen.append(update))
    assert seen == list(range(after + 1, 10))
    pd.testing.assert_frame_equal(again.table, studied.table)
    pd.testing.assert_frame_equal(again.losses, studied.losses)
    pd.testing.assert_frame_equal(again.ledger, studied.ledger)
    read = ask(experiment, folder=tmp_path, progress=lambda *_: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(read.table, studied.table)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "state.safetensors",
        "table.parquet",
    ]


def test_without_a_clock_a_run_is_kept_at_its_lags(experiment, studied, tmp_path):
    interrupted(experiment, tmp_path, 9)
    seen = []
    again = ask(experiment, folder=tmp_path, progress=lambda update, loss: seen.append(update))
    assert seen == [8, 9]  # kept last at lag 1, after update 7
    pd.testing.assert_frame_equal(again.table, studied.table)


def test_rows_newer_than_the_weights_are_asked_again(experiment, studied, tmp_path):
    # killed between the two files: the table has lag 3, the weights are those of lag 1
    interrupted(experiment, tmp_path, 9)
    weights = (tmp_path / "state.safetensors").read_bytes()
    ask(experiment, folder=tmp_path)
    (tmp_path / "state.safetensors").write_bytes(weights)
    table = load(tmp_path / "table.parquet")
    newer = table["lag"] == 3
    assert newer.any()
    table.loc[newer & (table["metric"] == "loss"), "value"] = 99.0  # as another machine might say
    save(table, tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(ask(experiment, folder=tmp_path).table, studied.table)


def test_a_resumed_run_draws_the_dropout_it_would_have_drawn(experiment, tmp_path):
    wet = SimpleNamespace(**vars(experiment))
    wet.model = LanguageModel(neox(vocabulary=64, hidden_dropout=0.3), Numbers(), run="wet")
    interrupted(wet, tmp_path, 8, recall=False)
    resumed, whole = ask(wet, folder=tmp_path, recall=False), ask(wet, recall=False)
    pd.testing.assert_frame_equal(resumed.losses, whole.losses)
    pd.testing.assert_frame_equal(resumed.table, whole.table)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"learning_rate": 2e-2}, "learning_rate 0.01, asked for 0.02"),
        ({"lags": (0, 1)}, "lags [0, 1, 3], asked for [0, 1]"),
        ({"seed": 6}, "seed 5, asked for 6"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(experiment, tmp_path, changes, said):
    interrupted(experiment, tmp_path, 7)
    message = (
        f"study_and_retain: {tmp_path} holds a run with {said}; ask for the same, or give another "
        "folder"
    )
    with refuses(message):
        ask(experiment, folder=tmp_path, **changes)


def test_a_run_is_not_resumed_with_other_texts_or_weights(experiment, tmp_path):
    ask(experiment, folder=tmp_path, lags=(0, 1))
    for name, other in (
        ("items", experiment.items.assign(text=number_texts(12, 9))),
        ("foils", experiment.foils.assign(text=[*experiment.foils["text"][:-1], "1 2 3"])),
        ("interference", experiment.interference[1:]),
        ("model", LanguageModel(neox(seed=1, vocabulary=64), Numbers(), run="tiny", step=100)),
    ):
        changed = SimpleNamespace(**{**vars(experiment), name: other})
        word = "weights" if name == "model" else name
        with pytest.raises(InputError, match=f"holds a run with {word} "):
            ask(changed, folder=tmp_path, lags=(0, 1))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"exposures": 0}, "study_and_retain: exposures is 0, but must be at least 1"),
        ({"batch": 0}, "study_and_retain: batch is 0, but must be at least 1"),
        ({"learning_rate": -1}, "study_and_retain: learning_rate is -1, but must be above 0"),
        (
            {"lags": (0, 2, 2)},
            "study_and_retain: lags are [0, 2, 2]; give whole numbers from 0 up, increasing, such "
            "as 0, 1, 2, 5, 10",
        ),
        (
            {"lags": ()},
            "study_and_retain: lags are []; give whole numbers from 0 up, increasing, such as 0, "
            "1, 2, 5, 10",
        ),
        (
            {"learning_rate": 1e30},
            "study_and_retain: the loss is nan at update 2; lower the learning rate (it is 1e+30); "
            "its batch holds the studied items i4, i5",
        ),
    ],
)
def test_settings_that_are_refused(experiment, changes, message):
    with refuses(message):
        ask(experiment, **changes)


def test_a_foil_longer_than_the_context_is_refused_before_any_update(experiment):
    long = SimpleNamespace(**vars(experiment))
    texts = [" ".join(["7"] * 65), *experiment.foils["text"][1:]]
    long.foils = experiment.foils.assign(text=texts)
    message = (
        "probe_recognition: the unrelated foil of item i0 has 65 tokens, the context holds 64; cut "
        "it (1 of 31 texts)"
    )
    with refuses(message):
        ask(long, progress=lambda *_: pytest.fail("trained"))


def test_a_loss_that_breaks_after_the_study_names_the_batch(experiment, monkeypatch):
    step = Trainer.step

    def breaks(self, *parts):
        if self.update == 8:  # the study has 6 updates
            self.module.get_output_embeddings().weight.data.fill_(np.nan)
        return step(self, *parts)

    monkeypatch.setattr(Trainer, "step", breaks)
    message = (
        "study_and_retain: the loss is nan at update 9; lower the learning rate (it is 0.01); its "
        "batch is number 3 of the new text"
    )
    with refuses(message):
        ask(experiment)


def test_lists_that_are_refused(experiment):
    bad = SimpleNamespace(**vars(experiment))
    bad.interference = ["1 2 3"]
    with refuses(
        "study_and_retain: the interference has 3 tokens, an update takes 8 x 64; give more text"
    ):
        ask(bad)
    bad.items = experiment.items.assign(group="studied")
    with refuses(
        "study_and_retain: no items in group 'control'; without controls drift reads as "
        "forgetting, without studied items there is nothing to forget"
    ):
        ask(bad)
    bad.items = experiment.items.assign(group="seen")
    with refuses("study_and_retain: group 'seen' of item 'i0'; groups are studied and control"):
        ask(bad)


def test_the_learning_rate_that_teaches_most_within_the_limit(experiment):
    parts = (experiment.model, experiment.items, experiment.foils)
    tried = choose_learning_rate(*parts, exposures=3, rates=(1e30, 0.1, 1e-2, 1e-5), drift=0.5)
    assert tried["learning_rate"].tolist() == [1e-5, 1e-2, 0.1, 1e30]
    assert tried["best"].tolist() == [False, True, False, False]
    loss, drift = tried["studied_loss"], tried["control_drift"]
    assert loss[2] < loss[1] < loss[0] and drift[2] > 0.5 > drift[1] and np.isnan(loss[3])
    # the drift is that of the control items' own loss
    table = ask(experiment, learning_rate=1e-2, lags=(0,), batch=64, seed=0).table
    own = table.query("metric == 'loss' and foil == 'itself' and group == 'control'")
    mean = own.groupby("phase", observed=True)["value"].mean()
    assert drift[1] == pytest.approx(mean["after"] - mean["before"])
    message = (
        "choose_learning_rate: every rate from 1e+30 up breaks the training or costs the controls "
        "more than 1 nats per token; give smaller rates"
    )
    with refuses(message):
        choose_learning_rate(*parts, exposures=3, rates=(1e30,))


# --- the statistic -------------------------------------------------------------------------------


def test_d_prime_and_auc_by_hand():
    # items 1 2 3, foils 3 4 5: means 2 apart, both variances 1, so d' = 2. Of the nine pairs
    # eight have the item below and one (3 and 3) is a tie: 8.5 / 9.
    item, foil = np.array([1.0, 2, 3]), np.array([3.0, 4, 5])
    assert d_prime(item, foil) == 2 and auc(item, foil) == pytest.approx(8.5 / 9)
    assert auc(item, item) == 0.5 and d_prime(item, item) == 0
    assert np.isnan(d_prime(np.ones(3), np.zeros(3))) and np.isnan(d_prime(item[:1], foil))


def test_auc_against_scipy_and_the_normal_law():
    rng = np.random.default_rng(0)
    item, foil = rng.integers(0, 9, 40) / 4, rng.integers(2, 12, 30) / 4
    u = mannwhitneyu(foil, item).statistic  # counts pairs with the foil above, ties a half
    assert auc(item, foil) == pytest.approx(u / (40 * 30))
    item, foil = rng.normal(0, 1, 3000), rng.normal(1, 1, 3000)
    assert auc(item, foil) == pytest.approx(norm.cdf(d_prime(item, foil) / np.sqrt(2)), abs=0.01)


def panel(values, times=(None, 0, 5), foil="itself", metric="recall_token"):
    """A table of ``{(group, item): values by time}``; None is before study."""
    parts = []
    for (group, item), row in values.items():
        for step, (time, value) in enumerate(zip(times, row, strict=True)):
            part = rows(metric, value, run="r", step=step, group=group, item=item)
            phase, lag = ("before", np.nan) if time is None else ("after", float(time))
            parts.append(part.assign(foil=foil, phase=phase, lag=lag))
    return pd.concat(parts, ignore_index=True)


def value(curve, **where):
    for name, wanted in where.items():
        curve = curve[curve[name] == wanted]
    assert len(curve) == 1
    return curve["value"].iloc[0]


HAND = {
    ("studied", "s0"): (0.1, 0.9, 0.5),
    ("studied", "s1"): (0.3, 0.9, 0.5),
    ("control", "c0"): (0.2, 0.3, 0.4),
    ("control", "c1"): (0.2, 0.3, 0.2),
}


def test_differences_and_share_by_hand():
    # Studied .2 -> .9 -> .5, controls .2 -> .3 -> .3. Gains .7 and .3, drift .1 and .1: net gains
    # .6 and .2, of which a third is left at lag 5.
    curve = retention_curve(panel(HAND))
    assert value(curve, metric="recall_token", group="studied", lag=0) == pytest.approx(0.9)
    changes = curve[curve["metric"] == "difference"]
    assert value(changes, group="studied - control", lag=5) == pytest.approx(0.2)
    assert value(changes, group="studied - before", lag=5) == pytest.approx(0.3)
    assert value(changes, group="control - before", lag=5) == pytest.approx(0.1)
    assert value(changes, group="net gain", lag=0) == pytest.approx(0.6)
    kept = curve[curve["metric"] == "retention"]
    assert value(kept, lag=0) == pytest.approx(1) and value(kept, lag=5) == pytest.approx(1 / 3)
    assert set(kept["of"]) == {"recall_token"} and set(curve["item"]) == {"all"}


def test_a_list_that_went_on_improving_keeps_more_than_all():
    # net gains .6 at lag 0 and .8 - .0 at lag 5: four thirds, which is no contradiction; a share of
    # tokens above 1 is one
    better = {k: (row[0], row[1], 1.0 if k[0] == "studied" else 0.2) for k, row in HAND.items()}
    kept = retention_curve(panel(better)).query("metric == 'retention'")
    assert value(kept, lag=5) == pytest.approx(4 / 3)
    worse = {k: (row[0], row[1], 0.1 if k[0] == "studied" else 0.2) for k, row in HAND.items()}
    kept = retention_curve(panel(worse)).query("metric == 'retention'")
    assert value(kept, lag=5) == pytest.approx(-1 / 6)
    with pytest.raises(InputError):
        retention_curve(panel({k: (0.1, 1.2, 0.5) for k in HAND}))


def test_drift_of_both_lists_is_taken_out():
    drifted = {
        key: tuple(v + d for v, d in zip(row, (0, 0.05, 0.1), strict=True))
        for key, row in HAND.items()
    }
    still, moved = retention_curve(panel(HAND)), retention_curve(panel(drifted))
    for group in ("net gain", "studied - control"):
        for metric in ("difference", "retention"):
            one, two = (
                c[(c["group"] == group) & (c["metric"] == metric)][["value", "lo", "hi"]]
                for c in (still, moved)
            )
            np.testing.assert_allclose(one, two, atol=1e-12)


def test_names_and_order_change_nothing():
    renamed = {(group, f"verse {item}"): row for (group, item), row in HAND.items()}
    shuffled = panel(renamed).sample(frac=1, random_state=0)
    keys = ["metric", "group", "foil", "of", "lag"]
    one, two = (
        retention_curve(t).sort_values(keys)[["value", "lo", "hi"]].to_numpy()
        for t in (panel(HAND), shuffled)
    )
    np.testing.assert_array_equal(one, two)


def test_no_gain_has_no_share():
    flat = {k: (0.2, 0.2 + 0.1 * (k[1][1] == "0"), 0.2) for k in HAND}
    kept = retention_curve(panel(flat)).query("metric == 'retention'")
    assert kept["value"].isna().all()
    assert set(kept["reason"]) == {"the first gain is not told from 0"}


def test_where_all_agree_the_interval_is_binomial():
    # three of three: the exact bound is .025 ** (1/3) = .2924018; none of three: 1 - that
    always = {(g, f"{g}{i}"): (0, 1, 1) for g in ("studied", "control") for i in range(3)}
    curve = retention_curve(panel(always, metric="recall_exact"))
    levels = curve[(curve["metric"] == "recall_exact") & (curve["group"] == "studied")]
    by_lag = levels.set_index(levels["lag"].fillna(-1))
    assert by_lag.loc[0, "lo"] == pytest.approx(0.2924018) and by_lag.loc[0, "hi"] == 1
    assert by_lag.loc[-1, "hi"] == pytest.approx(1 - 0.2924018) and by_lag.loc[-1, "lo"] == 0


def test_intervals_against_the_normal_approximation_and_a_loop():
    rng = np.random.default_rng(3)
    made = {}
    for group, shift in (("studied", -1.0), ("control", 0.0)):
        for i in range(60):
            before = 4 + rng.normal()
            made[group, f"{group}{i:02d}"] = (before, before + shift + rng.normal(0, 0.5))
    own = panel(made, times=(None, 0), metric="loss")
    foil = {k: (4 + rng.normal(), 4 + rng.normal()) for k in made}
    theirs = panel(foil, times=(None, 0), metric="loss", foil="unrelated")
    curve = retention_curve(pd.concat([own, theirs]), draws=4000)
    net = curve[
        (curve["of"] == "loss") & (curve["foil"] == "itself") & (curve["group"] == "net gain")
    ]
    net = net[net["metric"] == "difference"].iloc[0]
    gain = {
        g: np.array([v[1] - v[0] for (h, _), v in made.items() if h == g])
        for g in ("studied", "control")
    }
    se = np.sqrt(sum(x.var() / 60 for x in gain.values()))
    assert net["value"] == pytest.approx(gain["studied"].mean() - gain["control"].mean())
    assert (net["hi"] - net["lo"]) / (2 * 1.96 * se) == pytest.approx(1, abs=0.05)
    # AUC and d' drawn by repeating items with their foils, one draw at a time
    x = np.array([v[1] for (g, _), v in made.items() if g == "studied"])
    y = np.array([v[1] for (g, _), v in foil.items() if g == "studied"])
    picks = rng.integers(0, 60, (1500, 60))
    for metric, statistic in (("recognition_auc", auc), ("d_prime", d_prime)):
        row = curve[
            (curve["metric"] == metric) & (curve["lag"] == 0) & (curve["group"] == "studied")
        ]
        row = row.iloc[0]
        loop = np.quantile([statistic(x[p], y[p]) for p in picks], [0.025, 0.975])
        assert row["value"] == pytest.approx(statistic(x, y))
        np.testing.assert_allclose([row["lo"], row["hi"]], loop, atol=0.12 * (loop[1] - loop[0]))


def test_what_retention_curve_refuses():
    with refuses("retention_curve: no column 'phase'; study_and_retain gives such a table"):
        retention_curve(panel(HAND).drop(columns="phase"))
    with refuses(
        "retention_curve: no rows of group 'control' in phase 'before'; drift needs controls, and "
        "a gain needs the measurement before study"
    ):
        retention_curve(panel({k: v for k, v in HAND.items() if k[0] == "studied"}))
    gap = panel(HAND)
    gap = gap[~((gap["group"] == "control") & (gap["lag"] == 5))]
    with refuses(
        "retention_curve: no rows of group 'control' at lag 5; drift needs controls at every lag"
    ):
        retention_curve(gap)
    with refuses("retention_curve: 1 draws, an interval needs at least 2"):
        retention_curve(panel(HAND), draws=1)


# --- figures -------------------------------------------------------------------------------------


def test_figures_show_every_series(studied):
    curve = retention_curve(studied.table, draws=50)
    figure = plot_recognition(curve)
    assert isinstance(figure, go.Figure)
    names = [trace.name for trace in figure.data if trace.name]
    assert sorted(set(names)) == ["control", "studied", "studied list before study"]
    assert len(names) == 6  # two kinds of foil here, three series each
    told = curve.query("metric == 'recognition' and group == 'studied' and foil == 'shuffled'")
    told = told[told["lag"].notna()].sort_values("lag")
    drawn = [t for t in figure.data if t.name == "studied"][1]
    np.testing.assert_allclose(drawn.y, told["value"], atol=1e-6)
    np.testing.assert_array_equal(drawn.x, told["lag"] + 1)
    assert len([t for t in plot_recall(curve).data if t.name == "studied"]) == 6
    assert all(trace.name for trace in plot_retention(curve).data if trace.showlegend is not False)


def test_what_figures_refuse(studied):
    with refuses("plot_recall: no rows of recall_exact by lag; give what retention_curve returns"):
        plot_recall(retention_curve(panel(HAND)).query("metric == 'difference'"))
    with refuses("plot_recognition: rows of single items; pool them with retention_curve first"):
        plot_recognition(studied.table)
