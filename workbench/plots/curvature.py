"""Spectra of curvature, and what editing them does."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.style import (
    AXES,
    GREY,
    HEIGHT,
    MARKERS,
    colour,
    has_columns,
    rows_of,
    see_through,
    shown,
    styled,
    whiskers,
)
from workbench.table import METRICS, InputError, validate

TICKS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of prices


def plot_spectrum(table: pd.DataFrame, *, rho: float | None = None, title: str = "") -> go.Figure:
    """Curvature mass held by the largest components, one line per layer, coloured by role.

    Args:
        table: Holds rows of ``mass``, as ``probe_curvature`` gives them.
        rho: Draw the cut that keeps this share of the mass.

    Raises:
        InputError: No rows of ``mass``.
    """
    table = rows_of(validate(table), "mass", "plot_spectrum")
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
    group: str | None = None,
    title: str = "",
) -> go.Figure:
    """What edits leave of ``metric`` against what they cost, one line per method.

    Args:
        table: What ``probe_curvature`` returned; pooled rows (``item="all"``) are drawn.
        x: ``perplexity`` of held-out text, the frontier; or ``rho``, the share each method keeps.
        group: Of the items, where several were recited.

    Raises:
        InputError: An unknown ``x``, rows missing, or several groups.
    """
    if x not in ("perplexity", "rho"):
        raise InputError(f"plot_edit_sweep: x is {x!r}; choose perplexity or rho")
    table = validate(table)
    table = table[table["item"] == "all"]
    drawn = _one_group(rows_of(table, metric, "plot_edit_sweep"), group, "plot_edit_sweep")
    price = rows_of(table, "perplexity", "plot_edit_sweep")[["method", "rho", "value"]]
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
                error_y=whiskers(line) | {"color": see_through(colour(index), 0.35)},
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


def _one_group(table: pd.DataFrame, group: str | None, asker: str) -> pd.DataFrame:
    there = sorted(table["group"].astype(str).unique())
    if group is None and len(there) > 1:
        raise InputError(f"{asker}: rows of the groups {', '.join(there)}; choose one with group=")
    if group is not None and group not in there:
        raise InputError(f"{asker}: no rows of group {group!r}; there are {', '.join(there)}")
    return table if group is None else table[table["group"] == group]


def plot_rho_sweep(
    table: pd.DataFrame,
    *,
    method: str = "kfac",
    metrics: Sequence[str] = ("recitation_strict", "perplexity_ratio"),
    rho: float | None = None,
    title: str = "",
) -> go.Figure:
    """What one method leaves and costs, edit by edit: a panel a metric, a line a group.

    The edits stand side by side from the unedited model to the strongest, evenly, whatever the
    shares they keep.

    Args:
        table: What ``probe_curvature`` returned; pooled rows (``item="all"``) are drawn.
        metrics: From top to bottom; those of tasks too, where ``also`` asked for them.
        rho: Mark the edit that keeps this share.

    Raises:
        InputError: A metric or method without rows, several rows for a group and edit, or a
            ``rho`` that no edit keeps.
    """
    table = validate(table)
    table = table[table["item"] == "all"]
    if "method" not in table.columns or method not in set(table["method"]):
        raise InputError(f"plot_rho_sweep: the table has no edits by {method}")
    table = table[table["method"].isin(["none", method])]
    order = sorted(table["rho"].unique(), reverse=True)
    if rho is not None and rho not in order:
        raise InputError(
            f"plot_rho_sweep: no edit by {method} keeps {rho:g}; there are "
            f"{', '.join(f'{share:g}' for share in order)}"
        )
    figure = make_subplots(
        rows=len(metrics), shared_xaxes=True, vertical_spacing=0.16 / len(metrics)
    )
    for panel, metric in enumerate(metrics, start=1):
        drawn = rows_of(table, metric, "plot_rho_sweep")
        if drawn.duplicated(["group", "rho"]).any():
            raise InputError(f"plot_rho_sweep: several rows of {metric} for a group and an edit")
        lines = drawn.groupby("group", sort=False, observed=True)
        for index, (group, line) in enumerate(lines):
            line, shade = line.sort_values("rho", ascending=False), colour(index)
            figure.add_trace(
                go.Scatter(
                    x=[order.index(rho) for rho in line["rho"]],
                    y=line["value"].round(6),
                    error_y=whiskers(line) | {"color": see_through(shade, 0.35)},
                    name=html.escape(str(group)),
                    legendgroup=metric,
                    legendgrouptitle={"text": METRICS[metric].label},
                    mode="lines+markers",
                    line={"color": shade},
                    marker={"symbol": MARKERS[index % len(MARKERS)], "size": 7},
                    customdata=line[["rho"]].round(4),
                    hovertemplate="%{y:.3g} keeping %{customdata[0]:.4g}<extra>%{fullData.name}"
                    "</extra>",
                ),
                row=panel,
                col=1,
            )
        figure.update_yaxes(title_text=METRICS[metric].unit or METRICS[metric].label, row=panel)
        if METRICS[metric].low == 0 and METRICS[metric].high == 1:
            figure.update_yaxes(range=[-0.04, 1.04], row=panel)
    styled(figure, title=title, x="", y="", height=120 + 210 * len(metrics))
    for panel, metric in enumerate(metrics, start=1):
        figure.update_yaxes(title_text=METRICS[metric].unit or METRICS[metric].label, row=panel)
    figure.update_xaxes(zeroline=False)
    ticks = ["unedited" if rho == 1 else f"{rho:g}" for rho in order]
    figure.update_xaxes(tickvals=list(range(len(order))), ticktext=ticks)
    figure.update_xaxes(
        title_text=f"share kept by {method}, stronger edits right", row=len(metrics)
    )
    if rho is not None:
        figure.add_vline(x=order.index(rho), line={"dash": "dash", "color": GREY})
    return figure.update_layout(legend={"groupclick": "toggleitem", "tracegroupgap": 30})


def plot_staircase(table: pd.DataFrame, *, block: int, role: str, title: str = "") -> go.Figure:
    """Which components of one layer the K-FAC edit keeps, for several shares of mass.

    A component is a pair of an input and an output direction, each ranked by eigenvalue, the
    sharpest first; below and left of a line all are kept, beyond it all removed. Both axes are
    logarithmic: on even axes the kept corner would hardly be seen.

    Args:
        table: Holds rows of ``kept_inputs``, as ``probe_curvature`` gives them.
        block, role: The layer.

    Raises:
        InputError: No rows of ``kept_inputs`` for the layer.
    """
    table = rows_of(validate(table), "kept_inputs", "plot_staircase")
    there = table[["block", "role"]].drop_duplicates()
    table = table[(table["block"] == block) & (table["role"] == role)]
    if table.empty:
        told = ", ".join(f"{row.role} of {row.block:g}" for row in there.itertuples())
        raise InputError(f"plot_staircase: no rows of {role} of block {block}; there are {told}")
    figure = go.Figure()
    whole = table[table["rho"] == 1]
    wide, high = whole["value"].max(), whole["output"].max()
    for index, (rho, line) in enumerate(table[table["rho"] < 1].groupby("rho", observed=True)):
        line = line[line["value"] > 0].sort_values("output")
        # on from the last output direction that keeps any, so that the corner closes
        figure.add_trace(
            go.Scatter(
                x=[*line["value"], 1],
                y=[*line["output"], line["output"].max()],
                name=f"{rho:.0%} of the mass",
                mode="lines",
                line={"color": colour(index), "width": 2},
                hovertemplate="output direction %{y} keeps %{x} input directions<extra>"
                f"{rho:.0%} of the mass</extra>",
            )
        )
    frame = {"color": GREY, "dash": "dot", "width": 1.5}
    figure.add_trace(
        go.Scatter(
            x=[wide, wide, 1], y=[1, high, high], mode="lines", line=frame, name="the whole layer",
            hoverinfo="skip",
        )
    )  # fmt: skip
    styled(
        figure,
        title=title or f"Components kept, {role} of block {block}",
        x="input direction, rank by eigenvalue of A",
        y="output direction, rank by eigenvalue of G",
        height=HEIGHT + 60,
    )
    return figure.update_xaxes(type="log", dtick=1).update_yaxes(type="log", dtick=1)


def plot_falls(
    falls: pd.DataFrame,
    *,
    x: str = "dose",
    method: str = "kfac",
    measure: str = "fall_price",
    color: str = "kind",
    title: str = "",
) -> go.Figure:
    """At what price each text's recitation ends, against something known of the text.

    A point lies at the first edit that stops the recitation, and the line below it reaches down to
    the last that did not (to the foot of the figure where that costs nothing: prices have a
    logarithmic axis). An open triangle was recited to the end. Pooled rows with ``x``, as
    ``fall_curve`` gives them, are drawn as black bars: where half are lost, and its interval (to the top of the points where
    it has no end).

    Args:
        falls: What ``item_falls`` gives, with ``x`` as a column; medians may be among the rows.
        x: A column of numbers: ``dose``, ``margin``, a causal score joined by item.
        color: A column of the items.

    Raises:
        InputError: No falls by the method, or a missing column.
    """
    falls = validate(falls)
    has_columns("plot_falls", {"falls": falls}, (x, color, "event", "method"))
    falls = rows_of(falls[falls["method"] == method], measure, "plot_falls")
    falls, medians = falls[falls["item"] != "all"], falls[falls["item"] == "all"]
    price = measure == "fall_price"
    # an edit may cost nothing, and a logarithmic axis has no 0
    foot = falls.loc[falls["value"] > 0, "value"].min() / 2 if price else 0.0
    falls = falls.assign(value=falls["value"].clip(lower=foot), lo=falls["lo"].clip(lower=foot))
    figure = go.Figure()
    doubling = x in ("dose", "copies")
    names = sorted(falls[color].astype(str).unique())
    for index, name in enumerate(names):
        part = falls[falls[color].astype(str) == name].sort_values(x)
        place = part[x].to_numpy(dtype=float)
        if doubling:  # items of one dose side by side; on a logarithmic axis a factor
            place = place * 1.12 ** (index - (len(names) - 1) / 2)
            again = part.groupby(x).cumcount().to_numpy()
            place = place * 1.02**again
        kept = (part["event"] == "kept").to_numpy()
        symbols = ["triangle-up-open" if each else MARKERS[index % len(MARKERS)] for each in kept]
        below = (part["value"] - part["lo"]).where(~kept, 0.0)
        figure.add_trace(
            go.Scatter(
                x=place.round(6),
                y=part["value"].round(6),
                error_y={"type": "data", "symmetric": False, "array": [0] * len(part),
                         "arrayminus": below.round(6), "thickness": 1, "width": 0,
                         "color": see_through(colour(index), 0.5)},
                name=shown(color, name),
                mode="markers",
                marker={"color": colour(index), "size": 9, "symbol": symbols},
                customdata=part[["item", x, "lo", "returned"]].astype(str),
                hovertemplate="%{customdata[0]} (" + x + " %{customdata[1]}): falls between "
                "%{customdata[2]} and %{y:.4f}, came back under %{customdata[3]} stronger edits"
                "<extra></extra>",
            )
        )  # fmt: skip
    medians = medians[medians[x].notna() & medians["value"].notna()]
    if len(medians):
        medians = medians.assign(hi=medians["hi"].clip(upper=falls["value"].max()))
        figure.add_trace(
            go.Scatter(
                x=medians[x], y=medians["value"].round(6), mode="markers", name="half are lost",
                error_y=whiskers(medians) | {"color": "#000000"},
                marker={"symbol": "line-ew", "size": 26, "line": {"width": 3, "color": "#000000"}},
            )
        )  # fmt: skip
    label = AXES.get(x, METRICS[x].axis if x in METRICS else x)
    styled(figure, title=title, x=label, y=METRICS[measure].axis, height=HEIGHT + 60)
    figure.update_yaxes(tickformat=".2~%", type="log" if price else "linear", zeroline=False)
    if price:
        figure.update_yaxes(tickvals=[at for at in TICKS if at >= foot / 2], minor={"ticks": ""})
    if doubling:
        ticks = sorted(falls[x].dropna().unique())
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure


def plot_layer_choice(chosen: pd.DataFrame, *, title: str = "") -> go.Figure:
    """What editing each set of layers leaves of the recitation, on both halves of the items.

    Args:
        chosen: What ``choose_layers`` gives.

    Raises:
        InputError: No column ``half``.
    """
    chosen = validate(chosen)
    has_columns("plot_layer_choice", {"rows": chosen}, ("layers", "half", "chosen", "price"))
    drawn = chosen[chosen["metric"] != "difference"]
    figure = go.Figure()
    for index, half in enumerate(("choosing", "reporting")):
        part = drawn[drawn["half"] == half]
        names = [
            f"<b>{html.escape(str(name))}</b>" if picked == "yes" else html.escape(str(name))
            for name, picked in zip(part["layers"], part["chosen"], strict=True)
        ]
        figure.add_trace(
            go.Bar(
                x=names,
                y=part["value"].round(6),
                error_y=whiskers(part),
                name=f"{half} half",
                marker={"color": colour(index)},
                customdata=part[["price", "n"]].round(4),
                hovertemplate="%{y:.3f} of %{customdata[1]} items, perplexity x %{customdata[0]}"
                "<extra>" + half + "</extra>",
            )
        )
    metric = METRICS[str(drawn["metric"].iloc[0])]
    styled(figure, title=title, x="layers edited, chosen ones bold", y=metric.axis)
    return figure.update_yaxes(range=[0, 1.04])


def plot_band_ratio(table: pd.DataFrame, *, group: str | None = None, title: str = "") -> go.Figure:
    """Activation energy of memorized over clean items, by band; one panel per input, colour block.

    Args:
        table: Holds rows of ``band_ratio``, as ``probe_curvature`` gives them.
        group: Of the memorized items, where there are several.

    Raises:
        InputError: No rows of ``band_ratio``, or several groups.
    """
    table = rows_of(validate(table), "band_ratio", "plot_band_ratio")
    table = _one_group(table, group, "plot_band_ratio")
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
                error_y=whiskers(line),
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
