"""Time of the forgetting laws: ``python -m tests.benchmarks.bench_laws``.

Eight laws fitted to 200 groups of 40 points, and 500 bootstrap draws of eight laws for one group of
40 items, in seconds of one core and as a share of what a loop of scipy.optimize.curve_fit takes on the same
machine: one call a law, group and start, from four starts over the range of the shapes; for the
draws one call each from the fitted parameters. The loop fits a part of the groups and draws, and is
scaled up; what is compared too is how often either misses the other's least squares by 1 %.
"""

from __future__ import annotations

import time
import warnings

import numpy as np
import pandas as pd
from scipy.optimize import curve_fit

from workbench.stats.laws import LAWS, Law, fit_forgetting
from workbench.table import rows

TIMES = np.geomspace(1, 4000, 40)
STARTS = (0.2, 0.4, 0.6, 0.8)  # of the loop, places between a shape's bounds
GROUPS, DRAWS = 200, 500
LOOPED = 8  # groups and draws that the loop fits


def groups(count: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    size = 3 * (1 + 0.1 * rng.normal(size=(count, 1)))
    value = size * (1 + 0.5 * TIMES) ** -0.4 + 0.05 * rng.normal(size=(count, 40))
    name = np.repeat([f"g{number:03d}" for number in range(count)], 40)
    beside = {"lag": np.tile(TIMES, count)}
    return rows("memorization", value.ravel(), run="r", group=name, beside=beside)


def items(count: int = 40) -> pd.DataFrame:
    table = groups(count)
    return table.assign(item=table["group"], group="g")


def looped(law: Law, value: np.ndarray, starts) -> float:
    """The least squares that curve_fit finds from the starts, inf where it finds none."""
    low, high = np.full((2, len(law.order)), [[-np.inf], [np.inf]])
    for index, each in enumerate(law.parameters.values()):
        if each.bounds:
            low[index], high[index] = each.bounds(TIMES[0], TIMES[-1])
    least = np.inf
    for start in starts:
        if np.isscalar(start):
            shape = np.exp(np.log(np.where(law.is_shape, low, 1)) * (1 - start)
                           + np.log(np.where(law.is_shape, high, 1)) * start)  # fmt: skip
            start = np.where(law.is_shape, shape, value[0])
        start = np.where(law.is_shape, np.clip(start, low * 1.001, high * 0.999), start)
        try:
            found, _ = curve_fit(law.curve, TIMES, value, p0=start, bounds=(low, high), maxfev=2000)
        except RuntimeError:  # it did not converge
            continue
        least = min(least, np.square(value - law.curve(TIMES, *found)).sum())
    return least


def seconds(ask) -> tuple[float, object]:
    start = time.process_time()
    made = ask()
    return time.process_time() - start, made


def main() -> None:
    warnings.filterwarnings("ignore", module="scipy")  # overflow and flat directions, as asked for
    np.seterr(all="ignore")
    fit_forgetting(groups(1), laws=list(LAWS), draws=0)  # imports

    table = groups(GROUPS)
    ours, fits = seconds(lambda: fit_forgetting(table, laws=list(LAWS), draws=0))
    values = table["value"].to_numpy().reshape(GROUPS, 40)
    alone, least = seconds(
        lambda: {
            name: [looped(law, v, STARTS) for v in values[:LOOPED]] for name, law in LAWS.items()
        }
    )
    alone *= GROUPS / LOOPED
    print(f"8 laws x {GROUPS} groups of 40 points: {ours:.1f} s, {ours / alone:.3f} of the loop's")
    error = fits[fits["metric"] == "rmse"].pivot(index="group", columns="law", values="value")
    squares = error.iloc[:LOOPED] ** 2 * 40
    theirs = pd.DataFrame(least, index=squares.index)[squares.columns]
    print(f"   worse than the loop by 1 %: {(squares > 1.01 * theirs).to_numpy().mean():.1%} of fits,"
          f" better: {(theirs > 1.01 * squares).to_numpy().mean():.1%}")  # fmt: skip

    table = items()
    ours, fits = seconds(lambda: fit_forgetting(table, laws=list(LAWS), draws=DRAWS))
    panel = table["value"].to_numpy().reshape(40, 40)
    rng = np.random.default_rng(1)
    again = [panel[rng.integers(0, 40, 40)].mean(axis=0) for _ in range(LOOPED)]
    fitted = {
        name: [fits[(fits["metric"] == f"param_{p}") & (fits["law"] == name)]["value"].item()
               for p in law.order]
        for name, law in LAWS.items()
    }  # fmt: skip
    alone, _ = seconds(
        lambda: [
            looped(law, v, [np.array(fitted[name])]) for v in again for name, law in LAWS.items()
        ]
    )
    alone *= DRAWS / LOOPED
    print(f"{DRAWS} draws of 8 laws, one group: {ours:.1f} s, {ours / alone:.3f} of the loop's")


if __name__ == "__main__":
    main()
