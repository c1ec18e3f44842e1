"""Foils: what a studied text is told apart from, and the lists that an experiment draws.

Orhan (2023), "Recognition, recall, and retention of few-shot memories in large language models":
a foil decides what recognition means. Against an unrelated text it asks whether the model has met
the item at all, against a paraphrase whether it kept the wording, against its own words in another
order whether it kept their order.

A foils frame has the columns ``item`` (whose foil it is), ``foil`` (its kind) and ``text``.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from workbench.items import check_items
from workbench.table import InputError

FOILS = ("unrelated", "paraphrase", "shuffled")
ITSELF = "itself"  # the foil coordinate of what is measured on an item alone
STUDIED, CONTROL = "studied", "control"


def make_foils(
    items: pd.DataFrame,
    *,
    unrelated: Sequence[str] = (),
    kinds: Sequence[str] | None = None,
    seed: int,
) -> pd.DataFrame:
    """One foil of each kind for each item.

    ``unrelated``: a text of the pool, each used once in a group; the groups draw in one order, so
    that a control shares its foil with the studied item of the same place. ``paraphrase``: the
    items' column of that name. ``shuffled``: the item's own words in random order, drawn from the
    seed and the text, so that neither other items nor the order of rows matter.

    Args:
        items: Items frame, with ``paraphrase`` where that kind is asked for.
        unrelated: Texts of the same kind as the items that nobody trains on.
        kinds: Of :data:`FOILS`; None: all, but paraphrases only where the items carry them.
        seed: Of the draws.

    Returns:
        Columns ``item, foil, text``. Foils that are no foils are left out with a warning, and
        ``.attrs["dropped"]`` counts them by reason: a text that is also an item's (case and blanks
        aside), a paraphrase that is missing.

    Raises:
        InputError: Unknown kind, no paraphrases, a pool too small, or no foil left of a kind.
    """
    items = check_items(items)
    kinds = _kinds(items, kinds)
    listed = {plain(text) for text in items["text"]}
    pool = [text for text in unrelated if plain(text) not in listed]
    dropped = {"text also in the items": len(unrelated) - len(pool), "missing": 0}
    parts = []
    for kind in kinds:
        foils = _texts(items, kind, pool, seed)
        foils = foils.fillna("").astype(str)
        missing = foils.str.strip() == ""
        same = ~missing & foils.map(plain).isin(listed)
        dropped["missing"] += int(missing.sum())
        dropped["text also in the items"] += int(same.sum())
        keep = ~(missing | same)
        if not keep.any():
            raise InputError(
                f"make_foils: none of {len(items)} {kind} foils can be used ({missing.sum()} are "
                f"missing, {same.sum()} are texts of the items themselves); leave this kind out"
            )
        parts.append(pd.DataFrame({"item": items["item"][keep], "foil": kind, "text": foils[keep]}))
    if sum(dropped.values()):
        counted = ", ".join(f"{reason}: {count}" for reason, count in dropped.items() if count)
        warnings.warn(f"make_foils: dropped foils ({counted})", stacklevel=2)
    made = pd.concat(parts, ignore_index=True)
    made.attrs = {"dropped": dropped}
    return made


def _kinds(items: pd.DataFrame, kinds: Sequence[str] | None) -> Sequence[str]:
    if kinds is None:
        return [kind for kind in FOILS if kind != "paraphrase" or kind in items.columns]
    unknown = [kind for kind in kinds if kind not in FOILS]
    if unknown or not len(kinds):
        asked = repr(unknown[0]) if unknown else "none"
        raise InputError(f"make_foils: foil kind {asked}; choose from {', '.join(FOILS)}")
    if "paraphrase" in kinds and "paraphrase" not in items.columns:
        raise InputError(
            "make_foils: the items have no column 'paraphrase'; add one, or leave this kind out"
        )
    return kinds


def _texts(items: pd.DataFrame, kind: str, pool: Sequence[str], seed: int) -> pd.Series:
    if kind == "paraphrase":
        return items["paraphrase"]
    if kind == "shuffled":
        return items["text"].map(lambda text: shuffle_words(text, seed=seed))
    place = items.groupby("group", observed=True, sort=False).cumcount()
    if place.max() >= len(pool):
        raise InputError(
            f"make_foils: {place.max() + 1} items need as many unrelated texts, the pool has "
            f"{len(pool)} that are not items; give more texts or study fewer"
        )
    order = np.random.default_rng([seed, 7]).permutation(len(pool))
    return place.map(lambda i: pool[order[i]])


def shuffle_words(text: str, *, seed: int) -> str:
    """The words of a text in random order, never the order they had.

    Returns:
        The same words, blanks made single. A text whose words are all alike has no other order
        and comes back as it is.
    """
    words = text.split()
    if len(set(words)) < 2:
        return " ".join(words)
    key = hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(key))
    while True:
        shuffled = [words[i] for i in rng.permutation(len(words))]
        if shuffled != words:
            return " ".join(shuffled)


def plain(text: str) -> str:
    """A text without regard to case and blanks, for finding the same text twice."""
    return " ".join(text.split()).casefold()


def make_study_lists(
    model, texts: pd.DataFrame, *, n: int, tokens: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Draw the lists of an experiment: studied, matched controls, unrelated texts for foils.

    All are drawn from the same texts at random, which is what matches them.

    Args:
        model: Its tokenizer measures lengths.
        texts: Items frame of texts that the model never trained on, a ``paraphrase`` beside them
            if there is one; repeated texts count once.
        n: Items of each list.
        tokens: Texts (and paraphrases) longer than this are cut there, between words.
        seed: Of the draw.

    Returns:
        ``2 n`` items (``group`` is ``studied`` or ``control``), ``n`` texts for unrelated foils,
        and the rest in random order: other lists, on which settings can be chosen.

    Raises:
        InputError: Fewer than ``3 n`` distinct texts of two words or more, ``n`` below 2, or
            ``tokens`` below 4 or above what the context holds.
    """
    if n < 2:
        raise InputError(
            f"make_study_lists: lists of {n}; an interval needs at least 2 items a list, so give "
            "more texts"
        )
    if not 4 <= tokens <= model.context:
        raise InputError(
            f"make_study_lists: texts of {tokens} tokens; choose 4 to {model.context}, the model's "
            "context"
        )
    texts = check_items(texts)
    texts = texts.assign(text=trim_texts(model, texts["text"], tokens))
    if "paraphrase" in texts:
        known = texts["paraphrase"].notna()
        cut = trim_texts(model, texts.loc[known, "paraphrase"], tokens)
        texts["paraphrase"] = pd.Series(cut, index=texts.index[known]).reindex(texts.index)
    usable = texts[texts["text"].str.split().str.len() >= 2]
    usable = usable[~usable["text"].map(plain).duplicated()]
    if len(usable) < 3 * n:
        raise InputError(
            f"make_study_lists: {n} items a list need {3 * n} distinct texts (studied, controls, "
            f"unrelated foils), got {len(usable)} of {len(texts)} that can be used; give more "
            f"texts or set n_items={len(usable) // 3}"
        )
    order = np.random.default_rng([seed, 8]).permutation(len(usable))
    drawn = usable.iloc[order].reset_index(drop=True)
    items = drawn.head(2 * n).assign(group=np.repeat([STUDIED, CONTROL], n))
    rest = drawn.iloc[2 * n :].reset_index(drop=True)
    return items, rest.head(n), rest.iloc[n:].reset_index(drop=True)


def trim_texts(model, texts: Sequence[str], tokens: int) -> list[str]:
    """Each text as it is, or cut between words to at most ``tokens`` tokens.

    A single word of more tokens is cut inside.
    """
    encoded = model.encode(list(texts))
    return [
        text if len(ids) <= tokens else model.decode(ids[:tokens]).rstrip().rsplit(None, 1)[0]
        for text, ids in zip(texts, encoded, strict=True)
    ]
