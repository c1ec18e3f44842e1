"""What an edit leaves of each skill."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go

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

RECITED = "recitation_strict"


def plot_tasks(
    table: pd.DataFrame,
    *,
    metric: str = "accuracy",
    method: str = "kfac",
    x: str = "perplexity",
    title: str = "",
) -> go.Figure:
    """Accuracy of each task under edits of growing strength, with its chance, and recitation.

    Args:
        table: Pooled rows (``item="all"``) of ``probe_tasks`` with the coordinates ``method`` and
            ``rho``, and those of ``perplexity``, as ``probe_curvature`` gives them; where it holds
            ``recitation_strict`` that is drawn too, in grey.
        metric: ``accuracy``, ``accuracy_norm`` or ``exact_match``.
        method: Which edits; method ``none``, the model as it is, begins every line.
        x: ``perplexity`` of held-out text, or ``rho``, the share kept.

    Raises:
        InputError: An unknown ``x``, a method the table lacks, or rows missing.
    """
    if x not in ("perplexity", "rho"):
        raise InputError(f"plot_tasks: x is {x!r}; choose perplexity or rho")
    table = validate(table)
    if not {"method", "rho", "chance"} <= set(table.columns):
        raise InputError(
            "plot_tasks: the table needs the columns method, rho and chance: rows of probe_tasks "
            "under edits, as probe_curvature(..., also=...) gives them"
        )
    there = [name for name in table["method"].astype(str).unique() if name != "none"]
    if method not in there:
        raise InputError(
            f"plot_tasks: no method {method!r}; there are {', '.join(there) or 'none'}"
        )
    table = table[(table["item"] == "all") & table["method"].isin(["none", method])]
    price = rows_of(table, "perplexity", "plot_tasks")[["method", "rho", "value"]]
    price = price.rename(columns={"value": "perplexity"})
    drawn = rows_of(table, metric, "plot_tasks").merge(price, on=["method", "rho"])
    figure = go.Figure()
    recited = table[table["metric"] == RECITED].merge(price, on=["method", "rho"])
    if len(recited):
        figure.add_trace(_line(recited, x, "recitation", GREY, "circle-open", "dash"))
    for index, (task, line) in enumerate(drawn.groupby("group", sort=False, observed=True)):
        name = str(task).replace("_", " ")
        figure.add_trace(
            _line(line, x, name, colour(index), MARKERS[index % len(MARKERS)], "solid")
        )
        chance = line["chance"].iloc[0]
        if chance > 0:
            # as wide as the line itself, so that it can be told which is whose
            figure.add_trace(
                go.Scatter(
                    x=[line[x].min(), line[x].max()],
                    y=[chance, chance],
                    mode="lines",
                    line={"color": see_through(colour(index), 0.6), "dash": "dot", "width": 1},
                    legendgroup=name,
                    showlegend=False,
                    hovertemplate=f"chance {chance:.3g}<extra>{name}</extra>",
                )
            )
    label = "held-out perplexity [per token], log scale" if x == "perplexity" else "share kept"
    styled(
        figure, title=title, x=label, y=f"{METRICS[metric].axis}, chance dotted", height=HEIGHT + 60
    )
    if x == "perplexity":
        own = price.loc[price["method"] == "none", "perplexity"].iloc[0]
        figure.add_vline(x=own, line={"dash": "dot", "color": GREY})
        # beyond twice the model is ruined; a double click shows the rest
        end = min(2 * own, 1.02 * drawn["perplexity"].max())
        figure.update_xaxes(type="log", range=[math.log10(0.99 * own), math.log10(end)])
    else:
        figure.update_xaxes(autorange="reversed")
    return figure.update_yaxes(range=[-0.03, 1.03])


def _line(line: pd.DataFrame, x: str, name: str, shade: str, symbol: str, dash: str) -> go.Scatter:
    line = line.sort_values("rho", ascending=False)
    return go.Scatter(
        x=line[x].round(6),
        y=line["value"].round(6),
        error_y=whiskers(line) | {"color": see_through(shade, 0.35)},
        name=name,
        legendgroup=name,
        mode="lines+markers",
        line={"color": shade, "dash": dash},
        marker={"symbol": symbol, "size": 8},
        customdata=line[["rho", "perplexity"]].round(4),
        hovertemplate="%{y:.3g} at perplexity %{customdata[1]:.4g}, keeping %{customdata[0]:.4g}"
        f"<extra>{name}</extra>",
    )
