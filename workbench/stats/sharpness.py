"""Does sharpness tell memorized texts from others, and does it order them by their memorization?

No direction is assumed: that memorized texts are sharp by themselves is a claim, and an area under
one half says that they are flatter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats

from workbench.stats.membership import (
    area_under_curve,
    by_score,
    delong_error,
    membership_of,
    rows_at,
)
from workbench.table import InputError, one_metric, validate

LEAST = 4  # items of a correlation


def sharpness_auc(
    table: pd.DataFrame,
    *,
    member: str = "member",
    by: Sequence[str] = ("run", "step"),
    level: float = 0.95,
) -> pd.DataFrame:
    """How often a text that was trained on is sharper than one that never was, by each measure.

    Args:
        table: Item rows of one or more measures; NaN values are left out.
        member: Column that says which texts were trained on: booleans, or seen and unseen.
        by: Coordinates within which texts are compared, such as ``("run", "step", "kind")``.

    Returns:
        Rows "auc" with the coordinate ``score``, the measure: .5 by chance, 1 where every trained
        text is sharper, 0 where every one is flatter. ``se`` and the interval are DeLong's, cut to
        0..1, for texts like these; ``n`` counts texts of both classes. NaN with a reason.
        ``.attrs["dropped"]`` counts NaN values.

    Raises:
        InputError: Unknown columns, labels that are neither, no value at all, or an item twice.
    """
    asker = "sharpness_auc"
    table = _with_columns(table, [member, *by], asker)
    inside = pd.Series(membership_of(table[member], asker), index=table.index)
    usable, made = table["value"].notna(), []
    for where, part in by_score(table[usable], by, asker):
        is_member, value = inside[part.index].to_numpy(), part["value"].to_numpy()
        mine, others = value[is_member], value[~is_member]
        area, error = area_under_curve(mine, others), delong_error(mine, others)
        reason = ""
        if not len(mine) or not len(others):
            reason = "texts of one class only"
        elif np.isnan(error):
            reason = "no error: one text in a class"
        elif error == 0:
            reason, error = "no error: the classes do not overlap", np.nan
        half = stats.norm.ppf((1 + level) / 2) * error
        low, high = np.clip([area - half, area + half], 0.0, 1.0)
        beside = {"se": error, "reason": reason}
        made.append(rows_at("auc", area, low, high, part, where, len(part), beside))
    result = validate(pd.concat(made, ignore_index=True))
    result.attrs = {"dropped": int((~usable).sum())}
    return result


def sharpness_correlation(
    table: pd.DataFrame,
    truth: pd.DataFrame,
    *,
    by: Sequence[str] = ("run", "step"),
    given: Sequence[str] = (),
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Whether sharper texts are the more memorized: Spearman's rank correlation, item by item.

    Args:
        table: Item rows of one or more measures.
        truth: One row an item, such as the causal memorization of ``twin_effects`` at one step;
            items without a partner and NaN values are left out.
        by: Coordinates within which items are correlated.
        given: Columns of ``table`` with confounds, such as the item's loss: what their ranks
            explain (a line each) is taken out of both sides first. ``by`` may hold a kind of text.
        draws: Resamples of items behind the percentile interval.

    Returns:
        Rows "spearman" with the coordinates ``score``, the measure, and ``given``: 0 by
        chance, 1 where the sharpest is the most memorized and so on down, -1 reversed. ``n``
        counts items. NaN with a reason where they are fewer than 4 or do not differ.

    Raises:
        InputError: Unknown columns, truth of several metrics or with an item twice, no items in
            common.
    """
    asker = "sharpness_correlation"
    table = _with_columns(table, [*by, *given], asker)
    one_metric(truth, asker)
    if truth["item"].duplicated().any():
        twice = truth["item"][truth["item"].duplicated()].iloc[0]
        raise InputError(f"{asker}: the truth has several rows of {twice}; select one step")
    known = truth.set_index(truth["item"].astype(str))["value"]
    beside = table[list(given)].notna().all(axis=1)
    paired = table.assign(truth=table["item"].astype(str).map(known))
    paired = paired[paired["value"].notna() & paired["truth"].notna() & beside]
    if paired.empty:
        raise InputError(f"{asker}: no item of the table has a truth; do both name items alike?")
    made = []
    for where, part in by_score(paired, by, asker):
        sides = part[["value", "truth", *given]].to_numpy(dtype=float).T
        value, reason = float(rank_correlation(sides, np.arange(len(part))[None])[0]), ""
        low = high = error = np.nan
        if len(part) < LEAST:
            value, reason = np.nan, f"{len(part)} items, fewer than {LEAST}"
        elif np.isnan(value):
            reason = "no spread: the items do not differ"
        else:
            rng = np.random.default_rng(seed)
            drawn = rank_correlation(sides, rng.integers(len(part), size=(draws, len(part))))
            low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
            error = float(np.nanstd(drawn, ddof=1))
        beside = {"given": ", ".join(given), "se": error, "reason": reason}
        made.append(rows_at("spearman", value, low, high, part, where, len(part), beside))
    return validate(pd.concat(made, ignore_index=True))


def rank_correlation(
    sides: Float[np.ndarray, "side item"], index: Int[np.ndarray, "draw item"]
) -> Float[np.ndarray, " draw"]:
    """Spearman's correlation of the first two sides, less what the ranks of the others explain.

    (1, 2, 3) and (1, 3, 2) give 1/2. NaN where a side has no spread, or none is left of it.
    """
    ranks = np.stack([stats.rankdata(side[index], axis=1) for side in sides])
    ranks -= ranks.mean(axis=2, keepdims=True)
    x, y, beside = ranks[0], ranks[1], np.moveaxis(ranks[2:], 0, 2)
    whole = (x**2).sum(axis=1), (y**2).sum(axis=1)
    if beside.shape[2]:
        project = beside @ np.linalg.pinv(beside)
        x, y = ((side - (project @ side[..., None])[..., 0]) for side in (x, y))
    left = (x**2).sum(axis=1), (y**2).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = (x * y).sum(axis=1) / np.sqrt(left[0] * left[1])
    # ranks are whole or half numbers: what rounding leaves of them is no spread
    spread = (left[0] > 1e-9 * whole[0]) & (left[1] > 1e-9 * whole[1])
    return np.where(spread, np.clip(value, -1.0, 1.0), np.nan)


def _with_columns(table: pd.DataFrame, names: Sequence[str], asker: str) -> pd.DataFrame:
    table = validate(table)
    for name in names:
        if name not in table.columns:
            raise InputError(f"{asker}: no column {name!r}; there are {', '.join(table)}")
    return table
