"""Calls under ``torch.autocast``, with the dtypes that the model's own attention would use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimkv_kernels.integrations.protocol import LayerCall

_STATES = ("query", "key", "value", "query_nope", "key_nope")


@dataclass(frozen=True)
class MixedPrecision:
    """How a layer's call is cast under autocast.

    Some states come in autocast's dtype, and those after RoPE or a norm in fp32. They are all cast
    for attention. Scores and sums stay in fp32, as without autocast.

    Args:
        device_type: As autocast names it.
        dtype: Autocast's; None if it is off.
    """

    device_type: str
    dtype: torch.dtype | None

    @classmethod
    def of(cls, device: torch.device) -> MixedPrecision:
        """The present state of autocast, for tensors on ``device``."""
        kind = device.type
        is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return cls(kind, torch.get_autocast_dtype(kind) if is_on else None)

    def unified(self, call: LayerCall) -> LayerCall:
        """The call with its queries, keys and values cast to one dtype."""
        if self.dtype is None:
            return call
        states = {name: getattr(call, name) for name in _STATES}
        cast = {name: x.to(self.dtype) for name, x in states.items() if x is not None}
        return replace(call, **cast, self_attention=self._on(call.self_attention))

    def off(self) -> AbstractContextManager[object]:
        """A context without autocast."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, enabled=False)

    def _on(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """``function`` under autocast again, for states that were not cast."""

        def under_autocast() -> Tensor:
            with torch.autocast(self.device_type, dtype=self.dtype):
                return function()

        return under_autocast
