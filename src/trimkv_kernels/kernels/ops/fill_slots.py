"""Store the tokens of a longer call: keep the best of the slots and the new tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from trimkv_kernels.kernels._torch import fill_slots as _torch
from trimkv_kernels.kernels.checks import BOOL, FLOAT32, INT32, Shape, check_int, check_tensor
from trimkv_kernels.kernels.launch import as_bits, dense, device_guard, power_of_2
from trimkv_kernels.kernels.op import Uses, op
from trimkv_kernels.kernels.slots import Slots
from trimkv_kernels.kernels.tuning import tuned


@dataclass(frozen=True)
class FillConfig:
    """How the two launches are laid out.

    Attributes:
        block_c: Candidates that a head's program reads at a time.
        block_r: Rows that a program of the second launch copies.
        num_warps: Warps of a head's program.
    """

    block_c: int
    block_r: int
    num_warps: int


def fill_config(candidates: int) -> FillConfig:
    """Choose the launch from shapes alone.

    Args:
        candidates: Slots and new tokens of a head. Only two sizes of blocks, so that prompts of
            different lengths run the same binary.
    """
    if candidates <= 1024:
        return FillConfig(1024, 16, num_warps=4)
    return FillConfig(2048, 16, num_warps=8)


def _check(
    new_key: Tensor,
    slots: Slots,
    layer: int,
    buffer: int,
    new_slope: Tensor | None,
    new_offset: Tensor | None,
    scores: Tensor | None,
    sinks: int,
    recent: int,
    new_fields: Sequence[Tensor],
    max_valid: int | None,
    **_: object,
) -> None:
    layers, batch, num_kv_heads, num_slots = slots.key.shape[:4]
    check_int("layer", layer, 0, layers - 1)
    check_int("buffer", buffer, 1, num_slots - 1)
    check_int("sinks", sinks, 0)
    check_int("recent", recent, 0)
    held = num_slots if max_valid is None else max_valid
    check_int("max_valid", held, 0, num_slots)
    affine = {
        "slope": slots.slope,
        "offset": slots.offset,
        "new_slope": new_slope,
        "new_offset": new_offset,
    }
    names = [name for name, tensor in affine.items() if tensor is not None]
    if names != list(affine) and (names or scores is None):
        names += [] if scores is None else ["scores"]
        raise ValueError(
            "either slope, offset, new_slope and new_offset or scores must be given, "
            f"got {' and '.join(names) or 'none'}"
        )
    new = (batch, num_kv_heads, new_key.shape[2])
    if scores is not None:
        shape = (*new[:2], held + new[2])
        check_tensor("scores", scores, shape, FLOAT32, slots.key.device)
    if len(slots.fields) != len(new_fields):
        raise ValueError(
            f"new_fields must have {len(slots.fields)} tensors, one per field, "
            f"got {len(new_fields)}"
        )
    for index, (field, new_field) in enumerate(zip(slots.fields, new_fields, strict=True)):
        shape = (*new, *field.shape[4:])
        check_tensor(f"new_fields[{index}]", new_field, shape, (field.dtype,), slots.key.device)


@op(
    torch=_torch.fill_slots,
    writes=(
        *("slots.key", "slots.value", "slots.position", "slots.num_valid"),
        *("slots.slope", "slots.offset", "slots.fields", "slots.nan_seen"),
    ),
    check=_check,
)
def fill_slots(
    new_key: Annotated[Tensor, Shape("batch, num_kv_heads, new, head_dim", rows=True)],
    new_value: Annotated[Tensor, Shape("batch, num_kv_heads, new, head_dim", rows=True)],
    new_position: Annotated[Tensor, Shape("batch, new", INT32)],
    slots: Annotated[
        Slots,
        Uses(
            *("key", "value", "position", "num_valid", "capacity"),
            *("slope", "offset", "fields", "nan_seen"),
        ),
    ],
    t: Annotated[Tensor, Shape("batch", INT32)],
    *,
    layer: int,
    buffer: int,
    new_slope: Annotated[Tensor | None, Shape("batch, num_kv_heads, new", FLOAT32)] = None,
    new_offset: Annotated[Tensor | None, Shape("batch, num_kv_heads, new", FLOAT32)] = None,
    scores: Tensor | None = None,
    valid: Annotated[Tensor | None, Shape("batch, new", BOOL)] = None,
    sinks: int = 0,
    recent: int = 0,
    new_fields: Sequence[Tensor] = (),
    max_valid: int | None = None,
    impl: str = "auto",
) -> None:
    """Keep the best of one layer's slots and a call's new tokens, in place.

    The candidates of a head are its valid slots and the real new tokens. A head with at least
    ``capacity`` of them keeps the ``capacity - buffer`` highest scores, any other keeps all. Then
    ``num_valid`` is the number of pairs it keeps. If nothing is dropped, the slots stay as they are
    and the new tokens follow in order. Otherwise the slots have no particular order. No shape
    depends on the data, and nothing is read back from a GPU.

    The score is ``slope * (t - position) + offset``, rounded after the product and after the sum,
    or ``scores``. Protected candidates score +inf, NaN counts as -inf, -0.0 equals 0.0, and of
    equal scores the newer token (larger ``position``) stays, by the rule of :func:`evict`.

    Args:
        new_key: ``[batch, num_kv_heads, new, head_dim]``, dtype of ``key``, head vectors
            contiguous.
        new_value: As ``new_key``.
        new_position: ``[batch, new]`` int32.
        slots: Of all layers. Updated: everything but ``capacity``. Positions are distinct and not
            negative among the candidates of a head. ``nan_seen`` of the layer is set if a
            candidate's score was NaN.
        t: ``[batch]`` int32, tokens each sequence has seen, those of the call included.
        layer: Which layer to fill.
        buffer: Free slots of a head afterwards, if it had too many candidates; from 1 to
            ``num_slots - 1``.
        new_slope: ``[batch, num_kv_heads, new]`` fp32, the new tokens'. With ``new_offset`` and the
            slope and offset of ``slots``, or none of the four.
        new_offset: As ``new_slope``.
        scores: ``[batch, num_kv_heads, max_valid + new]`` fp32, of the slots and then of the new
            tokens. Scores of slots that are not valid, and of padding, are ignored.
        valid: ``[batch, new]`` bool, False for padding; None when every token is real.
        sinks: Protect ``position < sinks``.
        recent: Protect ``position >= t - recent``.
        new_fields: The new tokens' numbers of each field, ``[batch, num_kv_heads, new, ...]``.
        max_valid: No head of the layer has more valid slots than this, and slots from there on are
            not read. None means ``num_slots``.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: A shape, dtype, stride or device disagrees, a number is out of range,
            there are neither ``scores`` nor all slope and offset tensors, or ``new_fields`` and the
            fields of ``slots`` differ in number.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    from trimkv_kernels.kernels._triton.fill_slots import (
        _fill_field_kernel,
        _fill_kernel,
        _select_kernel,
    )

    _, batch, num_kv_heads, num_slots, head_dim = slots.key.shape
    heads, new = batch * num_kv_heads, new_key.shape[2]
    held = num_slots if max_valid is None else max_valid
    candidates = held + new
    config = tuned("fill_slots", slots.key.device, fill_config, candidates)
    blocks = -(-min(candidates, num_slots - 1) // config.block_r)
    if heads * blocks == 0:
        return
    new_slope, new_offset, scores, valid = dense(new_slope, new_offset, scores, valid)
    new_position = new_position.contiguous()
    order = slots.num_valid.new_empty(heads, candidates)
    moves = slots.num_valid.new_empty(heads, 2, num_slots)
    num_moves = slots.num_valid.new_empty(heads)
    with device_guard(slots.key.device):
        _select_kernel[(heads,)](
            new_position, slots.position, slots.num_valid, slots.capacity, t.contiguous(), valid,
            slots.slope, slots.offset, new_slope, new_offset, scores, slots.nan_seen,
            order, moves, num_moves,
            layer, heads, num_kv_heads, num_slots, held, new, buffer, sinks, recent,
            BLOCK_C=config.block_c, num_warps=config.num_warps,
            # slope * age + offset rounds twice, as torch does.
            enable_fp_fusion=False,
        )  # fmt: skip
        _fill_kernel[(heads * blocks,)](
            new_key, new_value, new_position, slots.key, slots.value, slots.position,
            slots.slope, slots.offset, new_slope, new_offset, moves, num_moves,
            layer, heads, num_kv_heads, num_slots, held, new, blocks,
            *new_key.stride()[:3], *new_value.stride()[:3],
            HEAD_DIM=head_dim, BLOCK_D=power_of_2(head_dim), BLOCK_R=config.block_r,
            enable_fp_fusion=False,
        )  # fmt: skip
        for field, new_field in zip(slots.fields, new_fields, strict=True):
            width = field[0, 0, 0, 0].numel()
            _fill_field_kernel[(heads * blocks,)](
                as_bits(new_field.contiguous()), as_bits(field), moves, num_moves,
                layer, heads, num_slots, held, new, blocks,
                WIDTH=width, BLOCK_W=min(power_of_2(width), 1024), BLOCK_R=config.block_r,
                enable_fp_fusion=False,
            )  # fmt: skip
