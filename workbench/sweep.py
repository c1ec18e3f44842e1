"""One pass over checkpoints and items: what the probes that need only scores have in common.

Each checkpoint is read once into the same module, each item is scored once at each, and a batch
is reduced to measurements before the next one is scored. The panel of a model or a series of
checkpoints is kept in the cache under the hash of weights, items, settings and the code that made
it, so that notebooks and processes share it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

import workbench.decoding
import workbench.items
import workbench.models
from workbench.cache import keep
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
# beside a probe's own code, what its numbers are made by
MAKERS = (
    workbench.models.__file__,
    workbench.decoding.__file__,
    workbench.items.__file__,
    __file__,
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
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
        also: What else ``reduce`` depends on, as a hash for the cache; settings and tokens are
            known, but what it takes from elsewhere is not.
        cached: Whether the panel is kept; not where a model in training is asked once.
    """

    asker: str
    start: int
    keep: tuple[str, ...]
    settings: Mapping[str, int | float]
    reduce: Reduce
    schemes: tuple[Decoding, ...] = ()
    also: str = ""
    cached: bool = True


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
    if isinstance(source, Checkpoints):
        asked = None  # a panel that is cached is found without reading a model
        who = source.fingerprint()
    else:
        asked = cut(source, items)
        who = state(source, asked[0]) if question.cached else ""

    def make() -> pd.DataFrame:
        return _sweep(source, items, cut, question, asked)

    code = code_hash(question.reduce)
    if not (question.cached and who and code):
        return make()
    key = {
        "settings": dict(question.settings),
        "start": question.start,
        "keep": question.keep,
        "schemes": [repr(scheme) for scheme in question.schemes],
        "also": question.also,
        "code": code,
    }
    return _kept(question.asker, who, items, key, make)


def panel(
    asker: str,
    model: LanguageModel,
    tokens: Sequence[Int[np.ndarray, " pos"]],
    items: pd.DataFrame,
    settings: Mapping,
    make: Callable[[], pd.DataFrame],
) -> pd.DataFrame:
    """The table of a probe that needs more than scores, from the cache or made now.

    Args:
        asker: The probe's name.
        model, tokens, items: What is asked about what.
        settings: All else that the numbers depend on; what JSON holds.
        make: A function of the probe's own file that gives the table, with ``passport`` and
            ``dropped`` in its ``.attrs``; other attributes are not kept.
    """
    who, code = state(model, tokens), code_hash(make)
    if not (who and code):
        return make()
    return _kept(asker, who, items, dict(settings) | {"code": code}, make)


def _kept(asker: str, who: str, items: pd.DataFrame, settings: dict, make) -> pd.DataFrame:
    rides = [c for c in COORDINATES if c in items.columns]
    key = {
        "asker": asker,
        "settings": settings,
        "items": items_hash(items),
        "rides": hashlib.blake2b(items[rides].to_csv().encode(), digest_size=8).hexdigest(),
        "weights": who,
        "versions": versions(),
    }
    text = json.dumps(key, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    return keep(
        cache_folder() / "panels" / f"{asker}-{digest}.parquet",
        make,
        read=_read,
        write=_write,
        asker=asker,
        again="scoring again",
    )


def state(model: LanguageModel, tokens: Sequence) -> str:
    """Hash of all that a model's answers about these tokens depend on, empty where it is not known.

    It is not known of a module with hooks or a forward pass of its own, one in training, and one
    that was made by hand: what these compute their weights do not say.
    """
    module = model.module
    if not model.source or module.training or not hasattr(module.config, "to_dict"):
        return ""
    for each in module.modules():
        # accelerate, which moves the inputs of layers and no more, puts its own forward pass there
        patched = "forward" in vars(each) and not hasattr(each, "_hf_hook")
        if patched or any(getattr(each, name) for name in HOOKS):
            return ""
    about = module.config.to_dict()
    about.pop("_name_or_path", None)
    # the table says run and step, its passport the source
    told = [model.run, model.step, model.source, model.revision, model.bos, about]
    told += [str(model.device), str(module.dtype)]
    digest = hashlib.blake2b(model.weights_hash().encode(), digest_size=12)
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    for each in tokens:
        digest.update(len(each).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(each, dtype=np.int64))
    return digest.hexdigest()


def code_hash(made_by: Callable) -> str:
    """Hash of the code that makes a panel's numbers, so that a change of it is a change of them.

    Empty where the function stands in no file (a notebook's cell).
    """
    made_by = getattr(made_by, "func", made_by)  # of a partial
    if not isinstance(made_by, FunctionType) or not Path(made_by.__code__.co_filename).is_file():
        return ""
    return _hash_of_files((made_by.__code__.co_filename, *MAKERS))


@cache
def _hash_of_files(names: tuple[str, ...]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        digest.update(Path(name).read_bytes())
    return digest.hexdigest()


def _sweep(source, items, cut, question: Question, asked) -> pd.DataFrame:
    checkpoints = list(source.steps) if isinstance(source, Checkpoints) else [source.step]
    parts: list[dict[str, Float[np.ndarray, " item"]]] = []
    for model in source if isinstance(source, Checkpoints) else [source]:
        if asked is None:
            asked = cut(model, items)
        parts.append(_ask(model, asked[0], question))
    kept = asked[1]
    table = _assemble(parts, checkpoints, kept, model.run, question)
    table.attrs = {
        "passport": {**model.passport(), "items": items_hash(items), "steps": checkpoints},
        "dropped": kept.attrs.get("dropped", 0),
    }
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


def _read(place: Path) -> pd.DataFrame:
    table = load(place)
    about = table.attrs["passport"]
    table.attrs = {"passport": about["sweep"], "dropped": about["dropped"]}
    return table


def _write(table: pd.DataFrame, place: Path) -> None:
    save(
        table, place, passport={"sweep": table.attrs["passport"], "dropped": table.attrs["dropped"]}
    )
