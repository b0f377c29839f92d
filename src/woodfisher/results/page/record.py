"""What report.json holds, checked as it is read. Needs the extra `plots`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le, MinLen
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from woodfisher.errors import WoodfisherError
from woodfisher.pruning.report import Layer, Stage
from woodfisher.results.examine import Examination
from woodfisher.training.gradual import Epoch, Removal

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self


def _sound(layers: list[Layer]) -> list[Layer]:
    for layer in layers:
        if layer.size < 1 or not 0 <= layer.kept <= layer.size:
            raise ValueError(f"{layer.name} keeps {layer.kept} of {layer.size} weights")
    return layers


Layers = Annotated[list[Layer], MinLen(1), AfterValidator(_sound)]
Share = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]


class Record(BaseModel):
    """A JSON object of which all is kept that has a name here."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class Measured(Record):
    """A network's metric, and what it keeps of its layers where that was recorded."""

    metric: float
    layers: list[Layer] | None = None


class Reached(Record):
    """What pruning gives; no metric where that failed."""

    metric: float | None
    layers: list[Layer] | None = None


class Validated(Measured):
    """The metric on validation data, pruned and dense."""

    dense: float


class Origin(Record):
    """What reproduces a run."""

    command: str
    date: str
    versions: dict[str, str]
    platform: str
    device: str
    threads: Count


class TaskReport(Record):
    """What every report says of the task."""

    task: str
    metric: str
    seed: int
    dense: Measured
    examined: Examination | None = None
    origin: Origin | None = None


class PrunedNetwork(Record):
    """A network that was pruned."""

    sparsity: Share
    size: Count
    kept: int
    layers: Layers
    seconds: dict[str, float]
    method: dict[str, Any]
    warnings: list[str]


class Staged(PrunedNetwork):
    """One that was pruned in stages."""

    flops_removed: float | None = None
    stages: list[Stage]


class PruneReport(TaskReport, Staged):
    """The report of `woodfisher prune`."""

    criterion: str
    pruned: Reached
    magnitude: Reached | None = None
    max_drop: float | None = None


class TrainReport(TaskReport, PrunedNetwork):
    """The report of `woodfisher train`."""

    criterion: str
    pruned: Reached
    validation: Validated
    best_epoch: int
    epochs: Annotated[list[Epoch], MinLen(1)]
    history: list[Removal]


class Result(Staged):
    """One run of `woodfisher compare`."""

    criterion: str
    requested_sparsity: Share
    seed: int
    metric: float


class Failure(Record):
    """One run that failed."""

    criterion: str
    requested_sparsity: Share
    seed: int
    error: str


class Cell(Record):
    """Mean and standard deviation over the seeds for a method and a sparsity."""

    criterion: str
    requested_sparsity: Share
    runs: int
    mean: float | None
    sd: float | None
    seconds: float | None


class CompareReport(TaskReport):
    """The report of `woodfisher compare`."""

    seeds: Count
    summary: Annotated[list[Cell], MinLen(1)]
    results: list[Result | Failure]

    @model_validator(mode="after")
    def _summed_up(self) -> Self:
        for result in self.results:
            if all(result.criterion != cell.criterion for cell in self.summary):
                raise ValueError(f"the summary lacks the method {result.criterion}")
        return self


def _kind(value: object) -> str | None:
    """Which command wrote it, by what only that one writes."""
    marks = {"results": "compare", "epochs": "train", "pruned": "prune"}
    return next((kind for mark, kind in marks.items() if isinstance(value, dict) and mark in value), None)


AnyReport = PruneReport | TrainReport | CompareReport

_ANY: TypeAdapter[AnyReport] = TypeAdapter(
    Annotated[
        Annotated[PruneReport, Tag("prune")]
        | Annotated[TrainReport, Tag("train")]
        | Annotated[CompareReport, Tag("compare")],
        Discriminator(_kind),
    ]
)


def parse(text: str | bytes, name: str) -> AnyReport:
    """What the JSON `text` of the file `name` says; raises unless a command wrote it so."""
    try:
        return _ANY.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        reason = (
            "it is none of prune, train or compare"
            if first["type"] == "union_tag_not_found"
            else f"{where}: {first['msg']}"
            if where
            else first["msg"]
        )
        raise WoodfisherError(
            f"{name} is no report to make a page of ({reason}). Give the report.json that woodfisher prune, train or "
            "compare wrote, or its folder."
        ) from None


def read(path: Path) -> AnyReport:
    """Read a report.json."""
    try:
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise WoodfisherError(
            f"{path} can't be read ({error.strerror or error}): give a report.json, or the folder that it lies in."
        ) from error
