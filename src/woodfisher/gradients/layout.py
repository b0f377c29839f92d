"""Names of weights ↔ slices of one flat vector ↔ blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodfisher.errors import WoodfisherError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping


@dataclass(frozen=True)
class Run:
    """`count` neighbouring blocks of `size` weights each, from flat index `start` on."""

    start: int
    count: int
    size: int

    @property
    def stop(self) -> int:
        """One past the last flat index."""
        return self.start + self.count * self.size

    @property
    def columns(self) -> slice:
        """The run as a slice of the flat vector."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Layout:
    """The chosen weights in the order in which the flat vector of all `size` of them holds them.

    Attributes
    ----------
    shapes:
        Name → shape, in flat order; each tensor is flattened in its own memory order.
    transposed:
        Name → groups of the weights whose first dimension is the inputs, as that of transposed convolutions is.

    Examples
    --------
    >>> layout = Layout({"fc1.weight": (2, 3), "fc2.weight": (1, 2)})
    >>> layout.size, layout.slices["fc2.weight"]
    (8, slice(6, 8, None))
    >>> layout.runs(4)
    [Run(start=0, count=1, size=4), Run(start=4, count=1, size=2), Run(start=6, count=1, size=2)]
    """

    shapes: Mapping[str, tuple[int, ...]]
    transposed: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Weights in each tensor."""
        return tuple(torch.Size(shape).numel() for shape in self.shapes.values())

    @cached_property
    def size(self) -> int:
        """Weights in all, `d`."""
        return sum(self.sizes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Name → its slice of the flat vector."""
        stops = list(accumulate(self.sizes))
        return {
            name: slice(stop - size, stop)
            for name, size, stop in zip(self.shapes, self.sizes, stops, strict=True)
        }

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors → one flat vector `(d,)`."""
        return torch.cat([tensors[name].reshape(-1) for name in self.shapes])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Flat vector `(d,)` → named tensors in their own shapes (views, not copies)."""
        self.check(flat, "a flat vector of all chosen weights")
        return {name: flat[where].view(self.shapes[name]) for name, where in self.slices.items()}

    def of(self, part: Layout, flat: Tensor) -> Tensor:
        """What of a flat vector `(d,)` belongs to the weights of another layout, in its order."""
        parts = self.split(flat)
        return torch.cat([flat[:0], *(parts[name].reshape(-1) for name in part.shapes)])

    def index(self, name: str) -> Tensor:
        """Flat indexes of a weight as int64 `(outputs, inputs, positions)`; a vector has one input.

        Of a layer in groups the inputs are those of one, as each output has.
        """
        where, shape = self.slices[name], self.shapes[name]
        first, second = (*shape, 1, 1)[:2]
        index = torch.arange(where.start, where.stop).reshape(first, second, -1)
        if name not in self.transposed:
            return index
        groups = self.transposed[name]
        return index.unflatten(0, (groups, first // groups)).transpose(1, 2).flatten(0, 1)

    def places(self, columns: Tensor | None) -> dict[str, tuple[slice, Tensor | None]]:
        """Name → where its weights stand among `columns`, and which of its own they are.

        Parameters
        ----------
        columns:
            Flat indexes, int64 `(k,)`, ascending; None for all, which is then said of each name too. Names that have
            none of them are left out.

        Examples
        --------
        >>> Layout({"a": (2, 3), "b": (2,)}).places(torch.tensor([0, 4, 7]))
        {'a': (slice(0, 2, None), tensor([0, 4])), 'b': (slice(2, 3, None), tensor([1]))}
        """
        if columns is None:
            return {name: (where, None) for name, where in self.slices.items()}
        found: dict[str, tuple[slice, Tensor | None]] = {}
        for name, where in self.slices.items():
            ends = torch.tensor([where.start, where.stop], device=columns.device)
            first, last = torch.searchsorted(columns, ends).tolist()
            if last > first:
                found[name] = slice(first, last), columns[first:last] - where.start
        return found

    def check_columns(self, columns: Tensor | None) -> None:
        """Raise unless `columns` are None, or flat indexes as `places` takes them."""
        if columns is None:
            return
        if isinstance(columns, Tensor) and columns.ndim == 1 and columns.dtype == torch.int64:
            ends = columns.new_tensor([-1, self.size])
            if bool((torch.cat([ends[:1], columns, ends[1:]]).diff() > 0).all()):
                return
        came = f"{tuple(columns.shape)} {columns.dtype}" if isinstance(columns, Tensor) else repr(columns)
        raise WoodfisherError(
            f"columns must be flat indexes below {self.size}, an int64 tensor (k,) in ascending order; {came} came."
        )

    def name_at(self, index: int) -> str:
        """Name of the tensor that holds flat index `index`."""
        return next(name for name, where in self.slices.items() if where.start <= index < where.stop)

    def restricted(self, kept: Tensor) -> Layout:
        """Layout of the flat vector of only the weights in `kept` `(d,)`; tensors left empty drop out."""
        counts = {name: int(part.sum()) for name, part in self.split(kept).items()}
        return Layout({name: (count,) for name, count in counts.items() if count})

    def only(self, names: Collection[str]) -> Layout:
        """Layout of the weights in `names` alone."""
        return Layout(
            {name: self.shapes[name] for name in names},
            {name: groups for name, groups in self.transposed.items() if name in names},
        )

    def check(self, flat: Tensor, what: str) -> None:
        """Raise if `flat` does not have one entry (or row) for each weight."""
        if not isinstance(flat, Tensor) or flat.ndim == 0 or flat.shape[0] != self.size:
            came = f"tensor of shape {tuple(flat.shape)}" if isinstance(flat, Tensor) else type(flat).__name__
            raise WoodfisherError(
                f"{what} must be a tensor of {self.size} entries, one for each chosen weight; a {came} came."
            )

    def runs(self, block_size: int | None) -> list[Run]:
        """Cut the vector into blocks of at most `block_size` weights, as runs of equal blocks.

        Blocks follow the flat order and never cross from one tensor into the next; the last block of a tensor holds
        what is left over. `block_size=None` is one block over all weights.
        """
        if block_size is None:
            return [Run(0, 1, self.size)] if self.size else []
        return [run for span in self.slices.values() for run in _cut(span.start, span.stop, block_size)]


def _cut(start: int, stop: int, block_size: int) -> Iterator[Run]:
    count, rest = divmod(stop - start, block_size)
    if count:
        yield Run(start, count, block_size)
    if rest:
        yield Run(stop - rest, 1, rest)
