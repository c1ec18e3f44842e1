"""Reports on a Dask cluster of this machine, and in folders behind a URL."""

import contextlib
import json
import os
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest

from workbench import cluster, engine
from workbench.cluster import DaskExecutor, Lost, Remote, dask_executor, workspace
from workbench.engine import Report, run_plans
from workbench.fingerprint import Hashes
from workbench.report import make_plans
from workbench.table import InputError

distributed = pytest.importorskip("distributed")

# each run of the notebook leaves its number and its kernel's process in a file of its own
CODE = """
import os, pathlib, time
pathlib.Path(marks, f"{number}-{os.getpid()}").write_text("")
time.sleep(max(0, seconds))
while seconds < 0 and not pathlib.Path(marks + "-may-end").exists():
    time.sleep(0.05)
print(number)
"""


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """Two workers of one thread each, as ``dask worker --nworkers 2 --nthreads 1`` starts them."""
    from distributed import LocalCluster

    with (
        pytest.MonkeyPatch.context() as patch,
        LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=None) as found,
    ):
        # the workers' own cache, as on another machine
        patch.setenv("WORKBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        found.scale(2)
        deadline = time.monotonic() + 60
        while len(found.scheduler_info["workers"]) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        yield found


@pytest.fixture
def plans(tmp_path):
    """Makes plans of a notebook that sleeps, by the seconds of each; below 0 until it may end."""
    marks = tmp_path / "marks"
    marks.mkdir()
    parameters = (
        "seconds: float = 0.0  # to sleep\nnumber: int = 0  # to print\n"
        f'marks: str = "{marks}"  # where runs are counted\nresults: str = ""  # folder'
    )
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_markdown_cell("# A sleeper\n\nHow long is a second?"),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(CODE),
    ]
    path = tmp_path / "sleeper.ipynb"
    nbformat.write(notebook, path)

    def made(*seconds):
        found = []
        for number, each in enumerate(seconds):
            [plan] = make_plans([str(path)], {"seconds": each, "number": number})
            found.append(replace(plan, name=f"r{number}", key=f"key{number}"))
        return found

    made.marks = marks
    return made


def runs(plans) -> list[str]:
    """Numbers of the runs that have begun, sorted."""
    return sorted(mark.name.split("-")[0] for mark in plans.marks.iterdir())


def kernels(plans) -> list[int]:
    return [int(mark.name.split("-")[1]) for mark in plans.marks.iterdir()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


@dataclass(frozen=True)
class Named:
    """All that the executor asks of a plan."""

    name: str


# on the workers


def test_a_worker_is_killed_midway_and_the_grid_completes(workers, plans, tmp_path):
    wanted = plans(-1.0, -1.0, -1.0)
    out = tmp_path / "out"

    def kill_one() -> int:
        """End the worker that one of the two kernels belongs to."""
        try:
            until(lambda: len(runs(plans)) == 2)
            worker = psutil.Process(kernels(plans)[0]).ppid()
            os.kill(worker, signal.SIGKILL)
            return worker
        finally:  # whatever fails, nobody waits for ever
            Path(f"{plans.marks}-may-end").touch()

    with (
        workspace(out, dask=workers.scheduler_address, needs=[wanted[0].notebook.path]) as place,
        ThreadPoolExecutor(1) as beside,
    ):
        folder, executor, jobs = place
        assert (folder, jobs) == (out, 2)
        killed = beside.submit(kill_one)
        reports = run_plans(wanted, folder, jobs=jobs, executor=executor, progress=False)
    assert [(r.name, r.status, r.folder) for r in reports] == [
        (f"r{n}", "ok", out / f"r{n}") for n in range(3)
    ]
    assert not alive(killed.result())
    # two were under way, one of which was lost and made once more; no other was made twice
    assert runs(plans) in (["0", "0", "1", "2"], ["0", "1", "1", "2"])
    assert {p.name for p in out.iterdir()} - {engine.LOCKS} == {"r0", "r1", "r2"}
    assert not any(alive(process) for process in kernels(plans))


def test_a_finished_report_is_not_made_again(workers, plans, tmp_path):
    wanted = plans(0.0)
    for cached in (False, True):
        with workspace(tmp_path / "out", dask=workers.scheduler_address) as (folder, executor, _):
            [report] = run_plans(wanted, folder, executor=executor, progress=False)
        assert (report.status, report.cached) == ("ok", cached)
    assert runs(plans) == ["0"]


def test_what_a_report_says_on_a_worker_is_heard_here(workers, plans, tmp_path):
    [plan], heard = plans(0.0), []
    with dask_executor(workers.scheduler_address) as executor:
        future = executor.submit(
            engine.make_report, plan, tmp_path / "out", tmp_path, say=lambda *w: heard.append(w)
        )
        assert future.result(timeout=60).status == "ok"
        assert not executor._tasks  # or the driver would grow with the grid
    # the parameters, what was put in after them, and the one cell of code
    assert heard == [("running", n, 3) for n in range(4)]


def test_ctrl_c_ends_the_kernels_on_the_workers(workers, plans, tmp_path):
    wanted = plans(300.0, 300.0, 300.0, 300.0)
    with (
        pytest.raises(KeyboardInterrupt),
        dask_executor(workers.scheduler_address) as executor,
    ):
        futures = [
            executor.submit(engine.make_report, plan, tmp_path / "out", tmp_path) for plan in wanted
        ]
        until(lambda: len(runs(plans)) == 2)
        raise KeyboardInterrupt
    until(lambda: not any(alive(process) for process in kernels(plans)), 10)
    assert all(future.done() for future in futures)
    time.sleep(0.5)  # the workers are free again; the reports that waited must not begin
    assert runs(plans) == ["0", "1"]
    assert not [p for p in (tmp_path / "out").iterdir() if (p / engine.STATUS).exists()]


def test_what_runs_is_not_cancelled_and_what_waits_is(workers, tmp_path):
    flag = tmp_path / "go"

    def wait(plan, out, where, say):
        while not flag.exists():
            time.sleep(0.05)
        return Report(plan.name, Path(out), "ok", 0.0)

    with dask_executor(workers.scheduler_address) as executor:
        futures = [executor.submit(wait, Named(f"n{n}"), tmp_path, tmp_path) for n in range(3)]
        until(lambda: sum(f.running() for f in futures) == 2)
        cancelled = [f.cancel() for f in futures]
        assert sorted(cancelled) == [False, False, True]
        flag.touch()
        assert not wait_for(futures, timeout=30).not_done
    assert [f.cancelled() for f in futures] == cancelled
    made = [f.result().folder for f in futures if not f.cancelled()]
    assert made == [tmp_path / f"n{n}" for n in range(3) if not cancelled[n]]


def test_an_error_on_a_worker_comes_back(workers, tmp_path):
    def broken(plan, out, where, say):
        raise ZeroDivisionError("of a worker")

    with dask_executor(workers.scheduler_address) as executor:
        future = executor.submit(broken, Named("n"), tmp_path, tmp_path)
        with pytest.raises(ZeroDivisionError, match="^of a worker$"):
            future.result(timeout=30)


def test_workers_lost_again_and_again_give_one_line(workers, tmp_path):
    def deadly(plan, out, where, say):
        os.kill(os.getpid(), signal.SIGKILL)

    def allow(failures, dask_scheduler=None):
        dask_scheduler.allowed_failures, before = failures, dask_scheduler.allowed_failures
        return before

    with dask_executor(workers.scheduler_address) as executor:
        before = executor._client.run_on_scheduler(allow, 0)
        try:
            future = executor.submit(deadly, Named("n"), tmp_path, tmp_path)
            with pytest.raises(Lost) as error:
                future.result(timeout=60)
        finally:
            executor._client.run_on_scheduler(allow, before)
        executor._client.wait_for_workers(2, timeout=60)
    start, _, end = str(error.value).partition("tcp://")
    assert start == "1 workers were lost while they made n (the last: "
    assert end.endswith("); out of memory, or out of time?")


def test_a_scheduler_that_goes_away_gives_one_line():
    # Dask cancels what it had, and would take what comes next and never give an answer
    asked = []

    def submit(*_, key, **__):
        asked.append(key)
        return SimpleNamespace(add_done_callback=lambda call: call(None), status="cancelled")

    client = SimpleNamespace(subscribe_topic=lambda *_: None, submit=submit)
    executor = DaskExecutor(client, "tcp://far:1", {}, {}, "")
    for _ in range(2):
        with pytest.raises(Lost) as error:
            executor.submit(print, Named("n"), "out", "here").result(timeout=1)
        assert str(error.value) == (
            "the Dask scheduler at tcp://far:1 went away; start it and run the same again: what "
            "is finished is kept"
        )
    assert len(asked) == 1


# what is refused before anything runs


def test_a_worker_of_another_version_is_refused(workers, monkeypatch):
    versions = cluster._versions() | {"memory-workbench": "9.9.9+0123456789abcdef"}
    monkeypatch.setattr(cluster, "_versions", lambda: versions)
    with pytest.raises(InputError) as error, dask_executor(workers.scheduler_address):
        raise AssertionError("it began")
    first, _, rest = str(error.value).partition(" (")
    assert first.startswith("cluster: worker ")
    here = cluster._short(Hashes().package())
    assert rest.partition(") ")[2] == (
        f"has memory-workbench {here}, and 9.9.9+01234567 is here; install the same there and "
        "restart it"
    )


def test_a_worker_that_comes_late_is_checked_too(workers, tmp_path):
    with dask_executor(workers.scheduler_address) as executor:
        executor._expected = (cluster._versions() | {"torch": "0.1"}, {})
        future = executor.submit(print, Named("n"), tmp_path, tmp_path)
        with pytest.raises(InputError, match=r"^cluster: worker .+ has torch .+, and 0\.1 is here"):
            future.result(timeout=30)


def test_a_file_that_a_worker_does_not_see_is_refused(workers, tmp_path):
    lacking, out = tmp_path / "lacking.ipynb", tmp_path / "out"
    address = workers.scheduler_address
    with pytest.raises(InputError) as error, workspace(out, dask=address, needs=[lacking]):
        raise AssertionError("it began")
    assert str(error.value).endswith(
        f"does not see {lacking}; put it where all machines see it under the same path (reports "
        "may go to a URL: --out s3://...)"
    )
    assert not out.exists()  # a refusal leaves nothing behind


def test_a_folder_of_the_same_name_on_a_worker_is_not_the_folder(workers, tmp_path, monkeypatch):
    # all workers of this test share the disk: so the sign that the driver leaves is lost instead
    monkeypatch.setattr(Path, "touch", lambda self: None)
    with pytest.raises(InputError) as error, workspace(tmp_path, dask=workers.scheduler_address):
        raise AssertionError("it began")
    assert f"does not see {tmp_path}; put it where" in str(error.value)


@pytest.mark.parametrize("there", ["nothing", "something else", "no address"])
def test_an_address_that_does_not_answer_is_one_line(there, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if there == "something else":  # that takes connections and never says a word
            listening.listen()
        address = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        address = "somewhere" if there == "no address" else address
        with pytest.raises(InputError) as error, dask_executor(address):
            raise AssertionError("it began")
    said = str(error.value)
    assert said.startswith(f"cluster: no Dask scheduler answers at {address} (")
    assert said.endswith(
        "); start one by `dask scheduler`, which prints its address, and workers by "
        "`dask worker ADDRESS`"
    )
    assert "\n" not in said


def test_a_refusal_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    (tmp_path / "there").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "note").touch()
    for out in ("reports/one", "there/one", "there", "kept"):
        begun = cluster.workspace(tmp_path / out, dask="somewhere")
        with pytest.raises(InputError, match="^cluster: no Dask scheduler answers"), begun:
            raise AssertionError("it began")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "kept", "kept/note", "there",
    ]  # fmt: skip


def test_a_scheduler_file_that_is_not_there_is_refused(tmp_path):
    file = tmp_path / "scheduler.json"
    with pytest.raises(InputError) as error, dask_executor(str(file)):
        raise AssertionError("it began")
    assert str(error.value) == (
        f"cluster: there is no scheduler file {file}; it is what "
        "`dask scheduler --scheduler-file` writes"
    )


def test_a_scheduler_file_is_read(workers, tmp_path):
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": workers.scheduler_address}))
    with dask_executor(str(file)) as executor:
        assert executor.threads == 2


def test_without_dask_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(InputError) as error, dask_executor("tcp://127.0.0.1:8786"):
        raise AssertionError("it began")
    assert str(error.value) == (
        "cluster: --dask needs dask.distributed; install it: pip install 'memory-workbench[dask]'"
    )


# behind a URL


@pytest.fixture
def memory():
    """A URL in this process's memory, empty."""
    import fsspec

    files = fsspec.filesystem("memory")
    with contextlib.suppress(FileNotFoundError):
        files.rm("/grid", recursive=True)
    return "memory://grid", files


def make(plan, out, where, *, threads=None, force=False) -> Report:
    """Writes a report without a kernel."""
    folder = Path(out) / plan.name
    if (folder / "status.json").exists() and not force:
        return Report(plan.name, folder, "ok", 1.0, cached=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("report.html", "key.json", f"{plan.name}.ipynb"):
        (folder / name).write_text(f"{name} by {where}")
    (folder / "status.json").write_text(json.dumps({"by": str(where)}))
    return Report(plan.name, folder, "ok", 1.0)


def test_a_report_goes_to_the_url_with_its_status_last(memory, monkeypatch):
    url, files = memory
    for old in ("status.json", "figures.js"):  # of an earlier run, which had a figure
        files.pipe_file(f"/grid/a/{old}", b"old")
    written = []
    pipe, remove = files.pipe_file, files.rm_file
    monkeypatch.setattr(
        type(files), "pipe_file", lambda self, p, c, **o: (written.append(f"+{p}"), pipe(p, c))
    )
    monkeypatch.setattr(
        type(files), "rm_file", lambda self, p: (written.append(f"-{p}"), remove(p))
    )
    with workspace(url) as (folder, executor, jobs):
        assert jobs == 1
        written.clear()
        report = executor.submit(make, Named("a"), folder, "one", force=True).result()
        assert written[0] == "-/grid/a/status.json"  # first, or it would vouch for a mixture
        assert sorted(written[1:4]) == [
            "+/grid/a/a.ipynb",
            "+/grid/a/key.json",
            "+/grid/a/report.html",
        ]
        assert written[4:] == ["+/grid/a/status.json", "-/grid/a/figures.js"]
        (folder / "index.html").write_text("index")
        (folder / ".grid").mkdir()
        (folder / ".grid" / "sizes.json").write_text("[]")
        (folder / engine.LOCKS).mkdir()
        (folder / engine.LOCKS / "a.lock").write_text("")
    assert report.folder == folder / "a"
    assert sorted(files.find("/grid")) == [
        "/grid/.grid/sizes.json",
        "/grid/a/a.ipynb",
        "/grid/a/key.json",
        "/grid/a/report.html",
        "/grid/a/status.json",
        "/grid/index.html",
    ]
    assert files.cat_file("/grid/a/status.json") == b'{"by": "one"}'


def test_a_mirror_follows_the_url(memory):
    url, files = memory
    with workspace(url) as (folder, executor, _):
        for name in "abc":
            executor.submit(make, Named(name), folder, "one").result()
    # meanwhile another machine makes b again, and takes c away
    files.pipe_file("/grid/b/key.json", b"new key")
    files.pipe_file("/grid/b/status.json", b"new status")
    files.rm("/grid/c", recursive=True)
    with workspace(url) as (folder, executor, _):
        assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == ["a", "b"]
        assert (folder / "a/key.json").read_text() == "key.json by one"
        assert (folder / "b/key.json").read_text() == "new key"
        assert (folder / "b/status.json").read_text() == "new status"
        assert (folder / "b/report.html").read_text() == "memory://grid/b/report.html\n"
        # what is there is not made again, nor is what stands in for its page brought there
        assert executor.submit(make, Named("b"), folder, "two").result().cached
    assert files.cat_file("/grid/b/report.html") == b"report.html by one"


def test_workers_bring_their_reports_to_a_url(workers, plans, tmp_path):
    wanted, url = plans(0.0), f"file://{tmp_path}/far/away"
    for cached in (False, True):
        with workspace(url, dask=workers.scheduler_address) as (folder, executor, _):
            [report] = run_plans(wanted, folder, executor=executor, progress=False)
            assert (report.status, report.cached, report.folder) == ("ok", cached, folder / "r0")
    assert runs(plans) == ["0"]
    far = tmp_path / "far/away/r0"
    assert json.loads((far / "status.json").read_text())["key"] == "key0"
    assert (far / "report.html").stat().st_size > 1000 and (far / "r0.ipynb").is_file()


def test_an_upload_that_fails_is_one_report_that_fails(memory, monkeypatch, tmp_path):
    url, files = memory
    remote = Remote(url)
    folder = make(Named("a"), tmp_path, "one").folder
    pipe = files.pipe_file

    def full(self, place, content):
        if place.endswith("key.json"):
            raise OSError(28, "No space left on device")
        pipe(place, content)

    monkeypatch.setattr(type(files), "pipe_file", full)
    with pytest.raises(OSError, match="No space left"):
        remote.put_report(folder)
    assert not files.exists("/grid/a/status.json")  # so nobody takes it for a report


@pytest.mark.parametrize(
    "url", ["nowhere://bucket/reports", "file:///proc/version/reports"], ids=["protocol", "place"]
)
def test_a_url_that_cannot_be_written_to_is_refused(url):
    with pytest.raises(InputError) as error, workspace(url):
        raise AssertionError("it began")
    assert str(error.value).startswith(f"cluster: cannot write to {url} (")
    assert str(error.value).endswith("); choose another folder with --out")
