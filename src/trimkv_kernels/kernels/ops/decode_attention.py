"""Attention of one new token per sequence to the valid slots of a bounded cache."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from trimkv_kernels.kernels._torch import decode_attention as _torch
from trimkv_kernels.kernels.checks import (
    BOOL,
    FLOAT32,
    FLOAT_DTYPES,
    INT32,
    REDUCES,
    Shape,
    check_choice,
    check_contiguous,
    check_groups,
    check_int,
    check_tensor,
)
from trimkv_kernels.kernels.launch import (
    block_d,
    dense,
    device_guard,
    is_amd,
    is_interpreted,
    log2_scale,
    num_multiprocessors,
    power_of_2,
)
from trimkv_kernels.kernels.op import Uses, op
from trimkv_kernels.kernels.prologue import Decay, Rope, check_prologue, launch_arguments
from trimkv_kernels.kernels.slots import Slots
from trimkv_kernels.kernels.tuning import tuned


@dataclass(frozen=True)
class DecodeConfig:
    """How a decode launch is laid out.

    Attributes:
        splits: Programs per KV head, a power of two.
        block_s: Slots per tile.
        num_warps: Warps per program.
        num_stages: Tiles in flight.
    """

    splits: int
    block_s: int
    num_warps: int
    num_stages: int


def decode_config(
    num_heads: int, num_slots: int, head_dim: int, itemsize: int, num_sms: int
) -> DecodeConfig:
    """Choose the launch from shapes alone, so that it does not depend on what the slots hold.

    Args:
        num_heads: KV heads over all sequences.
        num_slots: Slots per head.
        head_dim: Elements per head vector.
        itemsize: Bytes per element.
        num_sms: Multiprocessors of the device.
    """
    wanted = 2 * num_sms // num_heads
    most = min(wanted, num_slots // _MIN_SPLIT_SLOTS, _MAX_SPLITS)
    splits = 1 << (max(most, 1).bit_length() - 1)
    block_s = _TILE_BYTES // (block_d(head_dim) * itemsize)
    # Products of fp32 are held in registers, without tensor cores; four warps would spill.
    num_warps = 8 if itemsize == 4 else 4
    return DecodeConfig(splits, min(max(block_s, 16), 128), num_warps, num_stages=3)


_MIN_SPLIT_SLOTS = 64
_MAX_SPLITS = 64  # the kernel counts arrivals in the seven bits above the count
_MAX_SLOTS = 2**24 - 1
_TILE_BYTES = 16384
_MERGE_NUMBERS = 8192  # of parts that are loaded together, 64 per thread


def parts_at_once(most: int, members: int, head_dim: int) -> int:
    """How many parts of a head a program loads together, a power of two as ``most`` is."""
    return min(most, max(_MERGE_NUMBERS // (members * block_d(head_dim)), 1))


def _check_mass(query: Tensor, position: Tensor, mass: Tensor | None, reduce: str) -> None:
    """Check that ``mass`` has the shape of ``position``, except for the number of heads."""
    check_choice("mass_reduce", reduce, REDUCES)
    if mass is not None:
        *rows, num_kv_heads, num_slots = position.shape
        heads = query.shape[1] if reduce == "none" else num_kv_heads
        check_tensor("mass", mass, (*rows, heads, num_slots), FLOAT32, query.device)
        check_contiguous("mass", mass)


def _check_decode(
    query: Tensor, key: Tensor, mass: Tensor | None, mass_reduce: str, **_: object
) -> None:
    check_groups(query, key.shape[1])
    _check_mass(query, key[..., 0], mass, mass_reduce)


def _check_append(
    query: Tensor,
    slots: Slots,
    layer: int,
    rows: Tensor | None,
    new_slope: Tensor | None,
    new_offset: Tensor | None,
    decay: Decay | None,
    rope: Rope | None,
    mass: Tensor | None,
    mass_reduce: str,
    **_: object,
) -> None:
    check_groups(query, slots.key.shape[2])
    slots.row_strides(rows)
    if rows is not None and mass is not None:
        raise ValueError("mass is of rows in the order of the call: pass it without rows=")
    check_int("layer", layer, 0, slots.key.shape[0] - 1)
    check_int("num_slots", slots.key.shape[3], 0, _MAX_SLOTS)
    given = {"slope": slots.slope, "offset": slots.offset}
    check_prologue(rope, decay, given | {"new_slope": new_slope, "new_offset": new_offset})
    _check_mass(query, slots.key[..., 0], mass, mass_reduce)


def _launch_arguments(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    mass: Tensor | None,
    reduce: str,
    accumulate: bool,
) -> tuple[int, float, int, Tensor | None, Tensor | None, dict[str, Any]]:
    """Grid, base-2 scale, slots per split, scratch and compile-time arguments of either kernel.

    The scratch is one tensor for the splits' parts and one for the logits that become ``mass``.
    """
    num_kv_heads, num_slots, head_dim = key.shape[-3:]
    num_heads, group = query.shape[0] * num_kv_heads, query.shape[1] // num_kv_heads
    config = tuned(
        "decode_attention", query.device, decode_config,
        num_heads, num_slots, head_dim, key.element_size(), num_multiprocessors(query.device),
    )  # fmt: skip
    grid = num_heads * config.splits
    split_slots = -(-num_slots // (config.splits * 16)) * 16
    part = None
    if config.splits > 1:
        part = query.new_empty(grid * group * (head_dim + 2), dtype=torch.float32)
    logits = None
    if mass is not None:
        logits = query.new_empty(num_heads * group * num_slots, dtype=torch.float32)
    members = power_of_2(group)
    constants = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "SPLITS": config.splits,
        "MEMBERS": members,
        "PARTS": parts_at_once(config.splits, members, head_dim),
        "BLOCK_G": block_d(group),
        "BLOCK_S": config.block_s,
        "BLOCK_D": block_d(head_dim),
        "BLOCK_P": min(power_of_2(num_slots), 1024),
        "UPCAST": is_interpreted(),
        "MASS": None if mass is None else reduce,
        "ACCUMULATE": mass is not None and accumulate,
        "num_warps": config.num_warps,
        # a third tile does not fit the 64 KB of an AMD GPU
        "num_stages": min(config.num_stages, 2) if is_amd() else config.num_stages,
        "enable_fp_fusion": True,
    }
    return grid, log2_scale(scale, head_dim), split_slots, part, logits, constants


def _like_query(query: Tensor, **_: object) -> Tensor:
    return query.new_empty(query.shape)


@op(torch=_torch.decode_attention, writes=("lse", "mass"), check=_check_decode, fake=_like_query)
def decode_attention(
    query: Annotated[Tensor, Shape("batch, num_heads, head_dim", FLOAT_DTYPES, rows=True)],
    key: Annotated[Tensor, Shape("batch, num_kv_heads, num_slots, head_dim", rows=True)],
    value: Annotated[Tensor, Shape("batch, num_kv_heads, num_slots, head_dim", rows=True)],
    num_valid: Annotated[Tensor | None, Shape("batch, num_kv_heads", INT32)] = None,
    *,
    scale: float | None = None,
    lse: Annotated[Tensor | None, Shape("batch, num_heads", FLOAT32, dense=True)] = None,
    mass: Tensor | None = None,
    mass_reduce: str = "sum",
    mass_accumulate: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Attend one query token per sequence to the valid cache slots.

    Args:
        query: ``[batch, num_heads, head_dim]``, fp32, fp16 or bf16.
        key: ``[batch, num_kv_heads, num_slots, head_dim]``, dtype of ``query``, head vectors
            contiguous. ``num_heads`` is a multiple of ``num_kv_heads``.
        value: As ``key``.
        num_valid: ``[batch, num_kv_heads]`` int32, how many slots of each head are valid (slots are
            front-packed); ``None`` when all are. The other slots must hold finite numbers too.
        scale: Softmax scale; ``None`` means ``head_dim ** -0.5``.
        lse: ``[batch, num_heads]`` fp32; written to: the log-sum-exp of the scaled products,
            natural logarithms, -inf for a head without a valid slot.
        mass: ``[batch, num_kv_heads, num_slots]`` fp32; updated with the softmax probability that
            this query gives each valid slot, reduced over the query heads of its group. With
            ``mass_reduce="none"`` ``[batch, num_heads, num_slots]``.
        mass_reduce: ``"sum"``, ``"mean"`` or ``"max"``, over the group, or ``"none"``.
        mass_accumulate: If True, add to ``mass``; slots that are not valid do not change. If False,
            overwrite it, with 0 at slots that are not valid.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Returns:
        ``[batch, num_heads, head_dim]``, dtype of ``query``. A head without a valid slot gives 0.

    Raises:
        ValueError: A shape, dtype, stride or device disagrees, or ``mass_reduce`` is unknown;
            the message names the argument, what was expected and what came.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    from trimkv_kernels.kernels._triton.decode_attention import _decode_attention_kernel

    grid, scale_log2, split_slots, part, logits, constants = _launch_arguments(
        query, key, scale, mass, mass_reduce, mass_accumulate
    )
    arrival = None if part is None else query.new_zeros(key.shape[:2], dtype=torch.int32)
    output = query.new_empty(query.shape)
    with device_guard(query.device):
        _decode_attention_kernel[(grid,)](
            query, key, value, *dense(num_valid),
            arrival, part, output, lse, logits, mass, scale_log2,
            key.shape[1], key.shape[2], split_slots,
            *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], **constants,
        )  # fmt: skip
    return output


@op(
    torch=_torch.append_attention,
    writes=(
        *("slots.key", "slots.value", "slots.position", "slots.num_valid"),
        *("slots.slope", "slots.offset", "lse", "mass"),
    ),
    check=_check_append,
    fake=_like_query,
)
def append_attention(
    query: Annotated[Tensor, Shape("batch, num_heads, head_dim", FLOAT_DTYPES, rows=True)],
    new_key: Annotated[Tensor, Shape("batch, num_kv_heads, head_dim", rows=True)],
    new_value: Annotated[Tensor, Shape("batch, num_kv_heads, head_dim", rows=True)],
    slots: Annotated[
        Slots, Uses("key", "value", "position", "num_valid", "capacity", "slope", "offset")
    ],
    t: Annotated[Tensor, Shape("batch", INT32)],
    *,
    layer: int,
    rows: Annotated[Tensor | None, Shape("batch", INT32)] = None,
    valid: Annotated[Tensor | None, Shape("batch", BOOL)] = None,
    new_slope: Annotated[Tensor | None, Shape("batch, num_kv_heads", FLOAT32)] = None,
    new_offset: Annotated[Tensor | None, Shape("batch, num_kv_heads", FLOAT32)] = None,
    decay: Decay | None = None,
    rope: Rope | None = None,
    scale: float | None = None,
    lse: Annotated[Tensor | None, Shape("batch, num_heads", FLOAT32, dense=True)] = None,
    mass: Tensor | None = None,
    mass_reduce: str = "sum",
    mass_accumulate: bool = False,
    packed: bool = False,
    rows_apart: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Store one token per sequence in one layer's slots, then attend to all of them.

    The pair goes into the first slot that is not valid, and ``num_valid`` grows by one. A head that
    has filled its ``capacity`` stores nothing and attends to what it has, so evict before that.

    Args:
        query: ``[batch, num_heads, head_dim]``, fp32, fp16 or bf16.
        new_key: ``[batch, num_kv_heads, head_dim]``, dtype of ``query``.
        new_value: As ``new_key``.
        slots: Of all layers. Updated: ``key`` and ``value``, of the dtype of ``query``,
            ``position``, ``num_valid``, and ``slope`` and ``offset`` if there are any.
        t: ``[batch]`` int32, tokens seen including this one: the token's position is ``t - 1``.
        layer: Which layer to use.
        rows: ``[batch]`` int32, the row of ``slots`` for each row of the call, none of them twice.
            Then ``slots`` has one layer and any number of rows, with gaps between them. None: they
            are the rows of the call, and dense.
        valid: ``[batch]`` bool, False for padding: nothing is stored, and the output is attention
            to the slots that were valid before, 0 if there were none.
        new_slope: ``[batch, num_kv_heads]`` fp32, the new token's. With ``new_offset`` and the
            slope and offset of ``slots``, or none of the four.
        new_offset: As ``new_slope``.
        decay: A gate's output, which gives both in their place, see :class:`Decay`.
        rope: ``query`` and ``new_key`` come before their norm and rotation, see :class:`Rope`,
            which are done here. The key is stored as it is after them.
        scale: Softmax scale; ``None`` means ``head_dim ** -0.5``.
        lse: ``[batch, num_heads]`` fp32; written to: the log-sum-exp of the scaled products,
            natural logarithms, -inf for a head without a valid slot.
        mass: ``[layers, batch, num_kv_heads, num_slots]`` fp32; updated with the softmax
            probability that this query gives each valid slot, the new token's included, reduced
            over the query heads of its group. Padding gives nothing to any slot. With
            ``mass_reduce="none"`` ``[layers, batch, num_heads, num_slots]``.
        mass_reduce: ``"sum"``, ``"mean"`` or ``"max"``, over the group, or ``"none"``.
        mass_accumulate: If True, add to ``mass``; slots that are not valid and rows with padding do
            not change. If False, overwrite it, with 0 at such slots and rows.
        packed: Allow a faster attention on torch, whose bits differ from transformers' full cache.
            Triton is not affected.
        rows_apart: On torch, give each row bits that do not depend on what the other rows hold, by
            attending to all slots under a mask; ``packed`` is not read then. On Triton they never
            depend on them.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Returns:
        ``[batch, num_heads, head_dim]``, dtype of ``query``.

    Raises:
        ValueError: A shape, dtype, stride or device disagrees, ``layer`` does not exist,
            ``mass_reduce`` is unknown, only some of the slope and offset tensors were given, one
            norm without the other, or ``mass`` with ``rows``.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    from trimkv_kernels.kernels._triton.decode_attention import _append_attention_kernel

    key, value, num_slots = slots.key, slots.value, slots.num_slots
    _, num_rows, num_kv_heads = slots.num_valid.shape
    grid, scale_log2, split_slots, part, logits, constants = _launch_arguments(
        query, key, scale, mass, mass_reduce, mass_accumulate
    )
    valid, rows = dense(valid, rows)
    output = query.new_empty(query.shape)
    with device_guard(query.device):
        _append_attention_kernel[(grid,)](
            query, new_key, new_value, key, value, slots.position, slots.num_valid,
            slots.capacity, rows, t.contiguous(), valid, slots.slope, slots.offset,
            *launch_arguments(new_slope, new_offset, rope, decay),
            part, output, lse, logits, mass, scale_log2,
            layer, num_rows * num_kv_heads, num_kv_heads, num_slots, split_slots,
            *slots.row_strides(rows),
            *query.stride()[:2], *new_key.stride()[:2], *new_value.stride()[:2], **constants,
        )  # fmt: skip
    return output
