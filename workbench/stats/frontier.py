"""Edits compared at the same price: the recitation they leave at equal perplexity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from workbench.table import InputError, rows, validate

RATIOS = (1.02, 1.05, 1.10, 1.20)  # perplexity over that of the unedited model
LEVEL = 0.95
DRAWS = 2000
NONE = "none"  # the method of the rows of the unedited model


def matched_frontier(
    table: pd.DataFrame,
    *,
    metric: str = "recitation_strict",
    ratios: Sequence[float] = RATIOS,
    against: str = "svd",
    seed: int = 0,
) -> pd.DataFrame:
    """What each kind of edit leaves of the recitation once perplexity has risen so far.

    Any edit strong enough stops recitation, so Merullo et al. (2025) compare edits at matched
    perplexity. Here :func:`at_price` reads the verdict of each item off each sweep, from the
    unedited model and the gentlest edit to the strongest; the mean over items is the value.

    Args:
        table: What ``probe_curvature`` returned, rows of single items included.
        metric: ``recitation_strict``, ``recitation_loose`` or ``edit_distance``.
        ratios: Perplexities at which to compare, as multiples of the unedited one; at least 1.
        against: The method that the others are compared with.

    Returns:
        For each ``method`` and ``ratio`` (coordinates) a row of ``metric``, and one of
        ``difference``, the method minus ``against`` on the same items: negative where the method
        removes more recitation, 0 where they are alike. Intervals: bootstrap over items, paired;
        perplexities count as known. NaN with a reason where a sweep ends before it costs so much.

    Raises:
        InputError: Rows of several models, no such metric, no unedited rows, ratios below 1.
    """
    if any(not ratio >= 1 for ratio in ratios):
        raise InputError(f"matched_frontier: ratios are {list(ratios)}, needs at least 1 each")
    verdicts, price = _sweeps(validate(table), metric)
    items = verdicts.shape[1]
    weights = np.random.default_rng([seed, items]).multinomial(
        items, np.full(items, 1 / items), size=DRAWS
    )
    methods = [m for m in price.index.unique("method") if m != NONE]
    made = []
    for ratio in ratios:
        at = {m: at_price(*_path(verdicts, price, m), ratio) for m in methods}
        for method in methods:
            beside = {"method": method, "ratio": ratio}
            made.append(_pooled(table, metric, at[method], weights / items, beside))
            if against in at and method != against:
                gap = at[method] - at[against]
                made.append(_pooled(table, "difference", gap, weights / items, beside))
    return validate(pd.concat(made, ignore_index=True))


def at_price(
    verdicts: Float[np.ndarray, "edit item"], price: Float[np.ndarray, " edit"], ratio: float
) -> Float[np.ndarray, " item"]:
    """Each item's verdict where a sweep first costs ``ratio`` times its first price.

    Linear in log price between the two edits around the crossing; what happens beyond is not
    looked at, so a sweep whose price falls again is read at its first crossing. All NaN if it
    never gets there. At prices 100 and 120, verdicts 1 and 0, the ratio 1.1 gives
    ``1 - ln 1.1 / ln 1.2 = 0.477``.
    """
    # 1.1 * 100 is a rounding above 110, and that edit is the crossing
    above = np.flatnonzero(price >= ratio * price[0] * (1 - 1e-12))
    if not len(above):
        return np.full(verdicts.shape[1], np.nan)
    after = above[0]
    if after == 0:
        return verdicts[0].copy()
    low, high = np.log(price[after - 1]), np.log(price[after])
    share = min((np.log(ratio * price[0]) - low) / (high - low), 1.0)
    return (1 - share) * verdicts[after - 1] + share * verdicts[after]


def _sweeps(table: pd.DataFrame, metric: str) -> tuple[pd.DataFrame, pd.Series]:
    """Verdicts ``[(method, rho), item]`` and the perplexity of each edit."""
    if len(table[["run", "step"]].drop_duplicates()) != 1:
        raise InputError("matched_frontier: the table holds several models or steps; select one")
    items = table[(table["metric"] == metric) & (table["item"] != "all")]
    price = table[table["metric"] == "perplexity"]
    if items.empty or price.empty or NONE not in set(price.get("method", ())):
        raise InputError(
            f"matched_frontier: needs rows of {metric} for each item and of perplexity, with those "
            f"of the unedited model (method {NONE!r}); give the table of probe_curvature"
        )
    edit = ["method", "rho"]
    wide = items.astype({"method": str}).pivot(index=edit, columns="item", values="value")
    return wide, price.astype({"method": str}).set_index(edit)["value"]


def _path(verdicts: pd.DataFrame, price: pd.Series, method: str) -> tuple[np.ndarray, np.ndarray]:
    """A method's edits in order of strength, the unedited model first."""
    shares = sorted(price.loc[method].index, reverse=True)
    order = [*((NONE, r) for r in price.loc[NONE].index), *((method, r) for r in shares)]
    return verdicts.loc[order].to_numpy(), price.loc[order].to_numpy()


def _pooled(table, metric, values, weights, beside: dict) -> pd.DataFrame:
    first = table[table["metric"] == "perplexity"].iloc[0]
    low, high = np.nan, np.nan
    if np.isfinite(values).all():
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(weights @ values, [tail, 1 - tail])
        # a mean of equal numbers may land a rounding beyond them
        low, high = min(low, values.mean()), max(high, values.mean())
        reason = None
    else:
        reason = f"a sweep ends before perplexity has risen to {beside['ratio']:g} times"
    return rows(
        metric,
        values.mean(),
        run=str(first["run"]),
        step=int(first["step"]),
        lo=low,
        hi=high,
        n=len(values),
        beside=beside | {"reason": reason},
    )
