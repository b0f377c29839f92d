"""What a pruning run did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from woodfisher._version import __version__
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from woodfisher.gradients.objective import Objective
    from woodfisher.pruning.method import Method
    from woodfisher.surgeon.selection import Selection
    from woodfisher.watch import Watch


@dataclass(frozen=True)
class Layer:
    """One pruned tensor: its name, weights in all, weights kept."""

    name: str
    size: int
    kept: int

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return 1 - self.kept / self.size

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "sparsity": self.sparsity}


def layers_of(masks: Mapping[str, Tensor]) -> list[Layer]:
    """What masks (name → bool, False where removed) leave of each tensor."""
    return [Layer(name, mask.numel(), int(mask.sum())) for name, mask in masks.items()]


@dataclass(frozen=True)
class Stage:
    """One round of rows → curvature → surgeon.

    Attributes
    ----------
    sparsity:
        Reached with it.
    predicted:
        Change of the mean loss that the quadratic model expects of it, λ included, or, where stages adapt, of the
        rows alone, since there λ says how far they are trusted, and with what moved while its rows came; None where
        no curvature was estimated.
    measured:
        Change of the mean loss on the held-out samples, or on those of the rows where none were held out; None
        without samples.
    damping:
        λ that it was taken with; None where the kept weights did not move, or the curvature has none for all of them.
    first_order:
        Whether the gradient counted.
    accepted:
        False where it was taken back, to be tried again with other weights, or with half as many.
    """

    sparsity: float
    predicted: float | None
    measured: float | None = None
    damping: float | None = None
    first_order: bool = False
    accepted: bool = True


@dataclass(frozen=True)
class Report:
    """What `prune` did to a model.

    Attributes
    ----------
    sparsity:
        Fraction of the chosen weights that are removed now.
    flops_removed:
        Fraction of the FLOPs of the chosen layers that are removed; None unless the scope counts them.
    size, kept:
        Chosen weights in all, and those that remain.
    layers, stages:
        In the model's order; in the order that they ran.
    masks:
        Name → bool tensor of the weight's shape, False where removed.
    seconds:
        Phase → wall-clock time: `gradients`, `curvature`, `saliency`, `update`, of `refine`, `check`, `measuring`,
        `recalibration` and `metric` that there were, and `total`.
    method:
        The options of the `Method` that ran.
    warnings:
        Every fallback and warning on the way.
    """

    sparsity: float
    flops_removed: float | None
    size: int
    kept: int
    layers: list[Layer]
    stages: list[Stage]
    masks: dict[str, Tensor] = field(repr=False)
    seconds: dict[str, float]
    method: dict[str, Any]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The report without the masks, as JSON takes it."""
        return {
            "woodfisher": __version__,
            "sparsity": self.sparsity,
            "flops_removed": self.flops_removed,
            "size": self.size,
            "kept": self.kept,
            "method": self.method,
            "layers": [layer.to_dict() for layer in self.layers],
            "stages": [asdict(stage) for stage in self.stages],
            "seconds": self.seconds,
            "warnings": self.warnings,
        }

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [
            f"{self.kept} of {self.size} weights kept, sparsity {self.sparsity:.2%}, "
            f"{self.seconds['total']:.1f} s",
            *(
                f"  {layer.name:<{width}}  {layer.kept:>9} of {layer.size:>9}  {layer.sparsity:>7.2%}"
                for layer in self.layers
            ),
            *(f"  warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)


def warn_of_lost_layers(objective: Objective) -> None:
    """Warn of layers that have no weight left; without a bias they do with what comes in."""
    for layer in layers_of(objective.layout.split(objective.kept)):
        is_bias = len(objective.layout.shapes[layer.name]) == 1 and "bias" in layer.name
        if layer.kept == 0 and not is_bias:
            warn(
                f"every weight of {layer.name!r} is removed, so nothing passes through it; a floor=, "
                "a lower sparsity or scope='layer' avoids that."
            )


def warnings_of(objective: Objective, watch: Watch) -> list[str]:
    """What was warned of, from the making of the objective on."""
    return list(dict.fromkeys([*objective.warnings, *watch.warnings]))


def report_of(
    objective: Objective, stages: Sequence[Stage], method: Method, selection: Selection, watch: Watch
) -> Report:
    """The report of a run that ended at `objective`."""
    masks = objective.layout.split(objective.kept)
    seconds = watch.so_far()
    kept = int(objective.kept.sum())
    return Report(
        sparsity=1 - kept / objective.layout.size,
        flops_removed=1 - selection.amount(objective.kept) / selection.total
        if selection.scope == "flops"
        else None,
        size=objective.layout.size,
        kept=kept,
        layers=layers_of(masks),
        stages=list(stages),
        masks={name: mask.clone() for name, mask in masks.items()},
        seconds={
            **dict.fromkeys(("gradients", "curvature", "saliency", "update"), 0.0),
            **seconds,
            "total": sum(seconds.values()),
        },
        method=method.to_dict(),
        warnings=warnings_of(objective, watch),
    )
