"""The command line as a user meets it: lines on stderr and exit statuses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nbformat import v4

from tests.test_report import DEMO, FAILS, REFUSES, write_notebook
from workbench import __version__, cli

TAGGED = {"tags": ["parameters"]}


@pytest.fixture(autouse=True)
def signals_as_before():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def workbench(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "workbench", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def call(capsys, *words: str) -> tuple[int, str, str]:
    """In this process, which saves the start of another."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    got = capsys.readouterr()
    return caught.value.code, got.out, got.err


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr("workbench.parameters.FOLDER", folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_help_imports_nothing_heavy_and_is_quick():
    heavy = ["torch", "transformers", "pandas", "papermill", "plotly", "nbconvert", "pydantic"]
    code = (
        "import sys, workbench, workbench.cli as c\n"
        "try: c.main(['--help'])\n"
        f"finally: print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("report", "grid", "list", "suite", "lab"):
        assert f"\n  {command}" in done.stdout


def test_report_does_not_import_torch():
    code = "import sys, workbench.report as r; print({'torch', 'papermill'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["reprot"], "workbench: No such command 'reprot'."),
        (["report", "--jobs", "two"], "workbench: Invalid value for '--jobs': "),
        (["report", "--nope"], "workbench: No such option: --nope"),
        (["report", "nope"], "report: no notebook 'nope'; there are demo"),
        (["report", "demo", "--all"], "report: got notebooks and --all; give one or the other"),
        (["report", "demo", "-p", "seed"], "report: -p 'seed' is not NAME=VALUE; write for "),
        (["report", "demo", "-p", "prefix=x"], "report: prefix is 'x', but demo needs int "),
        (["report", "demo", "--jobs", "0"], "report: --jobs is 0, needs at least 1"),
        (["report", "demo", "--out", "file"], "report: {here}/file is a file; choose a folder "),
    ],
)
def test_each_bad_input_is_one_line_and_status_2(capsys, notebooks, words, line):
    write_notebook(notebooks, "demo", DEMO)
    Path("file").write_text("")
    status, out, err = call(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith(line.format(here=Path.cwd()))
    assert err.count("\n") == 1
    assert not Path("reports").exists()


def test_debug_shows_the_traceback(notebooks):
    from workbench.table import InputError

    with pytest.raises(InputError):
        cli.main(["report", "nope", "--debug"])


def test_version_and_no_command(capsys):
    assert call(capsys, "--version")[:2] == (0, f"workbench {__version__}\n")
    status, out, _ = call(capsys)
    assert status == 0
    assert out.startswith("Usage: workbench")


def test_list_shows_parameters_with_their_help(capsys, notebooks):
    write_notebook(notebooks, "demo", DEMO)
    status, out, _ = call(capsys, "list")
    assert status == 0
    assert out.splitlines() == [
        "demo  How long is it kept?",
        "  We follow items, as Lesci et al. (2024) do.",
        "    prefix: int = 16              prompt length, in tokens",
        "    rate: float = 0.5",
        "    kinds: list[str] = ['verse']  what is planted",
        "    items: str | None = None      the user's texts; a file # or none",
        "    fast: bool = False",
        "",
    ]


def test_lab_opens_the_notebooks_and_passes_arguments_on(notebooks, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda path, words: started.append(words))
    monkeypatch.setattr(subprocess, "call", lambda words: started.append(words) or 0)
    with pytest.raises(SystemExit):
        cli.main(["lab", "--no-browser", "--debug"])
    assert started[0] == [
        sys.executable, "-m", "jupyterlab", str(notebooks), "--no-browser", "--debug",
    ]  # fmt: skip


def test_lab_opens_the_explorers_where_they_are(notebooks, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda path, words: started.append(words))
    monkeypatch.setattr(subprocess, "call", lambda words: started.append(words) or 0)
    (notebooks / "explore.ipynb").write_text("{}")
    with pytest.raises(SystemExit):
        cli.main(["lab", "--no-browser"])
    assert started[0][3:] == [
        str(notebooks / "explore.ipynb"), f"--ServerApp.root_dir={notebooks}", "--no-browser",
    ]  # fmt: skip


def test_statuses_of_runs(capsys, notebooks):
    write_notebook(notebooks, "refuses", REFUSES)
    write_notebook(notebooks, "fails", FAILS)
    status, out, err = call(capsys, "report", "fails", "refuses")
    assert status == 2
    assert err.splitlines()[-1] == "load_model: no folder ./x; check -p model"
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["fails", "failed"], ["index:", "reports/index.html"],
    ]  # fmt: skip
    assert not Path("reports/refuses").exists()
    assert call(capsys, "report", "fails")[0] == 1


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a POSIX signal")
def test_interrupt_ends_the_kernel_and_leaves_nothing(tmp_path):
    # the kernel says that it runs by writing its id, which must be gone afterwards
    code = (
        "import os, time, pathlib\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(99)"
    )
    cells = [v4.new_code_cell("a: int = 1", metadata=TAGGED), v4.new_code_cell(code)]
    path = write_notebook(tmp_path, "slow", cells)
    command = [sys.executable, "-m", "workbench", "report", str(path), "--out", "out"]
    child = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs, and test workers, hand on an ignored Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err.splitlines()[-1] == "workbench: interrupted; nothing half-written was left"
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_command_itself(tmp_path):
    done = workbench("report", "nope.ipynb", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("report: no notebook 'nope.ipynb'")
    assert done.stderr.count("\n") == 1
