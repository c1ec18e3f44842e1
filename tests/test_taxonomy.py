"""Recite, reconstruct, recollect."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import frame
from workbench.stats.taxonomy import (
    class_shares,
    classify_memorized,
    huffman_bits,
    pieces,
    predict_by_class,
    template,
    text_features,
    text_template,
)
from workbench.table import InputError, rows, validate


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1 2 3 4 5 6", "incrementing"),
        ("10, 9, 8, 7, 6", "incrementing"),
        ("a b c d e f", "incrementing"),
        ("<li>1</li><li>2</li><li>3</li>", "incrementing"),
        ("item 3: no; item 6: no; item 9: no;", "incrementing"),
        ("5 5 5 5", "repeating"),
        ("= = = =", "repeating"),
        ("hahahaha", "repeating"),  # one word, letters that repeat
        ("no, yes, no, yes, no, yes,", "repeating"),
        ("no, yes, no, yes,", ""),  # twice is no template
        ("no no", ""),
        ("1 2", ""),
        ("116 117 118 119 x y", ""),  # x is the letter of number 120
        ("7 1 1 1 1 1", ""),  # four of five places agree, and nothing grows
        ("2 4 8 16 32 64", ""),  # grows, but by more each time
        ("the cat sat on the mat and then it left", ""),
        ("", ""),
    ],
)
def test_templates_by_hand(text, kind):
    assert text_template(text) == kind


def test_one_place_in_ten_may_differ():
    # period 1: 19 comparisons, and one odd word spoils two of them: 17/19 = .894 is too few,
    # 27/29 = .931 enough; spoilt at its end a text loses one only
    assert template(["x"] * 10 + ["o"] + ["x"] * 9) == ""
    assert template(["x"] * 10 + ["o"] + ["x"] * 19) == "repeating"
    assert template(["x"] * 19 + ["o"]) == "repeating"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("pqrs"), min_size=1, max_size=5), st.integers(3, 6))
def test_a_repeated_list_is_repeating(once, times):
    assert template(once * times) == "repeating"


@settings(max_examples=60, deadline=None)
@given(st.integers(-5, 5).filter(bool), st.integers(100, 999), st.integers(4, 9))
def test_an_arithmetic_progression_is_incrementing(step, start, length):
    numbers = [str(start + step * i) for i in range(length)]
    assert template(numbers) == "incrementing"
    assert template([part for n in numbers for part in ("row", n, ";")]) == "incrementing"
    assert template([*numbers, "x", "y"]) == ("" if length < 14 else "incrementing")


def test_pieces():
    assert pieces("v0x1f, it's_\n12.5") == [
        "v", "0", "x", "1", "f", ",", "it", "'", "s", "_", "12", ".", "5",
    ]  # fmt: skip


def test_huffman_by_hand():
    assert huffman_bits("aabc") == 1.5  # a: 1 bit, b and c: 2 each; 6 bits for 4
    assert huffman_bits("aaaa") == 0.0 and huffman_bits("") == 0.0
    assert huffman_bits("abcd" * 3) == 2.0


@settings(max_examples=60, deadline=None)
@given(st.text("abcdefg", min_size=2, max_size=40).filter(lambda t: len(set(t)) > 1))
def test_huffman_is_the_best_code(text):
    count = Counter(text)
    entropy = -sum(c / len(text) * math.log2(c / len(text)) for c in count.values())
    assert entropy - 1e-12 <= huffman_bits(text) < entropy + 1
    # merging the two rarest again and again, on explicit depths
    heap = [(c, {letter: 0}) for letter, c in count.items()]
    while len(heap) > 1:
        heap.sort(key=lambda node: node[0])
        (low, left), (high, right), *heap = heap
        heap.append((low + high, {k: d + 1 for k, d in (left | right).items()}))
    want = sum(count[letter] * depth for letter, depth in heap[0][1].items()) / len(text)
    assert huffman_bits(text) == pytest.approx(want)


def test_features_by_hand():
    got = text_features(frame(["aa bb aa"])).iloc[0]
    assert (got["characters"], got["pieces"], got["item"]) == (8, 3, "i0")
    assert got["new_pieces"] == pytest.approx(2 / 3)
    # a 4, b 2, blank 2 of 8: a one bit, the others two
    assert got["huffman_bits"] == 1.5
    long = text_features(frame(["ab" * 500])).iloc[0]
    assert long["compressed"] < 0.03


TEXTS = ["1 2 3 4", "a tale of a cat", "so it goes", "5 6 7 8", "x x x x"]


def verdicts(value, dose, step=1, metric="extractable") -> pd.DataFrame:
    return rows(
        metric, value, run="r", step=step, item=[f"i{n}" for n in range(len(value))],
        beside={"dose": dose},
    )  # fmt: skip


def test_classes_by_hand():
    # six copies recite, whatever the text; five do not
    table = verdicts([1, 1, 0, 1, 1], [6, 5, 0, 5, 1])
    got = classify_memorized(table, frame(TEXTS)).set_index("item")
    assert got["taxon"].tolist() == [
        "recitation", "recollection", "recollection", "reconstruction", "reconstruction",
    ]  # fmt: skip
    assert got["template"].tolist() == ["incrementing", "", "", "incrementing", "repeating"]
    shares = class_shares(got.reset_index()).set_index("taxon")
    assert shares["value"].to_dict() == {
        "recitation": 0.25, "reconstruction": 0.5, "recollection": 0.25,
    }  # fmt: skip
    assert set(shares["n"]) == {4}
    # Wilson at 2 of 4: .15 to .85
    assert shares.loc["reconstruction", ["lo", "hi"]].tolist() == pytest.approx(
        [0.1500390, 0.8499610]
    )


def test_nothing_memorized_has_no_shares():
    table = classify_memorized(verdicts([0, 0], [0, 9]), frame(TEXTS[:2]))
    got = class_shares(table)
    assert got["value"].isna().all() and set(got["reason"]) == {"nothing is memorized"}


@pytest.fixture(scope="module")
def many():
    """300 texts: recited ones are memorized by dose, others by length; and what is known of them."""
    rng = np.random.default_rng(0)
    dose = rng.integers(0, 12, 300)
    long = rng.normal(size=300)
    pull = np.where(dose > 5, 0.8 * (dose - 8.5), 2.0 * long)
    value = (rng.random(300) < 1 / (1 + np.exp(-pull))).astype(float)
    words = [f"{chr(97 + n % 26)}{'y' * (n % 7)} once upon {n} time" for n in range(300)]
    items = frame(words)
    features = pd.DataFrame(
        {"item": items["item"], "dose": dose.astype(float), "length": long, "name": "x"}
    )
    return classify_memorized(verdicts(value, dose), items), features, value, dose


def test_models_by_class_against_a_plain_route(many):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score, roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    table, features, value, dose = many
    got = validate(predict_by_class(table, features, draws=40, seed=3))
    quality = (
        got[got["metric"] != "coefficient"].set_index(["taxon", "predictor", "metric"]).sort_index()
    )
    x = features[["dose", "length"]].to_numpy()
    cut = StratifiedKFold(5, shuffle=True, random_state=3)

    def foretold(some):
        said = np.empty(some.sum())
        a, b = x[some], value[some]
        for train, test in cut.split(a, b):
            mean, spread = a[train].mean(axis=0), a[train].std(axis=0)
            model = LogisticRegression(max_iter=1000).fit((a[train] - mean) / spread, b[train])
            said[test] = model.predict_proba((a[test] - mean) / spread)[:, 1]
        return said

    recited = dose > 5
    stitched = np.empty(300)
    for some, name in ((recited, "recitation"), (~recited, "recollection")):
        stitched[some] = foretold(some)
        place = quality.loc[(name, "by class")]["value"]
        np.testing.assert_allclose(place["auc"], roc_auc_score(value[some], stitched[some]))
        np.testing.assert_allclose(
            place["average_precision"], average_precision_score(value[some], stitched[some])
        )
    baseline = foretold(np.full(300, True))
    whole = quality.loc["all"]["value"]
    np.testing.assert_allclose(whole["by class", "auc"], roc_auc_score(value, stitched))
    np.testing.assert_allclose(whole["one for all", "auc"], roc_auc_score(value, baseline))
    other = quality.loc[("recollection", "one for all", "auc")]["value"]
    np.testing.assert_allclose(other, roc_auc_score(value[~recited], baseline[~recited]))
    # the classes were made to differ, so models that know them are better
    assert whole["by class", "auc"] > whole["one for all", "auc"] + 0.02
    at = quality.loc["all", "by class"]
    assert (at["lo"] < at["value"]).all() and (at["value"] < at["hi"]).all()
    # a bootstrap over texts: the standard error of an AUC of 300 texts is about .025
    assert (at.loc["auc", "hi"] - at.loc["auc", "lo"]) == pytest.approx(0.1, abs=0.04)
    # a class of four texts has no model: in the whole they have their base rate
    four = np.arange(300) < 4
    table = table.assign(taxon=np.where(four, "reconstruction", table["taxon"].astype(str)))
    again = predict_by_class(table, features, draws=5, seed=3)
    again = again.set_index(["taxon", "predictor", "metric"])["value"]
    stitched[four] = value[four].mean()
    for some in (recited & ~four, ~recited & ~four):
        stitched[some] = foretold(some)
    np.testing.assert_allclose(again["all", "by class", "auc"], roc_auc_score(value, stitched))
    # no reconstruction among these texts
    gone = quality.loc["reconstruction"]
    assert gone["value"].isna().all()
    assert set(gone["reason"]) == {"0 memorized and 0 other texts, needs 5 of each"}


def test_coefficients(many):
    from sklearn.linear_model import LogisticRegression

    table, features, value, dose = many
    got = predict_by_class(table, features, draws=40)
    got = got[got["metric"] == "coefficient"].set_index(["taxon", "feature"])
    assert got.loc["all"].index.tolist() == ["dose", "length"]  # names are no numbers
    x = features[["dose", "length"]].to_numpy()[dose > 5]
    model = LogisticRegression().fit((x - x.mean(axis=0)) / x.std(axis=0), value[dose > 5])
    np.testing.assert_allclose(got.loc["recitation"]["value"], model.coef_[0], rtol=1e-3)
    # what was put in: dose for the recited, length for the others
    interval = {k: (v["lo"], v["hi"]) for k, v in got[["lo", "hi"]].iterrows()}
    assert interval["recitation", "dose"][0] > 0.5 and interval["recollection", "length"][0] > 1
    assert interval["recitation", "length"][0] < 0 < interval["recitation", "length"][1]
    assert set(got.loc["recollection", "predictor"]) == {"by class"}


def test_texts_without_features_are_counted(many):
    table, features, _, _ = many
    some = features.assign(length=features["length"].where(features.index > 2)).iloc[:-1]
    got = predict_by_class(table, some, draws=5)
    assert got.attrs["dropped"] == 4
    assert got.loc[got["taxon"] == "all", "n"].tolist()[0] == 296


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: classify_memorized(verdicts([1], [1]), frame(TEXTS), copies="copies"),
            "classify_memorized: no column 'copies' to count copies; there are run, step, group, "
            "item, metric, value, lo, hi, n, dose",
        ),
        (
            lambda: classify_memorized(verdicts([1, 1], [1, np.nan]), frame(TEXTS)),
            "classify_memorized: dose is missing in 1 rows (first: item i1); 0 says never trained on",
        ),
        (
            lambda: classify_memorized(verdicts([1, 1], [1, 1]), frame(TEXTS[:1])),
            "classify_memorized: item i1 is not in the items frame",
        ),
        (
            lambda: class_shares(verdicts([1], [1])),
            "class_shares: no column 'taxon'; classify_memorized adds it",
        ),
        (
            lambda: class_shares(
                pd.concat([verdicts([1], [1]), verdicts([1], [1], metric="top1")]).assign(taxon="a")
            ),
            "class_shares: needs rows of one metric, got extractable, top1; select one first",
        ),
        (
            lambda: predict_by_class(
                pd.concat([verdicts([1], [1]), verdicts([1], [1], step=2)]).assign(taxon="a"),
                text_features(frame(TEXTS)),
            ),
            "predict_by_class: needs one row an item, of one run and step; got 2 rows of 1 items at "
            "2 of them",
        ),
        (
            lambda: predict_by_class(
                verdicts([1], [1]).assign(taxon="a"), pd.DataFrame({"a": [1]})
            ),
            "predict_by_class: features need a column 'item', each item once",
        ),
        (
            lambda: predict_by_class(
                verdicts([1], [1]).assign(taxon="a"), pd.DataFrame({"item": ["i0"], "b": ["x"]})
            ),
            "predict_by_class: the features hold no numbers",
        ),
        (
            lambda: predict_by_class(
                verdicts([1, 0, 0, 0, 0], [1] * 5).assign(taxon="recollection"),
                text_features(frame(TEXTS)),
                folds=2,
            ),
            "predict_by_class: 1 memorized and 4 other texts, needs 2 of each; ask for fewer folds "
            "or give more texts",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError) as told:
        call()
    assert str(told.value) == message
