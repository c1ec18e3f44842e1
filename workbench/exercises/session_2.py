"""Extraction and membership."""

from __future__ import annotations

import numpy as np
import pandas as pd

from workbench.stats.membership import area_under_curve, tpr_at_fpr
from workbench.workshop import Exercise

CLOSE = 2e-3  # answers may be rounded
RATE = 0.01  # of false accusations that exercise 2.4 allows


def judge_matrix(table, found, accused, member, said) -> str:
    """``table`` of counts, the two rates read off it, and the verdicts it counts."""
    true = {
        (t, s): int(((member == (t == "member")) & (said == (s == "member"))).sum())
        for t in ("other", "member")
        for s in ("other", "member")
    }
    got = {key: _cell(table, *key) for key in true}
    turned = {(t, s): true[s, t] for t, s in true}
    members, others = int(member.sum()), int((~member).sum())
    if got != true:
        row = got["member", "other"] + got["member", "member"]
        if got == turned:
            return (
                f"What is true and what was said have changed places: the table holds {row} texts "
                f"that are truly members, and there are {members}. The rate of members found that "
                "comes of it is really the share of the accused who are members."
            )
        return (
            f"The counts are not those of the {members} members and {others} others: the table "
            f"holds {row} that are truly members and {sum(got.values())} texts in all."
        )
    rates = true["member", "member"] / members, true["other", "member"] / others
    if abs(found - rates[0]) > CLOSE:
        return (
            f"The table is right, but {found:.1%} is not the share of the {members} members that "
            "were said to be members. By what do you divide?"
        )
    if abs(accused - rates[1]) > CLOSE:
        return (
            f"The table and the members found are right; {accused:.1%} is not the share of the "
            f"{others} others that were said to be members."
        )
    return ""


def judge_tries(tries, p_z) -> str:
    """``tries`` draws give a text of probability ``p_z`` a draw with probability one half."""
    got = float(tries)
    right = int(np.ceil(np.log(0.5) / np.log1p(-p_z)))
    if got == right:
        return ""
    if not got >= 1:
        return f"{got:.3g} draws are no number of draws. Is there a sign to turn?"
    reached = 1 - (1 - p_z) ** got
    if abs(got - 1 / p_z) < 1:
        return (
            f"1 / p_z is how many draws it takes on average; with {got:.0f} it comes out with "
            f"probability {reached:.2f} already, because a few long waits pull the mean up."
        )
    if abs(got - 0.5 / p_z) < 1:
        return (
            f"You added the probabilities of the draws, but several draws may give it at once: "
            f"after {got:.0f} it has come out with probability {reached:.2f} only."
        )
    if got != int(got):
        return f"{got:.2f} is no whole number of draws; does rounding down still reach one half?"
    if got < right:
        return f"After {got:.0f} draws it has come out with probability {reached:.3f}: too few."
    return f"{got:.0f} are enough (probability {reached:.3f}), but fewer are too."


def judge_area(auc, members, others) -> str:
    """``auc`` by comparing each of ``members`` with each of ``others``, ties one half."""
    got, right = float(auc), area_under_curve(members, others)
    gap = members[:, None] - others
    if abs(got - right) < CLOSE:
        return ""
    if abs(got - (1 - right)) < CLOSE:
        return "The sides are exchanged: this is how often one of the others scores higher."
    for share, how in (((gap > 0).mean(), "against"), ((gap >= 0).mean(), "for")):
        if abs(got - share) < CLOSE:
            return (
                f"{(gap == 0).mean():.1%} of the pairs are ties, and you count them all {how} the "
                "attack. One that cannot tell two texts apart should get what a coin gets."
            )
    if not 0 <= got <= 1:
        return f"{got:.3g} is no probability. There are {gap.size} pairs, not {len(members)} texts."
    return (
        f"You have {got:.3f}. Compare each of the {len(members)} members with each of the "
        f"{len(others)} others, {gap.size} pairs in all."
    )


def judge_threshold(threshold, members, others) -> str:
    """``threshold`` accuses as many members as it can at a rate of false accusations of 1 %."""
    limit = float(threshold)
    if np.isnan(limit):
        return "The threshold is not a number (NaN)."
    accused, found = int((others > limit).sum()), (members > limit).mean()
    if accused > RATE * len(others):
        return (
            f"{accused} of {len(others)} others score above {limit:.3f}, {accused / len(others):.1%}"
            f", and {RATE:.0%} are allowed. With so few texts, what is the only rate below that?"
        )
    if found < tpr_at_fpr(members, others, RATE):
        return (
            f"No other text is above {limit:.3f}, as it must be, but a lower threshold would still "
            f"accuse none of them and find more than {found:.1%} of the members."
        )
    return ""


def judge_bought(bought, shift) -> str:
    """``shift`` holds areas by score, its columns an untrained and the trained checkpoint."""
    if not isinstance(bought, pd.Series) or set(bought.index) != set(shift.index):
        return f"It needs one number for each of {', '.join(shift.index)}, a Series by score."
    before, after = shift.columns
    got, best = bought.astype(float).reindex(shift.index), shift[after].idxmax()
    if np.allclose(got, shift[after] - shift[before], atol=CLOSE):
        return ""
    if np.allclose(got, shift[after], atol=CLOSE):
        return (
            f"The baseline is left out: {best} has an area of {shift.loc[best, before]:.3f} with a "
            "model that has not seen a single text. Whatever it reads, it is not memory."
        )
    if np.allclose(got, shift[after] - 0.5, atol=CLOSE):
        return (
            f"You took a coin's 0.5 for the baseline. Without any training {best} reaches "
            f"{shift.loc[best, before]:.3f}: the texts themselves differ."
        )
    if np.allclose(got, shift[before] - shift[after], atol=CLOSE):
        return "The sign is turned: training would have made members harder to tell."
    worst = (got - (shift[after] - shift[before])).abs().idxmax()
    return (
        f"For {worst} you have {got[worst]:.3f}; its area is {shift.loc[worst, before]:.3f} "
        f"untrained and {shift.loc[worst, after]:.3f} at the end."
    )


def _cell(table: pd.DataFrame, truth: str, said: str) -> int:
    """A count, whether what is true stands in the rows or in the columns."""
    if f"truly {truth}" in table.index:
        return int(table.loc[f"truly {truth}", f"said {said}"])
    return int(table.loc[f"said {said}", f"truly {truth}"])


EXERCISES = {
    "2.1": Exercise(
        needs="the table of counts and the two rates",
        judge=judge_matrix,
        right=(
            "About a third of the members found at one false accusation in ten: better than a coin, and "
            "no headline."
        ),
        hints=(
            "The threshold was set so that a tenth of the others score above it. What does the "
            "cell say of how many others it accuses?",
            "Add up the rows of the table. How many members are there, how many others? Then look "
            "up in which order `confusion_matrix` takes its two arguments.",
            "confusion_matrix(y_true, y_pred): what is true comes first.",
        ),
    ),
    "2.2": Exercise(
        needs="a whole number of draws",
        judge=judge_tries,
        right="A text that greedy decoding does not give comes out in an afternoon of asking.",
        hints=(
            "What is the probability that the text does not come out, in one draw and in n?",
            "(1 - p_z) ** n is to be at most one half; take logarithms.",
            "np.ceil(np.log(0.5) / np.log1p(-p_z))",
        ),
    ),
    "2.3": Exercise(
        needs="one number from 0 to 1",
        judge=judge_area,
        right="The area under the ROC curve, without a curve.",
        hints=(
            "Every member meets every other text: that is a table of differences.",
            "`members[:, None] - others` is that table. Which share of it is above zero, and what "
            "about those that are exactly zero?",
            "(gap > 0).mean() + (gap == 0).mean() / 2 with that table as gap.",
        ),
    ),
    "2.4": Exercise(
        needs="a score, one number",
        judge=judge_threshold,
        right="With so few others, one in a hundred means none at all.",
        hints=(
            "How many of the others may be above the threshold at most, as a number of texts?",
            "1 % of 40 texts is less than one text. A quantile of 0.99 lies between two scores: on "
            "which side of it is the highest?",
            "The highest score among the others: nothing of theirs is above it.",
        ),
    ),
    "2.5": Exercise(
        needs="a Series with one number for each attack",
        judge=judge_bought,
        right="What looked like the best attack gained nothing from training: it reads the texts.",
        hints=(
            "One of the two columns of `shift` is a model that has seen no text at all.",
            "An attack on a model that was never trained finds differences between the texts. What "
            "did training add?",
            "The last column of `shift` minus the first.",
        ),
    ),
}
