"""Weights in files: pruned ones in the bitmask form, which loads back to the same bits."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.parameter import is_lazy

from woodfisher._version import __version__
from woodfisher.errors import WoodfisherError
from woodfisher.files import unreadable, write_whole
from woodfisher.gradients.parameters import full_name, inputs_first, unwrapped
from woodfisher.gradients.sharding import is_shard
from woodfisher.saving.bitmask import PARTS, bits, pack, unpack
from woodfisher.watch import warn

if TYPE_CHECKING:
    from torch import nn

COMPRESSED = "woodfisher.compressed"
"""Key in a file's header: JSON of prefix → name and shape of those weights in the bitmask form whose names don't end
in `.weight`, or which have more than two dimensions."""

MASKED = "woodfisher.masked"
"""Key in a file's header: JSON list of the other weights that have a mask, the bool tensor `<name>_mask`."""

INPUTS_FIRST = "woodfisher.inputs_first"
"""Key in a file's header: JSON list of weights whose first dimension is the inputs, as of transposed convolutions."""

EXPORT = "woodfisher.export"
"""Key in a file's header: JSON of the shapes of `sparse` layers' weights by name, and of `semi_structured` names."""

SPARSE_PARTS = ("crow_indices", "col_indices", "values")
"""Tensors that a file has of a sparse layer, instead of its weight."""

EXPECTED = "network weights (a state dict in a .pt file, or .safetensors)"

_WRAPPERS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Packed:
    """Weights as the content of a file.

    Attributes
    ----------
    content:
        A whole safetensors file.
    dense:
        Bytes that its tensors take uncompressed, without masks and header.
    """

    content: bytes = field(repr=False)
    dense: int

    @property
    def stored(self) -> int:
        """Bytes of the file."""
        return len(self.content)

    def write(self, path: Path) -> None:
        """Write the file."""
        path.write_bytes(self.content)

    def to_dict(self) -> dict[str, int]:
        """As JSON takes it."""
        return {"dense": self.dense, "stored": self.stored}


@dataclass(frozen=True)
class Saved:
    """What a file of weights holds.

    Attributes
    ----------
    tensors:
        Name → dense tensor.
    kept:
        Name → bool of the tensor's shape, False where removed, for the tensors whose file says so.
    stored:
        Name → bytes in the file, masks included; tensors that are there only as another name of one take 0.
    compressed:
        Names of the tensors that are in the bitmask form.
    inputs_first:
        Names of the weights whose first dimension is the inputs, as far as the file says so.
    metadata:
        Of the file's header.
    size:
        Bytes of the file.
    """

    tensors: dict[str, Tensor]
    kept: dict[str, Tensor]
    stored: dict[str, int]
    compressed: frozenset[str]
    inputs_first: frozenset[str]
    metadata: dict[str, str]
    size: int


def save_weights(model: nn.Module, path: str | Path, masks: Mapping[str, Tensor] | None = None) -> int:
    """Write a model's state dict to a safetensors file, pruned weights in the bitmask form, whole or not at all.

    A weight is compressed where that is smaller. `load_weights` gives the same bits back, and so does what the
    documentation shows for programs without woodfisher.

    Parameters
    ----------
    model:
        Any module.
    path:
        Of the file.
    masks:
        Name → bool of a weight's shape, False where removed, as in `Report.masks`. By default zeros count as removed.

    Returns
    -------
    Bytes of the file.
    """
    check_suffix(path)
    packed = packed_model(model, masks)
    write_whole(Path(path), packed.write)
    return packed.stored


def check_suffix(path: str | Path) -> None:
    """Raise unless a file of weights that is to be written has the name by which it will be known."""
    if Path(path).suffix != ".safetensors":
        raise WoodfisherError(f"weights are written to a .safetensors file; {str(path)!r} came: name it so.")


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The dense state dict of a `.safetensors` file, compressed or plain, or of a state dict in a `.pt` file.

    Nothing in the file is executed. A state dict in a `.pt` file may be nested under `state_dict`,
    `model_state_dict` or `model`, and its names may carry the prefix `module.`. The masks that files of
    `save_weights` hold are left out.
    """
    return read(Path(path)).tensors


def packed_model(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> Packed:
    """A model's state dict as `save_weights` writes it."""
    model = unwrapped(model)
    turned = [full_name(name, "weight") for name, module in model.named_modules() if inputs_first(module)]
    return pack_state(model.state_dict(), masks, {INPUTS_FIRST: json.dumps(turned)} if turned else {})


def pack_state(
    tensors: Mapping[str, Any],
    masks: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Packed:
    """A state dict as the content of a file, with more for its header.

    Tensors that share memory stand there once, their other names in the header. The mask of a weight that is not
    compressed, where something of it is removed, is the bool tensor `<name>_mask`.
    """
    state, tied = once(tensors)
    if masks is None:
        masks = {name: bits(tensor) != 0 for name, tensor in state.items() if tensor.is_floating_point()}
    if not isinstance(masks, Mapping):
        raise WoodfisherError(
            f"masks are a dict of bool tensors by the names of weights, as in Report.masks; a {type(masks).__name__} "
            "came."
        )
    for name, mask in masks.items():
        if not isinstance(mask, Tensor):
            raise WoodfisherError(f"a mask is a bool tensor; that of {name!r} is a {type(mask).__name__}.")
        tensor = state.get(tied.get(name, name))
        if tensor is None or tensor.shape != mask.shape or mask.dtype != torch.bool:
            raise WoodfisherError(
                f"a mask is a bool tensor of a weight's shape; that of {name!r} is {mask.dtype} of shape "
                f"{tuple(mask.shape)}, and the model has "
                + ("no such tensor." if tensor is None else f"{tuple(tensor.shape)}.")
            )
    kept = {tied.get(name, name): mask.cpu().contiguous() for name, mask in masks.items()}
    content: dict[str, Tensor] = {}
    compressed: dict[str, dict[str, Any]] = {}
    masked: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = _smaller(tensor, kept[name]) if name in kept else None
        prefix = name.removesuffix(".weight")
        if parts is None or any(f"{prefix}.{part}" in own for own in (state, content) for part in PARTS):
            content[name] = tensor
            if name in kept and not kept[name].all():
                masked[name] = kept[name].contiguous()
        else:
            content.update({f"{prefix}.{part}": value for part, value in parts.items()})
            if prefix == name or tensor.ndim > 2:
                compressed[prefix] = {"name": name, "shape": list(tensor.shape)}
    for name in [name for name in masked if f"{name}_mask" in state]:
        warn(f"the model has a tensor {name + '_mask'!r} of its own, so the mask of {name!r} is not saved.")
        del masked[name]
    content.update({f"{name}_mask": mask for name, mask in masked.items()})
    header = {
        **tied,
        **metadata,
        COMPRESSED: json.dumps(compressed),
        MASKED: json.dumps(list(masked)),
    }
    return Packed(_as_file(content, header), sum(map(_bytes, state.values())))


def sparse_matrix(
    crow_indices: Tensor, col_indices: Tensor, values: Tensor, shape: tuple[int, int], *, check: bool
) -> Tensor:
    """The matrix that `SPARSE_PARTS` are of, in CSR layout or in blocks; it shares their memory."""
    layout = torch.sparse_csr if values.ndim == 1 else torch.sparse_bsr
    return torch.sparse_compressed_tensor(
        crow_indices, col_indices, values, shape, layout=layout, check_invariants=check
    )


def plain_state(tensors: Mapping[str, Any]) -> bytes:
    """A state dict as the content of a file that has every tensor whole, under each of its names."""
    state, tied = once(tensors)
    return _as_file(state | {name: state[other].clone() for name, other in tied.items()})


def _as_file(content: dict[str, Tensor], header: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """The content of a safetensors file; equal ones are equal to the byte."""
    try:
        saved = safetensors.torch.save(content, {**header, "format": "pt", "woodfisher": __version__})
    except KeyError as error:  # the dtype
        names = [name for name, tensor in content.items() if tensor.dtype == error.args[0]]
        raise WoodfisherError(
            f"a safetensors file can't hold {error.args[0]}, which {names[:1]} has: convert it, or register it with "
            "persistent=False."
        ) from error
    end = 8 + int.from_bytes(saved[:8], "little")
    told = json.loads(saved[8:end])
    told["__metadata__"] = dict(sorted(told["__metadata__"].items()))  # which has a new order every time
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(saved)[end:]])


def once(tensors: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copies of a state dict's tensors on the CPU, each once, and the other names of those that have several."""
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            warn(f"the model's {name!r} is no tensor, and is not saved.")
            continue
        _check_whole(name, tensor)
        place = _place(tensor)
        if tensor.numel() and place in seen:
            tied[name] = seen[place]
        else:
            seen[place] = name
            state[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if not state:
        raise WoodfisherError("the model has no tensors, and a file of weights is to hold some.")
    return state, tied


def _check_whole(name: str, tensor: Tensor) -> None:
    """Raise unless all numbers of a tensor are here, in a form that a file can hold."""
    if is_lazy(tensor):
        raise WoodfisherError(
            f"{name!r} has no shape before the model has run: call the model on a batch first."
        )
    if tensor.is_meta:
        raise WoodfisherError(
            f"{name!r} is on the meta device and has no numbers: load some, with load_state_dict(…, assign=True), say."
        )
    if is_shard(tensor):
        raise WoodfisherError(
            f"{name!r} is spread over processes (a DTensor): load get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) into a plain model, and save that."
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise WoodfisherError(
            f"{name!r} is sparse or nested, which a file of weights can't hold: make it dense (to_dense()), or "
            "register it with persistent=False."
        )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory, and how it is read there, which those that are tied have in common."""
    where = tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()
    return *where, tensor.dtype, tensor.is_conj(), tensor.is_neg()


def read(path: Path) -> Saved:
    """Read a file of weights; whatever is missing, cut short, foreign or contradictory ends in one error."""
    if path.is_dir():
        raise WoodfisherError(f"{path} is a folder, and what holds {EXPECTED} is a file: name one in it.")
    if not path.is_file():
        raise WoodfisherError(f"{path} should hold {EXPECTED}, and there is no such file. Check the path.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            metadata = {}
            tensors = _state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return _saved(tensors, metadata, path.stat().st_size)
    except pickle.UnpicklingError as error:  # torch's own words advise to execute what is in the file
        classes = "Unsupported global" in str(error)
        reason = ValueError(
            "it holds more than tensors: save model.state_dict(), and not the model"
            if classes
            else "it is none that torch.save wrote"
        )
        raise unreadable(path, EXPECTED, reason) from error
    except Exception as error:  # readers fail in many ways on foreign bytes
        raise unreadable(path, EXPECTED, error) from error


def _saved(tensors: dict[str, Tensor], metadata: dict[str, str], size: int) -> Saved:
    if not tensors:
        raise ValueError("it holds no tensor")
    first = {_place(tensor): name for name, tensor in reversed(tensors.items())}
    stored = {
        name: _bytes(tensor) if first[_place(tensor)] == name else 0 for name, tensor in tensors.items()
    }
    kept: dict[str, Tensor] = {}
    listed = _listed(metadata)
    compressed = set()
    for prefix in dict.fromkeys([*listed, *_prefixes(tensors)]):
        name, shape = listed.get(prefix, (f"{prefix}.weight", None))
        names = [f"{prefix}.{part}" for part in PARTS]
        parts = {part: tensors.pop(full) for part, full in zip(PARTS, names, strict=True) if full in tensors}
        try:
            weight, mask = unpack(parts)
            tensors[name], kept[name] = (
                t.reshape(t.shape if shape is None else shape) for t in (weight, mask)
            )
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"the compressed weight {name!r} is broken: {error}") from error
        stored[name] = sum(stored.pop(full) for full in names)
        compressed.add(name)
    for name in _masked(metadata, tensors):
        kept[name] = tensors.pop(f"{name}_mask")
        stored[name] += stored.pop(f"{name}_mask")
    for name, other in metadata.items():
        if other in tensors and name not in tensors and name not in ("format", "woodfisher"):
            tensors[name], stored[name] = tensors[other], 0
            if other in kept:
                kept[name] = kept[other]
    turned = json.loads(metadata.get(INPUTS_FIRST, "[]"))
    if not isinstance(turned, list) or not all(isinstance(name, str) for name in turned):
        raise ValueError(f"{INPUTS_FIRST} in its header must list names")
    return Saved(tensors, kept, stored, frozenset(compressed), frozenset(turned), metadata, size)


def _listed(metadata: Mapping[str, str]) -> dict[str, tuple[str, list[int]]]:
    """Prefix → name and shape of the compressed weights, as the header has it."""
    content = json.loads(metadata.get(COMPRESSED, "{}"))
    try:
        listed = {prefix: (entry["name"], entry["shape"]) for prefix, entry in content.items()}
    except (AttributeError, TypeError, KeyError):
        listed = {"": ("", None)}
    for name, shape in listed.values():
        if not (isinstance(name, str) and name and isinstance(shape, list)) or any(
            type(length) is not int or length < 0 for length in shape
        ):
            raise ValueError(f"{COMPRESSED} in its header must hold a name and a shape for each prefix")
    return listed


def exported_in(metadata: Mapping[str, str]) -> tuple[dict[str, list[int]], list[str]]:
    """Shapes of the sparse layers' weights by name, and names of the semi-structured ones; ValueError if malformed."""
    content = json.loads(metadata.get(EXPORT, "{}"))
    if isinstance(content, dict):
        sparse, names = content.get("sparse", {}), content.get("semi_structured", [])
        if isinstance(sparse, dict) and isinstance(names, list):
            shapes = [shape if isinstance(shape, list) and shape else [None] for shape in sparse.values()]
            if all(isinstance(n, int) and n > 0 for shape in shapes for n in shape) and all(
                isinstance(name, str) for name in names
            ):
                return sparse, names
    raise ValueError(f"{EXPORT} in its header must hold shapes by name, and a list of names")


def _prefixes(tensors: Mapping[str, Any]) -> list[str]:
    """Prefixes of compressed weights in a file whose header doesn't list them, as compressed-tensors writes it."""
    return [
        prefix
        for name in tensors
        if (prefix := name.removesuffix(".bitmask")) != name and f"{prefix}.compressed" in tensors
    ]


def _masked(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors whose mask stands beside them: as the header lists them."""
    names = json.loads(metadata.get(MASKED, "[]"))
    if not isinstance(names, list) or not all(has_mask(name, tensors) for name in names):
        raise ValueError(f"{MASKED} in its header must list weights that have a mask of their shape")
    return names


def has_mask(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether beside the tensor of that name stands one that can be its mask, a bool of its shape."""
    tensor, mask = tensors.get(name), tensors.get(f"{name}_mask")
    return tensor is not None and mask is not None and mask.dtype == torch.bool and mask.shape == tensor.shape


def _state_dict(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise TypeError(f"a state dict was expected, and a {type(content).__name__} came")
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    prefix = "module." if all(str(name).startswith("module.") for name in content) else ""
    for name, value in content.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(f"{name} is no dense tensor")
    return {str(name).removeprefix(prefix): value for name, value in content.items()}


def _smaller(tensor: Tensor, kept: Tensor) -> dict[str, Tensor] | None:
    """The parts of a weight in the bitmask form, or None where that is no smaller or loses bits of removed weights."""
    if kept.all() or not kept.ndim or bits(tensor)[~kept].any():
        return None
    parts = pack(tensor, kept)
    return parts if sum(map(_bytes, parts.values())) < _bytes(tensor) else None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
