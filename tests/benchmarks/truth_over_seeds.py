"""Is the causal estimate right, and its error? The suite trained with several seeds, twins and all.

``python -m tests.benchmarks.truth_over_seeds --seeds 5`` trains what is not cached (about three
minutes a seed on two idle cores), and writes ``truth_over_seeds.parquet``, figures and a summary.
It can be stopped and started again at any time. Seed 0 is the suite that everything else uses.

Estimates are held to three truths: the twin's effect on the same texts (``interval`` normal and t:
does the reported interval hold it?), the same with the error that such a comparison has
(``difference``), and the mean effect in the other seeds, on other texts (``others``).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from workbench.plots.truth import plot_coverage
from workbench.probes.extraction import probe_extraction
from workbench.stats.effects import calibration, compare_with_truth, truth_of_others, twin_effects
from workbench.stats.exposure import align_exposures
from workbench.stats.profile import profile_by
from workbench.suite import GEOMETRIC, Architecture, Suite, load_suite, specification
from workbench.table import rows, save

CELL = ["kind", "dose", "lag"]
LEAST = Architecture(layers=1, width=8, heads=1)  # the run `small` is not looked at here


def load_seed(seed: int) -> Suite:
    default = specification()
    return load_suite(size=replace(default, seed=seed, small=LEAST) if seed else default)


def panel(suite: Suite, run: str) -> pd.DataFrame:
    items = suite.items(run)
    table = probe_extraction(suite.checkpoints(run), items, prefix=16, suffix=16)
    return align_exposures(table[table["metric"] == "log_probability"], suite.exposures(run))


def compare(base: pd.DataFrame, twin: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Cells of one seed, once for each kind of interval."""
    outcome = base[base["group"].isin(["seen", "never"])]
    truth = twin_effects(outcome, twin)
    truth = truth[truth["copies"] == truth["dose"]]
    parts = []
    for quantile in ("normal", "t"):
        profile = profile_by(
            outcome, strata=["kind"], by="lag", quantile=quantile, simultaneous=False
        )
        effects = profile[(profile["metric"] == "memorization") & profile["lag"].isin(GEOMETRIC)]
        cells = compare_with_truth(effects, truth, panel=outcome, on=CELL, strata=["kind"])
        parts.append(cells.assign(interval=quantile, seed=seed))
    last = parts[-1]
    half = stats.t.ppf(0.975, last["freedom"]) * last["se_difference"]
    ends = {"lo": last["estimate"] - half, "hi": last["estimate"] + half}
    difference = last.assign(interval="difference", se=last["se_difference"], **ends)
    return pd.concat([*parts, difference.assign(covered=last["inside"])])


def controls(base: pd.DataFrame, twin: pd.DataFrame, seed: int) -> pd.DataFrame:
    """What the planted texts did to texts of their kind that were in no batch, and how alike in both runs."""
    first = min(base["cohort"].min(), twin["cohort"].min())
    found = []
    for kind in base["kind"].unique():
        one, two = (
            t[(t["group"] == "never") & (t["kind"] == kind)].pivot(
                index="item", columns="step", values="value"
            )
            for t in (base, twin)
        )
        before = max(step for step in one if step < first)
        rise = (one[one.columns[-1]] - one[before]).mean()
        late = [step for step in one if step > first]
        apart = (one[late] - two[late]).mean()
        found.append(
            {"kind": kind, "seed": seed, "rise": rise, "apart": np.sqrt((apart**2).mean())}
        )
    return pd.DataFrame(found)


def summary(cells: pd.DataFrame) -> pd.DataFrame:
    parts = []
    for told, by in (
        ("all", []),
        ("kind", ["kind"]),
        ("dose", ["dose"]),
        ("lag", ["lag"]),
        ("kind and dose", ["kind", "dose"]),
        ("kind and lag", ["kind", "lag"]),
    ):
        for interval, part in cells.groupby("interval"):
            pooled = calibration(part, on=CELL, by=by, over="seed")
            parts.append(pooled.assign(split=told, interval=interval))
    return pd.concat(parts, ignore_index=True)


def show(table: pd.DataFrame, by: list[str], split: str) -> None:
    part = table[table["split"] == split].assign(
        of=lambda t: t["metric"].astype(str) + " " + t["interval"].astype(str)
    )
    wide = part.pivot_table(index=by or ["split"], columns="of", values="value", observed=True)
    columns = [
        "bias t", "error_ratio normal", "error_ratio t", "error_ratio difference",
        "coverage normal", "coverage t", "coverage difference", "coverage others normal",
        "coverage others t", "power t",
    ]  # fmt: skip
    wide = wide[columns]
    wide.columns = [
        name.replace("error_ratio", "sd/se").replace("coverage", "cov") for name in columns
    ]
    print(f"\nby {split}\n{wide.round(3).to_string()}")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--seeds", type=int, default=5)
    ask.add_argument("--out", type=Path, default=Path("truth_over_seeds"))
    chosen = ask.parse_args()
    cells, never = [], []
    for seed in range(chosen.seeds):
        suite = load_seed(seed)
        base, twin = panel(suite, "base"), panel(suite, "twin")
        cells.append(compare(base, twin, seed))
        never.append(controls(base, twin, seed))
    found = pd.concat(cells, ignore_index=True)
    held = [
        truth_of_others(found[found["interval"] == name], on=CELL).assign(interval=f"others {name}")
        for name in ("normal", "t")
    ]
    found = pd.concat([found, *held], ignore_index=True)
    table = summary(found)
    chosen.out.mkdir(parents=True, exist_ok=True)
    save(table, chosen.out / "truth_over_seeds.parquet", passport={"seeds": chosen.seeds})
    estimates = rows("memorization", found["estimate"], run="base", lo=found["lo"], hi=found["hi"],
                     n=found["n"], beside={name: found[name].to_numpy() for name in
                     [*CELL, "seed", "interval", "se"]}).assign(truth=found["truth"])  # fmt: skip
    save(estimates, chosen.out / "cells.parquet", passport={"seeds": chosen.seeds})
    for split, by in (("all", []), ("kind", ["kind"]), ("dose", ["dose"]), ("lag", ["lag"]),
                      ("kind and dose", ["kind", "dose"])):  # fmt: skip
        show(table, by, split)
    never = pd.concat(never).groupby("kind", observed=True)[["rise", "apart"]].mean()
    print("\ncontrols since before the first exposure, and apart between the runs [nats per token]")
    print(never.round(3).to_string())
    for x in ("dose", "lag"):
        drawn = table[(table["split"] == f"kind and {x}") & (table["interval"] == "t")]
        figure = plot_coverage(
            drawn, x=x, title=f"The estimate against its twin, {chosen.seeds} seeds"
        )
        figure.write_html(chosen.out / f"coverage_by_{x}.html")


if __name__ == "__main__":
    main()
