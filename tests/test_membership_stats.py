from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from workbench.stats.membership import (
    area_under_curve,
    area_up_to,
    concordance,
    delong_error,
    kolmogorov_band,
    membership_auc,
    membership_trend,
    roc_curve,
    shares_above,
    standardised_area,
    tpr_at_fpr,
)
from workbench.table import InputError, rows, validate

MEMBER, OTHER = np.array([0.9, 0.8, 0.4]), np.array([0.7, 0.3, 0.2])


def scored(member, other, *, metric="member_minkpp", step=0) -> pd.DataFrame:
    value = np.concatenate([member, other])
    return rows(
        metric, value, run="r", step=step, group="g", item=[f"i{i}" for i in range(len(value))],
        beside={"member": [True] * len(member) + [False] * len(other)},
    )  # fmt: skip


def test_area_by_hand():
    # METRICS section 3: eight of nine pairs are in order; all tied .5; one class NaN
    np.testing.assert_allclose(area_under_curve(MEMBER, OTHER), 8 / 9)
    np.testing.assert_allclose(area_under_curve(OTHER, MEMBER), 1 / 9)
    assert area_under_curve(np.ones(4), np.ones(3)) == 0.5
    assert np.isnan(area_under_curve(MEMBER, np.array([])))
    assert np.isnan(area_under_curve(np.array([]), OTHER))


def test_delong_by_hand():
    # Members beat 1, 1, 2/3 of the others: variance (ddof 1) of them 1/27; others are beaten by
    # 2/3, 1, 1 of the members: 1/27. SE = sqrt(1/81 + 1/81) = .1571348.
    np.testing.assert_allclose(delong_error(MEMBER, OTHER), 0.1571348, atol=1e-7)
    assert delong_error(MEMBER, OTHER - 1) == 0
    assert np.isnan(delong_error(MEMBER[:1], OTHER))


def test_rate_by_hand():
    # Others .7, .3, .2: none may pass at 0.1, so the threshold lies above .7: 2 of 3 members.
    # At 1/3 one may pass, threshold above .3: all three.
    assert tpr_at_fpr(MEMBER, OTHER, 0.1) == pytest.approx(2 / 3)
    assert tpr_at_fpr(MEMBER, OTHER, 1 / 3) == 1.0
    # a member tied with the best other cannot be named without naming that other
    assert tpr_at_fpr(np.array([0.7, 0.9]), OTHER, 0.1) == 0.5
    assert tpr_at_fpr(MEMBER, OTHER, 1.0) == 1.0


scores = st.lists(st.integers(-4, 4), min_size=2, max_size=12)


@settings(max_examples=100, deadline=None)
@given(member=scores, other=scores, allowed=st.integers(0, 11))
def test_against_counting(member, other, allowed):
    member, other = np.array(member, dtype=float), np.array(other, dtype=float)
    pairs = np.sign(member[:, None] - other[None]) / 2 + 0.5
    np.testing.assert_allclose(area_under_curve(member, other), pairs.mean())
    variance = pairs.mean(axis=1).var(ddof=1) / len(member)
    variance += pairs.mean(axis=0).var(ddof=1) / len(other)
    np.testing.assert_allclose(delong_error(member, other), np.sqrt(variance), atol=1e-12)
    alpha = allowed / 12
    best = max(
        (member >= s).mean()
        for s in [*member, *other, np.inf]
        if (other >= s).mean() <= alpha + 1e-12
    )
    np.testing.assert_allclose(tpr_at_fpr(member, other, alpha), best)


@settings(max_examples=30, deadline=None)
@given(member=scores, other=scores)
def test_monotone_maps_change_nothing(member, other):
    member, other = np.array(member, dtype=float), np.array(other, dtype=float)
    for function in (area_under_curve, delong_error):
        np.testing.assert_allclose(
            function(np.exp(member), np.exp(other)), function(member, other), atol=1e-12
        )
    np.testing.assert_allclose(
        area_under_curve(-member, -other), 1 - area_under_curve(member, other), atol=1e-12
    )


def test_delong_is_the_spread_over_samples():
    # 2,000 samples know a standard deviation to 1.6 %; the mean of their DeLong errors better.
    rng = np.random.default_rng(0)
    area, error = [], []
    for _ in range(2000):
        member, other = rng.normal(1, 1, 30), rng.normal(0, 2, 50)
        area.append(area_under_curve(member, other))
        error.append(delong_error(member, other))
    np.testing.assert_allclose(np.mean(error), np.std(area), rtol=0.08)


def test_rows_of_a_table():
    table = pd.concat(
        [
            scored(MEMBER, OTHER),
            scored(OTHER, MEMBER, metric="member_zlib").assign(value=lambda t: -t["value"]),
        ]
    )
    table = pd.concat([table, scored([np.nan], [], step=0).assign(item="lost")])
    got = validate(membership_auc(table, fpr=(0.4,), draws=200))
    auc = got[got["metric"] == "auc"].set_index("score")
    np.testing.assert_allclose(auc.loc["member_minkpp", "value"], 8 / 9)
    np.testing.assert_allclose(auc.loc["member_minkpp", "se"], 0.1571348, atol=1e-7)
    np.testing.assert_allclose(
        auc.loc["member_minkpp", "lo"], 8 / 9 - 1.959964 * 0.1571348, atol=1e-6
    )
    assert auc.loc["member_minkpp", "hi"] == 1.0
    assert auc.loc["member_minkpp", "n"] == 6
    np.testing.assert_allclose(auc.loc["member_zlib", "value"], 8 / 9)
    rate = got[(got["metric"] == "tpr_at_fpr") & (got["score"] == "member_minkpp")].iloc[0]
    assert (rate["value"], rate["fpr"]) == (1.0, 0.4)
    assert rate["lo"] < 1
    assert membership_auc(table, draws=10).attrs["dropped"] == 1


def test_doses_meet_all_others():
    table = scored([1, 2, 8, 9], [3, 4, 5])
    table["copies"] = [1, 1, 64, 64, 0, 0, 0]
    got = membership_auc(table, dose="copies", draws=10)
    area = got[got["metric"] == "auc"].set_index("copies")
    assert list(area["value"]) == [0.0, 1.0]
    assert list(area["n"]) == [5, 5]


def test_reasons():
    got = membership_auc(scored(MEMBER, OTHER), fpr=(0.01,), draws=10)
    flagged = got[got["metric"] == "tpr_at_fpr"].iloc[0]
    assert flagged["reason"] == "3 others are fewer than 1 / fpr: the rate at no false positive"
    ten = membership_auc(scored(MEMBER, np.arange(10) / 20), fpr=(0.1, 0.09), draws=10)
    told = ten[ten["metric"] == "tpr_at_fpr"].set_index("fpr")["reason"]
    assert told[0.1] == ""  # a tenth can just be shown
    assert told[0.09].startswith("10 others are fewer")
    got = membership_auc(scored(MEMBER, []), fpr=(0.4,), draws=10)
    assert got["value"].isna().all()
    assert set(got["reason"]) == {"texts of one class only"}
    apart = membership_auc(scored(MEMBER, OTHER - 1), fpr=(0.4,), draws=10).iloc[0]
    assert apart["value"] == 1.0
    assert np.isnan(apart["lo"])
    assert apart["reason"] == "no error: the classes do not overlap"
    single = membership_auc(scored(MEMBER[:1], OTHER), fpr=(0.4,), draws=10).iloc[0]
    assert single["reason"] == "no error: one text in a class"


@pytest.mark.parametrize(
    "labels", [["seen", "unseen"], ["1", "0"], ["member", "non-member"], [1, 0]]
)
def test_labels(labels):
    table = scored(MEMBER, OTHER)
    table["member"] = [labels[0]] * 3 + [labels[1]] * 3
    np.testing.assert_allclose(membership_auc(table, draws=10)["value"][0], 8 / 9)


def test_refusals():
    table = scored(MEMBER, OTHER)
    for message, bad, options in (
        (
            "membership_auc: no column 'kind'; there are run, step, group, item, metric, value, lo, "
            "hi, n, member",
            table,
            {"by": ("run", "kind")},
        ),
        ("membership_auc: fpr is (0,), all must lie between 0 and 1", table, {"fpr": (0,)}),
        (
            "membership_auc: loss is not higher for members; leave it out",
            table.assign(metric="loss"),
            {},
        ),
        (
            "membership_auc: member is 'perhaps', which says neither member nor non-member; use True "
            "and False, or seen and unseen",
            table.assign(member="perhaps"),
            {},
        ),
        (
            "membership_auc: no item has a score; there is nothing to compare",
            table.assign(value=np.nan),
            {},
        ),
        (
            "membership_auc: item i0 has several rows of member_minkpp; add what tells them apart to by",
            pd.concat([table.assign(prefix=1), table.assign(prefix=2)]),
            {},
        ),
    ):
        with pytest.raises(InputError) as error:
            membership_auc(bad, **options)
        assert str(error.value) == message


def test_partial_areas_by_hand():
    # Above .9, .8 and .4 lie 0, 0 and 1/3 of the others .7, .3, .2. Up to rate 1/2 a member's area
    # is what is left of 1/2: 1/2, 1/2, 1/6, mean 7/18; the diagonal has 1/8 of at most 1/2, so
    # McClish's is (1 + (7/18 - 1/8) / (3/8)) / 2 = 23/27 = .8518519. Up to 1: the AUC.
    above, at_least = shares_above(MEMBER, OTHER)
    np.testing.assert_allclose(above, [0, 0, 1 / 3])
    np.testing.assert_allclose(area_up_to(above, at_least, 0.5), [1 / 2, 1 / 2, 1 / 6])
    np.testing.assert_allclose(standardised_area(7 / 18, 0.5), 23 / 27)
    np.testing.assert_allclose(area_up_to(above, at_least, 1.0).mean(), 8 / 9)
    # a member tied with 2 of 4 others slopes from (0, 0) to (1/2, 1): up to 1/4 half of 1/4 * 1/2
    tied = shares_above(np.array([3.0]), np.array([3.0, 3.0, 1.0, 2.0]))
    np.testing.assert_allclose(area_up_to(*tied, 0.25), [0.0625])
    np.testing.assert_allclose(area_up_to(*tied, 0.5), [0.25])


@settings(max_examples=100, deadline=None)
@given(member=scores, other=scores, limit=st.floats(0.05, 1))
def test_partial_areas_against_sklearn(member, other, limit):
    label = [1] * len(member) + [0] * len(other)
    want = roc_auc_score(label, member + other, max_fpr=None if limit == 1 else limit)
    both = np.array(member, dtype=float), np.array(other, dtype=float)
    area = area_up_to(*shares_above(*both), limit).mean()
    got = area if limit == 1 else standardised_area(area, limit)
    np.testing.assert_allclose(got, want, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(member=scores, other=scores, data=st.data())
def test_weights_are_repeated_texts(member, other, data):
    member, other = np.array(member, dtype=float), np.array(other, dtype=float)
    drawn = data.draw(
        st.lists(st.integers(0, len(other) - 1), min_size=len(other), max_size=len(other))
    )
    weights = np.bincount(drawn, minlength=len(other))
    got = area_up_to(*shares_above(member, other, weights), 1.0).mean()
    np.testing.assert_allclose(got, area_under_curve(member, other[drawn]), atol=1e-12)


def test_bootstrap_stands_beside_delong():
    # 80 and 60 normal scores a standard deviation apart: both are estimates of one spread, of
    # which 2,000 resamples know the ends to about 4 %
    rng = np.random.default_rng(1)
    table = scored(rng.normal(1, 1, 80), rng.normal(0, 1, 60))
    row = membership_auc(table, draws=2000, fpr=(0.1,))
    auc, rate, part = row.iloc[0], row.iloc[1], row.iloc[2]
    assert auc["lo_bootstrap"] < auc["value"] < auc["hi_bootstrap"]
    np.testing.assert_allclose(
        auc["hi_bootstrap"] - auc["lo_bootstrap"], auc["hi"] - auc["lo"], rtol=0.1
    )
    assert auc["resolution"] == rate["resolution"] == 1 / 60
    assert part["metric"] == "partial_auc"
    assert part["lo"] < part["value"] < part["hi"]
    # of resampled areas, drawn as repeated texts
    member, other = table["value"].to_numpy()[:80], table["value"].to_numpy()[80:]
    again = [area_under_curve(rng.choice(member, 80), rng.choice(other, 60)) for _ in range(2000)]
    np.testing.assert_allclose(
        [auc["lo_bootstrap"], auc["hi_bootstrap"]], np.quantile(again, [0.025, 0.975]), atol=0.012
    )
    assert row[["lo_bootstrap", "hi_bootstrap"]].iloc[1:].isna().all(axis=None)


def test_levels_narrow_all_intervals():
    rng = np.random.default_rng(2)
    table = scored(rng.normal(1, 1, 30), rng.normal(0, 1, 30))
    wide, narrow = (membership_auc(table, level=level, fpr=(0.2,)) for level in (0.99, 0.5))
    for low, high in (("lo", "hi"), ("lo_bootstrap", "hi_bootstrap")):
        gap = (wide[high] - wide[low]) - (narrow[high] - narrow[low])
        assert (gap.dropna() > 0).all()


def test_roc_by_hand():
    # Others .7, .3, .2 can show rates 0, 1/3, 2/3, 1. Above .7 lie 2 of 3 members, above .3 all.
    got = validate(roc_curve(scored(MEMBER, OTHER), draws=100))
    np.testing.assert_allclose(got["fpr"], [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(got["value"], [2 / 3, 1, 1, 1])
    np.testing.assert_allclose(got["resolution"], 1 / 3)
    assert set(got["n"]) == {6}
    assert got["lo"].iloc[0] < 2 / 3
    # tied scores show nothing before everything
    tied = roc_curve(scored(np.ones(4), np.ones(2)), draws=20)
    np.testing.assert_allclose(tied["value"], [0, 0, 1])
    one = roc_curve(scored(MEMBER, []))
    assert one["value"].isna().all()
    assert set(one["reason"]) == {"texts of one class only"}
    assert roc_curve(scored([*MEMBER, np.nan], OTHER), draws=10).attrs["dropped"] == 1


def test_long_curves_are_thinned_but_at_small_rates():
    rng = np.random.default_rng(3)
    got = roc_curve(scored(rng.normal(1, 1, 50), rng.normal(0, 1, 1000)), draws=5)
    assert len(got) <= 200
    np.testing.assert_allclose(got["fpr"].iloc[:4], [0, 0.001, 0.002, 0.003])
    assert got["fpr"].iloc[-1] == 1
    assert got["value"].is_monotonic_increasing


def test_kolmogorov_band_by_hand():
    # stats.kstwo gives d = .2288 for 40 at the root of .95, more than any of the first rates
    rng = np.random.default_rng(4)
    member, other = rng.normal(1, 1, 60), rng.normal(0, 1, 40)
    d, e = (stats.kstwo.ppf(0.95**0.5, n) for n in (40, 60))
    np.testing.assert_allclose(d, 0.2288, atol=1e-4)
    low, high = kolmogorov_band(member, other, np.array([0.0, 0.2, 0.5, 1.0]), 0.95)
    assert low[:2].tolist() == [0, 0]
    np.testing.assert_allclose(low[2], max(tpr_at_fpr(member, other, 0.5 - d) - e, 0))
    np.testing.assert_allclose(high[0], tpr_at_fpr(member, other, d) + e)
    assert high[3] == 1


def test_bands_hold_the_true_curve():
    # Normal scores one standard deviation apart, 30 samples of 60 and 40. The simultaneous band
    # must hold the whole curve 95 % of the time (it is known to be wider than that needs);
    # the pointwise one holds about .9 of its points.
    rng, whole, points = np.random.default_rng(5), [], []
    for seed in range(30):
        table = scored(rng.normal(1, 1, 60), rng.normal(0, 1, 40))
        for simultaneous in (True, False):
            got = roc_curve(table, simultaneous=simultaneous, draws=100, seed=seed)
            true = stats.norm.sf(stats.norm.isf(got["fpr"]) - 1)
            inside = (got["lo"] <= true) & (true <= got["hi"])
            whole.append(inside.all()) if simultaneous else points.append(inside.mean())
    assert np.mean(whole) >= 0.9
    assert 0.85 <= np.mean(points) <= 0.97


def test_concordance_by_hand():
    # Doses 0, 0, 1, 2 with scores 1, 3, 2, 4: of pairs (0, 1) one of two in order, (0, 2) both,
    # (1, 2) one: 4 of 5. Ties count one half; the same dose, not at all.
    share, _ = concordance(np.array([1.0, 3, 2, 4]), np.array([0.0, 0, 1, 2]))
    np.testing.assert_allclose(share, 0.8)
    assert concordance(np.array([1.0, 1]), np.array([0.0, 1]))[0] == 0.5
    assert np.isnan(concordance(np.array([1.0, 2]), np.array([3.0, 3]))[0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3)), min_size=3, max_size=20))
def test_concordance_is_somers_d(pairs):
    score, dose = (np.array(each, dtype=float) for each in zip(*pairs, strict=True))
    share = concordance(score, dose)[0]
    if len(set(dose)) < 2:
        assert np.isnan(share)
        return
    if len(set(score)) > 1:  # scipy divides by their spread
        want = (1 + stats.somersd(dose, score).statistic) / 2
        np.testing.assert_allclose(share, want, atol=1e-12)
    np.testing.assert_allclose(concordance(-score, dose)[0], 1 - share, atol=1e-12)
    if len(set(dose)) == 2:
        high = dose == dose.max()
        np.testing.assert_allclose(share, area_under_curve(score[high], score[~high]))


def test_two_doses_have_delongs_error():
    rng = np.random.default_rng(6)
    member, other = rng.normal(1, 1, 40), rng.normal(0, 1, 40)
    dose = np.repeat([1.0, 0.0], 40)
    _, error = concordance(np.concatenate([member, other]), dose)
    np.testing.assert_allclose(error * np.sqrt(40 / 39), delong_error(member, other))


def test_the_error_of_a_trend_is_its_spread_over_samples():
    # 600 samples know a standard deviation to 3 %
    rng, dose = np.random.default_rng(7), np.repeat([0.0, 1, 2, 4], 15)
    found = [concordance(rng.normal(dose / 3), dose) for _ in range(600)]
    share, error = np.array(found).T
    np.testing.assert_allclose(error.mean(), share.std(), rtol=0.12)


def test_trend_rows_and_reasons():
    table = scored([1, 3, 2, 4, np.nan], [])
    table["dose"] = [0, 0, 1, 2, 2]
    got = validate(membership_trend(table)).iloc[0]
    _, error = concordance(np.array([1.0, 3, 2, 4]), np.array([0.0, 0, 1, 2]))
    assert (got["value"], got["n"], got["score"]) == (0.8, 4, "member_minkpp")
    np.testing.assert_allclose([got["se"], got["lo"]], [error, 0.8 - 1.959964 * error], atol=1e-6)
    assert got["hi"] == 1
    one = membership_trend(table.assign(dose=1)).iloc[0]
    assert (np.isnan(one["value"]), one["reason"]) == (True, "texts of one dose only")
    all_in_order = membership_trend(table.iloc[[0, 2, 3]]).iloc[0]
    assert all_in_order["value"] == 1
    assert np.isnan(all_in_order["lo"])
    assert all_in_order["reason"] == "no error: every pair is in order, or none"
    with pytest.raises(InputError) as error:
        membership_trend(table.assign(dose=[0, 0, 1, np.nan, 2]))
    assert str(error.value) == (
        "membership_trend: dose is missing in 1 rows; texts never trained on have 0"
    )


def test_every_door_names_itself():
    table = scored(MEMBER, OTHER)
    for function in (membership_auc, roc_curve, membership_trend):
        name = function.__name__
        bad = table.assign(metric="loss", dose=1)
        with pytest.raises(
            InputError, match=f"^{name}: loss is not higher for members; leave it out$"
        ):
            function(bad)
        with pytest.raises(
            InputError, match=f"^{name}: no item has a score; there is nothing to compare$"
        ):
            function(table.assign(value=np.nan, dose=1))
        twice = pd.concat([table.assign(prefix=1, dose=1), table.assign(prefix=2, dose=1)])
        with pytest.raises(
            InputError, match=f"^{name}: item i0 has several rows of member_minkpp; "
        ):
            function(twice)
