"""Are the controls really new? Word n-grams that a text shares with what the model was trained on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.items import check_items, load_items
from workbench.table import InputError, rows, validate

WORD = re.compile(r"\w+")
BLOCK = 2**20  # characters of a plain text that are read at a time
LAPPED = 2**12  # of them read twice, so that no n-gram falls between two blocks
PLAIN = (".txt", ".text", ".md", "")


def read_training_text(path: str | Path) -> Iterator[str]:
    """The training text in pieces: a plain text in blocks, whatever its lines; else the texts of a file.

    Raises:
        InputError: No such file, not UTF-8, or what ``load_items`` refuses.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in PLAIN or not path.is_file():
        yield from load_items(path)["text"]
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            tail = ""
            while block := file.read(BLOCK):
                yield tail + block
                tail = block[-LAPPED:]
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"read_training_text: cannot read {path}: {error}") from None


def shared_words(items: pd.DataFrame, texts: Iterable[str], *, words: int = 13) -> pd.DataFrame:
    """Share of each item's word n-grams that stand somewhere in the training texts.

    Words are compared without case and punctuation, so neither tokenizer nor layout matters. A
    text of fewer than ``words`` words counts as one n-gram of its own length. The training texts
    are streamed: memory grows with the items alone. 13 words are what Brown et al. (2020),
    "Language models are few-shot learners", appendix C, look for; shorter n-grams meet the set
    phrases of a language.

    Args:
        items: Items frame.
        texts: The text the model was trained on, in pieces; n-grams across two pieces are missed.
        words: Length n of the n-grams, at least 1.

    Returns:
        Rows of "shared_words": 0 where no n-gram was met, 1 where all were; NaN with a reason for
        a text without a word. ``.attrs["words_read"]`` says how much was looked through.

    Raises:
        InputError: ``words`` below 1, or no training text.
    """
    if words < 1:
        raise InputError(f"shared_words: words is {words}, it must be at least 1")
    items = check_items(items)
    split = [_words(text) for text in items["text"]]
    lengths = sorted({min(words, len(each)) for each in split} - {0})
    own = [_shingles(each, min(words, len(each))) for each in split]
    wanted, met, read = set().union(*own), set(), 0
    for text in texts:
        found = _words(text)
        read += len(found)
        for length in lengths:
            met |= wanted & _shingles(found, length)
    if not read:
        raise InputError("shared_words: the training texts hold no word; give the text trained on")
    share = [len(each & met) / len(each) if each else np.nan for each in own]
    table = rows(
        "shared_words",
        share,
        run="training text",
        group=items["group"],
        item=items["item"],
        beside={"reason": ["" if each else "no word in the text" for each in own]},
    )
    table = validate(table)
    table.attrs["words_read"] = read
    return table


def drop_shared(
    items: pd.DataFrame,
    shared: pd.DataFrame,
    *,
    controls: Sequence[str] = ("never", "unseen"),
    limit: float = 0.0,
) -> pd.DataFrame:
    """Drop the controls that the model has met in part, and say how many.

    Args:
        items: Items frame.
        shared: What :func:`shared_words` found of them.
        controls: Groups that claim to be in no training batch; others are kept as they are.
        limit: Largest share of n-grams that is let pass.

    Returns:
        The items left; ``.attrs["dropped"]`` counts those dropped, and a warning names the first.

    Raises:
        InputError: No control would be left.
    """
    share = shared.set_index(shared["item"].astype(str))["value"]
    claims = items["group"].astype(str).isin(list(controls))
    met = claims & (items["item"].astype(str).map(share) > limit)
    if claims.any() and met.sum() == claims.sum():
        raise InputError(
            f"drop_shared: all {met.sum()} controls share more than {limit:.0%} of their word "
            "n-grams with the training text; they are no controls. Give others, or longer n-grams"
        )
    if met.any():
        first = items.loc[met, "item"].iloc[0]
        warnings.warn(
            f"drop_shared: dropped {met.sum()} of {claims.sum()} controls that share words with "
            f"the training text (first: {first}, {share[str(first)]:.0%} of its n-grams)",
            stacklevel=2,
        )
    kept = items[~met].reset_index(drop=True)
    kept.attrs["dropped"] = items.attrs.get("dropped", 0) + int(met.sum())
    return kept


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def _shingles(words: Sequence[str], length: int) -> set[str]:
    return {" ".join(words[at : at + length]) for at in range(len(words) - length + 1) if length}
