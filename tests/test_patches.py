"""Saved patches and exported models: the same bits on, the same bits off, and nothing else taken."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.curvature_models import KINDS, SMALL, WIDTH, build, collect, texts, tokenizer
from workbench import curvature as cv
from workbench import factors as fc
from workbench.kronfluence import export_kronfluence
from workbench.models import LanguageModel, load_model
from workbench.patches import (
    MASK,
    WEIGHT,
    export_edited,
    kept_components,
    patched,
    read_patch,
    save_patch,
)
from workbench.table import InputError

TEXTS = texts(20, 13, 20, 6)


def small(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> LanguageModel:
    model = build(kind, seed=seed)
    model.module.to(dtype)
    return model


def weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in model.module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_the_readmes_lines_run_as_they_stand(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = [
        each for each in re.findall(r"```python\n(.*?)```", readme, re.S) if "save_patch" in each
    ]
    model = small("llama")
    monkeypatch.chdir(tmp_path)
    known = {"model": model, "texts": ["w1 w2 w3 w4 w5 w6", "w7 w2 w9 w4"]}
    with pytest.warns(UserWarning, match="under 10 a dimension"):
        exec("\n".join(blocks), known)
    assert len(blocks) == 1 and len(known["factors"].layers) == 14
    with patched(model, "edit.safetensors") as edit:
        assert edit.rho == 0.95 and edit.kept < 1
        under = weights(model)
    assert same(weights(load_model("edited-model")), under)


# Patches


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_gives_the_bits_of_the_edit_and_takes_them_back(kind, tmp_path):
    model = small(kind)
    bases = cv.decompose(collect(model, TEXTS))
    before = weights(model)
    with cv.edited(bases, rho=0.8) as edit:
        under = weights(model)
    assert not same(under, before)
    saved = save_patch(model, bases, tmp_path / "edit.safetensors", rho=0.8)
    assert same(weights(model), before) and saved == edit
    other = small(kind)  # the same weights in another module, as another process would load them
    with patched(other, tmp_path / "edit.safetensors") as worn:
        assert same(weights(other), under)
    assert same(weights(other), before) and worn == edit
    with (
        pytest.raises(ZeroDivisionError),
        patched(other, tmp_path / "edit.safetensors"),
    ):
        for parameter in other.module.parameters():  # whatever is done inside to edited layers
            assert parameter.isfinite().all()
        raise ZeroDivisionError
    assert same(weights(other), before)


def test_what_is_done_to_an_edited_layer_inside_is_undone_too(tmp_path):
    model = small("neox")
    bases = cv.decompose(collect(model, TEXTS))
    save_patch(model, bases, tmp_path / "p", rho=0.8)
    before = weights(model)
    with patched(model, tmp_path / "p"), torch.no_grad():
        bases[0].layer.module.weight.mul_(3.0)
    assert same(weights(model), before)


def test_a_difference_of_floats_would_not_do(tmp_path):
    # why a patch holds weights: W + (W' - W) is not W' in float32, nor is W' - (W' - W) again W
    model = small("neox")
    basis = cv.decompose(collect(model, TEXTS))[0]
    before = basis.layer.module.weight.detach().clone()
    with cv.edited([basis], rho=0.6):
        after = basis.layer.module.weight.detach().clone()
    difference = after - before
    assert not torch.equal(before + difference, after)
    assert not torch.equal(after - difference, before)


@pytest.mark.filterwarnings("ignore:correct_masses. the weights are bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["saliency", "svd", "magnitude", "random", "ekfac"])
def test_every_method_and_dtype(method, dtype, tmp_path):
    model = small("llama", dtype=dtype)
    bases = cv.decompose(collect(model, TEXTS))
    bases = cv.correct_masses(model, bases, TEXTS)
    before = weights(model)
    options = {"method": method, "rho": 0.7, "seed": 3}
    with cv.edited(bases, **options):
        under = weights(model)
    save_patch(model, bases, tmp_path / "p", **options)
    with patched(model, tmp_path / "p"):
        assert same(weights(model), under)
    assert same(weights(model), before)
    if method in cv.MASKED:
        mask = cv.component_mask(bases[1], **options)
        np.testing.assert_array_equal(kept_components(tmp_path / "p", bases[1]), mask)
    else:
        with pytest.raises(InputError, match=f"holds no mask of .*; its method is {method}, its"):
            kept_components(tmp_path / "p", bases[1])


def test_what_the_file_says(tmp_path):
    model = small("gpt2")
    bases = cv.decompose(collect(model, TEXTS))
    edit = save_patch(model, bases, tmp_path / "p", rho=0.8, seed=5)
    with safe_open(tmp_path / "p", framework="pt") as file:
        about = json.loads(file.metadata()["patch"])
        names = set(file.keys())
    assert about["edit"] == {
        "method": "kfac",
        "rho": 0.8,
        "seed": 5,
        "kept": edit.kept,
        "predicted_damage": edit.predicted_damage,
    }
    assert about["layers"] == [basis.layer.name for basis in bases]
    assert about["architecture"] == "GPT2LMHeadModel"
    assert about["weights"] == model.weights_hash() == about["passport"]["weights"]
    assert names == {prefix + name for prefix in (WEIGHT, MASK) for name in about["layers"]}
    with cv.edited(bases, rho=0.8):
        assert about["edited"] == model.weights_hash()
    # one bit a component
    assert load_file(tmp_path / "p")[MASK + about["layers"][0]].numel() == WIDTH * 3 * WIDTH / 8
    # other bases have another hash
    turned = cv.decompose(collect(model, texts(20, seed=8)))
    save_patch(model, turned, tmp_path / "q", rho=0.8, seed=5)
    assert read_patch(tmp_path / "q")[0]["bases"] != about["bases"]
    # so have other vectors with the same values
    for name in ("input_vectors", "output_vectors"):
        vectors = getattr(bases[0], name)
        mirrored = [replace(bases[0], **{name: -vectors}), *bases[1:]]
        save_patch(model, mirrored, tmp_path / "q", rho=0.8, seed=5)
        assert read_patch(tmp_path / "q")[0]["bases"] != about["bases"]
    save_patch(model, bases, tmp_path / "q", rho=0.8, seed=5)
    assert (tmp_path / "q").read_bytes() == (tmp_path / "p").read_bytes()


def test_other_weights_and_other_architectures_are_refused(tmp_path):
    model = small("neox")
    bases = cv.decompose(collect(model, TEXTS))
    save_patch(model, bases, tmp_path / "p", rho=0.8)
    other = small("neox", seed=1)
    with pytest.raises(InputError) as error, patched(other, tmp_path / "p"):
        pass
    assert str(error.value) == (
        f"patched: {tmp_path / 'p'} was made for weights {model.weights_hash()} (a model without a "
        f"source), the model holds {other.weights_hash()}; load those, in the same dtype"
    )
    with (
        patched(model, tmp_path / "p"),
        pytest.raises(InputError, match="; it wears this patch already; load those"),
        patched(model, tmp_path / "p"),
    ):
        pass
    # a layer that no edit touched, changed by one bit
    with torch.no_grad():
        model.module.get_output_embeddings().weight[0, 0] += 1e-3
    with pytest.raises(InputError, match="was made for weights"), patched(model, tmp_path / "p"):
        pass
    with pytest.raises(InputError) as error, patched(small("gpt2"), tmp_path / "p"):
        pass
    name = bases[0].layer.name
    assert str(error.value) == (
        f"patched: {tmp_path / 'p'} is for GPTNeoXForCausalLM with a layer {name} of (24, 8); this "
        "GPT2LMHeadModel has none of that name"
    )
    config = GPTNeoXConfig(
        **SMALL, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
    )
    narrow = LanguageModel(GPTNeoXForCausalLM(config), tokenizer(), "narrow")
    with (
        pytest.raises(InputError, match=r"this GPTNeoXForCausalLM has one of \(12, 4\)"),
        patched(narrow, tmp_path / "p"),
    ):
        pass
    with pytest.raises(InputError, match=r"save_patch: .*was decomposed in another model"):
        save_patch(other, bases, tmp_path / "never", rho=0.8)
    assert not (tmp_path / "never").exists()


def test_damaged_files_are_refused(tmp_path):
    model = small("neox")
    bases = cv.decompose(collect(model, TEXTS))
    save_patch(model, bases, tmp_path / "p", rho=0.8)
    whole, before = (tmp_path / "p").read_bytes(), weights(model)
    flipped = bytearray(whole)
    flipped[-1] ^= 1  # safetensors itself does not notice
    torch_file = tmp_path / "other"
    save_file({"x": torch.ones(2)}, torch_file)
    for name, content in (
        ("cut", whole[:-40]),
        ("flipped", bytes(flipped)),
        ("rho", whole.replace(b'\\"rho\\": 0.8', b'\\"rho\\": 0.9')),
        ("no patch", torch_file.read_bytes()),
        ("text", b"rho = 0.8"),
    ):
        (tmp_path / name).write_bytes(content)
        message = f"patched: {re.escape(str(tmp_path / name))} is not a whole patch file"
        with pytest.raises(InputError, match=message), patched(model, tmp_path / name):
            pass
    with pytest.raises(InputError) as error, patched(model, tmp_path / "nowhere"):
        pass
    assert str(error.value) == (
        f"patched: no file at {tmp_path / 'nowhere'}; save_patch writes one"
    )
    assert same(weights(model), before)


def test_nothing_is_left_where_saving_fails(tmp_path):
    model = small("neox")
    bases = cv.decompose(collect(model, TEXTS))
    before = weights(model)
    with pytest.raises(InputError, match="needs 0 < rho <= 1"):
        save_patch(model, bases, tmp_path / "p", rho=0.0)
    assert not list(tmp_path.iterdir()) and same(weights(model), before)


# Whole models


def plain(kind: str, *, tied: bool) -> torch.nn.Module:
    torch.manual_seed(4)
    size = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    own = {"tie_word_embeddings": tied, "eos_token_id": 0}
    if kind == "neox":
        module = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, **size, **own, intermediate_size=12))
    elif kind == "gpt2":
        names = {"vocab_size": 29, "n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
        module = GPT2LMHeadModel(GPT2Config(**names, bos_token_id=0, **own))
    else:
        module = LlamaForCausalLM(LlamaConfig(**SMALL, **size, **own, intermediate_size=12))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    return module.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_scores_as_the_model_under_the_edit(kind, tied, tmp_path):
    module = plain(kind, tied=tied)
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    model = LanguageModel(module, tokenizer(), kind)
    bases = cv.decompose(collect(model, TEXTS))
    save_patch(model, bases, tmp_path / "p", rho=0.7)
    own = model.score(TEXTS).log_probability
    with patched(model, tmp_path / "p"):
        under, state = model.score(TEXTS).log_probability, weights(model)
        export_edited(model, tmp_path / "inside")
    export_edited(model, tmp_path / "outside", patch=tmp_path / "p")
    assert np.nanmax(np.abs(own - under)) > 1e-3  # the edit is seen at all
    np.testing.assert_array_equal(model.score(TEXTS).log_probability, own)
    for name in ("inside", "outside"):
        loaded = load_model(tmp_path / name, device="cpu")
        assert same(weights(loaded), state)
        np.testing.assert_array_equal(loaded.score(TEXTS).log_probability, under)
        assert loaded.encode(["w3 w5"])[0].tolist() == [3, 5]
        ids = torch.from_numpy(TEXTS[0])[None]
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad(), patched(model, tmp_path / "p"):
            assert torch.equal(theirs(ids).logits, model.module(ids).logits)
        files = {each.suffix for each in (tmp_path / name).iterdir()}
        assert files == {".json", ".safetensors"}


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    model = LanguageModel(plain("neox", tied=False), tokenizer(), "neox")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "mine").write_text("mine")
    with pytest.raises(InputError) as error:
        export_edited(model, tmp_path / "f")
    assert str(error.value) == (
        f"export_edited: {tmp_path / 'f'} is there already; give a folder that is not"
    )
    assert [each.name for each in (tmp_path / "f").iterdir()] == ["mine"]
    with pytest.raises(InputError, match="no file at"):
        export_edited(model, tmp_path / "g", patch=tmp_path / "nowhere")
    # a tokenizer that cannot be written leaves no half a folder
    model.tokenizer = None
    with pytest.raises(AttributeError):
        export_edited(model, tmp_path / "g")
    assert [each.name for each in tmp_path.iterdir()] == ["f"]


# kronfluence


def slow_covariances(model: LanguageModel, factors: fc.Factors, tokens) -> dict[str, torch.Tensor]:
    """Sums of ``[a, 1] [a, 1]^T``, text by text, as kronfluence's documentation defines them."""
    sums: dict[str, torch.Tensor] = {}
    for text in tokens:
        for layer in factors.layers:
            caught = []
            handle = layer.module.register_forward_pre_hook(
                lambda m, inputs, caught=caught: caught.append(inputs[0][0, :-1])
            )
            with torch.no_grad():
                model.module(torch.from_numpy(text)[None])
            handle.remove()
            a = caught[0]
            if layer.module.bias is not None:
                a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], dim=1)
            sums[layer.name] = sums.get(layer.name, 0) + a.T @ a
    return sums


@pytest.mark.parametrize("kind", KINDS)
def test_kronfluence_files_hold_sums_with_a_column_of_ones(kind, tmp_path):
    model = build(kind)
    factors = collect(model, TEXTS)
    export_kronfluence(factors, tmp_path / "factors_own", model=model, tokens=TEXTS)
    read = {
        name: load_file(tmp_path / "factors_own" / f"{name}.safetensors")
        for name in (
            "activation_covariance",
            "gradient_covariance",
            "num_activation_covariance_processed",
            "num_gradient_covariance_processed",
        )
    }
    expected = slow_covariances(model, factors, TEXTS)
    predicted = 19 + 12 + 19 + 5
    for layer in factors.layers:
        for each in read.values():
            assert set(each) == {one.name for one in factors.layers}
        assert read["num_activation_covariance_processed"][layer.name].tolist() == [predicted]
        assert read["num_gradient_covariance_processed"][layer.name].tolist() == [predicted]
        torch.testing.assert_close(
            read["activation_covariance"][layer.name], expected[layer.name], rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(
            read["gradient_covariance"][layer.name] / predicted, factors.outputs[layer.name]
        )
    width = len(factors.inputs[factors.layers[0].name]) + (kind != "llama")
    assert read["activation_covariance"][factors.layers[0].name].shape == (width, width)


def test_kronfluence_needs_the_texts_of_the_factors(tmp_path):
    model = build("neox")
    factors = collect(model, TEXTS)
    with pytest.raises(InputError) as error:
        export_kronfluence(factors, tmp_path / "f")
    assert str(error.value) == (
        f"export_kronfluence: {factors.layers[0].name} has a bias, for which kronfluence keeps the "
        "mean input too; give the model and the tokens that the factors were made of"
    )
    for others in (TEXTS[:3], texts(20, 13, 20, 6, seed=9)):
        with pytest.raises(InputError, match="were not made of these .* tokens and this model"):
            export_kronfluence(factors, tmp_path / "f", model=model, tokens=others)
    behind_a_norm = collect(model, TEXTS, roles=["attn.qkv"])
    with pytest.raises(InputError, match="were not made of these"):
        others = texts(20, 13, 20, 6, seed=9)
        export_kronfluence(behind_a_norm, tmp_path / "f", model=model, tokens=others)
    (tmp_path / "f").mkdir()
    with pytest.raises(InputError, match="is there already; give a folder that is not"):
        export_kronfluence(factors, tmp_path / "f", model=model, tokens=TEXTS)
    llama = build("llama")
    export_kronfluence(collect(llama, TEXTS), tmp_path / "g")  # no bias: nothing more is needed
