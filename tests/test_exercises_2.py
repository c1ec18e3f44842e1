"""Session 2: each judge knows the right answer from the mistakes that are made, and names them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import confusion_matrix

from workbench.workshop import check

# 6 members, 4 of them found; 4 others, 1 accused
MEMBER = np.array([True] * 6 + [False] * 4)
SAID = np.array([True] * 4 + [False] * 2 + [True] + [False] * 3)
NAMES = {
    "index": ["truly other", "truly member"],
    "columns": ["said other", "said member"],
}


def matrix(table, found=4 / 6, accused=1 / 4):
    return check("2.1", table, found, accused, MEMBER, SAID)


def test_matrix():
    right = pd.DataFrame(confusion_matrix(MEMBER, SAID), **NAMES)
    assert matrix(right).passed and matrix(right.T).passed  # either way round, if named so
    swapped = pd.DataFrame(confusion_matrix(SAID, MEMBER), **NAMES)
    says = matrix(swapped, 4 / 5, 2 / 5).says
    assert says.startswith(
        "What is true and what was said have changed places: the table holds 5 texts that are "
        "truly members, and there are 6."
    )
    says = matrix(right * 2).says
    assert says == (
        "The counts are not those of the 6 members and 4 others: the table holds 12 that are "
        "truly members and 20 texts in all."
    )
    # 4 of the 5 accused are members; 1 of the 5 accused is none
    assert matrix(right, found=0.8).says.startswith("The table is right, but 80.0% is not the sha")
    assert matrix(right, accused=0.2).says.startswith("The table and the members found are right;")
    assert "cannot be judged (KeyError" in matrix(right.rename(index=str.upper)).says


@pytest.mark.parametrize(
    ("tries", "words"),
    [
        # p_z .1: .9 ** 6 = .5314, .9 ** 7 = .4783; mean wait 10; half over p_z 5
        (
            10,
            "1 / p_z is how many draws it takes on average; with 10 it comes out with probability",
        ),
        (5, "You added the probabilities of the draws, but several draws may give it at once: aft"),
        (6, "After 6 draws it has come out with probability 0.469: too few."),
        (6.58, "6.58 is no whole number of draws"),
        (8, "8 are enough (probability 0.570), but fewer are too."),
        (-7, "-7 draws are no number of draws."),
        (np.nan, "nan draws are no number of draws."),
    ],
)
def test_tries(tries, words):
    note = check("2.2", tries, 0.1)
    assert not note.passed and note.says.startswith(words), note
    assert check("2.2", 7, 0.1).passed


@pytest.mark.parametrize(
    ("auc", "words"),
    [
        # members 3, 2, 1 and others 2, 0: above 2 + 1 + 1, one tie, one below of 6 pairs: 4.5 / 6
        (0.25, "The sides are exchanged"),
        (4 / 6, "16.7% of the pairs are ties, and you count them all against the attack."),
        (5 / 6, "16.7% of the pairs are ties, and you count them all for the attack."),
        (1.5, "1.5 is no probability. There are 6 pairs, not 3 texts."),
        (0.5, "You have 0.500. Compare each of the 3 members with each of the 2 others, 6 pairs"),
    ],
)
def test_area(auc, words):
    members, others = np.array([3.0, 2.0, 1.0]), np.array([2.0, 0.0])
    note = check("2.3", auc, members, others)
    assert not note.passed and note.says.startswith(words), note
    assert check("2.3", 0.75, members, others).passed


def test_threshold():
    others, members = np.arange(40.0), np.array([5.0, 39.0, 39.5, 50.0, 60.0])
    assert check("2.4", 39.0, members, others).passed
    assert check("2.4", 39.2, members, others).passed  # accuses the same texts
    says = check("2.4", np.quantile(others, 0.99), members, others).says  # 38.61
    assert says.startswith("1 of 40 others score above 38.610, 2.5%, and 1% are allowed.")
    says = check("2.4", 55.0, members, others).says
    assert says == (
        "No other text is above 55.000, as it must be, but a lower threshold would still accuse "
        "none of them and find more than 20.0% of the members."
    )
    assert check("2.4", np.nan, members, others).says == "The threshold is not a number (NaN)."


@pytest.mark.parametrize(
    ("loss", "zipped", "words"),
    [
        (0.7, 0.99, "The baseline is left out: zlib has an area of 0.980 with a model that has no"),
        (0.2, 0.49, "You took a coin's 0.5 for the baseline. Without any training zlib reaches 0."),
        (-0.18, -0.01, "The sign is turned"),
        (0.18, 0.5, "For zlib you have 0.500; its area is 0.980 untrained and 0.990 at the end."),
    ],
)
def test_bought(loss, zipped, words):
    shift = pd.DataFrame({0: [0.52, 0.98], 240: [0.7, 0.99]}, index=["loss", "zlib"])
    note = check("2.5", pd.Series({"loss": loss, "zlib": zipped}), shift)
    assert not note.passed and note.says.startswith(words), note
    assert check("2.5", pd.Series({"zlib": 0.01, "loss": 0.18}), shift).passed
    assert check("2.5", 0.18, shift).says.startswith("It needs one number for each of loss, zlib")
