"""How far weights move, what that does to representations, and whether two models lie in one basin.

Weight change by module needs the checkpoints alone. Linear CKA (Kornblith et al. 2019,
"Similarity of neural network representations revisited") compares hidden states whatever their
basis. The barrier on the straight line between two models is that of Frankle et al. (2020),
"Linear mode connectivity and the lottery ticket hypothesis".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from workbench.items import check_items, cut_items, items_hash
from workbench.models import TOKENS_PER_BATCH, Checkpoints, LanguageModel, buckets
from workbench.sweep import COORDINATES
from workbench.table import InputError, rows, validate
from workbench.tensors import OUTSIDE, weight_tensors

SPECTRAL = ("condition_number", "stable_rank", "effective_rank")
CONSTANT = 1e-12  # HSIC of a representation with itself, relative to its energy squared
LEVEL = 0.95  # of all intervals here
DRAWS = 1000  # bootstrap resamples
# of a configuration: how it was saved or is run, not what is computed
ASIDE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


# Weights


def spectrum_sizes(
    matrix: Float[torch.Tensor, "out in"], epsilon: float = 0.0
) -> tuple[float, float, float]:
    """Condition number, stable rank and effective rank, from float64 singular values.

    With singular values s: max s / min s (1 for an orthogonal matrix, no upper end); sum s^2 /
    max s^2 (Rudelson & Vershynin 2007, never above the rank); exp of the entropy of s / sum s (Roy
    & Vetterli 2007, at least 1, at most the smaller side, reached where all s are equal).
    diag(3, 1): 3, 1.1111111, 1.7547654.

    Singular values alone of [m, n] take about 4 m n min(m, n) operations and two copies in
    float64: some 5 s for 2048 x 2048 on one core, and eight times that for twice the sides.

    Args:
        epsilon: Of the type in which the weights are kept. Storing them moves singular values by
            about that share of the largest, so a least one no greater counts as 0.

    Returns:
        The three; NaN for the condition number of a singular matrix, and for all of a zero one.
    """
    values = torch.linalg.svdvals(matrix)
    largest, least = float(values[0]), float(values[-1])
    if largest == 0:
        return np.nan, np.nan, np.nan
    share = values[values > 0] / values.sum()
    stable = float((values / largest).square().sum())
    effective = float(torch.exp(-(share * share.log()).sum()))
    singular = least <= epsilon * largest
    return (np.nan if singular else largest / least), stable, max(effective, 1.0)


def probe_weight_drift(source: Checkpoints, *, base_step: int | None = None) -> pd.DataFrame:
    """How far each weight tensor has moved, step by step, and how many directions it uses.

    Differences and products are taken in float64. The checkpoints are read one after another;
    memory is four models (base, the two before, current) and one tensor in float64. Time is nearly
    all singular values, see :func:`spectrum_sizes`.

    Args:
        source: Checkpoints of one run, at least two.
        base_step: What is compared with; the first step if None. Earlier steps are compared too.

    Returns:
        For each step, coordinates ``tensor`` (the parameter's name), ``module`` (its role) and
        ``layer`` (block, -1 outside):

        - ``weight_change``, |W - W_base| / |W_base| in the Frobenius norm: 0 at the base, no upper
          end; about 1.41 for two unrelated draws.
        - ``weight_change_previous``, |W - W_previous| / |W_base|: the same unit, so that these sum
          to at least the change.
        - ``weight_cosine`` to the base: 1 at the base, about 0 for unrelated draws.
        - ``weight_turn``, the cosine of the step's change to that of the step before: 1 where the
          weights go straight on, 0 where they turn at a right angle (as a random walk would), -1
          where they go back. It depends on how far apart the checkpoints are.
        - ``condition_number``, ``stable_rank``, ``effective_rank`` of matrices.

        The first four also with ``tensor="all"``: over all tensors of a module in a block, and with
        layer -1 of a module and of all (``module="all"``). Undefined numbers are NaN with a ``reason``. There are
        no intervals and n is 1: a tensor is measured whole, and nothing here was drawn from
        anything; for the spread over runs, ask several.

    Raises:
        InputError: Not checkpoints, fewer than two, no such base step, quantised weights, weights
            that are not finite, or checkpoints of different shapes.
    """
    asker = "probe_weight_drift"
    _refuse_no_run(source, asker)
    base_step = source.steps[0] if base_step is None else base_step
    if base_step not in source.steps:
        raise InputError(
            f"{asker}: no checkpoint at base step {base_step}; there are {source.steps}"
        )
    base = _weights(source.at(base_step), asker)
    found, previous, before = [], None, None
    for model in source:
        current = _weights(model, asker)
        _refuse_other_tensors(base, current, base_step, model.step, asker)
        found.append(_tensor_rows(base, before, previous, current, model))
        before, previous = previous, current
    table = validate(pd.concat(found, ignore_index=True))
    table.attrs = {
        "passport": {**model.passport(), "base_step": base_step, "steps": source.steps},
        "dropped": 0,
    }
    return table


def _refuse_no_run(source, asker: str) -> None:
    if not isinstance(source, Checkpoints):
        raise InputError(
            f"{asker}: source is a {type(source).__name__}, needs the checkpoints of a run; "
            "load them with load_checkpoints"
        )
    if len(source) < 2:
        raise InputError(
            f"{asker}: {source.run} has checkpoints at {source.steps}, needs at least two to compare"
        )


def _weights(model: LanguageModel, asker: str) -> dict[str, tuple[str, int, torch.Tensor]]:
    """A copy, for the module is the next checkpoint's too."""
    found = {}
    for name, role, block, value in weight_tensors(model.module):
        if not value.is_floating_point():
            raise InputError(
                f"{asker}: {name} holds {value.dtype} weights, needs floats; load the "
                "model without quantisation"
            )
        if not value.isfinite().all():
            raise InputError(
                f"{asker}: {name} is not finite at step {model.step} of {model.run}; "
                "the checkpoint holds NaN or Inf: leave that step out with select"
            )
        found[name] = (role, block, value.clone())
    return found


def _refuse_other_tensors(base: dict, current: dict, base_step: int, step: int, asker: str) -> None:
    first, second = (
        {name: tuple(value.shape) for name, (_, _, value) in each.items()}
        for each in (base, current)
    )
    differ = [n for n in {**first, **second} if first.get(n) != second.get(n)]
    if differ:
        name = differ[0]
        raise InputError(
            f"{asker}: {name} is {first.get(name, 'not there')} at step {base_step} and "
            f"{second.get(name, 'not there')} at step {step}; give checkpoints of one architecture"
        )


def _double(value: torch.Tensor) -> torch.Tensor:
    return (value.cpu() if value.device.type == "mps" else value).double()  # mps has no float64


def _pools(role: np.ndarray, block: np.ndarray) -> list[tuple[str, int, np.ndarray]]:
    """Module, layer and which tensors: roles, all of them, and roles within a block."""
    found = [(each, OUTSIDE, role == each) for each in dict.fromkeys(role)]
    found.append(("all", OUTSIDE, np.full(len(role), True)))
    inside = dict.fromkeys((r, b) for r, b in zip(role, block, strict=True) if b != OUTSIDE)
    return found + [(r, int(b), (role == r) & (block == b)) for r, b in inside]


def _tensor_rows(base: dict, before: dict | None, previous: dict | None, current: dict, model):
    sums, spectra, where = [], [], []
    for name, (role, block, value) in current.items():
        start, now = _double(base[name][2]), _double(value)
        # with no earlier checkpoint there is no change, with one no change before it
        last = now if previous is None else _double(previous[name][2])
        change = now - last
        older = last - (last if before is None else _double(before[name][2]))
        pairs = (start, start), (now, now), (start, now), (now - start, now - start)
        pairs += (change, change), (older, older), (change, older)
        sums.append([float((a * b).sum()) for a, b in pairs])
        flat = value.ndim != 2
        epsilon = torch.finfo(value.dtype).eps
        spectra.append((np.nan,) * 3 if flat else spectrum_sizes(now, epsilon))
        where.append((name, role, block, flat))
    tensor, role, block, flat = map(np.array, zip(*where, strict=True))
    sums, spectra = np.array(sums), np.array(spectra)
    pools = _pools(role, block)
    names = {
        "tensor": np.concatenate([tensor, ["all"] * len(pools)]),
        "module": np.concatenate([role, [each for each, _, _ in pools]]),
        "layer": np.concatenate([block, [layer for _, layer, _ in pools]]),
    }
    pooled = np.vstack([sums, [sums[chosen].sum(axis=0) for _, _, chosen in pools]])
    parts = _change_rows(pooled, names, previous is None, before is None, model)
    zero = sums[:, 1] == 0
    reason = np.where(flat, "not a matrix", np.where(zero, "all weights are 0", None))
    names = {"tensor": tensor, "module": role, "layer": block}
    for metric, values in zip(SPECTRAL, spectra.T, strict=True):
        why = reason
        if metric == "condition_number":
            why = np.where(np.isnan(values) & pd.isna(why), "singular", why)
        parts.append(
            rows(metric, values, run=model.run, step=model.step, beside=names | {"reason": why})
        )
    return pd.concat(parts, ignore_index=True)


def _change_rows(
    sums: Float[np.ndarray, "tensor 7"], names: dict, first: bool, second: bool, model
) -> list[pd.DataFrame]:
    base, now, product, moved, stepped, stepped_before, turned = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        values = {
            "weight_change": np.sqrt(moved / base),
            "weight_change_previous": np.sqrt(stepped / base),
            "weight_cosine": np.clip(product / np.sqrt(base * now), -1, 1),
            "weight_turn": np.clip(turned / np.sqrt(stepped * stepped_before), -1, 1),
        }
    at_base = np.where(base == 0, "all weights are 0 at the base step", None)
    still = (stepped == 0) | (stepped_before == 0)
    reasons = {
        "weight_change": at_base,
        "weight_change_previous": np.where(first, "no earlier checkpoint", at_base),
        "weight_cosine": np.where((now == 0) & (base != 0), "all weights are 0", at_base),
        "weight_turn": np.where(
            second, "no two earlier checkpoints", np.where(still, "did not move", None)
        ),
    }
    parts = []
    for metric, value in values.items():
        why = reasons[metric]
        kept = np.where(pd.isna(why), value, np.nan)
        beside = names | {"reason": why}
        parts.append(rows(metric, kept, run=model.run, step=model.step, beside=beside))
    return parts


def probe_weight_path(
    source: Checkpoints, *, phases: Mapping[str, tuple[int, int]] | None = None
) -> pd.DataFrame:
    """How far the weights went in each phase of training, how straight, and whether phases agree.

    A path is measured from checkpoint to checkpoint, so it is a lower bound, and the closer the
    checkpoints the longer it is: compare phases of equal ``changes`` and spacing. Memory is two
    models, and two more for each phase. Differences are taken in float64, net ones kept in float32.

    Args:
        source: Checkpoints of one run, at least two.
        phases: Name to first and last step, both of them checkpoints; they may overlap. None: one
            phase, the whole run.

    Returns:
        Under each phase's last step, with coordinates ``phase``, ``changes`` (checkpoints after its
        first), ``module`` and ``layer`` (-1: a role over all blocks, or all weights as ``all``):

        - ``weight_path`` and ``weight_net`` (end less start), both as shares of the norm at the
          run's first checkpoint; 0 where nothing moved, no upper end.
        - ``straightness``, net over path: 1 on a straight line (and with one change), about
          1 / sqrt(changes) for equal steps at right angles, 0 where the weights came back.
        - ``phase_cosine`` to each other phase (``against``), over their net displacements: 1 the
          same way, 0 for unrelated ones, -1 undone. Layer -1 only.

        NaN with a ``reason`` where undefined. No intervals, n is 1: weights are measured whole.

    Raises:
        InputError: Not checkpoints, fewer than two, a phase that does not run from one checkpoint
            to a later one, quantised weights, weights that are not finite, or other shapes.
    """
    asker = "probe_weight_path"
    _refuse_no_run(source, asker)
    steps = source.steps
    phases = {"whole run": (steps[0], steps[-1])} if phases is None else dict(phases)
    if not phases:
        raise InputError(f"{asker}: phases is empty; give names with steps, or None for one phase")
    for name, (start, end) in phases.items():
        if start not in steps or end not in steps or start >= end:
            raise InputError(
                f"{asker}: phase {name!r} runs from {start} to {end}, needs a checkpoint and a "
                f"later one; there are {steps}"
            )
    starts: dict[str, dict] = {}
    nets: dict[str, list[torch.Tensor]] = {}
    base = previous = model = None
    for model in source:
        current = _weights(model, asker)
        if base is None:
            size = np.array([float(_double(v).square().sum()) for _, _, v in current.values()])
            base, pools = current, _tensor_pools(current)
            paths = {name: np.zeros(len(pools)) for name in phases}
        _refuse_other_tensors(base, current, steps[0], model.step, asker)
        if previous is not None:
            change = [float(d.square().sum()) for d in _differences(previous, current)]
            length = np.sqrt([np.sum(change, where=chosen) for _, _, chosen in pools])
            for name, (start, end) in phases.items():
                if start < model.step <= end:
                    paths[name] += length
        for name, (start, end) in phases.items():
            if model.step == start:
                starts[name] = current
            if model.step == end:
                nets[name] = [d.float() for d in _differences(starts.pop(name), current)]
        previous = current
    parts = [_path_rows(name, phases, nets, paths[name], size, pools, source) for name in phases]
    table = validate(pd.concat(parts, ignore_index=True))
    table.attrs = {
        "passport": {**model.passport(), "phases": {n: list(p) for n, p in phases.items()}},
        "dropped": 0,
    }
    return table


def _tensor_pools(weights: dict) -> list[tuple[str, int, np.ndarray]]:
    role, block = zip(*((r, b) for r, b, _ in weights.values()), strict=True)
    return _pools(np.array(role), np.array(block))


def _differences(first: dict, second: dict) -> Iterator[torch.Tensor]:
    return (_double(value) - _double(first[name][2]) for name, (_, _, value) in second.items())


def _path_rows(name, phases, nets, path, size, pools, source) -> pd.DataFrame:
    start, end = phases[name]
    named = {"run": source.run, "step": end}
    beside = {
        "phase": name,
        "changes": sum(start < step <= end for step in source.steps),
        "module": np.array([module for module, _, _ in pools]),
        "layer": np.array([layer for _, layer, _ in pools]),
    }

    def pooled(squares: Sequence[float]) -> np.ndarray:
        return np.array([np.sum(squares, where=chosen) for _, _, chosen in pools])

    own = pooled([_dot(net, net) for net in nets[name]])
    norm, net = np.sqrt(pooled(size)), np.sqrt(own)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = {
            "weight_path": (path / norm, norm == 0, "all weights are 0 at the first step"),
            "weight_net": (net / norm, norm == 0, "all weights are 0 at the first step"),
            # rounding of one change may lift the ratio over 1
            "straightness": (np.minimum(net / path, 1.0), path == 0, "did not move"),
        }
    parts = []
    for metric, (value, bad, why) in values.items():
        reason = {"reason": np.where(bad, why, None)}
        parts.append(rows(metric, np.where(bad, np.nan, value), beside=beside | reason, **named))
    whole = beside["layer"] == OUTSIDE
    beside = {k: v[whole] if isinstance(v, np.ndarray) else v for k, v in beside.items()}
    for other in phases:
        if other == name:
            continue
        product = pooled([_dot(a, b) for a, b in zip(nets[name], nets[other], strict=True)])
        length = np.sqrt(own * pooled([_dot(each, each) for each in nets[other]]))
        bad = (length == 0)[whole]
        with np.errstate(divide="ignore", invalid="ignore"):
            cosine = np.where(bad, np.nan, np.clip(product / length, -1, 1)[whole])
        why = {"against": other, "reason": np.where(bad, "did not move", None)}
        parts.append(rows("phase_cosine", cosine, beside=beside | why, **named))
    return pd.concat(parts, ignore_index=True)


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((_double(a) * _double(b)).sum())


# Representations


def pair_sums(
    x: Float[torch.Tensor, "token p"], y: Float[torch.Tensor, "token q"]
) -> list[torch.Tensor]:
    """What :func:`hsic` needs of two representations of some tokens; adds up over tokens.

    ``X^T Y``, both column sums, each representation times the other's squared norms, the sums of
    squared norms and that of their products.
    """
    long_x, long_y = x.square().sum(dim=1), y.square().sum(dim=1)
    columns = (x.sum(dim=0), y.sum(dim=0), x.T @ long_y, y.T @ long_x)
    return [x.T @ y, *columns, long_x.sum(), long_y.sum(), long_x @ long_y]


def hsic(tokens: int, sums: Sequence[torch.Tensor]) -> float:
    """Unbiased Hilbert-Schmidt independence criterion of linear kernels (Song et al. 2012).

    With K and L the Gram matrices with empty diagonals: (tr KL + 1'K1 1'L1 / ((n-1)(n-2))
    - 2 1'KL1 / (n-2)) / (n(n-3)). The Gram matrices are never formed.

    Args:
        tokens: Their number n; with fewer than 4 it is NaN.
        sums: Of :func:`pair_sums`.
    """
    n = tokens
    if n < 4:
        return float("nan")
    cross, sum_x, sum_y, x_long_y, y_long_x, long_x, long_y, long_both = sums
    trace = cross.square().sum() - long_both
    ones = (sum_x @ sum_x - long_x) * (sum_y @ sum_y - long_y)
    both = sum_x @ cross @ sum_y - sum_x @ x_long_y - sum_y @ y_long_x + long_both
    return float((trace + ones / ((n - 1) * (n - 2)) - 2 * both / (n - 2)) / (n * (n - 3)))


def linear_cka(tokens: int, sums: Sequence[Sequence[torch.Tensor]]) -> float:
    """Debiased linear CKA from the sums of (x, x), (x, y) and (y, y).

    Returns:
        1 for the same representation up to rotation, one scale and shift; 0 on average for
        independent ones, however few the tokens (the biased form nears 1 where dimensions
        outnumber tokens); at least -1. NaN below 4 tokens and where either is constant.
    """
    own_x, cross, own_y = (hsic(tokens, each) for each in sums)
    # squared norms, averaged: what a HSIC that is only rounding is small against
    energy_x, energy_y = (float(sums[i][5]) / tokens for i in (0, 2))
    if not (own_x > CONSTANT * energy_x**2 and own_y > CONSTANT * energy_y**2):
        return float("nan")
    return float(np.clip(cross / np.sqrt(own_x * own_y), -1.0, 1.0))


def probe_cka(model_a: LanguageModel, model_b: LanguageModel, items: pd.DataFrame) -> pd.DataFrame:
    """Similarity of the hidden states of two models, layer by layer, over the same tokens.

    Linear CKA with the unbiased HSIC. Tokens are all of a text's after its first: that one has
    seen nothing, and in many models its state is a hundred times longer than any other. Sums are
    kept in float64 and nothing grows with the tokens; the texts are read twice, the second time to
    leave each out. A few dimensions of large variance can decide it, and equal tokens alone make
    embeddings alike: compare with a model of another seed, not with 0.

    Args:
        model_a, model_b: Models of one tokenizer and as many blocks; widths may differ.
        items: Items frame; texts longer than either context are cut to it.

    Returns:
        ``cka`` for each ``layer`` (0: the embeddings, then after each block, the last as the model
        hands it to its head), under the run and step of ``model_b``; ``against`` names ``model_a``.
        1 at best, 0 by chance. n is the number of texts; the 95 % interval is a jackknife over
        texts on the scale artanh(CKA), NaN where fewer than 2 texts or 4 tokens would be left.

    Raises:
        InputError: One module handed over as two models, other tokens or depth, no text of two
            tokens, fewer than 4 tokens, or hidden states that are not finite.
    """
    asker = "probe_cka"
    tokens, kept = _same_tokens(model_a, model_b, items, asker)
    count = sum(len(each) - 1 for each in tokens)
    if count < 4:
        raise InputError(f"{asker}: the texts have {count} tokens after their first, needs 4")
    totals = None
    for _, sums in _text_sums(model_a, model_b, tokens, kept):
        totals = sums if totals is None else _added(totals, sums)
    value = np.array([linear_cka(count, each) for each in totals])
    left_out = np.full((len(totals), len(tokens)), np.nan)
    for item, sums in _text_sums(model_a, model_b, tokens, kept):
        others = count - (len(tokens[item]) - 1)
        for layer, (total, own) in enumerate(zip(totals, sums, strict=True)):
            if others >= 4:
                left_out[layer, item] = linear_cka(others, _less(total, own))
    low, high = jackknife_interval(value, left_out)
    reason = np.where(np.isnan(value), "the hidden states of a model are all the same", None)
    beside = {"layer": np.arange(len(value)), "against": _called(model_a), "reason": reason}
    named = {"run": model_b.run, "step": model_b.step, "beside": beside}
    table = validate(rows("cka", value, lo=low, hi=high, n=len(tokens), **named))
    table.attrs = _attributes(model_a, model_b, items, kept) | {"tokens": count}
    return table


def jackknife_interval(
    value: Float[np.ndarray, " layer"], left_out: Float[np.ndarray, "layer item"]
) -> tuple[Float[np.ndarray, " layer"], Float[np.ndarray, " layer"]]:
    """95 % interval of a correlation from its values without each item, by t on artanh."""
    from scipy.stats import t

    n = left_out.shape[1]
    if n < 2:
        return np.full_like(value, np.nan), np.full_like(value, np.nan)
    most = 1 - 1e-15  # artanh of 1 is infinite; a model with itself has an interval of no width
    z, without = (np.arctanh(np.clip(each, -most, most)) for each in (value, left_out))
    gap = without - without.mean(axis=1, keepdims=True)
    half = t.ppf((1 + LEVEL) / 2, n - 1) * np.sqrt((n - 1) / n * (gap**2).sum(axis=1))
    return np.minimum(np.tanh(z - half), value), np.maximum(np.tanh(z + half), value)


def _added(totals: list, sums: list) -> list:
    return [
        [[a + b for a, b in zip(one, other, strict=True)] for one, other in zip(t, s, strict=True)]
        for t, s in zip(totals, sums, strict=True)
    ]


def _less(total: list, own: list) -> list:
    pairs = zip(total, own, strict=True)
    return [[a - b for a, b in zip(one, other, strict=True)] for one, other in pairs]


def _text_sums(model_a, model_b, tokens, kept) -> Iterator[tuple[int, list]]:
    """Position of each text and, for each layer, its sums of (x, x), (x, y), (y, y)."""
    shift = None
    limit = TOKENS_PER_BATCH.get(model_a.device.type, 4096)
    for index in buckets(np.array([len(each) for each in tokens]), limit):
        few = [tokens[i] for i in index]
        states_a, states_b = _hidden_states(model_a, few), _hidden_states(model_b, few)
        for item, xs, ys in zip(index, states_a, states_b, strict=True):
            if len(xs) != len(ys):
                raise InputError(
                    f"probe_cka: {_called(model_a)} has {len(xs) - 1} blocks, {_called(model_b)} "
                    f"{len(ys) - 1}; give models of one depth"
                )
            for model, each in ((model_a, xs), (model_b, ys)):
                if not all(bool(state.isfinite().all()) for state in each):
                    raise InputError(
                        f"probe_cka: the hidden states of {_called(model)} are not finite for item "
                        f"{kept['item'].iloc[item]!r}; the weights or their dtype give NaN or Inf"
                    )
            if shift is None:  # HSIC does not see it, but without it large means cost digits
                shift = [(x.mean(dim=0), y.mean(dim=0)) for x, y in zip(xs, ys, strict=True)]
            sums = []
            for x, y, (mean_x, mean_y) in zip(xs, ys, shift, strict=True):
                x, y = x - mean_x, (y - mean_y).to(x.device)
                sums.append([pair_sums(x, x), pair_sums(x, y), pair_sums(y, y)])
            yield int(item), sums


@torch.no_grad()
def _hidden_states(model: LanguageModel, tokens: list) -> Iterator[list[torch.Tensor]]:
    """For each text, ``[token, width]`` in float64 for each layer, without its first token."""
    skip = int(model.bos is not None)
    ids = np.zeros((len(tokens), skip + max(map(len, tokens))), dtype=np.int64)
    ids[:, :skip] = model.bos if skip else 0
    for row, each in enumerate(tokens):
        ids[row, skip : skip + len(each)] = each
    out = model.module.base_model(
        input_ids=torch.from_numpy(ids).to(model.device), use_cache=False, output_hidden_states=True
    )
    for row, each in enumerate(tokens):
        # right padding under a causal mask reaches no earlier token
        yield [_double(state[row, skip + 1 : skip + len(each)]) for state in out.hidden_states]


# Mode connectivity


def barrier_height(
    loss: Float[np.ndarray, "... point"], at: Float[np.ndarray, " point"]
) -> tuple[Float[np.ndarray, " ..."], Int[np.ndarray, " ..."]]:
    """The most by which the loss between two models exceeds the line between its ends, and where.

    Only points between the ends count: at the ends the excess is 0 whatever lies between. Losses
    1, 4, 2 at 0, .5, 1: 4 - 1.5 = 2.5, at point 1.

    Returns:
        Height, signed, in the loss's unit: 0 or below says that the straight line is no worse than
        its ends (connected), and it is so for every convex loss. How far below says little: the
        point next to an end decides it, and nears 0 with more points. And the point's position.
    """
    excess = loss - ((1 - at) * loss[..., :1] + at * loss[..., -1:])
    best = excess[..., 1:-1].argmax(axis=-1) + 1
    return np.take_along_axis(excess, best[..., None], axis=-1)[..., 0], best


def probe_barrier(
    model_a: LanguageModel,
    model_b: LanguageModel,
    items: pd.DataFrame,
    *,
    points: int = 11,
    seed: int = 0,
) -> pd.DataFrame:
    """Loss along the straight line ``(1 - alpha) A + alpha B`` between two models' weights.

    Both models stay as they are: the line is walked in a third, a float32 copy (weights of a lower
    precision are cast). Buffers are those of A.

    Args:
        points: Models on the line, both ends counted; at least 3.
        items: Items frame; texts longer than the context are cut to it.
        seed: Of the bootstrap.

    Returns:
        Under the run and step of ``model_b`` (``against`` names ``model_a``), for each item and
        pooled (``item="all"``) for each group and, where there are several, for all: ``loss`` at
        each ``alpha``, mean negative log-probability per token after the first, nats, pooled as the
        mean over items; and ``barrier`` (see :func:`barrier_height`), whose ``alpha`` says where.
        The pooled barrier is that of the pooled loss, at most the mean of the items' own.
        Intervals at 95 %: percentile bootstrap over items; the maximum is taken anew in each draw,
        so that noise lifts the barrier's a little. None for one item.

    Raises:
        InputError: Fewer than 3 points, one module handed over as two models, other tokens, shapes
            or configuration, no text of two tokens, or a loss that is not finite.
    """
    asker = "probe_barrier"
    if points < 3:
        raise InputError(f"{asker}: points is {points}, but must be at least 3: both ends and one")
    tokens, kept = _same_tokens(model_a, model_b, items, asker)
    _refuse_other_models(model_a, model_b)
    between = model_a.copy()
    at = np.linspace(0.0, 1.0, points)
    loss = np.stack([_loss_at(between, model_a, model_b, a, tokens, kept) for a in at], axis=1)
    table = validate(_barrier_rows(loss, at, kept, model_a, model_b, seed))
    table.attrs = _attributes(model_a, model_b, items, kept)
    return table


def _loss_at(between, model_a, model_b, alpha, tokens, kept) -> Float[np.ndarray, " item"]:
    ends = dict(model_a.module.named_parameters()), dict(model_b.module.named_parameters())
    with torch.no_grad():
        for name, place in between.module.named_parameters():
            first, second = (end[name].detach().to(place.device, place.dtype) for end in ends)
            place.copy_(torch.lerp(first, second, float(alpha)))  # exact at both ends
    loss = np.full(len(tokens), np.nan)
    for index, scores in between.score_batches(tokens, keep=("log_probability",)):
        total = np.nansum(scores.log_probability, axis=1, dtype=np.float64)
        defined = np.isfinite(scores.log_probability).sum(axis=1) == scores.length
        loss[index] = np.where(defined, -total / scores.length, np.nan)
    bad = np.isnan(loss)
    if bad.any():
        raise InputError(
            f"probe_barrier: the loss of item {kept['item'].iloc[int(bad.argmax())]!r} is not "
            f"finite at alpha {alpha:g}; the weights of {_called(model_a)} or {_called(model_b)} "
            "give NaN or Inf"
        )
    return loss


def _barrier_rows(loss, at, kept, model_a, model_b, seed) -> pd.DataFrame:
    named = {"run": model_b.run, "step": model_b.step}
    against = {"against": _called(model_a)}
    rides = {name: kept[name].to_numpy() for name in COORDINATES if name in kept.columns}
    group, item = kept["group"].to_numpy(), kept["item"].to_numpy()
    parts = []
    for place, alpha in enumerate(at):
        beside = against | rides | {"alpha": alpha}
        parts.append(rows("loss", loss[:, place], group=group, item=item, beside=beside, **named))
    height, where = barrier_height(loss, at)
    beside = against | rides | {"alpha": at[where]}
    parts.append(rows("barrier", height, group=group, item=item, beside=beside, **named))
    members = {str(each): group == each for each in dict.fromkeys(group)}
    if len(members) > 1:
        members["all"] = np.full(len(group), True)
    for name, chosen in members.items():
        mean, n = loss[chosen].mean(axis=0), int(chosen.sum())
        rng = np.random.default_rng([seed, n])
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=DRAWS) @ loss[chosen] / n
        height, where = barrier_height(mean, at)
        for metric, value, draws, alpha in (
            ("loss", mean, drawn, at),
            ("barrier", height, barrier_height(drawn, at)[0], at[where]),
        ):
            tail = (1 - LEVEL) / 2
            low, high = np.quantile(draws, [tail, 1 - tail], axis=0) if n > 1 else (np.nan, np.nan)
            pooled = {"lo": low, "hi": high, "n": n, "group": name}
            parts.append(rows(metric, value, beside=against | {"alpha": alpha}, **pooled, **named))
    return pd.concat(parts, ignore_index=True)


def _refuse_other_models(model_a: LanguageModel, model_b: LanguageModel) -> None:
    names = f"{_called(model_a)} and {_called(model_b)}"
    first, second = (
        {name: tuple(each.shape) for name, each in model.module.named_parameters()}
        for model in (model_a, model_b)
    )
    differ = [n for n in {**first, **second} if first.get(n) != second.get(n)]
    if differ:
        name = differ[0]
        raise InputError(
            f"probe_barrier: {names} differ in {name}, {first.get(name, 'not there')} against "
            f"{second.get(name, 'not there')}; between other shapes there is no line"
        )
    first, second = (_computation(model.module.config) for model in (model_a, model_b))
    differ = [n for n in {**first, **second} if first.get(n) != second.get(n)]
    if differ:
        name = differ[0]
        raise InputError(
            f"probe_barrier: {names} have one shape, but {name} {first.get(name)!r} against "
            f"{second.get(name)!r}; what lies between is neither's model"
        )


def _computation(config) -> dict:
    given = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    return {key: value for key, value in given.items() if key not in ASIDE}


# Both comparisons


def _same_tokens(
    model_a: LanguageModel, model_b: LanguageModel, items: pd.DataFrame, asker: str
) -> tuple[list[Int[np.ndarray, " pos"]], pd.DataFrame]:
    """The texts as both models' tokens, cut to the shorter context, and the items kept."""
    if model_a.module is model_b.module and _called(model_a) != _called(model_b):
        raise InputError(
            f"{asker}: {_called(model_a)} and {_called(model_b)} share one module, which holds the "
            "weights of the one read last; take .copy() of the first before reading the second"
        )
    texts = check_items(items)["text"].tolist()
    pairs = zip(model_a.encode(texts), model_b.encode(texts), strict=True)
    differ = [i for i, (one, other) in enumerate(pairs) if not np.array_equal(one, other)]
    if differ or model_a.bos != model_b.bos:
        what = (
            f"cut text number {differ[0]} into other tokens" if differ else "begin texts otherwise"
        )
        raise InputError(
            f"{asker}: the tokenizers of {_called(model_a)} and {_called(model_b)} {what}; give "
            "models of one tokenizer"
        )
    _, kept = cut_items(model_a, items, 2, asker=asker)
    longest = min(model_a.context, model_b.context)
    return [each[:longest] for each in model_a.encode(kept["text"].tolist())], kept


def _called(model: LanguageModel) -> str:
    return f"{model.run} at step {model.step}"


def _attributes(model_a, model_b, items: pd.DataFrame, kept: pd.DataFrame) -> dict:
    against = {"against": model_a.passport(), "items": items_hash(items)}
    return {
        "passport": {**model_b.passport(), **against},
        "dropped": kept.attrs["dropped"],
    }
