"""A task of your own for the commands: a trained model with its data, loss and metric.

woodfisher prune --task examples.my_task:digits_mlp --sparsity 0.9      # from the folder above this one
"""

from __future__ import annotations

# --8<-- [start:task]
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from woodfisher.tasks import Task, accuracy


def digits_mlp() -> Task:
    """An MLP on scikit-learn's digits; a real one would load its weights from a file."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs, targets = torch.tensor(pixels, dtype=torch.float32)[order] / 8 - 1, torch.tensor(labels)[order]
    parts = (slice(0, 1100), slice(1100, 1300), slice(1300, None))
    train, validation, test = (TensorDataset(inputs[part], targets[part]) for part in parts)
    batches = DataLoader(train, 50, shuffle=True, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 10))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(25):
        for x, y in batches:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    held_out, last = DataLoader(validation, 500), DataLoader(test, 500)
    return Task("digits-mlp", model, batches, held_out, last, cross_entropy, accuracy)
    # --8<-- [end:task]
