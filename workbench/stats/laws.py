"""Forgetting laws: which curve memory follows as updates pass since the last exposure.

Each law is a few lines of mathematics below, with its derivatives, its half-life and its source.
All are fitted by weighted least squares, by Levenberg-Marquardt steps taken for many curves at
once: all groups and all starts of their fits, or the resampled curves behind a band, are one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from workbench.stats.summarise import percentile_tail
from workbench.table import InputError, one_metric, rows, validate

LEAST_POINTS = 5  # distinct t below which no law is told from another
LEAST_SPAN = 10.0  # largest over smallest positive t
GRID = 60  # points of a fitted curve
STARTS = 24  # of a fit, which go FEW_STEPS of Levenberg-Marquardt
FEW_STEPS = 12
FINALISTS = 4  # the best of them, which go STEPS
STEPS = 200
SETTLED = 1e-12  # relative gain of a step at which a fit has converged
REDRAWS = 50  # of resamples without any item at some t
ALIKE = 1e-10  # relative size of what is left of a curve's part that others make up
BATCH = 1_000_000  # numbers in one temporary array
NO_INTERVAL = ("aicc", "rmse", "rmse_holdout")  # metrics that never have one
Curve = Callable[..., np.ndarray]


# --- the laws -------------------------------------------------------------------------------------


def exponential(t, a, s):
    """``a e^(-t/s)``: a constant share is lost per update."""
    return a * np.exp(-t / s)


def exponential_slopes(t, a, s):
    """Derivatives of :func:`exponential` by its parameters, in their order."""
    left = np.exp(-t / s)
    return left, a * left * t / s**2


def exponential_floor(t, a, s, c):
    """``a e^(-t/s) + c``: exponential down to what is never lost."""
    return a * np.exp(-t / s) + c


def exponential_floor_slopes(t, a, s, c):
    """Derivatives of :func:`exponential_floor` by its parameters, in their order."""
    return *exponential_slopes(t, a, s), np.ones_like(t / s)


def power(t, a, b, p):
    """``a (1 + b t)^-p``, Wixted & Carpenter (2007): a=b=1, p=.5, t=3 gives .5."""
    return a * (1 + b * t) ** -p


def power_slopes(t, a, b, p):
    """Derivatives of :func:`power` by its parameters, in their order."""
    left = (1 + b * t) ** -p
    return left, -a * p * t * left / (1 + b * t), -a * left * np.log1p(b * t)


def wickelgren(t, a, b, p, q):
    """``a (1 + b t)^-p e^(-q t)``, Wickelgren (1974): power forgetting and interference."""
    return power(t, a, b, p) * np.exp(-q * t)


def wickelgren_slopes(t, a, b, p, q):
    """Derivatives of :func:`wickelgren` by its parameters, in their order."""
    left = np.exp(-q * t)
    by_a, by_b, by_p = power_slopes(t, a, b, p)
    return by_a * left, by_b * left, by_p * left, -t * wickelgren(t, a, b, p, q)


def logarithm(t, a, b, s):
    """``a - b ln(1 + t/s)``: defined at t = 0; falls below 0 in the end."""
    return a - b * np.log1p(t / s)


def logarithm_slopes(t, a, b, s):
    """Derivatives of :func:`logarithm` by its parameters, in their order."""
    return np.ones_like(t / s), -np.log1p(t / s) + 0 * b, b * t / (s * (s + t))


def semilog(t, a, b):
    """``a - b log10 t``, Chang et al. (2024): a is the value at t = 1; undefined at 0."""
    return a - b * np.log10(t)


def semilog_slopes(t, a, b):
    """Derivatives of :func:`semilog` by its parameters, in their order."""
    return np.ones_like(t + a), -np.log10(t) + 0 * b


def ebbinghaus_savings(t, a, k, c):
    """``a k / ((log10 t)^c + k)``, Ebbinghaus (1885), a = 100 %; for t >= 1, where it is a.

    k = 1.84, c = 1.25, t = 10 gives 64.78873.
    """
    return a * k / (np.log10(t) ** c + k)


def ebbinghaus_savings_slopes(t, a, k, c):
    """Derivatives of :func:`ebbinghaus_savings` by its parameters, in their order."""
    log = np.log10(t)
    past = log**c
    below = past + k
    # x^c ln x goes to 0 with x
    by_c = np.where(log > 0, past * np.log(np.where(log > 0, log, 1.0)), 0.0)
    return k / below, a * past / below**2, -a * k * by_c / below**2


def shifted_power(t, a, s, p, c):
    """``a (t + s)^p + c``, Kalajdzievski (2024); a < 0 where memory falls."""
    return a * (t + s) ** p + c


def shifted_power_slopes(t, a, s, p, c):
    """Derivatives of :func:`shifted_power` by its parameters, in their order."""
    raised = (t + s) ** p
    return raised, a * p * raised / (t + s), a * raised * np.log(t + s), np.ones_like(raised)


# Half-life: the time at which the curve is down to half of r(0), or of r(1) where r(0) is infinite;
# inf where it never is.


def exponential_half(a, s):
    """The t at which half of r(0) of :func:`exponential` is left; inf where never."""
    return s * np.log(2) + 0 * a


def exponential_floor_half(a, s, c):
    """The t at which half of r(0) of :func:`exponential_floor` is left; inf where never."""
    left = (a - c) / (2 * a)  # of the part above the floor
    return np.where((a > 0) & (left > 0), -s * np.log(np.where(left > 0, left, 1.0)), np.inf)


def power_half(a, b, p):
    """The t at which half of r(0) of :func:`power` is left; inf where never."""
    return np.expm1(np.log(2) / p) / b + 0 * a


def wickelgren_half(a, b, p, q):
    """The t at which half of r(0) of :func:`wickelgren` is left; inf where never."""
    high = np.minimum(power_half(a, b, p), np.log(2) / q)  # each factor alone is slower
    low = np.zeros_like(high)
    for _ in range(100):
        middle = (low + high) / 2
        early = p * np.log1p(b * middle) + q * middle < np.log(2)
        low, high = np.where(early, middle, low), np.where(early, high, middle)
    return (low + high) / 2


def logarithm_half(a, b, s):
    """The t at which half of r(0) of :func:`logarithm` is left; inf where never."""
    return np.where(b > 0, s * np.expm1(a / (2 * np.where(b > 0, b, 1.0))), np.inf)


def semilog_half(a, b):
    """The t at which half of r(1) of :func:`semilog` is left; inf where never."""
    return np.where(b > 0, 10 ** (a / (2 * np.where(b > 0, b, 1.0))), np.inf)


def ebbinghaus_savings_half(a, k, c):
    """The t at which half of r(1) of :func:`ebbinghaus_savings` is left; inf where never."""
    return 10 ** (k ** (1 / c)) + 0 * a


def shifted_power_half(a, s, p, c):
    """The t at which half of r(0) of :func:`shifted_power` is left; inf where never."""
    level = ((a * s**p + c) / 2 - c) / np.where(a < 0, a, -1.0)
    return np.where((a < 0) & (level > 0), np.abs(level) ** (1 / p) - s, np.inf)


@dataclass(frozen=True)
class Parameter:
    """What a parameter of a law means, and the range it is fitted in.

    A ``bounds`` gives the range from the smallest positive and the largest t, wide enough that a
    law at its bound is indistinguishable from its limit; None: any number, positive or negative.
    """

    meaning: str
    bounds: Callable[[float, float], tuple[float, float]] | None = None


@dataclass(frozen=True)
class Law:
    """A curve, its derivatives and half-life, its parameters in the order the curve takes them.

    The curve is linear in the parameters without bounds (shapes given, they are solved for); the
    others are shapes, positive, and move as logarithms.
    """

    formula: str
    source: str
    curve: Curve
    slopes: Curve
    half: Curve
    parameters: dict[str, Parameter]
    first: float = 0.0  # smallest t at which it is defined; 0 is excluded if above 0
    start: float = 0.0  # the t whose value the half-life halves

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(self.parameters)

    @property
    def is_shape(self) -> Bool[np.ndarray, " param"]:
        return np.array([each.bounds is not None for each in self.parameters.values()])


def _time(first, last):
    return first / 100, last * 1e4


def _rate(first, last):
    return 1e-4 / last, 1e4 / first


def _between(low, high):
    return lambda first, last: (low, high)


RUBIN = "Wixted & Ebbesen (1991), On the form of forgetting"
LAWS: dict[str, Law] = {
    "exponential": Law(
        "a e^(−t/s)",
        RUBIN,
        exponential,
        exponential_slopes,
        exponential_half,
        {
            "a": Parameter("value at t = 0"),
            "s": Parameter("updates after which 1/e is left", _time),
        },
    ),
    "exponential_floor": Law(
        "a e^(−t/s) + c",
        "Rubin, Hinton & Wenzel (1999), The precise time course of retention",
        exponential_floor,
        exponential_floor_slopes,
        exponential_floor_half,
        {
            "a": Parameter("what will be lost; the value at t = 0 is a + c"),
            "s": Parameter("updates after which 1/e of a is left", _time),
            "c": Parameter("what is never lost"),
        },
    ),
    "power": Law(
        "a (1 + b t)^−p",
        "Wixted & Carpenter (2007), The Wickelgren power law and the Ebbinghaus savings function",
        power,
        power_slopes,
        power_half,
        {
            "a": Parameter("value at t = 0"),
            "b": Parameter("per update; the fall begins at about t = 1/b", _rate),
            "p": Parameter("steepness, in log value over log t", _between(1e-3, 1e2)),
        },
    ),
    "wickelgren": Law(
        "a (1 + b t)^−p e^(−q t)",
        "Wickelgren (1974), Single-trace fragility theory of memory dynamics",
        wickelgren,
        wickelgren_slopes,
        wickelgren_half,
        {
            "a": Parameter("value at t = 0"),
            "b": Parameter("per update; the fall begins at about t = 1/b", _rate),
            "p": Parameter("steepness of the power part", _between(1e-3, 1e2)),
            "q": Parameter("share lost per update by interference", _rate),
        },
    ),
    "logarithm": Law(
        "a − b ln(1 + t/s)",
        RUBIN,
        logarithm,
        logarithm_slopes,
        logarithm_half,
        {
            "a": Parameter("value at t = 0"),
            "b": Parameter("lost per e-fold of t, once t is beyond s"),
            "s": Parameter("updates before the fall begins", _time),
        },
    ),
    "semilog": Law(
        "a − b log10 t",
        "Chang et al. (2024), How do LLMs acquire factual knowledge during pretraining?",
        semilog,
        semilog_slopes,
        semilog_half,
        {
            "a": Parameter("value at t = 1"),
            "b": Parameter("lost per tenfold of t: the decay constant"),
        },
        first=1e-300,
        start=1.0,
    ),
    "ebbinghaus_savings": Law(
        "a k / ((log10 t)^c + k)",
        "Ebbinghaus (1885), Über das Gedächtnis",
        ebbinghaus_savings,
        ebbinghaus_savings_slopes,
        ebbinghaus_savings_half,
        {
            "a": Parameter("value at t = 1"),
            "k": Parameter("half is left where (log10 t)^c = k", _between(1e-4, 1e4)),
            "c": Parameter("steepness of the fall in log10 t", _between(0.05, 20)),
        },
        first=1.0,
        start=1.0,
    ),
    "shifted_power": Law(
        "a (t + s)^p + c",
        "Kalajdzievski (2024), Scaling laws for forgetting when fine-tuning LLMs",
        shifted_power,
        shifted_power_slopes,
        shifted_power_half,
        {
            "a": Parameter("size of the change; negative where memory falls"),
            "s": Parameter("updates before the change begins", _time),
            "p": Parameter("how the change bends; as log t where p is small", _between(1e-2, 3)),
            "c": Parameter("value that t = −s would have"),
        },
    ),
}  # fmt: skip
DEFAULT_LAWS = ("exponential", "exponential_floor", "power", "wickelgren", "logarithm", "semilog")


def describe_laws(*, first: float = 1.0, last: float = 1000.0) -> pd.DataFrame:
    """Every law's formula and source, and its parameters with their meaning and range.

    Args:
        first, last: Smallest positive and largest t of the data to be fitted, which set the ranges.

    Returns:
        A frame (not the one table) with ``law``, ``formula``, ``parameter``, ``meaning``, ``low``,
        ``high`` and ``source``, a row a parameter.

    Raises:
        InputError: If ``first`` is not above 0 or ``last`` not above ``first``.
    """
    if not 0 < first < last:
        raise InputError(f"describe_laws: needs 0 < first < last, got {first:g} and {last:g}")
    made = []
    for name, law in LAWS.items():
        for key, each in law.parameters.items():
            low, high = each.bounds(first, last) if each.bounds else (-np.inf, np.inf)
            made.append((name, law.formula, key, each.meaning, low, high, law.source))
    columns = ["law", "formula", "parameter", "meaning", "low", "high", "source"]
    return pd.DataFrame(made, columns=columns)


# --- table to table -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Points:
    """One forgetting curve, and the same curve resampled."""

    t: Float[np.ndarray, " t"]
    value: Float[np.ndarray, " t"]
    weight: Float[np.ndarray, " t"]
    n: np.ndarray
    again: Float[np.ndarray, "draw t"]  # no rows where nothing can be resampled
    again_weight: Float[np.ndarray, "draw t"]  # 0 where no resampled item was seen at t
    items: int  # that were resampled; 0 where none were
    how: str


def fit_forgetting(
    table: pd.DataFrame,
    *,
    x: str = "lag",
    laws: Sequence[str] | None = None,
    draws: int = 200,
    holdout: float = 0.2,
    level: float = 0.95,
    seed: int = 0,
    by: Sequence[str] = ("group",),
) -> pd.DataFrame:
    """Fit and compare forgetting laws, one set per combination of ``by``.

    A mean of curves need not follow the law of its items: exponentials of different speed average
    to something close to a power (Anderson & Tweney 1997). :func:`shrink_forgetting` looks at
    items.

    Weights take the errors of the points as independent. Where an item's errors last from one time
    to the next (correlation .7), they are too sure: in simulation the true law then weighs below
    .05 in 10 % of curves, not in 2 %. Bands and half-lives resample items, and cover all the same.

    Args:
        table: One metric. Item rows (several items per t), or pooled rows, one per t. Points weigh
            ``1 / se^2`` where there is a column ``se``, else item means weigh as their number of
            items. Rows without a value or without ``x`` are dropped and counted in
            ``.attrs["dropped"]``.
        x: Updates since the last exposure, t >= 0.
        laws: Keys of :data:`LAWS` (:func:`describe_laws` explains them and their parameters); None
            takes all but Ebbinghaus's savings and the shifted power.
        draws: Resampled curves behind the intervals: of items where there are item rows; else
            independent normal errors of size ``se`` around the points; none without either.
            ``.attrs["bootstrap"]`` says which. Intervals are percentiles of the refitted curves,
            widened for few items as Student's t is (the expanded percentile of Hesterberg 2015). In
            simulation 40 and 12 items cover .95, 5 about .91.
        holdout: Share of the points, the last ones, predicted from a fit to the others.
        by: Coordinates that tell curves apart; ``run`` must be among them if there are several.

    Returns:
        Rows with the coordinate ``law``: "aicc" (error variance estimated, so it counts as a
        parameter), "weight" (Akaike, over the laws fitted to all points; 1 / laws at no
        preference; its interval is that of the resampled curves' weights), "half_life" in units of x until half of the fitted r(0) is left (of r(1) for
        semilog and Ebbinghaus; inf where never; a reason says where it is extrapolated), for
        semilog "learnability_threshold" (t at which the line reaches 0: a text met less often than
        that cannot accumulate, Chang et al. 2024; NaN where the line does not fall), "rmse",
        "rmse_holdout", "param_*"; and with the coordinate ``x``: "fitted" with its pointwise band
        and "residual". NaN comes with a reason.

    Raises:
        InputError: Under 5 distinct t, less than one decade of t, negative or infinite t, infinite
            values or such as the metric cannot have, unknown laws, several rows per t without
            items, or standard errors that are missing here and there.
    """
    laws = _checked_laws(laws, draws=draws, holdout=holdout, level=level)
    places, curves, how, dropped = _curves(table, x, by, draws, seed)
    fits = {name: fit_law(curves, name, holdout=holdout) for name in laws}
    result = _rows(places, curves, fits, level, x)
    result.attrs |= {"bootstrap": how, "dropped": dropped}
    return result


def _curves(
    table: pd.DataFrame,
    x: str,
    by: Sequence[str],
    draws: int,
    seed: int,
    asker: str = "fit_forgetting",
) -> tuple[list[dict], list[Points], dict[str, str], int]:
    """The curves of a table, where they were measured, how they are resampled, and rows dropped."""
    table = validate(table)
    one_metric(table, asker)
    for name in (x, *by):
        if name not in table.columns:
            raise InputError(f"{asker}: no column {name!r}; there are {', '.join(table)}")
    usable = table["value"].notna() & table[x].notna()
    runs = table["run"].astype(str).unique()
    if "run" not in by and len(runs) > 1:
        raise InputError(
            f"{asker}: needs one run, got {', '.join(runs)}; select one or add run to by"
        )
    seen = table[usable]
    parts = seen.groupby(list(by), observed=True, sort=False) if by else [((), seen)]
    places, curves, how = [], [], {}
    for values, part in parts:
        if part.empty:
            continue
        where = dict(zip(by, values, strict=True))
        told = ", ".join(f"{name}={value}" for name, value in where.items()) or "the table"
        curves.append(_points(part, x, told, draws, seed, asker))
        how[told] = curves[-1].how
        common = dict(run=str(part["run"].iloc[0]), step=int(part["step"].max()))
        places.append(common | {"group": _single(part["group"])} | where)
    if not curves:
        raise InputError(f"{asker}: no row has a value; there is nothing to fit")
    return places, curves, how, int((~usable).sum())


def early_loss(
    table: pd.DataFrame,
    *,
    split: float = 10.0,
    x: str = "lag",
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    by: Sequence[str] = ("group",),
) -> pd.DataFrame:
    """How much of what is lost is lost at once, and how fast the rest goes.

    With r the mean curve: ``(r(first) - r(split)) / (r(first) - r(last))``, and the loss per tenfold
    of ``1 + t``, the slope of a line through the points up to the split and of one through the
    points from the split on. A curve that is linear in log time throughout has equal slopes.

    Args:
        table, x, draws, level, seed, by: As for :func:`fit_forgetting`, intervals included.
        split: Where the curve is cut; there must be points at it or near: the last at or before it
            ends the first part and begins the second.

    Returns:
        Rows of "early_share" (0: none of the loss came by the split, 1: all of it; above 1 where
        the curve has risen since; NaN with a reason where nothing was lost) and of "decade_loss"
        (in the table's unit; 0: nothing is forgotten), with the coordinate ``part`` telling
        "whole", "early" or "late".

    Raises:
        InputError: As :func:`fit_forgetting`, and under 2 points up to the split or 3 from it on.
    """
    _checked_laws(None, draws=draws, holdout=0.5, level=level, asker="early_loss")
    places, curves, how, dropped = _curves(table, x, by, draws, seed, "early_loss")
    made = []
    for place, points in zip(places, curves, strict=True):
        early, told = points.t <= split, ", ".join(f"{k}={place[k]}" for k in by) or "the table"
        cut = int(early.sum()) - 1
        late = np.arange(len(early)) >= cut
        if early.sum() < 2 or late.sum() < 3:
            raise InputError(
                f"early_loss: {told} has {early.sum()} {x} up to {split:g} and {late.sum()} from "
                "there on, it needs 2 and 3; choose another split"
            )
        tail, nothing = percentile_tail(points.items, level), points.value[0] <= points.value[-1]
        found = []
        for value, weight in (
            (points.value[None], points.weight[None]),
            (points.again, points.again_weight),
        ):
            # a resample may hold no item seen at some t, however often it was drawn again
            value, z = np.where(weight > 0, value, np.nan), np.log10(1 + points.t)
            with np.errstate(divide="ignore", invalid="ignore"):
                lost = value[:, 0] - value[:, -1]
                share = np.where(lost > 0, (value[:, 0] - value[:, cut]) / lost, np.nan)
            slopes = [_fall(z[p], value[:, p], weight[:, p]) for p in (early, late)]
            found.append(np.stack([share, *slopes], axis=1))
        low, high = _interval(found[1], tail)
        reason = ""
        if len(points.again) and np.isnan(low[0]):
            reason = "no interval: in some resampled curves nothing was lost"
        reason = "nothing was lost" if nothing else reason
        one = "one item: no interval" if points.how == "none: one item" else ""
        here = {key: value for key, value in place.items() if key not in ("run", "step", "group")}
        here |= {"part": ["whole", "early", "late"], "reason": [reason or one, one, one]}
        common = {key: place[key] for key in ("run", "step", "group")}
        n = [len(early), int(early.sum()), int(late.sum())]
        block = rows("decade_loss", found[0][0], lo=low, hi=high, n=n, beside=here, **common)
        made.append(block.assign(metric=["early_share", "decade_loss", "decade_loss"]))
    result = validate(pd.concat(made, ignore_index=True))
    result.attrs |= {"bootstrap": how, "dropped": dropped}
    return result


def _fall(
    z: Float[np.ndarray, " t"],
    value: Float[np.ndarray, "curve t"],
    weight: Float[np.ndarray, "curve t"],
) -> Float[np.ndarray, " curve"]:
    """Slope of the weighted least squares line, downwards positive."""
    share = weight / weight.sum(axis=1, keepdims=True)
    away = z - (share * z).sum(axis=1, keepdims=True)
    return -(share * away * value).sum(axis=1) / (share * away**2).sum(axis=1)


def _single(column: pd.Series) -> str:
    held = column.unique()
    return str(held[0]) if len(held) == 1 else "all"


def _checked_laws(
    laws, *, draws: int, holdout: float, level: float, asker: str = "fit_forgetting"
) -> tuple[str, ...]:
    laws = DEFAULT_LAWS if laws is None else tuple(laws)
    if not laws:
        raise InputError(f"{asker}: laws is empty; there are {', '.join(LAWS)}")
    for name in laws:
        if name not in LAWS:
            raise InputError(f"{asker}: no law {name!r}; there are {', '.join(LAWS)}")
    if draws < 0:
        raise InputError(f"{asker}: draws is {draws}, it must be at least 0")
    for name, number in (("holdout", holdout), ("level", level)):
        if not 0 < number < 1:
            raise InputError(f"{asker}: {name} is {number}, it must lie between 0 and 1")
    return laws


def _points(
    part: pd.DataFrame, x: str, told: str, draws: int, seed: int, asker: str = "fit_forgetting"
) -> Points:
    """Mean curve of a group, its weights, and its resampled copies."""
    t, at = np.unique(part[x].to_numpy(float), return_inverse=True)
    _refuse_short(t, x, told, asker)
    value = part["value"].to_numpy()
    if np.isinf(value).any():
        first = np.flatnonzero(np.isinf(value))[0]
        raise InputError(
            f"{asker}: {told} has the value {value[first]} at {x} {t[at[first]]:g}; no curve "
            "goes through it, so drop the row"
        )
    rng = np.random.default_rng(seed)
    item, names = pd.factorize(part["item"])
    if len(names) > 1:
        if len(np.unique(item * len(t) + at)) < len(part):
            raise InputError(
                f"{asker}: {told} has items with several rows per {x}; pool them or add "
                "the coordinate that tells them apart to by"
            )
        return _item_points(t, at, item, value, draws, rng)
    if len(at) > len(t):
        raise InputError(
            f"{asker}: {told} has several rows of one item per {x}; pool them or add "
            "the coordinate that tells them apart to by"
        )
    order = np.argsort(at)
    value, n = value[order], part["n"].to_numpy()[order]
    error = part["se"].to_numpy()[order] if "se" in part.columns else np.full(len(t), np.nan)
    if np.isnan(error).all():
        one = names[0] != "all"
        how = "none: one item" if one else "none: pooled rows without se"
        nothing = np.empty((0, len(t)))
        return Points(t, value, np.ones(len(t)), n, nothing, nothing, 0, how)
    bad = ~(error > 0) | np.isinf(error)
    if bad.any():
        raise InputError(
            f"{asker}: {told} has se {error[bad][0]} at {x} {t[bad][0]:g}; every weight "
            "needs a positive se, so drop the row or the column"
        )
    again = value + error * rng.standard_normal((draws, len(t)))
    how = "parametric: normal errors of size se, independent between points"
    weight = 1 / error**2
    return Points(t, value, weight, n, again, np.broadcast_to(weight, again.shape), 0, how)


def _item_points(t, at, item, value, draws: int, rng: np.random.Generator) -> Points:
    """Means over items at each t, and means over items drawn again."""
    items = int(item.max()) + 1
    panel, seen = np.zeros((items, len(t))), np.zeros((items, len(t)))
    panel[item, at], seen[item, at] = value, 1.0
    n = seen.sum(axis=0)
    even = np.full(items, 1 / items)
    times = rng.multinomial(items, even, size=draws)
    for _ in range(REDRAWS):  # a curve with a hole is no curve like the one measured
        holes = ((times @ seen) == 0).any(axis=1)
        if not holes.any():
            break
        times[holes] = rng.multinomial(items, even, size=int(holes.sum()))
    held = times @ seen
    again = times @ panel / np.maximum(held, 1)
    return Points(t, panel.sum(axis=0) / n, n, n.astype(int), again, held, items, "items")


def _refuse_short(t: np.ndarray, x: str, told: str, asker: str) -> None:
    if t[0] < 0:
        raise InputError(
            f"{asker}: {told} has {x} {t[0]:g}; laws are of time since the last exposure, "
            "so keep rows of 0 and above"
        )
    if np.isinf(t[-1]):
        raise InputError(f"{asker}: {told} has {x} inf; drop such rows")
    if len(t) < LEAST_POINTS:
        raise InputError(
            f"{asker}: {told} has {len(t)} distinct {x}, it needs at least {LEAST_POINTS}; "
            "probe at more checkpoints"
        )
    first = t[t > 0][0]
    if t[-1] / first < LEAST_SPAN:
        raise InputError(
            f"{asker}: {told} has {x} from {first:g} to {t[-1]:g}, less than one decade; "
            "the laws cannot be told apart there, so probe later"
        )


# --- fitting --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A law's parameters, those of the resampled curves, and how well it does."""

    name: str
    params: Float[np.ndarray, " param"]
    again: Float[np.ndarray, "draw param"]
    used: np.ndarray  # points at which the law is defined
    aicc: float
    again_aicc: Float[np.ndarray, " draw"]
    rmse: float
    rmse_holdout: float
    reason: dict[str, str]


def fit_law(curves: Sequence[Points], name: str, *, holdout: float) -> list[Fit]:
    """Fit one law to all curves at once and to their resampled copies, from the best of many starts."""
    law = LAWS[name]
    used = [points.t >= law.first for points in curves]
    t = _padded([points.t[u] for points, u in zip(curves, used, strict=True)], "edge")
    value = _padded([points.value[u] for points, u in zip(curves, used, strict=True)])
    weight = _padded([points.weight[u] for points, u in zip(curves, used, strict=True)])
    ahead = np.zeros(weight.shape, dtype=bool)
    for row, u in enumerate(used):
        size = int(u.sum())
        ahead[row, size - max(1, round(holdout * size)) : size] = True
    params = best_fit(law, t, value, weight)
    early = best_fit(law, t, value, np.where(ahead, 0.0, weight))
    error = value - law.curve(t, *params.T[:, :, None])
    error_ahead = value - law.curve(t, *early.T[:, :, None])
    found = []
    for row, (points, u) in enumerate(zip(curves, used, strict=True)):
        size, count, reason = len(law.order), int(u.sum()), {}
        draws = len(points.again)
        if count < size:
            reason["all"] = f"{count} points for {size} parameters"
            nothing, nowhere = np.full(size, np.nan), np.full((draws, size), np.nan)
            never = np.full(draws, np.nan)
            found.append(Fit(name, nothing, nowhere, u, np.nan, never, np.nan, np.nan, reason))
            continue
        again, again_error = _refitted(law, points, u, params[row])
        mine, scale = error[row, :count], np.abs(points.value[u]).max()
        aicc = float(corrected_akaike(mine[None], points.weight[u][None], size, scale)[0])
        again_aicc = corrected_akaike(again_error, points.again_weight[:, u], size, scale)
        why = "all values are 0" if np.isnan(aicc) else ""
        if count <= size + 2:
            why = f"{count} points are too few for {size} parameters and an error variance"
        if not u.all():
            aicc, why = (
                np.nan,
                "undefined at the smallest t, so not fitted to all points; drop them",
            )
            again_aicc = np.full(draws, np.nan)
        if why:
            reason["aicc"] = why
        kept = count - int(ahead[row].sum())
        last = np.sqrt(np.mean(error_ahead[row][ahead[row]] ** 2))
        if kept <= size:
            reason["rmse_holdout"] = f"{kept} points before the held-out ones for {size} parameters"
            last = np.nan
        rmse = float(np.sqrt(np.mean(mine**2)))
        found.append(Fit(name, params[row], again, u, aicc, again_aicc, rmse, float(last), reason))
    return found


def _padded(arrays: Sequence[np.ndarray], mode: str = "constant") -> Float[np.ndarray, "curve t"]:
    """Rows of unequal length as one array; what is added repeats the last number or is 0."""
    long = max(len(each) for each in arrays)
    return np.stack(
        [np.pad(a, (0, long - len(a)), mode=mode) if len(a) else np.zeros(long) for a in arrays]
    )


def _refitted(law: Law, points: Points, used: np.ndarray, params: np.ndarray):
    """Parameters and errors of the resampled curves, each fitted from the parameters of the curve."""
    again, weight = points.again[:, used], points.again_weight[:, used]
    if not len(again):
        return np.empty((0, len(params))), again
    t = np.broadcast_to(points.t[used], again.shape)
    limits = _limits(law, t[:1], np.ones((1, t.shape[1])))
    start = np.repeat(params[None], len(again), axis=0)
    fitted, _ = descend(law, t, again, weight, start, limits=limits)
    return fitted, again - law.curve(t, *fitted.T[:, :, None])


def corrected_akaike(
    error: Float[np.ndarray, "curve t"],
    weight: Float[np.ndarray, "curve t"],
    params: int,
    scale: float,
) -> Float[np.ndarray, " curve"]:
    """AICc with the error variance estimated; points of weight 0 do not count.

    ``n ln(sum w e^2 / n) + 2K + 2K(K + 1)/(n - K - 1)``, weights scaled to mean log 0, and K one
    more than the curve's parameters (Burnham & Anderson 2002, section 2.4); lower is better.
    Errors below the rounding of the values, whose size is ``scale``, count as rounding, so that an
    exact fit has a value. NaN where n is at most K + 1 or all is 0.
    """
    k, counts = params + 1, weight > 0
    n = counts.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = np.exp(np.log(np.where(counts, weight, 1.0)).sum(axis=1) / n)
        spread = (weight * error**2).sum(axis=1) / middle / n
        spread = np.maximum(spread, (np.finfo(float).eps * scale) ** 2)
        aicc = n * np.log(spread) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
    return np.where((n > k + 1) & (spread > 0), aicc, np.nan)


def best_fit(
    law: Law,
    t: Float[np.ndarray, "curve t"],
    value: Float[np.ndarray, "curve t"],
    weight: Float[np.ndarray, "curve t"],
) -> Float[np.ndarray, "curve param"]:
    """The least weighted squares from the best starts of a grid over the shape parameters.

    Points of weight 0 do not count, nor for the range of the shapes. All starts go a few steps,
    the best of them to the end.
    """
    starts = _starts(law, t, value, weight)
    for steps, kept in ((FEW_STEPS, FINALISTS), (STEPS, 1)):
        each = starts.shape[1]
        many = [np.repeat(a, each, axis=0) for a in (t, value, weight)]
        flat = starts.reshape(-1, starts.shape[2])
        params, loss = descend(law, *many, flat, steps=steps)
        order = np.argsort(loss.reshape(-1, each), axis=1)[:, :kept]
        starts = np.take_along_axis(params.reshape(starts.shape), order[:, :, None], axis=1)
    return starts[:, 0]


def _limits(
    law: Law, t: Float[np.ndarray, "curve t"], weight: Float[np.ndarray, "curve t"]
) -> tuple[Float[np.ndarray, "curve shape"], Float[np.ndarray, "curve shape"]]:
    """Logarithms of the range of each shape, from the points that count."""
    counts = (t > 0) & (weight > 0)
    first = np.where(counts, t, np.inf).min(axis=1)
    last = np.where(counts, t, 0.0).max(axis=1)
    known = counts.any(axis=1)  # no point counts: the law is not fitted, any range will do
    first, last = np.where(known, first, 1.0), np.where(known, last, 1.0)
    ranges = [
        np.log(np.broadcast_arrays(*each.bounds(first, last), first)[:2])
        for each in law.parameters.values()
        if each.bounds
    ]
    low_high = np.stack(ranges, axis=-1) if ranges else np.empty((2, len(t), 0))
    return low_high[0], low_high[1]


def _starts(
    law: Law,
    t: Float[np.ndarray, "curve t"],
    value: Float[np.ndarray, "curve t"],
    weight: Float[np.ndarray, "curve t"],
) -> Float[np.ndarray, "curve start param"]:
    """The best points of a grid of shapes, the linear parameters solved for at each."""
    low, high = _limits(law, t, weight)
    shape = np.flatnonzero(law.is_shape)
    linear = np.flatnonzero(~law.is_shape)
    # each dimension gets as many points as keep the whole grid near a thousand
    side = {0: 1, 1: 60, 2: 24, 3: 12}[len(shape)]
    unit = (
        np.stack(
            np.meshgrid(*[np.linspace(0, 1, side)] * len(shape), indexing="ij"), axis=-1
        ).reshape(-1, len(shape))
        if len(shape)
        else np.empty((1, 0))
    )
    found = np.ones((len(t), min(STARTS, len(unit)), len(law.order)))
    # curves measured at the same times share the grid and what the law is on it
    same = np.unique(np.hstack([t, low, high]), axis=0, return_inverse=True)[1].ravel()
    for each in range(same.max() + 1):
        mine = np.flatnonzero(same == each)
        grid = np.ones((len(unit), len(law.order)))
        a, b = low[mine[0]], high[mine[0]]
        grid[:, shape] = np.exp(a + unit * (b - a))
        slopes = law.slopes(t[mine[0]], *grid.T[:, :, None])
        basis = np.stack([slopes[index] for index in linear])  # [linear, grid, t]
        w, wv = weight[mine], weight[mine] * value[mine]
        normal = np.einsum("ct,ygt,zgt->cgyz", w, basis, basis, optimize=True)
        moment = np.einsum("ct,ygt->cgy", wv, basis, optimize=True)
        ridge = np.einsum("cgyy->cg", normal)[..., None, None] * 1e-12 + 1e-300
        solved = np.linalg.solve(normal + ridge * np.eye(len(linear)), moment[..., None])[..., 0]
        rank = np.argsort(-(moment * solved).sum(axis=-1), axis=1)
        # the best few, and some of the rest, should the best all lie in one valley
        spread = np.linspace(0, rank.shape[1] // 3, STARTS // 2 + 1).astype(int)[1:] + STARTS // 2
        places = np.concatenate([np.arange(STARTS // 2), spread])[: found.shape[1]]
        found[mine] = grid[rank[:, np.minimum(places, rank.shape[1] - 1)]]
    return found


def descend(
    law: Law,
    t: Float[np.ndarray, "curve t"],
    value: Float[np.ndarray, "curve t"],
    weight: Float[np.ndarray, "curve t"],
    start: Float[np.ndarray, "curve param"],
    *,
    steps: int = STEPS,
    limits: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[Float[np.ndarray, "curve param"], Float[np.ndarray, " curve"]]:
    """Levenberg-Marquardt for a batch of curves; gives parameters and weighted squared errors.

    Only the shapes move, as logarithms, so that they stay positive; the linear parameters are
    solved for at each step (variable projection, Golub & Pereyra 1973, with Kaufman's derivative).
    Shapes are kept within bounds: where two laws have a common limit (a power with b to 0 is an
    exponential) they would run off.
    """
    low, high = _limits(law, t, weight) if limits is None else limits
    low, high = (np.broadcast_to(each, (len(t), each.shape[1])) for each in (low, high))
    params, loss = np.array(start, dtype=float), np.empty(len(t))
    size = max(1, BATCH // t.shape[1])  # what a step holds must not grow with the number of curves
    for begin in range(0, len(t), size):
        mine = slice(begin, begin + size)
        data = (t[mine], value[mine], np.sqrt(weight[mine]))
        params[mine], loss[mine] = _descend(law, data, params[mine], low[mine], high[mine], steps)
    return params, loss


def _descend(law: Law, data: tuple, params: np.ndarray, low, high, steps: int):
    shape = law.is_shape
    inner = np.log(params[:, shape]).clip(low, high)
    params[:, shape] = np.exp(inner)
    params, error, _ = _solved(law, *data, params)
    loss = np.square(error).sum(axis=1)
    damping, active = np.full(len(params), 1e-2), np.arange(len(params))
    for _ in range(steps if shape.any() else 0):
        here = [each[active] for each in data]
        _, error, unit = _solved(law, *here, params[active])
        slopes = law.slopes(here[0], *params[active].T[:, :, None])
        slopes = np.stack([s for s, moves in zip(slopes, shape, strict=True) if moves], axis=-1)
        slopes = slopes * here[2][:, :, None] * params[active][:, None, shape]
        for q in unit:  # what the linear parameters make good for does not count
            slopes = slopes - q[:, :, None] * np.einsum("ct,cts->cs", q, slopes)[:, None]
        # a shape at its bound that would go further stays, and leaves the others to move
        gradient = np.einsum("cts,ct->cs", slopes, error)
        place, at_low, at_high = inner[active], low[active], high[active]
        stuck = (place >= at_high) & (gradient > 0) | (place <= at_low) & (gradient < 0)
        slopes, gradient = np.where(stuck[:, None], 0.0, slopes), np.where(stuck, 0.0, gradient)
        step = _damped_step(slopes, gradient, damping[active], stuck)
        # a log parameter that moves by more than e^3 leaves what the slopes say
        trial = (place + step.clip(-3, 3)).clip(at_low, at_high)
        tried = params[active]
        tried[:, shape] = np.exp(trial)
        tried, error, _ = _solved(law, *here, tried)
        gain = loss[active] - np.square(error).sum(axis=1)
        better = gain > 0
        took = active[better]
        inner[took], params[took] = trial[better], tried[better]
        done = np.where(better, gain <= SETTLED * loss[active], damping[active] > 1e8)
        loss[took] -= gain[better]
        damping[active] = np.where(better, damping[active] / 5, damping[active] * 4).clip(1e-15)
        active = active[~done]
        if not len(active):
            break
    return params, loss


def _solved(law: Law, t, value, root, params):
    """Parameters with the linear ones at their best, weighted errors, and an orthonormal basis.

    Modified Gram-Schmidt over the curve's linear parts; one that cannot be told from those before
    it gets the coefficient 0.
    """
    linear = np.flatnonzero(~law.is_shape)
    slopes = law.slopes(t, *params.T[:, :, None])
    unit, above, coefficient, error = [], {}, {}, value * root
    for j, column in enumerate(linear):
        part = slopes[column] * root
        whole = np.sqrt(np.square(part).sum(axis=1))
        for i, q in enumerate(unit):
            above[i, j] = (q * part).sum(axis=1)
            part = part - q * above[i, j][:, None]
        norm = np.sqrt(np.square(part).sum(axis=1))
        known = norm > ALIKE * whole
        above[j, j] = np.where(known, norm, np.inf)  # a division by inf leaves 0
        unit.append(np.where(known[:, None], part, 0.0) / np.where(known, norm, 1.0)[:, None])
        coefficient[j] = (unit[j] * error).sum(axis=1)
        error = error - unit[j] * coefficient[j][:, None]
    params = params.copy()
    for j in reversed(range(len(linear))):
        rest = coefficient[j]
        for k in range(j + 1, len(linear)):
            rest = rest - above[j, k] * params[:, linear[k]]
        params[:, linear[j]] = rest / above[j, j]
    return params, error, unit


def _damped_step(
    slopes: Float[np.ndarray, "curve t shape"],
    gradient: Float[np.ndarray, "curve shape"],
    damping: Float[np.ndarray, " curve"],
    stuck: Bool[np.ndarray, "curve shape"],
) -> Float[np.ndarray, "curve shape"]:
    """Solve Marquardt's equations, damping each parameter in its own scale."""
    normal = np.swapaxes(slopes, 1, 2) @ slopes
    own = np.einsum("cpp->cp", normal)
    # a parameter without any effect is held by a sliver of the others' scale
    own = own + own.max(axis=1, keepdims=True) * 1e-15 + 1e-300
    diagonal = damping[:, None] * own + 1e-300 + stuck
    damped = normal + diagonal[:, :, None] * np.eye(slopes.shape[-1])
    return np.linalg.solve(damped, gradient[..., None])[..., 0]


# --- rows -----------------------------------------------------------------------------------------


def half_life(law: Law, params: Float[np.ndarray, "fit param"]) -> Float[np.ndarray, " fit"]:
    """Time until the curve is down to half of where it starts.

    inf where it never is; NaN where it starts at 0 or below, so that there is nothing to halve.
    """
    columns = params.T
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        start = law.curve(np.array(law.start), *columns)
        half = law.half(*columns)
    return np.where(start > 0, half, np.nan)


def learnability_threshold(
    a: Float[np.ndarray, " fit"], b: Float[np.ndarray, " fit"]
) -> Float[np.ndarray, " fit"]:
    """``10^(a/b)``, the t at which the semi-log line ``a - b log10 t`` reaches 0, in updates.

    Chang et al. (2024): what an exposure left is gone by then, so that exposures farther apart do
    not add up. a = 3, b = 1.5 gives 100; inf where the line does not fall.
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return np.where(b > 0, 10.0 ** (a / np.where(b > 0, b, 1.0)), np.inf)


def akaike_weights(aicc: Float[np.ndarray, "... law"]) -> Float[np.ndarray, "... law"]:
    """Relative likelihoods ``e^(-(AICc - best) / 2)`` scaled to sum to 1; NaN where AICc is."""
    best = np.min(np.where(np.isnan(aicc), np.inf, aicc), axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        relative = np.exp(-(aicc - best) / 2)
        return relative / np.nansum(relative, axis=-1, keepdims=True)


def _interval(values: Float[np.ndarray, "draw ..."], tail: float):
    """The draws that leave the tail outside, counted in B + 1 gaps; never beyond the extremes.

    Whole draws, as two infinite ones have no mean; NaN if any is undefined.
    """
    if not len(values):
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing
    ordered = np.sort(values, axis=0)  # NaN last
    place = max(1, int((len(values) + 1) * tail + 1e-9)) - 1
    unknown = np.isnan(ordered[-1])
    low, high = ordered[place], ordered[len(values) - 1 - place]
    return np.where(unknown, np.nan, low), np.where(unknown, np.nan, high)


def _rows(
    places: Sequence[dict],
    curves: Sequence[Points],
    fits: dict[str, list[Fit]],
    level: float,
    x: str,
) -> pd.DataFrame:
    """One table of all curves and laws, built from a few arrays: thousands of rows a second."""
    blocks = []
    for index, points in enumerate(curves):
        mine = [fit[index] for fit in fits.values()]
        tail = percentile_tail(points.items, level)
        weights = akaike_weights(np.array([fit.aicc for fit in mine]))
        again = akaike_weights(np.stack([fit.again_aicc for fit in mine], axis=1))
        for column, fit in enumerate(mine):
            weight = (weights[column], *_interval(again[:, column], tail))
            for block in (
                _scalar_block(points, fit, weight, tail),
                *_curve_blocks(points, fit, tail),
            ):
                blocks.append(block | {"place": index, "law": fit.name})
    size = [len(block["value"]) for block in blocks]

    def column(name: str) -> np.ndarray:
        return np.concatenate(
            [
                np.broadcast_to(block[name], length)
                for block, length in zip(blocks, size, strict=True)
            ]
        )

    place = column("place")
    beside = {key: np.array([p[key] for p in places])[place] for key in places[0]}
    common = {key: beside.pop(key) for key in ("run", "step", "group")}
    beside |= {x: column("x"), "reason": column("reason"), "law": column("law")}
    values = {key: column(key) for key in ("value", "lo", "hi", "n")}
    found = rows("fitted", **values, **common, beside=beside)
    return found.assign(metric=column("metric"))


def _scalar_block(points: Points, fit: Fit, weight: tuple, tail: float) -> dict:
    law = LAWS[fit.name]
    everywhere = fit.reason.get("all", "")
    compared, nothing = fit.reason.get("aicc", everywhere), (np.nan, np.nan)
    half, lives = float(half_life(law, fit.params[None])[0]), half_life(law, fit.again)
    values = {
        "aicc": (fit.aicc, *nothing, compared),
        "weight": (*weight, compared),
        "half_life": (
            half, *_interval(lives, tail),
            everywhere or _half_reason(half, lives, law.start, points),
        ),
        "rmse": (fit.rmse, *nothing, everywhere),
        "rmse_holdout": (
            fit.rmse_holdout, *nothing, fit.reason.get("rmse_holdout", everywhere)
        ),
    }  # fmt: skip
    if fit.name == "semilog":
        values["learnability_threshold"] = _threshold(points, fit, tail, everywhere)
    for index, name in enumerate(law.order):
        between = _interval(fit.again[:, index], tail)
        values[f"param_{name}"] = (fit.params[index], *between, everywhere)
    one = "one item: no interval" if points.how == "none: one item" else ""
    value, lo, hi, reason = (list(each) for each in zip(*values.values(), strict=True))
    kept = [
        told or ("" if name in NO_INTERVAL else one)
        for name, told in zip(values, reason, strict=True)
    ]
    n = int(fit.used.sum())
    return dict(metric=list(values), value=value, lo=lo, hi=hi, reason=kept, n=n, x=np.nan)


def _threshold(points: Points, fit: Fit, tail: float, everywhere: str) -> tuple:
    a, b = fit.params
    if everywhere or not b > 0:
        return np.nan, np.nan, np.nan, everywhere or "the line does not fall: b is 0 or below"
    value = float(learnability_threshold(a, b))
    between = _interval(learnability_threshold(*fit.again.T), tail)
    return value, *between, _extrapolated(value, points)


def _half_reason(half: float, lives: np.ndarray, start: float, points: Points) -> str:
    if np.isnan(half):
        return "the fitted curve starts at 0 or below"
    if np.isinf(half):
        return "never: the fitted curve stays above half of its start"
    if np.isnan(lives).any():
        return "no interval: some resampled curves start at 0 or below"
    if start < points.t[0]:
        return f"half of r({start:g}), which lies before the first point: extrapolated"
    return _extrapolated(half, points)


def _extrapolated(value: float, points: Points) -> str:
    if value < points.t[0]:
        return "before the first point: extrapolated"
    return "beyond the last point: extrapolated" if value > points.t[-1] else ""


def _curve_blocks(points: Points, fit: Fit, tail: float) -> list[dict]:
    if "all" in fit.reason:
        return []
    law, t = LAWS[fit.name], points.t[fit.used]
    grid = np.geomspace(t[t > 0][0], t[-1], GRID)
    grid[0], grid[-1] = t[t > 0][0], t[-1]  # geomspace may end a rounding outside
    grid = np.concatenate([t[t == 0], grid])
    low, high = _interval(law.curve(grid, *fit.again.T[:, :, None]), tail)
    one = "one item: no interval" if points.how == "none: one item" else ""
    value = law.curve(grid, *fit.params)
    fitted = dict(metric="fitted", value=value, lo=low, hi=high, n=len(t), x=grid, reason=one)
    error = points.value[fit.used] - law.curve(t, *fit.params)
    left = dict(metric="residual", value=error, lo=np.nan, hi=np.nan)
    return [fitted, left | dict(n=points.n[fit.used], x=t, reason="")]
