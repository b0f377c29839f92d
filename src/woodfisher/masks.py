"""Keeping removed weights removed, whatever trains the rest."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from woodfisher.errors import WoodfisherError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle


class Masks:
    """Masks on parameters of a model that is being trained.

    A removed weight gets no gradient (so that the norm that gradients are clipped by counts kept weights only),
    and after every step of an optimizer that has the parameter, it and its entries in the optimizer's state are
    exactly zero. Optimizers are found as they step; none has to be named. Copies of the model (deepcopy, moving
    averages, files) hold plain tensors: `apply` zeroes theirs.

    Parameters
    ----------
    parameters:
        Name → parameter.
    kept:
        Name → bool of the parameter's shape, False where removed; changed in place by `set`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
        self._parameters = dict(parameters)
        taken = {id(p) for other in _held for p in other._parameters.values()}
        for name, parameter in self._parameters.items():
            if id(parameter) in taken:
                raise WoodfisherError(
                    f"another pruner holds masks on {name!r}: one model takes one pruner. Call release() on the "
                    "first, or let it go."
                )
        self.removed = {
            name: (~kept[name]).to(parameter.device) for name, parameter in self._parameters.items()
        }
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._stranger = False
        handles = [
            parameter.register_hook(_without(self.removed[name]))
            for name, parameter in self._parameters.items()
            if parameter.requires_grad
        ]
        handles.append(register_optimizer_step_post_hook(_to(weakref.ref(self))))
        self._release = weakref.finalize(self, _remove, handles)
        _held.add(self)
        self.enforce()

    @property
    def kept(self) -> dict[str, Tensor]:
        """Name → bool of the parameter's shape, False where removed."""
        return {name: ~removed for name, removed in self.removed.items()}

    def set(self, kept: Mapping[str, Tensor]) -> None:
        """Take other masks, and put them into force."""
        for name, removed in self.removed.items():
            removed.copy_(~kept[name])
        self.enforce()

    def enforce(self) -> None:
        """Zero removed weights, their gradients and their entries in the state of every optimizer seen so far."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                for tensor in (parameter, parameter.grad):
                    if tensor is not None:
                        tensor.masked_fill_(self.removed[name], 0)
        for optimizer in self._optimizers:
            self._enforce_state(optimizer)

    def apply(self, model: nn.Module) -> None:
        """Zero the removed weights of a copy of the model, such as a moving average of it."""
        parameters = dict(model.named_parameters())
        for name, removed in self.removed.items():
            if name not in parameters or parameters[name].shape != removed.shape:
                raise WoodfisherError(
                    f"this model has no parameter {name!r} of shape {tuple(removed.shape)}: give a copy of the one "
                    "that is pruned (of an averaged model, its .module)."
                )
        with torch.no_grad():
            for name, removed in self.removed.items():
                parameters[name].masked_fill_(removed.to(parameters[name].device), 0)

    def check_optimizers(self) -> None:
        """Raise if what trains this model's weights can't be right."""
        if self._stranger and not self._optimizers:
            raise WoodfisherError(
                "an optimizer stepped that has parameters of the pruned ones' shapes, but not these: it was built "
                "before the model was moved, copied or loaded, and trains nothing. Build it from model.parameters() "
                "afterwards."
            )

    def release(self) -> None:
        """Let go: weights that are zero now may come back."""
        self._release()
        _held.discard(self)

    def _after_step(self, optimizer: Optimizer) -> None:
        """Called after every step of any optimizer."""
        if optimizer not in self._optimizers:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            if not any(id(p) in self._names for p in trained):
                shapes = {p.shape for p in trained}
                self._stranger |= all(p.shape in shapes for p in self._parameters.values())
                return
            self._optimizers.add(optimizer)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.masked_fill_(self.removed[name], 0)
        self._enforce_state(optimizer)

    def _enforce_state(self, optimizer: Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            name = self._names.get(id(parameter))
            if name is None or not isinstance(state, dict):
                continue
            for tensor in _alike(state, parameter):
                tensor.masked_fill_(self.removed[name], 0)


def _alike(state: Any, parameter: Tensor) -> list[Tensor]:
    """The tensors in an optimizer's state that have an entry for each weight."""
    if isinstance(state, torch.Tensor):
        return [state] if state.shape == parameter.shape and state.ndim else []
    if isinstance(state, dict):
        state = list(state.values())
    return [t for part in state for t in _alike(part, parameter)] if isinstance(state, (list, tuple)) else []


def _without(removed: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(removed, 0)


def _to(masks: weakref.ref[Masks]) -> Callable[..., None]:
    """A hook on all optimizers that doesn't keep the masks alive."""

    def after_step(optimizer: Optimizer, *_details: Any) -> None:
        alive = masks()
        if alive is not None:
            alive._after_step(optimizer)

    return after_step


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


_held: weakref.WeakSet[Masks] = weakref.WeakSet()
"""Masks in force, to see that no parameter gets two."""
