"""What stages that adapt will take of the data, and what memory the rows take that they carry, before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from woodfisher.curvature.damping import LEAST_ROWS
from woodfisher.errors import WoodfisherError
from woodfisher.memory import available_memory, format_bytes, parse_bytes, resident_memory
from woodfisher.planning import VECTORS, bill_lines, gradient_seconds
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from woodfisher.adaptive import Adaptive
    from woodfisher.curvature import WoodFisher
    from woodfisher.method import Method
    from woodfisher.objective import Objective
    from woodfisher.planning import Machine

MOST_PASSES = 8
"""Passes over the data up to which its gradients are taken for those of new samples."""

MOST_OPERATIONS = 130_000_000_000
"""Floating-point operations that scoring may take at each stage: about a second on two cores."""

CANDIDATES = 10
"""Float64 vectors of all weights that ways to take a stage hold at once, at most."""

LOSSES = 4
"""Times that a stage usually asks for the loss on the held-out samples."""


@dataclass(frozen=True)
class Window:
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
    base:
        Bytes that the process has already.
    bill:
        What it holds besides at its peak, in words, and bytes.
    memory:
        The budget in bytes; None where there is none.
    """

    weights: int
    rows: int
    group: int
    held_out: int
    orders: tuple[bool, ...]
    stages: int
    renewed: int
    chunk: int
    base: int
    bill: tuple[tuple[str, int], ...]
    memory: int | None

    @property
    def peak(self) -> int:
        """Most bytes that the process will have, what it has already included."""
        return self.base + sum(size for _, size in self.bill)

    @property
    def samples(self) -> int:
        """Samples that all runs take gradients of."""
        return len(self.orders) * (self.rows + self.renewed * (self.stages - 1)) * self.group

    def seconds(self, objective: Objective, machine: Machine) -> dict[str, float]:
        """Expected time by phase, at most: as if no weight were removed."""
        stages = self.stages * len(self.orders)
        flops = 2 * self.rows * (self.rows + self.renewed) * self.weights * stages
        checks = LOSSES * stages * self.held_out / 3
        return {
            "gradients": gradient_seconds(objective, self.samples, machine),
            "factor and score": flops / (0.5 * machine.flops),
            "checks": gradient_seconds(objective, checks, machine),
        }

    def text(self, seconds: Mapping[str, float]) -> str:
        """In words, with the times that it will take."""
        runs = ", with the gradient and without it" if len(self.orders) > 1 else ""
        times = ", ".join(f"{phase} {value:.2g} s" for phase, value in seconds.items())
        return "\n".join(
            [
                f"{self.rows} gradient rows of {self.weights:,} weights in one block, carried through {self.stages} "
                f"stages{runs}; {self.renewed} are new at each, and a row averages {self.group} of the samples",
                f"{self.samples:,} sample gradients in all; stages are checked on {self.held_out} held-out samples",
                "rows are kept in memory",
                *bill_lines(self.base, self.bill, self.memory),
                f"expected, at most: {times}",
            ]
        )


def window_for(objective: Objective, method: Method, known: int, *, look: bool = False) -> Window:
    """The window of a method whose stages adapt, on data of `known` samples as far as it matters.

    Where the plan reads the data more than `MOST_PASSES` times there is a run with the gradient and one without, in a
    fifth of the stages. There are as many rows as scoring may take, the data has and the memory holds; raises where
    that has room for fewer than `LEAST_ROWS`. Unless it may `look` at samples, it knows less of them than it could.
    """
    options, curvature = cast("Adaptive", method.staging), cast("WoodFisher", method.curvature)
    repeats = curvature.samples > MOST_PASSES * known and not objective.reads_once
    stages = -(-options.stages // 5) if repeats else options.stages
    orders = (True, False) if repeats else (True,)
    if method.first_order != "auto":
        orders = (method.first_order,)
    held_out = min(options.held_out, max(known // 5, 1))
    samples = known - held_out
    weights = int(objective.kept.sum())
    affordable = math.isqrt(MOST_OPERATIONS // max(2 * weights, 1))
    most = max(min(options.window, affordable), 1)
    row = objective.dtype.itemsize * weights
    each = (len(orders) + 1) * (row + 2 * 8 * most)
    vectors = (VECTORS + CANDIDATES) * 8 * objective.layout.size

    budget = None if curvature.memory is None else parse_bytes(curvature.memory)
    base = resident_memory(objective.device) if objective.base is None else objective.base
    room = available_memory(objective.device) if budget is None else budget - base
    chunk = objective.workspace
    if room is not None:
        chunk = max(min(chunk, room // 6), 0)
        fitting = max(room - max(chunk, vectors), 0) // each
        least = min(most, LEAST_ROWS)
        if fitting < least:
            needed = least * each
            enough = max(needed + vectors, min(needed + objective.workspace, -(-needed * 6 // 5)))
            has = (
                f"{format_bytes(room)} is available"
                if budget is None
                else f"memory={format_bytes(budget)} came"
            )
            raise WoodfisherError(
                f"stages that adapt carry {least} gradient rows of {weights} weights at least, and their copies. That "
                f"makes {format_bytes(base + enough, enough=True)} with what the process has, and {has}: give more, or "
                "take a number of stages in blocks (criterion='woodfisher-block')."
            )
        if budget is None and fitting < min(most, samples):
            warn(
                f"the free memory has room for {fitting} gradient rows of {weights} weights, and {most} were planned: "
                "the Fisher is made of fewer."
            )
        most = min(most, fitting)

    group = max(g for g in _divisors(curvature.group) if g == 1 or g * most <= samples)
    asked = curvature.samples // group
    rows = max(min(most, samples // group, asked), 1)
    if look and not objective.reads_once:
        chunk = min(chunk, rows * (2 * objective.row_bytes(group) + 2 * row))
    bill = [
        (f"{rows} gradient rows of {weights} weights", len(orders) * rows * row),
        ("their copy while a stage is tried", rows * row),
        ("Gram matrices", (len(orders) + 1) * 2 * 8 * rows**2),
        ("a chunk of samples with its gradients, or vectors of a stage", max(chunk, vectors)),
    ]
    return Window(
        weights=weights,
        rows=rows,
        group=group,
        held_out=held_out,
        orders=orders,
        stages=stages,
        renewed=min(max(max(asked - rows, 0) // stages, 1), rows),
        chunk=chunk,
        base=base,
        bill=tuple(bill),
        memory=budget,
    )


def samples_that_matter(method: Method, *, reads_once: bool) -> int:
    """Samples above which it makes no difference how many the data has."""
    options, curvature = cast("Adaptive", method.staging), cast("WoodFisher", method.curvature)
    first = options.held_out + options.window * curvature.group
    passes = 0 if reads_once else -(-curvature.samples // MOST_PASSES)
    return max(5 * options.held_out, first, passes)


def _divisors(number: int) -> list[int]:
    """All of them; a group that divides another one fills batches that hold whole groups of that."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
