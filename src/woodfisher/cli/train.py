"""`woodfisher train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from woodfisher.checks import check_choice, check_sparsity
from woodfisher.cli.console import note, out, print_json, progress, size_on_disk
from woodfisher.cli.options import Epochs, Folder, MethodOptions, Number, TaskOptions
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
from woodfisher.pruning.method import METHODS
from woodfisher.pruning.schedule import Polynomial
from woodfisher.results.numbers import mean_score, score
from woodfisher.results.page import require_page
from woodfisher.results.plots import plot_training, require_plots
from woodfisher.training.gradual import Training, gradually, require_lightning, train

if TYPE_CHECKING:
    from woodfisher.tasks import Task
    from woodfisher.training.gradual import Epoch, Trained


@dataclass(frozen=True)
class Train:
    """Train a network on while weights are removed from it, step by step, and save the best one.

    The sparsity rises from --initial at --begin to --sparsity at --end as a cubic (or as --power says); each time,
    curvature is estimated at the weights as they are then. The best epoch after that is chosen on validation data,
    and measured once on test data.

    Without arguments: the network for scikit-learn's digits, in under a minute.

    Writes OUT/model.safetensors (compressed; see `woodfisher inspect`), OUT/report.json, OUT/metrics.csv,
    OUT/training.png and OUT/report.html, which shows it all, and after every epoch OUT/checkpoint.ckpt, which
    --resume goes on from.
    """

    model: TaskOptions = field(default_factory=TaskOptions)
    training: Training = field(default_factory=Training)
    method: MethodOptions = field(default_factory=MethodOptions)

    sparsity: Number = None
    """Fraction of the weights to remove in the end, in [0, 1) (default: 0.95, or that of the pattern)."""

    initial: float = 0.0
    """Fraction to remove the first time."""

    begin: Epochs = None
    """When weights are removed for the first time, in epochs (default: 0)."""

    end: Epochs = None
    """When weights are removed for the last time (default: 0.6 of the epochs)."""

    every: Epochs = None
    """From one time to the next (default: a tenth of the way from begin to end)."""

    power: float = 3.0
    """3 removes most early, 1 the same each time."""

    criterion: str = "woodfisher"
    """What decides, as in `woodfisher prune`; methods whose stages adapt are taken with one stage each time, unless
    --stages auto asks for them."""

    out: Folder = None
    """Folder for the results (default: runs/TASK-train-CRITERION-SPARSITY-seedSEED); files there are replaced."""

    resume: bool = False
    """Go on from the checkpoint of a run with the same options, where there is one: the result is the same as if it
    had never been interrupted."""

    log: Literal["csv", "tensorboard"] = "csv"
    """tensorboard writes its events to OUT/tensorboard, too."""

    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def run(self) -> None:
        """Check everything, train, evaluate, write, show."""
        self.training.check()
        check_choice("criterion", self.criterion, METHODS)
        method = self.method.method(self.criterion, strict=True, training=True)
        sparsity = method.goal(self.sparsity)
        check_sparsity(sparsity)
        schedule = self._schedule(sparsity)
        folder = folder_for(self.model, self.out, f"train-{self.criterion}-{sparsity:g}")
        require_plots()
        require_page()
        require_lightning()
        note(f"loading {self.model.task}")
        task = self.model.load()
        model, (method,) = self.method.settled(self.model, task, method)
        objective = model.objective(task)
        dense = evaluate(task, task.model, "dense")
        try:
            with progress(f"training to {sparsity:g}", "steps") as show:
                trained = train(
                    task,
                    schedule,
                    self.training,
                    criterion=method,
                    seed=self.model.seed,
                    out=folder,
                    resume=self.resume,
                    log=self.log,
                    progress=show,
                    on_epoch=lambda epoch: self._tell(epoch, task.metric_name),
                    **model.chosen,
                )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "interrupted; the same command with --resume goes on from the last epoch that ended"
            ) from None
        pruned = evaluate_if_possible(task, task.model, self.criterion)
        asked = {
            "criterion": self.criterion,
            "preset": self.method.preset,
            "requested_sparsity": sparsity,
        }
        Outcome(model, task, method, folder, asked).show(
            trained,
            objective,
            {"dense": {"metric": dense, "layers": layers_given(objective)}, "pruned": {"metric": pruned}},
            ("training.png", lambda path: plot_training(trained, task.metric_name, path)),
            print_json if self.json else partial(_show, task, trained),
        )

    def _schedule(self, sparsity: float) -> Polynomial:
        """The usual schedule with what was asked for instead."""
        begin = self.begin or 0.0
        end = gradually(sparsity, self.training.epochs).end if self.end is None else self.end
        every = (max(end - begin, 0.0) / 10 or 1.0) if self.every is None else self.every
        return Polynomial(self.initial, sparsity, begin=begin, end=end, every=every, power=self.power)

    def _tell(self, epoch: Epoch, metric: str) -> None:
        note(
            f"epoch {epoch.epoch} of {self.training.epochs}: loss {epoch.loss:.4f}, validation "
            f"{score(epoch.validation, metric)}, sparsity {epoch.sparsity:.2%}"
        )


def _show(task: Task, trained: Trained, content: dict[str, Any]) -> None:
    console = out()
    summary = Table(title=f"{content['task']}: {trained.sparsity:.2%} of {content['size']:,} weights removed")
    for column in ("", f"test {task.metric_name}", "validation", "kept weights"):
        summary.add_column(column, justify="right" if column else "left")
    name, kept = before(content)
    summary.add_row(
        name,
        score(content["dense"]["metric"], task.metric_name),
        score(trained.dense, task.metric_name),
        f"{kept:,}",
    )
    summary.add_row(
        f"{content['criterion']}, epoch {trained.best.epoch}",
        mean_score(content["pruned"]["metric"], None, task.metric_name),
        score(trained.best.validation, task.metric_name),
        f"{content['kept']:,}",
    )
    console.print(summary)
    console.print(layers_table("Sparsity of each layer", {"removed": trained.layers}))
    seconds = trained.seconds
    console.print(
        f"{seconds['total']:.1f} s, of which {seconds['pruning']:.1f} s ({content['pruning_share']:.0%}) pruned "
        f"{len(trained.history)} times"
    )
    console.print(size_on_disk(content["bytes"]))
    console.print(where(content), soft_wrap=True)
