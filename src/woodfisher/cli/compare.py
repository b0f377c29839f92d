"""`woodfisher compare`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from woodfisher.batches import Replay
from woodfisher.checks import check_sparsity
from woodfisher.cli.console import note, out, print_json, progress
from woodfisher.cli.options import Folder, MethodOptions, TaskOptions, parse_methods
from woodfisher.errors import WoodfisherError
from woodfisher.files import check_folder, save_json, write_folder
from woodfisher.plots import plot_accuracy, require_plots
from woodfisher.pruner import prune_objective


@dataclass(frozen=True)
class Compare:
    """Prune one network by several methods to several sparsities, under one protocol.

    Every method starts from the same dense network, draws the same training samples and prunes the same
    layers; each result is measured once on the test data. Options of the curvature (samples, damping, ...)
    apply to every method that has them.

    With --out, writes OUT/report.json and OUT/accuracy.png.
    """

    model: TaskOptions = field(default_factory=TaskOptions)
    method: MethodOptions = field(default_factory=MethodOptions)

    sparsity: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95)
    """Fractions of the weights to remove, each in [0, 1)."""

    methods: str = "magnitude,obd,woodfisher"
    """Comma-separated criteria, as in `woodfisher prune`."""

    out: Folder = None
    """Folder for the results; files there are replaced."""

    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def run(self) -> None:
        """Check everything, prune and evaluate method by method, write, show."""
        if not self.sparsity:
            raise WoodfisherError("name at least one sparsity, as in --sparsity 0.5 0.9.")
        for sparsity in self.sparsity:
            check_sparsity(sparsity)
        names = parse_methods(self.methods)
        methods = {name: self.method.method(name, strict=False) for name in names}
        if self.out is not None:
            check_folder(self.out)
            require_plots()
        note(f"loading {self.model.task}")
        task = self.model.load()
        dense = task.evaluate(task.model)
        note(f"dense: {task.metric_name} {dense:.2f}")
        data = Replay(task.train)
        results: list[dict[str, Any]] = []
        for name, method in methods.items():
            for sparsity in self.sparsity:
                model = copy.deepcopy(task.model)
                cell = {"criterion": name, "requested_sparsity": sparsity}
                try:
                    with progress(f"{name} to {sparsity:g}") as show:
                        objective = self.model.objective(task, model).on(data)
                        report = prune_objective(objective, sparsity, method, show)
                    metric = task.evaluate(model)
                except WoodfisherError as error:
                    note(f"{name} at {sparsity:g} failed: {error}")
                    results.append({**cell, "error": str(error)})
                    continue
                note(f"{name} {report.sparsity:.2%}: {task.metric_name} {metric:.2f}")
                results.append({**cell, "metric": metric, **report.to_dict()})
        if all("error" in result for result in results):
            raise WoodfisherError("every run failed, as told above.")
        content = {
            "task": self.model.task,
            "metric": task.metric_name,
            "preset": self.method.preset,
            "seed": self.model.seed,
            "dense": {"metric": dense},
            "results": results,
        }
        if self.out is not None:
            curves = {
                name: [
                    (r["sparsity"], r["metric"]) for r in results if r["criterion"] == name and "metric" in r
                ]
                for name in names
            }
            write_folder(
                self.out,
                {
                    "report.json": lambda path: save_json(content, path),
                    "accuracy.png": lambda path: plot_accuracy(curves, dense, task.metric_name, path),
                },
            )
        if self.json:
            print_json(content)
        else:
            _show(content, names)


def _show(content: dict[str, Any], names: list[str]) -> None:
    """One row a method, one column a sparsity."""
    table = Table(
        title=f"{content['task']}: test {content['metric']}; dense {content['dense']['metric']:.2f}"
    )
    table.add_column("method")
    rows = {name: [r for r in content["results"] if r["criterion"] == name] for name in names}
    for result in rows[names[0]]:
        table.add_column(f"{100 * result['requested_sparsity']:g} %", justify="right")
    table.add_column("time", justify="right")
    for name, results in rows.items():
        seconds = sum(result["seconds"]["total"] for result in results if "seconds" in result)
        cells = [f"{result['metric']:.2f}" if "metric" in result else "failed" for result in results]
        table.add_row(name, *cells, f"{seconds:.1f} s")
    out().print(table)
