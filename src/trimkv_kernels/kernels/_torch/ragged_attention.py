"""Attention of one new token per row to heads of different lengths, and storing it.

Lengths are read on the host. If a head's slots are contiguous, as evictions on this path leave
them, it attends to a view of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_kernels.kernels._torch.decode_attention import attend_all, attend_masked
from trimkv_kernels.kernels.launch import softmax_scale
from trimkv_kernels.kernels.pages import PAGE, Pages, gather_slots
from trimkv_kernels.kernels.prologue import Decay, Rope


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
    decay: Decay | None = None,
    rope: Rope | None = None,
    scale: float | None = None,
    packed: bool = False,
    rows_apart: bool = False,
) -> Tensor:
    """See `trimkv_kernels.kernels.ragged_append_attention`."""
    if rope is not None:
        query, new_key = rope.applied(query, new_key)
    if decay is not None:
        new_slope, new_offset = decay.terms()
    scale = softmax_scale(scale, query.shape[-1])
    num_kv_heads = new_key.shape[1]
    lengths = _Lengths.read(pages, t, layer, num_kv_heads)
    real = None if valid is None else valid.tolist()
    stored = [
        (row, head)
        for row, head in lengths.heads()
        if lengths.fits[row][head] and (real is None or real[row])
    ]
    new = {"key": new_key, "value": new_value}
    new["position"] = (t - 1)[:, None].expand(new_key.shape[:2])
    if new_slope is not None and new_offset is not None:
        new |= {"slope": new_slope, "offset": new_offset}
    index = torch.tensor(lengths.newest(pages, stored), dtype=torch.int64, device=t.device)
    chosen = None
    if len(stored) < len(lengths.counts) * num_kv_heads:
        chosen = [row * num_kv_heads + head for row, head in stored]
    for name, entries in new.items():
        base: Tensor = getattr(pages, name)
        entries = entries.flatten(0, 1)
        entries = (entries if chosen is None else entries[chosen]).to(base.dtype)
        base.flatten(0, 2).index_copy_(0, index, entries)
    return _attend(query, pages, lengths, layer, scale, packed)


@dataclass(frozen=True)
class _Lengths:
    """What the heads of a layer hold, on the host.

    Attributes:
        scope: The layer's scope.
        counts: Pairs of each head, the new one included, by row.
        fits: Whether a head has a slot for the new pair, by row.
        bounds: Where the pages of the heads begin in the table, by row.
        is_straight: Whether each head's slots are contiguous.
    """

    scope: int
    counts: list[list[int]]
    fits: list[list[bool]]
    bounds: list[list[int]]
    is_straight: bool

    @classmethod
    def read(cls, pages: Pages, t: Tensor, layer: int, num_kv_heads: int) -> _Lengths:
        """Read them back."""
        scope, own = pages.place(layer, num_kv_heads)
        bounds = pages.first_page[scope, :, own.start : own.stop + 1].tolist()
        kept = pages.kept[scope, :, own].tolist()
        grown = (t - pages.cut[scope]).tolist()
        counts, fits = [], []
        for row, (begin, of_row) in enumerate(zip(bounds, kept, strict=True)):
            wanted = [held + grown[row] for held in of_row]
            rooms = [(b - a) * PAGE for a, b in itertools.pairwise(begin)]
            counts.append([min(x) for x in zip(wanted, rooms, strict=True)])
            fits.append([want <= room for want, room in zip(wanted, rooms, strict=True)])
        page = pages.page[scope]
        straight = torch.arange(page.shape[1], dtype=torch.int32, device=page.device)
        return cls(scope, counts, fits, bounds, torch.equal(page, straight.expand_as(page)))

    def heads(self) -> Iterator[tuple[int, int]]:
        """Row and head of each."""
        return itertools.product(range(len(self.counts)), range(len(self.counts[0])))

    def newest(self, pages: Pages, heads: list[tuple[int, int]]) -> list[int]:
        """Rows of the flat tensors: the last slot of some heads."""
        batch, num_pages = pages.page.shape[1:]
        found = []
        for row, head in heads:
            ordinal, slot = divmod(self.counts[row][head] - 1, PAGE)
            page = self.bounds[row][head] + ordinal
            if not self.is_straight:
                page = int(pages.page[self.scope, row, page])
            found.append(((self.scope * batch + row) * num_pages + page) * PAGE + slot)
        return found


def _attend(
    query: Tensor, pages: Pages, lengths: _Lengths, layer: int, scale: float, packed: bool
) -> Tensor:
    """Attend to what the heads of a layer hold."""
    scope, counts, firsts = lengths.scope, lengths.counts, lengths.bounds
    longest, num_kv_heads = max(map(max, counts)), len(counts[0])
    if longest == 0:
        return torch.zeros_like(query)
    if not lengths.is_straight:
        count = torch.tensor(counts, dtype=torch.int32, device=query.device)
        slot = torch.arange(longest, device=query.device).expand(*count.shape, longest)
        rows = pages.slot_rows(layer, slot)
        key, value = gather_slots(pages.key, rows), gather_slots(pages.value, rows)
        return attend_masked(query, key, value, count, scale)
    even = _even_heads(firsts) if longest == min(map(min, counts)) else None
    if even is not None:
        start, size = even
        key, value = (
            x[scope, :, start : start + num_kv_heads * size].unflatten(1, (num_kv_heads, size))
            for x in (pages.key, pages.value)
        )
        return attend_all(query, key[:, :, :longest], value[:, :, :longest], scale, packed)
    output = torch.zeros_like(query)
    group = query.shape[1] // num_kv_heads
    for row, head in lengths.heads():
        length = counts[row][head]
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
