"""Store the tokens of a longer call where heads share a budget."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from trimkv_kernels.kernels._torch import fill_pages as _torch
from trimkv_kernels.kernels._torch.shared_evict import deal_again
from trimkv_kernels.kernels.checks import (
    BOOL,
    FLOAT32,
    INT32,
    Shape,
    check_int,
    check_tensor,
    check_unit_stride,
)
from trimkv_kernels.kernels.launch import as_bits, dense, device_guard, power_of_2
from trimkv_kernels.kernels.op import Uses, op
from trimkv_kernels.kernels.ops.shared_evict import check_rule, cut_heads, score_slots
from trimkv_kernels.kernels.pages import PAGE, Pages, ShareRule


def _check(
    new_key: Sequence[Tensor],
    new_value: Sequence[Tensor],
    new_position: Tensor,
    pages: Pages,
    first_head: int,
    budget: int,
    buffer: int,
    full: Tensor | None,
    min_per_head: int,
    equal: float,
    new_slope: Sequence[Tensor],
    new_offset: Sequence[Tensor],
    scores: Tensor | None,
    new_scores: Sequence[Tensor],
    new_fields: Sequence[Tensor],
    sinks: int,
    recent: int,
    **_: object,
) -> None:
    check_rule(pages, budget, buffer, min_per_head, equal, sinks, recent)
    scopes, batch, heads = pages.kept.shape
    if scopes != 1:
        raise ValueError(f"pages must be of one scope, got {scopes}: pass pages.scope(index)")
    if not new_key:
        raise ValueError("new_key must have the keys of at least one layer, got none")
    layers = len(new_key)
    num_kv_heads = new_key[0].shape[1]
    new = (batch, num_kv_heads, new_position.shape[1])
    check_int("first_head", first_head, 0, heads - layers * num_kv_heads)
    affine = layers if pages.slope is not None else 0
    scored = layers if scores is not None else 0
    if full is not None and not affine and not scored:
        raise ValueError("either slope and offset or scores must be given to cut a row, got none")
    key, of_slots = (pages.key.dtype,), (*new, pages.key.shape[3])
    _check_layers("new_key", new_key, layers, of_slots, key, pages)
    _check_layers("new_value", new_value, layers, of_slots, key, pages)
    for name, given in (("new_key", new_key), ("new_value", new_value)):
        for index, tensor in enumerate(given):
            check_unit_stride(f"{name}[{index}]", tensor)
    _check_layers("new_slope", new_slope, affine, new, FLOAT32, pages)
    _check_layers("new_offset", new_offset, affine, new, FLOAT32, pages)
    _check_layers("new_scores", new_scores, scored, new, FLOAT32, pages)
    count = len(pages.fields)
    if len(new_fields) != layers * count:
        raise ValueError(
            f"new_fields must have {layers * count} tensors, {count} for each layer, "
            f"got {len(new_fields)}"
        )
    for index, field in enumerate(pages.fields):
        own = new_fields[index::count]
        name = f"new_fields of pages.fields[{index}]"
        _check_layers(name, own, layers, (*new, *field.shape[3:]), (field.dtype,), pages)


def _check_layers(
    name: str,
    given: Sequence[Tensor],
    count: int,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    pages: Pages,
) -> None:
    if len(given) != count:
        raise ValueError(f"{name} must have {count} tensors, got {len(given)}")
    for index, tensor in enumerate(given):
        check_tensor(f"{name}[{index}]", tensor, shape, dtypes, pages.key.device)


@op(
    torch=_torch.fill_pages,
    writes=(
        *("pages.key", "pages.value", "pages.position", "pages.page", "pages.first_page"),
        *("pages.kept", "pages.cut", "pages.slope", "pages.offset", "pages.fields"),
        *("pages.nan_seen", "scores"),
    ),
    check=_check,
)
def fill_pages(
    new_key: Sequence[Tensor],
    new_value: Sequence[Tensor],
    new_position: Annotated[Tensor, Shape("batch, new", INT32)],
    pages: Annotated[
        Pages,
        Uses(
            *("key", "value", "position", "page", "first_page", "kept", "cut"),
            *("slope", "offset", "fields", "nan_seen"),
        ),
    ],
    t: Annotated[Tensor, Shape("batch", INT32)],
    stored: Annotated[Tensor, Shape("batch", INT32)],
    *,
    first_head: int,
    budget: int,
    buffer: int,
    full: Annotated[Tensor | None, Shape("scopes, batch", BOOL)] = None,
    min_per_head: int = 0,
    equal: float = 0.0,
    threshold: float | None = None,
    table: Annotated[Tensor | None, Shape("batch, heads", INT32, dense=True)] = None,
    new_slope: Sequence[Tensor] = (),
    new_offset: Sequence[Tensor] = (),
    scores: Annotated[Tensor | None, Shape("scopes, batch, num_slots", FLOAT32, dense=True)] = None,
    new_scores: Sequence[Tensor] = (),
    new_fields: Sequence[Tensor] = (),
    valid: Annotated[Tensor | None, Shape("batch, new", BOOL)] = None,
    sinks: int = 0,
    recent: int = 0,
    impl: str = "auto",
) -> None:
    """Keep the best of a scope's slots and of a call's new tokens of some of its layers, in place.

    A row that ``full`` names keeps at most ``heads * budget`` pairs of all, by the rule of
    :class:`~trimkv_kernels.kernels.pages.ShareRule`; its pages are dealt out again. In other rows
    the new tokens follow what their heads hold, for which there must be room. Afterwards
    ``kept + t - cut`` is what each head holds.

    Scores, protection and ties are those of :func:`shared_evict`.

    Args:
        new_key: Of each layer ``[batch, num_kv_heads, new, head_dim]``, dtype of ``pages.key``,
            head vectors contiguous.
        new_value: As ``new_key``.
        new_position: ``[batch, new]`` int32.
        pages: Of one scope. Updated: all of it.
        t: ``[batch]`` int32, tokens each sequence has seen, those of the call included.
        stored: ``[batch]`` int32: the slots of a head hold ``kept + stored - cut`` pairs. That is
            ``t`` without the call; ``t`` if ``cut`` is ``t`` already, because a layer before was
            cut in the same call.
        first_head: The scope's head that is the first of the first layer; the layers are adjacent.
        budget: Pairs that a head keeps, in the mean.
        buffer: New tokens between evictions, if the whole budget is used.
        full: ``[1, batch]`` bool, the rows that are cut; None if there are none.
        min_per_head: Pairs that each head gets in addition to its share.
        equal: Fraction of the budget that is shared out equally.
        threshold: Lowest score that stays; None if the budget alone decides.
        table: ``[batch, heads]`` int32, how many pairs each head keeps; None if scores decide.
        new_slope: Of each layer ``[batch, num_kv_heads, new]`` fp32, if ``pages`` has slopes.
        new_offset: As ``new_slope``.
        scores: Like ``position`` but fp32, of the slots. Updated: they move with the pairs. None:
            slope and offset.
        new_scores: Of each layer ``[batch, num_kv_heads, new]`` fp32, if there are ``scores``.
        new_fields: The new tokens' numbers, ``[batch, num_kv_heads, new, ...]``: all fields of the
            first layer, then of the next.
        valid: ``[batch, new]`` bool, False for padding, which is not stored; None when every token
            is real.
        sinks: Protect pairs with ``position < sinks``.
        recent: Protect pairs with ``position >= t - recent``.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``. The torch
            path reads back which pairs move.

    Raises:
        ValueError: A shape, dtype, stride or device disagrees, a number is out of range, the pages
            are not one scope of this budget and buffer, or a row is cut and nothing was given to
            score by.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    from trimkv_kernels.kernels._triton import fill_pages as _triton

    batch, num_kv_heads, new = new_key[0].shape[:3]
    own = slice(first_head, first_head + len(new_key) * num_kv_heads)
    heads, num_slots, device = pages.num_heads, pages.position.shape[2], t.device
    (mask,) = dense(valid)
    real = new_position.new_ones(batch, new) if mask is None else mask.int()
    rank = real.cumsum(dim=1, dtype=torch.int32)
    behind = pages.num_valid(stored)[:, :, own, None] + rank[None, :, None] - 1
    target = behind.masked_fill(real[None, :, None] == 0, -1).contiguous()
    new_position = new_position.contiguous()
    fields = [list(new_fields[i :: len(pages.fields)]) for i in range(len(pages.fields))]
    bases = list(pages.fields)
    if scores is not None:
        bases, fields = [*bases, scores], [*fields, list(new_scores)]
    if full is not None:
        span = {"first_new": first_head, "new_heads": own.stop - first_head, "new": new}
        found = score_slots(pages, stored, t, full, scores, sinks, recent, **span)
        terms = [_joined(x) for x in (new_slope, new_offset, new_scores)]
        with device_guard(device):
            _triton._score_new_kernel[(batch * found.new_heads,)](
                new_position, mask, found.full, t.contiguous(), *terms, pages.nan_seen,
                found.order, found.placed, *found.layout[1:], num_slots, found.order.shape[2],
                sinks, recent, BLOCK=1024, enable_fp_fusion=False,
            )  # fmt: skip
        filled = found.held.clone()
        filled[:, :, own] += rank[None, :, -1:]
        rule = ShareRule(budget, buffer, min_per_head, equal, threshold, table)
        counts, chosen = cut_heads(pages, found, filled, rule, bases)
        if chosen is not None:
            target = torch.where(full[..., None, None], chosen, target)
        deal_again(pages, counts, full, t, rule)
    blocks = -(-new // 16)
    tables = (pages.page, pages.first_page)
    sizes = (num_kv_heads, new, blocks, heads, num_slots, pages.page.shape[2], target.stride(1))
    with device_guard(device):
        for layer, (key, value) in enumerate(zip(new_key, new_value, strict=True)):
            first = first_head + layer * num_kv_heads
            slots = target[:, :, layer * num_kv_heads :]
            slope, offset = (x[layer] if x else None for x in (new_slope, new_offset))
            grid = (batch * num_kv_heads * blocks,)
            _triton._place_kernel[grid](
                key, value, new_position, *dense(slope, offset), pages.key, pages.value,
                pages.position, pages.slope, pages.offset, *tables, slots, first, *sizes,
                *key.stride()[:3], *value.stride()[:3], HEAD_DIM=key.shape[3], PAGE=PAGE,
                BLOCK_D=power_of_2(key.shape[3]), BLOCK_R=16,
            )  # fmt: skip
            for base, given in zip(bases, fields, strict=True):
                width = base[0, 0, 0].numel()
                _triton._place_field_kernel[grid](
                    as_bits(given[layer].contiguous()), as_bits(base), *tables, slots, first,
                    *sizes, WIDTH=width, PAGE=PAGE, BLOCK_W=min(power_of_2(width), 1024),
                    BLOCK_R=16,
                )  # fmt: skip


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """Numbers of all layers' new tokens, ``[batch, heads, new]``; None if there are none."""
    return torch.cat(tuple(parts), dim=1) if parts else None
