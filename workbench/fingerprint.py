"""What a report depends on, as hashes: it is made again only when one of them is another.

A key is made before a kernel starts, for a thousand reports in seconds, so nothing heavy is
imported, each path is looked at once, and hashes of large files are remembered by size and time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from workbench.parameters import RESULTS
from workbench.table import InputError, cache_folder, whole_file

MODELS = ("model", "base", "tuned", "reference", "other", "unrelated")  # parameters that name one
WRITTEN = ("keep",)  # parameters that name what a notebook writes; its own work is no input
PICKLES = (".bin", ".pt", ".pth", ".pkl")  # state of an optimizer and the like; no loader reads it
LARGE = 2**20  # bytes from which on a file's hash is remembered
HUGE = 2**30  # bytes from which on reading is said, as it takes a while
FRESH = 2.0  # seconds; a file changed this recently may change again within one tick of its clock
BLOCK = 2**22  # bytes read at once
HUB_PATIENCE = 5.0  # seconds to wait for the hub's answer
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?$")
_PACKAGE = Path(__file__).resolve().parent


class Hashes:
    """Hashes of files and folders; one object looks at each path once.

    Those of large files stay in the cache folder by path, size and time of the last change, so
    that a model of 10 GB is read once and not before every grid.
    """

    def __init__(self):
        self._place = cache_folder() / "hashes.json"
        self._seen: dict[object, str] = {}
        self._new: dict[str, list] = {}
        self._kept = self._read()

    def path(self, path: Path) -> str:
        """Hash of a file's bytes, or of the names and bytes of all files below a folder.

        Hidden files and pickles are left out of a folder.

        Raises:
            InputError: Something that cannot be read.
        """
        place = os.path.abspath(path)
        if place not in self._seen:
            try:
                self._seen[place] = self._folder(place) if path.is_dir() else self._file(place)
            except OSError as error:
                raise InputError(
                    f"fingerprint: cannot read {error.filename or place} ({error.strerror}); "
                    "make it readable, or give another"
                ) from None
        return self._seen[place]

    def package(self) -> str:
        """Version of the package and hash of its source: an installed checkout may be edited."""
        if "package" not in self._seen:
            whole = hashlib.blake2b(digest_size=16)
            data = [f for d in (_PACKAGE, _PACKAGE.parent) for f in (d / "data").glob("*.jsonl")]
            for file in sorted([*_PACKAGE.rglob("*.py"), *data]):
                place = file.relative_to(_PACKAGE.parent).as_posix()
                whole.update(f"{place} {self._bytes(str(file))}\n".encode())
            self._seen["package"] = f"{_installed('memory-workbench')}+{whole.hexdigest()}"
        return self._seen["package"]

    def suite(self, corpus: str) -> str:
        """Hash of the specification of the suite that is trained on this text.

        Raises:
            InputError: A corpus that cannot be read.
        """
        if ("suite", corpus) not in self._seen:
            from workbench.suite import specification

            self._seen["suite", corpus] = specification(corpus or None).hash
        return self._seen["suite", corpus]

    def hub(self, name: str) -> str:
        """Commit of a hub id: the one kept on this machine, else the newest; empty offline."""
        if ("hub", name) not in self._seen:
            self._seen["hub", name] = _commit(name)
        return self._seen["hub", name]

    def notebook(self, path: Path) -> str:
        """Hash of the cells' kinds and sources; outputs, ids and metadata count for nothing."""
        key = ("notebook", path)
        if key not in self._seen:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            text = json.dumps([[cell["cell_type"], "".join(cell["source"])] for cell in cells])
            self._seen[key] = _hash(text)
        return self._seen[key]

    def save(self) -> None:
        """Remember the hashes of large files; those of files that are gone are dropped."""
        if not self._new:
            return
        kept = {p: known for p, known in (self._read() | self._new).items() if os.path.exists(p)}
        try:
            with whole_file(self._place) as temporary:
                temporary.write_text(json.dumps(kept), encoding="utf-8")
        except OSError:  # a full disk: they are made again next time
            return
        self._new = {}

    def _read(self) -> dict[str, list]:
        try:
            kept = json.loads(self._place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return kept if isinstance(kept, dict) else {}

    def _folder(self, folder: str) -> str:
        lines = []
        for parent, below, files in os.walk(folder, onerror=_raise):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in sorted(files):
                place = os.path.join(parent, name)
                if name.startswith(".") or name.endswith(PICKLES) or not os.path.isfile(place):
                    continue
                lines.append(f"{Path(place).relative_to(folder).as_posix()} {self._file(place)}")
        return _hash("\n".join(sorted(lines)))

    def _file(self, place: str) -> str:
        about = os.stat(place)
        known = [about.st_size, about.st_mtime_ns]
        if about.st_size < LARGE:
            return self._bytes(place)
        if self._kept.get(place, [])[:2] == known:
            return self._kept[place][2]
        if about.st_size >= HUGE:
            print(f"reading {place} ({about.st_size / 2**30:.1f} GB) once", file=sys.stderr)
        found = self._bytes(place)
        if time.time() - about.st_mtime > FRESH:
            self._new[place] = self._kept[place] = [*known, found]
        return found

    def _bytes(self, place: str) -> str:
        whole = hashlib.blake2b(digest_size=16)
        with open(place, "rb") as file:
            while block := file.read(BLOCK):
                whole.update(block)
        return whole.hexdigest()


def _raise(error: OSError):
    raise error


def fingerprint(plan, hashes: Hashes | None = None) -> dict:
    """What a report's numbers depend on.

    Args:
        plan: A notebook with its parameters.
        hashes: Shared by the plans of one grid; None looks at every path anew.

    Returns:
        ``notebook``: hash of its cells' sources. ``parameters``: all values. ``package``: version
        and hash of the source. ``inputs``: for each value that names a file or folder its content
        hash, for "suite" that of the specification, for ``pip:NAME`` the installed version, for
        a hub id the commit.

    Raises:
        InputError: An input that is there and cannot be read.
    """
    mine = hashes or Hashes()
    settled = {name: value for name, value in plan.settled.items() if name != RESULTS}
    inputs = {}
    for name, value in settled.items():
        several = isinstance(value, list)
        for index, text in enumerate(value if several else [value]):
            found = _input(name, text, settled.get("corpus", ""), mine)
            if found:
                inputs[f"{name}[{index}]" if several else name] = found
    if hashes is None:
        mine.save()
    return {
        "notebook": mine.notebook(plan.notebook.path),
        "parameters": settled,
        "package": mine.package(),
        "inputs": inputs,
    }


def key_of(fingerprint: dict) -> str:
    """The fingerprint as one hash, 32 hexadecimal digits; another number means another report."""
    return _hash(json.dumps(fingerprint, sort_keys=True, ensure_ascii=False))


def _input(name: str, text, corpus, hashes: Hashes) -> str:
    if not isinstance(text, str) or not text or name in WRITTEN:
        return ""
    if name in MODELS and text == "suite":
        return hashes.suite(corpus if isinstance(corpus, str) else "")
    if text.startswith("pip:"):
        return _installed(text.removeprefix("pip:"))
    path = _path(text)
    if path:
        return hashes.path(path)
    hub = name in MODELS and _HUB_ID.match(text) and not text.startswith(".")
    return hashes.hub(text) if hub else ""


def _path(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if path.is_dir() or path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # a text too long or too odd for a path is none
        return None


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _commit(name: str) -> str:
    from huggingface_hub import HfApi, constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / "main"
    if folder.is_file():
        return folder.read_text(encoding="utf-8").strip()
    if constants.HF_HUB_OFFLINE:
        return ""
    try:
        # asked now, or the key would be another one once the model has been fetched
        return HfApi().model_info(name, timeout=HUB_PATIENCE).sha or ""
    except Exception:  # the hub's, the network's: the notebook will say what is wrong
        return ""


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
