"""What a person sees while a command runs and when it ends."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def out() -> Console:
    """Standard output, for results."""
    return Console(markup=False, emoji=False, highlight=False)


@contextmanager
def progress(title: str, whole: str = "stages") -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each phase on standard error; plain files and pipes get none.

    The phase `whole` is that of the first bar, the one with the title.
    """
    console = Console(stderr=True, markup=False, emoji=False)
    if not console.is_terminal:
        note(title)
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
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
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def print_json(content: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(content, allow_nan=False) + "\n")


def size_on_disk(sizes: dict[str, int]) -> str:
    """One line on the `dense` and `stored` bytes of a file of weights."""
    dense, stored = sizes["dense"], sizes["stored"]
    return f"On disk: {stored:,} bytes, {stored / max(dense, 1):.1%} of the dense {dense:,}"
