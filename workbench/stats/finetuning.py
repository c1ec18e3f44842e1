"""What a fine-tuning changed, text by text: base rows against tuned rows, beside the controls.

Texts that neither the tuning nor anything like it held change too, because the model drifts. What
a text changed beyond them is what the tuning did to that text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from workbench.stats.floors import floor_zone
from workbench.stats.summarise import summarise, wilson_interval
from workbench.table import FLOOR, METRICS, InputError, rows, validate

CONTROLS = ("control", "never", "unseen")
VERDICTS = ("extractable", "recognition")  # a text is known or it is not; a tie is not
KNOWN = 0.5  # what a verdict must exceed
SETTINGS = ("foil", "prefix", "suffix", "kind", "dose")  # coordinates that an item's rows share
MEMORIZED, FORGOTTEN, WITHIN = "memorized", "forgotten", "as the controls"
STATES = {(True, True): "kept", (True, False): "lost", (False, True): "gained"}
NO_CONTROLS = "fewer than two controls"
TOLD = ("of", "change", "before", "after")  # what tuning_changes adds


def tuning_changes(
    before: pd.DataFrame,
    after: pd.DataFrame,
    *,
    controls: Sequence[str] = CONTROLS,
    level: float = 0.95,
) -> pd.DataFrame:
    """Each item's change from base to tuned, and whether a control would have changed as much.

    The zone is where one further control text would fall, ``mean -+ t s sqrt(1 + 1 / m)`` of the m
    controls' changes (see ``stats.floors``). Of texts that the tuning did not concern 5 % lie
    outside it, half on either side: a list of a hundred has five such by chance.

    Args:
        before: Item rows of the base at one step, such as :func:`probe_texts` gives.
        after: The same of the tuned model, or of its checkpoints.
        controls: Groups that were in no training batch; those not there are passed over.
        level: Of the zone.

    Returns:
        A row of "difference", tuned minus base, for each item, step and measure: ``of`` is the
        measure, ``before`` and ``after`` its values, ``floor, floor_lo, floor_hi`` the controls'
        mean change and the zone. Losses of foils are left out. ``change`` says "memorized" or "forgotten" of a text outside the
        zone, else "as the controls" (empty without two controls, nor of a control itself); of a
        verdict it says "kept", "lost", "gained" or "never". ``.attrs["unpaired"]`` counts rows
        without a partner.

    Raises:
        InputError: Pooled rows, several base steps, no item in both tables, or a level outside 0
            to 1.
    """
    if not 0 < level < 1:
        raise InputError(f"tuning_changes: level is {level}, it must lie between 0 and 1")
    before, after = (_of_items(table) for table in (before, after))
    for name, table in (("before", before), ("after", after)):
        if (table["item"] == "all").any():
            raise InputError(f"tuning_changes: {name} has pooled rows; give those of single items")
    if before["step"].nunique() != 1:
        raise InputError(
            f"tuning_changes: before has {before['step'].nunique()} steps; select the base's one"
        )
    both, unpaired = _paired(before, after)
    metric = both.pop("metric").astype(str)
    both = both.assign(
        metric="difference",
        of=metric,
        before=both.pop("value_before"),
        after=both.pop("value_after"),
    )
    both["value"] = both["after"] - both["before"]
    both = _with_zone(both, controls, level)
    both["change"] = _verdict(both, controls)
    made = validate(both.assign(lo=np.nan, hi=np.nan, n=1))
    made.attrs = {"unpaired": unpaired, "controls": list(controls), "level": level}
    return made


def _of_items(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that say something of the items: not the loss of their foils."""
    table = validate(table)
    if "foil" not in table.columns:
        return table
    return table[(table["foil"] == "itself") | (table["metric"] == "recognition")]


def _paired(before: pd.DataFrame, after: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    shared = [name for name in SETTINGS if name in before.columns and name in after.columns]
    keys = ["item", "group", "metric", *shared]
    plain = [t.astype({k: str for k in ("item", "group", "metric")}) for t in (before, after)]
    for name, table, by in (("before", plain[0], keys), ("after", plain[1], [*keys, "step"])):
        if table.duplicated(by).any():
            first = table[table.duplicated(by)].iloc[0]
            raise InputError(
                f"tuning_changes: {name} has several rows of {first['metric']} for item "
                f"{first['item']!r}; select one run and one setting"
            )
    left = plain[0][[*keys, "value"]]
    right = plain[1][["run", "step", *keys, "value"]]
    both = left.merge(right, on=keys, suffixes=("_before", "_after"))
    if both.empty:
        raise InputError(
            "tuning_changes: no item of one group and measure is in both tables; probe both models "
            "with the same items"
        )
    found = both[keys].drop_duplicates()
    unpaired = len(left) - len(found) + len(right) - len(both)
    return both, unpaired


def _with_zone(both: pd.DataFrame, controls: Sequence[str], level: float) -> pd.DataFrame:
    keys = [name for name in ("step", "of", "foil") if name in both.columns]
    both = both.reset_index(drop=True).assign(**dict.fromkeys(FLOOR, np.nan))
    for _, part in both.groupby(keys, observed=True):
        held = part.loc[part["group"].isin(controls), "value"].dropna().to_numpy()
        zone = floor_zone(held, 1, metric="difference", level=level)
        both.loc[part.index, list(FLOOR)] = zone
    return both


def _verdict(both: pd.DataFrame, controls: Sequence[str]) -> np.ndarray:
    """What became of each text, in a word."""
    better = both["of"].map(lambda key: METRICS[key].better)
    sign = np.where(better == "low", -1.0, 1.0)
    above, below = both["value"] > both["floor_hi"], both["value"] < both["floor_lo"]
    up, down = np.where(sign > 0, above, below), np.where(sign > 0, below, above)
    words = np.where(up, MEMORIZED, np.where(down, FORGOTTEN, WITHIN)).astype(object)
    words[both["floor_lo"].isna() | both["group"].isin(controls) | both["value"].isna()] = ""
    verdict = both["of"].isin(VERDICTS).to_numpy()
    states = zip(both["before"] > KNOWN, both["after"] > KNOWN, strict=True)
    words[verdict] = np.array([STATES.get(s, "never") for s in states], dtype=object)[verdict]
    words[verdict & both["value"].isna()] = ""
    return words


def tuning_summary(
    changes: pd.DataFrame, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Pool :func:`tuning_changes` by group: means, net of the controls, and shares of texts.

    Returns:
        One row for each step, group, measure (``of``) and metric: ``difference``, the mean change
        (percentiles of means over items drawn with replacement); ``net_change``, the same less the
        controls' mean (Welch's t), in the measure's unit and direction; ``memorized_share`` and
        ``forgotten_share``, texts outside the controls' zone, of which chance makes 2.5 % each;
        of verdicts ``lost_share`` of those known before and ``gained_share`` of those not (all
        shares with Wilson's interval). ``n`` counts texts, of ``lost_share`` those known before.
        NaN with a reason where there are none, or no two controls.

    Raises:
        InputError: Rows that :func:`tuning_changes` did not make, or settings as in ``summarise``.
    """
    lacking = [name for name in TOLD if name not in changes.columns]
    if lacking:
        raise InputError(
            f"tuning_summary: no column {lacking[0]!r}; give what tuning_changes returns"
        )
    settings = [name for name in ("foil",) if name in changes.columns]
    keys = ["run", "step", "group", "of", *settings]
    controls = changes.attrs.get("controls", CONTROLS)
    means = summarise(
        changes.drop(columns=["change", "before", "after", *FLOOR]),
        by=keys,
        level=level,
        draws=draws,
        seed=seed,
    )
    held = changes[changes["group"].isin(controls)]
    parts = [means]
    for key, part in changes.groupby(keys, observed=True):
        where = dict(zip(keys, key, strict=True))
        same = [name for name in ("step", "of", *settings)]
        those = held[np.logical_and.reduce([held[name] == where[name] for name in same])]
        parts += _group_rows(where, part, those, controls, level)
    table = pd.concat([part.astype({"metric": str}) for part in parts], ignore_index=True)
    table["reason"] = table["reason"].astype(object).fillna("") if "reason" in table else ""
    return validate(table)


def _group_rows(where, part, held, controls, level) -> list[pd.DataFrame]:
    coordinates = {"run": where["run"], "step": where["step"], "group": where["group"]}
    beside = {name: value for name, value in where.items() if name not in coordinates}
    change = part["change"].astype(str)

    def share(metric: str, hits, of) -> pd.DataFrame:
        n, share = int(of.sum()), float(hits[of].mean()) if of.any() else np.nan
        low, high = wilson_interval(np.array([share]), np.array([n]), level)
        reason = "" if n else "no text to count"
        return rows(metric, share, lo=low, hi=high, n=n, beside={**beside, "reason": reason},
                    **coordinates)  # fmt: skip

    if where["of"] in VERDICTS:
        told = (change != "").to_numpy()
        known = change.isin(["kept", "lost"]).to_numpy()
        return [
            share("lost_share", (change == "lost").to_numpy(), told & known),
            share("gained_share", (change == "gained").to_numpy(), told & ~known),
        ]
    if where["group"] in controls:
        return []  # they are what the others are held against
    net, low, high, reason = _welch(part["value"].dropna(), held["value"].dropna(), level)
    told = (change != "").to_numpy()
    return [
        rows("net_change", net, lo=low, hi=high, n=int(part["value"].notna().sum()),
             beside={**beside, "reason": reason}, **coordinates),
        share("memorized_share", (change == MEMORIZED).to_numpy(), told),
        share("forgotten_share", (change == FORGOTTEN).to_numpy(), told),
    ]  # fmt: skip


def _welch(mine, others, level: float) -> tuple[float, float, float, str]:
    """Difference of means with Welch's interval; (1, 3) against (0, 1, 2): 1 -+ t(1.684) * 1.154701."""
    if len(others) < 2:
        return np.nan, np.nan, np.nan, NO_CONTROLS
    net = float(mine.mean() - others.mean())
    if len(mine) < 2:
        return net, np.nan, np.nan, "one item: no interval"
    a, b = mine.var(ddof=1) / len(mine), others.var(ddof=1) / len(others)
    if a + b == 0:
        return net, net, net, ""
    freedom = (a + b) ** 2 / (a**2 / (len(mine) - 1) + b**2 / (len(others) - 1))
    half = float(stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(a + b))
    return net, net - half, net + half, ""
