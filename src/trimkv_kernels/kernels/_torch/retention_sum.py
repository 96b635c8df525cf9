"""The retention sum and its gradient, a block of sources at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_kernels.kernels._torch.primitives import BLOCK, LOWEST_LOG_BETA
from trimkv_kernels.kernels.documents import document_spans


def retention_sum(
    log_beta: Tensor, *, document: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """See `trimkv_kernels.kernels.retention_sum`.

    Takes one exponential per pair only within a block: see `_triton.retention_sum`.
    """
    seq = log_beta.shape[2]
    start, _ = document_spans(document, valid)
    slope, start, step, begin = _sum_blocks(log_beta, start)
    near = slope.new_empty(slope.shape)  # from sources of the same block
    far = torch.zeros_like(slope)
    for block, low in enumerate(begin.tolist()):
        source, here = low + step, slope[:, :, block]
        near[:, :, block] = _decay_within(here, start, block, source).sum(dim=2)
        decay = (here[..., None] * step).exp()  # [batch, heads, source, target]
        far[:, :, block + 1 :] += _carried(here, start, block, source, begin) @ decay
    if start is not None:
        far = far.masked_fill((start > begin[:, None])[:, None], 0)
    return (near + far).flatten(2)[..., :seq].contiguous()


def retention_sum_grad(
    grad: Tensor, log_beta: Tensor, *, document: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """See `trimkv_kernels.kernels.ops.retention_sum.retention_sum_grad`."""
    seq = log_beta.shape[2]
    start, _ = document_spans(document, valid)
    slope, start, step, begin = _sum_blocks(log_beta, start)
    grad = F.pad(grad, (0, -seq % BLOCK)).unflatten(2, (-1, BLOCK))
    far_grad = grad
    if start is not None:
        far_grad = grad.masked_fill((start > begin[:, None])[:, None], 0)
    output = slope.new_empty(slope.shape)
    for block, low in enumerate(begin.tolist()):
        source, here = low + step, slope[:, :, block]
        aged = _decay_within(here, start, block, source) * (step - step[:, None])
        total = (aged @ grad[:, :, block, :, None]).squeeze(-1)  # [batch, heads, source]
        decay = (step[:, None] * here[:, :, None]).exp()  # [batch, heads, target, source]
        later = far_grad[:, :, block + 1 :]  # [batch, heads, blocks, target]
        moment = (begin[block + 1 :, None] - source) * (later @ decay)
        moment += later @ (decay * step[:, None])
        output[:, :, block] = total + (_carried(here, start, block, source, begin) * moment).sum(2)
    return output.flatten(2)[..., :seq].contiguous()


def _sum_blocks(
    log_beta: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Cut the sequence: log betas, ``start``, steps within a block, first tokens of the blocks."""
    seq, pad = log_beta.shape[2], -log_beta.shape[2] % BLOCK
    slope = F.pad(log_beta.clamp(min=LOWEST_LOG_BETA), (0, pad)).unflatten(2, (-1, BLOCK))
    if start is not None:
        start = F.pad(start, (0, pad), value=seq + pad).unflatten(1, (-1, BLOCK))
    step = torch.arange(BLOCK, device=slope.device, dtype=slope.dtype)
    begin = torch.arange(0, seq + pad, BLOCK, device=slope.device, dtype=slope.dtype)
    return slope, start, step, begin


def _decay_within(slope: Tensor, start: Tensor | None, block: int, source: Tensor) -> Tensor:
    """``exp((t - j) * log_beta_j)`` of the pairs in a block: ``[batch, heads, source, target]``."""
    age = source - source[:, None]
    unseen = age < 0
    if start is not None:
        unseen = unseen | (start[:, None, block, None, :] > source[:, None])
    return (age.clamp(min=0) * slope[..., None]).exp().masked_fill(unseen, 0)


def _carried(
    slope: Tensor, start: Tensor | None, block: int, source: Tensor, begin: Tensor
) -> Tensor:
    """Weights of a block's sources at later blocks' starts: ``[batch, heads, blocks, source]``."""
    carried = ((begin[block + 1 :, None] - source) * slope[:, :, None]).exp()
    if start is not None:
        unseen = start[:, None, block + 1 :, :1] > source
        carried = carried.masked_fill(unseen, 0)
    return carried
