"""Several processes that train one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def on_first_rank(compute: Callable[[], T]) -> T:
    """Compute on the first rank of the default process group and give all ranks the result, or its error.

    Without a process group, or in one of a single process, it is just called. What it returns must be picklable.
    """
    if (
        not distributed.is_available()
        or not distributed.is_initialized()
        or distributed.get_world_size() == 1
    ):
        return compute()
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if distributed.get_rank() == 0:
        try:
            outcome = [(compute(), None)]
        except Exception as error:
            outcome = [(None, error)]
    distributed.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]
