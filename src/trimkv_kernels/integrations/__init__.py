"""Integrations with transformers: the model families that :func:`trimkv_kernels.patch` knows."""

from trimkv_kernels.integrations.base import AnyDecoder, Integration, support_table
from trimkv_kernels.integrations.hf_cache import BoundedCache
from trimkv_kernels.integrations.models import INTEGRATIONS
from trimkv_kernels.integrations.rows_cache import RowsCache

__all__ = [
    "INTEGRATIONS",
    "AnyDecoder",
    "BoundedCache",
    "Integration",
    "RowsCache",
    "support_table",
]
