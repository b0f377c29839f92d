"""What flows through the layers of a model as it runs: recorded, made rows of, and tried against the slow way."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.conv import _ConvNd

from woodfisher.errors import NoFactorsError
from woodfisher.gradients.batches import describe, map_tensors, row_batches, samples_in, some
from woodfisher.gradients.forward import State, evenly_labelled, explained
from woodfisher.gradients.layer_rows import LayerRows
from woodfisher.gradients.parameters import is_conv1d
from woodfisher.gradients.plain import in_plain_products, is_packed
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from woodfisher.gradients.batches import Batch
    from woodfisher.gradients.forward import Forward
    from woodfisher.gradients.layer_rows import Factors

_TRIED_ROWS = 2
"""Rows that are also taken alone, to see whether gradients taken together are the same."""

TRIED_ROWS_OF_OWN_LOSS = 8
"""Rows that are also taken alone where the model weighs samples in a loss of its own."""

_CANCELLED = 32
"""Units of rounding, each as large as the terms that are added up, that a gradient which is zero may come out as."""

_LAST_BITS, _ROUNDED = (-16, -8, 8, 16), 4
"""Units of rounding that weights are moved by, and how many times as far as that moves a gradient two ways to compute
it may be apart."""


class Signals:
    """What flows through the layers of chosen weights.

    Parameters
    ----------
    forward:
        The model with its loss.
    modules, parameters:
        Name of a weight → the module that has it, and the model's own parameter.
    """

    def __init__(
        self, forward: Forward, modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._forward, self._modules, self._parameters = forward, modules, parameters
        self._tried: dict[str, tuple[int, dict[str, Factors]]] = {}
        self._chunks, self._given_up = 0, False

    def possible(self, name: str) -> bool:
        """Whether a weight belongs to a layer whose rows can have factor form."""
        return has_factors(self._modules[name], self._parameters[name])

    @torch.enable_grad()
    def rows(self, state: State, chunk: Batch, count: int, names: Sequence[str]) -> dict[str, LayerRows]:
        """A chunk of samples as `count` rows of the gradients of the weights in `names`.

        Raises `NoFactorsError` where a layer does not see as much of each sample as of those that were tried, and
        from then on no weights have factors. It need not show in the number of positions, so that one row is also
        taken alone, of chunks number 1, 2, 4, 8 and so on.
        """
        try:
            made = self._rows(state, chunk, count, names)
            _, tried = self._tried.get(_form(chunk, samples_in(chunk) // count), (0, {}))
            for name, rows in made.items():
                if rows.factors != tried.get(name, rows.factors):
                    raise _uneven(name)
            self._chunks += 1
            if self._chunks & (self._chunks - 1) == 0:
                self._check_a_row(state, chunk, made)
        except NoFactorsError:
            self._given_up = True
            raise
        return made

    def _rows(self, state: State, chunk: Batch, count: int, names: Sequence[str]) -> dict[str, LayerRows]:
        if self._forward.loss is None and not evenly_labelled(chunk, count):
            each = [self._rows(state, row, 1, names) for row in row_batches(chunk, count)]
            return {name: LayerRows.joined([part[name] for part in each]) for name in names}
        state = state.differentiable(names)

        def flow() -> list[tuple[str, Call, Tensor | None]]:
            with recorded_calls(self._forward.model, {name: self._modules[name] for name in names}) as calls:
                total = self._forward.sum_of_losses(state, chunk, samples_in(chunk) // count)
            made = [(name, only_call(name, calls[name])) for name in names]
            for name, call in made:
                if len(call.inputs) != call.shape[0] or call.shape[0] % count:
                    raise _uneven(name)
            gradients = torch.autograd.grad(total, [call.output for _, call in made], allow_unused=True)
            return [(name, call, gradient) for (name, call), gradient in zip(made, gradients, strict=True)]

        with explained(chunk):
            flows = self._forward.at(state.copied(), flow)
        rows = {}
        for name, call, gradient in flows:
            s = call.inputs.new_zeros(call.shape) if gradient is None else gradient
            a, s = (t.unflatten(0, (count, -1)) for t in (call.inputs.to(s.dtype), s))
            rows[name] = LayerRows.of(self._modules[name], self._parameters[name], a, s)
        return rows

    def _check_a_row(
        self,
        state: State,
        chunk: Batch,
        made: Mapping[str, LayerRows],
    ) -> None:
        """Raise `NoFactorsError` where a row is not as it is alone, as near as rounding lets it be.

        It is the largest of the latter half: what of the others is more than noise, nobody knows.
        """
        count = next(iter(made.values())).count
        half = count // 2
        size = torch.zeros(count - half)
        for rows in made.values():
            size += rows.part(slice(half, None)).most_norms().cpu()
        row = half + int(size.argmax())
        group = samples_in(chunk) // count
        sample = some(chunk, row * group, (row + 1) * group)
        alone = self._forward.gradient(state, sample)
        apart: dict[str, float] = {}
        for name, rows in made.items():
            together, true = rows.part(slice(row, row + 1)).dense()[0], alone[name].flatten()
            tolerance = torch.finfo(rows.outputs.dtype).eps ** 0.25
            largest = max(float(together.norm()), float(true.norm()))
            distance = float((together - true).norm())
            if distance > tolerance * largest + _noise(rows, row):
                apart[name] = distance
        moved = self._moved_by_rounding(state, sample, alone) if apart else {}
        for name, distance in apart.items():
            if not distance <= _ROUNDED * moved[name]:
                raise _uneven(name)

    def _moved_by_rounding(
        self, state: State, sample: Batch, alone: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """How far other last bits of the weights move a gradient: far where a rectifier is close to its kink."""
        moved = dict.fromkeys(alone, 0.0)
        for units in _LAST_BITS:
            near = {name: weight * (1 + units * _unit(weight)) for name, weight in state.weights.items()}
            there = self._forward.gradient(replace(state, weights=near), sample)
            moved = {name: max(far, float((there[name] - alone[name]).norm())) for name, far in moved.items()}
        return moved

    @torch.enable_grad()
    def factors(
        self,
        state: State,
        batch: Batch,
        group: int,
        workspace: int,
    ) -> dict[str, Factors]:
        """The weights whose rows can be had in factor form, and what that takes.

        Tried on the first rows of a batch, for the first one of its form, with `workspace` bytes.
        """
        wanted = _TRIED_ROWS if self._forward.loss is not None else TRIED_ROWS_OF_OWN_LOSS
        rows = min(samples_in(batch) // group, wanted)
        if self._given_up:
            return {}
        form = _form(batch, group)
        tried, found = self._tried.get(form, (0, {}))
        if tried < rows:
            found = self._try(state, some(batch, 0, rows * group), rows, workspace)
            self._tried[form] = rows, found
        return found

    def _try(
        self,
        state: State,
        batch: Batch,
        rows: int,
        workspace: int,
    ) -> dict[str, Factors]:
        model = self._forward.model
        shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        able = {
            name: module
            for name, module in self._modules.items()
            if self.possible(name) and shared[id(self._parameters[name])] == 1
        }
        samples = samples_in(batch)
        with recorded_calls(model, able) as calls, explained(batch):
            self._forward.mean_loss(state.differentiable(able), batch)
        once = [
            name
            for name, made in calls.items()
            if len(made) == 1 and len(made[0].inputs) == made[0].shape[0] and made[0].shape[0] % samples == 0
        ]
        if not once:
            return {}
        # Where a network fits well, gradients cancel to a few digits of float32.
        fits = (
            2 * torch.float64.itemsize * sum(weight.numel() for weight in state.weights.values()) <= workspace
        )
        found, reason = None, ""
        for dtype in (torch.float64, None) if fits else (None,):
            try:
                found = self._same_as_alone(state, batch, rows, once, dtype)
                break
            except Exception as error:  # a model may have anything against float64
                reason = f"{type(error).__name__}: {error}"
        if found is None:
            warn(
                f"what flows through the layers can't be made rows of, so they are taken in a slower way. ({reason})"
            )
            return {}
        if len(found) < len(once):
            first = next(name for name in once if name not in found)
            warn(
                f"gradients of samples taken together are not those of each alone, as for {first!r}: the model mixes "
                "the samples of a batch, uses the weight outside of its layer too, or draws random numbers in "
                "evaluation mode. They are taken in a slower way."
            )
        return {name: each.factors for name, each in found.items()}

    def _same_as_alone(
        self,
        state: State,
        batch: Batch,
        rows: int,
        names: Sequence[str],
        dtype: torch.dtype | None,
    ) -> dict[str, LayerRows]:
        """What flows through those layers from which the same gradients follow as rows have alone, in `dtype`."""
        if dtype is not None:
            own = dict(self._forward.model.named_parameters())
            batch, weights, buffers = (
                map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, part)
                for part in (batch, {**own, **state.weights}, state.buffers)
            )
            state = State(weights, buffers)
        signals = self._rows(state, batch, rows, names)
        apart, norms, noise = (dict.fromkeys(names, 0.0) for _ in range(3))
        for i, row in enumerate(row_batches(batch, rows)):
            alone = self._forward.gradient(state, row)
            for name, each in signals.items():
                true = alone[name].flatten()
                # NaN changes neither of both: it is found, and explained, in the rows themselves.
                norms[name] = max(norms[name], float(true.norm()))
                together = each.part(slice(i, i + 1)).dense()[0]
                apart[name] = max(apart[name], float((together - true).norm()))
                noise[name] = max(noise[name], _noise(each, i))
        tolerance = torch.finfo(next(iter(signals.values())).outputs.dtype).eps ** 0.5
        return {name: signals[name] for name in names if apart[name] <= tolerance * norms[name] + noise[name]}


def _noise(rows: LayerRows, row: int) -> float:
    """What rounding leaves of a row whose terms cancel, as of a bias in front of a normalisation."""
    terms = float(rows.part(slice(row, row + 1)).most_norms())
    return _CANCELLED * torch.finfo(rows.outputs.dtype).eps * terms


def _unit(weight: Tensor) -> float:
    return torch.finfo(torch.float64 if weight.dtype == torch.float64 else torch.float32).eps


def _form(batch: Batch, group: int) -> str:
    """What a sample of a batch looks like, in rows of `group`."""
    return f"{group} {describe(some(batch, 0, 1))}"


def has_factors(module: nn.Module, weight: Tensor) -> bool:
    """Whether the gradient of a weight or bias follows from what flows in and out of its layer."""
    if is_packed(module):
        return any(weight is own for own in module.parameters(recurse=False))
    if weight is not getattr(module, "weight", None) and weight is not getattr(module, "bias", None):
        return False
    return isinstance(module, (nn.Linear, _ConvNd)) or is_conv1d(module)


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes
    ----------
    inputs:
        What it was called with.
    output:
        Where the gradient of what it returned comes by, whatever is done to that in place later.
    shape:
        Of what it returned.
    """

    inputs: Tensor
    output: GradientEdge
    shape: torch.Size


@contextmanager
def recorded_calls(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Weight name → the calls of its module of the model during the block, which has to take gradients.

    Of layers that have several weights those of the products with each.
    """
    calls: dict[str, list[Call]] = {name: [] for name in modules}
    names: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(module, []).append(name)

    def note(names: Iterable[str], came: Tensor, output: Tensor) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            for name in names:
                calls[name].append(Call(came.detach(), get_gradient_edge(output), output.shape))

    def record(
        module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> None:
        note(names[module], inputs[0] if inputs else next(iter(named.values())), output)

    def record_one(module: nn.Module, parameter: str, came: Tensor, output: Tensor) -> None:
        note([name for name in names.get(module, ()) if name.rpartition(".")[2] == parameter], came, output)

    # Before the hooks that a model may have itself, since those may return something else.
    handles = [
        module.register_forward_hook(record, prepend=True, with_kwargs=True)
        for module in names
        if not is_packed(module)
    ]
    try:
        with in_plain_products(model.modules(), record_one):
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def only_call(name: str, calls: Sequence[Call]) -> Call:
    """The one call of a layer, which gradients in factor form need."""
    if len(calls) == 1:
        return calls[0]
    how = (
        "is called more than once in"
        if calls
        else "is not called as a module, or not by one product with all of it, in"
    )
    raise NoFactorsError(
        f"what flows through the layer of {name!r} does not give its gradients, since it {how} the forward pass."
    )


def _uneven(name: str) -> NoFactorsError:
    return NoFactorsError(
        f"the layer of {name!r} does not see as much of each sample as of others (where padding is left out, say, "
        "or samples take different ways), so that its rows have no factor form."
    )
