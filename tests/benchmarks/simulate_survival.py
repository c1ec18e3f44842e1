"""Coverage, size and bias of survival estimates: ``python -m tests.benchmarks.simulate_survival [PANELS]``.

Lifetimes with a known law are drawn again and again, censored, and looked at on a grid. A band of
one point covers where it holds the true share; a test of groups that are alike rejects in 5 %; an
interval of a ratio covers the true ratio in 95 %. Standard errors of all shares are printed.
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
from scipy import stats

from workbench.stats.survival import compare_survival, fit_survival, survival_curve
from workbench.table import rows, validate

GRID = np.array([0.0, 1, 2, 5, 10, 20, 50, 100])  # lags of the suite's checkpoints
BETA = 0.5  # log hazard ratio, or log time ratio, of the covariate


def grid_times(time, rng: np.random.Generator, *, keep: float = 1.0):
    """The last look that found it and the first that did not; each look is made with a chance."""
    lo, hi = np.zeros(len(time)), np.full(len(time), np.inf)
    for i, each in enumerate(time):
        looks = np.append(0.0, GRID[1:][rng.random(len(GRID) - 1) < keep])
        after = np.searchsorted(looks, each)  # looks[after - 1] < each <= looks[after]
        lo[i] = looks[max(after - 1, 0)]
        hi[i] = looks[after] if after < len(looks) else np.inf
    return lo, hi


def table_of(value, lost, lo, hi, **columns) -> pd.DataFrame:
    beside = {"event": np.where(lost, "lost", "kept"), "exposed": 0.0, **columns}
    names = [f"i{i}" for i in range(len(value))]
    made = rows(
        "survival_time", value, run="r", group="seen", item=names, lo=lo, hi=hi, beside=beside
    )
    return validate(made)


def exact(time, censor, **columns) -> pd.DataFrame:
    """Lifetimes seen to the moment, and censored at given times."""
    lost, value = time <= censor, np.minimum(time, censor)
    return table_of(value, lost, value, np.where(lost, value, np.inf), **columns)


def simulate(n: int, rng: np.random.Generator, *, law: str = "weibull"):
    """Lifetimes of a law, stretched by ``exp(BETA x)``, on the grid."""
    x = rng.normal(size=n)
    error = {
        "weibull": np.log(rng.exponential(size=n)) / 0.9,
        "lognormal": rng.normal(size=n),
        "loglogistic": rng.logistic(size=n) / 1.5,
    }[law]
    lo, hi = grid_times(np.exp(2.0 + BETA * x + error), rng)
    lost = np.isfinite(hi)
    return table_of(np.where(lost, hi, lo).clip(1e-3), lost, lo, hi, x=x), x


def likelihood_aft(theta, law: str, x, lo, hi) -> float:
    """Of intervals, negative: theta holds intercept, coefficient and the logarithm of the shape."""
    scale, shape = np.exp(theta[0] + theta[1] * x), np.exp(theta[2])
    frozen = {
        "weibull": lambda: stats.weibull_min(shape, scale=scale),
        "lognormal": lambda: stats.lognorm(shape, scale=scale),
        "loglogistic": lambda: stats.fisk(shape, scale=scale),
    }[law]()
    return -np.log(np.maximum(frozen.sf(lo) - frozen.sf(hi), 1e-300)).sum()


def many(panels: int, n: int, draw) -> pd.DataFrame:
    """Panels in one table, told apart by run: its checks are then made once for all of them."""
    parts = [draw(n).assign(run=str(panel)) for panel in range(panels)]
    return pd.concat(parts, ignore_index=True)


def band_coverage(panels: int, n: int, *, seed: int, at=(3.0, 10.0, 25.0), shape=1.0) -> float:
    """Share of bands, at fixed times, that hold the true share; Weibull, a third censored."""
    rng = np.random.default_rng(seed)
    table = many(panels, n, lambda n: exact(15 * rng.weibull(shape, n), rng.uniform(5, 60, n)))
    curves, inside = survival_curve(table, by=["run"]), []
    curves = curves[curves["metric"] == "survival"].sort_values("time")
    for _, curve in curves.groupby("run", observed=True):
        for time in at:
            row = curve[curve["time"] <= time].iloc[-1]
            truth = np.exp(-((time / 15) ** shape))
            if np.isfinite(row["lo"]):  # no band before the first loss and after the last
                inside.append(row["lo"] <= truth <= row["hi"])
    return float(np.mean(inside))


def median_coverage(panels: int, n: int, *, seed: int) -> float:
    """Share of intervals of the median that hold it, of exponential lifetimes."""
    rng = np.random.default_rng(seed)
    table = many(panels, n, lambda n: exact(rng.exponential(15, n), rng.uniform(5, 60, n)))
    found = survival_curve(table, by=["run"])
    found, truth = found[found["metric"] == "median_survival"], 15 * np.log(2)
    return float((~(found["lo"] > truth) & ~(found["hi"] < truth)).mean())


def log_rank_size(panels: int, n: int, *, seed: int, groups: int = 2, grid: bool = False) -> float:
    """Share of panels with alike groups whose test rejects at .05."""
    rng = np.random.default_rng(seed)
    rejected = []
    for _ in range(panels):
        kind = np.array([f"g{i % groups}" for i in range(n)])
        time = rng.exponential(15, n)
        if grid:
            lo, hi = grid_times(time, rng)
            lost = np.isfinite(hi)
            table = table_of(np.where(lost, hi, lo), lost, lo, hi, kind=kind)
        else:
            table = exact(time, rng.uniform(5, 60, n), kind=kind)
        got = compare_survival(table, by="kind")
        p = got[(got["metric"] == "p_value_log_rank") & (got["comparison"] == "all")]
        rejected.append(p["value"].iloc[0] < 0.05)
    return float(np.mean(rejected))


def cox_coverage(panels: int, n: int, *, seed: int, grid: bool = False) -> float:
    """Share of intervals of the hazard ratio that hold ``exp(BETA)``."""
    rng = np.random.default_rng(seed)
    inside = []
    for _ in range(panels):
        x = rng.normal(size=n)
        time = rng.exponential(15 * np.exp(-BETA * x))
        if grid:
            lo, hi = grid_times(time, rng)
            lost = np.isfinite(hi)
            table = table_of(np.where(lost, hi, lo), lost, lo, hi, x=x)
        else:
            table = exact(time, rng.uniform(5, 60, n), x=x)
        row = fit_survival(table, ["x"], draws=0).iloc[0]
        inside.append(row["lo"] <= np.exp(BETA) <= row["hi"])
    return float(np.mean(inside))


def aft_coverage(panels: int, n: int, law: str, *, seed: int) -> float:
    """Share of intervals of the time ratio that hold ``exp(BETA)``, on the grid."""
    rng = np.random.default_rng(seed)
    inside = []
    for _ in range(panels):
        row = fit_survival(simulate(n, rng, law=law)[0], ["x"], law=law, draws=0).iloc[0]
        inside.append(row["lo"] <= np.exp(BETA) <= row["hi"])
    return float(np.mean(inside))


def grid_bias(panels: int, n: int, *, seed: int, keep: float = 1.0) -> pd.DataFrame:
    """Mean error of the share at times between looks, and of the median, of both estimates."""
    rng = np.random.default_rng(seed)
    at, found = np.array([3.0, 7.0, 15.0, 35.0]), []
    for _ in range(panels):
        lo, hi = grid_times(rng.exponential(15, n), rng, keep=keep)
        lost = np.isfinite(hi)
        table = table_of(np.where(lost, hi, lo), lost, lo, hi)
        for method in ("kaplan_meier", "turnbull"):
            got = survival_curve(table, method=method, draws=0)
            curve = got[got["metric"] == "survival"].sort_values("time")
            if method == "turnbull":
                share = np.interp(at, curve["time"], curve["value"])
            else:
                place = np.searchsorted(curve["time"], at, side="right") - 1
                share = curve["value"].to_numpy()[place]
            half = got.loc[got["metric"] == "median_survival", "value"].iloc[0]
            errors = dict(zip([f"S({t:g})" for t in at], share - np.exp(-at / 15), strict=True))
            found.append({"method": method, **errors, "median": half - 15 * np.log(2)})
    return pd.DataFrame(found).groupby("method").agg(["mean", "sem"]).round(4)


def main(panels: int = 300) -> None:
    def told(name: str, share: float) -> None:
        print(f"{name}: {share:.3f} (+- {np.sqrt(share * (1 - share) / panels):.3f})", flush=True)

    for n in (20, 100):
        told(f"Kaplan-Meier bands cover, {n} items", band_coverage(panels, n, seed=n))
        told(f"  intervals of the median cover, {n} items", median_coverage(panels, n, seed=n))
    told(
        "  the same bands, Weibull of shape .6, 50 items",
        band_coverage(panels, 50, seed=7, shape=0.6),
    )
    for n, groups in ((30, 2), (90, 3)):
        told(
            f"log-rank rejects, {n} items in {groups} groups",
            log_rank_size(panels, n, seed=n, groups=groups),
        )
        told("  the same on the grid", log_rank_size(panels, n, seed=n, groups=groups, grid=True))
    for n in (40, 150):
        told(f"Cox covers, {n} items", cox_coverage(panels, n, seed=n))
        told("  the same on the grid", cox_coverage(panels, n, seed=n, grid=True))
    for law in ("weibull", "lognormal", "loglogistic"):
        told(f"{law} covers on the grid, 100 items", aft_coverage(panels // 3, 100, law, seed=1))
    for keep in (1.0, 0.5):
        print(f"\nerror on a grid of looks, each made with chance {keep:g}, 100 items")
        print(grid_bias(panels // 3, 100, seed=2, keep=keep).to_string())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
