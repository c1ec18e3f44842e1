"""The site over folders that are written by hand: no kernel runs here."""

import json
import re
from html import unescape
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbformat import v4

from workbench import page, site
from workbench.report import publish
from workbench.site import write_site
from workbench.table import load, rows, save

EVIL = "<script>window.pwned=1</script><img src=x onerror='window.pwned=2'>"


def notebook(*figures: go.Figure, injected: bool = True):
    """An executed notebook: parameters, then a cell a figure."""
    cells = [v4.new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]})]
    if injected:
        cells.append(v4.new_code_cell("seed = 1", metadata={"tags": [page.INJECTED]}))
    for figure in figures:
        output = v4.new_output("display_data", {page.PLOTLY: json.loads(figure.to_json())})
        cells.append(v4.new_code_cell("figure", outputs=[output]))
    return v4.new_notebook(cells=cells)


def write_report(
    out: Path,
    name: str,
    notebook_name: str = "demo",
    *,
    value=None,
    figures=(),
    table=None,
    **about,
) -> Path:
    """A report's folder as the engine leaves it."""
    folder = out / name
    folder.mkdir(parents=True)
    executed = notebook(*figures)
    nbformat.write(executed, folder / f"{name}.ipynb")
    if value is not None:
        row = rows("auc", value, run="r", lo=value - 0.1, hi=value + 0.1, n=7)
        publish(row if table is None else table, key={"AUC": row}, results=folder)
    (folder / page.FIGURES).write_text(page.figures_script(executed))
    (folder / "report.html").write_text("a report")
    (folder / "log.txt").write_text("a log")
    parameters = about.pop("parameters", {})
    status = {
        "name": name, "title": "A title", "description": "", "status": "ok",
        "started": "2026-11-21T21:00:00+00:00", "seconds": 2.0, "given": parameters,
        "parameters": parameters, "error": "", "command": "workbench report", "versions": {},
        "notebook": notebook_name, "grid": "", "key": "hash", "fingerprint": {"notebook": "hash"},
    } | about  # fmt: skip
    (folder / "status.json").write_text(json.dumps(status))
    return folder


def plan(out: Path, grid: str, *plans: dict) -> None:
    (out / ".grid").mkdir(parents=True, exist_ok=True)
    (out / ".grid" / f"{grid}.json").write_text(json.dumps(plans))


def body(html: str) -> list[list[str]]:
    """The texts of the index's table, row by row."""
    table = html[html.index("<tbody>") : html.index("</tbody>")]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table.split("<tr>")[1:]]
    return [[" ".join(unescape(re.sub(r"<[^>]*>", " ", c)).split()) for c in row] for row in cells]


# what is listed


def test_a_grid_is_a_table_of_what_varies(tmp_path):
    for seed in (10, 2, 0):
        parameters = {"seed": seed, "prefix": 16}
        write_report(tmp_path, f"demo-{seed}", value=0.5 + seed / 100, parameters=parameters)
    assert write_site(tmp_path) == tmp_path / "index.html"
    html = (tmp_path / "index.html").read_text()
    files = "notebook csv parquet log"
    # natural order, and prefix, which is always 16, has no column
    assert body(html) == [
        ["demo-0", "ok", "0", "2.0 s", files, "0.500 0.400 to 0.600", "2026-11-21 21:00 UTC"],
        ["demo-2", "ok", "2", "2.0 s", files, "0.520 0.420 to 0.620", "2026-11-21 21:00 UTC"],
        ["demo-10", "ok", "10", "2.0 s", files, "0.600 0.500 to 0.700", "2026-11-21 21:00 UTC"],
    ]
    assert 'href="compare.html"' in html and 'href="all.parquet"' in html
    assert len(html) < 40_000  # a table draws nothing, so it need not weigh 5 MB


def test_reports_of_different_notebooks_are_cards(tmp_path):
    for name in ("membership", "capacity", "loss_curvature"):
        write_report(tmp_path, name, name, value=0.6)
    html = write_site(tmp_path).read_text()
    titles = re.findall(r'<h2><a href="([^"]+)">', html)
    # a pillar first
    want = ["loss_curvature", "capacity", "membership"]
    assert titles == [f"{name}/report.html" for name in want]
    assert '<table class="reports">' not in html and not (tmp_path / "compare.html").exists()


def test_what_differs_between_notebooks_does_not_vary(tmp_path):
    for name, prefix in (("a", 16), ("b", 32)):
        for seed in (0, 1):
            parameters = {"prefix": prefix, "seed": seed}
            write_report(tmp_path, f"{name}-{seed}", name, value=0.5, parameters=parameters)
    html = write_site(tmp_path).read_text()
    assert 'data-label="seed"' in html and 'data-label="prefix"' not in html
    found = pd.read_parquet(tmp_path / "all.parquet")
    assert list(found.columns[:4]) == ["report", "notebook", "seed", "run"]


def test_broken_failed_refused_and_missing_reports_are_shown_as_such(tmp_path):
    for seed in range(6):
        write_report(tmp_path, f"demo-{seed}", value=0.5, parameters={"seed": seed})
    (tmp_path / "demo-0" / "status.json").write_text('{"name": "demo-0", "sta')
    (tmp_path / "demo-1" / "table.parquet").unlink()
    (tmp_path / "demo-2" / "key.json").write_text("[{}]")
    (tmp_path / "demo-3" / "report.html").unlink()
    (tmp_path / "demo-4" / "status.json").unlink()
    cut = (tmp_path / "demo-5" / "table.parquet").read_bytes()
    (tmp_path / "demo-5" / "table.parquet").write_bytes(cut[:-9])
    about = {"status": "failed", "error": "ZeroDivisionError: division by zero"}
    write_report(tmp_path, "demo-6", parameters={"seed": 6}, **about)
    about = {"status": "refused", "error": "load_model: no folder ./x"}
    write_report(tmp_path, "demo-7", parameters={"seed": 7}, **about)
    write_report(tmp_path, "demo-8", parameters={"seed": 8}, status="perhaps")
    planned = {"notebook": "demo", "given": {}, "settled": {"seed": 9, "results": "x"}, "key": "k"}
    first = planned | {"name": "demo-0", "settled": {"seed": 0, "results": "y"}}
    plan(tmp_path, "g", planned | {"name": "demo-9"}, first)
    # none of these is a report: a folder of the user's own, what a killed run left, locks
    for name in ("mine", ".demo-0.abc", ".locks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    html = write_site(tmp_path).read_text()
    found = {re.split(r" |$", row[0])[0]: row for row in body(html)}
    # nobody knows any more what demo-4 was: it stands last
    assert list(found) == [f"demo-{n}" for n in (0, 1, 2, 3, 5, 6, 7, 8, 9, 4)]
    found = {name: found[name] for name in sorted(found)}
    status = {name: next(c for c in row if c in page.STATUSES) for name, row in found.items()}
    assert list(status.values()) == ["broken"] * 6 + ["failed", "refused", "broken", "missing"]
    said = [found[f"demo-{n}"][0].partition(" ")[2] for n in range(10)]
    assert said[0].startswith("status.json cannot be used: Unterminated string")
    assert said[1] == "table.parquet cannot be used: it is missing"
    assert said[2].startswith("key.json cannot be used: ")
    assert said[3] == "report.html cannot be used: it is missing"
    assert said[4] == "status.json cannot be used: it is missing"
    assert said[5].startswith("table.parquet cannot be used: ")
    assert said[6] == "ZeroDivisionError: division by zero"
    assert said[8] == "status.json cannot be used: it says 'perhaps'"
    for name, count in (("failed", 1), ("refused", 1), ("broken", 7), ("missing", 1)):
        assert f'<span class="status {name}">{count} {name}</span>' in html
    # a plan knows the parameters of those that cannot say
    assert found["demo-0"][found["demo-0"].index("broken") + 2] == "0"
    assert "demo-9/" not in html and "results" not in html
    assert not (tmp_path / "all.parquet").exists()


def test_a_plan_that_cannot_be_read_is_said(tmp_path):
    write_report(tmp_path, "demo", value=0.5)
    (tmp_path / ".grid").mkdir()
    (tmp_path / ".grid" / "g.json").write_text("[")
    html = write_site(tmp_path).read_text()
    assert "The plan .grid/g.json cannot be read (Expecting value" in html


def test_an_empty_folder_has_an_index(tmp_path):
    assert "No reports yet" in write_site(tmp_path / "new").read_text()


def test_labels_that_hold_a_value_do_not_make_a_column_each(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "KEY_COLUMNS", 2)
    for seed in range(3):
        folder = write_report(tmp_path, f"demo-{seed}", value=0.5, parameters={"seed": seed})
        key = json.loads((folder / "key.json").read_text())
        key.append(key[0] | {"label": f"AUC of seed {seed}"})
        (folder / "key.json").write_text(json.dumps(key))
    html = write_site(tmp_path).read_text()
    assert html.count('<th scope="col" class="key"') == 2
    assert "2 rarer key numbers are only in the reports" in html


# one table of all tables


def test_combined_by_hand(tmp_path):
    # one has a lag in whole numbers, the other in halves; one a seed of its own and a kind
    one = rows("auc", [0.6, 0.7], run="r", item=["a", "b"]).assign(lag=[1, 2])
    two = rows("auc", [0.8], run="r").assign(lag=0.5, seed=5, kind="verse")
    write_report(tmp_path, "demo-1", value=0.5, table=one, parameters={"seed": 1, "model": "m"})
    write_report(tmp_path, "demo-2", value=0.5, table=two, parameters={"seed": 2, "model": None})
    failed = {"status": "failed", "error": "x", "parameters": {"seed": 3, "model": "m"}}
    write_report(tmp_path, "demo-3", value=0.5, table=one, **failed)
    write_site(tmp_path)
    found = load(tmp_path / "all.parquet")
    assert found.attrs["passport"]["reports"] == ["demo-1", "demo-2"]
    assert found["report"].tolist() == ["demo-1", "demo-1", "demo-2"]
    assert found["notebook"].tolist() == ["demo"] * 3
    # the tables' own seed keeps its name
    assert found["seed (report)"].tolist() == [1, 1, 2]
    np.testing.assert_array_equal(found["seed"], [np.nan, np.nan, 5])
    assert found["model"].astype(object).where(found["model"].notna(), None).tolist() == [
        "m", "m", None,
    ]  # fmt: skip
    assert found["lag"].tolist() == [1.0, 2.0, 0.5]
    assert found["value"].tolist() == [0.6, 0.7, 0.8]
    assert found["kind"].isna().tolist() == [True, True, False]
    assert isinstance(found["run"].dtype, pd.CategoricalDtype)
    assert found["step"].dtype == "int64"


@pytest.mark.parametrize(
    ("values", "dtype", "kept"),
    [
        ([1, 2], "int64", [1, 2]),
        ([1, 2.5], "float64", [1.0, 2.5]),
        ([True, False], "bool", [True, False]),
        ([True, 2], "category", ["true", "2"]),
        ([["a"], ["b", "c"]], "category", ['["a"]', '["b", "c"]']),
        (["", "b"], "category", ['""', "b"]),
    ],
)
def test_a_parameters_column_holds_its_type(tmp_path, values, dtype, kept):
    for nth, value in enumerate(values):
        write_report(tmp_path, f"demo-{nth}", value=0.5, parameters={"p": value})
    write_site(tmp_path)
    found = load(tmp_path / "all.parquet")["p"]
    assert (str(found.dtype), found.tolist()) == (dtype, kept)


TABLES = st.lists(
    st.fixed_dictionaries(
        {"value": st.lists(st.floats(0, 1), min_size=1, max_size=5)},
        optional={
            "lag": st.sampled_from([1, 0.5, "late"]),
            "kind": st.sampled_from(["verse", None]),
            "layer": st.integers(0, 3),
        },
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tables=TABLES, rows_held=st.sampled_from([1, 3, 1000]))
def test_combined_against_pandas(tmp_path_factory, tables, rows_held):
    """Whatever columns the tables have, and however the rows fall into groups."""
    out = tmp_path_factory.mktemp("out")
    parts = []
    for nth, table in enumerate(tables):
        items = [f"i{n}" for n in range(len(table["value"]))]
        beside = {name: value for name, value in table.items() if name != "value"}
        part = rows("auc", table["value"], run=f"r{nth}", item=items).assign(**beside)
        write_report(out, f"demo-{nth}", value=0.5, table=part, parameters={"seed": nth})
        parts.append(load(out / f"demo-{nth}" / "table.parquet").assign(report=f"demo-{nth}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "ROWS", rows_held)
        write_site(out)
    found = load(out / "all.parquet")
    want = pd.concat([part.astype(object) for part in parts], ignore_index=True)
    assert set(found.columns) - {"notebook", "seed"} == set(want.columns)
    for name in want.columns:
        mixed = {type(value) for value in want[name].dropna()} == {str, float}
        for got, expected in zip(found[name], want[name], strict=True):
            if pd.isna(expected):
                assert pd.isna(got), name
            elif isinstance(got, str) and not isinstance(expected, str):
                assert float(got) == expected or mixed, name
            else:
                assert got == expected, name


def test_a_table_damaged_inside_leaves_no_half_of_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(site, "ROWS", 100)
    many = rows("auc", np.linspace(0, 1, 5000), run="r", item=[f"i{n}" for n in range(5000)])
    for seed in (0, 1, 2):
        write_report(tmp_path, f"demo-{seed}", value=0.5, table=many, parameters={"seed": seed})
    file = tmp_path / "demo-1" / "table.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF  # the footer is whole: only a page's checksum tells
    file.write_bytes(content)
    for _ in range(2):  # the second time from what was found out the first time
        html = write_site(tmp_path).read_text()
        found = load(tmp_path / "all.parquet")
        assert found["report"].value_counts().to_dict() == {"demo-0": 5000, "demo-2": 5000}
        assert [row[1] for row in body(html)] == ["ok", "broken", "ok"]
        assert "table.parquet cannot be used: " in html


def test_the_combined_table_is_written_again_only_when_something_changed(tmp_path, monkeypatch):
    for seed in (0, 1):
        write_report(tmp_path, f"demo-{seed}", value=0.5, parameters={"seed": seed})
    times = []
    stream = site._stream
    monkeypatch.setattr(site, "_stream", lambda *args: times.append(1) or stream(*args))
    write_site(tmp_path)
    write_site(tmp_path)
    assert len(times) == 1
    save(rows("auc", 0.9, run="new"), tmp_path / "demo-1" / "table.parquet")
    write_site(tmp_path)
    assert len(times) == 2
    assert load(tmp_path / "all.parquet")["value"].tolist() == [0.5, 0.9]
    for name in ("demo-0", "demo-1"):
        (tmp_path / name / "status.json").write_text("{")
    write_site(tmp_path)
    assert not (tmp_path / "all.parquet").exists()


def test_a_full_disk_leaves_the_pages_that_were_there(tmp_path, monkeypatch):
    write_report(tmp_path, "demo", value=0.5)
    before = write_site(tmp_path).read_bytes()
    write_report(tmp_path, "other", value=0.5)

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left on device"):
            write_site(tmp_path)
    assert (tmp_path / "index.html").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


# figures


def test_a_figure_is_named_by_its_cell():
    one, two = go.Figure(go.Scatter(y=[1, 2])), go.Figure(layout={"title": {"text": EVIL}})
    script = page.figures_script(notebook(one, two))
    assert page.figures_script(notebook(one, two, injected=False)) == script
    call = re.fullmatch(r"workbenchFigures\(document\.currentScript, (.*)\);\n", script)
    figures = json.loads(call[1])
    assert list(figures) == ["cell-1-1", "cell-2-1"]
    assert figures["cell-1-1"]["data"][0]["type"] == "scatter"
    assert figures["cell-2-1"]["layout"]["title"]["text"] == EVIL
    assert "<" not in script


# in a browser with the network cut


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = Path("/usr/bin/chromium")
    if not chromium.is_file():
        pytest.skip("needs /usr/bin/chromium")
    quiet = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=quiet.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two models by three seeds, one failed, one broken, one missing; evil in every text."""
    out = tmp_path_factory.mktemp("a {b} #c")
    for model in ("<b>a", "b"):
        for seed in (0, 2, 10):
            if (model, seed) == ("b", 10):
                continue
            name = f"demo-{'ab'[model == 'b']}-{seed}"
            trace = go.Scatter(x=[1, 2, 3], y=[0, seed, 1], name="s" + EVIL)
            heat = go.Heatmap(z=[[0, 1 + seed]])
            figures = (
                go.Figure(trace, layout={"title": {"text": "Curve " + EVIL}}),
                go.Figure(heat, layout={"title": {"text": "Map"}}),
                go.Figure(
                    go.Bar(x=["u", f"v{seed}"], y=[1, 2]), layout={"title": {"text": "Bars"}}
                ),
            )
            value = None if name == "demo-a-2" else 0.5 + seed / 100
            about = {"parameters": {"model": model, "seed": seed}}
            if value is None:
                about |= {"status": "failed", "error": f"ValueError: {EVIL}"}
                figures = ()
            folder = write_report(out, name, value=value, figures=figures, **about)
            if value is not None:
                key = json.loads((folder / "key.json").read_text())
                more = {"label": "second " + EVIL, "value": None, "lo": None, "hi": None}
                key.append(key[0] | more | {"reason": EVIL})
                (folder / "key.json").write_text(json.dumps(key))
    (out / "demo-b-2" / "status.json").write_text(EVIL)
    write_report(out, "<img src=x onerror='window.pwned=3'>", "other", value=0.4)
    planned = [
        {"name": f"demo-b-{seed}", "notebook": "demo", "settled": {"model": "b", "seed": seed}}
        for seed in (2, 10)
    ]
    plan(out, EVIL.replace("/", ""), *planned)
    write_site(out)
    return out


@pytest.fixture
def tab(browser):
    """A page that records what it asks of other hosts and what goes wrong in it."""
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    wrong = []

    def refuse(route):
        wrong.append(route.request.url)
        route.abort()

    tab.route(re.compile("^https?://"), refuse)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text))
    tab.set_default_timeout(30_000)
    yield tab
    pwned = tab.evaluate("window.pwned")
    tab.close()
    assert (wrong, pwned) == ([], None)


def names(tab) -> list[str]:
    cells = tab.locator("table.reports tbody td.name")
    return [text.split("\n")[0] for text in cells.all_inner_texts()]


@pytest.mark.parametrize("width", [1280, 390])
def test_the_index_filters_and_sorts(built, tab, width):
    tab.set_viewport_size({"width": width, "height": 800})
    tab.goto((built / "index.html").as_uri())
    assert len(names(tab)) == 7
    assert tab.inner_text("#count") == "7 reports"
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    shown = tab.inner_text("body")
    assert f"ValueError: {EVIL}" in shown and "<img src=x onerror='window.pwned=3'>" in shown

    def choose(label, value):
        label = f'label:has-text("{label}") > select'
        tab.locator("#filters").locator(label).first.select_option(value)

    choose("model", "<b>a")
    assert names(tab) == ["demo-a-0", "demo-a-2", "demo-a-10"]
    assert tab.inner_text("#count") == "3 of 7 reports"
    choose("status", "ok")
    assert names(tab) == ["demo-a-0", "demo-a-10"]
    tab.locator("#filters button").click()
    tab.wait_for_function("document.getElementById('count').textContent === '7 reports'")
    tab.locator("#words").fill("valueerror demo-a")
    assert names(tab) == ["demo-a-2"]
    tab.locator("#words").fill("nothing like it")
    assert names(tab) == []
    tab.locator("#words").fill("demo-")
    # 10 after 2, and what has no number last, whichever way
    tab.locator("#order").select_option(label="AUC")
    assert names(tab) == [
        "demo-a-0", "demo-b-0", "demo-a-10", "demo-a-2", "demo-b-2", "demo-b-10",
    ]  # fmt: skip
    tab.locator("#descending").check()
    assert names(tab)[0] == "demo-a-10" and names(tab)[-1] == "demo-b-10"
    choose("notebook", "demo")
    assert tab.get_attribute("#compare", "href").endswith("compare.html#notebook=demo")


def test_the_index_by_keyboard(built, tab):
    tab.goto((built / "index.html").as_uri())
    button = tab.locator("th button", has_text="seed")
    button.focus()
    tab.keyboard.press("Enter")
    head = tab.locator('th:has(button:text-is("seed"))')
    assert head.get_attribute("aria-sort") == "ascending"
    assert names(tab)[:4] == ["demo-a-0", "demo-b-0", "demo-a-2", "demo-b-2"]
    tab.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert names(tab)[:2] == ["demo-a-10", "demo-b-10"]


def test_many_key_numbers_of_several_notebooks_wait_for_a_choice(tmp_path, tab):
    for name in ("a", "b"):
        for seed in (0, 1):
            folder = write_report(tmp_path, f"{name}{seed}", name, value=0.5)
            key = json.loads((folder / "key.json").read_text())
            key = [key[0] | {"label": f"{name} {n}"} for n in range(5)]
            (folder / "key.json").write_text(json.dumps(key))
    tab.goto(write_site(tmp_path).as_uri())
    assert tab.locator("th.key:visible").count() == 0 and tab.is_visible("#hint")
    tab.locator("select[data-column]").first.select_option("a")
    shown = tab.locator("th.key:visible").all_inner_texts()
    assert [text.split(" ↕")[0] for text in shown] == [f"a {n}" for n in range(5)]
    assert not tab.is_visible("#hint")


def panels(tab) -> list[str]:
    return tab.locator("#panels figcaption").all_inner_texts()


def ranges(tab, path: str) -> list:
    return tab.evaluate(
        f"[...document.querySelectorAll('#panels .js-plotly-plot')].map((p) => p.{path})"
    )


@pytest.mark.parametrize("width", [1280, 390])
def test_the_same_figure_over_a_parameter(built, tab, width):
    tab.set_viewport_size({"width": width, "height": 800})
    tab.goto((built / "compare.html").as_uri() + "#notebook=demo&over=seed&at%3Amodel=%3D<b>a")
    tab.wait_for_function("document.querySelectorAll('#panels .js-plotly-plot').length === 2")
    tab.wait_for_selector("#legend span")
    assert tab.inner_text("#count") == "3 reports, 1 of them without numbers"
    assert panels(tab) == ["seed = 0", "seed = 2", "seed = 10"]
    assert tab.inner_text("#panels .none") == f"failed: ValueError: {EVIL}"
    assert tab.inner_text("#legend") == "s" + EVIL
    # y runs over 0..1 and 0..10: one range that holds both
    low, high = ranges(tab, "_fullLayout.yaxis.range")
    assert low == high and low[0] < 0 and low[1] > 10
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    options = tab.locator("#figure option").all_inner_texts()
    assert options[1:] == ["2. Map", "3. Bars"]
    tab.locator("#figure").select_option("cell-2-1")
    tab.wait_for_function(
        "[...document.querySelectorAll('#panels .js-plotly-plot')].map((p) => p._fullData[0].zmax)"
        ".join() === '11,11'"
    )
    tab.locator("#figure").select_option("cell-3-1")
    # the bars are u, v0 and u, v10: both panels know all three
    tab.wait_for_function(
        "[...document.querySelectorAll('#panels .js-plotly-plot')]"
        ".map((p) => p._fullLayout.xaxis._categories.join()).join(' ') === 'u,v0,v10 u,v0,v10'"
    )
    tab.locator("#same").uncheck()
    tab.wait_for_function(
        "[...document.querySelectorAll('#panels .js-plotly-plot')]"
        ".map((p) => p._fullLayout.xaxis._categories.join()).join(' ') === 'u,v0 u,v10'"
    )
    # a reader who keeps the address finds the same again
    assert "figure=cell-3-1" in tab.url and "at%3Amodel=%3D%3Cb%3Ea" in tab.url


def test_key_numbers_over_a_parameter(built, tab):
    tab.goto((built / "compare.html").as_uri() + "#notebook=demo&over=seed")
    tab.wait_for_selector("#dots .errorbar")
    assert tab.inner_text("#title") == "A title"
    lines = [row.split("\t") for row in tab.locator("#key tbody tr").all_inner_texts()]
    assert [line[0].split("\n")[0] for line in lines] == [
        "demo-a-0", "demo-b-0", "demo-a-2", "demo-b-2", "demo-a-10", "demo-b-10",
    ]  # fmt: skip
    assert [line[3] for line in lines] == ["ok", "ok", "failed", "broken", "ok", "missing"]
    assert lines[0][4].split() == ["0.500", "0.400", "to", "0.600"]
    # a dot a number: seeds 0 and 10 of the first model, 0 of the second, a little apart
    points = tab.evaluate(
        "document.getElementById('dots').data.map((t) => [t.name, t.x.map(Math.round), t.y,"
        " t.error_y.array.map((e) => +e.toFixed(3)), t.error_y.arrayminus.map((e) => +e.toFixed(3))])"
    )
    assert points == [
        ["model = &lt;b&gt;a", [0, 10], [0.5, 0.6], [0.1, 0.1], [0.1, 0.1]],
        ["model = b", [0], [0.5], [0.1], [0.1]],
    ]
    # the number that is undefined everywhere draws nothing, and its label stays a text
    tab.locator("#label").select_option("second " + EVIL)
    tab.wait_for_function("document.getElementById('dots').data.length === 0")
    assert "second " + EVIL in tab.locator("#key").inner_text()


def test_a_wide_parameter_is_drawn_on_a_logarithmic_axis_above_the_floor(tmp_path, tab):
    for dose in (1, 10, 100):
        row = rows("auc", 0.6, run="r", lo=0.5, hi=0.7)
        folder = write_report(tmp_path, f"d{dose}", parameters={"dose": dose})
        floored = row.assign(floor=0.2, floor_lo=0.1, floor_hi=0.3)
        publish(row, key={"AUC": row if dose == 1 else floored}, results=folder)
    tab.goto(write_site(tmp_path).with_name("compare.html").as_uri())
    tab.wait_for_selector("#dots .errorbar")
    floor, dots = tab.evaluate("document.getElementById('dots').data")
    # 1, 10 and 100 are 0, 1 and 2 decades; dose 1 has no floor
    assert dots["x"] == [0, 1, 2]
    assert floor["x"] == [1, 1, None, 2, 2, None]
    assert floor["y"] == [0.1, 0.3, None, 0.1, 0.3, None]
    ticks = "document.getElementById('dots').layout.xaxis.ticktext"
    assert tab.evaluate(ticks) == ["1", "10", "100"]
    note = tab.inner_text("#dots-note")
    assert "without memory" in note and "logarithmic" in note


def test_of_many_reports_the_other_parameters_are_held(tmp_path, tab):
    for model in "ab":
        for seed in range(7):
            parameters = {"model": model, "seed": seed}
            write_report(tmp_path, f"{model}{seed}", value=0.5, parameters=parameters)
    address = write_site(tmp_path).with_name("compare.html").as_uri()
    tab.goto(address)
    tab.wait_for_selector("#dots .errorbar")
    assert tab.inner_text("#count") == "2 reports"
    # asked for all, and kept in the address
    tab.locator("#fixed select").select_option("")
    assert tab.inner_text("#count") == "14 reports"
    kept = tab.url
    tab.goto("about:blank")
    tab.goto(kept)
    tab.wait_for_selector("#dots .errorbar")
    assert tab.inner_text("#count") == "14 reports"


def test_panels_come_a_dozen_at_a_time(tmp_path, tab):
    for seed in range(15):
        figure = go.Figure(go.Scatter(y=[seed, 1]))
        write_report(tmp_path, f"d{seed}", value=0.5, figures=[figure], parameters={"seed": seed})
    (tmp_path / "d14" / page.FIGURES).write_text("")
    (tmp_path / "d13" / page.FIGURES).unlink()
    tab.goto(write_site(tmp_path).with_name("compare.html").as_uri())
    tab.wait_for_selector("#more:visible")
    assert tab.inner_text("#more") == "Show 3 more of 15"
    assert panels(tab) == [f"seed = {n}" for n in range(12)]
    tab.locator("#more").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.querySelectorAll('#panels figure').length === 15")
    assert (
        tab.locator("#panels .none").all_inner_texts() == ["This figure is not in this report."] * 2
    )
    assert not tab.is_visible("#more")
