"""The attention that slots and new tokens receive in a call, a block of queries at a time."""

import torch
from torch import Tensor

from trimkv_kernels.kernels._torch.primitives import call_logits, reduce_group, softmax
from trimkv_kernels.kernels.launch import softmax_scale


def column_mass(
    query: Tensor,
    new_key: Tensor,
    key: Tensor,
    lse: Tensor,
    num_valid: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
    queries: int | None = None,
    reduce: str = "sum",
    count_below: bool = False,
) -> Tensor:
    """See `trimkv_kernels.kernels.column_mass`; takes a block of queries at a time."""
    scale = softmax_scale(scale, query.shape[-1])
    begin = 0 if queries is None else query.shape[2] - queries
    lses = lse.unflatten(1, (new_key.shape[1], -1))  # [batch, num_kv_heads, group, q_len]
    rows = 1 if count_below and reduce != "none" else lses.shape[2]
    mass = lse.new_zeros(*lses.shape[:2], rows, key.shape[2] + query.shape[2])
    even = _even_shares(key, query.shape[2], num_valid, valid) if count_below else None
    for here, logits in call_logits(query, new_key, key, num_valid, valid, scale, begin):
        share = softmax(logits, lses[:, :, :, here, None])
        if valid is not None:
            pad = ~valid[:, None, None, here, None]
            share = share.masked_fill(pad, torch.inf if count_below else 0)
        if even is not None:
            share = share.masked_fill(logits == -torch.inf, torch.inf)  # unseen is not below
            share = reduce_group(share, reduce).unflatten(1, (lses.shape[1], -1))
            share = share < even[:, :, None, here, None]
        mass[..., : share.shape[-1]] += share.sum(dim=3)
    return reduce_group(mass, reduce)


def _even_shares(key: Tensor, q_len: int, num_valid: Tensor | None, valid: Tensor | None) -> Tensor:
    """``1 / n`` of queries that see ``n`` tokens, broadcasts to ``[batch, num_kv_heads, q_len]``.

    0 if a query sees only one token. This token gets probability 1, and rounding must not make it
    count as below.
    """
    new = torch.arange(1, q_len + 1, device=key.device)[None] if valid is None else valid.cumsum(1)
    held = key.shape[2] if num_valid is None else num_valid[:, :, None]
    seen = (held + new[:, None]).float()
    return seen.reciprocal().masked_fill(seen <= 1, 0)
