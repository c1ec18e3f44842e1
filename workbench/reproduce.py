"""Run a report again and say whether every number agrees.

What runs is the report's own copy of its notebook, with the parameters that were given: a report
that was sent, or whose notebook has changed since, is checked all the same.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shlex
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.engine import run_plans
from workbench.fingerprint import fingerprint, key_of
from workbench.page import INJECTED
from workbench.parameters import FOLDER
from workbench.report import KEY, STATUS, TABLE, make_plans
from workbench.site import write_site
from workbench.table import InputError, coordinates, load

# On one machine a second run gives the same bits. The instructions of another processor sum in
# another order, which moved the suite's log-probabilities, in float32, by 3e-6 of themselves
RTOL = 1e-5
ATOL = 1e-8  # a number below it is the rounding error of what should be zero
SHOWN = 10  # differences that the verdict lists
VARIES = "varies"  # tag of a cell whose output differs from run to run: timings
_DIGITS = 6  # by which coordinates that are floats are matched
ORIGINS = ("versions", "machine", "fingerprint")  # of a status


@dataclass(frozen=True)
class Agreement:
    """How a report and its second run agree.

    Attributes:
        name: The report's name.
        folder: The report's folder.
        numbers: How many numbers were compared.
        differences: A row for each that differs: ``part`` ("status", "key numbers", "table"),
            ``row`` (which), ``column``, ``then`` and ``now`` (as text; "" for what is not there).
        origins: By name what the two were made from, where it is not the same: versions of
            packages, hashes of inputs, machine.
        changed: The notebook that the report was made from, if it has changed since; else "".
        cells: Numbers of the cells that show something else now, beside those tagged ``varies``.
        seconds: How long the second run took.
    """

    name: str
    folder: Path
    numbers: int
    differences: pd.DataFrame
    origins: dict[str, tuple[str, str]]
    changed: str
    cells: list[int]
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether every number of the key numbers and the table agrees, and how the report ended."""
        return self.differences.empty

    @property
    def lines(self) -> list[str]:
        """The verdict, the first differences, and what else is not the same."""
        count = len(self.differences)
        if self.agrees:
            numbers = "no numbers, and it ended alike" if not self.numbers else ""
            found = [f"{self.name}: {numbers or f'all {self.numbers:,} numbers agree'}"]
        else:
            among = _counted(self.numbers, "number")
            found = [f"{self.name}: {_counted(count, 'difference')} among {among}"]
        for d in self.differences.head(SHOWN).itertuples():
            where = ", ".join(part for part in (d.part, d.row, d.column) if part)
            found.append(f"  {where}: was {d.then or 'not there'}, is {d.now or 'not there'}")
        if count > SHOWN:
            found.append(f"  and {count - SHOWN:,} more")
        for name, (then, now) in self.origins.items():
            found.append(f"  made from: {name} was {then or 'not there'}, is {now or 'not there'}")
        if self.changed:
            found.append(f"  {self.changed} has changed since; the report's own copy was run")
        if self.cells:
            found.append(f"  cells that show something else: {', '.join(map(str, self.cells))}")
        return found


def reproduce(
    report: str | Path, *, out: str | Path | None = None, rtol: float = RTOL, atol: float = ATOL
) -> Agreement:
    """Run a report again in a temporary folder and compare every number.

    Texts are scored anew; suites and other trained models are taken from the cache. Paths among
    the parameters are taken from the current folder, as they were. The code in the report's
    notebook runs as it stands there: reproduce only reports whose authors you trust.

    Args:
        report: Folder of a report, or a file in it.
        out: Folder that keeps the second run, as ``<out>/<name>``; none: it is thrown away.
        rtol: Two numbers agree if they differ by at most this share of the larger. 0 with an
            ``atol`` of 0 asks for the same bits, which is what the same machine gives.
        atol: They may differ by this in addition, in the metric's unit. Where processors differ,
            a difference of two numbers that nearly cancel may need 1e-5.

    Returns:
        What agrees and what does not. Whole numbers and texts agree if they are the same; NaN
        agrees with NaN if both carry the same reason.

    Raises:
        InputError: Not a whole report, one that was refused, or one that is refused now.
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not value >= 0:
            raise InputError(f"reproduce: {name} is {value}, needs at least 0")
    then = _read(Path(report))
    name = then.about["name"]
    if out is not None and (Path(out) / name).resolve() == then.folder.resolve():
        raise InputError(
            f"reproduce: the second run would replace {then.folder}; choose another folder"
        )
    with tempfile.TemporaryDirectory(prefix="reproduce-") as temporary:
        source = Path(temporary) / f"{then.about.get('notebook') or name}.ipynb"
        _write_source(then.notebook, source)
        [plan] = make_plans([source], then.about["given"])
        depends = fingerprint(plan)
        plan = replace(plan, name=name, fingerprint=depends, key=key_of(depends))
        with _as_then(then.about):
            [again] = run_plans([plan], out or Path(temporary) / "reports", force=True)
        if again.cause in ("input", "disk"):
            raise InputError(
                f"reproduce: {name} cannot be made again: {again.error} "
                "(paths are taken from the current folder, as they were)"
            )
        now = _read(again.folder)
        if out is not None:
            write_site(out)
    compared = [
        compare(a, b, part=part, rtol=rtol, atol=atol)
        for part, a, b in (("key numbers", then.key, now.key), ("table", then.table, now.table))
    ]
    ended = _ended(then.about), _ended(now.about)
    status = [("status", "", "", *ended)] if ended[0] != ended[1] else []
    return Agreement(
        name=name,
        folder=then.folder,
        numbers=sum(count for count, _ in compared),
        differences=pd.concat([_differences(status), *(f for _, f in compared)], ignore_index=True),
        origins=_origins(then, now),
        changed=_changed_since(then),
        cells=differing_cells(then.notebook, now.notebook),
        seconds=again.seconds,
    )


def compare(
    then: pd.DataFrame, now: pd.DataFrame, *, part: str, rtol: float = RTOL, atol: float = ATOL
) -> tuple[int, pd.DataFrame]:
    """Compare two tables, rows matched by their coordinates, whatever their order.

    Args:
        then: A result table, or the frame of key numbers.
        now: The same from another run.
        part: What to call them.
        rtol, atol: As in :func:`reproduce`.

    Returns:
        How many numbers the rows have that both tables hold, and the differences as
        :class:`Agreement` has them.
    """
    if then.empty or now.empty:
        sizes = tuple(_counted(len(table), "row") if len(table) else "" for table in (then, now))
        return 0, _differences([(part, "", "", *sizes)] if any(sizes) else [])
    names = [n for n in coordinates(then) if n in coordinates(now)]
    beside = [n for n in then.columns if n not in coordinates(then) and n in now.columns]
    found = [
        (part, "", "columns", *((n, "") if n in then.columns else ("", n)))
        for n in then.columns.symmetric_difference(now.columns, sort=False)
    ]
    left, right = (_by_coordinates(table, names) for table in (then, now))
    gone = left.index[~left.index.isin(right.index)]
    new = right.index[~right.index.isin(left.index)]
    found += [(part, _label(names, at), "", "the row", "") for at in gone]
    found += [(part, _label(names, at), "", "", "the row") for at in new]
    both = left.index[left.index.isin(right.index)]
    left, right = left.loc[both], right.loc[both]
    numbers = 0
    for name in beside:
        a, b = left[name], right[name]
        if _is_number(a) and _is_number(b):
            numbers += int((a.notna() | b.notna()).sum())
            same = _close(a, b, rtol=rtol, atol=atol)
        else:
            same = (_text(a) == _text(b)).to_numpy()
        for at in np.flatnonzero(~same):
            pair = _shown(a.iloc[at]), _shown(b.iloc[at])
            found.append((part, _label(names, both[at]), name, *pair))
    return numbers, _differences(found)


def _differences(found: list[tuple[str, str, str, str, str]]) -> pd.DataFrame:
    return pd.DataFrame(found, columns=["part", "row", "column", "then", "now"], dtype="str")


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _by_coordinates(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """The table, indexed by its coordinates as text and by a count where they repeat."""
    keys = {name: _text(table[name]) for name in names}
    frame = pd.DataFrame(keys)
    frame["again"] = frame.groupby(list(keys)).cumcount() if names else range(len(table))
    return table.set_axis(pd.MultiIndex.from_frame(frame))


def _text(column: pd.Series) -> pd.Series:
    if pd.api.types.is_float_dtype(column.dtype):
        return column.map(lambda value: "" if value != value else f"{value:.{_DIGITS}g}")
    return column.astype(object).map(lambda value: "" if pd.isna(value) else str(value))


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column.dtype) or column.isna().all()


def _close(a: pd.Series, b: pd.Series, *, rtol: float, atol: float) -> np.ndarray:
    if all(pd.api.types.is_integer_dtype(c.dtype) for c in (a, b)):
        return (a == b).to_numpy()
    a, b = (c.to_numpy(dtype="float64", na_value=np.nan) for c in (a, b))
    with np.errstate(invalid="ignore"):  # inf - inf
        near = np.abs(a - b) <= atol + rtol * np.maximum(np.abs(a), np.abs(b))
    # an infinite bound would make any number near
    near &= np.isfinite(a) & np.isfinite(b)
    return near | (a == b) | (np.isnan(a) & np.isnan(b))


def _label(names: Iterable[str], label: tuple) -> str:
    *values, again = label
    pairs = [f"{name} {value}" for name, value in zip(names, values, strict=True) if value]
    return ", ".join(pairs + ([f"again {again}"] if again else []))


def _shown(value) -> str:
    if isinstance(value, float | np.floating):
        return "undefined" if value != value else f"{value:.10g}"
    return "no text" if pd.isna(value) or value == "" else str(value)


@contextlib.contextmanager
def _as_then(about: Mapping):
    """The environment of the second run.

    Nothing that was computed for an earlier report may be read, or it would agree with itself; and
    as many threads as then, since how many there are decides in which order is summed.
    """
    chosen = {"WORKBENCH_CACHE_LIMIT": "0"}
    threads = (about.get("machine") or {}).get("threads")
    if isinstance(threads, int) and threads > 0:
        chosen["OMP_NUM_THREADS"] = str(threads)
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class _Made:
    """What a report's folder holds."""

    folder: Path
    about: dict
    notebook: object
    key: pd.DataFrame
    table: pd.DataFrame


def _read(path: Path) -> _Made:
    folder = (path if path.is_dir() else path.parent).absolute()
    about = _about(path, folder)
    if about["status"] == "refused":
        raise InputError(
            f"reproduce: {about['name']} was refused and has no numbers ({about.get('error', '')})"
        )
    return _Made(folder, about, _notebook(folder, about), _key(folder), _table(folder))


def _about(path: Path, folder: Path) -> dict:
    status = folder / STATUS
    if not status.is_file():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{STATUS}")) if path.is_dir() else []
        hint = f"it holds {', '.join(inside)}" if inside else f"it has no {STATUS}"
        raise InputError(
            f"reproduce: {path} is not a report, {hint}; give the folder of one report, "
            "for example reports/memorization_profile"
        )
    try:
        about = json.loads(status.read_text("utf-8"))
        # these become names of files, which must not lead out of the folder
        names = [about["name"], about.get("notebook") or about["name"]]
        whole = all(Path(name).name == name != "" for name in names)
        whole = whole and isinstance(about["given"], dict) and isinstance(about["status"], str)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(f"reproduce: {status} is damaged; make the report again")
    return about


def _notebook(folder: Path, about: Mapping):
    import nbformat

    path = folder / f"{about['name']}.ipynb"
    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError:
        reason = "is missing"
    except Exception:  # nbformat raises many kinds for a file that is not a notebook
        reason = "is damaged"
    command = about.get("command", "")
    raise InputError(f"reproduce: {path} {reason}; make the report again by: {command}")


def _key(folder: Path) -> pd.DataFrame:
    if not (folder / KEY).is_file():
        return pd.DataFrame()
    try:
        return pd.DataFrame(json.loads((folder / KEY).read_text("utf-8")))
    except ValueError:
        raise InputError(f"reproduce: {folder / KEY} is damaged; make the report again") from None


def _table(folder: Path) -> pd.DataFrame:
    return load(folder / TABLE) if (folder / TABLE).is_file() else pd.DataFrame()


def _write_source(notebook, path: Path) -> None:
    """The notebook as it was before it ran: the second run puts the parameters in again."""
    import nbformat

    source = copy.deepcopy(notebook)
    source.cells = _own_cells(source)
    for cell in source.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(source, path)


def _own_cells(notebook) -> list:
    """The cells without the one that holds the values given for a run."""
    return [c for c in notebook.cells if INJECTED not in c.metadata.get("tags", [])]


def _ended(about: Mapping) -> str:
    return f"{about['status']}: {about['error']}" if about.get("error") else about["status"]


def _origins(then: _Made, now: _Made) -> dict[str, tuple[str, str]]:
    """What the two were made from, where it is not the same."""
    parts = [(name, then.about.get(name), now.about.get(name)) for name in ORIGINS]
    parts += [("passport", then.table.attrs.get("passport"), now.table.attrs.get("passport"))]
    # a part that only one has is no difference: it failed before, or is of an older version
    parts = [part for part in parts if part[1] and part[2]]
    left, right = (dict(p for part in parts for p in _flat(part[i], part[0])) for i in (1, 2))
    # how long something took is not what it was made from
    names = [n for n in dict.fromkeys([*left, *right]) if not n.endswith("seconds")]
    return {n: (left.get(n, ""), right.get(n, "")) for n in names if left.get(n) != right.get(n)}


def _flat(value, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        parts = (_flat(part, f"{name} {key}".strip()) for key, part in value.items())
        return [pair for part in parts for pair in part]
    return [(name, value if isinstance(value, str) else json.dumps(value))]


def _changed_since(made: _Made) -> str:
    """The notebook that the report was made from, if it is there and says something else now."""
    words = shlex.split(made.about.get("command", ""))[2:3]
    if not words:
        return ""
    path = Path(words[0]) if words[0].endswith(".ipynb") else FOLDER / f"{words[0]}.ipynb"
    try:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return "" if sources == [c.source for c in _own_cells(made.notebook)] else str(path)


def differing_cells(then, now) -> list[int]:
    """Cells of two executed notebooks that are not the same, unless they are tagged ``varies``.

    Returns:
        Their numbers, counted from 1 over code and text alike.
    """
    pairs = zip_longest(then.cells, now.cells)
    return [
        number
        for number, (a, b) in enumerate(pairs, start=1)
        if a != b and not (a and b and VARIES in a.metadata.get("tags", []))
    ]
