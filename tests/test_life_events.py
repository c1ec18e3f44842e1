"""When texts were learned and lost, and the two figures about single texts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.plots.items import plot_life_lines, plot_two_clocks
from workbench.probes.extraction import probe_extraction
from workbench.stats.life_events import life_events
from workbench.table import InputError, rows, validate

STEPS = [0, 10, 20, 30, 40]


def lives(histories: dict, metric="extractable", steps=STEPS, **columns) -> pd.DataFrame:
    parts = [
        rows(metric, values, run="r", step=steps, item=item, group="seen")
        for item, values in histories.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    for name, values in columns.items():
        table[name] = table["item"].map(values)
    return table


def told(events: pd.DataFrame) -> dict:
    found = {}
    for item, part in events.sort_values("number").groupby("item", observed=True):
        found[str(item)] = [
            (e, v, lo)
            for e, v, lo in zip(
                part["event"].astype(str),
                part["value"].fillna(-1),
                part["lo"].fillna(-1),
                strict=True,
            )
        ]
    return found


def test_events_by_hand():
    table = lives({"a": [0, 1, 0, 0, 1], "b": [1, 1, 1, 1, 1], "c": [0, 1, 1, 0, 0]})
    got = validate(life_events(table))
    # a is known at 10, not at 20, known again at 40, the end; b from the first checkpoint on, so
    # that nothing bounds its learning from below
    assert told(got) == {
        "a": [("learned", 10, 0), ("lost", 20, 10), ("relearned", 40, 30), ("kept", 40, 30)],
        "b": [("learned", 0, -1), ("kept", 40, 30)],
        "c": [("learned", 10, 0), ("lost", 30, 20)],
    }
    assert (got["hi"] == got["value"]).all() and (got["step"] == got["value"]).all()
    assert (got["reason"] == "").all()
    assert got.attrs["rule"] == "reproduced word for word"
    # the order of rows is nothing
    again = life_events(table.sample(frac=1, random_state=0))
    assert told(again) == told(got)


def test_never_known():
    got = life_events(lives({"a": [0, 0, 0, 0, 0]}, copies={"a": 3})).iloc[0]
    assert (got["event"], got["step"], got["number"]) == ("never", 40, 1)
    assert np.isnan(got["value"]) and got["reason"] == "at no checkpoint reproduced word for word"
    assert "copies" not in got.index  # changes along the run


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=12))
def test_events_against_a_loop(history):
    steps = list(range(0, 10 * len(history), 10))
    got = told(life_events(lives({"a": [float(h) for h in history]}, steps=steps)))["a"]
    want, before = [], False
    for place, known in enumerate(history):
        earlier = steps[place - 1] if place else -1
        if known and not before:
            again = any(e == "learned" for e, *_ in want)
            want.append(("relearned" if again else "learned", steps[place], earlier))
        if before and not known:
            want.append(("lost", steps[place], earlier))
        before = known
    if before:
        want.append(("kept", steps[-1], steps[-2]))
    assert got == (want or [("never", -1, -1)])


def test_a_score_is_held_against_the_controls():
    # of 21 controls at 0, .05, ..., 1 the 95 % quantile is .95 (the 20th of 21), at step 1 of kind
    # y 1.95; equal to it is not above
    controls = [
        rows(
            "log_probability", np.linspace(0, 1, 21) + shift - 5, run="r", step=step,
            group="never", item=[f"{kind}{i}" for i in range(21)], beside={"kind": kind},
        )
        for kind, step, shift in (("x", 0, 0), ("x", 1, 0), ("y", 0, 0), ("y", 1, 1))
    ]  # fmt: skip
    mine = [
        rows(
            "log_probability", np.array(values) - 5, run="r", step=[0, 1], item=item,
            group="seen", beside={"kind": kind},
        )
        for item, kind, values in (("a", "x", [0.95, 0.96]), ("b", "y", [0.96, 1.9]))
    ]  # fmt: skip
    table = pd.concat([*controls, *mine], ignore_index=True)
    got = life_events(table)
    events = told(got)
    assert events["a"] == [("learned", 1, 0), ("kept", 1, 0)]
    assert events["b"] == [("learned", 0, -1), ("lost", 1, 0)]
    # one control in twenty-one is above by the quantile's own definition
    assert events["x20"] == [("learned", 0, -1), ("kept", 1, 0)]
    assert events["x19"][0][0] == "never"
    assert got.attrs["rule"] == "better than 95% of the controls"
    # without the kinds all controls of a step are one: b at 1.9 is below theirs
    alone = told(life_events(table, strata=()))
    assert alone["a"][0][0] == "never"
    # a score that is better low is turned round
    low = table.assign(metric="loss", value=-table["value"])
    assert told(life_events(low)) == events


def test_on_real_passes(tiny):
    suite = tiny.suite
    panel = probe_extraction(suite.checkpoints("base"), suite.items("base"), prefix=4, suffix=12)
    table = panel[panel["metric"] == "log_probability"]
    got = life_events(table)
    items = suite.items("base").set_index("item")
    never = items.index[items["group"] == "never"]
    first = got[got["number"] == 1].set_index("item")["event"].astype(str)
    assert set(first.index) == set(items.index)
    # by a plain loop: known steps of each item
    for item in items.index:
        bars = []
        for step, here in table.groupby("step"):
            alike = here[here["item"].isin(never) & (here["kind"] == items.loc[item, "kind"])][
                "value"
            ]
            mine = here.loc[here["item"] == item, "value"].iloc[0]
            bars.append((step, mine > np.quantile(alike, 0.95)))
        known = [step for step, above in bars if above]
        mine = got[got["item"] == item].sort_values("number")
        if known:
            assert mine["value"].iloc[0] == known[0], item
        else:
            assert mine["event"].iloc[0] == "never"
        assert (mine["event"].iloc[-1] == "kept") == bars[-1][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: pd.concat([t, t.assign(metric="top1")]),
            "life_events: needs rows of one metric, got extractable, top1; select one first",
        ),
        (
            lambda t: t.assign(value=t["value"].where(t["step"] != 20)),
            "life_events: 1 values are missing (first: item a at step 20); leave those items out",
        ),
        (
            lambda t: pd.concat([t.assign(prefix=k) for k in (1, 2)]),
            "life_events: item a has several rows at step 0 of r; select one",
        ),
        (
            lambda t: t[t["step"] == 0],
            "life_events: run r has one checkpoint; events need two or more",
        ),
        (
            lambda t: t.assign(metric="log_probability", value=-1.0),
            "life_events: no rows of group never or unseen to compare a score with; name the "
            "controls, or give verdicts such as extractable",
        ),
        (
            lambda t: t.assign(metric="outcome"),
            "life_events: outcome is neither better high nor low",
        ),
        (
            lambda t: pd.concat(
                [
                    t.assign(kind="x"),
                    t.assign(kind="y", group="never", item="n"),
                ]
            ).assign(metric="log_probability", value=-1.0),
            "life_events: no controls at run=r, step=0, kind=x; leave those rows out",
        ),
    ],
)
def test_errors(change, message):
    with pytest.raises(InputError) as raised:
        life_events(change(lives({"a": [0, 1, 0, 0, 1]})))
    assert str(raised.value) == message


# --- figures ---------------------------------------------------------------------------------


def drawn(kinds=None):
    events = life_events(
        lives(
            {"a": [0, 1, 0, 0, 1], "b": [1, 1, 1, 1, 1], "c": [0, 0, 0, 0, 0]},
            kind=kinds or {"a": "<k>", "b": "l", "c": "l"},
        )
    )
    items = pd.DataFrame({"item": ["a", "b", "c"], "text": ["<b>bold</b>", "two", "three"]})
    ledger = pd.DataFrame({"update": [5, 9, 7], "item": ["a", "a", "elsewhere"]})
    return events, items, ledger


def test_life_lines_draw_the_events():
    events, items, ledger = drawn()
    figure = plot_life_lines(events, items=items, exposures=ledger)
    lines = {(t.name, t.line.width): t for t in figure.data if t.mode == "lines"}
    # b is known first (row 0), then a (row 1); c never, last
    assert list(figure.layout.yaxis.ticktext) == ["b", "a", "c"]
    thick = lines["&lt;k&gt;", 6]
    # a: known at 10 alone (lost by 20), and at 40 alone
    assert list(thick.x) == [10, 10, None, 40, 40, None] and set(thick.y) == {1, None}
    assert list(lines["&lt;k&gt;", 1].x) == [10, 20, None]  # where it was lost is not known better
    assert list(lines["l", 6].x) == [0, 40, None] and list(lines["l", 6].y) == [0, 0, None]
    ticks = figure.data[0]
    assert list(ticks.x) == [5, 9] and {round(y, 2) for y in ticks.y} == {1.36}
    marks = {t.name: t for t in figure.data if t.mode == "markers"}
    assert list(marks["relearned"].x) == [40] and list(marks["lost"].y) == [1]
    assert "&lt;b&gt;bold&lt;/b&gt;" in str(marks["lost"].customdata)


def test_life_lines_errors():
    events, _, _ = drawn()
    with pytest.raises(InputError) as raised:
        plot_life_lines(pd.concat([events, events.assign(run="s")]))
    assert str(raised.value) == "plot_life_lines: needs events of one run, got r, s; select one"
    many = life_events(lives({f"i{n}": [0, 1, 1, 1, 1] for n in range(61)})).assign(kind="k")
    with pytest.raises(InputError) as raised:
        plot_life_lines(many)
    assert str(raised.value) == "plot_life_lines: 61 items, 60 can be read; select some"
    with pytest.raises(InputError) as raised:
        plot_life_lines(events, color="colour")
    assert str(raised.value).startswith("plot_life_lines: events have no column 'colour'; ")


def clocks() -> pd.DataFrame:
    return rows(
        "extractable", [0.0, 0.5, 0.2, 0.0, 0.1, 0.9, 0.0, 0.0, 0.1], run="r",
        step=[0, 10, 20] * 3, lo=0.0, hi=1.0, n=[4] * 3 + [6] * 3 + [8] * 3,
        beside={"cohort": [5.0] * 3 + [15.0] * 3 + [np.nan] * 3},
    )  # fmt: skip


def test_two_clocks_draw_the_table():
    figure = plot_two_clocks(clocks().sample(frac=1, random_state=0))
    heat = figure.data[0]
    np.testing.assert_allclose(np.array(heat.z, float), [[0, 0.5, 0.2], [0, 0.1, 0.9], [0, 0, 0.1]])
    assert list(figure.layout.yaxis.ticktext) == ["5 (n=4)", "15 (n=6)", "never (n=8)"]
    assert (heat.zmin, heat.zmax) == (0, 1)  # a share has its own range
    # cohort 5 begins between checkpoints 0 and 10, cohort 15 between 10 and 20; never has no edge
    assert [(s.x0, s.y0) for s in figure.layout.shapes] == [(0.5, -0.5), (1.5, 0.5)]
    with pytest.raises(InputError) as raised:
        plot_two_clocks(pd.concat([clocks(), clocks().assign(group="b")]))
    assert str(raised.value) == (
        "plot_two_clocks: several rows per (cohort, step); summarise first"
    )
    with pytest.raises(InputError) as raised:
        plot_two_clocks(clocks(), learned="wave")
    assert str(raised.value).startswith("plot_two_clocks: rows have no column 'wave'; ")
