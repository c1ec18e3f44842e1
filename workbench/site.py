"""The site over a folder of reports: the index, the comparison page and one table of all tables.

Whatever lies in the folder is shown: a report that cannot be read is listed as broken with the
reason, one that a grid planned and that is not there as missing. Nothing here runs a notebook.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workbench import page
from workbench.parameters import PILLARS, RESULTS
from workbench.table import PASSPORT_KEY, VERSION, whole_file

if TYPE_CHECKING:
    import pyarrow as pa

STATUS, KEY, TABLE, TABLE_CSV = "status.json", "key.json", "table.parquet", "table.csv"
PAGE, LOG = "report.html", "log.txt"
INDEX, COMPARE, COMBINED = "index.html", "compare.html", "all.parquet"
PLANS = ".grid"  # a grid writes what it is going to make there
ROWS = 1 << 16  # of a row group of the combined table; what is held in memory at once


def write_site(out: str | Path) -> Path:
    """Write ``index.html``, ``compare.html`` and ``all.parquet`` over all reports in a folder.

    Reports of earlier runs are included. ``compare.html`` is there if a notebook has two reports,
    ``all.parquet`` if a report has a table. It holds the tables of the reports that are ok, one
    after another, behind the columns ``report``, ``notebook`` and each parameter that differs
    between reports of a notebook; a column that a table already has under that name is told
    apart by ``(report)``. :func:`workbench.load` reads it.

    Args:
        out: The folder of reports.

    Returns:
        The path of ``index.html``.

    Raises:
        OSError: The pages cannot be written; those that were there are left as they are.
    """
    out = Path(out).absolute()
    entries, notes = read_entries(out)
    varying = {
        notebook: _varying([entry for entry in entries if entry["notebook"] == notebook])
        for notebook in dict.fromkeys(entry["notebook"] for entry in entries)
    }
    names = list(dict.fromkeys(name for part in varying.values() for name in part))
    combined = _write_combined(out, entries, names)
    thumbnails = {} if page.is_table(entries) else _thumbnails(out, entries)
    several = {
        notebook: part
        for notebook, part in varying.items()
        if notebook and sum(entry["notebook"] == notebook for entry in entries) > 1
    }
    if several:
        _write(out / COMPARE, page.compare_page(entries, several))
    else:
        (out / COMPARE).unlink(missing_ok=True)
    index = page.index_page(
        entries,
        thumbnails,
        varying=names,
        compare=COMPARE if several else "",
        combined=COMBINED if combined else "",
        notes=notes,
    )
    return _write(out / INDEX, index)


def _write(path: Path, text: str) -> Path:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return path


def _folders(out: Path) -> dict[str, dict[str, list]]:
    """By folder the names of the files in it, each with what changes when it does."""
    if not out.is_dir():
        return {}
    found: dict[str, dict[str, list]] = {}
    for folder in os.scandir(out):
        if folder.is_dir():
            with contextlib.suppress(FileNotFoundError):  # swapped for a newer one meanwhile
                found[folder.name] = {
                    file.name: [file.stat().st_size, file.stat().st_mtime_ns]
                    for file in os.scandir(folder)
                    if file.is_file()
                }
    return found


def read_entries(out: Path) -> tuple[list[dict], list[str]]:
    """What the pages show of each report, in the order in which they show it, and notes."""
    folders = _folders(out)
    plans, notes = _plans(out, folders.pop(PLANS, {}))
    reports = {
        name: files
        for name, files in folders.items()
        # a folder with neither is somebody's own; one that is planned and half there is not
        if not name.startswith(".")
        and (STATUS in files or PAGE in files or (name in plans and files))
    }
    entries = [_entry(out / name, files, plans.get(name)) for name, files in reports.items()]
    entries += [_missing(name, plan) for name, plan in plans.items() if name not in reports]
    order = {name: index for index, name in enumerate(PILLARS)}
    entries.sort(key=lambda entry: _place(entry, order))
    return entries, notes


def _plans(out: Path, files: Mapping[str, list]) -> tuple[dict[str, dict], list[str]]:
    """The reports that grids have planned, by name."""
    plans, notes = {}, []
    for file in sorted(file for file in files if file.endswith(".json")):
        try:
            listed = json.loads((out / PLANS / file).read_bytes())
            grid = file.removesuffix(".json")
            plans |= {plan["name"]: {"grid": grid} | plan for plan in listed}
        except (OSError, ValueError, TypeError, KeyError) as error:
            notes.append(
                f"The plan {PLANS}/{file} cannot be read ({_line(error)}): reports it waits for "
                "are not listed as missing."
            )
    return plans, notes


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _place(entry: Mapping, order: Mapping[str, int]) -> tuple:
    """Pillars first, what belongs to no notebook last, and seed-2 before seed-10."""
    name = entry["notebook"]
    return order.get(name, len(order)), not name, name, _natural(entry["name"])


def _natural(name: str) -> list:
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
    ]


_BLANK = {
    "link": "", "script": "", "notebook": "", "title": "", "description": "", "started": "",
    "duration": "", "seconds": None, "given": {}, "parameters": {}, "values": {}, "key": [],
    "error": "", "command": "", "figure": "", "files": [], "grid": "",
}  # fmt: skip
_SHOWN = (  # of a status, as page.for_page gives it
    "title", "description", "status", "started", "duration", "seconds", "given", "parameters",
    "error", "command",
)  # fmt: skip


def _entry(folder: Path, files: Mapping[str, list], plan: Mapping | None) -> dict:
    name = folder.name
    offered = {"notebook": f"{name}.ipynb", "csv": TABLE_CSV, "parquet": TABLE, "log": LOG}
    entry = _BLANK | _planned(plan) | {
        "name": name,
        "link": page.link(name, PAGE) if PAGE in files else "",
        "script": page.link(name, page.FIGURES) if page.FIGURES in files else "",
        "files": [(label, page.link(name, f)) for label, f in offered.items() if f in files],
        "has": files,
    }  # fmt: skip
    file = STATUS
    try:
        if STATUS not in files:
            raise ValueError("it is missing")
        about = page.for_page(json.loads((folder / STATUS).read_bytes()))
        entry |= {part: about[part] for part in _SHOWN}
        entry |= {"notebook": about.get("notebook") or about["name"]}
        entry |= {"grid": about.get("grid", ""), "values": about["values"]}
        if about["status"] not in page.STATUSES:
            raise ValueError(f"it says {about['status']!r}")
        file = KEY
        if KEY in files:
            entry["key"] = page.key_rows(json.loads((folder / KEY).read_bytes()))
        for file in (PAGE, *([TABLE] if KEY in files else [])):
            if file not in files:
                raise ValueError("it is missing")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return entry | _broken(file, _line(error))
    return entry


def _broken(file: str, reason: str) -> dict:
    """What an entry becomes that has lost a file: its numbers are not shown."""
    return {
        "status": "broken",
        "error": f"{file} cannot be used: {reason}",
        "key": [],
        "script": "",
    }


def _missing(name: str, plan: Mapping) -> dict:
    return _BLANK | _planned(plan) | {
        "name": name, "status": "missing", "has": {},
    }  # fmt: skip


def _planned(plan: Mapping | None) -> dict:
    if plan is None:
        return {}
    settled = {n: v for n, v in (plan.get("settled") or {}).items() if n != RESULTS}
    return {
        "notebook": str(plan.get("notebook", "")),
        "grid": plan["grid"],
        "values": settled,
        "given": {n: page.shown(v) for n, v in (plan.get("given") or {}).items()},
        "parameters": {n: page.shown(v) for n, v in settled.items()},
    }


def _varying(entries: Sequence[Mapping]) -> list[str]:
    """The parameters that differ between these reports."""
    seen: dict[str, set[str]] = {}
    for entry in entries:
        for name, text in entry["parameters"].items():
            seen.setdefault(name, set()).add(text)
    return [name for name, texts in seen.items() if len(texts) > 1]


def _thumbnails(out: Path, entries: Sequence[dict]) -> dict[str, dict]:
    thumbnails = {}
    for nth, entry in enumerate(entries):
        if page.THUMBNAIL in entry["has"]:
            with contextlib.suppress(OSError, ValueError):  # a card without its picture is a card
                small = json.loads((out / entry["name"] / page.THUMBNAIL).read_bytes())
                entry["figure"] = f"thumbnail-{nth}"
                thumbnails[entry["figure"]] = small
    return thumbnails


class _Damaged(Exception):
    """A table that began well and cannot be read to its end."""

    def __init__(self, name: str, reason: str):
        super().__init__(reason)
        self.name, self.reason = name, reason


def _write_combined(out: Path, entries: Sequence[dict], names: Sequence[str]) -> bool:
    """Write the table of all tables; a report whose table cannot be read is marked as broken.

    Where neither a table nor a parameter has changed, what is there is left as it is.

    Returns:
        Whether there is any.
    """
    parts = [entry for entry in entries if entry["status"] == "ok" and TABLE in entry["has"]]
    stand = [
        (e["name"], [(n, e["parameters"].get(n)) for n in names], e["has"][TABLE]) for e in parts
    ]
    state = hashlib.blake2b(json.dumps(stand).encode(), digest_size=16).hexdigest()
    earlier = _earlier(out)
    if earlier.get("state") == state:
        broken = earlier["broken"]
    else:
        broken = _combine(out, parts, names, state)
    for entry in parts:
        if entry["name"] in broken:
            entry |= _broken(TABLE, broken[entry["name"]])
    return len(broken) < len(parts)


def _combine(out: Path, parts, names: Sequence[str], state: str) -> dict[str, str]:
    """Write it; why the tables that are not in it cannot be read, by report."""
    import pyarrow as pa

    schemas, broken = {}, {}
    for name in (entry["name"] for entry in parts):
        try:
            with _parquet(out / name / TABLE) as file:
                schemas[name] = file.schema_arrow
        except (OSError, pa.ArrowException) as error:
            broken[name] = _line(error)
    while len(broken) < len(parts):
        whole = [entry for entry in parts if entry["name"] not in broken]
        reports = [entry["name"] for entry in whole]
        note = {"version": VERSION, "reports": reports, "broken": broken, "state": state}
        try:
            with whole_file(out / COMBINED) as temporary:
                _stream(out, whole, schemas, names, note, temporary)
            return broken
        except _Damaged as damaged:  # begun again without it: half a table would pass for one
            broken[damaged.name] = damaged.reason
    (out / COMBINED).unlink(missing_ok=True)
    return broken


def _earlier(out: Path) -> dict:
    """The passport of the combined table that is there, if one is."""
    import pyarrow as pa

    try:
        with _parquet(out / COMBINED) as file:
            return json.loads((file.schema_arrow.metadata or {})[PASSPORT_KEY])
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return {}


def _parquet(path: Path):
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, page_checksum_verification=True)


def _stream(out: Path, parts, schemas, names, note: Mapping, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, pa.DataType] = {}
    for entry in parts:
        for field in schemas[entry["name"]]:
            columns[field.name] = _common(columns.get(field.name), field.type)
    ours: dict[str, pa.DataType] = {}
    values = [e["values"] | {"report": e["name"], "notebook": e["notebook"]} for e in parts]
    for name in ("report", "notebook", *(n for n in names if n not in ("report", "notebook"))):
        ours[name] = _value_type([row.get(name) for row in values])
    titles = {name: f"{name} (report)" if name in columns else name for name in ours}
    schema = pa.schema(
        [*((titles[name], kind) for name, kind in ours.items()), *columns.items()],
        metadata={PASSPORT_KEY: json.dumps(note).encode()},
    )
    held: list[pa.Table] = []
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for entry, row in zip(parts, values, strict=True):
            beside = {titles[n]: _cell(row.get(n), kind) for n, kind in ours.items()}
            for part in _parts(out / entry["name"], schema, beside):
                held.append(part)
                if sum(each.num_rows for each in held) >= ROWS:
                    writer.write_table(pa.concat_tables(held))
                    held = []
        if held:
            writer.write_table(pa.concat_tables(held))


def _parts(folder: Path, schema: pa.Schema, beside: Mapping) -> Iterator[pa.Table]:
    import pyarrow as pa

    try:
        with _parquet(folder / TABLE) as file:
            for batch in file.iter_batches(batch_size=ROWS, use_threads=False):
                yield _fitted(pa.Table.from_batches([batch]), schema, beside)
    except (OSError, pa.ArrowException) as error:
        raise _Damaged(folder.name, _line(error)) from None


def _common(one: pa.DataType | None, two: pa.DataType) -> pa.DataType:
    """A type that holds the values of both; text where nothing else does."""
    import pyarrow as pa

    kinds = {_plain(kind) for kind in (one, two) if kind is not None} - {pa.null()}
    if not kinds:
        return pa.null()
    if len(kinds) == 1:
        return kinds.pop()
    return pa.float64() if kinds == {pa.int64(), pa.float64()} else _text()


def _plain(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_floating(kind):
        return pa.float64()
    return kind if pa.types.is_boolean(kind) or pa.types.is_null(kind) else _text()


def _text() -> pa.DataType:
    import pyarrow as pa

    return pa.dictionary(pa.int32(), pa.string())  # as table.save writes it: a word once


def _value_type(values: Sequence) -> pa.DataType:
    import pyarrow as pa

    by_kind = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    common = pa.null()
    for value in values:
        if value is not None:
            common = _common(common, by_kind.get(type(value), _text()))
    return _text() if pa.types.is_null(common) else common


def _cell(value, kind: pa.DataType):
    import pyarrow as pa

    if value is None or not pa.types.is_dictionary(kind):
        return value
    return page.shown(value)


def _fitted(table: pa.Table, schema: pa.Schema, beside: Mapping) -> pa.Table:
    """These rows with the columns of the schema, in its types."""
    import pyarrow as pa

    columns = []
    for field in schema:
        if field.name in table.column_names:
            column = table.column(field.name).combine_chunks()
            if pa.types.is_dictionary(field.type) and column.type != field.type:
                column = column.cast(pa.string()).dictionary_encode()
            columns.append(column.cast(field.type))
        else:
            # as a dictionary of one word it takes no room
            columns.append(
                pa.repeat(pa.scalar(beside.get(field.name), _bare(field.type)), len(table))
            )
            if pa.types.is_dictionary(field.type):
                columns[-1] = columns[-1].dictionary_encode()
    return pa.table(columns, schema=schema)


def _bare(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind
