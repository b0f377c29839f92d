"""Prune a residual network step by step inside a plain training loop.

    python examples/cifar_resnet.py --data-root DIR   # ResNet-20 on CIFAR-10; DIR holds its files
    python examples/cifar_resnet.py --small           # a tiny network on random images; needs no files

`wf.Pruner` adds one line to the loop. At each time of its schedule it estimates the curvature at the weights as they
are then, removes some of them, and moves the others to compensate; in between it keeps what is removed at zero,
whatever the optimizer does.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import woodfisher as wf
from woodfisher.tasks import Task, accuracy, load_task


class TinyResNet(nn.Module):
    """A stem, two residual blocks of 8 channels with batch normalisation, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)) for _ in range(2)
        )
        self.classifier = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        """`N × 3 × height × width` → logits, `N × 4`."""
        features = self.stem(images)
        for block in self.blocks:
            features = torch.relu(features + block(features))
        return self.classifier(features.mean(dim=(2, 3)))


def small_task() -> Task:
    """Random images of four classes, told apart by the mean of their colours."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (640,), generator=generator)
    colours = torch.randn(4, 3, 1, 1, generator=generator)
    images = colours[targets] + torch.randn(640, 3, 8, 8, generator=generator)
    batches = list(zip(images.split(32), targets.split(32), strict=True))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyResNet()
    return Task("random images", model, batches[:15], batches[15:], batches[15:], cross_entropy)


def train(task: Task, sparsity: float, criterion: str, epochs: int, rate: float) -> tuple[float, float]:
    """Train a copy of the task's model while it is pruned; return its final sparsity and test accuracy."""
    model = copy.deepcopy(task.model)
    steps = len(task.train)
    # --8<-- [start:loop]
    objective = wf.Objective(model, task.train, task.loss)
    schedule = wf.Polynomial(0.5, sparsity, begin=0.1, end=0.6 * epochs, every=0.4).in_epochs(steps)
    pruner = wf.Pruner(model, objective, schedule, criterion=criterion)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    model.train()
    for _ in range(epochs):
        for images, targets in task.train:
            if task.augment is not None:
                images = task.augment(images)
            optimizer.zero_grad()
            task.loss(model(images), targets).backward()
            optimizer.step()
            report = pruner.step()  # None unless weights were removed
            if report is not None:
                print(f"  step {pruner.steps:>5}: {report.sparsity:.2%} removed")
            decay.step()
    # --8<-- [end:loop]
    return pruner.sparsity, accuracy(model, task.test)


def main(arguments: list[str] | None = None) -> dict[str, tuple[float, float]]:
    """Print sparsity and test accuracy for two criteria, everything else the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", type=Path, help="folder with CIFAR-10 and resnet20_cifar10_jpeg.pt")
    parser.add_argument("--small", action="store_true", help="a tiny network on random images")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--epochs", type=int, default=2)
    chosen = parser.parse_args(arguments)
    rows = {}
    for criterion in ("magnitude", "woodfisher"):
        task = small_task() if chosen.small else load_task("resnet20-cifar10", data_root=chosen.data_root)
        print(criterion)
        epochs, rate = (4, 0.1) if chosen.small else (chosen.epochs, 0.02)
        rows[criterion] = train(task, chosen.sparsity, criterion, epochs, rate)
    print(
        f"\n{task.name}, {epochs} epochs; dense test accuracy before: {accuracy(task.model, task.test):.2f} %"
    )
    print(f"{'criterion':<12}{'sparsity, %':>12}{'test accuracy, %':>18}")
    for criterion, (sparsity, reached) in rows.items():
        print(f"{criterion:<12}{100 * sparsity:>12.2f}{reached:>18.2f}")
    return rows


if __name__ == "__main__":
    main()
