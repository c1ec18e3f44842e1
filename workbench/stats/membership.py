"""How well a score tells texts that were trained on from texts that were not.

Higher scores mean member, always. The area under the curve says how the classes are ordered on
the whole; the true positive rate at a small false positive rate, how many members can be named.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats

from workbench.items import SEEN, UNSEEN
from workbench.table import METRICS, InputError, rows, validate

CHUNK = 4_000_000  # numbers in one temporary array


def area_under_curve(
    member: Float[np.ndarray, " member"], other: Float[np.ndarray, " other"]
) -> float:
    """Probability that a member scores above another text, ties counting one half.

    Members (.9, .8, .4) and others (.7, .3, .2) give 8/9. Chance is .5, perfect 1, perfectly wrong
    0; NaN without texts of both classes.
    """
    if not len(member) or not len(other):
        return float("nan")
    rank = stats.rankdata(np.concatenate([member, other]))[: len(member)].sum()
    return float((rank - len(member) * (len(member) + 1) / 2) / (len(member) * len(other)))


def delong_error(member: Float[np.ndarray, " member"], other: Float[np.ndarray, " other"]) -> float:
    """Standard error of :func:`area_under_curve` over texts of both classes.

    DeLong, DeLong & Clarke-Pearson (1988), Biometrics 44, by ranks (Sun & Xu 2014). 0 where the
    classes do not overlap, which is no certainty; NaN with fewer than two texts of a class.
    """
    if min(len(member), len(other)) < 2:
        return float("nan")
    rank = stats.rankdata(np.concatenate([member, other]))
    above = (rank[: len(member)] - stats.rankdata(member)) / len(other)
    below = 1 - (rank[len(member) :] - stats.rankdata(other)) / len(member)
    return float(np.sqrt(above.var(ddof=1) / len(member) + below.var(ddof=1) / len(other)))


def tpr_at_fpr(
    member: Float[np.ndarray, "*draw member"], other: Float[np.ndarray, "*draw other"], fpr: float
) -> Float[np.ndarray, "*draw"]:
    """The largest share of members above a threshold that at most ``fpr`` of the others pass.

    A threshold lies above, never at, an other's score, so ties go against the attack. ``fpr`` is
    what chance gives; 1 is perfect. Below ``1 / len(other)`` it is the rate at no false positive.
    """
    allowed = int(np.floor(fpr * other.shape[-1] + 1e-9))
    if allowed >= other.shape[-1]:
        return np.ones(member.shape[:-1])
    at = other.shape[-1] - 1 - allowed
    threshold = np.partition(other, at, axis=-1)[..., at]
    return (member > threshold[..., None]).mean(axis=-1)


def membership_auc(
    table: pd.DataFrame,
    *,
    member: str = "member",
    by: Sequence[str] = ("run", "step"),
    dose: str | None = None,
    fpr: Sequence[float] = (0.01, 0.1),
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Area under the curve, and true positive rates, of every score in the table.

    Args:
        table: Item rows of one or more scores, higher = member.
        member: Column that says so: booleans, 0 and 1, or words such as seen and unseen.
        by: Coordinates within which members meet others.
        dose: Column that splits the members only, each part against all others, such as copies.
        fpr: False positive rates.
        draws: Resamples of both classes behind the interval of a true positive rate.

    Returns:
        Rows "auc" (DeLong's ``se``, interval cut to 0..1) and "tpr_at_fpr" (coordinate ``fpr``)
        with the coordinate ``score``, the metric that was the attack. ``n`` counts texts of both
        classes. NaN with a reason; a reason beside a value flags fewer others than ``1 / fpr``.
        Items without a score are left out and counted in ``.attrs["dropped"]``.

    Raises:
        InputError: Unknown columns, labels that are neither, scores that are better low.
    """
    table = validate(table)
    for name in (member, *by, *([dose] if dose else [])):
        if name not in table.columns:
            raise InputError(f"membership_auc: no column {name!r}; there are {', '.join(table)}")
    if any(not 0 < rate < 1 for rate in fpr):
        raise InputError(f"membership_auc: fpr is {tuple(fpr)}, all must lie between 0 and 1")
    for key in table["metric"].unique():
        if METRICS[key].better != "high":
            raise InputError(f"membership_auc: {key} is not higher for members; leave it out")
    is_member = _membership(table[member])
    usable = table["value"].notna()
    dropped, table, is_member = int((~usable).sum()), table[usable], is_member[usable.to_numpy()]
    made = []
    for values, part in table.groupby([*by, "metric"], observed=True, sort=False):
        where = dict(zip(by, values[:-1], strict=True)) | {"score": str(values[-1])}
        inside = is_member[table.index.get_indexer(part.index)]
        other = part["value"].to_numpy()[~inside]
        members = part[inside]
        split = members.groupby(dose, observed=True) if dose else [(None, members)]
        for amount, some in split:
            here = where | ({dose: amount} if dose else {})
            if some.duplicated("item").any():
                raise InputError(
                    f"membership_auc: item {some['item'][some.duplicated('item')].iloc[0]} has "
                    f"several rows of {where['score']}; add what tells them apart to by"
                )
            score = some["value"].to_numpy()
            made.append(_score_rows(part, score, other, here, fpr, level, draws, seed))
    if not made:
        raise InputError("membership_auc: no item has a score; there is nothing to compare")
    result = pd.concat(made, ignore_index=True)
    result.attrs["dropped"] = dropped
    return result


def _membership(column: pd.Series) -> Bool[np.ndarray, " row"]:
    word = column.astype(str).str.strip().str.lower()
    inside = word.isin(SEEN | {"members"}).to_numpy()
    strange = ~inside & ~word.isin(UNSEEN | {"other"}).to_numpy()
    if strange.any():
        raise InputError(
            f"membership_auc: {column.name} is {column[strange].iloc[0]!r}, which says neither "
            "member nor non-member; use True and False, or seen and unseen"
        )
    return inside


def _score_rows(part, score, other, where, fpr, level, draws, seed) -> pd.DataFrame:
    area, error = area_under_curve(score, other), delong_error(score, other)
    reason = ""
    if np.isnan(area):
        reason = "texts of one class only"
    elif np.isnan(error):
        reason = "no error: one text in a class"
    elif error == 0:
        reason, error = "no error: the classes do not overlap", np.nan
    half = stats.norm.ppf((1 + level) / 2) * error
    found = [(area, max(area - half, 0.0), min(area + half, 1.0), error, np.nan, reason)]
    if np.isnan(half):
        found = [(area, np.nan, np.nan, error, np.nan, reason)]
    for rate in fpr:
        found.append(_rate_row(score, other, rate, level, draws, seed))
    frame = pd.DataFrame(found, columns=["value", "lo", "hi", "se", "fpr", "reason"])
    fixed = {"run": str(part["run"].iloc[0]), "step": int(part["step"].max())}
    beside = {name: value for name, value in where.items() if name not in ("run", "step", "group")}
    result = rows(
        "auc",
        frame["value"],
        lo=frame["lo"],
        hi=frame["hi"],
        n=len(score) + len(other),
        group=str(where.get("group", "all")),
        beside={"se": frame["se"], "fpr": frame["fpr"], "reason": frame["reason"], **beside},
        **fixed,
    )
    return result.assign(metric=["auc"] + ["tpr_at_fpr"] * len(fpr))


def _rate_row(score, other, rate, level, draws, seed) -> tuple:
    if not len(score) or not len(other):
        return np.nan, np.nan, np.nan, np.nan, rate, "texts of one class only"
    rng = np.random.default_rng(seed)
    again, step = [], max(1, CHUNK // max(len(score), len(other)))
    for done in range(0, draws, step):
        size = min(step, draws - done)
        drawn = score[rng.integers(len(score), size=(size, len(score)))]
        again.append(
            tpr_at_fpr(drawn, other[rng.integers(len(other), size=(size, len(other)))], rate)
        )
    low, high = np.quantile(np.concatenate(again), [(1 - level) / 2, (1 + level) / 2])
    few = f"{len(other)} others are fewer than 1 / fpr: the rate at no false positive"
    reason = few if len(other) < 1 / rate else ""
    return float(tpr_at_fpr(score, other, rate)), low, high, np.nan, rate, reason
