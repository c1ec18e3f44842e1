"""Many reports from one YAML file: read, checked whole, told in advance, and run.

Scalars of the file are taken as texts and read by the type that the notebook declares, as the
command line does: ``no`` stays "no" for a ``str``, ``1e-3`` is a number for a ``float``. The file
carries data alone: tags, which could name code, are refused.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import json
import math
import re
import reprlib
import statistics
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import pandas as pd

from workbench import page
from workbench.cluster import Remote, workspace
from workbench.engine import Plan, Report, finished, read_status, run_plans, usable
from workbench.fingerprint import Hashes, fingerprint, key_of
from workbench.parameters import Notebook, Parameter, find_notebooks, refuse_unknown
from workbench.site import write_site
from workbench.table import InputError, whole_file

LIMIT = 10_000  # reports; a grid of more is rather a mistake, and is asked about
NODES = 1_000_000  # values of a file with its aliases written out; a few lines can stand for 10^9
WORD = 40  # characters of a value in a report's name
EXAMPLE = "{notebook}-{model}-{seed}"
NAME = 120  # characters of a report's name; a file system takes 255 bytes with what we add
PARTS = ("defaults", "grid", "zip", "include", "exclude")
KEYS = ("name", "out", "notebooks", *PARTS, "names", "timeout")
PLANNED = ".grid"  # folder of what each grid planned, so that missing reports can be shown
_PLAIN_NAME = re.compile(r"\w([\w.,=+@-]*[\w,=+@-])?")  # no slash, no dot at either end
_PLAIN = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")
IDLE = ("cached", "failed before")  # states in which a report is not run


@dataclass(frozen=True)
class Grid:
    """What a file describes: its reports in order, and the parameters in which they differ."""

    name: str
    out: str
    plans: tuple[Plan, ...]
    varying: tuple[str, ...]

    def only(self, wanted: Sequence[str]) -> tuple[Plan, ...]:
        """The plans of these names: of a report, of a notebook, or a pattern such as ``*-0``.

        Raises:
            InputError: A name that no report has; the nearest is offered.
        """
        names = [plan.name for plan in self.plans]
        known = list(dict.fromkeys([*(plan.notebook.name for plan in self.plans), *names]))
        for name in wanted:
            if not any(fnmatchcase(each, name) for each in known):
                raise InputError(
                    f"grid: --only {name!r} names no report of {self.name}"
                    f"{_nearest(name, known, ';')} --dry-run lists them"
                )
        return tuple(
            plan
            for plan in self.plans
            if not wanted
            or any(fnmatchcase(n, w) for w in wanted for n in (plan.name, plan.notebook.name))
        )


def read_grid(source: str | Path | Mapping, *, yes: bool = False) -> Grid:
    """Read and check a grid; nothing runs and nothing is written but hashes of large inputs.

    ``grid`` is the product of its lists, ``zip`` goes through its lists side by side and counts
    as one more list of the product. ``exclude`` takes away what agrees with all of its values,
    then ``include`` adds reports; a block with ``include`` alone has only those. All stand on
    ``defaults``, and on the notebook's own below. A parameter goes to the notebooks that have it.
    Paths are relative to the working folder, as on the command line.

    Args:
        source: A YAML file, or what one would hold as a mapping.
        yes: Take a grid of more than ``LIMIT`` reports.

    Raises:
        InputError: Whatever cannot be used, before anything runs: the first offender, and the
            way out.
    """
    if isinstance(source, Mapping):
        raw, stem = dict(source), "grid"
    else:
        raw, stem = read_yaml(source), _slug(Path(source).stem)
    _refuse_keys(raw, KEYS, "a grid")
    name = _plain_name(raw.get("name", stem), "name")
    notebooks = _notebooks(raw.get("notebooks", []))
    with _as_grid():
        blocks = _blocks(raw, notebooks)
        _refuse_many(blocks, name, yes)
        drawn = [(b, given) for b in blocks for given in b.reports()]
    if not drawn:
        raise InputError(f"grid: {name} holds no report; exclude takes them all away")
    return _planned(raw, name, drawn)


def read_yaml(path: str | Path) -> dict:
    """A YAML mapping with all scalars as texts.

    Raises:
        InputError: No such file, no YAML, a tag, a key twice, or aliases that stand for more
            than ``NODES`` values.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except OSError as error:
        raise InputError(f"grid: cannot read {path} ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"grid: {path} is not YAML ({_problem(error)})") from None
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"grid: {path} holds no mapping; it needs at least `notebooks: [NAME]`")
    try:
        return _value(node, path, {})[0]
    except RecursionError:
        raise InputError(f"grid: {path} holds itself by an alias; write it out") from None


def _problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error) or type(error).__name__
    return f"line {mark.line + 1}: {what}" if mark else " ".join(str(what).split())


def _value(node, path, known: dict) -> tuple:
    """A node's value and how many nodes it stands for; aliases are shared, never copied."""
    import yaml

    if id(node) in known:
        return known[id(node)]
    line = node.start_mark.line + 1
    if node.tag not in _PLAIN:
        raise InputError(
            f"grid: {path}, line {line}, has the tag {node.tag}; a grid is data alone, "
            "remove the tag"
        )
    size = 1
    if isinstance(node, yaml.ScalarNode):
        value = node.value
    elif isinstance(node, yaml.SequenceNode):
        value = []
        for child in node.value:
            part, n = _value(child, path, known)
            value.append(part)
            size += n
    else:
        value = {}
        for label, child in node.value:
            key, _ = _value(label, path, known)
            if not isinstance(key, str):
                raise InputError(f"grid: {path}, line {line}, has a key that is not a word")
            if key in value:
                line = label.start_mark.line + 1
                raise InputError(f"grid: {path}, line {line}, has {key} twice; give it once")
            value[key], n = _value(child, path, known)
            size += n
    if size > NODES:
        raise InputError(
            f"grid: {path}, line {line}, stands for more than {NODES:,} values by its aliases; "
            "write out what is meant"
        )
    known[id(node)] = value, size
    return value, size


def _refuse_keys(raw: Mapping, known: Sequence[str], what: str) -> None:
    for key in raw:
        if key not in known:
            raise InputError(
                f"grid: {what} has no {key!r}{_nearest(str(key), known, ';')} "
                f"there are {', '.join(known)}"
            )


def _nearest(name: str, known: Sequence[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else otherwise


def _plain_name(name, what: str) -> str:
    """A name that is one folder below where it is put, and no other."""
    if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
        raise InputError(
            f"grid: the {what} {name!r} does not name a folder below the output; "
            "use letters, digits, - and _"
        )
    return name


def _slug(text: str) -> str:
    return re.sub(r"[^\w.,=+@-]+", "_", text).strip("._")


def _notebooks(raw) -> dict[str, dict]:
    """Block by notebook's name as written."""
    if isinstance(raw, Mapping):
        named = {str(name): block or {} for name, block in raw.items()}
    elif isinstance(raw, str):
        named = {raw: {}} if raw else {}
    elif isinstance(raw, Sequence) and all(isinstance(name, str | Path) for name in raw):
        named = {str(name): {} for name in raw}
        if len(named) < len(raw):
            twice = Counter(map(str, raw)).most_common(1)[0][0]
            raise InputError(f"grid: notebooks has {twice} twice; give it once")
    else:
        raise InputError("grid: notebooks is neither a list of names nor a mapping of them")
    if not named:
        raise InputError("grid: there are no notebooks in it; add `notebooks: [NAME]`")
    for name, block in named.items():
        if not isinstance(block, Mapping):
            raise InputError(f"grid: notebooks, {name}, is {reprlib.repr(block)}; needs a mapping")
        _refuse_keys(block, PARTS, f"notebooks, {name},")
    return named


@contextlib.contextmanager
def _as_grid() -> Iterator[None]:
    """Errors about parameters in the words of a file instead of the command line's."""
    try:
        yield
    except InputError as error:
        text = re.sub(r"^report: ", "grid: ", str(error))
        raise InputError(re.sub(r"for example -p (\w+)=", r"for example \1: ", text)) from None


@dataclass
class _Block:
    """One notebook's reports, as factors of a product: each a list of choices.

    ``settled`` are the values that stand where no choice is made. An included report is marked
    if it lost names that this notebook does not have. ``alone``: there are only included ones.
    """

    notebook: Notebook
    settled: dict
    defaults: dict
    factors: list[list[dict]] = field(default_factory=list)
    include: list[tuple[dict, bool]] = field(default_factory=list)
    exclude: list[dict] = field(default_factory=list)
    alone: bool = False

    @property
    def product(self) -> int:
        """How many choices the factors leave, before any is taken away."""
        return 0 if self.alone else math.prod(map(len, self.factors))

    def reports(self) -> Iterator[dict]:
        """The values given of each report, in the order of the file; none comes twice.

        Raises:
            InputError: A report that comes twice and was not cut down to one.
        """
        seen = set()
        for given, cut in itertools.chain(self._chosen(), self.include):
            values = self.defaults | given
            text = json.dumps(self.settled | values, sort_keys=True)
            if text in seen and not cut:
                raise InputError(
                    f"grid: {self.notebook.name} with {_listed(values) or 'defaults alone'} comes "
                    "twice; remove one"
                )
            if text not in seen:
                seen.add(text)
                yield values

    def _chosen(self) -> Iterator[tuple[dict, bool]]:
        for parts in itertools.product(*self.factors) if self.product else ():
            given = {name: value for part in parts for name, value in part.items()}
            if not any(_agrees(self.settled | given, rule) for rule in self.exclude):
                yield given, False

    def meets(self, rule: dict) -> bool:
        """Whether a rule takes away any choice; told factor by factor, nothing is drawn."""
        free = {name for factor in self.factors for name in factor[0]}
        return self.product > 0 and all(
            any(
                _agrees(choice, {n: v for n, v in rule.items() if n in choice}) for choice in factor
            )
            for factor in [
                *self.factors,
                [{n: v for n, v in self.settled.items() if n not in free}],
            ]
        )


def _agrees(values: Mapping, rule: Mapping) -> bool:
    return all(values[name] == value for name, value in rule.items())


def _blocks(raw: Mapping, named: Mapping[str, Mapping]) -> list[_Block]:
    notebooks = find_notebooks(list(named))
    if len(notebooks) < len(named):
        raise InputError("grid: two of the notebooks are the same file; give it once")
    common = _shapes(raw, "")
    refuse_unknown(dict.fromkeys(_names(common)), notebooks)
    blocks = []
    for notebook, (name, block) in zip(notebooks, named.items(), strict=True):
        own = _shapes(block, f"notebooks, {name}, ")
        refuse_unknown(dict.fromkeys(_names(own)), [notebook])
        blocks.append(_block(notebook, common, own))
        _refuse_idle(own["exclude"], blocks[-1:])
    _refuse_idle(common["exclude"], blocks)
    return blocks


def _shapes(raw: Mapping, where: str) -> dict:
    """The five parts of a block with their forms checked, those left out as empty."""
    parts = {part: raw.get(part) or ({} if part in PARTS[:3] else []) for part in PARTS}
    for part in PARTS[:3]:
        if not isinstance(parts[part], Mapping):
            raise InputError(
                f"grid: {where}{part} is {reprlib.repr(parts[part])}; needs `NAME: ...` lines"
            )
    for part in ("grid", "zip"):
        for name, values in parts[part].items():
            if not _is_list(values):
                raise InputError(
                    f"grid: {where}{part}, {name}, is {values!r}; needs a list of values; "
                    "a value that all share goes to defaults"
                )
            if not len(values):
                raise InputError(f"grid: {where}{part}, {name}, is empty; give it values")
    lengths = {name: len(values) for name, values in parts["zip"].items()}
    if len(set(lengths.values())) > 1:
        raise InputError(
            f"grid: {where}zip goes through lists side by side, and theirs are of "
            f"{', '.join(f'{n} ({name})' for name, n in lengths.items())} values; make them equal"
        )
    for part in PARTS[3:]:
        if not _is_list(parts[part]) or not all(isinstance(e, Mapping) and e for e in parts[part]):
            raise InputError(f"grid: {where}{part} needs a list of `{{NAME: VALUE, ...}}`")
    for one, other in itertools.combinations(PARTS[:3], 2):
        for name in parts[one]:
            if name in parts[other]:
                raise InputError(
                    f"grid: {where}{name} stands in {one} and in {other}; leave it in one"
                )
    return parts


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _names(parts: Mapping) -> list[str]:
    entries = [parts["defaults"], parts["grid"], parts["zip"], *parts["include"], *parts["exclude"]]
    return [name for entry in entries for name in entry]


def _block(notebook: Notebook, common: Mapping, own: Mapping) -> _Block:
    """A notebook's own parts over those of all; what stands with the notebook wins."""
    mine = {*own["defaults"], *own["grid"], *own["zip"]}
    above = {part: {n: v for n, v in common[part].items() if n not in mine} for part in PARTS[:3]}
    defaults = _entry(notebook, above["defaults"] | own["defaults"])
    factors = [
        [_entry(notebook, {name: value}) for value in values]
        for name, values in (above["grid"] | own["grid"]).items()
        if name in notebook.names
    ]
    for columns in (common["zip"], own["zip"]):
        kept = [
            n for n in columns if n in notebook.names and (columns is own["zip"] or n not in mine)
        ]
        lines = [_entry(notebook, {n: columns[n][i] for n in kept}) for i in _places(columns, kept)]
        if lines:
            # without the columns that this notebook lacks, lines may be the same
            factors.append(lines if len(kept) == len(columns) else _distinct(lines))
    return _Block(
        notebook,
        notebook.check({})[1] | defaults,
        defaults,
        factors,
        [
            (known, len(known) < len(entry))
            for entry in [*common["include"], *own["include"]]
            if (known := _entry(notebook, entry))
        ],
        _rules(notebook, [*common["exclude"], *own["exclude"]]),
        alone=not any(p[part] for p in (common, own) for part in ("grid", "zip"))
        and any(p["include"] for p in (common, own)),
    )


def _places(columns: Mapping, kept: Sequence[str]) -> range:
    return range(len(columns[kept[0]]) if kept else 0)


def _entry(notebook: Notebook, values: Mapping) -> dict:
    """The values that are this notebook's, as their parameters' types."""
    return {n: _read(notebook, n, v) for n, v in values.items() if n in notebook.names}


def _rules(notebook: Notebook, rules: Sequence[Mapping]) -> list[dict]:
    """The rules that speak of this notebook's parameters alone."""
    return [_entry(notebook, rule) for rule in rules if all(n in notebook.names for n in rule)]


def _refuse_idle(rules: Sequence[Mapping], blocks: Sequence[_Block]) -> None:
    for rule in rules:
        if not any(b.meets(known) for b in blocks for known in _rules(b.notebook, [rule])):
            raise InputError(
                f"grid: exclude {_listed(rule)} agrees with no report; correct or remove it"
            )


def _listed(values: Mapping) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _distinct(choices: list[dict]) -> list[dict]:
    return list({json.dumps(choice): choice for choice in choices}.values())


def _refuse_many(blocks: Sequence[_Block], name: str, yes: bool) -> None:
    count = sum(block.product + len(block.include) for block in blocks)
    if count > LIMIT and not yes:
        raise InputError(
            f"grid: {name} has {count:,} reports, more than {LIMIT:,}; give fewer values, "
            "or --yes if they are meant"
        )


def _read(notebook: Notebook, name: str, value):
    """A value as its parameter's type, ready for JSON."""
    parameter = next(p for p in notebook.parameters if p.name == name)
    return notebook.check({name: _typed(parameter, value)})[0][name]


def _typed(parameter: Parameter, value):
    """Texts within a list as the list's type; other values as they came."""
    kinds = [k for k in (parameter.type, *getattr(parameter.type, "__args__", ())) if k]
    inner = next((k.__args__[0] for k in kinds if getattr(k, "__origin__", None) is list), None)
    if inner is None or not _is_list(value):
        return value
    element = replace(parameter, type=inner)
    try:
        return [element.read(v) if isinstance(v, str) else _typed(element, v) for v in value]
    except (ValueError, RecursionError):
        return list(value)  # the check that follows names it


def _planned(raw: Mapping, name: str, drawn: Sequence[tuple[_Block, dict]]) -> Grid:
    """The plans with their names, keys and limits."""
    limits = _limits(raw.get("timeout") or {})
    out = raw.get("out", f"reports/{name}")
    if not isinstance(out, str | Path) or not str(out):
        raise InputError(f"grid: out is {out!r}; needs a folder")
    settled = [block.settled | given for block, given in drawn]
    varying = _varying([(block.notebook, given) for block, given in drawn], settled)
    labels = _labels(settled)
    # a number alone says nothing; the last part of a path mostly does
    texts = {p for values in settled for p, value in values.items() if isinstance(value, str)}
    spelled = {
        p: f"{{{p}}}" if p in texts else f"{p}-{{{p}}}" for own in varying.values() for p in own
    }
    hashes = Hashes()
    plans, seen = [], {}
    for (block, given), values in zip(drawn, settled, strict=True):
        notebook = block.notebook
        differ = varying[notebook.name]
        pattern = raw.get("names") or "-".join(["{notebook}", *map(spelled.get, differ)])
        called = _named(pattern, name, notebook, values, labels)
        told = " with ".join(filter(None, [notebook.name, _listed({p: values[p] for p in differ})]))
        if (other := seen.setdefault(called.casefold(), told)) != told:
            raise InputError(
                f"grid: two reports would be called {called}: {other}, and {told}; put what they "
                "differ in into `names`"
            )
        plan = Plan(notebook, given, values, name=called, grid=name, **limits)
        depends = fingerprint(plan, hashes)
        plans.append(replace(plan, fingerprint=depends, key=key_of(depends)))
    hashes.save()
    differ = tuple(dict.fromkeys(p for own in varying.values() for p in own))
    return Grid(name, str(out), tuple(plans), differ)


def _limits(raw) -> dict[str, float]:
    """Seconds that a cell and a report may take, as a plan calls them."""
    if not isinstance(raw, Mapping):
        raise InputError(f"grid: timeout is {raw!r}; needs `{{cell: SECONDS, report: SECONDS}}`")
    _refuse_keys(raw, ("cell", "report"), "timeout")
    limits = {}
    for name, value in raw.items():
        try:
            limits[f"{name}_timeout"] = float(value)
        except (TypeError, ValueError):
            limits[f"{name}_timeout"] = math.nan
        if not 0 < limits[f"{name}_timeout"] < math.inf:
            raise InputError(f"grid: timeout, {name}, is {value!r}; needs seconds, such as 600")
    return limits


def _varying(drawn: Sequence[tuple[Notebook, dict]], settled: Sequence[dict]) -> dict:
    """By notebook's name the parameters in which its reports differ, in the file's order."""
    met: dict[str, dict[str, set]] = {}
    for (notebook, given), values in zip(drawn, settled, strict=True):
        own = met.setdefault(notebook.name, {})
        for name in given:
            own.setdefault(name, set())
        for name in own:
            own[name].add(json.dumps(values[name]))
    return {n: [name for name, found in own.items() if len(found) > 1] for n, own in met.items()}


def _labels(settled: Sequence[dict]) -> dict[tuple[str, str], str]:
    """A short word for each value of each parameter that names a folder and tells it from others.

    Of a path the last part, if no other value has the same.
    """
    values: dict[str, dict[str, object]] = {}
    for each in settled:
        for name, value in each.items():
            values.setdefault(name, {})[json.dumps(value)] = value
    labels = {}
    for name, found in values.items():
        last = {key: _word(_last_part(value)) for key, value in found.items()}
        whole = {key: _word(value) for key, value in found.items()}
        # a file system may take A and a for the same
        lasts, wholes = (Counter(w.casefold() for w in words.values()) for words in (last, whole))
        for key in found:
            if lasts[last[key].casefold()] == 1:
                labels[name, key] = last[key]
            elif wholes[whole[key].casefold()] == 1:
                labels[name, key] = whole[key]
            else:
                labels[name, key] = _marked(whole[key], WORD, key)
    return labels


def _last_part(value):
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if isinstance(value, str) else value


def _word(value) -> str:
    if value in ("", []):
        return "empty"
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return _cut(_slug(text) or "other", WORD, text)


def _cut(word: str, length: int, whole: str) -> str:
    return word if len(word) <= length else _marked(word, length, whole)


def _marked(word: str, length: int, whole: str) -> str:
    """A word of bounded length that still tells wholes apart."""
    mark = hashlib.blake2b(whole.encode(), digest_size=3).hexdigest()
    return f"{word[: length - 7]}-{mark}"


def _named(pattern, grid: str, notebook: Notebook, values: Mapping, labels: Mapping) -> str:
    """A report's name by the pattern; only plain ``{NAME}`` fields are filled in."""
    try:
        parts = list(string.Formatter().parse(pattern))
    except (TypeError, ValueError):
        raise InputError(f"grid: names is {pattern!r}; needs text such as {EXAMPLE!r}") from None
    known = {"notebook": _slug(notebook.name), "grid": grid}
    name = ""
    for literal, parameter, form, conversion in parts:
        name += literal
        if parameter is None:
            continue
        if form or conversion or parameter not in (*known, *notebook.names):
            written = parameter + (f"!{conversion}" if conversion else "") + (form and f":{form}")
            near = _nearest(written, [*known, *notebook.names], ";")
            raise InputError(
                f"grid: names has {{{written}}}, which is no parameter of {notebook.name}{near} "
                f"give plain ones, as in {EXAMPLE!r}"
            )
        name += known.get(parameter) or labels[parameter, json.dumps(values[parameter])]
    return _cut(_plain_name(name, "report's name"), NAME, name)


def plan_states(
    plans: Sequence[Plan], out: str | Path, *, retry_failed: bool = False, force: bool = False
) -> pd.DataFrame:
    """What a run would do with each report; nothing runs and nothing is written.

    Args:
        plans: The reports.
        out: Folder of reports, or an fsspec URL of one.
        retry_failed: As in :func:`run_grid`.
        force: As in :func:`run_grid`.

    Returns:
        ``report, notebook, state, why, seconds``. The state is "new", "changed" (made before from
        something else, ``why`` says what), "retry" or "forced", all of which run, or "cached" or
        "failed before", which do not. Seconds are the median of the notebook's reports that are
        in the folder, NaN if there are none, and 0 for what does not run.
    """
    folder = Remote(str(out)).pull() if _is_url(out) else Path(out)
    usual = _usual_seconds(folder)
    lines = []
    for plan in plans:
        state, why = _state(plan, folder, retry_failed, force)
        seconds = 0.0 if state in IDLE else usual.get(plan.notebook.name, math.nan)
        lines.append((plan.name, plan.notebook.name, state, why, seconds))
    return pd.DataFrame(lines, columns=["report", "notebook", "state", "why", "seconds"])


def _state(plan: Plan, out: Path, retry_failed: bool, force: bool) -> tuple[str, str]:
    if force:
        return "forced", ""
    there = finished(plan, out)
    if there is None:
        about = read_status(out / plan.name)
        if about is None:
            return "new", ""
        before = about.get("fingerprint") or {}
        differ = [part for part, hashed in plan.fingerprint.items() if before.get(part) != hashed]
        return "changed", ", ".join(differ) or "incomplete"
    if there.status == "ok":
        return "cached", ""
    return ("retry" if retry_failed else "failed before"), ""


def _usual_seconds(out: Path) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for path in out.glob("*/status.json"):
        about = read_status(path.parent) or {}
        if about.get("status") == "ok" and isinstance(about.get("seconds"), int | float):
            found.setdefault(str(about.get("notebook")), []).append(about["seconds"])
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def run_grid(
    source: str | Path | Mapping,
    *,
    out: str | Path | None = None,
    jobs: int = 1,
    only: Sequence[str] = (),
    retry_failed: bool = False,
    force: bool = False,
    keep_going: bool = False,
    dask: str | None = None,
    yes: bool = False,
) -> pd.DataFrame:
    """Make the reports of a grid that are not there yet, and the site over all.

    Args:
        source: A YAML file, or a mapping; see :func:`read_grid`.
        out: Folder of reports, or an fsspec URL of one; None takes the grid's.
        jobs: How many to run at once; each is a process with its share of the cores.
        only: Names of reports or notebooks, or patterns such as ``*-0``; none takes all.
        retry_failed: Make those again that failed or were refused and have not changed.
        force: Make all, whatever is there.
        keep_going: Go on after a cell has failed or an input was refused.
        dask: Address of a Dask scheduler whose workers make the reports.
        yes: Take a grid of more than ``LIMIT`` reports.

    Returns:
        A row for each report: ``report, notebook, status`` ("ok", "failed", "refused", or
        "missing" if it was not started), ``seconds, cached, error, folder``, and the parameters
        in which they differ; in ``attrs["site"]`` the index.

    Raises:
        InputError: As :func:`read_grid`; a folder that cannot be written to; a Dask address that
            does not answer, or workers of another version.
    """
    grid = read_grid(source, yes=yes)
    plans = grid.only(only)
    if jobs < 1:
        raise InputError(f"grid: --jobs is {jobs}, needs at least 1")
    place = str(out or grid.out)
    needs = list(dict.fromkeys(plan.notebook.path for plan in plans))
    try:
        with workspace(place, dask=dask, jobs=jobs, needs=needs) as (folder, executor, jobs):
            usable(folder, [plan.name for plan in plans])
            _write_plans(grid, folder)
            reports = run_plans(
                plans,
                folder,
                jobs=jobs,
                executor=executor,
                force=force,
                retry_failed=retry_failed,
                keep_going=keep_going,
            )
            write_site(folder)
    except OSError as error:
        raise InputError(
            f"grid: cannot write to {error.filename or place} ({error.strerror or error}); "
            "free some space, or choose another folder with --out"
        ) from None
    return _frame(grid, plans, reports, place if _is_url(place) else str(folder))


def _is_url(place: str | Path) -> bool:
    return "://" in str(place)


def _write_plans(grid: Grid, folder: Path) -> None:
    planned = [
        {
            "name": plan.name,
            "notebook": plan.notebook.name,
            "given": plan.given,
            "settled": plan.settled,
            "key": plan.key,
        }
        for plan in grid.plans
    ]
    with whole_file(folder / PLANNED / f"{grid.name}.json") as temporary:
        text = json.dumps(planned, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _frame(
    grid: Grid, plans: Sequence[Plan], reports: Sequence[Report], place: str
) -> pd.DataFrame:
    lines = [
        {
            "report": report.name,
            "notebook": plan.notebook.name,
            "status": report.status,
            "seconds": report.seconds,
            "cached": report.cached,
            "error": report.error,
            "folder": f"{place}/{report.name}",
            **{name: plan.settled.get(name) for name in grid.varying},
        }
        for plan, report in zip(plans, reports, strict=True)
    ]
    table = pd.DataFrame(lines)
    table.attrs["site"] = f"{place}/index.html"
    return table


def describe_states(states: pd.DataFrame, jobs: int = 1) -> str:
    """What :func:`plan_states` found as lines, the counts and the time last."""
    runs = states[~states["state"].isin(IDLE)]
    told = states["state"] + states["why"].map(lambda why: f" ({why})" if why else "")
    wide, wider = (max(map(len, column), default=0) for column in (states["report"], told))
    lines = [
        f"{report:<{wide}}  {state:<{wider}}  {'' if idle else _time(seconds)}".rstrip()
        for report, state, idle, seconds in zip(
            states["report"], told, states["state"].isin(IDLE), states["seconds"], strict=True
        )
    ]
    counts = ", ".join(f"{n} {state}" for state, n in Counter(states["state"]).items())
    total = f"{len(runs)} of {len(states)} would run ({counts})"
    known, unknown = runs["seconds"].dropna(), runs.loc[runs["seconds"].isna(), "notebook"]
    if len(known):
        total += f"; about {page.seconds(known.sum() / jobs)} with --jobs {jobs}"
    if len(unknown):
        total += f"; of {', '.join(dict.fromkeys(unknown))} the time is not known yet"
    return "\n".join([*lines, total])


def _time(seconds: float) -> str:
    return "time unknown" if math.isnan(seconds) else f"about {page.seconds(seconds)}"


def describe_run(table: pd.DataFrame) -> str:
    """What :func:`run_grid` gave as lines: what did not go well, then the counts."""
    bad = table[~table["status"].isin(["ok", "missing"])]
    lines = [
        f"{report}  {status}: {' '.join(error.split())}"
        for report, status, error in zip(bad["report"], bad["status"], bad["error"], strict=True)
    ]
    counts = Counter(table["status"].replace("missing", "not started"))
    cached = int((table["cached"] & (table["status"] == "ok")).sum())
    told = ", ".join(f"{n} {status}" for status, n in counts.items())
    count = f"{len(table)} report{'s' if len(table) != 1 else ''}"
    lines.append(f"{count}: {told}" + (f"; {cached} were there" if cached else ""))
    return "\n".join(lines)
