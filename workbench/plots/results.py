"""Imported results: a panel a task over checkpoints, and the map of what the audit found."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.style import (
    AXES,
    GREY,
    MARKERS,
    band,
    colour,
    has_columns,
    lag_ticks,
    shown,
    styled,
    two_lines,
)
from workbench.table import InputError, one_metric, validate

COLUMNS = 4  # panels side by side
PANEL = 190  # px high
ROW = 24  # px a task takes on the map
MOST = 60  # panels that a page can show
WHOLE = "whole checkpoint"
LOOKS = {  # kind of finding -> its name on the map, marker, colour
    "identical_values": ("same values as another", "diamond", 1),
    "identical_weights": ("same weights as another", "diamond-wide", 1),
    "partly_identical": ("some weights as another's", "diamond-open", 1),
    "checkpoint_off": ("off the curve, many tasks", "star", 6),
    "value_off": ("off its curve", "x", 6),
    "shots_record": ("shots differ from the name", "triangle-up", 3),
    "shots_change": ("other shots than elsewhere", "triangle-down", 3),
    "step_record": ("step differs from the name", "triangle-right", 3),
    "missing_step": ("step missing", "square-open", 0),
    "missing_task": ("task missing", "circle-open", 0),
    "repeated": ("several evaluations", "cross", 4),
}


def plot_results(table: pd.DataFrame, *, title: str = "", log_x: bool = True) -> go.Figure:
    """One panel a group over steps, a line with its band a run; guessing is the dotted line.

    Args:
        table: Pooled rows of one metric, as ``load_results`` gives them.
        log_x: Steps on a logarithmic axis (of step + 1).

    Raises:
        InputError: Several metrics, several values of a run at one step of a panel, or more panels
            than a page can show.
    """
    table = validate(table)
    metric = one_metric(table, "plot_results")
    if table.duplicated(["run", "step", "group"]).any():
        raise InputError(
            "plot_results: several values of a run at one step; choose one by file, item or "
            "source_metric, or load with repeats='latest'"
        )
    groups = list(table["group"].astype(str).drop_duplicates())
    if len(groups) > MOST:
        raise InputError(f"plot_results: {len(groups)} tasks, a page shows {MOST}; select some")
    across = min(COLUMNS, len(groups))
    down = -(-len(groups) // across)
    figure = make_subplots(
        rows=down,
        cols=across,
        subplot_titles=[shown("group", name) for name in groups],
        horizontal_spacing=0.05,
        vertical_spacing=min(0.12, 0.36 / down),
    )
    runs = list(table["run"].astype(str).drop_duplicates())
    for index, (_, part) in enumerate(table.groupby(table["group"].astype(str), sort=False)):
        place = {"row": index // across + 1, "col": index % across + 1}
        for run, line in part.groupby(part["run"].astype(str), sort=False):
            line = line.sort_values("step").assign(at=lambda t: t["step"] + (1 if log_x else 0))
            for trace in _line(line, run, runs.index(run), first=index == 0):
                figure.add_trace(trace, **place)
        if "chance" in part and part["chance"].notna().any():
            figure.add_hline(
                y=float(part["chance"].dropna().iloc[0]),
                line={"dash": "dot", "color": GREY},
                **place,
            )
    styled(figure, title=title, x="", y="", height=90 + PANEL * down)
    figure.update_layout(showlegend=len(runs) > 1, legend={"orientation": "h", "y": -0.08})
    figure.update_annotations(font_size=12)
    if log_x:
        figure.update_xaxes(**_few(lag_ticks(table["step"])))
    figure.update_xaxes(title=AXES["step"], row=down)
    figure.update_yaxes(title={"text": two_lines(metric), "font": {"size": 11}}, col=1)
    return figure


def _line(line: pd.DataFrame, run: str, index: int, *, first: bool) -> list[go.Scatter]:
    return [
        *band(line, "at", colour(index), run),
        go.Scatter(
            x=line["at"],
            y=line["value"].round(6),
            name=shown("run", run),
            legendgroup=run,
            showlegend=first,
            mode="lines+markers",
            line={"color": colour(index), "width": 1.5},
            marker={"symbol": MARKERS[index % len(MARKERS)], "size": 4},
            customdata=line[["step", "n"]],
            hovertemplate="step %{customdata[0]}: %{y:.4g} (n=%{customdata[1]})"
            f"<extra>{shown('run', run)}</extra>",
        ),
    ]


def _few(ticks: dict) -> dict:
    """At most five of the ticks: panels are narrow."""
    kept = range(0, len(ticks["tickvals"]), -(-len(ticks["tickvals"]) // 5))
    return ticks | {name: [ticks[name][k] for k in kept] for name in ("tickvals", "ticktext")}


def plot_audit(table: pd.DataFrame, findings: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Map of one run's values, tasks against steps, with what the audit found marked.

    Colour is the value as it is; white is what is not there. A mark in the top row is of the whole
    checkpoint. Steps stand side by side in their order, missing ones among them. Findings on a
    whole curve or run (constant, at chance, mixed set-ups) have no place here; see their table.

    Args:
        table: Pooled rows of one run and one metric.
        findings: What ``audit_results`` gives for it.

    Raises:
        InputError: Several runs or metrics, several values of a task at one step, or findings
            without a kind.
    """
    table = validate(table)
    metric = one_metric(table, "plot_audit")
    has_columns("plot_audit", {"the findings": findings}, ["kind", "what", "step", "group", "run"])
    runs = list(table["run"].astype(str).unique())
    if len(runs) > 1:
        raise InputError(f"plot_audit: {len(runs)} runs ({runs[0]}, {runs[1]}, ...); select one")
    if table.duplicated(["step", "group"]).any():
        raise InputError("plot_audit: several values of a task at one step; select one of them")
    mine = findings[findings["run"].astype(str) == runs[0]]
    mine = mine[mine["kind"].astype(str).isin(LOOKS)]
    steps = sorted({*table["step"], *mine["step"]})
    groups = list(table["group"].astype(str).drop_duplicates())
    wide = table.assign(group=table["group"].astype(str)).pivot(
        index="group", columns="step", values="value"
    )
    wide = wide.reindex(index=groups[::-1], columns=steps)
    labels = [str(step) for step in steps]
    figure = go.Figure(
        go.Heatmap(
            z=wide.round(6),
            x=labels,
            y=[shown("group", name) for name in wide.index],
            colorscale="Blues",
            opacity=0.8,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": two_lines(metric), "side": "right"}, "thickness": 12},
            hovertemplate="step %{x}, %{y}: %{z:.4g}<extra></extra>",
        )
    )
    for kind, part in mine.groupby(mine["kind"].astype(str), sort=False):
        figure.add_trace(_marks(kind, part, groups))
    order = [shown("group", name) for name in wide.index] + [WHOLE]
    styled(figure, title=title, x=AXES["step"], y="", height=190 + ROW * len(order))
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=labels, tickangle=-60)
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=order, automargin=True
    )
    return figure.update_layout(
        legend={"orientation": "h", "y": -0.32, "yanchor": "top"}, margin={"r": 60, "b": 110}
    )


def _marks(kind: str, part: pd.DataFrame, groups: list[str]) -> go.Scatter:
    """The findings of one kind, each at its step and task."""
    name, symbol, index = LOOKS[kind]
    places = part["group"].astype(str).where(part["group"].isin(groups), WHOLE)
    return go.Scatter(
        x=part["step"].astype(str),
        y=[shown("group", place) for place in places],
        name=name,
        mode="markers",
        marker={
            "symbol": symbol,
            "size": 16 if symbol.startswith("diamond") else 10,  # it may stand below others
            "color": colour(index),
            "line": {"color": "white" if "open" not in symbol else colour(index), "width": 1},
        },
        customdata=[shown("what", str(what)) for what in part["what"]],
        hovertemplate="step %{x}: %{customdata}<extra>" + name + "</extra>",
    )
