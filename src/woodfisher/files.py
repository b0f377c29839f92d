"""Files: results written whole or not at all, and one error for what can't be read."""

from __future__ import annotations

import csv
import errno
import glob
import json
import os
import secrets
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from woodfisher.errors import WoodfisherError
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_ABANDONED = 3600
"""Seconds after which nobody writes to a draft any more."""


def unreadable(path: Path, expected: str, error: Exception) -> WoodfisherError:
    """Make the error for a file that could not be read as what was expected."""
    reason = str(error).partition("\n")[0] or "no further reason"
    return WoodfisherError(
        f"{path} cannot be read as {expected} ({type(error).__name__}: {reason}). It may be incomplete or of "
        "another kind: check the name, or fetch the file again."
    )


def save_json(content: Any, path: Path) -> None:
    """Write JSON, indented; NaN and infinity are refused."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Raise, before any work, if `write_folder` could not put a folder there."""
    parents = [folder, *folder.absolute().parents]
    try:
        existing = next(parent for parent in parents if parent.exists() or parent.is_symlink())
    except OSError as error:
        raise WoodfisherError(f"the folder {folder} can't be made: {error}.") from error
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise WoodfisherError(
            f"results go into the folder {folder}, and {existing} is not a folder that can be written to. "
            "Choose another with --out."
        ) from error


def check_other_file(target: Path, source: Path) -> None:
    """Raise if writing `target` would replace `source`, which it is made of."""
    with suppress(OSError):
        if target.samefile(source):
            raise WoodfisherError(f"{target} is the file that is read: name another place with --out.")


def text_of(path: object) -> str:
    """A path, or a command with some, as text that UTF-8 can hold, whatever bytes it has."""
    return str(path).encode(errors="surrogateescape").decode(errors="replace")


def remove(path: Path) -> None:
    """Remove a file of an earlier run, if there is one."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise WoodfisherError(f"{path} is in the way of a new one and can't be removed: {error}.") from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is there whole or not at all, whenever the process ends; an old one is replaced.

    A link stays one: what it leads to is written.
    """
    if os.path.isdir(path):  # noqa: PTH112  False for names that are too long
        raise WoodfisherError(f"{path} is a folder, and a file is to be written: name one in it.")
    path = Path(os.path.realpath(path)) if os.path.islink(path) else path  # noqa: PTH114  as above
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        write(draft)
        draft.replace(path)
    except OSError as error:
        raise WoodfisherError(
            f"{path} could not be written: {error}. {_remedy(error)}hoose another folder."
        ) from error
    finally:
        with suppress(OSError):
            draft.unlink()


def _remove_abandoned(path: Path) -> None:
    """Remove the drafts of a file that killed processes have left; others may be writing theirs."""
    for draft in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(OSError):
            if time.time() - draft.stat().st_mtime > _ABANDONED:
                draft.unlink()


def _remedy(error: OSError) -> str:
    return "Make room or c" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "C"


def save_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows as CSV under the names of the first one's columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _draw(draw: Callable[[Path], object], path: Path) -> None:
    """Draw a picture; one that fails but for the disk is none, since what it shows is worth more."""
    try:
        draw(path)
    except OSError:
        raise
    except Exception as error:
        path.unlink(missing_ok=True)
        reason = str(error).partition("\n")[0]
        warn(f"{path.name} could not be drawn, and is left out: {type(error).__name__}: {reason}")


def write_folder(
    folder: Path,
    writers: Mapping[str, Callable[[Path], object]],
    pictures: Mapping[str, Callable[[Path], object]] = MappingProxyType({}),
) -> None:
    """Make a folder of files, by name; nothing appears in it before all of them are written.

    Files of the same names are replaced, others stay. What a killed process had drafted goes the next time.
    `pictures` show what the others hold: one that can't be drawn is left out, with a warning.
    """
    draft = folder / ".draft"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for file, write in writers.items():
            write(draft / file)
        for file, draw in pictures.items():
            _draw(draw, draft / file)
        for file in (*writers, *pictures):
            if (draft / file).exists():
                (draft / file).replace(folder / file)
            else:
                (folder / file).unlink(missing_ok=True)
    except OSError as error:
        raise WoodfisherError(
            f"the results could not be written to {folder}: {error}. {_remedy(error)}hoose another with --out."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
