"""Fictional facts: how they are made, put into the text, asked about, and what is left of them."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from tests.conftest import Numbers, bigram, neox, reciter
from workbench import facts as facts_module
from workbench.facts import ANSWERS, DEPTHS, TOLD, WORDINGS, load_facts, make_facts
from workbench.injection import inject_facts
from workbench.models import LanguageModel
from workbench.plots import plot_effectivity, plot_fact_trace, plot_retainability
from workbench.probes.facts import encode_questions, probe_facts, target_scores
from workbench.stats.facts import (
    _resample,
    decay_line,
    fact_effects,
    fact_trace,
    window_gains,
)
from workbench.stats.laws import fit_forgetting
from workbench.stats.summarise import percentile_tail
from workbench.table import InputError, rows
from workbench.training import TextStream, Trainer, fingerprint


def refuses(message):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


# --- the facts -----------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    return [part.strip() + "." for part in text.split(".") if part.strip()]


def test_one_entity_is_told_and_asked_as_the_wordings_say():
    facts = make_facts(2, schedules=("single",), seed=3)
    mine = facts[facts["entity"] == facts["entity"][0]]
    name, home = mine["entity"].iloc[0], mine.set_index("item")["probe_target"].iloc[0]
    assert mine["depth"].value_counts().to_dict() == dict.fromkeys(DEPTHS, 3)
    # the home's question as it was read: one of its twelve wordings, and the passage's
    asked = mine[mine["depth"] == "verbatim"].iloc[0]
    said = f"{asked['probe_prefix']}{asked['probe_target']}."
    turn = [form.format(name=name, value=home.strip()) for form in WORDINGS["home"].split("|")]
    at = turn.index(said)
    assert said in sentences(asked["passage"])
    # its paraphrase is the wording before that one, round the circle of twelve
    other = mine[mine["depth"] == "paraphrase"].iloc[0]
    assert f"{other['probe_prefix']}{home}." == turn[(at - 1) % 12]
    # paraphrase k tells it in the k-th wording after the passage's
    for k, text in enumerate(asked["paraphrases"], 1):
        assert turn[(at + k) % 12] in sentences(text)


@settings(max_examples=5, deadline=None)
@given(st.integers(2, 5), st.integers(0, 10_000))
def test_what_is_asked_was_told_or_never_told(n, seed):
    facts = make_facts(n, seed=seed)
    injected = facts[facts["group"] == "injected"].drop_duplicates("entity")
    told = {e.entity: [e.passage, *e.paraphrases] for e in injected.itertuples()}
    everything = " ".join(text for texts in told.values() for text in texts)
    whole = facts["probe_prefix"] + facts["probe_target"] + "."
    for each, said in zip(facts.itertuples(), whole, strict=True):
        if each.depth == "verbatim":
            assert said in sentences(each.passage)
        else:
            texts = " ".join([each.passage, *each.paraphrases])
            assert each.probe_prefix not in texts and each.probe_target in each.passage
        if each.depth == "composition":
            assert each.probe_prefix not in everything
            teacher = each.probe_prefix.split()[3]
            assert f" {teacher}." in each.passage  # the sentence that is needed beside the answer's
        if each.group == "never":
            # no passage joins the answer to this wording, under whatever name
            form = re.escape(said).replace(each.entity, r"\w+").replace(r"\ ", " ")
            assert not re.search(form, everything)
            assert each.entity not in everything


def test_a_partner_has_the_same_answers_under_other_names():
    facts = make_facts(6, seed=1)
    assert len(facts) == 2 * 3 * 6 * 9 and facts["item"].is_unique
    assert facts.groupby("pair")["entity"].nunique().eq(2).all()
    for _, pair in facts.groupby("pair"):
        by = {group: part for group, part in pair.groupby("group")}
        assert by["injected"]["probe_target"].tolist() == by["never"]["probe_target"].tolist()
        assert by["injected"]["depth"].tolist() == by["never"]["depth"].tolist()
        assert not set(by["injected"]["probe_prefix"]) & set(by["never"]["probe_prefix"])
    # an answer serves one pair, so that none is more frequent than another
    targets = facts[facts["depth"] == "verbatim"].groupby("probe_target")["pair"].nunique()
    assert targets.eq(1).all()
    assert facts.groupby("schedule")["entity"].nunique().to_dict() == dict.fromkeys(
        ("repeated", "paraphrased", "single"), 12
    )


def test_each_wording_is_first_as_often_as_any_other():
    facts = make_facts(12, schedules=("repeated",), seed=0)
    first = facts[facts["depth"] == "verbatim"]
    form = [
        prefix.replace(entity, "X")
        for prefix, entity in zip(first["probe_prefix"], first["entity"], strict=True)
    ]
    counts = first.assign(form=form).groupby(["group", "form"]).size()
    assert len(counts) == 2 * 3 * 12 and counts.eq(1).all()


def test_no_wording_holds_an_answer_and_no_answer_has_two_places():
    words = [word for pool in ANSWERS.values() for word in pool.split()]
    assert len(words) == len(set(words)) == 3 * 48
    forms = [form for several in WORDINGS.values() for form in several.split("|")]
    forms += list(facts_module.COMPOSED.values())
    held = {word.strip(".,").lower() for form in forms for word in form.split()}
    assert not held & set(words)
    assert {len(several.split("|")) for several in WORDINGS.values()} == {TOLD + 2}
    assert all(f.endswith(" {value}.") and "{name}" in f for f in forms if "{name}" in f)
    names = make_facts(16, seed=0)["entity"].unique()
    assert len({name[:4] for name in names}) > 0.9 * len(names) and len(names) == 96


def test_facts_are_a_function_of_the_seed():
    pd.testing.assert_frame_equal(make_facts(3, seed=5), make_facts(3, seed=5))
    assert set(make_facts(3, seed=5)["entity"]) != set(make_facts(3, seed=6)["entity"])


def test_what_make_facts_refuses():
    too = "make_facts: n is {} in {} schedule(s), but must be at least 2 and over all schedules at most 48"
    with refuses(too.format(1, 3)):
        make_facts(1, seed=0)
    with refuses(too.format(17, 3)):
        make_facts(17, seed=0)
    assert make_facts(48, schedules=["single"], seed=0)["pair"].nunique() == 48
    with refuses("make_facts: schedule 'twice'; schedules are repeated, paraphrased, single"):
        make_facts(2, schedules=["twice"], seed=0)
    with refuses("make_facts: no schedule; give some of repeated, paraphrased, single"):
        make_facts(2, schedules=[], seed=0)


# --- facts of one's own --------------------------------------------------------------------------


def own(n=4, **columns) -> pd.DataFrame:
    """``n`` entities, each with a verbatim question and a paraphrased one."""
    made = []
    for at in range(n):
        about = {"entity": f"E{at}", "passage": f"E{at} makes lamps for {at} towns."}
        about["paraphrases"] = [
            f"Lamps for {at} towns are made by E{at}.",
            f"{at} towns and E{at}.",
        ]
        asked = {"probe_prefix": f"E{at} makes", "probe_target": "lamps", "depth": "verbatim"}
        made.append(about | asked)
        again = {"probe_prefix": f"What E{at} makes is ", "probe_target": "lamps"}
        made.append(about | again | {"depth": "paraphrase"})
    return pd.DataFrame(made).assign(**columns)


def write(tmp_path, frame):
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in frame.to_dict("records")))
    return file


def test_own_facts_are_dealt_by_lot(tmp_path):
    file = write(tmp_path, own(12))
    facts = load_facts(file, seed=1)
    assert list(facts.columns) == list(make_facts(2, seed=0).columns)
    assert facts["probe_target"].eq(" lamps").all()
    assert facts["probe_prefix"][1] == "What E0 makes is"
    assert facts["paraphrases"][0] == own()["paraphrases"].map(tuple)[0]
    entities = facts.drop_duplicates("entity")
    counts = entities.groupby(["group", "schedule"]).size()
    assert len(counts) == 6 and counts.eq(2).all()  # half of 12, over three schedules
    again = load_facts(file, seed=2).drop_duplicates("entity")
    assert again["group"].tolist() != entities["group"].tolist()
    assert facts["pair"].eq("").all()


def test_own_groups_are_kept(tmp_path):
    group = ["injected", "injected", "never", "never"] * 2
    facts = load_facts(write(tmp_path, own(4, group=group)), schedules=["single"])
    assert facts["group"].tolist() == group and facts["schedule"].eq("single").all()
    words = ["train", "train", "held-out", "held-out"] * 2
    facts = load_facts(write(tmp_path, own(4, group=words)), schedules=["single"])
    assert facts["group"].tolist() == group


def test_own_facts_that_are_refused(tmp_path):
    def refused(message, **columns):
        with refuses(message):
            load_facts(write(tmp_path, own(**columns)), schedules=["repeated"])

    file = tmp_path / "mine.jsonl"
    has = "item, passage, group, entity, paraphrases, probe_prefix, probe_target"
    frame = own().drop(columns="depth")
    with refuses(f"load_facts: {file} has no column 'depth'; it has {has}"):
        load_facts(write(tmp_path, frame))
    refused(
        "load_facts: depth 'deep' of item 'mine-00001'; depths are verbatim, paraphrase, composition",
        depth="deep",
    )
    refused(
        "load_facts: entity 'E' has several passages or groups; give each passage an entity of its "
        "own, and its other wordings as paraphrases",
        entity="E",
    )
    refused(
        "load_facts: the verbatim question 'mine-00001' does not stand in its passage; copy it from "
        "there, or call its depth paraphrase",
        probe_target="lights",
    )
    refused("load_facts: group 'other'; groups are injected and never", group="other")
    with refuses(
        "load_facts: 2 entities in group 'injected' for 3 schedules, each needs at least 2; give "
        "more entities or fewer schedules"
    ):
        load_facts(write(tmp_path, own(4)))


def test_what_is_no_frame_of_facts():
    facts, model = make_facts(2, seed=0), bigram(np.zeros((8, 8)))

    def refused(message, frame):
        with refuses(f"probe_facts: {message}"):
            probe_facts(model, frame)

    refused("no column 'pair'; make_facts and load_facts give it", facts.drop(columns="pair"))
    refused("there are no facts", facts[:0])
    name = facts["item"][0]
    refused(
        f"108 questions repeat the id of another (first: '{name}'); ids must be unique",
        pd.concat([facts, facts]),
    )
    refused("group 'seen'; groups are injected and never", facts.assign(group="seen"))
    refused(
        "schedule 'daily'; schedules are repeated, paraphrased, single",
        facts.assign(schedule="daily"),
    )


# --- the probe -----------------------------------------------------------------------------------


def asked(questions, **columns) -> pd.DataFrame:
    """Facts of which only the questions matter: (prefix, target) of numbers."""
    frame = pd.DataFrame(questions, columns=["probe_prefix", "probe_target"])
    names = [f"q{at}" for at in range(len(frame))]
    about = {"item": names, "entity": names, "group": "injected", "pair": "", "depth": "verbatim"}
    about |= {"schedule": "repeated", "passage": "", "paraphrases": [()] * len(frame)}
    return frame.assign(**(about | columns))


def test_only_the_target_is_scored_by_hand():
    # logits 5 for the next number, 0 for 31 others: log p = 5 - ln(e^5 + 31) = -.189691 for the
    # right one, -5.189691 for another. Targets: "4 5" both right; "9 10": 9 wrong, 10 right,
    # mean -2.689691; "5": right, after a longer prefix.
    right = 5 - np.log(np.exp(5) + 31)
    facts = asked([("2 3", " 4 5"), ("2 3", " 9 10"), ("7 9 3 4", " 5")])
    table = probe_facts(reciter(), facts)
    np.testing.assert_allclose(table["value"], [right, right - 2.5, right], atol=1e-6)
    np.testing.assert_allclose(right, -0.189691, atol=1e-6)
    assert table["item"].tolist() == ["q0", "q1", "q2"]
    assert set(table["metric"]) == {"log_probability"} and table.attrs["dropped"] == 0


@pytest.mark.parametrize("bos", [None, 9])
def test_target_scores_against_a_plain_loop(tiny, bos):
    final = tiny.suite.checkpoints("base")
    model = final.at(final.steps[-1])
    model.bos = bos
    facts = make_facts(2, seed=0)
    whole = model.encode((facts["probe_prefix"] + facts["probe_target"]).tolist())
    facts = facts[[len(each) < model.context for each in whole]]
    tokens, prompts, kept = encode_questions(model, facts)
    assert len(kept) > 30
    got = target_scores(model, tokens, prompts)
    for at in range(0, len(kept), 7):
        prefix = model.encode([kept["probe_prefix"][at]])[0].tolist()
        target = model.encode([kept["probe_target"][at]])[0].tolist()
        before = ([] if bos is None else [bos]) + prefix
        with torch.no_grad():
            logits = model.module(torch.tensor([before + target])).logits[0].log_softmax(-1)
        said = [logits[len(before) + k - 1, token].item() for k, token in enumerate(target)]
        assert got[at] == pytest.approx(np.mean(said), abs=1e-5)


class Halves(Numbers):
    """Writes a 1 and the 2 after it as one token, 12."""

    def __call__(self, text, add_special_tokens=True):
        joined = [re.sub(r"\b1 2\b", "12", each) for each in text]
        return {"input_ids": [[int(word) for word in each.split()] for each in joined]}


def test_a_target_that_shares_a_token_with_its_prefix_is_dropped():
    model = LanguageModel(bigram(np.zeros((32, 32))).module, Halves(), run="fake")
    facts = asked([("3 1", " 2"), ("3 4", " 2"), ("3 1", " 2 5"), ("3 4", "")])
    told = "{} of 4 questions whose target does not begin with a token"
    with pytest.warns(UserWarning) as warned:
        tokens, prompts, kept = encode_questions(model, facts)
    assert str(warned[0].message) == f"probe_facts: dropped {told.format(3)} (first: q0, q2, q3)"
    assert kept["item"].tolist() == ["q1"] and kept.attrs["dropped"] == 3
    assert tokens[0].tolist() == [3, 4, 2] and prompts.tolist() == [2]
    facts["probe_prefix"] = "3 1"
    with refuses(f"probe_facts: {told.format(4)}; begin the targets with a space"):
        encode_questions(model, facts.assign(probe_target=" 2"))


def test_questions_that_are_refused():
    model = bigram(np.zeros((32, 32)))
    with refuses(
        "probe_facts: question 'q1' has an empty prefix; the first token has nothing before it"
    ):
        probe_facts(model, asked([("1", " 2"), ("", " 2")]))
    with refuses("probe_facts: question 'q0' is longer than the context of 64 tokens; cut it"):
        probe_facts(model, asked([("1 " * 64, " 2")]))
    broken = np.zeros((32, 32))
    broken[7] = np.nan
    with refuses(
        "probe_facts: log_probability is nan for question number 0 at step 4 of fake; the model's "
        "weights or its dtype give NaN or Inf"
    ):
        probe_facts(bigram(broken, step=4), asked([("1", " 2"), ("7", " 2")]))


# --- the injection -------------------------------------------------------------------------------


def small_facts(n=2, schedules=("repeated", "paraphrased", "single")) -> pd.DataFrame:
    """Passages of five numbers, questions of three."""
    made = []
    for at, (schedule, index, group) in enumerate(
        (s, i, g) for s in schedules for i in range(n) for g in ("injected", "never")
    ):
        numbers = [20 + at, 10, 40 + at, 11, 12]
        passage = " ".join(map(str, numbers))
        about = {
            "item": f"e{at}-q", "entity": f"e{at}", "group": group, "pair": f"{schedule}-{index}",
            "schedule": schedule, "depth": "verbatim", "passage": passage,
            "paraphrases": (f"11 {passage}", f"12 {passage}"),
            "probe_prefix": f"{20 + at} 10", "probe_target": f" {40 + at}",
        }  # fmt: skip
        made.append(about)
    return pd.DataFrame(made)


SETTINGS = dict(
    learning_rate=1e-2, batch=4, injections=3, every=4, window=2, lags=(3, 5, 9), waves=2, settle=2
)
TEXT = [" ".join(map(str, np.random.default_rng(1).integers(0, 64, 900)))]


def small_model(**options) -> LanguageModel:
    module = neox(vocabulary=64, max_position_embeddings=16, **options)
    return LanguageModel(module, Numbers(), run="small", step=100)


@pytest.fixture(scope="module")
def injected():
    return inject_facts(small_model(), small_facts(), TEXT, **SETTINGS)


def test_the_ledger_is_the_schedule_by_hand(injected):
    # settle 2, waves 2: the first entity of a schedule has its slots at updates 3, 7, 11, the
    # second at 4, 8, 12; a single passage stands in the last of them
    want = set()
    for schedule, at in (("repeated", 0), ("paraphrased", 4), ("single", 8)):
        for wave in (0, 1):
            entity = f"e{at + 2 * wave}"
            for slot in (1, 2, 3):
                word = (
                    f"paraphrase-{slot - 1}"
                    if schedule == "paraphrased" and slot > 1
                    else "passage"
                )
                if schedule != "single" or slot == 3:
                    want.add((3 + wave + 4 * (slot - 1), f"{entity}/{word}", slot))
    ledger = injected.ledger
    assert set(zip(ledger["update"], ledger["item"], ledger["slot"], strict=True)) == want
    assert not ledger.duplicated(["update", "row"]).any() and (ledger["offset"] == 0).all()
    told = small_facts().set_index("entity")
    first = ledger[ledger["item"] == "e4/paraphrase-2"].iloc[0]
    ids = np.array([int(word) for word in told.loc["e4", "paraphrases"][1].split()])
    assert first["hash"] == fingerprint(ids)
    assert len(injected.losses) == 12 + 9 and injected.losses["update"].tolist() == list(
        range(1, 22)
    )


def test_what_is_asked_when_by_hand(injected):
    table = injected.table
    one = table[table["item"] == "e0-q"].sort_values("step")
    # just before, at and up to 2 after the slots at since 0, 4 and 8; 3, 5 and 9 after the last
    assert one["since"].tolist() == [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 17]
    assert one["slot"].tolist() == [0] + [1] * 4 + [2] * 4 + [3] * 6
    np.testing.assert_array_equal(one["lag"], [np.nan, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 5, 9])
    assert (one["step"] - one["since"]).eq(103).all()  # the slot is update 3, the model's step 100
    second = table[table["item"] == "e2-q"]
    assert (second["step"] - second["since"]).eq(104).all()
    alone = table[table["item"] == "e8-q"].sort_values("step")
    assert alone["since"].tolist() == [-1, 7, 8, 9, 10, 11, 13, 17]
    assert alone["slot"].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    for name, value in (("batch", 4), ("learning_rate", 1e-2), ("seed", 0)):
        assert table[name].eq(value).all()
    never = table[table["item"] == "e1-q"].sort_values("step")
    assert never["lag"].tolist()[1:] == one["lag"].tolist()[1:]


def test_answers_are_those_of_a_plain_loop(injected):
    model, facts = small_model(), small_facts()
    encoded = model.encode(TEXT)[0]
    stream = TextStream(encoded, 4, 16, 0)
    trainer = Trainer(model.module, 1e-2, warmup=2)
    trainer.module.train()
    for update in range(1, 9):
        batch = stream.batch(update)
        for each in injected.ledger[injected.ledger["update"] == update].itertuples():
            entity, word = each.item.split("/")
            told = facts.set_index("entity").loc[entity]
            text = told["passage"] if word == "passage" else told["paraphrases"][int(word[-1]) - 1]
            ids = [int(number) for number in text.split()]
            batch[each.row, : len(ids)] = ids
        trainer.step(batch)
    trainer.module.eval()
    want = probe_facts(model, facts).set_index("item")["value"]
    got = injected.table[injected.table["step"] == 108].set_index("item")["value"]
    assert len(got) >= 8
    np.testing.assert_allclose(got, want[got.index], atol=1e-5)


def test_the_model_handed_in_is_untouched_and_runs_repeat(injected):
    model = small_model()
    before = {name: each.clone() for name, each in model.module.state_dict().items()}
    again = inject_facts(model, small_facts(), TEXT, **SETTINGS)
    for name, each in model.module.state_dict().items():
        assert torch.equal(each, before[name])
    np.testing.assert_array_equal(again.table["value"], injected.table["value"])
    other = inject_facts(model, small_facts(), TEXT, seed=1, **SETTINGS)
    assert (other.table["value"].to_numpy() != injected.table["value"].to_numpy()).any()


def test_a_bos_stands_before_a_passage():
    model = small_model()
    model.bos = 5
    made = inject_facts(model, small_facts(), TEXT, **SETTINGS)
    first = made.ledger[made.ledger["item"] == "e0/passage"].iloc[0]
    assert first["hash"] == fingerprint(np.array([5, 20, 10, 40, 11, 12]))


def test_an_entity_whose_questions_are_all_dropped_is_still_injected():
    model = small_model()
    model.tokenizer = Halves()
    facts = small_facts()
    first = facts["entity"] == "e0"
    facts.loc[first, ["probe_prefix", "probe_target"]] = ["20 1", " 2"]
    with pytest.warns(UserWarning, match=r"^probe_facts: dropped 1 of 12 questions"):
        got = inject_facts(model, facts, TEXT, **SETTINGS)
    assert (got.ledger["entity"] == "e0").sum() == 3 and "e0" not in set(got.table["entity"])
    assert got.table.attrs["dropped"] == 1


def test_a_batch_that_holds_something_else_stops_the_run(monkeypatch):
    monkeypatch.setattr("workbench.training.plant", lambda batch, exposures, texts: batch)
    with pytest.raises(RuntimeError, match="^train: update 3 should hold e0/passage at row"):
        inject_facts(small_model(), small_facts(), TEXT, **SETTINGS)


def test_a_loss_that_is_not_finite_names_update_and_batch():
    # AdamW takes the first step 1e30 far, so the loss of the second update is not finite; both
    # lie before the first question, whose slot is update 7
    facts = small_facts(schedules=["repeated"])
    with refuses(
        "inject_facts: the loss is nan at update 2, in the batch of 4 x 16 tokens that held "
        "background alone; lower the learning rate (it is 1e+30)"
    ):
        inject_facts(
            small_model(), facts, TEXT, **(SETTINGS | {"learning_rate": 1e30, "settle": 6})
        )


def test_background_that_gives_an_answer_away_is_dropped():
    facts = small_facts()
    with pytest.warns(UserWarning) as warned:
        got = inject_facts(small_model(), facts, [*TEXT, "1 20 10 40 7"], **SETTINGS)
    assert str(warned[0].message) == (
        "inject_facts: dropped 1 of 2 background texts that hold a passage or an answered question"
    )
    assert len(got.table)


def test_what_inject_facts_refuses():
    def refused(message, facts=None, texts=TEXT, **other):
        with refuses(f"inject_facts: {message}"):
            facts = small_facts() if facts is None else facts
            inject_facts(small_model(), facts, texts, **(SETTINGS | other))

    for name in ("batch", "injections", "waves", "window"):
        refused(f"{name} is 0, but must be at least 1", **{name: 0})
    refused("settle is -1, but must be at least 0", settle=-1)
    refused("learning_rate is 0, but must be above 0", learning_rate=0)
    refused(
        "every is 2, but must be above the window of 2: a gain is looked for before the next "
        "injection",
        every=2,
    )
    for lags in ((5, 3), (2, 5), (3, 3)):
        refused(
            f"lags are {list(lags)}; give whole numbers above the window of 2, increasing",
            lags=lags,
        )
    facts = small_facts()
    refused("no facts in group 'injected'; there is nothing to learn", facts.assign(group="never"))
    refused(
        "all facts are injected; without some that never are, learning the form of the sentences "
        "reads as learning the facts",
        facts.assign(group="injected"),
    )
    refused(
        "entity 'e4' has 2 paraphrases for 4 injections of the schedule paraphrased, which need 3; "
        "give more, or inject less often",
        injections=4,
    )
    refused(
        "update 11 would hold 3 passages, a batch has 2 rows; give fewer facts, more waves or a "
        "larger batch",
        batch=2,
    )
    refused("e0/passage has 17 tokens, a row has 16; shorten it",
            facts.assign(passage=" ".join(["13"] * 17)))  # fmt: skip
    refused("the background has 3 tokens, an update takes 4 x 16; give more text", texts=["1 2 3"])


# --- effects: the arithmetic ---------------------------------------------------------------------


def test_window_gains_by_hand():
    # best 4 at lag 1 (and again at 2: the first counts), gain 4 - 1 = 3; always falling: lag 0,
    # and a gain below 0 is one too: -3 - -2 = -1
    gain, at = window_gains(np.array([[2.0, 4, 4], [-3, -4, -5]]), np.array([1.0, -2]))
    assert gain.tolist() == [3, -1] and at.tolist() == [1, 0]


def test_percentile_tail_by_hand():
    # n = 6: t(.975, 5) = 2.570582, times sqrt(6 / 5) = 2.815931, Phi(-2.815931) = .002432
    assert percentile_tail(6, 0.95) == pytest.approx(0.002432, abs=1e-6)
    assert percentile_tail(10**7, 0.95) == pytest.approx(0.025, abs=1e-6)
    # for a mean of numbers without skew the interval is Student's, where plain percentiles would
    # be narrower by 15 %
    values = np.array([-2.0, -1, -1, -0.5, -0.3, -0.1, 0.1, 0.3, 0.5, 1, 1, 2])
    boots = np.random.default_rng(0).multinomial(12, [1 / 12] * 12, size=20_000) @ values / 12
    tail = percentile_tail(12, 0.95)
    want = student.interval(0.95, 11, 0, values.std(ddof=1) / np.sqrt(12))
    np.testing.assert_allclose(np.quantile(boots, [tail, 1 - tail]), want, rtol=0.05)


def test_decay_line_by_hand():
    # 1, .8, .6 at one, ten, a hundred: -.2 a decade. 1, 1, .4: slope (0 - 1 + .4 * 1) / 2 = -.3,
    # mean .8, so a = .8 + .3 * 1
    a, b = decay_line(np.array([1.0, 10, 100]), np.array([[1, 0.8, 0.6], [1, 1, 0.4]]))
    np.testing.assert_allclose(a, [1, 1.1])
    np.testing.assert_allclose(b, [0.2, 0.3])


def test_the_decay_line_is_the_semilog_law():
    t = np.array([1.0, 2, 3, 5, 10, 30, 100])
    share = 1 - 0.3 * np.log10(t) + np.random.default_rng(0).normal(0, 0.1, len(t))
    points = rows("retention", share, run="r", beside={"lag": t})
    fit = fit_forgetting(points, laws=["semilog"]).set_index("metric")["value"]
    a, b = decay_line(t, share[None])
    assert a[0] == pytest.approx(fit["param_a"]) and b[0] == pytest.approx(fit["param_b"])


# --- effects: a made-up run whose answer is known ------------------------------------------------

SINCE = [-1, 0, 1, 2, 3, 4, 5, 6, 8, 12, 24, 54]  # slots at 0 and 4, window 2
LAG = [np.nan, 0, 1, 2, 3, 0, 1, 2, 4, 8, 20, 50]
SLOT = [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]


def run_of(values: dict[tuple[str, str], list[float]], **columns) -> pd.DataFrame:
    """A table from the values of each (group, entity/item) at each of ``SINCE``."""
    parts = []
    for (group, name), value in values.items():
        entity, item = name.split("/")
        beside = {"entity": f"{group}-{entity}", "pair": entity, "depth": "verbatim"}
        beside |= {"schedule": "repeated", "batch": 4, "learning_rate": 0.1, "seed": 0}
        beside |= {"slot": SLOT, "lag": LAG, "since": SINCE}
        part = rows(
            "log_probability", value, run="r", step=np.array(SINCE) + 10, group=group,
            item=f"{group}-{entity}-{item}", beside=beside,
        )  # fmt: skip
        parts.append(part)
    return pd.concat(parts, ignore_index=True).assign(**columns)


def pick(effects, metric, group="net", slot=None, t=None, over="entities"):
    part = effects[(effects["metric"] == metric) & (effects["group"] == group)]
    part = part[part["over"] == over]
    for name, value in (("slot", slot), ("t", t)):
        part = part[part[name].isna()] if value is None else part[part[name] == value]
    assert len(part) == 1
    return part.iloc[0]


#     since   -1   0   1   2   3   4   5   6   8  12  24  54
UP_TWO = [-5., -4, -3, -4, -4, -3, -2, -1, -2, -2, -3, -3]  # fmt: skip
UP_FOUR = [-6., -4, -4, -5, -5, -1, -2, -3, -3, -2, -4, -5]  # fmt: skip
STILL = [-5., -5, -5, -5, -5, -4, -5, -5, -5, -5, -5, -5]  # fmt: skip
FLAT = [-6.] * 12  # fmt: skip


@pytest.fixture
def known():
    return run_of(
        {
            ("injected", "a/x"): UP_TWO, ("never", "a/x"): STILL,
            ("injected", "b/x"): UP_FOUR, ("never", "b/x"): FLAT,
        }
    )  # fmt: skip


def test_effectivity_by_hand(known):
    effects = fact_effects(known, window=2, draws=200)
    # a: slot 1 from -5 to -3: 2; slot 2 from -4 to -1: 3. b: from -6 to -4: 2; from -5 to -1: 4
    assert pick(effects, "effectivity", "injected", slot=1)["value"] == 2
    assert pick(effects, "effectivity", "injected", slot=2)["value"] == 3.5
    assert pick(effects, "effectivity", "injected")["value"] == 2.75  # the mean of both
    # never: 0 and 1 for a, 0 and 0 for b
    assert pick(effects, "effectivity", "never", slot=2)["value"] == 0.5
    assert pick(effects, "effectivity", slot=2)["value"] == 3.0
    assert pick(effects, "effectivity", slot=1)["n"] == 2


def test_gain_and_retainability_by_hand(known):
    effects = fact_effects(known, window=2, draws=200)
    # best of the last window: a at lag 2, -1, 4 above its start of -5; b at lag 0, -1, 5 above.
    # Mean 4.5; of the never a at lag 0, 1 above, b at lag 0, 0 above: .5. Net 4.
    assert pick(effects, "gain", "injected", t=0)["value"] == 4.5
    assert pick(effects, "gain", "never", t=0)["value"] == 0.5
    assert pick(effects, "gain", t=0)["value"] == 4.0
    # asked lags of the last slot are 0, 1, 2, 4, 8, 20, 50; all can be followed to 50 - 2
    found = effects[(effects["metric"] == "gain") & (effects["group"] == "net")]
    assert found["t"].tolist() == [0, 1, 2, 4, 8, 20]
    # t = 2: a at lag 4: -2, gain 3; b at lag 2: -3, gain 3; never 0 and 0: net 3
    assert pick(effects, "gain", t=2)["value"] == 3.0
    assert pick(effects, "retainability", t=2)["value"] == 0.75
    # t = 8: a at lag 10, between 8 (-2) and 20 (-3) by ln 11, ln 9, ln 21: -2 - .2368361, gain
    # 2.7631639; b at lag 8: -2, gain 4. Net 3.3815820 of 4
    assert pick(effects, "gain", t=8)["value"] == pytest.approx(3.3815820)
    assert pick(effects, "retainability", t=8)["value"] == pytest.approx(0.8453955)
    shares = effects[(effects["metric"] == "retainability") & (effects["group"] == "net")]
    later = shares[shares["t"] >= 1]
    _, b = decay_line(later["t"].to_numpy(), later["value"].to_numpy()[None])
    assert pick(effects, "decay_constant")["value"] == pytest.approx(b[0])
    fitted = effects[(effects["metric"] == "fitted") & (effects["group"] == "net")]
    slope = np.polyfit(np.log10(fitted["t"]), fitted["value"], 1)
    assert -slope[0] == pytest.approx(b[0])


def test_before_the_first_slot_a_gain_is_a_placebo(known):
    # without the first slot: the questions wait from since -1 to 3 for theirs. a rises from -5 to
    # -4, b from -6 to -5: 1; of the never neither does. The slots of the others have no placebo.
    late = known[~known["since"].isin([0, 1, 2])].copy()
    late.loc[late["since"] == 3, ["slot", "lag"]] = [0, np.nan]
    late["slot"] = late["slot"].clip(0, 1)
    effects = fact_effects(late, window=2, draws=20)
    assert pick(effects, "placebo", "injected")["value"] == 1
    assert (
        pick(effects, "placebo")["value"] == 1 and pick(effects, "placebo", "never")["value"] == 0
    )
    assert pick(effects, "gain", "injected", t=0)["value"] == 3.5  # since just before the slot
    assert "placebo" not in set(fact_effects(known, window=2, draws=20)["metric"])


def made_up(seed=0, entities=5, items=2, paired=True) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    values = {}
    for group, gain in (("injected", 3.0), ("never", 0.5)):
        for entity in range(entities if group == "injected" or paired else entities + 2):
            for item in range(items):
                rise = gain * (np.array(SINCE) >= 0) * (1 - 0.1 * np.log1p(np.abs(SINCE)))
                noise = rng.normal(0, 0.3, len(SINCE))
                values[group, f"p{entity}/{item}"] = rise + noise - 6
    return run_of(values)


def brute(table, group, window=2):
    """Entity means of effectivity by slot and of gain by t, from the definitions, by loops."""
    found = {}
    part = table[table["group"] == group]
    for entity, mine in part.groupby("pair", observed=True):
        items = []
        for _, one in mine.groupby("item", observed=True):
            at = dict(zip(one["since"], one["value"], strict=True))
            numbers = []
            for start in (0, 4):
                best = max(at[s] for s in range(start, start + window + 1))
                numbers.append(best - at[start - 1])
            numbers.append((numbers[0] + numbers[1]) / 2)
            reached = [at[s] for s in range(4, 4 + window + 1)]
            best = reached.index(max(reached))
            lags = [0, 1, 2, 4, 8, 20, 50]
            for t in (0, 1, 2, 4, 8, 20):
                lag = best + t
                low = max(k for k in lags if k <= lag)
                high = min(k for k in lags if k >= lag)
                share = (
                    0
                    if low == high
                    else np.log((1 + lag) / (1 + low)) / np.log((1 + high) / (1 + low))
                )
                numbers.append((1 - share) * at[4 + low] + share * at[4 + high] - at[-1])
            items.append(numbers)
        found[entity] = np.mean(items, axis=0)
    return np.array([found[key] for key in sorted(found)])


@pytest.mark.parametrize("paired", [True, False])
def test_effects_against_loops(paired):
    table, draws = made_up(paired=paired), 60
    effects = fact_effects(table, window=2, draws=draws, seed=3)
    panel = {group: brute(table, group) for group in ("injected", "never")}
    boots = {}
    for group in panel:
        n = len(panel[group])
        own = 0 if paired else ("injected", "never").index(group)
        weight = np.random.default_rng([3, 15, own, n]).multinomial(n, [1 / n] * n, size=draws) / n
        boots[group] = np.array([[w @ column for column in panel[group].T] for w in weight])
    mean = {group: each.mean(axis=0) for group, each in panel.items()}
    mean["net"], boots["net"] = (e["injected"] - e["never"] for e in (mean, boots))
    times = [0, 1, 2, 4, 8, 20]
    tails = [percentile_tail(5, 0.95), 1 - percentile_tail(5, 0.95)]
    for group in mean:
        for column, slot in ((0, 1), (1, 2), (2, None)):
            got = pick(effects, "effectivity", group, slot=slot)
            ends = np.quantile(boots[group][:, column], tails)
            np.testing.assert_allclose(
                got[["value", "lo", "hi"]].astype(float), [mean[group][column], *ends]
            )
        shares = boots[group][:, 3:] / boots[group][:, 3:4]
        for at, t in enumerate(times):
            got = pick(effects, "retainability", group, t=t)
            want = [
                mean[group][3 + at] / mean[group][3],
                *np.quantile(shares[:, at], tails),
            ]
            np.testing.assert_allclose(got[["value", "lo", "hi"]].astype(float), want)
        lines = [-np.polyfit(np.log10(times[1:]), share[1:], 1)[0] for share in shares]
        got = pick(effects, "decay_constant", group)
        np.testing.assert_allclose(got[["lo", "hi"]].astype(float), np.quantile(lines, tails))
    assert pick(effects, "gain", t=0)["n"] == (5 if paired else 12)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 1000), st.floats(-3, 3), st.floats(0.2, 4))
def test_effects_do_not_see_level_and_order_and_scale_with_the_unit(seed, level, unit):
    table = made_up(seed)
    want = fact_effects(table, window=2, draws=20)
    item = pd.factorize(table["item"])[0]
    other = table.assign(value=unit * (table["value"] - 40 + level * item)).sample(
        frac=1, random_state=1
    )
    other["value"] -= 100  # below 0 throughout, as a log-probability is
    got = fact_effects(other, window=2, draws=20)
    scale = np.where(want["metric"].isin(["effectivity", "gain"]), unit, 1.0)
    np.testing.assert_allclose(got["value"], scale * want["value"], rtol=1e-6, atol=1e-9)


def test_equal_groups_have_no_net_effect():
    table = made_up()
    twin = table[table["group"] == "injected"].assign(group="never")
    twin["item"], twin["entity"] = twin["item"] + "-twin", twin["entity"] + "-twin"
    both = pd.concat([table[table["group"] == "injected"], twin])
    effects = fact_effects(both, window=2, draws=50)
    net = effects[effects["group"] == "net"]
    for metric in ("effectivity", "gain"):
        # pairs are drawn together, so that not one draw is off 0
        part = net[net["metric"] == metric]
        np.testing.assert_allclose(part[["value", "lo", "hi"]], 0, atol=1e-12)
    shares = net[net["metric"].isin(["retainability", "decay_constant"])]
    assert shares["value"].isna().all()
    assert set(shares["reason"]) == {"the gain is not told from 0"}


def test_a_time_that_cannot_be_followed_from_every_best_value_is_left_out(known):
    # asked up to lag 2, the best may be at lag 2: only t = 0 has a value whatever the best's lag
    effects = fact_effects(known[known["since"] <= 6], window=2, draws=20)
    gains = effects[(effects["metric"] == "gain") & (effects["group"] == "net")]
    assert gains["t"].tolist() == [0]


def test_short_times_have_no_decay_constant():
    table = made_up()
    effects = fact_effects(table[table["since"] <= 24], window=2, draws=50)
    got = pick(effects, "decay_constant", "injected")
    assert np.isnan(got["value"]) and got["reason"] == "4 times, or less than one decade of them"
    assert pick(effects, "retainability", "injected", t=8)["value"] < 1
    # 1, 2 and 20: more than a decade, but three points
    effects = fact_effects(table[~table["since"].isin([8, 12])], window=2, draws=50)
    got = pick(effects, "decay_constant", "injected")
    assert np.isnan(got["value"]) and got["reason"] == "3 times, or less than one decade of them"


def test_a_gain_that_may_be_none_has_no_share():
    # gains 4 and -3.5: their mean .25 is above 0, the lower end of its interval is not
    falls = [-5.0] + [-8.5] * 11
    table = run_of(
        {("injected", "a/x"): UP_TWO, ("injected", "b/x"): falls,
         ("never", "a/x"): FLAT, ("never", "b/x"): FLAT}
    )  # fmt: skip
    effects = fact_effects(table, window=2, draws=50)
    gain = pick(effects, "gain", t=0)
    assert gain["value"] == 0.25 and gain["lo"] == -3.5 and gain["hi"] == 4
    assert pick(effects, "retainability", t=2)["reason"] == "the gain is not told from 0"


def test_seeds_are_pooled_with_students_interval():
    # each seed's gain is its own shift of the injected: effectivity of slot 1 is 1, 2, 3
    tables = []
    for seed in (0, 1, 2):
        rise = [-6.0] + [-6.0 + 1 + seed] * 11
        tables.append(
            run_of({("injected", "a/x"): rise, ("injected", "b/x"): rise,
                    ("never", "a/x"): FLAT, ("never", "b/x"): FLAT}, seed=seed)
        )  # fmt: skip
    effects = fact_effects(pd.concat(tables), window=2, draws=20)
    got = pick(effects, "effectivity", slot=1, over="seeds")
    # mean 2, sd 1, t(.975, 2) = 4.302653: 2 +- 4.302653 / sqrt 3
    np.testing.assert_allclose(got[["value", "lo", "hi"]].astype(float), [2, -0.4841377, 4.4841377])
    assert got["n"] == 3 and np.isnan(got["seed"])
    # the never injected gained nothing, so no share of it is left in any seed
    share = pick(effects, "decay_constant", "never", over="seeds")
    assert np.isnan(share["value"]) and share["reason"] == "undefined in 3 of 3 seeds"
    one = effects[effects["seed"] == 1]
    assert pick(one, "effectivity", slot=1)["value"] == 2


def test_one_defined_seed_has_no_interval():
    flat = {("injected", "a/x"): FLAT, ("injected", "b/x"): FLAT}
    never = {("never", "a/x"): FLAT, ("never", "b/x"): FLAT}
    up = {("injected", "a/x"): UP_TWO, ("injected", "b/x"): UP_TWO}
    table = pd.concat([run_of(up | never, seed=0), run_of(flat | never, seed=1)])
    effects = fact_effects(table, window=2, draws=20)
    got = pick(effects, "retainability", t=2, over="seeds")
    assert got["value"] == 0.75 and np.isnan(got["lo"]) and got["n"] == 1
    assert got["reason"] == "undefined in 1 of 2 seeds"


def test_what_fact_effects_refuses(known):
    where = "run=r, depth=verbatim, schedule=repeated, batch=4, learning_rate=0.1, seed=0"

    def refused(message, table=known, **other):
        with refuses(f"fact_effects: {message}"):
            fact_effects(table, **({"window": 2} | other))

    refused("no column 'slot'; inject_facts gives such a table", known.drop(columns="slot"))
    refused("1 draws, an interval needs at least 2", draws=1)
    refused("level is 1, it must lie between 0 and 1", level=1)
    refused(
        "no rows of group 'never'; without entities that were never injected, learning the form of "
        "the sentences reads as learning the facts",
        known[known["group"] != "never"],
    )
    refused(
        f"{where}, group injected has 1 entities, an interval needs at least 2",
        known[known["pair"] == "a"],
    )
    wanted = "(-1: just before it); ask at each up to {}, or give a shorter window"
    told = f"{where}, group injected was not asked {{}} updates after slot {{}} {wanted}"
    refused(told.format(3, 2, 3), window=3)
    refused(told.format(-1, 2, 2), known[known["since"] != 3])
    gap = known[~((known["since"] == 1) & (known["item"] == "injected-a-x"))]
    refused(told.format(1, 1, 2), gap)
    gap = known[~((known["since"] == 24) & (known["item"] == "injected-a-x"))]
    refused(
        f"{where}, group injected was asked only in part 20 updates after its last slot; ask all "
        "questions of a cell at the same updates",
        gap,
    )
    late = known[~((known["since"] == 24) & (known["group"] == "never"))]
    refused(f"{where}: the groups were asked at different updates; ask both at the same", late)


def test_the_trace_pools_questions_before_entities():
    # a has two questions, at 1 and 3, b one at 4: the mean over entities is 3, not 8 / 3
    table = run_of(
        {("injected", "a/x"): [-1.0] * 12, ("injected", "a/y"): [-3.0] * 12,
         ("injected", "b/x"): [-4.0] * 12, ("never", "a/x"): FLAT, ("never", "b/x"): FLAT}
    )  # fmt: skip
    trace = fact_trace(table, draws=50)
    mine = trace[trace["group"] == "injected"]
    assert mine["value"].eq(-3).all() and mine["n"].eq(2).all() and len(mine) == 12
    assert mine.loc[mine["lag"] == 0, "since"].tolist() == [0, 4]
    assert mine["lo"].between(-4, -2).all()


def test_draws_of_as_many_entities_are_the_same():
    weights: dict = {}
    assert _resample(weights, "never", 4, 5, 0) is _resample(weights, "never", 4, 5, 0)
    assert (_resample(weights, "injected", 4, 5, 0) != _resample(weights, "never", 4, 5, 0)).any()


def test_effects_of_a_real_run(injected):
    # six random little models' worth of numbers: they agree with loops over the very table
    table = injected.table[injected.table["schedule"] == "single"]
    effects = fact_effects(table, window=2, draws=20)
    gains = []
    for _, one in table[table["group"] == "injected"].groupby("item", observed=True):
        at = dict(zip(one["since"], one["value"], strict=True))
        gains.append(max(at[8], at[9], at[10]) - at[7])
    assert pick(effects, "effectivity", "injected", slot=1)["value"] == pytest.approx(
        np.mean(gains)
    )


# --- plots ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def effects():
    return fact_effects(made_up(), window=2, draws=50)


def test_the_trace_is_drawn_as_it_is():
    trace = fact_trace(made_up(), draws=20)
    figure = plot_fact_trace(trace)
    lines = {each.name: each for each in figure.data if each.name}
    for group, line in lines.items():
        part = trace[trace["group"] == group].sort_values("since")
        np.testing.assert_allclose(line.y, part["value"], atol=1e-6)
        assert list(line.x) == SINCE
    assert [shape.x0 for shape in figure.layout.shapes] == [0, 4]
    with refuses(
        "plot_fact_trace: several rows per (depth, schedule, group, since); select one run, batch, "
        "learning rate and seed, or the rows over seeds"
    ):
        plot_fact_trace(pd.concat([trace, trace.assign(batch=8)]))
    with refuses("plot_fact_trace: the table has no rows of log_probability; it has gain"):
        plot_fact_trace(trace.assign(metric="gain"))


def test_retainability_is_drawn_with_its_line(effects):
    figure = plot_retainability(effects)
    points = next(each for each in figure.data if each.name == "repeated")
    part = effects[(effects["metric"] == "retainability") & (effects["group"] == "net")]
    np.testing.assert_allclose(points.y, part.loc[part["t"] >= 1, "value"], atol=1e-6)
    line = next(each for each in figure.data if each.mode == "lines" and each.fill is None)
    fitted = effects[(effects["metric"] == "fitted") & (effects["group"] == "net")]
    np.testing.assert_allclose(line.y, fitted["value"], atol=1e-6)
    assert figure.layout.xaxis.type == "log"
    low, high = figure.layout.yaxis.range
    assert low <= part["value"].min() and high >= part["value"].max()


def test_a_share_of_nothing_is_said(effects):
    none = effects["metric"].isin(["retainability", "fitted"])
    empty = effects[effects["metric"] != "fitted"].copy()
    empty.loc[none, ["value", "lo", "hi"]] = np.nan
    said = [note.text for note in plot_retainability(empty).layout.annotations]
    assert "gain not told from 0:<br>repeated" in said


def test_effectivity_is_drawn_beside_the_never_injected(effects):
    for metric, t in (("effectivity", None), ("gain", 0)):
        figure = plot_effectivity(effects, metric=metric)
        got = [each.y[0] for each in figure.data]
        want = [
            pick(effects, metric, group, t=t)["value"] for group in ("injected", "never", "net")
        ]
        np.testing.assert_allclose(got, want, atol=1e-6)
        assert figure.data[1].marker.color == "#8A8A8A"
    with refuses("plot_effectivity: metric 'fitted'; choose effectivity or gain"):
        plot_effectivity(effects, metric="fitted")
