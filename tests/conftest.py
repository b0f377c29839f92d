"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


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
