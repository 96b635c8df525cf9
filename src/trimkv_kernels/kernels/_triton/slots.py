"""What the kernels know about slots: addresses, when a head is full, protection."""

import triton
import triton.language as tl


@triton.jit
def head_base(head, num_slots):
    """A head's first slot in base tensors; ``head`` counts over layers, rows and KV heads."""
    return head * num_slots


@triton.jit
def view_base(row, kv_head, stride_b, stride_h):
    """Offset of a head's first slot, or first token, in one layer's tensor of any strides."""
    return row * stride_b + kv_head * stride_h


@triton.jit
def find_head(
    layer_head, rows_ptr, row, kv_head, num_slots, stride_pair_b, stride_slot_b, stride_head_b,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Where one head's own numbers, its slots and its pairs begin, each in its own tensors.

    Args:
        layer_head: The head, counted over layers, rows and KV heads.
        rows_ptr: The stored row for each row of the call, in storages of one layer; None where the
            tensors are dense and these are the rows of the call.
        row: Row of the call.
        kv_head: The row's head.
        num_slots: Slots of a head.
        stride_pair_b, stride_slot_b, stride_head_b: Elements from one stored row to the next.
        HEAD_DIM: Elements of a head vector.
    """
    if rows_ptr is None:
        slot_base = head_base(layer_head, num_slots)
        pair_base = slot_base * HEAD_DIM
    else:
        stored = tl.load(rows_ptr + row).to(tl.int64)
        layer_head = view_base(stored, kv_head, stride_head_b, 1)
        slot_base = view_base(stored, kv_head, stride_slot_b, num_slots)
        pair_base = view_base(stored, kv_head, stride_pair_b, num_slots * HEAD_DIM)
    return layer_head, slot_base, pair_base


@triton.jit
def slot_offset(base, slot, stride):
    """Offset of a slot's row, for every kernel that touches slots.

    Args:
        base: Offset of the head's first slot, in the same elements.
        slot: Slot index within the head, scalar or block.
        stride: Elements from one slot to the next.
    """
    return base + slot.to(tl.int64) * stride


@triton.jit
def is_full(num_valid, capacity):
    """Whether a head has filled all slots that it may."""
    return num_valid >= capacity


@triton.jit
def kept_when_full(capacity, buffer):
    """How many pairs a full head keeps."""
    return tl.maximum(capacity - buffer, 0)


@triton.jit
def protect(score, is_nan, position, t, sinks, recent):
    """NaN to -inf, protected positions to +inf."""
    score = tl.where(is_nan, -float("inf"), score)
    protected = (position < sinks) | ((recent > 0) & (position >= t - recent))
    return tl.where(protected, float("inf"), score)


@triton.jit
def paged_slot(page_ptr, base, first_page, slot, inside, PAGE: tl.constexpr):
    """Rows of a head's slots, scalar or block, in tensors whose rows are slots.

    Args:
        page_ptr: The row's page table.
        base: The row's first slot.
        first_page: Where the head's pages begin in the table.
        slot: Slot index within the head.
        inside: Whether the head has that slot.
        PAGE: Slots of a page.
    """
    page = tl.load(page_ptr + first_page + slot // PAGE, mask=inside, other=0)
    return base + page.to(tl.int64) * PAGE + slot % PAGE
