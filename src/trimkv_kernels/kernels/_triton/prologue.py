"""The new token of a decode step as attention needs it: what `kernels.prologue` leaves to do."""

import triton
import triton.language as tl

from trimkv_kernels.kernels._triton.primitives import LOWEST_SLOPE, log_sigmoid


@triton.jit
def load_query(
    query_ptr, stride_h, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, BLOCK_D)[None, :]
    return _load_rows(query_ptr, stride_h, dim, GROUP, HEAD_DIM, BLOCK_G)  # [BLOCK_G, BLOCK_D]


@triton.jit
def _load_rows(
    states_ptr, stride_h, dim, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr
):
    """The dimensions ``dim`` of ``GROUP`` vectors, ``[BLOCK_G, BLOCK_D]``."""
    member = tl.arange(0, BLOCK_G)[:, None]
    mask = (member < GROUP) & (dim < HEAD_DIM)
    return tl.load(states_ptr + member * stride_h + dim, mask=mask, other=0.0)


@triton.jit
def load_terms(
    slope_ptr, offset_ptr, stride_slope_b, stride_slope_h, stride_offset_b, stride_offset_h,
    gate_ptr, gate_bias_ptr, row, kv_head, head, age_offset,
):  # fmt: skip
    """The new token's slope and offset; of a retention gate's logit, if there is one."""
    if gate_ptr is None:
        slope = tl.load(slope_ptr + row * stride_slope_b + kv_head * stride_slope_h)
        offset = tl.load(offset_ptr + row * stride_offset_b + kv_head * stride_offset_h)
    else:
        logit = tl.load(gate_ptr + head).to(tl.float32)
        slope = log_sigmoid(logit + tl.load(gate_bias_ptr + kv_head).to(tl.float32))
        slope = tl.where(slope < LOWEST_SLOPE, LOWEST_SLOPE, slope)  # NaN stays NaN
        offset = slope * age_offset
    return slope, offset


@triton.jit
def load_finished(
    states_ptr, stride_h, weight_ptr, cos_ptr, sin_ptr, turn, eps, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries or keys ``[BLOCK_G, BLOCK_D]``, normed and rotated if that is still to be done.

    Each dimension is rotated with the one half a vector away, which is loaded a second time: an
    exchange between threads would be a barrier.
    """
    dim = tl.arange(0, BLOCK_D)[None, :]
    states = _load_rows(states_ptr, stride_h, dim, GROUP, HEAD_DIM, BLOCK_G)
    if cos_ptr is not None:
        # This remainder tells the compiler that eight neighbours stay neighbours.
        other = (dim + HEAD_DIM // 2) % HEAD_DIM
        x = states.to(tl.float32)
        y = _load_rows(states_ptr, stride_h, other, GROUP, HEAD_DIM, BLOCK_G).to(tl.float32)
        # Numbers of a dimension are loaded for each query: as a row they would get a layout of
        # their own, and barriers.
        if weight_ptr is not None:
            norm = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
            x *= norm * _load_rows(weight_ptr, 0, dim, BLOCK_G, HEAD_DIM, BLOCK_G).to(tl.float32)
            y *= norm * _load_rows(weight_ptr, 0, other, BLOCK_G, HEAD_DIM, BLOCK_G).to(tl.float32)
        cos = _load_rows(cos_ptr + turn, 0, dim, BLOCK_G, HEAD_DIM, BLOCK_G).to(tl.float32)
        sin = _load_rows(sin_ptr + turn, 0, dim, BLOCK_G, HEAD_DIM, BLOCK_G).to(tl.float32)
        turned = tl.where(dim < HEAD_DIM // 2, -y, y)
        states = (x * cos + turned * sin).to(states.dtype)
    return states


@triton.jit
def store_first(states_ptr, address, states, HEAD_DIM: tl.constexpr):
    """Write the first vector of ``[BLOCK_G, BLOCK_D]``."""
    member = tl.arange(0, states.shape[0])[:, None]
    dim = tl.arange(0, states.shape[1])[None, :]
    tl.store(states_ptr + address + member * 0 + dim, states, mask=(member == 0) & (dim < HEAD_DIM))
