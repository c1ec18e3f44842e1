"""Floors: where a score of texts that were never trained on would fall, for as many texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from workbench.table import METRICS, InputError, validate

VERDICT = "share of items"  # the unit of metrics that say yes or no of an item


def add_floor(
    summary: pd.DataFrame,
    table: pd.DataFrame,
    *,
    controls: Sequence[str] = ("never", "unseen"),
    strata: Sequence[str] = (),
    level: float = 0.95,
) -> pd.DataFrame:
    """Put beside each pooled number what as many texts without any memory would have given.

    The zone is the prediction interval for a mean of ``n`` further texts drawn like the controls:
    with m controls of standard deviation s it is ``mean -+ t * s * sqrt(1 / n + 1 / m)``, Student's
    t at m - 1. A share of items (verdicts, all 0 or 1) has the beta-binomial quantiles of Jeffreys' prior
    in its place, which are multiples of the resolution ``1 / n`` and do not shrink to a point where
    no control was ever right. A number inside the zone is no evidence of memory. The zone takes
    texts as independent; controls that share a template and were raised with it stand higher, as
    they should.

    Args:
        summary: Pooled rows, as :func:`summarise` gives them.
        table: Item rows they were pooled from, the controls among them.
        controls: Groups whose texts were in no training batch.
        strata: Further columns within which a number meets its controls, such as ``("kind",)``;
            run, step and metric always are.
        level: Of the prediction interval.

    Returns:
        The summary with ``floor`` (the controls' mean), ``floor_lo`` and ``floor_hi``. NaN where
        fewer than two controls have a score, or where the number pools nothing.

    Raises:
        InputError: Unknown columns, no controls, or a level outside 0 to 1.
    """
    if not 0 < level < 1:
        raise InputError(f"add_floor: level is {level}, it must lie between 0 and 1")
    keys = ["run", "step", "metric", *strata]
    for told, frame in (("summary", summary), ("table", table)):
        for name in keys:
            if name not in frame.columns:
                raise InputError(f"add_floor: the {told} has no column {name!r}")
    held = table[table["group"].astype(str).isin(list(controls))]
    if held.empty:
        raise InputError(
            f"add_floor: no text of the groups {', '.join(controls)}; there are "
            f"{', '.join(sorted(table['group'].astype(str).unique()))}. Name those that were in no "
            "training batch"
        )
    known = {
        key: part["value"].dropna().to_numpy()
        for key, part in held.astype({n: str for n in keys}).groupby(keys, observed=True)
    }
    where = summary.astype({n: str for n in keys})[keys].itertuples(index=False, name=None)
    zones = [
        floor_zone(known.get(key, np.array([])), int(n), metric=key[2], level=level)
        for key, n in zip(where, summary["n"], strict=True)
    ]
    out = summary.assign(
        **dict(zip(("floor", "floor_lo", "floor_hi"), np.array(zones).T, strict=True))
    )
    return validate(out)


def floor_zone(
    control: Float[np.ndarray, " control"], n: int, *, metric: str, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of the controls, and the interval for the mean of ``n`` texts like them.

    Controls (0, 0, 0, 1) and n = 4 as a share: mean .25, Jeffreys' posterior Beta(1.5, 3.5), and
    the beta-binomial's 2.5 % and 97.5 % points are 0 and 4 of 4. As plain numbers: s = .5,
    t(3) = 3.182446, half-width 1.125165, cut to the metric's range.
    """
    if len(control) < 2 or n < 1:
        return (float(control.mean()) if len(control) else np.nan), np.nan, np.nan
    low, high = METRICS[metric].low, METRICS[metric].high
    mean = float(control.mean())
    # a share of an item's tokens may be 0 for all controls and is no verdict for that
    if METRICS[metric].unit == VERDICT and np.isin(control, (0.0, 1.0)).all():
        right = control.sum()
        law = stats.betabinom(n, right + 0.5, len(control) - right + 0.5)
        return mean, float(law.ppf((1 - level) / 2)) / n, float(law.ppf((1 + level) / 2)) / n
    half = stats.t.ppf((1 + level) / 2, len(control) - 1) * control.std(ddof=1)
    half *= np.sqrt(1 / n + 1 / len(control))
    return mean, *(float(bound) for bound in np.clip((mean - half, mean + half), low, high))
