"""The audit of results: each fault by hand, false alarms and power by simulation; falls from a peak."""

import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from workbench.plots import plot_audit
from workbench.results import load_results, write_example_results
from workbench.stats.audit import (
    KINDS,
    audit_results,
    findings_table,
    missing_steps,
    off_curve,
)
from workbench.stats.peaks import _critical, peak_drop, sampling_error
from workbench.table import InputError, rows, validate

STEPS = [0, 1000, 2000, 3000, 4000, 5000, 6000, 7000]


def curve(values, *, group="t", n=400, steps=None, run="r", metric="accuracy", **beside):
    steps = STEPS[: len(values)] if steps is None else steps
    beside = {"how": "wilson" if np.all(n) else "", **beside}
    return rows(metric, values, run=run, step=np.asarray(steps), group=group, n=n, beside=beside)


def rising(shift=0.0, *, group="t", **options):
    values = [0.3, 0.32, 0.36, 0.41, 0.45, 0.5, 0.52, 0.55]
    return curve([v + shift for v in values], group=group, **options)


def kinds(found, *names):
    found = found[found["kind"].isin(names)] if names else found
    return found[["kind", "step", "group"]].astype({"kind": str, "group": str}).to_numpy().tolist()


# --- the example, whose faults are known


@pytest.mark.parametrize("seed", range(3))
def test_the_planted_faults_are_found_and_nothing_else(tmp_path, seed):
    planted = write_example_results(tmp_path, seed=seed)
    found = audit_results(load_results(tmp_path))
    assert sorted(kinds(found)) == sorted(planted.to_numpy().tolist())
    validate(found)
    off = found[found["kind"] == "checkpoint_off"].iloc[0]
    assert off["what"].endswith("its values are nearest those of step 18000")
    # a fall that is no fault: .60 at step 10000 (its curve's top) to .42
    drop = peak_drop(load_results(tmp_path))
    drop = drop[(drop["at"] == "drop") & (drop["task"] == "capitals")].iloc[0]
    truth = 0.25 + 0.37 / (1 + 0.15**1.5) - 0.42
    assert drop["lo"] <= truth <= drop["hi"]
    assert drop["lo"] > 0.05


def test_nothing_is_found_where_nothing_is_wrong():
    table = pd.concat([rising(0.01 * i, group=f"t{i}") for i in range(5)])
    found = audit_results(table)
    assert found.empty
    assert list(found["kind"]) == []
    validate(found)
    # 5 curves of 8 values, of which the inner 6 can be judged
    assert found.attrs == {"alarm": 0.05, "values": 30, "steps": 6, "pairs": 28}


# --- facts of the files


def test_records_that_disagree():
    table = rising(declared_step=[0, 1000, 2000, 3000, 40, 5000, 6000, 7000], file="f",
                   shots=[0.0] * 7 + [3.0], declared_shots=[np.nan] * 7 + [5.0])  # fmt: skip
    found = audit_results(table).set_index("kind")
    assert found.loc["step_record", ["step", "what"]].tolist() == [
        4000, "the name says step 40, the file records 4000"
    ]  # fmt: skip
    assert found.loc["shots_record", "what"] == (
        "the name says 5 shots, the file records 3 for 1 tasks (t)"
    )
    assert found.loc["shots_change", ["step", "what"]].tolist() == [
        7000, "3 shots here, 0 at most steps of this task"
    ]  # fmt: skip
    assert set(found["sure"]) == {"certain"}
    assert found["value"].isna().all()
    assert set(found["reason"]) == {"a fact of the files, chance has no part in it"}


def test_two_shot_counts_at_one_step_are_two_experiments():
    few = rising(0.1, group="t, 5-shot", shots=5.0, task="t")
    none = rising(group="t, 0-shot", shots=0.0, task="t")
    assert audit_results(pd.concat([none, few])).empty


def test_repeated_evaluations():
    table = pd.concat([rising(file="a"), curve([0.33], steps=[1000], file="b")])
    found = audit_results(table)
    assert kinds(found) == [["repeated", 1000, "t"]]
    assert found["what"].iloc[0] == (
        "2 evaluations of one checkpoint, values differ by up to 0.01 (t): a, b"
    )
    same = pd.concat([rising(file="a"), curve([0.32], steps=[1000], file="b")])
    assert "all with the same values: a, b" in audit_results(same)["what"].iloc[0]


def test_mixed_set_ups():
    file = [f"f{i}" for i in range(8)]
    table = rising(file=file, harness=["0.4.2"] * 6 + ["0.4.9", ""], limit=[np.nan] * 7 + [100.0],
                   precision=["float16"] + ["bfloat16"] * 7, task_version=["1"] * 7 + ["2"])  # fmt: skip
    found = audit_results(table).set_index("kind")["what"].astype(str)
    assert found.to_dict() == {
        # a version that is not recorded is no other version
        "mixed_harness": "0.4.2 in 6 files, 0.4.9 in 1 files; the rarer at steps 6000",
        "mixed_precision": "bfloat16 in 7 files, float16 in 1 files; the rarer at steps 0",
        "mixed_task_version": "1 tasks have several versions (t); the rarer at steps 7000",
        "limited": "1 of 8 files are of a part of the items (limit 100)",
    }


@pytest.mark.parametrize(
    ("steps", "missing"),
    [
        ([1000, 2000, 4000, 5000, 6000], [3000]),
        ([1000, 2000, 5000, 6000, 7000], [3000, 4000]),
        ([1000, 2000, 4000, 6000, 7000, 8000, 9000], [3000, 5000]),
        ([1, 2, 8, 16, 32], [4]),
        ([0, 1, 2, 4, 8, 32, 64, 128], [16]),
        ([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 3000], []),  # as Pythia saves
        ([1000, 2000, 3000, 10000, 20000, 30000], []),  # coarser later on
        ([0, 143000], []),
        ([5], []),
        ([100, 250, 300, 700, 750], []),
        ([1000, 3000, 4000], []),  # three steps are no grid
    ],
)
def test_missing_steps(steps, missing):
    assert missing_steps(steps) == missing


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(9, 40), st.data())
def test_any_inner_step_of_a_regular_grid_is_missed(stride, length, data):
    gone = data.draw(st.integers(3, length - 4))
    steps = [stride * k for k in range(length) if k != gone]
    assert missing_steps(steps) == [stride * gone]
    assert missing_steps([stride * k for k in range(length)]) == []


def test_missing_tasks():
    whole = [rising(0.01 * i, group=f"t{i}") for i in range(3)]
    gap = rising(0.2, group="gap").query("step not in (3000, 4000)")
    late = rising(0.3, group="late").query("step >= 2000")  # begins later: no gap
    rare = rising(0.4, group="rare").query("step in (0, 4000, 7000)")  # a grid of its own
    found = audit_results(pd.concat([*whole, gap, late, rare]))
    assert kinds(found) == [["missing_task", 3000, "gap"], ["missing_task", 4000, "gap"]]
    assert found["what"].iloc[0] == "1 of 6 tasks are missing: gap"


def test_constant_and_chance():
    flat = curve([0.37] * 8, group="flat")
    # 8 values of 400 at .25 +- .02: the best, .27, has p = P(X >= 108) = .19 alone
    guess = curve([0.25, 0.27, 0.23, 0.26, 0.24, 0.25, 0.26, 0.24], group="guess", chance=0.25)
    found = audit_results(pd.concat([rising(), flat, guess]))
    assert kinds(found) == [["constant", 7000, "flat"], ["at_chance", 7000, "guess"]]
    least = stats.binom.sf(107, 400, 0.25)
    assert found["value"].iloc[1] == pytest.approx(min(1, 8 * least))
    # one value of 140 among 400 is enough not to be at chance
    guess.loc[7, "value"] = 0.35
    assert audit_results(pd.concat([rising(), guess])).empty


# --- against chance


def test_identical_values_by_hand():
    tables = [rising(0.013 * i, group=f"t{i}") for i in range(4)]
    for table in tables:
        table.loc[6, "value"] = table.loc[1, "value"]
    found = audit_results(pd.concat(tables))
    same = found[found["kind"] == "identical_values"]
    assert same["step"].tolist() == [1000, 6000]
    # no task ties elsewhere in 7 pairs of neighbours: rate .5 / 8 each; 28 pairs of steps
    assert same["value"].tolist() == pytest.approx([28 * (0.5 / 8) ** 4] * 2)
    assert same["what"].tolist() == [
        "all 4 values equal those of step 6000 to the last digit",
        "all 4 values equal those of step 1000 to the last digit",
    ]


def test_equal_neighbours_are_no_usual_tie():
    # of the 7 pairs of neighbours one is the pair in question; 6 say how often tasks tie
    tables = [rising(0.013 * i, group=f"t{i}") for i in range(5)]
    for table in tables:
        table.loc[3, "value"] = table.loc[2, "value"]
    found = audit_results(pd.concat(tables))
    assert kinds(found) == [["identical_values", 2000, "all"], ["identical_values", 3000, "all"]]
    assert found["value"].tolist() == pytest.approx([28 * (0.5 / 7) ** 5] * 2)


def test_ties_that_are_usual_say_nothing():
    # tasks that give the same value at nearly all steps tie at any two of them
    tables = []
    for i in range(6):
        table = curve([0.5] * 8, group=f"t{i}")
        table.loc[3 + i % 3, "value"] = 0.51
        tables.append(table)
    assert kinds(audit_results(pd.concat(tables)), "identical_values") == []
    # two tasks of two steps: chance is not out of the question either
    pair = [curve([0.5, 0.5], group=f"t{i}") for i in range(2)]
    assert audit_results(pd.concat(pair)).empty


def test_identical_under_another_name():
    one = [rising(0.013 * i, group=f"t{i}") for i in range(5)]
    other = [t.assign(run="s", value=t["value"] + 0.003 * (t["step"] != 5000)) for t in one]
    found = audit_results(pd.concat([*one, *other]))
    same = found[found["kind"] == "identical_values"][["run", "step", "what"]].astype(str)
    assert same.to_numpy().tolist() == [
        ["r", "5000", "all 5 values equal those of s step 5000 to the last digit"],
        ["s", "5000", "all 5 values equal those of r step 5000 to the last digit"],
    ]


def test_off_curve_by_hand():
    # of (.5, .5, .9, .5, .5) of 100 the middle lies .4 above both sides; with 140 of 200 right,
    # 90 or more of the one hundred: Fisher's exact test. The others lie within their neighbours.
    value = np.array([0.5, 0.5, 0.9, 0.5, 0.5])
    p = off_curve(value, n=np.full(5, 100.0), se=np.full(5, np.nan))
    table = [[90, 10], [50, 50]]
    assert p[2] == pytest.approx(2 * stats.fisher_exact(table, alternative="greater").pvalue)
    assert p[2] == pytest.approx(5.549e-10, rel=1e-3)
    np.testing.assert_array_equal(p[[0, 4]], np.nan)
    np.testing.assert_array_equal(p[[1, 3]], 1.0)
    # from below it is the same
    low = off_curve(1 - value, n=np.full(5, 100.0), se=np.full(5, np.nan))
    np.testing.assert_allclose(low, p, rtol=1e-9)
    # any other number by the normal: z = .4 / (sqrt 2 * .1) = 2.8284271, p = .0046777
    p = off_curve(value, n=np.full(5, np.nan), se=np.full(5, 0.1))
    assert p[2] == pytest.approx(0.0046777, abs=1e-6)


def test_off_curve_as_a_plain_loop():
    rng = np.random.default_rng(4)
    value, n = rng.binomial(300, np.linspace(0.2, 0.6, 20)) / 300, np.full(20, 300.0)
    usual = 0.8
    got = off_curve(value, n=n, se=np.full(20, np.nan), usual=usual)
    bend = {j: abs(value[j] - (value[j - 1] + value[j + 1]) / 2) for j in range(1, 19)}
    for i in range(1, 19):
        sides = [value[i - 1], value[i + 1]]
        sides += [np.median(value[max(0, i - 3) : i]), np.median(value[i + 1 : i + 4])]
        excess = value[i] - max(sides) if value[i] > max(sides) else min(0, value[i] - min(sides))
        if excess == 0:
            assert got[i] == 1.0
            continue
        limit = max(sides) if excess > 0 else min(sides)
        table = [[round(value[i] * 300), 300 - round(value[i] * 300)],
                 [round(limit * 300), 300 - round(limit * 300)]]  # fmt: skip
        which = "greater" if excess > 0 else "less"
        exact = 2 * stats.fisher_exact(table, alternative=which).pvalue
        far = [b for j, b in bend.items() if abs(j - i) > 1]
        own = 1.4826 * np.median(far) / np.sqrt(1.5)
        q = (300 * value[i] + 2) / 304
        drawn = np.sqrt(q * (1 - q) / 300)
        df = 0.37 * len(far)
        rough = np.sqrt((5 * (usual * drawn) ** 2 + df * own**2) / (5 + df))
        z = abs(excess) / (np.sqrt(2) * rough)
        tail = stats.norm.sf(z) if rough < 1.5 * drawn else stats.t.sf(z, 5 + df)
        assert got[i] == pytest.approx(min(1, max(exact, 2 * tail)), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=4, max_size=20))
def test_no_value_of_a_monotone_curve_is_off(counts):
    value = np.sort(counts) / 200
    p = off_curve(value, n=np.full(len(value), 200.0), se=np.full(len(value), np.nan))
    np.testing.assert_array_equal(p[1:-1], 1.0)
    down = off_curve(value[::-1], n=np.full(len(value), 200.0), se=np.full(len(value), np.nan))
    np.testing.assert_array_equal(down[1:-1], 1.0)


def simulated(rng, *, tasks=8, steps=24, n=500, kind="rise"):
    x = np.arange(steps)
    made = []
    for t in range(tasks):
        p = 0.25 + 0.5 / (1 + np.exp(-(x - 6 - t))) if kind == "rise" else np.full(steps, 0.3)
        values = rng.binomial(n, p) / n
        made.append(curve(values, group=f"t{t}", n=n, steps=x * 1000))
    return pd.concat(made, ignore_index=True)


def test_false_alarms_are_rare():
    # 12 sets each of steep and of flat curves at alarm .05: more than 4 of 24 with a false alarm
    # would come up once in 170 at the nominal rate; it is a bound, the actual rate is far lower
    rng = np.random.default_rng(8)
    judged = ("identical_values", "value_off", "checkpoint_off")
    alarms = [
        bool(kinds(audit_results(simulated(rng, kind=kind)), *judged))
        for kind in ("rise", "flat")
        for _ in range(12)
    ]
    assert sum(alarms) <= 4


def test_faults_of_a_size_that_matters_are_found():
    # one value .2 off (n = 500: 7 standard errors of a difference) and, in other sets, a late
    # checkpoint in the place of an early one; each is found in 5 of 6 sets or more
    rng = np.random.default_rng(9)
    single = whole = 0
    for _ in range(6):
        table = simulated(rng, kind="rise")
        at = table.index[(table["group"] == "t2") & (table["step"] == 15_000)]
        table.loc[at, "value"] -= 0.2
        single += ["value_off", 15_000, "t2"] in kinds(audit_results(table))
        table = simulated(rng, kind="rise")
        early, late = table["step"] == 3000, table["step"] == 20_000
        table.loc[early, "value"] = rng.binomial(500, table.loc[late, "value"]) / 500
        whole += ["checkpoint_off", 3000, "all"] in kinds(audit_results(table))
    assert single >= 5
    assert whole >= 5


def test_a_loss_without_errors_is_judged_by_its_roughness():
    rng = np.random.default_rng(3)
    steps = np.arange(30) * 100
    losses = 2 + 3 * np.exp(-np.arange(30) / 8) + rng.normal(0, 0.01, 30)
    losses[20] += 0.2
    table = curve(losses, steps=steps, metric="loss", n=0)
    assert kinds(audit_results(table)) == [["value_off", 2000, "t"]]


def test_audit_refused():
    table = rising()
    with pytest.raises(InputError, match=re.escape(
            "audit_results: alarm is 1.0, it must lie between 0 and 1")):  # fmt: skip
        audit_results(table, alarm=1.0)
    with pytest.raises(InputError, match=re.escape(
            "audit_results: no pooled rows (item 'all'); summarise the items first")):  # fmt: skip
        audit_results(table.assign(item="one"))


def test_findings_stand_in_the_order_of_their_kinds():
    assert findings_table([], run="r").empty
    table = pd.concat([rising(), curve([0.4] * 8, group="flat")])
    table.loc[table["step"] == 3000, "value"] = np.nan
    found = audit_results(table.dropna(subset="value"))
    order = [KINDS.index(kind) for kind in found["kind"].astype(str)]
    assert order == sorted(order)


# --- falls from a peak


def test_peak_drop_of_a_lone_peak_by_hand():
    # .8 of 400 at one step against .5 elsewhere stands alone, so it is not corrected: fall .3;
    # se of a share: q = 322 / 404 = .7970297, .0201106; q = .5: .025; together .0320846
    table = curve([0.5, 0.5, 0.8, 0.5, 0.5])
    made = peak_drop(table)
    drop = made[made["at"] == "drop"].iloc[0]
    assert drop["value"] == pytest.approx(0.3)
    assert drop["naive"] == pytest.approx(0.3)
    assert drop["rivals"] == 1
    np.testing.assert_allclose(
        [drop["lo"], drop["hi"]],
        [0.3 - 1.959964 * 0.0320846, 0.3 + 1.959964 * 0.0320846],
        atol=1e-6,
    )
    assert (drop["metric"], drop["of"], drop["step"]) == ("peak_drop", "accuracy", 4000)
    ends = made[made["at"] != "drop"].set_index("at")
    assert ends["step"].to_dict() == {"peak": 2000, "end": 4000}
    assert ends["value"].to_dict() == {"peak": 0.8, "end": 0.5}


def test_peak_drop_corrects_for_the_picking():
    # equal values are all rivals: max - last is 0 and stays 0; three of four a little above
    flat = peak_drop(curve([0.5] * 6))
    assert flat[flat["at"] == "drop"].iloc[0]["value"] == 0.0
    # rivals .52 twice against .5, se .025: c_50 of two is .3836 (checked below), nothing is left
    made = peak_drop(curve([0.52, 0.52, 0.5]))
    drop = made[made["at"] == "drop"].iloc[0]
    assert drop["naive"] == pytest.approx(0.02)
    q = np.array([(400 * 0.52 + 2) / 404, 0.5])
    se = np.sqrt(q * (1 - q) / 400)
    apart = np.hypot(*se)
    middle = _critical(np.array([se[0], se[0]]), se[1], 0.5)
    assert drop["value"] == pytest.approx(0.02 - middle * apart)
    assert drop["hi"] == pytest.approx(0.02 + 1.959964 * apart, abs=1e-6)
    assert drop["lo"] == 0.0


def test_peak_drop_as_a_plain_loop():
    # unequal numbers of items, so that the best guess of the peak is not the highest value
    n = np.array([300, 60, 900, 40, 500, 200])
    right = np.array([100, 30, 441, 21, 245, 80])
    value = right / n
    table = curve(value, n=n, steps=np.arange(6))
    drop = peak_drop(table).query("at == 'drop'").iloc[0]
    q = (right + 2) / (n + 4)
    se = np.sqrt(q * (1 - q) / n)
    reach = stats.norm.isf(0.01 / 12)
    bar = max(v - reach * s for v, s in zip(value, se, strict=True))
    rivals = [s for s in range(5) if value[s] + reach * se[s] >= bar]
    assert len(rivals) == 4
    assert drop["rivals"] == 5  # the end may be the peak as well
    for name, quantile in (("value", 0.5), ("lo", 0.975)):
        c = _critical(se[rivals], se[5], quantile)
        by_hand = max(value[s] - value[5] - c * np.hypot(se[s], se[5]) for s in rivals)
        assert drop[name] == pytest.approx(max(0, by_hand), abs=1e-9)
    assert drop["value"] > 0
    top = max(value[s] - value[5] + 1.959964 * np.hypot(se[s], se[5]) for s in rivals)
    assert drop["hi"] == pytest.approx(top, abs=1e-6)


def test_dunnett():
    # one comparison is the normal's; two and five at one-sided .025 from Dunnett's table (2.21, 2.51)
    assert _critical(np.ones(1), 1.0, 0.975) == pytest.approx(1.959964, abs=1e-6)
    assert _critical(np.ones(2), 1.0, 0.975) == pytest.approx(2.2121, abs=1e-4)
    assert _critical(np.ones(5), 1.0, 0.975) == pytest.approx(2.51, abs=6e-3)
    # a second route, by simulation: 200,000 draws give the quantile to about .01
    rng = np.random.default_rng(0)
    se, end = np.array([0.5, 1.0, 2.0]), 1.5
    noise = rng.normal(size=(200_000, 3)) * se - rng.normal(size=(200_000, 1)) * end
    worst = (noise / np.hypot(se, end)).max(axis=1)
    for quantile in (0.5, 0.975):
        assert _critical(se, end, quantile) == pytest.approx(
            np.quantile(worst, quantile), abs=0.015
        )


@pytest.mark.parametrize("kind", ["flat", "rise", "peak"])
def test_intervals_of_the_fall_cover(kind):
    # 100 sets: 95 % coverage gives fewer than 89 less than once in 100
    rng = np.random.default_rng(6)
    x = np.arange(16)
    p = {"flat": np.full(16, 0.4), "rise": 0.25 + 0.3 * (1 - np.exp(-x / 4)),
         "peak": 0.3 + 0.25 * np.exp(-(((x - 8) / 4.0) ** 2))}[kind]  # fmt: skip
    truth = p.max() - p[-1]
    runs = [curve(rng.binomial(400, p) / 400, run=f"r{i}", steps=x) for i in range(100)]
    made = peak_drop(pd.concat(runs, ignore_index=True))
    drop = made[made["at"] == "drop"]
    inside = (drop["lo"] <= truth + 1e-9) & (truth <= drop["hi"] + 1e-9)
    assert inside.sum() >= 89
    assert (drop["lo"] > truth).sum() <= 8
    # the plain difference is too high by a standard error (.035) or more on a flat curve
    if kind == "flat":
        assert drop["naive"].mean() > 0.04
        assert drop["value"].mean() < 0.02


def test_losses_fall_upwards_and_outcomes_not_at_all():
    loss = curve([3.0, 2.0, 2.6], metric="loss", n=0, se=0.01)
    odd = curve([1.0, 2.0, 3.0], metric="outcome", n=0, group="odd", se=0.1)
    made = peak_drop(pd.concat([loss, odd]))
    drop = made[made["at"] == "drop"]
    assert drop["value"].tolist() == pytest.approx([0.6])
    assert made.loc[made["at"] == "peak", "value"].tolist() == [2.0]
    assert made.attrs == {"dropped": 3}


def test_no_error_no_interval():
    made = peak_drop(curve([3.0, 2.0, 2.6], metric="loss", n=0))
    drop = made[made["at"] == "drop"].iloc[0]
    assert np.isnan(drop["value"])
    assert drop["naive"] == pytest.approx(0.6)
    assert drop["reason"] == "no sampling error is known"
    single = peak_drop(curve([0.5]))
    assert single[single["at"] == "drop"]["reason"].tolist() == ["one step"]


def test_a_log_without_errors_is_judged_by_its_roughness():
    # zigzag of +-.01 around a straight line: second differences .02 each, so the scatter is
    # 1.4826 * .02 / sqrt(1.5) = .0242108; a loss that ends .3 above its lowest has risen
    straight = 3 - 0.05 * np.arange(8) + 0.01 * (-1.0) ** np.arange(8)
    line = curve(straight, metric="loss", n=0)
    np.testing.assert_allclose(sampling_error(line), 0.0242108, atol=1e-7)
    rising_again = np.concatenate([straight, [2.8, 2.95]])
    made = peak_drop(curve(rising_again, metric="loss", n=0, steps=np.arange(10)))
    drop = made[made["at"] == "drop"].iloc[0]
    assert 0.1 < drop["lo"] < drop["value"] < drop["hi"] < 0.5


def test_sampling_error_from_bounds():
    # half-width .196 at 95 % is a standard error of .1
    line = rows("task_score", [5.0], run="r", lo=5 - 0.1959964, hi=5 + 0.1959964, n=10)
    assert sampling_error(line)[0] == pytest.approx(0.1, abs=1e-7)
    # a share of 400 items, none right: q = 2 / 404
    line = curve([0.0])
    assert sampling_error(line)[0] == pytest.approx(np.sqrt(2 / 404 * 402 / 404 / 400))


def test_peak_drop_refused():
    table = rising()
    with pytest.raises(InputError, match="^peak_drop: level is 0, it must lie between 0 and 1$"):
        peak_drop(table, level=0)
    with pytest.raises(InputError, match=re.escape(
            "peak_drop: no pooled rows (item 'all') with a value; summarise first")):  # fmt: skip
        peak_drop(table.assign(item="one"))
    with pytest.raises(InputError, match=re.escape(
            "peak_drop: several values of t (accuracy) at step 0 of r; choose one by `file`, or "
            "load with repeats='latest'")):  # fmt: skip
        peak_drop(pd.concat([table, table.assign(file="b")]))
    with pytest.raises(
        InputError, match="no metric here is better high or low, so nothing can fall"
    ):
        peak_drop(table.assign(metric="outcome"))


# --- its map


def test_plot_audit(tmp_path):
    write_example_results(tmp_path)
    table = load_results(tmp_path)
    found = audit_results(table)
    figure = plot_audit(table, found)
    heat, marks = figure.data[0], {trace.name: trace for trace in figure.data[1:]}
    assert "8000" in heat.x  # the missing step has its column
    assert np.isnan(np.array(heat.z, dtype=float)[:, list(heat.x).index("8000")]).all()
    assert list(marks["same values as another"].x) == ["2000", "18000"]
    assert list(marks["same values as another"].y) == ["whole checkpoint"] * 2
    assert list(marks["off its curve"].y) == ["piqa, 0-shot"]
    # of whole curves nothing is marked
    assert len(marks) == 6
    at = np.array(heat.z, dtype=float)[
        list(heat.y).index("piqa, 0-shot"), list(heat.x).index("14000")
    ]
    value = table[(table["task"] == "piqa") & (table["step"] == 14_000)]["value"].iloc[0]
    assert at == pytest.approx(value, abs=1e-6)
    with pytest.raises(InputError, match="^plot_audit: 2 runs"):
        plot_audit(pd.concat([table, table.assign(run="other")]), found)
    with pytest.raises(InputError, match="^plot_audit: several values of a task at one step"):
        plot_audit(pd.concat([table, table.assign(file="again")]), found)
    with pytest.raises(InputError, match="^plot_audit: the findings have no column 'kind'"):
        plot_audit(table, table)
