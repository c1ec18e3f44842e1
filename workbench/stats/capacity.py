"""From what models memorized of random data to their capacity, and to bits per parameter."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import optimize, stats

from workbench.table import InputError, rows, validate

LEVEL = 0.95
FULL = 2.0  # a data set of as many times the bits that were memorized of it fills the model
TOLERANCE = 0.01  # a model that doubling the updates teaches more than this share was not done
SIZE = ["run", "parameters", "non_embedding"]


def fit_capacity(table: pd.DataFrame, *, level: float = LEVEL) -> pd.DataFrame:
    """The plateau of what each model memorizes as the random data grow.

    A data set *fills* the model if its bits are at least twice what is memorized of it, in the
    mean over seeds: the choice looks at means and takes all such sets, so it is not a maximum over
    noisy runs, which would lie above the truth.

    Two estimators, which should agree (``estimator``):

    - ``mean`` over the runs on data sets that fill the model; Student's t interval over runs,
      which differ in data, initial weights and number of sequences;
    - ``curve``: the C of ``M = (K^-k + C^-k)^(-1/k)``, least squares in log M over all runs, K the
      most that can be memorized (``ceiling_bits``) and k the sharpness of the bend (k to infinity:
      min(K, C)); interval from an error that allows the runs to differ in noise.

    Args:
        table: What ``load_capacity`` gives.
        level: Of the intervals.

    Returns:
        For each model two rows of ``capacity_bits``; ``doubling_gain``, the mean over the filling
        runs; and ``plateau_trend``, the share by which what is memorized changes when the data
        double, by least squares over the same runs (0 on a plateau). ``bound`` is empty, or says
        why the capacity is only a lower bound: the runs gain more than 1 % from doubling the
        updates, or they memorize less of more data (which longer training would mend), or still
        more. NaN with a reason where no data set fills the model.

    Raises:
        InputError: ``level`` outside 0 to 1, not the table of ``load_capacity``, or a model that
            was trained for several numbers of updates.
    """
    if not 0 < level < 1:
        raise InputError(f"fit_capacity: level is {level}, it must lie between 0 and 1")
    table = validate(table)
    needed = [*SIZE, "sequences", "dataset_bits", "ceiling_bits"]
    lacking = [name for name in needed if name not in table.columns]
    lacking += [m for m in ("memorized_bits", "doubling_gain") if not (table["metric"] == m).any()]
    if lacking:
        raise InputError(f"fit_capacity: no {lacking[0]}; give the table of load_capacity")
    steps = table.groupby(SIZE, observed=True)["step"].unique()
    mixed = steps[steps.map(len) > 1]
    if len(mixed):
        raise InputError(
            f"fit_capacity: {mixed.index[0][0]} was trained for {mixed.iloc[0][0]} and for "
            f"{mixed.iloc[0][1]} updates; fit one of them at a time"
        )
    parts = [_one_size(part, level) for _, part in table.groupby(SIZE, observed=True)]
    return validate(pd.concat(parts, ignore_index=True))


def _one_size(table: pd.DataFrame, level: float) -> pd.DataFrame:
    held = table[table["metric"] == "memorized_bits"]
    gains = table[table["metric"] == "doubling_gain"]
    full = fills(held)
    filling = held[held["sequences"].isin(full)]
    gain = gains.loc[gains["sequences"].isin(full), "value"].to_numpy()
    mean = mean_interval(filling["value"].to_numpy(), level)
    trend = _trend(filling, level)
    made = {
        ("capacity_bits", "mean"): mean,
        ("capacity_bits", "curve"): _curve(held, level) if len(full) else {},
        ("doubling_gain", "mean"): mean_interval(gain, level),
        ("plateau_trend", "mean"): trend,
    }
    first = held.iloc[0]
    place = {name: first[name] for name in SIZE[1:]} | {"bound": _bound(gain, trend)}
    nothing = {"value": np.nan, "se": np.nan, "lo": np.nan, "hi": np.nan, "n": 0}
    unfilled = "no data set is twice what was memorized of it; add larger ones"
    parts = []
    for (metric, estimator), told in made.items():
        told = nothing | {"reason": ""} | (told if len(full) else {"reason": unfilled})
        beside = place | {
            "estimator": estimator,
            "se": told.pop("se"),
            "reason": told.pop("reason"),
        }
        parts.append(
            rows(metric, told.pop("value"), run=str(first["run"]), step=int(first["step"]),
                 group="random", beside=beside, **told)
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def fills(held: pd.DataFrame) -> list[int]:
    """Numbers of sequences of which, in the mean over seeds, half or less is memorized."""
    mean = held.groupby("sequences")[["value", "dataset_bits"]].mean()
    return mean.index[mean["dataset_bits"] >= FULL * mean["value"]].tolist()


def mean_interval(value: Float[np.ndarray, " run"], level: float) -> dict:
    """Mean, standard error and Student's t interval; 1, 2, 3 at .95 gives 2 -+ 2.484138.

    A single run has no interval, and says so.
    """
    value = value[~np.isnan(value)]
    if len(value) == 0:
        return {"reason": "no run has a value"}
    if len(value) == 1:
        return {"value": value[0], "n": 1, "reason": "one run: no interval"}
    se = value.std(ddof=1) / np.sqrt(len(value))
    half = stats.t.ppf((1 + level) / 2, len(value) - 1) * se
    mean = value.mean()
    return {"value": mean, "se": se, "lo": mean - half, "hi": mean + half, "n": len(value)}


def _trend(filling: pd.DataFrame, level: float) -> dict:
    """Slope of the memorized bits over log2 of the data, as a share of their mean."""
    if filling["dataset_bits"].nunique() < 2 or len(filling) < 3:
        return {"n": len(filling), "reason": "a trend needs three runs on two sizes of data"}
    fit = stats.linregress(np.log2(filling["dataset_bits"]), filling["value"])
    mean = filling["value"].mean()
    half = stats.t.ppf((1 + level) / 2, len(filling) - 2) * fit.stderr
    slope, half, se = fit.slope / mean, half / mean, fit.stderr / mean
    return {"value": slope, "se": se, "lo": slope - half, "hi": slope + half, "n": len(filling)}


def saturating(
    log_ceiling: Float[np.ndarray, " run"], log_capacity: float, log_k: float
) -> Float[np.ndarray, " run"]:
    """Logarithm of ``(K^-k + C^-k)^(-1/k)``: K where the data are small, C where they are large.

    At K = C it is ``log C - log(2) / k``.
    """
    k = np.exp(log_k)
    return -np.logaddexp(-k * log_ceiling, -k * log_capacity) / k


def _curve(held: pd.DataFrame, level: float) -> dict:
    held = held[held["value"] > 0]
    if len(held) < 4:
        return {"n": len(held), "reason": "the curve needs four runs that memorized something"}
    x, y = np.log(held["ceiling_bits"].to_numpy()), np.log(held["value"].to_numpy())
    found, _, told, _, _ = optimize.curve_fit(
        saturating, x, y, p0=(y.max(), np.log(4.0)), full_output=True,
        bounds=([0, 0], [np.inf, np.log(64.0)]),
    )  # fmt: skip
    se = robust_error(optimize.approx_fprime(found, lambda at: saturating(x, *at)), told["fvec"])[0]
    capacity = np.exp(found[0])
    half = stats.t.ppf((1 + level) / 2, len(held) - 2) * se
    low, high = capacity * np.exp(-half), capacity * np.exp(half)
    return {"value": capacity, "se": capacity * se, "lo": low, "hi": high, "n": len(held)}


def robust_error(
    jacobian: Float[np.ndarray, "run parameter"], residual: Float[np.ndarray, " run"]
) -> Float[np.ndarray, " parameter"]:
    """Standard errors that do not take all runs to be equally noisy (HC3: MacKinnon & White 1985).

    Runs on small data agree to a thousandth, runs on the plateau do not: one common variance would
    make the interval too narrow. For the mean of 1, 2, 3 they are sqrt(1/2): each of the outer
    two, without which the mean moves by 1/2, counts ``(1/3 * 1 / (2/3))^2 = 1/4``.
    """
    bread = np.linalg.pinv(jacobian.T @ jacobian)
    leverage = np.einsum("ij,jk,ik->i", jacobian, bread, jacobian)
    weighed = jacobian * (residual / np.maximum(1 - leverage, 1e-9))[:, None]
    return np.sqrt(np.diag(bread @ (weighed.T @ weighed) @ bread))


def _bound(gain: Float[np.ndarray, " run"], trend: dict) -> str:
    if not len(gain):
        return ""
    if np.isnan(gain).any() or gain.mean() > TOLERANCE:
        return f"lower bound: doubling the updates still gained {np.nanmean(gain):.1%}"
    if trend.get("hi", 0.0) < 0 and trend["value"] < -TOLERANCE:
        return f"lower bound: doubling the data lost {-trend['value']:.1%}"
    if trend.get("lo", 0.0) > 0 and trend["value"] > TOLERANCE:
        return f"lower bound: doubling the data still gained {trend['value']:.1%}"
    return ""


def bits_per_parameter(capacities: pd.DataFrame, *, level: float = LEVEL) -> pd.DataFrame:
    """Capacity over parameters: model by model, and the slope through all of them.

    The slope is the least-squares line's through the capacities (of two models, their secant):
    with ``a_i = (P_i - mean P) / sum (P_j - mean P)^2`` it is ``sum a_i C_i`` and its standard error
    ``sqrt(sum a_i^2 se_i^2)``, with Student's t at Welch and Satterthwaite's degrees of freedom.
    The interval tells how well each capacity is known, not whether a line is the right curve.

    Args:
        capacities: What :func:`fit_capacity` gives; its estimator ``mean`` is taken.
        level: Of the intervals.

    Returns:
        Rows of ``bits_per_parameter``, twice: ``count`` "all" takes all trainable parameters, as
        Morris et al. do, "non_embedding" leaves both embeddings out. ``of`` "model" is C / P of the
        row's ``run``, "slope" the line, with ``run`` "all" and a point it passes through in
        ``at_parameters`` and ``at_bits``. A ratio of lower bounds is one too; a slope through them
        may lie on either side, and ``bound`` says so. NaN with a reason where there are no two
        models or a capacity is missing.

    Raises:
        InputError: ``level`` outside 0 to 1, or not the table of :func:`fit_capacity`.
    """
    if not 0 < level < 1:
        raise InputError(f"bits_per_parameter: level is {level}, it must lie between 0 and 1")
    capacities = validate(capacities)
    known = capacities["metric"] == "capacity_bits"
    if not known.any() or "estimator" not in capacities.columns:
        raise InputError("bits_per_parameter: no capacity_bits; give the table of fit_capacity")
    sizes = capacities[known & (capacities["estimator"] == "mean")].sort_values("parameters")
    parts = []
    for count, column in (("all", "parameters"), ("non_embedding", "non_embedding")):
        p = sizes[column].to_numpy(dtype=float)
        ratio = rows(
            "bits_per_parameter", sizes["value"].to_numpy() / p,
            run=sizes["run"].astype(str), step=sizes["step"], group="random",
            lo=sizes["lo"].to_numpy() / p, hi=sizes["hi"].to_numpy() / p, n=sizes["n"],
            beside={"of": "model", "count": count, "at_parameters": p, "at_bits": sizes["value"],
                    "bound": sizes["bound"].astype(str), "se": sizes["se"].to_numpy() / p,
                    "reason": sizes["reason"].astype(str)},
        )  # fmt: skip
        parts += [ratio, _slope(sizes, p, count, level)]
    return validate(pd.concat(parts, ignore_index=True))


def _slope(sizes: pd.DataFrame, p: Float[np.ndarray, " model"], count: str, level: float):
    c, se = sizes["value"].to_numpy(), sizes["se"].to_numpy()
    low = sizes["bound"].astype(str) != ""
    told = {"value": np.nan, "lo": np.nan, "hi": np.nan, "se": np.nan, "reason": ""}
    if len(np.unique(p)) < 2:
        told["reason"] = "a slope needs models of two sizes"
    elif np.isnan(c).any():
        told["reason"] = "a model's capacity is missing"
    else:
        told |= weighted_slope(p, c, se, sizes["n"].to_numpy(), level)
    beside = {"of": "slope", "count": count, "at_parameters": p.mean(), "at_bits": c.mean()}
    beside["bound"] = "between lower bounds: either side" if low.any() else ""
    beside |= {name: told.pop(name) for name in ("se", "reason")}
    return rows("bits_per_parameter", told.pop("value"), run="all", step=int(sizes["step"].max()),
                group="random", n=int(sizes["n"].sum()), beside=beside, **told)  # fmt: skip


def weighted_slope(
    p: Float[np.ndarray, " model"],
    c: Float[np.ndarray, " model"],
    se: Float[np.ndarray, " model"],
    n: Float[np.ndarray, " model"],
    level: float,
) -> dict:
    """Least-squares slope of ``c`` over ``p`` with the errors of ``c`` carried through.

    P = (1, 3), C = (2, 8), se = (.3, .4): the secant is 3, its error sqrt(.09 + .16) / 2 = .25.
    """
    away = p - p.mean()
    a = away / (away**2).sum()
    slope, parts = (a * c).sum(), a**2 * se**2
    told = {"value": slope, "se": np.sqrt(parts.sum())}
    if np.isnan(told["se"]):
        return told | {"reason": "a model has one run: no interval"}
    if told["se"] == 0:
        return told | {"lo": slope, "hi": slope}
    df = parts.sum() ** 2 / (parts**2 / (n - 1)).sum()
    half = stats.t.ppf((1 + level) / 2, df) * told["se"]
    return told | {"lo": slope - half, "hi": slope + half}
