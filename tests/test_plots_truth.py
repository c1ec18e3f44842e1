"""Bias and coverage over trainings, drawn as the table holds them."""

import numpy as np
import pandas as pd
import pytest

from workbench.plots import plot_coverage
from workbench.table import InputError, rows


def calibrated() -> pd.DataFrame:
    parts = []
    for kind, bias, cover in (("verse", [0.1, -0.2], [0.9, 1.0]), ("<b>", [0.0, 0.3], [0.5, 0.8])):
        for metric, value in (("bias", bias), ("coverage", cover)):
            parts.append(
                rows(metric, value, run="all", lo=np.array(value) - 0.1, hi=np.array(value), n=5,
                     beside={"kind": kind, "lag": [9, 0]})
            )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def test_coverage_draws_bias_above_and_coverage_below():
    figure = plot_coverage(calibrated(), level=0.9)
    drawn = [t for t in figure.data if t.name]
    assert [(t.name, t.yaxis, t.showlegend) for t in drawn] == [
        ("verse", "y", True), ("&lt;b&gt;", "y", True),
        ("verse", "y2", False), ("&lt;b&gt;", "y2", False),
    ]  # fmt: skip
    # sorted by lag, at lag + 1, the two kinds 2.5 % to either side
    np.testing.assert_allclose(drawn[0].x, [0.975, 9.75])
    np.testing.assert_allclose(drawn[1].x, [1.025, 10.25])
    np.testing.assert_allclose(drawn[0].y, [-0.2, 0.1])
    np.testing.assert_allclose(drawn[3].y, [0.8, 0.5])
    np.testing.assert_allclose(drawn[0].error_y.arrayminus, [0.1, 0.1])
    assert [shape.y0 for shape in figure.layout.shapes] == [0.0, 0.9]
    assert list(figure.layout.xaxis2.ticktext) == ["0", "9"]
    assert list(figure.layout.xaxis2.tickvals) == [1, 10]
    assert figure.layout.xaxis2.title.text == "time since the last exposure [updates]"


def test_doses_stand_where_they_are():
    figure = plot_coverage(
        calibrated().assign(dose=lambda t: t["lag"] + 1).drop(columns="lag"), x="dose"
    )
    np.testing.assert_allclose(figure.data[0].x, [0.975, 9.75])
    assert list(figure.layout.xaxis2.ticktext) == ["1", "10"]


def test_coverage_refuses():
    table = calibrated()
    for bad, told in (
        (table.rename(columns={"kind": "sort"}), "plot_coverage: the rows have no column 'kind'; "),
        (
            table[table["metric"] == "bias"],
            "plot_coverage: the table has no rows of coverage; it has bias",
        ),
        (
            pd.concat([table, table.assign(dose=1)]),
            "plot_coverage: several rows per (lag, kind) of bias",
        ),
    ):
        with pytest.raises(InputError) as error:
            plot_coverage(bad)
        assert str(error.value).startswith(told)
