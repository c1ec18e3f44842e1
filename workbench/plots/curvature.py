"""Spectra of curvature, and what editing them does."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.style import (
    GREY,
    HEIGHT,
    MARKERS,
    colour,
    rows_of,
    see_through,
    styled,
    whiskers,
)
from workbench.table import METRICS, InputError, validate


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
    drawn = rows_of(table, metric, "plot_edit_sweep")
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


def plot_band_ratio(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Activation energy of memorized over clean items, by band; one panel per input, colour block.

    Args:
        table: Holds rows of ``band_ratio``, as ``probe_curvature`` gives them.

    Raises:
        InputError: No rows of ``band_ratio``.
    """
    table = rows_of(validate(table), "band_ratio", "plot_band_ratio")
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
