"""Attention of one new token per sequence to heads that share a budget and differ in length."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from trimkv_kernels.kernels._torch import ragged_attention as _torch
from trimkv_kernels.kernels.checks import (
    BOOL,
    FLOAT32,
    FLOAT_DTYPES,
    INT32,
    Shape,
    check_groups,
    check_int,
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
from trimkv_kernels.kernels.ops.decode_attention import parts_at_once
from trimkv_kernels.kernels.pages import PAGE, Pages
from trimkv_kernels.kernels.prologue import Decay, Rope, check_prologue, launch_arguments
from trimkv_kernels.kernels.tuning import tuned


@dataclass(frozen=True)
class RaggedConfig:
    """How a launch is laid out.

    Attributes:
        splits: Programs of a row. Each gets the same share of the slots of all heads.
        block_s: Slots per tile.
        num_warps: Warps per program.
        num_stages: Tiles in flight.
    """

    splits: int
    block_s: int
    num_warps: int
    num_stages: int


def ragged_config(
    batch: int, num_kv_heads: int, mean_slots: int, head_dim: int, itemsize: int, num_sms: int
) -> RaggedConfig:
    """Choose the launch from shapes alone, so that it does not depend on what the heads hold.

    Args:
        batch: Sequences.
        num_kv_heads: Heads of the layer.
        mean_slots: Slots of a head, on average.
        head_dim: Elements per head vector.
        itemsize: Bytes per element.
        num_sms: Multiprocessors of the device.
    """
    block_s = min(max(_TILE_BYTES // (block_d(head_dim) * itemsize), 16), _MOST_SLOTS)
    tiles = num_kv_heads * -(-mean_slots // block_s)
    splits = min(2 * num_sms // batch, tiles)
    return RaggedConfig(max(splits, 1), block_s, num_warps=4, num_stages=3)


_TILE_BYTES = 16384
_MOST_SLOTS = 64


def _check(
    query: Tensor,
    new_key: Tensor,
    pages: Pages,
    layer: int,
    new_slope: Tensor | None,
    new_offset: Tensor | None,
    decay: Decay | None,
    rope: Rope | None,
    **_: object,
) -> None:
    num_kv_heads = new_key.shape[1]
    check_groups(query, num_kv_heads)
    if pages.num_heads % num_kv_heads:
        raise ValueError(
            f"pages must have whole layers of {num_kv_heads} heads in a scope, "
            f"got {pages.num_heads} heads"
        )
    layers = pages.kept.shape[0] * pages.num_heads // num_kv_heads
    check_int("layer", layer, 0, layers - 1)
    given = {"slope": pages.slope, "offset": pages.offset}
    check_prologue(rope, decay, given | {"new_slope": new_slope, "new_offset": new_offset})


def _like_query(query: Tensor, **_: object) -> Tensor:
    return query.new_empty(query.shape)


@op(
    torch=_torch.ragged_append_attention,
    writes=("pages.key", "pages.value", "pages.position", "pages.slope", "pages.offset"),
    check=_check,
    fake=_like_query,
)
def ragged_append_attention(
    query: Annotated[Tensor, Shape("batch, num_heads, head_dim", FLOAT_DTYPES, rows=True)],
    new_key: Annotated[Tensor, Shape("batch, num_kv_heads, head_dim", rows=True)],
    new_value: Annotated[Tensor, Shape("batch, num_kv_heads, head_dim", rows=True)],
    pages: Annotated[
        Pages,
        Uses(
            *("key", "value", "position", "page", "first_page"),
            *("kept", "cut", "slope", "offset"),
        ),
    ],
    t: Annotated[Tensor, Shape("batch", INT32)],
    *,
    layer: int,
    valid: Annotated[Tensor | None, Shape("batch", BOOL)] = None,
    new_slope: Annotated[Tensor | None, Shape("batch, num_kv_heads", FLOAT32)] = None,
    new_offset: Annotated[Tensor | None, Shape("batch, num_kv_heads", FLOAT32)] = None,
    decay: Decay | None = None,
    rope: Rope | None = None,
    scale: float | None = None,
    packed: bool = False,
    rows_apart: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Store one token per sequence in one layer's pages, then attend to all pairs of the layer.

    Each head holds ``kept + t - cut`` pairs afterwards. Only the new pair is written. A head that
    has filled its pages stores nothing and attends to its pairs; evict before that.

    Args:
        query: ``[batch, num_heads, head_dim]``, fp32, fp16 or bf16.
        new_key: ``[batch, num_kv_heads, head_dim]``, dtype of ``query``.
        new_value: As ``new_key``.
        pages: Of all layers. Updated: ``key`` and ``value``, of the dtype of ``query``,
            ``position``, and ``slope`` and ``offset`` if there are any.
        t: ``[batch]`` int32, tokens seen including this one: the token's position is ``t - 1``.
        layer: Which layer to use.
        valid: ``[batch]`` bool, False for padding, which ``t`` does not count: nothing is stored,
            and the output is attention to the pairs that were there before, 0 if there were none.
        new_slope: ``[batch, num_kv_heads]`` fp32, the new token's. With ``new_offset`` and the
            slope and offset of ``pages``, or none of the four.
        new_offset: As ``new_slope``.
        decay: As of :func:`append_attention`.
        rope: As of :func:`append_attention`.
        scale: Softmax scale; ``None`` means ``head_dim ** -0.5``.
        packed: Allow a faster attention on torch, whose bits differ from transformers' full cache.
            Triton is not affected.
        rows_apart: On torch, give each row bits that do not depend on what the other rows hold, by
            attending to each head on its own. On Triton they never depend on them.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``. The torch
            path reads lengths back.

    Returns:
        ``[batch, num_heads, head_dim]``, dtype of ``query``.

    Raises:
        ValueError: A shape, dtype, stride or device disagrees, ``layer`` does not exist, only
            some of the slope and offset tensors were given, or one norm without the other.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    from trimkv_kernels.kernels._triton.ragged_attention import _ragged_append_attention_kernel

    batch, num_kv_heads, head_dim = new_key.shape
    group, num_slots = query.shape[1] // num_kv_heads, pages.position.shape[2]
    scope, heads = pages.place(layer, num_kv_heads)
    config = tuned(
        "ragged_attention", query.device, ragged_config,
        batch, num_kv_heads, num_slots // pages.num_heads, head_dim, query.element_size(),
        num_multiprocessors(query.device),
    )  # fmt: skip
    arrival = t.new_zeros(batch, num_kv_heads)
    parts = batch * (config.splits + num_kv_heads)
    part = query.new_empty(parts * group, head_dim + 2, dtype=torch.float32)
    members = power_of_2(group)
    # half of what fits, because the loop over heads keeps registers of its own
    at_once = max(parts_at_once(power_of_2(config.splits), members, head_dim) // 2, 1)
    (valid,) = dense(valid)
    output = query.new_empty(query.shape)
    with device_guard(query.device):
        _ragged_append_attention_kernel[(batch * config.splits,)](
            query, new_key, new_value, pages.key, pages.value, pages.position, pages.page,
            pages.first_page, pages.kept, pages.cut, t.contiguous(), valid, pages.slope,
            pages.offset, *launch_arguments(new_slope, new_offset, rope, decay),
            arrival, part, output,
            log2_scale(scale, head_dim), scope, heads.start, batch, num_kv_heads,
            pages.num_heads, num_slots, pages.page.shape[2],
            *query.stride()[:2], *new_key.stride()[:2], *new_value.stride()[:2],
            GROUP=group, HEAD_DIM=head_dim, PAGE=PAGE, SPLITS=config.splits,
            MEMBERS=members, PARTS=at_once,
            BLOCK_H=power_of_2(num_kv_heads), BLOCK_G=block_d(group), BLOCK_S=config.block_s,
            BLOCK_D=block_d(head_dim), UPCAST=is_interpreted(), num_warps=config.num_warps,
            num_stages=min(config.num_stages, 2) if is_amd() else config.num_stages,
        )  # fmt: skip
    return output
