"""Copies and lag of each row, from the ledger."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.stats.exposure import align_exposures
from workbench.table import InputError, rows, validate


def panel(steps, items):
    grid = [(s, i) for s in steps for i in items]
    return rows("top1", np.zeros(len(grid)), run="r", step=[s for s, _ in grid],
                item=[i for _, i in grid])  # fmt: skip


def test_align_exposures_by_hand():
    # a is met in updates 3, 3 and 7: nothing at step 2; right after update 3 two copies, lag 0;
    # at step 6 two copies, lag 3; at 7 three copies, lag 0; at 9 lag 2. b never.
    exposures = pd.DataFrame({"update": [7, 3, 3], "item": ["a", "a", "a"]})
    got = align_exposures(panel([2, 3, 6, 7, 9], ["a", "b"]), exposures)
    a, b = got[got["item"] == "a"], got[got["item"] == "b"]
    assert a["copies"].to_list() == [0, 2, 2, 3, 3]
    np.testing.assert_equal(a["lag"].to_numpy(), [np.nan, 0, 3, 0, 2])
    assert b["copies"].to_list() == [0] * 5 and b["lag"].isna().all()


def test_the_result_is_a_table_and_the_input_stays():
    table = panel([1], ["a"])
    got = align_exposures(table, pd.DataFrame({"update": [1], "item": ["a"]}))
    validate(got)
    assert "copies" not in table.columns


def test_no_exposures_at_all():
    got = align_exposures(panel([0, 5], ["a"]), pd.DataFrame({"update": [], "item": []}))
    assert got["copies"].to_list() == [0, 0] and got["lag"].isna().all()


def test_exposures_of_items_that_the_table_lacks_count_for_nobody():
    exposures = pd.DataFrame({"update": [1, 900], "item": ["z", "z"]})
    assert align_exposures(panel([2], ["a", "b"]), exposures)["copies"].to_list() == [0, 0]


def test_a_missing_column_is_named():
    with pytest.raises(InputError) as error:
        align_exposures(panel([1], ["a"]), pd.DataFrame({"step": [1], "item": ["a"]}))
    assert str(error.value) == "align_exposures: the exposures have no column 'update'"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abcz")), max_size=30),
    st.lists(st.integers(0, 15), min_size=1, max_size=6, unique=True),
)
def test_align_exposures_is_the_count_it_says(met, steps):
    exposures = pd.DataFrame(met, columns=["update", "item"])
    got = align_exposures(panel(steps, "abc"), exposures)
    for row in got.itertuples():
        before = [u for u, i in met if i == row.item and u <= row.step]
        assert row.copies == len(before)
        if before:
            assert row.lag == row.step - max(before)
        else:
            assert np.isnan(row.lag)
