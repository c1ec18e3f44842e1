"""Session 1: each judge knows the right answer from the mistakes that are made, and names them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.stats.floors import floor_zone
from workbench.table import rows
from workbench.workshop import check


@pytest.fixture(scope="module")
def final():
    """Two kinds: biographies .6, .8 seen and .5, .7 never; canaries .2, .4 seen and 0, .2 never."""
    groups = ["seen", "seen", "never", "never"] * 2
    kinds = ["biography"] * 4 + ["canary"] * 4
    values = [0.6, 0.8, 0.5, 0.7, 0.2, 0.4, 0.0, 0.2]
    names = [f"i{n}" for n in range(8)]
    made = rows("top1", values, run="r", group=groups, item=names, beside={"kind": kinds})
    # another metric beside it, which must not be read
    other = rows("log_probability", [-9.0] * 8, run="r", group=groups, item=names)
    return pd.concat([made, other.assign(kind=kinds)], ignore_index=True)


def series(biography, canary):
    return pd.Series({"biography": biography, "canary": canary})


# means: seen .7 and .3, never .6 and .1, so .1 and .2 are memory; all never together .35
@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (series(0.7, 0.3), "A floor read as a result: of the biography texts that were in no tra"),
        (series(-0.1, -0.2), "The sign is turned"),
        (series(0.6, 0.1), "That is the floor itself"),
        (series(0.35, -0.05), "You took one floor for all kinds"),
        (series(0.1, 0.5), "For canary you have 0.500. The trained texts of that kind get 0.300 r"),
        (pd.Series({"seen": 0.1}), "It needs one number for each of biography, canary"),
        (0.1, "It needs one number for each of biography, canary"),
        (series(np.nan, 0.2), "There is no number for biography (NaN)."),
    ],
)
def test_memory(final, memory, words):
    note = check("1.1", memory, final)
    assert not note.passed and note.says.startswith(words), note


def test_memory_right(final):
    assert check("1.1", series(0.1, 0.2), final).passed
    assert check("1.1", series(0.1, 0.2)[::-1].round(2), final).passed  # by name, not by place
    assert "the model gets 60% of the tokens" in check("1.1", series(0.7, 0.3), final).says


@pytest.fixture
def doses():
    """Row 0 in its zone below the mean, 1 above the mean, 2 on the edge, 3 above with its interval, 4 far above."""
    return pd.DataFrame(
        {
            "kind": ["a", "a", "a", "b", "b"],
            "dose": [1, 2, 4, 1, 2],
            "value": [0.1, 0.25, 0.3, 0.28, 0.9],
            "lo": [0.0, 0.1, 0.2, 0.21, 0.8],
            "floor": 0.2,
            "floor_lo": 0.05,
            "floor_hi": 0.3,
        }
    )


def test_above(doses):
    assert check("1.2", doses[doses["value"] > doses["floor_hi"]], doses).passed
    mean = check("1.2", doses[doses["value"] > doses["floor"]], doses).says
    assert mean.startswith("You compare with the controls' mean. a, 2 exposures: 0.250, and the")
    interval = check("1.2", doses[doses["lo"] > doses["floor"]], doses).says
    assert interval.startswith("You compare the interval of the trained texts with the controls'")
    assert "b, 1 exposures: 0.280, and the zone is 0.050 to 0.300" in interval
    edge = check("1.2", doses[doses["value"] >= doses["floor_hi"]], doses).says
    assert edge == (
        "a, 4 exposures: 0.300, and the zone is 0.050 to 0.300: it lies inside, and is no "
        "evidence of memory."
    )
    none = check("1.2", doses.iloc[:0], doses).says
    assert none.startswith("1 are missing. b, 2 exposures: 0.900")
    assert check("1.2", doses["value"], doses).says.startswith("It needs rows of doses")
    strange = doses.iloc[[4]].assign(dose=512)
    assert "There is no b with 512 exposures" in check("1.2", strange, doses).says


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        # seen -5.0 to -4.0, never -4.5 to -4.25: gains 1 and .25, effect .75; afterwards .25 apart
        (1.0, "A baseline left out: 1.00 is what the trained texts gained, but the texts that nob"),
        (0.25, "You compare the two groups afterwards only"),
        (-0.75, "The sign is turned"),
        (4.0, "You have 4.000 nats per token. The trained texts gained 1.000"),
        ("much", "This cannot be judged (ValueError: could not convert string to float: 'much')."),
    ],
)
def test_effect(effect, words):
    gains = pd.DataFrame({56: [-4.5, -5.0], 112: [-4.25, -4.0]}, index=["never", "seen"])
    note = check("1.3", effect, gains)
    assert not note.passed and note.says.startswith(words), note
    assert check("1.3", 0.75, gains).passed and check("1.3", 0.7504, gains).passed


def test_clean():
    offered = pd.DataFrame({"item": list("abcd"), "text": ["t"] * 4})
    shared = pd.DataFrame({"item": list("abcd"), "value": [0.0, 0.0, 0.4, 1.0]})

    def says(items):
        return check("1.4", offered[offered["item"].isin(list(items))], offered, shared).says

    assert check("1.4", offered.iloc[[1, 0]], offered, shared).passed
    assert says("abcd") == "All 4 are still there, and 2 of them stand in the training text."
    assert says("cd").startswith("You kept those that the model has met")
    assert says("abc").startswith("You dropped the 1 that stand there as a whole; 1 more stand")
    assert says("abd").startswith("d is still there")
    assert says("a").startswith("You dropped too much: b shares no 13 words")
    assert check("1.4", shared, offered, shared).says.startswith("It needs the texts that are left")


def test_needed():
    controls, n = np.zeros(40), 114
    high = floor_zone(controls, n, metric="extractable")[2]
    assert round(high * n) == 8  # by the beta-binomial's quantile, Beta(.5, 40.5)
    assert check("1.5", 9, controls, n).passed
    for wrong, words in {
        1: "Not one of 40 controls came out",
        0: "Not one of 40 controls came out",
        0.0702: "That is a share; how many of the 114 texts",
        8: "8 of 114 is the edge of the zone and still inside",
        8.5: "8.5 texts is no whole number",
        4: "You counted in 40 texts, the controls",
        5: "5 is too few: that many, untrained texts might give.",
        11: "11 is too many: fewer suffice.",
    }.items():
        note = check("1.5", wrong, controls, n)
        assert not note.passed and note.says.startswith(words), note
