"""Share a budget out over the heads of a scope, and cut each head to its share.

All candidates of a scope are sorted once: by score, then newer tokens first, then the lower head.
Afterwards every head's slots are contiguous, and pages are in the order of the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_kernels.kernels._torch.primitives import host_reads_are_free
from trimkv_kernels.kernels._torch.slots import protect, rank_keys
from trimkv_kernels.kernels.checks import required
from trimkv_kernels.kernels.pages import PAGE, Pages, ShareRule, deal

_LAST = torch.iinfo(torch.int64).min  # below the rank of any candidate


@dataclass(frozen=True)
class NewPairs:
    """New tokens of one layer's heads, as candidates for the slots of their scope.

    Attributes:
        first_head: The scope's head that is the layer's first.
        key: ``[batch, num_kv_heads, new, head_dim]``.
        value: As ``key``.
        position: ``[batch, new]`` int32.
        valid: ``[batch, new]`` bool, False for padding; None when every token is real.
        slope: ``[batch, num_kv_heads, new]`` fp32 of an affine policy, else None.
        offset: As ``slope``.
        fields: Each ``[batch, num_kv_heads, new, ...]``.
        scores: ``[batch, num_kv_heads, new]`` fp32; None if they are affine.
    """

    first_head: int
    key: Tensor
    value: Tensor
    position: Tensor
    valid: Tensor | None
    slope: Tensor | None
    offset: Tensor | None
    fields: tuple[Tensor, ...]
    scores: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, heads, tokens."""
        batch, heads, new = self.key.shape[:3]
        return batch, heads, new


@dataclass(frozen=True)
class _Candidates:
    """Slots in the order of the page table, followed by new tokens: ``[scopes, batch, n]``.

    Attributes:
        head, position, score, valid: Of each.
        address: Addresses of the slots.
    """

    head: Tensor
    position: Tensor
    score: Tensor
    valid: Tensor
    address: Tensor


def shared_evict(
    pages: Pages,
    t: Tensor,
    *,
    budget: int,
    buffer: int,
    min_per_head: int = 0,
    equal: float = 0.0,
    threshold: float | None = None,
    table: Tensor | None = None,
    scores: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
) -> None:
    """See `trimkv_kernels.kernels.shared_evict`."""
    full = pages.full_rows(t, budget, buffer)
    if host_reads_are_free(full) and not full.any():
        return
    rule = ShareRule(budget, buffer, min_per_head, equal, threshold, table)
    share_pages(pages, (), full, t, t, rule, scores=scores, sinks=sinks, recent=recent)


def share_pages(
    pages: Pages,
    new: Sequence[NewPairs],
    full: Tensor,
    stored: Tensor,
    t: Tensor,
    rule: ShareRule,
    *,
    scores: Tensor | None,
    sinks: int,
    recent: int,
) -> None:
    """Share a budget out over the slots and new tokens of each scope, and store what stays.

    Args:
        pages: Of one scope, or of several if there are no new tokens. Updated.
        new: New tokens of some layers of the scope, by ascending heads.
        full: ``[scopes, batch]`` bool: the rows that are cut. The others keep everything.
        stored: ``[batch]`` int32, tokens that the slots of each row hold or have dropped.
        t: ``[batch]`` int32, tokens seen, the new ones included.
        rule: How the budget is shared out.
        scores: ``[scopes, batch, num_slots]`` fp32, one for each slot; they move with the slots.
            None: slope and offset of the pages.
        sinks: Protect ``position < sinks``.
        recent: Protect ``position >= t - recent``.
    """
    found = _candidates(pages, new, stored, t, scores, sinks, recent)
    keep, counts = _best(found, full, pages.num_heads, rule)
    anew = full[..., None]
    first_page = torch.where(anew, deal(counts, rule.budget, rule.buffer), pages.first_page)
    straight = torch.arange(pages.page.shape[2], dtype=torch.int32, device=t.device)
    page = torch.where(anew, straight, pages.page)
    target = _targets(found, keep, pages.num_heads, first_page, page)
    pages.first_page.copy_(first_page)
    pages.page.copy_(page)
    note_counts(pages, counts, full, t)
    tensors = tensors_of(pages, new)
    if scores is not None:
        tensors.append((scores, [required("scores", part.scores) for part in new]))
    for scope in range(full.shape[0]):
        for row in range(full.shape[1]):
            here = (scope, row)
            _move(tensors, found.address[here], keep[here], target[here], here)


def tensors_of(pages: Pages, new: Sequence[NewPairs]) -> list[tuple[Tensor, list[Tensor]]]:
    """Every tensor of the pages, with the values for it in each of ``new``."""
    found: list[tuple[Tensor, list[Tensor]]] = [
        (pages.key, [part.key for part in new]),
        (pages.value, [part.value for part in new]),
        (pages.position, [_over_heads(part.position, part) for part in new]),
        *((field, [part.fields[i] for part in new]) for i, field in enumerate(pages.fields)),
    ]
    if pages.slope is not None and pages.offset is not None:
        found.append((pages.slope, [required("slope", part.slope) for part in new]))
        found.append((pages.offset, [required("offset", part.offset) for part in new]))
    return found


def _candidates(
    pages: Pages,
    new: Sequence[NewPairs],
    stored: Tensor,
    t: Tensor,
    scores: Tensor | None,
    sinks: int,
    recent: int,
) -> _Candidates:
    scopes, batch, num_slots = pages.position.shape
    index = torch.arange(num_slots, device=t.device).expand(scopes, batch, num_slots).contiguous()
    first = pages.first_page.long() * PAGE
    # the bounds of heads in the table; from the last one on pages are free
    head = torch.searchsorted(first[..., 1:].contiguous(), index, right=True)
    own = head.clamp(max=pages.num_heads - 1)
    ordinal = index - first.gather(2, own)
    valid = (head < pages.num_heads) & (ordinal < pages.num_valid(stored).gather(2, own))
    address = pages.addresses(index)
    position = pages.position.gather(2, address)
    if scores is not None:
        score = scores.gather(2, address)
    else:
        score = _affine(pages.slope, pages.offset, address, t[None, :, None] - position)
    parts = [(own, position, score, valid)]
    parts += [_of_new(part, t, pages.num_heads) for part in new]
    head, position, score, valid = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    if pages.nan_seen is not None:
        found = torch.zeros_like(pages.nan_seen).expand(batch, -1, -1).transpose(0, 1).contiguous()
        found.scatter_add_(2, head, (score.isnan() & valid).int())
        pages.nan_seen.masked_fill_(found.any(dim=1), 1)
    # rows first, as `protect` has them
    score = protect(score.transpose(0, 1), position.transpose(0, 1), t, sinks, recent)
    return _Candidates(head, position, score.transpose(0, 1), valid, address)


def _affine(slope: Tensor | None, offset: Tensor | None, address: Tensor, age: Tensor) -> Tensor:
    slope, offset = required("slope", slope), required("offset", offset)
    return slope.gather(2, address) * age + offset.gather(2, address)


def _of_new(part: NewPairs, t: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Head, position, score and validity of new tokens, each ``[1, batch, heads * new]``."""
    batch, heads, new = part.shape
    head = torch.arange(part.first_head, part.first_head + heads, device=t.device)
    position = _over_heads(part.position, part)
    score = part.scores
    if score is None:
        slope, offset = required("slope", part.slope), required("offset", part.offset)
        score = slope * (t[:, None, None] - position) + offset
    valid = torch.ones_like(position, dtype=torch.bool)
    if part.valid is not None:
        valid = _over_heads(part.valid, part)
    head = head[:, None].expand(batch, heads, new)
    flat = [x.reshape(1, batch, heads * new) for x in (head, position, score, valid)]
    return flat[0], flat[1], flat[2], flat[3]


def _best(
    found: _Candidates, full: Tensor, num_heads: int, rule: ShareRule
) -> tuple[Tensor, Tensor]:
    """Which candidates stay, and how many per head: ``[scopes, batch, heads]`` int32."""
    rank_key = rank_keys(found.score.contiguous(), found.position)
    rank_key = rank_key.masked_fill(~found.valid, _LAST)
    order = rank_key.argsort(dim=-1, descending=True, stable=True)
    valid = found.valid.gather(2, order)
    head = found.head.gather(2, order).masked_fill(~valid, num_heads)
    by_head = head.argsort(dim=-1, stable=True)
    filled = _count(head, valid, num_heads)
    first = filled.cumsum(dim=-1) - filled
    index = torch.arange(head.shape[2], device=head.device).expand_as(head)
    grouped = head.gather(2, by_head).clamp(max=num_heads - 1)
    rank_in_head = torch.empty_like(index).scatter_(2, by_head, index - first.gather(2, grouped))
    score = found.score.gather(2, order)
    counts = _share_out(head, valid, score, rank_in_head, filled, rule)
    counts = torch.where(full[..., None], torch.minimum(counts, filled), filled)
    stays = valid & (rank_in_head < counts.gather(2, head.clamp(max=num_heads - 1)))
    return torch.empty_like(stays).scatter_(2, order, stays), counts.to(torch.int32)


def _share_out(
    head: Tensor,
    valid: Tensor,
    score: Tensor,
    rank_in_head: Tensor,
    filled: Tensor,
    rule: ShareRule,
) -> Tensor:
    """How many pairs each head gets, int64. The candidates are sorted, the best first."""
    num_heads = filled.shape[2]
    if rule.threshold is not None:
        sure = valid & (rank_in_head < rule.min_per_head)
        passes = valid & ~sure & (score >= rule.threshold)
        room = num_heads * rule.budget - sure.sum(dim=-1, keepdim=True)
        return _count(head, sure | (passes & (passes.cumsum(dim=-1) <= room)), num_heads)
    share = num_heads * (rule.budget - rule.min_per_head)
    index = torch.arange(head.shape[2], device=head.device)
    top = _count(head, valid & (index < share), num_heads)
    return counts_of(top, rule)


def counts_of(top: Tensor, rule: ShareRule) -> Tensor:
    """How many pairs each head gets, int64, from how many of the scope's best pairs it has.

    Args:
        top: ``[scopes, batch, heads]``.
        rule: Without a threshold.
    """
    if rule.table is not None:
        return rule.table.long().expand_as(top)
    if rule.equal > 0:
        exact = (1 - rule.equal) * top.double() + rule.equal * rule.budget
        down = exact.floor()
        left = (exact.sum(-1, keepdim=True) - down.sum(-1, keepdim=True)).round()
        place = (exact - down).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        top = down + (place < left)
    return top.long() + rule.min_per_head


def note_counts(pages: Pages, counts: Tensor, full: Tensor, t: Tensor) -> None:
    """Record what each head holds after a call.

    Args:
        pages: Updated: ``kept`` and ``cut``.
        counts: ``[scopes, batch, heads]`` int32, the pairs of each head.
        full: ``[scopes, batch]`` bool, the rows that were cut.
        t: ``[batch]`` int32, tokens seen.
    """
    pages.cut.copy_(torch.where(full, t, pages.cut))
    pages.kept.copy_(counts - (t - pages.cut)[..., None])


def deal_again(pages: Pages, counts: Tensor, full: Tensor, t: Tensor, rule: ShareRule) -> None:
    """Pass pages from heads that need fewer to heads that need more; no shape depends on data.

    Args:
        pages: Updated: the tables. A head's first pages stay its own.
        counts: ``[scopes, batch, heads]`` int32, what each head holds now.
        full: ``[scopes, batch]`` bool, the rows that were cut; the others are left alone.
        t: ``[batch]`` int32, tokens seen.
        rule: For the budget and the buffer.
    """
    heads, old = pages.num_heads, pages.first_page.long()
    new = deal(counts, rule.budget, rule.buffer).long()
    index = torch.arange(pages.page.shape[2], device=t.device).expand_as(pages.page).contiguous()

    def own_pages(bounds: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """For each entry of a table: its head's entry in the other, and whether there is one."""
        head = torch.searchsorted(bounds[..., 1:].contiguous(), index, right=True)
        own = head.clamp(max=heads - 1)
        ordinal = index - bounds.gather(2, own)
        is_shared = (head < heads) & (ordinal < others.diff(dim=-1).gather(2, own))
        return others.gather(2, own) + ordinal, is_shared

    _, stays = own_pages(old, new)
    entry, is_old = own_pages(new, old)
    released = stays.int().argsort(dim=-1, stable=True)  # of the old table, in its order
    rank = ((~is_old).cumsum(dim=-1) - 1).clamp(min=0)
    source = torch.where(is_old, entry, released.gather(2, rank))
    anew = full[..., None]
    page = pages.page.gather(2, source.clamp(min=0, max=pages.page.shape[2] - 1))
    pages.page.copy_(torch.where(anew, page, pages.page))
    pages.first_page.copy_(torch.where(anew, new.to(torch.int32), pages.first_page))
    note_counts(pages, counts, full, t)


def _count(head: Tensor, chosen: Tensor, num_heads: int) -> Tensor:
    """``[scopes, batch, heads]`` int64: the chosen candidates of each head."""
    zeros = torch.zeros(*head.shape[:2], num_heads + 1, dtype=torch.int64, device=head.device)
    return zeros.scatter_add_(2, head, chosen.long())[..., :num_heads]


def _targets(
    found: _Candidates, keep: Tensor, num_heads: int, first_page: Tensor, page: Tensor
) -> Tensor:
    """The new slot of each candidate that stays. The order within a head is kept."""
    slots = found.address.shape[2]
    parts, before = (
        [],
        torch.zeros(*keep.shape[:2], num_heads, dtype=torch.int64, device=keep.device),
    )
    for part in (slice(0, slots), slice(slots, None)):
        head, stays = found.head[..., part], keep[..., part].long()
        counts = _count(head, stays, num_heads)
        others = counts.cumsum(dim=-1) - counts  # of the heads before
        parts.append((stays.cumsum(dim=-1) - 1 - others.gather(2, head)) + before.gather(2, head))
        before = counts
    ordinal = torch.cat(parts, dim=2).clamp(min=0)
    index = first_page.long().gather(2, found.head) * PAGE + ordinal
    index = index.clamp(max=slots - 1)  # of candidates that do not stay
    return page.gather(2, index // PAGE).long() * PAGE + index % PAGE


def _move(
    tensors: Sequence[tuple[Tensor, list[Tensor]]],
    address: Tensor,
    keep: Tensor,
    target: Tensor,
    here: tuple[int, int],
) -> None:
    """Move the kept pairs of one row. One row at a time bounds the copy."""
    slots = len(address)
    moves = keep[:slots] & (address != target[:slots])
    source, onto = address[moves], target[:slots][moves]
    for base, parts in tensors:
        base[here].index_copy_(0, onto, base[here].index_select(0, source))
        begin = slots
        for part in parts:
            entries = part[here[1]].flatten(0, 1)
            end = begin + len(entries)
            chosen = keep[begin:end].nonzero()[:, 0]
            base[here].index_copy_(0, target[begin:end][chosen], entries[chosen])
            begin = end


def _over_heads(tensor: Tensor, part: NewPairs) -> Tensor:
    """``[batch, new]`` as ``[batch, num_kv_heads, new]``."""
    return tensor[:, None].expand(part.shape)
