"""The commands. Everything heavy is imported inside them, so that ``--help`` is quick.

Whatever goes wrong is one line on stderr and exit status 2; a report whose cell failed is written
all the same and gives status 1; Ctrl-C gives 130 and leaves nothing half-written.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="What a language model memorizes, when, for how long, and where.",
)
REFUSED, FAILED, INTERRUPTED = 2, 1, 130
EXPLORE = "explore.ipynb"  # what lab opens
LINE = 100  # characters, of what list prints


def _show_version(asked: bool) -> None:
    if asked:
        from workbench import __version__

        typer.echo(f"workbench {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """What a language model memorizes, when, for how long, and where."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def report(
    notebooks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NOTEBOOK]...",
            help="Names (see `workbench list`) or paths to .ipynb files; none: the four pillars.",
            show_default=False,
        ),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--parameter",
            metavar="NAME=VALUE",
            help="Set a parameter; may be repeated. It goes to the notebooks that have it.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Run every notebook.")] = False,
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Where the reports go.")
    ] = Path("reports"),
    jobs: Annotated[int, typer.Option("--jobs", help="How many to run at once.")] = 1,
) -> None:
    """Run notebooks and write their reports."""
    from workbench import page
    from workbench.parameters import find_notebooks, read_pairs
    from workbench.report import run_reports
    from workbench.table import InputError

    if every and notebooks:
        raise InputError("report: got notebooks and --all; give one or the other")
    given = read_pairs(parameter or [])
    found = find_notebooks(notebooks or (), every=every)
    reports = run_reports(found, given, out=out, jobs=jobs)
    unwritten = [r for r in reports if r.cause in ("input", "disk")]
    written = [r for r in reports if r not in unwritten]
    width = max((len(r.name) for r in written), default=0)
    for r in written:
        typer.echo(
            f"{r.name:<{width}}  {r.status:<6}  {page.seconds(r.seconds):>10}  "
            f"{_shortened(r.folder / 'report.html')}"
        )
    if written:
        typer.echo(f"index: {_shortened(out / 'index.html')}")
    for line in dict.fromkeys(r.error for r in unwritten):
        typer.echo(line, err=True)
    failed = any(r.status == "failed" for r in reports)
    raise typer.Exit(REFUSED if unwritten else FAILED if failed else 0)


def _shortened(path: Path) -> str:
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


@app.command("grid")
def run_grid_file(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="What to make, as YAML.")],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Where the reports go; without it as the file says.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", help="How many to run at once.")] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="NAME",
            help="Only these: a report, a notebook, or a pattern such as '*-0'; may be repeated.",
            show_default=False,
        ),
    ] = None,
    retry: Annotated[
        str | None,
        typer.Option(
            "--retry",
            metavar="failed",
            help="Make those again that failed, though nothing changed.",
            show_default=False,
        ),
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Start others after one has failed.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Make all again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would run, and for how long.")
    ] = False,
    dask: Annotated[
        str | None,
        typer.Option(
            "--dask",
            metavar="ADDRESS",
            help="Run on the workers of this Dask scheduler.",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Take a very large grid.")] = False,
) -> None:
    """Make many reports: notebooks times parameters, those that are not there yet."""
    from workbench.grid import describe_run, describe_states, plan_states, read_grid, run_grid
    from workbench.table import InputError

    if retry not in (None, "failed"):
        raise InputError(f"grid: --retry is {retry!r}; there is only --retry failed")
    chosen = {"retry_failed": bool(retry), "force": force}
    if dry_run:
        grid = read_grid(file, yes=yes)
        states = plan_states(grid.only(only or ()), out or grid.out, **chosen)
        typer.echo(describe_states(states, jobs))
        return
    chosen |= {"only": only or (), "keep_going": keep_going, "dask": dask, "yes": yes}
    table = run_grid(file, out=out, jobs=jobs, **chosen)
    typer.echo(describe_run(table))
    site = table.attrs["site"]
    typer.echo(f"index: {site if '://' in site else _shortened(Path(site))}")
    statuses = set(table["status"])
    bad = FAILED if statuses & {"failed", "missing"} else 0
    raise typer.Exit(REFUSED if "refused" in statuses else bad)


@app.command("reproduce")
def reproduce_report(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="Folder of a report.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Keep the second run.", show_default=False),
    ] = None,
    rtol: Annotated[
        float | None,
        typer.Option(help="Numbers may differ by this share (1e-5).", show_default=False),
    ] = None,
    atol: Annotated[
        float | None, typer.Option(help="And by this much (1e-8).", show_default=False)
    ] = None,
) -> None:
    """Run a report again and say whether every number agrees."""
    from workbench.reproduce import ATOL, RTOL, reproduce

    agreement = reproduce(
        report,
        out=out,
        rtol=RTOL if rtol is None else rtol,
        atol=ATOL if atol is None else atol,
    )
    typer.echo("\n".join(agreement.lines))
    raise typer.Exit(0 if agreement.agrees else FAILED)


@app.command("list")
def list_notebooks() -> None:
    """Show the notebooks and their parameters."""
    from workbench.parameters import RESULTS, find_notebooks

    for notebook in find_notebooks(every=True):
        typer.echo(typer.style(notebook.name, bold=True) + f"  {notebook.title}")
        if notebook.description:
            typer.echo(_wrapped(notebook.description, "  "))
        shown = [p for p in notebook.parameters if p.name != RESULTS]
        lines = [(f"{p.name}: {p.shown} = {p.default!r}", p.help) for p in shown]
        width = min(max((len(left) for left, _ in lines), default=0), 44)
        for left, about in lines:
            typer.echo(_wrapped(f"{left:<{width}}  {about}".rstrip(), "    ", " " * (width + 6)))
        typer.echo()


def _wrapped(text: str, indent: str, later: str = "") -> str:
    import textwrap

    return textwrap.fill(
        text,
        LINE,
        initial_indent=indent,
        subsequent_indent=later or indent,
        break_on_hyphens=False,
        break_long_words=False,
        drop_whitespace=True,
        replace_whitespace=False,
    )


@app.command()
def suite(
    size: Annotated[
        str, typer.Option(metavar="default|gpu", help="Which specification to train.")
    ] = "default",
    corpus: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Train on this text.", show_default=False),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Only describe; refuse if it is not trained yet.")
    ] = False,
    workshop: Annotated[
        bool, typer.Option("--workshop", help="Prepare all that the workshop's sessions compute.")
    ] = False,
) -> None:
    """Train the embedded suite, if it is not cached, and describe it."""
    from workbench.suite import describe_suite, ensure_suite

    if workshop:
        _prepare_workshop(alone=size == "default" and not corpus and not show)
        return
    chosen = str(corpus) if corpus else None
    if show:
        _refuse_untrained(chosen, size)
    typer.echo(describe_suite(ensure_suite(corpus=chosen, size=size, progress=True)))


def _prepare_workshop(alone: bool) -> None:
    from workbench.classroom import describe_preparation, prepare_workshop, solutions
    from workbench.table import InputError

    if not alone:
        raise InputError(
            "suite: --workshop prepares the default suite, for which the sessions are written; "
            "leave out --size, --corpus and --show"
        )
    sessions = solutions()
    typer.echo(
        f"the suite (about four minutes), then {len(sessions)} sessions once each (a minute or two "
        "each, on two cores); what is there already is not made again"
    )
    reports = prepare_workshop(sessions)
    typer.echo(describe_preparation(reports))
    raise typer.Exit(0 if all(report.status == "ok" for report in reports) else FAILED)


def _refuse_untrained(corpus: str | None, size: str) -> None:
    from workbench.suite import specification
    from workbench.table import InputError, cache_folder

    folder = cache_folder() / "suites" / specification(corpus, size).hash
    if not folder.is_dir():
        raise InputError(
            f"suite: not trained yet, there is no {folder}; train it by `workbench suite` "
            "without --show"
        )


cache = typer.Typer(invoke_without_command=True, help="Show, check and clear what was computed.")
app.add_typer(cache, name="cache")


@cache.callback()
def show_cache(context: typer.Context) -> None:
    """Show what was computed once and is kept: how much of what, last used when."""
    if context.invoked_subcommand is None:
        from workbench.cache import describe

        typer.echo(describe())


@cache.command("clear")
def clear_cache(
    kind: Annotated[
        str,
        typer.Argument(
            help="Such as suites, or all; none: what is soon made again (panels, compression).",
            show_default=False,
        ),
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove what is kept, but for what a running process works with."""
    from workbench.cache import chosen_entries, clear, readable
    from workbench.table import InputError

    chosen = chosen_entries(kind)
    size = readable(sum(entry.size for entry in chosen))
    what = f"{len(chosen)} of {', '.join(sorted({entry.kind for entry in chosen}))} ({size})"
    if not chosen:
        typer.echo("cache: there is nothing to remove")
        return
    if not yes and not _asked():
        raise InputError(f"cache: would remove {what}; add --yes")
    if not yes and not typer.confirm(f"Remove {what}?"):
        typer.echo("nothing was removed")
        return
    gone, left = clear(kind)
    typer.echo(f"removed {len(gone)} ({readable(sum(entry.size for entry in gone))})")
    for entry in left:
        typer.echo(f"in use, not removed: {_shortened(entry.place)}", err=True)
    raise typer.Exit(FAILED if left else 0)


def _asked() -> bool:
    """Whether there is someone who can answer."""
    return sys.stdin.isatty()


@cache.command("check")
def check_cache() -> None:
    """Compare all that is kept with the hashes of what was written."""
    from workbench.cache import damage, entries

    found = entries()
    bad = [(e.place, told) for e in found if (told := damage(e.place, thorough=True))]
    for place, told in bad:
        typer.echo(f"{_shortened(place)} {told}", err=True)
    typer.echo(f"{len(found) - len(bad)} of {len(found)} are whole; a damaged one is made again")
    raise typer.Exit(FAILED if bad else 0)


@app.command("freeze")
def freeze_notebook(
    notebook: Annotated[
        Path, typer.Argument(metavar="NOTEBOOK.ipynb", help="Saved with its widgets' state.")
    ],
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="Where it goes.", show_default=False)
    ] = "",
) -> None:
    """Turn the explorers of a saved notebook into figures that need no kernel."""
    from workbench.frozen import freeze

    typer.echo(_shortened(freeze(notebook, out)))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def lab(context: typer.Context) -> None:
    """Open JupyterLab on the notebook of explorers; further arguments go to `jupyter lab`."""
    from workbench.parameters import FOLDER
    from workbench.table import InputError

    if not FOLDER.is_dir():
        raise InputError(
            f"lab: there is no {FOLDER}; install the workbench from its repository (pip install -e)"
        )
    command = [sys.executable, "-m", "jupyterlab", str(FOLDER)]
    if (FOLDER / EXPLORE).is_file():
        command[3:] = [str(FOLDER / EXPLORE), f"--ServerApp.root_dir={FOLDER}"]
    command += context.args
    if os.name == "posix":
        os.execv(command[0], command)  # so that Ctrl-C is JupyterLab's own affair
    raise typer.Exit(subprocess.call(command))


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit; the entry point of ``workbench``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # --debug may stand anywhere, but what follows lab is JupyterLab's
    mine = words[: words.index("lab")] if "lab" in words else words
    debug = "--debug" in mine
    words = [word for word in mine if word != "--debug"] + words[len(mine) :]
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = app(words, prog_name="workbench", standalone_mode=False)
        if status == INTERRUPTED:  # some versions of typer turn Ctrl-C into a status themselves
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("workbench: interrupted; nothing half-written was left", err=True)
        status = INTERRUPTED
    except BrokenPipeError:
        # `workbench list | head` is no error; the descriptor is replaced, or exit would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except Exception as error:
        if debug:
            raise
        typer.echo(_line(error), err=True)
        status = REFUSED
    sys.exit(status if isinstance(status, int) else 0)


def _terminate(number, frame) -> None:
    raise SystemExit(128 + number)


def _line(error: Exception) -> str:
    """What the user reads: the message of an input error, and of others what kind they are."""
    if hasattr(error, "format_message"):  # a usage error of the command line's parser
        return f"workbench: {' '.join(error.format_message().split())} (see workbench --help)"
    message = " ".join(str(error).split())
    if type(error).__name__ == "InputError":
        return message
    return f"workbench: {type(error).__name__}: {message} (--debug shows where)"
