"""A model spread over several places by accelerate scores as one that is not."""

import json

import numpy as np
import pytest
import torch

from tests.conftest import ENGLISH, neox
from workbench.models import load_checkpoints, load_model
from workbench.table import InputError

# three blocks: the first in memory, the second and third read from disk as they are needed
SPREAD = {
    "gpt_neox.embed_in": "cpu",
    "gpt_neox.layers.0": "cpu",
    "gpt_neox.layers.1": "disk",
    "gpt_neox.layers.2": "disk",
    "gpt_neox.final_layer_norm": "cpu",
    "lm_head": "disk",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Two checkpoints of a model of three blocks, with weights that differ."""
    run = tmp_path_factory.mktemp("models") / "deep"
    for step in (1, 2):
        neox(step, layers=3).save_pretrained(run / f"step{step}")
    tokenizer.save_pretrained(run)
    return run


def scores(model) -> np.ndarray:
    return model.score(model.encode(ENGLISH), keep=("log_probability",)).log_probability


@pytest.mark.parametrize("device", [SPREAD, json.dumps(SPREAD), {"": "disk"}, "auto"])
def test_a_spread_model_scores_and_hashes_as_a_whole_one(folder, device):
    # the same float32 operations in the same order, only fetched from elsewhere: equal to the bit
    whole, spread = (load_model(folder / "step1", device=d) for d in ("cpu", device))
    np.testing.assert_array_equal(scores(spread), scores(whole))
    assert spread.weights_hash() == whole.weights_hash()
    prompts = np.array([each[:5] for each in whole.encode(ENGLISH)])
    np.testing.assert_array_equal(spread.generate(prompts, 6), whole.generate(prompts, 6))
    ids = whole.encode(ENGLISH[:2])
    with torch.no_grad():
        ours, theirs = (m.logits_at(ids)(torch.tensor([0, 3])) for m in (spread, whole))
    assert torch.equal(ours, theirs)


def test_where_it_lies(folder):
    spread = load_model(folder / "step1", device=SPREAD)
    offloaded = {n for n, p in spread.module.named_parameters() if p.device.type == "meta"}
    on_disk = ("gpt_neox.layers.1.", "gpt_neox.layers.2.", "lm_head.")
    assert offloaded == {n for n, _ in spread.module.named_parameters() if n.startswith(on_disk)}
    assert spread.passport()["device"] == "cpu, disk"
    assert load_model(folder / "step1", device="cpu").passport()["device"] == "cpu"


def test_each_checkpoint_of_a_spread_model_has_its_own_weights(folder):
    # weights that are offloaded cannot be copied into: each step has to be loaded anew
    spread, whole = (load_checkpoints(folder, device=device) for device in (SPREAD, "cpu"))
    for ours, theirs in zip(spread, whole, strict=True):
        np.testing.assert_array_equal(scores(ours), scores(theirs))
        assert ours.weights_hash() == theirs.weights_hash()


def test_what_trains_refuses_a_spread_model(folder):
    model = load_model(folder / "step1", device=SPREAD)
    with pytest.raises(InputError) as error:
        model.copy()
    assert str(error.value) == (
        "copy: deep is spread over cpu, disk and can only be scored there; to train it, load it "
        'with device="cpu" or device="cuda"'
    )


def test_the_environment_places_what_is_not_placed(folder, monkeypatch):
    monkeypatch.setenv("WORKBENCH_DEVICE", json.dumps({"": "disk"}))
    assert load_model(folder / "step1").places == "disk"
    assert load_model(folder / "step1", device="cpu").places == "cpu"


@pytest.mark.parametrize("device", ["gpu", "cuda:99", {"": 99}, '{"": "disc"}', "{"])
def test_a_device_that_is_not_there_is_refused(folder, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    place = {"gpu": "gpu", "cuda:99": "cuda:99", "{": "{"}.get(str(device))
    place = place or (99 if isinstance(device, dict) else "disc")
    with pytest.raises(InputError) as error:
        load_model(folder / "step1", device=device)
    assert str(error.value) == (
        f"load_model: there is no device {place!r} here, there is cpu; give one of them, one of "
        "auto, balanced, balanced_low_0, sequential, or a map of modules to places as JSON"
    )


def test_a_map_of_another_model_is_refused(folder):
    with pytest.raises(InputError) as error:
        load_model(folder / "step1", device={"": "disk", "gpt_neox.layers.3": "cpu"})
    assert str(error.value) == (
        f"load_model: the device map names 'gpt_neox.layers.3', which {folder / 'step1'} does not "
        "have (nearest: 'gpt_neox.layers.2')"
    )
    with pytest.raises(InputError, match="does not give any device for"):
        load_model(folder / "step1", device={"gpt_neox.layers.1": "disk"})
