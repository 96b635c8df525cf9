"""Attention of a call of any length to the filled slots and causally to itself."""

from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from trimkv_kernels.kernels import reference
from trimkv_kernels.kernels._dispatch import (
    FLOAT_DTYPES,
    check_rank,
    check_tensor,
    check_unit_stride,
    compute_capability,
    device_guard,
    is_interpreted,
    resolve_impl,
)
from trimkv_kernels.kernels.tuning import tuned


@overload
def extend_attention(
    query: Tensor, new_key: Tensor, new_value: Tensor, key: Tensor, value: Tensor,
    num_valid: Tensor | None = ..., *, valid: Tensor | None = ..., scale: float | None = ...,
    return_lse: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def extend_attention(
    query: Tensor, new_key: Tensor, new_value: Tensor, key: Tensor, value: Tensor,
    num_valid: Tensor | None = ..., *, valid: Tensor | None = ..., scale: float | None = ...,
    return_lse: Literal[True], impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


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
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend new tokens to all valid slots and causally to themselves.

    Args:
        query: ``[batch, num_heads, q_len, head_dim]``, fp32, fp16 or bf16.
        new_key: ``[batch, num_kv_heads, q_len, head_dim]``, dtype of ``query``.
        new_value: As ``new_key``.
        key: ``[batch, num_kv_heads, num_slots, head_dim]``, dtype of ``query``; ``num_slots`` may
            be 0.
        value: As ``key``.
        num_valid: ``[batch, num_kv_heads]`` int32, front-packed valid slots; None when all are.
            What lies in the other slots must be finite.
        valid: ``[batch, q_len]`` bool, False for padding; None when every token is real.
        scale: Softmax scale; ``None`` means ``head_dim ** -0.5``.
        return_lse: Also return the log-sum-exp of the scaled products, what `column_mass` needs.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Returns:
        Like ``query``. Rows of padding are finite and otherwise unspecified. With ``return_lse`` a
        pair of that and ``[batch, num_heads, q_len]`` fp32, natural logarithms, of padding
        unspecified.

    Raises:
        ValueError: A shape, dtype, stride or device disagrees.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    check_rank("query", query, "batch, num_heads, q_len, head_dim")
    check_rank("key", key, "batch, num_kv_heads, num_slots, head_dim")
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, num_slots = key.shape[1:3]
    check_tensor("query", query, query.shape, FLOAT_DTYPES, query.device)
    check_unit_stride("query", query)
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
    lse = query.new_empty(query.shape[:3], dtype=torch.float32) if return_lse else None
    arguments = (query, new_key, new_value, key, value, num_valid, valid, scale, lse)
    output: Tensor
    if resolve_impl(impl, query.device) == "torch":
        output = reference.extend_attention(*arguments)
    else:
        output = torch.ops.trimkv_kernels.extend_attention(*arguments)
    return output if lse is None else (output, lse)


@dataclass(frozen=True)
class ExtendConfig:
    """How an extend launch is laid out.

    Attributes:
        block_m: Query rows per program, tokens times heads of a group.
        block_s: Slots or tokens per tile.
        num_warps: Warps per program.
        num_stages: Tiles in flight.
    """

    block_m: int
    block_s: int
    num_warps: int
    num_stages: int


def extend_config(rows: int, head_dim: int, itemsize: int, capability: int) -> ExtendConfig:
    """Choose the launch from shapes and the kind of GPU.

    Args:
        rows: Query rows per KV head, tokens times heads of a group.
        head_dim: Elements per head vector.
        itemsize: Bytes per element.
        capability: Major compute capability; before 9 the products live in fewer registers.
    """
    if itemsize == 4:  # products without tensor cores, held in registers
        return ExtendConfig(16, 16, num_warps=4, num_stages=2)
    if head_dim > 128:
        return ExtendConfig(64, 32, num_warps=8, num_stages=2)
    if rows <= 16:
        return ExtendConfig(16, 64, num_warps=4, num_stages=3)
    if rows <= 64:
        return ExtendConfig(64, 64, num_warps=8, num_stages=2)
    return ExtendConfig(128, 64 if capability >= 9 else 32, num_warps=8, num_stages=3)


_LOG2_E = 1.4426950408889634


def _extend_attention_triton(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    key: Tensor,
    value: Tensor,
    num_valid: Tensor | None,
    valid: Tensor | None,
    scale: float,
    lse: Tensor | None = None,
) -> Tensor:
    from trimkv_kernels.kernels._triton.extend_attention import _extend_attention_kernel

    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, num_slots = key.shape[1:3]
    group = num_heads // num_kv_heads
    config = tuned(
        "extend_attention", query.device, extend_config,
        q_len * group, head_dim, query.element_size(), compute_capability(query.device),
    )  # fmt: skip
    tiles = -(-q_len * group // config.block_m)
    num_valid, valid = (None if x is None else x.contiguous() for x in (num_valid, valid))
    output = query.new_empty(query.shape)
    with device_guard(query.device):
        _extend_attention_kernel[(tiles * batch * num_kv_heads,)](
            query, new_key, new_value, key, value, num_valid, valid, output, lse, scale * _LOG2_E,
            num_kv_heads, num_slots, q_len, *query.stride()[:3], *new_key.stride()[:3],
            *new_value.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            GROUP=group, HEAD_DIM=head_dim, BLOCK_M=config.block_m, BLOCK_S=config.block_s,
            BLOCK_D=max(16, 1 << (head_dim - 1).bit_length()), UPCAST=is_interpreted(),
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return output


# Opaque to `torch.compile`; only the log-sum-exp is written to.
_LIBRARY = torch.library.Library("trimkv_kernels", "FRAGMENT")
_LIBRARY.define(
    "extend_attention(Tensor query, Tensor new_key, Tensor new_value, Tensor key, Tensor value, "
    "Tensor? num_valid, Tensor? valid, float scale, Tensor(a!)? lse=None) -> Tensor"
)
_LIBRARY.impl("extend_attention", _extend_attention_triton, "CompositeExplicitAutograd")
torch.library.register_fake(
    "trimkv_kernels::extend_attention",
    lambda query, *_, **__: query.new_empty(query.shape),
    lib=_LIBRARY,
)
