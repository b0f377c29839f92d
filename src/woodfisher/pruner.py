"""Pruning: rows → curvature → scores → mask → update, once or in stages."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from woodfisher.batches import Stream
from woodfisher.checks import check_sparsity
from woodfisher.errors import WoodfisherError
from woodfisher.isolation import isolated
from woodfisher.method import UPDATES, method_for
from woodfisher.objective import Objective
from woodfisher.report import Layer, Report, Stage
from woodfisher.saliency import newton_point, saliency
from woodfisher.schedule import exponential
from woodfisher.selection import select
from woodfisher.update import quadratic_change
from woodfisher.watch import phase, report_progress, warn, watching

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn

    from woodfisher.batches import Batch
    from woodfisher.curvature import Estimator
    from woodfisher.method import Method, Scope, Update
    from woodfisher.watch import Progress


def prune(
    model: nn.Module,
    data: Iterable[Batch] | None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    sparsity: float = 0.9,
    *,
    criterion: str = "woodfisher",
    preset: str | None = None,
    curvature: Estimator | None = None,
    update: Update | None = None,
    scope: Scope | None = None,
    stages: int | None = None,
    recalibrate: int | None = None,
    params: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Remove a fraction of a trained model's weights, in place, and make up for it with the rest.

    The model changes at the very end, after everything that can fail has succeeded. Weights that are zero
    already, or masked by `torch.nn.utils.prune`, stay removed and count.

    Parameters
    ----------
    model, data, loss, params, exclude:
        As for `Objective`. A few hundred training samples are enough; they are drawn from the beginning of
        `data`, so shuffle it. Every stage draws new ones while there are any.
    sparsity:
        Fraction of the chosen weights to remove, in [0, 1). The number kept is exactly the nearest integer to
        `(1 − sparsity) · d`, which has to be one at least.
    criterion:
        Name of the method: see `woodfisher.METHODS`.
    preset:
        `paper` for the protocol of Singh and Alistarh (2020): 100 gradients of single samples, damping 1e-5,
        blocks within a layer, global ranking, independent update, one shot.
    curvature, update, scope, stages, recalibrate:
        Replace that part of the method (see `Method`).
    progress:
        Called as `progress(phase, done, total)`.

    Raises
    ------
    WoodfisherError
        On bad input or a numerical failure; the model is then as it was.
    """
    check_sparsity(sparsity)
    asked: dict[str, Any] = {
        "curvature": curvature,
        "update": update,
        "scope": scope,
        "stages": stages,
        "recalibrate": recalibrate,
    }
    method = replace(
        method_for(criterion, preset), **{key: value for key, value in asked.items() if value is not None}
    )
    return prune_objective(
        Objective(model, data, loss, params=params, exclude=exclude), sparsity, method, progress
    )


def prune_objective(
    objective: Objective, sparsity: float, method: Method, progress: Progress | None = None
) -> Report:
    """`prune` for an objective and a method that are made already."""
    check_sparsity(sparsity)
    with watching(progress) as watch:
        with phase("total"), isolated(objective.model):
            pruned, stages = _run_stages(objective, sparsity, method)
            masks = pruned.layout.split(pruned.kept)
            layers = [Layer(name, mask.numel(), int(mask.sum())) for name, mask in masks.items()]
            for layer in layers:
                if layer.kept == 0:
                    warn(
                        f"every weight of {layer.name!r} is removed, so nothing passes through it; a lower "
                        "sparsity or scope='layer' avoids that."
                    )
        pruned.write()
    kept = int(pruned.kept.sum())
    return Report(
        sparsity=1 - kept / pruned.layout.size,
        size=pruned.layout.size,
        kept=kept,
        layers=layers,
        stages=stages,
        masks={name: mask.clone() for name, mask in masks.items()},
        seconds={
            **dict.fromkeys(("gradients", "curvature", "saliency", "update"), 0.0),
            **watch.seconds,
            "total": sum(watch.seconds.values()),
        },
        method=method.to_dict(),
        warnings=watch.warnings,
    )


def _run_stages(objective: Objective, sparsity: float, method: Method) -> tuple[Objective, list[Stage]]:
    size, now = objective.layout.size, int(objective.kept.sum())
    final = round((1 - sparsity) * size)
    if final == 0:
        raise WoodfisherError(f"a sparsity of {sparsity:g} keeps none of {size} weights: ask for less.")
    if final > now:
        warn(
            f"{1 - now / size:.2%} of the chosen weights are zero already, more than the sparsity "
            f"{sparsity:.2%} asks for; nothing is removed."
        )
        return objective, []
    stream = Stream(objective.data)
    stages = []
    targets = exponential(now, final, method.stages)
    for number, count in enumerate(targets):
        report_progress("stages", number, len(targets))
        objective, predicted = _stage(objective.on(stream.draw(method.curvature.samples)), count, method)
        stages.append(Stage(1 - int(objective.kept.sum()) / size, predicted))
    if method.recalibrate:
        objective = objective.on(stream.draw(method.recalibrate)).recalibrated(method.recalibrate)
    report_progress("stages", len(targets), len(targets))
    return objective, stages


def _stage(objective: Objective, count: int, method: Method) -> tuple[Objective, float | None]:
    """One round of rows → curvature → surgeon, down to `count` kept weights."""
    weights, kept = objective.weights.double(), objective.kept
    with phase("curvature"):
        finv = method.curvature(objective)
    gradient = objective.gradient(method.curvature.samples) if method.first_order else None
    with phase("saliency"):
        point = weights if gradient is None else newton_point(weights, gradient, finv) * kept
        scores = saliency(point, finv)
        keep = select(scores, kept, count, objective.layout, method.scope)
    with phase("update"):
        start = weights if method.update == "none" else point
        new = UPDATES[method.update](start, finv, keep)
        if not new.isfinite().all():
            raise WoodfisherError(
                "the update gives weights that are not finite; the model is unchanged. Raise the damping."
            )
        estimated = method.curvature.samples > 0
        predicted = quadratic_change(new - weights, finv, gradient) if estimated else math.nan
    return objective.at(new, keep), predicted if math.isfinite(predicted) else None
