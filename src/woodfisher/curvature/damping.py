"""λ in three forms: a number, a multiple of the curvature's own scale, or what held-out rows find likely."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from woodfisher.checks import check_positive
from woodfisher.distributed import ALONE
from woodfisher.errors import WoodfisherError
from woodfisher.watch import warn

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.curvature.rows import Rows
    from woodfisher.distributed import Ranks


@dataclass(frozen=True)
class Relative:
    """λ as a multiple of the mean diagonal entry of F without damping: the same for every unit of the loss.

    Attributes
    ----------
    factor:
        The multiple, above 0.
    """

    factor: float

    def __post_init__(self) -> None:
        check_positive("the factor of a relative damping", self.factor, "or F has no inverse")


Damping = float | Relative | Literal["auto"]

LEAST_ROWS = 5
"""Rows that `auto` needs, one of which it holds out."""

_GRID = [10 ** (power / 4) for power in range(-8, 17)]
"""Multiples of the scale among which `auto` chooses. Where fewer weights are left than there are rows, all rows may lie
in one span, and no damping at all would be likeliest: the quadratic would be trusted as far as it goes."""


def check_damping(value: object, why: str) -> None:
    """Raise unless `value` is a damping in one of its forms."""
    if value == "auto" or isinstance(value, Relative):
        return
    if isinstance(value, str):
        raise WoodfisherError(
            f"damping must be a number above 0, wf.Relative(factor) or 'auto'; {value!r} came."
        )
    check_positive("damping", value, why)


def resolve(damping: Damping, rows: Rows, group: int, ranks: Ranks = ALONE) -> float:
    """λ for rows each of which averages `group` samples, and whose columns are spread over `ranks`."""
    if not isinstance(damping, Relative) and damping != "auto":
        return float(damping)
    size = sum(ranks.gather(rows.size))
    if damping == "auto":
        return held_out_damping(ranks.sum(rows.gram()), size, group)
    found = damping.factor * positive_scale(ranks.sum(rows.energies()), size, group)
    if not math.isfinite(found):
        raise WoodfisherError(
            f"{damping} is {found} here: gradients are not finite, or their squares are not. Divide the loss by what "
            "brings them near 1."
        )
    return found


def held_out_damping(gram: Tensor, size: int, group: int) -> float:
    """λ under which rows held out are likeliest, as draws from N(0, F_λ) with F_λ made of the others.

    Every fifth row is held out. One eigendecomposition of the others' Gram matrix, GGᵀ = U diag(e) Uᵀ, gives

        −2 log p(h) = d log λ + Σ log(1 + eᵢ/(nλ)) + (‖h‖² − Σ (uᵢᵀGh)² / (nλ + eᵢ)) / λ

    for every λ at once. Out of the rows' span this sets λ to what held-out gradients have there on average, per
    weight (as the noise of probabilistic PCA: Tipping and Bishop, 1999).

    Parameters
    ----------
    gram:
        Inner products of the gradient rows, float64 `(N, N)`, at least five of them.
    size:
        d, the weights.
    group:
        Samples that each averages; held-out rows are scaled by its root, as F is by it.
    """
    if len(gram) < LEAST_ROWS:
        raise WoodfisherError(
            f"damping='auto' holds every fifth row out, and there are {len(gram)}: take {LEAST_ROWS} at least, "
            "or give a number."
        )
    if not gram.isfinite().all():
        raise WoodfisherError(
            "inner products of the gradient rows overflow: the gradients are too large for float32. Divide the loss "
            "by what brings them near 1, or convert model and data to float64."
        )
    scale = positive_scale(gram.diagonal(), size, group)
    out = torch.arange(len(gram), device=gram.device) % 5 == 4
    n, d, m = int((~out).sum()) / group, size, group
    e, U = torch.linalg.eigh(gram[~out][:, ~out])
    e = e.clamp(min=0)
    energy = m * gram.diagonal()[out].mean()
    explained = m * (U.mT @ gram[~out][:, out]).square().mean(1)

    def surprise(damping: float) -> float:
        within = torch.log1p(e / (n * damping)).sum()
        return d * math.log(damping) + float(
            within + (energy - (explained / (n * damping + e)).sum()) / damping
        )

    return min((factor * scale for factor in _GRID), key=surprise)


def positive_scale(energies: Tensor, size: int, group: int) -> float:
    """Mean diagonal entry of F without damping, from the rows' squared norms `(N,)`; 1 where all are zero."""
    if not size:
        raise WoodfisherError(
            "every chosen weight is zero already, so that there is no curvature for damping to follow: give a number."
        )
    scale = float(energies.mean()) * group / size
    if scale == 0:
        warn(
            "every gradient row is zero, so that the curvature says nothing and weights are ranked by magnitude: the "
            "model fits these samples perfectly, nothing passes through it any more, the loss compares samples with "
            "each other, which says nothing of one alone, or activation checkpointing with use_reentrant=True cuts "
            "gradients off (set it to False)."
        )
        return 1.0
    return scale
