"""How much likelier is a planted text than others it might have been? Exposure, in bits."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import special

from workbench.decoys import make_decoys
from workbench.items import check_items, cut_items
from workbench.models import Checkpoints, LanguageModel
from workbench.sweep import Question, sweep
from workbench.table import InputError, rows, validate

REFUSED = 0.01  # p-value of the fit below which its tail is not read
BEYOND = 2  # times the bits the decoys resolve: as far out again as they reach
LARGEST_SKEW = 0.99  # a skew-normal distribution stays below .9953


def exposure(
    canary: Float[np.ndarray, " canary"], decoy: Float[np.ndarray, " decoy"]
) -> Float[np.ndarray, " canary"]:
    """Bits by which a canary's rank among its look-alikes is better than the last place.

    Carlini et al. (2019): ``log2(R) - log2(rank)`` of R candidates, the canary and its decoys,
    rank 1 being the likeliest. Rank 1 of 1024 gives 10, the last place 0. Without any memory every
    rank is as likely, and the mean is 1 / ln 2 = 1.44 as R grows. Ties favour the canary.

    Args:
        canary: Negative log-likelihood of each canary.
        decoy: The same of each decoy; at least one.
    """
    rank = 1 + np.searchsorted(np.sort(decoy), canary, side="left")
    return np.log2(1 + len(decoy)) - np.log2(rank)


def exposure_interval(
    likelier: Int[np.ndarray, " canary"], decoys: int, level: float
) -> tuple[Float[np.ndarray, " canary"], Float[np.ndarray, " canary"]]:
    """Bounds of ``-log2 p``, p the share of all fillings that are likelier than the canary.

    A bootstrap over decoys draws their number from a binomial distribution, so it needs no
    drawing; but it has no width where no decoy is likelier, so the exact bounds (Clopper & Pearson
    1934) are given: infinite above there, for the decoys cannot tell how far beyond them it lies.
    """
    tail = (1 - level) / 2
    with np.errstate(divide="ignore"):
        most = np.where(
            likelier == decoys,
            1.0,
            special.betaincinv(likelier + 1.0, np.maximum(decoys - likelier, 1e-9), 1 - tail),
        )
        least = np.where(
            likelier == 0,
            0.0,
            special.betaincinv(np.maximum(likelier, 1e-9), decoys - likelier + 1.0, tail),
        )
        return -np.log2(most) + 0.0, -np.log2(least)


def fit_skew_normal(
    sample: Float[np.ndarray, "*draw decoy"], weight: Float[np.ndarray, "draw decoy"] | None = None
) -> Float[np.ndarray, " parameter *draw"]:
    """Shape, location and scale of the skew-normal distribution with the sample's three moments.

    In closed form (Azzalini 1985), so that every draw of a bootstrap is fitted; a sample more
    skewed than any skew-normal gets the most skewed one, which :func:`fit_distance` then shows.

    Args:
        sample: Values, the last axis a sample; with ``weight`` one sample of which every row of
            weights, which sum to 1, makes another.
    """
    origin = sample.mean(axis=-1, keepdims=True)
    apart = sample - origin
    if weight is None:
        first, second, third = (np.mean(apart**k, axis=-1) for k in (1, 2, 3))
    else:
        first, second, third = (weight @ apart**k for k in (1, 2, 3))
    variance = second - first**2
    central = third - 3 * first * second + 2 * first**3
    skew = np.clip(central / variance**1.5, -LARGEST_SKEW, LARGEST_SKEW)
    power = np.abs(skew) ** (2 / 3)
    share = power / (power + ((4 - np.pi) / 2) ** (2 / 3))
    delta = np.sign(skew) * np.sqrt(np.pi / 2 * share)
    scale = np.sqrt(variance / (1 - 2 * delta**2 / np.pi))
    location = origin[..., 0] + first - scale * delta * np.sqrt(2 / np.pi)
    return np.stack([delta / np.sqrt(1 - delta**2), location, scale])


def skew_normal_cdf(value, shape, location, scale) -> np.ndarray:
    """Share below ``value``; right to 1e-8 of itself down to 1e-8, beyond which it is not asked."""
    z = (value - location) / scale
    return np.clip(special.ndtr(z) - 2 * special.owens_t(z, shape), 0.0, 1.0)


def fit_distance(sample: Float[np.ndarray, "*draw decoy"], fit) -> Float[np.ndarray, "*draw"]:
    """Kolmogorov-Smirnov distance of samples from the distributions fitted to them."""
    size = sample.shape[-1]
    below = skew_normal_cdf(np.sort(sample, axis=-1), *(each[..., None] for each in fit))
    steps = np.arange(size + 1) / size
    return np.maximum(below - steps[:-1], steps[1:] - below).max(axis=-1)


def probe_exposure(
    source: LanguageModel | Checkpoints,
    items: pd.DataFrame,
    *,
    decoys: pd.DataFrame | None = None,
    count: int = 1023,
    level: float = 0.95,
    draws: int = 199,
    seed: int = 0,
) -> pd.DataFrame:
    """Exposure of each item at each step, by its rank among decoys and by their fitted tail.

    Carlini et al. (2019), "The Secret Sharer". Texts are compared by the log-probability of all
    their tokens but the first, in one forward pass a text; the decoys' serve all items. The rank
    cannot tell more than ``log2`` of the number of candidates. Beyond that a skew-normal
    distribution fitted to the decoys' log-perplexities is read below the canary's.

    Args:
        source: A model, or the checkpoints of a run.
        items: Items frame. With ``kind`` in both frames items meet the decoys of their kind.
        decoys: Items frame of texts drawn as the items were and never trained on, by
            ``fill_template`` or ``load_items``. None: ``make_decoys``, for canaries and
            biographies.
        count: Decoys of each kind that ``make_decoys`` draws.
        level: Of the intervals.
        draws: Of decoys, with replacement, for the interval of the extrapolated exposure, and
            from the fitted distribution for its p-value.
        seed: Of decoys and draws.

    Returns:
        Table with, for each item and step, ``exposure`` (0 to ``log2`` of the coordinate
        ``candidates``) and ``exposure_extrapolated``; both average 1.44 bits without memory. The
        first has exact binomial bounds over decoys; where no decoy is likelier the value is a lower
        bound, with ``reason`` "at least" and ``hi`` infinite; where ``fill_template`` gave all
        fillings, there is nothing to estimate and the bounds are the value. The second has a
        bootstrap interval over decoys, and is NaN with a reason where the fit is refused (its
        p-value below .01) or has to be read further out than twice the bits that the decoys
        resolve. Rows of group "decoy" and item "all" hold ``fit_distance`` (Kolmogorov-Smirnov) and
        its ``p_value`` by drawing from the fit and fitting again. Decoys that are also items, and
        items whose kind has no decoys, are left out and counted in ``.attrs["dropped"]``.

    Raises:
        InputError: Fewer than 2 decoys, no item with decoys, too few draws, NaN scores.
    """
    if draws < 100:  # with fewer no p-value lies below REFUSED
        raise InputError(f"probe_exposure: draws is {draws}, its p-value needs at least 100")
    if not 0 < level < 1:
        raise InputError(f"probe_exposure: level is {level}, it must lie between 0 and 1")
    items = check_items(items)
    if decoys is None:
        first = next(iter(source)) if isinstance(source, Checkpoints) else source
        decoys = make_decoys(items, count, tokenizer=first.tokenizer, seed=seed)
    items, others, dropped = _meeting(items, decoys)
    whole = decoys.attrs.get("space") == len(decoys)
    asked = pd.concat([items, others], ignore_index=True)
    panel = sweep(source, asked, _cut, QUESTION)
    steps = panel["step"].unique()
    # a sweep's rows are ordered by step, and within it as the texts were asked
    nats = -panel["value"].to_numpy().reshape(len(steps), -1)
    texts = panel.iloc[: nats.shape[1]].drop(columns=["metric", "value", "lo", "hi"])
    is_decoy = texts["item"].isin(set(others["item"])).to_numpy()
    kinds = texts["kind"] if "kind" in texts else pd.Series("", index=texts.index)
    parts = []
    for kind in kinds.unique():
        mine = (kinds == kind).to_numpy()
        here, rivals = np.flatnonzero(mine & ~is_decoy), np.flatnonzero(mine & is_decoy)
        if len(rivals) < 2:
            told = f" of kind {kind}" if kind else ""
            raise InputError(f"probe_exposure: {len(rivals)} decoys{told}, needs at least 2")
        rng = np.random.default_rng([seed, 22])
        for step, each in zip(steps, nats, strict=True):
            told = texts.iloc[here].assign(step=step, candidates=len(rivals) + 1)
            fit = _fitted(each[rivals], draws, rng)
            parts.append(told.assign(**_ranked(each[here], each[rivals], level, whole)))
            parts.append(told.assign(**_by_tail(each[here], each[rivals], fit, level, draws, rng)))
            parts.append(_fit_rows(fit, told.iloc[:1], len(rivals)))
    result = validate(pd.concat(parts, ignore_index=True))
    result.attrs = panel.attrs | {"dropped": dropped + panel.attrs["dropped"]}
    return result


def _meeting(items: pd.DataFrame, decoys: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Items that have decoys, decoys that are none of the items, and how many are neither."""
    known = decoys["text"].isin(set(items["text"]))
    others = decoys[~known].assign(group="decoy")
    if not len(others):
        raise InputError(
            f"probe_exposure: all of {len(decoys)} decoys are texts of the items; give others"
        )
    if "kind" not in others.columns:
        return items.drop(columns="kind", errors="ignore"), others, int(known.sum())
    alone = ~items["kind"].isin(set(others["kind"])) if "kind" in items else known[:0]
    if "kind" not in items or alone.all():
        raise InputError(
            f"probe_exposure: the decoys are of kind {', '.join(sorted(set(others['kind'])))}, "
            "and no item is; name the kind of the items alike"
        )
    if alone.any():
        kinds = ", ".join(sorted(set(items["kind"][alone].astype(str))))
        warnings.warn(
            f"probe_exposure: left out {alone.sum()} of {len(items)} items, of kind {kinds}, which "
            "has no decoys",
            stacklevel=3,
        )
    others = others[others["kind"].isin(set(items["kind"]))]
    return items[~alone], others, int(known.sum() + alone.sum())


def _cut(model: LanguageModel, frame: pd.DataFrame):
    _, kept = cut_items(model, frame, 2, asker="probe_exposure")
    return [each[: model.context] for each in model.encode(kept["text"].tolist())], kept


def _reduce(scores, tokens, index):
    return {"log_p_z": np.nansum(scores.log_probability, axis=1, dtype=np.float64)}


QUESTION = Question("probe_exposure", 1, ("log_probability",), {}, _reduce)


def _ranked(canary, decoy, level: float, whole: bool) -> dict:
    value = exposure(canary, decoy)
    likelier = np.searchsorted(np.sort(decoy), canary, side="left")
    lo, hi = (value, value) if whole else exposure_interval(likelier, len(decoy), level)
    top = f"at least: likelier than all {len(decoy)} decoys"
    reason = np.where((likelier == 0) & (not whole), top, "")
    return {"metric": "exposure", "value": value, "lo": lo, "hi": hi, "reason": reason}


def _fitted(decoy, draws: int, rng) -> dict:
    """The distribution fitted to the decoys, and whether samples of it look like them."""
    if decoy.std() < 1e-9 * max(1.0, abs(decoy.mean())):
        return {"shape": None, "distance": np.nan, "p": np.nan, "why": "the decoys do not vary"}
    shape, location, scale = fit_skew_normal(decoy)
    distance = fit_distance(decoy, (shape, location, scale))
    # its distance from its own sample does not depend on location and scale
    delta = shape / np.hypot(1, shape)
    half, normal = rng.standard_normal((2, draws, len(decoy)))
    again = delta * np.abs(half) + np.sqrt(1 - delta**2) * normal
    p = (1 + (fit_distance(again, fit_skew_normal(again)) >= distance).sum()) / (1 + draws)
    why = f"no skew-normal distribution fits the decoys (p = {p:.3f})" if p < REFUSED else ""
    return {"shape": (shape, location, scale), "distance": distance, "p": p, "why": why}


def _by_tail(canary, decoy, fit: dict, level: float, draws: int, rng) -> dict:
    empty = np.full(len(canary), np.nan)
    made = {"metric": "exposure_extrapolated", "value": empty, "lo": empty, "hi": empty}
    if fit["why"]:
        return made | {"reason": fit["why"]}
    weight = rng.multinomial(len(decoy), np.full(len(decoy), 1 / len(decoy)), size=draws)
    again = fit_skew_normal(decoy, weight / len(decoy))[:, :, None]
    with np.errstate(divide="ignore"):
        value = -np.log2(skew_normal_cdf(canary, *fit["shape"])) + 0.0  # 0, not -0
        drawn = -np.log2(skew_normal_cdf(canary[None], *again)) + 0.0
    limit = BEYOND * np.log2(len(decoy) + 1)
    far = value > limit
    # one draw may lie where the tail cannot be computed; as a bound the limit is far enough
    lo, hi = np.quantile(np.minimum(drawn, 2 * limit), [(1 - level) / 2, (1 + level) / 2], axis=0)
    why = f"beyond {limit:.0f} bits, {BEYOND} times what {len(decoy)} decoys resolve"
    made |= {"value": np.where(far, np.nan, value), "reason": np.where(far, why, "")}
    return made | {"lo": np.where(far, np.nan, lo), "hi": np.where(far, np.nan, hi)}


def _fit_rows(fit: dict, like: pd.DataFrame, decoys: int) -> pd.DataFrame:
    beside = {"candidates": decoys + 1, "reason": fit["why"] if fit["shape"] is None else ""}
    if "kind" in like:
        beside["kind"] = str(like["kind"].iloc[0])
    place = {"run": str(like["run"].iloc[0]), "step": int(like["step"].iloc[0]), "group": "decoy"}
    made = [
        rows(metric, fit[name], n=decoys, beside=beside, **place)
        for metric, name in (("fit_distance", "distance"), ("p_value", "p"))
    ]
    return pd.concat(made, ignore_index=True)
