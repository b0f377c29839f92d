"""Samples that stages are checked on, and how much a step may raise the loss there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from woodfisher.errors import WoodfisherError
from woodfisher.gradients.batches import FORWARD_BATCH, rechunk, samples_in
from woodfisher.watch import phase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from woodfisher.gradients.batches import Batch
    from woodfisher.gradients.objective import Objective

_RISE = {True: 0.4, False: 0.1}
"""Share of the loss (of the first one, where that is larger) by which a step may raise it beyond what is predicted:
with the gradient, which brings it down again, and without. What is predicted counts up to that loss, since a removal
that multiplies it is better made in parts."""


@dataclass(frozen=True)
class HeldOut:
    """Samples that none is used of for rows, and the losses that others on them are held against.

    Attributes
    ----------
    batches:
        The samples.
    dense, first:
        The mean loss before anything is removed: in the precision of the weights, and in that of gradients.
    floor:
        What losses are counted from: 0, or the smallest loss of a sample where there are negative ones.
    """

    batches: Sequence[Batch]
    dense: float
    first: float
    floor: float

    @classmethod
    def of(cls, objective: Objective, drawn: Sequence[Batch]) -> HeldOut:
        """Those that were drawn; raises where the objective's loss on them is not finite."""
        batches = [objective.on_device(chunk) for chunk in rechunk(drawn, FORWARD_BATCH, 1)]
        dense, first = (mean_loss(objective, batches, rounded=rounded) for rounded in (False, True))
        at = objective.on(batches)
        if not math.isfinite(dense):
            for _ in at.iter_rows(sum(map(samples_in, batches))):
                pass
            raise WoodfisherError(
                f"the mean loss of the model as it came is {dense} on held-out samples: check the loss, the data and "
                "the weights."
            )
        return cls(batches, dense, first, floor_of(at, first))

    def loss(self, objective: Objective) -> float:
        """The mean loss; infinity where it is not finite."""
        return _finite(mean_loss(objective, self.batches))

    def quick_loss(self, objective: Objective, turn: int | None = None) -> float:
        """The same in the precision of gradients, on all batches, or on the one whose turn it is."""
        batches = self.batches if turn is None else [self.batches[turn % len(self.batches)]]
        return _finite(mean_loss(objective, batches, rounded=True))

    def yardstick(self, loss: float) -> float:
        """What rises are held against where the loss is this: it, or the first one where that is larger."""
        return max(loss, self.first) - self.floor

    def rise(self, loss: float, first_order: bool) -> float:
        """By how much a step may raise this loss beyond what is predicted."""
        return _RISE[first_order] * self.yardstick(loss)


def floor_of(objective: Objective, loss: float) -> float:
    """What a loss is counted from: 0, or the smallest loss of a sample where there are negative ones.

    Where no sample's is below the mean `loss`, as far as is known, the mean may fall as far again.
    """
    with phase("check"):
        least = min(objective.least_loss(), 0.0)
    return least if least < loss else loss - abs(loss)


def mean_loss(objective: Objective, batches: Sequence[Batch], *, rounded: bool = False) -> float:
    """The mean loss on some samples, from forward passes; in the precision of gradients where `rounded`."""
    with phase("check"):
        return objective.on(batches).mean_loss(rounded=rounded)


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
