"""Linear and convolution layers whose weights are sparse matrices, in CSR or in blocks (BSR), by `torch.sparse`."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from woodfisher.errors import WoodfisherError
from woodfisher.export.timing import Race, race
from woodfisher.gradients.isolation import copied
from woodfisher.gradients.outputs import outputs_of
from woodfisher.gradients.parameters import module_of, unwrapped
from woodfisher.saving.saved import sparse_matrix
from woodfisher.saving.structure import is_blocked

_BLOCKS = (16, 8, 4)
"""Sizes of the square blocks that are looked for."""


class SparseLayer(nn.Module):
    """A layer for inference whose weight is the matrix `(outputs, inputs)`.

    The state dict has the matrix as `crow_indices`, `col_indices` (int32) and `values`, and the bias.

    Parameters
    ----------
    matrix:
        In CSR or BSR layout.
    bias:
        `(outputs,)`, or None.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, matrix: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("crow_indices", matrix.crow_indices().int())
        self.register_buffer("col_indices", matrix.col_indices().int())
        self.register_buffer("values", matrix.values().detach())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_load_state_dict_post_hook(_check)  # type: ignore[no-untyped-call]

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Of the dense weight."""

    @property
    def weight(self) -> Tensor:
        """The sparse matrix, of which modules that hold the layer read the dtype and the device."""
        return self.matrix()

    def matrix(self, *, check: bool = False) -> Tensor:
        """The sparse matrix, which shares its memory with the buffers."""
        outputs, *inputs = self.weight_shape
        shape = outputs, math.prod(inputs)
        return sparse_matrix(self.crow_indices, self.col_indices, self.values, shape, check=check)

    def extra_repr(self) -> str:
        block = "x".join(map(str, self.values.shape[1:]))
        outputs, *inputs = self.weight_shape
        return f"{math.prod(inputs)}, {outputs}, {self.values.numel()} values" + (
            f" in blocks of {block}" if block else ""
        )

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  its name in torch
        """What the dense layer gives, in the dtype of the weight also where autocast has a narrower one."""
        device = input.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.forward(input.to(self.values.dtype))
        _check_dtype(self.values)
        return self.product(input)

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """The weight times the input, and the bias."""


class SparseLinear(SparseLayer):
    """A Linear layer `(…, in_features)` → `(…, out_features)`."""

    def __init__(self, matrix: Tensor, linear: nn.Linear) -> None:
        super().__init__(matrix, linear.bias)
        self.out_features, self.in_features = linear.weight.shape

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def product(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise WoodfisherError(
                f"the layer takes (…, {self.in_features}) inputs; shape {tuple(x.shape)} came."
            )
        rows, matrix = x.reshape(-1, self.in_features), self.matrix()
        if len(rows) == 1 and self.values.ndim == 1:
            # A product with one vector reads the matrix once, which takes half of the time or less.
            vector = rows[0]
            out = torch.mv(matrix, vector) if self.bias is None else torch.addmv(self.bias, matrix, vector)
        else:
            out = (matrix @ rows.T).T
            out = out.contiguous() if self.bias is None else (out + self.bias).contiguous()
        return out.reshape(*x.shape[:-1], self.out_features)


class SparseConv2d(SparseLayer):
    """A convolution as the product of the flat kernels `(outputs, inputs · height · width)` with unfolded images."""

    def __init__(self, matrix: Tensor, conv: nn.Conv2d) -> None:
        super().__init__(matrix, conv.bias)
        assert not isinstance(conv.padding, str)
        self.out_channels, self.in_channels = conv.weight.shape[:2]
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.padding, self.dilation = conv.padding, conv.dilation
        self.padding_mode, self.groups = conv.padding_mode, conv.groups

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels, *self.kernel_size

    def product(self, x: Tensor) -> Tensor:
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_channels:
            raise WoodfisherError(
                f"the convolution takes images of {self.in_channels} channels, (samples, {self.in_channels}, height, "
                f"width) or one without samples; shape {tuple(x.shape)} came."
            )
        batched = x if x.ndim == 4 else x[None]
        height, width = (self._length(batched.shape[2 + i], i) for i in range(2))
        if self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0):
            patches = batched.flatten(2)
        else:
            patches = unfold(batched, self.kernel_size, self.dilation, self.padding, self.stride)
        out = self.matrix() @ patches.transpose(0, 1).flatten(1)
        if self.bias is not None:
            out = out + self.bias[:, None]
        out = out.reshape(self.out_channels, len(batched), height, width).transpose(0, 1)
        return out.contiguous() if x.ndim == 4 else out[0].contiguous()

    def _length(self, length: int, i: int) -> int:
        covered = self.dilation[i] * (self.kernel_size[i] - 1) + 1
        return (length + 2 * int(self.padding[i]) - covered) // self.stride[i] + 1


@dataclass(frozen=True)
class LayerSpeed:
    """How a layer does with a sparse weight, on the inputs that it got.

    Attributes
    ----------
    name:
        Of the layer.
    shape:
        Of its weight.
    sparsity:
        Fraction of its weights that are zero.
    layout:
        `csr`, or `bsr4` and the like where blocks of 4 × 4 were faster.
    race:
        Timings of the dense and the sparse layer.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    layout: str
    race: Race

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "sparsity": self.sparsity,
            "layout": self.layout,
            **self.race.to_dict(),
        }


def measure_layers(model: nn.Module, example_inputs: Any) -> list[LayerSpeed]:
    """Time each layer that can be sparse, dense and sparse in turns, on the inputs that it gets for these.

    Layers are plain Linear and Conv2d ones with zeros in their weights, without groups, that are called once.

    Parameters
    ----------
    model:
        Any module, in evaluation mode; it stays as it is.
    example_inputs:
        What the model takes, as in a batch `(inputs, targets)`, of the batch size that matters.
    """
    model = unwrapped(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if _can_be_sparse(module) and not _read_by_parent(model, name)
    }
    calls: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        module.register_forward_pre_hook(partial(_record, calls[name]), with_kwargs=True)
        for name, module in layers.items()
    ]
    try:
        outputs_of(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [
        _fastest(name, layer, calls[name][0])
        for name, layer in layers.items()
        if len(calls[name]) == 1 and not layer.weight.all()
    ]


def to_sparse(model: nn.Module, layers: Iterable[str] | dict[str, str]) -> nn.Module:
    """A copy of a model, for inference, in which these layers have sparse weights.

    Its outputs are those of the model up to rounding.

    Parameters
    ----------
    model:
        Any module; it stays as it is.
    layers:
        Names of Linear and Conv2d layers, in CSR, or name → layout as in `LayerSpeed`.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> to_sparse(model, ["0"])[0]
    SparseLinear(8, 4, 32 values)
    """
    if not isinstance(layers, Iterable) or isinstance(layers, str):
        raise WoodfisherError(
            f"layers are a list of names, or a dict of layouts by name, as in ['0', '2']; {layers!r} came."
        )
    layouts = layers if isinstance(layers, dict) else dict.fromkeys(layers, "csr")
    model = unwrapped(model)
    replaced = {name: _as_sparse(layer_named(model, name), layout) for name, layout in layouts.items()}
    sparse = copied(model)
    for name, layer in replaced.items():
        sparse.set_submodule(name, layer)
    return sparse


def layer_named(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """The layer of that name, which can have a sparse weight."""
    layer = dict(model.named_modules(remove_duplicate=False)).get(name)
    if not name:
        raise WoodfisherError(
            "a model that is one layer can't have that layer replaced: put it into a torch.nn.Sequential."
        )
    if layer is None or not _can_be_sparse(layer):
        found = "has none of that name" if layer is None else f"has a {type(layer).__name__} there"
        raise WoodfisherError(
            f"the layer {name!r} must be a plain Linear or Conv2d, without groups or hooks and padded with zeros by "
            f"numbers; the model {found}."
        )
    if _read_by_parent(model, name):
        raise WoodfisherError(
            f"{name!r} belongs to a TransformerEncoderLayer, which reads the weights of its layers itself: leave it "
            "dense, or replace it by a module that calls them."
        )
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    return layer


def sparse_from(layer: nn.Linear | nn.Conv2d, parts: dict[str, Tensor]) -> SparseLayer:
    """The sparse form of a layer with a matrix given by its state dict's three tensors, which are checked."""
    shape = (len(layer.weight), layer.weight[0].numel())
    device = layer.weight.device
    crow_indices, col_indices = (parts[part].to(device) for part in ("crow_indices", "col_indices"))
    values = parts["values"].to(layer.weight)
    return _layer_with(layer, sparse_matrix(crow_indices, col_indices, values, shape, check=True))


def _as_sparse(layer: nn.Linear | nn.Conv2d, layout: str) -> SparseLayer:
    weight = layer.weight.detach().flatten(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse .* tensor support is in beta")
        if layout == "csr":
            return _layer_with(layer, weight.to_sparse_csr())
        number = str(layout).removeprefix("bsr")
        size = int(number) if number.isdecimal() else 0
        if not size or weight.shape[0] % size or weight.shape[1] % size:
            raise WoodfisherError(
                f"a layout is csr, or bsr4 and the like for blocks that divide the weight; {layout!r} came for one of "
                f"shape {tuple(weight.shape)}."
            )
        return _layer_with(layer, weight.to_sparse_bsr((size, size)))


def _layer_with(layer: nn.Linear | nn.Conv2d, matrix: Tensor) -> SparseLayer:
    _check_dtype(matrix)
    sparse: SparseLayer
    sparse = SparseLinear(matrix, layer) if isinstance(layer, nn.Linear) else SparseConv2d(matrix, layer)
    return sparse.train(layer.training)


def _check_dtype(matrix: Tensor) -> None:
    """Raise where torch can't multiply with a sparse matrix of this dtype."""
    if matrix.device.type == "cpu" and matrix.dtype.itemsize < 4:
        raise WoodfisherError(
            f"on a CPU torch multiplies with sparse matrices in float32 and float64, and the model is in "
            f"{str(matrix.dtype).removeprefix('torch.')}: convert it with .float()."
        )


def _can_be_sparse(module: nn.Module) -> bool:
    """Subclasses, parametrizations and masks by hooks do something else than the plain layer."""
    if module._forward_pre_hooks or module._forward_hooks:
        return False
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def _read_by_parent(model: nn.Module, name: str) -> bool:
    """Whether the layer of that name is inside a module that uses its weight without calling it."""
    return isinstance(module_of(model, name), nn.TransformerEncoderLayer)


def _fastest(name: str, layer: Any, x: Tensor) -> LayerSpeed:
    weight = layer.weight.detach().flatten(1)
    layouts = ["csr", *(f"bsr{size}" for size in _BLOCKS if is_blocked(weight != 0, size, size))][:2]
    races: dict[str, Race] = {}
    for layout in layouts:
        races[layout] = race(partial(layer, x), partial(_as_sparse(layer, layout), x))
    best = max(races, key=lambda layout: races[layout].speedup)
    sparsity = 1 - float((weight != 0).double().mean())
    return LayerSpeed(name, tuple(layer.weight.shape), sparsity, best, races[best])


def _record(
    calls: list[Tensor], _module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
) -> None:
    calls.append((inputs[0] if inputs else named["input"]).detach())


def _check(module: nn.Module, _keys: object) -> None:
    """After new tensors were loaded: indexes that point outside would read memory that isn't theirs."""
    assert isinstance(module, SparseLayer)
    module.matrix(check=True)
