"""Choosing what an edit keeps, and the edit itself, against what they could cost.

``python tests/benchmarks/bench_edits.py``: ways of one group run in turn, and the least time of
each counts. Selection is on 4096 x 11008 (a 7B model's MLP), with spectra that decay as powers:
against a full sort of all masses, and a heap that pops them one by one as published code does.
Edits are on 1024 x 2752 (a sweep of them on 512 x 1376), against the four matrix products to the
eigenbases and back.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from workbench.curvature import Basis, Ranking, correct_masses, decompose, edited, staircase
from workbench.factors import Factors, Layer, collect_factors
from workbench.suite import load_suite

OUT, IN = 4096, 11008
EDIT_OUT, EDIT_IN = 1024, 2752
ROUNDS = 5
SWEEP_OUT, SWEEP_IN = 512, 1376
SHARES = (0.6, 0.9, 0.99)
SWEEP = (0.99, 0.98, 0.965, 0.95, 0.93, 0.9, 0.8, 0.6)
EDITS = (
    ("kfac", 0.6),
    ("kfac", 0.99),
    ("saliency", 0.9),
    ("ekfac", 0.9),
    ("random", 0.9),
    ("magnitude", 0.5),
)
HEAP_SHARE = 0.6  # at .9 it takes half a minute


def spectrum(size: int, power: float, rng: np.random.Generator) -> np.ndarray:
    values = np.exp(rng.normal(0, 0.3, size)) * np.arange(1, size + 1.0) ** -power
    return np.sort(values)[::-1].copy()


def by_sorting(scores: np.ndarray, rho: float) -> float:
    ordered = np.sort(scores, axis=None)[::-1]
    held = np.cumsum(ordered)
    return ordered[np.searchsorted(held, rho * held[-1])]


def by_heap(inputs: np.ndarray, outputs: np.ndarray, rho: float) -> int:
    """Pops masses from the largest down; the next ones stand right of it and below it."""
    heap, seen = [(-inputs[0] * outputs[0], 0, 0)], {(0, 0)}
    held, aim, count = 0.0, rho * inputs.sum() * outputs.sum(), 0
    while held < aim:
        mass, i, j = heapq.heappop(heap)
        held, count = held - mass, count + 1
        for place in ((i + 1, j), (i, j + 1)):
            if place[0] < len(inputs) and place[1] < len(outputs) and place not in seen:
                seen.add(place)
                heapq.heappush(heap, (-inputs[place[0]] * outputs[place[1]], *place))
    return count


def least(ways: Mapping[str, Callable], rounds: int = ROUNDS) -> dict[str, float]:
    best = dict.fromkeys(ways, np.inf)
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def show(title: str, best: Mapping[str, float], baseline: str) -> None:
    print(f"\n{title}")
    for name, seconds in best.items():
        print(f"  {name:34} {seconds * 1e3:10.1f} ms {seconds / best[baseline]:10.4f} x {baseline}")


def selection() -> None:
    rng = np.random.default_rng(0)
    inputs, outputs = spectrum(IN, 1.2, rng), spectrum(OUT, 1.0, rng)
    ways = {f"staircase {rho}": lambda rho=rho: staircase(inputs, outputs, rho) for rho in SHARES}
    best = least(ways)
    best |= least({"full sort": lambda: by_sorting(outputs[:, None] * inputs, 0.9)}, 1)
    best |= least({f"heap {HEAP_SHARE}": lambda: by_heap(inputs, outputs, HEAP_SHARE)}, 1)
    show(f"mass, {OUT} x {IN}", best, "full sort")
    assert by_heap(inputs, outputs, HEAP_SHARE) == staircase(inputs, outputs, HEAP_SHARE).sum()

    coefficients = rng.standard_normal((OUT, IN))

    def rank() -> Ranking:
        return Ranking(
            lambda places, rows, columns: (
                coefficients[places] ** 2 * outputs[rows] * inputs[columns]
            ),
            (OUT, IN),
        )

    ranking = rank()
    ways = {f"threshold {rho}": lambda rho=rho: ranking.threshold(rho) for rho in SHARES}
    ways |= {f"mask {rho}": lambda rho=rho: ranking.mask(rho) for rho in SHARES}
    best = least({"ranking, once a basis": rank} | ways)
    scores = coefficients**2 * outputs[:, None] * inputs
    best |= least({"full sort": lambda: by_sorting(scores, 0.9)}, 1)
    show(f"saliency or corrected mass, {OUT} x {IN}", best, "full sort")
    assert by_sorting(scores, 0.9) == ranking.threshold(0.9)


def decomposed(out: int, width: int) -> Basis:
    torch.manual_seed(0)
    layer = Layer("layer", 0, "mlp.up", torch.nn.Linear(width, out, bias=False))
    decay = torch.arange(1, width + 1.0) ** -0.6
    a, g = torch.randn(2 * width, width) * decay, torch.randn(2 * out, out) * decay[:out]
    basis = decompose(Factors((layer,), {"layer": a.T @ a}, {"layer": g.T @ g}, 1, "gold", 0))[0]
    noise = np.random.default_rng(0).normal(size=(out, width))
    return replace(basis, corrected=basis.masses * np.exp(noise))


def four_products(basis: Basis) -> torch.Tensor:
    u, v = basis.output_vectors, basis.input_vectors
    return u @ (u.T @ basis.layer.matrix.detach().double() @ v) @ v.T


def edits() -> None:
    basis = decomposed(EDIT_OUT, EDIT_IN)
    weight = basis.layer.matrix.detach().double()

    def whole_edit(method: str, rho: float) -> None:
        fresh = replace(basis, coefficients=basis.project(weight))  # nothing known beforehand
        with edited([fresh], method=method, rho=rho):
            pass

    ways = {"four products": lambda: four_products(basis)}
    for method, rho in EDITS:
        ways[f"{method} {rho}"] = lambda method=method, rho=rho: whole_edit(method, rho)
    title = f"one edit, into the eigenbases and back, {EDIT_OUT} x {EDIT_IN}"
    show(title, least(ways), "four products")


def sweeps() -> None:
    basis = decomposed(SWEEP_OUT, SWEEP_IN)

    def sweep(method: str) -> None:
        for rho in SWEEP:
            with edited([basis], method=method, rho=rho):
                pass

    sweep("svd")  # its decomposition, once
    ways = {"four products a share": lambda: [four_products(basis) for _ in SWEEP]}
    ways |= {m: lambda m=m: sweep(m) for m in ("kfac", "saliency", "ekfac", "svd", "magnitude")}
    show(f"{len(SWEEP)} shares, {SWEEP_OUT} x {SWEEP_IN}", least(ways), "four products a share")


def corrections() -> None:
    suite = load_suite()
    model = suite.checkpoints("base").at(suite.checkpoints("base").steps[-1])
    tokens = [each[: model.context] for each in model.encode(suite.corpus_texts(100, seed=0))]
    tokens = [each for each in tokens if len(each) >= 2]
    bases = decompose(collect_factors(model, tokens))
    ways = {
        "factors": lambda: collect_factors(model, tokens),
        "corrected by token": lambda: correct_masses(model, bases, tokens),
        "corrected by sequence": lambda: correct_masses(model, bases, tokens, example="sequence"),
    }
    show("corrected masses on the suite, 100 texts", least(ways, 3), "factors")


if __name__ == "__main__":
    selection()
    edits()
    sweeps()
    corrections()
