"""Eviction for heads that share a budget: score, find the scope's best pairs, cut each head.

Nothing is done for a scope that is not full. Its candidates are its slots, in the order of its page
table, and behind them the new tokens of a call, head by head. First their scores are written as
int32 that order as the floats do, and the positions beside them. A program per scope and row then
finds the lowest score among the best digit by digit, each digit one histogram over the candidates,
and of equal scores the oldest position the same way. Every head counts its own among the best. Then
it is cut to its number: kept slots of the tail fill the holes before it, and kept new tokens get
the slots behind. Pages are dealt out afterwards, and new pairs are copied last.
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
    candidates,
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
            index = scope_row * candidates + first * PAGE + slot
            nans += _store_order(
                order_ptr, placed_ptr, index, score, position, real, inside, t, sinks, recent
            )
        _flag_nan(nan_seen_ptr, nans, scope_row // batch * heads + head % heads)


@triton.jit
def _sure_kernel(
    first_page_ptr,
    full_ptr,
    order_ptr,
    placed_ptr,
    passing_ptr,
    sure_ptr,
    heads,
    num_slots,
    candidates,
    first_new,
    new_heads,
    new,
    min_per_head,
    threshold,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best of each head are sure to stay. The others pass from ``threshold`` on, an order."""
    head = tl.program_id(0).to(tl.int64)
    scope_row = head // heads
    if tl.load(full_ptr + scope_row) != 0:
        order_ptr += scope_row * candidates
        placed_ptr += scope_row * candidates
        passing_ptr += scope_row * candidates
        begin, room, begin_new, total = _span(
            first_page_ptr, scope_row, head % heads, heads, num_slots, first_new, new_heads, new,
            PAGE,
        )  # fmt: skip
        lowest, oldest, _ = _border(
            order_ptr, placed_ptr, begin, room, begin_new, total,
            tl.minimum(min_per_head, total), BLOCK,
        )  # fmt: skip
        count = tl.zeros([], tl.int32)
        for start in range(0, total, BLOCK):
            index = start + tl.arange(0, BLOCK)
            inside = index < total
            index = _candidate(index, begin, room, begin_new)
            order = tl.load(order_ptr + index, mask=inside, other=ABSENT)
            placed = tl.load(placed_ptr + index, mask=inside, other=-1)
            sure = _is_kept(order, placed, lowest, oldest)
            passes = (sure == 0) & (order >= threshold)
            tl.store(passing_ptr + index, tl.where(passes, order, ABSENT), mask=inside)
            count += tl.sum(sure.to(tl.int32), axis=0)
        tl.store(sure_ptr + head, count)


@triton.jit
def _share_kernel(
    full_ptr,
    order_ptr,
    placed_ptr,
    share_ptr,
    border_ptr,
    candidates,
    BLOCK: tl.constexpr,
):
    """The lowest of a scope's best: its order, its position, and how many equal ones are best."""
    scope_row = tl.program_id(0).to(tl.int64)
    if tl.load(full_ptr + scope_row) != 0:
        lowest, oldest, need = _border(
            order_ptr + scope_row * candidates, placed_ptr + scope_row * candidates,
            0, candidates, 0, candidates, tl.load(share_ptr + scope_row), BLOCK,
        )  # fmt: skip
        tl.store(border_ptr + scope_row * 3, lowest)
        tl.store(border_ptr + scope_row * 3 + 1, oldest)
        tl.store(border_ptr + scope_row * 3 + 2, need)


@triton.jit
def _count_kernel(
    first_page_ptr,
    full_ptr,
    order_ptr,
    placed_ptr,
    border_ptr,
    top_ptr,
    equal_ptr,
    heads,
    num_slots,
    candidates,
    first_new,
    new_heads,
    new,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many of a head's candidates are above the border, and how many are on it."""
    head = tl.program_id(0).to(tl.int64)
    scope_row = head // heads
    if tl.load(full_ptr + scope_row) != 0:
        order_ptr += scope_row * candidates
        placed_ptr += scope_row * candidates
        lowest = tl.load(border_ptr + scope_row * 3)
        oldest = tl.load(border_ptr + scope_row * 3 + 1)
        begin, room, begin_new, total = _span(
            first_page_ptr, scope_row, head % heads, heads, num_slots, first_new, new_heads, new,
            PAGE,
        )  # fmt: skip
        top = tl.zeros([], tl.int32)
        equal = tl.zeros([], tl.int32)
        for start in range(0, total, BLOCK):
            index = start + tl.arange(0, BLOCK)
            inside = index < total
            index = _candidate(index, begin, room, begin_new)
            order = tl.load(order_ptr + index, mask=inside, other=ABSENT)
            placed = tl.load(placed_ptr + index, mask=inside, other=-1)
            on_border = (order == lowest) & (placed == oldest) & (order != ABSENT)
            kept = _is_kept(order, placed, lowest, oldest)
            top += tl.sum((kept & (on_border == 0)).to(tl.int32), axis=0)
            equal += tl.sum(on_border.to(tl.int32), axis=0)
        tl.store(top_ptr + head, top)
        tl.store(equal_ptr + head, equal)


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
    target_ptr,
    heads,
    num_slots,
    num_pages,
    candidates,
    first_new,
    new_heads,
    new,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Cut a head to its number. ``target`` says which of its slots each new token gets, or -1."""
    head = tl.program_id(0).to(tl.int64)
    scope_row = head // heads
    holes = tl.zeros([], tl.int32)
    if tl.load(full_ptr + scope_row) != 0:
        begin, room, begin_new, total = _span(
            first_page_ptr, scope_row, head % heads, heads, num_slots, first_new, new_heads, new,
            PAGE,
        )  # fmt: skip
        base = scope_row * num_slots
        order_ptr += scope_row * candidates
        placed_ptr += scope_row * candidates
        source_ptr = move_ptr + 2 * base + begin
        hole_ptr = source_ptr + num_slots
        page_ptr += scope_row * num_pages
        lowest, oldest, _ = _border(
            order_ptr, placed_ptr, begin, room, begin_new, total, tl.load(count_ptr + head), BLOCK
        )
        stay = tl.zeros([], tl.int32)  # slots that are kept; new tokens follow them
        for start in range(0, room, BLOCK):
            kept = _load_kept(order_ptr, placed_ptr, begin, start, room, lowest, oldest, BLOCK)
            stay += tl.sum(kept.to(tl.int32), axis=0)
        movers = tl.zeros([], tl.int32)
        for start in range(0, room, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            kept = _load_kept(order_ptr, placed_ptr, begin, start, room, lowest, oldest, BLOCK)
            hole = ((slot < stay) & (kept == 0)).to(tl.int32)
            mover = (kept & (slot >= stay)).to(tl.int32)
            tl.store(hole_ptr + holes + tl.cumsum(hole, axis=0) - 1, slot, mask=hole != 0)
            tl.store(source_ptr + movers + tl.cumsum(mover, axis=0) - 1, slot, mask=mover != 0)
            holes += tl.sum(hole, axis=0)
            movers += tl.sum(mover, axis=0)
        # The lists are read by other threads than wrote them.
        tl.debug_barrier()
        first = begin // PAGE
        for start in range(0, holes, BLOCK_R):
            source, target, mask = _load_moves(
                source_ptr, hole_ptr, page_ptr, base, first, start, holes, PAGE, BLOCK_R
            )
            _move_rows(key_ptr, source, target, mask, HEAD_DIM, BLOCK_D)
            _move_rows(value_ptr, source, target, mask, HEAD_DIM, BLOCK_D)
            tl.store(position_ptr + target, tl.load(position_ptr + source, mask=mask), mask=mask)
            if slope_ptr is not None:
                slope = tl.load(slope_ptr + source, mask=mask)
                tl.store(slope_ptr + target, slope, mask=mask)
                offset = tl.load(offset_ptr + source, mask=mask)
                tl.store(offset_ptr + target, offset, mask=mask)
        if target_ptr is not None:
            target_ptr += scope_row * new_heads * new + (begin_new - num_slots)
            for start in range(0, total - room, BLOCK):
                token = start + tl.arange(0, BLOCK)
                kept = _load_kept(
                    order_ptr, placed_ptr, begin_new, start, total - room, lowest, oldest, BLOCK
                )
                rank = stay + tl.cumsum(kept.to(tl.int32), axis=0) - 1
                tl.store(target_ptr + token, tl.where(kept, rank, -1), mask=token < total - room)
                stay += tl.sum(kept.to(tl.int32), axis=0)
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
def _span(
    first_page_ptr, scope_row, head, heads, num_slots, first_new, new_heads, new,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Where a head's candidates lie: ``room`` slots from ``begin``, new tokens behind them.

    Returns ``begin``, ``room``, where its new tokens begin, and the number of both together.
    """
    first, room = _bounds(first_page_ptr, scope_row, head, heads, PAGE)
    ordinal = (head - first_new).to(tl.int32)
    has_new = (ordinal >= 0) & (ordinal < new_heads)
    begin_new = num_slots + tl.where(has_new, ordinal, 0) * new
    return first * PAGE, room, begin_new, room + tl.where(has_new, new, 0)


@triton.jit
def _candidate(index, begin, room, begin_new):
    """Where candidates lie among those of the scope, by their index in the head."""
    return tl.where(index < room, begin + index, begin_new + index - room)


@triton.jit
def _is_kept(order, placed, lowest, oldest):
    """Whether candidates are at least the border; what is no pair is not."""
    kept = (order > lowest) | ((order == lowest) & (placed >= oldest))
    return kept & (order != ABSENT)


@triton.jit
def _load_kept(order_ptr, placed_ptr, begin, start, length, lowest, oldest, BLOCK: tl.constexpr):
    """Which of a block of candidates are at least the border."""
    index = start + tl.arange(0, BLOCK)
    order = tl.load(order_ptr + begin + index, mask=index < length, other=ABSENT)
    placed = tl.load(placed_ptr + begin + index, mask=index < length, other=-1)
    return _is_kept(order, placed, lowest, oldest)


@triton.jit
def _store_order(order_ptr, placed_ptr, index, score, position, real, inside, t, sinks, recent):
    """Write the order of scores, and positions; returns how many scores were NaN."""
    is_nan = (score != score) & real
    score = protect(score, is_nan, position, t, sinks, recent)
    tl.store(order_ptr + index, tl.where(real, score_order(score), ABSENT), mask=inside)
    tl.store(placed_ptr + index, position, mask=inside)
    return tl.sum(is_nan.to(tl.int32), axis=0)


@triton.jit
def _flag_nan(nan_seen_ptr, nans, head):
    if nan_seen_ptr is not None:  # noqa: SIM102 (one branch is compiled, the other runs)
        if nans > 0:
            tl.store(nan_seen_ptr + head, 1)


@triton.jit
def _border(order_ptr, placed_ptr, begin, room, begin_new, total, n, BLOCK: tl.constexpr):
    """Order and position of the ``n``-th best candidate, and how many like it are needed."""
    lowest = tl.full([], INT32_MAX, tl.int32)
    oldest = tl.full([], INT32_MAX, tl.int32)
    need = tl.zeros([], tl.int32)
    if n > 0:
        lowest, need = _nth_largest(
            order_ptr, placed_ptr, begin, room, begin_new, total, lowest, n, False, BLOCK
        )
        oldest, need = _nth_largest(
            order_ptr, placed_ptr, begin, room, begin_new, total, lowest, need, True, BLOCK
        )
    return lowest, oldest, need


@triton.jit
def _nth_largest(
    order_ptr, placed_ptr, begin, room, begin_new, total, order, n, TIES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Find the ``n``-th largest order, or position of those of one ``order``, from the top digit.

    Returns it, and how many of the ``n`` largest are equal to it.
    """
    found = tl.zeros([], tl.int32)
    known = tl.zeros([], tl.int32)  # the bits of `found` that are final
    digits = tl.arange(0, 256)
    for step in range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], tl.int32)
        for start in range(0, total, BLOCK):
            index = start + tl.arange(0, BLOCK)
            match = index < total
            index = _candidate(index, begin, room, begin_new)
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
