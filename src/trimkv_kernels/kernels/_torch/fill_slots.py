"""The best of a layer's slots and of a call's new tokens. No shape depends on the data."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimkv_kernels.kernels._torch.slots import (
    affine_scores,
    affine_terms,
    flag_nan,
    is_full,
    kept_when_full,
    protect,
    rank_keys,
)
from trimkv_kernels.kernels.slots import Slots


def fill_slots(
    new_key: Tensor,
    new_value: Tensor,
    new_position: Tensor,
    slots: Slots,
    t: Tensor,
    *,
    layer: int,
    buffer: int,
    new_slope: Tensor | None = None,
    new_offset: Tensor | None = None,
    scores: Tensor | None = None,
    valid: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
    new_fields: Sequence[Tensor] = (),
    max_valid: int | None = None,
) -> None:
    """See `trimkv_kernels.kernels.fill_slots`."""
    num_slots, heads = slots.num_slots, new_key.shape[:3]  # heads: [batch, num_kv_heads, new]
    held = num_slots if max_valid is None else max_valid
    num_valid = slots.num_valid[layer]

    def pool(base: Tensor, new: Tensor) -> Tensor:
        return torch.cat((base[layer, :, :, :held], new), dim=2) if held else new

    real = new_key.new_ones(heads, dtype=torch.bool)
    if valid is not None:
        real = valid[:, None].expand(heads)
    slot = torch.arange(held, device=new_key.device)
    real = torch.cat((slot < num_valid[..., None], real), dim=2)
    position = pool(slots.position, new_position[:, None].expand(heads))
    small = [(slots.position, position)]
    affine = affine_terms(slots, new_slope, new_offset)
    if affine:
        small += [(base, pool(base, new)) for base, new in affine]
        if scores is None:
            scores = affine_scores(small[1][1], small[2][1], t, position)
    assert scores is not None  # the op's check
    if slots.nan_seen is not None:
        flag_nan(slots.nan_seen[layer], scores.isnan() & real)
    scores = protect(scores, position, t, sinks, recent)
    index, count = _choose(scores, position, real, slots.capacity[layer], buffer, num_slots)
    for base, candidates in small:
        _put(base[layer], candidates, index)
    fields = zip(slots.fields, new_fields, strict=True)
    for base, new in [(slots.key, new_key), (slots.value, new_value), *fields]:
        _put(base[layer], pool(base, new), index)  # one at a time, because the keys' pool is large
    num_valid.copy_(count)


def _choose(
    scores: Tensor, position: Tensor, real: Tensor, capacity: Tensor, buffer: int, num_slots: int
) -> tuple[Tensor, Tensor]:
    """Choose among the candidates of each head, ``[batch, num_kv_heads, candidates]``.

    Returns:
        ``index`` ``[batch, heads, min(num_slots - 1, candidates)]`` int64, the kept candidates
        first, in their order; the rest is arbitrary but in range.
        ``count`` ``[batch, heads]`` int32, how many are kept.
    """
    candidates = scores.shape[-1]
    count = real.sum(dim=-1, dtype=torch.int32)
    count = torch.where(is_full(count, capacity), kept_when_full(capacity, buffer), count)
    rank_key = rank_keys(scores, position).masked_fill(~real, torch.iinfo(torch.int64).min)
    best = rank_key.topk(min(num_slots - 1, candidates), dim=-1).indices
    # kept candidates in their order, so that a cache that drops nothing stays chronological
    rank = torch.arange(best.shape[-1], device=best.device, dtype=torch.int32)
    index = best.masked_fill(rank >= count[..., None], candidates).sort(dim=-1).values
    return index.clamp(max=candidates - 1), count


def _put(slots: Tensor, candidates: Tensor, index: Tensor) -> None:
    """Write the candidates ``index`` ``[batch, heads, kept]`` into the first slots of a layer."""
    inner = candidates.shape[3:]
    wide = index.reshape(*index.shape, *(1,) * len(inner)).expand(*index.shape, *inner)
    slots[:, :, : index.shape[2]] = candidates.gather(2, wide)
