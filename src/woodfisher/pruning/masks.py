"""Keeping removed weights removed, whatever trains the rest."""

from __future__ import annotations

import weakref
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from woodfisher.errors import WoodfisherError
from woodfisher.gradients.parameters import unwrapped
from woodfisher.gradients.sharding import is_shard, local, own_part, reshard

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle


class Masks:
    """Masks on parameters of a model that is being trained.

    A removed weight gets no gradient (so that the norm that gradients are clipped by counts kept weights only),
    and after every step of an optimizer that has the parameter, it and its entries in the optimizer's state are
    exactly zero. Optimizers are found as they step; none has to be named. Masks follow parameters to other devices
    and dtypes. Copies of the model (deepcopy, moving averages, files) hold plain tensors: `apply` zeroes theirs.

    Parameters
    ----------
    parameters:
        Name → parameter. One that is frozen now may be trained later.
    kept:
        Name → bool of the parameter's shape, False where removed; it is copied.

    Attributes
    ----------
    parameters:
        As they came.
    trained_elsewhere:
        Whether no optimizer has trained the parameters so far, while one has trained others of the same shapes.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
        self.parameters = dict(parameters)
        taken = {id(p) for other in _held for p in other.parameters.values()}
        for name, parameter in self.parameters.items():
            if id(parameter) in taken:
                raise WoodfisherError(
                    f"another pruner holds masks on {name!r}: one model takes one pruner. Call release() on the "
                    "first, or let it go."
                )
        self._removed = {
            name: (~kept[name]).to(parameter.device) for name, parameter in self.parameters.items()
        }
        self._parts = {name: own_part(self._removed[name], p) for name, p in self.parameters.items()}
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._idle = self.trained_elsewhere = False
        handles = [_hooked(parameter, self._parts, name) for name, parameter in self.parameters.items()]
        self._release = weakref.finalize(self, _remove, handles)
        _watch_optimizers()
        _held.add(self)
        self.enforce()

    @property
    def kept(self) -> dict[str, Tensor]:
        """Name → bool of the parameter's shape, False where removed."""
        self._follow(self.parameters)
        return {name: ~removed for name, removed in self._removed.items()}

    @property
    def released(self) -> bool:
        """Whether `release` was called."""
        return not self._release.alive

    def set(self, kept: Mapping[str, Tensor]) -> None:
        """Take other masks, and put them into force."""
        for name, removed in self._removed.items():
            removed.copy_(~kept[name])
            self._parts[name] = own_part(removed, self.parameters[name])
        self.enforce()

    def remove(self, kept: Mapping[str, Tensor]) -> None:
        """As `set`, for fewer weights than there were."""
        if any(not torch.equal(removed, ~kept[name]) for name, removed in self._removed.items()):
            for optimizer in self._optimizers:
                if isinstance(optimizer, torch.optim.LBFGS):
                    # Its memory is of flat vectors, and of the curvature with the weights that were there.
                    optimizer.state.clear()
        self.set(kept)

    def enforce(self) -> None:
        """Zero removed weights, their gradients and their entries in the state of every optimizer seen so far."""
        self._follow(self.parameters)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                local(parameter).masked_fill_(self._parts[name], 0)
                if parameter.grad is not None:
                    local(parameter.grad).masked_fill_(self._parts[name], 0)
            for optimizer in self._optimizers:
                self._enforce_state(optimizer, self.parameters)

    def apply(self, model: nn.Module) -> None:
        """Zero the removed weights of a copy of the model, such as a moving average of it."""
        if not isinstance(model, nn.Module):
            raise WoodfisherError(
                f"masks are applied to a model, and a {type(model).__name__} came: load its weights into one, or zero "
                "them by `masks`."
            )
        model = unwrapped(model)
        reshard(model)
        parameters = dict(model.named_parameters())
        for name, removed in self._removed.items():
            if name not in parameters or parameters[name].shape != removed.shape:
                raise WoodfisherError(
                    f"this model has no parameter {name!r} of shape {tuple(removed.shape)}: give a copy of the one "
                    "that is pruned."
                )
        with torch.no_grad():
            for name, removed in self._removed.items():
                part = own_part(removed.to(parameters[name].device), parameters[name])
                local(parameters[name]).masked_fill_(part, 0)

    def check(self, model: nn.Module) -> None:
        """Raise if the model has other parameters by now, or is trained by an optimizer that has others."""
        if any(map(is_shard, self.parameters.values())):
            reshard(model)
        now = dict(model.named_parameters())
        for name, parameter in self.parameters.items():
            if now.get(name) is not parameter or parameter.shape != self._removed[name].shape:
                raise WoodfisherError(
                    f"the model's parameter {name!r} is another tensor than when the pruner was made, as after "
                    "load_state_dict(assign=True), a replaced layer, resized embeddings, a parametrization or "
                    "sharding: make the objective, the pruner and the optimizer from the model as it is now."
                )
        if self._idle and not self._optimizers:
            raise WoodfisherError(
                "the optimizer has parameters of the pruned ones' shapes, but not these, and they get no gradient: "
                "it was built before the model was moved, copied or loaded, and trains nothing. Build it from "
                "model.parameters() afterwards."
            )

    def release(self) -> None:
        """Let go: weights that are zero now may come back."""
        self._release()
        _held.discard(self)

    def _after_step(self, optimizer: Optimizer) -> None:
        """Called after every step of any optimizer."""
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        names = [name for p in trained if (name := self._names.get(id(p))) is not None]
        if names:
            self._optimizers.add(optimizer)
            self.trained_elsewhere = False
            self._follow(names)
            with torch.no_grad():
                for name in names:
                    local(self.parameters[name]).masked_fill_(self._parts[name], 0)
                self._enforce_state(optimizer, names)
        elif not self._optimizers and {p.shape for p in self.parameters.values()} <= {
            p.shape for p in trained
        }:
            moving = any(p.grad is not None and bool(p.grad.any()) for p in trained)
            self._idle |= not moving
            self.trained_elsewhere |= moving

    def _enforce_state(self, optimizer: Optimizer, names: Iterable[str]) -> None:
        for name in names:
            # A plain look-up would give each parameter a state, as `state` is a defaultdict.
            state = optimizer.state.get(self.parameters[name])
            for tensor in _alike(state, self.parameters[name]):
                local(tensor).masked_fill_(self._parts[name].to(tensor.device), 0)

    def _follow(self, names: Iterable[str]) -> None:
        """Take masks to the devices where the parameters are now."""
        for name in names:
            parameter, removed = self.parameters[name], self._removed[name]
            if removed.device != parameter.device:
                self._removed[name] = removed.to(parameter.device)
                self._parts[name] = own_part(self._removed[name], parameter)


def _alike(state: Any, parameter: Tensor) -> list[Tensor]:
    """The tensors in an optimizer's state that have a number for each weight.

    Codes of quantised states are left alone: zero is not the code of the number zero.
    """
    if isinstance(state, torch.Tensor):
        each = state.shape == parameter.shape and state.ndim > 0 and state.is_floating_point()
        return [state] if each else []
    if isinstance(state, dict):
        state = list(state.values())
    return [t for part in state for t in _alike(part, parameter)] if isinstance(state, (list, tuple)) else []


def _hooked(parameter: nn.Parameter, parts: Mapping[str, Tensor], name: str) -> RemovableHandle:
    """Have gradients be zero on `parts[name]`; hooks outlast freezing, but are refused while frozen.

    They keep the dict of masks alive, and not what holds it.
    """

    def zeroed(gradient: Tensor) -> Tensor:
        return gradient.masked_fill(parts[name].to(gradient.device), 0)

    def zero(shard: Tensor) -> None:
        if shard.grad is not None:
            gradient = local(shard.grad)
            gradient.masked_fill_(parts[name].to(gradient.device), 0)

    frozen = not parameter.requires_grad
    parameter.requires_grad_()
    handle: RemovableHandle = (
        parameter.register_post_accumulate_grad_hook(zero)  # the only hooks that fully_shard calls
        if is_shard(parameter)
        else parameter.register_hook(zeroed)
    )
    if frozen:
        parameter.requires_grad_(False)
    return handle


@cache
def _watch_optimizers() -> RemovableHandle:
    """Have every optimizer tell all masks in force of its steps, for as long as the process lives.

    A hook of each mask would be taken away when that is collected, which may be in the midst of some optimizer's step,
    as it goes through its hooks.
    """

    def tell(optimizer: Optimizer, *_details: Any) -> None:
        for masks in list(_held):
            masks._after_step(optimizer)

    return register_optimizer_step_post_hook(tell)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


_held: weakref.WeakSet[Masks] = weakref.WeakSet()
"""Masks in force, to see that no parameter gets two."""
