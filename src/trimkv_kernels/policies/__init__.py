"""Retention policies, one file each. A new file in this folder needs no registration here."""

from __future__ import annotations

import importlib
import pkgutil

from trimkv_kernels.policies.base import (
    AttentionStat,
    FieldSpec,
    ModelShape,
    Needs,
    ObservationView,
    RetentionPolicy,
    SlotView,
    TokenView,
)
from trimkv_kernels.policies.registry import (
    available_policies,
    example_policy,
    make_policy,
    register_policy,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "AttentionStat",
    "FieldSpec",
    "ModelShape",
    "Needs",
    "ObservationView",
    "RetentionPolicy",
    "SlotView",
    "TokenView",
    "available_policies",
    "example_policy",
    "make_policy",
    "register_policy",
]
