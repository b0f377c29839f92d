"""Several processes that compute together, by the collectives of torch.distributed."""

from __future__ import annotations

import os
import pickle
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import distributed

from woodfisher.errors import ElsewhereError, message_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

T = TypeVar("T")

ALIGNMENT = 16
"""Bytes at whose multiples tensors of any dtype begin in a message."""


class Ranks:
    """The processes of a computation: here a single one, which has everything itself.

    Attributes
    ----------
    rank, size, local_size:
        Which of the processes this is, how many there are, and how many of them are on this machine.
    """

    rank = 0
    size = 1
    local_size = 1

    def gather(self, value: T) -> list[T]:
        """What each rank has, which must be picklable, in their order."""
        return [value]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the ranks of tensors of one shape and dtype."""
        return value

    def first(self, compute: Callable[[], T]) -> T:
        """What the first rank computes, which must be picklable."""
        return compute()

    def exchange(self, outgoing: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Tensors for each rank → tensors from each rank, of any shapes and dtypes."""
        return [list(each) for each in outgoing]


ALONE = Ranks()


class Group(Ranks):
    """The ranks of the default process group, which take all steps together.

    Every step begins by telling each other that all are well and at the same one, so that the error of one rank ends
    all of them and none waits for it.
    """

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        on_cuda = distributed.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")

    def gather(self, value: T) -> list[T]:
        return self._told("gather", value)

    def sum(self, value: Tensor) -> Tensor:
        self._told(f"sum of {value.dtype} {tuple(value.shape)}", None)
        total = value.to(self._device, copy=True, memory_format=torch.contiguous_format)
        _together(lambda: distributed.all_reduce(total))
        return total.to(value.device)

    def first(self, compute: Callable[[], T]) -> T:
        told = [pickle.dumps(compute()) if self.rank == 0 else b""]
        self._told("first", None)
        _together(lambda: distributed.broadcast_object_list(told, src=0, device=self._device))
        return cast("T", pickle.loads(told[0]))  # noqa: S301  of the first rank

    def exchange(self, outgoing: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        forms = [[(tuple(t.shape), t.dtype) for t in each] for each in outgoing]
        sent = torch.empty(sum(map(_message_bytes, forms)), dtype=torch.uint8, device=self._device)
        places = iter(_places(forms))
        for tensor in (t for each in outgoing for t in each):
            _view(sent, next(places), tuple(tensor.shape), tensor.dtype).copy_(tensor)
        coming = [each[self.rank] for each in self._told("exchange", forms)]
        received = torch.empty(sum(map(_message_bytes, coming)), dtype=torch.uint8, device=self._device)
        _together(
            lambda: distributed.all_to_all_single(
                received, sent, list(map(_message_bytes, coming)), list(map(_message_bytes, forms))
            )
        )
        places = iter(_places(coming))
        return [[_view(received, next(places), *form) for form in each] for each in coming]

    def fail(self, error: Exception) -> None:
        """Tell the others that this rank goes no further."""
        with suppress(RuntimeError):  # they may be gone
            distributed.all_gather_object([None] * self.size, (message_of(error), "", None))

    def _told(self, step: str, value: Any) -> list[Any]:
        """What each rank tells at a step; raises on all of them where one failed or is elsewhere."""
        told: list[Any] = [None] * self.size
        _together(lambda: distributed.all_gather_object(told, (None, step, value)))
        for rank, (failure, _, _) in enumerate(told):
            if failure is not None:
                raise ElsewhereError(f"on process {rank} of {self.size}: {failure}")
        if len({step for _, step, _ in told}) > 1:
            raise ElsewhereError(
                "the processes do different things at the same time: call the same functions with the same arguments, "
                "in the same order, in each of them."
            )
        return [value for _, _, value in told]


def _together(collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:
        raise ElsewhereError(
            "the processes lost each other: one of them ended, is cut off, or did not come as far within the time "
            f"limit of their group. ({str(error).strip().splitlines()[0]})"
        ) from error


def _message_bytes(forms: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> int:
    return sum(_room(*form) for form in forms)


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor in a message."""
    return -(-torch.Size(shape).numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _places(messages: Sequence[Sequence[tuple[tuple[int, ...], torch.dtype]]]) -> Iterator[int]:
    """Where the tensors of messages begin that follow each other."""
    place = 0
    for form in (form for each in messages for form in each):
        yield place
        place += _room(*form)


def _view(message: Tensor, place: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return message[place : place + size].view(dtype).view(shape)


def in_a_group() -> bool:
    """Whether this is one of several processes with a default process group."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@contextmanager
def together() -> Iterator[Ranks]:
    """The ranks of the default process group, or this process alone; all ranks enter and leave the block together.

    A rank that fails inside ends the others with its error, at the latest where they leave.
    """
    if not in_a_group():
        yield ALONE
        return
    group = Group()
    try:
        yield group
    except ElsewhereError:
        raise
    except Exception as error:
        group.fail(error)
        raise
    group.gather(None)


def on_first_rank(compute: Callable[[], T]) -> T:
    """Compute on the first rank of the default process group and give all ranks the result, or its error.

    Without a process group, or in one of a single process, it is just called. All ranks must call it, and wait
    no longer for the first than the group's timeout. What it returns must be picklable.
    """
    with together() as ranks:
        return ranks.first(compute)
