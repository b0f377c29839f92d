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

    With `layer` every tensor keeps the same fraction of its weights, to rounding, or all that it has left where
    that is less; the counts add up to `count`.
    """
    if torch.isnan(scores).any():
        raise WoodfisherError(
            f"the score of a weight of {layout.name_at(int(scores.isnan().nonzero()[0]))!r} is NaN: raise the "
            "damping."
        )
    if scope == "global":
        return survivors(scores, kept, count)
    spans = list(layout.slices.values())
    counts = _counts(layout.sizes, [int(kept[where].sum()) for where in spans], count)
    parts = zip(spans, counts, strict=True)
    return torch.cat([survivors(scores[where], kept[where], number) for where, number in parts])


def _counts(sizes: list[int], available: list[int], count: int) -> list[int]:
    """Share `count` out in proportion to `sizes`, none more than `available`; what one can't take the rest do.

    >>> _counts([10, 10], [10, 10], 10), _counts([10, 10], [2, 10], 10)
    ([5, 5], [2, 8])
    """
    counts = [0] * len(sizes)
    open_ = set(range(len(sizes)))
    left = min(count, sum(available))
    while open_:
        whole = sum(sizes[i] for i in open_)
        full = {i for i in open_ if sizes[i] * left > available[i] * whole}
        if not full:
            break
        for i in full:
            counts[i] = available[i]
        left -= sum(available[i] for i in full)
        open_ -= full
    shares = {i: sizes[i] * left / sum(sizes[j] for j in open_) for i in sorted(open_)}
    for i, share in shares.items():
        counts[i] = int(share)
    rest = left - sum(counts[i] for i in open_)
    for i in sorted(open_, key=lambda i: counts[i] - shares[i])[:rest]:
        counts[i] += 1
    return counts
