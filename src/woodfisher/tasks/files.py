"""Reading data files; whatever is missing, cut short or of another kind ends in one clear error."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from woodfisher.errors import WoodfisherError
from woodfisher.files import unreadable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray


def data_folder(data_root: Path | None, task: str, accepted: str) -> Path:
    """Return `data_root` if it is a folder; `accepted` tells the user which files the task reads."""
    if data_root is not None and data_root.is_dir():
        return data_root
    came = "no data folder was given" if data_root is None else f"{data_root} is not a folder"
    raise WoodfisherError(
        f"the task {task} needs data, and {came}. Pass as data_root (--data-root), or in the environment "
        f"variable WOODFISHER_DATA, a folder that holds {accepted}."
    )


def read_npz(path: Path, keys: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Read the named arrays of a NumPy archive; nothing pickled is admitted."""
    keys = list(keys)
    expected = f"a NumPy archive (.npz) with {', '.join(keys)}"
    try:
        with zipfile.ZipFile(path) as archive:
            present = {name.removesuffix(".npy") for name in archive.namelist()}
        missing = [key for key in keys if key not in present]
        if missing:
            raise WoodfisherError(
                f"{path} must be {expected}; it lacks {', '.join(missing)} and has "
                f"{', '.join(sorted(present)) or 'nothing'}."
            )
        with np.load(path, allow_pickle=False) as arrays:
            return {key: np.asarray(arrays[key]) for key in keys}
    except WoodfisherError:
        raise
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise unreadable(path, expected, error) from error


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of bytes, plain or `.gz`: four magic bytes, big-endian sizes, then the values."""
    expected = f"an IDX file of bytes in {dimensions} dimension{'s' if dimensions > 1 else ''}"
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if raw[:4] != bytes((0, 0, 8, dimensions)):
            raise ValueError(f"it starts with the bytes {raw[:4].hex(' ') or 'of an empty file'}")
        shape = np.frombuffer(raw, ">u4", dimensions, offset=4).tolist()
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
        if len(values) != math.prod(shape):
            raise ValueError(f"{math.prod(shape)} values are announced, and {len(values)} came")
        return values.reshape(shape)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise unreadable(path, expected, error) from error
