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
            took = {"new": [], "cached": []}
            for kind, key in zip(took, TO[name], strict=True):
                for _ in range(MOVES):
                    page.evaluate(WATCH, nth)
                    page.keyboard.press(key)
                    page.wait_for_timeout(PAUSE)  # to look meanwhile would cost the page time
                    took[kind].append(page.evaluate("() => window.redrawn"))
            for kind, times in took.items():
                times = sorted(each for each in times if each >= 0)
                print(
                    f"{name}, {kind}: {statistics.median(times):.0f} ms, at most {times[-1]:.0f} ms, "
                    f"{len(times)} of {MOVES} moves drew"
                )


if __name__ == "__main__":
    main()
