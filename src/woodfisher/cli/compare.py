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
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from woodfisher.gradients.objective import Objective
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
        methods, family = self._asked()
        seeds = range(self.model.seed, self.model.seed + self.seeds)
        runs = _Runs()
        missing: list[dict[str, Any]] = []
        try:
            for seed in seeds:
                self._run_seed(seed, methods, family, runs)
        except KeyboardInterrupt:
            missing = _missing(runs.results, seeds, list(methods), family)
            if runs.failed or not missing:
                raise
            note("interrupted: what has ended is summed up")
            runs.results += missing
        runs.check()
        content = self._content(runs)
        if self.out is not None:
            assert runs.objective is not None
            self._write(self.out, content, runs.objective, methods)
        if self.json:
            print_json(content)
        else:
            _show(content, list(methods))
        if missing:
            raise KeyboardInterrupt(
                f"interrupted; the results lack {len(missing)} of {len(runs.results)} networks"
            )

    def _asked(self) -> tuple[dict[str, Method], tuple[float, ...]]:
        """The methods by name, and the sparsities; raises, before any work, on bad input."""
        if self.sparsity == ():
            raise WoodfisherError("name at least one sparsity, as in --sparsity 0.5 0.9.")
        for sparsity in self.sparsity or ():
            check_sparsity(sparsity)
        check_count("seeds", self.seeds)
        check_seed(self.model.seed + self.seeds - 1)
        methods = {name: self.method.method(name, strict=False) for name in parse_methods(self.methods)}
        pattern = next(iter(methods.values())).pattern
        usual = (pattern.sparsity,) if pattern.sparsity else SPARSITIES
        if self.out is not None:
            check_folder(self.out)
            require_plots()
            require_page()
        return methods, tuple(dict.fromkeys(self.sparsity or ())) or usual

    def _run_seed(
        self, seed: int, methods: Mapping[str, Method], family: tuple[float, ...], runs: _Runs
    ) -> None:
        """Prune the network of one seed by all methods to all sparsities, and add to `runs` what comes of each."""
        note(f"loading {self.model.task}, seed {seed}")
        task = replace(self.model, seed=seed).load()
        task = replace(task, train=Replay(task.train))
        model, settled = self.method.settled(self.model, task, *methods.values())
        runs.objective, runs.metric = model.objective(task), task.metric_name
        dense = task.evaluate(task.model)
        runs.dense.append(dense)
        note(f"dense: {task.metric_name} {score(dense, task.metric_name)}")
        runs.first.update(*map(fingerprints, take(task.train, 1)))
        for name, method in zip(methods, settled, strict=True):
            cells = self._results(task, model, name, method, family)
            runs.results.extend({**cell, "seed": seed, "dense": dense} for cell in cells)

    def _results(
        self, task: Task, model: TaskOptions, name: str, method: Method, family: tuple[float, ...]
    ) -> Iterator[dict[str, Any]]:
        """One entry for each sparsity, with an `error` where it failed."""
        together = isinstance(method.staging, Adaptive)
        for sparsities in [family] if together else [(sparsity,) for sparsity in family]:
            label = "all sparsities" if together else f"{sparsities[0]:g}"
            try:
                with progress(f"{name} to {label}") as show:
                    pruned: Sequence[Pruned | None] = sweep(
                        task.model,
                        task.train,
                        task.loss,
                        sparsities,
                        criterion=method,
                        progress=show,
                        **model.chosen,
                    )
                error = ""
            except WoodfisherError as problem:
                note(f"{name} at {label} failed: {problem}")
                pruned, error = [None] * len(sparsities), str(problem)
            for sparsity, one in zip(sparsities, pruned, strict=True):
                found = {"error": error} if one is None else _measured(task, name, sparsity, one)
                yield {"criterion": name, "requested_sparsity": sparsity, **found}

    def _content(self, runs: _Runs) -> dict[str, Any]:
        """What the report says of all runs."""
        return {
            "task": self.model.task,
            "metric": runs.metric,
            "preset": self.method.preset,
            "seed": self.model.seed,
            "seeds": self.seeds,
            "dense": {"metric": statistics.fmean(runs.dense)},
            "summary": _summary(runs.results),
            "results": runs.results,
        }

    def _write(
        self, folder: Path, content: dict[str, Any], objective: Objective, methods: Mapping[str, Method]
    ) -> None:
        """Write all files, with what is found of a dense network by the first Fisher among the curvatures."""
        curvatures = [method.curvature for method in methods.values()]
        fisher = next((one for one in curvatures if isinstance(one, WoodFisher)), curvatures[0])
        content["examined"] = examine(objective, fisher).to_dict()
        content["origin"] = origin(self.model.device)
        curves = {
            name: [
                (cell["requested_sparsity"], cell["mean"], cell["sd"])
                for cell in content["summary"]
                if cell["criterion"] == name and cell["runs"]
            ]
            for name in methods
        }
        dense, metric = content["dense"]["metric"], content["metric"]
        write_folder(
            folder,
            {
                "report.json": lambda path: save_json(content, path),
                "results.csv": lambda path: save_csv([_row(result) for result in content["results"]], path),
            },
            {
                "accuracy.png": lambda path: plot_accuracy(curves, dense, metric, path),
                "report.html": lambda path: save_page(content, path),
            },
        )


@dataclass
class _Runs:
    """What has run so far.

    Attributes
    ----------
    dense:
        Metric of each seed's dense network.
    first:
        Digests of the samples that came first.
    results:
        Entries of the report.
    objective, metric:
        Of the network that came last, and the name of its task's metric.
    """

    dense: list[float] = field(default_factory=list)
    first: set[bytes] = field(default_factory=set)
    results: list[dict[str, Any]] = field(default_factory=list)
    objective: Objective | None = None
    metric: str = ""

    @property
    def failed(self) -> bool:
        """Whether none has a result."""
        return all("error" in result for result in self.results)

    def check(self) -> None:
        """Warn where the seeds changed little, and raise where nothing came of any run."""
        if len(self.dense) > 1 and len(self.first) == 1:
            warn(
                "the samples come in the same order whatever the seed, so that the spread over seeds tells little: "
                "have the task take seed, or shuffle its training data."
            )
        if self.failed:
            raise WoodfisherError("every run failed, as told above.")


def _measured(task: Task, name: str, sparsity: float, pruned: Pruned) -> dict[str, Any]:
    """The report of a pruned network with its metric, or the `error` of that."""
    model = copied(task.model)
    pruned.write(model)
    try:
        metric = task.evaluate(model)
    except WoodfisherError as problem:
        note(f"{name} at {sparsity:g} failed: {problem}")
        return {"error": str(problem)}
    note(f"{name} {pruned.report.sparsity:.2%}: {task.metric_name} {score(metric, task.metric_name)}")
    return {"metric": metric, **pruned.report.to_dict()}


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
