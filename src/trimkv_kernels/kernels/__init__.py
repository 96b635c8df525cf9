"""Attention and eviction over bounded slots, on Triton and on torch.

Importing this package imports torch only; Triton is imported by the first call that runs on it.
"""

from trimkv_kernels.kernels.op import resolve_impl
from trimkv_kernels.kernels.ops.column_mass import column_mass
from trimkv_kernels.kernels.ops.decode_attention import append_attention, decode_attention
from trimkv_kernels.kernels.ops.evict import evict
from trimkv_kernels.kernels.ops.extend_attention import extend_attention
from trimkv_kernels.kernels.ops.fill_pages import fill_pages
from trimkv_kernels.kernels.ops.fill_slots import fill_slots
from trimkv_kernels.kernels.ops.ragged_attention import ragged_append_attention
from trimkv_kernels.kernels.ops.retention_attention import retention_attention
from trimkv_kernels.kernels.ops.retention_sum import retention_sum
from trimkv_kernels.kernels.ops.shared_evict import shared_evict
from trimkv_kernels.kernels.pages import Pages
from trimkv_kernels.kernels.prologue import Decay, Rope
from trimkv_kernels.kernels.slots import Slots

__all__ = [
    "Decay",
    "Pages",
    "Rope",
    "Slots",
    "append_attention",
    "column_mass",
    "decode_attention",
    "evict",
    "extend_attention",
    "fill_pages",
    "fill_slots",
    "ragged_append_attention",
    "resolve_impl",
    "retention_attention",
    "retention_sum",
    "shared_evict",
]
