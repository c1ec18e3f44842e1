"""What the model says after a prompt, and how sure it is: an extraction attack's list of guesses."""

from __future__ import annotations

import numpy as np
import pandas as pd

from workbench.items import cut_items, items_hash
from workbench.models import LanguageModel
from workbench.sweep import panel
from workbench.table import InputError, rows, validate


def probe_guesses(
    model: LanguageModel, items: pd.DataFrame, *, prefix: int = 50, suffix: int = 50
) -> pd.DataFrame:
    """Continue each prompt greedily and score the continuation, without looking at the truth.

    Someone who attacks a model knows its guesses, not which of them are right; they order them by
    the model's own confidence (Carlini et al. 2021). ``ranked_guesses`` says how far that gets.

    Args:
        model: Any causal model.
        items: Items frame; texts shorter than needed are dropped, counted and named.
        prefix: Prompt length in tokens, at least 1.
        suffix: Tokens guessed, at least 1.

    Returns:
        Table with, for each item, ``guess_log_probability`` (of the whole continuation, nats; 0 at
        best) and ``extractable`` (1 if the continuation is the text's own; 0 by chance).
        Coordinates ``prefix`` and ``suffix``.

    Raises:
        InputError: Lengths below 1 or beyond the context, no text long enough.
    """
    for name, value in (("prefix", prefix), ("suffix", suffix)):
        if value < 1:
            raise InputError(f"probe_guesses: {name} is {value}, but must be at least 1")
    tokens, kept = cut_items(model, items, prefix + suffix, asker="probe_guesses")
    settings = {"prefix": prefix, "suffix": suffix}

    def make() -> pd.DataFrame:
        prompts, truth = tokens[:, :prefix], tokens[:, prefix:]
        said = model.generate(prompts, suffix)
        scores = model.score(np.concatenate([prompts, said], axis=1), start=prefix)
        value = {
            "guess_log_probability": scores.log_probability.sum(axis=1, dtype=np.float64),
            "extractable": (said == truth).all(axis=1).astype(float),
        }
        beside = settings | {n: kept[n] for n in ("kind", "cohort", "dose") if n in kept}
        where = {"run": model.run, "step": model.step, "group": kept["group"], "item": kept["item"]}
        parts = [rows(metric, each, beside=beside, **where) for metric, each in value.items()]
        table = validate(pd.concat(parts, ignore_index=True))
        table.attrs = {
            "passport": {**model.passport(), "items": items_hash(items)},
            "dropped": kept.attrs["dropped"],
        }
        return table

    return panel("probe_guesses", model, tokens, items, settings, make)
