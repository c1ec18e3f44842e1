"""Single texts along a run: when each was known, and what the model makes of it at any step."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pprint import pformat

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Int

from workbench.decoys import KINDS, make_decoys
from workbench.explore.measured import Watched, without_attrs
from workbench.explore.shell import Explorer, View, Work, subject_of
from workbench.items import load_items
from workbench.plots import plot_curve, plot_life_lines
from workbench.plots.style import GREY
from workbench.probes.exposure import probe_exposure
from workbench.probes.extraction import edit_similarity, probe_extraction, verbatim_length
from workbench.stats.exposure import align_exposures
from workbench.stats.life_events import life_events
from workbench.stats.summarise import summarise
from workbench.subject import Subject
from workbench.table import METRICS, InputError, load, validate

FIGURES = ("lives", "course")
CONTROLS = ("never", "unseen")  # groups of texts that were never trained on
LINES = 16  # lives below one another; more would push the text itself off the screen
LISTED = 200  # texts to pick from; a page takes longer to list thousands than to search them
LABEL = 44  # characters of a text that name it in the list
PAUSE = 0.15  # seconds a slider must rest before decoys are scored for where it stands
ANY = ""
RIGHT, WRONG = "rgba(0,114,178,.28)", "rgba(213,94,0,.22)"  # readable on light and on dark pages
_PARAGRAPH = "<p style='margin:4px 0'>"
_CELL = (
    "display:inline-block; white-space:pre; text-align:center; margin:1px 1px 4px; padding:0 3px;"
    "border-radius:2px; border-bottom:2px {line}; background:{shade}; line-height:1.35;"
)


def explore_items(
    model: str | Subject = "suite",
    items: str = "",
    corpus: str = "",
    *,
    run: str = "base",
    table: str | pd.DataFrame = "",
    prefix: int = 16,
    suffix: int = 16,
    decoys: str | pd.DataFrame = "",
    count: int = 255,
    seed: int = 0,
) -> Explorer:
    """Life lines of single texts, and one of them at any checkpoint.

    Texts are picked by what stands in them, kind, group and number of copies. Of the one chosen
    are shown: its score beside that of controls, the extraction verdict, the rank among decoys, and
    the greedy continuation beside the truth, token by token. A click on a mark of a life line goes
    to that text and checkpoint.

    Args:
        model, items, corpus, run: As :func:`load_subject`; ``model`` may be a subject.
        table: A panel of these items, or the file that ``save`` wrote it to; what
            ``probe_extraction`` gives is asked of the model where there is none.
        prefix, suffix: Tokens of the prompt and of the continuation.
        decoys: As ``probe_exposure``: a file that ``load_items`` reads, or a frame. Empty:
            ``make_decoys``, for canaries and biographies.
        count: Decoys of a kind that are made.
        seed: Of decoys and bootstrap draws.
    """
    tall = {"width": "max-content"}
    controls = {
        "search": widgets.Text(
            description="find", placeholder="part of a text or its name, then Enter",
            continuous_update=False, tooltip="Texts that hold this, in any case of letters",
        ),
        "kind": widgets.Dropdown(description="kind", tooltip="Kind of text", layout=tall),
        "group": widgets.Dropdown(
            description="group", tooltip="What the run did with the texts", layout=tall
        ),
        "copies": widgets.Dropdown(
            description="copies", tooltip="How often a text is in the training data", layout=tall
        ),
        "item": widgets.Dropdown(
            description="text", tooltip="The text shown below; arrow keys go through the list"
        ),
        "known": widgets.Dropdown(
            description="known if", tooltip="When a life line is drawn thick", layout=tall
        ),
        "measure": widgets.Dropdown(
            description="measure", tooltip="Drawn over training for the text", layout=tall
        ),
        "step": widgets.SelectionSlider(
            options=[("first", 0), ("last", 1)], description="checkpoint", continuous_update=True,
            tooltip="The checkpoint at which the text is shown; arrow keys move it",
            layout={"display": "none", "width": "26em"},
        ),
        "ranks": widgets.Checkbox(
            description="rank among decoys", indent=False, layout=tall,
            tooltip="Score decoys at the checkpoint too, which takes longer",
        ),
    }  # fmt: skip
    panel = _Panel(
        model, items, corpus, run=run, table=table, prefix=prefix, suffix=suffix, decoys=decoys,
        count=count, seed=seed,
    )  # fmt: skip

    def draw(values: dict, work: Work) -> View:
        panel.prepare(work)
        if not controls["measure"].options:
            panel.fill(controls)  # each asks for a redraw, which finds everything at hand
            values = {name: control.value for name, control in controls.items()}
        return panel.view(values, work)

    def refill(_) -> None:
        explorer = panel.explorer
        if explorer and controls["measure"].options:
            with explorer.quietly():
                panel.fill_items(controls)

    for name in ("search", "kind", "group", "copies"):
        controls[name].observe(refill, "value")
    panel.explorer = Explorer("Lives of single texts", controls, draw, figures=FIGURES)
    panel.explorer.on_click("lives", panel.go_to)
    panel.explorer.on_click("course", lambda x, y, trace: panel.go_to(x, None, trace))
    return panel.explorer


@dataclass
class _Panel:
    """What is asked of the model, each thing once, and the view of it."""

    model: str | Subject
    items_file: str
    corpus: str
    run: str
    table: str | pd.DataFrame
    prefix: int
    suffix: int
    decoys: str | pd.DataFrame
    count: int
    seed: int
    explorer: Explorer | None = None
    subject: Subject | None = None
    _memory: dict = field(default_factory=dict)
    _drawn: dict = field(default_factory=dict)
    _followed: tuple = ((), None)  # the lives shown last, and their events

    # --- asked once --------------------------------------------------------------------------

    def prepare(self, work: Work) -> None:
        """Load, and score all texts at all checkpoints, where that was not done.

        Raises:
            InputError: What the loaders and ``probe_extraction`` refuse, or a table of other texts.
        """
        if self.subject:
            return
        work.step("loading", 0.0, shared=True)
        subject = subject_of(self.model, self.items_file, self.corpus, run=self.run)
        self.source = subject.source
        if isinstance(self.table, str) and not self.table:
            watched = Watched(subject.source, work)
            panel = probe_extraction(watched, subject.items, prefix=self.prefix, suffix=self.suffix)
        else:
            panel = load(self.table) if isinstance(self.table, str) else validate(self.table)
            panel = self._of_table(panel, subject)
        if "lag" not in panel.columns:
            panel = align_exposures(panel, subject.exposures)
        work.step("ordering", 1.0, shared=True)
        self._index(panel, subject)
        self.subject = subject

    def _of_table(self, panel: pd.DataFrame, subject: Subject) -> pd.DataFrame:
        known = panel["item"].isin(set(subject.items["item"].astype(str)))
        if not known.any():
            raise InputError(
                f"explore_items: none of the {panel['item'].nunique()} texts of the table is among "
                f"the {len(subject.items)} items; give the items it was made of"
            )
        for name in ("prefix", "suffix"):
            asked = sorted(panel[name].unique()) if name in panel else []
            if len(asked) > 1:
                raise InputError(
                    f"explore_items: the table has rows of {name} {', '.join(map(str, asked))}; "
                    "select one"
                )
            if asked:
                setattr(self, name, int(asked[0]))
        return panel[known]

    def _index(self, panel: pd.DataFrame, subject: Subject) -> None:
        self.panel = panel = without_attrs(panel)
        self.steps = sorted(panel["step"].unique().tolist())
        there = set(panel["item"].cat.categories)
        texts = subject.items.assign(item=subject.items["item"].astype(str))
        texts = texts[texts["item"].isin(there)]
        self.dropped = len(subject.items) - len(texts)
        for name, value in (("kind", "text"), ("dose", 0)):
            if name not in texts:
                texts = texts.assign(**{name: value})
        texts = texts.assign(dose=texts["dose"].fillna(0).astype(int))
        # most copies first: what there is to see comes before what there is not
        texts = texts.sort_values(["dose", "kind", "item"], ascending=[False, True, True])
        self.texts = texts.set_index("item", drop=False)
        self.lower = (texts["item"] + "\n" + texts["text"]).str.lower().tolist()
        self.controlled = bool(set(panel["group"].cat.categories) & set(CONTROLS))
        one_each = panel.groupby("metric", observed=True)["step"].size()
        self.measures = [key for key in one_each.index.astype(str) if METRICS[key].better]
        if not self.measures:
            raise InputError("explore_items: the table has no metric that is better high or low")
        self.known = [k for k in self.measures if self._is_verdict(k) or self.controlled]

    def _is_verdict(self, key: str) -> bool:
        metric = METRICS[key]
        share = (metric.low, metric.high) == (0.0, 1.0)
        return share and self._once(
            ("verdict", key), lambda: _all_or_nothing(self.rows(key)["value"])
        )

    def rows(self, key: str) -> pd.DataFrame:
        """The panel's rows of one metric."""
        return self._once(("rows", key), lambda: self.panel[self.panel["metric"] == key])

    def _once(self, key: tuple, make):
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]

    # --- controls ------------------------------------------------------------------------------

    def fill(self, controls: dict[str, widgets.Widget]) -> None:
        """Give the controls the options that the data have."""
        groups = sorted(self.texts["group"].astype(str).unique())
        doses = sorted(self.texts["dose"].unique().tolist())
        kinds = sorted(self.texts["kind"].astype(str).unique())
        for name, found in (("kind", kinds), ("group", groups), ("copies", doses)):
            controls[name].options = [("all", ANY), *((str(value), value) for value in found)]
            controls[name].value = ANY
        if "seen" in groups and len(groups) > 1:
            controls["group"].value = "seen"
        self.fill_items(controls)
        controls["known"].options = [(self._rule(key), key) for key in self.known]
        if self.known:
            first = "extractable" if "extractable" in self.known else self.known[0]
            controls["known"].value = first
        ranked = ["exposure"] if self._rankable() else []
        if len(self.steps) > 1:
            controls["step"].options = [(str(step), step) for step in self.steps]
            controls["step"].value = self.steps[-1]
            controls["step"].layout.display = None
        controls["ranks"].value = bool(ranked)
        controls["ranks"].disabled = not ranked
        options = [(METRICS[key].label, key) for key in [*self.measures, *ranked]]
        start = "log_probability" if "log_probability" in self.measures else self.measures[0]
        # the last, for it says that all are filled
        controls["measure"].options = options
        controls["measure"].value = start

    def _rule(self, key: str) -> str:
        label = METRICS[key].label
        return label if self._is_verdict(key) else f"{label}: better than 95 % of controls"

    def _rankable(self) -> bool:
        given = not isinstance(self.decoys, str) or bool(self.decoys)
        return given or bool(set(self.texts["kind"]) & set(KINDS))

    def fill_items(self, controls: dict[str, widgets.Widget]) -> None:
        """List the texts that match, and keep the one chosen if it does."""
        names = self.matching({name: control.value for name, control in controls.items()})
        # the first ones too, whose lives are drawn and can be clicked
        names = [*names[:LINES], *_spread(names[LINES:], LISTED - LINES)]
        chosen = controls["item"].value
        few = self.texts.loc[names, ["dose", "text"]]
        controls["item"].options = [
            (f"{name} · {dose} copies · {' '.join(text.split())[:LABEL]}", name)
            for name, dose, text in zip(names, few["dose"], few["text"], strict=True)
        ]
        if names:
            controls["item"].value = chosen if chosen in names else names[0]

    def matching(self, values: dict) -> list[str]:
        """Names of the texts that pass all filters, those with most copies first."""
        passed = np.ones(len(self.texts), dtype=bool)
        for name, column in (("kind", "kind"), ("group", "group"), ("copies", "dose")):
            if values[name] not in (ANY, None):
                passed &= (self.texts[column] == values[name]).to_numpy()
        wanted = values["search"].strip().lower()
        if wanted:
            passed &= np.array([wanted in text for text in self.lower])
        return self.texts.index[passed].tolist()

    def go_to(self, x, y, trace) -> None:
        """Choose the checkpoint nearest to what was clicked, and its text."""
        explorer = self.explorer
        wish = {"step": min(self.steps, key=lambda step: abs(step - x))}
        if y is not None:
            rows = explorer.view.figures["lives"].layout.yaxis.ticktext
            wish["item"] = html.unescape(rows[int(np.clip(round(y), 0, len(rows) - 1))])
        explorer.set(**{name: value for name, value in wish.items() if len(self.steps) > 1})

    # --- the view ------------------------------------------------------------------------------

    def view(self, values: dict, work: Work) -> View:
        """What the controls ask for.

        Raises:
            InputError: No text passes the filters.
        """
        names = self.matching(values)
        if not names:
            told = [
                f"{n} {values[n]!r}" for n in ("search", "kind", "group", "copies") if values[n]
            ]
            raise InputError(
                f"explore_items: no text has {', '.join(told)}; widen one of them. "
                "What is shown belongs to the last filter that had texts."
            )
        name = values["item"] if values["item"] in set(names) else names[0]
        step = values["step"] if len(self.steps) > 1 else self.steps[0]
        lives = names[:LINES]
        lives = lives if name in lives else [name, *lives[:-1]]
        figures: dict[str, go.Figure] = {}
        code = _Code(self, name, step)
        if len(self.steps) > 1 and values["known"]:
            shown = (values["known"], *lives)
            if self._followed[0] != shown:
                self._followed = (shown, self._events(values["known"], lives))
            events = self._followed[1]
            work.step("drawing")
            figures["lives"] = self._figure(
                "lives",
                shown,
                step,
                lambda: plot_life_lines(
                    events,
                    items=self.subject.items,
                    exposures=self.subject.exposures,
                    title=f"When texts were known: {events.attrs['rule']}",
                ),
            )
            code.lives(values["known"], lives, events.attrs["rule"])
        measure = values["measure"]
        title = f"{name}: {METRICS[measure].label}"
        figures["course"] = self._figure(
            "course",
            (measure, name),
            step,
            lambda: plot_curve(self._course(measure, name, work), title=html.escape(title)),
        )
        code.course(measure, title)
        work.show(figures)  # the scores below may take a pass through the model
        words = [self._count(names, lives, figures), self._about(name, step)]
        words.append(self._scores(name, step, values["ranks"], work))
        return View(figures, "".join(words), code.text())

    def _figure(self, name: str, key: tuple, step: int, make) -> go.Figure:
        """The figure with the checkpoint marked; while only that moves, the last one is kept."""
        if self._drawn.get(name, ((), None))[0] != key:
            figure = make().add_vline(x=step, line={"dash": "dot", "color": GREY})
            self._drawn[name] = (key, figure)
        figure = self._drawn[name][1]
        figure.layout.shapes[-1].update(x0=step, x1=step)
        return figure

    def _events(self, key: str, lives: list[str]) -> pd.DataFrame:
        """Of these texts alone: to follow all texts of a large panel takes seconds."""
        rows = self.rows(key)
        needed = rows["item"].isin(lives)
        verdict = self._is_verdict(key)
        if not verdict:
            needed |= rows["group"].isin(CONTROLS)
        few = rows[needed]
        # scores that happen to be all 0 or 1 here would be read as verdicts
        if rows["value"].isna().any() or _all_or_nothing(few["value"]) != verdict:
            few = rows
        events = life_events(few, control=CONTROLS)
        return events[events["item"].isin(lives)]

    def _course(self, key: str, name: str, work: Work) -> pd.DataFrame:
        if key == "exposure":
            parts = []
            for number, step in enumerate(self.steps):
                work.step(f"ranking among decoys, checkpoint {step}", number / len(self.steps))
                parts.append(self._ranks(self._kind(name), step))
            ranked = pd.concat(parts, ignore_index=True)
            mine = ranked[(ranked["metric"] == "exposure") & (ranked["item"] == name)]
            # no upper bound where no decoy is likelier
            return mine.assign(group=name, hi=mine["hi"].where(np.isfinite(mine["hi"])))
        rows = self.rows(key)
        mine = rows[rows["item"] == name].assign(group=name)
        return pd.concat([mine, self._controls(key, self._kind(name))], ignore_index=True)

    def _controls(self, key: str, kind: str) -> pd.DataFrame:
        def pooled() -> pd.DataFrame:
            rows = self.rows(key)
            rows = rows[rows["group"].isin(CONTROLS)]
            if "kind" in rows:
                rows = rows[rows["kind"] == kind]
            by = ["run", "step", "group", "metric"]
            return summarise(rows, by=by, seed=self.seed) if len(rows) else rows

        return self._once(("controls", key, kind), pooled)

    def _kind(self, name: str) -> str:
        return str(self.texts.at[name, "kind"])

    def _ranks(self, kind: str, step: int) -> pd.DataFrame:
        def ranked() -> pd.DataFrame:
            model = self.source.at(step)
            kindred = self.subject.items[self.subject.items["kind"] == kind]
            others = self._once(("decoys", kind), lambda: self._decoys(kindred, model.tokenizer))
            return probe_exposure(model, kindred, decoys=others, seed=self.seed)

        return self._once(("ranks", kind, step), ranked)

    def _decoys(self, kindred: pd.DataFrame, tokenizer) -> pd.DataFrame:
        if isinstance(self.decoys, str):
            if self.decoys:
                return load_items(self.decoys)
            return make_decoys(kindred, self.count, tokenizer=tokenizer, seed=self.seed)
        return self.decoys

    # --- words ---------------------------------------------------------------------------------

    def _count(self, names: list[str], lives: list[str], figures: dict) -> str:
        told = f"{len(names):,} of {len(self.texts):,} texts match"
        if len(names) > LISTED:
            told += f"; {LISTED} of them, spread by copies, are in the list"
        if "lives" not in figures:
            why = "one checkpoint" if len(self.steps) < 2 else "no controls to hold scores against"
            told += f"; no life lines: {why}"
        elif len(names) > len(lives):
            told += (
                f"; the lives of {len(lives)} with most copies, and of the one chosen, are drawn"
            )
        if self.dropped:
            told += f". {self.dropped} texts shorter than asked for have no scores"
        return f"{_PARAGRAPH}{told}.</p>"

    def _about(self, name: str, step: int) -> str:
        one = self.texts.loc[name]
        told = f"<h4 style='margin:.4em 0'>{html.escape(name)} at checkpoint {step}</h4>"
        about = f"{one['kind']}, {one['group']}"
        row = self.panel[(self.panel["item"] == name) & (self.panel["step"] == step)]
        if len(self.subject.exposures) and len(row):
            so_far, lag = int(row["copies"].iloc[0]), row["lag"].iloc[0]
            about += f"; trained on {so_far} of {one['dose']} times so far"
            about += f", last {lag:g} updates ago" if so_far else ""
        return f"{told}{_PARAGRAPH}{html.escape(about)}.</p>"

    def _scores(self, name: str, step: int, ranks: bool, work: Work) -> str:
        lines = []
        row = self.panel[(self.panel["item"] == name) & (self.panel["step"] == step)]
        value = dict(zip(row["metric"].astype(str), row["value"], strict=True))
        for key in self.measures:
            if key in value and key != "extractable":
                lines.append((METRICS[key].label, self._beside(key, name, step, value[key])))
        if "extractable" in value:
            said = "✓ yes" if value["extractable"] == 1 else "✗ no"
            lines.insert(0, ("said word for word", said))
        if ranks:
            lines.append(("rank among decoys", self._rank(name, step, work)))
        work.step("continuing the text")
        try:
            continued = self._continued(name, step)
        except (InputError, OSError) as error:  # the model was moved: what was scored still stands
            why = html.escape(" ".join(str(error).split()))
            continued = f"{_PARAGRAPH}⚠ No continuation: {why}</p>"
        told = "".join(
            f"<tr><th scope='row' style='text-align:left; padding-right:1em'>{html.escape(what)}"
            f"</th><td style='text-align:left'>{html.escape(value)}</td></tr>"
            for what, value in lines
        )
        return f"{continued}<table style='border-spacing:0; line-height:1.4'>{told}</table>"

    def _beside(self, key: str, name: str, step: int, value: float) -> str:
        unit = METRICS[key].unit
        told = f"{value:.3g} {unit}".strip()
        pooled = self._controls(key, self._kind(name))
        for _, control in pooled[pooled["step"] == step].iterrows():
            told += (
                f" ({control['group']} texts of its kind: {control['value']:.3g}, "
                f"{control['lo']:.3g} to {control['hi']:.3g}, n={control['n']})"
            )
        return told

    def _rank(self, name: str, step: int, work: Work) -> str:
        kind = self._kind(name)
        if ("ranks", kind, step) not in self._memory:
            work.step(f"ranking among decoys, checkpoint {step}")
            time.sleep(PAUSE)
            work.step()
        try:
            ranked = self._ranks(kind, step)
        except (InputError, OSError) as error:
            return f"none: {' '.join(str(error).split())}"
        mine = ranked[(ranked["metric"] == "exposure") & (ranked["item"] == name)]
        if mine.empty:
            return "none: it is among the decoys"
        bits, of = mine["value"].iloc[0], int(mine["candidates"].iloc[0])
        place = round(of / 2**bits)
        least = "at least " if math.isinf(mine["hi"].iloc[0]) else ""
        return f"{place} of {of} (exposure {least}{bits:.2f} bits; 1.44 on average without memory)"

    def _continued(self, name: str, step: int) -> str:
        prompt, truth, said, decode = self._once(
            ("said", name, step), lambda: self._generate(name, step)
        )
        right = said == truth
        told = (
            f"{right.sum()} of {len(truth)} tokens in place, the first "
            f"{verbatim_length(said[None], truth[None])[0]} before a miss; edit similarity "
            f"{edit_similarity(said, truth):.2f}"
        )
        return (
            f"{_PARAGRAPH}<b>Prompt</b> <span style='white-space:pre-wrap'>"
            f"{html.escape(decode(prompt))}</span></p>"
            f"{_PARAGRAPH}<b>Greedy continuation</b>: {told}. Above what the text says, below "
            "what the model says; ✓ the same token, ✗ another.</p>"
            + _beside_each_other(truth, said, decode)
        )

    def _generate(self, name: str, step: int):
        model = self.source.at(step)
        tokens = model.encode([self.texts.at[name, "text"]])[0]
        if len(tokens) < self.prefix + self.suffix:
            raise InputError(
                f"it has {len(tokens)} tokens, {self.prefix} + {self.suffix} were asked for"
            )
        prompt, truth = np.split(tokens[: self.prefix + self.suffix], [self.prefix])
        return prompt, truth, model.generate(prompt[None], self.suffix)[0], model.decode


def _all_or_nothing(value: pd.Series) -> bool:
    return bool(value.isin([0.0, 1.0]).all())


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most so many of them, evenly spread over their order."""
    if len(names) <= most:
        return list(names)
    return [names[place] for place in np.linspace(0, len(names) - 1, most).round().astype(int)]


def _beside_each_other(
    truth: Int[np.ndarray, " suffix"], said: Int[np.ndarray, " suffix"], decode
) -> str:
    """Truth over what was said, token by token; equal ones are coloured, ruled and ticked."""
    cells = []
    for place, (true, own) in enumerate(zip(truth, said, strict=True), 1):
        same = true == own
        style = _CELL.format(
            line="solid currentColor" if same else "dotted currentColor",
            shade=RIGHT if same else WRONG,
        )
        above, below = (
            html.escape(decode(np.array([token]))).replace("\n", "⏎") for token in (true, own)
        )
        mark, word = ("✓", "the same") if same else ("✗", "another")
        cells.append(
            f"<span style='{style}' title='token {place}: {word}'>{above}<br>"
            f"{below if same else f'<i>{below}</i>'}<br>{mark}</span>"
        )
    return f"<div>{''.join(cells)}</div>"


@dataclass
class _Code:
    """The calls that make the figures of a view, as text."""

    panel: _Panel
    name: str
    step: int
    _parts: list[str] = field(default_factory=list)

    def lives(self, key: str, names: list[str], rule: str) -> None:
        shown = pformat(names, width=90, compact=True)
        self._parts.append(
            f'events = life_events(panel[panel["metric"] == {key!r}])\n'
            f"lives = {shown}\n"
            'figures["lives"] = plot_life_lines(\n'
            '    events[events["item"].isin(lives)], items=subject.items, '
            "exposures=subject.exposures,\n"
            f"    title={f'When texts were known: {rule}'!r},\n)"
        )

    def course(self, key: str, title: str) -> None:
        panel, kind = self.panel, self.panel._kind(self.name)
        if key == "exposure":
            made = (
                f"make_decoys(kindred, {panel.count}, tokenizer=model.tokenizer, seed={panel.seed})"
            )
            if not isinstance(panel.decoys, str):
                made = "decoys  # those that the explorer was given"
            elif panel.decoys:
                made = f"load_items({panel.decoys!r})"
            self._parts.append(
                f'kindred = subject.items[subject.items["kind"] == {kind!r}]\n'
                f"model = subject.source.at({panel.steps[0]})\n"
                f"decoys = {made}\n"
                "ranked = pd.concat([\n"
                f"    probe_exposure(subject.source.at(step), kindred, decoys=decoys, seed={panel.seed})\n"
                f"    for step in {panel.steps}\n"
                "])\n"
                f'mine = ranked[(ranked["metric"] == "exposure") & (ranked["item"] == {self.name!r})]\n'
                'course = mine.assign(group=mine["item"].astype(str), '
                'hi=mine["hi"].where(mine["hi"] < float("inf")))'
            )
        else:
            self._parts.append(
                f'rows = panel[panel["metric"] == {key!r}]\n'
                f'course = rows[rows["item"] == {self.name!r}].assign(group={self.name!r})\n'
                f'controls = rows[rows["group"].isin({list(CONTROLS)!r})]'
            )
            if "kind" in panel.panel:
                self._parts.append(f'controls = controls[controls["kind"] == {kind!r}]')
            if len(panel._controls(key, kind)):
                self._parts.append(
                    'controls = summarise(controls, by=["run", "step", "group", "metric"], '
                    f"seed={panel.seed})"
                )
            self._parts.append("course = pd.concat([course, controls], ignore_index=True)")
        self._parts.append(f'figures["course"] = plot_curve(course, title={html.escape(title)!r})')

    def text(self) -> str:
        panel = self.panel
        begin = [
            "import pandas as pd\n"
            "from workbench import align_exposures, life_events, load, load_items, load_subject\n"
            "from workbench import make_decoys, plot_curve, plot_life_lines, probe_exposure\n"
            "from workbench import probe_extraction, summarise\n",
            self._subject(),
            self._table(),
            "figures = {}",
        ]
        end = (
            "for figure in figures.values():\n"
            f'    figure.add_vline(x={self.step}, line={{"dash": "dot", "color": {GREY!r}}})\n\n'
            "# the text itself: what it says, and what the model says\n"
            f"model = subject.source.at({self.step})\n"
            f'text = subject.items.set_index("item").loc[{self.name!r}, "text"]\n'
            f"tokens = model.encode([text])[0][:{panel.prefix + panel.suffix}]\n"
            f"said = model.generate(tokens[None, :{panel.prefix}], {panel.suffix})[0]\n"
            f'print(model.decode(tokens[{panel.prefix}:]), model.decode(said), sep="\\n")\n'
        )
        return "\n".join([*begin, *self._parts, end])

    def _subject(self) -> str:
        panel = self.panel
        if not isinstance(panel.model, Subject):
            more = [repr(panel.model), *([repr(panel.items_file)] if panel.items_file else [])]
            more += [f"corpus={panel.corpus!r}"] if panel.corpus else []
            more += [f"run={panel.run!r}"] if panel.run != "base" else []
            return f"subject = load_subject({', '.join(more)})"
        suite = panel.subject.suite
        if suite is None:
            return "# subject: the one that the explorer was given"
        corpus = f"corpus={suite.corpus!r}, " if suite.corpus else ""
        return f"subject = load_subject('suite', {corpus}run={panel.subject.run!r})"

    def _table(self) -> str:
        panel = self.panel
        if isinstance(panel.table, str) and not panel.table:
            made = f"subject.source, subject.items, prefix={panel.prefix}, suffix={panel.suffix}"
            return (
                f"panel = probe_extraction({made})\n"
                "panel = align_exposures(panel, subject.exposures)"
            )
        told = "panel = table  # the one that the explorer was given"
        if isinstance(panel.table, str):
            told = f"panel = load({panel.table!r})"
        return told + '\npanel = panel[panel["item"].isin(subject.items["item"].astype(str))]'
