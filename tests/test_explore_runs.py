"""The explorer of reports over folders written by hand: what is chosen, drawn, left out and said."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from tests.test_site import write_report
from workbench import (
    explore_runs,
    plot_curve,
    plot_key_numbers,
    publish,
    report_curves,
    report_numbers,
)
from workbench.site import COMBINED
from workbench.table import PASSPORT_KEY, InputError, rows, save, validate

SECONDS = 60


def curve(*values: float, group="seen", **beside) -> pd.DataFrame:
    steps = np.arange(1, len(values) + 1) * 10
    return rows("auc", values, run="r", step=steps, group=group, n=5, beside=beside or None)


@pytest.fixture
def folder(tmp_path):
    """Three reports of one notebook that are ok, one of each kind that is not, and a lone table."""
    out = tmp_path / "reports"
    for seed in range(3):
        table = pd.concat([curve(0.5, 0.6 + seed / 10), curve(0.5, 0.4, group="unseen")])
        write_report(
            out, f"demo.seed={seed}", value=0.6 + seed / 10, table=validate(table),
            parameters={"seed": seed},
        )  # fmt: skip
    write_report(out, "other", "other", value=0.5)
    failed = write_report(out, "sad", status="failed", error="cell 3: no memory")
    (failed / "report.html").write_text("a report")
    (write_report(out, "torn", value=0.5) / "status.json").write_text("{")
    old = write_report(out, "old", value=0.5)
    other_version(old / "table.parquet")
    save(validate(curve(0.5, 0.9)), out / "recorded.parquet")
    return out


def other_version(path) -> None:
    table = pq.read_table(path)
    note = json.loads(table.schema.metadata[PASSPORT_KEY]) | {"version": -1}
    pq.write_table(table.replace_schema_metadata({PASSPORT_KEY: json.dumps(note)}), path)


def same(figure, other) -> bool:
    return json.loads(figure.to_json()) == json.loads(other.to_json())


def lines(view, name="curves") -> list[str]:
    return [trace.name for trace in view.figures[name].data if trace.name]


def test_all_that_can_be_read_is_laid_over_one_another(folder):
    each = explore_runs(folder).wait(SECONDS)
    assert each.message == ""
    names = [f"demo.seed={seed}" for seed in range(3)]
    numbers = report_numbers(folder, [*names, "other"])
    assert numbers["value"].tolist() == [0.6, 0.7, 0.8, 0.5]
    assert numbers["lo"].tolist() == pytest.approx([0.5, 0.6, 0.7, 0.4])
    assert same(each.view.figures["numbers"], plot_key_numbers(numbers, title="Key numbers"))
    both = [*names, "other", "recorded"]  # of other a point, at its one step
    curves = report_curves(folder, both, metric="auc", x="step")
    figure = plot_curve(curves, x="step", color="line", title="membership AUC, by report")
    assert same(each.view.figures["curves"], figure)
    # the runs' one group of a lone table needs no telling; both groups of a report do
    last = curves[curves["step"] == 20].set_index("line")["value"]
    assert last.to_dict() == pytest.approx(
        {f"{name}, group={group}": value for name, high in zip(names, (0.6, 0.7, 0.8), strict=True)
         for group, value in (("seen", high), ("unseen", 0.4))}
        | {"recorded, group=seen": 0.9}
    )  # fmt: skip


def test_what_cannot_be_read_is_named_with_its_reason(folder):
    words = explore_runs(folder).wait(SECONDS).view.words
    assert "5 of the 8 reports asked for can be shown." in words
    assert "✗ sad is failed: cell 3: no memory" in words
    assert "✗ torn is broken: status.json cannot be used:" in words
    assert "✗ old is broken: load: " in words
    assert "layout version -1, this is" in words


def test_the_code_makes_the_same_figures(folder):
    each = explore_runs(folder).wait(SECONDS)
    each.set(find="seed=", lines="group=seen", log=True)
    each.wait(SECONDS)
    made = {}
    exec(each.code, made)
    assert set(made["figures"]) == set(each.view.figures) == {"numbers", "curves"}
    for name, figure in made["figures"].items():
        assert same(figure, each.view.figures[name])
    assert lines(each.view) == [f"demo.seed={seed}, group=seen" for seed in range(3)]
    assert each.view.figures["curves"].layout.xaxis.type == "log"
    assert "logarithmic axis" not in each.view.words  # the steps are 10 and 20
    each.set(find="", lines="")  # the report other has its one point at step 0
    words = each.wait(SECONDS).view.words
    assert "What lies at 0 or below has no place on a logarithmic axis." in words


def test_words_notebook_and_marks_narrow_the_choice(folder):
    each = explore_runs(folder).wait(SECONDS)
    for chosen, reports in (
        ({"find": "SEED=1 ok"}, {"demo.seed=1"}),
        ({"find": "", "notebook": "other"}, {"other"}),
        ({"notebook": "all", "reports": ("demo.seed=0", "demo.seed=2")},
         {"demo.seed=0", "demo.seed=2"}),
    ):  # fmt: skip
        each.set(**chosen)
        each.wait(SECONDS)
        assert each.message == ""
        assert {trace.name for trace in each.view.figures["numbers"].data} == reports


def test_an_empty_choice_says_so_and_keeps_the_figures(folder):
    each = explore_runs(folder).wait(SECONDS)
    before = each.view
    each.set(find="nowhere")
    each.wait(SECONDS)
    assert each.message == (
        "explore_runs: none of 8 reports fits; the last figure is kept, ask for less in find, "
        "notebook or reports"
    )
    assert each.view is before
    each.set(find="", reports=("sad",))
    each.wait(SECONDS)
    assert each.message == (
        "explore_runs: none of the 1 reports asked for can be shown "
        "(sad is failed: cell 3: no memory)"
    )
    each.set(reports=(), lines="group=nobody")
    each.wait(SECONDS)
    assert each.message.startswith(
        "report_curves: no line of auc over step holds 'group=nobody'; there are demo.seed=0, "
    )
    each.set(lines="")
    assert each.wait(SECONDS).message == ""


def test_a_report_that_came_or_went_is_seen_when_asked(folder):
    each = explore_runs(folder).wait(SECONDS)
    (folder / "demo.seed=0" / "status.json").unlink()
    write_report(folder, "demo.seed=3", value=0.9, parameters={"seed": 3})
    each.set(find="seed=3")
    assert each.wait(SECONDS).message.startswith("explore_runs: none of 8 reports fits")
    each.set(again=True, find="demo.seed=")
    words = each.wait(SECONDS).view.words
    assert "3 of the 4 reports" in words
    assert "✗ demo.seed=0 is broken: status.json cannot be used: it is missing" in words
    names = {trace.name for trace in each.view.figures["numbers"].data}
    assert names == {"demo.seed=1", "demo.seed=2", "demo.seed=3"}


def test_numbers_that_follow_from_x_tell_no_lines_apart(tmp_path):
    # the lag is the step less 5: with it in the name each point would be a line of its own
    steps = np.array([10, 20, 30])
    for name in ("a", "b"):
        table = rows(
            "auc", [0.5, 0.6, 0.7], run="r", step=steps, beside={"lag": steps - 5, "dose": 4}
        )
        save(validate(table), tmp_path / f"{name}.parquet")
    assert set(report_curves(tmp_path, ["a", "b"], metric="auc", x="step")["line"]) == {"a", "b"}
    both = explore_runs(tmp_path).wait(SECONDS)
    assert list(both.controls["x"].options) == [
        "step", "lag"
    ]  # fmt: skip
    assert list(both.view.figures) == ["curves"]


def test_more_lines_than_an_eye_follows_are_said(tmp_path):
    parts = [curve(0.5, 0.6, group=f"g{n}") for n in range(20)]
    for name in ("a", "b"):
        save(validate(pd.concat(parts)), tmp_path / f"{name}.parquet")
    each = explore_runs(tmp_path).wait(SECONDS)
    assert len(lines(each.view)) == 8
    assert sum(name.startswith("b, ") for name in lines(each.view)) == 4
    assert "32 lines are not drawn" in each.view.words


def test_no_folder_and_an_empty_one_are_said_in_one_line(tmp_path):
    each = explore_runs(tmp_path / "none").wait(SECONDS)
    assert each.message == (
        f"explore_runs: no folder {tmp_path / 'none'}; give one that holds reports"
    )
    each = explore_runs(tmp_path).wait(SECONDS)
    assert each.message.startswith(f"explore_runs: {tmp_path} holds no reports; make one with")
    write_report(tmp_path, "first", value=0.5)
    each.set(again=True)
    assert each.wait(SECONDS).message == ""


def test_reports_that_cannot_be_had_are_refused_by_name(folder):
    with pytest.raises(InputError, match="report_numbers: no report 'gone' in "):
        report_numbers(folder, ["gone"])
    with pytest.raises(InputError, match="report_numbers: sad is failed: cell 3: no memory"):
        report_numbers(folder, ["sad"])
    with pytest.raises(InputError, match="no pooled rows of auc over lag in the tables given"):
        report_curves(folder, ["demo.seed=0"], metric="auc", x="lag")


def test_a_folder_of_fifty_reports(tmp_path):
    for seed in range(50):
        write_report(tmp_path, f"demo.seed={seed}", value=0.5, parameters={"seed": seed})
    each = explore_runs(tmp_path).wait(SECONDS)
    assert len(each.view.figures["numbers"].data) == 40
    assert "Key numbers of 10 reports are not drawn." in each.view.words
    assert {"description", "tooltip"} <= set(each.controls["find"].keys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda n: n.drop(columns="lo"), "the numbers have no column 'lo'; report, label, value"),
        (lambda n: n[:0], "0 key numbers, a page shows 1 to 12; select some"),
        (lambda n: pd.concat([n, n]), "a report has one key number twice; select one"),
    ],
)
def test_a_figure_of_key_numbers_refuses(folder, change, said):
    with pytest.raises(InputError, match=f"plot_key_numbers: {said}"):
        plot_key_numbers(change(report_numbers(folder, ["other"])))


def test_every_control_is_described(folder):
    each = explore_runs(folder).wait(SECONDS)
    for control in each.controls.values():
        assert control.description and control.tooltip


def test_a_table_that_is_gone_meanwhile_is_said_and_drawn_no_more(tmp_path):
    for name in ("a", "b"):
        save(validate(curve(0.5, 0.6)), tmp_path / f"{name}.parquet")
    each = explore_runs(tmp_path).wait(SECONDS)
    assert lines(each.view) == ["a", "b"]
    (tmp_path / "a.parquet").unlink()
    each.set(log=True)
    assert lines(each.wait(SECONDS).view) == ["b"]
    assert "✗ a is broken: its table is gone; read again" in each.view.words


def test_a_name_of_a_line_keeps_all_digits_and_is_no_mark_up(tmp_path):
    # a count that one table lacks becomes a float: 1000001 and 1000002 must stay two lines
    parts = [
        curve(0.5, 0.6, group="<b>g", position=at) for at in (1_000_001, 1_000_002)
    ]  # fmt: skip
    save(validate(pd.concat(parts)), tmp_path / "a.parquet")
    save(validate(curve(0.4, 0.5)), tmp_path / "b.parquet")
    each = explore_runs(tmp_path).wait(SECONDS)
    assert each.message == ""
    assert lines(each.view) == [
        "a, group=&lt;b&gt;g, position=1000001",
        "a, group=&lt;b&gt;g, position=1000002",
        "b, group=seen",
    ]


def test_the_figure_of_key_numbers_by_hand():
    # two numbers of two reports; the second report lacks the second number
    numbers = pd.DataFrame(
        [
            ["r<1>", "AUC", 0.75, 0.5, 0.875, "7", "", "auc"],
            ["r2", "AUC", 0.25, 0.125, 0.5, "9", "", "auc"],
            ["r<1>", "a price that is long enough for <two> lines", 3.0, 2.0, 5.0, "7",
             "nats", "perplexity"],
        ],
        columns=["report", "label", "value", "lo", "hi", "n", "unit", "metric"],
    )  # fmt: skip
    figure = plot_key_numbers(numbers, title="t")
    drawn = [(t.name, t.xaxis or "x", list(t.x), list(t.y)) for t in figure.data]
    assert drawn == [
        ("r&lt;1&gt;", "x", [0.75], ["r&lt;1&gt;"]), ("r2", "x", [0.25], ["r2"]),
        ("r&lt;1&gt;", "x2", [3.0], ["r&lt;1&gt;"]), ("r2", "x2", [], []),
    ]  # fmt: skip
    first = figure.data[0]
    assert (list(first.error_x.array), list(first.error_x.arrayminus)) == ([0.125], [0.25])
    assert first.customdata.tolist() == [["7"]]
    # beside colours the markers differ, and each report has its name on the axis
    assert [t.marker.symbol for t in figure.data] == ["circle", "square"] * 2
    assert [t.marker.color for t in figure.data] == ["#0072B2", "#D55E00"] * 2
    assert list(figure.layout.yaxis.categoryarray) == ["r2", "r&lt;1&gt;"]  # the first on top
    assert figure.layout.xaxis.range == (-0.04, 1.04) and figure.layout.xaxis2.range is None
    assert figure.layout.xaxis2.title.text == "nats"
    chance = [(s.xref, s.x0, s.x1) for s in figure.layout.shapes]
    assert chance == [("x", 0.5, 0.5)]  # of the AUC; a perplexity has none
    assert [a.text for a in figure.layout.annotations] == [
        "AUC", "a price that is long enough<br>for &lt;two&gt; lines"
    ]  # fmt: skip


def test_key_numbers_stand_three_beside_one_another():
    named = pd.DataFrame({"label": list("abcd"), "value": [1.0, 2.0, 3.0, 4.0], "report": "r"})
    numbers = named.assign(lo=0.0, hi=9.0, n="1", unit="nats", metric="perplexity")
    figure = plot_key_numbers(numbers)
    assert [trace.xaxis for trace in figure.data] == ["x", "x2", "x3", "x4"]
    assert figure.layout.xaxis4.domain[0] == figure.layout.xaxis.domain[0]
    assert figure.layout.yaxis4.domain[1] < figure.layout.yaxis.domain[0]
    thirteen = pd.concat([numbers[:1].assign(label=f"{n}") for n in range(13)])
    with pytest.raises(InputError, match="plot_key_numbers: 13 key numbers, a page shows 1 to 12"):
        plot_key_numbers(thirteen)


def test_long_lines_are_thinned_evenly_and_keep_their_ends(tmp_path):
    steps = np.arange(1, 10_002)
    values = np.linspace(0.2, 0.8, len(steps))
    parts = [
        rows("auc", values, run="r", step=steps, group="long", n=5),
        curve(0.5, 0.6, group="short"),
    ]
    save(validate(pd.concat(parts)), tmp_path / "much.parquet")
    got = report_curves(tmp_path, ["much"], metric="auc", x="step")
    long, short = (got[got["group"] == name] for name in ("long", "short"))
    assert len(long) == 500 and len(short) == 2 and got.attrs["points"] == 10_003
    assert long["step"].iloc[0] == 1 and long["step"].iloc[-1] == 10_001
    assert set(np.diff(long["step"])) == {20, 21}  # of 10,000 steps each 20.04th
    each = explore_runs(tmp_path).wait(SECONDS)
    assert "502 of 10,003 points are drawn, evenly along each line." in each.view.words
    again = each.view.figures["curves"]
    each.set(log=True)
    assert each.wait(SECONDS).message == ""
    assert same(again.update_xaxes(type="log"), each.view.figures["curves"])


def test_a_table_that_changes_meanwhile_is_read_again(tmp_path):
    path = tmp_path / "a.parquet"
    save(validate(curve(0.5, 0.6)), path)
    each = explore_runs(tmp_path).wait(SECONDS)
    save(validate(curve(0.5, 0.6, 0.8)), path)
    each.set(log=True)
    (line,) = [t for t in each.wait(SECONDS).view.figures["curves"].data if t.name == "a"]
    assert list(line.y) == [0.5, 0.6, 0.8]


def test_numbers_are_offered_commonest_first_and_undefined_ones_told(tmp_path):
    undefined = rows("auc", np.nan, run="r", n=0, beside={"reason": "one class"})
    for name, labels in (("a", ["rare", "common"]), ("b", ["common"])):
        made = write_report(tmp_path, name)
        key = {label: rows("auc", 0.6, run="r", n=7) for label in labels}
        publish(curve(0.5, 0.6), key=key | {"none": undefined}, results=made)
    each = explore_runs(tmp_path).wait(SECONDS)
    assert each.controls["number"].options == ("all", "common", "none", "rare")
    for name in "ab":
        assert f"{name}: none is undefined (one class)." in each.view.words
    each.set(number="rare")
    (one,) = each.wait(SECONDS).view.figures["numbers"].data
    assert (one.name, list(one.x)) == ("a", [0.6])
    assert "undefined" not in each.view.words


def test_what_was_chosen_stays_where_it_can(tmp_path):
    for name in ("a", "b"):
        parts = [rows(metric, [0.5, 0.6], run="r", step=[1, 2]) for metric in ("auc", "top1")]
        save(validate(pd.concat(parts)), tmp_path / f"{name}.parquet")
    save(validate(curve(0.5, 0.6)), tmp_path / "c.parquet")
    save(validate(curve(0.5, 0.6)), tmp_path / COMBINED)  # of a site: all of its reports in one
    each = explore_runs(tmp_path).wait(SECONDS)
    assert [name for _, name in each.controls["reports"].options] == ["a", "b", "c"]
    second = each.controls["metric"].options[1][1]
    each.set(metric=second)
    each.wait(SECONDS).set(reports=("b",))
    assert each.wait(SECONDS).controls["metric"].value == second
    save(validate(curve(0.5, 0.6)), tmp_path / "b.parquet")  # a metric that is gone cannot stay
    each.set(log=True)
    assert each.wait(SECONDS).controls["metric"].value == "auc" and not each.message
