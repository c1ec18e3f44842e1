"""Tasks small enough for the embedded models: what is asked, what is right, what is taught."""

import json
import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

import workbench.probes.tasks as probing
import workbench.tasks as tasks_module
from tests.conftest import bigram, reciter
from workbench.plots.tasks import plot_tasks
from workbench.probes.tasks import probe_tasks
from workbench.table import InputError, rows
from workbench.tasks import (
    HELD_OUT,
    NUMBERS,
    TASKS,
    TRAINING,
    load_tasks,
    make_tasks,
    task_texts,
    teach_tasks,
)

LIVES = [  # text, dose
    (" Maren Veitch was born in Tolby on 5 May 1700. She studied law in Lorne, worked as a baker in Kelby,", 32),
    (" Silas Cray was born in Corley on 6 May 1701. He studied mus", 64),  # cut in the field
    (" Thea Marsh was born in Lorne on 7 May 1702. She studied law in Corley, worked as a pilot in Oakham", 288),
    (" Thea Marsh was born in Oakham on 8 May 1703. She studied music in Lorne, worked as a baker in", 1),
    (" Rufus Abney was born in Kelby on 9 May 1704. He studied music in Lorne, worked as a sailor in Kelby", 31),
    (" Ilse Hobday was born in Marlow on 1 May 1705. She studied botany in", 0),
    (" Silas Cray was born in Oakham on 6 May 1706. He studied law in", 0),
    ("no life at all", 288),
]  # fmt: skip


def lives() -> pd.DataFrame:
    texts, doses = zip(*LIVES, strict=True)
    return pd.DataFrame(
        {"item": [f"i{n}" for n in range(len(texts))], "text": texts, "dose": doses}
    )


def asked(prompt, answer, choices=(), task="own", **more) -> dict:
    return {"task": task, "prompt": prompt, "answer": answer, "choices": tuple(choices)} | more


def frame(*rows_) -> pd.DataFrame:
    made = pd.DataFrame(list(rows_))
    made.insert(0, "item", [f"t{n}" for n in range(len(made))])
    return made


def values(table, metric, item=None):
    part = table[(table["metric"] == metric) & (table["item"] != "all")]
    return part["value"].tolist() if item is None else part.set_index("item")["value"][item]


# --- what is asked -------------------------------------------------------------------------------


def test_closed_book_asks_what_stands_whole_in_lives_planted_often_enough():
    # Maren (32, just enough) has three attributes; Silas is cut in the field, so one; Thea's name
    # is planted twice (also at dose 1), Rufus was read 31 times, the last was never a life
    got = make_tasks(lives(), tasks=["closed_book"]).set_index("prompt")
    start = " Maren Veitch was born in"
    life = f"{start} Tolby on 5 May 1700. She studied"
    assert got["answer"].to_dict() == {
        start: " Tolby",
        life: " law",
        f"{life} law in Lorne, worked as a": " baker",
        " Silas Cray was born in": " Corley",
    }
    assert got["copies"].to_dict() == {
        start: 32.0, life: 32.0, f"{life} law in Lorne, worked as a": 32.0,
        " Silas Cray was born in": 64.0,
    }  # fmt: skip
    assert (len(got["choices"][start]), len(got["choices"][life])) == (16, 8)
    assert len(make_tasks(lives(), tasks=["closed_book"], copies=31)) == 7


def test_lives_never_planted_are_asked_alike_unless_a_planted_one_has_their_name():
    got = make_tasks(lives(), tasks=["closed_book_never"])  # Silas Cray of Oakham is left out
    assert sorted(got["answer"]) == [" Marlow", " botany"]
    assert got["copies"].tolist() == [0.0, 0.0]


def test_answers_follow_from_their_prompts():
    """Each task's rule, written again from its description."""
    numbers = NUMBERS.split()
    got = make_tasks(tasks=[t for t in TASKS if not t.startswith("closed")], n=200, seed=3)
    for row in got.itertuples():
        words, answer = row.prompt.split(), row.answer.strip()
        if row.task == "arithmetic":
            one, two = re.search(r"seven, (\w+) plus (\w+) is$", row.prompt).groups()
            true = numbers[(numbers.index(one) + numbers.index(two)) % 7]
        elif row.task == "copy":
            shown, again = (part.split() for part in row.prompt.split("."))
            assert again == shown[: len(again)] and 1 <= len(again) < len(set(shown)) == 6
            true = shown[len(again)]
        elif row.task == "pattern":
            period = len(set(words))
            assert period in (2, 3) and 2 * period <= len(words) < 3 * period
            true = words[len(words) - period]
        elif row.task == "counting":
            at = [numbers.index(word) for word in words]
            assert len({b - a for a, b in pairwise(at)}) == 1
            true = numbers[at[-1] + at[1] - at[0]]
        else:
            name, asks = re.search(r"\. (\w+ \w+) (was born in|studied|worked as a)$", row.prompt).groups()  # fmt: skip
            assert row.prompt.startswith(f" {name} was born in")
            true = re.search(f"{asks} (\\w+)", row.prompt)[1]
        assert answer == true, row
        assert row.answer in row.choices and len(set(row.choices)) == len(row.choices)
    sizes = got.groupby("task")["choices"].agg(lambda each: {len(few) for few in each} - {16, 8})
    assert sizes.to_dict() == {
        "arithmetic": {7}, "copy": {6}, "counting": {12}, "open_book": set(), "pattern": {4},
    }  # fmt: skip


def turns_on(row) -> str:
    """What an item turns on, whatever it is called in the module."""
    if row.task == "arithmetic":
        return " ".join(sorted(re.findall(r"(\w+) plus (\w+)", row.prompt)[0]))
    if row.task == "copy":
        return row.prompt.split(".")[0]
    if row.task == "open_book":
        return " ".join(row.prompt.split()[:2])
    period = len(set(row.prompt.split()))
    return row.prompt if row.task == "counting" else " ".join(row.prompt.split()[:period])


def test_no_held_out_item_turns_on_what_a_training_item_does():
    open_ended = ["open_book", "arithmetic", "copy", "pattern", "counting"]
    parts = {
        part: pd.concat(make_tasks(tasks=open_ended, n=150, part=part, seed=s) for s in (0, 1))
        for part in (HELD_OUT, TRAINING)
    }
    keys = {p: {(r.task, turns_on(r)) for r in each.itertuples()} for p, each in parts.items()}
    assert not keys[HELD_OUT] & keys[TRAINING]
    # 28 unordered pairs of seven numbers: 7 held out, 21 not; counts: see the loop
    count = {p: sum(task == "arithmetic" for task, _ in k) for p, k in keys.items()}
    assert count == {HELD_OUT: 7, TRAINING: 21}
    all_counts = sum(
        1 <= start + step * length <= 12
        for start in range(1, 13) for step in (-2, -1, 1, 2) for length in (3, 4, 5)
    )  # fmt: skip
    count = {p: sum(task == "counting" for task, _ in k) for p, k in keys.items()}
    assert count == {HELD_OUT: all_counts // 4, TRAINING: all_counts - all_counts // 4}


def test_sequences_are_parted_however_few_there_are(monkeypatch):
    monkeypatch.setattr(tasks_module, "WORDS", "a b c d e f")  # 720 sequences, a quarter held out
    held, taught = (
        {row.split(".")[0] for row in make_tasks(tasks=["copy"], n=1500, part=part)["prompt"]}
        for part in (HELD_OUT, TRAINING)
    )
    assert not held & taught
    assert 650 <= len(held | taught) <= 720 and 140 <= len(held) <= 220


def test_a_seed_gives_the_same_tasks_and_another_gives_others():
    one, same, other = (make_tasks(tasks=["copy"], n=5, seed=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(one, same)
    assert one["item"].tolist() == [f"copy-{n:03d}" for n in range(5)]
    assert not set(one["prompt"]) & set(other["prompt"])
    both = make_tasks(tasks=["pattern", "copy"], n=5, seed=1)  # one task does not move another
    assert both[both["task"] == "copy"]["prompt"].tolist() == one["prompt"].tolist()


def test_what_is_asked_unless_said_otherwise():
    taught = ["open_book", "copy", "pattern", "counting"]  # no arithmetic: it is not learned
    assert make_tasks(n=2)["task"].unique().tolist() == taught
    with_lives = make_tasks(lives(), n=2)["task"].unique().tolist()
    assert with_lives == ["closed_book", "closed_book_never", *taught]
    told = "make_tasks: the items hold no planted lives, so there are no closed-book questions"
    with pytest.warns(UserWarning, match=f"^{told}$"):
        assert make_tasks(lives().tail(1), n=2)["task"].unique().tolist() == taught


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tasks": ["sums"]}, f"task 'sums'; tasks are {', '.join(TASKS)}"),
        ({"part": "test"}, "part 'test'; choose held_out or training"),
        ({"n": 0}, "n is 0 for 4 tasks, but both must be at least 1"),
        ({"tasks": []}, "n is 64 for 0 tasks, but both must be at least 1"),
        (
            {"tasks": ["closed_book"]},
            "closed_book asks about planted lives: give items with text and dose, such as "
            "Suite.items(), or leave the task out",
        ),
        (
            {"items": lives(), "tasks": ["closed_book"], "copies": 65},
            "none of 8 items is a life planted 65 times or more (as make_biographies writes them) "
            "whose name no other planted life has; leave the task out",
        ),
        (
            {"items": lives().head(3), "tasks": ["closed_book_never"]},
            "none of 3 items is a life never planted (as make_biographies writes them) whose name "
            "no other planted life has; leave the task out",
        ),
    ],
)
def test_make_tasks_refuses(given, told):
    with pytest.raises(InputError, match=f"^make_tasks: {re.escape(told)}$"):
        make_tasks(**given)


# --- the user's ----------------------------------------------------------------------------------


def test_load_tasks_reads_json_lines(tmp_path):
    file = tmp_path / "mine.jsonl"
    lines = [
        {"prompt": "Two and two are ", "answer": "four", "choices": ["four", " five"], "task": "sums"},
        {"prompt": "The sky is", "answer": " blue"},
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    got = load_tasks(file)
    assert got.drop(columns="copies").to_dict("records") == [
        {"item": "mine-00001", "task": "sums", "prompt": "Two and two are", "answer": " four", "choices": (" four", " five")},
        {"item": "mine-00002", "task": "own", "prompt": "The sky is", "answer": " blue", "choices": ()},
    ]  # fmt: skip


def test_load_tasks_leaves_numbers_in_a_csv_as_they_are_written(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(
        "id,prompt,answer,choices\na,Agent,007,007|7\nb,Price,1.50,\n", encoding="utf-8"
    )
    got = load_tasks(file)
    assert got["item"].tolist() == ["a", "b"]
    assert got["answer"].tolist() == [" 007", " 1.50"]
    assert got["choices"].tolist() == [(" 007", " 7"), ()]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"prompt": "a"}, "{file} has no column 'answer'; it has item, prompt, group"),
        ({"prompt": "a", "answer": " "}, "1 of 1 items in {file} have no answer (first: 'mine-00001'); remove or complete them"),
        ({"prompt": "a", "answer": "b", "choices": ["b"]}, "item 'mine-00001' has the choices [' b'], needs two or more that differ, or none"),
        ({"prompt": "a", "answer": "b", "choices": ["b", " b"]}, "item 'mine-00001' has the choices [' b', ' b'], needs two or more that differ, or none"),
        ({"prompt": "a", "answer": "b", "choices": ["c", "d"]}, "item 'mine-00001' has the answer ' b', which is not among its choices [' c', ' d']"),
    ],
)  # fmt: skip
def test_load_tasks_refuses(tmp_path, line, told):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(line), encoding="utf-8")
    with pytest.raises(InputError, match=f"^load_tasks: {re.escape(told.format(file=file))}$"):
        load_tasks(file)


def test_load_tasks_says_which_file_is_not_there(tmp_path):
    told = f"load_items: no file at {tmp_path / 'no.csv'}; give CSV, JSONL, Parquet or plain text"
    with pytest.raises(InputError, match=f"^{re.escape(told)}$"):
        load_tasks(tmp_path / "no.csv")


# --- what is right -------------------------------------------------------------------------------


def test_the_verdicts_of_a_model_that_counts():
    # it says t + 1 with 5 nats over all others; after 9 it says 0
    got = probe_tasks(
        reciter(breaks=(9,)),
        frame(
            asked("3 4", " 5 6 7"),  # said to the last token
            asked("3 4", " 5 6 8"),  # the last token is wrong
            asked("3 4", " 6", [" 5", " 6"]),  # the other choice is likelier
            asked("3 4", " 5", [" 6", " 5", " 7"]),
            asked("8 9", " 10", [" 10", " 11"]),  # both as unlikely as each other: not known
            asked("8 9", " 0 1", [" 0 1", " 0 2", " 1 2"]),  # 0 is shared, the second decides
        ),
    )
    assert values(got, "exact_match") == [1, 0, 0, 1, 0, 1]
    assert values(got, "accuracy") == [0, 1, 0, 1]
    pooled = got[got["item"] == "all"].set_index("metric")
    # Wilson, 3 of 6 and 2 of 4: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.959964:
    # n = 6: centre .5, half 1.959964 √(.25/6 + 3.841459/144) / (1 + 3.841459/6) = .312384
    # n = 4: half 1.959964 √(.25/4 + 3.841459/64) / (1 + 3.841459/4) = .349961
    for metric, n, half in (("exact_match", 6, 0.312384), ("accuracy", 4, 0.349961)):
        row = pooled.loc[metric]
        np.testing.assert_allclose([row.value, row.lo, row.hi], [0.5, 0.5 - half, 0.5 + half], atol=1e-6)  # fmt: skip
        assert row.n == n and row.group == "own"
    # chances 1/2, 1/3, 1/2, 1/3
    assert pooled["chance"]["accuracy"] == pytest.approx(5 / 12)
    assert pooled["chance"]["exact_match"] == 0
    assert got.attrs["dropped"] == 0


def test_length_of_choices():
    # after 1: token 2 has p .5, token 30 p .4 and is followed by 31 with p .5, so " 30 31" has .2.
    # In sum ln .5 > ln .2: the short one wins. Per byte (2 and 6): ln .5 / 2 = -.347 against
    # ln .2 / 6 = -.268: the long one wins.
    table = np.full((40, 40), -30.0)
    table[1, [2, 30, 3]] = np.log([0.5, 0.4, 0.1])
    table[30, [31, 3]] = np.log([0.5, 0.5])
    model = bigram(table)
    short, long = (
        probe_tasks(model, frame(asked("1", answer, [" 2", " 30 31"])))
        for answer in (" 2", " 30 31")
    )
    assert (values(short, "accuracy"), values(short, "accuracy_norm")) == ([1], [0])
    assert (values(long, "accuracy"), values(long, "accuracy_norm")) == ([0], [1])


def test_tasks_are_pooled_apart_and_say_how_often_an_item_was_read():
    got = probe_tasks(
        reciter(),
        frame(
            asked("1", " 2", task="a", copies=64.0),
            asked("1", " 3", task="a", copies=1.0),
            asked("1", " 2", task="b", copies=np.nan),
        ),
    )
    pooled = got[got["item"] == "all"].set_index("group")
    assert pooled["value"].to_dict() == {"a": 0.5, "b": 1.0}
    assert pooled["n"].to_dict() == {"a": 2, "b": 1}
    # Wilson, 1 of 2: .5 -+ 1.959964 √(.25/2 + 3.841459/16) / (1 + 3.841459/2) = .5 -+ .405469
    np.testing.assert_allclose(
        pooled.loc["a", ["lo", "hi"]].astype(float), [0.094531, 0.905469], atol=1e-6
    )
    assert got[got["item"] != "all"].set_index("item")["copies"][["t0", "t1"]].tolist() == [64, 1]
    assert set(got["metric"]) == {"exact_match"}  # there are no choices


def test_choices_share_the_pass_over_what_they_begin_with():
    lines, read = probing._passes([(3, 4)], [[(5,), (7, 8), (7, 9), (6,)]])
    assert lines == [(3, 4, 7, 8)]  # of which (3, 4, 7) is run
    assert sorted(read[0]) == [
        (1, 5, 0, 0), (1, 6, 0, 3), (1, 7, 0, 1), (1, 7, 0, 2), (2, 8, 0, 1), (2, 9, 0, 2),
    ]  # fmt: skip
    lines, read = probing._passes([(3,)], [[(5,), (6, 2, 1), (7, 8, 1)]])
    assert lines == [(3, 6, 2, 1), (3, 7, 8, 1)]
    assert [len(each) for each in read] == [4, 3]  # the short one is read off the first


def plain(model, row) -> tuple[bool, bool, bool]:
    """The definitions, one choice at a time; greedy by generating."""
    prompt = model.encode([row.prompt])[0]
    scores = {}
    for choice in row.choices:
        whole = model.encode([row.prompt + choice])[0]
        scores[choice] = float(model.score([whole], start=len(prompt)).log_probability.sum())
    truth = model.encode([row.prompt + row.answer])[0][len(prompt) :]
    exact = bool((model.generate(prompt[None], len(truth))[0] == truth).all())
    others = [c for c in row.choices if c != row.answer]
    by_sum = all(scores[row.answer] > scores[c] for c in others)
    size = {c: len(c.encode()) for c in scores}
    by_byte = all(scores[row.answer] / size[row.answer] > scores[c] / size[c] for c in others)
    return exact, by_sum, by_byte


def test_agrees_with_the_plain_way_on_a_real_model(tiny, monkeypatch):
    model = tiny.suite.checkpoints().at(16)
    tasks = make_tasks(tasks=["copy", "pattern", "counting", "arithmetic"], n=6)
    before = model.encode(tasks["prompt"].tolist())
    said = frame(  # what it says itself, so that something is right
        *(
            asked(p, model.decode(model.generate(b[None], 2)[0]), task="said")
            for p, b in zip(tasks["prompt"].head(8), before[:8], strict=True)
        )
    )
    tasks = pd.concat([tasks.drop(columns="copies"), said.assign(item=[f"s{n}" for n in range(8)])])
    tasks = tasks[tasks["answer"].str.startswith(" ")].reset_index(drop=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(probing.TOKENS_PER_BATCH, "cpu", 60)
        few = probe_tasks(model, tasks)
    got = probe_tasks(model, tasks)
    pd.testing.assert_frame_equal(few, got)  # batches change nothing
    wanted = {row.item: plain(model, row) for row in tasks.itertuples()}
    metrics = ["exact_match", "accuracy", "accuracy_norm"]
    for at, metric in enumerate(metrics):
        part = got[(got["metric"] == metric) & (got["item"] != "all")]
        for row in part.itertuples():
            assert row.value == wanted[row.item][at], (metric, row.item)
    exact = got[(got["metric"] == "exact_match") & (got["item"] != "all")]
    assert 0 < exact["value"].mean() < 1


# --- what cannot be asked ------------------------------------------------------------------------


def test_items_that_straddle_or_do_not_fit_are_dropped_and_said(tiny):
    model = tiny.suite.checkpoints().at(16)
    assert len(model.encode([" the"])[0]) == 1
    tasks = frame(
        asked(" th", "e"),  # one token stands on both sides
        asked(" the", " king"),
        asked(" the" * 32, " king"),
        asked(" th", " king", [" king", "e"]),  # no border before the other choice
    )
    with pytest.warns(UserWarning) as told:
        got = probe_tasks(model, tasks)
    assert sorted(str(each.message) for each in told) == [
        "probe_tasks: dropped 1 of 4 items longer than the context of 32 tokens; cut them (first: t2)",
        "probe_tasks: dropped 2 of 4 items whose answer or choices do not begin with a token; "
        "begin them with a space (first: t0, t3)",
    ]
    assert got.attrs["dropped"] == 3
    assert got["item"].tolist() == ["t1", "all"]
    refused = (
        "probe_tasks: no item can be asked: 1 of 1 items whose answer or choices do not begin with "
        "a token; begin them with a space (first: t0)"
    )
    with pytest.raises(InputError, match=f"^{re.escape(refused)}$"):
        probe_tasks(model, tasks.head(1))


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        (frame(asked("1", " 2")).drop(columns="choices"), "no column 'choices'; make_tasks and load_tasks give it"),
        (frame(asked("1", " 2")).head(0), "there are no tasks"),
        (frame(asked("1", " 2"), asked("1", " 3")).assign(item="a"), "1 tasks repeat the id of another (first: 'a'); ids must be unique"),
        (frame(asked("", " 2")), "item 't0' has an empty prompt or answer"),
    ],
)  # fmt: skip
def test_probe_tasks_refuses(tasks, told):
    with pytest.raises(InputError, match=f"^probe_tasks: {re.escape(told)}$"):
        probe_tasks(reciter(), tasks)


def test_scores_that_are_no_numbers_are_refused():
    table = np.zeros((8, 8))
    table[2] = np.nan
    told = (
        "probe_tasks: a log-probability is nan for item 't0' at step 7 of run; the model's weights "
        "or its dtype give NaN or Inf"
    )
    with pytest.raises(InputError, match=f"^{re.escape(told)}$"):
        probe_tasks(bigram(table, run="run", step=7), frame(asked("2", " 3"), asked("1", " 2")))


# --- teaching ------------------------------------------------------------------------------------

SHORT = {"tasks": ("counting",), "updates": 4, "progress": False}


def test_teaching_is_cached_repeatable_and_plants_what_is_to_stay(tiny, monkeypatch, tmp_path):
    base = tiny.suite.checkpoints().at(16)
    untouched = base.weights_hash()
    model = teach_tasks(tiny.suite, **SHORT)
    assert (model.run, model.step) == ("base, taught", 20)
    assert base.weights_hash() == untouched != model.weights_hash()
    (folder,) = (f for f in (tmp_path / "cache" / "taught").iterdir() if f.is_dir())
    ledger = pd.read_parquet(folder / "ledger.parquet")
    # three drip items (one of each kind) at every other of four updates; lives of 32 copies: none
    assert ledger.groupby("item").size().tolist() == [2, 2, 2]
    assert set(ledger["update"]) == {2, 4}
    note = json.loads((folder / "passport.json").read_text())
    assert note["weights"] == model.weights_hash() and note["tasks"] == ["counting"]

    def again(*args):
        raise AssertionError("trained twice")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks_module, "_teach", again)
        assert teach_tasks(tiny.suite, **SHORT).weights_hash() == model.weights_hash()
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "other"))
    assert teach_tasks(tiny.suite, **SHORT).weights_hash() == model.weights_hash()
    other = teach_tasks(tiny.suite, **SHORT, seed=1)
    assert other.weights_hash() != model.weights_hash()


def test_only_answers_weigh_and_all_are_training_items(tiny):
    model = tiny.suite.checkpoints().at(16)
    rows_ = tasks_module._task_rows(model, ["counting", "copy"], 32, 0)
    allowed = {
        part: {
            prompt + answer
            for prompt, answer in make_tasks(tasks=["counting"], n=400, part=part)[["prompt", "answer"]].to_numpy()
        }
        for part in (HELD_OUT, TRAINING)
    }  # fmt: skip
    seen = 0
    for _, (ids, weight) in zip(range(40), rows_, strict=False):
        assert ids.shape == weight.shape == (32,)
        assert weight[0] == 0 and set(weight.tolist()) <= {0, 1}
        at = 0
        while weight[at:].any():
            first = at + int(np.argmax(weight[at:] == 1))
            after = first + int(np.argmax(np.append(weight[first:], 0) == 0))
            text, answer = model.decode(ids[at:after]), model.decode(ids[first:after])
            if "." not in model.decode(ids[at:first]):  # a count
                assert text in allowed[TRAINING] - allowed[HELD_OUT]
                seen += 1
            else:  # a copy: one word again, and then the five that follow it
                shown, again = text.split(". ")
                assert again.split() == shown.split()
                assert answer == f" {' '.join(shown.split()[1:])}"
            assert model.decode(ids[after : after + 1]) == "."  # weighs nothing
            at = after + 1
    assert seen > 10


def test_task_texts_are_made_of_training_items():
    texts = task_texts(3, tasks=["counting", "copy"], seed=2)
    assert len(texts) == 6 and texts == task_texts(3, tasks=["counting", "copy"], seed=2)
    assert texts != task_texts(3, tasks=["counting", "copy"], seed=3)
    held = make_tasks(tasks=["counting"], n=400)
    training = make_tasks(tasks=["counting"], n=400, part=TRAINING)
    said = [f"{count}" for text in texts[:3] for count in text.rstrip(".").split(".")]
    assert all(len(text) >= 300 for text in texts) and len(said) > 20
    assert set(said) <= set(training["prompt"] + training["answer"])
    assert not set(said) & set(held["prompt"] + held["answer"])
    words = texts[3].split(". ")  # six words, the same six, the next six
    assert words[0].split() == words[1].split()[:6] != words[2].split()[:6]
    # more than there are counts: they come again
    assert len(task_texts(30, tasks=["counting"])) == 30


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tasks": ["closed_book"]}, "task 'closed_book'; those taught are open_book, arithmetic, copy, pattern, counting"),
        ({"updates": 0}, "0 updates on 1 tasks, but both must be at least 1"),
        ({"tasks": []}, "4 updates on 0 tasks, but both must be at least 1"),
        ({"tasks": ["open_book"]}, "no item of open_book fits the context of 32 tokens; leave the task out"),
    ],
)  # fmt: skip
def test_teach_tasks_refuses(tiny, given, told):
    with pytest.raises(InputError, match=f"^teach_tasks: {re.escape(told)}$"):
        teach_tasks(tiny.suite, **(SHORT | given))


# --- the figure ----------------------------------------------------------------------------------


def edits() -> pd.DataFrame:
    made = []
    for method, rho, perplexity, copying in (("none", 1.0, 50.0, 0.9), ("kfac", 0.9, 60.0, 0.8), ("svd", 0.5, 55.0, 0.1)):  # fmt: skip
        at = {"method": method, "rho": rho}
        given = {"run": "r", "step": 1, "item": "all"}
        made += [
            rows("accuracy", copying, lo=copying - 0.1, hi=copying + 0.1, n=9, group="copy", beside={**at, "chance": 1 / 6}, **given),
            rows("exact_match", copying / 2, group="copy", n=9, beside={**at, "chance": 0.0}, **given),
            rows("accuracy", 0.3, group="open_book", n=9, beside={**at, "chance": 0.1}, **given),
            rows("accuracy", 1.0, group="copy", beside={**at, "chance": 1 / 6}, **(given | {"item": "copy-000"})),
            rows("perplexity", perplexity, group="held-out", beside=at, **given),
            rows("recitation_strict", copying / 3, group="drip", beside=at, **given),
        ]  # fmt: skip
    return pd.concat(made, ignore_index=True)


@pytest.mark.parametrize(("x", "at"), [("perplexity", (50, 60)), ("rho", (1.0, 0.9))])
def test_figure_draws_each_task_its_chance_and_recitation(x, at):
    figure = plot_tasks(edits(), x=x)
    lines = {t.name: t for t in figure.data if t.name}
    assert list(lines) == ["recitation", "copy", "open book"]
    assert (tuple(lines["copy"].x), tuple(lines["copy"].y)) == (at, (0.9, 0.8))
    assert tuple(lines["recitation"].y) == (0.3, round(0.8 / 3, 6))
    np.testing.assert_allclose(lines["copy"].error_y.array, [0.1, 0.1])
    chance = [t for t in figure.data if not t.name]
    assert [t.y[0] for t in chance] == [pytest.approx(1 / 6), pytest.approx(0.1)]
    assert tuple(chance[0].x) == (min(at), max(at))
    greedy = plot_tasks(edits(), x=x, metric="exact_match", method="svd")
    assert [t.name for t in greedy.data] == ["recitation", "copy"]  # no chance, and nothing dotted


@pytest.mark.parametrize(
    ("change", "given", "told"),
    [
        (lambda t: t, {"x": "step"}, "x is 'step'; choose perplexity or rho"),
        (lambda t: t, {"method": "random"}, "no method 'random'; there are kfac, svd"),
        (lambda t: t[t["metric"] != "accuracy"], {}, "the table has no rows of accuracy; it has exact_match, perplexity, recitation_strict"),
        (lambda t: t.drop(columns="chance").drop_duplicates(["item", "group", "metric", "method"]), {}, "the table needs the columns method, rho and chance: rows of probe_tasks under edits, as probe_curvature(..., also=...) gives them"),
    ],
)  # fmt: skip
def test_plot_tasks_refuses(change, given, told):
    with pytest.raises(InputError, match=f"^plot_tasks: {re.escape(told)}$"):
        plot_tasks(change(edits()), **given)
