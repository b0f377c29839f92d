"""What a pattern removes at a time: single weights, or groups of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from woodfisher.surgeon.saliency import group_saliency, saliency

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.curvature.base import InverseOperator
    from woodfisher.gradients.layout import Layout
    from woodfisher.surgeon.patterns import Pattern


class Units(ABC):
    """`u` units of which each of `d` weights belongs to one."""

    @abstractmethod
    def scores(self, point: Tensor, finv: InverseOperator) -> Tensor:
        """ρ of each unit, where `point` `(d,)` is w or the Newton point: float64 `(u,)`."""

    @abstractmethod
    def sums(self, each: Tensor) -> Tensor:
        """Numbers of the weights, int64 `(d,)`, summed over each unit: `(u,)`."""

    @abstractmethod
    def spread(self, units: Tensor) -> Tensor:
        """What holds of the units, bool `(u,)`, for the weights: `(d,)`."""

    @abstractmethod
    def of(self, where: slice) -> Tensor:
        """The units that have weights there, int64, ascending."""

    @abstractmethod
    def sums_in(self, where: slice, each: Tensor) -> tuple[Tensor, Tensor]:
        """`of(where)`, and numbers of the weights there summed over each of these units."""

    @abstractmethod
    def first(self, unit: int) -> int:
        """The first weight of a unit."""

    @abstractmethod
    def to(self, device: torch.device) -> Units:
        """The same units on a device."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Weights of the first unit."""


class Singles(Units):
    """Each weight by itself.

    Parameters
    ----------
    device:
        Where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def scores(self, point: Tensor, finv: InverseOperator) -> Tensor:
        return saliency(point, finv)

    def sums(self, each: Tensor) -> Tensor:
        return each

    def spread(self, units: Tensor) -> Tensor:
        return units

    def of(self, where: slice) -> Tensor:
        return torch.arange(where.start, where.stop, device=self._device)

    def sums_in(self, where: slice, each: Tensor) -> tuple[Tensor, Tensor]:
        return self.of(where), each

    def first(self, unit: int) -> int:
        return unit

    def to(self, device: torch.device) -> Units:
        return Singles(device)

    @property
    def width(self) -> int:
        return 1


class Groups(Units):
    """Groups of weights, in the order of their indexes.

    Parameters
    ----------
    indexes:
        Flat indexes of what goes together, int64 `(m, k)` for each size k, as `Pattern.groups` gives them.
    """

    def __init__(self, indexes: list[Tensor]) -> None:
        self._indexes = indexes
        self._count = sum(map(len, indexes))
        self._owner = torch.empty(
            sum(index.numel() for index in indexes), dtype=torch.int64, device=indexes[0].device
        )
        first = 0
        for index in indexes:
            self._owner[index] = torch.arange(first, first + len(index), device=index.device)[:, None]
            first += len(index)

    def scores(self, point: Tensor, finv: InverseOperator) -> Tensor:
        return torch.cat([group_saliency(point, finv, index) for index in self._indexes])

    def sums(self, each: Tensor) -> Tensor:
        return each.new_zeros(self._count).index_add(0, self._owner, each)

    def spread(self, units: Tensor) -> Tensor:
        return units[self._owner]

    def of(self, where: slice) -> Tensor:
        return self._owner[where].unique()

    def sums_in(self, where: slice, each: Tensor) -> tuple[Tensor, Tensor]:
        units, place = self._owner[where].unique(return_inverse=True)
        return units, each.new_zeros(len(units)).index_add(0, place, each)

    def first(self, unit: int) -> int:
        return int((self._owner == unit).nonzero()[0])

    def to(self, device: torch.device) -> Units:
        return Groups([index.to(device) for index in self._indexes])

    @property
    def width(self) -> int:
        return self._indexes[0].shape[1]


def units_of(pattern: Pattern, layout: Layout) -> Units:
    """What a pattern removes at a time of the weights of a layout."""
    indexes = pattern.groups(layout) if layout.size else None
    return Singles(torch.device("cpu")) if indexes is None else Groups(indexes)
