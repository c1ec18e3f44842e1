"""How far estimates lie from a known truth, and how often their intervals hold it."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.style import (
    AXES,
    GREY,
    MARKERS,
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


def plot_coverage(
    table: pd.DataFrame,
    *,
    x: str = "lag",
    color: str = "kind",
    level: float = 0.95,
    title: str = "",
) -> go.Figure:
    """Bias above, coverage below, each with its interval over trainings; dotted: what is right.

    Args:
        table: Rows of "bias" and "coverage", as ``calibration`` gives them.
        x: "lag" or "dose", drawn on a logarithmic axis.
        level: Nominal level of the intervals whose coverage is shown.

    Raises:
        InputError: A metric or column is missing, or several rows per (x, color).
    """
    table = validate(table)
    has_columns("plot_coverage", {"the rows": table}, [x, color])
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    names = list(table[color].unique())
    for row, (metric, right) in enumerate((("bias", 0.0), ("coverage", level)), start=1):
        part = rows_of(table, metric, "plot_coverage")
        if part.duplicated([x, color]).any():
            raise InputError(f"plot_coverage: several rows per ({x}, {color}) of {metric}")
        for index, name in enumerate(names):
            line = part[part[color] == name].sort_values(x)
            # side by side, so that whiskers of one place do not cover each other
            aside = (1 + 0.05 * (index - (len(names) - 1) / 2)) * (line[x] + (x == "lag"))
            figure.add_trace(
                go.Scatter(
                    x=aside,
                    y=line["value"].round(6),
                    error_y=whiskers(line),
                    name=shown(color, name),
                    legendgroup=str(name),
                    showlegend=row == 1,
                    mode="lines+markers",
                    line={"color": colour(index)},
                    marker={"symbol": MARKERS[index % len(MARKERS)], "size": 7},
                    customdata=line[[x, "n"]],
                    hovertemplate="%{customdata[0]:g}: %{y:.3g} (n=%{customdata[1]})<extra></extra>",
                ),
                row=row,
                col=1,
            )
        figure.add_hline(y=right, line={"dash": "dot", "color": GREY}, row=row, col=1)
        figure.update_yaxes(title_text=two_lines(METRICS[metric]), row=row, col=1)
    styled(figure, title=title, x="", y="", height=560)
    ticks = lag_ticks(table[x])
    if x != "lag":
        places = sorted(table[x].unique())
        ticks |= {"tickvals": places, "ticktext": [f"{place:g}" for place in places]}
    figure.update_xaxes(**ticks)
    for row, metric in enumerate(("bias", "coverage"), start=1):
        figure.update_yaxes(title_text=two_lines(METRICS[metric]), row=row, col=1)
    figure.update_xaxes(title_text="", row=1, col=1)
    return figure.update_xaxes(title_text=AXES.get(x, x), row=2, col=1)
