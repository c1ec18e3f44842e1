"""Edits kept on disk: a patch that can be put on and taken off, and a whole edited model.

A patch holds the edited weights themselves, in the model's own dtype. Nothing is computed when it
is put on, so it gives the same bits on every machine, and what was there is put back to the bit. A
difference of floats would round on its way in and again on its way out, and a mask alone would
need the eigenvectors, which are larger than the weight, and the same matrix products everywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from workbench.curvature import (
    MASKED,
    Basis,
    Edit,
    component_mask,
    edited,
    refuse_other_model,
)
from workbench.models import LanguageModel
from workbench.table import InputError, whole_file, whole_folder

WEIGHT, MASK = "weight:", "mask:"  # before a layer's name, in the file


def save_patch(
    model: LanguageModel,
    bases: Sequence[Basis],
    path: str | os.PathLike,
    *,
    method: str = "kfac",
    rho: float,
    seed: int = 0,
) -> Edit:
    """Write an edit to one safetensors file, whole or not at all; the model stays as it is.

    The file holds the edited weights, the components kept (one bit each; for the methods that keep
    components), and as JSON in its header: the edit, its layers, the architecture, hashes of the
    model it was made for, of the edited model and of the bases, and the model's passport.

    Args:
        model: Whose layers were decomposed.
        bases, method, rho, seed: As :func:`workbench.curvature.edited`.

    Returns:
        The edit: share kept and predicted damage.

    Raises:
        InputError: As ``edited``, or bases of another model.
    """
    refuse_other_model(model, bases, "save_patch")
    passport, tensors = model.passport(), {}
    with edited(bases, method=method, rho=rho, seed=seed) as edit:
        for basis in bases:
            name, weight = basis.layer.name, basis.layer.module.weight
            # a layer of a shared buffer, or an edit that goes on, must not change what is written
            tensors[WEIGHT + name] = weight.detach().to("cpu", copy=True).contiguous()
            if method in MASKED:
                mask = component_mask(basis, method=method, rho=rho, seed=seed)
                tensors[MASK + name] = torch.from_numpy(np.packbits(mask))
        after = model.weights_hash()
    about = {
        "edit": asdict(edit) | {"seed": seed},
        "layers": [basis.layer.name for basis in bases],
        "architecture": type(model.module).__name__,
        "weights": passport["weights"],
        "edited": after,
        "bases": _hash_of_bases(bases),
        "passport": passport,
    }
    with whole_file(path) as temporary:
        about["content"] = _content(tensors, about)
        save_file(tensors, temporary, {"patch": json.dumps(about)})
    return edit


@contextlib.contextmanager
def patched(model: LanguageModel, path: str | os.PathLike) -> Iterator[Edit]:
    """Put a saved edit on a model for the length of a ``with`` block.

    The weights are those of the file, to the bit; those before come back, also after an exception.

    Yields:
        The edit that :func:`save_patch` returned.

    Raises:
        InputError: No patch there or a damaged one, another architecture, or other weights than it
            was made for.
    """
    about, tensors = read_patch(path)
    layers = _layers(model)
    for name in about["layers"]:
        new, old = tensors[WEIGHT + name], layers.get(name)
        if old is None or old.shape != new.shape:
            has = "none of that name" if old is None else f"one of {tuple(old.shape)}"
            raise InputError(
                f"patched: {path} is for {about['architecture']} with a layer {name} of "
                f"{tuple(new.shape)}; this {type(model.module).__name__} has {has}"
            )
    held = model.weights_hash()
    if held != about["weights"]:
        source = about["passport"]["model"] or "a model without a source"
        worn = "; it wears this patch already" if held == about["edited"] else ""
        raise InputError(
            f"patched: {path} was made for weights {about['weights']} ({source}), the model holds "
            f"{held}{worn}; load those, in the same dtype"
        )
    before = {name: layers[name].detach().clone() for name in about["layers"]}
    try:
        _copy({name: tensors[WEIGHT + name] for name in before}, layers)
        edit = {key: value for key, value in about["edit"].items() if key != "seed"}
        yield Edit(**edit)
    finally:
        _copy(before, layers)


def _copy(weights: Mapping[str, torch.Tensor], layers: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            layers[name].copy_(weight)


def read_patch(path: str | os.PathLike) -> tuple[dict, dict[str, torch.Tensor]]:
    """What a patch says about itself, and its tensors.

    Raises:
        InputError: There is no file, it is not a patch, or it is damaged.
    """
    if not Path(path).is_file():
        raise InputError(f"patched: no file at {path}; save_patch writes one")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["patch"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if about.pop("content") != _content(tensors, about):
            raise ValueError("its content is not what was written")
    except (SafetensorError, OSError, KeyError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"patched: {path} is not a whole patch file ({reason})") from None
    return about, tensors


def kept_components(path: str | os.PathLike, basis: Basis) -> Bool[np.ndarray, "out in"]:
    """Which components of a layer a patch keeps; of the bases it was made from.

    Raises:
        InputError: As :func:`read_patch`, or a method that keeps no components.
    """
    about, tensors = read_patch(path)
    packed = tensors.get(MASK + basis.layer.name)
    if packed is None:
        raise InputError(
            f"kept_components: {path} holds no mask of {basis.layer.name}; its method is "
            f"{about['edit']['method']}, its layers are {', '.join(about['layers'])}"
        )
    shape = tuple(basis.coefficients.shape)
    flat = np.unpackbits(packed.numpy(), count=shape[0] * shape[1])
    return flat.reshape(shape).astype(bool)


def export_edited(
    model: LanguageModel,
    folder: str | os.PathLike,
    *,
    patch: str | os.PathLike | None = None,
) -> None:
    """Write an edited model as an ordinary folder: weights, configuration, tokenizer.

    ``load_model(folder)`` and transformers' own ``AutoModelForCausalLM`` read it, and it scores as
    the model does under the edit. It is written under another name and renamed when it is whole.

    Args:
        patch: The edit, as :func:`save_patch` wrote it; None writes the weights as they are now,
            which inside ``edited``, ``patched`` or ``dampened`` are the edited ones.

    Raises:
        InputError: The folder is there already, or as :func:`patched`.
    """
    if Path(folder).exists():
        raise InputError(f"export_edited: {folder} is there already; give a folder that is not")
    under = contextlib.nullcontext() if patch is None else patched(model, patch)
    with under, whole_folder(folder) as unfinished:
        model.module.save_pretrained(unfinished)
        model.tokenizer.save_pretrained(unfinished)


def _layers(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {
        name: module.weight
        for name, module in model.module.named_modules()
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter)
    }


def _hash_of_bases(bases: Sequence[Basis]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for basis in bases:
        digest.update(basis.layer.name.encode())
        for each in (basis.input_values, basis.output_values):
            digest.update(np.ascontiguousarray(each).tobytes())
        for each in (basis.input_vectors, basis.output_vectors):
            digest.update(memoryview(each.cpu().contiguous().numpy()).cast("B"))
    return digest.hexdigest()


def _content(tensors: Mapping[str, torch.Tensor], about: Mapping) -> str:
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}{tensors[name].dtype}".encode())
        digest.update(memoryview(tensors[name].flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
