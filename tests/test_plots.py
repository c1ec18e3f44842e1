from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from workbench.plots import (
    plot_dose,
    plot_event_study,
    plot_forgetting,
    plot_groups,
    plot_laws,
    plot_profile,
)
from workbench.table import InputError, rows

NAN = np.nan


def cells() -> pd.DataFrame:
    """Two cohorts, at updates 9 and 30, over checkpoints 10, 20, 40."""
    return rows(
        "memorization",
        [2.0, 1.0, 0.1, -0.2, 0.3, 1.5],
        run="r",
        step=[10, 20, 40, 10, 20, 40],
        lo=[1.5, 0.5, -0.3, -0.5, NAN, 1.0],
        hi=[2.5, 1.5, 0.5, 0.1, NAN, 2.0],
        n=[4, 4, 4, 7, 7, 7],
        beside={"cohort": [9.0, 9, 9, 30, 30, 30], "lag": [1.0, 11, 31, -20, -10, 10]},
    ).assign(metric=["memorization"] * 3 + ["placebo"] * 2 + ["memorization"])


def test_profile_draws_what_the_table_holds():
    figure = plot_profile(cells().sample(frac=1, random_state=0))
    heat = figure.data[0]
    np.testing.assert_allclose(heat.z, [[2.0, 1.0, 0.1], [-0.2, 0.3, 1.5]])
    assert (heat.zmin, heat.zmax) == (-2.0, 2.0)
    assert list(figure.layout.xaxis.ticktext) == ["10", "20", "40"]
    assert list(figure.layout.yaxis.ticktext) == ["9 (n=4)", "30 (n=7)"]
    marks = {t.name: sorted(zip(t.x, t.y, strict=True)) for t in figure.data[1:]}
    assert marks == {"band includes 0": [(0, 1), (2, 0)], "no error known": [(1, 1)]}
    # cohort 30's first exposure lies between checkpoints 20 and 40, cohort 9's before all
    assert [(s.x0, s.y0) for s in figure.layout.shapes] == [(-0.5, -0.5), (1.5, 0.5)]


def test_event_study_places_and_labels_lags():
    table = pd.concat([cells().iloc[[0, 1, 2]], cells().iloc[[3, 4]]]).assign(kind="<b>verse</b>")
    figure = plot_event_study(table, color="kind")
    after = next(t for t in figure.data if t.name == "&lt;b&gt;verse&lt;/b&gt;")
    # lags 1, 11, 31 at log10 of 2, 12, 32; -20 and -10 mirrored
    np.testing.assert_allclose(after.x, np.log10([2, 12, 32]))
    np.testing.assert_allclose(after.y, [2.0, 1.0, 0.1])
    before = next(t for t in figure.data if t.name and t.name.endswith("placebo"))
    np.testing.assert_allclose(before.x, [-math.log10(21), -math.log10(11)])
    assert before.marker.symbol.endswith("-open")
    labels = dict(zip(figure.layout.xaxis.ticktext, figure.layout.xaxis.tickvals, strict=True))
    np.testing.assert_allclose(labels["\N{MINUS SIGN}20"], -math.log10(21))
    np.testing.assert_allclose(labels["31"], math.log10(32))


def points() -> pd.DataFrame:
    return rows(
        "memorization",
        [3.0, 2.0, 1.0, 2.5, 1.5, 0.5],
        run="r",
        group=["<i>a</i>"] * 3 + ["b"] * 3,
        lo=[2.8, 1.8, 0.8, NAN, NAN, NAN],
        hi=[3.2, 2.2, 1.2, NAN, NAN, NAN],
        beside={"lag": [0.0, 9, 99] * 2},
    )


def fits() -> pd.DataFrame:
    made = []
    for group in ("<i>a</i>", "b"):
        for law, weight, life in (("power", 0.75, 12.0), ("semilog", 0.25, math.inf)):
            curve = rows(
                "fitted", [3.1, 1.1], run="r", group=group, lo=[3.0, 1.0], hi=[3.2, 1.2],
                beside={"lag": [0.0, 99.0]},
            )  # fmt: skip
            one = rows("weight", weight, run="r", group=group, beside={"lag": NAN})
            two = rows(
                "half_life",
                life,
                run="r",
                group=group,
                lo=life / 2,
                hi=life * 2,
                beside={"lag": NAN},
            )
            made.append(pd.concat([curve, one, two]).assign(law=law))
    return pd.concat(made, ignore_index=True)


def test_forgetting_has_a_panel_per_curve():
    figure = plot_forgetting(points(), fits())
    titles = [a.text for a in figure.layout.annotations]
    assert titles == ["&lt;i&gt;a&lt;/i&gt;", "b"]
    measured = [t for t in figure.data if t.name == "measured"]
    assert [list(t.x) for t in measured] == [[1, 10, 100]] * 2
    assert [list(t.y) for t in measured] == [[3.0, 2.0, 1.0], [2.5, 1.5, 0.5]]
    lines = [t for t in figure.data if t.mode == "lines" and t.name]
    assert [t.name for t in lines] == ["power", "semilog"] * 2
    # the law with the largest weight is thick and alone has a band
    assert [t.line.width for t in lines] == [3, 1.3] * 2
    assert sum(t.fill == "toself" for t in figure.data) == 2
    assert figure.layout.xaxis.type == "log"
    assert figure.layout.xaxis.ticktext[0] == "0"
    only = plot_forgetting(points(), fits(), laws=["semilog"])
    assert {t.name for t in only.data if t.mode == "lines" and t.name} == {"semilog"}


def test_laws_are_compared():
    figure = plot_laws(fits())
    assert [(t.name, list(t.x)) for t in figure.data] == [
        ("power", [0.75, 0.75]),
        ("semilog", [0.25, 0.25]),
    ]
    assert figure.layout.barmode == "stack"
    assert list(figure.layout.yaxis.ticktext) == ["&lt;i&gt;a&lt;/i&gt;", "b"]
    lives = plot_laws(fits(), metric="half_life")
    assert [list(t.x) for t in lives.data] == [[12.0, 12.0], []]
    assert [a.text for a in lives.layout.annotations] == ["semilog: never"] * 2
    assert lives.layout.xaxis.type == "log"
    np.testing.assert_allclose(lives.data[0].error_x.array, [12.0, 12.0])
    np.testing.assert_allclose(lives.data[0].error_x.arrayminus, [6.0, 6.0])


def test_refusals():
    for message, draw in (
        (
            'plot_profile: needs cells; give what memorization_profile(by="cell") does',
            lambda: plot_profile(points()),
        ),
        (
            "plot_profile: several rows per (cohort, step); select one stratum",
            lambda: plot_profile(pd.concat([cells().assign(kind=k) for k in "ab"])),
        ),
        (
            "plot_event_study: no column 'kind'; there are run, step, group, item, metric, value, "
            "lo, hi, n, cohort, lag",
            lambda: plot_event_study(cells(), color="kind"),
        ),
        (
            'plot_event_study: needs effects by lag; give what memorization_profile(by="lag") does',
            lambda: plot_event_study(cells().assign(lag=NAN)),
        ),
        (
            "plot_event_study: several rows per (group, lag); select one of them",
            lambda: plot_event_study(cells().assign(lag=1.0)),
        ),
        (
            "plot_forgetting: several points per (group, lag); summarise first",
            lambda: plot_forgetting(pd.concat([points().assign(kind=k) for k in "ab"]), fits()),
        ),
        (
            "plot_forgetting: no fits of 'gompertz'; there are power, semilog",
            lambda: plot_forgetting(points(), fits(), laws=["gompertz"]),
        ),
        (
            "plot_forgetting: no fits of group=b; fit them or leave it out",
            lambda: plot_forgetting(points(), fits()[fits()["group"] != "b"]),
        ),
        (
            "plot_forgetting: fits have no column 'law'; run, step, group, item, metric, value, lo, "
            "hi, n, lag",
            lambda: plot_forgetting(
                points(), fits().drop(columns="law").drop_duplicates(["group", "metric", "lag"])
            ),
        ),
        (
            "plot_laws: the table has no rows of rmse; it has fitted, half_life, weight",
            lambda: plot_laws(fits(), metric="rmse"),
        ),
        (
            "plot_laws: several rows per (group, law); select one of them",
            lambda: plot_laws(pd.concat([fits().assign(kind=k) for k in "ab"])),
        ),
    ):
        with pytest.raises(InputError) as error:
            draw()
        assert str(error.value) == message


# --- what texts without memory would give ---------------------------------------------------------


def doses() -> pd.DataFrame:
    """Kind a at 1 and 4 exposures of two runs, kind b at 2 of one, with floors."""
    return rows(
        "top1",
        [0.5, 0.9, 0.3, 0.4, 0.6],
        run=["r", "r", "s", "s", "r"],
        lo=[0.4, 0.8, 0.2, 0.3, 0.5],
        hi=[0.6, 1.0, 0.4, 0.5, 0.7],
        n=[8, 6, 8, 4, 5],
        beside={
            "kind": list("aaaab"), "dose": [1, 4, 1, 4, 2], "floor": [0.2, 0.2, 0.2, 0.2, 0.1],
            "floor_lo": [0.15, 0.12, 0.15, 0.1, 0.0], "floor_hi": [0.25, 0.28, 0.25, 0.3, 0.35],
        },
    )  # fmt: skip


def test_dose_draws_points_and_the_zone_of_texts_without_memory():
    figure = plot_dose(doses().sample(frac=1, random_state=1))
    drawn = {(t.name, t.xaxis): t for t in figure.data if t.mode == "lines+markers"}
    assert {key: (list(t.x), list(t.y)) for key, t in drawn.items()} == {
        ("r", "x"): ([1, 4], [0.5, 0.9]), ("s", "x"): ([1, 4], [0.3, 0.4]), ("r", "x2"): ([2], [0.6])
    }  # fmt: skip
    whisker = drawn["s", "x"].error_y
    np.testing.assert_allclose([whisker.array, whisker.arrayminus], [[0.1, 0.1], [0.1, 0.1]])
    zones = [t for t in figure.data if t.fill == "toself"]
    # up along the upper edge, back along the lower; at 4 exposures the fewest texts are run s's 4
    assert [(list(z.x), list(z.y)) for z in zones] == [
        ([1, 4, 4, 1], [0.25, 0.3, 0.1, 0.15]), ([2, 2], [0.35, 0.0])
    ]  # fmt: skip
    middles = [t for t in figure.data if t.mode == "lines" and t.fill is None]
    assert [(list(m.x), list(m.y)) for m in middles] == [([1, 4], [0.2, 0.2]), ([2], [0.1])]
    assert {s.y0 for s in figure.layout.shapes} == {1.0}  # the most there is, in each panel
    assert list(figure.layout.xaxis.ticktext) == ["1", "2", "4"]
    bare = plot_dose(doses().drop(columns=["floor", "floor_lo", "floor_hi"]))
    assert all(t.fill is None for t in bare.data)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (doses().drop(columns="kind"), "no column 'kind'; there are run, step, group, item, "),
        (
            doses().head(1).assign(dose=0),
            "no row with dose above 0; controls belong into the floor",
        ),
        (
            pd.concat([doses(), doses().assign(step=3)]),
            "several rows per (dose, run, kind); summarise first",
        ),
    ],
)
def test_dose_refuses(table, said):
    with pytest.raises(InputError) as caught:
        plot_dose(table)
    assert str(caught.value).startswith(f"plot_dose: {said}")


def test_groups_stand_in_boxes_of_texts_without_memory():
    table = rows(
        "top1", [0.5, 0.0, 0.7, 0.25], run="r",
        group=["seen", "never"] * 2, lo=[0.3, 0.0, 0.6, 0.2], hi=[0.7, 0.1, 0.8, 0.3], n=[8, 9] * 2,
        beside={"floor": 0.1, "floor_lo": [0.0, 0.0, 0.2, 0.15], "floor_hi": [0.1, 0.2, 0.3, 0.35]},
    ).assign(metric=["extractable"] * 2 + ["top1"] * 2)  # fmt: skip
    figure = plot_groups(table)
    bars = {t.name: t for t in figure.data if t.base is None}
    assert list(bars["reproduced word for word"].y) == [0.5, 0.0]
    boxes = [t for t in figure.data if t.base is not None]
    assert [t.offsetgroup for t in boxes] == ["0", "1"]
    assert [list(t.base) for t in boxes] == [[0.0, 0.0], [0.2, 0.15]]
    np.testing.assert_allclose([t.y for t in boxes], [[0.1, 0.2], [0.1, 0.2]])  # heights
    assert list(boxes[0].x) == list(bars["reproduced word for word"].x) == ["seen<br>n=8", "never<br>n=9"]  # fmt: skip
    assert len(plot_groups(table.drop(columns=["floor", "floor_lo", "floor_hi"])).data) == 2
