"""How likely a text is to a model, token by token."""

from __future__ import annotations

import numpy as np
import pandas as pd

from workbench.items import check_items, cut_items
from workbench.models import Checkpoints, LanguageModel
from workbench.sweep import Question, sweep
from workbench.table import InputError


def probe_likelihood(
    source: LanguageModel | Checkpoints,
    items: pd.DataFrame,
    *,
    prefix: int = 1,
    length: int | None = None,
) -> pd.DataFrame:
    """Mean log-probability and argmax hits of each item's tokens after its first ``prefix``.

    Args:
        source: A model, or the checkpoints of a run.
        items: Items frame.
        prefix: Tokens given as context and not scored, at least 1.
        length: Tokens of each text that count; shorter ones are dropped. None: all of each
            text, up to the model's context.

    Returns:
        Table with, for each item and step, ``log_probability`` (nats per token, 0 at best; a
        uniform guess over V tokens gives -ln V) and ``top1`` (share of tokens that are the
        argmax; 1 / V by chance, 1 at best). Coordinate ``prefix``.

    Raises:
        InputError: ``prefix`` below 1, no text long enough, NaN scores.
    """
    if prefix < 1:
        raise InputError(
            f"probe_likelihood: prefix is {prefix}, but must be at least 1: the first token has "
            "nothing before it"
        )
    return sweep(
        source,
        items,
        lambda model, frame: _cut(model, frame, prefix, length),
        Question(
            asker="probe_likelihood",
            start=prefix,
            keep=("log_probability", "guess"),
            settings={"prefix": prefix} | ({} if length is None else {"length": length}),
            reduce=_reduce(prefix),
        ),
    )


def _cut(model, items, prefix, length):
    if length is not None:
        return cut_items(model, items, length, asker="probe_likelihood")
    # one token beyond the prefix is the least there is to score
    _, kept = cut_items(model, items, prefix + 1, asker="probe_likelihood")
    tokens = model.encode(check_items(kept)["text"].tolist())
    return [each[: model.context] for each in tokens], kept


def _reduce(start: int):
    def reduce(scores, tokens, index):
        hits = [s[: len(t) - start] == t[start:] for s, t in zip(scores.guess, tokens, strict=True)]
        return {
            "log_probability": np.nansum(scores.log_probability, axis=1) / scores.length,
            "top1": np.array([each.mean() for each in hits]),
        }

    return reduce
