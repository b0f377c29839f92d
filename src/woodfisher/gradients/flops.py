"""Floating-point operations of a forward pass: of each module, and of each weight."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from woodfisher.errors import WoodfisherError
from woodfisher.gradients.forward import explained, other_names
from woodfisher.gradients.isolation import isolated, without_fast_path
from woodfisher.gradients.parameters import module_of
from woodfisher.gradients.plain import in_plain_products

if TYPE_CHECKING:
    from collections.abc import Iterator

    from woodfisher.gradients.objective import Objective


@contextmanager
def counting_flops(model: nn.Module) -> Iterator[FlopCounterMode]:
    """Count matrix products and convolutions, also in attention and recurrent layers.

    Torch passes over the fused forms of these, so they run in their plain forms inside.
    """
    plain = in_plain_products(model.modules())
    with plain, without_fast_path(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def flops_of_modules(objective: Objective) -> dict[str, int] | None:
    """Operations for one sample of each module with those in it, the whole model as ""; None without data."""
    sample = objective.first_samples(1)
    if sample is None:
        return None
    model = objective.model
    forward = objective.forward

    def counts() -> dict[str, Any]:
        with counting_flops(model) as counter:
            forward.called(sample)
        return counter.get_flop_counts()

    with isolated(model), torch.no_grad(), explained(sample):
        found = forward.at(objective.state(), counts)
    return {name.partition(".")[2]: sum(by.values()) for name, by in found.items()}


def flops_of_weights(objective: Objective) -> Tensor:
    """What `Objective.flops` gives."""
    if objective.reads_once:
        raise WoodfisherError(
            "FLOPs are counted on a sample, and data that can be read only once would lose its first batch: give "
            "a list or a DataLoader."
        )
    counts = flops_of_modules(objective)
    if counts is None:
        raise WoodfisherError("FLOPs are counted on a sample, and the data holds no batch.")
    layout = objective.layout
    tied = other_names(objective.model)
    out = torch.zeros(layout.size, dtype=torch.int64, device=objective.device)
    for name, where in layout.slices.items():
        if len(layout.shapes[name]) == 1:
            continue
        size = where.stop - where.start
        modules = {each.rpartition(".")[0] for each in [name, *tied.get(name, [])]}
        flops = sum(counts.get(module, 0) for module in modules)
        if not flops or flops % size or _has_others(module_of(objective.model, name)):
            raise WoodfisherError(
                f"the FLOPs of {name!r} can't be counted ({flops} for {size} weights): its module is not called for "
                f"the first sample, or does more than multiply with it. Leave it out with exclude={name!r}."
            )
        out[where] = flops // size
    return out


def _has_others(module: nn.Module) -> bool:
    """Whether what a module does is not for one weight of its own alone."""
    return sum(p.ndim > 1 for p in module.parameters()) > 1
