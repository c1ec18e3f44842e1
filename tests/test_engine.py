"""What reports survive: kills, hangs, crashes, full disks, Ctrl-C, and each other."""

import errno
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from nbformat import v4

from tests import kill_grid
from tests.test_report import write_notebook
from workbench import engine
from workbench.engine import Plan, Report, Stopped, end_kernels, finished, make_report, run_plans
from workbench.report import make_plans
from workbench.table import InputError

TAGGED = {"tags": ["parameters"]}
# a C call that holds the interpreter: no handler of the kernel's own runs in it, and it has a child
HANGS = (
    "import os, pathlib, subprocess\nchild = subprocess.Popen(['sleep', '600'])\n"
    "_ = pathlib.Path(f'{name}.pids').write_text(f'{os.getpid()} {child.pid}')\n"
    "sum(range(10**13))"
)
CODE = {
    "fine": ["import os\nprint(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])"],
    "hangs": ["name = 'hangs'", HANGS],
    "slow": ["import time"] + ["time.sleep(0.4)"] * 30,
    "crashes": ["import ctypes\nctypes.string_at(0)"],
    "full": ["raise OSError(28, 'No space left on device', 'x.parquet')"],
    "fails": ["x = 1", "1 / 0", "'never'"],
    "refuses": [
        "from workbench.table import InputError\nraise InputError('load_model: no ./x; check it')"
    ],
}


def plans_of(folder: Path, names=tuple(CODE), **fields) -> list[Plan]:
    """A plan for each notebook, its name as its key."""
    paths = []
    for name in names:
        cells = [v4.new_code_cell(source) for source in CODE[name]]
        cells.insert(0, v4.new_code_cell('a: int = 1\nresults: str = ""', metadata=TAGGED))
        paths.append(write_notebook(folder, name, cells))
    return [replace(p, key=p.name, **fields) for p in make_plans(paths, {})]


def gone(*pids: int, within: float = 5.0) -> bool:
    """Whether these processes end within so many seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.05)
    return path.read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One report of each end, two at a time."""
    folder = tmp_path_factory.mktemp("ends")
    limits = {"hangs": {"cell_timeout": 3.0}, "slow": {"report_timeout": 5.0}}
    plans = [replace(p, grid="ends", **limits.get(p.name, {})) for p in plans_of(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("OMP_NUM_THREADS", raising=False)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            reports = run_plans(plans, folder / "out", jobs=2, keep_going=True)
            gc.collect()  # what nobody closed says so now, and not in another test
    assert not [each.message for each in said if each.category is ResourceWarning]
    return folder, plans, {r.name: r for r in reports}


# how reports end


def test_each_report_ends_for_its_own_reason_and_stops_no_other(made):
    _, _, reports = made
    assert {name: (r.status, r.cause) for name, r in reports.items()} == {
        "fine": ("ok", ""),
        "hangs": ("failed", "machine"),
        "slow": ("failed", "machine"),
        "crashes": ("failed", "machine"),
        "full": ("failed", "disk"),
        "fails": ("failed", "cell"),
        "refuses": ("refused", "input"),
    }
    died = "The kernel died while this cell ran: out of memory, or a crash"
    assert {name: r.error for name, r in reports.items()} == {
        "fine": "",
        "hangs": "cell 4 of 4 took longer than 3 s and was ended",
        "slow": "the report took longer than 5 s and was ended",
        "crashes": f"{died} (SIGSEGV).",
        "full": "report: the disk is full ([Errno 28] No space left on device: 'x.parquet'); "
        "free some space",
        "fails": "ZeroDivisionError: division by zero",
        "refuses": "load_model: no ./x; check it",
    }


@pytest.mark.parametrize(
    ("name", "message", "cause"),
    [
        ("MemoryError", "", "machine"),
        ("_ArrayMemoryError", "Unable to allocate 9 TiB", "machine"),  # numpy's
        ("OutOfMemoryError", "CUDA out of memory", "machine"),  # torch's
        ("RuntimeError", "DefaultCPUAllocator: can't allocate memory", "machine"),
        ("OSError", "[Errno 122] Disk quota exceeded", "disk"),
        # publish says it so
        ("InputError", "publish: cannot write to x (No space left on device); free", "disk"),
        ("InputError", "no such model", "input"),
        ("RuntimeError", "shapes do not fit", "cell"),
    ],
)
def test_what_failed_by_its_error(tmp_path, name, message, cause):
    class Raised(Exception):
        ename, evalue = name, message

    failure = engine._failure(Raised(), tmp_path / "fine" / "new", engine._Kernel(tmp_path, None))
    assert failure.cause == cause
    assert message in failure.message


def test_a_kernel_that_hangs_in_c_goes_and_takes_its_child_along(made):
    folder, _, _ = made
    assert gone(*map(int, (folder / "hangs.pids").read_text().split()))


def test_the_log_says_how_far_it_went_and_where_it_stopped(made):
    folder, _, _ = made
    hangs = (folder / "out" / "hangs" / "log.txt").read_text()
    assert "cell 3 of 4: " in hangs and "cell 4 of 4: " not in hangs
    assert "Fatal Python error: Aborted" in hangs and "line 4 in <module>" in hangs
    assert hangs.endswith("failed: cell 4 of 4 took longer than 3 s and was ended\n")
    assert "Segmentation fault" in (folder / "out" / "crashes" / "log.txt").read_text()


def test_status_says_how_far_it_went(made):
    folder, _, _ = made
    about = json.loads((folder / "out" / "fails" / "status.json").read_text())
    # the parameters, those put in, and x = 1 went well, the fourth of five did not
    kept = ("passed", "cells", "cause", "grid", "notebook", "key", "fingerprint")
    assert {n: about[n] for n in kept} == {
        "passed": 3, "cells": 5, "cause": "cell", "grid": "ends", "notebook": "fails",
        "key": "fails", "fingerprint": {},
    }  # fmt: skip
    hangs = json.loads((folder / "out" / "hangs" / "status.json").read_text())
    # the cell that was ended counts with all its seconds; it had 3, and some for its last words
    assert 3.0 <= hangs["cells_seconds"] <= hangs["seconds"] and hangs["passed"] == 3
    slow = json.loads((folder / "out" / "slow" / "status.json").read_text())
    assert 0 < slow["passed"] < slow["cells"] == 33


def test_threads_are_shared(made):
    folder, _, _ = made
    share = str(max(1, engine._cores() // 2))
    notebook = json.loads((folder / "out" / "fine" / "fine.ipynb").read_text())
    said = "".join(notebook["cells"][2]["outputs"][0]["text"])
    assert said.split() == [share, share]


def test_a_full_disk_leaves_no_report_and_a_refusal_of_a_grid_a_page_that_says_why(made):
    folder, plans, _ = made
    out = folder / "out"
    assert not (out / "full").exists()
    assert "load_model: no ./x; check it" in (out / "refuses" / "report.html").read_text()
    assert sorted(p.name for p in (out / ".locks").iterdir()) == sorted(
        f"{p.name}.lock" for p in plans if p.name != "full"
    )
    assert not (out / ".running").exists()


def test_what_is_there_is_not_made_again(made, capsys):
    folder, plans, reports = made
    there = [p for p in plans if p.name != "full"]
    again = run_plans(there, folder / "out", jobs=2)
    assert all(r.cached for r in again)
    assert [(r.status, r.error, r.cause) for r in again] == [
        (reports[p.name].status, reports[p.name].error, reports[p.name].cause) for p in there
    ]
    assert capsys.readouterr().err == "6 of 6 are there already, unchanged\n"


def test_a_plan_travels(made):
    _, plans, _ = made
    plan = plans[0]
    assert plan.notebook.check({"a": "2"})[0] == {"a": 2}  # its model of parameters is made
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_line_of_millions_of_characters_is_kept_at_once():
    line = "x1" * 5_000_000  # the search for a bar in it would be quadratic
    assert engine._without_bars(f"{line}\n 5%|# | 1/20 [00:00<00:03, 6it/s]\nb") == f"{line}\nb"
    assert engine._scrubbed(line, Path("a/b")) == line
    assert engine._scrubbed("in '/tmp/ipykernel_7/42.py', 3", Path("a/b")) == "in 'cell', 3"


def test_streams_are_joined_as_nbclient_joins_them():
    """By hand, and over random pieces against the two patterns that nbclient has."""
    import random
    import re

    from nbformat.v4 import new_output

    pieces = [("stderr", "5%\r9"), ("stdout", "a\n"), ("stderr", "%\r\nend\r"), ("stdout", "b")]
    got = engine._joined([new_output("stream", name=n, text=t) for n, t in pieces])
    assert [(o.name, o.text) for o in got] == [("stdout", "a\nb"), ("stderr", "9%\r\nend\r")]
    chance = random.Random(0)
    for _ in range(300):
        text = "".join(chance.choices("ab\r\n", k=12))
        [got] = engine._joined([new_output("stream", name="stdout", text=text)])
        assert got.text == re.sub(r".*\r(?=[^\n])", "", text)


# what is there already


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "books").mkdir()
    return plans_of(tmp_path / "books", ["fine"])[0]


def put(folder: Path, **about) -> Path:
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("page")
    status = {"name": "fine", "key": "fine", "status": "ok", "seconds": 2.5} | about
    (folder / "status.json").write_text(json.dumps(status))
    return folder


def test_only_a_report_made_from_the_same_counts(tmp_path, plan):
    assert finished(plan, tmp_path / "none") is None
    put(tmp_path / "a" / "fine")
    got = finished(plan, tmp_path / "a")
    assert got == Report("fine", tmp_path / "a" / "fine", "ok", 2.5, cached=True)
    assert finished(replace(plan, key="other"), tmp_path / "a") is None
    assert finished(replace(plan, key=""), tmp_path / "a") is None
    (tmp_path / "a" / "fine" / "report.html").unlink()
    assert finished(plan, tmp_path / "a") is None
    (put(tmp_path / "b" / "fine") / "status.json").write_text('{"name": "fi')
    assert finished(plan, tmp_path / "b") is None
    for status, cause in (("failed", "cell"), ("refused", "input")):
        put(tmp_path / status / "fine", status=status, cause=cause, error="why")
        got = finished(plan, tmp_path / status)
        assert (got.status, got.cause, got.error) == (status, cause, "why")
        assert finished(plan, tmp_path / status, retry_failed=True) is None


@pytest.mark.parametrize(
    ("new", "old", "target", "kept"),
    [
        (None, None, "T", "T"),
        ("half", None, "T", "T"),  # killed while it was made
        ("whole", None, "T", "N"),  # killed just before it was put in place
        ("whole", "T", None, "N"),  # killed between the two renames
        (None, "T", None, "T"),  # killed, or failed, between them, and the new one is lost
        (None, "part", "N", "N"),  # killed while the old one was removed
        ("half", None, None, None),
    ],
)
def test_what_a_kill_leaves_is_put_right(tmp_path, new, old, target, kept):
    place = tmp_path / ".running" / "fine"
    if new:
        put(place / "new", mark="N")
    if new == "half":
        (place / "new" / "status.json").unlink()
    for folder, mark in ((place / "old", old), (tmp_path / "fine", target)):
        if mark:
            put(folder, mark=mark)
    engine._restore(tmp_path, "fine")
    found = engine.read_status(tmp_path / "fine")
    assert (found and found["mark"]) == kept
    assert not place.exists()


def test_a_report_named_like_anothers_leftovers_is_safe(tmp_path):
    put(tmp_path / ".running" / "a.b" / "new")
    put(tmp_path / "old")
    engine._restore(tmp_path, "a")
    assert (tmp_path / ".running" / "a.b" / "new" / "status.json").is_file()
    assert (tmp_path / "old" / "status.json").is_file()


def test_a_report_is_there_whole_or_not_at_all(tmp_path):
    put(tmp_path / "fine", mark="old")

    def fill(with_status: bool) -> None:
        with engine._swapped_folder(tmp_path, "fine") as folder:
            (folder / "new").write_text("y")
            if with_status:
                (folder / "status.json").write_text('{"mark": "new"}')
                return
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fill(with_status=False)
    assert engine.read_status(tmp_path / "fine")["mark"] == "old"
    with engine._swapped_folder(tmp_path, "fine") as folder:
        (folder / "new").write_text("of a refusal, which is no report")
    assert engine.read_status(tmp_path / "fine")["mark"] == "old"
    fill(with_status=True)
    assert engine.read_status(tmp_path / "fine")["mark"] == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["fine"]
    assert sorted(p.name for p in (tmp_path / "fine").iterdir()) == ["new", "status.json"]


def without_kernel(monkeypatch, ends=None):
    """Reports of notebooks that are not run."""
    import nbformat

    def execute(plan, folder, where, kernel, log, say):
        notebook = nbformat.read(plan.notebook.path, as_version=4)
        return notebook, ends, {"cells_seconds": 0.0, "passed": 0, "cells": 0}

    monkeypatch.setattr(engine, "_execute", execute)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_fails_one_report_and_leaves_the_old(
    tmp_path, plan, monkeypatch, number
):
    without_kernel(monkeypatch)
    put(tmp_path / "out" / "fine", key="of an earlier notebook")
    real = engine.write_json

    def write_json(path, value):
        if path.parent.parent.name == "fine":
            raise OSError(number, os.strerror(number), str(path))
        real(path, value)

    monkeypatch.setattr(engine, "write_json", write_json)
    other = replace(plan, name="other", key="other")
    one, two = run_plans([plan, other], tmp_path / "out")
    assert (one.status, one.cause, two.status) == ("failed", "disk", "ok")
    assert one.error == (
        f"report: cannot write to {tmp_path}/out/.running/fine/new/status.json "
        f"({os.strerror(number)}); free some space, or choose another folder with --out"
    )
    about = engine.read_status(tmp_path / "out" / "fine")
    assert about["key"] == "of an earlier notebook"
    assert not (tmp_path / "out" / ".running").exists()


# several at once


def test_two_runs_in_one_folder_make_each_report_once(tmp_path):
    """Two processes begin together; a ledger tells how often each notebook was begun."""
    folder = tmp_path / "books"
    folder.mkdir()
    begin = "import os\n_ = os.write(os.open('ledger', os.O_APPEND | os.O_CREAT | os.O_WRONLY), b'%s\\n')"
    for name in "abc":
        CODE[name] = [begin % name, "import time\ntime.sleep(0.5)"]
    plans = plans_of(folder, "abc")
    for name in "abc":
        del CODE[name]
    (tmp_path / "plans").write_bytes(pickle.dumps(plans))
    code = (
        "import pickle, pathlib\nfrom workbench.engine import run_plans\n"
        "plans = pickle.loads(pathlib.Path('plans').read_bytes())\n"
        "print([(r.status, r.cached) for r in run_plans(plans, 'out', jobs=2)])"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [eval(run.communicate(timeout=120)[0]) for run in runs]
    assert sorted((tmp_path / "ledger").read_text().split()) == ["a", "b", "c"]
    assert [status for one in said for status, _ in one] == ["ok"] * 6
    # each was made by one of the two, and taken as it is by the other
    assert [a[1] != b[1] for a, b in zip(*said, strict=True)] == [True] * 3
    assert not (tmp_path / "out" / ".running").exists()


def test_who_waits_for_another_run_says_so_and_can_be_ended(tmp_path, plan, monkeypatch):
    from filelock import FileLock

    without_kernel(monkeypatch)
    out = tmp_path / "out"
    (out / ".locks").mkdir(parents=True)
    said, waits = [], threading.Event()

    def say(state, cell, cells):
        said.append(state)
        waits.set()

    with ThreadPoolExecutor(1) as pool:
        with FileLock(out / ".locks" / "fine.lock"):
            future = pool.submit(make_report, plan, out, tmp_path, say=say)
            assert waits.wait(10)
            end_kernels({out / "other"})
            assert not future.done()
            end_kernels({out / "fine"})
            with pytest.raises(Stopped):
                future.result(timeout=10)
        assert set(said) == {"waiting"} and not (out / "fine").exists()
        # what another run makes meanwhile is taken as it is
        with FileLock(out / ".locks" / "fine.lock"):
            waits.clear()
            future = pool.submit(make_report, plan, out, tmp_path, say=say)
            assert waits.wait(10)
            put(out / "fine")
        assert future.result(timeout=10).cached


class Fake(ThreadPoolExecutor):
    """Threads that end reports as told, and count how many were handed over at once."""

    def __init__(self, ends, jobs):
        super().__init__(jobs)
        self.ends, self.handed, self.open, self.most = ends, [], 0, 0

    def submit(self, function, plan, out, where, *, say=None, **options):
        self.handed.append(plan.name)
        self.open += 1
        self.most = max(self.most, self.open)
        return super().submit(self._end, plan, Path(out))

    def _end(self, plan, out):
        time.sleep(0.02)
        self.open -= 1
        end = self.ends.get(plan.name, ("ok", ""))
        if isinstance(end, Exception):
            raise end
        return Report(plan.name, out / plan.name, end[0], 0.1, cause=end[1])


def run_fake(tmp_path, plan, ends, *, jobs=1, **options):
    plans = [replace(plan, name=name, key="") for name in "abcdef"]
    executor = Fake(ends, jobs)
    reports = run_plans(plans, tmp_path / "out", jobs=jobs, executor=executor, **options)
    executor.shutdown()
    return reports, executor


@pytest.mark.parametrize(("status", "cause"), [("failed", "cell"), ("refused", "input")])
def test_a_cell_that_fails_stops_the_others_unless_told(tmp_path, plan, capsys, status, cause):
    reports, executor = run_fake(tmp_path, plan, {"b": (status, cause)})
    assert [r.status for r in reports] == ["ok", status, *["missing"] * 4]
    assert executor.handed == ["a", "b"]
    assert capsys.readouterr().err.splitlines()[-1] == (
        "4 of 6 not started, because b failed; run again when it is mended, or go on in spite of "
        "it with --keep-going"
    )
    reports, _ = run_fake(tmp_path, plan, {"b": (status, cause)}, keep_going=True)
    assert [r.status for r in reports] == ["ok", status, *["ok"] * 4]


def test_what_the_machine_does_never_stops_the_others(tmp_path, plan):
    ends = {
        "a": ("failed", "machine"),
        "b": ("failed", "disk"),
        "c": RuntimeError("the worker\nwas lost"),
    }
    reports, executor = run_fake(tmp_path, plan, ends, jobs=2)
    assert [r.status for r in reports] == ["failed"] * 3 + ["ok"] * 3
    assert (reports[2].cause, reports[2].error) == (
        "machine", "report: RuntimeError: the worker was lost",
    )  # fmt: skip
    # never more handed over than can run: neither memory nor what a stop has to take back grows
    assert executor.most == 2


def test_an_executor_that_is_no_pool_of_threads_has_the_next_ones_at_hand(tmp_path, plan):
    class Elsewhere:
        def __init__(self):
            self.open, self.most = [], 0

        def submit(self, function, plan, out, where, *, say=None, **options):
            assert "threads" not in options  # a worker knows its own
            future = Future()
            report = Report(plan.name, Path(out) / plan.name, "ok", 0.1)
            self.open.append((future, report))
            self.most = max(self.most, len(self.open))
            if len(self.open) == 4:
                for waiting, made in self.open:
                    waiting.set_result(made)
                self.open.clear()
            elif plan.name == "f":
                for waiting, made in self.open:
                    waiting.set_result(made)
            return future

    executor = Elsewhere()
    plans = [replace(plan, name=name, key="") for name in "abcdef"]
    reports = run_plans(plans, tmp_path / "out", jobs=2, executor=executor)
    assert [r.name for r in reports] == list("abcdef") and executor.most == 4


def test_two_names_or_a_name_that_leads_elsewhere_are_refused(tmp_path, plan):
    out = tmp_path / "out"
    with pytest.raises(InputError) as caught:
        run_plans([plan, plan], out)
    assert str(caught.value) == (
        "report: two reports are named 'fine'; give each a name of its own"
    )
    for name in ("../x", "a/b", ".hidden", ".."):
        with pytest.raises(InputError) as caught:
            run_plans([replace(plan, name=name)], out)
        assert str(caught.value) == (
            f"report: a report named {name!r} would not be a folder in {out}; choose a name "
            "without slashes and that does not begin with a dot"
        )
    assert not out.exists()


# progress


def test_progress_in_a_file(tmp_path, plan, capsys, monkeypatch):
    monkeypatch.setattr(engine, "EVERY", -1)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(engine.time, "monotonic", lambda: float(next(clock)))
    shown = engine._Progress(total=4, cached=1, jobs=1)  # at 0 s
    say = shown.start(1, "b")  # 10 s
    say("waiting", 0, 0)  # 20 s
    say("running", 0, 5)  # 30 s
    say("running", 2, 5)
    shown.tick()  # looks at 40 s, says so at 50 s, and how it stands at 60 s
    shown.end(1, Report("b", tmp_path, "failed", 30.0, "no\nmemory", "machine"))  # 70 s
    # two are left, 30 s each
    assert capsys.readouterr().err.splitlines() == [
        "1 of 4 are there already, unchanged",
        "[2/4] b: waits for another run that makes it",
        "[2/4] b: started",
        "[2/4] b: cell 2 of 5, 20.0 s",
        "1 of 4 done; 60.0 s",
        "[2/4] b: failed in 30.0 s: no memory (2 of 4 done, 1 not ok; 70.0 s, about 60.0 s to go)",
    ]


def test_progress_on_a_terminal(tmp_path, plan, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = engine._Progress(total=3, cached=0, jobs=2)
    say = shown.start(0, "a")
    say("running", 3, 7)
    shown.tick()
    got = capsys.readouterr().err
    assert "0 of 3 reports" in got and "[1/3] a  cell 3 of 7" in got
    shown.end(0, Report("a", tmp_path, "ok", 8.0))
    shown.tick()
    got = capsys.readouterr().err
    # two are left and two run at once: 8 s
    assert "[1/3] a: ok in 8.0 s\n" in got and "1 of 3 reports" in got
    assert "about 8.0 s to go" in got
    shown.close()


# kills


def start_run(folder: Path, plans: list[Plan]) -> subprocess.Popen:
    (folder / "plans").write_bytes(pickle.dumps(plans))
    code = (
        "import pickle, pathlib\nfrom workbench.engine import run_plans\n"
        "run_plans(pickle.loads(pathlib.Path('plans').read_bytes()), 'out', jobs=2)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_run(tmp_path, monkeypatch, how):
    """Killed or interrupted while two kernels hang in C, each with a child."""
    for name in ("one", "two"):
        monkeypatch.setitem(CODE, name, [f"name = {name!r}", HANGS])
    run = start_run(tmp_path, plans_of(tmp_path, ["one", "two"]))
    pids = [int(p) for name in ("one", "two") for p in wait_for(tmp_path / f"{name}.pids").split()]
    assert len(pids) == 4 and not gone(pids[0], within=0.3)
    run.send_signal(how)
    if how == signal.SIGINT:
        time.sleep(0.2)
        run.send_signal(how)  # as an impatient user does
    _, err = run.communicate(timeout=30)
    assert gone(*pids)
    if how == signal.SIGINT:
        assert err.splitlines()[-1] == "KeyboardInterrupt"
        assert list((tmp_path / "out").iterdir()) == []
    else:
        assert run.returncode == -signal.SIGKILL


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_a_grid_that_is_killed_again_and_again(tmp_path, capsys):
    """Two kills; ``python -m tests.kill_grid 50`` has fifty."""
    assert kill_grid.main(2, reports=2, folder=tmp_path) == 0
    assert "0 finished ones run again" in capsys.readouterr().out
