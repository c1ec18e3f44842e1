"""The panel under a causal profile: outcomes of items at checkpoints, sorted by cohort.

Reading refuses what no estimate could survive (an item in two cohorts, infinite values, cohorts
without a base) by name, and never copies the table: a panel has millions of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from workbench.table import InputError

NEVER = np.inf  # the cohort of items that are never trained on
ROWS = 250_000  # rows of a table that are looked at in one go
NEEDED = ("item", "step", "value", "cohort")


@dataclass(frozen=True)
class Panel:
    """Outcomes of all items at all checkpoints, items sorted by cohort, the never-trained last."""

    outcome: Float[np.ndarray, "item step"]  # NaN where not observed
    holes: int  # how many are not observed
    steps: Int[np.ndarray, " step"]
    cohorts: Float[np.ndarray, " group"]  # ascending; NEVER, if there is one, last
    starts: Int[np.ndarray, " group_and_end"]  # items of group j: starts[j] to starts[j + 1]
    cluster: Int[np.ndarray, " item"] | None  # ascending within a group; None: each item its own
    lag: Float[np.ndarray, "group step"]  # updates since the last exposure; NaN before the first
    settled: Bool[np.ndarray, "group step"]  # after the last exposure
    run: str
    group: str

    @property
    def sizes(self) -> Int[np.ndarray, " group"]:
        return np.diff(self.starts)

    @property
    def units(self) -> Int[np.ndarray, " group"]:
        """How many clusters a group has items of; how many items where there are no clusters."""
        if self.cluster is None:
            return self.sizes
        return np.array([len(np.unique(self.numbers(j))) for j in range(len(self.cohorts))])

    @property
    def crossed(self) -> bool:
        """Whether a cluster has items in several cohorts."""
        return self.cluster is not None and self.units.sum() > len(np.unique(self.cluster))

    def members(self, group: int) -> Float[np.ndarray, "member step"]:
        return self.outcome[self.starts[group] : self.starts[group + 1]]

    def numbers(self, group: int) -> Int[np.ndarray, " member"]:
        """The clusters of a group's items; their places in the panel where there are no clusters."""
        if self.cluster is None:
            return np.arange(self.starts[group], self.starts[group + 1])
        return self.cluster[self.starts[group] : self.starts[group + 1]]

    def chunks(self, group: int, size: int) -> list[slice]:
        """Cut a group's items into pieces of about ``size`` that part no cluster."""
        number, cuts = self.numbers(group), [0]
        while cuts[-1] < len(number):
            last = min(cuts[-1] + max(1, size), len(number)) - 1
            cuts.append(int(np.searchsorted(number, number[last], side="right")))
        return [slice(a, b) for a, b in pairwise(cuts)]


def read_panel(
    table: pd.DataFrame, asker: str, *, exclude_initial: bool, cluster: str | None
) -> tuple[Panel, list[int]]:
    """Spread item rows into a panel; also give the cohorts that were left out.

    Raises:
        InputError: See :func:`workbench.stats.profile.memorization_profile`.
    """
    run, group = _labels(table, asker, cluster)
    # by name, so that the order of rows in a table changes no draw
    item, names = _codes(table["item"], asker)
    step, steps = _codes(table["step"], asker)
    steps = _whole(steps, asker)
    cohort = _one_each(table["cohort"], item, names, asker)
    cohort = np.where(np.isnan(cohort), NEVER, cohort)
    _refuse_without_base(cohort, steps, asker)
    cohorts, which = np.unique(cohort, return_inverse=True)
    first_step, excluded = _initial(cohorts, steps, asker) if exclude_initial else (0, [])
    kept = len(excluded)  # cohorts ascend, so the early ones come first
    number = _clusters(table, cluster, item, names, asker)
    order = np.argsort(which, kind="stable") if number is None else np.lexsort((number, which))
    starts = np.append(np.searchsorted(which[order], np.arange(len(cohorts))), len(order))
    lag, settled = _lags(table, which, item, step, cohorts, steps, asker)
    place = np.argsort(order).astype(np.int32)
    outcome = _spread_out(table["value"], place, item, step, names, steps, asker)
    outcome = outcome[starts[kept] :, first_step:]
    panel = Panel(
        outcome=outcome,
        holes=int(np.isnan(outcome).sum()),
        steps=steps[first_step:],
        cohorts=cohorts[kept:],
        starts=starts[kept:] - starts[kept],
        cluster=None if number is None else number[order][starts[kept] :],
        lag=lag[kept:, first_step:],
        settled=settled[kept:, first_step:],
        run=run,
        group=group,
    )
    return panel, excluded


def _labels(table: pd.DataFrame, asker: str, cluster: str | None) -> tuple[str, str]:
    """The run, and the group if the trained items are of one."""
    for name in (*NEEDED, *([cluster] if cluster is not None else [])):
        if name not in table.columns:
            meaning = ": the update that first held the item, missing = never"
            raise InputError(
                f"{asker}: no column {name!r}{meaning if name == 'cohort' else ''}; "
                f"it needs {', '.join(NEEDED if name in NEEDED else [name])}"
            )
    if not len(table):
        raise InputError(f"{asker}: the table is empty; it needs one row per item and checkpoint")
    for name in ("metric", "run"):
        held = list(map(str, _present(table[name]))) if name in table.columns else ["panel"]
        if len(held) != 1:
            raise InputError(
                f"{asker}: needs rows of one {name}, got {', '.join(held)}; select one first"
            )
    run, groups = held[0], []
    if "group" in table.columns:
        groups = _present(table["group"][table["cohort"].notna().to_numpy()])
    return run, str(groups[0]) if len(groups) == 1 else "all"


def _parts(length: int) -> list[slice]:
    """A table in parts: numpy turns a whole index into 64 bits, pandas sizes its hashes by it."""
    return [slice(start, start + ROWS) for start in range(0, length, ROWS)]


def _distinct(values: np.ndarray) -> np.ndarray:
    """Sorted; NaN, if there is one, last."""
    return np.unique(np.concatenate([pd.unique(values[part]) for part in _parts(len(values))]))


def _present(column: pd.Series) -> list:
    """The values of a column, each once."""
    if not isinstance(column.dtype, pd.CategoricalDtype):
        return list(pd.unique(column))
    names = [*column.cat.categories, np.nan]  # a missing value is code -1, the last
    return [names[code] for code in _distinct(column.cat.codes.to_numpy())]


def _codes(column: pd.Series, asker: str) -> tuple[Int[np.ndarray, " row"], np.ndarray]:
    """Which of its sorted values each row has, in 16 or 32 bits: a panel has millions of rows."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        old, names = column.cat.codes.to_numpy(), np.asarray(column.cat.categories)
        used = _distinct(old)
        missing, used = used[0] < 0, used[used >= 0]
        used = used[np.argsort(names[used])]
        new = np.full(len(names) + 1, -1, dtype=_small(len(used)))
        new[used], names = np.arange(len(used)), names[used]
        code = np.empty(len(old), dtype=new.dtype)
        for part in _parts(len(old)):
            code[part] = new[old[part]]
    elif isinstance(column.dtype, np.dtype) and column.dtype.kind in "iuf":
        names = _distinct(column.to_numpy())
        missing = bool(np.isnan(names[-1]))
        values = pd.Index(names)
        code = np.empty(len(column), dtype=_small(len(names)))
        for part in _parts(len(column)):
            code[part] = values.get_indexer(column.iloc[part])
    else:
        code, names = pd.factorize(column, sort=True)
        missing, names = (code < 0).any(), np.asarray(names)
        code = code.astype(_small(len(names)))
    if missing:
        raise InputError(f"{asker}: {column.name} is missing in some rows; drop those rows")
    return code, names


def _small(largest: int) -> type:
    return np.int16 if largest < 2**15 else np.int32


def _whole(steps: np.ndarray, asker: str) -> Int[np.ndarray, " step"]:
    if not pd.api.types.is_numeric_dtype(steps.dtype):
        raise InputError(f"{asker}: step holds {steps[0]!r}, it needs numbers of updates")
    parts = steps[steps != np.floor(steps.astype(float))]
    if len(parts):
        raise InputError(f"{asker}: step {parts[0]} is no whole number of updates")
    return steps.astype(np.int64)


def _floats(column: pd.Series, asker: str) -> Float[np.ndarray, " row"]:
    """A view where it can be one; single precision stays."""
    if column.dtype in (np.float32, np.float64):
        return column.to_numpy()
    try:
        return column.to_numpy(dtype=float, na_value=np.nan)
    except (TypeError, ValueError):
        text = next(v for v in column if isinstance(v, str) or not np.isscalar(v))
        raise InputError(f"{asker}: {column.name} holds {text!r}, it needs numbers") from None


def _one_each(
    column: pd.Series, item: np.ndarray, names: np.ndarray, asker: str
) -> Float[np.ndarray, " item"]:
    """The cohort of each item, NaN for never."""
    given = _floats(column, asker)
    cohort = np.empty(len(names))
    for part in _parts(len(given)):
        cohort[item[part]] = given[part]
    for part in _parts(len(given)):
        expected, here = cohort[item[part]], given[part]
        # missing is never equal, so two missing ones must be let through
        wrong = np.flatnonzero((expected != here) & ~(np.isnan(expected) & np.isnan(here)))
        if len(wrong):
            first = item[part][wrong[0]]
            both = sorted(set(np.nan_to_num(given[item == first], nan=NEVER, posinf=NEVER)))
            told = " and ".join("never" if g == NEVER else f"{g:g}" for g in both)
            raise InputError(
                f"{asker}: item {names[first]} has the cohorts {told}; an item has one, the update "
                "that first held it"
            )
    return cohort


def _refuse_without_base(cohort: np.ndarray, steps: np.ndarray, asker: str) -> None:
    early = np.unique(cohort[cohort <= steps[0]])
    if len(early):
        told = ", ".join(f"{g:g}" for g in early)
        never = " (items that were never trained on have a missing cohort)" if early[0] <= 0 else ""
        raise InputError(
            f"{asker}: cohorts {told} were exposed before the first checkpoint (step {steps[0]}), "
            f"so there is nothing to compare with; add an earlier checkpoint or drop them{never}"
        )


def _initial(cohorts: np.ndarray, steps: np.ndarray, asker: str) -> tuple[int, list[int]]:
    """How many checkpoints to leave out, and the cohorts that then have no base."""
    if steps[0] != 0:
        return 0, []
    if len(steps) == 1:
        raise InputError(f"{asker}: the only checkpoint is step 0; it needs later ones")
    excluded = [int(g) for g in cohorts if g <= steps[1]]
    if excluded and not np.isfinite(cohorts[len(excluded) :]).any():
        told = ", ".join(map(str, excluded))
        raise InputError(
            f"{asker}: cohorts {told} have only the random initialisation (step 0) as base; add a "
            "checkpoint between, or pass exclude_initial=False"
        )
    return 1, excluded


def _clusters(
    table: pd.DataFrame, cluster: str | None, item: np.ndarray, names: np.ndarray, asker: str
) -> Int[np.ndarray, " item"] | None:
    """Which cluster each item is in, numbered by name."""
    if cluster is None:
        return None
    code, clusters = _codes(table[cluster], asker)
    number = np.empty(len(names), dtype=np.int64)
    for part in _parts(len(code)):
        number[item[part]] = code[part]
    for part in _parts(len(code)):
        wrong = np.flatnonzero(number[item[part]] != code[part])
        if len(wrong):
            first = item[part][wrong[0]]
            told = " and ".join(map(str, clusters[np.unique(code[item == first])]))
            raise InputError(
                f"{asker}: item {names[first]} is in {cluster} {told}; an item is in one"
            )
    return number


def _spread_out(
    column: pd.Series,
    place: np.ndarray,
    item: np.ndarray,
    step: np.ndarray,
    names: np.ndarray,
    steps: np.ndarray,
    asker: str,
) -> Float[np.ndarray, "item step"]:
    value = _floats(column, asker)
    infinite = np.flatnonzero(np.isinf(value))
    if len(infinite):
        at = infinite[0]
        raise InputError(
            f"{asker}: item {names[item[at]]} is {value[at]} at step {steps[step[at]]}, and "
            f"{len(infinite)} values are infinite; drop them or score them again"
        )
    outcome = np.full((len(names), len(steps)), np.nan, dtype=value.dtype)
    seen = np.zeros(outcome.shape, dtype=bool)
    for part in _parts(len(value)):
        at = (place[item[part]], step[part])
        outcome[at] = value[part]
        seen[at] = True
    if seen.sum() < len(value):
        at = np.flatnonzero(pd.DataFrame({"item": item, "step": step}).duplicated())[0]
        raise InputError(
            f"{asker}: item {names[item[at]]} has several rows at step {steps[step[at]]}; "
            "needs one per item and step, so select one of their other coordinates"
        )
    return outcome


def _lags(
    table: pd.DataFrame,
    which: np.ndarray,
    item: np.ndarray,
    step: np.ndarray,
    cohorts: np.ndarray,
    steps: np.ndarray,
    asker: str,
) -> tuple[Float[np.ndarray, "group step"], Bool[np.ndarray, "group step"]]:
    """Lag of each (cohort, step), and whether the cohort's last exposure lies behind it."""
    since = steps[None, :] - np.where(np.isinf(cohorts), np.nan, cohorts)[:, None]
    lag = np.where(since >= 0, since, np.nan)
    if "lag" not in table.columns:
        return lag, since >= 0
    which = which[item]
    trained = (since >= 0)[which, step]
    given = _floats(table["lag"], asker)[trained]
    at = (which[trained], step[trained])
    lag = np.full(since.shape, np.nan)
    lag[at] = given
    wrong = np.flatnonzero(~(lag[at] == given))
    if len(wrong):
        group, late = at[0][wrong[0]], at[1][wrong[0]]
        raise InputError(
            f"{asker}: items of cohort {cohorts[group]:g} have no common lag at step "
            f"{steps[late]}; split the items by their schedule, as profile_by does by dose"
        )
    last_seen = steps[None, :] - lag
    final = np.fmax.reduce(last_seen, axis=1, keepdims=True)
    settled = (lag >= 0) & (last_seen == final)
    if "copies" in table.columns and "dose" in table.columns:
        done = (table["copies"] == table["dose"]).to_numpy(dtype=bool, na_value=False)[trained]
        settled = np.zeros(since.shape, dtype=bool)
        settled[at] = done
        if (settled[at] != done).any():
            group = at[0][settled[at] != done][0]
            raise InputError(
                f"{asker}: items of cohort {cohorts[group]:g} differ in dose; use profile_by"
            )
        settled &= lag >= 0
    return lag, settled
