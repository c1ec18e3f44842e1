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
  const plots = [...explorer.querySelectorAll('.js-plotly-plot')];
  const plain = (k, v) => (ArrayBuffer.isView(v) ? Array.from(v) : k === 'uid' ? undefined : v);
  return {
    figures: plots.map((p) => JSON.stringify(p.data, plain) + p.layout?.title?.text),
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
def browser(scratch: Path, *, width: int = 1400, height: int = 1000):
    """A Chromium page that reaches loopback only; what it asked of other hosts is in ``.asked``."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
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
    deadline, before = time.monotonic() + PATIENCE / 1000, None
    while time.monotonic() < deadline:
        now = page.evaluate(SHOWN, nth)
        if now["figures"] and now["code"] and not now["busy"] and now == before:
            return now
        before = now
        page.wait_for_timeout(250)
    raise TimeoutError(f"{EXPLORERS[nth]} is still at work: {before and before['alert']}")


def move(page, control) -> bool:
    """Move a control by keyboard alone; False if it is one that this does not apply to."""
    kind = control.evaluate("e => (e.type || e.className || e.tagName).toString()")
    if not control.is_visible() or not control.is_enabled() or "Stop" in control.inner_text():
        return False
    control.focus()
    if "noUi-handle" in kind:
        at = control.get_attribute("aria-valuenow")
        page.keyboard.press("ArrowRight")
        if control.get_attribute("aria-valuenow") == at:
            page.keyboard.press("ArrowLeft")
    elif "select" in kind:
        at = control.evaluate("e => e.selectedIndex")
        page.keyboard.press("ArrowDown")
        if control.evaluate("e => e.selectedIndex") == at:
            page.keyboard.press("ArrowUp")
    elif kind in ("checkbox", "radio", "button", "submit"):
        page.keyboard.press("Space")
    else:
        page.keyboard.type("a")
        page.keyboard.press("Enter")
    return True
