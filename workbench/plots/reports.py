"""Several reports side by side."""

from __future__ import annotations

import html
import math

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.style import GREY, MARKERS, colour, has_columns, styled, whiskers
from workbench.table import METRICS, InputError

ACROSS = 3  # panels side by side
MOST = 12  # panels that a page can show
LINE = 26  # px a report takes
LABEL = 30  # characters of a line of a panel's title


def plot_key_numbers(numbers: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Key numbers of several reports: a panel a number, a point with its interval a report.

    Args:
        numbers: A row a number of a report: ``report, label, value, lo, hi, n, unit, metric``, as
            ``report_numbers`` gives them. Undefined ones have no point.

    Raises:
        InputError: A column is lacking, no number, one given twice, or more than a page can show.
    """
    has_columns(
        "plot_key_numbers",
        {"the numbers": numbers},
        ["report", "label", "value", "lo", "hi", "n", "unit", "metric"],
    )
    labels, reports = list(numbers["label"].unique()), list(numbers["report"].unique())
    if not 0 < len(labels) <= MOST:
        raise InputError(
            f"plot_key_numbers: {len(labels)} key numbers, a page shows 1 to {MOST}; select some"
        )
    if numbers.duplicated(["report", "label"]).any():
        raise InputError("plot_key_numbers: a report has one key number twice; select one")
    across = min(ACROSS, len(labels))
    down = math.ceil(len(labels) / across)
    panel = 30 + LINE * len(reports)
    height = 130 + down * panel + (down - 1) * 90
    figure = make_subplots(
        rows=down, cols=across, shared_yaxes=True, horizontal_spacing=0.04,
        vertical_spacing=0 if down == 1 else 90 / (height - 130),
        subplot_titles=["<br>".join(_wrapped(label)) for label in labels],
    )  # fmt: skip
    names = [html.escape(report) for report in reports]
    styled(figure, title=title, x="", y="", height=height)
    for index, label in enumerate(labels):
        place = {"row": index // across + 1, "col": index % across + 1}
        for nth, report in enumerate(reports):
            part = numbers[(numbers["label"] == label) & (numbers["report"] == report)]
            bars = whiskers(part)
            figure.add_trace(
                go.Scatter(
                    x=part["value"].round(6),
                    y=[names[nth]] * len(part),
                    name=names[nth],
                    showlegend=False,
                    mode="markers",
                    marker={
                        "color": colour(nth),
                        "symbol": MARKERS[nth % len(MARKERS)],
                        "size": 9,
                    },
                    error_x=bars,
                    customdata=part[["n"]],
                    hovertemplate="%{x:.4g} (n=%{customdata[0]})<extra>%{fullData.name}</extra>",
                ),
                **place,
            )
        rows = numbers[numbers["label"] == label]
        metric = METRICS.get(str(rows["metric"].iloc[0]))
        figure.update_xaxes(title_text=str(rows["unit"].iloc[0]), **place)
        if metric is not None and metric.low == 0 and metric.high == 1:
            figure.update_xaxes(range=[-0.04, 1.04], **place)
        if metric is not None and metric.chance is not None:
            figure.add_vline(x=metric.chance, line={"dash": "dot", "color": GREY}, **place)
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=names[::-1], automargin=True,
        range=[-0.6, len(names) - 0.4],
    )  # fmt: skip
    figure.update_annotations(font_size=12)
    return figure.update_layout(margin={"t": 100})


def _wrapped(label: str) -> list[str]:
    """Lines of a title that fit above a panel."""
    lines = [""]
    for word in label.split():
        if lines[-1] and len(lines[-1]) + len(word) >= LABEL:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [html.escape(line) for line in lines]
