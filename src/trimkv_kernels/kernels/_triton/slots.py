"""Where a slot lies in memory."""

import triton
import triton.language as tl


@triton.jit
def slot_offset(first, slot, stride):
    """Offset of a slot's row from the base tensor; every kernel that touches slots asks here.

    Args:
        first: Offset of the head's first slot.
        slot: Slot index within the head, scalar or block.
        stride: Elements from one slot to the next.
    """
    return first + slot.to(tl.int64) * stride
