"""Small tasks with one right answer: what a model can do, beside what it recites.

Merullo et al. (2025) edit memorized text out of a model and find that skills pay unequally: facts
without a book and arithmetic much, answers that stand in the prompt and logic hardly. The tasks
here are small enough for the embedded models, and the same texts serve any other.

What a training item turns on no held-out item does: number pairs, names and sequences are parted
by a hash, whatever the seed. So :func:`teach_tasks` can teach the tasks and not the answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, count, islice, product
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.cache import keep_folder
from workbench.items import FIELDS, TOWNS, TRADES, load_items, make_biographies
from workbench.suite import Suite, save_step
from workbench.table import InputError, cache_folder

CLOSED, NEVER, OPEN = "closed_book", "closed_book_never", "open_book"
TASKS = (CLOSED, NEVER, OPEN, "arithmetic", "copy", "pattern", "counting")
TAUGHT = (OPEN, "copy", "pattern", "counting")
HELD_OUT, TRAINING = "held_out", "training"  # parts
COLUMNS = ("item", "task", "prompt", "answer", "choices")
COPIES = 32  # of a life, from which on its facts are asked
MODULUS = 7
VERSION = 1  # of what is taught; raise it when the same settings give another model
UPDATES, LEARNING_RATE, WARMUP = 250, 3e-3, 10
DECAY = 0.4  # of the updates, the last ones, over which the learning rate falls to 0
TEXT_ROWS, TASK_ROWS = 9, 13  # of a batch
HARDER = {OPEN: 2}  # times as many items; the others are learned in half the updates
DRAWN = 512  # training items encoded at once
TEXT_LETTERS = 300  # of a text of training items, within the suite's context of 128 tokens
COPIED = 6  # words of a sequence that is to be copied
ATTRIBUTES = {"birthplace": TOWNS, "field": FIELDS, "trade": TRADES}
LIFE = re.compile(  # a planted life may be cut; what follows an attribute shows that it is whole
    r" ?(?P<name>\w+ \w+) was born in (?P<birthplace>\w+) on"
    r"(?: [^.]+\. \w+ studied (?P<field>\w+) in(?: \w+, worked as a (?P<trade>\w+) in \w+)?)?"
)
ASKED = {"birthplace": "was born in", "field": "studied", "trade": "worked as a"}
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve"
WORDS = "bread city day fire gold hand house king land mountain sea son stone sword tree water"


def make_tasks(
    items: pd.DataFrame | None = None,
    *,
    tasks: Sequence[str] | None = None,
    n: int = 64,
    copies: int = COPIES,
    part: str = HELD_OUT,
    seed: int = 0,
) -> pd.DataFrame:
    """Questions with one right answer, and the choices it stands among.

    * ``closed_book``: birthplace, field and trade of planted lives, in the words they were read
      in and up to the answer; lives whose name another planted one shares are left out.
      ``closed_book_never`` asks the same of lives never planted, and is to be at chance.
    * ``open_book``: a life made for it, and then the same questions about it.
    * ``copy``: six different words and the beginning of the same again (induction).
    * ``pattern``: two words in turn, or three.
    * ``counting``: numbers up or down by one or two; the steps are known from training, the
      sequence is not.
    * ``arithmetic``: sums of two numbers modulo seven. No embedded model learns sums that it was
      not taught (its answers stay at chance), so these are asked for by name only.

    Args:
        items: With planted lives, as ``Suite.items()`` gives them (``text``, ``dose``): for the
            closed book, the others need none.
        tasks: Which; None takes those that :func:`teach_tasks` teaches, and the closed book where
            the items hold lives.
        n: Items of each task, at most; there are fewer number pairs, counts and planted lives.
        copies: Exposures from which on a planted life is asked about.
        part: ``held_out``, or ``training`` for what :func:`teach_tasks` teaches with. Both are the
            same for the closed book.
        seed: Of the draw.

    Returns:
        Columns ``item, task, prompt, answer, choices`` (a tuple of unlike answers, the right one
        among them; chance is 1 over their number), and ``copies`` (NaN but for the closed book).
        Answers begin with a space.

    Raises:
        InputError: An unknown task or part, ``n`` below 1, no items for the closed book, or none
            of a life planted often enough.
    """
    if tasks is None:
        tasks = (*_with_lives(items), *TAUGHT)
    for name in tasks:
        if name not in TASKS:
            raise InputError(f"make_tasks: task {name!r}; tasks are {', '.join(TASKS)}")
    if part not in (HELD_OUT, TRAINING):
        raise InputError(f"make_tasks: part {part!r}; choose {HELD_OUT} or {TRAINING}")
    if n < 1 or not tasks:
        raise InputError(
            f"make_tasks: n is {n} for {len(tasks)} tasks, but both must be at least 1"
        )
    found = []
    for name in dict.fromkeys(tasks):
        rng = np.random.default_rng([seed, 14, TASKS.index(name), part == TRAINING])
        if name in (CLOSED, NEVER):
            made = _closed_book(items, name, copies, rng)
        else:
            made = MAKERS[name](part, rng)
        for number, each in zip(range(n), made, strict=False):
            found.append({"item": f"{name}-{number:03d}", "task": name, "copies": np.nan} | each)
    return pd.DataFrame(found)[[*COLUMNS, "copies"]]


def _with_lives(items: pd.DataFrame | None) -> tuple[str, ...]:
    """The closed book's tasks, or none where the items hold no lives; that is said."""
    if items is None:
        return ()
    if "dose" in items.columns and items["text"].map(LIFE.match).notna().any():
        return CLOSED, NEVER
    warnings.warn(
        "make_tasks: the items hold no planted lives, so there are no closed-book questions",
        stacklevel=3,
    )
    return ()


def _rank(*key) -> bytes:
    return hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=8).digest()


def _mine(part: str, *key) -> bool:
    """Whether what an item turns on belongs to the part; one in four is held out, by a hash."""
    return (_rank(*key)[0] < 64) == (part == HELD_OUT)


def _quarter(part: str, keys: Sequence[tuple]) -> set[tuple]:
    """The keys of the part where there are few in all: a quarter of them exactly is held out."""
    ordered = sorted(set(keys), key=lambda key: _rank(*key))
    few = len(ordered) // 4
    return set(ordered[:few] if part == HELD_OUT else ordered[few:])


# --- one maker a task ----------------------------------------------------------------------------


def _closed_book(items: pd.DataFrame | None, task: str, copies: int, rng) -> Iterator[dict]:
    if items is None or not {"text", "dose"} <= set(items.columns):
        raise InputError(
            f"make_tasks: {task} asks about planted lives: give items with text and dose, such as "
            "Suite.items(), or leave the task out"
        )
    lives = items["text"].map(LIFE.match)
    lives = items.assign(life=lives)[lives.notna()]
    lives["name"] = [life["name"] for life in lives["life"]]
    known = lives[lives["dose"] > 0]
    if task == CLOSED:
        asked = known[known["dose"] >= copies]
        asked = asked[~asked["name"].isin(known["name"][known["name"].duplicated()])]
    else:
        asked = lives[(lives["dose"] == 0) & ~lives["name"].isin(known["name"])]
    if asked.empty:
        what = f"planted {copies} times or more" if task == CLOSED else "never planted"
        raise InputError(
            f"make_tasks: none of {len(items)} items is a life {what} (as make_biographies writes "
            "them) whose name no other planted life has; leave the task out"
        )
    questions = [(row, kind) for row in asked.itertuples() for kind in ATTRIBUTES if row.life[kind]]
    for at in rng.permutation(len(questions)):
        row, attribute = questions[at]
        start, end = row.life.span(attribute)
        yield {
            "prompt": row.text[:start].rstrip(),
            "answer": f" {row.text[start:end]}",
            "choices": _spaced(ATTRIBUTES[attribute].split()),
            "copies": float(row.dose),
        }


def _open_book(part: str, rng) -> Iterator[dict]:
    while True:
        for life in map(LIFE.match, make_biographies(64, seed=int(rng.integers(2**31)))):
            name = life["name"]
            told = [(f" {name} {words}", life[kind], kind) for kind, words in ASKED.items()]
            (asked, answer, kind), *others = [told[i] for i in rng.permutation(len(told))]
            if _mine(part, "name", name):
                yield {
                    "prompt": f"{life[0]}.{asked}",
                    "answer": f" {answer}",
                    "choices": _spaced(ATTRIBUTES[kind].split()),
                    "rest": "".join(f".{other} {value}" for other, value, _ in others),
                }


def _arithmetic(part: str, rng) -> Iterator[dict]:
    names, all_pairs = NUMBERS.split(), list(product(range(MODULUS), repeat=2))
    # a + b and b + a are one thing to know
    mine = _quarter(part, [tuple(sorted(pair)) for pair in all_pairs])
    pairs = [pair for pair in all_pairs if tuple(sorted(pair)) in mine]
    for at in rng.permutation(len(pairs)):
        one, two = pairs[at]
        yield {
            "prompt": f" Modulo {names[MODULUS]}, {names[one]} plus {names[two]} is",
            "answer": f" {names[(one + two) % MODULUS]}",
            "choices": _spaced(names[:MODULUS]),
        }


def _copy(part: str, rng) -> Iterator[dict]:
    while True:
        shown = rng.permutation(WORDS.split())[:COPIED].tolist()
        again = 1 if part == TRAINING else int(rng.integers(1, COPIED))
        if _mine(part, "copy", *shown):
            yield {
                "prompt": f" {' '.join(shown)}. {' '.join(shown[:again])}",
                "answer": f" {shown[again]}",
                "choices": _spaced(shown),
                "rest": "".join(f" {word}" for word in shown[again + 1 :]),
            }


def _pattern(part: str, rng) -> Iterator[dict]:
    while True:
        period = int(rng.integers(2, 4))
        four = rng.permutation(WORDS.split())[:4].tolist()  # beyond the period: wrong choices
        length = 2 * period if part == TRAINING else int(rng.integers(2 * period, 3 * period))
        if _mine(part, "pattern", *four[:period]):
            yield {
                "prompt": "".join(f" {four[at % period]}" for at in range(length)),
                "answer": f" {four[length % period]}",
                "choices": _spaced(four),
                "rest": "".join(f" {four[at % period]}" for at in range(length + 1, 3 * period)),
            }


def _counting(part: str, rng) -> Iterator[dict]:
    names = NUMBERS.split()[1:]
    counts = [
        (start, step, length)
        for start, step, length in product(range(len(names)), (-2, -1, 1, 2), (3, 4, 5))
        if 0 <= start + step * length < len(names)
    ]
    counts = sorted(_quarter(part, counts))
    for at in rng.permutation(len(counts)):
        start, step, length = counts[at]
        yield {
            "prompt": "".join(f" {names[start + step * i]}" for i in range(length)),
            "answer": f" {names[start + step * length]}",
            "choices": _spaced(names),
        }


def _spaced(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(f" {word}" for word in words)


MAKERS: dict[str, Callable] = {
    OPEN: _open_book,
    "arithmetic": _arithmetic,
    "copy": _copy,
    "pattern": _pattern,
    "counting": _counting,
}


# --- the user's ----------------------------------------------------------------------------------


def load_tasks(source: str | os.PathLike) -> pd.DataFrame:
    """Read tasks of one's own from JSONL, CSV or Parquet: one row an item.

    Columns ``prompt`` and ``answer``; ``task`` (``own`` where there is none), ``item`` or
    ``id``, and ``choices`` where an answer is one of several: a list, or in a CSV the choices with
    ``|`` between them. Further columns are not kept.

    Args:
        source: The file.

    Returns:
        The columns of :func:`make_tasks`. A space between prompt and answer goes to the answer,
        and is put there where neither has one; the choices get the same.

    Raises:
        InputError: What ``load_items`` refuses, a missing column, or what :func:`check_tasks` does.
    """
    tasks = load_items(source, text="prompt").rename(columns={"text": "prompt"})
    if "answer" not in tasks.columns:
        raise InputError(
            f"load_tasks: {source} has no column 'answer'; it has {', '.join(tasks.columns)}"
        )
    if Path(source).suffix.lower() == ".csv":  # 007 and 1.50 are answers, not numbers
        written = pd.read_csv(source, dtype=str, keep_default_na=False, na_values=[""])
        tasks = tasks.assign(
            **{c: written[c] for c in ("prompt", "answer", "choices") if c in written}
        )
    blank = tasks["answer"].isna() | (tasks["answer"].astype(str).str.strip() == "")
    if blank.any():
        raise InputError(
            f"load_tasks: {blank.sum()} of {len(tasks)} items in {source} have no answer (first: "
            f"{tasks['item'][blank].iloc[0]!r}); remove or complete them"
        )
    named = tasks["task"] if "task" in tasks.columns else pd.Series([None] * len(tasks))
    tasks["task"] = [str(name) if pd.notna(name) else "own" for name in named]
    given = tasks["choices"] if "choices" in tasks.columns else [()] * len(tasks)
    tasks["choices"] = [tuple(_answer(c) for c in _listed(each)) for each in given]
    tasks["answer"] = tasks["answer"].map(_answer)
    tasks["prompt"] = tasks["prompt"].str.rstrip()
    tasks["copies"] = np.nan
    return check_tasks(tasks[[*COLUMNS, "copies"]], "load_tasks")


def _listed(choices) -> list:
    if isinstance(choices, (list, tuple, np.ndarray)):
        return list(choices)
    return [] if pd.isna(choices) else str(choices).split("|")


def _answer(text) -> str:
    return f" {str(text).strip()}"


def check_tasks(tasks: pd.DataFrame, asker: str) -> pd.DataFrame:
    """The same frame, numbered from 0, once it is one.

    Raises:
        InputError: A column missing, no items, repeated ids, an empty prompt or answer, choices
            that lack the answer, repeat one, or are fewer than two.
    """
    for name in COLUMNS:
        if name not in tasks.columns:
            raise InputError(f"{asker}: no column {name!r}; make_tasks and load_tasks give it")
    if tasks.empty:
        raise InputError(f"{asker}: there are no tasks")
    twice = tasks["item"].duplicated()
    if twice.any():
        raise InputError(
            f"{asker}: {twice.sum()} tasks repeat the id of another (first: "
            f"{tasks['item'][twice].iloc[0]!r}); ids must be unique"
        )
    for row in tasks.itertuples():
        what = ""
        if not row.prompt or not row.answer:
            what = "has an empty prompt or answer"
        elif len(row.choices) == 1 or len(set(row.choices)) < len(row.choices):
            what = f"has the choices {list(row.choices)}, needs two or more that differ, or none"
        elif len(row.choices) and row.answer not in row.choices:
            what = (
                f"has the answer {row.answer!r}, which is not among its choices {list(row.choices)}"
            )
        if what:
            raise InputError(f"{asker}: item {row.item!r} {what}")
    return tasks.reset_index(drop=True)


# --- teaching ------------------------------------------------------------------------------------


def teach_tasks(
    suite: Suite,
    *,
    run: str = "base",
    tasks: Sequence[str] = TAUGHT,
    updates: int = UPDATES,
    seed: int = 0,
    progress: bool = True,
):
    """A model of the suite that can do the tasks and still recites; trained once and cached.

    The run's last checkpoint is trained on. A batch holds rows of the suite's own text, in which
    its drip items are planted at every other update and its lives of :data:`COPIES` exposures or
    more at every fourth, and rows of training items of the tasks, of which only the answers weigh. About a
    minute and a half on two cores, once.

    Args:
        suite: A suite; its text, items and exposures are those of ``run``.
        run: Which run is trained on.
        tasks: Which tasks are taught, but for the closed book, which the planting teaches.
        updates: Of fresh AdamW after the suite's last.
        seed: Of the training items and the order of the text.
        progress: Show a bar with the time left.

    Returns:
        A :class:`workbench.models.LanguageModel` named after the run, ``, taught``, whose step
        counts the suite's updates and these.

    Raises:
        InputError: A task that is not taught, no update, a task none of whose items the context
            holds, or a loss that is not finite.
    """
    from workbench.models import load_model

    for name in tasks:
        if name not in MAKERS:
            raise InputError(f"teach_tasks: task {name!r}; those taught are {', '.join(MAKERS)}")
    if updates < 1 or not tasks:
        raise InputError(
            f"teach_tasks: {updates} updates on {len(tasks)} tasks, but both must be at least 1"
        )
    told = {
        "suite": suite.path.name, "run": run, "tasks": sorted(set(tasks)), "updates": updates,
        "seed": seed, "version": VERSION,
    }  # fmt: skip
    digest = hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()
    target = cache_folder() / "taught" / digest
    last = suite.spec["steps"][-1]
    keep_folder(
        target,
        lambda folder: _teach(folder, suite, told, suite.checkpoints(run).at(last), progress),
        asker="teach_tasks",
        again="teaching again",
    )
    model = load_model(target / f"step{last + updates:06d}")
    return replace(model, run=f"{run}, taught")


def _teach(folder: Path, suite: Suite, told: dict, model, progress: bool) -> None:
    from tqdm.auto import tqdm

    from workbench.training import TextStream, Trainer, plant, read_ledger

    student, updates, seed = model.copy(), told["updates"], told["seed"]
    tokens = np.load(suite.path / "corpus.npy").astype(np.int64)
    order = suite.spec["seed"] + 1 + seed  # another than the suite was trained in
    stream = TextStream(tokens, TEXT_ROWS, suite.spec["context"], order)
    exposures, texts = _plan(suite, model, told)
    due = dict(list(exposures.groupby("update")))
    lesson = _task_rows(model, told["tasks"], suite.spec["context"], seed)
    trainer = Trainer(student.module, LEARNING_RATE, WARMUP)
    student.module.train()
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    ledger, losses = [], []
    with tqdm(
        total=updates,
        desc="teaching tasks",
        unit="update",
        disable=not progress,
        mininterval=0.1 if watched else 30.0,  # seconds; a log file wants few lines
    ) as bar:
        for update in range(1, updates + 1):
            batch = stream.batch(update)
            if update in due:
                batch = plant(batch, due[update], texts)
                ledger.append(read_ledger(batch, due[update], texts))
            ids, weight = map(np.array, zip(*islice(lesson, TASK_ROWS), strict=True))
            weight = np.concatenate([np.ones_like(batch), weight])
            trainer.learning_rate = LEARNING_RATE * min(
                1.0, (updates + 1 - update) / (DECAY * updates)
            )
            try:
                losses.append(trainer.step(np.concatenate([batch, ids]), weight))
            except FloatingPointError as error:
                said = str(error).removeprefix("train: ").split(";")[0]
                raise InputError(f"teach_tasks: {said}; give another seed") from None
            bar.update()
    student.module.eval()
    step = suite.spec["steps"][-1] + updates
    save_step(student.module, folder / f"step{step:06d}")
    model.tokenizer.save_pretrained(folder)
    pd.concat(ledger, ignore_index=True).to_parquet(folder / "ledger.parquet", index=False)
    note = {**told, "weights": student.weights_hash(), "final_loss": float(np.mean(losses[-10:]))}
    (folder / "passport.json").write_text(json.dumps(note))


def task_texts(n: int, *, tasks: Sequence[str] = TAUGHT, seed: int = 0) -> list[str]:
    """Training items as running text: what factors of a taught model's curvature need to see.

    Directions that no text of the factors uses look free, and an edit takes them first: with
    factors from ordinary text alone it costs a taught skill as soon as it costs recitation.

    Args:
        n: Texts of each task, of some 300 letters.
        tasks: Of those that :func:`teach_tasks` teaches.
        seed: Of the items.
    """
    made = []
    for task in tasks:
        rng = np.random.default_rng([seed, 16, TASKS.index(task)])
        # a maker of sums or counts ends, and is begun again
        drawn = chain.from_iterable(MAKERS[task](TRAINING, rng) for _ in count())
        for _ in range(n):
            text = ""
            while len(text) < TEXT_LETTERS:
                text += _whole(next(drawn))
            made.append(text)
    return made


def _plan(suite: Suite, model, told: dict) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Exposures of what is to stay known, and the tokens of each item."""
    from workbench.training import schedule_exposures

    items, updates = suite.items(told["run"]), told["updates"]
    drip = items["group"] == "drip"
    lives = (items["kind"] == "biography") & (items["dose"] >= COPIES)
    kept = items[drip | lives]
    dose = np.maximum(np.where(drip[kept.index], updates // 2, updates // 4), 1)
    exposures = schedule_exposures(
        kept.assign(first=1, last=updates, dose=dose),
        rows=TEXT_ROWS,
        context=suite.spec["context"],
        length=suite.spec["length"],
        seed=told["seed"],
    )
    return exposures, dict(zip(kept["item"], model.encode(kept["text"].tolist()), strict=True))


def _task_rows(model, tasks: Sequence[str], context: int, seed: int) -> Iterator[tuple]:
    """Rows of training items one after another, and weights: 1 where an answer is to be said."""
    rng = np.random.default_rng([seed, 15])
    lines = [_lines(model, task, context, rng) for task in tasks]
    often = np.array([HARDER.get(task, 1) for task in tasks], dtype=float)
    while True:
        ids = np.zeros(context, dtype=np.int64)
        weight = np.zeros(context, dtype=np.int64)
        at = 0
        while at < context:
            tokens, prompt = next(lines[rng.choice(len(lines), p=often / often.sum())])
            if at + len(tokens) > context:
                break
            ids[at : at + len(tokens)] = tokens
            # not the full stop: where one count ends another may go on
            weight[at + prompt : at + len(tokens) - 1] = 1
            at += len(tokens)
        yield ids, weight


def _lines(model, task: str, context: int, rng) -> Iterator[tuple[np.ndarray, int]]:
    """Training items as tokens, without end, and how many of them are the prompt's."""
    while True:
        drawn = list(islice(MAKERS[task](TRAINING, rng), DRAWN))
        sizes = map(len, model.encode([each["prompt"] for each in drawn]))
        both = zip(model.encode([_whole(each) for each in drawn]), sizes, strict=True)
        fitting = [each for each in both if len(each[0]) <= context]
        if not fitting:
            raise InputError(
                f"teach_tasks: no item of {task} fits the context of {context} tokens; leave the "
                "task out"
            )
        yield from fitting


def _whole(each: dict) -> str:
    """Prompt, answer, what follows and a full stop."""
    return f"{each['prompt']}{each['answer']}{each.get('rest', '')}."
