"""Eviction for heads that share a budget: every full scope shares it out anew."""

from typing import Annotated

import torch
from torch import Tensor

from trimkv_kernels.kernels._torch import shared_evict as _torch
from trimkv_kernels.kernels.checks import FLOAT32, INT32, Shape, check_int
from trimkv_kernels.kernels.launch import as_bits, device_guard, power_of_2
from trimkv_kernels.kernels.op import Uses, op
from trimkv_kernels.kernels.pages import PAGE, Pages, ShareRule
from trimkv_kernels.kernels.pages import num_pages as pages_of


def _check(
    pages: Pages,
    budget: int,
    buffer: int,
    min_per_head: int,
    equal: float,
    scores: Tensor | None,
    sinks: int,
    recent: int,
    **_: object,
) -> None:
    check_int("budget", budget, 1)
    check_int("buffer", buffer, 1)
    check_int("min_per_head", min_per_head, 0, budget)
    check_int("sinks", sinks, 0)
    check_int("recent", recent, 0)
    if not 0 <= equal <= 1:
        raise ValueError(f"equal must lie in [0, 1], got {equal}")
    needed = pages_of(pages.num_heads, budget, buffer)
    if pages.page.shape[2] != needed or pages.position.shape[2] != needed * PAGE:
        raise ValueError(
            f"pages must have {needed} pages of {PAGE} slots for budget={budget} and "
            f"buffer={buffer}, got {pages.page.shape[2]} of {pages.position.shape[2]} slots"
        )
    given = {"slope": pages.slope, "offset": pages.offset, "scores": scores}
    names = [name for name, tensor in given.items() if tensor is not None]
    if names not in (["slope", "offset"], ["scores"], list(given)):
        raise ValueError(
            f"either slope and offset or scores must be given, got {' and '.join(names) or 'none'}"
        )


@op(
    torch=_torch.shared_evict,
    writes=(
        *("pages.key", "pages.value", "pages.position", "pages.page", "pages.first_page"),
        *("pages.kept", "pages.cut", "pages.slope", "pages.offset", "pages.fields"),
        "pages.nan_seen",
    ),
    check=_check,
)
def shared_evict(
    pages: Annotated[
        Pages,
        Uses(
            *("key", "value", "position", "page", "first_page", "kept", "cut"),
            *("slope", "offset", "fields", "nan_seen"),
        ),
    ],
    t: Annotated[Tensor, Shape("batch", INT32)],
    *,
    budget: int,
    buffer: int,
    min_per_head: int = 0,
    equal: float = 0.0,
    threshold: float | None = None,
    table: Annotated[Tensor | None, Shape("batch, heads", INT32, dense=True)] = None,
    scores: Annotated[Tensor | None, Shape("scopes, batch, num_slots", FLOAT32, dense=True)] = None,
    sinks: int = 0,
    recent: int = 0,
    impl: str = "auto",
) -> None:
    """Let every full scope share its budget out over its heads, in place.

    A scope of ``n`` heads is full when it holds ``n * (budget + buffer)`` pairs. A full scope keeps
    at most ``n * budget``, by the rule of :class:`~trimkv_kernels.kernels.pages.ShareRule`; others
    do not change. Kept pairs move within their head, and pages pass from head to head.

    The score is ``slope * (t - position) + offset``, rounded after the product and after the sum,
    or ``scores``. Protected pairs score +inf, NaN counts as -inf, -0.0 equals 0.0. Of equal scores
    the newer token stays, then the lower head.

    Args:
        pages: Of all layers. All of it is updated. ``nan_seen`` is set if a full scope had a NaN
            score.
        t: ``[batch]`` int32, tokens each sequence has seen, all of them stored.
        budget: Pairs that a head keeps, on average.
        buffer: New tokens between evictions, if the whole budget is used.
        min_per_head: Pairs that each head gets in addition to its share.
        equal: Fraction of the budget that is shared out equally.
        threshold: Lowest score that stays; None if the budget alone decides.
        table: ``[batch, heads]`` int32, how many pairs each head keeps; None if scores decide.
        scores: Like ``position`` but fp32; read only. None: slope and offset of ``pages``.
        sinks: Protect pairs with ``position < sinks``.
        recent: Protect pairs with ``position >= t - recent``.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``. The torch
            path reads back which pairs move.

    Raises:
        ValueError: A shape, dtype, stride or device disagrees, a number is out of range, the pages
            are not those of this budget and buffer, or there are neither ``scores`` nor slope and
            offset.
        RuntimeError: ``impl="triton"`` cannot run here.
        NotImplementedError: Triton with a ``threshold``.
    """
    from trimkv_kernels.kernels._triton import shared_evict as _triton

    if threshold is not None:
        raise NotImplementedError("a threshold has no Triton kernels yet: pass impl='torch'")
    scopes, batch, num_slots = pages.position.shape
    heads, device, num_pages = pages.num_heads, pages.key.device, pages.page.shape[2]
    full = pages.full_rows(t, budget, buffer)
    held, flags = pages.num_valid(t), full.int()
    order, placed = (torch.empty_like(pages.position) for _ in range(2))
    moves = pages.position.new_empty(scopes, batch, 2, num_slots)
    num_moves, top = torch.empty_like(pages.kept), torch.zeros_like(pages.kept)
    grid, tables = scopes * batch * heads, (pages.page, pages.first_page)
    options = {"PAGE": PAGE, "BLOCK": 1024}
    with device_guard(device):
        _triton._score_kernel[(grid,)](
            pages.position, *tables, held, flags, t.contiguous(), pages.slope, pages.offset,
            scores, pages.nan_seen, order, placed, batch, heads, num_slots, num_pages, sinks,
            recent, enable_fp_fusion=False, **options,
        )  # fmt: skip
        if table is None:
            _triton._share_kernel[(scopes * batch,)](
                pages.first_page, flags, order, placed, top, heads, num_slots,
                heads * (budget - min_per_head), num_warps=8, **options,
            )  # fmt: skip
        rule = ShareRule(budget, buffer, min_per_head, equal, None, table)
        count = torch.minimum(_torch.counts_of(top, rule), held).to(torch.int32)
        _triton._cut_kernel[(grid,)](
            pages.key, pages.value, pages.position, *tables, flags, pages.slope, pages.offset,
            order, placed, count, moves, num_moves, heads, num_slots, num_pages,
            HEAD_DIM=pages.key.shape[3], BLOCK_D=power_of_2(pages.key.shape[3]), BLOCK_R=16,
            **options,
        )  # fmt: skip
        for field in pages.fields:
            width = field[0, 0, 0].numel()
            _triton._move_page_field_kernel[(grid,)](
                as_bits(field), *tables, moves, num_moves, heads, num_slots, num_pages,
                WIDTH=width, PAGE=PAGE, BLOCK_W=min(power_of_2(width), 1024), BLOCK_R=16,
            )  # fmt: skip
    _torch.deal_again(pages, count, full, t, rule)
