"""The report engine on notebooks of a few lines; each kernel costs seconds, so runs are shared."""

import errno
import json
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat import v4

from workbench import engine, page, report
from workbench.parameters import (
    Parameter,
    find_notebooks,
    parse_parameters,
    plain,
    read_notebook,
    read_pairs,
)
from workbench.report import make_plans, publish, run_report, run_reports
from workbench.site import write_site
from workbench.table import InputError, load, rows

EVIL = "<script>window.pwned=1</script><img src=x onerror='window.pwned=2'>"
PARAMETERS = """\
prefix: int = 16  # prompt length, in tokens
rate: float = 0.5
kinds: list[str] = ["verse"]  # what is planted
items: str | None = None  # the user's texts; a file # or none
fast: bool = False
results: str = ""  # folder for the table and key numbers; empty writes none
"""
DEMO = [
    v4.new_markdown_cell(
        "# How *long* is it kept?\n\nWe follow items, as [Lesci et al. (2024)](https://arxiv.org)"
        " do. A minute.\n\n$$\\frac{a}{b}$$\n\nIt costs $5 and $6, not `$x$`, and $y_i$."
    ),
    v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
    v4.new_code_cell(
        "import os, sys\nimport pandas as pd, plotly.graph_objects as go\n"
        "from workbench.report import publish\nfrom workbench.table import rows\n"
        "from tqdm import tqdm\nlist(tqdm([1]))\n"
        "print(sys.executable, os.getcwd())\nprint('a note', file=sys.stderr)"
    ),
    v4.new_code_cell(
        f"evil = {EVIL!r}\nx = list(range(500))\n"
        "go.Figure(go.Scatter(x=x, y=[v / 3 for v in x], text=[evil] * 500, name=evil),"
        " layout={'title': {'text': evil}})"
    ),
    v4.new_code_cell("table = rows('auc', [.6, .7], run=evil, item=['a', 'b'])\ntable"),
    v4.new_code_cell(
        "publish(table, key={'AUC ' + evil: rows('auc', .65, run='r', lo=.6, hi=.7, n=2)},"
        " results=results, passport={'seed': prefix, 'text': evil})"
    ),
]
FAILS = [*DEMO[:2], v4.new_code_cell(f"1 / 0  # {EVIL}"), v4.new_code_cell("'never run'")]
DIES = [*DEMO[:2], v4.new_code_cell("import os\nos._exit(9)")]
REFUSES = [
    *DEMO[:2],
    v4.new_code_cell(
        "from workbench.table import InputError\n"
        "raise InputError('load_model: no folder ./x; check -p model')"
    ),
]


def write_notebook(folder: Path, name: str, cells: list) -> Path:
    path = folder / f"{name}.ipynb"
    nbformat.write(v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Four notebooks, run together, the braces in the path as papermill's trap."""
    folder = tmp_path_factory.mktemp("a {b} c")
    cells = {"demo": DEMO, "fails": FAILS, "dies": DIES, "refuses": REFUSES}
    paths = [write_notebook(folder, name, parts) for name, parts in cells.items()]
    out = folder / "out"
    reports = run_reports(paths, {"prefix": "3"}, out=out, jobs=2)
    return out, {r.name: r for r in reports}


# parameters


def test_parameter_cell_by_hand():
    got = parse_parameters(PARAMETERS, "x.ipynb")
    assert got[0] == Parameter("prefix", int, "int", 16, "prompt length, in tokens")
    assert got[2] == Parameter("kinds", list[str], "list[str]", ["verse"], "what is planted")
    assert got[3].type == (str | None)
    # a second # belongs to the help
    assert got[3].help == "the user's texts; a file # or none"
    assert [p.name for p in got] == ["prefix", "rate", "kinds", "items", "fast", "results"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("x = 3", "not an annotated assignment"),
        ("x: int", "not an annotated assignment"),
        ("x: int = f(2)", "the default is not a literal"),
        (
            "x: dict = {}",
            "the type may be str, int, float, bool, list[...] of these, or X | None",
        ),
    ],
)
def test_parameter_lines_of_another_form_are_named(line, why):
    with pytest.raises(InputError) as caught:
        parse_parameters(f"a: int = 1\n{line}", "x.ipynb")
    assert str(caught.value) == (
        f"report: the parameters of x.ipynb, line 2, have {line!r}; "
        f"needs `name: type = value  # help` ({why})"
    )


def test_default_of_the_wrong_type_is_refused(tmp_path):
    cell = v4.new_code_cell("x: int = 'a'", metadata={"tags": ["parameters"]})
    with pytest.raises(InputError) as caught:
        read_notebook(write_notebook(tmp_path, "n", [cell]))
    assert str(caught.value) == (
        "report: n.ipynb declares x: int with the default 'a', which is not of that type; "
        "correct the notebook"
    )


def test_texts_are_read_as_their_parameters_type(tmp_path):
    notebook = read_notebook(write_notebook(tmp_path, "demo", DEMO))
    given, settled = notebook.check(
        {"prefix": "8", "rate": "1e-3", "kinds": '["a", "1"]', "items": "7", "fast": "Yes"}
    )
    want = {"prefix": 8, "rate": 0.001, "kinds": ["a", "1"], "items": "7", "fast": True}
    assert given == want
    assert settled == want | {"results": ""}
    assert notebook.check({"items": "none", "fast": "no"})[0] == {"items": None, "fast": False}
    assert notebook.check({"rate": 2, "prefix": 4})[0] == {"rate": 2.0, "prefix": 4}
    assert notebook.title == "How long is it kept?"
    assert notebook.description == "We follow items, as Lesci et al. (2024) do."


@pytest.mark.parametrize(
    ("name", "value", "example"),
    [
        ("prefix", "no", "int (prompt length, in tokens), for example -p prefix=16"),
        ("prefix", "1.5", "int (prompt length, in tokens), for example -p prefix=16"),
        ("prefix", True, "int (prompt length, in tokens), for example -p prefix=16"),
        ("rate", "nan", "float, for example -p rate=0.5"),
        ("fast", "maybe", "bool, for example -p fast=false"),
        ("kinds", "verse", 'list[str] (what is planted), for example -p kinds=["verse"]'),
        ("kinds", "[1]", 'list[str] (what is planted), for example -p kinds=["verse"]'),
    ],
)
def test_wrong_types_are_refused(tmp_path, name, value, example):
    notebook = read_notebook(write_notebook(tmp_path, "demo", DEMO))
    with pytest.raises(InputError) as caught:
        notebook.check({name: value})
    assert str(caught.value) == f"report: {name} is {value!r}, but demo needs {example}"


def test_unknown_parameters_are_refused_before_anything_runs(tmp_path):
    path = write_notebook(tmp_path, "demo", DEMO)
    with pytest.raises(InputError) as caught:
        run_report(path, {"prefx": "3"}, out=tmp_path / "out")
    assert str(caught.value) == (
        "report: no parameter 'prefx' in demo; did you mean 'prefix'? "
        "there are prefix, rate, kinds, items, fast"
    )
    with pytest.raises(InputError) as caught:
        run_report(path, {"results": "x"}, out=tmp_path / "out")
    assert str(caught.value) == (
        "report: results is set by the report itself; choose its folder with --out"
    )
    assert not (tmp_path / "out").exists()


def test_a_parameter_goes_to_the_notebooks_that_have_it(tmp_path):
    demo = write_notebook(tmp_path, "demo", DEMO)
    other = v4.new_code_cell("lag: int = 1", metadata={"tags": ["parameters"]})
    other = write_notebook(tmp_path, "other", [other])
    one, two = make_plans([demo, other], {"prefix": "3", "lag": "5"})
    assert (one.given, two.given) == ({"prefix": 3}, {"lag": 5})
    assert one.command == shlex.join(["workbench", "report", str(demo), "-p", "prefix=3"])


def test_pairs_by_hand():
    assert read_pairs(["a=1=2", "b="]) == {"a": "1=2", "b": ""}
    with pytest.raises(InputError) as caught:
        read_pairs(["seed"])
    assert str(caught.value) == "report: -p 'seed' is not NAME=VALUE; write for example -p seed=1"
    with pytest.raises(InputError, match=r"^report: -p a is given twice; give it once$"):
        read_pairs(["a=1", "a=2"])


def test_a_notebook_that_is_not_there_and_one_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.parameters.FOLDER", tmp_path)
    write_notebook(tmp_path, "forgetting", DEMO)
    write_notebook(tmp_path, "loss_curvature", DEMO)
    with pytest.raises(InputError) as caught:
        find_notebooks(["forgeting"])
    assert str(caught.value) == (
        "report: no notebook 'forgeting'; did you mean 'forgetting'? "
        "there are forgetting, loss_curvature"
    )
    # the pillars come first
    assert [n.name for n in find_notebooks(every=True)] == ["loss_curvature", "forgetting"]
    (tmp_path / "text.ipynb").write_text("{}")
    with pytest.raises(InputError) as caught:
        find_notebooks(["text"])
    assert str(caught.value) == (
        f"report: {tmp_path / 'text.ipynb'} is not a notebook of format 4; "
        "open and save it in JupyterLab"
    )


# publish


def test_publish_by_value(tmp_path):
    table = rows("auc", [0.6, 0.7], run="r", item=["a", "b"])
    key = {
        "AUC": rows("auc", 0.71249, run="r", lo=0.6, hi=0.8, n=1200),
        "half-life": rows("half_life", np.nan, run="r", n=3, beside={"reason": "never halves"}),
    }
    shown = publish(table, key=key, results=tmp_path / "new", passport={"seed": 7})
    assert shown.to_dict("index") == {
        "AUC": {"value": "0.712", "95 % interval": "0.600 to 0.800", "n": "1,200", "unit": ""},
        "half-life": {"value": "undefined", "95 % interval": "", "n": "3", "unit": "updates"},
    }
    back = load(tmp_path / "new" / "table.parquet")
    assert back["value"].tolist() == [0.6, 0.7]
    assert back.attrs["passport"]["seed"] == 7
    assert pd.read_csv(tmp_path / "new" / "table.csv")["item"].tolist() == ["a", "b"]
    one, two = json.loads((tmp_path / "new" / "key.json").read_text())
    assert one == {
        "label": "AUC", "value": 0.71249, "lo": 0.6, "hi": 0.8, "n": 1200, "unit": "",
        "metric": "auc", "run": "r", "step": 0, "reason": "",
    }  # fmt: skip
    assert (two["value"], two["lo"], two["reason"]) == (None, None, "never halves")


def test_each_key_number_leads_to_its_measure_and_its_floor(tmp_path):
    floored = rows("top1", 0.5, run="r", step=7, lo=0.4, hi=0.6, n=9)
    floored = floored.assign(floor=0.2, floor_lo=0.1, floor_hi=np.nan)
    key = {
        "hits": floored.assign(floor_hi=0.3),
        "hits, no zone": floored,
        "AUC": rows("auc", 0.7, run="r"),
    }
    publish(floored, key=key, results=tmp_path)
    found = page.key_rows(json.loads((tmp_path / "key.json").read_text()))
    assert [row["floor"] for row in found] == ["0.100 to 0.300", "", "chance 0.500"]
    assert found[0]["where"] == "r, step 7"
    measures = {row["metric"]: row for row in page.measure_rows(found)}
    assert list(measures) == ["top1", "auc"]
    assert measures["auc"]["range"] == "0 to 1" and measures["auc"]["chance"] == "0.5"
    assert measures["top1"]["chance"].startswith("depends on the text")
    assert measures["auc"]["sign"] == "higher is more" and "DeLong" in measures["auc"]["source"]


def test_publish_writes_nothing_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = rows("auc", 0.6, run="r")
    assert publish(table, key={"a": table}, results="").loc["a", "value"] == "0.600"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"^publish: the key number 'a' has 0 rows, needs one$"):
        publish(table, key={"a": table[:0]}, results="")


def test_publish_on_a_full_disk_is_the_users_affair(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "table.parquet")

    monkeypatch.setattr(report, "save", full)
    table = rows("auc", 0.6, run="r")
    with pytest.raises(InputError) as caught:
        publish(table, key={}, results=tmp_path)
    assert str(caught.value) == (
        "publish: cannot write to table.parquet (No space left on device); "
        "free some space, or choose another folder with --out"
    )


# pages, without a kernel


def test_numbers_by_hand():
    got = [page.number(v) for v in (0.0, 0.71249, 12.345, 123456.7, 2e6, 1e-5, -0.5, None)]
    assert got == ["0", "0.712", "12.3", "123,457", "2.00e+06", "1.00e-05", "-0.500", "undefined"]
    assert page.interval(0.1, None) == page.interval(math.nan, 0.2) == ""
    assert (page.seconds(12.34), page.seconds(135)) == ("12.3 s", "2 min 15 s")


def test_formulas_leave_code_and_money_alone():
    formulas = []
    text = "`$a$` costs $5 or $6; \\$7\n\n```\n$b$\n```\n$c_i$ and\n$$\nd\n$$\n$e$5"
    got = page._mark_formulas(text, formulas)
    assert len(formulas) == 2
    assert got == (
        "`$a$` costs $5 or $6; \\$7\n\n```\n$b$\n```\n"
        "\ue0000\ue001 and\n\ue0001\ue001\n$e$5"
    )  # fmt: skip
    assert "<msub><mi>c</mi><mi>i</mi></msub>" in formulas[0]
    assert 'display="block"' in formulas[1]
    # a heading's anchor must not hold MathML, its text must
    html = page._put_formulas('<h2 id="a-\ue0000\ue001">a \ue0000\ue001</h2>', ["<math></math>"])
    assert html == '<h2 id="a-">a <math></math></h2>'


def test_json_in_a_script_cannot_end_it():
    text = page._script_json({"a": ["</script>&", math.nan]})
    assert text == '{"a":["\\u003c/script\\u003e\\u0026",null]}'
    assert json.loads(text) == {"a": ["</script>&", None]}


def test_thumbnails_are_small():
    import plotly.graph_objects as go

    line = go.Scatter(x=np.arange(1200), y=np.arange(1200) / 7, text=["t"] * 1200, name="secret")
    heat = go.Heatmap(z=np.arange(300 * 60).reshape(300, 60), x=np.arange(60), y=np.arange(300))
    got = [json.loads(go.Figure(t, layout={"title": "T"}).to_json()) for t in (line, heat)]
    cells = [
        v4.new_code_cell(outputs=[v4.new_output("display_data", {page.PLOTLY: f})]) for f in got
    ]
    first, second = (page.thumbnail(v4.new_notebook(cells=[c])) for c in cells)
    assert page.thumbnail(v4.new_notebook()) is None
    # 1,200 points to at most 120: every tenth; 10 / 7 = 1.42857 to four digits
    trace = first["data"][0]
    assert (len(trace["x"]), trace["x"][1], trace["y"][1]) == (120, 10, 1.429)
    assert "text" not in trace
    assert "title" not in first["layout"]
    # 300 rows to every third, 60 columns stay
    trace = second["data"][0]
    assert (len(trace["z"]), len(trace["z"][0]), len(trace["x"]), len(trace["y"])) == (
        100, 60, 60, 100,
    )  # fmt: skip


def test_plain_text_of_markdown():
    assert plain("**How** `x` [is it](http://a.b)\nkept") == "How x is it kept"


# runs


def test_each_run_ends_as_it_should(made):
    out, reports = made
    assert {name: r.status for name, r in reports.items()} == {
        "demo": "ok", "fails": "failed", "dies": "failed", "refuses": "refused",
    }  # fmt: skip
    assert reports["refuses"].error == "load_model: no folder ./x; check -p model"
    assert reports["fails"].error == "ZeroDivisionError: division by zero"
    assert reports["dies"].error == (
        "The kernel died while this cell ran: out of memory, or a crash."
    )
    shown = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
    assert shown == ["all.parquet", "demo", "dies", "fails", "index.html"]
    assert sorted(p.name for p in (out / "demo").iterdir()) == [
        "demo.ipynb", "figures.js", "key.json", "log.txt", "report.html", "status.json",
        "table.csv", "table.parquet", "thumbnail.json",
    ]  # fmt: skip


def test_status_is_written_for_all(made):
    out, _ = made
    status = json.loads((out / "demo" / "status.json").read_text())
    assert status["given"] == {"prefix": 3}
    assert status["parameters"] == {
        "prefix": 3, "rate": 0.5, "kinds": ["verse"], "items": None, "fast": False,
    }  # fmt: skip
    assert (status["status"], status["title"]) == ("ok", "How long is it kept?")
    assert load(out / "demo" / "table.parquet").attrs["passport"]["seed"] == 3
    assert json.loads((out / "dies" / "status.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("printed", "kept"),
    [
        ("edits:  69%|######8   | 22/32 [00:10<00:04,  2.16/s]\r             \r", ""),
        ("training:  34%|███   | 240/700 [00:40<01:18, 5.89update/s, loss=3.7]\n\nsaid\n", "said"),
        ("12text [00:01, 9.9text/s]", ""),
        ("warned\nedits: 5%|# | 1/20 [00:00<00:03, 6it/s]\nafter", "warned\nafter"),
        ("told\nsweep: another process is at work on p.parquet; waiting for it\n", "told"),
        ("a | 100% | b [see 3:04 below]\n", "a | 100% | b [see 3:04 below]\n"),
        ("kept 12 [0.1, 0.3]\n  x\n", "kept 12 [0.1, 0.3]\n  x\n"),
    ],
)
def test_progress_bars_do_not_stay_on_the_page(printed, kept):
    assert engine._without_bars(printed) == kept
    stream = v4.new_output("stream", text=kept)
    assert engine._was_a_bar(stream) == (kept == "")
    kind = "application/vnd.jupyter.widget-view+json"
    widget = v4.new_output("display_data", data={kind: {}, "text/plain": printed.strip("\r ")})
    assert engine._was_a_bar(widget) == (kept == "")
    assert not engine._was_a_bar(v4.new_output("display_data", data={"text/plain": printed}))


def test_the_executed_notebook_keeps_nothing_of_the_run(made):
    out, _ = made
    text = (out / "demo" / "demo.ipynb").read_text()
    assert "papermill" not in text
    assert '"\\n# Parameters' not in text
    assert not re.search(r"\.demo\.\w+", text)
    notebook = nbformat.reads(text, as_version=4)
    assert notebook.cells[2].source == '# Parameters\nprefix = 3\nresults = ""\n'
    # this interpreter, the caller's folder
    assert notebook.cells[3].outputs[0].text == f"{sys.executable} {Path.cwd()}\n"
    # no progress bar, whose times would differ from run to run
    assert notebook.cells[3].outputs[1].text == "a note\n"


def test_two_runs_are_the_same_bytes(made, tmp_path):
    out, _ = made
    for name in ("demo", "fails"):
        again = run_report(out.parent / f"{name}.ipynb", {"prefix": 3}, out=tmp_path)
        one, two = (f / name / f"{name}.ipynb" for f in (out, again.folder.parent))
        assert one.read_bytes() == two.read_bytes()


def test_a_failed_report_shows_where(made):
    out, _ = made
    html = (out / "fails" / "report.html").read_text()
    assert "<strong>This report failed.</strong> ZeroDivisionError: division by zero" in html
    assert html.index('class="failure" id="failure"') < html.index("never run")
    assert "\x1b" not in html
    assert "The kernel died while this cell ran" in (out / "dies" / "report.html").read_text()


def test_pages_load_nothing_and_escape_everything(made):
    out, _ = made
    for path in (out / "index.html", out / "demo" / "report.html", out / "fails" / "report.html"):
        html = path.read_text()
        outside = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
        assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", outside), path
        assert EVIL not in outside
        assert "<script>window" not in html
        assert "default-src &#39;none&#39;" in html
    assert html.count("Plotly.newPlot") == 0  # nothing to draw in the failed one


def test_an_earlier_report_is_replaced_whole_and_a_refused_one_left(made, tmp_path):
    out, _ = made
    path = write_notebook(tmp_path, "demo", REFUSES)
    before = (out / "demo" / "status.json").read_bytes()
    with pytest.raises(InputError, match=r"^load_model: no folder ./x; check -p model$"):
        run_report(path, out=out)
    assert (out / "demo" / "status.json").read_bytes() == before
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == [".locks"]


def test_output_folders_that_cannot_be(made, tmp_path):
    path = made[0].parent / "demo.ipynb"
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(InputError) as caught:
        run_report(path, out=file)
    assert str(caught.value) == f"report: {file} is a file; choose a folder with --out"
    (tmp_path / "demo").mkdir()
    with pytest.raises(InputError) as caught:
        run_report(path, out=tmp_path)
    assert str(caught.value) == (
        f"report: {tmp_path / 'demo'} is there already and is not a report; "
        "move it away, or choose another folder with --out"
    )
    with pytest.raises(InputError) as caught:
        run_report(path, out=file / "below")
    assert str(caught.value) == (
        f"report: cannot write to {file / 'below'} (Not a directory); "
        "free some space, or choose another folder with --out"
    )
    assert file.read_text() == "mine"


def test_the_suite_is_trained_before_any_kernel_starts(tmp_path, monkeypatch):
    asked = []

    class Suite:
        @staticmethod
        def specification(corpus):
            return SimpleNamespace(hash="of the suite")

        @staticmethod
        def ensure_suite(corpus):
            asked.append(corpus)
            raise InputError("load_suite: corpus is too short")

    monkeypatch.setitem(sys.modules, "workbench.suite", Suite)
    cell = 'model: str = "suite"\ncorpus: str = ""'
    cell = v4.new_code_cell(cell, metadata={"tags": ["parameters"]})
    path = write_notebook(tmp_path, "n", [cell])
    for given, want in (({}, None), ({"corpus": "a.txt"}, "a.txt")):
        with pytest.raises(InputError, match=r"^load_suite: corpus is too short$"):
            run_report(path, given, out=tmp_path / "out")
        assert asked.pop() == want
    # another model needs no suite
    assert run_report(path, {"model": "m"}, out=tmp_path / "out").status == "ok"
    assert asked == []


def test_the_index_lists_what_is_there(made):
    out, _ = made
    html = write_site(out).read_text()
    titles = re.findall(r'<h2><a href="([^"]+)">([^<]+)', html)
    assert titles == [
        (f"{n}/report.html", "How long is it kept?") for n in ("demo", "dies", "fails")
    ]
    assert "0.600 to 0.700" in html
    assert "2 failed" in html
    assert "ZeroDivisionError: division by zero" in html


# in a browser with the network cut


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = Path("/usr/bin/chromium")
    if not chromium.is_file():
        pytest.skip("needs /usr/bin/chromium")
    quiet = (
        "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update"
    )
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=quiet.split())
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["index.html", "demo/report.html"])
def test_pages_draw_offline_and_run_no_strange_script(made, browser, name, width):
    out, _ = made
    tab = browser.new_page(viewport={"width": width, "height": 800})
    asked, errors = [], []

    def refuse(route):
        asked.append(route.request.url)
        route.abort()

    tab.route(re.compile("^https?://"), refuse)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text))
    tab.goto((out / name).as_uri())
    tab.wait_for_selector(".js-plotly-plot .scatterlayer .trace")
    assert (asked, errors) == ([], [])
    assert tab.evaluate("window.pwned") is None
    assert tab.locator(".js-plotly-plot").count() == 1
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    shown = tab.inner_text("body")
    assert EVIL in shown
    if name == "demo/report.html":
        # hovering shows the item's text, as text
        tab.locator(".js-plotly-plot .nsewdrag").first.hover()
        tab.wait_for_selector(".hoverlayer text")
        assert "window.pwned" in tab.locator(".hoverlayer").first.text_content()
        assert tab.evaluate("window.pwned") is None
        assert tab.locator(".jp-RenderedHTML script, .jp-RenderedHTML img").count() == 0
        assert tab.locator("math").count() == 2
    tab.close()


def test_the_policy_stops_what_a_notebook_lets_through(made, browser, tmp_path):
    """A page whose cell outputs raw HTML with a script still runs none of it."""
    out, _ = made
    html = (out / "demo" / "report.html").read_text()
    poisoned = tmp_path / "p.html"
    poisoned.write_text(html.replace("<main>", f"<main>{EVIL}", 1))
    tab = browser.new_page()
    tab.goto(poisoned.as_uri())
    tab.wait_for_selector(".js-plotly-plot .scatterlayer .trace")
    assert tab.evaluate("window.pwned") is None
    tab.close()


@pytest.mark.parametrize(("starts", "status"), [(2, "ok"), (3, "failed")])
def test_a_kernel_that_does_not_start_is_started_again(tmp_path, monkeypatch, starts, status):
    import papermill

    real, tried = papermill.execute_notebook, []

    def unlucky(*args, **kwargs):
        tried.append(args)
        if len(tried) <= starts:
            raise RuntimeError("Kernel died before replying to kernel_info")
        return real(*args, **kwargs)

    monkeypatch.setattr(papermill, "execute_notebook", unlucky)
    path = write_notebook(
        tmp_path,
        "plain",
        [v4.new_code_cell("results: str = ''", metadata={"tags": ["parameters"]})],
    )
    assert run_report(path, out=tmp_path / "out").status == status
    assert len(tried) == 3


def test_a_cell_that_fails_is_not_run_again(tmp_path):
    count = tmp_path / "count"
    cells = [
        v4.new_code_cell("results: str = ''", metadata={"tags": ["parameters"]}),
        v4.new_code_cell(f"open({str(count)!r}, 'a').write('x'); import os; os._exit(1)"),
    ]
    assert (
        run_report(write_notebook(tmp_path, "dying", cells), out=tmp_path / "out").status
        == "failed"
    )
    assert count.read_text() == "x"


EXPLORER = """\
import threading, ipywidgets as widgets, plotly.graph_objects as go
from workbench.explore.shell import Explorer, View
shown = threading.Event()
def draw(values, work):
    shown.wait(60)  # it draws long after its own cell has run
    return View({"figure": go.Figure(go.Scatter(y=[values["n"], 7]))}, "<b>words</b>", "code = 1")
each = Explorer("Try", {"n": widgets.IntSlider(3, description="n")}, draw)
each"""


def test_a_report_keeps_explorers_as_they_were_at_its_end(tmp_path):
    """Who records a notebook hears what comes of the cell that runs, and no thread of another's."""
    cells = [
        v4.new_code_cell("results: str = ''", metadata={"tags": ["parameters"]}),
        v4.new_code_cell(EXPLORER),
        v4.new_code_cell("shown.set()\neach.wait(60).message"),
    ]
    made = run_report(write_notebook(tmp_path, "tries", cells), out=tmp_path / "out")
    assert made.status == "ok"
    notebook = nbformat.read(made.folder / "tries.ipynb", as_version=4)
    assert "widgets" not in notebook.metadata
    told = [output["data"] for output in notebook.cells[-2].outputs]
    [figure] = [data[page.PLOTLY] for data in told if page.PLOTLY in data]
    assert figure["data"][0]["y"] == [3, 7]
    words = [data["text/html"] for data in told if "text/html" in data]
    assert words[-2:] == ["<b>words</b>", "<pre>code = 1</pre>"]
