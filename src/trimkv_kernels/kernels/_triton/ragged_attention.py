"""One query token per sequence against heads of different lengths, in one launch.

The slots of a row's heads are cut into tiles, and the tiles of all heads are shared out over a
fixed number of programs. So every program has the same work, whatever the lengths are. A program
loops over the heads of its tiles. If a head is in several programs, the last of them to arrive
merges it. Lengths are computed from ``t``, so only the new pair is written.
"""

import triton
import triton.language as tl

from trimkv_kernels.kernels._triton.decode_attention import _load_query, _store_output
from trimkv_kernels.kernels._triton.primitives import LOWEST, dot, softmax_update
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
            query = _load_query(
                query_ptr + row * stride_query_b + kv_head * GROUP * stride_query_h,
                stride_query_h, GROUP, HEAD_DIM, BLOCK_G, BLOCK_D,
            )  # fmt: skip
            peak = tl.full([BLOCK_G], LOWEST, tl.float32)
            total = tl.zeros([BLOCK_G], tl.float32)
            mixed = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
            if (stored != 0) & (high == last_tile):
                # the new pair never goes through memory; no program reads its slot
                dim = tl.arange(0, BLOCK_D)
                new_key, new_value, peak, total, mixed = _start_from_pair(
                    query, new_key_ptr + row * stride_new_key_b + kv_head * stride_new_key_h,
                    new_value_ptr + row * stride_new_value_b + kv_head * stride_new_value_h,
                    scale_log2, total, mixed, HEAD_DIM, BLOCK_D,
                )  # fmt: skip
                slot = paged_slot(page_ptr, base, first_page, count - 1, count > 0, PAGE)
                tl.store(key_ptr + slot * HEAD_DIM + dim, new_key, mask=dim < HEAD_DIM)
                tl.store(value_ptr + slot * HEAD_DIM + dim, new_value, mask=dim < HEAD_DIM)
                tl.store(position_ptr + slot, t - 1)
                if slope_ptr is not None:
                    new = row * num_kv_heads + kv_head
                    tl.store(slope_ptr + slot, tl.load(new_slope_ptr + new))
                    tl.store(offset_ptr + slot, tl.load(new_offset_ptr + new))
            held = count - stored
            peak, total, mixed = _attend_pages(
                query, key_ptr, value_ptr, page_ptr, base, first_page,
                (low - first_tile) * BLOCK_S, tl.minimum((high - first_tile) * BLOCK_S, held),
                scale_log2, peak, total, mixed, HEAD_DIM, PAGE, BLOCK_S, BLOCK_D, UPCAST,
            )  # fmt: skip
            head = row * num_kv_heads + kv_head
            if (first_tile >= begin) & (last_tile <= end):
                _store_output(output_ptr, head, peak, total, mixed, GROUP, HEAD_DIM)
            else:
                # part 0 continues a head of the program before, part 1 begins one
                side = (first_tile >= begin).to(tl.int32)
                _store_pair_part(
                    part_ptr, (row * SPLITS + program) * 2 + side, peak, total, mixed,
                    GROUP, HEAD_DIM,
                )  # fmt: skip
                # The whole program's part is written before its arrival can be seen.
                tl.debug_barrier()
                first_program = ((first_tile + 1) * programs - 1) // total_tiles
                last_program = (last_tile * programs - 1) // total_tiles
                arrived = tl.atomic_add(arrival_ptr + head, 1)
                if arrived == last_program - first_program:
                    _merge_parts_of_head(
                        part_ptr, output_ptr, head, row * SPLITS, first_program, last_program,
                        GROUP, HEAD_DIM, BLOCK_G, BLOCK_D,
                    )  # fmt: skip


@triton.jit
def _start_from_pair(
    query, new_key_ptr, new_value_ptr, scale_log2, total, mixed,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A new pair, ``[BLOCK_D]`` each, and the running softmax of an empty state after it."""
    dim = tl.arange(0, BLOCK_D)
    new_key = tl.load(new_key_ptr + dim, mask=dim < HEAD_DIM, other=0.0)
    new_value = tl.load(new_value_ptr + dim, mask=dim < HEAD_DIM, other=0.0)
    product = query.to(tl.float32) * new_key.to(tl.float32)[None, :]  # [BLOCK_G, BLOCK_D]
    peak = tl.sum(product, axis=1) * scale_log2
    return new_key, new_value, peak, total + 1.0, mixed + new_value.to(tl.float32)[None, :]


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


@triton.jit
def _store_pair_part(
    part_ptr, part, peak, total, mixed, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Write one program's state of a head: ``mixed``, ``peak`` and ``total``, by query head."""
    member = tl.arange(0, mixed.shape[0])
    dim = tl.arange(0, mixed.shape[1])[None, :]
    address = (part * GROUP + member) * (HEAD_DIM + 2)
    mask = (member < GROUP)[:, None] & (dim < HEAD_DIM)
    tl.store(part_ptr + address[:, None] + dim, mixed, mask=mask)
    tl.store(part_ptr + address + HEAD_DIM, peak, mask=member < GROUP)
    tl.store(part_ptr + address + HEAD_DIM + 1, total, mask=member < GROUP)


@triton.jit
def _merge_parts_of_head(
    part_ptr, output_ptr, head, row_part, first_program, last_program,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Combine the parts of one head. Other programs wrote them, so L1 is bypassed."""
    member = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)[None, :]
    peak = tl.full([BLOCK_G], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    mixed = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    is_member = member < GROUP
    mask = is_member[:, None] & (dim < HEAD_DIM)
    for program in range(first_program, last_program + 1):
        part = (row_part + program) * 2 + (program == first_program).to(tl.int32)
        address = (part * GROUP + member) * (HEAD_DIM + 2)
        stat_ptr = part_ptr + address + HEAD_DIM
        other = tl.load(stat_ptr, mask=is_member, other=LOWEST, cache_modifier=".cg")
        weight = tl.load(stat_ptr + 1, mask=is_member, other=0.0, cache_modifier=".cg")
        block = tl.load(
            part_ptr + address[:, None] + dim, mask=mask, other=0.0, cache_modifier=".cg"
        )
        new_peak = tl.maximum(peak, other)
        shrink = tl.exp2(peak - new_peak)
        grow = tl.exp2(other - new_peak)
        total = total * shrink + weight * grow
        mixed = mixed * shrink[:, None] + block * grow[:, None]
        peak = new_peak
    _store_output(output_ptr, head, peak, total, mixed, GROUP, HEAD_DIM)
