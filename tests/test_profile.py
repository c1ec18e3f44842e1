from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from workbench.stats import cells as cells_module
from workbench.stats import influence
from workbench.stats import panel as panels
from workbench.stats.influence import SIGNS
from workbench.stats.profile import (
    BY,
    detectable_effect,
    memorization_profile,
    pretrend_test,
    profile_by,
)
from workbench.table import InputError, rows, validate

NAN = np.nan


def panel(values: dict, steps: list, cohorts: dict) -> pd.DataFrame:
    """An item table; ``values[item]`` over steps (None: no row), ``cohorts[item]`` if trained on."""
    parts = []
    for item, curve in values.items():
        seen = [(s, v) for s, v in zip(steps, curve, strict=True) if v is not None]
        parts.append(
            rows(
                "outcome",
                [v for _, v in seen],
                run="r",
                step=[s for s, _ in seen],
                item=item,
                beside={"cohort": float(cohorts.get(item, NAN))},
            )
        )
    return pd.concat(parts, ignore_index=True)


def staggered(seed: int, *, holes: float = 0.0, sizes=(5, 4, 7, 6), effect: float = 1.0):
    """Three cohorts and never-trained items over seven checkpoints, unevenly spaced."""
    rng = np.random.default_rng(seed)
    steps = np.array([2, 5, 6, 9, 14, 15, 30])
    starts = [6, 8, 15, NAN]
    values, cohorts = {}, {}
    for start, size in zip(starts, sizes, strict=True):
        for _ in range(size):
            item = f"i{rng.integers(10**9)}"
            curve = rng.normal(-3, 2) + rng.normal(size=7).cumsum()
            curve = curve + effect * np.where(steps >= start, 1.0, 0.0)
            values[item] = [None if rng.random() < holes else v for v in curve]
            cohorts[item] = start
    return panel(values, list(steps), cohorts)


HAND = panel(
    dict(a=(1, 2), b=(1, 3), c=(1, 1.5), d=(1, 1.5), e=(1, 2), f=(1, 1)), [5, 10], dict(a=7, b=7)
)


# --- a slow twin: loops over cells and items ------------------------------------------------------


def slow_cells(table: pd.DataFrame, control: str, base: str) -> list[dict]:
    """Each cell with its influence per item, straight from the definition."""
    wide = table.pivot(index="item", columns="step", values="value")
    cohort = table.drop_duplicates("item").set_index("item")["cohort"].fillna(np.inf)[wide.index]
    steps, found = list(wide.columns), []
    for g in sorted(set(cohort) - {np.inf}):
        before = max(s for s in steps if s < g)
        for index, t in enumerate(steps):
            b = before
            if t < g and base == "varying":
                if index == 0:
                    continue
                b = steps[index - 1]
            if b == t:
                continue
            change = (wide[t] - wide[b]).dropna()
            mine = change[cohort[change.index] == g]
            theirs = change[cohort[change.index] == np.inf]
            if control == "not_yet":
                later = (cohort[change.index] > max(t, b)) & (cohort[change.index] != g)
                theirs = change[later]
            influence = pd.Series(0.0, index=wide.index)
            for item, value in mine.items():
                influence[item] = (value - mine.mean()) / len(mine)
            for item, value in theirs.items():
                influence[item] = -(value - theirs.mean()) / len(theirs)
            found.append(
                dict(
                    g=g, t=t, placebo=t < g, n=len(mine), value=mine.mean() - theirs.mean(),
                    influence=influence, size=int((cohort == g).sum()), cohort=cohort,
                    mine=mine, theirs=theirs,
                )
            )  # fmt: skip
    return found


def slow_psi(cells: list[dict]) -> tuple[float, pd.Series]:
    """Mean with weights estimated as cohort shares, and psi per item, formed with n."""
    cells = [cell for cell in cells if np.isfinite(cell["value"])]
    total_items = len(cells[0]["influence"])
    share = np.array([cell["size"] / total_items for cell in cells])
    value = np.array([cell["value"] for cell in cells])
    weight = share / share.sum()
    psi = total_items * sum(w * c["influence"] for w, c in zip(weight, cells, strict=True))
    for item in psi.index:
        indicator = np.array([float(c["cohort"][item] == c["g"]) for c in cells])
        first = (indicator - share) / share.sum()
        second = share * (indicator - share).sum() / share.sum() ** 2
        psi[item] += ((first - second) * value).sum()
    return float((weight * value).sum()), psi


def slow_aggregate(cells: list[dict]) -> tuple[float, float]:
    value, psi = slow_psi(cells)
    return value, float(np.sqrt((psi**2).mean() / len(psi)))


@pytest.mark.parametrize("holes", [0.0, 0.1])
@pytest.mark.parametrize("control", ["never", "not_yet"])
@pytest.mark.parametrize("base", ["varying", "universal"])
def test_cells_agree_with_the_loop(holes, control, base):
    for seed in range(4):
        table = staggered(seed, holes=holes, sizes=(9, 8, 11, 10))
        want = slow_cells(table, control, base)
        got = memorization_profile(table, control=control, base=base, simultaneous=False)
        assert len(got) == len(want)
        for cell in want:
            row = got[(got["cohort"] == cell["g"]) & (got["step"] == cell["t"])].iloc[0]
            assert row["metric"] == ("placebo" if cell["placebo"] else "memorization")
            assert row["n"] == cell["n"]
            assert row["lag"] == cell["t"] - cell["g"]
            np.testing.assert_allclose(row["value"], cell["value"], rtol=0, atol=1e-10)
            error = np.sqrt((cell["influence"] ** 2).sum())
            if cell["n"] > 1:
                np.testing.assert_allclose(row["se"], error, rtol=0, atol=1e-10)
            half = stats.norm.ppf(0.975) * row["se"]
            np.testing.assert_allclose(
                [row["lo"], row["hi"]], row["value"] + np.array([-1, 1]) * half
            )


@pytest.mark.parametrize("holes", [0.0, 0.1])
@pytest.mark.parametrize("control", ["never", "not_yet"])
@pytest.mark.parametrize("by", ["lag", "step", "cohort", "overall"])
def test_aggregates_agree_with_the_loop(holes, control, by):
    table = staggered(11, holes=holes, sizes=(9, 8, 11, 10))
    every = [c for c in slow_cells(table, control, "varying") if np.isfinite(c["value"])]
    key = {
        "lag": lambda c: (c["placebo"], c["t"] - c["g"]),
        "step": lambda c: (c["placebo"], c["t"]),
        "cohort": lambda c: (c["placebo"], c["g"]),
        "overall": lambda c: (c["placebo"], None),
    }[by]
    want: dict = {}
    for cell in every:
        want.setdefault(key(cell), []).append(cell)
    if by != "lag":
        want = {k: v for k, v in want.items() if not k[0]}
    got = memorization_profile(table, by=by, control=control, simultaneous=False)
    assert len(got) == len(want)
    for (placebo, where), cells in want.items():
        row = got[got["metric"] == ("placebo" if placebo else "memorization")]
        row = row if by == "overall" else row[row[by] == where]
        assert len(row) == 1
        value, error = slow_aggregate(cells)
        np.testing.assert_allclose(row["value"].item(), value, rtol=0, atol=1e-10)
        np.testing.assert_allclose(row["se"].item(), error, rtol=0, atol=1e-10)


# --- by hand --------------------------------------------------------------------------------------


def test_hand_check_of_the_definitions():
    # METRICS section 5: cohort (2, 3) from (1, 1); controls (1.5, 1.5, 2, 1) from 1s.
    # ATT = 1.5 - 0.5; SE = sqrt(0.25 / 2 + 0.125 / 4) = 0.3952847.
    got = validate(memorization_profile(HAND)).iloc[0]
    assert got["value"] == 1.0
    np.testing.assert_allclose(got["se"], 0.3952847, atol=1e-7)
    assert (got["cohort"], got["step"], got["lag"], got["n"], got["n_control"]) == (7, 10, 3, 2, 4)
    assert got["metric"] == "memorization"


def test_a_checkpoint_at_the_cohorts_update_has_seen_it():
    # s >= g has seen it: at g = 10 the base is step 5 and step 10 is lag 0, not a placebo.
    table = panel(
        dict(a=(0, 2, 3), b=(0, 2, 5), c=(0, 1, 1), d=(0, 0, 0)), [5, 10, 20], {"a": 10, "b": 10}
    )
    got = memorization_profile(table, simultaneous=False)
    assert list(got["lag"]) == [0, 10]
    assert list(got["metric"]) == ["memorization"] * 2
    np.testing.assert_allclose(got["value"], [2 - 0.5, 4 - 0.5])


def test_weights_of_an_aggregate_are_cohort_shares():
    # Cohort 6: two items that gain 1; cohort 12: six that gain 3; controls stay.
    # At step 20 the mean weighs them 2 : 6, so (2 * 1 + 6 * 3) / 8 = 2.5.
    # Overall: three cells, ATT 1 at steps 10 and 20 (weight 2 each) and 3 at 20 (weight 6):
    # (2 + 2 + 18) / 10 = 2.2.
    values = {f"a{i}": (0, 1, 1) for i in range(2)} | {f"b{i}": (0, 0, 3) for i in range(6)}
    values |= {f"c{i}": (0, 0, 0) for i in range(3)}
    cohorts = {f"a{i}": 6 for i in range(2)} | {f"b{i}": 12 for i in range(6)}
    table = panel(values, [5, 10, 20], cohorts)
    by_step = memorization_profile(table, by="step")
    np.testing.assert_allclose(by_step["value"], [1.0, 2.5])
    assert list(by_step["n"]) == [2, 8]
    overall = memorization_profile(table, by="overall").iloc[0]
    np.testing.assert_allclose(overall["value"], 2.2)
    # Outcomes have no spread, so all error comes from the shares: influence of an item of cohort g
    # is sum over its cells of (ATT - 2.2) / 10: 2 items at -2.4 / 10 and 6 at 0.8 / 10.
    np.testing.assert_allclose(overall["se"], np.sqrt(2 * 0.24**2 + 6 * 0.08**2))
    assert list(memorization_profile(table, by="cohort")["value"]) == [1.0, 3.0]
    by_lag = memorization_profile(table, by="lag")
    assert dict(zip(by_lag["lag"], by_lag["value"], strict=True)) == {-2: 0, 4: 1, 8: 3, 14: 1}


def test_not_yet_trained_controls_by_hand():
    # Without never-trained items, cohort 12 serves cohort 6 at step 10 but not at step 20.
    values = dict(a=(0, 2, 5), b=(0, 4, 5), c=(0, 1, 9), d=(0, 3, 9))
    table = panel(values, [5, 10, 20], dict(a=6, b=6, c=12, d=12))
    got = memorization_profile(table, control="not_yet", simultaneous=False)
    got = got.set_index(["cohort", "step"])
    assert got.loc[(6, 10), "value"] == 3 - 2
    assert np.isnan(got.loc[(6, 20), "value"])
    assert got.loc[(6, 20), "reason"] == "no estimate: no item left in controls"
    assert np.isnan(got.loc[(12, 10), "value"])  # cohort 6 is trained on by then
    assert got.loc[(6, 20), "n_control"] == 0
    overall = memorization_profile(table, control="not_yet", by="overall")
    assert overall["value"].item() == 1  # the one cell that has controls


def test_universal_base_leaves_out_the_cell_that_is_zero_by_definition():
    table = panel(
        dict(a=(1, 3, 4, 9), b=(0, 2, 5, 9), c=(0, 0, 0, 0), d=(0, 0, 0, 0)),
        [1, 2, 3, 4],
        dict(a=4, b=4),
    )
    universal = memorization_profile(table, base="universal", simultaneous=False)
    assert list(universal["step"]) == [1, 2, 4]
    np.testing.assert_allclose(universal["value"], [0.5 - 4.5, 2.5 - 4.5, 9 - 4.5])
    varying = memorization_profile(table, simultaneous=False)
    assert list(varying["step"]) == [2, 3, 4]
    np.testing.assert_allclose(varying["value"], [2, 2, 9 - 4.5])
    assert list(varying["metric"]) == ["placebo", "placebo", "memorization"]


def with_lags(table: pd.DataFrame, exposures: dict) -> pd.DataFrame:
    """Lag, copies and dose of items from the updates of their exposures."""
    times = [np.array(exposures.get(item, [])) for item in table["item"]]
    past = [when[when <= step] for when, step in zip(times, table["step"], strict=True)]
    return table.assign(
        lag=[s - p.max() if len(p) else NAN for p, s in zip(past, table["step"], strict=True)],
        copies=[len(p) for p in past],
        dose=[len(when) for when in times],
    )


def test_event_study_runs_over_updates_since_the_last_exposure():
    # Trained on at updates 7 and 12. Step 10 has lag 3 but one exposure to come, so at lag 3 only
    # step 15 counts; ATT there is 5.
    values = dict(a=(0, 1, 5, 4), b=(0, 3, 5, 2), c=(0, 0, 0, 0), d=(0, 0, 0, 0))
    table = panel(values, [5, 10, 15, 20], dict(a=7, b=7))
    table = with_lags(table, dict(a=[7, 12], b=[7, 12]))
    by_dose = memorization_profile(table, by="lag", simultaneous=False)
    assert dict(zip(by_dose["lag"], by_dose["value"], strict=True)) == {3: 5, 8: 3}
    by_lag_alone = memorization_profile(
        table.drop(columns=["copies", "dose"]), by="lag", simultaneous=False
    )
    assert dict(zip(by_lag_alone["lag"], by_lag_alone["value"], strict=True)) == {3: 5, 8: 3}
    cells = memorization_profile(table, simultaneous=False)
    assert dict(zip(cells["step"], cells["lag"], strict=True)) == {10: 3, 15: 3, 20: 8}


def test_profile_by_compares_within_strata():
    # Verses rise by 1 in the controls and 3 in the trained; strings by 5 and 5.
    values = dict(
        v1=(0, 2.5), v2=(0, 3.5), w1=(0, 0), w2=(0, 2), s1=(0, 5), s2=(1, 6), t1=(0, 6), t2=(0, 4)
    )
    table = panel(values, [1, 3], dict(v1=2, v2=2, s1=2, s2=2))
    table["kind"] = np.where(table["item"].str[0].isin(["v", "w"]), "verse", "string")
    table["dose"] = np.where(table["cohort"].notna(), 4, 0)
    got = validate(profile_by(table, strata=("kind",)))
    assert dict(zip(got["kind"], got["value"], strict=True)) == {"string": 0.0, "verse": 2.0}
    assert set(got["dose"]) == {4}
    assert list(got["n_control"]) == [2, 2]
    assert set(got.attrs["profiles"]) == {"kind=string, dose=4", "kind=verse, dose=4"}
    together = profile_by(table, strata=(), dose="dose")
    np.testing.assert_allclose(together["value"], 4 - 3)


def test_detectable_effect_is_a_multiple_of_the_error():
    # z(.975) + z(.8) = 1.959964 + .841621 = 2.801585; times .3952847 = 1.1074238
    got = validate(detectable_effect(HAND)).iloc[0]
    np.testing.assert_allclose(got["value"], 1.1074238, atol=1e-6)
    assert got["metric"] == "detectable"
    assert (got["cohort"], got["step"]) == (7, 10)


def test_one_item_and_no_spread_have_no_error():
    table = panel(dict(a=(0, 3), c=(0, 1), d=(0, 0)), [1, 3], dict(a=2))
    got = validate(memorization_profile(table)).iloc[0]
    assert got["value"] == 2.5
    assert np.isnan(got["se"]) and np.isnan(got["lo"])
    assert got["reason"] == "no error: one item in a cohort"
    table = panel(dict(a=(0, 3), b=(1, 4), c=(0, 1), d=(5, 6)), [1, 3], dict(a=2, b=2))
    got = memorization_profile(table).iloc[0]
    assert got["value"] == 2
    assert np.isnan(got["se"])
    assert got["reason"] == "no spread: every item moved alike"
    one_control = panel(dict(a=(0, 3), b=(1, 5), c=(0, 1)), [1, 3], dict(a=2, b=2))
    assert memorization_profile(one_control)["reason"].item() == "no error: one item in controls"


@pytest.mark.parametrize("holes", [[], [18]])
@pytest.mark.parametrize("by", BY)
def test_constant_outcomes_have_an_effect_of_zero_and_no_error(by, holes):
    values = {name: (0.1, 0.1, 0.1, 0.1) for name in "abcdefgh"}
    table = panel(values, [1, 2, 4, 8], dict(a=3, b=3, c=5, d=5)).drop(index=holes)
    got = validate(memorization_profile(table, by=by))
    assert (got["value"] == 0).all() and got["se"].isna().all() and got["lo"].isna().all()
    assert set(got["reason"]) == {"no spread: every item moved alike"}
    assert pretrend_test(table)["value"].isna().all()


def test_a_cell_without_items_is_a_reason_and_the_rest_goes_on():
    # both items of cohort 3 were not scored at step 2, the base of all its cells from 4 on
    values = dict(a=(0, None, 1, 2), b=(0, None, 2, 4), c=(0, 1, 1, 0), d=(0, 0, 1, 1))
    table = panel(values, [1, 2, 4, 8], dict(a=3, b=3))
    got = memorization_profile(table)
    assert set(got["reason"]) == {"no estimate: no item left in a cohort"}
    assert got["value"].isna().all() and (got["n"] == 0).all()
    assert got.attrs["dropped"] == 2
    only_one = panel(values | dict(a=(0, 0, 1, 2)), [1, 2, 4, 8], dict(a=3, b=3))
    got = memorization_profile(only_one)
    assert list(got["n"]) == [1, 1, 1]
    assert set(got["reason"]) == {"no error: one item in a cohort"}
    # a: 1 - 0, controls: (1 - 1, 1 - 0), so 1 - .5
    assert got.set_index("step")["value"][4] == 0.5
    with pytest.raises(InputError, match="^memorization_profile: no cell to average by overall"):
        memorization_profile(table, by="overall")


def test_step_zero_is_left_out_and_said():
    values = {f"a{i}": (-7, -7 + i, 1 + i, i) for i in range(3)} | {
        f"b{i}": (-7, -3, i, 2 * i) for i in range(3)
    }
    values |= {f"c{i}": (-7, -5 + i, 0, 1) for i in range(3)}
    cohorts = {f"a{i}": 4 for i in range(3)} | {f"b{i}": 9 for i in range(3)}
    table = panel(values, [0, 5, 10, 15], cohorts)
    got = memorization_profile(table)
    assert got.attrs["excluded"] == [4]
    assert set(got["cohort"]) == {9}
    assert list(got["step"]) == [10, 15]  # no placebo at 5, whose base were step 0
    # a cohort at the first trained checkpoint has no earlier one but step 0 either
    at_five = table.assign(cohort=table["cohort"].replace(4, 5))
    assert memorization_profile(at_five).attrs["excluded"] == [5]
    full = memorization_profile(table, exclude_initial=False)
    assert full.attrs["excluded"] == []
    assert list(full[full["cohort"] == 4]["step"]) == [5, 10, 15]
    assert list(full[full["cohort"] == 9]["metric"]) == ["placebo", "memorization", "memorization"]
    assert full.attrs["cohort_sizes"] == {"4": 3, "9": 3, "never": 3}


def test_missing_rows_and_missing_values_are_one_and_are_counted():
    table = staggered(3, sizes=(6, 6, 6, 6))
    gone = [4, 31, 77, 100]
    holed = table.copy()
    holed.loc[gone, "value"] = NAN
    a, b = memorization_profile(holed), memorization_profile(table.drop(index=gone))
    pd.testing.assert_frame_equal(a, b)
    assert a.attrs["dropped"] == 4
    assert memorization_profile(table).attrs["dropped"] == 0


# --- clusters -------------------------------------------------------------------------------------


def clustered(seed: int, *, crossing: bool, holes: float) -> pd.DataFrame:
    """:func:`staggered` with documents of 1 to 5 items, within cohorts or across them."""
    table = staggered(seed, holes=holes, sizes=(13, 12, 15, 14))
    rng = np.random.default_rng(seed)
    document = {item: f"d{rng.integers(9)}" for item in sorted(table["item"].unique())}
    table["document"] = table["item"].map(document)
    if not crossing:
        table["document"] += table["cohort"].fillna(0).astype(int).astype(str)
    return table


def document_influence(table: pd.DataFrame, influence: pd.Series) -> pd.Series:
    document = table.drop_duplicates("item").set_index("item")["document"]
    return influence.groupby(document).sum()


@pytest.mark.parametrize("holes", [0.0, 0.1])
@pytest.mark.parametrize("control", ["never", "not_yet"])
@pytest.mark.parametrize("crossing", [False, True])
def test_clusters_sum_their_items_influence_before_squaring(crossing, control, holes):
    table = clustered(3, crossing=crossing, holes=holes)
    cells = slow_cells(table, control, "varying")
    got = memorization_profile(table, control=control, cluster="document", simultaneous=False)
    assert len(got) == len(cells)
    for cell, (_, row) in zip(cells, got.iterrows(), strict=True):
        assert (row["cohort"], row["step"]) == (cell["g"], cell["t"])
        np.testing.assert_allclose(row["value"], cell["value"], rtol=0, atol=1e-10)
        error = np.sqrt((document_influence(table, cell["influence"]) ** 2).sum())
        np.testing.assert_allclose(row["se"], error, rtol=0, atol=1e-10)
    for by in ("lag", "step", "cohort", "overall"):
        got = memorization_profile(
            table, by=by, control=control, cluster="document", simultaneous=False
        )
        got = got[got["metric"] == "memorization"]
        later = [c for c in cells if not c["placebo"]]
        for _, row in got.iterrows():
            place = dict(lag=row["lag"], step=row["step"], cohort=row["cohort"], overall=None)[by]
            key = dict(
                lag=lambda c: c["t"] - c["g"], step=lambda c: c["t"], cohort=lambda c: c["g"]
            )
            mine = [c for c in later if by == "overall" or key[by](c) == place]
            value, psi = slow_psi(mine)
            np.testing.assert_allclose(row["value"], value, rtol=0, atol=1e-10)
            error = np.sqrt((document_influence(table, psi / len(psi)) ** 2).sum())
            np.testing.assert_allclose(row["se"], error, rtol=0, atol=1e-10)


@pytest.mark.parametrize("holes", [0.0, 0.1])
@pytest.mark.parametrize("crossing", [False, True])
def test_wald_and_draws_use_clusters(crossing, holes):
    table = clustered(4, crossing=crossing, holes=holes)
    cells = [c for c in slow_cells(table, "never", "varying") if c["placebo"]]
    psi = np.array([document_influence(table, c["influence"]) for c in cells])
    theta = np.array([c["value"] for c in cells])
    V = psi @ psi.T
    got = pretrend_test(table, cluster="document")
    rank = got.attrs["degrees_of_freedom"]
    assert rank == np.linalg.matrix_rank(V)
    np.testing.assert_allclose(got["value"][0], theta @ np.linalg.pinv(V) @ theta, rtol=1e-7)
    # the draws' spread is the analytic error: with 4,000 draws an interquartile range is known to
    # 2.5 %, and a sum of some ten signs is not quite normal
    analytic = memorization_profile(table, cluster="document", simultaneous=False)["se"]
    draws = memorization_profile(
        table, cluster="document", errors="bootstrap", draws=4000, simultaneous=False
    )["se"]
    alone = memorization_profile(table, simultaneous=False)["se"]
    apart = np.abs(draws / analytic - 1).mean()
    assert apart < 0.08
    assert np.abs(draws / alone - 1).mean() > 1.5 * apart


def test_clusters_by_hand():
    # HAND with c and d one document: controls' changes (.5, .5, 1, 0) less .5 are (0, 0, .5, -.5);
    # the sum of c and d is 0, so nothing changes: .3952847. With e and f one: .5 - .5 = 0, so the
    # controls add nothing and the cohort's sqrt(.25 / 2) = .3535534 is left.
    documents = dict(a="1", b="2", c="3", d="3", e="4", f="5")
    one = memorization_profile(HAND.assign(doc=HAND["item"].map(documents)), cluster="doc")
    np.testing.assert_allclose(one["se"], 0.3952847, atol=1e-7)
    documents = dict(a="1", b="2", c="3", d="5", e="4", f="4")
    two = memorization_profile(HAND.assign(doc=HAND["item"].map(documents)), cluster="doc")
    np.testing.assert_allclose(two["se"], 0.3535534, atol=1e-7)
    # a and c one document, across: psi a = -.25 and psi c = 0 ; b and e: .25 and -.125, sum .125.
    # Squares: .25^2 + .125^2 + 0 + .125^2 = .09375.
    documents = dict(a="1", b="2", c="1", d="3", e="2", f="4")
    three = memorization_profile(HAND.assign(doc=HAND["item"].map(documents)), cluster="doc")
    np.testing.assert_allclose(three["se"], np.sqrt(0.09375), atol=1e-7)
    documents = dict(a="1", b="1", c="3", d="4", e="5", f="6")
    for holes in ([], [11]):
        lone = HAND.assign(doc=HAND["item"].map(documents)).drop(index=holes)
        assert memorization_profile(lone, cluster="doc")["reason"].item() == (
            "no error: one cluster in a cohort"
        )


def test_a_cluster_counts_while_one_of_its_items_is_seen():
    # documents 1 (a, b) and 2 (g, h) make up the cohort; h was not scored at step 10
    values = dict(a=(1, 2), b=(1, 3), g=(1, 2), h=(1, None), c=(1, 1.5), d=(1, 1), e=(1, 2))
    table = panel(values, [5, 10], dict(a=7, b=7, g=7, h=7))
    table["doc"] = table["item"].map(dict(a=1, b=1, g=2, h=2, c=3, d=4, e=5))
    got = memorization_profile(table, cluster="doc").iloc[0]
    # changes 1, 2 | 1 less 4 / 3 over 3: (1 / 3) / 3 and (-1 / 3) / 3; controls 0, -.5, .5 over 3
    np.testing.assert_allclose(got["se"], np.sqrt(2 / 81 + 0.5 / 9))
    assert got["reason"] == "" and got["n"] == 3


@pytest.mark.parametrize("holes", [0.0, 0.1])
def test_each_item_its_own_cluster_is_no_cluster(holes):
    table = staggered(8, holes=holes, sizes=(9, 9, 9, 9))
    alone = table.assign(own=table["item"])
    for by in BY:
        want = memorization_profile(table, by=by, simultaneous=False)
        got = memorization_profile(alone, by=by, cluster="own", simultaneous=False)
        pd.testing.assert_frame_equal(got, want)


@pytest.mark.parametrize("holes", [0.0, 0.1])
@pytest.mark.parametrize("crossing", [None, False, True])
def test_pieces_of_any_size_give_the_same(crossing, holes, monkeypatch):
    table = clustered(6, crossing=bool(crossing), holes=holes)
    cluster = None if crossing is None else "document"

    def everything() -> list[pd.DataFrame]:
        profiles = [
            memorization_profile(table, by=by, control=control, cluster=cluster, errors=errors)
            for by in BY
            for control in ("never", "not_yet")
            for errors in ("analytic", "bootstrap")
        ]
        return [*profiles, pretrend_test(table, cluster=cluster)]

    whole = everything()
    for module in (panels, cells_module, influence):
        for name, size in (("ROWS", 10), ("CHUNK", 40), ("BLOCK", 3)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, size)
    for want, got in zip(whole, everything(), strict=True):
        # single precision adds up in another order
        pd.testing.assert_frame_equal(got, want, rtol=1e-5, atol=1e-6)


def test_clusters_of_cohorts_left_out_do_not_count():
    # cohort 4 has only step 0 as base; its documents are also those of others
    table = clustered(5, crossing=True, holes=0.0)
    early = table.assign(step=table["step"] - 2)  # cohort 6 lies behind step 3, the first but 0
    early["cohort"] = early["cohort"].replace(6, 3)
    got = memorization_profile(early, cluster="document")
    assert got.attrs["excluded"] == [3]
    rest = early[(early["cohort"] != 3) & (early["step"] > 0)]
    pd.testing.assert_frame_equal(got, memorization_profile(rest, cluster="document"))


# --- errors by bootstrap, few items ---------------------------------------------------------------


@pytest.mark.parametrize("holes", [0.0, 0.02])
def test_bootstrap_errors_are_the_spread_of_the_draws(holes):
    # 8,000 draws know an interquartile range to 1.8 %; four of that, and a little for 60 items
    table = staggered(9, holes=holes, sizes=(60, 60, 60, 60))
    for by in BY:
        analytic = memorization_profile(table, by=by)
        draws = memorization_profile(table, by=by, errors="bootstrap", draws=8000)
        np.testing.assert_allclose(draws["se"], analytic["se"], rtol=0.08)
        assert (draws["se"] != analytic["se"]).all()
        half = draws.attrs["critical_value"] * draws["se"]
        np.testing.assert_allclose(draws["hi"] - draws["value"], half)
        np.testing.assert_allclose(draws["value"], analytic["value"])


def test_bands_of_few_items_by_hand():
    # HAND: unbiased variances .5 of two and 1 / 6 of four, so .25 + .0416667 = .2916667 and
    # se .5400617; Welch: .2916667^2 / (.25^2 / 1 + .0416667^2 / 3) = 1.3486239 degrees of freedom.
    got = memorization_profile(HAND, quantile="t", simultaneous=False).iloc[0]
    np.testing.assert_allclose(got["se"], 0.5400617, atol=1e-7)
    half = stats.t.ppf(0.975, 1.3486239) * 0.5400617
    np.testing.assert_allclose([got["lo"], got["hi"]], [1 - half, 1 + half], rtol=1e-6)
    values = dict(a=[1, 2], rest=[0.5, 0.5, 1, 0])
    welch = stats.ttest_ind(values["a"], values["rest"], equal_var=False)
    np.testing.assert_allclose(
        [got["lo"], got["hi"]], list(welch.confidence_interval(0.95)), rtol=1e-7
    )


@pytest.mark.parametrize("holes", [0.0, 0.1])
@pytest.mark.parametrize("control", ["never", "not_yet"])
def test_bands_of_few_items_are_welchs(control, holes):
    # scipy's Welch test, cell by cell, on the changes themselves
    table = staggered(12, holes=holes, sizes=(4, 5, 6, 9))
    got = memorization_profile(table, control=control, quantile="t", simultaneous=False)
    at_once = memorization_profile(table, control=control, quantile="t")
    # Sidak: K independent rows that each hold at level^(1 / K) hold together at the level
    tail = (1 - 0.95 ** (1 / at_once["se"].notna().sum())) / 2
    np.testing.assert_allclose(stats.norm.sf(at_once.attrs["critical_value"]), tail)
    compared = 0
    for cell, (_, row), (_, wide) in zip(
        slow_cells(table, control, "varying"), got.iterrows(), at_once.iterrows(), strict=True
    ):
        if not np.isfinite(row["se"]):
            continue
        compared += 1
        welch = stats.ttest_ind(cell["mine"], cell["theirs"], equal_var=False)
        np.testing.assert_allclose(
            [row["lo"], row["hi"]], list(welch.confidence_interval(0.95)), rtol=1e-7
        )
        # at once: the same error, and the degrees of freedom of the smaller sample
        fewest = min(len(cell["mine"]), len(cell["theirs"]))
        np.testing.assert_allclose(wide["se"], row["se"])
        half = stats.t.isf(tail, fewest - 1) * row["se"]
        np.testing.assert_allclose([wide["lo"], wide["hi"]], row["value"] + np.array([-half, half]))
    assert compared > 15


@pytest.mark.parametrize("holes", [0.0, 0.1])
def test_pretrends_of_few_items_by_sidak(holes):
    # the smallest p-value over the placebo cells counts as 1 - (1 - p)^K, where p is of Welch's
    # statistic with the degrees of freedom of the smaller sample
    table = staggered(12, holes=holes, sizes=(4, 5, 6, 9))
    each = []
    for cell in slow_cells(table, "never", "varying"):
        fewest = min(len(cell["mine"]), len(cell["theirs"]))
        if cell["placebo"] and fewest > 1:
            welch = stats.ttest_ind(cell["mine"], cell["theirs"], equal_var=False)
            each.append(2 * stats.t.sf(abs(welch.statistic), fewest - 1))
    got = pretrend_test(table, quantile="t")
    np.testing.assert_allclose(got["value"].iloc[2], 1 - (1 - min(each)) ** len(each), rtol=1e-8)
    assert got["n"].iloc[2] == len(each)
    assert list(got["value"][:2]) == list(pretrend_test(table)["value"][:2])


def test_few_items_of_an_aggregate_by_the_formula():
    # each cohort's own part of the squared error, and the controls' together, with n - 1
    table = staggered(13, sizes=(4, 5, 6, 9))
    cells = [c for c in slow_cells(table, "never", "varying") if not c["placebo"]]
    _, psi = slow_psi(cells)
    cohort = cells[0]["cohort"]
    parts = ((psi / len(psi)) ** 2).groupby(cohort).sum()
    n = cohort.value_counts()[parts.index]
    total = (parts * n / (n - 1)).sum()
    freedom = total**2 / ((parts * n / (n - 1)) ** 2 / (n - 1)).sum()
    got = memorization_profile(table, by="overall", quantile="t", simultaneous=False).iloc[0]
    np.testing.assert_allclose(got["se"], np.sqrt(total))
    half = stats.t.ppf(0.975, freedom) * np.sqrt(total)
    np.testing.assert_allclose(got["hi"] - got["value"], half)


@pytest.mark.parametrize("quantile", ["normal", "t"])
def test_coverage_with_four_items_a_cohort(quantile):
    # 4 treated against 40 controls, 100 panels of 5 cells. Bands of "t" hold each truth in .95 of
    # cells; cells of a panel hang together, so 100 to 500 draws: .89 or less has odds of at most
    # 1 %. Normal bands hold .85, and over .93 would be as rare.
    inside = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        cohort = np.repeat([7.0, NAN], [4, 40])
        value = rng.normal(size=(44, 6)).cumsum(axis=1)
        table = long(value, [2, 4, 6, 8, 10, 12], cohort)
        got = memorization_profile(table, quantile=quantile, simultaneous=False)
        inside.append(((got["lo"] <= 0) & (got["hi"] >= 0)).mean())
    assert np.mean(inside) > 0.89 if quantile == "t" else np.mean(inside) < 0.93


# --- any panel ------------------------------------------------------------------------------------


def long(value: np.ndarray, steps: list, cohort: np.ndarray) -> pd.DataFrame:
    """The four columns that a panel needs."""
    items = len(value)
    return pd.DataFrame(
        {
            "item": np.repeat(np.arange(items), len(steps)),
            "step": np.tile(steps, items),
            "cohort": np.repeat(cohort, len(steps)),
            "value": value.ravel(),
        }
    )


@pytest.mark.parametrize("ask", [memorization_profile, pretrend_test, detectable_effect])
def test_four_columns_are_enough(ask, tmp_path):
    table = staggered(1, sizes=(9, 9, 9, 9)).assign(run="panel")
    bare = table[["item", "step", "cohort", "value"]]
    want = ask(table)
    assert set(want["run"]) == {"panel"} and set(want["group"]) == {"all"}
    pd.testing.assert_frame_equal(ask(bare), want)
    bare.to_parquet(tmp_path / "panel.parquet")
    pd.testing.assert_frame_equal(ask(pd.read_parquet(tmp_path / "panel.parquet")), want)
    # columns of pandas' own types, and items with numbers for names
    other = bare.astype({"cohort": "Int64", "step": "Int32", "value": "Float64"})
    pd.testing.assert_frame_equal(ask(other), want)
    pd.testing.assert_frame_equal(ask(bare.astype({"item": "category"})), want)
    bare = bare.assign(item=pd.factorize(bare["item"], sort=True)[0])
    pd.testing.assert_frame_equal(ask(bare), want)


def test_a_cohort_of_infinity_is_never():
    got = memorization_profile(HAND.fillna({"cohort": np.inf}))
    pd.testing.assert_frame_equal(got, memorization_profile(HAND))


# --- invariances ----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(0.01, 100),
    by=st.sampled_from(BY),
    control=st.sampled_from(["never", "not_yet"]),
    holes=st.sampled_from([0.0, 0.05]),
)
def test_levels_of_items_and_steps_change_nothing(seed, scale, by, control, holes):
    table = staggered(seed, holes=holes, sizes=(9, 9, 9, 9))
    rng = np.random.default_rng(seed)
    level = {item: rng.normal(0, 20) for item in table["item"].unique()}
    drift = {step: rng.normal(0, 20) for step in table["step"].unique()}
    other = table.assign(
        value=scale * (table["value"] + table["item"].map(level) + table["step"].map(drift))
    )
    a = memorization_profile(table, by=by, control=control, seed=seed)
    b = memorization_profile(other, by=by, control=control, seed=seed)
    for name, within in (("value", 1e-9), ("se", 1e-9), ("lo", 1e-4), ("hi", 1e-4)):
        # the draws behind a band are multiplied in single precision
        np.testing.assert_allclose(b[name], scale * a[name], rtol=1e-7, atol=within * scale)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_order_and_names_of_items_change_nothing(seed):
    table = staggered(seed, sizes=(9, 9, 9, 9))
    plain = memorization_profile(table, seed=1)
    shuffled = table.sample(frac=1, random_state=seed, ignore_index=True)
    pd.testing.assert_frame_equal(memorization_profile(shuffled, seed=1), plain)
    rng = np.random.default_rng(seed)
    names = table["item"].unique()
    renamed = table.assign(
        item=table["item"].map(dict(zip(names, rng.permutation(names), strict=True)))
    )
    other = memorization_profile(renamed, seed=1)
    # other names give items other draws, so the band moves within its own noise
    np.testing.assert_allclose(other["value"], plain["value"], atol=1e-12)
    np.testing.assert_allclose(other["se"], plain["se"], atol=1e-12)
    np.testing.assert_allclose(other["hi"] - other["lo"], plain["hi"] - plain["lo"], rtol=0.25)


def test_float32_and_categorical_panels():
    table = staggered(5, sizes=(9, 9, 9, 9))
    single = table.assign(value=table["value"].astype("float32"))
    a, b = memorization_profile(table), memorization_profile(validate(single))
    np.testing.assert_allclose(a["value"], b["value"], atol=1e-5)
    c = memorization_profile(single.assign(item=single["item"].astype("category")))
    np.testing.assert_allclose(a["se"], c["se"], atol=1e-5)


# --- errors are right on average ------------------------------------------------------------------


def test_aggregate_error_is_that_of_resampled_items():
    # Items drawn with replacement, cohort sizes moving along: 1,500 resamples know a standard
    # deviation to 1.8 %, so 8 % apart is beyond four of its standard errors.
    table = staggered(2, sizes=(40, 70, 50, 60))
    rng = np.random.default_rng(0)
    by_lag = memorization_profile(table, by="overall", simultaneous=False).iloc[0]
    wide = table.pivot(index="item", columns="step", values="value")
    cohort = table.drop_duplicates("item").set_index("item")["cohort"].fillna(np.inf)[wide.index]
    Y, g, steps = wide.to_numpy(), cohort.to_numpy(), np.array(wide.columns)

    def overall(Y, g):
        value = weight = 0.0
        never = Y[g == np.inf].mean(axis=0)
        for start in (6, 8, 15):
            b = np.searchsorted(steps, start) - 1
            own = Y[g == start]
            change = (own.mean(axis=0) - own.mean(axis=0)[b]) - (never - never[b])
            value += len(own) * change[b + 1 :].sum()
            weight += len(own) * len(change[b + 1 :])
        return value / weight

    np.testing.assert_allclose(by_lag["value"], overall(Y, g))
    again = []
    for _ in range(1500):
        pick = rng.integers(len(Y), size=len(Y))
        again.append(overall(Y[pick], g[pick]))
    np.testing.assert_allclose(np.std(again), by_lag["se"], rtol=0.08)


def test_the_shares_term_matters():
    # The cohorts' effects differ much, so leaving the shares' error out would halve the error.
    table = staggered(2, sizes=(40, 70, 50, 60))
    table["value"] += 8.0 * ((table["step"] >= table["cohort"]) & (table["cohort"] == 8))
    cells = [c for c in slow_cells(table, "never", "varying") if not c["placebo"]]
    _, error = slow_aggregate(cells)
    weight = np.array([c["size"] for c in cells]) / sum(c["size"] for c in cells)
    fixed = np.sqrt(
        (sum(w * c["influence"] for w, c in zip(weight, cells, strict=True)) ** 2).sum()
    )
    got = memorization_profile(table, by="overall", simultaneous=False)["se"].item()
    np.testing.assert_allclose(got, error, atol=1e-10)
    assert got > 1.5 * fixed


def simulate(seed: int, effect: float) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    steps = np.array([2, 4, 6, 8, 10])
    cohort = np.repeat([5.0, 7.0, NAN], 40)
    value = rng.normal(size=(120, 1)) + rng.standard_normal((120, 5))
    value += effect * (steps >= cohort[:, None])
    return pd.DataFrame(
        {
            "run": "r", "group": "g", "metric": "outcome", "n": 1, "lo": NAN, "hi": NAN,
            "item": np.repeat([f"{i:03d}" for i in range(120)], 5), "step": np.tile(steps, 120),
            "value": value.ravel(), "cohort": np.repeat(cohort, 5),
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def simulated() -> pd.DataFrame:
    """250 panels with an effect of 0.7 and no pre-trend: what covers, what rejects."""
    found = []
    for seed in range(250):
        table, one = simulate(seed, 0.7), {}
        for by in ("cell", "lag"):
            got = memorization_profile(table, by=by, draws=299, seed=seed)
            truth = np.where(got["metric"] == "placebo", 0.0, 0.7)
            one[by] = ((got["lo"] <= truth) & (truth <= got["hi"])).all()
            alone = np.abs(got["value"] - truth) <= 1.959964 * got["se"]
            one[f"{by}, pointwise"] = alone.all()
            one["placebo"] = 1 - alone[got["metric"] == "placebo"].mean()
        tests = pretrend_test(table, draws=299, seed=seed).set_index("metric")["value"]
        found.append(one | {"wald": tests["p_value"], "max-t": tests["p_value_max_t"]})
    return pd.DataFrame(found)


@pytest.mark.parametrize("by", ["cell", "lag"])
def test_simultaneous_bands_cover_at_their_level(by, simulated):
    # With 40 items a group the band covers a little less than .95: .91 to .94, as 1,000 panels say
    # (tests/benchmarks/simulate_profile.py). At a true coverage of .92, under .88 of 250 has odds
    # of 1.0 %, at .94 above .985 of 0.02 %; the seeds are fixed. Pointwise bands cover all rows at
    # once in about .75, which the last line excludes.
    assert 0.88 <= simulated[by].mean() <= 0.985
    assert simulated[f"{by}, pointwise"].mean() < 0.87


def test_placebo_cells_are_rejected_at_the_nominal_rate(simulated):
    # At a true rate of .06 more than .11 of 250 has odds of 0.1 %, less than .015 of 0.02 %.
    # A uniform p-value fails Kolmogorov and Smirnov at .001 in one of a thousand.
    assert 0.015 <= simulated["placebo"].mean() <= 0.11
    for test in ("wald", "max-t"):
        assert 0.015 <= (simulated[test] < 0.05).mean() <= 0.11
        assert stats.kstest(simulated[test], "uniform").pvalue > 0.001


def test_wald_by_hand():
    # One cohort, one placebo cell at step 2: changes (1, 3) against (0, 2, 1): theta = 1,
    # V = 1 / 2 + (2 / 3) / 3 = .7222222, W = 1 / .7222222 = 1.3846154, p = P(chi2_1 > W) = .2393166.
    table = panel(
        dict(a=(0, 1, 5), b=(0, 3, 5), c=(0, 0, 0), d=(0, 2, 2), e=(0, 1, 1)),
        [1, 2, 4],
        dict(a=3, b=3),
    )
    got = validate(pretrend_test(table))
    values = got.set_index(got["metric"].astype(str))["value"]
    np.testing.assert_allclose(values["wald"], 1.3846154, atol=1e-7)
    np.testing.assert_allclose(values["p_value"], 0.2393166, atol=1e-6)
    again = pretrend_test(table)
    assert again.attrs == {"degrees_of_freedom": 1, "cells": 1, "singular": False}


@pytest.mark.parametrize("holes", [0.0, 0.08])
def test_wald_agrees_with_the_loop_and_says_when_singular(holes):
    table = staggered(4, holes=holes, sizes=(9, 9, 9, 9))
    cells = [c for c in slow_cells(table, "never", "varying") if c["placebo"]]
    V = np.array([[(a["influence"] * b["influence"]).sum() for b in cells] for a in cells])
    theta = np.array([c["value"] for c in cells])
    got = pretrend_test(table)
    np.testing.assert_allclose(got["value"][0], theta @ np.linalg.pinv(V) @ theta, rtol=1e-8)
    assert got.attrs["degrees_of_freedom"] == np.linalg.matrix_rank(V) == len(cells)
    # two items a cohort: each cohort's changes span one direction, the controls' one more
    few = staggered(4, sizes=(2, 2, 2, 2))
    cells = [c for c in slow_cells(few, "never", "varying") if c["placebo"]]
    V = np.array([[(a["influence"] * b["influence"]).sum() for b in cells] for a in cells])
    got = pretrend_test(few)
    assert got.attrs["singular"]
    assert got.attrs["degrees_of_freedom"] == np.linalg.matrix_rank(V) < len(cells)


def test_pretrend_without_placebo_cells_gives_a_reason():
    got = validate(pretrend_test(HAND))
    assert got["value"].isna().all()
    assert got["reason"][0] == (
        "no placebo cell with a standard error: too few checkpoints before the exposures"
    )


def test_no_draw_beyond_a_pretrend_is_one_in_all_and_one_more():
    # a pre-trend far beyond every draw: p = 1 / (1 + 199), never 0
    table = simulate(0, 0.0)
    table["value"] += 9.0 * ((table["step"] >= 4) & table["cohort"].notna())
    got = pretrend_test(table, draws=199)
    assert got["value"].iloc[2] == 1 / 200
    # and without one the share of draws beyond it, which is not small
    assert pretrend_test(simulate(0, 0.0), draws=199)["value"].iloc[2] > 0.05


def test_signs_are_rademacher():
    # each of the 256 bytes stands for another row of eight signs, so draws are independent coins
    assert set(np.unique(SIGNS)) == {-1.0, 1.0}
    assert len(np.unique(SIGNS, axis=0)) == 256
    np.testing.assert_array_equal(SIGNS.T @ SIGNS, 256 * np.eye(8))


def test_holes_change_bands_little():
    # the two ways to the multiplier bootstrap, with and without holes, draw different signs
    table = staggered(6, sizes=(60, 60, 60, 60))
    a = memorization_profile(table, draws=2999)
    holed = table.drop(index=table.index[table["item"] == table["item"].iloc[-1]][2])
    b = memorization_profile(holed, draws=2999)
    np.testing.assert_allclose(a.attrs["critical_value"], b.attrs["critical_value"], rtol=0.05)
    assert 2.3 < a.attrs["critical_value"] < 3.3


# --- refusals -------------------------------------------------------------------------------------


def refused(message: str, table: pd.DataFrame, **options) -> None:
    with pytest.raises(InputError) as error:
        memorization_profile(table, **options)
    assert str(error.value) == message


def test_refusals_of_options():
    refused(
        "memorization_profile: by is 'item', it can be cell, lag, step, cohort, overall",
        HAND,
        by="item",
    )
    refused("memorization_profile: control is 'all', it can be never, not_yet", HAND, control="all")
    refused(
        "memorization_profile: base is 'first', it can be varying, universal", HAND, base="first"
    )
    refused(
        "memorization_profile: errors is 'none', it can be analytic, bootstrap",
        HAND,
        errors="none",
    )
    refused("memorization_profile: quantile is 'z', it can be normal, t", HAND, quantile="z")
    with pytest.raises(InputError) as error:
        detectable_effect(HAND, power=1.0)
    assert str(error.value) == "detectable_effect: power is 1.0, it must lie between 0 and 1"
    refused("memorization_profile: draws is 0, it must be at least 1", HAND, draws=0)
    refused("memorization_profile: level is 95, it must lie between 0 and 1", HAND, level=95)


def test_refusals_of_tables():
    refused(
        "memorization_profile: no column 'cohort': the update that first held the item, missing = "
        "never; it needs item, step, value, cohort",
        HAND.drop(columns="cohort"),
    )
    refused(
        "memorization_profile: the table is empty; it needs one row per item and checkpoint",
        HAND.iloc[:0],
    )
    refused(
        "memorization_profile: needs rows of one run, got r, q; select one first",
        pd.concat([HAND, HAND.assign(run="q")]),
    )
    refused(
        "memorization_profile: needs rows of one metric, got outcome, top1; select one first",
        pd.concat([HAND, HAND.assign(metric="top1")]),
    )
    refused(
        "memorization_profile: item a has several rows at step 5; needs one per item and step, so "
        "select one of their other coordinates",
        pd.concat([HAND, HAND.iloc[:1]]),
    )
    infinite = HAND.copy()
    infinite.loc[3, "value"] = -np.inf
    refused(
        "memorization_profile: item b is -inf at step 10, and 1 values are infinite; drop them or "
        "score them again",
        infinite,
    )
    missing = HAND.astype({"step": float})
    missing.loc[0, "step"] = NAN
    refused("memorization_profile: step is missing in some rows; drop those rows", missing)
    for row in (0, 1):
        moved = HAND.copy()
        moved.loc[row, "cohort"] = NAN
        refused(
            "memorization_profile: item a has the cohorts 7 and never; an item has one, the update "
            "that first held it",
            moved,
        )


def test_refusals_of_types():
    refused(
        "memorization_profile: value holds 'much', it needs numbers",
        HAND.assign(value=["much", *map(str, HAND["value"][1:])]),
    )
    refused(
        "memorization_profile: cohort holds 'never', it needs numbers",
        HAND.assign(cohort=HAND["cohort"].astype(object).where(HAND["cohort"].notna(), "never")),
    )
    refused(
        "memorization_profile: step holds 'step10', it needs numbers of updates",
        HAND.assign(step=[f"step{s}" for s in HAND["step"]]),
    )
    refused(
        "memorization_profile: step 2.5 is no whole number of updates",
        HAND.assign(step=HAND["step"] / 2),
    )


def test_refusals_of_clusters():
    refused(
        "memorization_profile: no column 'document'; it needs document", HAND, cluster="document"
    )
    two = HAND.assign(document=[*"xy", *"z" * 10])
    refused(
        "memorization_profile: item a is in document x and y; an item is in one",
        two,
        cluster="document",
    )
    missing = HAND.assign(document=["x"] * 11 + [None])
    refused(
        "memorization_profile: document is missing in some rows; drop those rows",
        missing,
        cluster="document",
    )
    crossing = HAND.assign(document=HAND["item"].map(dict(a=1, b=2, c=2, d=3, e=4, f=5)))
    refused(
        'memorization_profile: quantile="t" needs clusters within cohorts, and document crosses '
        'them; pass quantile="normal"',
        crossing,
        cluster="document",
        quantile="t",
    )
    nested = HAND.assign(document=HAND["item"].map(dict(a=1, b=2, c=3, d=3, e=4, f=5)))
    assert memorization_profile(nested, cluster="document", quantile="t")["se"].notna().all()


def test_each_function_names_itself():
    for ask in (pretrend_test, detectable_effect):
        with pytest.raises(InputError) as error:
            ask(HAND[HAND["cohort"].notna()])
        assert str(error.value) == (
            f"{ask.__name__}: no never-trained items (cohort missing) to compare with; add some, "
            'or pass control="not_yet"'
        )


def test_refusals_without_a_comparison():
    refused(
        "memorization_profile: no never-trained items (cohort missing) to compare with; add some, "
        'or pass control="not_yet"',
        HAND[HAND["cohort"].notna()],
    )
    refused(
        "memorization_profile: one cohort and nothing to compare it with; add never-trained items "
        "(cohort missing) or a later cohort",
        HAND[HAND["cohort"].notna()],
        control="not_yet",
    )
    refused(
        "memorization_profile: no item has a cohort; it needs items that were trained on",
        HAND.assign(cohort=NAN),
    )
    refused(
        "memorization_profile: cohorts 5 were exposed before the first checkpoint (step 5), so "
        "there is nothing to compare with; add an earlier checkpoint or drop them",
        HAND.assign(cohort=HAND["cohort"] - 2),
    )
    refused(
        "memorization_profile: cohorts 0 were exposed before the first checkpoint (step 5), so "
        "there is nothing to compare with; add an earlier checkpoint or drop them (items that were "
        "never trained on have a missing cohort)",
        HAND.fillna({"cohort": 0}),
    )
    refused(
        "memorization_profile: cohorts 2 have only the random initialisation (step 0) as base; add "
        "a checkpoint between, or pass exclude_initial=False",
        HAND.assign(step=HAND["step"] - 5, cohort=HAND["cohort"] - 5),
    )
    refused(
        "memorization_profile: the only checkpoint is step 0; it needs later ones",
        HAND[HAND["step"] == 5].assign(step=0),
    )
    refused(
        "memorization_profile: no cell to average by step; it needs checkpoints after an exposure, "
        "with controls",
        HAND.assign(cohort=HAND["cohort"] + 90),
        by="step",
    )


def test_refusals_of_lags_and_strata():
    table = with_lags(HAND, dict(a=[7], b=[7, 9]))
    refused(
        "memorization_profile: items of cohort 7 have no common lag at step 10; split the items by "
        "their schedule, as profile_by does by dose",
        table,
        by="lag",
    )
    table = with_lags(HAND, dict(a=[7, 9], b=[9]))
    refused(
        "memorization_profile: items of cohort 7 differ in dose; use profile_by",
        with_lags(HAND, dict(a=[7, 9], b=[7, 9])).assign(
            dose=[2 if item == "a" else 3 for item in HAND["item"]]
        ),
        by="lag",
    )
    with pytest.raises(InputError) as error:
        profile_by(HAND, strata=("kind",))
    assert str(error.value) == (
        "profile_by: no column 'kind'; there are run, step, group, item, metric, value, lo, hi, n, "
        "cohort"
    )
    split = HAND.assign(kind=np.where(HAND["cohort"].notna(), "verse", "string"), dose=1)
    with pytest.raises(InputError) as error:
        profile_by(split, strata=("kind",))
    assert str(error.value) == (
        "profile_by: at kind=verse, dose=1: memorization_profile: no never-trained items (cohort "
        'missing) to compare with; add some, or pass control="not_yet"'
    )
    with pytest.raises(InputError) as error:
        profile_by(split.assign(cohort=NAN), strata=("kind",))
    assert str(error.value) == ("profile_by: no item has a cohort, so there is nothing to estimate")
