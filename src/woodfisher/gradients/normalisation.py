"""Statistics of batch normalisation, taken anew at an objective's weights."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from woodfisher.gradients.batches import rechunk, samples_in, take
from woodfisher.gradients.forward import explained
from woodfisher.gradients.isolation import isolated
from woodfisher.gradients.parameters import full_name
from woodfisher.watch import phase, report_progress, warn

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.gradients.batches import Stream
    from woodfisher.gradients.objective import Objective

_BATCH = 250
"""Samples that statistics are taken of at a time: with more there is less that a batch's own mean takes away."""


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Name → each module of the model that keeps running statistics of batches."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def recalibrated(objective: Objective, stream: Stream, samples: int) -> Objective:
    """The objective with statistics of batch normalisation from the next `samples` samples, where it has any."""
    if not samples or not batch_norms(objective.model):
        return objective
    return objective.on(stream.draw(samples)).recalibrated(samples)


def fresh_statistics(objective: Objective, samples: int) -> dict[str, Tensor]:
    """Buffers of batch normalisation as averages over batches of the first `samples` samples; none without data."""
    norms = batch_norms(objective.model)
    if not norms:
        return {}
    state = objective.state().copied()
    done = 0
    with phase("recalibration"), isolated(objective.model), torch.no_grad():
        for name, module in norms.items():
            module.train()
            module.momentum = None
            if module.num_batches_tracked is None:  # without it no average is taken
                module.num_batches_tracked = torch.zeros((), dtype=torch.long)
            else:
                state.buffers[full_name(name, "num_batches_tracked")].zero_()
            if isinstance(module, nn.SyncBatchNorm):  # other processes are not at this
                module.forward = MethodType(_BatchNorm.forward, module)  # type: ignore[method-assign]
        drawn = list(take(objective.data, samples))
        for chunk in rechunk(drawn, even_size(sum(map(samples_in, drawn))), 1):
            if samples_in(chunk) == 1:  # of which no variance can be taken
                continue
            with explained(chunk):
                objective.forward.outputs(state, objective.on_device(chunk))
            done += samples_in(chunk)
            report_progress("recalibration", done, samples)
    if not done:
        warn(
            "no two samples of one shape come to take statistics of batch normalisation from; they stay as they were."
        )
        return {}
    return {name: buffer for name, buffer in state.buffers.items() if name.rpartition(".")[0] in norms}


def even_size(samples: int) -> int:
    """Size of chunks that are nearly equal, of `_BATCH` samples or some more: statistics of each count the same."""
    return -(-samples // max(samples // _BATCH, 1))
