"""What a task is: everything that pruning a model and judging the result needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from woodfisher.checks import described, metric_value
from woodfisher.errors import WoodfisherError, told
from woodfisher.gradients.isolation import same_flags
from woodfisher.gradients.losses import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Top-1 accuracy in per cent, in evaluation mode; the model's training flags are left as they were.

    Parameters
    ----------
    model:
        It takes a tensor (or what else can be put on a device) and returns scores `(N, …, classes)`.
    batches:
        Pairs of inputs and classes `(N, …)`; those that are −100 don't count, as in torch's losses.
    """
    device = next(model.parameters()).device
    correct = total = 0
    with same_flags(model), torch.no_grad():
        model.eval()
        for inputs, targets in batches:
            if not hasattr(inputs, "to"):
                raise _unknown(f"inputs {described(inputs)}")
            scores = model(inputs.to(device))
            if not _are_classes(targets, scores):
                raise _unknown(f"outputs {described(scores)} and targets {described(targets)}")
            classes = targets.to(device).long()  # bytes have no −100, and 156 would be taken for it
            counted = classes != IGNORED
            correct += int((scores.argmax(dim=-1) == classes)[counted].sum())
            total += int(counted.sum())
    if not total:
        raise WoodfisherError(
            "the accuracy of no samples was asked for: the data is empty, can be read only once, or has no target that "
            "counts. Give a list of batches or a DataLoader."
        )
    return 100.0 * correct / total


def _are_classes(targets: Any, scores: Any) -> bool:
    """Whether there is a whole number for each vector of scores."""
    both = isinstance(scores, Tensor) and isinstance(targets, Tensor)
    if not both or not scores.ndim or scores.shape[:-1] != targets.shape:
        return False
    return not targets.is_floating_point() or torch.equal(targets, targets.round())


def _unknown(what: str) -> WoodfisherError:
    return WoodfisherError(
        "accuracy is for a model that takes a tensor and returns scores (N, …, classes), and for targets that are "
        f"classes (N, …); {what} came. Give the task a metric of its own."
    )


@dataclass(frozen=True)
class Task:
    """A trained model with the data, loss and metric that belong to it.

    Attributes
    ----------
    name:
        What messages call it.
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
        How tables name the metric: by default "accuracy, %" for `accuracy`, and a function of another name by that.
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
    metric_name: str = ""
    augment: Callable[[Any], Any] | None = None
    earlier: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise WoodfisherError(
                f"the model of the task {self.name} must be a torch.nn.Module; a {type(self.model).__name__} came."
            )

        if not self.metric_name:
            named = "accuracy, %" if self.metric is accuracy else getattr(self.metric, "__name__", "metric")
            object.__setattr__(self, "metric_name", named)

    def evaluate(self, model: nn.Module) -> float:
        """Metric of `model` on the test data; raises unless it is a finite number."""
        return self._measured(model, self.test, "test")

    def validate(self, model: nn.Module) -> float:
        """Metric of `model` on the validation data; raises unless it is a finite number."""
        return self._measured(model, self.validation, "validation")

    def _measured(self, model: nn.Module, batches: Iterable[Any], kind: str) -> float:
        if batches is None:
            raise WoodfisherError(
                f"the task {self.name} has no {kind} data, which its metric is to be measured on."
            )
        try:
            with same_flags(model):
                value: object = self.metric(model, batches)
        except WoodfisherError:
            raise
        except Exception as error:
            raise WoodfisherError(
                f"the metric of the task {self.name} fails on the {kind} data: {told(error)}"
            ) from error
        return metric_value(
            value,
            f"the metric of the task {self.name} must be a finite float; {value!r} came on the {kind} data.",
        )
