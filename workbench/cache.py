"""What is computed once and kept: one way to lock it, to check it, and to make room.

An entry is a file or a folder in ``cache_folder()/KIND``. Beside it lies ``NAME.sums``, the hashes
of what was written, whose time of change is that of the entry's last use; ``NAME.lock`` is held by
the process that makes it, through the operating system, so that a kill frees it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from workbench.table import InputError, cache_folder, whole_file, whole_folder

KINDS = {
    "panels": "answers of models to texts; scored again when asked for",
    "compression": "searches for short prompts; begun again when asked for",
    "capacity": "runs of the capacity experiment; half a minute to ten minutes",
    "taught": "models that were taught tasks; two minutes each",
    "subsets": "models on random halves of the suite's texts; about 14 minutes",
    "suites": "the embedded suite; about four minutes each",
    "gguf": "GGUF files as safetensors; one to four minutes each",
}
EVICTED = ("panels", "compression")  # what goes by itself, in this order; the rest when asked
LIMIT = 5.0  # GB of what goes by itself; WORKBENCH_CACHE_LIMIT sets another
SUMS, LOCK, IN_USE = ".sums", ".lock", ".in_use"
ASIDE = (SUMS, LOCK, ".checkpoint")  # what lies beside entries and is none
PATIENCE = 1.0  # seconds of waiting for another process before it is said
WAITS = "another process is at work on"  # said on stderr; a report leaves such lines out
Value = TypeVar("Value")


@dataclass(frozen=True)
class Entry:
    """One thing in the cache: ``size`` in bytes, ``used`` in seconds since 1970."""

    place: Path
    size: int
    used: float

    @property
    def kind(self) -> str:
        return self.place.parent.name


def limit() -> float:
    """Bytes that entries which go by themselves may take; 0: none is read, none is kept.

    Raises:
        InputError: ``WORKBENCH_CACHE_LIMIT`` is not a number of GB.
    """
    given = os.environ.get("WORKBENCH_CACHE_LIMIT") or str(LIMIT)
    try:
        number = float(given)
    except ValueError:
        number = float("nan")
    if not number >= 0:
        raise InputError(
            f"cache: WORKBENCH_CACHE_LIMIT is {given!r}, but must be a number of GB, at least 0"
        )
    return number * 1e9


# --- getting it, or making it once ---------------------------------------------------------------


def keep(
    place: Path,
    make: Callable[[], Value],
    *,
    read: Callable[[Path], Value],
    write: Callable[[Value, Path], object],
    asker: str,
    again: str,
) -> Value:
    """What a file of the cache holds; made and written if it is not there or damaged.

    Processes that ask for the same at once make it once, the others wait and say so. A cache that
    cannot be written to costs a warning, never the value.

    Args:
        place: The file, in ``cache_folder()/KIND``.
        make: Computes the value.
        read: Reads it; an :class:`InputError` says that the file cannot be used.
        write: Writes it, whole or not at all.
        asker, again: For messages: who asks, and what is done where an entry is damaged
            (``scoring again``).
    """
    value, _ = look(place, read)
    if value is not None:
        return value
    with locked(place, asker):
        # again: another process may have made it meanwhile
        value, reason = look(place, read)
        if reason:
            warnings.warn(f"{asker}: {place} {reason}; {again}", stacklevel=3)
            with contextlib.suppress(OSError):  # a cache that is only read
                remove(place)
        if value is None:
            value = make()
            store(place, lambda at: write(value, at), asker=asker)
    return value


def keep_folder(place: Path, make: Callable[[Path], object], *, asker: str, again: str) -> Path:
    """A folder of the cache; made if it is not there or damaged, and in use until this process ends.

    Args:
        make: Fills the folder it is given, which is renamed when it is whole.

    Raises:
        OSError: It cannot be written: unlike a value, a folder is of no use elsewhere.
    """
    hold(place)
    if place.is_dir() and not damage(place):
        touch(place)
        return place
    with locked(place, asker):
        reason = damage(place)
        if reason:
            warnings.warn(f"{asker}: {place} {reason}; {again}", stacklevel=3)
            remove(place)
        if not place.is_dir():
            for left_over in place.parent.glob(f".{place.name}.*"):
                shutil.rmtree(left_over, ignore_errors=True)  # of a process that was killed
            with whole_folder(place) as folder:
                make(folder)
            seal(place)
    return place


def store(place: Path, write: Callable[[Path], object], *, asker: str) -> None:
    """Write an entry and its hashes, and make room for it; call it under the entry's lock.

    A full disk must not cost what was computed, so it is a warning.
    """
    if _turned_off(place):
        return
    try:
        # first: an old hash beside a new file would read as damage
        Path(f"{place}{SUMS}").unlink(missing_ok=True)
        write(place)
        seal(place)
    except OSError as error:
        warnings.warn(f"{asker}: not cached ({error})", stacklevel=4)
    if place.parent.name in EVICTED:
        make_room(limit())


def _turned_off(place: Path) -> bool:
    return place.parent.name in EVICTED and limit() == 0


def look(place: Path, read: Callable[[Path], Value]) -> tuple[Value | None, str]:
    """What an entry holds, if it is there and whole; else None and what is wrong, empty if nothing.

    Nothing is said, made or waited for.
    """
    if not place.is_file() or _turned_off(place):
        return None, ""
    reason = damage(place)
    if reason:
        return None, reason
    try:
        value = read(place)
    except InputError as error:  # of another version, or damaged before it was sealed
        return None, f"cannot be used ({error})"
    except FileNotFoundError:  # made room for, just now
        return None, ""
    touch(place)
    return value, ""


@contextlib.contextmanager
def locked(place: Path, asker: str) -> Iterator[None]:
    """Hold an entry's lock; another process that wants it waits, and says so."""
    from filelock import FileLock, Timeout

    if _turned_off(place):  # others are not to wait for what they will not get
        yield
        return
    lock = FileLock(f"{place}{LOCK}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            print(f"{asker}: {WAITS} {place.name}; waiting for it", file=sys.stderr, flush=True)
            lock.acquire()
    except (OSError, NotImplementedError):
        # a cache that cannot be written to, or a disk without locks: everyone for themselves
        yield
        return
    try:
        yield
    finally:
        # a folder's lock stays: there are few; panels are many. While it is held nobody else has
        # it, and a waiter finds that its file is gone and begins anew
        if not place.is_dir():
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


# --- whole or damaged ----------------------------------------------------------------------------


def seal(place: Path) -> None:
    """Write down the hash, size and time of each file of an entry.

    Raises:
        OSError: It cannot be written.
    """
    sums = {}
    for name, file in _files(place):
        about = file.stat()
        sums[name] = [_hash(file), about.st_size, about.st_mtime_ns]
    with whole_file(f"{place}{SUMS}") as temporary:
        temporary.write_text(json.dumps(sums), encoding="utf-8")


def damage(place: Path, *, thorough: bool = False) -> str:
    """What is wrong with an entry, empty where nothing is; it ends a sentence that names it."""
    names = damaged(place, thorough=thorough)
    if not names:
        return ""
    more = f", and {len(names) - 1} more files" if len(names) > 1 else ""
    return f"is not what was written (its hash differs{f': {names[0]}{more}' if names[0] else ''})"


def damaged(place: Path, *, thorough: bool = False) -> list[str]:
    """Files of an entry that are gone or not what was written; "" is the entry itself.

    A file is read only where its size or time is not that of when it was written, as folders may
    hold gigabytes; ``thorough`` reads all. An entry without hashes, as older versions left it, is
    taken as it is and sealed.
    """
    if not place.exists():
        return []
    sums = _sums(place)
    found, moved = [], sums is None
    for name, (was, size, changed) in (sums or {}).items():
        file = place / name if name else place
        try:
            about = file.stat()
        except FileNotFoundError:
            found.append(name)
            continue
        same = (about.st_size, about.st_mtime_ns) == (size, changed)
        if (thorough or not same) and (about.st_size != size or _hash(file) != was):
            found.append(name)
        moved |= not same
    if moved and not found:  # copied or restored: sealed, it is read once and not at each use
        with contextlib.suppress(OSError):
            seal(place)
    return found


def _sums(place: Path) -> dict[str, tuple[str, int, int]] | None:
    """Hash, size and time of each file when it was written, None where that is not known."""
    try:
        told = json.loads(Path(f"{place}{SUMS}").read_text(encoding="utf-8"))
        return {name: (str(was), int(size), int(at)) for name, (was, size, at) in told.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _files(place: Path) -> list[tuple[str, Path]]:
    """Name within the entry and path of each file; hidden ones are unfinished."""
    if not place.is_dir():
        return [("", place)]
    found = ((file.relative_to(place), file) for file in sorted(place.rglob("*")))
    return [
        (name.as_posix(), file)
        for name, file in found
        if file.is_file() and not any(part.startswith(".") for part in name.parts)
    ]


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def touch(place: Path) -> None:
    """Note that an entry was used now."""
    with contextlib.suppress(OSError):  # a cache that is only read
        os.utime(f"{place}{SUMS}")


# --- in use --------------------------------------------------------------------------------------


@cache
def hold(place: Path) -> object:
    """Mark a folder as used by this process, until it ends in whatever way."""
    from filelock import FileLock

    # a cache may be shared by machines
    mark = FileLock(_marks(place) / f"{place.name}.{platform.node()}.{os.getpid()}{LOCK}")
    try:
        _marks(place).mkdir(parents=True, exist_ok=True)
        in_use(place)  # clears the marks of processes that ended
        mark.acquire(timeout=PATIENCE)
    except (OSError, NotImplementedError):
        return None
    return mark


def in_use(place: Path) -> bool:
    """Whether a process works with a folder of the cache; marks of those that ended are removed."""
    from filelock import FileLock, Timeout

    used = False
    for file in _marks(place).glob(f"{place.name}.*{LOCK}"):
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            used = True
        except (OSError, NotImplementedError):
            continue
        else:
            file.unlink(missing_ok=True)
            lock.release()
    return used


def _marks(place: Path) -> Path:
    return place.parent.parent / IN_USE / place.parent.name


# --- what there is, and making room --------------------------------------------------------------


def entries(kind: str = "") -> list[Entry]:
    """What the cache holds, of one kind or of all, the longest unused first."""
    folders = [cache_folder() / kind] if kind else _folders()
    return sorted((e for f in folders for e in _entries(f)), key=lambda entry: entry.used)


def _entries(folder: Path) -> list[Entry]:
    """In one pass: there may be tens of thousands, and room is made at each writing."""
    about = {}
    for each in os.scandir(folder) if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # gone just now
            about[each.name] = each.stat()
    found = []
    for name, here in about.items():
        if not name.startswith(".") and not name.endswith(ASIDE):
            place, size = folder / name, here.st_size
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISDIR(here.st_mode):
                    size = sum(file.stat().st_size for _, file in _files(place))
                found.append(Entry(place, size, about.get(name + SUMS, here).st_mtime))
    return found


def _folders() -> list[Path]:
    there = [f for f in sorted(cache_folder().glob("[!.]*")) if f.is_dir()]
    known = {kind: cache_folder() / kind for kind in KINDS}
    return [*known.values(), *(folder for folder in there if folder.name not in known)]


def make_room(most: float) -> int:
    """Remove what goes by itself, the longest unused first, until it takes ``most`` bytes at most.

    What a process is at work on stays. Panels go before searches.

    Returns:
        How many were removed.
    """
    found = {kind: entries(kind) for kind in EVICTED}
    total = sum(entry.size for each in found.values() for entry in each)
    removed = 0
    for kind in EVICTED:
        for entry in found[kind]:
            if total <= most:
                return removed
            if discard(entry.place):
                total -= entry.size
                removed += 1
    return removed


def discard(place: Path) -> bool:
    """Remove an entry, unless a process makes it or works with it; says whether it did."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{place}{LOCK}")
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError, NotImplementedError):
        return False
    folder = place.is_dir()
    try:
        if not folder:
            remove(place)
            return True
        if in_use(place):
            return False
        # out of the way before it is looked at again: who comes now finds nothing, and who came
        # just before has left its mark
        aside = place.with_name(f".{place.name}.going")
        place.rename(aside)
        if in_use(place):
            aside.rename(place)
            return False
        shutil.rmtree(aside, ignore_errors=True)
        remove(place)
        return True
    except OSError:  # not ours to remove, or open on a system that minds
        return False
    finally:
        if not folder:
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def remove(place: Path) -> None:
    """Remove an entry and its hashes, at once; call it under its lock."""
    Path(f"{place}{SUMS}").unlink(missing_ok=True)
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def clear(kind: str = "") -> tuple[list[Entry], list[Entry]]:
    """Remove all entries of a kind, or all of those that go by themselves.

    Returns:
        What was removed, and what was not because it is in use.

    Raises:
        InputError: No such kind.
    """
    chosen = chosen_entries(kind)
    gone = [entry for entry in chosen if discard(entry.place)]
    return gone, [entry for entry in chosen if entry not in gone]


def chosen_entries(kind: str = "") -> list[Entry]:
    """Entries of a kind; empty: of those that go by themselves; ``all``: of every kind.

    Raises:
        InputError: No such kind.
    """
    kinds = [folder.name for folder in _folders()]
    if kind and kind != "all" and kind not in kinds:
        raise InputError(
            f"cache: no kind {kind!r}; there are {', '.join(kinds)}, or all of them: all"
        )
    if kind == "all":
        return entries()
    return entries(kind) if kind else [e for name in EVICTED for e in entries(name)]


def describe() -> str:
    """A few lines on what the cache holds: kinds, how many, how large, last used."""
    lines, widest = [], max(map(len, KINDS))
    for folder in _folders():
        found = entries(folder.name)
        if not found and folder.name not in KINDS:
            continue
        size = sum(entry.size for entry in found)
        last = time.strftime("%Y-%m-%d %H:%M", time.localtime(found[-1].used)) if found else "-"
        about = KINDS.get(folder.name, "")
        lines.append(
            f"{folder.name:<{widest}} {len(found):>7,} {readable(size):>9}  {last:<16}  {about}".rstrip()
        )
    total = sum(entry.size for entry in entries())
    head = f"{'kind':<{widest}} {'entries':>7} {'size':>9}  {'last used':<16}"
    return "\n".join(
        [
            f"cache {cache_folder()}, {readable(total)}",
            head.rstrip(),
            *lines,
            f"{' and '.join(EVICTED)} are kept to {readable(limit())} (WORKBENCH_CACHE_LIMIT, in GB), "
            "the longest unused go first",
        ]
    )


def readable(size: float) -> str:
    """Bytes as people say them: 12 kB, 3.4 MB, 1.2 GB."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= power:
            return (
                f"{size / power:.1f} {unit}" if size < 10 * power else f"{size / power:.0f} {unit}"
            )
    return f"{size:.0f} B"
