"""Exposure: canaries ranked among decoys, and the decoys themselves."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.conftest import frame, reciter
from workbench.decoys import APART, fill_template, make_decoys
from workbench.items import make_canaries
from workbench.probes.exposure import (
    _by_tail,
    _fitted,
    exposure,
    exposure_interval,
    fit_distance,
    fit_skew_normal,
    probe_exposure,
    skew_normal_cdf,
)
from workbench.table import InputError, validate


def test_exposure_by_hand():
    # Decoys at 1, 2, 3 nat, so R = 4 and log2(R) = 2. A canary at 0.5 ranks 1st, one at 2.0
    # (a tie, in its favour) 2nd, one at 2.5 3rd, one at 9.0 4th; log2(3) = 1.5849625.
    got = exposure(np.array([0.5, 2.0, 2.5, 9.0]), np.array([3.0, 1.0, 2.0]))
    np.testing.assert_allclose(got, [2.0, 1.0, 0.4150375, 0.0], atol=1e-7)
    # METRICS section 2: rank 1 of 1024 gives 10, the last 0
    decoys = np.arange(1023.0)
    assert exposure(np.array([-1.0, 1e9]), decoys).tolist() == [10.0, 0.0]


def test_exposure_at_chance():
    # every rank of 2^14 as likely: the mean of log2 R - log2 rank is 1 / ln 2 but for log R / R
    decoys = np.arange(2.0**14 - 1)
    got = exposure(np.append(decoys - 0.5, 1e9), decoys)
    np.testing.assert_allclose(got.mean(), 1 / np.log(2), atol=1e-3)


few = st.lists(st.integers(-3, 3), min_size=1, max_size=9)


@settings(max_examples=80, deadline=None)
@given(canary=few, decoy=few)
def test_exposure_against_counting(canary, decoy):
    canary, decoy = np.array(canary, float), np.array(decoy, float)
    ranks = [1 + sum(d < c for d in decoy) for c in canary]
    want = [np.log2((1 + len(decoy)) / rank) for rank in ranks]
    np.testing.assert_allclose(exposure(canary, decoy), want, atol=1e-12)
    np.testing.assert_allclose(exposure(np.exp(canary), np.exp(decoy)), want, atol=1e-12)


def test_bounds_by_hand():
    # none of 3 likelier: p below 1 - .025^(1/3) = .7075982, .4989977 bits, and nothing above;
    # all of 3: p above .025^(1/3), 1.7739760 bits at most, 0 at least
    lo, hi = exposure_interval(np.array([0, 3]), 3, 0.95)
    np.testing.assert_allclose(lo, [0.4989977, 0.0], atol=1e-6)
    np.testing.assert_allclose(hi, [np.inf, 1.7739760], atol=1e-6)


def test_bounds_are_the_exact_binomial_ones():
    likelier = np.arange(21)
    lo, hi = exposure_interval(likelier, 20, 0.9)
    for k in likelier:
        exact = stats.binomtest(int(k), 20).proportion_ci(0.9, method="exact")
        np.testing.assert_allclose(2.0 ** -hi[k], exact.low, atol=1e-9)
        np.testing.assert_allclose(2.0 ** -lo[k], exact.high, atol=1e-9)
    value = exposure(likelier + 0.5, np.arange(1.0, 21))  # so many decoys lie below
    assert (lo <= value).all() and (value <= hi).all()


def test_the_fit_has_the_samples_moments():
    sample = stats.skewnorm.rvs(3, loc=5, scale=2, size=400, random_state=0)
    shape, location, scale = fit_skew_normal(sample)
    mean, variance, skew = stats.skewnorm.stats(shape, location, scale, moments="mvs")
    np.testing.assert_allclose(mean, sample.mean())
    np.testing.assert_allclose(variance, sample.var())
    np.testing.assert_allclose(skew, stats.skew(sample))
    # mirrored data, mirrored distribution
    np.testing.assert_allclose(fit_skew_normal(-sample), [-shape, -location, scale])
    # maximum likelihood finds another one nearby; the means of 1,000 texts know less
    likelihood = stats.skewnorm.fit(sample)
    np.testing.assert_allclose([location, scale], likelihood[1:], atol=0.3)


def test_weights_are_repeated_values():
    rng = np.random.default_rng(1)
    sample, count = rng.gamma(3, size=50), rng.multinomial(50, np.full(50, 0.02), size=4)
    got = fit_skew_normal(sample, count / 50)
    want = [fit_skew_normal(np.repeat(sample, each)) for each in count]
    np.testing.assert_allclose(got, np.stack(want, axis=1), rtol=1e-8)


def test_a_sample_beyond_any_skew_normal_gets_the_most_skewed():
    shape, _, scale = fit_skew_normal(np.array([0.0] * 99 + [1.0]))
    assert np.isfinite(scale) and 20 < shape < 60


def test_shares_below_and_distance_against_scipy():
    sample = np.random.default_rng(2).normal(size=(3, 60)) ** 2
    sample = np.concatenate([sample, -sample])  # mirrored, the largest gap is on the other side
    fit = fit_skew_normal(sample)
    at = np.linspace(-3, 5, 9)
    for row in range(6):
        peer = stats.skewnorm(*fit[:, row])
        got = skew_normal_cdf(at, *fit[:, row])
        np.testing.assert_allclose(got, peer.cdf(at), atol=1e-12)
        want = stats.kstest(sample[row], peer.cdf).statistic
        np.testing.assert_allclose(fit_distance(sample, fit)[row], want)


def test_the_tail_is_read_as_far_as_it_can_be():
    # 1,000 normal draws: a canary 3 deviations below has about -log2(.00135) = 9.53 bits, one at
    # the mean 1; one 7 below would have 39, more than 2 log2(1001) = 19.9
    rng = np.random.default_rng(3)
    decoy = rng.normal(300, 10, size=1000)
    fit = _fitted(decoy, 99, rng)
    assert fit["why"] == "" and fit["p"] > 0.05
    got = _by_tail(np.array([270.0, 300.0, 230.0, 400.0]), decoy, fit, 0.95, 199, rng)
    np.testing.assert_allclose(got["value"], [9.53, 1.0, np.nan, 0.0], atol=1.2)
    assert list(got["reason"]) == ["", "", "beyond 20 bits, 2 times what 1000 decoys resolve", ""]
    assert np.isnan(got["lo"][2]) and np.isnan(got["hi"][2])
    assert got["lo"][0] < got["value"][0] < got["hi"][0] and got["hi"][0] - got["lo"][0] > 0.5
    # the interval is of the decoys: with four times as many it is half as wide
    more = rng.normal(300, 10, size=4000)
    again = _by_tail(np.array([270.0]), more, _fitted(more, 99, rng), 0.95, 199, rng)
    assert again["hi"][0] - again["lo"][0] < 0.8 * (got["hi"][0] - got["lo"][0])


def test_two_heaps_of_decoys_are_refused():
    rng = np.random.default_rng(4)
    decoy = np.concatenate([rng.normal(0, 1, 200), rng.normal(20, 1, 200)])
    fit = _fitted(decoy, 99, rng)
    assert fit["p"] == 0.01  # none of 99 samples is as far, so (1 + 0) / 100
    assert _fitted(decoy, 199, rng)["why"] == (
        "no skew-normal distribution fits the decoys (p = 0.005)"
    )
    flat = _fitted(np.full(30, 7.0), 99, rng)
    assert flat["why"] == "the decoys do not vary" and np.isnan(flat["distance"])


# A reciter says t + 1 after t: a hit costs h, a miss h + 5 nats; 3 4 5 has no miss
DECOYS = ["3 4 9", "3 8 8", "7 9 9", "3 9 8"]  # misses: 1, 2, 2, 2


def rank_rows(table):
    return table[table["metric"] == "exposure"].set_index("item")


def test_probe_by_hand():
    # i0 is likelier than all 4 decoys, 5 candidates: log2 5 = 2.3219281, at least; i1 (one miss)
    # ties with the first: rank 1 too; i2 (two misses) is behind the first alone: log2 5 - 1
    items = frame(["3 4 5", "5 6 9", "5 9 9"], dose=[4, 1, 0])
    decoys = frame(DECOYS).assign(item=[f"d{i}" for i in range(4)])
    table = validate(probe_exposure(reciter(), items, decoys=decoys))
    got = rank_rows(table)
    np.testing.assert_allclose(got["value"], [2.3219281, 2.3219281, 1.3219281], atol=1e-6)
    assert got["reason"].tolist() == ["at least: likelier than all 4 decoys"] * 2 + [""]
    assert np.isinf(got["hi"]).tolist() == [True, True, False]
    assert set(got["candidates"]) == {5} and got["dose"].tolist() == [4, 1, 0]
    fit = table[table["item"] == "all"].set_index("metric")
    assert set(fit.index) == {"fit_distance", "p_value"} and set(fit["n"]) == {4}
    assert set(fit["group"]) == {"decoy"}


def test_a_whole_template_needs_no_estimate():
    # 3 4 5 is one of the 4 fillings: 3 others and itself
    table = probe_exposure(
        reciter(), frame(["3 4 5"]), decoys=fill_template("3 {4|9} {5|8}", count=10)
    )
    got = rank_rows(table).loc["i0"]
    assert (got["value"], got["lo"], got["hi"], got["reason"]) == (2.0, 2.0, 2.0, "")
    assert got["candidates"] == 4 and table.attrs["dropped"] == 1


def test_items_meet_decoys_of_their_kind():
    items = frame(["3 4 5", "3 4 9", "1 2 3"], kind=["a", "b", "c"])
    decoys = frame([*DECOYS[:3], *DECOYS[1:]], kind=["a", "a", "a", "b", "b", "b"])
    decoys["item"] = [f"d{i}" for i in range(6)]
    with pytest.warns(UserWarning) as told:
        table = probe_exposure(reciter(), items, decoys=decoys)
    assert str(told[0].message) == (
        "probe_exposure: left out 1 of 3 items, of kind c, which has no decoys"
    )
    got = rank_rows(table)
    # "3 4 9" is an item too and no decoy of kind a, where 2 are left; i1 (one miss) is before the
    # three of kind b, which have two each: 2 bits of 4 candidates
    assert got["candidates"].to_dict() == {"i0": 3, "i1": 4}
    np.testing.assert_allclose(got["value"], [np.log2(3), 2.0])
    assert table.attrs["dropped"] == 2


@pytest.fixture(scope="module")
def canaries(tiny):
    items = tiny.suite.items("base")
    return items[items["kind"] == "canary"].reset_index(drop=True)


def test_against_a_plain_loop_on_real_passes(tiny, canaries):
    source = tiny.suite.checkpoints("base").select([0, 16])
    table = probe_exposure(source, canaries, count=40, seed=3)
    decoys = make_decoys(canaries, 40, tokenizer=tiny.suite.tokenizer, seed=3)
    assert not set(decoys["text"]) & set(canaries["text"])

    @torch.inference_mode()
    def surprise(model, text):
        ids = torch.tensor(tiny.suite.tokenizer(text, add_special_tokens=False)["input_ids"])
        log_p = model.module(input_ids=ids[None]).logits[0].log_softmax(-1)
        return -sum(float(log_p[t - 1, ids[t]]) for t in range(1, len(ids)))

    for model in source:
        others = [surprise(model, text) for text in decoys["text"]]
        rows = rank_rows(table[table["step"] == model.step])
        for item, text in zip(canaries["item"], canaries["text"], strict=True):
            mine = surprise(model, text)
            rank = 1 + sum(other < mine for other in others)
            # two texts closer than rounding may change places
            near = sum(abs(other - mine) < 1e-3 for other in others)
            off = abs(2 ** (np.log2(41) - rows.loc[item, "value"]) - rank)
            assert off <= near + 1e-9
    drip = rows[rows["group"] == "drip"]["value"]
    assert (drip == np.log2(41)).all()  # the one canary seen twelve times


def test_decoys_are_drawn_as_the_items_were(tiny, canaries):
    items = tiny.suite.items("base")
    tokenizer = tiny.suite.tokenizer
    made = make_decoys(items, 30, tokenizer=tokenizer, seed=5)
    assert made["kind"].value_counts().to_dict() == {"canary": 30, "biography": 30}
    lengths = {len(ids) for ids in tokenizer(made["text"].tolist())["input_ids"]}
    assert lengths == {16}  # the tiny suite's items have 16 tokens
    assert not made["text"].duplicated().any() and set(made["group"]) == {"decoy"}
    want = make_canaries(tokenizer, 30 + len(canaries), length=16, seed=5 + APART)[:30]
    assert made["text"][made["kind"] == "canary"].tolist() == want


def test_no_decoy_is_an_item(tiny, monkeypatch):
    # with the seed that planted them the draws are the items themselves, of both kinds
    monkeypatch.setattr("workbench.decoys.APART", 0)
    items = tiny.suite.items("base")
    made = make_decoys(items, 30, tokenizer=tiny.suite.tokenizer, seed=tiny.suite.spec["seed"])
    assert not set(made["text"]) & set(items["text"]) and len(made) == 60


def test_a_template_is_filled_in_all_ways():
    made = fill_template("a{0|1}b{x|y|z}.", count=6)
    want = {f"a{i}b{j}." for i in "01" for j in "xyz"}
    assert set(made["text"]) == want and len(made) == 6
    assert made.attrs["space"] == 6 and made["item"].tolist()[:2] == ["decoy-00000", "decoy-00001"]
    assert fill_template("{digit}{letter}", count=2).attrs["space"] == 260


def test_fillings_are_drawn_uniformly():
    # 600 of 1,000,000 codes: each place's digit is uniform; p below 1e-4 once in 10,000 seeds
    made = fill_template("{digit}" * 6, count=600, seed=1)
    assert made["text"].nunique() == 600
    for place in range(6):
        counts = made["text"].str[place].value_counts().reindex(list("0123456789")).fillna(0)
        assert stats.chisquare(counts).pvalue > 1e-4
    # a space beyond 64 bits, down to its last slot
    long = fill_template("{letter}" * 40, count=50)
    assert long.attrs["space"] == 26**40
    assert min(long["text"].str[0].nunique(), long["text"].str[39].nunique()) > 15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fill_template("{digit}", 1), "fill_template: count is 1, but must be at least 2"),
        (
            lambda: fill_template("no slot", 5),
            "fill_template: 'no slot' has no slot to fill in two ways; write one as {digit}, "
            "{letter} or {red|green|blue}",
        ),
        (
            lambda: fill_template("a {number}", 5),
            "fill_template: the slot {number} is none; write {digit}, {letter}, or distinct "
            "alternatives such as {red|green|blue}",
        ),
        (
            lambda: fill_template("a {x|x}", 5),
            "fill_template: the slot {x|x} is none; write {digit}, {letter}, or distinct "
            "alternatives such as {red|green|blue}",
        ),
        (
            lambda: make_decoys(frame(["1"], kind=["canary"]), 1, tokenizer=None),
            "make_decoys: count is 1, but must be at least 2",
        ),
        (
            lambda: make_decoys(frame(["1 2"]), 5, tokenizer=reciter().tokenizer),
            "make_decoys: no item has the kind canary or biography; give decoys of your own: a "
            "file by load_items, or a template by fill_template",
        ),
        (
            lambda: make_decoys(
                frame(["1 2", "3"], kind="canary"), 5, tokenizer=reciter().tokenizer
            ),
            "make_decoys: items of kind canary have 1 to 2 tokens; give items of one length, or "
            "decoys of your own",
        ),
        (
            lambda: probe_exposure(reciter(), frame(["1 2"]), decoys=frame(["1 2"])),
            "probe_exposure: all of 1 decoys are texts of the items; give others",
        ),
        (
            lambda: probe_exposure(
                reciter(), frame(["1 2"]), decoys=frame(["3 4"]).assign(item="d")
            ),
            "probe_exposure: 1 decoys, needs at least 2",
        ),
        (
            lambda: probe_exposure(
                reciter(), frame(["1 2"], kind="a"), decoys=frame(["3 4"], kind="b")
            ),
            "probe_exposure: the decoys are of kind b, and no item is; name the kind of the items "
            "alike",
        ),
        (
            lambda: probe_exposure(reciter(), frame(["1 2"]), draws=99),
            "probe_exposure: draws is 99, its p-value needs at least 100",
        ),
        (
            lambda: probe_exposure(reciter(), frame(["1 2"]), level=1.0),
            "probe_exposure: level is 1.0, it must lie between 0 and 1",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError) as told:
        call()
    assert str(told.value) == message


def test_the_tables_of_two_calls_are_one(tiny, canaries):
    model = tiny.suite.checkpoints("base").at(16)
    one, two = (probe_exposure(model, canaries, count=30, seed=1) for _ in range(2))
    pd.testing.assert_frame_equal(one, two)
