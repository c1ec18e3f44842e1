"""The one table: what validate refuses, what save and load keep."""

import os
import re
import stat

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.table import (
    COLUMNS,
    METRICS,
    InputError,
    cache_folder,
    coordinates,
    load,
    one_metric,
    rows,
    save,
    validate,
    whole_file,
    whole_folder,
)


def two():
    return rows("top1", [0.25, 0.75], run="r", step=[1, 2], group="seen", item=["a", "b"])


def refused(table, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        validate(table)


def test_rows_by_hand():
    table = two()
    assert list(table.columns) == list(COLUMNS)
    assert table.iloc[1].drop(["lo", "hi"]).to_list() == ["r", 2, "seen", "b", "top1", 0.75, 1]
    assert table[["lo", "hi"]].isna().all(axis=None)


def test_rows_repeats_a_scalar_to_the_longest_column():
    table = rows("top1", 0.5, run="r", step=[1, 2, 3], beside={"lag": [0, 1, 2], "k": 7})
    assert table["value"].to_list() == [0.5] * 3
    assert table["lag"].to_list() == [0, 1, 2] and table["k"].to_list() == [7] * 3


def test_rows_takes_a_slice_of_a_frame_by_position():
    # index 5, 6 of the slice must not be matched with rows 0, 1
    names = pd.Series(["x", "y"], index=[5, 6])
    assert rows("top1", [0.0, 1.0], run="r", item=names)["item"].to_list() == ["x", "y"]


def test_rows_of_nothing_is_empty():
    assert len(rows("top1", [], run="r")) == 0


def test_rows_refuses_an_unknown_metric():
    with pytest.raises(KeyError, match="rows: 'luck' is not in METRICS; add it there first"):
        rows("luck", 1.0, run="r")


def test_validate_settles_types():
    table = validate(two().assign(step=[1.0, 2.0], lag=[0, np.nan], law="power"))
    assert {n: str(t) for n, t in table.dtypes.items()} == {
        "run": "category",
        "step": "int64",
        "group": "category",
        "item": "category",
        "metric": "category",
        "value": "float64",
        "lo": "float64",
        "hi": "float64",
        "n": "int64",
        "lag": "float64",
        "law": "category",
    }


def test_validate_leaves_its_argument_alone():
    table = two()
    before = table.copy()
    validate(table)
    pd.testing.assert_frame_equal(table, before)


def test_validate_reads_numbers_as_ids():
    table = validate(two().assign(item=[10, 9]))
    assert table["item"].to_list() == ["10", "9"]


def test_validate_refuses_missing_columns():
    refused(
        two().drop(columns=["lo", "n"]),
        "validate: the table lacks the columns lo, n; "
        "it has run, step, group, item, metric, value, hi",
    )


def test_validate_refuses_a_missing_step():
    refused(two().assign(step=[1, np.nan]), "validate: step is missing in 1 rows")


def test_validate_refuses_unknown_metrics():
    known = ", ".join(sorted(METRICS))
    refused(
        two().assign(metric=["top1", "luck"]), f"validate: unknown metric 'luck'; known are {known}"
    )


def test_validate_refuses_a_turned_interval():
    refused(
        two().assign(lo=[0.1, 0.9], hi=[0.3, 0.8]),
        "validate: lo 0.9 > hi 0.8 in run=r, step=2, group=seen, item=b, metric=top1",
    )


def test_validate_takes_intervals_also_of_no_width():
    table = validate(two().assign(lo=[0.1, 0.75], hi=[0.3, 0.75]))
    assert table["lo"].to_list() == [0.1, 0.75] and table["hi"].to_list() == [0.3, 0.75]


@pytest.mark.parametrize("value", [-0.01, 1.01, np.inf, -np.inf])
def test_validate_refuses_values_out_of_range(value):
    refused(
        two().assign(value=[0.5, value]),
        f"validate: top1 is {value}, outside 0.0 to 1.0, "
        "in run=r, step=2, group=seen, item=b, metric=top1",
    )


def test_validate_takes_the_bounds_themselves_and_undefined_values():
    table = validate(two().assign(value=[1.0, np.nan]))
    assert table["value"].isna().tolist() == [False, True]
    assert len(validate(rows("log_probability", [0.0, -1e9], run="r", item=["a", "b"]))) == 2


def test_validate_refuses_repeated_coordinates():
    refused(
        pd.concat([two(), two()]),
        "validate: 2 rows repeat the coordinates of another, first run=r, step=1, group=seen, "
        "item=a, metric=top1; pool them or add the coordinate that tells them apart",
    )


def test_a_coordinate_tells_rows_apart_and_a_standard_error_does_not():
    twice = pd.concat([two(), two()])
    assert len(validate(twice.assign(prefix=[1, 1, 2, 2]))) == 4
    with pytest.raises(InputError, match="2 rows repeat"):
        validate(twice.assign(se=[0.1, 0.1, 0.2, 0.2], reason=["a", "a", "b", "b"]))
    assert "se" not in coordinates(two().assign(se=0.1, lag=1))
    assert "lag" in coordinates(two().assign(se=0.1, lag=1))


def test_one_metric():
    assert one_metric(two(), "plot_curve") is METRICS["top1"]
    assert METRICS["log_probability"].axis == "mean log-probability [nats per token]"
    assert METRICS["auc"].axis == "membership AUC"
    mixed = pd.concat([two(), rows("loss", 1.0, run="r")])
    with pytest.raises(InputError) as error:
        one_metric(mixed, "plot_curve")
    assert str(error.value) == (
        "plot_curve: needs rows of one metric, got top1, loss; select one first"
    )
    with pytest.raises(InputError, match="needs rows of one metric, got none; select one first"):
        one_metric(two().head(0), "plot_curve")


def test_every_metric_is_coherent():
    for key, metric in METRICS.items():
        assert metric.label and metric.source, key
        assert metric.better in ("high", "low", ""), key
        low = -np.inf if metric.low is None else metric.low
        high = np.inf if metric.high is None else metric.high
        assert low < high, key
        assert metric.chance is None or low <= metric.chance <= high, key


def test_save_and_load_keep_table_and_passport(tmp_path):
    table = validate(two().assign(lag=[0.0, np.nan], reason=["", "no base"]))
    passport = {"model": "m", "seed": 3, "versions": {"torch": "2"}}
    place = save(table, tmp_path / "deep" / "t.parquet", passport=passport)
    back = load(place)
    pd.testing.assert_frame_equal(back, table, check_categorical=False)
    assert back.attrs["passport"] == {"version": 1, **passport}
    assert [p.name for p in place.parent.iterdir()] == ["t.parquet"]


def test_save_refuses_what_validate_refuses_and_writes_nothing(tmp_path):
    with pytest.raises(InputError, match="outside"):
        save(two().assign(value=[2.0, 0.0]), tmp_path / "t.parquet")
    assert list(tmp_path.iterdir()) == []


def test_load_refusals(tmp_path):
    missing, text = tmp_path / "none.parquet", tmp_path / "text.parquet"
    text.write_text("not a table")
    plain, future = tmp_path / "plain.parquet", tmp_path / "future.parquet"
    two().to_parquet(plain)
    save(two(), future, passport={"version": 99})
    with pytest.raises(InputError) as error:
        load(missing)
    assert str(error.value) == f"load: no table at {missing}"
    with pytest.raises(
        InputError, match=f"^load: {re.escape(str(text))} is not a whole Parquet file"
    ):
        load(text)
    with pytest.raises(InputError) as error:
        load(plain)
    assert str(error.value) == (
        f"load: {plain} carries no passport, so it was not written by save(); read a panel from "
        "elsewhere with pandas.read_parquet and hand that on"
    )
    with pytest.raises(InputError) as error:
        load(future)
    assert str(error.value) == (f"load: {future} has layout version 99, this is 1; make it again")


def test_load_refuses_a_file_damaged_inside(tmp_path):
    place = save(rows("loss", np.random.default_rng(0).random(5000), run="r",
                      item=np.arange(5000)), tmp_path / "t.parquet")  # fmt: skip
    data = bytearray(place.read_bytes())
    middle = len(data) // 3
    data[middle : middle + 200] = b"\xff" * 200
    place.write_bytes(data)
    with pytest.raises(InputError, match="is not a whole Parquet file"):
        load(place)


def test_a_passport_of_parquet_is_readable_by_others(tmp_path):
    place = save(two(), tmp_path / "t.parquet", passport={"seed": 1})
    note = pq.read_schema(place).metadata[b"workbench.passport"]
    assert note == b'{"seed": 1, "version": 1}'


def test_whole_file_leaves_nothing_behind_on_failure(tmp_path):
    target = tmp_path / "out.txt"
    target.write_text("old")
    with pytest.raises(KeyError), whole_file(target) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt"]


def test_whole_file_replaces_on_success_with_usual_rights(tmp_path):
    target = tmp_path / "new" / "out.txt"
    with whole_file(target) as temporary:
        assert temporary.parent == target.parent  # the same disk, so that renaming is atomic
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == ["out.txt"]
    if os.name == "posix":
        plain = tmp_path / "plain"
        plain.touch()
        assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_whole_folder_leaves_nothing_behind_on_failure(tmp_path):
    with pytest.raises(KeyError), whole_folder(tmp_path / "made") as temporary:
        (temporary / "half").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_whole_folder_overwrites_nothing(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(FileExistsError) as error, whole_folder(target) as temporary:
        (temporary / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert str(error.value) == f"whole_folder: {target} was made meanwhile"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
    assert [p.name for p in target.iterdir()] == ["theirs"]
    with whole_folder(tmp_path / "other") as temporary:
        (temporary / "whole").touch()
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["whole"]


def test_cache_folder_follows_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x"
    monkeypatch.delenv("WORKBENCH_CACHE")
    assert cache_folder().name == "memory-workbench"


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**9),
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
            st.one_of(st.floats(0, 1), st.just(np.nan)),
        ),
        min_size=1,
        max_size=8,
        unique_by=lambda each: each[:2],
    )
)
def test_any_table_survives_save_and_load(tmp_path_factory, data):
    steps, items, values = zip(*data, strict=True)
    table = validate(rows("top1", list(values), run="r", step=list(steps), item=list(items)))
    back = load(save(table, tmp_path_factory.mktemp("h") / "t.parquet"))
    pd.testing.assert_frame_equal(back, table, check_categorical=False)


def test_every_metric_says_its_formula_and_source():
    assert [key for key, metric in METRICS.items() if not metric.formula or not metric.source] == []
