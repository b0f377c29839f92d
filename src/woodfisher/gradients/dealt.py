"""Weights dealt out among processes by whole parameters: each has its own, and gradients of all samples by them."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import torch

from woodfisher.gradients.base import Gradients
from woodfisher.gradients.isolation import in_turns
from woodfisher.gradients.layer_rows import LayerRows, convolution_of
from woodfisher.gradients.parameters import module_of
from woodfisher.watch import phase

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from woodfisher.distributed import Ranks
    from woodfisher.gradients.base import Labels
    from woodfisher.gradients.chunks import Chunk
    from woodfisher.gradients.layer_rows import Factors
    from woodfisher.gradients.layout import Layout
    from woodfisher.gradients.objective import Objective


def dealt(objective: Objective) -> Gradients:
    """For the weights of this rank; the objective itself where the process is alone."""
    return objective if objective.ranks.size == 1 else DealtGradients(objective)


def dealt_names(layout: Layout, ranks: Ranks) -> list[str]:
    """Names of the weights of this rank: the largest first, each to who has least so far.

    In the order of the layout; the same on every rank.
    """
    load = [0] * ranks.size
    mine = set()
    sizes = dict(zip(layout.shapes, layout.sizes, strict=True))
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        rank = load.index(min(load))
        load[rank] += sizes[name]
        if rank == ranks.rank:
            mine.add(name)
    return [name for name in layout.shapes if name in mine]


class DealtGradients(Gradients):
    """The weights that a rank was dealt, with rows of all samples, each of which one of the ranks takes.

    Whatever takes gradients has to be called by all ranks together.

    Parameters
    ----------
    whole:
        For all weights, on the same data on each rank.
    """

    def __init__(self, whole: Objective) -> None:
        self.whole, self.data = whole, whole.data
        self.layout = whole.layout.only(dealt_names(whole.layout, whole.ranks))
        self.weights, self.kept = (whole.layout.of(self.layout, flat) for flat in (whole.weights, whole.kept))
        self.device, self.dtype, self.ranks = whole.device, whole.dtype, whole.ranks
        self.base, self.workspace = whole.base, whole.workspace

    @property
    def flow_itemsize(self) -> int:
        return self.whole.flow_itemsize

    def joined(self) -> Objective:
        weights, kept = torch.zeros_like(self.whole.weights), torch.zeros_like(self.whole.kept)
        for flat, own in ((weights, self.weights), (kept, self.kept)):
            places = self.whole.layout.split(flat)
            for name, values in self.layout.split(own).items():
                places[name].copy_(values)
        kept = self.ranks.sum(kept.byte()).bool()
        return self.whole.at(self.ranks.sum(weights), kept)

    def factors(self, group: int = 1) -> dict[str, Factors]:
        found = self.whole.factors(group)
        return {name: each for name, each in found.items() if name in self.layout.shapes}

    def row_bytes(self, group: int = 1) -> int:
        return self.whole.row_bytes(group)

    def forward_flops(self) -> int:
        return self.whole.forward_flops() // self.ranks.size

    def gradient(self, samples: int) -> Tensor:
        return self.whole.layout.of(self.layout, self.whole.gradient(samples))

    def squares(self, samples: int, *, group: int = 1, labels: Labels = "data") -> tuple[Tensor, int]:
        total, count = self.whole.squares(samples, group=group, labels=labels)
        return self.whole.layout.of(self.layout, total), count

    def iter_rows(
        self,
        samples: int,
        *,
        group: int = 1,
        labels: Labels = "data",
        columns: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Iterator[Tensor]:
        done = 0
        received = self._received(samples, group, labels, factored=False)
        for (rows,) in in_turns(self.whole.model, received):
            rows = rows.to(self.device) if columns is None else rows.to(self.device)[:, columns]
            yield rows if out is None else out[done : done + len(rows)].copy_(rows)
            done += len(rows)

    def iter_layer_rows(
        self, samples: int, *, group: int = 1, labels: Labels = "data", names: Sequence[str] | None = None
    ) -> Iterator[dict[str, LayerRows]]:
        whole = self.whole
        convolutions = {
            name: convolution_of(module_of(whole.model, name), whole.parameters[name])
            for name in self.layout.shapes
        }
        received = self._received(samples, group, labels, factored=True)
        for tensors in in_turns(whole.model, received):
            each = (t.to(self.device) for t in tensors)
            yield {
                name: LayerRows(convolution, inputs, outputs)
                for (name, convolution), inputs, outputs in zip(convolutions.items(), each, each, strict=True)
                if names is None or name in names
            }

    def _received(
        self, samples: int, group: int, labels: Labels, *, factored: bool
    ) -> Iterator[list[Tensor]]:
        """Rows of this rank's weights in the order of the samples, a chunk from one of the ranks at a time.

        They are dense, `(c, d)`, or the inputs and outputs of each layer.
        """
        wanted = self.ranks.gather((list(self.layout.shapes), factored))
        whole = self.whole.within(self.workspace)
        factors = whole.factors(group) if any(asked for _, asked in wanted) else {}
        # What is made of a chunk, its gradients, and what is sent and received: each about as large as the other.
        floats = 4 * sum(
            sum(factors[name].floats for name in names) if asked else whole.layout.only(names).size
            for names, asked in wanted
        )
        chunks = whole.row_chunks(samples, group, labels, floats)
        while turn := list(islice(chunks, self.ranks.size)):
            with phase("gradients"):
                outgoing: list[list[Tensor]] = [[] for _ in wanted]
                if self.ranks.rank < len(turn):
                    outgoing = _made(whole, turn[self.ranks.rank], wanted)
                received = self.ranks.exchange(outgoing)
                del outgoing
            yield from received[: len(turn)]


def _made(whole: Objective, chunk: Chunk, wanted: Sequence[tuple[Sequence[str], bool]]) -> list[list[Tensor]]:
    """Rows of a chunk as each rank wants those of its weights."""
    factored = [name for names, asked in wanted if asked for name in names]
    dense = sorted(
        (name for names, asked in wanted if not asked for name in names), key=list(whole.layout.shapes).index
    )
    signals = whole.layer_rows(chunk, factored) if factored else {}
    parts: dict[str, Tensor] = {}
    if dense:
        slices = whole.layout.slices
        columns = torch.cat(
            [torch.arange(slices[n].start, slices[n].stop, device=whole.device) for n in dense]
        )
        out = torch.empty(chunk.count, len(columns), dtype=whole.dtype, device=whole.device)
        whole.fill_rows(out, chunk, None if len(columns) == whole.layout.size else columns)
        parts = dict(zip(dense, out.split([whole.layout.only([n]).size for n in dense], 1), strict=True))
    empty = torch.empty(chunk.count, 0, dtype=whole.dtype, device=whole.device)
    return [
        [t for name in names for t in (signals[name].inputs, signals[name].outputs)]
        if asked
        else [torch.cat([empty, *(parts[name] for name in names)], 1)]
        for names, asked in wanted
    ]
