"""What the field says of forgetting, asked of the suite over seeds: does it hold at this scale?

``python -m tests.benchmarks.forgetting_over_seeds --seeds 5`` takes the suites of
``truth_over_seeds`` (trained first where they are not cached) and about four minutes. Four claims:
recognition outlives verbatim recall; loss jumps within ten updates, then creeps linearly in log
updates; random strings go faster than sentences; copies slow it. Every number is one of a seed;
printed and written are mean and 95 % Student interval over seeds, and each seed's own.

With five seeds the first two hold, the jump only for texts studied in a block (44 % of the gain gone
by update 10; planted verses 23 %, planted random strings nothing). The third does not: random strings
keep more of their gain and are recited longer, and lose more only in nats, having gained more. The
fourth holds for what is left in nats; the share that is left does not depend on copies.

Gains are those of the crossover twins: score of the run that planted a text less that of the run
that shares everything but the text. Lags count from its last exposure.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from tests.benchmarks.truth_over_seeds import load_seed
from workbench.foils import make_foils, make_study_lists
from workbench.probes.extraction import probe_extraction
from workbench.retention import SUITE_RATE, interference_texts, study_and_retain
from workbench.stats.effects import twin_effects
from workbench.stats.exposure import align_exposures
from workbench.stats.retention import retention_curve
from workbench.suite import Suite
from workbench.table import whole_file

LAGS = (0, 1, 2, 3, 5, 7, 10, 14, 20, 30, 40, 50, 70, 85, 100)
JUMP = 10  # updates within which the loss is said to jump
LATE = 50  # the lag at which what is left is compared
DOSES = (4, 8, 16, 32)  # in every wave; below, the gain of a seed's few texts is mostly noise
OFTEN = 16  # copies from which some texts of a seed are recited
EXPOSURES = (10, 25)  # the notebook's, and enough to recite
SHORT = (0, 1, 2, 5, 10, 20, 50)  # lags that three of four waves have
TOLD = (0, 10, 50)
KINDS = ("canary", "passage", "biography")
SHOWN = (
    "a planted, 16 copies on: recognised at 50",
    "a planted, 16 copies on: word for word at 50",
    "a planted: share left at 50, recognised less word for word",
    "a studied 25 times: recognition at 10",
    "a studied 25 times: recognition at 100",
    "a studied 25 times: recall_exact at 0",
    "a studied 25 times: recall_exact at 10",
    "a studied 10 times: share left at 50, recognition less recall_token",
    "b studied 10 times, nats: share of the first gain lost by 10",
    "b planted passage, nats: share of the first gain lost by 10",
    "b planted canary, nats: share of the first gain lost by 10",
    "b studied 10 times, nats: R2 of the line in log updates, from 10 on",
    "b studied 10 times, nats: R2 of the line in updates",
    "b studied 10 times, nats: AICc in updates less in log updates",
    "b planted passage, nats: AICc in updates less in log updates",
    "c canary: half-life of the gain [updates]",
    "c passage: half-life of the gain [updates]",
    "c canary less passage: share of the best gain left at 50",
    "c canary less passage: lost by 50 [nats per token]",
    "c canary, 16 copies on: word for word at 0",
    "c canary, 16 copies on: word for word at 10",
    "c passage, 16 copies on: word for word at 0",
    "c passage, 16 copies on: word for word at 10",
    "d 4 copies: left at 50 [nats per token]",
    "d 128 copies: left at 50 [nats per token]",
    "d all, from 4 copies: share left at 50, per doubling",
    "d all, from 4 copies: doublings of the half-life, per doubling",
)
METRICS = ("log_probability", "extractable", "verbatim_length")
PREFIX = SUFFIX = 16  # tokens of the prompt, and of what is scored and recited


def panel(suite: Suite, run: str) -> pd.DataFrame:
    items = suite.items(run)
    table = probe_extraction(suite.checkpoints(run), items, prefix=PREFIX, suffix=SUFFIX)
    table = table[table["metric"].isin(METRICS)]
    return align_exposures(table, suite.exposures(run))


def gains(base: pd.DataFrame, twin: pd.DataFrame) -> pd.DataFrame:
    """Each planted text's gain over its twin, from its last exposure on, by metric."""
    parts = []
    for metric in METRICS:
        mine, other = (t[t["metric"] == metric] for t in (base, twin))
        effect = twin_effects(mine[mine["group"].isin(["seen", "never"])], other)
        parts.append(effect[effect["copies"] == effect["dose"]].assign(of=metric))
    return pd.concat(parts, ignore_index=True)


def curve(gain: pd.DataFrame, *, lags: tuple[int, ...] | None = None) -> pd.Series:
    """Mean gain by lag over texts that are there at all of the lags; None: at all to lag 100."""
    wide = gain.pivot(index="item", columns="lag", values="value")
    if lags is None:
        wide = wide[wide[100.0].notna()].dropna(axis=1)
        return wide.loc[:, :100.0].mean()
    return wide[list(lags)].dropna().mean()


def best(line: pd.Series) -> float:
    """The best value within ten updates of the last exposure: momentum carries learning on."""
    return float(line[line.index <= JUMP].max())


def half_life(line: pd.Series) -> float:
    """First lag after the best at which half of it is left, on a line over log(1 + lag).

    A curve that never gets there counts with its last lag: a lower bound.
    """
    line = line.loc[line[line.index <= JUMP].idxmax() :]
    left = (line / line.iloc[0]).to_numpy()
    time = np.log1p(line.index.to_numpy(dtype=float))
    below = np.flatnonzero(left <= 0.5)
    if not len(below):
        return float(line.index[-1])
    at = below[0]
    share = (left[at - 1] - 0.5) / (left[at - 1] - left[at])
    return float(np.expm1(time[at - 1] + share * (time[at] - time[at - 1])))


def creep(line: pd.Series, *, told: str) -> list[tuple[str, float]]:
    """The jump within ten updates, and how straight the rest is in log updates and in updates."""
    late = line[line.index >= JUMP]
    x, y = late.index.to_numpy(dtype=float), late.to_numpy()
    total = np.square(y - y.mean()).sum()
    rest = {}
    for name, time in (("log", np.log10(x)), ("plain", x)):
        slope, start = np.polyfit(time, y, 1)
        rest[name] = np.square(y - start - slope * time).sum()
    # both lines have as many parameters, so AICc differs by the fit alone
    apart = len(x) * np.log(rest["plain"] / rest["log"])
    first, jumped, last = line.iloc[0], late.iloc[0], late.iloc[-1]
    return [
        (f"b {told}: share of the first gain lost by {JUMP}", 1 - jumped / first),
        (f"b {told}: of what is lost by 100, lost by {JUMP}", (first - jumped) / (first - last)),
        (f"b {told}: R2 of the line in log updates, from {JUMP} on", 1 - rest["log"] / total),
        (f"b {told}: R2 of the line in updates", 1 - rest["plain"] / total),
        (f"b {told}: AICc in updates less in log updates", apart),
    ]


def strings_and_sentences(gain: pd.DataFrame) -> list[tuple[str, float]]:
    """(c) Canaries are random letters, passages are verses, biographies sentences of a template."""
    found = []
    for kind in KINDS:
        mine = gain[gain["kind"] == kind]
        line = curve(mine[(mine["of"] == "log_probability") & mine["dose"].isin(DOSES)])
        found += [
            (f"c {kind}: first gain [nats per token]", line.iloc[0]),
            (f"c {kind}: half-life of the gain [updates]", half_life(line)),
            (f"c {kind}: share of the best gain left at {LATE}", line[LATE] / best(line)),
            (f"c {kind}: lost by {LATE} [nats per token]", line.iloc[0] - line[LATE]),
        ]
        often = mine[mine["dose"] >= OFTEN]
        for metric, told in (("extractable", "word for word"), ("verbatim_length", "tokens said")):
            said = curve(often[often["of"] == metric], lags=SHORT)
            found += [(f"c {kind}, {OFTEN} copies on: {told} at {lag}", said[lag]) for lag in TOLD]
            share = said[JUMP] / said[0] if said[0] else np.nan
            found.append((f"c {kind}, {OFTEN} copies on: share of {told} left at {JUMP}", share))
    told = dict(found)
    for what in (
        "half-life of the gain [updates]",
        f"share of the best gain left at {LATE}",
        f"lost by {LATE} [nats per token]",
    ):
        gap = told[f"c canary: {what}"] - told[f"c passage: {what}"]
        found.append((f"c canary less passage: {what}", gap))
    what = f", {OFTEN} copies on: share of tokens said left at {JUMP}"
    gap = told[f"c canary{what}"] - told[f"c passage{what}"]
    return [*found, (f"c canary less passage{what}", gap)]


def copies_slow_it(gain: pd.DataFrame) -> list[tuple[str, float]]:
    """(d) What is left at fifty by how often a text was seen."""
    found = []
    nats = gain[gain["of"] == "log_probability"]
    for told, part in (("all", nats), *((k, nats[nats["kind"] == k]) for k in KINDS)):
        left, half = {}, {}
        for dose, mine in part.groupby("dose"):
            line = curve(mine, lags=SHORT)
            left[dose] = line[LATE] / best(line)
            if told == "all":
                found.append((f"d {dose} copies: best gain [nats per token]", best(line)))
                found.append((f"d {dose} copies: left at {LATE} [nats per token]", line[LATE]))
                found.append((f"d {dose} copies: share of the best left at {LATE}", left[dose]))
            if dose in DOSES:
                half[dose] = half_life(curve(mine))
                if told == "all":
                    found.append((f"d {dose} copies: half-life [updates]", half[dose]))
        used = [dose for dose in left if dose >= DOSES[0]]
        slope = np.polyfit(np.log2(used), [left[dose] for dose in used], 1)[0]
        what = f"d {told}, from {DOSES[0]} copies:"
        found.append((f"{what} share left at {LATE}, per doubling", slope))
        slope = np.polyfit(np.log2(DOSES), np.log2([half[dose] for dose in DOSES]), 1)[0]
        found.append((f"{what} doublings of the half-life, per doubling", slope))
    return found


def outlives(base: pd.DataFrame, items: pd.DataFrame) -> list[tuple[str, float]]:
    """(a) on planted texts: likelier than the partner, which this run never met, or recited."""
    score = base[base["metric"] == "log_probability"].assign(item=lambda t: t["item"].astype(str))
    partner = items.set_index("item")["partner"]
    other = score[["item", "step", "value"]].rename(columns={"item": "partner", "value": "other"})
    mine = score[(score["group"] == "seen") & (score["copies"] == score["dose"])]
    mine = mine[mine["dose"] >= OFTEN].assign(partner=lambda t: t["item"].map(partner))
    mine = mine.merge(other, on=["partner", "step"])
    mine["value"] = (mine["value"] > mine["other"]) + 0.5 * (mine["value"] == mine["other"])
    known = curve(mine, lags=SHORT)
    said = base[(base["metric"] == "extractable") & base["item"].isin(mine["item"].unique())]
    said = curve(said[said["copies"] == said["dose"]], lags=SHORT)
    found = []
    for lag in TOLD:
        found.append((f"a planted, {OFTEN} copies on: recognised at {lag}", known[lag]))
        found.append((f"a planted, {OFTEN} copies on: word for word at {lag}", said[lag]))
    above = 2 * known - 1  # without memory recognition is 1/2, recital 0
    for lag in TOLD[1:]:
        gap = above[lag] / above[0] - said[lag] / said[0]
        found.append((f"a planted: share left at {lag}, recognised less word for word", gap))
    return found


def studied(suite: Suite, seed: int, exposures: int) -> list[tuple[str, float]]:
    """(a) and (b) on a studied list: the last checkpoint of ``base``, the notebook's settings."""
    checkpoints = suite.checkpoints("base")
    model = checkpoints.at(checkpoints.steps[-1])
    items, pool, _ = make_study_lists(model, suite.held_out(), n=48, tokens=64, seed=seed)
    foils = make_foils(items, unrelated=pool["text"], kinds=["unrelated"], seed=seed)
    made = study_and_retain(
        model, items, foils, interference_texts(suite, seed=seed),
        exposures=exposures, learning_rate=SUITE_RATE, lags=LAGS, seed=seed,
    )  # fmt: skip
    table = retention_curve(made.table, draws=2, seed=seed)
    net = table[(table["metric"] == "difference") & (table["group"] == "net gain")]
    level = table[table["group"] == "studied"]
    found, lines = [], {}
    told = f"studied {exposures} times"
    for metric, foil in (
        ("recognition", "unrelated"), ("recall_exact", "itself"), ("recall_token", "itself"),
    ):  # fmt: skip
        line = net[(net["of"] == metric) & (net["foil"] == foil)].set_index("lag")["value"]
        lines[metric] = line.sort_index()
        mine = level[(level["metric"] == metric) & (level["foil"] == foil)].set_index("lag")
        for lag in (0, JUMP, LATE, 100):
            found.append((f"a {told}: {metric} at {lag}", mine["value"][lag]))
    for metric in ("recall_exact", "recall_token"):
        for lag in (JUMP, LATE, 100):
            one, two = (
                lines[m][lag] / lines[m][0] if lines[m][0] > 0 else np.nan
                for m in ("recognition", metric)
            )
            found.append((f"a {told}: share left at {lag}, recognition less {metric}", one - two))
    loss = net[(net["of"] == "loss") & (net["foil"] == "itself")].set_index("lag")["value"]
    return found + creep(-loss.sort_index(), told=f"{told}, nats")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--seeds", type=int, default=5)
    ask.add_argument("--out", type=Path, default=Path("forgetting_over_seeds.json"))
    ask.add_argument("--all", action="store_true", help="print every number, not the few that tell")
    chosen = ask.parse_args()
    if chosen.seeds < 3:
        ask.error(f"--seeds is {chosen.seeds}; an interval over seeds needs at least 3")
    found = []
    for seed in range(chosen.seeds):
        suite = load_seed(seed)
        base, twin = panel(suite, "base"), panel(suite, "twin")
        gain = gains(base, twin)
        doses = gain[gain["dose"].isin(DOSES) & (gain["of"] == "log_probability")]
        numbers = outlives(base, suite.items("base"))
        for exposures in EXPOSURES:
            numbers += studied(suite, seed, exposures)
        for kind in KINDS:
            numbers += creep(curve(doses[doses["kind"] == kind]), told=f"planted {kind}, nats")
        numbers += strings_and_sentences(gain) + copies_slow_it(gain)
        found += [{"what": what, "seed": seed, "value": float(value)} for what, value in numbers]
    wide = pd.DataFrame(found).pivot(index="what", columns="seed", values="value")
    n = wide.notna().sum(axis=1)  # a share of nothing is no number
    mean, half = wide.mean(axis=1), stats.t.ppf(0.975, n - 1) * wide.std(axis=1) / np.sqrt(n)
    table = pd.DataFrame({"mean": mean, "lo": mean - half, "hi": mean + half, "n": n})
    order = list(dict.fromkeys(row["what"] for row in found))
    order.sort(key=lambda what: what[0])
    shown = order if chosen.all else [what for what in order if what in SHOWN]
    print(table.loc[shown].round(3).to_string())
    written = {
        what: {**table.loc[what].to_dict(), "seeds": wide.loc[what].tolist()} for what in order
    }
    with whole_file(chosen.out) as temporary:
        temporary.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
