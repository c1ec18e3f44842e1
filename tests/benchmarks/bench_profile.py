"""Time and memory of the causal profile: ``python -m tests.benchmarks.bench_profile``."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pandas as pd

from workbench.stats.profile import memorization_profile


def panel_table(items: int, checkpoints: int, cohorts: int, dtype: type) -> pd.DataFrame:
    """Half the items never trained on, the rest spread over the cohorts; noise of 0.1."""
    rng = np.random.default_rng(0)
    step = np.arange(1, checkpoints + 1) * 10
    starts = np.linspace(step[2] + 1, step[-2], cohorts).round()
    cohort = np.full(items, np.nan)
    cohort[: items // 2] = starts[np.arange(items // 2) % cohorts]
    value = rng.normal(-3, 1, (items, 1)) + 0.1 * rng.normal(size=(items, checkpoints))
    value += np.where(step >= cohort[:, None], 1.0, 0.0)
    size = items * checkpoints
    return pd.DataFrame(
        {
            "run": pd.Categorical.from_codes(np.zeros(size, np.int8), ["bench"]),
            "step": np.tile(step, items),
            "group": pd.Categorical.from_codes(np.zeros(size, np.int8), ["all"]),
            "item": pd.Categorical.from_codes(
                np.repeat(np.arange(items), checkpoints), [f"item {i:06d}" for i in range(items)]
            ),
            "metric": pd.Categorical.from_codes(np.zeros(size, np.int8), ["outcome"]),
            "value": value.ravel().astype(dtype),
            "cohort": np.repeat(cohort, checkpoints),
        }
    )


def measure(name: str, table: pd.DataFrame, **options) -> None:
    start, worked = time.perf_counter(), time.process_time()
    result = memorization_profile(table, **options)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    tracemalloc.start()
    memorization_profile(table, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    panel = len(table) * 8
    held = table.memory_usage(deep=True).sum()
    print(
        f"{name:44s} {seconds:6.2f} s ({worked:.2f} s of processor), {len(result)} rows, peak {peak / 1e6:.0f} MB = "
        f"{peak / held:.2f} x table, {peak / panel:.2f} x panel as float64"
    )


def main() -> None:
    table = panel_table(20_000, 100, 20, np.float64)
    measure("20 cohorts, errors, pointwise", table, simultaneous=False)
    measure("20 cohorts, errors, 999 draws", table)
    measure("20 cohorts, not_yet, 999 draws", table, control="not_yet")
    measure("20 cohorts, by lag, 999 draws", table, by="lag")
    measure("20 cohorts, float32, 999 draws", table.assign(value=table["value"].astype("float32")))
    table = panel_table(20_000, 100, 50, np.float64)
    measure("50 cohorts, 1,000 draws", table, draws=1000)
    measure("50 cohorts, not_yet, 1,000 draws", table, draws=1000, control="not_yet")
    holes = panel_table(20_000, 100, 20, np.float64)
    holes.loc[np.random.default_rng(1).random(len(holes)) < 0.02, "value"] = np.nan
    measure("20 cohorts, 2 % holes, pointwise", holes, simultaneous=False)
    measure("20 cohorts, 2 % holes, 999 draws", holes)


if __name__ == "__main__":
    main()
