"""Which weights stay: what goes together, ranked by what it costs the loss, until enough is gone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from woodfisher.checks import check_fraction, check_sparsity
from woodfisher.errors import TooSparseError, WoodfisherError
from woodfisher.surgeon.patterns import Unstructured
from woodfisher.surgeon.ranking import Standing, survivors
from woodfisher.surgeon.units import Singles, units_of
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from woodfisher.curvature.base import InverseOperator
    from woodfisher.distributed import Ranks
    from woodfisher.gradients.layout import Layout
    from woodfisher.surgeon.patterns import Pattern

SCOPES = ("global", "layer", "flops")


class Selection:
    """What may stay, and how much of it.

    Parameters
    ----------
    layout:
        The chosen weights.
    pattern:
        What is removed together.
    scope:
        Rank over all layers by what a weight costs the loss (`global`) or by what a FLOP does (`flops`), or give each
        layer the same sparsity (`layer`).
    floor:
        Fraction of every tensor's weights that stay at least.
    flops:
        FLOPs of a sample that each weight takes part in, int64 `(d,)`, for the scope `flops`.
    standing:
        Where the layers stand among those of all processes; by default they are all there are.

    Attributes
    ----------
    total:
        All there is in all processes, in what the scope counts: weights, or FLOPs a sample.
    """

    def __init__(
        self,
        layout: Layout,
        pattern: Pattern = Unstructured(),
        scope: str = "global",
        floor: float = 0.0,
        flops: Tensor | None = None,
        standing: Standing | None = None,
    ) -> None:
        check_fraction("floor", floor)
        self.layout, self.pattern, self.scope, self.floor = layout, pattern, scope, floor
        self._flops = flops
        self._standing = standing or Standing(layout)
        self.total = self._standing.total(layout.size if flops is None else int(flops.sum()))
        only = pattern.sparsity
        if only is not None and floor > 1 - only + 1e-9:
            raise WoodfisherError(
                f"the pattern {pattern} keeps {1 - only:g} of every tensor, less than the floor of {floor:g}: lower "
                "the floor, or choose another pattern."
            )
        self._device = torch.device("cpu")
        self._quota = pattern.quota(layout) if layout.size else None
        self._units = units_of(pattern, layout)
        if scope == "layer" and self._spans_tensors:
            raise WoodfisherError(
                f"the pattern {pattern} has groups that span several tensors, so the scope layer can't rank them: use "
                "global."
            )

    def dealt(self, part: Layout, ranks: Ranks) -> Selection:
        """The selection for the weights of one of several processes, which rank theirs among all; amounts are of all.

        For patterns whose groups lie within a parameter, in the order of the layout.
        """
        if ranks.size == 1:
            return self
        flops = None if self._flops is None else self.layout.of(part, self._flops)
        standing = Standing(self.layout, part, ranks, self._units.width)
        return Selection(part, self.pattern, self.scope, self.floor, flops, standing)

    @property
    def _spans_tensors(self) -> bool:
        """Whether units have weights of several tensors."""
        units = [self._units.of(where) for where in self.layout.slices.values()]
        return bool(units) and sum(map(len, units)) > len(torch.cat(units).unique())

    def present(self, kept: Tensor) -> Tensor:
        """What is there to begin with, where `kept` `(d,)` is what isn't zero.

        A zero counts as a removed weight, but for biases and parameters of normalisation in a group that has other
        weights left: these begin at zero.
        """
        self._move(kept.device)
        alive = self._units.spread(self._units.sums(kept.long()) > 0)
        vectors = torch.cat(
            [
                torch.full((size,), len(shape) < 2, device=kept.device)
                for size, shape in zip(self.layout.sizes, self.layout.shapes.values(), strict=True)
            ]
        )
        return kept | (vectors & alive)

    def amount(self, kept: Tensor) -> int:
        """How much of `total` the weights in `kept` `(d,)` are."""
        return int(self._each(kept).sum())

    def target(self, sparsity: float) -> int:
        """How much of `total` stays at a sparsity; raises where nothing would, or the pattern or floor forbids it."""
        check_sparsity(sparsity)
        amount = round((1 - sparsity) * self.total)
        if not self.total:
            raise WoodfisherError(
                "none of the chosen weights takes part in a FLOP, as biases don't: choose others, or scope='global'."
            )
        if amount == 0:
            raise WoodfisherError(
                f"a sparsity of {sparsity:g} keeps none of {self.total} weights: ask for less."
            )
        only = self.pattern.sparsity
        if only is not None and sparsity > only + 1e-9:
            raise WoodfisherError(
                f"the pattern {self.pattern} leaves a sparsity of {only:g}, and {sparsity:g} was "
                "asked for: leave the sparsity out, or choose another pattern."
            )
        if self.floor and isinstance(self._units, Singles) and self._flops is None:
            self._check_floor(sum(self._needed(size) for size in self.layout.sizes), amount)
        return amount

    def _needed(self, size: int) -> int:
        """Weights that the floor keeps of so many, whatever the rounding of their product."""
        return math.ceil(self.floor * size * (1 - 1e-12))

    def _check_floor(self, least: int, amount: int) -> None:
        if least > amount:
            raise TooSparseError(
                f"the floor of {self.floor:g} in every layer keeps {least} of {self.total}, more than "
                f"the {amount} that the sparsity leaves: lower one of them."
            )

    def check_pattern(self, kept: Tensor, amount: int) -> None:
        """Raise where as little as `amount` is in `kept` `(d,)` already, but not in a pattern that has one sparsity."""
        only = self.pattern.sparsity
        if only is None or self._quota is None or not self.amount(kept) <= amount <= self.target(only):
            return
        self._move(kept.device)
        index, number = self._quota
        if bool(((self._costs(kept) > 0)[index].sum(1) > number).any()):
            raise WoodfisherError(
                f"{1 - self.amount(kept) / self.total:.2%} of the chosen weights are zero already, but not in the "
                f"pattern {self.pattern}: start with fewer zeros, or leave out what is sparse with exclude=."
            )

    def final(self, sparsity: float) -> int:
        """`target` for where pruning ends: there, a pattern with one sparsity has to be reached exactly."""
        only = self.pattern.sparsity
        if only is not None and abs(sparsity - only) > 1e-9:
            raise WoodfisherError(
                f"the pattern {self.pattern} is reached at a sparsity of {only:g} and at no other; "
                f"{sparsity:g} was asked for. Leave the sparsity out, or choose another pattern."
            )
        return self.target(sparsity)

    def __call__(self, point: Tensor, finv: InverseOperator, kept: Tensor, amount: int) -> Tensor:
        """Mask of what stays of `kept` `(d,)`: `best` by `scores`."""
        return self.best(self.scores(point, finv), kept, amount)

    def scores(self, point: Tensor, finv: InverseOperator) -> Tensor:
        """ρ_Q of what goes together (docs/method.md §4), float64: of each weight, `(d,)`, or each group, `(u,)`.

        Parameters
        ----------
        point:
            w or the Newton point, `(d,)`.
        """
        self._move(point.device)
        return self._units.scores(point, finv)

    def best(self, scores: Tensor, kept: Tensor, amount: int) -> Tensor:
        """Mask of what stays of `kept` `(d,)`: the most that is no more than `amount`, the cheapest removed.

        What goes together is ranked by its score per weight, or per FLOP; without groups exactly `amount` weights
        stay. Of equal ranks, what is first in the flat order stays.
        """
        self._move(kept.device)
        cost = self._costs(kept)
        bad = scores.isnan().nonzero()
        if len(bad):
            unit = int(bad[0])
            raise WoodfisherError(
                f"the score of a weight of {self.layout.name_at(self._units.first(unit))!r} is NaN: raise the damping."
            )
        alive = cost > 0
        rank = scores / cost.clamp_min(1)
        fixed = self._protected(rank, alive, kept)
        only = self.pattern.sparsity
        if only is not None and amount <= self.target(only):
            stay = self._units.spread(fixed) & kept
            reached = self._standing.total(self.amount(stay))
            if reached < amount:
                warn(
                    f"weights that were zero already lie where the pattern {self.pattern} keeps some: it leaves a "
                    f"sparsity of {1 - reached / self.total:.2%}, and not {only:.2%}."
                )
            return stay
        rank[fixed] = torch.inf
        if self.scope == "layer":
            stay = self._within_layers(rank, alive, cost, amount, fixed)
        else:
            self._check_floor(self._standing.total(int(cost[fixed].sum())), amount)
            # What costs nothing stays: its removal would bring the amount no nearer.
            stay = survivors(rank, alive, amount, cost, self._standing) | ~alive
        if amount and not self._standing.total(int((stay & alive).sum())):
            share = ", shared out among the layers" if self.scope == "layer" else ""
            raise TooSparseError(
                f"{amount} of {self.total} may stay{share}, and no group of the pattern {self.pattern} is as small: "
                "ask for less sparsity" + (", or for scope='global'." if share else ".")
            )
        return self._units.spread(stay) & kept

    def _move(self, device: torch.device) -> None:
        """Have everything where the weights are, once."""
        if device == self._device:
            return
        self._device, self._units = device, self._units.to(device)
        if self._flops is not None:
            self._flops = self._flops.to(device)
        if self._quota is not None:
            self._quota = self._quota[0].to(device), self._quota[1]

    def _each(self, kept: Tensor) -> Tensor:
        """What of `total` each weight still is, int64 `(d,)`."""
        self._move(kept.device)
        return kept.long() if self._flops is None else self._flops * kept

    def _costs(self, kept: Tensor) -> Tensor:
        """What of `total` each unit still is, int64 `(u,)`."""
        return self._units.sums(self._each(kept))

    def _protected(self, rank: Tensor, alive: Tensor, kept: Tensor) -> Tensor:
        """Units that the pattern's quota or the floor keeps: the best of each set that are left."""
        fixed = torch.zeros_like(alive)
        if self._quota is not None:
            index, number = self._quota
            order = torch.where(alive, rank, -torch.inf)[index].argsort(dim=1, descending=True, stable=True)
            fixed[index.gather(1, order[:, :number])] = True
        elif self.floor:
            for where in self.layout.slices.values():
                units, sizes = self._units.sums_in(where, kept[where].long())
                order = torch.where(alive, rank, -torch.inf)[units].argsort(descending=True, stable=True)
                needed = self._needed(where.stop - where.start)
                before = sizes[order].cumsum(0) - sizes[order]
                fixed[units[order[before < needed]]] = True
        return fixed & alive

    def _within_layers(self, rank: Tensor, alive: Tensor, cost: Tensor, amount: int, fixed: Tensor) -> Tensor:
        layers = [self._units.of(where) for where in self.layout.slices.values()]
        available = self._standing.of_all([int(cost[units].sum()) for units in layers])
        counts = _counts(self._standing.sizes, available, amount)
        held = self._standing.of_all([int(cost[units][fixed[units]].sum()) for units in layers])
        for least, number in zip(held, counts, strict=True):
            self._check_floor(least, number)
        stay = torch.zeros_like(alive)
        for units, number in zip(layers, self._standing.own(counts), strict=True):
            stay[units] = survivors(rank[units], alive[units], number, cost[units])
        return stay


def _counts(sizes: Sequence[int], available: list[int], count: int) -> list[int]:
    """Share `count` out in proportion to `sizes`, none more than `available`; what one can't take the rest do.

    >>> _counts([10, 10], [10, 10], 10), _counts([10, 10], [2, 10], 10)
    ([5, 5], [2, 8])
    """
    counts = [0] * len(sizes)
    open_ = set(range(len(sizes)))
    left = min(count, sum(available))
    while open_:
        whole = sum(sizes[i] for i in open_)
        full = {i for i in open_ if sizes[i] * left > available[i] * whole}
        if not full:
            break
        for i in full:
            counts[i] = available[i]
        left -= sum(available[i] for i in full)
        open_ -= full
    shares = {i: sizes[i] * left / sum(sizes[j] for j in open_) for i in sorted(open_)}
    for i, share in shares.items():
        counts[i] = int(share)
    rest = left - sum(counts[i] for i in open_)
    for i in sorted(open_, key=lambda i: counts[i] - shares[i])[:rest]:
        counts[i] += 1
    return counts
