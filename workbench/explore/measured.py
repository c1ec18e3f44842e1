"""The panel behind the explorers of training: read on the thread that draws, and once."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from workbench.explore.shell import Work, subject_of
from workbench.items import load_items
from workbench.models import Checkpoints
from workbench.probes.extraction import probe_extraction
from workbench.stats.exposure import align_exposures
from workbench.subject import Subject
from workbench.table import InputError, load, validate

SUBJECT = "# subject: the one that was given to the explorer"
ASIDE = ("drip", "partner")  # of the suite: met again and again, or by the twin alone
NEEDED = ("kind", "dose", "cohort", "copies", "lag")
EXPOSED = ("lag", "copies", "last", "wave")  # what follows the single text, not its wave


class Watched(Checkpoints):
    """Checkpoints that tell how many of them are behind, and end where the work is ended."""

    def __init__(self, source: Checkpoints, work: Work):
        vars(self).update(vars(source))
        self._work = work

    def __iter__(self) -> Iterator:
        for done, step in enumerate(self.steps):
            self._work.step(f"scoring checkpoint {step}", done / len(self), shared=True)
            yield self.at(step)


class Measured:
    """Log-probability of each text at each checkpoint, and what is known of the texts.

    Args:
        model: As for ``load_subject``, or a Subject.
        items, corpus: As for ``load_subject``.
        table: What the model answered, or the file that ``save`` wrote it to; no model is read then,
            and the texts are those of the Subject or of ``items``, if given.
        prefix, suffix: As for ``probe_extraction``.
    """

    def __init__(
        self,
        model: str | Subject = "suite",
        items: str = "",
        corpus: str = "",
        *,
        table: pd.DataFrame | str | Path = "",
        prefix: int = 16,
        suffix: int = 16,
    ):
        self._given = (model, items, corpus)
        self._table = table
        self._asked = isinstance(table, str) and not table  # of the model, at every checkpoint
        self._cut = {"prefix": prefix, "suffix": suffix}
        self._align = False  # add exposures to the table that was given
        self._texts: pd.Series | None = None
        self.subject: Subject | None = model if isinstance(model, Subject) else None
        self.outcome: pd.DataFrame | None = None

    def read(self, work: Work) -> pd.DataFrame:
        """Item rows of the trained texts and their controls.

        Raises:
            InputError: What the loaders refuse, or nothing that forgetting could be seen in.
        """
        if self.outcome is None:
            work.step("reading the texts and checkpoints")
            panel = self._made(work) if self._asked else self._found()
            held = panel["metric"].astype(str).unique()
            metric = "log_probability" if "log_probability" in held else held[0]
            keep = (panel["metric"] == metric) & ~panel["group"].isin(ASIDE)
            self.outcome = without_attrs(panel[keep].reset_index(drop=True))
        return self.outcome

    def _made(self, work: Work) -> pd.DataFrame:
        subject = self.subject = subject_of(*self._given)
        if not subject.causal:
            raise InputError(" ".join(subject.says().split()))
        panel = probe_extraction(Watched(subject.source, work), subject.items, **self._cut)
        return align_exposures(panel, subject.exposures)

    def _found(self) -> pd.DataFrame:
        given = isinstance(self._table, pd.DataFrame)
        panel = validate(self._table) if given else load(self._table)
        if self.subject is not None and "lag" not in panel.columns:
            self._align = True
            panel = align_exposures(panel, self.subject.exposures)
        lacking = [name for name in NEEDED if name not in panel.columns]
        if lacking:
            raise InputError(
                f"explore: the table has no column {lacking[0]!r}; it needs {', '.join(NEEDED)}, "
                "which align_exposures and the items give"
            )
        if panel.empty:
            raise InputError("explore: the table is empty; it needs a row per text and checkpoint")
        return panel

    @property
    def clock(self) -> str:
        """The column of when a text was first met: the suite's waves, else each text's update."""
        return "wave" if "wave" in self.outcome.columns else "cohort"

    def text(self, item: str) -> str:
        """The text of an item, where it is known."""
        if self._texts is None:
            items = self._given[1]
            if self.subject is None and not items:
                return ""
            frame = load_items(items) if self.subject is None else self.subject.items
            self._texts = frame.set_index("item")["text"]
        return str(self._texts.get(item, ""))

    def code(self, names: Sequence[str]) -> list[str]:
        """Lines that make ``outcome``; ``names`` are what follows needs of the package."""
        names, metric = set(names), str(self.outcome["metric"].iloc[0])
        made = [SUBJECT] if isinstance(self._given[0], Subject) else []
        if self._asked:
            names |= {"align_exposures", "probe_extraction"}
            if not made:
                model, items, corpus = self._given
                names |= {"load_subject"}
                made = [f"subject = load_subject({model!r}, {items!r}, corpus={corpus!r})"]
            made += [
                f"table = probe_extraction(subject.source, subject.items, {spelled(self._cut)})"
            ]
        elif isinstance(self._table, pd.DataFrame):
            made += ["# table: the one that was given to the explorer"]
        else:
            names |= {"load"}
            made += [f"table = load({str(self._table)!r})"]
        if self._asked or self._align:
            names |= {"align_exposures"}
            made += ["table = align_exposures(table, subject.exposures)"]
        plotly = ["import plotly.graph_objects as go"] if "go" in names else []
        names -= {"go"}
        return [
            "import pandas as pd",
            *plotly,
            f"from workbench import {', '.join(sorted(names))}",
            "",
            *made,
            f'outcome = table[(table["metric"] == {metric!r}) & ~table["group"].isin({list(ASIDE)})]',
        ]


def fill(control, options: Sequence, value) -> None:
    """Give a control its options once the data are read; the change is a newer wish."""
    if list(control.options) != list(options):
        control.options = options
        control.value = value


def without_attrs(table: pd.DataFrame) -> pd.DataFrame:
    """The table alone: pandas copies its passport at every step, which takes longer than the step."""
    table.attrs = {}
    return table


def plain(numbers: Sequence[float]) -> str:
    """Numbers as code, whole ones without a point."""
    return str([int(number) if number == int(number) else float(number) for number in numbers])


def spelled(arguments: Mapping) -> str:
    """Keyword arguments as code."""
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def paragraphs(lines: Sequence[str]) -> str:
    """Sentences below a figure, each in its own line; all are escaped."""
    return "".join(f"<p style='margin:4px 0'>{html.escape(line)}</p>" for line in lines)


def html_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A plain table in the page's colours; every cell is escaped."""
    cell = "padding:2px 10px 2px 0; text-align:left; vertical-align:top; line-height:1.3"
    narrow = f"{cell}; white-space:nowrap"  # all but the last, which may be a text
    rule = "border-bottom:1px solid var(--jp-border-color2, #bbb)"
    top = "".join(f"<th style='{narrow}; {rule}'>{html.escape(name)}</th>" for name in head)
    rest = ""
    for *first, last in lines:
        row = "".join(f"<td style='{narrow}'>{html.escape(each)}</td>" for each in first)
        rest += f"<tr>{row}<td style='{cell}'>{html.escape(last)}</td></tr>"
    return f"<table style='border-spacing:0'><tr>{top}</tr>{rest}</table>"
