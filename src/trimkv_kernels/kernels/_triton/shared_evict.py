"""Eviction for heads that share a budget: score, find the scope's best pairs, cut each head.

There are three launches, which do nothing for a scope that is not full. The first writes the scores
of a scope as int32 with the same order, in the order of its page table, and the positions beside
them. The second, a program per scope and row, finds the lowest score to keep digit by digit, with
one histogram over the scope for each digit. Of equal scores, it finds the oldest position in the
same way. Then it counts the pairs of each head that stay. The third cuts every head to its number:
kept slots of the tail fill the holes before it. Pages are dealt out afterwards.
"""

import triton
import triton.language as tl

from trimkv_kernels.kernels._triton.evict import _load_score
from trimkv_kernels.kernels._triton.primitives import INT32_MAX, INT32_MIN, score_order
from trimkv_kernels.kernels._triton.slots import paged_slot, protect

# Below the order of any score: no pair.
ABSENT = INT32_MIN


@triton.jit
def _score_kernel(
    position_ptr,
    page_ptr,
    first_page_ptr,
    held_ptr,
    full_ptr,
    t_ptr,
    slope_ptr,
    offset_ptr,
    scores_ptr,
    nan_seen_ptr,
    order_ptr,
    placed_ptr,
    batch,
    heads,
    num_slots,
    num_pages,
    sinks,
    recent,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)  # over scopes, rows and heads
    scope_row = head // heads
    if tl.load(full_ptr + scope_row) != 0:
        t = tl.load(t_ptr + scope_row % batch)
        first, room = _bounds(first_page_ptr, scope_row, head % heads, heads, PAGE)
        held = tl.load(held_ptr + head)
        base = scope_row * num_slots
        nans = tl.zeros([], tl.int32)
        for start in range(0, room, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            inside = slot < room
            real = slot < held
            address = paged_slot(page_ptr + scope_row * num_pages, base, first, slot, inside, PAGE)
            position = tl.load(position_ptr + address, mask=real, other=-1)
            age = (t - position).to(tl.float32)
            score = _load_score(slope_ptr, offset_ptr, scores_ptr, address, real, age)
            is_nan = (score != score) & real
            nans += tl.sum(is_nan.to(tl.int32), axis=0)
            score = protect(score, is_nan, position, t, sinks, recent)
            index = base + first * PAGE + slot
            tl.store(order_ptr + index, tl.where(real, score_order(score), ABSENT), mask=inside)
            tl.store(placed_ptr + index, position, mask=inside)
        if nan_seen_ptr is not None:  # noqa: SIM102 (one branch is compiled, the other runs)
            if nans > 0:
                scope = scope_row // batch
                tl.store(nan_seen_ptr + scope * heads + head % heads, 1)


@triton.jit
def _share_kernel(
    first_page_ptr,
    full_ptr,
    order_ptr,
    placed_ptr,
    top_ptr,
    heads,
    num_slots,
    share,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many of the ``share`` best pairs of a scope each head has."""
    scope_row = tl.program_id(0).to(tl.int64)
    if tl.load(full_ptr + scope_row) != 0:
        order_ptr += scope_row * num_slots
        placed_ptr += scope_row * num_slots
        end = tl.load(first_page_ptr + scope_row * (heads + 1) + heads) * PAGE
        lowest = tl.full([], INT32_MAX, tl.int32)
        oldest = tl.full([], INT32_MAX, tl.int32)
        need = tl.zeros([], tl.int32)
        if share > 0:
            lowest, need = _nth_largest(order_ptr, placed_ptr, 0, end, lowest, share, False, BLOCK)
            oldest, need = _nth_largest(order_ptr, placed_ptr, 0, end, lowest, need, True, BLOCK)
        taken = tl.zeros([], tl.int32)  # of equal score and position, by lower heads
        for head in range(heads):
            first, room = _bounds(first_page_ptr, scope_row, head, heads, PAGE)
            top = tl.zeros([], tl.int32)
            for start in range(0, room, BLOCK):
                slot = start + tl.arange(0, BLOCK)
                inside = slot < room
                order = tl.load(order_ptr + first * PAGE + slot, mask=inside, other=ABSENT)
                placed = tl.load(placed_ptr + first * PAGE + slot, mask=inside, other=-1)
                tie = (order == lowest) & (placed == oldest) & (taken < need)
                best = (order > lowest) | ((order == lowest) & (placed > oldest)) | tie
                top += tl.sum((best & inside).to(tl.int32), axis=0)
                taken += tl.sum(tie.to(tl.int32), axis=0)
            tl.store(top_ptr + scope_row * heads + head, top)


@triton.jit
def _cut_kernel(
    key_ptr,
    value_ptr,
    position_ptr,
    page_ptr,
    first_page_ptr,
    full_ptr,
    slope_ptr,
    offset_ptr,
    order_ptr,
    placed_ptr,
    count_ptr,
    move_ptr,
    num_moves_ptr,
    heads,
    num_slots,
    num_pages,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    scope_row = head // heads
    holes = tl.zeros([], tl.int32)
    if tl.load(full_ptr + scope_row) != 0:
        count = tl.load(count_ptr + head)
        first, room = _bounds(first_page_ptr, scope_row, head % heads, heads, PAGE)
        base = scope_row * num_slots
        order_ptr += base + first * PAGE
        placed_ptr += base + first * PAGE
        source_ptr = move_ptr + 2 * base + first * PAGE
        target_ptr = source_ptr + num_slots
        page_ptr += scope_row * num_pages
        if count > 0:
            lowest = tl.full([], INT32_MAX, tl.int32)
            lowest, need = _nth_largest(order_ptr, placed_ptr, 0, room, lowest, count, False, BLOCK)
            oldest, need = _nth_largest(order_ptr, placed_ptr, 0, room, lowest, need, True, BLOCK)
            movers = tl.zeros([], tl.int32)
            for start in range(0, room, BLOCK):
                slot = start + tl.arange(0, BLOCK)
                inside = slot < room
                order = tl.load(order_ptr + slot, mask=inside, other=ABSENT)
                placed = tl.load(placed_ptr + slot, mask=inside, other=-1)
                keep = (order > lowest) | ((order == lowest) & (placed >= oldest))
                keep = keep & inside
                hole = ((slot < count) & (keep == 0)).to(tl.int32)
                mover = (keep & (slot >= count)).to(tl.int32)
                tl.store(target_ptr + holes + tl.cumsum(hole, axis=0) - 1, slot, mask=hole != 0)
                tl.store(source_ptr + movers + tl.cumsum(mover, axis=0) - 1, slot, mask=mover != 0)
                holes += tl.sum(hole, axis=0)
                movers += tl.sum(mover, axis=0)
            # The lists are read by other threads than wrote them.
            tl.debug_barrier()
            for start in range(0, holes, BLOCK_R):
                source, target, mask = _load_moves(
                    source_ptr, target_ptr, page_ptr, base, first, start, holes, PAGE, BLOCK_R
                )
                _move_rows(key_ptr, source, target, mask, HEAD_DIM, BLOCK_D)
                _move_rows(value_ptr, source, target, mask, HEAD_DIM, BLOCK_D)
                tl.store(
                    position_ptr + target, tl.load(position_ptr + source, mask=mask), mask=mask
                )
                if slope_ptr is not None:
                    slope = tl.load(slope_ptr + source, mask=mask)
                    tl.store(slope_ptr + target, slope, mask=mask)
                    offset = tl.load(offset_ptr + source, mask=mask)
                    tl.store(offset_ptr + target, offset, mask=mask)
    tl.store(num_moves_ptr + head, holes)


@triton.jit
def _move_page_field_kernel(
    field_ptr,
    page_ptr,
    first_page_ptr,
    move_ptr,
    num_moves_ptr,
    heads,
    num_slots,
    num_pages,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Repeat the moves of `_cut_kernel` on one more tensor, ``WIDTH`` numbers per slot."""
    head = tl.program_id(0).to(tl.int64)
    scope_row = head // heads
    first = _bounds(first_page_ptr, scope_row, head % heads, heads, PAGE)[0]
    base = scope_row * num_slots
    source_ptr = move_ptr + 2 * base + first * PAGE
    page_ptr += scope_row * num_pages
    moves = tl.load(num_moves_ptr + head)
    for start in range(0, moves, BLOCK_R):
        source, target, mask = _load_moves(
            source_ptr, source_ptr + num_slots, page_ptr, base, first, start, moves, PAGE, BLOCK_R
        )
        _move_rows(field_ptr, source, target, mask, WIDTH, BLOCK_W)


@triton.jit
def _bounds(first_page_ptr, scope_row, head, heads, PAGE: tl.constexpr):
    """Where a head's pages begin in the table of its row, and how many slots they have."""
    first_page_ptr += scope_row * (heads + 1) + head
    first = tl.load(first_page_ptr)
    return first, (tl.load(first_page_ptr + 1) - first) * PAGE


@triton.jit
def _nth_largest(
    order_ptr, placed_ptr, begin, end, order, n, TIES: tl.constexpr, BLOCK: tl.constexpr
):
    """Find the ``n``-th largest order, or position of those of one ``order``, from the top digit.

    Returns it, and how many of the ``n`` largest are equal to it.
    """
    found = tl.zeros([], tl.int32)
    known = tl.zeros([], tl.int32)  # the bits of `found` that are final
    digits = tl.arange(0, 256)
    for step in range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], tl.int32)
        for start in range(begin, end, BLOCK):
            index = start + tl.arange(0, BLOCK)
            match = index < end
            number = tl.load(order_ptr + index, mask=match, other=ABSENT)
            if TIES:
                match = match & (number == order)
                number = tl.load(placed_ptr + index, mask=match, other=0)
            else:
                number = number ^ INT32_MIN  # the same order as unsigned bits
            match = match & (((number ^ found) & known) == 0)
            counts += tl.histogram((number >> shift) & 255, 256, mask=match)
        above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)  # with a larger digit
        digit = tl.sum((above + counts >= n).to(tl.int32), axis=0) - 1
        n -= tl.sum(tl.where(digits == digit, above, 0), axis=0)
        found = found | (digit << shift)
        known = known | (tl.full([], 255, tl.int32) << shift)
    if not TIES:
        found = found ^ INT32_MIN
    return found, n


@triton.jit
def _load_moves(
    source_ptr, target_ptr, page_ptr, base, first, start, moves, PAGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Some slots to read and to write, as rows of the tensors."""
    index = start + tl.arange(0, BLOCK_R)
    mask = index < moves
    source = tl.load(source_ptr + index, mask=mask, other=0)
    target = tl.load(target_ptr + index, mask=mask, other=0)
    source = paged_slot(page_ptr, base, first, source, mask, PAGE)
    return source, paged_slot(page_ptr, base, first, target, mask, PAGE), mask


@triton.jit
def _move_rows(ptr, source, target, mask, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """Copy rows of ``WIDTH`` numbers."""
    for start in tl.static_range(0, WIDTH, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)[None, :]
        inside = mask[:, None] & (column < WIDTH)
        rows = tl.load(ptr + source[:, None] * WIDTH + column, mask=inside)  # [BLOCK_R, BLOCK_W]
        tl.store(ptr + target[:, None] * WIDTH + column, rows, mask=inside)
