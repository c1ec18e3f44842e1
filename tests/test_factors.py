"""Kronecker factors: identities that a right implementation satisfies, and controls that must fail."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from tests.curvature_models import (
    KINDS,
    SMALL,
    VOCABULARY,
    WIDTH,
    build,
    collect,
    texts,
    tokenizer,
)
from workbench import curvature as cv
from workbench import factors as fc
from workbench.models import LanguageModel
from workbench.table import InputError

# Layers by role


def test_roles_of_each_architecture():
    fused = {"attn.qkv", "attn.o", "mlp.up", "mlp.down"}
    split = {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.gate", "mlp.down"}
    for kind, roles in (("neox", fused), ("gpt2", fused), ("llama", split)):
        layers = fc.linear_layers(build(kind).module)
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
        fc.linear_layers(module, roles=["mlp.gate"])
    assert str(error.value) == (
        "linear_layers: this model has no role mlp.gate; it has attn.o, attn.qkv, mlp.down, mlp.up"
    )
    with pytest.raises(InputError) as error:
        fc.linear_layers(module, blocks=[2])
    assert str(error.value) == "linear_layers: this model has no block 2; it has 0, 1"
    with pytest.raises(InputError, match="no roles or no blocks were asked for"):
        fc.linear_layers(module, roles=[])
    with pytest.raises(InputError, match="Linear has no linear layers under names known here"):
        fc.linear_layers(torch.nn.Linear(2, 2))


def test_shared_weights_are_refused():
    module = build("neox").module
    blocks = module.gpt_neox.layers
    blocks[1].mlp.dense_h_to_4h.weight = blocks[0].mlp.dense_h_to_4h.weight
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.dense_h_to_4h and .*layers\.0.* share"):
        fc.linear_layers(module, roles=["attn.o"])


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
            draws = fc.keyed(seed, text).random(len(text) - 1)
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
@pytest.mark.parametrize("labels", fc.LABELS)
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


@pytest.mark.parametrize("labels", fc.LABELS)
def test_batches_and_order_change_nothing(monkeypatch, labels):
    model, tokens = build("neox"), texts(9, 4, 4, 13, 2, 6)
    whole = collect(model, tokens, labels=labels)
    monkeypatch.setattr(fc, "LOGITS_PER_BATCH", {"cpu": 10 * VOCABULARY})  # unequal batches
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
    labels = fc.sampled_labels(logits, ids, ids, mask, 0)
    share = np.bincount(labels[0].numpy(), minlength=3) / 4000
    assert (np.abs(share - p) < 4 * np.sqrt(p * (1 - p) / 4000)).all()
    again = fc.sampled_labels(logits, ids, ids, mask, 0)
    other_seed = fc.sampled_labels(logits, ids, ids, mask, 1)
    other_text = fc.sampled_labels(logits, ids + 1, ids, mask, 0)
    assert torch.equal(labels, again)
    assert not torch.equal(labels, other_seed) and not torch.equal(labels, other_text)
    # a certain token is always drawn, also the first and the last of the vocabulary
    certain = torch.full((1, 4000, 3), -1e9)
    for token in (0, 2):
        certain[:] = -1e9
        certain[..., token] = 0.0
        assert (fc.sampled_labels(certain, ids, ids, mask, 0) == token).all()


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
    module = fc.linear_layers(model.module, roles=["mlp.up"])[0].module
    plain = module.forward
    module.forward = lambda x: plain(x) + module.weight.sum()
    with pytest.raises(RuntimeError, match="sum g a.T of .* misses the weight's gradient"):
        collect(model, texts(8))


def test_factors_that_are_not_finite_name_layer_and_batch():
    model = build("neox")
    check = fc.check_gradients(model, fc.linear_layers(model.module), texts(4))
    sums = fc.FactorSums(check, torch.float64)
    layers = fc.linear_layers(model.module, blocks=[1], roles=["mlp.up"])
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
            fc.collect_factors(model, tokens, **arguments)
        assert str(error.value) == message


def test_few_tokens_are_said_with_their_numbers():
    # the widest factor is the fused query, key and value: 3 * 8 = 24 dimensions
    with pytest.warns(UserWarning, match=r"10 tokens for factors of up to 24 dim.*\(240\)"):
        fc.collect_factors(build("neox"), texts(11))


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
    sums = fc.FactorSums({layer.name: layer.name}, torch.float64)
    logits = logits_of_module(inputs)
    samples, classes = logits.shape
    with fc.gradients_seen([layer], sums.see):
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
    layer = fc.Layer("0", 0, "mlp.up", net[0])
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
    layer = fc.Layer("0", 0, "mlp.up", net[0])
    sums = fc.FactorSums({"0": "0"}, torch.float64)
    with fc.gradients_seen([layer], sums.see):
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
    layer = fc.linear_layers(model.module, roles=["mlp.down"], blocks=[0])[0]
    ids = torch.tensor(texts(length)[0])[None, :-1]
    model.module.requires_grad_(False)

    def logits_of_ids(given):
        return model.module(input_ids=given, use_cache=False).logits[0]

    sums = fc.FactorSums({layer.name: layer.name}, torch.float64)
    with fc.gradients_seen([layer], sums.see):
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
        layer = fc.Layer("l", 0, "mlp.up", module)
        sums = fc.FactorSums({"l": "l"}, torch.float64)
        sums.begin(torch.ones(11, dtype=torch.bool))
        with fc.gradients_seen([layer], sums.see):
            (module(x) ** 3).sum().backward()
        bases = cv.decompose(fc.Factors((layer,), sums.inputs, sums.outputs, 11, "gold", 0))
        with cv.edited(bases, rho=0.6) as edit:
            edits.append((layer.matrix.detach().clone(), edit.kept, edit.predicted_damage))
        assert 0 < edit.kept < 1
    torch.testing.assert_close(edits[0][0], edits[1][0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(edits[0][1:], edits[1][1:], rtol=1e-12)
