"""Would greedy decoding give the rest of a text? Decided by one forward pass, without decoding."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Int

from workbench.items import cut_items
from workbench.models import Checkpoints, LanguageModel
from workbench.sweep import Question, sweep
from workbench.table import InputError


def verbatim_length(
    guess: Int[np.ndarray, "item suffix"], truth: Int[np.ndarray, "item suffix"]
) -> Int[np.ndarray, " item"]:
    """How many tokens from the first on are guessed right; 0 at worst, the suffix's length at best."""
    wrong = guess != truth
    return np.where(wrong.any(axis=1), wrong.argmax(axis=1), truth.shape[1])


def probe_extraction(
    source: LanguageModel | Checkpoints,
    items: pd.DataFrame,
    *,
    prefix: int = 50,
    suffix: int = 50,
    suffix_at: int | None = None,
) -> pd.DataFrame:
    """k-extractability (Carlini et al. 2022) and what comes with it in the same pass.

    Greedy decoding from the prompt gives the suffix exactly if and only if each suffix token is
    the argmax under teacher forcing (by induction: until the first miss both have the same
    context), so one forward pass decides what a decoding loop would.

    Args:
        source: A model, or the checkpoints of a run.
        items: Items frame; texts shorter than needed are dropped, counted and named.
        prefix: Prompt length k in tokens, at least 1.
        suffix: Tokens to be reproduced, at least 1.
        suffix_at: Where in the text the suffix begins; None: right after a prompt that begins the
            text. Fix it to compare prompt lengths on one and the same suffix.

    Returns:
        Table with, for each item and step: ``extractable`` (1 if the whole suffix is greedy; 0 by
        chance), ``verbatim_length`` (tokens right before the first miss), ``log_p_z``
        (log-probability of the whole suffix, nats), ``log_probability`` (the same per token) and
        ``top1`` (share of suffix tokens that are the argmax under teacher forcing). Coordinates
        ``prefix`` and ``suffix``.

    Raises:
        InputError: Lengths below 1 or beyond the context, no text long enough, NaN scores.
    """
    for name, value in (("prefix", prefix), ("suffix", suffix)):
        if value < 1:
            raise InputError(f"probe_extraction: {name} is {value}, but must be at least 1")
    begin = prefix if suffix_at is None else suffix_at
    if begin < prefix:
        raise InputError(
            f"probe_extraction: a suffix at token {begin} leaves no room for a prompt of {prefix}; "
            "shorten the prompt or move the suffix"
        )

    def cut(model, frame):
        tokens, kept = cut_items(model, frame, begin + suffix, asker="probe_extraction")
        return tokens[:, begin - prefix :], kept

    return sweep(
        source,
        items,
        cut,
        Question(
            asker="probe_extraction",
            start=prefix,
            keep=("log_probability", "guess"),
            settings={"prefix": prefix, "suffix": suffix}
            | ({} if suffix_at is None else {"suffix_at": suffix_at}),
            reduce=_reduce(prefix),
        ),
    )


def _reduce(prefix: int):
    def reduce(scores, tokens, index):
        # guess[:, t] is for token prefix + t: the first suffix token is guessed from the prompt
        truth = np.stack(tokens)[:, prefix:]
        length = verbatim_length(scores.guess, truth)
        log_p_z = scores.log_probability.sum(axis=1, dtype=np.float64)
        return {
            "extractable": (length == truth.shape[1]).astype(float),
            "verbatim_length": length.astype(float),
            "log_p_z": log_p_z,
            "log_probability": log_p_z / truth.shape[1],
            "top1": (scores.guess == truth).mean(axis=1),
        }

    return reduce
