"""Small networks and data for tests."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def mlp(dtype=torch.float32, seed=0) -> nn.Sequential:
    """Two layers, 24 + 12 weights with biases."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


class ConvNet(nn.Module):
    """Convolution, batch normalisation in evaluation mode, group convolution, linear."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.grouped(torch.relu(self.norm(self.conv(x)))).flatten(1))


class Tied(nn.Module):
    """One weight used by two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5, bias=False)
        self.second = nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Recurrent(nn.Module):
    """A GRU."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.gru(x)[0][:, -1])


class Transformer(nn.Module):
    """An encoder with attention, layer norms and dropout."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.fc(self.layer(self.embed(tokens)).mean(1))


class Stateful(nn.Module):
    """Draws random numbers, counts its calls and writes into a buffer in its forward pass."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        return self.fc(x + 0 * torch.rand(1))


class Output(dict):
    """What a Hugging Face model returns: a mapping with attributes."""

    __getattr__ = dict.__getitem__


class DictModel(nn.Module):
    """Takes keyword arguments, returns its own loss, as Hugging Face models do."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, features, labels=None):
        logits = self.net(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return Output(loss=loss, logits=logits)


class Unpadded(nn.Module):
    """Tokens that are there go through a layer; a sample without any goes another way."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x, there):
        hidden = x.new_zeros(*there.shape, 6)
        if there.any():
            hidden[there] = self.layer(x[there]).tanh()
        return self.head(hidden.sum(1))


def samples(count=20, shape=(6,), classes=3, seed=1, dtype=torch.float32):
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *shape, generator=generator, dtype=dtype)
    return inputs, torch.randint(classes, (count,), generator=generator)


CASES = [
    pytest.param(mlp, (6,), id="mlp"),
    pytest.param(ConvNet, (2, 6, 6), id="conv"),
    pytest.param(Tied, (5,), id="tied"),
]
