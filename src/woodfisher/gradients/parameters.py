"""Which parameters of a model are pruned, and what of them is pruned already."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.optim.swa_utils import AveragedModel

from woodfisher.errors import WoodfisherError
from woodfisher.gradients.overlap import check_apart
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ENDS = {":first": 0, ":last": -1}
"""Patterns for the weight of the first and of the last Linear or convolution layer, in the model's order."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers: those that share its parameters, and an `AveragedModel`, which has its own."""
    inner: Any = model
    while isinstance(inner, (DataParallel, DistributedDataParallel, AveragedModel)) or hasattr(
        inner, "_orig_mod"
    ):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    if not isinstance(inner, nn.Module):
        raise WoodfisherError(f"model must be a torch.nn.Module; a {type(inner).__name__} came.")
    return inner


def full_name(path: str, name: str) -> str:
    """The name in a model of what the module at `path` calls `name`; the path of the model itself is empty."""
    return f"{path}.{name}" if path else name


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The module of a model that has the parameter or buffer of that name."""
    return model.get_submodule(name.rpartition(".")[0])


def inputs_first(module: nn.Module) -> bool:
    """Whether the weight of a layer has its inputs in the first dimension and its outputs in the second."""
    return isinstance(module, nn.modules.conv._ConvTransposeNd) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of transformers that goes by that name."""
    named_so = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return named_so and not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a linear or convolution layer, whose weight is pruned where nobody says what."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or is_conv1d(module)


def choose(
    model: nn.Module, params: str | Sequence[str] | None, exclude: str | Sequence[str]
) -> dict[str, nn.Parameter]:
    """Choose parameters by name, tied ones once.

    Without `params` these are the weights of Linear (and transformers' Conv1D) and convolution layers, but for frozen
    ones and those of embeddings where there are others, and for parametrized ones; patterns are those of a shell, and
    match the name of a parameter or of a module that holds it; `:first` and `:last` are the ends of the network.
    """
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise WoodfisherError(
            f"{lazy!r} has no shape before the model has run: call the model on a batch first."
        )
    named = {name: p for name, p in model.named_parameters() if p.is_floating_point() and p.numel()}
    chosen = _usual(model, named) if params is None else _matching(model, named, params)
    for name in _matching(model, named, exclude):
        chosen.pop(name, None)
    sparse = {id(m.weight) for m in model.modules() if isinstance(m, EMBEDDINGS) and m.sparse}
    for name, p in chosen.items():
        if id(p) in sparse:
            raise WoodfisherError(
                f"{name!r} is an embedding with sparse gradients, of which rows can't be made: make it with "
                "sparse=False, or leave it out with exclude=."
            )
    check_apart(model, chosen)
    if not chosen:
        raise WoodfisherError(
            "no weights are left to prune: name them with params=. "
            f"The model has {_listed(named) or 'no floating-point parameters'}."
        )
    return chosen


def _layer_weights(model: nn.Module, named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The weights of Linear and convolution layers that these have themselves."""
    return _matrices(model, named, lambda module: _is_layer(module) and not _computes_weight(module))


def _matrices(
    model: nn.Module, named: dict[str, nn.Parameter], holds: Callable[[nn.Module], bool]
) -> dict[str, nn.Parameter]:
    """The parameters of two dimensions or more that such modules have themselves."""
    own = {
        id(p)
        for module in model.modules()
        if holds(module)
        for p in module.parameters(recurse=False)
        if p.ndim > 1
    }
    return {name: p for name, p in named.items() if id(p) in own}


def _computes_weight(module: nn.Module) -> bool:
    """Whether a layer makes its weight of other parameters, also in the way of `torch.nn.utils.weight_norm`."""
    return is_parametrized(module) or hasattr(module, "weight_g")


def _usual(model: nn.Module, named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What is chosen where nobody says: `_layer_weights` but for frozen ones and embeddings where there are others."""
    weights = _layer_weights(model, named)
    shared = _matrices(model, weights, lambda module: isinstance(module, EMBEDDINGS))
    if len(shared) < len(weights):
        _warn_of_dense("that layers share with embeddings are", list(shared))
        weights = {name: p for name, p in weights.items() if name not in shared}
    computed = [
        name for name, module in model.named_modules() if _is_layer(module) and _computes_weight(module)
    ]
    if computed:
        warn(
            f"the weights of {', '.join(computed[:4])} are parametrized (by weight_norm, say), so that zeros in the "
            "parameters need not be zeros there: they are left dense. Name them with params= to prune them anyway."
        )
    packed = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
    inside = _matrices(model, named, lambda module: isinstance(module, packed))
    _warn_of_dense("of attention and recurrent layers are", list(inside))
    known = (*packed, *EMBEDDINGS, ParametrizationList)
    others = _matrices(model, named, lambda module: not isinstance(module, known) and not _is_layer(module))
    if sum(p.numel() for p in others.values()) > sum(p.numel() for p in weights.values()):
        _warn_of_dense("of other modules, more in all than those of layers, are", list(others))
    trained = {name: p for name, p in weights.items() if p.requires_grad}
    if trained and len(trained) < len(weights):
        _warn_of_dense("are frozen and", [name for name in weights if name not in trained])
        return trained
    return weights


def _warn_of_dense(why: str, names: Sequence[str]) -> None:
    if names:
        warn(
            f"{len(names)} weights {why} left dense ({', '.join(names[:4])}"
            f"{', …' if len(names) > 4 else ''}): name them with params= to prune them too."
        )


def _matching(
    model: nn.Module, named: dict[str, nn.Parameter], patterns: str | Sequence[str]
) -> dict[str, nn.Parameter]:
    every = dict(model.named_parameters(remove_duplicate=False))
    matched: set[int] = set()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Collection) or not all(isinstance(pattern, str) for pattern in patterns):
        raise WoodfisherError(
            "params and exclude are names of parameters or modules, or patterns of them, as in "
            f"params=['encoder.*.weight']; a {type(patterns).__name__} came."
        )
    for pattern in patterns:
        if pattern in ENDS:
            layers = list(_layer_weights(model, named).values())
            if not layers:
                raise WoodfisherError(
                    f"{pattern!r} is that of Linear and convolution layers; the model has none."
                )
            matched.add(id(layers[ENDS[pattern]]))
            continue
        hits = {
            id(p)
            for name, p in every.items()
            if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
        }
        if not hits:
            raise WoodfisherError(
                f"the pattern {pattern!r} matches no parameter. The model has {_listed(named)}."
            )
        if not any(id(p) in hits for p in named.values()):
            name, p = next((name, p) for name, p in every.items() if id(p) in hits)
            raise WoodfisherError(
                f"the pattern {pattern!r} matches {name!r}, {str(p.dtype).removeprefix('torch.')} of shape "
                f"{tuple(p.shape)}, and there is no real number in that to prune: leave it out."
            )
        matched |= hits
    return {name: p for name, p in named.items() if id(p) in matched}


def _listed(named: dict[str, nn.Parameter]) -> str:
    names = list(named)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def existing_masks(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The masks of `torch.nn.utils.prune` (`weight_orig` beside `weight_mask`), ones elsewhere."""
    buffers = dict(model.named_buffers())
    return {
        name: buffers.get(name.removesuffix("_orig") + "_mask", torch.ones_like(p))
        if name.endswith("_orig")
        else torch.ones_like(p)
        for name, p in parameters.items()
    }
