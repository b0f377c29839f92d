"""What a command that prunes a task's model leaves behind."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from woodfisher.cli.console import note
from woodfisher.cli.origin import origin
from woodfisher.errors import WoodfisherError
from woodfisher.files import save_json, text_of, write_folder
from woodfisher.pruning.report import layers_of
from woodfisher.results.examine import examine
from woodfisher.results.metrics import score
from woodfisher.results.page import save_page
from woodfisher.saving.saved import packed_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from woodfisher.cli.options import TaskOptions
    from woodfisher.gradients.objective import Objective
    from woodfisher.pruning.method import Method
    from woodfisher.pruning.report import Report
    from woodfisher.tasks import Task
    from woodfisher.training.gradual import Trained


def layers_given(objective: Objective) -> list[dict[str, Any]]:
    """What an objective keeps of each layer, as JSON takes it."""
    return [layer.to_dict() for layer in layers_of(objective.layout.split(objective.kept))]


def before(content: Mapping[str, Any]) -> tuple[str, int]:
    """What a table calls the network that a command was given, and how many weights it keeps."""
    kept = sum(layer["kept"] for layer in content["dense"]["layers"])
    return "dense" if kept == content["size"] else "as given", kept


def evaluate(task: Task, model: Any, name: str) -> float:
    """The metric on test data, told as it is known."""
    start = time.perf_counter()
    value = task.evaluate(model)
    took = time.perf_counter() - start
    note(f"{name}: {task.metric_name} {score(value, task.metric_name)} on test data ({took:.1f} s)")
    return value


def evaluate_if_possible(task: Task, model: Any, name: str) -> float | None:
    """The same for what would be lost otherwise: None where the metric fails, or is not finite."""
    try:
        return evaluate(task, model, name)
    except WoodfisherError as error:
        note(f"{name} has no metric: {error}")
        return None


@dataclass(frozen=True)
class Outcome:
    """The compressed model, a report, a figure, and a page that shows them.

    Attributes
    ----------
    options, task:
        Of the command, and what they loaded; the task's model is the pruned one by the time of `write`.
    method:
        How it was pruned.
    folder:
        Where to write.
    asked:
        What the report repeats of what was asked for.
    """

    options: TaskOptions
    task: Task
    method: Method
    folder: Path
    asked: Mapping[str, Any]

    def write(
        self,
        result: Report | Trained,
        objective: Objective,
        metrics: Mapping[str, Any],
        figure: tuple[str, Callable[[Path], object]],
    ) -> dict[str, Any]:
        """Write all files, whole or not at all, and return what the report holds.

        Parameters
        ----------
        result:
            What pruning says of itself.
        objective:
            Of the task's model.
        metrics:
            Of the networks that were measured on test data, by the names that they have in the report.
        figure:
            Name of the file, and what draws it.
        """
        examined = examine(objective.current(objective.layout.flatten(result.masks)), self.method.curvature)
        weights = packed_model(self.task.model, result.masks)
        content = {
            "task": self.options.task,
            "metric": self.task.metric_name,
            **self.asked,
            "seed": self.options.seed,
            **metrics,
            **result.to_dict(),
            "examined": examined.to_dict(),
            "origin": origin(self.options.device),
            "bytes": weights.to_dict(),
            "out": text_of(self.folder),
        }
        name, draw = figure
        write_folder(
            self.folder,
            {
                "model.safetensors": weights.write,
                "report.json": lambda path: save_json(content, path),
                name: draw,
                "report.html": lambda path: save_page(content, path),
            },
        )
        return content
