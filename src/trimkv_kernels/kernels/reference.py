"""The torch reference of every op: the oracle of the tests, and the path a CPU takes.

Nothing here copies the slots or depends on how many are valid in a way that `torch.compile` could not
trace. On a CPU outside a compiled graph reading a count costs no synchronization; there the valid
slots are sliced instead of masked, which is faster and gives the same bits as attention over a cache
that holds exactly these tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_INT32_MIN = -(2**31)
_INT32_MAX = 2**31 - 1


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, num_valid: Tensor | None, scale: float
) -> Tensor:
    """See `trimkv_kernels.kernels.decode_attention`."""
    if num_valid is None:
        return _attend_all(query, key, value, scale)
    if _host_reads_are_free(num_valid):
        counts = num_valid.flatten().tolist()
        longest = max(counts)
        if longest == 0:
            return torch.zeros_like(query)
        key, value = key[:, :, :longest], value[:, :, :longest]
        if min(counts) == longest:
            return _attend_all(query, key, value, scale)
    return _attend_masked(query, key, value, num_valid, scale)


def append_attention(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    num_valid: Tensor,
    t: Tensor,
    layer: int,
    valid: Tensor | None,
    slope: Tensor | None,
    offset: Tensor | None,
    new_slope: Tensor | None,
    new_offset: Tensor | None,
    scale: float,
) -> Tensor:
    """See `trimkv_kernels.kernels.append_attention`."""
    rows = [(key, new_key), (value, new_value), (position, (t - 1)[:, None].expand(new_key.shape[:2]))]
    if slope is not None and offset is not None and new_slope is not None and new_offset is not None:
        rows += [(slope, new_slope), (offset, new_offset)]
    _append(rows, num_valid, layer, valid)
    return decode_attention(query, key[layer], value[layer], num_valid[layer], scale)


def evict(
    key: Tensor,
    value: Tensor,
    position: Tensor,
    num_valid: Tensor,
    t: Tensor,
    budget: int,
    slope: Tensor | None,
    offset: Tensor | None,
    scores: Tensor | None,
    sinks: int,
    recent: int,
    fields: Sequence[Tensor],
    nan_seen: Tensor | None,
) -> None:
    """See `trimkv_kernels.kernels.evict`."""
    full = num_valid >= position.shape[-1]  # [layers, batch, num_kv_heads]
    if _host_reads_are_free(num_valid) and not full.any():
        return
    if scores is None:
        assert slope is not None and offset is not None
        scores = affine_scores(slope, offset, t, position)
    scores = _protect(scores, position, full[..., None], t, sinks, recent, nan_seen)
    victim = _lowest(scores, position, position.shape[-1] - budget)
    source, target = _pair_moves(victim, full, budget)
    moved = [key, value, position, *fields]
    if slope is not None and offset is not None:
        moved += [slope, offset]
    for tensor in moved:
        rows = tensor.flatten(0, 3)
        rows.index_copy_(0, target, rows.index_select(0, source))
    num_valid.masked_fill_(full, budget)


def affine_scores(slope: Tensor, offset: Tensor, t: Tensor, position: Tensor) -> Tensor:
    """See `trimkv_kernels.kernels.affine_scores`."""
    return slope * (t[:, None, None] - position) + offset


def select_slots(
    scores: Tensor,
    position: Tensor,
    valid: Tensor,
    t: Tensor,
    budget: int,
    num_slots: int,
    sinks: int,
    recent: int,
    nan_seen: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `trimkv_kernels.kernels.select_slots`."""
    candidates = scores.shape[-1]
    count = valid.sum(dim=-1, dtype=torch.int32)
    count = torch.where(count >= num_slots, budget, count)
    scores = _protect(scores, position, valid, t, sinks, recent, nan_seen)
    rank_key = _rank_keys(scores, position).masked_fill(~valid, torch.iinfo(torch.int64).min)
    best = rank_key.topk(min(num_slots - 1, candidates), dim=-1).indices
    # kept candidates in their order, so that a cache that drops nothing stays chronological
    place = torch.arange(best.shape[-1], device=best.device, dtype=torch.int32)
    index = best.masked_fill(place >= count[..., None], candidates).sort(dim=-1).values
    return index.clamp(max=candidates - 1), count


def extend_attention(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    key: Tensor,
    value: Tensor,
    num_valid: Tensor | None,
    valid: Tensor | None,
    scale: float,
) -> Tensor:
    """See `trimkv_kernels.kernels.extend_attention`."""
    slots, new = key.shape[2], new_key.shape[2]
    if slots > 0:
        new_key, new_value = torch.cat((key, new_key), 2), torch.cat((value, new_value), 2)
    mask = _extend_mask(num_valid, valid, slots, new, query.device)
    grouped = query.shape[1] != new_key.shape[1]
    if grouped and mask.shape[1] > 1:
        mask = mask.repeat_interleave(query.shape[1] // new_key.shape[1], dim=1)
    return F.scaled_dot_product_attention(
        query, new_key, new_value, attn_mask=mask, scale=scale, enable_gqa=grouped
    )


def _extend_mask(
    num_valid: Tensor | None, valid: Tensor | None, slots: int, new: int, device: torch.device
) -> Tensor:
    """What each new token sees of the slots and of the call: ``[batch, heads, new, slots + new]``."""
    causal = torch.ones(new, new, dtype=torch.bool, device=device).tril()[None, None]
    if valid is not None:
        # a pad sees itself: a softmax over nothing would put NaN into the next layer's values
        causal = causal & (valid[:, None, None, :] | torch.eye(new, dtype=torch.bool, device=device))
    if num_valid is None:
        held = causal.new_ones(1, 1, 1, slots)
    else:
        held = torch.arange(slots, device=device) < num_valid[:, :, None, None]
    batch, heads = max(causal.shape[0], held.shape[0]), held.shape[1]
    return torch.cat(
        (held.expand(batch, heads, new, slots), causal.expand(batch, heads, new, new)), dim=3
    )


def _protect(
    scores: Tensor,
    position: Tensor,
    valid: Tensor,
    t: Tensor,
    sinks: int,
    recent: int,
    nan_seen: Tensor | None,
) -> Tensor:
    """NaN to -inf, protected positions to +inf. ``nan_seen`` has the leading dimensions of layers."""
    is_nan = scores.isnan()
    if nan_seen is not None:
        found = (is_nan & valid).flatten(nan_seen.dim()).any(dim=-1)
        nan_seen.masked_fill_(found, 1)
    scores = scores.masked_fill(is_nan, -torch.inf)
    if sinks > 0:
        scores = scores.masked_fill(position < sinks, torch.inf)
    if recent > 0:
        scores = scores.masked_fill(position >= (t - recent)[:, None, None], torch.inf)
    return scores


def _host_reads_are_free(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _attend_all(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend to every slot, by the very call that transformers' SDPA attention makes."""
    grouped = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(
        query[:, :, None], key, value, scale=scale, enable_gqa=grouped
    )
    return output[:, :, 0]


def _attend_masked(
    query: Tensor, key: Tensor, value: Tensor, num_valid: Tensor, scale: float
) -> Tensor:
    """Attend to the first ``num_valid`` slots of each head; the group's queries share one mask."""
    group = query.shape[1] // key.shape[1]
    slot = torch.arange(key.shape[2], device=key.device, dtype=torch.int32)
    mask = slot < num_valid[..., None]  # [batch, num_kv_heads, num_slots]
    output = F.scaled_dot_product_attention(
        query.unflatten(1, (key.shape[1], group)), key, value, attn_mask=mask[:, :, None], scale=scale
    )
    # A softmax over nothing is NaN on some backends.
    return output.masked_fill((num_valid == 0)[..., None, None], 0).flatten(1, 2)


def _append(
    rows: Sequence[tuple[Tensor, Tensor]], num_valid: Tensor, layer: int, valid: Tensor | None
) -> None:
    """Write each ``(base, new)`` pair's new row behind the valid slots of one layer."""
    num_slots = rows[0][0].shape[3]
    count = num_valid[layer]  # [batch, num_kv_heads]
    if valid is None and _host_reads_are_free(num_valid):
        counts = count.flatten().tolist()
        slot = counts[0]
        if slot < num_slots and min(counts) == max(counts):
            for base, new in rows:
                base[layer, :, :, slot] = new
            count += 1
            return
    stored = count < num_slots
    if valid is not None:
        stored = stored & valid[:, None]
    first = torch.arange(count.numel(), device=count.device) * num_slots
    index = first + count.clamp(max=num_slots - 1).flatten()  # [batch * num_kv_heads]
    for base, new in rows:
        slots = base[layer].flatten(0, 2)
        new, keep = new.flatten(0, 1), stored.flatten()
        if new.dim() == 2:
            keep = keep[:, None]
        slots.index_copy_(0, index, torch.where(keep, new, slots.index_select(0, index)))
    count += stored


def _lowest(scores: Tensor, position: Tensor, count: int) -> Tensor:
    """Find the ``count`` lowest scores of each head, of equal ones those with smaller positions.

    Args:
        scores: ``[layers, batch, num_kv_heads, num_slots]`` fp32 without NaN.
        position: Like ``scores``, int32.
        count: How many.

    Returns:
        Slots ``[layers, batch, num_kv_heads, count]`` int64, in no particular order.
    """
    if count == 1:
        lowest = scores == scores.amin(dim=-1, keepdim=True)
        return position.masked_fill(~lowest, _INT32_MAX).argmin(dim=-1, keepdim=True)
    return _rank_keys(scores, position).topk(count, dim=-1, largest=False, sorted=False).indices


def _rank_keys(scores: Tensor, position: Tensor) -> Tensor:
    """Integers ordered as (score, position): no two valid slots of a head are equal."""
    bits = scores.view(torch.int32)
    # Sign and magnitude to two's complement: orders as the floats do, and -0.0 becomes 0.
    order = torch.where(bits < 0, _INT32_MIN - bits, bits)
    return order.long().mul_(2**32).add_(position)


def _pair_moves(victim: Tensor, full: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Pair kept slots of the tail with evicted slots of the budget, as rows of the flat base tensors.

    A slot with nothing to do is paired with itself, so that the shapes do not depend on the data.

    Args:
        victim: ``[layers, batch, num_kv_heads, buffer]`` int64, the slots to evict.
        full: ``[layers, batch, num_kv_heads]`` bool, the heads that evict.
        budget: Slots each of them keeps.

    Returns:
        Rows to read and rows to write, each ``[layers * batch * num_kv_heads * buffer]`` int64.
    """
    buffer = victim.shape[-1]
    num_slots = budget + buffer
    if buffer == 1:
        target, source = victim, torch.full_like(victim, budget)
    else:
        target = victim.sort(dim=-1).values  # holes in the budget first, then victims in the tail
        gone = torch.zeros(*full.shape, num_slots, dtype=torch.bool, device=victim.device)
        gone.scatter_(-1, victim, True)
        source = gone[..., budget:].sort(dim=-1, stable=True).indices + budget
    target = torch.where(full[..., None], target, source)
    first = torch.arange(full.numel(), device=full.device).view(*full.shape, 1) * num_slots
    return (first + source).flatten(), (first + target).flatten()
