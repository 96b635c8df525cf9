"""A bounded key/value cache for decoders: ``patch(model)`` and its memory stops growing.

Importing this package runs nothing and imports neither transformers nor Triton. Code that needs
them is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trimkv_kernels.cache import BoundedKVCache, CacheStats
from trimkv_kernels.policies import (
    AttentionStat,
    FieldSpec,
    ModelShape,
    Needs,
    ObservationView,
    RetentionPolicy,
    SlotView,
    TokenView,
    available_policies,
    register_policy,
)
from trimkv_kernels.policies.allocation import (
    AdaptiveHeads,
    GlobalTopK,
    HeadTable,
    LayerPreference,
    Threshold,
    Uniform,
)
from trimkv_kernels.policies.trimkv import TrimKV

if TYPE_CHECKING:
    from trimkv_kernels.batching import Request, RowBatch
    from trimkv_kernels.decoding import decode_loop
    from trimkv_kernels.integrations.chat import ChatRoles
    from trimkv_kernels.patching import PatchHandle, from_pretrained, patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "AdaptiveHeads",
    "AttentionStat",
    "BoundedKVCache",
    "CacheStats",
    "ChatRoles",
    "FieldSpec",
    "GlobalTopK",
    "HeadTable",
    "LayerPreference",
    "ModelShape",
    "Needs",
    "ObservationView",
    "PatchHandle",
    "Request",
    "RetentionPolicy",
    "RowBatch",
    "SlotView",
    "Threshold",
    "TokenView",
    "TrimKV",
    "Uniform",
    "available_policies",
    "decode_loop",
    "from_pretrained",
    "patch",
    "register_policy",
    "unpatch",
]

_LAZY = {
    "ChatRoles": "integrations.chat",
    "PatchHandle": "patching",
    "Request": "batching",
    "RowBatch": "batching",
    "decode_loop": "decoding",
    "from_pretrained": "patching",
    "patch": "patching",
    "unpatch": "patching",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
