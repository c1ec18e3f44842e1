"""Sharpness of the loss: its spectrum, its course over training, and item by item."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.style import (
    AXES,
    GREY,
    HEIGHT,
    MARKERS,
    band,
    colour,
    has_columns,
    rows_of,
    shown,
    styled,
    two_lines,
)
from workbench.table import METRICS, InputError, validate

DECADES = 6  # of a density that are shown: a millionth of the peak is below what smoothing leaves
WIDTH = 0.35  # of a category, to either side, over which its points are spread


def plot_density(table: pd.DataFrame, *, color: str = "group", title: str = "") -> go.Figure:
    """Density of the Hessian's eigenvalues on a logarithmic axis, with its band over random starts.

    The largest eigenvalues stand as ticks at the foot, where the table has them: single directions,
    too few of all to be seen in a density.

    Args:
        table: Rows of ``hessian_density`` and ``hessian_eigenvalue``, as ``probe_sharpness`` gives.
        color: Coordinate that tells the lines apart, such as ``group`` or ``step``.

    Raises:
        InputError: No rows of ``hessian_density``, no such column, or several lines per colour.
    """
    table = validate(table)
    rows = rows_of(table, "hessian_density", "plot_density")
    has_columns("plot_density", {"the rows": rows}, (color,))
    if rows.duplicated([color, "eigenvalue"]).any():
        # each line has a grid of its own, so equal points are rare; two of one name are not
        raise InputError(f"plot_density: several densities per {color}; select one step or group")
    figure, top = go.Figure(), math.log10(rows["value"].max())
    for index, (name, line) in enumerate(rows.groupby(color, sort=False, observed=True)):
        line, told = line.sort_values("eigenvalue"), shown(color, name)
        floor = 10 ** (top - DECADES - 1)  # a logarithmic axis has no place for 0
        cut = line.assign(**{k: line[k].clip(lower=floor) for k in ("value", "lo", "hi")})
        figure.add_traces(band(cut, "eigenvalue", colour(index), told))
        figure.add_trace(
            go.Scatter(
                x=cut["eigenvalue"].round(6),
                y=cut["value"],
                name=told,
                legendgroup=told,
                mode="lines",
                line={"color": colour(index)},
                hovertemplate="%{y:.2g} per unit at %{x:.4g}<extra>" + told + "</extra>",
            )
        )
        largest = table[(table["metric"] == "hessian_eigenvalue") & (table[color] == name)]
        figure.add_trace(
            go.Scatter(
                x=largest["value"].round(6),
                y=[10 ** (top - DECADES + 0.25)] * len(largest),
                legendgroup=told,
                showlegend=False,
                mode="markers",
                marker={"symbol": "line-ns-open", "size": 12, "color": colour(index)},
                hovertemplate="one of the largest: %{x:.4g}<extra>" + told + "</extra>",
            )
        )
    axis = METRICS["hessian_eigenvalue"].axis
    density = two_lines(METRICS["hessian_density"])
    styled(figure, title=title, x=axis, y=density, height=HEIGHT + 60)
    figure.add_vline(0.0, line={"dash": "dot", "color": GREY})
    ticks = {"type": "log", "dtick": 1, "exponentformat": "power"}
    return figure.update_yaxes(range=[top - DECADES, top + 0.3], **ticks)


def plot_sharpness(
    table: pd.DataFrame,
    *,
    metrics: Sequence[str] | None = None,
    x: str = "step",
    color: str = "group",
    marks: Mapping[str, float] | None = None,
    title: str = "",
) -> go.Figure:
    """Sharpness along training, a panel each measure, a line with its band each group.

    Args:
        table: Pooled rows with intervals, as ``summarise`` or ``probe_sharpness`` give them.
        metrics: Which, in order; None takes all there are.
        marks: Words and where on ``x`` they stand, such as the first and last exposure.

    Raises:
        InputError: A metric without rows, an unknown column, or several rows per (x, colour).
    """
    table = validate(table)
    has_columns("plot_sharpness", {"the rows": table}, (x, color))
    keys = _keys(table, metrics)
    figure = _panels(keys)
    names = list(dict.fromkeys(table[color].astype(str)))
    for number, key in enumerate(keys):
        place = _place(number)
        rows = rows_of(table, key, "plot_sharpness")
        if rows.duplicated([x, color]).any():
            raise InputError(
                f"plot_sharpness: several rows of {key} per ({x}, {color}); summarise first"
            )
        for name, line in rows.groupby(color, sort=False, observed=True):
            index, told, line = names.index(str(name)), shown(color, name), line.sort_values(x)
            traces = [
                *band(line, x, colour(index), told),
                go.Scatter(
                    x=line[x],
                    y=line["value"],
                    name=told,
                    legendgroup=told,
                    showlegend=str(name) not in {trace.name for trace in figure.data},
                    mode="lines+markers",
                    line={"color": colour(index)},
                    marker={"symbol": MARKERS[index % len(MARKERS)], "size": 6},
                    customdata=line["n"],
                    hovertemplate="%{x}: %{y:.4g} (n=%{customdata})<extra>" + told + "</extra>",
                ),
            ]
            figure.add_traces(traces, rows=place["row"], cols=place["col"])
        _scale(figure, key, rows[["value", "lo", "hi"]].stack(), place)
        for word, at in (marks or {}).items():
            line = {"dash": "dot", "color": GREY}
            label = {"annotation_text": word} if number == 0 else {}
            figure.add_vline(at, line=line, **label, **place)
    styled(figure, title=title, x="", y="", height=_height(keys))
    figure.update_annotations(font_size=11)
    bottom = {"title_text": AXES.get(x, x)}
    for number in range(max(0, len(keys) - 2), len(keys)):
        figure.update_xaxes(**bottom, **_place(number))
    return _named(figure, keys)


def plot_item_sharpness(
    table: pd.DataFrame,
    *,
    metrics: Sequence[str] | None = None,
    x: str = "group",
    color: str = "kind",
    title: str = "",
) -> go.Figure:
    """Every item as a point, a panel each measure, a column each group or number of copies.

    Points of a column are spread sideways in the order of their values, so that the column's shape
    is that of their distribution.

    Args:
        table: Item rows of one step and run, as ``probe_item_sharpness`` gives them.
        x: Coordinate of the columns, such as ``group``, ``copies`` or ``dose``; in ascending order
            where it is a number, else in the order of the rows.

    Raises:
        InputError: A metric without rows, unknown columns, or an item with several rows.
    """
    table = validate(table)
    has_columns("plot_item_sharpness", {"the rows": table}, (x, color))
    keys = _keys(table, metrics)
    figure = _panels(keys)
    found = table[x].dropna()
    number_like = pd.api.types.is_numeric_dtype(found)
    columns = sorted(found.unique()) if number_like else list(dict.fromkeys(found.astype(str)))
    names = list(dict.fromkeys(table[color].astype(str)))
    for number, key in enumerate(keys):
        place, rows = _place(number), rows_of(table, key, "plot_item_sharpness")
        if rows["item"].duplicated().any():
            raise InputError(
                f"plot_item_sharpness: several rows of {key} per item; select one step and run"
            )
        rows = rows[rows[x].notna() & rows["value"].notna()]
        rows = rows.assign(at=[columns.index(v if number_like else str(v)) for v in rows[x]])
        rank = rows.groupby("at")["value"].rank(method="first")
        # multiples of the golden ratio never line up
        rows = rows.assign(at=rows["at"] + WIDTH * (2 * (rank * 0.618034 % 1) - 1))
        for name, points in rows.groupby(color, sort=False, observed=True):
            index, told = names.index(str(name)), shown(color, name)
            figure.add_trace(
                go.Scatter(
                    x=points["at"].round(4),
                    y=points["value"],
                    name=told,
                    legendgroup=told,
                    showlegend=str(name) not in {trace.name for trace in figure.data},
                    mode="markers",
                    marker={
                        "symbol": MARKERS[index % len(MARKERS)],
                        "color": colour(index),
                        "size": 6,
                        "opacity": 0.75,
                    },
                    customdata=points["item"].astype(str),
                    hovertemplate="%{customdata}: %{y:.4g}<extra>" + told + "</extra>",
                ),
                **place,
            )
        _scale(figure, key, rows["value"], place)
    words = [f"{each:g}" if number_like else shown(x, each) for each in columns]
    styled(figure, title=title, x="", y="", height=_height(keys))
    figure.update_xaxes(tickvals=list(range(len(columns))), ticktext=words)
    figure.update_xaxes(range=[-0.6, len(columns) - 0.4])
    if number_like or x in AXES:
        for number in range(max(0, len(keys) - 2), len(keys)):
            figure.update_xaxes(title_text=AXES.get(x, x), **_place(number))
    return _named(figure, keys)


def _keys(table: pd.DataFrame, metrics: Sequence[str] | None) -> list[str]:
    drawn = [key for key in table["metric"].astype(str).unique() if key != "hessian_density"]
    return drawn if metrics is None else list(metrics)


def _place(number: int) -> dict[str, int]:
    return {"row": number // 2 + 1, "col": number % 2 + 1}


def _panels(keys: Sequence[str]) -> go.Figure:
    high, wide = math.ceil(len(keys) / 2), min(2, max(1, len(keys)))
    return make_subplots(
        high, wide, horizontal_spacing=0.13, vertical_spacing=0.12 / max(1, high - 1)
    )


def _height(keys: Sequence[str]) -> int:
    return HEIGHT if len(keys) <= 2 else 120 + 270 * math.ceil(len(keys) / 2)


def _scale(figure: go.Figure, key: str, values: pd.Series, place: dict[str, int]) -> None:
    """A logarithmic axis where all is above 0: sharpness spans decades."""
    chance = METRICS[key].chance
    if values.min() > 0:
        drawn = [*values, *([chance] if chance else [])]
        decades = math.log10(max(drawn) / min(drawn))
        few = {"dtick": "D1" if decades < 1 else "D2", "tickformat": "~g"}
        many = {"dtick": 1, "exponentformat": "power"}
        figure.update_yaxes(type="log", **(few if decades < 2 else many), **place)
    if chance is not None:
        figure.add_hline(y=chance, line={"dash": "dot", "color": GREY}, **place)


def _named(figure: go.Figure, keys: Sequence[str]) -> go.Figure:
    for number, key in enumerate(keys):
        figure.update_yaxes(title_text=two_lines(METRICS[key]), **_place(number))
    return figure
