"""Attention and eviction over bounded slots: Triton kernels, each beside its torch reference.

Every op takes ``impl="auto" | "triton" | "torch"``. Importing this package imports torch only; Triton
is imported by the first call that runs on it.
"""

from trimkv_kernels.kernels._dispatch import resolve_impl
from trimkv_kernels.kernels.decode_attention import append_attention, decode_attention
from trimkv_kernels.kernels.evict import evict
from trimkv_kernels.kernels.extend_attention import extend_attention
from trimkv_kernels.kernels.select_slots import affine_scores, select_slots

__all__ = [
    "affine_scores",
    "append_attention",
    "decode_attention",
    "evict",
    "extend_attention",
    "resolve_impl",
    "select_slots",
]
