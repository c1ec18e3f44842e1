"""What Hessian-vector products and Kronecker factors cost, against a forward and backward pass.

``python tests/benchmarks/bench_hessian.py [rounds]``: a random GPT-NeoX and Llama of width 256 with
two blocks; all ways in turn in one process, the least of the rounds counts. Products are of a text
of 64 predictions, by all parameters: the first of a block, another (the graph of the gradient is
kept), and each of eight at once. Factors are of all MLP matrices with gold labels, over that text
and over 128 of them; curvlinops (tests/oracle.txt) collects the same, with nothing but those weights
to differentiate by, its counts given and its checks off. Memory is the peak of what torch has
allocated above the weights, from the allocations and releases that its profiler records.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from workbench.factors import collect_factors, linear_layers, padded, summed_loss
from workbench.hessian import loss_hessian
from workbench.models import LanguageModel

ROUNDS, TOKENS, TEXTS, VOCABULARY = 5, 64, 128, 2048
MLP = {"neox": ["mlp.up", "mlp.down"], "llama": ["mlp.up", "mlp.gate", "mlp.down"]}
WARM_UP = 2


def build(kind: str) -> LanguageModel:
    torch.manual_seed(0)
    size = {
        "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": VOCABULARY, "max_position_embeddings": 2 * TOKENS,
    }  # fmt: skip
    if kind == "neox":
        module = GPTNeoXForCausalLM(GPTNeoXConfig(**size, intermediate_size=1024))
    else:
        config = LlamaConfig(**size, num_key_value_heads=4, intermediate_size=688)
        module = LlamaForCausalLM(config)
    return LanguageModel(module.eval(), None, run=kind)


def least(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Processor seconds of each way, all of them in each round; a busy machine's wait is not in."""
    best = dict.fromkeys(ways, np.inf)
    for number in range(WARM_UP + rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if number >= WARM_UP:
                best[name] = min(best[name], time.process_time() - start)
    return best


def peak(way: Callable[[], object]) -> int:
    """The most bytes that a call had allocated at once, beyond what was there before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        way()
    held = highest = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda each: each.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def forward_and_backward(model: LanguageModel, tokens) -> Callable[[], object]:
    ids, targets, mask = padded(model, tokens)

    def way():
        model.module.requires_grad_(True)
        loss = summed_loss(model, ids, targets, mask, "gold", 0)
        torch.autograd.grad(loss, list(model.module.parameters()))

    return way


def of_products(kind: str, rounds: int) -> None:
    model = build(kind)
    tokens = [np.random.default_rng(0).integers(0, VOCABULARY, TOKENS + 1)]
    plain = forward_and_backward(model, tokens)
    with loss_hessian(model, tokens) as hessian:
        vectors = np.random.default_rng(1).normal(size=(8, hessian.size))
        hessian.product(vectors[0])

        def in_a_block_of_its_own(count: int):
            with loss_hessian(model, tokens) as fresh:
                fresh.products(vectors[:count])

        seconds = least(
            {
                "forward and backward": plain,
                "first product": lambda: in_a_block_of_its_own(1),
                "one of eight": lambda: in_a_block_of_its_own(8),
                "another product": lambda: hessian.product(vectors[0]),
            },
            rounds,
        )
    seconds["one of eight"] /= 8
    memory = {
        "forward and backward": peak(plain),
        "first product": peak(lambda: in_a_block_of_its_own(1)),
        "one of eight": peak(lambda: in_a_block_of_its_own(8)),
    }
    print(f"{kind}: {hessian.size:,} parameters, {TOKENS} predictions")
    for name, each in seconds.items():
        share = each / seconds["forward and backward"]
        line = f"  {name:22s} {1e3 * each:7.1f} ms   ratio {share:5.2f}"
        if name in memory:
            line += f"   peak {memory[name] / 2**20:6.1f} MiB"
        print(line)


def by_curvlinops(model: LanguageModel, tokens, roles) -> Callable[[], object]:
    import curvlinops

    layers = linear_layers(model.module, roles=roles)
    weights = [layer.module.weight for layer in layers]
    ids, targets, _ = padded(model, tokens)

    class Classes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model.module

        def forward(self, ids):
            return self.module(input_ids=ids, use_cache=False).logits.transpose(1, 2)

    net = Classes()

    def way():
        model.module.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        operator = curvlinops.KFACLinearOperator(
            net, torch.nn.CrossEntropyLoss(reduction="sum"), weights, [(ids, targets)],
            fisher_type="empirical", check_deterministic=False,
            num_data=len(tokens), num_per_example_loss_terms=TOKENS,
        )  # fmt: skip
        operator.compute_kronecker_factors()
        return {
            layer.name: (
                operator._input_covariances[f"module.{layer.name}"],
                operator._gradient_covariances[f"module.{layer.name}"] / ids.numel(),
            )
            for layer in layers
        }

    return way


def of_factors(kind: str, texts: int, rounds: int) -> None:
    model, roles = build(kind), MLP[kind]
    tokens = list(np.random.default_rng(0).integers(0, VOCABULARY, (texts, TOKENS + 1)))

    def ours():
        return collect_factors(model, tokens, roles=roles, labels="gold")

    ways = {"forward and backward": forward_and_backward(model, tokens), "ours": ours}
    try:
        ways["curvlinops"] = by_curvlinops(model, tokens, roles)
    except ImportError:
        print("curvlinops is not installed: pip install --no-deps -r tests/oracle.txt")
    else:
        factors, theirs = ours(), ways["curvlinops"]()
        worst = max(
            float((mine - other).norm() / mine.norm())
            for name, pair in theirs.items()
            for mine, other in zip((factors.inputs[name], factors.outputs[name]), pair, strict=True)
        )
    seconds = least(ways, rounds)
    print(
        f"{kind}: factors of {len(linear_layers(model.module, roles=roles))} matrices, {texts} x {TOKENS} predictions"
    )
    for name, each in seconds.items():
        share = each / seconds["forward and backward"]
        print(f"  {name:22s} {1e3 * each:7.1f} ms   ratio {share:5.2f}")
    if "curvlinops" in seconds:
        share = seconds["ours"] / seconds["curvlinops"]
        print(f"  ours / curvlinops {share:.2f}; the factors differ by {worst:.1e}")


def main(rounds: int) -> None:
    warnings.simplefilter("ignore")  # few tokens for the factors
    print(f"{torch.get_num_threads()} threads, {torch.__version__}")
    for kind in MLP:
        of_products(kind, rounds)
    for kind in MLP:
        for texts in (1, TEXTS):
            of_factors(kind, texts, rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
