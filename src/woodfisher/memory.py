"""How much memory a computation may take, asked before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from woodfisher.errors import WoodfisherError

if TYPE_CHECKING:
    from collections.abc import Iterable

_MEMINFO = Path("/proc/meminfo")
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


def format_bytes(size: float) -> str:
    """Bytes in the largest binary unit that leaves a number above one.

    >>> format_bytes(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
