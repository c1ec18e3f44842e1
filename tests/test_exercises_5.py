"""Wrong answers of session 5, and what the reader is told of each."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from workbench.curvature import Basis
from workbench.workshop import check

# prices and shares recited of a sweep: K-FAC's second edit costs 21 %, chance's only 21 %
SWEEP = {
    "kfac": {0.9: (1.05, 0.5, 0.1), 0.8: (1.21, 0.0, 0.03)},
    "svd": {0.4: (1.05, 1.0, 0.4), 0.3: (1.21, 0.5, 0.3)},
    "random": {0.9: (1.21, 0.5, 0.9), 0.8: (1.44, 0.0, 0.8)},
}
TEXTS = 4


@pytest.fixture
def table():
    """A sweep over four texts, of which the first so many are recited, as ``SWEEP`` says."""
    rows = []
    for method, edits in {"none": {1.0: (1.0, 1.0, 1.0)}, **SWEEP}.items():
        for rho, (price, recited, kept) in edits.items():
            edit = {"run": "m", "step": 1, "method": method, "rho": rho}
            pooled = {"perplexity": 100 * price, "perplexity_ratio": price, "kept": kept}
            for metric, value in {**pooled, "recitation_strict": recited}.items():
                group = "recited" if metric == "recitation_strict" else "all"
                rows.append(
                    edit | {"group": group, "item": "all", "metric": metric, "value": value}
                )
            for n in range(TEXTS):
                verdict = {"group": "recited", "item": f"t{n}", "metric": "recitation_strict"}
                rows.append(edit | verdict | {"value": float(n < recited * TEXTS)})
    frame = pd.DataFrame(rows).assign(lo=np.nan, hi=np.nan, n=1)
    frame.loc[frame["item"] == "all", "n"] = TEXTS
    return frame


def told(name, *given) -> str:
    note = check(name, *given)
    assert not note.passed and note.kind == "not yet", note
    return note.says


def test_5_1_asks_for_baselines_first_and_then_for_one_price(table):
    def of(*methods):
        return table[table["method"].isin(methods)]

    assert told("5.1", of("none", "kfac"), "rho", table).startswith("A baseline left out: beside ")
    assert told("5.1", of("none", "kfac"), "perplexity", table).startswith("A baseline left out")
    assert told("5.1", of("kfac", "random"), "rho", table).startswith("The unedited model is no ")
    assert told("5.1", of("none", "kfac", "svd"), "perplexity", table) == (
        "kfac, svd are in it, both of them chosen with some care. The edit that tells what care is "
        "worth is still missing."
    )
    assert told("5.1", of("none", "kfac", "random"), "perplexity", table) == (
        "svd was measured and is not shown. Why leave it out?"
    )
    # at .9 K-FAC keeps a tenth of the components, chance nine tenths
    assert told("5.1", table, "rho", table) == (
        "The axis is the share kept, and each method counts it in another currency: at 0.9 the "
        "K-FAC edit keeps 10% of the components (with 90% of the curvature), the one by chance "
        "90% of them. What do all edits pay in?"
    )
    assert told("5.1", table, "kept", table).startswith("The figure knows no axis 'kept'")
    assert told("5.1", "kfac", "rho", table).startswith("It needs rows of table")
    assert check("5.1", table, "perplexity", table).passed


def test_5_2_knows_what_was_read_instead_of_the_price(table):
    # K-FAC: between 1.05 and 1.21, s = ln(1.10/1.05) / ln(1.21/1.05) = .046520/.141830 = .328,
    # so (1 - .328) .5 = .336. Chance: between 1 and 1.21 = 1.1 ** 2, s = .5, so 1 - .5 * .5 = .75
    assert check("5.2", 0.336, 0.75, table).passed
    assert told("5.2", 0.75, 0.336, table).startswith("The two are swapped")
    assert told("5.2", 0.5, 0.5, table) == (
        "You read both at the share 0.9. There the K-FAC edit costs 5% more perplexity and the one "
        "by chance 21%: that compares a scratch with an amputation."
    )
    # at 5 %: K-FAC .5; chance s = ln 1.05 / ln 1.21 = .25596, so 1 - .5 * .25596 = .872
    assert told("5.2", 0.5, 0.872, table) == (
        "That is what is left at 5% more perplexity, not at 10%."
    )
    assert told("5.2", 0.5, 0.75, table) == (
        "For kfac you took the edit nearest to the price; it costs 5.0%. Between two edits the "
        "number at 10% is interpolated."
    )
    assert told("5.2", 0.4, 0.75, table) == (
        "For kfac you have 0.400. The edits of kfac around that price cost 5.0%, 21.0%: the answer "
        "lies between what these two leave."
    )
    assert "around that price cost 0.0%, 21.0%" in told("5.2", 0.336, 0.9, table)
    assert told("5.2", table["value"], 0.75, table).startswith("More than one number came for a ")
    assert told("5.2", -0.4, 0.1, table).startswith("A share of texts is not negative")


@pytest.fixture
def basis():
    """Masses 6 3 0 / 4 2 0 of 15, C of ones but for a -2 at the mass 4."""
    return Basis(
        layer=SimpleNamespace(name="layer"),
        input_values=np.array([2.0, 1.0, 0.0]),
        input_vectors=torch.eye(3, dtype=torch.float64),
        output_values=np.array([3.0, 2.0]),
        output_vectors=torch.eye(2, dtype=torch.float64),
        coefficients=torch.tensor([[1.0, 1.0, 1.0], [-2.0, 1.0, 1.0]], dtype=torch.float64),
        clamped=0.0,
        hash="",
    )


def test_5_3_tells_a_share_of_the_mass_from_a_share_of_components(basis):
    # 6 + 4 = 10 of 15 are 67 %, with 3 it is 13, 87 %: three components hold 70 %
    right = np.array([[1, 1, 0], [1, 0, 0]], dtype=bool)
    assert check("5.3", right, basis, 0.7).passed
    assert check("5.3", right.astype(int), basis, 0.7).passed
    assert told("5.3", ~right, basis, 0.7).startswith("That is what the edit removes")
    assert told("5.3", right.T, basis, 0.7) == (
        "The mask lies on its side: rows are output directions, so its shape is (2, 3)."
    )
    assert "shape (2, 3); yours has (3,)" in told("5.3", np.ones(3), basis, 0.7)
    assert told("5.3", basis.masses, basis, 0.7).endswith("yours has other numbers in it.")
    assert told("5.3", np.ones((2, 3)), basis, 0.7).startswith("All are kept")
    short = np.array([[1, 0, 0], [1, 0, 0]], dtype=bool)
    assert told("5.3", short, basis, 0.7) == (
        "They are the sharpest, but a share of 0.033 of the mass is lacking to 70%: one more "
        "component is needed."
    )
    # of six components 70 % are 4.2: these four hold everything
    four = np.array([[1, 1, 0], [1, 1, 0]], dtype=bool)
    assert told("5.3", four, basis, 0.7) == (
        "You keep 70% of the components, which hold 100.00% of the mass. Asked are the fewest that "
        "hold 70% of the mass."
    )
    assert told("5.3", four, basis, 0.35) == (
        "They are the sharpest, and hold 100.000% of the mass: fewer would do. You keep 4 of 6."
    )
    flat = np.array([[0, 1, 0], [1, 1, 0]], dtype=bool)
    assert told("5.3", flat, basis, 0.7).startswith("Some component left out is sharper than some ")


def test_5_4_names_the_part_of_the_formula_that_is_wrong(basis):
    kept = np.array([[1, 1, 0], [0, 0, 0]], dtype=bool)
    # what goes: 4 with C = -2, 2 and 0 with C = 1, so .5 (16 + 2) = 9
    assert check("5.4", 9.0, basis, kept).passed
    assert check("5.4", torch.tensor(9.0), basis, kept).passed
    assert told("5.4", 18.0, basis, kept).startswith("The half is missing")
    assert told("5.4", 4.5, basis, kept).startswith(
        "That is the damage of removing what the edit k"
    )
    # masses alone: .5 (4 + 2) = 3; keeping but the first, .5 (4 + 3 + 2) = 4.5 where the squares
    # alone are .5 (4 + 1 + 1 + 1 + 1) = 4, and right is .5 (16 + 3 + 2) = 10.5
    assert told("5.4", 3.0, basis, kept).startswith("That is half the curvature mass that goes.")
    first = np.array([[1, 0, 0], [0, 0, 0]], dtype=bool)
    assert check("5.4", 10.5, basis, first).passed
    assert told("5.4", 4.0, basis, first).startswith("That is half the squared size of what goes")
    assert told("5.4", 2.25, basis, kept).startswith("The mean over components is not asked")
    assert told("5.4", 5.0, basis, kept).startswith("You took the coefficients themselves")
    assert told("5.4", 13.5, basis, kept).startswith("That is the damage of removing the whole lay")
    assert told("5.4", -9.0, basis, kept).startswith("Removing something from a minimum cannot ")
    assert told("5.4", 90.0, basis, kept) == (
        "You have 90 nats per token, which is 10 times as much as it should be."
    )


@pytest.fixture
def falls():
    """Two kinds; under K-FAC dose orders both kinds, under chance one of them."""
    prices = {  # of texts seen 1, 2, 3, and 4, 5, 6 times
        "kfac": (0.1, 0.2, 0.3, 0.01, 0.02, 0.03),
        "random": (0.1, 0.2, 0.3, 0.03, 0.01, 0.02),
    }
    rows = [
        {"run": "m", "step": 1, "group": "recited", "item": f"t{n}", "metric": "fall_price",
         "value": value, "lo": value / 1.01, "hi": value, "n": 1, "method": method,
         "event": "lost", "dose": n + 1.0, "kind": "ab"[n // 3]}
        for method, values in prices.items() for n, value in enumerate(values)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_5_5_wants_the_baseline_and_pairs_of_one_kind(falls):
    # within kinds: K-FAC 6 of 6 pairs in order, 1; chance 3 + 1 in order and 2 against, 1/3
    assert check("5.5", 1 - 1 / 3, falls).passed
    assert told("5.5", 1.0, falls).startswith("A baseline left out")
    assert told("5.5", 1 / 3, falls).startswith("That is the edit by chance alone")
    assert told("5.5", 1 / 3 - 1, falls).startswith("The sign is turned")
    # over all 15 pairs: the 9 between kinds are against, so K-FAC (6 - 9) / 15 = -.2 and chance
    # (2 - 9) / 15 = -.467
    assert told("5.5", -0.2, falls).startswith("A baseline left out")
    assert told("5.5", -7 / 15, falls).startswith("That is the edit by chance alone")
    assert told("5.5", 4 / 15, falls).startswith("Pairs of different kinds are among yours")
    assert told("5.5", 0.7, falls).startswith("You have 0.700")


def test_5_6_takes_chance_off_on_both_sides():
    edit = {"metric": "accuracy", "item": "all", "chance": 0.2}
    skills = pd.DataFrame(
        [
            edit | {"group": "closed_book", "method": "none", "rho": 1.0, "value": 1.0},
            edit | {"group": "closed_book", "method": "kfac", "rho": 0.8, "value": 0.5},
            edit | {"group": "closed_book", "method": "kfac", "rho": 0.95, "value": 0.9},
            edit | {"group": "copy", "method": "kfac", "rho": 0.8, "value": 0.1},
        ]
    )
    # (.5 - .2) / (1 - .2) = .375
    assert check("5.6", 0.375, skills, 0.8).passed
    # before 1.0, the accuracy and its share of it are one number, .5
    assert told("5.6", 0.5, skills, 0.8).startswith("A floor read as a result: whoever guesses ")
    assert told("5.6", 0.625, skills, 0.8).startswith("That is the share lost")
    assert told("5.6", 0.9, skills, 0.8) == (
        "You have 0.900. Accuracy was 1.000, is 0.500, and guessing gives 0.200."
    )
    half = skills.assign(value=skills["value"].where(skills["method"] != "none", 0.8))
    # was .8: right is .3 / .6 = .5; .5 / .8 = .625, .3 / .8 = .375, .5 - .2 = .3
    assert told("5.6", 0.625, half, 0.8).startswith("A floor read as a result")
    assert told("5.6", 0.375, half, 0.8) == "Chance is taken off after the edit, but not before it."
    assert told("5.6", 0.3, half, 0.8).startswith("That is what is left above chance, in points")
