"""Images with their labels, held in memory or decoded when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from woodfisher.errors import WoodfisherError, extra

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

CLASSES = 10
"""MNIST and CIFAR-10 both have ten."""


class Images(Protocol):
    """Images that an array of `n` positions picks from: `n × channels × height × width`, bytes."""

    def __len__(self) -> int: ...

    def __getitem__(self, positions: NDArray[np.int64], /) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes, `labels[i]` in 0 … 9; made by `labelled`, which checks them."""

    images: Images
    labels: NDArray[np.int64]


def labelled(images: Images, labels: ArrayLike, source: Path) -> LabelledImages:
    """Put images and labels together; `source` is the file or folder that messages name."""
    classes = np.asarray(labels)
    if classes.ndim != 1 or len(classes) != len(images) or not len(images):
        raise WoodfisherError(
            f"{source} must hold one label for each of its images; {len(images)} images and labels of shape "
            f"{classes.shape} came."
        )
    whole = classes.dtype.kind in "iu"
    if not whole or classes.min() < 0 or classes.max() >= CLASSES:
        came = f"{classes.min()} to {classes.max()}" if whole else f"labels of type {classes.dtype}"
        raise WoodfisherError(
            f"labels in {source} must be whole numbers from 0 to {CLASSES - 1}; {came} came."
        )
    return LabelledImages(images, classes.astype(np.int64))


@dataclass(frozen=True)
class EncodedImages:
    """32 × 32 JPEG or PNG images that stay encoded until they are picked; each is decoded once.

    Attributes
    ----------
    encoded:
        For each image the file that holds it, or its bytes.
    origin:
        What messages call images that are given as bytes.
    """

    encoded: Sequence[Path | NDArray[np.uint8]]
    origin: str
    _pixels: dict[int, NDArray[np.uint8]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        with extra("tasks", f"decoding the images of {self.origin} needs Pillow"):
            import PIL.Image  # noqa: F401

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, positions: NDArray[np.int64], /) -> NDArray[np.uint8]:
        return np.stack([self._picked(int(position)) for position in positions])

    def _picked(self, position: int) -> NDArray[np.uint8]:
        if position not in self._pixels:
            self._pixels[position] = self._decoded(position)
        return self._pixels[position]

    def _decoded(self, position: int) -> NDArray[np.uint8]:
        from PIL import Image

        source = self.encoded[position]
        name = source if isinstance(source, Path) else f"image {position} of {self.origin}"
        try:
            with Image.open(source if isinstance(source, Path) else BytesIO(source.tobytes())) as image:
                if image.size != (32, 32):
                    raise WoodfisherError(
                        f"images must be 32 × 32 pixels; {name} has {image.width} × {image.height}."
                    )
                pixels = np.asarray(image.convert("RGB"), np.uint8)
        except WoodfisherError:
            raise
        except Exception as error:  # the decoders fail in many ways on damaged bytes
            raise WoodfisherError(
                f"{name} cannot be decoded ({error}). Expected was a JPEG or PNG image: fetch the data again."
            ) from error
        return pixels.transpose(2, 0, 1)


def flipped_and_shifted(images: Tensor, pixels: int, fill: float) -> Tensor:
    """Each image mirrored or not, and moved by up to `pixels` either way, with `fill` where nothing was.

    `N × channels × height × width`, channels last; random numbers come from torch's global generator.
    """
    count, channels, height, width = images.shape
    down, right = torch.randint(2 * pixels + 1, (2, count, 1))
    rows = down + torch.arange(height)
    columns = right + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    sample, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[:, None, None]
    index = (
        part.to(images.device)
        for part in (sample, channel, rows[:, None, :, None], columns[:, None, None, :])
    )
    moved = pad(images, (pixels,) * 4, value=fill)[tuple(index)]
    return moved.contiguous(memory_format=torch.channels_last)
