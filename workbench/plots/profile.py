"""Causal profiles: the heat map of cells and the event study."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.plots.style import COLOURS, GREY, HEIGHT, MARKERS, band, colour, shown, styled
from workbench.table import METRICS, InputError, validate

UNKNOWN = "#D9D9D9"  # a cell without an estimate must not look like one of 0, which is white


def plot_profile(
    table: pd.DataFrame, *, chosen: tuple[float, int] | None = None, title: str = ""
) -> go.Figure:
    """Heat map of ATT(g, t), cohorts down and checkpoints across, white at 0.

    Placebo cells stand left of each cohort's black edge, its first exposure. A dot marks a cell
    whose band includes 0, a cross one without an error; grey is no estimate. Checkpoints are evenly
    spaced, whatever lies between them.

    Args:
        table: What ``memorization_profile(by="cell")`` gives.
        chosen: Cohort and checkpoint of a cell to frame.

    Raises:
        InputError: No cells, several rows per (cohort, step), or a chosen cell outside the map.
    """
    table = validate(table)
    cells = table[table["metric"].isin(["memorization", "placebo"])]
    if cells.empty or "cohort" not in cells.columns or cells["cohort"].isna().any():
        raise InputError(
            'plot_profile: needs cells; give what memorization_profile(by="cell") does'
        )
    if cells.duplicated(["cohort", "step"]).any():
        raise InputError("plot_profile: several rows per (cohort, step); select one stratum")
    grids = cells.pivot(index="cohort", columns="step", values=["value", "lo", "hi", "n"])
    grid = grids["value"].sort_index()
    steps, cohorts = list(grid.columns), list(grid.index)
    limit = cells["value"].abs().max() or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=grid.round(6),
            zmin=-limit,
            zmax=limit,
            colorscale=[(0, COLOURS[1]), (0.5, "#FFFFFF"), (1, COLOURS[0])],
            colorbar={"title": {"text": METRICS["memorization"].axis, "side": "right"}},
            customdata=np.dstack(
                [
                    *np.meshgrid(cohorts, steps, indexing="ij"),
                    *(grids[name].loc[cohorts, steps].to_numpy() for name in ("lo", "hi", "n")),
                ]
            ),
            hovertemplate="cohort %{customdata[0]}, step %{customdata[1]}: %{z:.3f} "
            "[%{customdata[2]:.3f}, %{customdata[3]:.3f}], n=%{customdata[4]}<extra></extra>",
            hoverongaps=False,
            xgap=1,
            ygap=1,
        )
    )
    figure.add_traces(_doubts(cells, steps, cohorts))
    if chosen:
        figure.add_trace(_frame(chosen, steps, cohorts))
    return _grid_axes(figure, steps, cohorts, cells.groupby("cohort")["n"].max(), title)


def _frame(chosen: tuple[float, int], steps: list, cohorts: list) -> go.Scatter:
    """A line around a cell, in a colour that no cell has."""
    cohort, step = chosen
    if cohort not in cohorts or step not in steps:
        raise InputError(f"plot_profile: no cell of cohort {cohort:g} at step {step:g} to frame")
    x, y = steps.index(step), cohorts.index(cohort)
    return go.Scatter(
        x=[x - 0.5, x + 0.5, x + 0.5, x - 0.5, x - 0.5],
        y=[y - 0.5, y - 0.5, y + 0.5, y + 0.5, y - 0.5],
        mode="lines",
        line={"width": 4, "color": COLOURS[2]},
        name=f"chosen: cohort {cohort:g}, step {step:g}",
        showlegend=False,  # the legend has one line above the map
        hoverinfo="skip",
    )


def _grid_axes(figure, steps: list, cohorts: list, sizes: pd.Series, title: str) -> go.Figure:
    """Cohorts down with a black edge at each first exposure, checkpoints across."""
    for row, cohort in enumerate(cohorts):
        edge = sum(s < cohort for s in steps) - 0.5
        figure.add_shape(
            type="line",
            x0=edge,
            x1=edge,
            y0=row - 0.5,
            y1=row + 0.5,
            line={"width": 2, "color": "#000000"},
        )
    styled(
        figure,
        title=title or "Memorization by cohort and checkpoint",
        x="checkpoint [updates]",
        y="cohort: first exposure [update]",
        height=max(HEIGHT, 28 * len(cohorts) + 170),
    )
    every = -(-len(steps) // 24)  # labels stand upright, about 24 fit
    figure.update_xaxes(
        tickvals=list(range(0, len(steps), every)),
        ticktext=[str(s) for s in steps[::every]],
        tickangle=-90,
        range=[-0.5, len(steps) - 0.5],
        showgrid=False,
    )
    figure.update_yaxes(
        tickvals=list(range(len(cohorts))),
        ticktext=[f"{g:g} (n={sizes[g]})" for g in cohorts],
        range=[len(cohorts) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    return figure.update_layout(
        plot_bgcolor=UNKNOWN,
        margin={"l": 110, "t": 80, "b": 80},
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )


def _doubts(cells: pd.DataFrame, steps: list, cohorts: list) -> list[go.Scatter]:
    """Marks on the cells of a heat map whose effect is not told from 0."""
    unsure = cells[(cells["lo"] <= 0) & (cells["hi"] >= 0)]
    blind = cells[cells["lo"].isna() & cells["value"].notna()]
    kinds = ((unsure, "circle", "band includes 0"), (blind, "x-thin-open", "no error known"))
    return [
        go.Scatter(
            x=[steps.index(s) for s in part["step"]],
            y=[cohorts.index(g) for g in part["cohort"]],
            mode="markers",
            name=name,
            marker={"symbol": symbol, "size": 5, "color": "#444444"},
            hoverinfo="skip",
        )
        for part, symbol, name in kinds
        if not part.empty
    ]


def plot_event_study(table: pd.DataFrame, *, color: str = "group", title: str = "") -> go.Figure:
    """Effect against updates since the last exposure, with its band; placebo left of the exposure.

    Lags are spaced as log(1 + lag) on both sides and labelled with the lags themselves. Placebo
    effects (hollow) are counted from the first exposure; they are 0 where trends are parallel.

    Args:
        table: What ``memorization_profile(by="lag")`` gives, or several with a coordinate.
        color: The coordinate that tells the lines apart.

    Raises:
        InputError: No such rows, or several rows per (color, lag).
    """
    table = validate(table)
    rows = table[table["metric"].isin(["memorization", "placebo"])]
    for name in ("lag", color):
        if name not in rows.columns:
            raise InputError(f"plot_event_study: no column {name!r}; there are {', '.join(rows)}")
    if rows.empty or rows["lag"].isna().any():
        raise InputError(
            'plot_event_study: needs effects by lag; give what memorization_profile(by="lag") does'
        )
    if rows.duplicated([color, "lag", "metric"]).any():
        raise InputError(f"plot_event_study: several rows per ({color}, lag); select one of them")
    rows = rows.assign(x=[math.copysign(math.log10(1 + abs(lag)), lag) for lag in rows["lag"]])
    figure = go.Figure()
    for index, (value, part) in enumerate(rows.groupby(color, observed=True, sort=True)):
        name, shade = shown(color, value), colour(index)
        for metric, line in part.sort_values("x").groupby("metric", observed=True, sort=False):
            after = metric == "memorization"
            figure.add_traces(band(line, "x", shade, name))
            symbol = MARKERS[index % len(MARKERS)]
            figure.add_trace(
                go.Scatter(
                    x=line["x"],
                    y=line["value"].round(6),
                    name=name if after else f"{name}, placebo",
                    legendgroup=name,
                    showlegend=after,
                    mode="lines+markers",
                    line={
                        "color": shade,
                        "dash": "solid" if after else "dot",
                        "width": 2 - (not after),
                    },
                    marker={
                        "symbol": symbol if after else symbol + "-open",
                        "size": 7 if after else 5,
                    },
                    customdata=line[["lag", "lo", "hi", "n"]].round(4),
                    hovertemplate="lag %{customdata[0]}: %{y:.3f} [%{customdata[1]:.3f}, "
                    "%{customdata[2]:.3f}], n=%{customdata[3]}<extra>" + name + "</extra>",
                )
            )
    label = "updates since the last exposure"
    if (rows["metric"] == "placebo").any():
        label += " (placebo: before the first)"
    styled(
        figure,
        title=title or "Memorization after the last exposure",
        x=label,
        y=METRICS["memorization"].axis,
    )
    figure.add_hline(y=0, line={"dash": "dot", "color": GREY})
    if (rows["lag"] < 0).any():
        figure.add_vline(x=-0.15, line={"color": "#000000", "width": 1})
    return figure.update_xaxes(**_signed_lag_ticks(rows[["lag", "x"]]), zeroline=False)


def _signed_lag_ticks(places: pd.DataFrame) -> dict:
    """Labels at the lags that are there, from 0 outwards, as many as do not touch."""
    apart = (places["x"].max() - places["x"].min()) / 22
    kept: list[tuple[float, float]] = []
    for lag, x in places.drop_duplicates().sort_values("x", key=abs).itertuples(index=False):
        if all(abs(x - other) >= apart for _, other in kept):
            kept.append((lag, x))
    return {
        "tickvals": [x for _, x in kept],
        "ticktext": [f"{lag:g}".replace("-", "\N{MINUS SIGN}") for lag, _ in kept],
    }
