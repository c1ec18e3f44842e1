"""Table in, plotly figure out. A plot refuses to compute: means, bands and fits come from stats.

Colours are the Okabe-Ito set, told apart by people who do not see red and green alike; series
also differ in marker. Figures are complete ``go.Figure`` objects; nothing is shown or saved here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.table import METRICS, InputError, Metric, one_metric, validate

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
                error_y=_whiskers(line) if len(line) == 1 else None,  # a band has no width there
                customdata=line["n"],
                hovertemplate="%{x}: %{y:.4g} (n=%{customdata})<extra>" + str(name) + "</extra>",
            )
        )
    styled(figure, title=title, x=AXES.get(x, x), y=_two_lines(metric))
    if metric.chance is not None:
        figure.add_hline(y=metric.chance, line={"dash": "dot", "color": GREY})
    if log_x:
        ticks = sorted(table[x].unique())
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure


def _whiskers(line: pd.DataFrame) -> dict:
    """Error bars from ``lo`` and ``hi``."""
    return {
        "type": "data",
        "symmetric": False,
        "array": (line["hi"] - line["value"]).round(6),
        "arrayminus": (line["value"] - line["lo"]).round(6),
    }


def _two_lines(metric: Metric) -> str:
    """An axis title that fits beside a plot: long labels put the unit below."""
    return metric.axis if len(metric.axis) < 40 else f"{metric.label}<br>[{metric.unit}]"


def plot_groups(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Bars of one or several shares by group, side by side, with their intervals.

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
        figure.add_trace(
            go.Bar(
                x=part["group"].astype(str) + "<br>n=" + part["n"].astype(str),
                y=part["value"].round(6),
                name=METRICS[str(key)].label,
                marker={
                    "color": colour(index),
                    "pattern": {"shape": ("", "/", ".", "x")[index % 4]},
                },
                error_y=_whiskers(part),
            )
        )
    styled(figure, title=title, x="group of texts", y="share")
    return figure.update_layout(barmode="group", legend={"orientation": "h", "y": -0.25})


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


def plot_recognition(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Recognition against lag, one panel per kind of foil: studied, controls, before study, 1/2.

    Args:
        table: What ``retention_curve`` gives; its rows of ``recognition`` are drawn.

    Raises:
        InputError: No such rows, or several per (foil, group, lag).
    """
    rows = _of_lag(table, ["recognition"], "plot_recognition")
    panels = {f"against {foil}": part for foil, part in rows.groupby("foil", observed=True)}
    figure = _lag_panels(panels, columns=len(panels), y=METRICS["recognition"].axis, height=HEIGHT)
    figure.add_hline(y=0.5, line={"dash": "dot", "color": GREY, "width": 1})
    figure.update_yaxes(range=[-0.03, 1.03])
    return figure.update_layout(title_text=title or "Recognition of what was studied")


def plot_recall(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Recall of the second half against lag, one panel per score: studied, controls, before study.

    Args:
        table: What ``retention_curve`` gives; its rows of ``recall_*`` are drawn.

    Raises:
        InputError: No such rows, or several per (score, group, lag).
    """
    keys = [key for key in METRICS if key.startswith("recall_")]
    rows = _of_lag(table, keys, "plot_recall")
    panels = {
        METRICS[str(key)].label.removeprefix("recall: "): part
        for key, part in rows.groupby("metric", observed=True)
    }
    figure = _lag_panels(panels, columns=3, y="score", height=int(1.5 * HEIGHT))
    figure.update_yaxes(rangemode="tozero", matches="y")
    return figure.update_layout(title_text=title or "Recall of the second half, given the first")


def plot_retention(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Share of the first net gain that is left, against lag, one line per measure and foil.

    Args:
        table: What ``retention_curve`` gives; its rows of ``retention`` are drawn. Measures whose
            first gain is not told from 0 have no share and no line.

    Raises:
        InputError: No such rows, or several per (measure, foil, lag).
    """
    rows = _of_lag(table, ["retention"], "plot_retention")
    figure = go.Figure()
    lines = rows[rows["value"].notna()].groupby(["of", "foil"], observed=True, sort=False)
    for index, ((measure, foil), line) in enumerate(lines):
        name = METRICS[str(measure)].label + ("" if foil == "itself" else f", {foil}")
        figure.add_traces(_lag_line(line, name, colour(index), MARKERS[index % 8], "solid"))
    styled(figure, title=title or "Share of the gain that is left", x=LAG_AXIS, y="")
    figure.update_yaxes(title_text=METRICS["retention"].axis)
    figure.add_hline(y=0, line={"dash": "dot", "color": GREY, "width": 1})
    return figure.update_xaxes(**_lag_ticks(rows["lag"]))


LAG_AXIS = "updates since the study ended"


def _of_lag(table: pd.DataFrame, keys: list[str], asker: str) -> pd.DataFrame:
    table = validate(table)
    rows = table[table["metric"].isin(keys)]
    if rows.empty or "lag" not in rows.columns:
        raise InputError(f"{asker}: no rows of {keys[0]} by lag; give what retention_curve returns")
    if (rows["item"] != "all").any():
        raise InputError(f"{asker}: rows of single items; pool them with retention_curve first")
    # the order of first appearance, not of the alphabet
    names = [n for n in ("metric", "foil", "group", "of") if n in rows.columns]
    return rows.assign(**{n: rows[n].cat.reorder_categories(_in_order(rows[n])) for n in names})


def _in_order(column: pd.Series) -> list:
    seen = list(dict.fromkeys(column))
    return seen + [name for name in column.cat.categories if name not in seen]


def _lag_panels(panels: dict, *, columns: int, y: str, height: int) -> go.Figure:
    """Studied and controls by lag in each panel, and the studied items' level before study."""
    deep = -(-len(panels) // columns)
    figure = make_subplots(
        deep, columns, subplot_titles=list(panels), shared_yaxes=True, shared_xaxes=True,
        horizontal_spacing=0.03, vertical_spacing=0.1,
    )  # fmt: skip
    looks = {
        "studied": (COLOURS[0], MARKERS[0], "solid"),
        "control": (COLOURS[1], MARKERS[1], "dash"),
    }
    for index, part in enumerate(panels.values()):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        after = part[part["lag"].notna()]
        if after.duplicated(["group", "lag"]).any():
            raise InputError("plot: several rows per (group, lag) in a panel; select one of them")
        for group, look in looks.items():
            for trace in _lag_line(after[after["group"] == group], group, *look):
                trace.showlegend = bool(trace.showlegend is not False and index == 0)
                figure.add_trace(trace, **place)
        before = part[part["lag"].isna() & (part["group"] == "studied")]
        ends = [after["lag"].min() + 1, after["lag"].max() + 1]
        for level in before["value"]:
            line = go.Scatter(
                x=ends, y=[round(level, 6)] * 2, mode="lines", name="studied list before study",
                legendgroup="before", showlegend=index == 0,
                line={"dash": "dot", "color": "#000000", "width": 1.5},
            )  # fmt: skip
            figure.add_trace(line, **place)
    styled(figure, title="", x="", y="", height=height)
    lags = pd.concat([part["lag"] for part in panels.values()])
    figure.update_xaxes(**_lag_ticks(lags))
    for col in range(1, columns + 1):
        figure.update_xaxes(title_text=LAG_AXIS, row=deep, col=col)
    figure.update_yaxes(title_text=y, col=1)
    return figure.update_layout(legend={"orientation": "h", "y": -0.22 * HEIGHT / height, "x": 0})


def _lag_line(line: pd.DataFrame, name: str, shade: str, symbol: str, dash: str) -> list:
    """One line with its band; x is lag + 1, so that lag 0 has a place on a logarithmic axis."""
    line = line.sort_values("lag").assign(x=line["lag"] + 1)
    points = go.Scatter(
        x=line["x"],
        y=line["value"].round(6),
        name=name,
        legendgroup=name,
        mode="lines+markers",
        line={"color": shade, "dash": dash},
        marker={"symbol": symbol, "size": 6},
        customdata=line[["lag", "lo", "hi", "n"]].round(4),
        hovertemplate=(
            "lag %{customdata[0]}: %{y:.3f} [%{customdata[1]:.3f}, %{customdata[2]:.3f}], "
            "n=%{customdata[3]}<extra>" + name + "</extra>"
        ),
    )
    return [*band(line, "x", shade, name), points]


def _lag_ticks(lags: pd.Series) -> dict:
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


def _rows_of(table: pd.DataFrame, metric: str, asker: str) -> pd.DataFrame:
    """The rows of one metric, for figures that know which they draw."""
    found = table[table["metric"] == metric]
    if found.empty:
        held = ", ".join(sorted(table["metric"].astype(str).unique()))
        raise InputError(f"{asker}: the table has no rows of {metric}; it has {held or 'none'}")
    return found


def plot_spectrum(table: pd.DataFrame, *, rho: float | None = None, title: str = "") -> go.Figure:
    """Curvature mass held by the largest components, one line per layer, coloured by role.

    Args:
        table: Holds rows of ``mass``, as ``probe_curvature`` gives them.
        rho: Draw the cut that keeps this share of the mass.

    Raises:
        InputError: No rows of ``mass``.
    """
    table = _rows_of(validate(table), "mass", "plot_spectrum")
    figure, roles = go.Figure(), list(table["role"].astype(str).unique())
    for (role, block), line in table.groupby(["role", "block"], sort=False, observed=True):
        index, line = roles.index(str(role)), line.sort_values("components")
        figure.add_trace(
            go.Scatter(
                x=line["components"].round(8),
                y=line["value"].round(6),
                name=str(role),
                legendgroup=str(role),
                showlegend=bool(block == table.loc[table["role"] == role, "block"].min()),
                mode="lines+markers",
                line={"color": colour(index), "width": 1.5},
                marker={"symbol": MARKERS[index % len(MARKERS)], "size": 5},
                hovertemplate="%{x:.3%} of the components hold %{y:.2%}"
                f"<extra>{role}, block {int(block)}</extra>",
            )
        )
    x = "share of components, largest mass first"
    styled(figure, title=title, x=x, y=METRICS["mass"].axis)
    if rho is not None:
        cut = {"dash": "dash", "color": GREY}
        figure.add_hline(y=rho, line=cut, annotation_text=f"cut at {rho:g}")
        figure.update_annotations(x=0, xanchor="left")
    return figure.update_xaxes(type="log", tickformat=".3~%").update_yaxes(tickformat=".0%")


def plot_edit_sweep(
    table: pd.DataFrame,
    *,
    metric: str = "recitation_strict",
    x: str = "perplexity",
    title: str = "",
) -> go.Figure:
    """What edits leave of ``metric`` against what they cost, one line per method.

    Args:
        table: What ``probe_curvature`` returned; pooled rows (``item="all"``) are drawn.
        x: ``perplexity`` of held-out text, the frontier; or ``rho``, the share each method keeps.

    Raises:
        InputError: An unknown ``x``, or rows missing.
    """
    if x not in ("perplexity", "rho"):
        raise InputError(f"plot_edit_sweep: x is {x!r}; choose perplexity or rho")
    table = validate(table)
    table = table[table["item"] == "all"]
    drawn = _rows_of(table, metric, "plot_edit_sweep")
    price = _rows_of(table, "perplexity", "plot_edit_sweep")[["method", "rho", "value"]]
    drawn = drawn.merge(price.rename(columns={"value": "perplexity"}), on=["method", "rho"])
    figure, unedited = go.Figure(), drawn[drawn["method"] == "none"]
    methods = [m for m in drawn["method"].astype(str).unique() if m != "none"]
    for index, method in enumerate(methods):
        line = pd.concat([unedited, drawn[drawn["method"] == method]])
        line = line.sort_values("rho", ascending=False)
        figure.add_trace(
            go.Scatter(
                x=line[x].round(6),
                y=line["value"].round(6),
                error_y=_whiskers(line) | {"color": see_through(colour(index), 0.35)},
                name=method,
                mode="lines+markers",
                line={"color": colour(index)},
                marker={"symbol": MARKERS[index % len(MARKERS)], "size": 8},
                customdata=line[["rho", "perplexity"]].round(4),
                hovertemplate="%{y:.3g} at perplexity %{customdata[1]:.4g}, keeping "
                "%{customdata[0]:.4g}<extra>" + method + "</extra>",
            )
        )
    label = "held-out perplexity [per token], log scale" if x == "perplexity" else "share kept"
    styled(figure, title=title, x=label, y=METRICS[metric].axis, height=HEIGHT + 60)
    if x == "perplexity":
        own = unedited["perplexity"].iloc[0]
        figure.add_vline(x=own, line={"dash": "dot", "color": GREY})
        # beyond one and a half times the model is ruined; a double click shows the rest
        figure.update_xaxes(type="log", range=[math.log10(0.98 * own), math.log10(1.5 * own)])
    return figure


def _whiskers(line: pd.DataFrame) -> dict:
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


def plot_band_ratio(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Activation energy of memorized over clean items, by band; one panel per input, colour block.

    Args:
        table: Holds rows of ``band_ratio``, as ``probe_curvature`` gives them.

    Raises:
        InputError: No rows of ``band_ratio``.
    """
    table = _rows_of(validate(table), "band_ratio", "plot_band_ratio")
    panels, blocks = list(table["role"].astype(str).unique()), sorted(table["block"].unique())
    order = list(table["band"].astype(str).unique())
    figure = make_subplots(cols=len(panels), shared_yaxes=True, subplot_titles=panels)
    for (role, block), line in table.groupby(["role", "block"], sort=False, observed=True):
        index = blocks.index(block)
        place = [order.index(band) for band in line["band"].astype(str)]
        # blocks stand side by side within a band, so that their whiskers do not hide each other
        offset = (index - (len(blocks) - 1) / 2) * 0.6 / len(blocks)
        figure.add_trace(
            go.Scatter(
                x=[round(at + offset, 4) for at in place],
                y=line["value"].round(6),
                error_y=_whiskers(line),
                name=f"block {int(block)}",
                legendgroup=f"block {int(block)}",
                showlegend=str(role) == panels[0],
                mode="markers",
                marker={"color": colour(index), "symbol": MARKERS[index % len(MARKERS)]},
                hovertemplate="%{y:.3g}<extra>" + f"{role}, block {int(block)}</extra>",
            ),
            row=1,
            col=panels.index(str(role)) + 1,
        )
    styled(figure, title=title, x="", y="", height=HEIGHT + 60)
    figure.add_hline(y=1.0, line={"dash": "dot", "color": GREY})
    figure.update_xaxes(tickvals=list(range(len(order))), ticktext=order, title_text="")
    return figure.update_yaxes(title_text=METRICS["band_ratio"].axis, col=1)


def plot_profile(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Heat map of ATT(g, t), cohorts down and checkpoints across, white at 0.

    Placebo cells stand left of each cohort's black edge, its first exposure. A dot marks a cell
    whose band includes 0, a cross one without an error. Checkpoints are evenly spaced, whatever
    lies between them.

    Args:
        table: What ``memorization_profile(by="cell")`` gives.

    Raises:
        InputError: No cells, or several rows per (cohort, step).
    """
    table = validate(table)
    cells = table[table["metric"].isin(["memorization", "placebo"])]
    if cells.empty or "cohort" not in cells.columns or cells["cohort"].isna().any():
        raise InputError(
            'plot_profile: needs cells; give what memorization_profile(by="cell") does'
        )
    if cells.duplicated(["cohort", "step"]).any():
        raise InputError("plot_profile: several rows per (cohort, step); select one stratum")
    grid = cells.pivot(index="cohort", columns="step", values="value").sort_index()
    steps, cohorts = list(grid.columns), list(grid.index)
    sizes = cells.groupby("cohort")["n"].max()
    limit = cells["value"].abs().max() or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=grid.round(6),
            zmin=-limit,
            zmax=limit,
            colorscale=[(0, COLOURS[1]), (0.5, "#FFFFFF"), (1, COLOURS[0])],
            colorbar={"title": {"text": METRICS["memorization"].axis, "side": "right"}},
            customdata=[[[g, s] for s in steps] for g in cohorts],
            hovertemplate="cohort %{customdata[0]}, step %{customdata[1]}: %{z:.3f}<extra></extra>",
            xgap=1,
            ygap=1,
        )
    )
    figure.add_traces(_doubts(cells, steps, cohorts))
    for row, cohort in enumerate(cohorts):
        edge = sum(s < cohort for s in steps) - 0.5
        figure.add_shape(
            type="line", x0=edge, x1=edge, y0=row - 0.5, y1=row + 0.5, line={"width": 2}
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
        showgrid=False,
    )
    figure.update_yaxes(
        tickvals=list(range(len(cohorts))),
        ticktext=[f"{g:g} (n={sizes[g]})" for g in cohorts],
        autorange="reversed",
        showgrid=False,
        zeroline=False,
    )
    return figure.update_layout(
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
        name, shade = _shown(color, value), colour(index)
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
                    line={"color": shade, "dash": "solid" if after else "dot"},
                    marker={"symbol": symbol if after else symbol + "-open", "size": 7},
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


def _shown(column: str, value) -> str:
    """A value as a legend shows it: text as it is, never as mark-up; numbers with their name."""
    if isinstance(value, str):
        return html.escape(value)
    return f"{column} {value:g}" if isinstance(value, (int, float)) else html.escape(str(value))


def plot_forgetting(
    points: pd.DataFrame,
    fits: pd.DataFrame,
    *,
    x: str = "lag",
    panel: str = "group",
    laws: Sequence[str] | None = None,
    title: str = "",
) -> go.Figure:
    """Memory against updates since the last exposure, with the fitted laws, a panel per curve.

    Points carry their interval. Every law is a line; the one with the largest Akaike weight in its
    panel is drawn thick, with its bootstrap band.

    Args:
        points: Pooled rows of one metric by ``x``.
        fits: What ``fit_forgetting`` made of them.
        panel: The coordinate that tells curves apart, in both tables.
        laws: Which to draw; None draws all.

    Raises:
        InputError: Points of several metrics, an unknown column or law, several points per x, or
            a panel without fits.
    """
    points, fits = validate(points), validate(fits)
    metric = one_metric(points, "plot_forgetting")
    _has_columns("plot_forgetting", {"points": points, "fits": fits}, (x, panel))
    _has_columns("plot_forgetting", {"fits": fits}, ("law",))
    points = points[points[x].notna()]
    if points.duplicated([panel, x]).any():
        raise InputError(f"plot_forgetting: several points per ({panel}, {x}); summarise first")
    known = list(dict.fromkeys(fits["law"].astype(str)))
    for law in laws or ():
        if law not in known:
            raise InputError(f"plot_forgetting: no fits of {law!r}; there are {', '.join(known)}")
    names = list(points[panel].unique())
    columns = min(3, len(names))
    deep = -(-len(names) // columns)
    figure = make_subplots(
        deep, columns, subplot_titles=[_shown(panel, n) for n in names], shared_xaxes=True,
        shared_yaxes=True, horizontal_spacing=0.03, vertical_spacing=0.22 / deep,
    )  # fmt: skip
    for index, name in enumerate(names):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        fit = fits[fits[panel] == name]
        if fit.empty:
            raise InputError(
                f"plot_forgetting: no fits of {panel}={name}; fit them or leave it out"
            )
        for trace in _law_lines(fit, x, known, laws or known):
            trace.showlegend = bool(trace.showlegend is not False and index == 0)
            figure.add_trace(trace, **place)
        figure.add_trace(_law_points(points[points[panel] == name], x, index == 0), **place)
    styled(figure, title=title or "Forgetting", x="", y="", height=max(HEIGHT, 300 * deep + 120))
    ticks = _lag_ticks(points[x])
    for key in ("tickvals", "ticktext"):
        ticks[key] = ticks[key][:: min(2, columns)]  # a narrow panel has room for half of them
    figure.update_xaxes(**ticks, showticklabels=True, tickangle=0)
    for col in range(1, columns + 1):
        figure.update_xaxes(title_text=f"{x} [updates], spaced as 1 + {x}", row=deep, col=col)
    figure.add_hline(y=0, line={"dash": "dot", "color": GREY, "width": 1})
    return figure.update_yaxes(title_text=metric.axis, col=1)


def _has_columns(asker: str, tables: dict[str, pd.DataFrame], names: Sequence[str]) -> None:
    for told, table in tables.items():
        for name in names:
            if name not in table.columns:
                raise InputError(f"{asker}: {told} have no column {name!r}; {', '.join(table)}")


def _law_lines(fit: pd.DataFrame, x: str, known: Sequence[str], laws: Sequence[str]) -> list:
    weight = fit[(fit["metric"] == "weight") & fit["value"].notna()].set_index("law")["value"]
    best = str(weight.idxmax()) if len(weight) else None
    traces = []
    for law in laws:
        curve = fit[(fit["metric"] == "fitted") & (fit["law"] == law)].sort_values(x)
        curve, shade = curve.assign(x=curve[x] + 1), colour(known.index(law))
        if law == best:
            traces += band(curve, "x", shade, law)
        told = f", weight {weight[law]:.2f}" if law in weight.index else ", not compared"
        line = go.Scatter(
            x=curve["x"], y=curve["value"].round(6), name=law.replace("_", " "), legendgroup=law,
            mode="lines", customdata=curve[x].round(3),
            line={"color": shade, "width": 3 if law == best else 1.3},
            hovertemplate=f"%{{customdata}}: %{{y:.3f}}<extra>{law}{told}</extra>",
        )  # fmt: skip
        traces.append(line)
    return traces


def _law_points(part: pd.DataFrame, x: str, legend: bool) -> go.Scatter:
    part = part.sort_values(x)
    return go.Scatter(
        x=part[x] + 1,
        y=part["value"].round(6),
        error_y=_whiskers(part) | {"color": see_through("#000000", 0.4)},
        name="measured",
        legendgroup="measured",
        showlegend=legend,
        mode="markers",
        marker={"color": "#000000", "size": 6},
        customdata=part[[x, "n"]],
        hovertemplate="%{customdata[0]}: %{y:.3f}, n=%{customdata[1]}<extra>measured</extra>",
    )


def plot_laws(
    fits: pd.DataFrame, *, metric: str = "weight", by: str = "group", title: str = ""
) -> go.Figure:
    """Compare the laws curve by curve: Akaike weights as shares of a bar, all else as points.

    Args:
        fits: What ``fit_forgetting`` gives.
        metric: "weight", "half_life", "rmse", "rmse_holdout", "aicc" or a parameter.
        by: The coordinate that tells curves apart.

    Raises:
        InputError: No such rows or column, or several rows per (by, law).
    """
    fits = validate(fits)
    _has_columns("plot_laws", {"fits": fits}, (by, "law"))
    rows = _rows_of(fits, metric, "plot_laws")
    if rows.duplicated([by, "law"]).any():
        raise InputError(f"plot_laws: several rows per ({by}, law); select one of them")
    laws = list(dict.fromkeys(fits["law"].astype(str)))
    names = list(rows[by].unique())
    figure, shares = go.Figure(), metric == "weight"
    for index, law in enumerate(laws):
        part = rows[rows["law"] == law].set_index(by).reindex(names)
        part = part[part["value"].notna()]
        never = [names.index(name) for name in part.index[np.isinf(part["value"])]]
        part = part[np.isfinite(part["value"])]
        place = [names.index(name) for name in part.index]
        common = {"name": law.replace("_", " "), "legendgroup": law}
        told = ": %{x:.3g}<extra>" + law + "</extra>"
        if shares:
            bar = go.Bar(x=part["value"].round(6), y=place, orientation="h", **common)
            bar.update(marker={"color": colour(index)}, hovertemplate="weight" + told)
            figure.add_trace(bar)
            continue
        # laws side by side within a curve's row
        shift = 0.6 * ((index + 0.5) / len(laws) - 0.5)
        dot = go.Scatter(
            x=part["value"].round(6), y=[p + shift for p in place], mode="markers", **common
        )
        dot.update(
            marker={"color": colour(index), "symbol": MARKERS[index % len(MARKERS)], "size": 8},
            error_x=_whiskers(part) | {"color": see_through(colour(index), 0.5)},
            hovertemplate=METRICS[metric].label + told,
        )
        figure.add_trace(dot)
        for row in never:
            figure.add_annotation(
                x=1, xref="paper", xanchor="right", y=row + shift, showarrow=False,
                text=f"{common['name']}: never", font={"color": colour(index), "size": 11},
            )  # fmt: skip
    styled(
        figure,
        title=title or f"Forgetting laws: {METRICS[metric].label}",
        x=METRICS[metric].axis,
        y="",
        height=max(260, 46 * len(names) + 150),
    )
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[_shown(by, name) for name in names],
        autorange="reversed",
        range=None,
        automargin=True,
    )
    if metric in ("half_life", "rmse", "rmse_holdout"):
        figure.update_xaxes(type="log")
    return figure.update_layout(barmode="stack")
