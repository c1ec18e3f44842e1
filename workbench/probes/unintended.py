"""How many bits of a text does a model save that another model does not?"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from workbench.items import check_items, items_hash
from workbench.models import LanguageModel
from workbench.sweep import Question, sweep
from workbench.table import InputError, validate

SIGNED = "unintended_bits_signed"


@dataclass(frozen=True)
class Span:
    """A text's tokens up to where its score ends, and how many of them are only context."""

    tokens: Int[np.ndarray, " pos"]
    start: int


def probe_unintended(
    source: LanguageModel, items: pd.DataFrame, *, reference: LanguageModel
) -> pd.DataFrame:
    """Unintended memorization of each text (Morris et al. 2025): bits saved against a reference.

    ``-log2 p_ref(x) + log2 p(x)``, in total over the text. What a reference without the text in its
    training saves as well, the language explains; the rest, this model keeps of this very text.
    With a crossover twin the difference is the counterfactual itself; with a larger model it is
    what that model's knowledge of the language does not explain.

    Models may cut texts into other tokens. Bits of a whole string compare all the same, if both
    models are given the same beginning: scored is the text from the first place to the last where
    a token ends in both (of one tokenizer: all but the first token, which has nothing before it).
    Of the ways to cut a string only the tokenizer's own counts, for both.

    Args:
        source: The model under study, one checkpoint of a run.
        items: Items frame; long texts are cut to both contexts, those of which nothing is left to
            score are dropped, counted and named.
        reference: A model that did not train on the texts, with any tokenizer.

    Returns:
        Two rows an item: ``unintended_bits``, at least 0 as defined, and ``unintended_bits_signed``
        before negative values are set to 0. A text that both models know alike has 0, noise apart;
        since the clipped values average that noise to above 0, means are to be compared by the
        signed ones, or with the same clipping of never-trained texts. NaN with a reason where the
        reference is the model itself.

    Raises:
        InputError: Checkpoints in place of a model, no text that can be scored, NaN scores, or
            two tokenizers one of which cannot say where its tokens end.
    """
    for name, model in (("source", source), ("reference", reference)):
        if hasattr(model, "steps"):
            raise InputError(
                f"probe_unintended: {name} is a series of checkpoints; give one, .at(step)"
            )
    kept, mine, other = _spans(source, reference, check_items(items))
    table = _log2_probability(source, kept, mine)
    value = table["value"] - _log2_probability(reference, kept, other)["value"]
    itself = source.weights_hash() == reference.weights_hash()
    signed = table.assign(
        value=np.nan if itself else value,
        reason="the reference is the model itself" if itself else "",
    )
    clipped = signed.assign(metric="unintended_bits", value=signed["value"].clip(lower=0.0))
    made = validate(pd.concat([clipped, signed.astype({"metric": str})], ignore_index=True))
    made.attrs = {
        "passport": {
            **source.passport(), "reference": reference.passport(), "items": items_hash(items),
        },
        "dropped": len(items) - len(kept),
    }  # fmt: skip
    return made


def _log2_probability(model: LanguageModel, items: pd.DataFrame, spans: Sequence[Span]):
    """Rows of each text's log2 probability, after its context."""
    start = np.array([span.start for span in spans])

    def reduce(scores, tokens, index) -> dict[str, Float[np.ndarray, " item"]]:
        # column next predicts token next + 1
        context = np.arange(scores.log_probability.shape[1])[None, :] < start[index][:, None] - 1
        nats = np.where(context, 0.0, scores.log_probability.astype(np.float64))
        return {SIGNED: np.nansum(nats, axis=1) / np.log(2)}

    return sweep(
        model,
        items,
        lambda model, frame: ([span.tokens for span in spans], frame),
        Question(
            asker="probe_unintended",
            start=1,
            keep=("log_probability",),
            settings={},
            reduce=reduce,
            also=hashlib.blake2b(start.astype(np.int64).tobytes(), digest_size=8).hexdigest(),
        ),
    )


def _spans(source: LanguageModel, reference: LanguageModel, items: pd.DataFrame):
    """The items that can be scored, and what of each is, in the tokens of both models."""
    texts = items["text"].tolist()
    tokens = [model.encode(texts) for model in (source, reference)]
    alike = all(np.array_equal(a, b) for a, b in zip(*tokens, strict=True))
    ends = [
        [{k: k for k in range(1, len(each) + 1)} for each in tokens[0]]
        if alike
        else _token_ends(model, texts)
        for model in (source, reference)
    ]
    spans: list[tuple[Span, Span] | None] = []
    for row in range(len(texts)):
        mine, other = (
            {place: k for place, k in ends[side][row].items() if k <= model.context}
            for side, model in enumerate((source, reference))
        )
        both = sorted(set(mine) & set(other))
        cut = [
            Span(tokens[side][row][: side_ends[both[-1]]], side_ends[both[0]]) if both else None
            for side, side_ends in enumerate((mine, other))
        ]
        spans.append(tuple(cut) if len(both) > 1 else None)
    usable = np.array([span is not None for span in spans])
    _say_dropped(items, usable)
    kept = items[usable].reset_index(drop=True)
    found = [span for span in spans if span is not None]
    return kept, [span[0] for span in found], [span[1] for span in found]


def _say_dropped(items: pd.DataFrame, usable: np.ndarray) -> None:
    if not usable.any():
        raise InputError(
            f"probe_unintended: none of {len(items)} texts has two places where a token ends in "
            "both models; give longer texts"
        )
    if not usable.all():
        names = ", ".join(items["item"][~usable].head(3).astype(str))
        warnings.warn(
            f"probe_unintended: dropped {(~usable).sum()} of {len(items)} texts without two places "
            f"where a token ends in both models (first: {names})",
            stacklevel=4,
        )


def _token_ends(model: LanguageModel, texts: list[str]) -> list[dict[int, int]]:
    """For each text: how many tokens there are up to each character at which a token ends."""
    try:
        told = model.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    except (NotImplementedError, TypeError):
        raise InputError(
            f"probe_unintended: the models have different tokenizers, and that of {model.run} does "
            "not say where its tokens end; give a reference with the same tokenizer"
        ) from None
    # of a character that takes several tokens the last one counts: a later k replaces an earlier
    return [
        {int(end): k for k, (_, end) in enumerate(offsets, 1)} for offsets in told["offset_mapping"]
    ]
