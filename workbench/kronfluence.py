"""Factors in the files of kronfluence 1.0, which goes on from them to influence functions.

Grosse et al. (2023), "Studying large language model generalization with influence functions".
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file

from workbench.factors import Factors, Layer, forward_seen, padded
from workbench.models import TOKENS_PER_BATCH, LanguageModel, buckets
from workbench.table import InputError, whole_folder

TOLERANCE = 1e-3  # relative; the same texts differ by rounding, others by per cent


def export_kronfluence(
    factors: Factors,
    folder: str | os.PathLike,
    *,
    model: LanguageModel | None = None,
    tokens: Sequence[Int[np.ndarray, " pos"]] | None = None,
) -> None:
    """Write factors as kronfluence's covariances: four safetensors files, keyed by module name.

    ``activation_covariance`` and ``gradient_covariance`` are **sums** of ``a a^T`` and ``g g^T``,
    the two ``num_..._processed`` the tokens they are over. kronfluence reads the folder
    ``<output_dir>/<analysis>/factors_<name>`` under that name. It gives the input of a layer with
    a bias a last column of ones, for which the texts must be run once more, forward only. It
    tracks ``torch.nn.Linear`` alone: a Conv1D must be made one there, and has its layout here.

    Args:
        folder: Must not exist yet; it is written whole.
        model, tokens: What the factors were made of; needed where a layer has a bias.

    Raises:
        InputError: The folder is there already, a layer with a bias and no texts, or other texts
            than the factors were made of.
    """
    if Path(folder).exists():
        raise InputError(
            f"export_kronfluence: {folder} is there already; give a folder that is not"
        )
    biased = [each for each in factors.layers if getattr(each.module, "bias", None) is not None]
    if biased and (model is None or tokens is None):
        raise InputError(
            f"export_kronfluence: {biased[0].name} has a bias, for which kronfluence keeps the mean "
            "input too; give the model and the tokens that the factors were made of"
        )
    means = _mean_inputs(factors, biased, model, tokens) if biased else {}
    count = torch.tensor([factors.tokens])
    names = [layer.name for layer in factors.layers]
    inputs = {
        name: _with_ones(factors.inputs[name].cpu(), means.get(name)) * factors.tokens
        for name in names
    }
    files = {
        "activation_covariance": inputs,
        "gradient_covariance": {n: factors.outputs[n].cpu() * factors.tokens for n in names},
        "num_activation_covariance_processed": {name: count.clone() for name in names},
        "num_gradient_covariance_processed": {name: count.clone() for name in names},
    }
    with whole_folder(folder) as unfinished:
        for name, tensors in files.items():
            save_file(
                {key: each.contiguous() for key, each in tensors.items()},
                unfinished / f"{name}.safetensors",
            )


def _with_ones(
    moments: Float[torch.Tensor, "in in"], mean: Float[torch.Tensor, " in"] | None
) -> torch.Tensor:
    """The moments of an input with a last entry of 1: its mean beside them, and 1 in the corner."""
    if mean is None:
        return moments
    mean = mean.to("cpu", moments.dtype)
    corner = torch.ones(1, 1, dtype=moments.dtype)
    return torch.cat(
        [torch.cat([moments, mean[:, None]], dim=1), torch.cat([mean[None], corner], dim=1)]
    )


def _mean_inputs(
    factors: Factors,
    layers: Sequence[Layer],
    model: LanguageModel,
    tokens: Sequence[Int[np.ndarray, " pos"]],
) -> Mapping[str, Float[torch.Tensor, " in"]]:
    sums: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    count, mask = 0, None

    def see(layer: Layer, given: torch.Tensor, _: torch.Tensor) -> None:
        inputs = given[mask]
        inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        sums[layer.name] = sums.get(layer.name, 0.0) + inputs.sum(0)
        squares[layer.name] = squares.get(layer.name, 0.0) + inputs.square().sum(0)

    lengths = np.array([len(each) for each in tokens])
    with torch.no_grad(), forward_seen(layers, see):
        for index in buckets(lengths, TOKENS_PER_BATCH.get(model.device.type, 4096)):
            ids, _, mask = padded(model, [tokens[i] for i in index])
            count += int(mask.sum())
            model.module(input_ids=ids, use_cache=False)
    for layer in layers:
        # behind a norm |a|^2 is nearly the same whatever the text, its parts are not
        expected = factors.inputs[layer.name].diagonal() * factors.tokens
        gap = (squares[layer.name].to(expected) - expected).norm()
        if gap > TOLERANCE * expected.norm():
            raise InputError(
                f"export_kronfluence: the factors of {layer.name} were not made of these "
                f"{count} tokens and this model, but of {factors.tokens}; give those"
            )
    return {name: total / count for name, total in sums.items()}
