"""Calls under ``torch.autocast``, with the dtypes that the model's own attention would use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def unified(self, *states: Tensor) -> tuple[Tensor, ...]:
        """The states, all cast to one dtype."""
        return states if self.dtype is None else tuple(x.to(self.dtype) for x in states)

    def off(self) -> AbstractContextManager[object]:
        """A context without autocast."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, enabled=False)

    def on(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """``function`` under autocast again, for states that were not cast."""
        if self.dtype is None:
            return function

        def under_autocast() -> Tensor:
            with torch.autocast(self.device_type, dtype=self.dtype):
                return function()

        return under_autocast
