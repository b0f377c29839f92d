"""How much memory a computation may take, asked before it starts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from woodfisher.errors import WoodfisherError

if TYPE_CHECKING:
    from torch import Tensor

_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_GROUPS = Path("/proc/self/cgroup")
_CGROUP = Path("/sys/fs/cgroup")

_MARGIN = 0.05
"""Share by which what a process has as it is may differ from one run to the next."""


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device` now; None where the system doesn't say.

    What torch has of a GPU and nothing is in, as after a stage, can be.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = _told(_MEMINFO, "MemAvailable") if device.type == "cpu" else None
    left = _left_in_cgroup()
    return free if free is None or left is None else min(free, left)


def _told(table: Path, field: str) -> int | None:
    """Bytes that a table of the system gives in KiB; None where it has no such field."""
    lines = table.read_text().splitlines() if table.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _left_in_cgroup() -> int | None:
    """Bytes that the process may still take in its control group, of version 2 or 1, and in those that this lies in.

    None where none of them has a limit. File contents that the system would drop for them don't count as taken.
    """
    lines = _GROUPS.read_text().splitlines() if _GROUPS.exists() else []
    paths = {kind: path for _, kind, path in (line.split(":", 2) for line in lines)}
    for kind, root, limit, used, dropped in (
        ("", _CGROUP, "memory.max", "memory.current", "inactive_file"),
        (
            "memory",
            _CGROUP / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        own = PurePath(paths.get(kind, "/").lstrip("/"))
        left = []
        for group in (root / each for each in (own, *own.parents)):
            most, stat = group / limit, group / "memory.stat"
            if most.exists() and most.read_text().strip() != "max":
                fields = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
                taken = int((group / used).read_text()) - int(fields.get(dropped, 0))
                left.append(int(most.read_text()) - taken)
        if left:
            return min(left)
    return None


def resident_memory(device: torch.device) -> int:
    """Bytes that the process has on `device` now; 0 where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    told = _told(_STATUS, "VmRSS") if device.type == "cpu" else None
    return told or 0


def new_matrix(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix not yet written to, on huge pages where the system has them.

    The first write to a page of 4 KiB costs as much as computing what is written: NumPy asks for pages of 2 MiB.
    """
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return torch.empty(rows, columns, dtype=dtype, device=device)
    kind = np.float64 if dtype == torch.float64 else np.float32
    return torch.from_numpy(np.empty((rows, columns), kind))


class Scratch:
    """Memory by names, handed out again and again for results that the next ones may overwrite."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor that holds anything, as what was last written under `name`."""
        size, key = math.prod(shape), (name, dtype)
        if key not in self._held or len(self._held[key]) < size:
            self._held[key] = new_matrix(1, size, dtype, self._device)[0]
        return self._held[key][:size].view(shape)


def peak_memory() -> int:
    """Most bytes of main memory that the process had so far; 0 where the system doesn't say."""
    return _told(_STATUS, "VmHWM") or 0


def parse_bytes(size: str | int) -> int:
    """Bytes from a whole number, or from any with a unit.

    >>> parse_bytes("1.5KiB"), parse_bytes("2 GB"), parse_bytes("4gib"), parse_bytes(10)
    (1536, 2000000000, 4294967296, 10)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?\s*", str(size), re.IGNORECASE)
    if match is None or float(match[1]) <= 0 or ("." in match[1] and not match[2]):
        raise WoodfisherError(
            f"an amount of memory is a number of bytes, or as in 4GiB or 500MB; {size!r} came."
        )
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


Bill = Sequence[tuple[str, int]]
"""What a computation holds at its peak beside what the process has already, in words, and bytes."""


@dataclass(frozen=True)
class Budget:
    """What a computation may take.

    Attributes
    ----------
    device:
        Where.
    base:
        Bytes that the process has there already.
    limit:
        Bytes that it may have in all; None for what is free.
    room:
        Bytes that may be added; None where the system doesn't say.
    """

    device: torch.device
    base: int
    limit: int | None
    room: int | None

    @classmethod
    def of(
        cls,
        device: torch.device,
        limit: str | int | None = None,
        *,
        base: int | None = None,
        share: int = 1,
    ) -> Budget:
        """The budget now, where each of `share` processes has its part of main memory.

        `base` is what the process had when its run began, where that is known.
        """
        base = resident_memory(device) if base is None else base
        if limit is not None:
            limit = parse_bytes(limit)
            return cls(device, base, limit, limit - base)
        free = available_memory(device)
        return cls(device, base, None, free // share if free is not None and device.type == "cpu" else free)

    def holds(self, bill: Bill) -> bool:
        """Whether there is memory for that."""
        return self.room is None or total(bill) <= self.room

    def check(self, bill: Bill, advice: str) -> None:
        """Raise, with the bill, unless there is memory for that; `advice` is what else the user can do."""
        if not self.holds(bill):
            raise self.refusal(bill, advice)

    def refusal(self, bill: Bill, advice: str) -> WoodfisherError:
        """What to raise where the least that would do is too much."""
        listed = ", ".join(f"{what} {format_bytes(size)}" for what, size in bill)
        if self.limit is None:
            return WoodfisherError(
                f"this needs {format_bytes(total(bill), enough=True)} of memory on {self.device} ({listed}); "
                f"{format_bytes(self.room or 0)} is available: {advice}."
            )
        return WoodfisherError(
            f"memory={format_bytes(self.limit)} is not enough: the process has {format_bytes(self.base)} as it is, and "
            f"the least to add is {listed}. Give {format_bytes(self.base + total(bill), enough=True)} or more, or "
            f"{advice}."
        )

    def refusal_after_trying(self, bill: Bill, advice: str) -> WoodfisherError:
        """The same after samples were tried, which leaves the process with more, and not with as much every time."""
        tried = replace(self, base=max(self.base, resident_memory(self.device)))
        return tried.refusal([*bill, ("what may differ the next time", int(_MARGIN * tried.base))], advice)

    def lines(self, bill: Bill) -> list[str]:
        """What memory goes to at the peak, a line each."""
        limit = "" if self.limit is None else f" of {format_bytes(self.limit)}"
        whole = [("the process as it is", self.base), *bill]
        width = max(len(what) for what, _ in whole)
        return [
            f"peak memory {format_bytes(total(whole))}{limit}:",
            *(f"  {what:<{width}}  {format_bytes(size):>9}" for what, size in whole),
        ]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What work will take, as known before it starts.

    Attributes
    ----------
    budget:
        What the process has already, and may have.
    bill:
        What it holds besides at its peak, in words, and bytes.
    seconds:
        Expected time by phase; empty where nobody asked for it.
    """

    budget: Budget
    bill: Bill
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Most bytes that the process will have, what it has already included."""
        return self.budget.base + total(self.bill)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        own = {name: value for name, value in asdict(self).items() if name != "budget"}
        memory = {"base": self.budget.base, "memory": self.budget.limit, "peak": self.peak}
        return {**own, **memory, "bill": dict(self.bill), "seconds": dict(self.seconds)}

    def lines(self) -> list[str]:
        """Memory and time in words, a line each."""
        times = ", ".join(f"{phase} {_seconds(value)}" for phase, value in self.seconds.items() if value)
        expected = [f"expected: {_seconds(sum(self.seconds.values()))} ({times})"] if times else []
        return [*self.budget.lines(self.bill), *expected]


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"


def total(bill: Bill) -> int:
    """Bytes of all that a bill lists."""
    return sum(size for _, size in bill)


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
