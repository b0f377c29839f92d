"""The empirical Fisher of few rows in large blocks, through its Gram matrices: the dual form (docs/method.md §3)."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from woodfisher.curvature.base import (
    InverseOperator,
    energies,
    energies_by_submatrices,
    kept_first,
    pieces,
    spans,
)
from woodfisher.curvature.dense import cholesky, triangular_inverse
from woodfisher.curvature.rows import HeldRows, block_rows
from woodfisher.memory import Scratch
from woodfisher.triangles import column_energies, gram_triangles
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from woodfisher.curvature.rows import Rows

SINGLE_TOLERANCE = 2e-4
"""Largest relative uncertainty of a diagonal entry that float32 products may leave."""

_LOST = 1e-3
"""Share of a product with F⁻¹ that rounding in float64 may take before it is told."""

LEAST_SCALE = 1e-30
"""nλ below which squares of float32 rows that matter beside it may be too small for float32."""


def ratios(G: Tensor, scale: float, scratch: Scratch) -> Tensor:
    """x_i = ‖g_i‖²/(nλ), with nλ = `scale`: float64 `(count, B)`."""
    return column_energies(G, scratch).double() / scale


def unexplained(lower: Tensor, G: Tensor, x: Tensor, scratch: Scratch) -> Tensor:
    """1 − ‖v_i‖² with V = L⁻¹G, from products in G's dtype: float64 `(count, B)`.

    The exact difference is at least 1/(1 + x_i): that bound keeps it positive.
    """
    return torch.maximum(1 - column_energies(G, scratch, lower.to(G.dtype)).double(), 1 / (1 + x))


def uncertainty(G: Tensor, x: Tensor) -> Tensor:
    """How far rounding of float32 products may move that: about 2u√x_i."""
    return x.sqrt() * roundoff(G.device)


def roundoff(device: torch.device) -> float:
    """2u of a float32 product as torch is set: TF32 has ten bits behind the leading one, and bfloat16 seven."""
    return {"tf32": 2.0**-10, "bf16": 2.0**-7}.get(multiplied_in(device), torch.finfo(torch.float32).eps)


def multiplied_in(device: torch.device) -> str:
    """What torch is set to multiply float32 matrices in: `float32`, or less, `tf32` on a GPU or `bf16` on a CPU."""
    backend, lowest = (
        (torch.backends.cuda, "tf32") if device.type == "cuda" else (torch.backends.mkldnn, "bf16")
    )
    if hasattr(backend, "matmul") and hasattr(backend.matmul, "fp32_precision"):  # torch 2.9
        allowed = str(backend.matmul.fp32_precision)
    else:
        allowed = {"highest": "ieee", "high": "tf32", "medium": lowest}[torch.get_float32_matmul_precision()]
    return lowest if allowed == lowest else "float32"


class LowRankInverse(InverseOperator):
    """Inverses of `count` blocks λI + GᵀG/n through their N×N Gram matrices: the dual form, for N < B.

    With K = nλI + GGᵀ = LLᵀ and V = L⁻¹G the inverse is (I − VᵀV)/λ. Only L⁻¹ is held; the rows are read, and V
    exists, a piece at a time.

    Parameters
    ----------
    rows:
        Gradient rows of the run, `(N, count · B)`.
    count:
        Blocks in the run.
    damping:
        λ > 0.
    divisor:
        n: the number of rows, divided by the samples that each row averages.
    """

    damping: float

    def __init__(self, rows: Rows, count: int, damping: float, divisor: float) -> None:
        self._rows = rows
        self.size, self.device = rows.size, rows.device
        self.damping, self.divisor = damping, divisor
        self._products = torch.float64
        self._shape = (count, rows.count, rows.size // count)

    @classmethod
    def of_gram(cls, rows: Tensor, gram: Tensor, damping: float, divisor: float) -> LowRankInverse:
        """One block of `rows` `(N, B)` whose GGᵀ is known, float64 `(N, N)`; products with rows are in their own dtype.

        That reads the rows once. It is for steps that are checked afterwards: at small damping they lose the digits
        that float64 keeps.
        """
        made = cls(HeldRows(rows), 1, damping, divisor)
        made._products = rows.dtype
        made._factor = made._inverted(gram[None].clone())
        return made

    @cached_property
    def _factor(self) -> Tensor:
        """L⁻¹, which products with the curvature itself and solves on kept weights alone don't need."""
        return self._factored(None)

    def _piece(self, blocks: slice, columns: slice) -> Tensor:
        piece = block_rows(self._rows, self._shape[2], blocks, columns)
        if piece.dtype == self._products:
            return piece
        return piece.to(self._products, memory_format=torch.contiguous_format)

    def _factored(self, keep: Tensor | None) -> Tensor:
        """L⁻¹ of K = nλI + GGᵀ = LLᵀ, with only the columns in `keep` `(count, 1, B)` counted if given."""
        count, N, B = self._shape
        factor = torch.empty(count, N, N, dtype=torch.float64, device=self.device)
        for group in spans(count, 8 * N * max(B, 3 * N)):
            K = factor[group].zero_()
            for inside, cut in pieces(group.stop - group.start, N, B):
                blocks = slice(group.start + inside.start, group.start + inside.stop)
                for columns in cut:
                    G = block_rows(self._rows, B, blocks, columns)
                    if keep is not None:
                        kept, order = kept_first(keep[blocks, :, columns])
                        G = torch.take_along_dim(G, order, 2) * kept
                    G = G.to(torch.float64, memory_format=torch.contiguous_format)
                    if columns.start == 0:
                        gram_triangles(G, K[inside])
                    else:
                        K[inside] += gram_triangles(G, torch.empty_like(K[inside]))
            self._tell_what_is_lost(K)
            factor[group] = self._inverted(K)
        return factor

    def _tell_what_is_lost(self, gram: Tensor) -> None:
        """Warn where I − VᵀV cancels: 1 − ‖v‖² may be as small as nλ beside the largest entry of GGᵀ."""
        largest = float(gram.diagonal(dim1=1, dim2=2).max())
        lost = torch.finfo(gram.dtype).eps * largest / (self.divisor * self.damping)
        if lost > _LOST:
            warn(
                f"a damping of {self.damping:.3g} is so small beside the curvature that products with F⁻¹ are wrong by "
                f"a share of {lost:.1g} or more: raise it."
            )

    def _inverted(self, gram: Tensor) -> Tensor:
        """The same from GGᵀ, which becomes K."""
        gram.diagonal(dim1=1, dim2=2).add_(self.divisor * self.damping)
        return triangular_inverse(cholesky(gram, "the Gram matrix of a block's gradient rows"))

    def _blocked(self, V: Tensor) -> Tensor:
        return V.reshape(self._shape[0], self._shape[2], -1)

    def _correct(self, V: Tensor, factor: Tensor) -> Tensor:
        """(V − Gᵀ K⁻¹ G V)/λ a block, with K⁻¹ = L⁻ᵀL⁻¹."""
        V = self._blocked(V)
        through = self._through_rows(V, lambda blocks, Y: factor[blocks].mT @ (factor[blocks] @ Y))
        return through.neg_().add_(V).div_(self.damping)

    def _through_rows(self, V: Tensor, inner: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """Gᵀ inner(GV) a block, `(count, B, k)`; rows of blocks that are a piece are read once."""
        out = torch.empty_like(V)
        for blocks, cut in pieces(*self._shape):
            Y = torch.zeros(1, dtype=torch.float64, device=self.device)
            for columns in cut:
                G = self._piece(blocks, columns)
                Y = Y + G @ V[blocks, columns].to(self._products)
            Y = inner(blocks, Y).to(self._products)
            for columns in cut:
                if len(cut) > 1:
                    G = self._piece(blocks, columns)
                out[blocks, columns] = (G.mT @ Y).to(out)
        return out

    def _inverse_product(self, V: Tensor) -> Tensor:
        return self._correct(V, self._factor).reshape(V.shape)

    def _forward_product(self, V: Tensor) -> Tensor:
        through = self._through_rows(self._blocked(V), lambda _, Y: Y / self.divisor)
        return through.reshape(V.shape).add_(V, alpha=self.damping)

    def _diagonal(self) -> Tensor:
        out = torch.empty(self._shape[0], self._shape[2], dtype=torch.float64, device=self.device)
        scratch = Scratch(self.device)
        for blocks, cut in pieces(*self._shape):
            for columns in cut:
                out[blocks, columns] = self._unexplained(blocks, columns, scratch)
        return out.div_(self.damping).flatten()

    def _unexplained(self, blocks: slice, columns: slice, scratch: Scratch) -> Tensor:
        """1 − ‖v_i‖² for a piece, from float32 products where rounding leaves it certain enough, else float64."""
        G, scale = block_rows(self._rows, self._shape[2], blocks, columns), self.divisor * self.damping
        if scale < LEAST_SCALE:
            G = G.double()
        factor, x = self._factor[blocks], ratios(G, scale, scratch)
        if G.dtype == torch.float32:
            uncertain = uncertainty(G, x)
            if uncertain.max() <= SINGLE_TOLERANCE:
                left = unexplained(factor, G, x, scratch)
                if (uncertain <= SINGLE_TOLERANCE * left).all():
                    return left
        return unexplained(factor, G.double(), x, scratch)

    def _submatrices(self, index: Tensor) -> Tensor:
        _, N, B = self._shape
        out = torch.empty(*index.shape, index.shape[1], dtype=torch.float64, device=self.device)
        for span in spans(len(index), 8 * N * index.shape[1]):
            groups = index[span]
            block = groups // B
            V = torch.empty(*groups.shape, N, dtype=torch.float64, device=self.device)
            for b in block.unique():
                here = block == b
                V[here] = (self._factor[b] @ self._rows.select(groups[here]).double()).mT
            same_weight = groups[:, :, None] == groups[:, None, :]
            same_block = block[:, :, None] == block[:, None, :]
            out[span] = (same_weight.double() - V @ V.mT) * same_block
        return out.div_(self.damping)

    def _energies(self, index: Tensor, w: Tensor, inside: Tensor) -> Tensor:
        """By Woodbury once more, ([F⁻¹]_QQ)⁻¹ = λ(I + VᵀCV) with C = (I − VVᵀ)⁻¹ and V the columns Q of L⁻¹G."""
        _, N, B = self._shape
        if index.shape[1] <= N:
            return energies_by_submatrices(self, index, w, inside)
        block = index // B
        found = (w.square() * inside).sum(1)
        eye = torch.eye(N, dtype=torch.float64, device=self.device)
        for b in block[inside].unique():
            here = inside & (block == b)
            among = here.any(1).nonzero().squeeze(1)
            most = int(here[among].sum(1).max())
            for span in spans(len(among), 16 * N * (most + N)):
                groups = among[span]
                there, order = kept_first(here[groups])
                own = index[groups].gather(1, order)
                G = self._rows.select(own.flatten()).double().unflatten(1, own.shape).movedim(1, 0)
                V = self._factor[b] @ (G * there[:, None])
                pull = V @ (w[groups].gather(1, order) * there)[..., None]
                found[groups] += energies(eye - V @ V.mT, pull, index[groups])
        return found * self.damping

    def _restricted_solve(self, keep: Tensor, b: Tensor) -> Tensor:
        mask = self._blocked(keep).mT
        factor = self._factored(mask)
        b = torch.where(keep, b, 0)
        return torch.where(keep, self._correct(b, factor).flatten(), 0)
