"""Batches of any form: what they look like, how they reach the model, and how they are cut into rows."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sized
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from woodfisher.errors import WoodfisherError
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Batch = Any
"""`(inputs, targets)` or a dict, of tensors (or nested tuples, lists and dicts of them) with one leading
dimension, the samples."""

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)

FORWARD_BATCH = 128
"""Samples of a forward pass that takes no gradients: few enough for a convolution's outputs to stay in the cache, and a
multiple of 16, without which convolutions take a third longer on the processors that this was measured on."""

_NO_OTHERS = 100
"""Times that held-out samples come, and none but them, after which data that doesn't end is taken to have no others."""

_AT_ONCE = 256
"""Samples that are held at once while many are passed over."""


def check_data(data: object) -> None:
    """Raise unless `data` is an iterable of batches, and not a single one."""
    if isinstance(data, (Tensor, Mapping)) or (
        isinstance(data, tuple) and any(isinstance(part, (Tensor, np.ndarray)) for part in data)
    ):
        raise WoodfisherError("data is an iterable of batches, and one batch came: put it into a list.")
    if not hasattr(data, "__iter__"):
        hint = (
            "wrap it in a torch.utils.data.DataLoader"
            if hasattr(data, "__getitem__")
            else "as a DataLoader is"
        )
        raise WoodfisherError(f"data must be an iterable of batches; a {type(data).__name__} came: {hint}.")


def read_apart(data: Iterable[Batch]) -> Iterable[Batch]:
    """The same data, for another reader: a loader that keeps its workers has one iterator, which each starts over."""
    if not isinstance(data, DataLoader) or not data.persistent_workers:
        return data
    other = copy.copy(data)
    vars(other).update(persistent_workers=False, _iterator=None)
    return other


def map_tensors(function: Callable[..., Tensor], *batches: Batch) -> Batch:
    """Apply `function` to the corresponding tensors of batches of the same structure."""
    first = batches[0]
    if isinstance(first, Mapping):
        return {key: map_tensors(function, *(batch[key] for batch in batches)) for key in first}
    if isinstance(first, (tuple, list)):
        parts = (map_tensors(function, *each) for each in zip(*batches, strict=True))
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    if isinstance(first, Tensor) and first.layout != torch.strided:
        raise WoodfisherError(
            f"a batch must consist of dense tensors, and it holds one of layout {first.layout}: call to_dense(), or "
            "make one that is the same for all samples a buffer of the model."
        )
    if isinstance(first, (Tensor, np.ndarray)):
        return function(*(torch.as_tensor(batch) for batch in batches))
    raise WoodfisherError(
        "a batch must consist of tensors, in (inputs, targets) or in a dict; "
        f"it holds a {type(first).__name__}. Convert it, or leave it out of the batch."
    )


def some(batch: Batch, first: int, last: int | None = None) -> Batch:
    """The samples `first … last - 1` of a batch; to its end without `last`."""
    return map_tensors(lambda t: t[first:last], batch)


def tensors_of(batch: Batch) -> list[Tensor]:
    """All tensors of a batch, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, batch)
    return found


def samples_in(batch: Batch) -> int:
    """Length of the leading dimension, which all tensors of a batch must share."""
    lengths = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors_of(batch)}
    if len(lengths) != 1 or 0 in lengths:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_of(batch))
        raise WoodfisherError(
            "all tensors of a batch must have the samples as their first dimension, at least one of them; "
            f"shapes {shapes or 'of no tensor'} came."
        )
    return lengths.pop()


def describe(batch: Batch) -> str:
    """Shapes and dtypes of a batch, for messages."""
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_of(batch))


def length(data: Iterable[Batch]) -> int | None:
    """How many samples data gives, where it tells without being read."""
    if isinstance(data, (list, tuple)):
        return sum(map(samples_in, data))
    if isinstance(data, (Replay, Few)):
        return data.length
    if isinstance(data, DataLoader):
        batches, samples = _samplers(data)
        if isinstance(batches, BatchSampler) and isinstance(samples, Sized):
            return len(samples) - (len(samples) % batches.batch_size if batches.drop_last else 0)
    return None


def reads_once(data: Iterable[Batch]) -> bool:
    """Whether data can be read only once, so that nothing may be tried on it beforehand."""
    return isinstance(data, Iterator)


def _samplers(loader: DataLoader[Any]) -> tuple[object, object]:
    """What draws a loader's batches, and what draws the samples in them where that is told."""
    batches: object = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    samples = batches
    while isinstance(samples, BatchSampler):
        samples = samples.sampler
    return batches, samples


def take(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """The first `samples` samples (fewer where the data ends), in the batches that they came in."""
    left = samples
    for batch in batches:
        count = samples_in(batch)
        yield batch if count <= left else some(batch, 0, left)
        left -= count
        if left <= 0:
            return


def rechunk(batches: Iterable[Batch], size: int, group: int) -> Iterator[Batch]:
    """Cut and join batches into chunks of `size` samples, in order, whatever batches they came in.

    Chunks hold whole groups of `group` samples (`size` is a multiple of it); samples at the end that fill no
    group are left out. Batches whose samples have other shapes (padded sequences, say) start a new chunk; what fills
    no group before them is left out with a warning.
    """
    pending: list[Batch] = []
    count = 0
    for batch in batches:
        if pending and _sample_form(batch) != _sample_form(pending[0]):
            if count % group:
                warn(
                    f"a row averages {group} samples, and some that fill no row are left out where batches of another "
                    f"shape follow: pad samples to one shape, or use batches of a multiple of {group} samples."
                )
            if count >= group:
                yield some(_join(pending), 0, count - count % group)
            pending, count = [], 0
        pending.append(batch)
        count += samples_in(batch)
        if count >= size:
            joined = _join(pending)
            whole = count - count % size
            for first in range(0, whole, size):
                yield some(joined, first, first + size)
            count -= whole
            pending = [some(joined, whole)] if count else []
    if count >= group:
        yield some(_join(pending), 0, count - count % group)


def row_batches(batch: Batch, rows: int) -> Iterator[Batch]:
    """A batch cut into `rows` of the same number of samples."""
    group = samples_in(batch) // rows
    return (some(batch, i * group, (i + 1) * group) for i in range(rows))


def joined(batches: list[Batch]) -> Batch | None:
    """Batches as one; None where their samples have several forms."""
    same = all(_sample_form(batch) == _sample_form(batches[0]) for batch in batches)
    return _join(batches) if same else None


def _join(pending: list[Batch]) -> Batch:
    return map_tensors(lambda *parts: torch.cat(parts), *pending) if len(pending) > 1 else pending[0]


def _sample_form(batch: Batch) -> Any:
    keys = tuple(batch) if isinstance(batch, Mapping) else None
    return keys, [(tensor.shape[1:], tensor.dtype) for tensor in tensors_of(batch)]


class Replay:
    """Data that gives the same batches in the same order each time it is iterated over.

    Batches are remembered as they are first drawn, so that what several runs share is read once, and what
    nobody asks for never.
    """

    def __init__(self, data: Iterable[Batch]) -> None:
        self._source = iter(data)
        self._drawn: list[Batch] = []
        self.length = length(data)

    def __iter__(self) -> Iterator[Batch]:
        position = 0
        while True:
            if position == len(self._drawn):
                batch = next(self._source, None)
                if batch is None:
                    return
                self._drawn.append(batch)
            yield self._drawn[position]
            position += 1


class Few:
    """The first samples of some data, held in memory, in batches of another order each time it is iterated over.

    Parameters
    ----------
    data:
        Any batches.
    samples:
        How many of their samples to take.
    seed:
        Of the order.
    """

    def __init__(self, data: Iterable[Batch], samples: int, seed: int) -> None:
        taken = list(take(data, samples))
        self._size = samples_in(taken[0]) if taken else 1
        self._parts = list(rechunk(taken, samples, 1))
        self.length = sum(map(samples_in, taken))
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return sum(-(-samples_in(part) // self._size) for part in self._parts)

    def __iter__(self) -> Iterator[Batch]:
        for part in self._parts:
            for index in torch.randperm(samples_in(part), generator=self.generator).split(self._size):
                yield map_tensors(lambda t, index=index: t[index.to(t.device)], part)


class Stream:
    """Data drawn a few samples at a time: new ones until it ends, then again from its start.

    Data that can be read only once gives its last samples again. Samples that are held out never come. No data is
    read before it is asked for.

    Parameters
    ----------
    data:
        Any batches.
    held_out:
        Digests of the samples that never come.
    """

    def __init__(self, data: Iterable[Batch], held_out: frozenset[bytes] = frozenset()) -> None:
        self._data, self._held_out = data, held_out
        self._current = self._without_held_out(data)
        self._rest: list[Batch] = []
        self._last: list[Batch] = []

    def draw(self, samples: int) -> list[Batch]:
        """Batches of `samples` samples together; fewer where all the data is fewer."""
        if samples == 0:
            return []
        drawn = self._next(samples)
        missing = samples - sum(map(samples_in, drawn))
        if missing:
            self._current = self._without_held_out(self._data)
            again = self._next(samples)
            if not (again or drawn or self._last) and self._held_out:
                raise self._all_held_out()
            if sum(map(samples_in, again)) < samples:
                drawn = again or drawn or self._last
            else:
                self._put_back(again)
                drawn += self._next(missing)
        self._last = drawn
        return drawn

    def skip(self, samples: int) -> None:
        """Pass over as many samples, around the end, so as to go on where another stream of the same data stopped.

        A `DataLoader` that shuffles has random numbers to come in new order, and none are passed over.
        """
        if isinstance(self._data, DataLoader) and isinstance(_samplers(self._data)[1], _SHUFFLING):
            return
        passed = self._pass(samples)
        if 0 < passed < samples:
            self._current = self._without_held_out(self._data)
            self._pass(samples % passed)

    def _pass(self, samples: int) -> int:
        """Let go of as many of the next samples as there are; their number."""
        passed = 0
        while drawn := self._next(min(samples - passed, _AT_ONCE)):
            passed += sum(map(samples_in, drawn))
        return passed

    def _next(self, samples: int) -> list[Batch]:
        """As many of the next samples as there are, with what is left of the last batch kept for later."""
        drawn: list[Batch] = []
        while samples > 0:
            batch = self._rest.pop() if self._rest else next(self._current, None)
            if batch is None:
                break
            count = samples_in(batch)
            if count > samples:
                self._rest.append(some(batch, samples))
                batch = some(batch, 0, samples)
            drawn.append(batch)
            samples -= count
        return drawn

    def count(self, most: int) -> int:
        """Samples that the data has, as far as `most`: data that can be read only once is read ahead and kept."""
        if not self.reads_once:
            return sum(map(samples_in, take(self._data, most)))
        ahead = self._next(most)
        if sum(map(samples_in, ahead)) < most:
            self._data = ahead
        self._put_back(ahead)
        return sum(map(samples_in, ahead))

    def _put_back(self, drawn: list[Batch]) -> None:
        self._rest += reversed(drawn)

    def fork(self) -> Stream:
        """The same data from its start again, without what is held out."""
        return Stream(self._data, self._held_out)

    @property
    def reads_once(self) -> bool:
        """Whether the data can't be read from its start again."""
        return reads_once(self._data)

    def hold_out(self, samples: int) -> list[Batch]:
        """Draw samples that come in no later draw, in whatever order the data is read again."""
        drawn = self.draw(samples)
        self._last = []
        self._held_out = self._held_out.union(*map(fingerprints, drawn))
        self._current = self._without_held_out(chain(reversed(self._rest), self._current))
        self._rest = []
        return drawn

    def _without_held_out(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        if not self._held_out:
            yield from batches
            return
        passed_over = 0
        for batch in batches:
            stay = torch.tensor([key not in self._held_out for key in fingerprints(batch)])
            passed_over = 0 if stay.any() else passed_over + len(stay)
            if passed_over > _NO_OTHERS * len(self._held_out):
                raise self._all_held_out()
            if stay.all():
                yield batch
            elif stay.any():
                yield map_tensors(lambda t, stay=stay: t[stay.to(t.device)], batch)

    def _all_held_out(self) -> WoodfisherError:
        return WoodfisherError(
            f"the {len(self._held_out)} different samples that are held out to check stages on are all of the "
            "data: give more, or a number of stages, which holds none out."
        )


def bytes_of(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes, uint8 `(bytes,)`, for a digest."""
    whole = tensor.detach().cpu().contiguous()
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy()


def digest(*tensors: Tensor) -> bytes:
    """Of the bytes of tensors, sixteen that no other ones have."""
    return _digest(map(bytes_of, tensors))


def _digest(parts: Iterable[np.ndarray]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part.data)
    return found.digest()


def fingerprints(batch: Batch) -> list[bytes]:
    """A digest of each sample's bytes."""
    parts = [bytes_of(t).reshape(len(t), t.nbytes // max(len(t), 1)) for t in tensors_of(batch)]
    return [_digest(sample) for sample in zip(*parts, strict=True)]
