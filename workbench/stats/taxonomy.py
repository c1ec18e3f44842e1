"""Recite, reconstruct, recollect: why a text is memorized, by what it and its training were like.

Prashanth et al. (2024): a text seen more than five times is recited; one that goes on as it began
can be reconstructed from its beginning; what is left is recollected. A model of memorization for
each class is set beside one for all texts, to see whether the classes say anything.
"""

from __future__ import annotations

import heapq
import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from workbench.items import check_items
from workbench.stats.membership import area_under_curve
from workbench.stats.prediction import guess_curve
from workbench.stats.summarise import wilson_interval
from workbench.table import InputError, rows, validate

CLASSES = ("recitation", "reconstruction", "recollection")
COPIES = 5  # more than so many copies in training make a recitation
REPEATS = 3  # times that a template stands in a text before it is one
AGREES = 0.9  # share of places that must go on as the template does
PIECE = re.compile(r"\d+|[^\W\d_]+|[^\w\s]|_")  # a number, a word, or a mark
ZLIB_LEVEL = 6


def pieces(text: str) -> list[str]:
    """Numbers, words and marks of a text, in order; blanks are none."""
    return PIECE.findall(text)


def template(sequence: Sequence[str]) -> str:
    """Whether a sequence goes on as it began: "repeating", "incrementing" or "" for neither.

    With a period p of at most a third of the sequence, each element is set beside the one p before
    it. All equal (at nine places in ten, say) is repeating. Where a number or a single letter
    grows by what it grew by the last time, and the rest is equal, it is incrementing: ``1 2 3 4``,
    ``a b c d``, ``item 9 , item 7 , item 5 , item 3``. Shorter than three elements is neither.
    """
    value = np.array([_number(each) for each in sequence])
    codes = np.unique(np.asarray(sequence, dtype=str), return_inverse=True)[1]
    grows = ""
    for period in range(1, len(codes) // REPEATS + 1):
        same = codes[period:] == codes[:-period]
        if same.mean() >= AGREES:
            return "repeating"
        if len(codes) <= 2 * period or grows:
            continue
        with np.errstate(invalid="ignore"):
            step = value[period:] - value[:-period]
            steady = (step[period:] == step[:-period]) & (step[period:] != 0)
        # what neither repeats nor grows is looked at from the third template on, as growth is
        if steady.any() and (steady | same[period:]).mean() >= AGREES:
            grows = "incrementing"
    return grows


def _number(piece: str) -> float:
    if piece.isdecimal():
        return float(int(piece[:15]))  # beyond 15 digits a float counts no units
    # an eighth aside, so that no letter goes on where numbers end: 118 119 x y
    return ord(piece) + 0.125 if len(piece) == 1 and piece.isalpha() else np.nan


def text_template(text: str) -> str:
    """:func:`template` of a text's pieces, or of its letters: ``hahahaha`` is one piece."""
    return template(pieces(text)) or (
        "repeating" if template(list("".join(text.split()))) == "repeating" else ""
    )


def classify_memorized(
    table: pd.DataFrame, items: pd.DataFrame, *, copies: str = "dose"
) -> pd.DataFrame:
    """Add the class of each item to its rows.

    More than 5 copies make a "recitation"; else a repeating or incrementing text a
    "reconstruction"; else it is a "recollection". The class says why a text would be memorized, so
    texts that are not memorized have one too.

    Args:
        table: Item rows.
        items: Items frame with their texts.
        copies: Column of the table that counts the exposures before the row's step: ``copies`` of
            ``align_exposures``, or ``dose`` where all are over.

    Returns:
        The table with the columns ``taxon`` and ``template`` ("repeating", "incrementing", "").

    Raises:
        InputError: No such column, counts that are missing, or rows of items without a text.
    """
    table, items = validate(table), check_items(items)
    if copies not in table.columns:
        raise InputError(
            f"classify_memorized: no column {copies!r} to count copies; there are {', '.join(table)}"
        )
    if table[copies].isna().any():
        raise InputError(
            f"classify_memorized: {copies} is missing in {table[copies].isna().sum()} rows (first: "
            f"item {table['item'][table[copies].isna()].iloc[0]}); 0 says never trained on"
        )
    unknown = ~table["item"].isin(set(items["item"].astype(str)))
    if unknown.any():
        raise InputError(
            f"classify_memorized: item {table['item'][unknown].iloc[0]} is not in the items frame"
        )
    found = {
        str(item): text_template(text)
        for item, text in zip(items["item"], items["text"], strict=True)
    }
    like = table["item"].astype(str).map(found).fillna("")
    taxon = np.where(
        table[copies] > COPIES, CLASSES[0], np.where(like != "", CLASSES[1], CLASSES[2])
    )
    return validate(table.assign(taxon=taxon, template=like))


def class_shares(table: pd.DataFrame, *, threshold: float = 1.0, level: float = 0.95):
    """What share of the memorized texts each class has, at each run and step.

    Args:
        table: Rows of one metric from :func:`classify_memorized`; memorized is ``threshold`` or
            more.

    Returns:
        Rows "class_share" with the coordinate ``taxon``: they sum to 1 over the classes. ``n``
        counts the memorized texts, Wilson's interval is over them. NaN with a reason where none is.

    Raises:
        InputError: Without classes, or with several metrics.
    """
    table = _classified(table, "class_shares")
    made = []
    for (run, step), part in table.groupby(["run", "step"], observed=True):
        there = part[part["value"] >= threshold]
        count = np.array([(there["taxon"] == taxon).sum() for taxon in CLASSES])
        n = np.full(len(CLASSES), len(there))
        share = count / n if len(there) else np.full(len(CLASSES), np.nan)
        lo, hi = wilson_interval(share, n, level)
        beside = {"taxon": list(CLASSES), "reason": "" if len(there) else "nothing is memorized"}
        place = {"run": str(run), "step": int(step)}
        made.append(rows("class_share", share, lo=lo, hi=hi, n=len(there), beside=beside, **place))
    return validate(pd.concat(made, ignore_index=True))


def _classified(table: pd.DataFrame, asker: str) -> pd.DataFrame:
    table = validate(table)
    if "taxon" not in table.columns:
        raise InputError(f"{asker}: no column 'taxon'; classify_memorized adds it")
    if table["metric"].nunique() != 1:
        held = ", ".join(sorted(set(table["metric"].astype(str)))) or "none"
        raise InputError(f"{asker}: needs rows of one metric, got {held}; select one first")
    return table


def huffman_bits(text: str) -> float:
    """Mean length of the text's characters in their own Huffman code, in bits; 0 for one alone.

    ``aabc``: a one bit, b and c two each, 6 bits for 4 characters, 1.5.
    """
    counts = [[count, [letter]] for letter, count in Counter(text).items()]
    if len(counts) < 2:
        return 0.0
    heap = [(count, number) for number, (count, _) in enumerate(counts)]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        # every merge adds one bit to all the characters below it
        low, high = heapq.heappop(heap), heapq.heappop(heap)
        total += low[0] + high[0]
        heapq.heappush(heap, (low[0] + high[0], low[1]))
    return total / len(text)


def text_features(items: pd.DataFrame) -> pd.DataFrame:
    """What can be told of a text without any model.

    Returns:
        Columns ``item``, ``characters``, ``pieces`` (words, numbers and marks),
        ``new_pieces`` (share of them that are different), ``huffman_bits`` (:func:`huffman_bits`)
        and ``compressed`` (bytes after zlib over bytes before).
    """
    items = check_items(items)
    made = []
    for text in items["text"]:
        found, raw = pieces(text), text.encode()
        made.append(
            {
                "characters": float(len(text)),
                "pieces": float(len(found)),
                "new_pieces": len(set(found)) / len(found) if found else np.nan,
                "huffman_bits": huffman_bits(text),
                "compressed": len(zlib.compress(raw, ZLIB_LEVEL)) / len(raw),
            }
        )
    return pd.DataFrame(made).assign(item=items["item"].astype(str))


def predict_by_class(
    table: pd.DataFrame,
    features: pd.DataFrame,
    *,
    threshold: float = 1.0,
    folds: int = 5,
    level: float = 0.95,
    draws: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Foretell which texts are memorized: one logistic model a class, beside one for all texts.

    Features are standardised, the penalty is scikit-learn's (L2, C = 1), and every text is foretold
    by models that were fitted without it (stratified folds). A class with fewer than ``folds``
    memorized or as few other texts gets no model; in the whole its texts then have its base rate.

    Args:
        table: Rows of one metric at one run and step from :func:`classify_memorized`, one an item;
            memorized is ``threshold`` or more.
        features: Column ``item`` and numbers: :func:`text_features`, a perplexity under a model
            that never saw the texts, the logarithm of copies.
        draws: Resamples of the texts, for all intervals; the coefficients' models are fitted again,
            the scores of texts not.

    Returns:
        For each ``taxon`` and for "all", rows "auc" (.5 by chance, 1 at best) and
        "average_precision" (the base rate by chance) with the coordinate ``predictor``, "by class"
        or "one for all", both on the same texts; and "coefficient" rows (log-odds for a standard
        deviation of the ``feature``, 0 where it says nothing). ``n`` counts texts. NaN with a
        reason where a class is too small. Texts without all features are left out and counted in
        ``.attrs["dropped"]``.

    Raises:
        InputError: No classes, several metrics, runs, steps or rows an item, no number among the
            features, or too few texts of one kind in the whole.
    """
    table = _classified(table, "predict_by_class")
    where = table[["run", "step"]].drop_duplicates()
    if len(where) != 1 or table["item"].duplicated().any():
        raise InputError(
            "predict_by_class: needs one row an item, of one run and step; "
            f"got {len(table)} rows of {table['item'].nunique()} items at {len(where)} of them"
        )
    if "item" not in features.columns or features["item"].duplicated().any():
        raise InputError("predict_by_class: features need a column 'item', each item once")
    names = [c for c in features.columns if c != "item" and features[c].dtype.kind in "fiub"]
    if not names:
        raise InputError("predict_by_class: the features hold no numbers")
    numbers = features.assign(item=features["item"].astype(str)).set_index("item")[names]
    x = numbers.reindex(table["item"].astype(str)).to_numpy(float)
    whole = np.isfinite(x).all(axis=1) & table["value"].notna().to_numpy()
    x, y = x[whole], (table["value"][whole] >= threshold).to_numpy()
    taxon = table["taxon"][whole].astype(str).to_numpy()
    if (why := _too_few(y, folds)) is not None:
        raise InputError(f"predict_by_class: {why}; ask for fewer folds or give more texts")
    place = {"run": str(where["run"].iloc[0]), "step": int(where["step"].iloc[0])}
    baseline = _foretold(x, y, folds, seed)
    stitched, parts = np.empty(len(y)), []
    for name in CLASSES:
        mine = taxon == name
        why = _too_few(y[mine], folds)
        if why is None:
            stitched[mine] = _foretold(x[mine], y[mine], folds, seed)
        elif mine.any():
            stitched[mine] = y[mine].mean()
        said = {"by class": stitched[mine], "one for all": baseline[mine]}
        parts += _quality(said, y[mine], name, why, level, draws, seed, place)
        parts.append(_coefficients(x[mine], y[mine], names, name, why, level, draws, seed, place))
    said = {"by class": stitched, "one for all": baseline}
    parts += _quality(said, y, "all", None, level, draws, seed, place)
    parts.append(_coefficients(x, y, names, "all", None, level, draws, seed, place))
    result = validate(pd.concat(parts, ignore_index=True))
    result.attrs["dropped"] = int((~whole).sum())
    return result


def _too_few(memorized: np.ndarray, folds: int) -> str | None:
    counts = int(memorized.sum()), int((~memorized).sum())
    if min(counts) >= folds:
        return None
    return f"{counts[0]} memorized and {counts[1]} other texts, needs {folds} of each"


def _model():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def _foretold(x, y, folds: int, seed: int) -> np.ndarray:
    """Probability of being memorized, of each text by models fitted without it."""
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    cut = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return cross_val_predict(_model(), x, y, cv=cut, method="predict_proba")[:, 1]


def _quality(said: dict, y, taxon, why, level, draws, seed, place) -> list[pd.DataFrame]:
    """AUC and average precision of both predictors, over the same resampled texts."""
    made = []
    rng = np.random.default_rng([seed, 41])
    drawn = [rng.integers(len(y), size=len(y)) for _ in range(draws)] if len(y) else []
    drawn = [index for index in drawn if 0 < y[index].sum() < len(y)]
    for predictor, score in said.items():
        beside = {"taxon": taxon, "predictor": predictor, "feature": "", "reason": why or ""}
        for metric, measure in (("auc", _auc), ("average_precision", _precision)):
            if why is not None:
                made.append(rows(metric, np.nan, n=len(y), beside=beside, **place))
                continue
            again = [measure(score[index], y[index]) for index in drawn]
            lo, hi = np.quantile(again, [(1 - level) / 2, (1 + level) / 2])
            value = measure(score, y)
            made.append(rows(metric, value, lo=lo, hi=hi, n=len(y), beside=beside, **place))
    return made


def _auc(score, y) -> float:
    return area_under_curve(score[y], score[~y])


def _precision(score, y) -> float:
    found = guess_curve(score, y, np.ones((1, len(y))), y.sum(), ())
    return float(found["average_precision"][0])


def _coefficients(x, y, names, taxon, why, level, draws, seed, place) -> pd.DataFrame:
    beside = {
        "taxon": taxon,
        "predictor": "one for all" if taxon == "all" else "by class",
        "feature": names,
        "reason": why or "",
    }
    if why is not None:
        return rows("coefficient", np.nan, n=len(y), beside=beside, **place)
    rng = np.random.default_rng([seed, 42])
    again = []
    for _ in range(draws):
        index = rng.integers(len(y), size=len(y))
        if 0 < y[index].sum() < len(y):
            again.append(_model().fit(x[index], y[index])[-1].coef_[0])
    lo, hi = np.quantile(again, [(1 - level) / 2, (1 + level) / 2], axis=0)
    value = _model().fit(x, y)[-1].coef_[0]
    return rows("coefficient", value, lo=lo, hi=hi, n=len(y), beside=beside, **place)
