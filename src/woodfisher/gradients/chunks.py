"""Samples in chunks, of as many rows as a workspace has room for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodfisher.checks import check_count
from woodfisher.errors import WoodfisherError
from woodfisher.gradients.batches import describe, map_tensors, rechunk, samples_in, some, take
from woodfisher.gradients.forward import explained
from woodfisher.gradients.plain import in_plain_products
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from woodfisher.gradients.batches import Batch
    from woodfisher.gradients.objective import Objective

MOST_ROWS = 512
"""Rows of a chunk at most, however small they are."""


@dataclass(frozen=True)
class Chunk:
    """Samples that make some of the rows.

    Attributes
    ----------
    batch:
        The samples, `count · group` of them.
    first, count:
        How many rows come before, and how many these are.
    group:
        Samples a row.
    """

    batch: Batch
    first: int
    count: int
    group: int = 1

    def part(self, first: int, last: int) -> Chunk:
        """The rows `first … last - 1` of these, or as many as there are."""
        batch = some(self.batch, first * self.group, last * self.group)
        return Chunk(batch, self.first + first, min(last, self.count) - first, self.group)


class Chunks:
    """Cuts samples into chunks, and knows what each form of them takes once it has seen one."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        self._means_checked: set[str] = set()

    def of(
        self, objective: Objective, samples: int, group: int, floats: int, *, mean: bool = False
    ) -> Iterator[Batch]:
        """The first `samples` samples of an objective's data, on its device.

        A row takes `floats` numbers beside what is saved of its forward pass and the gradients of that.
        With `mean` the loss of several samples matters, and one that sums over them is warned of.
        """
        check_count("samples", samples)
        if torch.is_inference_mode_enabled():
            raise WoodfisherError(
                "gradients can't be taken in torch.inference_mode: call this outside of it."
            )
        batches = iter(take(objective.data, samples))
        first = next(batches, None)
        if first is None:
            raise WoodfisherError(
                "the data holds no batch; at least one sample is needed. Where it can be read only once, an earlier "
                "stage, sparsity or call has done so: give a list of batches or a DataLoader."
            )
        row = objective.on_device(some(first, 0, group))
        if mean or group > 1:
            self.check_mean(objective, row)
        saved = self.bytes_saved(objective, row) * group // samples_in(row)
        each = 2 * saved + floats * objective.dtype.itemsize
        rows = max(1, min(objective.workspace // max(each, 1), MOST_ROWS))
        ranks = objective.ranks
        if ranks.size > 1:  # each takes one chunk in turn, and all have chunks of the same size
            most = objective.most_rows(samples, group)
            turns = max(-(-most // (min(ranks.gather(rows)) * ranks.size)), 1)
            rows = max(-(-most // (turns * ranks.size)), 1)
        known = objective.known_samples()
        seen = used = 0

        def counted() -> Iterator[Batch]:
            nonlocal seen
            for batch in chain([first], batches):
                seen += samples_in(batch)
                if known is not None and seen > known:
                    raise WoodfisherError(
                        f"the data tells that it has {known} samples, and gives more: does collate_fn make several of "
                        "one? Give list(data), or an iterable of batches that tells no length."
                    )
                yield batch

        for chunk in rechunk(counted(), rows * group, group):
            used += samples_in(chunk)
            yield objective.on_device(chunk)
        message = f"{samples} samples were asked for and the data ended after {seen}"
        if not used:
            raise WoodfisherError(
                f"{message}; a row averages {group}. Give more data or a smaller group."
                if seen < group
                else f"a row averages {group} samples, and there are not as many of one shape in succession: pad "
                f"samples to one shape, use batches of a multiple of {group} samples, or group=1."
            )
        if seen < samples:
            made = "they" if mean else f"the {used // group} rows that they make"
            warn(f"{message}; {made} are used.")

    def bytes_saved(self, objective: Objective, row: Batch) -> int:
        """What the forward pass of a row saves for the backward one, beside the weights."""
        form = describe(row)
        if form not in self._bytes:
            with torch.enable_grad():
                self._bytes[form] = _bytes_saved(objective, row)
        return self._bytes[form]

    def check_mean(self, objective: Objective, row: Batch) -> None:
        """Warn where the loss seems to be a sum over samples."""
        if describe(row) in self._means_checked:
            return
        self._means_checked.add(describe(row))
        state = objective.state()
        with torch.no_grad(), explained(row):
            once = float(objective.forward.mean_loss(state, row))
            twice = float(objective.forward.mean_loss(state, map_tensors(lambda t: torch.cat([t, t]), row)))
        if once and abs(twice / once - 2) < 1e-3:
            warn(
                "the loss seems to sum over the samples of a batch, and a mean is expected: gradients of several "
                "samples come out too large. Use reduction='mean' (or 'none')."
            )


def _bytes_saved(objective: Objective, row: Batch) -> int:
    state = objective.state().differentiable(objective.layout.shapes)
    own = {tensor.data_ptr() for tensor in [*state.weights.values(), *objective.model.parameters()]}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        # Sparse ones have no memory of their own.
        if tensor.layout == torch.strided and tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor.detach()  # an output that its own graph holds would never be freed

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        in_plain_products(objective.model.modules()),
        explained(row),
    ):
        value = objective.forward.mean_loss(state, row)
    if value.grad_fn is None:
        raise WoodfisherError(
            "the loss does not depend on any chosen weight: check that the loss is computed from the "
            f"model's outputs, that no activation checkpointing has use_reentrant=True, and the chosen parameters "
            f"({', '.join(objective.layout.shapes)})."
        )
    return sum(saved.values())
