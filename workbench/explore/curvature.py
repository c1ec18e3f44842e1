"""The edit along the loss curvature under a slider, and what a text's continuation becomes."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import ipywidgets as widgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Bool, Int

from workbench import plots
from workbench.curvature import Basis, decompose, edited
from workbench.explore.shell import Explorer, View, Work, subject_of
from workbench.factors import collect_factors
from workbench.items import cut_items
from workbench.models import LanguageModel
from workbench.probes.curvature import (
    NONE,
    RHO,
    curvature_texts,
    each_edit,
    recited_items,
    spectrum_rows,
    staircase_rows,
    text_tokens,
)
from workbench.subject import Subject
from workbench.table import InputError

METHOD = "kfac"
BASELINES = ("saliency", "svd", "magnitude", "random")
GROUPS = ("drip", "seen")  # of texts that a model may recite; else those of the user's own names
ASIDE = ("never", "unseen", "partner")
FIGURES = ("spectrum", "mask", "sweep", "frontier")
START = 0.95  # the share of mass that is kept at first
LABEL = 48  # characters of a text that name it in the list


def explore_curvature(
    model: str | Subject = "suite",
    items: str = "",
    corpus: str = "",
    *,
    step: int | None = None,
    roles: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    rho: Sequence[float] = RHO[METHOD],
    texts: int = 128,
    held_out: int = 100,
    prefix: int = 16,
    suffix: int = 16,
    most: int = 200,
    seed: int = 0,
) -> Explorer:
    """A slider over the share of curvature mass that the K-FAC edit keeps.

    Shows the cut through the spectrum, which components of a layer stay, what is still recited at
    what price, and how one text goes on before and after the edit. The edits are made on
    a module of its own, each for as long as it is asked, so that nothing else ever sees one. An
    edit is asked once; the slider then draws what is known.

    Args:
        model: As :func:`load_subject`, or a subject.
        step: Of the checkpoint; None takes the last.
        roles, blocks: Linear layers to edit; None takes all.
        rho: Shares the slider offers, beside the unedited model.
        texts, held_out: How many, for the factors and for the perplexity.
        prefix, suffix: Tokens of the prompt and of the continuation.
        most: Recited texts asked under each edit; of more, the first.
        seed: Of sampling and bootstrap.

    Raises:
        InputError: Shares outside (0, 1). Whatever else cannot be used is the explorer's line.
    """
    shares = sorted({float(share) for share in rho} - {1.0}, reverse=True)
    if not shares or not all(0 < share < 1 for share in shares):
        raise InputError(f"explore_curvature: rho is {list(rho)}, needs shares between 0 and 1")
    wide = {"width": "max-content"}
    start = min(shares, key=lambda share: abs(share - START))
    controls = {
        "rho": widgets.SelectionSlider(
            options=[("unedited", 1.0), *((f"{share:g}", share) for share in shares)],
            value=start,
            description="mass kept, ρ",
            tooltip="Share of the curvature mass that the edit keeps; arrow keys move it",
            style={"description_width": "initial"},
        ),
        "item": widgets.Dropdown(
            description="text", tooltip="Whose continuation is shown before and after the edit"
        ),
        "layer": widgets.Dropdown(description="layer", tooltip="Whose mask is shown", layout=wide),
        "baselines": widgets.Checkbox(
            description="beside other edits",
            tooltip="Make the edits by saliency, SVD, magnitude and at random too; takes longer",
            indent=False,
            layout=wide,
        ),
    }
    panel = _Panel(
        model if isinstance(model, Subject) else str(model), str(items), str(corpus), step=step, roles=roles, blocks=blocks, shares=tuple(shares),
        texts=texts, held_out=held_out, prefix=prefix, suffix=suffix, most=most, seed=seed,
    )  # fmt: skip

    def draw(values: dict, work: Work) -> View:
        panel.prepare(work)
        for name, options in (("layer", panel.layers), ("item", panel.names)):
            if not controls[name].options:
                controls[name].options = options
                values[name] = options[0][1]
                # this asks for another drawing, which finds everything at hand
                controls[name].value = values[name]
        return panel.view(work, **values)

    return Explorer("Cut along the loss curvature", controls, draw, figures=FIGURES)


@dataclass
class _Panel:
    """Everything that is asked of the model, each thing once."""

    model: str | Subject
    items: str
    corpus: str
    step: int | None
    roles: Sequence[str] | None
    blocks: Sequence[int] | None
    shares: tuple[float, ...]
    texts: int
    held_out: int
    prefix: int
    suffix: int
    most: int
    seed: int
    subject: Subject | None = None
    own: LanguageModel | None = None
    sought: list[str] = field(default_factory=list)  # groups whose texts may be recited
    groups: list[str] = field(default_factory=list)  # those of the texts that are asked
    asked: pd.DataFrame | None = None
    recites: bool = True
    left_out: int = 0
    lost: dict[str, int] = field(default_factory=dict)  # texts, by the reason, as recited_items has
    tokens: Int[np.ndarray, "item pos"] | None = None
    held: list[np.ndarray] = field(default_factory=list)
    bases: list[Basis] = field(default_factory=list)
    spectrum: pd.DataFrame | None = None
    rows: dict[tuple[str, float], pd.DataFrame] = field(default_factory=dict)
    said: dict[float, Int[np.ndarray, "item suffix"]] = field(default_factory=dict)
    drawn: dict[tuple, go.Figure] = field(default_factory=dict)

    @property
    def length(self) -> dict[str, int]:
        return {"prefix": self.prefix, "suffix": self.suffix}

    @property
    def layers(self) -> list[tuple[str, tuple[int, str]]]:
        return [
            (f"{each.layer.role}, block {each.layer.block}", (each.layer.block, each.layer.role))
            for each in self.bases
        ]

    @property
    def names(self) -> list[tuple[str, str]]:
        told = [name for name in ("group", "kind") if name in self.asked.columns]
        return [
            (f"{', '.join(str(row[name]) for name in told)}: {row['text'][:LABEL]}", row["item"])
            for _, row in self.asked.iterrows()
        ]

    def prepare(self, work: Work) -> None:
        """Load the model and its texts, and decompose its layers."""
        work.step("loading the model", 0.0, shared=True)
        if self.asked is None:
            self._load(work)
        if self.spectrum is None:
            with _stoppable(self.own, work, "collecting the factors"):
                ordinary, unseen = curvature_texts(
                    self.subject.suite, self.corpus, texts=self.texts, held_out=self.held_out,
                    seed=self.seed,
                )  # fmt: skip
                tokens = text_tokens(self.own, ordinary, "texts")
                self.held = text_tokens(self.own, unseen, "held_out")
                factors = collect_factors(
                    self.own,
                    tokens,
                    roles=self.roles,
                    blocks=self.blocks,
                    seed=self.seed,
                    progress=False,
                )
            work.step("decomposing the layers", 0.2, shared=True)
            self.bases = decompose(factors)
            self.spectrum = spectrum_rows(self.own, self.bases)

    def _load(self, work: Work) -> None:
        given = subject_of(self.model, self.items, self.corpus)
        if self.step is None:
            self.step = given.source.steps[-1]
        # a module of its own, by subject_of: who else reads the run must never meet an edit
        self.own = given.source.at(self.step)
        self.subject = given
        there = dict.fromkeys(given.items["group"].astype(str))
        named = [name for name in there if name not in (*ASIDE, *GROUPS)]
        self.sought = [name for name in GROUPS if name in there] or named or ["seen"]
        with _stoppable(self.own, work, "looking for texts that are recited"):
            found = recited_items(self.own, given.items, groups=self.sought, **self.length)
        self.lost = dict(found.attrs)
        self.recites = bool(found["group"].isin(self.sought).any())
        if not self.recites:
            found = given.items
        found = found[found["group"].isin(self.sought)]
        self.left_out = max(0, len(found) - self.most)
        kept = found.head(self.most)
        self.tokens, self.asked = cut_items(
            self.own, kept, self.prefix + self.suffix, asker="explore_curvature"
        )
        self.groups = [name for name in self.sought if (self.asked["group"] == name).any()]

    def ask(self, grid: list[tuple[str, float]], work: Work) -> None:
        """Make the edits that were not made yet; each is over before the next begins."""
        missing = [edit for edit in grid if edit not in self.rows]
        if not missing:
            return
        steps = [(NONE, 1.0), *(edit for edit in missing if edit[0] != NONE)]
        with _stoppable(self.own, work, "making the edits"):
            told = each_edit(
                self.own, self.bases, self.asked, held_out=self.held, grid=steps, seed=self.seed,
                **self.length,
            )  # fmt: skip
            for at, edit in enumerate(steps):
                share, needed = 0.2 + 0.8 * at / len(steps), edit[0] in (NONE, METHOD)
                work.step(f"edit {at + 1} of {len(steps)}", share, shared=needed)
                rows = next(told)
                self.rows[edit] = rows[rows["item"] == "all"]

    def continuations(self, rho: float, work: Work) -> Int[np.ndarray, "item suffix"]:
        """What the model says after each prompt under the edit."""
        if rho not in self.said:
            with contextlib.ExitStack() as stack:
                stack.enter_context(_stoppable(self.own, work, "continuing the texts"))
                if rho < 1:
                    stack.enter_context(edited(self.bases, method=METHOD, rho=rho, seed=self.seed))
                self.said[rho] = self.own.generate(self.tokens[:, : self.prefix], self.suffix)
        return self.said[rho]

    def view(
        self, work: Work, *, rho: float, layer: tuple[int, str], item: str, baselines: bool
    ) -> View:
        methods = (METHOD, *(BASELINES if baselines else ()))
        shares = {name: self.shares if name == METHOD else RHO[name] for name in methods}
        grid = [(NONE, 1.0), *((name, share) for name in methods for share in shares[name])]
        figures = self._decomposed(rho, layer)
        work.show(figures)
        self.ask(grid, work)
        pooled = pd.concat([self.rows[edit] for edit in grid], ignore_index=True)
        figures |= self._edited(pooled, rho, methods)
        work.show(figures)
        before, after = self.continuations(1.0, work), self.continuations(rho, work)
        at = self.asked["item"].tolist().index(item)
        words = self._price(pooled, rho) + continuation_words(
            self.own,
            self.tokens[at, : self.prefix],
            self.tokens[at, self.prefix :],
            {
                "before the edit": before[at],
                f"after, ρ = {rho:g}" if rho < 1 else "after": after[at],
            },
        )
        return View(figures, words, self._code(rho, layer, shares))

    def _decomposed(self, rho: float, layer: tuple[int, str]) -> dict[str, go.Figure]:
        """The figures that need no edit."""

        def mask() -> go.Figure:
            block, role = layer
            basis = [b for b in self.bases if (b.layer.block, b.layer.role) == layer]
            stairs = staircase_rows(self.own, basis, sorted({rho, 1.0}))
            return plots.plot_staircase(stairs, block=block, role=role)

        cut = rho if rho < 1 else None
        return self._once({
            ("spectrum", rho): lambda: plots.plot_spectrum(
                self.spectrum, rho=cut, title=_TITLES["spectrum"]
            ),
            ("mask", rho, layer): mask,
        })  # fmt: skip

    def _edited(
        self, pooled: pd.DataFrame, rho: float, methods: tuple[str, ...]
    ) -> dict[str, go.Figure]:
        main = self.groups[0]
        return self._once({
            ("sweep", rho, methods): lambda: plots.plot_rho_sweep(
                pooled, rho=rho, title=_TITLES["sweep"]
            ).update_layout(legend=_BELOW),
            ("frontier", methods): lambda: plots.plot_edit_sweep(
                pooled, group=main, title=_TITLES["frontier"].format(main)
            ),
        })  # fmt: skip

    def _once(self, made: dict[tuple, Callable[[], go.Figure]]) -> dict[str, go.Figure]:
        for asked, make in made.items():
            if asked not in self.drawn:
                self.drawn[asked] = make()
        return {asked[0]: self.drawn[asked] for asked in made}

    def _price(self, pooled: pd.DataFrame, rho: float) -> str:
        method = METHOD if rho < 1 else NONE
        of_edit = pooled[(pooled["method"] == method) & (pooled["rho"] == rho)]
        value = {(row["metric"], str(row["group"])): row for _, row in of_edit.iterrows()}
        kept = value["kept", "all"]["value"]
        ratio = value["perplexity_ratio", "held-out"]
        recited = [
            f"{round(row['value'] * row['n'])} of {row['n']} in {html.escape(group)}"
            for (metric, group), row in value.items()
            if metric == "recitation_strict"
        ]
        notes = []
        if not self.recites:
            notes.append("The unedited model recites none of these texts to begin with.")
        if self.left_out:
            notes.append(f"{self.left_out} further texts are not asked; raise most to ask them.")
        if self.recites and self.lost["not_recited"]:
            notes.append(
                f"{self.lost['not_recited']} more, which the unedited model does not recite, are "
                "not asked."
            )
        if self.lost["dropped"]:
            notes.append(
                f"{self.lost['dropped']} are shorter than {self.prefix + self.suffix} tokens."
            )
        if self.subject.suite is None and not self.corpus:
            notes.append(
                "No corpus was given: factors and perplexity are those of verses of the World "
                "English Bible."
            )
        return (
            f"<p>{'No edit' if rho == 1 else f'The edit keeps {kept:.1%} of the components'}. "
            f"Recited: {', '.join(recited)}. "
            f"Perplexity {value['perplexity', 'held-out']['value']:.4g}, "
            f"{ratio['value']:.3f} times that of the unedited model "
            f"(95 % interval {ratio['lo']:.3f} to {ratio['hi']:.3f}). "
            f"{' '.join(notes)}</p>"
        )

    def _code(self, rho: float, layer: tuple[int, str], shares: dict) -> str:
        if isinstance(self.model, Subject):
            subject = "# subject: the one that this explorer was given"
        else:
            given = [repr(self.model), *([repr(self.items)] if self.items else [])]
            given += [f"corpus={self.corpus!r}"] if self.corpus else []
            subject = f"subject = load_subject({', '.join(given)})"
        length = f"prefix={self.prefix}, suffix={self.suffix}"
        recited = f"asked = recited_items(model, subject.items, groups={self.sought}, {length})"
        edits = {name: list(values) for name, values in shares.items()}
        return f"""from workbench import curvature_texts, load_subject, probe_curvature, recited_items
from workbench import plot_edit_sweep, plot_rho_sweep, plot_spectrum, plot_staircase

{subject}
model = subject.source.at({self.step})
{recited if self.recites else "asked = subject.items"}
asked = asked[asked["group"].isin({self.sought})].head({self.most})
texts, held_out = curvature_texts(
    subject.suite, {self.corpus!r}, texts={self.texts}, held_out={self.held_out}, seed={self.seed}
)
table = probe_curvature(
    model, asked, texts=texts, held_out=held_out, memorized={self.groups}, clean=None,
    roles={self.roles!r}, blocks={self.blocks!r}, methods={list(edits)},
    rho={edits},
    stairs={sorted({rho, 1.0})}, {length}, seed={self.seed},
)
figures = {{
    "spectrum": plot_spectrum(table, rho={rho if rho < 1 else None}, title={_TITLES["spectrum"]!r}),
    "mask": plot_staircase(table, block={layer[0]}, role={layer[1]!r}),
    "sweep": plot_rho_sweep(table, rho={rho}, title={_TITLES["sweep"]!r}).update_layout(
        legend={_BELOW!r}
    ),
    "frontier": plot_edit_sweep(
        table, group={self.groups[0]!r}, title={_TITLES["frontier"].format(self.groups[0])!r}
    ),
}}
"""


_TITLES = {
    "spectrum": "Spectrum: mass held by the largest components",
    "sweep": "Recitation and price, edit by edit",
    "frontier": "Recitation against perplexity, group {}",
}


_BELOW = {"orientation": "h", "y": -0.18, "yanchor": "top"}  # beside it leaves no room


@contextlib.contextmanager
def _stoppable(model: LanguageModel, work: Work, what: str) -> Iterator[None]:
    """Each pass through the model is a step of the work: it can end there, in an edit too."""
    hook = model.module.base_model.register_forward_pre_hook(
        lambda *_: work.step(what, shared=True)
    )
    try:
        yield
    finally:
        hook.remove()


def continuation_words(
    model: LanguageModel,
    prompt: Int[np.ndarray, " prefix"],
    truth: Int[np.ndarray, " suffix"],
    said: dict[str, Int[np.ndarray, " suffix"]],
) -> str:
    """A prompt, its true continuation and what was said instead, by name; HTML.

    The text's own tokens have a solid line below and others a dotted one, so that no colour is
    needed to tell them apart; how many are the text's own is counted.
    """
    lines = [("prompt", "", _escaped(model, prompt)), ("the text", "", _escaped(model, truth))]
    for name, tokens in said.items():
        same = tokens == truth
        count = f"{int(same.sum())} of {len(truth)} tokens"
        lines.append((html.escape(name), count, _marked(model, tokens, same)))
    cells = "".join(
        f"<tr><th style='text-align:left;white-space:nowrap;padding-right:1em'>{name}</th>"
        f"<td style='white-space:nowrap;padding-right:1em'>{count}</td>"
        f"<td dir='auto' style='text-align:start;font-family:monospace;white-space:pre-wrap'>{text}</td></tr>"
        for name, count, text in lines
    )
    return (
        f"<table>{cells}</table><p>Underlined: the text's own token at its place; "
        "dotted: another.</p>"
    )


def _escaped(model: LanguageModel, tokens: Int[np.ndarray, " pos"]) -> str:
    return html.escape(model.decode(tokens))


def _marked(
    model: LanguageModel, tokens: Int[np.ndarray, " pos"], same: Bool[np.ndarray, " pos"]
) -> str:
    # run by run, for a character may span tokens
    edges = [0, *(np.flatnonzero(np.diff(same)) + 1), len(tokens)]
    looks = {True: "2px solid #009E73", False: "2px dotted #D55E00"}
    return "".join(
        f"<span style='border-bottom:{looks[bool(same[first])]}'>"
        f"{_escaped(model, tokens[first:last])}</span>"
        for first, last in pairwise(edges)
    )
