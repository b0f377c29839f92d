"""What reproduces a run: the command as it was given, versions and the machine."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from woodfisher._version import __version__
from woodfisher.files import text_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ENVIRONMENT = ("WOODFISHER_DATA", "OMP_NUM_THREADS")

_arguments: ContextVar[Sequence[str] | None] = ContextVar("woodfisher_arguments", default=None)


@contextmanager
def remembered(arguments: Sequence[str]) -> Iterator[None]:
    """Remember the arguments of the command that runs inside the block."""
    token = _arguments.set(arguments)
    try:
        yield
    finally:
        _arguments.reset(token)


def origin(device: str) -> dict[str, Any]:
    """The command that runs, quoted for a shell, with the environment that it depends on, and what ran it."""
    arguments = _arguments.get()
    variables = [f"{name}={shlex.quote(os.environ[name])}" for name in _ENVIRONMENT if os.environ.get(name)]
    return {
        "command": text_of(
            " ".join([*variables, "woodfisher", shlex.join(sys.argv[1:] if arguments is None else arguments)])
        ).rstrip(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {
            "woodfisher": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "platform": platform.platform(),
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if "cuda" in device else device,
        "threads": torch.get_num_threads(),
    }
