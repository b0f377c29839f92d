"""Pruning: rows → curvature → scores → mask → update, once, in stages, or through many sparsities."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from woodfisher.adaptive import Adaptive, adaptive_run, recalibrated
from woodfisher.batches import Stream
from woodfisher.checks import check_fraction, check_sparsity, finite_number
from woodfisher.errors import WoodfisherError
from woodfisher.isolation import isolated
from woodfisher.method import UPDATES, method_for
from woodfisher.objective import Objective
from woodfisher.refine import refine as refined
from woodfisher.report import Layer, Report, Stage
from woodfisher.saliency import newton_point, saliency
from woodfisher.schedule import through
from woodfisher.selection import select
from woodfisher.update import quadratic_change
from woodfisher.watch import phase, report_progress, warn, watching

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn

    from woodfisher.batches import Batch
    from woodfisher.curvature import Estimator
    from woodfisher.method import FirstOrder, Method, Scope, Stages, Update
    from woodfisher.watch import Progress, Watch

FINEST_RATIO = 0.95
"""Ratio of one number of kept weights to the next, where the sparsest network within a drop is looked for."""

LEAST_KEPT = 0.005
"""Fraction of the weights below which that search ends."""


def prune(
    model: nn.Module,
    data: Iterable[Batch] | None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    sparsity: float | None = None,
    *,
    max_drop: float | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    criterion: str = "woodfisher",
    preset: str | None = None,
    curvature: Estimator | None = None,
    first_order: FirstOrder | None = None,
    update: Update | None = None,
    scope: Scope | None = None,
    stages: Stages | None = None,
    refine: int | None = None,
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
        As for `Objective`. Training samples are drawn from the beginning of `data`, so shuffle it. Every stage
        draws new ones while there are any; a few hundred in all are enough to begin with.
    sparsity:
        Fraction of the chosen weights to remove, in [0, 1); 0.9 if neither it nor `max_drop` is given. The
        number kept is exactly the nearest integer to `(1 − sparsity) · d`, which has to be one at least.
    max_drop:
        Instead of a sparsity: find the sparsest network with `metric ≥ (1 − max_drop) · dense metric`.
    metric:
        `metric(model)`, larger is better, on validation data: what `max_drop` is about.
    criterion:
        Name of the method: see `woodfisher.METHODS`.
    preset:
        `paper` for the protocol of Singh and Alistarh (2020): 100 gradients of single samples, damping 1e-5,
        blocks within a layer, global ranking, independent update, one shot.
    curvature, first_order, update, scope, stages, refine, recalibrate:
        Replace that part of the method (see `Method`).
    progress:
        Called as `progress(phase, done, total)`.

    Raises
    ------
    WoodfisherError
        On bad input or a numerical failure; the model is then as it was.
    """
    if max_drop is not None and sparsity is not None:
        raise WoodfisherError("give a sparsity or a max_drop, not both: one follows from the other.")
    objective, method = _prepared(
        model, data, loss, criterion, preset, params, exclude,
        curvature=curvature, first_order=first_order, update=update, scope=scope, stages=stages,
        refine=refine, recalibrate=recalibrate,
    )  # fmt: skip
    if max_drop is None:
        return prune_objective(objective, 0.9 if sparsity is None else sparsity, method, progress)
    if metric is None:
        raise WoodfisherError(
            "max_drop needs metric=, a function of the model that says how good it is on validation data, as in "
            "metric=lambda model: accuracy(model, validation_batches)."
        )
    return prune_within(objective, max_drop, metric, method, progress)


def sweep(
    model: nn.Module,
    data: Iterable[Batch] | None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    sparsities: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98),
    *,
    criterion: str = "woodfisher",
    preset: str | None = None,
    curvature: Estimator | None = None,
    first_order: FirstOrder | None = None,
    update: Update | None = None,
    scope: Scope | None = None,
    stages: Stages | None = None,
    refine: int | None = None,
    recalibrate: int | None = None,
    params: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Pruned]:
    """Prune to several sparsities, by one run that passes through them all where the stages adapt.

    The model stays as it is; `Pruned.write(model)` puts one of the results into it. Arguments are those of
    `prune`. Methods with a fixed number of stages are run once for each sparsity, from the start.

    Returns
    -------
    In the order of `sparsities`.
    """
    objective, method = _prepared(
        model, data, loss, criterion, preset, params, exclude,
        curvature=curvature, first_order=first_order, update=update, scope=scope, stages=stages,
        refine=refine, recalibrate=recalibrate,
    )  # fmt: skip
    return sweep_objective(objective, sparsities, method, progress)


@dataclass(frozen=True)
class Pruned:
    """A pruned network that is not in a model yet.

    Attributes
    ----------
    report:
        How it came about.
    objective:
        The objective at the pruned weights, with its mask and the buffers that belong to them.
    """

    report: Report
    objective: Objective

    def write(self, model: nn.Module | None = None) -> None:
        """Put it into `model`, of the same architecture; by default into the one that was pruned."""
        self.objective.write(model)


def prune_objective(
    objective: Objective, sparsity: float, method: Method, progress: Progress | None = None
) -> Report:
    """`prune` for an objective and a method that are made already."""
    (pruned,) = sweep_objective(objective, [sparsity], method, progress)
    pruned.write()
    return pruned.report


def sweep_objective(
    objective: Objective, sparsities: Sequence[float], method: Method, progress: Progress | None = None
) -> list[Pruned]:
    """`sweep` for an objective and a method that are made already."""
    if not sparsities:
        raise WoodfisherError("name at least one sparsity to prune to.")
    for sparsity in sparsities:
        check_sparsity(sparsity)
    size, now = objective.layout.size, int(objective.kept.sum())
    counts = [_count(size, sparsity) for sparsity in sparsities]
    reached: dict[int, Pruned] = {}
    with watching(progress) as watch, phase("total"), isolated(objective.model):
        for sparsity, count in zip(sparsities, counts, strict=True):
            if count > now:
                warn(
                    f"{1 - now / size:.2%} of the chosen weights are zero already, more than the sparsity "
                    f"{sparsity:.2%} asks for; nothing is removed."
                )
                reached[count] = _pruned(objective, [], method, watch)
        wanted = sorted(set(counts) - set(reached), reverse=True)
        reached.update(_each(objective, wanted, method, watch))
    return [reached[count] for count in counts]


def prune_within(
    objective: Objective,
    max_drop: float,
    metric: Callable[[nn.Module], float],
    method: Method,
    progress: Progress | None = None,
) -> Report:
    """`prune` with a `max_drop`, for an objective and a method that are made already."""
    check_fraction("max_drop", max_drop)
    trial = copy.deepcopy(objective.model)
    now = int(objective.kept.sum())
    steps = math.ceil(math.log(max(LEAST_KEPT * objective.layout.size, 1) / now) / math.log(FINEST_RATIO))
    counts = sorted({round(now * FINEST_RATIO**step) for step in range(1, steps + 1)} - {0}, reverse=True)
    best: Pruned | None = None
    with watching(progress) as watch, phase("total"), isolated(objective.model):
        with phase("metric"):
            dense = _metric_of(metric, trial)
        least = dense - max_drop * abs(dense)

        def good(pruned: Pruned) -> bool:
            pruned.write(trial)
            with phase("metric"):
                return _metric_of(metric, trial) >= least

        if isinstance(method.plan, Adaptive):
            for _, pruned in _each(objective, counts, method, watch):
                if not good(pruned):
                    break
                best = pruned
        else:
            low, high = 0, len(counts)
            while low < high:
                middle = (low + high) // 2
                ((_, pruned),) = _each(objective, [counts[middle]], method, watch)
                if good(pruned):
                    best, low = pruned, middle + 1
                else:
                    high = middle
        if best is None:
            warn(
                f"removing {1 - FINEST_RATIO:.0%} of the weights already costs more than the drop of "
                f"{max_drop:.2%}: the metric is {dense:g} dense, and has to be {least:g}. Nothing is removed."
            )
            best = _pruned(objective, [], method, watch)
    best.write()
    return replace(best.report, warnings=watch.warnings)


def _metric_of(metric: Callable[[nn.Module], float], model: nn.Module) -> float:
    value: object = metric(model)
    return finite_number(value, f"metric(model) must return a finite number; {value!r} came.")


def _prepared(
    model: nn.Module,
    data: Iterable[Batch] | None,
    loss: Callable[[Any, Any], Tensor] | None,
    criterion: str,
    preset: str | None,
    params: str | Sequence[str] | None,
    exclude: str | Sequence[str],
    **parts: Any,
) -> tuple[Objective, Method]:
    given = {name: part for name, part in parts.items() if part is not None}
    fixed = isinstance(given.get("stages"), int) or given.get("update", "joint") != "joint"
    method = replace(method_for(criterion, preset, fixed=fixed), **given)
    return Objective(model, data, loss, params=params, exclude=exclude), method


def _count(size: int, sparsity: float) -> int:
    count = round((1 - sparsity) * size)
    if count == 0:
        raise WoodfisherError(f"a sparsity of {sparsity:g} keeps none of {size} weights: ask for less.")
    return count


def _each(
    objective: Objective, counts: Sequence[int], method: Method, watch: Watch
) -> Iterator[tuple[int, Pruned]]:
    """Prune to each number of kept weights: in one run where stages adapt, else each from the start."""
    if isinstance(method.plan, Adaptive):
        passed = adaptive_run(objective, counts, method) if counts else iter(())
        for count, at in zip(counts, passed, strict=True):
            yield count, _pruned(at.objective, list(at.stages), method, watch)
    else:
        for count in counts:
            yield count, _pruned(*_run_stages(objective, count, method), method, watch)


def _pruned(objective: Objective, stages: list[Stage], method: Method, watch: Watch) -> Pruned:
    masks = objective.layout.split(objective.kept)
    layers = [Layer(name, mask.numel(), int(mask.sum())) for name, mask in masks.items()]
    for layer in layers:
        if layer.kept == 0:
            warn(
                f"every weight of {layer.name!r} is removed, so nothing passes through it; a lower "
                "sparsity or scope='layer' avoids that."
            )
    seconds = watch.so_far()
    kept = int(objective.kept.sum())
    report = Report(
        sparsity=1 - kept / objective.layout.size,
        size=objective.layout.size,
        kept=kept,
        layers=layers,
        stages=stages,
        masks={name: mask.clone() for name, mask in masks.items()},
        seconds={
            **dict.fromkeys(("gradients", "curvature", "saliency", "update"), 0.0),
            **seconds,
            "total": sum(seconds.values()),
        },
        method=method.to_dict(),
        warnings=list(watch.warnings),
    )
    return Pruned(report, objective)


def _run_stages(objective: Objective, final: int, method: Method) -> tuple[Objective, list[Stage]]:
    assert isinstance(method.plan, int)
    size, now = objective.layout.size, int(objective.kept.sum())
    stream = Stream(objective.data)
    stages = []
    targets = through(now, [final], method.plan)
    for number, count in enumerate(targets):
        report_progress("stages", number, len(targets))
        objective, predicted = _stage(objective.on(stream.draw(method.curvature.samples)), count, method)
        stages.append(
            Stage(1 - int(objective.kept.sum()) / size, predicted, first_order=method.first_order is True)
        )
    objective = recalibrated(objective, stream, method)
    report_progress("stages", len(targets), len(targets))
    return objective, stages


def _stage(objective: Objective, count: int, method: Method) -> tuple[Objective, float | None]:
    """One round of rows → curvature → surgeon, down to `count` kept weights."""
    weights, kept = objective.weights.double(), objective.kept
    with phase("curvature"):
        finv = method.curvature(objective)
    gradient = objective.gradient(method.curvature.samples) if method.first_order is True else None
    with phase("saliency"):
        point = weights if gradient is None else newton_point(weights, gradient, finv) * kept
        scores = saliency(point, finv)
        keep = select(scores, kept, count, objective.layout, method.scope)
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
    return objective.at(new, keep), predicted if math.isfinite(predicted) else None
