"""Make the README's pictures: of a report that is there, and of the explorers on the suite.

From the project's folder: python -m tests.make_pictures [reports]. Needs a Chromium
(``CHROMIUM`` names its path) and the ``test`` extra. Not a test.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests import browser as real

PICTURE = Path(__file__).parent.parent / "data" / "pictures" / "report.png"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FIGURE = 5  # counted from 0: the event study of real passages, with the prose on how to read it

HIGHEST = 1160  # pixels of an explorer that are shown


def main(reports: Path) -> None:
    """Screenshot one figure of the memorization report with what stands around it."""
    page_file = (reports / "memorization_profile" / "report.html").resolve()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as player:
        chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = player.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.goto(page_file.as_uri())
        page.wait_for_selector(".js-plotly-plot .main-svg")
        page.wait_for_timeout(2000)  # the last figure is drawn some time after the first
        figure = page.locator(".js-plotly-plot").nth(FIGURE).bounding_box()
        clip = {"x": 0, "y": figure["y"], "width": 1100, "height": 600}
        page.screenshot(path=PICTURE, clip=clip, full_page=True)
        browser.close()
    print(PICTURE)


def explorers(notebook: Path) -> None:
    """Run the notebook of explorers and screenshot each, once it has drawn all of its figures."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        real.server(notebook.parent, Path(scratch)) as lab,
        real.browser(Path(scratch), height=1900) as page,
    ):
        real.open_notebook(page, lab, notebook.name)
        real.run_all(page)
        for nth, name in enumerate(real.EXPLORERS):
            real.settled(page, nth)
            explorer = page.locator(".workbench-explorer").nth(nth)
            explorer.scroll_into_view_if_needed()
            page.wait_for_timeout(1000)  # a figure that comes into view is fitted to its place
            picture = PICTURE.with_name(f"explore_{name}.png")
            clip = explorer.bounding_box()
            page.screenshot(path=picture, clip=clip | {"height": min(clip["height"], HIGHEST)})
            print(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "reports"))
    explorers(Path(__file__).parent.parent / "notebooks" / "explore.ipynb")
