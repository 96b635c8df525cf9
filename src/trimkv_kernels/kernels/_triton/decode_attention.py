"""One query token per sequence against the valid slots of each head, in one launch.

The slots of a head are split over programs. Every program keeps an online softmax over its slots
for all query heads of the group, which share the key and value tiles. The program that arrives last
merges the parts, so no second kernel is needed, and no program waits.

If a token is appended, arrivals are counted in the bits of ``num_valid`` above `COUNT_BITS`. All
programs of a head read the same count below these bits, and the last one clears them. So no counter
is needed outside the launch.

If a token is appended, its queries and its key may come before their norm and rotation, and its
decay as the logit of a gate. Every program then finishes what it needs of them in registers.

If the attention mass of the slots is requested, every split writes its base-2 logits to scratch.
The last program, which knows the log-sum-exp, turns them into probabilities. Nothing is computed
twice, and without the request none of this is compiled.
"""

import triton
import triton.language as tl

from trimkv_kernels.kernels._triton.primitives import LN_2, LOWEST, dot, softmax_update
from trimkv_kernels.kernels._triton.prologue import (
    load_finished,
    load_query,
    load_terms,
    store_first,
)
from trimkv_kernels.kernels._triton.slots import (
    find_head,
    head_base,
    is_full,
    slot_offset,
    view_base,
)

COUNT_BITS = tl.constexpr(24)
COUNT_MASK = tl.constexpr((1 << 24) - 1)
ONE_ARRIVAL = tl.constexpr(1 << 24)


@triton.jit
def _decode_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    num_valid_ptr,
    arrival_ptr,
    part_ptr,
    output_ptr,
    lse_ptr,
    logit_ptr,
    mass_ptr,
    scale_log2,
    num_kv_heads,
    num_slots,
    split_slots,
    stride_query_b,
    stride_query_h,
    stride_key_b,
    stride_key_h,
    stride_key_s,
    stride_value_b,
    stride_value_h,
    stride_value_s,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    MEMBERS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    UPCAST: tl.constexpr,
    MASS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    head = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    row = head // num_kv_heads
    kv_head = head % num_kv_heads
    count = num_slots if num_valid_ptr is None else tl.load(num_valid_ptr + head)

    query = load_query(
        query_ptr + row * stride_query_b + kv_head * GROUP * stride_query_h,
        stride_query_h, GROUP, HEAD_DIM, BLOCK_G, BLOCK_D,
    )  # fmt: skip
    peak = tl.full([BLOCK_G], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    mixed = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    head_logit_ptr = None if logit_ptr is None else logit_ptr + head * GROUP * num_slots
    begin = split * split_slots
    peak, total, mixed = _attend_slots(
        query, key_ptr, value_ptr,
        view_base(row, kv_head, stride_key_b, stride_key_h), stride_key_s,
        view_base(row, kv_head, stride_value_b, stride_value_h), stride_value_s,
        begin, tl.minimum(begin + split_slots, count), scale_log2, peak, total, mixed,
        head_logit_ptr, num_slots, GROUP, HEAD_DIM, BLOCK_S, BLOCK_D, UPCAST,
    )  # fmt: skip

    if SPLITS > 1:
        store_part(
            part_ptr, head * SPLITS + split, tl.num_programs(0), peak, total, mixed,
            GROUP, HEAD_DIM,
        )  # fmt: skip
        # The whole program's part is written before its arrival can be seen.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrival_ptr + head, 1)
        if arrived == SPLITS - 1:
            lse = _store_merged(
                part_ptr, output_ptr, head, GROUP, HEAD_DIM, SPLITS, MEMBERS, BLOCK_D, PARTS
            )
            _store_shares(
                lse_ptr, head_logit_ptr, mass_ptr, head, head, lse, count, num_slots,
                GROUP, BLOCK_P, MASS, ACCUMULATE,
            )  # fmt: skip
    else:
        lse = _store_output(output_ptr, head, peak, total, mixed, GROUP, HEAD_DIM)
        if mass_ptr is not None:
            tl.debug_barrier()  # the logits are read by other threads than wrote them
        _store_shares(
            lse_ptr, head_logit_ptr, mass_ptr, head, head, lse, count, num_slots,
            GROUP, BLOCK_P, MASS, ACCUMULATE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["layer"])
def _append_attention_kernel(
    query_ptr,
    new_key_ptr,
    new_value_ptr,
    key_ptr,
    value_ptr,
    position_ptr,
    num_valid_ptr,
    capacity_ptr,
    rows_ptr,
    t_ptr,
    valid_ptr,
    slope_ptr,
    offset_ptr,
    new_slope_ptr,
    new_offset_ptr,
    stride_slope_b,
    stride_slope_h,
    stride_offset_b,
    stride_offset_h,
    gate_ptr,
    gate_bias_ptr,
    cos_ptr,
    sin_ptr,
    query_weight_ptr,
    key_weight_ptr,
    eps,
    age_offset,
    stride_cos_b,
    part_ptr,
    output_ptr,
    lse_ptr,
    logit_ptr,
    mass_ptr,
    scale_log2,
    layer,
    num_heads,
    num_kv_heads,
    num_slots,
    split_slots,
    stride_pair_b,
    stride_slot_b,
    stride_head_b,
    stride_query_b,
    stride_query_h,
    stride_new_key_b,
    stride_new_key_h,
    stride_new_value_b,
    stride_new_value_h,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    MEMBERS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    UPCAST: tl.constexpr,
    MASS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    head = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    row = head // num_kv_heads
    kv_head = head % num_kv_heads
    layer_head, base, pair_base = find_head(
        layer.to(tl.int64) * num_heads + head, rows_ptr, row, kv_head, num_slots,
        stride_pair_b, stride_slot_b, stride_head_b, HEAD_DIM,
    )  # fmt: skip
    count = tl.load(num_valid_ptr + layer_head) & COUNT_MASK
    stored = is_full(count, tl.load(capacity_ptr + layer_head)) == 0
    if valid_ptr is not None:
        real = tl.load(valid_ptr + row) != 0
        stored = stored & real
    grown = count + stored.to(tl.int32)
    # All loads come before the loop over the slots, so that none is waited for behind it.
    dim = tl.arange(0, BLOCK_D)
    new_value_ptr += row * stride_new_value_b + kv_head * stride_new_value_h
    new_value = tl.load(new_value_ptr + dim, mask=dim < HEAD_DIM, other=0.0)
    new_position = tl.load(t_ptr + row) - 1
    if slope_ptr is not None:
        new_slope, new_offset = load_terms(
            new_slope_ptr, new_offset_ptr,
            stride_slope_b, stride_slope_h, stride_offset_b, stride_offset_h,
            gate_ptr, gate_bias_ptr, row, kv_head, head, age_offset,
        )  # fmt: skip

    turn = None if cos_ptr is None else row * stride_cos_b
    query = load_finished(
        query_ptr + row * stride_query_b + kv_head * GROUP * stride_query_h, stride_query_h,
        query_weight_ptr, cos_ptr, sin_ptr, turn, eps, GROUP, HEAD_DIM, BLOCK_G, BLOCK_D,
    )  # fmt: skip
    # Once for each query and laid out as they are, so that their products need no barrier.
    new_key = load_finished(
        new_key_ptr + row * stride_new_key_b + kv_head * stride_new_key_h, 0,
        key_weight_ptr, cos_ptr, sin_ptr, turn, eps, BLOCK_G, HEAD_DIM, BLOCK_G, BLOCK_D,
    )  # fmt: skip
    new_score = _pair_score(query, new_key) * scale_log2
    peak = tl.full([BLOCK_G], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    mixed = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    head_logit_ptr = None if logit_ptr is None else logit_ptr + head * GROUP * num_slots
    begin = split * split_slots
    peak, total, mixed = _attend_slots(
        query, key_ptr, value_ptr,
        pair_base, HEAD_DIM, pair_base, HEAD_DIM,
        begin, tl.minimum(begin + split_slots, count), scale_log2, peak, total, mixed,
        head_logit_ptr, num_slots, GROUP, HEAD_DIM, BLOCK_S, BLOCK_D, UPCAST,
    )  # fmt: skip
    # The new pair never goes through memory: every split reads slots below the count that all of
    # them saw. The last split has the fewest of them.
    if stored & (split == SPLITS - 1):
        peak, total, mixed = _fold_pair(new_score, new_value, peak, total, mixed)
        if head_logit_ptr is not None:
            member = tl.arange(0, BLOCK_G)
            tl.store(head_logit_ptr + member * num_slots + count, new_score, mask=member < GROUP)
        address = slot_offset(pair_base, count, HEAD_DIM)
        store_first(key_ptr, address, new_key, HEAD_DIM)
        tl.store(value_ptr + address + dim, new_value, mask=dim < HEAD_DIM)
        address = slot_offset(base, count, 1)
        tl.store(position_ptr + address, new_position)
        if slope_ptr is not None:
            tl.store(slope_ptr + address, new_slope)
            tl.store(offset_ptr + address, new_offset)

    given = grown
    if valid_ptr is not None:
        given = tl.where(real, grown, 0)  # padding gives to no slot
    if SPLITS > 1:
        store_part(
            part_ptr, head * SPLITS + split, tl.num_programs(0), peak, total, mixed,
            GROUP, HEAD_DIM,
        )  # fmt: skip
        # The whole program has read the count and written its part before its arrival can be seen.
        tl.debug_barrier()
        arrived = tl.atomic_add(num_valid_ptr + layer_head, ONE_ARRIVAL) >> COUNT_BITS
        if arrived == SPLITS - 1:
            lse = _store_merged(
                part_ptr, output_ptr, head, GROUP, HEAD_DIM, SPLITS, MEMBERS, BLOCK_D, PARTS
            )
            _store_shares(
                lse_ptr, head_logit_ptr, mass_ptr, head, layer_head, lse, given, num_slots,
                GROUP, BLOCK_P, MASS, ACCUMULATE,
            )  # fmt: skip
            tl.store(num_valid_ptr + layer_head, grown)
    else:
        lse = _store_output(output_ptr, head, peak, total, mixed, GROUP, HEAD_DIM)
        # All warps must have read the old count, and the logits are read by other threads than
        # wrote them.
        tl.debug_barrier()
        _store_shares(
            lse_ptr, head_logit_ptr, mass_ptr, head, layer_head, lse, given, num_slots,
            GROUP, BLOCK_P, MASS, ACCUMULATE,
        )  # fmt: skip
        tl.store(num_valid_ptr + layer_head, grown)


@triton.jit
def _pair_score(query, key):
    """Products of all queries ``[BLOCK_G, BLOCK_D]`` with a key for each, ``[BLOCK_G]``."""
    return tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1)


@triton.jit
def _fold_pair(score, value, peak, total, mixed):
    """Fold one pair, whose scores are known, into the running softmax ``(peak, total, mixed)``."""
    new_peak = tl.maximum(peak, score)
    weight = tl.exp2(score - new_peak)
    shrink = tl.exp2(peak - new_peak)
    mixed = mixed * shrink[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
    return new_peak, total * shrink + weight, mixed


@triton.jit
def _attend_slots(
    query, key_ptr, value_ptr, key_base, stride_key_s, value_base, stride_value_s,
    begin, end, scale_log2, peak, total, mixed, logit_ptr, num_slots, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Fold slots ``[begin, end)`` into the running softmax ``(peak, total, mixed)``, base 2.

    The logits are also written to ``logit_ptr``, ``num_slots`` per head of the group, if not None.
    """
    dim = tl.arange(0, BLOCK_D)[None, :]
    for start in range(begin, end, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        mask = (slot < end)[:, None]
        if HEAD_DIM != BLOCK_D:
            mask = mask & (dim < HEAD_DIM)
        address = slot_offset(key_base, slot, stride_key_s)[:, None] + dim
        key = tl.load(key_ptr + address, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_D]
        score = dot(query, tl.trans(key), UPCAST) * scale_log2  # [BLOCK_G, BLOCK_S]
        if logit_ptr is not None:
            member = tl.arange(0, score.shape[0])[:, None]
            kept = (member < GROUP) & (slot < end)[None, :]
            tl.store(logit_ptr + member * num_slots + slot[None, :], score, mask=kept)
        score = tl.where((slot < end)[None, :], score, -float("inf"))
        address = slot_offset(value_base, slot, stride_value_s)[:, None] + dim
        value = tl.load(value_ptr + address, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_D]
        peak, total, mixed = softmax_update(peak, total, mixed, score, value, UPCAST)
    return peak, total, mixed


@triton.jit
def store_part(
    part_ptr, part, num_parts, peak, total, mixed, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Write the state of a part of a head: ``mixed`` of all parts first, then the other two."""
    member = tl.arange(0, mixed.shape[0])
    dim = tl.arange(0, mixed.shape[1])[None, :]
    mask = (member < GROUP)[:, None] & (dim < HEAD_DIM)
    address = part * (GROUP * HEAD_DIM) + member[:, None] * HEAD_DIM + dim
    tl.store(part_ptr + address, mixed, mask=mask)
    stat_ptr = part_ptr + num_parts.to(tl.int64) * (GROUP * HEAD_DIM)
    address = part * (2 * GROUP) + member
    tl.store(stat_ptr + address, peak, mask=member < GROUP)
    tl.store(stat_ptr + address + GROUP, total, mask=member < GROUP)


@triton.jit
def merge_parts(
    part_ptr, first, count, num_parts,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    MEMBERS: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Combine ``count`` parts of one head, ``PARTS`` at a time and always in the same order.

    ``EVEN``: ``count`` is a multiple of ``PARTS``.

    The loads of a block depend on nothing but addresses, so all of them are in flight together.
    Other programs wrote the parts, so L1 is bypassed.

    Returns the running softmax ``(peak, total, mixed)`` of ``MEMBERS`` rows, base 2.
    """
    member = tl.arange(0, MEMBERS)
    is_member = (member < GROUP)[None, :]
    is_inside = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, None, :]
    stat_ptr = part_ptr + num_parts.to(tl.int64) * (GROUP * HEAD_DIM)
    peak = tl.full([MEMBERS], LOWEST, tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    mixed = tl.zeros([MEMBERS, BLOCK_D], tl.float32)
    for start in range(0, count, PARTS):
        part = first + start + tl.arange(0, PARTS)[:, None]
        known = is_member if EVEN else is_member & (part < first + count)
        address = (part * GROUP + member[None, :])[:, :, None] * HEAD_DIM
        parts = tl.load(
            part_ptr + address + tl.arange(0, BLOCK_D)[None, None, :],
            mask=known[:, :, None] & is_inside, other=0.0,
            cache_modifier=".cg",
        )  # [PARTS, MEMBERS, BLOCK_D]  # fmt: skip
        stats = stat_ptr + part * (2 * GROUP) + member[None, :]
        peaks = tl.load(stats, mask=known, other=LOWEST, cache_modifier=".cg")
        totals = tl.load(stats + GROUP, mask=known, other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(peaks, axis=0))
        weight = tl.exp2(peaks - new_peak[None, :])  # [PARTS, MEMBERS]
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(totals * weight, axis=0)
        mixed = mixed * shrink[:, None] + tl.sum(parts * weight[:, :, None], axis=0)
        peak = new_peak
    return peak, total, mixed


@triton.jit
def _store_merged(
    part_ptr, output_ptr, head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr,
    MEMBERS: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one head into its output; returns its log-sum-exp, ``[MEMBERS]``."""
    peak, total, mixed = merge_parts(
        part_ptr, head * SPLITS, SPLITS, tl.num_programs(0),
        GROUP, HEAD_DIM, MEMBERS, BLOCK_D, PARTS, True,
    )  # fmt: skip
    return _store_output(output_ptr, head, peak, total, mixed, GROUP, HEAD_DIM)


@triton.jit
def _store_output(
    output_ptr, head, peak, total, mixed, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Write the output of one head; returns its base-2 log-sum-exp, ``[BLOCK_G]``."""
    member = tl.arange(0, mixed.shape[0])[:, None]
    dim = tl.arange(0, mixed.shape[1])[None, :]
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    output = mixed / total[:, None]  # 0 if no slot is valid
    address = (head * GROUP + member) * HEAD_DIM + dim
    mask = (member < GROUP) & (dim < HEAD_DIM)
    tl.store(output_ptr + address, output.to(output_ptr.dtype.element_ty), mask=mask)
    return tl.where(nothing, -float("inf"), peak + tl.log2(total))


@triton.jit
def _store_shares(
    lse_ptr, logit_ptr, mass_ptr, head, mass_head, lse, count, num_slots,
    GROUP: tl.constexpr, BLOCK_P: tl.constexpr, MASS: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Write the log-sum-exp of one head's group, and the shares of its first ``count`` slots."""
    member = tl.arange(0, lse.shape[0])
    if lse_ptr is not None:
        tl.store(lse_ptr + head * GROUP + member, lse * LN_2, mask=member < GROUP)
    if mass_ptr is not None:
        for start in range(0, num_slots, BLOCK_P):
            slot = start + tl.arange(0, BLOCK_P)
            held = slot < count
            mass = tl.zeros([BLOCK_P], tl.float32)
            # A row per head of the group: a tile padded to 16 heads would be mostly padding.
            for index in tl.static_range(GROUP):
                own_lse = tl.sum(tl.where(member == index, lse, 0.0), axis=0)
                # Other programs wrote it, so L1 is bypassed.
                logit = tl.load(
                    logit_ptr + index * num_slots + slot, mask=held, other=0.0,
                    cache_modifier=".cg",
                )  # fmt: skip
                share = tl.exp2(logit - own_lse)
                if MASS == "none":
                    base = head_base(mass_head * GROUP + index, num_slots)
                    _store_mass(mass_ptr, base, slot, share, held, num_slots, ACCUMULATE)
                elif MASS == "max":
                    mass = tl.maximum(mass, share, propagate_nan=tl.PropagateNan.ALL)
                else:
                    mass += share
            if MASS == "mean":
                mass = mass / GROUP
            if MASS != "none":
                base = head_base(mass_head, num_slots)
                _store_mass(mass_ptr, base, slot, mass, held, num_slots, ACCUMULATE)


@triton.jit
def _store_mass(mass_ptr, base, slot, mass, held, num_slots, ACCUMULATE: tl.constexpr):
    """Add a block of mass to the slots that are ``held``, or store it, 0 at the others."""
    address = slot_offset(base, slot, 1)
    if ACCUMULATE:
        mass += tl.load(mass_ptr + address, mask=held, other=0.0)
        tl.store(mass_ptr + address, mass, mask=held)
    else:
        tl.store(mass_ptr + address, tl.where(held, mass, 0.0), mask=slot < num_slots)
