"""Results that other tools have written, read into the one table: evaluation harness, unlearning
benchmarks, the Trainer's log, CSV; and the checkpoints behind them, compared by content.

Nothing is guessed in silence: where a step, a number of items or a shot count comes from stands in
the table, and what cannot be read is counted with its reason.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd

from workbench.stats.audit import finding, findings_table
from workbench.stats.summarise import wilson_interval
from workbench.table import METRICS, InputError, validate, whole_file

LEVEL = 0.95
NEAR = 4  # the file and its nearest folders: what their names say is about the file
# names of checkpoints: step1000, checkpoint-500, global_step40, iter_0002000, step1000-tokens4B
STEP_NAME = re.compile(
    r"(?:^|[^a-z])(?:global[-_]?step|step|checkpoint|ckpt|iteration|iter)[-_=]?(\d+)(?![.\d])",
    re.IGNORECASE,
)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SHOT_NAME = re.compile(rf"(?<![a-z0-9])(\d+|{'|'.join(WORDS)})[-_ ]?shots?(?![a-z])", re.IGNORECASE)
SAMPLES_NAME = re.compile(r"samples_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT[\d.:-]+)\.jsonl$")
DATE_NAME = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d)[-:](\d\d)[-:](\d\d(?:\.\d+)?)")

# what the harness and the Trainer call it -> key of METRICS; anything else keeps its own name in
# `source_metric` and becomes a task_score, a task_loss or, where better is unknown, an outcome
KNOWN = {
    "acc": "accuracy",
    "accuracy": "accuracy",
    "acc_norm": "accuracy_norm",
    "exact_match": "exact_match",
    "em": "exact_match",
    "loss": "loss",
    "extraction_strength": "extraction_strength",
    "exact_memorization": "top1",
}
VERDICTS = ("accuracy", "accuracy_norm", "exact_match")  # means of one 0 or 1 an item
LOW = re.compile(r"ppl|perplexity|loss|bits_per_byte|brier|(?:^|_)(?:ter|wer|cer)$")
HIGH = re.compile(
    r"^(acc|exact_match|em|f1|bleu|rouge|chrf|mcc|mc[12]$|pass|score|likelihood_ratio)"
    r"|(_Prob|_ROUGE|_prob|_rouge)$|^(retain|ra|wf)_|^model_utility$"
)
UNKNOWN_SIGN = re.compile(r"privleak|^mia_|forget_quality|forget_[Tt]ruth_[Rr]atio")

# expected accuracy of a guess among the answers offered; majority answers may do better
CHANCE = {
    r"arc_(easy|challenge)|sciq|logiqa\d*|hellaswag|openbookqa|race|swag|mathqa": 0.25,
    r"(hendrycksTest|mmlu)([-_].*)?": 0.25,
    r"piqa|winogrande|wsc(273)?|boolq|copa|rte|wic|qnli|mrpc|multirc|blimp(_.*)?|crows_pairs.*": 0.5,
    r"(mnli|cb|anli_r\d|xnli(_.*)?)": 1 / 3,
    r"lambada.*|triviaqa|nq_open|gsm8k.*|squad.*|coqa|drop": 0.0,
}
_CHANCE = [(re.compile(pattern), value) for pattern, value in CHANCE.items()]

NO_NUMBER = "no number"
NOT_RESULTS = "file of another kind"
BOOKKEEPING = "clock, schedule or count, no measure of the model"
SUPERSEDED = "older evaluation of the same (repeats='latest')"
AGAIN = "the same row of a Trainer's log, written again by a later checkpoint"
SUMMARY = "summary beside its full EVAL file"
ITEMS = "single items (items=True reads them)"

_SIDE = {"alias", " ", "", "name", "samples", "sample_len", "sample_count", "task_name"}
_SIDE |= {"prompt_name", "prompt_id", "prompt_jinja", "prompt_original_task", "comment", "subset"}
_SIDE |= {"dataset_path", "dataset_name", "fixed_answer_choice_list"}
_CLOCK = re.compile(
    r"^(step|epoch|learning_rate|grad_norm|total_flos|num_input_tokens_seen|train_loss)$"
    r"|_runtime$|_per_second$|_time$|_memory|^train_"
)
_CONFIGURATION = re.compile(
    r"^(config|generation_config|tokenizer.*|special_tokens_map|added_tokens|vocab|"
    r"preprocessor_config|adapter_config|.*\.index)\.json$"
)
_IN_EVAL = ("loss", "accuracy", "perplexity", "ppl", "f1", "exact_match")


@dataclass
class _File:
    """One file read: what holds for all of it, and its measures."""

    path: Path
    name: str
    kind: str
    run: str = ""
    step: int | None = None
    harness: str = ""
    precision: str = ""
    limit: float = np.nan
    date: float = np.nan
    # (task, key, item, value, stderr, n, step, shots, chance, aggregate, better, task version)
    measures: list[tuple] = field(default_factory=list)
    dropped: Counter = field(default_factory=Counter)


MEASURE = ("task", "source_metric", "item", "value", "stderr", "n", "step", "shots", "chance")
MEASURE += ("aggregate", "better", "task_version")


def load_results(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    step: str | None = None,
    steps: Mapping[str, int] | None = None,
    run: str | None = None,
    items: bool = False,
    repeats: str = "keep",
) -> pd.DataFrame:
    """Read evaluation results of any checkpoints into the one table.

    Read are, by content and not by name: results of lm-evaluation-harness of any vintage (0.2 and
    0.3: ``"acc"``; 0.4: ``"acc,none"``; forks whose results are a list of prompts) and, on
    request, its ``samples_*.jsonl``; ``*_EVAL.json`` and ``*_SUMMARY.json`` of OpenUnlearning;
    ``trainer_state.json``; CSV with the columns ``step``, ``value``, ``task`` or ``metric`` and,
    if there, ``n, stderr, item, run, shots``. Folders are searched to the bottom.

    The step is what the file itself records (revision, iteration, checkpoint in the model's path),
    else what its name says, else its nearest folder's. The run is the model evaluated, else the
    folder without its checkpoint part.

    Args:
        paths: Files or folders, one or several.
        step: A regular expression whose first group is the step, searched in the path relative to
            what was given; it goes before everything that is recorded.
        steps: Steps by file name or path; these go before ``step``.
        run: One name for all of them, where files do not say or say different things.
        items: Also read single items (``value_by_index``, ``samples_*.jsonl``), one row each.
        repeats: "keep" all evaluations of a checkpoint, told apart by ``file``, or the "latest".

    Returns:
        One row a measure, ``item`` "all". ``group`` is the task with shots and filter where known
        ("arc_easy, 5-shot") and, for scores without a metric of their own, their name. Metrics:
        ``accuracy``, ``accuracy_norm``, ``exact_match``, ``loss``,
        ``top1``, ``extraction_strength`` where the name is known; else ``task_score`` (higher is
        better), ``task_loss`` (lower is better) or ``outcome`` (direction unknown), always with
        the original name in ``source_metric``. Coordinates: ``task``, ``shots`` (NaN: not
        recorded), ``source_metric``, ``file``, ``declared_step`` and ``declared_shots`` (what names
        say), ``harness`` (version or commit), ``task_version``, ``precision``, ``limit``, ``chance``
        (accuracy of guessing), ``how`` (the interval was made).

        Intervals, 95 %: for a share of items right, Wilson's at n (``how`` "wilson"); where n is
        not recorded it is recovered from the standard error, ``n = 1 + p (1 - p) / se^2``, if that
        is a whole number of items with a whole number right ("wilson, n from stderr"); else, and
        for anything that is no mean of 0 and 1, ``value -+ 1.96 se`` cut to the metric's range
        ("stderr"). ``n`` is 0 where nothing says it. What was left out is counted by reason in
        ``.attrs["dropped"]``.

    Raises:
        InputError: Nothing to read, a file that is not whole, or no step: which file, and why.
    """
    if repeats not in ("keep", "latest"):
        raise InputError(f"load_results: repeats is {repeats!r}, but must be 'keep' or 'latest'")
    pattern = _pattern(step)
    places = _places(paths)
    dropped: Counter = Counter()
    files: list[_File] = []
    for path, name in _with_progress(places):
        read = _read(path, name, items, dropped, alone=len(places) == 1)
        if read is not None:
            files.append(read)
    if not files:
        raise InputError(_nothing(paths, places, dropped))
    _settle_steps(files, pattern, steps or {}, places)
    table = _assemble(files, run)
    for file in files:
        dropped.update(file.dropped)
    table = _without_repeats(table, repeats, dropped)
    table = _finish(table)
    table.attrs = {"dropped": dict(dropped), "files": len(files)}
    loud = {why: count for why, count in dropped.items() if why in (NO_NUMBER, NOT_RESULTS)}
    if loud:
        told = ", ".join(f"{count} x {why}" for why, count in loud.items())
        warnings.warn(f"load_results: left out {told}; see .attrs['dropped']", stacklevel=2)
    return table


def _pattern(step: str | None) -> re.Pattern | None:
    if step is None or step == "":
        return None
    try:
        pattern = re.compile(step)
    except re.error as error:
        raise InputError(
            f"load_results: step={step!r} is no regular expression ({error})"
        ) from None
    if pattern.groups < 1:
        raise InputError(f"load_results: step={step!r} has no group; put the number in ( )")
    return pattern


def _places(paths) -> list[tuple[Path, str]]:
    """Files to look at, each with its path relative to what was asked for."""
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    if not given:
        raise InputError("load_results: no file or folder was given")
    places: dict[Path, str] = {}
    for one in given:
        root = Path(one).expanduser()
        if root.is_file():
            places.setdefault(root, root.name)
        elif root.is_dir():
            for path in sorted(root.rglob("*")):
                inside = path.relative_to(root)
                hidden = any(part.startswith(".") for part in inside.parts)
                if path.suffix in (".json", ".jsonl", ".csv") and not hidden and path.is_file():
                    places.setdefault(path, inside.as_posix())
        else:
            raise InputError(f"load_results: no file or folder {one}")
    names = Counter(places.values())
    return [(p, name if names[name] == 1 else p.as_posix()) for p, name in places.items()]


def _with_progress(places: list) -> Iterator:
    if len(places) < 500:
        return iter(places)
    from tqdm.auto import tqdm

    return iter(tqdm(places, desc="result files", leave=False))


def _nothing(paths, places, dropped: Counter) -> str:
    seen = ", ".join(f"{name}" for _, name in places[:3]) or "no .json, .jsonl or .csv file"
    why = "; ".join(f"{count} x {reason}" for reason, count in dropped.items())
    return (
        f"load_results: no results in {paths} (saw {seen}{'; ' + why if why else ''}); it reads "
        "lm-evaluation-harness results, OpenUnlearning *_EVAL.json, trainer_state.json and CSV"
    )


def _read(path: Path, name: str, items: bool, dropped: Counter, *, alone: bool) -> _File | None:
    """One file, or None where it holds no results, which is counted."""
    if path.suffix == ".csv":
        return _read_csv(path, name, dropped, alone)
    if path.suffix == ".jsonl":
        if not SAMPLES_NAME.search(path.name):
            dropped[NOT_RESULTS] += 1
            return None
        if items:
            return _read_samples(path, name)
        dropped[ITEMS] += 1
        return None
    if _CONFIGURATION.match(path.name):
        return None  # a checkpoint's own files, large and many
    document = _json(path, name)
    if isinstance(document, dict) and isinstance(document.get("results"), (dict, list)):
        return _read_harness(path, name, document)
    if isinstance(document, dict) and isinstance(document.get("log_history"), list):
        return _read_trainer(path, name, document)
    if isinstance(document, dict) and document:
        values = list(document.values())
        if all(isinstance(v, dict) for v in values) and any("agg_value" in v for v in values):
            return _read_unlearning(path, name, document, items)
        if path.stem.lower().endswith("_summary") and all(_is_number(v) for v in values):
            full = path.with_name(re.sub("summary", "EVAL", path.name, flags=re.IGNORECASE))
            if full.is_file():
                dropped[SUMMARY] += len(values)
                return None
            entries = {k: {"agg_value": v} for k, v in document.items()}
            return _read_unlearning(path, name, entries, items)
    if alone:
        keys = ", ".join(map(str, list(document)[:4])) if isinstance(document, dict) else "a list"
        raise InputError(
            f"load_results: {name} is JSON of no known form (it has {keys}); it reads results of "
            "lm-evaluation-harness, OpenUnlearning's *_EVAL.json and trainer_state.json"
        )
    dropped[NOT_RESULTS] += 1
    return None


def _json(path: Path, name: str):
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "not text"
        size = path.stat().st_size
        raise InputError(
            f"load_results: {name} is not whole JSON ({where} of {size} bytes: "
            f"{getattr(error, 'msg', 'not UTF-8')}); copy it again or take it out of the folder"
        ) from None
    except OSError as error:
        raise InputError(f"load_results: {name} cannot be read ({error.strerror})") from None


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _chance(task: str, choices=None) -> float:
    if isinstance(choices, list) and len(choices) > 1:
        return 1 / len(choices)
    for pattern, value in _CHANCE:
        if pattern.fullmatch(task):
            return value
    return np.nan


# --- lm-evaluation-harness -----------------------------------------------------------------------


def _read_harness(path: Path, name: str, document: dict) -> _File:
    config = document.get("config") or {}
    settings = _arguments(config.get("model_args"))
    file = _File(path, name, "harness")
    file.harness = str(document.get("lm_eval_version") or document.get("git_hash") or "")
    file.precision = str(settings.get("dtype", "") or "")
    file.limit = float(config["limit"]) if _is_number(config.get("limit")) else np.nan
    file.date = _date(document.get("date"), name)
    file.run, file.step = _model(document, config, settings)
    results = document["results"]
    if isinstance(results, list):  # a fork that gives one entry a task and prompt
        results = {
            "+".join(str(e[k]) for k in ("task_name", "prompt_name") if e.get(k)): e
            for e in results
            if isinstance(e, dict)
        }
    counts, shots = document.get("n-samples") or {}, document.get("n-shot") or {}
    tasks, versions = document.get("configs") or {}, document.get("versions") or {}
    parts, better = document.get("group_subtasks") or {}, document.get("higher_is_better") or {}
    for task, entry in results.items():
        if not isinstance(entry, dict):
            file.dropped[NO_NUMBER] += 1
            continue
        set_up = tasks.get(task) or {}
        n = _count(counts.get(task), entry)
        aggregate = bool(parts.get(task))
        if aggregate and not n:
            each = [_count(counts.get(part), {}) for part in parts[task]]
            n = sum(each) if all(each) else 0
        few = next(
            (s for s in (shots.get(task), set_up.get("num_fewshot")) if _is_number(s)),
            None if aggregate else config.get("num_fewshot"),
        )
        few = float(few) if _is_number(few) else np.nan
        chance = _chance(task, None if aggregate else set_up.get("doc_to_choice"))
        for key, value in entry.items():
            base, _, filtered = key.partition(",")
            if key in _SIDE or base.endswith("_stderr"):
                continue
            if not _is_number(value) and value is not None:
                file.dropped[NO_NUMBER] += value not in ("", " ") and not isinstance(value, bool)
                continue
            stderr = entry.get(base + "_stderr" + ("," + filtered if filtered else ""))
            file.measures.append(
                (
                    task,
                    base if filtered in ("", "none") else key,
                    "all",
                    np.nan if value is None else float(value),
                    float(stderr) if _is_number(stderr) else np.nan,
                    n,
                    None,
                    few,
                    chance,
                    aggregate,
                    (better.get(task) or {}).get(base),
                    str(versions.get(task, "")),
                )
            )
    return file


def _arguments(given) -> dict:
    """``model_args`` of any vintage: ``"pretrained=a/b,revision=step1000"`` or a mapping."""
    if isinstance(given, dict):
        return given
    if not isinstance(given, str):
        return {}
    pairs = (part.split("=", 1) for part in given.split(",") if "=" in part)
    return {key.strip(): value.strip() for key, value in pairs}


def _model(document: dict, config: dict, settings: dict) -> tuple[str, int | None]:
    """The run's name and the step that the file records, where it does."""
    named = next((str(settings[k]) for k in ("peft", "delta", "pretrained", "model", "path")
                  if isinstance(settings.get(k), str) and settings[k]), "")  # fmt: skip
    named = named or str(document.get("model_name") or "")
    found = _step_in(str(settings.get("revision") or ""))
    if found is None and _is_number(settings.get("iteration")):
        found = int(settings["iteration"])
    parts = Path(named).parts
    if named and len(parts) > 1 and _step_in(parts[-1]) is not None:
        return "/".join(parts[:-1]).replace("//", "/"), _step_in(
            parts[-1]
        ) if found is None else found
    return named, found


def _step_in(text: str) -> int | None:
    found = STEP_NAME.findall(text)
    return int(found[-1]) if found else None


def _count(counted, entry: Mapping) -> int:
    if isinstance(counted, dict):
        counted = counted.get("effective", counted.get("original"))
    for value in (counted, entry.get("samples"), entry.get("sample_len")):
        if _is_number(value) and value > 0:
            return int(value)
    return 0


def _date(recorded, name: str) -> float:
    """Seconds since 1970 of the evaluation: as recorded, else as the file's name says."""
    if _is_number(recorded):
        return float(recorded)
    found = DATE_NAME.search(recorded if isinstance(recorded, str) else name)
    if not found:
        return np.nan
    day, hour, minute, second = found.groups()
    return datetime.fromisoformat(f"{day}T{hour}:{minute}:00+00:00").timestamp() + float(second)


def _read_samples(path: Path, name: str) -> _File:
    """Items of one task; run and step are those of the results file written at the same time."""
    told = SAMPLES_NAME.search(path.name)
    task = told["task"]
    beside = path.with_name(f"results_{told['date']}.json")
    file = _File(path, name, "samples", date=_date(None, path.name))
    few = np.nan
    if beside.is_file():
        document = _json(beside, beside.name)
        whole = _read_harness(beside, beside.name, document)
        for fact in ("run", "step", "harness", "precision", "limit", "date"):
            setattr(file, fact, getattr(whole, fact))
        few = next((m[7] for m in whole.measures if m[0] == task), np.nan)
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                sample = json.loads(line)
                item = f"{task}/{sample['doc_id']}"
            except (json.JSONDecodeError, KeyError, TypeError):
                raise InputError(
                    f"load_results: {name}, line {number}, is no whole sample with a doc_id; copy "
                    "the file again or leave items=True away"
                ) from None
            named = sample.get("metrics")
            keys = named if isinstance(named, list) else [k for k in sample if k in KNOWN]
            rest = sample.get("filter") or "none"
            for key in keys:
                value = sample.get(key)
                if not _is_number(value) and not isinstance(value, bool):
                    file.dropped[NO_NUMBER] += 1
                    continue
                key = key if rest == "none" else f"{key},{rest}"
                one = (task, key, item, float(value), np.nan, 1, None, few, _chance(task))
                file.measures.append((*one, False, None, ""))
    return file


# --- OpenUnlearning, the Trainer, CSV ------------------------------------------------------------


def _read_unlearning(path: Path, name: str, document: dict, items: bool) -> _File:
    file = _File(path, name, "unlearning", date=_date(None, name))
    for metric, entry in document.items():
        pooled = entry.get("agg_value")
        by_index = entry.get("value_by_index")
        by_index = by_index if isinstance(by_index, dict) else {}
        columns = _by_index(by_index)
        n, stderr = len(next(iter(columns.values()), ())), np.nan
        if not _is_number(pooled):
            file.dropped[NO_NUMBER] += 1
            continue
        for values in columns.values():
            # only where the pooled number is the items' mean do the items say how sure it is
            if len(values) > 1 and math.isclose(
                np.mean(list(values.values())), pooled, rel_tol=1e-6
            ):
                n = len(values)
                stderr = float(np.std(list(values.values()), ddof=1) / math.sqrt(n))
                break
        rest = (np.nan, np.nan, False, None, "")
        file.measures.append((metric, metric, "all", float(pooled), stderr, n, None, *rest))
        if not items:
            file.dropped[ITEMS] += len(by_index)
            continue
        for key, values in columns.items():
            for index, value in values.items():
                one = (metric, f"{metric}.{key}", f"{metric}/{index}", value, np.nan, 1, None)
                file.measures.append((*one, *rest))
    return file


def _by_index(by_index: dict) -> dict[str, dict[str, float]]:
    """Numbers of each item by name; several answers of one item are averaged, texts left out."""
    columns: dict[str, dict[str, float]] = {}
    for index, values in by_index.items():
        if not isinstance(values, dict):
            continue
        for key, value in values.items():
            if isinstance(value, list) and value and all(_is_number(v) for v in value):
                value = float(np.mean(value))
            if _is_number(value):
                columns.setdefault(key, {})[index] = float(value)
    return columns


def _read_trainer(path: Path, name: str, document: dict) -> _File:
    file = _File(path, name, "trainer")
    file.step = document.get("global_step") if _is_number(document.get("global_step")) else None
    latest: dict[tuple, tuple] = {}
    for row in document["log_history"]:
        if not isinstance(row, dict) or not _is_number(row.get("step")):
            file.dropped["row of a Trainer's log without a step"] += 1
            continue
        for key, value in row.items():
            if _CLOCK.search(key):
                file.dropped[BOOKKEEPING] += 1
                continue
            if not _is_number(value):
                file.dropped[NO_NUMBER] += 1
                continue
            task, metric = _trainer_key(key)
            one = (task, metric, "all", float(value), np.nan, 0, int(row["step"]), np.nan)
            place = (task, metric, int(row["step"]))
            file.dropped["logged twice at one step"] += place in latest
            latest[place] = (*one, np.nan, False, None, "")
    file.dropped = +file.dropped
    file.measures = list(latest.values())
    return file


def _trainer_key(key: str) -> tuple[str, str]:
    """``eval_loss`` is loss of eval, ``eval_books_loss`` loss of books, ``loss`` that of train."""
    if not key.startswith("eval_"):
        return "train", key
    rest = key.removeprefix("eval_")
    if rest in _IN_EVAL:
        return "eval", rest
    for metric in _IN_EVAL:
        if rest.endswith("_" + metric):
            return rest.removesuffix("_" + metric), metric
    return "eval", rest


_CSV = ("step", "value", "task", "metric", "n", "stderr", "item", "run", "shots")


def _read_csv(path: Path, name: str, dropped: Counter, alone: bool) -> _File | None:
    with path.open(newline="", encoding="utf-8-sig") as handle:
        try:
            lines = list(csv.DictReader(handle))
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"load_results: {name} is not a CSV file ({error})") from None
    columns = [c for c in (lines[0] if lines else {}) if c is not None]
    if "value" not in columns or not {"task", "metric"} & set(columns):
        if alone:
            raise InputError(
                f"load_results: {name} has the columns {', '.join(columns) or 'none'}; it needs "
                "value, and task or metric, one measure a line, beside step"
            )
        dropped[NOT_RESULTS] += 1
        return None
    file = _File(path, name, "csv")
    unread = [c for c in columns if c not in _CSV]
    if unread:
        file.dropped[f"column not read: {', '.join(unread)}"] += len(lines)
    runs = {line.get("run") or "" for line in lines}
    if len(runs) > 1:
        raise InputError(f"load_results: {name} holds {len(runs)} runs; write one file a run")
    file.run = runs.pop()
    for number, line in enumerate(lines, 2):
        task = line.get("task") or line.get("metric") or ""
        key = line.get("metric") or "value"
        values = {}
        for column, kind in (("value", float), ("stderr", float), ("n", int), ("step", int),
                             ("shots", float)):  # fmt: skip
            text = (line.get(column) or "").strip()
            try:
                values[column] = None if text in ("", "N/A") else kind(float(text))
                whole = kind is float or values[column] is None or values[column] == float(text)
            except (ValueError, OverflowError):
                whole = False
            if not whole:
                raise InputError(
                    f"load_results: {name}, line {number}: {column} is {text!r}, needs "
                    f"{'a whole number' if kind is int else 'a number'}"
                )
        floats = {k: np.nan if v is None else v for k, v in values.items()}
        one = (task, key, line.get("item") or "all", floats["value"], floats["stderr"])
        one = (*one, values["n"] or 0, values["step"], floats["shots"], _chance(task), False)
        file.measures.append((*one, None, ""))
    return file


# --- into the table ------------------------------------------------------------------------------


def _settle_steps(files: list[_File], pattern, steps: Mapping, places: list) -> None:
    unknown = [n for n in steps if not any(n in (p.name, name, str(p)) for p, name in places)]
    if unknown:
        raise InputError(f"load_results: steps names {unknown[0]!r}, but no such file was read")
    without = []
    for file in files:
        given = [steps[n] for n in (str(file.path), file.name, file.path.name) if n in steps]
        if given:
            file.step = int(given[0])
        elif pattern is not None:
            found = pattern.search(file.name)
            if not found or not (found.group(1) or "").isdigit():
                raise InputError(
                    f"load_results: step={pattern.pattern!r} finds no number in {file.name}"
                )
            file.step = int(found.group(1))
        elif file.step is None:
            file.step = _named_step(file.path)
        if file.step is None and any(m[6] is None for m in file.measures):
            without.append(file)
    if without:
        first = without[0]
        rest = f" and {len(without) - 1} more" if len(without) > 1 else ""
        raise InputError(
            f"load_results: {first.name}{rest}: no step. {_why(first)}, and no name in its path "
            "reads like step1000 or checkpoint-500. Give "
            f"steps={{{first.path.name!r}: 1000}}, or step=r'...(\\d+)' to find it in the path"
        )


def _why(file: _File) -> str:
    if file.kind == "harness":
        named = f"of {file.run!r} " if file.run else ""
        return f"The model arguments {named}name no revision or iteration with a step"
    return "The file records none"


def _named_step(path: Path, *, within: int | None = None) -> int | None:
    """What the file's name says, else its nearest folder's, of the last few where ``within``."""
    for part in reversed(path.absolute().with_suffix("").parts[-within if within else 0 :]):
        found = _step_in(part)
        if found is not None:
            return found
    return None


def _named_shots(path: Path) -> float:
    for part in reversed(path.absolute().parts[-NEAR:]):
        found = SHOT_NAME.findall(part)
        if found:
            word = found[-1].lower()
            return float(WORDS.index(word) if word in WORDS else word)
    return np.nan


def _named_run(file: _File) -> str:
    """The nearest folder that says something of its own, or the file where there is none."""
    stem = DATE_NAME.sub("", file.path.stem)
    stem = re.sub(r"_?(eval_results|results)_?.*$", "", stem)
    own = STEP_NAME.sub("", stem).strip("-_. ")
    if file.kind == "harness" and own:
        return own
    for part in file.path.absolute().parts[-2:0:-1]:
        if part.lower() in ("evals", "eval", "results") or SHOT_NAME.search(part):
            continue
        rest = STEP_NAME.sub("", part).strip("-_. ")
        if rest:
            return rest
    return file.path.stem


def _assemble(files: list[_File], run: str | None) -> pd.DataFrame:
    """All measures as columns, with what holds for their files beside them."""
    columns = list(zip(*(m for file in files for m in file.measures), strict=True))
    if not columns:
        raise InputError(f"load_results: {files[0].name} holds no measure")
    table = pd.DataFrame(dict(zip(MEASURE, columns, strict=True)))
    at = np.repeat(np.arange(len(files)), [len(file.measures) for file in files])
    recorded = np.array([file.step if file.step is not None else -1 for file in files])
    own = pd.to_numeric(table["step"], errors="coerce")
    table["step"] = own.where(own.notna(), recorded[at]).astype("int64")
    if (table["step"] < 0).any():
        first = files[int(at[(table["step"] < 0).to_numpy().argmax()])]
        raise InputError(f"load_results: {first.name} has a step below 0")
    facts = {
        "run": [run or file.run or _named_run(file) for file in files],
        "file": [file.name for file in files],
        "harness": [file.harness for file in files],
        "precision": [file.precision for file in files],
        "limit": [file.limit for file in files],
        "date": [file.date for file in files],
        "kind": [file.kind for file in files],
        "declared_shots": [_named_shots(file.path) for file in files],
    }
    for name, values in facts.items():
        table[name] = pd.Series(values)[at].to_numpy()
    named = pd.Series([_named_step(file.path, within=NEAR) for file in files], dtype="float64")[
        at
    ].to_numpy()
    # a Trainer's log holds many steps, of which its folder's is the last
    table["declared_step"] = np.where(table["kind"] == "trainer", np.nan, named)
    return table


def _without_repeats(table: pd.DataFrame, repeats: str, dropped: Counter) -> pd.DataFrame:
    where = ["run", "step", "task", "source_metric", "shots", "item"]
    logs = table["kind"] == "trainer"
    again = logs & table.duplicated([*where, "value"], keep="last")
    dropped[AGAIN] += int(again.sum())
    table = table[~again]
    if repeats == "latest":
        order = table.sort_values(["date", "file"], kind="stable", na_position="first")
        older = order.duplicated(where, keep="last").reindex(table.index)
        dropped[SUPERSEDED] += int(older.sum())
        table = table[~older]
    for why in [why for why, count in dropped.items() if not count]:
        del dropped[why]
    return table.reset_index(drop=True)


def _finish(table: pd.DataFrame) -> pd.DataFrame:
    """Metric keys, groups and intervals of the columns assembled."""
    base = table["source_metric"].str.partition(",")[0]
    keys = pd.DataFrame({"base": base, "better": table["better"].astype(object).where(
        table["better"].notna(), None)})  # fmt: skip
    unique = keys.drop_duplicates()
    named = {(b, h): _metric_of(b, h) for b, h in unique.itertuples(index=False)}
    metric = pd.Series([named[k] for k in keys.itertuples(index=False, name=None)], dtype=object)
    value = table["value"].to_numpy(dtype=float)
    value = np.where(np.isfinite(value), value, np.nan)
    for key in metric.unique():
        low, high = METRICS[key].low, METRICS[key].high
        mine = (metric == key).to_numpy()
        out = mine & (((low is not None) & (value < (low or 0))) | (
            (high is not None) & (value > (high or np.inf))))  # fmt: skip
        # a percentage where a share was meant: kept as it came, under a key without a range
        metric[out] = "task_score" if METRICS[key].better == "high" else "task_loss"
    shots = table["shots"].to_numpy(dtype=float)
    told = pd.Series([f", {s:g}-shot" if s == s else "" for s in np.unique(shots)],
                     index=np.unique(shots))  # fmt: skip
    filtered = table["source_metric"].str.partition(",")[2]
    group = table["task"] + told.reindex(shots).to_numpy()
    group = group + np.where(filtered != "", ", " + filtered, "")
    # several scores of a task share a key without a name of its own, so the group has to say which
    unnamed = metric.isin(("task_score", "task_loss", "outcome")) & (base != table["task"])
    unnamed &= base != "value"
    group = group + np.where(unnamed, ", " + base, "")
    lo, hi, n, how = _intervals(table, metric.to_numpy(), value)
    verdict = metric.isin(VERDICTS)
    made = pd.DataFrame(
        {
            "run": table["run"],
            "step": table["step"],
            "group": group,
            "item": table["item"],
            "metric": metric,
            "value": value,
            "lo": lo,
            "hi": hi,
            "n": n,
            "se": table["stderr"].to_numpy(dtype=float),
            "reason": np.where(np.isnan(value), "the file gives no finite number", ""),
            "task": table["task"],
            "shots": shots,
            "source_metric": table["source_metric"],
            "file": table["file"],
            "declared_step": table["declared_step"],
            "declared_shots": table["declared_shots"],
            "harness": table["harness"],
            "task_version": table["task_version"],
            "precision": table["precision"],
            "limit": table["limit"],
            "chance": np.where(verdict, table["chance"].to_numpy(dtype=float), np.nan),
            "how": how,
        }
    )
    return validate(made)


def _metric_of(base: str, higher_is_better) -> str:
    name = base.rpartition(".")[0] or base
    if base in KNOWN:
        return KNOWN[base]
    for known in ("extraction_strength", "exact_memorization"):
        if base.endswith(known):
            return KNOWN[known]
    if higher_is_better is not None:
        return "task_score" if higher_is_better else "task_loss"
    if UNKNOWN_SIGN.search(name):
        return "outcome"
    if LOW.search(base):
        return "task_loss"
    return "task_score" if HIGH.search(base) else "outcome"


def _intervals(table, metric: np.ndarray, value: np.ndarray):
    """Bounds, n and how they were made; Wilson's only where the number is a share of items."""
    stderr = table["stderr"].to_numpy(dtype=float)
    n = table["n"].to_numpy(dtype=float)
    verdict = np.isin(metric, VERDICTS) & ~table["aggregate"].to_numpy(dtype=bool)
    inside = verdict & (value >= 0) & (value <= 1)
    recovered = recover_n(np.where(inside, value, np.nan), stderr)
    # of one task all checkpoints answer the same items; where all are right or wrong se is 0
    known = pd.Series(np.where(n > 0, np.nan, recovered)).groupby(
        [table["run"].to_numpy(), table["task"].to_numpy(), np.isnan(table["limit"].to_numpy())]
    )
    one_n = known.transform("median").where(known.transform("nunique") == 1).to_numpy()
    from_stderr = np.where(np.isnan(recovered) & ((value == 0) | (value == 1)), one_n, recovered)
    from_stderr = np.where(n > 0, np.nan, from_stderr)
    count = np.where(n > 0, n, np.nan_to_num(from_stderr))
    # a mean of anything but 0 and 1 (a probability, say) spreads less than a share would
    with np.errstate(divide="ignore", invalid="ignore"):
        binomial = np.sqrt(value * (1 - value) / (count - 1))
        is_share = np.isnan(stderr) | (np.abs(stderr - binomial) <= 0.01 * binomial + 1e-12)
    single = (table["item"] != "all").to_numpy()
    use = inside & (count > 0) & is_share & ~single
    lo, hi = np.full(len(value), np.nan), np.full(len(value), np.nan)
    lo[use], hi[use] = wilson_interval(value[use], count[use], LEVEL)
    how = np.where(use, np.where(n > 0, "wilson", "wilson, n from stderr"), "")
    normal = ~use & (stderr > 0) & ~single & ~np.isnan(value)
    low = np.array([-np.inf if METRICS[m].low is None else METRICS[m].low for m in metric])
    high = np.array([np.inf if METRICS[m].high is None else METRICS[m].high for m in metric])
    z = 1.959963984540054
    lo = np.where(normal, np.maximum(value - z * stderr, low), lo)
    hi = np.where(normal, np.minimum(value + z * stderr, high), hi)
    how = np.where(normal, "stderr", how)
    return lo, hi, np.where(use | (n > 0), count, 0).astype("int64"), how


def recover_n(value: np.ndarray, stderr: np.ndarray) -> np.ndarray:
    """Items behind a share and the standard error of its mean, NaN where they do not fit.

    The sample's standard deviation over the root of n has ``se^2 = p (1 - p) / (n - 1)``: .375 with
    se .0242366 gives 400, of which 150 are right. Refused unless n and n p are whole numbers
    within 0.01, so that a mean of probabilities or a rounded number is not taken for a share.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        n = 1 + value * (1 - value) / stderr**2
        whole = np.rint(n)
        fits = (np.abs(n - whole) < 0.01) & (np.abs(value * whole - np.rint(value * whole)) < 0.01)
    return np.where(fits & (whole >= 2), whole, np.nan)


# --- checkpoints by content ----------------------------------------------------------------------


def audit_checkpoints(folder: str | os.PathLike) -> pd.DataFrame:
    """Compare the checkpoints of a run by the content of their weights; no model is loaded.

    Each tensor of each ``*.safetensors`` is hashed by name, type, shape and bytes, so that shards
    and metadata make no difference. Tensors that are the same at all checkpoints (buffers, frozen
    layers) say nothing and are left aside.

    Args:
        folder: Holds folders named ``step1000``, ``checkpoint-500`` or the like, at any depth.

    Returns:
        Findings as :func:`workbench.stats.audit.audit_results` gives them: ``identical_weights``
        (all tensors equal under another step or name), ``partly_identical`` (some that do change
        elsewhere), ``step_record`` (the Trainer's state records another step than the name),
        ``frozen`` (tensors that never change), ``not_read`` (no safetensors). Certain all: chance
        has no part in equal hashes.

    Raises:
        InputError: No checkpoints, or a file that is no whole safetensors file.
    """
    root = Path(folder).expanduser()
    places = _checkpoint_folders(root)
    if len(places) < 2:
        raise InputError(
            f"audit_checkpoints: {folder} holds {len(places)} folders named like step1000 or "
            "checkpoint-500, needs two or more"
        )
    made, digests = [], {}
    for run, step, path in places:
        files = sorted(path.glob("*.safetensors"))
        recorded = _recorded_step(path)
        where = {"run": run, "step": step, "file": path.relative_to(root).as_posix()}
        if recorded is not None and recorded != step:
            made.append(finding(
                "step_record", **where,
                what=f"the folder says step {step}, its trainer_state.json {recorded}",
                remedy="find out which is right before this checkpoint is used",
            ))  # fmt: skip
        if not files:
            made.append(finding(
                "not_read", **where, what="no *.safetensors file, so its weights were not compared",
                remedy="convert the checkpoint to safetensors",
            ))  # fmt: skip
            continue
        digests[(run, step, where["file"])] = {k: v for f in files for k, v in _hashes(f).items()}
    made += _compare_weights(digests)
    return findings_table(made, run=root.name)


def _checkpoint_folders(root: Path) -> list[tuple[str, int, Path]]:
    """(run, step, folder) of each checkpoint; the run is the folder that holds them."""
    if not root.is_dir():
        raise InputError(f"audit_checkpoints: no folder {root}")
    found = []
    for path in sorted(p for p in [root, *root.rglob("*")] if p.is_dir()):
        for each in sorted(p for p in path.iterdir() if p.is_dir()):
            step = re.fullmatch(
                r"(?:step|checkpoint|ckpt|global_step|iter)[-_]?(\d+)(-.*)?", each.name
            )
            if step:
                inside = path.relative_to(root).as_posix()
                run = path.resolve().name if inside == "." else inside
                found.append((run, int(step.group(1)), each))
    return sorted(found, key=lambda place: place[:2])


def _recorded_step(path: Path) -> int | None:
    state = path / "trainer_state.json"
    if not state.is_file():
        return None
    recorded = _json(state, state.as_posix()).get("global_step")
    return int(recorded) if _is_number(recorded) else None


def _hashes(path: Path) -> dict[str, str]:
    """SHA-256 of each tensor of a safetensors file, read in pieces."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            digests = {}
            for name, tensor in header.items():
                begin, end = tensor["data_offsets"]
                if 8 + length + end > size:
                    raise ValueError("it ends before its last tensor")
                digest = hashlib.sha256(f"{tensor['dtype']} {tensor['shape']}".encode())
                file.seek(8 + length + begin)
                for at in range(begin, end, 1 << 22):
                    digest.update(file.read(min(1 << 22, end - at)))
                digests[name] = digest.hexdigest()
            return digests
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"audit_checkpoints: {path} is not a whole safetensors file ({error}); fetch it again"
        ) from None


def _compare_weights(digests: dict[tuple, dict[str, str]]) -> list[dict]:
    if len(digests) < 2:
        return []
    names = set().union(*digests.values())
    fixed = {n for n in names if len({d.get(n) for d in digests.values()}) == 1}
    made = []
    content = {
        p: frozenset((n, h) for n, h in d.items() if n not in fixed) for p, d in digests.items()
    }
    if fixed and len(fixed) < len(names):
        run, step, _ = next(iter(digests))
        made.append(finding(
            "frozen", run=run, step=step, file="",
            what=f"{len(fixed)} of {len(names)} tensors are the same at all {len(digests)} "
            f"checkpoints, first {sorted(fixed)[0]}",
            remedy="fine for buffers and frozen layers; anything else was not trained",
        ))  # fmt: skip
    same: dict[frozenset, list] = {}
    for place, tensors in content.items():
        same.setdefault(tensors, []).append(place)
    for places in (p for p in same.values() if len(p) > 1):
        for run, step, file in places:
            others = [p for p in places if p != (run, step, file)]
            made.append(finding(
                "identical_weights", run=run, step=step, file=file,
                what=f"all tensors equal those of {_others(others, run)}",
                remedy="fetch it again; until then take all but one of them out",
            ))  # fmt: skip
    holders: dict[tuple, list] = {}
    for tensors, places in same.items():
        for tensor in tensors:
            holders.setdefault(tensor, []).append(places[0])
    partly: dict[tuple, Counter] = {}
    for tensor_holders in holders.values():
        for place in tensor_holders if len(tensor_holders) > 1 else ():
            partly.setdefault(place, Counter()).update(p for p in tensor_holders if p != place)
    for (run, step, file), others in partly.items():
        (other, count), moving = others.most_common(1)[0], len(names) - len(fixed)
        made.append(finding(
            "partly_identical", run=run, step=step, file=file,
            what=f"{count} of {moving} tensors that change elsewhere equal those of "
            f"{_others([other], run)}",
            remedy="look for a mixed or unfinished upload, or for layers frozen for a while",
        ))  # fmt: skip
    return made


def _others(places: Sequence[tuple], run: str) -> str:
    """Other checkpoints in words: the first few, and how many more."""
    told = [f"step {p[1]}" if p[0] == run else f"{p[0]} step {p[1]}" for p in places[:4]]
    return ", ".join(told) + (f" and {len(places) - 4} more" if len(places) > 4 else "")


# --- made-up results whose faults are known ------------------------------------------------------

# task: (items, chance, accuracy at the end); sizes of well-known tasks, numbers made up
_EXAMPLE = {
    "arc_easy": (2376, 0.25, 0.62),
    "arc_challenge": (1172, 0.25, 0.31),
    "piqa": (1838, 0.5, 0.73),
    "sciq": (1000, 0.25, 0.87),
    "lambada_openai": (5153, 0.0, 0.58),
    "winogrande": (1267, 0.5, 0.58),
    "logiqa": (651, 0.25, 0.25),
    "wsc": (104, 0.5, 0.3653846153846154),
    "capitals": (800, 0.25, 0.42),
}
_EXAMPLE_PEAK = (0.62, 10_000)  # of `capitals`, which is learned and half forgotten
_EXAMPLE_STEPS = [0, *(2**k for k in range(10)), *range(1000, 21_000, 1000)]
_COMMON = 0.8  # correlation of an item's answers at different steps


def write_example_results(folder: str | os.PathLike, *, seed: int = 0) -> pd.DataFrame:
    """Write made-up results of one run, in the harness's two forms, with faults put in on purpose.

    Nine tasks at 31 steps, items shared by all steps; up to step 4000 in the form of version 0.3,
    from then on in that of 0.4. ``capitals`` rises to .62 at step 10000 and falls to .42, which is
    no fault. The faults: one file holds the results of another step, one value is .12 too high,
    a folder says five shots where the files record none, a step and a task are missing, one task
    is at chance, and one always gives the same answer.

    Args:
        folder: Where the files go; files of the same names are overwritten.
        seed: Of the items answered right.

    Returns:
        The faults put in, with the columns ``kind, step, group`` of a finding.
    """
    folder, rng = Path(folder), np.random.default_rng([seed, 72])
    right = {task: _example_curve(task, rng) for task in _EXAMPLE}
    right["piqa"][_EXAMPLE_STEPS.index(14_000)] += round(0.12 * _EXAMPLE["piqa"][0])
    for at, step in enumerate(_EXAMPLE_STEPS):
        source = _EXAMPLE_STEPS.index(18_000) if step == 2000 else at
        scores = {task: counts[source] for task, counts in right.items()}
        if step == 8000:
            continue
        if step == 16_000:
            del scores["sciq"]
        if step <= 4000:
            path, document = (
                folder / "zero-shot" / f"example_step{step}.json",
                _form_3(scores, step),
            )
        else:
            shots = "five-shot" if step == 11_000 else "zero-shot"
            path = folder / shots / f"step{step}" / "results_2024-05-17T10-00-00.000000.json"
            document = _form_4(scores, step)
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(document, indent=2), encoding="utf-8")
    planted = [
        ("identical_values", 2000, "all"),
        ("identical_values", 18_000, "all"),
        ("checkpoint_off", 2000, "all"),
        ("value_off", 14_000, "piqa, 0-shot"),
        ("shots_record", 11_000, "all"),
        ("missing_step", 8000, "all"),
        ("missing_task", 16_000, "sciq, 0-shot"),
        ("constant", 20_000, "wsc, 0-shot"),
        ("at_chance", 20_000, "logiqa, 0-shot"),
    ]
    return pd.DataFrame(planted, columns=["kind", "step", "group"])


def _example_curve(task: str, rng: np.random.Generator) -> np.ndarray:
    """Items right at each step: a logistic rise over log steps, and for one task a fall after it."""
    n, chance, final = _EXAMPLE[task]
    if task == "wsc":
        return np.full(len(_EXAMPLE_STEPS), round(final * n))
    steps = np.array(_EXAMPLE_STEPS)
    top = _EXAMPLE_PEAK[0] if task == "capitals" else final
    share = chance + (top - chance) / (1 + (1500 / np.maximum(steps, 1)) ** 1.5)
    if task == "capitals":
        peak = _EXAMPLE_PEAK[1]
        done = np.clip((steps - peak) / (steps[-1] - peak), 0, 1)
        share = share - (share[-1] - final) * done
    item, own = rng.normal(size=n), rng.normal(size=(len(steps), n))
    place = math.sqrt(_COMMON) * item + math.sqrt(1 - _COMMON) * own
    from scipy.stats import norm

    return (place < norm.ppf(share)[:, None]).sum(axis=1)


def _stderr(right: int, n: int) -> float:
    return math.sqrt(right / n * (1 - right / n) / (n - 1))


def _form_3(scores: Mapping[str, int], step: int) -> dict:
    counts = {task: (int(k), _EXAMPLE[task][0]) for task, k in scores.items()}
    return {
        "results": {t: {"acc": k / n, "acc_stderr": _stderr(k, n)} for t, (k, n) in counts.items()},
        "versions": dict.fromkeys(counts, 0),
        "config": {
            "model": "hf-causal",
            "model_args": f"pretrained=example/model-160m,revision=step{step}",
            "num_fewshot": 0,
            "limit": None,
        },
    }


def _form_4(scores: Mapping[str, int], step: int) -> dict:
    counts = {task: (int(k), _EXAMPLE[task][0]) for task, k in scores.items()}
    return {
        "results": {
            t: {"alias": t, "acc,none": k / n, "acc_stderr,none": _stderr(k, n)}
            for t, (k, n) in counts.items()
        },
        "n-shot": dict.fromkeys(counts, 0),
        "n-samples": {t: {"original": n, "effective": n} for t, (_, n) in counts.items()},
        "versions": dict.fromkeys(counts, 0),
        "higher_is_better": {t: {"acc": True} for t in counts},
        "config": {
            "model": "hf",
            "model_args": {"pretrained": "example/model-160m", "revision": f"step{step}"},
            "limit": None,
        },
        "date": 1_715_940_000.0 + step,
        "model_name": "example/model-160m",
    }
