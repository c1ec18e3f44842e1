"""Guesses and foretold memorized sets against what turned out."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from tests.conftest import Numbers, frame, neox, reciter
from workbench.models import LanguageModel
from workbench.plots.prediction import plot_exposure, plot_prediction
from workbench.probes.extraction import probe_extraction
from workbench.probes.guesses import probe_guesses
from workbench.stats.prediction import guess_curve, predict_memorized, ranked_guesses
from workbench.stats.summarise import wilson_interval
from workbench.table import InputError, rows, validate
from workbench.training import Trainer

ONE = np.ones((1, 5))
HAND = (np.array([5.0, 4, 3, 2, 1]), np.array([True, True, False, True, False]))


def test_guesses_by_hand():
    # METRICS section 2: correct 1,1,0,1,0 on examples 0..4 of 10 targets. Average precision:
    # (1/1 + 2/2 + 3/4) / 10 = .275. The first error is the third guess: 2 right before it.
    got = guess_curve(*HAND, ONE, 10, (1, 2, 3))
    assert {name: round(value[0], 12) for name, value in got.items()} == {
        "precision": 0.6,
        "recall": 0.3,
        "average_precision": 0.275,
        "recall_at_errors 1": 0.2,
        "recall_at_errors 2": 0.3,
        "recall_at_errors 3": 0.3,
    }


def test_equal_scores():
    # all tied: one threshold, precision .6 at recall .3; the two errors count before the rest
    got = guess_curve(np.ones(5), HAND[1], ONE, 10, (1, 2, 3))
    assert got["average_precision"][0] == pytest.approx(0.18)
    assert [got[f"recall_at_errors {n}"][0] for n in (1, 2, 3)] == [0.0, 0.0, 0.3]


@settings(max_examples=80, deadline=None)
@given(
    guesses=st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12),
    missing=st.integers(0, 4),
    errors=st.integers(1, 5),
)
def test_guesses_against_loops_and_sklearn(guesses, missing, errors):
    score = np.array([float(s) for s, _ in guesses])
    right = np.array([c for _, c in guesses])
    targets = len(guesses) + missing
    got = guess_curve(score, right, np.ones((1, len(score))), targets, (errors,))
    wrong = found = 0
    for _, correct in sorted(guesses, key=lambda g: (-g[0], g[1])):
        wrong += not correct
        if wrong == errors:
            break
        found += correct
    assert got[f"recall_at_errors {errors}"][0] == pytest.approx(found / targets)
    assert got["precision"][0] == pytest.approx(right.mean())
    if right.any():
        # scikit-learn's recall is of the guesses that are right
        peer = average_precision_score(right, score) * right.sum() / targets
        assert got["average_precision"][0] == pytest.approx(peer)
    else:
        assert got["average_precision"][0] == 0
    rising = guess_curve(np.exp(score), right, np.ones((1, len(score))), targets, (errors,))
    assert all(rising[name] == got[name] for name in got)


def test_a_draw_is_a_sample_with_repeated_guesses():
    rng = np.random.default_rng(0)
    score, right = rng.integers(0, 6, 20).astype(float), rng.random(20) < 0.5
    count = rng.multinomial(20, np.full(20, 0.05), size=5)
    got = guess_curve(score, right, count.astype(float), 20, (2,))
    for draw, each in enumerate(count):
        again = np.repeat(np.arange(20), each)
        want = guess_curve(score[again], right[again], np.ones((1, 20)), 20, (2,))
        for name in want:
            np.testing.assert_allclose(got[name][draw], want[name][0], err_msg=name)


def guesses(score, correct, metric="guess_log_probability", **place) -> pd.DataFrame:
    items = [f"i{i}" for i in range(len(score))]
    place = {"run": "r", "step": 3, "item": items} | place
    return pd.concat(
        [rows(metric, score, **place), rows("extractable", correct, **place)], ignore_index=True
    )


TEN = ([-1.0, -2, -3, -4, -5] + [np.nan] * 5, [1.0, 1, 0, 1, 0] + [0] * 5)


def test_ranked_guesses_of_a_table():
    shuffled = guesses(*TEN).sample(frac=1, random_state=1)
    got = ranked_guesses(shuffled, score="guess_log_probability", errors=(1, 2), draws=300)
    value = {
        (m, e): v
        for m, e, v in zip(got["metric"], got["errors"].fillna(0), got["value"], strict=True)
    }
    want = {("precision", 0): 0.6, ("recall", 0): 0.3, ("average_precision", 0): 0.275}
    want |= {("recall_at_errors", 1): 0.2, ("recall_at_errors", 2): 0.3}
    assert value == pytest.approx(want)
    assert dict(zip(got["metric"].astype(str), got["n"], strict=True)) == {
        "precision": 5, "recall": 10, "average_precision": 10, "recall_at_errors": 10,
    }  # fmt: skip
    assert (got["step"] == 3).all() and (got["reason"] == "").all()
    # three of ten right: the binomial standard deviation is .145, so 95 % is about 0 to .6
    recall = got[got["metric"] == "recall"].iloc[0]
    assert recall["lo"] == pytest.approx(0.05, abs=0.06)
    assert recall["hi"] == pytest.approx(0.6, abs=0.1)
    # a score that is better low is turned round
    low = ranked_guesses(
        guesses(np.exp(-np.array(TEN[0])), TEN[1], "perplexity"), score="perplexity"
    )
    assert low["value"][2] == pytest.approx(0.275)


def test_nobody_guessed():
    none = guesses([np.nan] * 3, [0.0] * 3)
    got = ranked_guesses(none, score="guess_log_probability", errors=(1,), draws=20)
    got = got.set_index("metric")
    assert np.isnan(got.loc[["precision", "average_precision"], "value"]).all()
    assert set(got.loc[["precision", "average_precision"], "reason"]) == {"no guess"}
    assert got.loc["recall", "value"] == got.loc["recall_at_errors", "value"] == 0


def test_groups_are_ordered_apart():
    two = pd.concat([guesses(*TEN, group="a"), guesses([-1.0], [1.0], group="b")])
    two["item"] = two["item"].astype(str) + two["group"]
    got = ranked_guesses(two, score="guess_log_probability", by=("run", "step", "group"), draws=20)
    recall = got[got["metric"] == "recall"].set_index("group")["value"]
    assert recall.to_dict() == pytest.approx({"a": 0.3, "b": 1.0})


def panel(memorized: dict, score: dict | None = None) -> pd.DataFrame:
    """Rows of ten items a (run, step); the memorized ones are listed."""
    parts = []
    for (run, step), those in memorized.items():
        place = {"run": run, "step": step, "item": [f"i{i}" for i in range(10)]}
        parts.append(rows("extractable", np.isin(range(10), those).astype(float), **place))
        if score:
            parts.append(rows("log_probability", score[run, step], **place))
    return pd.concat(parts, ignore_index=True)


def test_foretold_by_hand():
    # foretold 0 1 4, turned out 0 1 2 3: precision 2/3, recall 1/2, F1 = 4/7 (J = 2/5)
    table = panel({("big", 5): [0, 1, 4], ("big", 20): [0, 1, 2, 3]})
    got = validate(predict_memorized(table, target=("big", 20))).set_index("metric")
    assert got["value"].to_dict() == pytest.approx(
        {"base_rate": 0.4, "precision": 2 / 3, "recall": 0.5, "f1": 4 / 7}
    )
    assert got["n"].to_dict() == {"base_rate": 10, "precision": 3, "recall": 4, "f1": 5}
    assert got["compute"].to_dict() == pytest.approx(
        {"base_rate": 1.0, "precision": 0.25, "recall": 0.25, "f1": 0.25}
    )
    lo, hi = wilson_interval(np.array([2 / 3, 0.4]), np.array([3, 5]), 0.95)
    assert got.loc["precision", ["lo", "hi"]].tolist() == pytest.approx([lo[0], hi[0]])
    want = [2 * lo[1] / (1 + lo[1]), 2 * hi[1] / (1 + hi[1])]
    assert got.loc["f1", ["lo", "hi"]].tolist() == pytest.approx(want)


def test_compute_counts_parameters_and_updates():
    table = panel({("small", 10): [0], ("big", 20): [0, 1], ("big", 5): []})
    got = predict_memorized(table, target=("big", 20), parameters={"small": 3, "big": 12})
    cost = got[got["metric"] == "recall"].set_index(["run", "step"])["compute"]
    assert cost.to_dict() == {("big", 5): 0.25, ("small", 10): 0.125}


def test_nothing_foretold_and_nothing_to_foretell():
    table = panel({("r", 1): [], ("r", 2): [3], ("r", 9): []})
    got = predict_memorized(table, target=("r", 2)).set_index(["step", "metric"])
    assert np.isnan(got.loc[(1, "precision"), "value"])
    assert got.loc[(1, "precision"), "reason"] == "nothing memorized yet"
    assert got.loc[(1, "recall"), "value"] == got.loc[(1, "f1"), "value"] == 0
    got = predict_memorized(table, target=("r", 9)).set_index(["step", "metric"])
    assert got.loc[(2, "recall"), "reason"] == "nothing to foretell"
    assert got.loc[(2, "precision"), "value"] == 0
    assert got.loc[(1, "f1"), "reason"] == "neither set has an item"


def test_a_graded_score_foretells_before_anything_is_memorized():
    # the items memorized later, 0 and 1, are first and third by score: (1/1 + 2/3) / 2
    score = -np.array([1.0, 3, 2, 4, 5, 6, 7, 8, 9, 10])
    table = panel({("r", 1): [], ("r", 2): [0, 1]}, {("r", 1): score, ("r", 2): np.full(10, -1.0)})
    got = predict_memorized(table, target=("r", 2), score="log_probability", draws=200)
    got = got.set_index("metric").loc["average_precision"]
    assert got["value"] == pytest.approx(5 / 6) and got["n"] == 10
    assert got["lo"] < 5 / 6 <= got["hi"] == 1
    # each draw of items has its own memorized ones
    drawn = np.random.default_rng([0, 32]).multinomial(10, np.full(10, 0.1), size=200)
    true = np.arange(10) < 2
    again = [np.repeat(np.arange(10), each) for each in drawn]
    again = [average_precision_score(true[some], score[some]) for some in again if true[some].any()]
    np.testing.assert_allclose(got[["lo", "hi"]].tolist(), np.quantile(again, [0.025, 0.975]))


def test_items_without_both_are_counted():
    table = panel({("r", 1): [0, 1], ("r", 2): [0]})
    table = table[~((table["step"] == 1) & (table["item"] == "i1"))]
    table = table[~((table["step"] == 2) & (table["item"] == "i9"))]
    got = predict_memorized(table, target=("r", 2))
    assert got.attrs["dropped"] == 2
    assert got.set_index("metric").loc["precision", "value"] == 1.0


@pytest.fixture(scope="module")
def learning():
    """A model that comes to recite its texts: verdicts on the way, and the model half-way."""
    texts = np.random.default_rng(0).integers(1, 60, size=(120, 12))
    items = frame([" ".join(map(str, text)) for text in texts])
    trainer = Trainer(neox(0, width=48, vocabulary=60), 1e-2, warmup=5)
    parts, half = [], None
    for step in range(1, 41):
        trainer.step(texts[:80])
        if step in (24, 28, 40):
            module = copy.deepcopy(trainer.module).eval()
            model = LanguageModel(module, Numbers(), run="r", step=step)
            half = model if step == 28 else half
            parts.append(probe_extraction(model, items, prefix=8, suffix=4))
    table = pd.concat(parts, ignore_index=True)
    return table[table["metric"] == "extractable"], half, items


def test_foretold_on_real_passes_against_sklearn(learning):
    table, _, _ = learning
    got = predict_memorized(table, target=("r", 40))
    truth = table[table["step"] == 40].set_index("item")["value"]
    for step in (24, 28):
        said = table[table["step"] == step].set_index("item")["value"].reindex(truth.index)
        assert 0 < said.sum() < truth.sum() < len(truth)
        want = precision_recall_fscore_support(truth, said, average="binary")[:3]
        mine = got[got["step"] == step].set_index("metric")["value"]
        np.testing.assert_allclose(mine[["precision", "recall", "f1"]], want)


def test_guesses_of_a_model_by_hand():
    # counts upwards, says 0 after 7: guesses 5 6 (right), 7 0 (wrong, 8 was meant), and is as
    # sure of both: each token costs ln(1 + 31 e^-5)
    items = frame(["3 4 5 6", "5 6 7 8"], kind="count", dose=[2, 0])
    got = validate(probe_guesses(reciter(breaks={7}), items, prefix=2, suffix=2))
    wide = got.pivot(index="item", columns="metric", values="value")
    assert wide["extractable"].tolist() == [1, 0]
    sure = -2 * np.log(1 + 31 * np.exp(-5))
    np.testing.assert_allclose(wide["guess_log_probability"], sure, atol=1e-5)
    assert got["dose"].tolist() == [2, 0, 2, 0] and set(got["prefix"]) == {2}
    with pytest.raises(InputError) as told:
        probe_guesses(reciter(), items, prefix=2, suffix=0)
    assert str(told.value) == "probe_guesses: suffix is 0, but must be at least 1"


def test_guesses_agree_with_the_teacher_forced_verdict(learning):
    table, model, items = learning
    forced = table[table["step"] == 28].set_index("item")["value"]
    own = probe_guesses(model, items, prefix=8, suffix=4)
    sure = own[own["metric"] == "guess_log_probability"].set_index("item")["value"]
    own = own[own["metric"] == "extractable"].set_index("item")["value"]
    assert forced.sort_index().tolist() == own.sort_index().tolist() and 0 < own.sum() < len(own)
    # the guess is scored, not the truth: where it is right both are one number
    true = probe_extraction(model, items, prefix=8, suffix=4)
    true = true[true["metric"] == "log_p_z"].set_index("item")["value"]
    right = own[own == 1].index
    np.testing.assert_allclose(sure[right], true[right], atol=1e-4)
    assert (sure[own[own == 0].index] > true[own[own == 0].index]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ranked_guesses(guesses(*TEN), score="rank"),
            "ranked_guesses: the table has no rows of rank; it has extractable, "
            "guess_log_probability",
        ),
        (
            lambda: ranked_guesses(guesses(*TEN), score="guess_log_probability", by=("run", "lag")),
            "ranked_guesses: no column 'lag'; there are run, step, group, item, metric, value, lo, "
            "hi, n",
        ),
        (
            lambda: ranked_guesses(guesses(*TEN), score="guess_log_probability", errors=(0,)),
            "ranked_guesses: errors are (0,), needs at least 1 each",
        ),
        (
            lambda: ranked_guesses(guesses(*TEN, metric="outcome"), score="outcome"),
            "ranked_guesses: outcome is neither better high nor low, so it orders nothing",
        ),
        (
            lambda: ranked_guesses(
                guesses([-1.0, -2.0], [1.0, np.nan]), score="guess_log_probability"
            ),
            "ranked_guesses: extractable is nan for item i1, which has a score; it must be 0 or 1",
        ),
        (
            lambda: ranked_guesses(
                pd.concat([guesses(*TEN).assign(prefix=k) for k in (1, 2)]),
                score="guess_log_probability",
            ),
            "ranked_guesses: item i0 has several rows of guess_log_probability; add what tells "
            "them apart to by, or select one",
        ),
        (
            lambda: predict_memorized(panel({("r", 1): [0]}), target=("r", 2)),
            "predict_memorized: no rows of the target (r, 2); there are (r, 1)",
        ),
        (
            lambda: predict_memorized(panel({("r", 1): [0]}), target=("r", 1)),
            "predict_memorized: only rows of the target (r, 1); there are (r, 1)",
        ),
        (
            lambda: predict_memorized(panel({("a", 1): [0], ("b", 1): [0]}), target=("b", 1)),
            "predict_memorized: no parameters of run b; several runs are compared by compute: give "
            "parameters={'b': ..., ...}",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError) as told:
        call()
    assert str(told.value) == message


# --- figures ---------------------------------------------------------------------------------


def test_prediction_is_drawn_as_it_stands():
    table = panel({("small", 10): [0], ("big", 20): [0, 1], ("big", 5): []})
    found = predict_memorized(table, target=("big", 20), parameters={"small": 3, "big": 12})
    figure = plot_prediction(found)
    lines = {t.name: (list(t.x), list(t.y)) for t in figure.data if t.mode == "lines+markers"}
    # big at step 5 foretells nothing: recall 0, no precision and no line for it
    assert lines == {
        "precision, small": ([0.125], [1.0]),
        "recall, big": ([0.25], [0.0]),
        "recall, small": ([0.125], [0.5]),
    }
    assert figure.layout.shapes[0].y0 == 0.2  # the base rate, 2 of 10
    with pytest.raises(InputError) as told:
        plot_prediction(found, metrics=("rank",))
    assert str(told.value) == (
        "plot_prediction: the table has no rows of rank; it has base_rate, f1, precision, recall"
    )
    with pytest.raises(InputError) as told:
        plot_prediction(pd.concat([found, found.assign(group="b")]))
    assert str(told.value) == ("plot_prediction: several rows per (run, step, metric); select one")


def exposures() -> pd.DataFrame:
    single = rows(
        "exposure", [2.0, 1.0, 3.0], run="r", item=["<a>", "b", "c"], lo=0.5, hi=[np.inf, 2, 4],
        beside={"dose": [4, 0, 4], "kind": ["k", "k", "l"], "candidates": 4},
    )  # fmt: skip
    pooled = rows("exposure", 2.0, run="r", lo=1.0, hi=2.5, n=3, beside={"dose": 4, "kind": "k"})
    return pd.concat([single, pooled.assign(candidates=np.nan)], ignore_index=True)


def test_exposures_are_drawn_between_chance_and_ceiling():
    figure = plot_exposure(exposures())
    points = {t.name: t for t in figure.data if t.name}
    assert list(points["k"].y) == [1.0, 2.0] and list(points["l"].y) == [3.0]
    assert list(points["k"].marker.symbol) == ["circle", "triangle-up"]
    assert list(points["l"].marker.symbol) == ["circle"]  # 4 bits at most are an end, not none
    # doses 0 and 4 at places 0 and 1; kind k in the left half of each
    np.testing.assert_allclose(points["k"].x, [-0.19, 0.81])
    assert points["k"].customdata[1][0] == "<a>" or points["k"].customdata[1][0] == "&lt;a&gt;"
    zones = [(s.y0, s.y1) for s in figure.layout.shapes if s.type == "rect"]
    np.testing.assert_allclose(zones, [(0, 4.3219281), (2, 2.24)])
    mean = next(t for t in figure.data if t.marker.symbol == "line-ew-open")
    assert list(mean.y) == [2.0] and list(mean.error_y.array) == [0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.drop(columns="candidates"),
            "plot_exposure: rows have no column 'candidates'; ",
        ),
        (
            lambda t: pd.concat([t, t.assign(step=1)]),
            "plot_exposure: needs texts of one run at one step; select one",
        ),
        (
            lambda t: pd.concat([t, t[t["item"] == "all"].assign(group="b")]),
            "plot_exposure: several pooled rows per (dose, kind); select one",
        ),
    ],
)
def test_exposure_errors(change, message):
    with pytest.raises(InputError) as told:
        plot_exposure(change(exposures()))
    assert str(told.value).startswith(message)
