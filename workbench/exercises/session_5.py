"""Curvature and editing."""

from __future__ import annotations

import numpy as np
import pandas as pd

from workbench.curvature import component_mask
from workbench.stats.falls import fall_ranks
from workbench.stats.frontier import matched_frontier
from workbench.workshop import Exercise

CLOSE = 2e-3  # answers may be rounded
PRICE, OTHERS = 1.10, (1.02, 1.05, 1.20)  # perplexity over that of the unedited model
CHANCE, NONE = "random", "none"


def judge_figure(drawn, axis, table) -> str:
    """``drawn`` the rows of ``table`` in the figure, ``axis`` its x axis."""
    if not isinstance(drawn, pd.DataFrame) or "method" not in drawn.columns:
        return "It needs rows of table, those with the methods that the figure is to show."
    shown = set(drawn.loc[drawn["metric"] == "recitation_strict", "method"].astype(str))
    there = set(table.loc[table["metric"] == "recitation_strict", "method"].astype(str))
    if NONE not in shown:
        return "The unedited model is no longer in it, so nobody sees where the lines begin."
    if len(shown) < 3:
        return (
            f"A baseline left out: beside the unedited model there is only {', '.join(shown - {NONE})}. "
            "Any edit ends recitation if it is strong enough. What would an edit do that knows "
            "nothing about curvature?"
        )
    if CHANCE not in shown:
        return (
            f"{', '.join(sorted(shown - {NONE}))} are in it, both of them chosen with some care. "
            "The edit that tells what care is worth is still missing."
        )
    if missing := sorted(there - shown):
        return f"{', '.join(missing)} was measured and is not shown. Why leave it out?"
    if axis == "rho":
        kept = _pooled(table, "kept")
        at = max(set(kept["kfac"].index) & set(kept[CHANCE].index))
        return (
            f"The axis is the share kept, and each method counts it in another currency: at {at:g} "
            f"the K-FAC edit keeps {kept['kfac'][at]:.0%} of the components (with {at:.0%} of the "
            f"curvature), the one by chance {kept[CHANCE][at]:.0%} of them. What do all edits pay in?"
        )
    if axis != "perplexity":
        return f"The figure knows no axis {axis!r}: its x is rho, the share kept, or perplexity."
    return ""


def judge_price(kfac_left, random_left, table) -> str:
    """What is recited after two kinds of edit, read at 10 % more perplexity."""
    if np.ndim(kfac_left) or np.ndim(random_left):
        return (
            "More than one number came for a method: beside what is recited (recitation_strict) the "
            "frontier tells of the difference to svd."
        )
    got = float(kfac_left), float(random_left)
    at = {ratio: _at_price(table, ratio) for ratio in (PRICE, *OTHERS)}
    truth = at[PRICE]
    if _same(got, truth):
        return ""
    if _same(got, truth[::-1]):
        return "The two are swapped: the edit by chance would be the better one."
    for ratio in OTHERS:
        if _same(got, at[ratio]):
            return (
                f"That is what is left at {ratio - 1:.0%} more perplexity, not at {PRICE - 1:.0%}."
            )
    price, recited = _pooled(table, "perplexity_ratio"), _pooled(table, "recitation_strict")
    for share in sorted(set(price["kfac"].index) & set(price[CHANCE].index)):
        if _same(got, (recited["kfac"][share], recited[CHANCE][share])):
            return (
                f"You read both at the share {share:g}. There the K-FAC edit costs "
                f"{price['kfac'][share] - 1:.0%} more perplexity and the one by chance "
                f"{price[CHANCE][share] - 1:.0%}: that compares a scratch with an amputation."
            )
    if min(got) < 0:
        return "A share of texts is not negative; did you take the rows of the difference to svd?"
    for name, mine, right in zip(("kfac", CHANCE), got, truth, strict=True):
        steps = price[name]
        near = (steps - PRICE).abs().idxmin()
        if abs(mine - right) > CLOSE and abs(mine - recited[name][near]) < CLOSE:
            return (
                f"For {name} you took the edit nearest to the price; it costs {steps[near] - 1:.1%}. "
                f"Between two edits the number at {PRICE - 1:.0%} is interpolated."
            )
        if abs(mine - right) > CLOSE:
            return (
                f"For {name} you have {mine:.3f}. The edits of {name} around that price cost "
                f"{', '.join(f'{ratio - 1:.1%}' for ratio in _around(steps))}: the answer lies "
                "between what these two leave."
            )
    return ""


def judge_mask(kept, basis, rho) -> str:
    """``kept`` as a mask over the components: output direction by input direction."""
    got, shape = np.asarray(kept), basis.masses.shape
    if got.shape == shape[::-1] != shape:
        return f"The mask lies on its side: rows are output directions, so its shape is {shape}."
    if got.shape != shape:
        return (
            f"It needs one verdict a component, an array of shape {shape}; yours has {got.shape}."
        )
    if not set(np.unique(got)) <= {0, 1}:
        return "A component is kept (True) or not (False); yours has other numbers in it."
    got, truth, mass = got.astype(bool), component_mask(basis, method="kfac", rho=rho), basis.masses
    if (got == truth).all():
        return ""
    held = mass[got].sum() / mass.sum()
    if (got == ~truth).all():
        return "That is what the edit removes; asked is what it keeps."
    if got.all():
        return "All are kept, so that nothing is edited."
    outside = mass[~got].max()
    if not got.any() or mass[got].min() < outside * (1 - 1e-9):
        return (
            f"Some component left out is sharper than some that is kept: together they hold "
            f"{held:.1%} of the mass, with {got.sum():,} components. The fewest that hold so much "
            "are the largest."
        )
    if abs(got.sum() - rho * got.size) <= 1:
        return (
            f"You keep {rho:.0%} of the components, which hold {held:.2%} of the mass. Asked are the "
            f"fewest that hold {rho:.0%} of the mass."
        )
    if got.sum() < truth.sum():
        one = "one more component is needed" if got.sum() == truth.sum() - 1 else "more are needed"
        return (
            f"They are the sharpest, but a share of {rho - held:.2g} of the mass is lacking to "
            f"{rho:.0%}: {one}."
        )
    return (
        f"They are the sharpest, and hold {held:.3%} of the mass: fewer would do. You keep "
        f"{got.sum():,} of {got.size:,}."
    )


def judge_damage(damage, basis, kept) -> str:
    """The second-order rise of the loss when all components but ``kept`` are set to 0."""
    squares, mass = np.square(basis.coefficients.cpu().numpy()), basis.masses
    got, gone = float(damage), ~np.asarray(kept, dtype=bool)
    truth = 0.5 * (squares * mass)[gone].sum()
    wrong = {
        "The half is missing: the second-order term of a Taylor series carries one.": 2 * truth,
        "That is the damage of removing what the edit keeps, and keeping what it removes.": 0.5
        * (squares * mass)[~gone].sum(),
        "That is half the curvature mass that goes. How much the loss rises also depends on how far "
        "each component moves, from C to 0.": 0.5 * mass[gone].sum(),
        "That is half the squared size of what goes: as if the loss bent alike in all directions.": 0.5
        * squares[gone].sum(),
        "You took the coefficients themselves; a move of -C costs as much as one of C.": 0.5
        * (np.sqrt(squares) * mass)[gone].sum(),
        "The mean over components is not asked: what each of them costs adds up.": 0.5
        * (squares * mass)[gone].mean(),
        "That is the damage of removing the whole layer, what is kept included.": 0.5
        * (squares * mass).sum(),
    }
    if np.isclose(got, truth, rtol=0.01, atol=0):
        return ""
    for told, value in wrong.items():
        if np.isclose(got, value, rtol=0.01, atol=0):
            return told
    if got < 0:
        return "Removing something from a minimum cannot lower the loss; here it comes out below 0."
    return f"You have {got:.3g} nats per token, which is {got / truth:.3g} times as much as it should be."


def judge_extra(extra, falls) -> str:
    """By how much the K-FAC edit spares often seen texts more than an edit by chance does."""
    within, over = _ranks(falls, ["kind"]), _ranks(falls, [])
    got, truth = float(extra), within["kfac"] - within[CHANCE]
    if abs(got - truth) < CLOSE:
        return ""
    if abs(got - within["kfac"]) < CLOSE or abs(got - over["kfac"]) < CLOSE:
        return (
            "A baseline left out: that is the rank correlation under the K-FAC edit. Texts seen more "
            "often may stand longer under any damage. What is it under an edit by chance?"
        )
    if abs(got - within[CHANCE]) < CLOSE or abs(got - over[CHANCE]) < CLOSE:
        return "That is the edit by chance alone; what has the K-FAC edit beyond it?"
    if abs(got + truth) < CLOSE:
        return "The sign is turned: chance less K-FAC."
    if abs(got - (over["kfac"] - over[CHANCE])) < CLOSE:
        return (
            "Pairs of different kinds are among yours. Which random strings and which sentences are "
            "recited at all depends on how often they were seen, so the kinds differ in dose as well."
        )
    return f"You have {got:.3f}; the two rank correlations it is made of lie between -1 and 1."


def judge_left(left, skills, rho) -> str:
    """The share of closed-book knowledge that an edit leaves, above chance."""
    rows = skills[(skills["metric"] == "accuracy") & (skills["item"] == "all")]
    rows = rows[rows["group"].astype(str) == "closed_book"]
    before, after = (
        rows[rows["method"] == NONE],
        rows[(rows["method"] == "kfac") & np.isclose(rows["rho"], rho)],
    )
    chance = before["chance"].item()
    was, now = before["value"].item(), after["value"].item()
    got, truth = float(left), (now - chance) / (was - chance)
    if abs(got - truth) < 5e-3:
        return ""
    if abs(got - now / was) < 5e-3:
        return (
            f"A floor read as a result: whoever guesses among the choices is right in {chance:.0%}, "
            "and no edit can take that away. How much of what was above it is still there?"
        )
    if abs(got - now) < 5e-3:
        return "That is the accuracy after the edit. Of how much, and how much of it is guessing?"
    if abs(got - (now - chance)) < 5e-3:
        return "That is what is left above chance, in points. What share is it of what there was?"
    if abs(got - (1 - truth)) < 5e-3:
        return "That is the share lost; asked is the share that is left."
    if abs(got - (now - chance) / was) < 5e-3:
        return "Chance is taken off after the edit, but not before it."
    return f"You have {got:.3f}. Accuracy was {was:.3f}, is {now:.3f}, and guessing gives {chance:.3f}."


def _pooled(table: pd.DataFrame, metric: str) -> dict[str, pd.Series]:
    """A metric pooled over the texts, by method a series over the shares kept."""
    rows = table[(table["metric"] == metric) & (table["item"] == "all")]
    rows = rows.astype({"method": str})
    return {name: part.set_index("rho")["value"] for name, part in rows.groupby("method")}


def _at_price(table: pd.DataFrame, ratio: float) -> tuple[float, float]:
    found = matched_frontier(table, ratios=(ratio,))
    found = found[found["metric"] == "recitation_strict"].astype({"method": str})
    value = found.set_index("method")["value"]
    return value["kfac"], value[CHANCE]


def _around(prices: pd.Series) -> tuple[float, float]:
    """Of the edits, those just below and just above the price."""
    ordered = [1.0, *prices.sort_index(ascending=False)]  # from the gentlest on
    above = next(at for at, ratio in enumerate(ordered) if ratio >= PRICE)
    return ordered[above - 1], ordered[above]


def _ranks(falls: pd.DataFrame, strata: list[str]) -> pd.Series:
    return fall_ranks(falls, ["dose"], strata=strata, draws=1).set_index("method")["value"]


def _same(got: tuple[float, float], other: tuple[float, float]) -> bool:
    return bool(np.allclose(got, other, atol=CLOSE))


EXERCISES = {
    "5.1": Exercise(
        needs='rows of table, and "rho" or "perplexity"',
        judge=judge_figure,
        right=(
            "Now each line can be read at one price, beside what an edit by chance leaves there: "
            "that, and not the fall as such, is evidence."
        ),
        hints=(
            "What does the draft compare the edit with? And what does it hold constant?",
            "Four methods are in table: none, kfac, svd and random. Draw them all; and look at what "
            "plot_edit_sweep offers for x.",
            'drawn = table and axis = "perplexity".',
        ),
    ),
    "5.2": Exercise(
        needs="two shares of the texts, from 0 to 1",
        judge=judge_price,
        right="At one price the K-FAC edit leaves a few per cent, chance most: that is the effect.",
        hints=(
            "No edit of the sweep costs just 10 %: it lies between two of them.",
            "`matched_frontier(table, ratios=[1.10])` reads every sweep there; its rows of "
            "recitation_strict are what you want, those of difference are not.",
            'left = matched_frontier(...), keep left["metric"] == "recitation_strict", '
            'set_index("method")["value"], and take ["kfac"] and ["random"].',
        ),
    ),
    "5.3": Exercise(
        needs="a mask, an array of True and False as large as basis.masses",
        judge=judge_mask,
        right="These are the components the edit keeps: few, and in one corner of the two spectra.",
        hints=(
            "Sort the components by mass, the sharpest first, and add up.",
            "np.sort(mass, axis=None)[::-1], np.cumsum, and the first place where the sum reaches "
            "rho times the whole: the mass that stands there is the threshold.",
            "ordered = np.sort(mass, axis=None)[::-1]; last = np.searchsorted(np.cumsum(ordered), "
            "rho * ordered.sum()); keep mass >= ordered[last].",
        ),
    ),
    "5.4": Exercise(
        needs="one number, in nats per token",
        judge=judge_damage,
        right="So much should the loss rise by this layer's edit, if the curvature were all.",
        hints=(
            "Read the formula from the right: which components does the sum run over?",
            "`basis.coefficients` is C (a torch tensor; .numpy() makes an array), `~mask` is what "
            "goes, and the square is of C.",
            "0.5 * (C**2 * basis.masses)[~mask].sum()",
        ),
    ),
    "5.5": Exercise(
        needs="one number, a difference of two rank correlations",
        judge=judge_extra,
        right=(
            "Next to nothing: texts seen more often stand longer under any damage, and this says "
            "nothing about curvature."
        ),
        hints=(
            "Would texts seen more often not stand longer under any edit?",
            "The table `ranks` has a row for each method. Which two do you need?",
            'by = ranks.set_index("method")["value"]; by["kfac"] - by["random"]',
        ),
    ),
    "5.6": Exercise(
        needs="one number, a share",
        judge=judge_left,
        right="So much is left of what the model could answer beyond guessing.",
        hints=(
            "What would a model score that knows nothing?",
            "The column chance says it. Take it off before and after the edit.",
            "(after - chance) / (before - chance)",
        ),
    ),
}
