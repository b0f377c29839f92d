"""What a task is: everything that pruning a model and judging the result needs."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from woodfisher.checks import finite_number
from woodfisher.errors import WoodfisherError
from woodfisher.isolation import same_flags

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor


def told(error: Exception) -> str:
    """Say what was raised, and in which line of which file."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{where}"


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Top-1 accuracy in per cent, in evaluation mode; the model's training flags are left as they were."""
    device = next(model.parameters()).device
    correct = total = 0
    with same_flags(model), torch.inference_mode():
        model.eval()
        for inputs, targets in batches:
            predicted = model(inputs.to(device)).argmax(dim=-1)
            correct += int((predicted == targets.to(device)).sum())
            total += targets.numel()
    if not total:
        raise WoodfisherError(
            "the accuracy of no samples was asked for: the data is empty, or can be read only once. Give a list of "
            "batches or a DataLoader."
        )
    return 100.0 * correct / total


@dataclass(frozen=True)
class Task:
    """A trained model with the data, loss and metric that belong to it.

    Attributes
    ----------
    name:
        What reports call it.
    model:
        The trained network.
    train, validation, test:
        Iterables of batches, each iterable more than once. Gradients come from `train`, choices are made
        on `validation`, and `test` is looked at once. A fresh iteration over `train` should come in random
        order, or its first few hundred samples would all be of one kind.
    loss:
        `loss(outputs, targets)`; None for models that return their own `.loss`.
    metric:
        `metric(model, batches)`, larger is better; `accuracy` by default.
    metric_name:
        How tables name the metric.
    augment:
        `augment(inputs)` of a training batch → inputs of the same shape, with randomness from torch's global
        generator; None for none. Only `train` uses it, and only on what the optimizer sees.
    earlier:
        Name → the model's state dict at an earlier point of its training, in order, for tours of its curvature.
    """

    name: str
    model: nn.Module
    train: Iterable[Any]
    validation: Iterable[Any]
    test: Iterable[Any]
    loss: Callable[[Any, Any], Tensor] | None
    metric: Callable[[nn.Module, Iterable[Any]], float] = accuracy
    metric_name: str = "accuracy, %"
    augment: Callable[[Any], Any] | None = None
    earlier: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise WoodfisherError(
                f"the model of the task {self.name} must be a torch.nn.Module; a {type(self.model).__name__} came."
            )

    def evaluate(self, model: nn.Module) -> float:
        """Metric of `model` on the test data; raises unless it is a finite number."""
        return self._measured(model, self.test, "test")

    def validate(self, model: nn.Module) -> float:
        """Metric of `model` on the validation data; raises unless it is a finite number."""
        return self._measured(model, self.validation, "validation")

    def _measured(self, model: nn.Module, batches: Iterable[Any], kind: str) -> float:
        try:
            with same_flags(model):
                value: object = self.metric(model, batches)
        except WoodfisherError:
            raise
        except Exception as error:
            raise WoodfisherError(
                f"the metric of the task {self.name} fails on the {kind} data: {told(error)}"
            ) from error
        return finite_number(
            value,
            f"the metric of the task {self.name} must be a finite float; {value!r} came on the {kind} data.",
        )
