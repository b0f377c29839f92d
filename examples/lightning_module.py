"""Prune a LightningModule while Lightning trains it.

    python examples/lightning_module.py            # an MLP on scikit-learn's digits, some seconds
    python examples/lightning_module.py --small    # fewer epochs

Needs `pip install 'woodfisher[train]'`. The module and the Trainer stay as they are: a callback does the pruning, and
keeps its state in Lightning's checkpoints, so that a run that is resumed goes on exactly.
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import woodfisher as wf
from woodfisher.integrations.lightning import PruningCallback
from woodfisher.tasks import accuracy

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Digits(LightningModule):
    """An MLP with its loss and optimizer, as anyone would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Loss of a batch."""
        inputs, targets = batch
        return cross_entropy(self.model(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Print sparsity and test accuracy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="fewer epochs")
    epochs = 4 if parser.parse_args(arguments).small else 40
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    data = TensorDataset(
        torch.tensor(pixels, dtype=torch.float32)[order] / 8 - 1, torch.tensor(labels)[order]
    )
    train, test = torch.utils.data.random_split(data, [1300, 497], torch.Generator().manual_seed(0))
    batches = DataLoader(train, batch_size=50, shuffle=True, generator=torch.Generator().manual_seed(0))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Digits()

    # --8<-- [start:callback]
    def make(module: Digits) -> wf.Pruner:
        """Called when fitting starts, with the module on its device."""
        objective = wf.Objective(module.model, batches, cross_entropy)
        schedule = wf.Polynomial(0.5, 0.9, begin=epochs / 4, end=epochs / 2, every=1).in_epochs(len(batches))
        return wf.Pruner(module.model, objective, schedule)

    pruning = PruningCallback(
        make, on_pruned=lambda step, report: print(f"step {step}: {report.sparsity:.2%} removed")
    )
    trainer = Trainer(max_epochs=epochs, callbacks=[pruning], **QUIET)
    trainer.fit(module, batches)
    # --8<-- [end:callback]
    reached = accuracy(module.model, DataLoader(test, batch_size=500))
    print(f"{pruning.pruner.sparsity:.2%} of the weights removed, test accuracy {reached:.2f} %")
    return pruning.pruner.sparsity, reached


if __name__ == "__main__":
    main()
