"""Coverage and size of the causal profile: ``python -m tests.benchmarks.simulate_profile [PANELS]``.

Panels with known effects are drawn again and again. A band covers where it holds every row's truth
at once (simultaneous) or each row's alone (pointwise); under parallel trends the p-values of placebo
cells and of the pre-trend tests are uniform (Kolmogorov-Smirnov) and lie below .05 in 5 % of panels.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from workbench.stats.profile import BY, memorization_profile, pretrend_test

STEPS = np.array([2, 4, 6, 8, 10, 12])
STARTS = (5, 7, 9)


@dataclass(frozen=True)
class Design:
    name: str
    sizes: tuple[int, ...]  # items of each cohort in STARTS, then the never-trained
    cluster: int = 1  # items to a cluster
    holes: float = 0.0
    walk: bool = True  # errors of an item add up over checkpoints; else they are independent


DESIGNS = (
    Design("100 an item group, 200 controls", (100, 100, 100, 200)),
    Design("the same, errors independent over checkpoints", (100, 100, 100, 200), walk=False),
    Design("the same, 5 % holes", (100, 100, 100, 200), holes=0.05),
    Design("400 an item group in clusters of 4", (400, 400, 400, 800), cluster=4),
    Design("40 an item group, 40 controls", (40, 40, 40, 40)),
)
FEW = (
    Design("4 an item group, 40 controls", (4, 4, 4, 40)),
    Design("2 to 6 an item group, 40 controls", (2, 4, 6, 40)),
    Design("4 treated, 40 controls", (4, 0, 0, 40)),
)


def draw(design: Design, seed: int) -> pd.DataFrame:
    """An effect of 0.7 throughout, so that every row of every aggregate has the truth 0.7 or 0."""
    rng = np.random.default_rng(seed)
    cohort = np.repeat([*map(float, STARTS), np.nan], design.sizes)
    items, size = len(cohort), design.cluster
    value = rng.normal(size=(items, 1)) + _errors(rng, items, design)
    if size > 1:
        value = value + np.repeat(_errors(rng, -(-items // size), design), size, axis=0)[:items]
    value = value + 0.7 * (cohort[:, None] <= STEPS)
    value[rng.random(value.shape) < design.holes] = np.nan
    item = np.repeat(np.arange(items), len(STEPS))
    return pd.DataFrame(
        {
            "item": item,
            "step": np.tile(STEPS, items),
            "value": value.ravel(),
            "cohort": np.repeat(cohort, len(STEPS)),
            "document": item // size,
        }
    )


def _errors(rng: np.random.Generator, items: int, design: Design) -> np.ndarray:
    error = rng.normal(size=(items, len(STEPS)))
    return error.cumsum(axis=1) if design.walk else error


def covered(design: Design, panels: int, **options) -> tuple[float, float]:
    """Share of panels whose band holds all truths at once, and of rows whose band holds theirs."""
    at_once, alone = [], []
    for seed in range(panels):
        got = memorization_profile(
            draw(design, seed),
            cluster="document" if design.cluster > 1 else None,
            draws=499,
            seed=seed,
            **options,
        )
        truth = np.where(got["metric"] == "placebo", 0.0, 0.7)
        inside = (got["lo"] <= truth) & (truth <= got["hi"])
        at_once.append(inside.all())
        alone.append(inside.mean())
    return float(np.mean(at_once)), float(np.mean(alone))


def p_values(design: Design, panels: int) -> pd.DataFrame:
    """Of one placebo cell, the Wald test and the max-t test, one row a panel."""
    found = []
    for seed in range(panels):
        table, cluster = draw(design, seed), "document" if design.cluster > 1 else None
        cells = memorization_profile(table, simultaneous=False, cluster=cluster)
        cell = cells[cells["metric"] == "placebo"].iloc[seed % 6]
        tests = pretrend_test(table, cluster=cluster, draws=499, seed=seed)
        found.append(
            {
                "placebo cell": 2 * stats.norm.sf(abs(cell["value"] / cell["se"])),
                "Wald": tests["value"].iloc[1],
                "max-t": tests["value"].iloc[2],
            }
        )
    return pd.DataFrame(found)


def main(panels: int = 1000) -> None:
    print(f"{panels} panels a design; a coverage of .95 has a standard error of "
          f"{np.sqrt(0.95 * 0.05 / panels):.4f}")  # fmt: skip
    for design in DESIGNS:
        print(f"\n{design.name}: coverage of simultaneous 95 % bands")
        told = {by: covered(design, panels, by=by)[0] for by in BY}
        print("   " + ", ".join(f"{by} {share:.3f}" for by, share in told.items()))
        p = p_values(design, panels)
        for name, column in p.items():
            print(f"   {name}: below .05 in {np.mean(column < 0.05):.3f} of panels, "
                  f"Kolmogorov-Smirnov p = {stats.kstest(column, 'uniform').pvalue:.3f}")  # fmt: skip
    for design in FEW:
        print(f"\n{design.name}: coverage of 95 % bands, pointwise and simultaneous")
        for quantile in ("normal", "t"):
            for by in BY:
                alone = covered(design, panels, by=by, quantile=quantile, simultaneous=False)[1]
                at_once = covered(design, panels, by=by, quantile=quantile)[0]
                print(f"   {quantile}, {by}: {alone:.3f} {at_once:.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
