"""A sweep of checkpoints against reading the weights and one forward pass each.

``python tests/benchmarks/bench_sweep.py``: over the suite's larger run, nothing cached; both run
in turn, and the least time of each counts.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from workbench import load_suite, probe_extraction
from workbench.models import TOKENS_PER_BATCH

PREFIX = SUFFIX = 16
ROUNDS = 5
EVERY = 5  # of the run's checkpoints one in five


def main() -> None:
    suite = load_suite()
    items = suite.items("base")
    steps = suite.checkpoints("base").steps[::EVERY]
    first = suite.checkpoints("base").at(0)

    def chosen():
        return suite.checkpoints("base").select(steps)

    tokens = np.stack(first.encode(items["text"].tolist()))
    batch = TOKENS_PER_BATCH["cpu"] // tokens.shape[1]

    def sweep() -> None:
        with tempfile.TemporaryDirectory() as empty:
            os.environ["WORKBENCH_CACHE"] = empty
            probe_extraction(chosen(), items, prefix=PREFIX, suffix=SUFFIX)

    def bare() -> None:
        with torch.inference_mode():
            for _, source, _ in chosen().places:
                first.module.load_state_dict(load_file(Path(source) / "model.safetensors"))
                for at in range(0, len(tokens), batch):
                    ids = torch.from_numpy(tokens[at : at + batch])
                    first.module(input_ids=ids, use_cache=False)

    def loading() -> None:  # the first checkpoint makes the module; it is no part of the ratio
        suite.checkpoints("base").at(0)

    ways = {"sweep": sweep, "read weights + forward": bare, "making the module once": loading}
    best = dict.fromkeys(ways, np.inf)
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    print(f"{len(steps)} checkpoints, {len(items)} items of {tokens.shape[1]} tokens")
    for name, seconds in best.items():
        print(f"  {name:24s} {seconds:7.3f} s   sweep / it {best['sweep'] / seconds:5.2f}")


if __name__ == "__main__":
    main()
