"""Products of which a triangle is all there is to compute: symmetric ones, and those by a triangular matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.memory import Scratch


def _strips(rows: int) -> list[slice]:
    """Five strips of rows of a lower triangle: a product by them skips two fifths of the work, all above it."""
    height = max(-(-rows // 5), 32)
    return [slice(first, min(first + height, rows)) for first in range(0, rows, height)]


def gram_triangles(G: Tensor, out: Tensor) -> Tensor:
    """Write the lower triangles of GGᵀ `(count, N, N)`, and some of what is above, to `out`."""
    for strip in _strips(G.shape[1]):
        torch.bmm(G[:, strip], G[:, : strip.stop].mT, out=out[:, strip, : strip.stop])
    return out


def full_gram(G: Tensor) -> Tensor:
    """All of GGᵀ, multiplied in the dtype of G: `(N, d)` → float64 `(N, N)`."""
    return mirrored(gram_triangles(G[None], G.new_empty(1, len(G), len(G)))[0].double())


def mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix of which this is the lower triangle, whatever stands above."""
    return lower.tril() + lower.tril(-1).mT


def column_energies(G: Tensor, scratch: Scratch, lower: Tensor | None = None) -> Tensor:
    """Column sums of squares of G, or of LG for lower triangular L: `(count, N, B)`, `(count, N, N)` → `(count, B)`."""
    count, N, B = G.shape
    total = torch.zeros(count, B, dtype=G.dtype, device=G.device)
    for strip in _strips(N):
        part = scratch("a strip", (count, len(range(N)[strip]), B), G.dtype)
        if lower is None:
            torch.square(G[:, strip], out=part)
        else:
            torch.bmm(lower[:, strip, : strip.stop], G[:, : strip.stop], out=part).square_()
        total += part.sum(1)
    return total
