"""Recurrent layers and cells as plain products and what follows them: see `plain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from woodfisher.gradients.plain import Note


def cell(module: nn.RNNCellBase, note: Note | None, input: Tensor, hx: Any = None) -> Any:  # noqa: A002, as torch has it
    """What a cell returns."""
    if hx is None:
        zeros = input.new_zeros([*input.shape[:-1], module.hidden_size])
        hx = (zeros, zeros) if isinstance(module, nn.LSTMCell) else zeros
    hidden, memory = hx if isinstance(hx, tuple) else (hx, None)
    into, back = (
        F.linear(x, getattr(module, f"weight_{which}"), getattr(module, f"bias_{which}"))
        for which, x in (("ih", input), ("hh", hidden))
    )
    for which, x, out in (("ih", input, into), ("hh", hidden, back)):
        _tell(note, which, x, out)
    hidden, memory = _next(module, into, back, hidden, memory)
    return hidden if memory is None else (hidden, memory)


def layer(module: nn.RNNBase, note: Note | None, input: Any, hx: Any = None) -> Any:  # noqa: A002, as torch has it
    """What a recurrent layer returns; what flows through one that goes backwards is told of in that order."""
    if not isinstance(input, Tensor):
        return type(module).forward(module, input, hx)
    alone = input.ndim == 2
    x = input[None] if alone else input if module.batch_first else input.transpose(0, 1)
    ways = 1 + module.bidirectional
    states = _states(module, x, hx, alone)
    last = []
    for number in range(module.num_layers):
        outputs = []
        for way in range(ways):
            suffix = f"_l{number}" + "_reverse" * way
            began = [state[number * ways + way] for state in states]
            output, *ended = _through(module, note, suffix, x.flip(1) if way else x, *began)
            outputs.append(output.flip(1) if way else output)
            last.append(ended)
        x = torch.cat(outputs, 2)
        if number + 1 < module.num_layers:
            x = F.dropout(x, module.dropout, module.training)
    ends = tuple(
        torch.stack(state)[:, 0] if alone else torch.stack(state) for state in zip(*last, strict=True)
    )
    x = x[0] if alone else x if module.batch_first else x.transpose(0, 1)
    return x, ends if len(ends) > 1 else ends[0]


def _states(module: nn.RNNBase, x: Tensor, hx: Any, alone: bool) -> list[Tensor]:
    """What a layer begins with, each `(layers, n, …)`: the hidden state, and an LSTM's cells."""
    if hx is not None:
        return [state[:, None] if alone else state for state in (hx if isinstance(hx, tuple) else (hx,))]
    sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 1 + isinstance(module, nn.LSTM)]
    return [x.new_zeros(module.num_layers * (1 + module.bidirectional), len(x), size) for size in sizes]


def _through(
    module: nn.RNNBase,
    note: Note | None,
    suffix: str,
    x: Tensor,
    hidden: Tensor,
    memory: Tensor | None = None,
) -> list[Tensor]:
    """What comes out of one layer, one way, for `x` `(n, T, in)`, and the states that it ends with."""
    into = F.linear(x, getattr(module, f"weight_ih{suffix}"), getattr(module, f"bias_ih{suffix}", None))
    _tell(note, f"ih{suffix}", x, into)
    back = _Steps(module, f"hh{suffix}", x, note)
    projection = _Steps(module, f"hr{suffix}", x, note) if hasattr(module, f"weight_hr{suffix}") else None
    outputs = []
    for here in into.unbind(1):
        hidden, memory = _next(module, here, back(hidden), hidden, memory)
        if projection is not None:
            hidden = projection(hidden)
        outputs.append(hidden)
    back.tell()
    if projection is not None:
        projection.tell()
    return [torch.stack(outputs, 1), hidden, *([] if memory is None else [memory])]


class _Steps:
    """The products of one weight at each step of `x` `(n, T, in)`, which are told of as one.

    To that end zeros `(n, T, out)` are added to them, whose gradients are those of all of these products.
    """

    def __init__(self, module: nn.RNNBase, which: str, x: Tensor, note: Note | None) -> None:
        self._which, self._note = which, note
        self._weight: Tensor = getattr(module, f"weight_{which}")
        self._bias: Tensor | None = getattr(module, f"bias_{which}", None)
        self._zeros = x.new_zeros(*x.shape[:2], len(self._weight))
        if note is not None:
            self._zeros.requires_grad_()
        self._each = iter(self._zeros.unbind(1))
        self._inputs: list[Tensor] = []

    def __call__(self, inputs: Tensor) -> Tensor:
        self._inputs.append(inputs)
        return F.linear(inputs, self._weight, self._bias) + next(self._each)

    def tell(self) -> None:
        """Once all of them are made."""
        if self._note is not None:
            _tell(self._note, self._which, torch.stack(self._inputs, 1), self._zeros)


def _tell(note: Note | None, which: str, inputs: Tensor, output: Tensor) -> None:
    if note is not None:
        for kind in ("weight", "bias"):
            note(f"{kind}_{which}", inputs, output)


def _next(
    module: nn.Module, into: Tensor, back: Tensor, hidden: Tensor, memory: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The states after a step, from the products of what comes in and of the hidden state: torch's documentation."""
    if memory is not None:
        i, f, g, o = (into + back).chunk(4, -1)
        memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
        return o.sigmoid() * memory.tanh(), memory
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        (r, z, n), (r_back, z_back, n_back) = into.chunk(3, -1), back.chunk(3, -1)
        new = (n + (r + r_back).sigmoid() * n_back).tanh()
        keep = (z + z_back).sigmoid()
        return (1 - keep) * new + keep * hidden, None
    total = into + back
    return total.relu() if module.nonlinearity == "relu" else total.tanh(), None
