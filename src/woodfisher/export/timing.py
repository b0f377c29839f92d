"""Two ways to compute the same: which is faster here."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.benchmark import Timer

from woodfisher.checks import check_count

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 15
"""Turns that each side gets."""

SECONDS = 0.02
"""Least duration of a turn, which is filled with as many calls."""


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median over the turns, and the quartiles below and above it."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Race:
    """Timings of a dense and of a sparse model that took turns.

    Attributes
    ----------
    dense, sparse:
        Of one call.
    threads:
        That torch computed with.
    """

    dense: Timing
    sparse: Timing
    threads: int

    @property
    def speedup(self) -> float:
        """Dense over sparse time: above 1 where sparse is faster."""
        return self.dense.median / self.sparse.median

    @property
    def won(self) -> bool:
        """Whether sparse is faster beyond the spread: its upper quartile lies below the lower one of dense."""
        return self.sparse.high < self.dense.low

    @property
    def lost(self) -> bool:
        """Whether dense is faster beyond the spread."""
        return self.dense.high < self.sparse.low

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; times in seconds."""
        return {**asdict(self), "speedup": self.speedup}


def race(
    dense: Callable[[], object],
    sparse: Callable[[], object],
    *,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> Race:
    """Time two functions in turns, so that whatever else the machine does hits both.

    It computes without gradients, with as many threads as torch has now. Each gets `rounds` turns, two at least.
    """
    check_count("rounds", rounds, least=2)
    threads = torch.get_num_threads()
    timers = [Timer("call()", globals={"call": call}, num_threads=threads) for call in (dense, sparse)]
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for timer in timers:
            timer.timeit(1)
        counts = [max(1, math.ceil(seconds / timer.timeit(2).mean)) for timer in timers]
        for _ in range(rounds):
            for timer, count, list_ in zip(timers, counts, times, strict=True):
                list_.append(timer.timeit(count).mean)
    return Race(_timing(times[0]), _timing(times[1]), threads)


def _timing(times: list[float]) -> Timing:
    low, _, high = statistics.quantiles(times, n=4)
    return Timing(statistics.median(times), low, high)
