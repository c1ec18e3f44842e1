"""How fast each item is forgotten, with the other items to lean on.

A single item's curve is a few noisy points, and a line through them is mostly noise. The items are
taken as a draw from a population of lines; each item's estimate moves towards the population's as
far as its own points are unsure. statsmodels estimates the population (REML).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import t as student

from workbench.table import InputError, one_metric, rows, validate

LEAST_ITEMS = 5  # below which a spread between items is not worth a name
LEAST_TIMES = 3  # distinct t without which noise is not told from slope
WISHART = 0.5  # weight of log det in the prior, Wishart with two degrees of freedom over its size
LINE = ("param_a", "param_b")


@dataclass(frozen=True)
class Lines:
    """One set of items: ``value = a - b z + noise`` for each, z = log10(t + offset)."""

    value: Float[np.ndarray, " row"]
    z: Float[np.ndarray, " row"]
    item: Int[np.ndarray, " row"]
    names: np.ndarray
    features: Float[np.ndarray, "item feature"]  # centred
    told: tuple[str, ...]  # what the features are called


@dataclass(frozen=True)
class Population:
    """The law of the items: ``(a, b)`` of an item is ``mean`` by its features plus a normal draw."""

    mean: Float[np.ndarray, " effect"]  # a, b at average features, then (a, b) per unit of each
    error: Float[np.ndarray, "effect effect"]  # covariance of the estimates
    between: Float[np.ndarray, "2 2"]
    noise: float  # variance of a point around its item's line


def shrink_forgetting(
    table: pd.DataFrame,
    *,
    x: str = "lag",
    offset: float = 0.0,
    fixed: Sequence[str] = (),
    by: Sequence[str] = ("group",),
    level: float = 0.95,
) -> pd.DataFrame:
    """Each item's semi-log line ``a - b log10(t + offset)``, shrunk towards that of its like.

    A linear mixed model, intercept and slope random by item and correlated (Laird & Ware 1982), by
    restricted maximum likelihood with a prior that keeps the spread of items off 0 (Chung et al.
    2015), at the price of a spread a little too large for few items. An item's estimate is the best
    linear unbiased prediction ``m + W (own - m)``, m what its features predict, own the line through
    its points alone, W the share of own's variance that is not noise: 1 for an item known exactly,
    0 where items do not differ.

    Args:
        table: Item rows of one metric. Rows without a value or without ``x`` are dropped and
            counted in ``.attrs["dropped"]``.
        x: Updates since the last exposure.
        offset: Added to x, so that x = 0 can be used: 1, for instance. 0 is Chang et al.'s line.
        fixed: Columns on which a and b may depend, one value an item: numbers as they are (give
            copies as log2), text as the difference from its first value.
        by: Coordinates that tell sets of items apart, each fitted alone.

    Returns:
        Rows with ``estimate``, and ``law`` semilog: "shrunk" and "alone" per item, metrics
        "param_a" (value at t + offset = 1, in the table's unit) and "param_b" (lost per tenfold; 0:
        nothing is forgotten); "population", item "all", the same for the average item; "effect"
        with ``of`` naming the feature, per unit; and "spread", without intervals: "item_sd" with
        ``of`` param_a or param_b, "correlation" between them, "residual_sd". Intervals are
        Student's with items less features less 1 degrees of freedom; those of items count the error
        of the population's mean but not of its variances, and so hold the truth a little too seldom
        (.92 to .95 in simulations of 12 to 40 items). NaN with a reason: an item alone with fewer
        than two t; all estimates where the model could not be fitted. ``.attrs["shrinkage"]`` says
        by set whether it was.

    Raises:
        InputError: Under 5 items or 3 distinct t, x with the offset not above 0, infinite values,
            a feature that is missing or not one value an item, or several rows per item and x.
    """
    table = validate(table)
    one_metric(table, "shrink_forgetting")
    for name in (x, *by, *fixed):
        if name not in table.columns:
            raise InputError(f"shrink_forgetting: no column {name!r}; there are {', '.join(table)}")
    if not 0 < level < 1:
        raise InputError(f"shrink_forgetting: level is {level}, it must lie between 0 and 1")
    runs = table["run"].astype(str).unique()
    if "run" not in by and len(runs) > 1:
        raise InputError(
            f"shrink_forgetting: needs one run, got {', '.join(runs)}; select one or add run to by"
        )
    usable = table["value"].notna() & table[x].notna()
    seen = table[usable]
    made, says = [], {}
    parts = seen.groupby(list(by), observed=True, sort=False) if by else [((), seen)]
    for values, part in parts:
        where = dict(zip(by, values, strict=True))
        told = ", ".join(f"{name}={value}" for name, value in where.items()) or "the table"
        lines = _lines(part, x, offset, fixed, told)
        population, says[told] = fit_population(lines)
        groups = part["group"].unique()
        common = dict(run=str(part["run"].iloc[0]), step=int(part["step"].max()))
        common |= {"group": str(groups[0]) if len(groups) == 1 else "all"} | where
        made.append(_rows(lines, population, level, says[told], common))
    if not made:
        raise InputError("shrink_forgetting: no row has a value; there is nothing to fit")
    result = validate(pd.concat(made, ignore_index=True))
    result.attrs |= {"shrinkage": says, "dropped": int((~usable).sum())}
    return result


def _lines(part: pd.DataFrame, x: str, offset: float, fixed: Sequence[str], told: str) -> Lines:
    t, value = part[x].to_numpy(float) + offset, part["value"].to_numpy()
    if not (t > 0).all():
        way = "drop such rows or give an offset, such as 1" if offset == 0 else "drop such rows"
        raise InputError(
            f"shrink_forgetting: {told} has {x} {t.min() - offset:g}, where log10({x} + "
            f"{offset:g}) is undefined; {way}"
        )
    if np.isinf(t).any() or np.isinf(value).any():
        raise InputError(f"shrink_forgetting: {told} has infinite values or {x}; drop such rows")
    item, names = pd.factorize(part["item"].astype(str))
    for number, least, what in (
        (len(names), LEAST_ITEMS, "items"),
        (len(np.unique(t)), LEAST_TIMES, f"distinct {x}"),
    ):
        if number < least:
            raise InputError(
                f"shrink_forgetting: {told} has {number} {what}, it needs at least {least}"
            )
    if part.duplicated(["item", x]).any():
        raise InputError(
            f"shrink_forgetting: {told} has items with several rows per {x}; pool them or add the "
            "coordinate that tells them apart to by"
        )
    features, called = _features(part, item, len(names), fixed, told)
    return Lines(value, np.log10(t), item, np.asarray(names), features, called)


def _features(part, item, items: int, fixed: Sequence[str], told: str):
    """What a line may depend on, a column a feature, less its mean over items."""
    columns, called = [], []
    for name in fixed:
        held = part[name].groupby(item).agg(["nunique", "first"])
        if (held["nunique"] != 1).any():
            raise InputError(
                f"shrink_forgetting: {told} has items with none or several values of {name!r}; it "
                "must be known and one an item"
            )
        if pd.api.types.is_numeric_dtype(part[name].dtype):
            found = {name: held["first"].to_numpy(float)}
        else:
            text = held["first"].astype(str).to_numpy()
            first, *others = sorted(set(text))
            found = {f"{name}: {o} - {first}": (text == o).astype(float) for o in others}
        for key, column in found.items():
            columns.append(column - column.mean())
            called.append(key)
    features = np.stack(columns, axis=1) if columns else np.empty((items, 0))
    if np.linalg.matrix_rank(features) < features.shape[1] or items <= 2 + features.shape[1]:
        raise InputError(
            f"shrink_forgetting: {told} cannot tell {', '.join(fixed)} apart: one is constant, or "
            "they go together; leave one out"
        )
    return features, tuple(called)


def _design(lines: Lines, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Random and fixed parts: ``value = random (a, b) = random (mean + features) + noise``."""
    random = np.stack([np.ones_like(z), -z], axis=1)
    scaled = [random * f[lines.item, None] for f in lines.features.T]
    return random, np.concatenate([random, *scaled], axis=1)


def fit_population(lines: Lines) -> tuple[Population | None, str]:
    """Restricted maximum likelihood by statsmodels; None and why where it does not converge.

    Fitted to standardised values and times, where the likelihood is best behaved, and put back. The
    determinant of the items' covariance is kept off 0 by the prior of Chung et al. (2015): a spread
    of exactly 0, or a correlation of exactly 1, is a frequent estimate that leaves nothing unsure;
    without the prior the intervals of items held the truth in .85 of simulations, not in .92.
    """
    # a second of import, and it resets the filters of its own warnings
    from statsmodels.base._penalties import PSD
    from statsmodels.regression.mixed_linear_model import MixedLM, MixedLMParams

    middle, length, unit = lines.z.mean(), lines.z.std(), lines.value.std()
    if unit == 0:
        return None, "all values are equal: there is nothing to fit"
    z, value = (lines.z - middle) / length, lines.value / unit
    random, design = _design(lines, z)
    effects = design.shape[1]
    start = MixedLMParams.from_components(
        fe_params=np.linalg.lstsq(design, value, rcond=None)[0],
        cov_re=_first_guess(lines, z, value),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is read from the result below
        for method in ("bfgs", "powell"):
            try:
                model = MixedLM(value, design, lines.item, exog_re=random)
                found = model.fit(
                    start_params=start, reml=True, cov_pen=PSD(WISHART), method=[method]
                )
            except (np.linalg.LinAlgError, ValueError) as error:
                return None, f"the mixed model could not be fitted: {error}"
            if found.converged:
                break
    between, error = np.asarray(found.cov_re), np.asarray(found.cov_params())[:effects, :effects]
    known = np.isfinite(between).all() and (np.diag(error) > 0).all()
    if not (found.converged and known):
        return None, "the mixed model did not converge"
    # from a - b z in standard times to a at z = 0 and b per unit of z
    back = np.array([[1.0, middle / length], [0.0, 1.0 / length]]) * unit
    every = np.kron(np.eye(1 + lines.features.shape[1]), back)
    population = Population(
        every @ np.asarray(found.fe_params),
        every @ error @ every.T,
        back @ between @ back.T,
        float(found.scale) * unit**2,
    )
    return population, "fitted"


def _first_guess(lines: Lines, z: np.ndarray, value: np.ndarray) -> Float[np.ndarray, "2 2"]:
    """Half the spread of the lines through each item's own points, in units of the noise."""
    own, se, n = _alone(replace(lines, z=z, value=value))
    known = np.isfinite(se[:, 0])
    noise = (se[known, 0] ** 2 * n[known]).sum() / max(1, known.sum())
    if known.sum() < LEAST_ITEMS or not noise > 0:
        return np.eye(2)
    return np.cov(own[known].T) / 2 / noise + 1e-3 * np.eye(2)


def shrunk(
    lines: Lines, population: Population
) -> tuple[Float[np.ndarray, "item 2"], Float[np.ndarray, "item 2 2"]]:
    """Best linear unbiased prediction of each item's (a, b), and the covariance of its error."""
    random, _ = _design(lines, lines.z)
    count = len(lines.names)
    square, moment = np.zeros((count, 2, 2)), np.zeros((count, 2))
    np.add.at(square, lines.item, random[:, :, None] * random[:, None, :])
    np.add.at(moment, lines.item, random * lines.value[:, None])
    # F of each item: its expected (a, b) is F @ mean
    expect = np.concatenate(
        [np.eye(2)[None].repeat(count, axis=0)]
        + [f[:, None, None] * np.eye(2) for f in lines.features.T],
        axis=2,
    )
    mean = expect @ population.mean
    # G Z'V^-1 Z with V = Z G Z' + noise, without an inverse of G, which may be singular
    own = population.between @ square / population.noise
    kept = np.linalg.solve(np.eye(2) + own, np.eye(2)[None].repeat(count, axis=0))
    share = np.eye(2) - kept
    rest = moment - np.einsum("iab,ib->ia", square, mean)
    gain = kept @ population.between / population.noise
    value = mean + np.einsum("iab,ib->ia", gain, rest)
    carried = (np.eye(2) - share) @ expect
    error = kept @ population.between + carried @ population.error @ np.swapaxes(carried, 1, 2)
    return value, error


def _alone(lines: Lines) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares through each item's own points, its standard errors, and its points."""
    count = len(lines.names)
    n = np.bincount(lines.item, minlength=count)
    mean_z = np.bincount(lines.item, lines.z, count) / n
    mean = np.bincount(lines.item, lines.value, count) / n
    z, y = lines.z - mean_z[lines.item], lines.value - mean[lines.item]
    square = np.bincount(lines.item, z**2, count)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.bincount(lines.item, z * y, count) / np.where(square > 0, square, np.nan)
        left = y - slope[lines.item] * z
        noise = np.bincount(lines.item, left**2, count) / np.where(n > 2, n - 2, np.nan)
        se = np.sqrt(np.stack([noise * (1 / n + mean_z**2 / square), noise / square], axis=1))
    return np.stack([mean - slope * mean_z, -slope], axis=1), se, n


def _rows(
    lines: Lines, population: Population | None, level: float, says: str, common: dict
) -> pd.DataFrame:
    count, features = lines.features.shape
    half = student.ppf((1 + level) / 2, count - features - 1)
    own, own_se, n = _alone(lines)
    known = population is not None
    if known:
        line, error = shrunk(lines, population)
        line_se = np.sqrt(np.einsum("iaa->ia", error))
        mean, mean_se = population.mean, np.sqrt(np.diag(population.error))
        sd = np.sqrt(np.diag(population.between).clip(0))
        noise = np.sqrt(population.noise)
        differ = (sd > 0).all()
        both = population.between[0, 1] / (sd[0] * sd[1]) if differ else np.nan
    else:
        line, line_se = np.full((2, count, 2), np.nan)
        mean, mean_se = np.full((2, 2 + 2 * features), np.nan)
        sd, noise, both, differ = np.full(2, np.nan), np.nan, np.nan, True
    why = "" if known else says
    made = []

    def add(metric, value, *, estimate, of="", item="all", se=np.nan, n=count, reason=why, t=half):
        beside = {"estimate": estimate, "of": of, "se": se, "reason": reason, "law": "semilog"}
        extra = {
            name: held for name, held in common.items() if name not in ("run", "step", "group")
        }
        told = {name: common[name] for name in ("run", "step", "group")}
        made.append(
            rows(metric, value, item=item, lo=value - t * se, hi=value + t * se, n=n,
                 beside=beside | extra, **told)
        )  # fmt: skip

    few = np.where(np.isnan(own[:, 0]), "fewer than two t: no line", "")
    few = np.where((few == "") & np.isnan(own_se[:, 0]), "two points: no error", few)
    own_half = student.ppf((1 + level) / 2, np.maximum(n - 2, 1))
    for column, metric in enumerate(LINE):
        mine = dict(item=lines.names, n=n)
        add(metric, line[:, column], estimate="shrunk", se=line_se[:, column], **mine)
        add(metric, own[:, column], estimate="alone", se=own_se[:, column], **mine,
            reason=few, t=own_half)  # fmt: skip
    for place, (value, se) in enumerate(zip(mean, mean_se, strict=True)):
        estimate = "population" if place < 2 else "effect"
        of = "" if place < 2 else lines.told[place // 2 - 1]
        add(LINE[place % 2], value, estimate=estimate, of=of, se=se)
    for metric, value in zip(LINE, sd, strict=True):
        add("item_sd", value, estimate="spread", of=metric)
    add("correlation", both, estimate="spread", of="param_a, param_b",
        reason=why or ("" if differ else "items do not differ in one of them"))  # fmt: skip
    add("residual_sd", noise, estimate="spread", n=len(lines.value))
    return pd.concat(made, ignore_index=True)
