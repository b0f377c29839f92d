"""The embedded task: a small network on scikit-learn's handwritten digits, trained on the spot."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool2d, relu
from torch.utils.data import TensorDataset

from woodfisher.errors import extra
from woodfisher.gradients.isolation import threads
from woodfisher.tasks.base import Task, accuracy
from woodfisher.tasks.loaders import in_order, rank_in_class, shuffled
from woodfisher.tasks.weights import restored

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

EPOCHS, PEAK_RATE = 30, 3e-3

SMALL_EPOCHS, SMALL_RATE = {"untrained": 0, "early": 4, "trained": 20}, 1e-2


class DigitsNet(nn.Module):
    """Two 3 × 3 convolutions (16 and 32 channels), 2 × 2 max pooling and two linear layers; 21,456 weights.

    `N × 1 × 8 × 8` → logits, `N × 10`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 4 * 4, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of the ten digits."""
        features = max_pool2d(relu(self.conv2(relu(self.conv1(inputs)))), 2)
        logits: Tensor = self.fc2(relu(self.fc1(features.flatten(1))))
        return logits


class SmallDigitsNet(nn.Module):
    """Two 3 × 3 convolutions of stride 2 (6 and 8 channels) and two linear layers; 990 weights.

    `N × 1 × 8 × 8` → logits, `N × 10`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(8 * 2 * 2, 12)
        self.fc2 = nn.Linear(12, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of the ten digits."""
        features = relu(self.conv2(relu(self.conv1(inputs))))
        logits: Tensor = self.fc2(relu(self.fc1(features.flatten(1))))
        return logits


def digits(*, weights: Path | None, seed: int) -> Task:
    """`DigitsNet`, trained from a fixed start unless `weights` are given; needs no data files."""
    return _task("digits", DigitsNet, {"trained": EPOCHS}, PEAK_RATE, weights, seed)


def digits_small(*, weights: Path | None, seed: int) -> Task:
    """`SmallDigitsNet`, small enough for its whole Hessian; with its states before and early in its training."""
    return _task("digits-small", SmallDigitsNet, SMALL_EPOCHS, SMALL_RATE, weights, seed)


def _task(
    name: str,
    network: Callable[[], nn.Module],
    points: Mapping[str, int],
    rate: float,
    weights: Path | None,
    seed: int,
) -> Task:
    """The task of a network that is trained as far as the last of `points` (name → epochs), and keeps the others."""
    train, validation, test = read_digits()
    earlier: dict[str, dict[str, Tensor]] = {}
    if weights is None:
        model = _untrained(network)
        earlier = dict(zip(points, _states(network, tuple(points.values()), rate), strict=True))
        model.load_state_dict(earlier.popitem()[1])
    else:
        model = restored(network, weights)
    return Task(
        name,
        model.eval(),
        shuffled(train, seed),
        in_order(validation),
        in_order(test),
        cross_entropy,
        accuracy,
        earlier=earlier,
    )


def read_digits() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Training, validation and test samples: 60, 15 and 25 % of each digit, always the same ones.

    Inputs are `N × 1 × 8 × 8`, with mean 0 and variance 1 over all training pixels.
    """
    with extra("tasks", "the task digits needs scikit-learn"):
        from sklearn.datasets import load_digits
    pixels, labels = load_digits(return_X_y=True)
    rank = rank_in_class(labels)
    test = rank % 4 == 3
    validation = np.isin(rank % 20, (1, 8, 14))
    train = ~(test | validation)
    inputs = (pixels - pixels[train].mean()) / pixels[train].std()
    samples = torch.from_numpy(inputs).to(torch.float32).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels).to(torch.int64)
    first, second, third = (TensorDataset(samples[rows], targets[rows]) for rows in (train, validation, test))
    return first, second, third


def _untrained(network: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return network().float()


@cache
def _states(
    network: Callable[[], nn.Module], epochs: tuple[int, ...], rate: float
) -> list[dict[str, Tensor]]:
    """State dicts after each of `epochs`, in rising order, of a training that lasts as long as the last of them.

    Adam with a one-cycle rate up to `rate`; one thread, because the number of threads changes the rounding.
    """
    batches = shuffled(read_digits()[0], 0)
    model = _untrained(network)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs[-1] * len(batches))
    states = []
    with threads(1), torch.enable_grad():
        for epoch in range(epochs[-1] + 1):
            if epoch in epochs:
                states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            if epoch == epochs[-1]:
                break
            for inputs, targets in batches:
                optimizer.zero_grad()
                torch.autograd.backward(cross_entropy(model(inputs), targets))
                optimizer.step()
                schedule.step()
    return states
