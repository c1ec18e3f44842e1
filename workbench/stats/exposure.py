"""Exposure-aligned time: how often, and how long ago, each item was last trained on."""

from __future__ import annotations

import numpy as np
import pandas as pd

from workbench.table import InputError, validate


def align_exposures(table: pd.DataFrame, exposures: pd.DataFrame) -> pd.DataFrame:
    """Add ``copies`` and ``lag`` to each row, from the ledger of what was trained on when.

    Args:
        table: Item-level rows with ``item`` and ``step``.
        exposures: Columns ``update`` and ``item``, one row an exposure.

    Returns:
        The table with ``copies`` (exposures up to and including the step; 0 before the first and
        for items never planted) and ``lag`` (steps since the last of them, 0 right after it; NaN
        where there was none yet).

    Raises:
        InputError: The exposures lack a column.
    """
    lacking = [name for name in ("update", "item") if name not in exposures.columns]
    if lacking:
        raise InputError(f"align_exposures: the exposures have no column {lacking[0]!r}")
    table = validate(table)
    items = table["item"].cat.categories
    code = pd.Index(items).get_indexer(exposures["item"].astype(str))
    met = exposures["update"].to_numpy()[code >= 0]
    code = code[code >= 0]
    # item and update packed into one sorted number: a search then counts an item's updates
    width = int(max(met.max(initial=0), table["step"].max())) + 1
    packed = np.sort(code.astype(np.int64) * width + met)
    row = table["item"].cat.codes.to_numpy().astype(np.int64)
    start = np.searchsorted(packed, row * width)
    upto = np.searchsorted(packed, row * width + table["step"].to_numpy(), side="right")
    copies = upto - start
    last = np.where(copies > 0, packed[np.maximum(upto - 1, 0)] % width if len(packed) else 0, 0)
    lag = np.where(copies > 0, table["step"].to_numpy() - last, np.nan)
    return table.assign(copies=copies, lag=lag)
