"""What a curvature is made of: weights, and the gradients of a loss by them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import torch

from woodfisher.checks import check_mask, described
from woodfisher.errors import WoodfisherError
from woodfisher.gradients.batches import length, reads_once
from woodfisher.memory import new_matrix, resident_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor
    from typing_extensions import Self

    from woodfisher.distributed import Ranks
    from woodfisher.gradients.batches import Batch
    from woodfisher.gradients.layer_rows import Factors, LayerRows
    from woodfisher.gradients.layout import Layout
    from woodfisher.gradients.objective import Objective

Labels = Literal["data", "model"]
"""Where targets come from: the data, or the model's own distribution."""


def check_gradients(objective: object, use: str) -> None:
    """Raise unless an objective came, for what it is of `use`."""
    if not isinstance(objective, Gradients):
        raise WoodfisherError(f"{use} an Objective(model, data, loss); a {type(objective).__name__} came.")


class Gradients(ABC):
    """Weights, and gradients of a loss by them on data.

    Attributes
    ----------
    layout:
        Names, shapes and order of the weights; `d = layout.size`.
    weights:
        Their values, `(d,)`.
    kept:
        Bool `(d,)`: False where a weight is removed. Such a weight takes part in no gradient row.
    data:
        Iterable of batches.
    device, dtype:
        Of weights and rows.
    ranks:
        The processes among which samples and weights are dealt out; this one alone unless pruning set others.
    base:
        Bytes that the process had when the run began that this belongs to; None outside of one.
    workspace:
        Bytes that a chunk of samples may take with its gradients.
    """

    layout: Layout
    weights: Tensor
    kept: Tensor
    data: Iterable[Batch]
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks
    base: int | None
    workspace: int

    @property
    @abstractmethod
    def flow_itemsize(self) -> int:
        """Bytes of each number that flows through the model."""

    @abstractmethod
    def factors(self, group: int = 1) -> dict[str, Factors]:
        """The weights whose rows can be had in factor form, and what that takes; tried on the first samples.

        These are the weights of Linear, convolution and recurrent layers, and of torch's own attention, that the model
        calls once for all samples of a batch, where the rows so had are those of the samples alone. Data that can be
        read only once is not touched, and has none.
        """

    @abstractmethod
    def row_bytes(self, group: int = 1) -> int:
        """Bytes that a row takes while its gradient is computed, without that, as far as the first samples tell."""

    @abstractmethod
    def forward_flops(self) -> int:
        """Operations of a forward pass of one sample, as far as torch counts them."""

    @abstractmethod
    def gradient(self, samples: int) -> Tensor:
        """Mean gradient over the first `samples` samples, `(d,)`, zero on removed weights.

        Where targets are ignored it is a mean over those that count, which the mean of rows is not.
        """

    @abstractmethod
    def squares(self, samples: int, *, group: int = 1, labels: Labels = "data") -> tuple[Tensor, int]:
        """Squares of the rows of `rows`, summed over them: float64 `(d,)`, and how many rows they are."""

    @abstractmethod
    def iter_rows(
        self,
        samples: int,
        *,
        group: int = 1,
        labels: Labels = "data",
        columns: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """The rows of `rows`, in chunks `(c, k)` of bounded memory, or in turn as parts of `out`.

        Between two of them the model's modes, torch's and random numbers are those of whoever takes them.
        """

    @abstractmethod
    def iter_layer_rows(
        self, samples: int, *, group: int = 1, labels: Labels = "data", names: Sequence[str] | None = None
    ) -> Iterator[dict[str, LayerRows]]:
        """Rows in factor form, of the weights in `names` (default: all), which `factors` must have.

        The gradients of removed weights are in them.
        """

    @abstractmethod
    def joined(self) -> Objective:
        """The objective for the weights of all processes."""

    def rows(
        self,
        samples: int,
        *,
        group: int = 1,
        labels: Labels = "data",
        columns: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Gradient rows: row n is the gradient of the mean loss of `group` samples.

        Parameters
        ----------
        samples:
            Samples to use, from the beginning of the data.
        group:
            Samples a row.
        labels:
            `data`, or `model` to draw targets from the model's own distribution.
        columns:
            Flat indexes of the weights wanted, int64 `(k,)`, ascending; default all.
        out:
            Where to write them to, `(n, k)` with n ≥ N: memory that is in use already is written to much faster.

        Returns
        -------
        `(N, k)` with N = samples // group, or fewer (with a warning) where the data ends early.
        """
        self.layout.check_columns(columns)
        width = self.layout.size if columns is None else len(columns)
        most = self.most_rows(samples, group)
        if out is None:
            out = new_matrix(most, width, self.dtype, self.device)
        elif (
            not isinstance(out, torch.Tensor)
            or len(out) < most
            or out.shape[1:] != (width,)
            or (out.dtype, out.device) != (self.dtype, self.device)
        ):
            raise WoodfisherError(
                f"out must have room for {most} rows of {width} weights, in {self.dtype} on {self.device}; "
                f"{described(out)} came."
            )
        parts = self.iter_rows(samples, group=group, labels=labels, columns=columns, out=out)
        return out[: sum(map(len, parts))]

    def at(self, weights: Tensor, kept: Tensor) -> Self:
        """The same at other `weights` `(d,)` of which those in `kept` `(d,)` remain."""
        self.layout.check(weights, "weights")
        check_mask("kept", kept, self.layout.size)
        return self._with(weights=torch.where(kept, weights, 0).to(self.weights), kept=kept)

    def within(self, workspace: int) -> Self:
        """The same, chunks of whose samples take at most `workspace` bytes with their gradients."""
        return self._with(workspace=workspace)

    def begun(self) -> Self:
        """The same in a run that begins now: its plans count the memory that the process has at this point.

        What one stage has given back to the process is there for the next.
        """
        return self if self.base is not None else self._with(base=resident_memory(self.device))

    @property
    def reads_once(self) -> bool:
        """Whether the data can be read only once, so that nothing may be tried on it beforehand."""
        return reads_once(self.data)

    def known_samples(self) -> int | None:
        """How many samples the data gives, where it tells without being read."""
        return length(self.data)

    def most_rows(self, samples: int, group: int) -> int:
        """Rows that `samples` samples can make at most, given what the data tells of its length unread."""
        return min(samples, self.known_samples() or samples) // group

    def _with(self, **changes: Any) -> Self:
        """A copy with other attributes."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other
