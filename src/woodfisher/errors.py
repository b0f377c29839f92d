"""The error and the warning that every part of the library raises."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class WoodfisherError(ValueError):
    """Bad input or a numerical failure: what was expected, what came, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


class WoodfisherWarning(UserWarning):
    """Something that the user should know: a fallback, data that ended early, a layer removed whole."""


_recorder: ContextVar[list[str] | None] = ContextVar("woodfisher_warnings", default=None)


def warn(message: str, stacklevel: int = 3) -> None:
    """Issue a `WoodfisherWarning` and note it for the report that is being made, if any."""
    recorded = _recorder.get()
    if recorded is not None:
        recorded.append(message)
    warnings.warn(message, WoodfisherWarning, stacklevel=stacklevel)


@contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """Collect the text of every warning issued inside the block; they are still shown as usual."""
    messages: list[str] = []
    token = _recorder.set(messages)
    try:
        yield messages
    finally:
        _recorder.reset(token)
