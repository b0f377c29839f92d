"""What a curvature is: an estimator makes an inverse out of an objective; the inverse is a linear operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodfisher.checks import check_mask, check_vector, described
from woodfisher.errors import WoodfisherError
from woodfisher.gradients.base import check_gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from woodfisher.gradients.base import Gradients, Labels


WORKSPACE = 16 * 2**20
"""Bytes of float64 scratch that an operator may use at a time, beside vectors of the model's size."""


LARGEST = 4096
"""Weights in a group up to which [F⁻¹]_QQ is formed; the energy of larger ones comes from a restricted solve."""


class InverseOperator(ABC):
    """F⁻¹ for a symmetric positive definite curvature F over `size` weights.

    A variant supplies the abstract methods; products, dense forms and checks are derived here, once.
    Results come in the dtype of the argument, and `diag` and `submatrices` in float64.

    Examples
    --------
    >>> finv = DiagonalInverse(torch.tensor([2.0, 4.0]))
    >>> finv @ torch.ones(2)
    tensor([0.5000, 0.2500])
    >>> finv.forward(torch.ones(2))
    tensor([2., 4.])
    """

    size: int
    device: torch.device
    damping: float | None = None
    """λ, where one stands on the whole diagonal."""

    @abstractmethod
    def _inverse_product(self, V: Tensor) -> Tensor:
        """F⁻¹V for float64 `V` of shape `(size, k)`."""

    @abstractmethod
    def _forward_product(self, V: Tensor) -> Tensor:
        """FV for float64 `V` of shape `(size, k)`."""

    @abstractmethod
    def _diagonal(self) -> Tensor:
        """Diagonal of F⁻¹, float64 `(size,)`, every entry positive."""

    @abstractmethod
    def _submatrices(self, index: Tensor) -> Tensor:
        """[F⁻¹]_{QQ} for each row Q of the checked index `(m, k)`: float64 `(m, k, k)`."""

    @abstractmethod
    def _energies(self, index: Tensor, w: Tensor, inside: Tensor) -> Tensor:
        """wᵀ ([F⁻¹]_QQ)⁻¹ w for groups Q with weights `w`, both `(m, k)`: float64 `(m,)`.

        Q are the weights that are `inside` `(m, k)` their group alone; the index of others may be any.
        """

    @abstractmethod
    def _restricted_solve(self, keep: Tensor, b: Tensor) -> Tensor:
        """`x` with F_SS x_S = b_S on the kept weights S and zero elsewhere; `keep` bool, `b` float64."""

    def __matmul__(self, v: Tensor) -> Tensor:
        """Inverse-Fisher-vector product F⁻¹v for `v` of shape `(size,)` or `(size, k)`."""
        return self._apply(self._inverse_product, v)

    def forward(self, v: Tensor) -> Tensor:
        """Forward product Fv, of the curvature itself, for `v` of shape `(size,)` or `(size, k)`."""
        return self._apply(self._forward_product, v)

    def diag(self) -> Tensor:
        """Diagonal of F⁻¹, float64 `(size,)`, every entry positive; computed once, for scores and update alike."""
        return self._kept_diagonal.clone()

    @cached_property
    def _kept_diagonal(self) -> Tensor:
        return self._diagonal()

    def submatrix(self, index: Tensor | Sequence[int]) -> Tensor:
        """[F⁻¹]_{QQ} for flat indexes Q of shape `(k,)`: float64 `(k, k)`."""
        try:
            index = torch.as_tensor(index)
        except (TypeError, ValueError, RuntimeError):
            raise WoodfisherError(f"an index is a vector of flat indexes; {index!r} came.") from None
        if index.ndim != 1:
            raise WoodfisherError(
                f"an index is a vector of flat indexes; one of shape {tuple(index.shape)} came."
            )
        return self.submatrices((index if index.numel() else index.long()).reshape(1, -1))[0]

    def submatrices(self, index: Tensor) -> Tensor:
        """[F⁻¹]_{QQ} for `m` groups of `k` flat indexes, int64 `(m, k)`: float64 `(m, k, k)`."""
        self._check_groups(index)
        return self._submatrices(index.to(self.device))

    def _check_groups(self, index: Tensor) -> None:
        """Raise unless `index` are groups of weights that there are, each once in its group."""
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim != 2:
            raise WoodfisherError(
                "an index must be an int64 tensor of shape (groups, weights in a group); "
                f"{described(index)} came."
            )
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.size:
            raise WoodfisherError(
                f"indexes must lie in 0…{self.size - 1}; {int(index.min())}…{int(index.max())} came."
            )
        twice = (index.sort(dim=1).values.diff(dim=1) == 0).any(1).nonzero()
        if len(twice):
            raise WoodfisherError(
                f"{len(twice)} of {len(index)} groups, the first with weights {_listed(index[twice[0, 0]])}: a weight "
                "stands twice in its group. Name each once."
            )

    def group_energies(self, index: Tensor, point: Tensor) -> Tensor:
        """w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q, twice what the loss rises by without them, for groups Q of weights: float64 `(m,)`.

        Parameters
        ----------
        index:
            Flat indexes of the groups, int64 `(m, k)`, all different within a group.
        point:
            w of all weights, `(size,)`.
        """
        check_vector("point", point, self.size)
        self._check_groups(index)
        index, point = index.to(self.device), point.to(self.device, torch.float64)
        return self._energies(index, point[index], torch.ones_like(index, dtype=torch.bool))

    def restricted_solve(self, keep: Tensor, b: Tensor) -> Tensor:
        """Solve with the curvature of the kept weights alone: F_SS x_S = b_S, x = 0 elsewhere.

        Parameters
        ----------
        keep:
            Bool `(size,)`, True on S.
        b:
            Right-hand side `(size,)`; its entries outside S are ignored.
        """
        check_mask("keep", keep, self.size)
        check_vector("b", b, self.size)
        return self._restricted_solve(keep.to(self.device), b.to(self.device, torch.float64)).to(b)

    def dense(self) -> Tensor:
        """F⁻¹ as a float64 matrix `(size, size)`: for tests and small networks."""
        return self._inverse_product(torch.eye(self.size, dtype=torch.float64, device=self.device))

    def _apply(self, product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        fits = isinstance(v, Tensor) and v.ndim in (1, 2) and v.shape[0] == self.size
        if not fits or not v.is_floating_point():
            raise WoodfisherError(
                f"the operator takes a floating-point vector ({self.size},) or matrix ({self.size}, k) of torch; "
                f"{described(v)} came."
            )
        V = (v if v.ndim == 2 else v[:, None]).to(self.device, torch.float64)
        return product(V).reshape(v.shape).to(v)


class Estimator(ABC):
    """A recipe for a curvature. Estimators are frozen dataclasses: options in, operator out.

    Attributes
    ----------
    samples:
        Samples of data that it takes; 0 for none.
    labels:
        `data` where their targets are the data's, `model` where they are drawn from the model's own distribution.
    """

    samples: int = 0
    labels: Labels = "data"

    def __call__(self, objective: Gradients) -> InverseOperator:
        """Estimate the curvature of `objective` at its weights and return its inverse."""
        check_gradients(objective, "a curvature is estimated of")
        return self.estimate(objective)

    @abstractmethod
    def estimate(self, objective: Gradients) -> InverseOperator:
        """The same of what is known to be an objective: what an estimator of a new kind supplies."""


class BlockDiagonalInverse(InverseOperator):
    """Operators on disjoint sets of weights that together are all, with nothing between one and the next.

    Parameters
    ----------
    parts:
        Pairs of where an operator's weights lie in the flat vector (a slice, or int64 indexes) and the
        operator.
    damping:
        λ, where all of them have the same one.
    """

    def __init__(
        self, parts: Sequence[tuple[slice | Tensor, InverseOperator]], damping: float | None = None
    ) -> None:
        self.parts, self.damping = list(parts), damping
        self.size = sum(operator.size for _, operator in parts)
        self.device = parts[0][1].device

    def _each(self, like: Tensor, result: Callable[[slice | Tensor, InverseOperator], Tensor]) -> Tensor:
        out = torch.empty_like(like)
        for where, operator in self.parts:
            out[where] = result(where, operator)
        return out

    def _inverse_product(self, V: Tensor) -> Tensor:
        return self._each(V, lambda where, operator: operator._inverse_product(V[where]))

    def _forward_product(self, V: Tensor) -> Tensor:
        return self._each(V, lambda where, operator: operator._forward_product(V[where]))

    def _diagonal(self) -> Tensor:
        like = torch.empty(self.size, dtype=torch.float64, device=self.device)
        return self._each(like, lambda _, operator: operator._diagonal())

    def _restricted_solve(self, keep: Tensor, b: Tensor) -> Tensor:
        return self._each(b, lambda where, operator: operator._restricted_solve(keep[where], b[where]))

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """The part that each weight belongs to, and where it is in there: int64 `(size,)`."""
        owner = torch.empty(self.size, dtype=torch.int64, device=self.device)
        position = torch.empty_like(owner)
        for number, (where, operator) in enumerate(self.parts):
            owner[where] = number
            position[where] = torch.arange(operator.size, device=self.device)
        return owner, position

    def _shares(self, index: Tensor) -> Iterator[tuple[InverseOperator, Tensor, Tensor, Tensor]]:
        """For each part: the groups with weights there, which of these are there, and the groups' indexes in it."""
        owner, position = self._places
        for number, groups, inside in by_owner(owner[index]):
            yield self.parts[number][1], groups, inside, torch.where(inside, position[index[groups]], 0)

    def _submatrices(self, index: Tensor) -> Tensor:
        out = torch.zeros(*index.shape, index.shape[1], dtype=torch.float64, device=self.device)
        for operator, groups, inside, within in self._shares(index):
            out[groups] += operator._submatrices(within) * (inside[:, :, None] & inside[:, None, :])
        return out

    def _energies(self, index: Tensor, w: Tensor, inside: Tensor) -> Tensor:
        found = w.new_zeros(len(index))
        for operator, groups, there, within in self._shares(index):
            found[groups] += operator._energies(within, w[groups], inside[groups] & there)
        return found


class DiagonalInverse(InverseOperator):
    """Inverse of a diagonal curvature.

    Parameters
    ----------
    curvature:
        The diagonal of F, damping included, all entries positive, `(size,)`.
    damping:
        λ that is in it, if one is.
    """

    def __init__(self, curvature: Tensor, damping: float | None = None) -> None:
        self.curvature, self.damping = curvature.double(), damping
        self.size = len(curvature)
        self.device = curvature.device

    def _inverse_product(self, V: Tensor) -> Tensor:
        return V / self.curvature[:, None]

    def _forward_product(self, V: Tensor) -> Tensor:
        return V * self.curvature[:, None]

    def _diagonal(self) -> Tensor:
        return 1 / self.curvature

    def _submatrices(self, index: Tensor) -> Tensor:
        same = index[:, :, None] == index[:, None, :]
        return same / self.curvature[index][:, :, None]

    def _energies(self, index: Tensor, w: Tensor, inside: Tensor) -> Tensor:
        return (self.curvature[index] * w.square() * inside).sum(1)

    def _restricted_solve(self, keep: Tensor, b: Tensor) -> Tensor:
        return torch.where(keep, b / self.curvature, 0)


def energies_by_submatrices(finv: InverseOperator, index: Tensor, w: Tensor, inside: Tensor) -> Tensor:
    """`InverseOperator._energies` from [F⁻¹]_QQ, or by a restricted solve for each of the groups above `LARGEST`."""
    if index.shape[1] > LARGEST:
        return torch.stack([_energy_by_solve(finv, *each) for each in zip(index, w, inside, strict=True)])
    found = w.new_empty(len(index))
    for span in spans(len(index), 8 * index.shape[1] ** 2):
        own = inside[span]
        matrices = finv._submatrices(index[span]) * (own[:, :, None] & own[:, None, :])
        matrices += torch.diag_embed((~own).double())
        found[span] = energies(matrices, (w[span] * own)[..., None], index[span])
    return found


def _energy_by_solve(finv: InverseOperator, index: Tensor, w: Tensor, inside: Tensor) -> Tensor:
    """The least δᵀFδ with δ = −w on the group, at the minimum over the others."""
    gone = torch.zeros(finv.size, dtype=torch.float64, device=finv.device)
    gone[index[inside]] = w[inside]
    pull = finv._forward_product(gone[:, None])[:, 0]
    others = torch.ones_like(gone, dtype=torch.bool).index_fill(0, index[inside], False)
    return gone @ pull - pull @ finv._restricted_solve(others, pull)


def energies(matrices: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
    """vᵀA⁻¹v for positive definite A, which belong to these groups: `(m, k, k)`, `(m, k, 1)`, `(m, …)` → `(m,)`."""
    factor, info = torch.linalg.cholesky_ex(matrices)
    failed = info.nonzero()
    if len(failed):
        raise WoodfisherError(
            f"{len(failed)} of {len(index)} groups have no positive definite [F⁻¹]_QQ, the first with weights "
            f"{_listed(index[failed[0, 0]])}: the damping is too small for float64. Raise it."
        )
    return torch.linalg.solve_triangular(factor, vectors, upper=False).square().sum((1, 2))


def kept_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of bool `mask` `(…, n)`: what is True before the rest, in order, as many places as any of the batch needs.

    Returns
    -------
    `(…, k)`: whether the places are True in `mask`, and which they are, int64.
    """
    most = int(mask.sum(-1).max())
    kept, order = mask.sort(dim=-1, descending=True, stable=True)
    return kept[..., :most], order[..., :most]


def by_owner(owners: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each number in int64 `owners` `(m, k)`: it, the rows that have it, int64 `(n,)`, and where, bool `(n, k)`."""
    k = owners.shape[1]
    numbers, counts = owners.unique(return_counts=True)
    entries = owners.flatten().argsort(stable=True).split(counts.tolist())
    for number, places in zip(numbers.tolist(), entries, strict=True):
        rows, own = (places // k).unique_consecutive(return_inverse=True)
        inside = torch.zeros(len(rows), k, dtype=torch.bool, device=owners.device)
        inside[own, places % k] = True
        yield number, rows, inside


def _listed(index: Tensor) -> str:
    """The first of a group's weights, for a message."""
    return f"[{', '.join(map(str, index[:8].tolist()))}{', …' if len(index) > 8 else ''}]"


def over_all(
    parts: Sequence[tuple[slice, InverseOperator]], kept: Tensor, damping: float
) -> BlockDiagonalInverse:
    """One operator over all weights: of those in `kept` `(d,)` by `parts`, and of the rest F is the damping alone.

    Parameters
    ----------
    parts:
        Slices of the vector of kept weights, with their operators.
    """
    gone = (~kept).nonzero().squeeze(1)
    removed = DiagonalInverse(torch.full_like(gone, damping, dtype=torch.float64), damping)
    placed: list[tuple[slice | Tensor, InverseOperator]] = [*parts]
    if len(gone):
        left = kept.nonzero().squeeze(1)
        placed = [(left[where], part) for where, part in parts]
    return BlockDiagonalInverse([*placed, (gone, removed)], damping)


def spans(count: int, bytes_each: int, *, by_threads: bool = False) -> list[slice]:
    """Cut `count` things into slices of at most `WORKSPACE` bytes, one thing at least.

    With `by_threads` a slice has as many for each thread, if it has that many.
    """
    step = max(WORKSPACE // max(bytes_each, 1), 1)
    threads = torch.get_num_threads()
    if by_threads and step > threads:
        step -= step % threads
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def pieces(count: int, rows: int, columns: int) -> Iterator[tuple[slice, list[slice]]]:
    """Cut a batch `(count, rows, columns)` of float64 blocks into pieces of at most `WORKSPACE` bytes.

    Yields a slice of the blocks with slices of their columns: several whole blocks, or one in parts.
    """
    whole = 8 * rows * columns <= WORKSPACE
    for blocks in spans(count, 8 * rows * columns):
        yield blocks, [slice(0, columns)] if whole else spans(columns, 8 * rows)
