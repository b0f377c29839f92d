"""Blocks of the empirical Fisher that are factored when they are needed, and no more precisely than that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from woodfisher.curvature.base import InverseOperator, spans
from woodfisher.curvature.dense import primal_blocks, triangular_inverse
from woodfisher.curvature.lowrank import (
    LEAST_SCALE,
    SINGLE_TOLERANCE,
    LowRankInverse,
    ratios,
    roundoff,
    uncertainty,
    unexplained,
)
from woodfisher.curvature.rows import block_rows
from woodfisher.memory import Scratch
from woodfisher.triangles import column_energies, gram_triangles

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.curvature.rows import Rows


def operations(rows: int, block: int, weights: int) -> float:
    """Floating-point operations that factoring and scoring are counted as, whatever a kernel performs.

    Dual, for N < B: 3N²d, a full product GGᵀ and a triangular one L⁻¹G; the factors, 2N³/3 a block, are left out.
    Primal: 2NBd + ⅔B²d, a full product GᵀG, the Cholesky factor and its inverse.
    """
    return (3 * rows**2 if rows < block else 2 * rows * block + 2 * block**2 / 3) * weights


class FisherBlocks(InverseOperator):
    """Inverses of `count` blocks F = λI + GᵀG/n out of gradient rows, in the dual form for N < B, else the primal.

    Products need float64 factors, which are made at the first one. The diagonal alone is taken in float32 where a
    bound on what rounding does to it allows that, at half the cost, and holds nothing.

    Parameters
    ----------
    rows:
        Gradient rows of the blocks, `(N, count · B)`.
    count:
        Blocks.
    damping:
        λ > 0.
    divisor:
        n: the number of rows, divided by the samples that each row averages.
    hold:
        Keep the factors, 8 · min(N, B)² bytes a block, once they are made; else make them anew each time.
    """

    damping: float

    def __init__(self, rows: Rows, count: int, damping: float, divisor: float, *, hold: bool = True) -> None:
        self._rows, self._count = rows, count
        self.damping, self.divisor = damping, divisor
        self.size, self.device = rows.size, rows.device
        self._block = rows.size // count
        self._hold = hold
        self._held: InverseOperator | None = None

    @property
    def _exact(self) -> InverseOperator:
        """The operator in float64."""
        if self._held is not None:
            return self._held
        made = self._of(slice(0, self._count))
        if self._hold:
            self._held = made
        return made

    def _of(self, blocks: slice) -> InverseOperator:
        rows = self._rows.part(slice(blocks.start * self._block, blocks.stop * self._block))
        make = LowRankInverse if self._block > rows.count else primal_blocks
        return make(rows, blocks.stop - blocks.start, self.damping, self.divisor)

    def _inverse_product(self, V: Tensor) -> Tensor:
        return self._exact._inverse_product(V)

    def _forward_product(self, V: Tensor) -> Tensor:
        return self._exact._forward_product(V)

    def _submatrices(self, index: Tensor) -> Tensor:
        return self._exact._submatrices(index)

    def _energies(self, index: Tensor, w: Tensor, inside: Tensor) -> Tensor:
        return self._exact._energies(index, w, inside)

    def _restricted_solve(self, keep: Tensor, b: Tensor) -> Tensor:
        return self._exact._restricted_solve(keep, b)

    def _read(self, blocks: slice, columns: slice) -> Tensor:
        return block_rows(self._rows, self._block, blocks, columns)

    def _diagonal(self) -> Tensor:
        single = self._rows.dtype == torch.float32 and self.divisor * self.damping >= LEAST_SCALE
        if self._held is not None or not single:
            return self._exact._diagonal()
        quick = self._dual if self._block > self._rows.count else self._primal
        out = torch.empty(self._count, self._block, dtype=torch.float64, device=self.device)
        sound = torch.empty(self._count, dtype=torch.bool, device=self.device)
        groups = spans(
            self._count, self._rows.dtype.itemsize * self._rows.count * self._block, by_threads=True
        )
        scratch = Scratch(self.device)
        for blocks in groups:
            out[blocks], sound[blocks] = quick(blocks, scratch)
            if blocks.start == 0 and not bool(sound[blocks].any()):
                return self._exact._diagonal()
        unsound = (~sound).cpu()
        for blocks in groups:
            again = unsound[blocks].nonzero()
            if len(again):
                these = slice(blocks.start + int(again[0]), blocks.start + int(again[-1]) + 1)
                out[these] = self._of(these)._diagonal().reshape(-1, self._block)
        return out.flatten()

    def _dual(self, blocks: slice, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """Diagonals in float32, with K added up and factored in float64, and which of them rounding leaves sound."""
        N, count = self._rows.count, blocks.stop - blocks.start
        cut = spans(self._block, self._rows.dtype.itemsize * N * count)
        product = scratch("a product", (count, N, N), self._rows.dtype)
        K = scratch("K", (count, N, N), torch.float64)
        for columns in cut:
            gram_triangles(self._read(blocks, columns), product)
            if columns.start == 0:
                K.copy_(product)
            else:
                K += product
        scale = self.divisor * self.damping
        factor, _, rounding = _factored(K, scale, scratch)
        lower = product.copy_(factor)
        out = torch.empty(count, self._block, dtype=torch.float64, device=self.device)
        sound = rounding.isfinite()
        for columns in cut:
            G = self._read(blocks, columns)
            x = ratios(G, scale, scratch)
            left = unexplained(lower, G, x, scratch)
            uncertain = uncertainty(G, x) + rounding[:, None] * (1 - left)
            sound &= (uncertain <= SINGLE_TOLERANCE * left).all(1)
            out[:, columns] = left / self.damping
        return out, sound

    def _primal(self, blocks: slice, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """The same from F = λI + GᵀG/n."""
        G = self._read(blocks, slice(0, self._block))
        _, diagonal, rounding = _factored((G.mT @ G).double() / self.divisor, self.damping, scratch)
        return diagonal, rounding <= SINGLE_TOLERANCE


def _factored(gram: Tensor, shift: float, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """L⁻¹ and the inverse's diagonal of K = `gram` + `shift`·I = LLᵀ, a batch, and how far rounding may have moved it.

    With E the rounding of a float32 product, |E_ij| ≤ 2u d_i d_j and d² the diagonal of `gram`, what K⁻¹ is changed
    by relative to itself is at most ‖L⁻¹EL⁻ᵀ‖, and that about 2u Σ d_i² [K⁻¹]_ii, however the rows are scaled. NaN
    where K is not positive definite in float64.

    Returns
    -------
    `(count, n, n)`, `(count, n)` and `(count,)`, float64.
    """
    energies = gram.diagonal(dim1=1, dim2=2).clone()
    gram.diagonal(dim1=1, dim2=2).add_(shift)
    info = torch.empty(len(gram), dtype=torch.int32, device=gram.device)
    factor = scratch("L", gram.shape, gram.dtype).mT
    torch.linalg.cholesky_ex(gram, out=(factor, info))
    inverse = triangular_inverse(factor, scratch("the inverse of L", gram.shape, gram.dtype))
    diagonal = column_energies(inverse, scratch)
    rounding = roundoff(gram.device) * (diagonal * energies).sum(1)
    return inverse, diagonal, torch.where(info == 0, rounding, torch.nan)
