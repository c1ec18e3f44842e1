"""A real JupyterLab server on loopback and a real Chromium, for the tests that need both."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {
        "autoStartDefaultKernel": True,
        # all cells are in the page, also those that are not on the screen
        "windowingMode": "none",
    },
}

EXPLORERS = ("items", "forgetting", "profile", "curvature", "runs")  # in the notebook's order
PATIENCE = 240_000  # milliseconds; only what fails waits as long
# what an explorer shows: its figures' data, its code, and whether it says that something is wrong
SHOWN = """(nth) => {
  const explorer = document.querySelectorAll('.workbench-explorer')[nth];
  const plots = [...explorer.querySelectorAll('.workbench-picture')];
  const plain = (k, v) => (ArrayBuffer.isView(v) ? Array.from(v) : k === 'uid' ? undefined : v);
  const axes = (layout) => Object.entries(layout).filter(([name]) => /^[xy]axis/.test(name))
    .map(([name, axis]) => [name, axis.type, axis.title?.text]);
  return {
    figures: plots.map((p) => p.data ? JSON.stringify([p.data, p.layout.title?.text, p.layout.shapes, axes(p.layout)], plain) : ''),
    words: [...explorer.querySelectorAll('.widget-html')].map((w) => w.textContent).join(' '),
    code: explorer.querySelector('.workbench-code')?.textContent,
    alert: explorer.querySelector('[role=alert]')?.textContent ?? '',
    busy: [...explorer.querySelectorAll('.jupyter-button')].some(
      (b) => b.textContent.trim() === 'Stop' && getComputedStyle(b).visibility === 'visible'),
  };
}"""
CONTROLS = ".widget-inline-hbox :is(input, select, textarea, .noUi-handle), .jupyter-button:not(.workbench-copy)"


@dataclass(frozen=True)
class Server:
    """A running server; ``root`` is the folder it shows."""

    address: str
    token: str
    root: Path

    def url(self, path: str) -> str:
        return f"{self.address}/{path}{'&' if '?' in path else '?'}token={self.token}"


@contextlib.contextmanager
def server(root: Path, scratch: Path, *, app: str = "jupyterlab", arguments=()) -> Iterator[Server]:
    """JupyterLab (or Voila) on a free port, with folders of its own for all it writes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(8)
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
             "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")  # fmt: skip
    folders = {name: str(scratch / name.lower()) for name in names}
    for folder in folders.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    for name, value in SETTINGS.items():
        file = Path(folders["JUPYTERLAB_SETTINGS_DIR"]) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    if app == "jupyterlab":
        command = ["jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
                   "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
                   f"--ServerApp.root_dir={root}", "--LabApp.extension_manager=readonly",
                   "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # fmt: skip
        alive = "api/status"
    else:
        command = ["voila", *arguments, "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
        alive = "voila/api/status"
    with (scratch / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, *(arguments if app == "jupyterlab" else ())],
            env={**os.environ, **folders}, cwd=root, stdout=log, stderr=log,
        )  # fmt: skip
    found = Server(f"http://127.0.0.1:{port}", token, root)
    try:
        _wait(found.url(alive) if app == "jupyterlab" else found.address, process, scratch)
        yield found
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


def _wait(url: str, process, scratch: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=5)
            return
        time.sleep(0.3)
    raise RuntimeError((scratch / "server.log").read_text()[-3000:])


@contextlib.contextmanager
def browser(scratch: Path, *, play=None, width: int = 1400, height: int = 1000):
    """A Chromium page that reaches loopback only; what it asked of other hosts is in ``.asked``.

    ``play`` is a running playwright, of which a process has one at a time.
    """
    from playwright.sync_api import sync_playwright

    with contextlib.nullcontext(play) if play else sync_playwright() as play:
        context = play.chromium.launch_persistent_context(
            str(scratch / "profile"), executable_path=CHROMIUM, headless=True, args=FLAGS,
            viewport={"width": width, "height": height},
        )  # fmt: skip
        page = context.pages[0] if context.pages else context.new_page()
        page.asked = []

        def other(route):
            page.asked.append(route.request.url)
            route.abort()

        context.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), other)
        try:
            yield page
        finally:
            context.close()


def open_notebook(page, lab: Server, name: str) -> None:
    """Open a notebook in JupyterLab and wait for its kernel."""
    page.goto(lab.url(f"lab/tree/{name}?reset"))
    page.wait_for_selector("#jupyterlab-splash", state="detached", timeout=60_000)
    page.wait_for_selector(".jp-Notebook", timeout=60_000)
    page.wait_for_function(
        "() => document.querySelector('#jp-main-statusbar')?.innerText.includes('| Idle')",
        timeout=60_000,
    )


def run_all(page) -> None:
    """Run > Run All Cells."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()


def settled(page, nth: int) -> dict:
    """What an explorer shows once it has drawn and is no longer at work."""
    page.locator(".workbench-explorer").nth(nth).wait_for(state="attached", timeout=PATIENCE)
    deadline, before = time.monotonic() + PATIENCE / 1000, None
    while time.monotonic() < deadline:
        now = page.evaluate(SHOWN, nth)
        done = now["alert"] or (any(now["figures"]) and now["code"])
        if done and not now["busy"] and now == before:
            return now
        before = now
        page.wait_for_timeout(250)
    raise TimeoutError(f"{EXPLORERS[nth]} is still at work: {before and before['alert']}")


def answered(page, nth: int, before: dict, seconds: float = 5) -> dict:
    """What an explorer shows after a control was moved; the same if nothing comes of it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and page.evaluate(SHOWN, nth) == before:
        page.wait_for_timeout(50)
    return settled(page, nth)


def name_of(control) -> str:
    """What a control is called on the page."""
    return control.evaluate(
        "e => (e.closest('.widget-inline-hbox') ?? e).innerText.trim().split('\\n')[0].trim()"
    )


def move(page, control) -> tuple[str, ...]:
    """Move a control by keyboard alone; the keys that undo it, none if there is nothing to move."""
    kind = control.evaluate("e => (e.type || e.className || e.tagName).toString()")
    if not control.is_visible() or not control.is_enabled() or "Stop" in control.inner_text():
        return ()
    control.focus()
    if kind in ("checkbox", "radio", "button", "submit"):
        page.keyboard.press("Space")
        return ("Space",)
    if kind == "text":
        page.keyboard.type("1")
        page.keyboard.press("Enter")
        return ("Backspace", "Enter")
    slider = "noUi-handle" in kind
    at = "e => e.getAttribute('aria-valuenow') ?? e.selectedIndex"
    before = control.evaluate(at)
    for key, back in pairwise(["ArrowRight", "ArrowLeft", "ArrowRight"] if slider else
                              ["ArrowDown", "ArrowUp", "ArrowDown"]):  # fmt: skip
        page.keyboard.press(key)
        if control.evaluate(at) != before:
            return (back,)
    return ()
