"""Notebooks to reports: what a notebook hands over, and one call that makes a report of it.

A report is ``<out>/<name>/`` with ``report.html``, the executed notebook, ``table.parquet``,
``table.csv``, ``key.json``, ``log.txt`` and ``status.json``; ``<out>/index.html`` lists all that
are there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from workbench import page
from workbench.engine import (
    KEY,
    STATUS,
    TABLE,
    TABLE_CSV,
    Plan,
    Report,
    run_plans,
    write_json,
)
from workbench.fingerprint import Hashes, fingerprint, key_of
from workbench.parameters import Notebook, find_notebooks, refuse_unknown
from workbench.site import write_site
from workbench.table import FLOOR, InputError, one_metric, save, whole_file

__all__ = [
    "KEY",
    "STATUS",
    "TABLE",
    "TABLE_CSV",
    "Plan",
    "Report",
    "make_plans",
    "publish",
    "run_report",
    "run_reports",
]


def publish(
    table: pd.DataFrame,
    *,
    key: Mapping[str, pd.DataFrame],
    results: str | Path,
    passport: Mapping | None = None,
) -> pd.DataFrame:
    """Hand a notebook's table and key numbers to its report; the last cell of each notebook.

    Args:
        table: The result table.
        key: For each key number its label and a table of one row.
        results: Folder for the files; empty (as in JupyterLab) writes none.
        passport: Where the numbers come from, see ``table.save``.

    Returns:
        The key numbers to look at: by label the value, 95 % interval, n and unit.

    Raises:
        ValueError: A key number that is not one row.
        InputError: A table that is not valid, or a folder that cannot be written to.
    """
    rows = [_key_number(label, row) for label, row in key.items()]
    if str(results):
        try:
            _write_results(table, rows, Path(results), passport)
        except OSError as error:
            raise InputError(
                f"publish: cannot write to {error.filename or results} ({error.strerror}); "
                "free some space, or choose another folder with --out"
            ) from None
    shown = page.key_rows(rows)
    columns = {"value": "value", "interval": "95 % interval", "n": "n", "unit": "unit"}
    frame = pd.DataFrame(shown, index=[row["label"] for row in shown], columns=list(columns))
    return frame.rename(columns=columns).rename_axis(columns="key number")


def _key_number(label: str, row: pd.DataFrame) -> dict:
    if len(row) != 1:
        raise ValueError(f"publish: the key number {label!r} has {len(row)} rows, needs one")
    metric = one_metric(row, "publish")
    first = row.iloc[0]
    reason = first.get("reason", "")
    names = ("value", "lo", "hi", *(name for name in FLOOR if name in row.columns))
    bounds = {name: float(first[name]) for name in names}
    return {
        "label": label,
        **{name: bound if math.isfinite(bound) else None for name, bound in bounds.items()},
        "n": int(first["n"]),
        "unit": metric.unit,
        "metric": str(first["metric"]),
        "run": str(first["run"]),
        "step": int(first["step"]),
        "reason": "" if pd.isna(reason) else str(reason),
    }


def _write_results(table: pd.DataFrame, rows: list[dict], folder: Path, passport) -> None:
    save(table, folder / TABLE, passport=passport)
    with whole_file(folder / TABLE_CSV) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    write_json(folder / KEY, rows)


def run_report(
    notebook: str | Path, parameters: Mapping[str, object] | None = None, *, out: str | Path
) -> Report:
    """Make one report.

    Args:
        notebook: Name of a notebook of the project, or path to one.
        parameters: Values by name; texts are read as the command line reads them.
        out: Folder of reports; this one becomes ``<out>/<name>``.

    Returns:
        How it went; a failing cell gives status "failed" and a report that shows it.

    Raises:
        InputError: What was given cannot be used. No report is written or changed.
    """
    [report] = run_reports([notebook], parameters, out=out)
    if report.cause in ("input", "disk"):
        raise InputError(report.error)
    return report


def run_reports(
    notebooks: Sequence[str | Path | Notebook],
    parameters: Mapping[str, object] | None = None,
    *,
    out: str | Path,
    jobs: int = 1,
) -> list[Report]:
    """Make several reports and the index; a parameter goes to the notebooks that have it.

    The suite is trained first if a notebook asks for it and it is not cached.

    Args:
        notebooks: Names, paths, or what ``find_notebooks`` found.
        parameters: Values by name, as in :func:`run_report`.
        out: Folder of reports.
        jobs: How many to run at once; each is a process with its share of the cores.

    Raises:
        InputError: Before anything runs: unknown notebooks or parameters, wrong types, a folder
            that cannot be written to or that holds something else under a report's name.
    """
    plans = _with_keys(make_plans(notebooks, parameters or {}))
    made = not Path(out).exists()
    reports = run_plans(plans, out, jobs=jobs, force=True, keep_going=True)
    if any(report.cause not in ("input", "disk") for report in reports):
        write_site(out)
    elif made:
        with contextlib.suppress(OSError):
            Path(out).rmdir()  # a refusal leaves nothing behind, not even the folder
    return reports


def _with_keys(plans: Sequence[Plan]) -> list[Plan]:
    """The plans with what they depend on, by which a grid and ``reproduce`` know the reports."""
    hashes = Hashes()
    made_of = [fingerprint(plan, hashes) for plan in plans]
    hashes.save()
    return [
        replace(plan, fingerprint=parts, key=key_of(parts))
        for plan, parts in zip(plans, made_of, strict=True)
    ]


def make_plans(notebooks: Sequence, parameters: Mapping[str, object]) -> list[Plan]:
    """Check the parameters against every notebook; nothing runs.

    Raises:
        InputError: As :func:`run_reports`.
    """
    named = [str(n) for n in notebooks if not isinstance(n, Notebook)]
    by_name = {n.name: n for n in notebooks if isinstance(n, Notebook)}
    found = [*by_name.values(), *(find_notebooks(named) if named else [])]
    refuse_unknown(parameters, found)
    plans = []
    for notebook in found:
        given = {name: v for name, v in parameters.items() if name in notebook.names}
        plans.append(Plan(notebook, *notebook.check(given)))
    return plans
