"""How well a score tells texts that were trained on from texts that were not.

Higher scores mean member, always. The area under the curve says how the classes are ordered on
the whole; the true positive rate at a small false positive rate, how many members can be named.
No such number says why: texts drawn otherwise than the members score otherwise without any memory,
so :mod:`workbench.stats.blind` stands beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import stats

from workbench.items import SEEN, UNSEEN
from workbench.table import METRICS, InputError, rows, validate

CHUNK = 4_000_000  # numbers in one temporary array
POINTS = 200  # of an ROC curve at most; the first are kept whole, for a logarithmic axis


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


def shares_above(
    member: Float[np.ndarray, " member"],
    other: Float[np.ndarray, " other"],
    weights: Float[np.ndarray, "*draw other"] | None = None,
) -> tuple[Float[np.ndarray, "*draw member"], Float[np.ndarray, "*draw member"]]:
    """Share of the others strictly above each member, and share at or above it.

    ``weights`` count each other several times or not at all, as a resample does.
    """
    order = np.argsort(other, kind="stable")
    if weights is None:
        weights = np.ones(len(other))
    below = np.cumsum(weights[..., order], axis=-1) / len(other)
    below = np.concatenate([np.zeros((*below.shape[:-1], 1)), below], axis=-1)
    upto = np.searchsorted(other[order], member, side="right")
    under = np.searchsorted(other[order], member, side="left")
    return 1 - below[..., upto], 1 - below[..., under]


def area_up_to(
    above: Float[np.ndarray, "*draw member"],
    at_least: Float[np.ndarray, "*draw member"],
    limit: float,
) -> Float[np.ndarray, "*draw member"]:
    """Each member's area under the ROC curve from false positive rate 0 to ``limit``.

    What :func:`shares_above` gives, in; ``limit`` 1 gives the share of the others that a member
    beats, ties counting one half. Ties are a slope, as in the area under the whole curve.
    """
    tied = at_least - above
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.clip(limit - above, 0, None) ** 2 / (2 * tied)
    beyond = limit >= at_least
    return np.where(beyond, limit - (above + at_least) / 2, np.where(limit > above, inside, 0.0))


def standardised_area(area, limit: float):
    """McClish (1989): a partial area on a scale where chance is .5 and perfect is 1."""
    chance = limit**2 / 2
    return (1 + (area - chance) / (limit - chance)) / 2


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
    """Area under the curve, whole and partial, and true positive rates, of every score in the table.

    Args:
        table: Item rows of one or more scores, higher = member.
        member: Column that says so: booleans, 0 and 1, or words such as seen and unseen.
        by: Coordinates within which members meet others.
        dose: Column that splits the members only, each part against all others, such as copies.
        fpr: False positive rates.
        draws: Resamples, of members and of others apart.

    Returns:
        Rows with the coordinate ``score``, the metric that was the attack, and ``resolution``, the
        smallest false positive rate above 0 that so many others can show. "auc": ``lo`` and ``hi``
        by DeLong (``se``, cut to 0..1), beside them ``lo_bootstrap`` and ``hi_bootstrap``, the
        percentiles of resampled areas. "tpr_at_fpr" and "partial_auc" (standardised: .5 is chance)
        at each rate (coordinate ``fpr``), with percentile intervals. ``n`` counts texts of both
        classes. NaN with a reason; a reason beside a value flags fewer others than ``1 / fpr``.
        Items without a score are left out and counted in ``.attrs["dropped"]``.

    Raises:
        InputError: Unknown columns, labels that are neither, scores that are better low.
    """
    if any(not 0 < rate < 1 for rate in fpr):
        raise InputError(f"membership_auc: fpr is {tuple(fpr)}, all must lie between 0 and 1")
    made = []
    classes, dropped = _classes(table, member, by, dose, "membership_auc")
    for where, part, score, other in classes:
        made.append(_score_rows(part, score, other, where, fpr, level, draws, seed))
    result = pd.concat(made, ignore_index=True)
    result.attrs["dropped"] = dropped
    return result


def roc_curve(
    table: pd.DataFrame,
    *,
    member: str = "member",
    by: Sequence[str] = ("run", "step"),
    simultaneous: bool = False,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The ROC curve of every score: the largest true positive rate at each false positive rate.

    The curve is a step function, each row :func:`tpr_at_fpr` at a rate that the others can show
    (0, 1/n, 2/n, ...; of many others 200 rates). Ties go against the attack, so the area under the
    steps is below the AUC where members and others tie.

    Args:
        table, member, by, level: As for :func:`membership_auc`.
        simultaneous: Whether the band holds for the whole curve at once, or for each rate alone.
        draws: Resamples of both classes behind the pointwise band; the other needs none.

    Returns:
        Rows "tpr_at_fpr" with the coordinates ``score``, ``fpr`` and ``resolution`` (1/n).
        Simultaneous: :func:`kolmogorov_band`, which no distribution of scores breaks, wide where
        texts are few. Pointwise: bootstrap percentiles, too narrow where the rate is a few
        multiples of ``resolution``, as resamples of a largest value are. NaN with a reason: texts
        of one class only.

    Raises:
        InputError: As :func:`membership_auc`.
    """
    made = []
    classes, dropped = _classes(table, member, by, None, "roc_curve")
    for where, part, score, other in classes:
        rates, reason = _rates(len(other)), ""
        if not len(score) or not len(other):
            value = low = high = np.full(len(rates), np.nan)
            reason = "texts of one class only"
        else:
            value = np.array([tpr_at_fpr(score, other, rate) for rate in rates])
            if simultaneous:
                low, high = kolmogorov_band(score, other, rates, level)
            else:
                again = [
                    np.stack([tpr_at_fpr(m, o, rate) for rate in rates], axis=-1)
                    for m, o in _resamples(score, other, draws, seed)
                ]
                tails = [(1 - level) / 2, (1 + level) / 2]
                low, high = np.quantile(np.concatenate(again), tails, axis=0)
        beside = {"fpr": rates, "resolution": _resolution(other), "reason": reason}
        count = len(score) + len(other)
        made.append(rows_at("tpr_at_fpr", value, low, high, part, where, count, beside))
    result = pd.concat(made, ignore_index=True)
    result.attrs["dropped"] = dropped
    return result


def kolmogorov_band(
    member: Float[np.ndarray, " member"],
    other: Float[np.ndarray, " other"],
    rates: Float[np.ndarray, " point"],
    level: float,
) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"]]:
    """A band that holds the whole true ROC curve at least ``level`` of the time.

    Campbell (1994), Statistics in Medicine 13: the shares of others and of members above every
    threshold lie within their exact Kolmogorov distances d and e of those observed, each at the
    root of ``level``, so the curve at a rate lies between the observed one at ``rate - d`` less e
    and the one at ``rate + d`` plus e. With 40 others d is .23, so nothing is known below.
    """
    d, e = (stats.kstwo.ppf(np.sqrt(level), len(each)) for each in (other, member))
    low = [tpr_at_fpr(member, other, x - d) - e if x >= d else 0.0 for x in rates]
    high = [tpr_at_fpr(member, other, x + d) + e for x in rates]
    return np.clip(low, 0.0, 1.0), np.clip(high, 0.0, 1.0)


def membership_trend(
    table: pd.DataFrame,
    *,
    dose: str = "dose",
    by: Sequence[str] = ("run", "step"),
    level: float = 0.95,
) -> pd.DataFrame:
    """Whether a score rises with the number of exposures: the share of pairs in that order.

    Of two texts of different dose, how often the one with more exposures scores higher, ties
    counting one half: .5 where the score says nothing of the dose, 1 where it orders them wholly.
    With two doses it is the AUC; with several the statistic of the Jonckheere-Terpstra test,
    divided by its number of pairs.

    Args:
        table: Item rows of one or more scores, higher = member; texts never seen have dose 0.
        dose: Column with the number of exposures.
        by: Coordinates within which texts are compared.

    Returns:
        Rows "dose_concordance" with the coordinate ``score`` and ``n`` texts; ``se`` over texts
        (Noether 1967, of which DeLong's is the case of two doses, up to n / (n - 1)), ``lo`` and
        ``hi`` from it, cut to 0..1: a trend where they leave out .5. NaN with a reason: one dose.

    Raises:
        InputError: Unknown columns, a dose that is missing, scores that are better low.
    """
    table = attack_rows(table, [*by, dose], "membership_trend")
    if table[dose].isna().any():
        raise InputError(
            f"membership_trend: {dose} is missing in {table[dose].isna().sum()} rows; texts never "
            "trained on have 0"
        )
    made = []
    for where, part in by_score(table[table["value"].notna()], by, "membership_trend"):
        share, error = concordance(part["value"].to_numpy(), part[dose].to_numpy(dtype=float))
        half, reason = stats.norm.ppf((1 + level) / 2) * error, ""
        if np.isnan(share):
            reason = "texts of one dose only"
        elif error == 0:
            error = half = np.nan
            reason = "no error: every pair is in order, or none"
        low, high = max(share - half, 0.0), min(share + half, 1.0)
        if np.isnan(half):
            low = high = np.nan
        beside = {"se": error, "reason": reason}
        made.append(rows_at("dose_concordance", share, low, high, part, where, len(part), beside))
    return pd.concat(made, ignore_index=True)


def concordance(
    score: Float[np.ndarray, " item"], dose: Float[np.ndarray, " item"]
) -> tuple[float, float]:
    """Share of pairs of different dose whose scores are in the order of their doses, and its error.

    Doses 0, 0, 1, 2 with scores 1, 3, 2, 4: pairs (0, 1) half in order, (0, 2) both, (1, 2) one:
    4 of 5. NaN without two doses.
    """
    wins, pairs = np.zeros(len(score)), np.zeros(len(score))
    step = max(1, CHUNK // max(1, len(score)))
    for at in range(0, len(score), step):
        piece = slice(at, at + step)
        order = np.sign(dose[piece, None] - dose)
        agree = np.sign(score[piece, None] - score) * order
        pairs[piece] = np.abs(order).sum(axis=1)
        wins[piece] = (np.abs(order) * (1 + agree) / 2).sum(axis=1)
    if not pairs.sum():
        return float("nan"), float("nan")
    share = wins.sum() / pairs.sum()
    # each pair is counted from both sides
    error = 2 * np.sqrt(((wins - share * pairs) ** 2).sum()) / pairs.sum()
    return float(share), float(error)


def attack_rows(table: pd.DataFrame, names: Sequence[str], asker: str) -> pd.DataFrame:
    """The validated table of scores that are higher for members.

    Raises:
        InputError: One of the columns ``names`` is missing, or a metric is not higher for members.
    """
    table = validate(table)
    for name in names:
        if name not in table.columns:
            raise InputError(f"{asker}: no column {name!r}; there are {', '.join(table)}")
    for key in table["metric"].unique():
        if METRICS[key].better != "high":
            raise InputError(f"{asker}: {key} is not higher for members; leave it out")
    return table


def by_score(table: pd.DataFrame, by: Sequence[str], asker: str) -> Iterator[tuple]:
    """Where each score was measured (``by`` and ``score``), and its item rows there.

    Raises:
        InputError: No rows, or an item with several rows of a score.
    """
    if table.empty:
        raise InputError(f"{asker}: no item has a score; there is nothing to compare")
    for values, part in table.groupby([*by, "metric"], observed=True, sort=False):
        where = dict(zip(by, values[:-1], strict=True)) | {"score": str(values[-1])}
        twice = part["item"].duplicated()
        if twice.any():
            raise InputError(
                f"{asker}: item {part['item'][twice].iloc[0]} has several rows of "
                f"{where['score']}; add what tells them apart to by"
            )
        yield where, part


def _classes(table, member, by, dose, asker) -> tuple[Iterator[tuple], int]:
    """(where, rows, scores of members, scores of others) of each comparison; items left out."""
    table = attack_rows(table, [member, *by, *([dose] if dose else [])], asker)
    is_member = pd.Series(membership_of(table[member], asker), index=table.index)
    usable = table["value"].notna()
    if not usable.any():
        raise InputError(f"{asker}: no item has a score; there is nothing to compare")

    def each():
        for where, part in by_score(table[usable], by, asker):
            inside = is_member[part.index].to_numpy()
            other, members = part["value"].to_numpy()[~inside], part[inside]
            split = members.groupby(dose, observed=True) if dose else [(None, members)]
            for amount, some in split:
                here = where | ({dose: amount} if dose else {})
                yield here, part, some["value"].to_numpy(), other

    return each(), int((~usable).sum())


def membership_of(column: pd.Series, asker: str) -> Bool[np.ndarray, " row"]:
    """True for members: True, 1, seen, train and the like; False for what says the opposite.

    Raises:
        InputError: A value that says neither; ``asker`` is who is named.
    """
    word = column.astype(str).str.strip().str.lower()
    inside = word.isin(SEEN | {"members"}).to_numpy()
    strange = ~inside & ~word.isin(UNSEEN | {"other"}).to_numpy()
    if strange.any():
        raise InputError(
            f"{asker}: {column.name} is {column[strange].iloc[0]!r}, which says neither "
            "member nor non-member; use True and False, or seen and unseen"
        )
    return inside


def _resolution(other: np.ndarray) -> float:
    return 1 / len(other) if len(other) else float("nan")


def _rates(others: int) -> Float[np.ndarray, " point"]:
    """False positive rates that so many others can show, thinned where they are many."""
    if not others:
        return np.array([0.0])
    count = np.arange(others + 1)
    if others > POINTS:
        spread = np.unique(np.geomspace(1, others, POINTS // 2).round())
        even = np.linspace(0, others, POINTS // 2).round()
        count = np.union1d(spread, even)
    return count / others


def _resamples(score, other, draws: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Members and others drawn with replacement, each class by itself, some draws at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // max(len(score), len(other)))
    for done in range(0, draws, step):
        size = min(step, draws - done)
        yield tuple(s[rng.integers(len(s), size=(size, len(s)))] for s in (score, other))


def _area_draws(score, other, limits, draws: int, seed: int) -> Float[np.ndarray, "limit draw"]:
    """Areas up to each limit of resampled members and others."""
    rng = np.random.default_rng([seed, 1])
    step, made = max(1, CHUNK // max(len(score), len(other))), []
    for done in range(0, draws, step):
        size = min(step, draws - done)
        counts = [
            rng.multinomial(len(s), np.full(len(s), 1 / len(s)), size) for s in (score, other)
        ]
        above, at_least = shares_above(score, other, counts[1])
        areas = [counts[0] * area_up_to(above, at_least, limit) for limit in limits]
        made.append(np.stack([area.sum(axis=1) / len(score) for area in areas]))
    return np.concatenate(made, axis=1)


def _score_rows(part, score, other, where, fpr, level, draws, seed) -> pd.DataFrame:
    tails = [(1 - level) / 2, (1 + level) / 2]
    both = bool(len(score) and len(other))
    area, error = area_under_curve(score, other), delong_error(score, other)
    reason = ""
    if not both:
        reason = "texts of one class only"
    elif np.isnan(error):
        reason = "no error: one text in a class"
    elif error == 0:
        reason, error = "no error: the classes do not overlap", np.nan
    half = stats.norm.ppf((1 + level) / 2) * error
    low, high = max(area - half, 0.0), min(area + half, 1.0)
    if np.isnan(half):
        low = high = np.nan
    bands = np.full((2, 1 + len(fpr)), np.nan)
    if not np.isnan(half):  # else resamples say no more about the error than the formula does
        limits = (1.0, *fpr)
        drawn = _area_draws(score, other, limits, draws, seed)
        scaled = [
            d if a == 1 else standardised_area(d, a) for d, a in zip(drawn, limits, strict=True)
        ]
        bands = np.quantile(scaled, tails, axis=1)
    count, resolution = len(score) + len(other), _resolution(other)
    few = [f"{len(other)} others are fewer than 1 / fpr: the rate at no false positive" if resolution > rate else "" for rate in fpr]  # fmt: skip
    beside = {"se": error, "fpr": np.nan, "resolution": resolution, "reason": reason}
    beside |= {"lo_bootstrap": bands[0, 0], "hi_bootstrap": bands[1, 0]}
    made = [rows_at("auc", area, low, high, part, where, count, beside)]
    for at, rate in enumerate(fpr):
        value, whole, edges = np.nan, np.nan, (np.nan, np.nan)
        if both:
            value = float(tpr_at_fpr(score, other, rate))
            pairs = _resamples(score, other, draws, seed)
            edges = np.quantile(np.concatenate([tpr_at_fpr(m, o, rate) for m, o in pairs]), tails)
            whole = standardised_area(area_up_to(*shares_above(score, other), rate).mean(), rate)
        beside = {"fpr": rate, "resolution": resolution, "reason": few[at] if both else reason}
        made.append(rows_at("tpr_at_fpr", value, *edges, part, where, count, beside))
        beside = beside | {"reason": reason}
        band = bands[:, 1 + at]
        made.append(rows_at("partial_auc", whole, *band, part, where, count, beside))
    return pd.concat(made, ignore_index=True)


def rows_at(metric, value, low, high, part, where, count: int, beside: dict) -> pd.DataFrame:
    """Rows of a metric with the coordinates of a comparison.

    Args:
        value, low, high: The numbers and their interval.
        part: Item rows that were compared; means over steps carry the last step.
        where: Coordinates as :func:`by_score` gives them.
        count: Texts compared.
        beside: Further columns.
    """
    more = {name: each for name, each in where.items() if name not in ("run", "step", "group")}
    return rows(
        metric,
        value,
        run=str(part["run"].iloc[0]),
        step=int(part["step"].max()),
        group=str(where.get("group", "all")),
        lo=low,
        hi=high,
        n=count,
        beside=more | beside,
    )
