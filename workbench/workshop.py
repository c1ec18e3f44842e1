"""Exercises of the workshop: self-checks that say what is wrong, and hints that give away more and more.

In a notebook::

    from workbench.workshop import check, hint

    share = ...                       # your turn
    check("1.2", share, final)        # the last line of the cell; stuck? hint("1.2", 1), then 2, 3

How a session is written
------------------------
*Notebooks.* ``notebooks/workshop/N_name.ipynb`` is what the reader works in,
``N_name_solution.ipynb`` the same with the exercises solved (``1_controls_and_floors``,
``2_extraction_and_membership``, ``3_forgetting_curves``, ``4_profiles_and_twins``,
``5_curvature_and_editing``). No outputs, stable cell ids, no ``parameters`` cell: a session is
about the embedded suite, ``load_suite()`` or ``load_subject()``. About 8 lines a code cell, no
``def``, no ``class``; figures by ``plot_*``. Code of a session takes under two minutes on two cores
once the suite is cached, and under one is better.

*First cell.* Markdown: ``# Session N: title``, then paragraphs that begin ``**Goals.**``,
``**Time.**`` and ``**You need.**``. Prose, formula, a few lines, a figure, a question alternate.

*Exercises* are named ``N.1``, ``N.2``, ... in the order of the notebook, 4 to 6 a session. Each is
one code cell with the tag ``exercise`` whose last line is ``check("N.k", what was made, ...)``,
the same line in both notebooks; before it stands a markdown cell that asks. An unsolved cell runs
without an exception (``Run All`` goes through, so later cells must not build on unsolved names) and
fails its check: either it has ``...`` where the reader writes, or it is a planted error, complete
code with a wrong result. Exercise ``N.1`` is a planted error of a kind that published figures have
had (a confusion matrix with its arguments swapped, a floor read as a result, a baseline left out);
its cell has the tags ``exercise`` and ``planted``.

*Solution notebook.* The same cells with the same ids; only cells with the tag ``exercise`` differ.
Markdown cells with the tag ``solution`` may be added, which say why.

*Judges* live in ``workbench/exercises/session_N.py``, which holds one mapping::

    EXERCISES = {
        "1.2": Exercise(
            needs="a share, one number from 0 to 1",
            judge=judge_share,
            right="One sentence on what the right answer says.",
            hints=("where to look", "what to call", "nearly all of it"),
        ),
    }

``judge(*given) -> str`` gets what ``check`` was given after the name and returns what is wrong, in a
sentence or two, or ``""``. It recomputes the truth from what it is given (the table at hand), so
that it holds for any suite, and knows the typical mistakes apart: at least two different messages
an exercise, each of which says what the answer looks like and what that would mean, never only
"no", and does not hand over the solution. An ``...`` and an exception inside the judge are dealt with
here. Hints: three, graded: where to look, which function or idea, nearly the line.

*Tests.* ``tests/test_workshop.py`` takes up every notebook in the folder by itself: it compares the
pair cell by cell, and runs both in one kernel on the real suite, each unsolved exercise cell right
before its solution: the first must fail its check, the second pass, no cell may raise, and the
kernel's processor time must stay under two minutes. Your own ``tests/test_exercises_N.py`` puts wrong
answers to your judges, by ``check(...)``, and reads the messages (no model, milliseconds).
"""

from __future__ import annotations

import html
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from workbench.table import InputError

COLOUR = {  # JupyterLab's own, so that they go with a dark page too
    "right": "--jp-success-color1, #388e3c",
    "not yet": "--jp-warn-color1, #e65100",
    "hint": "--jp-info-color1, #0277bd",
}
SYMBOL = {"right": "✓", "not yet": "✗", "hint": "?"}


@dataclass(frozen=True)
class Exercise:
    """What a reader is asked, and how the answer is judged.

    Attributes:
        needs: What goes where the dots are, as in "a share, one number from 0 to 1".
        judge: What is wrong with what ``check`` is given, in a sentence or two; "" if nothing is.
        right: What the right answer says.
        hints: From where to look to nearly all of it.
    """

    needs: str
    judge: Callable[..., str]
    right: str
    hints: tuple[str, ...]


@dataclass(frozen=True)
class Note:
    """A verdict or a hint, as a notebook shows it.

    Attributes:
        name: Of the exercise.
        kind: "right", "not yet" or "hint".
        says: In words.
    """

    name: str
    kind: str
    says: str

    @property
    def passed(self) -> bool:
        return self.kind == "right"

    def __repr__(self) -> str:
        return f"{SYMBOL[self.kind]} {self.name} {self.kind}: {self.says}"

    def _repr_html_(self) -> str:
        colour = f"var({COLOUR[self.kind]})"
        return (
            f'<div role="status" style="border-left:.3em solid {colour};padding:.3em .8em;'
            f'max-width:50em"><b style="color:{colour}">{SYMBOL[self.kind]} {html.escape(self.name)} '
            f"{self.kind}</b><br>{html.escape(self.says)}</div>"
        )


def check(name: str, *given: object) -> Note:
    """Whether an exercise is solved, and if not, what is wrong.

    Args:
        name: Of the exercise, such as ``"1.2"``.
        given: What the exercise asks for, and what it is judged against.

    Raises:
        InputError: No such exercise.
    """
    exercise = find(name, "check")
    if any(each is ... for each in given):
        return Note(name, "not yet", f"There are still dots in it. It needs {exercise.needs}.")
    try:
        wrong = exercise.judge(*given)
    except Exception as error:  # whatever a reader wrote: the notebook goes on
        told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        wrong = f"This cannot be judged ({told[:200]}). It needs {exercise.needs}."
    return Note(name, "not yet", wrong) if wrong else Note(name, "right", exercise.right)


def hint(name: str, n: int = 0) -> Note:
    """The n-th hint for an exercise: the first says where to look, the last nearly all.

    Args:
        name: Of the exercise, such as ``"1.2"``.
        n: From 1; 0 says how many there are.

    Raises:
        InputError: No such exercise, or no such hint.
    """
    hints = find(name, "hint").hints
    if n == 0:
        return Note(name, "hint", f'There are {len(hints)}: hint("{name}", 1) is the mildest.')
    if n not in range(1, len(hints) + 1):
        raise InputError(f"hint: exercise {name} has hints 1 to {len(hints)}, not {n}")
    return Note(name, "hint", f"({n} of {len(hints)}) {hints[n - 1]}")


def find(name: str, asker: str) -> Exercise:
    """The exercise of a name; ``asker`` is who is named if there is none.

    Raises:
        InputError: No such session or exercise.
    """
    session = str(name).partition(".")[0]
    where = f"workbench.exercises.session_{session}"
    try:
        exercises = importlib.import_module(where).EXERCISES
    except ModuleNotFoundError as error:
        if error.name != where:
            raise
        raise InputError(
            f'{asker}: no session of exercise {name!r}; names are "1.2" and the like'
        ) from None
    if name not in exercises:
        raise InputError(f"{asker}: no exercise {name!r}; there are {', '.join(exercises)}")
    return exercises[name]
