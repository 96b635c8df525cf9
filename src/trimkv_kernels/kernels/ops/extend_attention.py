"""Attention of a call of any length to the valid slots and causally to itself."""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from trimkv_kernels.kernels._torch import extend_attention as _torch
from trimkv_kernels.kernels.checks import BOOL, FLOAT32, FLOAT_DTYPES, INT32, Shape, check_groups
from trimkv_kernels.kernels.launch import (
    block_d,
    compute_capability,
    dense,
    device_guard,
    is_interpreted,
    log2_scale,
    num_multiprocessors,
)
from trimkv_kernels.kernels.op import op
from trimkv_kernels.kernels.tuning import tuned


@dataclass(frozen=True)
class ExtendConfig:
    """How an extend launch is laid out.

    Attributes:
        block_m: Query rows per program, tokens times heads of a group.
        block_s: Slots or tokens per tile.
        num_warps: Warps per program.
        num_stages: Tiles in flight.
        splits: Programs that share the slots of a head, a power of two.
    """

    block_m: int
    block_s: int
    num_warps: int
    num_stages: int
    splits: int = 1


def extend_config(
    rows: int,
    head_dim: int,
    itemsize: int,
    capability: int,
    num_heads: int,
    num_slots: int,
    num_sms: int,
) -> ExtendConfig:
    """Choose the launch from shapes and the kind of GPU, never from what the slots hold.

    Args:
        rows: Query rows per KV head, tokens times heads of a group.
        head_dim: Elements per head vector.
        itemsize: Bytes per element.
        capability: Major compute capability; before 9 the products live in fewer registers.
        num_heads: KV heads over all sequences.
        num_slots: Slots per head.
        num_sms: Multiprocessors of the device.
    """
    config = _tiles(rows, head_dim, itemsize, capability)
    programs = -(-rows // config.block_m) * num_heads
    most = min(num_sms // max(programs, 1), num_slots // _MIN_SPLIT_SLOTS, _MAX_SPLITS)
    return replace(config, splits=1 << (max(most, 1).bit_length() - 1))


_MIN_SPLIT_SLOTS = 64
_MAX_SPLITS = 64
_MERGE_NUMBERS = 32  # of parts that are loaded together, per thread


def _tiles(rows: int, head_dim: int, itemsize: int, capability: int) -> ExtendConfig:
    if itemsize == 4:  # products without tensor cores, held in registers
        return ExtendConfig(16, 16, num_warps=4, num_stages=2)
    if head_dim > 128:
        return ExtendConfig(64, 32, num_warps=8, num_stages=2)
    if rows <= 16:
        return ExtendConfig(16, 64, num_warps=4, num_stages=3)
    if rows <= 64:
        return ExtendConfig(64, 64, num_warps=8, num_stages=2)
    return ExtendConfig(128, 64 if capability >= 9 else 32, num_warps=8, num_stages=3)


def _check(query: Tensor, key: Tensor, **_: object) -> None:
    check_groups(query, key.shape[1])


@op(
    torch=_torch.extend_attention,
    writes=("lse",),
    check=_check,
    fake=lambda query, **_: query.new_empty(query.shape),
)
def extend_attention(
    query: Annotated[Tensor, Shape("batch, num_heads, q_len, head_dim", FLOAT_DTYPES, rows=True)],
    new_key: Annotated[Tensor, Shape("batch, num_kv_heads, q_len, head_dim", rows=True)],
    new_value: Annotated[Tensor, Shape("batch, num_kv_heads, q_len, head_dim", rows=True)],
    key: Annotated[Tensor, Shape("batch, num_kv_heads, num_slots, head_dim", rows=True)],
    value: Annotated[Tensor, Shape("batch, num_kv_heads, num_slots, head_dim", rows=True)],
    num_valid: Annotated[Tensor | None, Shape("batch, num_kv_heads", INT32)] = None,
    *,
    valid: Annotated[Tensor | None, Shape("batch, q_len", BOOL)] = None,
    scale: float | None = None,
    lse: Annotated[Tensor | None, Shape("batch, num_heads, q_len", FLOAT32, dense=True)] = None,
    impl: str = "auto",
) -> Tensor:
    """Attend new tokens to all valid slots and causally to themselves.

    Args:
        query: ``[batch, num_heads, q_len, head_dim]``, fp32, fp16 or bf16.
        new_key: ``[batch, num_kv_heads, q_len, head_dim]``, dtype of ``query``.
        new_value: As ``new_key``.
        key: ``[batch, num_kv_heads, num_slots, head_dim]``, dtype of ``query``; ``num_slots`` may
            be 0.
        value: As ``key``.
        num_valid: ``[batch, num_kv_heads]`` int32, front-packed valid slots; None when all are.
            The other slots must hold finite numbers too.
        valid: ``[batch, q_len]`` bool, False for padding; None when every token is real.
        scale: Softmax scale; ``None`` means ``head_dim ** -0.5``.
        lse: ``[batch, num_heads, q_len]`` fp32; written to: the log-sum-exp of the scaled products,
            natural logarithms, unspecified at padding. `column_mass` needs it.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Returns:
        Like ``query``. The output of padding is finite and otherwise unspecified.

    Raises:
        ValueError: A shape, dtype, stride or device disagrees.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    from trimkv_kernels.kernels._triton.extend_attention import _extend_attention_kernel

    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, num_slots = key.shape[1:3]
    group = num_heads // num_kv_heads
    config = tuned(
        "extend_attention", query.device, extend_config,
        q_len * group, head_dim, query.element_size(), compute_capability(query.device),
        batch * num_kv_heads, num_slots, num_multiprocessors(query.device),
    )  # fmt: skip
    units = -(-q_len * group // config.block_m) * batch * num_kv_heads
    whole_tiles = -(-num_slots // (config.splits * config.block_s))
    arrival = part = None
    parts = 1
    if config.splits > 1:
        arrival = query.new_zeros(units, dtype=torch.int32)
        numbers = config.block_m * (head_dim + 2)
        part = query.new_empty(units * config.splits * numbers, dtype=torch.float32)
        most = _MERGE_NUMBERS * 32 * config.num_warps // (config.block_m * block_d(head_dim))
        parts = min(config.splits, max(most, 1))
    num_valid, valid = dense(num_valid, valid)
    output = query.new_empty(query.shape)
    with device_guard(query.device):
        _extend_attention_kernel[(units * config.splits,)](
            query, new_key, new_value, key, value, num_valid, valid,
            arrival, part, output, lse,
            log2_scale(scale, head_dim), num_kv_heads, num_slots, q_len,
            whole_tiles * config.block_s,
            *query.stride()[:3], *new_key.stride()[:3],
            *new_value.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            GROUP=group, HEAD_DIM=head_dim, SPLITS=config.splits, PARTS=parts,
            BLOCK_M=config.block_m, BLOCK_S=config.block_s, BLOCK_D=block_d(head_dim),
            UPCAST=is_interpreted(), num_warps=config.num_warps, num_stages=config.num_stages,
            enable_fp_fusion=True,
        )  # fmt: skip
    return output
