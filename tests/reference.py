"""The paper's equations written out slowly, in float64: what correct means (method.md)."""

from __future__ import annotations

import torch
from torch import Tensor


def recursion(rows: Tensor, damping: float, divisor: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """F⁻¹ by the Sherman–Morrison recursion of §3, one row at a time."""
    inverse = torch.eye(rows.shape[1], dtype=dtype) / damping
    for g in rows.to(dtype):
        u = inverse @ g
        inverse -= torch.outer(u, u) / (divisor + g @ u)
    return inverse


def fisher(rows: Tensor, damping: float, divisor: float, blocks: list[tuple[int, int]]) -> Tensor:
    """F = λI + GᵀG/n, only its diagonal blocks [start, stop)."""
    G = rows.double()
    F = damping * torch.eye(G.shape[1], dtype=torch.float64)
    for start, stop in blocks:
        F[start:stop, start:stop] += G[:, start:stop].T @ G[:, start:stop] / divisor
    return F


def cut(sizes: list[int], block_size: int | None) -> list[tuple[int, int]]:
    """Blocks as (start, stop), counted by hand."""
    if block_size is None:
        return [(0, sum(sizes))]
    blocks = []
    start = 0
    for size in sizes:
        blocks += [
            (first, min(first + block_size, start + size)) for first in range(start, start + size, block_size)
        ]
        start += size
    return blocks


def pair_saliency(wa: float, wb: float, a: float, b: float, c: float) -> float:
    """ρ of two weights with [F⁻¹] = [[a, c], [c, b]] between them: the 2×2 inverse written out (§4)."""
    return (b * wa * wa - 2 * c * wa * wb + a * wb * wb) / (2 * (a * b - c * c))


def kkt(F: Tensor, w: Tensor, gradient: Tensor, removed: Tensor) -> Tensor:
    """δ that minimises gᵀδ + ½δᵀFδ under δ_q = −w_q for removed q, from the whole Lagrangian system."""
    d, q = len(w), removed.nonzero().squeeze(1)
    E = torch.zeros(len(q), d, dtype=torch.float64)
    E[torch.arange(len(q)), q] = 1
    system = torch.zeros(d + len(q), d + len(q), dtype=torch.float64)
    system[:d, :d], system[d:, :d], system[:d, d:] = F, E, E.T
    return torch.linalg.solve(system, torch.cat([-gradient, -w[q]]))[:d]


def loop_rows(model, loss, inputs, targets, names, group=1) -> Tensor:
    """Gradient rows by one backward pass after the other."""
    parameters = [dict(model.named_parameters())[name] for name in names]
    rows = []
    for first in range(0, len(inputs) - group + 1, group):
        value = loss(model(inputs[first : first + group]), targets[first : first + group])
        gradients = torch.autograd.grad(value, parameters)
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    return torch.stack(rows)
