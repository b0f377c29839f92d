"""What stages that adapt will take of the data, and what memory the rows take that they carry, before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from woodfisher.curvature.damping import LEAST_ROWS
from woodfisher.errors import WoodfisherError
from woodfisher.memory import Budget, Needs
from woodfisher.planning import VECTORS
from woodfisher.watch import warn

if TYPE_CHECKING:
    from woodfisher.adaptive import Adaptive
    from woodfisher.batches import Stream
    from woodfisher.curvature import WoodFisher
    from woodfisher.machine import Machine
    from woodfisher.method import Method
    from woodfisher.objective import Objective

MOST_PASSES = 8
"""Passes over the data up to which its gradients are taken for those of new samples."""

ENOUGH = 240_000
"""Samples beyond which more passes than those count for no repetition: who asks for more has chosen so."""

MOST_OPERATIONS = 130_000_000_000
"""Floating-point operations that scoring may take at each stage: about a second on two cores."""

CANDIDATES = 10
"""Float64 vectors of all weights that ways to take a stage hold at once, at most."""

_BESIDES = "a chunk of samples with its gradients, or vectors of a stage"

LOSSES = 4
"""Times that a stage usually asks for the loss on the held-out samples."""


@dataclass(frozen=True, kw_only=True)
class Window(Needs):
    """Rows that are carried from stage to stage.

    Attributes
    ----------
    weights, rows, group:
        d, N, and the samples that a row averages.
    held_out:
        Samples that stages are checked on, none of which is used for rows.
    orders:
        Whether the gradient takes part, for each of the runs that are made side by side.
    stages:
        Planned stages of each of them.
    renewed:
        Rows that are renewed at each stage after the first.
    chunk:
        Bytes that a chunk of samples may take while gradients are gathered.
    budget, bill, seconds:
        As of `Needs`; the time is at most so long, as if no weight were removed.
    """

    weights: int
    rows: int
    group: int
    held_out: int
    orders: tuple[bool, ...]
    stages: int
    renewed: int
    chunk: int

    @property
    def samples(self) -> int:
        """Samples that all runs take gradients of."""
        return len(self.orders) * (self.rows + self.renewed * (self.stages - 1)) * self.group

    def timed(self, objective: Objective, machine: Machine) -> Window:
        """The same window with the time that it takes on a machine."""
        stages = self.stages * len(self.orders)
        flops = 2 * self.rows * (self.rows + self.renewed) * self.weights * stages
        seconds = {
            "gradients": machine.gradients(objective, self.samples),
            "factor and score": flops / (0.5 * machine.flops),
            "checks": machine.gradients(objective, LOSSES * stages * self.held_out / 3),
        }
        return replace(self, seconds=seconds)

    def __str__(self) -> str:
        runs = ", with the gradient and without it" if len(self.orders) > 1 else ""
        return "\n".join(
            [
                f"{self.rows} gradient rows of {self.weights:,} weights in one block, carried through {self.stages} "
                f"stages{runs}; {self.renewed} are new at each, and a row averages {self.group} of the samples",
                f"{self.samples:,} sample gradients in all; stages are checked on {self.held_out} held-out samples",
                "rows are kept in memory",
                *self.lines(),
                "(times as if no weight were removed)",
            ]
        )


def window_for(
    objective: Objective, method: Method, known: int, *, reads_once: bool = False, look: bool = False
) -> Window:
    """The window of a method whose stages adapt, on data of `known` samples as far as it matters.

    Where the plan reads data of few samples more than `MOST_PASSES` times there is a run with the gradient and one
    without, each with half of the samples and rows. There are as many rows as scoring may take, the data has and the
    memory holds; raises where that has room for fewer than `LEAST_ROWS`. Unless it may `look` at samples, it knows less
    of them than it could.
    """
    if not known:
        raise WoodfisherError("the data holds no batch; samples for rows and to check on are needed.")
    if known < 2:
        raise WoodfisherError(
            f"stages that adapt hold out samples to check on, and the data has {known}: give 2 at least, or "
            "a number of stages."
        )
    options, curvature = cast("Adaptive", method.staging), cast("WoodFisher", method.curvature)
    repeats = min(curvature.samples, ENOUGH) > MOST_PASSES * known and not reads_once
    orders = (True, False) if repeats else (True,)
    if method.first_order != "auto":
        orders = (method.first_order,)
    held_out = min(options.held_out, max(known // 5, 1))
    samples = known - held_out
    weights = int(objective.kept.sum())
    affordable = math.isqrt(MOST_OPERATIONS // max(2 * weights, 1))
    planned = max(min(options.window // len(orders), affordable), 1)
    room = _Room.of(objective, curvature, weights, planned, runs=len(orders))
    most = min(planned, room.rows)
    if room.budget.limit is None and most < min(planned, samples):
        warn(
            f"the free memory has room for {most} gradient rows of {weights} weights, and {planned} were planned: the "
            "Fisher is made of fewer."
        )

    group = max(g for g in _divisors(curvature.group) if g == 1 or g * most <= samples)
    asked = curvature.samples // len(orders) // group
    rows = max(min(most, samples // group, asked), 1)
    row = objective.dtype.itemsize * weights
    chunk = room.chunk
    if look and not objective.reads_once:
        chunk = min(chunk, rows * (2 * objective.row_bytes(group) + 2 * row))
    bill = [
        (f"{rows} gradient rows of {weights} weights", len(orders) * rows * row),
        ("their copy while a stage is tried", rows * row),
        ("Gram matrices", (len(orders) + 1) * 2 * 8 * rows**2),
        (_BESIDES, max(chunk, room.vectors)),
    ]
    return Window(
        weights=weights,
        rows=rows,
        group=group,
        held_out=held_out,
        orders=orders,
        stages=options.stages,
        renewed=min(max(max(asked - rows, 0) // options.stages, 1), rows),
        chunk=chunk,
        budget=room.budget,
        bill=tuple(bill),
    )


@dataclass(frozen=True)
class _Room:
    """What memory has room for.

    Attributes
    ----------
    budget:
        The memory.
    rows:
        Gradient rows that fit, with all that comes with them.
    chunk, vectors:
        Bytes for a chunk of samples with its gradients, and for vectors of all weights.
    """

    budget: Budget
    rows: int
    chunk: int
    vectors: int

    @classmethod
    def of(
        cls, objective: Objective, curvature: WoodFisher, weights: int, planned: int, *, runs: int
    ) -> _Room:
        """For `planned` rows of `weights` weights; raises where not even `LEAST_ROWS` of them fit."""
        each = (runs + 1) * (objective.dtype.itemsize * weights + 2 * 8 * planned)
        vectors = (VECTORS + CANDIDATES) * 8 * objective.layout.size
        budget = Budget.of(objective.device, curvature.memory, base=objective.base)
        if budget.room is None:
            return cls(budget, planned, objective.workspace, vectors)
        chunk = max(min(objective.workspace, budget.room // 6), 0)
        rows = max(budget.room - max(chunk, vectors), 0) // each
        least = min(planned, LEAST_ROWS)
        if rows < least:
            needed = least * each
            besides = max(vectors, min(objective.workspace, needed // 5 + 1))
            rows_bill = (f"{least} gradient rows of {weights} weights with their copies", needed)
            raise budget.refusal(
                [rows_bill, (_BESIDES, besides)],
                "take a number of stages in blocks (criterion='woodfisher-block')",
            )
        return cls(budget, rows, chunk, vectors)


def known_samples(objective: Objective, method: Method, stream: Stream) -> int:
    """How many samples the data has, as far as it matters: counted where it doesn't tell."""
    return objective.known_samples() or stream.count(
        samples_that_matter(method, reads_once=stream.reads_once)
    )


def samples_that_matter(method: Method, *, reads_once: bool) -> int:
    """Samples above which it makes no difference how many the data has."""
    options, curvature = cast("Adaptive", method.staging), cast("WoodFisher", method.curvature)
    first = options.held_out + options.window * curvature.group
    passes = 0 if reads_once else -(-min(curvature.samples, ENOUGH) // MOST_PASSES)
    return max(5 * options.held_out, first, passes)


def _divisors(number: int) -> list[int]:
    """All of them; a group that divides another one fills batches that hold whole groups of that."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
