"""The explorer of single texts, on the tiny suite: what it shows against the calls beneath it."""

import re
import threading
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from tests.conftest import frame
from workbench import (
    align_exposures,
    life_events,
    plot_curve,
    plot_life_lines,
    probe_continuation,
    probe_extraction,
    save,
    summarise,
)
from workbench.decoys import make_decoys
from workbench.explore import items as explorer
from workbench.explore.items import _beside_each_other, _spread, explore_items
from workbench.models import Checkpoints
from workbench.plots.style import GREY
from workbench.subject import NO_EXPOSURES, Subject

SECONDS = 60
CUT = {"prefix": 8, "suffix": 8}
MARK = {"dash": "dot", "color": GREY}


@pytest.fixture(autouse=True)
def cache(tiny, monkeypatch):
    """One cache for the file, so that the suite is scored once."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tiny.cache))


@pytest.fixture
def subject(tiny) -> Subject:
    suite = tiny.suite
    return Subject(suite.checkpoints(), suite.items(), suite.exposures(), suite, "base")


@pytest.fixture
def panel(subject) -> pd.DataFrame:
    table = probe_extraction(subject.source, subject.items, **CUT)
    return align_exposures(table, subject.exposures)


def explore(subject, **more):
    return explore_items(subject, **CUT, count=15, **more).wait(SECONDS)


def row_of(panel, item: str, step: int, metric: str) -> float:
    here = (panel["item"] == item) & (panel["step"] == step) & (panel["metric"] == metric)
    (value,) = panel["value"][here]
    return value


def told(words: str, what: str) -> str:
    return re.search(f"{what}</th><td[^>]*>(.*?)</td>", words)[1]


def json_of(figures) -> dict[str, str]:
    return {name: figure.to_json() for name, figure in figures.items()}


def test_the_first_view_is_what_the_calls_beneath_give(subject, panel):
    each = explore(subject)
    assert each.message == ""
    name, step = each.values["item"], each.values["step"]
    assert each.values["group"] == "seen" and step == 16
    # the most copies that one burst gives come first: four, of three kinds
    assert name == "biography-004-one" and subject.items.set_index("item").at[name, "dose"] == 4
    events = life_events(panel[panel["metric"] == "extractable"])
    seen = set(subject.items["item"][subject.items["group"] == "seen"])
    assert len(seen) == 15
    lives = plot_life_lines(
        events[events["item"].isin(seen)], items=subject.items, exposures=subject.exposures,
        title="When texts were known: reproduced word for word",
    ).add_vline(x=16, line=MARK)  # fmt: skip
    rows = panel[panel["metric"] == "log_probability"]
    mine = rows[rows["item"] == name].assign(group=name)
    never = rows[(rows["group"] == "never") & (rows["kind"] == "biography")]
    never = summarise(never, by=["run", "step", "group", "metric"], seed=0)
    course = plot_curve(
        pd.concat([mine, never], ignore_index=True), title=f"{name}: mean log-probability"
    ).add_vline(x=16, line=MARK)
    assert json_of(each.view.figures) == json_of({"lives": lives, "course": course})
    value = row_of(panel, name, 16, "log_probability")
    assert told(each.view.words, "mean log-probability").startswith(f"{value:.3g} nats per token")
    assert "15 of 45 texts match." in each.view.words
    assert "trained on 4 of 4 times so far, last 3 updates ago" in each.view.words


def test_the_continuation_is_the_model_s_own(subject, panel):
    each = explore(subject)
    each.set(group="drip", ranks=False)
    each.wait(SECONDS)
    for step in (0, 16):
        each.set(step=step)
        words = each.wait(SECONDS).view.words
        name = each.values["item"]
        one = subject.items[subject.items["item"] == name]
        near = probe_continuation(subject.source.at(step), one, **CUT)
        near = near.set_index("metric")["value"]
        right = round(near["memorization_score"] * 8)
        first = row_of(panel, name, step, "verbatim_length")
        assert f"{right} of 8 tokens in place, the first {first:.0f} before a miss" in words
        assert f"edit similarity {near['edit_similarity']:.2f}" in words
        assert words.count("<br>✓") == words.count(": the same'") == right
        assert words.count("<br>✗") == 8 - right
        said = {1: "✓ yes", 0: "✗ no"}[row_of(panel, name, step, "extractable")]
        assert told(words, "said word for word") == said


def test_tokens_are_marked_by_hand():
    # 5 and 7 agree, 6 and 9 do not; a token that is mark-up is shown, not obeyed
    words = {5: "<b>", 6: "a\n", 7: " c", 9: "d"}
    made = _beside_each_other(
        np.array([5, 6, 7]), np.array([5, 9, 7]), lambda ids: words[int(ids[0])]
    )
    plain = re.sub("<span[^>]*>", "[", made.replace("</span>", "]"))
    assert plain == "<div>[&lt;b&gt;<br>&lt;b&gt;<br>✓][a⏎<br><i>d</i><br>✗][ c<br> c<br>✓]</div>"
    shade = re.findall("background:(.*?);", made)
    assert shade == [explorer.RIGHT, explorer.WRONG, explorer.RIGHT]


def test_a_spread_keeps_both_ends():
    # places 0, 9/3 = 3, 6 and 9 of ten; no more than there are
    assert _spread(list("abcdefghij"), 4) == ["a", "d", "g", "j"]
    assert _spread(["a", "b"], 4) == ["a", "b"]


def test_the_rank_counts_the_likelier_decoys(subject):
    each = explore(subject, seed=3)
    each.set(group="", step=13)
    each.wait(SECONDS)
    name = each.values["item"]
    kind = subject.items.set_index("item").at[name, "kind"]
    kindred = subject.items[subject.items["kind"] == kind]
    model = subject.source.at(13)
    decoys = make_decoys(kindred, 15, tokenizer=model.tokenizer, seed=3)

    def total(texts):
        return np.nansum(model.score(model.encode(texts)).log_probability, axis=1)

    mine = total([subject.items.set_index("item").at[name, "text"]])[0]
    place = 1 + (total(decoys["text"].tolist()) > mine).sum()
    assert told(each.view.words, "rank among decoys").startswith(f"{place} of 16 (exposure ")


@pytest.mark.parametrize("measure", ["extractable", "exposure"])
def test_the_code_makes_the_same_figures(tiny, monkeypatch, measure):
    monkeypatch.setattr("workbench.subject.load_suite", lambda corpus: tiny.suite)
    here = SimpleNamespace(hash=tiny.suite.path.name)
    monkeypatch.setattr("workbench.suite.specification", lambda corpus: here)
    each = explore_items(**CUT, count=15).wait(SECONDS)
    assert each.message == ""
    each.set(kind="canary", copies=4, measure=measure, known="log_probability", step=13)
    assert each.wait(SECONDS).message == ""
    space = {}
    exec(each.code, space)
    assert json_of(space["figures"]) == json_of(each.view.figures)


def test_the_code_of_a_table_makes_the_same_figures(subject, panel, tmp_path):
    file = str(save(panel, tmp_path / "panel.parquet"))
    each = explore(subject, table=file)
    assert each.message == ""
    space = {"subject": subject}
    exec(re.sub("^subject = .*$", "", each.code, flags=re.M), space)
    assert json_of(space["figures"]) == json_of(each.view.figures)


def test_filters_pick_by_text_kind_group_and_copies(subject):
    each = explore(subject)
    items = subject.items
    canary = items[(items["kind"] == "canary") & (items["dose"] == 4)].iloc[0]
    each.set(kind="canary", copies=4)
    assert [name for _, name in each.controls["item"].options] == [canary["item"]]
    assert "1 of 45 texts match." in each.wait(SECONDS).view.words
    part = canary["text"][5:25].upper()
    each.set(kind="", copies="", group="", search=f" {part} ")
    each.wait(SECONDS)
    holding = items[items["text"].str.lower().str.contains(part.strip().lower(), regex=False)]
    assert [name for _, name in each.controls["item"].options] == holding["item"].tolist()
    # a name finds its text too, and the chosen one stays while it matches
    each.set(search="canary", item=canary["item"])
    each.set(kind="canary")
    assert each.wait(SECONDS).values["item"] == canary["item"]


def test_an_empty_filter_says_so_and_keeps_the_figures(subject):
    each = explore(subject)
    before = each.view
    each.set(search="no such words", copies=4)
    each.wait(SECONDS)
    assert each.message == (
        "explore_items: no text has search 'no such words', group 'seen', copies 4; widen one of "
        "them. What is shown belongs to the last filter that had texts."
    )
    assert each.view is before and each.values["item"] is None
    each.set(search="")
    assert each.wait(SECONDS).message == ""


def test_texts_of_which_none_was_exposed_are_drawn(subject):
    each = explore(subject)
    each.set(group="never", ranks=False)
    assert each.wait(SECONDS).message == ""
    assert "trained on 0 of 0 times so far." in each.view.words


def test_a_click_on_a_life_goes_to_its_text_and_checkpoint(subject):
    each = explore(subject)
    rows = each.view.figures["lives"].layout.yaxis.ticktext
    each.figures["lives"]._answer(11.6, 2.36, None)
    each.wait(SECONDS)
    assert each.values["item"] == rows[2]
    steps = subject.source.steps
    assert each.values["step"] == min(steps, key=lambda step: abs(step - 11.6))
    each.figures["course"]._answer(0, -3.0, None)
    assert each.wait(SECONDS).values["step"] == 0 and each.values["item"] == rows[2]


def test_only_the_mark_moves_with_the_checkpoint(subject):
    each = explore(subject)
    first = {name: figure.to_plotly_json() for name, figure in each.view.figures.items()}
    each.set(step=8)
    each.wait(SECONDS)
    for name, figure in each.view.figures.items():
        now = figure.to_plotly_json()
        mark = first[name]["layout"]["shapes"][-1]
        assert now["layout"]["shapes"][-1] == mark | {"x0": 8, "x1": 8}
        assert str(now["data"]) == str(first[name]["data"])


# --- bad input -----------------------------------------------------------------------------------


def test_a_table_of_another_version_is_one_line(subject, panel, tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.table.VERSION", -1)
    file = str(save(panel, tmp_path / "old.parquet"))
    monkeypatch.undo()
    each = explore(subject, table=file)
    assert re.fullmatch(
        rf"load: {re.escape(file)} has layout version -1, this is \d+; make it again", each.message
    )


def test_tables_that_do_not_fit_are_refused(subject, panel):
    other = panel.assign(item=panel["item"].astype(str) + "-b")
    assert explore(subject, table=other).message == (
        "explore_items: none of the 45 texts of the table is among the 45 items; give the items "
        "it was made of"
    )
    both = pd.concat([panel, panel.assign(prefix=4)])
    assert explore(subject, table=both).message == (
        "explore_items: the table has rows of prefix 4, 8; select one"
    )
    short = panel[panel["metric"] == "extractable"].assign(metric="event_step", value=1.0)
    assert explore(subject, table=short).message == (
        "explore_items: the table has no metric that is better high or low"
    )


def test_one_checkpoint_has_no_lives(subject):
    last = subject.source.steps[-1]
    one = Subject(subject.source.select([last]), subject.items, subject.exposures)
    each = explore(one)
    assert each.message == "" and set(each.view.figures) == {"course"}
    assert "no life lines: one checkpoint" in each.view.words
    assert "at checkpoint 16" in each.view.words
    assert each.controls["step"].layout.display == "none"
    assert "# subject: the one that the explorer was given" in each.code


def test_without_controls_only_verdicts_make_lives(subject):
    items = subject.items[subject.items["group"] == "seen"]
    each = explore(Subject(subject.source, items, NO_EXPOSURES))
    assert [key for _, key in each.controls["known"].options] == ["extractable"]
    assert "trained on" not in each.view.words and "texts of its kind" not in each.view.words


def test_short_texts_are_counted(subject):
    items = pd.concat([subject.items, frame(["the"], group="seen", kind="canary", dose=1)])
    with pytest.warns(UserWarning, match="dropped 1 of 46 texts"):
        each = explore(Subject(subject.source, items, subject.exposures))
    assert "1 texts shorter than asked for have no scores" in each.view.words


def test_a_model_that_is_gone_leaves_what_was_scored(subject, monkeypatch):
    each = explore(subject)

    def gone(self, step):
        raise FileNotFoundError(f"no folder <step{step}>")

    monkeypatch.setattr(Checkpoints, "at", gone)
    each.set(step=8)
    assert each.wait(SECONDS).message == ""
    assert each.view.figures["lives"].layout.shapes[-1].x0 == 8
    assert "⚠ No continuation: no folder &lt;step8&gt;" in each.view.words
    assert told(each.view.words, "rank among decoys") == "none: no folder &lt;step8&gt;"
    monkeypatch.undo()


def test_two_explorers_of_one_subject_do_not_disturb_each_other(subject):
    steps = subject.source.steps
    alone = explore(subject)
    alone.set(group="drip")
    wanted = {}
    for step in steps[-3:]:
        alone.set(step=step)
        wanted[step] = alone.wait(SECONDS).view.words
    one, two = explore(subject), explore(subject)
    for each in (one, two):
        each.set(group="drip")
    for first, second in [(steps[-1], steps[-3]), (steps[-3], steps[-2]), (steps[-2], steps[-1])]:
        one.set(step=first)
        two.set(step=second)
        assert one.wait(SECONDS).view.words == wanted[first]
        assert two.wait(SECONDS).view.words == wanted[second]


class Held:
    """``probe_extraction``, held after its first checkpoint; counts how often it begins."""

    def __init__(self):
        self.begun, self.held, self.go_on = 0, threading.Event(), threading.Event()

    def __call__(self, source, items, *, prefix, suffix):
        self.begun += 1
        for number, _ in enumerate(source):
            if number == 1:
                self.held.set()
                self.go_on.wait(SECONDS)
        return probe_extraction(source, items, prefix=prefix, suffix=suffix)


def test_a_new_wish_lets_scoring_go_on(subject, monkeypatch):
    probe = Held()
    monkeypatch.setattr(explorer, "probe_extraction", probe)
    each = explore_items(subject, **CUT, count=15)
    assert probe.held.wait(SECONDS)
    each.set(search="canary")
    probe.go_on.set()
    each.wait(SECONDS)
    assert probe.begun == 1 and each.message == ""
    assert {"canary"} == {name.split("-")[0] for _, name in each.controls["item"].options}


def test_stop_ends_scoring_and_the_next_wish_begins_again(subject, monkeypatch):
    probe = Held()
    monkeypatch.setattr(explorer, "probe_extraction", probe)
    each = explore_items(subject, **CUT, count=15)
    assert probe.held.wait(SECONDS)
    each.stop()
    probe.go_on.set()
    each.wait(SECONDS)
    assert each.message.startswith("Stopped") and each.view is None
    each.redraw()
    assert each.wait(SECONDS).message == "" and probe.begun == 2


def test_ranking_keeps_what_was_ranked_before_a_stop(subject, monkeypatch):
    each = explore(subject)
    asked, real = [], explorer.probe_exposure

    def ranked(model, *arguments, **more):
        asked.append(model.step)
        if len(asked) == 3:
            each.stop()
        return real(model, *arguments, **more)

    monkeypatch.setattr(explorer, "probe_exposure", ranked)
    each.set(measure="exposure")
    assert each.wait(SECONDS).message.startswith("Stopped")
    each.redraw()
    each.wait(SECONDS)
    # the last checkpoint was ranked for the first view
    assert each.message == "" and asked == subject.source.steps[:-1]
