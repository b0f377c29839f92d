"""MLPNet on MNIST, the small network of the WoodFisher paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.functional import log_softmax, nll_loss, relu

from woodfisher.errors import WoodfisherError
from woodfisher.tasks.base import Task, accuracy
from woodfisher.tasks.files import data_folder, read_idx, read_npz
from woodfisher.tasks.images import LabelledImages, labelled
from woodfisher.tasks.loaders import image_loaders
from woodfisher.tasks.weights import find_weights, restored

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

ARCHIVE = "mnist.npz"
ACCEPTED = (
    f"{ARCHIVE} (train_images, train_labels, test_images, test_labels), or MNIST's four IDX files "
    "(train-images-idx3-ubyte, train-labels-idx1-ubyte and the same for t10k, plain or .gz, from "
    "yann.lecun.com/exdb/mnist), in it or under MNIST/raw/"
)


class MLPNet(nn.Module):
    """784-40-20-10 with ReLU and no biases.

    Takes `N × 1 × 28 × 28`, `N × 28 × 28` or `N × 784`; gives log-probabilities, `N × 10`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 40, bias=False)
        self.fc2 = nn.Linear(40, 20, bias=False)
        self.fc3 = nn.Linear(20, 10, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Log-probabilities of the ten digits."""
        hidden = relu(self.fc1(inputs.flatten(1)))
        return log_softmax(self.fc3(relu(self.fc2(hidden))), dim=-1)


def mlpnet_mnist(*, data_root: Path | None, weights: Path | None, seed: int) -> Task:
    """MLPNet with the weights of the paper's authors; its test accuracy is 93.97 %."""
    folder = data_folder(data_root, "mlpnet-mnist", ACCEPTED)
    model = restored(MLPNet, find_weights(weights, folder, "mlpnet_mnist.pt"))
    train, validation, test = image_loaders(*read_mnist(folder), mean=0.1307, std=0.3081, seed=seed)
    return Task("mlpnet-mnist", model, train, validation, test, nll_loss, accuracy)


def read_mnist(folder: Path) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images (`N × 1 × 28 × 28`) from `mnist.npz` or the IDX files."""
    archive = folder / ARCHIVE
    if archive.is_file():
        arrays = read_npz(
            archive, [f"{part}_{kind}" for part in ("train", "test") for kind in ("images", "labels")]
        )
        train, test = (
            _checked(arrays[f"{part}_images"], arrays[f"{part}_labels"], archive)
            for part in ("train", "test")
        )
    else:
        train, test = _read_idx_pair(folder, "train"), _read_idx_pair(folder, "t10k")
    return train, test


def _read_idx_pair(folder: Path, part: str) -> LabelledImages:
    images, labels = _idx_file(folder, part, "images", 3), _idx_file(folder, part, "labels", 1)
    return _checked(read_idx(images, 3), read_idx(labels, 1), images)


def _idx_file(folder: Path, part: str, kind: str, dimensions: int) -> Path:
    for place in (folder, folder / "MNIST" / "raw"):
        for separator in "-.":
            for suffix in ("", ".gz"):
                path = place / f"{part}-{kind}{separator}idx{dimensions}-ubyte{suffix}"
                if path.is_file():
                    return path
    raise WoodfisherError(
        f"{folder} has neither {ARCHIVE} nor {part}-{kind}-idx{dimensions}-ubyte. It should hold {ACCEPTED}."
    )


def _checked(images: NDArray[np.uint8], labels: NDArray[np.uint8], source: Path) -> LabelledImages:
    if images.dtype != "uint8" or images.ndim != 3 or images.shape[1:] != (28, 28):
        raise WoodfisherError(
            f"images in {source} must be bytes of shape N × 28 × 28; {images.dtype} of shape "
            f"{images.shape} came."
        )
    return labelled(images[:, None], labels, source)
