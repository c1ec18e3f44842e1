"""Counterfactual memorization: by hand, by a plain loop, and on models trained on random halves."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from workbench.probes.extraction import probe_extraction
from workbench.stats.counterfactual import agreement, counterfactual_memorization
from workbench.stats.summarise import summarise
from workbench.subsets import draw_subset, load_subsets
from workbench.table import InputError, cache_folder, rows

RUNS = ("r1", "r2", "r3", "r4", "r5")


def scores(values, item="a", **columns) -> pd.DataFrame:
    return pd.DataFrame({"item": item, "run": RUNS[: len(values)], "value": values, **columns})


def inside(flags, item="a") -> pd.DataFrame:
    return pd.DataFrame({"item": item, "run": RUNS[: len(flags)], "inside": flags})


def test_counterfactual_by_hand():
    # in: 1, 2, 3, mean 2, variance 1; out: 0, 1, mean .5, variance .5. Value 1.5, error
    # sqrt(1/3 + .5/2) = .763763; degrees of freedom (7/12)^2 / ((1/3)^2 / 2 + (1/4)^2 / 1) = 2.88235;
    # Student's t there is 3.2572: 1.5 -+ 2.4877
    got = counterfactual_memorization(scores([1.0, 2, 3, 0, 1]), inside([True] * 3 + [False] * 2))
    row = got.iloc[0]
    assert (row["metric"], row["of"], row["item"]) == ("counterfactual", "outcome", "a")
    assert (row["value"], row["n"], row["n_in"], row["n_out"]) == (1.5, 5, 3, 2)
    assert row["se"] == pytest.approx(0.763763, abs=1e-6)
    half = stats.t.ppf(0.975, 2.8823529) * 0.763763
    assert (row["lo"], row["hi"]) == pytest.approx((1.5 - half, 1.5 + half), abs=1e-5)
    assert half == pytest.approx(2.4877, abs=1e-4)
    assert row["reason"] == "" and got.attrs == {"dropped": 0, "unknown": 0}


@pytest.mark.parametrize(("flags", "told"), [
    ([True, False, False, False], "in 1 and out of 3 runs: each needs 2"),
    ([True, True, True, False], "in 3 and out of 1 runs: each needs 2"),
    ([False] * 4, "in 0 and out of 4 runs: each needs 2"),
])  # fmt: skip
def test_too_few_models_on_a_side_give_nan_with_the_reason(flags, told):
    row = counterfactual_memorization(scores([1.0, 2, 3, 4]), inside(flags)).iloc[0]
    assert np.isnan([row["value"], row["se"], row["lo"], row["hi"]]).all()
    assert row["reason"] == told and row["n"] == 4


def test_two_on_each_side_are_enough_and_verdicts_without_spread_have_no_error():
    table = scores([1.0, 1, 0, 0], metric="extractable")
    row = counterfactual_memorization(table, inside([True, True, False, False])).iloc[0]
    assert row["value"] == 1.0 and row["of"] == "extractable"
    assert np.isnan([row["se"], row["lo"], row["hi"]]).all()
    assert row["reason"] == "no error: all runs of a side scored alike"
    # spread on one side is enough: variance .5 over two runs
    table = scores([1.0, 0, 0, 0], metric="extractable")
    row = counterfactual_memorization(table, inside([True, True, False, False])).iloc[0]
    assert (row["value"], row["se"], row["reason"]) == (0.5, 0.5, "")


def test_what_the_membership_does_not_know_is_left_out_and_counted():
    table = pd.concat([scores([1.0, 2, 3, 0, np.nan]), scores([1.0, 1, np.nan], item="stranger")])
    with pytest.warns(UserWarning) as told:
        got = counterfactual_memorization(table, inside([True, True, False, False, False]))
    assert str(told[0].message) == (
        "counterfactual_memorization: 2 scores left out, of which the membership says nothing; the "
        "first is of stranger in r1"
    )
    assert got["item"].tolist() == ["a"] and got.attrs == {"dropped": 2, "unknown": 2}
    assert (got["n_in"][0], got["n_out"][0], got["value"][0]) == (2, 2, 0.0)


def test_steps_are_kept_apart_and_coordinates_are_those_of_the_runs_with_the_item():
    table = pd.concat([
        scores([1.0, 1, 0, 0], step=1, group=["seen"] * 2 + ["partner"] * 2, dose=[4, 4, 0, 0], lag=0.0),
        scores([5.0, 3, 0, 2], step=2, group=["seen"] * 2 + ["partner"] * 2, dose=[4, 4, 0, 0], lag=1.0),
    ])  # fmt: skip
    got = counterfactual_memorization(table, inside([True, True, False, False]))
    assert got[["step", "value", "group", "dose", "lag"]].values.tolist() == [
        [1, 1.0, "seen", 4, 0.0],
        [2, 3.0, "seen", 4, 1.0],
    ]
    table["dose"] = [4, 3, 0, 0, 4, 4, 0, 0]  # what the runs do not agree on is no coordinate
    got = counterfactual_memorization(table, inside([True, True, False, False]))
    assert "dose" not in got.columns


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_a_plain_loop_agrees_and_turning_membership_turns_the_sign(seed):
    rng = np.random.default_rng(seed)
    names, runs = [f"i{n}" for n in range(4)], [f"r{n}" for n in range(7)]
    met = {(i, r): bool(rng.random() < 0.5) for i in names for r in runs}
    score = {(i, r): float(rng.normal()) for i in names for r in runs}
    table = pd.DataFrame(
        [(i, r, v) for (i, r), v in score.items()], columns=["item", "run", "value"]
    )
    member = pd.DataFrame(
        [(i, r, v) for (i, r), v in met.items()], columns=["item", "run", "inside"]
    )
    got = counterfactual_memorization(table.sample(frac=1, random_state=seed), member)
    turned = counterfactual_memorization(table, member.assign(inside=~member["inside"]))
    for index, name in enumerate(names):
        row, other = got[got["item"] == name].iloc[0], turned[turned["item"] == name].iloc[0]
        a = [score[name, r] for r in runs if met[name, r]]
        b = [score[name, r] for r in runs if not met[name, r]]
        assert (row["n_in"], row["n_out"]) == (len(a), len(b)) == (other["n_out"], other["n_in"])
        if min(len(a), len(b)) < 2:
            assert np.isnan(row["value"]) and np.isnan(other["value"])
            continue
        welch = stats.ttest_ind(a, b, equal_var=False)
        interval = welch.confidence_interval(0.95)
        assert row["value"] == pytest.approx(np.mean(a) - np.mean(b)), index
        assert row["value"] / row["se"] == pytest.approx(welch.statistic)
        assert (row["lo"], row["hi"]) == pytest.approx((interval.low, interval.high))
        assert (other["value"], other["lo"], other["hi"], other["se"]) == pytest.approx(
            (-row["value"], -row["hi"], -row["lo"], row["se"])
        )


def test_errors_by_message():
    table, member = scores([1.0, 2, 3, 4]), inside([True, True, False, False])
    for bad, told in (
        (
            lambda: counterfactual_memorization(table.drop(columns="run"), member),
            "counterfactual_memorization: the table has no column 'run'; it needs item, run, value",
        ),
        (
            lambda: counterfactual_memorization(table, member.drop(columns="inside")),
            "counterfactual_memorization: the membership has no column 'inside'; it needs item, run, "
            "inside",
        ),
        (
            lambda: counterfactual_memorization(table, pd.concat([member, member.head(1)])),
            "counterfactual_memorization: the membership says twice whether a is in r1",
        ),
        (
            lambda: counterfactual_memorization(
                pd.concat([table.assign(prefix=8), table.assign(prefix=16)]), member
            ),
            "counterfactual_memorization: item a has several scores of outcome in run r1; name the "
            "columns that tell them apart in by",
        ),
        (
            lambda: counterfactual_memorization(table, member, level=95),
            "counterfactual_memorization: level is 95, it must lie between 0 and 1",
        ),
    ):
        with pytest.raises(InputError) as error:
            bad()
        assert str(error.value) == told
    with pytest.warns(UserWarning), pytest.raises(InputError) as error:
        counterfactual_memorization(table, member.assign(run="elsewhere" + member["run"]))
    assert str(error.value) == (
        "counterfactual_memorization: no score is of an item and run that the membership knows; do "
        "both name items and runs alike?"
    )


# --- agreement -----------------------------------------------------------------------------------


def estimates(values, **columns) -> pd.DataFrame:
    names = [f"i{n}" for n in range(len(values))]
    return rows("memorization", values, run="r", item=names, beside=columns)


def test_agreement_by_hand():
    # differences 0, 1, 0, 1: mean .5, variance 1/3, error sqrt(1/12) = .288675, t(3) = 3.182446.
    # (1, 3, 3, 5) and (1, 2, 3, 4): cov 2, variances 8/3 and 5/3: r = .948683; Fisher's z with
    # one degree of freedom: atanh(r) = 1.818446 -+ 1.959964
    got = agreement(estimates([1.0, 3, 3, 5]), estimates([1.0, 2, 3, 4]))
    apart, together = got.iloc[0], got.iloc[1]
    assert (apart["metric"], apart["value"], apart["n"]) == ("difference", 0.5, 4)
    half = 3.182446 * 0.288675
    assert (apart["lo"], apart["hi"]) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-5)
    assert together["value"] == pytest.approx(0.948683, abs=1e-6)
    bounds = np.tanh([1.818446 - 1.959964, 1.818446 + 1.959964])
    assert (together["lo"], together["hi"]) == pytest.approx(tuple(bounds), abs=1e-5)


def test_agreement_splits_drops_and_says_why_it_is_undefined():
    one = estimates([1.0, 2, 3, np.nan, 5], kind=["x", "x", "y", "y", "y"])
    got = agreement(one, estimates([0.0, 0, 0, 0]), by=["kind"]).set_index(["kind", "metric"])
    assert got.loc[("x", "difference"), ["value", "n"]].tolist() == [1.5, 2]
    assert got.loc[("y", "difference"), ["value", "n"]].tolist() == [3.0, 1]
    assert got.loc[("y", "difference"), "reason"] == "one pair: no interval"
    assert got.loc[("x", "correlation"), "reason"].startswith("no correlation: under four pairs")
    # three points always lie near some line: Fisher's z has no degree of freedom left
    three = agreement(estimates([1.0, 2, 4]), estimates([1.0, 3, 4])).iloc[1]
    assert np.isnan(three["value"]) and three["n"] == 3
    same = agreement(estimates([1.0, 2, 3, 4]), estimates([4.0, 3, 2, 1])).iloc[1]
    assert same[["value", "lo", "hi"]].tolist() == pytest.approx([-1.0, -1.0, -1.0])


def test_agreement_refuses():
    one = estimates([1.0, 2.0])
    for bad, told in (
        (lambda: agreement(one, one, on=["lag"]), "agreement: the first table has no column 'lag'"),
        (
            lambda: agreement(one, pd.concat([one, one])),
            "agreement: the second table has several rows per (item); select one",
        ),
        (
            lambda: agreement(one, one.assign(item="z" + one["item"])),
            "agreement: the tables share no (item) with a value in both",
        ),
    ):
        with pytest.raises(InputError) as error:
            bad()
        assert str(error.value) == told


# --- models trained on random halves ---------------------------------------------------------------


@pytest.fixture(scope="module")
def subsets(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_CACHE", str(tmp_path_factory.mktemp("subsets")))
        yield load_subsets(tiny.suite, runs=4, progress=False), cache_folder()


def test_every_item_is_in_half_of_the_runs_and_one_of_each_pair_in_each(subsets):
    found, _ = subsets
    met = found.membership().pivot(index="item", columns="run", values="inside")
    items = found.items("subset-00").set_index("item").loc[met.index]
    planted = items["partner"] != ""
    assert (met[planted].sum(axis=1) == 2).all() and not met[~planted].any(axis=None)
    for run in found.runs:
        assert (met.loc[planted, run] != met[run].loc[items["partner"][planted]].to_numpy()).all()
    # the second of two runs mirrors the first, and the twos differ
    assert (met.loc[planted, "subset-00"] != met.loc[planted, "subset-01"]).all()
    assert (met["subset-00"] != met["subset-02"]).any()
    drawn = draw_subset(0, pairs=10_000, seed=0)
    # 10,000 fair coins: further than .025 from a half in under one of a million seeds
    assert abs(drawn.mean() - 0.5) < 0.025
    assert (draw_subset(1, pairs=10_000, seed=0) == ~drawn).all()


def test_runs_hold_what_the_ledger_says_in_the_suites_slots(subsets, tiny):
    found, _ = subsets
    places = ["update", "row", "offset"]
    partner = found.items("subset-00").set_index("item")["partner"]
    base = tiny.suite.exposures("base")
    for run in found.runs:
        ledger = found.exposures(run)
        pd.testing.assert_frame_equal(ledger[places], base[places])
        other = ledger["item"] != base["item"]
        assert (ledger["item"][other] == base["item"][other].map(partner)).all()
        assert found.checkpoints(run).steps == [
            8,
            13,
            16,
        ]  # ends of waves, and the end; 8 + 10 is later


def test_cached_runs_are_not_trained_again_and_more_are_added(subsets, tiny, monkeypatch):
    import workbench.subsets as module

    found, cache = subsets
    monkeypatch.setenv("WORKBENCH_CACHE", str(cache))
    asked = []
    monkeypatch.setattr(
        module, "_train", lambda suite, folder, missing, progress: asked.extend(missing)
    )
    assert load_subsets(tiny.suite, runs=4, progress=False).path == found.path
    assert asked == []
    load_subsets(tiny.suite, runs=8, progress=False)
    assert asked == ["subset-04", "subset-05", "subset-06", "subset-07"]


def test_a_run_that_draws_the_first_of_every_pair_is_the_suites_small_one(tiny, monkeypatch):
    """To the bit, though that one was trained straight through and this one from the burn-in."""
    import workbench.subsets as module

    monkeypatch.setattr(
        module, "draw_subset", lambda number, pairs, seed: np.full(pairs, number > 0)
    )
    found = load_subsets(tiny.suite, runs=4, progress=False)
    for step in (8, 16):
        file = f"step{step:06d}/model.safetensors"
        small = (tiny.suite.path / "small" / file).read_bytes()
        assert (found.path / "subset-00" / file).read_bytes() == small
        assert (found.path / "subset-01" / file).read_bytes() != small


def test_too_few_or_odd_runs_are_refused(tiny):
    for runs in (2, 5):
        with pytest.raises(InputError) as error:
            load_subsets(tiny.suite, runs=runs)
        assert str(error.value) == (
            f"load_subsets: runs is {runs}, but must be even and at least 4, so that every item is "
            "in two runs and out of two"
        )


def test_real_scores_by_brute_force(subsets):
    found, _ = subsets
    table = pd.concat(
        [
            probe_extraction(found.checkpoints(r), found.items(r), prefix=8, suffix=8)
            for r in found.runs
        ]
    )
    table = table[table["metric"] == "log_probability"]
    member = found.membership()
    got = counterfactual_memorization(table, member)
    assert set(got["step"]) == {8, 13, 16} and set(got["of"]) == {"log_probability"}
    met = member.set_index(["item", "run"])["inside"]
    score = table.astype({"item": str, "run": str}).set_index(["item", "run", "step"])["value"]
    for row in got[got["step"] == 16].itertuples():
        a = [score[row.item, r, 16] for r in found.runs if met[row.item, r]]
        b = [score[row.item, r, 16] for r in found.runs if not met[row.item, r]]
        assert (row.n_in, row.n_out) == (len(a), len(b))
        expected = np.mean(a) - np.mean(b) if len(a) >= 2 else np.nan
        assert row.value == pytest.approx(expected, abs=1e-9, nan_ok=True)
    # never planted: undefined; planted twelve times until the end: remembered, whichever the kind
    assert got.loc[got["group"] == "never", "value"].isna().all()
    pooled = summarise(got[got["step"] == 16], by=["run", "step", "metric", "dose"])
    assert pooled.set_index("dose")["lo"][12] > 0
