"""Several processes that train one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

from torch import distributed

from woodfisher.errors import WoodfisherError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def on_first_rank(compute: Callable[[], T]) -> T:
    """Compute on the first rank of the default process group and give all ranks the result, or its error.

    Without a process group, or in one of a single process, it is just called. All ranks must call it, and wait
    no longer for the first than the group's timeout. What it returns must be picklable.
    """
    if (
        not distributed.is_available()
        or not distributed.is_initialized()
        or distributed.get_world_size() == 1
    ):
        return compute()
    if distributed.get_rank() != 0:
        received: list[tuple[T | None, str | None]] = [(None, None)]
        distributed.broadcast_object_list(received, src=0)
        result, failure = received[0]
        if failure is not None:
            raise WoodfisherError(f"on the first of the processes: {failure}")
        return cast("T", result)
    try:
        result = compute()
    except Exception as error:
        # As text, for an exception may not be picklable, and the others would then wait for ever.
        told = str(error) if isinstance(error, WoodfisherError) else f"{type(error).__name__}: {error}"
        distributed.broadcast_object_list([(None, told)], src=0)
        raise
    distributed.broadcast_object_list([(result, None)], src=0)
    return result
