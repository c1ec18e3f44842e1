"""What models hold of random data, and how their capacity grows with their size."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from workbench.plots.style import (
    GREY,
    MARKERS,
    band,
    colour,
    has_columns,
    rows_of,
    styled,
    whiskers,
)
from workbench.table import METRICS, InputError, validate

PUBLISHED = 3.6  # bits per parameter, all counted: Morris et al. (2025)


def plot_capacity(runs: pd.DataFrame, capacities: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Memorized bits against bits of data, a point a run, with each model's plateau and its band.

    The dotted diagonal is where all of the data would be memorized; the dashed line below it is
    the most that any model of the set can hold, which does not know the order of its sequences.
    Axes are logarithmic; a run that memorized nothing has no point.

    Args:
        runs: What ``load_capacity`` gives.
        capacities: What ``fit_capacity`` gives; its estimator ``mean`` is drawn.

    Raises:
        InputError: Tables of something else.
    """
    held = rows_of(validate(runs), "memorized_bits", "plot_capacity")
    plateau = rows_of(validate(capacities), "capacity_bits", "plot_capacity")
    has_columns("plot_capacity", {"runs": held}, ["dataset_bits", "ceiling_bits", "parameters"])
    has_columns("plot_capacity", {"capacities": plateau}, ["estimator", "parameters", "bound"])
    plateau = plateau[plateau["estimator"] == "mean"].set_index("parameters")
    figure = go.Figure()
    edge = held.sort_values("dataset_bits").drop_duplicates("dataset_bits")
    for y, name, dash in (
        ("dataset_bits", "all of the data", "dot"),
        ("ceiling_bits", "the most any model can hold", "dash"),
    ):
        figure.add_trace(
            go.Scatter(
                x=edge["dataset_bits"], y=edge[y].round(3), mode="lines", name=name,
                line={"color": GREY, "dash": dash, "width": 1}, hoverinfo="skip",
            )
        )  # fmt: skip
    for index, (size, part) in enumerate(held.groupby("parameters", observed=True)):
        known = plateau.loc[[size]]
        bound = " (lower bound)" if (known["bound"].astype(str) != "").any() else ""
        name, shade = f"{size:,} parameters{bound}", colour(index)
        ends = pd.concat([known, known]).assign(
            at=[known["value"].item(), float(part["dataset_bits"].max())]
        )
        if ends["value"].notna().all():
            figure.add_traces(band(ends, "at", shade, name))
            figure.add_trace(
                go.Scatter(
                    x=ends["at"], y=ends["value"].round(3), mode="lines", legendgroup=name,
                    line={"color": shade, "width": 1}, showlegend=False, hoverinfo="skip",
                )
            )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=part["dataset_bits"],
                y=part["value"].where(part["value"] > 0).round(3),
                name=name,
                legendgroup=name,
                mode="markers",
                marker={"color": shade, "symbol": MARKERS[index % len(MARKERS)], "size": 8},
                customdata=part[["sequences", "seed"]],
                hovertemplate=(
                    "%{customdata[0]} sequences, seed %{customdata[1]}: %{y:,.0f} of %{x:,.0f} bits"
                    "<extra>" + name + "</extra>"
                ),
            )
        )
    figure.update_xaxes(type="log", dtick="D2")
    figure.update_yaxes(type="log", dtick="D2")
    title = title or "What is memorized, as the random data grow"
    y = METRICS["memorized_bits"].axis
    return styled(figure, title=title, x="size of the data [bits]", y=y)


def plot_bits_per_parameter(
    capacities: pd.DataFrame, slopes: pd.DataFrame, *, count: str = "all", title: str = ""
) -> go.Figure:
    """Capacity against parameters, by both estimators, with the line whose slope is reported.

    The dotted line is what Morris et al. (2025) found, 3.6 bits for each of all parameters.

    Args:
        capacities: What ``fit_capacity`` gives.
        slopes: What ``bits_per_parameter`` gives.
        count: ``all`` parameters on the axis, or ``non_embedding``.

    Raises:
        InputError: Tables of something else, or another count.
    """
    if count not in ("all", "non_embedding"):
        raise InputError(f"plot_bits_per_parameter: count {count!r}; choose all or non_embedding")
    column = "parameters" if count == "all" else count
    known = rows_of(validate(capacities), "capacity_bits", "plot_bits_per_parameter")
    slopes = rows_of(validate(slopes), "bits_per_parameter", "plot_bits_per_parameter")
    has_columns("plot_bits_per_parameter", {"capacities": known}, [column, "estimator"])
    has_columns("plot_bits_per_parameter", {"slopes": slopes}, ["of", "count", "at_bits"])
    figure = go.Figure()
    # they should coincide: one is drawn around the other
    for index, (estimator, look, size) in enumerate(
        [("mean", "circle", 7), ("curve", "diamond-open", 16)]
    ):
        part = known[known["estimator"] == estimator]
        figure.add_trace(
            go.Scatter(
                x=part[column], y=part["value"].round(3), name=f"plateau, by the {estimator}",
                mode="markers", error_y=whiskers(part),
                marker={"color": colour(index), "symbol": look, "size": size},
            )
        )  # fmt: skip
    line = slopes[(slopes["of"] == "slope") & (slopes["count"] == count)].iloc[0]
    ends = [0.0, 1.1 * known[column].max()]
    if pd.notna(line["value"]):
        through = [line["at_bits"] + line["value"] * (x - line["at_parameters"]) for x in ends]
        name = f"slope {line['value']:.2f} [{line['lo']:.2f}, {line['hi']:.2f}] bits per parameter"
        figure.add_trace(
            go.Scatter(x=ends, y=through, mode="lines", name=name, line={"color": "#000000"})
        )
    if count == "all":
        figure.add_trace(
            go.Scatter(
                x=ends, y=[PUBLISHED * x for x in ends], mode="lines",
                name="3.6 bits per parameter, as published",
                line={"color": GREY, "dash": "dot"},
            )
        )  # fmt: skip
    x = "all trainable parameters" if count == "all" else "parameters outside the embeddings"
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(rangemode="tozero")
    title = title or "Capacity against size"
    return styled(figure, title=title, x=x, y=METRICS["capacity_bits"].axis)
