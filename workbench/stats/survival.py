"""How long a memory lasts: time from the last exposure to the first loss, with those still there.

A memory that no checkpoint has yet found lost is not a long memory nor a missing one: its time is
known to be at least so long (right-censored). All estimates are those of lifelines; what is here
turns the one table into times, groups and terms, and the answers, failures included, back.

Checkpoints are a grid: a loss lies after the last look that found the text (``lo``) and not after
the first that did not (``hi``). Kaplan-Meier and Cox take the right end for the time, so that they
are late by up to a gap between looks, alike for all groups looked at alike: with looks 0, 1, 2, 5,
10, 20, 50 and 100 updates after, a median of 10.4 comes out at 15. Turnbull's estimate (10.7) and
the accelerated-failure laws take the interval as it is.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float

from workbench.stats.life_events import known_at, one_look_each
from workbench.stats.summarise import wilson_interval
from workbench.table import InputError, one_metric, validate

LAWS = ("cox", "weibull", "lognormal", "loglogistic")
METHODS = ("kaplan_meier", "turnbull")
NEAR = 1e-6  # of the shortest interval: makes lifelines' closed intervals half open, and 0 a time
ROUNDING = 1e-9  # lifelines sums logarithms: one half may come as .5000000000001
EXACT = {"precision": 1e-12, "r_precision": 1e-14}  # by itself Cox stops at the third digit
FAR, UNSURE = 5.0, 1.0  # standard deviations and z: a coefficient beyond one and under the other


def item_margins(
    table: pd.DataFrame, *, strata: Sequence[str] = ("kind",), quantile: float = 0.95
) -> pd.DataFrame:
    """Each trained item's gain since before training, less what nearly no untrained text gains.

    ``(Y_it - Y_ib) - quantile over never-trained j of (Y_jt - Y_jb)``, b the last checkpoint before
    the item's cohort. Above 0 an item gained more than all but ``1 - quantile`` of the controls;
    easy and hard texts alike, since each is held against its own base. The quantile is the
    ``ceil((m + 1) quantile)``-th smallest of m controls, so that a text like them, which training
    did nothing to, is above 0 at any one checkpoint with a chance of at most ``1 - quantile``,
    however few they are.

    Args:
        table: Item rows of one metric and run, higher for better remembered, with ``cohort``
            (missing: a control).
        strata: Columns within which items meet controls, where the table has them.
        quantile: Of the controls' gains.

    Returns:
        The trained items' rows from their base on, metric "margin"; ``.attrs["without_base"]``
        counts items first seen at or before the first checkpoint, which are left out.

    Raises:
        InputError: Several metrics, no ``cohort``, a quantile outside 0 to 1, or fewer controls in
            a stratum, with a score at every step, than the quantile needs (19 for .95).
    """
    one_metric(table, "item_margins")
    if not 0 < quantile < 1:
        raise InputError(f"item_margins: quantile is {quantile}, it must lie between 0 and 1")
    if "cohort" not in table.columns:
        raise InputError("item_margins: no column 'cohort'; align_exposures or the items give it")
    table = validate(table)
    strata = [name for name in strata if name in table.columns]
    steps = np.sort(table["step"].unique())
    parts, without = [], 0
    for where, part in table.groupby(strata, observed=True) if strata else [((), table)]:
        trained = part["cohort"].notna()
        controls = part[~trained].pivot(index="item", columns="step", values="value").dropna()
        place = int(np.ceil((len(controls) + 1) * quantile - ROUNDING))
        if place > len(controls):
            told = ", ".join(f"{n}={v}" for n, v in zip(strata, where, strict=True))
            raise InputError(
                f"item_margins: {len(controls)} never-trained items{' at ' * bool(told)}{told}, too "
                f"few to know what {quantile:.0%} of such texts stay below; add some or lower the "
                "quantile"
            )
        for cohort, mine in part[trained].groupby("cohort"):
            at = np.searchsorted(steps, cohort) - 1
            if at < 0:
                without += mine["item"].nunique()
                continue
            gain = controls.sub(controls[steps[at]], axis=0)
            bar = pd.Series(np.sort(gain, axis=0)[place - 1], index=gain.columns)
            own = mine[mine["step"] == steps[at]].set_index("item")["value"]
            base = mine["item"].map(own).astype(float)
            value = mine["value"] - base - mine["step"].map(bar)
            parts.append(mine.assign(value=value)[(mine["step"] >= steps[at])])
    if not parts:
        raise InputError("item_margins: no item was first trained on after the first checkpoint")
    out = validate(
        pd.concat(parts, ignore_index=True).assign(metric="margin", lo=np.nan, hi=np.nan)
    )
    out.attrs = {"without_base": without, "quantile": quantile}
    return out


def survival_times(
    table: pd.DataFrame,
    *,
    threshold: float | None = None,
    control: str | Sequence[str] = ("never", "unseen"),
    strata: Sequence[str] = ("kind",),
    quantile: float = 0.95,
    within: float = 0,
    spells: str = "last",
) -> pd.DataFrame:
    """From a panel aligned by exposure to how long each memory lasted, one row an item.

    The clock starts at an item's last exposure, and the item enters if the first look after it
    found it known: what was never known cannot be lost, and is counted, not scored as lost at 0.
    The memory ends at the first look that does not find it, even if a later one does again. Until
    then it is censored: at the last look, or at the last before it was trained on again.

    Args:
        table: Item rows of one metric with ``lag``, as :func:`align_exposures` gives it.
        threshold: A score is known above it (below, where low is better): 0 for what
            :func:`item_margins` gives, .5 for recognition with its ties. None: a verdict (all 0 or
            1) is known at 1, and any other score where it is better than the ``quantile`` of the
            controls' scores at that checkpoint, as in :func:`life_events`.
        control, strata, quantile: The controls of a score without threshold.
        within: Updates after an exposure by which an item must have been looked at, 0 for right
            after. The curve then speaks of items still known so long after.
        spells: "last": from each item's last exposure on. "every": each stretch between two
            exposures is a row of its own, ``exposed`` telling them apart; an item's rows then
            depend on each other, which Cox can allow for and curves cannot.

    Returns:
        Metric "survival_time": updates from exposure to the first look that finds the item lost,
        or to the last look where none did. ``lo`` is the last look that found it, ``hi`` the first
        that did not, infinite where there is none. Coordinates ``event`` ("lost", "kept",
        "exposed again") and ``exposed``, the update of the exposure. ``.attrs`` say the ``rule``,
        and count the items ``never_had`` (looked at in time, and not known) and ``dropped`` (not
        looked at in time).

    Raises:
        InputError: No ``lag``, an unknown way of ``spells``, missing values, several metrics or
            rows an item and step, no item that was known, or what :func:`life_events` refuses.
    """
    if spells not in ("last", "every"):
        raise InputError(f"survival_times: spells is {spells!r}; choose last or every")
    if "lag" not in table.columns:
        raise InputError("survival_times: no column 'lag'; align_exposures gives it")
    table = validate(table)
    one_look_each(table, "survival_times")
    known, rule = known_at(
        table, "survival_times", control=control, strata=strata, quantile=quantile,
        threshold=threshold,
    )  # fmt: skip
    if (table["lag"] < 0).any():
        raise InputError(f"survival_times: lag is {table['lag'].min():g}, it cannot be below 0")
    looks = table.assign(known=known, exposed=table["step"] - table["lag"])
    looks = looks[looks["lag"].notna()]
    if looks.empty:
        raise InputError("survival_times: no item was trained on at or before a checkpoint")
    looks = looks.assign(life=looks.groupby(["run", "item"], observed=True).ngroup())
    looks = looks.sort_values(["life", "step"], ignore_index=True)
    times = _spells(looks, within)
    if spells == "last":
        times = times[~times["again"]]
    told = times[~times["late"]]
    met, never = looks["life"].nunique(), told.loc[~told["had"], "life"].nunique()
    times = told[told["had"]]
    dropped = met - told["life"].nunique()
    if times.empty:
        raise InputError(
            f"survival_times: of {met} items {never} were not known right after their exposure "
            f"({rule}) and {dropped} not looked at within {within:g} updates; nothing can be lost"
        )
    if dropped:
        warnings.warn(
            f"survival_times: {dropped} of {met} items were not looked at within {within:g} updates "
            "of their exposure and are left out",
            stacklevel=2,
        )
    result = looks.iloc[times["row"]].reset_index(drop=True)
    result = result.drop(columns=["lag", "known", "life", *{"se", "reason"} & set(result.columns)])
    new = times[["value", "lo", "hi", "event"]].reset_index(drop=True)
    result = validate(result.assign(metric="survival_time", n=1, **new))
    result.attrs = {
        "rule": rule,
        "of": str(table["metric"].iloc[0]),
        "never_had": int(never),
        "dropped": int(dropped),
    }
    return result


def _spells(looks: pd.DataFrame, within: float) -> pd.DataFrame:
    """One row a stretch of looks between exposures, of looks sorted by life and step."""
    life, exposed = looks["life"].to_numpy(), looks["exposed"].to_numpy()
    known, lag = looks["known"].to_numpy(), looks["lag"].to_numpy()
    new = np.append(True, (life[1:] != life[:-1]) | (exposed[1:] != exposed[:-1]))
    first = np.flatnonzero(new)
    end = np.append(first[1:], len(looks))  # one past the last look
    miss = np.where(known, len(looks), np.arange(len(looks)))
    miss = np.minimum(np.minimum.reduceat(miss, first), end)  # end: no look missed it
    lost = miss < end
    row = np.where(lost, miss, end - 1)
    again = np.append(life[first[1:]] == life[first[:-1]], False)
    return pd.DataFrame(
        {
            "row": row,
            "life": life[first],
            "again": again,
            "late": lag[first] > within,
            "had": known[first],
            "value": lag[row],
            "lo": lag[np.maximum(np.where(lost, miss - 1, end - 1), first)],
            "hi": np.where(lost, lag[row], np.inf),
            "event": np.select([lost, again], ["lost", "exposed again"], "kept"),
        }
    )


def survival_curve(
    times: pd.DataFrame,
    *,
    by: Sequence[str] = (),
    method: str = "kaplan_meier",
    level: float = 0.95,
    draws: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of memories that still stand, by time since the exposure; its median; the life table.

    Kaplan & Meier (1958): at each time the share of those at risk that were not lost, multiplied
    up; what is censored at a time is at risk there. Turnbull (1976), "The empirical distribution
    function with arbitrarily grouped, censored and truncated data": the most likely curve given the
    intervals, read here as evenly spread within each interval it cannot resolve.

    Args:
        times: What :func:`survival_times` gives, one row an item in each group.
        by: Coordinates that name a curve; none makes one of all.
        method: "kaplan_meier" on the right ends, or "turnbull" on the intervals.
        level: Of the intervals.
        draws: Resamples of items behind Turnbull's intervals; 0 makes none.
        seed: Of the resampling.

    Returns:
        Rows with the coordinates ``by``, ``method`` and ``time``, ``n`` the items at risk:

        - "survival", 1 at time 0, with the number of ``events`` and ``censored`` at that time. Band
          of each point alone: log(-log S) with Greenwood's variance for Kaplan-Meier, none while
          nobody or once everybody is lost; percentiles over resampled items for Turnbull.
        - "hazard" (Kaplan-Meier): share of those at risk lost from ``since``, the time before, to
          ``time``; Wilson's interval.
        - "median_survival", ``n`` the items: the first time at which at most half stand, for
          Turnbull interpolated. NaN with a reason where more than half stand to the end. Its
          interval holds the times at which the band holds one half, infinite where it does so to
          the end.

    Raises:
        InputError: Other rows than survival times, unknown columns, several rows of an item in a
            group, a level outside 0 to 1, an unknown method.
    """
    times, by = _checked(times, "survival_curve", by), list(by)
    if method not in METHODS:
        raise InputError(f"survival_curve: method is {method!r}; choose {' or '.join(METHODS)}")
    if not 0 < level < 1:
        raise InputError(f"survival_curve: level is {level}, it must lie between 0 and 1")
    if draws < 0:
        raise InputError(f"survival_curve: draws is {draws}, it cannot be below 0")
    _one_row_an_item(times, by, "survival_curve")
    parts = []
    for where, part in times.groupby(by, observed=True) if by else [((), times)]:
        beside = dict(zip(by, where, strict=True))
        if method == "turnbull":
            made = _turnbull_rows(part, level, draws, seed)
        else:
            made = _kaplan_meier_rows(part, level)
        made["run"] = _shared(part, "run")
        made["group"] = _shared(part, "group")
        parts.append(made.assign(step=part["step"].max(), **beside))
    table = pd.concat(parts, ignore_index=True).assign(item="all", method=method)
    return validate(table)


def _kaplan_meier_rows(part: pd.DataFrame, level: float) -> pd.DataFrame:
    from lifelines import KaplanMeierFitter

    lost = (part["event"] == "lost").to_numpy()
    with _quiet():
        fit = KaplanMeierFitter().fit(part["value"].to_numpy(), lost, alpha=1 - level)
    counts = fit.event_table.astype(int)
    at = counts.index.to_numpy(dtype=float)
    n, d, c = (counts[name].to_numpy() for name in ("at_risk", "observed", "censored"))
    share = fit.survival_function_.iloc[:, 0].to_numpy().round(12)
    lo, hi = fit.confidence_interval_.to_numpy().T
    none, all_ = share >= 1, share <= 0
    lo, hi = (np.where(none | all_, np.nan, bound) for bound in (lo, hi))
    if len(part) == 1:
        why = np.full(len(at), "one item: no interval", dtype=object)
        lo = hi = np.full(len(at), np.nan)
    else:
        why = np.select([none, all_], ["none lost yet: no band", "none left: no band"], "")
    curve = {"value": share, "lo": lo, "hi": hi, "n": n, "time": at, "reason": why}
    curve = pd.DataFrame({"metric": "survival", **curve, "events": d, "censored": c})
    rate = d[1:] / n[1:]
    low, high = wilson_interval(rate, n[1:], level)
    hazard = {"value": rate, "lo": low, "hi": high, "n": n[1:], "time": at[1:], "since": at[:-1]}
    hazard = pd.DataFrame({"metric": "hazard", **hazard, "events": d[1:], "censored": c[1:]})
    # once none is left the band below is 0 too; above, nothing is known
    half = [_first(at, bound) for bound in (share, np.where(all_, share, lo), hi)]
    return pd.concat([curve, hazard, _median(part, *half)], ignore_index=True).fillna(
        {"reason": ""}
    )


def _first(at: Float[np.ndarray, " time"], share: Float[np.ndarray, " time"]) -> float:
    """The first time at which a curve is at most one half, infinite where it is never."""
    under = np.flatnonzero(share <= 0.5 + ROUNDING)
    return float(at[under[0]]) if len(under) else np.inf


def _median(part: pd.DataFrame, value: float, lo: float, hi: float, why: str = "") -> pd.DataFrame:
    lost, n = int((part["event"] == "lost").sum()), len(part)
    if np.isinf(value):
        value = np.nan
        why = f"more than half stand to the last look: {lost} of {n} were seen lost"
    elif n == 1:
        lo, hi, why = np.nan, np.nan, "one item: no interval"
    if np.isinf(lo):
        lo = np.nan  # no bound below: nothing is known to be lost, or no band was made
    bounds = {"lo": lo, "hi": hi, "n": n, "reason": why, "events": lost, "censored": n - lost}
    return pd.DataFrame({"metric": ["median_survival"], "value": value, **bounds})


def _turnbull_rows(part: pd.DataFrame, level: float, draws: int, seed: int) -> pd.DataFrame:
    lower, upper = part["lo"].to_numpy(), part["hi"].to_numpy()
    ends = np.unique([0.0, *lower, *upper[np.isfinite(upper)]])
    share = _turnbull(lower, upper, ends)
    rng = np.random.default_rng(seed)
    many = draws if len(part) > 1 else 0
    picks = (rng.integers(len(part), size=len(part)) for _ in range(many))
    boots = np.array([_turnbull(lower[pick], upper[pick], ends) for pick in picks])
    lo = hi = np.full(len(ends), np.nan)
    middle, low, high = _half(ends, share), np.nan, np.nan
    why = "" if many else ("one item: no interval" if draws else "no draws: no interval")
    tails = [(1 - level) / 2, (1 + level) / 2]
    if many:
        lo, hi = np.quantile(boots, tails, axis=0)
        low, high = np.quantile([_half(ends, b) for b in boots], tails, method="inverted_cdf")
    curve = {"value": share, "lo": lo, "hi": hi, "n": len(part), "time": ends, "reason": why}
    curve = pd.DataFrame({"metric": "survival", **curve})
    return pd.concat([curve, _median(part, middle, low, high, why)], ignore_index=True)


def _turnbull(
    lower: Float[np.ndarray, " item"],
    upper: Float[np.ndarray, " item"],
    at: Float[np.ndarray, " time"],
) -> Float[np.ndarray, " time"]:
    """The most likely curve of intervals (lower, upper], at given times; straight between ends.

    lifelines closes its intervals on both sides, so that (0, 1] and (1, 2] would share the time 1;
    and it puts a curve's fall on the ends of the intervals that it cannot resolve.
    """
    from lifelines import KaplanMeierFitter

    finite = upper[np.isfinite(upper)]
    if not len(finite):
        return np.ones(len(at))  # nobody was lost
    near = NEAR * finite.min()
    with _quiet():
        fit = KaplanMeierFitter().fit_interval_censoring(lower + near, upper, tol=1e-8)
    known = fit.survival_function_
    # at a right end the second column has the fall behind it; at a left end both are before it
    time, share = known.index.to_numpy(dtype=float), known.iloc[:, 1].to_numpy()
    seen = np.isfinite(time)
    ends = np.append(0.0, time[seen])
    return np.interp(at, ends, np.append(1.0, share[seen]))


def _half(at: Float[np.ndarray, " time"], share: Float[np.ndarray, " time"]) -> float:
    """Where a curve that is straight between its points reaches one half, infinite if never."""
    under = np.flatnonzero(share <= 0.5 + ROUNDING)
    if not len(under):
        return np.inf
    after = under[0]
    before = after - 1  # the curve begins at 1, so that there is one
    fall = share[before] - share[after]
    return float(at[before] + (share[before] - 0.5) / fall * (at[after] - at[before]))


def compare_survival(times: pd.DataFrame, *, by: str) -> pd.DataFrame:
    """Log-rank test of whether groups lose their memories at one rate (Mantel 1966).

    At each time of a loss the losses of a group are held against its share of those at risk.

    Args:
        times: What :func:`survival_times` gives.
        by: The coordinate that names the groups.

    Returns:
        Rows of "log_rank" (chi-square with ``df`` degrees of freedom; its mean is ``df`` where the
        groups are alike) and "p_value_log_rank", with the coordinate ``comparison``: "all", and
        with three groups or more every pair, whose "p_value_holm" allows for how many pairs there
        are. ``n`` counts items. NaN with a reason where nothing was lost.

    Raises:
        InputError: Other rows than survival times, an unknown column, fewer than two groups, a
            group of one, or several rows of an item in a group.
    """
    times = _checked(times, "compare_survival", [by])
    _one_row_an_item(times, [by], "compare_survival")
    sizes = times.groupby(by, observed=True).size()
    if len(sizes) < 2:
        raise InputError(f"compare_survival: needs two groups of {by} or more, got {len(sizes)}")
    if sizes.min() < 2:
        raise InputError(
            f"compare_survival: {by}={sizes.idxmin()} has one item; pool it or leave it out"
        )
    parts, names = [_log_rank(times, by, "all")], list(sizes.index)
    pairs = [_log_rank(times[times[by].isin(two)], by, f"{two[0]}, {two[1]}")
             for two in combinations(names, 2)] if len(names) > 2 else []  # fmt: skip
    table = pd.concat(parts + pairs, ignore_index=True)
    if pairs:
        p = table[(table["metric"] == "p_value_log_rank") & (table["comparison"] != "all")]
        table = pd.concat([table, _holm(p)], ignore_index=True)
    return validate(table)


def _log_rank(part: pd.DataFrame, by: str, comparison: str) -> pd.DataFrame:
    from lifelines.statistics import multivariate_logrank_test

    lost = (part["event"] == "lost").to_numpy()
    df = part[by].nunique() - 1
    if lost.any():
        group = part[by].astype(str).to_numpy()
        with _quiet():
            test = multivariate_logrank_test(part["value"].to_numpy(), group, lost)
        value, why = [float(test.test_statistic), float(test.p_value)], ""
    else:
        value, why = [np.nan, np.nan], f"none of {len(part)} items was lost"
    made = pd.DataFrame({"metric": ["log_rank", "p_value_log_rank"], "value": value})
    made = made.assign(
        run=_shared(part, "run"), group=_shared(part, "group"), step=part["step"].max()
    )
    told = {"comparison": comparison, "df": df, "reason": why}
    return made.assign(item="all", lo=np.nan, hi=np.nan, n=len(part), **told)


def _holm(p: pd.DataFrame) -> pd.DataFrame:
    from statsmodels.stats.multitest import multipletests

    value, sure = p["value"].to_numpy().copy(), p["value"].notna().to_numpy()
    if sure.any():
        value[sure] = multipletests(value[sure], method="holm")[1]
    return p.assign(metric="p_value_holm", value=value)


def fit_survival(
    times: pd.DataFrame,
    covariates: Sequence[str],
    *,
    law: str = "cox",
    log2: Sequence[str] = (),
    level: float = 0.95,
    draws: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """What makes a memory last: regression of survival on several features of the items at once.

    "cox" (Cox 1972) leaves open how the chance of loss changes with time and asks by which ratio a
    feature multiplies it. "weibull", "lognormal" and "loglogistic" (Wei 1992) name the law and ask
    by which ratio a feature stretches time; they take each loss as an interval.

    Args:
        times: What :func:`survival_times` gives, with the covariates as columns.
        covariates: Numbers as they are; text as steps from its most frequent value (the first in
            order, of several) that was ever lost.
        law: "cox", "weibull", "lognormal" or "loglogistic".
        log2: Which of the covariates to take as doublings.
        level: Of the intervals.
        draws: Resamples of items behind the interval of the concordance.
        seed: Of the resampling.

    Returns:
        Rows with the coordinates ``law`` and ``covariate``, ``n`` the items, ``events`` the losses:

        - "hazard_ratio" (above 1: sooner lost) or "time_ratio" (above 1: longer kept), for one more
          unit, one doubling, or a value against another; 1 without effect. Wald's interval, ``se``
          of the ratio's logarithm; with several rows an item the error is clustered by item (Cox).
          NaN with a reason where no finite ratio is best.
        - "p_value_ratio"; and for Cox "p_value_proportional" (Grambsch & Therneau 1994): small
          where the ratio changes with time. Undefined with several rows an item.
        - "concordance", .5 by chance, 1 where the fit orders all losses; its interval is from
          resampled items, the fit held fixed. "aic", to compare the three laws of time, or Cox
          with Cox. "shape" of a law of time: for Weibull, below 1 the hazard falls with time.

        ``.attrs`` count items ``dropped`` (a covariate missing, or looked at only at time 0).

    Raises:
        InputError: Other rows than survival times, an unknown law or column, a covariate that
            cannot be doubled, does not vary or repeats others, a value held by one item, no loss,
            more terms than losses, several rows an item under a law of time, or a fit that failed.
    """
    times = _checked(times, "fit_survival", covariates, blanks=True)
    if law not in LAWS:
        raise InputError(f"fit_survival: law is {law!r}; choose {', '.join(LAWS)}")
    if not covariates:
        raise InputError("fit_survival: no covariates; survival_curve describes times alone")
    stray = [name for name in log2 if name not in covariates]
    if stray:
        raise InputError(f"fit_survival: {stray[0]} is in log2 and not in covariates")
    if not 0 < level < 1:
        raise InputError(f"fit_survival: level is {level}, it must lie between 0 and 1")
    whole = times[list(covariates)].notna().all(axis=1) & (times["value"] > 0)
    dropped = int((~whole).sum())
    if dropped:
        warnings.warn(
            f"fit_survival: {dropped} of {len(times)} items lack a covariate or any time, and are "
            "left out",
            stacklevel=2,
        )
    times = times[whole].reset_index(drop=True)
    repeated = bool(times.duplicated(["run", "item"]).any())
    if repeated and law != "cox":
        raise InputError(
            f"fit_survival: several rows of an item, which {law} cannot allow for; take "
            "law='cox', or spells='last' in survival_times"
        )
    x, told, gone = _design(times, covariates, log2)
    kept = ~gone.any(axis=1).to_numpy()
    lost = (times["event"] == "lost").to_numpy()
    _enough(x[kept], lost[kept], len(times))
    cluster = times["run"].astype(str) + "/" + times["item"].astype(str) if repeated else None
    fit = _fit(times[kept], x[kept], law, level, None if cluster is None else cluster[kept])
    table = _terms(fit, told, gone.columns, times[kept], law)
    table = pd.concat([table, _quality(fit, times[kept], law, level, draws, seed)])
    table = table.assign(
        run=_shared(times, "run"), group=_shared(times, "group"), step=times["step"].max(),
        item="all", law=law, events=int(lost.sum()), n=len(times),
    )  # fmt: skip
    result = validate(table.reset_index(drop=True))
    result.attrs = {"dropped": dropped}
    return result


def _design(times: pd.DataFrame, covariates: Sequence[str], log2: Sequence[str]):
    """Columns of the regression; what each is called; and which items each hopeless value holds.

    The last are values of text of which no item was lost. Their ratio is 0 for sure (a time ratio
    infinite), and an item with a hazard of 0 tells nothing of the other ratios: so it is left out.
    """
    lost = times["event"] == "lost"
    if not lost.any():
        raise InputError(f"fit_survival: none of {len(times)} items was lost, so there is no rate")
    columns, told, gone = {}, {}, {}
    for name in covariates:
        column = times[name]
        if column.nunique() < 2:
            raise InputError(
                f"fit_survival: {name} is {column.iloc[0]} for all {len(times)} items, so it "
                "explains nothing; leave it out"
            )
        if pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column):
            if name in log2 and column.min() <= 0:
                raise InputError(
                    f"fit_survival: {name} goes down to {column.min():g} and has no doublings"
                )
            columns[name] = np.log2(column.astype(float)) if name in log2 else column.astype(float)
            told[name] = f"{name}, each doubling" if name in log2 else name
            continue
        if name in log2:
            raise InputError(f"fit_survival: {name} is text and has no doublings")
        column = column.astype(str)
        size = column.value_counts().sort_index()
        if size.min() < 2:
            raise InputError(
                f"fit_survival: {name}={size.idxmin()} has one item; pool it or leave it out"
            )
        seen = lost.groupby(column).any()
        against = size[seen[size.index]].idxmax()  # the first in order, of the most frequent
        for value in size.index.drop(against):
            key = f"{name}: {value}, not {against}"
            told[key] = key
            if seen[value]:
                columns[key] = (column == value).astype(float)
            else:
                gone[key] = column == value
    return pd.DataFrame(columns, index=times.index), told, pd.DataFrame(gone, index=times.index)


def _enough(x: pd.DataFrame, lost: np.ndarray, n: int) -> None:
    if lost.sum() <= x.shape[1]:
        raise InputError(
            f"fit_survival: {lost.sum()} of {n} items lost for {x.shape[1]} terms; there must be "
            "more losses than terms, and ten a term are advised"
        )
    spread = x.std(ddof=0)
    flat = list(spread.index[spread < ROUNDING])
    alone = (x - x.mean()) / spread.where(spread >= ROUNDING, 1.0)
    if not flat and np.linalg.matrix_rank(alone.to_numpy(), tol=1e-6 * len(x)) < x.shape[1]:
        flat = list(x.columns)
    if flat:
        raise InputError(
            f"fit_survival: {', '.join(flat)} cannot be told apart from one another or from a "
            "constant in these items; leave one out"
        )


def _fit(times: pd.DataFrame, x: pd.DataFrame, law: str, level: float, cluster) -> dict:
    """Coefficients with errors and p-values, likelihood and order of the items, from lifelines."""
    import lifelines
    from lifelines.exceptions import ConvergenceError, StatError

    names = [f"x{i}" for i in range(x.shape[1])]  # lifelines must not read names as formulas
    data = pd.DataFrame(x.to_numpy(), columns=names)
    lost = (times["event"] == "lost").to_numpy()
    notes: list[str] = []
    fitter = {
        "cox": lifelines.CoxPHFitter,
        "weibull": lifelines.WeibullAFTFitter,
        "lognormal": lifelines.LogNormalAFTFitter,
        "loglogistic": lifelines.LogLogisticAFTFitter,
    }[law](alpha=1 - level)
    shape = None
    try:
        with _quiet(notes):
            if law == "cox":
                data = data.assign(time=times["value"].to_numpy(), lost=lost)
                if cluster is not None:
                    data["cluster"] = cluster.to_numpy()
                by = None if cluster is None else "cluster"
                fitter.fit(data, "time", "lost", cluster_col=by, fit_options=EXACT)
                summary, aic = fitter.summary, fitter.AIC_partial_
            else:
                near = NEAR * times["value"].min()
                low = np.maximum(times["lo"].to_numpy(), near)  # log 0 has no law
                data = data.assign(lo=low, hi=times["hi"].to_numpy())
                fitter.fit_interval_censoring(data, "lo", "hi")
                scale, form = dict.fromkeys(fitter.params_.index.get_level_values(0))
                summary, aic = fitter.summary.loc[scale], fitter.AIC_
                shape = fitter.summary.loc[(form, "Intercept")]
    except (ConvergenceError, StatError, np.linalg.LinAlgError) as error:
        first = " ".join(str(error).split())[:120]
        raise InputError(
            f"fit_survival: {law} found no best fit to {len(times)} items and {lost.sum()} losses "
            f"({first}); take fewer covariates"
        ) from None
    summary = summary.loc[names]
    score = x.to_numpy() @ summary["coef"].to_numpy() * (-1 if law == "cox" else 1)
    sd = x.std(ddof=0).to_numpy()
    apart = ~np.isfinite(summary["se(coef)"].to_numpy())
    apart |= (summary["coef"].abs() * sd > FAR).to_numpy() & (
        summary["z"].abs() < UNSURE
    ).to_numpy()
    # lifelines may stop half way up a likelihood without a top and give what it has, with errors
    if any("Newton-Raphson" in note for note in notes) and not apart.any():
        apart[:] = True
    proportional = None
    if law == "cox" and cluster is None and not apart.any():
        from lifelines.statistics import proportional_hazard_test

        with _quiet():
            proportional = proportional_hazard_test(fitter, data, time_transform="rank").p_value
    return {
        "x": list(x.columns), "summary": summary, "aic": float(aic), "shape": shape, "score": score,
        "apart": apart, "proportional": proportional, "clustered": cluster is not None,
    }  # fmt: skip


def _terms(fit: dict, told: dict, gone: Sequence[str], times: pd.DataFrame, law: str):
    ratio = "hazard_ratio" if law == "cox" else "time_ratio"
    found = dict(zip(fit["x"], range(len(fit["x"])), strict=True))
    made = []
    for key, name in told.items():
        why = f"none of its items was lost; the best ratio is {0 if law == 'cox' else 'infinite'}"
        value = lo = hi = se = p = proportional = np.nan
        if key in found and fit["apart"][found[key]]:
            why = "the items it tells apart are lost in an order that no finite ratio fits best"
        elif key in found:
            line, why = fit["summary"].iloc[found[key]], ""
            bounds = line.filter(regex="^coef (lower|upper)")
            value, lo, hi = np.exp([line["coef"], *bounds])
            se, p = line["se(coef)"], line["p"]
        one = {"covariate": name, "reason": why}
        made.append({"metric": ratio, "value": value, "lo": lo, "hi": hi, "se": se, **one})
        made.append({"metric": "p_value_ratio", "value": p, **one})
        if law == "cox":
            if fit["proportional"] is not None and key in found:
                proportional = np.atleast_1d(fit["proportional"])[found[key]]
            elif not why:
                why = "several rows an item" if fit["clustered"] else "another ratio is not finite"
            one["reason"] = why
            made.append({"metric": "p_value_proportional", "value": proportional, **one})
    return pd.DataFrame(made)


def _quality(fit: dict, times: pd.DataFrame, law: str, level: float, draws: int, seed: int):
    from lifelines.utils import concordance_index

    lost, time = (times["event"] == "lost").to_numpy(), times["value"].to_numpy()
    why = "a ratio is not finite" if fit["apart"].any() else ""
    value = lo = hi = np.nan
    if not why:
        value = concordance_index(time, fit["score"], lost)
        units = pd.factorize(times["run"].astype(str) + "/" + times["item"].astype(str))[0]
        members = [np.flatnonzero(units == unit) for unit in range(units.max() + 1)]
        rng = np.random.default_rng(seed)
        boots = []
        for _ in range(draws):
            pick = np.concatenate(
                [members[i] for i in rng.integers(len(members), size=len(members))]
            )
            with contextlib.suppress(ZeroDivisionError):  # a resample without a pair in order
                boots.append(concordance_index(time[pick], fit["score"][pick], lost[pick]))
        if boots:
            lo, hi = np.quantile(boots, [(1 - level) / 2, (1 + level) / 2])
    aic = np.nan if why else fit["aic"]
    made = [
        {"metric": "concordance", "value": value, "lo": lo, "hi": hi},
        {"metric": "aic", "value": aic},
    ]
    if fit["shape"] is not None:
        bounds = fit["shape"].filter(regex="^coef (lower|upper)")
        form, low, high = np.exp([fit["shape"]["coef"], *bounds])
        made.append({"metric": "shape", "value": form, "lo": low, "hi": high})
    return pd.DataFrame(made).assign(covariate="", reason=why)


def _checked(times: pd.DataFrame, asker: str, by: Sequence[str], *, blanks: bool = False):
    times = validate(times)
    if times.empty or set(times["metric"].astype(str)) != {"survival_time"}:
        held = ", ".join(sorted(set(times["metric"].astype(str)))) or "no rows"
        raise InputError(f"{asker}: needs what survival_times gives, got {held}")
    for name in by:
        if name not in times.columns:
            raise InputError(f"{asker}: no column {name!r}; there are {', '.join(times)}")
        if not blanks and times[name].isna().any():
            raise InputError(
                f"{asker}: {name} is missing for {times[name].isna().sum()} items; leave them out"
            )
    return times


def _one_row_an_item(times: pd.DataFrame, by: Sequence[str], asker: str) -> None:
    again = times.duplicated(["run", "item", *by])
    if again.any():
        raise InputError(
            f"{asker}: item {times.loc[again, 'item'].iloc[0]} has several rows in a group, and "
            "intervals take items as independent; use spells='last', or fit_survival"
        )


def _shared(part: pd.DataFrame, name: str) -> str:
    held = part[name].astype(str).unique()
    return held[0] if len(held) == 1 else "all"


@contextlib.contextmanager
def _quiet(notes: list[str] | None = None) -> Iterator[None]:
    """Keep lifelines' warnings to ourselves (into ``notes``), and NumPy's settings as they were.

    Warnings about its own use of pandas are of no concern to the user; it also switches NumPy's
    warnings off for good.
    """
    with np.errstate(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for each in caught:
        if "lifelines" not in each.filename:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        elif notes is not None:
            notes.append(" ".join(str(each.message).split()))
