"""What a model as it is returns for an example, as tensors, and how far apart the outputs of two models are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from woodfisher.errors import WoodfisherError
from woodfisher.gradients.forward import arguments_of, explained

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn


def outputs_of(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The tensors that a model returns for these inputs, without gradients; raises where there are none."""
    with torch.no_grad():
        found = list(called(model, example_inputs))
    if not found:
        raise WoodfisherError(
            "the model returns no tensors, so that its outputs can't be compared: return them alone, or in a tuple, a "
            "list, a dict or the attributes of an object."
        )
    return found


def called(model: nn.Module, example_inputs: Any) -> Iterator[Tensor]:
    """What a model returns for these inputs, as the tensors in it; caches and the like are passed over."""
    batch = (example_inputs, ())
    arguments, named = arguments_of(batch)
    with explained(batch):
        outputs = model(*arguments, **named)
    plain = not isinstance(outputs, (Tensor, Mapping, tuple, list)) and not is_dataclass(outputs)
    if plain and hasattr(outputs, "__dict__"):
        outputs = vars(outputs)
    return _tensors_in(outputs)


def _tensors_in(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif is_dataclass(outputs) and not isinstance(outputs, Mapping):
        for each in fields(outputs):
            yield from _tensors_in(getattr(outputs, each.name))
    elif isinstance(outputs, (Mapping, tuple, list)):
        for part in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from _tensors_in(part)


def difference(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference of any output, as a fraction of the largest wanted value; infinity where shapes differ."""
    if [each.shape for each in outputs] != [each.shape for each in wanted]:
        return math.inf
    apart = [
        (float((a - b).abs().max()), float(b.abs().max()))
        for a, b in zip(map(_exact, outputs), map(_exact, wanted), strict=True)
        if b.numel()
    ]
    return max((_relative(gap, scale) for gap, scale in apart), default=0.0)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)


def _relative(gap: float, scale: float) -> float:
    """0 for no gap, infinity for one that is no number, or that is beside outputs that are all zero."""
    if gap == 0:
        return 0.0
    return gap / scale if scale and math.isfinite(gap) else math.inf
