"""Exported models in files, and back into a network of the original architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from woodfisher.errors import WoodfisherError
from woodfisher.export.semistructured import to_semi_structured
from woodfisher.export.sparse import SparseLayer, layer_named, sparse_from
from woodfisher.files import unreadable, write_whole
from woodfisher.gradients.isolation import copied
from woodfisher.gradients.parameters import full_name, unwrapped
from woodfisher.saving.saved import (
    EXPECTED,
    EXPORT,
    SPARSE_PARTS,
    check_suffix,
    exported_in,
    pack_state,
    plain_state,
    read,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def save_dense(model: nn.Module, path: str | Path) -> None:
    """Write a plain safetensors file of a model's state dict, every tensor under its own name, whole or not at all.

    `model.load_state_dict(safetensors.torch.load_file(path))` reads it.
    """
    check_suffix(path)
    content = plain_state(unwrapped(model).state_dict())
    write_whole(Path(path), lambda draft: draft.write_bytes(content))


def save_export(model: nn.Module, path: str | Path) -> int:
    """Write a model of `to_sparse`, `to_semi_structured` or `shrink`, whole or not at all, for `load_export` to read.

    Returns
    -------
    Bytes of the file.
    """
    check_suffix(path)
    model = unwrapped(model)
    sparse = {
        name: module.weight_shape for name, module in model.named_modules() if isinstance(module, SparseLayer)
    }
    semi = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight.data).__name__.startswith("SparseSemi")
    ]
    state = model.state_dict()
    for name in semi:
        state[f"{name}.weight"] = state[f"{name}.weight"].to_dense()
    header = {EXPORT: json.dumps({"sparse": sparse, "semi_structured": semi})}
    packed = pack_state(state, None, header)
    write_whole(Path(path), packed.write)
    return packed.stored


def load_export(model: nn.Module, path: str | Path) -> nn.Module:
    """A copy of a network with the weights, and in the form, of a file that `save_export` wrote.

    Layers become sparse, or narrower, as the file's are. Any other file of weights that fits is read, too.

    Parameters
    ----------
    model:
        The network that was pruned, with any weights; it stays as it is.
    path:
        Of the file. Nothing in it is executed.
    """
    path = Path(path)
    saved = read(path)
    tensors = saved.tensors
    exported = copied(unwrapped(model))
    try:
        sparse, semi_structured = exported_in(saved.metadata)
        forms = {f"{name}.weight": torch.empty(shape, device="meta") for name, shape in sparse.items()}
        _fit(exported, {**tensors, **forms})
        for name in sparse:
            layer = layer_named(exported, name)
            parts = {part: tensors[f"{name}.{part}"] for part in SPARSE_PARTS}
            exported.set_submodule(name, sparse_from(layer, parts))
        exported.load_state_dict(tensors)
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        told = f"{error.args[0]} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise unreadable(path, f"{EXPECTED} of this {type(model).__name__}", ValueError(told)) from error
    return to_semi_structured(exported, semi_structured) if semi_structured else exported


def _fit(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make modules as narrow as their tensors are; what can't be made so is left to `load_state_dict` to refuse."""
    for name, module in model.named_modules():
        held: dict[str, Any] = {**module._parameters, **module._buffers}
        for key, old in held.items():
            new = tensors.get(full_name(name, key))
            if old is None or new is None or old.shape == new.shape or old.ndim != new.ndim:
                continue
            if any(n > o for n, o in zip(new.shape, old.shape, strict=True)):
                raise WoodfisherError(f"{full_name(name, key)} is larger in the file than in the network")
            empty = torch.empty(new.shape, dtype=old.dtype, device=old.device)
            setattr(
                module,
                key,
                nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty,
            )
        _count(module)


def _count(module: nn.Module) -> None:
    """Set the numbers of channels that a layer knows to those of its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.RNNBase):
        module.input_size = module.get_parameter("weight_ih_l0").shape[1]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, _ConvNd):
        outputs, inputs = module.weight.shape[:2]
        if module.transposed:
            outputs, inputs = inputs, outputs
        if module.groups > 1 and module.groups == module.in_channels == module.out_channels:
            module.groups = outputs
        module.out_channels, module.in_channels = outputs, inputs * module.groups
    elif isinstance(module, _NormBase):
        held = module.running_mean if module.weight is None else module.weight
        if held is not None:
            module.num_features = len(held)
