"""The grey zone: what texts without memory would have given."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from workbench.stats.floors import add_floor, floor_zone
from workbench.stats.summarise import summarise
from workbench.table import InputError, rows


def items(metric, groups):
    parts = []
    for group, values in groups.items():
        names = [f"{group}{k}" for k in range(len(values))]
        parts.append(rows(metric, values, run="r", group=group, item=names))
    return pd.concat(parts, ignore_index=True)


def test_a_mean_by_hand():
    # s = .5, t(3) at .975 = 3.182446, half = 3.182446 * .5 * sqrt(1/4 + 1/4) = 1.125165
    mean, low, high = floor_zone(np.array([0.0, 0, 0, 1]), 4, metric="outcome")
    assert mean == 0.25
    assert (low, high) == pytest.approx((0.25 - 1.125165, 0.25 + 1.125165), abs=1e-6)


def test_a_share_by_hand():
    # Jeffreys with 0 of 2 right: Beta(.5, 2.5). For one further text P(right) = .5 / 3 = 1 / 6,
    # so 0 covers .8333 < .975 and the upper end is 1 of 1; at level .5 it is 0 of 1.
    controls = np.zeros(2)
    assert floor_zone(controls, 1, metric="extractable") == (0.0, 0.0, 1.0)
    assert floor_zone(controls, 1, metric="extractable", level=0.5) == (0.0, 0.0, 0.0)
    # many controls, none right: a single right one of ten texts already lies outside
    assert floor_zone(np.zeros(2000), 10, metric="extractable")[2] == 0.0


def test_a_share_that_is_no_verdict_has_students_interval_cut_to_its_range():
    mean, low, high = floor_zone(np.array([0.0, 0.1, 0.2]), 1, metric="top1")
    half = stats.t.ppf(0.975, 2) * 0.1 * np.sqrt(1 + 1 / 3)
    assert (mean, low, high) == pytest.approx((0.1, 0.0, 0.1 + half))
    # nor does it become one where no control has a token right
    assert floor_zone(np.zeros(9), 3, metric="top1") == (0.0, 0.0, 0.0)


def test_too_few_controls():
    assert np.isnan(floor_zone(np.array([]), 3, metric="outcome")).all()
    mean, low, high = floor_zone(np.array([2.0]), 3, metric="outcome")
    assert mean == 2.0 and np.isnan(low) and np.isnan(high)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_the_zone_holds_fresh_controls(n):
    # 2,000 repetitions at .95: the standard error is .0049, four of them .02
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        _, low, high = floor_zone(rng.normal(size=12), n, metric="outcome")
        inside += low <= rng.normal(size=n).mean() <= high
    assert inside / 2000 == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_the_zone_of_a_share_holds_fresh_controls(share):
    # discrete, and Jeffreys' prior covers about, not at least, the level: within .90 and 1
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        controls = (rng.random(30) < share).astype(float)
        _, low, high = floor_zone(controls, 20, metric="extractable")
        inside += low <= (rng.random(20) < share).mean() <= high
    assert inside / 1000 > 0.9


def test_each_number_meets_the_controls_of_its_stratum():
    table = items("outcome", {"seen": [5.0, 6.0, 7.0], "never": [0.0, 1.0], "unseen": [1.0, 2.0]})
    table["kind"] = ["a", "a", "b", "a", "a", "b", "b"]
    pooled = summarise(table, by=["run", "step", "group", "metric", "kind"], seed=0)
    found = add_floor(pooled, table, strata=["kind"]).set_index(["group", "kind"])
    assert found.loc[("seen", "a"), "floor"] == 0.5 and found.loc[("seen", "b"), "floor"] == 1.5
    # of two texts: s = .7071068, t(1) = 12.706205, sqrt(1/2 + 1/2) = 1 -> half 8.984643
    assert found.loc[("seen", "a"), "floor_hi"] == pytest.approx(0.5 + 8.984643, abs=1e-5)
    whole = add_floor(pooled, table).set_index(["group", "kind"])
    assert whole.loc[("seen", "a"), "floor"] == 1.0


def test_missing_scores_are_no_controls():
    table = items("outcome", {"seen": [5.0], "never": [1.0, np.nan, 3.0]})
    found = add_floor(summarise(table, by=["run", "step", "group", "metric"], seed=0), table)
    assert found["floor"].tolist() == [2.0, 2.0]


def test_errors():
    table = items("outcome", {"seen": [5.0], "other": [1.0]})
    pooled = summarise(table, by=["run", "step", "group", "metric"], seed=0)
    with pytest.raises(
        InputError,
        match="^add_floor: no text of the groups never, unseen; there are other, seen. Name those",
    ):
        add_floor(pooled, table)
    with pytest.raises(InputError, match="^add_floor: the summary has no column 'kind'$"):
        add_floor(pooled, table, controls=["other"], strata=["kind"])
    with pytest.raises(InputError, match="^add_floor: level is 2, it must lie between 0 and 1$"):
        add_floor(pooled, table, level=2)
