"""The one place where weights and buffers of a model are changed, after everything that can fail."""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

import torch

from woodfisher.errors import WoodfisherError
from woodfisher.gradients.batches import digest
from woodfisher.gradients.isolation import isolated
from woodfisher.gradients.overlap import check_apart, covers_itself
from woodfisher.gradients.parameters import full_name, unwrapped
from woodfisher.gradients.sharding import local, own_part, reshard, whole

if TYPE_CHECKING:
    from torch import Tensor, nn

    from woodfisher.gradients.objective import Objective


Digests = dict[str, set[bytes]]
"""Name of a parameter → digests of it in each floating-point type."""

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def write(objective: Objective, model: nn.Module | None, others: Digests | None = None) -> None:
    """Put the weights (removed ones exactly zero) and buffers of an objective into its model or another one like it.

    Parameters
    ----------
    others:
        What `digests` made of the parameters that are not chosen, where the objective's own model may have moved on.
    """
    model = objective.source if model is None else unwrapped(model)
    reshard(model)
    parameters = dict(model.named_parameters())
    _check_architecture(objective, parameters)
    buffers = _buffers_of(model, objective)
    if model is not objective.source or others is not None:
        _check_others(objective, parameters, others or {})
        check_apart(model, objective.layout.shapes)
    values = {
        name: torch.where(kept, value, 0).to(parameters[name].dtype)
        for (name, value), kept in zip(
            objective.layout.split(objective.weights).items(),
            objective.layout.split(objective.kept).values(),
            strict=True,
        )
    }
    for name, value in values.items():
        if not torch.isfinite(value).all():
            raise WoodfisherError(
                f"the new weights of {name!r} are not finite in {value.dtype}; the model is unchanged. "
                "Raise the damping, or prune in more stages."
            )
    _check_computed(objective)
    fresh = {name: buffer for name, buffer in buffers.items() if not _same(buffer, objective.buffers[name])}
    for name, buffer in fresh.items():
        if buffer.layout == torch.strided and covers_itself(buffer):
            raise WoodfisherError(
                f"several entries of the buffer {name!r} are one number in memory (expand makes such tensors), so that "
                "new ones can't be written to it: register a copy of it (contiguous()). The model is unchanged."
            )
    with torch.no_grad():
        for name, value in values.items():
            local(parameters[name]).copy_(own_part(value, parameters[name]))
        for name, buffer in fresh.items():
            buffer.copy_(objective.buffers[name])


def digests(objective: Objective) -> Digests:
    """Digests of each parameter that is not chosen, as it is now, and as it is converted."""
    return {
        name: {digest(p.to(dtype)) for dtype in (_FLOATING if p.is_floating_point() else [p.dtype])}
        for name, p in objective.model.named_parameters()
        if name not in objective.layout.shapes
    }


def _buffers_of(model: nn.Module, objective: Objective) -> dict[str, Tensor]:
    """A model's buffers, but for those that aren't saved and came or grew as it ran since; raises on any others."""
    passing = {
        full_name(path, name)
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    found = {}
    for name, buffer in model.named_buffers():
        if name in objective.buffers and objective.buffers[name].shape == buffer.shape:
            found[name] = buffer
        elif name not in passing:
            raise WoodfisherError(
                f"the model that was pruned has no buffer {name!r} of shape {tuple(buffer.shape)}: write to one of "
                "the same architecture."
            )
    return found


def _same(buffer: Tensor, own: Tensor) -> bool:
    """Whether there is nothing to write."""
    if buffer is own or buffer.is_meta or buffer.is_nested:
        return True
    if buffer.layout != torch.strided:
        buffer, own = buffer.to_dense(), own.to_dense()
    own = own.to(buffer)
    return bool(((buffer == own) | ((buffer != buffer) & (own != own))).all())


def _check_computed(objective: Objective) -> None:
    """Raise where what a module computes of chosen weights is not finite, as weight_norm's of a row of zeros is not."""
    for name in objective.layout.shapes:
        module, _, tensor = name.partition(".parametrizations.")
        if not tensor:
            continue
        holds = attrgetter(tensor.partition(".")[0])
        read = partial(holds, objective.model.get_submodule(module))
        with torch.no_grad(), isolated(objective.model):
            made = objective.forward.at(objective.state().copied(), read)
        if not made.isfinite().all():
            raise WoodfisherError(
                f"what {module!r} computes of {name!r} is not finite at the new weights, as where weight_norm is left "
                "a row of zeros; the model is unchanged. Ask for a lower sparsity, or remove the parametrization first."
            )


def _check_others(objective: Objective, parameters: dict[str, nn.Parameter], known: Digests) -> None:
    """Raise unless the parameters that are not chosen, which stay, are those of the model that was pruned."""
    own = dict(objective.model.named_parameters())
    here, there = ({name: tuple(p.shape) for name, p in each.items()} for each in (parameters, own))
    unlike = next((name for name in {**there, **here} if here.get(name) != there.get(name)), None)
    if unlike is not None:
        raise WoodfisherError(
            f"{unlike!r} is a parameter of shape {there.get(unlike)} in the model that was pruned, and of shape "
            f"{here.get(unlike)} in this one (None: there is none): write to one of the same architecture."
        )
    for name, p in parameters.items():
        if name in objective.layout.shapes:
            continue
        value = whole(p)
        if known:
            same = digest(value) in known[name]
        else:
            pruned = own[name].detach().to(p.device, p.dtype)
            same = torch.allclose(value, pruned, rtol=0, atol=0, equal_nan=True)
        if not same:
            raise WoodfisherError(
                f"{name!r} of this model differs from that of the model that was pruned, as it was then, and only "
                "chosen weights and buffers are written, so that the network would be another one: load the state "
                "dict of the dense model into it first (model.load_state_dict), or write to a copy that was made "
                "before training. The model is unchanged."
            )


def _check_architecture(objective: Objective, parameters: dict[str, nn.Parameter]) -> None:
    shapes = objective.layout.shapes
    for name, shape in shapes.items():
        if name not in parameters or tuple(parameters[name].shape) != tuple(shape):
            raise WoodfisherError(
                f"this model has no parameter {name!r} of shape {shape}: write to one of the architecture that was "
                "pruned."
            )
    if any(parameters[name].is_inference() for name in shapes):
        raise WoodfisherError(
            "the model was made in torch.inference_mode, so its weights can't be changed: make or load it outside."
        )
