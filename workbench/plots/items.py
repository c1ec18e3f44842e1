"""Single texts along a run: when each was known, and how memory depends on two clocks."""

from __future__ import annotations

import html
import textwrap

import pandas as pd
import plotly.graph_objects as go

from workbench.plots.style import (
    COLOURS,
    GREY,
    HEIGHT,
    colour,
    has_columns,
    see_through,
    styled,
    two_lines,
)
from workbench.table import InputError, one_metric, validate

MOST_LINES = 60  # of them can be read below one another
MARKS = {"learned": "triangle-up", "lost": "x", "relearned": "diamond", "kept": "circle"}
TICKS = 0.36  # of a row, below its line
TEXT_WIDTH = 70  # characters in a line of the text shown under the pointer


def plot_life_lines(
    events: pd.DataFrame,
    *,
    items: pd.DataFrame | None = None,
    exposures: pd.DataFrame | None = None,
    color: str = "kind",
    title: str = "",
) -> go.Figure:
    """One line a text: drawn thick while the model knows it, ticks where it was trained on.

    A thin line leads from the last checkpoint that knew a text to the one that did not; between
    checkpoints more may have happened.

    Args:
        events: What ``life_events`` gives, of one run and at most 60 items.
        items: Items frame, whose texts are shown under the pointer.
        exposures: Ledger with ``update`` and ``item``; items not drawn are left out.
        color: The coordinate that colours the lines.

    Raises:
        InputError: No events, several runs, too many items, or a missing column.
    """
    events = validate(events)
    has_columns("plot_life_lines", {"events": events}, ("event", "number", color))
    names = _ordered_items(events)
    told = {} if items is None else dict(zip(items["item"].astype(str), items["text"], strict=True))
    text = {name: _wrapped(told.get(name, name)) for name in names}
    row = {name: place for place, name in enumerate(names)}
    figure = go.Figure()
    if exposures is not None:
        has_columns("plot_life_lines", {"exposures": exposures}, ("update", "item"))
        met = exposures[exposures["item"].astype(str).isin(row)]
        met = met.drop_duplicates(["update", "item"])  # a batch may hold a text several times
        ticks = go.Scatter(
            # floats also where none is left, for an empty column of text adds no number
            x=met["update"], y=met["item"].astype(str).map(row).astype(float) + TICKS, mode="markers",
            name="trained on",
            marker={"symbol": "line-ns-open", "size": 5, "color": GREY, "line": {"width": 1}},
            hovertemplate="trained on at %{x}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(ticks)
    for index, (value, part) in enumerate(events.groupby(color, observed=True, sort=True)):
        figure.add_traces(_lines(part, row, colour(index), html.escape(str(value))))
    for event, symbol in MARKS.items():
        some = events[events["event"] == event]
        if some.empty:
            continue
        item = some["item"].astype(str)
        marks = go.Scatter(
            x=some["value"], y=item.map(row), mode="markers", name=event,
            marker={"symbol": symbol, "size": 8, "color": "#000000"},
            customdata=pd.DataFrame({"item": item.map(html.escape), "text": item.map(text)}),
            hovertemplate="%{customdata[0]}: " + event + " by %{x}<br>%{customdata[1]}"
            "<extra></extra>",
        )  # fmt: skip
        figure.add_trace(marks)
    styled(
        figure,
        title=title or "When each text was known",
        x="checkpoint [updates]",
        y="",
        height=max(HEIGHT, 24 * len(names) + 170),
    )
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=[html.escape(name) for name in names],
        range=[len(names) - 0.4, -0.6], showgrid=False, zeroline=False, automargin=True,
    )  # fmt: skip
    return figure


def _ordered_items(events: pd.DataFrame) -> list[str]:
    """Items by when they were first known, those never known last."""
    if events.empty or events["run"].nunique() != 1:
        held = ", ".join(events["run"].astype(str).unique()) or "none"
        raise InputError(f"plot_life_lines: needs events of one run, got {held}; select one")
    first = events[events["number"] == 1].assign(item=lambda t: t["item"].astype(str))
    if len(first) > MOST_LINES:
        raise InputError(
            f"plot_life_lines: {len(first)} items, {MOST_LINES} can be read; select some"
        )
    return first.sort_values(["value", "item"], na_position="last")["item"].tolist()


def _lines(part: pd.DataFrame, row: dict, shade: str, name: str) -> list[go.Scatter]:
    """Thick where known, thin where it was last known to where it was found lost."""
    known: tuple[list, list] = ([], [])
    unsure: tuple[list, list] = ([], [])
    for item, life in part.groupby("item", observed=True, sort=False):
        life = life.sort_values("number")
        place = row[str(item)]
        begun = None
        for event, at, before in zip(life["event"], life["value"], life["lo"], strict=True):
            if event in ("learned", "relearned"):
                begun = at
                continue
            if event == "never":
                continue
            until = at if event == "kept" else before
            _gap(known, (begun, until), place)
            if event == "lost":
                _gap(unsure, (before, at), place)
    common = {"mode": "lines", "legendgroup": name, "hoverinfo": "skip"}
    thick = {"width": 6, "color": see_through(shade, 0.65)}
    return [
        go.Scatter(x=known[0], y=known[1], name=name, line=thick, **common),
        go.Scatter(
            x=unsure[0], y=unsure[1], name=name, showlegend=False,
            line={"width": 1, "color": shade}, **common,
        ),
    ]  # fmt: skip


def _gap(line: tuple[list, list], ends: tuple, place: int) -> None:
    """Add a piece to a line that is interrupted between its pieces."""
    line[0].extend([*ends, None])
    line[1].extend([place, place, None])


def _wrapped(text: str) -> str:
    return "<br>".join(html.escape(part) for part in textwrap.wrap(text, TEXT_WIDTH))


def plot_two_clocks(
    table: pd.DataFrame, *, learned: str = "cohort", tested: str = "step", title: str = ""
) -> go.Figure:
    """Heat map of memory by when a text was trained on, down, and when it was tested, across.

    A black edge stands before the first checkpoint that could know of the row. Checkpoints are
    evenly spaced, whatever lies between them. Read along a row a memory fades; read down a
    column, the last learned is known best.

    Args:
        table: Pooled rows of one metric by ``learned`` and ``tested``; rows without ``learned``
            (texts never trained on) make a row of their own, below.

    Raises:
        InputError: Several metrics, a missing column, or several rows per (learned, tested).
    """
    table = validate(table)
    metric = one_metric(table, "plot_two_clocks")
    has_columns("plot_two_clocks", {"rows": table}, (learned, tested))
    if table.duplicated([learned, tested]).any():
        raise InputError(
            f"plot_two_clocks: several rows per ({learned}, {tested}); summarise first"
        )
    across = sorted(table[tested].unique())
    down = sorted(table[learned].dropna().unique())
    down += [float("nan")] * bool(table[learned].isna().any())
    cells, counts, names = [], [], []
    for value in down:
        part = table[table[learned].isna() if value != value else table[learned] == value]
        part = part.set_index(tested).reindex(across)
        cells.append(part["value"].round(6).tolist())
        name = "never" if value != value else f"{value:g}"
        bounds = zip(part["lo"].round(4), part["hi"].round(4), part["n"], strict=True)
        counts.append([[name, at, *each] for at, each in zip(across, bounds, strict=True)])
        names.append(f"{name} (n={part['n'].max():g})")
    figure = go.Figure(
        go.Heatmap(
            z=cells, customdata=counts, xgap=1, ygap=1,
            zmin=metric.low if metric.high is not None and metric.low is not None else None,
            zmax=metric.high if metric.high is not None and metric.low is not None else None,
            colorscale=[(0, "#EDF1F4"), (0.5, "#56B4E9"), (1, COLOURS[0])],
            colorbar={"title": {"text": two_lines(metric), "side": "right"}},
            hovertemplate="trained on by %{customdata[0]}, tested at %{customdata[1]}: %{z:.3f} "
            "[%{customdata[2]}, %{customdata[3]}], n=%{customdata[4]}<extra></extra>",
        )
    )  # fmt: skip
    for place, value in enumerate(down):
        if value == value:
            edge = sum(at < value for at in across) - 0.5
            figure.add_shape(
                type="line", x0=edge, x1=edge, y0=place - 0.5, y1=place + 0.5, line={"width": 2}
            )
    styled(
        figure,
        title=title or f"Two clocks: {metric.label}",
        x="tested at checkpoint [updates]",
        y=f"trained on: {learned} [update]",
        height=max(320, 34 * len(down) + 190),
    )
    every = -(-len(across) // 24)  # labels stand upright, about 24 fit
    figure.update_xaxes(
        tickvals=list(range(0, len(across), every)),
        ticktext=[f"{at:g}" for at in across[::every]],
        tickangle=-90,
        showgrid=False,
    )
    figure.update_yaxes(
        tickvals=list(range(len(down))), ticktext=names, autorange="reversed",
        showgrid=False, zeroline=False, automargin=True,
    )  # fmt: skip
    return figure
