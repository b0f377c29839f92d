"""Kronecker-factored curvature of Linear, convolution, recurrent and attention layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodfisher.checks import check_choice, check_count, check_positive
from woodfisher.curvature.base import (
    BlockDiagonalInverse,
    Estimator,
    InverseOperator,
    energies_by_submatrices,
    spans,
)
from woodfisher.errors import WoodfisherError
from woodfisher.memory import Budget
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from woodfisher.gradients.base import Gradients, Labels

_CG_TOLERANCE = 1e-10
_CG_STEPS = 2000


class KroneckerInverse(InverseOperator):
    """Inverse of S ⊗ A + λI through the eigenbases of both factors, for a weight of shape (out, in).

    Parameters
    ----------
    A:
        Second moment of the layer's inputs, `(in, in)`.
    S:
        Second moment of its output gradients, `(out, out)`.
    damping:
        λ > 0.
    """

    def __init__(self, A: Tensor, S: Tensor, damping: float) -> None:
        a, self._U = torch.linalg.eigh(A.double())
        s, self._W = torch.linalg.eigh(S.double())
        self._spectrum = s.clamp(min=0)[:, None] * a.clamp(min=0)[None] + damping
        self.size, self.damping = self._spectrum.numel(), damping
        self.device = A.device

    def _in_eigenbasis(self, V: Tensor, scale: Tensor) -> Tensor:
        X = V.mT.reshape(V.shape[1], *self._spectrum.shape)
        X = self._W @ (scale * (self._W.mT @ X @ self._U)) @ self._U.mT
        return X.reshape(V.mT.shape).mT

    def _inverse_product(self, V: Tensor) -> Tensor:
        return self._in_eigenbasis(V, 1 / self._spectrum)

    def _forward_product(self, V: Tensor) -> Tensor:
        return self._in_eigenbasis(V, self._spectrum)

    def _diagonal(self) -> Tensor:
        return (self._W.square() @ (1 / self._spectrum) @ self._U.square().mT).flatten()

    def _submatrices(self, index: Tensor) -> Tensor:
        m, k = index.shape
        out_dim, in_dim = self._spectrum.shape
        out = torch.empty(m, k, k, dtype=torch.float64, device=self.device)
        for groups in spans(m, 8 * k * k * (in_dim + out_dim)):
            W, U = self._W[index[groups] // in_dim], self._U[index[groups] % in_dim]
            mixed = (W[:, :, None] * W[:, None, :]) @ (1 / self._spectrum)
            out[groups] = (mixed * U[:, :, None] * U[:, None, :]).sum(-1)
        return out

    def _energies(self, index: Tensor, w: Tensor, inside: Tensor) -> Tensor:
        return energies_by_submatrices(self, index, w, inside)

    def _restricted_solve(self, keep: Tensor, b: Tensor) -> Tensor:
        # The curvature of the kept weights alone is no Kronecker product: conjugate gradients, preconditioned
        # by the inverse of the whole.
        def restricted(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda v: torch.where(keep, product(v[:, None])[:, 0], 0)

        return _conjugate_gradients(
            restricted(self._forward_product), restricted(self._inverse_product), torch.where(keep, b, 0)
        )


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], b: Tensor
) -> Tensor:
    x, r = torch.zeros_like(b), b.clone()
    z = precondition(r)
    p, rz = z.clone(), r @ z
    goal = _CG_TOLERANCE * float(b.norm())
    for _ in range(_CG_STEPS):
        if float(r.norm()) <= goal:
            return x
        q = product(p)
        step = rz / (p @ q)
        x, r = x + step * p, r - step * q
        z = precondition(r)
        rz, before = r @ z, rz
        p = z + (rz / before) * p
    warn(
        f"the joint update's conjugate gradients stopped after {_CG_STEPS} steps at a relative residual of "
        f"{float(r.norm() / b.norm()):.1g}; raise K-FAC's damping for an exact one."
    )
    return x


@dataclass(frozen=True)
class KFAC(Estimator):
    """F ≈ S ⊗ A + λI a layer, for Linear layers and (ungrouped) convolutions.

    A is the second moment of the layer's inputs, summed over positions; S that of its output gradients,
    averaged over positions. Nothing couples layers. Both factors are of all of a layer's weights: where some are
    removed already, scores take these for free to make up for others, which is warned of.

    Attributes
    ----------
    samples:
        Samples to take both from.
    damping:
        λ > 0, added to the product of the factors, in the units of a squared gradient.
    labels:
        `data` for the empirical Fisher, `model` to sample targets from the model's own predictions.

    References
    ----------
    Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, ICML 2015;
    Grosse and Martens, A Kronecker-factored approximate Fisher matrix for convolution layers, ICML 2016.
    """

    samples: int = 400
    damping: float = 1e-5
    labels: Labels = "data"

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        check_positive("damping", self.damping, "or factors of few samples have no inverse")
        check_choice("labels", self.labels, ("data", "model"))

    def estimate(self, objective: Gradients) -> BlockDiagonalInverse:
        """Gather inputs and output gradients of every layer of `objective` and factor their moments."""
        for name, shape in objective.layout.shapes.items():
            if len(shape) == 1:
                raise WoodfisherError(
                    f"K-FAC covers the weights of layers, and {name!r} is a vector: exclude it, or use WoodFisher."
                )
        if not objective.kept.all():
            warn(
                "K-FAC's factors take removed weights for free to make up for others, so that scores come out too "
                "low on a network that is sparse already: prune in one stage from the dense one, or use WoodFisher."
            )
        _check_memory(objective)
        A: dict[str, Tensor] = {}
        S: dict[str, Tensor] = {}
        samples = 0
        for layers in objective.iter_layer_rows(self.samples, labels=self.labels):
            for name, rows in layers.items():
                if rows.groups > 1:
                    raise WoodfisherError(
                        f"K-FAC covers layers without groups, and that of {name!r} has "
                        f"{rows.groups} groups. Exclude it, or use WoodFisher."
                    )
                for (s,), (a,) in rows.all_terms(objective.workspace // 2):
                    if name not in A:
                        A[name], S[name] = (t.new_zeros(len(t), len(t)) for t in (a, s))
                    A[name].addmm_(a, a.mT)
                    S[name].addmm_(s, s.mT, alpha=1 / rows.positions)
            samples += rows.count
        return BlockDiagonalInverse(
            [
                (where, KroneckerInverse(A.pop(name) / samples, S.pop(name) / samples, self.damping))
                for name, where in objective.layout.slices.items()
            ],
            self.damping,
        )


def _check_memory(objective: Gradients) -> None:
    """Raise unless there is memory for the moments, which become eigenvectors layer by layer, and the eigenvalues."""
    layout = objective.layout
    moments = [
        8 * (shape[0] ** 2 + (size // shape[0]) ** 2)
        for shape, size in zip(layout.shapes.values(), layout.sizes, strict=True)
    ]
    Budget.of(objective.device).check(
        [
            ("second moments of what layers take and give", sum(moments)),
            ("eigenvectors of the widest layer while they are found", 4 * max(moments)),
            ("eigenvalues", 8 * layout.size),
        ],
        "leave the widest layers out with exclude=, or use WoodFisher, whose memory grows with the weights and not "
        "with the squares of layers' widths",
    )
