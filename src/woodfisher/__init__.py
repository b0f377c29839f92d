"""woodfisher: prune neural networks with second-order information."""

from woodfisher import export
from woodfisher._version import __version__
from woodfisher.curvature import (
    KFAC,
    DiagonalFisher,
    DiagonalHessian,
    ExactHessian,
    Identity,
    Relative,
    WoodFisher,
)
from woodfisher.curvature.planning import Plan
from woodfisher.errors import WoodfisherError, WoodfisherWarning
from woodfisher.gradients.objective import Objective
from woodfisher.pruning.adaptive import Adaptive
from woodfisher.pruning.method import METHODS, Method
from woodfisher.pruning.oneshot import Pruned, prune, sweep
from woodfisher.pruning.preview import plan
from woodfisher.pruning.pruner import Pruner
from woodfisher.pruning.report import Report
from woodfisher.pruning.schedule import Milestones, Polynomial, one_shot
from woodfisher.pruning.window import Window
from woodfisher.results.tour_plots import plot_tour
from woodfisher.saving.saved import load_weights, save_weights
from woodfisher.surgeon.channels import Cost, cost_of, shrink
from woodfisher.surgeon.patterns import NM, Block, Channels, Heads, Unstructured
from woodfisher.tour import Tour, tour

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
