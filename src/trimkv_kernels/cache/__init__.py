"""The bounded cache: what it keeps, where it lies, and how a call goes through it."""

from trimkv_kernels.cache.bounded import BoundedKVCache, Impl
from trimkv_kernels.cache.files import empty_slots
from trimkv_kernels.cache.stats import CacheStats

__all__ = ["BoundedKVCache", "CacheStats", "Impl", "empty_slots"]
