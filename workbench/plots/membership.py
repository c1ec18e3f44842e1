"""Telling members from others: areas with their intervals, and ROC curves."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.style import (
    GREY,
    band,
    colour,
    has_columns,
    rows_of,
    see_through,
    shown,
    styled,
    whiskers,
)
from workbench.table import METRICS, InputError, validate

FLOOR = 1e-3  # rates below are drawn at the edge of a logarithmic axis


def plot_auc(table: pd.DataFrame, *, panel: str = "kind", title: str = "") -> go.Figure:
    """AUC of each attack as a point with its interval, a panel a kind of text.

    The thick bar is ``lo`` to ``hi`` (DeLong), the thin grey one below it the bootstrap's where
    there is one; the dotted line is chance. A score that sees no model (``member_blind``) is drawn
    hollow, with its interval as a zone over all rows: an attack inside it shows no more than the
    words alone.

    Args:
        table: Rows "auc" of ``membership_auc`` and ``blind_baseline``; others are left out.
        panel: A coordinate; where the table has it not, there is one panel.

    Raises:
        InputError: No rows of auc, or several per (panel, score).
    """
    rows = rows_of(validate(table), "auc", "plot_auc")
    has_columns("plot_auc", {"rows": rows}, ("score",))
    rows = rows.assign(**{panel: rows[panel].astype(str) if panel in rows.columns else ""})
    if rows.duplicated([panel, "score"]).any():
        raise InputError(f"plot_auc: several rows per ({panel}, score); select one step or dose")
    panels, scores = (list(dict.fromkeys(rows[name].astype(str))) for name in (panel, "score"))
    figure = make_subplots(
        1, len(panels), subplot_titles=[shown(panel, p) for p in panels], shared_yaxes=True,
        horizontal_spacing=0.03,
    )  # fmt: skip
    for index, told in enumerate(panels):
        place = {"row": 1, "col": index + 1}
        for score in scores:
            row = rows[(rows[panel] == told) & (rows["score"] == score)]
            if row.empty:
                continue
            blind = METRICS[score].better == ""
            if blind and row["lo"].notna().all():
                figure.add_vrect(
                    float(row["lo"].iloc[0]), float(row["hi"].iloc[0]),
                    fillcolor=see_through(GREY, 0.2), line_width=0, layer="below", **place,
                )  # fmt: skip
            figure.add_traces(
                _area_point(row, METRICS[score].label, "#000000" if blind else colour(0), blind),
                rows=1,
                cols=index + 1,
            )
        figure.add_vline(0.5, line={"dash": "dot", "color": GREY}, **place)
        figure.update_xaxes(title_text="membership AUC", range=[-0.02, 1.02], **place)
    figure.update_yaxes(autorange="reversed", automargin=True)
    styled(figure, title=title or "Telling members from others", x="membership AUC", y="")
    return figure.update_layout(showlegend=False, height=max(260, 110 + 34 * len(scores)))


def _area_point(row: pd.DataFrame, label: str, shade: str, blind: bool) -> list[go.Scatter]:
    traces = []
    if "lo_bootstrap" in row.columns and row["lo_bootstrap"].notna().all():
        edges = row[["lo_bootstrap", "hi_bootstrap"]].to_numpy().round(6)[0]
        second = {"color": GREY, "width": 9}
        traces.append(
            go.Scatter(x=edges, y=[label] * 2, mode="lines", line=second, opacity=0.45, hoverinfo="skip")
        )  # fmt: skip
    point = go.Scatter(
        x=row["value"].round(6),
        y=[label],
        mode="markers",
        marker={"color": shade, "size": 9, "symbol": "circle-open" if blind else "circle"},
        error_x=whiskers(row) | {"thickness": 2},
        customdata=row[["lo", "hi", "n"]].round(4),
        hovertemplate="%{x:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], n=%{customdata[2]}"
        "<extra>" + label + "</extra>",
    )
    return [*traces, point]


def plot_roc(table: pd.DataFrame, *, color: str = "score", title: str = "") -> go.Figure:
    """ROC curves with their bands, on linear axes and, for small rates, on logarithmic ones.

    The dotted diagonal is chance. The grey zone holds false positive rates that so few others
    cannot show: what a curve says there is its value at no false positive. Rates of 0 have no place
    on the logarithmic axes.

    Args:
        table: What ``roc_curve`` gives, of one comparison.
        color: The coordinate that tells curves apart.

    Raises:
        InputError: No such rows, or several per (color, fpr).
    """
    rows = rows_of(validate(table), "tpr_at_fpr", "plot_roc")
    has_columns("plot_roc", {"rows": rows}, (color, "fpr", "resolution"))
    rows = rows[rows["value"].notna()]
    if rows.empty:
        raise InputError("plot_roc: no curve has values; the reason column says why")
    if rows.duplicated([color, "fpr"]).any():
        raise InputError(
            f"plot_roc: several rows per ({color}, fpr); select one run, step and kind"
        )
    figure = make_subplots(
        1, 2, subplot_titles=["all rates", "small rates"], horizontal_spacing=0.1
    )
    resolution = float(rows["resolution"].max())
    left = 10 ** np.floor(np.log10(resolution / 2))
    ends = {1: [0.0, 1.0], 2: [left, 1.0]}
    for index, (name, line) in enumerate(rows.groupby(color, sort=False, observed=True)):
        told = METRICS[name].label if name in METRICS else shown(color, name)
        # the value at no false positive holds for all rates that cannot be shown
        small = line.assign(fpr=line["fpr"].clip(lower=left))
        for col, part in ((1, line), (2, small)):
            steps = _steps(part)
            if col == 2:
                steps = steps.assign(**{n: steps[n].clip(lower=FLOOR) for n in ("lo", "hi")})
                steps = steps[(steps["value"] > 0) | steps["lo"].isna()]
            figure.add_traces(band(steps, "fpr", colour(index), told), rows=1, cols=col)
            figure.add_trace(
                go.Scatter(
                    x=steps["fpr"].round(6), y=steps["value"].round(6), name=told,
                    legendgroup=told, showlegend=col == 1, mode="lines",
                    line={"color": colour(index), "dash": DASHES[index % len(DASHES)]},
                ),
                row=1, col=col,
            )  # fmt: skip
    for col, x in ends.items():
        figure.add_trace(
            go.Scatter(x=x, y=x, mode="lines", name="chance", showlegend=col == 1,
                       line={"color": GREY, "dash": "dot"}),
            row=1, col=col,
        )  # fmt: skip
        figure.add_vrect(
            x[0], resolution, fillcolor=see_through(GREY, 0.25), line_width=0, layer="below",
            row=1, col=col,
        )  # fmt: skip
    styled(figure, title=title or "Members found, by others taken for members", x="", y="")
    figure.update_xaxes(title_text="false positive rate [share of others]")
    figure.update_yaxes(title_text="true positive rate [share of members]", col=1)
    figure.update_xaxes(type="log", range=[np.log10(left), 0], dtick=1, row=1, col=2)
    return figure.update_yaxes(type="log", dtick=1, row=1, col=2)


DASHES = ("solid", "dash", "dashdot", "longdash", "dot")


def _steps(line: pd.DataFrame) -> pd.DataFrame:
    """The corners of a step function, so that the curve and its band have them alike."""
    line = line.sort_values("fpr").assign(corner=np.arange(0, 2 * len(line), 2))
    onward = line.assign(fpr=line["fpr"].shift(-1), corner=line["corner"] + 1).dropna(subset="fpr")
    return pd.concat([line, onward]).sort_values("corner")
