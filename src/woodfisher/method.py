"""Methods by name: a curvature, whether the gradient counts, an update, a scope and a number of stages."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from woodfisher.adaptive import Adaptive
from woodfisher.checks import check_choice, check_count
from woodfisher.curvature import (
    KFAC,
    DiagonalFisher,
    DiagonalHessian,
    Estimator,
    ExactHessian,
    Identity,
    WoodFisher,
)
from woodfisher.errors import WoodfisherError
from woodfisher.update import independent_update, joint_update, no_update

if TYPE_CHECKING:
    from collections.abc import Mapping

Update = Literal["independent", "joint", "none"]
Scope = Literal["global", "layer"]
FirstOrder = bool | Literal["auto"]
Stages = int | Adaptive | Literal["auto"]

UPDATES = {"independent": independent_update, "joint": joint_update, "none": no_update}
SCOPES = ("global", "layer")


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
        Rank weights over all layers (`global`) or give each layer the same sparsity (`layer`).
    stages:
        Times that gradients are taken, curvature estimated and weights removed on the way to the sparsity; or
        an `Adaptive`, many small stages that are checked on held-out samples. `auto` is the latter with its
        defaults for one block over all weights and the joint update, and 16 otherwise.
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
        check_choice("first_order", str(self.first_order), ("True", "False", "auto"))
        if isinstance(self.stages, Adaptive):
            self._check_adaptive()
        elif self.stages != "auto":
            check_count("stages", self.stages)
        if self.refine:
            check_count("refine", self.refine)
            if self.scope != "global" or isinstance(self.plan, Adaptive):
                raise WoodfisherError(
                    "refine swaps weights across layers after ranking, for a fixed number of stages and the scope "
                    f"global; stages={self.plan!r} and scope={self.scope!r} came."
                )
        if self.recalibrate:
            check_count("recalibrate", self.recalibrate)

    @property
    def plan(self) -> int | Adaptive:
        """`stages`, with what `auto` means for this curvature and update."""
        if self.stages != "auto":
            return self.stages
        carries = isinstance(self.curvature, WoodFisher) and self.curvature.block_size is None
        return Adaptive() if carries and self.update == "joint" else FIXED_STAGES

    def _check_adaptive(self) -> None:
        if not isinstance(self.curvature, WoodFisher) or self.curvature.block_size is not None:
            raise WoodfisherError(
                "stages that adapt carry the rows of one block along: they need WoodFisher(block_size=None), and "
                f"{self.curvature!r} came. Give a number of stages."
            )
        if self.update != "joint":
            raise WoodfisherError(
                f"stages that adapt move the weights by the joint update; update={self.update!r} came. Give a "
                "number of stages."
            )

    def to_dict(self) -> dict[str, Any]:
        """All options, as JSON takes them."""
        curvature = {"kind": type(self.curvature).__name__, **asdict(cast("Any", self.curvature))}
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        stages = self.plan if isinstance(self.plan, int) else asdict(self.plan)
        return {**parts, "curvature": curvature, "stages": stages}


FIXED_STAGES = 16
"""Stages where they don't adapt, as M-FAC recomputes."""

_FULL = WoodFisher(samples=400, block_size=None, damping=1e-3)
_BLOCKS = WoodFisher(samples=400, block_size=2000, damping=1e-3)
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

PRESETS = ("paper",)
_PAPER = {"samples": 100, "damping": 1e-5, "block_size": 2000, "group": 1, "labels": "data"}


def method_for(criterion: str, preset: str | None = None, *, fixed: bool = False) -> Method:
    """The method of that name, as it measures best, or under the protocol of a preset.

    The preset `paper` is that of Singh and Alistarh (2020), one shot: 100 gradients of single samples, damping
    1e-5, blocks of 2000 within a layer, global ranking, independent update. Methods that move no weights keep
    to that. `fixed` says that the stages will not adapt, which takes other samples and damping.
    """
    check_choice("criterion", criterion, METHODS)
    method = _FIXED.get(criterion, METHODS[criterion]) if fixed or preset else METHODS[criterion]
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
