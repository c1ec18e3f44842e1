"""A figure on a page that is replaced whole.

plotly's own FigureWidget sends a page what has changed, and what it sends before the page has drawn
is lost. A picture sends the whole figure, which plotly.js compares with what it shows: pages that
are opened later, or saved, have the same state as those that were there all along.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import anywidget
import ipywidgets as widgets
import plotly
import plotly.graph_objects as go
import plotly.io as pio
import traitlets

TEMPLATES = Path(__file__).parent.parent / "templates"
_BLACK, _WHITE = "#000000", "#FFFFFF"  # the one colour of the house that is lost on a dark page
_CLEAR = "rgba(0,0,0,0)"


class _Code(widgets.Widget):
    """A script's text, sent to a page once."""

    _model_name = traitlets.Unicode("WidgetModel").tag(sync=True)
    source = traitlets.Unicode().tag(sync=True)


@functools.cache
def _plotly() -> _Code:
    from plotly.offline import get_plotlyjs

    return _Code(source=get_plotlyjs())


class Picture(anywidget.AnyWidget):
    """A figure replaced in place, by a plotly of five megabytes that all pictures share.

    Attributes:
        figure: What is shown, None before the first.
        traces, frame: What the page draws, as JSON: the data, and plotly's layout.
    """

    _esm = TEMPLATES / "picture.js"
    _code = traitlets.Instance(widgets.Widget).tag(sync=True, **widgets.widget_serialization)
    _version = traitlets.Unicode(plotly.__version__).tag(sync=True)
    traces = traitlets.Unicode("").tag(sync=True)
    frame = traitlets.Unicode("").tag(sync=True)

    @traitlets.default("_code")
    def _shared(self) -> _Code:
        return _plotly()

    def __init__(self):
        super().__init__()
        self.figure: go.Figure | None = None
        self._answer: Callable | None = None
        self.on_msg(self._told)

    def draw(self, figure: go.Figure, *, dark: bool = False) -> None:
        """Show a figure; nothing is sent where it is shown already."""
        self.figure = figure
        spec = themed(figure, dark=dark)
        with self.hold_sync():
            self.traces = pio.json.to_json_plotly(spec["data"])
            self.frame = pio.json.to_json_plotly(spec["layout"])

    def on_click(self, answer: Callable) -> None:
        """Call ``answer(x, y, trace)`` for a point that is clicked, in whatever is drawn later too."""
        self._answer = answer

    def _told(self, _, content, __) -> None:
        point = content.get("click") if isinstance(content, dict) else None
        # a click may be on its way while the figure is replaced by one with fewer traces
        if point and self._answer and self.figure and point["trace"] < len(self.figure.data):
            self._answer(point["x"], point["y"], self.figure.data[point["trace"]])


@functools.cache
def _template(dark: bool) -> dict:
    return pio.templates["plotly_dark" if dark else "plotly_white"].to_plotly_json()


def themed(figure: go.Figure, *, dark: bool) -> dict:
    """The figure's JSON on the page's own background; black lines turn white on a dark one.

    A figure that has a ground of its own, such as the grey of cells without an estimate, keeps it
    and the black on it.
    """
    spec = figure.to_dict()
    ground = spec["layout"].get("plot_bgcolor")
    if dark and not ground:
        spec |= {name: _whitened(spec[name]) for name in ("data", "layout")}
    layout = spec["layout"]
    clear = {"paper_bgcolor": _CLEAR, "plot_bgcolor": ground or _CLEAR}
    layout |= {"template": _template(dark)} | clear
    # a reader's zoom stays while the axes mean the same
    layout["uirevision"] = str([
        (name, axis.get("type"), axis.get("title", {}).get("text"))
        for name, axis in layout.items()
        if name.startswith(("xaxis", "yaxis"))
    ])  # fmt: skip
    return spec


def _whitened(value, name: str = ""):
    if isinstance(value, Mapping):
        return {key: _whitened(each, key) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_whitened(each, name) for each in value]
    if isinstance(value, str) and name.endswith("color"):
        return value.replace(_BLACK, _WHITE).replace("rgba(0,0,0,", "rgba(255,255,255,")
    return value
