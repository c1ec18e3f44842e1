"""Reports and runs on disk side by side: their key numbers, and the curves in their tables."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd

from workbench import plots
from workbench.explore.shell import Explorer, View, Work
from workbench.plots.reports import MOST
from workbench.site import COMBINED, TABLE, read_entries
from workbench.table import BESIDE_VALUE, COLUMNS, METRICS, InputError, load

ALL = "all"
STEM = ".parquet"
TABLE_ONLY = "a table"  # what stands in the place of a notebook, where there is none
POINTS = 500  # of a line; more are not to be told apart on a screen
LINES = 8  # of the curves; then colours and markers repeat
REPORTS = 40  # side by side in the figure of the key numbers
SAID = 20  # reports named one by one below the figures
TITLE_NUMBERS, TITLE_CURVES = "Key numbers", "{}, by report"


def explore_runs(folder: str | Path = "reports") -> Explorer:
    """Choose reports in a folder and lay their key numbers and curves over one another.

    Reports stand there as ``workbench report`` and ``workbench grid`` leave them; tables that
    ``save`` wrote, as a recorder leaves them, have curves and no key numbers. What is broken,
    failed or missing is named with its reason and left out.

    Args:
        folder: Of the reports and tables; read again when ``read again`` is pressed.
    """
    wide = {"width": "max-content"}
    told = {"description_width": "initial"}
    controls = {
        "find": widgets.Text(
            description="find", placeholder="seed=1 ok", continuous_update=False,
            tooltip="Words that a report's name, notebook, parameters or status must hold",
        ),
        "notebook": widgets.Dropdown(
            description="notebook", options=[ALL], value=ALL, tooltip="Reports of which notebook"
        ),
        "reports": widgets.SelectMultiple(
            description="reports", rows=4, layout={"width": "28em"},
            tooltip="Which of them, several with Shift or Ctrl; none marked means all",
        ),
        "number": widgets.Dropdown(
            description="number", options=[ALL], value=ALL, tooltip="Which key number; all at once"
        ),
        "metric": widgets.Dropdown(description="curve of", tooltip="Which metric of the tables"),
        "x": widgets.Dropdown(description="over", tooltip="Along which coordinate"),
        "lines": widgets.Text(
            description="lines with", placeholder="group=seen", continuous_update=False,
            tooltip="Words that the name of a line must hold", style=told,
        ),
        "log": widgets.Checkbox(
            description="logarithmic", indent=False, layout=wide,
            tooltip="The curves over a logarithmic axis",
        ),
        "again": widgets.ToggleButton(
            description="read again", tooltip="Look at the folder again", layout=wide
        ),
    }  # fmt: skip
    shelf = _Shelf(Path(folder))

    def draw(values: dict, work: Work) -> View:
        shelf.look(values["again"], work)
        _offer(controls["notebook"], [ALL, *shelf.notebooks])
        _offer(controls["reports"], shelf.options)
        work.step("reading the tables", 0.1)
        chosen = shelf.choose(values["find"], values["notebook"], values["reports"])
        usable = shelf.readable(chosen, work)
        # those that most reports have come first; Counter and sorted keep the order of the reports
        counts = Counter(row["label"] for entry in usable for row in entry["key"])
        labels = sorted(counts, key=lambda label: -counts[label])
        _offer(controls["number"], [ALL, *labels])
        metrics = shelf.axes(usable)
        _offer(controls["metric"], [(METRICS[name].label, name) for name in metrics])
        metric = controls["metric"].value
        _offer(controls["x"], metrics.get(metric, []))
        work.step("drawing", 0.9)
        return _view(shelf, chosen, usable, labels, work, values)

    return Explorer("Reports and runs", controls, draw, figures=("numbers", "curves"), least="60em")


def report_numbers(
    folder: str | Path, reports: Sequence[str], *, labels: Sequence[str] = ()
) -> pd.DataFrame:
    """The key numbers of some reports, a row each, for :func:`plot_key_numbers`.

    Args:
        reports: Names; in their order.
        labels: Of the numbers; empty takes all.

    Raises:
        InputError: A report that is not there or cannot be read.
    """
    entries = {entry["name"]: entry for entry in _entries(Path(folder))[0]}
    for name in reports:
        if name not in entries:
            raise InputError(f"report_numbers: no report {name!r} in {folder}")
        if entries[name]["status"] != "ok":
            raise InputError(f"report_numbers: {_why(entries[name])}")
    return _numbers([entries[name] for name in reports], labels)


def report_curves(
    folder: str | Path,
    reports: Sequence[str],
    *,
    metric: str,
    x: str,
    lines: str = "",
    most: int = LINES,
) -> pd.DataFrame:
    """Pooled rows of one metric from the tables of some reports, for ``plot_curve``.

    Args:
        reports: Names of reports, or of tables without their ending.
        metric: A key of :data:`METRICS`.
        x: The coordinate along which they run.
        lines: Words, each of which the name of a line must hold.
        most: Lines that are kept, the first of each report in turn.

    Returns:
        Table rows with the column ``line``: the report and what else tells its lines apart. Numbers
        that follow from ``x`` and the rest are left out. Of longer lines 500 points are kept, evenly
        by rank along ``x``. ``.attrs`` has ``left_out``, a number of lines, and ``points``, how many
        there were before.

    Raises:
        InputError: A table that cannot be read.
    """
    tables = {name: load(_table_path(Path(folder), name)) for name in reports}
    return _curves(tables, metric, x, lines, most)


def _entries(folder: Path) -> tuple[list[dict], list[str]]:
    """Reports, then tables without one, and notes."""
    if not folder.is_dir():
        raise InputError(f"explore_runs: no folder {folder}; give one that holds reports")
    entries, notes = read_entries(folder)
    known = {entry["name"] for entry in entries}
    found = [path.parent.name for path in sorted(folder.glob(f"*/{TABLE}"))]
    loose = (path for path in sorted(folder.glob(f"*{STEM}")) if path.name != COMBINED)
    found += [path.name.removesuffix(STEM) for path in loose]
    entries += [
        {"name": name, "notebook": TABLE_ONLY, "status": "ok", "error": "", "key": [],
         "parameters": {}, "title": ""}
        for name in dict.fromkeys(found)
        if name not in known and not name.startswith(".")
    ]  # fmt: skip
    return entries, notes


def _table_path(folder: Path, name: str) -> Path:
    loose = folder / f"{name}{STEM}"
    return loose if loose.is_file() else folder / name / TABLE


def _why(entry: dict) -> str:
    return f"{entry['name']} is {entry['status']}{': ' if entry['error'] else ''}{entry['error']}"


class _Shelf:
    """What the folder held when it was last looked at; a table is read once, until it changes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: list[dict] = []
        self.notes: list[str] = []
        self._looked: bool | None = None
        self._tables: dict[str, tuple[tuple, pd.DataFrame | str]] = {}
        self._axes: dict[str, tuple[pd.DataFrame, dict[str, list[str]]]] = {}
        self._last: tuple[tuple, dict, pd.DataFrame] | None = None

    @property
    def notebooks(self) -> list[str]:
        return list(dict.fromkeys(entry["notebook"] for entry in self.entries if entry["notebook"]))

    @property
    def options(self) -> list[tuple[str, str]]:
        return [(f"{e['name']} ({e['status']})", e["name"]) for e in self.entries]

    def look(self, again: bool, work: Work) -> None:
        """Read what is in the folder, the first time and when asked again."""
        if again is self._looked:
            return
        work.step("looking at the folder", 0.0)
        entries, notes = _entries(self.folder)
        if not entries:
            raise InputError(
                f"explore_runs: {self.folder} holds no reports; make one with workbench report, "
                "or give another folder"
            )
        self.entries, self.notes, self._looked = entries, notes, again

    def choose(self, find: str, notebook: str, names: Sequence[str]) -> list[dict]:
        """The entries that are asked for."""
        words = find.lower().split()
        chosen = [
            entry
            for entry in self.entries
            if notebook in (ALL, entry["notebook"])
            and (not names or entry["name"] in names)
            and all(word in _words(entry) for word in words)
        ]
        if not chosen:
            raise InputError(
                f"explore_runs: none of {len(self.entries)} reports fits; the last figure is kept, "
                "ask for less in find, notebook or reports"
            )
        return chosen

    def readable(self, chosen: Sequence[dict], work: Work) -> list[dict]:
        """Those that can be drawn; of the others the reason is set."""
        usable = []
        for at, entry in enumerate(chosen):
            if entry["status"] == "ok":
                work.step(f"table {at + 1} of {len(chosen)}", 0.1 + 0.7 * at / len(chosen))
                table = self._read(entry["name"])
                if isinstance(table, str):
                    entry |= {"status": "broken", "error": table}
            if entry["status"] == "ok":
                usable.append(entry)
        if not usable:
            reasons = "; ".join(map(_why, chosen[:3]))
            raise InputError(
                f"explore_runs: none of the {len(chosen)} reports asked for can be shown ({reasons})"
            )
        return usable

    def _read(self, name: str) -> pd.DataFrame | str | None:
        """The pooled rows, why there are none, or None for a report without a table."""
        path = _table_path(self.folder, name)
        known = self._tables.pop(name, None)
        try:
            stat = path.stat()
        except OSError:
            return "its table is gone; read again" if known else None
        state = (stat.st_size, stat.st_mtime_ns)
        if known is None or known[0] != state:
            try:
                table = load(path)
                known = state, table[table["item"] == ALL]
            except (OSError, ValueError) as error:  # also of a file that goes just now
                known = state, str(error)
        self._tables[name] = known
        return known[1]

    def tables(self, usable: Sequence[dict]) -> dict[str, pd.DataFrame]:
        """Pooled rows by report."""
        held = {entry["name"]: self._tables.get(entry["name"]) for entry in usable}
        return {name: found[1] for name, found in held.items() if found is not None}

    def curves(
        self, tables: dict[str, pd.DataFrame], metric: str, x: str, lines: str
    ) -> pd.DataFrame:
        """What :func:`report_curves` gives; the last ones are kept."""
        asked = (metric, x, lines, tuple(tables))
        if self._last is not None:
            known, of, curves = self._last
            if known == asked and all(of[name] is table for name, table in tables.items()):
                return curves
        curves = _curves(tables, metric, x, lines, LINES)
        self._last = asked, tables, curves
        return curves

    def axes(self, usable: Sequence[dict]) -> dict[str, list[str]]:
        """By metric the coordinates along which it runs in one of the tables, where there are any."""
        found: dict[str, dict] = {}
        tables = self.tables(usable)
        kept = {name: known for name, known in self._axes.items() if name in tables}
        for name, table in tables.items():
            if name not in kept or kept[name][0] is not table:
                kept[name] = table, _table_axes(table)
            for metric, runs in kept[name][1].items():
                found.setdefault(metric, {}).update(dict.fromkeys(runs))
        self._axes = kept
        return {metric: list(names) for metric, names in found.items()}


def _table_axes(table: pd.DataFrame) -> dict[str, list[str]]:
    names = _numeric(table)
    counts = table.groupby("metric", observed=True)[names].nunique()
    runs = {
        str(metric): [name for name in names if row[name] > 1] for metric, row in counts.iterrows()
    }
    return {metric: along for metric, along in runs.items() if along}


def _words(entry: dict) -> str:
    given = (f"{name}={value}" for name, value in entry["parameters"].items())
    parts = (entry["name"], entry["notebook"], entry["status"], entry["title"], *given)
    return " ".join(map(str, parts)).lower()


def _offer(control: widgets.Widget, options: list) -> None:
    """Give a control the options that the data have; what was chosen stays where it can."""
    if list(control.options) == list(options):
        return
    before = control.value
    values = [each[1] if isinstance(each, tuple) else each for each in options]
    control.options = options
    if isinstance(control, widgets.SelectMultiple):
        control.value = tuple(name for name in before if name in values)
    elif values:
        control.value = before if before in values else values[0]


def _numeric(table: pd.DataFrame) -> list[str]:
    return [
        name
        for name in table.columns
        if name not in (*BESIDE_VALUE, "n") and pd.api.types.is_numeric_dtype(table[name])
    ]


def _numbers(entries: Sequence[dict], labels: Sequence[str] = ()) -> pd.DataFrame:
    columns = ["report", "label", "value", "lo", "hi", "n", "unit", "metric", "reason"]
    told = []
    for entry in entries:
        for row in entry["key"]:
            if labels and row["label"] not in labels:
                continue
            value, lo, hi = row["numbers"][:3]
            beside = [row[name] for name in ("n", "unit", "metric", "reason")]
            told.append([entry["name"], row["label"], value, lo, hi, *beside])
    frame = pd.DataFrame(told, columns=columns)
    return frame.astype({"value": float, "lo": float, "hi": float})


def _curves(
    tables: dict[str, pd.DataFrame], metric: str, x: str, lines: str, most: int
) -> pd.DataFrame:
    parts = []
    for name, table in tables.items():
        if x not in table.columns:
            continue
        here = (table["item"] == ALL) & (table["metric"] == metric) & table[x].notna()
        if here.any():
            part = table[here]
            used = [c for c in part.columns if c in COLUMNS or part[c].notna().any()]
            parts.append(part[used].assign(report=name))
    if not parts:
        raise InputError(f"report_curves: no pooled rows of {metric} over {x} in the tables given")
    rows = pd.concat(parts, ignore_index=True)
    told = ["report", *_telling(rows, x)]
    # a name for each line, and not for each of a million points
    codes = rows.groupby(told, sort=False, dropna=False, observed=True).ngroup().to_numpy()
    _, first = np.unique(codes, return_index=True)
    names = [_name(row) for _, row in rows.loc[first, told].iterrows()]
    rows["line"] = np.array(names, dtype=object)[codes]
    kept = [
        line
        for line in rows["line"].unique()
        if all(word in line.lower() for word in lines.lower().split())
    ]
    if not kept:
        raise InputError(
            f"report_curves: no line of {metric} over {x} holds {lines!r}; there are "
            f"{'; '.join(rows['line'].unique()[:5])}"
        )
    found = rows[rows["line"].isin(_in_turn(rows, kept)[:most])]
    found, points = _thinned(found, x), len(found)
    found.attrs |= {"left_out": max(0, len(kept) - most), "points": points}
    return found


def _name(row: pd.Series) -> str:
    """What a line is called: its report, and the coordinates that tell it apart."""
    # a count that is missing elsewhere is a float here, and must keep all its digits
    values = {
        name: f"{each:.12g}" if isinstance(each, float) else str(each)
        for name, each in row.iloc[1:].items()
        if pd.notna(each)
    }
    return ", ".join([str(row.iloc[0]), *(f"{name}={each}" for name, each in values.items())])


def _thinned(rows: pd.DataFrame, x: str) -> pd.DataFrame:
    """At most ``POINTS`` of each line, evenly by rank along ``x``, with the first and the last."""
    place = rows.groupby("line", sort=False)[x].rank(method="first").to_numpy() - 1
    size = rows.groupby("line", sort=False)[x].transform("size").to_numpy()
    # of every stretch of size / POINTS ranks the one that begins it
    stretch = np.floor(place * (POINTS - 1) / np.maximum(size - 1, 1))
    before = np.floor((place - 1) * (POINTS - 1) / np.maximum(size - 1, 1))
    return rows[(size <= POINTS) | (place == 0) | (stretch > before)].reset_index(drop=True)


def _telling(rows: pd.DataFrame, x: str) -> list[str]:
    """The coordinates that tell a report's lines apart."""
    aside = (*BESIDE_VALUE, "n", "item", "metric", "report", x)
    varying = [
        name
        for name in rows.columns
        if name not in aside and rows[name].nunique(dropna=False) > 1
    ]  # fmt: skip
    numbers = [name for name in varying if pd.api.types.is_numeric_dtype(rows[name])]
    for name in numbers:  # such as the step beside the lag: it would make each point a line
        rest = [other for other in varying if other != name]
        if not rows.duplicated(["report", x, *rest]).any():
            varying = rest
    return varying


def _in_turn(rows: pd.DataFrame, kept: Sequence[str]) -> list[str]:
    """Lines with every report's first one first, so that none is crowded out."""
    told = rows[rows["line"].isin(kept)].drop_duplicates("line")
    place = told.groupby("report", sort=False).cumcount()
    return told.assign(place=place).sort_values("place", kind="stable")["line"].tolist()


def _view(
    shelf: _Shelf, chosen: Sequence[dict], usable: Sequence[dict], labels, work: Work, values: dict
) -> View:
    figures, code, notes = {}, [], list(shelf.notes)
    folder = str(shelf.folder)
    number = values["number"] if values["number"] in labels else ALL
    if labels:
        shown = labels[:MOST] if number == ALL else [number]
        with_any = [e for e in usable if any(row["label"] in shown for row in e["key"])]
        names = [entry["name"] for entry in with_any[:REPORTS]]
        numbers = _numbers(with_any[:REPORTS], shown)
        figures["numbers"] = plots.plot_key_numbers(numbers, title=TITLE_NUMBERS)
        code.append(
            f"numbers = report_numbers(\n    {folder!r},\n    {names!r},\n    labels={shown!r},\n)\n"
            f'figures["numbers"] = plot_key_numbers(numbers, title={TITLE_NUMBERS!r})'
        )
        if len(labels) > len(shown) and number == ALL:
            notes.append(f"{len(labels) - len(shown)} key numbers are not drawn; choose one.")
        if len(with_any) > REPORTS:
            notes.append(f"Key numbers of {len(with_any) - REPORTS} reports are not drawn.")
        undefined = numbers[numbers["value"].isna()]
        for row in undefined.head(SAID).itertuples():
            notes.append(f"{row.report}: {row.label} is undefined ({row.reason}).")
    metrics = shelf.axes(usable)
    if metrics:
        metric = values["metric"] if values["metric"] in metrics else next(iter(metrics))
        x = values["x"] if values["x"] in metrics[metric] else metrics[metric][0]
        tables = shelf.tables(usable)
        curves = shelf.curves(tables, metric, x, values["lines"])
        work.step("drawing", 0.95)
        title = TITLE_CURVES.format(METRICS[metric].label)
        log_x = values["log"]
        figures["curves"] = plots.plot_curve(curves, x=x, color="line", title=title, log_x=log_x)
        with_rows = set(curves["report"])
        names = [name for name in tables if name in with_rows]
        code.append(
            f"curves = report_curves(\n    {folder!r},\n    {names!r},\n    metric={metric!r}, "
            f"x={x!r}, lines={values['lines']!r},\n)\n"
            f'figures["curves"] = plot_curve(curves, x={x!r}, color="line", title={title!r}, log_x={log_x})'
        )
        if curves.attrs["left_out"]:
            notes.append(
                f"{curves.attrs['left_out']} lines are not drawn; name some in 'lines with'."
            )
        if len(curves) < curves.attrs["points"]:
            notes.append(
                f"{len(curves):,} of {curves.attrs['points']:,} points are drawn, evenly along each line."
            )
        if log_x and (curves[x] <= 0).any():
            notes.append("What lies at 0 or below has no place on a logarithmic axis.")
        without = [entry["name"] for entry in usable if entry["name"] not in with_rows]
        if without:
            notes.append(f"No such curve in {_some(without)}.")
    if not figures:
        raise InputError("explore_runs: these reports have neither key numbers nor curves")
    head = (
        "from workbench import plot_curve, plot_key_numbers, report_curves, report_numbers\n\n"
        "figures = {}\n"
    )
    words = _status_words(chosen, usable, notes)
    return View(figures, words, head + "\n".join(code) + "\n")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SAID} more" if len(names) > SAID else ""
    return f"{', '.join(names[:SAID])}{more}"


def _status_words(chosen: Sequence[dict], usable: Sequence[dict], notes: Sequence[str]) -> str:
    lines = [f"{len(usable)} of the {len(chosen)} reports asked for can be shown."]
    bad = [entry for entry in chosen if entry["status"] != "ok"]
    lines += [f"✗ {_why(entry)}" for entry in bad[:SAID]]
    if len(bad) > SAID:
        lines.append(f"{len(bad) - SAID} more cannot be shown.")
    return "".join(f"<p>{html.escape(line)}</p>" for line in [*lines, *notes])
