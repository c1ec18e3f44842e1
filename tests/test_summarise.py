from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from workbench.stats.summarise import summarise, wilson_interval
from workbench.table import InputError, rows, validate


def items(metric: str, value, *, group="g", names=None, beside=None) -> pd.DataFrame:
    value = np.asarray(value, dtype=float)
    names = [f"i{i}" for i in range(len(value))] if names is None else names
    return rows(metric, value, run="r", step=3, group=group, item=names, beside=beside)


def test_means_counts_and_dropped_by_hand():
    # g: (1 + 2 + 6) / 3 = 3, h: (4 + 5) / 2 = 4.5 with one NaN
    table = pd.concat([items("rank", [1, 2, 6]), items("rank", [4, np.nan, 5], group="h")])
    got = validate(summarise(table))
    assert list(got["value"]) == [3.0, 4.5]
    assert list(got["n"]) == [3, 2]
    assert set(got["item"]) == {"all"}
    assert summarise(table).attrs["dropped"] == 1
    assert summarise(table).attrs["interval"] == {"rank": "bootstrap over items"}


def test_wilson_by_hand_and_against_scipy():
    # Wilson (1927), 8 of 10 at 95 %: .4901625 to .9433178 (statsmodels proportion_confint)
    low, high = wilson_interval(np.array([0.8]), np.array([10]), 0.95)
    np.testing.assert_allclose([low[0], high[0]], [0.4901625, 0.9433178], atol=1e-6)
    for hits, n, level in ((0, 7, 0.95), (7, 7, 0.9), (3, 41, 0.99), (1, 1, 0.95)):
        want = binomtest(hits, n).proportion_ci(level, method="wilson")
        got = wilson_interval(np.array([hits / n]), np.array([n]), level)
        np.testing.assert_allclose([got[0][0], got[1][0]], want, atol=1e-12)


def test_verdicts_get_wilson_and_shares_do_not():
    verdict = summarise(items("extractable", [1] * 8 + [0] * 2))
    np.testing.assert_allclose(
        verdict[["lo", "hi"]].to_numpy()[0], [0.4901625, 0.9433178], atol=1e-6
    )
    assert verdict.attrs["interval"] == {"extractable": "Wilson"}
    # none of twelve still leaves room: z^2 / (12 + z^2) = .2424933 at most
    none = summarise(items("extractable", [0] * 12))
    np.testing.assert_allclose(none["hi"], 0.2424933, atol=1e-6)
    share = summarise(items("top1", [1, 0, 0.5, 1]))
    assert share.attrs["interval"] == {"top1": "bootstrap over items"}
    # an item with two verdicts is one text, not two trials
    twice = items(
        "extractable", [1, 0, 1, 1], names=["a", "a", "b", "b"], beside={"prefix": [1, 2, 1, 2]}
    )
    assert summarise(twice, by=("run", "step", "group")).attrs["interval"] == {
        "extractable": "bootstrap over items"
    }


def test_perplexities_are_averaged_as_logarithms():
    # e^(mean log): sqrt(2 * 8) = 4, not 5
    got = summarise(items("perplexity", [2, 8]))
    np.testing.assert_allclose(got["value"], 4.0)
    assert 2 - 1e-6 <= got["lo"].item() < 4 < got["hi"].item() <= 8 + 1e-6
    assert got.attrs["interval"] == {"perplexity": "bootstrap over items of the mean logarithm"}


def test_bootstrap_agrees_with_a_loop():
    rng = np.random.default_rng(0)
    value = rng.exponential(size=30)
    got = summarise(items("rank", 1 + value), draws=4000).iloc[0]
    again = [np.mean(1 + value[rng.integers(30, size=30)]) for _ in range(4000)]
    # the 2.5 % point of 4,000 draws is known to about 4 % of a standard deviation
    within = 0.2 * np.std(again)
    np.testing.assert_allclose(
        [got["lo"], got["hi"]], np.quantile(again, [0.025, 0.975]), atol=within
    )


def test_rows_of_one_item_are_resampled_together():
    # Ten items with a hundred equal rows each are ten measurements: the interval must be that of
    # ten, about ten times wider than that of a thousand.
    rng = np.random.default_rng(1)
    value = 1 + rng.exponential(size=10)
    one = summarise(items("rank", value)).iloc[0]
    many = items(
        "rank", np.repeat(value, 100), names=np.repeat([f"i{i}" for i in range(10)], 100),
        beside={"prefix": np.tile(np.arange(100), 10)},
    )  # fmt: skip
    got = summarise(many, by=("run", "step", "group")).iloc[0]
    np.testing.assert_allclose(
        got[["lo", "hi"]].astype(float), one[["lo", "hi"]].astype(float), atol=1e-6
    )
    assert got["n"] == 1000
    assert "prefix" not in summarise(many, by=("run", "step", "group"))


def test_pairs_by_hand():
    # items a, b, c at x and y: differences 1, 3, -1, mean 1; d has no partner
    table = pd.concat(
        [
            items("rank", [2, 5, 3, 9], names=list("abcd"), group="x"),
            items("rank", [1, 2, 4], names=list("abc"), group="y"),
        ]
    )
    got = validate(summarise(table, pair=("group", "x", "y")))
    row = got[got["metric"] == "difference"].iloc[0]
    assert row["value"] == 1.0
    assert (row["group"], row["of"], row["n"]) == ("x - y", "rank", 3)
    assert summarise(table, pair=("group", "x", "y")).attrs["unpaired"] == 1
    back = summarise(table, pair=("group", "y", "x"))
    assert back[back["metric"] == "difference"]["value"].item() == -1.0
    # pairing takes the items' own level out, so its interval is narrower than either group's
    level = np.arange(20.0) * 10 + 1
    shift = level + 1 + 0.1 * np.sin(np.arange(20))
    apart = summarise(
        pd.concat([items("rank", shift, group="x"), items("rank", level, group="y")]),
        pair=("group", "x", "y"),
    )
    width = apart.assign(width=apart["hi"] - apart["lo"]).set_index("metric")["width"]
    assert width["difference"] < 0.2 < 20 < width["rank"].min()


def test_one_item_and_none():
    got = validate(summarise(pd.concat([items("rank", [4]), items("rank", [np.nan], group="h")])))
    assert list(got["n"]) == [1, 0]
    assert got["lo"].isna().all()
    assert list(got["reason"]) == ["one item: no interval", "no item has a value"]


def test_an_infinite_value_stays_and_is_said():
    # nucleus sampling gives some suffixes probability 0; leaving them out would flatter the mean
    got = validate(summarise(items("log_p_z", [-np.inf, -3, -5]))).iloc[0]
    assert got["value"] == -np.inf
    assert got["n"] == 3
    assert np.isnan(got["lo"])
    assert got["reason"] == "an item's value is infinite, so the mean is and has no interval"


def test_what_is_pooled_over_is_named():
    table = pd.concat([items("rank", [1, 3]).assign(run="q"), items("rank", [3, 5], group="h")])
    got = summarise(table, by=())
    assert len(got) == 1
    assert (got["run"][0], got["group"][0], got["value"][0]) == ("all", "all", 3.0)
    later = pd.concat([table, table.assign(step=9)])
    assert list(summarise(later, by=("run",))["step"]) == [9, 9]


def test_missing_coordinates_are_a_group_of_their_own():
    table = items("rank", [1, 3, 5, 9], beside={"cohort": [2.0, 2.0, np.nan, np.nan]})
    got = summarise(table)
    assert list(got["value"]) == [2.0, 7.0]
    assert got["cohort"].isna().tolist() == [False, True]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50), scale=st.floats(0.1, 10))
def test_intervals_move_with_the_values(seed, shift, scale):
    value = np.random.default_rng(seed).normal(size=(2, 12))
    plain = pd.concat([items("outcome", value[0]), items("outcome", value[1], group="h")])
    moved = plain.assign(value=scale * plain["value"] + shift).sample(frac=1, random_state=seed)
    a, b = summarise(plain, draws=200), summarise(moved, draws=200).sort_values("group")
    for name in ("value", "lo", "hi"):
        np.testing.assert_allclose(b[name], scale * a[name] + shift, atol=1e-5 * (1 + abs(shift)))


def test_intervals_cover():
    # 300 samples of 40 exponential items; percentile intervals cover in about .93: under .88 has
    # odds of 0.1 %, and intervals at half their width would cover in .66.
    rng = np.random.default_rng(0)
    table = pd.concat(
        [items("rank", 1 + rng.exponential(size=40), group=f"g{i}") for i in range(300)]
    )
    got = summarise(table, draws=500)
    assert ((got["lo"] <= 2) & (got["hi"] >= 2)).mean() >= 0.88


def test_refusals():
    table = items("rank", [1, 2])
    for message, options in (
        ("summarise: level is 95, it must lie between 0 and 1", {"level": 95}),
        ("summarise: draws is 0, it must be at least 1", {"draws": 0}),
        (
            "summarise: no column 'kind'; there are run, step, group, item, metric, value, lo, hi, n",
            {"by": ("kind",)},
        ),
        (
            "summarise: no column 'kind' to pair; there are run, step, group, item, metric, value, "
            "lo, hi, n",
            {"pair": ("kind", "a", "b")},
        ),
        ("summarise: no rows with group=h to pair; there are g", {"pair": ("group", "g", "h")}),
    ):
        with pytest.raises(InputError) as error:
            summarise(table, **options)
        assert str(error.value) == message
    with pytest.raises(InputError) as error:
        summarise(items("auc", [0.5, 0.7], names=["all", "all"], beside={"fpr": [1, 2]}))
    assert str(error.value) == (
        "summarise: 2 rows, the first of auc, are pooled already (item is all); leave them out"
    )
    twice = pd.concat(
        [table.assign(prefix=1), table.assign(prefix=2), items("rank", [1], group="h")]
    )
    with pytest.raises(InputError) as error:
        summarise(twice, by=("run", "step"), pair=("group", "g", "h"))
    assert str(error.value) == (
        "summarise: items have several rows at group=g; add the coordinate that tells them apart to by"
    )
