"""Curvatures: estimators that turn an objective into F⁻¹, a linear operator."""

from woodfisher.curvature.base import Estimator, InverseOperator
from woodfisher.curvature.damping import Damping, Relative
from woodfisher.curvature.diagonal import DiagonalFisher, Identity
from woodfisher.curvature.hessian import DiagonalHessian, ExactHessian
from woodfisher.curvature.kfac import KFAC
from woodfisher.curvature.woodfisher import WoodFisher

__all__ = [
    "KFAC",
    "Damping",
    "DiagonalFisher",
    "DiagonalHessian",
    "Estimator",
    "ExactHessian",
    "Identity",
    "InverseOperator",
    "Relative",
    "WoodFisher",
]
