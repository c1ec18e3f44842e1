"""What an edit along the loss curvature does to recitation and to everything else.

Merullo et al. (2025), "From memorization to reasoning in the spectrum of loss curvature". The
mathematics stands in ``workbench.curvature``; here a model is edited, asked, and put back.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from rapidfuzz.distance import Levenshtein

from workbench.curvature import METHODS, Basis, Edit, decompose, edited, refuse_share, staircase
from workbench.factors import collect_factors, forward_seen, padded
from workbench.items import check_items, cut_items, items_hash, load_items
from workbench.models import TOKENS_PER_BATCH, LanguageModel, buckets
from workbench.suite import Suite, passages
from workbench.table import InputError, rows, validate

ASKER = "probe_curvature"
LOOSE = 0.75  # similarity from which a continuation is recited, loosely; Merullo et al. (2025)
LEVEL = 0.95  # of all intervals
DRAWS = 2000  # of the bootstraps
# shares kept: on the embedded suite these raise perplexity by 1 % to some 50 %; the last kfac value
# is the published one (OLMo-2 7B, MLP of three blocks)
RHO: Mapping[str, tuple[float, ...]] = {
    "kfac": (0.99, 0.98, 0.965, 0.95, 0.93, 0.9, 0.8, 0.6),
    "saliency": (0.999, 0.998, 0.995, 0.99, 0.98, 0.95),
    "svd": (0.4, 0.3, 0.25, 0.2, 0.15, 0.1),
    "magnitude": (0.5, 0.4, 0.3, 0.25, 0.2, 0.15),
    "random": (0.99, 0.98, 0.95, 0.9, 0.8),
}
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
    memorized: str = "seen",
    clean: str = "unseen",
    roles: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    labels: str = "sampled",
    methods: Sequence[str] = METHODS,
    rho: Mapping[str, Sequence[float]] = RHO,
    prefix: int = 16,
    suffix: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """Factors of the curvature, the edits along them, and what the edits cost.

    One decomposition serves the whole sweep; the model has its own weights again at the end, also
    after an error. What each part holds: :func:`spectrum_rows`, :func:`band_rows`,
    :func:`edit_rows`.

    Args:
        items: Items frame; those of group ``memorized`` are recited, those of ``clean`` are
            compared with them band by band (left out, and said, where there are none).
        texts: For the factors: ordinary text of the kind the model was trained on.
        held_out: For the perplexity: text it was not trained on. Both are cut to the context.
        roles, blocks: Linear layers to edit, as ``linear_layers``; None: all of the blocks.
        labels: ``sampled`` (true Fisher) or ``gold``, as ``collect_factors``.
        methods: Of ``kfac``, ``saliency``, ``svd``, ``magnitude``, ``random``.
        rho: For each method the shares kept: of curvature mass, of saliency, of ranks, of
            weights, of components.
        prefix, suffix: Tokens of the prompt and of the continuation that is to be recited.

    Returns:
        The table, with the coordinates ``method``, ``rho``, ``block``, ``role``, ``components``
        and ``band``, missing where they do not apply. ``.attrs["passport"]`` says from what.

    Raises:
        InputError: No memorized items or none long enough, no usable text, an unknown method,
            ``rho`` outside (0, 1], a role the model lacks, values that are not finite.
    """
    items = check_items(items)
    grid, recited = _grid(methods, rho), _of_group(items, memorized)
    tokens, held = _tokens(model, texts, "texts"), _tokens(model, held_out, "held_out")
    factors = collect_factors(model, tokens, roles=roles, blocks=blocks, labels=labels, seed=seed)
    bases = decompose(factors)
    asked = {"prefix": prefix, "suffix": suffix, "seed": seed}
    parts = [
        spectrum_rows(model, bases),
        edit_rows(model, bases, recited, held_out=held, grid=grid, **asked),
    ]
    if (items["group"] == clean).any():
        compared = items[items["group"].isin([memorized, clean])]
        parts.append(band_rows(model, bases, compared, memorized=memorized, clean=clean, **asked))
    else:
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


def _of_group(items: pd.DataFrame, memorized: str) -> pd.DataFrame:
    chosen = items[items["group"] == memorized]
    if chosen.empty:
        raise InputError(
            f"{ASKER}: no items of group {memorized!r}; there are groups "
            f"{', '.join(sorted(map(str, items['group'].unique())))}"
        )
    return chosen


def _tokens(model: LanguageModel, texts: Sequence[str], name: str) -> list[np.ndarray]:
    """Token ids cut to the context; texts under two tokens predict nothing and are dropped."""
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
) -> pd.DataFrame:
    """Recitation and perplexity of the model as it is (method ``none``) and under each edit.

    Returns:
        For each item and pooled (``item="all"``): ``recitation_strict`` (the whole continuation is
        right; one teacher-forced pass decides it), ``recitation_loose`` (similarity of the greedy
        continuation at least .75; both 0 by chance), ``edit_distance`` (0 at best, 1 at worst).
        Pooled: ``perplexity`` on held-out text (token-weighted), ``kept`` (share of components,
        ranks or weights) and ``predicted_damage``. Intervals at 95 %: Wilson for shares, else
        bootstrap over items or texts.

    Raises:
        InputError: No item of ``prefix + suffix`` tokens, or perplexity that is not finite.
    """
    for name, value in (("prefix", prefix), ("suffix", suffix)):
        if value < 1:
            raise InputError(f"{ASKER}: {name} is {value}, but must be at least 1")
    tokens, kept = cut_items(model, items, prefix + suffix, asker=ASKER)
    parts = []
    for method, share in [("none", 1.0), *grid]:
        editing = (
            contextlib.nullcontext(Edit("none", 1.0, 1.0, 0.0))
            if method == "none"
            else edited(bases, method=method, rho=share, seed=seed)
        )
        with editing as edit:
            nats, counts = _held_out_loss(model, held_out, edit)
            verdicts = recitation(model, tokens, prefix)
        parts.append(_verdict_rows(model, kept, verdicts, edit, seed))
        parts.append(_cost_rows(model, nats, counts, edit, seed))
    return pd.concat(parts, ignore_index=True)


def recitation(
    model: LanguageModel, tokens: Int[np.ndarray, "item pos"], prefix: int
) -> dict[str, Float[np.ndarray, " item"]]:
    """Strict and loose verdict and edit distance of each item's continuation of its prefix."""
    truth = tokens[:, prefix:]
    # guess[:, t] is for token prefix + t; all right exactly if greedy decoding is (METRICS 2)
    strict = (model.score(tokens, start=prefix, keep=("guess",)).guess == truth).all(axis=1)
    distance = edit_distance(model.generate(tokens[:, :prefix], truth.shape[1]), truth)
    return {
        "recitation_strict": strict.astype(float),
        # 1 - 4/16 is exactly .75, so no rounding decides a verdict at the published threshold
        "recitation_loose": (1 - distance >= LOOSE).astype(float),
        "edit_distance": distance,
    }


def _verdict_rows(model, items, verdicts, edit: Edit, seed: int) -> pd.DataFrame:
    beside = {"method": edit.method, "rho": edit.rho}
    named = {"run": model.run, "step": model.step, "beside": beside}
    group = str(items["group"].iloc[0])
    parts = []
    for metric, values in verdicts.items():
        parts.append(rows(metric, values, group=items["group"], item=items["item"], **named))
        if metric == "edit_distance":
            low, high = bootstrap(lambda w, v=values: w @ v / len(v), [len(values)], seed)
        else:
            low, high = wilson(int(values.sum()), len(values))
        pooled = {"lo": low, "hi": high, "n": len(values), "group": group}
        parts.append(rows(metric, values.mean(), **pooled, **named))
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


def _cost_rows(model, nats, counts, edit: Edit, seed: int) -> pd.DataFrame:
    beside = {"method": edit.method, "rho": edit.rho}
    named = {"run": model.run, "step": model.step, "beside": beside}
    low, high = bootstrap(lambda w: np.exp(w @ nats / (w @ counts)), [len(nats)], seed)
    value = np.exp(nats.sum() / counts.sum())
    return pd.concat(
        [
            rows("perplexity", value, lo=low, hi=high, n=len(nats), group="held-out", **named),
            rows("kept", edit.kept, **named),
            rows("predicted_damage", edit.predicted_damage, **named),
        ],
        ignore_index=True,
    )


# Bands of the input spectrum


def band_energy(
    given: Float[torch.Tensor, "item pos in"], vectors: Float[torch.Tensor, "in in"]
) -> Float[np.ndarray, "item band"]:
    """Share of each item's activation energy in each of :data:`BANDS`, averaged over positions.

    Directions are columns, by descending eigenvalue. Shares of an item sum to 1.
    """
    energy = (given.to(vectors.device, vectors.dtype) @ vectors).square()
    energy = energy / energy.sum(dim=-1, keepdim=True)
    width = vectors.shape[1]
    edges = [(round(low * width), round(high * width)) for low, high in BANDS.values()]
    parts = [energy[..., low:high].sum(dim=-1).mean(dim=1) for low, high in edges]
    return torch.stack(parts, dim=1).cpu().numpy()


def band_rows(
    model: LanguageModel,
    bases: Sequence[Basis],
    items: pd.DataFrame,
    *,
    memorized: str,
    clean: str,
    prefix: int,
    suffix: int,
    seed: int = 0,
) -> pd.DataFrame:
    """Where in the input spectrum the activations of memorized and of clean items lie.

    At the positions that predict the suffix. Layers that read one tensor (gate and up; q, k and
    v) have one row, under their roles joined.

    Returns:
        ``band_energy`` of each group and ``band_ratio``, memorized over clean (1: no difference;
        NaN with a reason where the clean items have none), with bootstrap intervals over items.
    """
    tokens, kept = cut_items(model, items, prefix + suffix, asker=ASKER)
    energy = _band_energies(model, bases, tokens, suffix)
    of_group = {name: (kept["group"] == name).to_numpy() for name in (memorized, clean)}
    for name, members in of_group.items():
        if not members.any():
            raise InputError(f"{ASKER}: no item of group {name!r} has {prefix + suffix} tokens")
    parts = []
    for (block, role), values in energy.items():
        beside = {"block": block, "role": role, "band": list(BANDS)}
        named = {"run": model.run, "step": model.step, "beside": beside}
        for name, members in of_group.items():
            part, size = values[members], int(members.sum())
            low, high = bootstrap(lambda w, p=part: w @ p / len(p), [size], seed)
            pooled = {"lo": low, "hi": high, "n": size, "group": name}
            parts.append(rows("band_energy", part.mean(axis=0), **pooled, **named))
        parts.append(_ratio_rows(values, *of_group.values(), named, seed))
    return pd.concat(parts, ignore_index=True)


def _band_energies(model, bases, tokens, suffix) -> dict[tuple[int, str], np.ndarray]:
    # one basis for each input tensor: layers that share A share the very tensor of eigenvectors
    shared: dict[int, list[Basis]] = {}
    for basis in bases:
        shared.setdefault(id(basis.input_vectors), []).append(basis)
    first = {group[0].layer.name: group for group in shared.values()}
    found: dict[tuple[int, str], np.ndarray] = {}
    lengths = np.array([len(each) for each in tokens])
    for index in buckets(lengths, TOKENS_PER_BATCH.get(model.device.type, 4096)):

        def see(layer, given, output, index=index):
            group = first[layer.name]
            key = (layer.block, ", ".join(basis.layer.role for basis in group))
            place = found.setdefault(key, np.full((len(tokens), len(BANDS)), np.nan))
            # all items have one length, so the last positions are those that predict the suffix
            place[index] = band_energy(given[:, -suffix:], group[0].input_vectors)

        ids, _, _ = padded(model, [tokens[i] for i in index])
        with torch.inference_mode(), forward_seen([g[0].layer for g in first.values()], see):
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
