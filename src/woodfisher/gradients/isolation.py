"""Running a model without leaving a trace, in it or in torch."""

from __future__ import annotations

import copy
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from woodfisher.errors import WoodfisherError
from woodfisher.gradients.randomness import random_state, set_random_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

T = TypeVar("T")

_entered: WeakKeyDictionary[nn.Module, list[object]] = WeakKeyDictionary()


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and autocast off; afterwards the model's state and all random generators are as before.

    Training flags and whatever a module keeps on itself (caches, counters) come back by restoring each
    module's attributes, and which parameters, buffers and modules it has; the chosen weights and the buffers are safe
    because callers run the model on copies of them. What a forward pass changes in place in other tensors, lists or
    dicts stays changed. The generators are those of Python, of NumPy, and of torch on the CPU and on every CUDA
    device in use.

    An error may leave a generator suspended in here that ends after what it was called in: it has nothing to
    bring back any more.
    """
    restore = _restoring(model)
    devices = {p.device for p in model.parameters()}
    numbers = random_state(devices)
    entered, own = _entered.setdefault(model, []), object()
    entered.append(own)
    try:
        with ExitStack() as off:
            for kind in {device.type for device in devices}:
                off.enter_context(torch.autocast(kind, enabled=False))
            model.eval()
            yield
    finally:
        if own in entered:
            del entered[entered.index(own) :]
            restore()
            set_random_state(numbers)


def in_turns(model: nn.Module, parts: Iterator[T]) -> Iterator[T]:
    """What an iterator makes, where it runs `isolated` for each part of its own, and whoever takes the parts does not.

    In between, modes and random numbers are those of the taker; the next part goes on from the random numbers that the
    one before left.
    """
    devices = {p.device for p in model.parameters()}
    numbers = random_state(devices)
    while True:
        with isolated(model):
            set_random_state(numbers)
            part = next(parts, None)
            numbers = random_state(devices)
        if part is None:
            return
        yield part


def _restoring(model: nn.Module) -> Callable[[], None]:
    """What brings back every module's attributes as they are now, and its parameters, buffers and modules."""
    attributes = {module: dict(vars(module)) for module in model.modules()}
    registered: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (registry, dict(registry))
        for module in model.modules()
        for registry in (module._parameters, module._buffers, module._modules)
    ]

    def restore() -> None:
        for module, before in attributes.items():
            vars(module).clear()
            vars(module).update(before)
        for registry, members in registered:
            registry.clear()
            registry.update(members)

    return restore


def without_traces(loss: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """The loss on copies of targets; a module is in evaluation mode, and forgets what it keeps of a call."""

    def called(outputs: Any, targets: Any) -> Tensor:
        targets = tree_map_only(Tensor, torch.clone, targets)
        if not isinstance(loss, nn.Module):
            return loss(outputs, targets)
        restore = _restoring(loss)
        try:
            for module in loss.eval().modules():
                module._buffers.update(
                    {name: b.clone() for name, b in module._buffers.items() if b is not None}
                )
            return cast("Tensor", loss(outputs, targets))
        finally:
            restore()

    return called


def copied(model: nn.Module, instead: Mapping[int, Any] | None = None) -> nn.Module:
    """A copy of a model, also of one whose weights are made of others before each forward pass.

    What has its `id` in `instead` is not copied, and becomes what stands there.
    """
    made = [
        value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)
    ]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in made if not value.is_leaf}
    memo |= instead or {}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise WoodfisherError(f"the model can't be copied: {type(error).__name__}: {error}") from error


def adopt_buffers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make room for the buffers of a state that a model registered, or made larger, as it ran."""
    there = {name: tensor.shape for name, tensor in model.state_dict().items()}
    device = next(model.parameters()).device
    for name in [name for name, tensor in state.items() if there.get(name) != tensor.shape]:
        module, _, own = name.rpartition(".")
        model.get_submodule(module)._buffers[own] = torch.empty_like(state[name], device=device)


@contextmanager
def same_flags(model: nn.Module) -> Iterator[None]:
    """Bring back which modules are in training mode."""
    flags = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Without what models of transformers return for a next call, by default, and can't be traced with."""
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Without torch's own kernel for a whole encoder layer, in whose place its parts run."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads inside the block; None leaves it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
