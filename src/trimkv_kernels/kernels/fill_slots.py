"""A longer call's tokens into the slots: the best of what was held and of what came."""

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
    check_unit_stride,
    device_guard,
    resolve_impl,
)
from trimkv_kernels.kernels.tuning import tuned


def fill_slots(
    new_key: Tensor,
    new_value: Tensor,
    new_position: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    num_valid: Tensor,
    t: Tensor,
    *,
    layer: int,
    budget: int,
    slope: Tensor | None = None,
    offset: Tensor | None = None,
    new_slope: Tensor | None = None,
    new_offset: Tensor | None = None,
    scores: Tensor | None = None,
    valid: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
    fields: Sequence[Tensor] = (),
    new_fields: Sequence[Tensor] = (),
    nan_seen: Tensor | None = None,
    filled: int | None = None,
    impl: str = "auto",
) -> None:
    """Keep the best of one layer's slots and a call's new tokens, in place.

    The candidates of a head are its valid slots and the real new tokens. A head with at least
    ``num_slots`` of them keeps the ``budget`` highest scores, another one keeps all; ``num_valid``
    becomes what it keeps. Where nothing is dropped the slots stay as they are and the new tokens
    follow in their order; elsewhere the order of the slots means nothing. No shape depends on the
    data, and nothing is read back from a GPU.

    The score is ``slope * (t - position) + offset``, rounded after the product and after the sum,
    or ``scores``. Protected candidates score +inf, NaN counts as -inf, -0.0 equals 0.0, and of
    equal scores the newer token (larger ``position``) stays, by the rule of :func:`evict`.

    Args:
        new_key: ``[batch, num_kv_heads, new, head_dim]``, dtype of ``key``, head vectors
            contiguous.
        new_value: As ``new_key``.
        new_position: ``[batch, new]`` int32.
        key: ``[layers, batch, num_kv_heads, num_slots, head_dim]``; updated.
        value: As ``key``; updated.
        position: ``[layers, batch, num_kv_heads, num_slots]`` int32, distinct and not negative
            among the candidates of a head; updated.
        num_valid: ``[layers, batch, num_kv_heads]`` int32; updated.
        t: ``[batch]`` int32, tokens each sequence has seen, those of the call included.
        layer: Which layer to fill.
        budget: Slots that a head keeps where there are too many, from 1 to ``num_slots - 1``.
        slope: Like ``position`` but fp32; updated. With ``offset``, ``new_slope`` and
            ``new_offset``, without ``scores``.
        offset: As ``slope``; updated.
        new_slope: ``[batch, num_kv_heads, new]`` fp32, the new tokens'.
        new_offset: As ``new_slope``.
        scores: ``[batch, num_kv_heads, filled + new]`` fp32, of the slots and then of the new
            tokens; what stands at slots that are not valid and at pads is ignored.
        valid: ``[batch, new]`` bool, False for padding; None when every token is real.
        sinks: Protect ``position < sinks``.
        recent: Protect ``position >= t - recent``.
        fields: More tensors ``[layers, batch, num_kv_heads, num_slots, ...]`` that belong to the
            slots; updated.
        new_fields: The new tokens' numbers of each field, ``[batch, num_kv_heads, new, ...]``.
        nan_seen: ``[layers]`` int32; that of the layer is set to 1 where a candidate's score was
            NaN.
        filled: No head of the layer has more valid slots than this; None when that is not known,
            which is ``num_slots``. Slots from there on are not read.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: A shape, dtype, stride or device disagrees, a number is out of range, not
            exactly one of the slope and offset tensors and ``scores`` was given, or ``fields`` and
            ``new_fields`` are not of the same number.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    check_rank("key", key, "layers, batch, num_kv_heads, num_slots, head_dim")
    check_rank("new_key", new_key, "batch, num_kv_heads, new, head_dim")
    layers, batch, num_kv_heads, num_slots, head_dim = key.shape
    new, device = new_key.shape[2], key.device
    check_int("layer", layer, 0, layers - 1)
    check_int("budget", budget, 1, num_slots - 1)
    check_int("sinks", sinks, 0)
    check_int("recent", recent, 0)
    filled = num_slots if filled is None else filled
    check_int("filled", filled, 0, num_slots)
    check_tensor("value", value, key.shape, (key.dtype,), device)
    check_tensor("position", position, key.shape[:4], (torch.int32,), device)
    check_tensor("num_valid", num_valid, key.shape[:3], (torch.int32,), device)
    check_tensor("t", t, (batch,), (torch.int32,), device)
    bases = {"key": key, "value": value, "position": position, "num_valid": num_valid}
    for name, base in bases.items():
        check_contiguous(name, base)
    for name, tensor in (("new_key", new_key), ("new_value", new_value)):
        check_tensor(name, tensor, (batch, num_kv_heads, new, head_dim), (key.dtype,), device)
        check_unit_stride(name, tensor)
    check_tensor("new_position", new_position, (batch, new), (torch.int32,), device)
    if valid is not None:
        check_tensor("valid", valid, (batch, new), (torch.bool,), device)
    if nan_seen is not None:
        check_tensor("nan_seen", nan_seen, (layers,), (torch.int32,), device)
    _check_scores(slope, offset, new_slope, new_offset, scores, position, filled, new)
    _check_fields(fields, new_fields, position, new)
    arguments = (
        new_key, new_value, new_position, key, value, position, num_valid, t, layer, budget,
        slope, offset, new_slope, new_offset, scores, valid, sinks, recent,
        list(fields), list(new_fields), nan_seen, filled,
    )  # fmt: skip
    if resolve_impl(impl, device) == "torch":
        reference.fill_slots(*arguments)
    else:
        torch.ops.trimkv_kernels.fill_slots(*arguments)


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


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _fill_slots_triton(
    new_key: Tensor,
    new_value: Tensor,
    new_position: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    num_valid: Tensor,
    t: Tensor,
    layer: int,
    budget: int,
    slope: Tensor | None,
    offset: Tensor | None,
    new_slope: Tensor | None,
    new_offset: Tensor | None,
    scores: Tensor | None,
    valid: Tensor | None,
    sinks: int,
    recent: int,
    fields: Sequence[Tensor],
    new_fields: Sequence[Tensor],
    nan_seen: Tensor | None,
    filled: int,
) -> None:
    from trimkv_kernels.kernels._triton.fill_slots import (
        _fill_field_kernel,
        _fill_kernel,
        _select_kernel,
    )

    _, batch, num_kv_heads, num_slots, head_dim = key.shape
    heads, new = batch * num_kv_heads, new_key.shape[2]
    candidates = filled + new
    config = tuned("fill_slots", key.device, fill_config, candidates)
    blocks = -(-min(candidates, num_slots - 1) // config.block_r)
    if heads * blocks == 0:
        return
    new_slope, new_offset, scores, valid = (
        None if x is None else x.contiguous() for x in (new_slope, new_offset, scores, valid)
    )
    new_position = new_position.contiguous()
    order = num_valid.new_empty(heads, candidates)
    moves = num_valid.new_empty(heads, 2, num_slots)
    num_moves = num_valid.new_empty(heads)
    with device_guard(key.device):
        _select_kernel[(heads,)](
            new_position, position, num_valid, t.contiguous(), valid, slope, offset,
            new_slope, new_offset, scores, nan_seen, order, moves, num_moves,
            layer, heads, num_kv_heads, num_slots, filled, new, budget, sinks, recent,
            BLOCK_C=config.block_c, num_warps=config.num_warps,
            # slope * age + offset rounds twice, as torch does.
            enable_fp_fusion=False,
        )  # fmt: skip
        _fill_kernel[(heads * blocks,)](
            new_key, new_value, new_position, key, value, position, slope, offset,
            new_slope, new_offset, moves, num_moves,
            layer, heads, num_kv_heads, num_slots, filled, new, blocks,
            *new_key.stride()[:3], *new_value.stride()[:3],
            HEAD_DIM=head_dim, BLOCK_D=_power_of_2(head_dim), BLOCK_R=config.block_r,
            enable_fp_fusion=False,
        )  # fmt: skip
        for field, new_field in zip(fields, new_fields, strict=True):
            width = field[0, 0, 0, 0].numel()
            _fill_field_kernel[(heads * blocks,)](
                as_bits(new_field.contiguous()), as_bits(field), moves, num_moves,
                layer, heads, num_slots, filled, new, blocks,
                WIDTH=width, BLOCK_W=min(_power_of_2(width), 1024), BLOCK_R=config.block_r,
                enable_fp_fusion=False,
            )  # fmt: skip


# Opaque to `torch.compile`: what it needs is in the schema, exact as to mutation.
_LIBRARY = torch.library.Library("trimkv_kernels", "FRAGMENT")
_LIBRARY.define(
    "fill_slots(Tensor new_key, Tensor new_value, Tensor new_position, Tensor(a!) key, "
    "Tensor(b!) value, Tensor(c!) position, Tensor(d!) num_valid, Tensor t, int layer, int budget, "
    "Tensor(e!)? slope, Tensor(f!)? offset, Tensor? new_slope, Tensor? new_offset, "
    "Tensor? scores, Tensor? valid, int sinks, int recent, Tensor(g!)[] fields, "
    "Tensor[] new_fields, Tensor(h!)? nan_seen, int filled) -> ()"
)
_LIBRARY.impl("fill_slots", _fill_slots_triton, "CompositeExplicitAutograd")
torch.library.register_fake("trimkv_kernels::fill_slots", lambda *_: None, lib=_LIBRARY)


def _check_scores(
    slope: Tensor | None,
    offset: Tensor | None,
    new_slope: Tensor | None,
    new_offset: Tensor | None,
    scores: Tensor | None,
    position: Tensor,
    filled: int,
    new: int,
) -> None:
    given = {
        "slope": slope,
        "offset": offset,
        "new_slope": new_slope,
        "new_offset": new_offset,
        "scores": scores,
    }
    names = [name for name, tensor in given.items() if tensor is not None]
    if names not in (list(given)[:4], ["scores"]):
        raise ValueError(
            "either slope, offset, new_slope and new_offset or scores must be given, "
            f"got {' and '.join(names) or 'none'}"
        )
    heads = position.shape[1:3]
    for name, tensor in given.items():
        if tensor is None:
            continue
        if name in ("slope", "offset"):
            check_tensor(name, tensor, position.shape, (torch.float32,), position.device)
            check_contiguous(name, tensor)
        else:
            count = filled + new if name == "scores" else new
            check_tensor(name, tensor, (*heads, count), (torch.float32,), position.device)


def _check_fields(
    fields: Sequence[Tensor], new_fields: Sequence[Tensor], position: Tensor, new: int
) -> None:
    if len(fields) != len(new_fields):
        raise ValueError(
            f"new_fields must have {len(fields)} tensors, one per field, got {len(new_fields)}"
        )
    for index, (field, new_field) in enumerate(zip(fields, new_fields, strict=True)):
        name, inner = f"fields[{index}]", field.shape[4:]
        check_tensor(name, field, (*position.shape, *inner), (field.dtype,), position.device)
        check_contiguous(name, field)
        shape = (*position.shape[1:3], new, *inner)
        check_tensor(f"new_{name}", new_field, shape, (field.dtype,), position.device)
