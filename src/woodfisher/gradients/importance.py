"""Samples whose gradients are large are taken more often and count less: the same mean gradient, with less noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from woodfisher.gradients.batches import joined, map_tensors, take

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.gradients.batches import Stream
    from woodfisher.gradients.objective import Objective

_EVEN = 0.2
"""Share of the samples that are taken evenly, whatever their gradients: none counts more than 1/share times."""


class Important:
    """Draws samples to take gradients of from more of them, by how large their gradients are.

    As Katharopoulos and Fleuret (Not all samples are created equal, 2018) do, by norms that a forward pass tells. Where
    it doesn't, samples are taken as they come.

    Parameters
    ----------
    stream:
        Where samples come from.
    among:
        Samples that are looked at for each one that is taken; 1 to take them as they come.
    """

    def __init__(self, stream: Stream, among: int) -> None:
        self._stream, self._among = stream, among
        self._random = torch.Generator().manual_seed(0)

    def draw(self, objective: Objective, samples: int) -> Objective:
        """The objective on so many samples, of whose losses the mean is that of the data on average."""
        drawn = self._stream.draw(self._among * samples)
        if self._among == 1:
            return objective.on(drawn)
        batch = joined(drawn)
        norms = None if batch is None else objective.gradient_norms(batch)
        if norms is None:
            self._among = 1
        if norms is None or len(norms) <= samples:
            return objective.on(list(take(drawn, samples)))
        index, weights = chosen(norms.cpu(), samples, self._random)
        inputs, targets = map_tensors(lambda t: t[index.to(t.device)], batch)
        return objective.on_weighted([(inputs, (targets, weights.to(objective.dtype)))])


def chosen(norms: Tensor, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` of the samples, each with a probability that grows with its norm, and their weights.

    Systematic sampling in random order (Madow, On the theory of systematic sampling II, 1949): sample i is taken with
    probability πᵢ, none twice, and counts by count/(Mπᵢ), so that the mean over those taken is that over all M on
    average.

    Parameters
    ----------
    norms:
        At least 0, float64 `(M,)`, with M ≥ `count`.

    Returns
    -------
    Indexes, int64 `(count,)`, and weights, float64 `(count,)`.
    """
    mean = norms.mean()
    shares = _EVEN + (1 - _EVEN) * (norms / mean if mean > 0 else torch.ones_like(norms))
    probabilities = shares * (count / len(norms))
    while (probabilities > 1).any():
        surely = probabilities >= 1
        rest = (count - int(surely.sum())) / probabilities[~surely].sum()
        probabilities = torch.where(surely, 1, probabilities * rest)
    order = torch.randperm(len(norms), generator=random)
    ends = probabilities[order].cumsum(0)
    places = torch.arange(count, dtype=torch.float64) + torch.rand(1, dtype=torch.float64, generator=random)
    first = torch.searchsorted(ends * (count / ends[-1]), places, right=True).clamp_max(len(norms) - 1)
    index = order[first]
    return index, count / len(norms) / probabilities[index]
