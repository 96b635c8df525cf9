"""Eviction where heads share a budget: every full scope shares it out anew."""

from typing import Annotated

from torch import Tensor

from trimkv_kernels.kernels._torch import shared_evict as _torch
from trimkv_kernels.kernels.checks import FLOAT32, INT32, Shape, check_int
from trimkv_kernels.kernels.op import Uses, op
from trimkv_kernels.kernels.pages import PAGE, Pages, num_pages


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
    needed = num_pages(pages.num_heads, budget, buffer)
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

    A scope of ``n`` heads is full when it holds ``n * (budget + buffer)`` pairs; the others are
    left alone. By the rule of :class:`~trimkv_kernels.kernels.ShareRule` a full one keeps at most
    ``n * budget``. Kept pairs move within their head, and pages pass from head to head. Nothing is
    read back from a GPU.

    The score is ``slope * (t - position) + offset``, rounded after the product and after the sum,
    or ``scores``. Protected pairs score +inf, NaN counts as -inf, -0.0 equals 0.0. Of equal scores
    the newer token stays, then the lower head: what is kept depends on scores and positions alone.

    Args:
        pages: Of all layers. Updated: all of it. ``nan_seen`` is set where a full scope had a NaN
            score.
        t: ``[batch]`` int32, tokens each sequence has seen, all of them stored.
        budget: Pairs that a head keeps, in the mean.
        buffer: New tokens between evictions, where the budget is used up.
        min_per_head: Pairs of each head beside its share.
        equal: Fraction of the budget that is shared out equally.
        threshold: Lowest score that stays; None where the budget alone decides.
        table: ``[batch, heads]`` int32, what each head keeps; None where scores decide.
        scores: Like ``position`` but fp32; read only. None: slope and offset of ``pages``.
        sinks: Protect pairs with ``position < sinks``.
        recent: Protect pairs with ``position >= t - recent``.
        impl: ``"auto"`` (Triton on a GPU, torch elsewhere), ``"triton"`` or ``"torch"``. The torch
            path reads back which scopes are full.

    Raises:
        ValueError: A shape, dtype, stride or device disagrees, a number is out of range, the pages
            are not those of this budget and buffer, or there are neither ``scores`` nor slope and
            offset.
        RuntimeError: ``impl="triton"`` cannot run here.
    """
    raise NotImplementedError("slots in pages have no Triton kernel yet: pass impl='torch'")
