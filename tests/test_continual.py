"""Summaries of accuracy matrices, stability gaps, recurring tasks, plasticity: against plain loops."""

import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from workbench import (
    METRICS,
    InputError,
    accuracy_matrix,
    knowledge_accumulation,
    load_matrix,
    plasticity,
    stability_gap,
)
from workbench.plots import (
    plot_accuracy_matrix,
    plot_matrix_measures,
    plot_plasticity,
    plot_stability_gap,
)
from workbench.stats.continual import BACKWARD, MATRIX, matrix_measures, windowed_change
from workbench.stats.summarise import wilson_interval
from workbench.table import rows

R = [[0.6, 0.1, 0.2], [0.9, 0.8, 0.1], [0.95, 0.5, 0.85]]
INITIAL, JOINT = [0.1, 0.2, 0.15], [0.97, 0.9, 0.88]
CURVES = [[0.1, 0.3, 0.5], [0.2, 0.4, 0.6]]


def refuses(message):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


def value(table, key, column="value"):
    found = table[table["metric"] == key]
    assert len(found) == 1
    return found[column].iloc[0]


def cells(table):
    return table[table["change"].notna()]


# --- the matrix: the worked matrix, and each formula as its paper or toolkit has it ------------


def test_the_fixture_by_hand():
    # bwt: ((.95-.6) + (.5-.8)) / 2 = .025, over 3 = .016667; fwt: ((.1-.2) + (.1-.15)) / 2 = -.075
    # forgetting: (max(.6,.9)-.95 + max(.1,.8)-.5) / 2 = (-.05 + .3) / 2 = .125, with the last row in
    # the max (0 + .3) / 2 = .15, first minus last -.025; intransigence (.37 + .1 + .03) / 3
    # incremental: (.6 + .85 + .766667) / 3
    table = accuracy_matrix(R, initial=INITIAL, joint=JOINT)
    by_hand = {
        "acc": 0.766667,
        "average_incremental_accuracy": 0.738889,
        "bwt": 0.025,
        "bwt_gem_code": 0.016667,
        "fwt": -0.075,
        "forgetting": 0.125,
        "forgetting_mammoth": 0.15,
        "forgetting_avalanche": -0.025,
        "intransigence": 0.166667,
    }
    for key, wanted in by_hand.items():
        assert value(table, key) == pytest.approx(wanted, abs=1e-6), key
    assert list(table["metric"][:10]) == list(MATRIX)
    assert set(table["n"][:10]) == {3} and table["lo"].isna().all()
    assert value(table, "bwt", "reason") == "one matrix of pooled scores: no interval"


def test_learning_curve_area_by_hand():
    # Z_b = .15, .35, .55: mean .35; without b = 0 it is .45
    both = [[0.6, 0.1], [0.5, 0.7]]
    assert value(accuracy_matrix(both, curves=CURVES), "lca") == pytest.approx(0.35)
    assert value(accuracy_matrix(both, curves=np.array(CURVES)[:, 1:]), "lca") == pytest.approx(
        0.45
    )


def gem(R, b):
    """Lopez-Paz & Ranzato 2017, equations 2 to 4, and what their code divides by."""
    T = len(R)
    bwt = sum(R[T - 1][i] - R[i][i] for i in range(T - 1))
    fwt = sum(R[i - 1][i] - b[i] for i in range(1, T)) / (T - 1)
    return {
        "acc": sum(R[T - 1]) / T,
        "bwt": bwt / (T - 1),
        "bwt_gem_code": bwt / T,
        "fwt": fwt,
    }


def chaudhry(R, best):
    """Forgetting at the end, and intransigence, of Riemannian walk, definitions 3 and 4."""
    T, lost = len(R), 0.0
    for j in range(T - 1):
        peak = R[0][j]
        for t in range(1, T - 1):
            peak = max(peak, R[t][j])
        lost += peak - R[T - 1][j]
    return {
        "forgetting": lost / (T - 1),
        "intransigence": sum(best[k] - R[k][k] for k in range(T)) / T,
    }


def toolkits(R):
    """Mammoth: maximum over all rows less the last; Avalanche: first less last, per old task."""
    T = len(R)
    mammoth = [max(R[t][j] for t in range(T)) - R[T - 1][j] for j in range(T - 1)]
    avalanche = [R[j][j] - R[T - 1][j] for j in range(T - 1)]
    return {
        "forgetting_mammoth": sum(mammoth) / (T - 1),
        "forgetting_avalanche": sum(avalanche) / (T - 1),
    }


def incremental(R):
    """iCaRL: mean over steps of the mean over the tasks seen."""
    T = len(R)
    return {"average_incremental_accuracy": sum(sum(R[t][: t + 1]) / (t + 1) for t in range(T)) / T}


def area(curves):
    """A-GEM: LCA_beta = 1 / (beta + 1) sum of Z_b."""
    steps = len(curves[0])
    return {"lca": sum(sum(c[b] for c in curves) / len(curves) for b in range(steps)) / steps}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_every_variant_against_its_own_formula(seed, tasks):
    rng = np.random.default_rng(seed)
    R, (b, best), curves = (
        rng.random((tasks, tasks)),
        rng.random((2, tasks)),
        rng.random((tasks, 4)),
    )
    table = accuracy_matrix(R, initial=b, joint=best, curves=curves)
    wanted = gem(R, b) | chaudhry(R, best) | toolkits(R) | incremental(R) | area(curves)
    assert set(wanted) == set(MATRIX)
    for key, each in wanted.items():
        assert value(table, key) == pytest.approx(each, abs=1e-12), key


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_a_loss_is_a_score_turned_round(seed, tasks):
    rng = np.random.default_rng(seed)
    R, (b, best), curves = (
        rng.random((tasks, tasks)),
        rng.random((2, tasks)),
        rng.random((tasks, 3)),
    )
    high = accuracy_matrix(R, initial=b, joint=best, curves=curves)
    low = accuracy_matrix(1 - R, initial=1 - b, joint=1 - best, curves=1 - curves, better="low")
    for key in MATRIX:
        one, other = value(high, key), value(low, key)
        level = key in ("acc", "average_incremental_accuracy", "lca")
        assert other == pytest.approx(1 - one if level else one, abs=1e-12), key
        assert value(low, key, "better") == (
            "lower is better" if level else value(high, key, "better")
        )
    assert low["disagrees"].tolist()[:10] == high["disagrees"].tolist()[:10]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(-0.2, 0.2))
def test_differences_do_not_know_the_level(seed, shift):
    rng = np.random.default_rng(seed)
    R, (b, best) = 0.3 + 0.4 * rng.random((4, 4)), 0.3 + 0.4 * rng.random((2, 4))
    one = accuracy_matrix(R, initial=b, joint=best)
    other = accuracy_matrix(R + shift, initial=b + shift, joint=best + shift)
    for key in (*BACKWARD, "fwt", "intransigence"):
        assert value(one, key) == pytest.approx(value(other, key), abs=1e-12), key


def test_who_contradicts_whom():
    table = accuracy_matrix(R)
    lost, gained = (
        ("forgetting", "forgetting_mammoth"),
        ("bwt", "bwt_gem_code", "forgetting_avalanche"),
    )
    for key in lost:
        assert value(table, key, "disagrees") == ", ".join(gained)
    for key in gained:
        assert value(table, key, "disagrees") == ", ".join(lost)
    assert value(table, "acc", "disagrees") == "" == value(table, "fwt", "disagrees")
    plain = accuracy_matrix([[0.9, 0.1], [0.4, 0.8]])  # lost, whoever is asked
    assert set(plain["disagrees"]) == {""}


def test_a_constant_matrix_has_no_forgetting_and_no_badge():
    table = accuracy_matrix(np.tile([0.3, 0.7, 0.1], (3, 1)), initial=[0.3, 0.7, 0.1])
    for key in (*BACKWARD, "fwt"):
        assert value(table, key) == 0
    assert set(table["disagrees"]) == {""}
    assert (cells(table)["change"] == 0).all()


def test_rounding_is_no_disagreement():
    # .1 + .2 is above .3 in the last bit: bwt is 3e-17, forgetting (.9 - .3) / 2
    table = accuracy_matrix([[0.3, 0.1, 0.1], [0.9, 0.5, 0.1], [0.1 + 0.2, 0.5, 0.4]])
    assert value(table, "bwt") > 0 and value(table, "forgetting") == pytest.approx(0.3)
    assert set(table["disagrees"]) == {""}


def test_a_frame_keeps_its_names_and_its_cells():
    frame = pd.DataFrame(R, columns=["law", "psalms", "letters"])
    table = accuracy_matrix(frame, initial=INITIAL, joint=JOINT)
    grid = cells(table).pivot(index="presentation", columns="task", values="value")
    np.testing.assert_allclose(grid[["law", "psalms", "letters"]], [INITIAL, *R, JOINT])
    change = cells(table).set_index(["presentation", "task"])["change"]
    assert change[3, "psalms"] == pytest.approx(-0.3) and change[2, "law"] == pytest.approx(0.3)
    assert change[0, "law"] == pytest.approx(-0.5) and change[4, "letters"] == pytest.approx(0.03)
    assert list(cells(table)["current"].unique()) == ["", "law", "psalms", "letters", "jointly"]
    turned = cells(accuracy_matrix(1 - frame, better="low")).set_index(["presentation", "task"])
    assert turned["change"][3, "psalms"] == pytest.approx(-0.3)


def test_one_task_has_no_past():
    table = accuracy_matrix([[0.4]], initial=[0.1], joint=[0.5])
    for key in (*BACKWARD, "fwt"):
        assert np.isnan(value(table, key))
        assert value(table, key, "reason") == "one task: nothing came before or after it"
    assert value(table, "acc") == 0.4 == value(table, "average_incremental_accuracy")
    assert value(table, "intransigence") == pytest.approx(0.1)


def test_what_was_not_given_is_nan_with_its_reason():
    table = accuracy_matrix(R)
    reasons = {
        "fwt": "no `initial`: the score of each task as the stream begins",
        "intransigence": "no `joint`: the score of each task when all are trained together",
        "lca": "no `curves`: the score of each task after 0, 1, 2, ... updates of its own",
    }
    for key, reason in reasons.items():
        assert np.isnan(value(table, key)) and value(table, key, "reason") == reason


def test_cells_above_the_diagonal_may_be_missing():
    lower = np.where(np.tril(np.ones((3, 3), dtype=bool)), R, np.nan)
    table = accuracy_matrix(lower, initial=INITIAL)
    assert value(table, "fwt", "reason") == "the cells above the diagonal are missing"
    for key in (*BACKWARD, "acc", "average_incremental_accuracy"):
        assert value(table, key) == pytest.approx(value(accuracy_matrix(R), key)), key
    assert len(cells(table)) == 9  # six of R, three before


def test_several_runs_give_students_interval():
    # bwt of the runs: .4-.6 = -.2, .5-.6 = -.1, .3-.6 = -.3: mean -.2, sd .1, se .057735,
    # t(2) = 4.302653: half-width .248414
    runs = [[[0.6, 0.1], [x, 0.8]] for x in (0.4, 0.5, 0.3)]
    table = accuracy_matrix(runs)
    assert value(table, "bwt") == pytest.approx(-0.2)
    assert value(table, "bwt", "lo") == pytest.approx(-0.448414, abs=1e-6)
    assert value(table, "bwt", "hi") == pytest.approx(0.048414, abs=1e-6)
    assert value(table, "bwt", "n") == 3
    assert table.attrs["interval"] == "Student's t over runs"
    assert cells(table).set_index(["presentation", "task"])["value"][2, "task 1"] == pytest.approx(
        0.4
    )


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"R": [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]},
            "accuracy_matrix: R is 3 x 2; it needs a row for each task trained and a column for "
            "each task, T x T, or runs x T x T",
        ),
        (
            {"R": [[0.1, 0.2], [0.3]]},
            "accuracy_matrix: R holds something that is no number, or rows of unlike length; give "
            "scores alone",
        ),
        (
            {"R": [[0.1, np.nan], [np.nan, 0.4]]},
            "accuracy_matrix: no score of 'task 1' after training 'task 2'; every task must be "
            "scored after its own training and after all that follow",
        ),
        (
            {"R": [[91, 5], [80, 70]]},
            "accuracy_matrix: R holds 91; give shares in 0 to 1 (95 % is .95), or say "
            'better="low" for losses',
        ),
        (
            {"R": [[-1.0, -2], [-3, -4]], "better": "low"},
            "accuracy_matrix: R holds -1; losses and perplexities are not negative; turn "
            "log-probabilities round",
        ),
        (
            {"R": R, "initial": [0.1, 0.2]},
            "accuracy_matrix: initial has the shape (2,); it needs one score for each of 3 tasks",
        ),
        (
            {"R": R, "joint": [0.1, 0.2, 1.5]},
            "accuracy_matrix: joint holds 1.5; give shares in 0 to 1 (95 % is .95), or say "
            'better="low" for losses',
        ),
        (
            {"R": R, "initial": [0.1, np.nan, 0.2]},
            "accuracy_matrix: initial holds nan; give shares in 0 to 1 (95 % is .95), or say "
            'better="low" for losses',
        ),
        (
            {"R": R, "curves": [[0.1, 0.2]]},
            "accuracy_matrix: curves is 1 x 2; it needs a row for each of 3 tasks, and a column "
            "for each update from 0",
        ),
        ({"R": R, "better": "big"}, "accuracy_matrix: better is 'big'; say high or low"),
        (
            {"R": pd.DataFrame([[0.1, 0.2], [0.3, 0.4]], columns=["a", "b"], index=["b", "a"])},
            "accuracy_matrix: the rows say b, a, the columns a, b; put both in the order of training",
        ),
        (
            {"R": pd.DataFrame([[0.1, 0.2], [0.3, 0.4]], columns=["a", "a"])},
            "accuracy_matrix: task 'a' has several columns; names are unique",
        ),
    ],
)
def test_matrices_that_are_refused(given, message):
    with refuses(message):
        accuracy_matrix(**given)


def test_a_matrix_from_a_file(tmp_path):
    file = tmp_path / "matrix.csv"
    file.write_text("after,law,psalms\ninitial,.1,.2\nlaw,.6,.1\npsalms,.5,.8\njoint,.7,.9\n")
    read = load_matrix(file)
    table = accuracy_matrix(**read)
    assert value(table, "bwt") == pytest.approx(-0.1) and value(table, "fwt") == pytest.approx(-0.1)
    assert value(table, "intransigence") == pytest.approx(0.1)
    file.write_text("law,psalms\n.6,\n.5,.8\n")
    read = load_matrix(file)
    assert read["initial"] is None and list(read["R"].columns) == ["law", "psalms"]
    assert value(accuracy_matrix(**read), "bwt") == pytest.approx(-0.1)


def test_files_that_are_no_matrix(tmp_path):
    file = tmp_path / "matrix.csv"
    with refuses(f"load_matrix: no file at {file}; give a CSV with a column a task"):
        load_matrix(file)
    file.write_text("after,law\n")
    with refuses(f"load_matrix: {file} holds no rows under its head line"):
        load_matrix(file)
    file.write_text("after,law,psalms\nlaw,.3,good\n")
    with refuses(f"load_matrix: column 'psalms' of {file} holds words; give scores"):
        load_matrix(file)
    file.write_text("")
    with refuses(f"load_matrix: cannot read {file}: No columns to parse from file"):
        load_matrix(file)


# --- tables of a stream ---------------------------------------------------------------------------


def asked(scores, *, metric="top1", run="m", **place):
    """Rows of one asking: ``{task: [score of each item]}``."""
    made = [
        rows(metric, each, run=run, step=place["step"], item=[f"{task}{i}" for i in range(len(each))],
             beside={"task": task, "presentation": place["presentation"], "lag": place.get("lag", 0),
                     "current": place.get("current", ""), "phase": place["phase"]})
        for task, each in scores.items()
    ]  # fmt: skip
    return pd.concat(made)


def stream(metric="top1", run="m", turn=lambda x: x):
    """Two tasks of two items each; R = [[.75, .1], [.25, .8]], b = (.5, .3), joint (.9, .85)."""
    told = [
        ({"a": [0.4, 0.6], "b": [0.2, 0.4]}, dict(phase="before", presentation=0, step=0)),
        ({"a": [0.5, 0.7]}, dict(phase="during", presentation=1, step=1, lag=1, current="a")),
        ({"a": [0.7, 0.8], "b": [0.1, 0.1]}, dict(phase="after", presentation=1, step=2, lag=2, current="a")),
        ({"a": [0.1, 0.2], "b": [0.5, 0.7]}, dict(phase="during", presentation=2, step=3, lag=1, current="b")),
        ({"a": [0.2, 0.3], "b": [0.7, 0.9]}, dict(phase="after", presentation=2, step=4, lag=2, current="b")),
        ({"a": [0.9, 0.9], "b": [0.8, 0.9]}, dict(phase="joint", presentation=0, step=4, lag=4)),
        ({"a": [0.7, 0.8]}, dict(phase="alone", presentation=1, step=2, lag=2, current="a")),
        ({"b": [0.9, 0.95]}, dict(phase="alone", presentation=2, step=2, lag=2, current="b")),
    ]  # fmt: skip
    turned = [({t: [turn(x) for x in each] for t, each in s.items()}, p) for s, p in told]
    return pd.concat([asked(s, metric=metric, run=run, **p) for s, p in turned])


def test_a_table_gives_what_its_means_give():
    # curves of one's own: a .5, .6; b .1, .6: b = 0 is the score just before the task began
    table = accuracy_matrix(stream(), draws=50)
    by_hand = accuracy_matrix(
        [[0.75, 0.1], [0.25, 0.8]],
        initial=[0.5, 0.3],
        joint=[0.9, 0.85],
        curves=[[0.5, 0.6], [0.1, 0.6]],
    )
    for key in MATRIX:
        assert value(table, key) == pytest.approx(value(by_hand, key), abs=1e-12), key
        assert value(table, key, "lo") <= value(table, key) <= value(table, key, "hi")
        assert value(table, key, "n") == 4 and value(table, key, "reason") == ""
    merged = cells(table).merge(cells(by_hand).assign(task=lambda t: t["task"].astype(str).map({"task 1": "a", "task 2": "b"})), on=["presentation", "task"])  # fmt: skip
    assert len(merged) == 8
    np.testing.assert_allclose(merged["value_x"], merged["value_y"])
    assert set(cells(table)["metric"]) == {"top1"} and set(cells(table)["n"]) == {2}


def test_a_table_of_losses_is_turned_once():
    low = accuracy_matrix(stream("loss", turn=lambda x: 1 - x), draws=50)
    high = accuracy_matrix(stream(), draws=50)
    for key in (*BACKWARD, "fwt", "intransigence"):
        assert value(low, key) == pytest.approx(value(high, key), abs=1e-12)
        assert value(low, key, "lo") == pytest.approx(value(high, key, "lo"), abs=1e-9)
    assert value(low, "acc") == pytest.approx(1 - value(high, "acc"))
    assert value(low, "acc", "better") == "lower is better"


def test_the_bootstrap_draws_items_within_tasks_and_keeps_them_paired():
    # every item of a falls by .5, whatever its level: bwt has no spread though a's scores have
    table = stream()
    levels = {"a0": 0.55, "a1": 0.95}
    is_r = (table["task"] == "a") & (table["phase"] == "after")
    drop = np.where(table["presentation"] == 2, 0.5, 0.0)
    table["value"] = np.where(is_r, table["item"].map(levels).fillna(0) - drop, table["value"])
    got = accuracy_matrix(table, draws=200)
    assert value(got, "bwt") == pytest.approx(-0.5)
    assert value(got, "bwt", "lo") == pytest.approx(-0.5) == value(got, "bwt", "hi")
    # acc = (mean a + mean b) / 2 over four draws each: from (.05 + .7) / 2 to (.45 + .9) / 2
    assert value(got, "acc", "lo") == pytest.approx(0.375)
    assert value(got, "acc", "hi") == pytest.approx(0.675)


def test_tasks_are_drawn_independently():
    # Three tasks of two items, 0 and 1, that never change: acc is the mean of six fair draws. All
    # of them 0 has odds of 1 in 64, one of six or none 7 in 64, so 2.5 % lie at 1/6; had the tasks
    # the same draws, all would be 0 once in four
    scores = {name: [0.0, 1.0] for name in "abc"}
    parts = [
        asked(scores, phase="after", presentation=at, step=at, current=name)
        for at, name in enumerate("abc", 1)
    ]
    got = accuracy_matrix(pd.concat(parts), draws=4000)
    assert value(got, "acc", "lo") == pytest.approx(1 / 6)
    assert value(got, "acc", "hi") == pytest.approx(5 / 6)


def test_a_task_of_one_item_has_no_interval():
    table = stream()
    table = table[table["item"] != "a1"]
    got = accuracy_matrix(table, draws=20)
    assert value(got, "bwt") == pytest.approx(0.2 - 0.7) and np.isnan(value(got, "bwt", "lo"))
    assert value(got, "bwt", "reason") == "a task of one item: no interval"
    lost = plasticity(table, draws=20).query("task == 'a' and metric == 'plasticity_loss'")
    assert lost["value"].item() == 0 and np.isnan(lost["lo"].item())


def test_verdicts_get_wilsons_interval():
    verdicts = stream("extractable", turn=lambda x: float(x > 0.55))
    got = cells(accuracy_matrix(verdicts, draws=50)).set_index(["presentation", "task"])
    lo, hi = wilson_interval(np.array([1.0]), np.array([2]), 0.95)
    assert got["lo"][1, "a"] == pytest.approx(lo[0]) and got["hi"][1, "a"] == hi[0] == 1
    assert got["n"][1, "a"] == 2


def test_perplexities_are_pooled_as_losses():
    losses = stream("loss")
    perplexities = losses.assign(metric="perplexity", value=np.exp(losses["value"]))
    got = accuracy_matrix(perplexities, draws=50)
    means = np.exp([[0.75, 0.1], [0.25, 0.8]])
    wanted = accuracy_matrix(means, better="low")
    for key in ("acc", "bwt", "forgetting"):
        assert value(got, key) == pytest.approx(value(wanted, key))


def test_two_runs_in_a_table():
    two = pd.concat([stream(), stream(run="other", turn=lambda x: x / 2)])
    got = accuracy_matrix(two)
    # bwt -.5 and -.25: mean -.375, se .125, t(1) = 12.7062
    assert value(got, "bwt") == pytest.approx(-0.375) and value(got, "bwt", "n") == 2
    assert value(got, "bwt", "hi") == pytest.approx(-0.375 + 0.125 * scipy_stats.t.ppf(0.975, 1))
    assert set(got["run"]) == {"all"}
    one = cells(got).set_index(["presentation", "task"]).loc[(1, "a")]
    assert one["value"] == pytest.approx(0.5625) and one["n"] == 2  # .75 and .375


def test_curves_end_at_the_first_gap():
    # b is asked at lags 1 and 3, a at 1, 2, 3: only lag 1 is common without a gap
    more = [
        asked({"a": [0.0, 0.0]}, phase="during", presentation=1, step=11, lag=lag, current="a")
        for lag in (2, 3)
    ]
    more += [asked({"b": [0.0, 0.0]}, phase="during", presentation=2, step=12, lag=3, current="b")]
    got = accuracy_matrix(pd.concat([stream(), *more]), draws=5)
    assert value(got, "lca") == pytest.approx((0.5 + 0.6 + 0.1 + 0.6) / 4)


def test_tables_that_are_refused():
    table = stream()
    with refuses(
        "accuracy_matrix: the table of a stream brings initial, joint, curves and better with it; "
        "give the table alone"
    ):
        accuracy_matrix(table, initial=[0.1, 0.2])
    with refuses("accuracy_matrix: no column 'task'; train_stream gives such a table"):
        accuracy_matrix(
            table.drop(columns="task").drop_duplicates(["item", "step", "phase", "lag"])
        )
    twice = table[table["phase"] == "after"].query("presentation == 1")
    again = pd.concat([table, twice.assign(presentation=3, step=6)])
    with refuses(
        "accuracy_matrix: task 'a' comes again as presentation 3; select the rows with "
        "presentation <= 2, or ask knowledge_accumulation"
    ):
        accuracy_matrix(again)
    with refuses(
        "accuracy_matrix: rows of phase 'after' are there for presentations 2; all from 1 on are needed"
    ):
        accuracy_matrix(table[~((table["phase"] == "after") & (table["presentation"] == 1))])
    with refuses(
        "accuracy_matrix: task 'a' is not scored on the same items after its own training and "
        "after all that follow; train_stream does"
    ):
        accuracy_matrix(table[(table["item"] != "a1") | (table["step"] != 4)])
    with refuses(
        "accuracy_matrix: task 'a' is not scored on the same items after its own training and "
        "after all that follow; train_stream does"
    ):
        own = (table["task"] == "a") & (table["phase"] == "after") & (table["presentation"] == 1)
        accuracy_matrix(table[~own])
    with refuses("accuracy_matrix: the top1 of item a0 is missing at step 0"):
        accuracy_matrix(table.assign(value=[np.nan, *table["value"][1:]]))
    with refuses("accuracy_matrix: neither direction of outcome is better; choose another metric"):
        accuracy_matrix(table.assign(metric="outcome"))
    with refuses("stability_gap: the mean of perplexities is no perplexity; give rows of loss"):
        stability_gap(table.assign(metric="perplexity", value=2.0))


# --- the stability gap ----------------------------------------------------------------------------


def test_windows_by_hand():
    # by hand: curve .90,.60,.75,.85: WF^2 .30, WP^2 .15, WP^3 .25; [.5,.2,.9]: WP^3 .70
    curve = np.array([0.9, 0.6, 0.75, 0.85])
    assert windowed_change(curve, 2) == (pytest.approx(0.3), pytest.approx(0.15))
    assert windowed_change(curve, 3)[1] == pytest.approx(0.25)
    assert windowed_change(np.array([0.5, 0.2, 0.9]), 3)[1] == pytest.approx(0.7)
    # a rise only: no drop, whatever the window; longer than the curve is the whole curve
    assert windowed_change(np.array([0.1, 0.2, 0.4]), 9) == (0, pytest.approx(0.3))
    assert windowed_change(np.array([0.3]), 2) == (0, 0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(2, 6))
def test_windows_against_a_double_loop(curve, window):
    drop = gain = 0.0
    for start in range(len(curve)):
        inside = curve[start : start + window]
        for at, first in enumerate(inside):
            for later in inside[at + 1 :]:
                drop, gain = max(drop, first - later), max(gain, later - first)
    assert windowed_change(np.array(curve), window) == (pytest.approx(drop), pytest.approx(gain))


def gapped(turn=lambda x: x, metric="top1", items=2):
    """The worked old task: .90 at the boundary, then .60, .75, .85; the new one ends at .80."""

    def each(x):
        return [turn(x)] * items

    old, new = {5: 0.6, 6: 0.75, 9: 0.85}, {5: 0.3, 6: 0.7, 9: 0.8}
    parts = [
        asked({"a": each(0.2), "b": each(0.1)}, phase="before", presentation=0, step=0, metric=metric),
        asked({"a": each(0.9), "b": each(0.1)}, phase="after", presentation=1, step=4, current="a", metric=metric),
    ]  # fmt: skip
    parts += [
        asked({"a": each(old[at]), "b": each(new[at])}, phase="after" if at == 9 else "during",
              presentation=2, step=at, lag=at - 4, current="b", metric=metric)
        for at in (5, 6, 9)
    ]  # fmt: skip
    return pd.concat(parts)


def test_the_gap_by_hand():
    table = stability_gap(gapped(), windows=(2, 3), draws=20)
    assert value(table, "min_acc") == pytest.approx(0.6)
    assert value(table, "wc_acc") == pytest.approx(0.7)  # .8 / 2 + .6 / 2
    wide = table[table["window"].notna()].set_index(["metric", "window"])
    # a: .2, .9, .6, .75, .85 -> WF^2 .3, WP^2 .7; b from its own start: .1, .3, .7, .8 -> 0, .4
    assert wide["value"]["wf", 2] == pytest.approx(0.15)
    assert wide["value"]["wp", 2] == pytest.approx(0.55)
    assert wide["value"]["wp", 3] == pytest.approx((0.7 + 0.6) / 2)
    # updates 0, 4, 5, 6, 9: two in a row span 4 at most, three 5; all items agree, so no interval
    assert wide["window_updates"]["wf", 2] == 4 and wide["window_updates"]["wf", 3] == 5
    assert (wide["lo"] == wide["hi"]).all() and set(wide["n"]) == {4}


def test_the_floor_by_hand():
    # b stands still. a's two items go .2, .9, .6, .75, .85 together: with signs by chance their
    # mean does so too (1 in 4), stays flat (1 in 2) or is turned round (1 in 4), so WF^2 of a is
    # .3, 0 or .7: mean .25, over two tasks .125, standard error of 4,000 draws .0022
    table = gapped()
    table["value"] = np.where(table["task"] == "b", 0.5, table["value"])
    got = stability_gap(table, windows=(2,), draws=4000).query("metric == 'wf'").iloc[0]
    assert got["floor"] == pytest.approx(0.125, abs=0.01)
    assert got["floor_lo"] == 0 and got["floor_hi"] == pytest.approx(0.35)
    # items that go opposite ways: the mean is flat, and the floor says what that hides
    odd = (table["item"] == "a1") & (table["task"] == "a")
    table["value"] = np.where(odd, 1 - table["value"], table["value"])
    got = stability_gap(table, windows=(2,), draws=200).query("metric == 'wf'").iloc[0]
    assert got["value"] == pytest.approx(0) and got["floor_hi"] == pytest.approx(0.35)


def test_the_boundary_itself_is_not_since():
    # a never falls: the least since its task ended is .95, not the .90 at its end
    table = gapped()
    up = (table["task"] == "a") & (table["step"] > 4)
    table["value"] = np.where(up, 0.95, table["value"])
    assert value(stability_gap(table, draws=5), "min_acc") == pytest.approx(0.95)


def test_three_tasks_by_hand():
    # since their ends a is least at .5 and b at .4: min-ACC .45; c ends at .3: .3 / 3 + 2 / 3 * .45
    told = [
        ({"a": 0.9, "b": 0.1, "c": 0.1}, dict(phase="after", presentation=1, step=2, current="a")),
        ({"a": 0.5, "b": 0.3}, dict(phase="during", presentation=2, step=3, lag=1, current="b")),
        ({"a": 0.8, "b": 0.7, "c": 0.1}, dict(phase="after", presentation=2, step=4, current="b")),
        ({"a": 0.7, "b": 0.4, "c": 0.2}, dict(phase="during", presentation=3, step=5, lag=1, current="c")),
        ({"a": 0.6, "b": 0.5, "c": 0.3}, dict(phase="after", presentation=3, step=6, current="c")),
    ]  # fmt: skip
    start = asked({name: [0.1, 0.1] for name in "abc"}, phase="before", presentation=0, step=0)
    parts = [asked({t: [x, x] for t, x in s.items()}, **place) for s, place in told]
    got = stability_gap(pd.concat([start, *parts]), draws=5).set_index(["metric", "presentation"])
    assert got["value"]["min_acc", 2] == pytest.approx(0.5)
    assert got["value"]["wc_acc", 2] == pytest.approx(0.6)
    assert got["value"]["min_acc", 3] == pytest.approx(0.45)
    assert got["value"]["wc_acc", 3] == pytest.approx(0.4)
    assert got["step"]["wc_acc", 3] == 6 and got["current"]["wc_acc", 2] == "b"


def test_a_gap_in_losses():
    low = stability_gap(gapped(lambda x: 1 - x, "loss"), windows=(2,), draws=5)
    assert value(low, "min_acc") == pytest.approx(0.4) and value(low, "wc_acc") == pytest.approx(
        0.3
    )
    assert value(low, "wf") == pytest.approx(0.15) and value(low, "wp") == pytest.approx(0.55)
    assert value(low, "min_acc", "better") == "lower is better" == value(low, "wf", "better")


def test_traces_carry_their_bands():
    verdicts = gapped(lambda x: float(x > 0.5), "extractable", items=10)
    table = stability_gap(verdicts, windows=(2,), draws=5)
    trace = table[table["phase"].notna() & (table["task"] == "a")].set_index("step")
    lo, hi = wilson_interval(np.array([1.0]), np.array([10]), 0.95)
    assert (
        trace["value"][5] == 1
        and trace["lo"][5] == pytest.approx(lo[0])
        and trace["hi"][5] == hi[0]
    )
    # shares of tokens: the normal band of the mean, 1.96 sd / sqrt(n); .5, .7 -> sd .141421
    table = gapped()
    table.loc[(table["task"] == "a") & (table["step"] == 5), "value"] = [0.5, 0.7]
    trace = stability_gap(table, draws=5)
    trace = trace[trace["phase"].notna() & (trace["task"] == "a")].set_index("step")
    assert trace["value"][5] == pytest.approx(0.6)
    assert trace["hi"][5] - 0.6 == pytest.approx(1.959964 * 0.141421 / np.sqrt(2), abs=1e-5)


def test_noise_alone_stays_inside_its_floor():
    # Fresh verdicts at chance .5 at each asking: WF^2 and WP^2 of pure noise. 12 streams; a value
    # falls outside the 95 % zone with odds of 1 in 20, four of twelve with 1 in 400
    outside = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        table = gapped(metric="extractable", items=20)
        table["value"] = rng.integers(0, 2, len(table)).astype(float)
        got = (
            stability_gap(table, windows=(2,), draws=200, seed=seed).query("metric == 'wf'").iloc[0]
        )
        outside += not got["floor_lo"] <= got["value"] <= got["floor_hi"]
        assert 0 < got["floor_lo"] < got["floor"] < got["floor_hi"]
    assert outside < 4


def test_gaps_that_are_refused():
    table = gapped()
    with refuses("stability_gap: a window of 1 evaluations holds no change; give 2 or more"):
        stability_gap(table, windows=(1,))
    with refuses(
        "stability_gap: no rows of phase 'during'; train_stream(..., lags=(1, 2, 3, 5)) asks in "
        "between"
    ):
        stability_gap(table[table["phase"] != "during"])
    with refuses("stability_gap: one task; a gap needs an old task and a new one"):
        stability_gap(table[table["presentation"] < 2])
    with refuses("stability_gap: several runs; select one"):
        stability_gap(pd.concat([table, table.assign(run="other")]))
    with refuses(
        "stability_gap: task 'a' is not scored on the same items each time; train_stream does"
    ):
        stability_gap(table[(table["item"] != "a1") | (table["step"] != 5)])


# --- tasks that recur -----------------------------------------------------------------------------


def recurring(turn=lambda x: x, metric="top1", again=0.7, last=0.9):
    """a, b, a: a is learned .2 -> .6 (at .56 after 3 of 4 updates), falls to .3, relearned."""
    curve = {1: {1: 0.3, 3: 0.57}, 3: {1: 0.58, 3: again}}
    told = [({"a": 0.2, "b": 0.1}, dict(phase="before", presentation=0, step=0))]
    ends = {1: {"a": 0.6, "b": 0.1}, 2: {"a": 0.3, "b": 0.5}, 3: {"a": last, "b": 0.4}}
    for at, current in ((1, "a"), (2, "b"), (3, "a")):
        place = dict(presentation=at, current=current)
        for lag in (1, 3):
            score = {"a": curve[at][lag]} if current == "a" else {"a": 0.4, "b": 0.3}
            step = 4 * (at - 1) + lag
            told.append((score, dict(phase="during", step=step, lag=lag, **place)))
        told.append((ends[at], dict(phase="after", step=4 * at, lag=4, **place)))
    return pd.concat(
        asked({t: [turn(x)] * 2 for t, x in s.items()}, metric=metric, **p) for s, p in told
    )


def of_task(table, key, task="a"):
    found = table[(table["metric"] == key) & (table["task"] == task)]
    assert len(found) == 1
    return found.iloc[0]


def test_recurrence_by_hand():
    # E_1 = .6, B_2 = .3, E_2 = .9. Goal .2 + .9 * .4 = .56: first met at update 3, then at 1
    table = knowledge_accumulation(recurring(), draws=20)
    assert of_task(table, "forgotten_between")["value"] == pytest.approx(0.3)
    assert of_task(table, "accumulation")["value"] == pytest.approx(0.3)
    assert of_task(table, "savings")["value"] == pytest.approx(2 / 3)
    for key in ("forgotten_between", "accumulation", "savings"):
        both = of_task(table, key, "all")  # a alone recurs, so it is the mean
        assert both["value"] == pytest.approx(of_task(table, key)["value"]) and both["n"] == 2
        assert both["lo"] == pytest.approx(both["value"]) == both["hi"]
    levels = table[table["metric"] == "top1"].set_index(["task", "recurrence", "phase"])["value"]
    wanted = {("a", 1, "before"): 0.2, ("a", 1, "after"): 0.6, ("a", 2, "before"): 0.3}
    wanted |= {("a", 2, "after"): 0.9, ("b", 1, "before"): 0.1, ("b", 1, "after"): 0.5}
    assert levels.to_dict() == pytest.approx(wanted)


def test_recurrence_in_losses_and_at_other_criteria():
    low = knowledge_accumulation(recurring(lambda x: 1 - x, "loss"), draws=5)
    for key, wanted in (("forgotten_between", 0.3), ("accumulation", 0.3), ("savings", 2 / 3)):
        assert of_task(low, key)["value"] == pytest.approx(wanted)
    # goal .6 is met at the end of the first (4), and at 3 of the second
    strict = knowledge_accumulation(recurring(), criterion=1.0, draws=5)
    assert of_task(strict, "savings")["value"] == pytest.approx(1 - 3 / 4)
    # goal .2 + .25 * .4 = .3 is met at 1 the first time, and just before the second begins
    easy = knowledge_accumulation(recurring(), criterion=0.25, draws=5)
    assert of_task(easy, "savings")["value"] == 1


def test_the_third_time_is_compared_with_the_second():
    # a falls from .9 to .5 and comes back to .95: lost .4 since the second time, .35 above the first
    more = [
        asked({"a": [0.5] * 2, "b": [0.6] * 2}, phase="after", presentation=4, step=16, lag=4, current="b"),
        asked({"a": [0.58] * 2}, phase="during", presentation=5, step=17, lag=1, current="a"),
        asked({"a": [0.95] * 2, "b": [0.4] * 2}, phase="after", presentation=5, step=20, lag=4, current="a"),
    ]  # fmt: skip
    table = knowledge_accumulation(pd.concat([recurring(), *more]), draws=5)
    third = table[(table["recurrence"] == 3) & (table["task"] == "a")].set_index("metric")["value"]
    assert third["forgotten_between"] == pytest.approx(0.4)
    assert third["accumulation"] == pytest.approx(0.35)
    assert third["savings"] == pytest.approx(2 / 3)
    # b came twice: .5, then .4 just before, .6 after; both tasks are in the mean of the second
    both = table[(table["recurrence"] == 2) & (table["task"] == "all")].set_index("metric")["value"]
    assert both["forgotten_between"] == pytest.approx((0.3 + 0.1) / 2)
    assert both["accumulation"] == pytest.approx((0.3 + 0.1) / 2)


def test_savings_without_an_answer():
    table = recurring(again=0.5, last=0.5)
    table["value"] = np.where((table["presentation"] == 3) & (table["phase"] == "during"), 0.4, table["value"])  # fmt: skip
    row = of_task(knowledge_accumulation(table, draws=5), "savings")
    assert np.isnan(row["value"]) and row["reason"] == "not learned again within the presentation"
    both = of_task(knowledge_accumulation(table, draws=5), "savings", "all")
    assert both["reason"] == "a: not learned again within the presentation"
    flat = recurring()
    flat["value"] = np.where(flat["presentation"] < 2, 0.2, flat["value"])
    row = of_task(knowledge_accumulation(flat, draws=5), "savings")
    assert np.isnan(row["value"]) and row["reason"] == "the first presentation taught nothing"


def test_recurrences_that_are_refused():
    with refuses(
        "knowledge_accumulation: no task comes twice; train_stream takes the order, such as "
        "order=[*tasks, *tasks]"
    ):
        knowledge_accumulation(stream())
    with refuses("knowledge_accumulation: criterion is 0, it must lie above 0, up to 1"):
        knowledge_accumulation(recurring(), criterion=0)
    with refuses("knowledge_accumulation: several runs; select one"):
        knowledge_accumulation(pd.concat([recurring(), recurring().assign(run="other")]))


# --- loss of plasticity ---------------------------------------------------------------------------


def test_plasticity_by_hand():
    # a alone is a in the stream; b: .925 alone, .8 in the stream, item by item .2 and .05
    table = plasticity(stream(), draws=100)
    lost = table[table["metric"] == "plasticity_loss"].set_index("presentation")
    assert lost["value"][1] == 0 and lost["value"][2] == pytest.approx(0.125)
    assert lost["lo"][2] == pytest.approx(0.05) and lost["hi"][2] == pytest.approx(0.2)
    assert np.isnan(value(table, "plasticity_trend"))
    assert value(table, "plasticity_trend", "reason") == "fewer than three tasks: no trend"
    low = plasticity(stream("loss", turn=lambda x: 1 - x), draws=20)
    assert low[low["metric"] == "plasticity_loss"]["value"].tolist() == pytest.approx([0, 0.125])


def test_the_trend_is_the_least_squares_slope():
    lost = [0.0, 0.3, 0.1, 0.4]
    parts = []
    for at, (name, gap) in enumerate(zip("abcd", lost, strict=True), 1):
        place = dict(presentation=at, step=at, current=name)
        scores = {other: [0.5, 0.5] for other in "abcd"}
        parts.append(asked(scores, phase="after", **place))
        parts.append(asked({name: [0.5 + gap] * 2}, phase="alone", **place))
    table = plasticity(pd.concat(parts), draws=10)
    wanted = np.polyfit([1, 2, 3, 4], lost, 1)[0]
    assert value(table, "plasticity_trend") == pytest.approx(wanted)
    assert value(table, "plasticity_trend", "hi") == pytest.approx(wanted)
    assert value(table, "plasticity_trend", "n") == 8


def test_plasticity_needs_the_copies_alone():
    table = stream()
    with refuses(
        "plasticity: task 'a' was not learned alone on the same items; train_stream(..., "
        "alone=True) does that"
    ):
        plasticity(table[table["phase"] != "alone"])


# --- figures --------------------------------------------------------------------------------------


def test_the_heat_map_writes_every_score_and_colours_what_was_learned():
    figure = plot_accuracy_matrix(accuracy_matrix(R, initial=INITIAL, joint=JOINT))
    heat = figure.data[0]
    assert list(heat.y) == [
        "before any",
        "after task 1",
        "after task 2",
        "after task 3",
        "all together",
    ]
    assert heat.text[3] == ["0.950", "0.500", "0.850"] and heat.text[0] == [
        "0.100",
        "0.200",
        "0.150",
    ]
    assert heat.z[0] == [None] * 3 and heat.z[1] == [0, None, None]
    assert heat.z[3] == [0.35, -0.3, 0] and heat.z[4] == [0.37, 0.1, 0.03]
    assert heat.zmax == -heat.zmin == pytest.approx(0.37)
    framed = [(s.x0 + 0.5, s.y0 + 0.5) for s in figure.layout.shapes]
    assert framed == [(0, 1), (1, 2), (2, 3)]
    assert "share, higher is better" in figure.layout.title.text


def test_the_summaries_are_badged():
    figure = plot_matrix_measures(accuracy_matrix(R))
    points = {t.y[0]: t for t in figure.data if t.mode == "markers" and t.y}
    lost = points["forgetting (from the best)"].marker
    gained = points["forgetting (first minus last)"].marker
    assert lost.color == "#D55E00" and gained.color == "#0072B2" and lost.line.width == 3
    notes = [t.text[0].strip() for t in figure.data if t.mode == "text"]
    assert "≠ forgetting, forgetting_mammoth" in notes and "≠ bwt, bwt_gem_code" in notes
    assert "undefined: no `initial`: the score of each task as the stream begins" in notes
    assert points["backward transfer"].x[0] == 0.025
    plain = plot_matrix_measures(accuracy_matrix([[0.9, 0.1], [0.4, 0.8]]))
    assert not any(t.marker.line.width for t in plain.data if t.mode == "markers" and t.y)


def test_traces_and_boundaries():
    figure = plot_stability_gap(stability_gap(gapped(), draws=5))
    lines = {t.name: t for t in figure.data if t.mode == "lines+markers"}
    assert list(lines["a"].x) == [0, 4, 5, 6, 9] and list(lines["b"].y) == [0.1, 0.1, 0.3, 0.7, 0.8]
    assert [shape.x0 for shape in figure.layout.shapes] == [0, 4]
    assert [note.text for note in figure.layout.annotations] == ["learning a", "learning b"]
    low = plot_stability_gap(stability_gap(gapped(lambda x: 1 - x, "loss"), draws=5))
    assert (
        low.layout.yaxis.autorange == "reversed"
        and METRICS["loss"].label in low.layout.yaxis.title.text
    )


def test_plasticity_is_drawn_beside_its_difference():
    figure = plot_plasticity(plasticity(stream(), draws=5))
    alone, late, lost = figure.data
    assert (
        list(alone.y) == [0.75, 0.925]
        and list(late.y) == [0.75, 0.8]
        and list(lost.y) == [0, 0.125]
    )
    assert list(figure.layout.xaxis.ticktext) == ["1: a", "2: b"]


def test_figures_that_are_refused():
    table = accuracy_matrix(R)
    with refuses("plot_accuracy_matrix: no cells; give what accuracy_matrix returns"):
        plot_accuracy_matrix(table[table["change"].isna()])
    with refuses("plot_matrix_measures: no summaries; give what accuracy_matrix returns"):
        plot_matrix_measures(cells(table))
    with refuses("plot_accuracy_matrix: several rows per (presentation, task); select one run"):
        plot_accuracy_matrix(pd.concat([table, table.assign(run="other")]))
    with refuses("plot_matrix_measures: several rows of a summary; select one run"):
        plot_matrix_measures(pd.concat([table, table.assign(run="other")]))
    gap = stability_gap(gapped(), draws=5)
    with refuses("plot_stability_gap: no traces; give what stability_gap returns"):
        plot_stability_gap(gap[gap["phase"].isna()])
    both = plasticity(stream(), draws=5)
    with refuses("plot_plasticity: no scores alone; give what plasticity returns"):
        plot_plasticity(both[both["phase"] != "alone"])


def test_the_measures_lead_with_any_axes():
    rng = np.random.default_rng(3)
    R, b, a, c = (
        rng.random((5, 3, 3)),
        rng.random((5, 3)),
        rng.random((5, 3)),
        rng.random((5, 3, 2)),
    )
    whole = matrix_measures(R, b, a, c, better="high")
    for at in range(5):
        one = matrix_measures(R[at], b[at], a[at], c[at], better="high")
        for key in MATRIX:
            assert whole[key][at] == pytest.approx(one[key])
