"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from woodfisher import Objective
from woodfisher.tasks import load_task


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of MNIST, CIFAR-10 and the trained weights."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("WOODFISHER_DATA") or default).resolve()
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set WOODFISHER_DATA")
    return folder


@pytest.fixture(scope="session")
def mlpnet_rows(data_root) -> torch.Tensor:
    """A thousand gradient rows of MLPNet on MNIST."""
    task = load_task("mlpnet-mnist", data_root=data_root)
    return Objective(task.model, task.train, task.loss).rows(1000)
