"""Injected facts: their log-probability as training goes on, what they gained, what is left."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.style import (
    COLOURS,
    GREY,
    MARKERS,
    band,
    colour,
    has_columns,
    rows_of,
    styled,
    whiskers,
)
from workbench.table import METRICS, InputError, validate

INJECTED, NEVER, NET = "injected", "never", "net"
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


def plot_fact_trace(trace: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Log-probability against updates, a row of panels per depth, a column per schedule.

    Blue is injected, grey the entities never injected; dotted lines are injections.

    Args:
        trace: What ``fact_trace`` gives, of one run, batch, learning rate and seed.

    Raises:
        InputError: Missing rows or columns, or several rows per (depth, schedule, group, since).
    """
    trace = validate(trace)
    has_columns("plot_fact_trace", {"the rows": trace}, ["depth", "schedule", "since", "lag"])
    rows = rows_of(trace, "log_probability", "plot_fact_trace")
    _one_each(rows, ["depth", "schedule", "group", "since"], "plot_fact_trace")
    depths, schedules = _in_order(rows["depth"]), _in_order(rows["schedule"])
    figure = make_subplots(
        len(depths), len(schedules), shared_xaxes=True, shared_yaxes=True,
        column_titles=schedules, row_titles=depths, horizontal_spacing=0.03, vertical_spacing=0.04,
    )  # fmt: skip
    for (depth, schedule), part in rows.groupby(["depth", "schedule"], observed=True):
        row, col = depths.index(depth) + 1, schedules.index(schedule) + 1
        for group, shade in ((NEVER, GREY), (INJECTED, COLOURS[0])):
            line = part[part["group"] == group].sort_values("since")
            points = go.Scatter(
                x=line["since"], y=line["value"].round(6), name=group, legendgroup=group,
                mode="lines", line={"color": shade, "width": 2},
                showlegend=row == col == 1,
                customdata=line[["lag", "lo", "hi", "n"]].round(3),
                hovertemplate="%{x} updates, lag %{customdata[0]}: %{y:.2f} [%{customdata[1]:.2f}, "
                "%{customdata[2]:.2f}], n=%{customdata[3]}<extra>" + group + "</extra>",
            )  # fmt: skip
            figure.add_traces([*band(line, "since", shade, group), points], rows=row, cols=col)
        for at in part.loc[(part["lag"] == 0) & (part["group"] == INJECTED), "since"]:
            figure.add_vline(at, line={"dash": "dot", "color": GREY, "width": 1}, row=row, col=col)
    styled(
        figure,
        title=title or "Facts in the training text",
        x="",
        y="",
        height=190 * len(depths) + 130,
    )
    for col in range(1, len(schedules) + 1):
        figure.update_xaxes(
            title_text="updates since the first injection", row=len(depths), col=col
        )
    figure.update_yaxes(title_text="nats per token", col=1)
    return figure.update_layout(legend={"orientation": "h", "y": -0.14, "x": 0})


def plot_retainability(effects: pd.DataFrame, *, group: str = NET, title: str = "") -> go.Figure:
    """Share of the gain that is left, on logarithmic time, with its line; a panel per depth.

    A schedule whose gain at that depth is not told from 0 has no points; the panel says so. The
    axis holds all points, but not all whiskers.

    Args:
        effects: What ``fact_effects`` gives, of one arm, over entities or over seeds.
        group: ``net``, ``injected`` or ``never``.

    Raises:
        InputError: Missing rows or columns, or several rows per (depth, schedule, t).
    """
    effects = validate(effects)
    has_columns("plot_retainability", {"the rows": effects}, ["depth", "schedule", "t"])
    effects = effects[effects["group"] == group]
    rows = rows_of(effects, "retainability", "plot_retainability")
    rows = rows[rows["t"] >= 1]  # at 0 it is 1, and log 0 has no place
    _one_each(rows, ["depth", "schedule", "t"], "plot_retainability")
    depths, schedules = _in_order(rows["depth"]), _in_order(rows["schedule"])
    figure = make_subplots(
        1, len(depths), shared_yaxes=True, subplot_titles=depths, horizontal_spacing=0.03
    )
    # an axis without any trace is not drawn, nor what is written into it
    nothing = {"mode": "markers", "opacity": 0, "hoverinfo": "skip", "showlegend": False}
    for col in range(1, len(depths) + 1):
        figure.add_trace(go.Scatter(x=[1], y=[1], **nothing), row=1, col=col)
    named: set[str] = set()
    untold: dict[int, list[str]] = {}
    for (depth, schedule), part in rows.groupby(["depth", "schedule"], observed=True, sort=False):
        col, index = depths.index(depth) + 1, schedules.index(schedule)
        part = part[part["value"].notna()].sort_values("t")
        if part.empty:
            untold.setdefault(col, []).append(schedule)
            continue
        place = (effects["depth"] == depth) & (effects["schedule"] == schedule)
        line = effects[place & (effects["metric"] == "fitted")].sort_values("t")
        aside = 1 + 0.05 * (index - 1)  # so that whiskers of one time do not cover each other
        points = go.Scatter(
            x=part["t"] * aside, y=part["value"].round(6), error_y=whiskers(part),
            name=schedule, legendgroup=schedule, showlegend=schedule not in named,
            mode="markers", customdata=part[["t", "n"]],
            marker={"color": colour(index), "symbol": MARKERS[index], "size": 7},
            hovertemplate="t = %{customdata[0]}: %{y:.2f}, n=%{customdata[1]}"
            f"<extra>{schedule}</extra>",
        )  # fmt: skip
        figure.add_traces([*_fitted(line, schedule, index), points], rows=1, cols=col)
        named.add(schedule)
    styled(figure, title=title or f"Share of the gain that is left ({group})", x="", y="")
    for col, names in untold.items():
        axis = "" if col == 1 else str(col)
        figure.add_annotation(
            text="gain not told from 0:<br>" + "<br>".join(names), showarrow=False,
            x=0.04, xref=f"x{axis} domain", xanchor="left", align="left",
            y=0.02, yref=f"y{axis} domain", yanchor="bottom", font={"color": GREY, "size": 12},
        )  # fmt: skip
    last = rows["t"].max()
    ticks = [tick for tick in TICKS if tick <= last * 1.2]
    figure.update_xaxes(
        type="log", title_text="updates since the best value", tickvals=ticks,
        ticktext=[str(tick) for tick in ticks], range=[-0.1, math.log10(last * 1.3)],
    )  # fmt: skip
    for level in (0, 1):
        figure.add_hline(y=level, line={"dash": "dot", "color": GREY, "width": 1})
    # the whiskers of a share of little may be very long; the points always have a place
    ends = [min(-0.5, rows["value"].min() - 0.1), max(2.0, rows["value"].max() + 0.1)]
    figure.update_yaxes(range=ends)
    return figure.update_yaxes(title_text="share of the gain", col=1)


def _fitted(line: pd.DataFrame, schedule: str, index: int) -> list[go.Scatter]:
    """The line of one schedule, with its band."""
    straight = go.Scatter(
        x=line["t"], y=line["value"].round(6), mode="lines", legendgroup=schedule,
        showlegend=False, line={"color": colour(index)}, hoverinfo="skip",
    )  # fmt: skip
    return [*band(line, "t", colour(index), schedule), straight]


def plot_effectivity(
    effects: pd.DataFrame, *, metric: str = "effectivity", title: str = ""
) -> go.Figure:
    """What an injection gained, by depth and schedule: beside the never injected, and net of them.

    Args:
        effects: What ``fact_effects`` gives, of one arm, over entities or over seeds.
        metric: ``effectivity``, the mean over injections, or ``gain``, at the best value after the
            last.

    Raises:
        InputError: Another metric, missing rows or columns, or several rows per (group, depth,
            schedule).
    """
    if metric not in ("effectivity", "gain"):
        raise InputError(f"plot_effectivity: metric {metric!r}; choose effectivity or gain")
    effects = validate(effects)
    has_columns("plot_effectivity", {"the rows": effects}, ["depth", "schedule", "slot", "t"])
    rows = rows_of(effects, metric, "plot_effectivity")
    rows = rows[rows["slot"].isna() & (rows["t"].isna() | (rows["t"] == 0))]
    _one_each(rows, ["group", "depth", "schedule"], "plot_effectivity")
    depths, schedules = _in_order(rows["depth"]), _in_order(rows["schedule"])
    titles = ["injected, and never injected (grey)", "net"]
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.12)
    for index, schedule in enumerate(schedules):
        for group, col in ((INJECTED, 1), (NEVER, 1), (NET, 2)):
            part = rows[(rows["schedule"] == schedule) & (rows["group"] == group)]
            part = part.set_index("depth").reindex(depths)
            shift = 0.22 * (index - (len(schedules) - 1) / 2) + 0.08 * (group == NEVER)
            shade = GREY if group == NEVER else colour(index)
            figure.add_trace(
                go.Scatter(
                    x=[place + shift for place in range(len(depths))],
                    y=part["value"].round(6),
                    error_y=whiskers(part),
                    name=schedule,
                    legendgroup=schedule,
                    showlegend=group == NET,
                    mode="markers",
                    marker={"color": shade, "symbol": MARKERS[index], "size": 9},
                    customdata=part[["n"]],
                    hovertemplate="%{y:.3f}, n=%{customdata[0]}<extra>"
                    + f"{schedule}, {group}</extra>",
                ),
                row=1,
                col=col,
            )
    styled(figure, title=title or METRICS[metric].label.capitalize(), x="", y="")
    figure.update_xaxes(tickvals=list(range(len(depths))), ticktext=depths)
    figure.add_hline(y=0, line={"dash": "dot", "color": GREY, "width": 1})
    figure.update_yaxes(title_text=METRICS[metric].unit)
    return figure.update_layout(legend={"orientation": "h", "y": -0.15, "x": 0})


def _one_each(rows: pd.DataFrame, keys: list[str], asker: str) -> None:
    if rows.duplicated(keys).any():
        raise InputError(
            f"{asker}: several rows per ({', '.join(keys)}); select one run, batch, learning rate "
            "and seed, or the rows over seeds"
        )


def _in_order(column: pd.Series) -> list[str]:
    """Names in the order of their first appearance, not of the alphabet."""
    return list(dict.fromkeys(column.astype(str)))
