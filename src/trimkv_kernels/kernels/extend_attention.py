"""Attention of a call of any length to the filled slots and causally to itself."""

import torch
from torch import Tensor

from trimkv_kernels.kernels import reference
from trimkv_kernels.kernels._dispatch import (
    FLOAT_DTYPES,
    check_rank,
    check_tensor,
    check_unit_stride,
)


def extend_attention(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    key: Tensor,
    value: Tensor,
    num_valid: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend new tokens to all valid slots and causally to themselves. Torch on every device.

    Args:
        query: ``[batch, num_heads, q_len, head_dim]``, fp32, fp16 or bf16.
        new_key: ``[batch, num_kv_heads, q_len, head_dim]``, dtype of ``query``.
        new_value: As ``new_key``.
        key: ``[batch, num_kv_heads, num_slots, head_dim]``, dtype of ``query``; ``num_slots`` may be 0.
        value: As ``key``.
        num_valid: ``[batch, num_kv_heads]`` int32, front-packed valid slots; None when all are. What
            lies in the other slots must be finite.
        valid: ``[batch, q_len]`` bool, False for padding; None when every token is real.
        scale: Softmax scale; ``None`` means ``head_dim ** -0.5``.

    Returns:
        Like ``query``. Rows of padding are finite and otherwise unspecified.

    Raises:
        ValueError: A shape, dtype or device disagrees.
    """
    check_rank("query", query, "batch, num_heads, q_len, head_dim")
    check_rank("key", key, "batch, num_kv_heads, num_slots, head_dim")
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, num_slots = key.shape[1:3]
    check_tensor("query", query, query.shape, FLOAT_DTYPES, query.device)
    if num_heads % num_kv_heads != 0:
        raise ValueError(
            f"query must have a multiple of {num_kv_heads} heads (those of key), got {num_heads}"
        )
    for name, tensor, length in (
        ("new_key", new_key, q_len),
        ("new_value", new_value, q_len),
        ("key", key, num_slots),
        ("value", value, num_slots),
    ):
        shape = (batch, num_kv_heads, length, head_dim)
        check_tensor(name, tensor, shape, (query.dtype,), query.device)
        check_unit_stride(name, tensor)
    if num_valid is not None:
        check_tensor("num_valid", num_valid, (batch, num_kv_heads), (torch.int32,), query.device)
    if valid is not None:
        check_tensor("valid", valid, (batch, q_len), (torch.bool,), query.device)
    scale = head_dim**-0.5 if scale is None else scale
    return reference.extend_attention(
        query, new_key, new_value, key, value, num_valid, valid, scale
    )
