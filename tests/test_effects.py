"""Effects item by item: against controls, and against the twin."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.stats.effects import compare_with_truth, item_gains, twin_effects
from workbench.stats.profile import memorization_profile
from workbench.table import InputError, rows


def panel(outcome: dict[str, list[float]], cohort: dict[str, float], steps=(1, 2, 3), run="one"):
    parts = [
        rows(
            "log_probability",
            values,
            run=run,
            step=np.array(steps),
            item=item,
            beside={"cohort": cohort.get(item, np.nan)},
        )
        for item, values in outcome.items()
    ]
    return pd.concat(parts, ignore_index=True)


# b is the last checkpoint before the cohort at 2, so step 1. Item a moves -5 -> -3 (+2), the
# controls by +.5 and +1.5, 1.0 on average: a's gain is 1.0. At step 3: +3 against 2 -> 1.0.
OUTCOME = {"a": [-5.0, -3.0, -2.0], "c1": [-5.0, -4.5, -3.5], "c2": [-6.0, -4.5, -3.5]}


def test_item_gain_by_hand():
    got = item_gains(panel(OUTCOME, {"a": 2.0}))
    assert got.set_index("step")["value"].to_dict() == {1: 0.0, 2: 1.0, 3: 1.0}
    assert set(got["item"]) == {"a"} and set(got["metric"]) == {"memorization"}
    assert got.attrs == {"without_base": 0, "controls": 2}


def test_item_seen_at_the_first_checkpoint_has_no_base_and_is_counted():
    got = item_gains(panel(OUTCOME | {"early": [-1.0, -1.0, -1.0]}, {"a": 2.0, "early": 1.0}))
    assert set(got["item"]) == {"a"} and got.attrs["without_base"] == 1


def test_cohort_between_checkpoints_takes_the_one_before_it():
    # cohort 3 with checkpoints 1, 2, 4: base is 2, so a gains (-2 - -3) - (-3.5 - -4.5) = 0
    got = item_gains(panel(OUTCOME, {"a": 3.0}, steps=(1, 2, 4)))
    assert got.set_index("step")["value"][4] == pytest.approx(0.0)


def test_gains_are_matched_within_strata():
    table = panel(OUTCOME | {"other": [0.0, -9.0, -9.0]}, {"a": 2.0})
    table["kind"] = np.where(table["item"] == "other", "verse", "string")
    assert item_gains(table, strata=["kind"]).set_index("step")["value"][2] == 1.0
    table["kind"] = np.where(table["item"] == "a", "verse", "string")
    with pytest.raises(InputError, match="^item_gains: no never-trained items at kind=verse$"):
        item_gains(table, strata=["kind"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_mean_gain_of_a_cohort_is_the_causal_estimate(seed):
    rng = np.random.default_rng(seed)
    names = [f"i{n}" for n in range(9)]
    cohort = dict(zip(names, rng.choice([2.0, 3.0, np.nan], size=9), strict=True))
    cohort |= {"i0": 2.0, "i1": 2.0, "i2": np.nan, "i3": np.nan}
    table = panel({n: list(-rng.uniform(0, 5, 4)) for n in names}, cohort, steps=(1, 2, 3, 4))
    gains = item_gains(table)
    mean = gains.groupby(["cohort", "step"])["value"].mean()
    cells = memorization_profile(table, draws=10)
    for cell in cells[cells["metric"] == "memorization"].itertuples():
        assert mean[cell.cohort, cell.step] == pytest.approx(cell.value, abs=1e-12)


def test_twin_effect_by_hand_and_only_where_the_twin_never_trained_on_the_item():
    mine = panel({"a": [-5.0, -2.0], "b": [-4.0, -4.0]}, {"a": 2.0}, steps=(1, 2))
    twin = panel({"a": [-5.0, -4.5], "b": [-4.0, -1.0]}, {"b": 2.0}, steps=(1, 2), run="two")
    got = twin_effects(mine, twin)
    assert got.set_index("step")["value"].to_dict() == {1: 0.0, 2: 2.5}
    assert set(got["item"]) == {"a"}
    turned = twin_effects(twin, mine)
    assert turned.set_index("step")["value"].to_dict() == {1: 0.0, 2: 3.0}


def test_twins_that_share_nothing_are_refused():
    mine = panel({"a": [-5.0, -2.0]}, {"a": 2.0}, steps=(1, 2))
    with pytest.raises(InputError, match="^twin_effects: the runs share no item and step"):
        twin_effects(mine, mine)


def test_comparison_with_truth_by_hand():
    # truth of three items 1, 2, 3: mean 2, standard error 1 / sqrt(3) = .577; t with 2 degrees
    # of freedom is 4.303. An estimate with error 1 may be off by 4.303 alone and by
    # 4.303 x sqrt(1 + 1/3) = 4.968 with both errors: 6.5 is 4.5 off, 7.5 is 5.5 off.
    where = {"lag": [0, 1]}
    truth = [
        rows("memorization", [1.0, 2.0, 3.0], run="r", item=["a", "b", "c"], beside={"lag": lag})
        for lag in (0, 1)
    ]
    estimate = rows("memorization", [6.5, 7.5], run="r", beside=where | {"se": 1.0})
    got = compare_with_truth(estimate, pd.concat(truth), on=["lag"])
    assert got["truth"].tolist() == [2.0, 2.0]
    assert got["se_truth"].tolist() == pytest.approx([3**-0.5, 3**-0.5])
    assert got["inside"].tolist() == [True, False]
    assert got["inside_alone"].tolist() == [False, False]


def test_cells_without_an_error_are_left_out_and_counted():
    truth = rows("memorization", [1.0], run="r", item="a", beside={"lag": 0})
    estimate = rows("memorization", 1.0, run="r", beside={"lag": 0, "se": 0.1})
    got = compare_with_truth(estimate, truth, on=["lag"])
    assert got.empty and got.attrs == {"left_out": 1}
