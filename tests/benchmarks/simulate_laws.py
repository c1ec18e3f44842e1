"""Laws and shrinkage against known answers: ``python -m tests.benchmarks.simulate_laws [CURVES]``.

Items are drawn around each law again and again, all with its shape and each with its own size, and
the mean curve is fitted. A band covers where the curve that the items were drawn around lies in it,
averaged over times; a law is ruled out where it and all laws nested in it weigh below .05.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pandas as pd

from workbench.stats.laws import LAWS, fit_forgetting, half_life
from workbench.stats.shrinkage import shrink_forgetting
from workbench.table import InputError, rows

TIMES = np.array([1, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100, 200, 300, 500, 700, 1000.0])
TRUTH = {
    "exponential": (3.0, 150.0),
    "exponential_floor": (2.5, 60.0, 0.8),
    "power": (3.0, 0.2, 0.5),
    "wickelgren": (3.0, 0.5, 0.2, 0.002),
    "logarithm": (3.0, 0.5, 5.0),
    "semilog": (3.0, 0.8),
    "ebbinghaus_savings": (3.0, 1.84, 1.25),
    "shifted_power": (-0.3, 20.0, 0.3, 4.0),
}
NESTED = {  # laws that are a limit or a case of the law
    "exponential_floor": ("exponential",),
    "power": ("exponential",),
    "wickelgren": ("power", "exponential"),
    "logarithm": ("semilog",),
    "shifted_power": ("logarithm", "semilog"),
}


@dataclass(frozen=True)
class Design:
    name: str
    items: int = 40
    sizes: float = 0.3  # relative spread of the items' sizes
    noise: float = 0.3  # of a point, in units in which the law starts at 3
    lasting: float = 0.0  # correlation of an item's errors between neighbouring times
    ends: float = 0.0  # share of the items that are seen only up to a random time


DESIGNS = (
    Design("40 items"),
    Design("40 items, half of them lost to sight at a random time", ends=0.5),
    Design("40 items, errors that last (.7 from one time to the next)", lasting=0.7),
    Design("12 items", items=12),
    Design("5 items", items=5),
)


def draw(law: str, design: Design, curves: int, seed: int) -> pd.DataFrame:
    """Item rows of many curves of one law, a group each."""
    rng = np.random.default_rng([seed, sorted(TRUTH).index(law)])
    shape = (curves, design.items, len(TIMES))
    error = rng.normal(size=shape)
    for at in range(1, len(TIMES)):
        error[:, :, at] *= np.sqrt(1 - design.lasting**2)
        error[:, :, at] += design.lasting * error[:, :, at - 1]
    size = 1 + design.sizes * rng.normal(size=(*shape[:2], 1))
    value = size * LAWS[law].curve(TIMES, *TRUTH[law]) + design.noise * error
    last = rng.integers(4, len(TIMES) + 1, size=shape[:2])
    ends = np.arange(design.items) < design.ends * design.items
    value[(np.arange(len(TIMES)) >= last[..., None]) & ends[:, None]] = np.nan
    curve, item, at = (each.ravel() for each in np.indices(shape))
    table = rows("memorization", value.ravel(), run="r", beside={"lag": TIMES[at]})
    names = np.array([f"c{number:04d}" for number in range(max(shape))])
    table["group"], table["item"] = (pd.Categorical.from_codes(c, names) for c in (curve, item))
    return table[table["value"].notna()]


def chosen(law: str, table: pd.DataFrame) -> dict[str, float]:
    """How often the law weighs most (or one that it is nested in does), and how often it is ruled out."""
    fits = fit_forgetting(table, laws=list(LAWS), draws=0)
    weight = fits[fits["metric"] == "weight"].pivot(index="group", columns="law", values="value")
    family = [law, *NESTED.get(law, ())]
    over = [law, *(other for other, inner in NESTED.items() if law in inner)]
    most = weight.idxmax(axis=1)
    return {
        "weighs most": (most == law).mean(),
        "or a law that holds it": most.isin(over).mean(),
        "or one it holds": most.isin(over + family).mean(),
        "ruled out": (weight[family].max(axis=1) < 0.05).mean(),
        "ruled out itself": (weight[law] < 0.05).mean(),
        "median weight": weight[law].median(),
    }


def covered(law: str, table: pd.DataFrame, draws: int) -> dict[str, float]:
    """Coverage of the band, the half-life and the threshold, and how far the half-life is off."""
    fits = fit_forgetting(table, laws=[law], draws=draws)
    truth = TRUTH[law]

    def share(metric: str, wanted) -> float:
        part = fits[fits["metric"] == metric]
        wanted = wanted(part["lag"].to_numpy()) if callable(wanted) else wanted
        return ((part["lo"] <= wanted) & (part["hi"] >= wanted)).mean()

    half = float(half_life(LAWS[law], np.array([truth]))[0])
    lives = fits[fits["metric"] == "half_life"]["value"]
    found = {
        "band": share("fitted", lambda t: LAWS[law].curve(t, *truth)),
        "half-life": share("half_life", half),
        "half-life, median ratio": (lives / half).median(),
        "quartiles": (lives / half).quantile(0.75) / (lives / half).quantile(0.25),
    }
    if law == "semilog":
        found["threshold"] = share("learnability_threshold", 10 ** (truth[0] / truth[1]))
    return found


def refused() -> dict[str, bool]:
    """Ranges too short to tell laws apart, of each law."""
    found = {}
    for law in LAWS:
        table = draw(law, DESIGNS[0], 1, 0)
        for name, part in (
            ("four times", table[table["lag"] <= 5]),
            ("less than a decade", table[table["lag"].between(20, 150)]),
        ):
            try:
                fit_forgetting(part, draws=0)
            except InputError:
                found[f"{law}, {name}"] = True
            else:
                found[f"{law}, {name}"] = False
    return found


def lines(items: int, noise: float, seed: int, sets: int = 100) -> dict[str, float]:
    """Shrunk estimates of items' decay constants against lines through each item's own points."""
    t = np.array([1, 2, 5, 10, 20, 50, 100.0])
    z = np.log10(t)
    found = []
    for each in range(sets):
        rng = np.random.default_rng([seed, each])
        true = rng.multivariate_normal([3, 1], [[0.25, 0.06], [0.06, 0.04]], items)
        value = true[:, :1] - true[:, 1:] * z + noise * rng.normal(size=(items, len(t)))
        value[:, -2:][rng.random((items, 2)) < 0.3] = np.nan
        name = np.repeat([f"i{number:03d}" for number in range(items)], len(t))
        table = rows("memorization", value.ravel(), run="r", item=name,
                     beside={"lag": np.tile(t, items)})  # fmt: skip
        got = shrink_forgetting(table)
        slope = got[got["metric"] == "param_b"]
        part = slope[slope["estimate"] == "shrunk"].set_index("item")
        alone = slope[slope["estimate"] == "alone"].set_index("item")["value"]
        true_b = pd.Series(true[:, 1], [f"i{number:03d}" for number in range(items)])
        if part["value"].isna().any():
            found.append({"not fitted": 1.0})
            continue
        population = slope[slope["estimate"] == "population"].iloc[0]
        found.append(
            {
                "not fitted": 0.0,
                "error, shrunk": ((part["value"] - true_b) ** 2).mean(),
                "error, alone": ((alone - true_b) ** 2).mean(),
                "items covered": ((part["lo"] <= true_b) & (true_b <= part["hi"])).mean(),
                "population covered": population["lo"] <= 1 <= population["hi"],
            }
        )
    mean = pd.DataFrame(found).astype(float).mean()
    return {name: round(value, 4) for name, value in mean.items()}


def main(curves: int, draws: int = 400) -> None:
    print("short ranges refused:", all(refused().values()))
    for design in DESIGNS:
        print(f"\n{design.name}: {curves} curves a law, intervals at .95 from {draws} draws")
        found = {}
        for law in LAWS:
            table = draw(law, design, curves, 0)
            found[law] = chosen(law, table) | covered(law, table, draws)
        table = pd.DataFrame(found).T
        print(pd.concat([table, table.mean().to_frame("all").T]).round(3).to_string())
    for items, noise in ((12, 0.4), (40, 0.4), (40, 0.1), (150, 0.8)):
        print(f"\nlines of {items} items, noise {noise}: {lines(items, noise, 0)}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 300)
