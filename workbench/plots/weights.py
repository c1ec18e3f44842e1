"""Weights along training, two models compared, and gradients that agree or do not."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from workbench.plots.style import (
    AXES,
    COLOURS,
    GREY,
    HEIGHT,
    MARKERS,
    band,
    colour,
    has_columns,
    rows_of,
    shown,
    styled,
    two_lines,
    whiskers,
)
from workbench.table import METRICS, InputError, validate

PANELS = 4  # beside each other
OUTSIDE = -1  # the layer of sums over blocks, and of what stands in none
RATIOS = ("condition_number",)  # metrics that span powers of ten
# from opposed (vermillion) over white to agreeing (blue)
OPPOSED = [[0.0, "#D55E00"], [0.25, "#F2BFA0"], [0.5, "#FFFFFF"], [0.75, "#A3CBE3"], [1.0, "#0072B2"]]  # fmt: skip


def plot_drift(table: pd.DataFrame, *, metric: str = "weight_change", title: str = "") -> go.Figure:
    """One measure of the weights along training: a panel a role, a line a block, all in black.

    Args:
        table: What ``probe_weight_drift`` returned.
        metric: Which of its measures; ``condition_number`` and the ranks have no line for all.

    Raises:
        InputError: No rows of the metric with a value.
    """
    table = _places(table, metric, "plot_drift")
    modules = [m for m in table["module"].unique() if m != "all"]
    whole = table[table["module"] == "all"]
    modules = (["all"] if len(whole) else []) + modules
    blocks = sorted(b for b in table["layer"].unique() if b != OUTSIDE)
    lines = math.ceil(len(modules) / PANELS)
    figure = make_subplots(
        rows=lines, cols=min(PANELS, len(modules)), shared_xaxes=True, shared_yaxes="all",
        subplot_titles=modules, horizontal_spacing=0.02, vertical_spacing=0.3 / (lines + 1),
    )  # fmt: skip
    shades = dict(zip(blocks, _shades(len(blocks)), strict=True))
    named = set()
    for place, module in enumerate(modules):
        mine = table[table["module"] == module]
        for block in [*blocks, OUTSIDE]:
            line = mine[mine["layer"] == block].sort_values("step")
            if line.empty:
                continue
            name = "all blocks, or outside" if block == OUTSIDE else f"block {int(block)}"
            figure.add_trace(
                go.Scatter(
                    x=line["step"],
                    y=line["value"].round(6),
                    name=name,
                    legendgroup=name,
                    showlegend=name not in named,
                    mode="lines+markers" if len(line) < 4 else "lines",
                    line={
                        "color": "#000000" if block == OUTSIDE else shades[block],
                        "width": 2.5 if block == OUTSIDE else 1.5,
                    },
                    hovertemplate="%{y:.4g} at %{x}<extra>" + f"{module}, {name}</extra>",
                ),
                row=place // PANELS + 1,
                col=place % PANELS + 1,
            )
            named.add(name)
    styled(figure, title=title, x="", y="", height=160 + 190 * lines)
    for place in range(len(modules)):
        if place + PANELS >= len(modules):  # nothing below
            at = {"row": place // PANELS + 1, "col": place % PANELS + 1}
            figure.update_xaxes(title_text=AXES["step"], showticklabels=True, **at)
    if metric in RATIOS:
        figure.update_yaxes(type="log", dtick=1)
    # once, in the middle: labels of panels below each other would run into one another
    return figure.update_yaxes(title_text=METRICS[metric].axis, row=(lines + 1) // 2, col=1)


def plot_drift_heat(
    table: pd.DataFrame, *, step: int | None = None, metric: str = "weight_change", title: str = ""
) -> go.Figure:
    """One measure of the weights at one step as a heat map: a row a block, a column a role.

    Args:
        table: What ``probe_weight_drift`` returned.
        step: Which checkpoint; None takes the last.

    Raises:
        InputError: No rows of the metric with a value in a block, or no such step.
    """
    table = _places(table, metric, "plot_drift_heat")
    table = table[(table["layer"] != OUTSIDE) & (table["module"] != "all")]
    if table.empty:
        raise InputError(f"plot_drift_heat: no {metric} of any block; there is nothing to map")
    steps = sorted(table["step"].unique())
    step = steps[-1] if step is None else step
    if step not in steps:
        raise InputError(
            f"plot_drift_heat: no rows at step {step}; there are {', '.join(map(str, steps))}"
        )
    cells = table[table["step"] == step]
    modules = list(cells["module"].unique())
    z = cells.pivot(index="layer", columns="module", values="value")[modules].sort_index()
    figure = go.Figure(
        go.Heatmap(
            x=modules, y=[f"block {int(b)}" for b in z.index], z=z.round(6).to_numpy(),
            texttemplate="%{z:.3g}", colorscale="Blues", zmin=0, xgap=2, ygap=2,
            hovertemplate="%{z:.4g}<extra>%{x}, %{y}</extra>",
        )
    )  # fmt: skip
    x = f"role; {METRICS[metric].axis}, at step {step}"
    styled(figure, title=title, x=x, y="", height=180 + 45 * len(z))
    return figure.update_yaxes(autorange="reversed")


def plot_path(table: pd.DataFrame, *, module: str = "all", title: str = "") -> go.Figure:
    """Path and net displacement of the weights by phase, above them their ratio if it can be below 1.

    Args:
        table: What ``probe_weight_path`` returned.
        module: A role, or ``all`` weights.

    Raises:
        InputError: No rows of that module.
    """
    table = validate(table)
    has_columns("plot_path", {"rows": table}, ("phase", "module", "layer", "changes"))
    rows_of(table, "weight_path", "plot_path")
    table = table[(table["layer"] == OUTSIDE) & (table["module"] == module)]
    if table.empty:
        raise InputError(f"plot_path: no rows of module {module!r}")
    path, net, straight = (
        rows_of(table, m, "plot_path") for m in ("weight_path", "weight_net", "straightness")
    )
    names = [shown("phase", name) for name in path["phase"].astype(str)]
    # one change is always straight, which says nothing
    above = [
        f"{value:.2f}" if changes > 1 and not pd.isna(value) else ""
        for value, changes in zip(straight["value"], straight["changes"], strict=True)
    ]
    figure = go.Figure()
    for told, part, shade in (("path", path, "#A3CBE3"), ("net displacement", net, COLOURS[0])):
        figure.add_trace(
            go.Bar(
                x=names, y=part["value"].round(6), name=told, marker_color=shade,
                customdata=part["changes"], cliponaxis=False,
                text=above if told == "path" else None,
                textposition="outside",
                hovertemplate="%{y:.4g} in %{customdata} changes<extra>" + told + "</extra>",
            )
        )  # fmt: skip
    label = f"length [{METRICS['weight_path'].unit}]"
    styled(figure, title=title, x="phase, above it straightness", y=label)
    return figure.update_layout(barmode="group")


def plot_barrier(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Loss along the straight line between two models, by group, with what exceeds its ends.

    The dotted line joins a group's ends; the whisker on it is the barrier, where it is greatest.

    Args:
        table: What ``probe_barrier`` returned; pooled rows (``item="all"``) are drawn.

    Raises:
        InputError: No such rows, or those of several pairs of models.
    """
    table = validate(table)
    table = table[table["item"] == "all"]
    loss = rows_of(table, "loss", "plot_barrier")
    heights = rows_of(table, "barrier", "plot_barrier")
    if loss.duplicated(["group", "alpha"]).any():
        raise InputError("plot_barrier: several rows per (group, alpha); select one pair of models")
    figure = go.Figure()
    groups = [g for g in loss["group"].astype(str).unique() if g != "all"] or ["all"]
    for index, group in enumerate(groups):
        line = loss[loss["group"] == group].sort_values("alpha")
        tall = heights[heights["group"] == group].iloc[0]
        name, shade = shown("group", group), colour(index)
        ends = line.iloc[[0, -1]]
        top = line.loc[line["alpha"] == tall["alpha"], "value"].iloc[0]
        figure.add_traces(band(line, "alpha", shade, name))
        figure.add_trace(
            go.Scatter(
                x=line["alpha"], y=line["value"].round(6), name=f"{name}: {_height(tall)}",
                legendgroup=name, mode="lines+markers", line={"color": shade},
                marker={"symbol": MARKERS[index % len(MARKERS)], "size": 6},
                hovertemplate="%{y:.4g} at %{x:.2f}<extra>" + name + "</extra>",
            )
        )  # fmt: skip
        for x, y, dash, width in (
            (ends["alpha"], ends["value"], "dot", 1),
            ([tall["alpha"]] * 2, [top - tall["value"], top], "solid", 3),
        ):
            figure.add_trace(
                go.Scatter(
                    x=x, y=y, mode="lines", line={"color": shade, "dash": dash, "width": width},
                    legendgroup=name, showlegend=False, hoverinfo="skip",
                )
            )  # fmt: skip
    first, second = (
        str(loss["against"].iloc[0]),
        f"{loss['run'].iloc[0]} at step {loss['step'].iloc[0]}",
    )
    x = f"place on the line, from {first} (0) to {second} (1)"
    styled(figure, title=title, x=x, y=METRICS["loss"].axis, height=HEIGHT + 40)
    return figure.update_layout(legend_title_text="barrier [nats per token]")


def _height(row: pd.Series) -> str:
    if pd.isna(row["lo"]):
        return f"{row['value']:+.2f}"
    return f"{row['value']:+.2f} ({row['lo']:+.2f} to {row['hi']:+.2f})"


def plot_cka(table: pd.DataFrame, *, floor: str | None = None, title: str = "") -> go.Figure:
    """Similarity of hidden states by layer, one line a pair of models.

    Args:
        table: What ``probe_cka`` returned, of one pair or several below each other; where it has
            a column ``pair``, that names the lines.
        floor: Name of the line that says what unrelated training gives; drawn in grey.

    Raises:
        InputError: No rows of ``cka``, several per pair and layer, or no such floor.
    """
    table = rows_of(validate(table), "cka", "plot_cka")
    if "pair" not in table:
        of = zip(table["run"], table["step"], table["against"], strict=True)
        table = table.assign(pair=[f"{run} at step {step}, {other}" for run, step, other in of])
    if table.duplicated(["pair", "layer"]).any():
        raise InputError("plot_cka: several rows per (pair, layer); select one")
    pairs = list(table["pair"].astype(str).unique())
    if floor is not None and floor not in pairs:
        raise InputError(f"plot_cka: no pair {floor!r}; there are {', '.join(pairs)}")
    figure = go.Figure()
    for index, pair in enumerate(sorted(pairs, key=lambda each: each == floor)):
        line = table[table["pair"] == pair].sort_values("layer")
        shade = GREY if pair == floor else colour(index)
        figure.add_trace(
            go.Scatter(
                x=line["layer"], y=line["value"].round(6), name=shown("pair", pair),
                error_y=whiskers(line), mode="lines+markers",
                line={"color": shade, "dash": "dash" if pair == floor else "solid"},
                marker={"symbol": MARKERS[index % len(MARKERS)], "size": 8},
                hovertemplate="%{y:.3f} in layer %{x}<extra>" + shown("pair", pair) + "</extra>",
            )
        )  # fmt: skip
    x = "layer (0: embeddings, then after each block)"
    styled(figure, title=title, x=x, y=METRICS["cka"].axis)
    return figure.update_yaxes(range=[min(0, float(table["value"].min())), 1.05]).update_xaxes(
        dtick=1
    )


def plot_interference(
    table: pd.DataFrame,
    *,
    metric: str = "gradient_cosine",
    module: str = "all",
    title: str = "",
) -> go.Figure:
    """Agreement of groups' gradients as a matrix: a step on the column, the loss of the row.

    Blue agrees (the step helps), vermillion opposes (it hurts); bold where the interval leaves 0
    out. Grey cells are undefined, as the cosine of a group with itself.

    Args:
        table: What ``probe_interference`` returned, at one step.
        metric: ``gradient_cosine``, ``gradient_product``, ``step_predicted`` or ``step_measured``.
        module: A role, or ``all``.

    Raises:
        InputError: No such rows, or several per pair of groups.
    """
    table = validate(table)
    has_columns("plot_interference", {"rows": table}, ("against", "module"))
    table = table[(table["item"] == "all") & (table["module"] == module)]
    found = rows_of(table, metric, "plot_interference")
    if found.duplicated(["group", "against"]).any():
        raise InputError("plot_interference: several rows per (group, against); select one step")
    of_step = metric.startswith("step_")
    names = list(dict.fromkeys([*found["group"].astype(str), *found["against"].astype(str)]))
    z, text, hover = [], [], []
    by_pair = found.set_index([found["group"].astype(str), found["against"].astype(str)])
    for group in names:
        line = [by_pair.loc[(group, x)] if (group, x) in by_pair.index else None for x in names]
        z.append([None if c is None or pd.isna(c["value"]) else float(c["value"]) for c in line])
        text.append([_cell(c) for c in line])
        hover.append(["" if c is None else _bounds(c) for c in line])
    limit = 1.0 if metric == "gradient_cosine" else float(found["value"].abs().max()) or 1.0
    labels = [shown("group", name) for name in names]
    figure = go.Figure(
        go.Heatmap(
            x=labels, y=labels, z=z, text=text, texttemplate="%{text}", customdata=hover,
            # a step that lowers the loss helps
            colorscale=OPPOSED, reversescale=of_step, zmin=-limit, zmax=limit, xgap=2, ygap=2,
            colorbar={"title": {"text": two_lines(METRICS[metric]), "side": "right"}},
            hovertemplate="%{customdata}<extra>step on %{x}, loss of %{y}</extra>",
        )
    )  # fmt: skip
    height = 220 + 42 * len(names)
    styled(figure, title=title, x="a step on these texts", y="changes the loss of", height=height)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return figure.update_layout(plot_bgcolor="#EDEDED")


def _cell(cell) -> str:
    if cell is None or pd.isna(cell["value"]):
        return ""
    value = f"{cell['value']:.2f}" if abs(cell["value"]) >= 0.095 else f"{cell['value']:.1g}"
    return f"<b>{value}</b>" if cell["lo"] > 0 or cell["hi"] < 0 else value


def _bounds(cell) -> str:
    if pd.isna(cell["value"]):
        return str(cell.get("reason"))
    if pd.isna(cell["lo"]):
        return f"{cell['value']:.4g}"
    return f"{cell['value']:.4g} ({cell['lo']:.3g} to {cell['hi']:.3g})"


def plot_step(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Change of each group's loss after one real step against what the gradients foretold.

    Args:
        table: What ``probe_interference`` returned with a ``learning_rate``, at one step.

    Raises:
        InputError: No such rows, or several per pair of groups.
    """
    table = validate(table)
    table = table[table["item"] == "all"]
    told = rows_of(table, "step_predicted", "plot_step")
    got = rows_of(table, "step_measured", "plot_step")
    if told.duplicated(["group", "against"]).any():
        raise InputError("plot_step: several rows per (group, against); select one step")
    both = got.merge(
        told[["group", "against", "value"]], on=["group", "against"], suffixes=("", "_told")
    )
    figure = go.Figure()
    own = both["group"].astype(str) == both["against"].astype(str)
    for index, (name, part) in enumerate(
        (("the texts the step was made on", both[own]), ("other texts", both[~own]))
    ):
        figure.add_trace(
            go.Scatter(
                x=part["value_told"].round(8), y=part["value"].round(8), name=name, mode="markers",
                error_y=whiskers(part),
                marker={"color": colour(index), "symbol": MARKERS[index], "size": 8},
                customdata=part[["against", "group"]].astype(str).map(lambda v: shown("group", v)),
                hovertemplate="foretold %{x:.3g}, came %{y:.3g}<extra>step on %{customdata[0]}, "
                "loss of %{customdata[1]}</extra>",
            )
        )  # fmt: skip
    ends = [float(both["value_told"].min()), float(both["value_told"].max())]
    as_told = {"color": GREY, "dash": "dot"}
    figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=as_told, name="as foretold"))
    x = f"foretold: −η ⟨g<sub>X</sub>, g<sub>Y</sub>⟩ [{METRICS['step_predicted'].unit}]"
    return styled(figure, title=title, x=x, y=METRICS["step_measured"].axis, height=HEIGHT + 40)


def _places(table: pd.DataFrame, metric: str, asker: str) -> pd.DataFrame:
    """One row for each step, role and block: sums over tensors, or the matrix where there are none."""
    table = validate(table)
    has_columns(asker, {"rows": table}, ("tensor", "module", "layer"))
    found = rows_of(table, metric, asker)
    found = found[found["value"].notna()].astype({"module": str})
    if found.empty:
        raise InputError(f"{asker}: {metric} is undefined in all rows; ask for another step")
    sums = found[found["tensor"] == "all"]
    found = sums if len(sums) else found
    if found.duplicated(["step", "module", "layer"]).any():
        raise InputError(f"{asker}: several rows per (step, module, layer); select one run")
    return found


def _shades(count: int) -> list[str]:
    """Light to dark with depth."""
    places = [0.25 + 0.7 * i / max(count - 1, 1) for i in range(count)]
    return sample_colorscale("Oranges", places) if count else []
