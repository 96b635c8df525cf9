"""Attention of one new token per row, and storing it.

On a CPU, outside of a compiled graph, reading a count costs nothing. There the valid slots are
sliced instead of masked. This is faster and gives the same bits as attention over a cache that
holds exactly these tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_kernels.kernels._torch.primitives import (
    fold,
    grouped,
    has_groups,
    host_reads_are_free,
    reduce_group,
    softmax,
)
from trimkv_kernels.kernels._torch.slots import affine_terms, is_full, slot_rows
from trimkv_kernels.kernels.launch import softmax_scale
from trimkv_kernels.kernels.prologue import Decay, Rope
from trimkv_kernels.kernels.slots import Slots


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_valid: Tensor | None = None,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    mass: Tensor | None = None,
    mass_reduce: str = "sum",
    mass_accumulate: bool = False,
) -> Tensor:
    """See `trimkv_kernels.kernels.decode_attention`."""
    scale = softmax_scale(scale, query.shape[-1])
    if lse is not None or mass is not None:
        row_lse, share = _shares(query, key, num_valid, scale)
        _write_shares(row_lse, share, lse, mass, mass_reduce, mass_accumulate)
    return _attend(query, key, value, num_valid, scale, False)


def append_attention(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    slots: Slots,
    t: Tensor,
    *,
    layer: int,
    rows: Tensor | None = None,
    valid: Tensor | None = None,
    new_slope: Tensor | None = None,
    new_offset: Tensor | None = None,
    decay: Decay | None = None,
    rope: Rope | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
    mass: Tensor | None = None,
    mass_reduce: str = "sum",
    mass_accumulate: bool = False,
    packed: bool = False,
    rows_apart: bool = False,
) -> Tensor:
    """See `trimkv_kernels.kernels.append_attention`."""
    if rope is not None:
        query, new_key = rope.applied(query, new_key)
    if decay is not None:
        new_slope, new_offset = decay.terms()
    scale = softmax_scale(scale, query.shape[-1])
    pairs = [
        (slots.key, new_key),
        (slots.value, new_value),
        (slots.position, (t - 1)[:, None].expand(new_key.shape[:2])),
        *affine_terms(slots, new_slope, new_offset),
    ]
    if rows is not None:
        index = rows.long()
        held = _append_by_index(pairs, slots, layer, index, valid)
        return _attend_by_index(
            query, slots.key[layer], slots.value[layer], index, held, scale, lse, packed
        )
    num_valid = slots.num_valid[layer]
    even = _append(pairs, num_valid, slots.capacity[layer], layer, valid)
    key, value = slots.key[layer], slots.value[layer]
    if even is not None and lse is None and not rows_apart:
        key, value = key[:, :, :even], value[:, :, :even]
        if mass is None:
            return attend_all(query, key, value, scale, packed)
        share = _write_mass(query, key, scale, mass[layer], mass_reduce, mass_accumulate)
        if packed and share.dtype == value.dtype:
            return (share @ value).flatten(1, 2)
        return attend_all(query, key, value, scale, packed)
    if lse is not None or mass is not None:
        row_lse, share = _shares(query, key, num_valid, scale)
        if valid is not None:  # padding gives nothing
            share = share.masked_fill(~valid[:, None, None, None], 0)
        layer_mass = None if mass is None else mass[layer]
        _write_shares(row_lse, share, lse, layer_mass, mass_reduce, mass_accumulate)
    if rows_apart:
        return attend_masked(query, key, value, num_valid, scale)
    return _attend(query, key, value, num_valid, scale, packed)


def _append(
    pairs: Sequence[tuple[Tensor, Tensor]],
    num_valid: Tensor,
    capacity: Tensor,
    layer: int,
    valid: Tensor | None,
) -> int | None:
    """Write the new entry of each ``(base, new)`` pair behind the valid slots of one layer.

    Returns:
        How many slots every head has filled; None if the host does not know or heads differ.
    """
    if valid is None and host_reads_are_free(num_valid):
        counts = num_valid.flatten().tolist()
        slot = counts[0]
        if min(counts) == max(counts) and slot < min(capacity.flatten().tolist()):
            for base, new in pairs:
                base.select(0, layer).select(2, slot).copy_(new)
            num_valid += 1
            return slot + 1
    stored = ~is_full(num_valid, capacity)
    if valid is not None:
        stored = stored & valid[:, None]
    num_slots = pairs[0][0].shape[3]
    index = slot_rows(num_valid.clamp(max=num_slots - 1)[..., None], num_slots)
    for base, new in pairs:
        rows = base[layer].flatten(0, 2)
        new, keep = new.flatten(0, 1), stored.flatten()
        if new.dim() == 2:
            keep = keep[:, None]
        rows.index_copy_(0, index, torch.where(keep, new, rows.index_select(0, index)))
    num_valid += stored
    return None


def _append_by_index(
    pairs: Sequence[tuple[Tensor, Tensor]],
    slots: Slots,
    layer: int,
    index: Tensor,
    valid: Tensor | None,
) -> Tensor:
    """As `_append`, in the rows ``index``; returns their ``num_valid`` ``[batch, heads]``."""
    num_valid, capacity = slots.num_valid[layer], slots.capacity[layer]
    held = num_valid[index]
    stored = ~is_full(held, capacity[index])
    if valid is not None:
        stored = stored & valid[:, None]
    head = torch.arange(held.shape[1], device=held.device)
    where = (index[:, None], head, held.clamp(max=slots.num_slots - 1).long())
    for base, new in pairs:
        if not (host_reads_are_free(stored) and stored.all()):
            keep = stored if new.dim() == 2 else stored[..., None]
            new = torch.where(keep, new, base[layer][where])
        base[layer][where] = new
    held = held + stored
    num_valid[index] = held
    return held


def _attend_by_index(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    num_valid: Tensor,
    scale: float,
    lse: Tensor | None,
    packed: bool,
) -> Tensor:
    """Attend to rows ``index`` of one layer, where they lie if reading the index is free."""
    if not host_reads_are_free(index):
        key, value = key[index], value[index]
        if lse is not None:
            lse.copy_(_shares(query, key, num_valid, scale)[0].flatten(1))
        return _attend(query, key, value, num_valid, scale, packed)
    outputs: list[Tensor] = []
    for own, row, counts in zip(query.split(1), index.tolist(), num_valid.tolist(), strict=True):
        held, here = max(counts), len(outputs)
        own_key, own_value = key[row : row + 1, :, :held], value[row : row + 1, :, :held]
        own_valid = num_valid[here : here + 1]
        if lse is not None:
            lse[here] = _shares(own, own_key, own_valid, scale)[0].flatten()
        if min(counts) == held > 0:
            outputs.append(attend_all(own, own_key, own_value, scale, packed))
        else:
            outputs.append(_attend(own, own_key, own_value, own_valid, scale, packed))
    return torch.cat(outputs)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_valid: Tensor | None,
    scale: float,
    packed: bool,
) -> Tensor:
    """Attend to the valid slots of one layer."""
    if num_valid is None:
        return attend_all(query, key, value, scale, packed)
    if host_reads_are_free(num_valid):
        counts = num_valid.flatten().tolist()
        longest = max(counts)
        if longest == 0:
            return torch.zeros_like(query)
        key, value = key[:, :, :longest], value[:, :, :longest]
        if min(counts) == longest:
            return attend_all(query, key, value, scale, packed)
    return attend_masked(query, key, value, num_valid, scale)


def attend_all(query: Tensor, key: Tensor, value: Tensor, scale: float, packed: bool) -> Tensor:
    """Attend to every slot; unless ``packed``, by the same call as transformers' SDPA.

    With ``packed``, the query heads of a group attend as rows of one head. This is faster and
    rounds differently.
    """
    shared = has_groups(query, key)
    if packed and shared:
        rows = query.unflatten(1, (key.shape[1], -1))
        return F.scaled_dot_product_attention(rows, key, value, scale=scale).flatten(1, 2)
    output = F.scaled_dot_product_attention(
        query[:, :, None], key, value, scale=scale, enable_gqa=shared
    )
    return output[:, :, 0]


def attend_masked(
    query: Tensor, key: Tensor, value: Tensor, num_valid: Tensor, scale: float
) -> Tensor:
    """Attend to the first ``num_valid`` slots of each head; the group's queries share one mask."""
    group = query.shape[1] // key.shape[1]
    slot = torch.arange(key.shape[2], device=key.device, dtype=torch.int32)
    mask = slot < num_valid[..., None]  # [batch, num_kv_heads, num_slots]
    output = F.scaled_dot_product_attention(
        query.unflatten(1, (key.shape[1], group)),
        key,
        value,
        attn_mask=mask[:, :, None],
        scale=scale,
    )
    # A softmax over nothing is NaN on some backends.
    return output.masked_fill((num_valid == 0)[..., None, None], 0).flatten(1, 2)


def _shares(
    query: Tensor, key: Tensor, num_valid: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Each head's log-sum-exp for one query per row, and the probabilities of the slots.

    Returns:
        ``[batch, num_kv_heads, group, 1]`` and ``[batch, num_kv_heads, group, num_slots]``.
    """
    queries = grouped(query[:, :, None], key.shape[1])
    logits = fold(queries, key.to(queries.dtype).mT)[:, :, :, 0] * scale
    unseen = torch.zeros_like(logits, dtype=torch.bool)
    if num_valid is not None:
        slot = torch.arange(key.shape[2], device=key.device, dtype=torch.int32)
        unseen = slot >= num_valid[:, :, None, None]
        logits = logits.masked_fill(unseen, -torch.inf)
    row_lse = logits.logsumexp(dim=-1, keepdim=True)
    return row_lse, softmax(logits, row_lse).masked_fill(unseen, 0)


def _write_mass(
    query: Tensor, key: Tensor, scale: float, mass: Tensor, reduce: str, accumulate: bool
) -> Tensor:
    """Write what one query per row gives every slot of ``key`` into ``mass``.

    Returns:
        The probabilities, ``[batch, num_kv_heads, group, slots]``.
    """
    rows = grouped(query, key.shape[1])
    share = torch.softmax((rows * scale) @ key.to(rows.dtype).mT, dim=-1)
    reduced = reduce_group(share, reduce)
    seen = mass[:, :, : key.shape[2]]
    if accumulate:
        seen += reduced
    else:
        seen.copy_(reduced)
        mass[:, :, key.shape[2] :] = 0
    return share


def _write_shares(
    row_lse: Tensor,
    share: Tensor,
    lse: Tensor | None,
    mass: Tensor | None,
    reduce: str,
    accumulate: bool,
) -> None:
    """Write the results of `_shares` into ``lse`` and ``mass``, if given."""
    if lse is not None:
        lse.copy_(row_lse.flatten(1))
    if mass is not None:
        share = reduce_group(share, reduce)
        if accumulate:
            mass += share
        else:
            mass.copy_(share)
