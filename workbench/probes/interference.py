"""What an update on some texts does to the loss of others, to first order, and then in truth.

One step of gradient descent on group X changes the loss of group Y by about ``-lr <g_X, g_Y>``:
where the gradients point the same way both gain (transfer), where they oppose the step undoes what
was learned (interference; Riemer et al. 2019, "Learning to learn without forgetting by maximizing
transfer and minimizing interference").
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from tqdm.auto import tqdm

from workbench.factors import LOGITS_PER_BATCH, frozen, padded
from workbench.items import cut_items, items_hash
from workbench.models import TOKENS_PER_BATCH, Checkpoints, LanguageModel, buckets
from workbench.sweep import COORDINATES
from workbench.table import InputError, rows, validate
from workbench.tensors import weight_tensors

ASKER = "probe_interference"
LEVEL = 0.95  # of all intervals here
ALONE = "one text in a group, needs two"
NOTHING_SHARED = "the texts of a group share no direction beyond chance"


@dataclass(frozen=True)
class Gradients:
    """All that the statistics need of the texts' gradients; nothing here grows with the weights.

    Attributes:
        groups: Their names; ``member[g]`` says which texts are of group g.
        modules: Roles that the model has, and last ``all``; ``dimensions`` counts their weights.
        products: ``<g_i, sum of the gradients of group g>``.
        squares: ``|g_i|^2``.
        loss: Of each text, mean over its predicted tokens, nats.
    """

    groups: tuple[str, ...]
    member: Bool[np.ndarray, "group item"]
    modules: tuple[str, ...]
    dimensions: Int[np.ndarray, " module"]
    products: Float[np.ndarray, "item group module"]
    squares: Float[np.ndarray, "item module"]
    loss: Float[np.ndarray, " item"]


def probe_interference(
    source: LanguageModel | Checkpoints,
    items: pd.DataFrame,
    *,
    learning_rate: float | None = None,
) -> pd.DataFrame:
    """Do the loss gradients of groups of texts agree, and what does a step on one do to another?

    ``g_i`` is the gradient of text i's loss (mean over its tokens after the first, nats) in all
    weights, and that of a group the mean over its texts. Groups are those of ``items["group"]``:
    planted ones, held-out text, the next batches of training. The steps are plain gradient descent;
    Adam turns and stretches each, so it forgets along other directions than those shown here.

    The inner product of two different groups' estimated means is right on average. With itself it
    is not: noise agrees with itself, and adds ``mean |g_i|^2 / n``. So within a group, and under
    the cosine, the mean over **pairs** of its texts stands in its place (a U-statistic), which is
    0 on average where texts share nothing.

    Memory is two gradients for each group and one text's: the texts run twice, in batches for the
    groups' sums, and each alone for its products with them.

    Args:
        source: A model or the checkpoints of a run; weights below float32 are cast for the while.
        items: Items frame of one group or more; texts longer than the context are cut to it.
        learning_rate: Of one real step on each group in turn, after which the weights come back to
            the bit; None takes none.

    Returns:
        For each step, group (Y), ``against`` (X) and ``module`` (a role, or ``all``), with
        ``dimensions``, its number of weights (cosines of random directions have a standard
        deviation of 1 / sqrt of it, which real gradients, with their few directions, exceed):

        - ``gradient_product``: positive where a step on X helps Y, negative where it hurts, 0 by
          chance; X = Y: between different texts of the group. For ``module="all"`` also for each
          item, with the mean gradient of X (without the item's own).
        - ``gradient_cosine``, X unlike Y: 1 where the groups pull alike, -1 where they pull apart.
          Noise in the lengths is taken out, so few texts give values beyond, cut to [-1, 1].
        - ``gradient_coherence``, X = Y: 1 where all texts have one gradient, 0 by chance.

        These have 95 % intervals by a jackknife over the texts of both groups (t with the smaller
        group's degrees of freedom); ``n`` is the number of Y's texts. With ``learning_rate``, for
        ``module="all"``, pooled and for each item of Y: ``step_predicted`` (X = Y: each text's own
        gradient counted, as in a real step), ``step_measured`` and ``step_central``, the latter
        free of curvature; there the step is what it is, and the interval Student's over Y's texts.

    Raises:
        InputError: A learning rate that is not positive, quantised weights, no text of two
            tokens, or gradients that are not finite (the item is named).
    """
    if learning_rate is not None and not (np.isfinite(learning_rate) and learning_rate > 0):
        raise InputError(
            f"{ASKER}: learning_rate is {learning_rate}, needs a positive number or None"
        )
    models = source if isinstance(source, Checkpoints) else [source]
    parts, kept, tokens = [], None, None
    for model in models:
        if kept is None:
            _, kept = cut_items(model, items, 2, asker=ASKER)
            texts = model.encode(kept["text"].tolist())
            tokens = [each[: model.context] for each in texts]
        with _differentiable(model) as ready:
            found, steps = _measure(ready, tokens, kept, learning_rate)
        parts.append(_rows(found, steps, kept, model, learning_rate))
    table = validate(pd.concat(parts, ignore_index=True))
    steps = list(source.steps) if isinstance(source, Checkpoints) else [source.step]
    passport = {"items": items_hash(items), "learning_rate": learning_rate, "steps": steps}
    table.attrs = {
        "passport": {**model.passport(), **passport},
        "dropped": kept.attrs["dropped"],
    }
    return table


# Gradients


@contextlib.contextmanager
def _differentiable(model: LanguageModel) -> Iterator[LanguageModel]:
    for name, parameter in model.module.named_parameters():
        if not parameter.is_floating_point():
            raise InputError(
                f"{ASKER}: {name} holds {parameter.dtype} weights, needs floats; load the model "
                "without quantisation"
            )
    narrow = {p.dtype for p in model.module.parameters()} - {torch.float32, torch.float64}
    if narrow:
        warnings.warn(
            f"{ASKER}: the weights of {model.run} are {', '.join(map(str, narrow))}; a float32 "
            "copy is taken",
            stacklevel=4,
        )
        model = model.copy()
    with frozen(model.module):
        model.module.requires_grad_(True)
        yield model


def text_losses(
    model: LanguageModel, tokens: Sequence[Int[np.ndarray, " pos"]]
) -> Float[torch.Tensor, " item"]:
    """Mean negative log-probability of each text's tokens after the first, nats, with its graph."""
    ids, targets, mask = padded(model, tokens)
    logits = model.module(input_ids=ids, use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = targets.masked_fill(~mask, -100)  # cross_entropy's ignore_index
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    return loss.view_as(targets).sum(dim=1) / mask.sum(dim=1)


def _measure(model, tokens, kept, learning_rate) -> tuple[Gradients, dict]:
    group = kept["group"].astype(str).to_numpy()
    groups = tuple(dict.fromkeys(group))
    member = np.array([group == each for each in groups])
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    # a run of seconds needs no bar
    with tqdm(
        total=2 * len(tokens), desc=f"{ASKER}, step {model.step}", unit="text", delay=10,
        leave=False, mininterval=0.1 if watched else 30.0,
    ) as bar:  # fmt: skip
        sums = [_group_gradient(model, tokens, np.flatnonzero(each), bar) for each in member]
        found = _gradients(model, tokens, kept, groups, member, sums, bar)
    return found, _steps(model, tokens, member, sums, learning_rate, found.loss)


def _group_gradient(model, tokens, chosen, bar) -> dict[str, torch.Tensor]:
    """The sum over the chosen texts of the gradients of their losses."""
    parameters = dict(model.module.named_parameters())
    total = {name: torch.zeros_like(each) for name, each in parameters.items()}
    for index in _batches(model, [tokens[i] for i in chosen]):
        loss = text_losses(model, [tokens[chosen[i]] for i in index]).sum()
        for name, gradient in _gradient(loss, parameters).items():
            total[name] += gradient
        bar.update(len(index))
    return total


def _batches(model, tokens) -> Iterator[np.ndarray]:
    kind = model.device.type
    logits = LOGITS_PER_BATCH.get(kind, LOGITS_PER_BATCH["cpu"]) // model.vocabulary
    limit = min(TOKENS_PER_BATCH.get(kind, 4096), max(1, logits))
    return buckets(np.array([len(each) for each in tokens]), limit)


def _gradient(loss: torch.Tensor, parameters: Mapping) -> dict[str, torch.Tensor]:
    """By name; parameters that the loss does not use are left out."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: each for name, each in zip(parameters, found, strict=True) if each is not None}


def _gradients(model, tokens, kept, groups, member, sums, bar) -> Gradients:
    parameters = dict(model.module.named_parameters())
    roles = [role for _, role, _, _ in weight_tensors(model.module)]
    counts = np.array([value.numel() for *_, value in weight_tensors(model.module)])
    modules = (*dict.fromkeys(roles), "all")
    of_module = np.array([[each in (role, "all") for role in roles] for each in modules])
    # [group, weight] for each tensor: one product of a matrix and a vector then serves all groups
    stacked = [
        torch.stack([value.flatten() for value in values])
        for values in zip(*(_parts(model.module, each) for each in sums), strict=True)
    ]
    products = np.zeros((len(tokens), len(sums), len(modules)))
    squares, loss = np.zeros((len(tokens), len(modules))), np.zeros(len(tokens))
    none = {name: torch.zeros_like(each) for name, each in parameters.items()}
    for item, each in enumerate(tokens):
        own = text_losses(model, [each]).sum()
        parts = [g.flatten() for g in _parts(model.module, none | _gradient(own, parameters))]
        loss[item] = float(own.detach())
        dots = torch.stack([total @ g for total, g in zip(stacked, parts, strict=True)])
        norms = torch.stack([g @ g for g in parts])
        products[item] = (of_module @ dots.cpu().double().numpy()).T
        squares[item] = of_module @ norms.cpu().double().numpy()
        if not np.isfinite([loss[item], squares[item].sum(), products[item].sum()]).all():
            raise InputError(
                f"{ASKER}: the gradient of item {kept['item'].iloc[item]!r} is not finite at step "
                f"{model.step} of {model.run}; the weights or their dtype give NaN or Inf"
            )
        bar.update(1)
    return Gradients(groups, member, modules, of_module @ counts, products, squares, loss)


def _parts(module: torch.nn.Module, values: Mapping) -> list[torch.Tensor]:
    return [value for *_, value in weight_tensors(module, values)]


@torch.no_grad()
def _steps(model, tokens, member, sums, learning_rate, before) -> dict[int, tuple]:
    """For each group, the losses of all texts after a step on it, and after one backwards."""
    if learning_rate is None:
        return {}
    parameters = dict(model.module.named_parameters())
    kept = {name: each.detach().clone() for name, each in parameters.items()}
    found = {}
    try:
        for place, total in enumerate(sums):
            rate = learning_rate / int(member[place].sum())
            there_and_back = []
            for sign in (-1, 1):
                for name, each in parameters.items():
                    each.copy_(kept[name] + sign * rate * total[name])
                loss = np.zeros(len(tokens))
                for index in _batches(model, tokens):
                    part = text_losses(model, [tokens[i] for i in index])
                    loss[index] = part.cpu().double().numpy()
                there_and_back.append(loss)
            there, back = there_and_back
            found[place] = (there - before, (there - back) / 2)
    finally:
        for name, each in parameters.items():
            each.copy_(kept[name])
    return found


# Statistics


def pair_mean(
    products: Float[np.ndarray, "item ..."], squares: Float[np.ndarray, "item ..."]
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "item ..."]]:
    """Mean of ``<g_i, g_j>`` over pairs of different texts, and the same without each text.

    Right on average for ``|E g|^2``, where the square of the mean's norm is too large by
    ``mean |g|^2 / n``. g = (1, 0), (1, 1), (0, 2): products 1, 0, 2, so 1; without the first 2,
    without the second 0, without the third 1.

    Args:
        products: ``<g_i, sum of all g>``.
        squares: ``|g_i|^2``.

    Returns:
        NaN with fewer than 2 texts; without a text, with fewer than 3.
    """
    n, others = len(squares), products - squares
    total = others.sum(axis=0)
    if n < 2:
        return np.full(total.shape, np.nan), np.full(squares.shape, np.nan)
    without = total - 2 * others
    left = without / ((n - 1) * (n - 2)) if n > 2 else np.full(squares.shape, np.nan)
    return total / (n * (n - 1)), left


def jackknife_half(*left_out: Float[np.ndarray, "item ..."]) -> Float[np.ndarray, "..."]:
    """Half a 95 % interval from values without each text, of one or more independent groups.

    Each group adds ``(n - 1) / n sum (f_i - mean f)^2`` to the variance (Tukey 1958); t has the
    smallest group's degrees of freedom. One group, 1 and 3: variance 1/2 (1 + 1) = 1, so 12.7062.
    """
    from scipy.stats import t

    variance, least = 0.0, min(len(each) for each in left_out)
    if least < 2:
        return np.full(left_out[0].shape[1:], np.nan)
    for each in left_out:
        gap = each - each.mean(axis=0)
        variance = variance + (len(each) - 1) / len(each) * (gap**2).sum(axis=0)
    return t.ppf((1 + LEVEL) / 2, least - 1) * np.sqrt(variance)


def _rows(found: Gradients, steps, kept, model, learning_rate) -> pd.DataFrame:
    within = [
        pair_mean(found.products[mine, place], found.squares[mine])
        for place, mine in enumerate(found.member)
    ]
    parts = []
    for y, group in enumerate(found.groups):
        for x, against in enumerate(found.groups):
            named = {"run": model.run, "step": model.step, "group": group}
            beside = {"against": against, "module": found.modules, "dimensions": found.dimensions}
            own = _within(found, within, y) if x == y else _between(found, within, x, y)
            for metric, (value, half, why) in own.items():
                low, high = value - half, value + half
                if metric != "gradient_product":
                    value, low, high = (np.clip(each, -1, 1) for each in (value, low, high))
                reason = np.where(np.isnan(value), why, None)
                pooled = {"lo": low, "hi": high, "n": int(found.member[y].sum())}
                parts.append(
                    rows(metric, value, **pooled, beside=beside | {"reason": reason}, **named)
                )
            parts.extend(_item_rows(found, steps, kept, learning_rate, x, y, named))
    return pd.concat(parts, ignore_index=True)


def _within(found: Gradients, within, y) -> dict[str, tuple]:
    mean, left = within[y]
    squares = found.squares[found.member[y]]
    n, total = len(squares), squares.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        coherence = mean / (total / n)
        without = left / ((total - squares) / max(n - 1, 1))
    return {
        "gradient_product": (mean, jackknife_half(left), ALONE),
        "gradient_coherence": (
            coherence, jackknife_half(without), ALONE if n < 2 else "no gradient",
        ),
    }  # fmt: skip


def _between(found: Gradients, within, x, y) -> dict[str, tuple]:
    in_x, in_y = found.member[x], found.member[y]
    n_x, n_y = int(in_x.sum()), int(in_y.sum())
    of_x, of_y = found.products[in_x, y], found.products[in_y, x]  # with the other group's sum
    total = of_y.sum(axis=0)
    product = total / (n_x * n_y)
    nan = np.full_like(of_x, np.nan), np.full_like(of_y, np.nan)
    left_x = (total - of_x) / ((n_x - 1) * n_y) if n_x > 1 else nan[0]
    left_y = (total - of_y) / (n_x * (n_y - 1)) if n_y > 1 else nan[1]
    (mean_x, without_x), (mean_y, without_y) = within[x], within[y]
    cosine = _cosine(product, mean_x, mean_y)
    halves = _cosine(left_x, without_x, mean_y), _cosine(left_y, mean_x, without_y)
    why = ALONE if min(n_x, n_y) < 2 else NOTHING_SHARED
    return {
        "gradient_product": (product, jackknife_half(left_x, left_y), None),
        "gradient_cosine": (cosine, jackknife_half(*halves), why),
    }


def _cosine(product, square_x, square_y) -> np.ndarray:
    positive = (square_x > 0) & (square_y > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(positive, product / np.sqrt(square_x * square_y), np.nan)


def _item_rows(found: Gradients, steps, kept, learning_rate, x, y, named) -> list[pd.DataFrame]:
    mine, n_x = found.member[y], int(found.member[x].sum())
    of_items = kept[mine]
    rides = {name: of_items[name].to_numpy() for name in COORDINATES if name in of_items}
    beside = {"against": found.groups[x], "module": "all", "dimensions": int(found.dimensions[-1])}
    items = {"item": of_items["item"].to_numpy(), "beside": beside | rides}
    with_sum = found.products[mine, x, -1]
    others = with_sum - found.squares[mine, -1] if x == y else with_sum
    count = n_x - 1 if x == y else n_x
    each = others / count if count else np.full(len(others), np.nan)
    items["beside"]["reason"] = None if count else ALONE
    parts = [rows("gradient_product", each, **items, **named)]
    if x not in steps:
        return parts
    items["beside"]["reason"] = None
    measured, central = (changes[mine] for changes in steps[x])
    for metric, changes in (
        ("step_predicted", -learning_rate * with_sum / n_x),
        ("step_measured", measured),
        ("step_central", central),
    ):
        parts.append(rows(metric, changes, **items, **named))
        mean = changes.mean()
        # the jackknife of a mean is Student's interval
        without = (changes.sum() - changes) / max(len(changes) - 1, 1)
        half = float(jackknife_half(without))
        pooled = {"lo": mean - half, "hi": mean + half, "n": len(changes)}
        parts.append(rows(metric, mean, **pooled, beside=beside, **named))
    return parts
