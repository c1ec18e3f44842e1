"""Judges of session 3: forgetting curves and laws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from workbench.workshop import Exercise

TOLERANCE = 5e-3  # an answer rounded to two digits is right


def alike(given, right) -> bool:
    return np.allclose(given, right, atol=TOLERANCE, rtol=0)


def judge_memory(memory: pd.Series, followed: pd.DataFrame) -> str:
    """A number a row of ``followed``: own change less the controls' change."""
    if isinstance(memory, pd.DataFrame):
        return "This is a table; the rows of followed want one number each, from its own columns."
    given = np.asarray(memory, dtype=float)
    if given.shape != (len(followed),):
        return (
            f"You have numbers of shape {given.shape}; the curve needs one for each of the "
            f"{len(followed)} rows of followed."
        )
    value, before = followed["value"], followed["before"]
    control, control_before = followed["control"], followed["control_before"]
    change, trend = value - before, control - control_before
    if alike(given, change - trend):
        return ""
    if alike(given, change):
        return (
            "This is what the texts themselves gained since before they were trained on. Over the "
            f"same updates texts that were never trained on gained up to {trend.max():.1f} nats, so "
            "what the model learned about all texts of the kind passes for memory of these."
        )
    if alike(given, value - control):
        return (
            "This compares levels at one checkpoint. A cohort that was easier than the controls "
            f"before any training (here they differ by up to {(before - control_before).abs().max():.1f} "
            "nats) would look remembered: compare changes."
        )
    if alike(given, change - control):
        return (
            "You take away where the controls stand, not how far they have come: all points are "
            "shifted up by what the controls scored before."
        )
    if alike(given, trend - change):
        return "The sign is turned round: as it stands, a text that is remembered falls below zero."
    if alike(given, change + trend):
        return "The controls' change is added, so that what all texts gained counts twice."
    if alike(given, trend):
        return "This is the controls' change alone; the trained texts are not in it."
    return (
        "This is neither the change of the trained texts nor a difference of changes: four columns "
        "are needed, two for the trained text and two for the controls."
    )


def judge_same(same: pd.DataFrame, texts: pd.DataFrame) -> str:
    """The rows of the items that are there at every lag."""
    lags = texts["lag"].nunique()
    seen = texts.astype({"item": str}).groupby("item")["lag"].nunique()
    complete, kept = set(seen.index[seen == lags]), set(same["item"].astype(str))
    if not len(same):
        return "No row is left; some texts are there at every lag."
    if same["lag"].nunique() < lags:
        gone = sorted(set(texts["lag"]) - set(same["lag"]))
        return (
            f"The lags {', '.join(f'{lag:g}' for lag in gone)} are gone, and with them the part of "
            "the curve where forgetting shows. Leave out texts, not lags."
        )
    partial = sorted(kept - complete)
    if partial:
        return (
            f"{len(partial)} of the {len(kept)} texts are still there at some lags only, such as "
            f"{partial[0]} at {seen[partial[0]]} of {lags}: a fall between two points may be a "
            "change of texts."
        )
    if complete - kept:
        return (
            f"Of {len(complete)} texts that are there at every lag you have {len(complete & kept)}: the "
            "curve is of the same texts throughout, but of fewer than there could be."
        )
    expected = len(complete) * lags
    return "" if len(same) == expected else f"You have {len(same)} rows for {expected} points."


def judge_weights(weights: pd.Series, aicc: pd.Series) -> str:
    """Akaike weights from the criterion of each law."""
    if isinstance(weights, pd.Series) and set(weights.index) == set(aicc.index):
        weights = weights.reindex(aicc.index)
    given = np.asarray(weights, dtype=float)
    if given.shape != (len(aicc),):
        return f"You have numbers of shape {given.shape}; there are {len(aicc)} laws."
    above = (aicc - aicc.min()).to_numpy()
    support = np.exp(-above / 2)
    if alike(given, support / support.sum()):
        return ""
    if alike(given / given.sum(), support / support.sum()):
        return (
            f"Their proportions are right, but they add up to {given.sum():.3g}. A weight is a share "
            "of the whole."
        )
    if alike(given, np.exp(-above) / np.exp(-above).sum()):
        return (
            "They add up to 1, but the best law gets too much: the criterion is twice a "
            "log-likelihood, and the formula undoes that."
        )
    if given.argmax() != aicc.to_numpy().argmin():
        best, favoured = aicc.idxmin(), aicc.index[given.argmax()]
        return (
            f"The largest weight goes to {favoured}, though {best} has the lowest criterion: a low "
            "one is a good one, also below zero."
        )
    if not alike(given.sum(), 1):
        return f"They add up to {given.sum():.3g}; shares add up to 1."
    return (
        "They add up to 1 and favour the right law, but a difference of 2 in the criterion has to "
        "be a factor of e = 2.718 between two weights, and here it is not."
    )


def judge_average(guess: str, fits: pd.DataFrame) -> str:
    """Which law the mean of exponentials prefers."""
    weights = fits[fits["metric"] == "weight"].set_index("law")["value"].dropna()
    weights.index = weights.index.astype(str)
    guess = str(guess).strip().lower()
    if guess not in weights.index:
        return f"No law {guess!r} was fitted; there are {', '.join(sorted(weights.index))}."
    best = weights.idxmax()
    if guess == best:
        return ""
    if guess == "exponential":
        return (
            "Each text is exponential, but their mean is not: it gets a weight of "
            f"{weights[guess]:.4f}. Early on the mean falls with the fast texts, later only slow "
            "ones are left in it, so the share lost per update shrinks."
        )
    return (
        f"It gets a weight of {weights[guess]:.4f}, though it too falls fast and then slowly. Which "
        "of the laws does that and still never reaches zero?"
    )


def judge_measured(groups: Sequence[str], halves: pd.DataFrame, longest: float) -> str:
    """The curves whose half-life lies, with its interval, within the lags that were seen."""
    if isinstance(groups, pd.DataFrame):
        return "This is a table; the names are in its column group."
    if isinstance(groups, str):
        return "This is one name; put the names into a list."
    given = {str(group) for group in groups}
    table = halves.astype({"group": str}).set_index("group")
    unknown = sorted(given - set(table.index))
    if unknown:
        return f"There is no curve {unknown[0]!r}; the names are in the column group."
    right = set(table.index[(table["value"] <= longest) & (table["hi"] <= longest)])
    beyond = [name for name in sorted(given - right) if not table.at[name, "value"] <= longest]
    if beyond:
        return (
            f"{beyond[0]} has a half-life of {table.at[beyond[0], 'value']:.1f} updates, and nobody "
            f"looked later than {longest:g}: that number is the law's, not the data's."
        )
    endless = [name for name in sorted(given - right) if pd.isna(table.at[name, "hi"])]
    if endless:
        return (
            f"{endless[0]} has an estimate of {table.at[endless[0], 'value']:.0f}, but no interval at "
            "all: some resampled texts show no memory that could be halved."
        )
    unsure = sorted(given - right)
    if unsure:
        return (
            f"{unsure[0]} has a point estimate of {table.at[unsure[0], 'value']:.0f}, but its "
            f"interval ends at {table.at[unsure[0], 'hi']:.3g}: resampled texts put the half-life "
            f"beyond the last of {longest:g} updates."
        )
    if right - given:
        return (
            f"Measured too, and not in your list: {sorted(right - given)[0]}. Its whole interval ends "
            f"by {longest:g}."
        )
    return ""


EXERCISES = {
    "3.1": Exercise(
        needs="one number for each row of followed",
        judge=judge_memory,
        right="Seen a few times, these texts left hardly a trace: what looked like lasting memory was "
        "the model learning how such texts go. A baseline had been left out.",
        hints=(
            "Look at the controls: what happens to biographies that were never trained on, between "
            "the same two checkpoints?",
            "The controls' own change is control less control_before; it has to leave the curve.",
            "memory = (value - before) - (control - control_before), each a column of followed.",
        ),
    ),
    "3.2": Exercise(
        needs="the rows of passages whose text is there at every lag",
        judge=judge_same,
        right="Now every point is a mean over the same texts, so a fall is forgetting.",
        hints=(
            "Count for each text at how many different lags it was measured.",
            'passages.groupby("item", observed=True)["lag"].transform("nunique") has that number in '
            "every row.",
            'Keep the rows of passages where that number equals passages["lag"].nunique().',
        ),
    ),
    "3.3": Exercise(
        needs="one weight for each law, in a Series like aicc",
        judge=judge_weights,
        right="Weights are shares, so they say which of these laws to prefer, and nothing about "
        "whether any of them is good.",
        hints=(
            "Subtract the lowest criterion from all of them first.",
            "np.exp of minus half of those differences, then shares of their sum.",
            "support = np.exp(-(aicc - aicc.min()) / 2), and the weights are support over its sum.",
        ),
    ),
    "3.4": Exercise(
        needs='the name of a law in quotes: "exponential", "power" or "logarithm"',
        judge=judge_average,
        right="A mean of exponentials of different speed looks like a power law, which none of its "
        "texts follows (Anderson & Tweney 1997).",
        hints=(
            "Early, fast and slow texts are both in the mean. What is left of each after 50 updates?",
            "Which laws fall by a smaller and smaller share per update?",
            "Not the exponential, whose share is constant; and after the fast texts are gone the "
            "slow ones still hold the mean above zero for long.",
        ),
    ),
    "3.5": Exercise(
        needs="a list of names from the column group",
        judge=judge_measured,
        right="For these the texts were watched long enough; the other half-lives belong to the law "
        "and its extrapolation.",
        hints=(
            "Compare lo, value and hi with the last lag at which anyone looked.",
            "A half-life is measured where value and hi both lie at or below longest.",
            'list(halves.loc[halves["hi"] <= longest, "group"]), if no value is above its hi.',
        ),
    ),
}
