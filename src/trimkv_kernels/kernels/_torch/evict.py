"""Eviction of the lowest scores of every full head. No shape depends on the data."""

import torch
from torch import Tensor

from trimkv_kernels.kernels._torch.primitives import host_reads_are_free
from trimkv_kernels.kernels._torch.slots import (
    INT32_MAX,
    affine_scores,
    flag_nan,
    is_full,
    kept_when_full,
    protect,
    rank_keys,
    slot_rows,
)
from trimkv_kernels.kernels.slots import Slots


def evict(
    slots: Slots,
    t: Tensor,
    *,
    buffer: int,
    rows: Tensor | None = None,
    scores: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
) -> None:
    """See `trimkv_kernels.kernels.evict`."""
    if rows is not None:
        _evict_by_index(slots, t, rows, buffer, scores, sinks, recent)
        return
    position = slots.position
    full = is_full(slots.num_valid, slots.capacity)  # [layers, batch, num_kv_heads]
    if host_reads_are_free(full) and not full.any():
        return
    moved = [slots.key, slots.value, position, *slots.fields]
    if slots.slope is not None and slots.offset is not None:
        moved += [slots.slope, slots.offset]
        if scores is None:
            scores = affine_scores(slots.slope, slots.offset, t, position)
    assert scores is not None  # the op's check
    absent = _absent(slots)
    if absent is not None:
        scores = scores.masked_fill(absent, 0)
    if slots.nan_seen is not None:  # a maximum propagates NaN
        flag_nan(slots.nan_seen, scores.amax(dim=-1).isnan() & full)
    scores = protect(scores, position, t, sinks, recent)
    victim = _lowest(scores, position, absent, buffer)
    kept = kept_when_full(slots.capacity, buffer)
    source, target = _pair_moves(victim, full, kept, slots.num_slots)
    for tensor in moved:
        rows = tensor.flatten(0, 3)
        rows.index_copy_(0, target, rows.index_select(0, source))
    slots.num_valid.copy_(torch.where(full, kept, slots.num_valid))


def _evict_by_index(
    slots: Slots,
    t: Tensor,
    rows: Tensor,
    buffer: int,
    scores: Tensor | None,
    sinks: int,
    recent: int,
) -> None:
    """Evict in the rows that are due, one after the other, each in its place."""
    index = rows.long()
    full = is_full(slots.num_valid[0, index], slots.capacity[0, index]).any(dim=-1)
    for row, stored, is_due in zip(range(len(t)), index.tolist(), full.tolist(), strict=True):
        if is_due:
            here = slice(row, row + 1)
            own = None if scores is None else scores[:, here]
            evict(
                slots.row(stored),
                t[here],
                buffer=buffer,
                scores=own,
                sinks=sinks,
                recent=recent,
            )


def _absent(slots: Slots) -> Tensor | None:
    """The slots that a head may not fill; None if every head is known to fill all."""
    if host_reads_are_free(slots.capacity) and int(slots.capacity.min()) >= slots.num_slots:
        return None
    slot = torch.arange(slots.num_slots, device=slots.capacity.device, dtype=torch.int32)
    return slot >= slots.capacity[..., None]


def _lowest(scores: Tensor, position: Tensor, absent: Tensor | None, count: int) -> Tensor:
    """Find the ``count`` lowest scores of each head; of equal ones, those with smaller positions.

    Args:
        scores: ``[layers, batch, num_kv_heads, num_slots]`` fp32 without NaN.
        position: Like ``scores``, int32.
        absent: Like ``scores``, bool: slots that do not count.
        count: How many.

    Returns:
        Slots ``[layers, batch, num_kv_heads, count]`` int64, in no particular order.
    """
    if count == 1:
        if absent is not None:
            scores = scores.masked_fill(absent, torch.inf)
        other = scores != scores.amin(dim=-1, keepdim=True)
        if absent is not None:
            other = other | absent
        return position.masked_fill(other, INT32_MAX).argmin(dim=-1, keepdim=True)
    rank_key = rank_keys(scores, position)
    if absent is not None:
        rank_key = rank_key.masked_fill(absent, torch.iinfo(torch.int64).max)
    return rank_key.topk(count, dim=-1, largest=False, sorted=False).indices


def _pair_moves(
    victim: Tensor, full: Tensor, kept: Tensor, num_slots: int
) -> tuple[Tensor, Tensor]:
    """Pair the kept slots of the tail with the evicted slots before it, as rows of flat tensors.

    A slot with nothing to do is paired with itself, so that the shapes do not depend on the data.

    Args:
        victim: ``[layers, batch, num_kv_heads, buffer]`` int64, the slots to evict.
        full: ``[layers, batch, num_kv_heads]`` bool, the heads that evict.
        kept: Like ``full``, int32, how many pairs each of them keeps: where its tail begins.
        num_slots: Slots of a head.

    Returns:
        Rows to read and rows to write, each ``[layers * batch * num_kv_heads * buffer]`` int64.
    """
    buffer = victim.shape[-1]
    tail = kept[..., None] + torch.arange(buffer, device=victim.device)
    if buffer == 1:
        target, source = victim, tail
    else:
        target = victim.sort(dim=-1).values  # holes before the tail first, then victims in it
        gone = torch.zeros(*full.shape, num_slots, dtype=torch.bool, device=victim.device)
        gone.scatter_(-1, victim, True)
        source = tail.gather(-1, gone.gather(-1, tail).sort(dim=-1, stable=True).indices)
    target = torch.where(full[..., None], target, source)
    return slot_rows(source, num_slots), slot_rows(target, num_slots)
