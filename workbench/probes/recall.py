"""How much of a text a model says by itself when it is given the first half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int

from workbench.items import check_items
from workbench.models import LanguageModel
from workbench.table import InputError, rows, validate

ROUGE = ("1", "2", "L")
RECALL = ("recall_exact", "recall_token", "recall_edit", *(f"recall_rouge{k}" for k in ROUGE))
BATCH = 128  # texts that are continued at once
SPARE = 12  # finished rows that are worth a copy of the cache to be rid of
REMEMBERED = 2**12  # pairs of texts; at neighbouring lags a model often says the same again


def probe_recall(model: LanguageModel, items: pd.DataFrame) -> pd.DataFrame:
    """Prompt with the first half of each text, continue greedily, score the second half alone.

    Orhan (2023). With the prompt left in, a model without any memory scores ROUGE-1 of .53, so the
    prompt is scored nowhere. A text of an odd number of tokens has the longer half at the end.

    Args:
        model: Any causal model.
        items: Items frame.

    Returns:
        Table with, for each item, ``recall_exact`` (1 if every token of the suffix is right, else
        0), ``recall_token`` (share of positions that are right), ``recall_edit`` (1 - token edit
        distance / length) and ``recall_rouge1``, ``2``, ``L`` (F over the words of the decoded
        text). All are 0 at worst and 1 at best; without memory exact is 0 and the others are what
        the language gives, so a control is needed. ROUGE-n is NaN with a ``reason`` where the
        suffix has fewer than n words.

    Raises:
        InputError: A text of one token, or longer than the context.
    """
    return prepare_recall(model, items)(model)


def prepare_recall(
    model: LanguageModel, items: pd.DataFrame
) -> Callable[[LanguageModel], pd.DataFrame]:
    """Encode and cut the texts once, where the same are asked for at many steps.

    Args, raises: As :func:`probe_recall`.

    Returns:
        What gives its table for a model with this one's tokenizer.
    """
    items = check_items(items)
    tokens = model.encode(items["text"].tolist())
    _refuse(model, items, tokens)
    truth = [each[len(each) // 2 :] for each in tokens]
    prompts = [each[: len(each) // 2] for each in tokens]
    new = [len(each) for each in truth]
    where = {"run": model.run, "group": items["group"], "item": items["item"]}
    # which scores a suffix has at all is known from the suffix
    lacking = [np.isnan(list(recall_scores(model, each, each).values())) for each in truth]
    parts = [
        rows(metric, np.nan, beside={"reason": np.where(no, "the suffix has too few words", "")},
             **where)
        for metric, no in zip(RECALL, np.transpose(lacking), strict=True)
    ]  # fmt: skip
    frame = validate(pd.concat(parts, ignore_index=True))

    def ask(model: LanguageModel) -> pd.DataFrame:
        said = continue_greedily(model, prompts, new)
        scored = [recall_scores(model, *pair) for pair in zip(said, truth, strict=True)]
        value = np.array([each[metric] for metric in RECALL for each in scored])
        run = frame["run"].cat.rename_categories([model.run])
        return frame.assign(run=run, step=model.step, value=value)

    return ask


def recall_scores(
    model: LanguageModel, said: Int[np.ndarray, " suffix"], truth: Int[np.ndarray, " suffix"]
) -> dict[str, float]:
    """The recall measures of one suffix; both sequences are of one length."""
    words = rouge(model.decode(said), model.decode(truth))
    return {
        "recall_exact": float((said == truth).all()),
        "recall_token": float((said == truth).mean()),
        "recall_edit": edit_similarity(said, truth),
        **{f"recall_rouge{kind}": value for kind, value in words.items()},
    }


def edit_similarity(said: Sequence[int], truth: Sequence[int]) -> float:
    """1 - Levenshtein distance / length of the longer; 1 for equals, 0 for nothing in common."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(list(said), list(truth))


@lru_cache(REMEMBERED)
def rouge(said: str, truth: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F of two texts (Lin 2004; no stemming), NaN where n words are lacking."""
    scorer = _rouge_scorer()
    scores = scorer.score(truth, said)
    words = len(scorer._tokenizer.tokenize(truth))
    least = {"1": 1, "2": 2, "L": 1}
    return {k: scores[f"rouge{k}"].fmeasure if words >= least[k] else np.nan for k in ROUGE}


@cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([f"rouge{kind}" for kind in ROUGE], use_stemmer=False)


def continue_greedily(
    model: LanguageModel, prompts: Sequence[Int[np.ndarray, " pos"]], new: Sequence[int]
) -> list[Int[np.ndarray, " new"]]:
    """Greedy continuations of prompts of unlike lengths, ``new`` tokens of each.

    All rows read the length of the shortest prompt at once and go on together, one token a step:
    a row still inside its prompt takes the prompt's token, one past it the argmax. So no row is
    padded on the left, positions are what they are alone, and there is one loop, not one a length.
    The shortest end first, and leave the cache where its kind allows.
    """
    total = np.array([len(p) + k for p, k in zip(prompts, new, strict=True)])
    order = np.argsort(total, kind="stable")  # rows of like length end together
    said: list = [None] * len(prompts)
    for at in range(0, len(order), BATCH):
        index = order[at : at + BATCH]
        whole = _continue(model, [prompts[i] for i in index], total[index])
        for row, i in enumerate(index):
            said[i] = whole[row, len(prompts[i]) : total[i]]
    return said


@torch.no_grad()
def _continue(model, prompts, total) -> Int[np.ndarray, "row pos"]:
    # total ascends
    lengths = np.array([len(each) for each in prompts])
    given = np.zeros((len(prompts), lengths.max()), dtype=np.int64)
    for row, each in enumerate(prompts):
        given[row, : len(each)] = each
    start = lengths.min()
    ids = given[:, :start]
    if model.bos is not None:
        ids = np.insert(ids, 0, model.bos, axis=1)
    ids, cache_ = torch.from_numpy(ids.copy()).to(model.device), None
    whole = np.zeros((len(prompts), total.max()), dtype=np.int64)
    whole[:, :start] = given[:, :start]
    first = 0  # rows before it are finished and gone
    for pos in range(start, total.max()):
        out = model.module(input_ids=ids, past_key_values=cache_, use_cache=True, logits_to_keep=1)
        cache_, token = out.past_key_values, out.logits[:, -1].argmax(-1).cpu().numpy()
        if pos < lengths.max():
            token = np.where(pos < lengths[first:], given[first:, pos], token)
        whole[first:, pos] = token
        done = int((total <= pos + 1).sum()) - first
        if SPARE <= done < len(token) and hasattr(cache_, "batch_select_indices"):
            left = torch.arange(done, len(token), device=model.device)
            cache_.batch_select_indices(left)
            token, first = token[done:], first + done
        ids = torch.from_numpy(token[:, None]).to(model.device)
    return whole


def _refuse(model: LanguageModel, items: pd.DataFrame, tokens: Sequence) -> None:
    lengths = np.array([len(each) for each in tokens])
    for bad, what in (
        (lengths < 2, "needs at least 2, a prompt and a suffix; drop it"),
        (lengths > model.context, f"the context holds {model.context}; cut it"),
    ):
        if bad.any():
            first = int(bad.argmax())
            raise InputError(
                f"probe_recall: item {items['item'].iloc[first]} has {lengths[first]} tokens, "
                f"{what} ({bad.sum()} of {len(items)} texts)"
            )
