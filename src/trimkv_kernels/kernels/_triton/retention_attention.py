"""Retention-gated attention and its gradients, tile by tile.

The score of target ``t`` and source ``j`` is ``scale * q_t.k_j + log_beta_j * (t - j)``, in base 2.
The age ``t - j`` is the exact difference of two integers. As ``t * log_beta_j`` less
``j * log_beta_j``, the bias would lose its precision at long range. Every sum is taken by one
program in a fixed order, so there are no atomics, and two runs give the same bits.

Tiles in which every target sees every source are not masked. The other tiles are at the diagonal,
and where a document begins or ends.
"""

import triton
import triton.language as tl

from trimkv_kernels.kernels._triton.primitives import (
    LN_2,
    LOG2_E,
    LOWEST,
    dot,
    load_slopes,
    softmax_update,
)


@triton.jit
def _retention_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    log_beta_ptr,
    document_start_ptr,
    output_ptr,
    lse_ptr,
    scale_log2,
    num_heads,
    seq,
    stride_query_b,
    stride_query_h,
    stride_query_s,
    stride_key_b,
    stride_key_h,
    stride_key_s,
    stride_value_b,
    stride_value_h,
    stride_value_s,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head, row, kv_head, start = _locate_targets(num_heads, seq, GROUP, BLOCK_T)
    query_ptr += row * stride_query_b + head % num_heads * stride_query_h
    key_ptr += row * stride_key_b + kv_head * stride_key_h
    value_ptr += row * stride_value_b + kv_head * stride_value_h
    log_beta_ptr += (row * (num_heads // GROUP) + kv_head) * seq
    target = start + tl.arange(0, BLOCK_T)
    query = _load(query_ptr, start, stride_query_s, seq, HEAD_DIM, BLOCK_T, BLOCK_D)
    document_start, low, full, diagonal = _sources(
        document_start_ptr, row, target, start, seq, BLOCK_T, BLOCK_S
    )

    peak = tl.full([BLOCK_T], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    mixed = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for begin in range(full, diagonal, BLOCK_S):
        peak, total, mixed = _attend(
            query, key_ptr, value_ptr, log_beta_ptr, stride_key_s, stride_value_s,
            target, document_start, begin, seq, scale_log2, peak, total, mixed,
            False, HEAD_DIM, SCALED, BLOCK_S, BLOCK_D, UPCAST,
        )  # fmt: skip
    masked = (full - low) // BLOCK_S
    for tile in range(masked + tl.cdiv(tl.minimum(start + BLOCK_T, seq) - diagonal, BLOCK_S)):
        begin = tl.where(tile < masked, low, diagonal - masked * BLOCK_S) + tile * BLOCK_S
        peak, total, mixed = _attend(
            query, key_ptr, value_ptr, log_beta_ptr, stride_key_s, stride_value_s,
            target, document_start, begin, seq, scale_log2, peak, total, mixed,
            True, HEAD_DIM, SCALED, BLOCK_S, BLOCK_D, UPCAST,
        )  # fmt: skip

    is_pad = total == 0  # it attended to nothing, and its output is 0
    total = tl.where(is_pad, 1.0, total)
    lse = tl.where(is_pad, -float("inf"), (peak + tl.log2(total)) * LN_2)
    tl.store(lse_ptr + head * seq + target, lse, mask=target < seq)
    mixed = mixed / total[:, None]
    _store(output_ptr + head * seq * HEAD_DIM, mixed, start, seq, HEAD_DIM)


@triton.jit
def _delta_kernel(
    output_ptr,
    lse_ptr,
    grad_ptr,
    grad_lse_ptr,
    lse_log2_ptr,
    delta_ptr,
    num_heads,
    seq,
    stride_grad_b,
    stride_grad_h,
    stride_grad_s,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per target: what the softmax subtracts from the gradient of each weight, and its scale."""
    num_tiles = tl.cdiv(seq, BLOCK_T)
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    start = tl.program_id(0) % num_tiles * BLOCK_T
    target = start + tl.arange(0, BLOCK_T)
    grad_ptr += head // num_heads * stride_grad_b + head % num_heads * stride_grad_h
    grad = _load(grad_ptr, start, stride_grad_s, seq, HEAD_DIM, BLOCK_T, BLOCK_D).to(tl.float32)
    output_ptr += head * seq * HEAD_DIM
    output = _load(output_ptr, start, HEAD_DIM, seq, HEAD_DIM, BLOCK_T, BLOCK_D)
    delta = tl.sum(grad * output.to(tl.float32), axis=1)
    address = head * seq + target
    delta -= tl.load(grad_lse_ptr + address, mask=target < seq, other=0.0)
    tl.store(delta_ptr + address, delta, mask=target < seq)
    lse = tl.load(lse_ptr + address, mask=target < seq, other=0.0)
    # Padding attended to nothing, and +inf makes its weights 0.
    lse_log2 = tl.where(lse == -float("inf"), float("inf"), lse * LOG2_E)
    tl.store(lse_log2_ptr + address, lse_log2, mask=target < seq)


@triton.jit
def _query_grad_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    log_beta_ptr,
    document_start_ptr,
    grad_ptr,
    lse_log2_ptr,
    delta_ptr,
    grad_query_ptr,
    scale,
    num_heads,
    seq,
    stride_query_b,
    stride_query_h,
    stride_query_s,
    stride_key_b,
    stride_key_h,
    stride_key_s,
    stride_value_b,
    stride_value_h,
    stride_value_s,
    stride_grad_b,
    stride_grad_h,
    stride_grad_s,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head, row, kv_head, start = _locate_targets(num_heads, seq, GROUP, BLOCK_T)
    query_ptr += row * stride_query_b + head % num_heads * stride_query_h
    grad_ptr += row * stride_grad_b + head % num_heads * stride_grad_h
    key_ptr += row * stride_key_b + kv_head * stride_key_h
    value_ptr += row * stride_value_b + kv_head * stride_value_h
    log_beta_ptr += (row * (num_heads // GROUP) + kv_head) * seq
    target = start + tl.arange(0, BLOCK_T)
    query = _load(query_ptr, start, stride_query_s, seq, HEAD_DIM, BLOCK_T, BLOCK_D)
    grad = _load(grad_ptr, start, stride_grad_s, seq, HEAD_DIM, BLOCK_T, BLOCK_D)
    lse_log2, delta = _load_stats(lse_log2_ptr + head * seq, delta_ptr + head * seq, target, seq)
    document_start, low, full, diagonal = _sources(
        document_start_ptr, row, target, start, seq, BLOCK_T, BLOCK_S
    )

    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for begin in range(full, diagonal, BLOCK_S):
        total = _add_query_grad(
            query, grad, lse_log2, delta, key_ptr, value_ptr, log_beta_ptr,
            stride_key_s, stride_value_s, target, document_start, begin, seq, scale, total,
            False, HEAD_DIM, SCALED, BLOCK_S, BLOCK_D, UPCAST,
        )  # fmt: skip
    masked = (full - low) // BLOCK_S
    for tile in range(masked + tl.cdiv(tl.minimum(start + BLOCK_T, seq) - diagonal, BLOCK_S)):
        begin = tl.where(tile < masked, low, diagonal - masked * BLOCK_S) + tile * BLOCK_S
        total = _add_query_grad(
            query, grad, lse_log2, delta, key_ptr, value_ptr, log_beta_ptr,
            stride_key_s, stride_value_s, target, document_start, begin, seq, scale, total,
            True, HEAD_DIM, SCALED, BLOCK_S, BLOCK_D, UPCAST,
        )  # fmt: skip
    _store(grad_query_ptr + head * seq * HEAD_DIM, total * scale, start, seq, HEAD_DIM)


@triton.jit
def _key_value_grad_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    log_beta_ptr,
    document_end_ptr,
    grad_ptr,
    lse_log2_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    grad_log_beta_ptr,
    scale,
    num_kv_heads,
    seq,
    stride_query_b,
    stride_query_h,
    stride_query_s,
    stride_key_b,
    stride_key_h,
    stride_key_s,
    stride_value_b,
    stride_value_h,
    stride_value_s,
    stride_grad_b,
    stride_grad_h,
    stride_grad_s,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    num_tiles = tl.cdiv(seq, BLOCK_S)
    kv_head = (tl.program_id(0) // num_tiles).to(tl.int64)  # over all sequences
    start = tl.program_id(0) % num_tiles * BLOCK_S
    row = kv_head // num_kv_heads
    source = start + tl.arange(0, BLOCK_S)
    key_ptr += row * stride_key_b + kv_head % num_kv_heads * stride_key_h
    value_ptr += row * stride_value_b + kv_head % num_kv_heads * stride_value_h
    key = _load(key_ptr, start, stride_key_s, seq, HEAD_DIM, BLOCK_S, BLOCK_D)
    value = _load(value_ptr, start, stride_value_s, seq, HEAD_DIM, BLOCK_S, BLOCK_D)
    slope = load_slopes(log_beta_ptr + kv_head * seq, source, source < seq)
    end, stop = None, seq
    if document_end_ptr is not None:
        document_end_ptr += row * seq
        end = tl.load(document_end_ptr + source, mask=source < seq, other=0)
        stop = tl.load(document_end_ptr + tl.minimum(start + BLOCK_S, seq) - 1)

    grad_key = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    grad_log_beta = tl.zeros([BLOCK_S], tl.float32)
    low = start // BLOCK_T * BLOCK_T
    tiles = tl.cdiv(tl.maximum(stop - low, 0), BLOCK_T)
    # One loop over heads and tiles, with a mask in every tile. More loops would spill registers,
    # and a mask is cheap beside five products.
    for index in range(GROUP * tiles):
        member = index // tiles
        head = kv_head * GROUP + member  # over all sequences
        local = kv_head % num_kv_heads * GROUP + member
        grad_key, grad_value, grad_log_beta = _add_key_value_grad(
            key, value, slope,
            query_ptr + row * stride_query_b + local * stride_query_h,
            grad_ptr + row * stride_grad_b + local * stride_grad_h,
            lse_log2_ptr + head * seq, delta_ptr + head * seq, stride_query_s, stride_grad_s,
            source, end, low + (index - member * tiles) * BLOCK_T, seq, scale,
            grad_key, grad_value, grad_log_beta, HEAD_DIM, SCALED, BLOCK_T, BLOCK_D, UPCAST,
        )  # fmt: skip

    address = kv_head * seq * HEAD_DIM
    _store(grad_key_ptr + address, grad_key * scale, start, seq, HEAD_DIM)
    _store(grad_value_ptr + address, grad_value, start, seq, HEAD_DIM)
    tl.store(grad_log_beta_ptr + kv_head * seq + source, grad_log_beta, mask=source < seq)


@triton.jit
def _locate_targets(num_heads, seq, GROUP: tl.constexpr, BLOCK_T: tl.constexpr):
    """Head over all sequences, row, its KV head, and first target. The longest tiles come first."""
    num_tiles = tl.cdiv(seq, BLOCK_T)
    head = (tl.program_id(0) // num_tiles).to(tl.int64)
    start = (num_tiles - 1 - tl.program_id(0) % num_tiles) * BLOCK_T
    return head, head // num_heads, head % num_heads // GROUP, start


@triton.jit
def _sources(
    document_start_ptr, row, target, start, seq, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr
):
    """First source of each target, and tile bounds ``low <= full <= diagonal``.

    Tiles ``[low, full)`` and those from ``diagonal`` on are masked. In between every target sees
    every source.
    """
    diagonal = start // BLOCK_S * BLOCK_S
    document_start = tl.zeros_like(target)
    low, full = 0, 0
    if document_start_ptr is not None:
        document_start_ptr += row * seq
        document_start = tl.load(document_start_ptr + target, mask=target < seq, other=seq)
        low = tl.load(document_start_ptr + start) // BLOCK_S * BLOCK_S
        latest = tl.load(document_start_ptr + tl.minimum(start + BLOCK_T, seq) - 1)
        full = tl.minimum(tl.cdiv(latest, BLOCK_S) * BLOCK_S, diagonal)
    return document_start, low, full, diagonal


@triton.jit
def _attend(
    query, key_ptr, value_ptr, log_beta_ptr, stride_key_s, stride_value_s,
    target, document_start, begin, seq, scale_log2, peak, total, mixed,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, SCALED: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold one tile of sources into the running softmax ``(peak, total, mixed)``."""
    source = begin + tl.arange(0, BLOCK_S)
    bound = seq if MASKED else None
    key = _load(key_ptr, begin, stride_key_s, bound, HEAD_DIM, BLOCK_S, BLOCK_D)
    slope = load_slopes(log_beta_ptr, source, source < seq)
    score = _score(
        dot(query, tl.trans(key), UPCAST), target[:, None], source[None, :], slope[None, :],
        scale_log2, SCALED,
    )  # fmt: skip
    if MASKED:
        seen = (source[None, :] <= target[:, None]) & (source[None, :] >= document_start[:, None])
        score = tl.where(seen, score, -float("inf"))
    value = _load(value_ptr, begin, stride_value_s, bound, HEAD_DIM, BLOCK_S, BLOCK_D)
    return softmax_update(peak, total, mixed, score, value, UPCAST)


@triton.jit
def _add_query_grad(
    query, grad, lse_log2, delta, key_ptr, value_ptr, log_beta_ptr, stride_key_s, stride_value_s,
    target, document_start, begin, seq, scale, total,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, SCALED: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one tile of sources to the gradient of the queries, without the scale."""
    source = begin + tl.arange(0, BLOCK_S)
    bound = seq if MASKED else None
    key = _load(key_ptr, begin, stride_key_s, bound, HEAD_DIM, BLOCK_S, BLOCK_D)
    value = _load(value_ptr, begin, stride_value_s, bound, HEAD_DIM, BLOCK_S, BLOCK_D)
    slope = load_slopes(log_beta_ptr, source, source < seq)
    score = _score(
        dot(query, tl.trans(key), UPCAST), target[:, None], source[None, :], slope[None, :],
        scale * LOG2_E, SCALED,
    )  # fmt: skip
    if MASKED:
        seen = (source[None, :] <= target[:, None]) & (source[None, :] >= document_start[:, None])
        score = tl.where(seen, score, -float("inf"))
    weight = tl.exp2(score - lse_log2[:, None])
    grad_score = weight * (dot(grad, tl.trans(value), UPCAST) - delta[:, None])
    if SCALED:
        grad_score *= _decay(target[:, None], source[None, :], slope[None, :])
    if not UPCAST:
        grad_score = grad_score.to(key.dtype)
    return total + dot(grad_score, key, UPCAST)


@triton.jit
def _add_key_value_grad(
    key, value, slope, query_ptr, grad_ptr, lse_log2_ptr, delta_ptr, stride_query_s, stride_grad_s,
    source, end, begin, seq, scale, grad_key, grad_value, grad_log_beta,
    HEAD_DIM: tl.constexpr, SCALED: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one tile of one head's targets to the gradients of a tile of sources."""
    target = begin + tl.arange(0, BLOCK_T)
    query = _load(query_ptr, begin, stride_query_s, seq, HEAD_DIM, BLOCK_T, BLOCK_D)
    grad = _load(grad_ptr, begin, stride_grad_s, seq, HEAD_DIM, BLOCK_T, BLOCK_D)
    lse_log2, delta = _load_stats(lse_log2_ptr, delta_ptr, target, seq)
    score = _score(
        dot(key, tl.trans(query), UPCAST), target[None, :], source[:, None], slope[:, None],
        scale * LOG2_E, SCALED,
    )  # fmt: skip
    seen = source[:, None] <= target[None, :]
    if end is not None:
        seen = seen & (target[None, :] < end[:, None])
    score = tl.where(seen, score, -float("inf"))
    weight = tl.exp2(score - lse_log2[None, :])  # [BLOCK_S, BLOCK_T]
    grad_score = weight * (dot(value, tl.trans(grad), UPCAST) - delta[None, :])
    if not UPCAST:
        weight = weight.to(grad.dtype)
    grad_value += dot(weight, grad, UPCAST)
    grad_bias = grad_score
    if SCALED:
        grad_bias *= tl.where(seen, score * LN_2, 0.0)
        grad_score *= _decay(target[None, :], source[:, None], slope[:, None])
    # Computed again, as integers: the ages of the score would occupy registers until here.
    age = (target[None, :] - source[:, None]).to(tl.float32)
    grad_log_beta += tl.sum(grad_bias * age, axis=1)
    if not UPCAST:
        grad_score = grad_score.to(query.dtype)
    return grad_key + dot(grad_score, query, UPCAST), grad_value, grad_log_beta


@triton.jit
def _score(product, target, source, slope, scale_log2, SCALED: tl.constexpr):
    if SCALED:
        score = product * scale_log2 * _decay(target, source, slope)
    else:
        # Integers below 2**24 are exact in fp32, and so is their difference.
        age = target.to(tl.float32) - source.to(tl.float32)
        score = product * scale_log2 + age * slope
    return score


@triton.jit
def _decay(target, source, slope):
    """``beta ** (t - j)``; 1 where the source is not in the past."""
    age = target.to(tl.float32) - source.to(tl.float32)
    return tl.exp2(tl.maximum(age, 0.0) * slope)


@triton.jit
def _load_stats(lse_log2_ptr, delta_ptr, target, seq):
    """Base-2 log-sum-exp and delta; +inf after the end, which makes every weight 0."""
    lse_log2 = tl.load(lse_log2_ptr + target, mask=target < seq, other=float("inf"))
    return lse_log2, tl.load(delta_ptr + target, mask=target < seq, other=0.0)


@triton.jit
def _load(
    ptr, begin, stride, bound,
    HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of a head, ``[BLOCK_R, BLOCK_D]``, 0 from ``bound`` on. None: all rows exist."""
    index = tl.arange(0, BLOCK_R)
    dim = tl.arange(0, BLOCK_D)[None, :]
    # 32 bits are enough within a tile, and take half the registers.
    address = ptr + tl.cast(begin, tl.int64) * stride + ((index * stride)[:, None] + dim)
    if bound is None:
        if HEAD_DIM == BLOCK_D:
            block = tl.load(address)
        else:
            block = tl.load(address, mask=dim < HEAD_DIM, other=0.0)
    else:
        mask = (begin + index < bound)[:, None] & (dim < HEAD_DIM)
        block = tl.load(address, mask=mask, other=0.0)
    return block


@triton.jit
def _store(ptr, block, start, seq, HEAD_DIM: tl.constexpr):
    """Write rows of a dense head."""
    index = tl.arange(0, block.shape[0])
    dim = tl.arange(0, block.shape[1])[None, :]
    address = ptr + tl.cast(start, tl.int64) * HEAD_DIM + (index[:, None] * HEAD_DIM + dim)
    mask = (start + index < seq)[:, None] & (dim < HEAD_DIM)
    tl.store(address, block.to(ptr.dtype.element_ty), mask=mask)
