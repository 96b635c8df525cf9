"""Eviction: every full head keeps its best slots, for all layers in one launch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_kernels.kernels import reference
from trimkv_kernels.kernels._dispatch import (
    as_bits,
    check_contiguous,
    check_int,
    check_rank,
    check_tensor,
    device_guard,
    resolve_impl,
)
from trimkv_kernels.kernels.tuning import tuned


def evict(
    key: Tensor,
    value: Tensor,
    position: Tensor,
    num_valid: Tensor,
    t: Tensor,
    *,
    budget: int,
    slope: Tensor | None = None,
    offset: Tensor | None = None,
    scores: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
    fields: Sequence[Tensor] = (),
    nan_seen: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Shrink every full head to its ``budget`` highest scores, in place.

    A head is full when ``num_valid >= num_slots``; the others are left alone. Kept rows move from
    the tail ``[budget, num_slots)`` into the holes of ``[0, budget)``, so at most
    ``num_slots - budget`` rows are copied, and ``num_valid`` becomes ``budget``. Nothing is read
    back from a GPU.

    The score is ``slope * (t - position) + offset``, rounded after the product and after the sum,
    or ``scores``. Protected slots score +inf, NaN counts as -inf, -0.0 equals 0.0, and of equal
    scores the newer token (larger ``position``) stays: what is kept depends on scores and positions
    alone, not on the order of the slots.

    Args:
        key: ``[layers, batch, num_kv_heads, num_slots, head_dim]``; updated.
        value: As ``key``; updated.
        position: ``[layers, batch, num_kv_heads, num_slots]`` int32, distinct and not negative
            within a full head; updated.
        num_valid: ``[layers, batch, num_kv_heads]`` int32; updated.
        t: ``[batch]`` int32, tokens each sequence has seen.
        budget: Slots a full head keeps, from 1 to ``num_slots - 1``.
        slope: Like ``position`` but fp32; updated. Together with ``offset``, without ``scores``.
        offset: As ``slope``; updated.
        scores: Like ``position`` but fp32; read only. Without ``slope`` and ``offset``.
        sinks: Protect slots with ``position < sinks``.
        recent: Protect slots with ``position >= t - recent``.
        fields: More tensors ``[layers, batch, num_kv_heads, num_slots, ...]`` that move with the
            slots; updated.
        nan_seen: ``[layers]`` int32; set to 1 where a full head of that layer had a NaN score.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: A shape, dtype, stride or device disagrees, ``budget``, ``sinks`` or ``recent``
            is out of range, or not exactly one of (``slope``, ``offset``) and ``scores`` was given.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    check_rank("key", key, "layers, batch, num_kv_heads, num_slots, head_dim")
    _check_state(key, value, position, num_valid, t)
    check_int("budget", budget, 1, key.shape[3] - 1)
    check_int("sinks", sinks, 0)
    check_int("recent", recent, 0)
    _check_scores(slope, offset, scores, position)
    for index, field in enumerate(fields):
        name = f"fields[{index}]"
        check_tensor(name, field, (*position.shape, *field.shape[4:]), (field.dtype,), key.device)
        check_contiguous(name, field)
    if nan_seen is not None:
        check_tensor("nan_seen", nan_seen, key.shape[:1], (torch.int32,), key.device)
    if resolve_impl(impl, key.device) == "torch":
        reference.evict(
            key, value, position, num_valid, t, budget,
            slope, offset, scores, sinks, recent, fields, nan_seen,
        )  # fmt: skip
        return
    torch.ops.trimkv_kernels.evict(
        key, value, position, num_valid, t, budget,
        slope, offset, scores, sinks, recent, list(fields), nan_seen,
    )  # fmt: skip


@dataclass(frozen=True)
class EvictConfig:
    """How an eviction launch is laid out.

    Attributes:
        block_r: Rows moved at a time.
        num_warps: Warps per head.
    """

    block_r: int
    num_warps: int


def evict_config(num_slots: int, buffer: int) -> EvictConfig:
    """Choose the launch from shapes alone; all scores of a head stay in registers."""
    num_warps = min(max(4, _power_of_2(num_slots) // 512), 16)
    return EvictConfig(min(_power_of_2(buffer), 16), num_warps)


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _evict_triton(
    key: Tensor,
    value: Tensor,
    position: Tensor,
    num_valid: Tensor,
    t: Tensor,
    budget: int,
    slope: Tensor | None,
    offset: Tensor | None,
    scores: Tensor | None,
    sinks: int,
    recent: int,
    fields: Sequence[Tensor],
    nan_seen: Tensor | None,
) -> None:
    from trimkv_kernels.kernels._triton.evict import _evict_kernel, _move_field_kernel

    _, batch, num_kv_heads, num_slots, head_dim = key.shape
    heads, buffer = num_valid.numel(), num_slots - budget
    config = tuned("evict", key.device, evict_config, num_slots, buffer)
    moves = num_valid.new_empty(heads, 2, buffer)
    num_moves = num_valid.new_empty(heads) if fields else None
    with device_guard(key.device):
        _evict_kernel[(heads,)](
            key, value, position, num_valid, t.contiguous(), slope, offset, scores, nan_seen,
            moves, num_moves, batch, num_kv_heads, num_slots, budget, sinks, recent,
            HEAD_DIM=head_dim, SINGLE=buffer == 1, BLOCK_N=_power_of_2(num_slots),
            BLOCK_D=_power_of_2(head_dim), BLOCK_R=config.block_r, num_warps=config.num_warps,
            # slope * age + offset rounds twice, as torch does.
            enable_fp_fusion=False,
        )  # fmt: skip
        for field in fields:
            width = field[0, 0, 0, 0].numel()
            _move_field_kernel[(heads,)](
                as_bits(field), moves, num_moves, num_slots, buffer,
                WIDTH=width, BLOCK_W=min(_power_of_2(width), 1024), BLOCK_R=config.block_r,
                enable_fp_fusion=False,
            )  # fmt: skip


# Opaque to `torch.compile`: what it needs is in the schema, exact as to mutation.
_LIBRARY = torch.library.Library("trimkv_kernels", "FRAGMENT")
_LIBRARY.define(
    "evict(Tensor(a!) key, Tensor(b!) value, Tensor(c!) position, Tensor(d!) num_valid, Tensor t, "
    "int budget, Tensor(e!)? slope, Tensor(f!)? offset, Tensor? scores, int sinks, int recent, "
    "Tensor(g!)[] fields, Tensor(h!)? nan_seen) -> ()"
)
_LIBRARY.impl("evict", _evict_triton, "CompositeExplicitAutograd")
torch.library.register_fake("trimkv_kernels::evict", lambda *_: None, lib=_LIBRARY)


def _check_state(
    key: Tensor, value: Tensor, position: Tensor, num_valid: Tensor, t: Tensor
) -> None:
    check_tensor("value", value, key.shape, (key.dtype,), key.device)
    check_tensor("position", position, key.shape[:4], (torch.int32,), key.device)
    check_tensor("num_valid", num_valid, key.shape[:3], (torch.int32,), key.device)
    check_tensor("t", t, key.shape[1:2], (torch.int32,), key.device)
    bases = {"key": key, "value": value, "position": position, "num_valid": num_valid}
    for name, tensor in bases.items():
        check_contiguous(name, tensor)


def _check_scores(
    slope: Tensor | None, offset: Tensor | None, scores: Tensor | None, position: Tensor
) -> None:
    given = {"slope": slope, "offset": offset, "scores": scores}
    names = [name for name, tensor in given.items() if tensor is not None]
    if names not in (["slope", "offset"], ["scores"]):
        raise ValueError(
            f"either slope and offset or scores must be given, got {' and '.join(names) or 'none'}"
        )
    for name, tensor in given.items():
        if tensor is not None:
            check_tensor(name, tensor, position.shape, (torch.float32,), position.device)
            check_contiguous(name, tensor)
