"""Attention of a call of any length to the valid slots and causally to itself."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_kernels.kernels._torch.primitives import BLOCK, fold, grouped, has_groups
from trimkv_kernels.kernels.launch import softmax_scale


def extend_attention(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    key: Tensor,
    value: Tensor,
    num_valid: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """See `trimkv_kernels.kernels.extend_attention`."""
    scale = softmax_scale(scale, query.shape[-1])
    slots, new = key.shape[2], new_key.shape[2]
    shared = has_groups(query, new_key)
    mask = None
    if slots > 0:
        new_key, new_value = torch.cat((key, new_key), 2), torch.cat((value, new_value), 2)
    if slots > 0 or valid is not None:
        mask = _extend_mask(num_valid, valid, slots, new, query.device)
        if shared and mask.shape[1] > 1:
            mask = mask.repeat_interleave(query.shape[1] // new_key.shape[1], dim=1)
    if lse is not None:
        if query.device.type == "cpu" and query.dtype == torch.float32:
            return _attend_with_lse(query, new_key, new_value, mask, scale, lse)
        _write_lse(query, new_key, mask, scale, lse)
    return F.scaled_dot_product_attention(
        query,
        new_key,
        new_value,
        attn_mask=mask,
        is_causal=mask is None and new > 1,
        scale=scale,
        enable_gqa=shared,
    )


def _attend_with_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, lse: Tensor
) -> Tensor:
    """The kernel that SDPA runs on a CPU, called directly because SDPA drops its log-sum-exp."""
    group = query.shape[1] // key.shape[1]
    if group > 1:  # as SDPA does
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    bias = None
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    output, row_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, mask is None and query.shape[2] > 1, attn_mask=bias, scale=scale
    )
    lse.copy_(row_lse)
    return output


def _write_lse(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, lse: Tensor) -> None:
    """The log-sum-exp in fp32, a block of queries at a time.

    It is for other devices, and for half precision, in which SDPA's kernel rounds what it sums.
    """
    if mask is None:
        mask = _extend_mask(None, None, 0, query.shape[2], query.device)
    rows = grouped(query, key.shape[1]) * scale
    keys = key.to(rows.dtype).mT
    for start in range(0, query.shape[2], BLOCK):
        here = slice(start, start + BLOCK)
        logits = fold(rows[:, :, :, here], keys).flatten(1, 2)
        lse[:, :, here] = logits.masked_fill(~mask[:, :, here], -torch.inf).logsumexp(dim=-1)


def _extend_mask(
    num_valid: Tensor | None, valid: Tensor | None, slots: int, new: int, device: torch.device
) -> Tensor:
    """Which slots and new tokens each new token sees: ``[batch, heads, new, slots + new]``."""
    causal = torch.ones(new, new, dtype=torch.bool, device=device).tril()[None, None]
    if valid is not None:
        # padding sees itself: an empty softmax would put NaN into the next layer's values
        causal = causal & (
            valid[:, None, None, :] | torch.eye(new, dtype=torch.bool, device=device)
        )
    if num_valid is None:
        held = causal.new_ones(1, 1, 1, slots)
    else:
        held = torch.arange(slots, device=device) < num_valid[:, :, None, None]
    batch, heads = max(causal.shape[0], held.shape[0]), held.shape[1]
    return torch.cat(
        (held.expand(batch, heads, new, slots), causal.expand(batch, heads, new, new)), dim=3
    )
