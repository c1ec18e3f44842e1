"""Grids: what a file stands for, what is refused, what a report depends on, and small runs."""

import itertools
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbformat import v4

from tests.test_cli import call, signals_as_before  # noqa: F401
from tests.test_report import write_notebook
from workbench import fingerprint as prints
from workbench.engine import Plan
from workbench.fingerprint import Hashes, fingerprint, key_of
from workbench.grid import plan_states, read_grid, run_grid
from workbench.parameters import read_notebook
from workbench.table import InputError

TAGGED = {"tags": ["parameters"]}
DEMO = """\
model: str = "m"  # what is asked
seed: int = 9
rate: float = 0.5
fast: bool = False
kinds: list[str] = ["verse"]
lags: list[int] = []
limit: int | None = None
results: str = ""
"""


def notebook(folder: Path, name: str, parameters: str, *code: str) -> Path:
    cells = [v4.new_code_cell(parameters, metadata=TAGGED), *map(v4.new_code_cell, code)]
    return write_notebook(folder, name, cells)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with two notebooks, ``demo`` and ``short``, which has only the seed."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr("workbench.parameters.FOLDER", folder)
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    notebook(folder, "demo", DEMO)
    notebook(folder, "short", "seed: int = 9")
    return tmp_path


def read(text: str, **options):
    Path("sizes.yaml").write_text(text, encoding="utf-8")
    return read_grid("sizes.yaml", **options)


def givens(grid) -> list[tuple[str, dict]]:
    return [(plan.notebook.name, plan.given) for plan in grid.plans]


# what a file stands for


def test_a_grid_by_hand(here):
    grid = read(
        "notebooks: [demo]\ndefaults: {rate: 1e-3}\ngrid: {model: [./a, ./b], seed: [0, 1]}\n"
        "exclude: [{model: ./b, seed: 1}]\ninclude: [{model: ./c}]\n"
    )
    # 2 x 2 in the order of the file, the last name fastest, but for one, and one more
    assert givens(grid) == [
        ("demo", {"rate": 0.001, "model": "./a", "seed": 0}),
        ("demo", {"rate": 0.001, "model": "./a", "seed": 1}),
        ("demo", {"rate": 0.001, "model": "./b", "seed": 0}),
        ("demo", {"rate": 0.001, "model": "./c"}),
    ]
    assert [plan.name for plan in grid.plans] == [
        "demo-a-seed-0", "demo-a-seed-1", "demo-b-seed-0", "demo-c-seed-9",
    ]  # fmt: skip
    assert (grid.name, grid.out, grid.varying) == ("sizes", "reports/sizes", ("model", "seed"))
    plan = grid.plans[3]
    assert plan.settled == {
        "model": "./c", "seed": 9, "rate": 0.001, "fast": False, "kinds": ["verse"], "lags": [],
        "limit": None, "results": "",
    }  # fmt: skip
    assert (plan.grid, plan.cell_timeout, plan.report_timeout) == ("sizes", None, None)
    assert len({plan.key for plan in grid.plans}) == 4
    assert plan.command.endswith(" -p rate=0.001 -p model=./c")


def test_side_by_side_and_each_notebooks_own(here):
    grid = read(
        "name: two\nout: there\nzip: {model: [a, b, b], seed: [0, 1, 0]}\nnotebooks:\n"
        "  demo:\n    defaults: {fast: yes}\n    grid: {lags: [[], [1, 2]]}\n"
        "  short:\ntimeout: {cell: 600, report: 3600.5}\n"
    )
    demo = [(a, b) for name, a in givens(grid) for b in [a.pop("fast", None)] if name == "demo"]
    assert demo == [
        ({"lags": lags, "model": model, "seed": seed}, True)
        for lags in ([], [1, 2])
        for model, seed in (("a", 0), ("b", 1), ("b", 0))
    ]
    # to short, which has no model, the first and the third line are one
    assert [a for name, a in givens(grid) if name == "short"] == [{"seed": 0}, {"seed": 1}]
    assert grid.plans[0].name == "demo-lags-empty-a-seed-0"
    assert grid.plans[4].name == "demo-lags-1,2-b-seed-1"
    assert grid.plans[-1].name == "short-seed-1"
    assert (grid.name, grid.out) == ("two", "there")
    assert (grid.plans[0].cell_timeout, grid.plans[0].report_timeout) == (600.0, 3600.5)


def test_what_stands_with_the_notebook_wins(here):
    grid = read(
        "grid: {seed: [0, 1]}\ndefaults: {rate: 1}\nnotebooks:\n"
        "  demo: {defaults: {seed: 5}, grid: {rate: [2, 3]}}\n  short: {exclude: [{seed: 0}]}\n"
    )
    assert givens(grid) == [
        ("demo", {"seed": 5, "rate": 2.0}),
        ("demo", {"seed": 5, "rate": 3.0}),
        ("short", {"seed": 1}),
    ]


def test_included_alone_and_nothing_at_all(here):
    assert givens(read("notebooks: demo\ninclude: [{seed: 1}, {seed: 2}]")) == [
        ("demo", {"seed": 1}), ("demo", {"seed": 2}),
    ]  # fmt: skip
    [plan] = read("notebooks: [demo]\ntimeout:\n").plans
    assert (plan.given, plan.name) == ({}, "demo")


def test_scalars_are_read_by_their_parameters_type(here):
    # YAML 1.1 takes no for false, 012 for ten, 1:30 for ninety and 1e-3 for a text
    grid = read(
        "notebooks: [demo]\ngrid: {model: [no, 012, '1:30', 2024-01-01, null, 1e-3]}\n"
        "defaults: {seed: 010, rate: 1e-3, fast: on}"
        .replace("on}", "yes, kinds: [no, 1], lags: [3, 4], limit: null}")
    )  # fmt: skip
    assert [plan.given["model"] for plan in grid.plans] == [
        "no", "012", "1:30", "2024-01-01", "null", "1e-3",
    ]  # fmt: skip
    wanted = {
        "seed": 10, "rate": 0.001, "fast": True, "kinds": ["no", "1"], "lags": [3, 4],
        "limit": None,
    }  # fmt: skip
    assert wanted.items() <= grid.plans[0].given.items()


def test_a_mapping_from_python_is_a_grid_too(here):
    grid = read_grid(
        {"notebooks": ["demo"], "grid": {"seed": range(2), "fast": [True]}, "names": "x{seed}"}
    )
    assert givens(grid) == [("demo", {"seed": s, "fast": True}) for s in (0, 1)]
    assert [plan.name for plan in grid.plans] == ["x0", "x1"]


def test_names_tell_values_apart(here):
    values = ["x/final", "y/final", "other", "../../etc", "", "é ü", "A", "a", "q" * 90]
    grid = read_grid({"notebooks": ["demo"], "grid": {"model": values}})
    names = [plan.name for plan in grid.plans]
    assert names[:6] == [
        "demo-x_final", "demo-y_final", "demo-other", "demo-etc", "demo-empty", "demo-é_ü",
    ]  # fmt: skip
    # a file system may take A and a for the same; what is too long is cut and marked
    assert len({name.casefold() for name in names}) == len(values)
    assert names[6].startswith("demo-A-") and names[7].startswith("demo-a-")
    assert names[8].startswith("demo-" + "q" * 33 + "-") and len(names[8]) == 5 + 40
    named = read("notebooks: [demo]\ngrid: {seed: [1, 2]}\nnames: '{grid}_{seed}.{rate}'")
    assert [plan.name for plan in named.plans] == ["sizes_1.0.5", "sizes_2.0.5"]


ONE, TWO = {"a": 5, "b": 5, "c": 5, "d": 5}, {"a": 5, "c": 5}  # two notebooks' defaults
value = st.integers(0, 2)
entries = st.lists(st.dictionaries(st.sampled_from("abcd"), value, min_size=1), max_size=3)
axis = st.lists(value, min_size=1, max_size=3, unique=True)


@st.composite
def grids(draw):
    names = draw(st.permutations("abcd"))
    split = draw(st.integers(0, 3))
    product, side = names[:split], names[split : split + draw(st.integers(0, 2))]
    lines = draw(st.lists(st.tuples(*[value] * len(side)), min_size=1, max_size=4, unique=True))
    rest = [n for n in names if n not in product and n not in side]
    return {
        "defaults": draw(st.dictionaries(st.sampled_from(rest), value)) if rest else {},
        "grid": {name: draw(axis) for name in product},
        "zip": {name: [line[i] for line in lines] for i, name in enumerate(side)},
        "include": draw(entries),
        "exclude": draw(entries),
    }


def members(raw: dict, own: dict) -> tuple[list, list, set]:
    """By membership: of all values that a notebook's parameters could take, those in the grid.

    Returns:
        Those of the product, those included, in both as settled values, and the numbers of the
        rules that take any away.
    """
    fixed = own | {n: v for n, v in raw["defaults"].items() if n in own}
    whole = [
        dict(zip(own, v, strict=True)) for v in itertools.product((0, 1, 2, 5), repeat=len(own))
    ]
    lines = list(zip(*raw["zip"].values(), strict=True))

    def drawn(point):
        if not raw["grid"] and not raw["zip"] and raw["include"]:
            return False
        rows = [dict(zip(raw["zip"], line, strict=True)) for line in lines] or [{}]
        return any(
            all(
                point[n] in raw["grid"][n] if n in raw["grid"] else point[n] == row.get(n, fixed[n])
                for n in own
            )
            for row in rows
        )

    rules = [(i, r) for i, r in enumerate(raw["exclude"]) if set(r) <= set(own)]
    hit = {i for i, r in rules for p in whole if drawn(p) and r.items() <= p.items()}
    kept = [p for p in whole if drawn(p) and not any(r.items() <= p.items() for _, r in rules)]
    added = [
        (fixed | {n: v for n, v in e.items() if n in own}, set(e) <= set(own))
        for e in raw["include"]
        if set(e) & set(own)
    ]
    return kept, added, hit


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(raw=grids())
def test_a_grid_is_what_its_definition_says(here, raw):
    texts = {"one": ONE, "two": TWO}
    for name, own in texts.items():
        if not (here / "notebooks" / f"{name}.ipynb").exists():
            notebook(here / "notebooks", name, "\n".join(f"{n}: int = {v}" for n, v in own.items()))
    wanted, twice, hit = {}, False, set()
    for name, own in texts.items():
        kept, added, touched = members(raw, own)
        hit |= touched
        seen = [json.dumps(p, sort_keys=True) for p in kept]
        for point, uncut in added:
            text = json.dumps(point, sort_keys=True)
            twice |= text in seen and uncut
            seen += [text] * (text not in seen)
        wanted[name] = sorted(seen)
    given = {"notebooks": list(texts), **raw}
    idle = len(hit) < len(raw["exclude"])
    if idle or twice or not any(wanted.values()):
        message = "agrees with no report" if idle else "comes twice" if twice else "holds no report"
        with pytest.raises(InputError, match=message):
            read_grid(given)
        return
    got = {name: [] for name in texts}
    for plan in read_grid(given).plans:
        got[plan.notebook.name].append(json.dumps(plan.settled, sort_keys=True))
    assert {name: sorted(found) for name, found in got.items()} == wanted


# what is refused


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "sizes.yaml holds no mapping; it needs at least `notebooks: [NAME]`"),
        ("[demo]", "sizes.yaml holds no mapping; it needs at least `notebooks: [NAME]`"),
        ("a: [", "sizes.yaml is not YAML (line 1: expected the node content, but found '<stream end>')"),
        ("grid: {}", "there are no notebooks in it; add `notebooks: [NAME]`"),
        ("notebooks: []", "there are no notebooks in it; add `notebooks: [NAME]`"),
        ("notebooks: [[demo]]", "notebooks is neither a list of names nor a mapping of them"),
        ("notebooks: [demo, demo]", "notebooks has demo twice; give it once"),
        ("notebooks: [demo, demo.ipynb]", "two of the notebooks are the same file; give it once"),
        ("notebooks: [dmo]", "no notebook 'dmo'; did you mean 'demo'? there are demo, short"),
        ("notebooks: {demo: 3}", "notebooks, demo, is '3'; needs a mapping"),
        (
            "notebooks: {demo: {gird: {}}}",
            "notebooks, demo, has no 'gird'; did you mean 'grid'? there are defaults, grid, zip, "
            "include, exclude",
        ),
        (
            "notebok: [demo]",
            "a grid has no 'notebok'; did you mean 'notebooks'? there are name, out, notebooks, "
            "defaults, grid, zip, include, exclude, names, timeout",
        ),
        (
            "notebooks: [demo]\ngrid: {sed: [1]}",
            "no parameter 'sed' in demo; did you mean 'seed'? there are model, seed, rate, fast, "
            "kinds, lags, limit",
        ),
        (
            "notebooks: {demo: , short: {grid: {rate: [1]}}}",
            "no parameter 'rate' in short; there are seed",
        ),
        (
            "notebooks: [demo]\ngrid: {results: [x]}",
            "results is set by the report itself; choose its folder with --out",
        ),
        (
            "notebooks: [demo]\ngrid: {seed: [0, no]}",
            "seed is 'no', but demo needs int, for example seed: 9",
        ),
        (
            "notebooks: [demo]\ngrid: {kinds: [verse]}",
            'kinds is \'verse\', but demo needs list[str], for example kinds: ["verse"]',
        ),
        (
            "notebooks: [demo]\ndefaults: {lags: [1, x]}",
            "lags is ['1', 'x'], but demo needs list[int], for example lags: []",
        ),
        ("notebooks: [demo]\ngrid: {seed: []}", "grid, seed, is empty; give it values"),
        (
            "notebooks: [demo]\ngrid: {seed: 3}",
            "grid, seed, is '3'; needs a list of values; a value that all share goes to defaults",
        ),
        ("notebooks: [demo]\ngrid: [seed]", "grid is ['seed']; needs `NAME: ...` lines"),
        (
            "notebooks: [demo]\nzip: {seed: [1, 2], model: [a]}",
            "zip goes through lists side by side, and theirs are of 2 (seed), 1 (model) values; "
            "make them equal",
        ),
        (
            "notebooks: [demo]\ndefaults: {seed: 1}\ngrid: {seed: [1]}",
            "seed stands in defaults and in grid; leave it in one",
        ),
        (
            "notebooks: {demo: {include: {seed: 1}}}",
            "notebooks, demo, include needs a list of `{NAME: VALUE, ...}`",
        ),
        (
            "notebooks: [demo]\ngrid: {seed: [1]}\nexclude: [{seed: 2}]",
            "exclude seed=2 agrees with no report; correct or remove it",
        ),
        (
            "notebooks: [demo]\ninclude: [{seed: 1}]\nexclude: [{seed: 9}]",
            "exclude seed=9 agrees with no report; correct or remove it",
        ),
        (
            "notebooks: [demo]\ngrid: {seed: [1]}\nexclude: [{seed: 1}]",
            "sizes holds no report; exclude takes them all away",
        ),
        ("notebooks: [demo]\ngrid: {seed: [1, 01]}", "demo with seed=1 comes twice; remove one"),
        (
            "notebooks: [demo]\ngrid: {seed: [1, 2]}\nnames: '{notebook}'",
            "two reports would be called demo: demo with seed=1, and demo with seed=2; put what "
            "they differ in into `names`",
        ),
        (
            "notebooks: [demo]\nnames: ../{seed}",
            "the report's name '../9' does not name a folder below the output; use letters, "
            "digits, - and _",
        ),
        (
            "notebooks: [demo]\nname: ../x",
            "the name '../x' does not name a folder below the output; use letters, digits, - and _",
        ),
        (
            "notebooks: [demo]\nnames: '{sed}'",
            "names has {sed}, which is no parameter of demo; did you mean 'seed'? give plain ones, "
            "as in '{notebook}-{model}-{seed}'",
        ),
        (
            "notebooks: [demo]\nnames: '{model.__class__}'",
            "names has {model.__class__}, which is no parameter of demo; give plain ones, as in "
            "'{notebook}-{model}-{seed}'",
        ),
        (
            "notebooks: [demo]\nnames: '{seed:3}'",
            "names has {seed:3}, which is no parameter of demo; did you mean 'seed'? give plain "
            "ones, as in '{notebook}-{model}-{seed}'",
        ),
        (
            "notebooks: {demo: {grid: {seed: [1]}, exclude: [{seed: 2}]}}",
            "exclude seed=2 agrees with no report; correct or remove it",
        ),
        (
            "notebooks: [demo]\ntimeout: {report: 0}",
            "timeout, report, is '0'; needs seconds, such as 600",
        ),
        (
            "notebooks: [demo]\nnames: '{seed'",
            "names is '{seed'; needs text such as '{notebook}-{model}-{seed}'",
        ),
        (
            "notebooks: [demo]\ninclude: [{model: p, kinds: [Qr]}, {model: pq, kinds: [r]}]\n"
            "names: '{model}{kinds}'",
            "two reports would be called pqr: demo with model=p, kinds=['Qr'], and demo with "
            "model=pq, kinds=['r']; put what they differ in into `names`",
        ),
        ("notebooks: [demo]\nout: [x]", "out is ['x']; needs a folder"),
        ("notebooks: [demo]\ntimeout: {cell: -1}", "timeout, cell, is '-1'; needs seconds, such as 600"),
        ("notebooks: [demo]\ntimeout: {cell: nan}", "timeout, cell, is 'nan'; needs seconds, such as 600"),
        ("notebooks: [demo]\ntimeout: 60", "timeout is '60'; needs `{cell: SECONDS, report: SECONDS}`"),
        (
            "notebooks: [demo]\ntimeout: {cel: 1}",
            "timeout has no 'cel'; did you mean 'cell'? there are cell, report",
        ),
        ("notebooks: [demo]\nnotebooks: [short]", "sizes.yaml, line 2, has notebooks twice; give it once"),
        (
            "notebooks: [demo]\ngrid:\n  model: !!python/object/apply:os.system ['touch ran']",
            "sizes.yaml, line 3, has the tag tag:yaml.org,2002:python/object/apply:os.system; a "
            "grid is data alone, remove the tag",
        ),
        (
            "notebooks: [demo]\ngrid: {seed: !x [1]}",
            "sizes.yaml, line 2, has the tag !x; a grid is data alone, remove the tag",
        ),
        (
            "notebooks: [demo]\ngrid: {lags: &a [*a]}",
            "sizes.yaml holds itself by an alias; write it out",
        ),
        ("? [demo]\n: 3", "sizes.yaml, line 1, has a key that is not a word"),
    ],
)  # fmt: skip
def test_each_bad_file_has_its_line(here, text, line):
    with pytest.raises(InputError) as caught:
        read(text)
    assert str(caught.value) == f"grid: {line}"
    assert sorted(p.name for p in here.iterdir()) == ["notebooks", "sizes.yaml"]


def test_files_that_cannot_be_read(here):
    with pytest.raises(InputError) as caught:
        read_grid("none.yaml")
    assert str(caught.value) == "grid: cannot read none.yaml (No such file or directory)"
    Path("sizes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match=r"^grid: sizes.yaml is not YAML \("):
        read_grid("sizes.yaml")
    with pytest.raises(InputError, match=r"^grid: sizes.yaml is not YAML \(maximum recursion"):
        read("a: " + "[" * 600)


def test_few_lines_that_stand_for_a_billion_values(here):
    # 10 aliases of 10 aliases of ...: 10^9 values
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(InputError) as caught:
        read("\n".join(lines))
    # the fifth: 10^6 values and the lists around them
    assert str(caught.value) == (
        "grid: sizes.yaml, line 6, stands for more than 1,000,000 values by its aliases; write out "
        "what is meant"
    )
    # an alias that is used as it is meant
    grid = read("notebooks: {demo: {grid: {seed: &s [0, 1]}}, short: {grid: {seed: *s}}}")
    assert len(grid.plans) == 4


def test_a_grid_of_a_million_is_counted_not_made(here):
    # 10^12 would take days to make
    hundred = {name: list(range(1000)) for name in ("model", "seed", "rate", "limit")}
    hundred["model"] = list(map(str, hundred["model"]))
    with pytest.raises(InputError) as caught:
        read_grid({"name": "huge", "notebooks": ["demo", "short"], "grid": hundred})
    assert str(caught.value) == (
        "grid: huge has 1,000,000,001,000 reports, more than 10,000; give fewer values, or --yes "
        "if they are meant"
    )


def test_yes_takes_many(here, monkeypatch):
    monkeypatch.setattr("workbench.grid.LIMIT", 3)
    raw = {"notebooks": ["demo"], "grid": {"seed": [1, 2, 3, 4]}}
    with pytest.raises(InputError, match="4 reports, more than 3;"):
        read_grid(raw)
    assert len(read_grid(raw, yes=True).plans) == 4
    with pytest.raises(InputError, match="5 reports, more than 3;"):
        read_grid(raw | {"include": [{"seed": 5}]})
    # what is taken away counts: it has to be gone through
    raw["exclude"] = [{"seed": 4}]
    with pytest.raises(InputError, match="4 reports, more than 3;"):
        read_grid(raw)
    assert len(read_grid(raw | {"grid": {"seed": [1, 2, 4]}}).plans) == 2


def test_only_by_name_notebook_and_pattern(here):
    grid = read("notebooks: [demo, short]\ngrid: {seed: [0, 1]}")
    chosen = {w: [p.name for p in grid.only([w])] for w in ("demo", "*-1", "short-seed-0")}
    assert chosen == {
        "demo": ["demo-seed-0", "demo-seed-1"], "*-1": ["demo-seed-1", "short-seed-1"], "short-seed-0": ["short-seed-0"],
    }  # fmt: skip
    assert grid.only(()) == grid.plans
    assert [p.name for p in grid.only(["*-1", "demo"])] == [
        "demo-seed-0",
        "demo-seed-1",
        "short-seed-1",
    ]
    with pytest.raises(InputError) as caught:
        grid.only(["demo-seed-3"])
    assert str(caught.value) == (
        "grid: --only 'demo-seed-3' names no report of sizes; did you mean 'demo-seed-1'? --dry-run "
        "lists them"
    )


# what a report depends on


def plan_of(path: Path, **given) -> Plan:
    found = read_notebook(path)
    return Plan(found, *found.check(given))


@pytest.fixture
def inputs(here):
    """A notebook with a model, texts and a corpus, and files for them."""
    path = notebook(
        here,
        "n",
        'model: str = ""\nitems: str = ""\ncorpus: str = ""\nfiles: list[str] = []\n'
        'keep: str = ""\nseed: int = 0\nresults: str = ""',
        "1",
    )
    folder = here / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (here / "items.jsonl").write_text("a")
    return path


def depends(path: Path, **given) -> tuple[dict, str]:
    found = fingerprint(plan_of(path, **given))
    return found, key_of(found)


def test_a_key_changes_with_each_thing_it_stands_for(here, inputs):
    usual = {"model": "m", "items": "items.jsonl", "files": ["m", "items.jsonl", "absent"]}
    first, key = depends(inputs, **usual)
    assert sorted(first["inputs"]) == ["files[0]", "files[1]", "items", "model"]
    assert first["inputs"]["files[1]"] == first["inputs"]["items"]
    assert depends(inputs, **usual) == (first, key)
    assert len(key) == 32 and "results" not in first["parameters"]

    def changed() -> set[str]:
        found, new = depends(inputs, **usual)
        parts = {name for name in first if found[name] != first[name]}
        assert (new != key) == bool(parts)
        return parts

    # a default counts as much as what was given
    assert depends(inputs, **usual | {"seed": 0})[1] == key
    assert depends(inputs, **usual | {"seed": 1})[1] != key
    (here / "items.jsonl").write_text("b")
    assert changed() == {"inputs"}
    (here / "items.jsonl").write_text("a")
    assert changed() == set()
    # what no loader reads of a folder, and what is hidden
    for name in ("optimizer.pt", ".hidden"):
        (here / "m" / name).write_text("x")
    assert changed() == set()
    (here / "m" / "sub").mkdir()
    (here / "m" / "sub" / "model.safetensors").write_bytes(b"more")
    assert changed() == {"inputs"}
    (here / "m" / "sub" / "model.safetensors").rename(here / "m" / "moved.safetensors")
    moved = depends(inputs, **usual)[1]
    (here / "m" / "moved.safetensors").rename(here / "m" / "again.safetensors")
    assert changed() == {"inputs"} and depends(inputs, **usual)[1] != moved
    (here / "m" / "again.safetensors").unlink()
    # outputs, counts and metadata of a notebook are not its sources
    saved = json.loads(inputs.read_text())
    stream = {"output_type": "stream", "name": "stdout", "text": "1"}
    saved["cells"][1] |= {
        "outputs": [stream],
        "execution_count": 7,
        "metadata": {"collapsed": True},
    }
    saved["metadata"] = {"kernelspec": {"name": "other"}}
    inputs.write_text(json.dumps(saved))
    assert changed() == set()
    saved["cells"][1]["source"] = "2"
    inputs.write_text(json.dumps(saved))
    assert changed() == {"notebook"}


def test_what_a_report_writes_is_no_input_of_it(here, inputs):
    assert depends(inputs, keep="m")[0]["inputs"] == {}


def test_suites_packages_and_the_hub(here, inputs, monkeypatch):
    from workbench.suite import specification

    usual = specification().hash
    assert depends(inputs, model="suite")[0]["inputs"] == {"model": usual}
    # a folder of that name is not what loaders take it for, and other parameters name no suite
    (here / "suite").mkdir()
    assert depends(inputs, model="suite")[0]["inputs"]["model"] == usual
    (here / "text.txt").write_text("One. Two.")
    found = depends(inputs, model="suite", corpus="text.txt")[0]["inputs"]
    assert found["model"] == specification("text.txt").hash != usual
    with pytest.raises(InputError, match=r"^load_suite: no text file at none.txt$"):
        depends(inputs, model="suite", corpus="none.txt")
    assert depends(inputs, model="pip:numpy")[0]["inputs"]["model"] == np_version()
    assert depends(inputs, model="pip:no-such")[0]["inputs"] == {}
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "hub"))
    assert depends(inputs, model="some/model")[0]["inputs"] == {}
    refs = here / "hub" / "models--some--model" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc123")
    assert depends(inputs, model="some/model")[0]["inputs"] == {"model": "abc123"}
    assert depends(inputs, items="some/model")[0]["inputs"] == {}
    # not kept here: the hub is asked, unless it is a path that is not there
    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def answer(self, name, timeout):
        asked.append(name)
        if name == "gone":
            raise OSError("no such model")
        return SimpleNamespace(sha="newest")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", answer)
    assert depends(inputs, model="other/model")[0]["inputs"] == {"model": "newest"}
    assert depends(inputs, model="gone")[0]["inputs"] == {}
    assert depends(inputs, model="./other")[0]["inputs"] == {}
    assert depends(inputs, model="some/model")[0]["inputs"] == {"model": "abc123"}
    assert asked == ["other/model", "gone"]
    # too long or odd for a path
    assert depends(inputs, items="x" * 5000)[0]["inputs"] == {}
    assert depends(inputs, items="~nobody-here/x\0")[0]["inputs"] == {}


def np_version() -> str:
    import numpy

    return numpy.__version__


def test_the_packages_own_source_counts(inputs, monkeypatch, tmp_path):
    before = Hashes().package()
    assert before == Hashes().package()
    source = tmp_path / "copy" / "workbench"
    (source / "probes").mkdir(parents=True)
    monkeypatch.setattr(prints, "_PACKAGE", source)
    found = set()
    for place, text in (("a.py", "1"), ("a.py", "2"), ("probes/a.py", "2")):
        (source / place).write_text(text)
        found.add(Hashes().package())
    (source / "notes.txt").write_text("x")
    found.add(Hashes().package())
    # the same file in another folder
    (source / "a.py").unlink()
    found.add(Hashes().package())
    assert len(found) == 4 and before not in found
    assert all(each.startswith("0.1.0+") for each in found)


def test_large_files_are_read_once(here, monkeypatch):
    monkeypatch.setattr(prints, "LARGE", 4)
    file = here / "weights"
    file.write_bytes(b"12345")
    read_files = []
    real = Hashes._bytes
    monkeypatch.setattr(Hashes, "_bytes", lambda self, p: read_files.append(p) or real(self, p))

    def look() -> str:
        hashes = Hashes()
        found = hashes.path(file)
        assert hashes.path(file) == found
        hashes.save()
        return found

    # changed just now: it may change again within one tick of the clock
    first = look()
    look()
    assert len(read_files) == 2
    old = time.time() - 60
    os.utime(file, (old, old))
    assert look() == look() == first
    assert len(read_files) == 3
    file.write_bytes(b"54321")
    os.utime(file, (old + 1, old + 1))
    assert look() != first
    assert len(read_files) == 4
    # a memory that was spoilt is no memory
    (here / "cache" / "hashes.json").write_text("[")
    look()
    assert len(read_files) == 5
    # files that are gone are forgotten
    file.rename(here / "moved")
    hashes = Hashes()
    hashes.path(here / "moved")
    hashes.save()
    assert list(json.loads((here / "cache" / "hashes.json").read_text())) == [str(here / "moved")]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_an_input_that_cannot_be_read(here, inputs):
    (here / "items.jsonl").chmod(0)
    with pytest.raises(InputError) as caught:
        depends(inputs, items="items.jsonl")
    assert str(caught.value) == (
        f"fingerprint: cannot read {here / 'items.jsonl'} (Permission denied); make it readable, "
        "or give another"
    )


# runs

COUNTS = (
    "seed: int = 0\nbad: bool = False\nresults: str = ''",
    "open('ran', 'a').write(f'{seed} ')",
    "assert not bad",
)
RUNS = "notebooks: [counts]\ngrid: {seed: [0, 1]}\ninclude: [{seed: 2, bad: yes}, {seed: 3}]\n"


@pytest.fixture
def same_package(monkeypatch):
    """So that an edit of the package between two runs of a test does not count."""
    monkeypatch.setattr(Hashes, "package", lambda self: "0")


def write_status(folder: Path, **about) -> None:
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"name": folder.name} | about))
    (folder / "report.html").write_text("")


def test_states_and_times_without_running(here):
    grid = read("notebooks: [demo, short]\ngrid: {seed: [0, 1, 2, 3]}")
    out = here / "out"
    keys = {plan.name: plan.key for plan in grid.plans}
    write_status(
        out / "demo-seed-0", notebook="demo", status="ok", key=keys["demo-seed-0"], seconds=10
    )
    write_status(
        out / "demo-seed-1", notebook="demo", status="failed", key=keys["demo-seed-1"], seconds=99
    )
    other = grid.plans[2].fingerprint | {"package": "0.0.1", "inputs": {"model": "x"}}
    about = {"notebook": "demo", "status": "ok", "key": "other", "seconds": 20}
    write_status(out / "demo-seed-2", **about, fingerprint=other)
    write_status(out / "elsewhere", notebook="demo", status="ok", key="x", seconds=60)
    (out / "broken").mkdir()
    (out / "broken" / "status.json").write_text("{")
    before = sorted(p.relative_to(here) for p in here.rglob("*"))

    def states(**options) -> dict:
        table = plan_states(grid.plans, out, **options)
        return {r: (s, t) for r, s, t in table[["report", "state", "seconds"]].values.tolist()}

    found = states()
    # the median of 10, 20 and 60; failed ones say nothing of how long a report takes
    assert found["demo-seed-0"] == ("cached", 0)
    assert found["demo-seed-1"] == ("failed before", 0)
    assert found["demo-seed-2"] == ("changed", 20)
    assert found["demo-seed-3"] == ("new", 20)
    why = plan_states(grid.plans, out).set_index("report")["why"]
    assert why.loc["demo-seed-0":"demo-seed-3"].tolist() == ["", "", "package, inputs", ""]
    assert found["short-seed-0"][0] == "new" and pd.isna(found["short-seed-0"][1])
    assert states(retry_failed=True)["demo-seed-1"] == ("retry", 20)
    assert states(retry_failed=True)["demo-seed-0"] == ("cached", 0)
    assert states(force=True)["demo-seed-0"] == ("forced", 20)
    assert sorted(p.relative_to(here) for p in here.rglob("*")) == before


def test_the_dry_run_as_printed(here, capsys, same_package):
    Path("sizes.yaml").write_text("notebooks: [demo, short]\ngrid: {seed: [0, 1]}\nout: there")
    grid = read_grid("sizes.yaml")
    key = grid.plans[0].key
    write_status(here / "there" / "demo-seed-0", notebook="demo", status="ok", key=key, seconds=30)
    before = sorted(p.name for p in here.rglob("*"))
    status, out, err = call(capsys, "grid", "sizes.yaml", "--dry-run", "--jobs", "2")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "demo-seed-0   cached",
        "demo-seed-1   new     about 30.0 s",
        "short-seed-0  new     time unknown",
        "short-seed-1  new     time unknown",
        "3 of 4 would run (1 cached, 3 new); about 15.0 s with --jobs 2; of short the time is not "
        "known yet",
    ]
    assert sorted(p.name for p in here.rglob("*")) == before


def test_a_thousand_reports_are_looked_through_without_reading_inputs_again(here, monkeypatch):
    asked = []
    real = Hashes._folder
    monkeypatch.setattr(Hashes, "_folder", lambda self, p: asked.append(p) or real(self, p))
    (here / "m").mkdir()
    (here / "m" / "config.json").write_text("{}")
    grid = read_grid(
        {"notebooks": ["demo"], "defaults": {"model": "m"}, "grid": {"seed": range(1000)}}
    )
    states = plan_states(grid.plans, here / "out")
    assert states["state"].tolist() == ["new"] * 1000
    assert asked == [str(here / "m")]


def test_runs_resume_retry_and_force(here, capsys, same_package):
    notebook(here / "notebooks", "counts", *COUNTS)
    Path("sizes.yaml").write_text(RUNS)

    def ran() -> str:
        text = Path("ran").read_text() if Path("ran").exists() else ""
        Path("ran").write_text("")
        return " ".join(sorted(text.split()))

    first = run_grid("sizes.yaml")
    # a cell that fails lets no other start
    assert first["status"].tolist() == ["ok", "ok", "failed", "missing"]
    assert first["report"].tolist()[2] == "counts-seed-2-bad-true"
    assert first["error"].tolist()[2].startswith("AssertionError")
    assert list(first.columns) == [
        "report", "notebook", "status", "seconds", "cached", "error", "folder", "seed", "bad",
    ]  # fmt: skip
    assert first["seed"].tolist() == [0, 1, 2, 3]
    assert ran() == "0 1 2"
    planned = json.loads((here / "reports" / "sizes" / ".grid" / "sizes.json").read_text())
    assert [p["name"] for p in planned] == first["report"].tolist()
    assert planned[2]["given"] == {"seed": 2, "bad": True}
    assert len(planned[0]["key"]) == 32
    assert (here / "reports" / "sizes" / "index.html").is_file()
    # unchanged failures are shown and not run again, and stop nothing
    status, out, _ = call(capsys, "grid", "sizes.yaml")
    assert (status, ran()) == (1, "3")
    assert out.splitlines()[0].startswith("counts-seed-2-bad-true  failed: AssertionError")
    assert out.splitlines()[1:] == [
        "4 reports: 3 ok, 1 failed; 2 were there", "index: reports/sizes/index.html",
    ]  # fmt: skip
    status, _, _ = call(capsys, "grid", "sizes.yaml", "--retry", "failed", "--keep-going")
    assert (status, ran()) == (1, "2")
    status, out, _ = call(capsys, "grid", "sizes.yaml", "--force", "--only", "*-1-*")
    assert (status, ran()) == (0, "1")
    # an edited notebook is another
    notebook(here / "notebooks", "counts", COUNTS[0], *COUNTS[1:2])
    states = plan_states(read_grid("sizes.yaml").plans, "reports/sizes")
    assert states["state"].tolist() == ["changed"] * 4


def test_a_folder_behind_a_url(here, same_package):
    notebook(here / "notebooks", "counts", *COUNTS)
    raw = {"notebooks": ["counts"], "grid": {"seed": [0, 1]}, "out": f"file://{here}/far"}
    table = run_grid(raw, only=["counts-seed-1"])
    assert table[["report", "status", "folder"]].values.tolist() == [
        ["counts-seed-1", "ok", f"file://{here}/far/counts-seed-1"]
    ]
    assert table.attrs["site"] == f"file://{here}/far/index.html"
    far = here / "far"
    assert {"counts-seed-1", ".grid", "index.html"} <= {p.name for p in far.iterdir()}
    # all of the grid, though only one was asked for
    assert len(json.loads((far / ".grid" / "grid.json").read_text())) == 2
    grid = read_grid(raw)
    assert plan_states(grid.plans, grid.out)["state"].tolist() == ["new", "cached"]


def test_output_that_cannot_be(here, capsys):
    Path("sizes.yaml").write_text("notebooks: [short]")
    Path("file").write_text("mine")
    (here / "out" / "short").mkdir(parents=True)
    (here / "out" / "short" / "mine").write_text("")
    for words, line in (
        (["--out", "file"], f"report: {here}/file is a file; choose a folder with --out"),
        (["--out", "file/x"], f"report: cannot write to {here}/file/x (Not a directory); free some "
                              "space, or choose another folder with --out"),
        (["--out", "out"], f"report: {here}/out/short is there already and is not a report; move "
                           "it away, or choose another folder with --out"),
        (["--jobs", "0"], "grid: --jobs is 0, needs at least 1"),
        (["--retry", "all"], "grid: --retry is 'all'; there is only --retry failed"),
        (["--only", "x"], "grid: --only 'x' names no report of sizes; --dry-run lists them"),
    ):  # fmt: skip
        assert call(capsys, "grid", "sizes.yaml", *words) == (2, "", line + "\n")
    assert sorted(p.name for p in (here / "out").iterdir()) == ["short"]
