"""One object says how a model is sampled from; scoring and drawing follow the same rules."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.conftest import Numbers, bigram, neox, reciter
from workbench.decoding import NUCLEUS, Decoding, check_schemes, rank_of, true_log_probability
from workbench.models import LanguageModel, draw
from workbench.table import InputError

FOUR = (
    Decoding.greedy(),
    Decoding(temperature=0.7),
    Decoding(top_k=5),
    Decoding(temperature=1.3, top_p=0.8),
    Decoding(temperature=0.5, top_k=20, top_p=0.6),
)


def logits_of(*probability):
    return torch.tensor([probability], dtype=torch.float32).log()


def probabilities(scheme, logits):
    return scheme.log_probabilities(logits).exp()[0].tolist()


@pytest.mark.parametrize(
    ("scheme", "want"),
    [
        (Decoding(), [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        (Decoding.greedy(), [1, 0, 0, 0]),
        # squares: 16, 4, 1, 1 of 22
        (Decoding(temperature=0.5), [16 / 22, 4 / 22, 1 / 22, 1 / 22]),
        (Decoding(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Decoding(top_k=9), [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        # a half and a quarter are exactly the mass asked for
        (Decoding(top_p=0.75), [2 / 3, 1 / 3, 0, 0]),
        # a little more takes the first of the two equal ones
        (Decoding(top_p=0.76), [4 / 7, 2 / 7, 1 / 7, 0]),
        (Decoding(top_p=0.01), [1, 0, 0, 0]),
        (Decoding(top_p=1.0), [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        # temperature first: then 16 / 22 = .727 alone holds .7, where a half would not
        (Decoding(temperature=0.5, top_p=0.7), [1, 0, 0, 0]),
        # top-k first: of 4, 2, 1 sevenths two hold .857, where .75 of the whole would not do
        (Decoding(top_k=3, top_p=0.8), [2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_schemes_by_hand(scheme, want):
    logits = logits_of(1 / 2, 1 / 4, 1 / 8, 1 / 8)
    assert probabilities(scheme, logits) == pytest.approx(want, abs=1e-6)
    for token, value in enumerate(want):
        got = true_log_probability(logits, torch.tensor([token]), [scheme])
        assert got.exp().item() == pytest.approx(value, abs=1e-6)


def test_among_equals_the_lowest_id_comes_first():
    assert probabilities(Decoding(top_k=2), torch.zeros(1, 4)) == [0.5, 0.5, 0, 0]
    assert probabilities(Decoding(top_p=0.5), torch.zeros(1, 4)) == [0.5, 0.5, 0, 0]
    assert probabilities(Decoding.greedy(), torch.tensor([[1.0, 2, 2, 2]])) == [0, 1, 0, 0]
    # the limit of a small temperature shares what greedy gives to one
    small = probabilities(Decoding(temperature=1e-40), torch.tensor([[1.0, 2, 2, 0]]))
    assert small == [0, 0.5, 0.5, 0]
    assert rank_of(torch.tensor([[1.0, 2, 2, 0]]), torch.tensor([2])).item() == 2


def by_definition(logits, scheme, clear):
    """Sort, cut and renormalise, one token after another, in double precision.

    ``clear`` is asked whether each sum is clear of ``top_p``, where rounding decides.
    """
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if scheme.temperature == 0:
        return {order[0]: 1.0}
    top = logits[order[0]]
    mass = {token: math.exp((logits[token] - top) / scheme.temperature) for token in order}
    kept = order[: scheme.top_k]
    if scheme.top_p is not None and scheme.top_p < 1:
        whole, held, few = sum(mass[token] for token in kept), 0.0, []
        for token in kept:
            if held >= scheme.top_p * whole:
                break
            clear(abs(held / whole - scheme.top_p) > 1e-5)
            few.append(token)
            held += mass[token]
        clear(abs(held / whole - scheme.top_p) > 1e-5)
        kept = few
    total = sum(mass[token] for token in kept)
    return {token: mass[token] / total for token in kept}


def agrees(logits, scheme, clear=bool):
    want = np.zeros(len(logits))
    for token, value in by_definition(logits, scheme, clear).items():
        want[token] = value
    rows = torch.tensor([logits] * len(logits), dtype=torch.float32)
    full = scheme.log_probabilities(rows[:1])[0]
    # what underflows in float32 is kept, at -inf or nearly; elsewhere outside means -inf exactly
    assert (full.exp() - torch.from_numpy(want)).abs().max() < 2e-6
    one = true_log_probability(rows, torch.arange(len(logits)), [scheme])[:, 0]
    torch.testing.assert_close(one, full, atol=2e-5, rtol=2e-6)
    assert (one <= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-8, 8), min_size=2, max_size=12),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 14),
    top_p=st.none() | st.floats(0.01, 1.0),
)
def test_schemes_are_their_definition_ties_included(logits, temperature, top_k, top_p):
    agrees([each / 2 for each in logits], Decoding(temperature, top_k, top_p), assume)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_a_nucleus_wider_than_the_first_look(spread):
    # nearly uniform over 1,500 tokens: 90 % of the mass are some 1,350 of them, far beyond the
    # tokens looked at first, and beyond the eightfold
    assert 8 * NUCLEUS < 1350
    logits = spread * np.random.default_rng(0).normal(size=(3, 1500)).astype(np.float32)
    for row in logits:
        agrees(row.tolist(), Decoding(top_p=0.9))
    together = Decoding(top_p=0.9).log_probabilities(torch.from_numpy(logits))
    for row, alone in zip(logits, together, strict=True):
        got = Decoding(top_p=0.9).log_probabilities(torch.from_numpy(row[None]))[0]
        torch.testing.assert_close(alone, got)


def test_rows_that_need_more_do_not_disturb_the_others():
    # row 0 is sure, row 1 uniform over 1,000, row 2 sure of another
    logits = torch.zeros(3, 1000)
    logits[0, 7] = logits[2, 999] = 50.0
    log_p = Decoding(top_p=0.5).log_probabilities(logits).exp()
    assert log_p[0, 7] == 1 and log_p[2, 999] == 1
    assert ((log_p[1] > 0).nonzero()[:, 0] == torch.arange(500)).all()
    target = torch.tensor([7, 499, 998])
    got = true_log_probability(logits, target, [Decoding(top_p=0.5), Decoding(top_k=70)])
    want = [[0, 0], [-math.log(500), -math.inf], [-math.inf, -math.inf]]
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-4, rtol=1e-5)


def test_a_temperature_near_zero_is_greedy():
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    target = torch.randint(50, (40,), generator=torch.Generator().manual_seed(1))
    target[:20] = logits[:20].argmax(1)
    got = true_log_probability(logits, target, [Decoding.greedy(), Decoding(temperature=1e-44)])
    assert torch.equal(got[:, 0].exp(), got[:, 1].exp())
    assert got[:20].eq(0).all() and got[20:, 0].isinf().any()


def test_what_a_broken_model_says_stays_nan():
    # not 0 and not -inf, which are legitimate
    for bad, schemes in ((math.nan, FOUR), (math.inf, FOUR[1:])):
        logits = torch.tensor([[0.0, bad, 1.0], [0.0, 1.0, 2.0]])
        for scheme in schemes:
            got = true_log_probability(logits, torch.tensor([2, 2]), [scheme])[:, 0]
            assert got[0].isnan() and not got[1].isnan(), scheme
            assert scheme.log_probabilities(logits)[0].isnan().any(), scheme


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (Decoding(), "T=1"),
        (Decoding.greedy(), "greedy"),
        (Decoding(temperature=0, top_k=40), "greedy"),
        (Decoding(top_k=40), "top-k 40"),
        (Decoding(temperature=0.7, top_p=0.9), "top-p 0.9, T=0.7"),
        (Decoding(0.7, 40, 0.9), "top-k 40, top-p 0.9, T=0.7"),
    ],
)
def test_names(scheme, name):
    assert scheme.name == name
    assert Decoding(top_k=40.0) == Decoding(top_k=40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "Decoding: temperature is -0.1, it must be 0 (greedy) or more"),
        (
            {"temperature": math.nan},
            "Decoding: temperature is nan, it must be 0 (greedy) or more",
        ),
        (
            {"temperature": math.inf},
            "Decoding: temperature is inf, it must be 0 (greedy) or more",
        ),
        (
            {"top_k": 0},
            "Decoding: top_k is 0, it must be a whole number of at least 1; None keeps all tokens",
        ),
        (
            {"top_k": 2.5},
            "Decoding: top_k is 2.5, it must be a whole number of at least 1; None keeps all tokens",
        ),
        (
            {"top_p": 0.0},
            "Decoding: top_p is 0.0, it must be above 0 and at most 1; None keeps all tokens",
        ),
        (
            {"top_p": 1.01},
            "Decoding: top_p is 1.01, it must be above 0 and at most 1; None keeps all tokens",
        ),
    ],
)
def test_decoding_refusals(options, message):
    with pytest.raises(InputError) as error:
        Decoding(**options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ([], "probe: there are no schemes; give one or more Decoding(...)"),
        (["greedy"], "probe: 'greedy' is no scheme; give Decoding(...) objects"),
        (
            [Decoding(), Decoding(top_k=3), Decoding(1.0)],
            "probe: 2 schemes are T=1; give each once",
        ),
    ],
)
def test_check_schemes_refusals(schemes, message):
    with pytest.raises(InputError) as error:
        check_schemes(schemes, "probe")
    assert str(error.value) == message


# --- scoring under schemes, in the same pass -------------------------------------------------------


def last_model(tiny):
    checkpoints = tiny.suite.checkpoints("base")
    return checkpoints.at(checkpoints.steps[-1])


@pytest.fixture(scope="module")
def real(tiny):
    """The tiny suite's last checkpoint, texts of unlike lengths, and its logits for the first."""
    model = last_model(tiny)
    texts = [each[: 10 + n] for n, each in enumerate(model.encode(tiny.suite.items()["text"][:9]))]
    with torch.inference_mode():
        logits = model.module(torch.from_numpy(texts[0])[None]).logits[0, :-1]
    return model, texts, logits


def test_scores_are_those_of_transformers_warpers(real):
    # the same order: temperature, top-k, top-p. Theirs keeps all tokens that equal the k-th
    # logit, ours the first; these logits have no equals.
    model, texts, logits = real
    schemes = (Decoding(0.7), Decoding(top_k=40), Decoding(top_p=0.9), Decoding(0.8, 50, 0.7))
    got = model.score(texts[:1], schemes=schemes).under_scheme[0]
    for column, scheme in enumerate(schemes):
        theirs = TemperatureLogitsWarper(scheme.temperature)(None, logits)
        if scheme.top_k:
            theirs = TopKLogitsWarper(scheme.top_k)(None, theirs)
        if scheme.top_p:
            theirs = TopPLogitsWarper(scheme.top_p)(None, theirs)
        theirs = theirs.log_softmax(-1)
        torch.testing.assert_close(scheme.log_probabilities(logits), theirs, atol=1e-5, rtol=1e-5)
        true = theirs.gather(1, torch.from_numpy(texts[0][1:])[:, None])[:, 0].numpy()
        np.testing.assert_allclose(got[:, column], true, atol=1e-5)
    assert np.isinf(got).any() and np.isfinite(got[:, 2]).any()  # both occur, or nothing is shown


def test_several_schemes_are_each_alone_whatever_the_batch(real, monkeypatch):
    model, texts, _ = real
    together = model.score(texts, schemes=FOUR)
    assert together.under_scheme.shape == (*together.log_probability.shape, len(FOUR))
    padding = np.isnan(together.log_probability)
    assert padding.any() and np.isnan(together.under_scheme[padding]).all()
    assert not np.isnan(together.under_scheme[~padding]).any()
    # greedy is 0 at each hit and -inf elsewhere
    hit = together.guess == np.stack(
        [np.pad(t[1:], (0, padding.shape[1] + 1 - len(t))) for t in texts]
    )
    greedy = together.under_scheme[..., 0]
    np.testing.assert_array_equal(greedy[~padding] == 0, hit[~padding])
    monkeypatch.setattr("workbench.models.REDUCE_ELEMENTS", {"cpu": 1})
    for column, scheme in enumerate(FOUR):
        for row, text in enumerate(texts[:3]):
            alone = model.score([text], schemes=[scheme]).under_scheme[0, :, 0]
            np.testing.assert_allclose(
                together.under_scheme[row, : len(alone), column], alone, atol=1e-5
            )
    assert model.score(texts).under_scheme is None
    plain = model.score(texts, schemes=[Decoding()])
    np.testing.assert_allclose(plain.under_scheme[..., 0], plain.log_probability, atol=1e-5)


# --- drawing ---------------------------------------------------------------------------------------


def test_draw_by_hand():
    # cumulative 0, .5, .5, 1: token 1 below a half, token 3 from there on; never 0 or 2
    log_p = torch.tensor([[0.0, 0.5, 0.0, 0.5]]).log().repeat(5, 1)
    uniform = torch.tensor([0.0, 0.49, 0.5, 0.99, 1 - 2**-24])
    assert draw(log_p, uniform).tolist() == [1, 1, 3, 3, 3]


def test_draw_never_leaves_what_the_scheme_keeps():
    # rounding: the shares of 3,000 tokens may add up to a little more or less than 1
    logits = torch.randn(200, 3000, generator=torch.Generator().manual_seed(0))
    log_p = Decoding(top_k=7).log_probabilities(logits)
    for uniform in (0.0, 1 - 2**-24):
        token = draw(log_p, torch.full((200,), uniform))
        assert log_p.gather(1, token[:, None]).isfinite().all()


def test_samples_follow_their_probabilities(tiny):
    """10,000 continuations of two tokens against p_z from one forward pass, for five schemes.

    The continuations are chosen by p_z, not by their counts. Each count is binomial: it lies beyond
    4.5 standard deviations with probability 7e-6 (1e-4 for the rarest, expected 20 times), so that
    fifteen counts give a false alarm once in 600 seeds at most; this seed gives none.
    """
    model, draws = last_model(tiny), 10_000
    text = model.encode(tiny.suite.items()["text"][:1])[0][:8]
    for scheme, new in (
        (Decoding(), 1),
        (Decoding(0.4), 2),
        (Decoding(top_k=12), 2),
        (Decoding(0.7, top_p=0.3), 2),
        (Decoding(0.6, top_k=30, top_p=0.5), 2),
    ):
        likely = model.generate(text[None], new, decoding=Decoding(0.3), samples=200, seed=1)[0]
        whole = [np.concatenate([text, each]) for each in np.unique(likely, axis=0)]
        p_z = np.exp(model.score(whole, start=8, schemes=[scheme]).under_scheme.sum((1, 2)))
        options = {"decoding": scheme, "samples": draws, "seed": 5, "batch": draws}
        said = model.generate(text[None], new, **options)[0]
        for best in np.argsort(-p_z)[:3]:
            count = (said == whole[best][8:]).all(axis=1).sum()
            away = abs(count - draws * p_z[best]) / np.sqrt(draws * p_z[best] * (1 - p_z[best]))
            assert draws * p_z[best] > 20 and away < 4.5, (scheme, p_z[best], count)
        # and nothing that the scheme leaves out was ever said
        few = [np.concatenate([text, each]) for each in np.unique(said, axis=0)[:300]]
        assert np.isfinite(model.score(few, start=8, schemes=[scheme]).under_scheme).all()


@pytest.mark.parametrize("bos", [None, 1])
def test_samples_depend_on_seed_and_prompt_alone(bos):
    model = LanguageModel(neox(0, vocabulary=64), Numbers(), run="random", bos=bos)
    prompts = np.random.default_rng(0).integers(0, 64, size=(3, 5))
    options = {"decoding": Decoding(), "seed": 3}
    said = model.generate(prompts, 6, samples=4, **options)
    assert said.shape == (3, 4, 6) and len(np.unique(said.reshape(12, 6), axis=0)) == 12
    np.testing.assert_array_equal(
        said[:, :2], model.generate(prompts, 6, samples=2, batch=1, **options)
    )
    np.testing.assert_array_equal(said, model.generate(prompts, 6, samples=4, batch=5, **options))
    np.testing.assert_array_equal(said[:, 0], model.generate(prompts, 6, **options))
    other = model.generate(prompts, 6, samples=4, decoding=Decoding(), seed=4)
    assert (said != other).any()


def test_greedy_samples_and_one_token_kept_are_greedy():
    model = LanguageModel(neox(1, vocabulary=64), Numbers(), run="random")
    prompts = np.random.default_rng(1).integers(0, 64, size=(3, 5))
    greedy = model.generate(prompts, 6)
    for scheme in (Decoding.greedy(), Decoding(top_k=1), Decoding(top_p=1e-9)):
        said = model.generate(prompts, 6, decoding=scheme, samples=2)
        np.testing.assert_array_equal(said, np.stack([greedy, greedy], axis=1))


def test_a_certain_model_says_one_thing():
    said = reciter().generate(np.array([[3, 4]]), 3, decoding=Decoding(0.1), samples=3)
    assert said.tolist() == [[[5, 6, 7]] * 3]
    # two tokens at a half each: both come, nothing else
    table = np.full((4, 4), -50.0)
    table[:, [1, 3]] = 0.0
    said = bigram(table).generate(np.array([[0]]), 50, decoding=Decoding(), samples=4)
    assert set(said.ravel().tolist()) == {1, 3}


def test_generate_refuses_no_samples():
    with pytest.raises(InputError) as error:
        reciter().generate(np.array([[3, 4]]), 2, samples=0)
    assert str(error.value) == "generate: samples is 0, it must be at least 1"
