"""What membership can be told from the texts alone: a bag of words that never sees the model.

Das, Zhang & Tramer (2024), "Blind baselines beat membership inference attacks for foundation
models": where members and non-members are drawn from different sources or times, a classifier of
their words tells them apart, and an attack that does no better has shown nothing about memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats

from workbench.items import check_items
from workbench.stats.membership import (
    area_under_curve,
    attack_rows,
    by_score,
    membership_of,
    rows_at,
)
from workbench.table import METRICS, InputError, validate

BLIND = "member_blind"
WORD = r"(?u)\b\w+\b"  # single letters and digits too: a date can tell the classes apart


def blind_baseline(
    table: pd.DataFrame,
    items: pd.DataFrame,
    *,
    member: str = "member",
    by: Sequence[str] = ("run", "step"),
    cluster: str | None = None,
    folds: int = 5,
    repeats: int = 20,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """AUC of a bag of words that never saw the model, and each attack's AUC beyond it.

    Logistic regression on TF-IDF word counts, fitted to the other folds (stratified, drawn anew
    ``repeats`` times), scores the texts of a fold. Only texts of one fold are compared, for one
    model scored them: the AUC is the share of (member, other) pairs within folds that are in
    order. Scores of different folds are not on one scale; pooled they mislead, most where one text
    is left out at a time: the model that scores a member has seen one member fewer than the model
    that scores another, and the area of exchangeable texts lies far below .5.

    Args:
        table: Item rows of attack scores, higher = member, with the column ``member``.
        items: Their texts: columns ``item`` and ``text``.
        member, by: As for ``membership_auc``. Texts are compared within ``by`` as attacks are.
        cluster: Column of ``table`` that holds texts together, such as a document or an author:
            never in training and test fold at once, and drawn together by the error.
        folds: Of the cross-validation; fewer where a class has fewer texts (or clusters).
        repeats: Cross-validations, each with its own folds.

    Returns:
        Rows "auc" with the coordinate ``score`` ("member_blind"), "auc_gain" for each attack (its
        AUC minus the blind one; 0: the words alone say as much; a blind AUC below .5 is an accident
        that makes gains look larger, so read it beside them), and "member_blind" for each item:
        the share of the other class's texts, among those it shared a fold with, that it outscores
        (a member's mean over members is the AUC; .5 says that its words tell nothing). Intervals
        by DeLong's method, paired for the gain, with the blind part's variance once more: a text
        is tested once and trains the model that tests the others, and both move the area alike (in
        simulations from no to strong signal DeLong's alone covers 79 to 88 % of the time, this 91
        to 97). NaN with a reason. ``.attrs["says"]`` is a sentence on each comparison.

    Raises:
        InputError: Unknown columns, items without text, ``folds`` below 2 or ``repeats`` below 1.
    """
    if folds < 2 or repeats < 1:
        raise InputError(
            f"blind_baseline: {folds} folds, {repeats} repeats; needs at least 2 folds and 1 repeat"
        )
    table = attack_rows(table, [member, *by, *([cluster] if cluster else [])], "blind_baseline")
    table = table[table["value"].notna()]
    text = check_items(items).set_index(items["item"].astype(str))["text"]
    lacking = sorted(set(table["item"].astype(str)) - set(text.index))
    if lacking:
        raise InputError(
            f"blind_baseline: no text for {len(lacking)} items (first: {lacking[0]!r}); give the "
            "items that were scored"
        )
    made, says, known = [], [], {}
    parts: dict[tuple, list[tuple]] = {}
    for where, part in by_score(table, by, "blind_baseline"):
        parts.setdefault(tuple(where[name] for name in by), []).append((where, part))
    for scored in parts.values():
        gains = []
        most = max(range(len(scored)), key=lambda number: len(scored[number][1]))
        for number, (where, part) in enumerate(scored):
            names = part["item"].astype(str)
            inside = membership_of(part[member], "blind_baseline")
            groups = (
                np.arange(len(part)) if cluster is None else part[cluster].astype(str).to_numpy()
            )
            key = tuple(zip(names, inside, strict=True))
            if key not in known:  # steps and attacks share their texts, so they are fitted once
                known[key] = blind_placements(
                    text[names].tolist(), inside, groups, folds=folds, repeats=repeats, seed=seed
                )
            place, area, reason = known[key]
            own = placement_error(place, inside, groups)
            if number == most:  # an attack that could not score all texts is compared on its own
                blind, no_blind = _interval("auc", area, np.hypot(own, own), level), reason
                made.append(_row("auc", blind, part, where | {"score": BLIND}, reason))
                made.append(_item_rows(place, part, where | {"score": BLIND}, reason))
            score = part["value"].to_numpy()
            paired = placement_error(outscored(score, inside) - place, inside, groups)
            gained = area_under_curve(score[inside], score[~inside]) - area
            gain = _interval("auc_gain", gained, np.hypot(paired, own), level)
            made.append(_row("auc_gain", gain, part, where, reason))
            gains.append((where["score"], gain))
        here = ", ".join(f"{name} {where[name]}" for name in by if len(parts) > 1)
        says.append((f"{here}: " if here else "") + _says(blind, gains, no_blind))
    result = validate(pd.concat(made, ignore_index=True))
    result.attrs["says"] = says
    return result


def outscored(
    score: Float[np.ndarray, " item"], member: Bool[np.ndarray, " item"]
) -> Float[np.ndarray, " item"]:
    """Share of the other class's texts that each text outscores, ties counting one half.

    The members' mean is the AUC, the others' mean 1 minus it. Scores (.9, .8, .4) of members and
    (.7, .3, .2) of others: (1, 1, 2/3) and (1/3, 0, 0). NaN without texts of the other class.
    """
    share = np.full(len(score), np.nan)
    for mine, others in ((member, ~member), (~member, member)):
        if others.any():
            against = np.sort(score[others])
            below = np.searchsorted(against, score[mine], side="left")
            upto = np.searchsorted(against, score[mine], side="right")
            share[mine] = (below + upto) / (2 * len(against))
    return share


def blind_placements(
    texts: Sequence[str],
    member: Bool[np.ndarray, " item"],
    cluster: np.ndarray,
    *,
    folds: int,
    repeats: int,
    seed: int,
) -> tuple[Float[np.ndarray, " item"], float, str]:
    """What :func:`outscored` gives of out-of-fold scores, within folds, and the AUC of their pairs.

    Returns:
        Share outscored of each text (NaN: no text of the other class in its folds), the AUC, and
        the reason where there is none.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    nothing = np.full(len(texts), np.nan)
    fewest = min(len(set(cluster[member])), len(set(cluster[~member])))
    if fewest < 2:
        one = (
            "texts of one class only" if not fewest else "fewer than 2 texts or clusters of a class"
        )
        return nothing, float("nan"), one
    try:
        # words and their rarity are taken from all texts, which says nothing about any label
        words = TfidfVectorizer(token_pattern=WORD).fit_transform(texts)
    except ValueError:
        return nothing, float("nan"), "the texts hold no words"
    alone = len(set(cluster)) == len(texts)
    kind = StratifiedKFold if alone else StratifiedGroupKFold
    won, met = np.zeros(len(texts)), np.zeros(len(texts))
    for repeat in range(repeats):
        cut = kind(min(folds, fewest), shuffle=True, random_state=seed * repeats + repeat)
        for train, test in cut.split(words, member, None if alone else cluster):
            here = member[test]
            if here.all() or not here.any() or len(set(member[train])) < 2:
                continue  # a fold of clusters may hold one class
            model = LogisticRegression(solver="liblinear").fit(words[train], member[train])
            others = np.where(here, (~here).sum(), here.sum())
            won[test] += others * outscored(model.decision_function(words[test]), here)
            met[test] += others
    with np.errstate(invalid="ignore"):
        place = won / met
    area = won[member].sum() / met[member].sum() if met.any() else float("nan")
    return place, float(area), "" if met.any() else "no fold holds both classes"


def _interval(metric: str, value: float, error: float, level: float) -> dict:
    half = stats.norm.ppf((1 + level) / 2) * error
    low, high = np.clip([value - half, value + half], METRICS[metric].low, METRICS[metric].high)
    return {"value": value, "se": error, "lo": low, "hi": high}


def placement_error(
    place: Float[np.ndarray, " item"], member: Bool[np.ndarray, " item"], cluster: np.ndarray
) -> float:
    """Standard error of the members' mean placement over texts, or over clusters of them.

    DeLong et al. (1988) where each text is its own cluster, Obuchowski (1997) else. NaN with fewer
    than two texts of a class.
    """
    known = ~np.isnan(place)
    place, member, cluster = place[known], member[known], cluster[known]
    if min(member.sum(), (~member).sum()) < 2:
        return float("nan")
    push = np.empty(len(place))  # each text's part of the deviation of the area
    for mine, sign in ((member, 1), (~member, -1)):
        push[mine] = sign * (place[mine] - place[mine].mean()) / mine.sum()
    if len(set(cluster)) == len(place):
        count = np.where(member, member.sum(), (~member).sum())
        return float(np.sqrt((push**2 * count / (count - 1)).sum()))
    total = pd.Series(push).groupby(cluster).sum()
    return float(np.sqrt((total**2).sum() * len(total) / (len(total) - 1)))


def _row(metric: str, found: dict, part, where, reason: str) -> pd.DataFrame:
    beside = {"se": found["se"], "reason": reason}
    edges = found["lo"], found["hi"]
    return rows_at(metric, found["value"], *edges, part, where, len(part), beside)


def _item_rows(place, part, where, reason: str) -> pd.DataFrame:
    made = rows_at(BLIND, place, np.nan, np.nan, part, where, 1, {"reason": reason})
    return made.assign(item=part["item"].astype(str).to_numpy())


def _says(blind: dict, gains: list[tuple[str, dict]], reason: str) -> str:
    """Whether the words alone tell the classes apart, and which attacks say more."""
    if reason:
        return f"No blind baseline: {reason}."
    told = f"AUC {blind['value']:.2f}, {blind['lo']:.2f} to {blind['hi']:.2f}"
    better = [METRICS[name].label for name, gain in gains if gain["lo"] > 0]
    beat = ", ".join(better) if better else "none"
    if not blind["lo"] > 0.5:
        return (
            f"The words alone do not tell members from others ({told}). Attacks beyond them by "
            f"more than the error: {beat}."
        )
    start = f"The words alone tell members from others ({told}): the two were not drawn alike. "
    if not better:
        return start + "No attack does better, so nothing here speaks of memory."
    return (
        start + "They may differ in more than words, in length or layout, so an attack that does "
        f"better need not show memory: {beat}."
    )
