"""How much of a call's attention each slot and each new token receives, without a square matrix.

A program owns a tile of columns and loops over the queries that see it, one head of the group after
the other. With the known log-sum-exp, a probability takes one product and one exponential. A
column's sum stays in registers, so there are no atomics, and the bits are the same every time.

If queries are counted, each tile of queries is first reduced over the group. Heads that are not
reduced have programs of their own, each with a group of one.
"""

import triton
import triton.language as tl

from trimkv_kernels.kernels._triton.primitives import LOG2_E, dot
from trimkv_kernels.kernels._triton.slots import slot_offset, view_base


@triton.jit(do_not_specialize=["query_begin"])
def _column_mass_kernel(
    query_ptr,
    new_key_ptr,
    key_ptr,
    lse_ptr,
    num_valid_ptr,
    valid_ptr,
    number_ptr,
    output_ptr,
    scale_log2,
    num_kv_heads,
    num_slots,
    q_len,
    query_begin,
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
    SHARED_BY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    REDUCE: tl.constexpr,
    COUNT_BELOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    slot_tiles = tl.cdiv(num_slots, BLOCK_S)
    tiles = slot_tiles + tl.cdiv(q_len, BLOCK_S)
    tile = tl.program_id(0) % tiles  # slots, which every query sees, start first
    head = (tl.program_id(0) // tiles).to(tl.int64)
    row = head // (num_kv_heads * SHARED_BY)
    row_head = head % (num_kv_heads * SHARED_BY)
    kv_head = row_head // SHARED_BY
    output_ptr += head * (num_slots + q_len)
    query_ptr += row * stride_query_b + row_head * GROUP * stride_query_h
    lse_ptr += head * GROUP * q_len
    valid_row_ptr = None if valid_ptr is None else valid_ptr + row * q_len
    number_row_ptr = None if number_ptr is None else number_ptr + row * q_len
    count = num_slots
    if num_valid_ptr is not None:
        count = tl.load(num_valid_ptr + row * num_kv_heads + kv_head)
    if tile < slot_tiles:
        column = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        base = view_base(row, kv_head, stride_key_b, stride_key_h)
        # A tile without a valid slot loops over no queries.
        begin = tl.where(tile * BLOCK_S < count, query_begin, q_len)
        mass = _reduce_columns(
            query_ptr, key_ptr, lse_ptr, valid_row_ptr, number_row_ptr, base, stride_key_s,
            stride_query_h, stride_query_s, column, column < count, begin, q_len, count,
            scale_log2, False, GROUP, HEAD_DIM, REDUCE, COUNT_BELOW, BLOCK_M, BLOCK_D, UPCAST,
        )  # fmt: skip
        tl.store(output_ptr + column, mass, mask=column < num_slots)
    else:
        start = (tile - slot_tiles) * BLOCK_S
        column = start + tl.arange(0, BLOCK_S)
        base = view_base(row, kv_head, stride_new_key_b, stride_new_key_h)
        real = column < q_len
        if valid_row_ptr is not None:
            real = real & (tl.load(valid_row_ptr + column, mask=real, other=0) != 0)
        begin = tl.maximum(start // BLOCK_M * BLOCK_M, query_begin)
        mass = _reduce_columns(
            query_ptr, new_key_ptr, lse_ptr, valid_row_ptr, number_row_ptr, base, stride_new_key_s,
            stride_query_h, stride_query_s, column, real, begin, q_len, count,
            scale_log2, True, GROUP, HEAD_DIM, REDUCE, COUNT_BELOW, BLOCK_M, BLOCK_D, UPCAST,
        )  # fmt: skip
        tl.store(output_ptr + num_slots + column, mass, mask=column < q_len)


@triton.jit
def _reduce_columns(
    query_ptr, key_ptr, lse_ptr, valid_ptr, number_ptr, key_base, stride_key_s,
    stride_query_h, stride_query_s, column, real, begin, q_len, num_held, scale_log2,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, REDUCE: tl.constexpr,
    COUNT_BELOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Sum what the queries from ``begin`` on give each column, or count those below ``1 / n``.

    ``CAUSAL``: the columns are tokens of the call, seen by themselves and by later ones.
    """
    dim = tl.arange(0, BLOCK_D)
    address = slot_offset(key_base, column, stride_key_s)[:, None] + dim[None, :]
    mask = real[:, None] & (dim < HEAD_DIM)[None, :]
    key = tl.load(key_ptr + address, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_D]
    mass = tl.zeros([column.shape[0]], tl.float32)
    if COUNT_BELOW:
        for start in range(begin, q_len, BLOCK_M):
            token = start + tl.arange(0, BLOCK_M)
            share = tl.zeros([column.shape[0], BLOCK_M], tl.float32)
            for member in range(GROUP):
                own = _shares(
                    query_ptr, key, lse_ptr, stride_query_h, stride_query_s, member, token, q_len,
                    scale_log2, HEAD_DIM, BLOCK_D, UPCAST,
                )  # fmt: skip
                if REDUCE == "max":
                    share = tl.maximum(share, own, propagate_nan=tl.PropagateNan.ALL)
                else:
                    share += own
            if REDUCE == "mean":
                share = share / GROUP
            even = _even_share(number_ptr, num_held, token, q_len)
            seen = _seen(valid_ptr, column, real, token, q_len, CAUSAL)
            mass += tl.sum((seen & (share < even[None, :])).to(tl.float32), axis=1)
    else:
        for member in range(GROUP):
            total = tl.zeros([column.shape[0]], tl.float32)
            for start in range(begin, q_len, BLOCK_M):
                token = start + tl.arange(0, BLOCK_M)
                share = _shares(
                    query_ptr, key, lse_ptr, stride_query_h, stride_query_s, member, token, q_len,
                    scale_log2, HEAD_DIM, BLOCK_D, UPCAST,
                )  # fmt: skip
                seen = _seen(valid_ptr, column, real, token, q_len, CAUSAL)
                total += tl.sum(tl.where(seen, share, 0.0), axis=1)
            if REDUCE == "max":
                mass = tl.maximum(mass, total, propagate_nan=tl.PropagateNan.ALL)
            else:
                mass += total
        if REDUCE == "mean":
            mass = mass / GROUP
    return mass


@triton.jit
def _shares(
    query_ptr, key, lse_ptr, stride_query_h, stride_query_s, member, token, q_len, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What one head's queries give to columns that they see: ``[BLOCK_S, BLOCK_M]``."""
    dim = tl.arange(0, BLOCK_D)
    inside = token < q_len
    row = member * stride_query_h + token.to(tl.int64) * stride_query_s
    query = tl.load(
        query_ptr + row[None, :] + dim[:, None],
        mask=inside[None, :] & (dim < HEAD_DIM)[:, None], other=0.0,
    )  # fmt: skip
    lse = tl.load(lse_ptr + member * q_len + token, mask=inside, other=0.0) * LOG2_E
    score = dot(key, query, UPCAST) * scale_log2
    return tl.exp2(score - lse[None, :])


@triton.jit
def _seen(valid_ptr, column, real, token, q_len, CAUSAL: tl.constexpr):
    """Which columns a tile of real queries sees: ``[BLOCK_S, BLOCK_M]``."""
    inside = token < q_len
    if valid_ptr is not None:
        inside = inside & (tl.load(valid_ptr + token, mask=inside, other=0) != 0)
    seen = inside[None, :] & real[:, None]
    if CAUSAL:
        seen = seen & (column[:, None] <= token[None, :])
    return seen


@triton.jit
def _even_share(number_ptr, num_held, token, q_len):
    """``1 / n`` for queries that see ``n`` tokens: valid slots, and the call's up to themselves.

    0 if a query sees one token. That token gets probability 1, and rounding must not make it count
    as below.
    """
    number = token + 1
    if number_ptr is not None:
        number = tl.load(number_ptr + token, mask=token < q_len, other=0)
    seen = num_held + number
    return tl.where(seen > 1, 1.0 / tl.maximum(seen, 1), 0.0)
