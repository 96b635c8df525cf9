"""One query token per sequence against heads of different lengths, in one launch.

The slots of a row's heads are cut into tiles, and the tiles of all heads are shared out over a
fixed number of programs. So every program has the same work, whatever the lengths are. A program
loops over the heads of its tiles. If a head is in several programs, the last of them to arrive
merges it. Lengths are computed from ``t``, so only the new pair is written.
"""

import triton
import triton.language as tl

from trimkv_kernels.kernels._triton.decode_attention import (
    _fold_pair,
    _pair_score,
    _store_output,
    merge_parts,
    store_part,
)
from trimkv_kernels.kernels._triton.primitives import LOWEST, dot, softmax_update
from trimkv_kernels.kernels._triton.prologue import load_finished, load_terms, store_first
from trimkv_kernels.kernels._triton.slots import paged_slot


@triton.jit(do_not_specialize=["scope", "first_head"])
def _ragged_append_attention_kernel(
    query_ptr,
    new_key_ptr,
    new_value_ptr,
    key_ptr,
    value_ptr,
    position_ptr,
    page_ptr,
    first_page_ptr,
    kept_ptr,
    cut_ptr,
    t_ptr,
    valid_ptr,
    slope_ptr,
    offset_ptr,
    new_slope_ptr,
    new_offset_ptr,
    stride_slope_b,
    stride_slope_h,
    stride_offset_b,
    stride_offset_h,
    gate_ptr,
    gate_bias_ptr,
    cos_ptr,
    sin_ptr,
    query_weight_ptr,
    key_weight_ptr,
    eps,
    age_offset,
    stride_cos_b,
    arrival_ptr,
    part_ptr,
    output_ptr,
    scale_log2,
    scope,
    first_head,
    batch,
    num_kv_heads,
    scope_heads,
    num_slots,
    num_pages,
    stride_query_b,
    stride_query_h,
    stride_new_key_b,
    stride_new_key_h,
    stride_new_value_b,
    stride_new_value_h,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    MEMBERS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    program = tl.program_id(0) % SPLITS
    scope_row = scope.to(tl.int64) * batch + row
    t = tl.load(t_ptr + row)
    grown = t - tl.load(cut_ptr + scope_row)
    real = tl.full([], 1, tl.int32)
    if valid_ptr is not None:
        real = (tl.load(valid_ptr + row) != 0).to(tl.int32)
    kept_ptr += scope_row * scope_heads + first_head
    first_page_ptr += scope_row * (scope_heads + 1) + first_head
    page_ptr += scope_row * num_pages
    base = scope_row * num_slots

    head_index = tl.arange(0, BLOCK_H)
    is_head = head_index < num_kv_heads
    begins = tl.load(first_page_ptr + head_index, mask=is_head, other=0)
    rooms = (tl.load(first_page_ptr + 1 + head_index, mask=is_head, other=0) - begins) * PAGE
    wanted = tl.load(kept_ptr + head_index, mask=is_head, other=0) + grown
    counts = tl.minimum(wanted, rooms)  # [BLOCK_H], the new pair included
    # an empty head has a tile too, to write its output
    tiles = tl.where(is_head, tl.maximum((counts + BLOCK_S - 1) // BLOCK_S, 1), 0)
    ends = tl.cumsum(tiles, axis=0)
    total_tiles = tl.sum(tiles, axis=0)
    programs = tl.minimum(total_tiles, SPLITS)
    begin = program * total_tiles // programs
    end = tl.where(program < programs, (program + 1) * total_tiles // programs, begin)

    dim = tl.arange(0, BLOCK_D)
    turn = None if cos_ptr is None else row * stride_cos_b
    for kv_head in range(num_kv_heads):
        here = head_index == kv_head
        last_tile = tl.sum(tl.where(here, ends, 0), axis=0)
        first_tile = last_tile - tl.sum(tl.where(here, tiles, 0), axis=0)
        low = tl.maximum(begin, first_tile)
        high = tl.minimum(end, last_tile)
        if low < high:
            count = tl.sum(tl.where(here, counts, 0), axis=0)
            first_page = tl.sum(tl.where(here, begins, 0), axis=0)
            fits = tl.sum(tl.where(here, (wanted <= rooms).to(tl.int32), 0), axis=0)
            stored = fits * real
            first_slot = (low - first_tile) * BLOCK_S
            # All loads come before the loop over the slots, so that none is waited for behind it.
            new_value_head = new_value_ptr + row * stride_new_value_b + kv_head * stride_new_value_h
            new_value = tl.load(new_value_head + dim, mask=dim < HEAD_DIM, other=0.0)
            head = row * num_kv_heads + kv_head
            if slope_ptr is not None:
                new_slope, new_offset = load_terms(
                    new_slope_ptr, new_offset_ptr,
                    stride_slope_b, stride_slope_h, stride_offset_b, stride_offset_h,
                    gate_ptr, gate_bias_ptr, row, kv_head, head, age_offset,
                )  # fmt: skip
            query = load_finished(
                query_ptr + row * stride_query_b + kv_head * GROUP * stride_query_h,
                stride_query_h, query_weight_ptr, cos_ptr, sin_ptr, turn, eps,
                GROUP, HEAD_DIM, BLOCK_G, BLOCK_D,
            )  # fmt: skip
            # Once for each query and laid out as they are, so that their products need no barrier.
            new_key = load_finished(
                new_key_ptr + row * stride_new_key_b + kv_head * stride_new_key_h, 0,
                key_weight_ptr, cos_ptr, sin_ptr, turn, eps, BLOCK_G, HEAD_DIM, BLOCK_G, BLOCK_D,
            )  # fmt: skip
            new_score = _pair_score(query, new_key) * scale_log2
            peak, total, mixed = _attend_pages(
                query, key_ptr, value_ptr, page_ptr, base, first_page,
                first_slot, tl.minimum((high - first_tile) * BLOCK_S, count - stored),
                scale_log2, tl.full([BLOCK_G], LOWEST, tl.float32),
                tl.zeros([BLOCK_G], tl.float32), tl.zeros([BLOCK_G, BLOCK_D], tl.float32),
                HEAD_DIM, PAGE, BLOCK_S, BLOCK_D, UPCAST,
            )  # fmt: skip
            if (stored != 0) & (high == last_tile):
                # the new pair never goes through memory; no program reads its slot
                peak, total, mixed = _fold_pair(new_score, new_value, peak, total, mixed)
                slot = paged_slot(page_ptr, base, first_page, count - 1, count > 0, PAGE)
                store_first(key_ptr, slot * HEAD_DIM, new_key, HEAD_DIM)
                tl.store(value_ptr + slot * HEAD_DIM + dim, new_value, mask=dim < HEAD_DIM)
                tl.store(position_ptr + slot, t - 1)
                if slope_ptr is not None:
                    tl.store(slope_ptr + slot, new_slope)
                    tl.store(offset_ptr + slot, new_offset)
            if (first_tile >= begin) & (last_tile <= end):
                _store_output(output_ptr, head, peak, total, mixed, GROUP, HEAD_DIM)
            else:
                # A program has parts of two heads at most, so those of a head lie side by side.
                first_part = row * (SPLITS + num_kv_heads) + kv_head
                num_parts = tl.num_programs(0) + batch * num_kv_heads
                store_part(
                    part_ptr, first_part + program, num_parts, peak, total, mixed, GROUP, HEAD_DIM
                )
                # The whole program's part is written before its arrival can be seen.
                tl.debug_barrier()
                first_program = ((first_tile + 1) * programs - 1) // total_tiles
                last_program = (last_tile * programs - 1) // total_tiles
                arrived = tl.atomic_add(arrival_ptr + head, 1)
                if arrived == last_program - first_program:
                    merged_peak, merged_total, merged = merge_parts(
                        part_ptr, first_part + first_program, last_program - first_program + 1,
                        num_parts, GROUP, HEAD_DIM, MEMBERS, BLOCK_D, PARTS, False,
                    )  # fmt: skip
                    _store_output(
                        output_ptr, head, merged_peak, merged_total, merged, GROUP, HEAD_DIM
                    )


@triton.jit
def _attend_pages(
    query, key_ptr, value_ptr, page_ptr, base, first_page, begin, end, scale_log2,
    peak, total, mixed, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold slots ``[begin, end)`` of a head into the running softmax, base 2."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    for start in range(begin, end, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        inside = slot < end
        mask = inside[:, None]
        if HEAD_DIM != BLOCK_D:
            mask = mask & (dim < HEAD_DIM)
        address = paged_slot(page_ptr, base, first_page, slot, inside, PAGE)[:, None] * HEAD_DIM
        key = tl.load(key_ptr + address + dim, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_D]
        score = dot(query, tl.trans(key), UPCAST) * scale_log2  # [BLOCK_G, BLOCK_S]
        score = tl.where(inside[None, :], score, -float("inf"))
        value = tl.load(value_ptr + address + dim, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_D]
        peak, total, mixed = softmax_update(peak, total, mixed, score, value, UPCAST)
    return peak, total, mixed
