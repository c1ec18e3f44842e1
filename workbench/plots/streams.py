"""A stream of tasks: the matrix, what its summaries say, gaps along the way, plasticity."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.style import (
    COLOURS,
    GREY,
    MARKERS,
    band,
    colour,
    has_columns,
    shown,
    styled,
    two_lines,
    whiskers,
)
from workbench.table import METRICS, InputError, validate

GAINED, LOST = COLOURS[0], COLOURS[1]
DIFFERENCES = (
    "bwt",
    "bwt_gem_code",
    "forgetting",
    "forgetting_mammoth",
    "forgetting_avalanche",
    "fwt",
    "intransigence",
)
# from lost (vermillion) over white to gained (blue), as the points of plot_matrix_measures
SCALE = [[0.0, "#D55E00"], [0.25, "#F2BFA0"], [0.5, "#FFFFFF"], [0.75, "#A3CBE3"], [1.0, "#0072B2"]]
NOT_YET = "#EDEDED"  # cells of tasks that were not trained on yet


def plot_accuracy_matrix(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """The matrix as a heat map: a row a training, a column a task, every score written in.

    Colour is the change since the task was learned, blue better, vermillion worse, white none; a
    frame marks the score right after a task's own training, grey the tasks not trained on yet.

    Args:
        table: What ``accuracy_matrix`` gives.

    Raises:
        InputError: No cells, or several per (presentation, task).
    """
    table = validate(table)
    has_columns(
        "plot_accuracy_matrix", {"rows": table}, ("change", "presentation", "task", "better")
    )
    cells = table[table["change"].notna()]
    if cells.empty:
        raise InputError("plot_accuracy_matrix: no cells; give what accuracy_matrix returns")
    if cells.duplicated(["presentation", "task"]).any():
        raise InputError(
            "plot_accuracy_matrix: several rows per (presentation, task); select one run"
        )
    inner = cells[(cells["presentation"] > 0) & (cells["current"] != "jointly")]
    names = list(inner.sort_values("presentation")["current"].astype(str).unique())
    labels = {0: "before any", len(names) + 1: "all together"}
    labels |= {at: f"after {name}" for at, name in enumerate(names, 1)}
    places = [at for at in labels if (cells["presentation"] == at).any()]
    places.sort()
    by_place = cells.set_index(["presentation", "task"])
    known = {(at, name): at > names.index(name) for at in places for name in names}
    changes = [
        by_place.loc[place, "change"] for place in known if known[place] and place in by_place.index
    ]
    limit = max(1e-9, max(abs(each) for each in changes))
    figure = go.Figure()
    z, text, hover = [], [], []
    for at in places:
        line = [
            by_place.loc[(at, name)] if (at, name) in by_place.index else None for name in names
        ]
        z.append([
            None if cell is None or not known[at, name] else round(float(cell["change"]), 6)
            for name, cell in zip(names, line, strict=True)
        ])  # fmt: skip
        text.append(["" if cell is None else _written(cell["value"]) for cell in line])
        hover.append(["" if cell is None else _told(cell) for cell in line])
    columns = [shown("task", name) for name in names]
    rows = [shown("task", labels[at]) for at in places]
    figure.add_trace(
        go.Heatmap(
            x=columns, y=rows, z=z, text=text, texttemplate="%{text}", customdata=hover,
            colorscale=SCALE, zmin=-limit, zmax=limit, xgap=2, ygap=2, hoverongaps=True,
            colorbar={"title": {"text": "change since<br>it was learned<br>(blue: better)"}},
            hovertemplate="%{y}, %{x}: %{customdata}<extra></extra>",
        )
    )  # fmt: skip
    for at in range(len(names)):
        figure.add_shape(
            type="rect", x0=at - 0.5, x1=at + 0.5, y0=places.index(at + 1) - 0.5,
            y1=places.index(at + 1) + 0.5, line={"color": "#000000", "width": 2},
        )  # fmt: skip
    of, better = str(cells["of"].iloc[0]), str(cells["better"].iloc[0])
    unit = METRICS[of].axis if of in METRICS else of
    head = title or "Each task after each training"
    styled(figure, title=f"{head}<br><sup>{unit}, {better}</sup>", x="", y="")
    figure.update_layout(
        plot_bgcolor=NOT_YET, height=max(300, 170 + 46 * len(places)), margin={"t": 110}
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True)
    return figure.update_xaxes(showgrid=False, side="top")


def _written(value: float) -> str:
    return (
        f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    )


def _told(cell: pd.Series) -> str:
    bounds = "" if pd.isna(cell["lo"]) else f" [{cell['lo']:.4g}, {cell['hi']:.4g}]"
    return f"{cell['value']:.4g}{bounds}, n={cell['n']}, change {cell['change']:+.3g}"


def plot_matrix_measures(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """What the summaries of one matrix say of the tasks, beside each other.

    Blue says that something was gained, vermillion that it was lost, whatever the sign convention;
    a ring and a note mark those that another summary of the same matrix contradicts. What is
    undefined is written with its reason.

    Args:
        table: What ``accuracy_matrix`` gives.

    Raises:
        InputError: No such rows, or several of one summary.
    """
    table = validate(table)
    has_columns("plot_matrix_measures", {"rows": table}, ("disagrees", "better", "reason"))
    found = table[table["metric"].isin(DIFFERENCES)].set_index("metric")
    if found.empty:
        raise InputError("plot_matrix_measures: no summaries; give what accuracy_matrix returns")
    if found.index.duplicated().any():
        raise InputError("plot_matrix_measures: several rows of a summary; select one run")
    figure = go.Figure()
    for key in [key for key in DIFFERENCES if key in found.index]:
        row = found.loc[[key]]
        value, label = float(row["value"].iloc[0]), METRICS[key].label
        label = label if len(label) < 34 else label.replace(" (", "<br>(").replace(", ", ",<br>")
        if pd.isna(value):
            note = f"  undefined: {row['reason'].iloc[0]}"
            figure.add_trace(_noted(0.0, label, note, "middle right", "#606060"))
            continue
        up = (value > 0) == (str(row["better"].iloc[0]) == "higher is better")
        shade = GREY if value == 0 else GAINED if up else LOST
        badge = bool(row["disagrees"].iloc[0])
        figure.add_trace(
            go.Scatter(
                x=row["value"].round(6), y=[label], mode="markers",
                marker={"color": shade, "size": 11, "line": {"width": 3 if badge else 0, "color": "#000000"}},
                error_x=whiskers(row) | {"thickness": 2, "color": shade},
                customdata=[[row["lo"].iloc[0], row["hi"].iloc[0], METRICS[key].formula]],
                hovertemplate="%{x:.4f} [%{customdata[0]:.4f}, %{customdata[1]:.4f}]: "
                "%{customdata[2]}<extra></extra>",
            )
        )  # fmt: skip
        if badge:
            edge = row["hi"].iloc[0] if pd.notna(row["hi"].iloc[0]) else value
            others = ", ".join(str(row["disagrees"].iloc[0]).split(", ")[:2])
            note = f"    ≠ {others}"
            figure.add_trace(_noted(float(edge), label, note, "middle right", "#000000"))
    for name, shade in (("gained", GAINED), ("lost", LOST)):
        dot = {"color": shade, "size": 11}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=dot, name=name))
    figure.for_each_trace(lambda t: t.update(showlegend=t.name in ("gained", "lost")))
    styled(figure, title=title or "What one matrix says, by whom it is asked", x="", y="")
    ends = found[["value", "lo", "hi"]].assign(zero=0.0)
    low, high = float(ends.min(axis=None)), float(ends.max(axis=None))
    wide = max(high - low, 1e-9)
    figure.update_xaxes(range=[low - 0.06 * wide, high + 0.4 * wide])  # room for the notes
    figure.add_vline(0.0, line={"dash": "dot", "color": GREY})
    figure.update_xaxes(title_text="value in the unit of the score; ringed: contradicted by ≠")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure.update_layout(legend={"orientation": "h", "y": -0.22})


def _noted(x: float, y: str, note: str, where: str, shade: str) -> go.Scatter:
    return go.Scatter(
        x=[x], y=[y], mode="text", text=[note], textposition=where, cliponaxis=False,
        textfont={"size": 11, "color": shade}, hoverinfo="skip",
    )  # fmt: skip


def plot_stability_gap(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Score of each task along the stream, with its band; dotted lines are boundaries.

    Args:
        table: What ``stability_gap`` gives; its rows of the metric itself are drawn.

    Raises:
        InputError: No such rows, or several per (task, step).
    """
    table = validate(table)
    has_columns("plot_stability_gap", {"rows": table}, ("phase", "task", "presentation", "current"))
    trace = table[table["phase"].isin(["before", "during", "after"])]
    if trace.empty:
        raise InputError("plot_stability_gap: no traces; give what stability_gap returns")
    if trace.duplicated(["task", "step"]).any():
        raise InputError("plot_stability_gap: several rows per (task, step); select one metric")
    figure = go.Figure()
    for index, (name, line) in enumerate(trace.groupby("task", observed=True, sort=False)):
        line, told = line.sort_values("step"), shown("task", name)
        figure.add_traces(band(line, "step", colour(index), told))
        figure.add_trace(
            go.Scatter(
                x=line["step"], y=line["value"].round(6), name=told, legendgroup=told,
                mode="lines+markers", line={"color": colour(index)},
                marker={"symbol": MARKERS[index % 8], "size": 6},
                customdata=line[["lo", "hi", "n"]].round(4),
                hovertemplate="%{x}: %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], "
                "n=%{customdata[2]}<extra>" + told + "</extra>",
            )
        )  # fmt: skip
    ends = trace[trace["phase"] == "after"].groupby("presentation")[["step", "current"]].first()
    began = trace["step"].min()
    for end in ends.itertuples():
        figure.add_vline(int(began), line={"dash": "dot", "color": GREY})
        figure.add_annotation(
            x=(began + end.step) / 2, y=1.0, yref="paper", yanchor="bottom", showarrow=False,
            text=_folded(f"learning {end.current}"), font={"size": 11, "color": "#404040"},
        )  # fmt: skip
        began = end.step
    metric = METRICS[str(trace["metric"].iloc[0])]
    styled(figure, title=title or "Each task along the stream", x="updates", y=two_lines(metric))
    figure.update_layout(margin={"t": 90}, legend={"orientation": "h", "y": -0.2})
    return figure.update_yaxes(autorange="reversed" if metric.better == "low" else True)


def _folded(text: str) -> str:
    words, lines = shown("task", text).split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > 14 and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(lines)


def plot_plasticity(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """How well each task was learned in its place in the stream, and alone.

    Args:
        table: What ``plasticity`` gives; its rows of the metric itself are drawn.

    Raises:
        InputError: No such rows, or several per (phase, presentation).
    """
    table = validate(table)
    has_columns("plot_plasticity", {"rows": table}, ("phase", "task", "presentation"))
    found = table[table["phase"].isin(["after", "alone"])].sort_values("presentation")
    if found.empty or not (found["phase"] == "alone").any():
        raise InputError("plot_plasticity: no scores alone; give what plasticity returns")
    if found.duplicated(["phase", "presentation"]).any():
        raise InputError(
            "plot_plasticity: several rows per (phase, presentation); select one metric"
        )
    lost = table[table["metric"] == "plasticity_loss"].sort_values("presentation")
    metric = METRICS[str(found["metric"].iloc[0])]
    figure = make_subplots(
        1, 2, horizontal_spacing=0.12,
        subplot_titles=["score", "alone less in the stream (above 0: learned worse late)"],
    )  # fmt: skip
    for index, (phase, (name, shade)) in enumerate(LOOKS.items()):
        line = found[found["phase"] == phase]
        figure.add_trace(_places(line, name, shade, index, 0.06 * (1 - 2 * index)), row=1, col=1)
    figure.add_trace(_places(lost, "difference", "#000000", 2, 0.0), row=1, col=2)
    figure.add_hline(0.0, line={"dash": "dot", "color": GREY}, row=1, col=2)
    styled(figure, title=title or "The same updates, late in the stream or alone", x="", y="")
    places = found.drop_duplicates("presentation")
    told = zip(places["presentation"], places["task"], strict=True)
    figure.update_xaxes(
        title_text="task, by its place in the stream",
        tickvals=places["presentation"].tolist(),
        ticktext=[f"{place:g}: {_folded(str(task))}" for place, task in told],
    )
    figure.update_yaxes(title_text=two_lines(metric), row=1, col=1)
    figure.update_yaxes(autorange="reversed" if metric.better == "low" else True, row=1, col=1)
    figure.update_traces(showlegend=False, row=1, col=2)
    return figure.update_layout(legend={"orientation": "h", "y": -0.3})


LOOKS = {"alone": ("alone", COLOURS[0]), "after": ("after the tasks before it", COLOURS[1])}


def _places(line: pd.DataFrame, name: str, shade: str, index: int, beside: float) -> go.Scatter:
    return go.Scatter(
        x=line["presentation"] - beside, y=line["value"].round(6), name=name, mode="markers",
        error_y=whiskers(line), marker={"color": shade, "symbol": MARKERS[index], "size": 10},
        customdata=line[["lo", "hi", "n"]].round(4),
        hovertemplate="%{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], n=%{customdata[2]}"
        "<extra>" + name + "</extra>",
    )  # fmt: skip
