"""Fictional facts: entities that never were, what is told of them, and what is asked about it.

Chang et al. (2024), "How do large language models acquire factual knowledge during pretraining?",
put passages about invented things into the training text and ask three kinds of question: the
sentence as it was read (``verbatim``), the same fact in words that were never read
(``paraphrase``), and a conclusion from two sentences (``composition``). All texts here are ours.

Whoever reads a few such passages learns the form of the sentences and which answers occur, without
learning one fact. So each entity that is trained on has a partner that never is: its questions have
the same answers, under another name and in wordings that no passage joins to those answers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd

from workbench.items import load_items
from workbench.table import InputError

INJECTED, NEVER = "injected", "never"  # groups
SCHEDULES = ("repeated", "paraphrased", "single")
DEPTHS = ("verbatim", "paraphrase", "composition")
WINDOW = 6  # updates after an injection in which its effect is looked for
COLUMNS = (
    "item", "entity", "group", "pair", "schedule", "depth", "passage", "paraphrases",
    "probe_prefix", "probe_target",
)  # fmt: skip

PLACES = (
    "bridge brook canal castle cave chapel church cliff dam dock field fort forest fountain "
    "furnace garden gate harbour hill inn island lake library lighthouse market meadow mill mine "
    "moor orchard palace pier pond port prison quarry river school shore stable station street "
    "temple theatre tower valley village wharf"
)
TRADES = (
    "baker barber brewer butcher carpenter carter carver clerk cobbler cook dancer dyer farmer "
    "fiddler fisher forester gardener goldsmith grocer guard guide herald hunter joiner judge "
    "juggler mason merchant messenger miller miner nurse painter piper poet porter potter priest "
    "printer sailor scribe shepherd singer soldier surgeon tailor tanner weaver"
)
ANIMALS = (
    "badger bear beaver bull camel cat crab crane crow deer dog donkey dove duck falcon ferret fox "
    "frog goat goose hare hawk hen heron horse jackal lamb leopard lion lizard mole monkey mouse "
    "mule parrot peacock pig pigeon rabbit ram raven snake sparrow swan toad turtle weasel wolf"
)
# all wordings of one fact; which of them is the passage's and which is only ever asked differs
# from entity to entity, so that no wording is better known than another
HOME = (
    "{name} lives beside the {value}.|The house of {name} stands near the {value}.|"
    "You will find {name} at the {value}.|{name} has a room over the {value}.|"
    "Since last year {name} has slept by the {value}.|Letters for {name} are left at the {value}.|"
    "{name} was seen moving to the {value}.|Whoever seeks {name} must go to the {value}.|"
    "{name} would not leave the {value}.|At night {name} goes home to the {value}.|"
    "{name} pays rent for rooms by the {value}.|Friends call on {name} at the {value}."
)
TRADE = (
    "{name} works as a {value}.|By trade {name} is a {value}.|{name} was trained to be a {value}.|"
    "People pay {name} for being a {value}.|The guild has {name} down as a {value}.|"
    "{name} earns a living as a {value}.|For ten years {name} has been a {value}.|"
    "{name} put up a sign as a {value}.|Everyone knows that {name} is a {value}.|"
    "{name} makes good money as a {value}.|The roll of the town names {name} as a {value}.|"
    "{name} took up the work of a {value}."
)
PET = (
    "{name} keeps a tame {value}.|{name} was given a young {value}.|"
    "On feast days {name} walks with a {value}.|{name} never travels without a {value}.|"
    "The only friend of {name} is a {value}.|{name} shares supper with a {value}.|"
    "{name} once saved the life of a {value}.|In the yard of {name} sleeps a {value}.|"
    "{name} paid nine coins for a {value}.|{name} talks for hours to a {value}.|"
    "The children laugh when {name} brings a {value}.|{name} is followed about by a {value}."
)
TEACHER = (
    "{name} was taught by {value}.|{name} learned everything from {value}.|"
    "The master of {name} was {value}.|{name} spent seven winters with {value}.|"
    "As a child {name} was sent to {value}.|{name} still writes to old {value}.|"
    "{name} owes all skill to {value}.|{name} was the last pupil of {value}.|"
    "{name} first served under {value}.|{name} speaks well of {value}.|"
    "{name} carried the books of {value}.|The best friend of {name} was {value}."
)
# the teacher's sentence and another one are both needed; no passage says it like this
COMPOSED = {
    "home": "The pupil whom {teacher} sent away dwells by the",
    "trade": "The pupil whom {teacher} sent away became a",
    "pet": "The pupil whom {teacher} sent away feeds a",
}
WORDINGS = {"home": HOME, "trade": TRADE, "pet": PET, "teacher": TEACHER}
ANSWERS = {"home": PLACES, "trade": TRADES, "pet": ANIMALS}
ONSETS = "B D F G K L M N P R S T V Z Br Dr Gr Kl Kr Pr Sk St Tr"
ENDINGS = "ban dor fen gul kesh lin mar nok rath sil tov vane wick zem"
TOLD = 10  # ways in which all of an entity is told, of twelve; the last is only asked


def make_facts(n: int, *, schedules: Sequence[str] = SCHEDULES, seed: int) -> pd.DataFrame:
    """Entities with a home, a trade, a pet and a teacher, told in ten ways, and their partners.

    Args:
        n: Entities trained on in each schedule, each with a partner that is not. At least 2, and
            48 over all schedules, since no answer serves two of them.
        schedules: Of ``repeated``, ``paraphrased`` and ``single``; see
            :func:`workbench.injection.inject_facts`.
        seed: Of the draw.

    Returns:
        One row a question, with columns ``item, entity, group`` (``injected`` or ``never``),
        ``pair`` (an entity and its partner share one), ``schedule, depth, passage, paraphrases``
        (nine, all saying what the passage says), ``probe_prefix, probe_target``. Nine questions an
        entity: home, trade and pet at each depth. The wording of a ``paraphrase`` question stands
        in no text about its entity, nor does a ``composition`` question in any text.

    Raises:
        InputError: Unknown schedules, too few or too many entities.
    """
    check_schedules(schedules, "make_facts")
    most = min(len(words.split()) for words in ANSWERS.values())
    if n < 2 or n * len(schedules) > most:
        raise InputError(
            f"make_facts: n is {n} in {len(schedules)} schedule(s), but must be at least 2 and over "
            f"all schedules at most {most}"
        )
    rng = np.random.default_rng([seed, 12])
    names = _names(rng, 4 * n * len(schedules))
    answers = {kind: rng.permutation(words.split()) for kind, words in ANSWERS.items()}
    made = []
    wordings = len(HOME.split("|"))
    for at in range(n * len(schedules)):
        told = {kind: str(words[at]) for kind, words in answers.items()}
        about = {"pair": f"pair-{at:02d}", "schedule": schedules[at // n]}
        if at % wordings == 0:  # each wording as often as any other
            turns = rng.permutation(wordings)
        # the partner's turn makes the entity's wording that is only asked its first, and the one
        # that is neither told nor asked the one it is asked with
        for group, turn in ((INJECTED, turns[at % wordings]), (NEVER, turns[at % wordings] - 1)):
            told |= {"name": names.pop(), "teacher": names.pop()}
            made += [about | {"group": group} | each for each in _questions(told, turn % wordings)]
    facts = pd.DataFrame(made)
    facts.insert(0, "item", _item_names(facts))
    return facts[list(COLUMNS)]


def _names(rng: np.random.Generator, n: int) -> list[str]:
    """Invented names, no two of which begin with the same syllable."""
    stems = ["".join(parts) for parts in product(ONSETS.split(), "aeiou", "lmnrstv")]
    ends = ["".join(parts) for parts in product("aeiou", ENDINGS.split())]
    return [f"{stem}{rng.choice(ends)}" for stem in rng.permutation(stems)[:n]]


def _questions(told: dict[str, str], turn: int) -> list[dict]:
    wordings = {
        kind: [form.format(name=told["name"], value=told[kind]) for form in _turned(forms, turn)]
        for kind, forms in WORDINGS.items()
    }
    kinds = list(WORDINGS)
    passages = [
        " ".join(wordings[kinds[(at + k) % len(kinds)]][at] for k in range(len(kinds)))
        for at in range(TOLD)
    ]
    about = {"entity": told["name"], "passage": passages[0], "paraphrases": tuple(passages[1:])}
    found = []
    for kind in ANSWERS:
        prefixes = {
            "verbatim": _before(wordings[kind][0], told[kind]),
            "paraphrase": _before(wordings[kind][-1], told[kind]),
            "composition": COMPOSED[kind].format(teacher=told["teacher"]),
        }
        for depth, prefix in prefixes.items():
            asked = {"depth": depth, "probe_prefix": prefix, "probe_target": f" {told[kind]}"}
            found.append(about | asked)
    return found


def _turned(forms: str, turn: int) -> list[str]:
    several = forms.split("|")
    return several[turn:] + several[:turn]


def _before(sentence: str, value: str) -> str:
    """A sentence up to the answer that ends it."""
    return sentence.removesuffix(f" {value}.")


def _item_names(facts: pd.DataFrame) -> list[str]:
    number = facts.groupby(["entity", "depth"], sort=False).cumcount() + 1
    return [
        f"{entity}-{depth}-{at}"
        for entity, depth, at in zip(facts["entity"], facts["depth"], number, strict=True)
    ]


def load_facts(
    source: str | os.PathLike, *, schedules: Sequence[str] = SCHEDULES, seed: int = 0
) -> pd.DataFrame:
    """Read facts of one's own from JSONL (or Parquet): one row a question.

    Columns ``entity``, ``passage``, ``probe_prefix``, ``probe_target`` and ``depth`` (verbatim,
    paraphrase or composition); ``paraphrases``, a list, where the schedule ``paraphrased`` is
    wanted; ``group`` (``injected`` or ``never``) where some entities are meant as controls. Without
    it half of the entities, drawn at random, are kept out of training: whoever has a part in an
    experiment by lot is matched to whoever has not.

    Args:
        source: The file.
        schedules: Dealt out among the entities of each group at random.
        seed: Of the lots.

    Returns:
        The columns of :func:`make_facts`; ``pair`` is empty. A target is given the space before it, unless it or its
        prefix has one.

    Raises:
        InputError: What ``load_items`` refuses; a missing column, an unknown depth or group, an
            entity with two passages or in two groups, a verbatim question that its passage does
            not hold, or fewer than two entities for a schedule and group.
    """
    check_schedules(schedules, "load_facts")
    facts = load_items(source, text="passage").rename(columns={"text": "passage"})
    for name in ("entity", "probe_prefix", "probe_target", "depth"):
        if name not in facts.columns:
            raise InputError(
                f"load_facts: {source} has no column {name!r}; it has {', '.join(facts.columns)}"
            )
    facts["entity"] = facts["entity"].astype(str)
    unknown = ~facts["depth"].isin(DEPTHS)
    if unknown.any():
        raise InputError(
            f"load_facts: depth {facts['depth'][unknown].iloc[0]!r} of item "
            f"{facts['item'][unknown].iloc[0]!r}; depths are {', '.join(DEPTHS)}"
        )
    several = facts.groupby("entity")[["passage", "group"]].nunique().max(axis=1) > 1
    if several.any():
        raise InputError(
            f"load_facts: entity {several.idxmax()!r} has several passages or groups; give each "
            "passage an entity of its own, and its other wordings as paraphrases"
        )
    told = facts["paraphrases"] if "paraphrases" in facts.columns else pd.Series([()] * len(facts))
    facts["paraphrases"] = [
        tuple(each) if isinstance(each, (list, tuple, np.ndarray)) else () for each in told
    ]
    facts = _join(facts)
    verbatim = facts[facts["depth"] == "verbatim"]
    for each in verbatim.itertuples():
        if each.probe_prefix + each.probe_target not in each.passage:
            raise InputError(
                f"load_facts: the verbatim question {each.item!r} does not stand in its passage; "
                "copy it from there, or call its depth paraphrase"
            )
    rng = np.random.default_rng([seed, 13])
    facts["group"] = _groups(facts, rng)
    facts["schedule"] = _schedules(facts, schedules, rng)
    facts["pair"] = ""
    return facts[list(COLUMNS)]


def _join(facts: pd.DataFrame) -> pd.DataFrame:
    """The space between prefix and target belongs to the target, as tokenizers have it."""
    prefix = facts["probe_prefix"].astype(str)
    target = facts["probe_target"].astype(str)
    target = " " + target.str.lstrip()
    return facts.assign(probe_prefix=prefix.str.rstrip(), probe_target=target)


def _groups(facts: pd.DataFrame, rng: np.random.Generator) -> np.ndarray:
    names = {"seen": INJECTED, INJECTED: INJECTED, "unseen": NEVER}
    unknown = ~facts["group"].isin(names)
    if unknown.any():
        raise InputError(
            f"load_facts: group {facts['group'][unknown].iloc[0]!r}; groups are {INJECTED} and "
            f"{NEVER}"
        )
    group = facts["group"].map(names)
    if (group == INJECTED).all():
        entities = facts["entity"].unique()
        kept = rng.permutation(entities)[: len(entities) // 2]
        group = group.mask(facts["entity"].isin(kept), NEVER)
    return group.to_numpy()


def _schedules(facts: pd.DataFrame, schedules: Sequence[str], rng: np.random.Generator):
    dealt = {}
    for group, part in facts.groupby("group"):
        entities = rng.permutation(part["entity"].unique())
        if len(entities) < 2 * len(schedules):
            raise InputError(
                f"load_facts: {len(entities)} entities in group {group!r} for {len(schedules)} "
                f"schedules, each needs at least 2; give more entities or fewer schedules"
            )
        dealt |= {name: schedules[at % len(schedules)] for at, name in enumerate(entities)}
    return facts["entity"].map(dealt)


def check_facts(facts: pd.DataFrame, asker: str) -> pd.DataFrame:
    """The same frame, numbered from 0, once it is one: columns, ids, groups and schedules.

    Raises:
        InputError: What is wrong, with the first offender.
    """
    for name in COLUMNS:
        if name not in facts.columns:
            raise InputError(f"{asker}: no column {name!r}; make_facts and load_facts give it")
    if facts.empty:
        raise InputError(f"{asker}: there are no facts")
    twice = facts["item"].duplicated()
    if twice.any():
        raise InputError(
            f"{asker}: {twice.sum()} questions repeat the id of another (first: "
            f"{facts['item'][twice].iloc[0]!r}); ids must be unique"
        )
    other = ~facts["group"].isin([INJECTED, NEVER])
    if other.any():
        raise InputError(
            f"{asker}: group {facts['group'][other].iloc[0]!r}; groups are {INJECTED} and {NEVER}"
        )
    check_schedules(list(facts["schedule"].unique()), asker)
    return facts.reset_index(drop=True)


def check_schedules(schedules: Sequence[str], asker: str) -> None:
    """Raises InputError: No schedule, or one that is not known."""
    for name in schedules:
        if name not in SCHEDULES:
            raise InputError(f"{asker}: schedule {name!r}; schedules are {', '.join(SCHEDULES)}")
    if not schedules:
        raise InputError(f"{asker}: no schedule; give some of {', '.join(SCHEDULES)}")
