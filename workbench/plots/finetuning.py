"""Base against tuned: every text before and after, and the change of each group."""

from __future__ import annotations

import html
import textwrap

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.style import (
    GREY,
    MARKERS,
    colour,
    has_columns,
    see_through,
    styled,
    two_lines,
    whiskers,
)
from workbench.table import METRICS, InputError, validate

TEXT_WIDTH = 70  # characters in a line of the text shown under the pointer


def plot_before_after(
    changes: pd.DataFrame, *, items: pd.DataFrame | None = None, of: str = "loss", title: str = ""
) -> go.Figure:
    """Each text's value before tuning against after, and the zone of the controls' change.

    Args:
        changes: What ``tuning_changes`` gives, of one step of the tuned run.
        items: Items frame, whose texts are shown under the pointer.
        of: The measure drawn.

    Raises:
        InputError: No rows of that measure, several steps, or a missing column.
    """
    changes = validate(changes)
    has_columns("plot_before_after", {"changes": changes}, ("of", "before", "after", "change"))
    rows = changes[changes["of"] == of]
    if rows.empty or rows["step"].nunique() != 1:
        raise InputError(
            f"plot_before_after: needs rows of {of} at one step, got {len(rows)} of "
            f"{rows['step'].nunique()} steps; select one"
        )
    metric = METRICS[of]
    ends = [rows[["before", "after"]].min(axis=None), rows[["before", "after"]].max(axis=None)]
    figure = go.Figure()
    low, high = rows["floor_lo"].iloc[0], rows["floor_hi"].iloc[0]
    if low == low:
        figure.add_trace(
            go.Scatter(
                x=[*ends, *ends[::-1]], y=[e + high for e in ends] + [e + low for e in ends[::-1]],
                fill="toself", fillcolor=see_through(GREY, 0.22), mode="lines",
                line={"width": 0}, name="95 % of controls", hoverinfo="skip",
            )
        )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=ends, y=ends, mode="lines", name="no change", hoverinfo="skip",
            line={"color": GREY, "dash": "dot"},
        )
    )  # fmt: skip
    told = {} if items is None else dict(zip(items["item"].astype(str), items["text"], strict=True))
    for index, (name, part) in enumerate(rows.groupby("group", observed=True, sort=True)):
        item = part["item"].astype(str)
        shown = pd.DataFrame(
            {"item": item.map(html.escape), "text": item.map(lambda i: _wrapped(told.get(i, i)))}
        )
        figure.add_trace(
            go.Scatter(
                x=part["before"].round(5), y=part["after"].round(5), mode="markers",
                name=html.escape(str(name)),
                marker={"color": colour(index), "symbol": MARKERS[index % len(MARKERS)],
                        "size": 7, "opacity": 0.8},
                customdata=shown.to_numpy(),
                hovertemplate="%{customdata[0]}: %{x:.3f} before, %{y:.3f} after<br>"
                "%{customdata[1]}<extra></extra>",
            )
        )  # fmt: skip
    unit = f" [{metric.unit}]" if metric.unit else ""
    return styled(
        figure,
        title=title or f"Each text before and after: {metric.label}",
        x=f"base model{unit}",
        y=f"tuned model{unit}",
        height=520,
    )


def plot_tuning(summary: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Mean change of each group from base to tuned, one panel a measure, zero marked.

    Args:
        summary: What ``tuning_summary`` gives, of one step; its rows of "difference" are drawn.

    Raises:
        InputError: No such rows, or several per (measure, group).
    """
    summary = validate(summary)
    has_columns("plot_tuning", {"summary": summary}, ("of",))
    rows = summary[summary["metric"] == "difference"]
    if rows.empty:
        raise InputError("plot_tuning: no rows of difference; give what tuning_summary returns")
    several = rows.duplicated(["of", "group"])
    if several.any():
        first = rows[several].iloc[0]
        raise InputError(
            f"plot_tuning: several rows for {first['of']} of group {first['group']}; select one "
            "step and one kind of foil"
        )
    measures = list(dict.fromkeys(rows["of"].astype(str)))
    columns = min(2, len(measures))
    figure = make_subplots(
        -(-len(measures) // columns), columns, horizontal_spacing=0.06, vertical_spacing=0.22,
        shared_yaxes=True,
        subplot_titles=[METRICS[key].label for key in measures],
    )  # fmt: skip
    groups = list(dict.fromkeys(rows["group"].astype(str)))
    for index, key in enumerate(measures):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        part = rows[rows["of"] == key].set_index("group").reindex(groups).reset_index()
        names = [html.escape(name) for name in groups]
        figure.add_trace(
            go.Scatter(
                x=part["value"].round(6), y=names, mode="markers", showlegend=False,
                error_x=whiskers(part), customdata=part[["lo", "hi", "n"]].round(4),
                marker={"size": 9, "color": [colour(i) for i in range(len(groups))]},
                hovertemplate="%{y}: %{x:.3f} [%{customdata[0]}, %{customdata[1]}], "
                "n=%{customdata[2]}<extra></extra>",
            ),
            **place,
        )  # fmt: skip
        figure.add_vline(x=0, line={"dash": "dot", "color": GREY}, **place)
    deep = -(-len(measures) // columns)
    styled(figure, title=title or "Change from base to tuned", x="", y="", height=110 + 190 * deep)
    for index, key in enumerate(measures):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        better = {"low": "lower", "high": "higher"}.get(METRICS[key].better, "")
        unit = two_lines(METRICS[key]).split("[")[-1].rstrip("]")
        figure.update_xaxes(title_text=f"tuned − base [{unit}], {better} is better known", **place)
        figure.update_yaxes(autorange="reversed", automargin=True, **place)
    return figure


def _wrapped(text: str) -> str:
    return "<br>".join(html.escape(part) for part in textwrap.wrap(text, TEXT_WIDTH))
