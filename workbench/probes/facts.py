"""How likely the right answer is, given the question: what a model knows of a fact."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from workbench.facts import check_facts
from workbench.models import LanguageModel
from workbench.table import InputError, rows, validate


def probe_facts(model: LanguageModel, facts: pd.DataFrame) -> pd.DataFrame:
    """Log-probability of each question's target, given its prefix.

    Chang et al. (2024) ask with the sentence as it was read, with a paraphrase, and with a
    question that needs two sentences; the prefix is context, and only the target is scored.

    Args:
        model: Any causal model.
        facts: As :func:`workbench.facts.make_facts` gives them.

    Returns:
        Table with ``log_probability`` (nats per token of the target; 0 at best, a uniform guess
        over V tokens gives -ln V) of each question. Coordinates ``entity``, ``pair``,
        ``depth``, ``schedule``. What a model says without the fact depends on wording and answer: read it
        against the entities never trained on.

    Raises:
        InputError: Not a frame of facts, as :func:`encode_questions`, or NaN scores.
    """
    tokens, prompts, kept = encode_questions(model, check_facts(facts, "probe_facts"))
    table = rows(
        "log_probability",
        target_scores(model, tokens, prompts),
        run=model.run,
        step=model.step,
        group=kept["group"],
        item=kept["item"],
        beside={name: kept[name] for name in ("entity", "pair", "depth", "schedule")},
    )
    table = validate(table)
    table.attrs["dropped"] = kept.attrs["dropped"]
    return table


def encode_questions(
    model: LanguageModel, facts: pd.DataFrame
) -> tuple[list[Int[np.ndarray, " pos"]], Int[np.ndarray, " item"], pd.DataFrame]:
    """Prefix and target as tokens, how many are prefix, and the questions kept.

    A question is dropped, counted and named where a token straddles the border of prefix and
    target: what such a token's score says of the target cannot be told.

    Raises:
        InputError: A question longer than the context, an empty prefix or target, or none left.
    """
    whole = model.encode((facts["probe_prefix"] + facts["probe_target"]).tolist())
    before = model.encode(facts["probe_prefix"].tolist())
    prompts = np.array([len(each) for each in before])
    lengths = np.array([len(each) for each in whole])
    for bad, what in (
        (prompts < 1, "has an empty prefix; the first token has nothing before it"),
        (lengths > model.context, f"is longer than the context of {model.context} tokens; cut it"),
    ):
        if bad.any():
            raise InputError(f"probe_facts: question {facts['item'].to_numpy()[bad][0]!r} {what}")
    clean = np.array(
        [
            len(b) < len(w) and np.array_equal(w[: len(b)], b)
            for b, w in zip(before, whole, strict=True)
        ]
    )
    dropped = int((~clean).sum())
    if dropped:
        names = facts["item"].to_numpy()[~clean][:3]
        told = f"{dropped} of {len(facts)} questions whose target does not begin with a token"
        if dropped == len(facts):
            raise InputError(f"probe_facts: {told}; begin the targets with a space")
        warnings.warn(
            f"probe_facts: dropped {told} (first: {', '.join(map(str, names))})", stacklevel=3
        )
    kept = facts[clean].reset_index(drop=True)
    kept.attrs = {"dropped": dropped}
    return [w for w, ok in zip(whole, clean, strict=True) if ok], prompts[clean], kept


def target_scores(
    model: LanguageModel,
    tokens: Sequence[Int[np.ndarray, " pos"]],
    prompts: Int[np.ndarray, " item"],
) -> Float[np.ndarray, " item"]:
    """Mean log-probability of the tokens after each one's prompt, in nats per token.

    Raises:
        InputError: A score that is not finite; step and number of the question are named.
    """
    value = np.full(len(tokens), np.nan)
    start = int(prompts.min())
    for index, scores in model.score_batches(tokens, start=start, keep=("log_probability",)):
        for row, at in enumerate(index):
            # column c scores token start + c
            asked = scores.log_probability[row, prompts[at] - start : len(tokens[at]) - start]
            value[at] = asked.astype(np.float64).mean()
    if not np.isfinite(value).all():
        first = int(np.flatnonzero(~np.isfinite(value))[0])
        raise InputError(
            f"probe_facts: log_probability is {value[first]} for question number {first} at step "
            f"{model.step} of {model.run}; the model's weights or its dtype give NaN or Inf"
        )
    return value
