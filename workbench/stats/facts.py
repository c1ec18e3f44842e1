"""What injected facts gained and what is left of it, beside entities that were never injected.

Chang et al. (2024), "How do large language models acquire factual knowledge during pretraining?".
The best of several noisy values is too high, and the form of the sentences is learned along with
the facts; entities never injected show both, so each measure is given for the injected, for the
never injected, and net. What is resampled is the entity, with all its questions and its partner.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats

from workbench.facts import INJECTED, NEVER, WINDOW
from workbench.stats.laws import LEAST_POINTS, LEAST_SPAN
from workbench.stats.summarise import percentile_tail, summarise
from workbench.table import InputError, coordinates, rows, validate

NET = "net"
CELL = ("run", "depth", "schedule", "batch", "learning_rate", "seed")
NEEDED = (*CELL, "entity", "pair", "slot", "lag", "since")
OVER_ENTITIES, OVER_SEEDS = "entities", "seeds"


def fact_effects(
    table: pd.DataFrame,
    *,
    window: int = WINDOW,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Effectivity, retainability and decay constant of injected facts, by depth, schedule and arm.

    With l a question's log-probability, slot k at update u_k, and t_LAM the first update of u_k to
    u_k + ``window`` at which l is largest:

    - ``effectivity`` of slot k = l(t_LAM) - l(u_k - 1);
    - ``gain`` at t = l(t_LAM of the last slot + t) - l(u_1 - 1), where an update between two that
      were asked is interpolated, linearly in log(1 + lag);
    - ``retainability`` at t = mean gain at t / mean gain at 0, a ratio of means over entities;
    - ``decay_constant`` = b of the least-squares line a - b log10 t through retainability at
      t >= 1: the share lost as t grows tenfold. ``fitted`` is that line;
    - ``placebo`` = l(u_1 - 1) - l at the first update asked, where that is an earlier one: the
      entity was not injected yet, so its net is 0 but for chance.

    Args:
        table: As :func:`workbench.injection.inject_facts` gives it; of several runs or seeds one
            after the other.
        window: Updates after a slot in which the best value is looked for.
        draws: Bootstrap draws over entities. An entity and its partner (``pair``) are drawn
            together; where there are no partners the groups are drawn independently.
        level: Of the intervals: percentiles of the draws, further out the fewer the entities
            (:func:`percentile_tail`).
        seed: Of the draws.

    Returns:
        Rows with ``item`` "all" and ``group`` ``injected``, ``never`` or ``net``, their difference:
        0 where nothing was learned but the form. Coordinates ``depth``, ``schedule``, ``batch``,
        ``learning_rate``, ``seed``; ``slot`` (of effectivity; missing: the mean over slots), ``t``
        (of gain, retainability, fitted), ``over``: "entities", and where there are several seeds
        also "seeds": their mean (``seed`` missing), with Student's interval and their number as n.
        Retainability and decay constant are NaN with a ``reason`` where the interval of the gain at
        0 is not above 0, the latter also under 5 distinct t >= 1 or one decade of t.

    Raises:
        InputError: Missing columns, a group, or updates of a window; one entity in a group; draws
            below 2.
    """
    table = _checked(table, draws, level)
    weights: dict = {}
    made = []
    for values, part in table.groupby(list(CELL), observed=True, sort=False):
        where = dict(zip(CELL, values, strict=True))
        panels, slots, times = _panels(part, where, window)
        paired = _paired(*panels.values())
        means, boots = {}, {}
        for group, panel in panels.items():
            weight = _resample(weights, INJECTED if paired else group, len(panel), draws, seed)
            means[group], boots[group] = (
                panel.to_numpy().mean(axis=0)[None],
                weight @ panel.to_numpy(),
            )
        means[NET], boots[NET] = (each[INJECTED] - each[NEVER] for each in (means, boots))
        count = {group: len(panel) for group, panel in panels.items()}
        count[NET] = count[INJECTED] if paired else sum(count.values())
        for group in means:
            tail = percentile_tail(min(len(panel) for panel in panels.values()), level)
            found = _measures(means[group], boots[group], slots, times, tail)
            if part["since"].min() == part.loc[part["lag"] == 0, "since"].min() - 1:
                found = found[found["metric"] != "placebo"]  # asked just before alone
            about = {name: value for name, value in where.items() if name != "run"}
            made.append(
                found.assign(
                    run=where["run"], group=group, n=count[group], step=part["step"].max(), **about
                )
            )
    result = pd.concat(made, ignore_index=True).assign(item="all", over=OVER_ENTITIES)
    if result["seed"].nunique() > 1:
        result = pd.concat([result, _over_seeds(result, level)], ignore_index=True)
    return validate(result)


def fact_trace(table: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Mean log-probability by updates since the first slot, with intervals over entities.

    Args:
        table: As :func:`workbench.injection.inject_facts` gives it.
        draws, seed: Of the bootstrap over entities.

    Returns:
        One row per group, cell and ``since``, with ``slot`` and ``lag``; a row of lag 0 is an
        injection (of the group ``never``: the place of its partner's).

    Raises:
        InputError: Missing columns.
    """
    table = _checked(table, draws, 0.95)
    by = ["group", *CELL, "since", "slot", "lag"]
    keys = [*by, "entity", "metric"]
    entities = table.groupby(keys, observed=True, dropna=False, sort=False)
    pooled = entities.agg(value=("value", "mean"), step=("step", "max")).reset_index()
    pooled = pooled.rename(columns={"entity": "item"}).assign(lo=np.nan, hi=np.nan, n=1)
    return summarise(pooled, by=by, draws=draws, seed=seed)


def window_gains(
    value: Float[np.ndarray, "item update"], before: Float[np.ndarray, " item"]
) -> tuple[Float[np.ndarray, " item"], Int[np.ndarray, " item"]]:
    """Gain from before a slot to the best update of its window, and which update that is.

    Args:
        value: Log-probability at lags 0, 1, 2, ... after the slot.
        before: The same just before it.

    Returns:
        ``max(value) - before``, below 0 where the window never reaches the level before; and the
        lag of the maximum, the first of equals.
    """
    return value.max(axis=1) - before, value.argmax(axis=1)


def decay_line(
    t: Float[np.ndarray, " t"], share: Float[np.ndarray, "draw t"]
) -> tuple[Float[np.ndarray, " draw"], Float[np.ndarray, " draw"]]:
    """``a`` and ``b`` of the least-squares lines ``share = a - b log10 t``, one for each row.

    Shares 1, .8, .6 at t = 1, 10, 100 give a = 1 and b = .2.
    """
    x = np.log10(t) - np.log10(t).mean()
    b = -(share @ x) / (x @ x)
    return share.mean(axis=1) + b * np.log10(t).mean(), b


def _panels(part: pd.DataFrame, where: dict, window: int):
    """Both groups' gains, one row an entity in the order of pairs; slots and times."""
    panels = {g: _entity_gains(part, g, where, window) for g in (INJECTED, NEVER)}
    slots, times = panels[INJECTED][1:]
    for other, mine in zip(panels[NEVER][1:], (slots, times), strict=True):
        if not np.array_equal(other, mine):
            raise InputError(
                f"fact_effects: {_told(where)}: the groups were asked at different updates; ask "
                "both at the same"
            )
    return {group: panel for group, (panel, *_) in panels.items()}, slots, times


def _paired(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether each entity has its partner, in the same order."""
    pair, partner = (each.index.get_level_values("pair") for each in (one, other))
    return bool(pair.is_unique and pair.equals(partner))


def _entity_gains(part: pd.DataFrame, group: str, where: dict, window: int):
    """``[entity, column]``: effectivity by slot, its mean, gain by t, placebo; slots and times."""
    mine = part[part["group"] == group]
    told = f"{_told(where)}, group {group}"
    if mine["entity"].nunique() < 2:
        raise InputError(
            f"fact_effects: {told} has {mine['entity'].nunique()} entities, an interval needs at "
            "least 2"
        )
    panel = mine.astype({"pair": str, "entity": str, "item": str}).pivot(
        index=["pair", "entity", "item"], columns="since", values="value"
    )
    clock = mine.drop_duplicates("since").set_index("since")
    slots = clock[clock["lag"] == 0].sort_values("slot")
    starts = slots.index.to_numpy()
    for start, slot in zip(starts, slots["slot"], strict=True):
        for since in range(start - 1, start + window + 1):
            if since not in panel.columns or panel[since].isna().any():
                raise InputError(
                    f"fact_effects: {told} was not asked {since - start} updates after slot "
                    f"{slot} (-1: just before it); ask at each up to {window}, or give a shorter "
                    "window"
                )
    gains = []
    for start in starts:
        reached = panel[list(range(start, start + window + 1))].to_numpy()
        gain, at = window_gains(reached, panel[start - 1].to_numpy())
        gains.append(gain)
    # of the last slot: every update asked since, and those from its best value on
    after = [since for since in panel.columns if since >= starts[-1]]
    if panel[after].isna().any(axis=None):
        missing = panel[after].isna().any().idxmax()
        raise InputError(
            f"fact_effects: {told} was asked only in part {missing - starts[-1]} updates after its "
            "last slot; ask all questions of a cell at the same updates"
        )
    lags = np.array(after) - starts[-1]
    times = lags[lags <= lags[-1] - window]
    level = np.stack(
        [
            np.interp(np.log1p(best + times), np.log1p(lags), line)
            for best, line in zip(at, panel[after].to_numpy(), strict=True)
        ]
    )
    level -= panel[starts[0] - 1].to_numpy()[:, None]
    # what came before the first slot: nothing was injected yet, so its net is a placebo
    waited = panel[starts[0] - 1] - panel[panel.columns.min()]
    columns = np.column_stack([*gains, np.mean(gains, axis=0), level, waited])
    entities = pd.DataFrame(columns, index=panel.index).groupby(level=["pair", "entity"]).mean()
    return entities, slots["slot"].to_numpy(), times


def _measures(mean, boots, slots, times, tail: float) -> pd.DataFrame:
    """Rows of one group in one cell, without their place."""
    k = len(slots)
    lo, hi = _interval(boots, tail)
    at = {"slot": [*slots, np.nan], "t": np.nan, "reason": ""}
    made = [_rows("effectivity", mean[0, : k + 1], lo[: k + 1], hi[: k + 1], at)]
    at = {"slot": np.nan, "t": np.nan, "reason": ""}
    made.append(_rows("placebo", mean[0, -1], lo[-1], hi[-1], at))
    gain, gains = mean[:, k + 1 : -1], boots[:, k + 1 : -1]
    at = {"slot": np.nan, "t": times, "reason": ""}
    made.append(_rows("gain", gain[0], lo[k + 1 : -1], hi[k + 1 : -1], at))
    later = times >= 1
    t = times[later].astype(float)
    reason = "" if lo[k + 1] > 0 else "the gain is not told from 0"
    short = len(t) < LEAST_POINTS or t[-1] / t[0] < LEAST_SPAN
    if reason:
        nothing = np.full(len(times), np.nan)
        made.append(_rows("retainability", nothing, nothing, nothing, at | {"reason": reason}))
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = gains / gains[:, :1]
        share = gain / gain[:, :1]
        made.append(_rows("retainability", share[0], *_interval(shares, tail), at))
    at = {"slot": np.nan, "t": np.nan}
    if reason or short:
        reason = reason or f"{len(t)} times, or less than one decade of them"
        made.append(_rows("decay_constant", np.nan, np.nan, np.nan, at | {"reason": reason}))
        return pd.concat(made, ignore_index=True)
    line, lines = decay_line(t, share[:, later]), decay_line(t, shares[:, later])
    low, high = _interval(lines[1][:, None], tail)
    made.append(_rows("decay_constant", line[1], low, high, at | {"reason": ""}))
    fitted = (each[0][:, None] - each[1][:, None] * np.log10(t) for each in (line, lines))
    value, band = fitted
    at = {"slot": np.nan, "t": t, "reason": ""}
    made.append(_rows("fitted", value[0], *_interval(band, tail), at))
    return pd.concat(made, ignore_index=True)


def _over_seeds(result: pd.DataFrame, level: float) -> pd.DataFrame:
    """Mean over seeds, with Student's interval; seeds without a value are left out and counted."""
    keys = [name for name in coordinates(result) if name not in ("seed", "over", "step")]
    made = []
    for values, part in result.groupby(keys, observed=True, dropna=False, sort=False):
        found = part["value"].dropna()
        n, mean, half, reason = len(found), np.nan, np.nan, ""
        if n < len(part):
            reason = f"undefined in {len(part) - n} of {len(part)} seeds"
        if n:
            mean = found.mean()
        if n > 1:
            half = stats.t.ppf((1 + level) / 2, n - 1) * found.std(ddof=1) / np.sqrt(n)
        else:
            reason = reason or "one seed: no interval"
        row = dict(zip(keys, values, strict=True))
        row |= {"value": mean, "lo": mean - half, "hi": mean + half, "n": n, "reason": reason}
        made.append(row | {"step": part["step"].max()})
    return pd.DataFrame(made).assign(seed=np.nan, over=OVER_SEEDS)


def _resample(weights: dict, group: str, n: int, draws: int, seed: int) -> np.ndarray:
    """``[draw, entity]`` weights that sum to 1, the same whenever as many are asked for."""
    if (group, n) not in weights:
        rng = np.random.default_rng([seed, 15, (INJECTED, NEVER).index(group), n])
        weights[group, n] = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n
    return weights[group, n]


def _interval(boots: Float[np.ndarray, "draw column"], tail: float) -> np.ndarray:
    return np.quantile(boots, [tail, 1 - tail], axis=0)


def _rows(metric: str, value, lo, hi, beside: dict) -> pd.DataFrame:
    return rows(metric, value, run="", lo=lo, hi=hi, beside=beside)


def _told(where: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in where.items())


def _checked(table: pd.DataFrame, draws: int, level: float) -> pd.DataFrame:
    for name in NEEDED:
        if name not in table.columns:
            raise InputError(f"fact_effects: no column {name!r}; inject_facts gives such a table")
    if draws < 2:
        raise InputError(f"fact_effects: {draws} draws, an interval needs at least 2")
    if not 0 < level < 1:
        raise InputError(f"fact_effects: level is {level}, it must lie between 0 and 1")
    table = validate(table)
    table = table[table["metric"] == "log_probability"]
    for group in (INJECTED, NEVER):
        if not (table["group"] == group).any():
            raise InputError(
                f"fact_effects: no rows of group {group!r}; without entities that were never "
                "injected, learning the form of the sentences reads as learning the facts"
            )
    return table
