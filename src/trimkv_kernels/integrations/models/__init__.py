"""Model families, one file each; every module of this folder is imported."""

from __future__ import annotations

import importlib
import pkgutil

from trimkv_kernels.integrations.base import AnyDecoder, Integration

INTEGRATIONS: tuple[Integration | AnyDecoder, ...] = tuple(
    importlib.import_module(f"{__name__}.{module.name}").INTEGRATION
    for module in pkgutil.iter_modules(__path__)
)

_OWN = [family for family in INTEGRATIONS if isinstance(family, Integration)]
# Every decoder stack with every class that may generate from it.
DECODERS: tuple[Integration, ...] = (
    *_OWN,
    *(
        family.around(decoder)
        for family in INTEGRATIONS
        if isinstance(family, AnyDecoder)
        for decoder in _OWN
    ),
)

__all__ = ["DECODERS", "INTEGRATIONS"]
