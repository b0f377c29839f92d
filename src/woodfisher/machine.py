"""What this machine does in a second, and so how long work on it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from woodfisher.batches import samples_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from woodfisher.objective import Objective


_PROBE, _PROBE_SECONDS = 64, 0.5
"""What gradients are timed on: so many of the first samples, or as many as may take so long."""


@dataclass(frozen=True)
class Machine:
    """Rates of a machine: `calibrated` measures them, and `nominal` takes them from what is usual.

    Attributes
    ----------
    flops:
        Operations of a float32 matrix product.
    memory, host, disk:
        Bytes copied, brought from main memory to the device, and written to and read from the temporary folder.
    passes:
        Share of `flops` that passes through the model run at.
    """

    flops: float = 1e11
    memory: float = 5e9
    host: float = 1e10
    disk: float = 5e8
    passes: float = 0.3

    @classmethod
    def nominal(cls, device: torch.device) -> Machine:
        """Rates that are usual for a device of that kind: a processor of two cores, or a large GPU."""
        return cls(flops=2e13, memory=1e12) if device.type == "cuda" else cls()

    def products(self, flops: float) -> float:
        """Seconds of so many operations in products and factorisations of blocks of rows."""
        return flops / (0.5 * self.flops)

    def gradients(self, objective: Objective, samples: float) -> float:
        """Seconds of taking gradients of so many samples."""
        return 0.0 if objective.reads_once else self._gradient(objective) * samples

    def samples(self, objective: Objective, seconds: float) -> int:
        """Samples whose gradients take so many seconds, one at least and `_PROBE` at most."""
        each = self._gradient(objective)
        return max(min(int(seconds / each), _PROBE), 1) if each else _PROBE

    def _gradient(self, objective: Objective) -> float:
        """Seconds of a sample's: three times the operations of a forward pass."""
        return 3 * objective.forward_flops() / (self.passes * self.flops)


def calibrated(objective: Objective) -> Machine:
    """Measure a device's rates, as the fastest of five runs after a first one, and that of gradients: some seconds."""
    device = objective.device
    A = torch.ones(1500, 1500, device=device)
    data = torch.empty(2**26, dtype=torch.uint8, device=device)
    product, copy = (
        min([seconds_of(device, work) for _ in range(6)][1:])
        for work in (lambda: A @ A, lambda: data.clone())
    )
    machine = Machine(flops=2 * 1500**3 / product, memory=2 * len(data) / copy)
    first = (
        None if objective.reads_once else objective.first_samples(machine.samples(objective, _PROBE_SECONDS))
    )
    if first is None or not objective.forward_flops():
        return machine
    probe, count = objective.on([first]), samples_in(first)
    seconds = min(seconds_of(device, lambda: probe.gradient(count)) for _ in range(2))
    return replace(machine, passes=machine.passes * machine.gradients(objective, count) / seconds)


def seconds_of(device: torch.device, work: Callable[[], object], times: int = 1) -> float:
    """Wall-clock seconds of `work`, the mean of `times` runs in a row."""
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    _synchronise(device)
    return (time.perf_counter() - start) / times


def _synchronise(device: torch.device) -> None:
    """Wait until `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
