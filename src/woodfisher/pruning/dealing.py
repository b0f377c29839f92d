"""What processes that prune one model together have to agree on: method, weights, samples and random numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from woodfisher.curvature import DiagonalFisher, Identity, WoodFisher
from woodfisher.errors import ElsewhereError
from woodfisher.gradients.batches import describe, digest, fingerprints, some
from woodfisher.gradients.randomness import generators, random_state, set_random_state
from woodfisher.surgeon.patterns import NM, Block, Unstructured

if TYPE_CHECKING:
    from collections.abc import Iterable

    from woodfisher.distributed import Ranks
    from woodfisher.gradients.batches import Batch
    from woodfisher.gradients.objective import Objective
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


def alike(objective: Objective, asked: object) -> Objective:
    """The objective with the first rank's buffers; raises unless all ranks prune the same model in the same way.

    Buffers may differ, as statistics of batch normalisation do after training by several processes.
    """
    ranks = objective.ranks
    if ranks.size == 1:
        return objective
    weights = digest(*objective.model.parameters(), objective.kept)
    told = ranks.gather((str(objective.layout), weights, repr(asked)))
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
    if len(set(ranks.gather(len(own)))) > 1:
        raise ElsewhereError(_UNLIKE)
    state, others = ranks.first(lambda: (random_state(), [generator.get_state() for generator in own]))
    set_random_state(state)
    for generator, its in zip(own, others, strict=True):
        generator.set_state(its)
