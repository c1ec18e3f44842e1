"""One pass over checkpoints and items: what the probes that need only scores have in common.

Each checkpoint is read once into the same module, each item is scored once at each, and a batch
is reduced to measurements before the next one is scored. A sweep over a series of checkpoints is
kept in the cache under the hash of weights, items and settings.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from workbench.decoding import Decoding
from workbench.items import items_hash
from workbench.models import Checkpoints, LanguageModel, Scores, versions
from workbench.table import InputError, cache_folder, load, save, validate

COORDINATES = (
    "kind",
    "cohort",
    "dose",
    "last",
    "wave",
    "copies",
    "lag",
    "position",
)  # of an items frame that ride along
Reduce = Callable[[Scores, Sequence[Int[np.ndarray, " pos"]], Int[np.ndarray, " item"]], Mapping]


@dataclass(frozen=True)
class Question:
    """What a probe asks of each item.

    Attributes:
        asker: The probe's name, for messages and the cache.
        start: First token scored.
        keep: Per-token scores needed.
        settings: Coordinates that say how it was asked (``prefix``), constant over the table.
        reduce: (scores, tokens, positions among all items) to a value per item and metric; the key
            is the metric, or a pair of metric and scheme, which is then a coordinate.
        schemes: Sampling schemes under which the tokens are scored as well.
    """

    asker: str
    start: int
    keep: tuple[str, ...]
    settings: Mapping[str, int | float]
    reduce: Reduce
    schemes: tuple[Decoding, ...] = ()


def sweep(
    source: LanguageModel | Checkpoints,
    items: pd.DataFrame,
    cut: Callable[[LanguageModel, pd.DataFrame], tuple[Sequence, pd.DataFrame]],
    question: Question,
) -> pd.DataFrame:
    """Ask one question of every item at every checkpoint.

    Args:
        source: A model, or the checkpoints of a run.
        items: What is put to it.
        cut: Makes token ids of the items and says which it keeps; asked once, since the
            checkpoints of a run share their tokenizer.

    Returns:
        The table, with one row for each (step, item, metric), the question's settings and the
        items' usual further columns as coordinates. ``.attrs`` holds the passport and ``dropped``.
    """
    checkpoints = list(source.steps) if isinstance(source, Checkpoints) else [source.step]
    if isinstance(source, Checkpoints):
        place = _cached(source, items, question)
        table = _read_cached(place)
        if table is not None:
            return table
    parts: list[dict[str, Float[np.ndarray, " item"]]] = []
    tokens = kept = None
    for model in source if isinstance(source, Checkpoints) else [source]:
        if tokens is None:
            tokens, kept = cut(model, items)
        parts.append(_ask(model, tokens, question))
    table = _assemble(parts, checkpoints, kept, model.run, question)
    table.attrs = {
        "passport": {**model.passport(), "items": items_hash(items), "steps": checkpoints},
        "dropped": kept.attrs.get("dropped", 0),
    }
    if isinstance(source, Checkpoints):
        _write_cached(table, place)
    return table


def _ask(model: LanguageModel, tokens: Sequence, question: Question) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    batches = model.score_batches(
        tokens, start=question.start, keep=question.keep, schemes=question.schemes
    )
    for index, scores in batches:
        _refuse_not_finite(model, scores, index, question)
        reduced = question.reduce(scores, [tokens[i] for i in index], index)
        for metric, part in reduced.items():
            values.setdefault(metric, np.full(len(tokens), np.nan))[index] = part
    return values


def _refuse_not_finite(model, scores: Scores, index: np.ndarray, question: Question) -> None:
    """Before anything is reduced: a sum that skips the padding's NaN would skip a model's too."""
    for name in set(question.keep) & {"log_probability", "mu", "sigma"}:
        score = getattr(scores, name)
        valid = np.arange(score.shape[1])[None, :] < scores.length[:, None]
        bad = valid & ~np.isfinite(score)
        if bad.any():
            row, at = np.argwhere(bad)[0]
            raise InputError(
                f"{question.asker}: {name} is {score[row, at]} for item number {index[row]} at "
                f"step {model.step} of {model.run}; the model's weights or its dtype give NaN or Inf"
            )


def _assemble(parts, steps, kept, run, question) -> pd.DataFrame:
    metrics, n_items = list(parts[0]), len(kept)
    shape = (len(steps), n_items, len(metrics))
    size = int(np.prod(shape))
    value = np.stack([np.stack([p[m] for m in metrics], axis=1) for p in parts])

    def along(axis: int, values) -> np.ndarray:
        view = np.asarray(values).reshape([-1 if i == axis else 1 for i in range(3)])
        return np.broadcast_to(view, shape).reshape(size)

    def text(axis: int, values) -> pd.Categorical:
        codes, names = pd.factorize(np.asarray(values, dtype=object))
        return pd.Categorical.from_codes(along(axis, codes), categories=list(names))

    columns = {
        "run": pd.Categorical.from_codes(np.zeros(size, dtype=np.int8), categories=[run]),
        "step": along(0, steps),
        "group": text(1, kept["group"]),
        "item": text(1, kept["item"]),
        "metric": text(2, [key if isinstance(key, str) else key[0] for key in metrics]),
        "value": value.reshape(size),
        "lo": np.nan,
        "hi": np.nan,
        "n": 1,
    }
    if question.schemes:
        columns["scheme"] = text(2, ["" if isinstance(key, str) else key[1] for key in metrics])
    for name in [c for c in COORDINATES if c in kept.columns]:
        numeric = pd.api.types.is_numeric_dtype(kept[name])
        columns[name] = along(1, kept[name]) if numeric else text(1, kept[name])
    return validate(pd.DataFrame(columns | dict(question.settings)))


def _cached(source: Checkpoints, items: pd.DataFrame, question: Question) -> Path:
    rides = [c for c in COORDINATES if c in items.columns]
    key = {
        "asker": question.asker,
        "start": question.start,
        "settings": dict(question.settings),
        "keep": question.keep,
        **({"schemes": [repr(scheme) for scheme in question.schemes]} if question.schemes else {}),
        "items": items_hash(items),
        "rides": hashlib.blake2b(items[rides].to_csv().encode(), digest_size=8).hexdigest(),
        "weights": source.fingerprint(),
        "versions": versions(),
    }
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12)
    return cache_folder() / "panels" / f"{question.asker}-{digest.hexdigest()}.parquet"


def _read_cached(place: Path) -> pd.DataFrame | None:
    if not place.is_file():
        return None
    try:
        table = load(place)
    except InputError as error:  # damaged or of another version: made again, and said
        warnings.warn(f"sweep: {error}; scoring again", stacklevel=2)
        return None
    passport = table.attrs["passport"]
    table.attrs = {"passport": passport["sweep"], "dropped": passport["dropped"]}
    return table


def _write_cached(table: pd.DataFrame, place: Path) -> None:
    try:
        save(
            table,
            place,
            passport={"sweep": table.attrs["passport"], "dropped": table.attrs["dropped"]},
        )
    except OSError as error:  # a full disk must not cost the numbers that are there
        warnings.warn(f"sweep: not cached ({error})", stacklevel=2)
