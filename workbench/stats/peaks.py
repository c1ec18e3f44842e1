"""How far a curve over checkpoints has come down from its peak, the picking of the peak allowed for."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import optimize, stats

from workbench.stats.audit import roughness
from workbench.table import METRICS, InputError, validate

LEVEL = 0.95
NEAR_PEAK = 0.01  # chance that a step as good as the peak is not counted among its rivals


def peak_drop(table: pd.DataFrame, *, level: float = LEVEL) -> pd.DataFrame:
    """Peak, end, and fall from the peak to the end, for each curve of pooled results.

    The highest of many noisy values is too high, so ``max - last`` finds forgetting where there
    is none: of 20 steps of a flat curve 1.9 standard errors of it. With d_s = y_s - y_T and se_s
    its standard error, the fall ``D = max_s theta_s - theta_T`` (0 at least, T being among the
    steps) is

    - estimated by ``max(0, max_s (d_s - c_50 se_s))``, c_50 the median of the largest noise
      ``(e_s - e_T) / se_s`` over the steps that rival the peak: too high as often as too low on a
      flat curve, and the plain difference where one step stands alone (Chernozhukov, Lee & Rosen
      2013, "Intersection bounds: estimation and inference");
    - bounded below by the same with the 97.5 % point in place of the median, which is Dunnett's
      critical value over the rivals, and above by ``max_s (d_s + 1.96 se_s)`` over them.

    Rivals are the steps whose interval, simultaneous at 99 %, reaches that of the best. The errors
    are those of the items drawn, taken as independent between steps; checkpoints that answer the
    same items agree more, and the interval is then too wide rather than too narrow.

    Args:
        table: Pooled rows over steps, one value a step and curve (run, group, metric,
            source_metric); shares with n, any metric with ``se`` or bounds, or curves long enough
            to show their own roughness (:func:`sampling_error`). Metrics that are
            neither better high nor low are left out and counted in ``.attrs["dropped"]``.

    Returns:
        Three rows a curve, told apart by ``at``: "peak" and "end", the values as they were
        measured, with their intervals; and "drop", metric ``peak_drop`` in the unit of the source,
        positive where the end is worse than the peak, with the coordinates ``of`` (the metric)
        and, beside it, ``naive`` (max - last) and ``rivals`` (steps that may be the true
        peak, the end among them).
        NaN with a ``reason`` where no sampling error is known or there is one step.

    Raises:
        InputError: No pooled rows, several values of a curve at one step, or a level out of range.
    """
    if not 0 < level < 1:
        raise InputError(f"peak_drop: level is {level}, it must lie between 0 and 1")
    table = validate(table)
    pooled = table[(table["item"] == "all") & table["value"].notna()]
    if pooled.empty:
        raise InputError("peak_drop: no pooled rows (item 'all') with a value; summarise first")
    place = [n for n in ("run", "group", "metric", "source_metric") if n in pooled.columns]
    again = pooled.duplicated([*place, "step"])
    if again.any():
        first = pooled[again].iloc[0]
        raise InputError(
            f"peak_drop: several values of {first['group']} ({first['metric']}) at step "
            f"{first['step']} of {first['run']}; choose one by `file`, or load with repeats='latest'"
        )
    signs = {"high": 1.0, "low": -1.0, "": 0.0}
    sign = pooled["metric"].astype(str).map(lambda key: signs[METRICS[key].better])
    parts = [
        _curve(line.sort_values("step"), float(sign[line.index[0]]), level)
        for _, line in pooled[sign != 0].groupby(place, observed=True, sort=False)
    ]
    if not parts:
        raise InputError("peak_drop: no metric here is better high or low, so nothing can fall")
    made = validate(pd.concat(parts, ignore_index=True))
    made.attrs = {"dropped": int((sign == 0).sum())}
    return made


def _curve(line: pd.DataFrame, sign: float, level: float) -> pd.DataFrame:
    value = sign * line["value"].to_numpy(dtype=float)
    best, end = int(value.argmax()), len(line) - 1
    drop = _drop(value, sampling_error(line), level) if len(line) > 1 else None
    reason = "one step" if drop is None else "" if drop["known"] else "no sampling error is known"
    told = drop if drop and drop["known"] else dict(value=np.nan, lo=np.nan, hi=np.nan, rivals=0)
    made = line.iloc[[best, end, end]].copy()
    made["at"] = ["peak", "end", "drop"]
    made["of"] = made["metric"].astype(str)
    made["metric"] = [*made["of"].iloc[:2], "peak_drop"]
    for name in ("value", "lo", "hi"):
        made[name] = [*made[name].iloc[:2], told[name]]
    made["reason"] = ["", "", reason]
    made["naive"] = float(value[best] - value[end])
    made["rivals"] = float(told["rivals"])
    # an evaluation's file, interval and error say nothing of the difference of two
    return made.drop(columns=[n for n in ("se", "how", "file", "limit") if n in made])


def sampling_error(line: pd.DataFrame) -> Float[np.ndarray, " step"]:
    """Standard errors: of a share by n, else as recorded, else from the bounds, else of roughness.

    A line of six values or more of which nothing is recorded (a Trainer's losses) has its own
    roughness, the median absolute second difference; NaN where there is none either.
    A share has ``sqrt(q (1 - q) / n)`` with ``q = (n p + 2) / (n + 4)``, which is not 0 at 0 and 1.
    """
    value, n = line["value"].to_numpy(dtype=float), line["n"].to_numpy(dtype=float)
    told = line["how"].astype(str) if "how" in line else pd.Series("", index=line.index)
    metric = METRICS[str(line["metric"].iloc[0])]
    plain = (metric.low, metric.high) == (0.0, 1.0) and metric.unit == "share of items"
    share = (told.str.startswith("wilson") | ((told == "") & plain)).to_numpy() & (n > 1)
    q = (n * value + 2) / (n + 4)
    se = line["se"].to_numpy(dtype=float) if "se" in line else np.full(len(line), np.nan)
    bounds = (line["hi"] - line["lo"]).to_numpy(dtype=float) / (2 * stats.norm.ppf((1 + LEVEL) / 2))
    se = np.where(se > 0, se, np.where(bounds > 0, bounds, np.nan))
    with np.errstate(divide="ignore", invalid="ignore"):
        se = np.where(share, np.sqrt(q * (1 - q) / n), se)
    if np.isnan(se).all() and len(value) > 2:
        rough, df = roughness(value, np.ones((1, len(value) - 2), dtype=bool))
        return np.full(len(value), rough[0] if df[0] and rough[0] > 0 else np.nan)
    return se


def _drop(value: np.ndarray, se: np.ndarray, level: float) -> dict:
    if np.isnan(se).any():
        return {"known": False}
    d, end = value[:-1] - value[-1], se[-1]
    apart = np.sqrt(se[:-1] ** 2 + end**2)
    reach = stats.norm.isf(NEAR_PEAK / (2 * len(value)))
    near = value + reach * se >= (value - reach * se).max()
    rivals = near[:-1]
    if not rivals.any():  # the end stands alone at the top
        return dict(known=True, value=0.0, lo=0.0, hi=max(0.0, _above(d, apart, level)), rivals=1)
    few = dict(d=d[rivals], apart=apart[rivals])
    middle, tail = (_critical(se[:-1][rivals], end, q) for q in (0.5, (1 + level) / 2))
    # the median of one noise alone is 0, so a peak that stands alone is taken as it is
    estimate = max(0.0, float((few["d"] - middle * few["apart"]).max()))
    low = max(0.0, float((few["d"] - tail * few["apart"]).max()))
    high = max(estimate, _above(few["d"], few["apart"], level))
    return dict(known=True, value=estimate, lo=low, hi=high, rivals=int(near.sum()))


def _above(d: np.ndarray, apart: np.ndarray, level: float) -> float:
    return float((d + stats.norm.ppf((1 + level) / 2) * apart).max())


def _critical(se: Float[np.ndarray, " rival"], end: float, quantile: float) -> float:
    """c with ``P(max_s (e_s - e_T) / sqrt(se_s^2 + end^2) <= c)`` equal to ``quantile``.

    Given e_T = end t the rivals are independent, so it is one integral over t (Dunnett 1955). One
    rival gives the normal's quantile; two of equal error at .975: 2.2121.
    """
    t, weight = np.polynomial.hermite_e.hermegauss(60)
    weight = weight / weight.sum()
    apart = np.sqrt(se**2 + end**2)

    def below(c: float) -> float:
        inside = stats.norm.cdf((c * apart[:, None] + end * t) / se[:, None])
        return float(weight @ inside.prod(axis=0)) - quantile

    return float(optimize.brentq(below, -10.0, 10.0, xtol=1e-9))
