"""Stages that adapt: their options, and the runs, with the gradient and without, of which held-out samples choose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from woodfisher.checks import check_count, check_fraction, check_positive
from woodfisher.curvature.base import DiagonalInverse
from woodfisher.gradients.batches import Stream
from woodfisher.gradients.normalisation import recalibrated
from woodfisher.pruning.held_out import HeldOut, mean_loss
from woodfisher.pruning.report import Stage
from woodfisher.pruning.run import AdaptiveRun, Passed
from woodfisher.pruning.window import known_samples, window_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from woodfisher.gradients.objective import Objective
    from woodfisher.pruning.method import Method
    from woodfisher.surgeon.selection import Selection

_MORE = 4
"""Samples beside each held-out one that removing by magnitude has to be better on too."""


@dataclass(frozen=True)
class Adaptive:
    """Many small stages that carry their rows along, each checked on samples that are never used for rows.

    The first stage fills the window with rows, later ones renew an equal share of it each; the estimator's
    `samples` counts those of all stages, and a row averages `group` of them (fewer where the data would not fill
    the window otherwise). Each stage removes weights and moves the rest to the minimum of the quadratic model, at
    several dampings; what has the lowest loss on the held-out samples is taken. A stage that raises that loss by
    far more than predicted is taken back, tried with weights ranked where they stand if the gradient took part in
    that, and then split in two; those that follow are no larger until one goes easily.

    With the gradient the kept weights also move while a stage's rows come, whose samples are chosen from more of them
    (`Important`). A sixth of the stages does so before anything is removed, as long as that lowers the held-out loss,
    and half of them after the sparsities that are asked for. At each of these the mean of where the weights stood is
    taken if held-out samples like it better.

    Attributes
    ----------
    stages:
        Planned stages; splits may add as many again, in proportion to the way gone, and those that follow then renew
        fewer rows. Where samples are few, a third of them is planned for the run without the gradient.
    window:
        Most rows that the Fisher is made of. Scoring takes 2N²d operations, and N is less where that would be more
        than about a second on two cores, or where the data has not as many or the memory no room for them.
    held_out:
        Samples to check on, at most a fifth of the data; never used for rows.
    among:
        Samples that are looked at, by a forward pass, for each by whose gradient weights move; 1: taken as they come.
    momentum:
        Weight of earlier stages' gradients in the first-order term.
    pace:
        The kept fraction follows `final ** (t ** pace)` for t from 0 to 1: above 1, later stages remove a
        smaller share of what is left.
    """

    stages: int = 120
    window: int = 800
    held_out: int = 512
    among: int = 2
    momentum: float = 0.7
    pace: float = 1.5

    def __post_init__(self) -> None:
        for name in ("stages", "window", "held_out", "among"):
            check_count(name, getattr(self, name))
        check_fraction("momentum", self.momentum)
        check_positive("pace", self.pace, "where 1 removes the same share at every stage")


def adaptive_run(
    objective: Objective, targets: Sequence[int], method: Method, selection: Selection, *, skip: int = 0
) -> Iterator[Passed]:
    """Prune through `targets` (what is kept of `selection.total`, largest first) with stages that adapt.

    With first_order="auto" the gradient takes part where the data is enough to believe it: gradients of samples
    that come again and again fit these samples, which one stage at a time does not show. So where the plan
    reads the data many times (`MOST_PASSES`) the run is made with and without; at each target the one with the lower
    loss on the held-out samples counts. Removing by magnitude alone competes with both. No sample has a part in that,
    so where its loss is the lowest on the held-out ones it has to be so by its rise on more of them, too: a rise on a
    few hundred is often less than its noise. The first `skip` samples of the data are passed over.
    """
    stream = Stream(objective.data)
    stream.skip(skip)
    known = known_samples(objective, method, stream)
    window = window_for(objective, method, known, reads_once=stream.reads_once)
    held_out = HeldOut.of(objective, stream.hold_out(window.held_out))
    streams = [stream, *(stream.fork() for _ in window.courses[1:])]
    bounded = objective.within(window.chunk)
    runs = [
        AdaptiveRun(bounded, method, selection, course, held_out, each)
        for each, course in zip(streams, window.courses, strict=True)
    ]
    by_size = _by_magnitude(objective, targets, method, selection, held_out, stream)
    for *passed, smallest_gone in zip(*(run.passing(targets) for run in runs), by_size, strict=True):
        best = min(passed, key=lambda p: p.loss)
        if smallest_gone.loss < best.loss and not stream.reads_once:
            more = [*held_out.batches, *stream.fork().draw(_MORE * window.held_out)]
            rise = mean_loss(smallest_gone.objective, more) - mean_loss(objective, more)
            smallest_gone = replace(smallest_gone, loss=max(smallest_gone.loss, held_out.dense + rise))
        yield min(best, smallest_gone, key=lambda p: p.loss)


def _by_magnitude(
    objective: Objective,
    targets: Sequence[int],
    method: Method,
    selection: Selection,
    held_out: HeldOut,
    stream: Stream,
) -> Iterator[Passed]:
    """Remove the smallest weights (or groups of least norm) and leave the rest."""
    scores = selection.scores(objective.weights, DiagonalInverse(torch.ones_like(objective.weights)))
    for amount in targets:
        keep = selection.best(scores, objective.kept, amount)
        pruned = recalibrated(objective.at(objective.weights, keep), stream, method.recalibrate)
        loss = held_out.loss(pruned)
        stage = Stage(1 - int(keep.sum()) / objective.layout.size, None, loss - held_out.dense)
        yield Passed(pruned, loss, (stage,))
