"""Splits that never change, and loaders that leave the global random generators alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from woodfisher.errors import WoodfisherError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from woodfisher.tasks.images import LabelledImages

    Loader = DataLoader[tuple[Tensor, Tensor]]

TRAIN_BATCH, EVALUATION_BATCH = 100, 500


def rank_in_class(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count for each sample how many samples of its class come before it."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank


def hold_out(labels: NDArray[np.int64], per_class: int = 500) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split positions into training and validation, with equally many validation samples of every class.

    They are spread evenly over each class: `per_class` of them, or a tenth of the smallest class if that is
    less, and at least one. The split depends on nothing but the labels.
    """
    counts = np.bincount(labels)
    smallest = int(counts[counts > 0].min())
    if smallest < 2:
        raise WoodfisherError(
            "training data must have at least two images of each class, one of them for validation; "
            f"class {int(np.flatnonzero(counts == smallest)[0])} has {smallest}."
        )
    held = max(1, min(per_class, smallest // 10))
    stride = counts[labels] // held
    rank = rank_in_class(labels)
    chosen = (rank % stride == 0) & (rank // stride < held)
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


class ImageBatches(Dataset[tuple[Tensor, Tensor]]):
    """Some rows of labelled images; a list of indexes gives one batch at once.

    A batch is `(inputs, targets)`: float32 `n × channels × height × width`, each pixel as
    `(x/255 − mean)/std`, and int64 `n`. The inputs lie channels last, as convolutions on a CPU are fastest.
    """

    def __init__(self, data: LabelledImages, rows: NDArray[np.int64], mean: float, std: float) -> None:
        self.data, self.rows, self.mean, self.std = data, rows, mean, std

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: list[int]) -> tuple[Tensor, Tensor]:
        rows = self.rows[index]
        pixels = torch.from_numpy(self.data.images[rows])
        pixels = pixels.to(torch.float32, memory_format=torch.channels_last)
        return (pixels / 255 - self.mean) / self.std, torch.from_numpy(self.data.labels[rows])


def image_loaders(
    train: LabelledImages, test: LabelledImages, *, mean: float, std: float, seed: int
) -> tuple[Loader, Loader, Loader]:
    """Loaders of training, validation and test batches; validation is held out of `train`."""
    rows, held_out = hold_out(train.labels)
    return (
        shuffled(ImageBatches(train, rows, mean, std), seed),
        in_order(ImageBatches(train, held_out, mean, std)),
        in_order(ImageBatches(test, np.arange(len(test.labels)), mean, std)),
    )


def shuffled(dataset: Dataset[Any], seed: int) -> Loader:
    """Batches for training in an order that `seed` determines, another one in each iteration."""
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(dataset, generator=generator)  # type: ignore[arg-type]
    return _loader(dataset, BatchSampler(sampler, TRAIN_BATCH, drop_last=False), generator)


def in_order(dataset: Dataset[Any]) -> Loader:
    """Batches in the order of the data."""
    sampler = SequentialSampler(dataset)  # type: ignore[arg-type]
    return _loader(dataset, BatchSampler(sampler, EVALUATION_BATCH, drop_last=False), torch.Generator())


def _loader(dataset: Dataset[Any], batches: BatchSampler, generator: torch.Generator) -> Loader:
    """Without a generator of its own, each iteration of a loader would draw from the global one."""
    return DataLoader(dataset, sampler=batches, batch_size=None, collate_fn=_as_is, generator=generator)


def _as_is(batch: Any) -> Any:
    return batch
