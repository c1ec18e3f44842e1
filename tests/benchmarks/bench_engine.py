"""Reports beside serial papermill: time, overhead over the cells' own time, the driver's memory.

Run by hand on two idle cores: ``python -m tests.benchmarks.bench_engine``; about ten minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat import v4

REPORTS = 8
FEW, MANY = 10, 100  # tiny reports, for the driver's memory
# resampling as the statistics do it, about ten seconds on one core
STATISTICS = """\
import numpy as np, pandas as pd
from workbench.report import publish
from workbench.table import rows
generator = np.random.default_rng(seed)
values = generator.normal(size=(2000, 40))
means = [values[generator.integers(0, 2000, 2000)].mean() for _ in range(16000)]
table = rows('auc', float(np.mean(np.array(means) > 0)), run='r')
publish(table, key={'share': table}, results=results)"""
# what the driver has needed, its kernels left out
DRIVER = """\
import resource, sys
from pathlib import Path
from workbench.engine import run_plans
from workbench.report import make_plans
paths = sorted(Path(sys.argv[1]).glob('*.ipynb'))
run_plans(make_plans(paths, {}), sys.argv[2], jobs=2, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"""


def write_notebooks(folder: Path, count: int, source: str) -> list[Path]:
    """So many notebooks with one seed each."""
    folder.mkdir()
    paths = []
    for seed in range(count):
        first = v4.new_code_cell(f"seed: int = {seed}\nresults: str = ''")
        first.metadata["tags"] = ["parameters"]
        path = folder / f"n{seed:03}.ipynb"
        notebook = v4.new_notebook(cells=[first, v4.new_code_cell(source)])
        notebook.metadata["kernelspec"] = {
            "name": "python3", "display_name": "Python 3", "language": "python",
        }  # fmt: skip
        nbformat.write(notebook, path)
        paths.append(path)
    return paths


def serial(paths: list[Path], out: Path) -> float:
    """Seconds of papermill alone, one notebook after another."""
    import papermill

    out.mkdir()
    began = time.monotonic()
    for path in paths:
        values = {"results": str(out / path.stem)}
        papermill.execute_notebook(
            str(path), str(out / path.name), values, kernel_name="python3", progress_bar=False
        )
    return time.monotonic() - began


def through_the_engine(paths: list[Path], out: Path, jobs: int) -> tuple[float, list[float]]:
    """Seconds of the same by ``run_reports``, and each report's beyond those of its cells."""
    from workbench.report import run_reports

    began = time.monotonic()
    reports = run_reports(paths, out=out, jobs=jobs)
    took = time.monotonic() - began
    assert all(report.status == "ok" for report in reports), reports
    abouts = [json.loads((r.folder / "status.json").read_text()) for r in reports]
    return took, [about["seconds"] - about["cells_seconds"] for about in abouts]


def memory(folder: Path, count: int) -> int:
    """MB that the driver has needed at most for so many tiny reports."""
    write_notebooks(folder, count, "print(seed)")
    command = [sys.executable, "-c", DRIVER, str(folder), str(folder / "out")]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print the figures."""
    place = Path(tempfile.mkdtemp(prefix="bench-engine-"))
    paths = write_notebooks(place / "notebooks", REPORTS, STATISTICS)
    alone = serial(paths, place / "papermill")
    print(f"papermill, one after another: {REPORTS} reports in {alone:.1f} s", flush=True)
    for jobs in (1, 2):
        took, over = through_the_engine(paths, place / f"jobs-{jobs}", jobs)
        print(
            f"--jobs {jobs}: {took:.1f} s, {alone / took:.2f} times as fast; over the cells' own "
            f"time {sum(over) / len(over):.1f} s a report, at most {max(over):.1f} s",
            flush=True,
        )
    few, many = (memory(place / f"tiny-{count}", count) for count in (FEW, MANY))
    print(f"memory of the driver: {few} MB for {FEW} reports, {many} MB for {MANY}")


if __name__ == "__main__":
    main()
