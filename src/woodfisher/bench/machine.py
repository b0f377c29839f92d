"""What a machine can do: its rates, timed; and what a computation takes of it."""

from __future__ import annotations

import ctypes
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from woodfisher.curvature.machine import seconds_of
from woodfisher.memory import peak_memory, resident_memory

if TYPE_CHECKING:
    from collections.abc import Callable

_CLEAR = Path("/proc/self/clear_refs")
"""Writing 5 makes the kernel forget the process's peak."""

_COPIED = 2**25
"""Numbers that the measurement of bandwidth copies, 128 MiB: more than caches hold."""


def order(device: torch.device) -> int:
    """Order of the matrices that tell the rate: large enough for the best rate, over in a fraction of a second."""
    return 2048 if device.type == "cpu" else 8192


class Roofs:
    """Measures the two limits of a machine.

    Parameters
    ----------
    device:
        Where; the buffers stay there until the object goes.

    Attributes
    ----------
    shares:
        Processor time that the process got over what its threads could have had, in each product so far: near one
        where the machine is quiet. Empty on other devices than the processor.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        n = order(device)
        self._A = torch.randn(n, n, device=device)
        self._C = torch.empty_like(self._A)
        self._from = torch.zeros(_COPIED, device=device)
        self._to = torch.empty_like(self._from)
        self.shares: list[float] = []
        self.matrix_rate()
        self.bandwidth()

    @staticmethod
    def size(device: torch.device) -> int:
        """Bytes that the buffers take."""
        return 4 * (2 * order(device) ** 2 + 2 * _COPIED)

    def matrix_rate(self) -> float:
        """FLOP/s of a float32 product of square matrices, now."""
        start = time.process_time()
        seconds = seconds_of(self._device, lambda: torch.mm(self._A, self._A, out=self._C))
        if self._device.type == "cpu":
            self.shares.append((time.process_time() - start) / seconds / torch.get_num_threads())
        return 2 * len(self._A) ** 3 / seconds

    def bandwidth(self) -> float:
        """Bytes/s of a copy, read and written bytes together, now."""
        return 8 * _COPIED / seconds_of(self._device, lambda: self._to.copy_(self._from))


def peak_of(device: torch.device, work: Callable[[], object]) -> int | None:
    """Bytes that `work` takes at most, above what is held before it; None where the system doesn't tell."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if not _CLEAR.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # or memory that was freed earlier, and that the allocator kept, hides what `work` takes
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    before = resident_memory(device)
    work()
    return max(peak_memory() - before, 0)


def repeats(seconds: float, least: float) -> int:
    """Runs in a row that take `least` seconds, from the time of one."""
    return max(1, math.ceil(least / max(seconds, 1e-9)))
