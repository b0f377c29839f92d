"""Drawing targets from the model's own distribution, for the Fisher proper (docs/method.md §2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from woodfisher.errors import WoodfisherError

if TYPE_CHECKING:
    from collections.abc import Callable


def target_sampler(loss: Callable[[Any, Any], Tensor] | None) -> Callable[[Any], Tensor]:
    """How to draw targets for a loss that is a negative log-likelihood.

    Softmax losses draw a class, the logistic loss draws 0 or 1, the squared error (as torch takes its mean
    over the outputs of a sample) draws from the normal distribution that it is the likelihood of. For any
    other loss the returned function raises.
    """
    if loss is None:
        return _model_classes
    for kinds, sampler in _SAMPLERS:
        if any(loss is kind or (isinstance(kind, type) and isinstance(loss, kind)) for kind in kinds):
            return sampler

    def unknown(outputs: Any) -> Tensor:
        raise WoodfisherError(
            'labels="model" has to draw targets from the model\'s distribution, which is not known for the loss '
            f"{getattr(loss, '__name__', type(loss).__name__)}: pass sampler=, a function of the outputs."
        )

    return unknown


def _classes(outputs: Tensor) -> Tensor:
    """Draw from softmax over dimension 1 (log-probabilities are logits too): `(n, C, …)` → `(n, …)`."""
    probabilities = outputs.movedim(1, -1).float().softmax(-1)
    return torch.multinomial(probabilities.flatten(0, -2), 1).reshape(probabilities.shape[:-1])


def _binary(outputs: Tensor) -> Tensor:
    return torch.bernoulli(outputs.sigmoid())


def _normal(outputs: Tensor) -> Tensor:
    variance = outputs[0].numel() / 2
    return outputs + variance**0.5 * torch.randn_like(outputs)


def _model_classes(outputs: Any) -> Tensor:
    logits = outputs["logits"] if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise WoodfisherError(
            'labels="model" can draw classes for a model that returns .logits of shape (samples, classes); '
            "pass sampler=, a function of the model's outputs, for any other."
        )
    return _classes(logits)


_SAMPLERS: list[tuple[tuple[Any, ...], Callable[[Any], Tensor]]] = [
    ((F.cross_entropy, F.nll_loss, nn.CrossEntropyLoss, nn.NLLLoss), _classes),
    ((F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss), _binary),
    ((F.mse_loss, nn.MSELoss), _normal),
]
