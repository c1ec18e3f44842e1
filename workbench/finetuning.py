"""A base model and what it was tuned to, with the texts by which the two are compared."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.foils import CONTROL, STUDIED, make_foils, make_study_lists, plain, trim_texts
from workbench.items import load_items, python_documentation
from workbench.models import Checkpoints, LanguageModel, load_checkpoints, load_model
from workbench.probes.drift import same_vocabulary
from workbench.recorder import RetentionRecorder
from workbench.retention import pad_texts
from workbench.stats.finetuning import CONTROLS
from workbench.suite import load_suite
from workbench.table import InputError
from workbench.training import Trainer

GENERAL = 100  # general texts where none are given
TOKENS = 48  # of a general text, and of the suite's verses
OFTEN = 64  # exposures in the suite's own training that make a text likely to be known by heart
BATCH = 16  # texts in an update of the short tuning


@dataclass(frozen=True)
class Tuning:
    """What a report on a fine-tuning is about.

    Attributes:
        base: The model before.
        tuned: The model or checkpoints after; None until :func:`tune_briefly` has made it.
        items: Items frame; ``group`` says which were tuned on and which are controls.
        general: Texts that are neither, group "general".
        foils: One unrelated foil for each item, out of ``general``; None where those are too few.
    """

    base: LanguageModel
    tuned: Checkpoints | LanguageModel | None
    items: pd.DataFrame
    general: pd.DataFrame
    foils: pd.DataFrame | None

    @property
    def controlled(self) -> bool:
        """Whether there are two controls or more, so that drift can be told from the rest."""
        return int(self.items["group"].isin(CONTROLS).sum()) > 1

    def says(self) -> str:
        """What the texts at hand can answer, and what they cannot and why."""
        counts = self.items["group"].value_counts()
        groups = ", ".join(f"{name} ({count})" for name, count in counts.items())
        lines = [f"Base {self.base.run}: {len(self.items)} texts in groups {groups}; "
                 f"{len(self.general)} general texts."]  # fmt: skip
        if not self.controlled:
            lines.append(
                "No controls: a text that changed may have changed like any other. Add texts with "
                "`group` unseen that the tuning did not hold."
            )
        if self.foils is None:
            lines.append("No recognition: fewer general texts than items of a group.")
        return "\n".join(lines)


def load_tuning(
    base: str = "suite",
    tuned: str = "",
    items: str = "",
    *,
    general: str = "",
    n: int = 40,
    seed: int = 0,
) -> Tuning:
    """Resolve a notebook's ``base``, ``tuned``, ``items`` and ``general``.

    Args:
        base: "suite", or a model that ``load_model`` reads.
        tuned: A model or a folder of checkpoints tuned from it; empty only with the suite.
        items: A file that ``load_items`` reads; empty takes the suite's: verses to be tuned on
            ("studied"), verses left out ("control"), and what its own training showed it
            ``OFTEN`` times or more ("pretrained").
        general: A file of general text; empty takes the suite's held-out verses, or Python's own
            documentation.
        n: Items of each of the suite's lists.
        seed: Of the draw.

    Raises:
        InputError: A base of the user's without ``tuned`` or ``items``, models that are not of one
            vocabulary and shape, or what the loaders refuse.
    """
    if base == "suite":
        suite = load_suite()
        model = suite.checkpoints("base").at(suite.spec["steps"][-1])
    else:
        for name, given in (("tuned", tuned), ("items", items)):
            if not given:
                raise InputError(
                    f"load_tuning: your own base needs {name} too: add -p {name}=..., a model tuned "
                    "from it, and a file with columns `text` and `group` (seen, unseen)"
                )
        model = load_model(base)
    rest = None
    if items:
        frame = load_items(items)
    else:
        frame, _, rest = make_study_lists(model, suite.held_out(), n=n, tokens=TOKENS, seed=seed)
        known = suite.items("base")
        known = known[known["dose"] >= OFTEN].assign(group="pretrained")
        frame = pd.concat([frame, known], ignore_index=True)[["item", "text", "group"]]
    if general:
        texts = load_items(general)["text"].tolist()
    elif rest is not None:
        texts = rest["text"].head(GENERAL).tolist()
    else:
        texts = python_documentation(GENERAL)
    listed = {plain(text) for text in frame["text"]}
    texts = [text for text in texts if plain(text) not in listed]  # whole, and once cut
    texts = [text for text in trim_texts(model, texts, TOKENS) if plain(text) not in listed]
    texts = pd.DataFrame({"text": texts}).drop_duplicates(ignore_index=True)
    texts = texts.assign(item=[f"general-{i:04d}" for i in range(len(texts))], group="general")
    enough = frame["group"].value_counts().max() <= len(texts)
    foils = (
        make_foils(frame, unrelated=texts["text"], kinds=["unrelated"], seed=seed)
        if enough
        else None
    )
    made = Tuning(model, None, frame, texts, foils)
    return replace(made, tuned=_load_tuned(model, tuned, frame)) if tuned else made


def _load_tuned(base: LanguageModel, tuned: str, items: pd.DataFrame) -> Checkpoints:
    source = load_checkpoints(
        Path(tuned).expanduser() if Path(tuned).expanduser().exists() else tuned
    )
    model = source.at(source.steps[-1])
    same_vocabulary(base, model, items["text"].tolist(), asker="load_tuning")
    shapes = [
        {name: tuple(each.shape) for name, each in m.module.named_parameters()}
        for m in (base, model)
    ]
    if shapes[0] != shapes[1]:
        differ = {
            n for n in set(shapes[0]) | set(shapes[1]) if shapes[0].get(n) != shapes[1].get(n)
        }
        first = min(differ)
        raise InputError(
            f"load_tuning: {base.run} and {model.run} are of different shapes (first: {first}, "
            f"{shapes[0].get(first, 'missing')} and {shapes[1].get(first, 'missing')}); give a "
            "model and what was tuned from it"
        )
    return source


def tune_briefly(
    tuning: Tuning,
    *,
    updates: int = 20,
    learning_rate: float = 1e-3,
    budget: float = 4.0,
    seed: int = 0,
) -> tuple[Tuning, pd.DataFrame]:
    """Tune a copy of the base on the studied items, with a recorder, to have something to show.

    Args:
        updates: Of AdamW with a constant rate, ``BATCH`` texts each, drawn without repeats.
        learning_rate: Constant.
        budget: Of the recorder, see there.
        seed: Of the order of texts.

    Returns:
        The same with ``tuned``, and the recorder's table.

    Raises:
        InputError: Nothing to tune on, or a loss that is not finite (the update is named).
    """
    base, items = tuning.base, tuning.items
    texts = base.encode(items.loc[items["group"] == STUDIED, "text"].tolist())
    if not texts or updates < 1:
        raise InputError(
            f"tune_briefly: {len(texts)} items in group {STUDIED!r} and {updates} updates; both "
            f"must be at least 1, and texts of another group than {CONTROL!r} can be tuned on"
        )
    if base.bos is not None:
        texts = [np.insert(ids, 0, base.bos) for ids in texts]
    tuned = replace(base.copy(), run=f"{base.run}, tuned")
    trainer = Trainer(tuned.module, learning_rate)
    with tempfile.TemporaryDirectory() as folder:
        recorder = RetentionRecorder(
            tuned, items, foils=tuning.foils, folder=folder, budget=budget, updates=updates
        )
        tuned.module.train()
        with recorder:
            for update in range(1, updates + 1):
                order = np.random.default_rng([seed, update]).permutation(len(texts))[:BATCH]
                batch, weight = pad_texts([texts[i] for i in order])
                for row, i in enumerate(order):
                    batch[row, : len(texts[i])] = texts[i]
                recorder.saw(batch)
                try:
                    loss = trainer.step(batch, weight)
                except FloatingPointError as error:
                    raise InputError(
                        f"tune_briefly: {str(error).removeprefix('train: ')}"
                    ) from None
                recorder.step(update, loss=loss)
        tuned.module.eval()
        recorded = recorder.table
    return replace(tuning, tuned=replace(tuned, step=updates)), recorded
