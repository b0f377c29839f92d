"""Means over the stages of a run: of gradients, and of where the weights stood."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class MeanGradient:
    """The mean of gradient rows that come one after another, of which those from before a move count less.

    Parameters
    ----------
    weights:
        Of which gradients come, `(k,)`.
    momentum:
        What a move leaves of the weight of the rows before it.

    Attributes
    ----------
    value:
        The mean, `(k,)`; zero before the first row.
    weight:
        How many new rows it counts as.
    """

    def __init__(self, weights: Tensor, momentum: float) -> None:
        self.value = torch.zeros_like(weights)
        self._momentum, self.weight = momentum, 0.0

    def add(self, mean: Tensor, count: int) -> None:
        """Take in `count` rows of this mean."""
        self.weight += count
        self.value += (mean.to(self.value) - self.value) * (count / self.weight)

    def moved(self, share: float = 1.0) -> None:
        """The weights have gone by this share of a move."""
        self.weight *= self._momentum**share

    def restrict(self, stay: Tensor) -> None:
        """From here on of the weights in `stay` `(k,)` alone."""
        self.value = self.value[stay]


class MeanPlace:
    """Where weights stood since some of them were last removed, on average, and the later the more.

    The k-th place takes 4/(k + 3) of the mean: polynomial-decay averaging with η = 3 (Shamir and Zhang, Stochastic
    gradient descent for non-smooth optimization, 2013), which forgets where they began.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self._count = 0

    def add(self, weights: Tensor) -> None:
        """One more place; where it is of fewer weights, the first one."""
        if self.value is None or len(self.value) != len(weights):
            self.value, self._count = torch.zeros_like(weights), 0
        self._count += 1
        self.value += (weights - self.value) * (4 / (self._count + 3))
