"""What every figure shares: colours, bands, error bars, axes."""

from __future__ import annotations

import html
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from workbench.table import InputError, Metric

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "pentagon")


GREY = "#8A8A8A"  # controls, floors, what is not significant


HEIGHT = 420  # px; reports show a figure at full text width


AXES = {  # what the usual coordinates are called on an axis
    "step": "checkpoint [updates]",
    "lag": "time since the last exposure [updates]",
    "dose": "exposures",
    "copies": "exposures so far",
    "prefix": "prompt length [tokens]",
}


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
            mode="lines",
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
        )
    ]


def whiskers(line: pd.DataFrame) -> dict:
    """Error bars to ``lo`` and ``hi``; none where no interval was estimated."""
    above, below = line["hi"] - line["value"], line["value"] - line["lo"]
    return {
        "type": "data",
        "symmetric": False,
        "array": above.clip(lower=0).round(6),
        "arrayminus": below.clip(lower=0).round(6),
        "thickness": 1,
        "width": 3,
    }


def two_lines(metric: Metric) -> str:
    """An axis title that fits beside a plot: long labels put the unit below."""
    return metric.axis if len(metric.axis) < 40 else f"{metric.label}<br>[{metric.unit}]"


def rows_of(table: pd.DataFrame, metric: str, asker: str) -> pd.DataFrame:
    """The rows of one metric, for figures that know which they draw."""
    found = table[table["metric"] == metric]
    if found.empty:
        held = ", ".join(sorted(table["metric"].astype(str).unique()))
        raise InputError(f"{asker}: the table has no rows of {metric}; it has {held or 'none'}")
    return found


def shown(column: str, value) -> str:
    """A value as a legend shows it: text as it is, never as mark-up; numbers with their name."""
    if isinstance(value, str):
        return html.escape(value)
    return f"{column} {value:g}" if isinstance(value, (int, float)) else html.escape(str(value))


def has_columns(asker: str, tables: dict[str, pd.DataFrame], names: Sequence[str]) -> None:
    """Refuse a table (by what it is called in the message) that lacks one of the columns."""
    for told, table in tables.items():
        for name in names:
            if name not in table.columns:
                raise InputError(f"{asker}: {told} have no column {name!r}; {', '.join(table)}")


def lag_ticks(lags: pd.Series) -> dict:
    """A logarithmic axis labelled with the lags themselves, as many as do not touch."""
    kept: list[float] = []
    for lag in sorted(lags.dropna().unique()):
        if not kept or (lag + 1) / (kept[-1] + 1) > 1.45:
            kept.append(lag)
    return {
        "type": "log",
        "tickvals": [lag + 1 for lag in kept],
        "ticktext": [f"{lag:g}" for lag in kept],
        "minor": {"ticks": ""},
    }
