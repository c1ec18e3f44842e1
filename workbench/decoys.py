"""Decoys: texts as likely beforehand as a planted one, among which it is ranked.

Carlini et al. (2019), "The Secret Sharer": a canary is a template with its slots filled at random,
and its decoys are the same template filled otherwise. What a model owes to the template, all of
them get.
"""

from __future__ import annotations

import math
import random
import re
import string

import pandas as pd

from workbench.items import check_items, make_biographies, make_canaries
from workbench.table import InputError

SLOT = re.compile(r"\{([^{}]*)\}")
FILLINGS = {"digit": tuple(string.digits), "letter": tuple(string.ascii_lowercase)}
APART = 1_000_003  # added to the seed: the suite's own canaries are drawn from small ones
KINDS = ("canary", "biography")  # those whose template is known


def make_decoys(items: pd.DataFrame, count: int, *, tokenizer, seed: int = 0) -> pd.DataFrame:
    """Decoys for canaries and biographies, drawn as they were and cut to their length in tokens.

    Args:
        items: Items frame with ``kind``; other kinds than :data:`KINDS` get none.
        count: Decoys of each kind, at least 2.
        tokenizer: In whose tokens lengths are counted.
        seed: Of the draws, kept apart from the seed that planted the items.

    Returns:
        Items frame with ``kind``, group "decoy", without the texts of the items.

    Raises:
        InputError: A count below 2, no item of a known kind, or items of one kind of unlike
            lengths, whose decoys would have to differ too.
    """
    if count < 2:
        raise InputError(f"make_decoys: count is {count}, but must be at least 2")
    kinds = [] if "kind" not in items else [k for k in KINDS if (items["kind"] == k).any()]
    if not kinds:
        raise InputError(
            f"make_decoys: no item has the kind {' or '.join(KINDS)}; give decoys of your own: a "
            "file by load_items, or a template by fill_template"
        )
    parts = []
    for kind in kinds:
        texts = items["text"][items["kind"] == kind].tolist()
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        lengths = sorted({len(tokens) for tokens in encoded})
        if len(lengths) > 1:
            raise InputError(
                f"make_decoys: items of kind {kind} have {lengths[0]} to {lengths[-1]} tokens; "
                "give items of one length, or decoys of your own"
            )
        made = _alike(kind, count + len(texts), lengths[0], tokenizer, seed + APART)
        made = [text for text in made if text not in set(texts)][:count]
        parts.append(decoy_frame(made, name=f"decoy-{kind}").assign(kind=kind))
    return check_items(pd.concat(parts, ignore_index=True))


def _alike(kind: str, n: int, length: int, tokenizer, seed: int) -> list[str]:
    if kind == "canary":
        return list(dict.fromkeys(make_canaries(tokenizer, n, length=length, seed=seed)))
    # cut to a length two lives may begin alike, and a cut need not survive decoding: draw more
    lives = make_biographies(2 * n, seed=seed)
    cut = [ids[:length] for ids in tokenizer(lives, add_special_tokens=False)["input_ids"]]
    short = [tokenizer.decode(ids) for ids in cut]
    again = tokenizer(short, add_special_tokens=False)["input_ids"]
    same = (text for text, ids, back in zip(short, cut, again, strict=True) if ids == back)
    return list(dict.fromkeys(same))[:n]


def fill_template(template: str, count: int, *, seed: int = 0) -> pd.DataFrame:
    """Fillings of a template, all of them where they are no more than ``count``.

    ``The code is {digit}{digit}{digit}, said {Ann|Bob}`` has 2,000. Slots are ``{digit}``,
    ``{letter}`` (a to z), or alternatives between bars.

    Args:
        template: A text with at least one slot of two or more fillings.
        count: How many distinct fillings, drawn uniformly; at least 2.
        seed: Of the draws.

    Returns:
        Items frame, group "decoy". ``.attrs["space"]`` is the number of all fillings.

    Raises:
        InputError: A count below 2, a slot unknown, empty or with a filling twice, or a template
            that leaves nothing to fill.
    """
    if count < 2:
        raise InputError(f"fill_template: count is {count}, but must be at least 2")
    words = SLOT.split(template)  # fixed text and slots take turns
    slots = [_fillings(slot) for slot in words[1::2]]
    space = math.prod(len(slot) for slot in slots)
    if space < 2:
        raise InputError(
            f"fill_template: {template[:60]!r} has no slot to fill in two ways; write one as "
            "{digit}, {letter} or {red|green|blue}"
        )
    rng = random.Random(seed)  # numpy's draws no whole number beyond 64 bits
    numbers: dict[int, None] = dict.fromkeys(range(space) if space <= count else [])
    while len(numbers) < min(count, space):
        numbers[rng.randrange(space)] = None
    texts = ["".join(_filled(words, slots, number)) for number in numbers]
    made = decoy_frame(dict.fromkeys(texts), name="decoy")
    made.attrs = {"space": space}
    return made


def _fillings(slot: str) -> tuple[str, ...]:
    found = FILLINGS.get(slot) or tuple(slot.split("|"))
    if (len(found) == 1 and slot not in FILLINGS) or len(set(found)) < len(found):
        raise InputError(
            f"fill_template: the slot {{{slot}}} is none; write {{digit}}, {{letter}}, or distinct "
            "alternatives such as {red|green|blue}"
        )
    return found


def _filled(words: list[str], slots: list[tuple[str, ...]], number: int):
    for fixed, slot in zip(words[::2], slots, strict=False):
        number, chosen = divmod(number, len(slot))
        yield fixed
        yield slot[chosen]
    yield words[-1]


def decoy_frame(texts, *, name: str) -> pd.DataFrame:
    """An items frame of decoys, numbered."""
    texts = list(texts)
    return pd.DataFrame(
        {
            "item": [f"{name}-{i:05d}" for i in range(len(texts))],
            "text": texts,
            "group": "decoy",
        }
    )
