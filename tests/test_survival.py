"""Survival of memories: times from histories, curves, tests and regressions against other routes."""

import subprocess
import sys
import warnings
from itertools import groupby, pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from tests.benchmarks.simulate_survival import grid_times, likelihood_aft, simulate
from workbench import (
    InputError,
    align_exposures,
    compare_survival,
    fit_survival,
    forgetting_events,
    item_margins,
    plot_hazards,
    plot_survival,
    probe_extraction,
    rows,
    survival_curve,
    survival_times,
    validate,
)
from workbench.stats.life_events import life_events

pytestmark = pytest.mark.filterwarnings("error")  # lifelines keeps its warnings to itself


def panel(histories: dict, lags: dict | None = None, **columns) -> pd.DataFrame:
    """Verdicts of items from step 100 on at given lags, else 0, 1, 2, ...

    A lag that does not grow means that the item was trained on anew, at the step after the last.
    """
    parts = []
    for item, history in histories.items():
        lag = list((lags or {}).get(item, range(len(history))))
        step = [100 + lag[0]]
        for before, now in pairwise(lag):
            step.append(step[-1] + (now - before if now > before else 1 + now))
        beside = {"lag": np.asarray(lag, float)} | {n: v[item] for n, v in columns.items()}
        part = rows("extractable", np.array(history, float), run="r", step=step, group="seen",
                    item=item, beside=beside)  # fmt: skip
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def made(value, lost, lo=None, hi=None, **columns) -> pd.DataFrame:
    """Survival times by hand: those lost have the interval (value - 1, value] unless given."""
    value, lost = np.asarray(value, float), np.asarray(lost, bool)
    lo = np.where(lost, value - 1, value) if lo is None else lo
    hi = np.where(lost, value, np.inf) if hi is None else hi
    beside = {"event": np.where(lost, "lost", "kept"), "exposed": 100.0} | columns
    names = [f"i{k}" for k in range(len(value))]
    return validate(rows("survival_time", value, run="r", step=100, group="seen", item=names,
                         lo=lo, hi=hi, beside=beside))  # fmt: skip


def of(table: pd.DataFrame, metric: str, **where) -> pd.DataFrame:
    found = table[table["metric"] == metric]
    for name, value in where.items():
        found = found[found[name] == value]
    return found


def one(table: pd.DataFrame, metric: str, **where) -> pd.Series:
    found = of(table, metric, **where)
    assert len(found) == 1
    return found.iloc[0]


# --- times -----------------------------------------------------------------------------------


def test_times_by_hand():
    table = panel(
        {"a": [1, 1, 0, 1], "b": [1, 1, 1, 1], "c": [0, 1, 1, 1], "d": [1, 0, 1, 1, 1]},
        # d was trained on again at step 102; e's looks are sparse
        lags={"a": [0, 2, 5, 9], "d": [0, 1, 0, 1, 2], "b": [0, 1, 7, 50]},
        copies={"a": 4, "b": 8, "c": 2, "d": [1, 1, 2, 2, 2]},
    )
    got = survival_times(table)
    told = {r.item: (r.value, r.lo, r.hi, r.event, r.step, r.copies) for r in got.itertuples()}
    # a: found at 2, not at 5, and what it does at 9 changes nothing. b: there at the last look.
    # c: not known right after its exposure, so it never had what could be lost. d: since step 102.
    assert told == {
        "a": (5, 2, 5, "lost", 105, 4),
        "b": (50, 50, np.inf, "kept", 150, 8),
        "d": (2, 2, np.inf, "kept", 104, 2),
    }
    assert got.attrs == {
        "rule": "reproduced word for word", "of": "extractable", "never_had": 1, "dropped": 0,
    }  # fmt: skip
    assert dict(zip(got["item"], got["exposed"], strict=True)) == {"a": 100, "b": 100, "d": 102}
    every = survival_times(table, spells="every").set_index(["item", "exposed"])
    assert every.loc[("d", 100), ["value", "lo", "hi", "event"]].tolist() == [1, 0, 1, "lost"]
    assert every.loc[("d", 102), "event"] == "kept"


def test_spell_that_ends_in_another_exposure_is_censored_there():
    table = panel({"a": [1, 1, 1, 0], "b": [1, 1, 1, 1]}, lags={"a": [0, 1, 0, 1]})
    got = survival_times(table, spells="every").set_index(["item", "exposed"])
    assert got.loc[("a", 100), ["value", "lo", "hi", "event"]].tolist() == [
        1, 1, np.inf, "exposed again",
    ]  # fmt: skip
    assert got.loc[("a", 102), ["value", "lo", "hi", "event"]].tolist() == [1, 0, 1, "lost"]
    with pytest.raises(InputError) as raised:
        survival_curve(survival_times(table, spells="every"))
    assert str(raised.value) == (
        "survival_curve: item a has several rows in a group, and intervals take items as "
        "independent; use spells='last', or fit_survival"
    )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=9),
        min_size=1,
        max_size=4,
    )
)
def test_times_against_a_loop(items):
    # each look: known or not, and whether an exposure stands right before it
    histories, lags = {}, {}
    for k, looks in enumerate(items):
        lag, told = 0, []
        for place, (_, again) in enumerate(looks):
            lag = 0 if again or place == 0 else lag + 1
            told.append(lag)
        histories[f"i{k}"], lags[f"i{k}"] = [known for known, _ in looks], told
    table = panel(histories, lags)
    want = {}
    for item, history in histories.items():
        exposed = [s - lag for s, lag in enumerate(lags[item])]
        spells = [[p for p, _ in g] for _, g in groupby(enumerate(exposed), key=lambda e: e[1])]
        for number, spell in enumerate(spells):
            if not history[spell[0]]:
                continue
            lost = [p for p in spell if not history[p]]
            last = number == len(spells) - 1
            event = "lost" if lost else ("kept" if last else "exposed again")
            time = lags[item][lost[0] if lost else spell[-1]]
            want[item, number] = (event, time, last)
    if not want:
        return
    got = survival_times(table, spells="every") if want else None
    assert sorted(zip(got["event"], got["value"], strict=True)) == sorted(
        (event, time) for event, time, _ in want.values()
    )
    if any(last for *_, last in want.values()):
        mine = survival_times(table)
        assert sorted(zip(mine["event"], mine["value"], strict=True)) == sorted(
            (event, time) for event, time, last in want.values() if last
        )


def test_a_late_first_look_is_left_out_and_said():
    table = panel({"a": [1, 0, 0], "b": [1, 1, 1]}, lags={"b": [3, 4, 5]})
    with pytest.warns(UserWarning, match="1 of 2 items were not looked at within 0 updates") as w:
        got = survival_times(table)
    assert len(w) == 1 and list(got["item"]) == ["a"] and got.attrs["dropped"] == 1
    assert list(survival_times(table, within=3)["value"]) == [1, 5]


def test_a_score_is_lost_at_its_threshold():
    table = panel({"a": [0.9, 0.5, 0.4], "b": [0.6, 0.51, 0.9]}).assign(metric="recognition")
    got = survival_times(table, threshold=0.5)  # .5 is not above .5
    assert list(got["value"]) == [1, 2] and list(got["event"]) == ["lost", "kept"]
    assert got.attrs["rule"] == "two-alternative recognition above 0.5"
    low = table.assign(metric="loss", value=1 - table["value"])
    again = survival_times(low, threshold=0.5)
    assert list(again["value"]) == [1, 2]
    assert again.attrs["rule"] == "mean negative log-probability below 0.5"


def test_margins_by_hand():
    # controls gain 0, 1, 2 from step 0 to 1, and their median is 1; item a gains 3 and b .5. At
    # step 2 controls have lost 1 each against step 0: a, back at its base, is 1 above their median.
    # Cohort 2 has its base at step 1: c gains 2, the controls -2 in the median.
    values = {
        "n0": [-5, -5, -6], "n1": [-5, -4, -6], "n2": [-5, -3, -6],
        "a": [-9, -6, -9], "b": [-3, -2.5, -3], "c": [-7, -6, -4],
    }  # fmt: skip
    cohort = {"a": 1, "b": 1, "c": 2}
    table = pd.concat(
        rows("log_probability", np.array(v, float), run="r", step=[0, 1, 2], item=item,
             group="seen" if item in cohort else "never",
             beside={"cohort": float(cohort.get(item, np.nan)), "kind": "k"})
        for item, v in values.items()
    )  # fmt: skip
    got = item_margins(table, quantile=0.5)
    told = {k: list(g.sort_values("step")["value"]) for k, g in got.groupby("item", observed=True)}
    assert told == {"a": [0, 2, 1], "b": [0, -0.5, 1], "c": [0, 4]}
    assert set(got["metric"]) == {"margin"} and got.attrs == {"without_base": 0, "quantile": 0.5}
    early = table.assign(cohort=table["cohort"].where(table["item"] != "c", 0.0))
    assert item_margins(early, quantile=0.5).attrs["without_base"] == 1
    # the .7-quantile of three is the ceil(4 * .7) = 3rd, gain 2 at step 1: a is 1 above it
    high = item_margins(table, quantile=0.7).set_index(["item", "step"])["value"]
    assert high["a", 1] == 1
    # a constant added to an item, at all its steps, changes nothing
    shifted = table.assign(value=table["value"] - table["item"].map(lambda i: ord(i[-1]) / 10))
    again = item_margins(shifted, quantile=0.5)
    np.testing.assert_allclose(again["value"], got["value"], atol=1e-12)


def test_on_real_passes(tiny):
    suite = tiny.suite
    table = probe_extraction(suite.checkpoints("base"), suite.items("base"), prefix=4, suffix=12)
    table = table[table["metric"] == "log_probability"]
    table = table[table["group"].isin(["seen", "never"])]
    table = align_exposures(table, suite.exposures("base"))
    margins = item_margins(table, quantile=0.7)
    wide = table.pivot(index="item", columns="step", values="value")
    items = table.drop_duplicates("item").set_index("item")
    never = items.index[items["cohort"].isna()]
    steps = sorted(table["step"].unique())
    checked = 0
    for row in margins.itertuples():
        mine = items.loc[row.item]
        base = max(s for s in steps if s < mine["cohort"])
        alike = [i for i in never if items.loc[i, "kind"] == mine["kind"]]
        bar = max(wide.loc[alike, row.step] - wide.loc[alike, base])  # the 3rd of 3
        want = wide.loc[row.item, row.step] - wide.loc[row.item, base] - bar
        assert row.value == pytest.approx(want, abs=1e-12)
        checked += 1
    assert checked > 50
    # in so short a run all margins stay above 0: take one that the margin that fell most crosses
    after = margins[(margins["lag"] >= 0) & (margins["copies"] == margins["dose"])]
    begins = after[after["lag"] == 0].set_index("item")["value"]
    lowest = after.groupby("item", observed=True)["value"].min()
    most = (begins - lowest).idxmax()
    bar = (begins[most] + lowest[most]) / 2
    got = survival_times(margins, threshold=bar).set_index("item")
    for item, part in margins[margins["lag"].notna()].groupby("item", observed=True):
        last = part[part["copies"] == part["copies"].max()].sort_values("step")
        above = list(last["value"] > bar)
        if not above[0]:
            assert item not in got.index
            continue
        want = last["lag"].iloc[above.index(False) if False in above else -1]
        assert got.loc[item, "value"] == want
    assert len(got) > 3 and got["event"].nunique() == 2


# --- curves ----------------------------------------------------------------------------------


def test_kaplan_meier_on_integer_times_by_hand():
    # 1, 1, 2, 3+, 4 (+ censored): 3/5 stand after 1, of 3 at risk at 2 one goes: .6 * 2/3 = .4,
    # the one censored at 3 leaves one at risk at 4, who goes: 0. Greenwood at 1: 2/(5*3) = .1333,
    # sqrt .3651484 / |ln .6| = .7148201, * 1.959964 = 1.4010216, e to it 4.0593452:
    # .6 ** 4.0593452 = .1257302 to .6 ** (1/4.0593452) = .8817564. At 2: .1333 + 1/(3*2) = .3.
    table = made(np.array([1, 1, 2, 3, 4]), [1, 1, 1, 0, 1])
    got = survival_curve(table)
    curve = of(got, "survival")
    assert list(curve["time"]) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(curve["value"], [1, 0.6, 0.4, 0.4, 0], atol=1e-12)
    assert list(curve["n"]) == [5, 5, 3, 2, 1]
    assert list(curve["events"]) == [0, 2, 1, 0, 1] and list(curve["censored"]) == [0, 0, 0, 1, 0]
    first = curve.iloc[1]
    np.testing.assert_allclose([first["lo"], first["hi"]], [0.1257302, 0.8817564], atol=1e-7)
    power = np.exp(stats.norm.ppf(0.975) * np.sqrt(0.3) / np.log(0.4))
    second = curve.iloc[2]
    np.testing.assert_allclose([second["lo"], second["hi"]], [0.4 ** (1 / power), 0.4**power])
    assert curve["lo"].isna().tolist() == [True, False, False, False, True]
    assert list(curve["reason"]) == ["none lost yet: no band", "", "", "", "none left: no band"]
    # the first time at which at most half stand is 2; the band below is at most half from 1 on,
    # and that above never is where there is one
    median = one(got, "median_survival")
    assert (median["value"], median["lo"], median["hi"], median["n"]) == (2, 1, np.inf, 5)
    # life table: lost of those at risk; Wilson of 2 in 5 is .1176 to .7693 (scipy)
    life = of(got, "hazard")
    np.testing.assert_allclose(life["value"], [2 / 5, 1 / 3, 0, 1])
    assert list(life["since"]) == [0, 1, 2, 3]
    for row, counts in zip(life.itertuples(), ((2, 5), (1, 3), (0, 2), (1, 1)), strict=True):
        wilson = stats.binomtest(*counts).proportion_ci(method="wilson")
        np.testing.assert_allclose([row.lo, row.hi], wilson, atol=1e-12)


def test_one_half_is_reached_when_it_is_met():
    # 4 items: after the second loss exactly 2/4 stand. Products of logarithms may miss one half.
    assert one(survival_curve(made([3, 5, 7, 9], [1, 1, 1, 1])), "median_survival")["value"] == 5
    # 6 of 12, through 11/12 * 10/11 * ...
    twelve = survival_curve(made(np.arange(1, 13), np.ones(12)))
    assert one(twelve, "median_survival")["value"] == 6


def brute_curve(value, lost, at):
    share = 1.0
    for time in sorted(set(value[lost])):
        if time <= at:
            share *= 1 - (lost & (value == time)).sum() / (value >= time).sum()
    return share


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=2, max_size=20),
    st.sampled_from([0.1, 3.0, 1000.0]),
)
def test_curves_against_a_loop_and_in_other_units(items, unit):
    value, lost = np.array([t for t, _ in items]), np.array([e for _, e in items])
    got = survival_curve(made(value, lost))
    for row in of(got, "survival").itertuples():
        assert row.value == pytest.approx(brute_curve(value, lost, row.time), abs=1e-12)
    inside = of(got, "survival").dropna(subset="lo")
    assert (inside["lo"] < inside["value"]).all() and (inside["value"] < inside["hi"]).all()
    # in other units of time all times are so many times as large, and shares are the same
    table = made(value, lost).assign(
        **{c: made(value, lost)[c] * unit for c in ("value", "lo", "hi")}
    )
    other = survival_curve(table)
    np.testing.assert_allclose(of(other, "survival")["value"], of(got, "survival")["value"])
    here, there = one(got, "median_survival"), one(other, "median_survival")
    np.testing.assert_allclose(there[["value", "lo", "hi"]].astype(float),
                               here[["value", "lo", "hi"]].astype(float) * unit)  # fmt: skip
    # the order of rows and the names of items are nothing
    mixed = made(value, lost).sample(frac=1, random_state=0).assign(item=made(value, lost)["item"])
    pd.testing.assert_frame_equal(survival_curve(mixed), got)


def turnbull_by_em(lo, hi, at):
    """Self-consistency (Turnbull 1976) over the innermost intervals, straight within each."""
    cuts = np.unique([*lo, *hi])
    left, right = cuts[:-1], cuts[1:]
    inner = np.isin(left, lo) & np.isin(right, hi)
    left, right = left[inner], right[inner]
    may = (lo[:, None] <= left) & (right <= hi[:, None])
    p = np.full(len(left), 1 / len(left))
    for _ in range(5000):
        share = may * p
        p = (share / share.sum(axis=1, keepdims=True)).mean(axis=0)
    gone = np.zeros(len(at))
    for a, b, mass in zip(left, right, p, strict=True):
        gone += mass * (np.clip((at - a) / (b - a), 0, 1) if np.isfinite(b) else 0)
    return 1 - gone


def test_turnbull_against_self_consistency():
    # (0,1], (0,2], (1,3], (2,inf): mass on (0,1] and (2,3] and beyond 3
    rng = np.random.default_rng(1)
    for case in range(6):
        time = rng.exponential(8, 25)
        lo, hi = grid_times(time, rng, keep=0.5)
        table = made(np.where(np.isinf(hi), lo, hi), np.isfinite(hi), lo=lo, hi=hi)
        got = survival_curve(table, method="turnbull", draws=0)
        curve = of(got, "survival")
        want = turnbull_by_em(lo, hi, curve["time"].to_numpy())
        np.testing.assert_allclose(curve["value"], want, atol=3e-3, err_msg=str(case))
        assert set(curve["reason"]) == {"no draws: no interval"}


def test_turnbull_by_hand():
    # all looked at 0, 10, 20: 2 of 4 lost in (0, 10], 1 in (10, 20], 1 kept to 20. The curve is
    # .5 at 10, .25 at 20; half is reached at 10. Kaplan-Meier has the same values at the looks.
    table = made([10, 10, 20, 20], [1, 1, 1, 0], lo=[0, 0, 10, 20], hi=[10, 10, 20, np.inf])
    got = survival_curve(table, method="turnbull", draws=100, seed=3)
    curve = of(got, "survival")
    np.testing.assert_allclose(curve["value"], [1, 0.5, 0.25], atol=1e-6)
    assert one(got, "median_survival")["value"] == pytest.approx(10, abs=1e-4)
    # of 4 items drawn again all may be kept, or all be lost at once: (1/4 + 1/2)^4 = .316 of
    # draws have none of the interval (10, 20], and so on; bounds are of the resampled shares
    assert (curve["lo"] <= curve["value"] + 1e-9).all() and curve["lo"].iloc[1] < 0.26
    assert not of(got, "hazard").size
    # half way between looks, if 3 of 4 went in the first interval: 1 - .75 t / 10 = .5 at 6.6667
    three = made([10, 10, 10, 20], [1, 1, 1, 1], lo=[0, 0, 0, 10], hi=[10, 10, 10, 20])
    median = one(survival_curve(three, method="turnbull", draws=0), "median_survival")
    assert median["value"] == pytest.approx(20 / 3, abs=1e-4)
    assert one(survival_curve(three), "median_survival")["value"] == 10


def test_nothing_lost_everything_lost_and_one_item():
    kept = survival_curve(made([5, 9, 9], [0, 0, 0]))
    median = one(kept, "median_survival")
    assert np.isnan(median["value"]) and np.isnan(median["lo"]) and np.isinf(median["hi"])
    assert median["reason"] == "more than half stand to the last look: 0 of 3 were seen lost"
    assert (of(kept, "survival")["value"] == 1).all()
    still = survival_curve(made([5, 9, 9], [0, 0, 0]), method="turnbull", draws=9)
    assert (of(still, "survival")["value"] == 1).all()
    gone = survival_curve(made([2, 2, 2], [1, 1, 1]))
    assert one(gone, "median_survival")[["value", "lo", "hi"]].tolist() == [2, 2, np.inf]
    two = made([3, 4, 5], [1, 1, 1], kind=["x", "y", "y"])
    alone = survival_curve(two, by=["kind"])
    x = alone[alone["kind"] == "x"]
    assert of(x, "survival")["lo"].isna().all()
    assert one(x, "median_survival")["reason"] == "one item: no interval"
    assert of(x, "median_survival")["lo"].isna().all()
    assert list(of(alone, "median_survival")["value"]) == [3, 4]


# --- groups ----------------------------------------------------------------------------------


def test_log_rank_by_hand():
    # a is lost at 1 and 3, b at 2 and 4. At 1: 2 of 4 at risk are a's, E = .5, V = 2*2*1*3/(16*3);
    # at 2: 1 of 3, E = 1/3, V = 2/9; at 3: 1 of 2, E = .5, V = .25; at 4 none of a's. O - E = 2/3,
    # V = .25 + .2222 + .25 = .7222: (2/3)^2 / .7222 = .6153846.
    table = made([1, 3, 2, 4], [1, 1, 1, 1], kind=list("aabb"))
    got = compare_survival(table, by="kind")
    assert one(got, "log_rank")["value"] == pytest.approx(0.6153846, abs=1e-7)
    assert one(got, "p_value_log_rank")["value"] == pytest.approx(stats.chi2.sf(0.6153846, 1))
    assert set(got["comparison"]) == {"all"} and set(got["df"]) == {1} and set(got["n"]) == {4}
    named = compare_survival(table.assign(kind=list("zzbb")), by="kind")
    assert one(named, "log_rank")["value"] == pytest.approx(0.6153846, abs=1e-7)


def test_log_rank_with_ties_against_scipy_and_a_loop():
    rng = np.random.default_rng(5)
    for _ in range(3):
        value, lost = rng.integers(1, 6, 30), rng.random(30) < 0.7
        kind = np.array(["a", "b", "c"])[rng.integers(0, 3, 30)]
        got = compare_survival(made(value, lost, kind=kind), by="kind")
        pair = np.isin(kind, ["a", "b"])
        sides = [
            stats.CensoredData.right_censored(value[pair & (kind == k)], ~lost[pair & (kind == k)])
            for k in "ab"
        ]
        want = stats.logrank(*sides)
        mine = one(got, "log_rank", comparison="a, b")
        assert mine["value"] == pytest.approx(want.statistic**2, rel=1e-9) and mine["df"] == 1
        assert one(got, "p_value_log_rank", comparison="a, b")["value"] == pytest.approx(
            want.pvalue
        )
        # all three: hypergeometric mean and covariance at each time of a loss
        gap, cov = np.zeros(3), np.zeros((3, 3))
        for time in set(value[lost]):
            risk = np.array([((kind == k) & (value >= time)).sum() for k in "abc"], float)
            died = np.array([((kind == k) & (value == time) & lost).sum() for k in "abc"])
            n, d = risk.sum(), died.sum()
            gap += died - risk * d / n
            if n > 1:
                share = risk / n
                cov += (np.diag(share) - np.outer(share, share)) * d * (n - d) / (n - 1)
        whole = gap[:2] @ np.linalg.solve(cov[:2, :2], gap[:2])
        assert one(got, "log_rank", comparison="all")["value"] == pytest.approx(whole)
        assert one(got, "log_rank", comparison="all")["df"] == 2
        # Holm: p sorted, times 3, 2, 1, and never falling
        p = of(got, "p_value_log_rank").set_index("comparison")["value"].drop("all").sort_values()
        want = np.minimum(np.maximum.accumulate(p.to_numpy() * [3, 2, 1]), 1)
        holm = of(got, "p_value_holm").set_index("comparison")["value"]
        np.testing.assert_allclose(holm[p.index], want)


def test_groups_without_losses_have_no_test():
    got = compare_survival(made([3, 4, 5, 5], [0] * 4, kind=list("aabb")), by="kind")
    assert got["value"].isna().all() and set(got["reason"]) == {"none of 4 items was lost"}


# --- regressions -----------------------------------------------------------------------------


def test_cox_by_hand():
    # Lost at 1 (x = 1), 2 (x = 0), 3 (x = 1), u = e^b: u / (2u + 1) * 1 / (u + 1). The logarithm's
    # slope 1 - 2u/(2u+1) - u/(1+u) is 0 at 2 u^2 = 1: u = .7071068. Its curvature there is
    # 2u/(2u+1)^2 + u/(1+u)^2 = .2426407 + .2426407, so that se = .4852814 ** -.5 = 1.4355.
    got = fit_survival(made([1, 2, 3], [1, 1, 1], x=[1.0, 0.0, 1.0]), ["x"])
    ratio = one(got, "hazard_ratio")
    assert ratio["value"] == pytest.approx(0.7071068, abs=1e-6)
    assert ratio["se"] == pytest.approx(0.4852814**-0.5, abs=1e-5)
    half = stats.norm.ppf(0.975) * 0.4852814**-0.5
    np.testing.assert_allclose([ratio["lo"], ratio["hi"]], 0.7071068 * np.exp([-half, half]), 1e-5)
    p = one(got, "p_value_ratio")["value"]
    assert p == pytest.approx(2 * stats.norm.sf(abs(np.log(0.7071068)) * 0.4852814**0.5), abs=1e-6)
    # partial log-likelihood at u, and one parameter
    u = 0.5**0.5
    assert one(got, "aic")["value"] == pytest.approx(-2 * np.log(u / (2 * u + 1) / (u + 1)) + 2)
    # x = 1 is foretold to last: of the pairs (1,2) wrong, (2,3) right, (1,3) a tie
    assert one(got, "concordance")["value"] == 0.5


def partial_likelihood(beta, x, value, lost):
    """Cox's, with Efron's ties, negative: a loop over times."""
    total = 0.0
    for time in set(value[lost]):
        risk, died = value >= time, lost & (value == time)
        d = died.sum()
        part = np.exp(x[died] @ beta).sum()
        whole = np.exp(x[risk] @ beta).sum()
        total += (x[died] @ beta).sum() - sum(np.log(whole - k / d * part) for k in range(d))
    return -total


def test_cox_with_ties_against_its_own_likelihood():
    rng = np.random.default_rng(2)
    copies, kind = 2.0 ** rng.integers(0, 6, 40), np.array(["p", "q"])[rng.integers(0, 2, 40)]
    value = np.ceil(rng.exponential(3 * copies**0.4)).clip(max=12)
    lost = value < 12
    table = made(value, lost, copies=copies, kind=kind)
    got = fit_survival(table, ["copies", "kind"], log2=["copies"])
    most = "p" if (kind == "p").sum() >= (kind == "q").sum() else "q"
    other = "q" if most == "p" else "p"
    x = np.c_[np.log2(copies), kind == other].astype(float)
    best = optimize.minimize(partial_likelihood, [0, 0], (x, value, lost), tol=1e-10)
    names = ["copies, each doubling", f"kind: {other}, not {most}"]
    mine = [one(got, "hazard_ratio", covariate=n)["value"] for n in names]
    np.testing.assert_allclose(np.log(mine), best.x, atol=1e-5)
    se = [one(got, "hazard_ratio", covariate=n)["se"] for n in names]
    step = 1e-4 * np.eye(2)

    def at(b):
        return partial_likelihood(b, x, value, lost)

    second = [[(at(best.x + a + b) - at(best.x + a - b) - at(best.x - a + b) + at(best.x - a - b))
               / 4e-8 for a in step] for b in step]  # fmt: skip
    np.testing.assert_allclose(se, np.sqrt(np.diag(np.linalg.inv(second))), rtol=1e-3)
    assert one(got, "aic")["value"] == pytest.approx(2 * best.fun + 4, abs=1e-5)
    assert set(got["events"]) == {int(lost.sum())} and set(got["n"]) == {40}
    # concordance against all pairs
    score = -x @ np.log(mine)
    right = pairs = 0.0
    for i in range(40):
        for j in range(40):
            # j outlives i: later, or censored at the time of i's loss
            if lost[i] and (value[i] < value[j] or (value[i] == value[j] and not lost[j])):
                pairs += 1
                right += (score[i] < score[j]) + 0.5 * (score[i] == score[j])
    c = one(got, "concordance")
    assert c["value"] == pytest.approx(right / pairs) and c["lo"] < c["value"] < c["hi"]
    assert 0 <= one(got, "p_value_proportional", covariate=names[0])["value"] <= 1
    # time in other units, shuffled rows: the order of losses is all that Cox sees
    other = table.assign(value=table["value"] * 7.3, lo=table["lo"] * 7.3, hi=table["hi"] * 7.3)
    other = other.sample(frac=1, random_state=1)
    again = fit_survival(other, ["copies", "kind"], log2=["copies"])
    np.testing.assert_allclose(of(again, "hazard_ratio")["value"], of(got, "hazard_ratio")["value"])


def test_schoenfeld_sees_a_ratio_that_changes():
    # of 40 with x = 1 half are lost by 5, and no more of them; the others go one by one; z is noise
    rng = np.random.default_rng(0)
    value = np.r_[np.linspace(0.1, 5, 20), np.full(20, 50), np.linspace(1.05, 40, 40)]
    x = np.repeat([1.0, 0.0], 40)
    table = made(value, value < 50, x=x, z=rng.normal(size=80))
    got = fit_survival(table, ["x", "z"])
    assert one(got, "p_value_proportional", covariate="x")["value"] < 1e-4
    assert one(got, "p_value_proportional", covariate="z")["value"] > 0.01
    # by its formula, nothing censored: x of each loss less its mean at risk, against the rank of time
    time = np.sort(rng.exponential(size=30)) ** 3
    one_x = rng.normal(size=30)
    got = fit_survival(made(time, np.ones(30), x=one_x), ["x"])
    ratio = one(got, "hazard_ratio")
    weight = np.exp(np.log(ratio["value"]) * one_x)
    mean = [np.average(one_x[k:], weights=weight[k:]) for k in range(30)]
    rank = np.arange(30) - np.arange(30).mean()
    squared = (rank @ (30 * ratio["se"] ** 2 * (one_x - mean))) ** 2
    want = stats.chi2.sf(squared / (30 * ratio["se"] ** 2 * (rank @ rank)), 1)
    assert one(got, "p_value_proportional")["value"] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("law", ["weibull", "lognormal", "loglogistic"])
def test_laws_of_time_against_their_own_likelihood(law):
    table, x = simulate(60, np.random.default_rng(4), law=law)
    got = fit_survival(table, ["x"], law=law)
    lo, hi = table["lo"].to_numpy(), table["hi"].to_numpy()
    best = optimize.minimize(likelihood_aft, [2, 0, 0], (law, x, lo, hi), tol=1e-9)
    ratio, shape = one(got, "time_ratio"), one(got, "shape")
    assert np.log(ratio["value"]) == pytest.approx(best.x[1], abs=2e-3)
    assert np.log(shape["value"]) == pytest.approx(best.x[2], abs=2e-3)
    assert one(got, "aic")["value"] == pytest.approx(2 * best.fun + 6, abs=1e-3)
    assert not of(got, "p_value_proportional").size
    # time in other units stretches no ratio
    other = table.assign(**{c: table[c] * 50 for c in ("value", "lo", "hi")})
    again = one(fit_survival(other, ["x"], law=law), "time_ratio")
    np.testing.assert_allclose(again[["value", "lo", "hi"]].astype(float),
                               ratio[["value", "lo", "hi"]].astype(float), rtol=2e-3)  # fmt: skip


def test_several_rows_an_item_are_clustered():
    table, _ = simulate(40, np.random.default_rng(1))
    alone = one(fit_survival(table, ["x"]), "hazard_ratio")
    # each row twice: the same information, though errors that ignore it shrink by sqrt 2
    twice = pd.concat([table, table.assign(exposed=101.0)], ignore_index=True)
    got = fit_survival(twice, ["x"])
    both = one(got, "hazard_ratio")
    assert both["se"] == pytest.approx(alone["se"], rel=0.35)  # robust against model-based
    robust = fit_survival(twice.assign(item=[f"j{k}" for k in range(80)]), ["x"])
    assert one(robust, "hazard_ratio")["se"] == pytest.approx(alone["se"] / 2**0.5, rel=0.1)
    assert one(got, "p_value_proportional")["reason"] == "several rows an item"
    with pytest.raises(InputError) as raised:
        fit_survival(twice, ["x"], law="weibull")
    assert str(raised.value) == (
        "fit_survival: several rows of an item, which weibull cannot allow for; take law='cox', or "
        "spells='last' in survival_times"
    )


def test_a_value_that_was_never_lost_has_no_ratio():
    table, _ = simulate(60, np.random.default_rng(3))
    # half the items are of c, which can yet be no standard: none was lost
    kind = np.array(list("abcc"))[np.arange(60) % 4]
    never = kind == "c"
    table = table.assign(
        kind=kind,
        event=np.where(never, "kept", table["event"]),
        hi=np.where(never, np.inf, table["hi"]),
        lo=np.where(never, table["value"], table["lo"]),
    )
    for law, best in (("cox", "0"), ("weibull", "infinite")):
        got = fit_survival(table, ["kind", "x"], law=law)
        ratio = "hazard_ratio" if law == "cox" else "time_ratio"
        gone = one(got, ratio, covariate="kind: c, not a")
        assert np.isnan(gone["value"])
        assert gone["reason"] == f"none of its items was lost; the best ratio is {best}"
        # the others are as they are without those items, which is the limit
        without = fit_survival(table[~never], ["kind", "x"], law=law)
        for name in ("kind: b, not a", "x"):
            a, b = (one(t, ratio, covariate=name)["value"] for t in (got, without))
            assert a == pytest.approx(b)
        assert set(got["n"]) == {60}


def test_separation_is_said():
    # every x = 1 is lost before the first x = 0
    value, x = np.arange(1, 41), (np.arange(40) < 20).astype(float)
    rng = np.random.default_rng(0)
    got = fit_survival(made(value, np.ones(40), x=x, z=rng.normal(size=40)), ["x", "z"])
    ratio = one(got, "hazard_ratio", covariate="x")
    assert np.isnan(ratio["value"]) and np.isnan(ratio["hi"])
    assert ratio["reason"] == (
        "the items it tells apart are lost in an order that no finite ratio fits best"
    )
    assert np.isfinite(one(got, "hazard_ratio", covariate="z")["value"])
    assert one(got, "concordance")["reason"] == "a ratio is not finite"
    # lifelines gives .38 with an error of .06 here, and a warning
    order = fit_survival(made(value, np.ones(40), x=np.arange(40.0)), ["x"])
    assert np.isnan(one(order, "hazard_ratio")["value"])
    assert np.isnan(one(order, "p_value_ratio")["value"])
    with pytest.raises(
        InputError, match="fit_survival: weibull found no best fit|too few|no finite"
    ):
        table = fit_survival(made(value, np.ones(40), x=x), ["x"], law="weibull")
        if table["value"].notna().all():
            raise InputError("too few")


def test_items_without_a_covariate_are_counted():
    table, x = simulate(40, np.random.default_rng(6))
    holes = table.assign(x=np.where(np.arange(40) < 3, np.nan, x))
    with pytest.warns(UserWarning, match="3 of 40 items lack a covariate or any time"):
        got = fit_survival(holes, ["x"])
    assert got.attrs["dropped"] == 3 and set(got["n"]) == {37}


# --- a small simulation; the long one is tests/benchmarks/simulate_survival.py -----------------


def test_bands_cover_and_tests_keep_their_size():
    from tests.benchmarks.simulate_survival import band_coverage, cox_coverage, log_rank_size

    # 40 panels: a share of .95 or .05 has a standard error of .034, 25 panels .044, 20 panels .049
    # (three points of a panel go together); four of them are a false alarm in 16,000
    assert abs(band_coverage(40, 40, seed=1) - 0.95) < 0.14
    assert log_rank_size(25, 40, seed=1) < 0.05 + 0.18
    assert cox_coverage(20, 60, seed=1) > 0.95 - 0.2


# --- forgetting events -----------------------------------------------------------------------


def test_forgetting_events_by_hand():
    # by hand: 0,1,1,0,1,0,0,1 is forgotten twice and first learned at the second look (here step
    # 101); never learned; never forgotten once learned
    table = panel(
        {
            "twice": [0, 1, 1, 0, 1, 0, 0, 1],
            "never": [0] * 8,
            "always": [0, 0, 1, 1, 1, 1, 1, 1],
            "once": [1, 0, 0, 0, 0, 0, 0, 0],
        }
    )
    got = forgetting_events(table).set_index("item")
    assert got.loc["twice", ["value", "lo", "hi", "event", "learned"]].tolist() == [
        2, 2, np.inf, "forgotten", 101,
    ]  # fmt: skip
    assert np.isnan(got.loc["never", "value"]) and got.loc["never", "event"] == "never learned"
    assert got.loc["never", "reason"] == "at no checkpoint reproduced word for word"
    assert np.isnan(got.loc["never", ["lo", "hi", "learned"]].astype(float)).all()
    assert got.loc["always", ["value", "event", "learned"]].tolist() == [0, "unforgettable", 102]
    assert got.loc["once", ["value", "event", "learned"]].tolist() == [1, "forgotten", 100]
    assert set(got["step"]) == {107} and set(got["metric"]) == {"forgetting_events"}
    assert got.attrs["rule"] == "reproduced word for word"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=5))
def test_forgetting_events_against_a_loop(histories):
    got = forgetting_events(panel({f"i{k}": h for k, h in enumerate(histories)})).set_index("item")
    for k, h in enumerate(histories):
        want = sum(a and not b for a, b in pairwise(h)) if any(h) else np.nan
        np.testing.assert_equal(float(got.loc[f"i{k}", "value"]), float(want))


# --- errors ----------------------------------------------------------------------------------

GOOD = {"a": [1, 1, 0], "b": [1, 1, 1]}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: t.drop(columns="lag"), {}, "survival_times: no column 'lag'; align_exposures gives it"),
        (lambda t: t, {"spells": "all"}, "survival_times: spells is 'all'; choose last or every"),
        (lambda t: t.assign(lag=-1.0), {}, "survival_times: lag is -1, it cannot be below 0"),
        (
            lambda t: t.assign(lag=np.nan), {},
            "survival_times: no item was trained on at or before a checkpoint",
        ),
        (
            lambda t: t.assign(value=0.0), {},
            "survival_times: of 2 items 2 were not known right after their exposure (reproduced "
            "word for word) and 0 not looked at within 0 updates; nothing can be lost",
        ),
        (
            lambda t: t.assign(metric="log_probability", value=-1.0), {},
            "survival_times: no rows of group never or unseen to compare a score with; name the "
            "controls, or give verdicts such as extractable",
        ),
        (
            lambda t: t.assign(metric="outcome"), {"threshold": 0.5},
            "survival_times: outcome is neither better high nor low",
        ),
        (
            lambda t: pd.concat([t, t.assign(metric="top1")]), {},
            "survival_times: needs rows of one metric, got extractable, top1; select one first",
        ),
    ],
)  # fmt: skip
def test_errors_of_times(change, options, message):
    with pytest.raises(InputError) as raised:
        survival_times(change(panel(GOOD)), **options)
    assert str(raised.value) == message


def test_errors_of_margins():
    table = panel(GOOD).assign(metric="log_probability", value=-1.0)
    for change, options, message in (
        (lambda t: t, {}, "item_margins: no column 'cohort'; align_exposures or the items give it"),
        (lambda t: t, {"quantile": 1}, "item_margins: quantile is 1, it must lie between 0 and 1"),
        (
            lambda t: t.assign(cohort=np.where(t["item"] == "a", 101.0, np.nan), kind="k"), {},
            "item_margins: 1 never-trained items at kind=k, too few to know what 95% of such texts "
            "stay below; add some or lower the quantile",
        ),
        (
            lambda t: t.assign(cohort=np.where(t["item"] == "a", 100.0, np.nan)), {"quantile": 0.5},
            "item_margins: no item was first trained on after the first checkpoint",
        ),
    ):  # fmt: skip
        with pytest.raises(InputError) as raised:
            item_margins(change(table), **options)
        assert str(raised.value) == message


TIMES = dict(value=[1, 2, 3, 4, 5, 5], lost=[1, 1, 1, 1, 0, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda t: survival_curve(t.assign(metric="event_step")),
            "survival_curve: needs what survival_times gives, got event_step",
        ),
        (
            lambda t: survival_curve(t.assign(kind=[1.0, np.nan, 1, 1, 1, 1]), by=["kind"]),
            "survival_curve: kind is missing for 1 items; leave them out",
        ),
        (lambda t: survival_curve(t, level=1), "survival_curve: level is 1, it must lie between 0 and 1"),
        (lambda t: survival_curve(t, draws=-1), "survival_curve: draws is -1, it cannot be below 0"),
        (
            lambda t: survival_curve(t, method="km"),
            "survival_curve: method is 'km'; choose kaplan_meier or turnbull",
        ),
        (
            lambda t: compare_survival(t.assign(kind="k"), by="kind"),
            "compare_survival: needs two groups of kind or more, got 1",
        ),
        (
            lambda t: compare_survival(t.assign(kind=list("aabbbc")), by="kind"),
            "compare_survival: kind=c has one item; pool it or leave it out",
        ),
        (lambda t: fit_survival(t, ["x"], law="cx"), "fit_survival: law is 'cx'; choose cox, weibull, lognormal, loglogistic"),
        (lambda t: fit_survival(t, []), "fit_survival: no covariates; survival_curve describes times alone"),
        (lambda t: fit_survival(t, ["x"], log2=["y"]), "fit_survival: y is in log2 and not in covariates"),
        (
            lambda t: fit_survival(t.assign(x=[0.0, 1, 2, 3, 4, 5]), ["x"], log2=["x"]),
            "fit_survival: x goes down to 0 and has no doublings",
        ),
        (
            lambda t: fit_survival(t.assign(x=list("aabbab")), ["x"], log2=["x"]),
            "fit_survival: x is text and has no doublings",
        ),
        (
            lambda t: fit_survival(t.assign(x=32), ["x"]),
            "fit_survival: x is 32 for all 6 items, so it explains nothing; leave it out",
        ),
        (
            lambda t: fit_survival(t.assign(x=list("aabbbc")), ["x"]),
            "fit_survival: x=c has one item; pool it or leave it out",
        ),
        (
            lambda t: fit_survival(t.assign(event="kept", hi=np.inf), ["x"]),
            "fit_survival: none of 6 items was lost, so there is no rate",
        ),
        (
            lambda t: fit_survival(t.assign(y=t["x"] * 2), ["x", "y"]),
            "fit_survival: x, y cannot be told apart from one another or from a constant in these "
            "items; leave one out",
        ),
        (
            lambda t: fit_survival(t.assign(y=[0.0, 1, 0, 1, 1, 0], z=[1.0, 1, 0, 0, 1, 0], w=[2.0, 1, 5, 0, 1, 0]), ["x", "y", "z", "w"]),
            "fit_survival: 4 of 6 items lost for 4 terms; there must be more losses than terms, and "
            "ten a term are advised",
        ),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(InputError) as raised:
        call(made(**TIMES, x=[1.0, 2, 4, 3, 5, 7]))
    assert str(raised.value) == message


def test_lifelines_comes_late_and_leaves_numpy_alone():
    code = "import sys, workbench.stats.survival; print('lifelines' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    before, held = np.geterr(), list(warnings.filters)
    survival_curve(made(**TIMES))
    assert np.geterr() == before and warnings.filters == held


# --- figures ---------------------------------------------------------------------------------


def test_plot_survival_draws_the_table():
    table = made([1, 1, 2, 3, 4, 2, 6], [1, 1, 1, 0, 1, 0, 1], kind=list("aaaaabb"))
    curve = survival_curve(table, by=["kind"])
    figure = plot_survival(curve.sample(frac=1, random_state=0))
    lines = {t.name: t for t in figure.data if t.mode == "lines" and t.name}
    assert list(lines) == ["a (n=5)", "b (n=2)"]
    assert list(lines["a (n=5)"].x) == [1, 2, 3, 4, 5] and lines["a (n=5)"].line.shape == "hv"
    np.testing.assert_allclose(lines["a (n=5)"].y, [1, 0.6, 0.4, 0.4, 0])
    ticks = [t for t in figure.data if t.mode == "markers"]
    assert [list(t.x) for t in ticks] == [[4], [3]]  # censored at 3 and at 2
    # at risk at 0, 1, 2 and 4, the ticks that do not touch, just before each
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2", "4"]
    told = [list(t.text) for t in figure.data if t.mode == "text"]
    assert told == [["5", "5", "3", "1"], ["2", "2", "2", "1"]]
    halves = [list(t.x) for t in figure.data if t.line.dash == "dot" and t.name is None]
    assert halves == [[3, 3], [7, 7]]
    # the band of a: from the first loss on, with its corners, until none is left
    band = next(t for t in figure.data if t.fill == "toself")
    assert list(band.x)[:5] == [2, 3, 3, 4, 4]
    smooth = plot_survival(survival_curve(table, by=["kind"], method="turnbull", draws=0))
    assert all(t.mode != "text" for t in smooth.data)
    for wrong, message in (
        (curve[curve["metric"] == "hazard"], "plot_survival: the table has no rows of survival; it has hazard"),
        (pd.concat([curve, curve.assign(method="turnbull")]), "plot_survival: rows of kaplan_meier and turnbull; select one method"),
        (pd.concat([curve, curve.assign(run="s")]), "plot_survival: several rows per (kind, time); select one of them"),
    ):  # fmt: skip
        with pytest.raises(InputError) as raised:
            plot_survival(wrong)
        assert str(raised.value) == message


def test_plot_hazards_draws_the_ratios():
    table, _ = simulate(40, np.random.default_rng(8))
    table = table.assign(kind=np.array(["<a>", "b"])[np.arange(40) % 2])
    cox = fit_survival(table, ["x", "kind"])
    figure = plot_hazards(cox)
    points = figure.data[0]
    ratio = of(cox, "hazard_ratio")
    np.testing.assert_allclose(points.x, ratio["value"], atol=1e-6)
    np.testing.assert_allclose(points.x + points.error_x.array, ratio["hi"], atol=1e-5)
    assert figure.layout.xaxis.type == "log"
    assert list(figure.layout.yaxis.ticktext) == ["x", "kind: b, not &lt;a&gt;"]
    x = ratio.iloc[0]
    assert figure.layout.annotations[0].text == f"{x['value']:.3g} [{x['lo']:.3g}, {x['hi']:.3g}]"
    # what has no estimate is named, and not drawn
    holes = cox.assign(value=cox["value"].where(cox["covariate"] != "x"))
    empty = plot_hazards(holes)
    assert len(empty.data[0].x) == 1 and empty.layout.annotations[0].text == "no estimate"
    aft = fit_survival(table, ["x"], law="weibull")
    for wrong, message in (
        (pd.concat([cox, aft]), "plot_hazards: needs hazard ratios or time ratios, got both; select one"),
        (cox[cox["metric"] == "aic"], "plot_hazards: needs hazard ratios or time ratios, got neither"),
        (pd.concat([cox, cox.assign(run="s")]), "plot_hazards: several rows per (covariate, law); select one of them"),
    ):  # fmt: skip
        with pytest.raises(InputError) as raised:
            plot_hazards(wrong)
        assert str(raised.value) == message


def test_life_events_take_no_threshold():
    assert "rule" in life_events(panel(GOOD)).attrs
