"""Run again and compare: the comparison on tables of a few rows, the runs on tiny notebooks."""

import json
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat import v4

from tests.test_cli import call, signals_as_before  # noqa: F401
from tests.test_report import write_notebook
from workbench.fingerprint import fingerprint
from workbench.parameters import FOLDER
from workbench.report import make_plans, run_reports
from workbench.reproduce import Agreement, compare, differing_cells, reproduce
from workbench.table import InputError, load, rows, save

TAGGED = {"tags": ["parameters"]}
PARAMETERS = 'seed: int = 0\nshift: str = ""  # a file whose number is added\nresults: str = ""\n'
STEADY = [
    v4.new_markdown_cell("# Does it come out again?\n\nIt does."),
    v4.new_code_cell(PARAMETERS, metadata=TAGGED),
    v4.new_code_cell(
        "from pathlib import Path\nfrom workbench.report import publish\n"
        "from workbench.table import rows\n"
        "add = float(Path(shift).read_text()) if shift else 0.0\n"
        "table = rows('auc', [.25 + add, .5, float('nan')], run='r', item=['a', 'b', 'c'],"
        " beside={'reason': ['', '', 'no pairs']})\nadd"
    ),
    v4.new_code_cell(
        "import os, time\n"
        "print(os.environ.get('WORKBENCH_CACHE_LIMIT'), os.environ.get('OMP_NUM_THREADS'))\n"
        "time.time()",
        metadata={"tags": ["varies"]},
    ),
    v4.new_code_cell(
        "publish(table, key={'AUC': rows('auc', .5 + add / 2 + seed / 8, run='r', lo=.25, hi=.75,"
        " n=3)}, results=results, passport={'seed': seed, 'weights': str(add)})"
    ),
]
FAILS = [*STEADY[:2], v4.new_code_cell("raise ValueError(f'seed {seed}')")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Reports of a notebook whose second run can be made to differ, and of one that fails."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "shift.txt").write_text("0.125")
    steady, fails = (
        write_notebook(folder, name, cells)
        for name, cells in (("steady", STEADY), ("fails", FAILS))
    )
    given = {"seed": "1", "shift": str(folder / "shift.txt")}
    run_reports([steady, fails], given, out=folder / "out", jobs=2)
    return folder


def frame(found: pd.DataFrame) -> list[tuple]:
    return [tuple(row) for row in found.itertuples(index=False)]


# the comparison


def test_numbers_by_hand():
    then = rows("auc", [0.25, 0.5, 0.75, np.nan], run="r", item=[*"abcd"], lo=0.125, n=7)
    # another order; a differs by 5e-6, more than 1e-8 + .25e-5; b by 4e-6, less than 1e-8 + .5e-5
    now = rows("auc", [np.nan, 0.75, 0.5 + 4e-6, 0.25 + 5e-6], run="r", item=[*"dcba"], lo=0.125)
    now["n"] = [7, 8, 7, 7]
    count, found = compare(then, now, part="table")
    # 4 rows with lo and n, 3 of them with a value, none with hi
    assert count == 11
    where = "run r, step 0, group all, item {}, metric auc"
    assert frame(found) == [
        ("table", where.format("a"), "value", "0.25", "0.250005"),
        ("table", where.format("c"), "n", "7", "8"),
    ]


@pytest.mark.parametrize(
    ("then", "now", "same"),
    [
        (1.0, 1.0 + 1e-5, True),  # rtol of the larger
        (1.0, 1.0 + 1.1e-5, False),
        (-2.0, -2.0 - 2e-5, True),
        (2.0, -2.0, False),
        (0.0, 1e-8, True),  # atol, with nothing to spare
        (0.0, 1.1e-8, False),
        (np.nan, np.nan, True),
        (np.nan, 0.0, False),
        (np.inf, np.inf, True),
        (np.inf, 1.0, False),
        (np.inf, -np.inf, False),
    ],
)
def test_what_is_near(then, now, same):
    tables = [rows("loss", value, run="r") for value in (then, now)]
    assert len(compare(*tables, part="table")[1]) == (not same)
    assert len(compare(*tables[::-1], part="table")[1]) == (not same)


def test_the_tolerances_are_the_callers():
    then, now = rows("loss", 2.0, run="r"), rows("loss", 2.5, run="r")
    assert compare(then, now, part="table", rtol=0.2)[1].empty  # .5 <= .2 * 2.5
    assert not compare(then, now, part="table", rtol=0.19, atol=0)[1].empty
    assert compare(then, now, part="table", rtol=0, atol=0.5)[1].empty


def test_undefined_agrees_only_for_the_same_reason():
    one, two, same = (
        rows("auc", np.nan, run="r", beside={"reason": reason})
        for reason in ("no pairs", "one class", "no pairs")
    )
    assert compare(one, same, part="table")[1].empty
    _, found = compare(one, two, part="table")
    assert frame(found)[0][2:] == ("reason", "no pairs", "one class")


def test_whole_numbers_have_no_tolerance():
    then, now = rows("auc", 0.5, run="r", n=10**9), rows("auc", 0.5, run="r", n=10**9 + 1)
    assert frame(compare(then, now, part="table")[1])[0][2:] == ("n", "1000000000", "1000000001")


def test_rows_and_columns_that_only_one_has():
    then = rows("auc", [0.1, 0.2], run="r", item=["a", "b"], beside={"lag": [1.0, np.nan]})
    now = rows(
        "auc", [0.1, 0.3], run="r", item=["a", "c"], beside={"lag": [1.0, np.nan], "se": 0.1}
    )
    count, found = compare(then, now, part="table")
    assert count == 2  # value and n of the row of a
    assert frame(found) == [
        ("table", "", "columns", "", "se"),
        ("table", "run r, step 0, group all, item b, metric auc", "", "the row", ""),
        ("table", "run r, step 0, group all, item c, metric auc", "", "", "the row"),
    ]
    count, found = compare(then, pd.DataFrame(), part="table")
    assert (count, frame(found)) == (0, [("table", "", "", "2 rows", "")])
    assert compare(pd.DataFrame(), pd.DataFrame(), part="table")[1].empty


def test_coordinates_that_are_floats_match_within_the_tolerance():
    then = rows("auc", 0.5, run="r", beside={"resolution": 1 / 3})
    now = rows("auc", 0.5, run="r", beside={"resolution": (1 + 1e-12) / 3})
    assert compare(then, now, part="table")[1].empty
    now["resolution"] = 0.33334
    assert len(compare(then, now, part="table")[1]) == 2  # one missing, one new


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from("ab"), st.floats(0, 1), st.floats(0, 1)),
        unique_by=lambda row: row[:2],
        min_size=1,
    ),
    st.randoms(),
)
def test_the_order_of_rows_is_nothing_and_a_loop_finds_the_same(drawn, random):
    steps, items, was, is_ = zip(*drawn, strict=True)
    then = rows("auc", was, run="r", step=list(steps), item=list(items))
    now = rows("auc", is_, run="r", step=list(steps), item=list(items))
    now = now.sample(frac=1, random_state=random.randrange(100))
    _, found = compare(then, now, part="table")
    different = {
        (step, item)
        for step, item, a, b in drawn
        if abs(a - b) > 1e-8 + 1e-5 * max(a, b)
    }  # fmt: skip
    assert len(found) == len(different)
    assert compare(then, then[::-1], part="table")[1].empty


def test_what_was_saved_agrees_with_what_was_not(tmp_path):
    # Parquet gives categoricals and 64-bit types back
    table = rows("auc", [0.5, np.nan], run="r", item=["a", "b"], beside={"reason": ["", "none"]})
    back = load(save(table, tmp_path / "table.parquet"))
    assert compare(table, back, part="table")[1].empty


def test_cells_that_differ_unless_they_are_marked():
    def notebook(*texts, tags=()):
        about = {"metadata": {"tags": list(tags)}}
        cells = [v4.new_code_cell("x", id=f"cell-{i}", **about) for i in range(len(texts))]
        for cell, text in zip(cells, texts, strict=True):
            cell.outputs = [v4.new_output("stream", text=text)]
        return v4.new_notebook(cells=cells)

    assert differing_cells(notebook("a", "b"), notebook("a", "b")) == []
    assert differing_cells(notebook("a", "b", "c"), notebook("a", "B", "C")) == [2, 3]
    assert differing_cells(notebook("a", tags=["varies"]), notebook("b", tags=["varies"])) == []
    assert differing_cells(notebook("a", tags=["varies"]), notebook(tags=["varies"])) == [1]
    assert differing_cells(notebook("a"), notebook("a", "b")) == [2]


def test_the_projects_cells_that_show_times_are_marked():
    times = re.compile(r"_seconds\b|\btime\.|datetime|timestamp")
    cells = [
        (path.stem, cell)
        for path in FOLDER.glob("*.ipynb")
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code" and times.search(cell.source)
    ]
    assert {name for name, _ in cells} == {"capacity", "what_did_finetuning_forget"}
    assert all("varies" in cell.metadata.get("tags", []) for _, cell in cells)


# the second run


def test_a_report_comes_out_again(made, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE_LIMIT", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    report = made / "out" / "steady"
    before = {path: path.read_bytes() for path in report.iterdir()}
    got = reproduce(report)
    assert got.agrees and got.differences.empty
    # value, lo, hi and n of the key number, two values and three n of the table
    assert got.numbers == 4 + 2 + 3
    assert (got.name, got.folder, got.origins, got.changed) == ("steady", report, {}, "")
    assert got.cells == []  # though the marked one shows the time
    assert got.lines == ["steady: all 9 numbers agree"]
    assert {path: path.read_bytes() for path in report.iterdir()} == before
    assert os.environ["WORKBENCH_CACHE_LIMIT"] == "3"
    assert "OMP_NUM_THREADS" not in os.environ


def test_what_differs_is_said_and_the_second_run_kept(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # a report of a grid that was sent: its name is not the notebook's
    report = shutil.copytree(made / "out" / "steady", tmp_path / "sent")
    (report / "steady.ipynb").rename(report / "steady-1.ipynb")
    notebook, shift = made / "steady.ipynb", made / "shift.txt"
    status = json.loads((report / "status.json").read_text())
    [plan] = make_plans([notebook], status["given"])
    status |= {"name": "steady-1", "fingerprint": fingerprint(plan)}
    status["versions"]["torch"] = "1.0"
    status["machine"]["threads"] = 3
    (report / "status.json").write_text(json.dumps(status))
    write_notebook(made, "steady", [*STEADY, v4.new_code_cell("1 / 0")])  # it would fail now
    shift.write_text("0.25")
    hashes = [status["fingerprint"]["inputs"]["shift"], fingerprint(plan)["inputs"]["shift"]]
    try:
        code, out, _ = call(capsys, "reproduce", str(report / "report.html"), "--out", "again")
    finally:
        shift.write_text("0.125")
        write_notebook(made, "steady", STEADY)
    assert code == 1
    # .5 + .125 / 2 + 1 / 8 and .5 + .25 / 2 + 1 / 8; .25 + .125 and .25 + .25
    assert out.splitlines() == [
        "steady-1: 2 differences among 9 numbers",
        "  key numbers, label AUC, metric auc, run r, step 0, value: was 0.6875, is 0.75",
        "  table, run r, step 0, group all, item a, metric auc, value: was 0.375, is 0.5",
        f"  made from: versions torch was 1.0, is {version('torch')}",
        "  made from: fingerprint inputs shift was {}, is {}".format(*hashes),
        "  made from: passport weights was 0.125, is 0.25",
        f"  {notebook} has changed since; the report's own copy was run",
        "  cells that show something else: 4, 6",
    ]
    again = tmp_path / "again"
    assert load(again / "steady-1" / "table.parquet")["value"][0] == 0.5
    assert (again / "index.html").is_file()
    kept = nbformat.read(again / "steady-1" / "steady-1.ipynb", as_version=4)
    # nothing is read from the cache, and as many threads as then
    assert kept.cells[4].outputs[0].text == "0 3\n"


def test_a_report_that_failed_fails_again(made):
    got = reproduce(made / "out" / "fails")
    assert got.agrees and got.numbers == 0
    assert got.lines == ["fails: no numbers, and it ended alike"]


def test_a_report_that_fails_now(made, tmp_path):
    report = shutil.copytree(made / "out" / "steady", tmp_path / "steady")
    (made / "shift.txt").write_text("half")
    try:
        got = reproduce(report)
    finally:
        (made / "shift.txt").write_text("0.125")
    assert list(got.origins) == ["fingerprint inputs shift"]
    assert [line for line in got.lines if "made from" not in line] == [
        "steady: 3 differences among 0 numbers",
        "  status: was ok, is failed: ValueError: could not convert string to float: 'half'",
        "  key numbers: was 1 row, is not there",
        "  table: was 3 rows, is not there",
        # 5 is marked, and has not run
        "  cells that show something else: 4, 6",
    ]


def test_many_differences_are_cut():
    found = compare(rows("auc", 0.5, run="r", step=range(12)), rows("auc", 0.6, run="r"), part="t")
    got = Agreement("x", Path("x"), found[0], found[1], {}, "", [], 1.0)
    # step 0 differs, 11 rows are gone
    assert got.lines[0] == "x: 12 differences among 2 numbers"
    assert got.lines[-1] == "  and 2 more" and len(got.lines) == 12


# what cannot be reproduced


def test_a_folder_that_is_no_report(made, tmp_path, capsys):
    assert call(capsys, "reproduce", str(tmp_path / "nope")) == (
        2,
        "",
        f"reproduce: {tmp_path / 'nope'} is not a report, it has no status.json; give the folder "
        "of one report, for example reports/memorization_profile\n",
    )
    with pytest.raises(InputError) as caught:
        reproduce(made / "out")
    assert str(caught.value) == (
        f"reproduce: {made / 'out'} is not a report, it holds fails, steady; give the folder of "
        "one report, for example reports/memorization_profile"
    )


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("status.json", "{", "reproduce: {}/status.json is damaged; make the report again"),
        ("status.json", "[]", "reproduce: {}/status.json is damaged; make the report again"),
        (
            "status.json",
            '{"name": "../x", "given": {}, "status": "ok"}',
            "reproduce: {}/status.json is damaged; make the report again",
        ),
        (
            "status.json",
            '{"name": "x", "given": {}, "status": "refused", "error": "load_model: no folder ./x"}',
            "reproduce: x was refused and has no numbers (load_model: no folder ./x)",
        ),
        (
            "steady.ipynb",
            "{",
            "reproduce: {}/steady.ipynb is damaged; make the report again by: workbench report x",
        ),
        (
            "steady.ipynb",
            None,
            "reproduce: {}/steady.ipynb is missing; make the report again by: workbench report x",
        ),
        ("key.json", "{", "reproduce: {}/key.json is damaged; make the report again"),
    ],
)
def test_a_damaged_report_is_refused_before_anything_runs(tmp_path, file, text, line):
    write_notebook(tmp_path, "steady", STEADY)
    about = {"name": "steady", "given": {}, "status": "ok", "command": "workbench report x"}
    (tmp_path / "status.json").write_text(json.dumps(about))
    if text is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(text)
    with pytest.raises(InputError) as caught:
        reproduce(tmp_path)
    assert str(caught.value) == line.format(tmp_path)


def test_a_damaged_table_and_tolerances_below_zero(made, tmp_path, capsys):
    report = shutil.copytree(made / "out" / "steady", tmp_path / "steady")
    (report / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"^load: .*table.parquet is not a whole Parquet file"):
        reproduce(report)
    code, _, err = call(capsys, "reproduce", str(report), "--rtol", "-1")
    assert (code, err) == (2, "reproduce: rtol is -1.0, needs at least 0\n")
    with pytest.raises(InputError) as caught:
        reproduce(made / "out" / "steady", out=made / "out")
    assert str(caught.value) == (
        f"reproduce: the second run would replace {made / 'out' / 'steady'}; choose another folder"
    )


def test_a_parameter_that_cannot_be_used_now_is_refused(made, tmp_path):
    report = shutil.copytree(made / "out" / "steady", tmp_path / "steady")
    status = json.loads((report / "status.json").read_text())
    (report / "status.json").write_text(json.dumps(status | {"given": {"sede": 1}}))
    with pytest.raises(InputError, match=r"^report: no parameter 'sede' in steady; did you mean"):
        reproduce(report)
