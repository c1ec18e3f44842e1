"""probe_extraction against a bare forward pass and against generate.

``python tests/benchmarks/bench_extraction.py [MODEL] [--batch 50]``: without a model the suite's
larger one; both baselines run in turn with the probe, and the least time of each counts. Below,
what scoring under sampling schemes costs beside scoring alone, as a ratio of processor time.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
import torch

from workbench import Decoding, load_model, load_suite, probe_extraction
from workbench.models import TOKENS_PER_BATCH, LanguageModel
from workbench.suite import passages

PREFIX = SUFFIX = 50
ROUNDS = 5
SCHEMES = (Decoding(), Decoding(temperature=0.7), Decoding(top_k=40), Decoding(top_p=0.9))


def texts_of(model: LanguageModel, n: int) -> np.ndarray:
    """``n`` windows of real text whose tokens survive decoding, ``[item, PREFIX + SUFFIX]``."""
    length = PREFIX + SUFFIX
    (tokens,) = model.encode([" ".join(passages()[:4000])])
    windows = tokens[: len(tokens) // length * length].reshape(-1, length)
    kept = [w for w in windows[: 3 * n] if np.array_equal(model.encode([model.decode(w)])[0], w)]
    return np.stack(kept[:n])


def bare_forward(model: LanguageModel, tokens: np.ndarray, batch: int) -> None:
    with torch.inference_mode():
        for at in range(0, len(tokens), batch):
            model.module(input_ids=torch.from_numpy(tokens[at : at + batch]), use_cache=False)


def generated(model: LanguageModel, tokens: np.ndarray, batch: int) -> np.ndarray:
    """Verdicts of transformers' own greedy decoding."""
    verdicts = []
    for at in range(0, len(tokens), batch):
        prompt = torch.from_numpy(tokens[at : at + batch, :PREFIX])
        said = model.module.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=SUFFIX,
            min_new_tokens=SUFFIX,
            do_sample=False,
            pad_token_id=0,
        )
        verdicts.append(said[:, PREFIX:].numpy() == tokens[at : at + batch, PREFIX:])
    return np.concatenate(verdicts).all(axis=1)


def scheme_costs(model: LanguageModel, tokens: np.ndarray) -> None:
    """Least processor time of scoring with schemes, over that without, rounds in turn."""
    asked = {"none": (), **{scheme.name: (scheme,) for scheme in SCHEMES}, "all four": SCHEMES}
    best = dict.fromkeys(asked, np.inf)
    for _ in range(ROUNDS):
        for name, schemes in asked.items():
            start = time.process_time()
            model.score(tokens, start=PREFIX, schemes=schemes)
            best[name] = min(best[name], time.process_time() - start)
    print(f"  scoring {len(tokens)} texts under schemes, over scoring them alone:")
    for name, seconds in best.items():
        print(f"  {name:24s} {seconds:7.3f} s   {seconds / best['none']:5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--items", type=int, default=200)
    asked = parser.parse_args()
    if asked.model:
        model = load_model(asked.model, device="cpu")
    else:
        checkpoints = load_suite().checkpoints("base")
        model = checkpoints.at(checkpoints.steps[-1])
    model.module.generation_config.eos_token_id = None  # an end of text must not stop it
    tokens = texts_of(model, asked.items)
    items = pd.DataFrame({"text": [model.decode(t) for t in tokens], "group": "seen"})
    items.insert(0, "item", [f"i{n}" for n in range(len(items))])
    same_batch = TOKENS_PER_BATCH["cpu"] // (PREFIX + SUFFIX)
    got: dict[str, object] = {}
    ways = {
        "probe_extraction": lambda: probe_extraction(model, items, prefix=PREFIX, suffix=SUFFIX),
        "bare forward pass": lambda: bare_forward(model, tokens, same_batch),
        f"generate, batch {asked.batch}": lambda: generated(model, tokens, asked.batch),
    }
    best = dict.fromkeys(ways, np.inf)
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            got[name] = way()
            best[name] = min(best[name], time.perf_counter() - start)
    table, verdicts = got["probe_extraction"], got[f"generate, batch {asked.batch}"]
    ours = table[table["metric"] == "extractable"].set_index("item")["value"]
    assert (ours.loc[items["item"]].to_numpy() == verdicts).all(), "verdicts differ"
    print(f"{model.run}, {len(items)} items of {PREFIX} + {SUFFIX} tokens, verdicts identical")
    mine = best["probe_extraction"]
    for name, seconds in best.items():
        print(f"  {name:24s} {seconds:7.3f} s   probe / it {mine / seconds:5.2f}   "
              f"it / probe {seconds / mine:5.2f}")  # fmt: skip
    scheme_costs(model, tokens)


if __name__ == "__main__":
    main()
