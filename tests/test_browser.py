"""The notebook of explorers in a real JupyterLab: run all, move every control, see figures change.

One server and one page for all of it; screenshots go to the folder that WORKBENCH_SHOTS names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests import browser
from tests.browser import CONTROLS, EXPLORERS, PATIENCE, SHOWN, move, settled
from tests.test_site import write_report
from workbench import publish
from workbench.frozen import freeze
from workbench.suite import ensure_suite
from workbench.table import rows, validate

sync_api = pytest.importorskip("playwright.sync_api")
if not browser.CHROMIUM:
    pytest.skip("needs chromium", allow_module_level=True)

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "explore.ipynb"
# the suite that is there already; conftest gives each test an empty cache
CACHE = os.environ.get("WORKBENCH_CACHE", "")
SAVE_STATE = "@jupyter-widgets/jupyterlab-manager/plugin.jupyterlab-settings"
# controls of which only the words below the figures tell
WORDS = {
    "items": {"find", "rank among decoys"},
    "curvature": {"text"},
    "forgetting": {"Held-out tail"},
    "runs": {"read again"},
}


def write_reports(folder: Path) -> None:
    """Three reports of two notebooks, with curves over updates."""
    for seed, notebook in ((0, "demo"), (1, "demo"), (2, "other")):
        steps, name = np.arange(5) + 1, f"{notebook}.seed={seed}"
        curves = [
            rows(metric, at + seed / 5 + steps / 20, run=name, step=steps, group="seen", n=10)
            for metric, at in (("log_probability", -5.0), ("auc", 0.1))
        ]
        table = validate(pd.concat(curves))
        made = write_report(folder, name, notebook, parameters={"seed": seed})
        numbers = {each: rows("auc", at, run="r", n=7) for each, at in (("AUC", 0.6), ("TPR", 0.2))}
        publish(table, key=numbers, results=made)


@pytest.fixture(scope="module")
def play():
    with sync_api.sync_playwright() as play:
        yield play


@pytest.fixture(scope="module")
def opened(tmp_path_factory, play):
    """The page with the notebook run, the server, and how long the first figure took."""
    root, scratch = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("scratch")
    (root / "notebooks").mkdir()
    shutil.copy(NOTEBOOK, root / "notebooks")
    write_reports(root / "reports")
    with pytest.MonkeyPatch.context() as patch:
        if CACHE:
            patch.setenv("WORKBENCH_CACHE", CACHE)
        else:
            patch.delenv("WORKBENCH_CACHE", raising=False)
        ensure_suite(progress=False)
        patch.setitem(browser.SETTINGS, SAVE_STATE, {"saveState": True})
        with (
            browser.server(root, scratch) as lab,
            browser.browser(scratch, play=play, height=1900) as page,
        ):
            page.errors = []
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            browser.open_notebook(page, lab, "notebooks/explore.ipynb")
            began = time.monotonic()
            browser.run_all(page)
            page.wait_for_selector(
                ".workbench-explorer .gtitle", state="attached", timeout=PATIENCE
            )
            print(f"first figure after {time.monotonic() - began:.1f} s")
            page.wait_for_function(
                f"() => document.querySelectorAll('.workbench-explorer').length === {len(EXPLORERS)}",
                timeout=PATIENCE,
            )
            yield page, lab


def keep(page, nth: int, name: str) -> None:
    if folder := os.environ.get("WORKBENCH_SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.locator(".workbench-explorer").nth(nth).screenshot(path=f"{folder}/{name}.png")


@pytest.mark.parametrize("name", EXPLORERS)
def test_every_control_moves_by_keyboard_and_figures_follow(opened, name):
    page, _ = opened
    nth = EXPLORERS.index(name)
    explorer = page.locator(".workbench-explorer").nth(nth)
    explorer.scroll_into_view_if_needed()
    before = settled(page, nth)
    assert not before["alert"], before["alert"]
    keep(page, nth, f"explore_{name}")
    moved, same = [], set()
    for control in range(explorer.locator(CONTROLS).count()):
        control = explorer.locator(CONTROLS).nth(control)
        back = move(page, control) if control.count() else ()
        if not back:
            continue
        moved.append(browser.name_of(control))
        after = browser.answered(page, nth, before)
        # where the folder is as it was, to read it again shows nothing new
        assert after != before or moved[-1] == "read again", f"{moved[-1]} does nothing"
        if after["alert"]:  # nothing is left: it says so and keeps the last figures
            assert after["figures"] == before["figures"], moved[-1]
            assert len(after["alert"].splitlines()) == 1 and "Error" not in after["alert"]
        elif after["figures"] == before["figures"]:
            same.add(moved[-1])
        control.focus()
        for key in back:
            page.keyboard.press(key)
        again = browser.answered(page, nth, after)
        assert not again["alert"], again["alert"]
        if not control.evaluate("e => e.multiple"):  # of several marked ones a key leaves one
            assert again["figures"] == before["figures"], moved[-1]
        before = again
    print(f"{name}: {moved}, of which {same} changed no figure")
    assert len(moved) >= 4
    assert same <= WORDS.get(name, set())
    assert not page.errors
    assert page.locator(".jp-OutputArea [data-mime-type*=error]").count() == 0
    assert page.locator(".jp-OutputArea [data-mime-type*=stderr]").count() == 0


def test_no_other_host_was_asked(opened):
    page, _ = opened
    assert page.asked == []


def test_both_themes_can_be_read(opened):
    """On a dark page lines and words are light; on a light one they are as they were."""
    page, _ = opened
    colour = "() => getComputedStyle(document.querySelector('.workbench-explorer .gtitle')).fill"
    light = page.evaluate(colour)
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.get_by_text("Theme", exact=True).hover()
    page.get_by_text("JupyterLab Dark", exact=True).click()
    page.wait_for_function(f"() => ({colour})() !== '{light}'", timeout=PATIENCE)
    for nth, name in enumerate(EXPLORERS):
        page.locator(".workbench-explorer").nth(nth).scroll_into_view_if_needed()
        settled(page, nth)
        keep(page, nth, f"explore_{name}_dark")
    assert sum(int(c) for c in page.evaluate(colour)[4:-1].split(",")[:3]) > 3 * 200


def test_the_saved_notebook_shows_its_last_figures_without_a_kernel(opened, tmp_path):
    page, lab = opened
    path = lab.root / "notebooks" / "explore.ipynb"
    shown = [t for nth in range(len(EXPLORERS)) for t in page.evaluate(SHOWN, nth)["figures"] if t]
    page.keyboard.press("Escape")
    page.get_by_role("menuitem", name="File", exact=True).click()
    page.get_by_text("Save Notebook", exact=True).click()
    deadline = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < deadline:
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # being written
            saved = {"metadata": {}}
        if "widgets" in saved["metadata"]:
            break
        time.sleep(0.2)
    assert path.stat().st_size < 15e6  # plotly is in it once, not once a figure
    frozen = json.loads(freeze(path, lab.root / "frozen.ipynb").read_text(encoding="utf-8"))
    figures = [
        output["data"]["application/vnd.plotly.v1+json"]
        for cell in frozen["cells"]
        for output in cell.get("outputs", [])
        if "application/vnd.plotly.v1+json" in output.get("data", {})
    ]
    assert len(figures) == len(shown)
    assert all(figure["data"] for figure in figures)
    # opened in JupyterLab, where its kernel is not to be had
    frozen["metadata"]["kernelspec"] = {"name": "no", "display_name": "No", "language": "no"}
    (lab.root / "frozen.ipynb").write_text(json.dumps(frozen), encoding="utf-8")
    page.goto(lab.url("lab/tree/frozen.ipynb?reset"))
    page.wait_for_selector(".jp-Notebook", timeout=PATIENCE)
    page.wait_for_function(
        f"() => document.querySelectorAll('.js-plotly-plot').length === {len(figures)}",
        timeout=PATIENCE,
    )
    assert page.locator(".js-plotly-plot .main-svg").count() > 0


@pytest.mark.skipif(not importlib.util.find_spec("voila"), reason="needs voila")
def test_voila_serves_the_explorers_as_a_page(tmp_path, monkeypatch, play):
    if CACHE:
        monkeypatch.setenv("WORKBENCH_CACHE", CACHE)
    else:
        monkeypatch.delenv("WORKBENCH_CACHE")
    shutil.copy(NOTEBOOK, tmp_path)
    ensure_suite(progress=False)
    with (
        browser.server(tmp_path, tmp_path, app="voila", arguments=("explore.ipynb",)) as app,
        browser.browser(tmp_path, play=play) as page,
    ):
        page.goto(app.address, timeout=PATIENCE)
        page.wait_for_selector(".workbench-explorer .gtitle", state="attached", timeout=PATIENCE)
        before = settled(page, 0)
        control = page.locator(".workbench-explorer").first.locator(".noUi-handle").first
        move(page, control)
        assert browser.answered(page, 0, before)["figures"] != before["figures"]
        # Voila's own template asks for a sheet of icons, and does without
        assert all("fontawesome" in url for url in page.asked)
        if folder := os.environ.get("WORKBENCH_SHOTS"):
            page.screenshot(path=f"{folder}/voila.png")
