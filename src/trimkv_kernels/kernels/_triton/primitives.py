"""Functions of several kernels: products, the running softmax, scores as integers, log betas."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Finite, so that a row in which all scores are masked has no inf - inf.
LOWEST = tl.constexpr(-1.0e30)
# exp of it is 0, and unlike -inf it can be multiplied by an age of 0.
LOWEST_LOG_BETA = tl.constexpr(-1.0e4)
LOWEST_SLOPE = tl.constexpr(-1.0e28)
INT32_MIN = tl.constexpr(-2147483648)
INT32_MAX = tl.constexpr(2147483647)


@triton.jit
def dot(left, right, UPCAST: tl.constexpr):
    """Product of two blocks in fp32; fp32 operands are not rounded to tf32."""
    if UPCAST:
        # The interpreter multiplies the bit patterns of bf16.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def softmax_update(peak, total, mixed, score, value, UPCAST: tl.constexpr):
    """Fold one tile into the running softmax ``(peak, total, mixed)`` of base 2.

    Args:
        peak, total: The largest score so far, and the sum of weights relative to it: ``[rows]``.
        mixed: The weighted sum of values: ``[rows, dims]``.
        score: ``[rows, tile]``, -inf where nothing is seen.
        value: ``[tile, dims]``.
        UPCAST: As `dot`.
    """
    new_peak = tl.maximum(peak, tl.max(score, axis=1))
    weight = tl.exp2(score - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weight, axis=1)
    if not UPCAST:
        weight = weight.to(value.dtype)
    return new_peak, total, mixed * shrink[:, None] + dot(weight, value, UPCAST)


@triton.jit
def score_order(score):
    """Map fp32 to int32 with the same order: sign and magnitude to two's complement."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, INT32_MIN - bits, bits)  # -0.0 becomes 0 too


@triton.jit
def exp2_where(seen, power):
    """2 to the power, 0 where not seen. The power may be anything there: it cannot overflow."""
    return tl.exp2(tl.where(seen, power, -float("inf")))


@triton.jit
def load_slopes(log_beta_ptr, index, mask):
    """Base-2 logarithms of beta. NaN stays NaN."""
    log_beta = tl.load(log_beta_ptr + index, mask=mask, other=0.0)
    return tl.where(log_beta < LOWEST_LOG_BETA, LOWEST_LOG_BETA, log_beta) * LOG2_E


@triton.jit
def log_sigmoid(logit):
    """``log(1 / (1 + exp(-logit)))`` in fp32, within a few units of its last place.

    ``log(1 + e)`` is the series of ``2 artanh(e / (2 + e))``: for a logit of 18 the sum ``1 + e``
    is 1 in fp32.
    """
    e = tl.exp2(-tl.abs(logit) * LOG2_E)
    s = e / (2.0 + e)
    square = s * s
    series = 1.0 / 15.0 + square * (1.0 / 17.0)
    for odd in tl.static_range(13, 0, -2):
        series = 1.0 / odd + square * series
    return tl.where(logit < 0, logit, 0.0) - 2.0 * s * series
