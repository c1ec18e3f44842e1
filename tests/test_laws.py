from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares

from workbench.stats.laws import (
    DEFAULT_LAWS,
    LAWS,
    _points,
    akaike_weights,
    best_fit,
    corrected_akaike,
    ebbinghaus_savings,
    fit_forgetting,
    fit_law,
    half_life,
    power,
    wickelgren,
)
from workbench.table import InputError, rows, validate

TIMES = np.array([1, 2, 4, 8, 16, 32, 64, 128.0])
TRUE = {
    "exponential": (3.0, 20.0),
    "exponential_floor": (3.0, 20.0, 0.5),
    "power": (3.0, 0.5, 0.6),
    "wickelgren": (3.0, 0.5, 0.4, 0.005),
    "logarithm": (3.0, 0.4, 2.0),
    "semilog": (3.0, 0.9),
    "ebbinghaus_savings": (100.0, 1.84, 1.25),
    "shifted_power": (-0.5, 2.0, 0.3, 4.0),
}


def pooled(value, t=TIMES, *, se=None, group="g") -> pd.DataFrame:
    beside = {"lag": t} | ({} if se is None else {"se": se})
    return rows("memorization", value, run="r", step=500, group=group, n=9, beside=beside)


def of(fits: pd.DataFrame, metric: str, law: str) -> pd.DataFrame:
    return fits[(fits["metric"] == metric) & (fits["law"] == law)]


# --- the laws by hand -----------------------------------------------------------------------------


def test_laws_by_hand():
    # METRICS section 7: (1 + 3)^-.5 = .5; times e^(-.3) = .3704091;
    # 184 / (1^1.25 + 1.84) = 64.78873
    assert power(3.0, 1.0, 1.0, 0.5) == 0.5
    np.testing.assert_allclose(wickelgren(3.0, 1.0, 1.0, 0.5, 0.1), 0.3704091, atol=1e-7)
    np.testing.assert_allclose(ebbinghaus_savings(10.0, 100.0, 1.84, 1.25), 64.78873, atol=1e-5)
    # 3 - .4 ln(1 + 6/2) = 2.4454823; 3 - .9 * 2 = 1.2; 2 e^-1 + .5 = 1.2357589;
    # 4 - .5 * (2 + 14)^.25 = 3
    np.testing.assert_allclose(LAWS["logarithm"].curve(6.0, 3, 0.4, 2.0), 2.4454823, atol=1e-7)
    np.testing.assert_allclose(LAWS["semilog"].curve(100.0, 3, 0.9), 1.2)
    np.testing.assert_allclose(LAWS["exponential_floor"].curve(9.0, 2, 9.0, 0.5), 1.2357589)
    np.testing.assert_allclose(LAWS["shifted_power"].curve(14.0, -0.5, 2.0, 0.25, 4.0), 3.0)


def test_half_lives_by_hand():
    # exponential: s ln 2; power: (2^(1/p) - 1)/b = (2^2 - 1)/.5 = 6; semilog from r(1) = 3:
    # 10^(3 / (2 * .75)) = 100; logarithm: 2 (e^(3 / 1.5) - 1) = 12.778112;
    # floor: (3 e^(-t/20) + 1) = 2 at t = -20 ln(1/3) = 21.972246;
    # Ebbinghaus: log10(t)^2 = 4 at t = 100; shifted: 4 - (t + 1)^.5 = 1.5 at t = 5.25.
    def half(law, *params):
        return half_life(LAWS[law], np.array([params], dtype=float))[0]

    np.testing.assert_allclose(half("exponential", 3, 20), 20 * np.log(2))
    np.testing.assert_allclose(half("power", 3, 0.5, 0.5), 6)
    np.testing.assert_allclose(half("semilog", 3, 0.75), 100)
    np.testing.assert_allclose(half("logarithm", 3, 0.75, 2), 12.778112, atol=1e-6)
    np.testing.assert_allclose(half("exponential_floor", 3, 20, 1), 21.972246, atol=1e-6)
    np.testing.assert_allclose(half("ebbinghaus_savings", 100, 4, 2), 100)
    np.testing.assert_allclose(half("shifted_power", -1, 1, 0.5, 4), 5.25)
    # the floor lies above half: 1 e^.. + 2 never falls to 1.5; a rising line never halves
    assert half("exponential_floor", 1, 20, 2) == np.inf
    assert half("semilog", 3, -1) == np.inf
    assert half("shifted_power", 1, 1, 0.5, 4) == np.inf
    assert np.isnan(half("exponential", -3, 20))


@pytest.mark.parametrize("name", list(TRUE))
def test_half_life_halves_the_curve(name):
    law, params = LAWS[name], np.array([TRUE[name]])
    at = half_life(law, params)[0]
    start = law.curve(np.array(law.start), *params[0])
    np.testing.assert_allclose(law.curve(at, *params[0]), start / 2, rtol=1e-9)


@pytest.mark.parametrize("name", list(TRUE))
def test_slopes_are_the_derivatives(name):
    law, params = LAWS[name], np.array(TRUE[name])
    slopes = law.slopes(TIMES, *params)
    for index, slope in enumerate(slopes):
        step = np.zeros(len(params))
        step[index] = 1e-6 * params[index]
        rise = law.curve(TIMES, *(params + step)) - law.curve(TIMES, *(params - step))
        np.testing.assert_allclose(
            slope * np.ones(len(TIMES)), rise / (2 * step[index]), rtol=1e-6, atol=1e-8
        )


# --- fitting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TRUE))
@pytest.mark.parametrize("weighted", [False, True])
def test_noiseless_laws_are_recovered(name, weighted):
    value = LAWS[name].curve(TIMES, *TRUE[name])
    weight = np.linspace(1, 40, len(TIMES)) if weighted else np.ones(len(TIMES))
    got = best_fit(LAWS[name], TIMES, value, weight)
    np.testing.assert_allclose(got, TRUE[name], rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(sorted(TRUE)),
    t_scale=st.sampled_from([1.0, 3.0, 1000.0]),
    y_scale=st.sampled_from([1.0, 1e-3, 50.0]),
)
def test_no_worse_than_scipy_from_the_truth(seed, name, t_scale, y_scale):
    law, rng = LAWS[name], np.random.default_rng(seed)
    t = TIMES * t_scale
    value = y_scale * (np.array([3, 2.6, 2.1, 1.8, 1.2, 0.9, 0.5, 0.3]) + 0.1 * rng.normal(size=8))
    weight = rng.uniform(0.5, 2, size=8)
    ours = best_fit(law, t, value, weight)
    loss = (weight * (value - law.curve(t, *ours)) ** 2).sum()
    low, high = np.full(len(ours), -np.inf), np.full(len(ours), np.inf)
    for index, key in enumerate(law.order):
        if key in law.bounds:
            low[index], high[index] = law.bounds[key](t[0], t[-1])
    for start in (ours, np.clip(np.array(TRUE[name]), low, high)):
        other = least_squares(
            lambda p: np.sqrt(weight) * (value - law.curve(t, *p)),
            np.clip(start, low * (1 + 1e-9), high * (1 - 1e-9)),
            bounds=(low, high),
            x_scale=np.abs(start) + 1e-12,
            xtol=1e-12,
            ftol=1e-12,
        )
        assert loss <= 2 * other.cost * (1 + 1e-4) + 1e-12 * y_scale**2


def test_weights_pull_the_curve_to_sure_points():
    # A line in log10 t through (1, 3), (10, 2), (100, 1); the point at 1000 is 2 off and unsure:
    # with se 1e-3 and 1e3 the fit ignores it, unweighted it does not.
    t = np.array([1.0, 3.0, 10.0, 30.0, 100.0, 1000.0])
    value = 3 - np.log10(t)
    value[-1] += 2
    sure = np.array([1e-3] * 5 + [1e3])
    got = fit_forgetting(pooled(value, t, se=sure), laws=["semilog"], draws=5)
    np.testing.assert_allclose(of(got, "param_b", "semilog")["value"], 1.0, atol=1e-6)
    flat = fit_forgetting(pooled(value, t), laws=["semilog"])
    assert of(flat, "param_b", "semilog")["value"].item() < 0.7


def test_aicc_and_weights_by_hand():
    # Errors .1, -.1, .1, -.1, .1, -.1: sum e^2 / n = .01, two parameters and a variance: K = 3,
    # 6 ln .01 + 6 + 2 * 3 * 4 / (6 - 4) = -27.631021 + 6 + 12 = -9.631021.
    error = np.array([0.1, -0.1] * 3)
    got, reason = corrected_akaike(error, np.ones(6), 2, 1.0)
    np.testing.assert_allclose(got, -9.631021, atol=1e-6)
    assert reason == ""
    # common weights cancel
    np.testing.assert_allclose(corrected_akaike(error, np.full(6, 7.0), 2, 1.0)[0], got)
    # weights 4 and 1/4 have geometric mean 1: mean of (4, .25) * .01 = .02125
    two = corrected_akaike(error, np.array([4, 0.25] * 3), 2, 1.0)[0]
    np.testing.assert_allclose(two, 6 * np.log(0.02125) + 18)
    # n = K + 1 divides by zero
    got, reason = corrected_akaike(error[:4], np.ones(4), 2, 1.0)
    assert np.isnan(got)
    assert reason == "4 points are too few for 2 parameters and an error variance"
    # differences 0, 2, 4: 1, e^-1, e^-2 over their sum 1.5032147
    np.testing.assert_allclose(
        akaike_weights(np.array([10.0, 12.0, 14.0, np.nan])),
        [0.6652410, 0.2447285, 0.0900306, np.nan],
        atol=1e-7,
    )


def test_the_law_that_made_the_points_wins():
    for name in ("exponential", "power", "logarithm", "semilog"):
        rng = np.random.default_rng(3)
        t = np.geomspace(1, 1000, 24)
        params = dict(exponential=(3.0, 100.0), power=(3.0, 0.5, 0.6))
        curve = LAWS[name].curve(t, *params.get(name, TRUE[name]))
        got = fit_forgetting(pooled(curve + 0.02 * rng.normal(size=24), t), draws=0)
        weights = got[got["metric"] == "weight"].set_index("law")["value"]
        np.testing.assert_allclose(weights.sum(), 1)
        rivals = {"exponential_floor", "wickelgren"}  # hold the exponential and power as limits
        assert weights.drop(rivals - {name}, errors="ignore").idxmax() == name


def test_rows_of_a_fit():
    t = np.concatenate([[0.0], TIMES])
    value = 3 * np.exp(-t / 20) + np.array([0.1, -0.1, 0, 0.1, -0.1, 0, 0.1, -0.1, 0])
    got = validate(fit_forgetting(pooled(value, t, se=np.full(9, 0.1)), draws=50))
    params = best_fit(LAWS["exponential"], t, value, np.ones(9))
    curve = LAWS["exponential"].curve(t, *params)
    residual = of(got, "residual", "exponential")
    np.testing.assert_allclose(residual["value"], value - curve, atol=1e-8)
    assert list(residual["lag"]) == list(t)
    np.testing.assert_allclose(
        of(got, "rmse", "exponential")["value"], np.sqrt(np.mean((value - curve) ** 2)), atol=1e-8
    )
    fitted = of(got, "fitted", "exponential")
    assert fitted["lag"].iloc[0] == 0 and fitted["lag"].max() == 128
    np.testing.assert_allclose(fitted["value"], params[0] * np.exp(-fitted["lag"] / params[1]))
    assert (fitted["lo"] < fitted["value"]).all() and (fitted["value"] < fitted["hi"]).all()
    # two of nine points are held out: a fit to the first seven predicts them
    early = best_fit(LAWS["exponential"], t[:7], value[:7], np.ones(7))
    ahead = value[7:] - LAWS["exponential"].curve(t[7:], *early)
    np.testing.assert_allclose(
        of(got, "rmse_holdout", "exponential")["value"], np.sqrt(np.mean(ahead**2)), rtol=1e-5
    )
    half = of(got, "half_life", "exponential").iloc[0]
    np.testing.assert_allclose(half["value"], params[1] * np.log(2))
    assert half["lo"] < half["value"] < half["hi"]
    # semi-log is not defined at 0, so it was fitted to fewer points and is not compared
    assert np.isnan(of(got, "aicc", "semilog")["value"].item())
    assert of(got, "aicc", "semilog")["reason"].item() == (
        "undefined at the smallest t, so not fitted to all points; drop them"
    )
    assert set(got["law"]) == set(DEFAULT_LAWS)


def test_reasons_for_half_lives():
    t = TIMES
    got = fit_forgetting(pooled(1 + np.exp(-t / 5) / 4, t), laws=["exponential_floor"])
    row = of(got, "half_life", "exponential_floor").iloc[0]
    assert row["value"] == np.inf
    assert row["reason"] == "never: the fitted curve stays above half of its start"
    got = fit_forgetting(pooled(-np.exp(-t / 5), t), laws=["exponential"])
    row = of(got, "half_life", "exponential").iloc[0]
    assert np.isnan(row["value"])
    assert row["reason"] == "the fitted curve starts at 0 or below"
    got = fit_forgetting(pooled(np.exp(-t / 50), t), laws=["exponential", "semilog"])
    row = of(got, "half_life", "exponential").iloc[0]
    np.testing.assert_allclose(row["value"], 50 * np.log(2), rtol=1e-6)
    assert row["reason"] == "half of r(0), which lies before the first point: extrapolated"
    assert of(got, "half_life", "semilog")["reason"].item() == ""
    t = np.concatenate([[0], TIMES])
    got = fit_forgetting(pooled(np.exp(-t / 500), t), laws=["exponential"])
    row = of(got, "half_life", "exponential").iloc[0]
    np.testing.assert_allclose(row["value"], 500 * np.log(2), rtol=1e-6)
    assert row["reason"] == "beyond the last point: extrapolated"


def items(seed: int, count: int, spread: float = 0.3) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    curve = power(TIMES, 3.0, 0.5, 0.6)
    value = curve + rng.normal(0, spread, (count, 1)) * curve + rng.normal(0, 0.1, (count, 8))
    return rows(
        "memorization",
        value.ravel(),
        run="r",
        step=500,
        group="g",
        item=np.repeat([f"i{i}" for i in range(count)], 8),
        beside={"lag": np.tile(TIMES, count)},
    )


def test_items_are_what_is_resampled():
    # Items differ in scale by 30 %, so errors of the points go together: over 60 items the curve's
    # scale has error .3 / sqrt(60) = 3.9 %. Resampling points would see only their noise, .013.
    got = fit_forgetting(items(0, 60), laws=["power"], draws=400)
    assert got.attrs["bootstrap"] == {"group=g": "items"}
    first = of(got, "fitted", "power").iloc[0]
    scale = power(1.0, 3.0, 0.5, 0.6) * 0.3 / np.sqrt(60)
    # 400 draws and 60 items know the width to about 10 %
    np.testing.assert_allclose(first["hi"] - first["lo"], 3.92 * scale, rtol=0.35)
    mean = items(0, 60).groupby("lag")["value"].mean().to_numpy()
    np.testing.assert_allclose(
        of(got, "residual", "power")["value"],
        mean - LAWS["power"].curve(TIMES, *best_fit(LAWS["power"], TIMES, mean, np.ones(8))),
        atol=1e-8,
    )


def test_bands_are_percentiles_of_the_refitted_curves():
    table = items(0, 12)
    got = fit_forgetting(table, laws=["power"], draws=300, level=0.8, seed=4)
    again = fit_law(_points(validate(table), "lag", "g", 300, 4), "power", holdout=0.2).again
    fitted = of(got, "fitted", "power")
    curves = power(fitted["lag"].to_numpy(), *again.T[:, :, None])
    want = np.quantile(curves, [0.1, 0.9], axis=0)
    np.testing.assert_allclose(fitted[["lo", "hi"]].to_numpy().T, want, rtol=1e-9)
    row = of(got, "param_p", "power").iloc[0]
    ordered = np.sort(again[:, 2])
    assert (row["lo"], row["hi"]) == (ordered[30], ordered[269])


def test_resampled_curves_lie_around_the_mean_curve():
    # 4,000 resamples of 12 items with holes: their mean is within four of its standard errors,
    # so a false alarm in one of eight points has odds of 0.05 %
    table = items(1, 12)
    table.loc[[0, 9, 10, 50, 51, 77], "value"] = np.nan
    seen = validate(table[table["value"].notna()])
    points = _points(seen, "lag", "g", 4000, 0)
    np.testing.assert_allclose(points.value, seen.groupby("lag")["value"].mean())
    assert list(points.n) == list(seen.groupby("lag")["value"].count())
    away = (points.again.mean(axis=0) - points.value) / points.again.std(axis=0) * np.sqrt(4000)
    assert np.abs(away).max() < 4
    spread = seen.groupby("lag")["value"].std(ddof=0) / np.sqrt(points.n)
    np.testing.assert_allclose(points.again.std(axis=0), spread, rtol=0.15)


def test_bands_and_half_life_cover():
    # 120 samples of 40 items, percentile intervals at .95, a little short with 40 items (.93):
    # under .85 has odds of 0.1 %; half-width intervals would cover in about .65.
    truth = power(16.0, 3.0, 0.5, 0.6)
    half = (2 ** (1 / 0.6) - 1) / 0.5
    band = alive = 0
    for seed in range(120):
        got = fit_forgetting(items(seed, 40), laws=["power"], draws=60, seed=seed)
        fitted = of(got, "fitted", "power")
        at = fitted.iloc[np.abs(np.log(fitted["lag"] / 16)).argmin()]
        truth = power(at["lag"], 3.0, 0.5, 0.6)
        band += at["lo"] <= truth <= at["hi"]
        row = of(got, "half_life", "power").iloc[0]
        alive += row["lo"] <= half <= row["hi"]
    assert band >= 0.85 * 120
    assert alive >= 0.85 * 120


def test_parametric_draws_use_the_standard_errors():
    value = power(TIMES, 3.0, 0.5, 0.6)
    narrow = fit_forgetting(pooled(value, se=np.full(8, 0.01)), laws=["power"], draws=300)
    wide = fit_forgetting(pooled(value, se=np.full(8, 0.04)), laws=["power"], draws=300)
    width = [of(f, "fitted", "power").eval("hi - lo").mean() for f in (narrow, wide)]
    np.testing.assert_allclose(width[1] / width[0], 4, rtol=0.1)
    assert narrow.attrs["bootstrap"] == {
        "group=g": "parametric: normal errors of size se, independent between points"
    }
    none = fit_forgetting(pooled(value), laws=["power"])
    assert of(none, "fitted", "power")["lo"].isna().all()
    assert none.attrs["bootstrap"] == {"group=g": "none: pooled rows without se"}


def test_groups_are_fitted_apart_and_missing_rows_counted():
    slow, fast = 3 * np.exp(-TIMES / 60), 2 * np.exp(-TIMES / 9)
    table = pd.concat(
        [
            pooled(slow, group="slow").assign(kind="verse"),
            pooled(fast, group="fast").assign(kind="string"),
        ],
        ignore_index=True,
    )
    table.loc[len(table)] = table.iloc[0]
    table.loc[len(table) - 1, ["value", "lag"]] = [np.nan, 999]
    got = validate(fit_forgetting(table, laws=["exponential"], by=("kind",)))
    life = got[got["metric"] == "param_s"].set_index("kind")["value"]
    np.testing.assert_allclose([life["verse"], life["string"]], [60, 9], rtol=1e-6)
    assert set(got["group"]) == {"slow", "fast"}
    assert fit_forgetting(table, laws=["exponential"], by=("kind",)).attrs["dropped"] == 1
    one = fit_forgetting(table[table["kind"] == "verse"], laws=["exponential"], by=())
    np.testing.assert_allclose(one[one["metric"] == "param_s"]["value"], 60, rtol=1e-6)


def test_few_points_leave_reasons():
    got = fit_forgetting(pooled([3, 2, 1.5, 1.2, 1.1], np.array([1, 2, 4, 8, 16.0])))
    aicc = of(got, "aicc", "power").iloc[0]
    assert np.isnan(aicc["value"])
    assert aicc["reason"] == "5 points are too few for 3 parameters and an error variance"
    assert np.isfinite(of(got, "aicc", "exponential")["value"].item())
    held = of(got, "rmse_holdout", "wickelgren").iloc[0]
    assert held["reason"] == "4 points before the held-out ones for 4 parameters"
    t = np.array([0, 0.1, 0.2, 0.5, 1.0, 2.0])
    got = fit_forgetting(pooled([5, 4, 3, 2, 1.5, 1], t), laws=["ebbinghaus_savings"])
    assert set(got["reason"]) == {"2 points for 3 parameters"}


# --- refusals -------------------------------------------------------------------------------------


def refused(message: str, table: pd.DataFrame, **options) -> None:
    with pytest.raises(InputError) as error:
        fit_forgetting(table, **options)
    assert str(error.value) == message


def test_refusals():
    value = power(TIMES, 3.0, 0.5, 0.6)
    table = pooled(value)
    refused(
        "fit_forgetting: group=g has 4 distinct lag, it needs at least 5; probe at more checkpoints",
        table.iloc[:4],
    )
    refused(
        "fit_forgetting: group=g has lag from 10 to 90, less than one decade; the laws cannot be "
        "told apart there, so probe later",
        pooled(value[:5], np.array([10, 20, 40, 80, 90.0])),
    )
    refused(
        "fit_forgetting: group=g has lag -3; laws are of time since the last exposure, so keep rows "
        "of 0 and above",
        pooled(value, TIMES - 4),
    )
    refused(
        "fit_forgetting: no law 'gompertz'; there are exponential, exponential_floor, power, "
        "wickelgren, logarithm, semilog, ebbinghaus_savings, shifted_power",
        table,
        laws=["gompertz"],
    )
    refused("fit_forgetting: draws is -1, it must be at least 0", table, draws=-1)
    refused("fit_forgetting: holdout is 1, it must lie between 0 and 1", table, holdout=1)
    refused("fit_forgetting: level is 95, it must lie between 0 and 1", table, level=95)
    refused(
        "fit_forgetting: no column 'age'; there are run, step, group, item, metric, value, lo, hi, "
        "n, lag",
        table,
        x="age",
    )
    refused(
        "fit_forgetting: needs one run, got r, q; select one or add run to by",
        pd.concat([table, table.assign(run="q")]),
    )
    refused(
        "fit_forgetting: no row has a value; there is nothing to fit", table.assign(value=np.nan)
    )
    se = np.full(8, 0.1)
    se[2] = np.nan
    refused(
        "fit_forgetting: group=g has se nan at lag 4; every weight needs a positive se, so drop the "
        "row or the column",
        pooled(value, se=se),
    )
    refused(
        "fit_forgetting: group=g has several rows of one item per lag; pool them or add the "
        "coordinate that tells them apart to by",
        pd.concat([table.assign(cohort=1), table.assign(cohort=2)]),
    )
    several = items(0, 3)
    refused(
        "fit_forgetting: group=g has items with several rows per lag; pool them or add the "
        "coordinate that tells them apart to by",
        pd.concat([several.assign(layer=1), several.assign(layer=2)]),
    )
    refused(
        "fit_forgetting: needs rows of one metric, got memorization, retention; select one first",
        pd.concat([table, table.assign(metric="retention")]),
    )
