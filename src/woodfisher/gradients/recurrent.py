"""Recurrent layers where rows are vectorised."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def states_by_row(model: nn.Module) -> Iterator[None]:
    """Have recurrent layers begin with a state of each row's own.

    What torch goes on to add to it in place is of single rows, and `vmap` refuses that for a state that all of them
    share, such as the zeros that a layer begins with unless it is given one.
    """
    hooks = [
        module.register_forward_pre_hook(_with_own_state, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _with_own_state(
    module: nn.RNNBase | nn.RNNCellBase, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a recurrent layer, with a state that is of single rows if the input is."""
    given = {**dict(zip(("input", "hx"), args, strict=False)), **named}
    inputs, state = given.get("input"), given.get("hx")
    if not isinstance(inputs, Tensor):  # a packed sequence
        return args, named
    if state is None:
        state = _first_state(module, inputs)
    else:
        state = tree_map_only(Tensor, lambda t: t + inputs.new_zeros(()), state)
    return (), {"input": inputs, "hx": state}


def _first_state(module: nn.RNNBase | nn.RNNCellBase, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """The zeros that a layer starts from unless it is given a state."""
    if isinstance(module, nn.RNNBase):
        time = inputs.ndim - 2 if module.batch_first else 0
        batch = [size for axis, size in enumerate(inputs.shape[:-1]) if axis != time]
        layers = module.num_layers * (1 + module.bidirectional)
        hidden = inputs.new_zeros([layers, *batch, module.proj_size or module.hidden_size])
        cell = inputs.new_zeros([layers, *batch, module.hidden_size])
    else:
        hidden = cell = inputs.new_zeros([*inputs.shape[:-1], module.hidden_size])
    return (hidden, cell) if isinstance(module, (nn.LSTM, nn.LSTMCell)) else hidden
