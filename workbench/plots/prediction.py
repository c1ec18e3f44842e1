"""Exposure by dose, and how early a memorized set can be foretold."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from workbench.plots.style import (
    AXES,
    GREY,
    MARKERS,
    band,
    colour,
    has_columns,
    see_through,
    styled,
    whiskers,
)
from workbench.table import METRICS, InputError, one_metric, validate

BY_CHANCE = -math.log2(0.05)  # bits that one text in twenty exceeds without any memory
DASHES = ("solid", "dash", "dot", "dashdot")
SPREAD = 0.38  # of a place on the axis that its points take, to either side


def plot_exposure(
    table: pd.DataFrame, *, x: str = "dose", color: str = "kind", title: str = ""
) -> go.Figure:
    """Exposure of each text by dose, between what chance gives and what the decoys can resolve.

    The lower grey zone holds 19 in 20 texts without any memory (mean 1.44 bits, dotted); above
    lies what the number of candidates cannot tell apart. A triangle is a text likelier than all its
    decoys, whose exposure is at least that. Pooled rows, if there are any, are drawn as bars with
    their interval.

    Args:
        table: Rows of "exposure" at one step of one run, with ``candidates``; and pooled ones
            (item "all").

    Raises:
        InputError: Other metrics, several runs or steps, a missing column, no single texts, or
            several pooled rows per (x, color).
    """
    table = validate(table)
    metric = one_metric(table, "plot_exposure")
    has_columns("plot_exposure", {"rows": table}, (x, color, "candidates"))
    single, pooled = table[table["item"] != "all"], table[table["item"] == "all"]
    if len(single[["run", "step"]].drop_duplicates()) != 1:
        raise InputError("plot_exposure: needs texts of one run at one step; select one")
    if pooled.duplicated([x, color]).any():
        raise InputError(f"plot_exposure: several pooled rows per ({x}, {color}); select one")
    places = {value: place for place, value in enumerate(sorted(single[x].unique()))}
    names = sorted(single[color].astype(str).unique())
    width = 2 * SPREAD / len(names)
    figure = go.Figure()
    for index, name in enumerate(names):
        centre = (index + 0.5) * width - SPREAD
        part = single[single[color].astype(str) == name].sort_values([x, "value"])
        figure.add_trace(_texts(part, x, places, centre, width, index, name))
        mean = pooled[pooled[color].astype(str) == name]
        bars = go.Scatter(
            x=[places[value] + centre for value in mean[x]], y=mean["value"].round(4),
            error_y=whiskers(mean) | {"thickness": 2}, mode="markers", legendgroup=name,
            showlegend=False, customdata=mean["n"],
            marker={"symbol": "line-ew-open", "size": 16, "color": "#000000", "line": {"width": 3}},
            hovertemplate="mean %{y:.2f}, n=%{customdata}<extra>" + html.escape(name) + "</extra>",
        )  # fmt: skip
        figure.add_trace(bars)
    ceiling = math.log2(single["candidates"].max())
    styled(figure, title=title or "Exposure by dose", x=AXES.get(x, x), y=metric.axis)
    for low, high, told in (
        (0, BY_CHANCE, "19 of 20 never-trained texts"),
        (ceiling, ceiling * 1.12, f"beyond log2 of {single['candidates'].max():g} candidates"),
    ):
        figure.add_hrect(
            y0=low, y1=high, fillcolor=GREY, opacity=0.16, line_width=0, layer="below",
            annotation={"text": told, "font": {"size": 11}, "showarrow": False},
            annotation_position="top right" if low else "bottom right",
        )  # fmt: skip
    figure.add_hline(y=metric.chance, line={"dash": "dot", "color": GREY})
    figure.update_yaxes(range=[-0.3, ceiling * 1.12])
    ticks = [f"{value:g}" if isinstance(value, float | int) else str(value) for value in places]
    return figure.update_xaxes(
        tickvals=list(places.values()), ticktext=ticks, range=[-0.6, len(places) - 0.4]
    )


def _texts(part, x, places, centre, width, index, name) -> go.Scatter:
    """One point a text, beside one another in the order of their values."""
    rank, size = part.groupby(x).cumcount(), part.groupby(x)["value"].transform("size")
    apart = ((rank + 0.5) / size - 0.5) * 0.85 * width
    beyond = part["hi"] == math.inf
    return go.Scatter(
        x=(part[x].map(places).astype(float) + centre + apart).round(4),
        y=part["value"].round(4),
        name=html.escape(name),
        legendgroup=name,
        mode="markers",
        marker={
            "color": see_through(colour(index), 0.75),
            "size": 6,
            "symbol": ["triangle-up" if above else "circle" for above in beyond],
        },
        customdata=pd.DataFrame(
            {"item": part["item"].astype(str), "least": ["at least " * bool(b) for b in beyond]}
        ),
        hovertemplate="%{customdata[0]}: %{customdata[1]}%{y:.2f} bits<extra></extra>",
    )


def plot_prediction(
    table: pd.DataFrame,
    *,
    metrics: Sequence[str] = ("precision", "recall"),
    title: str = "",
) -> go.Figure:
    """How well each earlier checkpoint or smaller model foretells the target, against its compute.

    A line a metric and run, with bands; where nothing is foretold yet, precision has no value and
    no line. Dotted: the target's base rate, which is the precision of guessing blindly.

    Args:
        table: What ``predict_memorized`` gives.
        metrics: Of its rows.

    Raises:
        InputError: No such rows, no column ``compute``, or several rows per (run, step, metric).
    """
    table = validate(table)
    has_columns("plot_prediction", {"rows": table}, ("compute",))
    for key in metrics:
        if not (table["metric"] == key).any():
            held = ", ".join(sorted(table["metric"].astype(str).unique()))
            raise InputError(f"plot_prediction: the table has no rows of {key}; it has {held}")
    if table.duplicated(["run", "step", "metric"]).any():
        raise InputError("plot_prediction: several rows per (run, step, metric); select one")
    runs = list(table["run"].astype(str).unique())
    figure = go.Figure()
    for index, key in enumerate(metrics):
        for place, run in enumerate(runs):
            line = table[(table["metric"] == key) & (table["run"].astype(str) == run)]
            line = line[line["value"].notna()].sort_values("compute")
            if line.empty:
                continue
            name = f"{METRICS[key].label}, {html.escape(run)}"
            if place == 0:
                figure.add_traces(band(line, "compute", colour(index), name))
            figure.add_trace(
                go.Scatter(
                    x=line["compute"].round(6), y=line["value"].round(6), name=name,
                    legendgroup=name, mode="lines+markers",
                    line={"color": colour(index), "dash": DASHES[place % len(DASHES)]},
                    marker={"symbol": MARKERS[place % len(MARKERS)], "size": 7},
                    error_y=whiskers(line) | {"color": see_through(colour(index), 0.35)}
                    if place else None,
                    customdata=line[["step", "n"]],
                    hovertemplate="step %{customdata[0]}: %{y:.3f}, n=%{customdata[1]}<extra>"
                    + name + "</extra>",
                )
            )  # fmt: skip
    base = table.loc[table["metric"] == "base_rate", "value"]
    styled(
        figure,
        title=title or "What will be memorized, foretold",
        x="share of the target's training compute",
        y="share",
    )
    for value in base:
        figure.add_hline(
            y=round(value, 6), line={"dash": "dot", "color": GREY},
            annotation={"text": f"base rate {value:.3f}", "font": {"size": 11}},
        )  # fmt: skip
    return figure.update_yaxes(range=[-0.03, 1.03])
