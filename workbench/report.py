"""Notebooks to reports: papermill runs them, each becomes a folder that appears whole or not at all.

A report is ``<out>/<name>/`` with ``report.html``, the executed notebook, ``table.parquet``,
``table.csv``, ``key.json`` and ``status.json``; ``<out>/index.html`` lists all that are there.
papermill's own record of success is wrong after a dead kernel or a timeout, so the status comes
from the exception and is written here, last.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd

from workbench import page
from workbench.parameters import (
    FOLDER,
    PILLARS,
    RESULTS,
    Notebook,
    find_notebooks,
    refuse_unknown,
)
from workbench.table import FLOOR, PASSPORT_KEY, InputError, one_metric, save, whole_file

PACKAGES = (
    "memory-workbench", "torch", "transformers", "numpy", "scipy", "pandas", "plotly", "papermill",
)  # fmt: skip
STATUS = "status.json"
TABLE = "table.parquet"
TABLE_CSV = "table.csv"
KEY = "key.json"
STARTS = 3  # tries to start a kernel: another process can take its ports before it binds them
_INPUT, _EXECUTED = ".input.ipynb", ".executed.ipynb"  # working files, gone before the folder shows
_INJECTED = "injected-parameters"
# what tqdm writes: "edits:  69%|######8   | 22/32 [00:10<00:04, 2.16/s]", "12text [00:01, 9.9text/s]"
_BAR = re.compile(r"[^\r\n]*(?:\d%\|[^\r\n]*\||\d\w*) ?[^\s|]* \[\d+:\d\d[^\]\r\n]*\][^\r\n]*")
_NO_SPACE = "[Errno 28]"


@dataclass(frozen=True)
class Report:
    """How a report went.

    ``status`` is "ok", "failed" (a cell did, and the report shows it) or "refused" (the input
    cannot be used: nothing was written, and ``error`` says what to do).
    """

    name: str
    folder: Path
    status: str
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Plan:
    """A notebook with its checked parameters: those given, and all."""

    notebook: Notebook
    given: dict
    settled: dict

    @property
    def command(self) -> str:
        """The command line that makes this report again."""
        path = self.notebook.path
        words = ["workbench", "report", path.stem if path.parent == FOLDER else str(path)]
        for name, value in self.given.items():
            words += ["-p", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        return shlex.join(words)


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
    _write_json(folder / KEY, rows)


def _write_json(path: Path, value) -> None:
    with whole_file(path) as temporary:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


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
    if report.status == "refused":
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
    if jobs < 1:
        raise InputError(f"report: --jobs is {jobs}, needs at least 1")
    plans = make_plans(notebooks, parameters or {})
    made = not Path(out).exists()
    folder = _usable(Path(out), [plan.notebook.name for plan in plans])
    _ensure_suites(plans)
    try:
        reports = _run_all(plans, folder, min(jobs, max(1, len(plans))))
        if all(report.status == "refused" for report in reports):
            if made:
                folder.rmdir()  # a refusal leaves nothing behind, not even the folder
        else:
            write_index(folder)
    except OSError as error:
        raise InputError(_cannot_write(folder, error)) from None
    return reports


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


def _usable(out: Path, names: Sequence[str]) -> Path:
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise InputError(f"report: {out} is a file; choose a folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(_cannot_write(out, error)) from None
    for name in names:
        target = out / name
        if target.exists() and not (target / STATUS).is_file():
            raise InputError(
                f"report: {target} is there already and is not a report; "
                "move it away, or choose another folder with --out"
            )
    return out


def _cannot_write(folder: Path, error: OSError) -> str:
    return (
        f"report: cannot write to {error.filename or folder} ({error.strerror or error}); "
        "free some space, or choose another folder with --out"
    )


def _ensure_suites(plans: Sequence[Plan]) -> None:
    wanted = [
        plan.settled.get("corpus") or None
        for plan in plans
        if "suite" in (plan.settled.get("model"), plan.settled.get("base"))
    ]
    for corpus in dict.fromkeys(wanted):
        from workbench.suite import ensure_suite

        ensure_suite(corpus=corpus)


def _run_all(plans: Sequence[Plan], out: Path, jobs: int) -> list[Report]:
    kernels = _Kernels(jobs)
    progress = _Progress(len(plans))
    where = os.getcwd()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [
            pool.submit(_run_one, plan, out, where, kernels, progress.line(i, plan.notebook.name))
            for i, plan in enumerate(plans, start=1)
        ]
        try:
            # without a timeout Windows would not let Ctrl-C through
            while wait(futures, timeout=0.5).not_done:
                progress.tick()
        except BaseException:
            # Ctrl-C reaches only this thread; the others end when their kernels are gone
            for future in futures:
                future.cancel()
            while not all(future.done() for future in futures):
                kernels.end()
                wait(futures, timeout=0.2)
            raise
        return [future.result() for future in futures]


def _run_one(
    plan: Plan, out: Path, where: str, kernels: _Kernels, line: Callable[[str, int, int], None]
) -> Report:
    name = plan.notebook.name
    started, clock = datetime.now(UTC), time.monotonic()
    with _swapped_folder(out / name) as folder:
        notebook, failure = _execute(plan, folder, where, kernels, line)
        duration = time.monotonic() - clock
        if failure and failure.refused:
            line("refused", 0, 0)
            shutil.rmtree(folder)  # nothing to swap in
            return Report(name, out / name, "refused", duration, failure.message)
        status = "failed" if failure else "ok"
        about = {
            "name": name,
            "title": plan.notebook.title,
            "description": plan.notebook.description,
            "status": status,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(duration, 1),
            "given": plan.given,
            "parameters": {n: v for n, v in plan.settled.items() if n != RESULTS},
            "error": failure.message if failure else "",
            "command": plan.command,
            "versions": _versions(),
        }
        _write_files(folder, plan, notebook, about)
    line(f"{status} in {page.seconds(duration)}", 0, 0)
    return Report(name, out / name, status, duration, about["error"])


@contextlib.contextmanager
def _swapped_folder(target: Path):
    """Give a folder beside ``target`` to fill; it replaces ``target`` in one step on success.

    Left alone if the folder is gone at the end.
    """
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    old = folder.with_name(folder.name + ".old")
    try:
        yield folder
        if not folder.exists():
            return
        folder.chmod(target.parent.stat().st_mode & 0o777)  # mkdtemp's are for the owner alone
        if target.exists():
            target.rename(old)
        try:
            folder.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class _Failure:
    message: str
    refused: bool = False


def _execute(plan: Plan, folder: Path, where: str, kernels: _Kernels, line):
    """Run the notebook in a kernel of its own.

    Returns:
        The executed notebook, cleaned, and how it failed, or None.
    """
    import nbformat
    import papermill

    # what it has to say is in the exception
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    source, saved = folder / _INPUT, folder / _EXECUTED
    notebook = _prepared(plan, folder)
    nbformat.write(notebook, source)
    line("", 0, len(notebook.cells))
    at = {"cell": -1}  # no cell has begun

    def on_cell_start(cell, cell_index):
        at["cell"] = cell_index
        line("", cell_index + 1, len(notebook.cells))

    def run() -> None:
        papermill.execute_notebook(
            _brace(source),
            _brace(saved),
            kernel_name="python3",
            progress_bar=False,
            resources={"metadata": {"path": where}},
            kernel_manager_class=kernels.manager_class(),
            on_cell_start=on_cell_start,
            coalesce_streams=True,
            record_timing=False,
            store_widget_state=False,
            extra_arguments=["--log-level=CRITICAL"],
        )

    failure = None
    for attempt in range(1, STARTS + 1):
        try:
            run()
        except OSError:
            raise
        except Exception as error:  # papermill's, nbclient's, zmq's: each is a report that failed
            if kernels.ended:
                raise  # the cell did not fail, it was ended by Ctrl-C: no report
            if at["cell"] < 0 and attempt < STARTS:
                continue
            failure = _failure(error, folder)
        break
    executed = nbformat.read(saved if saved.exists() else source, as_version=4)
    for file in (source, saved):
        file.unlink(missing_ok=True)
    _clean(executed, folder)
    if failure and not any(o.output_type == "error" for o in page.outputs(executed)):
        _mark_failed(executed, max(at["cell"], 0), failure)
    return executed, failure


def _brace(path: Path) -> str:
    # papermill fills in {names} in the paths it is given
    return str(path).replace("{", "{{").replace("}", "}}")


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


def _failure(error: Exception, folder: Path) -> _Failure:
    name, message = getattr(error, "ename", None), getattr(error, "evalue", None)
    if name is None:
        kind = type(error).__name__
        if kind == "DeadKernelError":
            return _Failure("The kernel died while this cell ran: out of memory, or a crash.")
        return _Failure(_scrubbed(f"{kind}: {error}", folder))
    message = _scrubbed(str(message), folder)
    if name == "InputError":
        return _Failure(_one_line(message), refused=True)
    if name == "OSError" and _NO_SPACE in message:
        return _Failure(f"report: the disk is full ({message}); free some space", refused=True)
    return _Failure(f"{name}: {message}" if message else name)


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _scrubbed(text: str, folder: Path) -> str:
    """Text without what differs from run to run: our working folder, the kernel's file names."""
    text = text.replace(str(folder), folder.name.split(".")[1])
    return re.sub(r"[^\s'\"]*ipykernel_\d+[/\\]\d+\.py", "cell", text)


def _clean(notebook, folder: Path) -> None:
    """Drop what papermill added, so that two runs of the same work are the same bytes."""
    from papermill.execute import ERROR_MARKER_TAG

    notebook.metadata.pop("papermill", None)
    notebook.cells = [
        c for c in notebook.cells if ERROR_MARKER_TAG not in c.metadata.get("tags", [])
    ]
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if _INJECTED in cell.metadata.get("tags", []):
            cell.source = re.sub(rf"(?m)^{RESULTS} = .*$", f'{RESULTS} = ""', cell.source)
    for output in page.outputs(notebook):
        if output.output_type == "error":
            output["evalue"] = _scrubbed(output["evalue"], folder)
            output["traceback"] = [_scrubbed(part, folder) for part in output["traceback"]]
        elif output.output_type == "stream":
            output["text"] = _scrubbed(_without_bars(output["text"]), folder)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _was_a_bar(output)]


def _without_bars(text: str) -> str:
    """Text without what progress bars left in it, which is over and tells only of this machine."""
    kept = _BAR.sub("", text)
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

    name = plan.notebook.name
    nbformat.write(notebook, folder / f"{name}.ipynb")
    small = page.thumbnail(notebook)
    if small is not None:
        _write_json(folder / page.THUMBNAIL, page.finite(small))
    key = json.loads((folder / KEY).read_text("utf-8")) if (folder / KEY).is_file() else []
    helps = {p.name: p.help for p in plan.notebook.parameters}
    parameters = [
        {"name": n, "value": _shown(v), "help": helps[n], "given": n in plan.given}
        for n, v in about["parameters"].items()
    ]
    html = page.report_page(
        notebook,
        _for_page(about),
        key=page.key_rows(key),
        measures=page.measure_rows(key),
        parameters=parameters,
        passport=[*_passport(folder), *about["versions"].items()],
        downloads=[f for f in (f"{name}.ipynb", TABLE_CSV, TABLE, KEY) if (folder / f).is_file()],
    )
    (folder / "report.html").write_text(html, encoding="utf-8", newline="\n")
    _write_json(folder / STATUS, about)


def _for_page(about: Mapping) -> dict:
    """A status as the pages show it."""
    started = datetime.fromisoformat(about["started"])
    return dict(about) | {
        "started": f"{started:%Y-%m-%d %H:%M} UTC",
        "duration": page.seconds(about["seconds"]),
        "given": {name: _shown(value) for name, value in about["given"].items()},
        "parameters": {name: _shown(value) for name, value in about["parameters"].items()},
    }


def _shown(value) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


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
    return [(name, _shown(value))]


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def write_index(out: str | Path) -> Path:
    """Write ``index.html`` over all reports in a folder, those of earlier runs included.

    Returns:
        Its path.
    """
    out = Path(out)
    entries, thumbnails = [], {}
    for index, folder in enumerate(_report_folders(out)):
        entry = _entry(folder)
        if (folder / page.THUMBNAIL).is_file():
            entry["figure"] = f"thumbnail-{index}"
            thumbnails[entry["figure"]] = json.loads((folder / page.THUMBNAIL).read_text("utf-8"))
        entries.append(entry)
    with whole_file(out / "index.html") as temporary:
        temporary.write_text(page.index_page(entries, thumbnails), encoding="utf-8", newline="\n")
    return out / "index.html"


def _report_folders(out: Path) -> list[Path]:
    folders = [f.parent for f in out.glob(f"*/{STATUS}") if not f.parent.name.startswith(".")]
    order = {name: index for index, name in enumerate(PILLARS)}
    return sorted(folders, key=lambda f: (order.get(f.name, len(order)), f.name))


def _entry(folder: Path) -> dict:
    name = folder.name
    about = json.loads((folder / STATUS).read_text("utf-8"))
    key = json.loads((folder / KEY).read_text("utf-8")) if (folder / KEY).is_file() else []
    files = [f for f in (f"{name}.ipynb", TABLE_CSV, TABLE) if (folder / f).is_file()]
    return _for_page(about) | {
        "link": page.link(name, "report.html"),
        "files": [(f, page.link(name, f)) for f in files],
        "key": page.key_rows(key),
        "figure": "",
    }


class _Kernels:
    """The kernels of one call: which command starts them, and how to end them all."""

    def __init__(self, jobs: int):
        self.ended = False
        self._managers: list = []
        self._lock = threading.Lock()
        # progress bars would make each run's notebook differ; the renderer must not depend on
        # where the report is made
        self._environment = {
            "TQDM_DISABLE": "1", "PLOTLY_RENDERER": "plotly_mimetype", "PYTHONHASHSEED": "0",
        }  # fmt: skip
        if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            self._environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))

    def manager_class(self) -> type:
        """A kernel manager that runs this interpreter, whatever kernels the user has installed."""
        from jupyter_client import AsyncKernelManager
        from jupyter_client.kernelspec import KernelSpec

        spec = KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            display_name="Python 3",
            language="python",
            env=self._environment,
        )
        kernels = self

        class Manager(AsyncKernelManager):
            kernel_spec = spec

            def __init__(self, kernel_name, config):
                super().__init__(kernel_name=kernel_name, config=config)
                with kernels._lock:
                    kernels._managers.append(self)

        return Manager

    def end(self) -> None:
        """Kill the kernels that were started, with what they started."""
        self.ended = True
        with self._lock:
            managers = list(self._managers)
        for manager in managers:
            process = getattr(manager.provisioner, "process", None)
            if process is None or process.poll() is not None:
                continue
            with contextlib.suppress(OSError):
                process.kill()
                # a kernel leads its own process group; what it started goes with it
                if hasattr(os, "killpg") and manager.provisioner.pgid == process.pid:
                    os.killpg(process.pid, signal.SIGKILL)


class _Progress:
    """One line per report on stderr: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, total: int):
        self._total = total
        self._live = sys.stderr.isatty()
        self._bars: dict = {}

    def line(self, index: int, name: str) -> Callable[[str, int, int], None]:
        """What a report calls with ("", cell, cells) as it goes and (status, 0, 0) at its end."""
        label = f"[{index}/{self._total}] {name}"

        def show(status: str, cell: int, cells: int) -> None:
            if self._live:
                self._draw(label, status, cell, cells)
            elif status or cell == 0:
                print(f"{label}: {status or 'started'}", file=sys.stderr, flush=True)

        return show

    def tick(self) -> None:
        """Let the clocks of the running reports go on while a long cell runs."""
        for bar in list(self._bars.values()):
            bar.refresh()

    def _draw(self, label: str, status: str, cell: int, cells: int) -> None:
        if label not in self._bars:
            from tqdm import tqdm

            layout = "{desc}  cell {n_fmt}/{total_fmt} |{bar:20}| {elapsed}"
            bar = tqdm(desc=label, total=cells, file=sys.stderr, bar_format=layout)
            self._bars[label] = bar
        bar = self._bars[label]
        if status:
            del self._bars[label]
            bar.bar_format = "{desc}"
            bar.set_description_str(f"{label}  {status}", refresh=False)
            bar.close()
        else:
            bar.n = cell
            bar.refresh()
