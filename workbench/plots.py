"""Table in, plotly figure out. A plot refuses to compute: means, bands and fits come from stats.

Colours are the Okabe-Ito set, told apart by people who do not see red and green alike; series
also differ in marker. Figures are complete ``go.Figure`` objects; nothing is shown or saved here.
"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from workbench.table import InputError, one_metric, validate

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "pentagon")
GREY = "#8A8A8A"  # controls, floors, what is not significant
HEIGHT = 420  # px; reports show a figure at full text width


def colour(index: int) -> str:
    """The index-th series colour; they repeat after eight, where the markers no longer help."""
    return COLOURS[index % len(COLOURS)]


def see_through(hex_colour: str, opacity: float) -> str:
    """An ``rgba(...)`` string, for bands."""
    red, green, blue = (int(hex_colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def styled(figure: go.Figure, *, title: str, x: str, y: str, height: int = HEIGHT) -> go.Figure:
    """The house's look: white, titled, axes labelled with their units."""
    return figure.update_layout(
        template="plotly_white",
        title={"text": title, "x": 0.0, "xanchor": "left"},
        xaxis_title=x,
        yaxis_title=y,
        height=height,
        margin={"l": 70, "r": 20, "t": 60, "b": 60},
        legend={"groupclick": "togglegroup"},
        font={"size": 13},
    )


def band(line: pd.DataFrame, x: str, shade: str, name: str) -> list[go.Scatter]:
    """The closed area between ``lo`` and ``hi``, left out where no interval was estimated."""
    line = line[line["lo"].notna() & line["hi"].notna()]
    if line.empty:
        return []
    there_and_back = pd.concat([line[x], line[x][::-1]])
    edges = pd.concat([line["hi"], line["lo"][::-1]])
    return [
        go.Scatter(
            x=there_and_back,
            y=edges.round(6),
            fill="toself",
            fillcolor=see_through(shade, 0.18),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
        )
    ]


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
    for index, (name, line) in enumerate(table.groupby(color, sort=False, observed=True)):
        line = line.sort_values(x)
        figure.add_traces(band(line, x, colour(index), str(name)))
        figure.add_trace(
            go.Scatter(
                x=line[x],
                y=line["value"].round(6),
                name=str(name),
                legendgroup=str(name),
                mode="lines+markers",
                line={"color": colour(index)},
                marker={"symbol": MARKERS[index % len(MARKERS)], "size": 7},
                customdata=line["n"],
                hovertemplate="%{x}: %{y:.4g} (n=%{customdata})<extra>" + str(name) + "</extra>",
            )
        )
    styled(figure, title=title, x=x, y=metric.axis)
    if metric.chance is not None:
        figure.add_hline(y=metric.chance, line={"dash": "dot", "color": GREY})
    if log_x:
        figure.update_xaxes(type="log")
    return figure
