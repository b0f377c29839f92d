"""Chunks of samples → gradient rows of chosen weights, by the fastest way that gives those of each sample alone."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch

from woodfisher.errors import NoFactorsError, WoodfisherError
from woodfisher.gradients.batches import map_tensors, samples_in, some, tensors_of
from woodfisher.gradients.signals import Signals
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from woodfisher.gradients.batches import Batch
    from woodfisher.gradients.forward import Forward, State
    from woodfisher.gradients.layer_rows import LayerRows
    from woodfisher.gradients.layout import Layout


class RowMaker:
    """Makes gradient rows, all of them finite, of what flows through layers where that was found to hold.

    Parameters
    ----------
    forward:
        The model with its loss.
    layout:
        Names and places of the chosen weights.
    modules, parameters:
        Name of a weight → the module that has it, and the model's own parameter.

    Attributes
    ----------
    signals:
        What flows through the layers of these weights.
    """

    def __init__(
        self,
        forward: Forward,
        layout: Layout,
        modules: Mapping[str, nn.Module],
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        self.forward, self._layout = forward, layout
        self._modules, self._parameters = modules, parameters
        self.signals = Signals(forward, modules, parameters)

    def check_possible(self, names: Sequence[str]) -> None:
        """Raise where one of these weights belongs to a layer of a kind that gives no rows in factor form."""
        for name in names:
            if not self.signals.possible(name):
                raise WoodfisherError(
                    f"{name!r} belongs to a {type(self._modules[name]).__name__}, and rows in factor form are those of "
                    "Linear and convolution layers: leave it out with exclude=, or use WoodFisher."
                )

    def layer_rows(
        self, state: State, chunk: Batch, count: int, names: Sequence[str], *, done: int
    ) -> dict[str, LayerRows]:
        """A chunk, `done` rows after the first, as `count` rows in factor form, which nothing else stands for."""
        try:
            rows = self.signals.rows(state, chunk, count, names)
        except NoFactorsError as error:
            raise NoFactorsError(
                f'{error} Take WoodFisher with keep="memory", or leave it out with exclude=.'
            ) from error
        self._check_flowing(rows, chunk, done)
        return rows

    def squares(self, state: State, chunk: Batch, group: int, *, done: int, workspace: int) -> Tensor | None:
        """Squares of the rows of a chunk, `done` rows after the first, summed over them: float64 `(d,)`.

        None where a weight has no factor form.
        """
        flowing = self._flowing_if_possible(state, chunk, group, list(self._layout.shapes), workspace)
        if flowing is None:
            return None
        self._check_flowing(flowing, chunk, done)
        return self._layout.flatten({name: rows.squares() for name, rows in flowing.items()})

    def fill(
        self,
        out: Tensor,
        state: State,
        chunk: Batch,
        group: int,
        *,
        columns: Tensor | None,
        done: int,
        workspace: int,
    ) -> None:
        """Write a chunk, `done` rows after the first, to `out` `(c, k)`, of the weights in `columns` `(k,)` or all."""
        places = self._layout.places(columns)
        flowing = self._flowing_if_possible(state, chunk, group, list(places), workspace)
        is_less = False
        if flowing is not None:
            is_less = sum(each.factors.floats for each in flowing.values()) < out.shape[1]
            if is_less:
                self._check_flowing(flowing, chunk, done)
            for name, (place, index) in places.items():
                if index is None:
                    flowing.pop(name).dense(out=out[:, place])
                else:
                    flowing.pop(name).select(index, out[:, place])
        else:
            grouped = map_tensors(lambda t: t.reshape(len(out), group, *t.shape[1:]), chunk)
            gradients = self.forward.row_gradients(state, grouped, len(out))
            for name, (place, index) in places.items():
                rows = gradients.pop(name).detach().reshape(len(out), -1)
                out[:, place] = rows if index is None else rows[:, index]
        if not is_less:
            self.check_finite(out, done, chunk, group, columns)

    def _flowing_if_possible(
        self, state: State, chunk: Batch, group: int, names: Sequence[str], workspace: int
    ) -> dict[str, LayerRows] | None:
        """What flows through the layers of these weights; None where one has no factor form."""
        if not names:
            return {}
        able = self.signals.factors(state, chunk, group, workspace)
        if any(name not in able for name in names):
            return None
        try:
            return self.signals.rows(state, chunk, samples_in(chunk) // group, names)
        except NoFactorsError as error:
            warn(f"{error} Rows are taken in a slower way from here on.")
            return None

    def _check_flowing(self, flowing: Mapping[str, LayerRows], chunk: Batch, done: int) -> None:
        """Raise where a row is not finite, looking into the rows only if what flows through a layer is not."""
        for name, each in flowing.items():
            if not (each.outputs.sum() + each.inputs.sum()).isfinite():
                where = self._layout.slices[name]
                index = torch.arange(where.start, where.stop, device=each.inputs.device)
                self.check_finite(each.dense(), done, chunk, samples_in(chunk) // each.count, index)

    def check_finite(
        self, rows: Tensor, done: int, batch: Batch, group: int, columns: Tensor | None = None
    ) -> None:
        """Raise where a row `(c, k)` is not finite, `done` rows after the first; `batch` has `group` samples a row."""
        if torch.isfinite(rows.sum()) or torch.isfinite(rows).all():
            return
        row, position = (~torch.isfinite(rows)).nonzero()[0].tolist()
        name = self._layout.name_at(position if columns is None else int(columns[position]))
        samples = some(batch, row * group, (row + 1) * group)
        model = self.forward.model
        members = chain(model.named_parameters(), model.named_buffers())
        broken = [name for name, tensor in members if not _finite(tensor)]
        if not all(map(_finite, tensors_of(samples))):
            cause = "The data of that row itself holds NaN or infinity: clean it."
        elif broken:
            cause = f"The model's {broken[0]!r} itself holds NaN or infinity: load a sound one."
        else:
            dtype = str(self._parameters[name].dtype).removeprefix("torch.")
            cause = (
                f"Look for a division by zero or a logarithm of zero in the loss, or an overflow in {dtype}."
            )
        raise WoodfisherError(
            f"the gradient of {name!r} in row {done + row} is {float(rows[row, position])}. {cause}"
        )


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
