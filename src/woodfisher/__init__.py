"""woodfisher: prune neural networks with second-order information."""

from woodfisher._version import __version__
from woodfisher.curvature import (
    KFAC,
    DiagonalFisher,
    DiagonalHessian,
    ExactHessian,
    Identity,
    WoodFisher,
)
from woodfisher.errors import WoodfisherError, WoodfisherWarning
from woodfisher.method import METHODS, Method
from woodfisher.objective import Objective
from woodfisher.pruner import prune
from woodfisher.report import Report

__all__ = [
    "KFAC",
    "METHODS",
    "DiagonalFisher",
    "DiagonalHessian",
    "ExactHessian",
    "Identity",
    "Method",
    "Objective",
    "Report",
    "WoodFisher",
    "WoodfisherError",
    "WoodfisherWarning",
    "__version__",
    "prune",
]
