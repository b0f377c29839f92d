"""What the Fisher of few rows is shrunk to: each output's weights as the inputs that they share have them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from woodfisher.curvature.base import InverseOperator, by_owner, energies_by_submatrices, kept_first, spans
from woodfisher.curvature.dense import cholesky, triangular_inverse
from woodfisher.errors import NoFactorsError
from woodfisher.memory import Scratch
from woodfisher.triangles import column_energies
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from woodfisher.gradients.base import Gradients, Labels
    from woodfisher.gradients.layout import Layout

_LEAST, _TOLD = 1e-3, 0.1
"""Added to the diagonal of P, which is 1 on average: so much, since what an input brings that is never there would cost
nothing, and so much times the square of rows by weights, since what the moments say is the less needed the more the
rows do, and is of another network than that of the few weights left."""

MOST_OPERATIONS = 30_000_000_000
"""Floating-point operations that factoring P may take: where inputs are many its blocks are of fewer than all."""


@dataclass(frozen=True)
class KroneckerFactors:
    """P of some outputs' weights for the same inputs, diag(s) ⊗ A.

    Attributes
    ----------
    index:
        Where these weights are among all, int64 `(outputs, inputs)`.
    A, s:
        Float64 `(inputs, inputs)` and `(outputs,)`.
    """

    index: Tensor
    A: Tensor
    s: Tensor


class Prior:
    """diag(s) ⊗ A for each layer, scaled to a mean diagonal of 1.

    A is the second moment of what flows into the layer and s that of the gradient of each of its outputs: K-FAC's
    factors (Martens and Grosse 2015) without what couples outputs, so that a block has the weights of one output.
    Weights that are not those of a Linear, convolution, recurrent or attention layer have 1 on the diagonal alone.

    Every sample says as much about A as about any other, but only one thing about the gradient of all weights. So of
    few samples λP + GᵀG/n, with P this and a little more on the diagonal, is nearer to the Fisher of many than
    λI + GᵀG/n is.

    Parameters
    ----------
    size:
        d, all weights.
    parts:
        No weight is in two of them.
    """

    def __init__(self, size: int, parts: Sequence[KroneckerFactors], device: torch.device) -> None:
        self.size, self.parts, self.device = size, list(parts), device

    @classmethod
    def of(cls, objective: Gradients, samples: int, labels: Labels) -> Prior:
        """From `samples` samples at the objective's weights; I where no layer's gradients follow from what flows."""
        layout, most = objective.layout, widest(objective.layout)
        try:
            sums = _moments(objective, samples, labels, most)
        except NoFactorsError as error:
            warn(
                f"few rows are shrunk to a multiple of the identity, not to what layers' inputs say: {error}"
            )
            sums = {}
        parts: list[KroneckerFactors] = []
        for name, (*blocks, s) in sums.items():
            where = layout.slices[name]
            index = torch.arange(where.start, where.stop, device=s.device)
            index = index.view(len(s), layout.shapes[name][0] // len(s), -1)
            if name in layout.transposed:
                index = index.mT
            for i, A in zip(index.split(most, 2), blocks, strict=True):
                parts += map(KroneckerFactors, i, A, s)
        total = sum(float(part.A.trace() * part.s.sum()) for part in parts)
        scale = sum(part.index.numel() for part in parts) / (total or 1.0)
        scaled = [KroneckerFactors(part.index, part.A, part.s * scale) for part in parts if total > 0]
        return cls(layout.size, scaled, objective.device)

    def product(self, v: Tensor) -> Tensor:
        """Its product with float64 `v` `(d, k)`."""
        out = v.clone()
        for part in self.parts:
            out[part.index] = part.s[:, None, None] * (part.A @ v[part.index])
        return out

    def diagonal(self) -> Tensor:
        """Its diagonal, float64 `(d,)`."""
        out = torch.ones(self.size, dtype=torch.float64, device=self.device)
        for part in self.parts:
            out[part.index] = part.s[:, None] * part.A.diagonal()
        return out


def _moments(objective: Gradients, samples: int, labels: Labels, most: int) -> dict[str, list[Tensor]]:
    """Name → sums of the diagonal blocks of A, of at most so many inputs, and of s, of each group of a layer."""
    layout = objective.layout
    names = [name for name in objective.factors() if len(layout.shapes[name]) > 1]
    sums: dict[str, list[Tensor]] = {}
    for layers in objective.iter_layer_rows(samples, labels=labels, names=names) if names else ():
        for name, rows in layers.items():
            for s, a in rows.all_terms(objective.workspace // 2):
                if name in layout.transposed:
                    s, a = a, s
                blocks = a.split(most, 1)
                if name not in sums:
                    sums[name] = [t.new_zeros(len(t), t.shape[1], t.shape[1]) for t in blocks]
                    sums[name].append(s.new_zeros(s.shape[:2]))
                *moments, energy = sums[name]
                for moment, part in zip(moments, blocks, strict=True):
                    moment.baddbmm_(part, part.mT)
                energy += torch.linalg.vector_norm(s, dim=2).square() / rows.positions
    return sums


def widest(layout: Layout) -> int:
    """Most inputs that a block of P has."""
    return min(max(_inputs(layout), default=1), max(math.isqrt(MOST_OPERATIONS // max(layout.size, 1)), 1))


def bytes_held(layout: Layout, weights: int, itemsize: int) -> int:
    """Bytes of A, and of P⁻¹ of so many weights that are left, before a stage and after it."""
    most = widest(layout)
    return sum(8 * inputs * min(inputs, most) for inputs in _inputs(layout)) + 2 * itemsize * weights * most


def _inputs(layout: Layout) -> list[int]:
    """Inputs of an output of each weight, at most."""
    return [
        shape[0] if name in layout.transposed else size // shape[0]
        for (name, shape), size in zip(layout.shapes.items(), layout.sizes, strict=True)
    ]


@dataclass(frozen=True)
class _Blocks:
    """Inverses of some blocks of P, each filled up to the size of the largest.

    Attributes
    ----------
    inverse:
        `(count, k, k)`, zero where it is filled up.
    places:
        Which of the weights that are left these are, int64 `(count, k)`; any where it is filled up.
    inside:
        Block and place in it of those that are none of that, two int64 `(m,)`.
    own:
        `places` of these.
    """

    inverse: Tensor
    places: Tensor
    inside: tuple[Tensor, Tensor]
    own: Tensor


class RestrictedPrior:
    """P of the weights in `kept` `(d,)` alone, and its inverse: vectors and rows have as many entries as are kept.

    P is the prior with a little more on the diagonal, and that the more `rows` there are for each of these weights.
    Blocks are factored in float64, and their inverses held in `dtype`.
    """

    def __init__(self, prior: Prior, kept: Tensor, dtype: torch.dtype, rows: int) -> None:
        self._prior, self.kept, self.dtype, self._count = prior, kept, dtype, rows
        self.size = int(kept.sum())
        self._more = _LEAST + _TOLD * (rows / max(self.size, 1)) ** 2
        self._blocks = list(self._factored())

    def restricted(self, stay: Tensor) -> RestrictedPrior:
        """The same of those weights that `stay`, bool `(size,)`."""
        kept = self.kept.clone()
        kept[self.kept] = stay
        return RestrictedPrior(self._prior, kept, self.dtype, self._count)

    def _factored(self) -> Iterator[_Blocks]:
        place = self.kept.cumsum(0) - 1
        for part in self._prior.parts:
            left = self.kept[part.index]
            for some in spans(len(left), 4 * 8 * left.shape[1] ** 2):
                filled, order = kept_first(left[some])
                if not filled.shape[1]:
                    continue
                both = filled[:, :, None] & filled[:, None, :]
                P = part.A[order[:, :, None], order[:, None, :]] * part.s[some, None, None] * both
                P.diagonal(dim1=1, dim2=2).add_(torch.where(filled, self._more, P.new_ones(())))
                root = triangular_inverse(cholesky(P, "the prior of an output's weights"))
                inverse = (root.mT @ root) * both
                places = place[part.index[some].gather(1, order)]
                block, at = filled.nonzero(as_tuple=True)
                yield _Blocks(inverse.to(self.dtype), places, (block, at), places[block, at])

    def curvature(self) -> Tensor:
        """Diagonal of P, float64 `(size,)`."""
        return self._prior.diagonal()[self.kept] + self._more

    def product(self, V: Tensor) -> Tensor:
        """PV for float64 `V` `(size, k)`."""
        full = V.new_zeros(self._prior.size, V.shape[1])
        full[self.kept] = V
        return self._prior.product(full)[self.kept] + self._more * V

    def solve(self, V: Tensor) -> Tensor:
        """P⁻¹V for `V` `(size, k)`."""
        out = V / (1 + self._more)
        for blocks in self._blocks:
            out[blocks.own] = (blocks.inverse.to(V) @ V[blocks.places])[blocks.inside]
        return out

    def through(self, G: Tensor) -> tuple[Tensor, Tensor]:
        """H = GP⁻¹ for `G` `(N, size)`, in its dtype, and HGᵀ, float64 `(N, N)`."""
        out = G / (1 + self._more)
        for blocks in self._blocks:
            here = G[:, blocks.places.flatten()].unflatten(1, blocks.places.shape)
            solved = here.transpose(0, 1) @ blocks.inverse.to(G)
            block, at = blocks.inside
            out[:, blocks.own] = solved.transpose(0, 1)[:, block, at]
        return out, (out @ G.mT).double()

    def diagonal(self) -> Tensor:
        """Diagonal of P⁻¹, float64 `(size,)`."""
        out = torch.full((self.size,), 1 / (1 + self._more), dtype=torch.float64, device=self.kept.device)
        for blocks in self._blocks:
            out[blocks.own] = blocks.inverse.diagonal(dim1=1, dim2=2)[blocks.inside].double()
        return out

    def submatrices(self, index: Tensor) -> Tensor:
        """[P⁻¹]_QQ for each row Q of `index` `(m, k)`: float64 `(m, k, k)`."""
        out = (index[:, :, None] == index[:, None, :]).double() / (1 + self._more)
        batch, block, place = self._owners
        for number, groups, inside in by_owner(batch[index]):
            if number < 0:
                continue
            own, at = (torch.where(inside, each[index[groups]], 0) for each in (block, place))
            together = own[:, :, None] == own[:, None, :]
            entries = self._blocks[number].inverse[own[:, :, None], at[:, :, None], at[:, None, :]]
            pairs = inside[:, :, None] & inside[:, None, :]
            out[groups] = torch.where(pairs, entries.double() * together, out[groups])
        return out

    @cached_property
    def _owners(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each weight: which of `_blocks` it is in, -1 for none, the block there, and the place in that."""
        which = torch.full((self.size,), -1, device=self.kept.device)
        block, place = torch.zeros_like(which), torch.zeros_like(which)
        for number, blocks in enumerate(self._blocks):
            which[blocks.own] = number
            block[blocks.own], place[blocks.own] = blocks.inside
        return which, block, place


class PriorInverse(InverseOperator):
    """Inverse of F = λP + GᵀG/n in one block: with H = GP⁻¹ and K = nλI + HGᵀ = LLᵀ it is (P⁻¹ − HᵀK⁻¹H)/λ.

    Parameters
    ----------
    prior:
        P.
    rows:
        G, `(N, size)`, in whose dtype products are.
    through:
        H and HGᵀ, as `prior.through(rows)` gives them.
    damping:
        λ > 0.
    divisor:
        n: the number of rows, divided by the samples that each row averages.
    """

    damping: float

    def __init__(
        self,
        prior: RestrictedPrior,
        rows: Tensor,
        through: tuple[Tensor, Tensor],
        damping: float,
        divisor: float,
    ) -> None:
        self._prior, self._rows = prior, rows
        self._through, gram = through
        self.size, self.device = prior.size, rows.device
        self.damping, self._divisor = damping, divisor
        K = gram.clone()[None]
        K.diagonal(dim1=1, dim2=2).add_(divisor * damping)
        self._factor = triangular_inverse(cholesky(K, "the Gram matrix of gradient rows"))

    def _inverse_product(self, V: Tensor) -> Tensor:
        L = self._factor[0]
        Y = L.mT @ (L @ (self._through @ V.to(self._through)).double())
        return (self._prior.solve(V) - (self._through.mT @ Y.to(self._through)).double()) / self.damping

    def _forward_product(self, V: Tensor) -> Tensor:
        through = self._rows.mT @ (self._rows @ V.to(self._rows)) / self._divisor
        return self.damping * self._prior.product(V) + through.double()

    def _diagonal(self) -> Tensor:
        scratch = Scratch(self.device)
        used = column_energies(self._through[None], scratch, self._factor.to(self._through))[0]
        left = self._prior.diagonal() - used.double()
        scaled = column_energies(self._rows[None], scratch)[0].double() / (self._divisor * self.damping)
        return torch.maximum(left, 1 / (self._prior.curvature() + scaled)) / self.damping

    def _submatrices(self, index: Tensor) -> Tensor:
        V = self._factor[0] @ self._through[:, index.flatten()].double()
        V = V.unflatten(1, index.shape).movedim(0, 1)
        return (self._prior.submatrices(index) - V.mT @ V) / self.damping

    def _energies(self, index: Tensor, w: Tensor, inside: Tensor) -> Tensor:
        return energies_by_submatrices(self, index, w, inside)

    def _restricted_solve(self, keep: Tensor, b: Tensor) -> Tensor:
        prior, rows = self._prior.restricted(keep), self._rows[:, keep]
        inverse = PriorInverse(prior, rows, prior.through(rows), self.damping, self._divisor)
        out = torch.zeros_like(b)
        out[keep] = inverse @ b[keep]
        return out
