"""Kronecker factors: identities that a right implementation satisfies, and controls that must fail."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

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


def other(kind: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
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
    return LanguageModel(module=module, tokenizer=tokenizer(), run=kind)


SPLIT = {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.gate", "mlp.down"}
FUSED = {"attn.qkv", "attn.o", "mlp.gate_up", "mlp.down"}
OTHERS = {kind: SPLIT for kind in ("Olmo2", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Mistral")}


@pytest.mark.parametrize(("kind", "roles"), [*OTHERS.items(), ("Phi3", FUSED)])
def test_other_architectures_pass_the_self_check(kind, roles):
    model = other(kind)
    factors = collect(model, texts(20, 7), dtype="float32")
    assert {layer.role for layer in factors.layers} == roles
    assert len({id(matrix) for matrix in factors.inputs.values()}) == 2 * 4
    a, g, _ = slow_factors(model, texts(20, 7), name=factors.layers[0].name, labels="sampled")
    torch.testing.assert_close(factors.inputs[factors.layers[0].name], a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factors.outputs[factors.layers[0].name], g, rtol=1e-4, atol=1e-6)
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
    turned = collect(model, tokens, labels=labels)  # the same batches: the same bits
    assert whole.tokens == split.tokens == turned.tokens == 32
    for name in whole.outputs:
        assert torch.equal(split.inputs[name], turned.inputs[name])
        assert torch.equal(split.outputs[name], turned.outputs[name])
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [None, [1]])
def test_recomputation_changes_memory_and_nothing_else(kind, blocks):
    model, tokens = build(kind), texts(8, 5)
    parent = model.module.gpt_neox.layers if kind == "neox" else None
    parent = model.module.transformer.h if kind == "gpt2" else parent or model.module.model.layers
    collect(model, tokens)  # the first time the head is compared, too
    counts = [0, 0]
    for number, block in enumerate(parent):
        count = lambda *_, n=number: counts.__setitem__(n, counts[n] + 1)  # noqa: E731
        block.ln_1.register_forward_hook(count) if kind == "gpt2" else (
            block.input_layernorm.register_forward_hook(count)
        )
    plain = collect(model, tokens, blocks=blocks)
    # the self-check and one batch
    assert counts == [2, 2]
    again = collect(model, tokens, blocks=blocks, recompute=True)
    assert counts == [4 + (2 if blocks is None else 0), 6]
    for name in plain.outputs:
        assert torch.equal(plain.inputs[name], again.inputs[name])
        assert torch.equal(plain.outputs[name], again.outputs[name])
    assert not any("forward" in vars(block) for block in parent)


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
    assert check[layers[0].name] == layers[0].name
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


# The loss's gradient, labels and sums, each by another route


@pytest.mark.parametrize("kind", [*KINDS, "Gemma2", "Gemma3"])
@pytest.mark.parametrize("labels", fc.LABELS)
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_gradients_without_the_vocabulary_are_those_of_the_loss(kind, labels, rows):
    model = build(kind, bos=2) if kind in KINDS else other(kind, torch.float64)
    assert kind != "Gemma2" or model.module.config.final_logit_softcapping == 30.0
    ids, targets, mask = fc.padded(model, texts(9, 4, 2))
    layers, seen = fc.linear_layers(model.module), ({}, {}, {})

    def by_definition():
        fc.summed_loss(model, ids, targets, mask, labels, 7).backward()

    def in_pieces():
        fc.add_gradients(model, ids, targets, mask, labels, 7, rows=rows)

    with fc.frozen(model.module):
        for number, way in enumerate((by_definition, in_pieces, in_pieces)):
            if number == 2:
                model._own_head["agrees"] = False  # a head unknown here takes the first way
            see = lambda layer, a, g, n=number: seen[n].update({layer.name: g})  # noqa: E731
            with fc.gradients_seen(layers, see):
                way()
    for name, gradient in seen[0].items():
        torch.testing.assert_close(seen[1][name], gradient, rtol=1e-6, atol=1e-10)
        assert torch.equal(seen[2][name], gradient)
        assert gradient.abs().sum() > 0


def test_labels_by_hand():
    # cumulative .25, .25, .5, 1: a draw on a boundary belongs to the next label that has mass
    p = torch.tensor([[0.25, 0.0, 0.25, 0.5]]).double().expand(6, 4)
    draws = torch.tensor([0.0, 0.2, 0.25, 0.4, 0.5, 1 - 2**-53]).double()
    assert fc.label_at(p, draws).tolist() == [0, 0, 2, 2, 3, 3]
    # what stands at the end without mass is never drawn, also where rounding reaches the total
    p = torch.tensor([[0.1, 0.2, 0.0]]).double()
    assert fc.label_at(p, torch.tensor([1.0]).double()).tolist() == [1]


@pytest.mark.parametrize("vocabulary", [3, 255, 256, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_by_spans_are_those_of_one_cumulative_sum(vocabulary, dtype):
    rng = np.random.default_rng(vocabulary)
    p = torch.from_numpy(rng.dirichlet(np.full(vocabulary, 0.05), size=500)).to(dtype)
    draws = torch.from_numpy(rng.random(500))
    cumulative = p.double().cumsum(1)
    want = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(1)
    got = fc.label_at(p, draws)
    # float32 sums of spans round at 1e-7: of 500 draws under .01 is expected to cross a boundary
    assert torch.equal(got, want)
    assert (p[torch.arange(500), got] > 0).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n", [1, 5, 511, 512, 513, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_products_mirrored_are_whole_products(monkeypatch, threads, n, dtype):
    rng = np.random.default_rng(n)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # BLAS on one, torch on more
    parts = [torch.from_numpy(rng.integers(-3, 4, size=(r, n))).to(dtype) for r in (1, 40)]
    total = torch.zeros(n, n, dtype=dtype)
    for part in parts:
        fc.add_upper(total, part)
    # small whole numbers: exact in both
    assert torch.equal(fc.mirror(total), sum(part.T @ part for part in parts))


# Half precision


def test_half_precision_is_cast_and_said():
    model = other("Qwen2", torch.bfloat16)
    before = model.weights_hash()
    with pytest.warns(UserWarning) as caught:
        factors = fc.collect_factors(model, texts(30, 30, 30, 30, 30, seed=1), blocks=[0])
    said = [str(each.message) for each in caught if "bfloat16" in str(each.message)]
    assert said == [
        "collect_factors: the weights are bfloat16, in which squared gradients underflow; a "
        "float32 copy of the model is used"
    ]
    assert caught[0].filename == __file__
    assert model.module.dtype == torch.bfloat16 and model.weights_hash() == before
    assert factors.passport["weights"] == before
    wide = collect(model.copy(), texts(30, 30, 30, 30, 30, seed=1), blocks=[0], dtype="float32")
    for layer in factors.layers:
        assert layer.module is model.module.get_submodule(layer.name)
        assert torch.equal(factors.outputs[layer.name], wide.outputs[layer.name])


# Files


def test_saved_factors_come_back(tmp_path):
    model = build("llama")
    factors = collect(model, texts(8, 5), blocks=[1])
    fc.save_factors(factors, tmp_path / "f.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["f.safetensors"]
    again = fc.load_factors(tmp_path / "f.safetensors", model)
    assert again.layers == factors.layers and again.tokens == 11
    assert again.layers[0].module is factors.layers[0].module
    assert (again.labels, again.seed) == ("sampled", 0)
    assert again.passport == factors.passport
    assert again.passport["sums"] == "float64" and again.passport["sequences"] == 2
    for name in factors.outputs:
        assert torch.equal(again.inputs[name], factors.inputs[name])
        assert torch.equal(again.outputs[name], factors.outputs[name])
    assert len({id(each) for each in again.inputs.values()}) == 4


def test_files_that_do_not_fit_are_refused(tmp_path):
    model, other_model = build("neox"), build("neox", seed=1)
    place = tmp_path / "f.safetensors"
    with pytest.raises(InputError) as error:
        fc.load_factors(place, model)
    assert str(error.value) == f"load_factors: no file at {place}; save_factors writes one"
    fc.save_factors(collect(model, texts(8)), place)
    with pytest.raises(InputError) as error:
        fc.load_factors(place, other_model)
    assert str(error.value) == (
        f"load_factors: {place} was made of weights {model.weights_hash()}, the model holds "
        f"{other_model.weights_hash()}; load that model, or collect the factors of this one"
    )
    place.write_bytes(place.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"load_factors: .* is not a whole file of factors \("):
        fc.load_factors(place, model)


def test_merged_shards_are_the_whole(tmp_path):
    model, tokens = build("llama"), texts(9, 4, 4, 13, 2, 6)
    whole = collect(model, tokens)
    shards = [collect(model, part) for part in (tokens[:1], tokens[1:5], tokens[5:])]
    fc.save_factors(shards[1], tmp_path / "s")
    shards[1] = fc.load_factors(tmp_path / "s", model)
    merged = fc.merge_factors(shards[::-1])
    assert merged.tokens == whole.tokens == 32
    assert merged.passport == whole.passport
    for name in whole.outputs:
        torch.testing.assert_close(merged.inputs[name], whole.inputs[name], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(merged.outputs[name], whole.outputs[name], rtol=1e-7, atol=1e-9)
    assert len({id(each) for each in merged.inputs.values()}) == 2 * 4


def test_unlike_shards_are_refused():
    model = build("neox")
    first = collect(model, texts(8))
    for unlike, difference in (
        (collect(model, texts(5), labels="gold"), "labels gold, not the sampled"),
        (collect(model, texts(5), seed=4), "seed 4, not the 0"),
        (collect(model, texts(5), dtype="float32"), "sums float32, not the float64"),
        (collect(model, texts(5), blocks=[1]), "layers other than those"),
    ):
        with pytest.raises(InputError) as error:
            fc.merge_factors([first, unlike])
        assert str(error.value) == (
            f"merge_factors: shard 1 was made with {difference} of shard 0; make both alike"
        )
    with pytest.raises(InputError, match="made with weights [0-9a-f]{16}, not the [0-9a-f]{16} of"):
        fc.merge_factors([first, collect(build("neox", seed=1), texts(5))])
    with pytest.raises(InputError, match="shards 0 and 1 hold the same texts; give each once"):
        fc.merge_factors([first, first])
    with pytest.raises(InputError, match="merge_factors: got no shards, needs at least one"):
        fc.merge_factors([])


def interrupted(monkeypatch, model, tokens, folder, *, after: int, **options) -> None:
    """A run that stops before batch ``after``, with sums written after every batch."""
    plain, calls = fc.add_gradients, []

    def stopping(*given, **named):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return plain(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(fc, "SAVE_SECONDS", -1.0)
        patch.setattr(fc, "add_gradients", stopping)
        with pytest.raises(KeyboardInterrupt):
            collect(model, tokens, folder=folder, **options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_interrupted_run_goes_on_to_the_same_bits(monkeypatch, tmp_path, dtype):
    monkeypatch.setattr(fc, "LOGITS_PER_BATCH", {"cpu": 10 * VOCABULARY})
    model, tokens = build("llama"), texts(9, 4, 4, 13, 2, 6)
    whole = collect(model, tokens, dtype=dtype)
    interrupted(monkeypatch, model, tokens, tmp_path / "f", after=2, dtype=dtype)
    plain, calls = fc.add_gradients, []
    monkeypatch.setattr(
        fc, "add_gradients", lambda *given, **named: (calls.append(1), plain(*given, **named))
    )
    # batches of 13, 9, 6 and 4 + 4 and 2 tokens: two were done; the order of texts is free
    again = collect(model, tokens[::-1], dtype=dtype, folder=tmp_path / "f")
    assert len(calls) == 3
    third = collect(model, tokens, dtype=dtype, folder=tmp_path / "f")  # finished: read, not run
    assert len(calls) == 3
    for got in (again, third):
        assert got.tokens == whole.tokens and got.passport == whole.passport
        for name in whole.outputs:
            assert torch.equal(got.inputs[name], whole.inputs[name])
            assert torch.equal(got.outputs[name], whole.outputs[name])
    assert not list((tmp_path / "f").glob(".*"))


def test_a_folder_of_other_settings_is_refused(monkeypatch, tmp_path):
    model, tokens = build("neox"), texts(8, 5)
    monkeypatch.setattr(fc, "LOGITS_PER_BATCH", {"cpu": 8 * VOCABULARY})
    interrupted(monkeypatch, model, tokens, tmp_path, after=1)
    for options, difference in (
        ({"labels": "gold"}, "labels sampled, not the gold"),
        ({"seed": 2}, "seed 0, not the 2"),
        ({"dtype": "float32"}, "sums float64, not the float32"),
        ({"roles": ["mlp.up"]}, "layers other than those"),
        ({"recompute": True}, "recompute False, not the True"),
        ({"memory": 1.5}, "memory None, not the 1.5"),
    ):
        with pytest.raises(InputError) as error:
            collect(model, tokens, folder=tmp_path, **options)
        assert str(error.value) == (
            f"collect_factors: {tmp_path} was begun with {difference} asked for; give another folder"
        )
    with pytest.raises(InputError, match="begun with texts [0-9a-f]{16}, not the [0-9a-f]{16} ask"):
        collect(model, tokens[:1], folder=tmp_path)
    with pytest.raises(InputError, match="begun with weights [0-9a-f]{16}, not the"):
        collect(build("neox", seed=1), tokens, folder=tmp_path)


# Memory and forecast


def test_peak_bytes_by_hand():
    before = torch.zeros(10_000)
    with fc.peak_bytes(torch.device("cpu")) as peak:
        one = torch.zeros(1000)  # 4000 bytes
        two = one + before[:1000]  # 8000; the slice lies in what was there before
        three = two.view(10, 100).T  # no bytes of its own
        assert peak() == 8000
        del one
        four = torch.zeros(500)  # 4000 + 2000: the peak stays
        assert peak() == 8000
        five = three + 1  # 10,000
        assert peak() == 10_000
    assert len(four) + len(five) + len(before) > 0


def deep(blocks: int = 3) -> LanguageModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=blocks,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0,
    )  # fmt: skip
    module = LlamaForCausalLM(config).eval()
    return LanguageModel(module=module, tokenizer=tokenizer(), run="deep")


def long_texts(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 300, size=65) for _ in range(n)]


def watched(model, tokens, **options):
    with fc.peak_bytes(model.device) as peak:
        factors = collect(model, tokens, **({"dtype": "float32"} | options))
    return factors, peak()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_forecast_is_what_happens(monkeypatch, recompute):
    monkeypatch.setattr(fc, "TOKENS_PER_BATCH", {"cpu": 65})  # a text at a time
    model, tokens = deep(), long_texts(3)
    ticks = iter([10.0, 12.0])  # 2 s for the first of three texts: 6 s
    with monkeypatch.context() as patch:
        patch.setattr(fc, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
        forecast = fc.forecast_factors(model, tokens, recompute=recompute)
    factors, peak = watched(model, tokens, recompute=recompute)
    held = {id(each): each.nbytes for each in (*factors.inputs.values(), *factors.outputs.values())}
    # a block: A of 32 (q k v), 32 (o), 32 (gate up), 64 (down); G of 5 x 32 and 2 x 64
    assert forecast.factors == sum(held.values()) == 3 * 4 * (8 * 32**2 + 3 * 64**2)
    assert forecast.peak == pytest.approx(peak, rel=0.05)
    assert forecast.tokens == factors.tokens == 3 * 64
    assert (forecast.passes, forecast.tokens_per_batch) == (1, 65)
    assert " in 1 pass, " in str(forecast) and " in 2 passes, " in str(replace(forecast, passes=2))
    assert forecast.seconds == 6.0


def test_recomputation_needs_one_block_and_each_block_s_input():
    # the activations of every further block are 1 of its inputs, 64 x 32 floats a text
    tokens = long_texts(20)
    peaks = {n: watched(deep(n), tokens, recompute=True, blocks=[0])[1] for n in (1, 4)}
    whole = {n: watched(deep(n), tokens, blocks=[0])[1] for n in (1, 4)}
    inputs = 3 * 20 * 64 * 32 * 4
    assert peaks[4] - peaks[1] == pytest.approx(inputs, rel=0.02)
    assert whole[4] - whole[1] > 5 * inputs


def test_a_memory_is_kept_to_by_smaller_batches_and_groups_of_layers(monkeypatch, tmp_path):
    monkeypatch.setattr(fc, "LOSS_ELEMENTS", {"cpu": fc.FEWEST_ROWS * 300})
    model, tokens = deep(), long_texts(6)
    options = {"roles": ["attn.q", "attn.k", "attn.v", "mlp.down"], "dtype": "float64"}
    whole = collect(model, tokens, **options)
    every, one = (fc.forecast_factors(model, few, **options) for few in (tokens, tokens[:1]))
    fewer = (every.peak + one.peak) / 2  # some texts at once, all layers
    groups = one.peak - 0.6 * one.factors  # one text at once, and under half of the layers
    for number, memory in enumerate((fewer, groups)):
        options["memory"] = memory / fc.GIB
        forecast = fc.forecast_factors(model, tokens, **options)
        factors, peak = watched(model, tokens, folder=tmp_path / str(number), **options)
        assert len(list(tmp_path.glob(f"{number}/group-*.safetensors"))) == forecast.passes
        assert forecast.passes == 1 if memory == fewer else 3 <= forecast.passes <= 4
        assert forecast.tokens_per_batch == 64 if memory == groups else True
        assert peak <= memory and forecast.peak <= memory
        assert factors.layers == whole.layers and factors.tokens == whole.tokens
        for name in whole.outputs:
            for one_way, other_way in (
                (factors.outputs, whole.outputs),
                (factors.inputs, whole.inputs),
            ):
                torch.testing.assert_close(one_way[name], other_way[name], rtol=1e-4, atol=1e-7)
        # q, k and v stay in one pass, and so share one A
        assert len({id(each) for each in factors.inputs.values()}) == 3 * 2


def test_too_little_memory_is_refused_with_what_is_needed(monkeypatch):
    monkeypatch.setattr(fc, "LOSS_ELEMENTS", {"cpu": fc.FEWEST_ROWS * 300})
    model, tokens = deep(), long_texts(4)
    with pytest.raises(InputError) as error:
        collect(model, tokens, memory=1e-4)
    said = r"collect_factors: memory is 0.0001 GiB, one text of 64 positions and one layer's "
    assert re.match(said + r"factors need 0\.00\d+; give more, or shorter texts$", str(error.value))
    forecast = fc.forecast_factors(model, tokens[:1])
    memory = (forecast.peak - forecast.factors / 2) / fc.GIB
    with pytest.raises(InputError) as error:
        collect(model, tokens[:1], memory=memory)
    said = str(error.value)
    assert said.startswith(f"collect_factors: memory is {memory:.3g} GiB, all factors together nee")
    assert said.endswith("give a folder, where they are put group by group, or fewer layers")
    least = float(re.search(r"need ([\d.]+);", said).group(1))
    collect(model, tokens[:1], memory=least * 1.01)


def test_a_long_run_shows_its_tokens(monkeypatch, capsys):
    monkeypatch.setattr(fc, "SHOWN_AFTER", 0.0)
    collect(build("neox"), texts(8, 5))
    assert re.search(r"curvature factors: 100%.* 11.0/11.0", capsys.readouterr().err)
    collect(build("neox"), texts(8, 5), progress=False)
    assert capsys.readouterr().err == ""


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
