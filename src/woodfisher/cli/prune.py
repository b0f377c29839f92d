"""`woodfisher prune`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from tyro.conf import arg

from woodfisher.checks import check_choice, check_fraction, check_sparsity
from woodfisher.cli.console import note, out, print_json, process_group, progress, size_on_disk
from woodfisher.cli.options import Folder, MethodOptions, Number, TaskOptions
from woodfisher.cli.outcome import (
    Outcome,
    before,
    evaluate,
    evaluate_if_possible,
    folder_for,
    layers_given,
    layers_table,
    where,
)
from woodfisher.distributed import together
from woodfisher.errors import WoodfisherError, WoodfisherWarning
from woodfisher.gradients.isolation import copied
from woodfisher.pruning.method import METHODS
from woodfisher.pruning.oneshot import prune
from woodfisher.results.numbers import mean_score, score
from woodfisher.results.page import require_page
from woodfisher.results.plots import plot_layers, require_plots

SHOWN_STAGES = 12

if TYPE_CHECKING:
    from woodfisher.gradients.objective import Objective
    from woodfisher.pruning.method import Method
    from woodfisher.pruning.report import Report
    from woodfisher.tasks import Task


@dataclass(frozen=True)
class Prune:
    """Prune a trained network without a training loop, and save it with a report.

    Gradients of training samples give the inverse Fisher; every weight is scored by how much the loss rises without
    it; the cheapest go, across all layers at once, and the rest moves to compensate: in many small stages by
    default, in one shot with --stages 1. The test accuracy is shown beside the dense network's and beside magnitude
    pruning of the same sparsity.

    Without arguments: a small network is trained on scikit-learn's digits and pruned, in a minute or two.

    Started by torchrun, its processes share the work (for blockwise methods), and the first one writes and shows.

    Writes OUT/model.safetensors (compressed; see `woodfisher inspect`), OUT/report.json, OUT/layers.png and
    OUT/report.html, which shows it all.
    """

    model: TaskOptions = field(default_factory=TaskOptions)
    method: MethodOptions = field(default_factory=MethodOptions)

    sparsity: Number = None
    """Fraction of the weights to remove, in [0, 1) (default: 0.95, or that of the pattern)."""

    max_drop: Annotated[str | None, arg(metavar="X%", help_behavior_hint="")] = None
    """Instead: the sparsest network whose validation metric stays within this share of the dense one, as in 1%."""

    criterion: str = "woodfisher"
    """What decides: woodfisher, and woodtaylor (always uses the gradient), with one block over all weights and
    stages that adapt; woodfisher-full and mfac (16 stages); the blockwise woodfisher-block and woodtaylor-block;
    kfac, obd (diagonal Fisher), obd-hessian (diagonal of the exact Hessian), hessian (exact; small networks),
    magnitude, magnitude-layer."""

    out: Folder = None
    """Folder for the results (default: runs/TASK-CRITERION-SPARSITY-seedSEED); files there are replaced."""

    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def run(self) -> None:
        """Check everything, prune, evaluate, write, show."""
        with process_group(self.model.device):
            self._run()

    def _run(self) -> None:
        check_choice("criterion", self.criterion, METHODS)
        method = self.method.method(self.criterion, strict=True)
        drop, sparsity = self._goal(method)
        aim = f"{sparsity:g}" if drop is None else f"drop{drop:g}"
        folder = folder_for(self.model, self.out, f"{self.criterion}-{aim}")
        require_plots()
        require_page()
        note(f"loading {self.model.task}")
        with together() as ranks:
            task = self.model.load()
            model, (method,) = self.method.settled(self.model, task, method)
            objective = model.objective(task)
            baseline = copied(task.model)
            dense = ranks.first(lambda: evaluate(task, task.model, "dense"))
        with progress(f"{self.criterion} to {aim}") as show:
            report = prune(
                task.model,
                task.train,
                task.loss,
                sparsity,
                max_drop=drop,
                metric=None if drop is None else task.validate,
                criterion=method,
                progress=show,
                **model.chosen,
            )
        reached = report.sparsity if report.flops_removed is None else report.flops_removed
        by_size = replace(
            METHODS["magnitude"],
            recalibrate=method.recalibrate,
            pattern=method.pattern,
            scope=method.scope,
            floor=method.floor,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WoodfisherWarning)
            magnitude = prune(
                baseline,
                task.train,
                task.loss,
                reached if sparsity is None else sparsity,
                criterion=by_size,
                **model.chosen,
            )
        asked = {
            "criterion": self.criterion,
            "preset": self.method.preset,
            "requested_sparsity": sparsity,
            "max_drop": drop,
        }
        outcome = Outcome(model, task, method, folder, asked)
        with together() as ranks:
            ranks.first(lambda: self._finish(outcome, objective, baseline, dense, report, magnitude))

    def _finish(
        self,
        outcome: Outcome,
        objective: Objective,
        baseline: Any,
        dense: float,
        report: Report,
        magnitude: Report,
    ) -> None:
        """Evaluate, write, show."""
        task = outcome.task
        pruned = evaluate_if_possible(task, task.model, self.criterion)
        same = self.criterion == "magnitude"
        by_size = {
            "metric": pruned if same else evaluate_if_possible(task, baseline, "magnitude"),
            "sparsity": magnitude.sparsity,
            "layers": [layer.to_dict() for layer in magnitude.layers],
        }
        curves = {self.criterion: report.layers, "magnitude": magnitude.layers}
        outcome.show(
            report,
            objective,
            {
                "dense": {"metric": dense, "layers": layers_given(objective)},
                "magnitude": by_size,
                "pruned": {"metric": pruned},
            },
            ("layers.png", lambda path: plot_layers(curves, report.sparsity, path)),
            print_json if self.json else partial(_show, task, report, magnitude),
        )

    def _goal(self, method: Method) -> tuple[float | None, float | None]:
        """The drop allowed or the sparsity, and None for the other."""
        if self.max_drop is None:
            sparsity = method.goal(self.sparsity)
            check_sparsity(sparsity)
            return None, sparsity
        if self.sparsity is not None:
            raise WoodfisherError("give --sparsity or --max-drop, not both: one follows from the other.")
        text = self.max_drop.removesuffix("%")
        try:
            drop = float(text) / (100 if text != self.max_drop else 1)
        except ValueError:
            raise WoodfisherError(
                f"--max-drop takes a share, as in 1% or 0.01; {self.max_drop!r} came."
            ) from None
        check_fraction("--max-drop", drop)
        return drop, None


def _show(task: Task, report: Report, magnitude: Report, content: dict[str, Any]) -> None:
    console = out()
    summary = Table(title=f"{content['task']}: {report.sparsity:.2%} of {report.size:,} weights removed")
    for column in ("", f"test {task.metric_name}", "kept weights", "time"):
        summary.add_column(column, justify="right" if column else "left")
    name, kept = before(content)
    summary.add_row(name, score(content["dense"]["metric"], task.metric_name), f"{kept:,}", "")
    rows = {"magnitude": (content["magnitude"]["metric"], magnitude)}
    rows[content["criterion"]] = (content["pruned"]["metric"], report)
    for name, (metric, run) in rows.items():
        summary.add_row(
            name, mean_score(metric, None, task.metric_name), f"{run.kept:,}", f"{run.seconds['total']:.1f} s"
        )
    console.print(summary)
    columns = {"magnitude": magnitude.layers, content["criterion"]: report.layers}
    console.print(layers_table("Sparsity of each layer, as the ranking chose it", columns))
    if any(stage.measured is not None for stage in report.stages):
        console.print(_stages(report))
    console.print(size_on_disk(content["bytes"]))
    console.print(where(content), soft_wrap=True)


def _stages(report: Report) -> Table:
    """Predicted and measured change of the loss side by side, of a few stages."""
    adapt = isinstance(report.method["stages"], dict)
    where = "held-out samples" if adapt else "samples of the rows"
    accepted = sum(stage.accepted for stage in report.stages)
    count = f"{accepted} stage{'s' * (accepted > 1)}"
    tries = f", {len(report.stages) - accepted} tries taken back" if adapt else ""
    table = Table(title=f"{count}{tries}: change of the loss ({where})")
    columns = ["sparsity", "predicted", "measured", "damping", "gradient", *["taken back before"] * adapt]
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    every = -(-accepted // SHOWN_STAGES)
    if every > 1:
        table.caption = f"one in {every} and the last; report.json has all"
    number = taken_back = 0
    for stage in report.stages:
        if not stage.accepted:
            taken_back += 1
            continue
        number += 1
        if number % every and number != accepted:
            continue
        cells = [
            f"{stage.sparsity:.1%}",
            "" if stage.predicted is None else f"{stage.predicted:+.2g}",
            "" if stage.measured is None else f"{stage.measured:+.2g}",
            f"{stage.damping:.3g}" if stage.damping else "weights stay" if adapt else "",
            "yes" if stage.first_order else "no",
            f"{taken_back}" if taken_back else "",
        ]
        table.add_row(*cells[: len(columns)])
        taken_back = 0
    return table
