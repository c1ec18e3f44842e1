"""Beyond one machine: reports made by the workers of a Dask cluster, and folders behind a URL.

Both are executors, to which the engine sends ``make_report`` as it does to a pool of threads.
Which worker makes what, and what becomes of it when one is lost, is Dask's affair.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import logging
import platform
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from workbench.engine import LOCKS, RUNNING, STATUS, end_kernels, share_of_cores, usable
from workbench.fingerprint import Hashes
from workbench.table import InputError, cache_folder, whole_file

PATIENCE = 10.0  # seconds to wait for a scheduler's answer
COMPARED = ("torch", "transformers", "numpy", "pandas")  # packages that the numbers depend on
PAGE = "report.html"
# what the index and the comparison page are made of; the rest of a report stays where it is
SITE_FILES = ("key.json", "table.parquet", "thumbnail.json", "figures.js")
# in a worker's process: folders of the reports under way, by run, and the runs that were ended
_under_way: dict[str, set[Path]] = {}
_ended: set[str] = set()


class Lost(Exception):
    """A report was not made, for no fault of its own: its workers or the scheduler went away."""


@contextlib.contextmanager
def workspace(
    out: str | Path, *, dask: str | None = None, jobs: int = 1, needs: Sequence[Path] = ()
) -> Iterator[tuple[Path, Executor | None, int]]:
    """Where a grid's reports lie on this machine, who makes them, and how many at once.

    Args:
        out: Folder of reports, or an fsspec URL of one. Behind a URL each report is written with
            ``status.json`` last; what is written beside the reports goes there at the end.
        dask: Address of a Dask scheduler, or path of its scheduler file; None: this machine.
        jobs: How many reports at once; on a cluster at least one for each thread of its workers.
        needs: Files that every worker must see, such as notebooks.

    Yields:
        The folder (of a URL: what the site needs of each report there), the executor for
        ``run_plans``, None for its own, and the jobs.

    Raises:
        InputError: A URL that cannot be written to, a cluster that cannot be used.
    """
    remote = Remote(str(out)) if "://" in str(out) else None
    whole = Path(out).absolute()
    absent = [] if remote else [p for p in (whole, *whole.parents) if not p.exists()]
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, absent)  # a refusal leaves no folder behind
        folder = remote.pull() if remote else usable(out, [])
        executor = None
        if dask:
            seen = {str(path): str(path) for path in needs}
            if not remote:
                seen |= stack.enter_context(_sign(folder))
            url = remote.url if remote else ""
            executor = stack.enter_context(dask_executor(dask, needs=seen, url=url))
            jobs = max(jobs, executor.threads)
        elif remote:
            executor = stack.enter_context(_Uploading(remote.url, jobs))
        yield folder, executor, jobs
    if remote:
        remote.put_site()


@contextlib.contextmanager
def _sign(folder: Path) -> Iterator[dict[str, str]]:
    """A file by which a worker knows this folder from another of the same name on its own disk."""
    sign = folder / f".{uuid.uuid4().hex}"
    sign.touch()
    try:
        yield {str(sign): str(folder)}
    finally:
        sign.unlink(missing_ok=True)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the innermost first, up to one that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


# a cluster


@contextlib.contextmanager
def dask_executor(
    address: str, *, needs: Mapping[str, str] | None = None, url: str = ""
) -> Iterator[DaskExecutor]:
    """An executor that makes reports on the workers of a Dask cluster.

    A report whose worker is lost is made by another. Left by an exception, such as Ctrl-C, it
    ends the reports under way on the workers too.

    Args:
        address: ``tcp://HOST:PORT`` of the scheduler, or path of its scheduler file (``.json``).
        needs: Paths that every worker must see too, and what to say a worker does not see.
        url: fsspec URL to which workers bring their reports; empty: they write to the folder.

    Raises:
        InputError: Dask is not installed, no scheduler answers, or a worker has another version
            of the package or does not see what it needs.
    """
    client = _client(address)
    executor = DaskExecutor(client, address, _versions(), dict(needs or {}), url)
    try:
        executor.refuse_workers()
        yield executor
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        with contextlib.suppress(Exception):
            client.close(timeout=PATIENCE)


def _client(address: str):
    try:
        from distributed import Client
    except ImportError:
        raise InputError(
            "cluster: --dask needs dask.distributed; install it: pip install 'memory-workbench[dask]'"
        ) from None
    # it logs a traceback for every connection that ends, ours on Ctrl-C too
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    file = Path(address)
    if file.suffix == ".json" and not file.is_file():
        raise InputError(
            f"cluster: there is no scheduler file {address}; it is what "
            "`dask scheduler --scheduler-file` writes"
        )
    try:
        place = json.loads(file.read_text())["address"] if file.suffix == ".json" else address
        with ThreadPoolExecutor(1) as pool:  # a notebook's own thread has an event loop already
            pool.submit(asyncio.run, _knock(place)).result()
        return Client(place, timeout=PATIENCE, set_as_default=False, name="memory-workbench")
    except Exception as error:  # no such host, nothing there, no address, not a scheduler
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"cluster: no Dask scheduler answers at {address} ({reason}); start one by "
            "`dask scheduler`, which prints its address, and workers by `dask worker ADDRESS`"
        ) from None


async def _knock(address: str) -> None:
    """Connect once: a client waits for ever for one that takes the call and says nothing."""
    from distributed.comm import connect
    from distributed.security import Security

    options = Security().get_connection_args("client")
    comm = await asyncio.wait_for(connect(address, timeout=PATIENCE, **options), PATIENCE)
    await comm.close()


class DaskExecutor(Executor):
    """Sends ``make_report`` to workers; the ``say`` it is given is called in this process."""

    def __init__(self, client, address: str, versions: dict, needs: dict[str, str], url: str):
        self.run = f"workbench-{uuid.uuid4().hex}"  # the topic of its events, too
        self._client, self._address = client, address
        self._expected, self._url = (versions, needs), url
        self._numbers = itertools.count()
        self._tasks: dict[int, tuple] = {}  # those not done: future, Dask's future, say
        self._gone = ""
        client.subscribe_topic(self.run, self._hear)

    @property
    def threads(self) -> int:
        """Reports that the workers of this moment make at once; at least 1."""
        return max(1, sum(self._client.nthreads().values()))

    def refuse_workers(self) -> None:
        """Check the workers of this moment; those that come later check themselves.

        Raises:
            InputError: The first that cannot be used.
        """
        names = {
            address: about["name"]
            for address, about in self._client.scheduler_info()["workers"].items()
        }
        for address, found in self._client.run(
            _problem, *self._expected, on_error="return"
        ).items():
            if isinstance(found, Exception):  # it cannot even load this module
                found = (
                    f"cannot run the workbench ({type(found).__name__}: {found}); install it there"
                )
            if found:
                name = names.get(address, address)
                called = address if name == address else f"{name} ({address})"
                raise InputError(f"cluster: worker {called} {found}")

    def submit(self, function: Callable, plan, out, where, *, say=None, **options) -> Future:
        """Send one report; the future runs from when a worker has begun it."""
        future, number = Future(), next(self._numbers)
        if self._gone:
            future.set_exception(Lost(self._gone))
            return future
        self._tasks[number] = future, None, say  # its first event may come before the next line
        sent = self._client.submit(
            _at_worker, self.run, number, self._expected, self._url,
            function, plan, str(out), str(where), options,
            pure=False, key=f"{plan.name}-{self.run}-{number}",
        )  # fmt: skip
        self._tasks[number] = future, sent, say
        future.add_done_callback(lambda done: self._cancelled(done, number, sent))
        sent.add_done_callback(lambda done: self._done(number, plan, Path(out)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End at once what waits and what is under way, if ``cancel_futures``."""
        if not cancel_futures:
            return
        self._gone = "the run was ended"
        tasks = list(self._tasks.values())

        def tell() -> None:
            with contextlib.suppress(Exception):  # a cluster that is gone has nothing to end
                self._client.cancel([sent for _, sent, _ in tasks if sent])
                self._client.run(_end, self.run, on_error="ignore")

        # a daemon, for a cluster that is out of reach might never answer
        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        telling.join(PATIENCE)
        for future, _, _ in tasks:
            if not future.cancel() and not future.done():
                with contextlib.suppress(InvalidStateError):
                    future.set_exception(Lost(self._gone))

    def _hear(self, event) -> None:
        number, *words = event[1]
        future, _, say = self._tasks.get(number, (None, None, None))
        if future is None:
            return
        if not future.running() and not future.done():
            future.set_running_or_notify_cancel()
        if words and say:
            say(*words)

    def _cancelled(self, future: Future, number: int, sent) -> None:
        if future.cancelled():
            self._tasks.pop(number, None)
            future.set_running_or_notify_cancel()  # or nobody who waits for it would wake up
            sent.cancel()

    def _done(self, number: int, plan, out: Path) -> None:
        future, sent, _ = self._tasks.pop(number, (None, None, None))
        if future is None or future.done():
            return
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            try:
                if sent.status == "finished":
                    report = sent.result()
                    if self._url:
                        Remote(self._url).pull_reports([plan.name], out)
                    future.set_result(report)
                else:
                    future.set_exception(self._error(sent, plan))
            except Exception as error:
                future.set_exception(error)

    def _error(self, sent, plan) -> BaseException:
        if sent.status != "error":  # Dask cancels all when it loses the scheduler
            self._gone = self._gone or (
                f"the Dask scheduler at {self._address} went away; start it and run the same "
                "again: what is finished is kept"
            )
            return Lost(self._gone)
        error = sent.exception()
        if type(error).__name__ == "KilledWorker":
            return Lost(
                f"{error.allowed_failures + 1} workers were lost while they made {plan.name} (the "
                f"last: {error.last_worker.address}); out of memory, or out of time?"
            )
        return error


def _at_worker(run, number, expected, url, function, plan, out, where, options):
    """What a worker does for one report."""
    from distributed import get_worker

    worker = get_worker()

    def say(*words) -> None:
        worker.log_event(run, [number, *words])

    problem = _problem(*expected)
    if problem:
        raise InputError(f"cluster: worker {worker.name} {problem}")
    if run in _ended:
        raise Lost("the run was ended")
    say()  # it has begun
    with contextlib.ExitStack() as stack:
        place = (
            stack.enter_context(tempfile.TemporaryDirectory(prefix="workbench-")) if url else out
        )
        making = _under_way.setdefault(run, set())
        making.add(Path(place).absolute() / plan.name)
        try:
            if url:
                report = make_and_put(url, function, plan, place, where, say=say, **options)
            else:
                report = function(plan, place, where, say=say, **options)
        finally:
            making.discard(Path(place).absolute() / plan.name)
    return replace(report, folder=Path(out) / plan.name)


def _end(run: str) -> None:
    _ended.add(run)
    end_kernels(_under_way.get(run, set()))


@cache
def _versions() -> dict[str, str]:
    """What must be equal on all machines, or a report depends on which of them made it."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    found["memory-workbench"] = Hashes().package()
    for name in COMPARED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _problem(versions: dict[str, str], needs: dict[str, str]) -> str:
    """What makes this process unfit as a worker; empty if nothing does."""
    here = _versions()
    for name, wanted in versions.items():
        if here[name] != wanted:
            return (
                f"has {name} {_short(here[name])}, and {_short(wanted)} is here; install the same "
                "there and restart it"
            )
    for path, said in needs.items():
        if not Path(path).exists():
            return (
                f"does not see {said}; put it where all machines see it under the same path"
                " (reports may go to a URL: --out s3://...)"
            )
    return ""


def _short(version: str) -> str:
    base, plus, digest = version.partition("+")
    return base + plus + digest[:8]


# a folder of reports behind a URL


class Remote:
    """A folder of reports at an fsspec URL; its mirror on this machine is in the cache.

    Raises:
        InputError: No such protocol, its package is missing, or it cannot be written to.
    """

    def __init__(self, url: str):
        import fsspec

        self.url = url
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except Exception as error:  # whatever the protocol's own package sets off
            raise InputError(self._refusal(error)) from None
        self._root = root.rstrip("/")
        name = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
        self.mirror = cache_folder() / "mirrors" / name

    def _refusal(self, error: Exception) -> str:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        return f"cluster: cannot write to {self.url} ({reason}); choose another folder with --out"

    def pull(self) -> Path:
        """Bring the mirror up to date with what the site needs of each report.

        Raises:
            InputError: It cannot be read or written to.
        """
        self.mirror.mkdir(parents=True, exist_ok=True)
        try:
            self._write(b"", f".{uuid.uuid4().hex}", keep=False)
            there = {Path(p).parent.name for p in self._files.glob(f"{self._root}/*/{STATUS}")}
            self.pull_reports(sorted(there), self.mirror)
            planned = self._files.glob(f"{self._root}/.grid/*.json")
            self._fetch([f".grid/{Path(path).name}" for path in planned], self.mirror)
        except Exception as error:  # whatever the protocol's own package sets off
            raise InputError(self._refusal(error)) from None
        for status in self.mirror.glob(f"*/{STATUS}"):
            if status.parent.name not in there:
                shutil.rmtree(status.parent)
        return self.mirror

    def pull_reports(self, names: Sequence[str], into: Path) -> None:
        """Fetch what the site needs of reports whose status there is another than here."""
        statuses = self._read([f"{name}/{STATUS}" for name in names])
        changed = {}
        for file, content in statuses.items():
            here = into / file
            if not here.is_file() or here.read_bytes() != content:
                here.unlink(missing_ok=True)
                changed[here] = content
        self._fetch([f"{here.parent.name}/{file}" for here in changed for file in SITE_FILES], into)
        for here, content in changed.items():
            # the page itself stays where it is; this says where, and that the report is whole
            (here.parent / PAGE).write_text(f"{self.url}/{here.parent.name}/{PAGE}\n", "utf-8")
            with whole_file(here) as temporary:
                temporary.write_bytes(content)

    def _fetch(self, files: Sequence[str], into: Path) -> None:
        found = self._read(files)
        for file in files:
            (into / file).parent.mkdir(parents=True, exist_ok=True)
            (into / file).unlink(missing_ok=True)
            if file in found:
                (into / file).write_bytes(found[file])

    def _read(self, files: Sequence[str]) -> dict[str, bytes]:
        """The contents of those that are there, fetched at once where the protocol can."""
        if not files:
            return {}
        found = self._files.cat([f"{self._root}/{file}" for file in files], on_error="omit")
        return {path.removeprefix(f"{self._root}/"): content for path, content in found.items()}

    def put_report(self, folder: Path) -> None:
        """Write a report's files; its status goes first and comes last."""
        place = f"{self._root}/{folder.name}"
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{place}/{STATUS}")
        files = [p for p in folder.rglob("*") if p.is_file() and p.name != STATUS]
        for path in [*files, folder / STATUS]:
            self._write(path.read_bytes(), f"{folder.name}/{path.relative_to(folder).as_posix()}")
        kept = {f"{place}/{p.relative_to(folder).as_posix()}" for p in [*files, folder / STATUS]}
        for old in self._files.find(place):
            if old not in kept:
                self._files.rm_file(old)

    def put_site(self) -> None:
        """Write what lies beside the reports: the pages over them and the plans of grids.

        Raises:
            InputError: It cannot be written to.
        """
        apart = {LOCKS, RUNNING, *(p.parent.name for p in self.mirror.glob(f"*/{STATUS}"))}
        files = (p for p in sorted(self.mirror.rglob("*")) if p.is_file())
        names = (p.relative_to(self.mirror) for p in files)
        try:
            for name in (name for name in names if name.parts[0] not in apart):
                self._write((self.mirror / name).read_bytes(), name.as_posix())
        except Exception as error:  # whatever the protocol's own package sets off
            raise InputError(self._refusal(error)) from None

    def _write(self, content: bytes, file: str, *, keep: bool = True) -> None:
        place = f"{self._root}/{file}"
        self._files.makedirs(place.rpartition("/")[0], exist_ok=True)
        self._files.pipe_file(place, content)
        if not keep:
            self._files.rm_file(place)


def make_and_put(url: str, function: Callable, plan, out, where, **options):
    """Make a report in a folder here, unless it is behind the URL, and bring it there."""
    remote = Remote(url)
    remote.pull_reports([plan.name], Path(out))
    report = function(plan, out, where, **options)
    if not report.cached and (report.folder / STATUS).is_file():
        remote.put_report(report.folder)
    return report


class _Uploading(ThreadPoolExecutor):
    """Threads of this process that bring each report to a URL."""

    def __init__(self, url: str, jobs: int):
        super().__init__(jobs)
        self._url, self._share = url, share_of_cores(jobs)

    def submit(self, function: Callable, *arguments, **options) -> Future:
        options = {"threads": self._share, **options}
        return super().submit(make_and_put, self._url, function, *arguments, **options)
