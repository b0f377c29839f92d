"""`woodfisher inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (tyro reads the annotation)
from typing import TYPE_CHECKING, Annotated

from rich.box import SIMPLE_HEAD
from rich.table import Table
from tyro.conf import Positional, arg

from woodfisher.cli.console import out, print_json, size_on_disk
from woodfisher.files import text_of
from woodfisher.saving.contents import contents_of

if TYPE_CHECKING:
    from woodfisher.saving.contents import Contents


_FILE_WIDTH = 120
"""Columns where the table goes into a file or a pipe."""


@dataclass(frozen=True)
class Inspect:
    """Show what a file of weights holds: shape, dtype, weights kept, the pattern found, and bytes on disk.

    Reads safetensors files, compressed or plain, and state dicts in .pt files. Nothing in them is executed. Where the
    file has no mask, weights that are zero count as removed.
    """

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """A .safetensors or .pt file."""

    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def run(self) -> None:
        """Read and show."""
        contents = contents_of(self.file)
        if self.json:
            print_json({"file": text_of(self.file), **contents.to_dict()})
        else:
            _show(self.file, contents)


def _show(file: Path, contents: Contents) -> None:
    content = contents.to_dict()
    by = "" if contents.written_by is None else f", written by woodfisher {contents.written_by}"
    table = Table(title=f"{file}{by}", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("tensor", overflow="fold")
    for column in ("dtype", "shape", "kept", "sparsity", "pattern", "dense", "stored"):
        left = column in ("dtype", "shape", "pattern")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for each in contents.layers:
        table.add_row(
            each.name,
            _short(each.dtype),
            "×".join(map(str, each.shape)),
            f"{each.kept:,}",
            f"{each.sparsity:.2%}",
            each.pattern,
            f"{each.dense:,}",
            f"{each.stored:,}",
        )
    others = [each for each in contents.entries if each.pattern is None]
    table.add_section()
    if others:
        dense, stored = sum(each.dense for each in others), sum(each.stored for each in others)
        table.add_row(f"{len(others)} others", *[""] * 5, f"{dense:,}", f"{stored:,}")
    total = content["bytes"]
    table.add_row(
        "the file",
        "",
        "",
        f"{content['kept']:,}",
        f"{content['sparsity']:.2%}",
        "",
        f"{total['dense']:,}",
        f"{total['stored']:,}",
    )
    console = out()
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    console.print(table)
    console.print(size_on_disk(total))


def _short(dtype: str) -> str:
    """As safetensors calls it: F32 for float32, BF16 for bfloat16."""
    return dtype.replace("float", "F").upper()
