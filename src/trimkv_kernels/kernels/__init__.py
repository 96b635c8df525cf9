"""Attention and eviction over bounded slots: Triton kernels, each beside its torch reference.

Importing this package imports torch only; Triton is imported by the first call that runs on it.
"""

from trimkv_kernels.kernels._dispatch import resolve_impl
from trimkv_kernels.kernels.column_mass import column_mass
from trimkv_kernels.kernels.decode_attention import append_attention, decode_attention
from trimkv_kernels.kernels.evict import evict
from trimkv_kernels.kernels.extend_attention import extend_attention
from trimkv_kernels.kernels.fill_slots import fill_slots
from trimkv_kernels.kernels.retention_attention import retention_attention
from trimkv_kernels.kernels.retention_sum import retention_sum

__all__ = [
    "append_attention",
    "column_mass",
    "decode_attention",
    "evict",
    "extend_attention",
    "fill_slots",
    "resolve_impl",
    "retention_attention",
    "retention_sum",
]
