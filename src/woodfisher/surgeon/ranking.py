"""The highest of many scores, wherever they are: one threshold for all processes, without gathering the scores."""

from __future__ import annotations

from itertools import accumulate, chain
from typing import TYPE_CHECKING

import torch

from woodfisher.distributed import ALONE
from woodfisher.gradients.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.distributed import Ranks

DIGIT = 16
"""Bits of a score that a round of the search for the threshold settles."""


class Standing:
    """Where the layers of this process stand among those of all.

    Parameters
    ----------
    whole, part:
        All weights, and those of this process, in the same order; by default the same.
    ranks:
        The processes.
    width:
        Weights in a unit, where there are several; units follow the order of the layout.
    """

    def __init__(
        self, whole: Layout, part: Layout | None = None, ranks: Ranks = ALONE, width: int = 1
    ) -> None:
        part = whole if part is None else part
        places = {name: place for place, name in enumerate(whole.shapes)}
        self.sizes, self._ranks = whole.sizes, ranks
        self._places = [places[name] for name in part.shapes]
        self._units = [size // width for size in part.sizes]

    def total(self, number: int) -> int:
        """Sum over the processes."""
        return sum(self._ranks.gather(number))

    def sum(self, values: Tensor) -> Tensor:
        """The same for a tensor."""
        return self._ranks.sum(values)

    def of_all(self, numbers: list[int]) -> list[int]:
        """A number for each layer of this process → for each of all."""
        told = self._ranks.gather(list(zip(self._places, numbers, strict=True)))
        return [number for _, number in sorted(chain.from_iterable(told))]

    def own(self, numbers: list[int]) -> list[int]:
        """A number for each of all layers → for each of this process."""
        return [numbers[place] for place in self._places]

    def running(self, values: Tensor) -> Tensor:
        """Cumulative sums over the units of all layers in their order, at those of this process; int64 `(u,)`."""
        if self._ranks.size == 1:
            return values.cumsum(0)
        layers = values.split(self._units) if self._units else ()
        before = list(accumulate(self.of_all([int(layer.sum()) for layer in layers]), initial=0))
        here = (before[place] for place in self._places)
        return torch.cat([values[:0], *(layer.cumsum(0) + b for layer, b in zip(layers, here, strict=True))])


ALL = Standing(Layout({}))
"""For units that no other process has."""


def survivors(
    scores: Tensor, kept: Tensor, amount: int, cost: Tensor | None = None, standing: Standing = ALL
) -> Tensor:
    """Mask of those with the highest scores among those in `kept`: as many as cost no more than `amount`.

    Without `cost` each costs 1, so that exactly `amount` stay. Of equal scores those first in the flat order stay. One
    that would cost more than what is left is passed over, and those below it come next.

    Parameters
    ----------
    scores, kept, cost:
        Of the units of this process: float64, bool, and int64 above zero where kept, all `(u,)`.
    standing:
        Where they stand among the units of all processes, of which `amount` may stay.

    Examples
    --------
    >>> scores, kept = torch.tensor([3.0, 1.0, 1.0, 9.0]), torch.tensor([True, True, True, False])
    >>> survivors(scores, kept, 2)
    tensor([ True,  True, False, False])
    >>> survivors(scores, kept, 6, torch.tensor([4, 2, 2, 1]))
    tensor([ True,  True, False, False])
    >>> survivors(scores, kept, 3, torch.tensor([4, 2, 1, 1]))
    tensor([False,  True,  True, False])
    """
    each = kept.long() if cost is None else cost * kept
    keys = _ordered(scores)
    stay, left = torch.zeros_like(kept), amount
    fits = kept & (each <= left)
    while standing.total(int(fits.sum())):
        stay = stay | _highest(keys, fits, each * fits, left, standing)
        left = amount - standing.total(int(each[stay].sum()))
        fits = kept & ~stay & (each <= left)
    return stay


def _highest(keys: Tensor, fits: Tensor, cost: Tensor, amount: int, standing: Standing) -> Tensor:
    """Those in `fits` from the highest key on, up to the first that would cost more than what is left of `amount`."""
    if amount >= standing.total(int(cost.sum())):
        return fits
    threshold, left = _threshold(keys[fits], cost[fits], amount, standing)
    ties = (keys == threshold) & fits
    return ((keys > threshold) & fits) | (ties & (standing.running(cost * ties) <= left))


def _ordered(scores: Tensor) -> Tensor:
    """Integers in the order of float64 scores, equal where those are."""
    bits = (scores.double() + 0.0).view(torch.int64)  # 0.0 makes one zero of both
    return bits ^ ((bits >> 63) & torch.iinfo(torch.int64).max)


def _threshold(keys: Tensor, cost: Tensor, amount: int, standing: Standing) -> tuple[int, int]:
    """The key from which on the higher ones cost more than `amount`, and what those above it leave of that.

    Digit by digit from the highest: histograms of costs say in which digit the amount is spent.
    """
    size = 1 << DIGIT
    threshold = 0
    for shift in range(64 - DIGIT, -1, -DIGIT):
        digit = keys >> shift
        digit = digit + size // 2 if shift == 64 - DIGIT else digit & (size - 1)
        spent = standing.sum(_histogram(digit, cost, size)).flip(0).cumsum(0)
        place = int(torch.searchsorted(spent, amount, right=True))
        amount -= int(spent[place - 1]) if place else 0
        value = size - 1 - place
        threshold = (threshold << DIGIT) + (value - size // 2 if shift == 64 - DIGIT else value)
        here = digit == value
        keys, cost = keys[here], cost[here]
    return threshold, amount


def _histogram(digit: Tensor, cost: Tensor, size: int) -> Tensor:
    """Sum of the costs at each digit, int64 `(size,)`."""
    return torch.zeros(size, dtype=torch.int64, device=digit.device).index_add_(0, digit, cost)
