"""The Fisher of a run of many stages: new rows come, the oldest go, removed weights drop out."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from woodfisher.curvature.lowrank import LowRankInverse, roundoff
from woodfisher.curvature.prior import PriorInverse
from woodfisher.memory import new_matrix
from woodfisher.triangles import full_gram
from woodfisher.watch import warn

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from woodfisher.curvature.base import InverseOperator
    from woodfisher.curvature.prior import RestrictedPrior


class RunningFisher(ABC):
    """The empirical Fisher over the last N ≤ `window` rows, in one block over the weights that are left.

    The Gram matrix is kept beside the rows and brought up to date with what changes. Rows keep the weights that they
    were taken at; a window of a few stages forgets them in time.

    Parameters
    ----------
    size:
        d, the weights.
    window:
        Most rows held.
    group:
        m, the samples that a row averages.
    """

    def __init__(
        self, size: int, window: int, group: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        if roundoff(device) > torch.finfo(torch.float32).eps:
            warn(
                "torch is set to multiply float32 matrices with fewer digits (TF32 or bfloat16), gradient rows too: "
                "torch.set_float32_matmul_precision('highest') keeps them all."
            )
        self.group = group
        self._store = new_matrix(window, size, dtype, device)
        self._filled = self._next = 0

    @property
    def count(self) -> int:
        """Rows, N."""
        return self._filled

    @property
    def size(self) -> int:
        """Weights, d."""
        return self._store.shape[1]

    @property
    def rows(self) -> Tensor:
        """The rows, `(N, d)`."""
        return self._store[: self._filled]

    @property
    def divisor(self) -> float:
        """What the sum over rows is divided by, n = N/m."""
        return self._filled / self.group

    @property
    @abstractmethod
    def gram(self) -> Tensor:
        """Inner products of the rows, in the metric of what λ multiplies, float64 `(N, N)`."""

    def add(self, *parts: Tensor) -> None:
        """Take in new rows `(r, d)`, in parts, in the place of the oldest; of more than the window the last ones."""
        window, first, new = len(self._store), self._next, sum(map(len, parts))
        for rows in parts:
            place = (self._next + torch.arange(len(rows), device=rows.device)) % window
            self._store[place[-window:]] = rows[-window:]
            self._next = (self._next + len(rows)) % window
        self._filled = max(self._filled, min(first + new, window))
        self._renew(first, new)

    @abstractmethod
    def _renew(self, first: int, new: int) -> None:
        """Bring the Gram matrix up to date with so many new rows, in the places from `first` on and around."""

    def restricted(self, stay: Tensor) -> Self:
        """The same rows without the weights outside `stay`, bool `(d,)`."""
        if bool(stay.all()):
            return self
        other = copy.copy(self)
        other._store = self._store[:, stay]
        other._forget(self.rows, stay)
        return other

    @abstractmethod
    def _forget(self, before: Tensor, stay: Tensor) -> None:
        """Bring what belongs to the rows up to date, which were `before` and have the weights that `stay`."""

    @abstractmethod
    def damped(self, v: Tensor) -> Tensor:
        """What λ multiplies in Fv, for `v` float64 `(d,)`."""

    def pull(self, v: Tensor) -> Tensor:
        """Fv without the damping, GᵀGv/n, for `v` float64 `(d,)`."""
        return ((self.rows @ v.to(self._store.dtype)) @ self.rows).double() / self.divisor

    @abstractmethod
    def inverse(self, damping: float) -> InverseOperator:
        """F⁻¹ with λ = `damping`: a factorisation of N×N, and nothing of the size of the rows."""


class PlainFisher(RunningFisher):
    """F = λI + (m/N) Σ gₙgₙᵀ: a stage that renews r rows and removes q of d weights costs 2Nrd + 2N²q operations."""

    def __init__(
        self, size: int, window: int, group: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(size, window, group, dtype=dtype, device=device)
        self._gram = torch.zeros(window, window, dtype=torch.float64, device=device)

    @property
    def gram(self) -> Tensor:
        return self._gram[: self._filled, : self._filled]

    def _renew(self, first: int, new: int) -> None:
        if new >= self._filled:
            self._gram[: self._filled, : self._filled] = full_gram(self.rows)
            return
        window = len(self._store)
        for places in (slice(first, min(first + new, window)), slice(0, max(first + new - window, 0))):
            cross = (self.rows @ self._store[places].mT).double()
            self._gram[: self._filled, places] = cross
            self._gram[places, : self._filled] = cross.mT

    def _forget(self, before: Tensor, stay: Tensor) -> None:
        self._gram = self._gram.clone()
        square = self.gram
        if len(stay) < 2 * self.size:
            square -= full_gram(before[:, ~stay])
        else:
            square[:] = full_gram(self.rows)

    def damped(self, v: Tensor) -> Tensor:
        return v

    def inverse(self, damping: float) -> LowRankInverse:
        return LowRankInverse.of_gram(self.rows, self.gram, damping, self.divisor)


class ShrunkFisher(RunningFisher):
    """F = λP + (m/N) Σ gₙgₙᵀ, with a prior P in the place of the identity.

    The Gram matrix is GP⁻¹Gᵀ. What a removed weight leaves of P⁻¹ is another inverse, so that both are made anew: a
    stage costs 2N²d operations, and 2NB for each weight of a block of B.

    Parameters
    ----------
    prior:
        Of the weights that there are.
    window, group:
        As of `RunningFisher`.
    """

    def __init__(
        self, prior: RestrictedPrior, window: int, group: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(prior.size, window, group, dtype=dtype, device=device)
        self._prior = prior
        self._through = prior.through(self.rows)

    @property
    def gram(self) -> Tensor:
        return self._through[1]

    def _renew(self, first: int, new: int) -> None:
        self._through = self._prior.through(self.rows)

    def _forget(self, before: Tensor, stay: Tensor) -> None:
        self._prior = self._prior.restricted(stay)
        self._through = self._prior.through(self.rows)

    def damped(self, v: Tensor) -> Tensor:
        return self._prior.product(v[:, None])[:, 0]

    def inverse(self, damping: float) -> PriorInverse:
        return PriorInverse(self._prior, self.rows, self._through, damping, self.divisor)
