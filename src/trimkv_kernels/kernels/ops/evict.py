"""Eviction: every full head keeps its best slots, for all layers in one launch."""

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from trimkv_kernels.kernels._torch import evict as _torch
from trimkv_kernels.kernels.checks import FLOAT32, INT32, Shape, check_int
from trimkv_kernels.kernels.launch import as_bits, dense, device_guard, power_of_2
from trimkv_kernels.kernels.op import Uses, op
from trimkv_kernels.kernels.slots import Slots
from trimkv_kernels.kernels.tuning import tuned


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
    num_warps = min(max(4, power_of_2(num_slots) // 512), 16)
    return EvictConfig(min(power_of_2(buffer), 16), num_warps)


def _check(
    slots: Slots,
    buffer: int,
    rows: Tensor | None,
    scores: Tensor | None,
    sinks: int,
    recent: int,
    **_: object,
) -> None:
    slots.row_strides(rows)
    check_int("buffer", buffer, 1, slots.key.shape[3] - 1)
    check_int("sinks", sinks, 0)
    check_int("recent", recent, 0)
    given = {"slope": slots.slope, "offset": slots.offset, "scores": scores}
    names = [name for name, tensor in given.items() if tensor is not None]
    if names not in (["slope", "offset"], ["scores"], list(given)):
        raise ValueError(
            f"either slope and offset or scores must be given, got {' and '.join(names) or 'none'}"
        )


@op(
    torch=_torch.evict,
    writes=(
        *("slots.key", "slots.value", "slots.position", "slots.num_valid"),
        *("slots.slope", "slots.offset", "slots.fields", "slots.nan_seen"),
    ),
    check=_check,
)
def evict(
    slots: Annotated[
        Slots,
        Uses(
            *("key", "value", "position", "num_valid", "capacity"),
            *("slope", "offset", "fields", "nan_seen"),
        ),
    ],
    t: Annotated[Tensor, Shape("batch", INT32)],
    *,
    buffer: int,
    rows: Annotated[Tensor | None, Shape("batch", INT32)] = None,
    scores: Annotated[
        Tensor | None, Shape("layers, batch, num_kv_heads, num_slots", FLOAT32, dense=True)
    ] = None,
    sinks: int = 0,
    recent: int = 0,
    impl: str = "auto",
) -> None:
    """Let every full head drop its ``buffer`` lowest scores, in place.

    A head is full when ``num_valid >= capacity``; the others are left alone. A full head keeps
    ``capacity - buffer`` pairs, its budget. Kept pairs move from the tail ``[budget, capacity)``
    into the holes of ``[0, budget)``, so at most ``buffer`` of them are copied, and ``num_valid``
    becomes the budget. Nothing is read back from a GPU.

    The score is ``slope * (t - position) + offset``, rounded after the product and after the sum,
    or ``scores``. Protected slots score +inf, NaN counts as -inf, -0.0 equals 0.0, and of equal
    scores the newer token (larger ``position``) stays. So what is kept depends only on scores and
    positions, not on the order of the slots.

    Args:
        slots: Of all layers. Updated: everything but ``capacity``. Positions are distinct and not
            negative within a full head. ``nan_seen`` is set if a full head had a NaN score.
        t: ``[batch]`` int32, tokens each sequence has seen.
        buffer: Pairs that a full head drops, from 1 to ``num_slots - 1``. A head with a smaller
            capacity drops at most all its pairs.
        rows: ``[batch]`` int32, the row of ``slots`` for each row of the call, none of them twice.
            Then ``slots`` has one layer and any number of rows, with gaps between them. None: they
            are the rows of the call, and dense.
        scores: ``[layers, batch, num_kv_heads, num_slots]`` fp32; read only. None: slope and offset
            of ``slots``.
        sinks: Protect slots with ``position < sinks``.
        recent: Protect slots with ``position >= t - recent``.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: A shape, dtype, stride or device disagrees, ``buffer``, ``sinks`` or ``recent``
            is out of range, or there are neither ``scores`` nor slope and offset.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    from trimkv_kernels.kernels._triton.evict import _evict_kernel, _move_field_kernel

    layers, _, num_kv_heads, num_slots, head_dim = slots.key.shape
    batch, device = len(t), slots.key.device
    heads = layers * batch * num_kv_heads
    (rows,) = dense(rows)
    config = tuned("evict", device, evict_config, num_slots, buffer)
    moves = slots.num_valid.new_empty(heads, 2, buffer)
    num_moves = slots.num_valid.new_empty(heads) if slots.fields else None
    with device_guard(device):
        _evict_kernel[(heads,)](
            slots.key, slots.value, slots.position, slots.num_valid, slots.capacity, rows,
            t.contiguous(), slots.slope, slots.offset, scores, slots.nan_seen, moves, num_moves,
            batch, num_kv_heads, num_slots, *slots.row_strides(rows), buffer, sinks, recent,
            HEAD_DIM=head_dim, SINGLE=buffer == 1, BLOCK_N=power_of_2(num_slots),
            BLOCK_D=power_of_2(head_dim), BLOCK_R=config.block_r, num_warps=config.num_warps,
            # slope * age + offset rounds twice, as torch does.
            enable_fp_fusion=False,
        )  # fmt: skip
        for field in slots.fields:
            width = field[0, 0, 0, 0].numel()
            _move_field_kernel[(heads,)](
                as_bits(field), moves, num_moves, rows, num_kv_heads, num_slots,
                None if rows is None else field.stride(1), buffer,
                WIDTH=width, BLOCK_W=min(power_of_2(width), 1024), BLOCK_R=config.block_r,
                enable_fp_fusion=False,
            )  # fmt: skip
