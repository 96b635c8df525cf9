"""Retention-gated attention for training, on any of three backends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from trimkv_kernels.kernels import retention_attention
from trimkv_kernels.training.packing import documents_before

ATTENTION_IMPLS = ("auto", "triton", "torch", "flex")
_LOWEST_LOG_BETA = -1.0e4  # as in `retention_attention`


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    *,
    document: Tensor | None = None,
    recent: int = 0,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attend causally with the logits ``scale * q_t.k_j + log_beta_j * max(t - j - recent, 0)``.

    Args:
        query: ``[batch, num_heads, seq, head_dim]``, fp32, fp16 or bf16.
        key: ``[batch, num_kv_heads, seq, head_dim]``, dtype of ``query``.
        value: As ``key``.
        log_beta: ``[batch, num_kv_heads, seq]`` fp32, natural logarithms, at most 0.
        document: ``[batch, seq]`` int32, which document a token belongs to, negative for padding,
            different for all documents of a row; None means one document.
        recent: Number of positions for which a token does not fade.
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
        return _attend(query, key, value, log_beta, document, recent, scale, impl)
    if (
        query.device.type == "cpu"
        and torch.is_grad_enabled()
        and _any_needs_grad(query, key, value, log_beta)
    ):
        raise RuntimeError(
            "impl='flex' has no backward pass on a CPU; pass impl='torch' there, or 'auto'"
        )
    return _flex(query, key, value, log_beta, document, recent, scale)


def op_impl(impl: str) -> str:
    """The ``impl`` for ops that have no counterpart in FlexAttention."""
    return "auto" if impl == "flex" else impl


def _any_needs_grad(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    document: Tensor | None,
    recent: int,
    scale: float | None,
    impl: str,
) -> Tensor:
    """Attend to near tokens, which do not fade, and to older ones; join both by log-sum-exps."""
    if not recent:
        output, _ = retention_attention(
            query, key, value, log_beta, document=document, scale=scale, impl=impl
        )
        return output
    near, near_lse = _attend_near(query, key, value, document, recent, scale)
    if query.shape[2] <= recent:
        return near.to(query.dtype)
    # Queries are moved back by `recent` steps, so that ages count from where fading begins.
    far, far_lse = retention_attention(
        query[:, :, recent:],
        key[:, :, :-recent],
        value[:, :, :-recent],
        log_beta[:, :, :-recent],
        document=documents_before(document, recent),
        scale=scale,
        impl=impl,
    )
    share = torch.sigmoid(far_lse - near_lse[:, :, recent:])[..., None]
    late = near[:, :, recent:]
    return torch.cat((near[:, :, :recent], late + share * (far - late)), dim=2).to(query.dtype)


def _attend_near(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    document: Tensor | None,
    recent: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Attend to a token itself and the ``recent - 1`` before it, a block of ``recent`` at a time.

    Returns:
        ``[batch, num_heads, seq, head_dim]`` fp32, 0 for padding, and log-sum-exps
        ``[batch, num_heads, seq]``.
    """
    num_kv_heads, seq = key.shape[1], query.shape[2]
    padding = -seq % recent
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # [batch, num_kv_heads, group, blocks, recent, head_dim]
    queries = F.pad(query.float(), (0, 0, 0, padding)).unflatten(2, (-1, recent))
    queries = queries.unflatten(1, (num_kv_heads, -1))
    keys, values = (
        F.pad(tensor.float(), (0, 0, recent, padding)).unfold(2, 2 * recent, recent).unsqueeze(2)
        for tensor in (key, value)
    )  # [batch, num_kv_heads, 1, blocks, head_dim, 2 * recent]
    index = torch.arange(seq + padding, device=query.device).view(-1, recent, 1)
    source = index[:, :1, 0] - recent + torch.arange(2 * recent, device=query.device)
    age = index - source[:, None]
    seen = (age >= 0) & (age < recent) & (source >= 0)[:, None]
    if document is not None:
        own = F.pad(document, (0, padding), value=-1).view(len(document), -1, recent, 1)
        other = F.pad(document, (recent, padding), value=-1).unfold(1, 2 * recent, recent)
        # padding sees itself, so that its sum is not 0
        seen = seen & ((own == other[:, :, None]) & (own >= 0) | (age == 0))
        seen = seen[:, None, None]
    logits = (queries @ keys * scale).masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    output = (logits - lse).exp() @ values.mT
    output, lse = (t.flatten(3, 4).flatten(1, 2)[:, :, :seq] for t in (output, lse))
    if document is not None:
        output = output.masked_fill((document < 0)[:, None, :, None], 0)
    return output, lse[..., 0]


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    document: Tensor | None,
    recent: int,
    scale: float | None,
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    slope = log_beta.clamp(min=_LOWEST_LOG_BETA)

    def fade(score: Tensor, b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        return score + slope[b, h // group, j] * (t - j - recent).clamp(min=0)

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
    """FlexAttention, compiled on a GPU. Without compilation it materialises all logits."""
    run: Callable[..., Any] = flex_attention
    return torch.compile(run) if device_type == "cuda" else run
