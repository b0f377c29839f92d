"""`prune` and `sweep`: pruning a trained model once, in stages, or through many sparsities."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from woodfisher.checks import check_fraction, metric_value
from woodfisher.distributed import ALONE, together
from woodfisher.errors import TooSparseError, WoodfisherError
from woodfisher.gradients.isolation import copied, isolated
from woodfisher.gradients.objective import Objective
from woodfisher.gradients.randomness import unmoved
from woodfisher.gradients.writing import digests, write
from woodfisher.pruning.adaptive import Adaptive
from woodfisher.pruning.dealing import align_random, alike, can_be_dealt
from woodfisher.pruning.method import apart, method_asked
from woodfisher.pruning.report import report_of, warn_of_lost_layers, warnings_of
from woodfisher.pruning.stages import pruned_through
from woodfisher.watch import phase, warn, watching

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn
    from typing_extensions import Unpack

    from woodfisher.gradients.batches import Batch
    from woodfisher.gradients.objective import Changes
    from woodfisher.gradients.writing import Digests
    from woodfisher.pruning.method import Method, PruningOptions
    from woodfisher.pruning.report import Report, Stage
    from woodfisher.surgeon.selection import Selection
    from woodfisher.watch import Progress, Watch

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""The family that methods are compared on."""

FINEST_RATIO = 0.95
"""Ratio of what is kept to what is kept next, where the sparsest network within a drop is looked for."""

_UNLIKELY_GAIN = 0.5
"""Share by which pruning hardly makes a metric better."""

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
    criterion: str | Method = "woodfisher",
    preset: str | None = None,
    progress: Progress | None = None,
    **options: Unpack[PruningOptions],
) -> Report:
    """Remove a fraction of a trained model's weights, in place, and make up for it with the rest.

    The model changes at the very end, after everything that can fail has succeeded. Weights that are zero
    already, or masked by `torch.nn.utils.prune`, stay removed and count.

    Parameters
    ----------
    model, data, loss:
        As for `Objective`. Training samples are drawn from the beginning of `data`, so shuffle it. Every stage
        draws new ones while there are any; a few hundred in all are enough to begin with.
    sparsity:
        Fraction of the chosen weights to remove, in [0, 1); by default what the pattern says, or 0.95 if neither
        that nor `max_drop` does. The number kept is exactly the nearest integer to `(1 − sparsity) · d`, which has
        to be one at least; where groups of weights go together, the most whole groups that are no more. Where
        nothing is left to remove, nothing changes.
    max_drop:
        Instead of a sparsity: find the sparsest network with `metric ≥ m − max_drop · |m|`, where m is that of the
        dense one.
    metric:
        `metric(model)`, larger is better, on validation data: what `max_drop` is about.
    criterion:
        Name of the method (see `woodfisher.METHODS`), or a `Method`, which is taken as it is.
    preset:
        `paper` for the protocol of Singh and Alistarh (2020), with a method that is named: 100 gradients of single
        samples, damping 1e-5, blocks within a layer, global ranking, independent update, one shot.
    progress:
        Called as `progress(phase, done, total)`.
    **options:
        `params`, `exclude`, `sampler` and `precision` choose weights and say how gradients are taken, as for
        `Objective`. `curvature`, `first_order`, `update`, `scope`, `pattern`, `floor`, `stages`, `refine` and
        `recalibrate` replace that part of the method (see `Method`).

    Raises
    ------
    WoodfisherError
        On bad input or a numerical failure; the model is then as it was.
    """
    with together():
        if max_drop is not None and sparsity is not None:
            raise WoodfisherError("give a sparsity or a max_drop, not both: one follows from the other.")
        if max_drop is None and metric is not None:
            raise WoodfisherError(
                "metric= is what max_drop= is about, and none was given: give it, or leave metric out."
            )
        if max_drop is not None and not callable(metric):
            raise WoodfisherError(
                "max_drop needs metric=, a function of the model that says how good it is on validation data, as in "
                f"metric=lambda model: accuracy(model, validation_batches); {metric!r} came."
            )
        chosen, parts = apart(options)
        method = method_asked(criterion, parts, preset)
        objective = Objective(model, data, loss, **chosen)
    if max_drop is not None and metric is not None:
        (pruned,) = _in_all_processes(
            objective, method, max_drop, lambda at: [_within(at, max_drop, metric, method, progress)]
        )
    else:
        (pruned,) = _through(objective, [method.goal(sparsity)], method, progress)
    pruned.write()
    return pruned.report


def sweep(
    model: nn.Module,
    data: Iterable[Batch] | None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    sparsities: float | Iterable[float] = SPARSITIES,
    *,
    criterion: str | Method = "woodfisher",
    preset: str | None = None,
    progress: Progress | None = None,
    **options: Unpack[PruningOptions],
) -> list[Pruned]:
    """Prune to several sparsities, by one run that passes through them all where the stages adapt.

    The model stays as it is; `Pruned.write(model)` puts one of the results into it. Arguments are those of
    `prune`. Methods with a fixed number of stages are run once for each sparsity, from the start.

    Returns
    -------
    In the order of `sparsities`.
    """
    with together():
        chosen, parts = apart(options)
        method = method_asked(criterion, parts, preset)
        objective = Objective(model, data, loss, **chosen)
    asked = list(sparsities) if isinstance(sparsities, Iterable) else [sparsities]
    others = digests(objective)
    return [replace(each, others=others) for each in _through(objective, asked, method, progress)]


@dataclass(frozen=True)
class Pruned:
    """A pruned network that is not in a model yet.

    Attributes
    ----------
    report:
        How it came about.
    objective:
        The objective at the pruned weights, with its mask and the buffers that belong to them.
    others:
        Digests of the parameters that are not chosen, where these may change before it is written.
    """

    report: Report
    objective: Objective
    others: Digests | None = field(default=None, repr=False)

    def write(self, model: nn.Module | None = None) -> None:
        """Put it into the model that was pruned, or into `model`: one like it, all other parameters included.

        Of a sweep, also into the former if that was trained since: not before it has its dense state dict again.
        """
        write(self.objective, model, self.others)

    def told(self) -> tuple[Changes, Report]:
        """What another process needs to have the same."""
        return self.objective.changes(), replace(self.report, masks={})

    @classmethod
    def of(cls, told: tuple[Changes, Report], objective: Objective) -> Pruned:
        """That of another process, which has the same `objective`."""
        at = objective.changed(told[0])
        masks = {name: mask.clone() for name, mask in at.layout.split(at.kept).items()}
        return cls(replace(told[1], masks=masks), at)


def _through(
    objective: Objective, sparsities: Sequence[float], method: Method, progress: Progress | None
) -> list[Pruned]:
    """Pruned to each sparsity, in that order, by all processes."""
    return _in_all_processes(
        objective, method, sparsities, lambda at: _sweep(at, sparsities, method, progress)
    )


def _in_all_processes(
    objective: Objective, method: Method, asked: object, prune: Callable[[Objective], list[Pruned]]
) -> list[Pruned]:
    """Prune on all ranks of the process group, each with its weights, or else on the first, which tells the others."""
    with together() as ranks:
        among = alike(objective.among(ranks), (method, asked))
        if ranks.size == 1 or can_be_dealt(method):
            return [replace(each, objective=each.objective.among(ALONE)) for each in prune(among)]
        alone = among.among(ALONE)
        told = ranks.first(lambda: [pruned.told() for pruned in prune(alone)])
        align_random(objective.data, ranks)
    return [Pruned.of(each, alone) for each in told]


def _sweep(
    objective: Objective, sparsities: Sequence[float], method: Method, progress: Progress | None
) -> list[Pruned]:
    if not sparsities:
        raise WoodfisherError("name at least one sparsity to prune to.")
    objective, selection = _started(objective, method)
    total, now = selection.total, selection.amount(objective.kept)
    amounts = [selection.final(sparsity) for sparsity in sparsities]
    selection.check_pattern(objective.kept, min(amounts))
    reached: dict[int, Pruned] = {}
    with watching(progress) as watch, phase("total"), isolated(objective.model):
        for sparsity, amount in zip(sparsities, amounts, strict=True):
            if amount > now:
                warn(
                    f"{1 - now / total:.2%} of the chosen weights are zero already, more than the sparsity "
                    f"{sparsity:.2%} asks for; nothing is removed."
                )
            if amount >= now:
                reached[amount] = _pruned(objective, [], method, selection, watch)
                watch.restart()
        data = objective.data
        wanted = sorted(set(amounts) - set(reached), reverse=True)
        _check_readable(objective, method, runs=len(wanted))
        passed = pruned_through(objective, wanted, method, selection)
        for amount, (at, stages) in zip(wanted, passed, strict=True):
            warn_of_lost_layers(at)
            reached[amount] = _pruned(at.on(data), stages, method, selection, watch)
            if not isinstance(method.staging, Adaptive):
                watch.restart()
    return [reached[amount] for amount in amounts]


def _within(
    objective: Objective,
    max_drop: float,
    metric: Callable[[nn.Module], float],
    method: Method,
    progress: Progress | None,
) -> Pruned:
    check_fraction("max_drop", max_drop)
    if method.pattern.sparsity is not None:
        raise WoodfisherError(
            f"the pattern {method.pattern} has one sparsity, so there is none to look for: no max_drop."
        )
    trial = copied(objective.model)
    objective, selection = _started(objective, method)
    now = selection.amount(objective.kept)
    if not now:
        raise WoodfisherError("every chosen weight is zero already: there is nothing to prune.")
    steps = math.ceil(math.log(max(LEAST_KEPT * selection.total, 1) / now) / math.log(FINEST_RATIO))
    counts = sorted({round(now * FINEST_RATIO**step) for step in range(1, steps + 1)} - {0}, reverse=True)
    data = objective.data
    _check_readable(objective, method, runs=len(counts))
    with watching(progress) as watch, phase("total"), isolated(objective.model):

        def measured() -> float:
            with phase("metric"), unmoved(objective.data):
                return objective.ranks.first(lambda: _metric_of(metric, copied(trial)))

        dense = measured()
        least = dense - max_drop * abs(dense)
        if not dense:
            warn(
                "the metric is 0 before anything is removed, of which no share can be lost: see what it measures."
            )

        values: list[float] = []

        def networks(amounts: Sequence[int]) -> Iterator[Pruned]:
            with suppress(TooSparseError):
                for at, stages in pruned_through(objective, amounts, method, selection):
                    yield _pruned(at.on(data), stages, method, selection, watch)

        def reached(amounts: Sequence[int]) -> Iterator[tuple[Pruned, float]]:
            for pruned in networks(amounts):
                pruned.write(trial)
                values.append(measured())
                yield pruned, values[-1]

        search = _last if isinstance(method.staging, Adaptive) else _last_by_halving
        best, value = search(reached, counts, least)
        if best is not None and len(values) > 1 and set(values) == {dense}:
            raise WoodfisherError(
                f"metric(model) is {dense:g} for the dense model and for all {len(values)} sparser ones, down to "
                f"{best.report.sparsity:.2%}: it has to measure the model that it is called with, "
                "a copy of the one to prune. The model is unchanged."
            )
        if best is None and not counts:
            warn(
                f"{now} of {selection.total} are left already, and sparser networks than {1 - LEAST_KEPT:.1%} are not "
                "looked for: nothing is removed."
            )
        elif best is None:
            warn(
                f"removing {1 - FINEST_RATIO:.0%} of the weights already costs more than the drop of "
                f"{max_drop:.2%}: the metric is {dense:g} dense, and has to be {least:g}. Nothing is removed."
            )
        best = best or _pruned(objective, [], method, selection, watch)
        if 0 < dense < value / (1 + _UNLIKELY_GAIN):
            warn(
                f"the metric rose from {dense:g} to {value:g} by pruning: larger is taken for better, so return the "
                "negative of one that is to be small."
            )
        warn_of_lost_layers(best.objective)
    return replace(best, report=replace(best.report, warnings=warnings_of(objective, watch)))


def _check_readable(objective: Objective, method: Method, *, runs: int) -> None:
    """Raise where data that can be read only once is to serve several runs of a fixed number of stages."""
    if (
        runs > 1
        and objective.reads_once
        and method.curvature.samples
        and not isinstance(method.staging, Adaptive)
    ):
        raise WoodfisherError(
            "with a fixed number of stages there is a run for each sparsity that is tried, and the data can be read "
            "only once: give a list of batches or a DataLoader, or ask for one sparsity."
        )


def _last(
    reached: Callable[[Sequence[int]], Iterator[tuple[Pruned, float]]], amounts: Sequence[int], least: float
) -> tuple[Pruned | None, float]:
    """The sparsest network of one run, up to the first whose metric is below `least`, and that metric."""
    best, its = None, least
    for pruned, value in reached(amounts):
        if value < least:
            break
        best, its = pruned, value
    return best, its


def _last_by_halving(
    reached: Callable[[Sequence[int]], Iterator[tuple[Pruned, float]]], amounts: Sequence[int], least: float
) -> tuple[Pruned | None, float]:
    """The same where each amount takes a run of its own: by halving the amounts that are left."""
    best: Pruned | None = None
    its, low, high = least, 0, len(amounts)
    while low < high:
        middle = (low + high) // 2
        found, value = next(reached([amounts[middle]]), (None, -math.inf))
        if value >= least:
            best, its, low = found, value, middle + 1
        else:
            high = middle
    return best, its


def _metric_of(metric: Callable[[nn.Module], float], model: nn.Module) -> float:
    with isolated(model):
        value: object = metric(model)
    return metric_value(value, f"metric(model) must return a finite number; {value!r} came.")


def _started(objective: Objective, method: Method) -> tuple[Objective, Selection]:
    """The objective with what is there to begin with, and what may stay of it."""
    selection = method.selection(objective)
    return objective.at(objective.weights, selection.present(objective.kept)).begun(), selection


def _pruned(
    objective: Objective, stages: Sequence[Stage], method: Method, selection: Selection, watch: Watch
) -> Pruned:
    report = report_of(objective, stages, method, selection, watch)
    seconds, warnings = objective.ranks.first(lambda: (report.seconds, report.warnings))
    own = {name: buffer.clone() for name, buffer in objective.buffers.items()}
    return Pruned(replace(report, seconds=seconds, warnings=warnings), objective.with_buffers(own))
