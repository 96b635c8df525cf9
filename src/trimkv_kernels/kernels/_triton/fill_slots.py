"""Filling the slots from a longer call: choose among slots and new tokens, then copy what moves.

One program per head reads its candidates, the slots followed by the call's tokens, block by block,
so registers do not limit the length of a prompt. A score becomes an int32 with the same order. The
lowest score to keep is found digit by digit, with one histogram over the candidates for each digit.
Of equal scores, the oldest position to keep is found in the same way. Kept slots at the front do
not move. The holes there are paired with the kept slots behind and the kept new tokens, in their
order. A second launch, over heads and blocks of rows, makes the moves.
"""

import triton
import triton.language as tl

from trimkv_kernels.kernels._triton.primitives import INT32_MAX, INT32_MIN, score_order
from trimkv_kernels.kernels._triton.slots import (
    head_base,
    is_full,
    kept_when_full,
    protect,
    slot_offset,
    view_base,
)

# Below the order of any score: not a candidate.
ABSENT = INT32_MIN


@triton.jit(do_not_specialize=["layer", "max_valid", "new"])
def _select_kernel(
    new_position_ptr,
    position_ptr,
    num_valid_ptr,
    capacity_ptr,
    t_ptr,
    valid_ptr,
    slope_ptr,
    offset_ptr,
    new_slope_ptr,
    new_offset_ptr,
    scores_ptr,
    nan_seen_ptr,
    order_ptr,
    move_ptr,
    num_moves_ptr,
    layer,
    num_heads,
    num_kv_heads,
    num_slots,
    max_valid,
    new,
    buffer,
    sinks,
    recent,
    BLOCK_C: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)  # over rows and KV heads
    row = head // num_kv_heads
    layer_head = layer.to(tl.int64) * num_heads + head  # over layers and rows
    candidates = max_valid + new
    held = tl.minimum(tl.load(num_valid_ptr + layer_head), max_valid)
    t = tl.load(t_ptr + row)
    base = head_base(layer_head, num_slots)
    new_position_ptr += row * new
    order_ptr += head * candidates

    present = tl.zeros([], tl.int32)
    nans = tl.zeros([], tl.int32)
    for start in range(0, candidates, BLOCK_C):
        index = start + tl.arange(0, BLOCK_C)
        token = index - max_valid
        inside = index < candidates
        real = inside & (token >= 0)
        if valid_ptr is not None:
            real = real & (tl.load(valid_ptr + row * new + token, mask=real, other=0) != 0)
        real = real | (index < held)
        position = _load_candidate(position_ptr, base, new_position_ptr, index, max_valid, inside)
        if scores_ptr is not None:
            score = tl.load(scores_ptr + head * candidates + index, mask=inside, other=0.0)
        else:
            slope = _load_candidate(
                slope_ptr, base, new_slope_ptr + head * new, index, max_valid, inside
            )
            offset = _load_candidate(
                offset_ptr, base, new_offset_ptr + head * new, index, max_valid, inside
            )
            score = slope * (t - position).to(tl.float32) + offset
        is_nan = (score != score) & real
        nans += tl.sum(is_nan.to(tl.int32), axis=0)
        present += tl.sum(real.to(tl.int32), axis=0)
        score = protect(score, is_nan, position, t, sinks, recent)
        tl.store(order_ptr + index, tl.where(real, score_order(score), ABSENT), mask=inside)
    if nan_seen_ptr is not None:  # noqa: SIM102 (one branch is compiled, the other runs)
        if nans > 0:
            tl.store(nan_seen_ptr + layer, 1)
    # The orders are read by other threads than wrote them.
    tl.debug_barrier()

    lowest = tl.full([], ABSENT, tl.int32)
    oldest = tl.full([], INT32_MAX, tl.int32)
    count = present
    capacity = tl.load(capacity_ptr + layer_head)
    if is_full(present, capacity):
        count = kept_when_full(capacity, buffer)
        lowest, need, equal = _nth_largest(
            order_ptr, position_ptr, base, new_position_ptr, lowest, count, max_valid, candidates,
            False, BLOCK_C,
        )  # fmt: skip
        oldest = tl.zeros([], tl.int32)
        if equal > need:
            oldest, need, equal = _nth_largest(
                order_ptr, position_ptr, base, new_position_ptr, lowest, need, max_valid,
                candidates, True, BLOCK_C,
            )  # fmt: skip

    source_ptr, target_ptr = _move_lists(move_ptr, head, num_slots)
    holes = tl.zeros([], tl.int32)
    movers = tl.zeros([], tl.int32)
    for start in range(0, candidates, BLOCK_C):
        # A candidate, and a slot to fill: there are at least as many candidates as kept ones.
        index = start + tl.arange(0, BLOCK_C)
        inside = index < candidates
        order = tl.load(order_ptr + index, mask=inside, other=ABSENT)
        position = _load_candidate(position_ptr, base, new_position_ptr, index, max_valid, inside)
        keep = (order > lowest) | ((order == lowest) & (position >= oldest))
        front = index < count
        stays = keep & front & (index < held)
        hole = (front & (stays == 0)).to(tl.int32)
        mover = (keep & (stays == 0)).to(tl.int32)
        tl.store(target_ptr + holes + tl.cumsum(hole, axis=0) - 1, index, mask=hole != 0)
        tl.store(source_ptr + movers + tl.cumsum(mover, axis=0) - 1, index, mask=mover != 0)
        holes += tl.sum(hole, axis=0)
        movers += tl.sum(mover, axis=0)
    tl.store(num_moves_ptr + head, holes)
    # All warps must have read the old count.
    tl.debug_barrier()
    tl.store(num_valid_ptr + layer_head, count)


@triton.jit(do_not_specialize=["layer", "max_valid", "new"])
def _fill_kernel(
    new_key_ptr,
    new_value_ptr,
    new_position_ptr,
    key_ptr,
    value_ptr,
    position_ptr,
    slope_ptr,
    offset_ptr,
    new_slope_ptr,
    new_offset_ptr,
    move_ptr,
    num_moves_ptr,
    layer,
    num_heads,
    num_kv_heads,
    num_slots,
    max_valid,
    new,
    blocks,
    stride_new_key_b,
    stride_new_key_h,
    stride_new_key_s,
    stride_new_value_b,
    stride_new_value_h,
    stride_new_value_s,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    head = (tl.program_id(0) // blocks).to(tl.int64)
    row = head // num_kv_heads
    kv_head = head % num_kv_heads
    base = head_base(layer.to(tl.int64) * num_heads + head, num_slots)
    start = tl.program_id(0) % blocks * BLOCK_R
    moves = tl.load(num_moves_ptr + head)
    if start < moves:
        source, target, mask = _load_moves(move_ptr, head, start, moves, num_slots, BLOCK_R)
        _fill_rows(
            key_ptr, new_key_ptr + view_base(row, kv_head, stride_new_key_b, stride_new_key_h),
            stride_new_key_s, base, source, target, mask, max_valid, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        _fill_rows(
            value_ptr,
            new_value_ptr + view_base(row, kv_head, stride_new_value_b, stride_new_value_h),
            stride_new_value_s, base, source, target, mask, max_valid, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        _fill_numbers(
            position_ptr, new_position_ptr + row * new, base, source, target, mask, max_valid
        )
        if slope_ptr is not None:
            _fill_numbers(
                slope_ptr, new_slope_ptr + head * new, base, source, target, mask, max_valid
            )
            _fill_numbers(
                offset_ptr, new_offset_ptr + head * new, base, source, target, mask, max_valid
            )


@triton.jit(do_not_specialize=["layer", "max_valid", "new"])
def _fill_field_kernel(
    new_field_ptr,
    field_ptr,
    move_ptr,
    num_moves_ptr,
    layer,
    num_heads,
    num_slots,
    max_valid,
    new,
    blocks,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Make the moves on one more tensor, ``WIDTH`` numbers per slot."""
    head = (tl.program_id(0) // blocks).to(tl.int64)
    base = head_base(layer.to(tl.int64) * num_heads + head, num_slots)
    start = tl.program_id(0) % blocks * BLOCK_R
    moves = tl.load(num_moves_ptr + head)
    if start < moves:
        source, target, mask = _load_moves(move_ptr, head, start, moves, num_slots, BLOCK_R)
        _fill_rows(
            field_ptr, new_field_ptr + head * new * WIDTH, WIDTH,
            base, source, target, mask, max_valid, WIDTH, BLOCK_W,
        )  # fmt: skip


@triton.jit
def _load_candidate(ptr, base, new_ptr, index, max_valid, inside):
    """A number of each candidate: of slots below ``max_valid``, of new tokens from there on."""
    number = tl.load(ptr + slot_offset(base, index, 1), mask=inside & (index < max_valid))
    return tl.load(new_ptr + (index - max_valid), mask=inside & (index >= max_valid), other=number)


@triton.jit
def _nth_largest(
    order_ptr, position_ptr, base, new_position_ptr, order, n, max_valid, candidates,
    TIES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Find the ``n``-th largest order, or position of those of one ``order``, from the top digit.

    Returns it, how many of the ``n`` largest are equal to it, and how many are in all.
    """
    found = tl.zeros([], tl.int32)
    known = tl.zeros([], tl.int32)  # the bits of `found` that are final
    equal = tl.zeros([], tl.int32)
    digits = tl.arange(0, 256)
    for step in range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], tl.int32)
        for start in range(0, candidates, BLOCK_C):
            index = start + tl.arange(0, BLOCK_C)
            match = index < candidates
            number = tl.load(order_ptr + index, mask=match, other=ABSENT)
            if TIES:
                match = match & (number == order)
                number = _load_candidate(
                    position_ptr, base, new_position_ptr, index, max_valid, match
                )
            else:
                number = number ^ INT32_MIN  # the same order as unsigned bits
            match = match & (((number ^ found) & known) == 0)
            counts += tl.histogram((number >> shift) & 255, 256, mask=match)
        above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)  # with a larger digit
        digit = tl.sum((above + counts >= n).to(tl.int32), axis=0) - 1
        equal = tl.sum(tl.where(digits == digit, counts, 0), axis=0)
        n -= tl.sum(tl.where(digits == digit, above, 0), axis=0)
        found = found | (digit << shift)
        known = known | (tl.full([], 255, tl.int32) << shift)
    if not TIES:
        found = found ^ INT32_MIN
    return found, n, equal


@triton.jit
def _move_lists(move_ptr, head, num_slots):
    """Pointers to a head's list of candidates to read and its list of slots to write."""
    source_ptr = move_ptr + head * (2 * num_slots)
    return source_ptr, source_ptr + num_slots


@triton.jit
def _load_moves(move_ptr, head, start, moves, num_slots, BLOCK_R: tl.constexpr):
    source_ptr, target_ptr = _move_lists(move_ptr, head, num_slots)
    index = start + tl.arange(0, BLOCK_R)
    mask = index < moves
    source = tl.load(source_ptr + index, mask=mask, other=0)
    target = tl.load(target_ptr + index, mask=mask, other=0)
    return source, target, mask


@triton.jit
def _fill_rows(
    ptr, new_ptr, stride_new_s, base, source, target, mask, max_valid,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Copy rows of ``WIDTH`` numbers from candidates ``source`` to slots ``target`` of one head.

    All slots that are read are behind those that are written, so the order does not matter.
    """
    is_slot = source < max_valid
    read = slot_offset(base * WIDTH, source, WIDTH)[:, None]  # [BLOCK_R, 1]
    read_new = slot_offset(tl.zeros([], tl.int64), source - max_valid, stride_new_s)[:, None]
    write = slot_offset(base * WIDTH, target, WIDTH)[:, None]
    for start in tl.static_range(0, WIDTH, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)[None, :]
        inside = mask[:, None] & (column < WIDTH)
        rows = tl.load(ptr + read + column, mask=inside & is_slot[:, None])
        rows = tl.load(
            new_ptr + read_new + column, mask=inside & (is_slot == 0)[:, None], other=rows
        )  # [BLOCK_R, BLOCK_W]
        tl.store(ptr + write + column, rows, mask=inside)


@triton.jit
def _fill_numbers(ptr, new_ptr, base, source, target, mask, max_valid):
    number = _load_candidate(ptr, base, new_ptr, source, max_valid, mask)
    tl.store(ptr + slot_offset(base, target, 1), number, mask=mask)
