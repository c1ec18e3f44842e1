"""The causal profile cell by cell: a click shows how its cohort fared, and its texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd

from workbench.explore.measured import (
    EXPOSED,
    Measured,
    fill,
    html_table,
    paragraphs,
    spelled,
    without_attrs,
)
from workbench.explore.shell import Explorer, View, Work
from workbench.plots.profile import plot_event_study, plot_profile
from workbench.stats.effects import item_gains
from workbench.stats.profile import memorization_profile
from workbench.subject import Subject
from workbench.table import InputError

MOST = 60  # cohorts, and checkpoints, that a heat map shows
LISTED = 20  # texts of a cell
LONG = 110  # characters of a text that are shown
KEPT = 30  # profiles that are remembered
SINCE = "updates since the first exposure (placebo: before it)"
KEY = (
    "Framed is the chosen cell, a line marks the first exposure, a dot a band that includes 0; "
    "grey is the checkpoint that a row is compared with."
)
WORDS = {"description_width": "7em"}
WIDE = {"width": "21em"}


def explore_profile(
    model: str | Subject = "suite",
    items: str = "",
    corpus: str = "",
    *,
    table: pd.DataFrame | str | Path = "",
    prefix: int = 16,
    suffix: int = 16,
    seed: int = 0,
) -> Explorer:
    """What training on each cohort did to it at each checkpoint; choose a cell by click or keys.

    Every cell, before the first exposure too, is compared with the last checkpoint before it, so
    that the changes of a cell's texts average to the cell.

    Args:
        model: As for ``load_subject``: "suite", or the user's own; or a Subject.
        items, corpus: As for ``load_subject``.
        table: In place of a model: what ``probe_extraction`` and ``align_exposures`` gave, or the
            file that ``save`` wrote it to.
        prefix, suffix: Prompt length, and tokens whose log-probability is followed.
        seed: Of the draws behind bands that hold for all cells.

    What cannot be read or estimated is told in the widget.
    """
    state = _Profile(
        Measured(model, items, corpus, table=table, prefix=prefix, suffix=suffix), seed
    )
    explorer = Explorer(
        "What did training on it do?",
        state.controls,
        state.draw,
        figures=("profile", "event_study"),
        least="40em",
    )
    explorer.on_click("profile", lambda x, y, _: state.choose(explorer, x, y))
    return explorer


class _Profile:
    def __init__(self, measured: Measured, seed: int):
        self._measured = measured
        self._seed = seed
        self._kinds: dict[str, pd.DataFrame] = {}
        self._at: tuple[tuple, dict[int, pd.DataFrame]] = ((), {})  # the last texts, by checkpoint
        self._notes: list[str] = []
        self._steps: list[int] = []
        self._prepared: list[str] = []  # lines of code
        self._kept: dict[tuple, object] = {}
        self._shown: tuple[list, list] = ([], [])  # cohorts and steps of the heat map
        self.controls = {
            "kind": widgets.Dropdown(
                options=["all"], description="Texts", style=WORDS, layout=WIDE,
                tooltip="Kind of text, compared with never-trained texts of its kind",
            ),
            "dose": widgets.Dropdown(
                options=[("all", 0)], description="Exposures", style=WORDS, layout=WIDE,
                tooltip="How often a text is trained on in all",
            ),
            "bands": widgets.Dropdown(
                options=[("for all cells at once", True), ("for each cell alone", False)],
                description="95 % bands", style=WORDS, layout=WIDE,
                tooltip="What the bands hold for, and with them the dots of doubt",
            ),
            "cohort": widgets.Dropdown(
                options=[("none", 0)], description="Cohort", style=WORDS, layout=WIDE,
                tooltip="The row of the chosen cell: texts first trained on at this update",
            ),
            "step": widgets.SelectionSlider(
                options=[("none", 0)], description="Checkpoint", style=WORDS,
                layout={"width": "30em"}, tooltip="The column of the chosen cell, in updates",
            ),
        }  # fmt: skip

    def choose(self, explorer: Explorer, x: float, y: float) -> None:
        """Make the cell that was clicked the chosen one."""
        cohorts, steps = self._shown
        explorer.set(cohort=cohorts[round(y)], step=steps[round(x)])

    def draw(self, values: dict, work: Work) -> View:
        self._read(work)
        work.step()  # its options are a newer wish
        kind, dose, bands = values["kind"], values["dose"], values["bands"]
        work.step("estimating", 0.9)
        profile = self._keep(
            (kind, dose, bands), lambda: self._profile(self._part(kind, dose), bands)
        )
        cohort, step = float(values["cohort"]), int(values["step"])
        of = kind if not dose else f"{kind} x{dose:g}"
        there = sorted(float(g) for g in profile["cohort"].unique())
        if cohort not in there:
            raise InputError(
                f"Cohort: none of {of} was first met at update {cohort:g} with a checkpoint before "
                f"it; there are {', '.join(f'{g:g}' for g in there)}"
            )
        work.step("drawing", 0.95)
        row = profile[profile["cohort"] == cohort]
        set_to = {"chosen": (cohort, step), "title": f"What training caused: {of}"}
        study = {"color": "cohort", "title": f"The chosen row: {of}, first met at {cohort:g}"}
        steps = sorted(int(each) for each in profile["step"].unique())
        if step not in steps:
            raise InputError(f"Checkpoint: nothing was estimated at {step}; choose another")
        shown = self._keep(
            (kind, dose, bands, cohort),
            lambda: plot_event_study(row, **study).update_xaxes(title_text=SINCE),
        )
        cells = self._keep(("map", kind, dose, bands), lambda: plot_profile(profile, **set_to))
        # only the frame follows the chosen cell; to make the map anew takes longer than the rest
        left, top = steps.index(step) - 0.5, there.index(cohort) - 0.5
        cells.data[-1].update(
            x=[left, left + 1, left + 1, left, left],
            y=[top, top, top + 1, top + 1, top],
            name=f"chosen: cohort {cohort:g}, step {step:g}",
        )
        figures = {"profile": cells, "event_study": shown}
        self._shown = (there, steps)
        work.show(figures)  # a page has drawn them by the time that the words are found
        code = self._code(kind, dose, bands, cohort, set_to, study)
        return View(figures, self._words(kind, dose, row, cohort, step), code)

    def _read(self, work: Work) -> None:
        if not self._kinds:
            outcome = self._measured.read(work)
            lines = [f'mine = outcome.assign(cohort=outcome["{self._measured.clock}"])']
            lines += [f'mine = mine.drop(columns={list(EXPOSED)}, errors="ignore")']
            mine = outcome.assign(cohort=outcome[self._measured.clock])
            mine = mine.drop(columns=list(EXPOSED), errors="ignore")
            steps = np.sort(mine["step"].unique())
            if len(steps) > MOST:
                steps = steps[np.linspace(0, len(steps) - 1, MOST).round().astype(int)]
                mine = mine[mine["step"].isin(steps)]
                lines += [f'mine = mine[mine["step"].isin({steps.tolist()})]']
                self._notes.append(
                    f"{MOST} checkpoints are shown, evenly taken from all there are."
                )
            if mine["cohort"].nunique() > MOST:
                # all contrasts stay what they are: base and exposed checkpoints are the same
                at = np.searchsorted(steps, mine["cohort"].fillna(-1))
                later = np.append(steps, np.inf)[at]
                mine = mine.assign(cohort=np.where(mine["cohort"].isna(), np.nan, later))
                mine = mine[~np.isinf(mine["cohort"])]
                lines += [
                    f"steps = {steps.tolist()}",
                    'at = np.searchsorted(steps, mine["cohort"].fillna(-1))',
                    "later = np.append(steps, np.inf)[at]",
                    'mine = mine.assign(cohort=np.where(mine["cohort"].isna(), np.nan, later))',
                    'mine = mine[~np.isinf(mine["cohort"])]',
                ]
                self._notes.append(
                    "Texts first met between the same two checkpoints are one cohort, named by the "
                    "later; no contrast changes by that."
                )
            self._prepared = lines
            self._steps = [int(step) for step in steps]
            self._fill(mine)
            self._kinds = {str(kind): part for kind, part in mine.groupby("kind", observed=True)}

    def _fill(self, mine: pd.DataFrame) -> None:
        kinds = sorted(mine["kind"].astype(str).unique())
        fill(self.controls["kind"], kinds, "passage" if "passage" in kinds else kinds[0])
        trained = mine[mine["cohort"].notna()].drop_duplicates(["cohort", "dose"])
        doses = [("all", 0), *((f"{d:g}", d) for d in sorted(trained["dose"].unique().tolist()))]
        fill(self.controls["dose"], doses, 0)
        cohorts = sorted(trained["cohort"].unique().tolist())
        first = [g for g in cohorts if any(0 < step < g for step in self._steps)] or cohorts
        fill(self.controls["cohort"], [(f"update {g:g}", g) for g in cohorts], first[0])
        steps = [(str(step), step) for step in self._steps if step > 0]
        after = [step for _, step in steps if step >= first[0]] or [steps[-1][1]]
        fill(self.controls["step"], steps, after[0])

    def _part(self, kind: str, dose: float) -> pd.DataFrame:
        part = self._kinds[kind]
        if dose:
            part = part[part["cohort"].isna() | (part["dose"] == dose)]
        if part["cohort"].notna().any():
            return part.drop(columns="dose")
        raise InputError(f"Texts: no {kind} was trained on {dose:g} times; choose other exposures")

    def _keep(self, key: tuple, make: Callable):
        """What was made for these settings before."""
        if key not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = make()
        return self._kept[key]

    def _profile(self, part: pd.DataFrame, bands: bool) -> pd.DataFrame:
        set_to = {"by": "cell", "base": "universal", "simultaneous": bands, "seed": self._seed}
        return without_attrs(memorization_profile(part, **set_to))

    def _code(self, kind, dose, bands, cohort, set_to, study) -> str:
        names = ["memorization_profile", "plot_event_study", "plot_profile"]
        whole = f' & (mine["cohort"].isna() | (mine["dose"] == {dose!r}))' if dose else ""
        imports, *rest = self._measured.code(names)
        merged = any("np." in line for line in self._prepared)
        lines = [
            *(["import numpy as np"] if merged else []),
            imports,
            *rest,
            *self._prepared,
            f'part = mine[(mine["kind"] == {kind!r}){whole}].drop(columns="dose")',
            f'profile = memorization_profile(part, by="cell", base="universal", simultaneous={bands}, seed={self._seed})',
            f'row = profile[profile["cohort"] == {cohort!r}]',
            "figures = {",
            f'    "profile": plot_profile(profile, {spelled(set_to)}),',
            f'    "event_study": plot_event_study(row, {spelled(study)}).update_xaxes(title_text={SINCE!r}),',
            "}",
        ]
        return "\n".join(lines)

    def _words(self, kind: str, dose: float, row: pd.DataFrame, cohort: float, step: int) -> str:
        base = max(each for each in self._steps if each < cohort)
        cell = row[row["step"] == step]
        if cell.empty:
            told = (
                f"Cohort {cohort:g} at checkpoint {step}: all its cells are compared with this "
                "checkpoint, the last before it was trained on, so there is nothing to estimate."
            )
            return paragraphs([told, KEY, *self._notes])
        cell = cell.iloc[0]
        if self._at[0] != (kind, dose):
            self._at = (kind, dose), dict(iter(self._part(kind, dose).groupby("step")))
        both = [self._at[1][each] for each in (base, step) if each in self._at[1]]
        gains = cell_gains(pd.concat(both), cohort, step, base)
        band = f" ({cell['lo']:.3f} to {cell['hi']:.3f})" if pd.notna(cell["lo"]) else ""
        when = (
            f"{step - cohort:g} updates after it was first met"
            if step >= cohort
            else f"{cohort - step:g} updates before it was first met, so that 0 is expected"
        )
        told = [
            f"Cohort {cohort:g} at checkpoint {step}, {when}: {cell['value']:.3f}{band} nats per "
            f"token over {len(gains)} texts, less the change of {int(cell['n_control'])} texts never "
            f"trained on, since checkpoint {base}."
        ]
        if len(gains) > LISTED:
            told.append(f"Below: the {LISTED // 2} that gained most and the {LISTED // 2} least.")
            gains = pd.concat([gains.head(LISTED // 2), gains.tail(LISTED // 2)])
        lines = []
        for each in gains.itertuples():
            text = self._measured.text(each.item)
            text = text if len(text) <= LONG else text[:LONG].rstrip() + " …"
            lines.append([f"{each.value:+.3f}", f"{each.now:.2f}", each.item, text])
        table = html_table(["gain", "log-probability now", "name", "text"], lines)
        return paragraphs([KEY, *self._notes, *told]) + table


def cell_gains(part: pd.DataFrame, cohort: float, step: int, base: int) -> pd.DataFrame:
    """The gains of a cell's texts, the largest first, with what each is ``now``."""
    at = part["step"].isin([base, step])
    mine = part[at & (part["cohort"].isna() | (part["cohort"] == cohort))]
    gains = item_gains(mine, strata=["kind"])
    now = mine[mine["step"] == step].set_index(mine.loc[mine["step"] == step, "item"].astype(str))
    gains = gains[gains["step"] == step]
    gains = gains.assign(item=gains["item"].astype(str))
    gains["now"] = now["value"].reindex(gains["item"]).to_numpy()
    return gains.dropna(subset="value").sort_values("value", ascending=False)[
        ["item", "value", "now"]
    ]
