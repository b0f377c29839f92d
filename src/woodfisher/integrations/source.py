"""What callbacks of all libraries have in common: where the pruner comes from, and whether it is done in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from woodfisher.errors import WoodfisherError
from woodfisher.pruning.pruner import Pruner
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


@dataclass(frozen=True)
class PrunerSource:
    """A pruner of the model that is trained, or a function that makes one as training starts."""

    source: Pruner | Callable[[Any], object]

    def __post_init__(self) -> None:
        if not isinstance(self.source, Pruner) and not callable(self.source):
            raise WoodfisherError(f"give a Pruner, or a function that makes one; {self.source!r} came.")

    @property
    def given(self) -> Pruner | None:
        """The pruner, where no function makes it."""
        return self.source if isinstance(self.source, Pruner) else None

    def of(self, model: nn.Module) -> Pruner:
        """The pruner of the model that is trained, made of it where a function is to."""
        pruner = self.source if isinstance(self.source, Pruner) else self.source(model)
        if not isinstance(pruner, Pruner):
            raise WoodfisherError(f"the function must return the Pruner that it makes; {pruner!r} came.")
        if name := pruner.missing_in(model):
            raise WoodfisherError(
                f"the pruner is that of another model: the one that is trained doesn't have its {name!r}. Give the "
                "callback a pruner of the latter, or a function that makes one of the model that it gets."
            )
        return pruner


def warn_unless_done(pruner: Pruner, steps: str = "steps of the optimizer") -> None:
    """Warn where training ended before the schedule did; `steps` says what was counted."""
    goal = pruner.schedule.goal
    if pruner.steps <= pruner.schedule.reached:
        asked = (pruner.schedule.at(step) for step in reversed(range(pruner.steps)))
        last = next((sparsity for sparsity in asked if sparsity is not None), 0.0)
        warn(
            f"training ended after {pruner.steps} {steps}, before the schedule reached its sparsity {goal:g} ({last:g} "
            "by then): have it end sooner, or train longer."
        )
