"""How far a tuned model's predictions have moved from its base's, text by text."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from workbench.items import check_items, cut_items, items_hash
from workbench.models import TOKENS_PER_BATCH, Checkpoints, LanguageModel, buckets
from workbench.sweep import COORDINATES
from workbench.table import InputError, rows, validate

ELEMENTS = {"cpu": 2**22, "cuda": 2**27, "mps": 2**25}  # of the logits compared at once


def divergence(
    base: Float[torch.Tensor, "row vocab"], tuned: Float[torch.Tensor, "row vocab"]
) -> tuple[Float[torch.Tensor, " row"], Float[torch.Tensor, " row"]]:
    """KL(base || tuned), and the cross-entropy of tuned under base's predictions, in nats.

    The second is the first plus the base's entropy. Base (1/2, 1/2) against tuned (1/4, 3/4):
    .1438410 and .8369882.

    Args:
        base, tuned: Logits of both models at the same positions.

    Returns:
        Both at least 0; a token that only the tuned model rules out makes them infinite.
    """
    log_base, log_tuned = base.log_softmax(dim=1), tuned.log_softmax(dim=1)
    p = log_base.exp()
    # a token of base probability 0 weighs nothing, whatever the tuned model says of it
    kl = torch.where(p > 0, p * (log_base - log_tuned), 0.0).sum(dim=1)
    cross = -torch.where(p > 0, p * log_tuned, 0.0).sum(dim=1)
    return kl.clamp(min=0.0), cross  # below 0 by rounding alone


def probe_drift(
    base: LanguageModel, tuned: LanguageModel | Checkpoints, items: pd.DataFrame
) -> pd.DataFrame:
    """KL and forgetting loss of each text, from one forward pass of either model over it.

    On texts of the new task the KL is what forgetting follows in RL's razor (Shenfeld et al. 2025),
    whatever the method of tuning. On general text the cross-entropy of the tuned model against the
    base's own predictions is the forgetting loss (Kalajdzievski 2024); its least value is the
    base's entropy there, reached at KL 0. Predictions are taken as distributions, not as their
    likeliest token. The vocabulary is compared a few positions at a time.

    Args:
        base: The model before tuning.
        tuned: The model after it, or its checkpoints; another module than the base's.
        items: Items frame; texts longer than either context are cut to it.

    Returns:
        Table with, for each item and step of the tuned run, ``kl_base_tuned`` (0 for the base
        itself) and ``forgetting_loss``, nats per token after the first, higher is further away;
        there is no upper end.

    Raises:
        InputError: Models of different vocabularies or tokenizers, no text of two tokens, or
            predictions that are not finite.
    """
    models = tuned if isinstance(tuned, Checkpoints) else [tuned]
    parts, tokens, kept = [], None, None
    for model in models:
        if tokens is None:
            tokens, kept = _cut(base, model, items)
        found = np.full((2, len(tokens)), np.nan)
        for index in buckets(
            np.array([len(each) for each in tokens]), TOKENS_PER_BATCH.get(base.device.type, 4096)
        ):
            found[:, index] = _compare(base, model, [tokens[i] for i in index])
        _refuse_not_finite(found, kept, base, model)
        where = {"run": model.run, "step": model.step, "group": kept["group"], "item": kept["item"]}
        beside = {name: kept[name] for name in COORDINATES if name in kept.columns}
        pairs = zip(("kl_base_tuned", "forgetting_loss"), found, strict=True)
        parts += [rows(key, value, beside=beside, **where) for key, value in pairs]
    table = validate(pd.concat(parts, ignore_index=True))
    table.attrs = {
        "passport": {**model.passport(), "base": base.passport(), "items": items_hash(items)},
        "dropped": kept.attrs["dropped"],
    }
    return table


def same_vocabulary(
    base: LanguageModel, tuned: LanguageModel, texts: list[str], *, asker: str
) -> None:
    """Refuse two models of which a token does not mean the same.

    Raises:
        InputError: Vocabularies of different sizes, or a text that they cut differently.
    """
    if base.vocabulary != tuned.vocabulary:
        raise InputError(
            f"{asker}: {base.run} has a vocabulary of {base.vocabulary} tokens, {tuned.run} of "
            f"{tuned.vocabulary}; give a model and what was tuned from it"
        )
    pairs = zip(base.encode(texts), tuned.encode(texts), strict=True)
    differ = [i for i, (one, other) in enumerate(pairs) if not np.array_equal(one, other)]
    if differ or base.bos != tuned.bos:
        what = (
            f"cut text number {differ[0]} into other tokens" if differ else "begin texts otherwise"
        )
        raise InputError(
            f"{asker}: the tokenizers of {base.run} and {tuned.run} {what}, so that their "
            "predictions cannot be compared; give a model and what was tuned from it"
        )


def _cut(base: LanguageModel, tuned: LanguageModel, items: pd.DataFrame):
    same_vocabulary(base, tuned, check_items(items)["text"].tolist(), asker="probe_drift")
    _, kept = cut_items(base, items, 2, asker="probe_drift")
    longest = min(base.context, tuned.context)
    return [each[:longest] for each in base.encode(kept["text"].tolist())], kept


@torch.no_grad()
def _compare(
    base: LanguageModel, tuned: LanguageModel, tokens: list[Int[np.ndarray, " pos"]]
) -> Float[np.ndarray, "2 item"]:
    """Mean KL and cross-entropy of a batch of texts over their tokens after the first."""
    first, second = base.logits_at(tokens), tuned.logits_at(tokens)
    width = max(map(len, tokens)) - 1
    there = np.arange(width) < np.array([len(each) - 1 for each in tokens])[:, None]
    flat = torch.from_numpy(np.flatnonzero(there)).to(base.device)
    step = max(1, ELEMENTS.get(base.device.type, 2**22) // base.vocabulary)
    parts = [
        torch.stack(divergence(first(at), second(at.to(tuned.device)).to(at.device)))
        for at in flat.split(step)
    ]
    values = np.zeros((2, *there.shape))
    values[:, there] = torch.cat(parts, dim=1).double().cpu().numpy()
    return values.sum(axis=2) / there.sum(axis=1)


def _refuse_not_finite(found: np.ndarray, kept: pd.DataFrame, base, tuned) -> None:
    bad = np.isnan(found).any(axis=0)
    if bad.any():
        raise InputError(
            f"probe_drift: the predictions for item {kept['item'].iloc[int(bad.argmax())]!r} are "
            f"not finite in {base.run} or in {tuned.run} at step {tuned.step}; the weights or "
            "their dtype give NaN or Inf"
        )
