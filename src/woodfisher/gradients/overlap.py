"""Tensors of a model that lie in the same memory, of which torch knows nothing: writing one would change another."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from woodfisher.errors import WoodfisherError
from woodfisher.gradients.sharding import is_shard, local

if TYPE_CHECKING:
    from collections.abc import Collection


def check_apart(model: nn.Module, chosen: Collection[str]) -> None:
    """Raise where an entry of a parameter in `chosen` is also another one of it, or one of another parameter or buffer.

    Such parameters are not tied: a gradient goes to each, as if the others did not move with it.
    """
    parameters = {name: local(p.data) for name, p in model.named_parameters()}
    buffers = {name: buffer for name, buffer in model.named_buffers() if not is_shard(buffer)}
    stored: defaultdict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in {**buffers, **parameters}.items():
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if plain and not tensor.is_nested and tensor.numel():
            stored[tensor.untyped_storage().data_ptr()].append((name, tensor))
    stored.pop(0, None)  # without memory, as on the device meta
    for there in stored.values():
        for name, tensor in there:
            if name in chosen and covers_itself(tensor):
                raise WoodfisherError(
                    f"several entries of {name!r} are one number in memory (expand makes such tensors), so that they "
                    "can't be pruned one by one: give it memory of its own with p.data = p.data.clone()."
                )
        for (one, a), (other, b) in combinations(there, 2):
            if not (one in chosen or other in chosen) or not _overlap(a, b):
                continue
            if one in buffers:
                raise WoodfisherError(
                    f"the buffer {one!r} lies in the memory of {other!r}, so that each changes with the other: "
                    "register a copy of it (clone()), or leave the parameter out with exclude=."
                )
            raise WoodfisherError(
                f"{one!r} and {other!r} are two parameters in the same memory, so that to change one changes the "
                "other: assign one parameter to both modules (b.weight = a.weight), which ties them, or give each "
                "memory of its own with p.data = p.data.clone()."
            )


def covers_itself(tensor: Tensor) -> bool:
    """Whether steps along its dimensions come to the same place."""
    reach = 0
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step <= reach:
            return True
        reach += step * (size - 1)
    return False


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors in one piece of memory have places in common; of two dtypes they count as if."""
    first, second = _bytes(a), _bytes(b)
    if first.stop <= second.start or second.stop <= first.start:
        return False
    return a.dtype != b.dtype or bool(torch.isin(_places(a), _places(b)).any())


def _bytes(tensor: Tensor) -> range:
    start = tensor.storage_offset() * tensor.itemsize
    return range(start, start + _reach(tensor) * tensor.itemsize)


def _places(tensor: Tensor) -> Tensor:
    """Where its entries are, counted from the beginning of the piece."""
    counted = torch.arange(_reach(tensor)).as_strided(tensor.shape, tensor.stride())
    return counted.flatten().add(tensor.storage_offset())


def _reach(tensor: Tensor) -> int:
    """Entries from its first to its last one."""
    return 1 + sum(step * (size - 1) for step, size in zip(tensor.stride(), tensor.shape, strict=True))
