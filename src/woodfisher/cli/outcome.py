"""What a command that prunes a task's model leaves behind."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.bar import Bar
from rich.table import Table

from woodfisher.cli.console import note
from woodfisher.cli.origin import origin
from woodfisher.errors import WoodfisherError
from woodfisher.files import check_other_file, save_json, text_of, write_folder
from woodfisher.pruning.report import layers_of
from woodfisher.results.examine import examine
from woodfisher.results.numbers import given_name, score
from woodfisher.results.page import save_page
from woodfisher.saving.saved import packed_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from woodfisher.cli.options import TaskOptions
    from woodfisher.gradients.objective import Objective
    from woodfisher.pruning.method import Method
    from woodfisher.pruning.report import Layer, Report
    from woodfisher.tasks import Task
    from woodfisher.training.gradual import Trained


_MODEL = "model.safetensors"


def folder_for(options: TaskOptions, chosen: Path | None, run: str) -> Path:
    """Where a run's results go; raises if the weights that it begins with would be replaced by its own."""
    folder = options.folder(chosen, run)
    if options.weights is not None:
        check_other_file(folder / _MODEL, options.weights)
    return folder


def layers_given(objective: Objective) -> list[dict[str, Any]]:
    """What an objective keeps of each layer, as JSON takes it."""
    return [layer.to_dict() for layer in layers_of(objective.layout.split(objective.kept))]


def before(content: Mapping[str, Any]) -> tuple[str, int]:
    """What a table calls the network that a command was given, and how many weights it keeps."""
    kept = sum(layer["kept"] for layer in content["dense"]["layers"])
    return given_name(kept, content["size"]), kept


def layers_table(title: str, columns: Mapping[str, Sequence[Layer]]) -> Table:
    """Sparsity of each layer in columns of these headings; the last is drawn, too, as wide as there is room."""
    table = Table(title=title)
    table.add_column("layer")
    for heading in ("weights", *columns):
        table.add_column(heading, justify="right")
    table.add_column("", max_width=20)
    for layers in zip(*columns.values(), strict=True):
        drawn = layers[-1]
        cells = [f"{layer.sparsity:.1%}" for layer in layers]
        table.add_row(drawn.name, f"{drawn.size:,}", *cells, Bar(1, 0, drawn.sparsity))
    return table


def where(content: Mapping[str, Any]) -> str:
    """Where the files are that hold all of what was shown."""
    return f"Results are in {content['out']}" if content["out"] else "No file was written"


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
    """The compressed model and a report, with a figure and a page that show them.

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

    def show(
        self,
        result: Report | Trained,
        objective: Objective,
        metrics: Mapping[str, Any],
        figure: tuple[str, Callable[[Path], object]],
        shown: Callable[[dict[str, Any]], object],
    ) -> None:
        """Write all files, whole or not at all, and show what the report holds, also where it can't be written.

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
        shown:
            Shows the report, whose `out` is None where nothing was written.
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
        try:
            write_folder(
                self.folder,
                {_MODEL: weights.write, "report.json": lambda path: save_json(content, path)},
                {name: draw, "report.html": lambda path: save_page(content, path)},
            )
        except WoodfisherError:
            shown({**content, "out": None})
            raise
        shown(content)
