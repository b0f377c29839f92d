"""The exact Hessian of a small network, whole or its diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from woodfisher.checks import check_count, check_not_negative
from woodfisher.curvature.base import DiagonalInverse, Estimator
from woodfisher.curvature.dense import DenseInverse
from woodfisher.errors import WoodfisherError
from woodfisher.gradients.batches import take
from woodfisher.memory import Budget, new_matrix
from woodfisher.watch import report_progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from woodfisher.gradients.base import Gradients
    from woodfisher.gradients.objective import Objective

_COLUMNS = 32


@dataclass(frozen=True)
class _HessianEstimator(Estimator):
    """The options that both forms have, and document."""

    samples: int = 400
    damping: float = 1e-3

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        check_not_negative("damping", self.damping)

    def _shift(self, objective: Gradients) -> Tensor:
        """λ, and 1 for removed weights without any, whose rows are zero, `(d,)`."""
        removed = torch.tensor(self.damping or 1.0, dtype=torch.float64, device=objective.device)
        return torch.where(objective.kept, self.damping, removed)

    def _fixed(self, objective: Gradients) -> Objective:
        """The objective on samples that are the same for all columns, in whatever order its data comes."""
        whole = objective.joined()
        return whole.on(list(take(whole.data, self.samples)))


@dataclass(frozen=True)
class ExactHessian(_HessianEstimator):
    """F = H + λI with the Hessian H of the mean loss, in float64, for networks of some thousand weights.

    A Hessian is indefinite away from a minimum; where the damping doesn't lift its smallest eigenvalue above
    zero this raises, and says what would.

    Attributes
    ----------
    samples:
        Samples that the loss is the mean over.
    damping:
        λ ≥ 0, in the units of the Hessian.
    """

    def estimate(self, objective: Gradients) -> DenseInverse:
        """Compute the Hessian of `objective` column by column and factor it."""
        d = objective.layout.size
        Budget.of(objective.device).check(
            [(f"the Hessian of {d} weights, its factor and those of what is kept", 4 * 8 * d * d)],
            "choose fewer weights (params), or use WoodFisher, whose memory grows with d and not with d²",
        )
        H = exact_hessian(self._fixed(objective), self.samples)
        H.diagonal().add_(self._shift(objective))
        return DenseInverse(H[None], "the damped Hessian", self.damping)


@dataclass(frozen=True)
class DiagonalHessian(_HessianEstimator):
    """F_ii = H_ii + λ with the exact diagonal of the Hessian: Optimal Brain Damage as first published.

    Every entry takes a Hessian-vector product, so this is for small networks too. Raises where an entry,
    damping included, isn't positive.

    Attributes
    ----------
    samples:
        Samples that the loss is the mean over.
    damping:
        λ ≥ 0, in the units of the Hessian.

    References
    ----------
    LeCun, Denker and Solla, Optimal Brain Damage, NIPS 1989.
    """

    def estimate(self, objective: Gradients) -> DiagonalInverse:
        """Compute the Hessian of `objective` column by column and keep its diagonal."""
        diagonal = torch.cat(
            [
                columns[where].diagonal().clone()
                for where, columns in _columns(self._fixed(objective), self.samples)
            ]
        )
        damped = diagonal + self._shift(objective)
        if not (damped > 0).all():
            worst = float(diagonal.min())
            raise WoodfisherError(
                f"{int((damped <= 0).sum())} of {len(damped)} entries of the Hessian's diagonal are not positive "
                f"at damping {self.damping:g} (the smallest is {worst:.3g}). Take a damping above {0 - worst:.3g}."
            )
        return DiagonalInverse(damped, self.damping)


def exact_hessian(objective: Objective, samples: int) -> Tensor:
    """Hessian of the mean loss over the first `samples` samples, float64 `(d, d)`, symmetric."""
    d = objective.layout.size
    H = new_matrix(d, d, torch.float64, objective.device)
    for where, columns in _columns(objective, samples):
        H[:, where] = columns
    return H.add_(H.mT.clone()).div_(2)


def _columns(objective: Objective, samples: int) -> Iterator[tuple[slice, Tensor]]:
    """Some columns after the other, float64 `(d, k)`; raises where they are not finite."""
    d = objective.layout.size
    for first in range(0, d, _COLUMNS):
        where = slice(first, min(first + _COLUMNS, d))
        columns = objective.hessian_columns(samples, where)
        if not torch.isfinite(columns).all():
            index = first + int((~torch.isfinite(columns)).any(0).nonzero()[0])
            raise WoodfisherError(
                f"the Hessian is not finite at {objective.layout.name_at(index)!r}: the loss itself is not finite, or "
                "has no second derivative at these outputs, as a square root has none at zero. Look at the loss and "
                "the data, or use the Fisher."
            )
        yield where, columns
        report_progress("Hessian columns", where.stop, d)
