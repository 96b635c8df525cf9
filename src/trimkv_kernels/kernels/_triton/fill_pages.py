"""New tokens of heads that share a budget: their scores as candidates, and storing those that stay.

What stays is found by the kernels of an eviction.
"""

import triton
import triton.language as tl

from trimkv_kernels.kernels._triton.evict import _load_score
from trimkv_kernels.kernels._triton.shared_evict import _flag_nan, _store_order
from trimkv_kernels.kernels._triton.slots import paged_slot


@triton.jit
def _score_new_kernel(
    new_position_ptr,
    valid_ptr,
    full_ptr,
    t_ptr,
    new_slope_ptr,
    new_offset_ptr,
    new_scores_ptr,
    nan_seen_ptr,
    order_ptr,
    placed_ptr,
    first_new,
    new_heads,
    new,
    num_slots,
    candidates,
    sinks,
    recent,
    BLOCK: tl.constexpr,
):
    """Write the orders of new tokens behind those of the slots, for some heads of one scope."""
    head = tl.program_id(0).to(tl.int64)  # over rows and the heads that have new tokens
    row = head // new_heads
    if tl.load(full_ptr + row) != 0:
        t = tl.load(t_ptr + row)
        nans = tl.zeros([], tl.int32)
        for start in range(0, new, BLOCK):
            token = start + tl.arange(0, BLOCK)
            inside = token < new
            real = inside
            if valid_ptr is not None:
                real = tl.load(valid_ptr + row * new + token, mask=inside, other=0) != 0
            position = tl.load(new_position_ptr + row * new + token, mask=real, other=-1)
            age = (t - position).to(tl.float32)
            address = head * new + token
            score = _load_score(new_slope_ptr, new_offset_ptr, new_scores_ptr, address, real, age)
            index = row * candidates + num_slots + head % new_heads * new + token
            nans += _store_order(
                order_ptr, placed_ptr, index, score, position, real, inside, t, sinks, recent
            )
        _flag_nan(nan_seen_ptr, nans, first_new + head % new_heads)


@triton.jit
def _place_kernel(
    new_key_ptr,
    new_value_ptr,
    new_position_ptr,
    new_slope_ptr,
    new_offset_ptr,
    key_ptr,
    value_ptr,
    position_ptr,
    slope_ptr,
    offset_ptr,
    page_ptr,
    first_page_ptr,
    target_ptr,
    first_head,
    num_kv_heads,
    new,
    blocks,
    heads,
    num_slots,
    num_pages,
    stride_target_b,
    stride_key_b,
    stride_key_h,
    stride_key_s,
    stride_value_b,
    stride_value_h,
    stride_value_s,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Copy the new pairs of one layer to the slots that they got."""
    head = (tl.program_id(0) // blocks).to(tl.int64)  # over rows and the layer's heads
    row = head // num_kv_heads
    kv_head = head % num_kv_heads
    token, mask, address = _targets(
        target_ptr + row * stride_target_b + kv_head * new, page_ptr + row * num_pages,
        first_page_ptr + row * (heads + 1) + first_head + kv_head, row * num_slots,
        tl.program_id(0) % blocks * BLOCK_R, new, PAGE, BLOCK_R,
    )  # fmt: skip
    if tl.sum(mask.to(tl.int32), axis=0) > 0:
        dim = tl.arange(0, BLOCK_D)[None, :]
        inside = mask[:, None] & (dim < HEAD_DIM)
        write = address[:, None] * HEAD_DIM + dim
        rows = token.to(tl.int64)[:, None]
        read = row * stride_key_b + kv_head * stride_key_h + rows * stride_key_s + dim
        tl.store(key_ptr + write, tl.load(new_key_ptr + read, mask=inside), mask=inside)
        read = row * stride_value_b + kv_head * stride_value_h + rows * stride_value_s + dim
        tl.store(value_ptr + write, tl.load(new_value_ptr + read, mask=inside), mask=inside)
        position = tl.load(new_position_ptr + row * new + token, mask=mask)
        tl.store(position_ptr + address, position, mask=mask)
        if slope_ptr is not None:
            read = head * new + token
            tl.store(slope_ptr + address, tl.load(new_slope_ptr + read, mask=mask), mask=mask)
            tl.store(offset_ptr + address, tl.load(new_offset_ptr + read, mask=mask), mask=mask)


@triton.jit
def _place_field_kernel(
    new_field_ptr,
    field_ptr,
    page_ptr,
    first_page_ptr,
    target_ptr,
    first_head,
    num_kv_heads,
    new,
    blocks,
    heads,
    num_slots,
    num_pages,
    stride_target_b,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Copy one more tensor of new tokens, ``WIDTH`` numbers each."""
    head = (tl.program_id(0) // blocks).to(tl.int64)
    row = head // num_kv_heads
    kv_head = head % num_kv_heads
    token, mask, address = _targets(
        target_ptr + row * stride_target_b + kv_head * new, page_ptr + row * num_pages,
        first_page_ptr + row * (heads + 1) + first_head + kv_head, row * num_slots,
        tl.program_id(0) % blocks * BLOCK_R, new, PAGE, BLOCK_R,
    )  # fmt: skip
    for start in tl.static_range(0, WIDTH, BLOCK_W):
        column = start + tl.arange(0, BLOCK_W)[None, :]
        inside = mask[:, None] & (column < WIDTH)
        read = (head * new + token)[:, None] * WIDTH + column
        numbers = tl.load(new_field_ptr + read, mask=inside)
        tl.store(field_ptr + address[:, None] * WIDTH + column, numbers, mask=inside)


@triton.jit
def _targets(
    target_ptr, page_ptr, first_page_ptr, base, start, new, PAGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Some new tokens, which of them stay, and where their slots lie."""
    token = start + tl.arange(0, BLOCK_R)
    slot = tl.load(target_ptr + token, mask=token < new, other=-1)
    mask = slot >= 0
    return token, mask, paged_slot(page_ptr, base, tl.load(first_page_ptr), slot, mask, PAGE)
