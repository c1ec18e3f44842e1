"""What every explorer shares: controls, work beside the page, figures that change in place.

An explorer is one function from the values of its controls to a view: figures, words, and the code
that makes the same figures. This module runs it on a thread of its own, so that the page stays
alive; the newest wish wins, a running one can be stopped, and whatever goes wrong is one line that
leaves the last figures as they are.
"""

from __future__ import annotations

import contextlib
import html
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import anywidget
import ipywidgets as widgets
import plotly.graph_objects as go
import traitlets

from workbench.explore.picture import TEMPLATES, Picture
from workbench.table import InputError

LINE = 500  # characters of what went wrong; some libraries say pages
WAIT = 0.3  # seconds of work after which progress is shown; quicker answers would only flicker


class Stopped(Exception):
    """The user, or a newer wish, ended this piece of work."""


class Offer(InputError):
    """Something is lacking that can be made; shown with a button.

    Args:
        message: What is lacking, and how long it takes to make.
        label: Of the button.
        make: Makes it, telling a :class:`Work` how far it is; then the view is drawn again.
    """

    def __init__(self, message: str, label: str, make: Callable[[Work], None]):
        super().__init__(message)
        self.label, self.make = label, make


@dataclass(frozen=True)
class View:
    """What an explorer shows for one setting of its controls.

    Attributes:
        figures: By name; a name that is missing keeps its last figure.
        words: HTML below the figures; what came from data is escaped by who makes it.
        code: Python that makes the same figures, ``figures`` by name, from public names.
    """

    figures: Mapping[str, go.Figure] = field(default_factory=dict)
    words: str = ""
    code: str = ""


class Work:
    """Handed to long work: through it the work tells how far it is and is told to end."""

    def __init__(
        self,
        tell: Callable[[str, float | None], None],
        show: Callable[[Mapping[str, go.Figure]], None] = lambda figures: None,
    ):
        self._tell, self._show = tell, show
        self._stop = threading.Event()
        self._newer = threading.Event()

    def stop(self, *, newer: bool = False) -> None:
        """End the work at its next step; ``newer`` where a newer wish has come."""
        (self._newer if newer else self._stop).set()

    def step(self, what: str = "", share: float | None = None, *, shared: bool = False) -> None:
        """Say what is done now, and what share of all is behind; called between steps.

        Args:
            shared: The newer wish needs this work too, so only the user ends it.

        Raises:
            Stopped: Somebody ended it.
        """
        if self._stop.is_set() or (self._newer.is_set() and not shared):
            raise Stopped
        self._tell(what, share)

    def show(self, figures: Mapping[str, go.Figure]) -> None:
        """Show figures that are done while the words, or others, take longer.

        Raises:
            Stopped: Somebody ended the work.
        """
        if self._stop.is_set() or self._newer.is_set():
            raise Stopped
        self._show(figures)


def subject_of(model, items: str = "", corpus: str = "", *, run: str = "base"):
    """What :func:`load_subject` gives, with a module of its own; a Subject may be given as it is.

    Another explorer of the same subject reads other steps into its module, at the same time.

    Raises:
        Offer: The suite is not trained yet.
        InputError: As :func:`load_subject`.
    """
    from workbench.subject import Subject, load_subject
    from workbench.suite import specification
    from workbench.table import cache_folder

    if isinstance(model, Subject):
        return replace(model, source=model.source.select(model.source.steps))
    if model == "suite":
        place = cache_folder() / "suites" / specification(corpus or None).hash
        if not place.is_dir():
            raise Offer(
                "explore: the embedded suite is not trained yet; that takes about four minutes on "
                "two cores, once",
                "Train the suite",
                lambda work: _train_suite(corpus, work),
            )
    return load_subject(model, items, corpus=corpus, run=run)


def _train_suite(corpus: str, work: Work) -> None:
    """Train in a process of its own, which can be ended at any time and leaves nothing half-made."""
    command = [
        sys.executable,
        "-m",
        "workbench",
        "suite",
        *(["--corpus", corpus] if corpus else []),
    ]
    with tempfile.TemporaryFile("w+", errors="replace") as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, stdin=subprocess.DEVNULL)

        def last_line() -> str:
            told.seek(0)
            lines = re.split(r"[\r\n]+", told.read().strip())
            return lines[-1].strip()

        try:
            while process.poll() is None:
                line = last_line()
                share = re.search(r"(\d+)%", line)
                work.step(
                    line[:90] or "training", int(share[1]) / 100 if share else None, shared=True
                )
                time.sleep(0.3)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode:
            raise InputError(
                f"explore: training the suite ended with status {process.returncode}: "
                f"{last_line() or 'it said nothing'}"
            )


class Foot(anywidget.AnyWidget):
    """The code of the view with a button that copies it; it also tells whether the page is dark."""

    _esm = TEMPLATES / "foot.js"
    dark = traitlets.Bool(False).tag(sync=True)
    code = traitlets.Unicode("").tag(sync=True)


class Explorer(widgets.VBox):
    """Controls, figures, words, one line for what went wrong, and the code of it all.

    Args:
        title: Shown above the controls.
        controls: Widgets by name, in their order; each has a description and a tooltip.
        draw: Makes the view of ``{name: value}``. Runs on a thread of its own, never twice at
            once; long work calls ``work.step`` between its steps.
        figures: Names of the figures, in the order of the page.
        least: Width below which a figure has a row of its own.

    Attributes:
        controls: As given.
        figures: The pictures by name.
        view: The last view, None before the first.
        message: The line that is shown, empty if all is well.
    """

    def __init__(
        self,
        title: str,
        controls: Mapping[str, widgets.Widget],
        draw: Callable[[dict, Work], View],
        *,
        figures: tuple[str, ...] = ("figure",),
        least: str = "30em",
    ):
        self.title = title
        self.controls = dict(controls)
        self.figures = {name: Picture() for name in figures}
        self.view: View | None = None
        self.message = ""
        self._draw = draw
        self._lock = threading.Lock()
        self._painting = threading.Lock()  # the page's theme may change while a view is drawn
        self._idle = threading.Event()
        self._idle.set()
        self._wish: dict | None = None
        self._work: Work | None = None
        self._quiet: set[int] = set()  # threads whose changes of controls ask for nothing
        self._offer: Offer | None = None
        self._taken: Offer | None = None
        self._line = widgets.HTML()
        self._words = widgets.HTML()
        self._bar = widgets.FloatProgress(max=1.0, layout={"width": "14em"})
        self._doing = widgets.Label()
        stop = widgets.Button(description="Stop", icon="stop", tooltip="End this piece of work")
        stop.on_click(lambda _: self.stop())
        self._make = widgets.Button(button_style="primary", layout={"width": "auto"})
        self._make.on_click(lambda _: self._take())
        self._make.layout.display = "none"
        self._progress = widgets.HBox([self._bar, stop, self._doing])
        self._progress.layout.visibility = "hidden"  # it keeps its place, so that nothing jumps
        self._foot = Foot()
        self._told = (self._line, self._words, self._foot)
        self._foot.observe(lambda _: self._repaint(), "dark")
        for control in self.controls.values():
            control.observe(self._changed, "value")
        for picture in self.figures.values():
            place = picture.layout  # another in its place would leave this one behind
            place.flex, place.min_width, place.overflow = f"1 1 {least}", "0", "hidden"
        wrap = {"flex_flow": "row wrap", "width": "100%"}
        super().__init__(
            [
                widgets.HTML(f"<h3 style='margin:0'>{html.escape(title)}</h3>"),
                widgets.HBox(list(self.controls.values()), layout=wrap),
                self._progress,
                widgets.HBox([self._line, self._make], layout={"flex_flow": "row wrap"}),
                widgets.HBox(list(self.figures.values()), layout=wrap),
                self._words,
                self._foot,
            ]
        )
        self.add_class("workbench-explorer")
        self.redraw()

    @property
    def values(self) -> dict:
        """What the controls are set to, by name."""
        return {name: control.value for name, control in self.controls.items()}

    @property
    def code(self) -> str:
        """Python that makes the figures that are shown."""
        return self.view.code if self.view else ""

    def redraw(self) -> None:
        """Draw for the present values; what is being drawn for older ones is ended."""
        with self._lock:
            self._wish = self.values
            if self._work:
                self._work.stop(newer=True)
            if not self._idle.is_set():
                return
            self._idle.clear()
        threading.Thread(target=self._fulfil, daemon=True).start()

    def stop(self) -> None:
        """End the work that runs; the last figures stay."""
        with self._lock:
            self._wish = None
            if self._work:
                self._work.stop()

    def wait(self, seconds: float = 600) -> Explorer:
        """Wait until everything asked for is drawn.

        Raises:
            TimeoutError: It takes longer.
        """
        try:
            done = self._idle.wait(seconds)
        except KeyboardInterrupt:  # whoever interrupts the kernel means the work
            self.stop()
            raise
        if not done:
            raise TimeoutError(f"{self.title}: still at work after {seconds} s")
        # what the thread sent belongs to the cell that made the explorer; who runs a notebook
        # without a page, as a report does, records what comes of the cell that runs
        for widget in (*self.controls.values(), *self.figures.values(), *self._told):
            if widget.comm is not None:  # it may be closed
                widget.send_state()
        return self

    def set(self, **values) -> None:
        """Set several controls and draw once."""
        with self.quietly():
            for name, value in values.items():
                self.controls[name].value = value
        self.redraw()

    @contextlib.contextmanager
    def quietly(self) -> Iterator[None]:
        """Controls that change inside draw nothing, such as one whose options follow another."""
        thread = threading.get_ident()
        outermost = thread not in self._quiet
        self._quiet.add(thread)
        try:
            yield
        finally:
            if outermost:
                self._quiet.discard(thread)

    def on_click(self, figure: str, answer: Callable) -> None:
        """Call ``answer(x, y, trace)`` for the point of a figure that was clicked.

        What it raises is the explorer's line; the figures stay.
        """

        def told(x, y, trace) -> None:
            try:
                answer(x, y, trace)
            except Exception as error:  # else it would end in the kernel's log, seen by nobody
                self._say(_reason(error))

        self.figures[figure].on_click(told)

    def close(self) -> None:
        """End the work and take the explorer, with all its parts, off every page and out of memory.

        A cell that is run again makes another explorer; the widgets keep the former one, with its
        model, for as long as it is not closed.
        """
        if self.comm is not None:
            self.stop()
            for each in _below(self):
                each.close()
        super().close()

    def _changed(self, _) -> None:
        if threading.get_ident() not in self._quiet:
            self.redraw()

    def _fulfil(self) -> None:
        while True:
            taken = None
            with self._lock:
                values, self._wish = self._wish, None
                if values is None:
                    self._idle.set()
                    return
                self._work = work = Work(self._tell, self._paint)
            patience = threading.Timer(WAIT, self._show_progress, [work])
            patience.daemon = True
            patience.start()
            try:
                taken, self._taken = self._taken, None
                if taken:
                    taken.make(work)
                self._show(self._draw(values, work), work)
            except Stopped:
                if self._wish is None:
                    self._say(
                        "Stopped; what is shown belongs to the last settings that were drawn.",
                        taken,
                    )
            except Offer as offer:
                self._say(str(offer), offer)
            except BaseException as error:  # a line in the widget; the explorer stays usable
                self._say(_reason(error))
            finally:
                patience.cancel()
                with self._lock:
                    self._work = None
                self._progress.layout.visibility = "hidden"

    def _show(self, view: View, work: Work) -> None:
        work.show(view.figures)  # not of work that was ended, though it came to its end
        self.view = view
        self._words.value = view.words
        self._foot.code = view.code
        self._say("")

    def _paint(self, figures: Mapping[str, go.Figure]) -> None:
        with self._painting:
            for name, figure in figures.items():
                self.figures[name].draw(figure, dark=self._foot.dark)

    def _repaint(self) -> None:
        with self._painting:  # what is shown is looked up inside, or it would be painted over
            for each in self.figures.values():
                if each.figure:
                    each.draw(each.figure, dark=self._foot.dark)

    def _take(self) -> None:
        self._taken = self._offer
        self.redraw()

    def _say(self, line: str, offer: Offer | None = None) -> None:
        line = " ".join(line.split())
        self.message = line = line if len(line) <= LINE else f"{line[:LINE]} …"
        self._offer = offer
        self._make.description = self._make.tooltip = offer.label if offer else ""
        self._make.layout.display = "" if offer else "none"
        self._line.value = f"<div role='alert'>⚠ {html.escape(line)}</div>" if line else ""

    def _tell(self, what: str, share: float | None) -> None:
        self._doing.value = what
        if share is not None:
            self._bar.value = share

    def _show_progress(self, work: Work) -> None:
        with self._lock:
            if self._work is work:
                self._progress.layout.visibility = "visible"


def _reason(error: BaseException) -> str:
    """The message of an input error, and of others what kind they are."""
    if isinstance(error, InputError):
        return str(error)
    return ": ".join(filter(None, (type(error).__name__, str(error))))


def _below(widget: widgets.Widget) -> Iterator[widgets.Widget]:
    """All widgets inside a widget, with what they are laid out and styled by."""
    for child in getattr(widget, "children", ()):
        yield from _below(child)
        yield child
    yield from (part for name in ("layout", "style") if (part := getattr(widget, name, None)))
