"""Imports point down only, and the light half of the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import workbench

PACKAGE = Path(workbench.__file__).parent

# a module imports only modules of a lower number; one that is missing here needs a place
LAYER = {
    "table": 0,
    "cache": 0.5,
    "items": 1,
    "decoding": 0.5,  # models stands on it
    "models": 1,
    "parameters": 1,
    "decoys": 2,
    "facts": 2,
    "foils": 2.5,  # it makes synonyms by lexicon and looks for copies by overlap
    "lexicon": 2,
    "overlap": 2,
    "training": 2,
    "factors": 2,
    "curvature": 2.5,
    "tensors": 2.5,  # roles are those of factors
    "fisher": 2.5,  # it takes labels and hooks from curvature
    "hessian": 3,
    "kronfluence": 2.5,
    "patches": 3,
    "sweep": 2,
    "suite": 3,
    "tasks": 3.5,  # it teaches on a suite, and the probe of tasks checks with it
    "subsets": 4,
    "subject": 5,
    "probes": 4,
    "stats": 4,
    "plots": 4,
    "recorder": 5,
    "retention": 5,
    "capacity": 5,
    "injection": 5,
    "results": 5,
    "savings": 6,
    "finetuning": 6,
    "streams": 5,
    "page": 5,
    "frozen": 5,
    "site": 5.5,
    "explore": 6,
    "engine": 5.7,
    "report": 6,
    "fingerprint": 4,  # of the suite's specification, among others
    "cluster": 6.3,
    "grid": 6.7,
    "reproduce": 6.5,
    "workshop": 6,
    "exercises": 6.5,  # judges; the workshop finds them by name
    "classroom": 6.7,  # it makes reports of the workshop's sessions
    "cli": 7,
    "__main__": 8,
}
LIGHT = (
    "table",
    "items",
    "facts",
    "foils",
    "parameters",
    "suite",
)  # what stats may stand on, and the CLI


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """Modules of this package that a file imports, ``probes.recall`` and the like."""
    known = {name_of(p) for p in FILES}
    names = {n.removeprefix("workbench.") for n in imported(path) if n.startswith("workbench.")}
    return names & known


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__init__.py"]


def top(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    name = name_of(path)
    assert top(name) in LAYER, f"{name} has no layer: give it one in this test and in DESIGN"
    for other in ours(path):
        below = LAYER[top(other)] < LAYER[top(name)]
        within = top(name) == top(other) in ("stats", "explore") or other == "plots.style"
        assert below or within, f"{name} imports {other}, which is not below it"


def test_table_imports_nothing_of_ours():
    assert ours(PACKAGE / "table.py") == set()


@pytest.mark.parametrize("path", sorted((PACKAGE / "stats").glob("[a-z]*.py")), ids=name_of)
def test_stats_never_import_torch_or_models(path):
    assert not {top(n) for n in imported(path)} & {"torch", "transformers", "safetensors"}
    assert {top(n) for n in ours(path)} <= {*LIGHT, "stats"} - {"suite", "parameters"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "plots").glob("[a-z]*.py")), ids=name_of)
def test_a_plot_imports_only_the_table_and_the_style(path):
    assert ours(path) - {"plots"} <= {"table", "plots.style"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "probes").glob("[a-z]*.py")), ids=name_of)
def test_a_probe_never_imports_another_probe(path):
    assert not [name for name in ours(path) if top(name) == "probes"]


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout.strip()


def test_importing_workbench_takes_no_torch():
    heavy = "torch transformers plotly pandas numpy papermill"
    code = f"import sys, workbench; print([m for m in {heavy.split()} if m in sys.modules])"
    assert run(code) == "[]"


def test_the_light_half_takes_no_torch():
    stats = [f"stats.{p.stem}" for p in (PACKAGE / "stats").glob("[a-z]*.py")]
    names = ", ".join(f"workbench.{n}" for n in (*LIGHT, "plots", *stats))
    assert run(f"import {names}, sys; print('torch' in sys.modules)") == "False"


def test_public_names_resolve():
    for name in workbench.__all__:
        home = getattr(getattr(workbench, name), "__module__", "workbench")  # METRICS is a dict
        assert home.startswith("workbench"), name
    with pytest.raises(AttributeError, match="module 'workbench' has no attribute 'nothing'"):
        _ = workbench.nothing
