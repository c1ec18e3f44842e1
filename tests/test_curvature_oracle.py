"""The curvature against curvlinops 3.0.1, where installed (tests/oracle.txt); checked in float64.

Where it is right, we agree with it. Where it is not, central differences or a plain loop decide, and
what it gives is written down here, so that we notice when it is mended:

- Hessian: forward over reverse differentiation. Through a LayerNorm whose weight is multiplied
  together with anything below it, products are off by percents and not symmetric; SiLU it refuses.
- K-FAC: padding under ``ignore_index`` counts as input and as tokens; texts of unequal length are a
  mean of means; a weight used twice is taken without a word; Conv1D it refuses. Its type-2 goes back
  from all positions at once, so that those that meet in attention do not count as independent.
- Empirical Fisher: its example is always a token. EKFAC takes one label an example.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from tests.curvature_models import KINDS, VOCABULARY, build, collect, texts
from workbench import curvature as cv
from workbench import factors as fc
from workbench import hessian as hs
from workbench.fisher import diagonal_fisher
from workbench.models import LanguageModel
from workbench.table import InputError

curvlinops = pytest.importorskip("curvlinops", reason="pip install --no-deps -r tests/oracle.txt")

# relative, by norm; attention's softmax is float32 in GPT-NeoX and Llama whatever the weights are
ROUNDING = {"neox": 1e-6, "gpt2": 1e-12, "llama": 1e-6}
UNEQUAL = (7, 3, 6)


class Classes(torch.nn.Module):
    """Logits as torch's losses and curvlinops want them, ``[item, vocabulary, position]``."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        model.module.requires_grad_(True).set_attn_implementation("eager")
        self.module = model.module

    def forward(self, ids):
        return self.module(input_ids=ids, use_cache=False).logits.transpose(1, 2)


def asked(operator: str, model: LanguageModel, parameters, tokens, **options):
    """A linear operator of curvlinops for the summed loss, each text a batch of its own."""
    loss = torch.nn.CrossEntropyLoss(reduction="sum")
    data = options.pop("data", None) or [
        (torch.as_tensor(each)[None, :-1], torch.as_tensor(each)[None, 1:]) for each in tokens
    ]
    return getattr(curvlinops, operator)(
        Classes(model), loss, list(parameters), data, check_deterministic=False, **options
    )


def gap(got, expected) -> float:
    got, expected = (torch.as_tensor(each).detach().double() for each in (got, expected))
    return float((got - expected).norm() / expected.norm())


def with_linear_layers(model: LanguageModel) -> LanguageModel:
    """A copy in which each Conv1D is a Linear of the transposed weight."""
    copied = replace(model, module=copy.deepcopy(model.module))
    for name, each in list(copied.module.named_modules()):
        if isinstance(each, Conv1D):
            linear = torch.nn.Linear(*each.weight.shape).to(each.weight.dtype)
            with torch.no_grad():
                linear.weight.copy_(each.weight.T)
                linear.bias.copy_(each.bias)
            parent, _, last = name.rpartition(".")
            setattr(copied.module.get_submodule(parent), last, linear)
    return copied


# The Hessian


def hessian_gap(
    model: LanguageModel, names=None, lengths: tuple[int, ...] = UNEQUAL
) -> tuple[float, float]:
    """How far curvlinops' product is from ours, and its asymmetry, as shares of the product."""
    tokens = texts(*lengths)
    with hs.loss_hessian(model, tokens, parameters=names, reduction="sum") as hessian:
        v, w = np.random.default_rng(0).normal(size=(2, hessian.size))
        parameters = list(hessian.parameters.values())
        operator = asked("HessianLinearOperator", model, parameters, tokens)
        of_v, of_w = ((operator @ torch.as_tensor(each)).detach().numpy() for each in (v, w))
        difference = gap(of_v, hessian.product(v))
    return difference, abs(w @ of_v - v @ of_w) / abs(w @ of_v)


def is_norm(name: str) -> bool:
    return "norm" in name or ".ln_" in name


@pytest.mark.parametrize("kind", ["neox", "gpt2"])
def test_products_agree_over_all_that_is_not_a_layernorm(kind):
    model = build(kind)
    names = [name for name, _ in model.module.named_parameters()]
    difference, asymmetry = hessian_gap(model, [each for each in names if not is_norm(each)])
    assert max(difference, asymmetry) < ROUNDING[kind]


@pytest.mark.parametrize("kind", ["neox", "gpt2"])
def test_products_agree_for_every_parameter_alone(kind):
    model = build(kind)
    names = [name for name, _ in model.module.named_parameters() if ".1." not in name]
    gaps = {name: hessian_gap(model, [name], (6,))[0] for name in names}
    assert sum(is_norm(name) for name in gaps) == 6
    assert max(gaps.values()) < ROUNDING[kind], gaps


def test_products_agree_over_all_of_a_llama_without_silu():
    model = build("llama")
    for block in model.module.model.layers:
        block.mlp.act_fn = torch.nn.GELU()
    assert max(hessian_gap(model)) < ROUNDING["llama"]


def by_differences(hessian: hs.Hessian, vector: np.ndarray, step: float) -> np.ndarray:
    """``H v`` from gradients at four points along v; what is left is of the order step^4."""
    starts = [each.detach().clone() for each in hessian.parameters.values()]
    pieces = torch.as_tensor(vector).split([each.numel() for each in starts])

    def gradient_at(distance: float) -> np.ndarray:
        with torch.no_grad():
            for leaf, start, piece in zip(hessian.parameters.values(), starts, pieces, strict=True):
                leaf.copy_(start + distance * piece.view_as(start))
        return hessian.gradient()

    near, far = (gradient_at(h) - gradient_at(-h) for h in (step, 2 * step))
    gradient_at(0.0)
    return (8 * near - far) / (12 * step)


@pytest.mark.parametrize("kind", ["neox", "gpt2"])
def test_through_layernorm_differences_side_with_us(kind):
    model, tokens = build(kind), texts(*UNEQUAL)
    with hs.loss_hessian(model, tokens, reduction="sum") as hessian:
        v, w = np.random.default_rng(0).normal(size=(2, hessian.size)) / np.sqrt(hessian.size)
        ours, other = hessian.products(np.stack([v, w]))
        expected = by_differences(hessian, v, 1e-2)
        again = by_differences(hessian, v, 5e-3)
    # halving the step leaves a sixteenth of what is off, down to the rounding of the softmax
    assert gap(ours, expected) < 1e-3
    assert gap(ours, again) < max(gap(ours, expected) / 8, 1e-5)
    assert abs(w @ ours - v @ other) < 1e-6 * np.linalg.norm(ours)
    difference, asymmetry = hessian_gap(model)
    assert 1e-3 < difference < 1 and asymmetry > 1e-3  # else it is mended: compare all parameters


def test_through_silu_it_refuses_and_differences_side_with_us():
    model, tokens = build("llama"), texts(*UNEQUAL)
    with hs.loss_hessian(model, tokens, reduction="sum") as hessian:
        v = np.random.default_rng(0).normal(size=hessian.size) / np.sqrt(hessian.size)
        assert gap(hessian.product(v), by_differences(hessian, v, 5e-3)) < 1e-4
    with pytest.raises(NotImplementedError, match="silu_backward"):
        hessian_gap(model)
    # where no product passes SiLU's backward, it is right
    assert hessian_gap(model, ["model.norm", "lm_head"])[0] < ROUNDING["llama"]


# Kronecker factors


def factors_of_curvlinops(model: LanguageModel, tokens, **options) -> dict:
    """A and G by layer name: its sums over tokens, made means."""
    layers = fc.linear_layers(model.module)
    options = {"fisher_type": "empirical"} | options
    weights = [layer.module.weight for layer in layers]
    operator = asked("KFACLinearOperator", model, weights, tokens, **options)
    operator.compute_kronecker_factors()
    count = operator._N_data * operator._num_per_example_loss_terms
    return {
        layer.name: (
            operator._input_covariances[f"module.{layer.name}"],
            operator._gradient_covariances[f"module.{layer.name}"] / count,
        )
        for layer in layers
    }


def largest_gap(factors: fc.Factors, theirs: dict) -> float:
    return max(
        max(gap(a, factors.inputs[name]), gap(g, factors.outputs[name]))
        for name, (a, g) in theirs.items()
    )


def labelled(model: LanguageModel, tokens, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches whose labels are those that we sample: curvlinops' own draws are another's."""
    out = []
    for each in tokens:
        ids, targets, mask = fc.padded(model, [each])
        with torch.no_grad():
            logits = model.module(input_ids=ids, use_cache=False).logits
        out.append((ids, fc.sampled_labels(logits, ids, targets, mask, seed)))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", fc.LABELS)
def test_factors_agree(kind, labels):
    model, tokens = build(kind), texts(7, 7, 7)
    factors = collect(model, tokens, labels=labels, seed=5)
    other = with_linear_layers(model)
    data = labelled(model, tokens, 5) if labels == "sampled" else None
    assert largest_gap(factors, factors_of_curvlinops(other, tokens, data=data)) < ROUNDING[kind]
    # and not by any labels
    wrong = collect(model, tokens, labels="sampled", seed=6)
    assert largest_gap(wrong, factors_of_curvlinops(other, tokens, data=data)) > 0.01


def exact_factors(model: LanguageModel, tokens) -> dict[str, tuple]:
    """A and G through our hooks, with the expectation over each position's labels taken exactly.

    One position and one label at a time: labels are drawn independently, so that products of two
    positions' gradients vanish on average.
    """
    layers = fc.linear_layers(model.module)
    model.module.requires_grad_(False)
    ids, _, mask = fc.padded(model, tokens)
    inputs, outputs = {}, dict.fromkeys((layer.name for layer in layers), 0.0)

    def see(layer, a, g):
        inputs[layer.name] = a[mask].T @ a[mask]
        outputs[layer.name] = outputs[layer.name] + g[mask].T @ g[mask]

    with fc.gradients_seen(layers, see):
        for place in range(ids.shape[1]):
            for label in range(VOCABULARY):
                log_p = model.module(input_ids=ids, use_cache=False).logits.log_softmax(-1)
                here = log_p[:, place, label]
                (-(here.detach() / 2).exp() * here)[mask[:, place]].sum().backward()
    count = int(mask.sum())
    return {name: (inputs[name] / count, outputs[name] / count) for name in inputs}


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_factors_average_to_the_expectation_over_labels(kind):
    # the mean of 40 draws is within 4.5 standard errors of it, 14 layers a model: false alarm about
    # 1e-3 with t_39, and the seeds are fixed
    model, tokens = build(kind), texts(4, 4, 4, 4)
    with torch.no_grad():  # nearly even odds would not tell one label from its neighbour
        model.module.get_output_embeddings().weight.mul_(4)
    draws = [collect(model, tokens, seed=seed) for seed in range(40)]
    gold = collect(model, tokens, labels="gold")
    exact = exact_factors(model, tokens)
    type_two = factors_of_curvlinops(with_linear_layers(model), tokens, fisher_type="type-2")
    far = []
    for layer in gold.layers:
        g = exact[layer.name][1]
        traces = np.array([float(each.outputs[layer.name].trace()) for each in draws])
        error = traces.std(ddof=1) / np.sqrt(len(traces))
        assert abs(traces.mean() - float(g.trace())) < 4.5 * error, layer
        far.append(abs(float((gold.outputs[layer.name] - g).trace())) > 4.5 * error)
        # type-2 goes back from all positions at once, label by label: right only where no position
        # looks at another any more: from the last attention's queries on
        after = layer.block == 1 and layer.role not in ("attn.qkv", "attn.k", "attn.v")
        difference = gap(type_two[layer.name][1], g)
        assert difference < ROUNDING[kind] if after else difference > 0.01, layer
    assert any(far)  # gold labels are not such draws


def test_unequal_texts_are_a_mean_of_means_to_it():
    model, tokens = build("neox"), texts(7, 3)  # 6 and 2 predictions
    factors = collect(model, tokens, labels="gold")
    assert largest_gap(factors, factors_of_curvlinops(model, tokens)) > 0.01
    long, short = (factors_of_curvlinops(model, [each]) for each in tokens)
    weighted = {
        name: tuple(
            (6 * one + 2 * two) / 8 for one, two in zip(long[name], short[name], strict=True)
        )
        for name in long
    }
    assert largest_gap(factors, weighted) < ROUNDING["neox"]


def test_padding_counts_to_it():
    model, tokens = build("neox"), texts(7, 3)
    ids, targets, mask = fc.padded(model, tokens)
    data = [(ids, targets.masked_fill(~mask, -100))]
    theirs = factors_of_curvlinops(model, tokens, data=data)
    factors = collect(model, tokens, labels="gold")
    name = factors.layers[0].name
    assert gap(theirs[name][0], factors.inputs[name]) > 0.01
    # the gradients at padding are 0, but it counts: 12 positions for 8
    assert gap(theirs[name][1] * 12 / 8, factors.outputs[name]) < ROUNDING["neox"]
    # the summed Hessian has no such trouble
    with hs.loss_hessian(model, tokens, reduction="sum", parameters=[name]) as hessian:
        v = np.random.default_rng(0).normal(size=hessian.size)
        parameters = list(hessian.parameters.values())
        operator = asked("HessianLinearOperator", model, parameters, tokens, data=data)
        assert gap(operator @ torch.as_tensor(v), hessian.product(v)) < ROUNDING["neox"]


def test_conv1d_is_refused_by_it_and_a_shared_weight_by_us():
    with pytest.raises(NotImplementedError, match="un-supported layers"):
        factors_of_curvlinops(build("gpt2"), texts(7))
    model, tokens = build("neox"), texts(2)
    blocks = model.module.gpt_neox.layers
    shared = blocks[0].mlp.dense_h_to_4h.weight
    blocks[1].mlp.dense_h_to_4h.weight = shared
    with pytest.raises(InputError, match="share one weight"):
        collect(model, tokens)
    operator = asked("KFACLinearOperator", model, [shared], tokens, fisher_type="empirical")
    # on one prediction K-FAC of a weight used once is the empirical Fisher, g g^T; not so here
    v = torch.randn(shared.numel(), generator=torch.Generator().manual_seed(0)).double()
    g = gold_gradients(model, tokens, [shared])[0]
    assert gap(operator @ v, g * (g @ v)) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_corrected_masses_agree_on_one_prediction_a_text(kind):
    # it takes no more than one label an example
    model, tokens = build(kind), texts(*[2] * 12)
    bases = cv.decompose(collect(model, tokens, labels="gold"))
    by = {
        example: cv.correct_masses(model, bases, tokens, labels="gold", example=example)
        for example in cv.EXAMPLES
    }
    other = with_linear_layers(model)
    ids = torch.as_tensor(np.stack(tokens))
    net, weights = Classes(other), [each.module.weight for each in fc.linear_layers(other.module)]
    net.forward = lambda ids: Classes.forward(net, ids)[..., 0]
    operator = curvlinops.EKFACLinearOperator(
        net,
        torch.nn.CrossEntropyLoss(reduction="sum"),
        weights,
        [(ids[:, :1], ids[:, 1])],
        fisher_type="empirical",
        check_deterministic=False,
    )
    operator.compute_eigenvalue_correction()
    for basis, token, sequence in zip(bases, by["token"], by["sequence"], strict=True):
        # eigenvalues ascend there, and descend here
        (theirs,) = operator._corrected_eigenvalues[f"module.{basis.layer.name}"].values()
        theirs = theirs.flip(0, 1).numpy() / 12
        if not theirs.any():
            assert not token.corrected.any()
            continue
        assert gap(token.corrected, theirs) < ROUNDING[kind], basis.layer
        assert gap(sequence.corrected, theirs) < ROUNDING[kind], basis.layer
        assert gap(basis.masses, theirs) > 0.01  # what is corrected


# Gauss-Newton and Fisher blocks


def gold_gradients(model: LanguageModel, tokens, parameters) -> torch.Tensor:
    """``[token, size]``: the gradient of each predicted token's own loss, by a plain loop."""
    rows = []
    for each in tokens:
        ids = torch.as_tensor(each)[None, :-1]
        model.module.requires_grad_(True)
        log_p = model.module(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        for place, token in enumerate(each[1:]):
            pieces = torch.autograd.grad(-log_p[place, token], parameters, retain_graph=True)
            rows.append(torch.cat([piece.flatten() for piece in pieces]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_kfac_is_the_gauss_newton_block_of_one_prediction(kind):
    model = build(kind)
    for length, same in ((2, True), (3, False)):
        tokens, worst = texts(length), []
        found = exact_factors(model, tokens)
        for layer in fc.linear_layers(model.module):
            a, g = found[layer.name]
            operator = asked("GGNLinearOperator", model, [layer.module.weight], tokens)
            v = torch.as_tensor(np.random.default_rng(0).normal(size=layer.matrix.shape))
            product = (length - 1) * (g @ v @ a)  # theirs is the sum over predictions
            flat = v.T if kind == "gpt2" else v
            theirs = (operator @ flat.flatten()).detach().view_as(flat)
            theirs = theirs.T if kind == "gpt2" else theirs
            if theirs.any():  # one position attends to itself alone: q and k have no curvature
                worst.append(gap(product, theirs))
            else:
                assert product.norm() < 1e-12
        assert max(worst) < ROUNDING[kind] if same else min(worst) > 0.01, worst


@pytest.mark.parametrize("kind", KINDS)
def test_empirical_fisher_blocks(kind):
    model = build(kind)
    for length in (2, 7):
        tokens = texts(length)
        factors = collect(model, tokens, labels="gold")
        for layer in factors.layers:
            rows = gold_gradients(model, tokens, [layer.module.weight])
            operator = asked("EFLinearOperator", model, [layer.module.weight], tokens)
            v = torch.as_tensor(np.random.default_rng(0).normal(size=rows.shape[1]))
            expected = rows.T @ (rows @ v)
            if not expected.any():
                continue
            # a plain loop over tokens and curvlinops agree at any length
            assert gap(operator @ v, expected) < ROUNDING[kind]
            matrix = v.view_as(layer.module.weight)
            matrix = matrix.T if kind == "gpt2" else matrix
            product = (length - 1) * (
                factors.outputs[layer.name] @ matrix @ factors.inputs[layer.name]
            )
            ours = (product.T if kind == "gpt2" else product).flatten()
            # and K-FAC with gold labels is that block on one prediction only
            assert (gap(ours, expected) < ROUNDING[kind]) == (length == 2), layer.name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", fc.LABELS)
@pytest.mark.filterwarnings("ignore:diagonal_fisher")  # gpt2's tied head goes by examples
def test_diagonal_fisher_is_the_diagonal_of_the_empirical_fisher(kind, labels):
    model, tokens = build(kind), texts(4, 4)
    data = labelled(model, tokens, 0) if labels == "sampled" else None
    ours = diagonal_fisher(model, tokens, example="token", labels=labels)
    by_text = diagonal_fisher(model, tokens, example="sequence", labels=labels)
    assert ours.examples == 6
    for name, parameter in model.module.named_parameters():
        if ".1." in name:
            continue  # the other block is like the first
        operator = asked("EFLinearOperator", model, [parameter], tokens, data=data)
        theirs = (operator @ torch.eye(parameter.numel()).double()).diagonal()
        assert gap(ours.sums[name].flatten(), theirs) < ROUNDING[kind], name
        # a text's gradient is summed over its tokens before it is squared: another number
        assert gap(by_text.sums[name].flatten(), theirs) > 0.01, name
