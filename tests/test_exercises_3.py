"""Answers to the exercises of session 3, wrong in the ways readers are wrong, and then right."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench import fit_forgetting, rows
from workbench.workshop import check


@pytest.fixture
def followed() -> pd.DataFrame:
    """Two texts, from -5 before to -3 after, beside controls that went from -4 to -3.5 or -3."""
    return pd.DataFrame(
        {
            "item": ["a", "b"],
            "value": [-3.0, -3.0],
            "before": [-5.0, -5.0],
            "control": [-3.5, -3.0],
            "control_before": [-4.0, -4.0],
        }
    )


def test_a_baseline_left_out(followed):
    # own change 2 and 2, the controls' .5 and 1: 1.5 and 1 are left
    v, b, c, cb = (followed[k] for k in ("value", "before", "control", "control_before"))
    assert check("3.1", (v - b) - (c - cb), followed).passed
    assert check("3.1", [1.5, 1.0], followed).passed
    assert not check("3.1", [1.5, 1.01], followed).passed
    wrong = {
        "the texts themselves gained since before they were trained on. Over the same updates texts "
        "that were never trained on gained up to 1.0 nats": v - b,
        "compares levels at one checkpoint": v - c,
        "(here they differ by up to 1.0 nats)": v - c,
        "where the controls stand, not how far they have come": v - b - c,
        "sign is turned round": (c - cb) - (v - b),
        "controls' change is added": (v - b) + (c - cb),
        "controls' change alone": c - cb,
        "four columns are needed": v + b,
        "This is a table": followed,
        "shape (1,); the curve needs one for each of the 2 rows": [1.5],
    }
    for told, answer in wrong.items():
        note = check("3.1", answer, followed)
        assert not note.passed and told in note.says, note


@pytest.fixture
def texts() -> pd.DataFrame:
    """Texts a and b at lags 0, 1 and 10, c at 0 and 1 alone."""
    seen = [("a", 0), ("a", 1), ("a", 10), ("b", 0), ("b", 1), ("b", 10), ("c", 0), ("c", 1)]
    return pd.DataFrame(seen, columns=["item", "lag"]).assign(value=1.0)


def test_the_same_texts_at_every_lag(texts):
    assert check("3.2", texts[texts["item"] != "c"], texts).passed
    wrong = {
        "1 of the 3 texts are still there at some lags only, such as c at 2 of 3": texts,
        "The lags 10 are gone": texts[texts["lag"] < 10],
        "Of 2 texts that are there at every lag you have 1": texts[texts["item"] == "a"],
        "No row is left": texts[:0],
        "You have 5 rows for 6 points": texts[texts["item"] != "c"][1:].assign(
            lag=[1, 10, 0, 1, 10]
        ),
    }
    for told, answer in wrong.items():
        note = check("3.2", answer, texts)
        assert not note.passed and told in note.says, note


def test_a_text_lost_at_some_lag_by_the_reader(texts):
    # b without lag 1: all lags are left and no partial text, but a point of b is gone
    answer = texts[(texts["item"] != "c") & ~((texts["item"] == "b") & (texts["lag"] == 1))]
    assert check("3.2", answer, texts).says == "You have 5 rows for 6 points."


def test_akaike_weights():
    # differences 0, 2, 4: supports 1, e^-1, e^-2 = 1, .3679, .1353, of 1.5032
    aicc = pd.Series([-10.0, -8.0, -6.0], index=["power", "exponential", "logarithm"])
    assert check("3.3", [0.6652, 0.2447, 0.0900], aicc).passed
    assert check("3.3", pd.Series([0.67, 0.24, 0.09], index=aicc.index), aicc).passed
    turned = pd.Series([0.09, 0.6652, 0.2447], index=["logarithm", "power", "exponential"])
    assert check("3.3", turned, aicc).passed  # names count, not the order
    above = aicc - aicc.min()
    wrong = {
        "proportions are right, but they add up to 1.5.": np.exp(-above / 2),
        "the best law gets too much": np.exp(-above) / np.exp(-above).sum(),
        "The largest weight goes to logarithm, though power has": np.exp(above / 2)
        / np.exp(above / 2).sum(),
        "a difference of 2 in the criterion has to": aicc / aicc.sum(),
        "proportions are right, but they add up to 223. ": np.exp(-aicc / 2),
        "They add up to 24; shares": -aicc,
        "shape (2,); there are 3 laws": [0.5, 0.5],
    }
    for told, answer in wrong.items():
        note = check("3.3", answer, aicc)
        assert not note.passed and told in note.says, note


def test_a_mean_of_exponentials():
    lags = np.array([0, 1, 2, 5, 10, 20, 50, 100])
    parts = [
        rows("memorization", np.exp(-lags / s), run="r", item=f"t{i}", beside={"lag": lags})
        for i, s in enumerate([5, 5, 200, 200])
    ]
    fits = fit_forgetting(
        pd.concat(parts, ignore_index=True), laws=["exponential", "power", "logarithm"], draws=0
    )
    assert check("3.4", "power", fits).passed and check("3.4", " Power ", fits).passed
    wrong = {
        "exponential": "Each text is exponential, but their mean is not: it gets a weight of 0.00",
        "logarithm": "though it too falls fast and then slowly",
        "wickelgren": "No law 'wickelgren' was fitted; there are exponential, logarithm, power.",
    }
    for answer, told in wrong.items():
        note = check("3.4", answer, fits)
        assert not note.passed and told in note.says, note


def test_half_lives_that_were_measured():
    # nobody looked later than 100: a and f are measured (f to its edge), b's interval is not, c
    # lies beyond, d has none, e never halves
    halves = pd.DataFrame(
        {
            "group": list("abcdef"),
            "value": [20.0, 40.0, 105.0, 9.0, np.inf, 90.0],
            "hi": [40.0, 122.0, 1006.0, np.nan, np.inf, 100.0],
        }
    )
    assert check("3.5", ["f", "a"], halves, 100.0).passed
    assert check("3.5", halves.loc[halves["hi"] <= 100, "group"], halves, 100.0).passed
    wrong = {
        "c has a half-life of 105.0 updates, and nobody looked later than 100": list("abcdf"),
        "d has an estimate of 9, but no interval at all": list("abdf"),
        "b has a point estimate of 40, but its interval ends at 122": list("abf"),
        "e has a half-life of inf updates": list("aef"),
        "Measured too, and not in your list: f. Its whole interval ends by 100": ["a"],
        "There is no curve 'x'": ["a", "x"],
        "This is one name": "a",
        "This is a table; the names": halves,
        "not in your list: a": [],
    }
    for told, answer in wrong.items():
        note = check("3.5", answer, halves, 100.0)
        assert not note.passed and told in note.says, note
