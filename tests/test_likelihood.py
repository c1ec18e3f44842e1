"""How likely a text is, token by token."""

import numpy as np
import pytest
import torch

from tests.conftest import ENGLISH, bigram, frame, neox, reciter
from workbench.models import LanguageModel
from workbench.probes.likelihood import probe_likelihood
from workbench.table import InputError, validate


def values(table, metric):
    return table[table["metric"] == metric].set_index("item")["value"].to_dict()


def test_likelihood_by_hand():
    # p = (.9, .1) after either token, so 0 is always the argmax. "1 0 1" after one token:
    # mean (ln .9 + ln .1) / 2, one hit of two. "1 1 1 1": ln .1, none.
    model = bigram(np.log([[0.9, 0.1], [0.9, 0.1]]))
    table = probe_likelihood(model, frame(["1 0 1", "1 1 1 1"]))
    want = {"i0": (np.log(0.9) + np.log(0.1)) / 2, "i1": np.log(0.1)}
    assert values(table, "log_probability") == pytest.approx(want, abs=1e-6)
    assert values(table, "top1") == {"i0": 0.5, "i1": 0.0}


def test_the_prefix_is_not_scored():
    # 9 is never guessed, neither is what follows 5; after a prefix of 3 only the last two count
    model = reciter(breaks={5})
    items = frame(["3 9 5 6 7", "9 4 5 6 7"])
    assert values(probe_likelihood(model, items, prefix=3), "top1") == {"i0": 0.5, "i1": 0.5}
    assert values(probe_likelihood(model, items, prefix=4), "top1") == {"i0": 1.0, "i1": 1.0}


def test_a_length_cuts_and_drops():
    with pytest.warns(UserWarning, match="probe_likelihood: dropped 1 of 2 texts"):
        table = probe_likelihood(reciter(), frame(["1 2 3 9 9", "1 2"]), length=3)
    assert values(table, "top1") == {"i0": 1.0}
    assert table.attrs["dropped"] == 1
    assert set(table["length"]) == {3} and set(table["prefix"]) == {1}


def test_a_text_longer_than_the_context_is_cut_there():
    numbers = [str(n % 30) for n in range(1, 100)]
    table = probe_likelihood(reciter(vocabulary=32), frame([" ".join(numbers)]), prefix=1)
    # counts 1..29, then 0 where 30 was said; of 63 scored tokens 0 at places 30, 60 is missed
    assert values(table, "top1") == {"i0": pytest.approx(61 / 63)}


def test_likelihood_is_the_plain_loop(tokenizer):
    module = neox(5)
    model = LanguageModel(module, tokenizer, run="m", step=7)
    table = validate(probe_likelihood(model, frame(ENGLISH, kind="verse"), prefix=2))
    assert (
        set(table["run"]) == {"m"} and set(table["step"]) == {7} and set(table["kind"]) == {"verse"}
    )
    for number, text in enumerate(ENGLISH):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            row = module(input_ids=ids).logits[0].log_softmax(-1)
        each = [row[t - 1, ids[0, t]].item() for t in range(2, ids.shape[1])]
        hits = [row[t - 1].argmax() == ids[0, t] for t in range(2, ids.shape[1])]
        assert values(table, "log_probability")[f"i{number}"] == pytest.approx(
            np.mean(each), abs=1e-5
        )
        assert values(table, "top1")[f"i{number}"] == pytest.approx(np.mean(hits))


def test_order_of_the_items_changes_nothing(tokenizer):
    model = LanguageModel(neox(5), tokenizer, run="m")
    items = frame(ENGLISH)
    for metric in ("log_probability", "top1"):
        one = values(probe_likelihood(model, items), metric)
        other = values(probe_likelihood(model, items.iloc[::-1]), metric)
        assert one == pytest.approx(other, abs=1e-5)


def test_likelihood_refusals():
    with pytest.raises(InputError) as error:
        probe_likelihood(reciter(), frame(["1 2"]), prefix=0)
    assert str(error.value) == (
        "probe_likelihood: prefix is 0, but must be at least 1: the first token has nothing before it"
    )
    with pytest.raises(InputError) as error:
        probe_likelihood(reciter(), frame(["1 2", "3"]), prefix=2)
    assert str(error.value) == (
        "probe_likelihood: none of 2 texts has the 3 tokens asked for (the longest has 2); ask for "
        "fewer, or give longer texts"
    )
    broken = bigram([[np.nan, 0.0], [0.0, 0.0]])
    broken.step = 3
    with pytest.raises(InputError) as error:
        probe_likelihood(broken, frame(["1 1 1", "1 0 1"]))
    assert str(error.value) == (
        "probe_likelihood: log_probability is nan for item number 0 at step 3 of fake; the model's "
        "weights or its dtype give NaN or Inf"
    )
