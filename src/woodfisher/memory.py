"""How much memory a computation may take, asked before it starts."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from woodfisher.errors import WoodfisherError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_CGROUP = Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device` now; None where the system doesn't say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def resident_memory(device: torch.device) -> int:
    """Bytes that the process has on `device` now; 0 where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return _status("VmRSS") if device.type == "cpu" else 0


def new_matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix not yet written to, on huge pages where the system has them.

    The first write to a page of 4 KiB costs as much as computing what is written: NumPy asks for pages of 2 MiB.
    """
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return torch.empty(rows, columns, dtype=dtype, device=device)
    kind = np.float64 if dtype == torch.float64 else np.float32
    return torch.from_numpy(np.empty((rows, columns), kind))


def peak_memory() -> int:
    """Most bytes of main memory that the process had so far; 0 where the system doesn't say."""
    return _status("VmHWM")


def _status(field: str) -> int:
    if not _STATUS.exists():
        return 0
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def parse_bytes(size: str | int) -> int:
    """Bytes from a number, or from one with a unit.

    >>> parse_bytes("1.5KiB"), parse_bytes("2 GB"), parse_bytes("4gib"), parse_bytes(10)
    (1536, 2000000000, 4294967296, 10)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?\s*", str(size), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise WoodfisherError(
            f"an amount of memory is a number of bytes, or as in 4GiB or 500MB; {size!r} came."
        )
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def check_memory(needs: Iterable[tuple[str, int]], device: torch.device, advice: str) -> None:
    """Raise, with the bill, if what a computation `needs` is more than `device` has.

    Parameters
    ----------
    needs:
        What is held, in words, and its bytes.
    advice:
        What the user can change.
    """
    needs = list(needs)
    total, free = sum(size for _, size in needs), available_memory(device)
    if free is not None and total > free:
        bill = ", ".join(f"{what} {format_bytes(size)}" for what, size in needs)
        raise WoodfisherError(
            f"this needs {format_bytes(total)} of memory on {device} ({bill}); {format_bytes(free)} is "
            f"available. {advice}"
        )


def format_bytes(size: float, *, enough: bool = False) -> str:
    """Bytes to three digits in a binary unit; `enough` rounds up, for an amount that has to do.

    >>> format_bytes(1536), format_bytes(1001), format_bytes(1001, enough=True), format_bytes(1000 * 2**20)
    ('1.5 KiB', '0.978 KiB', '0.978 KiB', '0.977 GiB')
    """
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = next((i for i in range(len(units)) if abs(size) < 1000 * 1024**i), len(units) - 1)
    number = size / 1024**power
    step = 10 ** (math.floor(math.log10(abs(number))) - 2) if number else 1
    steps = math.ceil(number / step) if enough else round(number / step)
    return f"{steps * step:.4g} {units[power]}"
