"""Weights from files into networks, checked name by name before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from woodfisher.errors import WoodfisherError
from woodfisher.tasks.files import unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    Network = TypeVar("Network", bound=nn.Module)

_WRAPPERS = ("state_dict", "model_state_dict", "model")


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
    load_weights(model, path)
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a `.pt` or `.safetensors` file of exactly the tensors in the model's state dict.

    The state dict may be nested under `state_dict`, `model_state_dict` or `model`, and its names may carry
    the prefix `module.`; the masks `<weight>_mask` in files of pruned models are left out. A file that does
    not fit raises, and leaves the model as it was.
    """
    came = _without_masks(_unwrapped(_read(path)))
    state: dict[str, Tensor] = model.state_dict()
    problem = _misfit(state, came)
    if problem:
        raise WoodfisherError(
            f"{path} does not fit {type(model).__name__}: {problem}. Pass weights that were saved "
            "from this network."
        )
    model.load_state_dict({name: came[name] for name in state})


def _read(path: Path) -> Mapping[Any, Any]:
    expected = "network weights (a state dict in a .pt file, or .safetensors)"
    if not path.is_file():
        raise WoodfisherError(f"{path} should hold {expected}, and there is no such file. Check the path.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # either reader fails in many ways on foreign bytes
        raise unreadable(path, expected, error) from error
    if not isinstance(content, Mapping):
        raise WoodfisherError(f"{path} should hold {expected}; a {type(content).__name__} came.")
    return content


def _unwrapped(content: Mapping[Any, Any]) -> dict[str, Any]:
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    prefix = "module." if all(str(name).startswith("module.") for name in content) else ""
    return {str(name).removeprefix(prefix): value for name, value in content.items()}


def _without_masks(tensors: dict[str, Any]) -> dict[str, Any]:
    def is_mask(name: str) -> bool:
        weight = name.removesuffix("_mask")
        return weight != name and weight in tensors and getattr(tensors[name], "dtype", None) == torch.bool

    return {name: value for name, value in tensors.items() if not is_mask(name)}


def _misfit(state: Mapping[str, Tensor], came: Mapping[str, Any]) -> str:
    """Say in words what is wrong, or nothing."""
    if state.keys() != came.keys():
        missing, unexpected = state.keys() - came.keys(), came.keys() - state.keys()
        parts = {"missing": missing, "unexpected": unexpected}
        return "; ".join(f"{_listed(names)} {part}" for part, names in parts.items() if names)
    for name, expected in state.items():
        value = came[name]
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return f"{name} is no dense tensor"
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
