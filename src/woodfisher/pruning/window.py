"""What stages that adapt will take of the data, and what memory the rows take that they carry, before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from woodfisher.curvature.damping import LEAST_ROWS
from woodfisher.curvature.planning import VECTORS
from woodfisher.curvature.prior import bytes_held, widest
from woodfisher.errors import WoodfisherError
from woodfisher.gradients.batches import FORWARD_BATCH
from woodfisher.memory import Budget, Needs
from woodfisher.watch import warn

if TYPE_CHECKING:
    from woodfisher.curvature import WoodFisher
    from woodfisher.curvature.machine import Machine
    from woodfisher.gradients.batches import Stream
    from woodfisher.gradients.objective import Objective
    from woodfisher.pruning.method import Method

MOST_PASSES = 8
"""Passes over the data up to which its gradients are taken for those of new samples."""

ENOUGH = 240_000
"""Samples beyond which more passes than those count for no repetition: who asks for more has chosen so."""

MOST_OPERATIONS = 130_000_000_000
"""Floating-point operations that scoring may take at each stage: about a second on two cores."""

CANDIDATES = 11
"""Float64 vectors of all weights that a run and its ways to take a stage hold at once, at most."""

_PRIOR = "the prior that F shrinks to, before a stage and after it"
_BESIDES = "a chunk of samples with its gradients, or vectors of a stage"

LOSSES = 4
"""Times that a stage usually asks for the held-out loss, besides that of one batch after each move."""

MOVES = 8
"""Parts in which the rows of a stage come, if the gradient has a part: after each the kept weights move."""

_FEWER_STAGES, _FEWER_ROWS = 3, 2
"""Where data is few: what stages are divided by without the gradient, of which more bring little, and rows with it."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What one run takes of the data.

    Attributes
    ----------
    first_order:
        Whether the gradient takes part.
    stages:
        As many are planned.
    rows, group:
        N, which are carried from stage to stage, and the samples that a row averages.
    renewed:
        Rows that are renewed at each stage after the first; fewer where splits add stages.
    among:
        Samples that are looked at, where that is possible, for each one of those rows by which weights move; 1 where
        few samples come again and again.
    shrinks:
        Whether the Fisher shrinks to a prior.
    """

    first_order: bool
    stages: int
    rows: int
    group: int
    renewed: int
    among: int
    shrinks: bool

    @property
    def copies(self) -> int:
        """Of the rows: where F shrinks to a prior there are also their products with its inverse."""
        return _copies(self.shrinks)

    @property
    def moves(self) -> int:
        """How often the kept weights move while the rows of a stage come, from the second stage on."""
        return MOVES if self.first_order else 0

    @property
    def warming(self) -> int:
        """Stages before anything is removed, with the gradient; fewer where they bring nothing."""
        return self.stages // 6 if self.first_order else 0

    @property
    def resting(self) -> int:
        """Stages after targets that remove nothing, with the gradient."""
        return self.stages // 2 if self.first_order else 0

    @property
    def all_rows(self) -> int:
        """Rows that are planned."""
        return self.rows + self.renewed * (self.stages - 1)

    def share(self, to_come: int, stages: int) -> int:
        """Rows to renew at the next of `stages` where of those that are planned so many are still to come.

        With the gradient, which needs new samples, those that split stages took are missing from all that follow, none
        of which renews less than a quarter of what it was to.
        """
        if not self.first_order:
            return self.renewed
        return max(min(self.renewed, to_come // stages), -(-self.renewed // 4))

    @property
    def samples(self) -> int:
        """Samples that it takes gradients of."""
        return self.all_rows * self.group

    @property
    def looked_at(self) -> int:
        """Samples that are looked at to choose among them."""
        return self.among * self.renewed * (self.stages - 1) * self.group if self.among > 1 else 0

    def __str__(self) -> str:
        return (
            f"{self.rows} gradient rows through {self.stages} stages {'with' if self.first_order else 'without'} the "
            f"gradient; {self.renewed} are new at each, and a row averages {self.group} of the samples"
            + (f", chosen among {self.among} times as many" if self.among > 1 else "")
        )


@dataclass(frozen=True, kw_only=True)
class Window(Needs):
    """Runs side by side, of stages that carry their rows along.

    Attributes
    ----------
    weights:
        d, all in one block.
    held_out:
        Samples that stages are checked on, none of which is used for rows.
    courses:
        What each run takes.
    chunk:
        Bytes that a chunk of samples may take while gradients are gathered.
    budget, bill, seconds:
        As of `Needs`; the time is at most so long, as if no weight were removed.
    """

    weights: int
    held_out: int
    courses: tuple[Course, ...]
    chunk: int

    @property
    def samples(self) -> int:
        """Samples that all runs take gradients of."""
        return sum(course.samples for course in self.courses)

    def timed(self, objective: Objective, machine: Machine) -> Window:
        """The same window with the time that it takes on a machine."""
        part = min(self.held_out, FORWARD_BATCH)
        checked = sum((LOSSES * self.held_out + c.moves * part) * c.stages for c in self.courses)
        products = sum(
            c.rows * (c.rows * (c.stages - c.warming - c.resting) + c.renewed * c.stages)
            + (c.copies - 1) * 2 * c.stages * c.rows * (c.rows + widest(objective.layout))
            for c in self.courses
        )
        gradient = machine.gradients(objective, 1)
        seconds = {
            "gradients": gradient * self.samples,
            "factor and score": machine.products(2 * products * self.weights),
            "choice of samples": gradient * sum(course.looked_at for course in self.courses) / 3,
            "checks": gradient * checked / 3,
        }
        return replace(self, seconds=seconds)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.weights:,} weights in one block:",
                *map(str, self.courses),
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

    Where the plan reads data of few samples more than `MOST_PASSES` times there is a run with the gradient, of fewer
    rows, and one without, of fewer stages, which share the samples. There are as many rows as scoring may take, the
    data has and the memory holds; raises where that has room for fewer than `LEAST_ROWS` a run. Unless it may `look` at
    samples, it knows less of them than it could.
    """
    if not known:
        raise WoodfisherError("the data holds no batch; samples for rows and to check on are needed.")
    if known < 2:
        raise WoodfisherError(
            f"stages that adapt hold out samples to check on, and the data has {known}: give 2 at least, or "
            "a number of stages."
        )
    options, curvature = method.adaptive
    kinds = _Kind.all_of(method, known, reads_once=reads_once)
    held_out = min(options.held_out, max(known // 5, 1))
    samples = known - held_out
    weights = int(objective.kept.sum())
    affordable = math.isqrt(MOST_OPERATIONS // max(2 * weights, 1))
    planned = max(min(options.window, affordable), 1)
    shares = [kind.copies / kind.cut for kind in kinds]
    shrinks = any(kind.shrinks for kind in kinds)
    held = bytes_held(objective.layout, weights, objective.dtype.itemsize) if shrinks else 0
    room = _Room.of(
        objective,
        curvature,
        weights,
        planned,
        copies=sum(shares) + max(shares),
        held=held,
        least=min(planned, LEAST_ROWS * max(kind.cut for kind in kinds)),
    )
    most = min(planned, room.rows)
    if room.budget.limit is None and most < min(planned, samples):
        warn(
            f"the free memory has room for {most} gradient rows of {weights} weights, and {planned} were planned: the "
            "Fisher is made of fewer."
        )
    courses = tuple(kind.course(method, samples, most, len(kinds)) for kind in kinds)
    largest = max(courses, key=lambda course: course.rows)
    row = objective.dtype.itemsize * weights
    chunk = room.chunk
    if look and not objective.reads_once:
        chunk = min(chunk, largest.rows * (2 * objective.row_bytes(largest.group) + 2 * row))
    rows = [course.rows for course in courses]
    copies = [course.copies * course.rows for course in courses]
    with_copies = " with their copies" if held else ""
    bill = [
        (f"{sum(rows)} gradient rows of {weights} weights{with_copies}", sum(copies) * row),
        ("a copy of theirs while a stage is tried", max(copies) * row),
        *[(_PRIOR, held)] * shrinks,
        ("Gram matrices", 2 * 8 * sum(count**2 for count in [*rows, largest.rows])),
        (_BESIDES, max(chunk, room.vectors)),
    ]
    return Window(
        weights=weights,
        held_out=held_out,
        courses=courses,
        chunk=chunk,
        budget=room.budget,
        bill=tuple(bill),
    )


def _copies(shrinks: bool) -> int:
    return 2 if shrinks else 1


@dataclass(frozen=True)
class _Kind:
    """One of the runs side by side, before it is known what the memory has room for.

    Attributes
    ----------
    first_order, shrinks:
        As of `Course`.
    cut, slowed:
        What rows are divided by, and stages.
    chooses:
        Whether the samples by which weights move are chosen among more of them.
    """

    first_order: bool
    shrinks: bool
    cut: int = 1
    slowed: int = 1
    chooses: bool = False

    @classmethod
    def all_of(cls, method: Method, known: int, *, reads_once: bool) -> list[_Kind]:
        """Those that a method takes on data of so many samples."""
        curvature = method.adaptive[1]
        repeats = min(curvature.samples, ENOUGH) > MOST_PASSES * known and not reads_once
        prior = not (reads_once or method.pattern.whole_outputs)
        without = cls(False, prior, slowed=_FEWER_STAGES if repeats else 1)
        chooses = curvature.labels == "data" and not (reads_once or repeats)
        if method.first_order != "auto" or not repeats:
            with_it = cls(True, False, chooses=chooses)
            return [with_it if method.first_order else without]
        return [cls(True, False, cut=_FEWER_ROWS), without]

    @property
    def copies(self) -> int:
        return _copies(self.shrinks)

    def course(self, method: Method, samples: int, rows: int, runs: int) -> Course:
        """What a run of this kind takes of `samples`, as one of several, where there is room for so many rows."""
        options, curvature = method.adaptive
        stages = -(-options.stages // self.slowed)
        rows = max(rows // self.cut, 1)
        group = max(g for g in _divisors(curvature.group) if g == 1 or g * rows <= samples)
        asked = curvature.samples // runs // group
        rows = max(min(rows, samples // group, asked), 1)
        return Course(
            first_order=self.first_order,
            stages=stages,
            rows=rows,
            group=group,
            renewed=min(max((asked - rows) // stages, 1), rows),
            among=options.among if self.chooses else 1,
            shrinks=self.shrinks,
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
        cls,
        objective: Objective,
        curvature: WoodFisher,
        weights: int,
        planned: int,
        *,
        copies: float,
        held: int,
        least: int,
    ) -> _Room:
        """For `copies` of `planned` rows of `weights` weights, and `held` bytes; raises where not `least` rows fit."""
        each = math.ceil(copies * (objective.dtype.itemsize * weights + 2 * 8 * planned))
        vectors = (VECTORS + CANDIDATES) * 8 * objective.layout.size
        budget = Budget.of(objective.device, curvature.memory, base=objective.base)
        if budget.room is None:
            return cls(budget, planned, objective.workspace, vectors)
        chunk = max(min(objective.workspace, budget.room // 6), 0)
        rows = max(budget.room - max(chunk, vectors) - held, 0) // each
        if rows < least:
            needed = least * each
            besides = max(vectors, min(objective.workspace, (needed + held) // 5 + 1))
            rows_bill = (f"{least} gradient rows of {weights} weights with their copies", needed)
            raise budget.refusal_after_trying(
                [rows_bill, *[(_PRIOR, held)] * (held > 0), (_BESIDES, besides)],
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
    options, curvature = method.adaptive
    first = options.held_out + options.window * curvature.group
    passes = 0 if reads_once else -(-min(curvature.samples, ENOUGH) // MOST_PASSES)
    return max(5 * options.held_out, first, passes)


def _divisors(number: int) -> list[int]:
    """All of them; a group that divides another one fills batches that hold whole groups of that."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
