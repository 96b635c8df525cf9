"""Attention of one new token per row to heads of different lengths, and storing it.

Lengths are read on the host. If a head's slots are contiguous, as evictions on this path leave
them, it attends to a view of them.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_kernels.kernels._torch.decode_attention import attend_all, attend_masked
from trimkv_kernels.kernels.launch import softmax_scale
from trimkv_kernels.kernels.pages import PAGE, Pages, gather_slots


def ragged_append_attention(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    pages: Pages,
    t: Tensor,
    *,
    layer: int,
    valid: Tensor | None = None,
    new_slope: Tensor | None = None,
    new_offset: Tensor | None = None,
    scale: float | None = None,
    packed: bool = False,
    rows_apart: bool = False,
) -> Tensor:
    """See `trimkv_kernels.kernels.ragged_append_attention`."""
    scale = softmax_scale(scale, query.shape[-1])
    num_kv_heads = new_key.shape[1]
    scope, heads = pages.place(layer, num_kv_heads)
    wanted = pages.scope(scope).num_valid(t)[0, :, heads]
    bounds = pages.first_page[scope, :, heads.start : heads.stop + 1]
    room = bounds.diff(dim=1) * PAGE
    count = torch.minimum(wanted, room)
    stored = wanted <= room
    if valid is not None:
        stored = stored & valid[:, None]
    rows = pages.slot_rows(layer, (count - 1)[..., None])[..., 0][stored]
    new = {"key": new_key, "value": new_value}
    new["position"] = (t - 1)[:, None].expand(new_key.shape[:2])
    if new_slope is not None and new_offset is not None:
        new |= {"slope": new_slope, "offset": new_offset}
    for name, entries in new.items():
        base: Tensor = getattr(pages, name)
        base.flatten(0, 2).index_copy_(0, rows, entries[stored].to(base.dtype))
    return _attend(query, pages, count, bounds, layer, scale, packed, rows_apart)


def _attend(
    query: Tensor,
    pages: Pages,
    count: Tensor,
    bounds: Tensor,
    layer: int,
    scale: float,
    packed: bool,
    rows_apart: bool,
) -> Tensor:
    """Attend to the first ``count`` slots of a layer's heads, whose pages have ``bounds``."""
    counts: list[list[int]] = count.tolist()
    longest, num_kv_heads = max(map(max, counts)), count.shape[1]
    if longest == 0:
        return torch.zeros_like(query)
    scope = pages.place(layer, num_kv_heads)[0]
    if not pages.scope(scope).is_straight():
        slot = torch.arange(longest, device=count.device).expand(*count.shape, longest)
        rows = pages.slot_rows(layer, slot)
        key, value = gather_slots(pages.key, rows), gather_slots(pages.value, rows)
        return attend_masked(query, key, value, count, scale)
    firsts: list[list[int]] = bounds.tolist()
    is_even = longest == min(map(min, counts)) and not rows_apart
    even = _even_heads(firsts) if is_even else None
    if even is not None:
        start, size = even
        key, value = (
            x[scope, :, start : start + num_kv_heads * size].unflatten(1, (num_kv_heads, size))
            for x in (pages.key, pages.value)
        )
        return attend_all(query, key[:, :, :longest], value[:, :, :longest], scale, packed)
    output = torch.zeros_like(query)
    group = query.shape[1] // num_kv_heads
    for row, lengths in enumerate(counts):
        for head, length in enumerate(lengths):
            if length > 0:
                slots = slice(firsts[row][head] * PAGE, firsts[row][head] * PAGE + length)
                own = slice(head * group, (head + 1) * group)
                output[row, own] = F.scaled_dot_product_attention(
                    query[row, None, own],
                    pages.key[scope, row, None, slots],
                    pages.value[scope, row, None, slots],
                    scale=scale,
                )[0]
    return output


def _even_heads(firsts: list[list[int]]) -> tuple[int, int] | None:
    """First slot of a layer's heads and their distance; None unless the same in all rows."""
    row = firsts[0]
    size = row[1] - row[0]
    if any(other != row for other in firsts[1:]):
        return None
    if any(b - a != size for a, b in itertools.pairwise(row)):
        return None
    return row[0] * PAGE, size * PAGE
