"""Guesses against what turned out: precision, recall, and how early they were there.

Two uses. Guesses ordered by a score: how many of a list of suspicions are right, and how far down
it errors begin. A memorized set foretold: of what the last or largest model will have memorized,
how much has an earlier or smaller one memorized already?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from workbench.stats.summarise import wilson_interval
from workbench.table import METRICS, InputError, rows, validate

CHUNK = 4_000_000  # numbers in one temporary array


def guess_curve(
    score: Float[np.ndarray, " guess"],
    correct: Bool[np.ndarray, " guess"],
    weight: Float[np.ndarray, "draw guess"],
    targets: float,
    errors: Sequence[int],
) -> dict[str, Float[np.ndarray, " draw"]]:
    """Precision, recall, average precision and recall at numbers of errors, of weighted guesses.

    Average precision is the sum over thresholds of precision times what recall gains there, equal
    scores sharing one threshold. Recall at N errors counts what is right above the N-th error,
    all that is right where there are fewer; among equals the errors come first.

    Correct 1, 1, 0, 1, 0 in falling order and 10 targets: precision .6, recall .3, average
    precision ``(1 + 1 + 3/4) / 10 = .275``, recall at 1 error .2, at 2 and more .3.

    Args:
        score: Higher for surer guesses.
        correct: Whether each is right.
        weight: How often each guess counts, one row a bootstrap draw; ones for the value itself.
        targets: How many there are to be found, those without a guess included.
        errors: Numbers of errors, at least 1 each.
    """
    order = np.lexsort((correct, -score))
    score, right = score[order], correct[order].astype(float)
    weight = weight[:, order]
    hits = np.cumsum(weight * right, axis=1)
    made = np.cumsum(weight, axis=1)
    last = np.flatnonzero(np.append(score[1:] != score[:-1], True)) if len(score) else np.array([0])
    out = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        ends = hits[:, last] if len(score) else np.zeros((len(weight), 1))
        total = made[:, last] if len(score) else np.zeros((len(weight), 1))
        out["precision"] = ends[:, -1] / total[:, -1]
        out["recall"] = ends[:, -1] / targets
        gain = np.diff(ends, axis=1, prepend=0)
        # a threshold that a draw left empty gains nothing
        at = np.where(gain > 0, ends / total, 0.0)
        out["average_precision"] = (gain * at).sum(axis=1) / targets
    wrong = made - hits
    for number in errors:
        before = np.where(wrong < number, hits, 0.0).max(axis=1, initial=0.0)
        out[f"recall_at_errors {number}"] = before / targets
    return out


def ranked_guesses(
    table: pd.DataFrame,
    *,
    score: str,
    correct: str = "extractable",
    errors: Sequence[int] = (1, 10, 100),
    by: Sequence[str] = ("run", "step"),
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How good a list of guesses is when it is ordered by how sure they are.

    Every item is a target; one whose score is NaN got no guess.

    Args:
        table: Item rows of two metrics: ``score``, by which guesses are ordered, the better
            direction of ``METRICS`` first, and ``correct``, 1 where the guess is right and 0 where
            it is not.
        errors: Numbers of errors at which recall is read.
        by: Coordinates within which guesses are ordered.
        draws: Resamples of the targets behind each interval.

    Returns:
        Rows "precision", "recall", "average_precision" and, with the coordinate ``errors``,
        "recall_at_errors" (:func:`guess_curve` has the definitions and a value by hand). All are 1
        at best and 0 at worst; a random order has for average precision the precision times the
        recall, about. ``n`` counts the guesses of a precision, else the targets. Percentile
        intervals over targets. Without any guess precision and average precision are NaN with a
        reason and recall is 0.

    Raises:
        InputError: No such metric or column, a score without direction, verdicts that are neither
            0 nor 1 or are missing beside a score, several rows an item.
    """
    table = validate(table)
    for name in by:
        if name not in table.columns:
            raise InputError(f"ranked_guesses: no column {name!r}; there are {', '.join(table)}")
    if any(number < 1 for number in errors):
        raise InputError(f"ranked_guesses: errors are {tuple(errors)}, needs at least 1 each")
    wide = _wide(table, [score, correct], by, "ranked_guesses")
    sign = _direction(score, "ranked_guesses")
    guessed = wide[score].notna()
    strange = guessed & ~wide[correct].isin([0.0, 1.0])
    if strange.any():
        first = wide[strange].iloc[0]
        raise InputError(
            f"ranked_guesses: {correct} is {first[correct]} for item {first['item']}, which has a "
            "score; it must be 0 or 1"
        )
    made = []
    for values, part in wide.groupby(list(by), observed=True, sort=False):
        where = dict(zip(by, values, strict=True))
        there = part[score].notna().to_numpy()
        value = (sign * part[score].to_numpy())[there]
        verdict = part[correct].to_numpy()[there] == 1
        targets = len(part)
        found = guess_curve(value, verdict, np.ones((1, len(value))), targets, errors)
        again = _resampled(value, verdict, there, errors, draws, seed)
        for name, (number,) in found.items():
            metric, _, allowed = name.partition(" ")
            empty = len(value) == 0 and metric in ("precision", "average_precision")
            lo, hi = (np.nan, np.nan) if empty else _percentiles(again[name], level)
            beside = {k: v for k, v in where.items() if k not in ("run", "step", "group")}
            beside |= {"errors": float(allowed or "nan"), "reason": "no guess" if empty else ""}
            made.append(
                rows(
                    metric,
                    np.nan if empty else number,
                    run=str(part["run"].iloc[0]),
                    step=int(part["step"].max()),
                    group=str(where.get("group", "all")),
                    lo=lo,
                    hi=hi,
                    n=len(value) if metric == "precision" else targets,
                    beside=beside,
                )
            )
    return validate(pd.concat(made, ignore_index=True))


def _direction(score: str, asker: str) -> float:
    """1 where higher is surer, -1 where lower is."""
    better = METRICS[score].better
    if not better:
        raise InputError(f"{asker}: {score} is neither better high nor low, so it orders nothing")
    return 1.0 if better == "high" else -1.0


def _wide(table: pd.DataFrame, metrics: list[str], by: Sequence[str], asker: str) -> pd.DataFrame:
    """One row an item within ``by``, a column for each metric; those without a row are NaN."""
    for metric in metrics:
        if not (table["metric"] == metric).any():
            held = ", ".join(sorted(table["metric"].astype(str).unique()))
            raise InputError(f"{asker}: the table has no rows of {metric}; it has {held}")
    table = table[table["metric"].isin(metrics)]
    place = list(dict.fromkeys(["run", "step", *by, "item"]))
    again = table.duplicated([*by, "item", "metric"])
    if again.any():
        first = table[again].iloc[0]
        raise InputError(
            f"{asker}: item {first['item']} has several rows of {first['metric']}; add what tells "
            "them apart to by, or select one"
        )
    wide = table.pivot(index=place, columns="metric", values="value")
    return wide.rename_axis(columns=None).reset_index()


def _resampled(score, correct, there, errors, draws, seed) -> dict[str, np.ndarray]:
    """The measures over targets drawn with replacement, those without a guess among them."""
    rng, targets = np.random.default_rng([seed, 31]), len(there)
    parts, step = [], max(1, CHUNK // max(targets, 1))
    for done in range(0, draws, step):
        size = min(step, draws - done)
        weight = rng.multinomial(targets, np.full(targets, 1 / targets), size=size).astype(float)
        parts.append(guess_curve(score, correct, weight[:, there], targets, errors))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _percentiles(drawn: np.ndarray, level: float) -> tuple[float, float]:
    # a draw without any guess has no precision
    kept = drawn[~np.isnan(drawn)]
    return tuple(np.quantile(kept, [(1 - level) / 2, (1 + level) / 2]).clip(0, 1))


def predict_memorized(
    table: pd.DataFrame,
    *,
    target: tuple[str, int],
    metric: str = "extractable",
    threshold: float = 1.0,
    score: str | None = None,
    parameters: Mapping[str, int] | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Does what an earlier checkpoint or smaller model memorized foretell a later or larger one?

    Biderman et al. (2023): what is memorized at a checkpoint is taken as the prediction of what
    the target will have memorized.

    Args:
        table: Item rows of ``metric`` (and ``score``) at several (run, step).
        target: Run and step whose memorized set is to be foretold.
        metric: What says memorized, by reaching ``threshold``.
        score: A metric that also orders the items at each checkpoint, for an average precision
            that needs no memorized item there.
        parameters: Of each run; needed where there are several.

    Returns:
        For each other (run, step) "precision", "recall" and "f1" with Wilson's interval over items
        (of F1 through ``F1 = 2 J / (1 + J)``, J being a share of items), "average_precision" of
        ``score`` with a bootstrap interval over items, and the coordinate ``compute``: the
        target's updates times parameters are 1. "base_rate", the target's memorized share of the
        items, is the precision of guessing blindly, and its average precision. NaN with a reason
        where nothing is foretold (precision) or nothing is there to foretell (recall); ``n``
        counts what the share is of. Items without both values are left out and counted in
        ``.attrs["dropped"]``.

    Raises:
        InputError: No rows of the metric or the target, nothing else to foretell it from, several
            rows an item, or runs without parameters.
    """
    table = validate(table)
    wanted = [metric] if score is None else [metric, score]
    wide = _wide(table, wanted, ("run", "step"), "predict_memorized")
    wide["run"] = wide["run"].astype(str)
    run, last = str(target[0]), int(target[1])
    is_target = (wide["run"] == run) & (wide["step"] == last)
    pairs = [f"({r}, {s})" for r, s in wide[["run", "step"]].drop_duplicates().to_numpy()]
    if not is_target.any() or is_target.all():
        what = "only rows of the" if is_target.any() else "no rows of the"
        raise InputError(
            f"predict_memorized: {what} target ({run}, {last}); there are {', '.join(pairs[:12])}"
        )
    sign = 1.0 if score is None else _direction(score, "predict_memorized")
    cost = _compute(wide["run"].unique(), run, parameters)
    truth = wide[is_target].set_index("item")[metric]
    made = [_share("base_rate", (truth >= threshold).to_numpy(), run, last, level, compute=1.0)]
    dropped = 0
    for (name, step), part in wide[~is_target].groupby(["run", "step"], sort=True):
        later = part["item"].map(truth).astype(float)
        kept = part[metric].notna() & later.notna()
        dropped += int((~kept).sum() + (~truth.index.isin(part["item"])).sum())
        said = (part[metric][kept] >= threshold).to_numpy()
        true = (later[kept] >= threshold).to_numpy()
        place = {"run": name, "step": step, "level": level}
        place["compute"] = step / last * cost[name] if last else np.nan
        made.append(_share("precision", true[said], reason="nothing memorized yet", **place))
        made.append(_share("recall", said[true], reason="nothing to foretell", **place))
        made.append(_f1(said, true, place))
        if score is not None:
            made.append(_ordered(sign * part[score][kept].to_numpy(), true, draws, seed, place))
    result = validate(pd.concat(made, ignore_index=True))
    result.attrs["dropped"] = dropped
    return result


def _compute(runs, target: str, parameters: Mapping[str, int] | None) -> dict[str, float]:
    """Parameters of each run as shares of the target's."""
    known = {str(name): float(count) for name, count in (parameters or {}).items()}
    if len(runs) == 1 and not known:
        return {target: 1.0}
    lacking = [name for name in [target, *runs] if name not in known]
    if lacking:
        raise InputError(
            f"predict_memorized: no parameters of run {lacking[0]}; several runs are compared by "
            f"compute: give parameters={{{lacking[0]!r}: ..., ...}}"
        )
    return {name: known[name] / known[target] for name in runs}


def _share(metric, hits: Bool[np.ndarray, " item"], run, step, level, *, compute, reason=""):
    n = len(hits)
    value = hits.mean() if n else np.nan
    lo, hi = wilson_interval(np.array([value]), np.array([n]), level)
    beside = {"compute": compute, "reason": "" if n else reason}
    return rows(metric, value, run=run, step=step, lo=lo, hi=hi, n=n, beside=beside)


def _f1(said: Bool[np.ndarray, " item"], true: Bool[np.ndarray, " item"], place: dict):
    """F1 is a rising function of the share J of the items in either set that are in both."""
    either = said | true
    made = _share("f1", (said & true)[either], reason="neither set has an item", **place)
    bounds = ["value", "lo", "hi"]
    return made.assign(**{name: 2 * made[name] / (1 + made[name]) for name in bounds})


def _ordered(score, true: Bool[np.ndarray, " item"], draws: int, seed: int, place: dict):
    run, step, compute = place["run"], place["step"], place["compute"]
    memorized, n = int(true.sum()), len(true)
    if not memorized:
        beside = {"compute": compute, "reason": "nothing to foretell"}
        return rows("average_precision", np.nan, run=run, step=step, n=n, beside=beside)
    value = _average_precision(score, true, np.ones((1, n)))[0]
    rng = np.random.default_rng([seed, 32])
    weight = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    lo, hi = _percentiles(_average_precision(score, true, weight), place["level"])
    beside = {"compute": compute, "reason": ""}
    return rows("average_precision", value, run=run, step=step, lo=lo, hi=hi, n=n, beside=beside)


def _average_precision(score, true, weight) -> Float[np.ndarray, " draw"]:
    """Here the targets are the memorized items of each draw; NaN where a draw has none."""
    found = guess_curve(score, true, weight, 1, ())["average_precision"]
    held = weight @ true
    return np.divide(found, held, out=np.full(len(held), np.nan), where=held > 0)
