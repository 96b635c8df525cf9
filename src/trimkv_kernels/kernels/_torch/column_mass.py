"""The attention that slots and new tokens receive in a call, a block of queries at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_kernels.kernels._torch.primitives import grouped, reduce_group
from trimkv_kernels.kernels.launch import softmax_scale

BLOCK = 32  # queries taken at a time: their probabilities should fit the processor's cache


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
    slots, q_len, num_kv_heads = key.shape[2], query.shape[2], new_key.shape[1]
    rows = grouped(query, num_kv_heads) * softmax_scale(scale, query.shape[-1])
    lses = lse.unflatten(1, (num_kv_heads, -1))  # [batch, num_kv_heads, group, q_len]
    keys = torch.cat((key, new_key), dim=2).to(rows.dtype).mT
    hidden = _hidden(slots, q_len, num_valid, valid)
    unseen = torch.inf if count_below else 0.0  # what a query does not see is not below
    even = _even_shares(key, q_len, num_valid, valid) if count_below else None
    rows_left = 1 if count_below and reduce != "none" else lses.shape[2]
    mass = lse.new_zeros(*lses.shape[:2], rows_left, slots + q_len)
    future = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=query.device).triu(1)
    for start in range(0 if queries is None else q_len - queries, q_len, BLOCK):
        here = slice(start, min(start + BLOCK, q_len))
        size, seen = here.stop - start, slots + here.stop
        share = _probabilities(rows[:, :, :, here], keys[..., :seen], lses[..., here])
        share[..., seen - size :].masked_fill_(future[:size, :size], unseen)
        if hidden is not None:
            share.masked_fill_(hidden[:, :, None, None, :seen], unseen)
        if valid is not None:
            share.masked_fill_(~valid[:, None, None, here, None], unseen)
        if even is not None:
            share = reduce_group(share, reduce).unflatten(1, (num_kv_heads, -1))
            share = share < even[:, :, None, here, None]
        mass[..., :seen] += share.sum(dim=3)
    return reduce_group(mass, reduce)


def _probabilities(rows: Tensor, keys: Tensor, lse: Tensor) -> Tensor:
    """``exp(rows @ keys - lse)``, ``[batch, num_kv_heads, group, queries, columns]``."""
    share = torch.baddbmm(
        lse.neg().reshape(-1, rows.shape[2] * rows.shape[3], 1),
        rows.reshape(-1, rows.shape[2] * rows.shape[3], rows.shape[4]),
        keys.flatten(0, 1),
    )
    return share.exp_().view(*rows.shape[:4], keys.shape[-1])


def _hidden(
    slots: int, q_len: int, num_valid: Tensor | None, valid: Tensor | None
) -> Tensor | None:
    """Slots that hold nothing, and new tokens that are padding; None if there can be neither.

    Broadcasts to ``[batch, num_kv_heads, slots + q_len]``.
    """
    hidden = None
    if num_valid is not None:
        slot = torch.arange(slots, device=num_valid.device)
        hidden = F.pad(slot >= num_valid[:, :, None], (0, q_len))
    if valid is not None:
        padding = F.pad(~valid, (slots, 0))[:, None]
        hidden = padding if hidden is None else hidden | padding
    return hidden


def _even_shares(key: Tensor, q_len: int, num_valid: Tensor | None, valid: Tensor | None) -> Tensor:
    """``1 / n`` of queries that see ``n`` tokens, broadcasts to ``[batch, num_kv_heads, q_len]``.

    0 if a query sees only one token. This token gets probability 1, and rounding must not make it
    count as below.
    """
    new = torch.arange(1, q_len + 1, device=key.device)[None] if valid is None else valid.cumsum(1)
    held = key.shape[2] if num_valid is None else num_valid[:, :, None]
    seen = (held + new[:, None]).float()
    return seen.reciprocal().masked_fill(seen <= 1, 0)
