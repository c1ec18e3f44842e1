"""Dose and response, with what texts without memory would have given as a grey zone."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.style import (
    AXES,
    GREY,
    HEIGHT,
    MARKERS,
    colour,
    see_through,
    shown,
    styled,
    two_lines,
    whiskers,
)
from workbench.table import InputError, one_metric, validate


def plot_dose(
    table: pd.DataFrame,
    *,
    x: str = "dose",
    color: str = "run",
    panel: str = "kind",
    title: str = "",
) -> go.Figure:
    """A score against the number of exposures, one panel a kind of text, on a logarithmic axis.

    The grey zone is where the score of as many never-trained texts would fall (``floor_lo`` to
    ``floor_hi`` of ``add_floor``), the grey line their mean; a point inside is no evidence of
    memory. The dotted line is the highest value the score can take.

    Raises:
        InputError: Several metrics, missing columns, no dose above 0, or several rows per point.
    """
    table = validate(table)
    metric = one_metric(table, "plot_dose")
    for name in (x, color, panel):
        if name not in table.columns:
            raise InputError(f"plot_dose: no column {name!r}; there are {', '.join(table)}")
    table = table[table[x] > 0]
    if table.empty:
        raise InputError(f"plot_dose: no row with {x} above 0; controls belong into the floor")
    if table.duplicated([x, color, panel]).any():
        raise InputError(f"plot_dose: several rows per ({x}, {color}, {panel}); summarise first")
    panels = list(dict.fromkeys(table[panel].astype(str)))
    names = list(dict.fromkeys(table[color].astype(str)))
    figure = make_subplots(
        1, len(panels), subplot_titles=[shown(panel, p) for p in panels], shared_yaxes=True,
        horizontal_spacing=0.02,
    )  # fmt: skip
    for index, told in enumerate(panels):
        part = table[table[panel].astype(str) == told].sort_values(x)
        place = {"row": 1, "col": index + 1}
        if "floor" in part.columns:
            figure.add_traces(_zone(part, x, index == 0), rows=1, cols=index + 1)
        for name, line in part.groupby(part[color].astype(str), sort=False):
            look = names.index(name)
            figure.add_trace(
                go.Scatter(
                    x=line[x],
                    y=line["value"].round(6),
                    name=shown(color, name),
                    legendgroup=name,
                    showlegend=index == 0 and len(names) > 1,
                    mode="lines+markers",
                    line={"color": colour(look)},
                    marker={"symbol": MARKERS[look % len(MARKERS)], "size": 7},
                    error_y=whiskers(line),
                    customdata=line[["lo", "hi", "n"]].round(4),
                    hovertemplate=(
                        f"{x} %{{x}}: %{{y:.3f}} [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}], "
                        "n=%{customdata[2]}<extra>" + shown(color, name) + "</extra>"
                    ),
                ),
                **place,
            )
    styled(figure, title=title or metric.label, x="", y="", height=HEIGHT)
    ticks = sorted(table[x].unique())
    figure.update_xaxes(
        type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks], minor={"ticks": ""},
        title_text=AXES.get(x, x),
    )  # fmt: skip
    figure.update_yaxes(title_text=two_lines(metric), col=1)
    if metric.high is not None:
        figure.add_hline(y=metric.high, line={"dash": "dot", "color": GREY, "width": 1})
    return figure.update_layout(legend={"orientation": "h", "y": -0.25, "x": 0})


def _zone(line: pd.DataFrame, x: str, legend: bool) -> list[go.Scatter]:
    """The grey zone of a panel, as wide as its narrowest group of texts makes it at each dose."""
    line = line.sort_values("n").drop_duplicates(x).sort_values(x)
    edges = line.dropna(subset=["floor_lo", "floor_hi"])
    zone = go.Scatter(
        x=pd.concat([edges[x], edges[x][::-1]]),
        y=pd.concat([edges["floor_hi"], edges["floor_lo"][::-1]]).round(6),
        fill="toself",
        fillcolor=see_through(GREY, 0.25),
        mode="lines",
        line={"width": 0},
        hoverinfo="skip",
        name="never trained on: 95 % of as many texts",
        legendgroup="floor",
        showlegend=legend,
    )
    middle = go.Scatter(
        x=line[x],
        y=line["floor"].round(6),
        mode="lines",
        line={"color": GREY, "width": 1},
        hoverinfo="skip",
        showlegend=False,
        legendgroup="floor",
    )
    return [zone, middle]
