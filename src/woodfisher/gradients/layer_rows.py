"""Gradient rows of a layer in factor form: what flows into it, and the gradient of what flows out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from woodfisher.errors import WoodfisherError
from woodfisher.gradients.parameters import inputs_first
from woodfisher.triangles import gram_triangles, mirrored

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_WORKSPACE = 64 * 2**20
"""Bytes of dense rows, of terms in float64, or of products between terms, that exist at a time where all of them are
gone through."""


@dataclass(frozen=True)
class Factors:
    """What a row of one weight's gradient takes in factor form.

    Attributes
    ----------
    floats:
        Numbers to keep.
    flops:
        Operations to make a dense row of them.
    unfolded:
        Numbers that exist besides while dense rows are made.
    """

    floats: int
    flops: int
    unfolded: int


@dataclass(frozen=True)
class LayerRows:
    """Rows of the gradient of one weight, each a sum over its samples and positions: gₙ = Σₜ sₙₜ aₙₜᵀ.

    A weight has `groups` groups of output channels (its first dimension), with `width` weights each.

    Attributes
    ----------
    convolution:
        The convolution, of whose `inputs` the a are patches; None where they are the inputs themselves.
    inputs:
        What flowed in, `(N, m, …, width)` where a row has m samples; for a convolution `(N, m, in, …)`.
    outputs:
        Gradients of the rows' losses by what flowed out, `(N, m, …, channels)`, or `(N, m, channels, …)`.
    """

    convolution: _ConvNd | None
    inputs: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, module: nn.Module, weight: Tensor, inputs: Tensor, outputs: Tensor) -> LayerRows:
        """Rows for a weight of a layer into which flow `inputs` `(N, m, …)`, and back `outputs` `(N, m, …)`."""
        convolution = convolution_of(module, weight)
        if weight.ndim == 1:
            s = outputs.movedim(2, -1) if isinstance(module, _ConvNd) else outputs
            return cls(convolution, s.new_ones(1).expand(*s.shape[:-1], 1), s)
        if inputs_first(module):
            return cls(convolution, outputs, inputs)
        return cls(convolution, inputs, outputs)

    @classmethod
    def joined(cls, parts: Sequence[LayerRows]) -> LayerRows:
        """The rows of several chunks as one; sequences of other lengths are filled up with zeros."""
        inputs, outputs = [part.inputs for part in parts], [part.outputs for part in parts]
        if parts[0].convolution is None and len({part.positions for part in parts}) > 1:
            most = max(part.positions for part in parts)
            inputs, outputs = (
                [F.pad(flat := t.flatten(1, -2), (0, 0, 0, most - flat.shape[1]))[:, None] for t in tensors]
                for tensors in (inputs, outputs)
            )
        shapes = {(a.shape[1:], s.shape[1:]) for a, s in zip(inputs, outputs, strict=True)}
        if len(shapes) > 1:
            raise WoodfisherError(
                "the inputs of a convolution have several sizes, whose rows can't be kept together in factor form: "
                "keep them in memory or on disk."
            )
        return replace(parts[0], inputs=torch.cat(inputs), outputs=torch.cat(outputs))

    @property
    def count(self) -> int:
        """Rows, N."""
        return len(self.outputs)

    @property
    def dtype(self) -> torch.dtype:
        """Of dense rows: float32, or float64 for a float64 model."""
        return torch.promote_types(self.outputs.dtype, torch.float32)

    @property
    def groups(self) -> int:
        """Groups of output channels that see inputs of their own."""
        return 1 if self.convolution is None else self.convolution.groups

    @property
    def channels(self) -> int:
        """Output channels: the first dimension of the weight."""
        return self.outputs.shape[-1 if self.convolution is None else 2]

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

    @property
    def width(self) -> int:
        """Weights of an output channel."""
        if self.convolution is None:
            return self.inputs.shape[-1]
        return self.inputs.shape[2] // self.groups * torch.Size(self.convolution.kernel_size).numel()

    @property
    def size(self) -> int:
        """Weights of the layer, channels · width."""
        return self.channels * self.width

    @property
    def positions(self) -> int:
        """Terms that a row is the sum of, T: samples, and places in a sequence or an image."""
        return self.outputs[0].numel() // self.channels

    @property
    def factors(self) -> Factors:
        """What a row of these takes."""
        inputs, outputs = (t[0].numel() for t in (self.inputs, self.outputs))
        patches = self.positions * self.width
        unfolded = inputs + patches + outputs if self._has_patches else 0
        return Factors(inputs + outputs, 2 * self.positions * self.size, unfolded)

    def part(self, rows: slice) -> LayerRows:
        """Some of the rows."""
        return replace(self, inputs=self.inputs[rows], outputs=self.outputs[rows])

    def terms(self, groups: slice | None = None) -> tuple[Tensor, Tensor]:
        """S `(N, groups, channels, T)` and A `(N, groups, width, T)` with SAᵀ the rows, for some groups."""
        groups = slice(0, self.groups) if groups is None else groups
        if self.convolution is None:
            return self.outputs.flatten(1, -2).mT[:, None], self.inputs.flatten(1, -2).mT[:, None]
        s = self.outputs.unflatten(2, (self.groups, -1))[:, :, groups]
        return s.flatten(4).movedim(1, 3).flatten(3), self._patches(groups)

    def all_terms(self, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The s and a of all rows, n at a time: float64 `(groups, channels, n)` and `(groups, width, n)`.

        These and the next ones together take at most `most` bytes, but those of a sample of a sequence, or of a line of
        an image, at least.
        """
        row = 2 * 8 * self.positions * (self.channels + self.groups * self.width)
        most = min(most, _WORKSPACE)
        lines = self.positions if self.convolution is None else self.outputs.shape[3]
        rows, step = max(most // row, 1), max(lines * most // row, 1)
        for first in range(0, self.count, rows):
            part = self.part(slice(first, first + rows))
            for line in range(0, lines, step):
                yield part._terms_together(slice(line, line + step))

    def _terms_together(self, lines: slice) -> tuple[Tensor, Tensor]:
        """The s and a of all rows, of some positions of a sequence or some lines of an image, as `all_terms`."""
        if self.convolution is None:
            s, a = (t.flatten(1, -2)[:, lines].double().flatten(0, 1).mT for t in (self.outputs, self.inputs))
            return s[None], a[None]
        n = len(self.convolution.kernel_size)
        S = self.outputs.unflatten(2, (self.groups, -1))[:, :, :, :, lines]
        A = self._windows(slice(0, self.groups)).narrow(4 + n, lines.start, S.shape[4])
        s, a = (
            t.movedim((0, 1), (k, k + 1)).to(torch.float64, memory_format=torch.contiguous_format).flatten(k)
            for t, k in ((S, 2), (A, 2 + n))
        )
        return s, a.flatten(1, 1 + n)

    def unfolded(self) -> LayerRows:
        """The same rows with patches for inputs, where dense ones are made of these: for several parts of them."""
        if not self._has_patches:
            return self
        S, A = self.terms()
        return LayerRows(None, A[:, 0].mT, S[:, 0].mT)

    def dense(self, channels: slice | None = None, out: Tensor | None = None) -> Tensor:
        """The rows for these output channels (default: all) in the weight's own order, `(N, channels · width)`.

        Parameters
        ----------
        out:
            Where to write them to.
        """
        channels = slice(0, self.channels) if channels is None else channels
        each = self.channels // self.groups
        groups = slice(channels.start // each, -(-channels.stop // each))
        inside = slice(channels.start - groups.start * each, channels.stop - groups.start * each)
        if self._faster_by_groups:
            rows = self._by_groups(groups, inside)
        else:
            S, A = (t.to(self.dtype) for t in self.terms(groups))
            if self.groups == 1:
                S, A = S[:, 0, inside], A[:, 0].mT
                if out is not None and out.dtype == S.dtype:
                    torch.bmm(S, A, out=out.unflatten(1, (S.shape[1], A.shape[2])))
                    return out
                rows = S @ A
            else:
                rows = (S @ A.mT).flatten(1, 2)[:, inside]
        return rows.flatten(1).to(self.dtype) if out is None else out.copy_(rows.flatten(1))

    def select(self, index: Tensor, out: Tensor) -> None:
        """Write the rows for some of the layer's weights, int64 `(k,)` and ascending, to `out` `(N, k)`.

        Dense rows are made of a few channels at a time. Of a span of weights that are products of patches, whole
        channels are made in place, the first and the last one alone where the span has a part of them.
        """
        if not len(index):
            return
        rows, channels = self.unfolded(), index // self.width
        step = max(_WORKSPACE // (self.count * self.width * self.dtype.itemsize), 1)
        lowest, highest = int(index[0]), int(index[-1])
        first, last = lowest // self.width, highest // self.width + 1
        in_place = highest - lowest < len(index) and not self._faster_by_groups
        begin, end = (-(-lowest // self.width), (highest + 1) // self.width) if in_place else (first, last)
        bounds = sorted({first, *range(begin, end, step), end, last})
        places = torch.searchsorted(channels, torch.tensor(bounds, device=channels.device)).tolist()
        for (start, stop), (left, right) in zip(pairwise(bounds), pairwise(places), strict=True):
            if right == left:
                continue
            here = out[:, left:right]
            if right - left == (stop - start) * self.width:
                rows.dense(slice(start, stop), out=here)
                continue
            dense, inside = rows.dense(slice(start, stop)), index[left:right] - start * self.width
            low, high = int(inside[0]), int(inside[-1]) + 1
            if high - low == right - left:
                here.copy_(dense[:, low:high])
            else:
                torch.index_select(dense.to(here.dtype), 1, inside, out=here)

    def gram(self) -> Tensor:
        """Inner products of the rows, float64 `(N, N)`.

        From (a aᵀ)(s sᵀ) of all pairs of positions, or from dense rows, whose products are added up in float64.
        """
        N, T = self.count, self.positions
        K = torch.zeros(N, N, dtype=torch.float64, device=self.outputs.device)
        by_terms = N * T * T * (self.channels + self.groups * self.width)
        if by_terms > (N + T) * self.size:
            product = torch.empty(1, N, N, dtype=self.dtype, device=K.device)
            for _, G in self._tiles():
                K += gram_triangles(G[None], product)[0]
            return mirrored(K)
        of_products = math.isqrt(_WORKSPACE // (32 * self.groups)) // T
        of_terms = _WORKSPACE // (32 * T * (self.channels + self.groups * self.width))
        step = max(min(of_products, of_terms), 1)
        parts = [slice(first, min(first + step, N)) for first in range(0, N, step)]
        for i, here in enumerate(parts):
            S, A = self.part(here)._all_terms_of_groups()
            for other in parts[i:]:
                Z, B = (S, A) if other is here else self.part(other)._all_terms_of_groups()
                products = (S @ Z.mT).mul_(A @ B.mT)
                block = products.unflatten(2, (-1, T)).unflatten(1, (-1, T)).sum((0, 2, 4))
                K[here, other], K[other, here] = block, block.mT
        return K

    def _all_terms_of_groups(self) -> tuple[Tensor, Tensor]:
        """The s and a of all rows in float64, `(groups, N·T, channels)` and `(groups, N·T, width)`."""
        S, A = (t.double().movedim(0, 1).mT.flatten(1, 2) for t in self.terms())
        return S, A

    def most_norms(self) -> Tensor:
        """Norms of the rows at most, `(N,)`: those of what flows in times those of what flows back.

        What a convolution pads its inputs to is in one patch at most for each place of the kernel.
        """
        inputs, places = self.inputs, 1
        if self.convolution is not None:
            inputs = self._padded().unflatten(0, inputs.shape[:2])
            places = torch.Size(self.convolution.kernel_size).numel()
        flowing, back = (t.to(self.dtype).flatten(1).norm(dim=1) for t in (inputs, self.outputs))
        return places**0.5 * flowing * back

    def squares(self) -> Tensor:
        """Squares of the rows, summed over them: float64 `(size,)`, in the weight's own order."""
        if self.positions == 1:
            S, A = (t[..., 0].double().square() for t in self.terms())
            return torch.einsum("ngc,ngw->gcw", S, A).flatten()
        total = self.outputs.new_empty(self.size, dtype=torch.float64)
        for columns, G in self._tiles():
            total[columns] = G.double().square().sum(0)
        return total

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns of dense rows and the rows there, some channels at a time; patches are taken once for all."""
        rows = self.unfolded()
        step = max(_WORKSPACE // (self.dtype.itemsize * self.count * self.width), 1)
        for first in range(0, self.channels, step):
            last = min(first + step, self.channels)
            yield slice(first * self.width, last * self.width), rows.dense(slice(first, last))

    @property
    def _has_patches(self) -> bool:
        return self.convolution is not None and self.groups == 1 and not self._faster_by_groups

    @property
    def _faster_by_groups(self) -> bool:
        """Whether a convolution of as many groups as there are rows is faster than products of patches.

        Patches repeat each input as often as the kernel covers it, which costs more than it saves where there are
        many positions for few channels; torch's convolutions are slow for few inputs, as those of a first layer.
        """
        if self.convolution is None or self.width == self.inputs.shape[2] // self.groups:
            return False
        few_inputs = self.groups == 1 and self.inputs.shape[2] < 8
        return not few_inputs and self.positions * self.groups > self.channels

    def _patches(self, groups: slice) -> Tensor:
        """The a of a convolution, `(N, groups, width, T)`."""
        assert self.convolution is not None
        n = len(self.convolution.kernel_size)
        return self._windows(groups).movedim(1, 3 + n).flatten(3 + n).flatten(2, 2 + n)

    def _windows(self, groups: slice) -> Tensor:
        """The same as a view of what is padded, `(N, m, groups, in, *kernel, *out)`."""
        assert self.convolution is not None
        x = self._padded().unflatten(1, (self.groups, -1))[:, groups]
        kernel, out = self.convolution.kernel_size, self.outputs.shape[3:]
        steps = x.stride()[3:]
        windows = x.as_strided(
            (*x.shape[:3], *kernel, *out),
            (
                *x.stride()[:3],
                *(step * gap for step, gap in zip(steps, self.convolution.dilation, strict=True)),
                *(step * stride for step, stride in zip(steps, self.convolution.stride, strict=True)),
            ),
            x.storage_offset(),
        )
        return windows.unflatten(0, self.inputs.shape[:2])

    def _padded(self) -> Tensor:
        """Inputs of a convolution as it pads them, samples in one dimension."""
        assert self.convolution is not None
        x = self.inputs.flatten(0, 1)
        padding = self.convolution._reversed_padding_repeated_twice
        mode = self.convolution.padding_mode
        return F.pad(x, padding, "constant" if mode == "zeros" else mode) if any(padding) else x

    def _by_groups(self, groups: slice, channels: slice) -> Tensor:
        """Rows for some groups, and of these for some channels, by one backward pass of a convolution."""
        conv = self.convolution
        assert conv is not None
        N, m = self.inputs.shape[:2]
        padding: Sequence[int] = conv.padding  # type: ignore[assignment]
        if conv.padding_mode == "zeros" and not isinstance(conv, _ConvTransposeNd) and conv.padding != "same":
            x = self.inputs
            padding = [0] * len(conv.kernel_size) if conv.padding == "valid" else padding
        else:
            reach: list[Any] = [
                slice(0, (out - 1) * stride + (kernel - 1) * gap + 1)
                for out, stride, kernel, gap in zip(
                    self.outputs.shape[3:], conv.stride, conv.kernel_size, conv.dilation, strict=True
                )
            ]
            x = self._padded()[(..., *reach)].unflatten(0, (N, m))
            padding = [0] * len(reach)
        s = self.outputs
        if self.groups > 1:
            x, s = (t.unflatten(2, (self.groups, -1))[:, :, groups].flatten(2, 3) for t in (x, s))
        else:
            s = s[:, :, channels]
        kernel_shape = (N * s.shape[2], self.width // torch.Size(conv.kernel_size).numel(), *conv.kernel_size)
        channels_last = s.device.type == "cpu" and s.stride(2) == 1
        gradient = torch.ops.aten.convolution_backward(
            _side_by_side(s, channels_last),
            _side_by_side(x, channels_last),
            s.new_empty(1).expand(kernel_shape),
            None,
            conv.stride,
            padding,
            conv.dilation,
            False,
            [0] * len(padding),
            N * (groups.stop - groups.start),
            [False, True, False],
        )[1].unflatten(0, (N, -1))
        return gradient[:, channels] if self.groups > 1 else gradient


def convolution_of(module: nn.Module, weight: Tensor) -> _ConvNd | None:
    """The module, where rows of its weight are made of patches of its inputs."""
    return module if isinstance(module, _ConvNd) and weight.ndim > 1 else None


def _side_by_side(tensor: Tensor, channels_last: bool) -> Tensor:
    """The channels of all rows at once, `(N, m, c, …)` as `(m, N·c, …)`, in that order of memory or with them last."""
    if channels_last:
        return tensor.movedim((0, 2), (-2, -1)).flatten(-2).movedim(-1, 1)
    return tensor.transpose(0, 1).flatten(1, 2)
