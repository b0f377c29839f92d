"""Networks that nothing here was tuned on: a transformer that reads digits row by row, and a reader of sequences.

    woodfisher compare --task benchmarks.networks:transformer --seeds 3
    woodfisher compare --task benchmarks.networks:reader --params "[ech]*.weight" "lstm.weight_*"

The first is trained on scikit-learn's digits, each image a sequence of eight rows of eight pixels; the second on drawn
sequences of tokens, of which it has to say which pair of kinds comes first, and whether one kind is frequent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, Dataset, TensorDataset

from woodfisher.tasks import Task, accuracy
from woodfisher.tasks.loaders import shuffled

if TYPE_CHECKING:
    from collections.abc import Callable


class Block(nn.Module):
    """Self-attention and a two-layer network, each after a layer norm and around a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`n × tokens × width`."""
        h = self.norm1(x)
        q, k, v = (
            f(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Rows of pixels → embedding with positions → two blocks → mean → ten logits."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.randn(8, width) * 0.1)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(2)))
        self.head = nn.Linear(width, 10)

    def forward(self, rows: Tensor) -> Tensor:
        """`n × 8 × 8` → `n × 10`."""
        return self.head(self.blocks(self.embed(rows) + self.position).mean(1))


class Reader(nn.Module):
    """Embedding → grouped convolution and group normalisation → bidirectional LSTM → maximum → six logits."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, width)
        self.conv = nn.Conv1d(width, width, 5, padding=2, groups=4)
        self.norm = nn.GroupNorm(4, width)
        self.lstm = nn.LSTM(width, width, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * width, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        """`n × length` of 24 tokens → `n × 6`."""
        x = torch.relu(self.norm(self.conv(self.embed(tokens).transpose(1, 2))))
        return self.head(self.lstm(x.transpose(1, 2))[0].amax(1))


def transformer(seed: int = 0) -> Task:
    """Train it for 60 epochs, and hold out a fifth of the images for validation and a fifth for the test."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order] / 8 - 1
    labels = torch.tensor(digits.target)[order]
    fifth = len(labels) // 5
    train = TensorDataset(images[2 * fifth :], labels[2 * fifth :])
    model = trained(Transformer, train, epochs=60, batch=32, rate=2e-3)
    validation, test = ([(images[k : k + fifth], labels[k : k + fifth])] for k in (0, fifth))
    return Task("digits-transformer", model, shuffled(train, seed), validation, test, cross_entropy, accuracy)


def reader(seed: int = 0) -> Task:
    """Train it for 30 epochs on 4,000 sequences; 1,000 others are for validation and 2,000 for the test."""
    train = TensorDataset(*sequences(4000, seed=1))
    model = trained(Reader, train, epochs=30, batch=50, rate=3e-3)
    held_out = [sequences(1000, seed=2)], [sequences(2000, seed=3)]
    return Task("sequences-reader", model, shuffled(train, seed), *held_out, cross_entropy, accuracy)


def sequences(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of 20 tokens each, and their classes: which of three pairs of kinds comes first, and whether one is frequent."""
    tokens = torch.randint(0, 24, (count, 20), generator=torch.Generator().manual_seed(seed))
    kinds = tokens % 4
    pairs = 4 * kinds[:, 1:] + kinds[:, :-1]
    earliness = torch.arange(19.0, 0.0, -1.0)
    first = torch.stack([((pairs == pair) * earliness).amax(1) for pair in (1, 6, 12)], dim=1).argmax(1)
    return tokens, 2 * first + ((tokens < 6).sum(1) > 4).long()


def trained(
    network: Callable[[], nn.Module], data: Dataset[Any], *, epochs: int, batch: int, rate: float
) -> nn.Module:
    """The network after Adam with a cosine schedule, from seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for x, y in DataLoader(data, batch, shuffle=True):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
            schedule.step()
    return model.eval()
