"""Chunks of samples → gradient rows of chosen weights, by the fastest way that gives those of each sample alone."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch

from woodfisher.errors import NoFactorsError, WoodfisherError
from woodfisher.gradients.batches import map_tensors, tensors_of
from woodfisher.gradients.signals import Signals
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from woodfisher.gradients.chunks import Chunk
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
                    "Linear, convolution, recurrent and attention layers: leave it out with exclude=, or use "
                    "WoodFisher."
                )

    def layer_rows(self, state: State, chunk: Chunk, names: Sequence[str]) -> dict[str, LayerRows]:
        """The rows of a chunk in factor form, which nothing else stands for."""
        try:
            rows = self.signals.rows(state, chunk.batch, chunk.count, names)
        except NoFactorsError as error:
            raise NoFactorsError(
                f'{error} Take WoodFisher with keep="memory", or leave it out with exclude=.'
            ) from error
        self._check_flowing(rows, chunk)
        return rows

    def squares(self, state: State, chunk: Chunk, workspace: int) -> Tensor | None:
        """Squares of the rows of a chunk, summed over them: float64 `(d,)`. None where a weight has no factor form."""
        flowing = self._flowing_if_possible(state, chunk, list(self._layout.shapes), workspace)
        if flowing is None:
            return None
        self._check_flowing(flowing, chunk)
        return self._layout.flatten({name: rows.squares() for name, rows in flowing.items()})

    def fill(self, out: Tensor, state: State, chunk: Chunk, columns: Tensor | None, workspace: int) -> None:
        """Write the rows of a chunk to `out` `(c, k)`, of the weights in `columns` `(k,)` or all."""
        places = self._layout.places(columns)
        flowing = self._flowing_if_possible(state, chunk, list(places), workspace)
        is_less = False
        if flowing is not None:
            is_less = sum(each.factors.floats for each in flowing.values()) < out.shape[1]
            if is_less:
                self._check_flowing(flowing, chunk)
            for name, (place, index) in places.items():
                if index is None:
                    flowing.pop(name).dense(out=out[:, place])
                else:
                    flowing.pop(name).select(index, out[:, place])
        else:
            grouped = map_tensors(lambda t: t.unflatten(0, (chunk.count, chunk.group)), chunk.batch)
            gradients = self.forward.row_gradients(state, grouped, chunk.count)
            for name, (place, index) in places.items():
                rows = gradients.pop(name).detach().reshape(chunk.count, -1)
                out[:, place] = rows if index is None else rows[:, index]
        if not is_less:
            self.check_finite(out, chunk, columns)

    def _flowing_if_possible(
        self, state: State, chunk: Chunk, names: Sequence[str], workspace: int
    ) -> dict[str, LayerRows] | None:
        """What flows through the layers of these weights; None where one has no factor form."""
        if not names:
            return {}
        able = self.signals.factors(state, chunk.batch, chunk.group, workspace)
        if any(name not in able for name in names):
            return None
        try:
            return self.signals.rows(state, chunk.batch, chunk.count, names)
        except NoFactorsError as error:
            warn(f"{error} Rows are taken in a slower way from here on.")
            return None

    def _check_flowing(self, flowing: Mapping[str, LayerRows], chunk: Chunk) -> None:
        """Raise where a row is not finite, looking into the rows only if what flows through a layer is not."""
        for name, each in flowing.items():
            if not (each.outputs.sum() + each.inputs.sum()).isfinite():
                where = self._layout.slices[name]
                index = torch.arange(where.start, where.stop, device=each.inputs.device)
                self.check_finite(each.dense(), chunk, index)

    def check_finite(self, rows: Tensor, chunk: Chunk, columns: Tensor | None = None) -> None:
        """Raise where one of the rows `(c, k)` of a chunk is not finite, of the weights in `columns` `(k,)` or all."""
        if torch.isfinite(rows.sum()) or torch.isfinite(rows).all():
            return
        row, position = (~torch.isfinite(rows)).nonzero()[0].tolist()
        name = self._layout.name_at(position if columns is None else int(columns[position]))
        samples = chunk.part(row, row + 1).batch
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
                f"Look for a division by zero or a logarithm of zero in the loss, or an overflow in {dtype}. A loss "
                "that compares samples needs several a row: give the curvature a group=, and a number of stages."
            )
        raise WoodfisherError(
            f"the gradient of {name!r} in row {chunk.first + row} is {float(rows[row, position])}. {cause}"
        )


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
