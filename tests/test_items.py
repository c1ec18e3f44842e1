"""What is put to a model: reading the user's texts, cutting them, and making our own."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from tests.conftest import ENGLISH, byte_level_tokenizer, frame, reciter
from workbench.items import (
    check_items,
    cut_items,
    items_hash,
    load_items,
    make_biographies,
    make_canaries,
    make_controls,
)
from workbench.table import InputError

ROWS = [
    {"id": "a", "text": "One, two", "label": 1, "year": 1900},
    {"id": "b", "text": "three “four”", "label": 0, "year": 1950},
]


def write(path, rows=ROWS):
    """The same rows in the file's own format."""
    data = pd.DataFrame(rows)
    if path.suffix == ".csv":
        data.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        data.to_parquet(path)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
    return path


def refused(source, message, **options):
    with pytest.raises(InputError) as error:
        load_items(source, **options)
    assert str(error.value) == message


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet", "x.ndjson"])
def test_every_kind_of_file_gives_the_same_frame(tmp_path, name):
    items = load_items(write(tmp_path / name))
    assert list(items.columns)[:3] == ["item", "text", "group"]
    assert items["item"].to_list() == ["a", "b"]
    assert items["text"].to_list() == ["One, two", "three “four”"]
    assert items["group"].to_list() == ["seen", "unseen"]
    assert items["year"].to_list() == [1900, 1950]


def test_a_json_array_is_read_too(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(ROWS, indent=2))
    assert load_items(file)["item"].to_list() == ["a", "b"]


def test_plain_text_is_one_text_a_line_numbered(tmp_path):
    file = tmp_path / "poem.txt"
    file.write_text("first line\n\n   second line \r\n", encoding="utf-8")
    items = load_items(file)
    assert items.to_dict("list") == {
        "item": ["poem-00001", "poem-00002"],
        "text": ["first line", "second line"],
        "group": ["seen", "seen"],
    }


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0b", "\x1c"])
def test_only_a_newline_ends_a_line(tmp_path, mark):
    # str.splitlines() would cut at each of these, and JSON may hold the first two unescaped
    file = tmp_path / "x.jsonl"
    text = f"one{mark}two"
    file.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_items(file)["text"].to_list() == [text]
    plain = tmp_path / "x.txt"
    plain.write_text(text + "\n", encoding="utf-8")
    assert load_items(plain)["text"].to_list() == [text]


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("x.txt", "hello"), ("x.jsonl", '{"text": "hello"}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert load_items(tmp_path / name)["text"].to_list() == ["hello"]


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        ([1, 0], ["seen", "unseen"]),
        ([1.0, 0.0], ["seen", "unseen"]),
        ([True, False], ["seen", "unseen"]),
        (["Train", "held-out"], ["seen", "unseen"]),
        ([" member ", "non-member"], ["seen", "unseen"]),
        (["x10", "never"], ["x10", "unseen"]),
    ],
)
def test_labels_become_groups(tmp_path, labels, groups):
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    assert load_items(write(tmp_path / "x.jsonl", rows))["group"].to_list() == groups


def test_columns_of_other_names(tmp_path):
    rows = [{"body": "one", "split": "train"}, {"body": "two", "split": "test"}]
    items = load_items(write(tmp_path / "x.jsonl", rows), text="body", group="split")
    assert items["text"].to_list() == ["one", "two"]
    assert items["group"].to_list() == ["seen", "unseen"]


def test_the_text_column_asked_for_wins_over_one_called_text(tmp_path):
    rows = [{"text": "wrong", "body": "right"}]
    assert load_items(write(tmp_path / "x.csv", rows), text="body")["text"].to_list() == ["right"]


def test_words_that_pandas_takes_for_missing_are_texts(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("text,label\nNA,1\nnull,0\n")
    assert load_items(file)["text"].to_list() == ["NA", "null"]


# --- refusals ------------------------------------------------------------------------------------


def test_no_such_file(tmp_path):
    missing = tmp_path / "none.jsonl"
    refused(missing, f"load_items: no file at {missing}; give CSV, JSONL, Parquet or plain text")


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.txt"])
def test_an_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    refused(tmp_path / name, f"load_items: {tmp_path / name} holds no texts")


def test_a_file_of_headers_only(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\n")
    refused(tmp_path / "x.csv", f"load_items: {tmp_path / 'x.csv'} holds no texts")


def test_an_unknown_kind(tmp_path):
    (tmp_path / "x.docx").write_text("text")
    refused(
        tmp_path / "x.docx",
        f"load_items: {tmp_path / 'x.docx'} is of unknown kind '.docx'; "
        "give .csv, .jsonl, .parquet or .txt",
    )


def test_a_missing_text_column(tmp_path):
    file = write(tmp_path / "x.csv", [{"body": "one", "label": 1}])
    refused(
        file,
        f"load_items: {file} has no column 'text'; it has body, label; rename one of them",
    )


def test_a_missing_group_column(tmp_path):
    file = write(tmp_path / "x.csv", [{"text": "one", "label": 1}])
    refused(
        file,
        f"load_items: {file} has no column 'split' for the groups; it has text, label",
        group="split",
    )


def test_a_missing_label(tmp_path):
    file = write(tmp_path / "x.csv", [{"text": "one", "label": 1}, {"text": "two", "label": None}])
    refused(file, f"load_items: row 2 of {file} has no label")


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet"])
def test_empty_texts_are_counted(tmp_path, name):
    texts = ["one", "  ", None]
    rows = [{"text": text, "year": 1900} for text in texts]
    file = write(tmp_path / name, rows)
    refused(file, f"load_items: 2 of 3 texts in {file} are empty (first: row 2); remove those rows")


def test_bad_json_names_its_line(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": }\n')
    refused(
        file,
        f"load_items: line 3 of {file} is not JSON (Expecting value: line 1 column 10 (char 9))",
    )
    file.write_text('{"text": "one"}\n"two"\n')
    refused(
        file,
        f"load_items: entry 2 of {file} is a str, not an object such as "
        '{"text": "..."}',
    )  # fmt: skip


def test_a_damaged_file_is_one_line(tmp_path):
    for name, data in (("x.parquet", b"no parquet"), ("x.txt", b"\xff\xfe\xff"), ("x.json", b"[1")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError) as error:
            load_items(tmp_path / name)
        line = str(error.value)
        assert line.startswith(f"load_items: cannot read {tmp_path / name}: ") and "\n" not in line


def test_repeated_ids(tmp_path):
    rows = [{"id": "a", "text": "one"}, {"id": "a", "text": "two"}, {"id": "a", "text": "three"}]
    refused(
        write(tmp_path / "x.jsonl", rows),
        "check_items: 2 items repeat the id of another (first: 'a'); ids must be unique",
    )


def test_one_text_in_both_groups(tmp_path):
    rows = [{"text": "one", "label": 1}, {"text": "two", "label": 1}, {"text": "one", "label": 0}]
    refused(
        write(tmp_path / "x.jsonl", rows),
        "check_items: 1 texts stand in more than one group (first: item 'x-00001'); a trained text "
        "cannot be its own control: remove it from one",
    )


def test_one_text_twice_in_one_group_is_taken(tmp_path):
    rows = [{"text": "one", "label": 1}, {"text": "one", "label": 1}]
    assert len(load_items(write(tmp_path / "x.jsonl", rows))) == 2


def test_check_items_refusals():
    with pytest.raises(InputError) as error:
        check_items(pd.DataFrame({"item": ["a"], "text": ["b"]}))
    assert str(error.value) == (
        "check_items: no column 'group'; an items frame has item, text and group"
    )
    with pytest.raises(InputError) as error:
        check_items(frame([]))
    assert str(error.value) == "check_items: there are no items"


# --- hashing and cutting -------------------------------------------------------------------------


def test_the_items_hash_follows_order_text_and_group():
    items = frame(["one", "two"])
    assert items_hash(items) == items_hash(items.assign(year=1900))
    for other in (
        items.iloc[::-1],
        items.assign(text=["one", "twO"]),
        items.assign(group=["seen", "unseen"]),
        items.assign(item=["i0", "i2"]),
        frame(["onetwo", ""]),
    ):
        assert items_hash(other) != items_hash(items)


def test_cut_items_by_hand():
    items = frame(["1 2 3 4", "5 6", "7 8 9"])
    with pytest.warns(UserWarning) as told:
        tokens, kept = cut_items(reciter(), items, 3, asker="probe_x")
    assert tokens.tolist() == [[1, 2, 3], [7, 8, 9]]
    assert kept["item"].to_list() == ["i0", "i2"] and kept.attrs["dropped"] == 1
    assert str(told[0].message) == (
        "probe_x: dropped 1 of 3 texts that are shorter than 3 tokens (first: i1)"
    )


def test_cut_items_is_silent_when_nothing_is_dropped(recwarn):
    _, kept = cut_items(reciter(), frame(["1 2 3", "4 5 6"]), 3, asker="probe_x")
    assert kept.attrs["dropped"] == 0 and not len(recwarn)


def test_cut_items_refusals():
    with pytest.raises(InputError) as error:
        cut_items(reciter(), frame(["1 2", "3 4 5"]), 4, asker="probe_x")
    assert str(error.value) == (
        "probe_x: none of 2 texts has the 4 tokens asked for (the longest has 3); ask for fewer, "
        "or give longer texts"
    )
    with pytest.raises(InputError) as error:
        cut_items(reciter(), frame(["1 2"]), 65, asker="probe_x")
    assert str(error.value) == (
        "probe_x: 65 tokens are more than the model's context of 64; ask for fewer"
    )


# --- making --------------------------------------------------------------------------------------


def test_canaries_are_their_tokens():
    tokenizer = byte_level_tokenizer(ENGLISH * 3, vocabulary=400)
    made = make_canaries(tokenizer, 20, length=9, seed=1)
    assert made == make_canaries(tokenizer, 20, length=9, seed=1)
    assert made != make_canaries(tokenizer, 20, length=9, seed=2)
    assert len(set(made)) == 20
    for text in made:
        assert len(tokenizer(text)["input_ids"]) == 9
        assert re.fullmatch("( [A-Za-z]+){9}", text)


def test_biographies_are_distinct_and_repeatable():
    made = make_biographies(200, seed=4)
    assert made == make_biographies(200, seed=4) and len(set(made)) == 200
    assert set(made).isdisjoint(make_biographies(200, seed=5))
    assert all(text.startswith(" ") and " was born in " in text for text in made)


def test_controls_are_as_long_as_what_they_control_for():
    texts = ["short", "x" * 300, ""]
    made = make_controls(texts, seed=0)
    assert made == make_controls(texts, seed=0)
    assert [len(m) >= max(1, len(t)) for m, t in zip(made, texts, strict=True)] == [True] * 3
    assert len(np.unique(make_controls(["a sentence"] * 50, seed=0))) > 45
