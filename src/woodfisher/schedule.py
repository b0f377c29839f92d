"""When how much is removed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


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
