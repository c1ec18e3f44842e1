"""Windows slid along a text; heat, shares and runs made of them."""

import math
import re

import numpy as np
import pandas as pd
import pytest

from tests.conftest import Numbers, bigram, reciter
from workbench.decoding import Decoding
from workbench.models import LanguageModel
from workbench.plots import plot_discoverable, plot_scan
from workbench.probes.scan import add_passages, forecast_scan, probe_scan, read_text, windows
from workbench.stats.discoverable import discoverable
from workbench.stats.scan import longest_runs, merge, scan_heat, scan_shares
from workbench.stats.summarise import wilson_interval
from workbench.table import InputError, rows


class Words(Numbers):
    """Numbers that know where in the text they stand."""

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        if not return_offsets_mapping:
            return super().__call__(text)
        found = list(re.finditer(r"\d+", text))
        return {
            "input_ids": [int(each.group()) for each in found],
            "offset_mapping": [each.span() for each in found],
        }


def counter(breaks=()):
    model = reciter(breaks)
    model.tokenizer = Words()
    return model


SMALL = {"prefix": 2, "suffix": 3, "stride": 2, "decoding": Decoding(top_k=1)}


def values(table, metric):
    return table[table["metric"] == metric].sort_values("position")["value"].to_list()


# --- the probe -------------------------------------------------------------------------------------


def test_windows_by_hand():
    got = windows(np.arange(10), 5, 2)
    assert got.tolist() == [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [4, 5, 6, 7, 8]]
    assert windows(np.arange(5), 5, 3).tolist() == [[0, 1, 2, 3, 4]]
    whole = np.arange(10)
    assert np.shares_memory(windows(whole, 5, 1), whole)  # a view, however long the text


def test_scan_by_hand():
    # counts upwards. Windows of 2 + 3 at every second token of 1 2 3 4 5 6 9 10 11 12:
    # 1 2 | 3 4 5 all right; 3 4 | 5 6 9 two; 5 6 | 9 10 11 none before the first miss
    text = "1 2 3 4 5 6 9 10 11 12"
    table = probe_scan(counter(), text, name="book", **SMALL)
    assert values(table, "verbatim_length") == [3, 2, 0]
    assert values(table, "log_p_z") == [0, -math.inf, -math.inf]  # top-k 1 says one thing only
    assert sorted(set(table["position"])) == [2, 4, 6]
    assert set(table["kind"]) == {"book"} and set(table["group"]) == {"seen"}
    assert {str(s) for s in table[table["metric"] == "log_p_z"]["scheme"]} == {"top-k 1"}
    assert {
        (p, s, t) for p, s, t in zip(table["prefix"], table["suffix"], table["stride"], strict=True)
    } == {(2, 3, 2)}
    # under T = 1 a hit costs ln(1 + 31 e^-5) and a miss 5 more
    hit = -math.log(1 + 31 * math.exp(-5))
    plain = probe_scan(counter(), text, **(SMALL | {"decoding": Decoding()}))
    np.testing.assert_allclose(
        values(plain, "log_p_z"), [3 * hit, 3 * hit - 5, 3 * hit - 5], atol=1e-5
    )


def test_a_scan_is_its_windows_one_at_a_time(tiny):
    checkpoints = tiny.suite.checkpoints("base")
    last = checkpoints.select(checkpoints.steps[-2:])
    text = " ".join(tiny.suite.items()["text"][:6])
    table = probe_scan(last, text, prefix=7, suffix=5, stride=3, decoding=Decoding(top_k=300))
    for step in last.steps:
        model = checkpoints.at(step)
        tokens = model.encode([text])[0]
        mine = table[(table["step"] == step)].pivot(
            index="position", columns="metric", values="value"
        )
        assert mine.index.to_list() == list(range(7, len(tokens) - 4, 3)) and len(mine) == 30
        for at, row in list(mine.iterrows())[::6]:
            window = tokens[at - 7 : at + 5]
            scores = model.score([window], start=7, schemes=[Decoding(top_k=300)])
            want = scores.under_scheme.sum()
            assert row["log_p_z"] == pytest.approx(want, abs=1e-4)
            said = model.generate(window[None, :7], 5)[0]
            assert row["verbatim_length"] == (said == window[7:]).cumprod().sum()
    assert np.isneginf(table["value"]).any() and (table["value"] > -100).any()


def test_a_file_is_read(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("\ufeff1 2 3 4 5 6", encoding="utf-8")
    assert read_text(file) == "1 2 3 4 5 6"
    there = probe_scan(counter(), file, **SMALL)
    assert there.equals(probe_scan(counter(), "1 2 3 4 5 6", **SMALL))


def test_what_read_text_refuses(tmp_path):
    blank, latin = tmp_path / "blank.txt", tmp_path / "latin.txt"
    blank.write_text(" \n")
    latin.write_bytes("caf\xe9".encode("latin-1"))
    for path, message in (
        (tmp_path / "no.txt", f"read_text: no file at {tmp_path / 'no.txt'}"),
        (blank, f"read_text: {blank} holds no text"),
        (latin, f"read_text: {latin} is not UTF-8 text (unexpected end of data)"),
    ):
        with pytest.raises(InputError) as error:
            read_text(path)
        assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("1 2 3", {"stride": 0}, "probe_scan: stride is 0, but must be at least 1"),
        ("1 2 3", {"prefix": 0}, "probe_scan: prefix is 0, but must be at least 1"),
        (
            "1 2 3 4",
            {},
            "probe_scan: the text has 4 tokens, one window needs 5; give a longer text or shorter "
            "windows",
        ),
        (
            "1 2 3",
            {"prefix": 60, "suffix": 5},
            "probe_scan: 65 tokens are more than the model's context of 64; ask for fewer",
        ),
    ],
)
def test_scan_refusals(text, options, message):
    with pytest.raises(InputError) as error:
        probe_scan(counter(), text, **(SMALL | options))
    assert str(error.value) == message


def test_a_model_that_gives_nan_is_refused():
    with pytest.raises(InputError, match=r"^probe_scan: log_probability is nan for item number 0"):
        probe_scan(bigram(np.full((32, 32), np.nan)), "1 2 3 4 5", **SMALL)


def test_forecast_counts_windows_and_tokens():
    said = forecast_scan(counter(), " ".join(["1 2 3 4 5"] * 4), prefix=2, suffix=3, stride=2)
    # starts 0, 2, ..., 14 of 20 tokens
    assert said.startswith("8 windows of 2 + 3 tokens, 40 tokens in all: about ")
    assert said.endswith(" a checkpoint on cpu")


def test_passages_are_cut_from_the_text_itself():
    text = "1  2 3,\n4 55 6"
    where = pd.DataFrame({"position": [1.0, 3.0, np.nan], "tokens": [2, 3, 0]})
    got = add_passages(counter(), text, where)
    assert got["passage"].to_list() == ["2 3", "4 55 6", ""]
    assert got["characters"].to_list() == [3, 6, 0]
    with pytest.raises(InputError) as error:
        add_passages(counter(), text, where.assign(position=4))
    assert str(error.value) == (
        "add_passages: tokens 4 to 7 lie beyond the text's 6; give the text that was scanned"
    )
    with pytest.raises(InputError) as error:
        add_passages(counter(), text, where.drop(columns="tokens"))
    assert str(error.value) == "add_passages: no column 'tokens'; there are position"


def test_passages_of_a_real_tokenizer(tiny):
    model = tiny.suite.checkpoints("base").at(0)
    text = " ".join(tiny.suite.items()["text"][:3])
    tokens, spans = model.encode_spans(text)
    np.testing.assert_array_equal(tokens, model.encode([text])[0])
    where = pd.DataFrame({"position": [0, 5, len(tokens) - 4], "tokens": [len(tokens), 9, 4]})
    got = add_passages(model, text, where)["passage"]
    assert got[0] == text and got[1] == model.decode(tokens[5:14])
    assert text.endswith(got[2]) and spans[-1, 1] == len(text)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow(Numbers):
        def __call__(self, text, **options):
            raise NotImplementedError

    model = LanguageModel(counter().module, Slow(), run="slow")
    with pytest.raises(InputError) as error:
        model.encode_spans("1 2")
    assert str(error.value) == (
        "encode_spans: the tokenizer of slow (Slow) does not say where its tokens lie in a text; "
        "load its fast version"
    )


# --- statistics ------------------------------------------------------------------------------------


def scan(p_z, verbatim=None, *, stride=2, suffix=4, prefix=3, kind="book", first=3, **beside):
    """A scan as the probe makes it, with these p_z."""
    position = first + stride * np.arange(len(p_z))
    items = [f"{kind} {at}" for at in position]
    where = {"prefix": prefix, "suffix": suffix, "stride": stride, "kind": kind}
    where |= {"position": position} | beside
    with np.errstate(divide="ignore"):
        value = np.log(np.asarray(p_z, dtype=float))
    one = rows("log_p_z", value, run="r", item=items, beside=where | {"scheme": "s"})
    if verbatim is None:
        return one
    two = rows("verbatim_length", verbatim, run="r", item=items, beside=where | {"scheme": ""})
    return pd.concat([one, two], ignore_index=True)


def test_heat_by_hand():
    # suffixes 3-7, 5-9, 7-11 (last token not included): cells 3-5, 5-7, 7-9, 9-11 are covered by
    # the first; first and second; second and third; third
    got = scan_heat(scan([0.5, 0.1, 0.2]).sample(frac=1, random_state=0))
    wide = got.pivot(index="position", columns="pooled", values="value")
    assert wide.index.to_list() == [3, 5, 7, 9]
    np.testing.assert_allclose(wide["max"], [0.5, 0.5, 0.2, 0.2])
    np.testing.assert_allclose(wide["mean"], [0.5, 0.3, 0.15, 0.2])
    one = got[got["pooled"] == "mean"].sort_values("position")
    np.testing.assert_allclose(one["lo"], [0.5, 0.1, 0.1, 0.2])
    np.testing.assert_allclose(one["hi"], [0.5, 0.5, 0.2, 0.2])
    assert one["n"].to_list() == [1, 2, 2, 1] and set(one["tokens"]) == {2}


def test_heat_of_windows_that_lie_apart():
    # suffixes 3-5 and 8-10: nothing covers 5-8
    got = scan_heat(scan([0.5, 0], stride=5, suffix=2))
    got = got[got["pooled"] == "max"]
    assert got["position"].to_list() == [3, 8] and got["tokens"].to_list() == [2, 2]
    assert got["value"].to_list() == [pytest.approx(0.5), 0]


@pytest.mark.parametrize(("stride", "suffix"), [(1, 1), (1, 5), (2, 5), (3, 4), (5, 3), (4, 4)])
def test_heat_is_a_loop_over_tokens(stride, suffix):
    p_z = np.random.default_rng(0).random(12) ** 3
    position = 3 + stride * np.arange(12)
    got = scan_heat(scan(p_z, stride=stride, suffix=suffix))
    for pooled, pool in (("max", max), ("mean", np.mean)):
        cells = got[got["pooled"] == pooled]
        found = {
            at: row.value
            for row in cells.itertuples()
            for at in range(row.position, row.position + row.tokens)
        }
        want = {}
        for at in range(3, position[-1] + suffix):
            over = [p for p, b in zip(p_z, position, strict=True) if b <= at < b + suffix]
            if over:
                want[at] = pool(over)
        assert found == pytest.approx(want)


def test_texts_are_kept_apart():
    both = pd.concat([scan([0.5, 0.1]), scan([0.9], kind="other", first=5)], ignore_index=True)
    got = scan_heat(both)
    assert got[got["kind"] == "other"]["value"].tolist() == pytest.approx([0.9, 0.9])
    runs = longest_runs(
        pd.concat([scan([0.5, 0.1], [4, 0]), scan([0.9], [1], kind="other")]), threshold=0.5
    )
    assert runs.pivot(index="kind", columns="metric", values="value").to_dict() == {
        "near_verbatim_run": {"book": 4, "other": 4},
        "verbatim_run": {"book": 4, "other": 1},
    }


def test_shares_by_hand():
    # eight windows of 3 + 4 tokens, 2 apart: as good as 16/7 beside each other
    p_z = [0.5, 0.5, 0.1, 0.01, 0, 0, 0, 0]
    got = scan_shares(scan(p_z), thresholds=[0.001, 0.1, 0.5, 0.51]).set_index("p")
    assert got["value"].to_list() == [0.5, 0.375, 0.25, 0]
    low, high = wilson_interval(np.array([0.375]), np.array([16 / 7]), 0.95)
    assert (got.loc[0.1, "lo"], got.loc[0.1, "hi"]) == pytest.approx((low[0], high[0]))
    assert set(got["n"]) == {8} and set(got["tries"]) == {1}
    # windows with gaps between them are each their own
    got = scan_shares(scan(p_z, stride=20), thresholds=[0.1])
    assert got["hi"].item() == pytest.approx(
        wilson_interval(np.array([0.375]), np.array([8]), 0.95)[1][0]
    )
    # the same numbers as discoverable gives for one sample
    one = discoverable(scan(p_z).drop(columns="position"), n=[1], p=[0.1, 0.5])
    assert one["value"].to_list() == [0.375, 0.25]


def test_merge_by_hand():
    # 0-3 and 2-4 overlap, 4-5 touches, 7-9 lies apart and holds 7-8
    begin, end = merge(np.array([0, 2, 4, 7, 7]), np.array([3, 4, 5, 9, 8]))
    assert begin.tolist() == [0, 7] and end.tolist() == [5, 9]
    assert [each.tolist() for each in merge(np.array([], int), np.array([], int))] == [[], []]


def test_runs_by_hand():
    # suffixes of 4 from 3 on, 2 apart. At .5: windows at 3, 7 (touch: 3-11), 15, 17 (15-21).
    # Word for word: 3 + 4 = 7, 5 + 1, 7 + 4 = 11, 9 + 0, 11 + 2 = 13, 13 + 0, 15 + 4, 17 + 3 = 20:
    # 3-13 and 15-20, since 13 + 0 does not reach 15
    p_z = [0.5, 0, 0.6, 0.1, 0, 0, 0.9, 0.7]
    got = longest_runs(scan(p_z, [4, 1, 4, 0, 2, 0, 4, 3]), threshold=0.5, top=2)
    near = got[got["metric"] == "near_verbatim_run"].sort_values("place")
    assert near["value"].to_list() == [8, 6] and near["position"].to_list() == [3, 15]
    exact = got[got["metric"] == "verbatim_run"].sort_values("place")
    assert exact["value"].to_list() == [10, 5] and exact["position"].to_list() == [3, 15]
    assert set(near["p"]) == {0.5} and exact["p"].isna().all()
    assert got["n"].to_list() == [8] * 4 and got["lo"].isna().all()
    # a threshold that no window reaches: 0, nowhere; and one that two runs of one length reach
    none = longest_runs(scan([0.4], [0]), threshold=0.5)
    assert none["value"].to_list() == [0, 0] and none["position"].isna().all()
    tie = longest_runs(scan([1, 0, 0, 1], [0, 0, 0, 0]), top=5)
    tie = tie[tie["metric"] == "near_verbatim_run"]
    assert tie["position"].to_list() == [3, 9] and tie["place"].to_list() == [1, 2]


def test_a_verbatim_run_is_what_greedy_decoding_says():
    # counts upwards but says 0 after 15: from 1 2 on it says up to 15, one token a step; the scan's
    # run starts where the first prompt ends
    model, text = counter(breaks={15}), " ".join(map(str, range(1, 25)))
    runs = longest_runs(probe_scan(model, text, **(SMALL | {"stride": 3})), top=2)
    exact = runs[runs["metric"] == "verbatim_run"]
    said = model.generate(np.array([[1, 2]]), 22)[0]
    agree = (said == np.arange(3, 25)).cumprod().sum()
    assert exact["value"].iloc[0] == agree == 13 and exact["position"].iloc[0] == 2
    # after 15 the model knows the way again, from a prompt that ends in 17 (window 15 16 | begins
    # at token 14 and is wrong at once: 16 after 15)
    assert exact["value"].iloc[1] == 6 and exact["position"].iloc[1] == 17
    assert add_passages(model, text, exact)["passage"].iloc[1] == "18 19 20 21 22 23"


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: scan_heat(scan([0.5]).drop(columns="position")),
            "scan_heat: no column 'position'; give the table that probe_scan made",
        ),
        (
            lambda: longest_runs(scan([0.5])),
            "longest_runs: no rows of verbatim_length; give the table that probe_scan made",
        ),
        (
            lambda: longest_runs(scan([0.5], [1]), threshold=0),
            "longest_runs: threshold is 0, it must lie above 0 and up to 1",
        ),
        (
            lambda: longest_runs(scan([0.5], [1]), top=0),
            "longest_runs: top is 0, it must be at least 1",
        ),
        (
            lambda: scan_shares(scan([0.5]), thresholds=[0.5, 2]),
            "scan_shares: thresholds [0.5, 2] must lie above 0 and up to 1",
        ),
    ],
)
def test_statistics_refuse(ask, message):
    with pytest.raises(InputError) as error:
        ask()
    assert str(error.value) == message


# --- figures ---------------------------------------------------------------------------------------


def test_plot_scan_draws_cells_gaps_and_runs():
    scans = pd.concat(
        [
            scan([0.5, 0], [2, 0], stride=5, suffix=2),
            scan([1e-3], [0], stride=5, suffix=2, kind="<i>x</i>"),
        ]
    )
    heat = scan_heat(scans)
    heat = heat[heat["pooled"] == "max"].assign(passage="<b>said</b>")
    figure = plot_scan(heat, longest_runs(scans), title="t")
    other, book = figure.data[:2]
    # the first text lies on top; cells 3-5 and 8-10, nothing between
    assert list(book.x) == [3, 5, 8, 10] and list(book.y) == [0.7, 1.3]
    np.testing.assert_allclose(book.z, [[np.log10(0.5), np.nan, -6]], atol=1e-3)
    np.testing.assert_allclose(other.z, [[-3]])
    assert list(figure.layout.yaxis.ticktext) == ["&lt;i&gt;x&lt;/i&gt;", "book"]
    assert book.customdata[0][0] == "p<sub>z</sub> = 0.5, from 1 windows<br>&lt;b&gt;said&lt;/b&gt;"
    near, exact = figure.data[2:]
    assert list(near.x) == [3, 5] and list(exact.x) == [3, 5]
    assert near.name == "longest near-verbatim run (p<sub>z</sub> ≥ 0.5)"
    assert exact.name == "longest verbatim run" and exact.y[0] > near.y[0] > 1
    with pytest.raises(InputError) as error:
        plot_scan(scan_heat(scans))
    assert str(error.value) == (
        "plot_scan: several rows per (kind, position); select one step, scheme and pooled"
    )


def test_plot_discoverable_draws_shares_and_greedy():
    table = pd.concat(
        [
            rows("log_p_z", [0.0, -np.inf], run="r", item=["a", "b"], beside={"scheme": "greedy"}),
            rows(
                "log_p_z", np.log([0.5, 0.05]), run="r", item=["a", "b"], beside={"scheme": "T=1"}
            ),
        ]
    )
    shares = discoverable(table, n=[1, 10, 100], p=[0.5, 0.9])
    figure = plot_discoverable(shares)
    greedy = [t for t in figure.data if t.name == "greedy"]
    assert [list(t.y) for t in greedy] == [[0.5] * 3] * 2 and greedy[0].mode == "lines"
    plain = [t for t in figure.data if t.name == "T=1"]
    # .5: one sample gives a with .5, a hundred b; .9: ten give a, a hundred b (1 - .95^100 = .994)
    assert [list(t.y) for t in plain] == [[0.5, 0.5, 1], [0, 0.5, 1]]
    assert [t.showlegend for t in plain] == [True, False]
    bands = [t for t in figure.data if t.fill == "toself"]
    assert len(bands) == 2  # T = 1 in both panels, none for greedy
    many = pd.concat([table.head(2).assign(scheme=f"{s}") for s in range(4)])
    assert not [t for t in plot_discoverable(discoverable(many, n=[1, 2])).data if t.fill]
    with pytest.raises(InputError) as error:
        plot_discoverable(pd.concat([shares, shares.assign(group="other")]))
    assert str(error.value) == (
        "plot_discoverable: several rows per (tries, p, scheme); select one group or scheme"
    )
    with pytest.raises(InputError) as error:
        plot_discoverable(shares, color="dose")
    assert str(error.value).startswith("plot_discoverable: the rows have no column 'dose'; ")
