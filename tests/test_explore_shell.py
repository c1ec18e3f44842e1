"""The shell of the explorers, with drawings of ten lines: who wins, who stops, what stays."""

import base64
import json
import subprocess
import sys
import threading
import time

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from ipywidgets.widgets.widget import _instances
from traitlets import TraitError

from workbench.explore.picture import Picture, themed
from workbench.explore.shell import (
    Explorer,
    Offer,
    Stopped,
    View,
    Work,
    _train_suite,
    subject_of,
)
from workbench.subject import Subject
from workbench.table import InputError

SECONDS = 20  # no test waits as long unless it fails


def slider() -> widgets.IntSlider:
    return widgets.IntSlider(description="number", tooltip="number", min=0, max=100)


def line(number: int, **more) -> go.Figure:
    return go.Figure(go.Scatter(x=[0, 1], y=[0, number], **more))


def plain(values: dict, work: Work) -> View:
    number = values["number"]
    return View({"figure": line(number)}, f"<b>{number}</b>", f"number = {number}")


class Gate:
    """A drawing that waits to be let on; it keeps what it was asked and what it finished."""

    def __init__(self):
        self.asked, self.done, self.started = [], [], threading.Semaphore(0)
        self.open = threading.Event()

    def __call__(self, values: dict, work: Work) -> View:
        self.asked.append(values["number"])
        self.started.release()
        while not self.open.is_set():
            work.step("waiting", 0.5)
            time.sleep(0.005)
        self.done.append(values["number"])
        return plain(values, work)


def explorer(draw=plain, **more) -> Explorer:
    return Explorer("Try <it>", {"number": slider()}, draw, **more)


def shown(each: Explorer, name: str = "figure") -> list:
    """What a page would draw: the y of each trace in the picture's state."""
    return [list(trace["y"]) for trace in spec(each.figures[name])["data"]]


def spec(picture: Picture) -> dict:
    return {"data": json.loads(picture.traces), "layout": json.loads(picture.frame)}


def test_a_view_is_drawn_with_its_words_and_code():
    each = explorer().wait(SECONDS)
    each.set(number=7)
    assert each.wait(SECONDS) is each
    assert each.values == {"number": 7}
    assert shown(each) == [[0, 7]]
    assert each._words.value == "<b>7</b>"
    assert each.code == each._foot.code == "number = 7"
    assert each.message == ""
    assert "Try &lt;it&gt;" in each.children[0].value  # a title is text, not HTML


def test_a_moved_control_draws():
    each = explorer().wait(SECONDS)
    each.controls["number"].value = 3
    assert shown(each.wait(SECONDS)) == [[0, 3]]


def test_several_controls_are_set_with_one_drawing():
    asked = []
    controls = {"number": slider(), "other": slider()}
    each = Explorer("t", controls, lambda values, work: asked.append(values) or View())
    each.wait(SECONDS)
    each.set(number=1, other=2)
    each.wait(SECONDS)
    assert asked == [{"number": 0, "other": 0}, {"number": 1, "other": 2}]


def test_a_control_that_refuses_its_value_does_not_silence_the_others():
    each = explorer().wait(SECONDS)
    with pytest.raises(TraitError, match="expected an int, not the str 'many'"):
        each.set(number="many")
    each.controls["number"].value = 4
    assert shown(each.wait(SECONDS)) == [[0, 4]]


def test_the_newest_wish_wins():
    # 0 is at work and never asks whether to end; 1 and 2 come meanwhile: 1 is never begun, and 0
    # is not shown though it comes to its end
    begun, go_on, asked = threading.Semaphore(0), threading.Event(), []

    def deaf(values, work):
        asked.append(values["number"])
        begun.release()
        go_on.wait(SECONDS)
        return plain(values, work)

    each = explorer(deaf)
    begun.acquire(timeout=SECONDS)
    each.set(number=1)
    each.set(number=2)
    drawn = []
    each._foot.observe(lambda change: drawn.append(change.new), "code")
    go_on.set()
    each.wait(SECONDS)
    assert asked == [0, 2] and drawn == ["number = 2"] and shown(each) == [[0, 2]]


def test_overtaken_work_ends_at_its_next_step_and_says_nothing():
    gate = Gate()
    each = explorer(gate)
    gate.started.acquire(timeout=SECONDS)
    told = []
    each._line.observe(lambda change: told.append(change.new), "value")
    each.set(number=5)
    gate.started.acquire(timeout=SECONDS)
    gate.open.set()
    assert shown(each.wait(SECONDS)) == [[0, 5]]
    assert gate.done == [5] and not told


def test_many_wishes_at_once_end_with_the_last():
    each = explorer().wait(SECONDS)
    for number in range(1, 51):
        each.controls["number"].value = number
    assert shown(each.wait(SECONDS)) == [[0, 50]] and each.code == "number = 50"
    assert threading.active_count() < 20  # one thread an explorer, not one a wish


def test_stop_keeps_the_last_figure_and_says_so():
    gate = Gate()
    gate.open.set()
    each = explorer(gate).wait(SECONDS)
    gate.started.acquire()
    gate.open.clear()
    each.set(number=9)
    gate.started.acquire(timeout=SECONDS)
    each.stop()
    each.wait(SECONDS)
    assert shown(each) == [[0, 0]] and each.code == "number = 0"
    assert each.message == "Stopped; what is shown belongs to the last settings that were drawn."
    assert "role='alert'" in each._line.value
    assert each._progress.layout.visibility == "hidden"
    gate.open.set()
    each.set(number=10)
    assert shown(each.wait(SECONDS)) == [[0, 10]] and each._line.value == ""


def test_stop_of_an_idle_explorer_does_nothing():
    each = explorer().wait(SECONDS)
    each.stop()
    each.wait(SECONDS)
    assert each.message == "" and shown(each) == [[0, 0]]


def test_the_stop_button_stops():
    gate = Gate()
    each = explorer(gate)
    gate.started.acquire(timeout=SECONDS)
    button = each._progress.children[1]
    assert (button.description, button.tooltip) == ("Stop", "End this piece of work")
    button.click()
    assert each.wait(SECONDS).message.startswith("Stopped;")
    assert each.view is None


def test_progress_is_shown_only_to_those_who_wait():
    gate = Gate()
    each = explorer(gate)
    gate.started.acquire(timeout=SECONDS)
    deadline = time.monotonic() + SECONDS
    while each._progress.layout.visibility == "hidden" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert each._progress.layout.visibility == "visible"
    assert (each._bar.value, each._doing.value) == (0.5, "waiting")
    gate.open.set()
    assert each.wait(SECONDS)._progress.layout.visibility == "hidden"


@pytest.mark.parametrize(
    "error, told",
    [
        (
            InputError("explore: nothing is <left>; widen it"),
            "explore: nothing is <left>; widen it",
        ),
        (ValueError("two\n  lines"), "ValueError: two lines"),
        (InputError("load: three\n\nlines"), "load: three lines"),
        (ValueError("x" * 600), f"ValueError: {'x' * 488} …"),  # 500 characters and a mark
        (MemoryError(), "MemoryError"),
        (FileNotFoundError(2, "gone", "w"), "FileNotFoundError: [Errno 2] gone: 'w'"),
        (SystemExit("bye"), "SystemExit: bye"),
    ],
)
def test_an_error_is_one_line_and_keeps_the_last_figure(error, told):
    def draw(values, work):
        if values["number"] == 1:
            raise error
        return plain(values, work)

    each = explorer(draw).wait(SECONDS)
    each.set(number=1)
    each.wait(SECONDS)
    assert each.message == told
    assert "<left>" not in each._line.value  # escaped
    assert shown(each) == [[0, 0]] and each.code == "number = 0"
    each.set(number=2)
    assert each.wait(SECONDS).message == "" and shown(each) == [[0, 2]]


def test_a_figure_that_cannot_be_painted_is_one_line_too():
    each = explorer(lambda values, work: View({"nowhere": line(1)})).wait(SECONDS)
    assert each.message == "KeyError: 'nowhere'"


def test_a_missing_figure_keeps_its_last():
    def draw(values, work):
        names = ("one", "two") if values["number"] == 0 else ("one",)
        return View({name: line(values["number"] + 1) for name in names})

    each = explorer(draw, figures=("one", "two")).wait(SECONDS)
    each.set(number=4)
    each.wait(SECONDS)
    assert (shown(each, "one"), shown(each, "two")) == ([[0, 5]], [[0, 1]])


def test_wait_says_who_is_still_at_work():
    gate = Gate()
    each = explorer(gate)
    with pytest.raises(TimeoutError, match=r"^Try <it>: still at work after 0.05 s$"):
        each.wait(0.05)
    gate.open.set()
    each.wait(SECONDS)


def test_an_interrupted_wait_ends_the_work(monkeypatch):
    gate = Gate()
    each = explorer(gate)
    gate.started.acquire(timeout=SECONDS)

    def interrupted(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(each._idle, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            each.wait()
    assert each.wait(SECONDS).message.startswith("Stopped;")
    gate.open.set()
    each.set(number=6)
    assert shown(each.wait(SECONDS)) == [[0, 6]]


def test_two_explorers_do_not_wait_for_each_other():
    gate = Gate()
    one, two = explorer(gate), explorer()
    two.set(number=3)
    assert shown(two.wait(SECONDS)) == [[0, 3]]  # while the first is at work
    two.stop()
    gate.open.set()
    assert shown(one.wait(SECONDS)) == [[0, 0]] and one.message == ""


def test_a_dark_page_gets_white_lines_and_keeps_the_view():
    def draw(values, work):
        return View(
            {"figure": line(values["number"], line_color="#000000", marker_color="#E69F00")}
        )

    each = explorer(draw).wait(SECONDS)
    picture = each.figures["figure"]
    light = spec(picture)["data"][0]
    each._foot.dark = True
    dark = spec(picture)["data"][0]
    assert (light["line"]["color"], dark["line"]["color"]) == ("#000000", "#FFFFFF")
    assert light["marker"]["color"] == dark["marker"]["color"] == "#E69F00"
    assert each.view.figures["figure"].data[0].line.color == "#000000"
    each._foot.dark = False
    assert spec(picture)["data"][0]["line"]["color"] == "#000000"


def test_themed_leaves_the_page_its_background():
    figure = line(1, fillcolor="rgba(0,0,0,0.2)", text=["rgba(0,0,0,0.2)", "#000000"])
    figure.update_layout(paper_bgcolor="white", title="kept")
    figure.add_vline(1, line={"color": "#000000"})
    for dark, text, fill in ((False, "#2a3f5f", "0,0,0"), (True, "#f2f5fa", "255,255,255")):
        got = themed(figure, dark=dark)
        layout = got["layout"]
        assert layout["paper_bgcolor"] == layout["plot_bgcolor"] == "rgba(0,0,0,0)"
        assert layout["template"]["layout"]["font"]["color"] == text  # plotly's own templates
        assert layout["title"]["text"] == "kept"
        assert layout["shapes"][0]["line"]["color"] == ("#FFFFFF" if dark else "#000000")
        assert got["data"][0]["fillcolor"] == f"rgba({fill},0.2)"
        assert got["data"][0]["text"] == ["rgba(0,0,0,0.2)", "#000000"]  # words stay
    assert figure.layout.paper_bgcolor == "white"
    assert figure.layout.shapes[0].line.color == "#000000"


def test_a_zoom_stays_while_the_axes_mean_the_same():
    kept = [
        themed(line(number).update_layout(xaxis={"title": name, "type": kind}), dark=dark)
        for number, name, kind, dark in (
            (1, "step", "linear", False), (2, "step", "linear", True),
            (1, "step", "log", False), (1, "lag", "linear", False),
        )
    ]  # fmt: skip
    one, same, log, other = (each["layout"]["uirevision"] for each in kept)
    assert one == same and len({one, log, other}) == 3


def test_a_picture_sends_a_figure_once():
    picture, sent = Picture(), []
    picture.observe(lambda change: sent.append(change.name), ["traces", "frame"])
    figure = line(1)
    for dark in (False, False, True):
        picture.draw(figure, dark=dark)
    assert sent == ["traces", "frame", "frame"]
    figure.add_vline(3)  # a mark that moves leaves the traces as they are
    picture.draw(figure, dark=True)
    assert sent == ["traces", "frame", "frame", "frame"]
    figure = go.Figure(go.Heatmap(z=np.arange(6.0).reshape(2, 3)))
    picture.draw(figure)
    z = spec(picture)["data"][0]["z"]  # numbers go as bytes
    assert (z["dtype"], z["shape"]) == ("f8", "2, 3")
    assert list(np.frombuffer(base64.b64decode(z["bdata"]))) == [0, 1, 2, 3, 4, 5]
    assert picture.figure is figure


def test_all_pictures_share_one_plotly():
    one, two = Picture(), Picture()
    assert one._code is two._code and "plotly.js v" in one._code.source[:200]


def click(picture: Picture, x: int, trace: int = 0) -> None:
    """What the page tells of a click."""
    picture._handle_custom_msg({"click": {"x": x, "y": 10 * x, "trace": trace}}, [])


def test_a_click_is_answered_before_and_after_other_traces_are_drawn():
    clicks = []
    each = explorer()
    each.on_click("figure", lambda x, y, trace: clicks.append((x, y, trace.type)))
    picture = each.wait(SECONDS).figures["figure"]
    click(picture, 1)
    picture.draw(go.Figure(go.Heatmap(z=[[1, 2]])))
    click(picture, 2)
    picture._told(picture, {"click": {"x": 3, "y": 30, "trace": 1}}, [])  # of one that is gone
    assert clicks == [(1, 10, "scatter"), (2, 20, "heatmap")]


def test_a_click_on_nothing_is_not_answered():
    picture = Picture()
    click(picture, 1)
    picture.on_click(lambda *_: pytest.fail("nothing is drawn"))
    click(picture, 1)


def test_what_is_lacking_is_offered_and_made_at_a_click():
    made = []

    def make(work):
        work.step("making", 0.5)
        made.append(True)

    def draw(values, work):
        if not made:
            raise Offer("explore: no <suite>; four minutes", "Make it", make)
        return plain(values, work)

    each = explorer(draw).wait(SECONDS)
    button = each._make
    assert each.message == "explore: no <suite>; four minutes"
    assert (button.description, button.layout.display) == ("Make it", "")
    button.click()
    assert shown(each.wait(SECONDS)) == [[0, 0]]
    assert made == [True] and each.message == "" and button.layout.display == "none"
    each.set(number=2)  # it is made once
    each.wait(SECONDS)
    assert made == [True]


def test_making_can_be_stopped_and_is_offered_again():
    started, tries = threading.Semaphore(0), []

    def make(work):
        tries.append(True)
        started.release()
        while True:
            work.step("making", shared=True)
            time.sleep(0.005)

    def draw(values, work):
        raise Offer("none", "Make it", make)

    each = explorer(draw).wait(SECONDS)
    each._make.click()
    started.acquire(timeout=SECONDS)
    each.set(number=1)  # a control that is moved meanwhile does not end it
    assert not each._idle.wait(0.1)
    each.stop()
    assert each.wait(SECONDS).message.startswith("Stopped;")
    assert each._make.layout.display == ""
    each.set(number=2)
    each.wait(SECONDS)
    assert (each.message, each._make.layout.display, tries) == ("none", "", [True])


def test_a_suite_that_is_not_trained_is_offered():
    with pytest.raises(Offer) as told:
        subject_of("suite")
    assert str(told.value) == (
        "explore: the embedded suite is not trained yet; that takes about four minutes on two "
        "cores, once"
    )
    assert told.value.label == "Train the suite"


@pytest.mark.parametrize("corpus", ["nowhere.txt"])
def test_training_that_fails_says_its_last_line(corpus, tmp_path):
    told = []
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        _train_suite(str(tmp_path / corpus), Work(lambda what, share: told.append(what)))


def test_stopped_training_ends_its_process(monkeypatch):
    running = []
    popen = subprocess.Popen

    def kept(command, **more):
        running.append(popen([sys.executable, "-c", "import time; time.sleep(60)"], **more))
        return running[0]

    monkeypatch.setattr("workbench.explore.shell.subprocess.Popen", kept)
    work = Work(lambda what, share: work.stop())
    with pytest.raises(Stopped):
        _train_suite("", work)
    assert running[0].poll() not in (None, 0)


def test_training_tells_how_far_it_is(monkeypatch):
    popen, told = subprocess.Popen, []
    code = "import time; print(' 37%|### | 259/700', flush=True); time.sleep(60)"
    monkeypatch.setattr(
        "workbench.explore.shell.subprocess.Popen",
        lambda command, **more: popen([sys.executable, "-c", code], **more),
    )

    def tell(what, share):
        told.append((what, share))
        if share is not None:
            work.stop()

    work = Work(tell)
    with pytest.raises(Stopped):
        _train_suite("", work)
    assert told[0] == ("training", None) and told[-1] == ("37%|### | 259/700", 0.37)


def test_progress_goes_back_to_nothing_and_stays_where_none_is_told():
    each = explorer().wait(SECONDS)
    for share, shown_share in ((0.5, 0.5), (None, 0.5), (0.0, 0.0)):
        each._tell("at work", share)
        assert each._bar.value == shown_share


def test_a_given_subject_gets_a_module_of_its_own(tiny):
    items = tiny.suite.items()
    subject = Subject(tiny.suite.checkpoints(), items, tiny.suite.exposures("base"), tiny.suite)
    one, two = subject_of(subject), subject_of(subject)
    first, last = one.source.steps[0], one.source.steps[-1]
    early = one.source.at(first).module
    weights = next(early.parameters()).clone()
    two.source.at(last)
    assert torch.equal(next(early.parameters()), weights)
    assert one.items is items and one.suite is tiny.suite


def test_figures_that_are_done_are_shown_while_words_are_made():
    done, go_on = threading.Event(), threading.Event()

    def draw(values, work):
        work.show({"one": line(values["number"] + 1)})
        done.set()
        go_on.wait(SECONDS)
        return View({"two": line(7)}, "words")

    each = explorer(draw, figures=("one", "two"))
    assert done.wait(SECONDS) and shown(each, "one") == [[0, 1]]
    assert each.figures["two"].figure is None and each.view is None
    each._foot.dark = True  # what is shown changes with the page, in the last view or not
    go_on.set()
    each.wait(SECONDS)
    each._foot.dark = False
    light = spec(each.figures["one"])["layout"]["template"]["layout"]["font"]["color"]
    assert light == "#2a3f5f" and shown(each, "two") == [[0, 7]] and each._words.value == "words"


def test_stopped_work_shows_nothing():
    for newer in (False, True):
        shown = []
        work = Work(lambda *_: None, shown.append)
        work.show({})
        work.stop(newer=newer)
        with pytest.raises(Stopped):
            work.show({})
        assert len(shown) == 1


def test_a_step_of_stopped_work_raises():
    told = []
    work = Work(lambda what, share: told.append((what, share)))
    work.step("reading", 0.25)
    work.stop()
    with pytest.raises(Stopped):
        work.step("more")
    assert told == [("reading", 0.25)]


def test_stopped_while_a_newer_wish_waits_shows_no_older_one():
    # 1 is at work and never asks whether to end, 2 waits for it; stopped, neither is shown
    begun, go_on = threading.Event(), threading.Event()

    def deaf(values, work):
        if values["number"] == 1:
            begun.set()
            go_on.wait(SECONDS)
        return plain(values, work)

    each = explorer(deaf).wait(SECONDS)
    each.set(number=1)
    assert begun.wait(SECONDS)
    each.set(number=2)
    each.stop()
    go_on.set()
    assert each.wait(SECONDS).message.startswith("Stopped;")
    assert shown(each) == [[0, 0]] and each.code == "number = 0"


def test_a_theme_that_changes_while_a_figure_is_painted_keeps_the_new_figure(monkeypatch):
    each = explorer().wait(SECONDS)
    inside, go_on, draw = threading.Event(), threading.Event(), Picture.draw

    def slow(picture, figure, **more):
        if not inside.is_set():
            inside.set()
            go_on.wait(SECONDS)
        draw(picture, figure, **more)

    monkeypatch.setattr(Picture, "draw", slow)
    each.set(number=9)
    assert inside.wait(SECONDS)
    page = threading.Thread(target=lambda: setattr(each._foot, "dark", True))
    page.start()
    time.sleep(0.2)  # the page waits for the figure that is being painted
    go_on.set()
    page.join(SECONDS)
    assert shown(each.wait(SECONDS)) == [[0, 9]]
    assert (
        spec(each.figures["figure"])["layout"]["template"]["layout"]["font"]["color"] == "#f2f5fa"
    )


def test_quiet_is_who_asked_for_it_and_not_the_page():
    each = explorer().wait(SECONDS)
    with each.quietly():
        with each.quietly():
            pass
        each.controls["number"].value = 3  # still quiet
        assert each.wait(SECONDS).code == "number = 0"
        page = threading.Thread(target=lambda: setattr(each.controls["number"], "value", 4))
        page.start()
        page.join(SECONDS)
        assert each.wait(SECONDS).code == "number = 4"
    each.controls["number"].value = 5
    assert each.wait(SECONDS).code == "number = 5"


def test_a_click_that_cannot_be_answered_is_one_line():
    each = explorer().wait(SECONDS)
    each.on_click("figure", lambda x, y, trace: each.set(number="many"))
    click(each.figures["figure"], 1)
    assert each.message.startswith("TraitError: ") and "\n" not in each.message
    assert shown(each) == [[0, 0]]
    each.set(number=2)
    assert each.wait(SECONDS).message == ""


def test_a_closed_explorer_leaves_no_widget_and_ends_its_work():
    explorer().wait(SECONDS).close()  # all pictures share a plotly, which stays
    before = set(_instances)
    gate = Gate()
    each = Explorer("t", {"number": slider()}, gate)
    gate.started.acquire(timeout=SECONDS)
    each.close()
    each.wait(SECONDS)
    assert gate.done == [] and set(_instances) == before
    each.close()  # once more is no error
    gate.open.set()
    again = explorer().wait(SECONDS)
    assert again.message == "" and Picture()._code.comm is not None


def test_training_that_dies_in_silence_is_said(monkeypatch):
    popen = subprocess.Popen
    monkeypatch.setattr(
        "workbench.explore.shell.subprocess.Popen",
        lambda command, **more: popen([sys.executable, "-c", "raise SystemExit(9)"], **more),
    )
    with pytest.raises(InputError) as told:
        _train_suite("", Work(lambda *_: None))
    assert str(told.value) == ("explore: training the suite ended with status 9: it said nothing")


def test_a_figure_keeps_its_own_ground_and_the_black_on_it():
    # the grey of a heat map's cells without an estimate, beside white, which is 0
    figure = line(1, line_color="#000000").update_layout(plot_bgcolor="#D9D9D9")
    for dark in (False, True):
        got = themed(figure, dark=dark)
        assert got["layout"]["plot_bgcolor"] == "#D9D9D9"
        assert got["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"
        assert got["data"][0]["line"]["color"] == "#000000"
