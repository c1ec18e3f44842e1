"""What the figures of membership draw is what the table holds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.plots import plot_auc, plot_roc
from workbench.table import InputError, rows

NAN = np.nan


def areas() -> pd.DataFrame:
    """Two attacks on two kinds of text, the second kind with its blind baseline."""
    attacks = rows(
        "auc", [0.8, 0.6, 0.7, 0.55], run="r", lo=[0.7, 0.5, 0.6, 0.45], hi=[0.9, 0.7, 0.8, 0.65], n=20,
        beside={
            "score": ["member_loss", "member_mink"] * 2, "kind": ["<b>a</b>"] * 2 + ["b"] * 2,
            "lo_bootstrap": [0.69, NAN, 0.61, 0.44], "hi_bootstrap": [0.91, NAN, 0.79, 0.66],
        },
    )  # fmt: skip
    blind = rows(
        "auc", 0.52, run="r", lo=0.4, hi=0.64, n=20, beside={"score": "member_blind", "kind": "b"}
    )
    other = rows("tpr_at_fpr", 0.3, run="r", beside={"score": "member_loss", "kind": "b"})
    return pd.concat([attacks, blind, other])


def test_areas_are_drawn_with_both_intervals():
    figure = plot_auc(areas())
    points = {
        (t.xaxis, t.y[0]): (t.x[0], round(t.x[0] - t.error_x.arrayminus[0], 6), round(t.x[0] + t.error_x.array[0], 6), t.marker.symbol)
        for t in figure.data if t.mode == "markers"
    }  # fmt: skip
    assert points == {
        ("x", "loss attack score"): (0.8, 0.7, 0.9, "circle"),
        ("x", "Min-K score"): (0.6, 0.5, 0.7, "circle"),
        ("x2", "loss attack score"): (0.7, 0.6, 0.8, "circle"),
        ("x2", "Min-K score"): (0.55, 0.45, 0.65, "circle"),
        ("x2", "blind bag of words (no model)"): (0.52, 0.4, 0.64, "circle-open"),
    }
    second = [(t.xaxis, t.y[0], tuple(t.x)) for t in figure.data if t.mode == "lines"]
    assert second == [
        ("x", "loss attack score", (0.69, 0.91)),
        ("x2", "loss attack score", (0.61, 0.79)),
        ("x2", "Min-K score", (0.44, 0.66)),
    ]
    # the blind interval is a zone in its own panel only; chance is a line in both
    zones = [(s.xref, s.x0, s.x1) for s in figure.layout.shapes]
    assert sorted(zones) == [("x", 0.5, 0.5), ("x2", 0.4, 0.64), ("x2", 0.5, 0.5)]
    assert [a.text for a in figure.layout.annotations] == ["&lt;b&gt;a&lt;/b&gt;", "b"]
    assert figure.layout.yaxis.autorange == "reversed"


def curve() -> pd.DataFrame:
    made = []
    for score, value in (
        ("member_loss", [0.0, 0.5, 0.5, 1.0]),
        ("member_mink", [0.4, 0.4, 0.9, 1.0]),
    ):
        made.append(
            rows(
                "tpr_at_fpr",
                value,
                run="r",
                lo=np.array(value) / 2,
                hi=1.0,
                n=9,
                beside={"score": score, "fpr": [0, 0.25, 0.5, 1.0], "resolution": 0.25},
            )
        )
    return pd.concat(made)


def test_curves_are_steps_with_chance_and_a_zone_that_cannot_be_shown():
    figure = plot_roc(curve().sample(frac=1, random_state=0).sort_values("score", kind="stable"))
    lines = {
        (t.name, t.xaxis): t for t in figure.data if t.name and t.mode == "lines" and t.fill is None
    }
    linear = lines["loss attack score", "x"]
    np.testing.assert_allclose(linear.x, [0, 0.25, 0.25, 0.5, 0.5, 1, 1])
    np.testing.assert_allclose(linear.y, [0, 0, 0.5, 0.5, 0.5, 0.5, 1])
    # on logarithmic axes rates of 0 stand at the left edge, a tenth here, and shares of 0 nowhere
    logarithmic = lines["loss attack score", "x2"]
    np.testing.assert_allclose(logarithmic.x, [0.25, 0.5, 0.5, 1, 1])
    np.testing.assert_allclose(lines["Min-K score", "x2"].x[:2], [0.1, 0.25])
    np.testing.assert_allclose(lines["Min-K score", "x2"].y[:2], [0.4, 0.4])
    assert (figure.layout.xaxis2.type, figure.layout.yaxis2.type) == ("log", "log")
    assert figure.layout.xaxis.type is None
    for axis in ("x", "x2"):
        chance = lines["chance", axis]
        assert list(chance.x) == list(chance.y)
    assert [(s.xref, s.x0, s.x1) for s in figure.layout.shapes] == [
        ("x", 0, 0.25),
        ("x2", 0.1, 0.25),
    ]
    bands = [t for t in figure.data if t.fill == "toself"]
    assert len(bands) == 4
    corner = bands[0]
    np.testing.assert_allclose(corner.x[:7], linear.x)
    np.testing.assert_allclose(corner.y[-7:][::-1], np.array(linear.y) / 2)
    assert len({lines[name, "x"].line.dash for name in ("loss attack score", "Min-K score")}) == 2


def test_refusals():
    roc, auc = curve(), areas()
    for function, table, message in (
        (plot_auc, roc, "plot_auc: the table has no rows of auc; it has tpr_at_fpr"),
        (
            plot_auc,
            auc.assign(step=[0, 1, 2, 3, 4, 5], kind="b"),
            "plot_auc: several rows per (kind, score); select one step or dose",
        ),
        (plot_roc, auc[auc["metric"] == "auc"], "plot_roc: the table has no rows of tpr_at_fpr; it has auc"),
        (plot_roc, roc.assign(value=NAN, lo=NAN, hi=NAN), "plot_roc: no curve has values; the reason column says why"),
        (
            plot_roc,
            pd.concat([roc, roc.assign(step=3)]),
            "plot_roc: several rows per (score, fpr); select one run, step and kind",
        ),
    ):  # fmt: skip
        with pytest.raises(InputError) as error:
            function(table)
        assert str(error.value) == message
