"""Patterns: which weights are removed together, and how many must stay together."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch

from woodfisher.checks import check_count
from woodfisher.errors import WoodfisherError

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.layout import Layout


class Pattern(ABC):
    """What is removed together.

    Weights are seen as `(outputs, inputs, positions)`: those of a Linear layer as `(outputs, inputs, 1)`, those of a
    convolution with one position for each entry of its kernel. Patterns are values: frozen and comparable.
    """

    @abstractmethod
    def groups(self, layout: Layout) -> list[Tensor] | None:
        """Flat indexes of what goes together, int64 `(m, k)` for each size k; None for weights one by one.

        Every chosen weight stands in exactly one group.
        """

    def quota(self, layout: Layout) -> tuple[Tensor, int] | None:
        """Flat indexes of sets, int64 `(s, m)`, and how many single weights stay in each; None without such."""
        return None


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Weights one by one."""

    def groups(self, layout: Layout) -> None:
        return None

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM(Pattern):
    """N:M: of every `m` neighbours along the inputs, `n` stay.

    The pattern holds at the sparsity 1 − n/m and at no other. On the way there, in stages or in training, every set
    keeps at least n and the cheapest of the others go first, wherever they are.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        check_count("n", self.n)
        check_count("m", self.m)
        if self.n >= self.m:
            raise WoodfisherError(f"n:m keeps n of m weights, with n < m; {self.n}:{self.m} came.")

    @property
    def sparsity(self) -> float:
        """1 − n/m."""
        return 1 - self.n / self.m

    def groups(self, layout: Layout) -> None:
        return None

    def quota(self, layout: Layout) -> tuple[Tensor, int]:
        sets = [_tiles(layout, name, 1, self.m, str(self)) for name in layout.shapes]
        return torch.cat(sets), self.n

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `outputs` × `inputs` neighbours go together: `Block(4)` is 1×4, `Block(4, 4)` is 4×4."""

    inputs: int = 4
    outputs: int = 1

    def __post_init__(self) -> None:
        check_count("inputs", self.inputs)
        check_count("outputs", self.outputs)

    def groups(self, layout: Layout) -> list[Tensor]:
        return [
            torch.cat([_tiles(layout, name, self.outputs, self.inputs, str(self)) for name in layout.shapes])
        ]

    def __str__(self) -> str:
        return f"{self.outputs}x{self.inputs}"


@dataclass(frozen=True)
class Channels(Pattern):
    """All weights of an output channel (of an output neuron of a Linear layer) go together."""

    def groups(self, layout: Layout) -> list[Tensor]:
        return _by_width([layout.index(name).flatten(1) for name in layout.shapes])

    def __str__(self) -> str:
        return "channels"


@dataclass(frozen=True)
class Heads(Pattern):
    """Attention heads: a head's rows of the query, key and value weights go with its columns of the output weight.

    The chosen parameters must be those of attention layers and no others: for each layer, in the model's order,
    its query, key and value weights (or all of them in one) and then its output weight.

    Attributes
    ----------
    heads:
        Heads of a layer.
    inputs:
        Shell patterns of the names of query, key and value weights; the defaults fit torch and most of Hugging
        Face.
    """

    heads: int
    inputs: tuple[str, ...] = (
        "*in_proj_weight*",
        "*query*",
        "*key*",
        "*value*",
        "*.[qkv]_*",
        "*qkv*",
        "*c_attn*",
    )

    def __post_init__(self) -> None:
        check_count("heads", self.heads)

    def groups(self, layout: Layout) -> list[Tensor]:
        layers: list[Tensor] = []
        inputs: list[str] = []
        for name in layout.shapes:
            if any(fnmatchcase(name, pattern) for pattern in self.inputs):
                inputs.append(name)
            elif not inputs:
                raise WoodfisherError(
                    f"heads are made of query, key and value weights ({', '.join(self.inputs)}) and the output weight "
                    f"that follows them, and {name!r} is none of those: choose attention weights alone with params=."
                )
            else:
                layers.append(self._of_layer(layout, inputs, name))
                inputs = []
        if inputs:
            raise WoodfisherError(
                f"no output weight follows {inputs[-1]!r}: choose that one too with params=."
            )
        return _by_width(layers)

    def _of_layer(self, layout: Layout, inputs: list[str], output: str) -> Tensor:
        columns = layout.index(output)[:, :, 0].mT
        width = len(columns)
        parts = [columns]
        for name in inputs:
            rows = layout.index(name)[:, :, 0]
            if len(rows) % width or width % self.heads:
                raise WoodfisherError(
                    f"{name!r} of shape {tuple(layout.shapes[name])} with the output weight {output!r} of shape "
                    f"{tuple(layout.shapes[output])} can't be cut into {self.heads} heads: give the number that the "
                    "layer has."
                )
            parts += rows.split(width)
        return torch.cat([part.reshape(self.heads, -1) for part in parts], dim=1)

    def __str__(self) -> str:
        return f"{self.heads}heads"


def parse_pattern(text: str) -> Pattern:
    """The pattern that the command line calls `unstructured`, `2:4`, `1x4`, `12heads` or `channels`.

    >>> parse_pattern("2:4"), parse_pattern("4x4"), parse_pattern("channels")
    (NM(n=2, m=4), Block(inputs=4, outputs=4), Channels())
    """
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        return Block(inputs=int(match[2]), outputs=int(match[1]))
    if match := re.fullmatch(r"(\d+)heads", text):
        return Heads(int(match[1]))
    named: dict[str, Pattern] = {"unstructured": Unstructured(), "channels": Channels()}
    if text not in named:
        raise WoodfisherError(
            "a pattern is one of unstructured, N:M as in 2:4, blocks of OUTPUTSxINPUTS as in 1x4, channels, or "
            f"heads as in 12heads; {text!r} came."
        )
    return named[text]


def _tiles(layout: Layout, name: str, outputs: int, inputs: int, pattern: str) -> Tensor:
    """Flat indexes of all tiles of a weight, `(tiles, outputs · inputs)`."""
    index = layout.index(name)
    rows, columns, positions = index.shape
    if rows % outputs or columns % inputs:
        raise WoodfisherError(
            f"the pattern {pattern} does not divide {name!r}, which has {rows} outputs and {columns} inputs: leave "
            f"the layer out with exclude={name!r}, or take a pattern that divides it."
        )
    tiles = index.reshape(rows // outputs, outputs, columns // inputs, inputs, positions)
    return tiles.permute(0, 2, 4, 1, 3).reshape(-1, outputs * inputs)


def _by_width(groups: list[Tensor]) -> list[Tensor]:
    """Groups of the same size in one tensor."""
    widths = dict.fromkeys(group.shape[1] for group in groups)
    return [torch.cat([group for group in groups if group.shape[1] == width]) for width in widths]
