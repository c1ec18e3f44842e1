"""Membership scores, each by hand and by its definition."""

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ENGLISH, bigram, frame, neox, reciter
from workbench.models import LanguageModel
from workbench.probes.membership import min_k, probe_membership, standardised, zlib_bytes
from workbench.table import InputError, validate


def values(table):
    return {m: part.set_index("item")["value"].to_dict() for m, part in table.groupby("metric", observed=True)}  # fmt: skip


@pytest.mark.parametrize(("k", "want"), [(0.2, -5.0), (0.4, -4.5), (0.6, -4.0), (1.0, -3.0), (0.01, -5.0)])  # fmt: skip
def test_min_k_by_hand(k, want):
    # log p of -1..-5: the lowest is -5; the lowest two average -4.5; all of them -3, the loss
    # score; and never fewer than one token
    score = np.array([[-2.0, -5.0, -1.0, -4.0, -3.0]])
    assert min_k(score, np.array([5]), k) == pytest.approx([want])


def test_min_k_counts_as_decimals_do():
    # .29 * 100 is 28.999999999999996 in floating point, but means 29 tokens
    score = -np.arange(100.0)[None]
    assert min_k(score, np.array([100]), 0.29) == pytest.approx([-np.arange(71, 100).mean()])


def test_min_k_looks_at_no_padding():
    score = np.array([[-1.0, -2.0, np.nan, np.nan], [-1.0, -2.0, -3.0, -4.0]])
    got = min_k(score, np.array([2, 4]), 1.0)
    assert got == pytest.approx([-1.5, -2.5])


@given(
    st.lists(st.lists(st.floats(-30, 0), min_size=1, max_size=12), min_size=1, max_size=5),
    st.floats(0.01, 1),
)
def test_min_k_is_its_definition(lists, k):
    length = np.array([len(each) for each in lists])
    score = np.full((len(lists), length.max()), np.nan)
    for row, each in enumerate(lists):
        score[row, : len(each)] = each
    want = [np.mean(sorted(e)[: max(1, int(np.floor(k * len(e) + 1e-9)))]) for e in lists]
    np.testing.assert_allclose(min_k(score, length, k), want, atol=1e-9)


def test_standardised_by_hand():
    # vocabulary of two, p = (.9, .1): ln .9 - mu = .1 ln 9, ln .1 - mu = -.9 ln 9 and
    # sigma = sqrt(.9 * .1) ln 9 = .3 ln 9, so z = 1/3 and -3
    log_p = np.log([[0.9, 0.1]])
    mu = np.full((1, 2), 0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    sigma = np.full((1, 2), 0.3 * np.log(9))
    np.testing.assert_allclose(standardised(log_p, mu, sigma), [[1 / 3, -3]], atol=1e-12)


def test_a_uniform_model_has_z_of_zero():
    log_p = np.log(np.full((1, 3), 0.25))
    np.testing.assert_array_equal(standardised(log_p, log_p, np.zeros((1, 3))), np.zeros((1, 3)))


def test_zlib_by_hand():
    assert zlib_bytes("hello world") == 19
    assert zlib_bytes("é") == len(zlib.compress("é".encode(), 6))


def test_the_probe_by_hand():
    # "0 0 1" with p = (.9, .1): log p ln .9 and ln .1, z 1/3 and -3
    model = bigram(np.log([[0.9, 0.1], [0.9, 0.1]]))
    got = values(probe_membership(model, frame(["0 0 1"]), k=1.0))
    mean = (np.log(0.9) + np.log(0.1)) / 2
    assert got["member_loss"]["i0"] == pytest.approx(mean, abs=1e-6)
    assert got["member_mink"]["i0"] == pytest.approx(mean, abs=1e-6)
    assert got["member_minkpp"]["i0"] == pytest.approx((1 / 3 - 3) / 2, abs=1e-5)
    assert got["member_zlib"]["i0"] == pytest.approx(mean / zlib_bytes("0 0 1"), abs=1e-6)
    lowest = values(probe_membership(model, frame(["0 0 1"]), k=0.5))
    assert lowest["member_mink"]["i0"] == pytest.approx(np.log(0.1), abs=1e-6)
    assert lowest["member_minkpp"]["i0"] == pytest.approx(-3, abs=1e-5)


def test_a_uniform_model_knows_no_member():
    got = values(probe_membership(bigram(np.zeros((4, 4))), frame(["0 1 2", "3 3"])))
    assert got["member_minkpp"] == {"i0": 0.0, "i1": 0.0}
    assert got["member_loss"] == pytest.approx({"i0": -np.log(4), "i1": -np.log(4)}, abs=1e-6)


def test_what_is_known_scores_higher():
    got = values(probe_membership(reciter(), frame(["3 4 5 6", "3 9 1 6"])))
    for metric, value in got.items():
        assert value["i0"] > value["i1"], metric


def test_the_probe_is_the_plain_loop_and_items_keep_their_own_bytes(tokenizer):
    # texts of different lengths land in the batch in another order than they came
    module = neox(5)
    model = LanguageModel(module, tokenizer, run="m")
    texts = sorted(ENGLISH, key=len)
    table = validate(probe_membership(model, frame(texts), k=0.3))
    assert set(table["k"]) == {0.3}
    got = values(table)
    for number, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        with torch.inference_mode():
            rows = module(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        log_p, z = [], []
        for position in range(1, len(ids)):
            row = rows[position - 1]
            mu = (row.exp() * row).sum()
            sigma = ((row.exp() * (row - mu) ** 2).sum()) ** 0.5
            log_p.append(row[ids[position]].item())
            z.append(((row[ids[position]] - mu) / sigma).item())
        few = max(1, int(0.3 * len(log_p)))
        item = f"i{number}"
        assert got["member_loss"][item] == pytest.approx(np.mean(log_p), abs=1e-5)
        assert got["member_mink"][item] == pytest.approx(np.mean(sorted(log_p)[:few]), abs=1e-5)
        assert got["member_minkpp"][item] == pytest.approx(np.mean(sorted(z)[:few]), abs=1e-3)
        assert got["member_zlib"][item] == pytest.approx(
            np.mean(log_p) / len(zlib.compress(text.encode(), 6)), abs=1e-6
        )


def test_one_token_is_no_text():
    with pytest.warns(UserWarning, match="probe_membership: dropped 1 of 2 texts"):
        got = values(probe_membership(reciter(), frame(["5", "3 4"])))
    assert list(got["member_loss"]) == ["i1"]


@pytest.mark.parametrize("k", [0.0, -0.1, 1.01])
def test_membership_refusals(k):
    with pytest.raises(InputError) as error:
        probe_membership(reciter(), frame(["1 2"]), k=k)
    assert str(error.value) == f"probe_membership: k is {k}, but must be above 0 and at most 1"
