"""The bitmask form of a sparse tensor: one bit a weight, and the values of the kept ones.

It is the format `sparse_bitmask` of the compressed-tensors package (0.13, the last release that reads and writes it):
for a weight of shape `(rows, columns)` the parts

- `shape`: int64 `(2,)`, rows and columns;
- `bitmask`: uint8 `(rows, ⌈columns / 8⌉)`, one bit a weight, the lowest of a byte first, 1 where it is kept;
- `compressed`: the values of the kept weights `(kept,)`, row by row, in the weight's own dtype;
- `row_offsets`: int64 `(rows,)`, where each row begins in `compressed`.

Here the bits say what is kept, so that a kept weight that happens to be zero stays a kept one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

PARTS = ("shape", "compressed", "bitmask", "row_offsets")


def pack(weight: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """The parts of a weight, of which `kept` (bool, of its shape) says what stays.

    Kernels are laid out as one row: a padded byte and an offset for every three weights would take more room than the
    weights.
    """
    if weight.ndim > 2:
        weight, kept = weight.reshape(1, -1), kept.reshape(1, -1)
    return {
        "shape": torch.tensor(weight.shape),
        "compressed": weight[kept],
        "bitmask": torch.from_numpy(np.packbits(kept.numpy(), axis=-1, bitorder="little")),
        "row_offsets": _offsets(kept),
    }


def unpack(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The dense weight, +0 where nothing is kept, and what is kept; ValueError if the parts contradict each other."""
    missing = [part for part in PARTS if part not in parts]
    if missing:
        raise ValueError(f"its {' and '.join(missing)} is missing")
    shape, values, bitmask = _shape(parts["shape"]), parts["compressed"], parts["bitmask"]
    expected = (*shape[:-1], -(-shape[-1] // 8))
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != expected:
        raise ValueError(
            f"its bitmask must be uint8 of shape {expected}; {bitmask.dtype} of {tuple(bitmask.shape)} came"
        )
    unpacked = np.unpackbits(bitmask.numpy(), axis=-1, bitorder="little")
    kept = torch.from_numpy(unpacked[..., : shape[-1]].astype(bool)).reshape(shape)
    if unpacked[..., shape[-1] :].any():
        raise ValueError("its bitmask has bits beyond the end of a row")
    if values.ndim != 1 or len(values) != int(kept.sum()):
        raise ValueError(
            f"its bitmask keeps {int(kept.sum())} weights, and values of shape {tuple(values.shape)} came"
        )
    if not torch.equal(parts["row_offsets"], _offsets(kept)):
        raise ValueError("its row_offsets are not those of its bitmask")
    weight = torch.zeros(shape, dtype=values.dtype)
    bits(weight)[kept] = bits(values)  # torch can't put values of every dtype into their places
    return weight, kept


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes as whole numbers of its shape, which share its memory; those of −0 are not 0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])


def _shape(stored: Tensor) -> tuple[int, ...]:
    if stored.dtype != torch.int64 or stored.ndim != 1 or not len(stored) or bool((stored < 0).any()):
        raise ValueError(
            "its shape must be whole numbers, at least one and none below 0; "
            f"{stored.dtype} {stored.flatten()[:8].tolist()} came"
        )
    return tuple(stored.tolist())


def _offsets(kept: Tensor) -> Tensor:
    counts = kept.sum(dim=-1)
    return counts.cumsum(0) - counts
