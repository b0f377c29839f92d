"""Methods by name: a curvature, whether the gradient counts, an update, a scope and a number of stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from woodfisher.checks import check_choice, check_count
from woodfisher.curvature import (
    KFAC,
    DiagonalFisher,
    DiagonalHessian,
    Estimator,
    Identity,
    WoodFisher,
)
from woodfisher.update import independent_update, joint_update, no_update

Update = Literal["independent", "joint", "none"]
Scope = Literal["global", "layer"]

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
        Whether the gradient takes part: WoodTaylor, which scores and updates at the Newton point w − F⁻¹g.
    update:
        `independent` (the paper's sum of single-weight updates), `joint` (the minimiser of the quadratic for
        the whole removed set) or `none`.
    scope:
        Rank weights over all layers (`global`) or give each layer the same sparsity (`layer`).
    stages:
        Times that gradients are taken, curvature estimated and weights removed on the way to the sparsity.
    """

    curvature: Estimator
    first_order: bool = False
    update: Update = "joint"
    scope: Scope = "global"
    stages: int = 1

    def __post_init__(self) -> None:
        check_choice("update", self.update, UPDATES)
        check_choice("scope", self.scope, SCOPES)
        check_count("stages", self.stages)


METHODS: dict[str, Method] = {
    "woodfisher": Method(WoodFisher(samples=1000, block_size=None, damping=1e-3), stages=16),
}


def method_for(criterion: str, preset: str | None = None) -> Method:
    """The method of that name, as it measures best or as a preset wants it."""
    check_choice("criterion", criterion, METHODS)
    return METHODS[criterion]
