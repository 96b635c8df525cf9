"""A model's call under ``torch.autocast``, as its own attention would take it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MixedPrecision:
    """What autocast asks of a layer's call.

    There some states come in autocast's dtype and others, which RoPE or a norm touched, in fp32.
    Attention casts them all; scores and sums stay fp32, as they are without autocast.

    Args:
        device_type: As autocast names it.
        dtype: Autocast's; None where it is off.
    """

    device_type: str
    dtype: torch.dtype | None

    @classmethod
    def of(cls, device: torch.device) -> MixedPrecision:
        """What is on now, for tensors on ``device``."""
        is_on = torch.is_autocast_enabled(device.type)
        return cls(device.type, torch.get_autocast_dtype(device.type) if is_on else None)

    def unified(self, *states: Tensor) -> tuple[Tensor, ...]:
        """The states in one dtype."""
        return states if self.dtype is None else tuple(x.to(self.dtype) for x in states)

    def off(self) -> AbstractContextManager[object]:
        """Without autocast."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, enabled=False)

    def on(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """``function``, whose states were not unified, under autocast again."""
        if self.dtype is None:
            return function

        def under_autocast() -> Tensor:
            with torch.autocast(self.device_type, dtype=self.dtype):
                return function()

        return under_autocast
