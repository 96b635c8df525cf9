"""Integrations with transformers: the model families that :func:`trimkv_kernels.patch` knows."""

from trimkv_kernels.integrations.base import Integration
from trimkv_kernels.integrations.hf_cache import BoundedCache
from trimkv_kernels.integrations.qwen3 import QWEN3

INTEGRATIONS: tuple[Integration, ...] = (QWEN3,)

__all__ = ["INTEGRATIONS", "BoundedCache", "Integration"]
