"""Model families, one file each; every module of this folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from trimkv_kernels.integrations.base import Integration

INTEGRATIONS: tuple[Integration, ...] = tuple(
    importlib.import_module(f"{__name__}.{module.name}").INTEGRATION
    for module in pkgutil.iter_modules(__path__)
)

__all__ = ["INTEGRATIONS"]
