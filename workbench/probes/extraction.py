"""Does a model give back the rest of a text: by greedy decoding, nearly, or in how many samples?

What one forward pass over the true text decides is decided by it, without decoding: the exact
greedy match, extraction strength, and the probability of the text under any sampling scheme. Only
what follows a first mistake, and the spread of samples, need real generation.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from workbench.decoding import Decoding, check_schemes
from workbench.items import check_items, cut_items, items_hash
from workbench.models import Checkpoints, LanguageModel
from workbench.sweep import COORDINATES, Question, panel, sweep
from workbench.table import InputError, rows, validate

SCHEMES = (Decoding.greedy(), Decoding(temperature=0.7), Decoding(), Decoding(top_k=40))
BLEU_ORDER = 4  # longest run of tokens that BLEU looks for
ROUNDING = 1e-9  # alpha * length is a whole number up to this


def verbatim_length(
    guess: Int[np.ndarray, "item suffix"], truth: Int[np.ndarray, "item suffix"]
) -> Int[np.ndarray, " item"]:
    """How many tokens from the first on are guessed right; 0 at worst, the suffix's length at best."""
    wrong = guess != truth
    return np.where(wrong.any(axis=1), wrong.argmax(axis=1), truth.shape[1])


def extraction_strength(hit: Bool[np.ndarray, " token"]) -> float:
    """``1 - k / L`` for the smallest k of L tokens after which every guess is right.

    Greedy decoding from the first k tokens gives the rest if and only if each of the rest is the
    argmax under teacher forcing, so it is the share of tokens in the unbroken run of hits at the
    end: 1 if all are right, 0 if the last is wrong (then k = L).
    """
    wrong = np.flatnonzero(~hit)
    return 1.0 - (wrong[-1] + 1 if len(wrong) else 0) / len(hit)


def edit_similarity(said: Int[np.ndarray, " said"], truth: Int[np.ndarray, " truth"]) -> float:
    """1 - Levenshtein distance / the longer length; 1 for equals, 0 for no token in place."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(said.tolist(), truth.tolist())


def bleu(said: Int[np.ndarray, " suffix"], truth: Int[np.ndarray, " suffix"]) -> float:
    """BLEU-4 of token ids (Papineni et al. 2002); a run of n that never matches counts as 0.1.

    That is smoothing method 1 of Chen & Cherry (2014), without which one mistake in the middle of
    a short suffix gives 0. 1 for equals, 0 where no token is shared, NaN under four tokens.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    if min(len(said), len(truth)) < BLEU_ORDER:
        return np.nan
    smooth = SmoothingFunction().method1
    return float(sentence_bleu([truth.tolist()], said.tolist(), smoothing_function=smooth))


def peakedness(
    samples: Int[np.ndarray, "sample suffix"], greedy: Int[np.ndarray, " suffix"], alpha: float
) -> float:
    """Share of samples whose token edit distance to the greedy one is at most ``alpha * length``."""
    from rapidfuzz.distance import Levenshtein

    near = math.floor(alpha * len(greedy) + ROUNDING)
    centre = greedy.tolist()
    return float(np.mean([Levenshtein.distance(each, centre) <= near for each in samples.tolist()]))


def probe_extraction(
    source: LanguageModel | Checkpoints,
    items: pd.DataFrame,
    *,
    prefix: int | Sequence[int] = 50,
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
        prefix: Prompt length k in tokens, at least 1. Several ask for one and the same suffix,
            with one pass and one set of rows for each length.
        suffix: Tokens to be reproduced, at least 1.
        suffix_at: Where in the text the suffix begins; None: right after the (longest) prompt,
            which then begins the text. Fix it to compare calls on one and the same suffix.

    Returns:
        Table with, for each item, step and prompt length: ``extractable`` (1 if the whole suffix
        is greedy; 0 by chance), ``verbatim_length`` (tokens right before the first miss),
        ``log_p_z`` (log-probability of the whole suffix, nats), ``log_probability`` (the same per
        token) and ``top1`` (share of suffix tokens that are the argmax under teacher forcing, also
        known as exact memorization). Coordinates ``prefix``, ``suffix`` and, where it was fixed or
        there are several prompts, ``suffix_at``.

    Raises:
        InputError: Lengths below 1 or beyond the context, a length twice, no text long enough,
            NaN scores.
    """
    lengths = [prefix] if np.isscalar(prefix) else list(prefix)
    if len(set(lengths)) < max(1, len(lengths)):
        raise InputError(
            f"probe_extraction: prefix is {lengths}; give one or more lengths, each once"
        )
    _at_least_one("probe_extraction", prefix=min(lengths), suffix=suffix)
    if suffix_at is None and len(lengths) > 1:
        suffix_at = max(lengths)
    parts = []
    for length in lengths:
        with warnings.catch_warnings():
            if parts:  # the same texts are dropped for each length, and said once
                warnings.filterwarnings("ignore", message="probe_extraction: dropped")
            cut, settings = _suffix_of(length, suffix, suffix_at, "probe_extraction")
            question = Question(
                asker="probe_extraction",
                start=length,
                keep=("log_probability", "guess"),
                settings=settings,
                reduce=_verdicts(length),
            )
            parts.append(sweep(source, items, cut, question))
    if len(parts) == 1:
        return parts[0]
    table = validate(pd.concat(parts, ignore_index=True))
    table.attrs = parts[0].attrs
    return table


def probe_strength(
    source: LanguageModel | Checkpoints, items: pd.DataFrame, *, prefix: int = 1
) -> pd.DataFrame:
    """Extraction strength and exact memorization of whole texts, from one pass over each.

    Carlini et al. (2021) asked how short a prompt still gives the rest; one pass answers for all
    prompts at once (:func:`extraction_strength`).

    Args:
        source: A model, or the checkpoints of a run.
        items: Items frame; texts longer than the context are cut to it.
        prefix: Tokens that are given and not counted among the L, at least 1: nothing comes
            before a text's first token.

    Returns:
        Table with, for each item and step, ``extraction_strength`` and ``top1`` (share of tokens
        that are the argmax under teacher forcing: exact memorization), both 0 at worst and 1 at
        best; without memory strength is near 0 and ``top1`` what the language gives. Coordinate
        ``prefix``.

    Raises:
        InputError: ``prefix`` below 1, no text long enough, NaN scores.
    """
    _at_least_one("probe_strength", prefix=prefix)

    def cut(model, frame):
        # one token beyond the prefix is the least there is to guess
        _, kept = cut_items(model, frame, prefix + 1, asker="probe_strength")
        tokens = model.encode(check_items(kept)["text"].tolist())
        return [each[: model.context] for each in tokens], kept

    def reduce(scores, tokens, index):
        pairs = zip(scores.guess, tokens, strict=True)
        hits = [guess[: len(text) - prefix] == text[prefix:] for guess, text in pairs]
        return {
            "extraction_strength": np.array([extraction_strength(hit) for hit in hits]),
            "top1": np.array([hit.mean() for hit in hits]),
        }

    return sweep(
        source,
        items,
        cut,
        Question(
            asker="probe_strength",
            start=prefix,
            # the log-probability is there to refuse a model that gives NaN
            keep=("log_probability", "guess"),
            settings={"prefix": prefix},
            reduce=reduce,
        ),
    )


def probe_discoverable(
    source: LanguageModel | Checkpoints,
    items: pd.DataFrame,
    *,
    schemes: Sequence[Decoding] = SCHEMES,
    prefix: int = 50,
    suffix: int = 50,
    suffix_at: int | None = None,
) -> pd.DataFrame:
    """How likely sampling gives each item's suffix, under several schemes from one pass.

    Hayes et al. (2024): the probability ``p_z`` that one sample is the suffix word for word is the
    product of its tokens' probabilities under the scheme. ``discoverable`` turns it into shares of
    items that n samples give.

    Args:
        source: A model, or the checkpoints of a run.
        items: Items frame; texts shorter than needed are dropped, counted and named.
        schemes: Ways to sample, told apart by their names.
        prefix: Prompt length in tokens, at least 1.
        suffix: Tokens to be reproduced, at least 1.
        suffix_at: Where in the text the suffix begins; None: right after a prompt that begins the
            text.

    Returns:
        Table with ``log_p_z`` in nats for each item, step and scheme (the coordinate ``scheme``
        is its name): 0 at best; -inf where top-k, top-p or greedy leave a token out, so that no
        number of samples gives the suffix. Coordinates ``prefix`` and ``suffix``.

    Raises:
        InputError: No schemes or two of one name, else as :func:`probe_extraction`.
    """
    schemes = check_schemes(schemes, "probe_discoverable")
    _at_least_one("probe_discoverable", prefix=prefix, suffix=suffix)
    cut, settings = _suffix_of(prefix, suffix, suffix_at, "probe_discoverable")
    question = Question(
        asker="probe_discoverable",
        start=prefix,
        # the plain log-probability is there to refuse a model that gives NaN
        keep=("log_probability",),
        settings=settings,
        reduce=lambda scores, tokens, index: suffix_log_p(scores.under_scheme, schemes),
        schemes=schemes,
    )
    return sweep(source, items, cut, question)


def suffix_log_p(
    under_scheme: Float[np.ndarray, "item suffix scheme"], schemes: Sequence[Decoding]
) -> dict[tuple[str, str], Float[np.ndarray, " item"]]:
    """The log of each suffix's probability, by metric and scheme, as a sweep wants it."""
    total = under_scheme.sum(axis=1, dtype=np.float64)
    return {("log_p_z", scheme.name): total[:, i] for i, scheme in enumerate(schemes)}


def probe_continuation(
    model: LanguageModel,
    items: pd.DataFrame,
    *,
    prefix: int = 32,
    suffix: int = 32,
    suffix_at: int | None = None,
) -> pd.DataFrame:
    """Greedy continuations, generated, against the true ones: exactly, by position and nearly.

    A model that misses one word goes on from its own; what it says then only generation shows. A
    filter that stops word-for-word copies leaves the near ones (Ippolito et al. 2023), so each
    exact verdict stands beside two similarities.

    Args:
        model: Any causal model.
        items: Items frame; texts shorter than needed are dropped, counted and named.
        prefix: Prompt length in tokens, at least 1; 32 in Biderman et al. (2023).
        suffix: Tokens to be said, at least 1; 32 there.
        suffix_at: Where in the text the suffix begins; None: right after a prompt that begins the
            text.

    Returns:
        Table with, for each item, ``extractable`` (1 if all is right, else 0),
        ``memorization_score`` (share of positions that are right; a word left out makes all after
        it wrong), ``edit_similarity`` (:func:`edit_similarity`, which forgives that) and ``bleu``
        (:func:`bleu`; NaN with a ``reason`` for suffixes under four tokens). All are 0 at worst
        and 1 at best, and but for ``extractable`` above 0 without any memory: set controls beside
        them. Coordinates ``prefix`` and ``suffix``.

    Raises:
        InputError: Lengths below 1 or beyond the context, no text long enough.
    """
    _at_least_one("probe_continuation", prefix=prefix, suffix=suffix)
    cut, settings = _suffix_of(prefix, suffix, suffix_at, "probe_continuation")
    tokens, kept = cut(model, items)

    def make() -> pd.DataFrame:
        truth, said = tokens[:, prefix:], model.generate(tokens[:, :prefix], suffix)
        values = {
            "extractable": (said == truth).all(axis=1),
            "memorization_score": (said == truth).mean(axis=1),
            "edit_similarity": [edit_similarity(*pair) for pair in zip(said, truth, strict=True)],
            "bleu": [bleu(*pair) for pair in zip(said, truth, strict=True)],
        }
        short = f"a suffix of {suffix} tokens has no 4-grams"
        return _item_rows(model, kept, values, settings, short)

    return panel("probe_continuation", model, tokens, items, settings, make)


def probe_cdd(
    model: LanguageModel,
    items: pd.DataFrame,
    *,
    prefix: int = 50,
    suffix: int = 50,
    samples: int = 50,
    alpha: float = 0.05,
    decoding: Decoding | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How much a model's samples crowd around its greedy continuation (CDD).

    Dong et al. (2024): a text learned by heart comes out nearly the same however it is sampled.
    The true continuation is not looked at, only the prompt.

    Args:
        model: Any causal model.
        items: Items frame; texts shorter than the prompt are dropped, counted and named.
        prefix: Prompt length in tokens, at least 1.
        suffix: Tokens said, at least 1.
        samples: Drawn for each item.
        alpha: Edit distance that counts as close, as a share of the length, 0 to 1. Under
            ``1 / suffix`` only equals are close.
        decoding: How samples are drawn; None is temperature 0.8, as in the paper.
        seed: Of the draws.

    Returns:
        Table with ``cdd`` for each item: 0 for no sample near the greedy one, 1 for all. High
        without memory where a prompt allows one answer only, so controls are needed. Coordinates
        ``prefix``, ``suffix``, ``samples``, ``alpha`` and ``scheme``.

    Raises:
        InputError: Lengths or samples below 1, ``alpha`` outside 0 to 1, greedy "samples", more
            tokens than the context, no text long enough.
    """
    decoding = decoding or Decoding(temperature=0.8)
    _at_least_one("probe_cdd", prefix=prefix, suffix=suffix, samples=samples)
    if not 0 <= alpha <= 1:
        raise InputError(f"probe_cdd: alpha is {alpha}, it must lie between 0 and 1")
    if decoding.temperature == 0:
        raise InputError(
            "probe_cdd: greedy samples are all alike; give a temperature above 0, such as 0.8"
        )
    tokens, kept = cut_items(model, items, prefix, asker="probe_cdd")
    settings = {"prefix": prefix, "suffix": suffix, "samples": samples, "alpha": alpha}

    def make() -> pd.DataFrame:
        greedy = model.generate(tokens, suffix)
        drawn = model.generate(tokens, suffix, decoding=decoding, samples=samples, seed=seed)
        value = [peakedness(*pair, alpha) for pair in zip(drawn, greedy, strict=True)]
        return _item_rows(model, kept, {"cdd": value}, settings | {"scheme": decoding.name})

    drawn_by = {"decoding": repr(decoding), "seed": seed}
    return panel("probe_cdd", model, tokens, items, settings | drawn_by, make)


def _item_rows(model, kept, values: dict, settings: dict, undefined: str = "") -> pd.DataFrame:
    where = {"run": model.run, "step": model.step, "group": kept["group"], "item": kept["item"]}
    beside = settings | {name: kept[name] for name in COORDINATES if name in kept.columns}
    parts = [rows(key, value, beside=beside, **where) for key, value in values.items()]
    table = pd.concat(parts, ignore_index=True)
    if table["value"].isna().any():
        table["reason"] = np.where(table["value"].isna(), undefined, "")
    table = validate(table)
    table.attrs = {
        "passport": {**model.passport(), "items": items_hash(kept)},
        "dropped": kept.attrs["dropped"],
    }
    return table


def _at_least_one(asker: str, **lengths: int) -> None:
    for name, value in lengths.items():
        if value < 1:
            raise InputError(f"{asker}: {name} is {value}, but must be at least 1")


def _suffix_of(prefix: int, suffix: int, suffix_at: int | None, asker: str):
    """How to cut prompt and suffix from a text, and the coordinates that say so."""
    begin = prefix if suffix_at is None else suffix_at
    if begin < prefix:
        raise InputError(
            f"{asker}: a suffix at token {begin} leaves no room for a prompt of {prefix}; "
            "shorten the prompt or move the suffix"
        )

    def cut(model, frame):
        tokens, kept = cut_items(model, frame, begin + suffix, asker=asker)
        return tokens[:, begin - prefix :], kept

    settings = {"prefix": prefix, "suffix": suffix}
    return cut, settings | ({} if suffix_at is None else {"suffix_at": suffix_at})


def _verdicts(prefix: int):
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
