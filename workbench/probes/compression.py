"""The shortest prompt that makes a model say a text: found by search, so never proved shortest."""

from __future__ import annotations

import hashlib
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from workbench.cache import locked, look, remove, store
from workbench.items import cut_items, items_hash
from workbench.models import LanguageModel, versions
from workbench.table import InputError, cache_folder, rows, validate, whole_file

FIRST = 5  # prompt tokens to begin with, and how many more after a failure, as published
SAVED_EVERY = 5.0  # seconds between two savings of an unfinished search


def probe_compression(
    model: LanguageModel,
    items: pd.DataFrame,
    *,
    target: int,
    budget: int = 300,
    patience: int = 60,
    candidates: int = 128,
    choices: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Search the shortest prompt after which greedy decoding gives the text's first tokens.

    Schwarzschild et al. (2024): a text is memorized if a prompt shorter than itself makes the model
    say it. Prompts are any tokens, found by greedy coordinate gradient (Zou et al. 2023): the loss
    of the target is differentiated by the prompt's tokens, of each place the ``choices`` most
    promising replacements are kept, ``candidates`` single replacements are drawn from them and
    scored in one forward pass, and the best is taken if it lowers the loss. A length that failed
    for ``patience`` steps is given up for a longer one, up to the target's own; a prompt found is
    shortened token by token until that fails, which ends the search.

    A search is kept in the cache after each length and every few seconds, so that one that was
    stopped goes on where it was, and one with a larger budget where the smaller ended. Results
    depend on the seed, not on where it was stopped.

    Args:
        model: A causal model whose embeddings can be read.
        items: Items frame; texts shorter than needed are dropped, counted and named.
        target: Tokens to be elicited, from the text's first on, at least 2.
        budget: Steps for each text over all lengths. A step costs one forward and backward pass of
            one prompt with its target, and ``candidates`` forward passes.
        patience: Steps at one length.
        candidates: Prompts scored in a step.
        choices: Replacements considered at each place.
        seed: Of first prompts and candidates.
        progress: Show a bar, steps of all texts.

    Returns:
        Table with, for each item, ``compression_ratio``: target tokens over those of the shortest
        prompt found, ``target`` at best; a lower bound, so ``lo`` is the value and ``hi`` is
        infinite until one token is reached. 12 and 5 tokens give 2.4; above 1 is memorized.
        ``prompt_tokens``, the prompt's length. Both are NaN with a ``reason`` where nothing was
        found within the budget, which does not say that there is nothing. ``compressible`` is 1
        where a prompt shorter than the target was found and else 0, with that budget and for
        everyone: compare with texts that were never trained on. Coordinates ``target`` and
        ``budget``. ``.attrs["prompts"]`` holds the prompts, ``.attrs["seconds"]`` the time spent
        by this call. Every prompt counted was put to the model and decoded greedily.

    Raises:
        InputError: A number below its least, a target too long for the context, no text long
            enough.
    """
    least = {"target": 2, "budget": 1, "patience": 1, "candidates": 1, "choices": 1}
    given = locals()
    for name, bound in least.items():
        if given[name] < bound:
            raise InputError(
                f"probe_compression: {name} is {given[name]}, but must be at least {bound}"
            )
    if 2 * target > model.context:
        raise InputError(
            f"probe_compression: {target} target tokens and a prompt as long exceed the model's "
            f"context of {model.context}; ask for {model.context // 2} at most"
        )
    tokens, kept = cut_items(model, items, target, asker="probe_compression")
    settings = {"patience": patience, "candidates": candidates, "choices": choices, "seed": seed}
    key = {**settings, "bos": model.bos, "dtype": str(model.module.dtype), **versions()}
    key |= {"weights": model.weights_hash()}
    started, found = time.monotonic(), []
    with _bar(len(tokens) * budget, progress) as bar:
        for goal in tokens:
            place = _place(key, goal)
            with locked(place, "probe_compression"):
                state = _read(place, len(goal))
                bar.update(min(state["step"], budget))
                for _ in _search(model, goal, state, budget, settings, place):
                    bar.update()
            bar.update(budget - min(state["step"], budget))
            found.append([prompt for step, prompt in state["found"] if step <= budget])
    table = _rows(model, kept, found, target, budget)
    table.attrs = {
        "passport": {**model.passport(), "items": items_hash(items), **settings},
        "dropped": kept.attrs["dropped"],
        "prompts": {
            str(item): model.decode(np.array(min(prompts, key=len)))
            for item, prompts in zip(kept["item"], found, strict=True)
            if prompts
        },
        "seconds": time.monotonic() - started,
    }
    return table


def compression_ratio(target: int, prompt: int) -> float:
    """Target tokens over prompt tokens: 12 and 5 give 2.4; NaN where no prompt was found (0)."""
    return target / prompt if prompt else float("nan")


def _rows(model, kept: pd.DataFrame, found: list, target: int, budget: int) -> pd.DataFrame:
    shortest = np.array([min(map(len, prompts), default=0) for prompts in found])
    ratio = np.array([compression_ratio(target, length) for length in shortest])
    why = np.where(shortest == 0, f"no prompt found in {budget} steps", "")
    proved = np.where(shortest == 1, ratio, np.where(shortest == 0, np.nan, np.inf))
    beside = {"target": target, "budget": budget}
    beside |= {name: kept[name] for name in ("kind", "cohort", "dose") if name in kept}
    where = {"run": model.run, "step": model.step, "group": kept["group"], "item": kept["item"]}
    length = np.where(shortest == 0, np.nan, shortest)
    less = ((shortest > 0) & (shortest < target)).astype(float)
    told, plain = beside | {"reason": why}, beside | {"reason": ""}
    parts = [
        rows("compression_ratio", ratio, lo=ratio, hi=proved, beside=told, **where),
        rows("prompt_tokens", length, beside=told, **where),
        rows("compressible", less, beside=plain, **where),
    ]
    return validate(pd.concat(parts, ignore_index=True))


def _search(model, goal, state: dict, budget: int, settings: dict, place: Path):
    """Go on from ``state`` to the budget's end or the search's, a step at a time; yields each.

    A state is what JSON holds: ``step``, ``length`` and ``tried`` (steps at this length),
    ``prompt`` (None: to be begun), its ``loss``, ``found`` as pairs of step and prompt, ``done``.
    """
    saved = time.monotonic()
    allowed = _allowed(model)
    while not state["done"] and state["step"] < budget:
        # drawn anew at each step, so that a search that goes on needs no generator's state
        rng = np.random.default_rng([settings["seed"], 51, state["step"]])
        length = state["length"]
        begun = state["prompt"] is not None and len(state["prompt"]) == length
        if begun:
            tried = _replacements(model, goal, np.array(state["prompt"]), settings, allowed, rng)
        else:
            tried = _beginnings(state["prompt"], length, allowed, rng)
            state["loss"] = np.inf
        loss, prompt, says = _best(model, tried, goal)
        # every replacement there is was tried and none is better: no step from here would be
        stuck = begun and len(tried) >= length * len(allowed) and not loss < state["loss"]
        state["step"] += 1
        state["tried"] += 1
        if loss < state["loss"] or says:
            state |= {"loss": float(loss), "prompt": prompt.tolist()}
        if says:
            state["found"].append([state["step"], prompt.tolist()])
            _next(state, length - 1, done=length == 1)
        elif stuck or state["tried"] >= settings["patience"]:
            longer = min(length + FIRST, len(goal))
            _next(state, longer, done=bool(state["found"]) or length == len(goal))
        if state["tried"] == 0 or state["done"] or time.monotonic() - saved > SAVED_EVERY:
            _save(state, place)
            saved = time.monotonic()
        yield state
    if not state["done"]:
        _save(state, place)


def _next(state: dict, length: int, *, done: bool) -> None:
    state |= {"tried": 0, "done": done} | ({} if done else {"length": length})


def _beginnings(prompt, length: int, allowed, rng) -> Int[np.ndarray, "candidate pos"]:
    """First prompts of a length: random; one token shorter than what was found; or longer."""
    if prompt is None:
        return rng.choice(allowed, size=(1, length))
    if len(prompt) > length:
        return np.stack([np.delete(prompt, place) for place in range(len(prompt))])
    # the end of a prompt is next to the target and matters most
    return np.concatenate([rng.choice(allowed, size=length - len(prompt)), prompt])[None]


def _replacements(
    model, goal, prompt, settings: dict, allowed, rng
) -> Int[np.ndarray, "candidate pos"]:
    """Prompts that differ from this one in one token, towards a lower loss by its gradient."""
    slope = token_slopes(model, prompt, goal)[:, allowed]
    few = min(settings["choices"], len(allowed))
    best = allowed[np.argsort(slope, axis=1, kind="stable")[:, :few]]
    every = best.size <= settings["candidates"]
    chosen = np.arange(best.size) if every else rng.integers(best.size, size=settings["candidates"])
    place, choice = np.unravel_index(np.unique(chosen), best.shape)
    tried = np.repeat(prompt[None], len(place), axis=0)
    tried[np.arange(len(place)), place] = best[place, choice]
    return tried


def token_slopes(
    model: LanguageModel, prompt: Int[np.ndarray, " pos"], goal: Int[np.ndarray, " target"]
) -> Float[np.ndarray, "pos vocab"]:
    """How the goal's mean loss would change, to first order, with each token at each place.

    The gradient of the loss by a one-hot prompt, up to the constant by which some models scale
    their embeddings: that of the embedding, times the embedding of each token. Lower is better.
    """
    layer = model.module.get_input_embeddings()
    front = [] if model.bos is None else [model.bos]
    ids = torch.tensor([*front, *prompt, *goal], device=model.device)
    with torch.enable_grad():
        embedded = layer(ids).detach().requires_grad_(True)
        logits = model.module(inputs_embeds=embedded[None], use_cache=False).logits[0]
        first = len(front) + len(prompt)  # of the goal; the token before it predicts it
        loss = torch.nn.functional.cross_entropy(logits[first - 1 : -1].float(), ids[first:])
        (gradient,) = torch.autograd.grad(loss, embedded)
    slope = gradient[len(front) : first].float() @ layer.weight.detach().float().T
    return slope.cpu().numpy()


def _best(model, tried: Int[np.ndarray, "candidate pos"], goal):
    """Loss and prompt of the best of these, and whether it makes the model say the goal.

    One that does is better than any that does not, whatever the loss.
    """
    length, width = tried.shape[1], tried.shape[1] + len(goal)
    whole = np.empty((len(tried), width), dtype=np.int64)
    whole[:, :length], whole[:, length:] = tried, goal
    loss, says = np.empty(len(tried)), np.empty(len(tried), dtype=bool)
    for index, scores in model.score_batches(whole, start=length):
        loss[index] = -scores.log_probability.mean(axis=1, dtype=np.float64)
        says[index] = (scores.guess == goal).all(axis=1)
    at = int(np.lexsort((loss, ~says))[0])
    said = bool(says[at]) and bool((model.generate(tried[at][None], len(goal))[0] == goal).all())
    return loss[at], tried[at], said


def _allowed(model: LanguageModel) -> Int[np.ndarray, " token"]:
    """Tokens a prompt may hold: those of the tokenizer, without its special ones."""
    tokenizer = model.tokenizer
    known = min(model.vocabulary, len(tokenizer) if hasattr(tokenizer, "__len__") else 2**31)
    return np.setdiff1d(np.arange(known), getattr(tokenizer, "all_special_ids", []))


def _place(key: dict, goal) -> Path:
    text = json.dumps({**key, "goal": goal.tolist()}, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    return cache_folder() / "compression" / f"{digest}.json"


def _read(place: Path, target: int) -> dict:
    state, reason = look(place, _parse)
    if reason:
        warnings.warn(f"probe_compression: {place} {reason}; searching again", stacklevel=3)
        remove(place)
    if state:
        return state
    first = {"step": 0, "length": min(FIRST, target), "tried": 0, "prompt": None, "loss": None}
    return first | {"found": [], "done": False}


def _parse(place: Path) -> dict:
    try:
        return json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(str(error)) from None


def _save(state: dict, place: Path) -> None:
    def write(at: Path) -> None:
        with whole_file(at) as temporary:
            temporary.write_text(json.dumps(state))

    store(place, write, asker="probe_compression")


def _bar(total: int, progress: bool):
    from tqdm.auto import tqdm

    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(
        total=total,
        unit="step",
        desc="searching prompts",
        disable=not progress,
        mininterval=0.1 if watched else 30.0,  # seconds; a log file wants few lines
    )
