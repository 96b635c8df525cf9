"""Attention of a call of any length to the valid slots and causally to itself."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_kernels.kernels._torch.primitives import call_logits, has_groups
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
    if lse is not None:
        for here, logits in call_logits(query, new_key, key, num_valid, valid, scale, 0):
            lse[:, :, here] = logits.logsumexp(dim=-1).flatten(1, 2)
    slots, new = key.shape[2], new_key.shape[2]
    shared = has_groups(query, new_key)
    if slots == 0 and valid is None:
        return F.scaled_dot_product_attention(
            query, new_key, new_value, is_causal=new > 1, scale=scale, enable_gqa=shared
        )
    if slots > 0:
        new_key, new_value = torch.cat((key, new_key), 2), torch.cat((value, new_value), 2)
    mask = _extend_mask(num_valid, valid, slots, new, query.device)
    if shared and mask.shape[1] > 1:
        mask = mask.repeat_interleave(query.shape[1] // new_key.shape[1], dim=1)
    return F.scaled_dot_product_attention(
        query, new_key, new_value, attn_mask=mask, scale=scale, enable_gqa=shared
    )


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
