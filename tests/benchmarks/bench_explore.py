"""From a key on a control to the redrawn figure, measured in the browser, for each explorer.

First the notebook of the explorers on the suite in the cache; then, each in a notebook of its own,
explorers of training on a made-up panel of 10,000 texts at 50 checkpoints (the suite's weights
stand for the model) and the explorer of runs on a table of a million points. New moves ask for
what was not asked before and are held to 1 s, where something is recomputed; cached ones go back
over the same settings and are held to 200 ms.

From the project's folder: python -m tests.benchmarks.bench_explore. Uses the suite in the cache;
``suite``, ``items``, ``forgetting``, ``profile`` or ``runs`` behind it measures these alone.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd

from tests import browser as real
from workbench import save
from workbench.suite import load_suite

NOTEBOOK = Path(__file__).parent.parent.parent / "notebooks" / "explore.ipynb"
PAUSE = 2000  # milliseconds
TO = dict.fromkeys(("items", "curvature"), ("ArrowLeft", "ArrowRight"))
TO |= dict.fromkeys(("forgetting", "profile"), ("ArrowRight", "ArrowLeft"))
MOVES = 5  # to one side, which asks for something new, and back, which was asked before
# the time of the last redrawing that was painted, counted from now
WATCH = """(nth) => {
  const explorer = document.querySelectorAll('.workbench-explorer')[nth];
  const from = performance.now();
  window.redrawn = -1;
  const note = () => requestAnimationFrame(() => { window.redrawn = performance.now() - from; });
  for (const plot of explorer.querySelectorAll('.js-plotly-plot')) {
    plot.removeAllListeners('plotly_afterplot');
    plot.on('plotly_afterplot', note);
  }
}"""
ITEMS, POINTS = 10_000, 1_000_000
WAVES = np.arange(100, 900, 100)
# a checkpoint at the start, one before the first wave, and six after each
STEPS = np.array([0, 10, *(wave + lag for wave in WAVES for lag in (0, 1, 3, 10, 30, 60))])
ASKED = 'model, items, table = "run", "items.parquet", "panel.parquet"\n'
LARGE = {
    "items": f"{ASKED}explore_items(model, items, table=table)",
    "forgetting": f"{ASKED}explore_forgetting(table=table)",
    "profile": f"{ASKED}explore_profile(model, items, table=table)",
    "runs": 'explore_runs("reports")',
}
# controls by what stands beside them, with the key that asks for something new and the one back
KEYS = {
    "items": {"checkpoint": ("ArrowLeft", "ArrowRight"), "text": ("ArrowDown", "ArrowUp")},
    "forgetting": {"Lags": ("ArrowRight", "ArrowLeft"), "Texts": ("ArrowUp", "ArrowDown")},
    "profile": {"Checkpoint": ("ArrowRight", "ArrowLeft"), "Cohort": ("ArrowDown", "ArrowUp")},
    "runs": {"logarithmic": ("Space", "Space")},
}


def main() -> None:
    """Print a line an explorer and control: median and worst of new moves and of cached ones."""
    asked = sys.argv[1:] or ["suite", *LARGE]
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as made:
        with (
            real.server(NOTEBOOK.parent, Path(scratch)) as lab,
            real.browser(Path(scratch)) as page,
        ):
            if "suite" in asked:
                on_suite(page, lab)
        large = [name for name in LARGE if name in asked]
        if not large:
            return
        if large != ["runs"]:
            make_panel(Path(made))
        if "runs" in large:
            make_curves(Path(made) / "reports")
        with real.server(Path(made), Path(scratch)) as lab, real.browser(Path(scratch)) as page:
            for name in large:
                on_large(page, lab, name)


def on_suite(page, lab: real.Server) -> None:
    """The notebook as it stands: the first slider of each explorer."""
    began = time.monotonic()
    real.open_notebook(page, lab, NOTEBOOK.name)
    real.run_all(page)
    page.wait_for_selector(".workbench-explorer .main-svg", state="attached", timeout=real.PATIENCE)
    print(f"opening to first figure: {time.monotonic() - began:.1f} s")
    for nth, name in enumerate(real.EXPLORERS[:-1]):
        real.settled(page, nth)
        handle = page.locator(".workbench-explorer").nth(nth).locator(".noUi-handle").first
        print_moves(page, nth, name, handle, TO[name])


def on_large(page, lab: real.Server, name: str) -> None:
    """One explorer of many points, in a notebook and a kernel of its own."""
    code = f"from workbench import explore_{name}\n{LARGE[name]}"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbformat.write(notebook, lab.root / f"{name}.ipynb")
    real.open_notebook(page, lab, f"{name}.ipynb")
    began = time.monotonic()
    real.run_all(page)
    page.wait_for_selector(".workbench-explorer .main-svg", state="attached", timeout=real.PATIENCE)
    print(f"{name}, large, opening to first figure: {time.monotonic() - began:.1f} s")
    real.settled(page, 0)
    for label, keys in KEYS[name].items():
        inside = page.locator(".workbench-explorer .widget-inline-hbox").filter(has_text=label)
        control = inside.locator(":is(input, select, .noUi-handle):visible").first
        print_moves(page, 0, f"{name}, large, {label}", control, keys)


def print_moves(page, nth: int, told: str, control, keys: tuple[str, str]) -> None:
    """Move a control to one side and back."""
    control.focus()
    took = {"new": [], "cached": []}
    for kind, key in zip(took, keys, strict=True):
        for _ in range(MOVES):
            page.evaluate(WATCH, nth)
            page.keyboard.press(key)
            page.wait_for_timeout(PAUSE)  # to look meanwhile would cost the page time
            took[kind].append(page.evaluate("() => window.redrawn"))
    for kind, times in took.items():
        times = sorted(each for each in times if each >= 0)
        if not times:
            print(f"{told}, {kind}: none of {MOVES} moves drew")
            continue
        print(
            f"{told}, {kind}: {statistics.median(times):.0f} ms, at most {times[-1]:.0f} ms, "
            f"{len(times)} of {MOVES} moves drew"
        )


def make_panel(folder: Path) -> None:
    """Items, their panel and a run: texts gain when they are met and lose it over 200 updates."""
    rng, number = np.random.default_rng(0), np.arange(ITEMS)
    kind = np.array(["biography", "canary", "passage"])[number % 3]
    never = number % 5 == 0
    dose = np.where(never, 0, 2 ** rng.integers(0, 6, ITEMS))
    cohort = np.where(never, np.nan, rng.choice(WAVES, ITEMS))
    words = rng.choice(["one", "two", "three", "four", "five", "six", "of", "and"], (ITEMS, 40))
    items = pd.DataFrame(
        {
            "item": [f"{name}-{index:05d}" for index, name in enumerate(kind)],
            "text": [" ".join(each) for each in words],
            "group": np.where(never, "never", "seen"),
            "kind": kind,
            "dose": dose,
            "cohort": cohort,
        }
    )
    items.to_parquet(folder / "items.parquet")
    lag = STEPS - cohort[:, None]
    lag[lag < 0] = np.nan
    gain = np.nan_to_num(np.log2(1 + dose)[:, None] / 2 * np.exp(-lag / 200))
    value = np.minimum(gain - 6 + rng.normal(size=lag.shape) / 5, -0.01)
    names = ["item", "group", "kind", "dose", "cohort"]
    table = items[names].loc[np.repeat(number, len(STEPS))].assign(
        run="made", step=np.tile(STEPS, ITEMS), lo=np.nan, hi=np.nan, n=1, lag=lag.ravel(),
        copies=np.where(np.isnan(lag), 0, dose[:, None]).ravel(),
    )  # fmt: skip
    scored = table.assign(metric="log_probability", value=value.ravel())
    said = table.assign(metric="extractable", value=(value.ravel() > -4.5).astype(float))
    save(pd.concat([scored, said], ignore_index=True), folder / "panel.parquet")
    run, places = folder / "run", load_suite().checkpoints().places
    run.mkdir()
    for place, step in enumerate(STEPS):
        (run / f"step{step:06d}").symlink_to(places[place % len(places)][1])


def make_curves(folder: Path) -> None:
    """Eight curves, a million points in all, as a recorder would leave them."""
    rng, lines = np.random.default_rng(0), 8
    folder.mkdir()
    length = POINTS // lines
    walk = 3 + rng.normal(size=(lines, length)).cumsum(axis=1) / length
    table = pd.DataFrame(
        {
            "run": "made", "step": np.tile(np.arange(1, length + 1), lines),
            "group": np.repeat([f"seen {line}" for line in range(lines)], length), "item": "all",
            "metric": "loss", "value": walk.ravel(), "lo": walk.ravel() - 0.05,
            "hi": walk.ravel() + 0.05, "n": 100,
        }
    )  # fmt: skip
    save(table, folder / "made.parquet")


if __name__ == "__main__":
    main()
