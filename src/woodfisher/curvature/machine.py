"""What this machine does in a second, and so how long work on it takes."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from woodfisher.gradients.batches import samples_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from woodfisher.gradients.base import Gradients
    from woodfisher.gradients.objective import Objective


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

    def gradients(self, objective: Gradients, samples: float) -> float:
        """Seconds of taking gradients of so many samples."""
        return _gradient_flops(objective) * samples / (self.passes * self.flops)


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
    return replace(machine, passes=_measured_passes(objective, machine))


def _measured_passes(objective: Objective, machine: Machine) -> float:
    """`passes` as the first samples have it; what it is on `machine` where none can be read or counted."""
    each = _gradient_flops(objective)
    if not each:
        return machine.passes
    most = int(_PROBE_SECONDS * machine.passes * machine.flops / each)
    first = objective.first_samples(max(min(most, _PROBE), 1))
    assert first is not None  # its operations were counted
    probe, count = objective.on([first]), samples_in(first)
    seconds = min(seconds_of(objective.device, lambda: probe.gradient(count)) for _ in range(2))
    return each * count / (seconds * machine.flops)


def _gradient_flops(objective: Gradients) -> int:
    """Operations of a sample's gradient, three times those of its forward pass; 0 for data that is read only once."""
    return 0 if objective.reads_once else 3 * objective.forward_flops()


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
