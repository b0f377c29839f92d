"""The recursions that the factorisation replaces, as fast as they go in torch (docs/method.md §3).

All take float32 rows as `(count, N, B)`, one batch of blocks, with divisor n, and give the diagonals of
(λI + GᵀG/n)⁻¹ as `(count, B)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_PANEL = 32


def rank_one(G: Tensor, damping: float, divisor: float) -> Tensor:
    """The paper's recursion on B×B matrices, one rank-one update a row.

    It is what the Optimal BERT Surgeon (Kurtic et al., EMNLP 2022) runs, batched over blocks.
    """
    count, N, B = G.shape
    F = torch.empty(count, B, B, dtype=G.dtype, device=G.device).zero_()
    F.diagonal(dim1=1, dim2=2).fill_(1 / damping)
    for n in range(N):
        g = G[:, n, :, None]
        u = torch.bmm(F, g)
        u.div_(torch.bmm(g.mT, u).add_(divisor).sqrt_())
        F.addcmul_(u, u.mT, value=-1)
    return F.diagonal(dim1=1, dim2=2).clone()


def matrix_free(G: Tensor, damping: float, divisor: float, panel: int = 1) -> Tensor:
    """M-FAC's static algorithm: only the vectors uₙ = Fₙ₋₁⁻¹gₙ are kept, never a B×B matrix.

        uₙ = gₙ/λ − Σ_{k<n} u_k (u_kᵀgₙ) / s_k,   sₙ = n + gₙᵀuₙ,   diag F⁻¹ = 1/λ − Σ uₙ²/sₙ

    Parameters
    ----------
    panel:
        Rows that are corrected by all rows before them at once, in two matrix products; inside a panel they are
        corrected one by one. 1 is the algorithm as published, which reads all that it keeps twice for each row.

    References
    ----------
    Frantar, Kurtic and Alistarh, M-FAC: Efficient Matrix-Free Approximations of Second-Order Information,
    NeurIPS 2021, §3.1.
    """
    count, N, _ = G.shape
    U = G / damping
    s = torch.empty(count, N, 1, dtype=G.dtype, device=G.device)
    for first in range(0, N, panel):
        rows = slice(first, min(first + panel, N))
        if first:
            _correct(U, s, G[:, rows], rows, slice(0, first))
        for n in range(rows.start, rows.stop):
            row = slice(n, n + 1)
            if n > first:
                _correct(U, s, G[:, row], row, slice(first, n))
            s[:, row] = torch.bmm(U[:, row], G[:, row].mT).add_(divisor)
    return U.square_().div_(s).sum(1).neg_().add_(1 / damping)


def _correct(U: Tensor, s: Tensor, g: Tensor, rows: slice, known: slice) -> None:
    """Take Σ u_k (u_kᵀg)/s_k of the known rows out of U's `rows`, in place."""
    C = torch.bmm(g, U[:, known].mT).div_(s[:, known].mT)
    U[:, rows].baddbmm_(C, U[:, known], alpha=-1)


def matrix_free_in_panels(G: Tensor, damping: float, divisor: float) -> Tensor:
    """`matrix_free` with most of its work in matrix products: the strongest form of that recursion we know."""
    return matrix_free(G, damping, divisor, _PANEL)


@dataclass(frozen=True)
class Peer:
    """A recursion to compare with.

    Attributes
    ----------
    name, what:
        For tables, and in words.
    diagonal:
        The recursion.
    numbers:
        Numbers that a block of N rows and B weights keeps busy, from `(N, B)`.
    even:
        Whether each row costs the same, so that the time of some rows tells that of all.
    """

    name: str
    what: str
    diagonal: Callable[[Tensor, float, float], Tensor]
    numbers: Callable[[int, int], int]
    even: bool = False


PEERS = (
    Peer("rank-one", "the paper's recursion on B×B matrices", rank_one, lambda _, B: B * B, even=True),
    Peer("m-fac", "M-FAC's matrix-free recursion", matrix_free, lambda N, B: 2 * N * B),
    Peer(
        "m-fac-panels",
        "the same, 32 rows at a time (ours; not published)",
        matrix_free_in_panels,
        lambda N, B: 2 * N * B,
    ),
)


def exact(G: Tensor, damping: float, divisor: float) -> Tensor:
    """The same diagonals by dense inverses in float64, of the smaller of F and the Gram matrix."""
    G = G.double()
    _, N, B = G.shape
    if N < B:
        K = G @ G.mT
        K.diagonal(dim1=1, dim2=2).add_(divisor * damping)
        return (1 - (G * (torch.linalg.inv(K) @ G)).sum(1)) / damping
    F = G.mT @ G / divisor
    F.diagonal(dim1=1, dim2=2).add_(damping)
    return torch.linalg.inv(F).diagonal(dim1=1, dim2=2)
