"""Effects item by item: against controls, and against the twin."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.stats.effects import (
    calibration,
    compare_with_truth,
    item_gains,
    same_at_every_lag,
    truth_of_others,
    twin_effects,
)
from workbench.stats.profile import memorization_profile
from workbench.table import InputError, rows


def panel(outcome: dict[str, list[float]], cohort: dict[str, float], steps=(1, 2, 3), run="one"):
    parts = [
        rows(
            "log_probability",
            values,
            run=run,
            step=np.array(steps),
            item=item,
            beside={"cohort": cohort.get(item, np.nan)},
        )
        for item, values in outcome.items()
    ]
    return pd.concat(parts, ignore_index=True)


# b is the last checkpoint before the cohort at 2, so step 1. Item a moves -5 -> -3 (+2), the
# controls by +.5 and +1.5, 1.0 on average: a's gain is 1.0. At step 3: +3 against 2 -> 1.0.
OUTCOME = {"a": [-5.0, -3.0, -2.0], "c1": [-5.0, -4.5, -3.5], "c2": [-6.0, -4.5, -3.5]}


def test_item_gain_by_hand():
    got = item_gains(panel(OUTCOME, {"a": 2.0}))
    assert got.set_index("step")["value"].to_dict() == {1: 0.0, 2: 1.0, 3: 1.0}
    assert set(got["item"]) == {"a"} and set(got["metric"]) == {"memorization"}
    assert got.attrs == {"without_base": 0, "controls": 2}


def test_item_seen_at_the_first_checkpoint_has_no_base_and_is_counted():
    got = item_gains(panel(OUTCOME | {"early": [-1.0, -1.0, -1.0]}, {"a": 2.0, "early": 1.0}))
    assert set(got["item"]) == {"a"} and got.attrs["without_base"] == 1


def test_cohort_between_checkpoints_takes_the_one_before_it():
    # cohort 3 with checkpoints 1, 2, 4: base is 2, so a gains (-2 - -3) - (-3.5 - -4.5) = 0
    got = item_gains(panel(OUTCOME, {"a": 3.0}, steps=(1, 2, 4)))
    assert got.set_index("step")["value"][4] == pytest.approx(0.0)


def test_gains_are_matched_within_strata():
    table = panel(OUTCOME | {"other": [0.0, -9.0, -9.0]}, {"a": 2.0})
    table["kind"] = np.where(table["item"] == "other", "verse", "string")
    assert item_gains(table, strata=["kind"]).set_index("step")["value"][2] == 1.0
    table["kind"] = np.where(table["item"] == "a", "verse", "string")
    with pytest.raises(InputError, match="^item_gains: no never-trained items at kind=verse$"):
        item_gains(table, strata=["kind"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_mean_gain_of_a_cohort_is_the_causal_estimate(seed):
    rng = np.random.default_rng(seed)
    names = [f"i{n}" for n in range(9)]
    cohort = dict(zip(names, rng.choice([2.0, 3.0, np.nan], size=9), strict=True))
    cohort |= {"i0": 2.0, "i1": 2.0, "i2": np.nan, "i3": np.nan}
    table = panel({n: list(-rng.uniform(0, 5, 4)) for n in names}, cohort, steps=(1, 2, 3, 4))
    gains = item_gains(table)
    mean = gains.groupby(["cohort", "step"])["value"].mean()
    cells = memorization_profile(table, draws=10)
    for cell in cells[cells["metric"] == "memorization"].itertuples():
        assert mean[cell.cohort, cell.step] == pytest.approx(cell.value, abs=1e-12)


# Three texts, lags 0, 1, 2: a and b are watched at all, the late c at 0 and 1 only.
LEFT = {"a": [4.0, 3.0, 2.0], "b": [2.0, 2.0, 1.0], "c": [6.0, 6.0, np.nan]}


def left(values=LEFT, group="x8"):
    parts = [
        rows(
            "memorization",
            each,
            run="one",
            step=10 + np.arange(3),
            group=group,
            item=item,
            beside={"lag": np.arange(3.0)},
        )
        for item, each in values.items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_texts_that_leave_a_curve_by_hand():
    # All: 4, 11/3, 1.5, so lag 2 is 2.17 below lag 1 though a and b fell by 1 there. The same two
    # texts at every lag: 3, 2.5, 1.5.
    every = left()
    assert every.groupby("lag")["value"].mean().tolist() == pytest.approx([4, 11 / 3, 1.5])
    got = same_at_every_lag(every, least=2)
    assert got.groupby("lag")["value"].mean().tolist() == [3.0, 2.5, 1.5]
    assert set(got["item"]) == {"a", "b"} and len(got) == 6
    assert got.attrs == {"left_out": 1, "changing": [], "dropped": 1}


def test_a_curve_with_too_few_texts_left_keeps_all_and_is_named():
    both = pd.concat([left(), left({k + "2": v for k, v in LEFT.items()}, "x16")])
    both = both[both["item"] != "b2"]  # of x16 only a2 is watched throughout, of x8 a and b
    got = same_at_every_lag(both, least=2)
    assert set(got["item"]) == {"a", "b", "a2", "c2"}
    assert got.attrs == {"left_out": 1, "changing": ["x16"], "dropped": 2}
    assert set(same_at_every_lag(both, least=1)["item"]) == {"a", "b", "a2"}
    nobody = same_at_every_lag(left({"c": LEFT["c"], "d": [np.nan, 1.0, 1.0]}), least=1)
    assert set(nobody["item"]) == {"c", "d"} and nobody.attrs["changing"] == ["x8"]
    assert same_at_every_lag(left(), by=(), least=3).attrs["changing"] == ["all"]


def test_a_curve_has_its_own_lags_and_metrics_their_own_curves():
    # Watched up to lag 1 alone, the curve x16 has these two lags and is whole.
    short = left({"c2": [5.0, 5.0, np.nan], "d2": [3.0, 1.0, np.nan]}, "x16")
    got = same_at_every_lag(pd.concat([left(), short]), least=2)
    assert set(got["item"]) == {"a", "b", "c2", "d2"} and got.attrs["changing"] == []
    by_lag = pd.concat([left(), short]).sort_values("lag", kind="stable")  # rows stay in order
    assert same_at_every_lag(by_lag, least=2)["lag"].is_monotonic_increasing
    other = left({"c": [-1.0, -1.0, -1.0]}).assign(metric="log_probability")
    two = same_at_every_lag(pd.concat([left(), other]), least=1)
    assert two[two["metric"] == "log_probability"]["item"].tolist() == ["c", "c", "c"]
    assert "c" not in set(two[two["metric"] == "memorization"]["item"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_where_none_leaves_nothing_changes_and_order_does_not_count(seed, least):
    rng = np.random.default_rng(seed)
    whole = left({name: list(rng.normal(size=3)) for name in "abcd"})
    whole.attrs = {"controls": 7}
    got = same_at_every_lag(whole, least=least)
    pd.testing.assert_frame_equal(got, whole, check_dtype=False, check_categorical=False)
    assert got.attrs == {"controls": 7, "left_out": 0, "changing": [], "dropped": 0}
    holed = whole.drop(index=rng.choice(len(whole), 3, replace=False))
    there = holed.groupby("item", observed=True)["lag"].agg(set)  # the slow way
    brute = {str(name) for name, lags in there.items() if lags == set(holed["lag"])}
    brute = brute if len(brute) >= least else set(holed["item"].astype(str))
    mixed = same_at_every_lag(holed.sample(frac=1, random_state=seed), least=least)
    assert set(mixed["item"].astype(str)) == brute


@pytest.mark.parametrize(
    "given, message",
    [
        ({"x": "age"}, "no column 'age'; there are run, step, group, item, metric, value, lo, hi, n, lag"),
        ({"by": ["dose"]}, "no column 'dose'; there are run, step, group, item, metric, value, lo, hi, n, lag"),
        ({"least": 0}, "least is 0, it must be at least 1"),
    ],
)  # fmt: skip
def test_same_at_every_lag_refuses(given, message):
    with pytest.raises(InputError, match=f"^same_at_every_lag: {message}$"):
        same_at_every_lag(left(), **given)
    with pytest.raises(
        InputError,
        match=r"^same_at_every_lag: 3 rows are pooled already \(item is all\); give item rows$",
    ):
        same_at_every_lag(left({"all": [1.0, 1.0, 1.0]}))


def test_twin_effect_by_hand_and_only_where_the_twin_never_trained_on_the_item():
    mine = panel({"a": [-5.0, -2.0], "b": [-4.0, -4.0]}, {"a": 2.0}, steps=(1, 2))
    twin = panel({"a": [-5.0, -4.5], "b": [-4.0, -1.0]}, {"b": 2.0}, steps=(1, 2), run="two")
    got = twin_effects(mine, twin)
    assert got.set_index("step")["value"].to_dict() == {1: 0.0, 2: 2.5}
    assert set(got["item"]) == {"a"}
    turned = twin_effects(twin, mine)
    assert turned.set_index("step")["value"].to_dict() == {1: 0.0, 2: 3.0}


def test_twins_that_share_nothing_are_refused():
    mine = panel({"a": [-5.0, -2.0]}, {"a": 2.0}, steps=(1, 2))
    with pytest.raises(InputError, match="^twin_effects: the runs share no item and step"):
        twin_effects(mine, mine)


# base step 1 (-5, -6, -4), trained at 2: gains over the controls' +.5, +1.5 (mean 1) at step 2.
# a: -5 -> -1 is +4, gain 3; b: -6 -> -2, gain 3; c: -4 -> -1 is +3, gain 2: estimate 8/3.
# Without (the twin) they stand at -4.5, -5.5, -2.5: true effects 3.5, 3.5, 1.5, mean 17/6.
MINE = {"a": [-5.0, -1.0], "b": [-6.0, -2.0], "c": [-4.0, -1.0]}
CONTROLS = {"u": [-5.0, -4.5], "v": [-6.0, -4.5]}
TWIN = {"a": [-5.0, -4.5], "b": [-6.0, -5.5], "c": [-4.0, -2.5]}


def compared(mine=MINE, twin=TWIN, *, lo=-9.0, hi=9.0, se=1.0, **options):
    table = panel(mine | CONTROLS, dict.fromkeys(mine, 2.0), steps=(1, 2))
    truth = twin_effects(table, panel(twin | CONTROLS, {}, steps=(1, 2), run="two"))
    gains = item_gains(table)
    value = gains.loc[gains["step"] == 2, "value"].mean()
    estimate = rows("memorization", value, run="one", step=2, lo=lo, hi=hi, beside={"se": se})
    return compare_with_truth(estimate, truth, panel=table, on=["step"], **options)


def test_comparison_with_truth_by_hand():
    # Gain less true effect: -.5, -.5, .5; variance 1/3, over 3 items 1/9. Controls' changes .5 and
    # 1.5: variance 1/2, over 2 of them 1/4. Error sqrt(13/36) = .600925, and Welch-Satterthwaite's
    # (13/36)^2 / ((1/9)^2 / 2 + (1/4)^2 / 1) = 1.898876 degrees of freedom.
    got = compared().iloc[0]
    assert got["estimate"] == pytest.approx(8 / 3) and got["truth"] == pytest.approx(17 / 6)
    assert got["se_difference"] == pytest.approx(0.600925, abs=1e-6)
    assert got["freedom"] == pytest.approx(1.898876, abs=1e-6)
    assert (got["n"], got["se"]) == (3, 1.0) and got["inside"] and got["covered"]
    assert got["se_truth"] == pytest.approx(2 / 3)  # 3.5, 3.5, 1.5: variance 4/3, over 3
    assert list(got.index) == [
        *("step", "estimate", "se", "lo", "hi", "truth", "se_truth", "n"),
        *("se_difference", "freedom", "inside", "covered"),
    ]


def test_inside_goes_by_the_difference_and_covered_by_the_estimates_own_interval():
    # the truth is 17/6 = 2.8333; both ends of an interval count
    assert compared(lo=2.84, hi=9.0)["covered"].tolist() == [False]
    assert compared(lo=-9.0, hi=2.83)["covered"].tolist() == [False]
    assert compared(lo=2.83, hi=2.84)["covered"].tolist() == [True]
    # a twin that lets all three items rise by one more than the controls: the difference is then
    # 5/6, 1.387 errors; 69.4 % of t(1.899) lies within that
    twin = {name: [before, after + 1.0] for name, (before, after) in TWIN.items()}
    assert compared(twin=twin, level=0.70)["inside"].tolist() == [True]
    assert compared(twin=twin, level=0.68)["inside"].tolist() == [False]


def test_what_training_did_is_not_in_the_error_of_the_comparison():
    # the trained scores cancel, however much effects differ between the items
    other = {"a": [-5.0, -4.9], "b": [-6.0, -0.1], "c": [-4.0, -3.0]}
    one, two = compared().iloc[0], compared(mine=other).iloc[0]
    for name in ("se_difference", "freedom"):
        assert one[name] == pytest.approx(two[name])
    assert one["estimate"] - one["truth"] == pytest.approx(two["estimate"] - two["truth"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_error_of_the_comparison_by_a_plain_loop(seed):
    """Two kinds, cohorts with different bases, cells by kind and lag; one loop from the definition."""
    rng = np.random.default_rng(seed)
    steps, kinds, cohort, one, two = (1, 2, 3, 4), {}, {}, {}, {}
    for number in range(16):
        name = f"i{number}"
        kinds[name] = "verse" if number % 2 else "string"
        if number < 8:
            cohort[name] = 2.0 if number < 4 else 3.0
        one[name], two[name] = list(-rng.uniform(0, 5, 4)), list(-rng.uniform(0, 5, 4))
    table = panel(one, cohort, steps=steps)
    table = table.assign(kind=table["item"].map(kinds), lag=table["step"] - table["cohort"])
    truth = twin_effects(table, panel(two, {}, steps=steps, run="two"))
    truth = truth[truth["lag"] == 1]
    estimate = rows("memorization", [0.0, 0.0], run="one", lo=-9.0, hi=9.0,
                    beside={"se": 1.0, "kind": ["string", "verse"], "lag": 1.0})  # fmt: skip
    got = compare_with_truth(estimate, truth, panel=table, on=["kind", "lag"], strata=["kind"])
    for kind in ("string", "verse"):
        mine = [n for n in cohort if kinds[n] == kind]
        controls = [n for n in one if kinds[n] == kind and n not in cohort]
        apart = []
        for name in mine:
            t, b = int(cohort[name]), int(cohort[name]) - 2  # places of steps g + 1 and g - 1
            trend = np.mean([one[c][t] - one[c][b] for c in controls])
            apart.append((two[name][t] - one[name][b]) - trend)
        moved = [
            np.mean([one[c][int(cohort[n])] - one[c][int(cohort[n]) - 2] for n in mine])
            for c in controls
        ]
        own, control = np.var(apart, ddof=1) / 4, np.var(moved, ddof=1) / 4
        row = got[got["kind"] == kind].iloc[0]
        assert row["se_difference"] == pytest.approx(np.sqrt(own + control))
        assert row["freedom"] == pytest.approx((own + control) ** 2 / (own**2 / 3 + control**2 / 3))


def test_cells_without_an_error_are_left_out_and_counted():
    got = compared(mine={"a": MINE["a"]})
    assert got.empty and got.attrs == {"left_out": 1}
    got = compared(se=np.nan)
    assert got.empty and got.attrs == {"left_out": 1}


def test_comparison_refuses_what_it_cannot_use():
    table = panel(MINE | CONTROLS, dict.fromkeys(MINE, 2.0), steps=(1, 2))
    estimate = rows("memorization", 1.0, run="one", step=2, beside={"se": 1.0})
    with pytest.raises(
        InputError, match="^compare_with_truth: the estimates have no column 'lag'$"
    ):
        compare_with_truth(estimate, table, panel=table, on=["lag"])
    with pytest.raises(InputError, match="^compare_with_truth: the stratum 'kind' is not in on$"):
        compare_with_truth(estimate, table, panel=table, on=["step"], strata=["kind"])


# --- over seeds ----------------------------------------------------------------------------------


def seeds(estimate, truth, *, se=1.0, half=2.0, **columns) -> pd.DataFrame:
    """Cells as compare_with_truth gives them, one a seed."""
    cells = pd.DataFrame(
        {"estimate": estimate, "truth": truth, "se": se, "se_truth": 0.5} | columns
    )
    cells = cells.assign(seed=np.arange(len(cells)), lo=cells["estimate"] - half, lag=0)
    cells = cells.assign(hi=cells["estimate"] + half)
    return cells.assign(covered=cells["truth"].between(cells["lo"], cells["hi"]))


def test_calibration_by_hand():
    # differences 1, 2, 3 over three seeds: mean 2, sd 1, error 1/sqrt(3), t(2) = 4.302653. Reported
    # error 2: ratio 1/2. Leaving a seed out gives sds .5^.5, 2^.5, .5^.5 over 2: logs -1.0397,
    # -.3466, -1.0397; their mean -.8087, jackknife error sqrt(2/3 * (2 * .231^2 + .4621^2)) = .4621.
    # Covered within 2: two of three, sd .57735, error 1/3. Above zero: estimates 1, 4, 9 less 2.
    cells = seeds([1.0, 4.0, 9.0], [0.0, 2.0, 6.0], se=2.0)
    got = calibration(cells, on=["lag"], over="seed").set_index("metric")
    t = 4.302653
    assert got.loc["bias", ["value", "n"]].tolist() == [2.0, 3]
    half = t / np.sqrt(3)
    assert got.loc["bias", ["lo", "hi"]].tolist() == pytest.approx([2 - half, 2 + half], abs=1e-5)
    ratio = got.loc["error_ratio"]
    assert ratio["value"] == pytest.approx(0.5)
    assert ratio["hi"] == pytest.approx(0.5 * np.exp(t * 0.462098), rel=1e-5)
    assert ratio["lo"] == pytest.approx(0.5 / np.exp(t * 0.462098), rel=1e-5)
    for metric in ("coverage", "power"):
        row = got.loc[metric]
        assert row["value"] == pytest.approx(2 / 3) and (row["lo"], row["hi"]) == (0.0, 1.0)


def test_cells_of_a_seed_are_pooled_first_and_groups_kept_apart():
    # lag 0 differs by 1, -1; lag 1 by 3, 1: pooled 2, 0 a seed, mean 1. Spread of each cell over
    # seeds: variance 2 both times, reported 1: ratio sqrt(2)
    near, far = seeds([1.0, -1.0], [0.0, 0.0]), seeds([3.0, 1.0], [0.0, 0.0]).assign(lag=1)
    cells = pd.concat([near, far]).assign(kind="verse")
    got = calibration(cells, on=["kind", "lag"], by=["kind"], over="seed").set_index("metric")
    assert got.loc["bias", ["value", "n"]].tolist() == [1.0, 2]
    assert got.loc["error_ratio", "value"] == pytest.approx(np.sqrt(2))
    apart = calibration(cells, on=["kind", "lag"], by=["lag"], over="seed")
    bias = apart[apart["metric"] == "bias"].set_index("lag")["value"]
    assert bias.to_dict() == {0: 0.0, 1: 2.0}
    # one seed: nothing to take an interval from
    alone = calibration(cells[cells["seed"] == 0], on=["kind", "lag"], over="seed").set_index(
        "metric"
    )
    assert alone.loc["bias", "value"] == 2.0 and alone.loc["bias", ["lo", "hi"]].isna().all()
    assert np.isnan(alone.loc["error_ratio", "value"])
    assert alone.loc["error_ratio", "reason"] == "one seed: no spread"


def test_calibration_of_a_right_estimate_is_right():
    # 400 seeds of a normal estimate with error 1 and a half-width of 1.96: coverage .95 and ratio 1
    # within .04 and .15, in all but about one of 10,000 seeds
    rng = np.random.default_rng(0)
    cells = seeds(rng.normal(size=400), np.zeros(400), half=1.959964)
    got = calibration(cells, on=["lag"], over="seed").set_index("metric")["value"]
    assert abs(got["coverage"] - 0.95) < 0.04 and abs(got["error_ratio"] - 1) < 0.15
    assert abs(got["bias"]) < 0.2 and abs(got["power"] - 0.025) < 0.03


def test_calibration_refuses():
    cells = seeds([1.0, 2.0], [0.0, 0.0])
    for bad, told in (
        (lambda: calibration(cells, on=["dose"], over="seed"), "calibration: no column 'dose'"),
        (
            lambda: calibration(pd.concat([cells, cells]), on=["lag"], over="seed"),
            "calibration: several rows per (lag, seed); name what tells them apart in on",
        ),
    ):
        with pytest.raises(InputError) as error:
            bad()
        assert str(error.value) == told


def test_truth_of_others_by_hand():
    # seed 0 is held to the mean 4 of the others' 2 and 6, whose error is sqrt(.5^2 + .5^2) / 2 =
    # .353553; with its own 1 that is 1.060660, so the half-width of 2 becomes 2.121320
    got = truth_of_others(seeds([2.0, 4.0, 9.0], [0.0, 2.0, 6.0]), on=["lag"], over="seed")
    assert got["truth"].tolist() == [4.0, 3.0, 1.0]
    assert (got["hi"] - got["estimate"]).tolist() == pytest.approx([2.121320] * 3, abs=1e-6)
    assert (got["estimate"] - got["lo"]).tolist() == pytest.approx([2.121320] * 3, abs=1e-6)
    assert got["covered"].tolist() == [True, True, False]
    alone = truth_of_others(seeds([2.0], [0.0]), on=["lag"], over="seed")
    assert alone.empty
