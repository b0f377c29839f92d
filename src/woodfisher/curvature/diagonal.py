"""Diagonal curvatures: the identity and the diagonal of the Fisher."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from woodfisher.checks import check_choice, check_count, check_positive
from woodfisher.curvature.base import DiagonalInverse, Estimator
from woodfisher.errors import NoFactorsError

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.objective import Objective


@dataclass(frozen=True)
class Identity(Estimator):
    """F = I: every direction costs the same, which makes the surgeon prune by magnitude. Uses no data."""

    def __call__(self, objective: Objective) -> DiagonalInverse:
        """Return the identity for the weights of `objective`."""
        return DiagonalInverse(torch.ones(objective.layout.size, device=objective.device))


@dataclass(frozen=True)
class DiagonalFisher(Estimator):
    """F_ii = λ + (m/N) Σ gₙᵢ², nothing off the diagonal: Optimal Brain Damage with the empirical Fisher.

    Rows are squared and summed as they come, so that memory does not grow with their number.

    Attributes
    ----------
    samples:
        Samples to take gradients of; N = samples / group rows.
    damping:
        λ > 0, in the units of a squared gradient.
    group:
        m, the samples that a row averages.
    labels:
        `data` for the empirical Fisher, `model` to sample targets from the model's own predictions.
    """

    samples: int = 400
    damping: float = 1e-5
    group: int = 1
    labels: Literal["data", "model"] = "data"

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        check_count("group", self.group)
        check_positive("damping", self.damping, "for weights whose gradient is zero in every row")
        check_choice("labels", self.labels, ("data", "model"))

    def __call__(self, objective: Objective) -> DiagonalInverse:
        """Sum the squares of the rows of `objective`, from the factors of their layers where these have any."""
        rows = None
        if objective.factors(self.group).keys() == objective.layout.shapes.keys() != set():
            with suppress(NoFactorsError):
                total, rows = self._of_layers(objective)
        if rows is None:
            total, rows = self._of_rows(objective)
        return DiagonalInverse(total * self.group / rows + self.damping)

    def _of_layers(self, objective: Objective) -> tuple[Tensor, int]:
        """Squares of the rows, summed, and how many they are."""
        total, rows = torch.zeros(objective.layout.size, dtype=torch.float64, device=objective.device), 0
        for layers in objective.iter_layer_rows(self.samples, group=self.group, labels=self.labels):
            for name, layer in layers.items():
                total[objective.layout.slices[name]] += layer.squares()
            rows += layer.count
        return total * objective.kept, rows

    def _of_rows(self, objective: Objective) -> tuple[Tensor, int]:
        total, rows = torch.zeros(objective.layout.size, dtype=torch.float64, device=objective.device), 0
        for chunk in objective.iter_rows(self.samples, group=self.group, labels=self.labels):
            total += chunk.double().square().sum(0)
            rows += len(chunk)
        return total, rows
