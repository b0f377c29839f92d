"""Stages on the way to a sparsity: those that adapt, or a number of them, each with rows → scores → mask → update."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from woodfisher.errors import WoodfisherError
from woodfisher.gradients.batches import Stream
from woodfisher.gradients.dealt import dealt
from woodfisher.gradients.normalisation import recalibrated
from woodfisher.gradients.randomness import move_on
from woodfisher.pruning.adaptive import Adaptive, adaptive_run
from woodfisher.pruning.dealing import align_random, check_same_samples
from woodfisher.pruning.method import UPDATES
from woodfisher.pruning.report import Stage
from woodfisher.pruning.schedule import through
from woodfisher.surgeon.refine import refine as refined
from woodfisher.surgeon.saliency import newton_point
from woodfisher.surgeon.update import quadratic_change
from woodfisher.watch import phase, report_progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from woodfisher.gradients.objective import Objective
    from woodfisher.pruning.method import Method
    from woodfisher.surgeon.selection import Selection


def pruned_through(
    objective: Objective, amounts: Sequence[int], method: Method, selection: Selection, *, skip: int = 0
) -> Iterator[tuple[Objective, Sequence[Stage]]]:
    """Prune to each of `amounts` (of `selection.total`, largest first): in one run where stages adapt, else anew.

    Yields
    ------
    The objective at the pruned weights and what the stages did. Samples are drawn from the data after the first
    `skip`.
    """
    if isinstance(method.staging, Adaptive):
        for passed in adaptive_run(objective, amounts, method, selection, skip=skip) if amounts else ():
            yield passed.objective, passed.stages
        return
    for amount in amounts:
        align_random(objective.data, objective.ranks)
        stream = Stream(objective.data)
        stream.skip(skip)
        yield _by_number(objective, amount, method, selection, stream)


def _by_number(
    objective: Objective, final: int, method: Method, selection: Selection, stream: Stream
) -> tuple[Objective, list[Stage]]:
    """Prune down to `final` of `selection.total`, in the method's number of stages.

    Returns
    -------
    The objective at the pruned weights, with normalisation recalibrated where the method says so, and what each
    stage did.
    """
    assert isinstance(method.staging, int)
    objective = objective.begun()
    stages = []
    targets = through(selection.amount(objective.kept), [final], method.staging)
    for number, amount in enumerate(targets):
        report_progress("stages", number, len(targets))
        if method.curvature.labels == "model":
            move_on()
        here = objective.on(stream.draw(method.curvature.samples))
        check_same_samples(here)
        objective, stage = _stage(here, amount, method, selection)
        stages.append(stage)
    objective = _recalibrated(objective, stream, method)
    report_progress("stages", len(targets), len(targets))
    return objective, stages


def _recalibrated(objective: Objective, stream: Stream, method: Method) -> Objective:
    """With statistics of batch normalisation that the first rank takes anew."""
    if objective.ranks.size == 1:
        return recalibrated(objective, stream, method.recalibrate)
    fresh = objective.ranks.first(lambda: recalibrated(objective, stream, method.recalibrate).fresh_buffers())
    return objective.with_buffers(fresh)


def _stage(
    objective: Objective, amount: int, method: Method, selection: Selection
) -> tuple[Objective, Stage]:
    """One round of rows → curvature → surgeon, down to `amount`; each rank has its part of the weights."""
    mine = dealt(objective)
    selection = selection.dealt(mine.layout, mine.ranks)
    weights, kept = mine.weights.double(), mine.kept
    with phase("curvature"):
        finv = method.curvature(mine)
    gradient = mine.gradient(method.curvature.samples) if method.first_order is True else None
    with phase("saliency"):
        point = weights if gradient is None else newton_point(weights, gradient, finv) * kept
        keep = selection(point, finv, kept, amount)
    if method.refine:
        with phase("refine"):
            keep, _ = refined(point, finv, keep, kept, method.refine)
    with phase("update"):
        start = weights if method.update == "none" else point
        new = UPDATES[method.update](start, finv, keep)
        if not new.isfinite().all():
            raise WoodfisherError(
                "the update gives weights that are not finite; the model is unchanged. Raise the damping."
            )
        estimated = method.curvature.samples > 0
        predicted = quadratic_change(new - weights, finv, gradient) if estimated else math.nan
        predicted = sum(objective.ranks.gather(predicted))
    after = mine.at(new, keep).joined()
    measured = math.nan
    if estimated:
        with phase("measuring"):
            before, loss = objective.mean_loss(), after.mean_loss()
        if math.isfinite(before) and not math.isfinite(loss):
            raise WoodfisherError(
                f"at {int(after.kept.sum())} weights the loss is {loss} on the samples of the rows; the model is "
                "unchanged. Ask for a lower sparsity, or raise the damping."
            )
        measured = loss - before
    return after, Stage(
        sparsity=1 - int(after.kept.sum()) / objective.layout.size,
        predicted=_finite(predicted),
        measured=_finite(measured),
        damping=finv.damping,
        first_order=method.first_order is True,
    )


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
