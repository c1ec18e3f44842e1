"""How alike two decompositions of the loss curvature are, and the edits that follow from them."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.style import (
    GREY,
    HEIGHT,
    MARKERS,
    band,
    colour,
    rows_of,
    shown,
    styled,
    two_lines,
    whiskers,
)
from workbench.table import METRICS, validate

SIDES = {"input": "of A, the inputs", "output": "of G, the output gradients"}
COMPARED = ("edit_cosine", "edit_shared", "verdict_agreement")


def plot_principal_angles(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Principal angles of leading eigenspaces, pooled over layers: one panel for A and one for G.

    One line a setting, coloured by what was varied; a line along the bottom is the same subspace.
    Grey is what random subspaces of the same sizes give.

    Args:
        table: Holds rows of ``principal_angle``, as ``probe_stability`` gives them.

    Raises:
        InputError: No rows of ``principal_angle``.
    """
    table = rows_of(validate(table), "principal_angle", "plot_principal_angles")
    table = table[table["role"] == "all"].astype({"varied": str, "setting": str, "side": str})
    kinds = [kind for kind in table["varied"].unique() if kind != "none"]
    figure = make_subplots(cols=2, shared_yaxes=True, subplot_titles=list(SIDES.values()))
    for (group, varied, setting, side), line in table.groupby(
        ["group", "varied", "setting", "side"], sort=False, observed=True
    ):
        line, by_chance = line.sort_values("place"), group == "chance"
        number = list(table.loc[table["varied"] == varied, "setting"].unique()).index(setting)
        shade = GREY if by_chance else colour(kinds.index(varied))
        where = {"row": 1, "col": list(SIDES).index(side) + 1}
        for area in band(line, "place", GREY, "chance") if by_chance else []:
            figure.add_trace(area, **where)
        name = shown("setting", setting)
        figure.add_trace(
            go.Scatter(
                x=line["place"].round(4),
                y=line["value"].round(4),
                name=name,
                legendgroup=varied,
                showlegend=side == "input",
                mode="lines" if by_chance else "lines+markers",
                line={"color": shade, "width": 1.5, "dash": "dash" if by_chance else "solid"},
                marker={"symbol": MARKERS[number % len(MARKERS)], "size": 6},
                hovertemplate="%{y:.1f} degrees<extra>" + name + "</extra>",
            ),
            **where,
        )
    x = "angles in order, smallest (0) to largest (1)"
    styled(figure, title=title, x=x, y=METRICS["principal_angle"].axis, height=HEIGHT + 60)
    figure.update_layout(legend={"groupclick": "toggleitem"})
    figure.update_xaxes(title_text=x)
    return figure.update_yaxes(range=[-2, 92], tickvals=[0, 15, 30, 45, 60, 75, 90])


def plot_edit_overlap(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """What two edits have in common, one line a setting: in the weights, and in what they do.

    Panels: cosine of the parts removed, share of the removed energy in common, items with the same
    verdict (whiskers: 95 % Wilson intervals). Coloured by ``rho``; grey strokes are chance.

    Args:
        table: Holds rows of ``edit_cosine``, ``edit_shared`` and ``verdict_agreement``, as
            ``probe_stability`` gives them.

    Raises:
        InputError: No rows of one of the three.
    """
    table = validate(table)
    parts = [rows_of(table, metric, "plot_edit_overlap") for metric in COMPARED]
    drawn = pd.concat([part[part["role"].isna() | (part["role"] == "all")] for part in parts])
    drawn = drawn.astype({"setting": str, "metric": str, "group": str})
    settings, shares = list(drawn["setting"].unique()), sorted(drawn["rho"].unique())
    panels = [two_lines(METRICS[metric]) for metric in COMPARED]
    figure = make_subplots(cols=3, shared_yaxes=True, subplot_titles=panels)
    for (metric, rho, group), part in drawn.groupby(["metric", "rho", "group"], observed=True):
        index, by_chance = shares.index(rho), group == "chance"
        # strengths stand below each other within a setting, so that none hides another
        offset = (index - (len(shares) - 1) / 2) * 0.6 / len(shares)
        place = [round(settings.index(each) + offset, 4) for each in part["setting"]]
        marker = {"color": colour(index), "symbol": MARKERS[index % len(MARKERS)], "size": 8}
        if by_chance:
            marker = {"color": GREY, "symbol": "line-ns-open", "size": 9, "line": {"width": 2}}
        first = metric == COMPARED[0] and (not by_chance or index == 0)
        name = "by chance" if by_chance else f"rho {rho:g}"
        figure.add_trace(
            go.Scatter(
                x=part["value"].round(6),
                y=place,
                error_x=None if by_chance else whiskers(part) | {"color": colour(index)},
                name=name,
                legendgroup=name,
                showlegend=first,
                mode="markers",
                marker=marker,
                hovertemplate="%{x:.3g}<extra>" + f"{name}, rho {rho:g}" + "</extra>",
            ),
            row=1,
            col=COMPARED.index(metric) + 1,
        )
    height = HEIGHT + 26 * len(settings)
    styled(figure, title=title, x="", y="", height=height).update_annotations(font_size=12)
    figure.update_layout(margin={"t": 100})
    figure.update_xaxes(range=[-0.03, 1.05], title_text="")
    ticks = {"tickvals": list(range(len(settings)))}
    names = [shown("setting", each) for each in settings]
    figure.update_yaxes(range=[len(settings) - 0.4, -0.6], ticktext=names, **ticks)
    return figure
