"""The steps of a run, through one module."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ENGLISH, neox
from workbench.models import Checkpoints, load_checkpoints, load_model, read_weights
from workbench.table import InputError


def series(folder, tokenizer, names, make=lambda seed: neox(seed), above=True):
    """Folders of checkpoints with other weights each; the tokenizer one folder up or in each."""
    for seed, name in enumerate(names):
        make(seed).save_pretrained(folder / name)
        if not above:
            tokenizer.save_pretrained(folder / name)
    if above:
        tokenizer.save_pretrained(folder)
    return folder


def scored(model):
    return model.score(model.encode(ENGLISH)).log_probability


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("runs") / "my-run"
    return series(folder, tokenizer, ["step000010", "step000002", "step000100"])


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize(
    "names", [["step0", "step20", "step3"], ["checkpoint-5", "checkpoint-100", "checkpoint-20"]]
)
def test_folders_are_read_in_the_order_of_their_steps(tmp_path, tokenizer, names, above):
    folder = series(tmp_path / "r", tokenizer, names, above=above)
    (folder / "logs").mkdir()  # as the Trainer leaves beside its checkpoints
    checkpoints = load_checkpoints(folder)
    by_step = {int(name.lstrip("chekpointsf-")): name for name in names}
    assert checkpoints.steps == sorted(by_step) and len(checkpoints) == 3
    for model in checkpoints:
        assert (model.run, model.source) == ("r", str(folder / by_step[model.step]))
        np.testing.assert_array_equal(scored(model), scored(load_model(model.source)))


def test_one_module_holds_all_steps(run):
    seen, pointers, hashes = [], [], []
    for model in load_checkpoints(run):
        seen.append(id(model.module))
        pointers.append([p.data_ptr() for p in model.module.parameters()])
        hashes.append(model.weights_hash())
    assert len(set(seen)) == 1
    assert pointers[0] == pointers[1] == pointers[2]  # the very memory is reused
    assert len(set(hashes)) == 3


def test_scores_of_an_earlier_step_stay(run):
    checkpoints = load_checkpoints(run)
    first = scored(checkpoints.at(2)).copy()
    scored(checkpoints.at(100))
    np.testing.assert_array_equal(scored(checkpoints.at(2)), first)


def test_select_and_at(run):
    checkpoints = load_checkpoints(run)
    assert checkpoints.select([100, 2]).steps == [2, 100]
    with pytest.raises(InputError) as error:
        checkpoints.select([2, 7])
    assert str(error.value) == "select: no checkpoint at step 7; there are [2, 10, 100]"
    with pytest.raises(InputError) as error:
        checkpoints.at(3)
    assert str(error.value) == "at: no checkpoint at step 3; there are [2, 10, 100]"
    assert repr(checkpoints) == "Checkpoints(run='my-run', steps=[2, 10, 100])"


def test_a_single_model_is_a_run_of_one_checkpoint(model_folder):
    checkpoints = load_checkpoints(model_folder)
    assert checkpoints.steps == [0] and checkpoints.run == "tiny-neox"
    (model,) = checkpoints
    np.testing.assert_array_equal(scored(model), scored(load_model(model_folder)))


def test_a_final_model_beside_its_checkpoints_is_one_model(tmp_path, tokenizer):
    # what the Trainer leaves after save_model(): the folder's own model is the run's answer
    folder = series(tmp_path / "r", tokenizer, ["checkpoint-1"])
    neox(9).save_pretrained(folder)
    assert load_checkpoints(folder).steps == [0]


def test_tied_weights_are_stored_once_and_read_back(tmp_path, tokenizer):
    def tied(seed):
        return neox(seed, tie_word_embeddings=True)

    folder = series(tmp_path / "r", tokenizer, ["step1", "step2"], tied)
    assert "embed_out.weight" not in load_file(folder / "step1" / "model.safetensors")
    modules = set()
    for model in load_checkpoints(folder):
        modules.add(id(model.module))
        np.testing.assert_array_equal(scored(model), scored(load_model(model.source)))
    assert len(modules) == 1


def test_sharded_weights(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "r")
    for step in (1, 2):
        neox(step).save_pretrained(tmp_path / "r" / f"step{step}", max_shard_size="10KB")
    shards = list((tmp_path / "r" / "step1").glob("model-*.safetensors"))
    assert len(shards) > 1
    modules = set()
    for model in load_checkpoints(tmp_path / "r"):
        modules.add(id(model.module))
        np.testing.assert_array_equal(scored(model), scored(load_model(model.source)))
    assert len(modules) == 1


@pytest.mark.parametrize("change", [{"width": 32}, {"layers": 2}, {"num_attention_heads": 4}])
def test_a_changed_architecture_is_loaded_anew(tmp_path, tokenizer, change):
    def grown(seed):
        return neox(seed, **(change if seed == 1 else {}))

    folder = series(tmp_path / "r", tokenizer, ["step1", "step2", "step3"], grown)
    for model in load_checkpoints(folder):
        np.testing.assert_array_equal(scored(model), scored(load_model(model.source)))


def test_read_weights_leaves_a_module_that_does_not_fit_unchanged(tmp_path):
    neox(1, layers=2).save_pretrained(tmp_path / "deep")
    neox(1, width=32).save_pretrained(tmp_path / "wide")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    module = neox(0)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    for name in ("deep", "wide", "empty", "torn"):
        assert not read_weights(module, tmp_path / name), name
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    # and the other way round: fewer tensors than the module has would leave some as they were
    deep = neox(0, layers=2)
    neox(1).save_pretrained(tmp_path / "shallow")
    assert not read_weights(deep, tmp_path / "shallow")


def test_the_fingerprint_follows_weights_and_steps(run, tmp_path):
    one = load_checkpoints(run)
    assert one.fingerprint() == load_checkpoints(run).fingerprint()
    assert one.fingerprint() != one.select([2, 10]).fingerprint()
    copy = tmp_path / "my-run"
    shutil.copytree(run, copy)
    assert load_checkpoints(copy).fingerprint() == one.fingerprint()  # moved is not changed
    file = copy / "step000010" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert load_checkpoints(copy).fingerprint() != one.fingerprint()
    assert load_checkpoints(run, dtype="bfloat16").fingerprint() != one.fingerprint()


def test_load_checkpoints_refusals(tmp_path, run, tokenizer):
    folder = series(tmp_path / "r", tokenizer, ["step1", "step01"])
    with pytest.raises(InputError) as error:
        load_checkpoints(folder)
    assert str(error.value) == f"load_checkpoints: {folder} has several folders for step 1"
    torn = tmp_path / "torn"
    shutil.copytree(run, torn)
    (torn / "step000010" / "model.safetensors").unlink()
    with pytest.raises(InputError) as error:
        load_checkpoints(torn)
    assert str(error.value) == (
        f"load_model: {torn / 'step000010'} has a config.json but no *.safetensors weights"
    )
    (torn / "step000010" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="^load_model: cannot load .*step000010: "):
        list(load_checkpoints(torn))
    with pytest.raises(InputError) as error:
        load_checkpoints("a/b", revisions=["step1", "main"])
    assert str(error.value) == "load_checkpoints: revision 'main' does not end in its step"


def test_hub_revisions_are_steps():
    checkpoints = load_checkpoints("EleutherAI/no-such-model", revisions=["step512", "step0"])
    assert checkpoints.steps == [0, 512] and checkpoints.run == "EleutherAI/no-such-model"
    assert checkpoints.places[0] == (0, "EleutherAI/no-such-model", "step0")
    with pytest.raises(InputError, match="neither a folder here nor a hub id"):
        checkpoints.at(0)


def test_each_hub_revision_is_loaded(monkeypatch, tokenizer):
    # what a revision holds cannot be fetched here: a fake loader says what it was asked for
    import workbench.models as models

    asked = []

    def fake(source, *, revision, device, dtype):
        asked.append((source, revision))
        return models.LanguageModel(neox(), tokenizer, run="x", source=source)

    monkeypatch.setattr(models, "load_model", fake)
    places = [(1, "a/b", "step1"), (2, "a/b", "step2")]
    got = list(Checkpoints(places, run="a/b", options={"device": None, "dtype": "float32"}))
    assert asked == [("a/b", "step1"), ("a/b", "step2")]
    assert [m.revision for m in got] == ["step1", "step2"] and [m.step for m in got] == [1, 2]


def test_weights_of_another_dtype_are_read_as_asked(tmp_path, tokenizer):
    folder = series(
        tmp_path / "r", tokenizer, ["step1", "step2"], lambda s: neox(s).to(torch.bfloat16)
    )
    assert json.loads((folder / "step1" / "config.json").read_text())["dtype"] == "bfloat16"
    for model in load_checkpoints(folder):
        assert model.module.dtype == torch.float32
        np.testing.assert_array_equal(scored(model), scored(load_model(model.source)))


def test_memory_is_that_of_one_model(tmp_path, tokenizer):
    # 8 checkpoints of 4 MB: measured in a process of its own, reading all of them must add less
    # than two of them (safetensors are mapped, and let go)
    import subprocess
    import sys

    pytest.importorskip("resource")
    folder = series(
        tmp_path / "r",
        tokenizer,
        [f"step{n}" for n in range(8)],
        lambda s: neox(s, width=256, vocabulary=1200),
    )
    size = (folder / "step0" / "model.safetensors").stat().st_size
    code = f"""
import resource, sys
from workbench.models import load_checkpoints
models = iter(load_checkpoints({str(folder)!r}))
next(models); next(models)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for model in models: pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert int(out) < 2 * size, (int(out), size)
