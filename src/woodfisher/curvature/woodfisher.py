"""The empirical Fisher in blocks, inverted by one factorisation a block (docs/method.md §3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from woodfisher.checks import check_choice, check_count, described
from woodfisher.curvature.base import BlockDiagonalInverse, Estimator, over_all
from woodfisher.curvature.blocks import FisherBlocks
from woodfisher.curvature.damping import Damping, check_damping, resolve
from woodfisher.curvature.planning import KEEPS, Keep, Plan, planned
from woodfisher.curvature.rows import HeldRows, gathered
from woodfisher.distributed import ALONE
from woodfisher.errors import WoodfisherError
from woodfisher.gradients.layout import Layout
from woodfisher.memory import parse_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.curvature.rows import Rows
    from woodfisher.distributed import Ranks
    from woodfisher.gradients.base import Gradients, Labels
    from woodfisher.gradients.layout import Run


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
    keep:
        Where the rows are kept: `memory` (of the model's device), `factors` (as inputs and output gradients of their
        layers), `host` (main memory, for a model on a GPU), `disk` (a temporary file), `again` (nowhere: gradients are
        taken again for each window of weights), or `half` (in memory, in bfloat16, which rounds them by 0.2 %);
        `auto` for the cheapest of all but the last that fits.
    memory:
        Bytes that the process may have at its peak, as a number or as in `4GiB`; None for what is free.

    References
    ----------
    Singh and Alistarh, WoodFisher: Efficient Second-Order Approximation for Neural Network Compression,
    NeurIPS 2020.
    """

    samples: int = 400
    block_size: int | None = 2000
    damping: Damping = 1e-5
    group: int = 1
    labels: Labels = "data"
    keep: Keep | Literal["auto"] = "auto"
    memory: int | str | None = None

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        check_count("group", self.group)
        check_count("block_size", self.block_size, or_none="one block over all weights")
        check_damping(self.damping, "or the Fisher of few rows has no inverse")
        check_choice("labels", self.labels, ("data", "model"))
        check_choice("keep", self.keep, ("auto", *KEEPS))
        if self.memory is not None:
            parse_bytes(self.memory)

    def estimate(self, objective: Gradients) -> BlockDiagonalInverse:
        """Gather the rows of `objective`, kept as `plan` finds cheapest, and make the operator of them.

        Blocks hold kept weights; removed ones have no rows, and F is λ for each of them.
        """
        plan = planned(objective, self)
        kept = None if bool(objective.kept.all()) else objective.kept.nonzero().squeeze(1)
        rows = gathered(objective, self, plan, kept)
        parts, damping = self._parts(rows, self.runs(objective), plan, objective.ranks)
        return over_all(parts, objective.kept, damping)

    def runs(self, objective: Gradients) -> list[Run]:
        """The blocks of the weights that are left."""
        return objective.layout.restricted(objective.kept).runs(self.block_size)

    def of_rows(self, rows: Tensor) -> BlockDiagonalInverse:
        """F⁻¹ of gradient rows that are there already, float32 or float64 `(N, d)`, whatever `samples` says.

        Blocks are cut across the whole vector.
        """
        fits = isinstance(rows, torch.Tensor) and rows.ndim == 2 and rows.numel()
        if not fits or rows.dtype not in (torch.float32, torch.float64):
            raise WoodfisherError(
                f"rows must be a float32 or float64 matrix of one gradient a row, (N, d); {described(rows)} came."
            )
        runs = Layout({"": (rows.shape[1],)}).runs(self.block_size)
        return BlockDiagonalInverse(*self._parts(HeldRows(rows), runs))

    def _parts(
        self, rows: Rows, runs: list[Run], plan: Plan | None = None, ranks: Ranks = ALONE
    ) -> tuple[list[tuple[slice, FisherBlocks]], float]:
        """An operator for each run of blocks, or for what is at hand of it at once; and the damping."""
        damping = resolve(self.damping, rows, self.group, ranks)
        hold = plan is None or plan.hold
        parts: list[tuple[slice, FisherBlocks]] = []
        for run in runs:
            step = run.count if plan is None else plan.tile(run)
            for first in range(0, run.count, step):
                count = min(step, run.count - first)
                where = slice(run.start + first * run.size, run.start + (first + count) * run.size)
                blocks = FisherBlocks(rows.part(where), count, damping, rows.count / self.group, hold=hold)
                parts.append((where, blocks))
        return parts, damping
