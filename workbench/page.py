"""Executed notebooks to pages: one self-contained HTML file each, and the index over them.

A page asks no other host for anything, and a security policy in its head says so to the browser:
only the scripts whose hashes it lists run, so a text that holds a script stays a text. nbconvert
drops plotly figures silently; here they travel as JSON and one script draws them.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from workbench.table import METRICS, Metric

TEMPLATES = Path(__file__).resolve().parent / "templates"
PLOTLY = "application/vnd.plotly.v1+json"
THUMBNAIL = "thumbnail.json"
FIGURES = "figures.js"
NUMBERS = ("value", "lo", "hi", "floor_lo", "floor_hi")  # of a key number
COMPARED = ("label", "value", "interval", "unit", "n", "reason", "numbers")  # of a key number
STATUSES = ("ok", "failed", "refused", "broken", "missing")
KEY_COLUMNS = 40  # key numbers in the index; labels that hold a value would make one a report
THUMBNAIL_POINTS = 120  # a line of 340 px shows no more
INJECTED = "injected-parameters"  # papermill's tag for the cell it puts in
# markers that Markdown leaves alone, from Unicode's private use area
_OPEN, _CLOSE = "\ue000", "\ue001"
_MATH = re.compile(
    r"(?P<fence>^(```|~~~).*?^\2[^\n]*$)"
    r"|(?P<code>(?P<ticks>`+).+?(?<!`)(?P=ticks)(?!`))"
    r"|(?P<escaped>\\\$)"
    r"|\$\$(?P<block>.+?)\$\$"
    # as in JupyterLab, no blank inside the dollars, so that "$5 and $6" is money
    r"|\$(?P<inline>(?!\s)[^$`\n]+?(?<!\s))\$(?!\d)",
    re.DOTALL | re.MULTILINE,
)


def report_page(notebook, about: Mapping, *, key, measures, parameters, passport, downloads) -> str:
    """The HTML of one report.

    Args:
        notebook: The executed notebook; it is not changed.
        about: What ``status.json`` holds: title, status, started, duration, given, command, error.
        key: Rows of the key numbers, as :func:`key_rows` makes them.
        measures: What they measure, as :func:`measure_rows` says it.
        parameters: Rows with name, value, help and whether it was given.
        passport: Pairs of name and value.
        downloads: Names of files beside the page.
    """
    notebook = copy.deepcopy(notebook)
    _drop_title(notebook)
    figures = _take_figures(notebook)
    formulas = _take_formulas(notebook)
    cells = _put_formulas(_cells(notebook), formulas)
    return _render(
        "report.html.j2",
        figures,
        _script("report.js"),
        {
            "style": _style() + _highlight_style(),
            "cells": cells,
            "about": about,
            "reproduce": shlex.join(["workbench", "reproduce", about["name"]]),
            "failed_cell": 'id="failure"' in cells,
            "key": key,
            "measures": measures,
            "parameters": parameters,
            "passport": passport,
            "downloads": downloads,
        },
    )


def index_page(
    entries: Sequence[Mapping],
    thumbnails: Mapping[str, Mapping],
    *,
    varying: Sequence[str] = (),
    compare: str = "",
    combined: str = "",
    notes: Sequence[str] = (),
) -> str:
    """The HTML of the list of reports: cards where each is of another notebook, else a table.

    Args:
        entries: One per report, as ``site`` makes them; ``figure`` is a key of ``thumbnails`` or
            empty.
        thumbnails: Figures as :func:`thumbnail` makes them.
        varying: Names of the parameters that differ between reports of one notebook.
        compare: Address of the comparison page, or empty.
        combined: Address of the table of all tables, or empty.
        notes: What the reader has to know about the whole folder.
    """
    notebooks = dict.fromkeys(entry["notebook"] for entry in entries)
    table = is_table(entries)
    labels = Counter(row["label"] for entry in entries for row in entry["key"])
    first_seen = {label: nth for nth, label in enumerate(labels)}
    kept = sorted(labels, key=lambda label: (-labels[label], first_seen[label]))[:KEY_COLUMNS]
    grids = dict.fromkeys(entry["grid"] for entry in entries)
    counts = Counter(entry["status"] for entry in entries)
    fields = {
        "style": _style(),
        "entries": [
            {**entry, "by_label": {row["label"]: row for row in entry["key"]}} for entry in entries
        ],
        "table": table,
        "columns": _columns(varying, sorted(kept, key=first_seen.get), notebooks, grids),
        "left_out": len(labels) - len(kept) if table else 0,
        "counts": {name: counts[name] for name in STATUSES[1:] if counts[name]},
        "compare": compare,
        "combined": combined,
        "notes": notes,
    }
    return _render("index.html.j2", {} if table else thumbnails, _script("index.js"), fields)


def is_table(entries: Sequence[Mapping]) -> bool:
    """Whether the index is a table: several reports of one notebook are read side by side."""
    return len({entry["notebook"] for entry in entries}) < len(entries)


def _columns(varying, labels, notebooks, grids) -> list[dict]:
    """The columns of the index, left to right; ``filter`` says which offer their values."""
    columns = [{"kind": "name", "name": "report", "filter": False}]
    if len(notebooks) > 1:
        columns.append({"kind": "notebook", "name": "notebook", "filter": True})
    columns.append({"kind": "status", "name": "status", "filter": True})
    if len(grids) > 1:
        columns.append({"kind": "grid", "name": "grid", "filter": True})
    columns += [{"kind": "parameter", "name": name, "filter": True} for name in varying]
    columns.append({"kind": "seconds", "name": "duration", "filter": False})
    columns.append({"kind": "files", "name": "files", "filter": False})
    columns += [{"kind": "key", "name": label, "filter": False} for label in labels]
    columns.append({"kind": "started", "name": "started", "filter": False})
    return columns


def compare_page(entries: Sequence[Mapping], varying: Mapping[str, Sequence[str]]) -> str:
    """The HTML of the comparison page; it loads the figures of the reports that are looked at.

    Args:
        entries: As for :func:`index_page`; ``script`` is the address of ``figures.js`` or empty.
        varying: By notebook the names of the parameters that differ between its reports.
    """
    reports = [
        {
            **{name: entry[name] for name in ("name", "link", "script", "notebook", "status")},
            "error": entry["error"],
            "values": {
                name: entry["parameters"][name]
                for name in varying[entry["notebook"]]
                if name in entry["parameters"]
            },
            "key": [{name: row[name] for name in COMPARED} for row in entry["key"]],
        }
        for entry in entries
        if entry["notebook"] in varying
    ]
    titles = {entry["notebook"]: entry["title"] for entry in entries if entry["title"]}
    notebooks = {
        name: {"title": titles.get(name, name), "varying": list(names)}
        for name, names in varying.items()
    }
    data = {"notebooks": notebooks, "reports": reports}
    return _render("compare.html.j2", data, _script("compare.js"), {"style": _style()}, loads=True)


def _script(name: str) -> str:
    """One of our scripts, after what several of them share."""
    return "".join((TEMPLATES / part).read_text(encoding="utf-8") for part in ("shared.js", name))


def _render(
    template: str, data: Mapping, script: str, fields: Mapping[str, object], *, loads: bool = False
) -> str:
    """A page with its data as JSON, and plotly.js where there is anything to draw.

    Args:
        data: Figures by the id of their element, or what else the script reads.
        loads: Whether the page may load scripts that lie beside it.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    plotly = ""
    if data:
        from plotly.offline import get_plotlyjs

        plotly = get_plotlyjs()
    return environment.get_template(template).render(
        {
            **fields,
            "data": _script_json(data),
            "plotly": plotly,
            "script": script,
            "policy": _policy(plotly, script, loads=loads),
        }
    )


def _policy(*scripts: str, loads: bool = False) -> str:
    """A Content-Security-Policy under which these scripts run and nothing else does or loads.

    With ``loads`` scripts from the page's own place run too: of a page in a folder, other files.
    """
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in scripts
    ]
    own = " 'self'" if loads else ""
    # plotly's WebGL traces compile their shaders' glue by Function(), hence unsafe-eval
    return (
        f"default-src 'none'; script-src 'unsafe-eval' {' '.join(hashes)}{own}; "
        "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; media-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _script_json(value) -> str:
    """JSON that can stand inside a script element: no ``</script>`` can appear in it."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def finite(value):
    """The same nested value with NaN and Inf as None, which JSON can hold."""
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _style() -> str:
    return (TEMPLATES / "style.css").read_text(encoding="utf-8")


def _highlight_style() -> str:
    from pygments.formatters import HtmlFormatter

    return HtmlFormatter(style="default", nobackground=True).get_style_defs(".highlight")


def _cells(notebook) -> str:
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name="cells", extra_template_basedirs=[str(TEMPLATES)], embed_images=False
    )
    return exporter.from_notebook_node(notebook)[0]


def _drop_title(notebook) -> None:
    """The page's header shows the title, so the first heading would be there twice."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\A\s*#+\s[^\n]*\n?", "", cell.source)
            return


def outputs(notebook):
    """All outputs of a notebook, in order."""
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def _take_figures(notebook) -> dict[str, dict]:
    """Put an empty element in place of each plotly figure; the figures by that element's id."""
    figures: dict[str, dict] = {}
    for output in outputs(notebook):
        if PLOTLY in output.get("data", {}):
            name = f"figure-{len(figures) + 1}"
            figures[name] = output["data"][PLOTLY]
            output["data"] = {"text/html": f'<div class="figure" id="{name}"></div>'}
    return figures


def _take_formulas(notebook) -> list[str]:
    """Put a marker in place of each formula; MathML, which browsers draw without a script."""
    formulas: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _mark_formulas(cell.source, formulas)
    for output in outputs(notebook):
        if "text/markdown" in output.get("data", {}):
            marked = _mark_formulas(output["data"]["text/markdown"], formulas)
            output["data"]["text/markdown"] = marked
    return formulas


def _mark_formulas(markdown: str, formulas: list[str]) -> str:
    def mark(match: re.Match) -> str:
        latex = match["block"] or match["inline"]
        if latex is None:
            return match[0]
        formulas.append(_mathml(latex, "block" if match["block"] else "inline"))
        return f"{_OPEN}{len(formulas) - 1}{_CLOSE}"

    return _MATH.sub(mark, markdown)


def _mathml(latex: str, display: str) -> str:
    from html import escape

    from latex2mathml.converter import convert

    try:
        return convert(latex.strip(), display=display)
    except Exception:  # its parser raises many kinds; the source is better than no report
        return f"<code>{escape(latex)}</code>"


def _put_formulas(html: str, formulas: Sequence[str]) -> str:
    marker = f"{_OPEN}(\\d+){_CLOSE}"
    # a heading's text is also its anchor's name, where a formula would break the tag
    html = re.sub(r'(?<=[ ])(id|href)="[^"]*"', lambda m: re.sub(marker, "", m[0]), html)
    return re.sub(marker, lambda m: formulas[int(m[1])] if int(m[1]) < len(formulas) else "", html)


def key_rows(key: Sequence[Mapping]) -> list[dict]:
    """Key numbers as text for a page: value, interval and n, or why a value is undefined."""
    return [
        {
            "label": row["label"],
            "value": number(row["value"]),
            "interval": interval(row["lo"], row["hi"]),
            "unit": row["unit"],
            "n": f"{row['n']:,}",
            "floor": floor(row),
            "metric": row["metric"],
            "where": f"{row['run']}, step {row['step']:,}" if "run" in row else "",
            "reason": row["reason"] if row["value"] is None else "",
            "numbers": [row.get(name) for name in NUMBERS],
        }
        for row in key
    ]


def floor(row: Mapping) -> str:
    """What the number would be without memory: the controls' zone, or chance, or nothing known."""
    zone = interval(row.get("floor_lo"), row.get("floor_hi"))
    chance = METRICS[row["metric"]].chance if row["metric"] in METRICS else None
    return zone or ("" if chance is None else f"chance {number(chance)}")


def measure_rows(key: Sequence[Mapping]) -> list[dict]:
    """What each metric among the key numbers means: formula, range, direction and source."""
    names = dict.fromkeys(row["metric"] for row in key if row["metric"] in METRICS)
    better = {"high": "higher is more", "low": "lower is better", "": "neither way is better"}
    found = []
    for name in names:
        metric = METRICS[name]
        ends = ["unbounded" if end is None else f"{end:g}" for end in (metric.low, metric.high)]
        found.append(
            {
                "metric": name,
                "label": metric.label,
                "formula": metric.formula,
                "unit": metric.unit,
                "range": "unbounded" if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}",
                "chance": _at_chance(metric),
                "sign": better[metric.better],
                "source": metric.source,
            }
        )
    return found


def _at_chance(metric: Metric) -> str:
    if metric.chance is None:
        return "depends on the text: see the controls" if metric.better else ""
    return f"{metric.chance:g}"


def number(value: float | None) -> str:
    """Three significant digits; "undefined" for what is missing."""
    if value is None or math.isnan(value):
        return "undefined"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def interval(lo: float | None, hi: float | None) -> str:
    """``lo to hi``, or nothing where no interval was estimated."""
    if lo is None or hi is None or math.isnan(lo) or math.isnan(hi):
        return ""
    return f"{number(lo)} to {number(hi)}"


def seconds(duration: float) -> str:
    """A duration as people say it."""
    if duration < 90:
        return f"{duration:.1f} s"
    return f"{duration // 60:.0f} min {duration % 60:.0f} s"


def thumbnail(notebook) -> dict | None:
    """The notebook's first figure, thinned out and without its words; None if it has none."""
    figure = next(
        (o["data"][PLOTLY] for o in outputs(notebook) if PLOTLY in o.get("data", {})), None
    )
    if figure is None:
        return None
    layout = copy.deepcopy(dict(figure.get("layout", {})))
    for name in ("title", "annotations", "updatemenus", "sliders", "width", "height", "images"):
        layout.pop(name, None)
    for name, axis in layout.items():
        if re.fullmatch(r"[xy]axis\d*", name):
            axis.pop("title", None)
            axis |= {"gridcolor": "#e8ebef", "zerolinecolor": "#c9d0d8"}
    layout |= {
        "showlegend": False,
        "margin": {"l": 34, "r": 8, "t": 8, "b": 24},
        "font": {"size": 9},
        "autosize": True,
    }
    layout.pop("template", None)  # 7 kB each; the white look is all that shows at this size
    layout |= {"paper_bgcolor": "#fff", "plot_bgcolor": "#fff"}
    return {"data": [_thin(trace) for trace in figure.get("data", [])], "layout": layout}


def figures_script(notebook) -> str:
    """What ``figures.js`` holds: all figures of an executed notebook, for the page that compares.

    A page opened from a folder may read no file, but it may load a script; so the figures are
    the argument of one call. A figure's name says in which cell it stands, the cell of injected
    parameters left out, so that it is the same in each report of a notebook.
    """
    figures, index = {}, 0
    for cell in notebook.cells:
        if INJECTED in cell.metadata.get("tags", []):
            continue
        found = [o["data"][PLOTLY] for o in cell.get("outputs", []) if PLOTLY in o.get("data", {})]
        for nth, figure in enumerate(found, start=1):
            parts = {"data": figure.get("data", []), "layout": figure.get("layout", {})}
            figures[f"cell-{index}-{nth}"] = parts
        index += 1
    return f"workbenchFigures(document.currentScript, {_script_json(figures)});\n"


def _thin(trace: Mapping) -> dict:
    """A trace with rounded numbers, every so-manieth point, and no hover texts."""
    hover = ("text", "hovertext", "hovertemplate", "customdata", "ids", "meta", "name")
    kept = {name: _plain_arrays(part) for name, part in trace.items() if name not in hover}
    grid = kept.get("z")
    if isinstance(grid, list) and grid and isinstance(grid[0], list):
        down, across = _stride(grid), _stride(grid[0])
        sides = {"z": [row[::across] for row in grid[::down]]}
        for name, length, step in (("y", len(grid), down), ("x", len(grid[0]), across)):
            if len(kept.get(name, ())) == length:
                sides[name] = kept[name][::step]
        return kept | sides
    if kept.get("mode") == "lines+markers":
        kept["mode"] = "lines"  # markers of full size would hide the lines
    longest = max((part for part in kept.values() if isinstance(part, list)), key=len, default=[])
    return _every(kept, len(longest), _stride(longest))


def _stride(values: Sequence) -> int:
    return max(1, math.ceil(len(values) / THUMBNAIL_POINTS))


def _every(value, length: int, step: int):
    """Each step-th element of the lists of this length, which are the ones that run together."""
    if isinstance(value, Mapping):
        return {name: _every(part, length, step) for name, part in value.items()}
    return value[::step] if isinstance(value, list) and len(value) == length else value


def _plain_arrays(value):
    """plotly's base64 arrays and long floats as short numbers."""
    if isinstance(value, Mapping) and "bdata" in value:
        return _plain_arrays(_decode(value))
    if isinstance(value, Mapping):
        return {name: _plain_arrays(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain_arrays(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value


def _decode(array: Mapping) -> list:
    import numpy as np

    flat = np.frombuffer(base64.b64decode(array["bdata"]), dtype=np.dtype(array["dtype"]))
    if "shape" in array:
        flat = flat.reshape([int(part) for part in str(array["shape"]).split(",")])
    return flat.tolist()


def for_page(about: Mapping) -> dict:
    """A status as the pages show it."""
    started = datetime.fromisoformat(about["started"])
    return dict(about) | {
        "started": f"{started:%Y-%m-%d %H:%M} UTC",
        "duration": seconds(about["seconds"]),
        "given": {name: shown(value) for name, value in about["given"].items()},
        "parameters": {name: shown(value) for name, value in about["parameters"].items()},
        "values": dict(about["parameters"]),
    }


def shown(value) -> str:
    """A parameter's value as a page shows it."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def link(*parts: str) -> str:
    """A relative address; names may hold any character."""
    return "/".join(quote(part) for part in parts)
