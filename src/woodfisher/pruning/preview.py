"""`plan`: what pruning will take, before any work."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from woodfisher.curvature import WoodFisher
from woodfisher.curvature.base import Estimator
from woodfisher.curvature.machine import calibrated
from woodfisher.curvature.planning import planned
from woodfisher.errors import WoodfisherError
from woodfisher.gradients.base import check_gradients
from woodfisher.gradients.batches import Stream
from woodfisher.gradients.isolation import isolated
from woodfisher.gradients.randomness import unmoved
from woodfisher.pruning.adaptive import Adaptive
from woodfisher.pruning.method import Method
from woodfisher.pruning.window import known_samples, samples_that_matter, window_for

if TYPE_CHECKING:
    from woodfisher.curvature.planning import Plan
    from woodfisher.gradients.objective import Objective
    from woodfisher.pruning.window import Window


_DOUBLE = 2
"""Times that products in float64, of which an update's factors are made, take those in float32."""


def plan(objective: Objective, how: WoodFisher | Method, memory: str | int | None = None) -> Plan | Window:
    """Where gradient rows would be kept, and what memory and time it would take, without doing it.

    Of the data only the first samples are read, where it tells its length. Times come from a calibration of some
    seconds on this machine, in which gradients of these samples are taken.

    Parameters
    ----------
    objective:
        What would be pruned.
    how:
        A curvature, or a method, as in `METHODS["woodfisher"]`, which is planned by its stages.
    memory:
        Bytes that the whole process may have at its peak, as a number or as in `4GiB`; default: the curvature's
        own, and otherwise what is free.

    Returns
    -------
    How the rows of a curvature are kept, at each stage where there are several; or the window of rows that stages
    carry which adapt. Both have `peak`, `bill` and `seconds`, and print as a few lines.

    Raises
    ------
    WoodfisherError
        If that is not enough; the message says what would do.
    """
    check_gradients(objective, "a plan is for")
    if not isinstance(how, (Method, Estimator)):
        raise WoodfisherError(
            f"a plan is for a curvature or a method, as in wf.plan(objective, wf.METHODS['woodfisher']); {how!r} came."
        )
    curvature = how.curvature if isinstance(how, Method) else how
    if not isinstance(curvature, WoodFisher):
        raise WoodfisherError(f"a plan is for the rows of a wf.WoodFisher, and {curvature!r} keeps none.")
    if memory is not None:
        curvature = replace(curvature, memory=memory)
    objective = objective.begun()  # with what the process has before gradients are timed
    machine = calibrated(objective)
    method = replace(how, curvature=curvature) if isinstance(how, Method) else None
    if method is not None and isinstance(method.staging, Adaptive):
        return _window(objective, method).timed(objective, machine)
    made = planned(objective, curvature, machine)
    if method is None or method.update == "none":
        return made
    moving = _DOUBLE * 2 * made.rows * min(made.rows, made.block_size) * made.weights
    return replace(made, seconds={**made.seconds, "update": machine.products(moving)})


def _window(objective: Objective, method: Method) -> Window:
    """The window of stages that adapt; data that can be read only once is not read."""
    once = objective.reads_once
    if once:
        known = objective.known_samples() or samples_that_matter(method, reads_once=True)
    else:
        with isolated(objective.model), unmoved(objective.data):
            known = known_samples(objective, method, Stream(objective.data))
    return window_for(objective, method, known, reads_once=once, look=True)
