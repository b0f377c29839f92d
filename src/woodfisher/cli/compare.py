"""`woodfisher compare`."""

from __future__ import annotations

import signal
import statistics
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from woodfisher.checks import check_count, check_seed, check_sparsity
from woodfisher.cli.console import note, out, print_json, progress
from woodfisher.cli.options import Folder, MethodOptions, Numbers, TaskOptions, parse_methods
from woodfisher.cli.origin import origin
from woodfisher.curvature import WoodFisher
from woodfisher.errors import WoodfisherError
from woodfisher.files import check_folder, save_csv, save_json, write_folder
from woodfisher.gradients.batches import Replay, fingerprints, take
from woodfisher.gradients.isolation import copied
from woodfisher.pruning.adaptive import Adaptive
from woodfisher.pruning.oneshot import SPARSITIES, sweep
from woodfisher.results.examine import examine
from woodfisher.results.numbers import mean_score, score
from woodfisher.results.page import require_page, save_page
from woodfisher.results.plots import plot_accuracy, require_plots
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from woodfisher.pruning.method import Method
    from woodfisher.pruning.oneshot import Pruned
    from woodfisher.tasks import Task

_COLUMNS = ("criterion", "requested_sparsity", "sparsity", "seed", "metric", "dense", "seconds", "error")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Have SIGTERM interrupt as SIGINT does; in the main thread, which alone may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Compare:
    """Prune one network by several methods to several sparsities, under one protocol.

    Every method starts from the same dense network, draws from the same order of training samples, recalibrates
    normalisation alike and prunes the same layers; each result is measured once on the test data. Methods whose
    stages adapt pass through all sparsities in one run, others are run for each. Options of the curvature (samples,
    damping, ...) apply to every method that has them.

    With --out, writes OUT/report.json, OUT/results.csv, OUT/accuracy.png and OUT/report.html, which shows it all.
    Interrupted or terminated, it sums up and writes what has ended.
    """

    model: TaskOptions = field(default_factory=TaskOptions)
    method: MethodOptions = field(default_factory=MethodOptions)

    sparsity: Numbers = None
    """Fractions of the weights to remove, each in [0, 1) (default: seven from 0.5 to 0.98, or that of the pattern)."""

    methods: str = "magnitude,obd,woodfisher"
    """Comma-separated criteria, as in `woodfisher prune`."""

    seeds: int = 1
    """Repetitions, with seeds --seed, --seed + 1, ...; the table then shows mean and standard deviation."""

    out: Folder = None
    """Folder for the results; files there are replaced."""

    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    @_terminated_as_interrupted()
    def run(self) -> None:
        """Check everything, prune and evaluate seed by seed and method by method, write, show."""
        if self.sparsity == ():
            raise WoodfisherError("name at least one sparsity, as in --sparsity 0.5 0.9.")
        for sparsity in self.sparsity or ():
            check_sparsity(sparsity)
        check_count("seeds", self.seeds)
        check_seed(self.model.seed + self.seeds - 1)
        names = parse_methods(self.methods)
        methods = {name: self.method.method(name, strict=False) for name in names}
        pattern = methods[names[0]].pattern
        family = tuple(dict.fromkeys(self.sparsity or ())) or (
            (pattern.sparsity,) if pattern.sparsity else SPARSITIES
        )
        if self.out is not None:
            check_folder(self.out)
            require_plots()
            require_page()
        dense: list[float] = []
        first: set[bytes] = set()
        results: list[dict[str, Any]] = []
        seeds = range(self.model.seed, self.model.seed + self.seeds)
        missing: list[dict[str, Any]] = []
        try:
            for seed in seeds:
                note(f"loading {self.model.task}, seed {seed}")
                task = replace(self.model, seed=seed).load()
                task = replace(task, train=Replay(task.train))
                objective = self.model.objective(task)
                dense.append(task.evaluate(task.model))
                note(f"dense: {task.metric_name} {score(dense[-1], task.metric_name)}")
                first.update(*map(fingerprints, take(task.train, 1)))
                for name, method in methods.items():
                    cells = self._results(task, name, method, family)
                    results.extend({**cell, "seed": seed, "dense": dense[-1]} for cell in cells)
        except KeyboardInterrupt:
            missing = _missing(results, seeds, names, family)
            if all("error" in result for result in results) or not missing:
                raise
            note("interrupted: what has ended is summed up")
            results += missing
        if len(dense) > 1 and len(first) == 1:
            warn(
                "the samples come in the same order whatever the seed, so that the spread over seeds tells little: "
                "have the task take seed, or shuffle its training data."
            )
        if all("error" in result for result in results):
            raise WoodfisherError("every run failed, as told above.")
        summary = _summary(results)
        content: dict[str, Any] = {
            "task": self.model.task,
            "metric": task.metric_name,
            "preset": self.method.preset,
            "seed": self.model.seed,
            "seeds": self.seeds,
            "dense": {"metric": statistics.fmean(dense)},
            "summary": summary,
            "results": results,
        }
        if self.out is not None:
            curvatures = [method.curvature for method in methods.values()]
            curvatures.sort(key=lambda curvature: not isinstance(curvature, WoodFisher))
            content["examined"] = examine(objective, curvatures[0]).to_dict()
            content["origin"] = origin(self.model.device)
            curves = {
                name: [
                    (cell["requested_sparsity"], cell["mean"], cell["sd"])
                    for cell in summary
                    if cell["criterion"] == name and cell["runs"]
                ]
                for name in names
            }
            write_folder(
                self.out,
                {
                    "report.json": lambda path: save_json(content, path),
                    "results.csv": lambda path: save_csv([_row(result) for result in results], path),
                },
                {
                    "accuracy.png": lambda path: plot_accuracy(
                        curves, content["dense"]["metric"], task.metric_name, path
                    ),
                    "report.html": lambda path: save_page(content, path),
                },
            )
        if self.json:
            print_json(content)
        else:
            _show(content, names)
        if missing:
            raise KeyboardInterrupt(
                f"interrupted; the results lack {len(missing)} of {len(results)} networks"
            )

    def _results(
        self, task: Task, name: str, method: Method, family: tuple[float, ...]
    ) -> Iterator[dict[str, Any]]:
        """One entry for each sparsity, with an `error` where it failed."""
        together = isinstance(method.staging, Adaptive)
        for sparsities in [family] if together else [(sparsity,) for sparsity in family]:
            label = "all sparsities" if together else f"{sparsities[0]:g}"
            try:
                with progress(f"{name} to {label}") as show:
                    runs: Sequence[Pruned | None] = sweep(
                        task.model,
                        task.train,
                        task.loss,
                        sparsities,
                        criterion=method,
                        progress=show,
                        **self.model.chosen,
                    )
                error = ""
            except WoodfisherError as problem:
                note(f"{name} at {label} failed: {problem}")
                runs, error = [None] * len(sparsities), str(problem)
            for sparsity, pruned in zip(sparsities, runs, strict=True):
                cell = {"criterion": name, "requested_sparsity": sparsity}
                if pruned is None:
                    yield {**cell, "error": error}
                    continue
                model = copied(task.model)
                pruned.write(model)
                try:
                    metric = task.evaluate(model)
                except WoodfisherError as problem:
                    note(f"{name} at {sparsity:g} failed: {problem}")
                    yield {**cell, "error": str(problem)}
                    continue
                note(
                    f"{name} {pruned.report.sparsity:.2%}: {task.metric_name} {score(metric, task.metric_name)}"
                )
                yield {**cell, "metric": metric, **pruned.report.to_dict()}


def _missing(
    results: list[dict[str, Any]], seeds: Iterable[int], names: list[str], family: tuple[float, ...]
) -> list[dict[str, Any]]:
    """Entries for the runs that an interruption left undone."""
    done = {(result["seed"], result["criterion"], result["requested_sparsity"]) for result in results}
    return [
        {"criterion": name, "requested_sparsity": sparsity, "seed": seed, "error": "interrupted"}
        for seed in seeds
        for name in names
        for sparsity in family
        if (seed, name, sparsity) not in done
    ]


def _summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, for each method and sparsity, in the order that they ran."""
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        cells.setdefault((result["criterion"], result["requested_sparsity"]), []).append(result)
    summary = []
    for (criterion, sparsity), runs in cells.items():
        metrics = [run["metric"] for run in runs if "metric" in run]
        summary.append(
            {
                "criterion": criterion,
                "requested_sparsity": sparsity,
                "runs": len(metrics),
                "mean": statistics.fmean(metrics) if metrics else None,
                "sd": statistics.stdev(metrics) if len(metrics) > 1 else None,
                "seconds": max((run["seconds"]["total"] for run in runs if "seconds" in run), default=None),
            }
        )
    return summary


def _row(result: dict[str, Any]) -> dict[str, Any]:
    """A result as a line of the CSV."""
    seconds = result["seconds"]["total"] if "seconds" in result else None
    return {column: {**result, "seconds": seconds}.get(column) for column in _COLUMNS}


def _show(content: dict[str, Any], names: list[str]) -> None:
    """One row a method, one column a sparsity."""
    spread = "" if content["seeds"] == 1 else f", mean ± standard deviation of {content['seeds']} seeds"
    metric = content["metric"]
    dense = score(content["dense"]["metric"], metric)
    table = Table(title=f"{content['task']}: test {metric}{spread}; dense {dense}")
    table.add_column("method", min_width=max(map(len, names)))
    rows = {name: [cell for cell in content["summary"] if cell["criterion"] == name] for name in names}
    for cell in rows[names[0]]:
        table.add_column(f"{100 * cell['requested_sparsity']:g} %", justify="right")
    for name, cells in rows.items():
        table.add_row(name, *(mean_score(cell["mean"], cell["sd"], metric) for cell in cells))
    out().print(table)
    console = out()
    for name in names:
        stages = [r for r in content["results"] if r["criterion"] == name and "seconds" in r]
        if stages:
            slowest = max(r["seconds"]["total"] for r in stages)
            console.print(f"{name}: at most {slowest:.1f} s a run", soft_wrap=True)
