"""`woodfisher tour`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table

from woodfisher.checks import check_count
from woodfisher.cli.console import note, out, print_json, progress
from woodfisher.cli.options import Folder, TaskOptions
from woodfisher.errors import WoodfisherError
from woodfisher.files import save_csv, save_json, text_of, write_folder
from woodfisher.gradients.isolation import copied
from woodfisher.results.numbers import fixed, per_cent, score, significant
from woodfisher.results.plots import require_plots
from woodfisher.results.tour_plots import ends, pictures
from woodfisher.tour import EMPIRICAL, FISHER, HESSIAN, tour

if TYPE_CHECKING:
    from torch import nn

    from woodfisher.tasks import Task
    from woodfisher.tour import Region
    from woodfisher.tour import Tour as Seen


@dataclass(frozen=True)
class Tour:
    """Look at the curvature of a small network: the exact Hessian, the Fisher and the empirical Fisher.

    They are drawn whole and layer by layer, on one colour scale, with numbers: how alike they are, which scale
    brings them closest, how much of them lies in diagonal blocks of growing size, and their spectra. That tells whether
    the approximation can be believed for this network, and which block size and how many samples it needs.

    Without arguments: a small convolutional network on scikit-learn's digits, untrained, early in its training and
    trained. A task of one's own is toured as it is, and at the earlier points that it keeps. Matrices are dense, so in
    a model of more than some thousand weights choose some of them with --params.

    Writes OUT/matrices.png, OUT/layers-N-POINT.png, OUT/blocks.png, OUT/spectra.png, OUT/samples.png, OUT/report.json
    and OUT/spectra.csv.
    """

    model: TaskOptions = field(default_factory=lambda: TaskOptions(task="digits-small"))

    samples: int = 500
    """Training samples that the loss is the mean over."""

    out: Folder = None
    """Folder for the results (default: runs/TASK-tour-seedSEED); files there are replaced."""

    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def run(self) -> None:
        """Check everything, tour, write, show."""
        check_count("samples", self.samples)
        if self.model.precision != "float32":
            raise WoodfisherError(
                "a tour shows curvature that is exact to many digits: leave out --precision."
            )
        folder = self.model.folder(self.out, "tour")
        require_plots()
        note(f"loading {self.model.task}")
        task = self.model.load()
        models = _points(task)
        with progress(f"tour of {self.model.task}", "points") as show:
            seen = tour(
                models,
                task.train,
                task.loss,
                samples=self.samples,
                params=self.model.params or None,
                exclude=self.model.exclude,
                progress=show,
            )
        content = {
            "task": self.model.task,
            "metric": task.metric_name,
            "seed": self.model.seed,
            "metrics": {name: task.evaluate(model) for name, model in models.items()},
            **seen.to_dict(),
            "out": text_of(folder),
        }
        note("drawing")
        write_folder(
            folder,
            {
                "report.json": lambda path: save_json(content, path),
                "spectra.csv": lambda path: save_csv(_spectra(seen), path),
            },
            pictures(seen),
        )
        if self.json:
            print_json(content)
        else:
            _show(seen, content)


def _points(task: Task) -> dict[str, nn.Module]:
    """The task's model at the points that it keeps, and as it is."""
    models: dict[str, nn.Module] = {}
    for name, state in task.earlier.items():
        model = copied(task.model)
        try:
            model.load_state_dict(dict(state))
        except RuntimeError as error:
            raise WoodfisherError(
                f"the task {task.name} keeps an earlier point {name!r} that does not fit its model: {error}"
            ) from error
        models[name] = model
    models["trained" if models and "trained" not in models else "as given"] = task.model
    return models


def _spectra(seen: Seen) -> list[dict[str, Any]]:
    return [
        {"point": stop.name, "region": region.name, "matrix": matrix, "index": index, "eigenvalue": value}
        for stop in seen.stops
        for region in stop.regions
        for matrix, values in region.eigenvalues.items()
        for index, value in enumerate(values.flip(0).tolist(), 1)
    ]


def _show(seen: Seen, content: dict[str, Any]) -> None:
    console = out()
    for stop in seen.stops:
        table = Table(
            title=f"{stop.name}: mean loss {stop.loss:.4f} on {seen.samples:,} samples, "
            f"test {content['metric']} {score(content['metrics'][stop.name], content['metric'])}"
        )
        table.add_column("layer", no_wrap=True)
        for column in ("cos F", "cos Ê", "scale", "diagonal", "of 50", "λ min", "λ max"):
            table.add_column(column, justify="right")
        for region in stop.regions:
            table.add_row(*_cells(region))
        console.print(table)
    console.print(
        "cos: cosine of the Fisher F and of the empirical Fisher Ê with the exact Hessian H; scale: the s at which s·Ê "
        "is closest to H; diagonal and of 50: shares of ‖H‖² on the diagonal and in blocks of 50; λ: eigenvalues of H."
    )
    console.print(f"Pictures and results are in {content['out']}", soft_wrap=True)


def _cells(region: Region) -> list[str]:
    """One line of the table; an empty cell where a number is undefined."""
    exact = region.between(FISHER, HESSIAN).cosine if FISHER in region.eigenvalues else None
    empirical = region.between(EMPIRICAL, HESSIAN)
    blocks = dict(zip(region.block_sizes, region.mass[HESSIAN], strict=True))
    return [
        f"{region.name.removesuffix('.weight')} ({region.size:,})",
        fixed(exact),
        fixed(empirical.cosine),
        significant(empirical.scale),
        per_cent(blocks[1]),
        per_cent(blocks.get(50)),
        *(significant(value, 2) for value in ends(region.eigenvalues[HESSIAN])),
    ]
