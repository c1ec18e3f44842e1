import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tests.conftest import Numbers, bigram, frame, neox
from workbench.models import LanguageModel
from workbench.probes import recall
from workbench.probes.recall import (
    continue_greedily,
    edit_similarity,
    prepare_recall,
    probe_recall,
    rouge,
)
from workbench.table import InputError


def items(*texts):
    return frame(texts, "studied")


def say(*tokens):
    return " ".join(map(str, tokens))


def follower(changes=()):
    """A model that counts upwards, but for ``{5: 9}``: after 5 comes 9."""
    follows = {token: token + 1 for token in range(63)} | dict(changes)
    table = np.zeros((64, 64))
    table[list(follows), list(follows.values())] = 5.0
    return bigram(table, run="follower", step=4)


def tiny(seed, bos=None):
    """Random weights over the same words."""
    return LanguageModel(neox(seed, vocabulary=64), Numbers(), run="tiny", bos=bos)


def values(table, item="i0"):
    mine = table[table["item"] == item]
    return dict(zip(mine["metric"], mine["value"], strict=True))


def test_a_model_that_knows_the_text_by_heart():
    table = probe_recall(follower(), items(say(*range(8))))
    assert set(values(table).values()) == {1.0}
    assert set(table["step"]) == {4} and set(table["run"]) == {"follower"}


def test_by_hand_where_it_leaves_the_text():
    # 0 1 2 3 | 4 5 6 7, but after 5 comes 9 and then 9: it says 4 5 9 9. Half of the positions
    # are right, two substitutions in four, one pair of words (4 5) in three; longest common
    # subsequence 2 of 4.
    got = values(probe_recall(follower({5: 9, 9: 9}), items(say(*range(8)))))
    want = {"exact": 0, "token": 0.5, "edit": 0.5, "rouge1": 0.5, "rouge2": 1 / 3, "rougeL": 0.5}
    assert got == pytest.approx({f"recall_{k}": v for k, v in want.items()})


def test_a_shift_is_wrong_everywhere_but_near():
    # the suffix is 5 5 6 7, it says 5 6 7 8: the first position and then none; one deletion and
    # one insertion in four
    got = values(probe_recall(follower(), items(say(1, 2, 3, 4, 5, 5, 6, 7))))
    assert got["recall_token"] == 0.25 and got["recall_edit"] == 0.5
    assert edit_similarity([1, 2], [3, 4]) == 0 and edit_similarity([1, 2], [1, 2]) == 1


def test_the_prompt_is_not_scored():
    # Nothing of the suffix is said: every score is 0. With the prompt left in, ROUGE-1 of the
    # same nothing is 4 of 8 words.
    model, text = follower({3: 40}), say(0, 1, 2, 3, 4, 5, 6, 7)
    assert set(values(probe_recall(model, items(text))).values()) == {0.0}
    assert rouge(say(0, 1, 2, 3, 40, 41, 42, 43), text)["1"] == pytest.approx(0.5)


def test_odd_lengths_leave_the_longer_half_to_recall():
    # 0 1 | 2 3 4: prompt of two, and the model goes wrong at the last of three
    got = values(probe_recall(follower({3: 30}), items(say(0, 1, 2, 3, 4))))
    assert got["recall_token"] == pytest.approx(2 / 3)


def test_rouge_by_hand():
    # said "the cat sat", truth "the cat sat on the mat": overlap 3; precision 1, recall 1/2,
    # F 2/3. Pairs: 2 of 2 and 2 of 5, F 4/7. Order does not matter for ROUGE-1 but for L.
    got = rouge("the cat sat", "the cat sat on the mat")
    assert got == pytest.approx({"1": 2 / 3, "2": 4 / 7, "L": 2 / 3})
    assert rouge("c b a", "a b c") == pytest.approx({"1": 1.0, "2": 0.0, "L": 1 / 3})


def test_rouge_of_too_few_words_is_not_zero():
    got = rouge("word", "word")
    assert got["1"] == 1 and np.isnan(got["2"])
    table = probe_recall(follower(), items(say(0, 1)))
    undefined = table[table["value"].isna()]
    assert undefined["metric"].tolist() == ["recall_rouge2"]
    assert undefined["reason"].tolist() == ["the suffix has too few words"]


@pytest.mark.parametrize(("bos", "batch", "spare"), [(None, 5, 12), (63, 17, 1), (None, 17, 4)])
def test_unlike_lengths_at_once_agree_with_one_at_a_time(bos, batch, spare, monkeypatch):
    monkeypatch.setattr(recall, "BATCH", batch)
    monkeypatch.setattr(recall, "SPARE", spare)  # finished rows leave one by one, by four, or never
    model, rng = tiny(seed=1, bos=bos), np.random.default_rng(0)
    prompts = [rng.integers(0, 60, size=size) for size in rng.integers(1, 14, size=17)]
    new = rng.integers(1, 14, size=17)
    at_once = continue_greedily(model, prompts, new)
    for prompt, count, said in zip(prompts, new, at_once, strict=True):
        np.testing.assert_array_equal(said, model.generate(prompt[None], int(count))[0])


def test_finished_rows_are_not_gone_on_with(monkeypatch):
    monkeypatch.setattr(recall, "SPARE", 2)
    model, asked = tiny(seed=1), []
    forward = model.module.forward

    def spy(*, input_ids, **options):
        asked.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model.module, "forward", spy)
    # prompts of 2; rows end after 1, 1, 2 and 5 new tokens: two leave together, the third by
    # itself not, since a copy of the cache is worth two
    prompts = [np.array([1, 2])] * 4
    said = continue_greedily(model, prompts, [1, 5, 1, 2])
    assert [len(each) for each in said] == [1, 5, 1, 2]
    assert asked == [(4, 2), (2, 1), (2, 1), (2, 1), (2, 1)]
    assert all((each == said[1][: len(each)]).all() for each in said)


def test_asked_again_of_other_weights_it_is_the_same_as_asked_afresh():
    listed = items(*[say(*range(k, k + 6 + k % 3)) for k in range(5)], say(0, 1))
    one, other = tiny(seed=1), tiny(seed=2)
    ask = prepare_recall(one, listed)
    for model in (one, other, one):
        model = replace(model, step=model.step + 7, run="again")
        pd.testing.assert_frame_equal(ask(model), probe_recall(model, listed))


def test_order_of_items_changes_nothing():
    listed = items(*[say(*range(k, k + 4 + k)) for k in range(6)])
    model = tiny(seed=2)
    there = probe_recall(model, listed).set_index(["metric", "item"])["value"]
    back = probe_recall(model, listed[::-1]).set_index(["metric", "item"])["value"]
    pd.testing.assert_series_equal(there.sort_index(), back.sort_index())


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "1",
            "probe_recall: item i1 has 1 tokens, needs at least 2, a prompt and a suffix; drop it "
            "(1 of 2 texts)",
        ),
        (
            say(*range(65)),
            "probe_recall: item i1 has 65 tokens, the context holds 64; cut it (1 of 2 texts)",
        ),
    ],
)
def test_what_probe_recall_refuses(text, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        probe_recall(follower(), items("1 2", text))
