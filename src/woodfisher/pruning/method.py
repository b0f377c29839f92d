"""Methods by name: a curvature, whether the gradient counts, an update, a scope and a number of stages."""

from __future__ import annotations

import numbers
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

import numpy as np

from woodfisher.checks import check_choice, check_count, check_fraction
from woodfisher.curvature import (
    KFAC,
    DiagonalFisher,
    DiagonalHessian,
    Estimator,
    ExactHessian,
    Identity,
    Relative,
    WoodFisher,
)
from woodfisher.errors import WoodfisherError
from woodfisher.gradients.objective import ObjectiveOptions
from woodfisher.pruning.adaptive import Adaptive
from woodfisher.surgeon.patterns import Pattern, Unstructured
from woodfisher.surgeon.selection import SCOPES, Selection
from woodfisher.surgeon.update import independent_update, joint_update, no_update

if TYPE_CHECKING:
    from collections.abc import Mapping

    from woodfisher.gradients.objective import Objective

Update = Literal["independent", "joint", "none"]
Scope = Literal["global", "layer", "flops"]
FirstOrder = bool | Literal["auto"]
Stages = int | Adaptive | Literal["auto"]
Use = Literal["adaptive", "fixed", "training", "adaptive training"]

UPDATES = {"independent": independent_update, "joint": joint_update, "none": no_update}


@dataclass(frozen=True)
class Method:
    """How to prune.

    Attributes
    ----------
    curvature:
        What F is.
    first_order:
        Whether the gradient takes part: WoodTaylor, which scores and updates at the Newton point w − F⁻¹g
        (so that weights move even where none is removed). `auto` leaves it to the held-out samples where stages
        adapt, and is False where they don't.
    update:
        `independent` (the paper's sum of single-weight updates), `joint` (the minimiser of the quadratic for
        the whole removed set) or `none`.
    scope:
        Rank weights over all layers (`global`), give each layer the same sparsity (`layer`), or rank over all layers
        by the rise of the loss for each FLOP saved (`flops`); sparsity is then the fraction of FLOPs removed.
    pattern:
        What is removed together: `Unstructured()`, `NM(2, 4)`, `Block(4)`, `Channels()` or `Heads(12)`.
    floor:
        Fraction of every tensor's weights that stays at least, so that no layer collapses.
    stages:
        Times that gradients are taken, curvature estimated and weights removed on the way to the sparsity; or
        an `Adaptive`, many small stages that are checked on held-out samples. `auto` is the latter with its
        defaults for one block over all weights and the joint update, and 16 otherwise; `stages="auto"` in a call of
        `prune` or `Pruner` asks for the latter in any case, and raises where the method can't.
    refine:
        Rounds of swaps that improve the kept set of a stage against the joint objective (see `refine`), where
        the number of stages is fixed.
    recalibrate:
        Samples on whose forward passes the statistics of batch normalisation are taken anew after the last
        stage, in models that have them; 0 to leave them.
    """

    curvature: Estimator
    first_order: FirstOrder = False
    update: Update = "joint"
    scope: Scope = "global"
    pattern: Pattern = Unstructured()
    floor: float = 0.0
    stages: Stages = 1
    refine: int = 0
    recalibrate: int = 2000

    def __post_init__(self) -> None:
        if not isinstance(self.curvature, Estimator):
            raise WoodfisherError(
                "curvature must be an estimator, as in wf.WoodFisher(samples=400); "
                f"{self.curvature!r} came. Methods are named by criterion=."
            )
        check_choice("update", self.update, UPDATES)
        check_choice("scope", self.scope, SCOPES)
        check_fraction("floor", self.floor)
        if not isinstance(self.pattern, Pattern):
            raise WoodfisherError(
                f"pattern must be a value such as wf.NM(2, 4), wf.Block(4) or wf.Channels(); {self.pattern!r} came."
            )
        if not isinstance(self.first_order, bool) and self.first_order != "auto":
            raise WoodfisherError(f"first_order must be True, False or 'auto'; {self.first_order!r} came.")
        if self.first_order is True and not self.curvature.samples:
            raise WoodfisherError(
                f"first_order=True takes the gradient of samples, and {type(self.curvature).__name__} has none: choose "
                "another curvature, or leave it out."
            )
        if isinstance(self.stages, Adaptive):
            if not self._carries_rows:
                raise WoodfisherError(
                    "stages that adapt carry the rows of one block along and move the weights by the joint update: "
                    "they need WoodFisher(block_size=None) and update='joint'; "
                    f"{self.curvature!r} and update={self.update!r} came. Give a number of stages."
                )
        elif self.stages != "auto":
            check_count("stages", self.stages)
            object.__setattr__(self, "stages", int(self.stages))
        keep = self.curvature.keep if isinstance(self.curvature, WoodFisher) else "auto"
        if isinstance(self.staging, Adaptive) and keep not in ("auto", "memory"):
            raise WoodfisherError(
                "stages that adapt carry their rows along in memory, as many as it has room for; "
                f"keep={keep!r} came. Leave it out, or give a number of stages."
            )
        if self.refine:
            check_count("refine", self.refine, least=0)
            if self.scope != "global" or self.pattern != Unstructured() or isinstance(self.staging, Adaptive):
                raise WoodfisherError(
                    "refine swaps single weights across layers after ranking, for a fixed number of stages and the "
                    f"scope global; stages={self.staging!r}, scope={self.scope!r} and pattern={self.pattern} came."
                )
            if self.floor:
                raise WoodfisherError(
                    "refine swaps weights across layers without regard to a floor: leave one of them out."
                )
        if self.recalibrate:
            check_count("recalibrate", self.recalibrate, least=0)

    @property
    def staging(self) -> int | Adaptive:
        """`stages`, with what `auto` means for this curvature and update."""
        if self.stages != "auto":
            return self.stages
        return Adaptive() if self._carries_rows else FIXED_STAGES

    @property
    def adaptive(self) -> tuple[Adaptive, WoodFisher]:
        """How stages adapt, and the curvature whose rows they carry along."""
        assert isinstance(self.staging, Adaptive)
        assert isinstance(self.curvature, WoodFisher)
        return self.staging, self.curvature

    @property
    def samples(self) -> int:
        """Samples that one run takes, over all of its stages, with those that they are checked on."""
        if isinstance(self.staging, Adaptive):
            return self.curvature.samples + self.staging.held_out
        return self.curvature.samples * self.staging

    @property
    def _carries_rows(self) -> bool:
        one_block = isinstance(self.curvature, WoodFisher) and self.curvature.block_size is None
        return one_block and self.update == "joint"

    def goal(self, sparsity: float | None) -> float:
        """The sparsity to prune to: what is asked for, or else what the pattern says, or else 0.95."""
        return (self.pattern.sparsity or USUAL_SPARSITY) if sparsity is None else sparsity

    def selection(self, objective: Objective) -> Selection:
        """What may stay of the objective's weights, under this pattern, scope and floor."""
        flops = objective.flops() if self.scope == "flops" else None
        return Selection(objective.layout, self.pattern, self.scope, self.floor, flops)

    def to_dict(self) -> dict[str, Any]:
        """All options, as JSON takes them."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        curvature = {"kind": type(self.curvature).__name__, **asdict(cast("Any", self.curvature))}
        stages = self.staging if isinstance(self.staging, int) else asdict(self.staging)
        return _plain({**parts, "curvature": curvature, "pattern": str(self.pattern), "stages": stages})


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """NumPy's numbers among options as Python's, which JSON takes."""
    return {
        name: _plain(value)
        if isinstance(value, dict)
        else value.item()
        if isinstance(value, np.generic)
        else value
        for name, value in options.items()
    }


FIXED_STAGES = 16
"""Stages where they don't adapt, as M-FAC recomputes."""

_FULL = WoodFisher(samples=400, block_size=None, damping="auto")
_BLOCKS = WoodFisher(samples=400, block_size=2000, damping="auto")
_CARRIED = WoodFisher(samples=240_000, group=16, block_size=None, damping="auto")

# The gradient of a few hundred samples is mostly noise, and a Newton step fits it: average more of them.
_MANY: dict[str, Any] = {"samples": 4000, "group": 10, "damping": 1e-2}

METHODS: dict[str, Method] = {
    "woodfisher": Method(_CARRIED, first_order="auto", stages="auto"),
    "woodtaylor": Method(_CARRIED, first_order=True, stages="auto"),
    "woodfisher-full": Method(_FULL, stages=FIXED_STAGES),
    "woodfisher-block": Method(_BLOCKS, stages=FIXED_STAGES),
    "woodtaylor-block": Method(replace(_BLOCKS, **_MANY), first_order=True, stages=FIXED_STAGES),
    "mfac": Method(replace(_FULL, samples=1000, damping=1e-5), update="independent", stages=FIXED_STAGES),
    "kfac": Method(KFAC(), update="independent"),
    "obd": Method(DiagonalFisher(), update="none"),
    "obd-hessian": Method(DiagonalHessian(), update="none"),
    "hessian": Method(ExactHessian()),
    "magnitude": Method(Identity(), update="none"),
    "magnitude-layer": Method(Identity(), update="none", scope="layer"),
}
"""Name → method, each as it measures best. The full forms have one block over all weights."""

_FIXED = {
    "woodfisher": METHODS["woodfisher-full"],
    "woodtaylor": Method(replace(_FULL, **_MANY), first_order=True, stages=FIXED_STAGES),
}
"""What methods with adaptive stages are where those are not wanted."""

_IN_TRAINING = WoodFisher(samples=400, block_size=200, damping=Relative(10))

_TRAINING = {
    "woodfisher": Method(_IN_TRAINING),
    "woodtaylor": Method(replace(_IN_TRAINING, **_MANY), first_order=True),
}
"""What they are inside a training loop, which mends what small blocks miss and has no time for large ones."""

_ADAPTIVE_TRAINING = {
    name: replace(
        METHODS[name],
        curvature=replace(_CARRIED, samples=20_000, group=4),
        stages=Adaptive(stages=20, window=500),
    )
    for name in _TRAINING
}
"""The same where stages are to adapt, at a few of the times that weights are removed: what a minute allows for."""

USUAL_SPARSITY = 0.95
"""What is pruned to where neither a sparsity is asked for nor the pattern has one."""

PRESETS = ("paper",)
_PAPER = {"samples": 100, "damping": 1e-5, "block_size": 2000, "group": 1, "labels": "data"}


def method_for(criterion: str | Method, preset: str | None = None, *, use: Use = "adaptive") -> Method:
    """The method of that name, as it measures best, or under the protocol of a preset; a `Method` as it is.

    The preset `paper` is that of Singh and Alistarh (2020), one shot: 100 gradients of single samples, damping
    1e-5, blocks of 2000 within a layer, global ranking, independent update. Methods that move no weights keep
    to that. `use` says what for, which takes other samples, blocks and damping: stages that adapt where the method
    has them, `fixed` ones, or a single one each time that weights are removed in `training`, unless they are to adapt
    there too.
    """
    if isinstance(criterion, Method):
        if preset is not None:
            raise WoodfisherError(
                "a preset says what a method of some name is, and a Method came, which is taken as it is: leave out "
                "preset=, or name the method."
            )
        return criterion
    check_choice("criterion", criterion, METHODS)
    others = {
        "adaptive": _FIXED if preset else {},
        "fixed": _FIXED,
        "training": _TRAINING,
        "adaptive training": _ADAPTIVE_TRAINING,
    }
    method = others[use].get(criterion, METHODS[criterion])
    if use == "training":
        method = replace(method, stages=1, recalibrate=0)
    if preset is None:
        return method
    check_choice("preset", preset, PRESETS)
    protocol = {name: value for name, value in _PAPER.items() if name in options_of(method.curvature)}
    return replace(
        method,
        curvature=with_options(method.curvature, protocol),
        first_order=method.first_order is True,
        update="none" if method.update == "none" else "independent",
        stages=1,
        recalibrate=0,
    )


def options_of(curvature: Estimator) -> set[str]:
    """Names of the options that an estimator has."""
    return {field.name for field in fields(cast("Any", curvature))}


def with_options(curvature: Estimator, options: Mapping[str, Any]) -> Estimator:
    """Make the same kind of estimator with some options replaced."""
    return cast("Estimator", replace(cast("Any", curvature), **options))


class MethodParts(TypedDict, total=False):
    """The parts of a `Method` that a caller may replace, by the names that it has for them."""

    curvature: Estimator | None
    first_order: FirstOrder | None
    update: Update | None
    scope: Scope | None
    pattern: Pattern | None
    floor: float | None
    stages: Stages | None
    refine: int | None
    recalibrate: int | None


class PruningOptions(ObjectiveOptions, MethodParts, total=False):
    """What can be given by name wherever an objective and a method are made."""


def apart(options: PruningOptions) -> tuple[ObjectiveOptions, MethodParts]:
    """Those of the objective, and all others."""
    chosen = {name: value for name, value in options.items() if name in ObjectiveOptions.__annotations__}
    parts = {name: value for name, value in options.items() if name not in chosen}
    return cast("ObjectiveOptions", chosen), cast("MethodParts", parts)


def method_asked(
    criterion: str | Method, parts: MethodParts, preset: str | None = None, *, training: bool = False
) -> Method:
    """The method of that name, as it suits these parts, or the one that is given; with the parts replaced."""
    return replaced(method_for(criterion, preset, use=use_for(parts, training=training)), parts)


def use_for(parts: MethodParts, *, training: bool = False) -> Use:
    """What for a method is taken with these parts: they may need a fixed number of stages."""
    if training:
        stages = parts.get("stages")
        return "adaptive training" if stages == "auto" or isinstance(stages, Adaptive) else "training"
    fixed = isinstance(parts.get("stages"), numbers.Integral) or bool(parts.get("refine"))
    return "fixed" if fixed or parts.get("update") not in (None, "joint") else "adaptive"


def given(**options: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def replaced(method: Method, parts: MethodParts) -> Method:
    """The method with those parts replaced that are given and not None."""
    unknown = sorted(set(parts) - set(MethodParts.__annotations__))
    if unknown:
        name = unknown[0]
        if name in {option.name for option in fields(WoodFisher)}:
            raise WoodfisherError(
                f"{name!r} is an option of the curvature: give curvature=wf.WoodFisher({name}=...)."
            )
        raise WoodfisherError(
            f"there is no argument {name!r}; an Objective takes {', '.join(ObjectiveOptions.__annotations__)}, "
            f"and the parts of a method are {', '.join(MethodParts.__annotations__)}."
        )
    others = given(**parts)
    if others.get("stages") == "auto":
        others["stages"] = method.stages if isinstance(method.stages, Adaptive) else Adaptive()
    return replace(method, **others)
