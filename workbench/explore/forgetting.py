"""Forgetting curves under the hand: which law, for which texts, over which time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.explore.measured import (
    Measured,
    fill,
    html_table,
    paragraphs,
    plain,
    spelled,
    without_attrs,
)
from workbench.explore.shell import Explorer, View, Work
from workbench.plots.curves import plot_curve
from workbench.plots.forgetting import plot_forgetting, plot_laws, plot_residuals
from workbench.stats.effects import item_gains, same_at_every_lag
from workbench.stats.laws import LAWS, fit_forgetting
from workbench.stats.summarise import summarise
from workbench.subject import Subject
from workbench.table import InputError

FEW = 5  # items below which a curve is not among the first shown
MOST_CURVES = 6  # at once: a panel each
MOST_LAGS = 40  # of a curve; a finer grid of checkpoints is thinned evenly in log time
KEPT = 200  # curves and fits that are remembered
FIRST_LAWS = ("exponential", "power", "wickelgren", "logarithm", "semilog")
COMPARED = {
    "Akaike weight": "weight",
    "half-life": "half_life",
    "error on the held-out tail": "rmse_holdout",
    "error": "rmse",
    "what each law leaves": "residual",
    "learnability threshold (semilog)": "learnability_threshold",
}
ALL = -1.0  # every cohort; updates are counted from 0
Piece = tuple[go.Figure, list[str], set[str]]  # a figure, code that makes it, names it needs
NO_LAW = "No law: too few points, or too short a time"
WORDS = {"description_width": "7em"}
WIDE = {"width": "21em"}


def explore_forgetting(
    model: str | Subject = "suite",
    items: str = "",
    corpus: str = "",
    *,
    table: pd.DataFrame | str | Path = "",
    prefix: int = 16,
    suffix: int = 16,
    seed: int = 0,
) -> Explorer:
    """Choose texts and laws; the laws are fitted again as the time range or the tail moves.

    What is followed is each text's gain since before its first exposure, less that of texts never
    trained on (0: nothing is left), pooled over texts with 95 % intervals from resampled texts.

    Args:
        model: As for ``load_subject``: "suite", or the user's own; or a Subject.
        items, corpus: As for ``load_subject``.
        table: In place of a model: what ``probe_extraction`` and ``align_exposures`` gave, or the
            file that ``save`` wrote it to.
        prefix, suffix: Prompt length, and tokens whose log-probability is followed.
        seed: Of the resampling.

    What cannot be read or fitted is told in the widget.
    """
    state = _Forgetting(
        Measured(model, items, corpus, table=table, prefix=prefix, suffix=suffix), seed
    )
    return Explorer(
        "How fast is it forgotten?",
        state.controls,
        state.draw,
        figures=("curves", "laws"),
        least="44em",
    )


class _Forgetting:
    def __init__(self, measured: Measured, seed: int):
        self._measured = measured
        self._seed = seed
        self._lags: list[float] = []
        self._all_lags = 0
        self._rows: dict[str, pd.DataFrame] = {}  # of each group, after the last exposure
        self._all: dict[str, pd.DataFrame] = {}  # of each group, at all checkpoints
        self._kept: dict[tuple, object] = {}
        self.controls = {
            "groups": widgets.SelectMultiple(
                description="Texts", rows=6, style=WORDS, layout=WIDE,
                tooltip="Kind of text and number of exposures; Ctrl or Shift takes several, up to six",
            ),
            "laws": widgets.SelectMultiple(
                options=list(LAWS), value=FIRST_LAWS, description="Laws", rows=6, style=WORDS,
                layout=WIDE, tooltip="Which laws are fitted and compared; Ctrl or Shift takes several",
            ),
            "cohort": widgets.Dropdown(
                options=[("all", ALL)], description="First met", style=WORDS, layout=WIDE,
                tooltip="Only texts first trained on at this update",
            ),
            "x": widgets.Dropdown(
                options=[("updates since the last exposure", "lag"), ("training step", "step")],
                description="Across", style=WORDS, layout=WIDE,
                tooltip="The time that curves are drawn over; laws are of time since exposure",
            ),
            "log": widgets.Dropdown(
                options=[("logarithmic", True), ("linear", False)], description="Time axis",
                style=WORDS, layout=WIDE, tooltip="How the time axis is spaced",
            ),
            "span": widgets.SelectionRangeSlider(
                options=[("none", 0.0)], index=(0, 0), description="Lags", style=WORDS,
                layout={"width": "26em"}, tooltip="Updates since exposure that laws are fitted to",
            ),
            "holdout": widgets.FloatSlider(
                value=0.2, min=0.1, max=0.5, step=0.05, description="Held-out tail", style=WORDS,
                layout={"width": "26em"}, readout_format=".0%",
                tooltip="Share of the points, the last ones, that laws are asked to predict",
            ),
            "draws": widgets.Dropdown(
                options=[("none", 0), ("50 resamples", 50), ("200 resamples", 200)], value=50,
                description="Bands", style=WORDS, layout=WIDE,
                tooltip="Resamples of the texts behind bands and intervals; more take longer",
            ),
            "compare": widgets.Dropdown(
                options=list(COMPARED.items()), description="Compare by", style=WORDS, layout=WIDE,
                tooltip="What the second figure shows of each law",
            ),
        }  # fmt: skip

    def draw(self, values: dict, work: Work) -> View:
        self._read(work)
        work.step()  # its options are a newer wish
        names = list(values["groups"])
        if not names:
            raise InputError("Texts: none is chosen; choose one or more")
        if len(names) > MOST_CURVES:
            raise InputError(f"Texts: {len(names)} are chosen, at most {MOST_CURVES} can be shown")
        if not values["laws"]:
            raise InputError("Laws: none is chosen; choose one or more")
        names = [name for name in names if len(self._part(name, values["cohort"]))]
        if not names:
            raise InputError("First met: none of the chosen texts was met then; choose others")
        work.step("fitting the laws", 0.1)
        fits, refused = self._fits(names, values, work)
        work.step("drawing", 0.9)
        return self._view(values, names, fits, refused)

    def _read(self, work: Work) -> None:
        if not self._rows:
            outcome = self._measured.read(work)
            work.step("comparing with texts never trained on", 0.8)
            gains = item_gains(outcome, strata=["kind"])
            name = gains["kind"].astype(str) + " x" + gains["dose"].astype(str).str.rjust(3)
            gains = without_attrs(gains.assign(group=name))
            after = gains[(gains["copies"] == gains["dose"]) & gains["lag"].notna()]
            if after.empty:
                raise InputError(
                    "explore_forgetting: no checkpoint lies after a text's last exposure; "
                    "it needs later checkpoints"
                )
            subject = self._measured.subject
            lags = subject.lags(after) if subject else sorted(after["lag"].unique())
            self._all_lags, self._lags = len(lags), _thinned(lags)
            after = after[after["lag"].isin(self._lags)]
            rows = {str(n): part for n, part in after.groupby("group", observed=True)}
            self._all = {str(n): part for n, part in gains.groupby("group", observed=True)}
            self._fill(rows, sorted(gains[self._measured.clock].dropna().unique()))
            self._rows = rows

    def _fill(self, rows: dict[str, pd.DataFrame], cohorts: list[float]) -> None:
        one = [part.iloc[0] for part in rows.values()]
        order = sorted(one, key=lambda row: (str(row["kind"]), row["dose"]))
        names = [str(row["group"]) for row in order]
        fill(self.controls["groups"], names, _first_shown(order, rows))
        options = [("all", ALL), *((f"update {cohort:g}", float(cohort)) for cohort in cohorts)]
        fill(self.controls["cohort"], options, ALL)
        lags = [(f"{lag:g}", float(lag)) for lag in self._lags]
        fill(self.controls["span"], lags, (lags[0][1], lags[-1][1]))

    def _part(self, name: str, cohort: float, across: str = "lag") -> pd.DataFrame:
        part = self._rows[name] if across == "lag" else self._all[name]
        return part if cohort == ALL else part[part[self._measured.clock] == cohort]

    def _keep(self, key: tuple, make: Callable):
        """What was made for these settings before; a refusal is made again, it is quick."""
        if key not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = make()
        return self._kept[key]

    def _steady(self, name: str, values: dict) -> pd.DataFrame:
        """The rows over lag that make a curve: of the texts watched at all of its lags."""

        def make() -> pd.DataFrame:
            part = self._part(name, values["cohort"])
            return same_at_every_lag(part[part["lag"].between(*values["span"])])

        return self._keep(("steady", name, values["cohort"], values["span"]), make)

    def _means(self, name: str, values: dict) -> pd.DataFrame:
        across, cohort = values["x"], values["cohort"]
        over = values["span"] if across == "lag" else None
        by = ["run", "group", "metric", across]

        def make() -> pd.DataFrame:
            part = self._steady(name, values) if over else self._part(name, cohort, across)
            return without_attrs(summarise(part, by=by, seed=self._seed))

        return self._keep(("means", name, across, cohort, over), make)

    def _fits(self, names: list[str], values: dict, work: Work) -> tuple[dict, dict]:
        """The fits of each curve, and why others have none; all that are new are one batch."""
        given = {key: values[key] for key in ("laws", "draws", "holdout")}

        def key(name: str) -> tuple:
            return ("fits", name, values["cohort"], values["span"], *given.values())

        def part(name: str) -> pd.DataFrame:
            return without_attrs(self._steady(name, values).copy(deep=False))

        def fitted(part: pd.DataFrame) -> pd.DataFrame:
            return without_attrs(fit_forgetting(part, seed=self._seed, **given))

        fits, refused, made = {}, {}, {}
        new = [name for name in names if key(name) not in self._kept]
        if len(new) > 1:
            with contextlib.suppress(InputError):  # one of them is refused, which is told below
                rows = fitted(pd.concat([part(name) for name in new]))
                made = {str(name): of for name, of in rows.groupby("group", observed=True)}
        for done, name in enumerate(names):
            work.step(f"fitting {name}", done / len(names))
            make = partial(fitted, part(name)) if name not in made else partial(made.get, name)
            try:
                fits[name] = self._keep(key(name), make)
            except InputError as reason:
                refused[name] = str(reason)
        return fits, refused

    def _view(self, values: dict, names: list[str], fits: dict, refused: dict) -> View:
        set_to = tuple(values.items())
        curves = self._keep(
            ("curves", *(each for each in set_to if each[0] != "compare")),
            lambda: self._curves(values, names, fits),
        )
        laws = self._keep(("laws", *set_to), lambda: self._laws(values, fits))
        used = {"item_gains", "summarise", *curves[2], *laws[2]}
        used |= {"fit_forgetting"} if fits else set()
        used |= {"same_at_every_lag"} if fits or values["x"] == "lag" else set()
        lines = [*self._code(values, names, list(fits), used), *curves[1], *laws[1]]
        lines.append('figures = {"curves": curves, "laws": laws}')
        words = self._keep(("words", *set_to), lambda: self._words(values, fits, refused))
        return View({"curves": curves[0], "laws": laws[0]}, words, "\n".join(lines))

    def _curves(self, values: dict, names: list[str], fits: dict) -> Piece:
        """Points with the laws; alone where the axis is the step, or where no law was fitted."""
        x, log = values["x"], values["log"]
        drawn = list(fits) if x == "lag" and fits else names
        means = pd.concat([self._means(name, values) for name in drawn])
        if x == "lag" and fits:
            given = {"log_x": log, "holdout": values["holdout"], "title": "What is left"}
            figure = plot_forgetting(means, pd.concat(fits.values()), **given)
            return (
                figure,
                [f"curves = plot_forgetting(means, fits, {spelled(given)})"],
                {"plot_forgetting"},
            )
        if x == "step" and log:  # update 0 has no place there
            means = means[means["step"] > 0]
        given = {"x": x, "log_x": bool(log and means[x].min() > 0), "title": "What is left"}
        lines = ['means = means[means["step"] > 0]'] if x == "step" and log else []
        return (
            plot_curve(means, **given),
            [*lines, f"curves = plot_curve(means, {spelled(given)})"],
            {"plot_curve"},
        )

    def _laws(self, values: dict, fits: dict) -> Piece:
        if not fits:
            line = f"laws = go.Figure(layout={{'title': {NO_LAW!r}}})"
            return go.Figure(layout={"title": NO_LAW}), [line], {"go"}
        rows, metric = pd.concat(fits.values()), values["compare"]
        if metric == "residual":
            figure = plot_residuals(rows, log_x=values["log"])
            return (
                figure,
                [f"laws = plot_residuals(fits, log_x={values['log']})"],
                {"plot_residuals"},
            )
        line = f"laws = plot_laws(fits, metric={metric!r})"
        return plot_laws(rows, metric=metric), [line], {"plot_laws"}

    def _code(self, values: dict, names: list[str], fitted: list[str], used: set) -> list[str]:
        """Lines that make the means and the fits."""
        clock, cohort, x = self._measured.clock, values["cohort"], values["x"]
        chosen = [f'named = named[named["{clock}"] == {cohort!r}]'] if cohort != ALL else []
        drawn = fitted if x == "lag" and fitted else names
        rows = "after" if x == "lag" else "named"
        within, over_lag = f'["lag"].between{values["span"]}', bool(fitted) or x == "lag"
        given = {"laws": list(values["laws"]), "draws": values["draws"]}
        given |= {"holdout": values["holdout"], "seed": self._seed}
        lines = [
            *self._measured.code(used),
            'gains = item_gains(outcome, strata=["kind"])',
            'dose = gains["dose"].astype(str).str.rjust(3)',
            'named = gains.assign(group=gains["kind"].astype(str) + " x" + dose)',
            *chosen,
            f'after = named[(named["copies"] == named["dose"]) & named["lag"].isin({plain(self._lags)})]',
            *([f"after = same_at_every_lag(after[after{within}])"] if over_lag else []),
            f'parts = [{rows}[{rows}["group"] == name] for name in {drawn}]',
            f'by = ["run", "group", "metric", {x!r}]',
            f"means = pd.concat([summarise(part, by=by, seed={self._seed}) for part in parts])",
        ]
        if fitted:
            lines += [
                f'parts = [after[after["group"] == name] for name in {fitted}]',
                f"fits = pd.concat([fit_forgetting(part, {spelled(given)}) for part in parts])",
            ]
        return lines

    def _words(self, values: dict, fits: dict, refused: dict) -> str:
        if values["x"] == "step":
            told = ["Laws are of time since the last exposure, so none is drawn over the step."]
            if values["cohort"] == ALL:
                told += ["Texts met at different updates are pooled; choose one to part them."]
            if values["log"]:
                told += ["Update 0 has no place on a logarithmic axis."]
        else:
            told = [
                "Points are means over texts, hollow where held out; the law preferred is thick."
            ]
            steady = {name: self._steady(name, values) for name in fits}
            if left := sum(rows.attrs["left_out"] for rows in steady.values()):
                told += [f"{left} texts are left out: they are not watched at every lag."]
            if changing := [name for name, rows in steady.items() if rows.attrs["changing"]]:
                told += [
                    "Who is watched changes with the lag, too few texts being watched at every one: "
                    f"{', '.join(changing)}."
                ]
        told += [f"{name}: {reason}" for name, reason in refused.items()]
        if self._all_lags > len(self._lags):
            told += [
                f"{len(self._lags)} of the {self._all_lags} lags, about evenly spaced in log time."
            ]
        head = ["texts", "n", "preferred (Akaike weight)", "its half-life [updates]"]
        head += ["best on the held-out tail (error)"]
        lines = [self._row(name, rows, values) for name, rows in fits.items()]
        return paragraphs(told) + (html_table(head, lines) if lines else "")

    def _row(self, name: str, fits: pd.DataFrame, values: dict) -> list[str]:
        """What the laws say of one curve, in words."""
        found = fits[fits["metric"].isin(["weight", "half_life", "rmse_holdout"])]
        wide = found.pivot_table(index="law", columns="metric", values="value", observed=True)
        columns = ["weight", "half_life", "rmse_holdout"]
        wide = wide.reindex(index=list(values["laws"]), columns=columns)
        told = [name, str(self._steady(name, values)["item"].nunique())]
        if wide["weight"].notna().any():
            best = wide["weight"].idxmax()
            half = fits[(fits["law"] == best) & (fits["metric"] == "half_life")].iloc[0]
            between = f" ({half['lo']:.3g} to {half['hi']:.3g})" if pd.notna(half["lo"]) else ""
            reason = f", {half['reason']}" if half["reason"] else ""
            told.append(f"{best.replace('_', ' ')} ({wide.loc[best, 'weight']:.2f})")
            told.append(f"{half['value']:.3g}{between}{reason}")
        else:
            told += ["too few points to prefer one", ""]
        tail = wide["rmse_holdout"]
        best = f"{tail.idxmin().replace('_', ' ')} ({tail.min():.3f})" if tail.notna().any() else ""
        return [*told, best or "too few points"]


def _thinned(lags: list[float]) -> list[float]:
    if len(lags) <= MOST_LAGS:
        return [float(lag) for lag in lags]
    there = np.array(lags, dtype=float)
    wanted = np.expm1(np.linspace(np.log1p(there[0]), np.log1p(there[-1]), 4 * MOST_LAGS))
    found = np.unique(np.abs(there - wanted[:, None]).argmin(axis=1))
    found = found[np.linspace(0, len(found) - 1, min(MOST_LAGS, len(found))).round().astype(int)]
    return [float(lag) for lag in there[found]]


def _first_shown(order: list[pd.Series], rows: dict[str, pd.DataFrame]) -> tuple[str, ...]:
    """Texts of one kind with the most exposures, where there are enough of them."""
    kinds = {str(row["kind"]) for row in order}
    kind = "passage" if "passage" in kinds else str(order[0]["kind"])
    mine = [str(row["group"]) for row in order if str(row["kind"]) == kind]
    many = [name for name in mine if rows[name]["item"].nunique() >= FEW]
    return tuple((many or mine)[-2:])
