"""Foils: what a studied text is told apart from, and the lists that an experiment draws.

Orhan (2023), "Recognition, recall, and retention of few-shot memories in large language models":
a foil decides what recognition means. Against an unrelated text it asks whether the model has met
the item at all, against a paraphrase or a synonym whether it kept the wording, against its own
words in another order whether it kept their order, against random words or letters only whether it
tells a text from none.

A foils frame has the columns ``item`` (whose foil it is), ``foil`` (its kind) and ``text``.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from workbench.items import check_items
from workbench.overlap import shared_words
from workbench.table import InputError

FOILS = ("unrelated", "paraphrase", "synonym", "random", "letters", "shuffled")
USUAL = FOILS[:5]  # those of Orhan (2023); word order is ours
ITSELF = "itself"  # the foil coordinate of what is measured on an item alone
STUDIED, CONTROL = "studied", "control"
SYNONYMS = 4  # swaps of which the first that is no item is taken
SHARED = 13  # words in a row that two texts share only as copies; see workbench.overlap
SAME, NEAR = "the same text", f"{SHARED} words in a row"


def make_foils(
    items: pd.DataFrame,
    *,
    unrelated: Sequence[str] = (),
    kinds: Sequence[str] | None = None,
    model=None,
    tokens: int | None = None,
    seed: int,
) -> pd.DataFrame:
    """One foil of each kind for each item.

    - ``unrelated``: a text of the pool, each used once in a group; the groups draw in one order,
      so that a control shares its foil with the studied item of the same place.
    - ``paraphrase``: the items' column of that name.
    - ``synonym``: the item with one word swapped, by :func:`workbench.lexicon.make_neighbours`.
    - ``random``: as many words as the item has, drawn evenly from the different words of the pool,
      or of the items where there is no pool.
    - ``letters``: the item's words in random order, the letters of each in random order.
    - ``shuffled``: the item's words in random order, by :func:`shuffle_words`.

    What is drawn for an item depends on the seed, its text and the pool's words alone, so neither
    other items nor the order of rows matter; unrelated texts go by place.

    Args:
        items: Items frame, with ``paraphrase`` where that kind is asked for.
        unrelated: Texts of the same kind as the items that nobody trains on.
        kinds: Of :data:`FOILS`; None: :data:`USUAL`, less paraphrases that the items do not carry
            and synonyms where WordNet is not installed or knows no word of theirs; a warning says
            so of the latter.
        model: Its tokenizer measures lengths, where foils are to be cut: shuffled letters take
            about twice the tokens of their text. None cuts none.
        tokens: Foils longer than this are cut there, between words; None: the model's context.
        seed: Of the draws.

    Returns:
        Columns ``item, foil, text``. Foils that are no foils are left out with a warning, and
        ``.attrs["dropped"]`` counts them by reason: a text that is also an item's (case and blanks
        aside), a paraphrase that is missing, a text without a word that has a synonym.

    Raises:
        InputError: Unknown kind, no paraphrases, WordNet not installed, a pool too small, or no
            foil left of a kind.
    """
    items = check_items(items)
    chosen = _kinds(items, kinds)
    listed = {plain(text) for text in items["text"]}
    pool = [text for text in unrelated if plain(text) not in listed]
    dropped = {"text also in the items": len(unrelated) - len(pool), "missing": 0, "no synonym": 0}
    parts = []
    for kind in chosen:
        try:
            foils = _texts(items, kind, pool, seed).fillna("").astype(str)
        except InputError as error:
            if kind != "synonym" or kinds is not None:
                raise
            reason = str(error).split(": ", 1)[1]
            warnings.warn(f"make_foils: no synonym foils: {reason}", stacklevel=2)
            continue
        if model is not None:
            cut = trim_texts(model, foils, tokens or model.context)
            foils = pd.Series(cut, index=foils.index, dtype=object)
        missing = foils.str.strip() == ""
        same = ~missing & foils.map(plain).isin(listed)
        dropped["no synonym" if kind == "synonym" else "missing"] += int(missing.sum())
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
        return [kind for kind in USUAL if kind != "paraphrase" or kind in items.columns]
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
    if kind == "synonym":
        return items["item"].map(_synonyms(items, seed))
    if kind == "random":
        words = sorted({word for text in pool or items["text"] for word in text.split()})
        return items["text"].map(lambda text: random_words(text, words, seed=seed))
    if kind in ("shuffled", "letters"):
        shuffle = shuffle_words if kind == "shuffled" else shuffle_letters
        return items["text"].map(lambda text: shuffle(text, seed=seed))
    place = items.groupby("group", observed=True, sort=False).cumcount()
    if place.max() >= len(pool):
        raise InputError(
            f"make_foils: {place.max() + 1} items need as many unrelated texts, the pool has "
            f"{len(pool)} that are not items; give more texts or study fewer"
        )
    order = np.random.default_rng([seed, 7]).permutation(len(pool))
    return place.map(lambda i: pool[order[i]])


def _synonyms(items: pd.DataFrame, seed: int) -> pd.Series:
    """By item, the first neighbour that is no item itself; an item without one is not there."""
    from workbench.lexicon import make_neighbours  # reads WordNet, which may not be installed

    found = make_neighbours(items, n=SYNONYMS, seed=seed)
    found = found[~found["text"].map(plain).isin({plain(text) for text in items["text"]})]
    return found.drop_duplicates("item").set_index("item")["text"]


def random_words(text: str, words: Sequence[str], *, seed: int) -> str:
    """As many words as the text has, each drawn evenly from ``words``, repetition allowed."""
    drawn = _generator(text, seed).integers(len(words), size=len(text.split()))
    return " ".join(words[i] for i in drawn)


def shuffle_letters(text: str, *, seed: int) -> str:
    """The words of a text in random order, and the characters of each in random order.

    These are Orhan's (2023) random strings: what is left of the text are its letters and the
    lengths of its words.
    """
    rng = _generator(text, seed)
    words = text.split()
    mixed = [words[i] for i in rng.permutation(len(words))]
    return " ".join("".join(rng.permutation(list(word))) for word in mixed)


def _generator(text: str, seed: int) -> np.random.Generator:
    key = hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(key))


def shuffle_words(text: str, *, seed: int) -> str:
    """The words of a text in random order, never the order they had.

    Returns:
        The same words, blanks made single. A text whose words are all alike has no other order
        and comes back as it is.
    """
    words = text.split()
    if len(set(words)) < 2:
        return " ".join(words)
    rng = _generator(text, seed)
    while True:
        shuffled = [words[i] for i in rng.permutation(len(words))]
        if shuffled != words:
            return " ".join(shuffled)


def plain(text: str) -> str:
    """A text without regard to case and blanks, for finding the same text twice."""
    return " ".join(text.split()).casefold()


def audit_lists(
    items: pd.DataFrame, foils: pd.DataFrame, interference: Sequence[str] = ()
) -> tuple[pd.DataFrame, pd.DataFrame, list[str], pd.DataFrame]:
    """Find texts that stand in two lists of an experiment, or nearly, and leave them out.

    The same text (case and blanks aside) twice in a list counts once; a control or an unrelated
    foil that is a studied text, or shares :data:`SHARED` words in a row with one, is no control;
    a foil that is an item is no foil; an interference text that holds an item or a foil, or shares
    as much with an item, is no new text. A dropped item takes its foils with it.

    Args:
        items: Items frame; ``group`` is ``studied`` or ``control``.
        foils: Their foils.
        interference: Texts to be trained on afterwards.

    Returns:
        Items, foils and interference that are left, and what was found: columns ``texts`` (a
        list), ``against`` (another), ``found`` (what they share) and ``dropped``, a row for every
        check, those that found nothing as well.
    """
    audit = []

    def note(texts: str, against: str, found: str, bad) -> np.ndarray:
        bad = np.asarray(bad, dtype=bool)
        audit.append((texts, against, found, int(bad.sum())))
        return ~bad

    studied, control = (items[items["group"] == group] for group in (STUDIED, CONTROL))
    studied = studied[note(STUDIED, STUDIED, SAME, studied["text"].map(plain).duplicated())]
    control = control[note(CONTROL, CONTROL, SAME, control["text"].map(plain).duplicated())]
    theirs = set(studied["text"].map(plain))
    control = control[note(CONTROL, STUDIED, SAME, control["text"].map(plain).isin(theirs))]
    control = control[note(CONTROL, STUDIED, NEAR, _near(control["text"], studied["text"]))]
    left = pd.concat([studied, control]).sort_index()
    gone = set(items["item"]) - set(left["item"])
    items, foils = left, foils[~foils["item"].isin(gone)]
    listed = {plain(text) for text in items["text"]}
    foils = foils[note("foils", "items", SAME, foils["text"].map(plain).isin(listed))]
    shared = (foils["foil"] == "unrelated") & _near(foils["text"], studied["text"])
    foils = foils[note("unrelated foils", STUDIED, NEAR, shared)]
    probed = {plain(text) for text in [*items["text"], *foils["text"]]}
    texts = pd.Series(list(interference), dtype=object)
    held = [any(p in bare for p in probed) for bare in texts.map(plain)]
    texts = texts[note("interference", "items and foils", "holds one", held)]
    texts = texts[note("interference", "items", NEAR, _near(texts, items["text"]))]
    found = pd.DataFrame(audit, columns=["texts", "against", "found", "dropped"])
    return items.reset_index(drop=True), foils.reset_index(drop=True), texts.tolist(), found


def _near(texts: pd.Series, others: Sequence[str]) -> np.ndarray:
    """Whether a text has SHARED words in a row that one of the others has."""
    if not len(texts) or not len(others):
        return np.zeros(len(texts), dtype=bool)
    frame = pd.DataFrame({"item": np.arange(len(texts)), "text": list(texts), "group": ""})
    return (shared_words(frame, others, words=SHARED)["value"] > 0).to_numpy()


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
