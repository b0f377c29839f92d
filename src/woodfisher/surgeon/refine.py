"""Improving a kept set against the joint objective, after ranking one weight at a time (docs/method.md §8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from woodfisher.checks import check_count, check_mask, check_vector
from woodfisher.errors import WoodfisherError
from woodfisher.surgeon.update import joint_update, quadratic_change

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.curvature.base import InverseOperator

FIRST_SHARE = 0.1
"""Share of the smaller of the kept and the removed set that the first round swaps."""


def joint_objective(point: Tensor, finv: InverseOperator, keep: Tensor) -> float:
    """½ (w − w̃)ᵀF(w − w̃) at its least over all w that are zero outside `keep`; w̃ is `point` `(d,)`."""
    return quadratic_change(joint_update(point, finv, keep) - point.double(), finv)


def refine(
    point: Tensor, finv: InverseOperator, keep: Tensor, kept: Tensor, rounds: int
) -> tuple[Tensor, list[float]]:
    """Swap kept weights for removed ones as long as the joint objective falls.

    At the minimiser w' for the kept set S the force on a removed weight is r_q = [F(w' − w̃)]_q, and letting it
    move alone lowers the objective by r_q² / (2 c_q), where c_q is its curvature once S has adjusted; dropping s
    raises it by w'_s² / (2 [F_SS⁻¹]_ss). Both are estimated with [F⁻¹] of the whole in the place of the
    restricted ones, which bounds the first from above and the second from below. The best pairs are swapped
    together and refitted; a swap that doesn't lower the objective is taken back and halved.

    Parameters
    ----------
    point:
        w or the Newton point, `(d,)`.
    keep:
        The kept set to start from, bool `(d,)`.
    kept:
        Weights that may be kept, bool `(d,)`.
    rounds:
        Most swaps to try; each costs one restricted solve.

    Returns
    -------
    The kept set, with as many weights as before, and the joint objective before the first round and after each
    that was tried; it never rises.
    """
    check_vector("point", point, finv.size)
    check_mask("kept", kept, finv.size)
    check_mask("keep", keep, finv.size)
    if bool((keep & ~kept).any()):
        raise WoodfisherError("weights in keep are not in kept, of which it is to be a part.")
    check_count("rounds", rounds, least=0)
    point, diagonal = point.double(), finv.diag()

    def refitted(keep: Tensor) -> tuple[Tensor, Tensor, float]:
        new = joint_update(point, finv, keep)
        force = finv.forward(new - point)
        return new, force, float((new - point) @ force / 2)

    new, force, value = refitted(keep)
    history = [value]
    share = FIRST_SHARE
    for _ in range(rounds):
        gain = torch.where(kept & ~keep, force.square() * diagonal, -torch.inf)
        cost = torch.where(keep, new.square() / diagonal, torch.inf)
        most = int(share * min(int(keep.sum()), int((kept & ~keep).sum())))
        if most == 0:
            break
        gains, come = gain.topk(most)
        costs, go = cost.topk(most, largest=False)
        worth = gains > costs
        if not worth.any():
            break
        trial = keep.clone()
        trial[come[worth]] = True
        trial[go[worth]] = False
        moved, pull, value = refitted(trial)
        if value < history[-1]:
            keep, new, force = trial, moved, pull
            history.append(value)
        else:
            share /= 2
            history.append(history[-1])
    return keep, history
