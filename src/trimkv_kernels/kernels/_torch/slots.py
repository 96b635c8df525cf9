"""Slots on torch: addresses, when a head is full, scores and protection."""

import torch
from torch import Tensor

from trimkv_kernels.kernels.slots import Slots

INT32_MIN = -(2**31)
INT32_MAX = 2**31 - 1


def slot_rows(slot: Tensor, num_slots: int) -> Tensor:
    """Row indices of slots, after the dimensions before the slot's entry are flattened.

    Args:
        slot: ``[..., n]``, slots of each head; the leading dimensions are those of the tensors.
        num_slots: Slots of a head.

    Returns:
        ``[heads * n]`` int64.
    """
    heads = slot.shape[:-1]
    base = torch.arange(heads.numel(), device=slot.device).view(*heads, 1) * num_slots
    return (base + slot).flatten()


def is_full(num_valid: Tensor, capacity: Tensor) -> Tensor:
    """Which heads have filled their capacity."""
    return num_valid >= capacity


def kept_when_full(capacity: Tensor, buffer: int) -> Tensor:
    """How many pairs a full head keeps."""
    return (capacity - buffer).clamp(min=0)


def affine_scores(slope: Tensor, offset: Tensor, t: Tensor, position: Tensor) -> Tensor:
    """``slope * (t - position) + offset``, rounded after the product and after the sum."""
    return slope * (t[:, None, None] - position) + offset


def protect(scores: Tensor, position: Tensor, t: Tensor, sinks: int, recent: int) -> Tensor:
    """NaN to -inf, protected positions to +inf."""
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if sinks > 0:
        scores = scores.masked_fill(position < sinks, torch.inf)
    if recent > 0:
        scores = scores.masked_fill(position >= (t - recent)[:, None, None], torch.inf)
    return scores


def rank_keys(scores: Tensor, position: Tensor) -> Tensor:
    """Integers ordered as (score, position): no two valid slots of a head are equal."""
    bits = scores.view(torch.int32)
    # Sign and magnitude to two's complement: the order stays, and -0.0 becomes 0.
    order = torch.where(bits < 0, INT32_MIN - bits, bits)
    return order.long().mul_(2**32).add_(position)


def flag_nan(nan_seen: Tensor, found: Tensor) -> None:
    """Set ``nan_seen`` where any of ``found``, which has further dimensions, is True."""
    nan_seen.masked_fill_(found.flatten(nan_seen.dim()).any(dim=-1), 1)


def affine_terms(
    slots: Slots, new_slope: Tensor | None, new_offset: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Slope and offset of the slots, each with that of the new tokens, if there are any."""
    terms = ((slots.slope, new_slope), (slots.offset, new_offset))
    return [(base, new) for base, new in terms if base is not None and new is not None]
