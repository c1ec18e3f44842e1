"""Curves, bars of groups, and estimates against the truth."""

from __future__ import annotations

import html

import pandas as pd
import plotly.graph_objects as go

from workbench.plots.style import (
    AXES,
    GREY,
    MARKERS,
    band,
    colour,
    see_through,
    styled,
    two_lines,
    whiskers,
)
from workbench.table import METRICS, InputError, one_metric, validate

TICKS = 20  # on a logarithmic axis, one for each value


def plot_curve(
    table: pd.DataFrame,
    *,
    x: str = "step",
    color: str = "group",
    title: str = "",
    log_x: bool = False,
) -> go.Figure:
    """One line with its band per value of ``color``; rows without an interval get none.

    Raises:
        InputError: Several metrics, an unknown column, or several rows per (x, color).
    """
    metric = one_metric(validate(table), "plot_curve")
    lacking = [name for name in (x, color) if name not in table.columns]
    if lacking:
        raise InputError(f"plot_curve: no column {lacking[0]!r}; there are {', '.join(table)}")
    if table.duplicated([x, color]).any():
        raise InputError(f"plot_curve: several rows per ({x}, {color}); summarise first")
    figure = go.Figure()
    for index, (value, line) in enumerate(table.groupby(color, sort=False, observed=True)):
        line, name = line.sort_values(x), html.escape(str(value))
        figure.add_traces(band(line, x, colour(index), name))
        figure.add_trace(
            go.Scatter(
                x=line[x],
                y=line["value"].round(6),
                name=name,
                legendgroup=name,
                mode="lines+markers",
                line={"color": colour(index)},
                marker={"symbol": MARKERS[index % len(MARKERS)], "size": 7},
                error_y=whiskers(line) if len(line) == 1 else None,  # a band has no width there
                customdata=line["n"],
                hovertemplate="%{x}: %{y:.4g} (n=%{customdata})<extra>" + name + "</extra>",
            )
        )
    styled(figure, title=title, x=AXES.get(x, x), y=two_lines(metric))
    if metric.chance is not None:
        figure.add_hline(y=metric.chance, line={"dash": "dot", "color": GREY})
    if log_x:
        figure.update_xaxes(type="log")
        ticks = sorted(table[x].unique())
        if len(ticks) <= TICKS:  # more would stand on one another
            figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure


def plot_groups(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Bars of one or several shares by group, side by side, with their intervals.

    Where ``add_floor`` put them beside the shares, grey boxes show what as many never-trained
    texts would have given: a bar that ends inside its box is no evidence of memory.

    Raises:
        InputError: Metrics of different units, or several rows per (metric, group).
    """
    table = validate(table)
    metrics = [METRICS[key] for key in table["metric"].astype(str).unique()]
    if not metrics or len({metric.high for metric in metrics}) != 1:
        raise InputError("plot_groups: needs metrics of one range on one axis; select some")
    if table.duplicated(["metric", "group"]).any():
        raise InputError("plot_groups: several rows per (metric, group); summarise first")
    figure = go.Figure()
    for index, (key, part) in enumerate(table.groupby("metric", observed=True)):
        places = part["group"].astype(str) + "<br>n=" + part["n"].astype(str)
        figure.add_trace(
            go.Bar(
                x=places,
                offsetgroup=index,
                y=part["value"].round(6),
                name=METRICS[str(key)].label,
                marker={
                    "color": colour(index),
                    "pattern": {"shape": ("", "/", ".", "x")[index % 4]},
                },
                error_y=whiskers(part),
            )
        )
        if "floor_lo" in part.columns:
            figure.add_trace(_boxes(part, places, index))
    styled(figure, title=title, x="group of texts", y="share")
    return figure.update_layout(barmode="group", legend={"orientation": "h", "y": -0.25})


def _boxes(part: pd.DataFrame, places: pd.Series, index: int) -> go.Bar:
    """Grey boxes over the bars, from ``floor_lo`` to ``floor_hi``."""
    return go.Bar(
        x=places,
        base=part["floor_lo"].round(6),
        y=(part["floor_hi"] - part["floor_lo"]).round(6),
        offsetgroup=index,
        name="never trained on: 95 % of as many texts",
        showlegend=index == 0,
        hoverinfo="skip",
        marker={
            "color": see_through(GREY, 0.3),
            "line": {"color": GREY, "width": 1},
        },
    )


def plot_truth(cells: pd.DataFrame, *, color: str = "kind", title: str = "") -> go.Figure:
    """Estimates against the truth, a point a cell; on the diagonal they agree.

    Args:
        cells: What ``compare_with_truth`` gives: ``estimate, truth, se, se_truth, inside``.
    """
    figure = go.Figure()
    ends = [
        cells[["estimate", "truth"]].min(axis=None),
        cells[["estimate", "truth"]].max(axis=None),
    ]
    figure.add_trace(
        go.Scatter(
            x=ends, y=ends, mode="lines", name="agreement", line={"color": GREY, "dash": "dot"}
        )
    )
    for index, (name, part) in enumerate(cells.groupby(color, observed=True)):
        symbol = MARKERS[index % len(MARKERS)]
        for inside, those in part.groupby("inside"):
            figure.add_trace(
                go.Scatter(
                    x=those["truth"].round(4),
                    y=those["estimate"].round(4),
                    name=f"{name}, {'inside' if inside else 'outside'} its band",
                    mode="markers",
                    marker={
                        "color": colour(index),
                        "symbol": symbol if inside else f"{symbol}-open",
                        "size": 7,
                    },
                )
            )
    unit = METRICS["memorization"].unit
    return styled(figure, title=title, x=f"truth from two runs [{unit}]", y=f"estimate [{unit}]")
