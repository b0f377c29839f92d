"""A fixed number of stages: rows → curvature → scores → mask → update, each with new rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from woodfisher.adaptive import recalibrated
from woodfisher.errors import WoodfisherError
from woodfisher.method import UPDATES
from woodfisher.refine import refine as refined
from woodfisher.report import Stage
from woodfisher.saliency import newton_point
from woodfisher.schedule import through
from woodfisher.update import quadratic_change
from woodfisher.watch import phase, report_progress

if TYPE_CHECKING:
    from woodfisher.batches import Stream
    from woodfisher.method import Method
    from woodfisher.objective import Objective
    from woodfisher.selection import Selection


def run_stages(
    objective: Objective, final: int, method: Method, selection: Selection, stream: Stream
) -> tuple[Objective, list[Stage]]:
    """Prune down to `final` of `selection.total`, in the method's number of stages.

    Returns
    -------
    The objective at the pruned weights, with normalisation recalibrated where the method says so, and what each
    stage did.
    """
    assert isinstance(method.plan, int)
    stages = []
    targets = through(selection.amount(objective.kept), [final], method.plan)
    for number, amount in enumerate(targets):
        report_progress("stages", number, len(targets))
        here = objective.on(stream.draw(method.curvature.samples))
        objective, stage = _stage(here, amount, method, selection)
        stages.append(stage)
    objective = recalibrated(objective, stream, method)
    report_progress("stages", len(targets), len(targets))
    return objective, stages


def _stage(
    objective: Objective, amount: int, method: Method, selection: Selection
) -> tuple[Objective, Stage]:
    """One round of rows → curvature → surgeon, down to `amount`."""
    weights, kept = objective.weights.double(), objective.kept
    with phase("curvature"):
        finv = method.curvature(objective)
    gradient = objective.gradient(method.curvature.samples) if method.first_order is True else None
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
    after = objective.at(new, keep)
    measured = math.nan
    if estimated:
        with phase("measuring"):
            measured = after.mean_loss() - objective.mean_loss()
    return after, Stage(
        sparsity=1 - int(keep.sum()) / objective.layout.size,
        predicted=_finite(predicted),
        measured=_finite(measured),
        damping=finv.damping,
        first_order=method.first_order is True,
    )


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
