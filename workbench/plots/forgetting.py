"""Forgetting curves and the laws fitted to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.style import (
    GREY,
    HEIGHT,
    MARKERS,
    band,
    colour,
    has_columns,
    lag_ticks,
    rows_of,
    see_through,
    shown,
    styled,
    whiskers,
)
from workbench.table import METRICS, InputError, one_metric, validate


def plot_forgetting(
    points: pd.DataFrame,
    fits: pd.DataFrame,
    *,
    x: str = "lag",
    panel: str = "group",
    laws: Sequence[str] | None = None,
    log_x: bool = True,
    holdout: float = 0.0,
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
        log_x: Space time as log(1 + x), or evenly.
        holdout: Share of a curve's points, the last ones, drawn hollow: what ``fit_forgetting``
            held out with the same number of the laws that are defined at all of them.

    Raises:
        InputError: Points of several metrics, an unknown column or law, several points per x, or
            a panel without fits.
    """
    points, fits = validate(points), validate(fits)
    metric = one_metric(points, "plot_forgetting")
    has_columns("plot_forgetting", {"points": points, "fits": fits}, (x, panel))
    has_columns("plot_forgetting", {"fits": fits}, ("law",))
    points = points[points[x].notna()]
    if points.duplicated([panel, x]).any():
        raise InputError(f"plot_forgetting: several points per ({panel}, {x}); summarise first")
    known = list(dict.fromkeys(fits["law"].astype(str)))
    for law in laws or ():
        if law not in known:
            raise InputError(f"plot_forgetting: no fits of {law!r}; there are {', '.join(known)}")
    names = list(points[panel].unique())
    figure, columns, deep = _panels(panel, names)
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
        mine = _law_points(points[points[panel] == name], x, index == 0, holdout)
        figure.add_trace(mine, **place)
    _dress(figure, points[x], x, columns, deep, title or "Forgetting", log_x)
    return figure.update_yaxes(title_text=metric.axis, col=1)


def _panels(panel: str, names: Sequence) -> tuple[go.Figure, int, int]:
    columns = min(3, len(names))
    deep = -(-len(names) // columns)
    figure = make_subplots(
        deep, columns, subplot_titles=[shown(panel, n) for n in names], shared_xaxes=True,
        shared_yaxes=True, horizontal_spacing=0.03, vertical_spacing=0.22 / deep,
    )  # fmt: skip
    return figure, columns, deep


def _dress(
    figure: go.Figure, lags: pd.Series, x: str, columns: int, deep: int, title: str, log_x: bool
) -> go.Figure:
    """Title, axes with the lags themselves as ticks, and a line at 0."""
    styled(figure, title=title, x="", y="", height=max(HEIGHT, 300 * deep + 120))
    ticks = lag_ticks(lags) if log_x else _even_ticks(lags)
    for key in ("tickvals", "ticktext"):
        ticks[key] = ticks[key][:: min(2, columns)]  # a narrow panel has room for half of them
    figure.update_xaxes(**ticks, showticklabels=True, tickangle=0)
    for col in range(1, columns + 1):
        spaced = f", spaced as 1 + {x}" if log_x else ""
        figure.update_xaxes(title_text=f"{x} [updates]{spaced}", row=deep, col=col)
    return figure.add_hline(y=0, line={"dash": "dot", "color": GREY, "width": 1})


def _even_ticks(lags: pd.Series) -> dict:
    """Labels at the lags on an evenly spaced axis, as many as do not touch."""
    kept: list[float] = []
    for lag in sorted(lags.dropna().unique()):
        if not kept or lag - kept[-1] >= lags.max() / 8:
            kept.append(lag)
    return {
        "type": "linear",
        "tickvals": [lag + 1 for lag in kept],
        "ticktext": [f"{lag:g}" for lag in kept],
    }


def plot_residuals(
    fits: pd.DataFrame,
    *,
    x: str = "lag",
    panel: str = "group",
    laws: Sequence[str] | None = None,
    log_x: bool = True,
    title: str = "",
) -> go.Figure:
    """What each law leaves: measured less fitted against time, a panel per curve.

    The law with the largest Akaike weight in its panel is thick. Residuals that wander on one side
    of 0 say that the curve bends otherwise than the law; such as scatter about it are noise.

    Args:
        fits: What ``fit_forgetting`` gives.
        panel: The coordinate that tells curves apart.
        laws: Which to draw; None draws all.
        log_x: Space time as log(1 + x), or evenly.

    Raises:
        InputError: No residuals, an unknown column or law, or several residuals per law and x.
    """
    fits = validate(fits)
    has_columns("plot_residuals", {"fits": fits}, (x, panel, "law"))
    left = rows_of(fits, "residual", "plot_residuals")
    known = list(dict.fromkeys(fits["law"].astype(str)))
    for law in laws or ():
        if law not in known:
            raise InputError(f"plot_residuals: no fits of {law!r}; there are {', '.join(known)}")
    if left.duplicated([panel, "law", x]).any():
        raise InputError(f"plot_residuals: several residuals per ({panel}, law, {x}); select first")
    names = list(left[panel].unique())
    figure, columns, deep = _panels(panel, names)
    for index, name in enumerate(names):
        best = _best(fits[fits[panel] == name])
        for law in laws or known:
            line = left[(left[panel] == name) & (left["law"] == law)].sort_values(x)
            shade, place = colour(known.index(law)), known.index(law) % len(MARKERS)
            trace = go.Scatter(
                x=line[x] + 1, y=line["value"].round(6), name=law.replace("_", " "),
                legendgroup=law, showlegend=index == 0, mode="lines+markers", customdata=line[x],
                line={"color": shade, "width": 3 if law == best else 1},
                marker={"symbol": MARKERS[place], "size": 8 if law == best else 5},
                opacity=1.0 if law == best else 0.6,
                hovertemplate=f"%{{customdata}}: %{{y:.3f}}<extra>{law}</extra>",
            )  # fmt: skip
            figure.add_trace(trace, row=index // columns + 1, col=index % columns + 1)
    _dress(figure, left[x], x, columns, deep, title or "What each law leaves", log_x)
    return figure.update_yaxes(title_text="measured − fitted", col=1)


def _best(fit: pd.DataFrame) -> str | None:
    """The law of the largest Akaike weight among the fits of one curve."""
    weight = fit[(fit["metric"] == "weight") & fit["value"].notna()]
    return str(weight.loc[weight["value"].idxmax(), "law"]) if len(weight) else None


def _law_lines(fit: pd.DataFrame, x: str, known: Sequence[str], laws: Sequence[str]) -> list:
    weight = fit[(fit["metric"] == "weight") & fit["value"].notna()].set_index("law")["value"]
    best = _best(fit)
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


def _law_points(part: pd.DataFrame, x: str, legend: bool, holdout: float) -> go.Scatter:
    part = part.sort_values(x)
    ahead = max(1, round(holdout * len(part))) if holdout else 0
    symbols = ["circle"] * (len(part) - ahead) + ["circle-open"] * ahead
    return go.Scatter(
        x=part[x] + 1,
        y=part["value"].round(6),
        error_y=whiskers(part) | {"color": see_through("#000000", 0.4)},
        name="measured",
        legendgroup="measured",
        showlegend=legend,
        mode="markers",
        marker={"color": "#000000", "size": 6} | ({"symbol": symbols} if ahead else {}),
        customdata=part[[x, "n"]],
        hovertemplate="%{customdata[0]}: %{y:.3f}, n=%{customdata[1]}<extra>measured</extra>",
    )


def plot_laws(
    fits: pd.DataFrame, *, metric: str = "weight", by: str = "group", title: str = ""
) -> go.Figure:
    """Compare the laws curve by curve: Akaike weights as shares of a bar, all else as points.

    Args:
        fits: What ``fit_forgetting`` gives.
        metric: "weight", "half_life", "learnability_threshold", "rmse", "rmse_holdout", "aicc" or a
            parameter.
        by: The coordinate that tells curves apart.

    Raises:
        InputError: No such rows or column, or several rows per (by, law).
    """
    fits = validate(fits)
    has_columns("plot_laws", {"fits": fits}, (by, "law"))
    rows = rows_of(fits, metric, "plot_laws")
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
        endless = np.isinf(part["hi"])  # plotly draws no bar at all to infinity
        dot = go.Scatter(
            x=part["value"].round(6), y=[p + shift for p in place], mode="markers+text", **common,
            text=np.where(endless, " → ∞", ""), textposition="middle right",
        )  # fmt: skip
        dot.update(
            marker={"color": colour(index), "symbol": MARKERS[index % len(MARKERS)], "size": 8},
            error_x=whiskers(part.assign(hi=part["hi"].mask(endless, part["value"])))
            | {"color": see_through(colour(index), 0.5)},
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
        ticktext=[shown(by, name) for name in names],
        autorange="reversed",
        range=None,
        automargin=True,
    )
    if metric in ("half_life", "learnability_threshold", "rmse", "rmse_holdout"):
        figure.update_xaxes(type="log")
    return figure.update_layout(barmode="stack")
