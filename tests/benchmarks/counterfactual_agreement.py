"""Do three roads to one quantity agree: many models, a twin, and controls in a single run?

``python -m tests.benchmarks.counterfactual_agreement --runs 16`` trains what is not cached and
prints correlation and mean difference by kind and exposures, right after the last exposure and ten
updates later. Counterfactual memorization and the causal estimate are of the small model; the
twins' truth is of the base model, which remembers more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from workbench.probes.extraction import probe_extraction
from workbench.stats.counterfactual import agreement, counterfactual_memorization
from workbench.stats.effects import item_gains, twin_effects
from workbench.stats.exposure import align_exposures
from workbench.stats.summarise import summarise
from workbench.subsets import LAGS, load_subsets
from workbench.suite import Suite, load_suite
from workbench.table import save


def panel(suite: Suite, run: str) -> pd.DataFrame:
    table = probe_extraction(suite.checkpoints(run), suite.items(run), prefix=16, suffix=16)
    table = align_exposures(table[table["metric"] == "log_probability"], suite.exposures(run))
    return table.drop(columns="wave")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--runs", type=int, default=16)
    ask.add_argument("--out", type=Path, default=Path("counterfactual_agreement"))
    chosen = ask.parse_args()
    suite = load_suite()
    subsets = load_subsets(suite, runs=chosen.runs)
    scores = pd.concat([panel(subsets, run) for run in subsets.runs], ignore_index=True)
    many = counterfactual_memorization(scores, subsets.membership())
    many = many[many["value"].notna() & many["lag"].isin(LAGS) & (many["copies"] == many["dose"])]
    base, twin, small = (panel(suite, run) for run in ("base", "twin", "small"))
    others = {
        "estimate, small": item_gains(small[small["group"] != "partner"], strata=["kind"]),
        "estimate, base": item_gains(base[base["group"] != "partner"], strata=["kind"]),
        "twins, base": pd.concat([twin_effects(base, twin), twin_effects(twin, base)]),
    }
    by = ["kind", "dose", "lag"]
    pooled = summarise(many, by=["metric", *by])
    parts = [
        agreement(many, other, on=["item", "step"], by=split).assign(against=name)
        for name, other in others.items()
        for split in (by, ["kind", "lag"], ["lag"])
    ]
    table = pd.concat([pooled, *parts], ignore_index=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    save(table, chosen.out / "counterfactual_agreement.parquet", passport=subsets.passport())
    wide = pooled.pivot_table(index=["kind", "dose"], columns="lag", values="value", observed=True)
    print(f"counterfactual memorization [nats per token], {chosen.runs} runs\n{wide.round(2)}")
    for part in parts:
        shown = part.assign(
            told=part["value"].map("{:.2f}".format)
            + " [" + part["lo"].map("{:.2f}".format) + ", " + part["hi"].map("{:.2f}".format) + "]"
        )  # fmt: skip
        where = [name for name in by if name in part.columns]
        index = where if len(where) == 1 else where[:-1]
        across = ["metric"] if len(where) == 1 else ["metric", "lag"]
        print(f"\n{part['against'].iloc[0]}")
        print(shown.pivot(index=index, columns=across, values="told").to_string())


if __name__ == "__main__":
    main()
