"""Explorers without a kernel: what their saved state becomes."""

import copy
import json

import ipywidgets as widgets
import nbformat
import plotly.graph_objects as go
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from workbench.explore.shell import Explorer, View
from workbench.frozen import STATE, VIEW, freeze, freeze_widgets
from workbench.table import InputError

PLOTLY = "application/vnd.plotly.v1+json"


def saved(explorer, **beside):
    """A notebook as JupyterLab saves it: the view in an output, all states in the metadata."""
    state = {}
    for name, (model, buffers) in _states(explorer).items():
        state[name] = {"model_name": model["_model_name"], "state": model, "buffers": buffers}
    data = {VIEW: {"model_id": explorer.model_id}, "text/plain": "Explorer"}
    plain = new_output("execute_result", data={"text/plain": "4"})
    cell = new_code_cell("explorer", outputs=[new_output("execute_result", data=data), plain])
    notebook = new_notebook(cells=[cell])
    notebook.metadata["widgets"] = {STATE: {"state": state}}
    return nbformat.reads(nbformat.writes(notebook), as_version=4)


def _states(top) -> dict:
    found = {}
    for widget in [top, *getattr(top, "children", ())]:
        model = {k: v for k, v in widget.get_state().items() if k != "_esm"}
        found[widget.model_id] = (json.loads(json.dumps(model, default=str)), [])
        for child in getattr(widget, "children", ()):
            found |= _states(child)
    return found


@pytest.fixture
def explorer():
    def draw(values, work):
        figure = go.Figure(go.Scatter(x=[0, 1], y=[0, values["number"]]), {"title": {"text": "t"}})
        return View({"figure": figure}, "<b>words</b>", "print('<1>')")

    controls = {
        "number": widgets.IntSlider(description="number", min=0, max=9, value=7),
        "kind": widgets.Dropdown(description="kind", options=["all <", "some"], value="all <"),
    }
    return Explorer("Try", controls, draw).wait(20)


def test_an_explorer_becomes_its_controls_figure_words_and_code(explorer):
    notebook = saved(explorer)
    assert freeze_widgets(notebook) == 1
    assert "widgets" not in notebook.metadata
    data = [output["data"] for output in notebook.cells[0].outputs]
    (figure,) = [each[PLOTLY] for each in data if PLOTLY in each]
    assert figure["data"][0]["y"] == [0, 7] and figure["layout"]["title"]["text"] == "t"
    words = [each["text/html"] for each in data if "text/html" in each]
    assert words == [
        "<h3 style='margin:0'>Try</h3>",
        "<div>number: 7</div>",
        "<div>kind: all &lt;</div>",
        "<b>words</b>",
        "<pre>print(&#x27;&lt;1&gt;&#x27;)</pre>",
    ]
    assert data[-1] == {"text/plain": "4"}  # other outputs stay


def test_other_widgets_are_left_as_they_are():
    notebook = saved(widgets.VBox([widgets.IntSlider(description="lone")]))
    before = copy.deepcopy(notebook.cells)
    assert freeze_widgets(notebook) == 0 and notebook.cells == before


def test_freeze_writes_beside_and_refuses_what_holds_nothing(explorer, tmp_path):
    path = tmp_path / "explore.ipynb"
    nbformat.write(saved(explorer), path)
    assert freeze(path) == tmp_path / "explore-frozen.ipynb"
    assert "widgets" in json.loads(path.read_text())["metadata"]
    with pytest.raises(InputError) as told:
        freeze(tmp_path / "explore-frozen.ipynb")
    assert str(told.value) == (
        f"freeze: {tmp_path / 'explore-frozen.ipynb'} holds no state of an explorer; switch on "
        "Settings > Save Widget State Automatically in JupyterLab, run the notebook and save it "
        "again"
    )
    with pytest.raises(InputError, match=r"^freeze: cannot read .*nowhere\.ipynb as a notebook"):
        freeze(tmp_path / "nowhere.ipynb")


def test_an_explorer_that_never_drew_leaves_its_line():
    def draw(values, work):
        raise InputError("explore: one <checkpoint>; give several")

    each = Explorer("Try", {"n": widgets.IntSlider(description="n")}, draw).wait(20)
    notebook = saved(each)
    assert freeze_widgets(notebook) == 1
    words = [o["data"]["text/html"] for o in notebook.cells[0].outputs if "text/html" in o["data"]]
    assert words == [
        "<h3 style='margin:0'>Try</h3>",
        "<div>n: 0</div>",
        "<div role='alert'>⚠ explore: one &lt;checkpoint&gt;; give several</div>",
    ]


def test_other_widgets_that_have_a_frame_too_are_left():
    notebook = saved(widgets.VBox([widgets.IntSlider(description="lone")]))
    for model in notebook.metadata["widgets"][STATE]["state"].values():
        model["state"]["frame"] = "of another kind"
    before = copy.deepcopy(notebook.cells)
    assert freeze_widgets(notebook) == 0 and notebook.cells == before


def test_choices_and_nothing_chosen_are_told(explorer):
    controls = {
        "many": widgets.SelectMultiple(description="many", options="abc", value=("a", "c")),
        "none": widgets.SelectMultiple(description="none", options="abc"),
        "dark": widgets.Dropdown(description="<b>", options=["x"]),
    }
    notebook = saved(Explorer("Try", controls, explorer._draw).wait(20))
    freeze_widgets(notebook)
    words = [o["data"].get("text/html") for o in notebook.cells[0].outputs]
    assert words[1:4] == ["<div>many: a, c</div>", "<div>none: </div>", "<div>&lt;b&gt;: x</div>"]


@pytest.mark.parametrize("text", ["[]", "null", "{}", "not JSON", '"text"'])
def test_what_is_no_notebook_is_refused_in_one_line(text, tmp_path):
    path = tmp_path / "no.ipynb"
    path.write_text(text)
    with pytest.raises(InputError) as told:
        freeze(path)
    assert str(told.value).startswith(f"freeze: cannot read {path} as a notebook (")
    assert "\n" not in str(told.value)


def test_freeze_writes_where_it_is_told_and_a_value_is_no_mark_up(tmp_path):
    controls = {"find": widgets.Text(description="find", value="<i>")}
    each = Explorer("Try", controls, lambda values, work: View()).wait(20)
    nbformat.write(saved(each), tmp_path / "a.ipynb")
    told = freeze(tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    assert told == tmp_path / "b.ipynb"
    outputs = nbformat.read(told, as_version=4).cells[0].outputs
    assert outputs[1]["data"]["text/html"] == "<div>find: &lt;i&gt;</div>"
