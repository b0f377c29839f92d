"""Targets from the model's own distribution, drawn or all of them, for the Fisher proper (docs/method.md §2)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from woodfisher.errors import UnknownDistributionError
from woodfisher.gradients.losses import IGNORED, KnownLoss, name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Weighted = Iterator[tuple[Tensor, Tensor]]

MOST_TARGETS = 100
"""Targets of a sample beyond which the Fisher is taken over drawn ones instead of all of them."""


def target_sampler(loss: Callable[[Any, Any], Tensor] | None) -> Callable[[Any, Any], Tensor]:
    """How to draw targets for a loss that is a negative log-likelihood.

    The returned function takes outputs and the data's targets, of which those that the loss ignores stay as they are.
    Softmax losses draw a class, the logistic loss draws 0 or 1, the squared error (as torch takes its mean
    over the outputs of a sample, or sums) draws from the normal distribution that it is the likelihood of. For any
    other loss the returned function raises; so it does with `label_smoothing`, `pos_weight` or `weight`, which make no
    likelihoods.
    """
    if loss is None:
        return _model_classes
    known = _known(loss)
    if known is not None:
        return known[0]

    def unknown(outputs: Any, targets: Any) -> Tensor:
        raise _unknown(name_of(loss))

    return unknown


def _unknown(loss: str) -> UnknownDistributionError:
    return UnknownDistributionError(
        'labels="model" has to draw targets from the model\'s distribution, which is not known for the loss '
        f"{loss}: pass sampler=, a function of the outputs."
    )


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
) -> tuple[Callable[[Any, Any], Tensor], Callable[[Any], Weighted]] | None:
    known = KnownLoss.of(loss)
    if known is None or not known.is_likelihood:
        return None
    sums = known.reduction == "sum"
    if known.function is F.mse_loss:
        variance = 0.5 if sums else None
        return partial(_normal, variance=variance), partial(_every_normal, variance=variance)
    if known.function is F.binary_cross_entropy_with_logits:
        terms = 1 if sums else None
        return partial(_binary, terms=terms), partial(_every_binary, terms=terms)
    draw = _classes if known.function is F.cross_entropy else _labels
    every = partial(_every_class, ignored=known.ignored)
    return partial(draw, ignored=known.ignored, reduction=known.reduction), every


def _every_class(outputs: Tensor, ignored: int = IGNORED) -> Weighted:
    if outputs.ndim != 2 or outputs.shape[1] > MOST_TARGETS:
        return
    _check_ignored(outputs, ignored)
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


def _every_binary(outputs: Tensor, terms: int | None) -> Weighted:
    p = outputs.sigmoid()
    yield from _every_coordinate(p, (p * (1 - p) * (terms or outputs[0].numel())).sqrt())


def _every_normal(outputs: Tensor, variance: float | None) -> Weighted:
    yield from _every_coordinate(outputs, outputs.new_tensor((variance or _variance(outputs)) ** 0.5))


def _drawn(outputs: Tensor) -> Tensor:
    """Draw from softmax over dimension 1 (log-probabilities are logits too): `(n, C, …)` → `(n, …)`."""
    probabilities = outputs.movedim(1, -1).float().softmax(-1)
    return torch.multinomial(probabilities.flatten(0, -2), 1).reshape(probabilities.shape[:-1])


def _labels(outputs: Tensor, targets: Any, *, ignored: int = IGNORED, reduction: str = "mean") -> Tensor:
    """A class for each sample; the sum over several positions of one is a likelihood, and their mean is not."""
    if outputs.ndim > 2 and reduction != "sum":
        raise _unknown("nll_loss as a mean over several positions")
    _check_ignored(outputs, ignored)
    return kept_ignored(_drawn(outputs), targets, ignored)


def _check_ignored(outputs: Tensor, ignored: int) -> None:
    """Raise where the model's distribution over classes `(n, C, …)` has one that the loss ignores."""
    if 0 <= ignored < outputs.shape[1]:
        raise _unknown(f"cross_entropy with ignore_index={ignored}, one of the classes")


def kept_ignored(drawn: Tensor, targets: Any, ignored: int = IGNORED) -> Tensor:
    """Drawn labels, with those of `targets` that a loss leaves out."""
    return torch.where(_left_out(drawn, targets, ignored), ignored, drawn)


def _left_out(drawn: Tensor, targets: Any, ignored: int) -> Tensor:
    if isinstance(targets, Tensor) and targets.shape == drawn.shape and not targets.is_floating_point():
        return targets == ignored
    return torch.zeros_like(drawn, dtype=torch.bool)


def _classes(outputs: Tensor, targets: Any, *, ignored: int, reduction: str) -> Tensor:
    """Labels, or where a sample has several positions, targets in the form of probabilities `(n, C, …)`.

    The mean over L positions has an Lth of their gradient, and its Fisher an Lth of its Gauss-Newton matrix. Targets √L
    times as far from the model's probabilities make up for that, as ∇ℓ is linear in them; it is zero at those
    themselves, which positions get that the loss ignores.
    """
    if outputs.ndim == 2 or reduction == "sum":
        return _labels(outputs, targets, ignored=ignored, reduction=reduction)
    if ignored >= 0:  # with which torch takes no probabilities
        raise _unknown(f"cross_entropy with ignore_index={ignored} over several positions")
    labels, p = _drawn(outputs), outputs.softmax(1)
    counted = ~_left_out(labels, targets, ignored)
    positions = torch.full((len(labels),), labels[0].numel(), device=labels.device)
    terms = counted.flatten(1).sum(1).clamp_min(1) if reduction == "mean" else positions
    stretch = positions / terms.sqrt()
    far = F.one_hot(labels, outputs.shape[1]).movedim(-1, 1) - p
    return p + far * (counted * stretch.reshape(-1, *[1] * (labels.ndim - 1)))[:, None].to(p)


def _binary(outputs: Tensor, targets: Any, terms: int | None) -> Tensor:
    """0 or 1 for one output a sample.

    A mean over K terms has a Kth of their gradient, and its Fisher a Kth of its Gauss-Newton matrix. Targets √K times
    as far from their mean make up for that, as ∇ℓ is linear in them.
    """
    p = outputs.sigmoid()
    return p + (terms or outputs[0].numel()) ** 0.5 * (torch.bernoulli(p) - p)


def _normal(outputs: Tensor, targets: Any, variance: float | None) -> Tensor:
    return outputs + (variance or _variance(outputs)) ** 0.5 * torch.randn_like(outputs)


def _variance(outputs: Tensor) -> float:
    """Of the normal distribution whose negative log-likelihood is the mean square over a sample's outputs."""
    return outputs[0].numel() / 2


def _model_classes(outputs: Any, targets: Any) -> Tensor:
    return _labels(_logits(outputs), targets)


def _logits(outputs: Any) -> Tensor:
    logits = outputs["logits"] if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UnknownDistributionError(
            'labels="model" can draw classes for a model that returns .logits of shape (samples, classes); '
            "pass sampler=, a function of the model's outputs, for any other."
        )
    return logits
