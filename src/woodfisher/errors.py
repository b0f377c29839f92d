"""The errors and the one warning of the library, and what is said of packages that are missing."""

from __future__ import annotations

import importlib
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class WoodfisherError(ValueError):
    """Bad input or a numerical failure: what was expected, what came, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


class UnknownDistributionError(WoodfisherError):
    """Targets were to come from the model's own distribution, which the loss does not tell."""


class TooSparseError(WoodfisherError):
    """A sparsity leaves less than the floor of the layers keeps, or than the smallest group has."""


class IndefiniteError(WoodfisherError):
    """A matrix is not positive definite."""


class NoFactorsError(WoodfisherError):
    """Rows of a layer have no factor form."""


class WoodfisherWarning(UserWarning):
    """Something that the user should know: a fallback, data that ended early, a layer removed whole."""


class ElsewhereError(WoodfisherError):
    """Another of several processes failed, or is lost; it says itself why."""


def message_of(error: Exception) -> str:
    """What to tell other processes of an error: its message, and its type where that is another's."""
    return str(error) if isinstance(error, WoodfisherError) else f"{type(error).__name__}: {error}"


def told(error: Exception) -> str:
    """Say what was raised, and in which line of which file, unless that is Python's own that imports modules."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and frame.filename != importlib.__file__
    ]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{where}"


@contextmanager
def extra(name: str, need: str) -> Iterator[None]:
    """Around imports of optional packages: a failure says what needs them, and how to install the extra `name`."""
    try:
        yield
    except ImportError as error:
        raise WoodfisherError(f"{need}: pip install 'woodfisher[{name}]'. ({error})") from error
