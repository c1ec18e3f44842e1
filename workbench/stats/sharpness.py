"""Does sharpness tell memorized texts from others, and does it order them by their memorization?

No direction is assumed: that memorized texts are sharp by themselves is a claim, and an area under
one half says that they are flatter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from workbench.stats.membership import (
    area_under_curve,
    by_score,
    delong_error,
    membership_of,
    rows_at,
)
from workbench.table import InputError, one_metric, validate


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
) -> pd.DataFrame:
    """Whether sharper texts are the more memorized: Spearman's rank correlation, item by item.

    Args:
        table: Item rows of one or more measures.
        truth: One row an item, such as the causal memorization of ``twin_effects`` at one step;
            items without a partner and NaN values are left out.
        by: Coordinates within which items are correlated.
        given: Columns of ``table`` with confounds, such as the item's loss: what their ranks
            explain (a line each) is taken out of both sides first. ``by`` may hold a kind of text.

    Returns:
        Rows "spearman" with the coordinates ``score``, the measure, and ``given``: 0 by
        chance, 1 where the sharpest is the most memorized and so on down, -1 reversed. ``n``
        counts items. The interval is Fisher's, with the variance of Bonett & Wright (2000),
        ``(1 + r^2 / 2) / (n - 3 - confounds)``: a bootstrap of a dozen ranks is far too narrow.
        NaN with a reason where items do not differ or are fewer than 4 and the confounds;
        where the ranks agree entirely only the interval is.

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
        value, reason = rank_correlation(sides), ""
        low = high = error = np.nan
        spare = len(part) - 3 - len(given)
        if spare < 1:
            value, reason = np.nan, f"{len(part)} items, fewer than {4 + len(given)}"
        elif np.isnan(value):
            reason = "no spread: the items do not differ"
        elif abs(value) > 1 - 1e-12:
            reason = "no error: the ranks agree entirely"
        else:
            error = np.sqrt((1 + value**2 / 2) / spare)  # of Fisher's z
            half = stats.norm.ppf((1 + level) / 2) * error
            low, high = np.tanh(np.arctanh(value) - half), np.tanh(np.arctanh(value) + half)
        beside = {"given": ", ".join(given), "reason": reason}
        made.append(rows_at("spearman", value, low, high, part, where, len(part), beside))
    return validate(pd.concat(made, ignore_index=True))


def rank_correlation(sides: Float[np.ndarray, "side item"]) -> float:
    """Spearman's correlation of the first two sides, less what the ranks of the others explain.

    (1, 2, 3) and (1, 3, 2) give 1/2. NaN where a side has no spread, or none is left of it.
    """
    ranks = stats.rankdata(sides, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    beside, pair = ranks[2:].T, ranks[:2].T
    left = pair - beside @ np.linalg.lstsq(beside, pair)[0] if len(ranks) > 2 else pair
    spread = (left**2).sum(axis=0)
    # ranks are whole or half numbers: what rounding leaves of them is no spread
    if (spread <= 1e-9 * (pair**2).sum(axis=0)).any():
        return np.nan
    value = left[:, 0] @ left[:, 1] / np.sqrt(spread.prod())
    return float(np.clip(value, -1.0, 1.0))


def _with_columns(table: pd.DataFrame, names: Sequence[str], asker: str) -> pd.DataFrame:
    table = validate(table)
    for name in names:
        if name not in table.columns:
            raise InputError(f"{asker}: no column {name!r}; there are {', '.join(table)}")
    return table
