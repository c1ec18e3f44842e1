"""A folder of the user's own: which architectures are read, and what is refused before a number."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.conftest import ENGLISH, byte_level_tokenizer, frame
from workbench.models import load_model
from workbench.probes.extraction import probe_extraction
from workbench.probes.likelihood import probe_likelihood
from workbench.probes.membership import probe_membership
from workbench.table import InputError

SHAPE = {"vocab_size": 300, "max_position_embeddings": 64}
HEADS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = SHAPE | HEADS | {"intermediate_size": 32, "num_key_value_heads": 2}
ARCHITECTURES = {
    "LlamaForCausalLM": ("LlamaConfig", GATED),
    "Qwen2ForCausalLM": ("Qwen2Config", GATED),
    "Olmo2ForCausalLM": ("Olmo2Config", GATED),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", GATED | {"head_dim": 8}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SHAPE | HEADS | {"intermediate_size": 32}),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 300, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2},
    ),
}


def save(folder, architecture: str, *, bos: bool = False, dtype=torch.float32):
    import transformers

    config, shape = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    module = getattr(transformers, architecture)(getattr(transformers, config)(**shape))
    module.eval().to(dtype).save_pretrained(folder)
    byte_level_tokenizer(ENGLISH, bos=bos).save_pretrained(folder)
    return module.float()


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_probes_of_a_saved_folder_against_the_module_itself(tmp_path, architecture, bos):
    module = save(tmp_path / "mine", architecture, bos=bos)
    model = load_model(tmp_path / "mine")
    items = frame(ENGLISH)
    table = probe_likelihood(model, items)
    got = table[table["metric"] == "log_probability"].set_index("item")["value"]
    for item, text in zip(items["item"], ENGLISH, strict=True):
        # another route: the module's own logits, item by item, its tokenizer adding what it adds
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            log_p = module(ids).logits[0, :-1].log_softmax(-1)
        own = log_p.gather(1, ids[0, 1:, None])[int(bos) :, 0]
        assert got[item] == pytest.approx(own.mean().item(), abs=1e-5)
    assert len(probe_extraction(model, items, prefix=8, suffix=8)) == 5 * len(items)
    assert len(probe_membership(model, items)) == 4 * len(items)


def test_bfloat16_weights_are_computed_with_in_float32(tmp_path):
    module = save(tmp_path / "half", "LlamaForCausalLM", dtype=torch.bfloat16)
    model = load_model(tmp_path / "half")
    assert model.module.dtype == torch.float32
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(model.module.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "above" / "mine", "LlamaForCausalLM")
    return tmp_path / "above" / "mine"


def configure(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(folder) -> str:
    with pytest.raises(InputError) as caught:
        probe_likelihood(load_model(folder), frame(ENGLISH))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert refusal(folder) == (
        f"load_model: {folder} has no tokenizer (none of tokenizer.json, tokenizer_config.json, "
        "vocab.json, tokenizer.model), nor has the folder above; save it there with "
        f"tokenizer.save_pretrained('{folder}')"
    )


def test_the_tokenizer_of_the_folder_above(folder):
    for file in folder.glob("tokenizer*"):
        shutil.move(file, folder.parent)
    assert load_model(folder).encode(["In the"])[0].size > 0


def test_weights_that_lack_a_layer(folder):
    configure(folder, num_hidden_layers=3)
    assert refusal(folder) == (
        f"load_model: the weights in {folder} lack 9 tensors that its config.json asks for "
        "(first: model.layers.2.input_layernorm.weight); they are of another model: save both "
        "together"
    )


def test_weights_of_another_width(folder):
    configure(folder, hidden_size=32)
    assert refusal(folder) == (
        f"load_model: lm_head.weight in {folder} is (300, 16), and (300, 32) in its config.json; "
        "they are of different models: save both together"
    )


def test_weights_that_are_not_used_are_said(folder):
    configure(folder, num_hidden_layers=1)
    with pytest.warns(UserWarning, match=r"^load_model: 9 tensors in .* are not used \(first: "):
        load_model(folder)


def test_a_tokenizer_of_more_tokens_than_the_model(folder):
    byte_level_tokenizer(ENGLISH * 3, 420).save_pretrained(folder)
    assert refusal(folder).startswith("score: token 4")
    assert refusal(folder).endswith(
        "is beyond the model's vocabulary of 300; its tokenizer is another model's, or has had "
        "tokens added"
    )


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
def test_quantized_weights_name_what_is_lacking(folder, method):
    configure(folder, quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    message = refusal(folder)
    assert message.startswith(f"load_model: cannot load {folder}: ") and "pip install" in message


def test_an_adapter_is_not_a_model(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    assert refusal(folder).endswith("it is an adapter: merge it into its model and save that")
