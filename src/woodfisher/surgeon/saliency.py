"""What the loss rises by when weights are removed (docs/method.md §4 and §5), for any curvature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from woodfisher.checks import check_vector

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.curvature.base import InverseOperator


def newton_point(weights: Tensor, gradient: Tensor, finv: InverseOperator) -> Tensor:
    """w̃ = w − F⁻¹g, where the quadratic model has its minimum: float64 `(d,)`.

    WoodTaylor is the surgeon at this point instead of at w (§5). `gradient` is the mean over samples, and F
    has to be the Fisher of single samples, as every estimator here gives it, whatever its rows average.
    """
    check_vector("weights", weights, finv.size)
    check_vector("gradient", gradient, finv.size)
    return weights.double() - finv @ gradient.double()


def saliency(point: Tensor, finv: InverseOperator) -> Tensor:
    """ρ_q = w_q² / (2 [F⁻¹]_qq) for every weight, where `point` is w or the Newton point: float64 `(d,)`."""
    check_vector("point", point, finv.size)
    return point.double().square() / (2 * finv.diag())


def group_saliency(point: Tensor, finv: InverseOperator, index: Tensor) -> Tensor:
    """ρ_Q = ½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q for every group Q that goes together: float64 `(m,)`.

    Parameters
    ----------
    point:
        w or the Newton point, `(d,)`.
    index:
        Flat indexes of the groups, int64 `(m, k)`, all different within a group.
    """
    return finv.group_energies(index, point) / 2
