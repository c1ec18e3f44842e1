"""Base against tuned: how far predictions moved, what became of each text, what the report loads."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

import workbench.finetuning as finetuning
import workbench.probes.drift as drift_module
from tests.conftest import ENGLISH, Numbers, bigram, byte_level_tokenizer, frame, neox, reciter
from workbench.finetuning import load_tuning, tune_briefly
from workbench.models import LanguageModel
from workbench.plots import plot_before_after, plot_tuning
from workbench.probes.drift import divergence, probe_drift
from workbench.recorder import probe_texts
from workbench.stats.finetuning import tuning_changes, tuning_summary
from workbench.table import InputError, rows, validate


def refuses(message):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


def moved(table, item="i0"):
    part = table[table["item"] == item]
    return dict(zip(part["metric"], part["value"], strict=True))


# --- divergence ----------------------------------------------------------------------------------


def test_divergence_by_hand():
    # (1/2, 1/2) against (1/4, 3/4): 1/2 ln 2 + 1/2 ln(2/3) = .1438410, and the other way
    # 1/4 ln(1/2) + 3/4 ln(3/2) = .1308120; cross-entropies -1/2 ln(3/16) = .8369882 and ln 2.
    half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    kl, cross = divergence(torch.cat([half, quarter]), torch.cat([quarter, half]) + 7.0)
    np.testing.assert_allclose(kl, [0.1438410, 0.1308120], atol=1e-6)
    np.testing.assert_allclose(cross, [0.8369882, 0.6931472], atol=1e-6)


def test_what_a_model_rules_out():
    # base (1/2, 1/2, 0); tuned (1/2, 1/2, 0): 0 and ln 2; (1, 0, 0): infinite; the token that the
    # base rules out weighs nothing whatever the tuned model gives it: (1/4, 1/4, 1/2) costs ln 2
    out = -torch.inf
    base = torch.tensor([[0.0, 0.0, out]]).repeat(3, 1)
    tuned = torch.tensor([[0.0, 0.0, out], [0.0, out, out], [0.25, 0.25, 0.5]])
    tuned[2] = tuned[2].log()
    kl, cross = divergence(base, tuned)
    np.testing.assert_allclose(kl, [0.0, np.inf, np.log(2)], atol=1e-6)
    np.testing.assert_allclose(cross, [np.log(2), np.inf, 2 * np.log(2)], atol=1e-6)


LOGITS = arrays(np.float32, (3, 5), elements=st.floats(-20, 20, width=32))


@given(LOGITS, LOGITS)
@settings(max_examples=80, deadline=None)
def test_divergence_is_torchs_and_never_negative(one, other):
    base, tuned = torch.tensor(one), torch.tensor(other)
    kl, cross = divergence(base, tuned)
    wide = [t.double().log_softmax(1) for t in (base, tuned)]
    brute = torch.nn.functional.kl_div(wide[1], wide[0], reduction="none", log_target=True).sum(1)
    np.testing.assert_allclose(kl, brute, atol=2e-5, rtol=1e-5)
    entropy = torch.distributions.Categorical(logits=base.double()).entropy()
    np.testing.assert_allclose(cross, brute + entropy, atol=2e-5, rtol=1e-5)
    assert (kl >= 0).all() and (divergence(base, base)[0] == 0).all()


# --- drift of a model ----------------------------------------------------------------------------


def test_drift_by_hand():
    # After 0 the base says (1/2, 1/2) and the tuned model (1/4, 3/4); after 1 both say (1/2, 1/2).
    # "0 1 0" has one such step of two: .0719205; "0 0 0 1" three of three: .1438410, and "1 1"
    # none. What comes after the last token is not asked.
    even, odd = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    base, tuned = bigram([even, even], run="base"), bigram([odd, even], run="tuned", step=9)
    table = probe_drift(base, tuned, frame(["0 1 0", "0 0 0 1", "1 1"]))
    kl = [moved(table, item)["kl_base_tuned"] for item in ("i0", "i1", "i2")]
    np.testing.assert_allclose(kl, [0.0719205, 0.1438410, 0.0], atol=1e-6)
    cross = [moved(table, item)["forgetting_loss"] for item in ("i0", "i1", "i2")]
    np.testing.assert_allclose(cross, np.add(kl, np.log(2)), atol=1e-6)
    assert set(table["run"]) == {"tuned"} and set(table["step"]) == {9}


def brute(base, tuned, text, bos=None):
    """Mean KL and cross-entropy of one text, position by position, in double."""
    ids = [*([] if bos is None else [bos]), *text]
    with torch.no_grad():
        p, q = (
            m.module(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            for m in (base, tuned)
        )
    first = len(ids) - len(text)
    kl = [float((p[t].exp() * (p[t] - q[t])).sum()) for t in range(first, len(ids) - 1)]
    cross = [float(-(p[t].exp() * q[t]).sum()) for t in range(first, len(ids) - 1)]
    return np.mean(kl), np.mean(cross)


@pytest.mark.parametrize("elements", [2**22, 3 * 512])
def test_drift_is_the_brute_force_over_all_logits(tiny, monkeypatch, elements):
    monkeypatch.setattr(drift_module, "ELEMENTS", {"cpu": elements})  # three positions at once
    base = tiny.suite.checkpoints("base").at(0)
    tuned = tiny.suite.checkpoints("base").at(16)
    items = pd.concat([tiny.suite.items("base").head(5), frame(["A short one", "And the other"])])
    table = probe_drift(base, tuned, items)
    for item, text in zip(items["item"], items["text"], strict=True):
        want = brute(base, tuned, base.tokenizer(text)["input_ids"][: base.context])
        got = moved(table, item)
        np.testing.assert_allclose([got["kl_base_tuned"], got["forgetting_loss"]], want, atol=2e-5)
    assert (table.loc[table["metric"] == "kl_base_tuned", "value"] > 0.01).all()


def test_drift_from_itself_is_nothing(tiny):
    model = tiny.suite.checkpoints("base").at(16)
    table = probe_drift(model, model, tiny.suite.items("base").head(6))
    assert (table.loc[table["metric"] == "kl_base_tuned", "value"] == 0).all()


def test_drift_along_checkpoints(tiny):
    base = tiny.suite.checkpoints("base").at(0)
    source = tiny.suite.checkpoints("base").select([0, 16])
    items = tiny.suite.items("base").head(4)
    table = probe_drift(base, source, items)
    assert (table.query("step == 0 and metric == 'kl_base_tuned'")["value"] == 0).all()
    alone = probe_drift(base, tiny.suite.checkpoints("base").at(16), items)
    pd.testing.assert_series_equal(
        table.query("step == 16")["value"].reset_index(drop=True), alone["value"]
    )
    assert set(table["kind"]) == set(items["kind"])


def with_bos(module):
    return LanguageModel(module, Numbers(), run="b", bos=7)


def test_bos_is_context_and_no_position():
    base, tuned = with_bos(neox(1, vocabulary=32)), with_bos(neox(2, vocabulary=32))
    table = probe_drift(base, tuned, frame(["3 9 4", "5 6"]))
    want = brute(base, tuned, [3, 9, 4], bos=7)
    np.testing.assert_allclose(list(moved(table).values()), want, atol=1e-5)


def test_a_head_of_its_own_kind_is_taken_whole():
    module = neox(3, vocabulary=32)
    plain = module.forward

    def scaled(*given, **named):
        out = plain(*given, **named)
        out.logits = 2 * out.logits
        return out

    module.forward = scaled  # logits that are not hidden states times a matrix
    odd, even = (LanguageModel(m, Numbers(), run="m") for m in (module, neox(3, vocabulary=32)))
    got = moved(probe_drift(odd, even, frame(["3 9 4", "5 6 7 8 9"])))
    np.testing.assert_allclose(list(got.values()), brute(odd, even, [3, 9, 4]), atol=1e-5)


def test_never_more_logits_than_a_few_positions(monkeypatch):
    monkeypatch.setattr(drift_module, "ELEMENTS", {"cpu": 64})
    met = []
    monkeypatch.setattr(
        drift_module, "divergence",
        lambda one, other: met.append(one.numel() + other.numel()) or divergence(one, other),
    )  # fmt: skip
    text = " ".join(map(str, range(30)))
    probe_drift(reciter(), reciter([3]), frame([text, "1 2 3", "4 5"]))
    assert len(met) > 10 and max(met) == 2 * 64  # two positions of 32, of either model


def test_what_drift_refuses():
    items = frame(["1 2 3"])
    with refuses(
        "probe_drift: base has a vocabulary of 32 tokens, tuned of 16; give a model and what was "
        "tuned from it"
    ):
        probe_drift(
            bigram(np.zeros((32, 32)), run="base"), bigram(np.zeros((16, 16)), run="tuned"), items
        )

    class Shifted(Numbers):
        def __call__(self, text, add_special_tokens=True):
            return {
                "input_ids": [[i + 1 for i in row] for row in super().__call__(text)["input_ids"]]
            }

    base, tuned = reciter(), reciter()
    tuned.tokenizer = Shifted()
    what = "so that their predictions cannot be compared; give a model and what was tuned from it"
    with refuses(
        f"probe_drift: the tokenizers of reciter and reciter cut text number 0 into other tokens, {what}"
    ):
        probe_drift(base, tuned, items)
    with refuses(
        f"probe_drift: the tokenizers of reciter and reciter begin texts otherwise, {what}"
    ):
        probe_drift(base, LanguageModel(base.module, Numbers(), run="reciter", bos=1), items)
    broken = neox(vocabulary=32)
    broken.gpt_neox.embed_in.weight.data[9] = np.nan  # token 9 alone
    with refuses(
        "probe_drift: the predictions for item 'i1' are not finite in reciter or in tuned at step 3; "
        "the weights or their dtype give NaN or Inf"
    ):
        probe_drift(
            base,
            LanguageModel(broken, Numbers(), run="tuned", step=3),
            frame(["1 2 3", "9 6", "4 5"]),
        )


# --- changes, text by text -----------------------------------------------------------------------


def measured(values, metric="loss", run="base", step=0, groups=None, **beside):
    """Item rows: a, b, c are texts, x, y, z controls."""
    names = list(values)
    groups = groups or {n: "control" if n in "xyz" else "seen" for n in names}
    return rows(
        metric, list(values.values()), run=run, step=step, item=names,
        group=[groups[n] for n in names], beside=beside or None,
    )  # fmt: skip


CONTROLS = {"x": 3.0, "y": 3.0, "z": 3.0}
DRIFTED = {
    "x": 3.0,
    "y": 3.1,
    "z": 3.2,
}  # mean change .1, s .1, t(2) = 4.302653, 4/3 under the root


def changes_of(before, after, **options):
    return tuning_changes(measured(before), measured(after, run="tuned", step=5), **options)


def test_changes_by_hand():
    # zone .1 -+ 4.302653 * .1 * sqrt(4/3) = .1 -+ .4968276: -.3968276 to .5968276
    table = changes_of(
        CONTROLS | {"a": 2.0, "b": 2.0, "c": 2.0}, DRIFTED | {"a": 1.6, "b": 2.6, "c": 2.5}
    )
    told = table.set_index("item")
    assert told["change"].to_dict() == {
        "a": "memorized", "b": "forgotten", "c": "as the controls", "x": "", "y": "", "z": "",
    }  # fmt: skip
    np.testing.assert_allclose(told.loc[["a", "b", "c"], "value"], [-0.4, 0.6, 0.5], atol=1e-9)
    zone = told.loc["a", ["floor", "floor_lo", "floor_hi"]].astype(float)
    np.testing.assert_allclose(zone, [0.1, -0.3968276, 0.5968276], atol=1e-6)
    assert (told["before"]["a"], told["after"]["a"]) == (2.0, 1.6)
    assert set(table["metric"]) == {"difference"} and set(table["of"]) == {"loss"}
    assert set(table["run"]) == {"tuned"} and set(table["step"]) == {5}


def test_where_high_is_better_a_fall_is_forgetting():
    sets = CONTROLS | {"a": 2.0, "b": 2.0}, DRIFTED | {"a": 1.6, "b": 2.6}
    before, after = ({k: v / 10 for k, v in each.items()} for each in sets)
    table = tuning_changes(measured(before, "top1"), measured(after, "top1", run="tuned"))
    assert table.set_index("item")["change"][["a", "b"]].tolist() == ["forgotten", "memorized"]


def test_on_the_edge_of_the_zone_nothing_is_told():
    # controls that all change by exactly 1/2 leave a zone without width
    before = dict.fromkeys("xyzab", 1.0)
    after = dict.fromkeys("xyza", 1.5) | {"b": 1.25}
    told = changes_of(before, after).set_index("item")["change"]
    assert (told["a"], told["b"]) == ("as the controls", "memorized")


def test_verdicts_have_states_and_a_tie_is_not_known():
    groups = dict.fromkeys("abcdex", "seen") | {"x": "control"}
    before = {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0, "e": 0.5, "x": 1.0}
    after = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.5, "e": 1.0, "x": 0.0}
    table = tuning_changes(
        measured(before, "recognition", groups=groups),
        measured(after, "recognition", run="tuned", groups=groups),
    )
    states = table.set_index("item")["change"].to_dict()
    assert states == {
        "a": "kept",
        "b": "lost",
        "c": "gained",
        "d": "never",
        "e": "gained",
        "x": "lost",
    }


def test_without_two_controls_nothing_is_said():
    table = changes_of({"a": 2.0, "x": 1.0}, {"a": 0.0, "x": 1.0})
    assert set(table["change"]) == {""} and table["floor_lo"].isna().all()
    net = tuning_summary(table).query("metric == 'net_change'")
    assert net["value"].isna().all() and set(net["reason"]) == {"fewer than two controls"}
    shares = tuning_summary(table).query("metric == 'memorized_share'")
    assert shares["n"].tolist() == [0] and set(shares["reason"]) == {"no text to count"}


def test_the_controls_can_be_named_and_the_level_chosen():
    groups = {"x": "mine", "y": "mine", "z": "mine", "a": "seen"}
    before = measured(CONTROLS | {"a": 2.0}, groups=groups)
    after = measured(DRIFTED | {"a": 1.6}, run="tuned", groups=groups)
    assert set(tuning_changes(before, after)["change"]) == {""}
    named = tuning_changes(before, after, controls=["mine"]).set_index("item")["change"]
    assert named["a"] == "memorized"
    # t(2) at .995 is 9.924843: the zone is now .1 -+ 1.1460...
    wide = tuning_changes(before, after, controls=["mine"], level=0.99).set_index("item")["change"]
    assert wide["a"] == "as the controls"


def test_foils_losses_are_left_out_and_kinds_of_foil_apart():
    table = pd.concat(
        [
            measured({"a": 1.0, "x": 1.0, "y": 1.0}, foil="itself"),
            measured({"a": 4.0, "x": 4.0, "y": 4.0}, foil="far"),
            measured({"a": 1.0, "x": 1.0, "y": 0.0}, "recognition", foil="far"),
            measured({"a": 0.0, "x": 1.0, "y": 0.0}, "recognition", foil="near"),
        ]
    )
    got = tuning_changes(table, table.assign(run="tuned"))
    assert set(zip(got["of"], got["foil"], strict=True)) == {
        ("loss", "itself"), ("recognition", "far"), ("recognition", "near"),
    }  # fmt: skip
    assert got.query("item == 'a'").set_index("foil")["change"].to_dict() == {
        "itself": "as the controls", "far": "kept", "near": "never",
    }  # fmt: skip


def test_each_step_is_paired_with_the_base_and_has_its_zone():
    before = measured(CONTROLS | {"a": 2.0, "gone": 1.0}, groups=None)
    steps = [
        measured(DRIFTED | {"a": 1.6}, run="t", step=1),
        measured(CONTROLS | {"a": 2.0}, run="t", step=2),
    ]
    table = tuning_changes(before, pd.concat(steps))
    assert table.query("item == 'a'").set_index("step")["change"].to_dict() == {
        1: "memorized", 2: "as the controls",
    }  # fmt: skip
    assert table.attrs["unpaired"] == 1  # "gone" has no partner
    assert len(table) == 8


def test_what_changes_refuses():
    one = measured({"a": 1.0})
    pooled = rows("loss", 1.0, run="base", item="all")
    with refuses("tuning_changes: before has pooled rows; give those of single items"):
        tuning_changes(pooled, one)
    with refuses("tuning_changes: after has pooled rows; give those of single items"):
        tuning_changes(one, pooled)
    both = pd.concat([one, measured({"a": 1.0}, step=1)])
    with refuses("tuning_changes: before has 2 steps; select the base's one"):
        tuning_changes(both, one)
    with refuses(
        "tuning_changes: no item of one group and measure is in both tables; probe both models with "
        "the same items"
    ):
        tuning_changes(one, measured({"b": 1.0}))
    twice = pd.concat([one, one.assign(run="other")])
    with refuses(
        "tuning_changes: after has several rows of loss for item 'a'; select one run and one setting"
    ):
        tuning_changes(one, twice)
    with refuses("tuning_changes: level is 1, it must lie between 0 and 1"):
        tuning_changes(one, one, level=1)
    with refuses("tuning_summary: no column 'of'; give what tuning_changes returns"):
        tuning_summary(one)


# --- pooled --------------------------------------------------------------------------------------


def test_summary_by_hand():
    # changes of seen 1 and 3, of controls 0, 1, 2: net 2 - 1 = 1, s.e. sqrt(2/2 + 1/3) = 1.1547005,
    # degrees of freedom (4/3)^2 / (1/1 + (1/9)/2) = 1.6842105
    zero = dict.fromkeys("abxyz", 5.0)
    after = {"a": 6.0, "b": 8.0, "x": 5.0, "y": 6.0, "z": 7.0}
    table = tuning_summary(changes_of(zero, after), draws=200)
    told = table.set_index(["group", "metric"])
    assert told["value"]["seen", "difference"] == pytest.approx(2.0)
    assert told["value"]["control", "difference"] == pytest.approx(1.0)
    half = stats.t.ppf(0.975, 1.6842105) * 1.1547005
    net = told.loc[("seen", "net_change"), ["value", "lo", "hi"]].astype(float)
    np.testing.assert_allclose(net, [1.0, 1.0 - half, 1.0 + half], rtol=1e-6)
    welch = stats.ttest_ind([1, 3], [0, 1, 2], equal_var=False).confidence_interval(0.95)
    np.testing.assert_allclose(net.iloc[1:], [welch.low, welch.high], rtol=1e-9)
    # zone 1 -+ 4.302653 * sqrt(4/3): neither is outside; Wilson of 0 of 2 ends at .6576199
    for metric in ("memorized_share", "forgotten_share"):
        share = told.loc[("seen", metric)]
        assert (share["value"], share["n"]) == (0.0, 2) and share["hi"] == pytest.approx(0.6576199)
    assert ("control", "net_change") not in told.index
    assert told["n"]["seen", "net_change"] == 2


def test_shares_of_texts_by_hand():
    # extractable: a, b, c known before; of them b and c lost; of d, e not known, e gained. Wilson
    # of 2 of 3: .2076595 to .9385081; of 1 of 2: .0945312 to .9054688.
    groups = dict.fromkeys("abcde", "seen")
    before = dict(zip("abcde", [1, 1, 1, 0, 0], strict=True))
    after = dict(zip("abcde", [1, 0, 0, 0, 1], strict=True))
    made = [measured(each, "extractable", run=run, groups=groups)
            for each, run in ((before, "base"), (after, "tuned"))]  # fmt: skip
    told = tuning_summary(tuning_changes(*made)).set_index("metric")
    lost, gained = told.loc["lost_share"], told.loc["gained_share"]
    assert (lost["n"], gained["n"]) == (3, 2)
    np.testing.assert_allclose(
        list(lost[["value", "lo", "hi"]]), [2 / 3, 0.2076595, 0.9385081], atol=1e-6
    )
    np.testing.assert_allclose(
        list(gained[["value", "lo", "hi"]]), [0.5, 0.0945312, 0.9054688], atol=1e-6
    )
    assert set(told.index) == {"difference", "lost_share", "gained_share"}


def test_memorized_and_forgotten_are_counted():
    before = dict.fromkeys("xyzabcd", 3.0)
    after = DRIFTED | {"a": 2.0, "b": 2.0, "c": 4.0, "d": 3.1}
    groups = {n: "control" if n in "xyz" else "seen" for n in before}
    made = tuning_changes(measured(before, groups=groups), measured(after, run="t", groups=groups))
    told = tuning_summary(made).set_index(["group", "metric"])["value"]
    assert told["seen", "memorized_share"] == 0.5 and told["seen", "forgotten_share"] == 0.25


def test_the_interval_of_untouched_texts_holds_their_zone():
    # texts drawn like the controls leave the zone in 5 % of cases: of 4,000 between 3.9 and 6.1 %
    # (three standard errors), and as many on either side
    rng = np.random.default_rng(4)
    outside = {"memorized": 0, "forgotten": 0}
    for _ in range(40):
        names = [f"i{n}" for n in range(120)]
        group = ["control"] * 20 + ["seen"] * 100
        made = [rows("loss", 5 + rng.normal(size=120), run=run, item=names, group=group)
                for run in ("base", "tuned")]  # fmt: skip
        told = tuning_changes(*made)["change"].value_counts()
        outside = {key: count + told.get(key, 0) for key, count in outside.items()}
    share = sum(outside.values()) / 4000
    assert 0.02 < share < 0.09  # the 20 controls of each draw are shared by its 100 texts
    assert 0.25 < outside["memorized"] / sum(outside.values()) < 0.75


def test_changes_of_real_models_are_those_of_a_plain_loop(tiny):
    items = tiny.suite.items("base").assign(group=lambda t: t["group"].replace("never", "unseen"))
    base, tuned = (tiny.suite.checkpoints("base").at(step) for step in (0, 16))
    before = probe_texts(base, items)
    tuned = tiny.suite.checkpoints("base").at(16)
    after = probe_texts(tuned, items)
    summary = tuning_summary(tuning_changes(before, after))
    for metric in ("loss", "top1"):
        one, other = (t[t["metric"] == metric].set_index("item")["value"] for t in (before, after))
        group = items.set_index("item")["group"]
        for name in group.unique():
            mine = [other[i] - one[i] for i in group.index[group == name]]
            row = summary.query(
                f"metric == 'difference' and of == '{metric}' and group == '{name}'"
            )
            assert row["value"].item() == pytest.approx(np.mean(mine))
            assert row["n"].item() == len(mine)
    # the base against itself: nothing is forgotten, nothing memorized
    itself = tuning_changes(before, before)
    assert (itself["value"] == 0).all()
    assert not set(itself["change"]) & {"memorized", "forgotten", "lost", "gained"}


# --- plots ---------------------------------------------------------------------------------------


@pytest.fixture
def told():
    return changes_of(CONTROLS | {"a": 2.0, "b": 2.0}, DRIFTED | {"a": 1.6, "b": 2.6})


def test_before_after_draws_each_text_and_the_zone(told):
    items = pd.DataFrame({"item": list("abxyz"), "text": ["<b>one</b>", *"2345"]})
    figure = plot_before_after(told, items=items)
    marks = {t.name: t for t in figure.data}
    assert sorted(zip(marks["seen"].x, marks["seen"].y, strict=True)) == [(2.0, 1.6), (2.0, 2.6)]
    assert list(marks["control"].y) == [3.0, 3.1, 3.2]
    low, high = 1.6, 3.2  # the axis' ends, and on both the zone around them
    np.testing.assert_allclose(
        marks["95 % of controls"].y,
        [low + 0.5968276, high + 0.5968276, high - 0.3968276, low - 0.3968276],
        atol=1e-6,
    )
    assert "&lt;b&gt;one" in str(marks["seen"].customdata)  # text, not mark-up
    assert figure.layout.xaxis.title.text == "base model [nats per token]"
    bare = changes_of({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0})
    assert [t.name for t in plot_before_after(bare).data] == ["no change", "seen"]


def test_plot_tuning_draws_means_and_intervals(told):
    summary = tuning_summary(told, draws=50)
    figure = plot_tuning(summary)
    (trace,) = figure.data
    means = summary[summary["metric"] == "difference"].set_index("group")
    assert trace.y == tuple(means.index)
    np.testing.assert_allclose(trace.x, means["value"], atol=1e-6)
    np.testing.assert_allclose(trace.error_x.array, means["hi"] - means["value"], atol=1e-6)
    assert figure.layout.xaxis.title.text == "tuned − base [nats per token], lower is better known"
    assert figure.layout.annotations[0].text == "mean negative log-probability"


def test_what_the_plots_refuse(told):
    with refuses("plot_before_after: needs rows of top1 at one step, got 0 of 0 steps; select one"):
        plot_before_after(told, of="top1")
    several = pd.concat([told, told.assign(step=9)])
    with refuses(
        "plot_before_after: needs rows of loss at one step, got 10 of 2 steps; select one"
    ):
        plot_before_after(several)
    summary = tuning_summary(told, draws=50)
    with refuses(
        "plot_tuning: several rows for loss of group control; select one step and one kind of foil"
    ):
        plot_tuning(pd.concat([summary, summary.assign(step=9)]))
    with refuses("plot_tuning: no rows of difference; give what tuning_summary returns"):
        plot_tuning(summary[summary["metric"] == "net_change"])


# --- what the report loads -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def words():
    return byte_level_tokenizer(ENGLISH)


@pytest.fixture(scope="module")
def own(tmp_path_factory, words):
    """A base, what it was tuned to, its checkpoints, and models it was not tuned from."""
    folder = tmp_path_factory.mktemp("own")
    models = {"base": neox(0), "tuned": neox(1), "run/checkpoint-5": neox(2), "run/checkpoint-9": neox(1),
              "wide": neox(0, width=32), "large": neox(0, vocabulary=310)}  # fmt: skip
    for name, module in models.items():
        module.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    neox(0).save_pretrained(folder / "other")
    byte_level_tokenizer(ENGLISH[:1]).save_pretrained(folder / "other")
    texts = pd.DataFrame({"text": ENGLISH, "group": ["seen"] * 3 + ["unseen"] * 3})
    texts.to_csv(folder / "texts.csv", index=False)
    general = [f"{text.split()[-1]} {text}"[:60] for text in ENGLISH]
    (folder / "general.txt").write_text("\n".join(general), encoding="utf-8")
    return folder


def given(own, tuned, **options):
    options = {"general": str(own / "general.txt")} | options
    return load_tuning(str(own / "base"), str(own / tuned), str(own / "texts.csv"), **options)


def test_own_models_are_loaded_with_texts_and_foils(own):
    tuning = given(own, "tuned")
    assert tuning.base.run == "base" and tuning.tuned.run == "tuned"
    assert tuning.items["group"].value_counts().to_dict() == {"seen": 3, "unseen": 3}
    assert set(tuning.general["group"]) == {"general"} and len(tuning.general) == 6
    assert set(tuning.foils["text"]) <= set(tuning.general["text"]) and tuning.controlled
    assert tuning.says() == ("Base base: 6 texts in groups seen (3), unseen (3); 6 general texts.")
    run = given(own, "run")
    assert run.tuned.steps == [5, 9]
    drift = probe_drift(run.base, run.tuned, run.items)
    last = probe_drift(tuning.base, tuning.tuned, tuning.items)
    np.testing.assert_allclose(drift.query("step == 9")["value"], last["value"], atol=1e-6)
    after = probe_texts(run.tuned, run.items, foils=run.foils)
    changes = tuning_changes(probe_texts(run.base, run.items, foils=run.foils), after)
    assert sorted(changes["step"].unique()) == [5, 9]


def test_texts_that_are_items_are_no_general_text_and_few_make_no_foils(own, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("\n".join([ENGLISH[0].upper(), "A reader of few words."] * 2), encoding="utf-8")
    tuning = given(own, "tuned", general=str(few))
    assert tuning.general["text"].tolist() == ["A reader of few words."]
    assert tuning.foils is None
    assert tuning.says().endswith("No recognition: fewer general texts than items of a group.")
    bare = tmp_path / "bare.txt"
    bare.write_text("\n".join(ENGLISH), encoding="utf-8")
    alone = load_tuning(str(own / "base"), str(own / "tuned"), str(bare))
    assert "No controls: a text that changed may have changed like any other." in alone.says()
    assert len(alone.general) == finetuning.GENERAL  # Python's documentation


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        ("large", "base has a vocabulary of 300 tokens, large of 310; give a model and what was tuned from it"),
        ("wide", "base and wide are of different shapes (first: gpt_neox.embed_in.weight, (300, 16) and "
                 "(300, 32)); give a model and what was tuned from it"),
        ("other", "the tokenizers of base and other cut text number 0 into other tokens, so that their "
                  "predictions cannot be compared; give a model and what was tuned from it"),
    ],
)  # fmt: skip
def test_a_model_that_was_not_tuned_from_the_base_is_refused(own, tuned, message):
    with refuses(f"load_tuning: {message}"):
        given(own, tuned)


def test_an_own_base_needs_both(own):
    for name, pair in {"tuned": ("", "x"), "items": ("x", "")}.items():
        with refuses(
            f"load_tuning: your own base needs {name} too: add -p {name}=..., a model tuned from it, "
            "and a file with columns `text` and `group` (seen, unseen)"
        ):
            load_tuning(str(own / "base"), *pair)


@pytest.fixture
def of_suite(tiny, monkeypatch):
    monkeypatch.setattr(finetuning, "load_suite", lambda: tiny.suite)
    monkeypatch.setattr(finetuning, "OFTEN", 4)
    monkeypatch.setattr(finetuning, "TOKENS", 16)
    return tiny.suite


def test_the_suite_is_tuned_on_texts_it_never_saw(of_suite):
    tuning = load_tuning(n=3, seed=1)
    counts = tuning.items["group"].value_counts().to_dict()
    planted = of_suite.items("base")
    often = set(planted.loc[planted["dose"] >= 4, "item"])
    assert counts == {"studied": 3, "control": 3, "pretrained": len(often)}
    assert set(tuning.items.query("group == 'pretrained'")["item"]) == often
    lists = {g: set(part["text"]) for g, part in tuning.items.groupby("group")}
    assert not set(tuning.general["text"]) & set().union(*lists.values())
    assert tuning.tuned is None and tuning.base.step == 16


def test_a_short_tuning_is_recorded_and_leaves_the_base(of_suite):
    tuning = load_tuning(n=3, seed=1)
    before = tuning.base.weights_hash()
    done, recorded = tune_briefly(tuning, updates=6, learning_rate=3e-3, budget=float("inf"))
    assert tuning.base.weights_hash() == before != done.tuned.weights_hash()
    assert done.tuned.step == 6 and not done.tuned.module.training
    assert sorted(recorded["step"].unique()) == [0, 1, 2, 3, 5, 6]
    loss = recorded.query("metric == 'loss' and foil == 'itself'")
    mean = loss.groupby(["step", "group"], observed=True)["value"].mean().unstack()
    assert mean.loc[6, "studied"] < mean.loc[0, "studied"] - 0.5
    copies = recorded.query("step == 6").groupby("group", observed=True)["copies"].max()
    assert copies.to_dict() == {"studied": 6, "control": 0, "pretrained": 0}
    # the recorder's last probe is what the tuned model says
    after = probe_texts(done.tuned, done.items, foils=done.foils)
    np.testing.assert_allclose(recorded.query("step == 6")["value"], after["value"])
    again, _ = tune_briefly(tuning, updates=6, learning_rate=3e-3, budget=1e-9)
    assert again.tuned.weights_hash() == done.tuned.weights_hash()  # probing changed nothing


def test_what_a_short_tuning_refuses(of_suite):
    tuning = load_tuning(n=3)
    both = "both must be at least 1, and texts of another group than 'control' can be tuned on"
    with refuses(f"tune_briefly: 3 items in group 'studied' and 0 updates; {both}"):
        tune_briefly(tuning, updates=0)
    with (
        pytest.warns(UserWarning, match="is not a number at update"),
        pytest.raises(InputError, match=r"^tune_briefly: the loss is nan at update \d"),
    ):
        tune_briefly(tuning, updates=40, learning_rate=1e30)


def test_new_metrics_are_valid_rows():
    keys = ("kl_base_tuned", "forgetting_loss", "net_change", "memorized_share", "forgotten_share",
            "lost_share", "gained_share")  # fmt: skip
    for key in keys:
        validate(rows(key, 0.0, run="r"))
    with pytest.raises(InputError, match="kl_base_tuned is -1.0, outside 0.0 to None"):
        validate(rows("kl_base_tuned", -1.0, run="r"))
