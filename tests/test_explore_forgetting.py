"""Both explorers of training: their figures against the same calls by hand, and what goes wrong."""

import json
import threading

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from workbench import (
    align_exposures,
    fit_forgetting,
    item_gains,
    memorization_profile,
    plot_event_study,
    plot_forgetting,
    plot_laws,
    plot_profile,
    plot_residuals,
    probe_extraction,
    same_at_every_lag,
    summarise,
)
from workbench.explore.forgetting import explore_forgetting
from workbench.explore.measured import Measured, Watched, html_table, plain
from workbench.explore.picture import themed
from workbench.explore.profile import cell_gains, explore_profile
from workbench.explore.shell import Offer, Stopped, View, Work
from workbench.subject import Subject
from workbench.table import InputError, save, validate

SECONDS = 60  # no test waits as long unless it fails
STEPS = (4, 10, 11, 12, 15, 20, 30, 40, 41, 43, 50, 60, 80, 110)


def made(items: int = 8, steps=STEPS, waves=(10, 40), kinds=("passage",), doses=(2, 8)):
    """A panel of exponentials: each text gains ``dose / 4 * e^(-lag / 20)`` when it is met."""
    rng, parts = np.random.default_rng(0), []
    for kind in kinds:
        for wave in (np.nan, *waves):
            for dose in (0,) if np.isnan(wave) else doses:
                for index in range(items):
                    lag = np.array(steps) - wave
                    met = lag >= 0
                    gain = np.where(met, dose / 4 * np.exp(-np.where(met, lag, 0) / 20), 0.0)
                    parts.append(
                        pd.DataFrame(
                            {
                                "run": "made",
                                "step": steps,
                                "group": "seen" if dose else "never",
                                "item": f"{kind}-{wave}-{dose}-{index}",
                                "metric": "log_probability",
                                "value": -6 + gain + rng.normal(size=len(steps)) / 20,
                                "lo": np.nan,
                                "hi": np.nan,
                                "n": 1,
                                "kind": kind,
                                "cohort": wave,
                                "dose": dose,
                                "copies": np.where(met, dose, 0),
                                "lag": np.where(met, lag, np.nan),
                            }
                        )
                    )
    return validate(pd.concat(parts, ignore_index=True))


def shown(explorer, name):
    return json.loads(explorer.view.figures[name].to_json())


def drawn(figure: go.Figure):
    return json.loads(figure.to_json())


def run(code: str, **given) -> dict:
    exec(compile(code, "copied", "exec"), given)
    return given["figures"]


def agree(explorer, **given) -> None:
    """The code in a fresh namespace makes the figures that are shown."""
    figures = run(explorer.code, **given)
    assert set(figures) == set(explorer.view.figures)
    for name, figure in figures.items():
        assert drawn(figure) == shown(explorer, name), name


@pytest.fixture(scope="module")
def panel():
    return made()


@pytest.fixture
def forgetting(panel):
    return explore_forgetting(table=panel).wait(SECONDS)


@pytest.fixture
def profile(panel):
    return explore_profile(table=panel).wait(SECONDS)


# --- forgetting -----------------------------------------------------------------------------------


def by_hand(panel, names, laws, *, draws=50, holdout=0.2, span=(0, 1000)):
    gains = item_gains(panel, strata=["kind"])
    gains = gains.assign(group="passage x" + gains["dose"].astype(str).str.rjust(3))
    after = same_at_every_lag(gains[gains["lag"].between(*span)])
    parts = [after[after["group"] == name] for name in names]
    means = pd.concat([summarise(p, by=["run", "group", "metric", "lag"]) for p in parts])
    fits = [fit_forgetting(p, laws=laws, draws=draws, holdout=holdout) for p in parts]
    return means, pd.concat(fits)


def test_curves_and_laws_are_those_of_the_same_calls(panel, forgetting):
    assert forgetting.message == ""
    assert forgetting.values["groups"] == ("passage x  2", "passage x  8")
    forgetting.set(laws=("exponential", "semilog"), holdout=0.3, span=(1.0, 50.0), log=False)
    forgetting.wait(SECONDS)
    laws, names = ["exponential", "semilog"], ["passage x  2", "passage x  8"]
    means, fits = by_hand(panel, names, laws, holdout=0.3, span=(1, 50))
    figure = plot_forgetting(means, fits, log_x=False, holdout=0.3, title="What is left")
    assert shown(forgetting, "curves") == drawn(figure)
    assert shown(forgetting, "laws") == drawn(plot_laws(fits, metric="weight"))
    agree(forgetting, table=panel)
    assert "exponential (1.00)" in forgetting.view.words  # what the panel was made with
    assert ">16</td>" in forgetting.view.words  # texts behind each curve
    assert "Who is watched changes with the lag" in forgetting.view.words  # too few stay


def test_other_figures_of_the_same_fits(panel, forgetting):
    _, fits = by_hand(panel, ["passage x  8"], ["exponential", "power"])
    forgetting.set(groups=("passage x  8",), laws=("exponential", "power"), compare="residual")
    forgetting.wait(SECONDS)
    assert shown(forgetting, "laws") == drawn(plot_residuals(fits))
    agree(forgetting, table=panel)
    forgetting.set(compare="rmse_holdout")
    forgetting.wait(SECONDS)
    assert shown(forgetting, "laws") == drawn(plot_laws(fits, metric="rmse_holdout"))


def test_over_the_training_step_curves_rise_and_fall(panel, forgetting):
    forgetting.set(x="step", cohort=40.0, groups=("passage x  8",), draws=0)
    forgetting.wait(SECONDS)
    line = [trace for trace in shown(forgetting, "curves")["data"] if trace.get("mode") != "lines"]
    figure = forgetting.view.figures["curves"].data[-1]
    assert len(line) == 1 and list(figure.x) == list(STEPS)
    value = dict(zip(figure.x, figure.y, strict=True))
    # dose 8: 8 / 4 = 2 right at update 40, 2 / e 20 updates later, nothing before it
    assert value[40] == pytest.approx(2, abs=0.1)
    assert value[60] == pytest.approx(2 / np.e, abs=0.1)
    assert value[20] == pytest.approx(0, abs=0.1)
    assert "none is drawn over the step" in forgetting.view.words
    agree(forgetting, table=panel)


def test_empty_choices_say_so_and_keep_the_last_figure(forgetting):
    before = shown(forgetting, "curves")
    for wish, line in (
        ({"groups": ()}, "Texts: none is chosen; choose one or more"),
        ({"groups": ("passage x  2",), "laws": ()}, "Laws: none is chosen; choose one or more"),
    ):
        forgetting.set(**wish)
        forgetting.wait(SECONDS)
        assert forgetting.message == line
        assert shown(forgetting, "curves") == before
    forgetting.set(laws=("power",))
    forgetting.wait(SECONDS)
    assert forgetting.message == "" and shown(forgetting, "curves") != before


def test_a_range_too_short_for_a_law_shows_the_points_and_why(panel, forgetting):
    forgetting.set(span=(0.0, 2.0), groups=("passage x  8",))
    forgetting.wait(SECONDS)
    assert forgetting.message == ""
    assert "it needs at least 5" in forgetting.view.words
    assert shown(forgetting, "laws")["layout"]["title"]["text"].startswith("No law")
    agree(forgetting, table=panel)


def test_points_that_are_held_out_are_hollow_and_time_may_be_even(panel):
    means, fits = by_hand(panel, ["passage x  8"], ["exponential"])
    count = len(means)
    figure = plot_forgetting(means, fits, holdout=0.2, log_x=False)
    dots = next(trace for trace in figure.data if trace.name == "measured")
    # of 16 lags .2 is 3.2, so that 3 are held out, as in fit_forgetting
    ahead = round(0.2 * count)
    assert list(dots.marker.symbol) == ["circle"] * (count - ahead) + ["circle-open"] * ahead
    assert figure.layout.xaxis.type == "linear"
    assert figure.layout.xaxis.title.text == "lag [updates]"
    plainly = plot_forgetting(means, fits)
    assert plainly.layout.xaxis.type == "log"
    assert next(t for t in plainly.data if t.name == "measured").marker.symbol is None


def test_many_lags_are_thinned_and_that_is_said():
    fine = made(items=2, steps=tuple(range(4, 104)), waves=(5,), doses=(4,))
    explorer = explore_forgetting(table=fine).wait(SECONDS)
    lags = [lag for _, lag in explorer.controls["span"].options]
    assert len(lags) <= 40 and lags[0] == 0 and lags[-1] == 98
    assert f"{len(lags)} of the 99 lags" in explorer.view.words
    agree(explorer, table=fine)


def test_whiskers_and_points_are_light_on_a_dark_page(panel):
    means, fits = by_hand(panel, ["passage x  8"], ["exponential"], draws=0)
    shown = go.Figure(themed(plot_forgetting(means, fits), dark=True))
    dots = next(trace for trace in shown.data if trace.error_y.array is not None)
    assert dots.marker.color == "#FFFFFF" and dots.error_y.color == "rgba(255,255,255,0.4)"


def test_one_curve_that_is_refused_leaves_the_fits_of_the_others(panel):
    short = panel[~((panel["dose"] == 2) & (panel["lag"] > 3))]
    explorer = explore_forgetting(table=short).wait(SECONDS)
    assert explorer.message == "" and len(explorer.values["groups"]) == 2
    words = explorer.view.words
    assert words.count("passage x  2: ") == 1 and "fit_forgetting" in words
    _, fits = by_hand(short, ["passage x  8"], list(explorer.values["laws"]))
    assert shown(explorer, "laws") == drawn(plot_laws(fits, metric="weight"))
    agree(explorer, table=short)


# --- the profile ----------------------------------------------------------------------------------


def test_the_heat_map_and_its_row_are_those_of_the_same_calls(panel, profile):
    assert profile.message == ""
    assert profile.values["cohort"] == 10 and profile.values["step"] == 10
    profile.set(cohort=40.0, step=43, dose=8)
    profile.wait(SECONDS)
    mine = panel[(panel["dose"] == 8) | panel["cohort"].isna()]
    cells = memorization_profile(mine.drop(columns=["lag", "copies", "dose"]), base="universal")
    title = "What training caused: passage x8"
    assert shown(profile, "profile") == drawn(plot_profile(cells, chosen=(40, 43), title=title))
    row = cells[cells["cohort"] == 40]
    title = "The chosen row: passage x8, first met at 40"
    assert shown(profile, "event_study") == drawn(
        plot_event_study(row, color="cohort", title=title).update_xaxes(
            title_text="updates since the first exposure (placebo: before it)"
        )
    )
    agree(profile, table=panel)


@pytest.mark.parametrize(("cohort", "step", "base"), [(40, 43, 30), (40, 15, 30), (10, 110, 4)])
def test_the_gains_of_a_cells_texts_average_to_the_cell(panel, cohort, step, base):
    part = panel.drop(columns=["lag", "copies", "dose"])
    cells = memorization_profile(part, base="universal").set_index(["cohort", "step"])
    gains = cell_gains(part, cohort, step, base)
    assert gains["value"].mean() == pytest.approx(cells.loc[(cohort, step), "value"])
    assert len(gains) == cells.loc[(cohort, step), "n"]
    assert gains["value"].is_monotonic_decreasing
    wide = panel.pivot_table(index="item", columns="step", values="value", observed=True)
    first = gains.iloc[0]
    assert first["now"] == wide.loc[first["item"], step]


def test_a_frame_that_moves_leaves_the_map_as_it_is_made_anew(panel, profile):
    for cohort, step in ((10.0, 50), (40.0, 15), (40.0, 30), (10.0, 10)):
        profile.set(cohort=cohort, step=step)
        agree(profile.wait(SECONDS), table=panel)


def test_a_click_chooses_the_cell(profile):
    cells = profile.view.figures["profile"].data[0]
    assert np.asarray(cells.z).shape == (2, len(STEPS))
    profile.figures["profile"]._answer(STEPS.index(43), 1, None)
    profile.wait(SECONDS)
    assert profile.values["cohort"] == 40 and profile.values["step"] == 43
    assert "Cohort 40 at checkpoint 43, 3 updates after it was first met" in profile.view.words
    assert "chosen=(40.0, 43)" in profile.code
    # the checkpoint that the row is compared with is in the map, without an estimate
    profile.set(step=30)
    profile.wait(SECONDS)
    assert profile.message == "" and "nothing to estimate" in profile.view.words


def test_each_cell_of_the_map_tells_what_it_is(panel):
    cells = memorization_profile(panel.drop(columns=["lag", "copies", "dose"]), base="universal")
    told = plot_profile(cells).data[0].customdata
    steps = sorted(set(cells["step"]))
    for row in cells.itertuples():
        here = told[[10, 40].index(row.cohort)][steps.index(row.step)]
        assert list(here[:2]) == [row.cohort, row.step]
        assert list(here[2:]) == pytest.approx([row.lo, row.hi, row.n], nan_ok=True)


def test_a_frame_around_a_cell_and_none_outside_the_map(panel):
    cells = memorization_profile(panel.drop(columns=["lag", "copies", "dose"]), base="universal")
    frame = plot_profile(cells, chosen=(40, 43)).data[-1]
    at = sorted(set(cells["step"])).index(43)
    assert (min(frame.x), max(frame.x), min(frame.y), max(frame.y)) == (
        at - 0.5,
        at + 0.5,
        0.5,
        1.5,
    )
    assert not frame.showlegend and frame.name == "chosen: cohort 40, step 43"
    with pytest.raises(InputError) as caught:
        plot_profile(cells, chosen=(41, 43))
    assert str(caught.value) == "plot_profile: no cell of cohort 41 at step 43 to frame"


def test_many_cohorts_become_those_between_checkpoints_and_no_contrast_changes():
    many = made(items=1, waves=tuple(range(10, 80)), doses=(4,), steps=STEPS)
    never = made(items=4, waves=(), steps=STEPS)
    table = validate(pd.concat([many[many["cohort"].notna()], never], ignore_index=True))
    explorer = explore_profile(table=table).wait(SECONDS)
    assert [g for _, g in explorer.controls["cohort"].options] == [
        10, 11, 12, 15, 20, 30, 40, 41, 43, 50, 60, 80,
    ]  # fmt: skip
    assert "first met between the same two checkpoints" in explorer.view.words
    agree(explorer, table=table)
    fine = memorization_profile(table.drop(columns=["lag", "copies", "dose"]), base="universal")
    # cohorts 13, 14 and 15 are first seen at 15, and equal in size
    before = fine[fine["cohort"].isin([13, 14, 15])].groupby("step")["value"].mean()
    explorer.set(cohort=15.0, step=20)
    explorer.wait(SECONDS)
    assert f"{before[20]:.3f}" in explorer.view.words


def test_exposures_that_no_text_has_keep_the_last_figure():
    two = [
        made(items=3, doses=(2,), kinds=("passage",)),
        made(items=3, doses=(8,), kinds=("canary",)),
    ]
    explorer = explore_profile(table=validate(pd.concat(two, ignore_index=True))).wait(SECONDS)
    before = shown(explorer, "profile")
    explorer.set(dose=8)
    explorer.wait(SECONDS)
    assert explorer.message == "Texts: no passage was trained on 8 times; choose other exposures"
    assert shown(explorer, "profile") == before
    explorer.set(kind="canary")
    explorer.wait(SECONDS)
    assert explorer.message == "" and shown(explorer, "profile") != before


# --- both: where the data come from ---------------------------------------------------------------

BOTH = pytest.mark.parametrize("explore", [explore_forgetting, explore_profile])


@BOTH
def test_on_the_suite_the_code_needs_nothing(tiny, monkeypatch, explore):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tiny.cache))
    monkeypatch.setattr("workbench.subject.load_suite", lambda corpus: tiny.suite)
    suite = tiny.suite
    subject = Subject(suite.checkpoints(), suite.items(), suite.exposures(), suite, "base")
    explorer = explore(subject, prefix=4, suffix=4).wait(SECONDS)
    assert explorer.message == ""
    panel = probe_extraction(subject.source, subject.items, prefix=4, suffix=4)
    panel = align_exposures(panel, subject.exposures)
    again = explore(table=panel).wait(SECONDS)
    assert again.message == ""
    if explore is explore_profile:  # an explorer of a table knows no suite, so no lags of it
        for name in explorer.view.figures:
            assert shown(explorer, name) == shown(again, name)
    agree(explorer, subject=subject)
    called = explorer.code.replace(
        "# subject: the one that was given to the explorer", "subject = load_subject()"
    ).replace("from workbench import", "from workbench import load_subject,")
    for name, figure in run(called).items():
        assert drawn(figure) == shown(explorer, name)


@BOTH
def test_no_suite_is_an_offer(explore):
    explorer = explore().wait(SECONDS)
    assert explorer.message.startswith("explore: the embedded suite is not trained yet")
    assert isinstance(explorer._offer, Offer)


@BOTH
def test_tables_that_cannot_be_used_are_one_line(panel, tmp_path, explore, monkeypatch):
    kept = save(panel, tmp_path / "panel.parquet")
    good = explore(table=kept).wait(SECONDS)
    assert good.message == "" and f"table = load({str(kept)!r})" in good.code
    agree(good)
    monkeypatch.setattr("workbench.table.VERSION", 2)
    message = explore(table=kept).wait(SECONDS).message
    assert message == f"load: {kept} has layout version 1, this is 2; make it again"
    lacking = explore(table=panel.drop(columns="lag")).wait(SECONDS)
    assert lacking.message == (
        "explore: the table has no column 'lag'; it needs kind, dose, cohort, copies, lag, which "
        "align_exposures and the items give"
    )
    assert lacking.view is None
    nothing = explore(table=panel[:0]).wait(SECONDS)
    assert nothing.message == (
        "explore: the table is empty; it needs a row per text and checkpoint"
    )
    alone = explore(table=panel[panel["cohort"].notna()]).wait(SECONDS)
    assert "never" in alone.message  # no controls to compare with
    early = explore(table=panel[panel["step"] == 4]).wait(SECONDS)
    assert early.message and early.view is None  # one checkpoint


@BOTH
def test_a_model_gone_meanwhile_and_one_that_comes_back(tiny, explore):
    suite = tiny.suite
    subject = Subject(suite.checkpoints(), suite.items(), suite.exposures(), suite, "base")
    source, subject.source = subject.source, suite.checkpoints()
    subject.source.places = [(step, "/gone", None) for step, _, _ in source.places]
    explorer = explore(subject, prefix=4, suffix=4).wait(SECONDS)
    assert explorer.message and explorer.view is None
    subject.source = source
    explorer.redraw()
    explorer.wait(SECONDS)
    assert explorer.message == "" and explorer.view is not None
    subject.source.places = [(step, "/gone", None) for step, _, _ in source.places]
    explorer.redraw()  # what was measured stays
    assert explorer.wait(SECONDS).message == ""


@BOTH
def test_items_without_checkpoints_say_what_is_lacking(tiny, explore):
    suite = tiny.suite
    last = suite.checkpoints().select(suite.checkpoints().steps[-1:])
    subject = Subject(last, suite.items(), suite.exposures(), suite, "base")
    explorer = explore(subject, prefix=4, suffix=4).wait(SECONDS)
    assert "One checkpoint: no causal profile and no forgetting curve" in explorer.message
    assert "\n" not in explorer.message


@BOTH
def test_two_explorers_at_once_do_not_mix(panel, explore):
    other = validate(panel.assign(value=panel["value"] - 1))
    first, second = explore(table=panel), explore(table=other)
    first.wait(SECONDS), second.wait(SECONDS)
    if explore is explore_forgetting:
        for explorer in (first, second):
            explorer.set(laws=("exponential",), draws=0)
        first.wait(SECONDS), second.wait(SECONDS)
    agree(first, table=panel)
    agree(second, table=other)


def test_scoring_is_told_and_ends_between_two_checkpoints(tiny):
    suite = tiny.suite
    subject = Subject(suite.checkpoints(), suite.items(), suite.exposures(), suite, "base")
    told = []
    work = Work(lambda what, share: told.append(what))
    measured = Measured(subject, prefix=4, suffix=4)
    reached = threading.Event()

    def tell(what, share):
        told.append(what)
        if what.startswith("scoring") and len(told) > 3:
            reached.set()
            work.stop()

    work._tell = tell
    with pytest.raises(Stopped):
        measured.read(work)
    assert reached.is_set() and measured.outcome is None
    assert len([each for each in told if each.startswith("scoring")]) < len(subject.source.steps)
    assert measured.read(Work(lambda *_: None)) is measured.outcome


def test_checkpoints_that_are_watched_are_the_same(tiny):
    source = tiny.suite.checkpoints()
    watched = Watched(source, Work(lambda *_: None))
    assert watched.steps == source.steps and watched.fingerprint() == source.fingerprint()
    assert [model.step for model in watched] == source.steps


def test_what_came_from_data_is_no_mark_up(panel, tmp_path):
    assert "<b>" not in html_table(["<b>"], [["<b>"]])
    assert plain([0.0, 2.5, 1234567.0]) == "[0, 2.5, 1234567]"
    named = panel.assign(kind="<img src=x>")
    for explore in (explore_forgetting, explore_profile):
        explorer = explore(table=validate(named)).wait(SECONDS)
        assert isinstance(explorer.view, View) and "<img" not in explorer.view.words


@BOTH
def test_every_control_says_what_it_is_and_takes_keys(panel, explore):
    for name, control in explore(table=panel).wait(SECONDS).controls.items():
        assert control.description and control.tooltip, name
        assert control._view_name in (
            "DropdownView",
            "SelectMultipleView",
            "SelectionSliderView",
            "SelectionRangeSliderView",
            "FloatSliderView",
        )
