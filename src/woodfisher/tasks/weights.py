"""Weights from files into networks, checked name by name before anything changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from woodfisher.errors import WoodfisherError
from woodfisher.saving.saved import has_mask, load_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    Network = TypeVar("Network", bound=nn.Module)


def find_weights(weights: Path | None, folder: Path, usual_name: str) -> Path:
    """Return `weights`, or the file of the usual name in the data folder."""
    if weights is not None:
        return weights
    if (folder / usual_name).is_file():
        return folder / usual_name
    raise WoodfisherError(
        f"the task needs trained weights: pass a .pt or .safetensors file as weights (--weights), or put "
        f"{usual_name} into {folder}."
    )


def restored(network: Callable[[], Network], path: Path) -> Network:
    """Build a network in evaluation mode with the weights of a file; global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        model = network().float().eval()
    load_into(model, path)
    return model


def load_into(model: nn.Module, path: Path) -> None:
    """Load a `.pt` or `.safetensors` file of exactly the tensors in the model's state dict, and masks of them.

    The file is read as `load_weights` does. One that does not fit raises, and leaves the model as it was.
    """
    came = load_weights(path)
    state: dict[str, Tensor] = model.state_dict()
    masks = {f"{name}_mask" for name in came if has_mask(name, came)} - state.keys()
    came = {name: tensor for name, tensor in came.items() if name not in masks}
    problem = _misfit(state, came)
    if problem:
        raise WoodfisherError(
            f"{path} does not fit {type(model).__name__}: {problem}. Pass weights that were saved "
            "from this network."
        )
    model.load_state_dict({name: came[name] for name in state})


def _misfit(state: Mapping[str, Tensor], came: Mapping[str, Tensor]) -> str:
    """Say in words what is wrong, or nothing."""
    if state.keys() != came.keys():
        missing, unexpected = state.keys() - came.keys(), came.keys() - state.keys()
        parts = {"missing": missing, "unexpected": unexpected}
        return "; ".join(f"{_listed(names)} {part}" for part, names in parts.items() if names)
    for name, expected in state.items():
        value = came[name]
        if value.shape != expected.shape:
            return f"{name} must have shape {tuple(expected.shape)}, and {tuple(value.shape)} came"
        if value.is_floating_point() != expected.is_floating_point():
            return f"{name} must be {expected.dtype}, and {value.dtype} came"
        if not value.to(expected.dtype).isfinite().all():
            return f"{name} has values that are not finite"
    return ""


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")
