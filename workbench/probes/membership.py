"""Was this text trained on? Attack scores of single texts; higher always means member.

Loss, zlib, Min-K and Min-K++ come from one forward pass. A reference model, a prefix, neighbours
or gradients each cost passes of their own, and are asked for by giving them.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from workbench.items import check_items, cut_items
from workbench.models import Checkpoints, LanguageModel
from workbench.sweep import Question, sweep
from workbench.table import InputError, validate

ZLIB_LEVEL = 6  # the library's default; part of the score's definition
SAME_MODEL = 1e-6  # nats per token; a reference that never differs by more is the model itself


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
    source: LanguageModel | Checkpoints,
    items: pd.DataFrame,
    *,
    k: float = 0.2,
    reference: LanguageModel | None = None,
    non_members: Sequence[str] = (),
    neighbours: pd.DataFrame | None = None,
    gradient: bool = False,
) -> pd.DataFrame:
    """Membership scores of each item: loss, zlib, Min-K and Min-K++, and what is asked for besides.

    All score the tokens after the first, and all are higher for a member:

    - ``member_loss`` mean log p; ``member_zlib`` that over compressed bytes; ``member_mink`` and
      ``member_minkpp`` the mean of the lowest share ``k`` of log p, and of log p standardised.
    - ``member_reference`` (``reference``): mean log p minus the reference model's. Where its
      tokenizer cuts a text otherwise, both totals are divided by this model's token count (each
      total leaves out that model's own first token).
    - ``member_recall`` (``non_members``): ReCaLL, mean log p given the prefix over mean log p
      without (Xie et al. 2024, in paper and code). Both are negative, so it exceeds 1 where an
      unfamiliar prefix makes the text less likely, which it does more to members. The prefix is
      the texts' tokens one after another, nothing between.
    - ``member_neighbourhood`` (``neighbours``): mean log p minus its mean over the neighbours
      (Mattern et al. 2023, who write it with losses and so with the other sign); 0 where the text
      is no likelier than its neighbours.
    - ``member_gradient`` (``gradient``): minus the Euclidean norm, over all parameters, of the
      gradient of the mean loss (Wang et al. 2024; some code takes the mean of the layers' norms).
      One text at a time, forwards and backwards with all gradients in memory, and never cached:
      some twenty times slower than the first four together.

    Args:
        source: A model, or the checkpoints of a run.
        items: Items frame; texts are cut at the model's context, those of one token dropped.
        k: Share of the lowest-scored tokens that Min-K and Min-K++ average, in (0, 1].
        reference: A model that did not train on the members, best one trained on texts alike. It
            is asked before ``source`` is, so it may be one of its checkpoints.
        non_members: Texts known not to be trained on, none of them among the items.
        neighbours: Columns ``item`` (whose neighbour) and ``text``; ``make_neighbours`` makes them.
        gradient: Whether to take gradients.

    Returns:
        Table with a row for each item, step and score; what a score is at chance depends on the
        text, so it means something only against held-out texts (``membership_auc``). Coordinate
        ``k``. NaN with a reason: a text that does not fit into the context with its prefix or into
        the reference's, one without neighbours or with log p 0, a reference that is the model.

    Raises:
        InputError: ``k`` outside (0, 1], no text of two tokens, NaN or infinite log-probabilities,
            a prefix that is among the items or leaves no room, neighbours of no item.
    """
    if not 0 < k <= 1:
        raise InputError(f"probe_membership: k is {k}, but must be above 0 and at most 1")
    items = check_items(items)
    # first, for it may share its module with the checkpoints that are read next
    held = None if reference is None else _reference_scores(source, reference, items)
    base = sweep(source, items, *_forward_question(k))
    loss = base[base["metric"] == "member_loss"]
    parts = [base]
    if held is not None:
        parts.append(_reference_rows(loss, held))
    if len(non_members):
        parts.append(_recall_rows(source, items, list(non_members), loss))
    if neighbours is not None:
        parts.append(_neighbourhood_rows(source, items, neighbours, loss))
    if gradient:
        parts.append(_gradient_rows(source, items, loss))
    table = pd.concat(parts, ignore_index=True)
    if "reason" in table.columns:
        table["reason"] = table["reason"].astype(object).fillna("")
    table = validate(table)
    table.attrs = base.attrs
    if reference is not None:
        table.attrs["passport"] = base.attrs["passport"] | {"reference": held.attrs["weights"]}
    return table


def _forward_question(k: float):
    compressed: list[int] = []

    def cut(model, frame):
        tokens, kept = _tokens(model, frame)
        compressed.extend(zlib_bytes(text) for text in kept["text"])
        return tokens, kept

    def reduce(scores, tokens, index):
        mean = _mean(scores)
        z = standardised(scores.log_probability, scores.mu, scores.sigma)
        return {
            "member_loss": mean,
            "member_zlib": mean / np.array(compressed)[index],
            "member_mink": min_k(scores.log_probability, scores.length, k),
            "member_minkpp": min_k(z, scores.length, k),
        }

    keep = ("log_probability", "mu", "sigma")
    return cut, Question("probe_membership", start=1, keep=keep, settings={"k": k}, reduce=reduce)


def _tokens(model, frame):
    _, kept = cut_items(model, frame, 2, asker="probe_membership")
    return [each[: model.context] for each in model.encode(kept["text"].tolist())], kept


def _mean(scores) -> Float[np.ndarray, " item"]:
    return np.nansum(scores.log_probability, axis=1) / scores.length


def _derived(loss: pd.DataFrame, metric: str, value, reason) -> pd.DataFrame:
    """Rows of another score with the coordinates of the loss rows."""
    out = loss.assign(metric=metric, value=np.asarray(value, dtype=float))
    reason = np.asarray(reason, dtype=object)
    return out.assign(reason=reason) if (reason != "").any() else out


def _any_model(source: LanguageModel | Checkpoints) -> LanguageModel:
    return source.at(source.steps[0]) if isinstance(source, Checkpoints) else source


def _reference_scores(source, reference: LanguageModel, items: pd.DataFrame) -> pd.DataFrame:
    """What the reference gives each item, in nats per token of the model under test."""
    whole = reference.encode(items["text"].tolist())
    theirs = [each[: reference.context] for each in whole]
    long = [len(each) > reference.context for each in whole]
    enough = [i for i, each in enumerate(theirs) if len(each) > 1]
    found: dict[int, np.ndarray] = {}
    for index, scores in reference.score_batches(
        [theirs[i] for i in enough], keep=("log_probability",)
    ):
        for row, at in enumerate(index):
            found[enough[at]] = scores.log_probability[row, : scores.length[row]]
    bad = [i for i, each in found.items() if not np.isfinite(each).all()]
    if bad:
        raise InputError(
            f"probe_membership: the reference {reference.run} gives NaN or infinite "
            f"log-probabilities (first: item {items['item'].iloc[min(bad)]!r}); its weights or its "
            "dtype are damaged"
        )
    weights = reference.weights_hash()
    model = _any_model(source)  # only now: the reference may be one of its checkpoints
    mine = model.encode(items["text"].tolist())
    alike = all(np.array_equal(a[: len(b)], b) for a, b in zip(mine, theirs, strict=True))
    value, reason = np.full(len(items), np.nan), np.full(len(items), "", dtype=object)
    for i, tokens in enumerate(mine):
        count = min(len(tokens), model.context) - 1
        fits = count < len(theirs[i]) if alike else not long[i] and len(tokens) <= model.context
        if i not in found or count < 1:
            reason[i] = "too short for the reference"
        elif not fits:
            reason[i] = "longer than the reference's context"
        else:
            value[i] = (found[i][:count] if alike else found[i]).sum(dtype=np.float64) / count
    frame = pd.DataFrame({"item": items["item"].astype(str), "value": value, "reason": reason})
    frame.attrs = {"weights": weights}
    return frame.set_index("item")


def _reference_rows(loss: pd.DataFrame, held: pd.DataFrame) -> pd.DataFrame:
    of_item = held.reindex(loss["item"].astype(str))
    gap = loss["value"].to_numpy() - of_item["value"].to_numpy()
    reason = of_item["reason"].to_numpy(dtype=object).copy()
    apart = pd.Series(np.abs(gap)).groupby(loss["step"].to_numpy()).transform("max").to_numpy()
    gap[apart < SAME_MODEL] = np.nan
    reason[apart < SAME_MODEL] = "the reference scores every text as the model: it is the same one"
    return _derived(loss, "member_reference", gap, reason)


def _recall_rows(source, items, non_members: list[str], loss: pd.DataFrame) -> pd.DataFrame:
    both = items["text"].isin(set(non_members))
    if both.any():
        raise InputError(
            f"probe_membership: item {items['item'][both].iloc[0]!r} is also a text of the prefix "
            "(non_members); take it out of the items, for it makes itself likely"
        )
    model = _any_model(source)
    prefix = np.concatenate(model.encode(non_members))
    room = model.context - len(prefix)
    if room < 2:
        raise InputError(
            f"probe_membership: the prefix (non_members) has {len(prefix)} tokens, which leaves "
            f"room for {max(room, 0)} of the context's {model.context}; give fewer or shorter texts"
        )
    lengths = np.array([len(each) for each in model.encode(items["text"].tolist())])
    fits = items[(lengths >= 2) & (lengths <= room)]
    too_long = "text and prefix exceed the context"
    if fits.empty:
        return _derived(loss, "member_recall", np.full(len(loss), np.nan), [too_long] * len(loss))

    def cut(model, frame):
        tokens = model.encode(frame["text"].tolist())
        return [np.concatenate([prefix, each]) for each in tokens], frame

    key = int.from_bytes(hashlib.blake2b(prefix.tobytes(), digest_size=6).digest())
    given = sweep(
        source,
        fits,
        cut,
        Question(
            "probe_membership",
            start=len(prefix) + 1,  # the item's second token: its first is not scored alone either
            keep=("log_probability",),
            settings={"prefix": key},  # in the cache's key; the column goes no further
            reduce=lambda scores, tokens, index: {"member_loss": _mean(scores)},
        ),
    )
    with_prefix = _along(loss, given)
    alone = loss["value"].to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(alone < 0, with_prefix / alone, np.nan)
    reason = np.where(alone < 0, "", "log p without the prefix is 0, so there is no ratio")
    reason = np.where(np.isnan(with_prefix), too_long, reason)
    return _derived(loss, "member_recall", ratio, reason)


def _along(loss: pd.DataFrame, other: pd.DataFrame) -> Float[np.ndarray, " row"]:
    """Values of another table at the items and steps of the loss rows, NaN where it has none."""
    found = pd.Series(other["value"].to_numpy(), index=[other["step"], other["item"].astype(str)])
    return found.reindex([loss["step"], loss["item"].astype(str)]).to_numpy()


def _neighbourhood_rows(source, items, neighbours, loss: pd.DataFrame) -> pd.DataFrame:
    lacking = [name for name in ("item", "text") if name not in neighbours.columns]
    if lacking:
        raise InputError(
            f"probe_membership: neighbours have no column {lacking[0]!r}; make_neighbours gives "
            "item and text"
        )
    mine = neighbours[neighbours["item"].astype(str).isin(set(loss["item"].astype(str)))]
    if mine.empty:
        raise InputError(
            "probe_membership: no neighbour belongs to an item; their column item must hold the "
            "items' ids"
        )
    mine = mine.reset_index(drop=True)
    names = [f"neighbour-{i}" for i in range(len(mine))]
    frame = pd.DataFrame({"item": names, "text": mine["text"], "group": "neighbour"})
    near = sweep(
        source,
        frame,
        _tokens,
        Question(
            "probe_membership",
            start=1,
            keep=("log_probability",),
            settings={},
            reduce=lambda scores, tokens, index: {"member_loss": _mean(scores)},
        ),
    )
    of = dict(zip(names, mine["item"].astype(str), strict=True))
    near = near.assign(item=[of[name] for name in near["item"].astype(str)])
    mean = near.groupby(["step", "item"], as_index=False)["value"].mean()
    around = _along(loss, mean)
    reason = np.where(np.isnan(around), "no neighbours", "")
    return _derived(loss, "member_neighbourhood", loss["value"].to_numpy() - around, reason)


def _gradient_rows(source, items, loss: pd.DataFrame) -> pd.DataFrame:
    texts = items[items["item"].astype(str).isin(set(loss["item"].astype(str)))]
    made = []
    for model in source if isinstance(source, Checkpoints) else [source]:
        tokens = [each[: model.context] for each in model.encode(texts["text"].tolist())]
        norm = gradient_norms(model, tokens)
        made.append(pd.DataFrame({"step": model.step, "item": texts["item"], "value": -norm}))
    return _derived(loss, "member_gradient", _along(loss, pd.concat(made)), "")


def gradient_norms(
    model: LanguageModel, tokens: Sequence[Int[np.ndarray, " pos"]]
) -> Float[np.ndarray, " item"]:
    """Euclidean norm, over all parameters, of the gradient of each text's mean loss.

    The loss is the mean negative log-probability of the tokens after the first. 0 where nothing
    can be learned from the text. Texts are taken one at a time, since a batch's gradient is a sum.
    """
    parameters = list(model.module.parameters())
    flags = [each.requires_grad for each in parameters]
    skip = int(model.bos is not None)  # after a BOS the first row predicts the unscored first token
    norms = np.full(len(tokens), np.nan)
    model.module.requires_grad_(True)
    try:
        for at, text in enumerate(tokens):
            ids = torch.as_tensor(text, device=model.device)
            given = (
                ids[:-1]
                if model.bos is None
                else torch.cat([ids.new_tensor([model.bos]), ids[:-1]])
            )
            with torch.enable_grad():
                logits = model.module(input_ids=given[None], use_cache=False).logits[0, skip:]
                lost = torch.nn.functional.cross_entropy(logits.float(), ids[1:])
                found = torch.autograd.grad(lost, parameters, allow_unused=True)
            norms[at] = sum(float(g.double().square().sum()) for g in found if g is not None) ** 0.5
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
    return norms
