"""Controls and floors."""

from __future__ import annotations

import numpy as np
import pandas as pd

from workbench.stats.floors import floor_zone
from workbench.workshop import Exercise

CLOSE = 1e-3  # answers may be rounded


def judge_memory(memory, final) -> str:
    """``memory`` by kind, ``final`` the item rows it is made of."""
    top1 = final[final["metric"] == "top1"]
    group = top1["group"].astype(str)
    seen, never = (
        top1[group == g].groupby("kind", observed=True)["value"].mean() for g in ("seen", "never")
    )
    if not isinstance(memory, pd.Series) or set(memory.index) != set(seen.index):
        return f"It needs one number for each of {', '.join(seen.index)}, a Series by kind."
    got, anyway = memory.astype(float).reindex(seen.index), never.idxmax()
    if got.isna().any():
        return f"There is no number for {got.index[got.isna()][0]} (NaN)."
    if _same(got, seen - never):
        return ""
    if _same(got, seen):
        return (
            f"A floor read as a result: of the {anyway} texts that were in no training batch the "
            f"model gets {never[anyway]:.0%} of the tokens right too. It cannot remember those. "
            "How much of each number is more than texts of that kind reach without training?"
        )
    if _same(got, never - seen):
        return "The sign is turned: texts the model learned better now come out as forgotten."
    if _same(got, never):
        return "That is the floor itself, what untrained texts reach, and not what lies above it."
    if _same(got, seen - top1.loc[group == "never", "value"].mean()):
        return (
            "You took one floor for all kinds, their mean. Random pieces and a sentence from a "
            "template are not equally easy: each kind needs the floor of its own kind."
        )
    worst = (got - (seen - never)).abs().idxmax()
    return (
        f"For {worst} you have {got[worst]:.3f}. The trained texts of that kind get "
        f"{seen[worst]:.3f} right, those never trained on {never[worst]:.3f}."
    )


def judge_above(above, doses) -> str:
    """``above`` rows of ``doses``, which carries its floors."""
    if not isinstance(above, pd.DataFrame) or not {"kind", "dose"} <= set(above.columns):
        return "It needs rows of doses, a table with its columns: doses[a condition]."
    keys = ["kind", "dose"]
    got = set(above[keys].itertuples(index=False, name=None))
    where = {
        "right": doses["value"] > doses["floor_hi"],
        "mean": doses["value"] > doses["floor"],
        "interval": doses["lo"] > doses["floor"],
        "edge": doses["value"] >= doses["floor_hi"],
    }
    sets = {k: set(doses.loc[w, keys].itertuples(index=False, name=None)) for k, w in where.items()}
    if got == sets["right"]:
        return ""
    many, few = sorted(got - sets["right"]), sorted(sets["right"] - got)
    row = doses.set_index(keys)
    if got == sets["mean"]:
        return (
            f"You compare with the controls' mean. {_told(row, many[0])}: few texts miss a mean by "
            "luck alone, half of the time upwards. What would as many untrained texts reach?"
        )
    if got == sets["interval"]:
        return (
            f"You compare the interval of the trained texts with the controls' mean, as if that "
            f"were known exactly. {_told(row, (many or few)[0])}: look at where the zone ends."
        )
    if many:
        return f"{_told(row, many[0])}: it lies inside, and is no evidence of memory."
    return f"{len(few)} are missing. {_told(row, few[0])}: that is above its zone."


def judge_effect(effect, gains) -> str:
    """``gains`` has the groups seen and never as rows, two checkpoints as columns."""
    got, (before, after) = float(effect), gains.columns
    rise = gains[after] - gains[before]
    if abs(got - (rise["seen"] - rise["never"])) < CLOSE:
        return ""
    if abs(got - rise["seen"]) < CLOSE:
        return (
            f"A baseline left out: {rise['seen']:.2f} is what the trained texts gained, but the "
            f"texts that nobody trained on went from {gains.loc['never', before]:.2f} to "
            f"{gains.loc['never', after]:.2f} in the same updates. The model learned English."
        )
    if abs(got - (gains.loc["seen", after] - gains.loc["never", after])) < CLOSE:
        return (
            "You compare the two groups afterwards only. They were not equal before either: "
            f"{gains.loc['seen', before]:.2f} against {gains.loc['never', before]:.2f}."
        )
    if abs(got + rise["seen"] - rise["never"]) < CLOSE:
        return "The sign is turned: it says that training on a text makes it less likely."
    return (
        f"You have {got:.3f} nats per token. The trained texts gained {rise['seen']:.3f} between "
        f"the two checkpoints, the controls {rise['never']:.3f}."
    )


def judge_clean(clean, offered, shared) -> str:
    """``clean`` rows of ``offered`` that :func:`shared_words` met nowhere."""
    if not isinstance(clean, pd.DataFrame) or not {"item", "text"} <= set(clean.columns):
        return (
            "It needs the texts that are left, rows of offered with the columns item and text; "
            "the table of shares has no texts."
        )
    met = set(shared.loc[shared["value"] > 0, "item"].astype(str))
    whole = set(shared.loc[shared["value"] == 1, "item"].astype(str))
    got, there = set(clean["item"].astype(str)), set(offered["item"].astype(str))
    if got == there - met:
        return ""
    if got == there:
        return (
            f"All {len(there)} are still there, and {len(met)} of them stand in the training text."
        )
    if got == met:
        return "You kept those that the model has met, and dropped the good ones."
    if got == there - whole:
        return (
            f"You dropped the {len(whole)} that stand there as a whole; "
            f"{len(met - whole)} more stand there in part, 13 words in a row."
        )
    if left := sorted(got & met):
        return f"{left[0]} is still there, and the model has met at least 13 words of it in a row."
    lost = sorted(there - met - got)
    return f"You dropped too much: {lost[0]} shares no 13 words in a row with the training text."


def judge_needed(needed, controls, n) -> str:
    """``controls`` verdicts of untrained texts, ``n`` how many trained texts there are."""
    got, (_, _, high) = float(needed), floor_zone(controls, n, metric="extractable")
    edge = round(high * n)
    if got == edge + 1:
        return ""
    if 0 < got < 1:
        return f"That is a share; how many of the {n} texts is it, as a whole number?"
    if got != int(got):
        return f"{got:g} texts is no whole number of texts."
    if got == edge:
        return f"{edge} of {n} is the edge of the zone and still inside. How many are outside?"
    if got <= 1:
        return (
            f"Not one of {len(controls)} controls came out, but that does not show that none ever "
            f"does: if one in {len(controls)} did, you would see none in more than a third of such "
            "draws. The zone has to allow for that."
        )
    if got == round(high * len(controls)) + 1:
        return f"You counted in {len(controls)} texts, the controls; the trained ones are {n}."
    which = "few: that many, untrained texts might give" if got < edge else "many: fewer suffice"
    return f"{got:g} is too {which}."


def _same(got: pd.Series, other: pd.Series) -> bool:
    return bool(np.allclose(got, other, atol=CLOSE))


def _told(row: pd.DataFrame, key: tuple) -> str:
    kind, dose = key
    if key not in row.index:
        return f"There is no {kind} with {dose:g} exposures"
    value, low, high = row.loc[key, ["value", "floor_lo", "floor_hi"]]
    return f"{kind}, {dose:g} exposures: {value:.3f}, and the zone is {low:.3f} to {high:.3f}"


EXERCISES = {
    "1.1": Exercise(
        needs="a Series with one number for each kind of text",
        judge=judge_memory,
        right=(
            "What is above the floor is small, and the biographies, far ahead before, no longer "
            "are: the template did them, not memory."
        ),
        hints=(
            "Run the cell that shows one text of each kind again. What could you guess of a "
            "biography without ever having read it?",
            "`shares` has rows of the group never as well. What do they reach, kind by kind?",
            "Make a Series of the never rows as `trained` is made of the seen ones, and take it "
            "away from `trained`: pandas matches the kinds.",
        ),
    ),
    "1.2": Exercise(
        needs='those rows of `doses` that show memory: doses[doses["value"] > ...]',
        judge=judge_above,
        right="These groups are above what as many untrained texts would reach 19 times in 20.",
        hints=(
            "Each row has its own zone: the fewer texts, the wider.",
            "Look at the columns floor, floor_lo and floor_hi. Which of them is where the grey "
            "zone of the figure ends?",
            "Keep the rows whose value is above floor_hi.",
        ),
    ),
    "1.3": Exercise(
        needs="one number, in nats per token",
        judge=judge_effect,
        right="This difference of two differences is what training on these texts caused.",
        hints=(
            "Read the table row by row. Did only the trained texts change?",
            "What would the trained texts have gained had they not been trained on? Somebody in "
            "the table tells you.",
            "Take each group's second number minus its first, then seen minus never.",
        ),
    ),
    "1.4": Exercise(
        needs="the rows of `offered` that are controls",
        judge=judge_clean,
        right="What is left shares no 13 words in a row with anything the model was trained on.",
        hints=(
            "The column value of `shared` is the share of a text's word n-grams that stand in the "
            "training text. What is it for a control?",
            "`drop_shared(items, shared)` does it; or select by hand with isin.",
            "drop_shared(offered, shared) is all, or offered without the items of "
            'shared[shared["value"] > 0].',
        ),
    ),
    "1.5": Exercise(
        needs="a whole number of texts",
        judge=judge_needed,
        right="With few controls even a floor that looks like zero has a zone above it.",
        hints=(
            "The controls give 0 of 40. Would you bet that 400 of them give 0 too?",
            'floor_zone(controls, n, metric="extractable") gives mean, lower and upper end of the '
            "zone, as shares of n texts.",
            "The upper end times n is the last number inside; one more is the first outside.",
        ),
    ),
}
