"""The empirical Fisher in blocks, inverted by one factorisation a block (docs/method.md §3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from woodfisher.checks import check_choice, check_count
from woodfisher.curvature.base import (
    WORKSPACE,
    BlockDiagonalInverse,
    Estimator,
    InverseOperator,
    pieces,
    removed_part,
    spans,
)
from woodfisher.curvature.damping import Damping, check_damping, resolve
from woodfisher.curvature.dense import DenseInverse, cholesky, triangular_inverse
from woodfisher.memory import check_memory

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.layout import Run
    from woodfisher.objective import Objective


_SINGLE_TOLERANCE = 2e-4
"""Largest relative uncertainty of a diagonal entry that float32 products may leave."""


def _strips(rows: int) -> list[slice]:
    """Two strips of rows of a lower triangle: a product by them skips a quarter of the work, all above it."""
    half = max(-(-rows // 2), 32)
    return [slice(first, min(first + half, rows)) for first in range(0, rows, half)]


def _gram(G: Tensor, out: Tensor) -> Tensor:
    """Write the lower triangles of GGᵀ `(count, N, N)`, and some of what is above, to `out`."""
    for strip in _strips(G.shape[1]):
        out[:, strip, : strip.stop] = G[:, strip] @ G[:, : strip.stop].mT
    return out


def _energy(lower: Tensor, G: Tensor) -> Tensor:
    """Column sums of squares of LG for lower triangular L: `(count, N, N)`, `(count, N, B)` → `(count, B)`."""
    total = torch.zeros(G.shape[0], G.shape[2], dtype=G.dtype, device=G.device)
    for strip in _strips(G.shape[1]):
        total += (lower[:, strip, : strip.stop] @ G[:, : strip.stop]).square_().sum(1)
    return total


class LowRankInverse(InverseOperator):
    """Inverses of `count` blocks λI + GᵀG/n through their N×N Gram matrices: the dual form, for N < B.

    With K = nλI + GGᵀ = LLᵀ and V = L⁻¹G the inverse is (I − VᵀV)/λ. Only the rows (as they came) and L⁻¹
    are held; V exists a piece at a time.

    Parameters
    ----------
    rows:
        Gradient rows of the run, `(N, count · B)`; kept, not copied.
    count:
        Blocks in the run.
    damping:
        λ > 0.
    divisor:
        n: the number of rows, divided by the samples that each row averages.
    gram:
        GGᵀ, float64 `(count, N, N)`, where the caller has it already.
    single:
        Multiply vectors by the rows in the rows' own dtype, which reads them once, rather than in float64. For
        steps that are checked afterwards: at small damping they lose the digits that float64 keeps.
    """

    damping: float

    def __init__(
        self,
        rows: Tensor,
        count: int,
        damping: float,
        divisor: float,
        *,
        gram: Tensor | None = None,
        single: bool = False,
    ) -> None:
        self.size = rows.shape[1]
        self.device = rows.device
        self.damping, self.divisor = damping, divisor
        self._products = rows.dtype if single else torch.float64
        self._rows = rows.unflatten(1, (count, -1)).transpose(0, 1)
        self._factor = triangular_inverse(self._gram_factor(None) if gram is None else self._damped(gram))

    @property
    def _pieces(self) -> list[tuple[slice, slice]]:
        return list(pieces(*self._rows.shape))

    def _piece(self, blocks: slice, columns: slice) -> Tensor:
        piece = self._rows[blocks, :, columns]
        if piece.dtype == self._products:
            return piece
        return piece.to(self._products, memory_format=torch.contiguous_format)

    def _gram_factor(self, keep: Tensor | None) -> Tensor:
        """L of K = nλI + GGᵀ, with only the columns in `keep` `(count, 1, B)` counted if given."""
        count, N, _ = self._rows.shape
        K = torch.empty(count, N, N, dtype=torch.float64, device=self.device)
        for blocks, columns in self._pieces:
            G = self._rows[blocks, :, columns].to(torch.float64, memory_format=torch.contiguous_format)
            if keep is not None:
                G = G * keep[blocks, :, columns]
            if columns.start == 0:
                _gram(G, K[blocks])
            else:
                K[blocks] += _gram(G, torch.empty_like(K[blocks]))
        return self._damped(K)

    def _damped(self, gram: Tensor) -> Tensor:
        K = gram.clone()
        K.diagonal(dim1=1, dim2=2).add_(self.divisor * self.damping)
        return cholesky(K, "the Gram matrix of a block's gradient rows")

    def _blocked(self, V: Tensor) -> Tensor:
        return V.reshape(self._rows.shape[0], self._rows.shape[2], -1)

    def _correct(self, V: Tensor, factor: Tensor) -> Tensor:
        """(V − Gᵀ K⁻¹ G V)/λ a block, with K⁻¹ = L⁻ᵀL⁻¹."""
        V = self._blocked(V)
        Y = self._rows_times(V)
        Y = factor.mT @ (factor @ Y)
        out = torch.empty_like(V)
        for blocks, columns in self._pieces:
            out[blocks, columns] = V[blocks, columns] - self._back(blocks, columns, Y)
        return out.div_(self.damping)

    def _rows_times(self, V: Tensor) -> Tensor:
        """GV a block: `(count, N, k)`."""
        count, N, _ = self._rows.shape
        Y = torch.zeros(count, N, V.shape[2], dtype=torch.float64, device=self.device)
        for blocks, columns in self._pieces:
            Y[blocks] += self._piece(blocks, columns) @ V[blocks, columns].to(self._products)
        return Y

    def _back(self, blocks: slice, columns: slice, Y: Tensor) -> Tensor:
        """GᵀY for a piece."""
        return self._piece(blocks, columns).mT @ Y[blocks].to(self._products)

    def _inverse_product(self, V: Tensor) -> Tensor:
        return self._correct(V, self._factor).reshape(V.shape)

    def _forward_product(self, V: Tensor) -> Tensor:
        B = self._blocked(V)
        Y = self._rows_times(B)
        out = B * self.damping
        for blocks, columns in self._pieces:
            out[blocks, columns] += self._back(blocks, columns, Y) / self.divisor
        return out.reshape(V.shape)

    def _diagonal(self) -> Tensor:
        out = torch.empty(self._rows.shape[0], self._rows.shape[2], dtype=torch.float64, device=self.device)
        for blocks, columns in self._pieces:
            out[blocks, columns] = self._unexplained(blocks, columns)
        return out.div_(self.damping).flatten()

    def _unexplained(self, blocks: slice, columns: slice) -> Tensor:
        """1 − ‖v_i‖² for a piece, from float32 products where their rounding is bounded, else float64.

        With x_i = ‖g_i‖²/(nλ), float32 products leave ‖v_i‖² uncertain by about 2u√x_i, which matters where
        ‖v_i‖² is near one. The exact difference is at least 1/(1 + x_i): that bound keeps it positive.
        """
        G = self._rows[blocks, :, columns]
        factor = self._factor[blocks]
        x = torch.linalg.vector_norm(G, dim=1).double().square_() / (self.divisor * self.damping)
        floor = 1 / (1 + x)
        if G.dtype == torch.float32:
            uncertain = x.sqrt_() * torch.finfo(torch.float32).eps
            if uncertain.max() <= _SINGLE_TOLERANCE:
                left = torch.maximum(1 - _energy(factor.float(), G).double(), floor)
                if (uncertain <= _SINGLE_TOLERANCE * left).all():
                    return left
        return torch.maximum(1 - _energy(factor, G.double()), floor)

    def _submatrices(self, index: Tensor) -> Tensor:
        N, B = self._rows.shape[1:]
        out = torch.empty(*index.shape, index.shape[1], dtype=torch.float64, device=self.device)
        for span in spans(len(index), 8 * N * index.shape[1]):
            groups = index[span]
            block, column = groups // B, groups % B
            V = torch.empty(*groups.shape, N, dtype=torch.float64, device=self.device)
            for b in block.unique():
                here = block == b
                V[here] = (self._factor[b] @ self._rows[b][:, column[here]].double()).mT
            same_weight = groups[:, :, None] == groups[:, None, :]
            same_block = block[:, :, None] == block[:, None, :]
            out[span] = (same_weight.double() - V @ V.mT) * same_block
        return out.div_(self.damping)

    def _restricted_solve(self, keep: Tensor, b: Tensor) -> Tensor:
        mask = self._blocked(keep).mT
        factor = triangular_inverse(self._gram_factor(mask))
        b = torch.where(keep, b, 0)
        return torch.where(keep, self._correct(b, factor).flatten(), 0)


def primal_blocks(rows: Tensor, count: int, damping: float, divisor: float) -> DenseInverse:
    """Inverses of `count` blocks F = λI + GᵀG/n factored as they are: the primal form, for N ≥ B."""
    G = rows.unflatten(1, (count, -1)).transpose(0, 1)
    N, B = G.shape[1:]
    F = torch.zeros(count, B, B, dtype=torch.float64, device=rows.device)
    for blocks in spans(count, 8 * B * B):
        for span in spans(N, 8 * B * (blocks.stop - blocks.start)):
            piece = G[blocks, span].to(torch.float64, memory_format=torch.contiguous_format)
            F[blocks] += piece.mT @ piece
    F /= divisor
    F.diagonal(dim1=1, dim2=2).add_(damping)
    return DenseInverse(F, "a block of the damped Fisher")


@dataclass(frozen=True)
class WoodFisher(Estimator):
    """The empirical Fisher F = λI + (m/N) Σ gₙgₙᵀ in diagonal blocks, inverted exactly (docs/method.md §3).

    Row gₙ is the mean gradient of m samples. The factor m makes the matrix estimate the Fisher of single
    samples whatever m is, so that λ and the first-order term mean the same for every grouping (§2).

    Attributes
    ----------
    samples:
        Samples to take gradients of; N = samples / group rows.
    block_size:
        Most weights in a block; None for one block over all weights. The cost grows with N²d, not with it.
    damping:
        λ > 0 in the units of a squared gradient; `Relative(factor)` for a multiple of the mean diagonal entry of
        F; or `auto`, which chooses λ on held-out rows (`held_out_damping`).
    group:
        m, the samples that a row averages.
    labels:
        `data` for the empirical Fisher, `model` to sample targets from the model's own predictions.
    across_layers:
        Cut blocks across the whole vector instead of inside each layer.

    References
    ----------
    Singh and Alistarh, WoodFisher: Efficient Second-Order Approximation for Neural Network Compression,
    NeurIPS 2020.
    """

    samples: int = 400
    block_size: int | None = 2000
    damping: Damping = 1e-5
    group: int = 1
    labels: Literal["data", "model"] = "data"
    across_layers: bool = False

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        check_count("group", self.group)
        check_count("block_size", self.block_size, or_none="one block over all weights")
        check_damping(self.damping, "or the Fisher of few rows has no inverse")
        check_choice("labels", self.labels, ("data", "model"))

    def __call__(self, objective: Objective) -> BlockDiagonalInverse:
        """Gather the rows of `objective` and factor them.

        Blocks hold kept weights; removed ones have no rows, and F is λ for each of them.
        """
        kept = objective.kept.nonzero().squeeze(1)
        runs = objective.layout.restricted(objective.kept).runs(
            self.block_size, across_layers=self.across_layers
        )
        self._check_memory(objective, len(kept), runs)
        sparse = len(kept) < objective.layout.size
        rows = objective.rows(
            self.samples, group=self.group, labels=self.labels, columns=kept if sparse else None
        )
        N = len(rows)
        damping = resolve(self.damping, rows, self.group)
        parts: list[tuple[slice | Tensor, InverseOperator]] = [
            (
                kept[run.columns] if sparse else run.columns,
                (LowRankInverse if run.size > N else primal_blocks)(
                    rows[:, run.columns], run.count, damping, N / self.group
                ),
            )
            for run in runs
        ]
        inverse = BlockDiagonalInverse([*parts, *removed_part(objective.kept, damping)])
        inverse.damping = damping
        return inverse

    def _check_memory(self, objective: Objective, d: int, runs: list[Run]) -> None:
        N = objective.most_rows(self.samples, self.group)
        factors = sum(8 * run.count * min(N, run.size) ** 2 for run in runs)
        largest = max((8 * min(N, run.size) * run.size for run in runs), default=0)
        check_memory(
            [
                (f"{N} gradient rows of {d} weights", 4 * N * d),
                ("factors of the blocks", factors),
                ("scratch", 3 * min(WORKSPACE, largest)),
            ],
            objective.device,
            "Take fewer samples, smaller blocks, or average several samples into a row (group).",
        )
