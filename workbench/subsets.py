"""Many small models on random halves of the suite's items, as counterfactual memorization needs.

The runs share text, batches, slots and initial weights with the suite's ``small`` and each other;
of each of its pairs of items each run plants one, drawn at random, so that an item is in a run with
probability 1/2 and the load never differs. Runs come in twos, the second planting what the first
does not: every item is in exactly half of them. They part after a common burn-in.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.cache import damage, damaged, hold, locked, seal, touch
from workbench.suite import Architecture, Specification, Suite, new_module, save_step
from workbench.table import InputError, cache_folder, whole_file, whole_folder

VERSION = 1  # raise it when the same suite gives other numbers
LAGS = (0, 10)  # updates after each wave at which weights are kept


@dataclass
class Subsets(Suite):
    """Trained runs on disk, each read like a run of the suite; ``path`` is their folder."""

    @cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path / self.runs[0])

    def membership(self) -> pd.DataFrame:
        """Which run trained on which item, read from the ledgers.

        Returns:
            ``item, run, inside``, one row for each item and run; items in no run are all False.
        """
        items = pd.read_parquet(self.path / "items.parquet")["item"]
        parts = []
        for run in self.runs:
            met = items.isin(self.exposures(run)["item"])
            parts.append(pd.DataFrame({"item": items, "run": run, "inside": met}))
        return pd.concat(parts, ignore_index=True)

    def passport(self) -> dict:
        """The folder's hash, the suite's and how many runs."""
        made = json.loads((self.path / "passport.json").read_text())
        return {"subsets": self.path.name, **made, "runs": len(self.runs)}


def load_subsets(suite: Suite, *, runs: int = 16, progress: bool = True) -> Subsets:
    """Train small models on random halves of a suite's items; those already cached are not trained.

    Sixteen take about 14 minutes of processor time. An interrupted call goes on where it was, and
    a later one that asks for more runs trains only these.

    Args:
        suite: Its items are planted, in its text, on its schedule.
        runs: How many models, an even number; an item is in half of them. With ``runs`` 16 a
            score that varies by s between runs has an error of s / 2 on its counterfactual.
        progress: Show a bar with the time left.

    Returns:
        Runs ``subset-00``, ``subset-01``, ..., with weights at the end of each wave and ten updates
        later.

    Raises:
        InputError: An odd number of runs, or fewer than four: both groups of an item need two.
    """
    if runs < 4 or runs % 2:
        raise InputError(
            f"load_subsets: runs is {runs}, but must be even and at least 4, so that every item is "
            "in two runs and out of two"
        )
    key = json.dumps({"suite": suite.path.name, "version": VERSION, "lags": LAGS})
    name = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    folder = cache_folder() / "subsets" / name
    names = tuple(f"subset-{number:02d}" for number in range(runs))
    hold(folder)
    if damage(folder) or _lacking(folder, names):
        with locked(folder, "load_subsets"):
            folder.mkdir(parents=True, exist_ok=True)
            for left_over in folder.glob(".subset-*"):
                shutil.rmtree(left_over, ignore_errors=True)  # of a call that was killed
            _remove_damaged(folder)
            _prepare(suite, folder)
            # again: another process may have trained them while this one waited
            if lacking := _lacking(folder, names):
                _train(suite, folder, lacking, progress)
            seal(folder)
    touch(folder)
    return Subsets(folder, corpus=suite.corpus, runs=names)


def _lacking(folder: Path, names: Sequence[str]) -> list[str]:
    return [run for run in names if not (folder / run).is_dir()]


def _remove_damaged(folder: Path) -> None:
    """Remove the runs that are not what was trained; what lies beside them is written anew."""
    for run in sorted({name.split("/")[0] for name in damaged(folder)}):
        if (folder / run).is_dir():
            warnings.warn(
                f"load_subsets: {folder / run} is not what was written; training again",
                stacklevel=3,
            )
            shutil.rmtree(folder / run)


def draw_subset(number: int, *, pairs: int, seed: int) -> np.ndarray:
    """Which half of each pair run ``number`` plants, False the first; odd runs mirror the one before."""
    drawn = np.random.default_rng([seed, 6, number // 2]).random(pairs) < 0.5
    return drawn ^ bool(number % 2)


def _prepare(suite: Suite, folder: Path) -> None:
    """What a suite's folder holds besides runs; the same bytes whoever writes them."""
    spec = {**suite.spec, "steps": _steps(suite.spec)}
    for name, data in (("spec.json", spec), ("passport.json", {"suite": suite.path.name})):
        with whole_file(folder / name) as file:
            file.write_text(json.dumps(data))
    for name in ("items.parquet", "held_out.parquet", "corpus.npy"):
        with whole_file(folder / name) as file:
            shutil.copyfile(suite.path / name, file)


def _steps(spec: dict) -> list[int]:
    after = {end + lag for end in spec["waves"] for lag in LAGS}
    return sorted(step for step in after | {spec["updates"]} if step <= spec["updates"])


def _read_specification(suite: Suite) -> Specification:
    known = {field.name for field in fields(Specification)}
    data = {name: value for name, value in suite.spec.items() if name in known}
    shapes = {name: Architecture(**data[name]) for name in ("base", "small")}
    return Specification(**data | shapes)


def _train(suite: Suite, folder: Path, missing: list[str], progress: bool) -> None:
    """Train the missing runs from one burn-in, each whole in its folder before the next begins."""
    import torch
    from tqdm.auto import tqdm

    from workbench.training import TextStream, Trainer, schedule_exposures, train

    spec = _read_specification(suite)
    items = pd.read_parquet(folder / "items.parquet")
    one = items[items["plant"] == "one"]
    exposures = schedule_exposures(
        one, rows=spec.rows, context=spec.context, length=spec.length, seed=spec.seed
    )
    ids = suite.tokenizer(items["text"].tolist(), add_special_tokens=False)["input_ids"]
    tokens = np.load(folder / "corpus.npy").astype(np.int64)
    stream = TextStream(tokens, spec.rows, spec.context, spec.seed).batch
    shared = spec.first_exposure - 1
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    bar = tqdm(
        total=shared + len(missing) * (spec.updates - shared),
        unit="update",
        disable=not progress,
        mininterval=0.1 if watched else 30.0,  # seconds; a log file wants few lines
    )

    def note(update: int, loss: float) -> None:
        bar.update()

    with torch.random.fork_rng():
        trainer = Trainer(new_module(spec, "small"), spec.learning_rate, spec.warmup)
        train(trainer, stream, until=shared, progress=note)
        fork = trainer.state()
        for run in missing:
            bar.set_description(f"training {run}")
            trainer.restore(fork)
            second = draw_subset(int(run.split("-")[1]), pairs=len(one), seed=spec.seed)
            chosen = np.where(second, one["partner"], one["item"])
            planted = dict(zip(one["item"], chosen, strict=True))
            with whole_folder(folder / run) as unfinished:
                suite.tokenizer.save_pretrained(unfinished)
                ledger = train(
                    trainer,
                    stream,
                    until=spec.updates,
                    exposures=exposures.assign(item=exposures["item"].map(planted)),
                    texts={n: np.asarray(t) for n, t in zip(items["item"], ids, strict=True)},
                    stops=_steps(suite.spec),
                    at_stop=lambda step, at=unfinished: save_step(
                        trainer.module, at / f"step{step:06d}"
                    ),
                    progress=note,
                )
                ledger.to_parquet(unfinished / "ledger.parquet", index=False)
    bar.close()
