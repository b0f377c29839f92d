"""Diagonal curvatures: the identity and the diagonal of the Fisher."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from woodfisher.checks import check_choice, check_count, check_positive
from woodfisher.curvature.base import DiagonalInverse, Estimator, Labels
from woodfisher.errors import NoFactorsError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from woodfisher.gradients.objective import Objective


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
    labels: Labels = "data"

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        check_count("group", self.group)
        check_positive("damping", self.damping, "for weights whose gradient is zero in every row")
        check_choice("labels", self.labels, ("data", "model"))

    def __call__(self, objective: Objective) -> DiagonalInverse:
        """Sum the squares of the rows of `objective`, from the factors of their layers where these have any."""
        layout = objective.layout
        if objective.factors(self.group).keys() == layout.shapes.keys() != set():
            layers = objective.iter_layer_rows(self.samples, group=self.group, labels=self.labels)
            with suppress(NoFactorsError):
                return self._of(
                    (
                        layout.flatten({name: rows.squares() for name, rows in each.items()})
                        * objective.kept,
                        next(iter(each.values())).count,
                    )
                    for each in layers
                )
        chunks = objective.iter_rows(self.samples, group=self.group, labels=self.labels)
        return self._of((chunk.double().square().sum(0), len(chunk)) for chunk in chunks)

    def _of(self, squares: Iterable[tuple[Tensor, int]]) -> DiagonalInverse:
        """From the squares of some rows after others, summed `(d,)`, and how many rows they are."""
        squares = iter(squares)
        total, count = next(squares)
        for more, rows in squares:
            total += more
            count += rows
        return DiagonalInverse(total * self.group / count + self.damping)
