"""Judges of session 4: causal profiles with twins."""

from __future__ import annotations

import numpy as np
import pandas as pd

from workbench.workshop import Exercise

TOLERANCE = 5e-3  # an answer rounded to two digits is right
SHARE = 1e-3  # the same for a share, of which some are small
NORMAL = 1.96  # standard errors to either side that hold 95 %


def alike(given, right) -> bool:
    return np.allclose(given, right, atol=TOLERANCE, rtol=0)


def judge_turned(shown: pd.DataFrame, on_loss: pd.DataFrame) -> str:
    """Effects on the loss turned round, with their intervals."""
    if len(shown) != len(on_loss):
        return f"You have {len(shown)} rows of {len(on_loss)}; turning round leaves them all."
    known = on_loss["lo"].notna().to_numpy()
    value, lo, hi = (shown[name].to_numpy()[known] for name in ("value", "lo", "hi"))
    was, was_lo, was_hi = (on_loss[name].to_numpy()[known] for name in ("value", "lo", "hi"))
    if alike(value, -was) and alike(lo, -was_hi) and alike(hi, -was_lo):
        return ""
    if alike(value, was):
        return (
            "The estimates are still effects on the loss, negative where a text is remembered; "
            "the axis says that up is memory."
        )
    if alike(lo, was_lo) and alike(hi, was_hi):
        outside = int(((value < lo) | (value > hi)).sum())
        return (
            f"In {outside} of {len(value)} rows the estimate lies outside its own interval: the "
            "sign was turned on the estimates only, and the bands still belong to the loss."
        )
    if (lo > hi).any():
        return (
            f"In {int((lo > hi).sum())} rows lo is above hi: when numbers turn their sign, the "
            "largest becomes the smallest."
        )
    outside = (value < lo) | (value > hi)
    if outside.any():
        return (
            f"In {int(outside.sum())} rows the estimate lies outside its own interval; a band is "
            "made around the estimate."
        )
    return (
        "Each estimate lies in its interval, but the intervals are not those that were estimated: "
        "their widths have changed."
    )


def judge_att(att: float, scores: pd.DataFrame, wave: float, step: int) -> str:
    """The difference of differences of one cohort at one checkpoint."""
    given = np.asarray(att, dtype=float)
    if given.size != 1:
        return f"You have {given.size} numbers; the cell of a cohort and a checkpoint is one."
    trained = scores[scores["wave"] == wave].groupby("step")["value"].mean()
    never = scores[scores["wave"].isna()].groupby("step")["value"].mean()
    steps = np.sort(scores["step"].unique())
    base = steps[steps < wave][-1]
    effect = (trained[step] - trained) - (never[step] - never)
    if alike(given, effect[base]):
        return ""
    if alike(given, -effect[base]):
        return "The size is right and the sign is turned: positive is what training added."
    if alike(given, trained[step] - trained[base]):
        return (
            "This is before and after of the trained texts. The controls, which nobody trained on, "
            f"went up by {never[step] - never[base]:.2f} in the same time: that part is not memory."
        )
    if alike(given, trained[step] - never[step]):
        return (
            "This compares the two groups at the end. They did not start level: before the first "
            f"exposure they stood {trained[base] - never[base]:+.2f} apart."
        )
    if alike(given, never[step] - never[base]):
        return "This is the controls' change alone."
    at = (effect.drop(step) - float(given)).abs().idxmin()
    used = alike(given, effect[at])
    if used and at >= wave:
        return (
            f"Your base is checkpoint {at}, when these texts had been trained on already: part "
            "of the effect is in the base and is taken away."
        )
    if used:
        return (
            f"Your base is checkpoint {at}. Between it and the last checkpoint before the "
            "exposure the two groups may have moved apart for other reasons."
        )
    path = (trained - trained[base]) - (never - never[base])
    at = (path - float(given)).abs().idxmin()
    if alike(given, path[at]):
        return f"This is the effect at checkpoint {at}; the one at {step} is asked for."
    return (
        "This is not a difference of two changes between the same two checkpoints: two means are "
        "needed of the trained texts and two of the controls."
    )


def judge_rejected(share: float, cells: pd.DataFrame) -> str:
    """Share of placebo cells beyond 1.96 standard errors, to either side."""
    given = np.asarray(share, dtype=float)
    if given.size != 1:
        return f"You have {given.size} values; a share is one number. What is the mean of True and False?"
    cells = cells.dropna(subset="se")
    ratio, placebo = cells["value"] / cells["se"], cells["metric"] == "placebo"
    far, outside = ratio.abs() > NORMAL, (cells["lo"] > 0) | (cells["hi"] < 0)
    if np.isclose(given, far[placebo].mean(), atol=SHARE, rtol=0):
        return ""
    if given > 1:
        return f"You have {float(given):g}: a number of cells, not a share of them."
    mistakes = (
        (
            ~far[placebo],
            "These are the placebo cells that do look like noise; the others are asked for.",
        ),
        (
            far,
            "All cells are in it, also those after the exposure, which ought to differ from zero. A "
            "placebo cell lies before it.",
        ),
        (
            far[~placebo],
            "These are the cells after the exposure: a share of effects found, not a test of the "
            "method.",
        ),
        (
            ratio[placebo] > NORMAL,
            "Only cells above zero are counted; a placebo may miss on either side.",
        ),
        (
            ratio[placebo] < -NORMAL,
            "Only cells below zero are counted; a placebo may miss on either side.",
        ),
        (
            outside[placebo],
            "You used lo and hi, which are wide enough to hold for all cells at once: of such bands "
            "5 % miss as a set, not 5 % of the cells.",
        ),
    )
    # two mistakes may come to one number
    found = [told for of, told in mistakes if np.isclose(given, of.mean(), atol=SHARE, rtol=0)]
    if found:
        return " Or else: ".join(found)
    return (
        "This is neither the share of all cells nor of the placebo cells beyond 1.96 standard errors; "
        "which rows, and which two columns, did you use?"
    )


def judge_truth(truth: pd.Series, here: pd.Series, there: pd.Series, before: pd.Series) -> str:
    """Item by item: score in the run that trained on it less score in the one that did not."""
    both = here.index.intersection(there.index)
    right = (here[both] - there[both]).sort_index()
    given = np.asarray(truth, dtype=float)
    if given.size == 1:
        if alike(given, right.mean()):
            return "The mean is right; keep one number for each text: a mean hides how far they differ."
        if alike(given, here.mean() - there.mean()):
            return (
                "These are the means of two different sets of texts: the twin's series has texts that "
                "this run's cohort has not. Pair each text with itself."
            )
        return f"You have one number, {float(given):.2f}; a truth is asked for each text."
    if not isinstance(truth, pd.Series):
        return (
            f"You have {given.size} numbers without names. The two runs list texts in different "
            "orders, so let the index pair them."
        )
    truth = truth.sort_index()
    if truth.isna().any():
        return (
            f"{int(truth.isna().sum())} texts have no number: they are in one series and not in the "
            "other. Only texts of both runs have a truth."
        )
    if set(truth.index) != set(right.index):
        return f"You have {len(truth)} texts; {len(right)} are in both series."
    if alike(truth, right):
        return ""
    if alike(truth, -right):
        return (
            "The sign is turned: the run that trained on a text comes first, so that what training "
            "added is positive."
        )
    if alike(truth, (here - before).reindex(truth.index)):
        return (
            "This is before and after within one run; the model also learned from everything else "
            "in between. The twin went through all of that too."
        )
    if alike(truth.mean(), right.mean()):
        return (
            "The mean is right but the texts are not: each score was paired with another text's. "
            "The two runs list them in different orders."
        )
    return "These are not differences between the two runs' scores of the same text."


def judge_ghosts(ghosts: pd.DataFrame, scores: pd.DataFrame, elsewhere: pd.Series) -> str:
    """Texts only the twin was trained on, with the twin's cohorts, beside the controls."""
    if "cohort" not in ghosts.columns:
        return "There is no column cohort yet: when would these texts have been trained on?"
    if not {"item", "group", "value"} <= set(ghosts.columns):
        return "Of the columns item, group and value some are gone; assign would leave them."
    names, group = ghosts["item"].astype(str), ghosts["group"].astype(str)
    if (group == "seen").any():
        return (
            f"{names[group == 'seen'].nunique()} texts that this run was trained on are among them, "
            "so a real effect would show. Ghosts were trained on in the twin only."
        )
    if not (group == "never").any():
        return "There are no controls left; the estimate needs the never-trained texts as well."
    if not (group == "partner").any():
        return "Only controls are left; the ghosts are the group partner."
    cohort = ghosts["cohort"].astype(float)
    if cohort[group == "never"].notna().any():
        return "Controls have a cohort now, so there is nobody left to compare with; theirs is missing."
    right = names.map(elsewhere).astype(float)
    ghost = group == "partner"
    if cohort[ghost].isna().all():
        return (
            "The ghosts have no cohort, so that they count as controls: pretend that they were "
            "trained on when the twin was."
        )
    if cohort[ghost].isna().any() or not alike(cohort[ghost], right[ghost]):
        return "Some ghosts have another cohort than the twin's; look each text up by its name."
    wanted = scores["group"].astype(str).isin(["partner", "never"]).sum()
    if len(ghosts) < wanted:
        return (
            f"You have {len(ghosts)} rows of {wanted}: some of the ghosts or controls are missing."
        )
    return ""


EXERCISES = {
    "4.1": Exercise(
        needs="the rows of on_loss with value, lo and hi turned round",
        judge=judge_turned,
        right="Estimate and interval belong together again; what is turned round must be turned round "
        "as a whole.",
        hints=(
            "Hover over a point and compare it with its band. Should an estimate lie in its interval?",
            "If the effect is between -3 and -1, then minus the effect is between which two numbers?",
            'on_loss.assign(value=-on_loss["value"], lo=-on_loss["hi"], hi=...) and the last by analogy.',
        ),
    ),
    "4.2": Exercise(
        needs="the effect as one number, in nats per token",
        judge=judge_att,
        right="That is ATT(g, t), a difference of differences; memorization_profile computes the same "
        "for all cohorts and checkpoints, with its error.",
        hints=(
            "Two changes between the same two checkpoints: whose, and from which checkpoint?",
            "The base is the last checkpoint before the wave. Take the controls' change from the "
            "trained texts' change.",
            "(trained.loc[wave, step] - trained.loc[wave, base]) less never[step] - never[base], with "
            "base the last of the steps before the wave.",
        ),
    ),
    "4.3": Exercise(
        needs="a share, one number from 0 to 1",
        judge=judge_rejected,
        right="About as many as chance gives: before a text is trained on, the method finds nothing "
        "that is not there.",
        hints=(
            "Which value of the column metric marks cells before the exposure?",
            "Compare the size of value, whatever its sign, with 1.96 times se.",
            'placebo = cells[cells["metric"] == "placebo"]; then the mean of placebo["value"].abs() > '
            '1.96 * placebo["se"].',
        ),
    ),
    "4.4": Exercise(
        needs="a Series with one number for each text",
        judge=judge_truth,
        right="No controls and no assumption were needed: the twin is the same model, less these texts.",
        hints=(
            "What would this text have scored, had it not been trained on? Who knows that?",
            "Subtracting two Series pairs them by index; texts of one alone come out as missing.",
            "here - there, and then without the missing ones.",
        ),
    ),
    "4.5": Exercise(
        needs="rows of scores with a cohort, ghosts and controls",
        judge=judge_ghosts,
        right="These texts were in no batch of this run. What the profile now reports for them is what "
        "it reports where there is nothing.",
        hints=(
            "Which group of texts was trained on in the twin only, and which never?",
            'Keep the groups "partner" and "never", then assign a cohort by looking up each item in '
            "elsewhere.",
            'ghosts["item"].astype(str).map(elsewhere) is the cohort; controls are not in elsewhere '
            "and stay missing.",
        ),
    ),
}
