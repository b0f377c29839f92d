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
    removed_part,
)
from woodfisher.curvature.blocks import FisherBlocks
from woodfisher.curvature.damping import Damping, check_damping, resolve
from woodfisher.errors import WoodfisherError
from woodfisher.layout import Layout
from woodfisher.memory import check_memory
from woodfisher.rows import HeldRows

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.layout import Run
    from woodfisher.objective import Objective
    from woodfisher.rows import Rows


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
        parts, damping = self._parts(HeldRows(rows), runs)
        if sparse:
            parts = [(kept[where], part) for where, part in parts]
        return BlockDiagonalInverse([*parts, *removed_part(objective.kept, damping)])

    def of_rows(self, rows: Tensor) -> BlockDiagonalInverse:
        """F⁻¹ of gradient rows that are there already, float32 or float64 `(N, d)`, whatever `samples` says.

        Blocks are cut across the whole vector.
        """
        if rows.ndim != 2 or not rows.numel() or rows.dtype not in (torch.float32, torch.float64):
            raise WoodfisherError(
                "rows must be a float32 or float64 matrix of one gradient a row, (N, d); "
                f"{rows.dtype} of shape {tuple(rows.shape)} came."
            )
        runs = Layout({"": (rows.shape[1],)}).runs(self.block_size)
        return BlockDiagonalInverse(self._parts(HeldRows(rows), runs)[0])

    def _parts(
        self, rows: Rows, runs: list[Run]
    ) -> tuple[list[tuple[slice | Tensor, InverseOperator]], float]:
        """An operator for each run of blocks, and the damping."""
        damping = resolve(self.damping, rows, self.group)
        parts: list[tuple[slice | Tensor, InverseOperator]] = [
            (
                run.columns,
                FisherBlocks(rows.part(run.columns), run.count, damping, rows.count / self.group),
            )
            for run in runs
        ]
        return parts, damping

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
