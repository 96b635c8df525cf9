"""Attention of one new token per sequence to the valid slots of a bounded cache."""

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from trimkv_kernels.kernels import reference
from trimkv_kernels.kernels._dispatch import (
    FLOAT_DTYPES,
    check_contiguous,
    check_int,
    check_rank,
    check_reduce,
    check_tensor,
    check_unit_stride,
    device_guard,
    is_amd,
    is_interpreted,
    num_multiprocessors,
    resolve_impl,
)
from trimkv_kernels.kernels.tuning import tuned


@overload
def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, num_valid: Tensor | None = ..., *,
    scale: float | None = ..., return_lse: Literal[False] = ..., mass: Tensor | None = ...,
    mass_reduce: str = ..., mass_accumulate: bool = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, num_valid: Tensor | None = ..., *,
    scale: float | None = ..., return_lse: Literal[True], mass: Tensor | None = ...,
    mass_reduce: str = ..., mass_accumulate: bool = ..., impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_valid: Tensor | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    mass: Tensor | None = None,
    mass_reduce: str = "sum",
    mass_accumulate: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend one query token per sequence to the valid cache slots.

    Args:
        query: ``[batch, num_heads, head_dim]``, fp32, fp16 or bf16.
        key: ``[batch, num_kv_heads, num_slots, head_dim]``, dtype of ``query``, head vectors
            contiguous. ``num_heads`` is a multiple of ``num_kv_heads``.
        value: As ``key``.
        num_valid: ``[batch, num_kv_heads]`` int32, how many slots of each head are valid (slots are
            front-packed); ``None`` when all are. What lies in the other slots must be finite.
        scale: Softmax scale; ``None`` means ``head_dim ** -0.5``.
        return_lse: Also return the log-sum-exp of the scaled products.
        mass: ``[batch, num_kv_heads, num_slots]`` fp32; updated with the softmax
            probability that each valid slot is given by this query, reduced over the query heads
            of its group. With ``mass_reduce="none"`` ``[batch, num_heads, num_slots]``.
        mass_reduce: ``"sum"``, ``"mean"`` or ``"max"``, over the group, or ``"none"``.
        mass_accumulate: Whether to add to ``mass``, and leave slots that are not valid alone, or to
            store into it, 0 at slots that are not valid.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Returns:
        ``[batch, num_heads, head_dim]``, dtype of ``query``. A head without a valid slot gives 0.
        With ``return_lse`` a pair of that and ``[batch, num_heads]`` fp32, natural logarithms,
        -inf for a head without a valid slot.

    Raises:
        ValueError: A shape, dtype, stride or device disagrees, or ``mass_reduce`` is unknown;
            the message names the argument, what was expected and what came.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    check_rank("query", query, "batch, num_heads, head_dim")
    check_rank("key", key, "batch, num_kv_heads, num_slots, head_dim")
    batch, _, head_dim = query.shape
    _check_query(query, query.shape, key.shape[1])
    slots = (batch, key.shape[1], key.shape[2], head_dim)
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(name, tensor, slots, (query.dtype,), query.device)
        check_unit_stride(name, tensor)
    if num_valid is not None:
        check_tensor("num_valid", num_valid, slots[:2], (torch.int32,), query.device)
    _check_mass(mass, mass_reduce, slots[:3], query)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32) if return_lse else None
    scale = head_dim**-0.5 if scale is None else scale
    arguments = (query, key, value, num_valid, scale, lse, mass, mass_reduce, mass_accumulate)
    output: Tensor
    if resolve_impl(impl, query.device) == "torch":
        output = reference.decode_attention(*arguments)
    else:
        output = torch.ops.trimkv_kernels.decode_attention(*arguments)
    return output if lse is None else (output, lse)


@overload
def append_attention(
    query: Tensor, new_key: Tensor, new_value: Tensor, key: Tensor, value: Tensor,
    position: Tensor, num_valid: Tensor, t: Tensor, *, layer: int, valid: Tensor | None = ...,
    slope: Tensor | None = ..., offset: Tensor | None = ..., new_slope: Tensor | None = ...,
    new_offset: Tensor | None = ..., scale: float | None = ..., return_lse: Literal[False] = ...,
    mass: Tensor | None = ..., mass_reduce: str = ..., mass_accumulate: bool = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def append_attention(
    query: Tensor, new_key: Tensor, new_value: Tensor, key: Tensor, value: Tensor,
    position: Tensor, num_valid: Tensor, t: Tensor, *, layer: int, valid: Tensor | None = ...,
    slope: Tensor | None = ..., offset: Tensor | None = ..., new_slope: Tensor | None = ...,
    new_offset: Tensor | None = ..., scale: float | None = ..., return_lse: Literal[True],
    mass: Tensor | None = ..., mass_reduce: str = ..., mass_accumulate: bool = ..., impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def append_attention(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    num_valid: Tensor,
    t: Tensor,
    *,
    layer: int,
    valid: Tensor | None = None,
    slope: Tensor | None = None,
    offset: Tensor | None = None,
    new_slope: Tensor | None = None,
    new_offset: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    mass: Tensor | None = None,
    mass_reduce: str = "sum",
    mass_accumulate: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Store one token per sequence in one layer's slots, then attend to all of them.

    The row goes behind the valid slots, and ``num_valid`` grows by one. A head that is full stores
    nothing and attends to what it has; evict before that.

    Args:
        query: ``[batch, num_heads, head_dim]``, fp32, fp16 or bf16.
        new_key: ``[batch, num_kv_heads, head_dim]``, dtype of ``query``.
        new_value: As ``new_key``.
        key: ``[layers, batch, num_kv_heads, num_slots, head_dim]``, dtype of ``query``; updated.
            What lies in slots that are not valid must be finite.
        value: As ``key``; updated.
        position: ``[layers, batch, num_kv_heads, num_slots]`` int32; updated.
        num_valid: ``[layers, batch, num_kv_heads]`` int32; updated.
        t: ``[batch]`` int32, tokens seen including this one: the token's position is ``t - 1``.
        layer: Which layer to use.
        valid: ``[batch]`` bool; where False the token is a pad: nothing is stored, and its output
            is attention over the slots that were there, 0 if there were none.
        slope: Like ``position`` but fp32; updated. With ``offset``, ``new_slope`` and
            ``new_offset``, or none of the four.
        offset: As ``slope``; updated.
        new_slope: ``[batch, num_kv_heads]`` fp32, the new token's.
        new_offset: As ``new_slope``.
        scale: Softmax scale; ``None`` means ``head_dim ** -0.5``.
        return_lse: Also return the log-sum-exp of the scaled products.
        mass: ``[layers, batch, num_kv_heads, num_slots]`` fp32; updated with the softmax
            probability that each valid slot is given by this query, reduced over the query heads
            of its group; the new token's slot is one of them. A pad gives nothing to any slot. With
            ``mass_reduce="none"`` ``[layers, batch, num_heads, num_slots]``.
        mass_reduce: ``"sum"``, ``"mean"`` or ``"max"``, over the group, or ``"none"``.
        mass_accumulate: Whether to add to ``mass``, and leave slots that are not valid and rows
            with a pad alone, or to store into it, 0 at such slots and rows.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Returns:
        ``[batch, num_heads, head_dim]``, dtype of ``query``. With ``return_lse`` a pair of that and
        ``[batch, num_heads]`` fp32, natural logarithms, -inf for a head without a valid slot.

    Raises:
        ValueError: A shape, dtype, stride or device disagrees, ``layer`` does not exist,
            ``mass_reduce`` is unknown, or only some of the slope and offset tensors were given.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    check_rank("query", query, "batch, num_heads, head_dim")
    check_rank("key", key, "layers, batch, num_kv_heads, num_slots, head_dim")
    layers, _, num_kv_heads, num_slots, head_dim = key.shape
    batch, device = query.shape[0], query.device
    _check_query(query, (batch, query.shape[1], head_dim), num_kv_heads)
    check_int("layer", layer, 0, layers - 1)
    state = (layers, batch, num_kv_heads, num_slots)
    for name, new in (("new_key", new_key), ("new_value", new_value)):
        check_tensor(name, new, (batch, num_kv_heads, head_dim), (query.dtype,), device)
        check_unit_stride(name, new)
    for name, base in (("key", key), ("value", value)):
        check_tensor(name, base, (*state, head_dim), (query.dtype,), device)
        check_contiguous(name, base)
    for name, count, shape in (("position", position, state), ("num_valid", num_valid, state[:3])):
        check_tensor(name, count, shape, (torch.int32,), device)
        check_contiguous(name, count)
    check_tensor("t", t, (batch,), (torch.int32,), device)
    if valid is not None:
        check_tensor("valid", valid, (batch,), (torch.bool,), device)
    _check_affine(slope, offset, new_slope, new_offset, state, device)
    _check_mass(mass, mass_reduce, state, query)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32) if return_lse else None
    output = append_attention_unchecked(
        query, new_key, new_value, key, value, position, num_valid, t, layer, valid,
        slope, offset, new_slope, new_offset, head_dim**-0.5 if scale is None else scale,
        lse, mass, mass_reduce, mass_accumulate, resolve_impl(impl, device),
    )  # fmt: skip
    return output if lse is None else (output, lse)


def append_attention_unchecked(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    num_valid: Tensor,
    t: Tensor,
    layer: int,
    valid: Tensor | None,
    slope: Tensor | None,
    offset: Tensor | None,
    new_slope: Tensor | None,
    new_offset: Tensor | None,
    scale: float,
    lse: Tensor | None,
    mass: Tensor | None,
    mass_reduce: str,
    mass_accumulate: bool,
    impl: str,
    packed: bool = False,
) -> Tensor:
    """:func:`append_attention` for a caller that has checked: a tenth of a step is such checks.

    ``lse`` is written to where it is given; ``impl`` is ``"torch"`` or ``"triton"``. ``packed``
    lets torch attend faster, where its bits need not be those of transformers' full cache.
    """
    arguments = (
        query, new_key, new_value, key, value, position, num_valid, t, layer, valid,
        slope, offset, new_slope, new_offset, scale, lse, mass, mass_reduce, mass_accumulate,
    )  # fmt: skip
    if impl == "torch":
        return reference.append_attention(*arguments, packed)
    output: Tensor = torch.ops.trimkv_kernels.append_attention(*arguments)
    return output


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
    """Choose the launch from shapes alone, so that it is the same whatever the slots hold.

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
    block_s = _TILE_BYTES // (_block_d(head_dim) * itemsize)
    return DecodeConfig(splits, min(max(block_s, 16), 128), num_warps=4, num_stages=3)


_MIN_SPLIT_SLOTS = 64
_MAX_SPLITS = 64  # the kernel counts arrivals in the seven bits above the count
_MAX_SLOTS = 2**24 - 1
_TILE_BYTES = 16384
_LOG2_E = 1.4426950408889634


def _block_d(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _launch_arguments(
    query: Tensor, key: Tensor, scale: float, mass: Tensor | None, reduce: str, accumulate: bool
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
    constants = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "SPLITS": config.splits,
        "BLOCK_G": max(16, 1 << (group - 1).bit_length()),
        "BLOCK_S": config.block_s,
        "BLOCK_D": _block_d(head_dim),
        "BLOCK_P": min(1 << (num_slots - 1).bit_length(), 1024),
        "UPCAST": is_interpreted(),
        "MASS": None if mass is None else reduce,
        "ACCUMULATE": mass is not None and accumulate,
        "num_warps": config.num_warps,
        # a third tile does not fit the 64 KB of an AMD GPU
        "num_stages": min(config.num_stages, 2) if is_amd() else config.num_stages,
        "enable_fp_fusion": True,
    }
    return grid, scale * _LOG2_E, split_slots, part, logits, constants


def _decode_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_valid: Tensor | None,
    scale: float,
    lse: Tensor | None = None,
    mass: Tensor | None = None,
    mass_reduce: str = "sum",
    mass_accumulate: bool = False,
) -> Tensor:
    from trimkv_kernels.kernels._triton.decode_attention import _decode_attention_kernel

    grid, scale_log2, split_slots, part, logits, constants = _launch_arguments(
        query, key, scale, mass, mass_reduce, mass_accumulate
    )
    arrival = None if part is None else query.new_zeros(key.shape[:2], dtype=torch.int32)
    output = query.new_empty(query.shape)
    with device_guard(query.device):
        _decode_attention_kernel[(grid,)](
            query, key, value, None if num_valid is None else num_valid.contiguous(),
            arrival, part, output, lse, logits, mass, scale_log2,
            key.shape[1], key.shape[2], split_slots,
            *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], **constants,
        )  # fmt: skip
    return output


def _append_attention_triton(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    num_valid: Tensor,
    t: Tensor,
    layer: int,
    valid: Tensor | None,
    slope: Tensor | None,
    offset: Tensor | None,
    new_slope: Tensor | None,
    new_offset: Tensor | None,
    scale: float,
    lse: Tensor | None = None,
    mass: Tensor | None = None,
    mass_reduce: str = "sum",
    mass_accumulate: bool = False,
) -> Tensor:
    from trimkv_kernels.kernels._triton.decode_attention import _append_attention_kernel

    _, batch, num_kv_heads, num_slots, _ = key.shape
    check_int("num_slots", num_slots, 0, _MAX_SLOTS)
    grid, scale_log2, split_slots, part, logits, constants = _launch_arguments(
        query, key, scale, mass, mass_reduce, mass_accumulate
    )
    valid, new_slope, new_offset = (
        None if tensor is None else tensor.contiguous() for tensor in (valid, new_slope, new_offset)
    )
    output = query.new_empty(query.shape)
    with device_guard(query.device):
        _append_attention_kernel[(grid,)](
            query, new_key, new_value, key, value, position, num_valid,
            t.contiguous(), valid, slope, offset, new_slope, new_offset, part, output,
            lse, logits, mass, scale_log2, layer, batch * num_kv_heads, num_kv_heads,
            num_slots, split_slots,
            *query.stride()[:2], *new_key.stride()[:2], *new_value.stride()[:2], **constants,
        )  # fmt: skip
    return output


def _like_query(query: Tensor, *_: object, **__: object) -> Tensor:
    return query.new_empty(query.shape)


# The kernels are opaque to `torch.compile`: what it needs is in the schemas, exact as to mutation.
_LIBRARY = torch.library.Library("trimkv_kernels", "FRAGMENT")
_LIBRARY.define(
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? num_valid, float scale, "
    "Tensor(a!)? lse=None, Tensor(b!)? mass=None, str mass_reduce='sum', "
    "bool mass_accumulate=False) -> Tensor"
)
_LIBRARY.define(
    "append_attention(Tensor query, Tensor new_key, Tensor new_value, Tensor(a!) key, "
    "Tensor(b!) value, Tensor(c!) position, Tensor(d!) num_valid, Tensor t, int layer, "
    "Tensor? valid, Tensor(e!)? slope, Tensor(f!)? offset, Tensor? new_slope, "
    "Tensor? new_offset, float scale, Tensor(g!)? lse=None, Tensor(h!)? mass=None, "
    "str mass_reduce='sum', bool mass_accumulate=False) -> Tensor"
)
for _name, _run in (
    ("decode_attention", _decode_attention_triton),
    ("append_attention", _append_attention_triton),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"trimkv_kernels::{_name}", _like_query, lib=_LIBRARY)


def _check_query(query: Tensor, shape: tuple[int, ...], num_kv_heads: int) -> None:
    check_tensor("query", query, shape, FLOAT_DTYPES, query.device)
    check_unit_stride("query", query)
    if query.shape[1] % num_kv_heads != 0:
        raise ValueError(
            f"query must have a multiple of {num_kv_heads} heads (those of key), "
            f"got {query.shape[1]}"
        )


def _check_affine(
    slope: Tensor | None,
    offset: Tensor | None,
    new_slope: Tensor | None,
    new_offset: Tensor | None,
    state: tuple[int, ...],
    device: torch.device,
) -> None:
    given = {"slope": slope, "offset": offset, "new_slope": new_slope, "new_offset": new_offset}
    missing = [name for name, tensor in given.items() if tensor is None]
    if len(missing) == 4:
        return
    if missing:
        raise ValueError(
            "slope, offset, new_slope and new_offset must be given together, "
            f"got None for {', '.join(missing)}"
        )
    for name, tensor in given.items():
        assert tensor is not None
        is_new = name.startswith("new_")
        check_tensor(name, tensor, state[1:3] if is_new else state, (torch.float32,), device)
        if not is_new:
            check_contiguous(name, tensor)


def _check_mass(mass: Tensor | None, reduce: str, slots: tuple[int, ...], query: Tensor) -> None:
    check_reduce("mass_reduce", reduce)
    if mass is not None:
        heads = query.shape[1] if reduce == "none" else slots[-2]
        shape = (*slots[:-2], heads, slots[-1])
        check_tensor("mass", mass, shape, (torch.float32,), query.device)
        check_contiguous("mass", mass)
