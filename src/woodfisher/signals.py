"""Gradient rows of a layer in factor form: what flows into it, and the gradient of what flows out."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from woodfisher.parameters import inputs_first

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


@dataclass(frozen=True)
class Factors:
    """What a row of one weight's gradient takes in factor form.

    Attributes
    ----------
    floats:
        Numbers to keep.
    flops:
        Operations to make a dense row of them.
    """

    floats: int
    flops: int


@dataclass(frozen=True)
class LayerRows:
    """Rows of the gradient of one weight, each the sum over its samples and positions of s aᵀ.

    Attributes
    ----------
    module:
        The layer: Linear, a convolution, or the transposed Linear of Hugging Face's GPT-2.
    inputs:
        a: what flowed into it, `(N, m, …)`, where a row has m samples.
    outputs:
        s: the gradients of the rows' losses with respect to what flowed out, `(N, m, …)`.
    """

    module: nn.Module
    inputs: Tensor
    outputs: Tensor

    @classmethod
    def joined(cls, parts: Sequence[LayerRows]) -> LayerRows:
        """The rows of several chunks as one."""
        inputs = torch.cat([part.inputs for part in parts])
        return cls(parts[0].module, inputs, torch.cat([part.outputs for part in parts]))

    def with_room(self, count: int) -> LayerRows:
        """Room for `count` rows of the same form, with anything in them."""
        inputs = self.inputs.new_empty(count, *self.inputs.shape[1:])
        return replace(self, inputs=inputs, outputs=self.outputs.new_empty(count, *self.outputs.shape[1:]))

    def takes(self, rows: LayerRows) -> bool:
        """Whether rows have the form of these."""
        same = self.inputs.shape[1:] == rows.inputs.shape[1:]
        return same and self.outputs.shape[1:] == rows.outputs.shape[1:]

    def put(self, first: int, rows: LayerRows) -> None:
        """Write rows of the same form to the places from `first` on."""
        here = slice(first, first + len(rows.outputs))
        self.inputs[here], self.outputs[here] = rows.inputs, rows.outputs

    def first(self, count: int) -> LayerRows:
        """The first rows."""
        return replace(self, inputs=self.inputs[:count], outputs=self.outputs[:count])

    @property
    def width(self) -> int:
        """Weights of an output channel."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.numel() // self.channels

    @property
    def channels(self) -> int:
        """Output channels."""
        return self.outputs.shape[2] if isinstance(self.module, _ConvNd) else self.outputs.shape[-1]

    @property
    def positions(self) -> int:
        """Terms that a row is the sum of: samples, and places in a sequence or an image."""
        spatial = isinstance(self.module, _ConvNd)
        return self.outputs[0].numel() // (self.outputs.shape[2] if spatial else self.outputs.shape[-1])

    def dense(self, channels: slice | None = None, out: Tensor | None = None) -> Tensor:
        """The rows for these output channels (default: all) in the weight's own order, `(N, channels · width)`.

        Parameters
        ----------
        out:
            Where to write them to.
        """
        channels = slice(0, self.channels) if channels is None else channels
        terms = self._terms(channels)
        if terms is None:
            rows = self._by_groups(channels)
            return rows if out is None else out.copy_(rows)
        s, a = terms
        if out is None:
            return (s @ a).flatten(1)
        if out.dtype == s.dtype:
            torch.bmm(s, a, out=out.unflatten(1, (s.shape[1], a.shape[2])))
            return out
        return out.copy_((s @ a).flatten(1))

    def gram(self) -> Tensor | None:
        """Inner products of the rows, float64 `(N, N)`, from (a aᵀ)(s sᵀ) of all pairs of positions.

        None where that takes more operations than from dense rows, or the layer is a convolution.
        """
        positions, channels = self.positions, self.channels
        if isinstance(self.module, _ConvNd):
            return None
        if positions**2 * (self.width + channels) > self.width * channels:
            return None
        s, a = self.outputs.flatten(1, -2).double(), self.inputs.flatten(1, -2).double()
        total = torch.zeros(len(s), len(s), dtype=torch.float64, device=s.device)
        for t in range(positions):
            for u in range(positions):
                total += (s[:, t] @ s[:, u].mT) * (a[:, t] @ a[:, u].mT)
        return total

    def transposed(self) -> LayerRows:
        """The same for a layer whose weight is `(inputs, outputs)`: with inputs and outputs in each other's place."""
        return replace(self, inputs=self.outputs, outputs=self.inputs)

    def _terms(self, channels: slice) -> tuple[Tensor, Tensor] | None:
        """S `(N, channels, T)` and a `(N, T, width)`, whose product the rows are; None where groups are faster.

        For convolutions `a` are patches of the inputs, which is faster than a convolution of N groups where there are
        few positions for the channels.
        """
        module = self.module
        if not isinstance(module, _ConvNd):
            return self.outputs[..., channels].flatten(1, -2).mT, self.inputs.flatten(1, -2)
        s = self.outputs[:, :, channels]
        flat = s.ndim == 5 and module.groups == 1
        if not flat or self.positions > self.outputs.shape[1] * self.channels:
            return None
        patches = F.unfold(
            self.inputs.flatten(0, 1),
            module.kernel_size,
            dilation=module.dilation,
            padding=module.padding,  # type: ignore[arg-type]
            stride=module.stride,
        )
        a = patches.unflatten(0, self.inputs.shape[:2]).mT.flatten(1, 2)
        return s.flatten(3).transpose(1, 2).flatten(2), a

    def _by_groups(self, channels: slice) -> Tensor:
        """By one backward pass of a convolution with as many groups as there are rows."""
        module = self.module
        assert isinstance(module, _ConvNd)
        s = self.outputs if module.groups > 1 else self.outputs[:, :, channels]
        N = len(s)
        kernel = (s.shape[2], self.inputs.shape[2] // module.groups, *module.kernel_size)
        gradient = torch.ops.aten.convolution_backward(
            s.transpose(0, 1).flatten(1, 2),
            self.inputs.transpose(0, 1).flatten(1, 2),
            s.new_empty(N * kernel[0], *kernel[1:]),
            None,
            module.stride,
            module.padding,
            module.dilation,
            False,
            [0] * len(module.kernel_size),
            N * module.groups,
            [False, True, False],
        )[1].unflatten(0, (N, -1))
        return (gradient[:, channels] if module.groups > 1 else gradient).flatten(1)


def has_factors(module: nn.Module, weight: Tensor) -> bool:
    """Whether the gradient of a weight follows from what flows in and out of its layer."""
    if weight is not getattr(module, "weight", None):
        return False
    if isinstance(module, _ConvNd):
        plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return plain and not isinstance(module, _ConvTransposeNd)
    return isinstance(module, nn.Linear) or (inputs_first(module) and weight.ndim == 2)


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes
    ----------
    inputs:
        What it was called with.
    output:
        Where the gradient of what it returned comes by, whatever is done to that in place later.
    shape:
        Of what it returned.
    """

    inputs: Tensor
    output: GradientEdge
    shape: torch.Size


@contextmanager
def recorded_calls(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Weight name → the calls of its module during the block, which has to take gradients."""
    calls: dict[str, list[Call]] = {name: [] for name in modules}
    names: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(module, []).append(name)

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not inputs or not isinstance(output, Tensor) or not output.requires_grad:
            return
        for name in names[module]:
            calls[name].append(Call(inputs[0].detach(), get_gradient_edge(output), output.shape))

    handles = [module.register_forward_hook(record) for module in names]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
