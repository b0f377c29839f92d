"""What the loss rises by when weights are removed (docs/method.md §4 and §5), for any curvature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from woodfisher.curvature.base import DiagonalInverse, spans
from woodfisher.errors import WoodfisherError
from woodfisher.update import joint_update, quadratic_change

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.curvature.base import InverseOperator

LARGEST = 4096
"""Weights in a group up to which [F⁻¹]_QQ is formed; the cost of larger ones comes from a restricted solve."""


def newton_point(weights: Tensor, gradient: Tensor, finv: InverseOperator) -> Tensor:
    """w̃ = w − F⁻¹g, where the quadratic model has its minimum: float64 `(d,)`.

    WoodTaylor is the surgeon at this point instead of at w (§5). `gradient` is the mean over samples, and F
    has to be the Fisher of single samples, as every estimator here gives it, whatever its rows average.
    """
    return weights.double() - finv @ gradient.double()


def saliency(point: Tensor, finv: InverseOperator) -> Tensor:
    """ρ_q = w_q² / (2 [F⁻¹]_qq) for every weight, where `point` is w or the Newton point: float64 `(d,)`."""
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
    index = index.to(point.device)
    if isinstance(finv, DiagonalInverse):
        return saliency(point, finv)[index].sum(1)
    width = index.shape[1]
    if width > LARGEST:
        point = point.double()
        without = (torch.ones_like(point, dtype=torch.bool).index_fill(0, group, False) for group in index)
        steps = (joint_update(point, finv, keep) - point for keep in without)
        return torch.tensor(
            [quadratic_change(step, finv) for step in steps], dtype=torch.float64, device=point.device
        )
    parts = spans(len(index), 8 * width**2)
    return torch.cat([_energy(point.double(), finv, index[part]) for part in parts])


def _energy(point: Tensor, finv: InverseOperator, index: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(finv.submatrices(index))
    failed = info.nonzero()
    if len(failed):
        raise WoodfisherError(
            f"{len(failed)} of {len(index)} groups have no positive definite [F⁻¹]_QQ, the first at weights "
            f"{_listed(index[failed[0, 0]].tolist())}: a weight stands twice in its group, or the damping is too small "
            "for float64. Mend the index, or raise the damping."
        )
    w = point[index][..., None]
    return torch.linalg.solve_triangular(factor, w.to(factor), upper=False).square().sum((1, 2)) / 2


def _listed(index: list[int]) -> str:
    return f"[{', '.join(map(str, index[:8]))}{', …' if len(index) > 8 else ''}]"
