"""What a task's model is run on where a command needs an example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from woodfisher.errors import WoodfisherError
from woodfisher.gradients.batches import map_tensors, rechunk, take

if TYPE_CHECKING:
    import torch
    from torch import nn

    from woodfisher.tasks import Task


def example_inputs(task: Task, count: int) -> Any:
    """What the model takes of the first validation samples that have one shape, `count` at most, in its dtype.

    Labels are left out, but where a decoder's inputs are made of them.
    """
    taken = list(take(task.validation, count))
    if not taken:
        raise WoodfisherError(
            "the task's validation data is empty, and the model is run on its first samples."
        )
    if not _decodes_labels(task.model, taken[0]):
        taken = [_without_labels(batch) for batch in taken]
    parameter = next(task.model.parameters())

    def ready(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(parameter if tensor.is_floating_point() else parameter.device)

    return map_tensors(ready, next(rechunk(taken, count, 1)))


def _decodes_labels(model: nn.Module, batch: Any) -> bool:
    """Whether it is a model of transformers whose decoder gets the labels, for want of `decoder_input_ids`."""
    if not isinstance(batch, Mapping) or any(name.startswith("decoder_input") for name in batch):
        return False
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _without_labels(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}
    return batch[0]
