"""Eviction of the lowest scores of every full head, one program per head, without a sort.

A score becomes an int32 with the same order. The k-th smallest is found bit by bit, with one count
over the head for each bit. Of equal scores the smaller positions go, found in the same way. Kept
slots of the tail then fill the holes before it, so only rows that must move are touched.
"""

import triton
import triton.language as tl

from trimkv_kernels.kernels._triton.primitives import INT32_MAX, INT32_MIN, score_order
from trimkv_kernels.kernels._triton.slots import (
    find_head,
    head_base,
    is_full,
    kept_when_full,
    protect,
    slot_offset,
    view_base,
)


@triton.jit
def _evict_kernel(
    key_ptr,
    value_ptr,
    position_ptr,
    num_valid_ptr,
    capacity_ptr,
    rows_ptr,
    t_ptr,
    slope_ptr,
    offset_ptr,
    scores_ptr,
    nan_seen_ptr,
    move_ptr,
    num_moves_ptr,
    batch,
    num_kv_heads,
    num_slots,
    stride_pair_b,
    stride_slot_b,
    stride_head_b,
    buffer,
    sinks,
    recent,
    HEAD_DIM: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)  # over layers, rows and KV heads
    row = head // num_kv_heads % batch
    layer_head, base, pair_base = find_head(
        head, rows_ptr, row, head % num_kv_heads, num_slots,
        stride_pair_b, stride_slot_b, stride_head_b, HEAD_DIM,
    )  # fmt: skip
    capacity = tl.load(capacity_ptr + layer_head)
    moves = 0
    if is_full(tl.load(num_valid_ptr + layer_head), capacity):
        t = tl.load(t_ptr + row)
        slot = tl.arange(0, BLOCK_N)
        address = slot_offset(base, slot, 1)
        inside = slot < capacity
        kept = kept_when_full(capacity, buffer)
        position = tl.load(position_ptr + address, mask=inside, other=0)
        score_address = address
        if scores_ptr is not None:
            score_address = head * num_slots + slot  # in the order of the call
        score = _load_score(
            slope_ptr, offset_ptr, scores_ptr, score_address, inside, (t - position).to(tl.float32)
        )
        is_nan = (score != score) & inside
        if nan_seen_ptr is not None:  # noqa: SIM102 (one branch is compiled, the other runs)
            if tl.max(is_nan.to(tl.int32), axis=0) > 0:
                tl.store(nan_seen_ptr + head // (batch * num_kv_heads), 1)
        score = protect(score, is_nan, position, t, sinks, recent)
        order = tl.where(inside, score_order(score), INT32_MAX)
        victim = _find_victims(order, position_ptr + address, inside, capacity - kept, SINGLE)

        hole = victim & (slot < kept)
        mover = (slot >= kept) & inside & (victim == 0)
        moves = tl.sum(hole.to(tl.int32), axis=0)
        source_ptr, target_ptr = _move_lists(move_ptr, head, buffer)
        rank = tl.cumsum(hole.to(tl.int32), axis=0) - 1
        tl.store(target_ptr + rank, slot, mask=hole)
        rank = tl.cumsum(mover.to(tl.int32), axis=0) - 1
        tl.store(source_ptr + rank, slot, mask=mover)
        # The lists are read by other threads than wrote them, and all warps must have read the old
        # count.
        tl.debug_barrier()
        tl.store(num_valid_ptr + layer_head, kept)
        for start in range(0, moves, BLOCK_R):
            index = start + tl.arange(0, BLOCK_R)
            mask = index < moves
            source = tl.load(source_ptr + index, mask=mask, other=0)
            target = tl.load(target_ptr + index, mask=mask, other=0)
            _move_rows(key_ptr, pair_base, source, target, mask, HEAD_DIM, BLOCK_D)
            _move_rows(value_ptr, pair_base, source, target, mask, HEAD_DIM, BLOCK_D)
            _move_numbers(position_ptr, base, source, target, mask)
            if slope_ptr is not None:
                _move_numbers(slope_ptr, base, source, target, mask)
                _move_numbers(offset_ptr, base, source, target, mask)
    if num_moves_ptr is not None:
        tl.store(num_moves_ptr + head, moves)


@triton.jit
def _move_field_kernel(
    field_ptr,
    move_ptr,
    num_moves_ptr,
    rows_ptr,
    num_kv_heads,
    num_slots,
    stride_b,
    buffer,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Repeat the moves of `_evict_kernel` on one more tensor, ``WIDTH`` numbers per slot."""
    head = tl.program_id(0).to(tl.int64)
    if rows_ptr is None:
        base = head_base(head, num_slots) * WIDTH
    else:
        stored = tl.load(rows_ptr + head // num_kv_heads).to(tl.int64)
        base = view_base(stored, head % num_kv_heads, stride_b, num_slots * WIDTH)
    moves = tl.load(num_moves_ptr + head)
    source_ptr, target_ptr = _move_lists(move_ptr, head, buffer)
    for start in range(0, moves, BLOCK_R):
        index = start + tl.arange(0, BLOCK_R)
        mask = index < moves
        source = tl.load(source_ptr + index, mask=mask, other=0)
        target = tl.load(target_ptr + index, mask=mask, other=0)
        _move_rows(field_ptr, base, source, target, mask, WIDTH, BLOCK_W)


@triton.jit
def _load_score(slope_ptr, offset_ptr, scores_ptr, address, inside, age):
    if scores_ptr is not None:
        return tl.load(scores_ptr + address, mask=inside, other=0.0)
    else:
        slope = tl.load(slope_ptr + address, mask=inside, other=0.0)
        offset = tl.load(offset_ptr + address, mask=inside, other=0.0)
        return slope * age + offset


@triton.jit
def _find_victims(order, position_ptrs, inside, count, SINGLE: tl.constexpr):
    """Mark the ``count`` smallest by order; of equal ones, those with smaller positions."""
    lowest = tl.min(order, axis=0) if SINGLE else _kth_smallest(order, count)
    equal = order == lowest
    # Loaded again, because keeping a large head's positions during the search would spill.
    position = tl.load(position_ptrs, mask=inside, other=INT32_MAX)
    if SINGLE:
        oldest = tl.min(tl.where(equal, position, INT32_MAX), axis=0)
    else:
        oldest = tl.full([], INT32_MAX, tl.int32)
        need = count - tl.sum((order < lowest).to(tl.int32), axis=0)
        if tl.sum(equal.to(tl.int32), axis=0) > need:
            oldest = _kth_smallest(tl.where(equal, position, INT32_MAX), need)
    return (order < lowest) | (equal & (position <= oldest))


@triton.jit
def _kth_smallest(number, k):
    """Find the largest threshold with fewer than ``k`` numbers below it, from the top bit down."""
    one = tl.full([], 1, tl.int32)
    threshold = tl.full([], INT32_MIN, tl.int32)
    for step in range(32):
        candidate = threshold ^ (one << (31 - step))
        below = tl.sum((number < candidate).to(tl.int32), axis=0)
        threshold = tl.where(below < k, candidate, threshold)
    return threshold


@triton.jit
def _move_lists(move_ptr, head, buffer):
    """Pointers to a head's list of slots to read and its list of slots to write."""
    source_ptr = move_ptr + head * (2 * buffer)
    return source_ptr, source_ptr + buffer


@triton.jit
def _move_rows(ptr, base, source, target, mask, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """Copy rows of ``WIDTH`` numbers from slots ``source`` to slots ``target`` of one head."""
    read = slot_offset(base, source, WIDTH)[:, None]  # [BLOCK_R, 1]
    write = slot_offset(base, target, WIDTH)[:, None]
    for start in tl.static_range(0, WIDTH, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)[None, :]
        inside = mask[:, None] & (column < WIDTH)
        rows = tl.load(ptr + read + column, mask=inside)  # [BLOCK_R, BLOCK_W]
        tl.store(ptr + write + column, rows, mask=inside)


@triton.jit
def _move_numbers(ptr, base, source, target, mask):
    number = tl.load(ptr + slot_offset(base, source, 1), mask=mask)
    tl.store(ptr + slot_offset(base, target, 1), number, mask=mask)
