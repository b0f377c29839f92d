"""Models that `fully_shard` (FSDP2) has spread over processes: a plain copy to compute on, and back into shards.

Whatever gathers weights is a collective: all processes that hold shards call it together. Nothing here imports
what shards models, which takes seconds, unless a model is sharded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from woodfisher.distributed import Group, in_a_group
from woodfisher.errors import WoodfisherError
from woodfisher.gradients.isolation import copied

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was called on the model or a part of it; raises where weights are spread otherwise."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise WoodfisherError(
            "FullyShardedDataParallel flattens the weights of whole modules, so that they can't be pruned: shard the "
            "model with torch.distributed.fsdp.fully_shard."
        )
    wrapped = _sharded_modules(model)
    inside = {id(module) for each in wrapped for module in cast("nn.Module", each).modules()}
    if any(id(m) not in inside and getattr(m, "_is_fsdp_managed_module", False) for m in model.modules()):
        raise WoodfisherError(
            "this is a part of a model that fully_shard has spread over processes as one: give the module that it was "
            "called on, and choose the part by params=."
        )
    if wrapped and torch.__version__ < "2.7":
        raise WoodfisherError(
            "models that fully_shard has spread over processes are pruned from torch 2.7 on; this is "
            f"{torch.__version__}."
        )
    reshard(model)
    for name, p in model.named_parameters():
        if not is_shard(p):
            continue
        apart = sum(not how.is_replicate() for how in cast("DTensor", p).placements)
        if not wrapped or apart > 1:
            raise WoodfisherError(
                f"{name!r} is a DTensor in another way than that of fully_shard, as for tensor parallelism: gather the "
                "weights into a plain copy of the model with get_model_state_dict, prune that, and write them back "
                "with set_model_state_dict."
            )
    return bool(wrapped)


def reshard(model: nn.Module) -> None:
    """Have the parameters of a sharded model be its shards, as they are not after some forward passes."""
    for module in _sharded_modules(model):
        module.reshard()


def plain_copy(model: nn.Module) -> nn.Module:
    """A model of whole weights in every process, which shares its buffers with the sharded one."""
    _meet()
    reshard(model)
    sharded = _sharded_modules(model)
    states = [module._get_fsdp_state() for module in sharded]
    instead: dict[int, object] = {id(each): each for each in (*model.buffers(), *states)}
    for p in model.parameters():
        instead[id(p)] = nn.Parameter(whole(p), requires_grad=p.requires_grad)
    classes = [type(module) for module in sharded]
    try:
        for module, cls in zip(sharded, classes, strict=True):
            module.__class__ = cls.__mro__[getattr(cls, "_orig_cls_mro_index", 2)]
        plain = copied(model, instead)
    finally:
        for module, cls in zip(sharded, classes, strict=True):
            module.__class__ = cls
    for layer in plain.modules():
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [key for key, hook in hooks.items() if _owner(hook) in states]:
                del hooks[key]
        for name in [name for name in vars(layer) if name.startswith(_MARKS)]:
            del vars(layer)[name]
    return plain


_MARKS = ("__composable_api_state_key", "_is_fsdp", "_fsdp")
"""Beginnings of the attributes by which torch knows what is sharded."""


def _owner(hook: object) -> object:
    """What a hook is a method of, also where another function is wrapped around it."""
    while not hasattr(hook, "__self__") and hasattr(hook, "__wrapped__"):
        hook = hook.__wrapped__
    return getattr(hook, "__self__", None)


def _meet() -> None:
    """See that all processes are here: one that failed would break the others in a collective of torch's own."""
    if in_a_group():
        Group().gather("shards")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may have a shard, detached."""
    return cast("DTensor", tensor.detach()).full_tensor() if is_shard(tensor) else tensor.detach()


def own_part(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What of a whole tensor belongs to this process's shard of `parameter`: all of it, where that is plain."""
    if not is_shard(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    like = cast("DTensor", parameter)
    return local(distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None))


def local(tensor: Tensor) -> Tensor:
    """The memory of this process's shard, to be changed in place; a plain tensor itself."""
    return cast("DTensor", tensor).to_local() if is_shard(tensor) else tensor


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [cast("FSDPModule", module) for module in model.modules() if hasattr(module, "_get_fsdp_state")]
