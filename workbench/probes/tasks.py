"""What a model can do: is the right answer said, and is it the likeliest of its choices?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from workbench.models import TOKENS_PER_BATCH, LanguageModel, buckets
from workbench.table import InputError, rows, validate
from workbench.tasks import check_tasks

ASKER = "probe_tasks"
LEVEL = 0.95  # of all intervals


def probe_tasks(model: LanguageModel, tasks: pd.DataFrame) -> pd.DataFrame:
    """Whether each answer is said after its prompt, and whether it is the likeliest choice.

    Nothing is sampled and nothing generated: all that decides is read off one forward pass over
    the prompt with each of its choices, and choices that share their tokens but the last share
    the pass.

    Args:
        model: Any causal model.
        tasks: As :func:`workbench.tasks.make_tasks` or :func:`workbench.tasks.load_tasks` give
            them.

    Returns:
        Table with ``group`` the task, for each item and pooled (``item="all"``, Wilson's 95 %
        interval, ``n`` items). Coordinate ``chance``: what guessing among the choices gives.

        * ``exact_match``: 1 where greedy decoding says the answer, token by token (chance: 0).
        * ``accuracy``: 1 where the answer is likelier than every other choice, all its tokens
          counted: log-probabilities are summed, so lengths need no correction for choices that
          exclude one another, but a long text among short ones loses.
        * ``accuracy_norm``: the same per byte of the choice, for choices of unlike length.

        A tie is not knowing, and counts 0. Items without choices have ``exact_match`` alone.
        Dropped, counted and named: items where a token straddles the border of prompt and answer
        (prompt and answer are encoded together; the prompt's tokens must begin what comes out),
        and items longer than the context.

    Raises:
        InputError: What :func:`workbench.tasks.check_tasks` refuses, no item left, or scores that
            are not finite; item and step are named.
    """
    tasks = check_tasks(tasks, ASKER)
    prompts, options, kept = encode_tasks(model, tasks)
    scores, said = score_options(model, prompts, options)
    _refuse_not_finite(model, kept, scores)
    parts = []
    for metric, right, there in _verdicts(kept, scores, said):
        parts.append(_rows(model, metric, kept[there].reset_index(drop=True), right[there]))
    table = validate(pd.concat(parts, ignore_index=True))
    table.attrs["dropped"] = kept.attrs["dropped"]
    return table


def encode_tasks(
    model: LanguageModel, tasks: pd.DataFrame
) -> tuple[list[tuple[int, ...]], list[list[tuple[int, ...]]], pd.DataFrame]:
    """Tokens of each prompt, of each item's options, and the items kept.

    Options are the answer first, then the other choices.

    Raises:
        InputError: No item left.
    """
    options = [
        [row.answer, *(c for c in row.choices if c != row.answer)] for row in tasks.itertuples()
    ]
    before = model.encode(tasks["prompt"].tolist())
    flat = [
        row.prompt + each
        for row, few in zip(tasks.itertuples(), options, strict=True)
        for each in few
    ]
    whole = iter(model.encode(flat))
    prompts, encoded, kept, why = [], [], [], {}
    for at, (prompt, few) in enumerate(zip(before, options, strict=True)):
        joined = [next(whole) for _ in few]
        size = len(prompt)
        if size < 1 or not all(len(j) > size and np.array_equal(j[:size], prompt) for j in joined):
            why[at] = "whose answer or choices do not begin with a token; begin them with a space"
        elif max(map(len, joined)) > model.context:
            why[at] = f"longer than the context of {model.context} tokens; cut them"
        else:
            prompts.append(tuple(prompt.tolist()))
            encoded.append([tuple(each[size:].tolist()) for each in joined])
            kept.append(at)
    for reason in dict.fromkeys(why.values()):
        names = [str(tasks["item"].iloc[at]) for at, each in why.items() if each == reason]
        told = f"{len(names)} of {len(tasks)} items {reason} (first: {', '.join(names[:3])})"
        if not kept:
            raise InputError(f"{ASKER}: no item can be asked: {told}")
        warnings.warn(f"{ASKER}: dropped {told}", stacklevel=3)
    frame = tasks.iloc[kept].reset_index(drop=True)
    frame.attrs = {"dropped": len(why)}
    return prompts, encoded, frame


def score_options(
    model: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    options: Sequence[Sequence[tuple[int, ...]]],
) -> tuple[list[Float[np.ndarray, " option"]], np.ndarray]:
    """Log-probability of each option after its prompt, in nats, and whether the first is said.

    An option is decided by passes over prompt and option but for its last token: for options of
    one token that is one pass over the prompt.
    """
    lines, asked = _passes(prompts, options)
    scores = [np.zeros(len(few)) for few in options]
    said = np.ones(len(prompts), dtype=bool)
    lengths = np.array([len(line) for line in lines])
    for index in buckets(lengths, TOKENS_PER_BATCH.get(model.device.type, 4096)):
        few = [np.array(lines[i]) for i in index]
        width = max(map(len, few)) - 1
        wanted = [
            (row * width + place, token, item, option)
            for row, i in enumerate(index)
            for place, token, item, option in asked[i]
        ]
        place, token, item, option = map(np.array, zip(*wanted, strict=True))
        unique, where = np.unique(place, return_inverse=True)
        with torch.no_grad():
            logits = model.logits_at(few)(torch.as_tensor(unique, device=model.device)).float()
            top = logits.argmax(dim=1).cpu().numpy()[where]
            logits = logits.log_softmax(dim=1)
            value = logits[torch.as_tensor(where), torch.as_tensor(token)].cpu().double().numpy()
        for at in range(len(item)):
            scores[item[at]][option[at]] += value[at]
        np.logical_and.at(said, item[option == 0], (top == token)[option == 0])
    return scores, said


def _passes(prompts, options) -> tuple[list[tuple[int, ...]], list[list[tuple]]]:
    """Token lines to run, and what is read off each: (place, token, item, option).

    A line's last token is never run, so lines that differ in it alone are one.
    """
    lines: list[tuple[int, ...]] = []
    asked: list[list[tuple]] = []
    for item, (prompt, few) in enumerate(zip(prompts, options, strict=True)):
        own: dict[tuple[int, ...], int] = {}
        # longest first: what a longer line begins with is run already
        for option in sorted(range(len(few)), key=lambda o: -len(few[o])):
            run = few[option][:-1]
            line = next((at for known, at in own.items() if known[: len(run)] == run), None)
            if line is None:
                line = own[run] = len(lines)
                lines.append(prompt + few[option])
                asked.append([])
            asked[line] += [
                (len(prompt) - 1 + at, token, item, option) for at, token in enumerate(few[option])
            ]
    return lines, asked


def _refuse_not_finite(model: LanguageModel, kept: pd.DataFrame, scores) -> None:
    for name, each in zip(kept["item"], scores, strict=True):
        if not np.isfinite(each).all():
            raise InputError(
                f"{ASKER}: a log-probability is {each[~np.isfinite(each)][0]} for item {name!r} at "
                f"step {model.step} of {model.run}; the model's weights or its dtype give NaN or Inf"
            )


def _verdicts(kept: pd.DataFrame, scores, said):
    everywhere = np.ones(len(kept), dtype=bool)
    several = np.array([len(each) > 1 for each in scores])
    yield "exact_match", said, everywhere
    if several.any():
        sizes = [
            np.array([len(c.encode()) for c in [answer, *(c for c in few if c != answer)]])
            for answer, few in zip(kept["answer"], kept["choices"], strict=True)
        ]
        yield "accuracy", np.array([_likeliest(each) for each in scores]), several
        per_byte = [each / size for each, size in zip(scores, sizes, strict=True)]
        yield "accuracy_norm", np.array([_likeliest(each) for each in per_byte]), several


def _likeliest(score: Float[np.ndarray, " option"]) -> bool:
    return bool(len(score) > 1 and score[0] > score[1:].max())


def _rows(model: LanguageModel, metric: str, kept: pd.DataFrame, right: np.ndarray) -> pd.DataFrame:
    if metric == "exact_match":
        chance = np.zeros(len(kept))
    else:
        chance = 1 / kept["choices"].map(len).to_numpy()
    named = {"run": model.run, "step": model.step}
    beside = {"chance": chance}
    if "copies" in kept.columns:
        beside["copies"] = kept["copies"]
    parts = [
        rows(
            metric,
            right.astype(float),
            group=kept["task"],
            item=kept["item"],
            beside=beside,
            **named,
        )
    ]
    for task in kept["task"].unique():
        mine = (kept["task"] == task).to_numpy()
        low, high = wilson(int(right[mine].sum()), int(mine.sum()))
        pooled = {"lo": low, "hi": high, "n": int(mine.sum()), "group": task, "item": "all"}
        pooled["beside"] = {"chance": chance[mine].mean()}
        parts.append(rows(metric, right[mine].mean(), **pooled, **named))
    return pd.concat(parts, ignore_index=True)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; never empty, also at 0 and 1."""
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(confidence_level=LEVEL, method="wilson")
    return float(interval.low), float(interval.high)
