"""What a curvature will take, before any work: where its rows are kept, how much memory, how long."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch

from woodfisher.curvature.base import WORKSPACE
from woodfisher.curvature.blocks import operations
from woodfisher.curvature.machine import Machine
from woodfisher.curvature.rows import disk_room
from woodfisher.errors import WoodfisherError
from woodfisher.memory import Budget, Needs, available_memory, format_bytes

if TYPE_CHECKING:
    from woodfisher.curvature.woodfisher import WoodFisher
    from woodfisher.gradients.base import Gradients
    from woodfisher.gradients.layer_rows import Factors
    from woodfisher.gradients.layout import Run

Keep = Literal["memory", "half", "factors", "host", "disk", "again"]

KEEPS: dict[Keep, str] = {
    "memory": "in memory",
    "half": "in memory, in bfloat16",
    "factors": "in memory, as inputs and output gradients of their layers",
    "host": "in main memory, from where windows of them come to the device while it works",
    "disk": "in a temporary file",
    "again": "nowhere: gradients are taken again for each window of weights",
}
"""Where rows can be kept, in words."""

SMALL = 2**30
"""Bytes of rows that are kept in memory without asking what else there is, where they fit."""

VECTORS = 9
"""Float64 vectors of all weights that are alive at once while weights are scored and moved."""

WINDOW = 256 * 2**20
"""Bytes of rows that are at hand at once where they are kept elsewhere."""

TILE = 64 * 2**20
"""Bytes that factors take while they are made, where they are not held."""

READS = 3
"""Times that the rows are gone through: for the diagonal, the factors and the products of an update."""


@dataclass(frozen=True, kw_only=True)
class Plan(Needs):
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
        Columns of the rows that are at hand at once.
    chunk:
        Bytes that a chunk of samples may take while gradients are gathered.
    flops:
        Of factoring and scoring, as `blocks.operations` counts them.
    traffic:
        Bytes of rows that are written and read.
    budget, bill, seconds:
        As of `Needs`.
    """

    rows: int
    weights: int
    blocks: int
    block_size: int
    keep: Keep
    hold: bool
    window: int
    chunk: int
    flops: float
    traffic: float

    def tile(self, run: Run) -> int:
        """Blocks of a run that are factored together: all of it where factors are held."""
        if self.hold:
            return run.count
        factors = 3 * 8 * min(self.rows, run.size) ** 2
        return max(min(self.window // run.size, TILE // factors), 1)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.rows} gradient rows of {self.weights:,} weights, {self.blocks:,} "
                f"block{'s' * (self.blocks > 1)} of at most {self.block_size:,}",
                f"rows are kept {KEEPS[self.keep]}; {self.window:,} weights are at hand at once",
                f"factors are {'held' if self.hold else 'made again for each product'}",
                f"{self.flops / 1e9:.3g} GFLOP to factor and score, {format_bytes(self.traffic)} of rows moved",
                *self.lines(),
            ]
        )


def planned(objective: Gradients, curvature: WoodFisher, machine: Machine | None = None) -> Plan:
    """The cheapest way that fits; rates are nominal where no machine is given."""
    work = _Work(objective, curvature, machine or Machine.nominal(objective.device))
    if curvature.keep != "auto":
        work.check(curvature.keep)
        ways = [work.way(curvature.keep)]
    else:
        small = work.dense <= SMALL
        held = work.way("memory", look=machine is not None or not small)
        if small and work.budget.holds(held.bill):
            return held
        ways = [work.way(keep) for keep in ("memory", *work.alternatives())]
    fitting = [way for way in ways if work.budget.holds(way.bill)]
    if not fitting:
        raise work.budget.refusal_after_trying(
            min(ways, key=lambda way: way.peak).bill,
            "take fewer samples, smaller blocks, or average several samples into a row (group)",
        )
    return min(fitting, key=lambda way: sum(way.seconds.values()))


class _Work:
    """What there is to do, and to do it with.

    Parameters
    ----------
    objective, curvature, machine:
        As for `planned`.
    """

    def __init__(self, objective: Gradients, curvature: WoodFisher, machine: Machine) -> None:
        self.objective, self.curvature, self.machine = objective, curvature, machine
        self.runs: list[Run] = curvature.runs(objective)
        self.weights = int(objective.kept.sum())
        self.rows = objective.most_rows(curvature.samples, curvature.group)
        if not self.rows:
            known = objective.known_samples()
            raise WoodfisherError(
                f"a row averages {curvature.group} samples, and there are {min(curvature.samples, known or 0)}: give "
                "more data or a smaller group."
            )
        self.item = objective.dtype.itemsize
        self.dense = self.rows * self.weights * self.item
        self.budget = Budget.of(
            objective.device, curvature.memory, base=objective.base, share=objective.ranks.local_size
        )
        self.room = self.budget.room

    def check(self, keep: Keep) -> None:
        """Raise where rows can't be kept so, whatever memory there is."""
        if keep == "again" and self.objective.reads_once:
            raise WoodfisherError(
                "keep='again' takes gradients several times, and the data can be read only once: give a list of "
                "batches or a DataLoader."
            )
        if keep == "host" and not self._can_stream:
            raise WoodfisherError(
                "keep='host' brings rows from main memory to a GPU, and the model is on "
                f"{self.objective.device}: keep them in memory."
            )
        if keep == "factors" and not self._all_factors:
            raise WoodfisherError(
                "keep='factors' needs weights whose rows can be had in factor form: those of Linear, convolution, "
                "recurrent and attention layers that are called once for a batch, on data that can be read again. Not "
                "all chosen ones are: leave the others out with exclude=, or keep rows elsewhere."
            )

    def alternatives(self) -> list[Keep]:
        """Where else exact rows can be kept."""
        others: list[Keep] = []
        if not self.objective.reads_once and self.objective.ranks.size == 1:
            others.append("again")  # for each window all ranks would have to gather together
        if self._all_factors:
            others.append("factors")
        if self._can_stream and self.dense <= (available_memory(torch.device("cpu")) or 0):
            others.append("host")
        if self.dense <= disk_room():
            others.append("disk")
        return others

    @property
    def _can_stream(self) -> bool:
        return self.objective.device.type == "cuda"

    @cached_property
    def _factors(self) -> dict[str, Factors]:
        return self.objective.factors(self.curvature.group)

    @cached_property
    def _row_bytes(self) -> int:
        return self.objective.row_bytes(self.curvature.group)

    @property
    def _all_factors(self) -> bool:
        return self._factors.keys() == self.objective.layout.shapes.keys()

    def way(self, keep: Keep, *, look: bool = True) -> Plan:
        """The plan with the rows kept so; unless it may `look` at samples, it knows less of them than it could."""
        N, d = self.rows, self.weights
        kept = self._kept(keep)
        vectors = VECTORS * 8 * self.objective.layout.size
        largest = max((run.size for run in self.runs), default=0)
        scratch = min(TILE, 8 * N * d) + 8 * max(min(WORKSPACE, 8 * N * d), 8 * min(N, largest) ** 2)
        if keep == "factors":
            scratch += N * self.item * max((each.unfolded for each in self._factors.values()), default=0)
        left = (2**62 if self.room is None else self.room) - kept - scratch
        chunk = self._chunk(look, left - self._at_hand(keep, self._window(keep, 0, largest)))
        window = self._window(keep, left - max(chunk, vectors), largest)
        at_hand = self._at_hand(keep, window)
        factors = sum(8 * run.count * min(N, run.size) ** 2 for run in self.runs)
        hold = factors <= left - at_hand - vectors
        gathering = [("a chunk of samples with its gradients", chunk)]
        pruning = [("vectors of scores and update", vectors), ("factors of blocks", factors * hold)]
        bill = [
            (f"{N} gradient rows of {d} weights", kept),
            ("rows at hand", at_hand),
            *max(gathering, pruning, key=lambda phase: sum(size for _, size in phase)),
            ("scratch", scratch),
        ]
        flops = sum(operations(N, run.size, run.count * run.size) for run in self.runs)
        auto = self.curvature.damping == "auto"
        traffic = (1 + READS) * self.dense
        return Plan(
            rows=N,
            weights=d,
            blocks=sum(run.count for run in self.runs),
            block_size=largest,
            keep=keep,
            hold=hold,
            window=window,
            chunk=chunk,
            budget=self.budget,
            bill=tuple((what, size) for what, size in bill if size),
            flops=float(flops),
            traffic=float(traffic),
            seconds={
                "gradients": self._passes(keep, window) * self._gathering if look else 0.0,
                "rows": self._reading(keep, traffic),
                "damping": self.machine.products(2 * N**2 * d * auto),
                "factor and score": self.machine.products(flops),
            },
        )

    def _kept(self, keep: Keep) -> int:
        if keep == "factors":
            floats = sum(each.floats for each in self._factors.values())
            return self.rows * self.objective.flow_itemsize * floats
        return {"memory": self.dense, "half": self.dense * 2 // self.item}.get(keep, 0)

    def _chunk(self, look: bool, left: int) -> int:
        """Bytes for a chunk of samples: a share of what there is and no more than is left, but a row at least."""
        most = self.objective.workspace
        if self.room is not None:
            most = max(min(most, self.room // 6, left), 0)
        if self.objective.reads_once or not look:
            return most
        each = 2 * self._row_bytes
        whole = (each + 2 * self.weights * self.item) * self.rows
        return max(min(most, whole), each)

    def _window(self, keep: Keep, left: int, largest: int) -> int:
        if keep in ("memory", "half"):
            return self.weights
        most = left if keep == "again" else min(WINDOW, left // (4 if keep == "host" else 2))
        column = max(self.rows * self.item, 1)
        least = max(min(largest, WORKSPACE // column), 1)
        return min(max(most // column, least), self.weights)

    def _at_hand(self, keep: Keep, window: int) -> int:
        """Bytes of the rows of a window, and of the next one where that is on its way."""
        if window == self.weights and keep in ("memory", "half"):
            return 0
        return window * self.rows * self.item * (2 if keep == "host" else 1)

    def _passes(self, keep: Keep, window: int) -> int:
        return READS * -(-self.weights // window) if keep == "again" and window else 1

    @cached_property
    def _gathering(self) -> float:
        """Seconds of taking all gradients once."""
        return self.machine.gradients(self.objective, self.rows * self.curvature.group)

    def _reading(self, keep: Keep, traffic: float) -> float:
        if keep in ("disk", "host"):
            return traffic / (self.machine.disk if keep == "disk" else self.machine.host)
        seconds = traffic / self.machine.memory
        if keep == "factors":
            flops = READS * self.rows * sum(each.flops for each in self._factors.values())
            seconds = seconds / 4 + flops / self.machine.flops
        return seconds
