"""What a person sees while a command runs and when it ends."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

import torch
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import distributed

from woodfisher.distributed import in_a_group
from woodfisher.errors import WoodfisherError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


LONGEST_WAIT = timedelta(hours=12)
"""Time that processes wait for one that computes alone; one that ends is noticed at once."""


def several() -> bool:
    """Whether `torchrun` started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """The group of the processes that `torchrun` started, if it did; of these only the first says anything."""
    if not several() or distributed.is_initialized():
        yield
        return
    # Its functions' default is the group that there is when it is first imported, as by an optimizer: they would keep
    # that beyond its end, and its threads then abort an interpreter that ends.
    importlib.import_module("torch.distributed.nn.functional")
    on_cuda = device.startswith("cuda")
    try:
        if on_cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if on_cuda else "gloo", timeout=LONGEST_WAIT)
    except (RuntimeError, ValueError) as error:
        raise WoodfisherError(
            f"the processes can't meet: {error} Start them all with torchrun, or unset WORLD_SIZE."
        ) from error
    try:
        yield
    finally:
        distributed.destroy_process_group()


def silent() -> bool:
    """Whether another process speaks for this one."""
    return in_a_group() and distributed.get_rank() > 0


_WIDE = 200
"""Columns of what is no terminal."""

_results: ContextVar[TextIO | None] = ContextVar("woodfisher_results", default=None)


@contextmanager
def results_apart() -> Iterator[None]:
    """Keep standard output for results: what else is printed, as by a user's task, goes to standard error."""
    with _descriptor_apart() as stream:
        token = _results.set(stream)
        try:
            with redirect_stdout(sys.stderr):
                yield
            stream.flush()
        finally:
            _results.reset(token)


@contextmanager
def _descriptor_apart() -> Iterator[TextIO]:
    """Standard output, while its descriptor leads to standard error for what goes past Python; where it has one."""
    stdout = sys.stdout
    try:
        descriptor, errors = stdout.fileno(), sys.stderr.fileno()
        stdout.flush()
        own = os.dup(descriptor)
    except (OSError, ValueError):  # as of streams in memory
        yield stdout
        return
    os.dup2(errors, descriptor)
    stream = open(own, "w", encoding=stdout.encoding, errors="replace")  # noqa: PTH123, SIM115
    try:
        yield stream
    finally:
        os.dup2(own, descriptor)
        with suppress(OSError):  # it has been flushed, or can't be
            stream.close()


def make_streams_usable() -> None:
    """Have standard streams put a mark for characters that they can't show, and closed ones drop what they get."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def results() -> TextIO:
    """The stream for results."""
    return _results.get() or sys.stdout


class _Results(Console):
    """The console for results."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; where a table has too little room, names of its rows fold, and numbers and words of headings don't."""
        for table in objects:
            if isinstance(table, Table):
                table.columns[0].overflow = "fold"
                for column in table.columns:
                    if column.justify == "right":
                        whole = [*str(column.header).split(), *map(str, column.cells)]
                        column.min_width = max(map(cell_len, whole))
        super().print(*objects, crop=False, **options)

    def on_broken_pipe(self) -> None:
        raise  # the error that is being handled: rich would exit with a code of its own


def out() -> Console:
    """Standard output, for results; a file or a pipe has room for tables of any width."""
    file = results()
    width = None if file.isatty() or "COLUMNS" in os.environ else _WIDE
    return _Results(file=file, width=width, markup=False, emoji=False, highlight=False)


@contextmanager
def progress(title: str, whole: str = "stages") -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each phase on standard error; plain files and pipes get none.

    The phase `whole` is that of the first bar, the one with the title.
    """
    console = Console(stderr=True, markup=False, emoji=False)
    shown = console.is_terminal and not silent()
    if not shown:
        note(title)
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not shown) as bars:
        tasks: dict[str, Any] = {}
        main = bars.add_task(title, total=None)

        def show(phase: str, done: int, total: int) -> None:
            if phase == whole:
                bars.update(main, completed=done, total=total)
                return
            if phase not in tasks:
                tasks[phase] = bars.add_task(f"  {phase}", total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield show


def note(message: str) -> None:
    """One line on standard error."""
    if silent():
        return
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def print_json(content: Any) -> None:
    """One JSON object on standard output."""
    results().write(json.dumps(content, allow_nan=False) + "\n")


def size_on_disk(sizes: dict[str, int]) -> str:
    """One line on the `dense` and `stored` bytes of a file of weights."""
    dense, stored = sizes["dense"], sizes["stored"]
    return f"On disk: {stored:,} bytes, {stored / max(dense, 1):.1%} of the dense {dense:,}"
