"""The explorer of curvature edits: what it shows is what the probe gives, and no edit outlives it."""

import json
import threading
import warnings

import numpy as np
import pandas as pd
import pytest

import workbench.explore.curvature as curvature
from workbench import explore_curvature, load_subject, plot_rho_sweep, probe_curvature
from workbench.explore.curvature import continuation_words
from workbench.models import LanguageModel
from workbench.probes.curvature import each_edit, edit_rows, text_tokens
from workbench.suite import Suite
from workbench.table import InputError

SECONDS = 120
SMALL = {"rho": (0.9, 0.5), "texts": 12, "held_out": 6, "prefix": 4, "suffix": 4, "most": 5}


@pytest.fixture(autouse=True)
def _few_tokens():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="collect_factors")
        yield


@pytest.fixture
def subject(tiny, monkeypatch):
    """A subject of its own each time: its model is loaded anew."""
    monkeypatch.setattr(
        "workbench.subject.load_suite", lambda _: Suite(tiny.suite.path, corpus=tiny.corpus)
    )
    return load_subject("suite")


def explorer(subject, **more):
    return explore_curvature(subject, **(SMALL | more))


def same(figure, other) -> bool:
    return json.loads(figure.to_json()) == json.loads(other.to_json())


def weights(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def equal_bits(one: dict, other: dict) -> bool:
    return all(np.array_equal(one[name].numpy(), other[name].numpy()) for name in one)


@pytest.fixture
def panels(monkeypatch):
    """The panels of the explorers that a test makes."""
    made = []

    class Kept(curvature._Panel):
        def __init__(self, *given, **more):
            super().__init__(*given, **more)
            made.append(self)

    monkeypatch.setattr(curvature, "_Panel", Kept)
    return made


def test_the_code_makes_the_same_figures_at_every_setting(subject):
    each = explorer(subject).wait(SECONDS)
    assert each.message == ""
    layers = [value for _, value in each.controls["layer"].options]
    for values in ({"rho": 0.5, "layer": layers[-1]}, {"rho": 1.0}):
        each.set(**values)
        assert each.wait(SECONDS).message == ""
        made = {"subject": subject}
        exec(each.code, made)
        assert set(made["figures"]) == set(curvature.FIGURES)
        for name, figure in made["figures"].items():
            assert same(figure, each.view.figures[name]), name


def test_numbers_are_those_of_the_probe_and_the_other_edits_join(subject, panels, monkeypatch):
    monkeypatch.setattr(curvature, "BASELINES", ("svd",))
    monkeypatch.setattr(curvature, "RHO", {"svd": (0.5,)})
    each = explorer(subject).wait(SECONDS)
    assert [trace.name for trace in each.view.figures["frontier"].data] == ["kfac"]
    each.set(baselines=True, rho=0.5)
    assert each.wait(SECONDS).message == ""
    assert [trace.name for trace in each.view.figures["frontier"].data] == ["kfac", "svd"]
    made = {"subject": subject}
    exec(each.code, made)
    table = made["table"]
    row = table[(table["rho"] == 0.5) & (table["method"] == "kfac") & (table["item"] == "all")]
    value = row.set_index("metric")["value"]
    assert f"keeps {value['kept']:.1%} of the components" in each.view.words
    assert f"Perplexity {value['perplexity']:.4g}, {value['perplexity_ratio']:.3f} times" in (
        each.view.words
    )
    pooled = panels[0].rows["kfac", 0.5].set_index(["metric", "group"])["value"]
    told = row.set_index(["metric", "group"])["value"]
    assert pooled.to_dict() == told.to_dict()


def test_the_continuation_is_that_of_the_model_under_the_edit(subject, panels, monkeypatch):
    """A model this small says one word whatever is done to it, so here its weights are its words."""

    def generate(model, prompts, new):
        assert prompts.shape[1] == new == 4
        sums = model.module.state_dict()[f"{panels[0].bases[0].layer.name}.weight"].double().sum(1)
        return np.resize(np.abs(sums.numpy() * 1e6).astype(int) % 500, (len(prompts), new))

    monkeypatch.setattr(LanguageModel, "generate", generate)
    monkeypatch.setitem(
        curvature.each_edit.__globals__, "recitation", lambda *_: {"recitation_strict": np.ones(5)}
    )
    each = explorer(subject).wait(SECONDS)
    panel = panels[0]
    own = generate(subject.source.at(subject.source.steps[-1]), panel.tokens[:, :4], 4)
    with curvature.edited(panel.bases, method="kfac", rho=0.9):
        after = generate(panel.own, panel.tokens[:, :4], 4)
    assert (own != after).all()
    np.testing.assert_array_equal(panel.said[1.0], own)
    np.testing.assert_array_equal(panel.said[0.9], after)
    panel.tokens[2, 4:6], panel.tokens[2, 6:] = own[2, :2], after[2, 2:]
    each.set(item=panel.asked["item"].iloc[2])
    words = each.wait(SECONDS).view.words
    assert words.count(">2 of 4 tokens<") == 2


def test_no_edit_is_ever_seen_by_who_holds_the_same_model(subject, panels, monkeypatch):
    model = subject.source.at(subject.source.steps[-1])
    before = weights(model)
    met = []
    seen = curvature.each_edit

    def watched(copied, *given, **more):
        assert copied.module is not model.module
        for rows in seen(copied, *given, **more):
            met.append(equal_bits(weights(copied), before) and equal_bits(weights(model), before))
            yield rows

    monkeypatch.setattr(curvature, "each_edit", watched)
    explorer(subject).wait(SECONDS)
    assert met == [True, True, True]  # unedited and two edits
    assert equal_bits(weights(panels[0].own), before)


def test_stopped_inside_an_edit_the_weights_are_back_and_it_goes_on(subject, panels, monkeypatch):
    """The work is stopped at a pass of the edited model itself, not between edits."""
    inside, go_on = threading.Event(), threading.Event()
    verdicts = curvature.each_edit.__globals__["recitation"]
    caught = []

    def recitation(model, *given):
        changed = not equal_bits(weights(model), before)
        if changed and not go_on.is_set():
            caught.append(changed)
            inside.set()
            go_on.wait(SECONDS)
        return verdicts(model, *given)

    before = weights(subject.source.at(subject.source.steps[-1]))
    monkeypatch.setitem(curvature.each_edit.__globals__, "recitation", recitation)
    each = explorer(subject)
    assert inside.wait(SECONDS)
    each.stop()
    go_on.set()
    each.wait(SECONDS)
    assert caught == [True]
    assert each.message == "Stopped; what is shown belongs to the last settings that were drawn."
    assert equal_bits(weights(panels[0].own), before)
    assert set(panels[0].rows) == {("none", 1.0)}  # the edit that was broken off left nothing
    assert not panels[0].own.module.base_model._forward_pre_hooks
    each.redraw()
    assert each.wait(SECONDS).message == ""
    assert set(panels[0].rows) == {("none", 1.0), ("kfac", 0.9), ("kfac", 0.5)}
    made = {"subject": subject}
    exec(each.code, made)
    assert all(same(made["figures"][name], each.view.figures[name]) for name in made["figures"])


def test_an_error_inside_an_edit_gives_the_weights_back(subject, panels, monkeypatch):
    each = explorer(subject).wait(SECONDS)
    before = weights(subject.source.at(subject.source.steps[-1]))
    model, view = panels[0].own, each.view

    def broken(*_):
        assert not equal_bits(weights(model), before)
        raise MemoryError("no room")

    panels[0].said.clear()
    monkeypatch.setattr(type(model), "generate", lambda *a, **k: np.zeros((5, 4), int))
    panels[0].continuations(1.0, curvature.Work(lambda *_: None))
    monkeypatch.setattr(type(model), "generate", broken)
    each.redraw()
    assert each.wait(SECONDS).message == "MemoryError: no room"
    assert each.view is view
    assert equal_bits(weights(model), before)


def test_each_edit_is_made_once(subject, monkeypatch):
    asked = []
    seen = curvature.each_edit

    def counted(*given, grid, **more):
        for edit, rows in zip(grid, seen(*given, grid=grid, **more), strict=True):
            asked.append(edit)
            yield rows

    monkeypatch.setattr(curvature, "each_edit", counted)
    each = explorer(subject).wait(SECONDS)
    for rho in (0.5, 1.0, 0.9, 0.5):
        each.set(rho=rho)
        each.wait(SECONDS)
    assert asked == [("none", 1.0), ("kfac", 0.9), ("kfac", 0.5)]


def test_two_explorers_at_once_give_what_each_gives_alone(subject):
    pair = [explorer(subject), explorer(subject, rho=(0.6,))]
    together = [each.wait(SECONDS) for each in pair]
    alone = [explorer(subject).wait(SECONDS), explorer(subject, rho=(0.6,)).wait(SECONDS)]
    for one, other in zip(together, alone, strict=True):
        assert one.message == other.message == ""
        assert one.view.words == other.view.words
        for name in curvature.FIGURES:
            assert same(one.view.figures[name], other.view.figures[name])


def test_a_model_that_is_gone_and_texts_that_are_lacking_are_one_line(tmp_path, model_folder):
    texts = tmp_path / "texts.csv"
    texts.write_text("text,group\nOne text that nobody ever met before at all,unseen\n")
    each = explore_curvature(str(tmp_path / "gone"), str(texts), **SMALL).wait(SECONDS)
    assert each.message and "\n" not in each.message and each.view is None
    each = explore_curvature(str(model_folder), str(texts), **SMALL).wait(SECONDS)
    assert each.message == ("probe_curvature: no items of group 'seen'; there are groups unseen")


def test_a_model_of_the_users_that_recites_nothing(tmp_path, model_folder, corpus_file):
    texts = tmp_path / "texts.csv"
    texts.write_text("text,group\n" + "Many a text was met by none of us <b>once</b>,seen\n" * 7)
    each = explore_curvature(str(model_folder), str(texts), corpus_file, **SMALL).wait(SECONDS)
    assert each.message == ""
    words = each.view.words
    assert "The unedited model recites none of these texts to begin with." in words
    assert "2 further texts are not asked; raise most to ask them." in words
    assert "<b>" not in words
    made = {}
    exec(each.code, made)
    for name, figure in made["figures"].items():
        assert same(figure, each.view.figures[name]), name


def test_shares_are_refused_before_anything_is_loaded():
    for rho in ((), (1.0,), (0.0, 0.5), (1.5,), (0.5, float("nan")), (float("nan"), 0.5)):
        with pytest.raises(InputError, match="explore_curvature: rho is .*, needs shares between"):
            explore_curvature(rho=rho)


def test_words_mark_and_count_tokens_and_escape_text():
    class Letters:
        def decode(self, tokens):
            return "".join(map(chr, tokens))

    def codes(text):
        return np.array([ord(letter) for letter in text])

    words = continuation_words(
        Letters(), codes("<i>"), codes("abcd"), {"after <it>": codes("ab<d")}
    )
    solid, dotted = "2px solid #009E73", "2px dotted #D55E00"
    assert "&lt;i&gt;" in words and "after &lt;it&gt;" in words and "3 of 4 tokens" in words
    assert (
        f"<span style='border-bottom:{solid}'>ab</span>"
        f"<span style='border-bottom:{dotted}'>&lt;</span>"
        f"<span style='border-bottom:{solid}'>d</span>"
    ) in words


def test_every_control_is_described(subject):
    each = explorer(subject).wait(SECONDS)
    for control in each.controls.values():
        assert control.description and control.tooltip


def test_stairs_are_those_asked_for(subject):
    model = subject.source.at(subject.source.steps[-1])
    table = probe_curvature(
        model, subject.items, texts=["In the beginning was the word."] * 9,
        held_out=["And the word was good."], memorized="seen", clean=None, methods=("kfac",),
        rho={"kfac": (0.9,)}, stairs=(0.7, 1.0), prefix=4, suffix=4,
    )  # fmt: skip
    assert set(table.loc[table["metric"] == "kept_inputs", "rho"]) == {0.7, 1.0}


def test_texts_too_short_are_counted_and_the_code_asks_for_the_same(tmp_path, model_folder):
    """Of five texts asked, the first three, of another group, are too short: two are left."""
    texts = tmp_path / "texts.csv"
    long = [f"Many a text was met by none of us {n} times,seen" for n in range(6)]
    texts.write_text("text,group\n" + "\n".join(["a,drip", "b,drip", "c,drip", *long]))
    with warnings.catch_warnings(record=True):
        each = explore_curvature(model_folder, texts, **SMALL).wait(SECONDS)
        assert each.message == ""
        words = each.view.words
        assert "Recited: 0 of 2 in seen. " in words
        assert "4 further texts are not asked; raise most to ask them." in words
        assert "3 are shorter than 8 tokens." in words
        assert "No corpus was given: factors and perplexity are those of verses of" in words
        assert "(95 % interval " in words
        made = {}
        exec(each.code, made)  # also where the model and the texts are given as paths
    for name, figure in made["figures"].items():
        assert same(figure, each.view.figures[name]), name


def test_texts_that_are_not_recited_are_left_out_and_counted(subject, monkeypatch):
    found = curvature.recited_items

    def first_two(model, items, **more):
        asked = found(model, items, **more)
        items = items[items["group"].isin(more["groups"])]
        two = items.head(2)
        two.attrs = {"not_recited": len(items) - 2, "dropped": 0}
        assert set(asked.attrs) == set(two.attrs)
        return two

    monkeypatch.setattr(curvature, "recited_items", first_two)
    words = explorer(subject).wait(SECONDS).view.words
    lost = subject.items["group"].isin(curvature.GROUPS).sum() - 2
    assert f"{lost} more, which the unedited model does not recite, are not asked." in words
    assert "recites none" not in words and "further texts" not in words and "corpus" not in words


def test_the_rows_of_each_edit_are_those_of_all_and_the_first_is_the_unedited_model(subject):
    model = subject.source.at(subject.source.steps[-1])
    texts = ["In the beginning was the word and the word was good."] * 9
    tokens = text_tokens(model, ["", *texts], "texts")
    assert len(tokens) == 9 and all(2 <= len(each) <= model.context for each in tokens)
    bases = curvature.decompose(curvature.collect_factors(model, tokens, progress=False))
    asked = {"held_out": tokens[:3], "prefix": 4, "suffix": 4, "seed": 3}
    items = subject.items.head(6)
    grid = [("kfac", 0.9), ("svd", 0.5)]
    before, parts = weights(model), []
    for rows in each_edit(model, bases, items, grid=iter([("none", 1.0), *grid]), **asked):
        assert equal_bits(weights(model), before)
        parts.append(rows)
    whole = edit_rows(model, bases, items, grid=grid, **asked)
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True), whole)
    for rows, (method, share) in zip(parts, [("none", 1.0), *grid], strict=True):
        assert set(zip(rows["method"], rows["rho"], strict=True)) == {(method, share)}
        # exp of the mean loss, and its ratio to that of the first rows
        price = rows.set_index("metric")["value"]
        own = parts[0].set_index("metric")["value"]["perplexity"]
        assert price["perplexity_ratio"] == pytest.approx(price["perplexity"] / own)
    with pytest.raises(InputError) as told:
        next(each_edit(model, bases, items, grid=grid, **asked))
    assert str(told.value) == (
        "probe_curvature: the grid begins with kfac; prices are told against the unedited model, "
        "so ('none', 1.0) must be the first"
    )


def test_what_is_no_list_of_usable_texts_is_refused(subject):
    model = subject.source.at(subject.source.steps[-1])
    with pytest.raises(InputError, match="^probe_curvature: texts is one text, needs a list of"):
        text_tokens(model, "one text", "texts")
    with pytest.raises(InputError, match="^probe_curvature: held_out has 2 texts, none of two"):
        text_tokens(model, ["", ""], "held_out")
    long = "and it was so " * model.context
    (cut,) = text_tokens(model, [long], "texts")
    np.testing.assert_array_equal(cut, model.encode([long])[0][: model.context])
    with pytest.warns(UserWarning, match="probe_curvature: dropped 1 of 2 texts that are shorter"):
        text_tokens(model, ["", long], "texts")


def test_the_mark_in_a_sweep_stands_at_its_edit(subject):
    each = explorer(subject, rho=(0.9, 0.7, 0.5)).wait(SECONDS)
    for rho, place in ((1.0, 0), (0.7, 2), (0.5, 3)):
        each.set(rho=rho)
        figures = each.wait(SECONDS).view.figures
        marks = [s.x0 for s in figures["sweep"].layout.shapes if s.line.dash == "dash"]
        assert marks == [place, place]  # one a panel
        cut = [s.y0 for s in figures["spectrum"].layout.shapes]
        assert cut == ([rho] if rho < 1 else [])
    made = {"subject": subject}
    exec(each.code, made)
    with pytest.raises(InputError) as told:
        plot_rho_sweep(made["table"], rho=0.6)
    assert str(told.value) == (
        "plot_rho_sweep: no edit by kfac keeps 0.6; there are 1, 0.9, 0.7, 0.5"
    )
