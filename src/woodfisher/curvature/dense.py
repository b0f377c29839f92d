"""Small dense blocks, factored in batches: the primal form of the Fisher and exact Hessians."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from woodfisher.curvature.base import InverseOperator, energies_by_submatrices, kept_first, spans
from woodfisher.curvature.rows import block_rows
from woodfisher.errors import IndefiniteError, WoodfisherError

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.curvature.rows import Rows

_LEAF = 64


def cholesky(matrix: Tensor, what: str) -> Tensor:
    """L of LLᵀ for a batch of matrices `(count, n, n)`, whose lower triangles are read; the rest may be anything.

    Raises `IndefiniteError`, which says by how much, where one is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    failed = info.nonzero()
    if len(failed):
        if not matrix[failed[0, 0]].tril().isfinite().all():
            raise WoodfisherError(
                f"{what} holds NaN or infinity: gradients are not finite, or their products are not. Divide the loss "
                "by what brings them near 1."
            )
        smallest = float(torch.linalg.eigvalsh(matrix[failed[0, 0]])[0])
        raise IndefiniteError(
            f"{what} is not positive definite: its smallest eigenvalue, damping included, is {smallest:.3g} "
            f"({len(failed)} of {len(matrix)} blocks fail). Raise the damping by more than {abs(smallest):.3g}."
        )
    return factor


def triangular_inverse(lower: Tensor, out: Tensor | None = None) -> Tensor:
    """L⁻¹ for a batch of lower triangular `(count, n, n)`, by halves: matrix products but for the leaves."""
    out = torch.empty_like(lower) if out is None else out
    n = lower.shape[-1]
    if n <= _LEAF:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device).expand_as(lower)
        return out.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
    half = n // 2
    top = triangular_inverse(lower[:, :half, :half], out[:, :half, :half])
    bottom = triangular_inverse(lower[:, half:, half:], out[:, half:, half:])
    out[:, :half, half:] = 0
    corner = out[:, half:, :half]
    torch.baddbmm(corner, bottom, lower[:, half:, :half] @ top, beta=0, alpha=-1, out=corner)
    return out


class DenseInverse(InverseOperator):
    """Inverses of `count` dense blocks of `B` weights each, through F = LLᵀ.

    Parameters
    ----------
    matrix:
        The blocks of F, damping included, symmetric, `(count, B, B)`.
    what:
        What the matrix is, for the message where it isn't positive definite.
    damping:
        λ that is in it, if one is.
    """

    def __init__(self, matrix: Tensor, what: str, damping: float | None = None) -> None:
        self._factor = cholesky(matrix.double(), what)
        self._what, self.damping = what, damping
        self._shape = tuple(matrix.shape)
        self.size = matrix.shape[0] * matrix.shape[1]
        self.device = matrix.device

    def _blocked(self, V: Tensor) -> Tensor:
        return V.reshape(*self._shape[:2], -1)

    def _inverse_product(self, V: Tensor) -> Tensor:
        return torch.cholesky_solve(self._blocked(V), self._factor).reshape(V.shape)

    def _forward_product(self, V: Tensor) -> Tensor:
        return (self._factor @ (self._factor.mT @ self._blocked(V))).reshape(V.shape)

    def _diagonal(self) -> Tensor:
        out = torch.empty(self._shape[:2], dtype=torch.float64, device=self.device)
        for blocks in self._batches:
            out[blocks] = triangular_inverse(self._factor[blocks]).square().sum(1)
        return out.flatten()

    @property
    def _batches(self) -> list[slice]:
        return spans(self._shape[0], 8 * self._shape[1] ** 2)

    def _submatrices(self, index: Tensor) -> Tensor:
        B = self._shape[1]
        block, column = index // B, index % B
        same = block[:, :, None] == block[:, None, :]
        out = torch.zeros(*same.shape, dtype=torch.float64, device=self.device)
        for blocks in self._batches:
            inside = (block >= blocks.start) & (block < blocks.stop)
            groups = inside.any(dim=1).nonzero().squeeze(1)
            if len(groups):
                inverse = torch.cholesky_inverse(self._factor[blocks])
                local = (block[groups] - blocks.start).clamp(0, len(inverse) - 1)
                entries = inverse[local[:, :, None], column[groups, :, None], column[groups, None, :]]
                out[groups] += entries * (inside[groups, :, None] & same[groups])
        return out

    def _energies(self, index: Tensor, w: Tensor, inside: Tensor) -> Tensor:
        return energies_by_submatrices(self, index, w, inside)

    def _restricted_solve(self, keep: Tensor, b: Tensor) -> Tensor:
        mask = keep.reshape(self._shape[:2])
        b = b.reshape(*mask.shape, 1)
        out = torch.zeros_like(b)
        for blocks in self._batches:
            kept, own = (t[..., None] for t in kept_first(mask[blocks]))
            L = torch.take_along_dim(self._factor[blocks], own, 1) * kept
            F = L @ L.mT
            F.diagonal(dim1=1, dim2=2).add_(~kept[..., 0])
            solved = torch.cholesky_solve(torch.take_along_dim(b[blocks], own, 1), cholesky(F, self._what))
            out[blocks] = out[blocks].scatter(1, own, solved * kept)
        return out.flatten()


def primal_blocks(rows: Rows, count: int, damping: float, divisor: float) -> DenseInverse:
    """Inverses of `count` blocks F = λI + GᵀG/n factored as they are: the primal form, for N ≥ B."""
    B = rows.size // count
    F = torch.empty(count, B, B, dtype=torch.float64, device=rows.device)
    for blocks in spans(count, 8 * rows.count * B):
        G = block_rows(rows, B, blocks, slice(0, B)).to(torch.float64, memory_format=torch.contiguous_format)
        F[blocks] = G.mT @ G
    F /= divisor
    F.diagonal(dim1=1, dim2=2).add_(damping)
    return DenseInverse(F, "a block of the damped Fisher", damping)
