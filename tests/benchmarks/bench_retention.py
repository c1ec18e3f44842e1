"""Which share of a study-and-retain run is probing, at the default lags on the default suite.

Run by hand: ``python tests/benchmarks/bench_retention.py [ROUNDS]``. Both shares are given: of the
clock, which other processes disturb, and of processor time, which they hardly do where
``OMP_NUM_THREADS=1``. All that is not an update of the weights counts as probing. Target: 30 %.

Measured with one thread on two busy cores, in processor time, with three kinds of foil: 46 % before
the texts were paired, encoded and cut once for all lags and finished rows left the decoding, 42 %
since, with the same numbers to the last bit. With five kinds 52 %, with one 36 %, with three and no
recall 33 %. What is left is forward passes: with three kinds 336 texts of 46 tokens are scored at
each of 11 askings, 170 thousand tokens, where 110 updates train on 125 thousand, forward and back.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from workbench.foils import make_foils, make_study_lists
from workbench.retention import SUITE_RATE, interference_texts, study_and_retain
from workbench.suite import load_suite
from workbench.training import Trainer

OLD = ["unrelated", "paraphrase", "shuffled"]
ARMS = {
    "three kinds of foil": (OLD, True),
    "three kinds of foil, no recall": (OLD, False),
    "five kinds of foil": (None, True),
    "one kind of foil": (["unrelated"], True),
}


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def share(run: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Seconds of a run, and share of them outside the updates, by the clock and the processor."""
    training, step = [0.0, 0.0], Trainer.step

    def timed(self, *parts):
        began = clocks()
        try:
            return step(self, *parts)
        finally:
            for which, (a, b) in enumerate(zip(began, clocks(), strict=True)):
                training[which] += b - a

    Trainer.step = timed
    try:
        began = clocks()
        run()
        whole = [b - a for a, b in zip(began, clocks(), strict=True)]
    finally:
        Trainer.step = step
    return whole, [1 - t / w for t, w in zip(training, whole, strict=True)]


def main(rounds: int) -> None:
    suite = load_suite()
    checkpoints = suite.checkpoints()
    model = checkpoints.at(checkpoints.steps[-1])
    study, pool, _ = make_study_lists(model, suite.held_out(), n=48, tokens=64, seed=0)
    new = interference_texts(suite, seed=0)
    settings = {"exposures": 10, "learning_rate": SUITE_RATE}
    for _ in range(rounds):
        for name, (kinds, recall) in ARMS.items():
            foils = make_foils(
                study, unrelated=pool["text"], kinds=kinds, model=model, tokens=64, seed=0
            )
            whole, part = share(
                lambda f=foils, r=recall: study_and_retain(
                    model, study, f, new, recall=r, **settings
                )
            )
            print(
                f"{name}: {whole[0]:.1f} s, probing {part[0]:.1%} of it; processor "
                f"{whole[1]:.1f} s, probing {part[1]:.1%}"
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
