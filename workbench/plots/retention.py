"""Recognition, recall and retention over the lag since study."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.style import COLOURS, GREY, HEIGHT, MARKERS, band, colour, lag_ticks, styled
from workbench.table import METRICS, InputError, validate


def plot_recognition(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Recognition against lag, one panel per kind of foil: studied, controls, before study, 1/2.

    Args:
        table: What ``retention_curve`` gives; its rows of ``recognition`` are drawn.

    Raises:
        InputError: No such rows, or several per (foil, group, lag).
    """
    rows = _of_lag(table, ["recognition"], "plot_recognition")
    panels = {
        FOIL_TITLES.get(str(f), f"against {f}"): p for f, p in rows.groupby("foil", observed=True)
    }
    columns = min(3, len(panels))
    height = int(HEIGHT * (1.5 if len(panels) > columns else 1))
    figure = _lag_panels(panels, columns=columns, y=METRICS["recognition"].unit, height=height)
    figure.add_hline(y=0.5, line={"dash": "dot", "color": GREY, "width": 1})
    figure.update_yaxes(range=[-0.03, 1.03])
    return figure.update_layout(title_text=title or "Recognition of what was studied")


def plot_recall(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Recall of the second half against lag, one panel per score: studied, controls, before study.

    Args:
        table: What ``retention_curve`` gives; its rows of ``recall_*`` are drawn.

    Raises:
        InputError: No such rows, or several per (score, group, lag).
    """
    keys = [key for key in METRICS if key.startswith("recall_")]
    rows = _of_lag(table, keys, "plot_recall")
    panels = {
        METRICS[str(key)].label.removeprefix("recall: "): part
        for key, part in rows.groupby("metric", observed=True)
    }
    figure = _lag_panels(panels, columns=3, y="score", height=int(1.5 * HEIGHT))
    figure.update_yaxes(rangemode="tozero", matches="y")
    return figure.update_layout(title_text=title or "Recall of the second half, given the first")


def plot_retention(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Share of the first net gain that is left, against lag, one line per measure and foil.

    Args:
        table: What ``retention_curve`` gives; its rows of ``retention`` are drawn. Measures whose
            first gain is not told from 0 have no share and no line.

    Raises:
        InputError: No such rows, or several per (measure, foil, lag).
    """
    rows = _of_lag(table, ["retention"], "plot_retention")
    figure = go.Figure()
    lines = rows[rows["value"].notna()].groupby(["of", "foil"], observed=True, sort=False)
    for index, ((measure, foil), line) in enumerate(lines):
        name = METRICS[str(measure)].label + ("" if foil == "itself" else f", {foil}")
        figure.add_traces(_lag_line(line, name, colour(index), MARKERS[index % 8], "solid"))
    styled(figure, title=title or "Share of the gain that is left", x=LAG_AXIS, y="")
    figure.update_yaxes(title_text=METRICS["retention"].axis)
    figure.add_hline(y=0, line={"dash": "dot", "color": GREY, "width": 1})
    return figure.update_xaxes(**lag_ticks(rows["lag"]))


LAG_AXIS = "updates since the study ended"
FOIL_TITLES = {
    "unrelated": "against an unrelated text",
    "paraphrase": "against a paraphrase",
    "synonym": "against one word swapped",
    "random": "against random words",
    "letters": "against shuffled letters",
    "shuffled": "against its words shuffled",
}


def _of_lag(table: pd.DataFrame, keys: list[str], asker: str) -> pd.DataFrame:
    table = validate(table)
    rows = table[table["metric"].isin(keys)]
    if rows.empty or "lag" not in rows.columns:
        raise InputError(f"{asker}: no rows of {keys[0]} by lag; give what retention_curve returns")
    if (rows["item"] != "all").any():
        raise InputError(f"{asker}: rows of single items; pool them with retention_curve first")
    # the order of first appearance, not of the alphabet
    names = [n for n in ("metric", "foil", "group", "of") if n in rows.columns]
    return rows.assign(**{n: rows[n].cat.reorder_categories(_in_order(rows[n])) for n in names})


def _in_order(column: pd.Series) -> list:
    seen = list(dict.fromkeys(column))
    return seen + [name for name in column.cat.categories if name not in seen]


def _lag_panels(panels: dict, *, columns: int, y: str, height: int) -> go.Figure:
    """Studied and controls by lag in each panel, and the studied items' level before study."""
    deep = -(-len(panels) // columns)
    figure = make_subplots(
        deep, columns, subplot_titles=list(panels), shared_yaxes=True, shared_xaxes=True,
        horizontal_spacing=0.03, vertical_spacing=0.1,
    )  # fmt: skip
    looks = {
        "studied": (COLOURS[0], MARKERS[0], "solid"),
        "control": (COLOURS[1], MARKERS[1], "dash"),
    }
    for index, part in enumerate(panels.values()):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        after = part[part["lag"].notna()]
        if after.duplicated(["group", "lag"]).any():
            raise InputError("plot: several rows per (group, lag) in a panel; select one of them")
        for group, look in looks.items():
            for trace in _lag_line(after[after["group"] == group], group, *look):
                trace.showlegend = bool(trace.showlegend is not False and index == 0)
                figure.add_trace(trace, **place)
        before = part[part["lag"].isna() & (part["group"] == "studied")]
        ends = [after["lag"].min() + 1, after["lag"].max() + 1]
        for level in before["value"]:
            line = go.Scatter(
                x=ends, y=[round(level, 6)] * 2, mode="lines", name="studied list before study",
                legendgroup="before", showlegend=index == 0,
                line={"dash": "dot", "color": "#000000", "width": 1.5},
            )  # fmt: skip
            figure.add_trace(line, **place)
    styled(figure, title="", x="", y="", height=height)
    lags = pd.concat([part["lag"] for part in panels.values()])
    figure.update_xaxes(**lag_ticks(lags))
    for col in range(1, columns + 1):
        figure.update_xaxes(title_text=LAG_AXIS, row=deep, col=col)
    figure.update_yaxes(title_text=y, col=1)
    return figure.update_layout(legend={"orientation": "h", "y": -0.22 * HEIGHT / height, "x": 0})


def _lag_line(line: pd.DataFrame, name: str, shade: str, symbol: str, dash: str) -> list:
    """One line with its band; x is lag + 1, so that lag 0 has a place on a logarithmic axis."""
    line = line.sort_values("lag").assign(x=line["lag"] + 1)
    points = go.Scatter(
        x=line["x"],
        y=line["value"].round(6),
        name=name,
        legendgroup=name,
        mode="lines+markers",
        line={"color": shade, "dash": dash},
        marker={"symbol": symbol, "size": 6},
        customdata=line[["lag", "lo", "hi", "n"]].round(4),
        hovertemplate=(
            "lag %{customdata[0]}: %{y:.3f} [%{customdata[1]:.3f}, %{customdata[2]:.3f}], "
            "n=%{customdata[3]}<extra>" + name + "</extra>"
        ),
    )
    return [*band(line, "x", shade, name), points]
