"""Facts injected by three schedules, over batch sizes, learning rates and seeds, on the suite.

``python -m tests.benchmarks.fact_arms --seeds 3 --out fact_arms`` takes about six minutes a seed on
two idle cores. Each run is written to the folder, so that it can be stopped and started again, and
started twice to use two cores. It asks of the net gain (injected less never injected): do
paraphrases generalise better than repetition, do repeated facts fall faster, does a larger batch
forget more slowly, and says where an interval over the seeds does not tell.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from scipy import stats

from workbench.facts import make_facts
from workbench.injection import inject_facts
from workbench.plots.facts import plot_effectivity, plot_fact_trace, plot_retainability
from workbench.stats.facts import NET, OVER_ENTITIES, OVER_SEEDS, fact_effects, fact_trace
from workbench.suite import load_suite
from workbench.table import load, save, validate

ARMS = ((4, 3e-3), (8, 3e-3), (16, 3e-3), (4, 1e-3))  # batch and learning rate
ENTITIES = 6  # a schedule
BACKGROUND = 3600  # texts of about 120 tokens: 196 updates of the largest batch


def runs(out: Path, seeds: int) -> pd.DataFrame:
    """The tables of all runs, one after the other; those that another process makes are awaited."""
    plan = [(seed, *arm) for seed in range(seeds) for arm in ARMS]
    while left := [each for each in plan if not place(out, *each).is_file()]:
        for each in left:
            try:
                with FileLock(f"{place(out, *each)}.lock", timeout=0 if each != left[-1] else 60):
                    if not place(out, *each).is_file():
                        one(out, *each)
            except Timeout:
                continue
    tables = [load(place(out, *each)) for each in plan]
    text = {name: str for name in ("metric", "group", "run", "item", "entity")}
    return validate(pd.concat([table.astype(text) for table in tables], ignore_index=True))


def place(out: Path, seed: int, batch: int, rate: float) -> Path:
    return out / f"seed{seed}-batch{batch}-rate{rate:g}.parquet"


def one(out: Path, seed: int, batch: int, rate: float) -> None:
    suite = load_suite()
    source = suite.checkpoints("base")
    injection = inject_facts(
        source.at(source.steps[-1]),
        make_facts(ENTITIES, seed=seed),
        suite.corpus_texts(BACKGROUND, seed=seed),
        learning_rate=rate,
        batch=batch,
        seed=seed,
        progress=True,
    )
    passport = injection.table.attrs["passport"]
    save(injection.table, place(out, seed, batch, rate), passport=passport)


def contrast(told: str, one: pd.Series, other: pd.Series) -> None:
    """Mean over seeds of the difference, with Student's interval, and what it tells."""
    apart = (one - other).dropna()
    n = len(apart)
    if n < 2:
        print(f"  {told}: defined in {n} seeds, so not told")
        return
    half = stats.t.ppf(0.975, n - 1) * apart.std(ddof=1) / np.sqrt(n)
    verdict = (
        "yes" if apart.mean() > half else "no, the reverse" if apart.mean() < -half else "not told"
    )
    print(f"  {told}: {apart.mean():+.3f} +- {half:.3f}, {n} seeds: {verdict}")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--seeds", type=int, default=3)
    ask.add_argument("--out", type=Path, default=Path("fact_arms"))
    chosen = ask.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    table = runs(chosen.out, chosen.seeds)
    effects = fact_effects(table)
    save(effects, chosen.out / "effects.parquet", passport={"seeds": chosen.seeds})
    net = effects[effects["group"] == NET]
    over = net[(net["over"] == OVER_SEEDS) & net["slot"].isna()]
    arm = ["batch", "learning_rate"]
    for metric, at in (("effectivity", None), ("gain", 0), ("gain", 70), ("decay_constant", None)):
        part = over[(over["metric"] == metric) & (True if at is None else over["t"] == at)]
        told = part["value"].round(3).astype(str) + " [" + part["lo"].round(3).astype(str)
        part = part.assign(told=told + ", " + part["hi"].round(3).astype(str) + "]")
        wide = part.pivot(index=[*arm, "schedule"], columns="depth", values="told")
        print(f"\nnet {metric}{'' if at is None else f' at t = {at}'}\n{wide.to_string()}")

    each = net[(net["over"] == OVER_ENTITIES) & net["slot"].isna()]

    def by_seed(metric, depth, schedule, batch=4, rate=3e-3, t=None) -> pd.Series:
        part = each[(each["metric"] == metric) & (each["depth"] == depth)]
        part = part[(part["schedule"] == schedule) & (part["batch"] == batch)]
        part = part[(part["learning_rate"] == rate) & (True if t is None else part["t"] == t)]
        return part.set_index("seed")["value"]

    print("\nDo paraphrases generalise better? net gain at 0, paraphrased - repeated")
    for depth in ("verbatim", "paraphrase", "composition"):
        pair = [by_seed("gain", depth, s, t=0) for s in ("paraphrased", "repeated")]
        contrast(depth, *pair)
    print("Do repeated facts fall faster? decay constant, repeated - paraphrased")
    for depth in ("verbatim", "paraphrase"):
        pair = [by_seed("decay_constant", depth, s) for s in ("repeated", "paraphrased")]
        contrast(depth, *pair)
    print("Is a larger batch slower to forget? decay constant of repeated, verbatim, 4 - larger")
    for batch in (8, 16):
        contrast(f"4 - {batch}", by_seed("decay_constant", "verbatim", "repeated"),
                 by_seed("decay_constant", "verbatim", "repeated", batch=batch))  # fmt: skip
    print("Does a lower rate forget more slowly? decay constant of repeated, verbatim, 3e-3 - 1e-3")
    contrast("3e-3 - 1e-3", by_seed("decay_constant", "verbatim", "repeated"),
             by_seed("decay_constant", "verbatim", "repeated", rate=1e-3))  # fmt: skip
    print("Does a larger batch learn less? net gain at 0 of repeated, verbatim, 4 - larger")
    for batch in (8, 16):
        contrast(f"4 - {batch}", by_seed("gain", "verbatim", "repeated", t=0),
                 by_seed("gain", "verbatim", "repeated", batch=batch, t=0))  # fmt: skip
    first = table[(table["batch"] == 4) & (table["learning_rate"] == 3e-3) & (table["seed"] == 0)]
    plot_fact_trace(fact_trace(first)).write_html(chosen.out / "trace.html")
    shown = effects[(effects["batch"] == 4) & (effects["learning_rate"] == 3e-3)]
    shown = shown[shown["over"] == OVER_SEEDS]
    plot_effectivity(shown).write_html(chosen.out / "effectivity.html")
    plot_retainability(shown).write_html(chosen.out / "retainability.html")


if __name__ == "__main__":
    main()
