"""Time and memory of the causal profile: ``python -m tests.benchmarks.bench_profile [speed|memory]``.

Times are ratios of one run on one machine: against the fastest of the packages moderndid, csdid and
differences, where they are installed, on one panel of 20,000 items x 40 checkpoints x 20 cohorts;
and each option against the plain profile. Memory is the peak of a fresh process over what it held
before, in units of the outcomes as one array of float64, less the bootstrap draws.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.stats.profile import memorization_profile

PEERS = ("moderndid", "csdid", "differences")
MEMORY = {
    "errors only": dict(simultaneous=False),
    "simultaneous": dict(),
    "simultaneous, not_yet": dict(control="not_yet"),
    "simultaneous, by lag": dict(by="lag"),
}


def panel_table(items: int, checkpoints: int, cohorts: int, dtype: type) -> pd.DataFrame:
    """Half the items never trained on, the rest spread over the cohorts; noise of 0.1."""
    rng = np.random.default_rng(0)
    step = np.arange(1, checkpoints + 1)
    starts = np.linspace(step[2], step[-2], cohorts).round()
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


def with_holes(table: pd.DataFrame) -> pd.DataFrame:
    lost = np.random.default_rng(1).random(len(table)) < 0.02
    return table.assign(value=table["value"].where(~lost))


def seconds(ask: Callable[[], object], times: int = 1) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            ask()
        found.append(time.perf_counter() - start)
    return min(found)


def peer(name: str, table: pd.DataFrame) -> Callable[[], object]:
    """Cells with analytic pointwise errors, never-trained controls, as each package does them."""
    package = importlib.import_module(name)
    plain = pd.DataFrame(
        {
            "item": table["item"].cat.codes.to_numpy(np.int64),
            "step": table["step"],
            "value": table["value"],
            "cohort": table["cohort"].fillna(0),
        }
    )
    names = dict(yname="value", tname="step", idname="item", gname="cohort", data=plain)
    if name == "moderndid":
        return lambda: package.att_gt(**names, est_method="reg", cband=False)
    if name == "csdid":
        ask = importlib.import_module("csdid.att_gt").ATTgt
        names["control_group"] = ["nevertreated"]
        return lambda: ask(**names).fit(est_method="reg", bstrap=False)
    data = plain.rename(columns={"item": "entity", "step": "time"}).set_index(["entity", "time"])
    data["cohort"] = data["cohort"].replace(0, np.nan)
    ask = package.ATTgt
    return lambda: ask(data, "cohort").fit("value", progress_bar=False)


def speed() -> None:
    warnings.simplefilter("ignore")
    table = panel_table(20_000, 40, 20, np.float64)
    ours = seconds(lambda: memorization_profile(table, simultaneous=False), 3)
    banded = seconds(lambda: memorization_profile(table, draws=1000), 3)
    print("20,000 items x 40 checkpoints x 20 cohorts, cells, analytic pointwise errors")
    print(f"   workbench {ours:.2f} s (with 1,000 draws {banded:.2f} s)")
    for name in PEERS:
        try:
            ask = peer(name, table)
        except ImportError:
            print(f"   {name} is not installed: no ratio to it")
            continue
        theirs = seconds(ask)
        print(f"   {name} {theirs:.2f} s: {theirs / ours:.0f} times as long ({theirs / banded:.0f} "
              "times as our profile with draws)")  # fmt: skip
    full = panel_table(20_000, 100, 50, np.float64)
    full["document"] = full["item"].cat.codes.to_numpy() // 4
    single, holes = full.assign(value=full["value"].astype("float32")), with_holes(full)
    plain = seconds(lambda: memorization_profile(full, draws=1000), 3)
    print(
        f"20,000 items x 100 checkpoints x 50 cohorts, cells, 1,000 draws: {plain:.2f} s; to that"
    )
    for name, data, options in (
        ("errors only", full, dict(simultaneous=False)),
        ("bootstrap errors", full, dict(errors="bootstrap")),
        ("not_yet", full, dict(control="not_yet")),
        ("by lag", full, dict(by="lag")),
        ("clusters across cohorts", full, dict(cluster="document")),
        ("float32", single, dict()),
        ("2 % holes, errors only", holes, dict(simultaneous=False)),
        ("2 % holes", holes, dict()),
    ):
        took = seconds(lambda d=data, o=options: memorization_profile(d, draws=1000, **o))
        print(f"   {name:28s} {took / plain:5.2f}")


def memory() -> None:
    for name in MEMORY:
        for holes in ("full", "holes"):
            command = [sys.executable, "-m", __spec__.name, "peak", name, holes]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            print(f"{name:28s} {holes:6s} {found.strip()}")


def peak(name: str, holes: str) -> None:
    """One fresh process: what the profile adds to what was held, Linux only."""
    draws = 1000
    memorization_profile(panel_table(60, 6, 2, np.float64), draws=10)  # imports
    table = panel_table(20_000, 100, 50, np.float64)
    table = with_holes(table) if holes == "holes" else table
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    result = memorization_profile(table, draws=draws, **MEMORY[name])
    added, size = _status("VmHWM") - before, len(table) * 8
    print(f"adds {added / 1e6:4.0f} MB = {added / size:.2f} panels", end="")
    if MEMORY[name].get("simultaneous", True):
        # single precision: one number a group, step and draw; with holes one a row and draw
        held = len(result) if holes == "holes" else 51 * 101
        print(f", {(added - held * draws * 4) / size:.2f} without the draws", end="")
    print(f"; the table itself is {table.memory_usage(deep=True).sum() / size:.1f}")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    asked = sys.argv[1:] or ["speed", "memory"]
    if asked[0] == "peak":
        peak(*asked[1:])
    else:
        for each in asked:
            {"speed": speed, "memory": memory}[each]()
