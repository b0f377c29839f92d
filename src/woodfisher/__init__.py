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
from woodfisher.objective import Objective
from woodfisher.pruner import prune

__all__ = [
    "KFAC",
    "DiagonalFisher",
    "DiagonalHessian",
    "ExactHessian",
    "Identity",
    "Objective",
    "WoodFisher",
    "WoodfisherError",
    "WoodfisherWarning",
    "__version__",
    "prune",
]
