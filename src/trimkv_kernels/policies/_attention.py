"""The attention of the last queries over a layer's candidates, for all that judge by it."""

from __future__ import annotations

import torch
from torch import Tensor


def window_logits(queries: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """Scaled logits of the last queries.

    Args:
        queries: ``[batch, num_heads, window, head_dim]``, after RoPE.
        key: ``[batch, num_kv_heads, candidates, head_dim]``, after RoPE.
        scale: Softmax scale; None is ``head_dim ** -0.5``.

    Returns:
        fp32 ``[batch, num_kv_heads, group, window, candidates]``.
    """
    key = key.float()
    num_kv_heads, head_dim = key.shape[1], key.shape[3]
    queries = queries.float() * (head_dim**-0.5 if scale is None else scale)
    window = queries.shape[2]
    queries = queries.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)
    return (queries @ key.mT).unflatten(2, (-1, window))


def softmax_over(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the visible candidates, the last dimension; 0 for the others.

    Args:
        logits: ``[..., window, candidates]``, overwritten.
        visible: bool, broadcastable to ``logits``.
    """
    lowest = torch.finfo(logits.dtype).min  # not -inf: a query may see nothing
    return logits.masked_fill_(~visible, lowest).softmax(dim=-1).masked_fill_(~visible, 0.0)
