"""Several measurements of one thing."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """The values that repetitions gave, in their order; never empty.

    >>> Spread((3.0, 1.0, 2.0)).median
    2.0
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The value in the middle."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"median": self.median, "low": self.low, "high": self.high, "values": list(self.values)}
