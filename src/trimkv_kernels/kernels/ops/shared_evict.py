"""Eviction for heads that share a budget: every full scope shares it out anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from trimkv_kernels.kernels._torch import shared_evict as _torch
from trimkv_kernels.kernels._torch.slots import INT32_MIN
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
    check_rule(pages, budget, buffer, min_per_head, equal, sinks, recent)
    given = {"slope": pages.slope, "offset": pages.offset, "scores": scores}
    names = [name for name, tensor in given.items() if tensor is not None]
    if names not in (["slope", "offset"], ["scores"], list(given)):
        raise ValueError(
            f"either slope and offset or scores must be given, got {' and '.join(names) or 'none'}"
        )


def check_rule(
    pages: Pages,
    budget: int,
    buffer: int,
    min_per_head: int,
    equal: float,
    sinks: int,
    recent: int,
) -> None:
    """Raise `ValueError` unless these pages can be shared out like this."""
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
    """
    full = pages.full_rows(t, budget, buffer)
    rule = ShareRule(budget, buffer, min_per_head, equal, threshold, table)
    found = score_slots(pages, t, t, full, scores, sinks, recent)
    counts, _ = cut_heads(pages, found, found.held, rule, pages.fields)
    _torch.deal_again(pages, counts, full, t, rule)


@dataclass(frozen=True)
class Candidates:
    """What competes for the slots of each scope: its slots, then a call's new tokens.

    Attributes:
        order: ``[scopes, batch, num_slots + new_heads * new]`` int32, ordered as the scores are;
            the slots in the order of the page table.
        placed: As ``order``, the positions.
        held: ``[scopes, batch, heads]`` int32, pairs in the slots of each head.
        full: ``[scopes, batch]`` int32, 1 for the rows that are cut. Nothing is known of others.
        first_new: The first head that has new tokens.
        new_heads: Heads that have new tokens.
        new: Tokens of the call.
    """

    order: Tensor
    placed: Tensor
    held: Tensor
    full: Tensor
    first_new: int
    new_heads: int
    new: int

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """What kernels need to find a head's candidates."""
        return self.order.shape[2], self.first_new, self.new_heads, self.new


_OPTIONS = {"PAGE": PAGE, "BLOCK": 1024}


def score_slots(
    pages: Pages,
    stored: Tensor,
    t: Tensor,
    full: Tensor,
    scores: Tensor | None,
    sinks: int,
    recent: int,
    *,
    first_new: int = 0,
    new_heads: int = 0,
    new: int = 0,
) -> Candidates:
    """Score the slots of full scopes; there is room for new tokens behind them."""
    from trimkv_kernels.kernels._triton import shared_evict as _triton

    scopes, batch, num_slots = pages.position.shape
    heads = pages.num_heads
    candidates = num_slots + new_heads * new
    order = t.new_full((scopes, batch, candidates), INT32_MIN)
    placed = torch.empty_like(order)
    held, flags = pages.num_valid(stored), full.int()
    with device_guard(t.device):
        _triton._score_kernel[(scopes * batch * heads,)](
            pages.position, pages.page, pages.first_page, held, flags, t.contiguous(),
            pages.slope, pages.offset, scores, pages.nan_seen, order, placed, batch, heads,
            num_slots, pages.page.shape[2], candidates, sinks, recent,
            # slope * age + offset rounds twice, as torch does
            enable_fp_fusion=False, **_OPTIONS,
        )  # fmt: skip
    return Candidates(order, placed, held, flags, first_new, new_heads, new)


def cut_heads(
    pages: Pages, found: Candidates, filled: Tensor, rule: ShareRule, fields: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Share the budget of full scopes out, and move the slots that stay to the front of their head.

    Args:
        pages: Updated: everything but the tables.
        found: The candidates.
        filled: ``[scopes, batch, heads]`` int32, the candidates of each head.
        rule: How the budget is shared out.
        fields: More tensors of the slots, to move too.

    Returns:
        ``[scopes, batch, heads]`` int32, what each head keeps, and ``[scopes, batch, new_heads,
        new]`` int32, in full scopes: which of its head's slots a new token gets, -1 if none. None
        if there are no new tokens.
    """
    from trimkv_kernels.kernels._triton import shared_evict as _triton

    scopes, batch, num_slots = pages.position.shape
    heads, num_pages, grid = pages.num_heads, pages.page.shape[2], filled.numel()
    tables = (pages.page, pages.first_page)
    with device_guard(filled.device):
        counts = torch.minimum(_counts(pages, found, rule), filled)
        counts = torch.where(found.full[..., None] != 0, counts, filled).to(torch.int32)
        moves = filled.new_empty(scopes, batch, 2, num_slots)
        num_moves = torch.empty_like(filled)
        target = None
        if found.new_heads:
            target = filled.new_empty(scopes, batch, found.new_heads, found.new)
        _triton._cut_kernel[(grid,)](
            pages.key, pages.value, pages.position, *tables, found.full, pages.slope, pages.offset,
            found.order, found.placed, counts, moves, num_moves, target, heads, num_slots,
            num_pages, *found.layout, HEAD_DIM=pages.key.shape[3],
            BLOCK_D=power_of_2(pages.key.shape[3]), BLOCK_R=16, **_OPTIONS,
        )  # fmt: skip
        for field in fields:
            width = field[0, 0, 0].numel()
            _triton._move_page_field_kernel[(grid,)](
                as_bits(field), *tables, moves, num_moves, heads, num_slots, num_pages,
                WIDTH=width, PAGE=PAGE, BLOCK_W=min(power_of_2(width), 1024), BLOCK_R=16,
            )  # fmt: skip
    return counts, target


def _counts(pages: Pages, found: Candidates, rule: ShareRule) -> Tensor:
    """What each head gets in full scopes if it has enough."""
    from trimkv_kernels.kernels._triton import shared_evict as _triton

    zeros = torch.zeros_like(pages.kept)
    if rule.table is not None:
        return _torch.counts_of(zeros, rule)
    heads, grid = pages.num_heads, pages.kept.numel()
    spans = (heads, pages.position.shape[2], *found.layout)
    order, sure = found.order, zeros
    share = torch.full_like(found.full, heads * (rule.budget - rule.min_per_head))
    if rule.threshold is not None:
        order = torch.full_like(found.order, INT32_MIN)
        _triton._sure_kernel[(grid,)](
            pages.first_page, found.full, found.order, found.placed, order, sure, *spans,
            rule.min_per_head, _order_of(rule.threshold), **_OPTIONS,
        )  # fmt: skip
        share = heads * rule.budget - sure.sum(dim=-1, dtype=torch.int32)
    border = found.full.new_zeros(*found.full.shape, 3)
    top, equal = torch.zeros_like(zeros), torch.zeros_like(zeros)
    _triton._share_kernel[(found.full.numel(),)](
        found.full, order, found.placed, share, border, found.order.shape[2], num_warps=8,
        BLOCK=_OPTIONS["BLOCK"],
    )  # fmt: skip
    _triton._count_kernel[(grid,)](
        pages.first_page, found.full, order, found.placed, border, top, equal, *spans, **_OPTIONS
    )
    # on the border, lower heads come first
    before = equal.cumsum(dim=-1) - equal
    top = top + torch.minimum((border[..., 2:] - before).clamp(min=0), equal)
    return sure + top if rule.threshold is not None else _torch.counts_of(top, rule)


def _order_of(score: float) -> int:
    """The int32 that a score becomes, as in the kernels."""
    bits = int(torch.tensor(score, dtype=torch.float32).view(torch.int32))
    return INT32_MIN - bits if bits < 0 else bits
