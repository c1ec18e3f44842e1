"""What an edit along the loss curvature does to recitation and to everything else.

Merullo et al. (2025), "From memorization to reasoning in the spectrum of loss curvature". The
mathematics stands in ``workbench.curvature``; here a model is edited, asked, and put back.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from rapidfuzz.distance import Levenshtein
from tqdm.auto import tqdm

from workbench.curvature import (
    METHODS,
    Basis,
    Edit,
    correct_masses,
    decompose,
    edited,
    refuse_share,
    spectrum,
    staircase,
)
from workbench.factors import (
    CHECK_TEXTS,
    Layer,
    collect_factors,
    forward_seen,
    linear_layers,
    padded,
)
from workbench.items import check_items, cut_items, items_hash, load_items
from workbench.models import TOKENS_PER_BATCH, LanguageModel, buckets
from workbench.suite import Suite, passages
from workbench.table import InputError, rows, validate

ASKER = "probe_curvature"
LOOSE = 0.75  # similarity from which a continuation is recited, loosely; Merullo et al. (2025)
LEVEL = 0.95  # of all intervals
DRAWS = 2000  # of the bootstraps
NONE = "none"  # the method of the unedited model
# shares kept: on the embedded suite these raise perplexity by 1 % to some 50 %; the last kfac value
# is the published one (OLMo-2 7B, MLP of three blocks)
RHO: Mapping[str, tuple[float, ...]] = {
    "kfac": (0.99, 0.98, 0.965, 0.95, 0.93, 0.9, 0.8, 0.6),
    "saliency": (0.999, 0.998, 0.995, 0.99, 0.98, 0.95),
    "svd": (0.4, 0.3, 0.25, 0.2, 0.15, 0.1),
    "magnitude": (0.5, 0.4, 0.3, 0.25, 0.2, 0.15),
    "random": (0.99, 0.98, 0.95, 0.9, 0.8),
    "ekfac": (0.99, 0.98, 0.965, 0.95, 0.93, 0.9, 0.8, 0.6),
}
SWEEP = (0.98, 0.95, 0.9, 0.8, 0.6, 0.3, 0.1)  # few layers bear more than all
STAIRS = (0.6, 0.8, 0.9, 0.95, 0.98, 1.0)  # shares of mass whose masks are shown
STEPS = 40  # points of a staircase, evenly spread over the logarithm of the output's rank
CARRIED = ("kind", "dose", "copies")  # columns of the items that their rows keep
ASKED = ("kfac", "saliency", "svd", "magnitude", "random")
SPECTRUM = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999)
BANDS = {  # of the input directions, by descending eigenvalue of A; Merullo et al. (2025)
    "top 10 %": (0.0, 0.10),
    "10-25 %": (0.10, 0.25),
    "25-50 %": (0.25, 0.50),
    "bottom 50 %": (0.50, 1.0),
}


def probe_curvature(
    model: LanguageModel,
    items: pd.DataFrame,
    *,
    texts: Sequence[str],
    held_out: Sequence[str],
    memorized: str | Sequence[str] = "seen",
    clean: str | None = "unseen",
    roles: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    labels: str = "sampled",
    methods: Sequence[str] = ASKED,
    rho: Mapping[str, Sequence[float]] = RHO,
    stairs: Sequence[float] = STAIRS,
    prefix: int = 16,
    suffix: int = 16,
    seed: int = 0,
    also: Callable[[LanguageModel], pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """Factors of the curvature, the edits along them, and what the edits cost.

    One decomposition serves the whole sweep; the model has its own weights again at the end, also
    after an error. What each part holds: :func:`spectrum_rows`, :func:`band_rows`,
    :func:`edit_rows`.

    Args:
        items: Items frame; those of ``memorized``, one group or several, are recited, those of
            ``clean`` are compared with them band by band (left out, and said, where there are
            none; None asks for no comparison). Its columns ``kind``, ``dose`` and ``copies`` stay on the items' rows.
        texts: For the factors: ordinary text of the kind the model was trained on.
        held_out: For the perplexity: text it was not trained on. Both are cut to the context.
        roles, blocks: Linear layers to edit, as ``linear_layers``; None: all of the blocks.
        labels: ``sampled`` (true Fisher) or ``gold``, as ``collect_factors``.
        methods: Of ``kfac``, ``saliency``, ``svd``, ``magnitude``, ``random``; and ``ekfac``, which
            takes one more pass over the texts, and corrects the predicted damage of them all.
        rho: For each method the shares kept: of curvature mass, of saliency, of ranks, of
            weights, of components.
        stairs: Shares of mass whose masks are told.
        prefix, suffix: Tokens of the prompt and of the continuation that is to be recited.
        also: Another probe, asked once of the unedited model and once under each edit.

    Returns:
        The table, with the coordinates ``method``, ``rho``, ``block``, ``role``, ``components``
        and ``band``, missing where they do not apply. ``.attrs["passport"]`` says from what.

    Raises:
        InputError: No memorized items or none long enough, no usable text, an unknown method,
            ``rho`` outside (0, 1], a role the model lacks, values that are not finite.
    """
    items = check_items(items)
    memorized = (memorized,) if isinstance(memorized, str) else tuple(memorized)
    grid, recited = _grid(methods, rho), _of_groups(items, memorized)
    tokens, held = text_tokens(model, texts, "texts"), text_tokens(model, held_out, "held_out")
    factors = collect_factors(model, tokens, roles=roles, blocks=blocks, labels=labels, seed=seed)
    bases = decompose(factors)
    if "ekfac" in methods:
        bases = correct_masses(model, bases, tokens, labels=labels, seed=seed)
    asked = {"prefix": prefix, "suffix": suffix, "seed": seed}
    parts = [
        spectrum_rows(model, bases),
        staircase_rows(model, bases, stairs),
        edit_rows(model, bases, recited, held_out=held, grid=grid, also=also, **asked),
    ]
    if clean is not None and (items["group"] == clean).any():
        compared = items[items["group"].isin([*memorized, clean])]
        parts.append(band_rows(model, bases, compared, memorized=memorized, clean=clean, **asked))
    elif clean is not None:
        warnings.warn(
            f"{ASKER}: no items of group {clean!r} to compare with, so there are no band ratios",
            stacklevel=2,
        )
    table = validate(pd.concat(parts, ignore_index=True))
    table.attrs["passport"] = {
        **model.passport(),
        "items": items_hash(items),
        "factor_tokens": factors.tokens,
        "held_out_tokens": sum(len(each) - 1 for each in held),
        "layers": [basis.layer.name for basis in bases],
        "labels": labels,
        "seed": seed,
    }
    return table


def curvature_texts(
    suite: Suite | None, corpus: str, *, texts: int, held_out: int, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Text for the factors, and other text for the perplexity.

    Args:
        suite: A suite gives its training text and its held-out passages; None for other models.
        corpus: For other models a file of text like that they were trained on, one text a line or
            a CSV, JSONL or Parquet file with a column ``text``; empty takes verses of the World
            English Bible, and says so.
        texts, held_out: How many of each; fewer where a file has fewer, in that proportion.

    Raises:
        InputError: A corpus that cannot be read, or has fewer than two texts.
    """
    if suite is not None:
        return suite.corpus_texts(texts, seed=seed), suite.held_out(held_out)["text"].tolist()
    if not corpus:
        warnings.warn(
            f"{ASKER}: no corpus given, so factors and perplexity come from verses of the World "
            "English Bible; better is text like that the model was trained on",
            stacklevel=2,
        )
    tabular = Path(corpus).suffix.lower() in (".csv", ".jsonl", ".json", ".parquet", ".pq")
    found = load_items(corpus)["text"].tolist() if tabular else passages(corpus or None)
    if len(found) < 2:
        raise InputError(f"{ASKER}: {corpus} holds {len(found)} texts, needs at least two")
    order = np.random.default_rng([seed, len(found)]).permutation(len(found))
    share = min(1.0, len(found) / (texts + held_out))
    first = max(1, min(int(texts * share), len(found) - 1))
    second = max(1, int(held_out * share))
    return [found[i] for i in order[:first]], [found[i] for i in order[first : first + second]]


def _grid(methods: Sequence[str], rho: Mapping[str, Sequence[float]]) -> list[tuple[str, float]]:
    for method in methods:
        if method not in METHODS:
            raise InputError(f"{ASKER}: method {method!r}; choose from {', '.join(METHODS)}")
        if not len(rho.get(method, ())):
            raise InputError(f"{ASKER}: rho has no shares for {method}, needs at least one")
        for share in rho[method]:
            refuse_share(share, ASKER)
    return [(method, float(share)) for method in methods for share in rho[method]]


def _of_groups(items: pd.DataFrame, groups: Sequence[str]) -> pd.DataFrame:
    there = sorted(map(str, items["group"].unique()))
    lacking = [name for name in groups if name not in there]
    if lacking or not groups:
        raise InputError(
            f"{ASKER}: no items of group {lacking[0]!r}; there are groups {', '.join(there)}"
            if groups
            else f"{ASKER}: memorized names no group; there are {', '.join(there)}"
        )
    return items[items["group"].isin(groups)]


def text_tokens(model: LanguageModel, texts: Sequence[str], name: str) -> list[np.ndarray]:
    """Token ids cut to the context; texts under two tokens predict nothing and are dropped.

    Args:
        name: What the texts are called where something is said of them.

    Returns:
        One array a text that is left; how many are not is warned of.

    Raises:
        InputError: One text in place of a list, or none of two tokens.
    """
    if isinstance(texts, str):
        raise InputError(f"{ASKER}: {name} is one text, needs a list of texts")
    encoded = [each[: model.context] for each in model.encode(list(texts))]
    usable = [each for each in encoded if len(each) >= 2]
    if not usable:
        raise InputError(
            f"{ASKER}: {name} has {len(encoded)} texts, none of two tokens or more; give text"
        )
    if len(usable) < len(encoded):
        warnings.warn(
            f"{ASKER}: dropped {len(encoded) - len(usable)} of {len(encoded)} {name} that are "
            "shorter than two tokens",
            stacklevel=3,
        )
    return usable


# The spectrum


def spectrum_rows(model: LanguageModel, bases: Sequence[Basis]) -> pd.DataFrame:
    """How few components hold how much of the curvature mass.

    Returns:
        ``mass``: the share held by the share ``components`` of each layer's components, the
        largest first (equal to it where the curvature is flat), at cuts asked to hold ``rho``; and
        ``clamped``, the negative eigenvalue mass set to 0 (rounding, so about 1e-7).
    """
    parts = []
    for basis in bases:
        where = {"block": basis.layer.block, "role": basis.layer.role}
        sums = np.concatenate([[0.0], np.cumsum(basis.input_values)])
        steps = [staircase(basis.input_values, basis.output_values, s) for s in SPECTRUM]
        total = sums[-1] * basis.output_values.sum()
        held = np.array([basis.output_values @ sums[each] for each in steps]) / total
        share = [each.mean() / len(basis.input_values) for each in steps]
        beside = where | {"rho": np.array(SPECTRUM), "components": share}
        named = {"run": model.run, "step": model.step, "beside": beside}
        parts.append(rows("mass", np.minimum(held, 1.0), **named))
        parts.append(rows("clamped", basis.clamped, **(named | {"beside": where})))
    return pd.concat(parts, ignore_index=True)


def staircase_rows(
    model: LanguageModel, bases: Sequence[Basis], stairs: Sequence[float] = STAIRS
) -> pd.DataFrame:
    """Which components the K-FAC edit keeps: a staircase in the ranks of the two spectra.

    Returns:
        ``kept_inputs`` for each share ``rho`` of ``stairs`` and some ranks ``output`` of the
        output directions, 1 the sharpest: the first so many input directions are kept with it. At
        ``rho = 1`` all are. The last output direction that keeps any, and the next, are among them.
    """
    parts = []
    for basis in bases:
        size = len(basis.output_values)
        spread = np.unique(np.geomspace(1, size, STEPS).round().astype(int))
        for share in stairs:
            steps = staircase(basis.input_values, basis.output_values, share)
            last = int((steps > 0).sum())
            at = np.unique([*spread, last, min(last + 1, size)])
            where = {"block": basis.layer.block, "role": basis.layer.role, "rho": share}
            named = {"run": model.run, "step": model.step, "beside": where | {"output": at}}
            parts.append(rows("kept_inputs", steps[at - 1], **named))
    return pd.concat(parts, ignore_index=True)


# The edits


def edit_distance(
    said: Int[np.ndarray, "item suffix"], truth: Int[np.ndarray, "item suffix"]
) -> Float[np.ndarray, " item"]:
    """Token Levenshtein distance over the length; 0 for the same, 1 where nothing fits."""
    pairs = zip(said.tolist(), truth.tolist(), strict=True)
    return np.array([Levenshtein.distance(a, b) for a, b in pairs]) / truth.shape[1]


def edit_rows(
    model: LanguageModel,
    bases: Sequence[Basis],
    items: pd.DataFrame,
    *,
    held_out: Sequence[Int[np.ndarray, " pos"]],
    grid: Sequence[tuple[str, float]],
    prefix: int,
    suffix: int,
    seed: int = 0,
    also: Callable[[LanguageModel], pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """Recitation and perplexity of the model as it is (method ``none``) and under each edit.

    Args:
        grid: Methods and shares kept, one edit each.
        also: Another probe, such as of tasks, asked of the model under each edit and unedited; its
            rows come with the coordinates ``method`` and ``rho``. What it raises passes through,
            with the weights put back.

    Returns:
        For each item and, by group, pooled (``item="all"``): ``recitation_strict`` (the whole
        continuation is right; one teacher-forced pass decides it), ``recitation_loose`` (similarity
        of the greedy continuation at least .75; both 0 by chance), ``edit_distance`` (0 at best, 1
        at worst), ``recitation_margin`` (log-odds of the least likely token of the continuation:
        above 0 it is recited for sure). Pooled: ``perplexity`` on held-out text (token-weighted),
        ``perplexity_ratio`` to the unedited model (1 for no cost), ``kept`` (share of components,
        ranks or weights) and ``predicted_damage``. Intervals at 95 %: Wilson for shares, else
        bootstrap over items or texts, for the ratio over the same texts on both sides.

    Raises:
        InputError: No item of ``prefix + suffix`` tokens, or perplexity that is not finite.
    """
    steps, asked = _shown([(NONE, 1.0), *grid], "edits"), {"prefix": prefix, "suffix": suffix}
    parts = each_edit(
        model, bases, items, held_out=held_out, grid=steps, also=also, **asked, seed=seed
    )
    return pd.concat(parts, ignore_index=True)


def each_edit(
    model: LanguageModel,
    bases: Sequence[Basis],
    items: pd.DataFrame,
    *,
    held_out: Sequence[Int[np.ndarray, " pos"]],
    grid: Iterable[tuple[str, float]],
    prefix: int,
    suffix: int,
    seed: int = 0,
    also: Callable[[LanguageModel], pd.DataFrame] | None = None,
) -> Iterator[pd.DataFrame]:
    """The rows of :func:`edit_rows`, edit by edit; between two of them the model is as it was.

    Args:
        grid: Methods and shares kept; the unedited model, ``("none", 1.0)``, must be the first.

    Yields:
        The rows of one edit, once its weights are given back.

    Raises:
        InputError: As :func:`edit_rows`, or a grid that begins with an edit. At the first row asked
            for, not before.
    """
    tokens, kept = _cut(model, items, prefix, suffix)
    own = None
    for method, share in grid:
        if own is None and method != NONE:
            raise InputError(
                f"{ASKER}: the grid begins with {method}; prices are told against the unedited "
                f"model, so ({NONE!r}, 1.0) must be the first"
            )
        with _editing(bases, method, share, seed) as edit:
            loss = _held_out_loss(model, held_out, edit)
            verdicts = recitation(model, tokens, prefix)
            more = [] if also is None else [_with_edit(also(model), edit)]
        own = loss if own is None else own
        told = _verdict_rows(model, kept, verdicts, edit, seed)
        cost = _cost_rows(model, loss, own, edit, seed)
        yield pd.concat([told, cost, *more], ignore_index=True)


def _shown(steps: list, what: str) -> tqdm:
    """A bar over the steps, for runs of more than seconds."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    rare = 0.1 if watched else 30.0  # seconds; a log file wants few lines
    return tqdm(steps, desc=what, unit="", delay=10, leave=False, mininterval=rare)


def _cut(model: LanguageModel, items: pd.DataFrame, prefix: int, suffix: int):
    for name, value in (("prefix", prefix), ("suffix", suffix)):
        if value < 1:
            raise InputError(f"{ASKER}: {name} is {value}, but must be at least 1")
    return cut_items(model, items, prefix + suffix, asker=ASKER)


def _editing(bases: Sequence[Basis], method: str, share: float, seed: int):
    if method == NONE:
        return contextlib.nullcontext(Edit(NONE, 1.0, 1.0, 0.0))
    return edited(bases, method=method, rho=share, seed=seed)


def recited_items(
    model: LanguageModel,
    items: pd.DataFrame,
    *,
    groups: Sequence[str],
    prefix: int = 16,
    suffix: int = 16,
) -> pd.DataFrame:
    """Leave out those items of some groups that the model, unedited, does not recite.

    What is not recited cannot fall under an edit. Where few of many texts are memorized, this
    saves asking for the others under every edit; what is pooled over a group then speaks of its
    recited items alone.

    Args:
        items: Items frame; other groups stay as they are.
        prefix, suffix: Tokens of the prompt and of the continuation, which is recited if each of
            its tokens is the likeliest.

    Returns:
        The items frame, ``.attrs["not_recited"]`` counting what was left out for that reason and
        ``.attrs["dropped"]`` what is too short.

    Raises:
        InputError: A group that is not there, or no item of these groups that is long enough.
    """
    items = check_items(items)
    tokens, kept = _cut(model, _of_groups(items, groups), prefix, suffix)
    recited = _strict(model.score(tokens, start=prefix, keep=("guess",)), tokens, prefix)
    stay = ~items["group"].isin(groups) | items["item"].isin(kept["item"][recited])
    found = items[stay].reset_index(drop=True)
    found.attrs = {"not_recited": int((~recited).sum()), "dropped": kept.attrs["dropped"]}
    return found


def _with_edit(table: pd.DataFrame, edit: Edit) -> pd.DataFrame:
    taken = [name for name in ("method", "rho") if name in table.columns]
    if taken:
        raise InputError(
            f"{ASKER}: the table of also has a column {taken[0]!r} of its own, which here names the "
            "edit; rename it"
        )
    return validate(table).assign(method=edit.method, rho=edit.rho)


def _strict(scores, tokens: Int[np.ndarray, "item pos"], prefix: int) -> Bool[np.ndarray, " item"]:
    # guess[:, t] is for token prefix + t; all right exactly if greedy decoding is
    return (scores.guess == tokens[:, prefix:]).all(axis=1)


def recitation(
    model: LanguageModel, tokens: Int[np.ndarray, "item pos"], prefix: int
) -> dict[str, Float[np.ndarray, " item"]]:
    """Strict and loose verdict, edit distance and margin of each item's continuation."""
    scores = model.score(tokens, start=prefix, keep=("guess", "log_probability"))
    truth = tokens[:, prefix:]
    distance = edit_distance(model.generate(tokens[:, :prefix], truth.shape[1]), truth)
    return {
        "recitation_strict": _strict(scores, tokens, prefix).astype(float),
        # 1 - 4/16 is exactly .75, so no rounding decides a verdict at the published threshold
        "recitation_loose": (1 - distance >= LOOSE).astype(float),
        "edit_distance": distance,
        "recitation_margin": log_odds(scores.log_probability).min(axis=1),
    }


def log_odds(log_probability: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """``log p - log(1 - p)``; at most 16.6, for single precision tells no more from certainty."""
    log_p = np.minimum(np.asarray(log_probability, dtype=np.float64), -(2.0**-24))
    return log_p - np.log(-np.expm1(log_p))


def _verdict_rows(model, items, verdicts, edit: Edit, seed: int) -> pd.DataFrame:
    edited_by = {"method": edit.method, "rho": edit.rho}
    named = {"run": model.run, "step": model.step}
    carried = {name: items[name] for name in CARRIED if name in items.columns}
    groups = items["group"].astype(str).to_numpy()
    parts = []
    for metric, values in verdicts.items():
        of_items = {"group": groups, "item": items["item"], "beside": edited_by | carried}
        parts.append(rows(metric, values, **of_items, **named))
        for group in dict.fromkeys(groups):
            part = values[groups == group]
            if metric in ("recitation_strict", "recitation_loose"):
                low, high = wilson(int(part.sum()), len(part))
            else:
                low, high = bootstrap(lambda w, v=part: w @ v / len(v), [len(part)], seed)
            pooled = {"lo": low, "hi": high, "n": len(part), "group": group, "beside": edited_by}
            parts.append(rows(metric, part.mean(), **pooled, **named))
    return pd.concat(parts, ignore_index=True)


def _held_out_loss(model: LanguageModel, held_out: Sequence[np.ndarray], edit: Edit):
    """Summed negative log-probability and number of scored tokens of each text."""
    nats, counts = np.zeros(len(held_out)), np.zeros(len(held_out))
    for index, scores in model.score_batches(held_out, keep=("log_probability",)):
        nats[index] = -np.nansum(scores.log_probability, axis=1, dtype=np.float64)
        counts[index] = np.isfinite(scores.log_probability).sum(axis=1)
        if (counts[index] < scores.length).any():
            raise InputError(
                f"{ASKER}: log-probabilities of held-out text are not finite under "
                f"{edit.method} at rho {edit.rho:g}; the weights or their dtype give NaN or Inf"
            )
    return nats, counts


def _cost_rows(model, loss, own, edit: Edit, seed: int) -> pd.DataFrame:
    """``loss`` and ``own``: summed nats and tokens of each text, under the edit and without it."""
    beside = {"method": edit.method, "rho": edit.rho}
    named = {"run": model.run, "step": model.step, "beside": beside}
    (nats, counts), before = loss, own[0]
    parts = []
    for metric, total in (("perplexity", nats), ("perplexity_ratio", nats - before)):
        low, high = bootstrap(lambda w, t=total: np.exp(w @ t / (w @ counts)), [len(nats)], seed)
        value = np.exp(total.sum() / counts.sum())
        pooled = {"lo": low, "hi": high, "n": len(nats), "group": "held-out"}
        parts.append(rows(metric, value, **pooled, **named))
    parts.append(rows("kept", edit.kept, **named))
    parts.append(rows("predicted_damage", edit.predicted_damage, **named))
    return pd.concat(parts, ignore_index=True)


# Which layers


def layer_candidates(bases: Sequence[Basis]) -> dict[str, list[Basis]]:
    """Sets of layers to try: all, the MLP, attention, and each block alone; none twice."""
    named = {
        "all": list(bases),
        "MLP": [basis for basis in bases if basis.layer.role.startswith("mlp.")],
        "attention": [basis for basis in bases if basis.layer.role.startswith("attn.")],
    }
    for block in sorted({basis.layer.block for basis in bases}):
        named[f"block {block}"] = [basis for basis in bases if basis.layer.block == block]
    found: dict[tuple[str, ...], str] = {}
    for name, chosen in named.items():
        if chosen:
            found.setdefault(tuple(basis.layer.name for basis in chosen), name)
    return {name: named[name] for name in found.values()}


def sweep_layers(
    model: LanguageModel,
    items: pd.DataFrame,
    *,
    texts: Sequence[str],
    held_out: Sequence[str],
    memorized: str | Sequence[str] = "seen",
    roles: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    labels: str = "sampled",
    method: str = "kfac",
    rho: Sequence[float] = SWEEP,
    ratio: float = 1.10,
    prefix: int = 16,
    suffix: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """The edit on some of the layers at a time, each until it costs ``ratio`` times perplexity.

    One decomposition serves all sets of :func:`layer_candidates`. Which of them to take is for
    ``choose_layers`` to say, which chooses on some items and reports on others.

    Args:
        rho: Shares kept; each set of layers is edited with them from the gentlest on.
        ratio: Of perplexity to the unedited model's, at which a set's edits end.

    Returns:
        Rows as of :func:`edit_rows`, with the coordinate ``layers``; "none" for the unedited model.

    Raises:
        InputError: As :func:`probe_curvature`, or a ratio that is not above 1.
    """
    if not ratio > 1:
        raise InputError(f"sweep_layers: ratio is {ratio}, it must be above 1")
    items = check_items(items)
    memorized = (memorized,) if isinstance(memorized, str) else tuple(memorized)
    grid = _grid([method], {method: sorted(rho, reverse=True)})
    tokens, kept = _cut(model, _of_groups(items, memorized), prefix, suffix)
    ordinary, held = text_tokens(model, texts, "texts"), text_tokens(model, held_out, "held_out")
    factors = collect_factors(model, ordinary, roles=roles, blocks=blocks, labels=labels, seed=seed)
    bases = decompose(factors)
    own = _held_out_loss(model, held, Edit(NONE, 1.0, 1.0, 0.0))
    parts = []
    sets = {NONE: [], **layer_candidates(bases)}
    for name, chosen in _shown(list(sets.items()), "sets of layers"):
        for each, share in grid if chosen else [(NONE, 1.0)]:
            with _editing(chosen, each, share, seed) as edit:
                loss = _held_out_loss(model, held, edit)
                verdicts = recitation(model, tokens, prefix)
            told = _verdict_rows(model, kept, verdicts, edit, seed)
            cost = _cost_rows(model, loss, own, edit, seed)
            parts += [told.assign(layers=name), cost.assign(layers=name)]
            if np.exp((loss[0] - own[0]).sum() / own[1].sum()) >= ratio:
                break
    return validate(pd.concat(parts, ignore_index=True))


# Bands of the input spectrum


@dataclass(frozen=True)
class InputSpectrum:
    """Eigenvectors of A, one a column, by descending eigenvalue; ``layers`` read that tensor."""

    layers: tuple[Layer, ...]
    vectors: Float[torch.Tensor, "in in"]

    @property
    def role(self) -> str:
        return ", ".join(layer.role for layer in self.layers)


def shared_spectra(bases: Sequence[Basis]) -> list[InputSpectrum]:
    """One for each input tensor: layers that share A share the very tensor of eigenvectors."""
    shared: dict[int, list[Basis]] = {}
    for basis in bases:
        shared.setdefault(id(basis.input_vectors), []).append(basis)
    return [
        InputSpectrum(tuple(basis.layer for basis in group), group[0].input_vectors)
        for group in shared.values()
    ]


def input_spectra(
    model: LanguageModel, tokens: Sequence[Int[np.ndarray, " pos"]], layers: Sequence[Layer]
) -> list[InputSpectrum]:
    """The input factors alone, by forward passes without a gradient, and their eigenvectors.

    The positions are those of ``collect_factors``, and so is A, but for rounding.

    Raises:
        InputError: An input that is not finite; the layer is named.
    """
    alive: dict[str, torch.Tensor] = {}  # held, so that no two of them stand in one place
    with torch.inference_mode(), forward_seen(layers, lambda at, a, _: alive.update({at.name: a})):
        ids, _, _ = padded(model, list(tokens[:CHECK_TEXTS]))
        model.module.base_model(input_ids=ids, use_cache=False)
    readers: dict[int, list[Layer]] = {}
    for layer in layers:
        readers.setdefault(id(alive[layer.name]), []).append(layer)
    sums = {
        group[0].name: torch.zeros(a.shape[-1], a.shape[-1], device=a.device, dtype=torch.float32)
        for group in readers.values()
        for a in [alive[group[0].name]]
    }
    alive.clear()
    lengths = np.array([len(each) for each in tokens])
    for index in buckets(lengths, TOKENS_PER_BATCH.get(model.device.type, 4096)):
        ids, _, mask = padded(model, [tokens[i] for i in index])

        def add(layer, given, output, mask=mask):
            values = given[mask].float()
            sums[layer.name].addmm_(values.T, values)

        with torch.inference_mode(), forward_seen([g[0] for g in readers.values()], add):
            model.module.base_model(input_ids=ids, use_cache=False)
    return [
        InputSpectrum(
            tuple(group), spectrum(sums[group[0].name], f"the input of {group[0].name}")[1]
        )
        for group in readers.values()
    ]


def probe_band_energy(
    model: LanguageModel,
    items: pd.DataFrame,
    *,
    texts: Sequence[str],
    roles: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    prefix: int = 16,
    suffix: int = 16,
) -> pd.DataFrame:
    """Where in the spectrum of ordinary inputs each item's activations lie; forward passes only.

    A model too large for gradients can be asked this. Memory is the factors and the activations of
    one batch.

    Args:
        items: Items frame; all groups are asked.
        texts: Ordinary text, whose inputs make the spectrum.
        roles, blocks: As ``linear_layers``.
        prefix, suffix: Energy is averaged over the positions that predict the suffix.

    Returns:
        ``band_energy`` of each item, with the coordinates ``block``, ``role`` (joined where layers
        read one tensor) and ``band``; the bands of an item sum to 1. An item drawn like the texts
        has in each band the band's share of the eigenvalues, on average.

    Raises:
        InputError: No item long enough, no usable text, a role or block the model lacks.
    """
    tokens, kept = _cut(model, check_items(items), prefix, suffix)
    layers = linear_layers(model.module, roles=roles, blocks=blocks)
    spectra = input_spectra(model, text_tokens(model, texts, "texts"), layers)
    energies = _band_energies(model, spectra, tokens, suffix)
    table = validate(pd.concat(_item_bands(model, energies, kept), ignore_index=True))
    table.attrs["dropped"] = kept.attrs["dropped"]
    return table


def band_energy(
    given: Float[torch.Tensor, "item pos in"], vectors: Float[torch.Tensor, "in in"]
) -> Float[np.ndarray, "item band"]:
    """Share of each item's activation energy in each of :data:`BANDS`, averaged over positions.

    Directions are columns, by descending eigenvalue. Shares of an item sum to 1. Positions without
    any activation are left out; NaN where there is no other.
    """
    energy = (given.to(vectors.device, vectors.dtype) @ vectors).square()
    energy = energy / energy.sum(dim=-1, keepdim=True)
    width = vectors.shape[1]
    edges = [(round(low * width), round(high * width)) for low, high in BANDS.values()]
    parts = [energy[..., low:high].sum(dim=-1).nanmean(dim=1) for low, high in edges]
    return torch.stack(parts, dim=1).cpu().numpy()


def band_rows(
    model: LanguageModel,
    bases: Sequence[Basis],
    items: pd.DataFrame,
    *,
    memorized: str | Sequence[str],
    clean: str,
    prefix: int,
    suffix: int,
    seed: int = 0,
) -> pd.DataFrame:
    """Where in the input spectrum the activations of memorized and of clean items lie.

    At the positions that predict the suffix. Layers that read one tensor (gate and up; q, k and
    v) have one row, under their roles joined.

    Returns:
        ``band_energy`` of each item and of each group, and ``band_ratio`` of each memorized group,
        its energy over that of the clean items (1: no difference; NaN with a reason where the
        clean items have none), with bootstrap intervals over items.
    """
    tokens, kept = _cut(model, items, prefix, suffix)
    energies = _band_energies(model, shared_spectra(bases), tokens, suffix)
    memorized = (memorized,) if isinstance(memorized, str) else memorized
    of_group = {name: (kept["group"] == name).to_numpy() for name in (*memorized, clean)}
    for name, members in of_group.items():
        if not members.any():
            raise InputError(f"{ASKER}: no item of group {name!r} has {prefix + suffix} tokens")
    parts = _item_bands(model, energies, kept)
    for (block, role), values in energies.items():
        beside = {"block": block, "role": role, "band": list(BANDS)}
        named = {"run": model.run, "step": model.step, "beside": beside}
        for name, members in of_group.items():
            part, size = values[members], int(members.sum())
            low, high = bootstrap(lambda w, p=part: w @ p / len(p), [size], seed)
            pooled = {"lo": low, "hi": high, "n": size, "group": name}
            parts.append(rows("band_energy", part.mean(axis=0), **pooled, **named))
        for name in memorized:
            ratio = _ratio_rows(values, of_group[name], of_group[clean], named, seed)
            parts.append(ratio.assign(group=name))
    return pd.concat(parts, ignore_index=True)


def _item_bands(model, energies: dict, items: pd.DataFrame) -> list[pd.DataFrame]:
    """Item rows of each input and band; of nothing larger than items x bands."""
    carried = {name: items[name] for name in CARRIED if name in items.columns}
    parts = []
    for (block, role), values in energies.items():
        for band, value in zip(BANDS, values.T, strict=True):
            empty = np.where(np.isnan(value), "no activation at any position", None)
            beside = {"block": block, "role": role, "band": band, "reason": empty, **carried}
            told = {"group": items["group"], "item": items["item"], "beside": beside}
            parts.append(rows("band_energy", value, run=model.run, step=model.step, **told))
    return parts


def _band_energies(
    model: LanguageModel,
    spectra: Sequence[InputSpectrum],
    tokens: Int[np.ndarray, "item pos"],
    suffix: int,
) -> dict[tuple[int, str], Float[np.ndarray, "item band"]]:
    of_layer = {each.layers[0].name: each for each in spectra}
    found = {
        (each.layers[0].block, each.role): np.full((len(tokens), len(BANDS)), np.nan)
        for each in spectra
    }
    lengths = np.full(len(tokens), tokens.shape[1])
    for index in buckets(lengths, TOKENS_PER_BATCH.get(model.device.type, 4096)):

        def see(layer, given, output, index=index):
            each = of_layer[layer.name]
            # all items have one length, so the last positions are those that predict the suffix
            found[layer.block, each.role][index] = band_energy(given[:, -suffix:], each.vectors)

        ids, _, _ = padded(model, list(tokens[index]))
        with torch.inference_mode(), forward_seen([each.layers[0] for each in spectra], see):
            model.module.base_model(input_ids=ids, use_cache=False)
    return found


def _ratio_rows(
    values: Float[np.ndarray, "item band"],
    memorized: Bool[np.ndarray, " item"],
    clean: Bool[np.ndarray, " item"],
    named: dict,
    seed: int,
) -> pd.DataFrame:
    mine, theirs = values[memorized], values[clean]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = mine.mean(axis=0) / theirs.mean(axis=0)
        low, high = bootstrap(
            lambda v, w: (v @ mine / len(mine)) / (w @ theirs / len(theirs)),
            [len(mine), len(theirs)],
            seed,
        )
    empty = theirs.mean(axis=0) == 0
    reason = np.where(empty, "clean items have no energy in the band", None)
    ratio, low, high = (np.where(empty, np.nan, each) for each in (ratio, low, high))
    named = named | {"beside": named["beside"] | {"reason": reason}}
    return rows("band_ratio", ratio, lo=low, hi=high, n=len(mine) + len(theirs), **named)


# Intervals


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; never empty, also at 0 and 1."""
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(confidence_level=LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap(
    statistic: Callable[..., np.ndarray], sizes: Sequence[int], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of a statistic that takes how often each member was drawn.

    Args:
        statistic: Takes one ``[draw, member]`` array of counts for each of ``sizes``, each row of
            which sums to that size, and returns ``[draw, ...]``.
        sizes: Members of each sample; samples are drawn apart.
    """
    rng = np.random.default_rng([seed, *sizes])
    counts = [rng.multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float) for n in sizes]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(statistic(*counts), [tail, 1 - tail], axis=0)
    return low, high
