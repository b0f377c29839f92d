"""`woodfisher report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003  tyro reads the fields' types
from typing import Annotated

from tyro.conf import Positional, arg

from woodfisher.cli.console import out
from woodfisher.cli.options import File  # noqa: TC001  likewise
from woodfisher.files import check_other_file, write_whole
from woodfisher.results.page import PAGE, REPORT, require_page, write_page


@dataclass(frozen=True)
class MakePage:
    """Make the page report.html anew from a report.json of prune, train or compare.

    The page shows what the file says and nothing else: what was reached, layer by layer and stage by stage, and the
    command that reproduces it. It is one file without scripts, which needs no network.
    """

    source: Positional[Annotated[Path, arg(metavar="FOLDER|FILE")]]
    """A report.json, or the folder that it lies in."""

    out: File = None
    """Where the page goes (default: beside the report, as report.html)."""

    def run(self) -> None:
        """Read, check, write."""
        require_page()
        from woodfisher.results.page.record import read

        source = self.source / REPORT if self.source.is_dir() else self.source
        report = read(source)
        target = (
            self.out / PAGE
            if self.out is not None and self.out.is_dir()
            else self.out
            or (source.with_name(PAGE) if source.name == REPORT else source.with_suffix(".html"))
        )
        check_other_file(target, source)
        write_whole(target, lambda path: write_page(report, path))
        out().print(f"The page is {target}", soft_wrap=True)
