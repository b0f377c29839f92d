"""Which weights stay: ranking by score, across all layers or in each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from woodfisher.errors import WoodfisherError

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.layout import Layout


def survivors(scores: Tensor, kept: Tensor, count: int) -> Tensor:
    """Mask of the `count` weights with the highest scores among those in `kept`; exactly that many.

    Of equal scores the weights first in the flat order stay. Fewer than `count` in `kept` all stay.

    >>> scores, kept = torch.tensor([3.0, 1.0, 1.0, 9.0]), torch.tensor([True, True, True, False])
    >>> survivors(scores, kept, 2)
    tensor([ True,  True, False, False])
    """
    if count >= int(kept.sum()):
        return kept.clone()
    if count == 0:
        return torch.zeros_like(kept)
    ranked = torch.where(kept, scores, -torch.inf)
    threshold = ranked.kthvalue(len(ranked) - count + 1).values
    above = ranked > threshold
    ties = ranked == threshold
    return above | (ties & (ties.cumsum(0) <= count - above.sum()))


def select(scores: Tensor, kept: Tensor, count: int, layout: Layout, scope: str) -> Tensor:
    """Mask of the `count` survivors, ranked over all weights (`global`) or within each tensor (`layer`).

    With `layer` every tensor keeps the same fraction of its weights, to rounding, and the counts still add
    up to `count`.
    """
    if torch.isnan(scores).any():
        raise WoodfisherError(
            f"the score of a weight of {layout.name_at(int(scores.isnan().nonzero()[0]))!r} is NaN: raise the "
            "damping."
        )
    if scope == "global":
        return survivors(scores, kept, count)
    stops = torch.tensor([where.stop for where in layout.slices.values()], dtype=torch.float64)
    edges = [0, *(stops * (count / layout.size)).round().long().tolist()]
    return torch.cat(
        [
            survivors(scores[where], kept[where], right - left)
            for where, left, right in zip(layout.slices.values(), edges, edges[1:], strict=False)
        ]
    )
