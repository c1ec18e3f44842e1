"""How many memories still stand, and what makes them last."""

from __future__ import annotations

import html

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
    shown,
    styled,
    two_lines,
    whiskers,
)
from workbench.table import METRICS, InputError, validate

DASHES = ("solid", "dash", "dot", "dashdot")
LINE = 26  # px a line of the numbers at risk
WIDEST = 1e3  # a ratio's interval is drawn to here, or to its reciprocal
FINE = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10)  # ticks, if no interval goes beyond them


def plot_survival(curve: pd.DataFrame, *, color: str = "kind", title: str = "") -> go.Figure:
    """Share of memories that still stand against updates since the exposure, a line a group.

    Kaplan-Meier's curves are steps, with their bands, a tick where memories were censored, and
    below them how many are still at risk; Turnbull's are straight between the times they know. A
    dotted line leads down from one half to each median.

    Args:
        curve: What ``survival_curve`` gives, of one method.
        color: The coordinate that tells curves apart.

    Raises:
        InputError: No survival rows, several methods, a missing column, or several rows per
            (``color``, time).
    """
    curve = validate(curve)
    points = rows_of(curve, "survival", "plot_survival")
    has_columns("plot_survival", {"rows": curve}, (color, "time", "method"))
    methods = sorted(points["method"].astype(str).unique())
    if len(methods) > 1:
        raise InputError(f"plot_survival: rows of {' and '.join(methods)}; select one method")
    if points.duplicated([color, "time"]).any():
        raise InputError(f"plot_survival: several rows per ({color}, time); select one of them")
    names = points[color].sort_values().unique().tolist()
    steps = methods == ["kaplan_meier"]
    below = LINE * len(names) + 20
    height = HEIGHT + (below if steps else 0)
    figure = make_subplots(
        2 if steps else 1, 1, shared_xaxes=True, vertical_spacing=0.04,
        row_heights=[HEIGHT - 120, below] if steps else [1],
    )  # fmt: skip
    ticks = lag_ticks(points["time"])
    medians = curve[(curve["metric"] == "median_survival") & curve["value"].notna()]
    for index, name in enumerate(names):
        part = points[points[color] == name].sort_values("time")
        told, shade = shown(color, name), colour(index)
        part = part.assign(x=part["time"] + 1)
        figure.add_traces(band(_stairs(part) if steps else part, "x", shade, told))
        line = go.Scatter(
            x=part["x"], y=part["value"].round(6), name=f"{told} (n={part['n'].iloc[0]})",
            legendgroup=told, mode="lines", customdata=part[["time", "n", "lo", "hi"]].round(3),
            line={"color": shade, "width": 2.5, "dash": DASHES[index % len(DASHES)],
                  "shape": "hv" if steps else "linear"},
            hovertemplate="%{customdata[0]} updates: %{y:.3f} [%{customdata[2]}, %{customdata[3]}], "
            f"n=%{{customdata[1]}}<extra>{told}</extra>",
        )  # fmt: skip
        figure.add_trace(line)
        if steps:
            figure.add_trace(_censored(part, shade, told))
            figure.add_trace(_at_risk(part, ticks, shade, len(names) - index), row=2, col=1)
        for half in medians.loc[medians[color] == name, "value"]:
            figure.add_trace(_median(half, shade, told))
    method = "Kaplan-Meier" if steps else "Turnbull"
    styled(
        figure,
        title=title or f"How long memories last ({method})",
        x="",
        y="",
        height=height,
    )
    figure.update_xaxes(**ticks, showticklabels=True, tickangle=0)
    figure.update_yaxes(title_text=METRICS["survival"].axis, range=[-0.03, 1.04], row=1, col=1)
    figure.update_xaxes(
        title_text="time since the last exposure [updates], spaced as 1 + time",
        row=2 if steps else 1,
        col=1,
    )
    if steps:
        _name_numbers_at_risk(figure, [_short(shown(color, name)) for name in names])
    return figure


def _name_numbers_at_risk(figure: go.Figure, names: list[str]) -> None:
    figure.update_xaxes(showticklabels=False, row=1, col=1)
    figure.update_xaxes(showgrid=False, row=2, col=1)
    figure.update_yaxes(
        range=[0.4, len(names) + 0.6], tickvals=list(range(1, len(names) + 1)),
        ticktext=names[::-1], title_text="at risk", showgrid=False, zeroline=False,
        row=2, col=1, automargin=True,
    )  # fmt: skip


def _stairs(part: pd.DataFrame) -> pd.DataFrame:
    """Each bound held until the next time: a band with the corners of its curve."""
    until = part.assign(x=part["x"].shift(-1)).dropna(subset="x")
    both = pd.concat([part.assign(corner=0), until.assign(corner=1)])
    return both.sort_values(["time", "corner"])


def _censored(part: pd.DataFrame, shade: str, told: str) -> go.Scatter:
    some = part[part["censored"] > 0]
    return go.Scatter(
        x=some["x"], y=some["value"].round(6), mode="markers", legendgroup=told, showlegend=False,
        marker={"symbol": "line-ns", "size": 10, "line": {"width": 2, "color": shade}},
        customdata=some[["time", "censored"]],
        hovertemplate="%{customdata[1]} still there when last seen, at %{customdata[0]} updates"
        f"<extra>{told}</extra>",
    )  # fmt: skip


def _at_risk(part: pd.DataFrame, ticks: dict, shade: str, place: int) -> go.Scatter:
    """The number at risk at each tick of the axis: that of the curve's next time."""
    time, n = part["time"].to_numpy(), part["n"].to_numpy()
    next_one = [int((time < tick - 1).sum()) for tick in ticks["tickvals"]]
    return go.Scatter(
        x=ticks["tickvals"], y=[place] * len(next_one), mode="text", showlegend=False,
        text=[str(n[at]) if at < len(n) else "0" for at in next_one],
        textfont={"size": 12, "color": shade}, hoverinfo="skip",
    )  # fmt: skip


def _median(half: float, shade: str, told: str) -> go.Scatter:
    return go.Scatter(
        x=[half + 1, half + 1], y=[0.5, 0.0], mode="lines", legendgroup=told, showlegend=False,
        line={"color": shade, "width": 1.5, "dash": "dot"},
        hovertemplate=f"median {half:.4g} updates<extra>{told}</extra>",
    )  # fmt: skip


def _short(told: str) -> str:
    return told if len(told) <= 22 else told[:21] + "…"


def plot_hazards(fits: pd.DataFrame, *, color: str = "law", title: str = "") -> go.Figure:
    """Hazard or time ratios with their intervals, one line a covariate; 1 is no effect.

    What has no finite estimate is named with its reason. An interval that reaches beyond 1000 or
    its reciprocal is drawn to there.

    Args:
        fits: What ``fit_survival`` gives: of Cox, or of laws of time, not both.
        color: The coordinate that tells fits apart.

    Raises:
        InputError: No ratios, both kinds of ratio, a missing column, or several rows per
            (covariate, ``color``).
    """
    fits = validate(fits)
    has_columns("plot_hazards", {"fits": fits}, ("covariate", color))
    held = [m for m in ("hazard_ratio", "time_ratio") if (fits["metric"] == m).any()]
    if len(held) != 1:
        raise InputError(
            "plot_hazards: needs hazard ratios or time ratios, got "
            f"{'both; select one' if held else 'neither'}"
        )
    ratios = rows_of(fits, held[0], "plot_hazards")
    if ratios.duplicated(["covariate", color]).any():
        raise InputError(f"plot_hazards: several rows per (covariate, {color}); select one of them")
    terms = list(dict.fromkeys(ratios["covariate"].astype(str)))
    names = ratios[color].unique().tolist()
    figure = go.Figure()
    for index, name in enumerate(names):
        part = ratios[ratios[color] == name]
        shift = 0.6 * ((index + 0.5) / len(names) - 0.5)
        place = part["covariate"].astype(str).map(terms.index) + shift
        figure.add_trace(_ratios(part, place, shown(color, name), index))
        for at, row in zip(place, part.itertuples(), strict=True):
            given = f"{row.value:.3g} [{row.lo:.3g}, {row.hi:.3g}]"
            figure.add_annotation(
                x=1.02, xref="paper", xanchor="left", y=at, showarrow=False,
                text=given if row.value == row.value else "no estimate", hovertext=str(row.reason),
                font={"size": 12, "color": colour(index) if len(names) > 1 else "#000000"},
            )  # fmt: skip
    metric = METRICS[held[0]]
    sides = (
        ("kept longer", "lost sooner")
        if held[0] == "hazard_ratio"
        else ("lost sooner", "kept longer")
    )
    styled(
        figure,
        title=title or f"What makes a memory last: {metric.label}",
        x=f"{two_lines(metric)}: {sides[0]} ← 1 → {sides[1]}",
        y="",
        height=max(260, 30 * len(terms) * max(1, len(names)) + 160),
    )
    figure.add_vline(x=1, line={"dash": "dot", "color": GREY, "width": 1.5})
    figure.update_xaxes(type="log")
    if (ratios["lo"].min() >= FINE[0]) and (ratios["hi"].max() <= FINE[-1]):
        figure.update_xaxes(tickvals=FINE, ticktext=[f"{tick:g}" for tick in FINE])
    else:
        figure.update_xaxes(dtick=1)  # powers of ten
    figure.update_yaxes(
        tickvals=list(range(len(terms))), ticktext=[html.escape(term) for term in terms],
        range=[len(terms) - 0.4, -0.6], zeroline=False, automargin=True,
    )  # fmt: skip
    return figure.update_layout(
        margin={"r": 170}, showlegend=len(names) > 1,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )  # fmt: skip


def _ratios(part: pd.DataFrame, place: pd.Series, told: str, index: int) -> go.Scatter:
    """The ratios of one fit that have an estimate, with whiskers cut at :data:`WIDEST`."""
    drawn = part["value"].notna()
    whole = part[drawn].assign(
        lo=part["lo"].clip(lower=1 / WIDEST), hi=part["hi"].clip(upper=WIDEST)
    )
    return go.Scatter(
        x=whole["value"].round(6), y=place[drawn], name=told, mode="markers",
        marker={"color": colour(index), "symbol": MARKERS[index % len(MARKERS)], "size": 10},
        error_x=whiskers(whole) | {"color": colour(index), "thickness": 2, "width": 5},
        customdata=part.loc[drawn, ["lo", "hi", "n", "events"]].round(4),
        hovertemplate="%{x:.3f} [%{customdata[0]}, %{customdata[1]}], n=%{customdata[2]}, "
        "%{customdata[3]} losses<extra></extra>",
    )  # fmt: skip
