"""ResNet-20 on CIFAR-10."""

from __future__ import annotations

from functools import partial
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

from woodfisher.errors import WoodfisherError
from woodfisher.tasks.base import Task, accuracy
from woodfisher.tasks.files import data_folder, read_npz
from woodfisher.tasks.images import CLASSES, EncodedImages, LabelledImages, flipped_and_shifted, labelled
from woodfisher.tasks.loaders import image_loaders
from woodfisher.tasks.pickles import read_python_batch
from woodfisher.tasks.weights import find_weights, restored

if TYPE_CHECKING:
    from pathlib import Path

ARCHIVE = "cifar10_jpeg.npz"
MEAN, STD = 0.5, 0.5
ACCEPTED = (
    f"{ARCHIVE} (train_jpeg, train_offsets, train_labels and the same for test), or the python version of "
    "CIFAR-10 (cifar-10-python.tar.gz from cs.toronto.edu/~kriz, unpacked), or 32 × 32 images as "
    "train/<class>/*.png or .jpg and test/<class>/..., ten classes in sorted order"
)
_SUFFIXES = {".png", ".jpg", ".jpeg"}


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut, which is a 1 × 1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.downsample.append(nn.Conv2d(channels_in, channels, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(channels))

    def forward(self, inputs: Tensor) -> Tensor:
        """`N × channels × height/stride × width/stride`."""
        hidden = relu(self.bn1(self.conv1(inputs)))
        return relu(self.bn2(self.conv2(hidden)) + self.downsample(inputs))


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR, with 16, 32 and 64 channels: `N × 3 × 32 × 32` → logits, `N × 10`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1)
        self.layer2 = _stage(16, 32, stride=2)
        self.layer3 = _stage(32, 64, stride=2)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of the ten classes."""
        features = self.layer3(self.layer2(self.layer1(relu(self.bn1(self.conv1(inputs))))))
        logits: Tensor = self.fc(features.mean(dim=(2, 3)))
        return logits


def _stage(channels_in: int, channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels_in, channels, stride)
    return nn.Sequential(first, BasicBlock(channels, channels, 1), BasicBlock(channels, channels, 1))


def resnet20_cifar10(*, data_root: Path | None, weights: Path | None, seed: int) -> Task:
    """ResNet-20; with the usual weights its test accuracy on the JPEG copy of CIFAR-10 is 88.23 %."""
    folder = data_folder(data_root, "resnet20-cifar10", ACCEPTED)
    model = restored(ResNet20, find_weights(weights, folder, "resnet20_cifar10_jpeg.pt"))
    train, validation, test = image_loaders(*read_cifar10(folder), mean=MEAN, std=STD, seed=seed)
    augment = partial(flipped_and_shifted, pixels=4, fill=-MEAN / STD)
    return Task("resnet20-cifar10", model, train, validation, test, cross_entropy, accuracy, augment=augment)


def read_cifar10(folder: Path) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images (`N × 3 × 32 × 32`) from whichever form of CIFAR-10 the folder holds."""
    if (folder / ARCHIVE).is_file():
        return _read_archive(folder / ARCHIVE, "train"), _read_archive(folder / ARCHIVE, "test")
    for place in (folder / "cifar-10-batches-py", folder):
        if (place / "data_batch_1").is_file():
            train = [place / f"data_batch_{number}" for number in range(1, 6)]
            return _read_batches(train), _read_batches([place / "test_batch"])
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        return _read_image_folders(folder / "train", folder / "test")
    raise WoodfisherError(f"{folder} holds no CIFAR-10. It should hold {ACCEPTED}.")


def _read_archive(path: Path, part: str) -> LabelledImages:
    arrays = read_npz(path, [f"{part}_{kind}" for kind in ("jpeg", "offsets", "labels")])
    jpeg, offsets, labels = arrays.values()
    if jpeg.dtype != np.uint8 or jpeg.ndim != 1 or offsets.dtype.kind not in "iu" or offsets.ndim != 1:
        raise WoodfisherError(
            f"{path} must hold {part}_jpeg as one row of bytes and {part}_offsets as one of whole numbers; "
            f"{jpeg.dtype} of shape {jpeg.shape} and {offsets.dtype} of shape {offsets.shape} came."
        )
    bounds = offsets.tolist()
    if not bounds or bounds[0] != 0 or bounds[-1] != len(jpeg) or bounds != sorted(bounds):
        raise WoodfisherError(
            f"{part}_offsets in {path} must rise from 0 to {len(jpeg)}, the length of {part}_jpeg; they "
            "do not. Fetch the file again."
        )
    encoded = [jpeg[start:end] for start, end in pairwise(bounds)]
    return labelled(EncodedImages(encoded, f"{part}_jpeg in {path}"), labels, path)


def _read_batches(paths: list[Path]) -> LabelledImages:
    batches = [(path, *read_python_batch(path)) for path in paths]
    parts = [labelled(images, labels, path) for path, images, labels in batches]
    images = np.concatenate([images for _, images, _ in batches])
    return LabelledImages(images, np.concatenate([part.labels for part in parts]))


def _read_image_folders(train: Path, test: Path) -> tuple[LabelledImages, LabelledImages]:
    classes, others = (
        sorted(path.name for path in part.iterdir() if path.is_dir()) for part in (train, test)
    )
    if len(classes) != CLASSES or classes != others:
        raise WoodfisherError(
            f"{train} and {test} must have the same {CLASSES} folders, one a class; {classes} and "
            f"{others} came."
        )
    return _read_images(train, classes), _read_images(test, classes)


def _read_images(folder: Path, classes: list[str]) -> LabelledImages:
    files = [
        sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in _SUFFIXES)
        for name in classes
    ]
    labels = np.repeat(np.arange(CLASSES), [len(images) for images in files])
    return labelled(EncodedImages(list(chain.from_iterable(files)), str(folder)), labels, folder)
