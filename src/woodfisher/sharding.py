"""Models that `fully_shard` (FSDP2) has spread over processes: a plain copy to compute on, and back into shards.

Whatever gathers weights is a collective: all processes that hold shards call it together. Nothing here imports
what shards models, which takes seconds, unless a model is sharded.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from woodfisher.errors import WoodfisherError

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
    reshard(model)
    sharded = bool(_sharded_modules(model))
    for name, p in model.named_parameters():
        if is_shard(p) and (not sharded or sum(how.is_shard() for how in cast("DTensor", p).placements) > 1):
            raise WoodfisherError(
                f"{name!r} is split over processes in another way than that of fully_shard, as for tensor parallelism: "
                "gather the weights into a plain copy of the model with get_model_state_dict, prune that, and write "
                "them back with set_model_state_dict."
            )
    return sharded


def reshard(model: nn.Module) -> None:
    """Have the parameters of a sharded model be its shards, as they are not after some forward passes."""
    for module in _sharded_modules(model):
        module.reshard()


def plain_copy(model: nn.Module) -> nn.Module:
    """A model of whole weights in every process, which shares its buffers with the sharded one."""
    sharded = _sharded_modules(model)
    states = [module._get_fsdp_state() for module in sharded]
    memo: dict[int, object] = {id(each): each for each in (*model.buffers(), *states)}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(whole(p), requires_grad=p.requires_grad)
    classes = [type(module) for module in sharded]
    try:
        for module, cls in zip(sharded, classes, strict=True):
            module.__class__ = cls.__mro__[getattr(cls, "_orig_cls_mro_index", 2)]
        plain = copy.deepcopy(model, memo)
    finally:
        for module, cls in zip(sharded, classes, strict=True):
            module.__class__ = cls
    for layer in plain.modules():
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) in states]:
                del hooks[key]
    return plain


def refresh(plain: nn.Module, model: nn.Module) -> None:
    """Bring a plain copy to the weights that the sharded model has now."""
    reshard(model)
    with torch.no_grad():
        for own, shards in zip(plain.parameters(), model.parameters(), strict=True):
            own.copy_(whole(shards))


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
