"""Gradient rows, wherever they are kept: read by spans of columns, so that no more than a window has to be at hand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

SPAN = 32 * 2**20
"""Bytes of rows that are read at a time where all of them are gone through."""


class Rows(ABC):
    """`count` gradient rows (N) of `size` weights (d).

    Attributes
    ----------
    count, size:
        N and d.
    dtype:
        What they are read in: float32, or float64 for a float64 model.
    device:
        Where they are read to.
    """

    count: int
    size: int
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def columns(self, span: slice) -> Tensor:
        """The rows for the weights `span.start … span.stop - 1`, `(N, k)`: to read, not to write to."""

    @abstractmethod
    def select(self, index: Tensor) -> Tensor:
        """The rows for single weights, int64 `(k,)`: `(N, k)`."""

    def part(self, span: slice) -> Rows:
        """The same rows for some of the weights."""
        return _Part(self, span)

    def spans(self) -> Iterator[slice]:
        """All columns in order, some at a time."""
        step = max(SPAN // (self.count * self.dtype.itemsize), 1)
        for start in range(0, self.size, step):
            yield slice(start, min(start + step, self.size))

    def gram(self) -> Tensor:
        """Inner products GGᵀ, float64 `(N, N)`: of each span in the rows' dtype, added up in float64."""
        total = torch.zeros(self.count, self.count, dtype=torch.float64, device=self.device)
        for span in self.spans():
            G = self.columns(span)
            total += G @ G.mT
        return total

    def energies(self) -> Tensor:
        """Squared norms of the rows, float64 `(N,)`."""
        total = torch.zeros(self.count, dtype=torch.float64, device=self.device)
        for span in self.spans():
            total += torch.linalg.vector_norm(self.columns(span), dim=1).double().square_()
        return total


class HeldRows(Rows):
    """Rows in memory.

    Parameters
    ----------
    tensor:
        `(N, d)`; kept, not copied.
    dtype:
        What they are read in, where that is not what they are kept in.
    """

    def __init__(self, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        self._tensor = tensor
        self.count, self.size = tensor.shape
        self.dtype, self.device = dtype or tensor.dtype, tensor.device

    def columns(self, span: slice) -> Tensor:
        return self._tensor[:, span].to(self.dtype)

    def select(self, index: Tensor) -> Tensor:
        return self._tensor[:, index].to(self.dtype)


class _Part(Rows):
    def __init__(self, whole: Rows, span: slice) -> None:
        self._whole, self._first = whole, span.start
        self.count, self.size = whole.count, span.stop - span.start
        self.dtype, self.device = whole.dtype, whole.device

    def columns(self, span: slice) -> Tensor:
        return self._whole.columns(slice(self._first + span.start, self._first + span.stop))

    def select(self, index: Tensor) -> Tensor:
        return self._whole.select(self._first + index)


def as_rows(rows: Rows | Tensor) -> Rows:
    """Rows in memory where a tensor `(N, d)` came."""
    return rows if isinstance(rows, Rows) else HeldRows(rows)


def block_rows(rows: Rows, B: int, blocks: slice, columns: slice) -> Tensor:
    """The rows of some of the blocks of B weights each, or of some columns of one block: `(count, N, k)`."""
    span = slice(blocks.start * B + columns.start, (blocks.stop - 1) * B + columns.stop)
    return rows.columns(span).unflatten(1, (blocks.stop - blocks.start, -1)).transpose(0, 1)
