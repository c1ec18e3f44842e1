"""From a key on a control to the redrawn figure, measured in the browser, for each explorer.

From the project's folder: python -m tests.benchmarks.bench_explore. Uses the suite in the cache.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from tests import browser as real

NOTEBOOK = Path(__file__).parent.parent.parent / "notebooks" / "explore.ipynb"
MOVES = 10
# milliseconds from now until a figure of the explorer was redrawn by plotly and painted
WATCH = """(nth) => {
  const explorer = document.querySelectorAll('.workbench-explorer')[nth];
  const from = performance.now();
  window.redrawn = new Promise((done) => {
    for (const plot of explorer.querySelectorAll('.js-plotly-plot'))
      plot.once('plotly_afterplot', () => requestAnimationFrame(() => done(performance.now() - from)));
    setTimeout(() => done(-1), 5000);
  });
}"""


def main() -> None:
    """Print a line an explorer and control: median and worst of ten moves."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        real.server(NOTEBOOK.parent, Path(scratch)) as lab,
        real.browser(Path(scratch)) as page,
    ):
        began = time.monotonic()
        real.open_notebook(page, lab, NOTEBOOK.name)
        real.run_all(page)
        page.wait_for_selector(
            ".workbench-explorer .main-svg", state="attached", timeout=real.PATIENCE
        )
        print(f"opening to first figure: {time.monotonic() - began:.1f} s")
        for nth, name in enumerate(real.EXPLORERS[:-1]):
            real.settled(page, nth)
            explorer = page.locator(".workbench-explorer").nth(nth)
            handle = explorer.locator(".noUi-handle").first
            handle.focus()
            took = []
            for move in range(MOVES):
                page.evaluate(WATCH, nth)
                page.keyboard.press("ArrowLeft" if move < MOVES / 2 else "ArrowRight")
                took.append(page.evaluate("() => window.redrawn"))
                real.settled(page, nth)
            drawn = sorted(t for t in took if t >= 0)
            if drawn:
                print(
                    f"{name}: {statistics.median(drawn):.0f} ms, at most {drawn[-1]:.0f} ms, "
                    f"{len(drawn)} of {MOVES} moves drew"
                )


if __name__ == "__main__":
    main()
