"""The curvature: identities that a right implementation satisfies, and controls that must fail."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from workbench import curvature as cv
from workbench import plots
from workbench.models import LanguageModel
from workbench.probes import curvature as probe
from workbench.stats.frontier import at_price, matched_frontier
from workbench.table import InputError, rows, validate

VOCABULARY = 29
WIDTH = 8
SMALL = {"max_position_embeddings": 32, "vocab_size": VOCABULARY, "bos_token_id": 0}


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    bare = Tokenizer(models.WordLevel(words, unk_token="w0"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=bare)


def build(kind: str, *, seed: int = 0, bos: int | None = None) -> LanguageModel:
    """A tiny model in float64 with weights large enough that every layer matters."""
    torch.manual_seed(seed)
    size = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "neox":
        module = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, **size, intermediate_size=12))
    elif kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=2, n_inner=12
        )
        module = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(**SMALL, **size, num_key_value_heads=1, intermediate_size=12)
        module = LlamaForCausalLM(config)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return LanguageModel(module=module, tokenizer=tokenizer(), run=kind, bos=bos)


def texts(*lengths: int, seed: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, size=n) for n in lengths]


def collect(model: LanguageModel, tokens, **options) -> cv.Factors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few tokens; tested on its own
        return cv.collect_factors(model, tokens, **({"dtype": "float64"} | options))


def random_basis(out: int = 6, width: int = 5, *, seed: int = 0, rotate: bool = False) -> cv.Basis:
    """A basis of one torch layer with random factors; the layer is a plain float64 Linear."""
    torch.manual_seed(seed)
    module = torch.nn.Linear(width, out, bias=False).double()
    layer = cv.Layer("layer", 0, "mlp.up", module)
    a, g = torch.randn(40, width).double(), torch.randn(40, out).double()
    return cv.decompose(
        cv.Factors((layer,), {"layer": a.T @ a / 40}, {"layer": g.T @ g / 40}, 40, "gold", 0)
    )[0]


KINDS = ("neox", "gpt2", "llama")


# Layers by role


def test_roles_of_each_architecture():
    fused = {"attn.qkv", "attn.o", "mlp.up", "mlp.down"}
    split = {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.gate", "mlp.down"}
    for kind, roles in (("neox", fused), ("gpt2", fused), ("llama", split)):
        layers = cv.linear_layers(build(kind).module)
        assert {layer.role for layer in layers} == roles
        assert [layer.block for layer in layers] == sorted(layer.block for layer in layers)
        assert len(layers) == 2 * len(roles)
        shapes = {layer.role: tuple(layer.matrix.shape) for layer in layers}
        assert shapes["mlp.up"] == (12, WIDTH) and shapes["mlp.down"] == (WIDTH, 12)


@pytest.mark.parametrize("kind", ["Olmo2", "Qwen2", "Qwen3", "Gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_architectures_pass_the_self_check(kind, dtype):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, kind + ("TextConfig" if kind == "Gemma3" else "Config"))(
        **SMALL,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        eos_token_id=0,
        pad_token_id=0,
    )
    module = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    model = LanguageModel(module=module, tokenizer=tokenizer(), run=kind)
    factors = collect(model, texts(20, 7), dtype="float32")
    roles = {layer.role for layer in factors.layers}
    assert roles == {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.gate", "mlp.down"}
    assert len({id(matrix) for matrix in factors.inputs.values()}) == 2 * 4
    before = model.weights_hash()
    with cv.edited(cv.decompose(factors), rho=0.9) as edit:
        assert edit.predicted_damage > 0 and model.weights_hash() != before
    assert model.weights_hash() == before


def test_roles_and_blocks_that_are_not_there_are_refused():
    module = build("neox").module
    with pytest.raises(InputError) as error:
        cv.linear_layers(module, roles=["mlp.gate"])
    assert str(error.value) == (
        "linear_layers: this model has no role mlp.gate; it has attn.o, attn.qkv, mlp.down, mlp.up"
    )
    with pytest.raises(InputError) as error:
        cv.linear_layers(module, blocks=[2])
    assert str(error.value) == "linear_layers: this model has no block 2; it has 0, 1"
    with pytest.raises(InputError, match="no roles or no blocks were asked for"):
        cv.linear_layers(module, roles=[])
    with pytest.raises(InputError, match="Linear has no linear layers under names known here"):
        cv.linear_layers(torch.nn.Linear(2, 2))


def test_shared_weights_are_refused():
    module = build("neox").module
    blocks = module.gpt_neox.layers
    blocks[1].mlp.dense_h_to_4h.weight = blocks[0].mlp.dense_h_to_4h.weight
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.dense_h_to_4h and .*layers\.0.* share"):
        cv.linear_layers(module, roles=["attn.o"])


# Factors


def slow_factors(model: LanguageModel, tokens, *, name: str, labels: str = "gold", seed: int = 0):
    """One text at a time, one position at a time: a second route that shares no code but labels."""
    module = model.module.get_submodule(name)
    caught: dict = {}
    handle = module.register_forward_hook(
        lambda m, inputs, output: caught.update(a=inputs[0], out=output)
    )
    a_sum, g_sum, count = 0.0, 0.0, 0
    model.module.requires_grad_(True)
    for text in tokens:
        before = 0 if model.bos is None else 1
        ids = torch.tensor(([model.bos] if before else []) + list(text))[None]
        logits = model.module(input_ids=ids, use_cache=False).logits[0]
        target = torch.tensor(text[1:])
        if labels == "sampled":
            draws = cv.keyed(seed, text).random(len(text) - 1)
            cumulative = logits[before:-1].detach().softmax(-1).cumsum(-1).numpy()
            target = torch.tensor(
                [(c <= u * c[-1]).sum() for c, u in zip(cumulative, draws, strict=True)]
            )
        loss = -logits[before:-1].log_softmax(-1)[range(len(target)), target].sum()
        gradient = torch.autograd.grad(loss, caught["out"])[0]
        for position in range(before, before + len(text) - 1):
            a, g = caught["a"][0, position].detach(), gradient[0, position]
            a_sum, g_sum, count = a_sum + a[:, None] * a, g_sum + g[:, None] * g, count + 1
    handle.remove()
    model.module.requires_grad_(False)
    return a_sum / count, g_sum / count, count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", cv.LABELS)
@pytest.mark.parametrize("bos", [None, 1])
def test_factors_agree_with_one_position_at_a_time(kind, labels, bos):
    model, tokens = build(kind, bos=bos), texts(7, 3, 12, 2)
    factors = collect(model, tokens, labels=labels, seed=5)
    assert factors.tokens == 6 + 2 + 11 + 1
    for layer in factors.layers:
        a, g, count = slow_factors(model, tokens, name=layer.name, labels=labels, seed=5)
        assert count == factors.tokens
        # attention's softmax is float32 in places; the rest is float64
        torch.testing.assert_close(factors.inputs[layer.name], a, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(factors.outputs[layer.name], g, rtol=1e-6, atol=1e-9)


def test_float32_sums_agree_with_float64():
    model, tokens = build("neox"), texts(20, 9)
    one, two = collect(model, tokens, dtype="float32"), collect(model, tokens)
    for name, matrix in one.inputs.items():
        assert matrix.dtype == torch.float32
        torch.testing.assert_close(matrix.double(), two.inputs[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels", cv.LABELS)
def test_batches_and_order_change_nothing(monkeypatch, labels):
    model, tokens = build("neox"), texts(9, 4, 4, 13, 2, 6)
    whole = collect(model, tokens, labels=labels)
    monkeypatch.setattr(cv, "LOGITS_PER_BATCH", {"cpu": 10 * VOCABULARY})  # unequal batches
    split = collect(model, [tokens[i] for i in (3, 0, 5, 1, 4, 2)], labels=labels)
    assert whole.tokens == split.tokens
    for name in whole.outputs:
        torch.testing.assert_close(whole.inputs[name], split.inputs[name], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(whole.outputs[name], split.outputs[name], rtol=1e-7, atol=1e-9)


def test_sampled_labels_follow_the_distribution_and_the_key():
    # 4000 positions with p = (.7, .2, .1): each share within 4 standard errors (false alarm 2e-4)
    p = np.array([0.7, 0.2, 0.1])
    logits = torch.log(torch.tensor(p)).expand(1, 4000, 3)
    ids = torch.zeros(1, 4000, dtype=torch.long)
    mask = torch.ones(1, 4000, dtype=torch.bool)
    labels = cv.sampled_labels(logits, ids, ids, mask, 0)
    share = np.bincount(labels[0].numpy(), minlength=3) / 4000
    assert (np.abs(share - p) < 4 * np.sqrt(p * (1 - p) / 4000)).all()
    again = cv.sampled_labels(logits, ids, ids, mask, 0)
    other_seed = cv.sampled_labels(logits, ids, ids, mask, 1)
    other_text = cv.sampled_labels(logits, ids + 1, ids, mask, 0)
    assert torch.equal(labels, again)
    assert not torch.equal(labels, other_seed) and not torch.equal(labels, other_text)
    # a certain token is always drawn, also the first and the last of the vocabulary
    certain = torch.full((1, 4000, 3), -1e9)
    for token in (0, 2):
        certain[:] = -1e9
        certain[..., token] = 0.0
        assert (cv.sampled_labels(certain, ids, ids, mask, 0) == token).all()


def test_gate_up_and_qkv_share_one_a():
    factors = collect(build("llama"), texts(8, 8))
    by_role = {(layer.block, layer.role): layer.name for layer in factors.layers}
    shared = [{"mlp.gate", "mlp.up"}, {"attn.q", "attn.k", "attn.v"}]
    for group in shared:
        assert len({id(factors.inputs[by_role[0, role]]) for role in group}) == 1
    assert len({id(matrix) for matrix in factors.inputs.values()}) == 2 * 4


def test_model_is_left_as_it_was_and_forms_no_weight_gradients():
    model = build("neox")
    model.module.requires_grad_(True).train()
    collect(model, texts(8))
    assert model.module.training
    assert all(p.requires_grad and p.grad is None for p in model.module.parameters())
    hooks = [m for m in model.module.modules() if m._forward_hooks]
    assert hooks == []


def test_the_graph_starts_at_the_lowest_tracked_layer():
    model, needed = build("neox"), {}
    blocks = model.module.gpt_neox.layers
    handles = [
        layer.register_forward_hook(
            lambda m, i, o, n=number: needed.update({n: (o[0] if isinstance(o, tuple) else o)})
        )
        for number, layer in enumerate(blocks)
    ]
    collect(model, texts(8), blocks=[1])
    for handle in handles:
        handle.remove()
    assert not needed[0].requires_grad and needed[1].requires_grad


def test_checkpointing_counts_once():
    model, tokens = build("llama"), texts(8, 5)
    plain = collect(model, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the new name is not in every 5.x
        model.module.gradient_checkpointing_enable({"use_reentrant": False})
    again = collect(model, tokens)
    for name in plain.outputs:
        torch.testing.assert_close(plain.inputs[name], again.inputs[name])
        torch.testing.assert_close(plain.outputs[name], again.outputs[name])


@pytest.mark.parametrize("kind", KINDS)
def test_the_self_check_fails_on_a_layer_used_twice(kind):
    model = build(kind)
    module = cv.linear_layers(model.module, roles=["mlp.up"])[0].module
    plain = module.forward
    module.forward = lambda x: plain(x) + module.weight.sum()
    with pytest.raises(RuntimeError, match="sum g a.T of .* misses the weight's gradient"):
        collect(model, texts(8))


def test_factors_that_are_not_finite_name_layer_and_batch():
    model = build("neox")
    check = cv.check_gradients(model, cv.linear_layers(model.module), texts(4))
    sums = cv.FactorSums(check, torch.float64)
    layers = cv.linear_layers(model.module, blocks=[1], roles=["mlp.up"])
    sums.leader = {layers[0].name: layers[0].name}
    sums.begin(torch.ones(1, 2, dtype=torch.bool))
    sums.see(layers[0], torch.ones(1, 2, WIDTH), torch.full((1, 2, 12), torch.nan))
    with pytest.raises(InputError) as error:
        sums.refuse_undefined(4)
    assert str(error.value) == (
        "collect_factors: the gradient of gpt_neox.layers.1.mlp.dense_h_to_4h is not finite in "
        "batch 4; the weights or the texts of that batch hold NaN or Inf, or its dtype overflows"
    )
    with torch.no_grad():
        layers[0].module.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="is not finite in batch 0"):
        collect(model, texts(8))


def test_unusable_texts_and_arguments_are_refused():
    model = build("neox")
    for arguments, message in (
        ({"tokens": []}, "collect_factors: got no texts, needs at least one of two tokens"),
        (
            {"tokens": texts(4, 1)},
            "collect_factors: 1 of 2 texts are shorter than 2 or longer than the context of 32 "
            "tokens (first: number 1, 1 tokens); drop or cut them",
        ),
        (
            {"tokens": texts(4), "labels": "true"},
            "collect_factors: labels 'true'; choose from sampled, gold",
        ),
        (
            {"tokens": texts(4), "dtype": "float16"},
            "collect_factors: dtype 'float16'; choose from float32, float64",
        ),
    ):
        tokens = arguments.pop("tokens")
        with pytest.raises(InputError) as error:
            cv.collect_factors(model, tokens, **arguments)
        assert str(error.value) == message


def test_few_tokens_are_said_with_their_numbers():
    # the widest factor is the fused query, key and value: 3 * 8 = 24 dimensions
    with pytest.warns(UserWarning, match=r"10 tokens for factors of up to 24 dim.*\(240\)"):
        cv.collect_factors(build("neox"), texts(11))


# The Kronecker product against the Gauss-Newton matrix


def ggn_block(logits_of, weight: torch.Tensor, samples: int) -> torch.Tensor:
    """Mean over samples of ``J^T (diag p - p p^T) J`` for one weight, by full Jacobians."""
    jacobian = torch.autograd.functional.jacobian(logits_of, weight)
    total = 0.0
    with torch.no_grad():
        p = logits_of(weight).softmax(-1)
    for sample in range(samples):
        j = jacobian[sample].reshape(p.shape[1], -1)
        total = total + j.T @ (torch.diag(p[sample]) - p[sample, :, None] * p[sample]) @ j
    return total / samples


def exact_kronecker(module, layer, inputs, logits_of_module) -> torch.Tensor:
    """``A (x) G`` with the expectation over labels taken exactly, through the package's hooks."""
    sums = cv.FactorSums({layer.name: layer.name}, torch.float64)
    logits = logits_of_module(inputs)
    samples, classes = logits.shape
    with cv.gradients_seen([layer], sums.see):
        for label in range(classes):
            log_p = logits_of_module(inputs).log_softmax(-1)
            sums.begin(torch.ones(samples, dtype=torch.bool))
            weight = log_p.detach().exp()[:, label].sqrt()
            (-(weight * log_p[:, label])).sum().backward()
    # every class was a pass of its own: A and the count hold each sample `classes` times
    a = sums.inputs[layer.name] / sums.count
    g = sums.outputs[layer.name] / samples
    return torch.kron(g, a)  # vec(W) by rows: entry (out, in)


@pytest.mark.parametrize("samples", [1, 7])
def test_kfac_is_the_gauss_newton_block_for_one_sample_only(samples):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
    ).double()
    x = torch.randn(samples, 3).double()
    layer = cv.Layer("0", 0, "mlp.up", net[0])
    got = exact_kronecker(net, layer, x, net)

    def logits_of(weight):
        return net[2](torch.tanh(x @ weight.T + net[0].bias))

    want = ggn_block(logits_of, net[0].weight.detach(), samples)
    gap = float((got - want).norm() / want.norm())
    if samples == 1:
        assert gap < 1e-14
    else:
        assert gap > 0.01  # otherwise the test could not tell one from the other


def test_kfac_is_exact_for_a_deep_linear_net_with_squared_loss():
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 5, bias=False)
    ).double()
    x = torch.randn(9, 3).double()
    layer = cv.Layer("0", 0, "mlp.up", net[0])
    sums = cv.FactorSums({"0": "0"}, torch.float64)
    with cv.gradients_seen([layer], sums.see):
        for output in range(5):  # the squared loss has the unit matrix as its output Hessian
            sums.begin(torch.ones(9, dtype=torch.bool))
            net(x)[:, output].sum().backward()
    got = torch.kron(sums.outputs["0"] / 9, sums.inputs["0"] / sums.count)
    jacobian = torch.autograd.functional.jacobian(
        lambda weight: net[1](x @ weight.T), net[0].weight.detach()
    ).reshape(9 * 5, -1)
    torch.testing.assert_close(got, jacobian.T @ jacobian / 9, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, 7])
def test_kfac_of_a_real_architecture_on_one_position(kind, length):
    # a text of two tokens has one prediction; there K-FAC is the Gauss-Newton block itself, and
    # with six positions it is not
    model = build(kind)
    layer = cv.linear_layers(model.module, roles=["mlp.down"], blocks=[0])[0]
    ids = torch.tensor(texts(length)[0])[None, :-1]
    model.module.requires_grad_(False)

    def logits_of_ids(given):
        return model.module(input_ids=given, use_cache=False).logits[0]

    sums = cv.FactorSums({layer.name: layer.name}, torch.float64)
    with cv.gradients_seen([layer], sums.see):
        for label in range(VOCABULARY):
            log_p = logits_of_ids(ids).log_softmax(-1)
            sums.begin(torch.ones(1, length - 1, dtype=torch.bool))
            weight = log_p.detach().exp()[:, label].sqrt()
            (-(weight * log_p[:, label])).sum().backward()
    a, g = sums.inputs[layer.name] / sums.count, sums.outputs[layer.name] / (length - 1)
    name = layer.name + ".weight"

    def logits_of(matrix):
        weight = matrix.T if kind == "gpt2" else matrix
        return torch.func.functional_call(
            model.module, {name: weight}, kwargs={"input_ids": ids, "use_cache": False}
        ).logits[0]

    want = ggn_block(logits_of, layer.matrix.detach().clone(), length - 1)
    gap = float((torch.kron(g, a) - want).norm() / want.norm())
    assert gap < 1e-6 if length == 2 else gap > 0.01


def test_conv1d_is_the_transpose():
    # the same numbers as [in, out] in a Conv1D and as [out, in] in a Linear: same factors, edits
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(2)
    conv, linear = Conv1D(4, 3).double(), torch.nn.Linear(3, 4).double()
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    x, edits = torch.randn(11, 3).double(), []
    for module in (conv, linear):
        layer = cv.Layer("l", 0, "mlp.up", module)
        sums = cv.FactorSums({"l": "l"}, torch.float64)
        sums.begin(torch.ones(11, dtype=torch.bool))
        with cv.gradients_seen([layer], sums.see):
            (module(x) ** 3).sum().backward()
        bases = cv.decompose(cv.Factors((layer,), sums.inputs, sums.outputs, 11, "gold", 0))
        with cv.edited(bases, rho=0.6) as edit:
            edits.append((layer.matrix.detach().clone(), edit.kept, edit.predicted_damage))
        assert 0 < edit.kept < 1
    torch.testing.assert_close(edits[0][0], edits[1][0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(edits[0][1:], edits[1][1:], rtol=1e-12)


# Eigenbases


def test_masses_are_rayleigh_quotients_and_sum_to_the_traces():
    basis = random_basis()
    a = basis.input_vectors * torch.from_numpy(basis.input_values) @ basis.input_vectors.T
    g = basis.output_vectors * torch.from_numpy(basis.output_values) @ basis.output_vectors.T
    np.testing.assert_allclose(basis.masses.sum(), float(a.trace() * g.trace()), rtol=1e-13)
    curvature = torch.kron(g, a)
    for j in range(6):
        for i in range(5):
            u, v = basis.output_vectors[:, j], basis.input_vectors[:, i]
            direction = torch.outer(u, v).flatten()
            np.testing.assert_allclose(
                float(direction @ curvature @ direction), basis.masses[j, i], rtol=1e-11
            )
            # and it is an eigenvector: the quotient alone would not say so
            torch.testing.assert_close(
                curvature @ direction, basis.masses[j, i] * direction, rtol=1e-9, atol=1e-12
            )


def test_spectrum_clamps_and_reports():
    # eigenvalues 3, 1, -1: a quarter... |-1| / (3 + 1 + 1) = .2 of the absolute mass is clamped
    values, vectors, clamped = cv.spectrum(torch.diag(torch.tensor([1.0, 3.0, -1.0])), "it")
    np.testing.assert_allclose(values, [3.0, 1.0, 0.0])
    assert clamped == pytest.approx(0.2)
    np.testing.assert_allclose(vectors.abs().numpy(), [[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    with pytest.raises(InputError) as error:
        cv.spectrum(torch.tensor([[torch.nan]]), "the input factor of x")
    assert str(error.value) == (
        "decompose: the input factor of x holds NaN or Inf; collect the factors again"
    )


# Selection


def test_staircase_by_hand():
    # masses of lambda (3, 1) and mu (2, 1): 6, 3 / 2, 1; total 12. Half is the 6 alone; 9 is .75
    # (6 + 3); 11 is .9166; a share of .76 needs 6 + 3 + 2.
    lam, mu = np.array([3.0, 1.0]), np.array([2.0, 1.0])
    for rho, steps in ((0.5, (1, 0)), (0.75, (1, 1)), (0.76, (2, 1)), (0.92, (2, 2)), (1, (2, 2))):
        assert tuple(cv.staircase(lam, mu, rho)) == steps
    # lambda = mu = (2, 1): masses 4, 2, 2, 1. A share of .5 needs 4 + 2 = 6 > 4.5: both 2s go in.
    assert tuple(cv.staircase(np.array([2.0, 1.0]), np.array([2.0, 1.0]), 0.5)) == (2, 1)


def brute_force(masses: np.ndarray, rho: float) -> np.ndarray:
    """Add masses from the largest down until the share is reached, then those tied with the last."""
    order = np.argsort(-masses, axis=None, kind="stable")
    held, last = 0.0, None
    for place in order:
        if held >= rho * masses.sum():
            break
        last = masses.flat[place]
        held += last
    return masses >= last * (1 - 1e-12)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=7),
    st.lists(st.integers(0, 6), min_size=1, max_size=7),
    st.sampled_from([0.013, 0.1, 0.37, 0.5, 0.83, 0.99]),
)
@settings(max_examples=200, deadline=None)
def test_staircase_is_the_smallest_set_ties_included(lam, mu, rho):
    lam, mu = np.sort(np.array(lam, float))[::-1], np.sort(np.array(mu, float))[::-1]
    if lam.sum() * mu.sum() == 0:
        with pytest.raises(InputError, match="hold no mass"):
            cv.staircase(lam, mu, rho)
        return
    mask = cv.stairs_mask(cv.staircase(lam, mu, rho), len(lam))
    masses = mu[:, None] * lam
    # thirds and sevenths of a sum of small integers: rho * total is never within rounding of a
    # partial sum unless equal to it, and then both routes take it
    np.testing.assert_array_equal(mask, brute_force(masses, rho - 1e-12))
    np.testing.assert_array_equal(mask, cv.largest(masses, rho - 1e-12))


def test_staircase_on_a_decaying_spectrum_is_smallest_and_nested():
    rng = np.random.default_rng(0)
    lam = np.sort(np.exp(rng.normal(0, 3, 60)))[::-1]
    mu = np.sort(np.exp(rng.normal(0, 3, 80)))[::-1]
    masses, inner = mu[:, None] * lam, None
    for rho in (0.05, 0.5, 0.9, 0.99, 0.9999, 1):
        mask = cv.stairs_mask(cv.staircase(lam, mu, rho), 60)
        held = masses[mask].sum() / masses.sum()
        assert held >= rho - 1e-12
        if rho < 1:
            assert held - masses[mask].min() / masses.sum() < rho  # one fewer would not do
            np.testing.assert_array_equal(mask, brute_force(masses, rho))
        assert inner is None or (mask | inner == mask).all()
        inner = mask


@pytest.mark.parametrize("rho", [0.0, -0.1, 1.5, float("nan")])
def test_shares_outside_are_refused(rho):
    basis = random_basis()
    for call in (
        lambda: cv.staircase(basis.input_values, basis.output_values, rho),
        lambda: cv.largest(basis.masses, rho),
        lambda: cv.edited_coefficients(basis, method="svd", rho=rho),
        lambda: cv.edited([basis], rho=rho).__enter__(),
    ):
        with pytest.raises(InputError, match=f"rho is {rho}, the share that is kept; needs 0 <"):
            call()


def test_largest_by_hand():
    # 5 + 3 of 10 hold .8; a share of .81 needs one of the two 1s, and takes both
    scores = np.array([[5.0, 1.0], [1.0, 3.0]])
    np.testing.assert_array_equal(cv.largest(scores, 0.8), [[True, False], [False, True]])
    assert cv.largest(scores, 0.81).all()
    with pytest.raises(InputError, match="all scores are 0"):
        cv.largest(np.zeros((2, 2)), 0.5)


# Edits


def kronecker_edit(basis: cv.Basis, method: str, rho: float) -> tuple[torch.Tensor, torch.Tensor]:
    coefficients, _ = cv.edited_coefficients(basis, method=method, rho=rho)
    return basis.matrix(coefficients), basis.matrix(basis.coefficients - coefficients)


@pytest.mark.parametrize("method", ["kfac", "saliency", "random"])
def test_kept_and_removed_are_orthogonal_and_sum_to_the_weight(method):
    basis = random_basis()
    weight = basis.layer.matrix.detach()
    kept, removed = kronecker_edit(basis, method, 0.7)
    assert float(kept.norm()) > 0.01 and float(removed.norm()) > 0.01
    torch.testing.assert_close(kept + removed, weight, rtol=1e-13, atol=1e-14)
    assert abs(float((kept * removed).sum())) < 1e-14
    # also in the metric of the curvature
    a = basis.input_vectors * torch.from_numpy(basis.input_values) @ basis.input_vectors.T
    g = basis.output_vectors * torch.from_numpy(basis.output_values) @ basis.output_vectors.T
    assert abs(float((removed.T @ g @ kept @ a).trace())) < 1e-13


def test_idempotent():
    basis = random_basis()
    once, _ = cv.edited_coefficients(basis, method="kfac", rho=0.7)
    with torch.no_grad():
        basis.layer.module.weight.copy_(basis.matrix(once))
    a = basis.input_vectors * torch.from_numpy(basis.input_values) @ basis.input_vectors.T
    g = basis.output_vectors * torch.from_numpy(basis.output_values) @ basis.output_vectors.T
    again = cv.decompose(cv.Factors((basis.layer,), {"layer": a}, {"layer": g}, 1, "gold", 0))[0]
    twice, _ = cv.edited_coefficients(again, method="kfac", rho=0.7)
    torch.testing.assert_close(again.matrix(twice), basis.matrix(once), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("method", cv.METHODS)
def test_a_share_of_one_is_the_identity_to_the_bit(method):
    basis = random_basis()
    weight = basis.layer.matrix.detach().clone()
    coefficients, share = cv.edited_coefficients(basis, method=method, rho=1)
    assert share == 1
    torch.testing.assert_close(basis.matrix(coefficients), weight, rtol=1e-13, atol=1e-14)
    with cv.edited([basis], method=method, rho=1) as edit:
        assert torch.equal(basis.layer.matrix, weight)
    assert (edit.kept, edit.predicted_damage) == (1.0, 0.0)


def test_predicted_damage_three_ways():
    basis = random_basis()
    coefficients, _ = cv.edited_coefficients(basis, method="kfac", rho=0.7)
    mask = cv.component_mask(basis, method="kfac", rho=0.7)
    got = cv.predicted_damage(basis, coefficients)
    by_sum = 0.5 * (basis.coefficients.numpy() ** 2 * basis.masses)[~mask].sum()
    removed = basis.matrix(basis.coefficients - coefficients)
    a = basis.input_vectors * torch.from_numpy(basis.input_values) @ basis.input_vectors.T
    g = basis.output_vectors * torch.from_numpy(basis.output_values) @ basis.output_vectors.T
    by_trace = 0.5 * float((removed.T @ g @ removed @ a).trace())
    flat = removed.flatten()
    by_curvature = 0.5 * float(flat @ torch.kron(g, a) @ flat)
    assert got > 1e-3
    np.testing.assert_allclose([by_sum, by_trace, by_curvature], got, rtol=1e-11)


def test_saliency_does_the_least_damage_for_its_size():
    basis, rho = random_basis(), 0.9
    mask = cv.component_mask(basis, method="saliency", rho=rho)
    damages = np.sort(0.5 * (basis.coefficients.numpy() ** 2 * basis.masses), axis=None)
    coefficients, _ = cv.edited_coefficients(basis, method="saliency", rho=rho)
    got = cv.predicted_damage(basis, coefficients)
    removed = int((~mask).sum())
    # no other set of that many components costs less, and what is left holds the share asked for
    np.testing.assert_allclose(got, damages[:removed].sum(), rtol=1e-12)
    assert got <= (1 - rho) * damages.sum() < damages[: removed + 1].sum()
    by_mass, _ = cv.edited_coefficients(basis, method="kfac", rho=rho)
    assert not torch.equal(by_mass, coefficients)


def test_predicted_damage_is_the_rise_of_the_loss_where_kfac_is_exact():
    # a linear layer under a squared loss with one input: the loss is quadratic and K-FAC exact, so
    # at a minimum the predicted damage is the rise itself
    torch.manual_seed(4)
    module = torch.nn.Linear(3, 2, bias=False).double()
    x = torch.randn(1, 3).double()
    target = module(x).detach()
    layer = cv.Layer("l", 0, "mlp.up", module)
    sums = cv.FactorSums({"l": "l"}, torch.float64)
    with cv.gradients_seen([layer], sums.see):
        for output in range(2):
            sums.begin(torch.ones(1, dtype=torch.bool))
            module(x)[:, output].sum().backward()
    a, g = sums.inputs["l"] / sums.count, sums.outputs["l"]
    basis = cv.decompose(cv.Factors((layer,), {"l": a}, {"l": g}, 1, "gold", 0))[0]
    with cv.edited([basis], method="magnitude", rho=0.5) as edit:
        rise = 0.5 * float(((module(x) - target) ** 2).sum().detach())
    assert rise > 1e-3
    np.testing.assert_allclose(edit.predicted_damage, rise, rtol=1e-12)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_scaling_and_rotation_change_nothing(scale_a, scale_g, seed):
    basis = random_basis(seed=seed)
    a = basis.input_vectors * torch.from_numpy(basis.input_values) @ basis.input_vectors.T
    g = basis.output_vectors * torch.from_numpy(basis.output_values) @ basis.output_vectors.T
    kept, _ = kronecker_edit(basis, "kfac", 0.8)
    layer = basis.layer
    scaled = cv.decompose(
        cv.Factors((layer,), {"layer": a * scale_a}, {"layer": g * scale_g}, 1, "gold", 0)
    )[0]
    torch.testing.assert_close(kronecker_edit(scaled, "kfac", 0.8)[0], kept, rtol=1e-9, atol=1e-12)
    # rotate inputs by P and outputs by Q: A -> P A P^T, G -> Q G Q^T, W -> Q W P^T
    p = torch.linalg.qr(torch.randn(5, 5).double()).Q
    q = torch.linalg.qr(torch.randn(6, 6).double()).Q
    weight = layer.matrix.detach().clone()
    with torch.no_grad():
        layer.matrix.copy_(q @ weight @ p.T)
    turned = cv.decompose(
        cv.Factors((layer,), {"layer": p @ a @ p.T}, {"layer": q @ g @ q.T}, 1, "gold", 0)
    )[0]
    got = q.T @ kronecker_edit(turned, "kfac", 0.8)[0] @ p
    torch.testing.assert_close(got, kept, rtol=1e-9, atol=1e-12)


def test_baselines_by_hand():
    # eye factors, so the eigenbases are permutations and signs: edits are those of W itself
    module = torch.nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, 0.0], [1.0, -2.0]]))
    layer, eye = cv.Layer("l", 0, "mlp.up", module), torch.eye(2).double()
    basis = cv.decompose(cv.Factors((layer,), {"l": eye}, {"l": eye}, 1, "gold", 0))[0]
    coefficients, share = cv.edited_coefficients(basis, method="magnitude", rho=0.5)
    torch.testing.assert_close(
        basis.matrix(coefficients), torch.tensor([[3.0, 0.0], [0.0, -2.0]]).double()
    )
    assert share == 0.5
    coefficients, share = cv.edited_coefficients(basis, method="svd", rho=0.5)
    left, values, right = np.linalg.svd(np.array([[3.0, 0.0], [1.0, -2.0]]))
    np.testing.assert_allclose(
        basis.matrix(coefficients).numpy(), values[0] * np.outer(left[:, 0], right[0]), atol=1e-12
    )
    assert share == 0.5
    with pytest.raises(InputError) as error:
        cv.edited_coefficients(basis, method="prune", rho=0.5)
    assert str(error.value) == (
        "edited_coefficients: method 'prune'; choose from kfac, saliency, svd, magnitude, random"
    )


def test_svd_is_the_best_of_its_rank_in_any_basis():
    basis = random_basis()
    coefficients, share = cv.edited_coefficients(basis, method="svd", rho=0.6)
    left, values, right = np.linalg.svd(basis.layer.matrix.detach().numpy(), full_matrices=False)
    np.testing.assert_allclose(
        basis.matrix(coefficients).numpy(), (left[:, :3] * values[:3]) @ right[:3], atol=1e-12
    )
    assert share == 3 / 5


def test_random_masks_are_keyed_and_nested():
    basis = random_basis(40, 50)
    masks = [cv.component_mask(basis, method="random", rho=r, seed=1) for r in (0.3, 0.6)]
    assert (masks[0] <= masks[1]).all()
    # 2000 components at .3: 4 standard errors are .041
    assert abs(masks[0].mean() - 0.3) < 0.041
    other = cv.component_mask(basis, method="random", rho=0.3, seed=2)
    assert not np.array_equal(masks[0], other)


def test_weights_come_back_even_after_an_exception():
    model = build("gpt2")
    bases = cv.decompose(collect(model, texts(20, 20)))
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    with pytest.raises(ZeroDivisionError), cv.edited(bases, rho=0.9):
        assert not torch.equal(
            bases[0].layer.module.weight, before[bases[0].layer.name + ".weight"]
        )
        raise ZeroDivisionError
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_other_weights_than_were_decomposed_are_refused():
    model = build("neox")
    bases = cv.decompose(collect(model, texts(20, 20)))
    message = r"edited: .*query_key_value holds other weights than were decomposed"
    with (
        cv.edited(bases, rho=0.9),
        pytest.raises(InputError, match=message),
        cv.edited(bases, rho=0.8),
    ):
        pass
    with torch.no_grad():
        bases[0].layer.module.weight.add_(1e-9)
    with pytest.raises(InputError, match=message), cv.edited(bases, rho=0.9):
        pass


# The probe


def items_of(tokens: list[np.ndarray], group: list[str]) -> pd.DataFrame:
    text = [" ".join(f"w{i}" for i in each) for each in tokens]
    return pd.DataFrame({"item": [f"i{k}" for k in range(len(text))], "text": text, "group": group})


def recited(model: LanguageModel, n: int, prefix: int, suffix: int) -> list[np.ndarray]:
    """Texts that the model recites: random prompts with its own greedy continuation."""
    prompts = np.stack(texts(*[prefix] * n, seed=8))
    return list(np.concatenate([prompts, model.generate(prompts, suffix)], axis=1))


def asked(kind: str = "neox", **options) -> tuple[LanguageModel, pd.DataFrame]:
    model = build(kind)
    tokens = recited(model, 6, 5, 6) + texts(*[11] * 5, seed=9)
    given = {
        "texts": items_of(texts(*[30] * 12), ["x"] * 12)["text"].tolist(),
        "held_out": items_of(texts(9, 14, 30, seed=4), ["x"] * 3)["text"].tolist(),
        "rho": {"kfac": (0.9, 0.5), "svd": (0.5,)},
        "methods": ("kfac", "svd"),
        "prefix": 5,
        "suffix": 6,
    } | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        table = probe.probe_curvature(
            model, items_of(tokens, ["seen"] * 6 + ["unseen"] * 5), **given
        )
    return model, table


@pytest.mark.parametrize("kind", KINDS)
def test_probe_gives_a_valid_table_and_the_model_back(kind):
    model, table = asked(kind)
    fresh = build(kind)
    assert model.weights_hash() == fresh.weights_hash()
    validate(table)
    pooled = table[(table["item"] == "all") & (table["metric"] == "recitation_strict")]
    assert set(zip(pooled["method"], pooled["rho"], strict=True)) == {
        ("none", 1.0), ("kfac", 0.9), ("kfac", 0.5), ("svd", 0.5)
    }  # fmt: skip
    unedited = table[(table["method"] == "none") & (table["item"] == "all")]
    value = unedited.set_index("metric")["value"]
    assert value["recitation_strict"] == value["recitation_loose"] == 1
    assert value["edit_distance"] == value["predicted_damage"] == 0
    layers = len({basis for basis in table.attrs["passport"]["layers"]})
    assert (table["metric"] == "clamped").sum() == layers
    ratios = table[table["metric"] == "band_ratio"]
    # gate and up, and q, k and v, read one tensor each
    assert len(ratios) == 4 * 2 * 4
    energy = table[table["metric"] == "band_energy"]
    sums = energy.groupby(["group", "block", "role"], observed=True)["value"].sum()
    np.testing.assert_allclose(sums, 1.0, rtol=1e-9)


def test_perplexity_is_token_weighted_by_hand():
    model, table = asked()
    held = texts(9, 14, 30, seed=4)
    nats, count = 0.0, 0
    for text in held:
        logits = model.module(input_ids=torch.tensor(text)[None]).logits[0, :-1].detach().float()
        nats -= float(logits.log_softmax(-1)[range(len(text) - 1), text[1:]].sum())
        count += len(text) - 1
    assert count == 8 + 13 + 29 == table.attrs["passport"]["held_out_tokens"]
    row = table[(table["metric"] == "perplexity") & (table["method"] == "none")].iloc[0]
    assert row["value"] == pytest.approx(np.exp(nats / count), rel=1e-5)
    assert row["lo"] <= row["value"] <= row["hi"] and row["n"] == 3


def test_strict_recitation_is_greedy_decoding():
    # under every edit the teacher-forced verdict is the one that generation gives
    model = build("neox")
    tokens = np.stack(recited(model, 40, 5, 4))
    bases = cv.decompose(collect(model, texts(*[30] * 12)))
    verdicts = []
    for rho in (1, 0.999, 0.99, 0.95, 0.9):
        with cv.edited(bases, rho=rho):
            said = model.generate(tokens[:, :5], 4)
            got = probe.recitation(model, tokens, 5)
        np.testing.assert_array_equal(got["recitation_strict"], (said == tokens[:, 5:]).all(axis=1))
        np.testing.assert_array_equal(got["recitation_strict"], got["edit_distance"] == 0)
        verdicts.append(got["recitation_strict"].mean())
    # both verdicts were met under one and the same edit, so the agreement says something
    assert verdicts[0] == 1 and any(0 < share < 1 for share in verdicts)


def test_edit_distance_by_hand():
    # 1234: the same 0; 9234 one substitution .25; 2341 a shift, one deletion and insertion, .5
    said = np.array([[1, 2, 3, 4], [9, 2, 3, 4], [2, 3, 4, 1], [9, 9, 9, 9]])
    truth = np.tile([1, 2, 3, 4], (4, 1))
    np.testing.assert_allclose(probe.edit_distance(said, truth), [0, 0.25, 0.5, 1.0])


def test_loose_takes_the_threshold_itself():
    class Reciter:
        """Says 1..16, but for the first ``wrong`` tokens."""

        def score(self, tokens, start, keep):
            return type("S", (), {"guess": self.said(len(tokens))})

        def generate(self, prompts, new):
            return self.said(len(prompts))

        def said(self, n):
            out = np.tile(np.arange(1, 17), (n, 1))
            for row, wrong in enumerate((0, 4, 5)):
                out[row, :wrong] = 99
            return out

    tokens = np.concatenate([np.zeros((3, 1), int), np.tile(np.arange(1, 17), (3, 1))], axis=1)
    got = probe.recitation(Reciter(), tokens, 1)
    # 4 of 16 wrong: similarity .75 exactly, still loose; 5 of 16: .6875, not
    np.testing.assert_array_equal(got["recitation_strict"], [1, 0, 0])
    np.testing.assert_array_equal(got["recitation_loose"], [1, 1, 0])
    np.testing.assert_allclose(got["edit_distance"], [0, 0.25, 0.3125])


def test_band_energy_by_hand():
    # ten directions: bands of 1, 2 (rounded 1..2.5 -> 2), 2 or 3 and 5. Unit vectors as basis, an
    # item with energy 4 in direction 0 and 1 each in directions 2, 9, at both positions.
    given = torch.zeros(1, 2, 20).double()
    given[0, :, 0], given[0, :, 3], given[0, :, 19] = 2.0, 1.0, 1.0
    got = probe.band_energy(given, torch.eye(20).double())
    # 20 directions: bands 0-1, 2-4, 5-9, 10-19
    np.testing.assert_allclose(got, [[4 / 6, 1 / 6, 0, 1 / 6]])


@pytest.mark.parametrize("bos", [None, 1])
def test_band_rows_by_a_second_route(bos):
    # item by item and direction by direction, at the positions that predict the suffix
    model, name = build("neox", bos=bos), "gpt_neox.layers.1.mlp.dense_4h_to_h"
    tokens = texts(*[11] * 5, seed=9)
    bases = cv.decompose(collect(model, texts(*[30] * 12)))
    basis = next(b for b in bases if b.layer.name == name)
    table = probe.band_rows(
        model, bases, items_of(tokens, ["seen"] * 2 + ["never"] * 3), memorized="seen",
        clean="never", prefix=5, suffix=6,
    )  # fmt: skip
    caught: dict = {}
    handle = basis.layer.module.register_forward_hook(lambda m, i, o: caught.update(a=i[0][0]))
    shares = np.zeros((5, 12))
    for row, text in enumerate(tokens):
        before = [] if bos is None else [bos]
        model.module(input_ids=torch.tensor(before + list(text))[None], use_cache=False)
        # token 5 is predicted at position 4, token 10 at position 9
        for a in caught["a"][len(before) + 4 : len(before) + 10]:
            for i in range(12):
                along = float(a.detach() @ basis.input_vectors[:, i])
                shares[row, i] += along**2 / float((a @ a).detach()) / 6
    handle.remove()
    # 12 directions: bands of 1 (.1 * 12 = 1.2), 2 (to .25 * 12 = 3), 3 and 6
    bands = np.add.reduceat(shares, [0, 1, 3, 6], axis=1)
    got = table[(table["role"] == "mlp.down") & (table["block"] == 1)]
    value = got.set_index(["metric", "group"])["value"]
    mine, theirs = bands[:2].mean(axis=0), bands[2:].mean(axis=0)
    np.testing.assert_allclose(value["band_energy", "seen"], mine, rtol=1e-6)
    np.testing.assert_allclose(value["band_energy", "never"], theirs, rtol=1e-6)
    np.testing.assert_allclose(value["band_ratio", "all"], mine / theirs, rtol=1e-6)
    assert (got["lo"] <= got["value"]).all() and (got["value"] <= got["hi"]).all()


def test_intervals_by_hand():
    # Wilson (1927), 95 %, z = 1.959964: 0 of 12 -> (0, z^2 / (n + z^2)) = (0, 3.841459 / 15.841459)
    low, high = probe.wilson(0, 12)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.2424940, abs=1e-6)
    # a bootstrap of the mean of a hundred standard normals: +- 1.96 / 10, within a fifth of it
    values = np.random.default_rng(0).normal(size=100)
    low, high = probe.bootstrap(lambda w: w @ values / 100, [100], 0)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.2)
    assert low < values.mean() < high


def test_probe_refuses():
    model = build("neox")
    items = items_of(texts(11, 11), ["seen", "unseen"])
    good = {"texts": ["w1 w2 w3"], "held_out": ["w1 w2 w3"], "prefix": 5, "suffix": 6}
    for change, message in (
        (
            {"memorized": "drip"},
            "probe_curvature: no items of group 'drip'; there are groups seen, unseen",
        ),
        (
            {"methods": ("prune",)},
            "probe_curvature: method 'prune'; choose from kfac, saliency, svd, magnitude, random",
        ),
        (
            {"methods": ("kfac",), "rho": {"kfac": (0.9, 1.2)}},
            "probe_curvature: rho is 1.2, the share that is kept; needs 0 < rho <= 1",
        ),
        ({"rho": {}}, "probe_curvature: rho has no shares for kfac, needs at least one"),
        ({"held_out": ["w1", ""]}, "probe_curvature: held_out has 2 texts, none of two tokens or "
            "more; give text"),
        ({"texts": "w1 w2"}, "probe_curvature: texts is one text, needs a list of texts"),
        ({"prefix": 0}, "probe_curvature: prefix is 0, but must be at least 1"),
        (
            {"suffix": 20},
            "probe_curvature: none of 1 texts has the 25 tokens asked for (the longest has 11); "
            "ask for fewer, or give longer texts",
        ),
    ):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with pytest.raises(InputError) as error:
                probe.probe_curvature(model, items, **(good | change))
        assert str(error.value) == message


def test_without_clean_items_there_are_no_bands():
    model = build("neox")
    items = items_of(recited(model, 3, 5, 6), ["seen"] * 3)
    with (
        pytest.warns(UserWarning, match="no items of group 'unseen' to compare with"),
        pytest.warns(UserWarning, match="small eigenvalues are noise"),
    ):
        table = probe.probe_curvature(
            model, items, texts=["w1 w2 w3 w4"] * 3, held_out=["w1 w2 w3"],
            rho={"kfac": (0.9,)}, methods=("kfac",), prefix=5, suffix=6,
        )  # fmt: skip
    assert not table["metric"].astype(str).str.startswith("band").any()


# Edits at the same price


def test_at_price_by_hand():
    # perplexity 100 -> 120, verdict 1 -> 0; at 110: 1 - ln 1.1 / ln 1.2 = 1 - .5227 = .4772
    verdicts = np.array([[1.0, 1.0], [0.0, 1.0]])
    got = at_price(verdicts, np.array([100.0, 120.0]), 1.1)
    np.testing.assert_allclose(got, [1 - np.log(1.1) / np.log(1.2), 1.0])
    np.testing.assert_allclose(at_price(verdicts, np.array([100.0, 120.0]), 1.2), [0.0, 1.0])
    np.testing.assert_allclose(at_price(verdicts, np.array([100.0, 120.0]), 1.0), [1.0, 1.0])
    assert np.isnan(at_price(verdicts, np.array([100.0, 120.0]), 1.21)).all()
    # the first crossing counts: the price falls again and rises once more
    four = np.array([[1.0], [0.5], [0.9], [0.0]])
    np.testing.assert_allclose(at_price(four, np.array([100.0, 110.0, 101.0, 130.0]), 1.1), [0.5])


def sweep_table() -> pd.DataFrame:
    """Two methods, four items: at 1.1 times, kfac is at (0, 0, 0, 1), svd at (1, 1, 0, 1)."""
    parts = []
    for method, rho, price, values in (
        ("none", 1.0, 100.0, (1, 1, 1, 1)),
        ("kfac", 0.9, 105.0, (1, 0, 0, 1)),
        ("kfac", 0.8, 110.0, (0, 0, 0, 1)),
        ("svd", 0.5, 110.0, (1, 1, 0, 1)),
    ):
        beside = {"method": method, "rho": rho}
        parts.append(rows("perplexity", price, run="m", beside=beside))
        names = [f"i{k}" for k in range(4)]
        parts.append(rows("recitation_strict", values, item=names, run="m", beside=beside))
        parts.append(rows("recitation_strict", np.mean(values), n=4, run="m", beside=beside))
    return pd.concat(parts, ignore_index=True)


def test_matched_frontier_by_hand():
    out = matched_frontier(sweep_table(), ratios=(1.05, 1.1, 1.2))
    value = out.set_index(["metric", "method", "ratio"])["value"]
    assert value["recitation_strict", "kfac", 1.1] == pytest.approx(0.25)
    assert value["recitation_strict", "svd", 1.1] == pytest.approx(0.75)
    assert value["difference", "kfac", 1.1] == pytest.approx(-0.5)
    assert value["recitation_strict", "kfac", 1.05] == pytest.approx(0.5)
    # svd at 1.05 lies between 1 and .75 at ln 1.05 / ln 1.1 = .5119 of the way
    assert value["recitation_strict", "svd", 1.05] == pytest.approx(1 - 0.25 * 0.5119, abs=1e-4)
    unreached = out[out["ratio"] == 1.2]
    assert unreached["value"].isna().all()
    assert set(unreached["reason"]) == {"a sweep ends before perplexity has risen to 1.2 times"}
    # paired: the items' differences are -1, -1, 0, 0, so no draw lies outside -1..0
    gap = out[(out["metric"] == "difference") & (out["ratio"] == 1.1)].iloc[0]
    assert -1 <= gap["lo"] < -0.5 < gap["hi"] <= 0


def test_matched_frontier_refuses():
    table = sweep_table()
    with pytest.raises(InputError, match=r"ratios are \[0.9\], needs at least 1 each"):
        matched_frontier(table, ratios=(0.9,))
    with pytest.raises(InputError, match="with those of the unedited model"):
        matched_frontier(table[table["method"] != "none"])
    with pytest.raises(InputError, match="several models or steps"):
        matched_frontier(pd.concat([table, table.assign(run="other")]))


# Texts, figures, the notebook


def test_texts_for_factors_and_for_perplexity_do_not_overlap(tmp_path, corpus_file):
    lines = Path(corpus_file).read_text(encoding="utf-8").splitlines()
    ordinary, held = probe.curvature_texts(None, corpus_file, texts=60, held_out=30, seed=1)
    assert (len(ordinary), len(held)) == (60, 30)
    assert not set(ordinary) & set(held)
    assert probe.curvature_texts(None, corpus_file, texts=60, held_out=30, seed=1)[0] == ordinary
    # a file with fewer texts than asked for is shared out in the same proportion, 4 to 2
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps({"text": line}) for line in lines[:6]), encoding="utf-8")
    ordinary, held = probe.curvature_texts(None, str(few), texts=40, held_out=20)
    assert (len(ordinary), len(held)) == (4, 2)
    assert sorted(ordinary + held) == sorted(lines[:6])
    few.write_text(json.dumps({"text": "alone"}), encoding="utf-8")
    with pytest.raises(InputError, match=r"few\.jsonl holds 1 texts, needs at least two"):
        probe.curvature_texts(None, str(few), texts=40, held_out=20)
    with pytest.raises(InputError, match="no text file at"):
        probe.curvature_texts(None, str(tmp_path / "none.txt"), texts=40, held_out=20)
    with pytest.warns(UserWarning, match="no corpus given, so factors and perplexity come from"):
        assert len(probe.curvature_texts(None, "", texts=4, held_out=2)[0]) == 4


def test_suite_texts(tiny):
    ordinary, held = probe.curvature_texts(tiny.suite, "", texts=5, held_out=7)
    assert len(ordinary) == 5 and held == tiny.suite.held_out(7)["text"].tolist()


def test_figures_draw_what_the_table_says():
    _, table = asked("llama")
    spectrum = plots.plot_spectrum(table, rho=0.95)
    assert len(spectrum.data) == 14  # seven roles, two blocks
    assert sum(bool(trace.showlegend) for trace in spectrum.data) == 7
    sweep = plots.plot_edit_sweep(table)
    assert [trace.name for trace in sweep.data] == ["kfac", "svd"]
    pooled = table[table["item"] == "all"].set_index(["metric", "method", "rho"])["value"]
    # the unedited model first, then from the gentlest edit on
    for x, at in zip(sweep.data[0].x, (("none", 1.0), ("kfac", 0.9), ("kfac", 0.5)), strict=True):
        assert x == pytest.approx(pooled[("perplexity", *at)], abs=1e-6)
    assert list(plots.plot_edit_sweep(table, x="rho").data[0].x) == [1.0, 0.9, 0.5]
    bands = plots.plot_band_ratio(table)
    assert len(bands.data) == 4 * 2
    ratio = table[(table["metric"] == "band_ratio") & (table["role"] == "mlp.down")]
    drawn = [t for t in bands.data if t.name == "block 1"][-1]
    np.testing.assert_allclose(drawn.y, ratio[ratio["block"] == 1]["value"], atol=1e-6)


def test_figures_refuse():
    table = sweep_table()
    for draw, message in (
        (plots.plot_spectrum, "plot_spectrum: the table has no rows of mass; it has perplexity, "),
        (plots.plot_band_ratio, "plot_band_ratio: the table has no rows of band_ratio; it has"),
        (lambda t: plots.plot_edit_sweep(t, x="kept"), "x is 'kept'; choose perplexity or rho"),
    ):
        with pytest.raises(InputError, match=message):
            draw(table)


def run_notebook(name: str, **given) -> dict:
    """Run a notebook's code cells here, with parameters; returns its names."""
    path = Path(__file__).parent.parent / "notebooks" / f"{name}.ipynb"
    space: dict = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
            if "parameters" in cell["metadata"].get("tags", []):
                assert set(given) <= set(space)
                space |= given
    return space


@pytest.mark.parametrize("groups", [("seen", "unseen"), ("seen",)])
def test_notebook_on_a_model_folder_and_a_file(tmp_path, corpus_file, tokenizer, groups, capsys):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    lines = Path(corpus_file).read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if len(line) > 60][:12]
    file = tmp_path / "mine.jsonl"
    entries = [{"text": line, "group": groups[n % len(groups)]} for n, line in enumerate(lines)]
    file.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        space = run_notebook(
            "loss_curvature",
            model=str(tmp_path / "mine"),
            items=str(file),
            corpus=corpus_file,
            roles=["mlp.up", "mlp.gate"],
            texts=20,
            held_out=10,
            prefix=8,
            suffix=8,
            results=str(tmp_path / "out"),
        )
    assert "here only the weights were checked" in capsys.readouterr().out
    assert space["compared"] == (len(groups) == 2)
    assert {name.split(".")[-1] for name in space["passport"]["layers"]} == {"up_proj", "gate_proj"}
    assert (tmp_path / "out" / "table.parquet").is_file()


def test_notebook_keeps_the_habits():
    from workbench.parameters import read_notebook

    notebook = read_notebook(Path(__file__).parent.parent / "notebooks" / "loss_curvature.ipynb")
    assert all(parameter.help for parameter in notebook.parameters)
    for cell in json.loads(notebook.path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert len(lines) <= 12, lines[0]
            assert not any(line.startswith(("def ", "class ")) for line in lines)
