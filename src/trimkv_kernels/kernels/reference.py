"""The torch reference of every op: the oracle of the tests, and the path a CPU takes.

No shape depends on data, so `torch.compile` can trace all of it. On a CPU outside a compiled graph
reading a count costs nothing: there the valid slots are sliced instead of masked, which is faster
and gives the same bits as attention over a cache that holds exactly these tokens.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_INT32_MIN = -(2**31)
_INT32_MAX = 2**31 - 1


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_valid: Tensor | None,
    scale: float,
    lse: Tensor | None = None,
    mass: Tensor | None = None,
    mass_reduce: str = "sum",
    mass_accumulate: bool = False,
    valid: Tensor | None = None,
    packed: bool = False,
) -> Tensor:
    """See `trimkv_kernels.kernels.decode_attention`; ``lse`` is written to.

    Queries that are not ``valid``, ``[batch]`` bool, give no mass. ``packed``: the query heads of a
    group attend as rows of one head, which is faster and rounds otherwise.
    """
    if lse is not None or mass is not None:
        _write_shares(query, key, num_valid, scale, lse, mass, mass_reduce, mass_accumulate, valid)
    if num_valid is None:
        return _attend_all(query, key, value, scale, packed)
    if _host_reads_are_free(num_valid):
        counts = num_valid.flatten().tolist()
        longest = max(counts)
        if longest == 0:
            return torch.zeros_like(query)
        key, value = key[:, :, :longest], value[:, :, :longest]
        if min(counts) == longest:
            return _attend_all(query, key, value, scale, packed)
    return _attend_masked(query, key, value, num_valid, scale)


def append_attention(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    num_valid: Tensor,
    t: Tensor,
    layer: int,
    valid: Tensor | None,
    slope: Tensor | None,
    offset: Tensor | None,
    new_slope: Tensor | None,
    new_offset: Tensor | None,
    scale: float,
    lse: Tensor | None = None,
    mass: Tensor | None = None,
    mass_reduce: str = "sum",
    mass_accumulate: bool = False,
    packed: bool = False,
) -> Tensor:
    """See `trimkv_kernels.kernels.append_attention`; ``lse`` is written to."""
    rows = [
        (key, new_key),
        (value, new_value),
        (position, (t - 1)[:, None].expand(new_key.shape[:2])),
    ]
    if (
        slope is not None
        and offset is not None
        and new_slope is not None
        and new_offset is not None
    ):
        rows += [(slope, new_slope), (offset, new_offset)]
    _append(rows, num_valid, layer, valid)
    return decode_attention(
        query,
        key[layer],
        value[layer],
        num_valid[layer],
        scale,
        lse,
        None if mass is None else mass[layer],
        mass_reduce,
        mass_accumulate,
        valid,
        packed,
    )


def evict(
    key: Tensor,
    value: Tensor,
    position: Tensor,
    num_valid: Tensor,
    t: Tensor,
    budget: int,
    slope: Tensor | None,
    offset: Tensor | None,
    scores: Tensor | None,
    sinks: int,
    recent: int,
    fields: Sequence[Tensor],
    nan_seen: Tensor | None,
) -> None:
    """See `trimkv_kernels.kernels.evict`."""
    full = num_valid >= position.shape[-1]  # [layers, batch, num_kv_heads]
    if _host_reads_are_free(num_valid) and not full.any():
        return
    if scores is None:
        assert slope is not None
        assert offset is not None
        scores = affine_scores(slope, offset, t, position)
    if nan_seen is not None:  # a maximum hands NaN on
        _flag(nan_seen, scores.amax(dim=-1).isnan() & full)
    scores = _protect(scores, position, t, sinks, recent)
    victim = _lowest(scores, position, position.shape[-1] - budget)
    source, target = _pair_moves(victim, full, budget)
    moved = [key, value, position, *fields]
    if slope is not None and offset is not None:
        moved += [slope, offset]
    for tensor in moved:
        rows = tensor.flatten(0, 3)
        rows.index_copy_(0, target, rows.index_select(0, source))
    num_valid.masked_fill_(full, budget)


def affine_scores(slope: Tensor, offset: Tensor, t: Tensor, position: Tensor) -> Tensor:
    """``slope * (t - position) + offset``, rounded after the product and after the sum."""
    return slope * (t[:, None, None] - position) + offset


def fill_slots(
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
    """See `trimkv_kernels.kernels.fill_slots`."""
    num_slots, heads = key.shape[3], new_key.shape[:3]  # heads: [batch, num_kv_heads, new]

    def pool(base: Tensor, new: Tensor) -> Tensor:
        return torch.cat((base[layer, :, :, :filled], new), dim=2) if filled else new

    real = new_key.new_ones(heads, dtype=torch.bool)
    if valid is not None:
        real = valid[:, None].expand(heads)
    slot = torch.arange(filled, device=key.device)
    real = torch.cat((slot < num_valid[layer, :, :, None], real), dim=2)
    small = [(position, pool(position, new_position[:, None].expand(heads)))]
    if (
        slope is not None
        and offset is not None
        and new_slope is not None
        and new_offset is not None
    ):
        small += [(slope, pool(slope, new_slope)), (offset, pool(offset, new_offset))]
        scores = affine_scores(small[1][1], small[2][1], t, small[0][1])
    assert scores is not None
    if nan_seen is not None:
        _flag(nan_seen[layer], scores.isnan() & real)
    index, count = _choose(
        _protect(scores, small[0][1], t, sinks, recent), small[0][1], real, budget, num_slots
    )
    for base, candidates in small:
        _put(base[layer], candidates, index)
    pairs = [(key, new_key), (value, new_value), *zip(fields, new_fields, strict=True)]
    for base, new in pairs:  # one pool at a time: that of the keys is large
        _put(base[layer], pool(base, new), index)
    num_valid[layer] = count


def _choose(
    scores: Tensor, position: Tensor, real: Tensor, budget: int, num_slots: int
) -> tuple[Tensor, Tensor]:
    """Choose among the candidates of each head; all arguments ``[batch, heads, candidates]``.

    Returns:
        ``index`` ``[batch, heads, min(num_slots - 1, candidates)]`` int64, the kept candidates
        first, in their order; what follows them is arbitrary but in range.
        ``count`` ``[batch, heads]`` int32, how many are kept.
    """
    candidates = scores.shape[-1]
    count = real.sum(dim=-1, dtype=torch.int32)
    count = torch.where(count >= num_slots, budget, count)
    rank_key = _rank_keys(scores, position).masked_fill(~real, torch.iinfo(torch.int64).min)
    best = rank_key.topk(min(num_slots - 1, candidates), dim=-1).indices
    # kept candidates in their order, so that a cache that drops nothing stays chronological
    place = torch.arange(best.shape[-1], device=best.device, dtype=torch.int32)
    index = best.masked_fill(place >= count[..., None], candidates).sort(dim=-1).values
    return index.clamp(max=candidates - 1), count


def _put(slots: Tensor, candidates: Tensor, index: Tensor) -> None:
    """Write the candidates ``index`` ``[batch, heads, kept]`` into the first slots of a layer."""
    inner = candidates.shape[3:]
    wide = index.reshape(*index.shape, *(1,) * len(inner)).expand(*index.shape, *inner)
    slots[:, :, : index.shape[2]] = candidates.gather(2, wide)


def extend_attention(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    key: Tensor,
    value: Tensor,
    num_valid: Tensor | None,
    valid: Tensor | None,
    scale: float,
    lse: Tensor | None = None,
) -> Tensor:
    """See `trimkv_kernels.kernels.extend_attention`; ``lse`` is written to."""
    if lse is not None:
        for here, logits in _call_logits(query, new_key, key, num_valid, valid, scale, 0):
            lse[:, :, here] = logits.logsumexp(dim=-1).flatten(1, 2)
    slots, new = key.shape[2], new_key.shape[2]
    grouped = query.shape[1] != new_key.shape[1]
    if slots == 0 and valid is None:
        return F.scaled_dot_product_attention(
            query, new_key, new_value, is_causal=new > 1, scale=scale, enable_gqa=grouped
        )
    if slots > 0:
        new_key, new_value = torch.cat((key, new_key), 2), torch.cat((value, new_value), 2)
    mask = _extend_mask(num_valid, valid, slots, new, query.device)
    if grouped and mask.shape[1] > 1:
        mask = mask.repeat_interleave(query.shape[1] // new_key.shape[1], dim=1)
    return F.scaled_dot_product_attention(
        query, new_key, new_value, attn_mask=mask, scale=scale, enable_gqa=grouped
    )


def _extend_mask(
    num_valid: Tensor | None, valid: Tensor | None, slots: int, new: int, device: torch.device
) -> Tensor:
    """What each new token sees of slots and call: ``[batch, heads, new, slots + new]``."""
    causal = torch.ones(new, new, dtype=torch.bool, device=device).tril()[None, None]
    if valid is not None:
        # a pad sees itself: a softmax over nothing would put NaN into the next layer's values
        causal = causal & (
            valid[:, None, None, :] | torch.eye(new, dtype=torch.bool, device=device)
        )
    if num_valid is None:
        held = causal.new_ones(1, 1, 1, slots)
    else:
        held = torch.arange(slots, device=device) < num_valid[:, :, None, None]
    batch, heads = max(causal.shape[0], held.shape[0]), held.shape[1]
    return torch.cat(
        (held.expand(batch, heads, new, slots), causal.expand(batch, heads, new, new)), dim=3
    )


def column_mass(
    query: Tensor,
    new_key: Tensor,
    key: Tensor,
    lse: Tensor,
    num_valid: Tensor | None,
    valid: Tensor | None,
    scale: float,
    queries: int,
    reduce: str,
    count_below: bool,
) -> Tensor:
    """See `trimkv_kernels.kernels.column_mass`; takes a block of queries at a time."""
    first = query.shape[2] - queries
    lses = lse.unflatten(1, (new_key.shape[1], -1))  # [batch, num_kv_heads, group, q_len]
    rows = 1 if count_below and reduce != "none" else lses.shape[2]
    mass = lse.new_zeros(*lses.shape[:2], rows, key.shape[2] + query.shape[2])
    even = _even_shares(key, query.shape[2], num_valid, valid) if count_below else None
    for here, logits in _call_logits(query, new_key, key, num_valid, valid, scale, first):
        share = _softmax(logits, lses[:, :, :, here, None])
        if valid is not None:
            pad = ~valid[:, None, None, here, None]
            share = share.masked_fill(pad, torch.inf if count_below else 0)
        if even is not None:
            share = share.masked_fill(logits == -torch.inf, torch.inf)  # unseen is not below
            share = _reduce_group(share, reduce).unflatten(1, (lses.shape[1], -1))
            share = share < even[:, :, None, here, None]
        mass[..., : share.shape[-1]] += share.sum(dim=3)
    return _reduce_group(mass, reduce)


def _even_shares(key: Tensor, q_len: int, num_valid: Tensor | None, valid: Tensor | None) -> Tensor:
    """``1 / n`` of queries that see ``n`` tokens, broadcasts to ``[batch, num_kv_heads, q_len]``.

    0 where a query sees one token: that gets all, and rounding must not put it below.
    """
    new = torch.arange(1, q_len + 1, device=key.device)[None] if valid is None else valid.cumsum(1)
    held = key.shape[2] if num_valid is None else num_valid[:, :, None]
    seen = (held + new[:, None]).float()
    return seen.reciprocal().masked_fill(seen <= 1, 0)


def _call_logits(
    query: Tensor,
    new_key: Tensor,
    key: Tensor,
    num_valid: Tensor | None,
    valid: Tensor | None,
    scale: float,
    first: int,
) -> Iterator[tuple[slice, Tensor]]:
    """The queries from ``first`` on, by blocks, and their logits; -inf at what they do not see.

    Yields the block and ``[batch, num_kv_heads, group, queries, slots + tokens up to its end]``.
    """
    slots, q_len = key.shape[2], query.shape[2]
    queries = _grouped(query, new_key.shape[1])
    keys = torch.cat((key, new_key), dim=2).to(queries.dtype)
    column = torch.arange(slots + q_len, device=query.device) - slots
    hidden = torch.zeros(1, 1, 1, 1, slots + q_len, dtype=torch.bool, device=query.device)
    if num_valid is not None:
        hidden = (column < 0) & (column + slots >= num_valid[:, :, None, None, None])
    if valid is not None:
        hidden = hidden | F.pad(~valid, (slots, 0))[:, None, None, None]
    for begin in range(first, q_len, _TARGET_BLOCK):
        here = slice(begin, min(begin + _TARGET_BLOCK, q_len))
        seen = slots + here.stop
        token = torch.arange(here.start, here.stop, device=query.device)[:, None]
        logits = _fold(queries[:, :, :, here], keys[:, :, :seen].mT) * scale
        yield here, logits.masked_fill(hidden[..., :seen] | (column[:seen] > token), -torch.inf)


def _write_shares(
    query: Tensor,
    key: Tensor,
    num_valid: Tensor | None,
    scale: float,
    lse: Tensor | None,
    mass: Tensor | None,
    reduce: str,
    accumulate: bool,
    valid: Tensor | None,
) -> None:
    """The log-sum-exp of each query head, and the probabilities that one query gives the slots."""
    queries = _grouped(query[:, :, None], key.shape[1])
    logits = _fold(queries, key.to(queries.dtype).mT)[:, :, :, 0] * scale
    unseen = torch.zeros_like(logits, dtype=torch.bool)
    if num_valid is not None:
        slot = torch.arange(key.shape[2], device=key.device, dtype=torch.int32)
        unseen = slot >= num_valid[:, :, None, None]
        logits = logits.masked_fill(unseen, -torch.inf)
    row_lse = logits.logsumexp(dim=-1, keepdim=True)  # [batch, num_kv_heads, group, 1]
    if lse is not None:
        lse.copy_(row_lse.flatten(1))
    if mass is not None:
        if valid is not None:
            unseen = unseen | ~valid[:, None, None, None]
        share = _reduce_group(_softmax(logits, row_lse).masked_fill(unseen, 0), reduce)
        if accumulate:
            mass += share
        else:
            mass.copy_(share)


def _reduce_group(shares: Tensor, reduce: str) -> Tensor:
    """Combine ``[batch, num_kv_heads, group, ...]`` over the heads of each group.

    Gives ``[batch, num_kv_heads, ...]``, or ``[batch, num_heads, ...]`` where nothing is combined.
    """
    if reduce == "none":
        return shares.flatten(1, 2)
    if reduce == "max":
        return shares.amax(dim=2)
    return shares.sum(dim=2) if reduce == "sum" else shares.mean(dim=2)


def _flag(nan_seen: Tensor, found: Tensor) -> None:
    """Set ``nan_seen`` where any of ``found``, which has its dimensions and more, is True."""
    nan_seen.masked_fill_(found.flatten(nan_seen.dim()).any(dim=-1), 1)


def _protect(scores: Tensor, position: Tensor, t: Tensor, sinks: int, recent: int) -> Tensor:
    """NaN to -inf, protected positions to +inf."""
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if sinks > 0:
        scores = scores.masked_fill(position < sinks, torch.inf)
    if recent > 0:
        scores = scores.masked_fill(position >= (t - recent)[:, None, None], torch.inf)
    return scores


def _host_reads_are_free(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _attend_all(
    query: Tensor, key: Tensor, value: Tensor, scale: float, packed: bool = False
) -> Tensor:
    """Attend to every slot; unless ``packed``, by the very call that transformers' SDPA makes."""
    grouped = query.shape[1] != key.shape[1]
    if packed and grouped:
        rows = query.unflatten(1, (key.shape[1], -1))
        return F.scaled_dot_product_attention(rows, key, value, scale=scale).flatten(1, 2)
    output = F.scaled_dot_product_attention(
        query[:, :, None], key, value, scale=scale, enable_gqa=grouped
    )
    return output[:, :, 0]


def _attend_masked(
    query: Tensor, key: Tensor, value: Tensor, num_valid: Tensor, scale: float
) -> Tensor:
    """Attend to the first ``num_valid`` slots of each head; the group's queries share one mask."""
    group = query.shape[1] // key.shape[1]
    slot = torch.arange(key.shape[2], device=key.device, dtype=torch.int32)
    mask = slot < num_valid[..., None]  # [batch, num_kv_heads, num_slots]
    output = F.scaled_dot_product_attention(
        query.unflatten(1, (key.shape[1], group)),
        key,
        value,
        attn_mask=mask[:, :, None],
        scale=scale,
    )
    # A softmax over nothing is NaN on some backends.
    return output.masked_fill((num_valid == 0)[..., None, None], 0).flatten(1, 2)


def _append(
    rows: Sequence[tuple[Tensor, Tensor]], num_valid: Tensor, layer: int, valid: Tensor | None
) -> None:
    """Write each ``(base, new)`` pair's new row behind the valid slots of one layer."""
    num_slots = rows[0][0].shape[3]
    count = num_valid[layer]  # [batch, num_kv_heads]
    if valid is None and _host_reads_are_free(num_valid):
        counts = count.flatten().tolist()
        slot = counts[0]
        if slot < num_slots and min(counts) == max(counts):
            for base, new in rows:
                base[layer, :, :, slot] = new
            count += 1
            return
    stored = count < num_slots
    if valid is not None:
        stored = stored & valid[:, None]
    first = torch.arange(count.numel(), device=count.device) * num_slots
    index = first + count.clamp(max=num_slots - 1).flatten()  # [batch * num_kv_heads]
    for base, new in rows:
        slots = base[layer].flatten(0, 2)
        new, keep = new.flatten(0, 1), stored.flatten()
        if new.dim() == 2:
            keep = keep[:, None]
        slots.index_copy_(0, index, torch.where(keep, new, slots.index_select(0, index)))
    count += stored


def _lowest(scores: Tensor, position: Tensor, count: int) -> Tensor:
    """Find the ``count`` lowest scores of each head, of equal ones those with smaller positions.

    Args:
        scores: ``[layers, batch, num_kv_heads, num_slots]`` fp32 without NaN.
        position: Like ``scores``, int32.
        count: How many.

    Returns:
        Slots ``[layers, batch, num_kv_heads, count]`` int64, in no particular order.
    """
    if count == 1:
        lowest = scores == scores.amin(dim=-1, keepdim=True)
        return position.masked_fill(~lowest, _INT32_MAX).argmin(dim=-1, keepdim=True)
    return _rank_keys(scores, position).topk(count, dim=-1, largest=False, sorted=False).indices


def _rank_keys(scores: Tensor, position: Tensor) -> Tensor:
    """Integers ordered as (score, position): no two valid slots of a head are equal."""
    bits = scores.view(torch.int32)
    # Sign and magnitude to two's complement: orders as the floats do, and -0.0 becomes 0.
    order = torch.where(bits < 0, _INT32_MIN - bits, bits)
    return order.long().mul_(2**32).add_(position)


def _pair_moves(victim: Tensor, full: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Pair kept slots of the tail with evicted slots of the budget, as rows of the flat tensors.

    A slot with nothing to do is paired with itself, so that the shapes do not depend on the data.

    Args:
        victim: ``[layers, batch, num_kv_heads, buffer]`` int64, the slots to evict.
        full: ``[layers, batch, num_kv_heads]`` bool, the heads that evict.
        budget: Slots each of them keeps.

    Returns:
        Rows to read and rows to write, each ``[layers * batch * num_kv_heads * buffer]`` int64.
    """
    buffer = victim.shape[-1]
    num_slots = budget + buffer
    if buffer == 1:
        target, source = victim, torch.full_like(victim, budget)
    else:
        target = victim.sort(dim=-1).values  # holes in the budget first, then victims in the tail
        gone = torch.zeros(*full.shape, num_slots, dtype=torch.bool, device=victim.device)
        gone.scatter_(-1, victim, True)
        source = gone[..., budget:].sort(dim=-1, stable=True).indices + budget
    target = torch.where(full[..., None], target, source)
    first = torch.arange(full.numel(), device=full.device).view(*full.shape, 1) * num_slots
    return (first + source).flatten(), (first + target).flatten()


def retention_sum(log_beta: Tensor, first: Tensor | None) -> Tensor:
    """See `trimkv_kernels.kernels.retention_sum`; ``first`` as `document_spans` has it.

    Takes one exponential per pair only within a block: see `_triton.retention_sum`.
    """
    seq = log_beta.shape[2]
    slope, first, step, begin = _sum_blocks(log_beta, first)
    near = slope.new_empty(slope.shape)  # from sources of the same block
    far = torch.zeros_like(slope)
    for block, start in enumerate(begin.tolist()):
        source, here = start + step, slope[:, :, block]
        near[:, :, block] = _decay_within(here, first, block, source).sum(dim=2)
        decay = (here[..., None] * step).exp()  # [batch, heads, source, target]
        far[:, :, block + 1 :] += _carried(here, first, block, source, begin) @ decay
    if first is not None:
        far = far.masked_fill((first > begin[:, None])[:, None], 0)
    return (near + far).flatten(2)[..., :seq].contiguous()


def retention_sum_grad(grad: Tensor, log_beta: Tensor, first: Tensor | None) -> Tensor:
    """Gradient of `retention_sum` with respect to ``log_beta``."""
    seq = log_beta.shape[2]
    slope, first, step, begin = _sum_blocks(log_beta, first)
    grad = F.pad(grad, (0, -seq % _SUM_BLOCK)).unflatten(2, (-1, _SUM_BLOCK))
    far_grad = grad
    if first is not None:
        far_grad = grad.masked_fill((first > begin[:, None])[:, None], 0)
    output = slope.new_empty(slope.shape)
    for block, start in enumerate(begin.tolist()):
        source, here = start + step, slope[:, :, block]
        aged = _decay_within(here, first, block, source) * (step - step[:, None])
        total = (aged @ grad[:, :, block, :, None]).squeeze(-1)  # [batch, heads, source]
        decay = (step[:, None] * here[:, :, None]).exp()  # [batch, heads, target, source]
        later = far_grad[:, :, block + 1 :]  # [batch, heads, blocks, target]
        moment = (begin[block + 1 :, None] - source) * (later @ decay)
        moment += later @ (decay * step[:, None])
        output[:, :, block] = total + (_carried(here, first, block, source, begin) * moment).sum(2)
    return output.flatten(2)[..., :seq].contiguous()


_SUM_BLOCK = 64
_LOWEST_LOG_BETA = -1.0e4  # exp of it is 0, and unlike -inf it can be multiplied by an age of 0


def _sum_blocks(
    log_beta: Tensor, first: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Cut the sequence: log betas, ``first``, places within a block, first tokens of the blocks."""
    seq, pad = log_beta.shape[2], -log_beta.shape[2] % _SUM_BLOCK
    slope = F.pad(log_beta.clamp(min=_LOWEST_LOG_BETA), (0, pad)).unflatten(2, (-1, _SUM_BLOCK))
    if first is not None:
        first = F.pad(first, (0, pad), value=seq + pad).unflatten(1, (-1, _SUM_BLOCK))
    step = torch.arange(_SUM_BLOCK, device=slope.device, dtype=slope.dtype)
    begin = torch.arange(0, seq + pad, _SUM_BLOCK, device=slope.device, dtype=slope.dtype)
    return slope, first, step, begin


def _decay_within(slope: Tensor, first: Tensor | None, block: int, source: Tensor) -> Tensor:
    """``exp((t - j) * log_beta_j)`` of the pairs in a block: ``[batch, heads, source, target]``."""
    age = source - source[:, None]
    unseen = age < 0
    if first is not None:
        unseen = unseen | (first[:, None, block, None, :] > source[:, None])
    return (age.clamp(min=0) * slope[..., None]).exp().masked_fill(unseen, 0)


def _carried(
    slope: Tensor, first: Tensor | None, block: int, source: Tensor, begin: Tensor
) -> Tensor:
    """What a block's sources weigh as later blocks begin: ``[batch, heads, blocks, source]``."""
    carried = ((begin[block + 1 :, None] - source) * slope[:, :, None]).exp()
    if first is not None:
        unseen = first[:, None, block + 1 :, :1] > source
        carried = carried.masked_fill(unseen, 0)
    return carried


def retention_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    first: Tensor | None,
    scale: float,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """See `trimkv_kernels.kernels.retention_attention`; ``first`` as `document_spans` has it.

    Takes a block of targets at a time, so that memory is linear in the sequence.
    """
    seq, num_kv_heads = query.shape[2], key.shape[1]
    queries = _grouped(query, num_kv_heads)
    keys, values = key.to(queries.dtype), value.to(queries.dtype)
    output = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:3], dtype=queries.dtype)
    for begin in range(0, seq, _TARGET_BLOCK):
        here, past = _tile(first, begin, seq)
        age, seen = _age(first, here, past, query.device)
        bias = age * log_beta.clamp(min=_LOWEST_LOG_BETA)[:, :, None, None, past]
        logits = _logits(queries[:, :, :, here], keys[:, :, past], bias, seen, scale, mode)
        tile_lse = logits.logsumexp(dim=-1, keepdim=True)  # [batch, num_kv_heads, group, targets]
        mixed = _fold(_softmax(logits, tile_lse), values[:, :, past])
        output[:, :, here] = mixed.flatten(1, 2)
        lse[:, :, here] = tile_lse.flatten(1, 2)[..., 0]
    return output, lse


def retention_attention_grad(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    first: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and log_beta; the logits are computed once more."""
    seq, num_kv_heads = query.shape[2], key.shape[1]
    queries, grads = _grouped(query, num_kv_heads), _grouped(grad, num_kv_heads)
    lses = _grouped(lse[..., None], num_kv_heads)
    delta = (grads * _grouped(output, num_kv_heads)).sum(dim=-1, keepdim=True)
    delta -= _grouped(grad_lse[..., None], num_kv_heads)
    keys, values = key.to(queries.dtype), value.to(queries.dtype)
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = torch.zeros_like(keys), torch.zeros_like(values)
    grad_log_beta = log_beta.new_zeros(log_beta.shape)
    for begin in range(0, seq, _TARGET_BLOCK):
        here, past = _tile(first, begin, seq)
        age, seen = _age(first, here, past, query.device)
        bias = age * log_beta.clamp(min=_LOWEST_LOG_BETA)[:, :, None, None, past]
        logits = _logits(queries[:, :, :, here], keys[:, :, past], bias, seen, scale, mode)
        weight = _softmax(logits, lses[:, :, :, here])
        grad_value[:, :, past] += weight.flatten(2, 3).mT @ grads[:, :, :, here].flatten(2, 3)
        grad_weight = _fold(grads[:, :, :, here], values[:, :, past].mT)
        grad_bias = grad_product = weight * (grad_weight - delta[:, :, :, here])
        if mode == "scale":
            grad_bias = grad_product * logits.masked_fill(~seen, 0)
            grad_product = grad_product * bias.exp()
        grad_log_beta[:, :, past] += (grad_bias.sum(dim=2) * age).sum(dim=2)
        grad_product *= scale
        grad_query[:, :, here] = _fold(grad_product, keys[:, :, past]).flatten(1, 2)
        grad_key[:, :, past] += grad_product.flatten(2, 3).mT @ queries[:, :, :, here].flatten(2, 3)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_log_beta


_TARGET_BLOCK = 64


def _grouped(tensor: Tensor, num_kv_heads: int) -> Tensor:
    """``[batch, num_kv_heads, group, seq, ...]`` in at least fp32."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.unflatten(1, (num_kv_heads, -1)).to(dtype)


def _tile(first: Tensor | None, begin: int, seq: int) -> tuple[slice, slice]:
    """A block of targets, and all sources that it sees."""
    low = 0
    if first is not None and _host_reads_are_free(first):
        low = int(first[:, begin].min())
    stop = min(begin + _TARGET_BLOCK, seq)
    return slice(begin, stop), slice(min(low, begin), stop)


def _age(
    first: Tensor | None, here: slice, past: slice, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ages ``[targets, sources]``, 0 where negative, and who sees whom, which broadcasts."""
    target = torch.arange(here.start, here.stop, device=device)[:, None]
    source = torch.arange(past.start, past.stop, device=device)
    seen = source <= target
    if first is not None:
        seen = seen & (source >= first[:, None, None, here, None])
    return (target - source).clamp(min=0), seen


def _logits(
    query: Tensor, key: Tensor, bias: Tensor, seen: Tensor, scale: float, mode: str
) -> Tensor:
    """``[batch, num_kv_heads, group, targets, sources]``, -inf where not seen."""
    product = _fold(query, key.mT) * scale
    logits = product * bias.exp() if mode == "scale" else product + bias
    return logits.masked_fill(~seen, -torch.inf)


def _softmax(logits: Tensor, lse: Tensor) -> Tensor:
    """Probabilities; 0 for a target that sees nothing."""
    return (logits - lse.masked_fill(lse == -torch.inf, 0)).exp()


def _fold(left: Tensor, right: Tensor) -> Tensor:
    """Multiply a group's rows, ``[..., group, targets, n]``, by one matrix of their KV head."""
    return (left.flatten(2, 3) @ right).unflatten(2, left.shape[2:4])
