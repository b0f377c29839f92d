"""A network that nothing here was tuned on: a transformer that reads digits row by row.

    woodfisher compare --task benchmarks.networks:transformer --seeds 3

It is trained on scikit-learn's digits, each image a sequence of eight rows of eight pixels.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from woodfisher.tasks import Task, accuracy


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


def transformer(seed: int = 0) -> Task:
    """Train it for 60 epochs, and hold out a fifth of the images for validation and a fifth for the test."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order] / 8 - 1
    labels = torch.tensor(digits.target)[order]
    fifth = len(labels) // 5
    train = torch.utils.data.TensorDataset(images[2 * fifth :], labels[2 * fifth :])
    generator = torch.Generator().manual_seed(seed)
    loader = torch.utils.data.DataLoader(train, batch_size=32, shuffle=True, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer()
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        for _ in range(60):
            for x, y in torch.utils.data.DataLoader(train, batch_size=32, shuffle=True):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
            schedule.step()
    model.eval()
    held_out = [[(images[part], labels[part])] for part in (slice(0, fifth), slice(fifth, 2 * fifth))]
    return Task("digits-transformer", model, loader, *held_out, cross_entropy, accuracy)
