"""Table in, plotly figure out. A plot refuses to compute: means, bands and fits come from stats.

Colours are the Okabe-Ito set, told apart by people who do not see red and green alike; series
also differ in marker. Figures are complete ``go.Figure`` objects; nothing is shown or saved here.
"""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.table import METRICS, InputError, one_metric, validate

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "pentagon")
GREY = "#8A8A8A"  # controls, floors, what is not significant
HEIGHT = 420  # px; reports show a figure at full text width


def colour(index: int) -> str:
    """The index-th series colour; they repeat after eight, where the markers no longer help."""
    return COLOURS[index % len(COLOURS)]


def see_through(hex_colour: str, opacity: float) -> str:
    """An ``rgba(...)`` string, for bands."""
    red, green, blue = (int(hex_colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def styled(figure: go.Figure, *, title: str, x: str, y: str, height: int = HEIGHT) -> go.Figure:
    """The house's look: white, titled, axes labelled with their units."""
    return figure.update_layout(
        template="plotly_white",
        title={"text": title, "x": 0.0, "xanchor": "left"},
        xaxis_title=x,
        yaxis_title=y,
        height=height,
        margin={"l": 70, "r": 20, "t": 60, "b": 60},
        legend={"groupclick": "togglegroup"},
        font={"size": 13},
    )


def band(line: pd.DataFrame, x: str, shade: str, name: str) -> list[go.Scatter]:
    """The closed area between ``lo`` and ``hi``, left out where no interval was estimated."""
    line = line[line["lo"].notna() & line["hi"].notna()]
    if line.empty:
        return []
    there_and_back = pd.concat([line[x], line[x][::-1]])
    edges = pd.concat([line["hi"], line["lo"][::-1]])
    return [
        go.Scatter(
            x=there_and_back,
            y=edges.round(6),
            fill="toself",
            fillcolor=see_through(shade, 0.18),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
        )
    ]


def plot_curve(
    table: pd.DataFrame,
    *,
    x: str = "step",
    color: str = "group",
    title: str = "",
    log_x: bool = False,
) -> go.Figure:
    """One line with its band per value of ``color``; rows without an interval get none.

    Raises:
        InputError: Several metrics, an unknown column, or several rows per (x, color).
    """
    metric = one_metric(validate(table), "plot_curve")
    lacking = [name for name in (x, color) if name not in table.columns]
    if lacking:
        raise InputError(f"plot_curve: no column {lacking[0]!r}; there are {', '.join(table)}")
    if table.duplicated([x, color]).any():
        raise InputError(f"plot_curve: several rows per ({x}, {color}); summarise first")
    figure = go.Figure()
    for index, (name, line) in enumerate(table.groupby(color, sort=False, observed=True)):
        line = line.sort_values(x)
        figure.add_traces(band(line, x, colour(index), str(name)))
        figure.add_trace(
            go.Scatter(
                x=line[x],
                y=line["value"].round(6),
                name=str(name),
                legendgroup=str(name),
                mode="lines+markers",
                line={"color": colour(index)},
                marker={"symbol": MARKERS[index % len(MARKERS)], "size": 7},
                customdata=line["n"],
                hovertemplate="%{x}: %{y:.4g} (n=%{customdata})<extra>" + str(name) + "</extra>",
            )
        )
    styled(figure, title=title, x=x, y=metric.axis)
    if metric.chance is not None:
        figure.add_hline(y=metric.chance, line={"dash": "dot", "color": GREY})
    if log_x:
        figure.update_xaxes(type="log")
    return figure


def plot_groups(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Bars of one or several shares by group, side by side, with their intervals.

    Raises:
        InputError: Metrics of different units, or several rows per (metric, group).
    """
    table = validate(table)
    metrics = [METRICS[key] for key in table["metric"].astype(str).unique()]
    if not metrics or len({metric.high for metric in metrics}) != 1:
        raise InputError("plot_groups: needs metrics of one range on one axis; select some")
    if table.duplicated(["metric", "group"]).any():
        raise InputError("plot_groups: several rows per (metric, group); summarise first")
    figure = go.Figure()
    for index, (key, part) in enumerate(table.groupby("metric", observed=True)):
        figure.add_trace(
            go.Bar(
                x=part["group"].astype(str) + "<br>n=" + part["n"].astype(str),
                y=part["value"].round(6),
                name=METRICS[str(key)].label,
                marker={
                    "color": colour(index),
                    "pattern": {"shape": ("", "/", ".", "x")[index % 4]},
                },
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": (part["hi"] - part["value"]).round(6),
                    "arrayminus": (part["value"] - part["lo"]).round(6),
                },
            )
        )
    figure.update_layout(
        barmode="group", legend={"orientation": "h", "y": 1.08, "yanchor": "bottom"}
    )
    return styled(figure, title=title, x="group of texts", y=metrics[0].unit)


def plot_recognition(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Recognition against lag, one panel per kind of foil: studied, controls, before study, 1/2.

    Args:
        table: What ``retention_curve`` gives; its rows of ``recognition`` are drawn.

    Raises:
        InputError: No such rows, or several per (foil, group, lag).
    """
    rows = _of_lag(table, ["recognition"], "plot_recognition")
    panels = {f"against {foil}": part for foil, part in rows.groupby("foil", observed=True)}
    figure = _lag_panels(panels, columns=len(panels), y=METRICS["recognition"].axis, height=HEIGHT)
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
    figure.update_yaxes(range=[-0.03, 1.03])
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
    return figure.update_xaxes(**_lag_ticks(rows["lag"]))


LAG_AXIS = "updates since the study ended"


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
    figure.update_xaxes(**_lag_ticks(lags))
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


def _lag_ticks(lags: pd.Series) -> dict:
    """A logarithmic axis labelled with the lags themselves, as many as do not touch."""
    kept: list[float] = []
    for lag in sorted(lags.dropna().unique()):
        if not kept or (lag + 1) / (kept[-1] + 1) > 1.45:
            kept.append(lag)
    return {
        "type": "log",
        "tickvals": [lag + 1 for lag in kept],
        "ticktext": [f"{lag:g}" for lag in kept],
        "minor": {"ticks": ""},
    }


def _rows_of(table: pd.DataFrame, metric: str, asker: str) -> pd.DataFrame:
    """The rows of one metric, for figures that know which they draw."""
    found = table[table["metric"] == metric]
    if found.empty:
        held = ", ".join(sorted(table["metric"].astype(str).unique()))
        raise InputError(f"{asker}: the table has no rows of {metric}; it has {held or 'none'}")
    return found


def plot_spectrum(table: pd.DataFrame, *, rho: float | None = None, title: str = "") -> go.Figure:
    """Curvature mass held by the largest components, one line per layer, coloured by role.

    Args:
        table: Holds rows of ``mass``, as ``probe_curvature`` gives them.
        rho: Draw the cut that keeps this share of the mass.

    Raises:
        InputError: No rows of ``mass``.
    """
    table = _rows_of(validate(table), "mass", "plot_spectrum")
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
    drawn = _rows_of(table, metric, "plot_edit_sweep")
    price = _rows_of(table, "perplexity", "plot_edit_sweep")[["method", "rho", "value"]]
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
                error_y=_whiskers(line) | {"color": see_through(colour(index), 0.35)},
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


def _whiskers(line: pd.DataFrame) -> dict:
    """Error bars to ``lo`` and ``hi``; none where no interval was estimated."""
    above, below = line["hi"] - line["value"], line["value"] - line["lo"]
    return {
        "type": "data",
        "symmetric": False,
        "array": above.clip(lower=0).round(6),
        "arrayminus": below.clip(lower=0).round(6),
        "thickness": 1,
        "width": 3,
    }


def plot_band_ratio(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Activation energy of memorized over clean items, by band; one panel per input, colour block.

    Args:
        table: Holds rows of ``band_ratio``, as ``probe_curvature`` gives them.

    Raises:
        InputError: No rows of ``band_ratio``.
    """
    table = _rows_of(validate(table), "band_ratio", "plot_band_ratio")
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
                error_y=_whiskers(line),
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
