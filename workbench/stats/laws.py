"""Forgetting laws: which curve memory follows as updates pass since the last exposure.

Each law is a few lines of mathematics below, with its derivatives, its half-life and its source.
All are fitted by weighted least squares, by Levenberg-Marquardt steps taken for many curves at
once: the starts of a fit, or the resampled curves behind its band, are one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from workbench.table import InputError, one_metric, rows, validate

LEAST_POINTS = 5  # distinct t below which no law is told from another
LEAST_SPAN = 10.0  # largest over smallest positive t
GRID = 60  # points of a fitted curve
STARTS = 12
STEPS = 200  # of Levenberg-Marquardt
SETTLED = 1e-14  # relative gain of a step at which a fit has converged
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
class Law:
    """A curve, its derivatives and half-life; ``shape`` parameters are positive, ``linear`` free.

    ``bounds`` give each shape parameter's range from the smallest positive and the largest t, wide
    enough that a law at its bound is indistinguishable from its limit.
    """

    curve: Curve
    slopes: Curve
    half: Curve
    linear: tuple[str, ...]
    bounds: dict[str, Callable[[float, float], tuple[float, float]]]
    order: tuple[str, ...]
    first: float = 0.0  # smallest t at which it is defined; 0 is excluded if above 0
    start: float = 0.0  # the t whose value the half-life halves

    @property
    def is_shape(self) -> np.ndarray:
        return np.array([name in self.bounds for name in self.order])


def _time(first, last):
    return first / 100, last * 1e4


def _rate(first, last):
    return 1e-4 / last, 1e4 / first


def _between(low, high):
    return lambda first, last: (low, high)


LAWS: dict[str, Law] = {
    "exponential": Law(
        exponential, exponential_slopes, exponential_half, ("a",), {"s": _time}, ("a", "s")
    ),
    "exponential_floor": Law(
        exponential_floor,
        exponential_floor_slopes,
        exponential_floor_half,
        ("a", "c"),
        {"s": _time},
        ("a", "s", "c"),
    ),
    "power": Law(
        power,
        power_slopes,
        power_half,
        ("a",),
        {"b": _rate, "p": _between(1e-3, 1e2)},
        ("a", "b", "p"),
    ),
    "wickelgren": Law(
        wickelgren,
        wickelgren_slopes,
        wickelgren_half,
        ("a",),
        {"b": _rate, "p": _between(1e-3, 1e2), "q": _rate},
        ("a", "b", "p", "q"),
    ),
    "logarithm": Law(
        logarithm, logarithm_slopes, logarithm_half, ("a", "b"), {"s": _time}, ("a", "b", "s")
    ),
    "semilog": Law(
        semilog, semilog_slopes, semilog_half, ("a", "b"), {}, ("a", "b"), first=1e-300, start=1.0
    ),
    "ebbinghaus_savings": Law(
        ebbinghaus_savings,
        ebbinghaus_savings_slopes,
        ebbinghaus_savings_half,
        ("a",),
        {"k": _between(1e-4, 1e4), "c": _between(0.05, 20)},
        ("a", "k", "c"),
        first=1.0,
        start=1.0,
    ),
    "shifted_power": Law(
        shifted_power,
        shifted_power_slopes,
        shifted_power_half,
        ("a", "c"),
        {"s": _time, "p": _between(1e-2, 3)},
        ("a", "s", "p", "c"),
    ),
}
DEFAULT_LAWS = ("exponential", "exponential_floor", "power", "wickelgren", "logarithm", "semilog")


# --- table to table -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Points:
    """One forgetting curve, and the same curve resampled."""

    t: Float[np.ndarray, " t"]
    value: Float[np.ndarray, " t"]
    weight: Float[np.ndarray, " t"]
    n: np.ndarray
    again: Float[np.ndarray, "draw t"]  # no rows where nothing can be resampled
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

    Args:
        table: One metric. Item rows (several items per t), or pooled rows, one per t. A column
            ``se`` gives weights ``1 / se^2``. Rows without a value or without ``x`` are dropped and
            counted in ``.attrs["dropped"]``.
        x: Updates since the last exposure, t >= 0.
        laws: Keys of :data:`LAWS`; None takes all but Ebbinghaus's savings and the shifted power.
        draws: Resampled curves behind the intervals: of items where there are item rows; else
            independent normal errors of size ``se`` around the points; none without either.
            ``.attrs["bootstrap"]`` says which.
        holdout: Share of the points, the last ones, predicted from a fit to the others.
        by: Coordinates that tell curves apart; ``run`` must be among them if there are several.

    Returns:
        Rows with the coordinate ``law``: "aicc" (error variance estimated, so it counts as a
        parameter), "weight" (Akaike, over the laws fitted to all points; 1 / laws at no
        preference), "half_life" in units of x until half of the fitted r(0) is left (of r(1) for
        semilog and Ebbinghaus; inf where never; a reason says where it is extrapolated), "rmse", "rmse_holdout", "param_*"; and with the
        coordinate ``x``: "fitted" with its pointwise band and "residual". NaN comes with a reason.

    Raises:
        InputError: Under 5 distinct t, less than one decade of t, negative t, unknown laws, several
            rows per t without items, or standard errors that are missing here and there.
    """
    laws = _checked_laws(laws, draws=draws, holdout=holdout, level=level)
    table = validate(table)
    one_metric(table, "fit_forgetting")
    for name in (x, *by):
        if name not in table.columns:
            raise InputError(f"fit_forgetting: no column {name!r}; there are {', '.join(table)}")
    usable = table["value"].notna() & table[x].notna()
    runs = table["run"].astype(str).unique()
    if "run" not in by and len(runs) > 1:
        raise InputError(
            f"fit_forgetting: needs one run, got {', '.join(runs)}; select one or add run to by"
        )
    made, how = [], {}
    seen = table[usable]
    parts = seen.groupby(list(by), observed=True, sort=False) if by else [((), seen)]
    for values, part in parts:
        where = dict(zip(by, values, strict=True))
        told = ", ".join(f"{name}={value}" for name, value in where.items()) or "the table"
        points = _points(part, x, told, draws, seed)
        how[told] = points.how
        common = dict(run=str(part["run"].iloc[0]), step=int(part["step"].max()))
        common["group"] = _single(part["group"])
        fits = {name: fit_law(points, name, holdout=holdout) for name in laws}
        found = _law_rows(points, fits, level, common, x)
        coordinates = {name: value for name, value in where.items() if name not in common}
        made.append(found.assign(**coordinates))
    if not made:
        raise InputError("fit_forgetting: no row has a value; there is nothing to fit")
    result = pd.concat(made, ignore_index=True)
    result.attrs |= {"bootstrap": how, "dropped": int((~usable).sum())}
    return result


def _single(column: pd.Series) -> str:
    held = column.unique()
    return str(held[0]) if len(held) == 1 else "all"


def _checked_laws(laws, *, draws: int, holdout: float, level: float) -> tuple[str, ...]:
    laws = DEFAULT_LAWS if laws is None else tuple(laws)
    for name in laws:
        if name not in LAWS:
            raise InputError(f"fit_forgetting: no law {name!r}; there are {', '.join(LAWS)}")
    if draws < 0:
        raise InputError(f"fit_forgetting: draws is {draws}, it must be at least 0")
    for name, number in (("holdout", holdout), ("level", level)):
        if not 0 < number < 1:
            raise InputError(f"fit_forgetting: {name} is {number}, it must lie between 0 and 1")
    return laws


def _points(part: pd.DataFrame, x: str, told: str, draws: int, seed: int) -> Points:
    """Mean curve of a group, its weights, and its resampled copies."""
    t = np.sort(part[x].astype(float).unique())
    _refuse_short(t, x, told)
    rng = np.random.default_rng(seed)
    if part[x].duplicated().any():
        wide = part.pivot_table(
            index="item", columns=x, values="value", aggfunc="mean", observed=True
        )
        if len(wide) < 2:
            raise InputError(
                f"fit_forgetting: {told} has several rows of one item per {x}; pool them or add "
                "the coordinate that tells them apart to by"
            )
        if part.duplicated([x, "item"]).any():
            raise InputError(
                f"fit_forgetting: {told} has items with several rows per {x}; pool them or add "
                "the coordinate that tells them apart to by"
            )
        panel, seen = np.nan_to_num(wide.to_numpy()), wide.notna().to_numpy().astype(float)
        n = seen.sum(axis=0)
        value = panel.sum(axis=0) / n
        items = rng.multinomial(len(panel), np.full(len(panel), 1 / len(panel)), size=draws)
        held = items @ seen
        again = np.where(held > 0, items @ panel / np.maximum(held, 1), value)
        return Points(t, value, np.ones(len(t)), n.astype(int), again, "items")
    part = part.sort_values(x)
    value, n = part["value"].to_numpy(), part["n"].to_numpy()
    error = part["se"].to_numpy() if "se" in part.columns else np.full(len(t), np.nan)
    if np.isnan(error).all():
        how = "none: pooled rows without se"
        return Points(t, value, np.ones(len(t)), n, np.empty((0, len(t))), how)
    bad = ~(error > 0)
    if bad.any():
        raise InputError(
            f"fit_forgetting: {told} has se {error[bad][0]} at {x} {t[bad][0]:g}; every weight "
            "needs a positive se, so drop the row or the column"
        )
    again = value + error * rng.standard_normal((draws, len(t)))
    how = "parametric: normal errors of size se, independent between points"
    return Points(t, value, 1 / error**2, n, again, how)


def _refuse_short(t: np.ndarray, x: str, told: str) -> None:
    if t[0] < 0:
        raise InputError(
            f"fit_forgetting: {told} has {x} {t[0]:g}; laws are of time since the last exposure, "
            "so keep rows of 0 and above"
        )
    if len(t) < LEAST_POINTS:
        raise InputError(
            f"fit_forgetting: {told} has {len(t)} distinct {x}, it needs at least {LEAST_POINTS}; "
            "probe at more checkpoints"
        )
    first = t[t > 0][0]
    if t[-1] / first < LEAST_SPAN:
        raise InputError(
            f"fit_forgetting: {told} has {x} from {first:g} to {t[-1]:g}, less than one decade; "
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
    rmse: float
    rmse_holdout: float
    reason: dict[str, str]


def fit_law(points: Points, name: str, *, holdout: float) -> Fit:
    """Fit one law to one curve and to its resampled copies, from the best of many starts."""
    law = LAWS[name]
    used = points.t >= law.first
    t, value, weight = points.t[used], points.value[used], points.weight[used]
    again, reason = points.again[:, used], {}
    size = len(law.order)
    if len(t) < size:
        reason["all"] = f"{len(t)} points for {size} parameters"
        nothing = np.full(size, np.nan)
        nowhere = np.full((len(again), size), np.nan)
        return Fit(name, nothing, nowhere, used, np.nan, np.nan, np.nan, reason)
    params = best_fit(law, t, value, weight)
    warm = np.repeat(params[None], len(again), axis=0)
    repeated = descend(law, t, again, weight, warm)[0] if len(again) else warm
    error = value - law.curve(t, *params)
    aicc, why = corrected_akaike(error, weight, size, np.abs(value).max())
    if not used.all():
        aicc, why = np.nan, "undefined at the smallest t, so not fitted to all points; drop them"
    if why:
        reason["aicc"] = why
    ahead, why = _holdout_error(law, t, value, weight, holdout)
    if why:
        reason["rmse_holdout"] = why
    rmse = float(np.sqrt(np.mean(error**2)))
    return Fit(name, params, repeated, used, aicc, rmse, ahead, reason)


def corrected_akaike(
    error: Float[np.ndarray, " t"], weight: Float[np.ndarray, " t"], params: int, scale: float
) -> tuple[float, str]:
    """AICc with the error variance estimated, and why it is NaN if it is.

    ``n ln(sum w e^2 / n) + 2K + 2K(K + 1)/(n - K - 1)``, weights scaled to mean log 0, and K one
    more than the curve's parameters (Burnham & Anderson 2002, section 2.4); lower is better.
    Errors below the rounding of the values count as rounding, so that an exact fit has a value.
    """
    n, k = len(error), params + 1
    if n <= k + 1:
        return np.nan, f"{n} points are too few for {params} parameters and an error variance"
    weight = weight / np.exp(np.log(weight).mean())
    spread = max((weight * error**2).mean(), (np.finfo(float).eps * scale) ** 2)
    if spread == 0:
        return np.nan, "all values are 0"
    return float(n * np.log(spread) + 2 * k + 2 * k * (k + 1) / (n - k - 1)), ""


def _holdout_error(law: Law, t, value, weight, holdout: float) -> tuple[float, str]:
    keep = len(t) - max(1, round(holdout * len(t)))
    if keep <= len(law.order):
        return np.nan, f"{keep} points before the held-out ones for {len(law.order)} parameters"
    params = best_fit(law, t[:keep], value[:keep], weight[:keep])
    error = value[keep:] - law.curve(t[keep:], *params)
    return float(np.sqrt(np.mean(error**2))), ""


def best_fit(
    law: Law,
    t: Float[np.ndarray, " t"],
    value: Float[np.ndarray, " t"],
    weight: Float[np.ndarray, " t"],
) -> Float[np.ndarray, " param"]:
    """The least weighted squares from the best starts of a grid over the shape parameters."""
    starts = _starts(law, t, value, weight)
    curves = np.repeat(value[None], len(starts), axis=0)
    params, loss = descend(law, t, curves, weight, starts)
    return params[np.argmin(loss)]


def _limits(law: Law, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of all parameters, shapes as logarithms."""
    low, high = np.full(len(law.order), -np.inf), np.full(len(law.order), np.inf)
    for index, name in enumerate(law.order):
        if name in law.bounds:
            low[index], high[index] = np.log(law.bounds[name](t[t > 0][0], t[-1]))
    return low, high


def _starts(law: Law, t, value, weight) -> Float[np.ndarray, "start param"]:
    """Linear parameters solved for at every point of a grid of shapes; the best are kept."""
    low, high = _limits(law, t)
    shape = law.is_shape
    dimensions = int(shape.sum())
    # each dimension gets as many points as keep the whole grid near a thousand
    side = {0: 1, 1: 60, 2: 24, 3: 12}[dimensions]
    axes = [np.linspace(a, b, side) for a, b in zip(low[shape], high[shape], strict=True)]
    mesh = np.meshgrid(*axes, indexing="ij")
    grid = np.zeros((side**dimensions, len(law.order)))
    for column, values in zip(np.flatnonzero(shape), mesh, strict=True):
        grid[:, column] = np.exp(values.ravel())
    linear = np.flatnonzero(~shape)
    basis = []
    for column in linear:
        unit = grid.copy()
        unit[:, column] = 1.0  # every law is a sum of its linear parameters times a shape
        basis.append(law.curve(t, *unit.T[:, :, None]) * np.ones((len(grid), len(t))))
    basis = np.stack(basis, axis=-1) * np.sqrt(weight)[:, None]
    target = value * np.sqrt(weight)
    normal = np.swapaxes(basis, 1, 2) @ basis
    ridge = np.trace(normal, axis1=1, axis2=2)[:, None, None] * 1e-12 + 1e-300
    moment = np.swapaxes(basis, 1, 2) @ target[:, None]
    solved = np.linalg.solve(normal + ridge * np.eye(len(linear)), moment)
    loss = np.square(target - (basis @ solved)[..., 0]).sum(axis=1)
    grid[:, linear] = solved[..., 0]
    rank = np.argsort(loss)
    # the best few, and some of the rest, should the best all lie in one valley
    spread = np.unique(np.linspace(0, len(rank) // 3, STARTS // 2).astype(int))
    return grid[np.unique(np.concatenate([rank[: STARTS // 2], rank[spread]]))]


def descend(
    law: Law,
    t: Float[np.ndarray, " t"],
    value: Float[np.ndarray, "curve t"],
    weight: Float[np.ndarray, " t"],
    start: Float[np.ndarray, "curve param"],
) -> tuple[Float[np.ndarray, "curve param"], Float[np.ndarray, " curve"]]:
    """Levenberg-Marquardt for a batch of curves; gives parameters and weighted squared errors.

    Shape parameters move as logarithms, so they stay positive, and are kept within bounds: where
    two laws have a common limit (a power with b to 0 is an exponential) a parameter would run off.
    """
    low, high = _limits(law, t)
    shape, root = law.is_shape, np.sqrt(weight)

    def natural(inner):
        return np.where(shape, np.exp(np.where(shape, inner, 0.0)), inner)

    def errors(inner, rows):
        return root * (value[rows] - law.curve(t, *natural(inner).T[:, :, None]))

    inner = np.where(shape, np.log(np.where(shape, start, 1.0)), start).clip(low, high)
    active = np.arange(len(inner))
    error = errors(inner, active)
    loss = np.square(error).sum(axis=1)
    damping = np.full(len(inner), 1e-2)
    for _ in range(STEPS):
        params = natural(inner[active])
        slopes = np.stack(
            [np.broadcast_to(s, error[active].shape) for s in law.slopes(t, *params.T[:, :, None])],
            axis=-1,
        )
        slopes = slopes * root[:, None] * np.where(shape, params, 1.0)[:, None, :]
        # a shape at its bound that would go further stays, and leaves the others to move
        gradient = np.einsum("ctp,ct->cp", slopes, error[active])
        stuck = (inner[active] >= high) & (gradient > 0) | (inner[active] <= low) & (gradient < 0)
        slopes = np.where(stuck[:, None, :], 0.0, slopes)
        gradient = np.where(stuck, 0.0, gradient)
        step = _damped_step(slopes, gradient, damping[active], stuck)
        # a log parameter that moves by more than e^3 leaves what the slopes say
        step = np.where(shape, step.clip(-3, 3), step)
        trial = (inner[active] + step).clip(low, high)
        tried = errors(trial, active)
        gain = loss[active] - np.square(tried).sum(axis=1)
        better = gain > 0
        took = active[better]
        inner[took], error[took] = trial[better], tried[better]
        done = np.where(better, gain <= SETTLED * loss[active], damping[active] > 1e12)
        loss[took] -= gain[better]
        loss[took] = np.square(error[took]).sum(axis=1)
        damping[active] = np.where(better, damping[active] / 5, damping[active] * 4).clip(1e-15)
        active = active[~done]
        if not len(active):
            break
    return natural(inner), loss


def _damped_step(
    slopes: Float[np.ndarray, "curve t param"],
    gradient: Float[np.ndarray, "curve param"],
    damping: Float[np.ndarray, " curve"],
    stuck: Bool[np.ndarray, "curve param"],
) -> Float[np.ndarray, "curve param"]:
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


def _law_rows(
    points: Points, fits: dict[str, Fit], level: float, common: dict, x: str
) -> pd.DataFrame:
    weights = akaike_weights(np.array([fit.aicc for fit in fits.values()]))
    made = []
    for (name, fit), weight in zip(fits.items(), weights, strict=True):
        one = _scalar_rows(points, fit, float(weight), level, common)
        curve = _curve_rows(points, fit, level, common, x)
        made.append(pd.concat([one, curve], ignore_index=True).assign(law=name))
    found = pd.concat(made, ignore_index=True)
    return found.assign(**{x: found[x].astype(float)})


def akaike_weights(aicc: Float[np.ndarray, " law"]) -> Float[np.ndarray, " law"]:
    """Relative likelihoods ``e^(-(AICc - best) / 2)`` scaled to sum to 1; NaN where AICc is."""
    if np.isnan(aicc).all():
        return aicc
    relative = np.exp(-(aicc - np.nanmin(aicc)) / 2)
    return relative / np.nansum(relative)


def _scalar_rows(
    points: Points, fit: Fit, weight: float, level: float, common: dict
) -> pd.DataFrame:
    law = LAWS[fit.name]
    everywhere = fit.reason.get("all", "")
    half = float(half_life(law, fit.params[None])[0])
    low, high = _interval(half_life(law, fit.again), level)
    values = {
        "aicc": (fit.aicc, np.nan, np.nan, fit.reason.get("aicc", everywhere)),
        "weight": (weight, np.nan, np.nan, fit.reason.get("aicc", everywhere)),
        "half_life": (half, low, high, everywhere or _half_reason(half, law.start, points)),
        "rmse": (fit.rmse, np.nan, np.nan, everywhere),
        "rmse_holdout": (
            fit.rmse_holdout, np.nan, np.nan, fit.reason.get("rmse_holdout", everywhere)
        ),
    }  # fmt: skip
    for index, name in enumerate(law.order):
        between = _interval(fit.again[:, index], level)
        values[f"param_{name}"] = (fit.params[index], *between, everywhere)
    table = pd.DataFrame(list(values.values()), columns=["value", "lo", "hi", "reason"])
    result = rows(
        "aicc",
        table["value"],
        lo=table["lo"],
        hi=table["hi"],
        n=int(fit.used.sum()),
        beside={"reason": table["reason"]},
        **common,
    )
    return result.assign(metric=list(values))


def _half_reason(half: float, start: float, points: Points) -> str:
    if np.isnan(half):
        return "the fitted curve starts at 0 or below"
    if np.isinf(half):
        return "never: the fitted curve stays above half of its start"
    if start < points.t[0]:
        return f"half of r({start:g}), which lies before the first point: extrapolated"
    return "beyond the last point: extrapolated" if half > points.t[-1] else ""


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
    """Percentiles; NaN if any draw is undefined. Whole draws, as two infinite ones have no mean."""
    if not len(values) or np.isnan(values).any():
        return np.nan, np.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(low), float(high)


def _curve_rows(points: Points, fit: Fit, level: float, common: dict, x: str) -> pd.DataFrame:
    law, t = LAWS[fit.name], points.t[fit.used]
    if "all" in fit.reason:
        return rows("fitted", [], beside={x: [], "reason": []}, **common)
    grid = np.geomspace(t[t > 0][0], t[-1], GRID)
    grid[0], grid[-1] = t[t > 0][0], t[-1]  # geomspace may end a rounding outside
    grid = np.concatenate([t[t == 0], grid])
    low = high = np.full(len(grid), np.nan)
    if len(fit.again):
        again = law.curve(grid, *fit.again.T[:, :, None])
        low, high = np.quantile(again, [(1 - level) / 2, (1 + level) / 2], axis=0)
    fitted = rows(
        "fitted",
        law.curve(grid, *fit.params),
        lo=low,
        hi=high,
        n=len(t),
        beside={x: grid, "reason": ""},
        **common,
    )
    residual = rows(
        "residual",
        points.value[fit.used] - law.curve(t, *fit.params),
        n=points.n[fit.used],
        beside={x: t, "reason": ""},
        **common,
    )
    return pd.concat([fitted, residual], ignore_index=True)
