"""When how much is removed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from woodfisher.checks import check_count, check_not_negative, check_positive, check_sparsity, finite_number
from woodfisher.errors import WoodfisherError

if TYPE_CHECKING:
    from collections.abc import Sequence


_ROUNDING = 1e-9
"""Of times that are sums and products of floating-point numbers."""


class Schedule(ABC):
    """Sparsity as a function of training steps, counted from 0: step t is the one after t others.

    Schedules are values. Times in epochs become steps by `in_epochs`.
    """

    @abstractmethod
    def at(self, step: int) -> float | None:
        """The sparsity to prune to after training step `step`; None where nothing is removed."""

    @property
    @abstractmethod
    def goal(self) -> float:
        """The sparsity that is reached in the end."""

    @property
    @abstractmethod
    def reached(self) -> int:
        """The step after which the model has that sparsity."""

    @abstractmethod
    def in_epochs(self, steps: int) -> Schedule:
        """The same schedule where its times are in epochs of `steps` steps each."""


@dataclass(frozen=True)
class Milestones(Schedule):
    """Step → sparsity from there on: `Milestones({0: 0.5, 1000: 0.8, 2000: 0.9})`.

    >>> Milestones({0: 0.5, 10: 0.9}).at(10), Milestones({0: 0.5, 0.5: 0.9}).in_epochs(100).at(50)
    (0.9, 0.9)
    """

    sparsities: Mapping[float, float]

    def __post_init__(self) -> None:
        if not isinstance(self.sparsities, Mapping):
            raise WoodfisherError(
                f"milestones are a dict of sparsities by step, as in Milestones({{0: 0.9}}); {self.sparsities!r} came."
            )
        if not self.sparsities:
            raise WoodfisherError("a schedule of milestones needs one at least, as in Milestones({0: 0.9}).")
        for time, sparsity in self.sparsities.items():
            check_not_negative("the time of a milestone", time)
            check_sparsity(sparsity)
        for (first, low), (second, high) in pairwise(sorted(self.sparsities.items())):
            if low > high:
                raise WoodfisherError(
                    f"removed weights stay removed, so the sparsity can't fall from {low:g} at {first} to {high:g} at "
                    f"{second}: put the milestones into order."
                )

    def at(self, step: int) -> float | None:
        due = [sparsity for time, sparsity in self.sparsities.items() if math.ceil(time) == step]
        return max(due, default=None)

    @property
    def goal(self) -> float:
        return max(self.sparsities.values())

    @property
    def reached(self) -> int:
        return min(math.ceil(time) for time, sparsity in self.sparsities.items() if sparsity == self.goal)

    def in_epochs(self, steps: int) -> Milestones:
        check_count("steps", steps)
        return Milestones(
            {round(time * steps): sparsity for time, sparsity in sorted(self.sparsities.items())}
        )


def one_shot(sparsity: float, at: float = 0) -> Milestones:
    """Prune once."""
    return Milestones({at: sparsity})


@dataclass(frozen=True)
class Polynomial(Schedule):
    """s(t) = final + (initial − final) · (1 − (t − begin)/(end − begin))^power, at times (docs/method.md §10).

    Attributes
    ----------
    initial, final:
        Sparsity at `begin` and from `end` on.
    begin, end, every:
        Times, in steps: weights are removed at begin, begin + every, …, and at end.
    power:
        3 removes most early, 1 the same at each time.

    Examples
    --------
    >>> cubic = Polynomial(0.5, 0.9, begin=0, end=20, every=10)
    >>> [cubic.at(step) for step in (0, 5, 10, 20, 30)]
    [0.5, None, 0.85, 0.9, None]
    """

    initial: float
    final: float
    begin: float
    end: float
    every: float = 1
    power: float = 3

    def __post_init__(self) -> None:
        check_sparsity(self.initial)
        check_sparsity(self.final)
        check_not_negative("begin", self.begin)
        finite_number(self.end, f"end must be a finite number of steps or epochs; {self.end!r} came.")
        check_positive("every", self.every, "steps or epochs from one time to the next")
        check_positive("power", self.power, "where 1 is constant and 3 cubic")
        if self.end < self.begin:
            raise WoodfisherError(
                f"the schedule ends at {self.end:g}, before it begins at {self.begin:g}: give begin ≤ end."
            )
        if self.final < self.initial:
            raise WoodfisherError(
                f"removed weights stay removed, so the sparsity can't fall from {self.initial:g} to {self.final:g}: "
                "give initial ≤ final."
            )

    def at(self, step: int) -> float | None:
        if step >= self.end:
            return self.final if step == math.ceil(self.end) else None
        times = math.floor((step - self.begin) / self.every + _ROUNDING)
        if times < 0 or math.ceil(self.begin + times * self.every - _ROUNDING) != step:
            return None
        left = 1 - (step - self.begin) / (self.end - self.begin)
        return self.final + (self.initial - self.final) * left**self.power

    @property
    def goal(self) -> float:
        return self.final

    @property
    def reached(self) -> int:
        return math.ceil(self.end if self.final > self.initial else self.begin - _ROUNDING)

    def in_epochs(self, steps: int) -> Polynomial:
        check_count("steps", steps)
        return replace(
            self,
            begin=round(self.begin * steps),
            end=round(self.end * steps),
            every=self.every * steps,
        )


def through(now: int, targets: Sequence[int], stages: int, pace: float = 1.0) -> list[int]:
    """Weights kept after each stage from `now` down to the least of `targets`, passing through all of them.

    Stage i of n keeps `now · (last / now) ** ((i / n) ** pace)`; then each target takes the place of the stage
    nearest to it, or gets one of its own where two would share it.

    >>> through(1000, [10], 2)
    [100, 10]
    >>> through(1000, [10, 500], 3)
    [500, 46, 10]
    """
    wanted = sorted({min(target, now) for target in targets}, reverse=True)
    ratio = wanted[-1] / now
    path = [round(now * ratio ** ((i / stages) ** pace)) for i in range(1, stages + 1)]
    for target in wanted:
        spare = [i for i, count in enumerate(path) if count not in wanted]
        if target in path:
            continue
        if spare:
            path[min(spare, key=lambda i: abs(math.log(path[i] / target)))] = target
        else:
            path.append(target)
    return sorted(set(path), reverse=True)


def with_rests(path: Sequence[int], now: int, targets: Sequence[int], before: int, after: int) -> list[int]:
    """A path with stages that remove nothing: `before` ones ahead of it, and `after` ones shared out among its targets.

    What the shares leave over goes to the sparsest targets.

    >>> with_rests([500, 46, 10], 1000, [500, 10], 2, 3)
    [1000, 1000, 500, 500, 46, 10, 10, 10]
    """
    wanted = [amount for amount in path if amount in targets]
    rests = {amount: (after + i) // len(wanted) for i, amount in enumerate(wanted)}
    return [now] * before + [amount for amount in path for _ in range(1 + rests.get(amount, 0))]
