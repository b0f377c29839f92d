"""What a file of weights holds, tensor by tensor."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from woodfisher.files import unreadable
from woodfisher.saving.saved import EXPECTED, SPARSE_PARTS, exported_in, read, sparse_matrix
from woodfisher.saving.structure import structure_of

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.saving.saved import Saved


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes
    ----------
    name, shape, dtype:
        As in the state dict.
    size, kept:
        Numbers in it, and those of them that the file's mask keeps, or that are not zero where it has no mask.
    pattern:
        As `structure_of` names it; None for scalars, vectors that nothing is removed from, and whole numbers.
    dense, stored:
        Bytes uncompressed, and in the file with the mask.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    kept: int
    pattern: str | None
    dense: int
    stored: int

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return 1 - self.kept / self.size if self.size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "shape": list(self.shape), "sparsity": self.sparsity}


@dataclass(frozen=True)
class Contents:
    """A file of weights.

    Attributes
    ----------
    entries:
        Its tensors, in order of their names.
    size:
        Bytes of the file.
    written_by:
        The version of woodfisher that wrote it, or None.
    """

    entries: list[Entry]
    size: int
    written_by: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; `sparsity` is that of the tensors which have a pattern."""
        layers = self.layers
        size, kept = sum(each.size for each in layers), sum(each.kept for each in layers)
        return {
            "woodfisher": self.written_by,
            "size": size,
            "kept": kept,
            "sparsity": 1 - kept / size if size else 0.0,
            "bytes": {"dense": sum(each.dense for each in self.entries), "stored": self.size},
            "layers": [each.to_dict() for each in self.entries],
        }

    @property
    def layers(self) -> list[Entry]:
        """The tensors which have a pattern."""
        return [each for each in self.entries if each.pattern is not None]


def contents_of(path: str | Path) -> Contents:
    """Look into a `.safetensors` file, compressed, plain or exported, or a state dict in a `.pt` file."""
    path = Path(path)
    saved = read(path)
    try:
        tensors, stored = _with_weights(saved)
    except (KeyError, ValueError, RuntimeError) as error:
        raise unreadable(path, EXPECTED, error) from error
    entries = [
        _entry(name, tensor, saved.kept.get(name), stored[name], turned=name in saved.inputs_first)
        for name, tensor in sorted(tensors.items())
    ]
    return Contents(entries, saved.size, saved.metadata.get("woodfisher"))


def _with_weights(saved: Saved) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors and their bytes in the file by name, where sparse layers have the weight that theirs are of."""
    tensors, stored = dict(saved.tensors), dict(saved.stored)
    for layer, shape in exported_in(saved.metadata)[0].items():
        parts = [f"{layer}.{part}" for part in SPARSE_PARTS]
        rows, columns, values = (tensors.pop(part) for part in parts)
        matrix = sparse_matrix(rows, columns, values, (shape[0], math.prod(shape[1:])), check=True)
        tensors[f"{layer}.weight"] = matrix.to_dense().reshape(shape)
        stored[f"{layer}.weight"] = sum(stored.pop(part) for part in parts)
    return tensors, stored


def _entry(name: str, tensor: Tensor, mask: Tensor | None, stored: int, *, turned: bool) -> Entry:
    kept = tensor != 0 if mask is None else mask
    weight = tensor.is_floating_point() and tensor.numel() > 0
    told = weight and (mask is not None or tensor.ndim > 1)
    return Entry(
        name,
        tuple(tensor.shape),
        str(tensor.dtype).removeprefix("torch."),
        tensor.numel(),
        int(kept.sum()) if weight else tensor.numel(),
        structure_of(kept.transpose(0, 1) if turned and kept.ndim > 1 else kept) if told else None,
        tensor.numel() * tensor.element_size() if stored else 0,
        stored,
    )
