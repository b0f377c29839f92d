"""Layers that torch computes as one operation, as plain products, so that it tells what flows in and out of these."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from woodfisher.gradients.attention import attention
from woodfisher.gradients.recurrent import cell, layer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Note: TypeAlias = Callable[[str, Tensor, Tensor], None]
    """Told of a product: the name of the weight, or bias, in its module, what flowed in, and where it flowed out."""

_FORMS: dict[Any, Callable[..., Any]] = {
    **{module.forward: layer for module in (nn.RNN, nn.GRU, nn.LSTM)},
    **{module.forward: cell for module in (nn.RNNCell, nn.GRUCell, nn.LSTMCell)},
    nn.MultiheadAttention.forward: attention,
}


def is_packed(module: nn.Module) -> bool:
    """Whether a module computes what a recurrent layer or attention of torch's does, by several products."""
    return type(module).forward in _FORMS and "forward" not in vars(module)


@contextmanager
def in_plain_products(
    modules: Iterable[nn.Module], note: Callable[[nn.Module, str, Tensor, Tensor], None] | None = None
) -> Iterator[None]:
    """Have those of `modules` that are such layers compute the same by products and what follows them.

    What flows through a product is `(n, T, …)`. Packed sequences and attention with keys of its own go the usual way.
    """
    with ExitStack() as undone:
        for module in dict.fromkeys(filter(is_packed, modules)):
            told = None if note is None else partial(note, module)
            vars(module)["forward"] = partial(_FORMS[type(module).forward], module, told)
            undone.callback(vars(module).pop, "forward")
        yield
