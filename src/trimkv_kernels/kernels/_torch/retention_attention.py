"""Retention-gated attention and its gradients, a block of targets at a time."""

import torch
from torch import Tensor

from trimkv_kernels.kernels._torch.primitives import (
    BLOCK,
    LOWEST_LOG_BETA,
    fold,
    grouped,
    host_reads_are_free,
    softmax,
)
from trimkv_kernels.kernels.documents import document_spans
from trimkv_kernels.kernels.launch import softmax_scale


def retention_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    *,
    document: Tensor | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    mode: str = "add",
) -> tuple[Tensor, Tensor]:
    """See `trimkv_kernels.kernels.retention_attention`.

    Takes a block of targets at a time, so that memory is linear in the sequence.
    """
    scale = softmax_scale(scale, query.shape[-1])
    start, _ = document_spans(document, valid)
    seq, num_kv_heads = query.shape[2], key.shape[1]
    queries = grouped(query, num_kv_heads)
    keys, values = key.to(queries.dtype), value.to(queries.dtype)
    output = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=queries.dtype)
    for begin in range(0, seq, BLOCK):
        here, past = _tile(start, begin, seq)
        age, seen = _age(start, here, past, query.device)
        bias = age * log_beta.clamp(min=LOWEST_LOG_BETA)[:, :, None, None, past]
        logits = _logits(queries[:, :, :, here], keys[:, :, past], bias, seen, scale, mode)
        tile_lse = logits.logsumexp(dim=-1, keepdim=True)  # [batch, num_kv_heads, group, targets]
        mixed = fold(softmax(logits, tile_lse), values[:, :, past])
        output[:, :, here] = mixed.flatten(1, 2)
        lse[:, :, here] = tile_lse.flatten(1, 2)[..., 0]
    return output, lse


def retention_attention_grad(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    document: Tensor | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    mode: str = "add",
    need_query: bool = True,
    need_rest: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `retention_attention_grad` among the ops; the logits are computed once more."""
    scale = softmax_scale(scale, query.shape[-1])
    start, _ = document_spans(document, valid)
    seq, num_kv_heads = query.shape[2], key.shape[1]
    queries, grads = grouped(query, num_kv_heads), grouped(grad, num_kv_heads)
    lses = grouped(lse[..., None], num_kv_heads)
    delta = (grads * grouped(output, num_kv_heads)).sum(dim=-1, keepdim=True)
    delta -= grouped(grad_lse[..., None], num_kv_heads)
    keys, values = key.to(queries.dtype), value.to(queries.dtype)
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = torch.zeros_like(keys), torch.zeros_like(values)
    grad_log_beta = log_beta.new_zeros(log_beta.shape)
    for begin in range(0, seq, BLOCK):
        here, past = _tile(start, begin, seq)
        age, seen = _age(start, here, past, query.device)
        bias = age * log_beta.clamp(min=LOWEST_LOG_BETA)[:, :, None, None, past]
        logits = _logits(queries[:, :, :, here], keys[:, :, past], bias, seen, scale, mode)
        weight = softmax(logits, lses[:, :, :, here])
        grad_value[:, :, past] += weight.flatten(2, 3).mT @ grads[:, :, :, here].flatten(2, 3)
        grad_weight = fold(grads[:, :, :, here], values[:, :, past].mT)
        grad_bias = grad_product = weight * (grad_weight - delta[:, :, :, here])
        if mode == "scale":
            grad_bias = grad_product * logits.masked_fill(~seen, 0)
            grad_product = grad_product * bias.exp()
        grad_log_beta[:, :, past] += (grad_bias.sum(dim=2) * age).sum(dim=2)
        grad_product *= scale
        grad_query[:, :, here] = fold(grad_product, keys[:, :, past]).flatten(1, 2)
        grad_key[:, :, past] += grad_product.flatten(2, 3).mT @ queries[:, :, :, here].flatten(2, 3)
    # Gradients that are not needed are empty, as those of the kernels.
    return (
        grad_query if need_query else grad_query.new_empty(0),
        grad_key.to(key.dtype) if need_rest else key.new_empty(0),
        grad_value.to(value.dtype) if need_rest else value.new_empty(0),
        grad_log_beta if need_rest else log_beta.new_empty(0),
    )


def _tile(start: Tensor | None, begin: int, seq: int) -> tuple[slice, slice]:
    """A block of targets, and all sources that it sees."""
    low = 0
    if start is not None and host_reads_are_free(start):
        low = int(start[:, begin].min())
    stop = min(begin + BLOCK, seq)
    return slice(begin, stop), slice(min(low, begin), stop)


def _age(
    start: Tensor | None, here: slice, past: slice, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ages ``[targets, sources]``, at least 0, and who sees whom, which broadcasts."""
    target = torch.arange(here.start, here.stop, device=device)[:, None]
    source = torch.arange(past.start, past.stop, device=device)
    seen = source <= target
    if start is not None:
        seen = seen & (source >= start[:, None, None, here, None])
    return (target - source).clamp(min=0), seen


def _logits(
    query: Tensor, key: Tensor, bias: Tensor, seen: Tensor, scale: float, mode: str
) -> Tensor:
    """``[batch, num_kv_heads, group, targets, sources]``, -inf where not seen."""
    product = fold(query, key.mT) * scale
    logits = product * bias.exp() if mode == "scale" else product + bias
    return logits.masked_fill(~seen, -torch.inf)
