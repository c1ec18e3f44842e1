"""Weight drift, CKA and barriers, against hand values, Gram matrices and plain forward passes."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tests.conftest import ENGLISH, bigram, frame, neox
from workbench.models import Checkpoints, LanguageModel, load_checkpoints
from workbench.plots import plot_barrier, plot_cka, plot_drift, plot_drift_heat, plot_path
from workbench.probes.weights import (
    barrier_height,
    hsic,
    jackknife_interval,
    linear_cka,
    pair_sums,
    probe_barrier,
    probe_cka,
    probe_weight_drift,
    probe_weight_path,
    spectrum_sizes,
)
from workbench.table import InputError
from workbench.tensors import weight_tensors

ITEMS = frame(ENGLISH, group=["seen", "never"] * 3)


def llama(seed: int = 0, **options):
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 300,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**(shape | options))).eval()


def language(module, tokenizer, *, run="a", step=0) -> LanguageModel:
    return LanguageModel(module, tokenizer, run=run, step=step)


def read(table: pd.DataFrame, metric: str, **where) -> np.ndarray:
    table = table[table["metric"] == metric]
    for name, value in where.items():
        table = table[table[name] == value]
    return table["value"].to_numpy()


# Weights


def test_spectrum_by_hand():
    # s = 3, 1: 3/1; (9 + 1)/9; p = .75, .25 has entropy .5623351, exp 1.7547654
    got = spectrum_sizes(torch.tensor([[0.0, 3.0], [-1.0, 0.0]]).double())
    np.testing.assert_allclose(got, [3.0, 10 / 9, 1.7547654], atol=1e-7)
    quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double()
    np.testing.assert_allclose(spectrum_sizes(quarter_turn), [1.0, 2.0, 2.0], atol=1e-12)
    # s = 2, 0: no condition number, one direction; nothing at all in a zero matrix
    np.testing.assert_allclose(
        spectrum_sizes(torch.diag(torch.tensor([2.0, 0.0])).double()), [np.nan, 1.0, 1.0]
    )
    np.testing.assert_equal(spectrum_sizes(torch.zeros(2, 3).double()), (np.nan,) * 3)


def test_a_singular_value_within_rounding_counts_as_none():
    # least / largest = 1/8, exactly the rounding said: singular; said to be finer, it is not
    matrix = torch.diag(torch.tensor([8.0, 1.0])).double()
    assert np.isnan(spectrum_sizes(matrix, 0.125)[0])
    assert spectrum_sizes(matrix, 0.12)[0] == 8.0
    # rank 2 of 6, by a product in float32
    torch.manual_seed(0)
    product = torch.randn(6, 2) @ torch.randn(2, 6)
    assert np.isnan(spectrum_sizes(product.double(), torch.finfo(torch.float32).eps)[0])


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.layers[0].mlp = torch.nn.Module()
        self.layers[0].mlp.up_proj = torch.nn.Linear(2, 2)
        self.norm = torch.nn.LayerNorm(2, bias=False)
        self.dtype = torch.float32


class Given(Checkpoints):
    """A run of 2 x 2 weights, read into one module as the real ones are."""

    def __init__(self, weights: dict[int, list]):
        super().__init__([(step, "", None) for step in weights], run="given", options={})
        self.weights, self.module = weights, Block()

    def at(self, step):
        linear = self.module.layers[0].mlp.up_proj
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(self.weights[step], dtype=torch.float32))
            linear.bias.zero_()
            self.module.norm.weight.copy_(torch.tensor([1.0, 1.0]) * (1 + (step > 0)))
        return LanguageModel(self.module, None, run="given", step=step)


HAND = {0: [[3, 0], [0, 4]], 5: [[3, 0], [0, 9]], 7: [[6, 0], [0, 9]]}


def test_drift_by_hand():
    table = probe_weight_drift(Given(HAND))
    up = {"tensor": "layers.0.mlp.up_proj.weight"}
    # |W0| = 5. Step 5 is 5 away; step 7 is (3, 5) away, sqrt 34, and 3 from the step before
    np.testing.assert_allclose(read(table, "weight_change", **up), [0, 1, 34**0.5 / 5])
    np.testing.assert_allclose(read(table, "weight_change_previous", **up), [np.nan, 1, 0.6])
    # 9 + 36 over 5 sqrt 90; 18 + 36 over 5 sqrt 117
    cosine = [1, 45 / (5 * 90**0.5), 54 / (5 * 117**0.5)]
    np.testing.assert_allclose(read(table, "weight_cosine", **up), cosine)
    np.testing.assert_allclose(read(table, "condition_number", **up), [4 / 3, 3, 1.5])
    np.testing.assert_allclose(read(table, "stable_rank", **up), [25 / 16, 90 / 81, 117 / 81])
    # the norm goes from (1, 1) to (2, 2); a whole of 25 + 2 moves by 25 + 2, then 34 + 2
    np.testing.assert_allclose(read(table, "weight_change", module="norm", tensor="all"), [0, 1, 1])
    whole = read(table, "weight_change", module="all")
    np.testing.assert_allclose(whole, [0, 1, (36 / 27) ** 0.5])
    assert set(table["layer"][table["tensor"] == up["tensor"]]) == {0}
    assert set(table["layer"][table["module"] == "norm"]) == {-1}
    assert table["lo"].isna().all() and (table["n"] == 1).all()
    assert table.attrs["passport"]["base_step"] == 0


def test_what_is_undefined_has_its_reason():
    table = probe_weight_drift(Given({0: [[0, 0], [0, 0]], 5: [[1, 0], [0, 0]]}))
    nothing = table[table["value"].isna()]
    assert (nothing["reason"].notna()).all() and table["reason"].notna().sum() == len(nothing)
    of = {
        (row["metric"], row["tensor"].removeprefix("layers.0.mlp.up_proj."), row["step"]): row[
            "reason"
        ]
        for _, row in nothing.iterrows()
    }
    assert of["weight_change", "weight", 5] == "all weights are 0 at the base step"
    assert of["weight_cosine", "weight", 5] == "all weights are 0 at the base step"
    assert of["weight_change_previous", "weight", 0] == "no earlier checkpoint"
    assert of["condition_number", "weight", 0] == "all weights are 0"
    assert of["condition_number", "weight", 5] == "singular"
    assert ("stable_rank", "weight", 5) not in of
    assert of["effective_rank", "bias", 5] == "not a matrix"
    backwards = probe_weight_drift(Given({0: [[0, 0], [0, 0]], 5: [[1, 0], [0, 0]]}), base_step=5)
    gone = backwards[(backwards["metric"] == "weight_cosine") & (backwards["step"] == 0)]
    assert "all weights are 0" in set(gone["reason"])


PATH = HAND | {9: [[5, 0], [0, 5]]}


def test_turns_by_hand():
    table = probe_weight_drift(Given(PATH))
    # changes on the diagonal (0, 5), (3, 0), (-1, -4): at a right angle, then -3 / (3 sqrt 17)
    turn = [np.nan, np.nan, 0, -1 / 17**0.5]
    np.testing.assert_allclose(
        read(table, "weight_turn", tensor="layers.0.mlp.up_proj.weight"), turn
    )
    # weights and a bias that stays at 0 are the block's; 5 (of 5) at step 5 in it
    block = {"tensor": "all", "module": "mlp.up", "layer": 0}
    np.testing.assert_allclose(read(table, "weight_turn", **block), turn)
    np.testing.assert_allclose(read(table, "weight_change", **block)[1], 1)
    # the norm moves once, by (1, 1)
    assert np.isnan(read(table, "weight_turn", module="norm")).all()
    norm = table[(table["module"] == "norm") & (table["metric"] == "weight_turn")]
    why = norm[norm["tensor"] == "all"]["reason"].tolist()
    assert why == ["no two earlier checkpoints"] * 2 + ["did not move"] * 2
    straight = Given({step: [[step, 0], [0, 1]] for step in (1, 2, 4)})
    up = {"tensor": "layers.0.mlp.up_proj.weight", "step": 4}
    np.testing.assert_allclose(read(probe_weight_drift(straight), "weight_turn", **up), [1])


def test_path_by_hand():
    phases = {"first": (0, 7), "second": (7, 9), "both": (0, 9)}
    table = probe_weight_path(Given(PATH), phases=phases)
    up = {"module": "mlp.up", "layer": -1}
    first, second, both = ({"phase": name, **up} for name in phases)
    # steps of 5, 3 and sqrt 17 against |W0| = 5; ends (3, 5), (-1, -4) and (2, 1) from the starts
    np.testing.assert_allclose(read(table, "weight_path", **first), 8 / 5)
    np.testing.assert_allclose(read(table, "weight_net", **first), 34**0.5 / 5)
    np.testing.assert_allclose(read(table, "straightness", **first), 34**0.5 / 8)
    np.testing.assert_allclose(read(table, "weight_path", **second), 17**0.5 / 5)
    np.testing.assert_allclose(read(table, "straightness", **second), 1)
    np.testing.assert_allclose(read(table, "weight_path", **both), (8 + 17**0.5) / 5)
    np.testing.assert_allclose(read(table, "straightness", **both), 5**0.5 / (8 + 17**0.5))
    for here, there, cosine in (
        (first, "second", -23 / (34 * 17) ** 0.5),
        (second, "first", -23 / (34 * 17) ** 0.5),
        (both, "first", 11 / (5 * 34) ** 0.5),
    ):
        np.testing.assert_allclose(read(table, "phase_cosine", against=there, **here), cosine)
    # with the norm, which moves sqrt 2 in the first step and is sqrt 2 long
    whole = {"module": "all", "layer": -1, "phase": "first"}
    np.testing.assert_allclose(read(table, "weight_path", **whole), (27**0.5 + 3) / 27**0.5)
    np.testing.assert_allclose(read(table, "weight_net", **whole), (36 / 27) ** 0.5)
    still = table[(table["module"] == "norm") & (table["phase"] == "second")]
    reasons = still.set_index("metric")["reason"].astype(object).to_dict()
    assert reasons["straightness"] == reasons["phase_cosine"] == "did not move"
    assert read(still, "weight_path").tolist() == read(still, "weight_net").tolist() == [0]
    by_phase = table.groupby("phase", observed=True)[["step", "changes"]].agg(["min", "max"])
    assert by_phase.loc["first"].tolist() == [7, 7, 2, 2]
    assert by_phase.loc["second"].tolist() == [9, 9, 1, 1]
    assert set(table["layer"][table["module"] == "mlp.up"]) == {-1, 0}
    nothing = probe_weight_path(Given({0: [[0, 0], [0, 0]], 5: [[1, 0], [0, 0]]}))
    assert set(nothing["phase"]) == {"whole run"}
    up = nothing[(nothing["module"] == "mlp.up") & (nothing["layer"] == 0)]
    up = up.set_index("metric")
    assert up.loc["weight_path", "reason"] == "all weights are 0 at the first step"
    assert up.loc["straightness", "value"] == 1


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("run")
    for step in (0, 4, 9):
        neox(step, layers=2).save_pretrained(folder / f"step{step}")
    tokenizer.save_pretrained(folder)
    return folder


def test_drift_is_what_the_files_say(run_folder):
    table = probe_weight_drift(load_checkpoints(run_folder), base_step=4)
    files = {
        step: {
            name: values.astype(np.float64)
            for name, values in load_file(run_folder / f"step{step}" / "model.safetensors").items()
        }
        for step in (0, 4, 9)
    }
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    base = files[4][name]
    for before, step in ((None, 0), (0, 4), (4, 9)):
        now = files[step][name]
        where = {"tensor": name, "step": step, "module": "mlp.down", "layer": 1}
        change = np.sqrt(((now - base) ** 2).sum()) / np.sqrt((base**2).sum())
        np.testing.assert_allclose(read(table, "weight_change", **where), [change], rtol=1e-12)
        cosine = (now * base).sum() / np.sqrt((now**2).sum() * (base**2).sum())
        np.testing.assert_allclose(read(table, "weight_cosine", **where), [cosine], rtol=1e-12)
        condition = read(table, "condition_number", **where)
        np.testing.assert_allclose(condition, [np.linalg.cond(now)], rtol=1e-10)
        if before is not None:
            gap = np.linalg.norm(now - files[before][name]) / np.linalg.norm(base)
            got = read(table, "weight_change_previous", **where)
            np.testing.assert_allclose(got, [gap], rtol=1e-12)
    # every parameter counts once, also where q, k and v are taken apart
    total = {s: np.concatenate([files[s][n].ravel() for n in sorted(files[s])]) for s in files}
    change = np.linalg.norm(total[9] - total[4]) / np.linalg.norm(total[4])
    got = read(table, "weight_change", module="all", step=9)
    np.testing.assert_allclose(got, [change], rtol=1e-12)


def test_path_is_what_the_files_say(run_folder):
    table = probe_weight_path(
        load_checkpoints(run_folder), phases={"one": (0, 4), "two": (4, 9), "whole": (0, 9)}
    )
    files = [load_file(run_folder / f"step{step}" / "model.safetensors") for step in (0, 4, 9)]
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h"
    for layer, parts in ((1, [f"{name}.weight", f"{name}.bias"]), (-1, sorted(files[0]))):
        at = [np.concatenate([f[n].astype(float).ravel() for n in parts]) for f in files]
        where = {"module": "mlp.up" if layer == 1 else "all", "layer": layer}
        lengths = [np.linalg.norm(at[i + 1] - at[i]) for i in (0, 1)]
        size, net = np.linalg.norm(at[0]), np.linalg.norm(at[2] - at[0])
        whole = {"phase": "whole", **where}
        np.testing.assert_allclose(read(table, "weight_path", **whole), sum(lengths) / size)
        np.testing.assert_allclose(read(table, "weight_net", **whole), net / size)
        np.testing.assert_allclose(read(table, "straightness", **whole), net / sum(lengths))
    first, second = at[1] - at[0], at[2] - at[1]
    want = first @ second / (lengths[0] * lengths[1])
    got = read(table, "phase_cosine", phase="two", against="one", module="all")
    np.testing.assert_allclose(got, want, rtol=1e-6)
    drift = probe_weight_drift(load_checkpoints(run_folder))
    turn = read(drift, "weight_turn", module="all", step=9)
    np.testing.assert_allclose(turn, want, rtol=1e-6)


def test_a_run_of_equal_checkpoints_does_not_drift(tmp_path, tokenizer):
    for step in (1, 2):
        neox(3).save_pretrained(tmp_path / f"step{step}")
    tokenizer.save_pretrained(tmp_path)
    table = probe_weight_drift(load_checkpoints(tmp_path))
    assert np.nanmax(read(table, "weight_change")) == 0
    assert np.nanmax(read(table, "weight_change_previous", step=2)) == 0
    assert np.nanmin(read(table, "weight_cosine")) > 1 - 1e-12


def test_q_k_and_v_are_taken_apart_as_the_model_does():
    """q by 2 with k by 1/2 changes no score; v by 2 with o by 1/2 changes no output."""
    torch.manual_seed(1)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    ).eval()
    ids = torch.arange(12)[None]
    for module in (neox(1), gpt2):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        before = module(ids).logits
        fused = [p for n, p in module.named_parameters() if "query_key_value" in n or "c_attn" in n]
        kept = [each.detach().clone() for each in fused]
        for factors in ({"attn.q": 2.0, "attn.k": 0.5}, {"attn.q": 2.0, "attn.k": 2.0}):
            # where each role's numbers lie is found by marking them, then by what changed
            for parameter, original in zip(fused, kept, strict=True):
                scale = _scales(module, parameter, factors)
                parameter.data = original * scale
            same = torch.allclose(module(ids).logits, before, atol=1e-5)
            assert same == (factors["attn.k"] == 0.5)
            for parameter, original in zip(fused, kept, strict=True):
                parameter.data = original.clone()


def _scales(module, parameter, factors) -> torch.Tensor:
    """For each number of a fused parameter the factor of the role that it is yielded under."""
    original = parameter.detach().clone()
    parameter.data = torch.arange(parameter.numel()).reshape(parameter.shape).float()
    name = next(n for n, p in module.named_parameters() if p is parameter)
    scale = torch.ones(parameter.numel())
    for tensor, role, _, value in weight_tensors(module):
        if tensor.startswith(f"{name}."):
            scale[value.flatten().long()] = factors.get(role, 1.0)
    parameter.data = original
    return scale.reshape(parameter.shape)


def test_roles_of_the_families():
    of_neox = {(role, block) for _, role, block, _ in weight_tensors(neox(layers=2))}
    blocks = {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down", "norm"}
    outside = {("embedding", -1), ("head", -1), ("norm", -1)}
    assert of_neox == {(role, block) for role in blocks for block in (0, 1)} | outside
    of_llama = {(role, block) for _, role, block, _ in weight_tensors(llama())}
    assert of_llama == {(role, 0) for role in blocks | {"mlp.gate"}} | outside
    tied = [role for _, role, _, _ in weight_tensors(llama(tie_word_embeddings=True))]
    assert tied.count("embedding") == 1 and "head" not in tied


def test_drift_errors(run_folder, tmp_path, tokenizer):
    with pytest.raises(InputError) as error:
        probe_weight_drift(language(neox(), tokenizer))
    assert str(error.value) == (
        "probe_weight_drift: source is a LanguageModel, needs the checkpoints of a run; load them "
        "with load_checkpoints"
    )
    run = load_checkpoints(run_folder)
    with pytest.raises(InputError) as error:
        probe_weight_drift(run.select([4]))
    assert str(error.value) == (
        f"probe_weight_drift: {run.run} has checkpoints at [4], needs at least two to compare"
    )
    with pytest.raises(InputError) as error:
        probe_weight_drift(run, base_step=3)
    assert str(error.value) == (
        "probe_weight_drift: no checkpoint at base step 3; there are [0, 4, 9]"
    )
    broken = Given(HAND | {7: [[float("nan"), 0], [0, 1]]})
    with pytest.raises(InputError) as error:
        probe_weight_drift(broken)
    assert str(error.value) == (
        "probe_weight_drift: layers.0.mlp.up_proj.weight is not finite at step 7 of given; the "
        "checkpoint holds NaN or Inf: leave that step out with select"
    )
    for step, width in ((0, 16), (1, 8)):
        neox(width=width).save_pretrained(tmp_path / f"step{step}")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError) as error:
        probe_weight_drift(load_checkpoints(tmp_path))
    assert str(error.value) == (
        "probe_weight_drift: gpt_neox.embed_in.weight is (300, 16) at step 0 and (300, 8) at step "
        "1; give checkpoints of one architecture"
    )
    quantised = Given(HAND)
    quantised.module.whole = torch.nn.Parameter(
        torch.ones(2, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(InputError) as error:
        probe_weight_drift(quantised)
    assert str(error.value) == (
        "probe_weight_drift: whole holds torch.int8 weights, needs floats; load the model without "
        "quantisation"
    )


def test_path_errors(run_folder, tokenizer):
    run = load_checkpoints(run_folder)
    with pytest.raises(InputError) as error:
        probe_weight_path(language(neox(), tokenizer))
    assert str(error.value) == (
        "probe_weight_path: source is a LanguageModel, needs the checkpoints of a run; load them "
        "with load_checkpoints"
    )
    with pytest.raises(InputError) as error:
        probe_weight_path(run, phases={})
    assert str(error.value) == (
        "probe_weight_path: phases is empty; give names with steps, or None for one phase"
    )
    for start, end in ((0, 5), (3, 9), (4, 4), (9, 0)):
        with pytest.raises(InputError) as error:
            probe_weight_path(run, phases={"late": (start, end)})
        assert str(error.value) == (
            f"probe_weight_path: phase 'late' runs from {start} to {end}, needs a checkpoint and a "
            "later one; there are [0, 4, 9]"
        )
    with pytest.raises(InputError) as error:
        probe_weight_path(Given(HAND | {7: [[float("nan"), 0], [0, 1]]}))
    assert str(error.value) == (
        "probe_weight_path: layers.0.mlp.up_proj.weight is not finite at step 7 of given; the "
        "checkpoint holds NaN or Inf: leave that step out with select"
    )


# Representations


def gram_hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Székely & Rizzo's form: mean product of U-centred Gram matrices."""
    n = len(x)

    def centred(values):
        k = values @ values.T
        np.fill_diagonal(k, 0)
        rows = k.sum(axis=0)
        k = k - rows[:, None] / (n - 2) - rows / (n - 2) + k.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(k, 0)
        return k

    return (centred(x) * centred(y)).sum() / (n * (n - 3))


def gram_cka(x, y) -> float:
    return gram_hsic(x, y) / np.sqrt(gram_hsic(x, x) * gram_hsic(y, y))


def cka(x, y) -> float:
    x, y = torch.from_numpy(np.asarray(x, float)), torch.from_numpy(np.asarray(y, float))
    return linear_cka(len(x), [pair_sums(x, x), pair_sums(x, y), pair_sums(y, y)])


def test_hsic_by_hand():
    # x = y = (1, 1, -1, -1): off the diagonal K is 1 twice and -1 four times in pairs, so
    # tr KK = 12; row sums -1, so 1'K1 = -4 and 1'KK1 = 4: (12 + 16/6 - 8/2) / 4 = 2.6666667
    x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]).double()
    np.testing.assert_allclose(hsic(4, pair_sums(x, x)), 8 / 3)
    assert np.isnan(hsic(3, pair_sums(x[:3], x[:3])))
    # (1, -1, 1, -1): KL is 1 where the pair is opposite in both and -1 otherwise: tr KL = -4;
    # 1'KL1 = 4: (-4 + 16/6 - 4) / 4 = -4/3, so CKA is -1/2
    y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]).double()
    np.testing.assert_allclose(hsic(4, pair_sums(x, y)), -4 / 3)
    np.testing.assert_allclose(cka(x.numpy(), y.numpy()), -0.5)


@settings(deadline=None, max_examples=30)
@given(st.integers(4, 30), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_cka_is_that_of_gram_matrices_and_sees_no_rotation_scale_or_shift(n, p, q, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, p)), rng.normal(size=(n, q))
    y[:, 0] += x[:, 0]
    first, second = (torch.from_numpy(each) for each in (x, y))
    np.testing.assert_allclose(hsic(n, pair_sums(first, second)), gram_hsic(x, y), atol=1e-10)
    np.testing.assert_allclose(cka(x, y), np.clip(gram_cka(x, y), -1, 1), atol=1e-9)
    turn = np.linalg.qr(rng.normal(size=(q, q)))[0]
    np.testing.assert_allclose(cka(x, 7.0 * y @ turn + 3.0), cka(x, y), atol=1e-8)
    np.testing.assert_allclose(cka(x, -2.0 * x + 1.0), 1.0, atol=1e-9)
    np.testing.assert_allclose(cka(y, x), cka(x, y), atol=1e-12)


def test_cka_of_unrelated_states_is_zero_on_average_however_few_the_tokens():
    rng = np.random.default_rng(0)
    draws = [(rng.normal(size=(8, 24)), rng.normal(size=(8, 24))) for _ in range(400)]
    got = np.array([cka(x, y) for x, y in draws])
    # standard error about .012; five of them are met by accident once in two million
    assert abs(got.mean()) < 5 * got.std() / 20
    centred = [tuple(each - each.mean(axis=0) for each in pair) for pair in draws]
    norm = np.linalg.norm
    biased = [norm(x.T @ y) ** 2 / (norm(x.T @ x) * norm(y.T @ y)) for x, y in centred]
    assert np.mean(biased) > 0.7  # what the common form gives for the same nothing


def test_an_interval_by_hand():
    # artanh of the values without each item: .5 and .7; jackknife error sqrt(1/2 (.01 + .01)) =
    # .1; t(.975, 1) = 12.7062047, so .6 -+ 1.2706205
    low, high = jackknife_interval(np.tanh([0.6]), np.tanh([[0.5, 0.7]]))
    np.testing.assert_allclose(np.arctanh([low[0], high[0]]), [-0.6706205, 1.8706205], atol=1e-6)
    low, high = jackknife_interval(np.array([0.6]), np.array([[0.5]]))
    assert np.isnan(low[0]) and np.isnan(high[0])


def test_cka_of_two_models_is_that_of_their_states_one_text_at_a_time(tokenizer):
    for parts in ((neox(0, layers=1), llama(1)), (neox(0, layers=2), neox(1, layers=2))):
        a, b = (language(m, tokenizer, run=n) for m, n in zip(parts, "ab", strict=True))
        table = probe_cka(a, b, ITEMS)
        states = [[], []]
        for text in ENGLISH:
            ids = torch.tensor(tokenizer(text)["input_ids"])[None]
            for kept, model in zip(states, (a, b), strict=True):
                with torch.no_grad():
                    out = model.module(ids, output_hidden_states=True).hidden_states
                kept.append([each[0, 1:].double().numpy() for each in out])
        for layer in range(len(states[0][0])):
            xs, ys = ([text[layer] for text in each] for each in states)
            want = gram_cka(np.concatenate(xs), np.concatenate(ys))
            np.testing.assert_allclose(read(table, "cka", layer=layer), [want], atol=1e-6)
            without = [
                gram_cka(np.concatenate(xs[:i] + xs[i + 1 :]), np.concatenate(ys[:i] + ys[i + 1 :]))
                for i in range(len(ENGLISH))
            ]
            low, high = jackknife_interval(np.array([want]), np.array([without]))
            row = table[table["layer"] == layer].iloc[0]
            np.testing.assert_allclose([row["lo"], row["hi"]], [low[0], high[0]], atol=1e-5)
        assert (table["n"] == 6).all() and set(table["against"]) == {"a at step 0"}
        assert set(table["run"]) == {"b"}


def test_a_model_is_like_itself(tokenizer):
    model = language(llama(), tokenizer)
    table = probe_cka(model, model, ITEMS)
    np.testing.assert_allclose(table["value"], 1.0, atol=1e-12)
    np.testing.assert_allclose(table["lo"], 1.0, atol=1e-9)
    shorter = probe_cka(model, model, ITEMS.head(1))
    assert shorter["lo"].isna().all() and (shorter["value"] > 1 - 1e-12).all()


def test_states_that_are_all_the_same_have_no_cka(tokenizer):
    flat = neox(0)
    with torch.no_grad():
        flat.gpt_neox.embed_in.weight.fill_(0.5)
    table = probe_cka(language(neox(1), tokenizer), language(flat, tokenizer, run="b"), ITEMS)
    assert np.isnan(table["value"].iloc[0])
    assert table["reason"].iloc[0] == "the hidden states of a model are all the same"


def test_a_difference_that_is_only_rounding_has_no_cka():
    # what rounding leaves of the HSIC is above 0 in some of the draws, below it in others
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(9, 3))
        still = 1 + 1e-9 * rng.normal(size=(9, 3))
        assert np.isnan(cka(x, still)) and np.isnan(cka(still, x))


def test_comparisons_refuse_what_cannot_be_compared(run_folder, tokenizer):
    a, deep = language(neox(), tokenizer), language(neox(layers=2), tokenizer, run="b")
    with pytest.raises(InputError) as error:
        probe_cka(a, deep, ITEMS)
    assert str(error.value) == (
        "probe_cka: a at step 0 has 1 blocks, b at step 0 2; give models of one depth"
    )
    run = load_checkpoints(run_folder)
    early, late = run.at(0), run.at(9)
    for probe in (probe_cka, probe_barrier):
        with pytest.raises(InputError) as error:
            probe(early, late, ITEMS)
        assert str(error.value) == (
            f"{probe.__name__}: {run.run} at step 0 and {run.run} at step 9 share one module, which "
            "holds the weights of the one read last; take .copy() of the first before reading the "
            "second"
        )
    other = bigram(np.zeros((300, 300)))
    with pytest.raises(InputError) as error:
        probe_cka(bigram(np.zeros((9, 9)), run="a"), other, frame(["1 2"]))
    assert str(error.value) == "probe_cka: the texts have 1 tokens after their first, needs 4"
    begun = bigram(np.zeros((9, 9)), run="b")
    begun.bos = 3
    with pytest.raises(InputError) as error:
        probe_barrier(bigram(np.zeros((9, 9)), run="a"), begun, frame(["1 2"]))
    assert str(error.value) == (
        "probe_barrier: the tokenizers of a at step 0 and b at step 0 begin texts otherwise; give "
        "models of one tokenizer"
    )
    reader = SimpleNamespace(encode=lambda texts: [np.array([7, 7])] * len(texts))
    begun.bos, begun.encode = None, reader.encode
    with pytest.raises(InputError) as error:
        probe_barrier(bigram(np.zeros((9, 9)), run="a"), begun, frame(["7 7", "1 2"]))
    assert str(error.value) == (
        "probe_barrier: the tokenizers of a at step 0 and b at step 0 cut text number 1 into other "
        "tokens; give models of one tokenizer"
    )
    broken = neox(1)
    with torch.no_grad():
        broken.gpt_neox.embed_in.weight.fill_(float("nan"))
    with pytest.raises(InputError) as error:
        probe_cka(a, language(broken, tokenizer, run="b"), ITEMS.head(1))
    assert str(error.value) == (
        "probe_cka: the hidden states of b at step 0 are not finite for item 'i0'; the weights or "
        "their dtype give NaN or Inf"
    )
    with pytest.raises(InputError) as error:
        probe_barrier(a, language(broken, tokenizer, run="b"), ITEMS.head(1), points=3)
    assert str(error.value) == (
        "probe_barrier: the loss of item 'i0' is not finite at alpha 0; the weights of a at step 0 "
        "or b at step 0 give NaN or Inf"
    )


# Mode connectivity


def test_height_by_hand():
    # 1, 4, 2: 4 - 1.5. 3, 1, 2, 0: the line is 3, 2, 1, 0: below it by 1, above by 1
    height, where = barrier_height(np.array([1.0, 4.0, 2.0]), np.array([0.0, 0.5, 1.0]))
    assert (height, where) == (2.5, 1)
    at = np.linspace(0, 1, 4)
    losses = np.array([[3.0, 1.0, 2.0, 0.0], [3.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    height, where = barrier_height(losses, at)
    np.testing.assert_allclose(height, [1.0, -0.5, 0.0], atol=1e-12)
    assert where.tolist() == [2, 2, 1]


@settings(deadline=None)
@given(st.floats(0, 9), st.floats(-9, 9), st.floats(-9, 9), st.integers(3, 20), st.booleans())
def test_a_convex_loss_has_no_barrier_and_a_concave_one_has(bend, slope, level, points, turned):
    at = np.linspace(0, 1, points)
    sign = -1 if turned else 1
    height, _ = barrier_height(sign * (bend * at**2 + slope * at + level), at)
    # a (alpha^2 - alpha), least in the middle, greatest beside the ends
    excess = -bend * at * (1 - at) * sign
    np.testing.assert_allclose(height, excess[1:-1].max(), atol=1e-12)
    assert (height <= 1e-12) != turned or abs(height) < 1e-12


def test_barrier_of_two_tokens_by_hand():
    # "0 1" under logits (0, z): loss ln(1 + exp -z), z = 0 in A and 2 in B; .6931472, .3132617 in
    # the middle, .1269280; the line's middle is .4100376, so -.0967759: convex, no barrier.
    # "1 0" has logits (0, 0) in both.
    a, b = bigram([[0, 0], [0, 0]], run="a"), bigram([[0, 2], [0, 0]], run="b", step=4)
    table = probe_barrier(a, b, frame(["0 1", "1 0"], group=["seen", "never"]), points=3)
    np.testing.assert_allclose(
        read(table, "loss", item="i0"), [0.6931472, 0.3132617, 0.1269280], atol=1e-6
    )
    np.testing.assert_allclose(read(table, "barrier", item="i0"), [-0.0967759], atol=1e-6)
    np.testing.assert_allclose(read(table, "barrier", item="i1"), [0], atol=1e-7)
    both = table[(table["item"] == "all") & (table["group"] == "all")]
    np.testing.assert_allclose(read(both, "barrier"), [-0.0967759 / 2], atol=1e-6)
    row = both[both["metric"] == "barrier"].iloc[0]
    # of two items: both the first, both the second, or one each
    np.testing.assert_allclose([row["lo"], row["hi"]], [-0.0967759, 0], atol=1e-6)
    assert (row["n"], row["alpha"], row["run"], row["step"]) == (2, 0.5, "b", 4)
    alone = table[(table["item"] == "all") & (table["group"] == "seen")]
    assert alone["lo"].isna().all() and (alone["n"] == 1).all()


def test_barrier_of_real_models_is_that_of_plain_forward_passes(tokenizer):
    for make in (neox, llama):
        a, b = (language(make(seed), tokenizer, run=f"m{seed}") for seed in (0, 1))
        before = a.weights_hash(), b.weights_hash()
        table = probe_barrier(a, b, ITEMS, points=3)
        assert (a.weights_hash(), b.weights_hash()) == before
        between = make(2)
        state = b.module.state_dict()
        between.load_state_dict({n: 0.5 * (v + state[n]) for n, v in a.module.state_dict().items()})
        losses = []
        for module in (a.module, between, b.module):
            for text in ENGLISH:
                ids = torch.tensor(tokenizer(text)["input_ids"])[None]
                with torch.no_grad():
                    losses.append(float(module(ids, labels=ids).loss))
        losses = np.array(losses).reshape(3, -1)
        for item in range(len(ENGLISH)):
            got = read(table, "loss", item=f"i{item}")
            np.testing.assert_allclose(got, losses[:, item], atol=1e-5)
        mean = losses[:, 1::2].mean(axis=1)
        never = table[(table["item"] == "all") & (table["group"] == "never")]
        np.testing.assert_allclose(read(never, "loss"), mean, atol=1e-5)
        want = mean[1] - (mean[0] + mean[2]) / 2
        np.testing.assert_allclose(read(never, "barrier"), [want], atol=1e-5)
        inside = (never["lo"] <= never["value"] + 1e-9) & (never["value"] <= never["hi"] + 1e-9)
        assert inside.all()


def test_a_model_and_itself_have_no_barrier_and_its_mirror_image_has(tokenizer):
    module = neox(0, width=16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    a = language(module, tokenizer)
    table = probe_barrier(a, a, ITEMS)
    np.testing.assert_allclose(read(table, "barrier"), 0, atol=1e-12)
    # the same function with its inner neurons in another order: equal losses, not connected
    mirror = a.copy()
    mirror.run = "mirror"
    mlp = mirror.module.gpt_neox.layers[0].mlp
    with torch.no_grad():
        mlp.dense_h_to_4h.weight.copy_(mlp.dense_h_to_4h.weight.flip(0))
        mlp.dense_h_to_4h.bias.copy_(mlp.dense_h_to_4h.bias.flip(0))
        mlp.dense_4h_to_h.weight.copy_(mlp.dense_4h_to_h.weight.flip(1))
    table = probe_barrier(a, mirror, ITEMS, points=5)
    pooled = table[(table["item"] == "all") & (table["group"] == "all")]
    loss = read(pooled, "loss")
    np.testing.assert_allclose(loss, loss[::-1], atol=1e-4)  # the line reads the same backwards
    assert np.abs(read(pooled, "barrier")) > 0.01
    np.testing.assert_allclose(probe_cka(a, mirror, ITEMS)["value"], 1.0, atol=1e-6)


def test_barrier_errors(tokenizer):
    a = language(neox(), tokenizer)
    with pytest.raises(InputError) as error:
        probe_barrier(a, a, ITEMS, points=2)
    assert str(error.value) == (
        "probe_barrier: points is 2, but must be at least 3: both ends and one"
    )
    with pytest.raises(InputError) as error:
        probe_barrier(a, language(neox(width=8), tokenizer, run="b"), ITEMS)
    assert str(error.value) == (
        "probe_barrier: a at step 0 and b at step 0 differ in gpt_neox.embed_in.weight, (300, 16) "
        "against (300, 8); between other shapes there is no line"
    )
    with pytest.raises(InputError) as error:
        probe_barrier(a, language(neox(num_attention_heads=4), tokenizer, run="b"), ITEMS)
    assert str(error.value) == (
        "probe_barrier: a at step 0 and b at step 0 have one shape, but num_attention_heads 2 "
        "against 4; what lies between is neither's model"
    )


# Plots


def drawn(figure) -> dict[str, list]:
    return {
        t.hovertemplate.split("<extra>")[-1].removesuffix("</extra>"): list(t.y)
        for t in figure.data
    }


def test_drift_is_drawn_by_role_and_block():
    table = probe_weight_drift(Given(PATH))
    lines = drawn(plot_drift(table, title="t"))
    np.testing.assert_allclose(lines["mlp.up, block 0"], [0, 1, 34**0.5 / 5, 5**0.5 / 5], atol=1e-6)
    np.testing.assert_allclose(lines["all, all blocks, or outside"][:2], [0, 1], atol=1e-6)
    figure = plot_drift(table, metric="condition_number")
    assert figure.layout.yaxis.type == "log"
    np.testing.assert_allclose(drawn(figure)["mlp.up, block 0"], [4 / 3, 3, 1.5, 1], atol=1e-6)
    heat = plot_drift_heat(table, step=7).data[0]
    assert (list(heat.x), list(heat.y)) == (["mlp.up"], ["block 0"])
    np.testing.assert_allclose(heat.z, [[34**0.5 / 5]], atol=1e-6)
    assert "step 9" in plot_drift_heat(table).layout.xaxis.title.text
    with pytest.raises(InputError) as error:
        plot_drift_heat(table, step=6)
    assert str(error.value) == "plot_drift_heat: no rows at step 6; there are 0, 5, 7, 9"
    with pytest.raises(InputError) as error:
        plot_drift_heat(table[table["module"] == "norm"])
    assert str(error.value) == (
        "plot_drift_heat: no weight_change of any block; there is nothing to map"
    )
    with pytest.raises(InputError) as error:
        plot_drift(table[table["step"] == 0], metric="weight_turn")
    assert str(error.value) == (
        "plot_drift: weight_turn is undefined in all rows; ask for another step"
    )
    with pytest.raises(InputError) as error:
        plot_drift(pd.concat([table, table.assign(run="other")]))
    assert str(error.value) == (
        "plot_drift: several rows per (step, module, layer); select one run"
    )


def test_paths_are_drawn_by_phase():
    table = probe_weight_path(Given(PATH), phases={"first": (0, 7), "second": (7, 9)})
    path, net = plot_path(table, module="mlp.up").data
    assert list(path.x) == ["first", "second"]
    np.testing.assert_allclose(path.y, [8 / 5, 17**0.5 / 5], atol=1e-6)
    np.testing.assert_allclose(net.y, [34**0.5 / 5, 17**0.5 / 5], atol=1e-6)
    assert list(path.text) == ["0.73", ""]  # sqrt 34 / 8; one change is always straight
    with pytest.raises(InputError) as error:
        plot_path(table, module="mlp.gate")
    assert str(error.value) == "plot_path: no rows of module 'mlp.gate'"


def test_a_barrier_is_drawn_with_its_height():
    a, b = bigram([[0, 0], [0, 0]], run="a"), bigram([[0, 2], [0, 0]], run="b", step=4)
    table = probe_barrier(a, b, frame(["0 1", "1 0"], group=["seen", "never"]), points=3)
    figure = plot_barrier(table)
    loss, ends, tall = figure.data[:3]  # of one item: no band
    np.testing.assert_allclose(loss.y, [0.6931472, 0.3132617, 0.1269280], atol=1e-6)
    assert loss.name == "seen: -0.10"
    np.testing.assert_allclose(ends.y, [0.6931472, 0.1269280], atol=1e-6)
    # from the line's middle to the loss
    np.testing.assert_allclose(tall.y, [0.4100376, 0.3132617], atol=1e-6)
    assert list(tall.x) == [0.5, 0.5]
    assert figure.layout.xaxis.title.text == (
        "place on the line, from a at step 0 (0) to b at step 4 (1)"
    )
    with pytest.raises(InputError) as error:
        plot_barrier(pd.concat([table, table.assign(run="c")]))
    assert str(error.value) == (
        "plot_barrier: several rows per (group, alpha); select one pair of models"
    )


def test_cka_is_drawn_with_its_floor(tokenizer):
    a, b = language(neox(0), tokenizer), language(neox(1), tokenizer, run="b")
    table = pd.concat(
        [
            probe_cka(a, b, ITEMS).assign(pair="floor"),
            probe_cka(a, a, ITEMS).assign(pair="itself"),
        ]
    )
    itself, floor = plot_cka(table, floor="floor").data
    np.testing.assert_allclose(itself.y, 1)
    assert (itself.name, floor.name, floor.line.dash) == ("itself", "floor", "dash")
    assert plot_cka(probe_cka(a, b, ITEMS)).data[0].name == "b at step 0, a at step 0"
    with pytest.raises(InputError) as error:
        plot_cka(table, floor="ceiling")
    assert str(error.value) == "plot_cka: no pair 'ceiling'; there are floor, itself"
    with pytest.raises(InputError) as error:
        plot_cka(table.assign(pair="one"))
    assert str(error.value) == "plot_cka: several rows per (pair, layer); select one"
