"""The pickled batches of the python version of CIFAR-10, read without running what a pickle may ask for."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

from woodfisher.errors import WoodfisherError
from woodfisher.files import unreadable

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


class _Dtype:
    """Stands in for `numpy.dtype`: remembers the name, and only that."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        """Byte order and the like say nothing about bytes."""


class _Array:
    """Stands in for a `numpy.ndarray` ; takes unsigned bytes and no other type."""

    def __init__(self, *_: object) -> None:
        self.values: NDArray[np.uint8] = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, column_major, data = state
        if dtype.name != "u1":
            raise pickle.UnpicklingError(f"an array of type {dtype.name} came, and u1 was expected")
        self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if column_major else "C")


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes are encoded as {encoding}, and latin1 was expected")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    """Knows the few names above, all of them harmless stand-ins, and imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no CIFAR-10 batch contains: refused"
            )
        return _ADMITTED[module, name]


def read_python_batch(path: Path) -> tuple[NDArray[np.uint8], list[int]]:
    """Read one batch: images `N × 3 × 32 × 32` and `N` labels."""
    expected = "a batch of the python version of CIFAR-10 (data: N × 3072 bytes, labels: N numbers)"
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
    except Exception as error:  # malformed bytes may make a pickle fail in any way
        raise unreadable(path, expected, error) from error
    data, labels = (_field(content, name) for name in ("data", "labels"))
    images = data.values if isinstance(data, _Array) else np.empty(0, np.uint8)
    if images.ndim != 2 or images.shape[1] != 3072:
        raise WoodfisherError(f"{path} must be {expected}; data of shape {images.shape} came.")
    if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
        raise WoodfisherError(f"{path} must be {expected}; its labels are no list of whole numbers.")
    return images.reshape(-1, 3, 32, 32), labels


def _field(content: object, name: str) -> object:
    """Python 2 wrote the names as bytes, Python 3 writes text."""
    return content.get(name.encode(), content.get(name)) if isinstance(content, dict) else None
