"""Diagonal curvatures: the identity and the diagonal of the Fisher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from woodfisher.checks import check_choice, check_count, check_positive
from woodfisher.curvature.base import DiagonalInverse, Estimator

if TYPE_CHECKING:
    from woodfisher.gradients.base import Gradients, Labels


@dataclass(frozen=True)
class Identity(Estimator):
    """F = I: every direction costs the same, which makes the surgeon prune by magnitude. Uses no data."""

    def estimate(self, objective: Gradients) -> DiagonalInverse:
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
    labels: Labels = "data"

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        check_count("group", self.group)
        check_positive("damping", self.damping, "for weights whose gradient is zero in every row")
        check_choice("labels", self.labels, ("data", "model"))

    def estimate(self, objective: Gradients) -> DiagonalInverse:
        """Sum the squares of the rows of `objective`, from the factors of their layers where these have any."""
        total, count = objective.squares(self.samples, group=self.group, labels=self.labels)
        return DiagonalInverse(total * self.group / count + self.damping, self.damping)
