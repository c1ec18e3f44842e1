from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.stats import t as student

from workbench.stats import shrinkage
from workbench.stats.shrinkage import (
    Lines,
    Population,
    _design,
    fit_population,
    shrink_forgetting,
    shrunk,
)
from workbench.table import InputError, rows, validate

TIMES = np.array([1, 2, 5, 10, 20, 50, 100.0])
Z = np.log10(TIMES)


def panel(value: np.ndarray, t=TIMES, **columns) -> pd.DataFrame:
    """Item rows of an [item, t] array; NaN where an item was not seen."""
    count, times = value.shape
    beside = {"lag": np.tile(t, count)}
    beside |= {name: np.repeat(column, times) for name, column in columns.items()}
    item = np.repeat([f"i{number:02d}" for number in range(count)], times)
    return rows("memorization", value.ravel(), run="r", step=9, group="g", item=item, beside=beside)


def drawn(seed: int, items: int = 30, noise: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """True (a, b) of each item around (3, 1), and noisy values on its line."""
    rng = np.random.default_rng(seed)
    true = rng.multivariate_normal([3, 1], [[0.25, 0.06], [0.06, 0.04]], items)
    return true, true[:, :1] - true[:, 1:] * Z + noise * rng.normal(size=(items, len(Z)))


def of(table: pd.DataFrame, estimate: str, metric: str) -> pd.DataFrame:
    return table[(table["estimate"] == estimate) & (table["metric"] == metric)]


def test_prediction_by_hand():
    # One point an item at z = 0, so the slope plays no part: the items' variance is 3, the noise 1,
    # and what an item's point is above the mean 2 counts by 3 / (3 + 1): 6 gives 2 + .75 * 4 = 5.
    # Error 3 - 3 * 3/4 = .75, and the quarter of the mean's own error .16 / 16 = .01.
    lines = Lines(np.array([6.0, 2.0]), np.zeros(2), np.arange(2), np.array(["i", "j"]),
                  np.empty((2, 0)), ())  # fmt: skip
    known = Population(np.array([2.0, 1.0]), np.diag([0.16, 0.0]), np.diag([3.0, 0.0]), 1.0)
    value, error = shrunk(lines, known)
    np.testing.assert_allclose(value, [[5.0, 1.0], [2.0, 1.0]])
    np.testing.assert_allclose(error[0], [[0.76, 0.0], [0.0, 0.0]], atol=1e-12)


def test_prediction_against_the_mixed_model_equations():
    """Unbalanced, with a feature: Henderson's equations for all items at once, inverted whole."""
    rng = np.random.default_rng(0)
    item = np.repeat(np.arange(7), [1, 2, 3, 4, 5, 6, 7])
    z = rng.uniform(0, 2, len(item))
    feature = rng.normal(size=(7, 1))
    lines = Lines(
        rng.normal(size=len(item)), z, item, np.arange(7), feature - feature.mean(), ("f",)
    )
    between, noise = np.array([[0.8, 0.2], [0.2, 0.3]]), 0.5
    random, fixed = _design(lines, z)
    whole = np.zeros((len(item), 14))
    for row, each in enumerate(item):
        whole[row, 2 * each : 2 * each + 2] = random[row]
    both = np.hstack([fixed, whole])
    equations = both.T @ both / noise
    equations[4:, 4:] += np.kron(np.eye(7), np.linalg.inv(between))
    inverse = np.linalg.inv(equations)
    solved = inverse @ both.T @ lines.value / noise
    known = Population(solved[:4], inverse[:4, :4], between, noise)
    value, error = shrunk(lines, known)
    for each in range(7):
        combine = np.zeros((2, 18))
        combine[:, :4] = np.hstack([np.eye(2), lines.features[each, 0] * np.eye(2)])
        combine[:, 4 + 2 * each : 6 + 2 * each] = np.eye(2)
        np.testing.assert_allclose(value[each], combine @ solved, rtol=1e-9)
        np.testing.assert_allclose(error[each], combine @ inverse @ combine.T, rtol=1e-9)


def test_balanced_items_against_the_closed_form():
    """All items at the same t: the likelihood needs only the items' own lines and their noise.

    Own lines are normal with covariance S = G + v (Z'Z)^-1, and independent of the residuals, so
    minus twice the restricted likelihood is N (T - 2) log v + RSS / v + (N - 1)(log |S| +
    tr(S^-1 C)), C their covariance; the prior takes log |G / v| off that. Its best, found by brute
    force, gives the prediction m + G S^-1 (own - m) with error G - G S^-1 G + (I - W) S/N (I - W)'.
    """
    _, value = drawn(0)
    count, times = value.shape
    design = np.stack([np.ones(times), -Z], axis=1)
    gram = np.linalg.inv(design.T @ design)
    own = value @ design @ gram
    rss, cov, mean = ((value - own @ design.T) ** 2).sum(), np.cov(own.T), own.mean(axis=0)

    def parts(p):
        root = np.array([[np.exp(p[1]), 0], [p[2], np.exp(p[3])]])
        return np.exp(p[0]), root @ root.T

    def minus_twice(p):
        noise, between = parts(p)
        total = between + noise * gram
        found = count * (times - 2) * np.log(noise) + rss / noise
        found += (count - 1) * np.linalg.slogdet(total)[1]
        found += (count - 1) * np.trace(np.linalg.solve(total, cov))
        return found - np.linalg.slogdet(between / noise)[1]

    best = minimize(minus_twice, [-2, -1, 0, -1], method="Nelder-Mead",
                    options={"xatol": 1e-9, "fatol": 1e-10, "maxiter": 9999, "maxfev": 9999})  # fmt: skip
    noise, between = parts(best.x)
    total = between + noise * gram
    share = between @ np.linalg.inv(total)
    line = mean + (own - mean) @ share.T
    error = between - share @ between + (np.eye(2) - share) @ total @ (np.eye(2) - share).T / count

    got = validate(shrink_forgetting(panel(value)))
    for column, metric in enumerate(("param_a", "param_b")):
        mine = of(got, "shrunk", metric)
        np.testing.assert_allclose(mine["value"], line[:, column], rtol=2e-4)
        np.testing.assert_allclose(mine["se"], np.sqrt(error[column, column]), rtol=2e-3)
        alone = of(got, "alone", metric)
        np.testing.assert_allclose(alone["value"], own[:, column])
        population = of(got, "population", metric).iloc[0]
        np.testing.assert_allclose(population["value"], mean[column], rtol=1e-6)
        np.testing.assert_allclose(
            population["se"], np.sqrt(total[column, column] / count), rtol=2e-3
        )
        half = student.ppf(0.975, count - 1) * population["se"]
        np.testing.assert_allclose(population["hi"] - population["value"], half)
        np.testing.assert_allclose(mine["hi"] - mine["value"], student.ppf(0.975, 29) * mine["se"])
    sd = of(got, "spread", "item_sd").set_index("of")["value"]
    np.testing.assert_allclose(sd, np.sqrt(np.diag(between)), rtol=2e-3)
    np.testing.assert_allclose(of(got, "spread", "residual_sd")["value"], np.sqrt(noise), rtol=1e-3)
    np.testing.assert_allclose(
        of(got, "spread", "correlation")["value"], between[0, 1] / np.prod(sd), atol=5e-3
    )
    assert got.attrs["shrinkage"] == {"group=g": "fitted"}
    assert (got["law"] == "semilog").all()


def test_lines_through_own_points_by_hand():
    # Values 3, 2, 0 at t = 1, 10, 100, so z = 0, 1, 2: slope -1.5, mean 5/3 at z = 1, so a =
    # 3.1666667 and b = 1.5; residuals -1/6, 1/3, -1/6: noise 1/6 on one degree of freedom, so
    # se(b) = sqrt(1/12) = .2886751 and se(a) = sqrt(1/6 (1/3 + 1/2)) = .3726780; t_.975,1 = 12.7062.
    rng = np.random.default_rng(0)
    t = np.array([1.0, 10.0, 100.0])
    value = np.vstack([[3.0, 2.0, 0.0], 3 - np.log10(t) + rng.normal(0, 0.3, (6, 3))])
    value[1, 2], value[2, 1:] = np.nan, np.nan
    got = shrink_forgetting(panel(value, t))
    first = got[(got["item"] == "i00") & (got["estimate"] == "alone")].set_index("metric")
    np.testing.assert_allclose(first["value"], [3.1666667, 1.5], atol=1e-7)
    np.testing.assert_allclose(first["se"], [0.3726780, 0.2886751], atol=1e-7)
    np.testing.assert_allclose(first["hi"]["param_b"], 1.5 + 12.7062047 * 0.2886751, atol=1e-5)
    assert list(first["reason"]) == ["", ""] and list(first["n"]) == [3, 3]
    two = of(got, "alone", "param_b").set_index("item")
    np.testing.assert_allclose(two.loc["i01", "value"], value[1, 0] - value[1, 1])
    assert np.isnan(two.loc["i01", "se"]) and two.loc["i01", "reason"] == "two points: no error"
    assert np.isnan(two.loc["i02", "value"])
    assert two.loc["i02", "reason"] == "fewer than two t: no line"
    # with the others to lean on, a single point still says something
    leaning = of(got, "shrunk", "param_b").set_index("item").loc["i02"]
    assert np.isfinite(leaning["se"]) and leaning["n"] == 1
    assert got.attrs["dropped"] == 3


def test_shrunk_lines_are_nearer_the_truth():
    # Of 30 such sets the shrunk error is .53 of that of the items' own lines, .1 give or take for
    # four of them, and intervals hold .94 of 120 slopes: above .8 or below .85 has odds of about
    # .3 % each.
    off, inside = {"shrunk": [], "alone": []}, []
    for seed in range(1, 5):
        true, value = drawn(seed)
        got = shrink_forgetting(panel(value))
        for estimate, errors in off.items():
            errors.append((of(got, estimate, "param_b")["value"].to_numpy() - true[:, 1]) ** 2)
        part = of(got, "shrunk", "param_b")
        inside.append((part["lo"] <= true[:, 1]) & (true[:, 1] <= part["hi"]))
    assert np.mean(off["shrunk"]) < 0.8 * np.mean(off["alone"])
    assert np.mean(inside) >= 0.85


def test_features_move_the_line():
    """Exact lines: twice the copies add .5 to a and .25 to b; strings lose 1 more per tenfold."""
    rng = np.random.default_rng(0)
    copies = np.tile([0.0, 1, 2, 3], 6)
    kind = np.repeat(["passage", "string"], 12)
    a = 3 + 0.5 * copies
    b = 1 + 0.25 * copies + (kind == "string")
    value = a[:, None] - b[:, None] * Z + 1e-3 * rng.normal(size=(24, len(Z)))
    got = shrink_forgetting(
        panel(value, log2_copies=copies, kind=kind), fixed=("log2_copies", "kind")
    )
    effect = got[got["estimate"] == "effect"].set_index(["of", "metric"])["value"]
    np.testing.assert_allclose(effect["log2_copies"], [0.5, 0.25], atol=2e-3)
    np.testing.assert_allclose(effect["kind: string - passage"], [0.0, 1.0], atol=2e-3)
    # at the average item: 3 + .5 * 1.5, and 1 + .25 * 1.5 + 1/2
    average = got[got["estimate"] == "population"].set_index("metric")["value"]
    np.testing.assert_allclose(average, [3.75, 1.875], atol=2e-3)
    np.testing.assert_allclose(of(got, "shrunk", "param_b")["value"], b, atol=5e-3)


def test_offset_makes_room_for_lag_zero_and_units_cancel():
    _, value = drawn(2)
    zero = shrink_forgetting(panel(value, TIMES - 1), offset=1.0)
    plain = shrink_forgetting(panel(value))
    np.testing.assert_allclose(zero["value"], plain["value"])
    large = shrink_forgetting(panel(value * 1000))
    scaled = plain["metric"] != "correlation"
    np.testing.assert_allclose(
        large["value"], plain["value"] * np.where(scaled, 1000, 1), rtol=1e-3
    )


def test_sets_are_fitted_apart():
    _, value = drawn(3)
    both = pd.concat([panel(value[:15]), panel(value[15:] + 2).assign(group="h")])
    got = shrink_forgetting(both)
    alone = shrink_forgetting(panel(value[:15]))
    np.testing.assert_allclose(got[got["group"] == "g"]["value"], alone["value"])
    assert list(got.attrs["shrinkage"]) == ["group=g", "group=h"]


def test_a_fit_that_fails_leaves_reasons(monkeypatch):
    got = shrink_forgetting(panel(np.ones((6, 7))))
    assert got.attrs["shrinkage"] == {"group=g": "all values are equal: there is nothing to fit"}
    model = got[got["estimate"] != "alone"]
    assert model["value"].isna().all()
    assert set(model["reason"]) == {"all values are equal: there is nothing to fit"}
    assert (of(got, "alone", "param_a")["value"] == 1).all()
    said = "the mixed model did not converge"
    monkeypatch.setattr(shrinkage, "fit_population", lambda lines: (None, said))
    got = shrink_forgetting(panel(drawn(0)[1]))
    assert got[got["estimate"] == "shrunk"]["value"].isna().all()
    assert set(got[got["estimate"] == "shrunk"]["reason"]) == {said}
    assert of(got, "alone", "param_b")["value"].notna().all()


def test_items_that_do_not_differ_get_nearly_one_line():
    # 1.5 is the true slope of all; the own slopes scatter by .4 / sqrt(sum (z - mean)^2) = .223
    rng = np.random.default_rng(0)
    value = 3 - 1.5 * Z + 0.4 * rng.normal(size=(40, len(Z)))
    got = shrink_forgetting(panel(value))
    slopes = [of(got, estimate, "param_b")["value"].std() for estimate in ("shrunk", "alone")]
    assert slopes[0] < 0.4 * slopes[1]


def refused(message: str, table: pd.DataFrame, **options) -> None:
    with pytest.raises(InputError) as error:
        shrink_forgetting(table, **options)
    assert str(error.value) == message


def test_refusals():
    value = drawn(0, 6)[1]
    table = panel(value)
    refused("shrink_forgetting: group=g has 4 items, it needs at least 5", panel(value[:4]))
    refused(
        "shrink_forgetting: group=g has 2 distinct lag, it needs at least 3",
        panel(value[:, :2], TIMES[:2]),
    )
    refused(
        "shrink_forgetting: group=g has lag 0, where log10(lag + 0) is undefined; drop such rows or "
        "give an offset, such as 1",
        panel(value, TIMES - 1),
    )
    refused(
        "shrink_forgetting: group=g has lag -1, where log10(lag + 1) is undefined; drop such rows",
        panel(value, TIMES - 2),
        offset=1.0,
    )
    refused(
        "shrink_forgetting: group=g has infinite values or lag; drop such rows",
        table.assign(value=table["value"].where(table.index > 0, np.inf)),
    )
    refused(
        "shrink_forgetting: group=g has items with several rows per lag; pool them or add the "
        "coordinate that tells them apart to by",
        pd.concat([table.assign(layer=1), table.assign(layer=2)]),
    )
    refused(
        "shrink_forgetting: no column 'kind'; there are run, step, group, item, metric, value, lo, "
        "hi, n, lag",
        table,
        fixed=("kind",),
    )
    refused("shrink_forgetting: level is 95, it must lie between 0 and 1", table, level=95)
    refused(
        "shrink_forgetting: needs one run, got r, q; select one or add run to by",
        pd.concat([table, table.assign(run="q")]),
    )
    refused(
        "shrink_forgetting: no row has a value; there is nothing to fit", table.assign(value=np.nan)
    )
    refused(
        "shrink_forgetting: group=g has items with none or several values of 'copies'; it must be "
        "known and one an item",
        table.assign(copies=np.arange(len(table))),
        fixed=("copies",),
    )
    refused(
        "shrink_forgetting: group=g cannot tell kind, copies apart: one is constant, or they go "
        "together; leave one out",
        panel(value, kind=list("aabbab"), copies=[1, 1, 2, 2, 1, 2]),
        fixed=("kind", "copies"),
    )
    refused(
        "shrink_forgetting: needs rows of one metric, got memorization, retention; select one first",
        pd.concat([table, table.assign(metric="retention")]),
    )


def test_population_of_statsmodels_without_the_prior(monkeypatch):
    """With the prior's weight near 0 and clear differences it is plain REML: the moment estimates."""
    _, value = drawn(5, 40, 0.1)
    monkeypatch.setattr(shrinkage, "WISHART", 1e-9)
    item = np.repeat(np.arange(40), len(Z))
    lines = Lines(value.ravel(), np.tile(Z, 40), item, np.arange(40), np.empty((40, 0)), ())
    population, says = fit_population(lines)
    design = np.stack([np.ones(len(Z)), -Z], axis=1)
    gram = np.linalg.inv(design.T @ design)
    own = value @ design @ gram
    noise = ((value - own @ design.T) ** 2).sum() / (40 * (len(Z) - 2))
    assert says == "fitted"
    np.testing.assert_allclose(population.noise, noise, rtol=1e-3)
    np.testing.assert_allclose(population.between, np.cov(own.T) - noise * gram, atol=1e-4)
