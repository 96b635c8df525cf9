"""A call of many tokens against the valid slots and, causally, against itself.

The query heads of a group are rows of the same tile, token by token. So the group shares key and
value tiles, and a short call still fills its tiles. Tiles that every row sees completely need no
mask: all tiles of slots except the last, and the call's tokens up to the diagonal.

A short call has few tiles of queries. Then the slots are split over several programs, the last of
which takes the call's tokens too, and the program that arrives last merges the parts.
"""

import triton
import triton.language as tl

from trimkv_kernels.kernels._triton.decode_attention import merge_parts, store_part
from trimkv_kernels.kernels._triton.primitives import LN_2, LOWEST, dot, softmax_update
from trimkv_kernels.kernels._triton.slots import slot_offset, view_base


@triton.jit
def _extend_attention_kernel(
    query_ptr,
    new_key_ptr,
    new_value_ptr,
    key_ptr,
    value_ptr,
    num_valid_ptr,
    valid_ptr,
    arrival_ptr,
    part_ptr,
    output_ptr,
    lse_ptr,
    scale_log2,
    num_kv_heads,
    num_slots,
    q_len,
    split_slots,
    stride_query_b,
    stride_query_h,
    stride_query_s,
    stride_new_key_b,
    stride_new_key_h,
    stride_new_key_s,
    stride_new_value_b,
    stride_new_value_h,
    stride_new_value_s,
    stride_key_b,
    stride_key_h,
    stride_key_s,
    stride_value_b,
    stride_value_h,
    stride_value_s,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tiles = tl.cdiv(q_len * GROUP, BLOCK_M)
    split = tl.program_id(0) % SPLITS
    unit = (tl.program_id(0) // SPLITS).to(tl.int64)  # a tile of one head
    # The longest tiles, at the end of the call, start first.
    tile = tiles - 1 - (unit % tiles).to(tl.int32)
    head = unit // tiles
    row = head // num_kv_heads
    kv_head = head % num_kv_heads
    count = num_slots if num_valid_ptr is None else tl.load(num_valid_ptr + head)

    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = packed // GROUP  # [BLOCK_M]
    query_head = kv_head * GROUP + packed % GROUP
    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = (token < q_len)[:, None] & (dim < HEAD_DIM)
    address = slot_offset(
        view_base(row, query_head, stride_query_b, stride_query_h), token, stride_query_s
    )
    query = tl.load(
        query_ptr + address[:, None] + dim, mask=inside, other=0.0
    )  # [BLOCK_M, BLOCK_D]

    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key_base = view_base(row, kv_head, stride_key_b, stride_key_h)
    value_base = view_base(row, kv_head, stride_value_b, stride_value_h)
    begin = split * split_slots
    end = tl.minimum(begin + split_slots, count)
    whole = begin + tl.maximum(end - begin, 0) // BLOCK_S * BLOCK_S
    peak, total, mixed = _attend_tiles(
        query, key_ptr, value_ptr, key_base, stride_key_s, value_base, stride_value_s,
        begin, whole, token, None, scale_log2, peak, total, mixed,
        True, False, HEAD_DIM, BLOCK_S, BLOCK_D, UPCAST,
    )  # fmt: skip
    peak, total, mixed = _attend_tiles(
        query, key_ptr, value_ptr, key_base, stride_key_s, value_base, stride_value_s,
        whole, end, token, None, scale_log2, peak, total, mixed,
        False, False, HEAD_DIM, BLOCK_S, BLOCK_D, UPCAST,
    )  # fmt: skip

    key_base = view_base(row, kv_head, stride_new_key_b, stride_new_key_h)
    value_base = view_base(row, kv_head, stride_new_value_b, stride_new_value_h)
    valid_row_ptr = None if valid_ptr is None else valid_ptr + row * q_len
    whole = (tile * BLOCK_M // GROUP) // BLOCK_S * BLOCK_S
    end = tl.minimum(((tile + 1) * BLOCK_M - 1) // GROUP + 1, q_len)
    if SPLITS > 1:
        takes_tokens = (split == SPLITS - 1).to(tl.int32)
        whole *= takes_tokens
        end *= takes_tokens
    peak, total, mixed = _attend_tiles(
        query, new_key_ptr, new_value_ptr,
        key_base, stride_new_key_s, value_base, stride_new_value_s,
        0, whole, token, valid_row_ptr, scale_log2, peak, total, mixed,
        True, valid_ptr is not None, HEAD_DIM, BLOCK_S, BLOCK_D, UPCAST,
    )  # fmt: skip
    peak, total, mixed = _attend_tiles(
        query, new_key_ptr, new_value_ptr,
        key_base, stride_new_key_s, value_base, stride_new_value_s,
        whole, end, token, valid_row_ptr, scale_log2, peak, total, mixed,
        False, True, HEAD_DIM, BLOCK_S, BLOCK_D, UPCAST,
    )  # fmt: skip

    first_row = (row * num_kv_heads + kv_head) * GROUP
    if SPLITS > 1:
        store_part(
            part_ptr, unit * SPLITS + split, tl.num_programs(0), peak, total, mixed,
            BLOCK_M, HEAD_DIM,
        )  # fmt: skip
        # The whole program's part is written before its arrival can be seen.
        tl.debug_barrier()
        if tl.atomic_add(arrival_ptr + unit, 1) == SPLITS - 1:
            merged_peak, merged_total, merged = merge_parts(
                part_ptr, unit * SPLITS, SPLITS, tl.num_programs(0),
                BLOCK_M, HEAD_DIM, BLOCK_M, BLOCK_D, PARTS, True,
            )  # fmt: skip
            _store_rows(
                output_ptr, lse_ptr, first_row, packed, q_len,
                merged_peak, merged_total, merged, GROUP, HEAD_DIM,
            )  # fmt: skip
    else:
        _store_rows(
            output_ptr, lse_ptr, first_row, packed, q_len, peak, total, mixed, GROUP, HEAD_DIM
        )


@triton.jit
def _store_rows(
    output_ptr, lse_ptr, first_row, packed, q_len, peak, total, mixed,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Write the output of a tile's rows, and their log-sum-exp. ``first_row``: a query head."""
    token = packed // GROUP
    dim = tl.arange(0, mixed.shape[1])[None, :]
    inside = (token < q_len)[:, None] & (dim < HEAD_DIM)
    total = tl.where(total == 0, 1.0, total)  # a row of padding, or beyond the call
    output = (mixed / total[:, None]).to(output_ptr.dtype.element_ty)
    address = (first_row + packed % GROUP) * q_len + token
    tl.store(output_ptr + address[:, None] * HEAD_DIM + dim, output, mask=inside)
    if lse_ptr is not None:
        lse = (peak + tl.log2(total)) * LN_2
        tl.store(lse_ptr + address, lse, mask=token < q_len)


@triton.jit
def _attend_tiles(
    query, key_ptr, value_ptr, key_base, stride_key_s, value_base, stride_value_s,
    begin, end, token, valid_ptr, scale_log2, peak, total, mixed,
    WHOLE: tl.constexpr, CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold rows ``[begin, end)`` into the running softmax ``(peak, total, mixed)``, base 2.

    ``WHOLE``: the range is a number of full tiles. ``CAUSAL``: the rows are tokens of the call,
    seen by themselves and, if they are valid, by later ones.
    """
    dim = tl.arange(0, BLOCK_D)[None, :]
    for start in range(begin, end, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        inside = slot < end
        key_address = slot_offset(key_base, slot, stride_key_s)[:, None] + dim
        value_address = slot_offset(value_base, slot, stride_value_s)[:, None] + dim
        if WHOLE and HEAD_DIM == BLOCK_D:
            key = tl.load(key_ptr + key_address)  # [BLOCK_S, BLOCK_D]
            value = tl.load(value_ptr + value_address)
        else:
            mask = inside[:, None] & (dim < HEAD_DIM)
            key = tl.load(key_ptr + key_address, mask=mask, other=0.0)
            value = tl.load(value_ptr + value_address, mask=mask, other=0.0)
        score = dot(query, tl.trans(key), UPCAST) * scale_log2  # [BLOCK_M, BLOCK_S]
        if CAUSAL:
            seen = slot[None, :] <= token[:, None]
            if valid_ptr is not None:
                real = tl.load(valid_ptr + slot, mask=inside, other=0) != 0
                # Padding sees itself, so that its softmax is not empty.
                seen = seen & (real[None, :] | (slot[None, :] == token[:, None]))
            score = tl.where(seen, score, -float("inf"))
        if not WHOLE:
            score = tl.where(inside[None, :], score, -float("inf"))
        peak, total, mixed = softmax_update(peak, total, mixed, score, value, UPCAST)
    return peak, total, mixed
