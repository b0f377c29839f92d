"""What a long computation tells while it runs: progress, warnings, and where the time went."""

from __future__ import annotations

import logging
import time
import warnings
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from woodfisher.errors import WoodfisherError, WoodfisherWarning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Progress = Callable[[str, int, int], None]


@dataclass
class Watch:
    """A record of one computation.

    Attributes
    ----------
    progress:
        Called as `progress(phase, done, total)`.
    seconds:
        Phase → wall-clock seconds, without the phases inside it.
    warnings:
        Every warning once, in order.
    """

    progress: Progress | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _running: list[str] = field(default_factory=list)
    _since: float = 0.0

    def _switch(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._running:
            phase = self._running[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def so_far(self) -> dict[str, float]:
        """Seconds of every phase, the running one up to now."""
        self._switch()
        return dict(self.seconds)

    def restart(self) -> None:
        """Forget what was recorded, for a computation that begins anew."""
        self._switch()
        self.seconds.clear()
        self.warnings.clear()


_current: ContextVar[Watch | None] = ContextVar("woodfisher_watch", default=None)


@contextmanager
def watching(progress: Progress | None = None) -> Iterator[Watch]:
    """Record what happens inside the block."""
    if progress is not None and not callable(progress):
        raise WoodfisherError(f"progress is a function of phase, done and total; {progress!r} came.")
    watch = Watch(progress)
    token = _current.set(watch)
    try:
        yield watch
    finally:
        _current.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the block's time under `name`; an inner phase takes its time out of the outer one."""
    watch = _current.get()
    if watch is None:
        yield
        return
    watch._switch()
    watch._running.append(name)
    try:
        yield
    finally:
        watch._switch()
        watch._running.pop()


def report_progress(name: str, done: int, total: int) -> None:
    """Tell whoever watches that `done` of `total` steps of `name` are done."""
    watch = _current.get()
    if watch is not None and watch.progress is not None:
        watch.progress(name, done, total)


def warn(message: str) -> None:
    """Issue a `WoodfisherWarning`, and note it for the report that is being made."""
    watch = _current.get()
    if watch is not None:
        if message in watch.warnings:
            return
        watch.warnings.append(message)
    warnings.warn(message, WoodfisherWarning, stacklevel=3)


@contextmanager
def logging_from(level: int, *names: str) -> Iterator[None]:
    """Have loggers of these names say nothing below `level`."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
