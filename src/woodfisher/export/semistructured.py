"""2:4 on NVIDIA GPUs, by `torch.sparse.to_sparse_semi_structured`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from woodfisher.errors import WoodfisherError
from woodfisher.gradients.isolation import copied
from woodfisher.gradients.parameters import unwrapped
from woodfisher.saving.structure import fits

if TYPE_CHECKING:
    from collections.abc import Iterable


def semi_structured_layers(model: nn.Module) -> list[str]:
    """Names of the Linear layers that have at most two weights left of every four neighbours along the inputs."""
    return [
        name
        for name, module in unwrapped(model).named_modules()
        if type(module) is nn.Linear and fits(module.weight != 0, 2, 4)
    ]


def to_semi_structured(model: nn.Module, layers: Iterable[str] | None = None) -> nn.Module:
    """A copy of a 2:4-pruned model, for inference on a GPU, whose Linear weights are in the 2:4 form.

    Parameters
    ----------
    model:
        On a CUDA device of compute capability 8.0 or more, in float16 or bfloat16 (say); it stays as it is.
    layers:
        Names of Linear layers; by default all that are 2:4 (`semi_structured_layers`).
    """
    names = semi_structured_layers(model) if layers is None else list(layers)
    if not names:
        raise WoodfisherError(
            "no Linear layer of the model is 2:4: prune it with pattern=wf.NM(2, 4) (--pattern 2:4)."
        )
    device = next(unwrapped(model).parameters()).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise WoodfisherError(
            f"2:4 runs on NVIDIA GPUs of compute capability 8.0 or more, and the model is on {device.type}: move it "
            "to such a GPU (--device cuda), or take another format."
        )
    sparse = copied(unwrapped(model))
    for name in names:
        layer = sparse.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        try:
            weight = to_sparse_semi_structured(layer.weight.detach())
        except (RuntimeError, ValueError) as error:
            raise WoodfisherError(f"torch can't take the weight of {name!r} as 2:4: {error}") from error
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return sparse
