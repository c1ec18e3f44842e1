"""When each text was learned, lost and learned again, as far as the checkpoints tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from workbench.table import METRICS, InputError, validate

EVENTS = ("learned", "lost", "relearned", "kept", "never")


def life_events(
    table: pd.DataFrame,
    *,
    control: str | Sequence[str] = ("never", "unseen"),
    strata: Sequence[str] = ("kind",),
    quantile: float = 0.95,
) -> pd.DataFrame:
    """Where each item passes from unknown to known and back, along the checkpoints of a run.

    At a checkpoint an item is known if its verdict is 1 (where the metric is a share and all its
    values are 0 or 1: ``extractable``), else if its score is better than the ``quantile`` of the
    controls' scores at that checkpoint. Between two checkpoints more may have happened than is
    seen: the number of events is a lower bound. By the quantile, one control in twenty is known at
    any checkpoint, which is what chance gives: read their events beside the others'.

    Args:
        table: Item rows of one metric at two or more steps of each run.
        control: Groups whose items were never trained on; not needed for verdicts.
        strata: Columns within which items meet controls, where the table has them.
        quantile: Of the controls' scores, above which an item is known.

    Returns:
        One row an event, metric "event_step", with the item's coordinates and ``event``: "learned"
        (the first checkpoint at which it is known), "lost" (the next at which it is not),
        "relearned", "kept" (known at the last checkpoint, which is the value) or "never" (known at
        none; NaN with a reason). The event lies after ``lo``, the checkpoint before, and not after
        the value, which is ``hi``. ``lo`` is NaN where there is none before. Coordinate ``number``
        counts an item's events from 1. ``.attrs["rule"]`` says what known means.

    Raises:
        InputError: Several metrics, one step, a score without direction or controls, several rows
            an item and step, values that are missing.
    """
    table = validate(table)
    one_look_each(table, "life_events")
    known, rule = known_at(table, "life_events", control=control, strata=strata, quantile=quantile)
    groups = [control] if isinstance(control, str) else list(control)
    life = table.groupby(["run", "item"], observed=True, sort=False).ngroup().to_numpy()
    order = np.lexsort((table["step"], life))
    place, event, lo = _events(life[order], table["step"].to_numpy()[order], known[order])
    result = table.iloc[order[place]].reset_index(drop=True)
    # these change along a run, and an event has but one row
    result = result.drop(columns=[c for c in ("copies", "lag", "se") if c in result])
    at = np.where(event == "never", np.nan, result["step"])
    number = pd.Series(life[order[place]]).groupby(life[order[place]]).cumcount() + 1
    result = result.assign(value=at, lo=lo, hi=at, event=event, number=number)
    why = f"at no checkpoint {rule}"
    result["reason"] = np.where(result["event"] == "never", why, "")
    result = validate(result.assign(metric="event_step", n=1))
    of = str(table["metric"].iloc[0])
    result.attrs = {"rule": rule, "of": of, "controls": groups}
    return result


def forgetting_events(
    table: pd.DataFrame,
    *,
    control: str | Sequence[str] = ("never", "unseen"),
    strata: Sequence[str] = ("kind",),
    quantile: float = 0.95,
) -> pd.DataFrame:
    """How often each item was known at one look and not at the next (Toneva et al. 2019).

    Toneva et al., "An empirical study of example forgetting during deep neural network learning",
    ICLR: an item known at looks 0, 1, 1, 0, 1, 0, 0, 1 was forgotten twice and first learned at the
    second look. They look at every presentation of the item, and the count is then exact. With
    checkpoints further apart an item may be lost and regained between two looks, so that the count
    is a lower bound: ``lo`` is the count and ``hi`` infinite.

    Args:
        table: Item rows of one metric at two or more steps of each run; what known means is as in
            :func:`life_events`.
        control, strata, quantile: As there.

    Returns:
        One row an item, metric "forgetting_events": 0 for an item never lost once it was known; NaN
        with a reason where it was never known. Coordinate ``event``: "forgotten", "unforgettable"
        (known once, and from then on at every look) or "never learned", a class of its own, which
        Toneva et al. count among the forgotten. ``learned`` is the step at which it was first known.
        ``step`` is the last look. ``.attrs`` as of :func:`life_events`.

    Raises:
        InputError: As :func:`life_events`.
    """
    events = life_events(table, control=control, strata=strata, quantile=quantile)
    told = events["event"].astype(str)
    item = [events["run"].astype(str), events["item"].astype(str)]
    first = events[events["number"] == 1].reset_index(drop=True)
    lost = (told == "lost").groupby(item).sum()
    count = lost[[*zip(first["run"].astype(str), first["item"].astype(str), strict=True)]]
    never = first["event"].astype(str) == "never"
    value = np.where(never, np.nan, count.to_numpy())
    kept = np.where(value == 0, "unforgettable", "forgotten")
    last = table.groupby("run", observed=True)["step"].max()
    result = first.drop(columns="number").assign(
        metric="forgetting_events",
        value=value,
        lo=value,
        hi=np.where(never, np.nan, np.inf),
        event=np.where(never, "never learned", kept),
        learned=first["value"],
        step=first["run"].astype(str).map(last.rename(index=str)),
    )
    result = validate(result)
    result.attrs = events.attrs
    return result


def _events(
    life: Int[np.ndarray, " row"], step: Int[np.ndarray, " row"], known: Bool[np.ndarray, " row"]
):
    """Row, name and checkpoint before of each event, of rows sorted by life and then step."""
    begins = np.append(True, life[1:] != life[:-1])
    ends = np.append(life[1:] != life[:-1], True)
    before = np.where(begins, np.nan, np.roll(step, 1))
    turns = np.flatnonzero(known != (np.roll(known, 1) & ~begins))
    gained = turns[known[turns]]
    first = gained[np.unique(life[gained], return_index=True)[1]]
    name = np.where(known[turns], "relearned", "lost").astype(object)
    name[np.isin(turns, first)] = "learned"
    kept = np.flatnonzero(ends & known)
    never = np.flatnonzero(ends & ~np.isin(life, life[first]))
    place = np.concatenate([turns, kept, never])
    name = np.concatenate([name, np.repeat(["kept", "never"], [len(kept), len(never)])])
    lo = np.where(name == "never", np.nan, before[place])
    # what is learned at the last checkpoint is also kept there, and that comes second
    order = np.lexsort((name == "kept", place))
    return place[order], name[order].astype(str), lo[order]


def known_at(
    table: pd.DataFrame,
    asker: str,
    *,
    control: str | Sequence[str],
    strata: Sequence[str],
    quantile: float,
    threshold: float | None = None,
) -> tuple[Bool[np.ndarray, " row"], str]:
    """Whether an item is known at each row, and the rule by which: see :func:`life_events`.

    With a ``threshold`` the score is held against it and not against the controls.
    """
    value, metric = table["value"], str(table["metric"].iloc[0])
    share = (METRICS[metric].low, METRICS[metric].high) == (0.0, 1.0)
    if threshold is None and share and value.isin([0.0, 1.0]).all():
        return (value == 1).to_numpy(), f"{METRICS[metric].label}"
    better = METRICS[metric].better
    if not better:
        raise InputError(f"{asker}: {metric} is neither better high nor low")
    sign = 1.0 if better == "high" else -1.0
    if threshold is not None:
        side = "above" if better == "high" else "below"
        above = (sign * value > sign * threshold).to_numpy()
        return above, f"{METRICS[metric].label} {side} {threshold:g}"
    groups = {control} if isinstance(control, str) else set(control)
    never = table["group"].astype(str).isin(groups)
    if not never.any():
        raise InputError(
            f"{asker}: no rows of group {' or '.join(sorted(groups))} to compare a score with; "
            "name the controls, or give verdicts such as extractable"
        )
    place = ["run", "step", *(name for name in strata if name in table.columns)]
    score = sign * value
    bar = score[never].groupby([table.loc[never, name] for name in place], observed=True)
    bar = bar.quantile(quantile).rename("bar").reset_index()
    limit = table[place].merge(bar, on=place, how="left")["bar"].to_numpy()
    if np.isnan(limit).any():
        first = table[np.isnan(limit)].iloc[0]
        where = ", ".join(f"{name}={first[name]}" for name in place)
        raise InputError(f"{asker}: no controls at {where}; leave those rows out")
    return (score > limit).to_numpy(), f"better than {quantile:.0%} of the controls"


def one_look_each(table: pd.DataFrame, asker: str) -> None:
    """Refuse all but whole rows of one metric, one an item and step, at two or more steps.

    Raises:
        InputError: As said.
    """
    if table["metric"].nunique() != 1:
        held = ", ".join(sorted(set(table["metric"].astype(str)))) or "none"
        raise InputError(f"{asker}: needs rows of one metric, got {held}; select one first")
    if table["value"].isna().any():
        first = table[table["value"].isna()].iloc[0]
        raise InputError(
            f"{asker}: {table['value'].isna().sum()} values are missing (first: item "
            f"{first['item']} at step {first['step']}); leave those items out"
        )
    again = table.duplicated(["run", "item", "step"])
    if again.any():
        first = table[again].iloc[0]
        raise InputError(
            f"{asker}: item {first['item']} has several rows at step {first['step']} of "
            f"{first['run']}; select one"
        )
    steps = table.groupby("run", observed=True)["step"].nunique()
    if steps.min() < 2:
        raise InputError(
            f"{asker}: run {steps.idxmin()} has one checkpoint; events need two or more"
        )
