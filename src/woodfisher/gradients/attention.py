"""Torch's attention as plain products and what follows them: see `plain`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from woodfisher.gradients.plain import Note


def attention(
    module: nn.MultiheadAttention,
    note: Note | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What attention returns; it calls its output layer as a module."""
    if query.ndim != 3 or query.is_nested or module.bias_k is not None or module.add_zero_attn:
        return type(module).forward(
            module,
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )
    alike = query is key and key is value
    if not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    q, k, v = (
        x.unflatten(2, (module.num_heads, -1)).transpose(1, 2)
        for x in _projected(module, note, query, key, value, alike)
    )
    mask = _mask(attn_mask, key_padding_mask, q)
    dropout = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        scores = q @ k.mT / math.sqrt(q.shape[3])
        weights = F.dropout((scores if mask is None else scores + mask).softmax(3), dropout)
        mixed = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    output = module.out_proj(mixed.transpose(1, 2).flatten(2))
    return output if module.batch_first else output.transpose(0, 1), weights


def _projected(
    module: nn.MultiheadAttention, note: Note | None, query: Tensor, key: Tensor, value: Tensor, alike: bool
) -> tuple[Tensor, ...]:
    """Queries, keys and values, `(n, T, width)`; those of one thing by one product of packed weights."""
    names = [f"{which}_proj_weight" for which in "qkv"]
    weights = [getattr(module, name) for name in names]
    packed, bias = weights[0] is None, module.in_proj_bias
    if packed and alike:
        together = F.linear(query, module.in_proj_weight, bias)
        if note is not None:
            note("in_proj_weight", query, together)
            note("in_proj_bias", query, together)
        return together.chunk(3, 2)
    if packed:
        weights = list(module.in_proj_weight.chunk(3))
    biases = [None] * 3 if bias is None else bias.chunk(3)
    inputs = (query, key, value)
    outputs = tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
    if note is not None and not packed:
        for name, x, output in zip(names, inputs, outputs, strict=True):
            note(name, x, output)
    return outputs


def _mask(attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """What is added to the scores of `q` `(n, heads, T, …)`: -inf for what a mask that is bool leaves out."""
    terms = []
    if attention is not None:
        terms.append(attention.unflatten(0, q.shape[:2]) if attention.ndim == 3 else attention)
    if padding is not None:
        terms.append(padding[:, None, None])
    added = [
        torch.zeros_like(term, dtype=q.dtype).masked_fill(term, -math.inf)
        if term.dtype == torch.bool
        else term.to(q)
        for term in terms
    ]
    return sum(added[1:], added[0]) if added else None
