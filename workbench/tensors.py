"""Every weight of a model by what it does: role, block, and q, k and v apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch

from workbench.factors import IN_A_BLOCK, ROLES

FUSED = {"attention.query_key_value", "attn.c_attn"}  # q, k and v in one matrix
OUTSIDE = -1  # the layer of what stands in no block, and of sums over blocks


def weight_tensors(
    module: torch.nn.Module, values: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, str, int, torch.Tensor]]:
    """Name, role, block and value of each parameter; fused q, k and v are taken apart.

    Roles are those of ``workbench.factors.linear_layers``, ``attn.q``, ``attn.k``, ``attn.v``
    also where they are stored as one matrix, and ``norm``, ``embedding``, ``head``, ``other``;
    a bias has the role of its matrix. Outside the blocks the block is -1. A tied head is the
    embedding and comes once, under that name.

    Args:
        values: What is taken apart in place of the parameters, by their names and of their
            shapes, such as gradients; None takes the parameters themselves.
    """
    owners = dict(module.named_modules())
    head = getattr(module, "get_output_embeddings", lambda: None)()
    for name, parameter in module.named_parameters():
        place = name.rpartition(".")[0]
        inside, block = IN_A_BLOCK.search(place), re.search(r"(?:^|\.)(\d+)\.", name)
        number = int(block.group(1)) if block else OUTSIDE
        value = parameter.detach() if values is None else values[name]
        if inside and inside.group(2) in FUSED:
            if inside.group(2) == "attn.c_attn":
                parts = value.chunk(3, dim=-1)  # Conv1D: outputs last, all q, then all k, all v
            else:  # [head, (q, k, v), size] along the outputs
                by_head = value.unflatten(0, (module.config.num_attention_heads, 3, -1))
                parts = [part.flatten(0, 1) for part in by_head.unbind(1)]
            for letter, part in zip("qkv", parts, strict=True):
                yield f"{name}.{letter}", f"attn.{letter}", number, part
            continue
        if inside:
            role = ROLES[inside.group(2)]
        elif owners[place] is head:
            role = "head"
        elif isinstance(owners[place], torch.nn.Embedding):
            role = "embedding"
        else:
            role = "norm" if type(owners[place]).__name__.endswith("Norm") else "other"
        yield name, role, number, value
