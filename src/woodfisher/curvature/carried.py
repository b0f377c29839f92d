"""λ of a run of many stages: what it begins with, what is tried beside it, and how far it may grow."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from woodfisher.curvature.damping import LEAST_ROWS, Relative, held_out_damping, positive_scale
from woodfisher.errors import IndefiniteError

if TYPE_CHECKING:
    from woodfisher.curvature.base import InverseOperator
    from woodfisher.curvature.damping import Damping
    from woodfisher.curvature.running import RunningFisher

_FACTOR = 3.0
"""Ratio of one damping tried to the next."""

_FIRST_POWERS = {True: range(10), False: range(-1, 2)}
"""Powers of that ratio tried at the first stage, with and without the gradient, around what held-out rows say."""

_MOST = {True: 27.0, False: math.inf}
"""How many times what was best at the first stage the damping may grow to, both relative to the mean curvature then:
with the gradient a smaller step is almost always better for the next stage alone, and too small for those that follow.
It may fall as far as held-out samples like it to: what is removed leads away from the optimum, where a step was mostly
noise."""


class CarriedDamping:
    """The damping of one run, carried from stage to stage relative to the mean curvature.

    Parameters
    ----------
    given:
        What was asked for; all but "auto" stays as it is.
    first_order:
        Whether the gradient takes part.
    """

    def __init__(self, given: Damping, *, first_order: bool) -> None:
        self._given, self._first_order = given, first_order
        self._carried: float | None = None
        self._most = math.inf

    @property
    def begun(self) -> bool:
        """Whether a stage has been taken."""
        return self._carried is not None

    def now(self, fisher: RunningFisher) -> float:
        """λ as it was given, as it was best at the last stage, or as held-out rows find it likeliest.

        Where there are too few rows to ask it is the mean curvature.
        """
        given = self._absolute(fisher)
        if given is not None:
            return given
        if self._carried is not None:
            return self._carried * _scale(fisher)
        if fisher.count < LEAST_ROWS:
            return _scale(fisher)
        return held_out_damping(fisher.gram, fisher.size, fisher.group)

    def choices(self, damping: float, fisher: RunningFisher) -> list[float]:
        """What to try at a stage: many at the first one, then `damping` and its neighbours."""
        if self._given != "auto":
            return [damping]
        if not self.begun:
            return [damping * _FACTOR**power for power in _FIRST_POWERS[self._first_order]]
        return list(dict.fromkeys([damping, damping / _FACTOR, self.larger(damping, fisher)]))

    def larger(self, damping: float, fisher: RunningFisher) -> float:
        """The next one above `damping`, as far as it may grow."""
        return min(damping * _FACTOR, self._most * _scale(fisher))

    def inverse(self, fisher: RunningFisher, damping: float) -> tuple[InverseOperator, float]:
        """F⁻¹ and its λ: `damping`, raised where it drowns in the rounding of the Gram matrix and nobody chose it."""
        while True:
            try:
                return fisher.inverse(damping), damping
            except IndefiniteError:
                if self._given != "auto":
                    raise
            damping *= _FACTOR

    def carry(self, damping: float, fisher: RunningFisher) -> None:
        """Go on from what a stage that began with this Fisher was taken with."""
        relative = damping / _scale(fisher)
        if not self.begun:
            self._most = relative * _MOST[self._first_order]
        self._carried = relative

    def _absolute(self, fisher: RunningFisher) -> float | None:
        if isinstance(self._given, Relative):
            return self._given.factor * _scale(fisher)
        return None if self._given == "auto" else float(self._given)


def _scale(fisher: RunningFisher) -> float:
    """The mean curvature; 1 where there is none, of which a warning tells."""
    return positive_scale(fisher.gram.diagonal(), fisher.size, fisher.group)
