"""How the kept weights move when others are removed (docs/method.md §4), for any curvature.

`point` is where the quadratic model has its minimum: the weights themselves, or the Newton point. `keep` is
True for the weights that stay. Results are float64 `(d,)`, exactly zero where a weight is removed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from woodfisher.checks import check_mask, check_vector

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.curvature.base import InverseOperator


def independent_update(point: Tensor, finv: InverseOperator, keep: Tensor) -> Tensor:
    """Sum of the single-weight updates −w_q F⁻¹_{:,q} / [F⁻¹]_qq, removed weights then set to zero.

    This is what the paper does; removed weights don't know of each other.
    """
    point = _checked(point, finv, keep)
    pull = torch.where(keep, 0, point / finv.diag())
    return torch.where(keep, point - finv @ pull, 0)


def joint_update(point: Tensor, finv: InverseOperator, keep: Tensor) -> Tensor:
    """The minimiser of the quadratic over all weights that are zero outside `keep`.

    On the kept set S, with Q the removed: w'_S = w_S + F_SS⁻¹ F_SQ w_Q.
    """
    point = _checked(point, finv, keep)
    pull = finv.forward(torch.where(keep, 0, point))
    return torch.where(keep, point + finv.restricted_solve(keep, pull), 0)


def no_update(point: Tensor, finv: InverseOperator, keep: Tensor) -> Tensor:
    """Kept weights stay as they are."""
    return torch.where(keep, _checked(point, finv, keep), 0)


def quadratic_change(step: Tensor, finv: InverseOperator, gradient: Tensor | None = None) -> float:
    """Predicted change of the loss, gᵀδ + ½ δᵀFδ, for a step δ `(d,)`; g = 0 without `gradient`."""
    check_vector("step", step, finv.size)
    step = step.double()
    change = step @ finv.forward(step) / 2
    if gradient is not None:
        check_vector("gradient", gradient, finv.size)
        change = change + gradient.double() @ step
    return float(change)


def _checked(point: Tensor, finv: InverseOperator, keep: Tensor) -> Tensor:
    """`point` in float64, which has an entry for each weight, as `keep` has."""
    check_vector("point", point, finv.size)
    check_mask("keep", keep, finv.size)
    return point.double()
