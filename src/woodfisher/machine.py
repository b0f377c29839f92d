"""What this machine does in a second, and so how long work on it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from woodfisher.objective import Objective


@dataclass(frozen=True)
class Machine:
    """Rates of a machine: `calibrated` measures them, and `nominal` takes them from what is usual.

    Attributes
    ----------
    flops:
        Operations of a float32 matrix product.
    memory, host, disk:
        Bytes copied, brought from main memory to the device, and written to and read from the temporary folder.
    """

    flops: float = 1e11
    memory: float = 5e9
    host: float = 1e10
    disk: float = 5e8

    @classmethod
    def nominal(cls, device: torch.device) -> Machine:
        """Rates that are usual for a device of that kind: a processor of two cores, or a large GPU."""
        return cls(flops=2e13, memory=1e12) if device.type == "cuda" else cls()

    def gradients(self, objective: Objective, samples: float) -> float:
        """Seconds of taking gradients of so many samples: three times the operations of a forward pass."""
        return 0.0 if objective.reads_once else 3 * objective.forward_flops() * samples / (0.3 * self.flops)


def calibrated(device: torch.device) -> Machine:
    """Measure a device's rates: about a second."""
    A = torch.ones(1500, 1500, device=device)
    data = torch.empty(2**26, dtype=torch.uint8, device=device)
    product = _fastest(lambda: A @ A, device)
    copy = _fastest(lambda: data.clone(), device)
    return Machine(flops=2 * 1500**3 / product, memory=2 * len(data) / copy)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Least seconds of five runs after a first one."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
