"""Was this text trained on? Attack scores from one forward pass; higher always means member."""

from __future__ import annotations

import zlib

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from workbench.items import cut_items
from workbench.models import Checkpoints, LanguageModel
from workbench.sweep import Question, sweep
from workbench.table import InputError

ZLIB_LEVEL = 6  # the library's default; part of the score's definition


def min_k(
    score: Float[np.ndarray, "item next"], length: Int[np.ndarray, " item"], k: float
) -> Float[np.ndarray, " item"]:
    """Mean of the lowest ``max(1, floor(k * n))`` of an item's n token scores.

    Shi et al. (2024) with log-probabilities, Zhang et al. (2025) with standardised ones (Min-K++).
    ``k = 1`` is the plain mean. Columns past an item's length are not looked at.
    """
    past = np.arange(score.shape[1])[None, :] >= length[:, None]
    ordered = np.sort(np.where(past, np.inf, score), axis=1)
    # a k such as .29 times 100 is 28.999999999999996 in floating point
    count = np.maximum(1, np.floor(k * length + 1e-9)).astype(int)
    total = np.cumsum(np.where(np.isinf(ordered), 0.0, ordered), axis=1)
    return total[np.arange(len(count)), count - 1] / count


def standardised(
    log_probability: Float[np.ndarray, "item next"],
    mu: Float[np.ndarray, "item next"],
    sigma: Float[np.ndarray, "item next"],
) -> Float[np.ndarray, "item next"]:
    """``(log p - mu) / sigma`` over the vocabulary; 0 where the model is uniform (sigma 0)."""
    gap = log_probability - mu
    return np.divide(gap, sigma, out=np.zeros_like(gap), where=sigma > 1e-6)


def zlib_bytes(text: str) -> int:
    """Length of the compressed text; 19 for ``hello world``."""
    return len(zlib.compress(text.encode("utf-8"), ZLIB_LEVEL))


def probe_membership(
    source: LanguageModel | Checkpoints, items: pd.DataFrame, *, k: float = 0.2
) -> pd.DataFrame:
    """Membership scores of each item: loss, zlib, Min-K and Min-K++.

    Args:
        source: A model, or the checkpoints of a run.
        items: Items frame; texts are cut at the model's context, those of one token dropped.
        k: Share of the lowest-scored tokens that Min-K and Min-K++ average, in (0, 1].

    Returns:
        Table with ``member_loss`` (mean log p), ``member_zlib`` (mean log p over compressed
        bytes), ``member_mink`` and ``member_minkpp`` for each item and step; what a score is at
        chance depends on the text, so it means something only against held-out texts
        (``membership_auc``). Coordinate ``k``.

    Raises:
        InputError: ``k`` outside (0, 1], no text of two tokens.
    """
    if not 0 < k <= 1:
        raise InputError(f"probe_membership: k is {k}, but must be above 0 and at most 1")
    compressed: list[int] = []

    def cut(model, frame):
        _, kept = cut_items(model, frame, 2, asker="probe_membership")
        compressed.extend(zlib_bytes(text) for text in kept["text"])
        return [each[: model.context] for each in model.encode(kept["text"].tolist())], kept

    def reduce(scores, tokens, index):
        mean = np.nansum(scores.log_probability, axis=1) / scores.length
        z = standardised(scores.log_probability, scores.mu, scores.sigma)
        return {
            "member_loss": mean,
            "member_zlib": mean / np.array(compressed)[index],
            "member_mink": min_k(scores.log_probability, scores.length, k),
            "member_minkpp": min_k(z, scores.length, k),
        }

    return sweep(
        source,
        items,
        cut,
        Question(
            asker="probe_membership",
            start=1,
            keep=("log_probability", "mu", "sigma"),
            settings={"k": k},
            reduce=reduce,
        ),
    )
