"""Which pattern a mask shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = ((16, 16), (8, 8), (4, 4), (1, 16), (16, 1), (1, 8), (8, 1), (1, 4), (4, 1))
"""Outputs × inputs of the blocks that are looked for, the largest first."""

SETS = (4, 8, 16)
"""M of the N:M that is looked for; 1:2 is seen as 2:4."""

NEARLY = 0.95
"""Share of what N:M permits that has to be there: N or fewer of M are left by chance of any sparse weight."""


def structure_of(kept: Tensor) -> str:
    """Name the pattern of a mask (bool, False where removed), outputs first and inputs second.

    `dense`, `empty`, `channels` (whole outputs), `input channels`, `N:M` along the inputs, blocks as in `4x4`, or
    `unstructured`: the first that holds. What holds may do so by chance in small or very sparse weights.
    """
    if kept.all():
        return "dense"
    if not kept.any():
        return "empty"
    kept = kept.reshape(*(*kept.shape, 1)[:2], -1)
    if is_blocked(kept, 1, kept[0].numel(), positions=True):
        return "channels"
    if kept.shape[1] > 1 and is_blocked(kept.transpose(0, 1), 1, len(kept) * kept.shape[2], positions=True):
        return "input channels"
    for outputs, inputs in BLOCKS:
        if is_blocked(kept, outputs, inputs):
            return f"{outputs}x{inputs}"
    for m in SETS:
        if kept.shape[1] % m == 0:
            counts = _sets(kept, m)
            n = int(counts.max())
            if n < m and counts.float().mean() >= NEARLY * n:
                return f"{n}:{m}"
    return "unstructured"


def is_blocked(kept: Tensor, outputs: int, inputs: int, *, positions: bool = False) -> bool:
    """Whether tiles of `outputs × inputs` neighbours of a mask are kept or removed as a whole.

    The mask is bool `(outputs, inputs)` or `(outputs, inputs, positions)`, with a tile at each position, or of all
    positions together.
    """
    kept = kept.flatten(1)[..., None] if positions else kept.reshape(*kept.shape[:2], -1)
    rows, columns, _ = kept.shape
    if rows % outputs or columns % inputs:
        return False
    tiles = kept.reshape(rows // outputs, outputs, columns // inputs, inputs, -1)
    return bool((tiles.all(3).all(1) == tiles.any(3).any(1)).all())


def fits(kept: Tensor, n: int, m: int) -> bool:
    """Whether there are m neighbours along the inputs, and at most n of every m are kept."""
    if kept.ndim < 2 or not kept.numel() or kept.shape[1] % m:
        return False
    return int(_sets(kept, m).max()) <= n


def _sets(kept: Tensor, m: int) -> Tensor:
    """How many are kept in each set of m neighbours along the inputs."""
    return kept.reshape(len(kept), kept.shape[1] // m, m, -1).sum(2)
