"""What several test files need: a fake that recites, a tiny folder of weights, a tiny suite."""

from __future__ import annotations

import json
import os

# set before any library reads them: no test may reach for the network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers, and the kernels they start, share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch

from workbench.models import LanguageModel
from workbench.suite import Architecture, Specification, Suite, ensure_suite

# workers, kernels and browsers share the cores: how long an example takes says nothing
hypothesis.settings.register_profile("workbench", deadline=None)
hypothesis.settings.load_profile("workbench")
torch.set_num_threads(1)  # these models are too small to share, and workers run side by side


LONG = ("test_workshop.py", "test_browser.py", "test_engine.py")


def pytest_collection_modifyitems(items) -> None:
    """Notebooks and long files first, or one worker is left with them while the others are done."""
    items.sort(key=lambda item: item.path.suffix != ".ipynb" and item.path.name not in LONG)


class Numbers:
    """A tokenizer for texts such as ``"3 4 5"``: each number is its own id."""

    bos_token_id = None

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, str):
            return {"input_ids": [int(word) for word in text.split()]}
        return {"input_ids": [[int(word) for word in each.split()] for each in text]}

    def decode(self, tokens, clean_up_tokenization_spaces=False):
        return " ".join(map(str, tokens))


class Bigram(torch.nn.Module):
    """Next-token logits are a row of a table; what it recites is therefore known beforehand."""

    def __init__(self, table):
        super().__init__()
        self.head = torch.nn.Linear(*table.shape, bias=False)
        self.head.weight.data = torch.as_tensor(table, dtype=torch.float32).T.contiguous()
        self.config = SimpleNamespace(max_position_embeddings=64)
        self.dtype = torch.float32

    def base_model(self, input_ids, use_cache=False):
        one_hot = torch.nn.functional.one_hot(input_ids, self.head.in_features).float()
        return SimpleNamespace(last_hidden_state=one_hot)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, past_key_values=None, use_cache=False, logits_to_keep=0):
        hidden = self.base_model(input_ids).last_hidden_state
        return SimpleNamespace(logits=self.head(hidden), past_key_values=None)


def bigram(table, *, run: str = "fake", step: int = 0) -> LanguageModel:
    """A model with the given next-token logits, over :class:`Numbers`."""
    return LanguageModel(Bigram(np.asarray(table, float)), Numbers(), run=run, step=step)


def reciter(breaks=(), vocabulary: int = 32) -> LanguageModel:
    """Counts upwards, ``t`` to ``t + 1``, but says 0 after each number in ``breaks``."""
    logits = np.zeros((vocabulary, vocabulary))
    for token in range(vocabulary):
        logits[token, 0 if token in breaks else (token + 1) % vocabulary] = 5.0
    return bigram(logits, run="reciter")


def frame(texts, group="seen", **columns) -> pd.DataFrame:
    """An items frame with ids ``i0, i1, ...``."""
    texts = list(texts)
    names = [f"i{n}" for n in range(len(texts))]
    return pd.DataFrame({"item": names, "text": texts, "group": group, **columns})


def byte_level_tokenizer(texts, vocabulary: int = 300, **special):
    """A byte-level BPE trained on the texts; ``bos=True`` makes it put one before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    names = {"eos_token": "<|end|>"}
    if special.get("bos"):
        names["bos_token"] = "<|begin|>"
        bpe.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def neox(seed: int = 0, *, width: int = 16, layers: int = 1, vocabulary: int = 300, **options):
    """A GPT-NeoX module with random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 64,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(**(shape | options))).eval()


def run_notebook(name: str, **given) -> dict:
    """Run a notebook's code cells here, with parameters; returns its names."""
    path = Path(__file__).parent.parent / "notebooks" / f"{name}.ipynb"
    space: dict = {"display": lambda *shown: None}  # what a kernel has
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
            if "parameters" in cell["metadata"].get("tags", []):
                assert set(given) <= set(space)
                space |= given
    return space


ENGLISH = [
    "In the beginning was the word, and the word was with the reader.",
    "The quick brown fox jumps over the lazy dog while the clerk counts kettles.",
    "It is a truth universally acknowledged that a model in want of text will take any.",
    "Four score and seven years ago our fathers brought forth a new nation.",
    "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea.",
    "All happy families are alike; each unhappy family is unhappy in its own way.",
]


@pytest.fixture(scope="session")
def tokenizer():
    return byte_level_tokenizer(ENGLISH)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer) -> Path:
    """A folder as ``save_pretrained`` writes it: a random GPT-NeoX and a byte-level BPE."""
    folder = tmp_path_factory.mktemp("models") / "tiny-neox"
    neox().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TINY = Specification(
    text="",
    base=Architecture(layers=1, width=32, heads=2),
    small=Architecture(layers=1, width=16, heads=2),
    vocabulary=512,
    context=32,
    rows=8,
    updates=16,
    warmup=2,
    length=16,
    waves=(8, 13),
    span=4,
    doses=((1, 2, (0, 1)), (4, 1, (1,))),
    never=3,
    drip=1,
    drip_dose=12,
    drip_first=5,
    held_out=20,
)


@dataclass(frozen=True)
class Tiny:
    """A tiny suite and what it was made of."""

    suite: Suite
    corpus: str
    cache: Path


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory) -> str:
    """Real English, about 120 kB: the first verses of the World English Bible, one a line."""
    from workbench.suite import passages

    file = tmp_path_factory.mktemp("corpus") / "verses.txt"
    file.write_text("\n".join(passages()[:1000]), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, corpus_file) -> Tiny:
    """The suite at a size that trains in seconds, in a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_CACHE", str(cache))
        path = ensure_suite(corpus_file, TINY, progress=False)
    return Tiny(Suite(path, corpus=corpus_file), corpus_file, cache)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
