"""Savings in relearning beside recall and recognition, over the lag since study."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from workbench.plots.style import COLOURS, GREY, MARKERS, band, lag_ticks, styled
from workbench.table import METRICS, InputError, validate

NET = "net of controls"


def plot_savings(
    savings: pd.DataFrame,
    retention: pd.DataFrame,
    *,
    beside: Sequence[tuple[str, str]] = (("recall_token", "itself"), ("recognition", "unrelated")),
    title: str = "",
) -> go.Figure:
    """Savings, recall and recognition against lag, each as what is left of it with drift out.

    Args:
        savings: What ``savings_curve`` gives; its net ``savings`` are drawn.
        retention: What ``retention_curve`` gives for the same experiment; its rows of
            ``retention`` are drawn.
        beside: The (measure, foil) of ``retention`` that are shown. One whose first gain is not
            told from 0 has no share and no line.

    Raises:
        InputError: No such rows, rows of single items, or several per line and lag.
    """
    net = validate(savings)
    net = net[(net["metric"] == "savings") & (net["group"] == NET)]
    if net.empty:
        raise InputError("plot_savings: no net savings; give what savings_curve returns")
    kept = validate(retention)
    kept = kept[kept["metric"] == "retention"]
    if kept.empty:
        raise InputError("plot_savings: no rows of retention; give what retention_curve returns")
    lines = {"savings": net}
    for measure, foil in beside:
        part = kept[(kept["of"] == measure) & (kept["foil"] == foil) & kept["value"].notna()]
        if len(part):
            told = METRICS[measure].label + ("" if foil == "itself" else f", against {foil} texts")
            lines[told] = part
    figure = go.Figure()
    for index, (name, line) in enumerate(lines.items()):
        if line["lag"].duplicated().any():
            raise InputError(f"plot_savings: several rows per lag of {name}; select one of them")
        line = line[line["value"].notna()].sort_values("lag")
        line = line.assign(x=line["lag"] + 1)  # so that lag 0 has a place on a logarithmic axis
        figure.add_traces(band(line, "x", COLOURS[index], name))
        figure.add_trace(
            go.Scatter(
                x=line["x"],
                y=line["value"].round(6),
                name=name,
                legendgroup=name,
                mode="lines+markers",
                line={"color": COLOURS[index]},
                marker={"symbol": MARKERS[index], "size": 7},
                customdata=line[["lag", "lo", "hi", "n"]].round(4),
                hovertemplate=(
                    "lag %{customdata[0]}: %{y:.3f} [%{customdata[1]:.3f}, %{customdata[2]:.3f}], "
                    "n=%{customdata[3]}<extra>" + name + "</extra>"
                ),
            )
        )
    heading = title or "What relearning saves, beside what is said and what is recognised"
    styled(
        figure, title=heading, x="updates since the study ended", y="share left, net of controls"
    )
    figure.add_hline(y=0, line={"dash": "dot", "color": GREY, "width": 1})
    figure.update_layout(legend={"orientation": "h", "y": -0.22, "x": 0})
    return figure.update_xaxes(**lag_ticks(pd.concat([line["lag"] for line in lines.values()])))
