"""woodfisher: prune neural networks with second-order information."""

from woodfisher import export
from woodfisher._version import __version__
from woodfisher.adaptive import Adaptive
from woodfisher.channels import Cost, cost_of, shrink
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
from woodfisher.oneshot import Pruned, prune, sweep
from woodfisher.patterns import NM, Block, Channels, Heads, Unstructured
from woodfisher.planning import Plan
from woodfisher.preview import plan
from woodfisher.pruner import Pruner
from woodfisher.report import Report
from woodfisher.saved import load_weights, save_weights
from woodfisher.schedule import Milestones, Polynomial, one_shot
from woodfisher.tour import Tour, tour
from woodfisher.tour_plots import plot_tour
from woodfisher.window import Window

__all__ = [
    "KFAC",
    "METHODS",
    "NM",
    "Adaptive",
    "Block",
    "Channels",
    "Cost",
    "DiagonalFisher",
    "DiagonalHessian",
    "ExactHessian",
    "Heads",
    "Identity",
    "Method",
    "Milestones",
    "Objective",
    "Plan",
    "Polynomial",
    "Pruned",
    "Pruner",
    "Relative",
    "Report",
    "Tour",
    "Unstructured",
    "Window",
    "WoodFisher",
    "WoodfisherError",
    "WoodfisherWarning",
    "__version__",
    "cost_of",
    "export",
    "load_weights",
    "one_shot",
    "plan",
    "plot_tour",
    "prune",
    "save_weights",
    "shrink",
    "sweep",
    "tour",
]
