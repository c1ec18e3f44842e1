"""What sampling gives back: shares of texts over the number of samples, and heat along a book."""

from __future__ import annotations

import html
import textwrap

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.style import (
    COLOURS,
    MARKERS,
    band,
    colour,
    has_columns,
    rows_of,
    shown,
    styled,
)
from workbench.table import METRICS, InputError, validate

FAINTEST = -6  # log10 of p_z from which on cells are drawn as not at all likely
LINE = 60  # characters of a passage in a line of a hover box
LONGEST = 600  # characters of a passage that a hover box shows
HEAT = ((0.0, "#F4F4F4"), (0.5, "#56B4E9"), (1.0, "#0B2545"))
STRIP = 110  # px for each text
CLEAR = 3  # series whose bands can be told apart where they lie on each other


def plot_discoverable(table: pd.DataFrame, *, color: str = "scheme", title: str = "") -> go.Figure:
    """Share of texts extracted against the number of samples; a panel for each probability.

    Greedy, which needs one sample and gains nothing from more, is a dashed line without markers.
    Bands are drawn for up to three series; beyond, intervals are in the hover box alone.

    Args:
        table: What ``discoverable`` gives, one row for each (n, p) and ``color``.

    Raises:
        InputError: No such rows, an unknown column, or several rows per point.
    """
    found = rows_of(validate(table), "discoverable", "plot_discoverable")
    has_columns("plot_discoverable", {"the rows": found}, ("tries", "p", color))
    if found.duplicated(["tries", "p", color]).any():
        raise InputError(
            f"plot_discoverable: several rows per (tries, p, {color}); select one group or scheme"
        )
    chances, clear = sorted(found["p"].unique()), found[color].nunique() <= CLEAR
    figure = make_subplots(
        cols=len(chances),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[f"with probability {p:g} or more" for p in chances],
    )
    for index, (name, lines) in enumerate(found.groupby(color, sort=False, observed=True)):
        greedy = color == "scheme" and name == "greedy"
        for column, p in enumerate(chances, start=1):
            line = lines[lines["p"] == p].sort_values("tries")
            shade = COLOURS[6] if greedy else colour(index)
            mark = go.Scatter(
                x=line["tries"],
                y=line["value"].round(6),
                name=shown(color, name),
                legendgroup=str(name),
                showlegend=column == 1,
                mode="lines" if greedy else "lines+markers",
                line={"color": shade, "dash": "dash" if greedy else "solid"},
                marker={"symbol": MARKERS[index % len(MARKERS)], "size": 7},
                customdata=line[["n", "lo", "hi"]].round(3),
                hovertemplate="n=%{x:,}: %{y:.3f} (%{customdata[1]} to %{customdata[2]}, "
                "%{customdata[0]} texts)<extra>" + shown(color, name) + "</extra>",
            )
            bands = band(line, "tries", shade, str(name)) if clear and not greedy else []
            figure.add_traces([*bands, mark], rows=1, cols=column)
    styled(figure, title=title, x="", y=METRICS["discoverable"].unit)
    figure.update_annotations(font_size=13)
    figure.update_xaxes(type="log", title="samples n", exponentformat="power", dtick=1)
    return figure.update_yaxes(range=[-0.03, 1.03])


def plot_scan(
    heat: pd.DataFrame, runs: pd.DataFrame | None = None, *, title: str = ""
) -> go.Figure:
    """A strip for each text, dark where sampling gives back what it says; runs lie above it.

    Args:
        heat: What ``scan_heat`` gives, of one ``pooled``; with ``passage`` the text is in the
            hover box.
        runs: What ``longest_runs`` gives; with ``passage`` likewise.

    Raises:
        InputError: No such rows, a column is lacking, or several rows per cell.
    """
    heat = rows_of(validate(heat), "p_z", "plot_scan")
    has_columns("plot_scan", {"the cells": heat}, ("kind", "position", "tokens"))
    if heat.duplicated(["kind", "position"]).any():
        raise InputError(
            "plot_scan: several rows per (kind, position); select one step, scheme and pooled"
        )
    figure = go.Figure()
    names = list(heat["kind"].astype(str).unique())[::-1]  # the first on top
    for level, name in enumerate(names):
        figure.add_trace(_strip(heat[heat["kind"] == name].sort_values("position"), level))
    lines = (("near_verbatim_run", 0.42, 1), ("verbatim_run", 0.56, 2))
    for metric, above, shade in lines if runs is not None else ():
        found = runs[(runs["metric"] == metric) & runs["kind"].isin(names)]
        for number, run in enumerate(found[found["value"] > 0].to_dict("records")):
            figure.add_trace(_run(run, names.index(run["kind"]) + above, colour(shade), not number))
    styled(figure, title=title, x="position in the text [tokens]", y="")
    figure.update_layout(
        coloraxis={
            "colorscale": [list(stop) for stop in HEAT],
            "cmin": FAINTEST,
            "cmax": 0,
            "colorbar": {
                "title": {"text": "probability of<br>the suffix p<sub>z</sub>"},
                "tickvals": [FAINTEST, -4, -2, 0],
                "ticktext": ["10<sup>-6</sup> or less", "10<sup>-4</sup>", "0.01", "1"],
            },
        },
        height=170 + STRIP * len(names),
        legend={"orientation": "h", "y": -0.9 / (1 + len(names)), "groupclick": "togglegroup"},
    )
    return figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[html.escape(name) for name in names],
        range=[-0.4, len(names) - 0.3],
        showgrid=False,
        zeroline=False,
    )


def _strip(cells: pd.DataFrame, level: int) -> go.Heatmap:
    """One text's cells; a gap between windows is a cell without a value."""
    begin = cells["position"].to_numpy(dtype=float)
    after = begin + cells["tokens"].to_numpy(dtype=float)
    edges = np.unique(np.concatenate([begin, after]))
    at = np.searchsorted(edges, begin)
    z = np.full(len(edges) - 1, np.nan)
    with np.errstate(divide="ignore"):
        z[at] = np.maximum(np.log10(cells["value"].to_numpy()), FAINTEST).round(3)
    told = np.full(len(z), "", dtype=object)
    said = cells["passage"] if "passage" in cells else [""] * len(cells)
    told[at] = [
        f"p<sub>z</sub> = {p:.3g}, from {n} windows<br>{_wrapped(text)}"
        for p, n, text in zip(cells["value"], cells["n"], said, strict=True)
    ]
    return go.Heatmap(
        x=edges,
        y=[level - 0.3, level + 0.3],
        z=[z],
        customdata=[told],
        coloraxis="coloraxis",
        hovertemplate="token %{x}: %{customdata}<extra></extra>",
    )


def _run(run: dict, height: float, shade: str, first: bool) -> go.Scatter:
    label = METRICS[str(run["metric"])].label
    if "p" in run and not np.isnan(run["p"]):
        label += f" (p<sub>z</sub> ≥ {run['p']:g})"
    told = f"{run['value']:.0f} tokens<br>{_wrapped(str(run.get('passage', '')))}"
    return go.Scatter(
        x=[run["position"], run["position"] + run["value"]],
        y=[height, height],
        mode="lines",
        line={"color": shade, "width": 7},
        name=label,
        legendgroup=label,
        showlegend=first,
        text=[told, told],
        hovertemplate="%{text}<extra>" + label + "</extra>",
    )


def _wrapped(passage: str) -> str:
    """A passage as lines of a hover box, never as mark-up."""
    cut = passage if len(passage) <= LONGEST else passage[:LONGEST] + " ..."
    return "<br>".join(html.escape(line) for line in textwrap.wrap(cut, LINE))
