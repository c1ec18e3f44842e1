"""The one table: one row is one measurement, whoever made it.

Probes return it, statistics map it to itself, plots draw it. It is a plain DataFrame with the
columns of :data:`COLUMNS`; any further column is a coordinate (``lag``, ``copies``, ``layer``),
but for ``se`` (a standard error) and ``reason`` (why a value is NaN), which ride beside the value.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

COLUMNS = ("run", "step", "group", "item", "metric", "value", "lo", "hi", "n")
TEXT = ("run", "group", "item", "metric")
BESIDE_VALUE = ("value", "lo", "hi", "n", "n_control", "se", "reason")
VERSION = 1  # of the file layout; load() refuses others by name
PASSPORT_KEY = b"workbench.passport"


class InputError(ValueError):
    """What came from the user cannot be used; the message is one line that names the way out.

    The command line prints it and exits with status 2; a report that meets it writes nothing.
    """


@dataclass(frozen=True)
class Metric:
    """What a metric key means: the only place that knows label, unit, range and direction.

    ``low`` and ``high`` bound the value (None: unbounded), ``chance`` is what a model without any
    memory of the item gets (None: depends on the item, so a control is needed), ``better`` says
    which direction is stronger memory or a better model ("high", "low", or "" for neither).
    """

    label: str
    unit: str
    low: float | None
    high: float | None
    chance: float | None
    better: str
    source: str

    @property
    def axis(self) -> str:
        """Label and unit as an axis title."""
        return f"{self.label} [{self.unit}]" if self.unit else self.label


OURS = "the workbench"
CARLINI = "Carlini et al. (2022), Quantifying memorization"
BIDERMAN = "Biderman et al. (2023), Emergent and predictable memorization"
LESCI = "Lesci et al. (2024), Causal estimation of memorisation profiles"
ORHAN = "Orhan (2023), Recognition, recall, and retention of few-shot memories"
MERULLO = "Merullo et al. (2025), From memorization to reasoning in the spectrum of loss curvature"
BURNHAM = "Burnham & Anderson (2002), Model selection and multimodel inference"

METRICS: dict[str, Metric] = {
    # one forward pass
    "log_probability": Metric(
        "mean log-probability", "nats per token", None, 0.0, None, "high", OURS
    ),
    "top1": Metric(
        "tokens right under teacher forcing",
        "share of tokens",
        0.0,
        1.0,
        None,
        "high",
        "Tirumala et al. (2022), Memorization without overfitting",
    ),
    "rank": Metric("mean rank of the true token", "rank", 1.0, None, None, "low", OURS),
    "perplexity": Metric("perplexity", "per token", 1.0, None, None, "low", OURS),
    "loss": Metric("mean negative log-probability", "nats per token", 0.0, None, None, "low", OURS),
    "coverage": Metric(
        "cells whose band holds the truth", "share of cells", 0.0, 1.0, None, "", OURS
    ),
    "difference": Metric("difference between paired conditions", "", None, None, 0.0, "", OURS),
    # extraction
    "extractable": Metric(
        "reproduced word for word", "share of items", 0.0, 1.0, 0.0, "high", CARLINI
    ),
    "verbatim_length": Metric("verbatim prefix length", "tokens", 0.0, None, 0.0, "high", CARLINI),
    "log_p_z": Metric(
        "log-probability of the whole suffix",
        "nats",
        None,
        0.0,
        None,
        "high",
        "Hayes et al. (2024), Measuring memorization through probabilistic discoverable extraction",
    ),
    "memorization_score": Metric(
        "greedy continuation matches", "share of tokens", 0.0, 1.0, None, "high", BIDERMAN
    ),
    # membership: one attack score an item, higher = member; AUC and TPR once pooled
    "member_loss": Metric(
        "loss attack score",
        "nats per token",
        None,
        0.0,
        None,
        "high",
        "Yeom et al. (2018), Privacy risk in machine learning",
    ),
    "member_zlib": Metric(
        "zlib attack score", "nats per token and byte", None, 0.0, None, "high", "Carlini et al. (2021)"
    ),
    "member_mink": Metric(
        "Min-K score",
        "nats per token",
        None,
        0.0,
        None,
        "high",
        "Shi et al. (2024), Detecting pretraining data",
    ),
    "member_minkpp": Metric(
        "Min-K++ score", "standard deviations", None, None, None, "high", "Zhang et al. (2025)"
    ),
    "auc": Metric(
        "membership AUC", "", 0.0, 1.0, 0.5, "high", "DeLong et al. (1988), Comparing areas"
    ),
    "tpr_at_fpr": Metric(
        "true positive rate at the false positive rate",
        "share",
        0.0,
        1.0,
        None,
        "high",
        "Carlini et al. (2022), Membership inference from first principles",
    ),
    # causal profile and forgetting
    "outcome": Metric("outcome", "", None, None, None, "", "the user's panel"),
    "memorization": Metric("memorization (ATT)", "nats per token", None, None, 0.0, "high", LESCI),
    "placebo": Metric("placebo effect", "nats per token", None, None, 0.0, "", LESCI),
    "wald": Metric("pre-trend Wald statistic", "chi-square", 0.0, None, None, "low", LESCI),
    "p_value": Metric("p-value", "", 0.0, 1.0, None, "", OURS),
    "p_value_max_t": Metric(
        "p-value of the largest placebo effect",
        "",
        0.0,
        1.0,
        None,
        "",
        "Callaway & Sant'Anna (2021), Difference-in-differences with multiple time periods",
    ),
    "detectable": Metric(
        "smallest effect detectable at 80 % power", "nats per token", 0.0, None, None, "low", OURS
    ),
    "retention": Metric(
        "share of the gain that is left",
        "share",
        None,
        None,
        0.0,
        "high",
        "Chang et al. (2024), How do LLMs acquire factual knowledge during pretraining?",
    ),
    "aicc": Metric("corrected Akaike criterion", "", None, None, None, "low", BURNHAM),
    "weight": Metric("Akaike weight", "share", 0.0, 1.0, None, "high", BURNHAM),
    "half_life": Metric("half-life", "updates", 0.0, None, None, "high", OURS),
    "rmse": Metric("root mean squared error", "", 0.0, None, None, "low", OURS),
    "rmse_holdout": Metric(
        "root mean squared error on the held-out last points", "", 0.0, None, None, "low", OURS
    ),
    "fitted": Metric("fitted law", "", None, None, None, "", OURS),
    "residual": Metric("residual", "", None, None, 0.0, "", OURS),
    **{
        f"param_{name}": Metric(f"parameter {name}", "", None, None, None, "", OURS)
        for name in ("a", "b", "c", "k", "p", "q", "s")
    },
    # recognition, recall
    "recognition": Metric(
        "two-alternative recognition", "share of pairs", 0.0, 1.0, None, "high", ORHAN
    ),
    "recognition_auc": Metric(
        "recognition AUC, unpaired", "", 0.0, 1.0, None, "high", ORHAN
    ),
    "d_prime": Metric("d'", "standard deviations", None, None, None, "high", ORHAN),
    "recall_exact": Metric("recall: exact suffix", "share of items", 0.0, 1.0, 0.0, "high", ORHAN),
    "recall_token": Metric("recall: tokens right", "share of tokens", 0.0, 1.0, None, "high", OURS),
    "recall_edit": Metric(
        "recall: normalised edit similarity", "share", 0.0, 1.0, None, "high", OURS
    ),
    **{
        f"recall_rouge{kind}": Metric(
            f"recall: ROUGE-{kind}",
            "F",
            0.0,
            1.0,
            None,
            "high",
            "Lin (2004), ROUGE: a package for automatic evaluation of summaries",
        )
        for kind in ("1", "2", "L")
    },
    # curvature
    "mass": Metric("share of curvature mass", "share", 0.0, 1.0, None, "", MERULLO),
    "kept": Metric("share of components kept", "share", 0.0, 1.0, None, "", MERULLO),
    "clamped": Metric("clamped negative eigenvalue mass", "share", 0.0, None, 0.0, "low", OURS),
    "predicted_damage": Metric(
        "second-order damage of the edit", "nats per token", 0.0, None, 0.0, "low", MERULLO
    ),
    "recitation_strict": Metric(
        "strict recitation", "share of items", 0.0, 1.0, 0.0, "high", MERULLO
    ),
    "recitation_loose": Metric(
        "loose recitation (similarity at least .75)", "share of items", 0.0, 1.0, 0.0, "high", MERULLO
    ),
    "edit_distance": Metric(
        "token edit distance of the continuation", "share of length", 0.0, 1.0, None, "low", MERULLO
    ),
    "band_energy": Metric(
        "activation energy in the band", "share", 0.0, 1.0, None, "", MERULLO
    ),
    "band_ratio": Metric(
        "activation energy, memorized over clean", "ratio", 0.0, None, 1.0, "", MERULLO
    ),
}  # fmt: skip


def rows(
    metric: str,
    value,
    *,
    run: str,
    step: int = 0,
    group="all",
    item="all",
    lo=np.nan,
    hi=np.nan,
    n=1,
    beside: Mapping[str, object] | None = None,
) -> pd.DataFrame:
    """Build table rows of one metric; scalars are repeated to the length of ``value``.

    Args:
        metric: A key of :data:`METRICS`.
        value: Scalar or one number per row, in the metric's unit.
        run, step, group, item: Coordinates, scalar or one per row.
        lo, hi: Interval bounds, NaN where none was estimated.
        n: How many measurements were pooled, 1 for a single item.
        beside: Further columns: coordinates, ``se`` or ``reason``.

    Raises:
        KeyError: If the metric is not registered.
    """
    if metric not in METRICS:
        raise KeyError(f"rows: {metric!r} is not in METRICS; add it there first")
    value = np.atleast_1d(np.asarray(value, dtype=float))
    columns = dict(run=run, step=step, group=group, item=item, metric=metric)
    columns |= dict(value=value, lo=lo, hi=hi, n=n) | dict(beside or {})
    length = max([len(value)] + [len(c) for c in columns.values() if _is_column(c)])
    if len(value) == 1 and length != 1:
        columns["value"] = np.repeat(value, length)
    # an Index other than 0..n-1 (a slice of an items frame) must not realign the columns
    plain = {k: np.asarray(v) if isinstance(v, pd.Series) else v for k, v in columns.items()}
    return pd.DataFrame(plain, index=range(length))


def _is_column(value) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str)


def coordinates(table: pd.DataFrame) -> list[str]:
    """Columns that say where a measurement was taken; all but the value and what rides beside it."""
    return [name for name in table.columns if name not in BESIDE_VALUE]


def validate(table: pd.DataFrame) -> pd.DataFrame:
    """Check a table and return it with its types settled (text as categoricals, floats, ints).

    Raises:
        InputError: Missing columns, unknown metrics, values out of a metric's range, ``lo > hi``
            or two rows with the same coordinates; the first offender is named.
    """
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise InputError(
            f"validate: the table lacks the columns {', '.join(missing)}; "
            f"it has {', '.join(map(str, table.columns))}"
        )
    table = table.reset_index(drop=True).copy(deep=False)
    for name in table.columns:
        if name in ("value", "lo", "hi", "se"):
            table[name] = table[name].astype("float64")
        elif name in ("step", "n"):
            if table[name].isna().any():
                raise InputError(f"validate: {name} is missing in {table[name].isna().sum()} rows")
            table[name] = table[name].astype("int64")
        elif name in TEXT or name == "reason" or _is_text(table[name]):
            table[name] = table[name].astype(str if name in TEXT else "str").astype("category")
    unknown = [m for m in table["metric"].cat.categories if m not in METRICS]
    if unknown:
        raise InputError(
            f"validate: unknown metric {unknown[0]!r}; known are {', '.join(sorted(METRICS))}"
        )
    if (table["lo"] > table["hi"]).any():
        first = table[table["lo"] > table["hi"]].iloc[0]
        raise InputError(f"validate: lo {first.lo} > hi {first.hi} in {_where(first, table)}")
    for key, part in table.groupby("metric", observed=True)["value"]:
        metric, slack = METRICS[key], 1e-6
        low = part < metric.low - slack if metric.low is not None else part != part
        high = part > metric.high + slack if metric.high is not None else part != part
        # NaN != NaN, so an unbounded side must not count the undefined as out of range
        outside = part[(low | high) & part.notna()]
        if len(outside):
            first = table.loc[outside.index[0]]
            raise InputError(
                f"validate: {key} is {first.value}, outside {metric.low} to {metric.high}, "
                f"in {_where(first, table)}"
            )
    names = coordinates(table)
    again = table.duplicated(names)
    if again.any():
        first = table[again].iloc[0]
        raise InputError(
            f"validate: {again.sum()} rows repeat the coordinates of another, first "
            f"{_where(first, table)}; pool them or add the coordinate that tells them apart"
        )
    return table


def _is_text(column: pd.Series) -> bool:
    return (
        isinstance(column.dtype, pd.CategoricalDtype)
        or pd.api.types.is_string_dtype(column.dtype)
        or column.dtype == object
    )


def _where(row: pd.Series, table: pd.DataFrame) -> str:
    return ", ".join(f"{name}={row[name]}" for name in coordinates(table))


def one_metric(table: pd.DataFrame, asker: str) -> Metric:
    """The one metric a table holds; a plot of two units on one axis is refused.

    Raises:
        InputError: If the table is empty or holds several metrics.
    """
    keys = list(table["metric"].astype(str).unique())
    if len(keys) != 1:
        held = ", ".join(keys) if keys else "none"
        raise InputError(f"{asker}: needs rows of one metric, got {held}; select one first")
    return METRICS[keys[0]]


def save(table: pd.DataFrame, path: str | Path, *, passport: Mapping | None = None) -> Path:
    """Write a validated table as Parquet with its passport in the metadata, whole or not at all.

    Args:
        passport: Where the numbers come from: model source, revision and weight hash, items hash,
            seed, device, dtype, versions. JSON values.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    data = pa.Table.from_pandas(validate(table), preserve_index=False)
    note = json.dumps({"version": VERSION, **(passport or {})}, sort_keys=True, default=str)
    data = data.replace_schema_metadata(
        {**(data.schema.metadata or {}), PASSPORT_KEY: note.encode()}
    )
    with whole_file(path) as temporary:
        pq.write_table(data, temporary, compression="zstd", write_page_checksum=True)
    return path


def load(path: str | Path) -> pd.DataFrame:
    """Read a table that :func:`save` wrote; its passport is in ``.attrs["passport"]``.

    Raises:
        InputError: No such file, or not a table of this version.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise InputError(f"load: no table at {path}")
    try:
        data = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"load: {path} is not a whole Parquet file ({reason})") from None
    note = (data.schema.metadata or {}).get(PASSPORT_KEY)
    if note is None:
        raise InputError(f"load: {path} carries no passport, so it was not written by save()")
    passport = json.loads(note)
    if passport.get("version") != VERSION:
        raise InputError(
            f"load: {path} has layout version {passport.get('version')}, this is {VERSION}; "
            "make it again"
        )
    table = validate(data.to_pandas())
    table.attrs["passport"] = passport
    return table


@contextlib.contextmanager
def whole_file(path: str | Path):
    """Give a temporary name beside ``path`` to write to; renamed on success, removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files for the owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path):
    """Give a temporary folder beside ``path`` to fill; renamed on success, removed on failure.

    Raises:
        FileExistsError: If ``path`` is there already; nothing is overwritten.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        if path.exists():
            raise FileExistsError(f"whole_folder: {path} was made meanwhile")
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes folders for the owner alone
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_folder() -> Path:
    """Where suites and converted models are kept: ``WORKBENCH_CACHE``, or the user's cache."""
    import platformdirs

    given = os.environ.get("WORKBENCH_CACHE")
    return Path(given) if given else Path(platformdirs.user_cache_dir("memory-workbench"))
