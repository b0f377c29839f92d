"""Patterns: which weights are removed together, and how many must stay together."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from woodfisher.checks import check_count
from woodfisher.errors import WoodfisherError

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor, nn

    from woodfisher.gradients.layout import Layout


class Pattern(ABC):
    """What is removed together.

    Weights are seen as `(outputs, inputs, positions)`: those of a Linear layer as `(outputs, inputs, 1)`, those of a
    convolution with one position for each entry of its kernel. Patterns are values: frozen and comparable.
    """

    @property
    def sparsity(self) -> float | None:
        """The one sparsity at which the pattern holds; None where any will do."""
        return None

    @property
    def whole_outputs(self) -> bool:
        """Whether what goes together are the weights of one output each."""
        return False

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
    """All weights of an output channel (of an output neuron of a Linear layer) go together.

    A channel that is to be cut out of the network has to be silent, its bias and what normalisation adds to it
    included, and channels that meet in a sum have to go together: `of` finds what that takes.

    Attributes
    ----------
    coupled:
        Names of parameters whose i-th output channels are one group: weights, biases, weights and biases of
        normalisation. `norm.weight[16:32]` is that part of a parameter. What no entry names goes by the output
        channels of each parameter alone.

    Examples
    --------
    >>> import torch
    >>> from woodfisher.gradients.layout import Layout
    >>> layout = Layout({"fc.weight": (2, 3), "fc.bias": (2,)})
    >>> Channels((("fc.weight", "fc.bias"),)).groups(layout)
    [tensor([[0, 1, 2, 6],
            [3, 4, 5, 7]])]
    """

    coupled: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any) -> Channels:
        """The pattern of all channels that can be cut out of a model; needs `woodfisher[channels]`.

        Those that can't are left out, and belong in no `params`: channels of the outputs, channels whose number
        the model's own code relies on, and those that still say something when they are zero (in front of a
        sigmoid, or of a normalisation over channels).

        Parameters
        ----------
        model:
            Any module; it stays as it is.
        example_inputs:
            What the model takes, as in a batch `(inputs, targets)`: a tensor, a tuple, or a dict.

        Raises
        ------
        WoodfisherError
            If the model can't be traced, or none of its channels can be cut out.
        """
        from woodfisher.surgeon.channels import coupled_channels

        return cls(coupled_channels(model, example_inputs))

    @property
    def whole_outputs(self) -> bool:
        return True

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the coupled parameters, as `params` of `Objective` takes them."""
        return tuple(dict.fromkeys(part_of(name)[0] for entry in self.coupled for name in entry))

    def without(self, names: Collection[str]) -> Channels:
        """The pattern less each group that has one of these parameters."""
        kept = (entry for entry in self.coupled if not any(part_of(name)[0] in names for name in entry))
        return Channels(tuple(kept))

    def groups(self, layout: Layout) -> list[Tensor]:
        missing = [name for name in self.params if name not in layout.shapes]
        if missing:
            raise WoodfisherError(
                f"the pattern couples {missing[0]!r}, which is not among the chosen parameters: choose all that it "
                "couples, with params=pattern.params."
            )
        left = {name: layout.index(name).flatten(1) for name in layout.shapes}
        free = {name: torch.ones(len(index), dtype=torch.bool) for name, index in left.items()}
        groups = []
        for entry in self.coupled:
            rows = []
            for member in entry:
                name, part = part_of(member)
                rows.append(left[name][part])
                if not free[name][part].all():
                    raise WoodfisherError(f"the pattern names channels of {name!r} twice: name each once.")
                free[name][part] = False
            if len({len(index) for index in rows}) != 1:
                raise WoodfisherError(
                    "coupled parameters have the same number of channels, and these have not: "
                    f"{', '.join(f'{name} {len(index)}' for name, index in zip(entry, rows, strict=True))}."
                )
            groups.append(torch.cat(rows, dim=1))
        alone = [index[free[name]] for name, index in left.items() if free[name].any()]
        return _by_width([*groups, *alone])

    def __str__(self) -> str:
        return "coupled-channels" if self.coupled else "channels"


_BY_HEAD = "query_key_value"
"""In names of weights that hold query, key and value of the first head, then those of the second, and so on."""


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
        Face. Where one weight holds all three, they follow one another, but for names with `query_key_value` (GPT-NeoX,
        BLOOM), where each head's three lie together.
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
                    f"that follows them, and {name!r} is none of those: choose attention weights alone with params=, "
                    "as in params=['*.query.weight', '*.key.weight', '*.value.weight', "
                    "'*.attention.output.dense.weight'] for BERT."
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
            whole = len(rows) in (width, 3 * width)
            if not whole or width % self.heads:
                raise WoodfisherError(
                    f"{name!r} of shape {tuple(layout.shapes[name])} with the output weight {output!r} of shape "
                    f"{tuple(layout.shapes[output])} can't be cut into {self.heads} heads: "
                    + (
                        "give the number that the layer has."
                        if whole
                        else "heads that share keys and values (grouped-query attention) are not supported."
                    )
                )
            parts += [rows] if _BY_HEAD in name else rows.split(width)
        return torch.cat([part.reshape(self.heads, -1) for part in parts], dim=1)

    def __str__(self) -> str:
        return f"{self.heads}heads"


def parse_pattern(text: str) -> Pattern:
    """The pattern that the command line calls `unstructured`, `2:4`, `1x4`, `12heads` or `channels`.

    >>> parse_pattern("2:4"), parse_pattern("4x4"), parse_pattern("channels")
    (NM(n=2, m=4), Block(inputs=4, outputs=4), Channels(coupled=()))
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
            "a pattern is one of unstructured, N:M as in 2:4, blocks of OUTPUTSxINPUTS as in 1x4, channels, "
            f"coupled-channels, or heads as in 12heads; {text!r} came."
        )
    return named[text]


def part_of(member: str) -> tuple[str, slice]:
    """A parameter's name and the channels of it that a member of a group names.

    >>> part_of("norm.weight[16:32]"), part_of("conv.weight")
    (('norm.weight', slice(16, 32, None)), ('conv.weight', slice(None, None, None)))
    """
    match = re.fullmatch(r"(.+)\[(\d+):(\d+)\]", member)
    return (match[1], slice(int(match[2]), int(match[3]))) if match else (member, slice(None))


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
