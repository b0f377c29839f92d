"""One run of stages that are checked on held-out samples: how far to trust the quadratic, and at which damping."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from woodfisher.curvature.base import over_all
from woodfisher.curvature.carried import CarriedDamping
from woodfisher.curvature.prior import Prior, RestrictedPrior
from woodfisher.curvature.running import PlainFisher, RunningFisher, ShrunkFisher
from woodfisher.errors import WoodfisherError
from woodfisher.gradients.importance import Important
from woodfisher.gradients.normalisation import recalibrated
from woodfisher.gradients.randomness import move_on
from woodfisher.pruning.averages import MeanGradient, MeanPlace
from woodfisher.pruning.report import Stage
from woodfisher.pruning.schedule import through, with_rests
from woodfisher.surgeon.saliency import newton_point
from woodfisher.watch import phase, report_progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from woodfisher.curvature.base import InverseOperator
    from woodfisher.gradients.batches import Stream
    from woodfisher.gradients.objective import Objective
    from woodfisher.pruning.held_out import HeldOut
    from woodfisher.pruning.method import Method
    from woodfisher.pruning.window import Course
    from woodfisher.surgeon.selection import Selection

_TOLERANCE = 1.02
"""Ratio by which a stage may raise the loss before leaving the kept weights where they are is tried too."""

_FIRST_SHARE = 0.5
"""Share of the way that a first stage with the gradient goes, if it removes nothing. What damping is best for the whole
way depends on noise, and is often too large for the small moves that follow."""

_FALL, _PATIENCE = 0.01, 6
"""Stages before anything is removed go on while the loss falls by such a share of the first one within so many."""

_EASE = 0.5
"""Share of the rise that a stage may have below which the next one may remove twice as much."""


@dataclass(frozen=True)
class _Ranking:
    """Where a stage begins: the damping that weights are ranked at, and F⁻¹ with their scores, if any are to go."""

    damping: float
    finv: InverseOperator | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class _Candidate:
    """One way to take a stage: where the kept weights go, and the loss there."""

    weights: Tensor
    loss: float
    damping: float
    moved: bool = True


@dataclass(frozen=True)
class _Step:
    """A stage that is tried: what it leads to, what to report of it, and how the loss rose.

    Attributes
    ----------
    removed:
        How much it was to remove.
    strain:
        The rise by what it may be; above 1 the quadratic was trusted too far.
    """

    candidate: _Candidate
    removed: int
    keep: Tensor
    fisher: RunningFisher
    stage: Stage
    strain: float


@dataclass(frozen=True)
class Passed:
    """A run at one of its targets: the network, its loss on the held-out samples, all stages so far."""

    objective: Objective
    loss: float
    stages: tuple[Stage, ...]


class AdaptiveRun:
    """The state of a run: weights that are left, rows, averaged gradient and damping.

    Parameters
    ----------
    objective:
        Where it starts.
    method:
        With a `WoodFisher` in one block for its curvature.
    selection:
        What may stay.
    course:
        What it takes of the data.
    held_out:
        What stages are checked on.
    stream:
        Where samples for rows come from.
    """

    def __init__(
        self,
        objective: Objective,
        method: Method,
        selection: Selection,
        course: Course,
        held_out: HeldOut,
        stream: Stream,
    ) -> None:
        self.objective, self.method, self.selection = objective, method, selection
        self.options, self.curvature = method.adaptive
        self.course, self.stream, self.first_order = course, stream, course.first_order
        self.held_out, self.loss = held_out, held_out.first
        self.weights = objective.weights[objective.kept].double()
        self.fisher = self._no_rows()
        self.gradient = MeanGradient(self.weights, self.options.momentum)
        self._damping = CarriedDamping(self.curvature.damping, first_order=course.first_order)
        self._began, self._foreseen, self._turn = self.loss, 0.0, 0
        self._places = MeanPlace()
        self._important = Important(stream, course.among)

    def _no_rows(self) -> RunningFisher:
        """The Fisher that rows are to come into, which may shrink to the prior of the first samples."""
        objective, rows, group = self.objective, self.course.rows, self.course.group
        where: dict[str, Any] = {"dtype": objective.dtype, "device": objective.device}
        if not self.course.shrinks:
            return PlainFisher(len(self.weights), rows, group, **where)
        samples = rows * group
        with phase("curvature"):
            prior = Prior.of(objective.on(self.stream.fork().draw(samples)), samples, self.curvature.labels)
            left = RestrictedPrior(prior, objective.kept, objective.dtype, rows)
        return ShrunkFisher(left, rows, group, **where)

    def passing(self, targets: Sequence[int]) -> Iterator[Passed]:
        """Prune through each amount in `targets`, largest first; yield there."""
        warming = self.course.warming
        path = self._path(targets, self.course.stages, warming)
        done: list[Stage] = []
        planned, added, to_come = len(path), 0, self.course.all_rows
        patience = _Patience(_FALL * (self.held_out.first - self.held_out.floor))
        trusted = self._left
        while path:
            passed = planned - len(path)
            report_progress("stages", passed, planned)
            count = self.course.share(to_come, len(path)) if done else self.course.rows
            to_come -= count
            self._renew(count)
            whole = max(self._left - path[0], 0)  # groups may leave less than was asked for
            may_split = added < self.options.stages * (passed + 1) // planned
            asked = min(whole, trusted) if may_split else whole
            step = self._stage(asked, may_split, done)
            self._accept(step)
            if step.removed < asked:
                trusted = step.removed
            if step.removed and step.strain < _EASE:
                trusted *= 2
            if step.removed < whole:
                added += 1
                continue
            amount = path.pop(0)
            if patience.ends(self.loss) and passed < warming - 1:
                path = self._path(targets, len(path), 0)
                warming, planned = 0, passed + 1 + len(path)
            if amount in targets and amount not in path:
                yield self._finished(tuple(done))
        report_progress("stages", planned, planned)

    def _stage(self, removed: int, may_split: bool, done: list[Stage]) -> _Step:
        """Remove as many, or as few of them as the quadratic can be trusted with; note in `done` what was tried.

        What the gradient of few samples would bring to zero is not always what can be spared. So where such a
        ranking leads too far, weights are ranked where they stand, before fewer of them are removed.
        """
        ranking = self._ranking(removed)
        step = self._try(ranking, removed, self._keep(ranking, removed))
        if step.strain > 1 and removed and self.first_order:
            worse, loss = step.stage, step.candidate.loss
            del step  # the rows that it holds
            other = self._ranked(ranking, self.weights)
            step = self._try(other, removed, self._keep(other, removed))
            if step.candidate.loss < loss:
                ranking = other
            elif removed == 1 or not may_split:
                worse = step.stage
                del step
                step = self._try(ranking, removed, self._keep(ranking, removed))
            done.append(replace(worse, accepted=False))
        while step.strain > 1 and may_split and (less := self._less(ranking, step)):
            done.append(replace(step.stage, accepted=False))
            del step  # the rows that it holds
            step = self._try(ranking, *less)
        done.append(step.stage)
        return step

    def _less(self, ranking: _Ranking, step: _Step) -> tuple[int, Tensor] | None:
        """Half of what a step was to remove, or less where that is the same groups, with what it keeps; if any."""
        removed = step.removed
        while removed > 1:
            removed //= 2
            keep = self._keep(ranking, removed)
            if not keep.equal(step.keep):
                return removed, keep
        return None

    def _path(self, targets: Sequence[int], stages: int, warming: int) -> list[int]:
        """What is left after each of so many stages, the first `warming` of which remove nothing."""
        resting = self.course.resting
        path = through(self._left, targets, stages - warming - resting, self.options.pace)
        return with_rests(path, self._left, targets, warming, resting)

    @property
    def _left(self) -> int:
        return self.selection.amount(self.objective.kept)

    def _renew(self, count: int) -> None:
        """Take new rows, and their mean into the averaged gradient, by which the kept weights move as they come."""
        if self.curvature.labels == "model":
            move_on()
        self._began, self._foreseen = self.loss, 0.0
        moves = self.course.moves if self._damping.begun else 0
        came = self._gathered_in(moves, count) if moves else [self._gathered(count)]
        with phase("curvature"):
            self.fisher.add(*came)

    def _gathered_in(self, moves: int, count: int) -> list[Tensor]:
        """New rows in parts, after each of which the kept weights move by its share of the way to the Newton point.

        A move is checked on one batch of the held-out samples, another batch at each stage; the first that raises its
        loss is not made, and no more follow. Where the moves lead is checked on all, and if need be they are taken
        back.
        """
        kept, share, start = self.objective.kept, 1 / moves, self.weights
        finv, damping = self._damping.inverse(self.fisher, self._damping.now(self.fisher))
        turn, rise = self._turn, self.held_out.rise(self.loss, self.first_order)
        self._turn += 1
        seen, came, stopped = self._loss_at(start, kept, turn), [], False
        for part in _shares(count, moves):
            came.append(self._gathered(part, important=True))
            if stopped:
                continue
            with phase("update"):
                step = finv @ (self.gradient.value * -share)
                there = self.weights + step
                # What `_predicted` says, since the step s of a share t solves (F + λI)s = −tg.
                predicted = float(
                    self.gradient.value @ step * (1 - share / 2) - damping * step.square().sum() / 2
                )
            loss = self._loss_at(there, kept, turn)
            stopped = loss - seen > share * rise
            if stopped:
                continue
            seen = loss
            self._foreseen += predicted
            self._go_to(there, kept)
            self.gradient.moved(share)
        loss = self.loss if self.weights is start else self._loss_at(self.weights, kept)
        if loss - self.loss > rise:
            self._foreseen, self._places = 0.0, MeanPlace()
            self._go_to(start, kept)
        else:
            self.loss = loss
        return came

    def _gathered(self, count: int, *, important: bool = False) -> Tensor:
        """So many new rows, whose mean is taken into the averaged gradient."""
        index = self.objective.kept.nonzero().squeeze(1)
        columns = None if len(index) == len(self.objective.kept) else index
        samples, group, labels = count * self.course.group, self.course.group, self.curvature.labels
        if important:
            fresh = self._important.draw(self.objective, samples)
        else:
            fresh = self.objective.on(self.stream.draw(samples))
        rows = fresh.rows(samples, group=group, labels=labels, columns=columns)
        mean = rows.mean(0)
        if self.first_order and labels == "model":  # rows of drawn targets have a mean of zero
            mean = fresh.gradient(samples)[self.objective.kept]
        self.gradient.add(mean, len(rows))
        return rows

    def _ranking(self, removed: int) -> _Ranking:
        """What each weight costs, if any are to go: where the gradient leads to, if it takes part."""
        damping = self._damping.now(self.fisher)
        if not removed:
            return _Ranking(damping)
        with phase("saliency"):
            finv, damping = self._damping.inverse(self.fisher, damping)
            point = (
                newton_point(self.weights, self.gradient.value, finv) if self.first_order else self.weights
            )
        return self._ranked(
            _Ranking(damping, over_all([(slice(0, finv.size), finv)], self.objective.kept, damping)), point
        )

    def _ranked(self, ranking: _Ranking, point: Tensor) -> _Ranking:
        """The same with what each weight costs at `point`."""
        assert ranking.finv is not None
        with phase("saliency"):
            scores = self.selection.scores(self._full(point, self.objective.kept), ranking.finv)
        return replace(ranking, scores=scores)

    def _keep(self, ranking: _Ranking, removed: int) -> Tensor:
        """What stays where as much goes, the cheapest."""
        if ranking.scores is None:
            return self.objective.kept
        with phase("saliency"):
            return self.selection.best(ranking.scores, self.objective.kept, self._left - removed)

    def _try(self, ranking: _Ranking, removed: int, keep: Tensor) -> _Step:
        """Propose a stage that leaves what it is to keep, in several ways, and choose on the held-out samples."""
        gradient = self.gradient.value
        stay = keep[self.objective.kept]
        with phase("update"):
            rest = self.fisher.restricted(stay)
            gone = torch.where(stay, 0, -self.weights)
            pull = -self.fisher.pull(gone)[stay]
            start = self.weights[stay]
            first = self.first_order and not removed and not self._damping.begun
            share = _FIRST_SHARE if first else 1.0
            damped = self.fisher.damped(gone)[stay]
            side = pull - gradient[stay] if self.first_order else pull

        def candidate(damping: float) -> _Candidate:
            with phase("update"):
                inverse, damping = self._damping.inverse(rest, damping)
                weights = start + share * (inverse @ (side - damping * damped))
            return _Candidate(weights, self._loss_at(weights, keep), damping)

        tried = [candidate(choice) for choice in self._damping.choices(ranking.damping, self.fisher)]
        best = min(tried, key=lambda c: c.loss)
        floor = self.held_out.floor
        if not best.loss - floor <= _TOLERANCE * (self.loss - floor):
            larger = self._damping.larger(ranking.damping, self.fisher)
            plain = _Candidate(start, self._loss_at(start, keep), larger, moved=False)
            best = min(best, plain, key=lambda c: c.loss)
        if not math.isfinite(best.loss):
            raise WoodfisherError(
                f"at {int(keep.sum())} weights the loss on held-out samples is {best.loss} however the rest moves; the "
                "model is unchanged. Ask for a lower sparsity."
            )
        step = gone.clone()
        step[stay] = best.weights - start
        predicted = self._predicted(step)
        stage = Stage(
            sparsity=1 - int(keep.sum()) / self.objective.layout.size,
            predicted=self._foreseen + predicted,
            measured=best.loss - self._began,
            damping=best.damping if best.moved else None,
            first_order=self.first_order and best.moved,
        )
        allowed = min(max(2 * predicted, 0), self.held_out.yardstick(self.loss))
        allowed += self.held_out.rise(self.loss, self.first_order)
        rise = best.loss - self.loss
        strain = rise / allowed if allowed > 0 else (math.inf if rise > 0 else 0.0)
        return _Step(best, removed, keep, rest, stage, strain)

    def _predicted(self, step: Tensor) -> float:
        """Change of the loss that the quadratic model expects of a step of the kept weights."""
        linear = float(self.gradient.value @ step) if self.first_order else 0.0
        return linear + float(step @ self.fisher.pull(step)) / 2

    def _accept(self, step: _Step) -> None:
        candidate, keep = step.candidate, step.keep
        self._damping.carry(candidate.damping, self.fisher)
        self.gradient.restrict(keep[self.objective.kept])
        self.fisher = step.fisher
        self._go_to(candidate.weights, keep)
        self.loss = candidate.loss
        if candidate.moved and self.first_order:
            self.gradient.moved()

    def _go_to(self, weights: Tensor, keep: Tensor) -> None:
        """Go on from these weights of those in `keep`."""
        self.weights = weights
        self.objective = self._objective_at(weights, keep)
        self._places.add(weights)

    def _objective_at(self, weights: Tensor, keep: Tensor) -> Objective:
        return self.objective.at(self._full(weights, keep), keep)

    def _full(self, weights: Tensor, keep: Tensor) -> Tensor:
        full = torch.zeros(len(keep), dtype=torch.float64, device=keep.device)
        full[keep] = weights
        return full

    def _loss_at(self, weights: Tensor, keep: Tensor, turn: int | None = None) -> float:
        """As `HeldOut.quick_loss`."""
        if not weights.isfinite().all():
            return math.inf
        return self.held_out.quick_loss(self._objective_at(weights, keep), turn)

    def _finished(self, stages: tuple[Stage, ...]) -> Passed:
        """The network as it leaves: averaged, and with normalisation recalibrated, if held-out samples say so."""
        best = Passed(self.objective, self.held_out.loss(self.objective), stages)
        for change in (self._averaged, self._recalibrated):
            objective = change(best.objective)
            if objective is not best.objective:
                loss = self.held_out.loss(objective)
                best = Passed(objective, loss, stages) if loss <= best.loss else best
        return best

    def _averaged(self, objective: Objective) -> Objective:
        """The mean of where the kept weights stood, if the gradient moved them."""
        mean = self._places.value if self.first_order else None
        return objective if mean is None else self._objective_at(mean, objective.kept)

    def _recalibrated(self, objective: Objective) -> Objective:
        return recalibrated(objective, self.stream, self.method.recalibrate)


class _Patience:
    """With a loss that falls, until it hasn't by `fall` for `_PATIENCE` stages."""

    def __init__(self, fall: float) -> None:
        self._fall, self._lowest, self._since = fall, math.inf, 0

    def ends(self, loss: float) -> bool:
        """Whether it does after a stage that led to this loss."""
        self._since += 1
        if loss < self._lowest - self._fall:
            self._lowest, self._since = loss, 0
        return self._since == _PATIENCE


def _shares(count: int, parts: int) -> list[int]:
    """`count` in as many nearly equal parts, but for empty ones.

    >>> _shares(10, 4), _shares(2, 4)
    ([2, 3, 2, 3], [1, 1])
    """
    bounds = [count * part // parts for part in range(parts + 1)]
    return [stop - start for start, stop in pairwise(bounds) if stop > start]
