"""What recording costs a transformers Trainer: with the callback against without, in turn.

``python tests/benchmarks/bench_recorder.py [updates]``: the suite's base is tuned on verses by a
Trainer, with and without a RetentionCallback at the default lags and budget; each round makes both
and the least time of each counts. Printed: the ratio, the share that the recorder itself measured,
and what the budget left out.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from transformers import Trainer, TrainingArguments

from workbench import RetentionCallback, RetentionRecorder, load_suite

UPDATES, ROUNDS, TEXTS, TOKENS, BATCH = 200, 3, 40, 32, 16


def main(updates: int) -> None:
    suite = load_suite()
    base = suite.checkpoints("base").at(suite.spec["steps"][-1])
    items = suite.held_out(2 * TEXTS).assign(group=np.repeat(["studied", "control"], TEXTS))
    encoded = base.encode(items.loc[items["group"] == "studied", "text"].tolist())
    data = [
        {"input_ids": ids[:TOKENS].tolist(), "labels": ids[:TOKENS].tolist()} for ids in encoded
    ]

    def tune(budget: float | None) -> tuple[float, RetentionRecorder | None]:
        module = copy.deepcopy(base.module).requires_grad_(True)
        with tempfile.TemporaryDirectory() as folder:
            recorder, callbacks = None, []
            if budget is not None:
                recorder = RetentionRecorder(
                    module,
                    items,
                    tokenizer=base.tokenizer,
                    folder=Path(folder) / "r",
                    budget=budget,
                )
                callbacks = [RetentionCallback(recorder)]
            arguments = TrainingArguments(
                output_dir=folder, max_steps=updates, per_device_train_batch_size=BATCH,
                learning_rate=1e-4, report_to=[], disable_tqdm=True, save_strategy="no",
                logging_strategy="no", use_cpu=True,
            )  # fmt: skip
            trainer = Trainer(model=module, args=arguments, train_dataset=data, callbacks=callbacks)
            start = time.perf_counter()
            trainer.train()
            return time.perf_counter() - start, recorder

    ways = {"without": None, "budget .10": 0.10, "budget .30": 0.30}
    best, last = dict.fromkeys(ways, np.inf), {}
    for _ in range(ROUNDS):
        for name, budget in ways.items():
            seconds, recorder = tune(budget)
            if seconds < best[name]:
                best[name], last[name] = seconds, recorder
    print(f"{updates} updates of {BATCH} x {TOKENS} tokens, {len(items)} items at each probe")
    for name, seconds in best.items():
        line = f"  {name:10s} {seconds:7.2f} s   ratio {seconds / best['without']:5.3f}"
        if (recorder := last[name]) is not None:
            lost = int(recorder.skipped["made"].isna().sum())
            line += (
                f"   share {recorder.overhead:.3f}   probes at {recorder.steps}, {lost} left out"
            )
        print(line)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else UPDATES)
