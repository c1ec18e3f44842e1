import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.plots import plot_bits_per_parameter, plot_capacity
from workbench.stats.capacity import (
    _curve,
    bits_per_parameter,
    fills,
    fit_capacity,
    mean_interval,
    robust_error,
    saturating,
    weighted_slope,
)
from workbench.table import InputError, rows


def refuses(message):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


def made(held: dict, *, parameters=1000, gain=0.005, per=32.0) -> pd.DataFrame:
    """A table as ``load_capacity`` gives it: ``held[sequences]`` are the runs' memorized bits."""
    n = np.concatenate([np.full(len(values), n) for n, values in held.items()])
    seed = np.concatenate([np.arange(len(values)) for values in held.values()])
    table = rows(
        "memorized_bits", np.concatenate(list(held.values())), run=f"p{parameters}", step=100,
        group="random", item=[f"{a}-{b}" for a, b in zip(n, seed, strict=True)],
        beside={
            "parameters": parameters, "non_embedding": parameters // 4, "sequences": n,
            "dataset_bits": per * n, "ceiling_bits": n * (per - np.log2(n)), "seed": seed,
        },
    )  # fmt: skip
    return pd.concat([table, table.assign(metric="doubling_gain", value=gain)], ignore_index=True)


def simulated(rng, *, capacity, parameters, seeds=3, noise=0.02, sharp=6.0) -> pd.DataFrame:
    """Runs around a known capacity: the bend of ``saturating``, and noise from run to run."""
    per = 32.0
    grid = np.array([max(2, round(capacity / per * s)) for s in (0.25, 0.5, 1, 2.5, 4, 6)])
    level = ((grid * (per - np.log2(grid))) ** -sharp + capacity**-sharp) ** (-1 / sharp)
    spread = np.where(grid * per > 2 * capacity, noise, 0.1 * noise)
    value = level * (1 + spread * rng.standard_normal((seeds, len(grid))))
    return made(dict(zip(grid, value.T, strict=True)), parameters=parameters)


def told(table, metric, estimator="mean"):
    return table[(table["metric"] == metric) & (table["estimator"] == estimator)].iloc[0]


# --- the plateau ---------------------------------------------------------------------------------


def test_plateau_by_hand():
    # bits of data 32 and 64 are memorized nearly whole; 320 and 640 are above twice 100, so the
    # plateau is the mean of 98, 102, 101, 103 = 101, standard deviation 2.160247, error 1.080123,
    # t(3) = 3.182446: half-width 3.437434
    table = fit_capacity(made({1: [31, 31], 2: [60, 61], 10: [98, 102], 20: [101, 103]}))
    mean = told(table, "capacity_bits")
    assert mean["value"] == 101 and mean["n"] == 4 and mean["bound"] == ""
    assert mean["se"] == pytest.approx(1.0801234, abs=1e-6)
    assert mean["hi"] - 101 == pytest.approx(3.4374345, abs=1e-5)
    assert 101 - mean["lo"] == pytest.approx(3.4374345, abs=1e-5)
    # one doubling of the data, 100 to 102 in the mean: 2 / 101. Squared residuals 4, 4, 1, 1 make
    # the slope's error sqrt(10 / 2 / 1), t(2) = 4.302653: half-width 9.621024 / 101
    trend = told(table, "plateau_trend")
    assert trend["value"] == pytest.approx(2 / 101)
    assert trend["hi"] - trend["value"] == pytest.approx(9.621024 / 101, abs=1e-7)
    assert trend["value"] - trend["lo"] == pytest.approx(9.621024 / 101, abs=1e-7)


def test_twice_what_is_memorized_fills_and_a_bit_less_does_not():
    # 64 bits of data: half of them is 32 in the mean over seeds, though not in each
    table = made({2: [30, 34], 3: [30, 30], 4: [65, 64]})
    assert fills(table[table["metric"] == "memorized_bits"]) == [2, 3]
    table = made({2: [30, 34.1], 3: [48, 48]})
    assert fills(table[table["metric"] == "memorized_bits"]) == [3]


def test_mean_interval():
    # 1, 2, 3: mean 2, error 1 / sqrt 3, t(2) = 4.302653
    got = mean_interval(np.array([1.0, 2, 3, np.nan]), 0.95)
    assert got["value"] == 2 and got["n"] == 3
    assert got["hi"] - 2 == pytest.approx(2.484138, abs=1e-6)
    assert mean_interval(np.array([5.0]), 0.95) == {
        "value": 5.0, "n": 1, "reason": "one run: no interval"
    }  # fmt: skip
    assert mean_interval(np.array([np.nan]), 0.95) == {"reason": "no run has a value"}


def test_saturating_at_its_bend_and_ends():
    log_c = np.log(100.0)
    # at K = C: C / 2^(1/k)
    for k in (1.0, 2.0, 8.0):
        got = np.exp(saturating(np.array([log_c]), log_c, np.log(k)))
        assert got[0] == pytest.approx(100 / 2 ** (1 / k))
    # k = 1 is the harmonic sum: 300 and 100 give 75
    assert np.exp(saturating(np.log([300.0]), log_c, 0.0))[0] == pytest.approx(75.0)
    ends = np.exp(saturating(np.log([1e-3, 1e9]), log_c, np.log(8.0)))
    np.testing.assert_allclose(ends, [1e-3, 100.0], rtol=1e-6)


def test_the_curve_finds_what_made_it_without_noise():
    rng = np.random.default_rng(0)
    table = fit_capacity(simulated(rng, capacity=9000.0, parameters=3000, noise=0.0))
    curve = told(table, "capacity_bits", "curve")
    assert curve["value"] == pytest.approx(9000, rel=1e-6)
    # the mean lies where the bend of sharpness 6 leaves it, a little below
    assert 0.99 * 9000 < told(table, "capacity_bits")["value"] < 9000


def test_intervals_cover_a_known_capacity_and_slope():
    # 95 % intervals in 400 experiments: fewer than 364 inside is one in 1,500 for an exact one
    rng = np.random.default_rng(1)
    inside = np.zeros(2)
    for _ in range(400):
        p, runs = np.array([2000.0, 5000, 9000]), np.array([4, 6, 9])
        each = [mean_interval(3 * q + 200 * rng.standard_normal(n), 0.95)
                for q, n in zip(p, runs, strict=True)]  # fmt: skip
        inside[0] += each[1]["lo"] <= 15000 <= each[1]["hi"]
        c, se = (np.array([one[name] for one in each]) for name in ("value", "se"))
        slope = weighted_slope(p, c, se, runs, 0.95)
        inside[1] += slope["lo"] <= 3.0 <= slope["hi"]
    assert (inside >= 364).all() and (inside < 400).all(), inside


def test_the_curves_interval_covers_a_known_capacity():
    # with errors that take all runs for equally noisy 85 % were inside; fewer than 91 of 100 is
    # one in 14 for an exact interval, and this seed has more
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(100):
        table = simulated(rng, capacity=15000.0, parameters=5000)
        got = _curve(table[table["metric"] == "memorized_bits"], 0.95)
        inside += got["lo"] <= 15000 <= got["hi"]
    assert 91 <= inside < 100, inside


def test_capacity_and_slope_are_recovered_from_tables():
    rng = np.random.default_rng(3)
    parts = [simulated(rng, capacity=3.0 * p, parameters=p, sharp=40.0) for p in (2000, 5000, 9000)]
    capacities = fit_capacity(pd.concat(parts))
    both = capacities[capacities["metric"] == "capacity_bits"]
    np.testing.assert_allclose(both["value"] / both["parameters"], 3.0, rtol=0.02)
    slopes = bits_per_parameter(capacities)
    slope = slopes[(slopes["of"] == "slope") & (slopes["count"] == "all")].iloc[0]
    assert slope["lo"] < 3.0 < slope["hi"] and slope["hi"] - slope["lo"] < 0.3


def test_errors_that_allow_for_unequal_noise_by_hand():
    # residuals -1, 0, 1 of the mean of three: leverage 1/3 each, (1/3)^2 * (1.5^2 + 1.5^2) = 1/2
    ones = np.ones((3, 1))
    assert robust_error(ones, np.array([-1.0, 0, 1]))[0] == pytest.approx(math.sqrt(0.5))


def test_the_plateau_is_no_maximum_over_noise():
    # ten runs of standard deviation 2 %: their maximum is 3 % too high, their mean is not
    rng = np.random.default_rng(2)
    tables = [made({2: [63, 63], 10: 80 * (1 + 0.02 * rng.standard_normal(10))}) for _ in range(30)]
    means = [told(fit_capacity(t), "capacity_bits")["value"] for t in tables]
    most = [t.loc[t["metric"] == "memorized_bits", "value"].max() for t in tables]
    # the mean of thirty means of ten has an error of .09
    assert np.mean(means) == pytest.approx(80, abs=0.4) and np.mean(most) > 82


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 50.0))
def test_order_does_not_matter_and_bits_scale(seed, unit):
    rng = np.random.default_rng(seed)
    table = simulated(rng, capacity=5000.0, parameters=2000)
    shuffled = table.sample(frac=1, random_state=seed)
    capacity = told(fit_capacity(table), "capacity_bits")
    again = told(fit_capacity(shuffled), "capacity_bits")
    for name in ("value", "lo", "hi"):
        assert again[name] == pytest.approx(capacity[name], rel=1e-12)
    scaled = table.copy()
    scaled.loc[scaled["metric"] == "memorized_bits", "value"] *= unit
    scaled[["dataset_bits", "ceiling_bits"]] *= unit
    for estimator in ("mean", "curve"):
        one = told(fit_capacity(table), "capacity_bits", estimator)
        other = told(fit_capacity(scaled), "capacity_bits", estimator)
        assert other["value"] == pytest.approx(unit * one["value"], rel=1e-3)


# --- what is flagged -----------------------------------------------------------------------------


def test_training_that_was_not_done_is_a_lower_bound():
    held = {2: [60, 60], 10: [98, 102], 20: [101, 103]}
    assert told(fit_capacity(made(held, gain=0.0099)), "capacity_bits")["bound"] == ""
    assert told(fit_capacity(made(held, gain=0.0101)), "capacity_bits")["bound"] != ""
    table = fit_capacity(made(held, gain=0.034))
    assert set(table["bound"]) == {"lower bound: doubling the updates still gained 3.4%"}
    assert told(table, "doubling_gain")["value"] == pytest.approx(0.034)


def test_a_plateau_that_falls_or_rises_is_a_lower_bound():
    table = fit_capacity(made({2: [60, 60], 10: [100, 101], 20: [89, 90]}))
    # 100.5 to 89.5 by one doubling: 11 of a mean of 95
    assert told(table, "plateau_trend")["value"] == pytest.approx(-11 / 95)
    assert set(table["bound"]) == {"lower bound: doubling the data lost 11.6%"}
    rising = fit_capacity(made({2: [60, 60], 10: [89, 90], 20: [100, 101]}))
    assert set(rising["bound"]) == {"lower bound: doubling the data still gained 11.6%"}


def test_without_a_filling_data_set_there_is_no_capacity():
    table = fit_capacity(made({1: [31, 31], 2: [60, 61]}))
    assert table["value"].isna().all() and (table["n"] == 0).all()
    assert set(table["reason"]) == {
        "no data set is twice what was memorized of it; add larger ones"
    }
    slopes = bits_per_parameter(table)
    assert slopes["value"].isna().all()
    assert "a slope needs models of two sizes" in set(slopes["reason"].astype(str))


def test_one_run_has_no_interval():
    table = fit_capacity(made({2: [60], 10: [98]}))
    mean = told(table, "capacity_bits")
    assert mean["value"] == 98 and math.isnan(mean["lo"])
    assert mean["reason"] == "one run: no interval"
    trend = told(table, "plateau_trend")
    assert math.isnan(trend["value"])
    assert trend["reason"] == "a trend needs three runs on two sizes of data"
    curve = told(table, "capacity_bits", "curve")
    assert curve["reason"] == "the curve needs four runs that memorized something"


# --- bits per parameter --------------------------------------------------------------------------


def test_secant_by_hand():
    # (8 - 2) / (3 - 1) = 3, its error sqrt(.3^2 + .4^2) / 2 = .25
    p, c, se = np.array([1.0, 3]), np.array([2.0, 8]), np.array([0.3, 0.4])
    got = weighted_slope(p, c, se, np.array([5, 5]), 0.95)
    assert got["value"] == 3 and got["se"] == pytest.approx(0.25)
    # Welch and Satterthwaite: (.09 + .16)^2 / (.0081 / 4 + .0256 / 4) = 7.418398; t = 2.337846
    assert got["hi"] - 3 == pytest.approx(0.25 * 2.3378, abs=2e-4)


def test_slope_of_three_is_the_least_squares_line():
    p, c = np.array([1.0, 2, 4]), np.array([3.0, 5, 12])
    got = weighted_slope(p, c, np.array([0.1, 0.1, 0.1]), np.array([4, 4, 4]), 0.95)
    assert got["value"] == pytest.approx(np.polyfit(p, c, 1)[0])
    # equal errors: se / sqrt(Sxx), Sxx = 14/3
    assert got["se"] == pytest.approx(0.1 / math.sqrt(14 / 3))


def test_slope_ends():
    p, c, n = np.array([1.0, 3]), np.array([2.0, 8]), np.array([5, 5])
    sure = weighted_slope(p, c, np.zeros(2), n, 0.95)
    assert (sure["lo"], sure["value"], sure["hi"]) == (3, 3, 3)
    single = weighted_slope(p, c, np.array([np.nan, 1]), np.array([1, 5]), 0.95)
    assert single["value"] == 3 and single["reason"] == "a model has one run: no interval"


def two_sizes():
    one = made({2: [60, 61], 10: [98, 102], 20: [101, 103]}, parameters=40)
    two = made({4: [110, 111], 20: [198, 202], 40: [201, 203]}, parameters=80, gain=0.05)
    return pd.concat([one, two], ignore_index=True)


def test_bits_per_parameter_by_hand():
    slopes = bits_per_parameter(fit_capacity(two_sizes()))
    of = {
        (row["of"], row["count"], row["run"]): row
        for row in slopes.astype({"run": str}).to_dict("records")
    }
    assert of["model", "all", "p40"]["value"] == pytest.approx(101 / 40)
    assert of["model", "non_embedding", "p80"]["value"] == pytest.approx(201 / 20)
    assert of["slope", "all", "all"]["value"] == pytest.approx(100 / 40)
    assert of["slope", "non_embedding", "all"]["value"] == pytest.approx(100 / 10)
    assert of["slope", "all", "all"]["at_parameters"] == 60
    assert of["slope", "all", "all"]["at_bits"] == 151 and of["slope", "all", "all"]["n"] == 8
    # both errors are 1.080123 in bits
    assert of["slope", "all", "all"]["se"] == pytest.approx(1.080123 * math.sqrt(2) / 40, abs=1e-6)
    assert of["model", "all", "p40"]["bound"] == ""
    assert of["model", "all", "p80"]["bound"].startswith("lower bound: doubling the updates")
    assert of["slope", "all", "all"]["bound"] == "between lower bounds: either side"


@pytest.mark.parametrize("ask", [fit_capacity, bits_per_parameter])
def test_levels_refused(ask):
    with refuses(f"{ask.__name__}: level is 1, it must lie between 0 and 1"):
        ask(two_sizes(), level=1)


def test_tables_refused():
    table = two_sizes()
    with refuses("fit_capacity: no ceiling_bits; give the table of load_capacity"):
        fit_capacity(table.drop(columns="ceiling_bits"))
    with refuses("fit_capacity: no doubling_gain; give the table of load_capacity"):
        fit_capacity(table[table["metric"] == "memorized_bits"])
    longer = table[table["run"] == "p40"].assign(step=200)
    with refuses(
        "fit_capacity: p40 was trained for 100 and for 200 updates; fit one of them at a time"
    ):
        fit_capacity(pd.concat([table, longer]))
    with refuses("bits_per_parameter: no capacity_bits; give the table of fit_capacity"):
        bits_per_parameter(table)


# --- figures -------------------------------------------------------------------------------------


def test_the_figure_shows_runs_plateau_and_diagonal():
    table = two_sizes()
    capacities = fit_capacity(table)
    figure = plot_capacity(table, capacities)
    traces = {trace.name: trace for trace in figure.data if trace.name}
    diagonal = traces["all of the data"]
    assert list(diagonal.x) == list(diagonal.y) == sorted(diagonal.x)
    ceiling = traces["the most any model can hold"]
    assert (np.array(ceiling.y) < np.array(ceiling.x)).all()
    points = traces["40 parameters"]
    assert sorted(points.y) == [60, 61, 98, 101, 102, 103]
    assert "80 parameters (lower bound)" in traces
    flat = [t for t in figure.data if t.mode == "lines" and list(t.y) == [101.0, 101.0]]
    assert len(flat) == 1 and list(flat[0].x) == [101.0, 640.0]


def test_the_figure_of_sizes_draws_the_line_it_names():
    capacities = fit_capacity(two_sizes())
    slopes = bits_per_parameter(capacities)
    figure = plot_bits_per_parameter(capacities, slopes)
    (line,) = [t for t in figure.data if str(t.name).startswith("slope")]
    assert (line.y[1] - line.y[0]) / (line.x[1] - line.x[0]) == pytest.approx(2.5)
    assert np.interp(60, line.x, line.y) == pytest.approx(151)
    assert line.name.startswith("slope 2.50 [") and "3.6 bits" in figure.data[-1].name
    outside = plot_bits_per_parameter(capacities, slopes, count="non_embedding")
    assert not any("3.6" in str(t.name) for t in outside.data)
    (points, _) = [t for t in outside.data if t.mode == "markers"]
    assert sorted(points.x) == [10, 20]
    with refuses("plot_bits_per_parameter: count 'some'; choose all or non_embedding"):
        plot_bits_per_parameter(capacities, slopes, count="some")
    with refuses(
        "plot_capacity: the table has no rows of memorized_bits; it has capacity_bits, "
        "doubling_gain, plateau_trend"
    ):
        plot_capacity(capacities, capacities)
