"""Preparing a class: each session runs once, what fails is said, what is there is not made again."""

import nbformat
import pytest
from nbformat import v4

from tests.test_cli import call, signals_as_before  # noqa: F401
from workbench import classroom
from workbench.engine import Report
from workbench.table import InputError

SAYS = "from workbench.workshop import Note\nNote({name!r}, {kind!r}, 'a sentence')"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A workshop without sessions, and a suite that is there."""
    made = tmp_path / "notebooks" / "workshop"
    made.mkdir(parents=True)
    monkeypatch.setattr("workbench.classroom.FOLDER", made.parent)
    monkeypatch.setattr("workbench.classroom.ensure_suite", lambda: None)
    return made


def write_session(folder, name, *sources):
    cells = [
        v4.new_markdown_cell(f"# Session {name[0]}: a session"),
        *map(v4.new_code_cell, sources),
    ]
    nbformat.write(v4.new_notebook(cells=cells), folder / f"{name}.ipynb")


def test_only_solutions_run_in_their_order(folder):
    for name in ("2_b_solution", "2_b", "1_a_solution", "1_a"):
        write_session(folder, name)
    assert [path.stem for path in classroom.solutions()] == ["1_a_solution", "2_b_solution"]


def test_each_session_runs_and_what_fails_is_said(capsys, folder, tmp_path):
    """One that passes, one whose solution is not accepted here, one that breaks off."""
    marker = tmp_path / "ran"
    write_session(
        folder,
        "1_a_solution",
        f"open({str(marker)!r}, 'a').write('x')",
        SAYS.format(name="1.1", kind="right"),
    )
    write_session(
        folder,
        "2_b_solution",
        SAYS.format(name="2.1", kind="not yet"),
        SAYS.format(name="2.2", kind="right"),
        SAYS.format(name="2.3", kind="not yet"),
    )
    write_session(folder, "3_c_solution", "1 / 0")
    status, out, _ = call(capsys, "suite", "--workshop")
    assert status == 1
    assert marker.read_text() == "x"
    first, one, two, three, last = out.splitlines()
    assert first == (
        "the suite (about four minutes), then 3 sessions once each (a minute or two each, on two "
        "cores); what is there already is not made again"
    )
    assert one.split()[:2] == ["1_a", "ok"]
    assert two.split()[:2] == ["2_b", "failed"]
    assert two.endswith(
        " s  on this machine its own check does not accept the solution of 2.1, 2.3"
    )
    assert three.split()[:2] == ["3_c", "failed"]
    assert three.endswith("  ZeroDivisionError: division by zero")
    assert last == "not ready: see the lines above; what did work is kept"
    assert sorted(p.name for p in folder.iterdir()) == [
        "1_a_solution.ipynb",
        "2_b_solution.ipynb",
        "3_c_solution.ipynb",
    ]


def test_a_class_that_is_ready(tmp_path):
    # 12.4 and 30 seconds are 42.4
    reports = [
        Report("1_a_solution", tmp_path, "ok", 12.4),
        Report("2_bcd_solution", tmp_path, "ok", 30.0),
    ]
    assert classroom.describe_preparation(reports).splitlines() == [
        "1_a    ok        12 s",
        "2_bcd  ok        30 s",
        "ready: 2 sessions, 42 s in all; class needs no network",
    ]


def test_no_sessions_and_another_suite_are_refused(capsys, folder):
    with pytest.raises(InputError) as raised:
        classroom.solutions()
    assert str(raised.value) == (
        f"suite: there are no sessions in {folder}; install the workbench from its repository "
        "(pip install -e)"
    )
    assert call(capsys, "suite", "--workshop") == (2, "", f"{raised.value}\n")
    for words in (["--size", "gpu"], ["--corpus", "text.txt"], ["--show"]):
        assert call(capsys, "suite", "--workshop", *words) == (
            2,
            "",
            "suite: --workshop prepares the default suite, for which the sessions are written; "
            "leave out --size, --corpus and --show\n",
        )
