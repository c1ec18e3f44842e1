"""A notebook's parameters: read from its tagged cell, and checked before anything runs.

papermill merely logs a parameter it does not know and runs on with the default, hands over "no"
as a string, and does not see an annotation with ``|``; so the cell is parsed here.
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import re
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from workbench.table import InputError

PILLARS = ("memorization_profile", "forgetting_curves", "retention_over_updates", "loss_curvature")
FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
TAG = "parameters"
RESULTS = "results"  # the parameter that every report sets itself
_SCALARS = {"str": str, "int": int, "float": float, "bool": bool}
_TRUTH = {"true": True, "yes": True, "false": False, "no": False}
_SENTENCE = re.compile(r"(.+?[.?!])(?=\s+[A-Z]|\s*$)", re.DOTALL)


@dataclass(frozen=True)
class Parameter:
    """One line of the tagged cell: ``prefix: int = 16  # prompt length, in tokens``."""

    name: str
    type: object
    shown: str
    default: object
    help: str

    def read(self, text: str):
        """The value that a ``-p NAME=VALUE`` text stands for; strings stay strings.

        Raises:
            ValueError: If the text is not of this parameter's type.
        """
        options = _options(self.type)
        if options and text.strip().lower() in ("none", "null"):
            return None
        kind = options[0] if options else self.type
        if kind is str:
            return text
        if kind is bool:
            if text.strip().lower() not in _TRUTH:
                raise ValueError(text)
            return _TRUTH[text.strip().lower()]
        return kind(text) if kind in (int, float) else json.loads(text)


@dataclass(frozen=True)
class Notebook:
    """A notebook that a report can be made from.

    ``title`` is its first heading, ``description`` the first sentence after it, in plain text.
    """

    name: str
    path: Path
    title: str
    description: str
    parameters: tuple[Parameter, ...]

    @property
    def names(self) -> list[str]:
        """What the user may set, in the order of the cell."""
        return [p.name for p in self.parameters if p.name != RESULTS]

    @cached_property
    def model(self):
        """The pydantic model of all parameters: strict types, nothing unknown."""
        from pydantic import ConfigDict, create_model

        return create_model(
            self.name,
            __config__=ConfigDict(
                extra="forbid", strict=True, validate_default=True, allow_inf_nan=False
            ),
            **{p.name: (p.type, p.default) for p in self.parameters},
        )

    def __getstate__(self) -> dict:
        # a pydantic model cannot be pickled, and is made again where it is needed
        return {name: value for name, value in self.__dict__.items() if name != "model"}

    def check(self, given: Mapping[str, object]) -> tuple[dict, dict]:
        """Settle the values given: texts are read as their parameter's type.

        Returns:
            The given values, and those of all parameters, both ready for JSON.

        Raises:
            InputError: An unknown name, or a value of the wrong type.
        """
        from pydantic import ValidationError

        by_name = {p.name: p for p in self.parameters}
        refuse_unknown(given, [self])
        values = {}
        for name, value in given.items():
            try:
                values[name] = by_name[name].read(value) if isinstance(value, str) else value
            except (ValueError, RecursionError):
                raise InputError(_wrong(self, by_name[name], value)) from None
        try:
            settled = self.model(**values).model_dump(mode="json")
        except ValidationError as error:
            name = error.errors()[0]["loc"][0]
            raise InputError(_wrong(self, by_name[name], given[name])) from None
        return {name: settled[name] for name in values}, settled


def _options(kind) -> tuple:
    """``(X, None)`` of ``X | None``, else nothing; ``list[int]`` has arguments but no choice."""
    return () if getattr(kind, "__origin__", None) is list else getattr(kind, "__args__", ())


def _wrong(notebook: Notebook, parameter: Parameter, value) -> str:
    example = parameter.default
    if isinstance(example, bool | list):
        example = json.dumps(example)
    about = f" ({parameter.help})" if parameter.help else ""
    return (
        f"report: {parameter.name} is {value!r}, but {notebook.name} needs {parameter.shown}"
        f"{about}, for example -p {parameter.name}={example}"
    )


def refuse_unknown(given: Mapping[str, object], notebooks: Sequence[Notebook]) -> None:
    """Refuse a name that none of the notebooks has, and ``results``.

    Raises:
        InputError: Names the first offender, the nearest name there is, and all that there are.
    """
    known = list(dict.fromkeys(name for notebook in notebooks for name in notebook.names))
    for name in given:
        if name == RESULTS:
            raise InputError(
                "report: results is set by the report itself; choose its folder with --out"
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise InputError(
                f"report: no parameter {name!r} in {', '.join(n.name for n in notebooks)}{hint} "
                f"there are {', '.join(known) or 'none'}"
            )


def read_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """Split ``NAME=VALUE`` texts.

    Raises:
        InputError: A text without ``=``, or a name given twice.
    """
    given: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise InputError(f"report: -p {pair!r} is not NAME=VALUE; write for example -p seed=1")
        if name.strip() in given:
            raise InputError(f"report: -p {name.strip()} is given twice; give it once")
        given[name.strip()] = value
    return given


def find_notebooks(names: Sequence[str] = (), *, every: bool = False) -> list[Notebook]:
    """The notebooks asked for by name or by path; the four pillars if none is.

    Args:
        names: Names of notebooks in the project's notebooks folder, or paths to ``.ipynb`` files.
        every: All in the folder, the pillars first.

    Raises:
        InputError: No such notebook (the nearest name is offered), or two of the same name.
    """
    there = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    if every and not there:
        raise InputError(f"report: no notebooks in {FOLDER}; name one by its path")
    if every:
        names = [*(p for p in PILLARS if p in there), *(n for n in there if n not in PILLARS)]
    found: dict[str, Path] = {}
    for name in names or PILLARS:
        path = _locate(str(name), there)
        if found.setdefault(path.stem, path) != path:
            raise InputError(
                f"report: {found[path.stem]} and {path} have the same name, and reports are kept "
                "by name; run them with different --out folders"
            )
    return [read_notebook(path) for path in found.values()]


def _locate(name: str, there: Mapping[str, Path]) -> Path:
    if name in there:
        return there[name]
    path = Path(name)
    if path.suffix == ".ipynb" and path.is_file():
        return path.resolve()
    if path.suffix == ".ipynb" and path.parent == Path() and path.stem in there:
        return there[path.stem]
    near = difflib.get_close_matches(name, there, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    listed = ", ".join(there) or f"none in {FOLDER}"
    raise InputError(f"report: no notebook {name!r}{hint} there are {listed}")


def read_notebook(path: str | Path) -> Notebook:
    """Read a notebook's title, description and parameters; nothing is executed.

    Raises:
        InputError: Not a notebook, or a parameter line that cannot be read (which, and why).
    """
    path = Path(path).resolve()
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        cells = [(c["cell_type"], "".join(c["source"]), c["metadata"]) for c in cells]
    except OSError as error:
        raise InputError(f"report: cannot read {path} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"report: {path} is not a notebook of format 4; open and save it in JupyterLab"
        ) from None
    first = next((source for kind, source, _ in cells if kind == "markdown"), "")
    tagged = [source for kind, source, m in cells if kind == "code" and TAG in m.get("tags", [])]
    title, description = _heading(first)
    notebook = Notebook(
        name=path.stem,
        path=path,
        title=title or path.stem.replace("_", " "),
        description=description,
        parameters=tuple(parse_parameters(tagged[0], path.name)) if tagged else (),
    )
    _check_defaults(notebook)
    return notebook


def _check_defaults(notebook: Notebook) -> None:
    from pydantic import ValidationError

    try:
        notebook.model()
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        parameter = next(p for p in notebook.parameters if p.name == name)
        raise InputError(
            f"report: {notebook.path.name} declares {name}: {parameter.shown} with the default "
            f"{parameter.default!r}, which is not of that type; correct the notebook"
        ) from None


def parse_parameters(source: str, where: str) -> list[Parameter]:
    """Read the tagged cell, one ``name: type = value  # help`` a line.

    Args:
        source: The cell's text.
        where: What to call the notebook in errors.

    Raises:
        InputError: A line of another form; its number and text are named.
    """
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise InputError(
            f"report: the parameters of {where}, line {error.lineno}: {error.msg}"
        ) from None
    lines = tokenize.generate_tokens(io.StringIO(source).readline)
    helps = {t.start[0]: t.string.lstrip("# ").strip() for t in lines if t.type == tokenize.COMMENT}
    found: list[Parameter] = []
    for line in body:
        try:
            parameter = _parameter(line, helps.get(line.end_lineno or 0, ""))
            if parameter.name in [p.name for p in found]:
                raise ValueError("declared twice")
        except ValueError as error:
            raise InputError(
                f"report: the parameters of {where}, line {line.lineno}, have "
                f"{ast.unparse(line)!r}; needs `name: type = value  # help` ({error})"
            ) from None
        found.append(parameter)
    return found


def _parameter(line: ast.stmt, about: str) -> Parameter:
    if not (
        isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and line.value is not None
    ):
        raise ValueError("not an annotated assignment")
    try:
        default = ast.literal_eval(line.value)
    except ValueError:
        raise ValueError("the default is not a literal") from None
    shown = ast.unparse(line.annotation)
    return Parameter(line.target.id, _type(line.annotation), shown, default, about)


def _type(node: ast.expr):
    match node:
        case ast.Name(id=name) if name in _SCALARS:
            return _SCALARS[name]
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return list[_type(inner)]
        case ast.BinOp(left=inner, op=ast.BitOr(), right=ast.Constant(value=None)):
            return _type(inner) | None
    raise ValueError("the type may be str, int, float, bool, list[...] of these, or X | None")


def _heading(markdown: str) -> tuple[str, str]:
    """The first heading and the first sentence after it, without markup."""
    lines = markdown.strip().splitlines()
    at = next((i for i, line in enumerate(lines) if re.match(r"#+\s", line)), None)
    title = "" if at is None else plain(lines[at].lstrip("#"))
    rest = "\n".join(lines[0 if at is None else at + 1 :]).strip()
    paragraph = plain(rest.split("\n\n")[0])
    sentence = _SENTENCE.match(paragraph)
    return title, sentence[1] if sentence else paragraph


def plain(markdown: str) -> str:
    """Markdown without its marks: links keep their text, emphasis its words."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    text = re.sub(r"(\*\*|__|`|\*|\$)", "", text)
    return " ".join(text.split())
