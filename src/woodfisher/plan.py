"""What a curvature will take, before any work: where its rows are kept, how much memory, how long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from woodfisher.curvature.base import WORKSPACE
from woodfisher.errors import WoodfisherError
from woodfisher.memory import available_memory, format_bytes, parse_bytes, resident_memory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from woodfisher.curvature.woodfisher import WoodFisher
    from woodfisher.objective import Objective

Keep = Literal["memory", "half", "factors", "disk", "again"]

KEEPS: dict[Keep, str] = {
    "memory": "in memory",
    "half": "in memory, in bfloat16",
    "factors": "in memory, as inputs and output gradients of their layers",
    "disk": "in a temporary file",
    "again": "nowhere: gradients are taken again for each window of weights",
}
"""Where rows can be kept, in words."""

VECTORS = 9
"""Float64 vectors of all weights that are alive at once while weights are scored and moved."""

WINDOW = 256 * 2**20
"""Bytes of rows that are at hand at once where they are kept elsewhere."""

READS = 3
"""Times that the rows are gone through: for the diagonal, the factors and the products of an update."""


@dataclass(frozen=True)
class Machine:
    """What a machine does in a second; `calibrated` measures it.

    Attributes
    ----------
    flops:
        Operations of a float32 matrix product.
    memory, disk:
        Bytes read or written.
    """

    flops: float = 1e11
    memory: float = 5e9
    disk: float = 5e8


@dataclass(frozen=True)
class Plan:
    """How a `WoodFisher` will be estimated.

    Attributes
    ----------
    rows, weights, blocks, block_size:
        N, d, how many blocks, and of how many weights at most.
    keep:
        Where the rows are kept: a key of `KEEPS`.
    hold:
        Whether factors of blocks are held once they are made, or made anew for each product.
    window:
        Columns of the rows at hand at once.
    chunk:
        Bytes that a chunk of samples may take while gradients are gathered.
    base:
        Bytes that the process has already.
    bill:
        What it holds at its peak besides, in words, and bytes.
    memory:
        The budget in bytes; None where there is none.
    flops:
        Operations of factoring and scoring: 3N²d in the dual form, 2NBd + 2B²d in the primal form of blocks of at
        most N weights.
    traffic:
        Bytes of rows that are written and read.
    seconds:
        Expected time by phase, from what the machine measures.
    """

    rows: int
    weights: int
    blocks: int
    block_size: int
    keep: Keep
    hold: bool
    window: int
    chunk: int
    base: int
    bill: tuple[tuple[str, int], ...]
    memory: int | None
    flops: float
    traffic: float
    seconds: Mapping[str, float]

    @property
    def peak(self) -> int:
        """Most bytes that the process will have, what it has already included."""
        return self.base + sum(size for _, size in self.bill)

    def __str__(self) -> str:
        budget = "" if self.memory is None else f" of {format_bytes(self.memory)}"
        bill = [("the process as it is", self.base), *self.bill]
        times = ", ".join(f"{phase} {seconds:.2g} s" for phase, seconds in self.seconds.items())
        width = max(len(what) for what, _ in bill)
        return "\n".join(
            [
                f"{self.rows} gradient rows of {self.weights:,} weights, {self.blocks:,} blocks of at most "
                f"{self.block_size:,}",
                f"rows are kept {KEEPS[self.keep]}; {self.window:,} weights at hand at once",
                f"factors are {'held' if self.hold else 'made again for each product'}",
                f"peak memory {format_bytes(self.peak)}{budget}:",
                *(f"  {what:<{width}}  {format_bytes(size):>9}" for what, size in bill),
                f"{self.flops / 1e9:.3g} GFLOP to factor and score, {format_bytes(self.traffic)} of rows moved",
                f"expected: {times}",
            ]
        )


def plan(objective: Objective, curvature: WoodFisher, memory: str | int | None = None) -> Plan:
    """Where the rows of a curvature would be kept, and what memory and time it would take, without doing it.

    Nothing but one sample of the data is read. Times come from a short calibration on this machine.

    Parameters
    ----------
    objective, curvature:
        What would be estimated, and how.
    memory:
        Bytes that the whole process may have at its peak, as a number or as in `4GiB`; default: `curvature.memory`,
        and what is free.

    Raises
    ------
    WoodfisherError
        If that is not enough; the message says what would do.
    """
    if memory is not None:
        curvature = replace(curvature, memory=memory)
    return planned(objective, curvature, calibrated(objective.device))


def planned(objective: Objective, curvature: WoodFisher, machine: Machine | None = None) -> Plan:
    """The cheapest way that fits; with the nominal rates of a `Machine` where none is given."""
    machine = machine or Machine()
    budget = None if curvature.memory is None else parse_bytes(curvature.memory)
    base = resident_memory(objective.device)
    free = available_memory(objective.device)
    room = free if budget is None else budget - base
    ways = [
        _way(objective, curvature, keep, room, base, budget, machine)
        for keep in _choices(objective, curvature)
    ]
    fitting = [way for way in ways if room is None or way.peak - base <= room]
    if not fitting:
        least = min(ways, key=lambda way: way.peak)
        raise WoodfisherError(_refusal(least, room, budget, base))
    return min(fitting, key=lambda way: sum(way.seconds.values()))


def _choices(objective: Objective, curvature: WoodFisher) -> list[Keep]:
    """Where rows may be kept; bfloat16 rounds them, and is for those who ask for it."""
    if curvature.keep != "auto":
        return [curvature.keep]
    exact: list[Keep] = ["memory", "disk", "again"]
    if objective.factor_floats():
        exact.insert(1, "factors")
    return exact


def _way(
    objective: Objective,
    curvature: WoodFisher,
    keep: Keep,
    room: int | None,
    base: int,
    budget: int | None,
    machine: Machine,
) -> Plan:
    """The plan with the rows kept in one way."""
    d, N = int(objective.kept.sum()), objective.most_rows(curvature.samples, curvature.group)
    runs = curvature.runs(objective)
    size = torch.finfo(objective.dtype).bits // 8
    largest = max((run.size for run in runs), default=0)
    row_bytes = objective.row_bytes(curvature.group)
    spare = room if room is not None else 2**60
    chunk = max(min(objective.workspace, spare // 8), row_bytes)
    vectors = VECTORS * 8 * objective.layout.size
    factors = sum(8 * run.count * min(N, run.size) ** 2 for run in runs)
    scratch = 4 * max(WORKSPACE, 8 * min(N, largest) ** 2)
    floats = objective.factor_floats() or {}
    dense = sum(
        n for name, n in objective.layout.restricted(objective.kept).shapes_sizes() if name not in floats
    )
    stored = {
        "memory": N * d * size,
        "half": N * d * 2,
        "factors": N * size * (sum(floats.values()) + dense),
        "disk": 0,
        "again": 0,
    }[keep]
    left = spare - stored - max(chunk, vectors) - scratch
    elsewhere = keep in ("factors", "disk", "again")
    window = d
    if elsewhere:
        at_hand = max(left, 0) if keep == "again" else min(WINDOW, max(left, 0) // 2)
        window = min(d, max(at_hand // (N * size), min(largest, WORKSPACE // (N * size)), 1))
        left -= window * N * size
    hold = factors <= left
    peak = max(
        (("a chunk of samples with its gradients", chunk), ("", 0)),
        (("vectors of scores and update", vectors), ("factors of blocks", factors if hold else 0)),
        key=lambda phase: sum(bytes_ for _, bytes_ in phase),
    )
    bill = [
        (f"{N} gradient rows of {d:,} weights", stored),
        ("rows at hand", window * N * size if elsewhere else 0),
        *peak,
        ("scratch", scratch),
    ]
    dual = [run for run in runs if run.size > N]
    flops = float(
        sum(3 * N**2 * run.count * run.size for run in dual)
        + sum(2 * (N + run.size) * run.size**2 * run.count for run in runs if run.size <= N)
    )
    passes = READS * -(-d // window) if keep == "again" else 1
    gathering = passes * 3 * objective.forward_flops() * curvature.samples / (0.3 * machine.flops)
    traffic = (1 + READS) * N * d * size
    reading = {
        "memory": traffic / machine.memory,
        "half": traffic / machine.memory,
        "factors": READS * 4 * N * d * _positions(objective) / machine.flops + traffic / 4 / machine.memory,
        "disk": traffic / machine.disk,
        "again": traffic / machine.memory,
    }[keep]
    return Plan(
        rows=N,
        weights=d,
        blocks=sum(run.count for run in runs),
        block_size=largest,
        keep=keep,
        hold=hold,
        window=window,
        chunk=chunk,
        base=base,
        bill=tuple((what, bytes_) for what, bytes_ in bill if bytes_),
        memory=budget,
        flops=flops,
        traffic=float(traffic),
        seconds={"gradients": gathering, "rows": reading, "factor and score": flops / (0.5 * machine.flops)},
    )
