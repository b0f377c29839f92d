"""Random numbers: the state of all generators that data and models draw from, and seeds for them."""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True)
class RandomState:
    """Of the generators of Python, of NumPy, of torch on the CPU, and by index of torch on CUDA devices."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: dict[int, Tensor]


def random_state(devices: Iterable[torch.device] = ()) -> RandomState:
    """The state of the global generators now, with those of the CUDA devices among `devices`."""
    cuda = sorted({device.index for device in devices if device.type == "cuda"})
    return RandomState(
        random.getstate(),
        np.random.get_state(),  # noqa: NPY002  the global one is what users seed
        torch.get_rng_state(),
        {index: torch.cuda.get_rng_state(index) for index in cuda},
    )


def set_random_state(state: RandomState) -> None:
    """Go on from where the global generators were."""
    random.setstate(state.python)
    np.random.set_state(state.numpy)  # noqa: NPY002
    torch.set_rng_state(state.cpu)
    for index, on_device in state.cuda.items():
        torch.cuda.set_rng_state(on_device, index)


def move_on() -> None:
    """Go on from other random numbers, which follow from the present ones: `isolated` brings these back each time."""
    torch.manual_seed(int(torch.randint(2**62, ())))


@contextmanager
def unmoved(data: Iterable[Any]) -> Iterator[None]:
    """Bring back what generators a `DataLoader` and its samplers have of their own."""
    before = [(generator, generator.get_state()) for generator in generators(data)]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


@contextmanager
def reseeded(data: Iterable[Any], seed: int) -> Iterator[None]:
    """Random numbers that `seed` alone determines, for what is drawn from `data` inside `isolated`.

    A `DataLoader` and its samplers may have generators of their own; they are set too, and are as before afterwards.
    """
    with unmoved(data):
        reseed(data, seed)
        yield


def reseed(data: Iterable[Any], seed: int) -> None:
    """Set all random generators, and those of `data`, to a state that `seed` alone determines."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
    for generator in generators(data):
        generator.manual_seed(seed)


def generators(data: Iterable[Any]) -> list[torch.Generator]:
    """The generators of a `DataLoader` and its samplers, each once."""
    owners = [data]
    for owner in owners:
        owners += [
            part for name in ("sampler", "batch_sampler") if (part := getattr(owner, name, None)) is not None
        ]
    found = {
        id(g): g for owner in owners if isinstance(g := getattr(owner, "generator", None), torch.Generator)
    }
    return list(found.values())
