"""n samples give a text with probability p: from p_z to shares of texts."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.stats.discoverable import (
    _median,
    discoverable,
    extraction_chance,
    log_miss,
    samples_needed,
    tries_needed,
)
from workbench.stats.summarise import wilson_interval
from workbench.table import InputError, rows, validate


def table(p_z, group="seen", **beside):
    with np.errstate(divide="ignore"):
        value = np.log(np.asarray(p_z, dtype=float))
    items = [f"{group}-{n}" for n in range(len(value))]
    return rows("log_p_z", value, run="r", group=group, item=items, beside=beside)


def test_extraction_chance_by_hand():
    # 1 - .95^10
    assert extraction_chance(math.log(0.05), 10) == pytest.approx(0.4012631, abs=5e-8)
    assert extraction_chance(math.log(0.5), 2) == pytest.approx(0.75)
    assert extraction_chance(-math.inf, 1e9) == 0 and extraction_chance(0.0, 1) == 1
    # (1 - 1e-200)^n differs from 1 in no float, yet n p_z is the answer
    assert extraction_chance(-200 * math.log(10), 1e6) == pytest.approx(1e-194, rel=1e-9)
    # p_z = 1 - 1e-15: a miss has probability 1e-15, its logarithm -34.54
    assert log_miss(math.log1p(-1e-15)) == pytest.approx(math.log(1e-15), rel=1e-3)


@given(st.floats(-700, -1e-12))
def test_log_miss_against_more_digits(log_p_z):
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 340
        want = float((1 - Decimal(log_p_z).exp()).ln())
    assert log_miss(log_p_z) == pytest.approx(want, rel=1e-12)


def test_samples_needed_by_hand():
    # .05: ten give .4013, nine .3698. A half: one gives .5, three .875, four .9375.
    assert samples_needed(math.log(0.05), 0.4) == 10
    assert (
        samples_needed(math.log(0.05), 0.3698) == 10 and samples_needed(math.log(0.05), 0.3697) == 9
    )
    got = [samples_needed(math.log(0.5), p).item() for p in (0.1, 0.5, 0.875, 0.88)]
    assert got == [1, 1, 3, 4]
    assert samples_needed(0.0, 0.9) == 1 and np.isinf(samples_needed(-np.inf, 0.9))
    assert np.isnan(samples_needed(np.nan, 0.5))
    # log(1/2) / -1e-100
    assert samples_needed(math.log(1e-100), 0.5) == pytest.approx(math.log(2) * 1e100)


@given(st.floats(-60, -1e-6), st.floats(0.001, 0.999))
def test_samples_needed_is_the_fewest(log_p_z, p):
    n = samples_needed(log_p_z, p).item()
    if n < 1e9:  # beyond, one sample more or less is rounding
        assert extraction_chance(log_p_z, n) >= p * (1 - 1e-9)
        assert n == 1 or extraction_chance(log_p_z, n - 1) < p * (1 + 1e-9)


def test_shares_by_hand():
    # p_z 1, .5, .05, 0. One sample: .5 or more for two of them. Ten: 1 - .95^10 = .4013, so .4 for
    # three but not .41. A million: all but the one that cannot come out. p = 1: only the certain.
    got = discoverable(table([1, 0.5, 0.05, 0]), n=[1, 10, 10**6], p=[0.4, 0.41, 0.5, 1.0])
    shares = got.pivot(index="tries", columns="p", values="value")
    assert shares.to_numpy().tolist() == [
        [0.5, 0.5, 0.5, 0.25],
        [0.75, 0.5, 0.5, 0.25],
        [0.75, 0.75, 0.75, 0.25],
    ]
    low, high = wilson_interval(np.array([0.75]), np.array([4]), 0.95)
    row = got[(got["tries"] == 10) & (got["p"] == 0.4)].iloc[0]
    assert (row["lo"], row["hi"], row["n"]) == pytest.approx((low[0], high[0], 4))
    assert got.attrs == {"interval": "Wilson", "dropped": 0}


def test_a_probability_that_is_exactly_reached_counts():
    # one sample of p_z gives it with probability p_z, three of .2 with 1 - .8^3 = .488
    # a thousand of them, some of which the two logarithms round apart
    every = np.arange(1, 1000) / 1000
    got = discoverable(table(every), n=[1], p=every)
    assert got["value"].to_numpy() == pytest.approx(np.arange(999, 0, -1) / 999)
    assert discoverable(table([0.2]), n=[3], p=[0.488])["value"].item() == 1
    assert discoverable(table([0.2]), n=[3], p=[0.4881])["value"].item() == 0


def test_shares_are_those_of_a_loop_and_groups_are_kept_apart():
    rng = np.random.default_rng(0)
    parts = [
        table(np.exp(-rng.exponential(8, size=40)), group, scheme=scheme)
        for group in ("seen", "never")
        for scheme in ("T=1", "greedy")
    ]
    both = pd.concat(parts, ignore_index=True)
    other = both.assign(metric="log_probability")
    n, p = [1, 7, 300], [0.2, 0.9]
    got = discoverable(pd.concat([both, other]), n=n, p=p)
    assert len(got) == 4 * 6 and set(got["metric"]) == {"discoverable"}
    for row in got.itertuples():
        mine = both[(both["group"] == row.group) & (both["scheme"] == row.scheme)]["value"]
        hits = [1 - (1 - math.exp(value)) ** row.tries >= row.p for value in mine]
        assert row.value == pytest.approx(np.mean(hits)) and row.n == 40
    # more samples give more, a higher probability less
    shares = got.pivot_table(index=["group", "scheme"], columns=["p", "tries"], values="value")
    assert (shares[0.2] >= shares[0.9]).all(axis=None)


def test_what_stays_is_asked_for():
    both = pd.concat(
        [
            table([1, 0.5], "seen", scheme="s", dose=[1, 2]),
            table([0.1], "never", scheme="s", dose=0),
        ]
    )
    got = discoverable(both, n=[1], p=[0.5], by=["group"]).set_index("group")
    assert got["value"].to_dict() == {"seen": 1, "never": 0} and "dose" not in got
    got = discoverable(both, n=[1], p=[0.5], by=["scheme"])
    assert got[["group", "value", "n"]].to_numpy().tolist() == [["all", pytest.approx(2 / 3), 3]]
    assert len(discoverable(both, n=[1], p=[0.5])) == 3  # each dose by itself
    assert tries_needed(both, by=["scheme"])["value"].item() == 1
    with pytest.raises(InputError) as error:
        discoverable(both, by=["kind"])
    assert str(error.value) == (
        "discoverable: no column 'kind'; there are run, step, group, scheme, dose"
    )
    twice = pd.concat([both, both.assign(scheme="other")])
    with pytest.raises(InputError) as error:
        tries_needed(twice, by=["group"])
    assert str(error.value) == (
        "tries_needed: item seen-0 has several rows; add to by the column that tells them apart"
    )


def test_items_without_a_value_are_counted_not_shared():
    with_nan = pd.concat([table([0.5, np.nan]), table([np.nan], "never")], ignore_index=True)
    got = discoverable(with_nan, n=[1], p=[0.5]).set_index("group")
    assert got.loc["seen", "value"] == 1 and got.loc["seen", "n"] == 1
    assert np.isnan(got.loc["never", "value"])
    assert got.loc["never", "reason"] == "no item has a value"
    assert got.attrs["dropped"] == 2
    tries = tries_needed(with_nan).set_index("group")
    assert np.isnan(tries.loc["never", "value"]) and tries.attrs["dropped"] == 2
    assert tries.loc["never", "reason"] == "no item has a value"


def test_tries_needed_by_hand():
    # p = .5 takes 1, 1, 2 (1 - .7^2 = .51), 14 (1 - .95^14 = .512) and never
    got = tries_needed(table([0.9, 0.5, 0.3, 0.05, 0]), p=0.5).iloc[0]
    assert got["value"] == 2 and got["n"] == 5 and got["p"] == 0.5
    # P(all five on one side of the median) = 1/32 > .025: no interval at 95 %
    assert np.isnan(got["lo"]) and got["reason"] == "5 items: too few for an interval"
    # six items: 1/64 < .025, so the least and the largest; the lower of the two middle ones
    got = tries_needed(table([0.9, 0.5, 0.3, 0.05, 0, 0.6]), p=0.5).iloc[0]
    assert (got["value"], got["lo"], got["hi"]) == (1, 1, np.inf)
    # nine: P(B <= 1) = 10/512 < .025 < P(B <= 2): the second and the eighth
    got = tries_needed(table([1 / n for n in range(2, 11)]), p=0.5).iloc[0]
    want = [math.ceil(math.log(0.5) / math.log(1 - 1 / n)) for n in (3, 6, 9)]
    assert [got["lo"], got["value"], got["hi"]] == want
    got = tries_needed(table([0.5, 0, 0]), p=0.5).iloc[0]
    assert np.isinf(got["value"])
    assert got["reason"] == "most items cannot come out under the scheme"
    validate(tries_needed(table([0, 0, 0])))


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_of_the_median_is_the_narrowest_that_covers_it(level):
    # values 0, 1, 2, ...: the interval's ends say how many lie outside. The k-th from either end
    # misses the median if fewer than k of n lie on its side: a sum over the ways to choose them.
    for size in range(6, 40):
        value, low, high, reason = _median(np.arange(size), level)
        assert value == (size - 1) // 2 and low + high == size - 1 and reason == ""
        miss = [sum(math.comb(size, i) for i in range(k + 1)) * 2 / 2**size for k in (low, low + 1)]
        assert miss[0] <= 1 - level < miss[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": [0, 5]}, "discoverable: n is [0.0, 5.0], samples must be at least 1"),
        ({"n": []}, "discoverable: n is [], samples must be at least 1"),
        ({"p": [0.0]}, "discoverable: p is [0.0], probabilities lie above 0 and up to 1"),
        ({"p": [0.5, 1.5]}, "discoverable: p is [0.5, 1.5], probabilities lie above 0 and up to 1"),
    ],
)
def test_discoverable_refusals(options, message):
    with pytest.raises(InputError) as error:
        discoverable(table([0.5]), **options)
    assert str(error.value) == message


def test_refusals_of_tables():
    with pytest.raises(InputError) as error:
        discoverable(rows("top1", 0.5, run="r", item="a"))
    assert str(error.value) == "discoverable: the table has no rows of log_p_z; it has top1"
    with pytest.raises(InputError) as error:
        tries_needed(rows("log_p_z", -1.0, run="r"))
    assert str(error.value) == (
        "tries_needed: 1 rows are pooled already (item is all); leave them out"
    )
    for p in (0, 1):
        with pytest.raises(InputError) as error:
            tries_needed(table([0.5]), p=p)
        assert str(error.value) == f"tries_needed: p is {p}, it must lie between 0 and 1"
