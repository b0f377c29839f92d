"""When how much is removed."""

from __future__ import annotations


def exponential(now: int, final: int, stages: int) -> list[int]:
    """Weights kept after each of `stages` stages from `now` down to `final`, by one factor a stage.

    >>> exponential(1000, 10, 2)
    [100, 10]
    """
    if final >= now:
        return [now]
    ratio = max(final, 1) / now
    return [round(now * ratio ** (i / stages)) for i in range(1, stages)] + [final]
