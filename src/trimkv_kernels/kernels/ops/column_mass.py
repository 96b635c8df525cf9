"""The attention that each slot and each new token receives in a call of several tokens."""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from trimkv_kernels.kernels._torch import column_mass as _torch
from trimkv_kernels.kernels.checks import (
    BOOL,
    FLOAT32,
    FLOAT_DTYPES,
    INT32,
    REDUCES,
    Shape,
    check_choice,
    check_groups,
    check_int,
)
from trimkv_kernels.kernels.launch import (
    block_d,
    dense,
    device_guard,
    is_interpreted,
    log2_scale,
)
from trimkv_kernels.kernels.op import op
from trimkv_kernels.kernels.tuning import tuned


@dataclass(frozen=True)
class ColumnConfig:
    """How a launch is laid out.

    Attributes:
        block_m: Queries per tile.
        block_s: Columns per program.
        num_warps: Warps per program.
        num_stages: Tiles in flight.
    """

    block_m: int
    block_s: int
    num_warps: int
    num_stages: int


def column_config(queries: int, head_dim: int, itemsize: int) -> ColumnConfig:
    """Choose the launch from shapes.

    Args:
        queries: Queries of one head.
        head_dim: Elements per head vector.
        itemsize: Bytes per element.
    """
    if itemsize == 4:  # products without tensor cores, held in registers
        return ColumnConfig(16, 32, num_warps=4, num_stages=2)
    if head_dim > 128:
        return ColumnConfig(32, 64, num_warps=4, num_stages=2)
    return ColumnConfig(32 if queries <= 32 else 64, 128, num_warps=8, num_stages=3)


def _check(query: Tensor, key: Tensor, queries: int | None, reduce: str, **_: object) -> None:
    q_len = query.shape[2]
    check_groups(query, key.shape[1])
    check_int("queries", q_len if queries is None else queries, min(1, q_len), q_len)
    check_choice("reduce", reduce, REDUCES)


def _like_columns(query: Tensor, key: Tensor, lse: Tensor, reduce: str, **_: object) -> Tensor:
    heads = query.shape[1] if reduce == "none" else key.shape[1]
    return lse.new_empty(query.shape[0], heads, key.shape[2] + query.shape[2])


@op(torch=_torch.column_mass, check=_check, fake=_like_columns)
def column_mass(
    query: Annotated[Tensor, Shape("batch, num_heads, q_len, head_dim", FLOAT_DTYPES, rows=True)],
    new_key: Annotated[Tensor, Shape("batch, num_kv_heads, q_len, head_dim", rows=True)],
    key: Annotated[Tensor, Shape("batch, num_kv_heads, num_slots, head_dim", rows=True)],
    lse: Annotated[Tensor, Shape("batch, num_heads, q_len", FLOAT32)],
    num_valid: Annotated[Tensor | None, Shape("batch, num_kv_heads", INT32)] = None,
    *,
    valid: Annotated[Tensor | None, Shape("batch, q_len", BOOL)] = None,
    scale: float | None = None,
    queries: int | None = None,
    reduce: str = "sum",
    count_below: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Sum the softmax probabilities that a call's queries give each candidate.

    The attention is that of :func:`extend_attention`: to all valid slots, and causally to the call.
    Each query head sums over its queries; the heads of a group are then reduced. Memory is linear
    in the call's length.

    With ``count_below``, the op counts the queries that give a candidate less than an even share,
    the statistic of Scissorhands (Liu et al., arXiv 2305.17118).

    Args:
        query: ``[batch, num_heads, q_len, head_dim]``, fp32, fp16 or bf16.
        new_key: ``[batch, num_kv_heads, q_len, head_dim]``, dtype of ``query``.
        key: ``[batch, num_kv_heads, num_slots, head_dim]``, dtype of ``query``; ``num_slots`` may
            be 0.
        lse: ``[batch, num_heads, q_len]`` fp32, what :func:`extend_attention` writes.
        num_valid: ``[batch, num_kv_heads]`` int32, front-packed valid slots; None when all are.
        valid: ``[batch, q_len]`` bool, False for padding, which gives and receives nothing; None
            when every token is real.
        scale: Softmax scale; ``None`` means ``head_dim ** -0.5``.
        queries: How many of the last queries of the call count, 1 to ``q_len``; None means all.
        reduce: ``"sum"``, ``"mean"`` or ``"max"``, over the query heads of a group, or ``"none"``.
        count_below: Instead of summing, count the real queries that see a candidate and give it a
            probability, reduced over the group, strictly below ``1 / n``. ``n`` is how many tokens
            a query sees: the valid slots of its head, and the real tokens of the call up to itself.
            If a probability equals ``1 / n`` and ``n`` is not 1, rounding decides.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Returns:
        ``[batch, num_kv_heads, num_slots + q_len]`` fp32, or with ``reduce="none"``
        ``[batch, num_heads, num_slots + q_len]``: the slots, then the new tokens. Slots that are
        not valid and padding receive 0.

    Raises:
        ValueError: A shape, dtype, stride or device disagrees, ``queries`` is out of range, or
            ``reduce`` is unknown.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    from trimkv_kernels.kernels._triton.column_mass import _column_mass_kernel

    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, num_slots = key.shape[1:3]
    queries = q_len if queries is None else queries
    config = tuned(
        "column_mass", query.device, column_config, queries, head_dim, query.element_size()
    )
    if count_below:  # reduced shares take registers, and a loop over a group is short
        config = replace(config, block_m=min(config.block_m, 32), num_stages=2)
    tiles = -(-num_slots // config.block_s) + -(-q_len // config.block_s)
    num_valid, valid = dense(num_valid, valid)
    number = valid.cumsum(1, dtype=torch.int32) if count_below and valid is not None else None
    heads = num_heads if reduce == "none" else num_kv_heads
    output = lse.new_empty(batch, heads, num_slots + q_len)
    with device_guard(query.device):
        _column_mass_kernel[(tiles * batch * heads,)](
            query, new_key, key, lse.contiguous(), num_valid, valid, number, output,
            log2_scale(scale, head_dim), num_kv_heads, num_slots, q_len, q_len - queries,
            *query.stride()[:3], *new_key.stride()[:3], *key.stride()[:3],
            GROUP=num_heads // heads, SHARED_BY=heads // num_kv_heads, HEAD_DIM=head_dim,
            REDUCE=reduce, COUNT_BELOW=count_below,
            BLOCK_M=config.block_m, BLOCK_S=config.block_s,
            BLOCK_D=block_d(head_dim), UPCAST=is_interpreted(),
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return output
