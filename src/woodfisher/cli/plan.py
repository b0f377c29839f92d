"""`woodfisher plan`."""

from __future__ import annotations

from dataclasses import dataclass, field

from woodfisher.checks import check_choice
from woodfisher.cli.console import note, out, print_json
from woodfisher.cli.options import MethodOptions, TaskOptions
from woodfisher.curvature import WoodFisher
from woodfisher.errors import WoodfisherError
from woodfisher.pruning.method import METHODS
from woodfisher.pruning.preview import plan


@dataclass(frozen=True)
class Plan:
    """Say what a pruning run would keep where, and what memory and time it would take, without doing it.

    Takes the options of `woodfisher prune`. Of the data only the first samples are read; times come from a
    calibration of some seconds on this machine. What cannot fit is refused, with the least memory that would do.
    """

    model: TaskOptions = field(default_factory=TaskOptions)
    method: MethodOptions = field(default_factory=MethodOptions)

    criterion: str = "woodfisher"
    """A criterion of `woodfisher prune` whose curvature is made of gradient rows."""

    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def run(self) -> None:
        """Load the task, plan, show."""
        check_choice("criterion", self.criterion, METHODS)
        method = self.method.method(self.criterion, strict=True)
        if not isinstance(method.curvature, WoodFisher):
            raise WoodfisherError(
                f"the criterion {self.criterion} keeps no gradient rows, so that there is nothing to plan: it takes "
                "little more memory than the model."
            )
        note(f"loading {self.model.task}")
        task = self.model.load()
        model, (method,) = self.method.settled(self.model, task, method)
        made = plan(model.objective(task), method)
        if self.json:
            print_json({"task": self.model.task, "criterion": self.criterion, **made.to_dict()})
        else:
            when = "at each stage: " if isinstance(method.staging, int) else ""
            out().print(f"{self.model.task}, {self.criterion}, {when}{made}", soft_wrap=True)
