"""Whether a model tells a text it studied from one it did not: two-alternative forced choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from workbench.foils import ITSELF
from workbench.items import check_items
from workbench.models import LanguageModel
from workbench.table import InputError, rows, validate

DECIMALS = 6  # of a loss in nats: below the scores' own rounding (1e-5), so equals stay equal


def probe_recognition(
    model: LanguageModel, items: pd.DataFrame, foils: pd.DataFrame
) -> pd.DataFrame:
    """Put each item beside its foils and see which the model finds likelier.

    Orhan (2023). Each distinct text is scored once, however many pairs it stands in.

    Args:
        model: Any causal model.
        items: Items frame.
        foils: Columns ``item, foil, text``, as :func:`workbench.foils.make_foils` gives them.

    Returns:
        Table with, for each item, ``loss`` (nats per token; the first token and BOS are not
        scored) of the item (``foil`` = "itself") and of each foil, and ``recognition``: 1 where
        the item is likelier than the foil, 1/2 for a tie, 0 otherwise. Chance is not 1/2: what a
        model scores before it studied is the baseline. Coordinate ``foil``, the kind of foil.

    Raises:
        InputError: No foils, a foil of no item, two of a kind for one item, a text of one token or
            longer than the context, NaN losses.
    """
    return prepare_recognition(model, items, foils)(model)


def prepare_recognition(
    model: LanguageModel, items: pd.DataFrame, foils: pd.DataFrame
) -> Callable[[LanguageModel], pd.DataFrame]:
    """Pair, encode and check the texts once, where the same are asked for at many steps.

    Args, raises: As :func:`probe_recognition`.

    Returns:
        What gives its table for a model with this one's tokenizer.
    """
    items = check_items(items)
    pairs = _pairs(items, foils)
    texts = list(dict.fromkeys([*items["text"], *pairs["text"]]))
    named = {p.text: f"the {p.foil} foil of item {p.item}" for p in pairs.itertuples()}
    named |= {i.text: f"item {i.item}" for i in items.itertuples()}
    tokens = _encode(model, texts, named)
    place = {text: at for at, text in enumerate(texts)}
    own, foil = items["text"].map(place).to_numpy(), pairs["text"].map(place).to_numpy()
    # the item's own loss, once for each of its foils
    beside = pairs["item"].map(dict(zip(items["item"], own, strict=True))).to_numpy()
    pair = {"run": model.run, "group": pairs["group"], "item": pairs["item"]}
    kind, blank = {"foil": pairs["foil"]}, np.full(len(pairs), np.nan)
    parts = [
        rows("loss", np.full(len(items), np.nan), run=model.run, group=items["group"],
             item=items["item"]).assign(foil=ITSELF),
        rows("loss", blank, beside=kind, **pair),
        rows("recognition", blank, beside=kind, **pair),
    ]  # fmt: skip
    frame = validate(pd.concat(parts, ignore_index=True))

    def ask(model: LanguageModel) -> pd.DataFrame:
        loss = _mean_loss(model, tokens, lambda at: named[texts[at]])
        said = forced_choice(loss[beside], loss[foil])
        run = frame["run"].cat.rename_categories([model.run])
        value = np.concatenate([loss[own], loss[foil], said])
        return frame.assign(run=run, step=model.step, value=value)

    return ask


def forced_choice(
    studied: Float[np.ndarray, " pair"], foil: Float[np.ndarray, " pair"]
) -> Float[np.ndarray, " pair"]:
    """1 where the studied text has the lower loss, 1/2 where both are equal, 0 where the foil has.

    Args:
        studied, foil: Mean token loss of each pair's two texts, in nats.
    """
    return (studied < foil) + 0.5 * (studied == foil)


def mean_loss(
    model: LanguageModel, texts: Sequence[str], *, named: dict[str, str]
) -> Float[np.ndarray, " text"]:
    """Mean token loss of each text in nats, to 1e-6, which is what a tie means.

    Args:
        named: What to call each text in a message.

    Raises:
        InputError: A text of one token or longer than the context; a loss that is not finite.
    """
    return _mean_loss(model, _encode(model, texts, named), lambda at: named[texts[at]])


def _encode(
    model: LanguageModel, texts: Sequence[str], named: dict[str, str]
) -> list[Int[np.ndarray, " pos"]]:
    tokens = model.encode(texts)
    lengths = np.array([len(each) for each in tokens])
    for bad, what in (
        (lengths < 2, "needs at least 2, the first is not scored; drop it"),
        (lengths > model.context, f"the context holds {model.context}; cut it"),
    ):
        if bad.any():
            first = int(bad.argmax())
            raise InputError(
                f"probe_recognition: {named[texts[first]]} has {lengths[first]} tokens, {what} "
                f"({bad.sum()} of {len(texts)} texts)"
            )
    return tokens


def _mean_loss(
    model: LanguageModel, tokens: Sequence[Int[np.ndarray, " pos"]], named: Callable[[int], str]
) -> Float[np.ndarray, " text"]:
    loss = np.full(len(tokens), np.nan)
    for index, scores in model.score_batches(tokens, keep=("log_probability",)):
        scored = np.arange(scores.log_probability.shape[1]) < scores.length[:, None]
        total = np.where(scored, scores.log_probability, 0.0).astype(np.float64).sum(axis=1)
        loss[index] = -total / scores.length
    if not np.isfinite(loss).all():
        first = int(np.flatnonzero(~np.isfinite(loss))[0])
        raise InputError(
            f"probe_recognition: the loss of {named(first)} is {loss[first]} at step {model.step} "
            f"of {model.run}; the weights or their dtype give NaN or Inf"
        )
    return loss.round(DECIMALS)


def _pairs(items: pd.DataFrame, foils: pd.DataFrame) -> pd.DataFrame:
    lacking = [name for name in ("item", "foil", "text") if name not in foils.columns]
    if lacking or foils.empty:
        what = f"no column {lacking[0]!r}" if lacking else "no foils"
        raise InputError(
            f"probe_recognition: {what}; make_foils gives a frame with item, foil and text"
        )
    refuse_strange_foils(items, foils, asker="probe_recognition")
    group = items.set_index("item")["group"]
    pairs = foils.reset_index(drop=True)
    return pairs.assign(group=pairs["item"].map(group))


def refuse_strange_foils(items: pd.DataFrame, foils: pd.DataFrame, *, asker: str) -> None:
    """Refuse foils that belong to no item, and several of a kind for one item.

    Raises:
        InputError: The first of them is named; ``asker`` begins the message.
    """
    orphans = ~foils["item"].astype(str).isin(items["item"].astype(str))
    if orphans.any():
        raise InputError(
            f"{asker}: {orphans.sum()} foils belong to none of the items (first: "
            f"{foils['item'][orphans].iloc[0]!r}); make the foils from these items"
        )
    twice = foils.duplicated(["item", "foil"])
    if twice.any():
        first = foils[twice].iloc[0]
        raise InputError(
            f"{asker}: item {first['item']!r} has several {first['foil']} foils; keep one"
        )
