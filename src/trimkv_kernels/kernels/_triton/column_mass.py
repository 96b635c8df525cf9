"""How much of a call's attention each slot and each new token receives, without a square matrix.

A program owns a tile of columns and walks over the queries that see it, one head of the group after
the other. With their log-sum-exp at hand a probability is one product and one exponential, and a
column's sum stays in registers: no atomics, the same bits every time.
"""

import triton
import triton.language as tl

from trimkv_kernels.kernels._triton.decode_attention import dot
from trimkv_kernels.kernels._triton.slots import slot_offset

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["first_query"])
def _column_mass_kernel(
    query_ptr,
    new_key_ptr,
    key_ptr,
    lse_ptr,
    num_valid_ptr,
    valid_ptr,
    output_ptr,
    scale_log2,
    num_kv_heads,
    num_slots,
    q_len,
    first_query,
    stride_query_b,
    stride_query_h,
    stride_query_s,
    stride_new_key_b,
    stride_new_key_h,
    stride_new_key_s,
    stride_key_b,
    stride_key_h,
    stride_key_s,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    slot_tiles = tl.cdiv(num_slots, BLOCK_S)
    tiles = slot_tiles + tl.cdiv(q_len, BLOCK_S)
    tile = tl.program_id(0) % tiles  # slots, which every query sees, start first
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = head // num_kv_heads
    kv_head = head % num_kv_heads
    output_ptr += head * (num_slots + q_len)
    query_ptr += row * stride_query_b + kv_head * GROUP * stride_query_h
    lse_ptr += head * GROUP * q_len
    valid_row_ptr = None if valid_ptr is None else valid_ptr + row * q_len
    if tile < slot_tiles:
        column = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        count = num_slots if num_valid_ptr is None else tl.load(num_valid_ptr + head)
        first = row * stride_key_b + kv_head * stride_key_h
        # A tile without a valid slot has no queries to walk over.
        begin = tl.where(tile * BLOCK_S < count, first_query, q_len)
        mass = _sum_columns(
            query_ptr, key_ptr, lse_ptr, valid_row_ptr, first, stride_key_s,
            stride_query_h, stride_query_s, column, column < count, begin, q_len,
            scale_log2, False, GROUP, HEAD_DIM, REDUCE, BLOCK_M, BLOCK_D, UPCAST,
        )  # fmt: skip
        tl.store(output_ptr + column, mass, mask=column < num_slots)
    else:
        start = (tile - slot_tiles) * BLOCK_S
        column = start + tl.arange(0, BLOCK_S)
        first = row * stride_new_key_b + kv_head * stride_new_key_h
        real = column < q_len
        if valid_row_ptr is not None:
            real = real & (tl.load(valid_row_ptr + column, mask=real, other=0) != 0)
        begin = tl.maximum(start // BLOCK_M * BLOCK_M, first_query)
        mass = _sum_columns(
            query_ptr, new_key_ptr, lse_ptr, valid_row_ptr, first, stride_new_key_s,
            stride_query_h, stride_query_s, column, real, begin, q_len,
            scale_log2, True, GROUP, HEAD_DIM, REDUCE, BLOCK_M, BLOCK_D, UPCAST,
        )  # fmt: skip
        tl.store(output_ptr + num_slots + column, mass, mask=column < q_len)


@triton.jit
def _sum_columns(
    query_ptr, key_ptr, lse_ptr, valid_ptr, first_key, stride_key_s,
    stride_query_h, stride_query_s, column, real, begin, q_len, scale_log2,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, REDUCE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sum what the queries from ``begin`` on give each column, and reduce over the group.

    ``CAUSAL``: the columns are tokens of the call, seen by themselves and by later ones.
    """
    dim = tl.arange(0, BLOCK_D)
    place = slot_offset(first_key, column, stride_key_s)[:, None] + dim[None, :]
    mask = real[:, None] & (dim < HEAD_DIM)[None, :]
    key = tl.load(key_ptr + place, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_D]
    mass = tl.zeros([column.shape[0]], tl.float32)
    for member in range(GROUP):
        total = tl.zeros([column.shape[0]], tl.float32)
        for start in range(begin, q_len, BLOCK_M):
            token = start + tl.arange(0, BLOCK_M)
            inside = token < q_len
            row = member * stride_query_h + token.to(tl.int64) * stride_query_s
            query = tl.load(
                query_ptr + row[None, :] + dim[:, None],
                mask=inside[None, :] & (dim < HEAD_DIM)[:, None], other=0.0,
            )  # fmt: skip
            lse = tl.load(lse_ptr + member * q_len + token, mask=inside, other=0.0) * LOG2_E
            if valid_ptr is not None:
                inside = inside & (tl.load(valid_ptr + token, mask=inside, other=0) != 0)
            score = dot(key, query, UPCAST) * scale_log2  # [BLOCK_S, BLOCK_M]
            seen = inside[None, :] & real[:, None]
            if CAUSAL:
                seen = seen & (column[:, None] <= token[None, :])
            total += tl.sum(tl.where(seen, tl.exp2(score - lse[None, :]), 0.0), axis=1)
        if REDUCE == "max":
            mass = tl.maximum(mass, total, propagate_nan=tl.PropagateNan.ALL)
        else:
            mass += total
    if REDUCE == "mean":
        mass = mass / GROUP
    return mass
