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
        warnings.simplefilter("ignore", UserWarning)
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
    sums = energy.groupby(["group", "block", "role"], observed=True)["value"].sum()
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
            return type("S", (), {"guess": self.said(len(tokens))})

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


def test_band_energy_by_hand():
    # ten directions: bands of 1, 2 (rounded 1..2.5 -> 2), 2 or 3 and 5. Unit vectors as basis, an
    # item with energy 4 in direction 0 and 1 each in directions 2, 9, at both positions.
    given = torch.zeros(1, 2, 20).double()
    given[0, :, 0], given[0, :, 3], given[0, :, 19] = 2.0, 1.0, 1.0
    got = probe.band_energy(given, torch.eye(20).double())
    # 20 directions: bands 0-1, 2-4, 5-9, 10-19
    np.testing.assert_allclose(got, [[4 / 6, 1 / 6, 0, 1 / 6]])


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
    value = got.set_index(["metric", "group"])["value"]
    mine, theirs = bands[:2].mean(axis=0), bands[2:].mean(axis=0)
    np.testing.assert_allclose(value["band_energy", "seen"], mine, rtol=1e-6)
    np.testing.assert_allclose(value["band_energy", "never"], theirs, rtol=1e-6)
    np.testing.assert_allclose(value["band_ratio", "all"], mine / theirs, rtol=1e-6)
    assert (got["lo"] <= got["value"]).all() and (got["value"] <= got["hi"]).all()


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
            {"methods": ("prune",)},
            "probe_curvature: method 'prune'; choose from kfac, saliency, svd, magnitude, random",
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
    unreached = out[out["ratio"] == 1.2]
    assert unreached["value"].isna().all()
    assert set(unreached["reason"]) == {"a sweep ends before perplexity has risen to 1.2 times"}
    # paired: the items' differences are -1, -1, 0, 0, so no draw lies outside -1..0
    gap = out[(out["metric"] == "difference") & (out["ratio"] == 1.1)].iloc[0]
    assert -1 <= gap["lo"] < -0.5 < gap["hi"] <= 0


def test_matched_frontier_refuses():
    table = sweep_table()
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
    ):
        with pytest.raises(InputError, match=message):
            draw(table)


def run_notebook(name: str, **given) -> dict:
    """Run a notebook's code cells here, with parameters; returns its names."""
    path = Path(__file__).parent.parent / "notebooks" / f"{name}.ipynb"
    space: dict = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
            if "parameters" in cell["metadata"].get("tags", []):
                assert set(given) <= set(space)
                space |= given
    return space


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
        )
    assert "here only the weights were checked" in capsys.readouterr().out
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
            assert len(lines) <= 12, lines[0]
            assert not any(line.startswith(("def ", "class ")) for line in lines)
