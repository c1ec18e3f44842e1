"""What is computed once and kept: by several processes, through kills, damage, full disks, limits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from workbench import cache
from workbench.cache import (
    Entry,
    clear,
    damage,
    damaged,
    describe,
    discard,
    entries,
    hold,
    in_use,
    keep,
    keep_folder,
    limit,
    locked,
    look,
    make_room,
    readable,
    seal,
)
from workbench.cli import app, main
from workbench.table import InputError, cache_folder

PACKAGE = Path(__file__).parent.parent


def place(name="one.json", kind="panels") -> Path:
    return cache_folder() / kind / name


def read(at: Path):
    try:
        return json.loads(at.read_text())
    except ValueError as error:
        raise InputError(f"no JSON: {error.args[0]}") from None


def write(value, at: Path) -> None:
    at.write_text(json.dumps(value))


class Maker:
    """Makes the next number at each call."""

    def __init__(self):
        self.made = 0

    def __call__(self):
        self.made += 1
        return [self.made]


def kept(make, at=None):
    return keep(at or place(), make, read=read, write=write, asker="asker", again="making again")


def fill(name, kind="panels", *, size=1000, age=0.0) -> Path:
    """An entry of ``size`` bytes, last used ``age`` seconds ago."""
    at = place(name, kind)
    at.parent.mkdir(parents=True, exist_ok=True)
    at.write_bytes(b"x" * size)
    seal(at)
    os.utime(f"{at}.sums", (time.time() - age,) * 2)
    return at


def told(warned) -> list[str]:
    return [str(each.message) for each in warned]


# --- one process ---------------------------------------------------------------------------------


def test_a_value_is_made_once_and_leaves_no_lock():
    make = Maker()
    assert kept(make) == kept(make) == [1] and make.made == 1
    assert sorted(p.name for p in place().parent.iterdir()) == ["one.json", "one.json.sums"]


def test_the_hash_beside_an_entry_is_that_of_its_bytes():
    import hashlib

    kept(Maker())
    ((was, size, changed),) = json.loads(Path(f"{place()}.sums").read_text()).values()
    assert was == hashlib.blake2b(b"[1]", digest_size=16).hexdigest()
    assert (size, changed) == (3, place().stat().st_mtime_ns)


@pytest.mark.parametrize("data", [b"", b"[1", b"[7]", b"[1, 2]", b"\xff\xfe"])
def test_a_damaged_value_is_said_once_and_made_again(data):
    make = Maker()
    kept(make)
    place().write_bytes(data)
    with pytest.warns(UserWarning) as warned:
        assert kept(make) == [2]
    assert told(warned) == [
        f"asker: {place()} is not what was written (its hash differs); making again"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kept(make) == [2]


def test_bits_that_change_behind_the_clock_are_found_by_a_thorough_look():
    kept(Maker())
    about = place().stat()
    place().write_bytes(b"[9]")
    os.utime(place(), ns=(about.st_atime_ns, about.st_mtime_ns))
    assert damage(place()) == ""
    assert damage(place(), thorough=True) == "is not what was written (its hash differs)"


def test_an_entry_of_an_older_version_is_taken_and_sealed():
    place().parent.mkdir(parents=True)
    place().write_text("[5]")
    make = Maker()
    assert kept(make) == [5] and not make.made
    assert damaged(place()) == [] and Path(f"{place()}.sums").is_file()
    place().write_text("[6")
    with pytest.warns(UserWarning, match="is not what was written"):
        assert kept(make) == [1]


def test_an_entry_that_was_broken_before_it_was_sealed_is_made_again():
    place().parent.mkdir(parents=True)
    place().write_text("[5")
    with pytest.warns(UserWarning) as warned:
        assert kept(Maker()) == [1]
    (said,) = told(warned)
    assert said.startswith(f"asker: {place()} cannot be used (no JSON: ")
    assert said.endswith("); making again")


def test_a_copied_cache_is_whole():
    make = Maker()
    kept(make)
    os.utime(place(), (1e9, 1e9))
    assert kept(make) == [1] and make.made == 1
    # and was read once: now its time is known
    assert json.loads(Path(f"{place()}.sums").read_text())[""][2] == place().stat().st_mtime_ns


def test_hashes_that_cannot_be_read_are_made_anew():
    make = Maker()
    kept(make)
    Path(f"{place()}.sums").write_text("{")
    assert kept(make) == [1] and make.made == 1
    assert json.loads(Path(f"{place()}.sums").read_text())


def test_a_full_disk_costs_no_value():
    def full(value, at):
        raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning) as warned:
        got = keep(place(), Maker(), read=read, write=full, asker="asker", again="again")
    assert got == [1] and told(warned) == ["asker: not cached ([Errno 28] No space left on device)"]
    assert not place().exists()


def test_damage_on_a_full_disk_is_not_sealed_as_whole():
    def full(value, at):
        raise OSError(28, "No space left on device")

    kept(Maker())
    place().write_text("[7]")
    with pytest.warns(UserWarning):
        got = keep(place(), Maker(), read=read, write=full, asker="asker", again="again")
    assert got == [1] and look(place(), read) == (None, "")


def test_a_cache_that_cannot_be_written_costs_no_value(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"^asker: not cached \(\[Errno 20\] Not a directory"):
        assert kept(Maker()) == [1]


def test_damage_in_a_cache_that_is_only_read_costs_no_value(monkeypatch):
    kept(Maker())
    place().write_text("[7]")

    def no(place):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache, "remove", no)
    with pytest.warns(UserWarning, match="is not what was written"):
        assert kept(Maker()) == [1]


def test_an_error_while_it_is_made_leaves_nothing():
    def fail():
        raise KeyError("no")

    with pytest.raises(KeyError):
        kept(fail)
    assert list(place().parent.iterdir()) == []
    assert kept(Maker()) == [1]


# --- folders -------------------------------------------------------------------------------------


def makes(folder: Path) -> None:
    (folder / "step1").mkdir()
    (folder / "step1" / "weights").write_bytes(b"\x00" * 5000)
    (folder / "spec.json").write_text("{}")


def kept_folder(make=makes, name="abc", kind="suites") -> Path:
    return keep_folder(place(name, kind), make, asker="asker", again="training again")


def test_a_folder_is_made_once():
    assert kept_folder() == place("abc", "suites")
    kept_folder(make=None)
    assert damaged(place("abc", "suites"), thorough=True) == []


@pytest.mark.parametrize("how", ["change", "cut", "remove"])
def test_a_damaged_folder_is_made_again_and_said(how):
    at = kept_folder() / "step1" / "weights"
    if how == "remove":
        at.unlink()
    else:
        at.write_bytes(b"\x00" * 4999 + (b"\x01" if how == "change" else b""))
    with pytest.warns(UserWarning) as warned:
        kept_folder()
    assert told(warned) == [
        f"asker: {place('abc', 'suites')} is not what was written (its hash differs: "
        "step1/weights); training again"
    ]
    assert at.read_bytes() == b"\x00" * 5000


def test_a_folder_of_an_older_version_is_not_made_again():
    at = place("abc", "suites")
    (at / "step1").mkdir(parents=True)
    makes_again = Maker()
    assert kept_folder(makes_again) == at and not makes_again.made
    assert Path(f"{at}.sums").is_file()


def test_what_a_killed_process_left_is_removed():
    left = place(".abc.x7", "suites")
    left.mkdir(parents=True)
    kept_folder()
    assert not left.exists()


def test_a_folder_that_cannot_be_made_is_an_error():
    def full(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        kept_folder(full)
    assert [p.name for p in place("abc", "suites").parent.iterdir()] == []


# --- room ----------------------------------------------------------------------------------------


def names(kind="") -> list[str]:
    return [entry.place.name for entry in entries(kind)]


def test_the_longest_unused_go_first_and_panels_before_searches():
    for name, age in (("old", 300), ("new", 100), ("mid", 200)):
        fill(name, age=age)
    fill("search", "compression", age=1000)
    fill("suite", "suites", age=9000)
    fill("converted", "gguf", age=9000)
    assert names("panels") == ["old", "mid", "new"]
    # 4,000 bytes of what goes by itself: two panels make room for 2,000
    assert make_room(2000) == 2
    assert set(names()) == {"new", "search", "suite", "converted"}
    assert make_room(1000) == 1 and "search" in names()
    assert make_room(0) == 1
    assert set(names()) == {"suite", "converted"}  # never by itself
    assert not list((cache_folder() / "panels").iterdir())  # nor hashes and locks


def test_use_renews():
    fill("one.json", age=500)
    fill("two.json", age=100)
    assert names() == ["one.json", "two.json"]
    keep(place(), None, read=lambda at: 1, write=None, asker="", again="")
    assert names() == ["two.json", "one.json"]


def test_what_is_locked_stays():
    old = fill("old", age=300)
    fill("new")
    with locked(old, "asker"):
        assert make_room(1000) == 1
        assert names() == ["old"]
    assert make_room(0) == 1


def test_writing_makes_room(monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE_LIMIT", "2e-6")  # 2,000 bytes
    old = fill("old", age=300, size=1900)
    at = place("long.json")
    value = ["y" * 500]
    assert keep(at, lambda: value, read=read, write=write, asker="", again="") == value
    assert not old.exists() and at.exists()


def test_a_limit_of_nothing_neither_reads_nor_keeps_panels(monkeypatch):
    make = Maker()
    kept(make)
    with locked(place(), "asker"):  # nor is anyone waited for
        monkeypatch.setenv("WORKBENCH_CACHE_LIMIT", "0")
        assert kept(make) == [2] and kept(make) == [3]
    # what takes minutes is another matter, and the panel is still there for others
    run = place("run.json", "capacity")
    assert kept(make, run) == [4] == kept(make, run)
    monkeypatch.delenv("WORKBENCH_CACHE_LIMIT")
    assert kept(make) == [1]


@pytest.mark.parametrize("given", ["much", "-1", "nan"])
def test_a_limit_that_is_none(monkeypatch, given):
    monkeypatch.setenv("WORKBENCH_CACHE_LIMIT", given)
    with pytest.raises(InputError) as error:
        limit()
    assert str(error.value) == (
        f"cache: WORKBENCH_CACHE_LIMIT is {given!r}, but must be a number of GB, at least 0"
    )


def test_limits(monkeypatch):
    monkeypatch.delenv("WORKBENCH_CACHE_LIMIT", raising=False)
    assert limit() == 5e9
    monkeypatch.setenv("WORKBENCH_CACHE_LIMIT", ".5")
    assert limit() == 5e8


# --- several processes ---------------------------------------------------------------------------

START = """
import json, os, sys, time
from pathlib import Path
from workbench.cache import keep, keep_folder
place, marker, action = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def make(*folder):
    with marker.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    exec(action)
    return [7]
if place.suffix:
    print(keep(place, make, read=lambda at: json.loads(at.read_text()),
               write=lambda value, at: at.write_text(json.dumps(value)), asker="asker", again=""))
else:
    keep_folder(place, make, asker="asker", again="")
    print("made", flush=True)
    sys.stdin.readline()
"""


def start(at, marker, action="pass", stderr=subprocess.PIPE) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", START, str(at), str(marker), action],
        cwd=PACKAGE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def wait_for(condition, seconds=60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def test_four_processes_compute_a_value_once_and_three_say_that_they_wait(tmp_path):
    marker, go, said = tmp_path / "marker", tmp_path / "go", tmp_path / "said"
    until = f"while not os.path.exists({str(go)!r}): time.sleep(0.02)"
    with said.open("w") as file:
        four = [start(place(), marker, until, stderr=file) for _ in range(4)]
        waited = "asker: another process is at work on one.json; waiting for it\n"
        wait_for(lambda: said.read_text() == 3 * waited)
        go.touch()
        assert [process.communicate(timeout=120)[0] for process in four] == ["[7]\n"] * 4
    assert len(marker.read_text().split()) == 1 and said.read_text() == 3 * waited


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_one_that_is_killed_midway_frees_the_next(tmp_path):
    marker = tmp_path / "marker"
    first = start(place(), marker, "time.sleep(600)")
    wait_for(marker.exists)
    second = start(place(), marker)
    time.sleep(0.5)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert second.communicate(timeout=120)[0] == "[7]\n"
    assert marker.read_text().split() == [str(first.pid), str(second.pid)]
    assert sorted(p.name for p in place().parent.iterdir()) == ["one.json", "one.json.sums"]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_what_a_process_works_with_is_not_removed_until_it_ends(tmp_path):
    at = place("abc", "suites")
    other = start(at, tmp_path / "marker")
    assert other.stdout.readline() == "made\n"
    assert in_use(at) and not discard(at) and at.is_dir()
    gone, left = clear("suites")
    assert not gone and [entry.place for entry in left] == [at]
    os.kill(other.pid, signal.SIGKILL)
    other.communicate()
    assert not in_use(at)
    assert not list((cache_folder() / ".in_use" / "suites").iterdir())
    gone, left = clear("suites")
    assert [entry.place for entry in gone] == [at] and not left and not at.exists()


def test_what_this_process_works_with_is_in_use_too():
    at = kept_folder(name="mine")
    assert in_use(at) and not discard(at)
    hold.cache_clear()
    assert not in_use(at) and discard(at)


def test_who_comes_while_a_folder_is_removed_keeps_it(monkeypatch):
    """Its mark is there before it looks, so the second look for marks finds it."""
    at = place("abc", "suites")
    at.mkdir(parents=True)
    makes(at)
    seen = iter([False, True])
    monkeypatch.setattr(cache, "in_use", lambda place: next(seen))
    assert not discard(at)
    assert at.is_dir() and (at / "spec.json").is_file()


def test_a_disk_without_locks_costs_only_the_once(monkeypatch):
    def no(self, *args, **options):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", no)
    make = Maker()
    assert kept(make) == kept(make) == [1]
    assert kept_folder() == place("abc", "suites")


# --- the command ---------------------------------------------------------------------------------


def command(*words, **options):
    return CliRunner().invoke(app, ["cache", *words], **options)


def test_the_command_shows_what_there_is():
    fill("a.parquet", size=1500)
    fill("b.parquet", size=2500)
    fill("c", "other things", size=10)
    lines = command().output.splitlines()
    assert lines[0] == f"cache {cache_folder()}, 4.0 kB"
    today = time.strftime("%Y-%m-%d")
    assert re.fullmatch(
        rf"panels +2 +4.0 kB  {today} \d\d:\d\d  answers of models to texts; scored again when "
        "asked for",
        lines[2],
    )
    assert re.match(r"suites +0 +0 B  - ", next(line for line in lines if "suites" in line))
    assert any(re.match(r"other things +1 +10 B ", line) for line in lines)
    assert lines[-1] == (
        "panels and compression are kept to 5.0 GB (WORKBENCH_CACHE_LIMIT, in GB), the longest "
        "unused go first"
    )


def test_the_command_clears_what_is_soon_made_again_and_the_rest_by_name():
    for name, kind in (("a", "panels"), ("b", "compression"), ("c", "suites"), ("d", "gguf")):
        fill(name, kind)
    got = command("clear", "--yes")
    assert got.output == "removed 2 (2.0 kB)\n" and got.exit_code == 0
    assert sorted(names()) == ["c", "d"]
    assert command("clear", "gguf", "--yes").output == "removed 1 (1.0 kB)\n"
    assert command("clear", "gguf", "--yes").output == "cache: there is nothing to remove\n"
    assert command("clear", "all", "--yes").exit_code == 0
    assert names() == []


def test_the_command_asks(monkeypatch):
    fill("a")
    monkeypatch.setattr("workbench.cli._asked", lambda: True)
    got = command("clear", input="n\n")
    assert got.output.endswith("nothing was removed\n") and names() == ["a"]
    assert command("clear", input="y\n").output.endswith("removed 1 (1.0 kB)\n")


def test_the_command_names_what_is_in_use():
    kept_folder(name="used")
    got = command("clear", "all", "--yes")
    assert got.exit_code == 1 and "removed 0 (0 B)" in got.output
    assert "in use, not removed: " in got.output and place("used", "suites").is_dir()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["clear", "models"],
            "cache: no kind 'models'; there are panels, compression, capacity, taught, subsets, "
            "suites, gguf, or all of them: all\n",
        ),
        (["clear"], "cache: would remove 1 of panels (1.0 kB); add --yes\n"),
    ],
)
def test_what_the_command_refuses(words, line, capsys):
    fill("a")
    with pytest.raises(SystemExit) as left:
        main(["cache", *words])
    assert left.value.code == 2 and capsys.readouterr().err == line and names() == ["a"]


def test_the_command_checks_every_byte():
    fill("a")
    at = kept_folder() / "step1" / "weights"
    about = at.stat()
    at.write_bytes(b"\x00" * 4999 + b"\x01")
    os.utime(at, ns=(about.st_atime_ns, about.st_mtime_ns))
    got = command("check")
    assert got.exit_code == 1
    assert "abc is not what was written (its hash differs: step1/weights)\n" in got.output
    assert got.output.endswith("1 of 2 are whole; a damaged one is made again\n")
    shutil.rmtree(cache_folder())
    assert command("check").output == "0 of 0 are whole; a damaged one is made again\n"


def test_sizes_are_said_as_people_say_them():
    assert [readable(n) for n in (0, 999, 1000, 12_345, 3_450_000, 2e10)] == [
        "0 B", "999 B", "1.0 kB", "12 kB", "3.5 MB", "20 GB",
    ]  # fmt: skip


def test_an_entry_knows_its_kind():
    assert Entry(place(), 0, 0.0).kind == "panels" and describe().startswith("cache ")


# --- the real users of it ------------------------------------------------------------------------


def test_a_damaged_run_of_many_is_trained_alone(tiny, monkeypatch):
    from workbench import subsets

    trained = []
    train = subsets._train
    monkeypatch.setattr(subsets, "_train", lambda *args: trained.append(args[2]) or train(*args))
    found = subsets.load_subsets(tiny.suite, runs=4, progress=False)
    assert trained == [["subset-00", "subset-01", "subset-02", "subset-03"]]
    weights = next((found.path / "subset-02").rglob("*.safetensors"))
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.warns(UserWarning) as warned:
        subsets.load_subsets(tiny.suite, runs=4, progress=False)
    assert told(warned) == [
        f"load_subsets: {found.path / 'subset-02'} is not what was written; training again"
    ]
    assert trained[1:] == [["subset-02"]] and weights.read_bytes() == before
    subsets.load_subsets(tiny.suite, runs=4, progress=False)
    assert len(trained) == 2


def test_a_second_notebook_scores_nothing_that_the_first_did(tiny, monkeypatch):
    """Two openings of a suite's run, as two notebooks make them; forward passes are counted."""
    from workbench.models import LanguageModel
    from workbench.probes.extraction import probe_extraction
    from workbench.probes.membership import probe_membership

    passes = []
    score = LanguageModel._score_batch
    monkeypatch.setattr(
        LanguageModel, "_score_batch", lambda *args: passes.append(1) or score(*args)
    )

    def notebook():
        suite = type(tiny.suite)(tiny.suite.path)
        one = probe_extraction(suite.checkpoints(), suite.items(), prefix=8, suffix=8)
        last = suite.checkpoints().at(16)
        return one, probe_membership(last, suite.items())

    first = notebook()
    counted = len(passes)
    second = notebook()
    assert counted > 0 and len(passes) == counted
    for one, two in zip(first, second, strict=True):
        assert one.equals(two) and one.attrs == two.attrs
