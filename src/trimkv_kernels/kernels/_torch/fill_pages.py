"""Store the tokens of a longer call in the pages of heads that share a budget."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimkv_kernels.kernels._torch.shared_evict import NewPairs, share_pages, tensors_of
from trimkv_kernels.kernels.pages import Pages, ShareRule


def fill_pages(
    new_key: Sequence[Tensor],
    new_value: Sequence[Tensor],
    new_position: Tensor,
    pages: Pages,
    t: Tensor,
    stored: Tensor,
    *,
    first_head: int,
    budget: int,
    buffer: int,
    full: Tensor | None = None,
    min_per_head: int = 0,
    equal: float = 0.0,
    threshold: float | None = None,
    table: Tensor | None = None,
    new_slope: Sequence[Tensor] = (),
    new_offset: Sequence[Tensor] = (),
    scores: Tensor | None = None,
    new_scores: Sequence[Tensor] = (),
    new_fields: Sequence[Tensor] = (),
    valid: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
) -> None:
    """See `trimkv_kernels.kernels.fill_pages`."""
    new = []
    for layer, key in enumerate(new_key):
        count = len(pages.fields)
        new.append(
            NewPairs(
                first_head=first_head + layer * key.shape[1],
                key=key,
                value=new_value[layer],
                position=new_position,
                valid=valid,
                slope=new_slope[layer] if new_slope else None,
                offset=new_offset[layer] if new_offset else None,
                fields=tuple(new_fields[layer * count : (layer + 1) * count]),
                scores=new_scores[layer] if new_scores else None,
            )
        )
    if full is None:
        for part in new:
            _append(pages, part, stored)
        return
    rule = ShareRule(budget, buffer, min_per_head, equal, threshold, table)
    share_pages(pages, new, full, stored, t, rule, scores=scores, sinks=sinks, recent=recent)


def _append(pages: Pages, new: NewPairs, stored: Tensor) -> None:
    """Put new tokens of one layer behind the valid slots of its heads. There must be room.

    Args:
        pages: Of one scope. Updated.
        new: The tokens.
        stored: ``[batch]`` int32, tokens that the slots of each row hold or have dropped.
    """
    batch, heads, count = new.shape
    own = slice(new.first_head, new.first_head + heads)
    valid = new.valid
    if valid is None:
        valid = torch.ones(batch, count, dtype=torch.bool, device=stored.device)
    held = pages.num_valid(stored)[0, :, own, None]
    slot = (held + valid.cumsum(dim=1)[:, None] - 1).clamp(min=0)
    rows = pages.slot_rows(new.first_head // heads, slot)
    chosen = valid[:, None].expand(batch, heads, count)
    for base, parts in tensors_of(pages, [new]):
        base.flatten(0, 2).index_copy_(0, rows[chosen], parts[0][chosen])
