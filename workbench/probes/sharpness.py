"""How sharp the loss is: over groups of items, and of each item by itself."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from workbench.curvature import Basis, decompose, weight_hash
from workbench.factors import (
    collect_factors,
    frozen,
    gradients_seen,
    padded,
    summed_loss,
    usable_lengths,
)
from workbench.hessian import (
    VECTORS,
    Hessian,
    in_dtype,
    loss_hessian,
    mean_interval,
    rademacher,
    spectral_density,
    tokens_per_pass,
    top_eigenvalues,
    trace_samples,
    twice_differentiable,
)
from workbench.items import check_items, items_hash
from workbench.models import Checkpoints, LanguageModel, buckets
from workbench.sweep import COORDINATES
from workbench.table import METRICS, InputError, rows, validate

MEASURES = ("gradient_norm", "hessian_trace", "input_curvature", "self_influence")
DAMPING = 0.1  # of a layer's mean mass; Grosse et al. (2023)
COMPONENTS = 2**22  # of texts' gradients alive at once


def probe_sharpness(
    model: LanguageModel | Checkpoints,
    items: pd.DataFrame,
    *,
    parameters: Sequence[str] | None = None,
    top: int = 5,
    probes: int = 32,
    starts: int = 3,
    steps: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """Sharpness of the mean loss per token over each group of items, at each step of a run.

    One Hessian a group and step. Costs about ``2 probes / 3 + starts x steps`` and some dozens of
    products for the eigenvalues, each about three times a gradient over the group's texts.

    Args:
        model: A model, or checkpoints of a run.
        items: Items frame; texts are cut to the context, those under two tokens dropped.
        parameters: As :func:`loss_hessian`; None takes all.
        top: How many of the largest eigenvalues.
        probes: Random vectors of the trace.
        starts, steps: Random starts of the density, and steps from each; 0 starts leave it out.

    Returns:
        Table, values in nats per token. ``hessian_eigenvalue`` for each ``rank`` from 1; within lo
        to hi lies an eigenvalue of this Hessian for certain (norm of the residual), and n counts
        texts. ``hessian_trace`` with ``se``; lo to hi is a 95 % t interval over n probes.
        ``hessian_density`` at each ``eigenvalue`` of a grid, with a 95 % t interval over n starts,
        cut at 0. ``gradient_norm`` of the mean loss, exact: 0 at a stationary point. No interval
        speaks of other texts. ``.attrs["dropped"]`` counts texts.

    Raises:
        InputError: No usable text, or as :func:`loss_hessian` and :func:`top_eigenvalues`.
    """
    parts = []
    for number, (one, tokens, kept) in enumerate(_readings(model, items, "probe_sharpness")):
        for group in kept["group"].unique():
            members = np.flatnonzero(kept["group"] == group)
            where = {"run": one.run, "step": one.step, "group": str(group)}
            few = [tokens[i] for i in members]
            with loss_hessian(one, few, parameters=parameters) as hessian:
                parts += _spectrum_rows(hessian, where, top, probes, starts, steps, seed)
        if number == 0:
            passport = _passport(kept, items, parameters, seed)
    table = validate(pd.concat(parts, ignore_index=True))
    table.attrs = {"passport": passport, "dropped": kept.attrs["dropped"]}
    return table


def _spectrum_rows(hessian, where, top, probes, starts, steps, seed) -> list[pd.DataFrame]:
    texts = len(hessian.tokens)
    values, residuals = top_eigenvalues(hessian, top, seed=seed)
    trace, error, low, high = mean_interval(trace_samples(hessian, probes, seed=seed))
    parts = [
        rows("gradient_norm", np.linalg.norm(hessian.gradient()), n=texts, **where),
        rows(
            "hessian_eigenvalue",
            values,
            lo=values - residuals,
            hi=values + residuals,
            n=texts,
            beside={"rank": np.arange(1, top + 1)},
            **where,
        ),
        rows("hessian_trace", trace, lo=low, hi=high, n=probes, beside={"se": error}, **where),
    ]
    if starts:
        grid, density = spectral_density(hessian, starts=starts, steps=steps, seed=seed)
        mean, error, low, high = mean_interval(density)
        beside = {"eigenvalue": grid, "se": error}
        interval = {"lo": np.maximum(low, 0.0), "hi": high, "n": starts}
        parts.append(rows("hessian_density", mean, beside=beside, **interval, **where))
    return parts


def probe_item_sharpness(
    model: LanguageModel | Checkpoints,
    items: pd.DataFrame,
    *,
    texts: Sequence[str] | None = None,
    measures: Sequence[str] | None = None,
    parameters: Sequence[str] | None = None,
    roles: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    damping: float = DAMPING,
    probes: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """How sharp the loss of each item is by itself, at each step of a run, and how common its way.

    A memorized item is said to be sharp by itself while the directions it uses are flat in the
    average text: the first four measures are of the former, ``curvature_met`` is of the latter. But
    a memorized item also has a small loss, with which gradient, input curvature and self-influence
    fall: hold them against untrained items of like loss and length, and against a twin.

    Args:
        model: A model, or checkpoints of a run.
        items: Items frame, whose further columns (``kind``, ``dose``, ...) the rows carry; texts are
            cut to the context, those under two tokens dropped.
        texts: Ordinary text for the curvature of the average text, collected anew at each step
            from sampled labels; None leaves out self-influence and ``curvature_met``.
        measures: Of ``gradient_norm``, ``hessian_trace`` (by far the dearest),
            ``input_curvature`` and ``self_influence``, with which ``curvature_met`` comes; None
            takes all there are texts for.
        parameters: Of the gradient and the trace, as :func:`loss_hessian`; None takes all.
        roles, blocks: Layers of the self-influence, as ``linear_layers``; None takes all.
        damping: As :func:`self_influence`.
        probes: Random vectors of each trace and input curvature; all items have the same ones, so
            that differences between items are less noisy than either.

    Returns:
        Table with, for each item and step, of its mean loss per token: ``gradient_norm``, exact;
        ``hessian_trace`` and ``input_curvature`` (:func:`input_curvature`), each with ``se`` and a
        95 % t interval over n probes; ``self_influence`` and ``curvature_met``
        (:func:`self_influence`), exact for the factors they are given. No interval speaks of other
        items or of other factors.

    Raises:
        InputError: As :func:`probe_sharpness`, an unknown measure, or texts that cannot be used.
    """
    asker = "probe_item_sharpness"
    measures = _asked(measures, texts)
    passport, parts = {}, []
    for one, tokens, kept in _readings(model, items, asker):
        found: dict[str, tuple] = {}
        if {"gradient_norm", "hessian_trace"} & set(measures):
            with loss_hessian(one, tokens, parameters=parameters) as whole:
                each = [replace(whole, tokens=[t], scale=1.0 / (len(t) - 1)) for t in tokens]
                if "gradient_norm" in measures:
                    norms = np.array([np.linalg.norm(hessian.gradient()) for hessian in each])
                    found["gradient_norm"] = (norms,)
                if "hessian_trace" in measures:
                    found["hessian_trace"] = mean_interval(_traces(each, probes, seed))
        if "input_curvature" in measures:
            draws = input_curvature(one, tokens, probes=probes, seed=seed)
            found["input_curvature"] = mean_interval(draws)
        if "self_influence" in measures:
            factors = collect_factors(
                one, _ordinary(one, texts), roles=roles, blocks=blocks, seed=seed
            )
            own, met = self_influence(one, decompose(factors), tokens, damping=damping)
            found |= {"self_influence": (own,), "curvature_met": (met,)}
        where = {"run": one.run, "step": one.step, "group": kept["group"], "item": kept["item"]}
        beside = {name: kept[name].to_numpy() for name in COORDINATES if name in kept.columns}
        for metric, values in found.items():
            parts.append(_item_rows(metric, values, probes, where, beside))
        if not passport:
            passport = _passport(kept, items, parameters, seed) | {"measures": measures}
            if "self_influence" in measures:
                layers = [layer.name for layer in factors.layers]
                passport |= {"damping": damping, "layers": layers, "factor_tokens": factors.tokens}
    table = validate(pd.concat(parts, ignore_index=True))
    table.attrs = {"passport": passport, "dropped": kept.attrs["dropped"]}
    return table


def _asked(measures: Sequence[str] | None, texts: Sequence[str] | None) -> list[str]:
    asker, able = "probe_item_sharpness", list(MEASURES)
    if isinstance(texts, str):
        raise InputError(f"{asker}: texts is one text, needs a list of texts")
    if measures is None:
        return able if texts is not None else able[:-1]
    unknown = [name for name in measures if name not in able]
    if unknown or not len(measures):
        got = repr(unknown[0]) if unknown else "no measure"
        raise InputError(f"{asker}: {got}; choose from {', '.join(able)}")
    if "self_influence" in measures and texts is None:
        raise InputError(
            f"{asker}: self_influence needs the curvature of ordinary text; give some as texts"
        )
    return list(measures)


def _ordinary(model: LanguageModel, texts: Sequence[str]) -> list[np.ndarray]:
    encoded = [each[: model.context] for each in model.encode(list(texts))]
    usable = [each for each in encoded if len(each) >= 2]
    if not usable:
        raise InputError(
            f"probe_item_sharpness: none of {len(encoded)} texts for the curvature has two tokens; "
            "give longer texts"
        )
    return usable


def _traces(each: Sequence[Hessian], probes: int, seed: int) -> Float[np.ndarray, "draw item"]:
    """``v^T H v`` of every item; the vectors are drawn once for all of them."""
    if probes < 1:
        raise InputError(f"probe_item_sharpness: probes is {probes}, needs at least 1")
    out = np.empty((probes, len(each)))
    for at in range(0, probes, VECTORS):
        some = rademacher(each[0].size, min(VECTORS, probes - at), seed=seed, first=at)
        some = some.astype(np.float32)  # signs are exact in it
        for i, hessian in enumerate(each):
            images = hessian.products(some)
            out[at : at + len(some), i] = np.einsum("vp,vp->v", images, some)
    return out


def _item_rows(metric: str, values: tuple, probes: int, where: dict, beside: dict) -> pd.DataFrame:
    if len(values) == 1:
        reason = np.where(np.isnan(values[0]), "no gradient: its direction is undefined", "")
        return rows(metric, values[0], beside=beside | {"reason": reason}, **where)
    mean, error, low, high = values
    if METRICS[metric].low is not None:
        low = np.maximum(low, METRICS[metric].low)
    beside = beside | {"se": error, "reason": ""}
    return rows(metric, mean, lo=low, hi=high, n=probes, beside=beside, **where)


# Measures of one text


def input_curvature(
    model: LanguageModel, tokens: Sequence[Int[np.ndarray, " pos"]], *, probes: int, seed: int = 0
) -> Float[np.ndarray, "draw item"]:
    """How sharply each text's loss bends as its input embeddings move.

    Garg et al. (2024), "Memorization through the lens of curvature of loss function around
    samples": the mean over random signs v of ``|H v|^2``, whose expectation is the sum of the
    squared eigenvalues of H. They take a difference of gradients; here the product is exact. H is
    of the text's **summed** loss by what the embedding layer gives for its tokens (a BOS and the
    last token, which is no input, apart), and ``|H v|^2`` is divided by the number of predicted
    tokens: where positions do not attend to one another a text said twice then has the value of
    the text said once, while the mean loss would halve it and the summed loss double it.

    Args:
        tokens: Token ids of each text, as ``model.encode`` gives them; at least 2 each.
        probes: How many v; a longer text's begin with those of a shorter one.

    Returns:
        One value a draw and text, at least 0, in squared nats per embedding unit to the fourth;
        their mean estimates without bias. Embeddings grow in training, so compare texts at one
        step, or one step of two runs.

    Raises:
        InputError: Fewer than 1 probe, texts too short or too long, quantised weights, a model
            without an embedding layer, a loss that is not finite.
    """
    asker = "input_curvature"
    if probes < 1:
        raise InputError(f"{asker}: probes is {probes}, needs at least 1")
    usable_lengths(model, tokens, asker)
    model = in_dtype(model, None, asker)
    lengths = np.array([len(each) for each in tokens])
    out = np.empty((probes, len(tokens)))
    with twice_differentiable(model.module, {}), _embedded(model.module) as seen:
        for batch, index in enumerate(buckets(lengths, tokens_per_pass(model))):
            ids, targets, mask = padded(model, [tokens[i] for i in index])
            loss = summed_loss(model, ids, targets, mask, "gold", 0)
            _refuse_loss(loss, batch, asker)
            leaf = seen.pop()
            here = mask[..., None].to(leaf.dtype)
            before = int(model.bos is not None)
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            for draw in range(probes):
                size = (leaf.shape[1] - before) * leaf.shape[2]
                signs = torch.from_numpy(rademacher(size, 1, seed=seed, first=draw)[0])
                signs = signs.to(leaf.dtype).to(leaf.device).view(-1, leaf.shape[2])
                ones = torch.nn.functional.pad(signs, (0, 0, before, 0)) * here
                (image,) = torch.autograd.grad(
                    gradient, leaf, grad_outputs=ones, retain_graph=draw + 1 < probes
                )
                squared = (image * here).square().sum(dim=(1, 2)) / mask.sum(dim=1)
                out[draw, index] = squared.cpu().double().numpy()
    return out


@contextlib.contextmanager
def _embedded(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """What the embedding layer gives, as leaves that take gradients; the latest is last."""
    find = getattr(module, "get_input_embeddings", None)
    layer = find() if find else None
    if layer is None:
        raise InputError(
            f"input_curvature: {type(module).__name__} names no layer of input embeddings; leave "
            "input_curvature out of the measures"
        )
    seen: list[torch.Tensor] = []

    def hook(_, given, output):
        seen.append(output.detach().requires_grad_(True))
        return seen[-1]

    handle = layer.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def self_influence(
    model: LanguageModel,
    bases: Sequence[Basis],
    tokens: Sequence[Int[np.ndarray, " pos"]],
    *,
    damping: float = DAMPING,
) -> tuple[Float[np.ndarray, " item"], Float[np.ndarray, " item"]]:
    """What each text's own gradient is worth to itself, and how much curvature it meets.

    Grosse et al. (2023), "Studying large language model generalization with influence functions":
    with D the gradient of a text's mean loss per token by a weight, in the eigenbases of the
    weight's factors, self-influence is ``sum D_ji^2 / (lambda_i mu_j + delta)`` over components
    and layers, which is ``d^T (A (x) G + delta)^-1 d``. The curvature met is that of the unit
    gradient, ``sum D^2 lambda mu / sum D^2``, over the mean mass of a component.

    Args:
        bases: Of the model's weights as they are now, from ordinary text.
        tokens: Token ids of each text, as ``model.encode`` gives them; at least 2 each.
        damping: delta as a share of each layer's mean mass, at least 0. As it grows the
            self-influence approaches the squared gradient over delta; at 0 it is undamped.

    Returns:
        Self-influence, in nats per token, at least 0: how fast the text's loss falls as training
        weighs the text more, to first order. And the curvature met: 1 on average for a gradient in
        a random direction, above where ordinary text bends the loss along it more than along most,
        0 where not at all; NaN where a text has no gradient.

    Raises:
        InputError: Damping below 0, or 0 with components of no mass; bases of another model or of
            other weights; texts too short or too long; a loss that is not finite.
    """
    asker = "self_influence"
    _refuse_bases(model, bases, damping)
    usable_lengths(model, tokens, asker)
    lengths = np.array([len(each) for each in tokens])
    by_name = {basis.layer.name: basis for basis in bases}
    sums = np.zeros((3, len(tokens)))

    def see(layer, given, gradient) -> None:
        basis = by_name[layer.name]
        moved, felt = _turned(given, basis.input_vectors), _turned(gradient, basis.output_vectors)
        felt = felt / counts[:, None, None]
        lam, mu = (torch.from_numpy(v) for v in (basis.input_values, basis.output_values))
        mean = _mean_mass(basis)
        relative = torch.outer(mu / mean, lam).to(felt.dtype).to(felt.device)
        step = max(1, COMPONENTS // relative.numel())
        for at in range(0, len(felt), step):
            few = slice(at, at + step)
            # one position's gradient is an outer product, so a text's is a sum over its positions;
            # those that predict nothing have none
            squared = (felt[few].transpose(1, 2) @ moved[few]).square()
            parts = [squared / (relative + damping) / mean, squared * relative * mean, squared]
            found = torch.stack([part.sum(dim=(1, 2)) for part in parts])
            sums[:, index[few]] += found.cpu().double().numpy()

    with frozen(model.module), gradients_seen([basis.layer for basis in bases], see):
        for batch, index in enumerate(buckets(lengths, tokens_per_pass(model))):
            ids, targets, mask = padded(model, [tokens[i] for i in index])
            counts = mask.sum(dim=1)
            loss = summed_loss(model, ids, targets, mask, "gold", 0)
            _refuse_loss(loss, batch, asker)
            loss.backward()
    sizes = np.array([basis.coefficients.numel() for basis in bases])
    mean = np.average([_mean_mass(basis) for basis in bases], weights=sizes)
    with np.errstate(invalid="ignore"):  # 0 / 0 where a text has no gradient
        return sums[0], sums[1] / sums[2] / mean


def _turned(
    values: Float[torch.Tensor, "item pos n"], vectors: Float[torch.Tensor, "n n"]
) -> Float[torch.Tensor, "item pos n"]:
    """In the eigenbasis, in float32 at least."""
    values = values.detach()
    values = values if values.dtype == torch.float64 else values.float()
    return values @ vectors.to(values.device, values.dtype)


def _mean_mass(basis: Basis) -> float:
    return float(basis.input_values.mean() * basis.output_values.mean())


def _refuse_bases(model: LanguageModel, bases: Sequence[Basis], damping: float) -> None:
    if not len(bases):
        raise InputError("self_influence: got no bases, needs at least one layer's")
    if not damping >= 0:
        raise InputError(f"self_influence: damping is {damping}, needs at least 0")
    modules = dict(model.module.named_modules(remove_duplicate=False))
    for basis in bases:
        name = basis.layer.name
        if modules.get(name) is not basis.layer.module or weight_hash(basis.layer) != basis.hash:
            raise InputError(
                f"self_influence: {name} holds other weights than were decomposed, or is another "
                "model's; collect the factors of this one"
            )
        least = min(basis.input_values.min(), basis.output_values.min())
        if not _mean_mass(basis) > 0 or (damping == 0 and not least > 0):
            raise InputError(
                f"self_influence: {name} has components without mass, whose influence without "
                "damping is infinite; give more texts for the factors, or damping above 0"
            )


def _refuse_loss(loss: Float[torch.Tensor, ""], batch: int, asker: str) -> None:
    if not bool(torch.isfinite(loss)):
        raise InputError(
            f"{asker}: the loss of batch {batch} is {float(loss.detach())}; the weights or the texts of that "
            "batch hold NaN or Inf, or the dtype overflows"
        )


# What both probes share


def _readings(model: LanguageModel | Checkpoints, items: pd.DataFrame, asker: str):
    """Each step of a run with the items' tokens, cut to the context, and the items kept."""
    items = check_items(items)
    tokens = kept = None
    run = isinstance(model, Checkpoints)
    for one in tqdm(model, desc=asker, leave=False, disable=None) if run else [model]:
        passport = one.passport() if tokens is None else None
        one = in_dtype(one, None, asker)
        if tokens is None:
            tokens = [each[: one.context] for each in one.encode(items["text"].tolist())]
            enough = np.array([len(each) >= 2 for each in tokens])
            if not enough.any():
                raise InputError(
                    f"{asker}: none of {len(items)} texts has two tokens; give longer texts"
                )
            dropped = int((~enough).sum())
            if dropped:
                warnings.warn(
                    f"{asker}: dropped {dropped} of {len(items)} texts that are shorter than two "
                    "tokens",
                    stacklevel=3,
                )
            tokens = [each for each, long in zip(tokens, enough, strict=True) if long]
            kept = items[enough].reset_index(drop=True)
            kept.attrs = {"dropped": dropped, "passport": passport}
        yield one, tokens, kept


def _passport(kept: pd.DataFrame, items: pd.DataFrame, parameters, seed: int) -> dict:
    return kept.attrs["passport"] | {
        "items": items_hash(items),
        "attention": "eager",
        "reduction": "mean",
        "parameters": "all" if parameters is None else list(parameters),
        "seed": seed,
    }
