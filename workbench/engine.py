"""How reports are made: one function makes one report anywhere, and a driver runs many of them.

A report is a folder that appears whole or not at all. It is filled in ``<out>/.running/<name>``
under a lock of the operating system, which a killed process gives back; ``status.json`` is
written last and vouches for the rest. papermill's own record of success is wrong after a dead
kernel or a timeout, so the status comes from the exception.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

import pandas as pd

from workbench import page
from workbench.cache import WAITS
from workbench.frozen import freeze_widgets
from workbench.parameters import FOLDER, RESULTS, Notebook
from workbench.site import KEY, LOG, PAGE, STATUS, TABLE, TABLE_CSV
from workbench.table import PASSPORT_KEY, InputError, load, whole_file

PACKAGES = (
    "memory-workbench", "torch", "transformers", "numpy", "scipy", "pandas", "plotly", "papermill",
)  # fmt: skip
LOCKS, RUNNING = ".locks", ".running"
STARTS = 3  # tries to start a kernel: another process can take its ports before it binds them
START_SECONDS = 120  # until a kernel must have answered; a busy machine takes a while
LAST_WORDS = 1.0  # seconds that a hung kernel has to say where it hangs
EVERY = 60.0  # seconds between two lines about a running report, where progress goes to a file
_INJECTED = page.INJECTED
# what tqdm writes: "edits:  69%|######8   | 22/32 [00:10<00:04, 2.16/s]", "12text [00:01, 9.9text/s]"
_BAR = re.compile(r"[^\r\n]*(?:\d%\|[^\r\n]*\||\d\w*) ?[^\s|]* \[\d+:\d\d[^\]\r\n]*\][^\r\n]*")
_BAR_LONGEST = 1000  # characters; over a line of millions the search would take for ever
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # torch reads the first
# The kernel sends what is written to its standard error to the cell, which a crash cuts short; so
# Python's own last words go to the log.
_LAUNCH = (
    "import faulthandler, os, runpy; faulthandler.enable(os.dup(2), all_threads=False); "
    "runpy.run_module('ipykernel_launcher', run_name='__main__')"
)
_FULL = (errno.ENOSPC, errno.EDQUOT) if os.name == "posix" else (errno.ENOSPC,)


@dataclass(frozen=True)
class Report:
    """How a report went.

    Attributes:
        name: Its folder's name.
        folder: Where it is.
        status: "ok", "failed", "refused" (the input cannot be used) or "missing" (not started,
            because another one failed before).
        seconds: How long it took, when it was made.
        error: What went wrong and what to do.
        cause: What failed: "cell", "input", "machine" (a kernel that died or took too long, a
            worker that was lost) or "disk" (nothing could be written: an earlier report is left
            as it was); empty if nothing did.
        cached: Whether it was there already, made from the same.
    """

    name: str
    folder: Path
    status: str
    seconds: float
    error: str = ""
    cause: str = ""
    cached: bool = False

    @property
    def table(self) -> pd.DataFrame:
        """The result table, its passport in ``attrs``.

        Raises:
            InputError: There is none, because the report failed before it.
        """
        return load(self.folder / TABLE)

    @property
    def key(self) -> pd.DataFrame:
        """The key numbers, a row for each."""
        path = self.folder / KEY
        return pd.DataFrame(json.loads(path.read_text("utf-8")) if path.is_file() else [])


@dataclass(frozen=True)
class Plan:
    """A report to make: a notebook with its checked parameters.

    Attributes:
        notebook: What runs.
        given: The parameters that were set.
        settled: All of them.
        name: The report's folder; the notebook's name if empty.
        key: Hash of all that decides the result; empty: it is made whatever is there.
        fingerprint: What the key was made of.
        grid: Name of the grid it belongs to, if any.
        cell_timeout: Seconds that a cell may take.
        report_timeout: Seconds that the report may take.
    """

    notebook: Notebook
    given: dict
    settled: dict
    name: str = ""
    key: str = ""
    fingerprint: dict = field(default_factory=dict)
    grid: str = ""
    cell_timeout: float | None = None
    report_timeout: float | None = None

    def __post_init__(self):
        object.__setattr__(self, "name", self.name or self.notebook.name)

    @property
    def command(self) -> str:
        """The command line that makes this report again."""
        path = self.notebook.path
        words = ["workbench", "report", path.stem if path.parent == FOLDER else str(path)]
        for name, value in self.given.items():
            words += ["-p", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        return shlex.join(words)


class Stopped(Exception):
    """A report was ended by ``end_kernels`` and left nothing behind."""


# what a running report calls: its state ("waiting" for another process that makes the same
# report, "running"), the code cell it is in, counted from 1, and how many there are
Say = Callable[[str, int, int], None]


def finished(plan: Plan, out: str | Path, *, retry_failed: bool = False) -> Report | None:
    """The report of this plan if it is there, made from the same; None if it has to be made.

    Args:
        plan: What is asked for.
        out: Folder of reports.
        retry_failed: Whether one that failed or was refused has to be made.
    """
    folder = Path(out) / plan.name
    about = read_status(folder) if plan.key else None
    if about is None or about.get("key") != plan.key or about.get("name") != plan.name:
        return None
    status = about.get("status")
    if status not in (("ok",) if retry_failed else ("ok", "failed", "refused")):
        return None
    if not (folder / PAGE).is_file():
        return None
    seconds = float(about.get("seconds", 0))
    error, cause = about.get("error", ""), about.get("cause", "")
    return Report(plan.name, folder, status, seconds, error, cause, cached=True)


def read_status(folder: Path) -> dict | None:
    """What ``status.json`` says; None where there is none or it cannot be read."""
    try:
        about = json.loads((folder / STATUS).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) else None


def make_report(
    plan: Plan,
    out: str | Path,
    where: str | Path,
    *,
    say: Say | None = None,
    force: bool = False,
    retry_failed: bool = False,
    threads: int | None = None,
) -> Report:
    """Make one report, in this process and a kernel of its own; what an executor is sent.

    Only one process at a time makes a report of this name; another waits, and takes it as it is
    if it was made from the same.

    Args:
        plan: What to make.
        out: Folder of reports; this one becomes ``<out>/<plan.name>``.
        where: The folder that the notebook runs in.
        say: Called as it goes on, see ``Say``.
        force: Make it even if it is there, made from the same.
        retry_failed: Make it if it is there but failed.
        threads: How many threads the kernel's libraries may use; None: as they choose.

    Returns:
        How it went. Nothing that goes wrong with the report is raised.

    Raises:
        Stopped: ``end_kernels`` was called.
    """
    out = Path(out).absolute()
    say = say or (lambda state, cell, cells: None)
    began = time.monotonic()
    with _Kernel(out / plan.name, threads).registered() as kernel:
        try:
            with _locked(out, plan.name, kernel, say):
                _restore(out, plan.name)
                report = None if force else finished(plan, out, retry_failed=retry_failed)
                return report or _make(plan, out, str(where), kernel, say)
        except OSError as error:
            message, took = _cannot_write(out, error), time.monotonic() - began
            return Report(plan.name, out / plan.name, "failed", took, message, "disk")


def run_plans(
    plans: Sequence[Plan],
    out: str | Path,
    *,
    jobs: int = 1,
    executor: Executor | None = None,
    force: bool = False,
    retry_failed: bool = False,
    keep_going: bool = False,
    progress: bool = True,
) -> list[Report]:
    """Make the reports that are not there yet, several at once.

    Args:
        plans: What to make; each with a name of its own.
        out: Folder of reports.
        jobs: How many to run at once; each is a process with its share of the cores.
        executor: Where ``make_report`` is sent; None: threads of this process. The keyword
            ``say`` is a function of this process.
        force: Make all, whatever is there.
        retry_failed: Make those again that failed or were refused.
        keep_going: Start others after a cell has failed or an input was refused. What fails for
            reasons of the machine never stops the others.
        progress: Whether to say on stderr how it goes: bars on a terminal, lines elsewhere.

    Returns:
        A report for each plan, in their order. Those that were not started are "missing".

    Raises:
        InputError: Before anything runs: a folder that cannot be written to or that holds
            something else under a report's name, two reports of one name, a suite's corpus that
            cannot be used.
    """
    if jobs < 1:
        raise InputError(f"report: --jobs is {jobs}, needs at least 1")
    out = usable(out, [plan.name for plan in plans])
    found = (None if force else finished(p, out, retry_failed=retry_failed) for p in plans)
    reports: list[Report | None] = list(found)
    todo = deque(index for index, report in enumerate(reports) if report is None)
    _ensure_suites([plans[index] for index in todo])
    shown = _Progress(len(plans), len(plans) - len(todo), jobs) if progress else None
    options = {"force": force, "retry_failed": retry_failed}
    with contextlib.ExitStack() as stack:
        window = 2 * jobs  # so that no worker has to wait for the next
        executor = executor or stack.enter_context(ThreadPoolExecutor(jobs))
        if isinstance(executor, ThreadPoolExecutor):
            window = jobs
            options["threads"] = share_of_cores(min(jobs, max(1, len(todo))))
        running: dict[Future, int] = {}
        failed = ""
        try:
            while todo or running:
                while todo and len(running) < window and not failed:
                    index = todo.popleft()
                    say = shown.start(index, plans[index].name) if shown else None
                    future = executor.submit(
                        make_report, plans[index], str(out), os.getcwd(), say=say, **options
                    )
                    running[future] = index
                if not running:
                    break
                # without a timeout Windows would not let Ctrl-C through
                for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    index = running.pop(future)
                    if future.cancelled():
                        if shown:
                            shown.drop(index)
                        continue
                    report = reports[index] = _outcome(future, plans[index], out)
                    if shown:
                        shown.end(index, report)
                    if report.cause in ("cell", "input") and not keep_going:
                        failed = failed or (report.name if not report.cached else "")
                if failed:
                    for future in list(running):
                        future.cancel()  # of those that have not begun
                if shown:
                    shown.tick()
        except BaseException:
            _end(executor, list(running), {out / plan.name for plan in plans})
            raise
        finally:
            if shown:
                shown.close()
    missing = [Report(p.name, out / p.name, "missing", 0.0) for p in plans]
    left = sum(report is None for report in reports)
    if left and shown:
        _print(
            f"{left} of {len(plans)} not started, because {failed} failed; run again when it is "
            "mended, or go on in spite of it with --keep-going"
        )
    return [report or absent for report, absent in zip(reports, missing, strict=True)]


def _outcome(future: Future, plan: Plan, out: Path) -> Report:
    error = future.exception()
    if error is None:
        return future.result()
    if not isinstance(error, Exception):
        raise error
    message = f"report: {_one_line(f'{type(error).__name__}: {error}')}"
    return Report(plan.name, out / plan.name, "failed", 0.0, message, "machine")


def _end(executor: Executor, futures: Sequence[Future], folders: set[Path]) -> None:
    """Ctrl-C reaches only the main thread; the others end when their kernels are gone."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        # whoever presses Ctrl-C twice means it, but the kernels have to go first
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            executor.shutdown(wait=False, cancel_futures=True)
            end_kernels(folders)
            waits = wait(futures, timeout=0.2).not_done
            # one that was handed over in the moment of the signal is in no list yet
            if not waits and not any(kernel.folder in folders for kernel in list(_running)):
                return


def usable(out: str | Path, names: Sequence[str]) -> Path:
    """Check that reports of these names can be written to a folder, which is made.

    Raises:
        InputError: It cannot be written to, holds something else under a report's name, a name
            leads out of it, or there are two of one name.
    """
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise InputError(f"report: {out} is a file; choose a folder with --out")
    for name in names:
        if name.startswith(".") or name != Path(name).name:
            raise InputError(
                f"report: a report named {name!r} would not be a folder in {out}; choose a name "
                "without slashes and that does not begin with a dot"
            )
        target = out / name
        # os.path: PermissionError is answered below, by the folder itself
        if os.path.lexists(target) and not (target / STATUS).is_file():
            raise InputError(
                f"report: {target} is there already and is not a report; "
                "move it away, or choose another folder with --out"
            )
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise InputError(f"report: two reports are named {twice!r}; give each a name of its own")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(_cannot_write(out, error)) from None
    return out


def _cannot_write(folder: Path, error: OSError) -> str:
    return (
        f"report: cannot write to {error.filename or folder} ({error.strerror or error}); "
        "free some space, or choose another folder with --out"
    )


def _ensure_suites(plans: Sequence[Plan]) -> None:
    """Train the suites that are asked for, so that the reports do not all wait for one of them."""
    wanted = [
        plan.settled.get("corpus") or None
        for plan in plans
        if "suite" in (plan.settled.get("model"), plan.settled.get("base"))
    ]
    for corpus in dict.fromkeys(wanted):
        from workbench.suite import ensure_suite

        ensure_suite(corpus=corpus)


def share_of_cores(jobs: int) -> int | None:
    """Threads for each of several kernels; None where the user has decided, or there is only one."""
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, _cores() // jobs)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# the folder of one report: under its lock, and whole


@contextlib.contextmanager
def _locked(out: Path, name: str, kernel: _Kernel, say: Say):
    """Wait until no other process makes this report."""
    from filelock import FileLock, Timeout

    path = out / LOCKS / f"{name}.lock"
    lock = FileLock(path)
    while not lock.is_locked:
        if kernel.stopped:
            raise Stopped
        # another run may remove the folder, when it is empty, at any time
        with contextlib.suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0.5, poll_interval=0.1)
            except Timeout:
                say("waiting", 0, 0)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if not (out / name).exists():
                # while it is held: who waits for it sees that it is gone, and makes another
                path.unlink()
        lock.release()
        _remove_empty(path.parent)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _restore(out: Path, name: str) -> None:
    """Clear away what a killed run left; what it had finished is put in its place."""
    place = out / RUNNING / name
    new, old, target = place / "new", place / "old", out / name
    if (new / STATUS).is_file():
        _swap(new, target, old)
    elif old.exists() and not target.exists():
        old.rename(target)
    if place.exists():
        shutil.rmtree(place)


def _swap(new: Path, target: Path, old: Path) -> None:
    """Put a folder in place of another; a kill in between is mended by ``_restore``."""
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


@contextlib.contextmanager
def _swapped_folder(out: Path, name: str):
    """Give a folder to fill; it replaces ``<out>/<name>`` in one step, if it has a status."""
    place = out / RUNNING / name
    folder = place / "new"
    while not folder.exists():
        with contextlib.suppress(FileNotFoundError):  # removed, as it was empty, by another run
            folder.mkdir(parents=True)
    try:
        yield folder
        if (folder / STATUS).is_file():
            _swap(folder, out / name, place / "old")
    finally:
        shutil.rmtree(place, ignore_errors=True)
        _remove_empty(place.parent)


def _make(plan: Plan, out: Path, where: str, kernel: _Kernel, say: Say) -> Report:
    started, clock = datetime.now(UTC), time.monotonic()
    with _swapped_folder(out, plan.name) as folder:
        with _Log(folder / LOG, clock) as log:
            log.write(f"{started:%Y-%m-%d %H:%M:%S} UTC  {plan.command}")
            notebook, failure, went = _execute(plan, folder, where, kernel, log, say)
            duration = time.monotonic() - clock
            status = failure.status if failure else "ok"
            log.write(f"{status}: {failure.message}" if failure else status)
        error, cause = (failure.message, failure.cause) if failure else ("", "")
        report = Report(plan.name, out / plan.name, status, duration, error, cause)
        # a full disk holds no report; a refusal is one only where it is a row of a grid
        if cause == "disk" or (cause == "input" and not plan.grid):
            return report
        about = {
            "name": plan.name,
            "notebook": plan.notebook.name,
            "title": plan.notebook.title,
            "description": plan.notebook.description,
            "status": status,
            "cause": cause,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(duration, 1),
            **went,
            "grid": plan.grid,
            "given": plan.given,
            "parameters": {n: v for n, v in plan.settled.items() if n != RESULTS},
            "error": error,
            "command": plan.command,
            "key": plan.key,
            "fingerprint": plan.fingerprint,
            "versions": _versions(),
            "machine": {
                "system": platform.system(),
                "processor": platform.machine(),
                "cores": _cores(),
                "threads": kernel.threads or int(os.environ.get(_THREADS[0], 0) or _cores()),
            },
        }
        _write_files(folder, plan, notebook, about)
    return report


# the notebook, run


@dataclass(frozen=True)
class _Failure:
    message: str
    cause: str  # "cell", "input", "machine" or "disk"

    @property
    def status(self) -> str:
        return "refused" if self.cause == "input" else "failed"


class _Log:
    """``log.txt``: what the kernel prints beside its cells, and how long each of them took."""

    def __init__(self, path: Path, clock: float):
        self._path, self._clock = path, clock

    def __enter__(self):
        self.file = self._path.open("ab", buffering=0)
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, line: str) -> None:
        took = time.monotonic() - self._clock
        self.file.write(f"[{took:9.2f} s] {line}\n".encode())


def _execute(plan: Plan, folder: Path, where: str, kernel: _Kernel, log: _Log, say: Say):
    """Run the notebook in a kernel of its own.

    Returns:
        The executed notebook, cleaned; how it failed, or None; and how far it went.
    """
    notebook = _prepared(plan, folder)
    work = [i for i, c in enumerate(notebook.cells) if c.cell_type == "code" and c.source.strip()]
    number = {index: nth for nth, index in enumerate(work, start=1)}
    at, passed, own = -1, 0, 0.0  # no cell has begun
    began = time.monotonic()

    def on_cell_execute(cell, cell_index):
        nonlocal at, began
        at, began = cell_index, time.monotonic()
        # the outputs come into this object; the notebook as a whole is not to be had on failure
        notebook.cells[cell_index] = cell
        kernel.set_alarm("cell", f"cell {number[at]} of {len(work)}", plan.cell_timeout)
        say("running", number[at], len(work))

    def on_cell_executed(cell, cell_index, execute_reply):
        nonlocal passed, own
        took = time.monotonic() - began
        own += took
        passed += execute_reply["content"]["status"] == "ok"
        log.write(f"cell {number[cell_index]} of {len(work)}: {took:.2f} s")

    failure = None
    say("running", 0, len(work))
    kernel.set_alarm("report", "the report", plan.report_timeout)
    with kernel.watched(), _event_loop():
        for attempt in range(1, STARTS + 1):
            try:
                _run_cells(notebook, where, kernel, log, on_cell_execute, on_cell_executed)
            except OSError:
                raise
            # papermill's, nbclient's, zmq's: each is a report that failed
            except Exception as error:
                if kernel.stopped:
                    raise Stopped from None
                if at < 0 and attempt < STARTS and not kernel.ended:
                    continue
                if type(error).__name__ == "DeadKernelError" or kernel.ended:
                    own += time.monotonic() - began
                failure = _failure(error, folder, kernel)
            finally:
                kernel.kill()  # with what it has started
            break
    _clean(notebook, folder)
    if failure and not any(o.output_type == "error" for o in page.outputs(notebook)):
        _mark_failed(notebook, max(at, 0), failure)
    went = {"cells_seconds": round(own, 2), "passed": passed, "cells": len(work)}
    return notebook, failure, went


def _run_cells(notebook, where: str, kernel: _Kernel, log: _Log, begins, ends) -> None:
    """Run a notebook by papermill, which calls ``begins`` and ``ends`` around each cell of code."""
    import papermill

    # what it has to say is in the exception
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    whole = papermill.execute_notebook(
        notebook,
        None,
        kernel_name="python3",
        progress_bar=False,
        start_timeout=START_SECONDS,
        autosave_cell_every=0,
        resources={"metadata": {"path": where}},
        kernel_manager_class=kernel.manager_class(log.file),
        on_cell_execute=begins,
        on_cell_executed=ends,
        record_timing=False,
        store_widget_state=True,  # of explorers, which become figures
        # a history in the user's home is shared, and locked, by all kernels
        extra_arguments=["--log-level=CRITICAL", "--HistoryManager.enabled=False"],
    )
    if state := whole.metadata.get("widgets"):
        notebook.metadata["widgets"] = state


@contextlib.contextmanager
def _event_loop():
    """Close the event loop that nbclient makes for a thread and leaves open, sockets and all."""
    from jupyter_core.utils import ensure_event_loop

    if threading.current_thread() is threading.main_thread():  # its loop may be anyone's
        yield
        return
    loop = ensure_event_loop()
    try:
        yield
    finally:
        loop.close()


def _prepared(plan: Plan, folder: Path):
    """The notebook with the parameters put in after the tagged cell, and ids that do not vary."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    values = dict(plan.given)
    if RESULTS in plan.settled:
        values[RESULTS] = str(folder)
    notebook = load_notebook_node(str(plan.notebook.path))
    notebook.metadata["kernelspec"] = {
        "name": "python3", "display_name": "Python 3", "language": "python",
    }  # fmt: skip
    if values:
        notebook = parameterize_notebook(notebook, values, kernel_name="python3", language="python")
    for index, cell in enumerate(notebook.cells):
        injected = _INJECTED in cell.metadata.get("tags", [])
        cell["id"] = _INJECTED if injected else f"cell-{index}"
    return notebook


def _failure(error: Exception, folder: Path, kernel: _Kernel) -> _Failure:
    if kernel.ended:
        return _Failure(kernel.ended, "machine")
    name, message = getattr(error, "ename", None), getattr(error, "evalue", None)
    if name is None:
        kind = type(error).__name__
        if kind == "DeadKernelError":
            died = f"The kernel died while this cell ran: out of memory, or a crash{kernel.signal}."
            return _Failure(died, "machine")
        return _Failure(_scrubbed(f"{kind}: {error}", folder), "machine")
    message = _scrubbed(str(message), folder)
    if any(os.strerror(number) in message for number in _FULL):
        full = f"report: the disk is full ({message}); free some space"
        return _Failure(_one_line(message if name == "InputError" else full), "disk")
    if name == "InputError":
        return _Failure(_one_line(message), "input")
    # numpy's and torch's errors have names of their own
    memory = name.endswith(("MemoryError", "OutOfMemoryError")) or "can't allocate" in message
    return _Failure(f"{name}: {message}" if message else name, "machine" if memory else "cell")


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _scrubbed(text: str, folder: Path) -> str:
    """Text without what differs from run to run: our working folder, the kernel's file names."""
    text = text.replace(str(folder), folder.parent.name)
    # it begins where a word does, or a long word would be searched from each of its letters
    return re.sub(r"(?<![^\s'\"])[^\s'\"]*ipykernel_\d+[/\\]\d+\.py", "cell", text)


def _clean(notebook, folder: Path) -> None:
    """Drop what papermill added, so that two runs of the same work are the same bytes."""
    notebook.metadata.pop("papermill", None)
    freeze_widgets(notebook)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if _INJECTED in cell.metadata.get("tags", []):
            cell.source = re.sub(rf"(?m)^{RESULTS} = .*$", f'{RESULTS} = ""', cell.source)
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    for output in page.outputs(notebook):
        if output.output_type == "error":
            output["evalue"] = _scrubbed(output["evalue"], folder)
            output["traceback"] = [_scrubbed(part, folder) for part in output["traceback"]]
        elif output.output_type == "stream":
            output["text"] = _scrubbed(_without_bars(output["text"]), folder)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _was_a_bar(output)]


def _joined(outputs: list) -> list:
    """Each of a cell's streams in one piece, its overwritten text left out, stdout first.

    nbclient does the same, in a time that is quadratic in the length of a line.
    """
    kept, streams = [], {}
    for output in outputs:
        if output.output_type != "stream":
            kept.append(output)
        elif output.name in streams:
            streams[output.name].append(output["text"])
        else:
            streams[output.name] = [output["text"]]
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            lines = "".join(streams[output.name]).split("\n")
            # what stands before a carriage return is overwritten, unless the line ends with it
            output["text"] = "\n".join(
                n[n.rfind("\r", 0, len(n) - 1) + 1 :] if n else n for n in lines
            )
    # they come by two pipes, in no order of their own
    for first, second in pairwise(range(len(kept))):
        names = [kept[i].get("name") for i in (first, second)]
        if names == ["stderr", "stdout"]:
            kept[first], kept[second] = kept[second], kept[first]
    return kept


def _without_bars(text: str) -> str:
    """Text without what progress bars left, and waiting: it is over and tells only of this run."""

    def dropped(line: re.Match) -> str:
        if WAITS in line[0]:
            return ""
        return _BAR.sub("", line[0]) if len(line[0]) <= _BAR_LONGEST else line[0]

    kept = re.sub(r"[^\r\n]+", dropped, text)
    return text if kept == text else re.sub(r"[ \t]*[\r\n]+", "\n", kept).strip("\r\n ")


def _was_a_bar(output) -> bool:
    """Whether nothing but progress was in it: an emptied stream, or a bar that was a widget."""
    if output.output_type == "stream":
        return not output["text"]
    data = output.get("data", {})
    return any("widget-view" in kind for kind in data) and bool(
        _BAR.fullmatch(data.get("text/plain", ""))
    )


def _mark_failed(notebook, index: int, failure: _Failure) -> None:
    from nbformat.v4 import new_output

    cell = notebook.cells[min(index, len(notebook.cells) - 1)]
    output = new_output("error", ename="Stopped", evalue=failure.message, traceback=[])
    if cell.cell_type == "code":
        cell.outputs.append(output)


def _write_files(folder: Path, plan: Plan, notebook, about: Mapping) -> None:
    """All files of a report; ``status.json`` last, so that it vouches for the others."""
    import nbformat

    name = plan.name
    nbformat.write(notebook, folder / f"{name}.ipynb")
    small = page.thumbnail(notebook)
    if small is not None:
        write_json(folder / page.THUMBNAIL, page.finite(small))
        text = page.figures_script(notebook)
        (folder / page.FIGURES).write_text(text, encoding="utf-8", newline="\n")
    key = json.loads((folder / KEY).read_text("utf-8")) if (folder / KEY).is_file() else []
    helps = {p.name: p.help for p in plan.notebook.parameters}
    parameters = [
        {"name": n, "value": page.shown(v), "help": helps[n], "given": n in plan.given}
        for n, v in about["parameters"].items()
    ]
    files = (f"{name}.ipynb", TABLE_CSV, TABLE, KEY, LOG)
    html = page.report_page(
        notebook,
        page.for_page(about),
        key=page.key_rows(key),
        measures=page.measure_rows(key),
        parameters=parameters,
        passport=[*_passport(folder), *about["versions"].items()],
        downloads=[f for f in files if (folder / f).is_file()],
    )
    (folder / PAGE).write_text(html, encoding="utf-8", newline="\n")
    write_json(folder / STATUS, about)


def write_json(path: Path, value) -> None:
    """Write JSON that people can read; the file appears whole."""
    with whole_file(path) as temporary:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _passport(folder: Path) -> list[tuple[str, str]]:
    if not (folder / TABLE).is_file():
        return []
    import pyarrow.parquet as pq

    note = (pq.read_schema(folder / TABLE).metadata or {}).get(PASSPORT_KEY)
    return _flat(json.loads(note), "") if note else []


def _flat(value, name: str) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        parts = (_flat(part, f"{name}.{key}" if name else key) for key, part in value.items())
        return [pair for part in parts for pair in part]
    return [(name, page.shown(value))]


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


# kernels


_running: set[_Kernel] = set()  # of this process: a signal, or a cluster, ends them from outside


def end_kernels(folders: set[Path] | None = None) -> None:
    """End the kernels of this process's reports, with what they started.

    Args:
        folders: Of which reports; None: of all.
    """
    for kernel in list(_running):
        if folders is None or kernel.folder in folders:
            kernel.stop()


class _Kernel:
    """The process that one report runs in.

    ``ended`` says why it was ended before its time, if it was.
    """

    def __init__(self, folder: Path, threads: int | None):
        self.folder, self.threads = folder, threads
        self.stopped = False
        self.ended = ""
        self._process = self._warden = None
        self._lock = threading.Lock()
        self._alarms: dict[str, tuple[float, str]] = {}  # until when, and what to say then

    @contextlib.contextmanager
    def registered(self):
        """Let ``end_kernels`` find it."""
        _running.add(self)
        try:
            yield self
        finally:
            _running.discard(self)
            self.kill()

    def manager_class(self, log) -> type:
        """A kernel manager that runs this interpreter, whatever kernels the user has installed."""
        from jupyter_client import AsyncKernelManager
        from jupyter_client.kernelspec import KernelSpec

        # progress bars would make each run's notebook differ; the renderer must not depend on
        # where the report is made
        environment = {
            "TQDM_DISABLE": "1", "PLOTLY_RENDERER": "plotly_mimetype", "PYTHONHASHSEED": "0",
        }  # fmt: skip
        if self.threads:
            environment |= dict.fromkeys(_THREADS, str(self.threads))
        spec = KernelSpec(
            argv=[sys.executable, "-c", _LAUNCH, "-f", "{connection_file}"],
            display_name="Python 3",
            language="python",
            env=environment,
        )
        kernel = self

        class Manager(AsyncKernelManager):
            kernel_spec = spec

            async def start_kernel(self, **options):
                await super().start_kernel(stdout=log, stderr=log, **options)
                kernel._has_begun(self.provisioner.process)

        return Manager

    def _has_begun(self, process: subprocess.Popen) -> None:
        with self._lock:
            self._process = process
            if os.name == "posix":
                # If this process is killed, its end of the pipe closes, and the shell kills the
                # kernel's group. The kernel looks for its parent too, but not in a long C call,
                # and what it has started does not.
                self._warden = subprocess.Popen(
                    ["/bin/sh", "-c", f"read -r line; kill -9 -{process.pid}"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
        with contextlib.suppress(OSError):  # where memory runs out, a kernel goes, and not we
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("500")
        with contextlib.suppress(ImportError, AttributeError, OSError):
            import resource

            resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))  # gigabytes of no use
        if self.stopped or self.ended:
            self.kill()

    @property
    def signal(self) -> str:
        """The signal that ended it, in brackets, if one did."""
        code = self._process.poll() if self._process else None
        return f" ({signal.Signals(-code).name})" if code is not None and code < 0 else ""

    def set_alarm(self, what: str, name: str, seconds: float | None) -> None:
        """End it unless the next alarm of this kind is set within so many seconds."""
        if seconds is not None:
            said = f"{name} took longer than {seconds:g} s and was ended"
            self._alarms[what] = time.monotonic() + seconds, said

    @contextlib.contextmanager
    def watched(self):
        """Let the alarms go off while this lasts; a kernel that hangs in C code hears no other."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.2):
                for until, said in list(self._alarms.values()):
                    if time.monotonic() > until:
                        self.end(said)
                        return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def end(self, why: str) -> None:
        """End it because it hangs; the log says where."""
        self.ended = why
        process = self._process
        if process is not None and os.name == "posix":
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                process.send_signal(signal.SIGABRT)  # Python prints where each thread is
                process.wait(LAST_WORDS)
        self.kill()

    def stop(self) -> None:
        """End it and its report."""
        self.stopped = True
        self.kill()

    def kill(self) -> None:
        """Kill the process and what it has started, if any of it is left."""
        with self._lock:
            process, warden, self._warden = self._process, self._warden, None
        if process is not None and process.poll() is None:
            with contextlib.suppress(OSError):
                process.kill()
        if warden is not None:
            warden.stdin.close()
            warden.wait()


class _Progress:
    """How many reports, each on a line: bars on a terminal, plain lines elsewhere."""

    def __init__(self, total: int, cached: int, jobs: int):
        self._total, self._done, self._jobs = total, cached, jobs
        self._failed, self._made, self._seconds = 0, 0, 0.0
        self._began = self._said = time.monotonic()
        self._rows: dict[int, dict] = {}
        self._live = sys.stderr.isatty()
        self._whole = None
        if cached:
            _print(f"{cached} of {total} are there already, unchanged")
        if self._live and total > 1:
            layout = "{n_fmt} of {total_fmt} reports |{bar:20}| {elapsed}{postfix}"
            self._whole = self._bar(layout, total=total, initial=cached)

    @staticmethod
    def _bar(layout: str, **options):
        from tqdm import tqdm

        return tqdm(file=sys.stderr, bar_format=layout, leave=False, **options)

    def start(self, index: int, name: str) -> Say:
        """What the report calls as it goes, from whatever thread."""
        label = f"[{index + 1}/{self._total}] {name}"
        row = {"label": label, "at": ("", 0, 0), "began": time.monotonic(), "bar": None}
        self._rows[index] = row

        def say(state: str, cell: int, cells: int) -> None:
            if state != row["at"][0]:
                row["began"] = time.monotonic()
                if not self._live:
                    waiting = "waits for another run that makes it"
                    _print(f"{label}: {'started' if state == 'running' else waiting}")
            row["at"] = (state, cell, cells)

        return say

    def tick(self) -> None:
        """Draw what has changed; in a file, say every so often that all is well."""
        if self._live:
            for row in self._rows.values():
                self._draw(row)
            if self._whole is not None:
                self._whole.set_postfix_str(self._rest().lstrip(", "), refresh=False)
                self._whole.n = self._done
                self._whole.refresh()
        elif time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            for row in self._rows.values():
                state, cell, cells = row["at"]
                if state == "running":
                    took = page.seconds(self._said - row["began"])
                    _print(f"{row['label']}: cell {cell} of {cells}, {took}")
            if self._total > 1:
                _print(self._so_far())

    def _draw(self, row: dict) -> None:
        _, cell, cells = row["at"]
        if not cells:
            return
        if row["bar"] is None:
            layout = "{desc}  cell {n_fmt} of {total_fmt} |{bar:20}| {elapsed}"
            row["bar"] = self._bar(layout, desc=row["label"], total=cells)
        row["bar"].n = cell
        row["bar"].refresh()

    def end(self, index: int, report: Report) -> None:
        """A report has ended."""
        label = self._rows[index]["label"]
        self.drop(index)
        self._done += 1
        self._failed += report.status != "ok"
        if not report.cached:
            self._made += 1
            self._seconds += report.seconds
        how = "made by another run" if report.cached else f"in {page.seconds(report.seconds)}"
        line = f"{label}: {report.status} {how}"
        if report.error:
            line += f": {_one_line(report.error)[:200]}"
        if self._total > 1 and not self._live:
            line += f" ({self._so_far()})"
        _print(line)

    def drop(self, index: int) -> None:
        """A report is not run after all, or no more."""
        bar = self._rows.pop(index)["bar"]
        if bar is not None:
            bar.close()

    def close(self) -> None:
        """Leave the terminal as it was."""
        for index in list(self._rows):
            self.drop(index)
        if self._whole is not None:
            self._whole.close()

    def _so_far(self) -> str:
        failed = f", {self._failed} not ok" if self._failed else ""
        took = page.seconds(time.monotonic() - self._began)
        return f"{self._done} of {self._total} done{failed}; {took}{self._rest()}"

    def _rest(self) -> str:
        left = self._total - self._done
        if not self._made or not left:
            return ""
        mean = self._seconds / self._made
        return f", about {page.seconds(mean * left / min(self._jobs, left))} to go"


def _print(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)
