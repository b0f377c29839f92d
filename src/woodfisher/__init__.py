"""woodfisher: prune neural networks with second-order information."""

from woodfisher._version import __version__
from woodfisher.adaptive import Adaptive
from woodfisher.curvature import (
    KFAC,
    DiagonalFisher,
    DiagonalHessian,
    ExactHessian,
    Identity,
    Relative,
    WoodFisher,
)
from woodfisher.errors import WoodfisherError, WoodfisherWarning
from woodfisher.method import METHODS, Method
from woodfisher.objective import Objective
from woodfisher.pruner import Pruned, prune, sweep
from woodfisher.report import Report

__all__ = [
    "KFAC",
    "METHODS",
    "Adaptive",
    "DiagonalFisher",
    "DiagonalHessian",
    "ExactHessian",
    "Identity",
    "Method",
    "Objective",
    "Pruned",
    "Relative",
    "Report",
    "WoodFisher",
    "WoodfisherError",
    "WoodfisherWarning",
    "__version__",
    "prune",
    "sweep",
]
