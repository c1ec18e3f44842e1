"""What a report is about: a model or its checkpoints, the texts put to it, and what is known.

The notebooks take ``model`` and ``items``; this turns the two words into the same few objects,
whether they name the embedded suite or the user's own folder and file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.items import load_items
from workbench.models import Checkpoints, load_checkpoints
from workbench.overlap import drop_shared, read_training_text, shared_words
from workbench.stats.summarise import summarise
from workbench.suite import GEOMETRIC, Suite, load_suite
from workbench.table import InputError, rows

NO_EXPOSURES = pd.DataFrame({"update": np.array([], dtype=int), "item": np.array([], dtype=str)})


@dataclass
class Subject:
    """One run under study.

    Attributes:
        source: Its checkpoints; one for a single model.
        items: Items frame, with ``cohort`` where it is known when each was first trained on.
        exposures: Ledger of exposures, empty where unknown.
        suite: The suite it comes from, None for the user's own.
        run: Which of the suite's runs.
    """

    source: Checkpoints
    items: pd.DataFrame
    exposures: pd.DataFrame
    suite: Suite | None = None
    run: str = ""

    @property
    def causal(self) -> bool:
        """Whether there are checkpoints, cohorts and never-trained texts: what a profile needs."""
        if len(self.source) < 2 or "cohort" not in self.items.columns:
            return False
        never = self.items["cohort"].isna()
        return bool(never.any() and not never.all())

    def drop_met_controls(self, training: str = "", *, words: int = 13) -> pd.DataFrame:
        """Look for the items in the training text; controls that stand there in part are dropped.

        Args:
            training: A text file, or any file of texts that ``load_items`` reads: what the model
                was trained on. Empty: the suite's own training text; a model of the user's has none.
            words: Length of the word n-grams looked for.

        Returns:
            One row a group, the share of its texts of which any n-gram was met, and empty where
            there is no training text. Texts that were trained on should be near 1.

        Raises:
            InputError: The file cannot be read, or no control is left.
        """
        if not training and not self.suite:
            return rows("shared_words", [], run="training text")
        texts = read_training_text(training) if training else self.suite.training_texts(self.run)
        shared = shared_words(self.items, texts, words=words)
        self.items = drop_shared(self.items, shared)
        met = shared[shared["value"].notna()].assign(value=lambda t: (t["value"] > 0).astype(float))
        return summarise(met, by=["run", "step", "group", "metric"])

    def lags(self, table: pd.DataFrame, wanted: Sequence[int] = ()) -> list[float]:
        """Which updates since the last exposure to show: those wanted, the suite's, or all there are.

        The suite's checkpoints lie at set lags after each wave; others are seen in one wave alone,
        so that a curve through all of them would mix different texts.

        Raises:
            InputError: None of the wanted lags is in the table.
        """
        there = sorted(table["lag"].dropna().unique())
        chosen = list(wanted) or (list(GEOMETRIC) if self.suite else there)
        found = [lag for lag in there if lag in chosen]
        if not found:
            raise InputError(
                f"lags: no checkpoint lies {', '.join(map(str, chosen))} updates after an exposure; "
                f"there are {', '.join(f'{lag:g}' for lag in there[:20]) or 'none'}"
            )
        return found

    @property
    def controlled(self) -> bool:
        """Whether there are texts known to be trained on, and texts known not to be."""
        groups = set(self.items["group"])
        return len(groups) > 1 and bool(groups & {"never", "unseen"})

    def says(self) -> str:
        """What the data at hand can answer, and what it cannot and why."""
        steps = self.source.steps
        found = f"{len(self.items)} texts in groups " + ", ".join(
            f"{name} ({count})" for name, count in self.items["group"].value_counts().items()
        )
        lines = [f"Run {self.source.run}: {len(steps)} checkpoint(s), {found}."]
        if len(steps) < 2:
            lines.append(
                "One checkpoint: no causal profile and no forgetting curve, which compare a text "
                "before and after training on it. Give a folder of step*/ or checkpoint-*/ folders."
            )
        elif not self.causal:
            lines.append(
                "No causal profile: it needs a column `cohort` in the items (the update that first "
                "held each text, empty for texts never trained on), with both kinds of text."
            )
        elif not self.suite and (self.items["dose"] > 1).any():
            lines.append(
                "All exposures of a text are taken to lie at its `cohort`, the one update that is "
                "known: where they were spread, lags count from the first."
            )
        if not self.controlled:
            lines.append(
                "No held-out texts: what is high may be memory or merely easy text. Add texts with "
                "`group` unseen, drawn like the others, and membership can be told."
            )
        return "\n".join(lines)


def load_subject(
    model: str = "suite", items: str = "", *, corpus: str = "", run: str = "base"
) -> Subject:
    """Resolve a notebook's ``model``, ``items`` and ``corpus``.

    Args:
        model: "suite", or anything that ``load_checkpoints`` reads.
        items: A file that ``load_items`` reads, or empty for the suite's planted items.
        corpus: With the suite: a text file to train it on; empty takes the World English Bible.
        run: Which of the suite's runs.

    Raises:
        InputError: A model of the user's without items, a dose that is no number of exposures, or
            what the loaders refuse.
    """
    if model == "suite":
        suite = load_suite(corpus or None)
        if items:
            return Subject(suite.checkpoints(run), *_completed(load_items(items)), suite, run)
        return Subject(suite.checkpoints(run), suite.items(run), suite.exposures(run), suite, run)
    if not items:
        raise InputError(
            "load_subject: your own model needs your own texts: add -p items=FILE, a CSV, JSONL, "
            "Parquet or text file with a column `text` and, for controls, `group` (seen, unseen)"
        )
    frame = load_items(items)
    source = load_checkpoints(
        Path(model).expanduser() if Path(model).expanduser().exists() else model
    )
    return Subject(source, *_completed(frame))


def _completed(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The user's items with ``kind`` and ``dose``, which reports ask for, and their ledger."""
    if "cohort" in frame.columns:
        frame["cohort"] = pd.to_numeric(frame["cohort"], errors="coerce")
    met = frame["cohort"].notna() if "cohort" in frame.columns else frame["group"] == "seen"
    if "dose" in frame.columns:
        given = pd.to_numeric(frame["dose"], errors="coerce")
        bad = frame["dose"].notna() & ~(given >= 0)
        if bad.any():
            raise InputError(
                f"load_subject: dose is {frame['dose'][bad].astype(object).iloc[0]!r} for item "
                f"{frame['item'][bad].iloc[0]!r}; give numbers of exposures, 0 or more"
            )
        frame["dose"] = given.fillna(met.astype(int))
    else:
        frame["dose"] = met.astype(int)
    if "kind" not in frame.columns:
        frame["kind"] = "text"
    exposures = NO_EXPOSURES
    if "cohort" in frame.columns:
        # of a text met several times only the first update is known: all its exposures lie there,
        # or it would never have had its dose, and no lag could be told
        whole = frame["dose"].clip(lower=1).round().astype(int).where(met, 0)
        ledger = frame.loc[frame.index.repeat(whole), ["cohort", "item"]].reset_index(drop=True)
        exposures = pd.DataFrame({"update": ledger["cohort"].astype(int), "item": ledger["item"]})
    return frame, exposures
