"""Gradient rows, wherever they are kept: read by spans of columns, so that no more than a window has to be at hand."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from woodfisher.errors import WoodfisherError
from woodfisher.gradients.batches import map_tensors, samples_in, take
from woodfisher.gradients.isolation import isolated
from woodfisher.gradients.layer_rows import LayerRows
from woodfisher.memory import format_bytes, new_matrix
from woodfisher.triangles import gram_triangles, mirrored
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor

    from woodfisher.curvature.planning import Plan
    from woodfisher.curvature.woodfisher import WoodFisher
    from woodfisher.gradients.base import Gradients
    from woodfisher.gradients.batches import Batch
    from woodfisher.gradients.layout import Layout
    from woodfisher.gradients.objective import Objective

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
        product = torch.empty(1, *total.shape, dtype=self.dtype, device=self.device)
        for span in self.spans():
            total += gram_triangles(self.columns(span)[None], product)[0]
        return mirrored(total)

    def energies(self) -> Tensor:
        """Squared norms of the rows, float64 `(N,)`."""
        total = torch.zeros(self.count, dtype=torch.float64, device=self.device)
        for span in self.spans():
            total += torch.linalg.vector_norm(self.columns(span), dim=1, dtype=torch.float64).square_()
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


@dataclass(frozen=True)
class Form:
    """Of rows that are not all in memory.

    Attributes
    ----------
    count, size, dtype, device:
        As of `Rows`; there may be fewer rows where data ends early.
    window:
        Columns in memory at once.
    """

    count: int
    size: int
    dtype: torch.dtype
    device: torch.device
    window: int


class WindowRows(Rows):
    """Rows that are elsewhere, of which a window of columns is in memory at a time.

    Columns that are asked for and not in the window become the beginning of the next one, so that going through all
    of them in order reads each once.

    Parameters
    ----------
    form:
        More columns are loaded where more are asked for.
    """

    def __init__(self, form: Form) -> None:
        self.count, self.size, self.dtype, self.device = form.count, form.size, form.dtype, form.device
        self.window = max(min(form.window, form.size), 1)
        self._span = slice(0, 0)
        self._loaded: Tensor | None = None

    @abstractmethod
    def _load(self, span: slice) -> Tensor:
        """The rows for these columns and as many after them as make a window, `(N, k)`."""

    def _whole(self, span: slice) -> slice:
        """The window that begins with these columns."""
        return slice(span.start, min(max(span.start + self.window, span.stop), self.size))

    def columns(self, span: slice) -> Tensor:
        if self._loaded is None or not self._span.start <= span.start <= span.stop <= self._span.stop:
            self._loaded = None
            self._loaded = self._load(span)
            self._span = slice(span.start, span.start + self._loaded.shape[1])
        return self._loaded[:, span.start - self._span.start : span.stop - self._span.start]

    def select(self, index: Tensor) -> Tensor:
        out = new_matrix(self.count, len(index), self.dtype, self.device)
        order = index.argsort()
        ahead = index[order]
        while len(ahead):
            first = int(ahead[0])
            here = int(torch.searchsorted(ahead, first + self.window))
            span = slice(first, int(ahead[here - 1]) + 1)
            out[:, order[:here]] = self.columns(span)[:, ahead[:here] - first]
            order, ahead = order[here:], ahead[here:]
        return out


class FileRows(WindowRows):
    """Rows in a temporary file, which the system removes however the process ends.

    Parameters
    ----------
    chunks:
        The rows in order, `(c, d)` each, `count` in all at most.

    Raises
    ------
    WoodfisherError
        Before any chunk is taken if the disk has no room; the temporary folder is that of Python's `tempfile`.
    """

    def __init__(self, chunks: Iterable[Tensor], form: Form) -> None:
        super().__init__(form)
        needed, free = form.count * form.size * form.dtype.itemsize, disk_room()
        if needed > free:
            raise WoodfisherError(
                f"{form.count} gradient rows of {form.size} weights take {format_bytes(needed)} on disk, and the "
                f"temporary folder {tempfile.gettempdir()} has {format_bytes(free)}: set TMPDIR to one with more "
                "room, or take fewer samples."
            )
        self._file = tempfile.TemporaryFile(prefix="woodfisher-")  # noqa: SIM115  open for as long as the rows are
        weakref.finalize(self, self._file.close)
        written = 0
        try:
            for chunk in chunks:
                chunk.to("cpu").contiguous().numpy().tofile(self._file)
                written += len(chunk)
            self._file.flush()
        except OSError as error:
            self._file.close()
            raise WoodfisherError(
                f"gradient rows could not be written to disk: {error}. Make room."
            ) from error
        self.count = written

    def _load(self, span: slice) -> Tensor:
        # Read and not mapped: the system maps more of the file than is touched, which counts as the process's memory.
        here = self._whole(span)
        window = new_matrix(self.count, here.stop - here.start, self.dtype, torch.device("cpu"))
        for row, into in enumerate(window.numpy()):
            self._file.seek((row * self.size + here.start) * self.dtype.itemsize)
            if self._file.readinto(into) < into.nbytes:
                raise WoodfisherError("the file of gradient rows is shorter than what was written to it.")
        return window.to(self.device)


class HostRows(WindowRows):
    """Rows in main memory, of which windows come to the device while it works on the ones before.

    While columns are asked for in order, the next window is already on its way, on a stream of its own. It begins with
    the end of this one, as much of it as was asked for at a time: a block may lie across.

    Parameters
    ----------
    chunks:
        The rows in order, `(c, d)` each, `count` in all at most.
    form:
        Two windows are on its device, brought from pinned memory where that is a CUDA device.
    """

    def __init__(self, chunks: Iterable[Tensor], form: Form) -> None:
        super().__init__(form)
        cuda = form.device.type == "cuda"
        self._copies = torch.cuda.Stream(form.device) if cuda else None
        self._held = torch.empty(form.count, form.size, dtype=form.dtype, pin_memory=cuda)
        self._coming: tuple[slice, Tensor] | None = None
        filled = 0
        for chunk in chunks:
            self._held[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        self._held, self.count = self._held[:filled], filled

    def _load(self, span: slice) -> Tensor:
        coming, self._coming = self._coming, None
        if coming is None or not coming[0].start <= span.start <= span.stop <= coming[0].stop:
            coming = self._send(self._whole(span))
        here, rows = coming
        if self._copies is not None:
            compute = torch.cuda.current_stream(self.device)
            compute.wait_stream(self._copies)
            rows.record_stream(compute)
        if here.stop < self.size:
            first = max(here.stop - (span.stop - span.start), span.start + 1)
            self._coming = self._send(slice(first, min(first + self.window, self.size)))
        return rows[:, span.start - here.start :]

    def _send(self, span: slice) -> tuple[slice, Tensor]:
        """Start to copy a window, row by row: memory in one piece is what a copy beside other work needs."""
        if self._copies is None:
            return span, self._held[:, span].clone()
        with torch.cuda.stream(self._copies):
            rows = torch.empty(self.count, span.stop - span.start, dtype=self.dtype, device=self.device)
            torch._foreach_copy_(list(rows), list(self._held[:, span]), non_blocking=True)
        return span, rows


class GatheredRows(WindowRows):
    """Rows whose gradients are taken again for each window.

    Parameters
    ----------
    gather:
        `gather(span)` takes the rows for these columns, `(N, k)`; the same ones whenever it is asked.
    """

    def __init__(self, gather: Callable[[slice], Tensor], form: Form) -> None:
        super().__init__(form)
        self._gather = gather
        self.count = len(self.columns(slice(0, self.window)))

    def _load(self, span: slice) -> Tensor:
        return self._gather(self._whole(span))


class FactorRows(WindowRows):
    """Rows kept as what flows in and out of their layers, and made dense a window at a time.

    Parameters
    ----------
    layers:
        Name → its rows, for all names of the layout.
    layout:
        Of all weights.
    index:
        Flat indexes of the weights that these are rows of, int64 `(d,)`, ascending; None for all.
    form:
        The number of rows is that of the layers, whatever stands there.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerRows],
        layout: Layout,
        index: Tensor | None,
        form: Form,
    ) -> None:
        super().__init__(replace(form, count=len(next(iter(layers.values())).outputs)))
        self._layers, self._layout, self._index = dict(layers), layout, index
        self._unfolded: tuple[str, LayerRows] | None = None

    def _load(self, span: slice) -> Tensor:
        span = self._whole(span)
        out = new_matrix(self.count, span.stop - span.start, self.dtype, self.device)
        for name, (place, index) in self._layout.places(_indexes(span, self._index, self.device)).items():
            assert index is not None
            if self._unfolded is None or self._unfolded[0] != name:
                self._unfolded = None
                self._unfolded = name, self._layers[name].unfolded()
            self._unfolded[1].select(index, out[:, place])
        return out

    def gram(self) -> Tensor:
        if self._index is not None:
            return super().gram()
        total = torch.zeros(self.count, self.count, dtype=torch.float64, device=self.device)
        for layer in self._layers.values():
            total += layer.gram()
        return total


def _indexes(span: slice, index: Tensor | None, device: torch.device) -> Tensor:
    return torch.arange(span.start, span.stop, device=device) if index is None else index[span]


def block_rows(rows: Rows, B: int, blocks: slice, columns: slice) -> Tensor:
    """The rows of some of the blocks of B weights each, or of some columns of one block: `(count, N, k)`."""
    span = slice(blocks.start * B + columns.start, (blocks.stop - 1) * B + columns.stop)
    return rows.columns(span).unflatten(1, (blocks.stop - blocks.start, -1)).transpose(0, 1)


def disk_room() -> int:
    """Bytes free where temporary files go."""
    return shutil.disk_usage(tempfile.gettempdir()).free


def gathered(objective: Gradients, curvature: WoodFisher, plan: Plan, index: Tensor | None) -> Rows:
    """The gradient rows of an objective for the weights in `index` (None: all), kept as planned."""
    objective = objective.within(plan.chunk)
    samples, group, labels = curvature.samples, curvature.group, curvature.labels
    if plan.keep == "memory" or not objective.layout.size:
        return HeldRows(objective.rows(samples, group=group, labels=labels, columns=index))
    form = Form(plan.rows, plan.weights, objective.dtype, objective.device, plan.window)
    if plan.keep == "factors":
        layers = _stacked(objective.iter_layer_rows(samples, group=group, labels=labels), plan.rows)
        return FactorRows(layers, objective.layout, index, form)
    if plan.keep == "again":
        return _gathered_again(objective.joined(), curvature, index, form)
    chunks = objective.iter_rows(samples, group=group, labels=labels, columns=index)
    if plan.keep == "half":
        return _halved(chunks, form)
    return (FileRows if plan.keep == "disk" else HostRows)(chunks, form)


def _stacked(chunks: Iterable[dict[str, LayerRows]], count: int) -> dict[str, LayerRows]:
    """The rows of all chunks, `count` at most, as one for each layer: written to their place as they come."""
    stacked: dict[str, LayerRows] = {}
    others: list[dict[str, LayerRows]] = []
    filled = 0
    for chunk in chunks:
        if not stacked:
            stacked = {name: rows.with_room(count) for name, rows in chunk.items()}
        if others or any(not stacked[name].takes(rows) for name, rows in chunk.items()):
            others.append(chunk)
            continue
        for name, rows in chunk.items():
            stacked[name].put(filled, rows)
        filled += len(next(iter(chunk.values())).outputs)
    return {
        name: LayerRows.joined([rows.part(slice(filled)), *(chunk[name] for chunk in others)])
        if others
        else rows.part(slice(filled))
        for name, rows in stacked.items()
    }


def _halved(chunks: Iterable[Tensor], form: Form) -> HeldRows:
    """Rows in bfloat16, with a warning that says how far they are from what they were."""
    held = torch.empty(form.count, form.size, dtype=torch.bfloat16, device=form.device)
    filled, lost, energy = 0, 0.0, 0.0
    for chunk in chunks:
        part = held[filled : filled + len(chunk)]
        part.copy_(chunk)
        lost += float(torch.linalg.vector_norm(chunk - part, dtype=torch.float64)) ** 2
        energy += float(torch.linalg.vector_norm(chunk, dtype=torch.float64)) ** 2
        filled += len(chunk)
    warn(
        f"gradient rows are kept in bfloat16: rounding moved them by {(lost / energy) ** 0.5 if energy else 0:.2%}."
    )
    return HeldRows(held[:filled], form.dtype)


def _gathered_again(
    objective: Objective, curvature: WoodFisher, index: Tensor | None, form: Form
) -> GatheredRows:
    """The same samples each time, whose targets are drawn once: as rows in memory have them."""
    samples, group = curvature.samples, curvature.group
    if curvature.labels == "model":
        batches = _labelled(objective, samples, group, form.size)
        samples = sum(map(samples_in, batches))
    else:
        batches = list(take(objective.data, samples))
    objective = objective.on(batches)

    def gather(span: slice) -> Tensor:
        return objective.rows(samples, group=group, columns=_indexes(span, index, objective.device))

    return GatheredRows(gather, form)


def _labelled(objective: Objective, samples: int, group: int, weights: int) -> list[Batch]:
    """Samples with targets drawn from the model, in the chunks of rows of so many weights, in main memory."""
    with isolated(objective.model):
        chunks = objective.row_chunks(samples, group, "model", 2 * weights)
        return [map_tensors(lambda t: t.cpu(), chunk.batch) for chunk in chunks]
