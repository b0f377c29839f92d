"""What is known of a loss: which one of torch it is, in whatever form, and with which options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

IGNORED = -100
"""The label that torch's losses of classes leave out of their mean, unless they are told another one."""

OF_CLASSES = (F.cross_entropy, F.nll_loss)
OF_ENTRIES = (F.mse_loss, F.binary_cross_entropy_with_logits)

_MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
    nn.MSELoss: F.mse_loss,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
}
_OPTIONS = ("weight", "pos_weight", "ignore_index", "label_smoothing", "reduction")


def name_of(loss: object) -> str:
    """How a message calls a loss: by the function's name, also where some of its arguments are set."""
    if isinstance(loss, partial):
        return name_of(loss.func)
    return str(getattr(loss, "__name__", type(loss).__name__))


@dataclass(frozen=True)
class KnownLoss:
    """A loss of torch, given as the function, as a `functools.partial` of it, or as the module.

    Attributes
    ----------
    function:
        One of `OF_CLASSES` or `OF_ENTRIES`.
    options:
        What it is called with beside outputs and targets.
    extended:
        Whether it is a module with a forward pass of its own, which may do more.
    """

    function: Callable[..., Any]
    options: Mapping[str, Any]
    extended: bool = False

    @classmethod
    def of(cls, loss: object) -> KnownLoss | None:
        """What is known of `loss`; None where nothing is."""
        if isinstance(loss, partial):
            inner = cls.of(loss.func)
            if inner is None or loss.args or not loss.keywords.keys() <= set(_OPTIONS):
                return None
            return replace(inner, options={**inner.options, **loss.keywords})
        if loss in (*OF_CLASSES, *OF_ENTRIES):
            return cls(loss, {})
        for kind, function in _MODULES.items():
            if isinstance(loss, kind):
                options = {name: getattr(loss, name) for name in _OPTIONS if hasattr(loss, name)}
                return cls(function, options, extended=type(loss).forward is not kind.forward)
        return None

    @property
    def reduction(self) -> str:
        """How terms become one number: `mean`, `sum`, or `none` where they stay."""
        return str(self.options.get("reduction", "mean"))

    @property
    def ignored(self) -> int:
        """The label that it leaves out."""
        return int(self.options.get("ignore_index", IGNORED))

    @property
    def ignores(self) -> bool:
        """Whether its mean is over the labels alone that it does not leave out."""
        return self.function in OF_CLASSES and self.reduction == "mean"

    @property
    def weighs(self) -> bool:
        """Whether it has weights for classes or entries."""
        return any(self.options.get(name) is not None for name in ("weight", "pos_weight"))

    @property
    def cancels_weights(self) -> bool:
        """Whether it divides by the class weights of the samples that it averages."""
        return self.ignores and self.weighs

    @property
    def is_likelihood(self) -> bool:
        """Whether it is a negative log-likelihood, as far as its options say."""
        return not self.weighs and not self.options.get("label_smoothing")

    @property
    def averages(self) -> bool:
        """Whether it is the plain mean of its terms, but for labels that it leaves out."""
        plain = {"ignore_index", "label_smoothing", "reduction"}
        named = {name for name, value in self.options.items() if value is not None}
        return not self.extended and self.reduction != "sum" and named <= plain

    def terms(self, outputs: Any, targets: Any) -> Any:
        """Its terms, one for each entry of the outputs, or for each label."""
        return self.function(outputs, targets, **{**self.options, "reduction": "none"})
