from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.stats.membership import (
    area_under_curve,
    delong_error,
    membership_auc,
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
