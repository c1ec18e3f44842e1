"""Before class: what the sessions of the workshop compute is computed once and kept."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from workbench.engine import Report
from workbench.parameters import FOLDER
from workbench.report import run_reports
from workbench.suite import ensure_suite
from workbench.table import InputError
from workbench.workshop import SYMBOL

WORKSHOP = "workshop"  # folder of the sessions, beside the notebooks
SOLUTION = "_solution"  # how the name of a session ends in which the exercises are solved
NOT_YET = f"{SYMBOL['not yet']} "  # how a check that fails begins


def solutions() -> list[Path]:
    """The sessions with their exercises solved, in the order of the workshop.

    Raises:
        InputError: There are none, as where the package was installed without its notebooks.
    """
    folder = FOLDER / WORKSHOP
    found = sorted(folder.glob(f"*{SOLUTION}.ipynb"))
    if not found:
        raise InputError(
            f"suite: there are no sessions in {folder}; install the workbench from its repository "
            "(pip install -e)"
        )
    return found


def prepare_workshop(sessions: Sequence[Path] | None = None) -> list[Report]:
    """Train the suite, if it is not cached, and run each session's solution once.

    So a session finds the answers of the models, and the model that was taught tasks, in the cache,
    and whoever prepares learns whether this machine can do it. What is cached is not made again.

    Args:
        sessions: Notebooks; None takes the solutions.

    Returns:
        How each went. A solution that its own check does not accept here is "failed" as well.
    """
    sessions = solutions() if sessions is None else sessions
    ensure_suite()
    with tempfile.TemporaryDirectory() as folder:
        reports = run_reports(sessions, out=folder)
        refused = [_refused(report) for report in reports]
    told = "on this machine its own check does not accept the solution of"
    return [
        replace(report, status="failed", error=f"{told} {', '.join(names)}") if names else report
        for report, names in zip(reports, refused, strict=True)
    ]


def _refused(report: Report) -> list[str]:
    """The exercises of an executed session whose checks failed."""
    path = report.folder / f"{report.name}.ipynb"
    if report.status != "ok" or not path.is_file():
        return []
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    data = [out.get("data", {}) for cell in cells for out in cell.get("outputs", ())]
    texts = ["".join(each.get("text/plain", "")) for each in data]
    return [text.split()[1] for text in texts if text.startswith(NOT_YET)]


def describe_preparation(reports: Sequence[Report]) -> str:
    """A line a session, and whether class can begin."""
    names = [report.name.removesuffix(SOLUTION) for report in reports]
    width = max(map(len, names))
    lines = [
        f"{name:<{width}}  {r.status:<6}  {r.seconds:>4.0f} s  {r.error}".rstrip()
        for name, r in zip(names, reports, strict=True)
    ]
    total = sum(report.seconds for report in reports)
    ready = all(report.status == "ok" for report in reports)
    lines.append(
        f"ready: {len(reports)} sessions, {total:.0f} s in all; class needs no network"
        if ready
        else "not ready: see the lines above; what did work is kept"
    )
    return "\n".join(lines)
