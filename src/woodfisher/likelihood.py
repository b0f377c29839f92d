"""Targets from the model's own distribution, drawn or all of them, for the Fisher proper (docs/method.md §2)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from woodfisher.errors import UnknownDistributionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Weighted = Iterator[tuple[Tensor, Tensor]]

MOST_TARGETS = 100
"""Targets of a sample beyond which the Fisher is taken over drawn ones instead of all of them."""


def target_sampler(loss: Callable[[Any, Any], Tensor] | None) -> Callable[[Any], Tensor]:
    """How to draw targets for a loss that is a negative log-likelihood.

    Softmax losses draw a class, the logistic loss draws 0 or 1, the squared error (as torch takes its mean
    over the outputs of a sample, or sums) draws from the normal distribution that it is the likelihood of. For any
    other loss the returned function raises; so it does with `label_smoothing`, `pos_weight` or the logistic loss's
    `weight`, which make no likelihoods.
    """
    if loss is None:
        return _model_classes
    known = _known(loss)
    if known is not None:
        return known[0]

    def unknown(outputs: Any) -> Tensor:
        raise UnknownDistributionError(
            'labels="model" has to draw targets from the model\'s distribution, which is not known for the loss '
            f"{getattr(loss, '__name__', type(loss).__name__)}: pass sampler=, a function of the outputs."
        )

    return unknown


def every_target(loss: Callable[[Any, Any], Tensor] | None) -> Callable[[Any], Weighted] | None:
    """A few weighted targets that stand for all that a model may draw: the Fisher without sampling noise.

    The returned function yields pairs of weights `(n,)` and targets for the `n` samples of `outputs`, such that the
    weighted sum of ∇ℓ∇ℓᵀ over the targets is its expectation over the distribution that `target_sampler` draws from:
    every class with its probability, or one deviation a coordinate for independent coordinates. None where the loss
    is not known; nothing is yielded for outputs that would take more than `MOST_TARGETS`, or have a class at each of
    many positions.
    """
    if loss is None:
        return lambda outputs: _every_class(_logits(outputs))
    known = _known(loss)
    return None if known is None else known[1]


def _known(
    loss: Callable[[Any, Any], Tensor],
) -> tuple[Callable[[Any], Tensor], Callable[[Any], Weighted]] | None:
    if isinstance(loss, nn.MSELoss) and loss.reduction == "sum":
        return partial(_normal, variance=0.5), partial(_every_normal, variance=0.5)
    if isinstance(loss, nn.CrossEntropyLoss) and loss.label_smoothing:
        return None
    if isinstance(loss, nn.BCEWithLogitsLoss):
        if loss.pos_weight is not None or loss.weight is not None:
            return None
        if loss.reduction == "sum":
            return partial(_binary, terms=1), partial(_every_binary, terms=1)
    for kinds, draw, every in _DISTRIBUTIONS:
        if any(loss is kind or (isinstance(kind, type) and isinstance(loss, kind)) for kind in kinds):
            return draw, every
    return None


def _every_class(outputs: Tensor) -> Weighted:
    if outputs.ndim != 2 or outputs.shape[1] > MOST_TARGETS:
        return
    probabilities = outputs.softmax(-1)
    for label in range(outputs.shape[1]):
        yield probabilities[:, label], torch.full((len(outputs),), label, device=outputs.device)


def _every_coordinate(centre: Tensor, deviation: Tensor) -> Weighted:
    """One target a coordinate, a standard deviation off the centre: their ∇ℓ is linear in the target."""
    size = centre[0].numel()
    if size > MOST_TARGETS:
        return
    for step in torch.eye(size, dtype=centre.dtype, device=centre.device):
        yield centre.new_ones(len(centre)), centre + deviation * step.reshape(centre[0].shape)


def _every_binary(outputs: Tensor, terms: int | None = None) -> Weighted:
    p = outputs.sigmoid()
    yield from _every_coordinate(p, (p * (1 - p) * (terms or outputs[0].numel())).sqrt())


def _every_normal(outputs: Tensor, variance: float | None = None) -> Weighted:
    yield from _every_coordinate(outputs, outputs.new_tensor((variance or _variance(outputs)) ** 0.5))


def _classes(outputs: Tensor) -> Tensor:
    """Draw from softmax over dimension 1 (log-probabilities are logits too): `(n, C, …)` → `(n, …)`."""
    probabilities = outputs.movedim(1, -1).float().softmax(-1)
    return torch.multinomial(probabilities.flatten(0, -2), 1).reshape(probabilities.shape[:-1])


def _binary(outputs: Tensor, terms: int | None = None) -> Tensor:
    """0 or 1 for one output a sample.

    A mean over K terms has a Kth of their gradient, and its Fisher a Kth of its Gauss-Newton matrix. Targets √K times
    as far from their mean make up for that, as ∇ℓ is linear in them.
    """
    p = outputs.sigmoid()
    return p + (terms or outputs[0].numel()) ** 0.5 * (torch.bernoulli(p) - p)


def _normal(outputs: Tensor, variance: float | None = None) -> Tensor:
    return outputs + (variance or _variance(outputs)) ** 0.5 * torch.randn_like(outputs)


def _variance(outputs: Tensor) -> float:
    """Of the normal distribution whose negative log-likelihood is the mean square over a sample's outputs."""
    return outputs[0].numel() / 2


def _model_classes(outputs: Any) -> Tensor:
    return _classes(_logits(outputs))


def _logits(outputs: Any) -> Tensor:
    logits = outputs["logits"] if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UnknownDistributionError(
            'labels="model" can draw classes for a model that returns .logits of shape (samples, classes); '
            "pass sampler=, a function of the model's outputs, for any other."
        )
    return logits


_DISTRIBUTIONS: list[tuple[tuple[Any, ...], Callable[[Any], Tensor], Callable[[Any], Weighted]]] = [
    ((F.cross_entropy, F.nll_loss, nn.CrossEntropyLoss, nn.NLLLoss), _classes, _every_class),
    ((F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss), _binary, _every_binary),
    ((F.mse_loss, nn.MSELoss), _normal, _every_normal),
]
