"""Retention-gated attention for training, on any of three backends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from trimkv_kernels.kernels import retention_attention

ATTENTION_IMPLS = ("auto", "triton", "torch", "flex")
_LOWEST_LOG_BETA = -1.0e4  # as in `retention_attention`


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    *,
    document: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attend causally with the logits ``scale * q_t.k_j + log_beta_j * (t - j)``.

    Args:
        query: ``[batch, num_heads, seq, head_dim]``, fp32, fp16 or bf16.
        key: ``[batch, num_kv_heads, seq, head_dim]``, dtype of ``query``.
        value: As ``key``.
        log_beta: ``[batch, num_kv_heads, seq]`` fp32, natural logarithms, at most 0.
        document: ``[batch, seq]`` int32, which document a token belongs to, negative for padding,
            different for all documents of a row; None means one document.
        scale: Softmax scale; None means ``head_dim ** -0.5``.
        impl: ``"auto"`` (Triton on a GPU, torch in blocks elsewhere), ``"triton"``, ``"torch"``, or
            ``"flex"`` for FlexAttention, which has a backward pass on GPUs only.

    Returns:
        ``[batch, num_heads, seq, head_dim]``, 0 for padding.

    Raises:
        ValueError: a shape, dtype or device disagrees, or ``impl`` is unknown.
        RuntimeError: ``impl`` cannot run here.
    """
    if impl not in ATTENTION_IMPLS:
        raise ValueError(
            f"impl must be one of {', '.join(map(repr, ATTENTION_IMPLS))}, got {impl!r}"
        )
    if impl != "flex":
        output, _ = retention_attention(
            query, key, value, log_beta, document=document, scale=scale, impl=impl
        )
        return output
    if (
        query.device.type == "cpu"
        and torch.is_grad_enabled()
        and _any_needs_grad(query, key, value, log_beta)
    ):
        raise RuntimeError(
            "impl='flex' has no backward pass on a CPU; pass impl='torch' there, or 'auto'"
        )
    return _flex(query, key, value, log_beta, document, scale)


def op_impl(impl: str) -> str:
    """The ``impl`` of the ops that FlexAttention has no counterpart of."""
    return "auto" if impl == "flex" else impl


def _any_needs_grad(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    document: Tensor | None,
    scale: float | None,
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    slope = log_beta.clamp(min=_LOWEST_LOG_BETA)

    def fade(score: Tensor, b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        return score + slope[b, h // group, j] * (t - j)

    def is_seen(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        seen = t >= j
        if document is not None:
            seen = seen & (document[b, t] == document[b, j]) & (document[b, t] >= 0)
        return seen

    batch, _, seq, _ = query.shape
    mask = create_block_mask(
        is_seen, batch if document is not None else None, None, seq, seq, query.device
    )
    return _flex_attention(query.device.type)(
        query, key, value, score_mod=fade, block_mask=mask, scale=scale, enable_gqa=group > 1
    )


@functools.cache
def _flex_attention(device_type: str) -> Callable[..., Any]:
    """FlexAttention, compiled on a GPU: without, it materialises all logits."""
    run: Callable[..., Any] = flex_attention
    return torch.compile(run) if device_type == "cuda" else run
