"""What conda users install is what pip users install."""

import re
import tomllib
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")
rattler = pytest.importorskip("rattler")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
CONDA_NAME = {"torch": "pytorch"}  # where the two channels call one package differently


def split(requirement: str) -> tuple[str, frozenset[str]]:
    """``pandas>=3.0,<4`` as its name and the set of its bounds."""
    name, bounds = re.fullmatch(r"([\w.-]+?)\s*((?:[<>=!~].*)?)", requirement).groups()
    return name.lower(), frozenset(b.strip() for b in bounds.split(",") if b.strip())


def conda_specs() -> list[str]:
    return [each for each in ENVIRONMENT["dependencies"] if isinstance(each, str)]


def pip_specs() -> list[str]:
    return [
        s for each in ENVIRONMENT["dependencies"] if isinstance(each, dict) for s in each["pip"]
    ]


def test_the_environment_holds_the_dependencies_of_pyproject():
    wanted = {split(each) for each in PROJECT["dependencies"]}
    from_pip = {split(each) for each in pip_specs()}
    assert from_pip <= wanted
    there = {(CONDA_NAME.get(name, name), bounds) for name, bounds in wanted - from_pip}
    assert {split(each) for each in conda_specs()} - {
        ("python", frozenset({PROJECT["requires-python"]})),
        ("pip", frozenset()),
    } == there


@pytest.mark.parametrize("spec", conda_specs())
def test_each_line_is_a_conda_spec(spec):
    match = rattler.MatchSpec(spec, strict=True)
    name, bounds = split(spec)
    assert match.name.normalized == name
    assert {b for b in re.split(r"[,|]", str(match.version or "")) if b} == bounds


def test_python_and_channel():
    assert PROJECT["requires-python"] == ">=3.11"
    assert f"python{PROJECT['requires-python']}" in conda_specs()
    assert ENVIRONMENT["channels"] == ["conda-forge"]
    assert "pip" in conda_specs()  # the pip section needs it
