"""Sessions as a reader does them: unsolved, each exercise says what is wrong; solved, each passes."""

from __future__ import annotations

import copy
import importlib
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import workbench
from workbench.table import InputError
from workbench.workshop import Exercise, Note, check, find, hint

FOLDER = Path(workbench.__file__).parent.parent / "notebooks" / "workshop"
UNSOLVED = sorted(p for p in FOLDER.glob("*.ipynb") if not p.stem.endswith("_solution"))
CACHE = os.environ.get("WORKBENCH_CACHE")  # of the suite; tests themselves get one of their own
SECONDS = 120  # of processor time for a session's code
CALL = re.compile(r'^check\("(\d\.\d)", .+\)$')

each_session = pytest.mark.parametrize("path", UNSOLVED, ids=lambda p: p.stem)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def solved(path: Path):
    return read(path.with_name(f"{path.stem}_solution.ipynb"))


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def exercises(notebook) -> list:
    return [cell for cell in notebook.cells if "exercise" in tags(cell)]


def name_of(cell) -> str:
    """The exercise that a cell's last line checks."""
    found = CALL.match(cell.source.splitlines()[-1])
    assert found, f"the last line of an exercise is its check: {cell.source}"
    return found.group(1)


def test_every_session_has_a_solution():
    names = {p.stem for p in FOLDER.glob("*.ipynb")}
    assert {f"{p.stem}_solution" for p in UNSOLVED} | {p.stem for p in UNSOLVED} == names
    assert [p.stem[0] for p in UNSOLVED] == [str(n + 1) for n in range(len(UNSOLVED))]


@each_session
def test_a_session_says_what_it_is_and_carries_no_outputs(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith(f"# Session {path.stem[0]}: ")
    for word in ("**Goals.**", "**Time.**", "**You need.**"):
        assert re.search(rf"^{re.escape(word)} ", first.source, re.MULTILINE), word
    for notebook in (read(path), solved(path)):
        nbformat.validate(notebook)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                assert cell.outputs == [] and cell.execution_count is None, cell.source
                assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE), cell.source
                assert len(cell.source.splitlines()) <= 12, cell.source


@each_session
def test_only_exercises_differ_from_the_solution(path):
    mine, theirs = read(path), solved(path)
    kept = [cell for cell in theirs.cells if "solution" not in tags(cell)]
    assert [cell.id for cell in mine.cells] == [cell.id for cell in kept]
    for one, other in zip(mine.cells, kept, strict=True):
        assert (one.cell_type, tags(one)) == (other.cell_type, tags(other))
        assert (one.source == other.source) != ("exercise" in tags(one)), one.source
    ends = [[cell.source.splitlines()[-1] for cell in exercises(n)] for n in (mine, theirs)]
    assert ends[0] == ends[1], "a check is the same unsolved and solved"


@each_session
def test_exercises_stand_in_order_and_each_has_a_judge(path):
    session = path.stem[0]
    known = importlib.import_module(f"workbench.exercises.session_{session}").EXERCISES
    cells = exercises(read(path))
    assert [name_of(cell) for cell in cells] == list(known)
    assert list(known) == [f"{session}.{n + 1}" for n in range(len(known))]
    assert ["planted" in tags(cell) for cell in cells] == [True] + [False] * (len(cells) - 1)
    for each in known.values():
        assert isinstance(each, Exercise) and len(each.hints) == 3 and each.right and each.needs


@each_session
def test_unsolved_fails_its_checks_and_the_solution_passes(path, monkeypatch, tmp_path):
    """Both in one kernel: each exercise as it is found, then as it is solved."""
    monkeypatch.setenv("WORKBENCH_CACHE", CACHE) if CACHE else monkeypatch.delenv("WORKBENCH_CACHE")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    before = {cell.id: cell for cell in exercises(read(path))}
    both = solved(path)
    cells = []
    for cell in both.cells:
        if cell.id in before:
            found = copy.deepcopy(before[cell.id])
            found.id = f"{cell.id}-unsolved"
            cells.append(found)
        cells.append(cell)
    cells.append(nbformat.v4.new_code_cell("import time\ntime.process_time()"))
    both.cells = cells
    # an error in any cell is raised here, with the cell
    NotebookClient(both, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = {cell.id: result(cell) for cell in cells if "exercise" in tags(cell)}
    for name, cell in before.items():
        exercise = name_of(cell)
        assert told[f"{name}-unsolved"].startswith(f"✗ {exercise} not yet: "), exercise
        assert told[name].startswith(f"✓ {exercise} right: "), told[name]
        assert "cannot be judged" not in told[f"{name}-unsolved"], told[f"{name}-unsolved"]
        if "..." in cell.source:
            assert "There are still dots in it. It needs " in told[f"{name}-unsolved"]
    assert float(result(cells[-1])) < SECONDS


def result(cell) -> str:
    """What the cell's last line gave, as text."""
    given = [o for o in cell.outputs if o.output_type == "execute_result"]
    assert given, f"no result: {cell.source}"
    return given[-1].data["text/plain"]


# --- the mechanics themselves, on an exercise of two lines -----------------------------------------


def judge_two(value) -> str:
    if value < 0:
        return "The number is negative; a share is not."
    return "" if value == 2 else f"You have {value}, which is not one and one."


@pytest.fixture
def two(monkeypatch):
    from workbench.exercises import session_1

    made = Exercise("a number", judge_two, "One and one.", ("add", "add 1", "1 + 1"))
    monkeypatch.setattr(session_1, "EXERCISES", {"1.1": made, "1.2": made})


def test_a_check_says_what_is_wrong(two):
    assert check("1.1", 2) == Note("1.1", "right", "One and one.")
    assert check("1.1", 2).passed and not check("1.1", 3).passed
    assert check("1.1", 3).says == "You have 3, which is not one and one."
    assert check("1.1", -1).says == "The number is negative; a share is not."
    assert check("1.1", ...).says == "There are still dots in it. It needs a number."
    assert check("1.1", "a").says == (
        "This cannot be judged (TypeError: '<' not supported between instances of 'str' and "
        "'int'). It needs a number."
    )
    assert check("1.1").says.startswith("This cannot be judged (TypeError: judge_two() missing 1")


def test_a_note_is_text_and_page(two):
    assert repr(check("1.1", 2)) == "✓ 1.1 right: One and one."
    assert repr(check("1.1", 3)) == "✗ 1.1 not yet: You have 3, which is not one and one."
    page = Note("1.1", "not yet", "a < b")._repr_html_()
    assert "✗ 1.1 not yet" in page and "a &lt; b" in page and "var(--jp-warn-color1" in page


def test_hints_give_away_more_and_more(two):
    assert hint("1.1").says == 'There are 3: hint("1.1", 1) is the mildest.'
    assert [hint("1.1", n).says for n in (1, 2, 3)] == [
        "(1 of 3) add",
        "(2 of 3) add 1",
        "(3 of 3) 1 + 1",
    ]
    for wrong in (4, -1):
        with pytest.raises(InputError) as raised:
            hint("1.1", wrong)
        assert str(raised.value) == f"hint: exercise 1.1 has hints 1 to 3, not {wrong}"


def test_unknown_exercises_are_refused(two):
    with pytest.raises(InputError) as raised:
        check("1.9", 2)
    assert str(raised.value) == "check: no exercise '1.9'; there are 1.1, 1.2"
    with pytest.raises(InputError) as raised:
        hint("seven", 1)
    assert str(raised.value) == (
        "hint: no session of exercise 'seven'; names are \"1.2\" and the like"
    )


def test_a_judge_module_that_fails_to_import_is_no_missing_session(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'nothing'", name="nothing")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        find("1.1", "check")
