"""Kill a grid with SIGKILL at random moments, resume it each time, and count.

Run by hand: ``python -m tests.kill_grid 50``. At the end every report must be whole, none that was
finished may have been run again, and no process may be left; otherwise the exit status is 1.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import nbformat
import psutil
from nbformat import v4

MARK = "WORKBENCH_KILL_GRID"  # in the environment of all that a grid starts
LEDGER = "WORKBENCH_KILL_LEDGER"  # a parameter that names a file would be part of the key
LONGEST = 2.0  # from the start of a grid to the kill, at most, in times that one report takes
PATIENCE = 10.0  # seconds for what a killed grid has started to be gone
REPORTS = 12  # of a grid, if nothing else is said
# its begin is written down; nothing else runs in a process while sum does
CELLS = (
    'seed: int = 0\nresults: str = ""',
    "import os, subprocess\nappend = os.O_APPEND | os.O_CREAT | os.O_WRONLY\n"
    f"ledger = os.open(os.environ['{LEDGER}'], append)\n"
    "_ = os.write(ledger, f'{seed}\\n'.encode())\nchild = subprocess.Popen(['sleep', '600'])",
    "from workbench.report import publish\nfrom workbench.table import rows\n_ = sum(range(10**7))",
    "table = rows('auc', seed / 100, run='r')\npublish(table, key={'AUC': table}, results=results)",
)


def write_grid(folder: Path, reports: int) -> Path:
    """A grid of short reports."""
    cells = [v4.new_code_cell(source) for source in CELLS]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(v4.new_notebook(cells=cells), folder / "short.ipynb")
    grid = {
        "name": "kills",
        "out": str(folder / "out"),
        "notebooks": [str(folder / "short.ipynb")],
        "grid": {"seed": list(range(reports))},
        "names": "short-{seed}",
    }
    (folder / "kills.yaml").write_text(json.dumps(grid))  # JSON is YAML
    return folder / "kills.yaml"


def start(grid: Path, mark: str) -> subprocess.Popen:
    """The command, as a user types it."""
    words = ["grid", str(grid), "--jobs", "2", "--keep-going", "--retry", "failed"]
    with (grid.parent / "said.txt").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "workbench", *words],
            cwd=grid.parent,
            env=os.environ | {MARK: mark, LEDGER: str(grid.parent / "ledger")},
            stdout=said,
            stderr=said,
        )


def left(mark: str) -> list[psutil.Process]:
    """Processes that a grid of this mark has started and that live."""
    found = []
    for process in psutil.process_iter():
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def seconds_until_gone(mark: str) -> float:
    """How long what a killed grid has started lives on."""
    began = time.monotonic()
    while left(mark):
        if time.monotonic() - began > PATIENCE:
            names = [" ".join(p.cmdline())[:100] for p in left(mark)]
            raise SystemExit(f"still there {PATIENCE:g} s after the kill: {names}")
        time.sleep(0.05)
    return time.monotonic() - began


def finished(out: Path) -> dict[str, bytes]:
    """The reports that are there, each with its status; one that is not whole ends all."""
    found = {}
    for status in out.glob("*/status.json"):
        about = json.loads(status.read_text())
        if about["status"] != "ok":
            continue
        folder = status.parent
        notebook = nbformat.read(folder / f"{folder.name}.ipynb", as_version=4)
        whole = "</html>" in (folder / "report.html").read_text()
        whole &= json.loads((folder / "key.json").read_text())[0]["metric"] == "auc"
        whole &= (folder / "table.parquet").read_bytes()[-4:] == b"PAR1"
        whole &= bool(notebook.cells[-1].outputs)
        if not whole:
            raise SystemExit(f"{folder} says ok and is not whole")
        found[folder.name] = status.read_bytes()
    return found


def begun(folder: Path) -> Counter:
    """How often each report's notebook was begun."""
    ledger = folder / "ledger"
    return (
        Counter(f"short-{n}" for n in ledger.read_text().split()) if ledger.exists() else Counter()
    )


def kill(grid: subprocess.Popen, mark: str, chance: random.Random) -> str:
    """Kill the driver; now and then a kernel, and the driver a little later."""
    kernels = [p for p in left(mark) if p.pid != grid.pid and "-f" in p.cmdline()]
    if kernels and chance.random() < 0.25:
        chance.choice(kernels).kill()
        time.sleep(chance.uniform(0, 2))
        grid.kill()
        grid.wait()
        return "kernel, then driver"
    grid.send_signal(signal.SIGKILL)
    grid.wait()
    return "driver"


def seconds_for_one(folder: Path) -> float:
    """How long a grid of one report takes: on a busy machine kills come later."""
    folder.mkdir()
    began = time.monotonic()
    if start(write_grid(folder, 1), "alone").wait():
        raise SystemExit((folder / "said.txt").read_text()[-2000:])
    return time.monotonic() - began


def main(kills: int, *, reports: int = REPORTS, seed: int = 0, folder: Path | None = None) -> int:
    """Kill so many times; gives the exit status."""
    chance = random.Random(seed)
    place = folder or Path(tempfile.mkdtemp(prefix="kill-grid-"))
    done, rounds, again, ran = 0, 0, 0, Counter()
    killed, slowest = Counter(), 0.0
    longest = LONGEST * seconds_for_one(place / "alone")
    while done < kills:
        rounds += 1
        room = place / f"round-{rounds}"
        room.mkdir()
        grid = write_grid(room, reports)
        seen: dict[str, tuple[bytes, int]] = {}
        while True:
            mark = f"{os.getpid()}-{rounds}-{done}-{chance.random()}"
            process = start(grid, mark)
            try:
                limit = chance.uniform(0.5, longest) if done < kills else 600.0
                process.wait(limit)
                ended = True
            except subprocess.TimeoutExpired:
                killed[kill(process, mark, chance)] += 1
                ended, done = False, done + 1
            gone = seconds_until_gone(mark)
            slowest = max(slowest, gone)
            counts, whole = begun(room), finished(room / "out")
            for name, (status, count) in seen.items():
                if whole.get(name) != status or counts[name] != count:
                    print(f"{name} was finished and was run again")
                    again += 1
            seen = {name: (status, counts[name]) for name, status in whole.items()}
            print(
                f"kill {done} of {kills}: {len(whole)} of {reports} reports finished, "
                f"all processes gone after {gone:.2f} s",
                flush=True,
            )
            if ended and process.returncode == 0:
                break
            if ended and done >= kills:
                print((room / "said.txt").read_text()[-2000:])
                raise SystemExit(f"the last run ended with status {process.returncode}")
        hidden = [p.name for p in (room / "out").iterdir() if p.name == ".running"]
        if len(seen) != reports or hidden:
            raise SystemExit(f"{len(seen)} of {reports} reports are there; left: {hidden}")
        ran.update(begun(room).values())
    begun_in_all = sum(times * n for times, n in ran.items())
    print(
        f"{done} kills ({dict(killed)}) in {rounds} grids of {reports}: {rounds * reports} reports "
        f"whole, {again} finished ones run again; {begun_in_all} were begun; after a kill all "
        f"processes were gone within {slowest:.2f} s"
    )
    return 1 if again else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 50))
