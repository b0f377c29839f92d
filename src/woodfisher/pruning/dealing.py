"""Weights dealt out among processes by whole parameters: each computes with its own, of all samples."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from woodfisher.curvature import DiagonalFisher, Identity, WoodFisher
from woodfisher.errors import ElsewhereError
from woodfisher.gradients.batches import bytes_of, describe, fingerprints, some
from woodfisher.gradients.isolation import generators
from woodfisher.gradients.objective import Objective
from woodfisher.surgeon.patterns import NM, Block, Unstructured
from woodfisher.watch import phase, report_progress

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from woodfisher.distributed import Ranks
    from woodfisher.gradients.batches import Batch
    from woodfisher.gradients.forward import State
    from woodfisher.gradients.layer_rows import Factors, LayerRows
    from woodfisher.gradients.layout import Layout
    from woodfisher.pruning.method import Method


_UNLIKE = (
    "the processes have different samples: each reads the same data in the same order and takes its share of the "
    "gradients, so give all of them the same batches (a DataLoader without DistributedSampler)."
)


def can_be_dealt(method: Method) -> bool:
    """Whether what a method does with a parameter needs no other parameter, but for scores, the damping and sums."""
    curvature = method.curvature
    apart = isinstance(curvature, (Identity, DiagonalFisher)) or (
        isinstance(curvature, WoodFisher) and curvature.block_size is not None and curvature.keep != "again"
    )
    return (
        apart
        and curvature.labels == "data"
        and isinstance(method.pattern, (Unstructured, NM, Block))
        and isinstance(method.staging, int)
        and not method.refine
    )


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


def alike(objective: Objective, asked: object) -> Objective:
    """The objective with the first rank's buffers; raises unless all ranks prune the same model in the same way.

    Buffers may differ, as statistics of batch normalisation do after training by several processes.
    """
    ranks = objective.ranks
    if ranks.size == 1:
        return objective
    digest = hashlib.blake2b()
    for tensor in (*objective.model.parameters(), objective.kept):
        digest.update(bytes_of(tensor).data)
    told = ranks.gather((str(objective.layout), digest.digest(), repr(asked)))
    for number, what in enumerate(("chosen parameters", "weights", "options")):
        if len({each[number] for each in told}) > 1:
            raise ElsewhereError(
                f"the processes have different {what}, and they prune one model together: load the same one in each, "
                "and call with the same arguments."
            )
    buffers = ranks.first(lambda: {name: buffer.cpu() for name, buffer in objective.buffers.items()})
    if ranks.rank == 0:
        return objective
    return objective.with_buffers(buffers)


def check_same_samples(objective: Objective) -> None:
    """Raise unless the data of all ranks looks the same: the shapes and the first sample of each batch."""
    if objective.ranks.size == 1:
        return
    seen = [(describe(batch), fingerprints(some(batch, 0, 1))) for batch in objective.data]
    if any(each != seen for each in objective.ranks.gather(seen)):
        raise ElsewhereError(_UNLIKE)


def align_random(data: Iterable[Batch], ranks: Ranks) -> None:
    """Set all random generators, and those of `data`, as they are on the first rank: shuffling is the same then."""
    if ranks.size == 1:
        return
    own = generators(data)

    def states() -> Any:
        return (
            random.getstate(),
            np.random.get_state(),  # noqa: NPY002  what data may use
            torch.get_rng_state(),
            [generator.get_state() for generator in own],
        )

    if len(set(ranks.gather(len(own)))) > 1:
        raise ElsewhereError(_UNLIKE)
    python, numpy, default, others = ranks.first(states)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(default)
    for generator, state in zip(own, others, strict=True):
        generator.set_state(state)


def dealt(objective: Objective) -> Objective:
    """The objective for the weights of this rank; itself where the process is alone."""
    return objective if objective.ranks.size == 1 else Part(objective)


class Part(Objective):
    """An objective for the weights that its rank was dealt: rows of all samples, each taken by one of the ranks.

    Whatever takes gradients has to be called by all ranks together.

    Parameters
    ----------
    whole:
        For all weights, on the same data on each rank.
    """

    def __init__(self, whole: Objective) -> None:
        vars(self).update(vars(whole))
        self.whole = whole
        names = dealt_names(whole.layout, whole.ranks)
        self.parameters = {name: whole.parameters[name] for name in names}
        self.layout = whole.layout.only(names)
        self.weights, self.kept = (whole.layout.of(self.layout, flat) for flat in (whole.weights, whole.kept))

    def state(self, weights: Tensor | None = None) -> State:
        raise NotImplementedError("a part of the weights runs no model: its whole does")

    def joined(self) -> Objective:
        """The whole objective, with what each rank has made of its weights."""
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

    def squares(self, samples: int, *, group: int = 1, labels: str = "data") -> tuple[Tensor, int]:
        total, count = self.whole.squares(samples, group=group, labels=labels)
        return self.whole.layout.of(self.layout, total), count

    def rows(
        self,
        samples: int,
        *,
        group: int = 1,
        labels: str = "data",
        columns: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        filled = 0
        for rows in self.iter_rows(samples, group=group, labels=labels, columns=columns):
            if out is None:
                out = rows.new_empty(self.most_rows(samples, group), rows.shape[1])
            out[filled : filled + len(rows)] = rows
            filled += len(rows)
        assert out is not None
        return out[:filled]

    def iter_rows(
        self, samples: int, *, group: int = 1, labels: str = "data", columns: Tensor | None = None
    ) -> Iterator[Tensor]:
        for (rows,), _ in self._received(samples, group, labels, factored=False):
            rows = rows.to(self.device)
            yield rows if columns is None else rows[:, columns]

    def iter_layer_rows(
        self, samples: int, *, group: int = 1, labels: str = "data", names: Sequence[str] | None = None
    ) -> Iterator[dict[str, LayerRows]]:
        for tensors, forms in self._received(samples, group, labels, factored=True):
            each = (t.to(self.device) for t in tensors)
            yield {
                name: replace(forms[name], inputs=inputs, outputs=outputs)
                for name, inputs, outputs in zip(self.layout.shapes, each, each, strict=True)
                if names is None or name in names
            }

    def _received(
        self, samples: int, group: int, labels: str, *, factored: bool
    ) -> Iterator[tuple[list[Tensor], Mapping[str, LayerRows]]]:
        """Rows of this rank's weights in the order of the samples, a chunk from one of the ranks at a time.

        They are dense, `(c, d)`, or the inputs and outputs of each layer, whose forms come with them.
        """
        wanted = self.ranks.gather((list(self.layout.shapes), factored))
        whole = self.whole.within(self.workspace)
        factors = whole.factors(group) if any(asked for _, asked in wanted) else {}
        # What is made of a chunk, its gradients, and what is sent and received: each about as large as the other.
        floats = 4 * sum(
            sum(factors[name].floats for name in names) if asked else whole.layout.only(names).size
            for names, asked in wanted
        )
        forms: dict[str, LayerRows] = {}
        done = 0
        chunks = whole.row_chunks(samples, group, labels, floats)
        while turn := list(islice(chunks, self.ranks.size)):
            with phase("gradients"):
                before = [sum(count for _, count in turn[:rank]) for rank in range(len(turn))]
                if self.ranks.rank < len(turn):
                    chunk, count = turn[self.ranks.rank]
                    outgoing = _made(
                        whole, chunk, count, group, wanted, done + before[self.ranks.rank], forms
                    )
                else:
                    outgoing = [[] for _ in wanted]
                    if factored and not forms:
                        first = some(turn[0][0], 0, group)
                        _made(whole, first, 1, group, wanted, done, forms)
                received = self.ranks.exchange(outgoing)
                del outgoing
            for tensors in received[: len(turn)]:
                yield tensors, forms
            done += sum(count for _, count in turn)
            report_progress("gradients", done, samples // group)


def _made(
    whole: Objective,
    chunk: Batch,
    count: int,
    group: int,
    wanted: Sequence[tuple[Sequence[str], bool]],
    done: int,
    forms: dict[str, LayerRows],
) -> list[list[Tensor]]:
    """Rows of a chunk as each rank wants those of its weights; `forms` is told what they look like in factor form."""
    factored = [name for names, asked in wanted if asked for name in names]
    dense = sorted(
        (name for names, asked in wanted if not asked for name in names), key=list(whole.layout.shapes).index
    )
    signals: dict[str, LayerRows] = {}
    if factored:
        signals = whole.layer_rows(chunk, count, factored, done)
        if not forms:
            forms.update({name: rows.with_room(0) for name, rows in signals.items()})
    parts: dict[str, Tensor] = {}
    if dense:
        slices = whole.layout.slices
        columns = torch.cat(
            [torch.arange(slices[n].start, slices[n].stop, device=whole.device) for n in dense]
        )
        out = torch.empty(count, len(columns), dtype=whole.dtype, device=whole.device)
        whole.fill_rows(out, chunk, group, None if len(columns) == whole.layout.size else columns, done)
        parts = dict(zip(dense, out.split([whole.layout.only([n]).size for n in dense], 1), strict=True))
    empty = torch.empty(count, 0, dtype=whole.dtype, device=whole.device)
    return [
        [t for name in names for t in (signals[name].inputs, signals[name].outputs)]
        if asked
        else [torch.cat([empty, *(parts[name] for name in names)], 1)]
        for names, asked in wanted
    ]
