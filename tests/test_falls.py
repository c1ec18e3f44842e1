"""Which texts fall first, and which layers to edit: by hand, and by second routes."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import plots
from workbench.stats.falls import fall_curve, fall_ranks, item_falls, pair_orders
from workbench.stats.frontier import choose_layers, halves
from workbench.table import InputError, rows

# Prices 100, 105, 103, 120: the third edit costs .05 as well, for the way there leads past the
# second. a falls at once, b at the third, c comes back and falls again, d stands, e was never there
PRICES = {1.0: 100.0, 0.9: 105.0, 0.8: 103.0, 0.5: 120.0}
VERDICTS = {"a": (1, 0, 0, 0), "b": (1, 1, 0, 0), "c": (1, 0, 1, 0), "d": (1, 1, 1, 1),
            "e": (0, 0, 1, 0)}  # fmt: skip
DOSE = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 8.0, "e": 1.0}


def sweep(verdicts=VERDICTS, prices=PRICES, *, dose=DOSE, method="kfac", group="drip"):
    parts = []
    names = list(verdicts)
    for k, (rho, price) in enumerate(prices.items()):
        edit = {"method": "none" if rho == 1 else method, "rho": rho}
        parts.append(rows("perplexity", price, run="m", beside=edit, group="held-out"))
        beside = edit | {"dose": [dose[name] for name in names], "kind": "text"}
        values = [verdicts[name][k] for name in names]
        named = {"item": names, "run": "m", "beside": beside, "group": group}
        parts.append(rows("recitation_strict", values, **named))
        parts.append(rows("edit_distance", 1.0 - np.array(values), **named))
    return pd.concat(parts, ignore_index=True)


def test_falls_by_hand():
    falls = item_falls(sweep())
    price = falls[falls["metric"] == "fall_price"].set_index("item")
    told = price[["value", "lo", "hi"]].astype(float)
    np.testing.assert_allclose(told.loc["a"], [0.05, 0.0, 0.05])
    np.testing.assert_allclose(told.loc["b"], [0.05, 0.05, 0.05])
    np.testing.assert_allclose(told.loc["c"], [0.05, 0.0, 0.05])
    np.testing.assert_allclose(told.loc["d"], [0.2, 0.2, np.inf])
    assert "e" not in price.index and falls.attrs == {"not_recited": 1, "returned": {"kfac": 1}}
    assert price["event"].to_dict() == {"a": "lost", "b": "lost", "c": "lost", "d": "kept"}
    assert price["returned"].to_dict() == {"a": 0, "b": 0, "c": 1, "d": 0}
    removed = falls[falls["metric"] == "fall_removed"].set_index("item")
    np.testing.assert_allclose(removed.loc["b", ["value", "lo"]].astype(float), [0.2, 0.1])
    np.testing.assert_allclose(removed.loc["d", ["value", "lo"]].astype(float), [0.5, 0.5])
    assert removed["dose"].to_dict() == {"a": 1, "b": 2, "c": 4, "d": 8}
    assert set(falls["kind"]) == {"text"} and set(falls["group"]) == {"drip"}


def test_the_margin_of_the_unedited_model_comes_along():
    table = sweep()
    named = {"item": list("abcde"), "run": "m", "group": "drip"}
    parts = [
        rows("recitation_margin", values, **named, beside={"method": method, "rho": rho})
        for method, rho, values in (("none", 1.0, [1, 2, 3, 4, 5]), ("kfac", 0.9, [0, 0, 0, 0, 0]))
    ]
    pooled = rows("recitation_margin", 3, run="m", beside={"method": "none", "rho": 1.0})
    falls = item_falls(pd.concat([table, *parts, pooled]))
    margin = falls[falls["metric"] == "fall_price"].set_index("item")["margin"]
    assert margin.to_dict() == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert "margin" not in item_falls(table).columns


def test_what_comes_back_counts_from_its_last_edit_if_asked():
    last = item_falls(sweep(), end="last")
    last = last[last["metric"] == "fall_removed"].set_index("item")
    # c is recited at .8 again and no more at .5; the others are as before
    np.testing.assert_allclose(last.loc["c", ["value", "lo", "hi"]].astype(float), [0.5, 0.2, 0.5])
    np.testing.assert_allclose(last.loc["b", ["value", "lo"]].astype(float), [0.2, 0.1])
    assert last.loc["d", "event"] == "kept" and last.loc["c", "returned"] == 1


verdict = st.lists(st.integers(0, 1), min_size=3, max_size=3).map(lambda v: (1, *v))


@settings(deadline=None, max_examples=10)
@given(st.lists(verdict, min_size=1, max_size=6))
def test_falls_are_what_a_plain_loop_finds(found):
    verdicts = {f"i{k}": v for k, v in enumerate(found)}
    table = sweep(verdicts, dose=dict.fromkeys(verdicts, 1.0))
    for end in ("first", "last"):
        falls = item_falls(table, end=end).query("metric == 'fall_price'").set_index("item")
        for name, stands in verdicts.items():
            cost, dearest, at, before = list(PRICES.values()), 0.0, None, 0.0
            for k, ok in enumerate(stands):
                dearest = max(dearest, cost[k] / 100 - 1)
                if end == "last" and ok:
                    at = None
                if not ok and at is None:
                    at, lo = dearest, before
                before = dearest
            got = falls.loc[name]
            assert (got["event"] == "kept") == (at is None)
            assert got["value"] == pytest.approx(dearest if at is None else at)
            assert got["lo"] == pytest.approx(dearest if at is None else lo)


def test_several_methods_and_groups():
    both = pd.concat([sweep(), sweep(method="svd").query("method != 'none'")])
    falls = item_falls(both)
    assert set(falls["method"]) == {"kfac", "svd"} and len(falls) == 2 * 2 * 4
    more = pd.concat([sweep(), sweep({"z": (1, 1, 1, 0)}, dose={"z": 3.0}, group="seen")])
    more = more.drop_duplicates(["metric", "item", "method", "rho"])
    assert set(item_falls(more, group="seen")["item"]) == {"z"}
    assert set(item_falls(more, group=["seen", "drip"])["item"]) == set("abcdz")
    assert set(item_falls(more)["group"]) == {"seen", "drip"}


def test_falls_refuse():
    table = sweep()
    for call, message in (
        (lambda: item_falls(table, end="mean"), "item_falls: end is 'mean'; choose first or last"),
        (
            lambda: item_falls(table, group="seen"),
            "item_falls: no items of group 'seen'; there are drip",
        ),
        (
            lambda: item_falls(sweep({"e": (0, 1, 1, 1)})),
            "item_falls: the unedited model recites none of 1 items, so none can fall",
        ),
        (
            lambda: item_falls(sweep({"e": (1, 0.5, 1, 1)})),
            "item_falls: recitation_strict is no verdict; give recitation_strict or _loose",
        ),
        (
            lambda: fall_curve(item_falls(table), measure="rho"),
            "fall_curve: measure is 'rho'; choose fall_price or fall_removed",
        ),
        (
            lambda: fall_curve(table),
            "fall_curve: needs what item_falls gives, got edit_distance, perplexity, "
            "recitation_strict",
        ),
        (
            lambda: fall_ranks(item_falls(table), ["kind"]),
            "fall_ranks: kind is text; ranks need numbers",
        ),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value) == message
    for call in (
        lambda: fall_ranks(item_falls(table), ["copies"]),
        lambda: fall_curve(item_falls(table), by=["copies"]),
    ):
        with pytest.raises(InputError, match="no column 'copies'; there are run, step"):
            call()
    with (
        pytest.raises(InputError, match="no item has any of the covariates"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        fall_ranks(item_falls(table).assign(causal=np.nan), ["causal"])


def test_curve_by_hand():
    # four items by what is removed: a and c fall at .1, b at .2, d never (kept at .5):
    # S = 1/2 after .1, 1/4 after .2; half are lost at .1
    curve = fall_curve(item_falls(sweep()), measure="fall_removed")
    share = curve[curve["metric"] == "survival"].set_index("removed")["value"]
    np.testing.assert_allclose(share.index, [0, 0.1, 0.2, 0.5])
    np.testing.assert_allclose(share, [1, 0.5, 0.25, 0.25])
    middle = curve[curve["metric"] == "fall_removed"]
    assert middle["value"].item() == pytest.approx(0.1) and middle["n"].item() == 4
    assert set(curve["method"]) == {"kfac"} and set(curve["item"]) == {"all"}
    # one item a curve has no interval; the one kept has no median
    each = fall_curve(item_falls(sweep()), by=["dose"])
    middle = each[each["metric"] == "fall_price"].set_index("dose")
    assert middle["value"].round(9).to_dict() | {8.0: 0} == {
        1.0: 0.05,
        2.0: 0.05,
        4.0: 0.05,
        8.0: 0,
    }
    assert np.isnan(middle.loc[8.0, "value"])
    assert (
        middle.loc[8.0, "reason"] == "more than half stand to the last look: 0 of 1 were seen lost"
    )


def test_ranks_by_hand():
    # removed: a (0, .1], b (.1, .2], c (0, .1], d (.5, inf): a and c before b before d, a and c not
    # known. dose 1 2 4 8: ab +, cb -, ad +, bd +, cd +: (4 - 1) / 5
    falls = item_falls(sweep())
    got = fall_ranks(falls, ["dose"], measure="fall_removed")
    assert got["value"].item() == pytest.approx(3 / 5) and got["n"].item() == 4
    assert got["lo"].item() <= 0.6 <= got["hi"].item()
    # the other way round the sign turns, and equal values count in no pair but among all
    turned = fall_ranks(falls.assign(less=-falls["dose"]), ["less"], measure="fall_removed")
    assert turned["value"].item() == pytest.approx(-3 / 5)
    tied = falls.assign(
        flat=falls["item"].map({"a": 0.0, "b": 0.0, "c": 1.0, "d": 1.0}).astype(float)
    )
    # ab 0, cb -, ad +, bd +, cd 0
    assert fall_ranks(tied, ["flat"], measure="fall_removed")["value"].item() == pytest.approx(
        1 / 5
    )
    # within strata a, b | c, d: ab + and cd +
    strata = falls.assign(half=falls["item"].map({"a": "x", "b": "x", "c": "y", "d": "y"}))
    got = fall_ranks(strata, ["dose"], strata=["half"], measure="fall_removed")
    assert got["value"].item() == pytest.approx(1.0)
    level = fall_ranks(falls.assign(level=1.0), ["level"])
    assert (
        np.isnan(level["value"].item())
        and level["reason"].item() == "level is the same for all items"
    )
    # all in one interval: nothing is known
    same = fall_ranks(falls[falls["item"].isin(["a", "c"])], ["dose"], measure="fall_removed")
    assert np.isnan(same["value"].item())
    assert same["reason"].item() == "no two items are known to fall one after the other"


def test_ranks_leave_out_and_say_so():
    falls = item_falls(sweep())
    falls["causal"] = falls["item"].astype(str).map({"a": 1.0, "b": 2.0, "d": 3.0})
    with pytest.warns(UserWarning, match="fall_ranks: left out items: 1 without causal"):
        got = fall_ranks(falls, ["causal", "dose"], measure="fall_removed")
    assert got.attrs == {"dropped": {"causal": 1, "dose": 0}}
    assert got.set_index("covariate")["n"].to_dict() == {"causal": 3, "dose": 4}
    assert got.set_index("covariate")["value"]["causal"] == 1.0


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6))
def test_ranks_are_those_of_lifelines(seed):
    from lifelines.utils import concordance_index

    rng = np.random.default_rng(seed)
    n = 12
    time, covariate = rng.integers(1, 5, n), rng.integers(0, 4, n)
    lo, hi = np.where(time < 4, time - 1.0, 3.0), np.where(time < 4, time, np.inf)
    sign, known = pair_orders(lo, hi)
    if not known.any():
        return
    agree = (sign * np.sign(covariate[:, None] - covariate[None, :]))[known].sum() / known.sum()
    # kept at the last edit, 3: censored after those lost at 3
    peer = 2 * concordance_index(np.minimum(time, 3), covariate, time < 4) - 1
    assert agree == pytest.approx(peer)


# Which layers


def layers_table(left: dict[str, tuple], *, last: float = 110.0) -> pd.DataFrame:
    """One edit a set of layers, at ``last``; ``left`` are the verdicts of items i0, i1, ..."""
    names = [f"i{k}" for k in range(len(next(iter(left.values()))))]
    dose = dict.fromkeys(names, 1.0)
    parts = [sweep(dict.fromkeys(names, (1,)), {1.0: 100.0}, dose=dose).assign(layers="none")]
    for layers, values in left.items():
        verdicts = dict(zip(names, ((v,) for v in values), strict=True))
        parts.append(sweep(verdicts, {0.9: last}, dose=dose).assign(layers=layers))
    return pd.concat(parts, ignore_index=True)


def test_halves_depend_on_names_alone():
    about = pd.DataFrame(
        {"group": ["a"] * 5 + ["b"] * 5, "kind": list("xxxyyxxyyy")},
        index=[f"item {k}" for k in range(10)],
    )
    first = pd.Series(halves(about, 0), about.index)
    assert first.sum() == 5
    for _, part in about.assign(first=first).groupby(["group", "kind"]):
        assert abs(part["first"].sum() - (~part["first"]).sum()) <= 1
    mixed = about.sample(frac=1, random_state=1)
    pd.testing.assert_series_equal(pd.Series(halves(mixed, 0), mixed.index)[about.index], first)
    assert any((halves(about, seed) != first).any() for seed in range(1, 5))


def test_choice_is_made_on_one_half_and_reported_on_the_other():
    about = pd.DataFrame({"group": "drip", "kind": "text"}, index=[f"i{k}" for k in range(8)])
    first = halves(about, 3)
    # lucky leaves nothing of the first half and all of the second, good a quarter of each
    good = np.zeros(8)
    good[[np.flatnonzero(first)[0], np.flatnonzero(~first)[0]]] = 1
    table = layers_table({"good": tuple(good), "lucky": tuple((~first).astype(int))})
    out = choose_layers(table, ratio=1.1, seed=3)
    assert out.attrs == {"chosen": "lucky"}
    value = out.set_index(["metric", "layers", "half"])["value"]
    assert value["recitation_strict", "lucky", "choosing"] == 0
    assert value["recitation_strict", "lucky", "reporting"] == 1
    assert value["recitation_strict", "good", "choosing"] == 0.25
    assert value["difference", "lucky", "reporting - choosing"] == 1
    assert set(out.loc[out["chosen"] == "yes", "layers"]) == {"lucky"}
    assert (out["price"] == 1.1).all() and (out["n"] == [4, 4, 4, 4, 8]).all()
    # at 1.05 lucky stands at 1 - ln 1.05 / ln 1.1 = .4881 of the first half
    half = choose_layers(table, ratio=1.05, seed=3).set_index(["layers", "half"])["value"]
    assert half["lucky", "choosing"] == pytest.approx(1 - np.log(1.05) / np.log(1.1))


def test_of_equals_the_larger_distance_is_chosen_and_the_cheap_are_taken_as_they_are():
    table = layers_table({"near": (0, 0, 1, 1), "far": (0, 0, 1, 1)})
    worse = (table["metric"] == "edit_distance") & (table["layers"] == "near")
    table.loc[worse, "value"] *= 0.5
    assert choose_layers(table, ratio=1.1).attrs == {"chosen": "far"}
    assert choose_layers(table[::-1], ratio=1.1).attrs == {"chosen": "far"}
    # both end at 1.1 times: at a ratio of 1.5 they are read there
    out = choose_layers(table, ratio=1.5)
    assert np.allclose(out["price"], 1.1) and out["value"].notna().all()
    # an edit that costs nothing is read at that edit, not at the unedited model
    free = choose_layers(layers_table({"all": (0, 0, 0, 0)}, last=99.0))
    assert (free["value"] == 0).all() and np.allclose(free["price"], 0.99)


def test_choice_refuses():
    table = layers_table({"all": (0, 1)})
    for table_given, options, message in (
        (table, {"ratio": 1.0}, "choose_layers: ratio is 1.0, it must be above 1"),
        (
            table.drop(columns="layers"),
            {},
            "choose_layers: no column 'layers'; give the table of sweep_layers",
        ),
        (
            layers_table({"all": (0,)}),
            {},
            "choose_layers: 1 item, needs two to choose and to report",
        ),
    ):
        with pytest.raises(InputError) as error:
            choose_layers(table_given, **options)
        assert str(error.value) == message


# Figures


def test_figures_draw_what_the_table_says():
    falls = item_falls(sweep())
    curve = fall_curve(falls, by=["dose"])
    both = pd.concat([falls, curve[curve["metric"] == "fall_price"]])
    figure = plots.plot_falls(both)
    points, medians = figure.data
    # in the order of the dose: a, b, c, d
    np.testing.assert_allclose(points.y, [0.05, 0.05, 0.05, 0.2])
    assert list(points.marker.symbol) == ["circle"] * 3 + ["triangle-up-open"]
    # down to the foot, half the least price, where the last edit that left it cost nothing
    np.testing.assert_allclose(points.error_y.arrayminus, [0.025, 0, 0.025, 0])
    np.testing.assert_allclose(medians.x, [1, 2, 4])
    removed = plots.plot_falls(falls, measure="fall_removed")
    np.testing.assert_allclose(removed.data[0].error_y.arrayminus, [0.1, 0.1, 0.1, 0])
    chosen = choose_layers(layers_table({"all": (0, 1, 0, 1), "MLP": (1, 1, 1, 1)}))
    bars = plots.plot_layer_choice(chosen).data
    assert [bar.name for bar in bars] == ["choosing half", "reporting half"]
    assert list(bars[0].x) == ["<b>all</b>", "MLP"] and bars[0].y[1] == 1


def test_figures_refuse():
    falls = item_falls(sweep())
    with pytest.raises(InputError, match="plot_falls: falls have no column 'causal'"):
        plots.plot_falls(falls, x="causal")
    with pytest.raises(InputError, match="plot_falls: the table has no rows of fall_price"):
        plots.plot_falls(falls, method="svd")
    with pytest.raises(InputError, match="plot_layer_choice: rows have no column 'layers'"):
        plots.plot_layer_choice(falls)
