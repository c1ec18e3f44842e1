"""What edits along the curvature cost and remove: by hand, and by second routes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.conftest import run_notebook
from tests.curvature_models import (
    KINDS,
    build,
    collect,
    texts,
)
from workbench import curvature as cv
from workbench import plots
from workbench.models import LanguageModel
from workbench.probes import curvature as probe
from workbench.stats.frontier import at_price, matched_frontier
from workbench.table import InputError, rows, validate

# The probe


def items_of(tokens: list[np.ndarray], group: list[str]) -> pd.DataFrame:
    text = [" ".join(f"w{i}" for i in each) for each in tokens]
    return pd.DataFrame({"item": [f"i{k}" for k in range(len(text))], "text": text, "group": group})


def recited(model: LanguageModel, n: int, prefix: int, suffix: int) -> list[np.ndarray]:
    """Texts that the model recites: random prompts with its own greedy continuation."""
    prompts = np.stack(texts(*[prefix] * n, seed=8))
    return list(np.concatenate([prompts, model.generate(prompts, suffix)], axis=1))


def asked(kind: str = "neox", **options) -> tuple[LanguageModel, pd.DataFrame]:
    model = build(kind)
    tokens = recited(model, 6, 5, 6) + texts(*[11] * 5, seed=9)
    given = {
        "texts": items_of(texts(*[30] * 12), ["x"] * 12)["text"].tolist(),
        "held_out": items_of(texts(9, 14, 30, seed=4), ["x"] * 3)["text"].tolist(),
        "rho": {"kfac": (0.9, 0.5), "svd": (0.5,)},
        "methods": ("kfac", "svd"),
        "prefix": 5,
        "suffix": 6,
    } | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="collect_factors")  # few tokens
        table = probe.probe_curvature(
            model, items_of(tokens, ["seen"] * 6 + ["unseen"] * 5), **given
        )
    return model, table


@pytest.mark.parametrize("kind", KINDS)
def test_probe_gives_a_valid_table_and_the_model_back(kind):
    model, table = asked(kind)
    fresh = build(kind)
    assert model.weights_hash() == fresh.weights_hash()
    validate(table)
    pooled = table[(table["item"] == "all") & (table["metric"] == "recitation_strict")]
    assert set(zip(pooled["method"], pooled["rho"], strict=True)) == {
        ("none", 1.0), ("kfac", 0.9), ("kfac", 0.5), ("svd", 0.5)
    }  # fmt: skip
    unedited = table[(table["method"] == "none") & (table["item"] == "all")]
    value = unedited.set_index("metric")["value"]
    assert value["recitation_strict"] == value["recitation_loose"] == 1
    assert value["edit_distance"] == value["predicted_damage"] == 0
    layers = len({basis for basis in table.attrs["passport"]["layers"]})
    assert (table["metric"] == "clamped").sum() == layers
    ratios = table[table["metric"] == "band_ratio"]
    # gate and up, and q, k and v, read one tensor each
    assert len(ratios) == 4 * 2 * 4
    energy = table[table["metric"] == "band_energy"]
    sums = energy.groupby(["group", "item", "block", "role"], observed=True)["value"].sum()
    assert len(sums) == 4 * 2 * (11 + 2)  # inputs, blocks; eleven items and two groups
    np.testing.assert_allclose(sums, 1.0, rtol=1e-9)


def test_perplexity_is_token_weighted_by_hand():
    model, table = asked()
    held = texts(9, 14, 30, seed=4)
    nats, count = 0.0, 0
    for text in held:
        logits = model.module(input_ids=torch.tensor(text)[None]).logits[0, :-1].detach().float()
        nats -= float(logits.log_softmax(-1)[range(len(text) - 1), text[1:]].sum())
        count += len(text) - 1
    assert count == 8 + 13 + 29 == table.attrs["passport"]["held_out_tokens"]
    row = table[(table["metric"] == "perplexity") & (table["method"] == "none")].iloc[0]
    assert row["value"] == pytest.approx(np.exp(nats / count), rel=1e-5)
    assert row["lo"] <= row["value"] <= row["hi"] and row["n"] == 3


def test_strict_recitation_is_greedy_decoding():
    # under every edit the teacher-forced verdict is the one that generation gives
    model = build("neox")
    tokens = np.stack(recited(model, 40, 5, 4))
    bases = cv.decompose(collect(model, texts(*[30] * 12)))
    verdicts = []
    for rho in (1, 0.999, 0.99, 0.95, 0.9):
        with cv.edited(bases, rho=rho):
            said = model.generate(tokens[:, :5], 4)
            got = probe.recitation(model, tokens, 5)
        np.testing.assert_array_equal(got["recitation_strict"], (said == tokens[:, 5:]).all(axis=1))
        np.testing.assert_array_equal(got["recitation_strict"], got["edit_distance"] == 0)
        verdicts.append(got["recitation_strict"].mean())
    # both verdicts were met under one and the same edit, so the agreement says something
    assert verdicts[0] == 1 and any(0 < share < 1 for share in verdicts)


def test_edit_distance_by_hand():
    # 1234: the same 0; 9234 one substitution .25; 2341 a shift, one deletion and insertion, .5
    said = np.array([[1, 2, 3, 4], [9, 2, 3, 4], [2, 3, 4, 1], [9, 9, 9, 9]])
    truth = np.tile([1, 2, 3, 4], (4, 1))
    np.testing.assert_allclose(probe.edit_distance(said, truth), [0, 0.25, 0.5, 1.0])


def test_loose_takes_the_threshold_itself():
    class Reciter:
        """Says 1..16, but for the first ``wrong`` tokens."""

        def score(self, tokens, start, keep):
            sure = np.tile(np.log([0.25, 0.5, 0.9, 1.0]), (len(tokens), 4))
            return type("S", (), {"guess": self.said(len(tokens)), "log_probability": sure})

        def generate(self, prompts, new):
            return self.said(len(prompts))

        def said(self, n):
            out = np.tile(np.arange(1, 17), (n, 1))
            for row, wrong in enumerate((0, 4, 5)):
                out[row, :wrong] = 99
            return out

    tokens = np.concatenate([np.zeros((3, 1), int), np.tile(np.arange(1, 17), (3, 1))], axis=1)
    got = probe.recitation(Reciter(), tokens, 1)
    # 4 of 16 wrong: similarity .75 exactly, still loose; 5 of 16: .6875, not
    np.testing.assert_array_equal(got["recitation_strict"], [1, 0, 0])
    np.testing.assert_array_equal(got["recitation_loose"], [1, 1, 0])
    np.testing.assert_allclose(got["edit_distance"], [0, 0.25, 0.3125])
    np.testing.assert_allclose(got["recitation_margin"], np.log(0.25 / 0.75))


def test_log_odds_by_hand():
    # log(.25 / .75) = -1.0986; at p = 1 single precision cannot tell from 1 - 2^-24: 24 ln 2
    got = probe.log_odds(np.log(np.array([0.25, 0.5, 1.0])))
    np.testing.assert_allclose(got, [-np.log(3), 0, 24 * np.log(2)], atol=1e-7)
    # far out it is the logarithm itself
    assert probe.log_odds(np.array(-80.0)) == pytest.approx(-80)


def test_a_margin_above_0_is_recited():
    model = build("neox")
    model.module.get_output_embeddings().weight.data.mul_(8.0)  # a model that is sure of itself
    tokens = np.stack(recited(model, 30, 5, 2) + texts(*[7] * 30, seed=2))
    got = probe.recitation(model, tokens, 5)
    sure = got["recitation_margin"] > 0
    assert sure.any() and got["recitation_strict"][sure].all()
    assert (got["recitation_margin"][got["recitation_strict"] == 0] < 0).all()


def test_band_energy_by_hand():
    # ten directions: bands of 1, 2 (rounded 1..2.5 -> 2), 2 or 3 and 5. Unit vectors as basis, an
    # item with energy 4 in direction 0 and 1 each in directions 2, 9, at both positions.
    given = torch.zeros(1, 2, 20).double()
    given[0, :, 0], given[0, :, 3], given[0, :, 19] = 2.0, 1.0, 1.0
    got = probe.band_energy(given, torch.eye(20).double())
    # 20 directions: bands 0-1, 2-4, 5-9, 10-19
    np.testing.assert_allclose(got, [[4 / 6, 1 / 6, 0, 1 / 6]])
    # a position without any activation is left out, an item without any is NaN
    given[0, 1] = 0
    np.testing.assert_allclose(probe.band_energy(given, torch.eye(20).double()), got)
    assert np.isnan(probe.band_energy(0 * given, torch.eye(20).double())).all()


@pytest.mark.parametrize("bos", [None, 1])
def test_band_rows_by_a_second_route(bos):
    # item by item and direction by direction, at the positions that predict the suffix
    model, name = build("neox", bos=bos), "gpt_neox.layers.1.mlp.dense_4h_to_h"
    tokens = texts(*[11] * 5, seed=9)
    bases = cv.decompose(collect(model, texts(*[30] * 12)))
    basis = next(b for b in bases if b.layer.name == name)
    table = probe.band_rows(
        model, bases, items_of(tokens, ["seen"] * 2 + ["never"] * 3), memorized="seen",
        clean="never", prefix=5, suffix=6,
    )  # fmt: skip
    caught: dict = {}
    handle = basis.layer.module.register_forward_hook(lambda m, i, o: caught.update(a=i[0][0]))
    shares = np.zeros((5, 12))
    for row, text in enumerate(tokens):
        before = [] if bos is None else [bos]
        model.module(input_ids=torch.tensor(before + list(text))[None], use_cache=False)
        # token 5 is predicted at position 4, token 10 at position 9
        for a in caught["a"][len(before) + 4 : len(before) + 10]:
            for i in range(12):
                along = float(a.detach() @ basis.input_vectors[:, i])
                shares[row, i] += along**2 / float((a @ a).detach()) / 6
    handle.remove()
    # 12 directions: bands of 1 (.1 * 12 = 1.2), 2 (to .25 * 12 = 3), 3 and 6
    bands = np.add.reduceat(shares, [0, 1, 3, 6], axis=1)
    got = table[(table["role"] == "mlp.down") & (table["block"] == 1)]
    value = got[got["item"] == "all"].set_index(["metric", "group"])["value"]
    mine, theirs = bands[:2].mean(axis=0), bands[2:].mean(axis=0)
    np.testing.assert_allclose(value["band_energy", "seen"], mine, rtol=1e-6)
    np.testing.assert_allclose(value["band_energy", "never"], theirs, rtol=1e-6)
    np.testing.assert_allclose(value["band_ratio", "seen"], mine / theirs, rtol=1e-6)
    of_items = got[(got["item"] != "all")].pivot(index="item", columns="band", values="value")
    np.testing.assert_allclose(of_items[list(probe.BANDS)], bands, rtol=1e-6)
    got = got[got["item"] == "all"]
    assert (got["lo"] <= got["value"]).all() and (got["value"] <= got["hi"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_band_energy_needs_no_gradient(kind, monkeypatch):
    # the same shares as from the factors of the backward pass, on every input there is
    # unlike lengths and a BOS: padding and positions that predict nothing must not count
    model, tokens = build(kind, bos=1), texts(*[11] * 5, seed=9)
    groups, ordinary = ["seen"] * 2 + ["never"] * 3, texts(*[30] * 3, 5, 9, 14, 21, 7)
    with_gradient = probe.band_rows(
        model, cv.decompose(collect(model, ordinary)), items_of(tokens, groups), memorized="seen",
        clean="never", prefix=5, suffix=6,
    )  # fmt: skip
    monkeypatch.setattr(torch.Tensor, "backward", None)
    items = items_of(tokens, groups).assign(dose=[3, 3, 0, 0, 0])
    given = items_of(ordinary, ["x"] * 8)["text"].tolist()
    got = probe.probe_band_energy(model, items, texts=given, prefix=5, suffix=6)
    key = ["item", "block", "role", "band"]
    expected = with_gradient[
        (with_gradient["metric"] == "band_energy") & (with_gradient["item"] != "all")
    ]
    both = got.astype({"item": str, "role": str, "band": str}).merge(expected, on=key)
    assert len(both) == len(got) == len(expected) == 5 * 4 * 2 * 4
    np.testing.assert_allclose(both["value_x"], both["value_y"], rtol=2e-3, atol=1e-5)
    assert got.groupby("item", observed=True)["dose"].first().tolist() == [3, 3, 0, 0, 0]
    assert got.attrs == {"dropped": 0}
    assert not any(parameter.grad is not None for parameter in model.module.parameters())


def test_intervals_by_hand():
    # Wilson (1927), 95 %, z = 1.959964: 0 of 12 -> (0, z^2 / (n + z^2)) = (0, 3.841459 / 15.841459)
    low, high = probe.wilson(0, 12)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.2424940, abs=1e-6)
    # a bootstrap of the mean of a hundred standard normals: +- 1.96 / 10, within a fifth of it
    values = np.random.default_rng(0).normal(size=100)
    low, high = probe.bootstrap(lambda w: w @ values / 100, [100], 0)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.2)
    assert low < values.mean() < high


def test_probe_refuses():
    model = build("neox")
    items = items_of(texts(11, 11), ["seen", "unseen"])
    good = {"texts": ["w1 w2 w3"], "held_out": ["w1 w2 w3"], "prefix": 5, "suffix": 6}
    for change, message in (
        (
            {"memorized": "drip"},
            "probe_curvature: no items of group 'drip'; there are groups seen, unseen",
        ),
        (
            {"memorized": ()},
            "probe_curvature: memorized names no group; there are seen, unseen",
        ),
        (
            {"memorized": ("seen", "planted")},
            "probe_curvature: no items of group 'planted'; there are groups seen, unseen",
        ),
        (
            {"methods": ("prune",)},
            "probe_curvature: method 'prune'; choose from kfac, saliency, svd, magnitude, random, "
            "ekfac",
        ),
        (
            {"methods": ("kfac",), "rho": {"kfac": (0.9, 1.2)}},
            "probe_curvature: rho is 1.2, the share that is kept; needs 0 < rho <= 1",
        ),
        ({"rho": {}}, "probe_curvature: rho has no shares for kfac, needs at least one"),
        ({"held_out": ["w1", ""]}, "probe_curvature: held_out has 2 texts, none of two tokens or "
            "more; give text"),
        ({"texts": "w1 w2"}, "probe_curvature: texts is one text, needs a list of texts"),
        ({"prefix": 0}, "probe_curvature: prefix is 0, but must be at least 1"),
        (
            {"suffix": 20},
            "probe_curvature: none of 1 texts has the 25 tokens asked for (the longest has 11); "
            "ask for fewer, or give longer texts",
        ),
    ):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with pytest.raises(InputError) as error:
                probe.probe_curvature(model, items, **(good | change))
        assert str(error.value) == message


def test_without_clean_items_there_are_no_bands():
    model = build("neox")
    items = items_of(recited(model, 3, 5, 6), ["seen"] * 3)
    with (
        pytest.warns(UserWarning, match="no items of group 'unseen' to compare with"),
        pytest.warns(UserWarning, match="small eigenvalues are noise"),
    ):
        table = probe.probe_curvature(
            model, items, texts=["w1 w2 w3 w4"] * 3, held_out=["w1 w2 w3"],
            rho={"kfac": (0.9,)}, methods=("kfac",), prefix=5, suffix=6,
        )  # fmt: skip
    assert not table["metric"].astype(str).str.startswith("band").any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="collect_factors")
        _, table = asked(clean=None)
    assert not table["metric"].astype(str).str.startswith("band").any()


# What comes with each edit


def test_also_is_asked_once_under_each_edit():
    seen = []

    def also(model):
        seen.append(model.weights_hash())
        return rows("accuracy", 0.5, run=model.run, group="sums", n=4)

    model, table = asked(also=also)
    # unedited, kfac .9 and .5, svd .5: four different weights, and the model's own to begin with
    assert len(set(seen)) == len(seen) == 4 and seen[0] == model.weights_hash()
    got = table[table["metric"] == "accuracy"]
    assert list(zip(got["method"].astype(str), got["rho"], strict=True)) == [
        ("none", 1.0), ("kfac", 0.9), ("kfac", 0.5), ("svd", 0.5)
    ]  # fmt: skip
    assert set(got["group"]) == {"sums"}


def test_what_also_raises_passes_through_and_the_weights_are_back():
    calls = []

    def also(model):
        calls.append(model)
        if len(calls) == 2:
            raise ZeroDivisionError("tasks")
        return rows("accuracy", 0.5, run=model.run)

    fresh = build("neox").weights_hash()
    with pytest.raises(ZeroDivisionError, match="tasks"):
        asked(also=also)
    assert calls[0].weights_hash() == fresh and len(calls) == 2
    with pytest.raises(InputError) as error:
        asked(also=lambda model: rows("accuracy", 0.5, run="m", beside={"rho": 1.0}))
    assert str(error.value) == (
        "probe_curvature: the table of also has a column 'rho' of its own, which here names the "
        "edit; rename it"
    )


def test_the_price_is_paired_over_texts():
    # the ratio of perplexities by hand, and its interval far inside that of unpaired ones
    held = items_of(texts(*[25] * 40, seed=4), ["x"] * 40)["text"].tolist()
    model, table = asked(held_out=held, rho={"kfac": (0.95,)}, methods=("kfac",))
    cost = table[table["metric"].isin(["perplexity", "perplexity_ratio"])]
    value = cost.set_index(["metric", "method"])[["value", "lo", "hi"]]
    ratio, edit = value.loc[("perplexity_ratio", "kfac")], value.loc[("perplexity", "kfac")]
    own = value.loc[("perplexity", "none")]
    assert ratio["value"] == pytest.approx(edit["value"] / own["value"])
    assert (value.loc[("perplexity_ratio", "none")] == 1).all()
    assert ratio["lo"] < ratio["value"] < ratio["hi"]
    # second route: nats of each text, resampled by a plain loop
    bases = cv.decompose(collect(model, texts(*[30] * 12), dtype="float32"))
    tokens = model.encode(held)
    with cv.edited(bases, rho=0.95) as edit_made:
        after, counts = probe._held_out_loss(model, tokens, edit_made)
    before, _ = probe._held_out_loss(model, tokens, edit_made)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(800):
        pick = rng.integers(40, size=40)
        drawn.append(np.exp((after[pick] - before[pick]).sum() / counts[pick].sum()))
    low, high = np.quantile(drawn, [0.025, 0.975])
    # two bootstraps of one and the same sample: ends agree to a fifth of the width
    assert ratio["lo"] == pytest.approx(low, abs=0.2 * (high - low))
    assert ratio["hi"] == pytest.approx(high, abs=0.2 * (high - low))


def test_several_groups_are_pooled_apart_and_items_keep_their_doses():
    model = build("neox")
    tokens = recited(model, 5, 5, 6) + texts(*[11] * 4, seed=9)
    items = items_of(tokens, ["drip"] * 3 + ["seen"] * 2 + ["never"] * 4)
    items = items.assign(dose=[288] * 3 + [2, 4] + [0] * 4, kind="text", other="x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        table = probe.probe_curvature(
            model, items, memorized=("drip", "seen"), clean="never", rho={"kfac": (0.9,)},
            texts=items_of(texts(*[30] * 12), ["x"] * 12)["text"].tolist(),
            held_out=["w1 w2 w3 w4"], methods=("kfac",), prefix=5, suffix=6,
        )  # fmt: skip
    strict = table[(table["metric"] == "recitation_strict") & (table["method"] == "none")]
    pooled = strict[strict["item"] == "all"].set_index("group")
    assert pooled["n"].to_dict() == {"drip": 3, "seen": 2} and (pooled["value"] == 1).all()
    told = strict[strict["item"] != "all"]
    assert told["dose"].tolist() == [288] * 3 + [2, 4] and set(told["kind"]) == {"text"}
    assert "other" not in table.columns
    ratio = table[table["metric"] == "band_ratio"]
    assert set(ratio["group"]) == {"drip", "seen"}
    frontier = matched_frontier(table, ratios=(1.0,), group="seen")
    assert set(frontier["n"]) == {2}
    for draw in (plots.plot_edit_sweep, plots.plot_band_ratio):
        name = draw.__name__
        with pytest.raises(InputError, match=f"{name}: rows of the groups drip, seen; choose one"):
            draw(table)
        assert len(draw(table, group="drip").data)
        with pytest.raises(
            InputError, match=f"{name}: no rows of group 'all'; there are drip, seen"
        ):
            draw(table, group="all")


def test_ekfac_is_there_for_those_who_ask():
    model, table = asked(methods=("kfac", "ekfac"), rho={"kfac": (0.9,), "ekfac": (0.9,)})
    price = table[table["metric"] == "perplexity"].set_index("method")["value"]
    bases = cv.decompose(collect(model, texts(*[30] * 12), dtype="float32"))
    bases = cv.correct_masses(model, bases, texts(*[30] * 12))
    with cv.edited(bases, method="ekfac", rho=0.9) as edit:
        nats, counts = probe._held_out_loss(model, texts(9, 14, 30, seed=4), edit)
    assert price["ekfac"] == pytest.approx(np.exp(nats.sum() / counts.sum()), rel=1e-5)
    assert price["ekfac"] != pytest.approx(price["kfac"], rel=1e-3)


def test_recited_items_by_a_second_route():
    model = build("neox")
    known, other = recited(model, 4, 5, 6), texts(*[11] * 6, seed=9)
    short = texts(7, seed=5)
    items = items_of(known + other + short, ["seen"] * 4 + ["seen"] * 3 + ["never"] * 3 + ["seen"])
    with pytest.warns(UserWarning, match="dropped 1 of 8 texts"):
        left = probe.recited_items(model, items, groups=["seen"], prefix=5, suffix=6)
    said = model.generate(np.stack(other)[:3, :5], 6)
    wrong = int((said != np.stack(other)[:3, 5:]).any(axis=1).sum())
    assert wrong == 3  # three random texts that nobody taught it
    assert left["item"].tolist() == [f"i{k}" for k in (0, 1, 2, 3, 7, 8, 9)]
    assert left.attrs == {"not_recited": 3, "dropped": 1}


def test_staircase_rows_are_the_mask():
    model = build("neox")
    bases = cv.decompose(collect(model, texts(*[30] * 12)))
    table = probe.staircase_rows(model, bases)
    for basis in bases:
        mine = table[(table["block"] == basis.layer.block) & (table["role"] == basis.layer.role)]
        for share in probe.STAIRS:
            mask = cv.component_mask(basis, method="kfac", rho=share)
            got = mine[mine["rho"] == share].set_index("output")["value"]
            assert (mask.sum(axis=1)[got.index - 1] == got).all()
            last = int(mask.any(axis=1).sum())
            assert {1, last, len(mask)} <= set(got.index) and got[last] > 0
            assert last == len(mask) or got[last + 1] == 0
    figure = plots.plot_staircase(validate(table), block=1, role="mlp.up")
    assert [trace.name for trace in figure.data][-1] == "the whole layer"
    assert list(figure.data[-1].x) == [8, 8, 1] and list(figure.data[-1].y) == [1, 12, 12]
    with pytest.raises(InputError, match="plot_staircase: no rows of mlp.up of block 7; there are"):
        plots.plot_staircase(validate(table), block=7, role="mlp.up")


# Which layers


def test_candidates_are_all_kinds_of_layers_and_none_twice():
    model = build("llama")
    bases = cv.decompose(collect(model, texts(*[30] * 12)))
    found = probe.layer_candidates(bases)
    assert list(found) == ["all", "MLP", "attention", "block 0", "block 1"]
    assert [len(each) for each in found.values()] == [14, 6, 8, 7, 7]
    only = [basis for basis in bases if basis.layer.role.startswith("mlp.")]
    assert list(probe.layer_candidates(only)) == ["all", "block 0", "block 1"]
    one = [basis for basis in only if basis.layer.block == 1]
    assert list(probe.layer_candidates(one)) == ["all"]


def test_sweep_of_layers_is_the_edit_of_those_layers():
    model = build("neox")
    tokens = recited(model, 6, 5, 6)
    ordinary = items_of(texts(*[30] * 12), ["x"] * 12)["text"].tolist()
    held = items_of(texts(9, 14, 30, seed=4), ["x"] * 3)["text"].tolist()
    fresh, given = model.weights_hash(), {"texts": ordinary, "held_out": held}
    asking = {"prefix": 5, "suffix": 6, "rho": (0.5, 0.9), "ratio": 1e9}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        table = probe.sweep_layers(model, items_of(tokens, ["seen"] * 6), **given, **asking)
        short = probe.sweep_layers(
            model, items_of(tokens, ["seen"] * 6), **given, **(asking | {"ratio": 1.0 + 1e-9})
        )
    assert model.weights_hash() == fresh
    bases = cv.decompose(collect(model, texts(*[30] * 12), dtype="float32"))
    for name, chosen in probe.layer_candidates(bases).items():
        for rho in (0.9, 0.5):
            with cv.edited(chosen, rho=rho) as edit:
                nats, counts = probe._held_out_loss(model, model.encode(held), edit)
                strict = probe.recitation(model, np.stack(tokens), 5)["recitation_strict"]
            mine = table[(table["layers"] == name) & (table["rho"] == rho)]
            value = mine[mine["item"] == "all"].set_index("metric")["value"]
            assert value["perplexity"] == pytest.approx(np.exp(nats.sum() / counts.sum()), rel=1e-5)
            assert value["recitation_strict"] == strict.mean()
    # a set of layers whose first edit costs so much is edited no further
    first = table[(table["metric"] == "perplexity_ratio") & (table["rho"] == 0.9)]
    dear = set(first.loc[first["value"] > 1, "layers"])
    assert dear and set(short.loc[short["rho"] == 0.5, "layers"]) == set(first["layers"]) - dear
    assert set(table[table["layers"] == "none"]["method"]) == {"none"}
    with pytest.raises(InputError, match="sweep_layers: ratio is 1, it must be above 1"):
        probe.sweep_layers(model, items_of(tokens, ["seen"] * 6), **given, ratio=1)


# Edits at the same price


def test_at_price_by_hand():
    # perplexity 100 -> 120, verdict 1 -> 0; at 110: 1 - ln 1.1 / ln 1.2 = 1 - .5227 = .4772
    verdicts = np.array([[1.0, 1.0], [0.0, 1.0]])
    got = at_price(verdicts, np.array([100.0, 120.0]), 1.1)
    np.testing.assert_allclose(got, [1 - np.log(1.1) / np.log(1.2), 1.0])
    np.testing.assert_allclose(at_price(verdicts, np.array([100.0, 120.0]), 1.2), [0.0, 1.0])
    np.testing.assert_allclose(at_price(verdicts, np.array([100.0, 120.0]), 1.0), [1.0, 1.0])
    assert np.isnan(at_price(verdicts, np.array([100.0, 120.0]), 1.21)).all()
    # the first crossing counts: the price falls again and rises once more
    four = np.array([[1.0], [0.5], [0.9], [0.0]])
    np.testing.assert_allclose(at_price(four, np.array([100.0, 110.0, 101.0, 130.0]), 1.1), [0.5])


def sweep_table() -> pd.DataFrame:
    """Two methods, four items: at 1.1 times, kfac is at (0, 0, 0, 1), svd at (1, 1, 0, 1)."""
    parts = []
    for method, rho, price, values in (
        ("none", 1.0, 100.0, (1, 1, 1, 1)),
        ("kfac", 0.9, 105.0, (1, 0, 0, 1)),
        ("kfac", 0.8, 110.0, (0, 0, 0, 1)),
        ("svd", 0.5, 110.0, (1, 1, 0, 1)),
    ):
        beside = {"method": method, "rho": rho}
        parts.append(rows("perplexity", price, run="m", beside=beside))
        names = [f"i{k}" for k in range(4)]
        parts.append(rows("recitation_strict", values, item=names, run="m", beside=beside))
        parts.append(rows("recitation_strict", np.mean(values), n=4, run="m", beside=beside))
    return pd.concat(parts, ignore_index=True)


def test_matched_frontier_by_hand():
    out = matched_frontier(sweep_table(), ratios=(1.05, 1.1, 1.2))
    value = out.set_index(["metric", "method", "ratio"])["value"]
    assert value["recitation_strict", "kfac", 1.1] == pytest.approx(0.25)
    assert value["recitation_strict", "svd", 1.1] == pytest.approx(0.75)
    assert value["difference", "kfac", 1.1] == pytest.approx(-0.5)
    assert value["recitation_strict", "kfac", 1.05] == pytest.approx(0.5)
    # svd at 1.05 lies between 1 and .75 at ln 1.05 / ln 1.1 = .5119 of the way
    assert value["recitation_strict", "svd", 1.05] == pytest.approx(1 - 0.25 * 0.5119, abs=1e-4)
    # on an edit itself all are verdicts: Wilson's interval of 1 in 4
    told = out[(out["metric"] == "recitation_strict") & (out["ratio"] == 1.1)].set_index("method")
    np.testing.assert_allclose(told.loc["kfac", ["lo", "hi"]].astype(float), probe.wilson(1, 4))
    unreached = out[out["ratio"] == 1.2]
    assert unreached["value"].isna().all()
    assert set(unreached["reason"]) == {"a sweep ends before perplexity has risen to 1.2 times"}
    # paired: the items' differences are -1, -1, 0, 0, so no draw lies outside -1..0
    gap = out[(out["metric"] == "difference") & (out["ratio"] == 1.1)].iloc[0]
    assert -1 <= gap["lo"] < -0.5 < gap["hi"] <= 0


def test_matched_frontier_refuses():
    table = sweep_table()
    with pytest.raises(InputError) as error:
        matched_frontier(table, group="drip")
    assert str(error.value) == "matched_frontier: no items of group 'drip'; there are all"
    with pytest.raises(InputError, match=r"ratios are \[0.9\], needs at least 1 each"):
        matched_frontier(table, ratios=(0.9,))
    with pytest.raises(InputError, match="with those of the unedited model"):
        matched_frontier(table[table["method"] != "none"])
    with pytest.raises(InputError, match="several models or steps"):
        matched_frontier(pd.concat([table, table.assign(run="other")]))


# Texts, figures, the notebook


def test_texts_for_factors_and_for_perplexity_do_not_overlap(tmp_path, corpus_file):
    lines = Path(corpus_file).read_text(encoding="utf-8").splitlines()
    ordinary, held = probe.curvature_texts(None, corpus_file, texts=60, held_out=30, seed=1)
    assert (len(ordinary), len(held)) == (60, 30)
    assert not set(ordinary) & set(held)
    assert probe.curvature_texts(None, corpus_file, texts=60, held_out=30, seed=1)[0] == ordinary
    # a file with fewer texts than asked for is shared out in the same proportion, 4 to 2
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps({"text": line}) for line in lines[:6]), encoding="utf-8")
    ordinary, held = probe.curvature_texts(None, str(few), texts=40, held_out=20)
    assert (len(ordinary), len(held)) == (4, 2)
    assert sorted(ordinary + held) == sorted(lines[:6])
    few.write_text(json.dumps({"text": "alone"}), encoding="utf-8")
    with pytest.raises(InputError, match=r"few\.jsonl holds 1 texts, needs at least two"):
        probe.curvature_texts(None, str(few), texts=40, held_out=20)
    with pytest.raises(InputError, match="no text file at"):
        probe.curvature_texts(None, str(tmp_path / "none.txt"), texts=40, held_out=20)
    with pytest.warns(UserWarning, match="no corpus given, so factors and perplexity come from"):
        assert len(probe.curvature_texts(None, "", texts=4, held_out=2)[0]) == 4


def test_suite_texts(tiny):
    ordinary, held = probe.curvature_texts(tiny.suite, "", texts=5, held_out=7)
    assert len(ordinary) == 5 and held == tiny.suite.held_out(7)["text"].tolist()


def test_figures_draw_what_the_table_says():
    _, table = asked("llama")
    spectrum = plots.plot_spectrum(table, rho=0.95)
    assert len(spectrum.data) == 14  # seven roles, two blocks
    assert sum(bool(trace.showlegend) for trace in spectrum.data) == 7
    sweep = plots.plot_edit_sweep(table)
    assert [trace.name for trace in sweep.data] == ["kfac", "svd"]
    pooled = table[table["item"] == "all"].set_index(["metric", "method", "rho"])["value"]
    # the unedited model first, then from the gentlest edit on
    for x, at in zip(sweep.data[0].x, (("none", 1.0), ("kfac", 0.9), ("kfac", 0.5)), strict=True):
        assert x == pytest.approx(pooled[("perplexity", *at)], abs=1e-6)
    assert list(plots.plot_edit_sweep(table, x="rho").data[0].x) == [1.0, 0.9, 0.5]
    panels = plots.plot_rho_sweep(table, method="kfac")
    assert [trace.name for trace in panels.data] == ["seen", "held-out"]
    for trace, metric in zip(panels.data, ("recitation_strict", "perplexity_ratio"), strict=True):
        drawn = [pooled[metric, *at] for at in (("none", 1.0), ("kfac", 0.9), ("kfac", 0.5))]
        np.testing.assert_allclose(trace.y, drawn, atol=1e-6)
        assert list(trace.x) == [0, 1, 2]
    assert list(panels.layout.xaxis2.ticktext) == ["unedited", "0.9", "0.5"]
    bands = plots.plot_band_ratio(table)
    assert len(bands.data) == 4 * 2
    ratio = table[(table["metric"] == "band_ratio") & (table["role"] == "mlp.down")]
    drawn = [t for t in bands.data if t.name == "block 1"][-1]
    np.testing.assert_allclose(drawn.y, ratio[ratio["block"] == 1]["value"], atol=1e-6)


def test_figures_refuse():
    table = sweep_table()
    for draw, message in (
        (plots.plot_spectrum, "plot_spectrum: the table has no rows of mass; it has perplexity, "),
        (plots.plot_band_ratio, "plot_band_ratio: the table has no rows of band_ratio; it has"),
        (lambda t: plots.plot_edit_sweep(t, x="kept"), "x is 'kept'; choose perplexity or rho"),
        (
            lambda t: plots.plot_rho_sweep(t, method="prune"),
            "plot_rho_sweep: the table has no edits by prune",
        ),
        (
            lambda t: plots.plot_rho_sweep(t, metrics=("perplexity_ratio",)),
            "plot_rho_sweep: the table has no rows of perplexity_ratio; it has",
        ),
    ):
        with pytest.raises(InputError, match=message):
            draw(table)


@pytest.mark.parametrize("groups", [("seen", "unseen"), ("seen",)])
def test_notebook_on_a_model_folder_and_a_file(tmp_path, corpus_file, tokenizer, groups, capsys):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    lines = Path(corpus_file).read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if len(line) > 60][:12]
    file = tmp_path / "mine.jsonl"
    entries = [{"text": line, "group": groups[n % len(groups)]} for n, line in enumerate(lines)]
    file.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    tasks = tmp_path / "tasks.jsonl"
    questions = [{"prompt": "the sum of two", "answer": "four", "choices": ["four", "five"]}] * 3
    tasks.write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    given = {"tasks": str(tasks)} if len(groups) == 2 else {"sweep": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        space = run_notebook(
            "loss_curvature",
            model=str(tmp_path / "mine"),
            items=str(file),
            corpus=corpus_file,
            roles=["mlp.up", "mlp.gate"],
            texts=20,
            held_out=10,
            prefix=8,
            suffix=8,
            results=str(tmp_path / "out"),
            **given,
        )
    said = capsys.readouterr().out
    assert "here only the weights were checked" in said
    assert "The unedited model recites none of the texts, so none can fall." in said
    assert "No twin: to hold the fall against a causal score" in said
    assert (
        ("No tasks: give a file" in said)
        == ("No sweep of the layers" in said)
        == (not space["sweep"])
    )
    if space["sweep"]:
        asked = space["skills"][space["skills"]["metric"] == "accuracy"]
        assert set(asked["rho"]) == {1.0, 0.98, 0.95, 0.9, 0.8}
        assert list(space["swept"]["layers"].unique()) == ["none", "all", "block 0", "block 1"]
    assert space["compared"] == (len(groups) == 2)
    assert {name.split(".")[-1] for name in space["passport"]["layers"]} == {"up_proj", "gate_proj"}
    assert (tmp_path / "out" / "table.parquet").is_file()


def test_notebook_keeps_the_habits():
    from workbench.parameters import read_notebook

    notebook = read_notebook(Path(__file__).parent.parent / "notebooks" / "loss_curvature.ipynb")
    assert all(parameter.help for parameter in notebook.parameters)
    for cell in json.loads(notebook.path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert len(lines) <= 12 or "parameters" in cell["metadata"].get("tags", []), lines[0]
            assert not any(line.startswith(("def ", "class ")) for line in lines)
