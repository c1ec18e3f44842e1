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
    _refuse(table)
    metric = str(table["metric"].iloc[0])
    known, rule = _known(table, metric, control, strata, quantile)
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
    result.attrs = {"rule": rule, "of": metric, "controls": groups}
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


def _known(table, metric: str, control, strata, quantile: float) -> tuple[np.ndarray, str]:
    value = table["value"]
    share = (METRICS[metric].low, METRICS[metric].high) == (0.0, 1.0)
    if share and value.isin([0.0, 1.0]).all():
        return (value == 1).to_numpy(), f"{METRICS[metric].label}"
    better = METRICS[metric].better
    if not better:
        raise InputError(f"life_events: {metric} is neither better high nor low")
    sign = 1.0 if better == "high" else -1.0
    groups = {control} if isinstance(control, str) else set(control)
    never = table["group"].astype(str).isin(groups)
    if not never.any():
        raise InputError(
            f"life_events: no rows of group {' or '.join(sorted(groups))} to compare a score with; "
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
        raise InputError(f"life_events: no controls at {where}; leave those rows out")
    return (score > limit).to_numpy(), f"better than {quantile:.0%} of the controls"


def _refuse(table: pd.DataFrame) -> None:
    if table["metric"].nunique() != 1:
        held = ", ".join(sorted(set(table["metric"].astype(str)))) or "none"
        raise InputError(f"life_events: needs rows of one metric, got {held}; select one first")
    if table["value"].isna().any():
        first = table[table["value"].isna()].iloc[0]
        raise InputError(
            f"life_events: {table['value'].isna().sum()} values are missing (first: item "
            f"{first['item']} at step {first['step']}); leave those items out"
        )
    again = table.duplicated(["run", "item", "step"])
    if again.any():
        first = table[again].iloc[0]
        raise InputError(
            f"life_events: item {first['item']} has several rows at step {first['step']} of "
            f"{first['run']}; select one"
        )
    steps = table.groupby("run", observed=True)["step"].nunique()
    if steps.min() < 2:
        raise InputError(
            f"life_events: run {steps.idxmin()} has one checkpoint; events need two or more"
        )
