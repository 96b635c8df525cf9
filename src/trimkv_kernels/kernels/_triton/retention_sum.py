"""The retention sum and its gradient in separable form.

With ``t = begin + u``, ``exp((t - j) x_j)`` is ``exp(u x_j) * exp((begin - j) x_j)``. The first
factor depends on the index within a block of targets, the second on the block. Neither exceeds 1
for ``j`` before the block, so nothing overflows, and what underflows is negligible. A block of
sources adds one matrix product to many blocks of targets, which are the columns below. Only pairs
within a block need one exponential each.

With documents, a target sees sources before its block only if its document was open before the
block began, and then sees what the block's first target sees.
"""

import triton
import triton.language as tl

from trimkv_kernels.kernels._triton.primitives import exp2_where, load_slopes


@triton.jit
def _retention_sum_kernel(
    log_beta_ptr,
    start_ptr,
    output_ptr,
    rows,
    heads,
    seq,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # The latest targets have the most sources: they start first.
    tile = tl.cdiv(seq, BLOCK * COLUMNS) - 1 - tl.program_id(0) // rows
    row = (tl.program_id(0) % rows).to(tl.int64)
    log_beta_ptr += row * seq
    base = tile * (BLOCK * COLUMNS)
    step = tl.arange(0, BLOCK)
    begin = base + tl.arange(0, COLUMNS) * BLOCK  # [COLUMNS]
    target = begin[None, :] + step[:, None]  # [BLOCK, COLUMNS]
    low = 0
    if start_ptr is not None:
        start_ptr += row // heads * seq
        low = tl.load(start_ptr + base) // BLOCK * BLOCK
        opened = tl.load(start_ptr + begin, mask=begin < seq, other=seq)

    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for tile_start in range(low, tl.minimum(base + (COLUMNS - 1) * BLOCK, seq), BLOCK):
        source = tile_start + step
        slope = load_slopes(log_beta_ptr, source, source < seq)
        decay = tl.exp2(step.to(tl.float32)[:, None] * slope[None, :])  # [target, source]
        age = begin[None, :] - source[:, None]  # [source, COLUMNS]
        seen = age > 0
        if start_ptr is not None:
            seen = seen & (source[:, None] >= opened[None, :])
        carried = exp2_where(seen, age.to(tl.float32) * slope[:, None])
        total += tl.dot(decay, carried, input_precision="ieee")

    if start_ptr is not None:
        start = tl.load(start_ptr + target, mask=target < seq, other=seq)  # [BLOCK, COLUMNS]
        total = tl.where(start <= begin[None, :], total, 0.0)
    for source_step in range(BLOCK):
        slope = load_slopes(log_beta_ptr, begin + source_step, begin + source_step < seq)
        age = (step - source_step)[:, None]
        seen = (age >= 0) & (target < seq)
        if start_ptr is not None:
            seen = seen & (start <= (begin + source_step)[None, :])
        total += exp2_where(seen, age.to(tl.float32) * slope[None, :])
    tl.store(output_ptr + row * seq + target, total, mask=target < seq)


@triton.jit
def _retention_sum_grad_kernel(
    grad_ptr,
    log_beta_ptr,
    start_ptr,
    end_ptr,
    output_ptr,
    rows,
    heads,
    seq,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # The earliest sources have the most targets: they start first.
    tile_start = tl.program_id(0) // rows * BLOCK
    row = (tl.program_id(0) % rows).to(tl.int64)
    log_beta_ptr += row * seq
    grad_ptr += row * seq
    step = tl.arange(0, BLOCK)
    source = tile_start + step
    slope = load_slopes(log_beta_ptr, source, source < seq)
    stop = seq
    if start_ptr is not None:
        start_ptr += row // heads * seq
        stop = tl.load(end_ptr + row // heads * seq + tl.minimum(tile_start + BLOCK, seq) - 1)

    grad = tl.load(grad_ptr + source, mask=source < seq, other=0.0)
    age = step[:, None] - step[None, :]  # [target, source]
    seen = age > 0
    if start_ptr is not None:
        start = tl.load(start_ptr + source, mask=source < seq, other=seq)
        seen = seen & (start[:, None] <= source[None, :])
    age = age.to(tl.float32)
    aged_decay = age * exp2_where(seen, age * slope[None, :])
    total = tl.sum(grad[:, None] * aged_decay, axis=0)  # [BLOCK]

    decay = tl.exp2(slope[:, None] * step.to(tl.float32)[None, :])  # [source, target]
    for base in range(tile_start + BLOCK, stop, BLOCK * COLUMNS):
        begin = base + tl.arange(0, COLUMNS) * BLOCK  # [COLUMNS]
        target = begin[None, :] + step[:, None]  # [BLOCK, COLUMNS]
        later_grad = tl.load(grad_ptr + target, mask=target < seq, other=0.0)
        gap = (begin[None, :] - source[:, None]).to(tl.float32)  # [source, COLUMNS]
        carried = tl.exp2(gap * slope[:, None])
        if start_ptr is not None:
            later_start = tl.load(start_ptr + target, mask=target < seq, other=seq)
            later_grad = tl.where(later_start <= begin[None, :], later_grad, 0.0)
            opened = tl.load(start_ptr + begin, mask=begin < seq, other=seq)
            carried = tl.where(source[:, None] >= opened[None, :], carried, 0.0)
        plain = tl.dot(decay, later_grad, input_precision="ieee")  # [source, COLUMNS]
        later_grad *= step.to(tl.float32)[:, None]
        aged = tl.dot(decay, later_grad, input_precision="ieee")
        total += tl.sum(carried * (gap * plain + aged), axis=1)
    tl.store(output_ptr + row * seq + source, total, mask=source < seq)
