"""Are memorized texts sharp? Every measure, before planting, at it and while the texts are forgotten.

``python -m tests.benchmarks.sharpness_over_training --seeds 3 --out FOLDER`` asks the suite's base
and its twin at checkpoints around the first wave, of that wave's texts, of the dripped ones and of
texts no run trained on. The twin never saw the base's texts: it says what they would have been.
About four minutes a seed on an idle core; seeds that are there already are read.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import pandas as pd

from tests.benchmarks.truth_over_seeds import load_seed
from workbench import (
    probe_extraction,
    probe_item_sharpness,
    save,
    sharpness_auc,
    sharpness_correlation,
    twin_effects,
)
from workbench.suite import Suite

AFTER = (0, 10, 50, 100)  # updates since the wave, of its checkpoints
LEAST = 8  # copies of a planted text
NEVER = 10  # controls of each kind
TEXTS = 48  # of the corpus, for the factors


def asked(suite: Suite) -> pd.DataFrame:
    """Dripped texts, those of the first wave that were seen often, and controls."""
    items = suite.items("base")
    first = items["wave"] == items.loc[items["group"] == "seen", "wave"].min()
    chosen = (items["group"] == "drip") | (
        (items["group"] == "seen") & first & (items["dose"] >= LEAST)
    )
    never = items[items["group"] == "never"].groupby("kind").head(NEVER)
    return pd.concat([items[chosen], never], ignore_index=True)


def measured(suite: Suite, probes: int) -> pd.DataFrame:
    items, end = asked(suite), suite.spec["waves"][0]
    before, last = end - suite.spec["span"], suite.spec["updates"]
    steps = [before, *(end + lag for lag in AFTER), last]
    parts = []
    for run in ("base", "twin"):
        checkpoints = suite.checkpoints(run).select(steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # few tokens for the factors
            cheap = {"measures": ["gradient_norm", "input_curvature", "self_influence"]}
            texts = suite.corpus_texts(TEXTS)
            parts.append(probe_item_sharpness(checkpoints, items, texts=texts, **cheap))
        few = checkpoints.select([before, end, last])
        dear = {"measures": ["hessian_trace"], "probes": probes}
        parts.append(probe_item_sharpness(few, items, **dear))
        known = probe_extraction(checkpoints, items, prefix=16, suffix=16)
        parts.append(known[known["metric"] == "log_probability"])
    return pd.concat(parts, ignore_index=True).drop(columns=["prefix", "suffix"], errors="ignore")


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """AUC of each measure against the controls, and its correlation with the effect of training."""
    loss = table.loc[table["metric"] == "log_probability", ["run", "step", "item", "value"]]
    table = table.merge(loss.rename(columns={"value": "loss"}), on=["run", "step", "item"])
    made = []
    for group in ("seen", "drip"):
        some = table[table["group"].isin([group, "never"])]
        some = some.assign(member=some["group"] == group)
        made.append(sharpness_auc(some, by=("run", "step", "kind")).assign(planted=group))
        # kinds differ in every measure, so the pooled area compares ranks within a kind
        ranks = some.groupby(["run", "step", "kind", "metric"], observed=True)["value"]
        below = (some["metric"] == "log_probability").astype(float)  # which are at most 0
        pooled = some.assign(value=ranks.rank(pct=True) - below)
        made.append(sharpness_auc(pooled).assign(planted=group, kind="all"))
    scored = table[table["metric"] == "log_probability"]
    base = scored[scored["run"] == "base"]
    truth = twin_effects(base, scored[scored["run"] == "twin"].assign(cohort=float("nan")))
    planted = table[(table["run"] == "base") & table["cohort"].notna()]
    planted = planted[planted["metric"] != "log_probability"]
    for step, effects in truth.groupby("step"):
        here = planted[planted["step"] == step]
        for given in ((), ("loss",)):
            found = sharpness_correlation(here, effects, by=("run", "step", "kind"), given=given)
            made.append(found.assign(planted="all planted"))
    return pd.concat(made, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        path = options.out / f"sharpness_{seed}.parquet"
        if not path.is_file():
            save(measured(load_seed(seed), options.probes), path)
        result = judged(pd.read_parquet(path))
        save(result, options.out / f"judged_{seed}.parquet")
        print(f"seed {seed}")
        for metric in ("auc", "spearman"):
            shown = result[result["metric"] == metric]
            where = (
                ["planted", "given", "kind", "score"]
                if metric == "spearman"
                else ["planted", "kind", "run", "score"]
            )
            print(
                shown.pivot_table(index=where, columns="step", values="value", observed=True).round(
                    2
                )
            )


if __name__ == "__main__":
    main()
