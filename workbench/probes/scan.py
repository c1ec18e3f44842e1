"""Where in a long text does a model know how it goes on? Windows slid along it, each asked alone."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Int

from workbench.decoding import Decoding
from workbench.models import Checkpoints, LanguageModel
from workbench.sweep import Question, sweep
from workbench.table import InputError

TOP_K = Decoding(top_k=40)  # the scheme of Cooper et al. (2025)
TIMED = 32  # windows that a forecast is measured on


def read_text(path: str | Path) -> str:
    """A text file as it is, for a scan.

    Raises:
        InputError: No such file, not UTF-8, or nothing in it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"read_text: no file at {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"read_text: {path} is not UTF-8 text ({error.reason})") from None
    if not text.strip():
        raise InputError(f"read_text: {path} holds no text")
    return text


def probe_scan(
    source: LanguageModel | Checkpoints,
    text: str | Path,
    *,
    name: str = "text",
    group: str = "seen",
    prefix: int = 50,
    suffix: int = 50,
    stride: int = 10,
    decoding: Decoding = TOP_K,
) -> pd.DataFrame:
    """Slide a window of prompt and suffix along a text and ask each window alone.

    Cooper et al. (2025). Each window begins a context of its own, as a sample of the model would,
    so the work is windows x (prefix + suffix) tokens (:func:`forecast_scan`); batches are reduced
    as they come, and of each window two numbers stay.

    Args:
        source: A model, or the checkpoints of a run.
        text: The text itself, or the ``Path`` of a UTF-8 file.
        name: What tables and figures call the text, the coordinate ``kind``.
        group: ``seen``, or ``never`` for a control text that the model was not trained on.
        prefix, suffix: Tokens of prompt and of what it should give, at least 1 each.
        stride: Tokens from one window to the next, at least 1. The text's last tokens, fewer than
            the stride, may lie in no window.
        decoding: The scheme under which suffixes are scored.

    Returns:
        Table with, for each window and step, ``log_p_z`` (log-probability of the suffix under the
        scheme, nats; -inf where it cannot come out) and ``verbatim_length`` (tokens of it that
        greedy decoding gives). Coordinates ``kind``, ``position`` (the suffix's first token,
        counted from 0), ``prefix``, ``suffix``, ``stride`` and ``scheme``.

    Raises:
        InputError: Lengths below 1 or beyond the context, a text too short, NaN scores.
    """
    text = _checked(text, prefix, suffix, stride)

    def cut(model, frame):
        if prefix + suffix > model.context:
            raise InputError(
                f"probe_scan: {prefix + suffix} tokens are more than the model's context of "
                f"{model.context}; ask for fewer"
            )
        tokens = windows(model.encode([text])[0], prefix + suffix, stride)
        position = prefix + stride * np.arange(len(tokens))
        digits = len(str(position[-1]))
        kept = pd.DataFrame({"item": [f"{name} {at:0{digits}d}" for at in position]})
        return tokens, kept.assign(group=group, kind=name, position=position)

    def reduce(scores, tokens, index):
        wrong = scores.guess != np.stack(tokens)[:, prefix:]
        right = np.where(wrong.any(axis=1), wrong.argmax(axis=1), suffix)
        log_p_z = scores.under_scheme[..., 0].sum(axis=1, dtype=np.float64)
        return {("log_p_z", decoding.name): log_p_z, "verbatim_length": right.astype(float)}

    return sweep(
        source,
        pd.DataFrame({"item": [name], "text": [text], "group": [group]}),
        cut,
        Question(
            asker="probe_scan",
            start=prefix,
            # the plain log-probability is there to refuse a model that gives NaN
            keep=("log_probability", "guess"),
            settings={"prefix": prefix, "suffix": suffix, "stride": stride},
            reduce=reduce,
            schemes=(decoding,),
        ),
    )


def windows(
    tokens: Int[np.ndarray, " pos"], width: int, stride: int
) -> Int[np.ndarray, "window width"]:
    """All whole windows, as a view: the text is not copied.

    Raises:
        InputError: The text is shorter than one window.
    """
    if len(tokens) < width:
        raise InputError(
            f"probe_scan: the text has {len(tokens)} tokens, one window needs {width}; give a "
            "longer text or shorter windows"
        )
    return np.lib.stride_tricks.sliding_window_view(tokens, width)[::stride]


def forecast_scan(
    model: LanguageModel,
    text: str | Path,
    *,
    prefix: int = 50,
    suffix: int = 50,
    stride: int = 10,
) -> str:
    """How long a scan will take, in a sentence, measured on its first windows.

    Raises:
        InputError: As :func:`probe_scan`.
    """
    text = _checked(text, prefix, suffix, stride)
    cut = windows(model.encode([text])[0], prefix + suffix, stride)
    few = list(cut[:TIMED])
    model.score(few[:1], start=prefix, schemes=(TOP_K,))  # what only the first call costs
    begun = time.perf_counter()
    model.score(few, start=prefix, schemes=(TOP_K,))
    seconds = (time.perf_counter() - begun) * len(cut) / len(few)
    about = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    return (
        f"{len(cut):,} windows of {prefix} + {suffix} tokens, {cut.size:,} tokens in all: about "
        f"{'a second' if seconds < 1.5 else about} a checkpoint on {model.device}"
    )


def add_passages(model: LanguageModel, text: str | Path, table: pd.DataFrame) -> pd.DataFrame:
    """Add the text of each row's stretch of tokens: what a run says, where a cell lies.

    Args:
        model: Any checkpoint of the run that was scanned; only its tokenizer is used.
        text: The text that was scanned.
        table: Rows with ``position`` (first token; NaN: nowhere) and ``tokens`` (how many), all
            of this text.

    Returns:
        The table with ``characters`` (length in characters, 0 for nothing) and ``passage``.

    Raises:
        InputError: A column is lacking, or a stretch lies beyond the text.
    """
    for name in ("position", "tokens"):
        if name not in table.columns:
            raise InputError(f"add_passages: no column {name!r}; there are {', '.join(table)}")
    text = read_text(text) if isinstance(text, Path) else text
    _, spans = model.encode_spans(text)
    passages = []
    for at, count in zip(table["position"], table["tokens"], strict=True):
        if math.isnan(at) or count == 0:
            passages.append("")
            continue
        if at + count > len(spans):
            raise InputError(
                f"add_passages: tokens {at:g} to {at + count:g} lie beyond the text's "
                f"{len(spans)}; give the text that was scanned"
            )
        passages.append(text[spans[int(at), 0] : spans[int(at + count) - 1, 1]])
    return table.assign(characters=[len(each) for each in passages], passage=passages)


def _checked(text: str | Path, prefix: int, suffix: int, stride: int) -> str:
    for name, value in (("prefix", prefix), ("suffix", suffix), ("stride", stride)):
        if value < 1:
            raise InputError(f"probe_scan: {name} is {value}, but must be at least 1")
    return read_text(text) if isinstance(text, Path) else text
