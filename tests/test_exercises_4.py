"""Answers to the exercises of session 4, wrong in the ways readers are wrong, and then right."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.workshop import check


def test_a_sign_turned_without_its_bounds():
    loss = pd.DataFrame({"value": [-2.0, -0.5], "lo": [-3.0, -1.0], "hi": [-1.0, 0.25], "se": 0.5})
    assert check("4.1", loss.assign(value=[2, 0.5], lo=[1.0, -0.25], hi=[3.0, 1.0]), loss).passed
    wrong = {
        "still effects on the loss": loss,
        "still effects on the loss, negative": loss.assign(lo=-loss["hi"], hi=-loss["lo"]),
        "In 2 of 2 rows the estimate lies outside its own interval": loss.assign(
            value=-loss["value"]
        ),
        "In 2 rows lo is above hi": loss.assign(
            value=-loss["value"], lo=-loss["lo"], hi=-loss["hi"]
        ),
        "In 1 rows the estimate lies outside its own interval; a band": loss.assign(
            value=-loss["value"], lo=[1.0, -0.25], hi=[3.0, 0.0]
        ),
        "their widths have changed": loss.assign(
            value=-loss["value"], lo=[0.0, 0.0], hi=[3.0, 1.0]
        ),
        "You have 1 rows of 2": loss[:1],
    }
    for told, answer in wrong.items():
        note = check("4.1", answer, loss)
        assert not note.passed and told in note.says, note


@pytest.fixture
def scores() -> pd.DataFrame:
    """A cohort of wave 15 (-6, -5, -3, -2) and controls (-5.5, -4.75, -4, -4.25) at 0, 10, 20, 30."""
    made = []
    for item, wave, values in (
        ("a", 15.0, (-6.5, -5.5, -3.5, -2.5)),
        ("b", 15.0, (-5.5, -4.5, -2.5, -1.5)),
        ("c", np.nan, (-5.5, -4.75, -4.0, -4.25)),
    ):
        made += [(item, wave, s, v) for s, v in zip((0, 10, 20, 30), values, strict=True)]
    return pd.DataFrame(made, columns=["item", "wave", "step", "value"])


def test_four_means_and_one_base(scores):
    # base 10: (-2 + 5) - (-4.25 + 4.75) = 2.5
    assert check("4.2", 2.5, scores, 15.0, 30).passed
    assert check("4.2", pd.Series([2.5]), scores, 15.0, 30).passed
    wrong = {
        -2.5: "the sign is turned",
        3.0: "before and after of the trained texts. The controls, which nobody trained on, went up by 0.50",
        2.25: "compares the two groups at the end. They did not start level: before the first "
        "exposure they stood -0.25 apart",
        0.5: "the controls' change alone",
        # base 0: (-2 + 6) - (-4.25 + 5.5) = 2.75; base 20: (-2 + 3) - (-4.25 + 4) = 1.25
        2.75: "Your base is checkpoint 0. Between it and",
        1.25: "Your base is checkpoint 20, when these texts had been trained on already",
        # at checkpoint 20: (-3 + 5) - (-4 + 4.75) = 1.25 is base 20 at 30, too; at 0: -1 + .75
        -0.25: "This is the effect at checkpoint 0; the one at 30 is asked for.",
        7.0: "not a difference of two changes",
    }
    for answer, told in wrong.items():
        note = check("4.2", answer, scores, 15.0, 30)
        assert not note.passed and told in note.says, note
    assert "You have 2 numbers" in check("4.2", [1.0, 2.0], scores, 15.0, 30).says


def test_placebo_cells_beyond_chance():
    # placebo ratios 0, 2.5, -3, 1, -2, .5, 1, 0 (and one without an error): 3 of 8 beyond, 1 of
    # them above; effects 5, 1: 1 of 2; all 4 of 10; bands of 3 errors leave no placebo out
    ratio = np.array([0, 2.5, -3, 1, -2, 0.5, 1, 0, 9, 5, 1])
    se = np.where(ratio == 9, np.nan, 0.1)
    cells = pd.DataFrame({"metric": ["placebo"] * 9 + ["memorization"] * 2, "value": ratio * 0.1})
    cells = cells.assign(se=se, lo=cells["value"] - 3.1 * se, hi=cells["value"] + 3.1 * se)
    assert check("4.3", 0.375, cells).passed
    wrong = {
        3.0: "You have 3: a number of cells",
        0.625: "do look like noise",
        0.4: "All cells are in it",
        0.5: "after the exposure: a share of effects found",
        0.125: "Only cells above zero",
        0.25: "Only cells below zero",
        0.0: "You used lo and hi",
        0.9: "neither the share of all cells",
    }
    for answer, told in wrong.items():
        note = check("4.3", answer, cells)
        assert not note.passed and told in note.says, note
    assert "What is the mean of True and False?" in check("4.3", [True, False], cells).says


def test_two_mistakes_of_one_number_are_both_told():
    # one placebo above chance, within its band: 1 of 2; and one effect of two: 1 of 2; all: 2 of 4
    cells = pd.DataFrame({"metric": ["placebo"] * 3 + ["memorization"] * 3})
    cells = cells.assign(value=[3.0, -3, 0, 3, 0, 0], se=1.0, lo=-9.0, hi=9.0)
    assert check("4.3", 2 / 3, cells).passed
    assert check("4.3", 1 / 3, cells).says == (
        "These are the placebo cells that do look like noise; the others are asked for. Or else: "
        "These are the cells after the exposure: a share of effects found, not a test of the method."
        " Or else: Only cells above zero are counted; a placebo may miss on either side. Or else: "
        "Only cells below zero are counted; a placebo may miss on either side."
    )


def test_a_truth_for_each_text():
    here = pd.Series({"a": -2.0, "b": -3.0, "c": -1.0})
    before = pd.Series({"a": -5.0, "b": -5.0, "c": -5.0})
    there = pd.Series({"z": -6.0, "c": -4.0, "b": -4.5, "a": -4.0})
    # 2, 1.5, 3; mean 2.1667; of the two sets of texts -2 + 4.625 = 2.625
    right = pd.Series({"c": 3.0, "a": 2.0, "b": 1.5})
    assert check("4.4", right, here, there, before).passed
    assert check("4.4", (here - there).dropna(), here, there, before).passed
    wrong = {
        "The mean is right; keep one number": right.mean(),
        "means of two different sets of texts": here.mean() - there.mean(),
        "one number, 7.00; a truth is asked for each": 7.0,
        "3 numbers without names": right.to_numpy(),
        "1 texts have no number": here - there,
        "You have 2 texts; 3 are": right[:2],
        "The sign is turned": -right,
        "before and after within one run": here - before,
        "paired with another text's": pd.Series({"c": 2.0, "a": 1.5, "b": 3.0}),
        "not differences between the two runs": right + 1,
    }
    for told, answer in wrong.items():
        note = check("4.4", answer, here, there, before)
        assert not note.passed and told in note.says, note


def test_ghosts():
    names = {"a": "seen", "p": "partner", "q": "partner", "n": "never"}
    scores = pd.DataFrame(
        [(i, g, s, 0.0) for i, g in names.items() for s in (0, 10)],
        columns=["item", "group", "step", "value"],
    )
    elsewhere = pd.Series({"p": 5.0, "q": 7.0})
    some = scores[scores["group"] != "seen"]
    ghosts = some.assign(cohort=some["item"].map(elsewhere))
    assert check("4.5", ghosts, scores, elsewhere).passed
    wrong = {
        "1 texts that this run was trained on": scores.assign(cohort=scores["item"].map(elsewhere)),
        "no controls left": ghosts[ghosts["group"] == "partner"],
        "Only controls are left": ghosts[ghosts["group"] == "never"],
        "Controls have a cohort now": ghosts.assign(cohort=5.0),
        "The ghosts have no cohort": ghosts.assign(cohort=np.nan),
        "another cohort than the twin's": ghosts.assign(
            cohort=ghosts["group"].map({"partner": 5.0})
        ),
        "You have 5 rows of 6": ghosts[1:],
        "Of the columns item, group and value some are gone": ghosts[["item", "cohort"]],
        "There is no column cohort yet": some,
    }
    for told, answer in wrong.items():
        note = check("4.5", answer, scores, elsewhere)
        assert not note.passed and told in note.says, note
