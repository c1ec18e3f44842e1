"""A bag of words that never sees the model: unbiased where texts are alike, alert where not."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import frame
from workbench.stats.blind import blind_baseline, blind_placements, outscored, placement_error
from workbench.stats.membership import area_under_curve, delong_error
from workbench.table import InputError, rows, validate

SHARE = np.array([0.9, 0.8, 0.4, 0.7, 0.3, 0.2])
MEMBER = np.array([True, True, True, False, False, False])


def random_texts(rng, n: int) -> list[str]:
    """Texts of 12 words drawn alike from 200, common and rare."""
    weight = 1 / np.arange(1, 201)
    words = np.array([f"w{i}" for i in range(200)])
    return [" ".join(rng.choice(words, 12, p=weight / weight.sum())) for _ in range(n)]


def scored(texts, member, score, **columns):
    """Items and the rows of one attack on them."""
    items = frame(texts)
    table = rows(
        "member_loss", np.minimum(score, 0), run="r", item=items["item"],
        beside={"member": list(member), **columns},
    )  # fmt: skip
    return table, items


def test_outscored_by_hand():
    # METRICS: members .9, .8, .4 beat all, all and two of the others .7, .3, .2; those beat one,
    # none and none of the members
    want = [1, 1, 2 / 3, 1 / 3, 0, 0]
    np.testing.assert_allclose(outscored(SHARE, MEMBER), want)
    np.testing.assert_allclose(outscored(np.zeros(6), MEMBER), np.full(6, 0.5))
    assert np.isnan(outscored(SHARE, np.ones(6, dtype=bool))).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=2, max_size=9),
    st.lists(st.integers(-3, 3), min_size=2, max_size=9),
)
def test_outscored_gives_the_auc_and_delongs_error(member, other):
    score = np.array([*member, *other], dtype=float)
    inside = np.arange(len(score)) < len(member)
    place = outscored(score, inside)
    area = area_under_curve(score[inside], score[~inside])
    np.testing.assert_allclose(place[inside].mean(), area)
    np.testing.assert_allclose(place[~inside].mean(), 1 - area)
    error = placement_error(place, inside, np.arange(len(score)))
    np.testing.assert_allclose(error, delong_error(score[inside], score[~inside]), atol=1e-12)


def test_errors_over_clusters_by_hand():
    # Deviations over class size: members (1/9, 1/9, -2/9) / 3 from 8/9, others, turned around,
    # (-2/9, 1/9, 1/9) / 3. Pairs (1st, 4th), (2nd, 5th), (3rd, 6th) hold -1, 2 and -1 of 27ths:
    # sqrt(6 / 27^2 * 3 / 2) = 1/9
    cluster = np.array(["a", "b", "c", "a", "b", "c"])
    got = placement_error(outscored(SHARE, MEMBER), MEMBER, cluster)
    np.testing.assert_allclose(got, 1 / 9)
    assert np.isnan(placement_error(SHARE, np.arange(6) < 1, np.arange(6)))


def test_exchangeable_texts_are_at_one_half():
    # 60 lists of 20 + 20 texts drawn alike; one area spreads by about .12, their mean by .016.
    # Leaving one out and pooling the scores, as is often done, is far below on the same texts.
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import LeaveOneOut, cross_val_predict

    rng, inside, found, pooled = np.random.default_rng(0), np.arange(40) < 20, [], []
    for seed in range(60):
        texts = random_texts(rng, 40)
        _, area, _ = blind_placements(texts, inside, np.arange(40), folds=4, repeats=1, seed=seed)
        found.append(area)
        if seed < 6:
            score = cross_val_predict(
                LogisticRegression(solver="liblinear"), TfidfVectorizer().fit_transform(texts),
                inside, cv=LeaveOneOut(), method="decision_function",
            )  # fmt: skip
            pooled.append(area_under_curve(score[inside], score[~inside]))
    assert abs(np.mean(found) - 0.5) < 0.05
    assert np.mean(pooled) < 0.35


def test_intervals_hold_one_half_where_texts_are_alike():
    # 40 lists; 95 % should hold .5. At least 34 of 40 happens 98 times in 100 at .95; DeLong's error
    # alone (narrower by sqrt 2) holds about 81 %.
    rng, inside, held = np.random.default_rng(1), np.arange(40) < 20, 0
    for seed in range(40):
        table, items = scored(random_texts(rng, 40), inside, np.zeros(40))
        row = blind_baseline(table, items, folds=4, repeats=1, seed=seed).iloc[0]
        assert (row["score"], row["metric"]) == ("member_blind", "auc")
        held += row["lo"] <= 0.5 <= row["hi"]
    assert held >= 34


def test_another_template_is_found():
    rng, inside = np.random.default_rng(2), np.arange(40) < 20
    texts = random_texts(rng, 40)
    texts = [f"{text} {'2019' if i else '2024'}" for text, i in zip(texts, inside, strict=True)]
    # the attack sees as much as the year, and no more
    table, items = scored(texts, inside, np.where(inside, -1.0, -2.0))
    got = validate(blind_baseline(table, items, repeats=3))
    blind, gain = got[got["metric"] == "auc"].iloc[0], got[got["metric"] == "auc_gain"].iloc[0]
    assert blind["lo"] > 0.9
    assert (gain["score"], gain["value"] + blind["value"]) == ("member_loss", 1.0)
    each = got[got["metric"] == "member_blind"].set_index("item")["value"]
    np.testing.assert_allclose(each[[f"i{i}" for i in range(20)]].mean(), blind["value"])
    assert got.attrs["says"] == [
        f"The words alone tell members from others (AUC {blind['value']:.2f}, {blind['lo']:.2f} to "
        f"{blind['hi']:.2f}): the two were not drawn alike. No attack does better, so nothing here "
        "speaks of memory."
    ]


def test_an_attack_beyond_the_words_is_named():
    rng, inside = np.random.default_rng(3), np.arange(40) < 20
    table, items = scored(random_texts(rng, 40), inside, np.where(inside, -1.0, -2.0))
    second = table.assign(metric="member_mink", value=-1.0)
    got = blind_baseline(pd.concat([table, second]), items, repeats=3)
    gain = got[got["metric"] == "auc_gain"].set_index("score")
    blind = got[got["metric"] == "auc"].iloc[0]
    np.testing.assert_allclose(gain["value"], [1 - blind["value"], 0.5 - blind["value"]])
    # the first attack has no error of its own, so the gain's is the blind one's, counted twice
    np.testing.assert_allclose(gain.loc["member_loss", "se"], blind["se"])
    assert got.attrs["says"][0].startswith("The words alone do not tell members from others (AUC ")
    assert got.attrs["says"][0].endswith(
        "Attacks beyond them by more than the error: loss attack score."
    )


def test_errors_are_paired_and_count_the_training_once_more():
    # DeLong's covariance of two areas, written out: var(attack) + var(blind) - 2 cov, and var(blind)
    # again for the texts that train; the attack is the words' share with noise, so cov is large
    rng, inside, names = np.random.default_rng(4), np.arange(40) < 20, np.arange(40)
    texts = [f"{t} {'mark' * int(rng.random() < 0.3 + 0.4 * i)}" for t, i in zip(random_texts(rng, 40), inside, strict=True)]  # fmt: skip
    place, area, _ = blind_placements(texts, inside, names, folds=5, repeats=3, seed=0)
    score = np.where(inside, place, 1 - place) + rng.normal(0, 0.05, 40) - 5
    table, items = scored(texts, inside, score)
    got = blind_baseline(table, items, repeats=3)
    blind, gain = got[got["metric"] == "auc"].iloc[0], got[got["metric"] == "auc_gain"].iloc[0]
    beats = np.sign(score[inside][:, None] - score[~inside]) / 2 + 0.5
    attack = beats.mean(axis=1), 1 - beats.mean(axis=0)
    parts = [
        np.cov(a, b) / 20 for a, b in zip(attack, (place[inside], place[~inside]), strict=True)
    ]
    (both, cross), (_, own) = sum(parts)
    np.testing.assert_allclose([blind["value"], blind["se"]], [area, np.sqrt(2 * own)])
    np.testing.assert_allclose(gain["value"], beats.mean() - area)
    np.testing.assert_allclose(gain["se"], np.sqrt(both + own - 2 * cross + own))
    half = 1.959964 * gain["se"]
    np.testing.assert_allclose([gain["lo"], gain["hi"]], gain["value"] + [-half, half], atol=1e-6)


def test_placements_are_a_plain_loop_over_pairs_in_folds():
    # clusters of 1 to 6 texts, so that folds hold unequal numbers of both classes
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    rng = np.random.default_rng(2)
    cluster = np.repeat(np.arange(9), rng.integers(1, 7, 9))
    inside = cluster % 2 == 0
    texts = random_texts(rng, len(cluster))
    words = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b").fit_transform(texts)
    won, met = np.zeros(len(texts)), np.zeros(len(texts))
    for repeat in range(2):
        folds = StratifiedGroupKFold(3, shuffle=True, random_state=14 + repeat)
        for train, test in folds.split(words, inside, cluster):
            model = LogisticRegression(solver="liblinear").fit(words[train], inside[train])
            score = dict(zip(test, model.decision_function(words[test]), strict=True))
            for i in test:
                for j in test:
                    if inside[i] != inside[j]:
                        won[i] += (score[i] > score[j]) + (score[i] == score[j]) / 2
                        met[i] += 1
    assert len(set(met[inside])) > 1
    place, area, reason = blind_placements(texts, inside, cluster, folds=3, repeats=2, seed=7)
    np.testing.assert_allclose(place, np.where(met, won / np.maximum(met, 1), np.nan))
    np.testing.assert_allclose(area, won[inside].sum() / met[inside].sum())
    assert reason == ""


def test_clusters_stay_on_one_side():
    # Each text is there twice, in one class: a fold that holds one copy is told by the other.
    # Kept together, the copies tell nothing.
    rng, inside = np.random.default_rng(5), np.arange(48) < 24
    half = random_texts(rng, 24)
    texts = [f"{text} mark{i}" for i, text in enumerate(half) for _ in (0, 1)]
    together = np.repeat(np.arange(24), 2)
    apart = blind_placements(texts, inside, np.arange(48), folds=4, repeats=3, seed=0)[1]
    held = blind_placements(texts, inside, together, folds=4, repeats=3, seed=0)[1]
    assert apart > 0.9
    assert held < 0.8
    table, items = scored(texts, inside, np.zeros(48), document=together)
    items["text"] += [f" {i}" for i in range(48)]
    one = blind_baseline(table, items, cluster="document", folds=4, repeats=3).iloc[0]
    two = blind_baseline(table, items, folds=4, repeats=3).iloc[0]
    assert one["value"] < two["value"]


def test_steps_and_kinds_are_told_apart():
    rng, inside = np.random.default_rng(6), np.arange(20) < 10
    table, items = scored(random_texts(rng, 20), inside, np.where(inside, -1.0, -2.0))
    both = pd.concat([table, table.assign(step=5)])
    got = blind_baseline(both, items, folds=2, repeats=1)
    auc = got[got["metric"] == "auc"]
    assert list(auc["step"]) == [0, 5]
    assert auc["value"].nunique() == 1
    assert [says.split(":")[0] for says in got.attrs["says"]] == ["run r, step 0", "run r, step 5"]


def test_an_attack_without_all_scores_is_compared_on_its_own_texts():
    rng, inside = np.random.default_rng(7), np.arange(24) < 12
    table, items = scored(random_texts(rng, 24), inside, rng.normal(-3, 1, 24))
    few = table.assign(
        metric="member_recall", value=lambda t: np.where(t.index < 20, -t["value"], np.nan)
    )
    one = table.assign(
        metric="member_reference", value=lambda t: np.where(t["member"], 1.0, np.nan)
    )
    got = blind_baseline(pd.concat([one, few, table]), items, folds=3, repeats=2)
    auc = got[got["metric"] == "auc"]
    assert list(auc["n"]) == [24]
    whole = blind_baseline(table, items, folds=3, repeats=2)
    assert auc["value"].item() == whole["value"].iloc[0]
    gain = got[got["metric"] == "auc_gain"].set_index("score")
    assert gain["n"].to_dict() == {"member_reference": 12, "member_recall": 20, "member_loss": 24}
    assert gain.loc["member_reference", "reason"] == "texts of one class only"
    apart = blind_baseline(few, items, folds=3, repeats=2)
    np.testing.assert_allclose(gain.loc["member_recall", "value"], apart["value"].iloc[-1])
    assert got.attrs["says"][0].startswith("The words alone ")


def test_few_members_make_few_folds():
    # three members cannot stand in five folds; sklearn would warn and leave folds without one
    inside, names = np.arange(12) < 3, np.arange(12)
    texts = random_texts(np.random.default_rng(9), 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        five = blind_placements(texts, inside, names, folds=5, repeats=1, seed=0)
        three = blind_placements(texts, inside, names, folds=3, repeats=1, seed=0)
    np.testing.assert_allclose(five[0], three[0])


def test_reasons():
    words = [f"some words here {i}" for i in range(6)]
    for texts, member, reason in (
        (words, [True] * 6, "texts of one class only"),
        (words, [True] + [False] * 5, "fewer than 2 texts or clusters of a class"),
        ([f"{'!' * (i + 1)}" for i in range(6)], MEMBER, "the texts hold no words"),
    ):
        table, items = scored(texts, member, -SHARE)
        got = blind_baseline(table, items, repeats=1)
        assert got["value"].isna().all()
        assert set(got["reason"]) == {reason}
        assert got.attrs["says"] == [f"No blind baseline: {reason}."]


def test_refusals():
    table, items = scored([f"word {i}" for i in range(6)], MEMBER, -SHARE)
    for message, arguments, options in (
        (
            "blind_baseline: 1 folds, 20 repeats; needs at least 2 folds and 1 repeat",
            (table, items),
            {"folds": 1},
        ),
        (
            "blind_baseline: no text for 4 items (first: 'i2'); give the items that were scored",
            (table, items.head(2)),
            {},
        ),
        (
            "blind_baseline: no column 'author'; there are run, step, group, item, metric, value, "
            "lo, hi, n, member",
            (table, items),
            {"cluster": "author"},
        ),
        (
            "blind_baseline: member is 'maybe', which says neither member nor non-member; use True "
            "and False, or seen and unseen",
            (table.assign(member="maybe"), items),
            {},
        ),
    ):
        with pytest.raises(InputError) as error:
            blind_baseline(*arguments, **options)
        assert str(error.value) == message


def test_its_scores_are_no_attack():
    # pooled over folds they would mislead, so membership_auc does not take them
    from workbench.stats.membership import membership_auc

    table, items = scored([f"word {i}" for i in range(6)], MEMBER, -SHARE)
    got = blind_baseline(table, items, folds=2, repeats=1)
    each = got[got["metric"] == "member_blind"].assign(member=MEMBER)
    with pytest.raises(InputError) as error:
        membership_auc(each)
    assert (
        str(error.value) == "membership_auc: member_blind is not higher for members; leave it out"
    )
