"""Training on one task after another: every batch, every asking, and the tasks themselves."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from tests.conftest import Numbers, neox
from workbench import (
    InputError,
    accuracy_matrix,
    knowledge_accumulation,
    plasticity,
    stability_gap,
    stream_tasks,
    train_stream,
)
from workbench.models import LanguageModel
from workbench.streams import audit_tasks
from workbench.training import TextStream, Trainer


def refuses(message):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


def numbers(n, low, high, seed, words=20):
    rng = np.random.default_rng(seed)
    return [" ".join(map(str, rng.integers(low, high, words))) for _ in range(n)]


def tasks_of(*spans, n=20, held=3):
    """A task a span of numbers, its texts drawn from it alone."""
    parts = []
    for at, (low, high) in enumerate(spans):
        name = "abc"[at]
        texts = numbers(n + held, low, high, at)
        # of unlike lengths, so that some are padded and some cut
        texts[n:] = [" ".join(t.split()[: 6 + 3 * k]) for k, t in enumerate(texts[n:])]
        part = pd.DataFrame({"item": [f"{name}{i}" for i in range(n + held)], "text": texts})
        part["group"] = ["seen"] * n + ["unseen"] * held
        parts.append(part.assign(task=name))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def experiment():
    return SimpleNamespace(
        model=LanguageModel(neox(vocabulary=64), Numbers(), run="tiny", step=100),
        tasks=tasks_of((0, 20), (20, 40), (40, 60)),
    )


def ask(experiment, **changes):
    asked = dict(learning_rate=1e-2, updates=4, lags=(1, 2), rows=2, tokens=10, seed=5) | changes
    return train_stream(experiment.model, experiment.tasks, **asked)


@pytest.fixture(scope="module")
def streamed(experiment):
    return ask(experiment, joint=True, alone=True)


@pytest.fixture
def batches(monkeypatch):
    """Every batch that a trainer is given, in order."""
    seen, step = [], Trainer.step

    def spy(self, batch, weight=None):
        seen.append(batch.copy())
        return step(self, batch, weight)

    monkeypatch.setattr(Trainer, "step", spy)
    return seen


def rows_of(table, **where):
    for name, wanted in where.items():
        table = table[table[name].astype(str) == str(wanted)]
    return table


def own_stream(experiment, name, rows=2):
    texts = experiment.tasks.query("task == @name and group == 'seen'")["text"]
    tokens = experiment.model.encode(["\n".join(texts)])[0]
    return TextStream(tokens, rows, 64, 5)


def scored(module, text, tokens):
    """Mean loss and share right of the first tokens of a text, from bare logits."""
    ids = torch.tensor([[int(word) for word in text.split()][:tokens]])
    with torch.inference_mode():
        logits = module(ids).logits[0, :-1].log_softmax(-1)
    true = ids[0, 1:]
    loss = -logits.gather(1, true[:, None]).mean().item()
    return loss, (logits.argmax(-1) == true).float().mean().item()


def test_the_stream_against_a_plain_loop(experiment, streamed):
    module = neox(vocabulary=64)
    asked = experiment.tasks[experiment.tasks["group"] == "unseen"]
    table = streamed.table.set_index(["step", "item", "metric"])
    pooled = table[table["phase"].isin(["before", "during", "after"])]["value"]
    compared = 0

    def compare(step, names):
        nonlocal compared
        module.eval()
        for each in asked[asked["task"].isin(list(names))].itertuples():
            loss, right = scored(module, each.text, 10)
            assert pooled[100 + step, each.item, "loss"] == pytest.approx(loss, abs=2e-5)
            assert pooled[100 + step, each.item, "top1"] == pytest.approx(right, abs=1e-6)
            compared += 2
        module.train()

    compare(0, "abc")
    for at, name in enumerate("abc"):
        stream, trainer = own_stream(experiment, name), Trainer(module, 1e-2)
        for update in range(1, 5):
            trainer.step(stream.batch(update))
            if update in (1, 2):
                compare(4 * at + update, "abc"[: at + 1])
        compare(4 * at + 4, "abc")
    assert compared == len(pooled)


def test_alone_and_joint_against_plain_loops(experiment, streamed):
    alone = streamed.table[streamed.table["phase"] == "alone"].set_index(["item", "metric"])
    asked = experiment.tasks[experiment.tasks["group"] == "unseen"]
    for name in "abc":
        module = neox(vocabulary=64)
        stream, trainer = own_stream(experiment, name), Trainer(module, 1e-2)
        for update in range(1, 5):
            trainer.step(stream.batch(update))
        for each in asked[asked["task"] == name].itertuples():
            loss, right = scored(module.eval(), each.text, 10)
            assert alone["value"][each.item, "loss"] == pytest.approx(loss, abs=2e-5)
            assert alone["value"][each.item, "top1"] == pytest.approx(right, abs=1e-6)
            assert alone["presentation"][each.item, "loss"] == "abc".index(name) + 1
    assert len(alone) == 18 and set(alone["step"]) == {104}
    # together: row r of update u is row number 2 (u - 1) + r, tasks in turn
    module, mixed = neox(vocabulary=64), []
    trainer = Trainer(module, 1e-2)
    streams = {name: own_stream(experiment, name) for name in "abc"}
    for number in range(24):
        turn, name = number // 3, "abc"[number % 3]
        mixed.append(streams[name].batch(turn // 2 + 1)[turn % 2])
    for update in range(12):
        trainer.step(np.stack(mixed[2 * update : 2 * update + 2]))
    joint = streamed.table[streamed.table["phase"] == "joint"].set_index(["item", "metric"])
    for each in asked.itertuples():
        loss, _ = scored(module.eval(), each.text, 10)
        assert joint["value"][each.item, "loss"] == pytest.approx(loss, abs=2e-5)
    assert set(joint["step"]) == {112} and set(joint["presentation"]) == {0}


def test_who_is_asked_when(streamed):
    table = streamed.table[streamed.table["metric"] == "loss"]
    places = table.groupby(["phase", "presentation", "current", "lag"], observed=True)
    asked = {
        key: ("".join(sorted(part["task"].unique())), part["step"].iloc[0], len(part))
        for key, part in places
    }
    assert asked == {
        ("before", 0, "", 0): ("abc", 100, 9),
        ("during", 1, "a", 1): ("a", 101, 3),
        ("during", 1, "a", 2): ("a", 102, 3),
        ("after", 1, "a", 4): ("abc", 104, 9),
        ("during", 2, "b", 1): ("ab", 105, 6),
        ("during", 2, "b", 2): ("ab", 106, 6),
        ("after", 2, "b", 4): ("abc", 108, 9),
        ("during", 3, "c", 1): ("abc", 109, 9),
        ("during", 3, "c", 2): ("abc", 110, 9),
        ("after", 3, "c", 4): ("abc", 112, 9),
        ("joint", 0, "", 12): ("abc", 112, 9),
        ("alone", 1, "a", 4): ("a", 104, 3),
        ("alone", 2, "b", 4): ("b", 104, 3),
        ("alone", 3, "c", 4): ("c", 104, 3),
    }
    assert streamed.losses["part"].value_counts().to_dict() == {
        "stream": 12,
        "joint": 12,
        "alone": 8,
    }
    own = streamed.losses[streamed.losses["part"] == "stream"]
    assert own["update"].tolist() == list(range(1, 13)) and own["task"].tolist() == [
        *"aaaabbbbcccc"
    ]


def test_every_statistic_takes_the_table(streamed):
    losses = streamed.table[streamed.table["metric"] == "loss"]
    matrix = accuracy_matrix(losses, draws=20)
    assert matrix["value"].notna().all()  # joint, initial and curves were all there
    grid = losses[losses["phase"] == "after"].groupby(["presentation", "task"], observed=True)[
        "value"
    ]
    first = grid.mean().unstack()
    bwt = matrix.set_index("metric")["value"]["bwt"]
    by_hand = (
        -((first.loc[3, "a"] - first.loc[1, "a"]) + (first.loc[3, "b"] - first.loc[2, "b"])) / 2
    )
    assert bwt == pytest.approx(by_hand) and bwt < 0  # tasks without a number in common
    assert (stability_gap(losses, draws=20).query("metric == 'wf'")["value"] > 0).all()
    lost = plasticity(losses, draws=20).query("metric == 'plasticity_loss'")
    assert lost["value"].iloc[0] == 0 and len(lost) == 3


def test_a_recurring_task_meets_the_same_batches(experiment, batches):
    made = ask(experiment, order=["a", "b", "a"], lags=())
    assert len(batches) == 12
    for first, again in zip(batches[:4], batches[8:], strict=True):
        np.testing.assert_array_equal(first, again)
    losses = made.table[made.table["metric"] == "loss"]
    assert rows_of(losses, phase="after", presentation=3)["current"].unique() == ["a"]
    table = knowledge_accumulation(losses, draws=5)
    assert set(table[table["recurrence"] == 2]["task"]) == {"a", "all"}


def test_a_task_repeated_at_once_has_nothing_to_forget(experiment):
    made = ask(experiment, order=["a", "a"], lags=(1,))
    table = knowledge_accumulation(made.table[made.table["metric"] == "loss"], draws=5)
    between = table[table["metric"] == "forgotten_between"]
    assert (between[["value", "lo", "hi"]] == 0).all(axis=None) and len(between) == 2


def test_a_model_that_does_not_learn_forgets_nothing(experiment, monkeypatch):
    def stand_still(self, batch, weight=None):
        self.update += 1
        return 0.0

    monkeypatch.setattr(Trainer, "step", stand_still)
    made = ask(experiment, alone=True, joint=True)
    for metric in ("loss", "top1"):
        part = made.table[made.table["metric"] == metric]
        table = accuracy_matrix(part, draws=20).set_index("metric")
        for key in ("bwt", "fwt", "forgetting", "forgetting_mammoth", "intransigence"):
            assert table["value"][key] == 0 == table["lo"][key] == table["hi"][key]
        assert set(table["disagrees"]) == {""}
        gap = stability_gap(part, draws=20)
        assert (gap[gap["metric"].isin(["wf", "wp"])]["value"] == 0).all()
        assert (plasticity(part, draws=20).query("metric == 'plasticity_loss'")["value"] == 0).all()


def test_replay_mixes_in_the_tasks_before(experiment, batches):
    ask(experiment, rows=4, replay=0.5, lags=(), updates=2)
    streams = {name: own_stream(experiment, name, rows=4) for name in "abc"}
    np.testing.assert_array_equal(batches[0], streams["a"].batch(1))  # nothing came before
    # b: rows 0 and 1 are a's, of its batches 1, 2 and then 3, 4
    for update, drawn in ((1, (1, 2)), (2, (3, 4))):
        wanted = streams["b"].batch(update)
        for row in (0, 1):
            wanted[row] = streams["a"].batch(drawn[row])[row]
        np.testing.assert_array_equal(batches[1 + update], wanted)
    # c: rows of a and of b in turn
    wanted = streams["c"].batch(1)
    wanted[0], wanted[1] = streams["a"].batch(1)[0], streams["b"].batch(1)[1]
    np.testing.assert_array_equal(batches[4], wanted)


def test_the_caller_keeps_weights_and_random_numbers(experiment, streamed):
    before = experiment.model.weights_hash()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    again = ask(experiment, joint=True, alone=True)
    assert torch.equal(state, torch.get_rng_state())
    assert experiment.model.weights_hash() == before and not experiment.model.module.training
    pd.testing.assert_frame_equal(again.table, streamed.table)
    pd.testing.assert_frame_equal(again.losses, streamed.losses)
    assert again.table.attrs["passport"]["order"] == ["a", "b", "c"]


def test_dropout_is_the_same_in_the_stream_and_alone(experiment):
    # the second task of a stream whose first was not learned is that task alone
    wet = SimpleNamespace(**vars(experiment))
    wet.model = LanguageModel(neox(vocabulary=64, hidden_dropout=0.3), Numbers(), run="wet")
    first = ask(wet, order=["b"], lags=()).table
    second = ask(wet, order=["a", "b"], lags=(), alone=True).table
    alone = rows_of(second, phase="alone", task="b")["value"].to_numpy()
    np.testing.assert_array_equal(
        alone, rows_of(first, phase="after", task="b")["value"].to_numpy()
    )


def test_progress_is_told_of_every_update(experiment):
    told = []
    ask(experiment, order=["a", "b"], lags=(), progress=lambda update, loss: told.append(update))
    assert told == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_loss_that_is_not_a_number_names_update_and_task(experiment, monkeypatch):
    step = Trainer.step

    def breaks(self, batch, weight=None):
        if self.update == 2 and (batch >= 20).any():  # the third update of b
            self.update += 1
            raise FloatingPointError("train: the loss is nan at update 3; lower the learning rate")
        return step(self, batch, weight)

    monkeypatch.setattr(Trainer, "step", breaks)
    with refuses(
        "train_stream: the loss is nan at update 3 of task 'b' (presentation 2); lower the "
        "learning rate (it is 0.01)"
    ):
        ask(experiment)


def test_texts_of_one_token_cannot_be_asked(experiment):
    short = SimpleNamespace(**vars(experiment))
    at = experiment.tasks["item"] == "a20"
    short.tasks = experiment.tasks.assign(text=experiment.tasks["text"].where(~at, "7"))
    with pytest.warns(UserWarning, match="dropped 1 held-out texts of a single token"):
        made = ask(short, lags=())
    assert "a20" not in set(made.table["item"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"order": ["a", "z"]}, "train_stream: no task 'z'; there are a, b, c"),
        ({"updates": 0}, "train_stream: updates is 0, but must be at least 1"),
        ({"rows": 0}, "train_stream: rows is 0, but must be at least 1"),
        ({"tokens": 1}, "train_stream: tokens is 1, but must be at least 2"),
        ({"learning_rate": 0.0}, "train_stream: learning_rate is 0.0, but must be above 0"),
        ({"lags": (0, 1)}, "train_stream: lags are [0, 1]; they count updates from 1"),
        ({"replay": 1.0}, "train_stream: replay is 1.0, a share of the rows from 0, below 1"),
        (
            {"rows": 50},
            "train_stream: task 'a' has 400 tokens to train on, an update takes 50 x 64; give more "
            "text, or fewer rows",
        ),
    ],
)
def test_settings_that_are_refused(experiment, changes, message):
    with refuses(message):
        ask(experiment, **changes)


def test_lags_beyond_the_end_are_left_out(experiment):
    made = ask(experiment, order=["a"], lags=(2, 4, 9)).table
    assert sorted(made["lag"].unique()) == [0, 2, 4]  # 4 is the end itself, and asked once
    assert len(rows_of(made, lag=4, metric="loss", task="a")) == 3


# --- the tasks ------------------------------------------------------------------------------------


def test_tasks_of_the_suite_differ_and_share_nothing(tiny):
    tasks = stream_tasks(tiny.suite, held_out=10, seed=1)
    # a corpus of one's own has no second translation
    assert list(tasks["task"].unique()) == ["biographies", "Python documentation", "random words"]
    counts = tasks.groupby(["task", "group"]).size()
    assert set(counts[:, "unseen"]) <= {9, 10} and counts[:, "seen"].min() > 300
    trained = set(tasks.query("group == 'seen'")["text"])
    assert not trained & set(tasks.query("group == 'unseen'")["text"])
    pd.testing.assert_frame_equal(tasks, stream_tasks(tiny.suite, held_out=10, seed=1))
    other = stream_tasks(tiny.suite, held_out=10, seed=2)
    assert set(other.query("group == 'unseen'")["item"]) != set(
        tasks.query("group == 'unseen'")["item"]
    )


def test_the_suites_model_goes_through_its_tasks(tiny):
    tasks = stream_tasks(tiny.suite, held_out=6)
    source = tiny.suite.checkpoints("base")
    made = train_stream(
        source.at(source.steps[-1]), tasks, learning_rate=3e-3, updates=6, lags=(1,), tokens=16
    )
    losses = made.table[made.table["metric"] == "loss"]
    level = losses[losses["phase"].isin(["before", "after"])]
    mean = level.groupby(["presentation", "task"], observed=True)["value"].mean()
    for at, name in enumerate(tasks["task"].unique(), 1):  # each is learned in its turn
        assert mean[at, name] < mean[at - 1, name]


def test_tasks_of_a_file_are_split_and_audited(tmp_path):
    law = [
        f"statute {i} binds the clerk of {i} harbours and all nine keepers of toll {i}"
        for i in range(8)
    ]
    sea = [
        f"on day {i} the boat went {i} miles past the long grey cape to port {i}" for i in range(8)
    ]
    near = sea[3] + " again"  # all but one of its runs of eight words are trained on
    file = tmp_path / "tasks.jsonl"
    lines = [{"text": t, "task": "law"} for t in law]
    lines += [{"text": t, "task": "sea", "group": "train"} for t in sea]
    frame = pd.DataFrame(lines)
    more = pd.DataFrame({"text": [near, "quite another thing altogether it seems to us here"], "task": "sea", "group": "test"})  # fmt: skip
    frame = pd.concat([frame.fillna({"group": "train"}), more])
    frame.to_json(file, orient="records", lines=True)
    with pytest.warns(UserWarning, match="drop_shared: dropped 1 of 4 controls that share words"):
        tasks = stream_tasks(source=file, held_out=2, seed=0)
    assert tasks.attrs["dropped"] == 1 and near not in set(tasks["text"])
    counts = tasks.groupby(["task", "group"], sort=False).size()
    assert counts.to_dict() == {
        ("law", "seen"): 6, ("law", "unseen"): 2, ("sea", "seen"): 8, ("sea", "unseen"): 1,
    }  # fmt: skip


def test_tasks_that_are_refused(tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"text": "one two", "task": "a"}\n{"text": "three four"}\n')
    with refuses(f"stream_tasks: item 'tasks-00002' of {file} has no task"):
        stream_tasks(source=file)
    file.write_text('{"text": "one two"}\n')
    with refuses(f"stream_tasks: {file} has no column 'task'; it has item, text, group"):
        stream_tasks(source=file)
    file.write_text('{"text": "one two", "task": "a"}\n{"text": "three four", "task": "a"}\n')
    with refuses(
        "stream_tasks: task 'a' has 2 texts, none marked as held out; 2 are to be held out, which "
        "takes 4: give more, or hold out fewer"
    ):
        stream_tasks(source=file, held_out=2)
    with refuses("stream_tasks: give a file of texts with a column `task`, or a suite"):
        stream_tasks()
    tasks = tasks_of((0, 20), (20, 40))
    with refuses("audit_tasks: no column 'task'; there are item, text, group"):
        audit_tasks(tasks.drop(columns="task"))
    with refuses(
        "audit_tasks: group 'dev' of item 'a0'; groups are seen (trained on) and unseen (asked about)"
    ):
        audit_tasks(tasks.assign(group=["dev", *tasks["group"][1:]]))
    with refuses("audit_tasks: no text in group 'unseen'"):
        audit_tasks(tasks.query("group == 'seen'"))
    with refuses("audit_tasks: task 'b' has no text in group 'seen'; give it some"):
        audit_tasks(tasks.query("task == 'a' or group == 'unseen'"))
    with refuses("train_stream: no column 'task'; there are item, text, group"):
        train_stream(None, tasks.drop(columns="task"), learning_rate=1.0)
    copied = tasks[tasks["group"] == "seen"].head(3)["text"].tolist()
    held_b = (tasks["task"] == "b") & (tasks["group"] == "unseen")
    text = tasks["text"].mask(held_b, pd.Series(copied, index=tasks.index[held_b]))
    # the copies stand in another task's training text, under another spelling of the blanks
    with (
        pytest.warns(UserWarning, match="dropped 3 of 6 controls"),
        refuses(
            "audit_tasks: task 'b' has no text in group 'unseen' that no task trains on; give it others"
        ),
    ):
        audit_tasks(tasks.assign(text=text.where(~held_b, "  " + text)))
