"""Tiny models, texts, factors and bases that the tests of the curvature share."""

from __future__ import annotations

import warnings

import numpy as np
import torch
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
from workbench import factors as fc
from workbench.models import LanguageModel

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


def collect(model: LanguageModel, tokens, **options) -> fc.Factors:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few tokens; tested on its own
        return fc.collect_factors(model, tokens, **({"dtype": "float64"} | options))


def random_basis(out: int = 6, width: int = 5, *, seed: int = 0, rotate: bool = False) -> cv.Basis:
    """A basis of one torch layer with random factors; the layer is a plain float64 Linear."""
    torch.manual_seed(seed)
    module = torch.nn.Linear(width, out, bias=False).double()
    layer = fc.Layer("layer", 0, "mlp.up", module)
    a, g = torch.randn(40, width).double(), torch.randn(40, out).double()
    return cv.decompose(
        fc.Factors((layer,), {"layer": a.T @ a / 40}, {"layer": g.T @ g / 40}, 40, "gold", 0)
    )[0]


KINDS = ("neox", "gpt2", "llama")
