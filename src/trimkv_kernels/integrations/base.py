"""What an integration tells `patching` about a model family."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

STOCK_FORWARD = "_trimkv_stock_forward"


@dataclass(frozen=True)
class Integration:
    """One model family of transformers.

    Args:
        name: As users know it.
        causal_model: The class that generates.
        base_model: The class of its decoder stack, which takes the padding mask.
        attention: The class of its attention layers.
        attention_forward: Replaces the ``forward`` of an attention layer; takes what that takes.
    """

    name: str
    causal_model: type[nn.Module]
    base_model: type[nn.Module]
    attention: type[nn.Module]
    attention_forward: Callable[..., Any]

    def check_attention(self, layer: nn.Module) -> None:
        """Raise unless a layer's ``forward`` is the one this integration was written for.

        Raises:
            TypeError: the class was subclassed or its ``forward`` replaced.
        """
        expected = f"transformers' {self.attention.__name__}.forward"
        if type(layer) is not self.attention:
            raise TypeError(
                f"attention layers must be {self.attention.__name__}, got {type(layer).__name__}"
            )
        forward = self.attention.forward
        if forward.__module__ != self.attention.__module__:
            raise TypeError(
                f"the attention forward must be {expected}, "
                f"got one from {forward.__module__}; undo that patch first"
            )
        wanted = inspect.signature(self.attention_forward).parameters
        got = inspect.signature(forward).parameters
        if not set(wanted) <= set(got):  # more come by name and travel in **kwargs
            raise TypeError(
                f"{expected} must take {list(wanted)}, got {list(got)}: "
                "this version of transformers is not supported"
            )


def stock_forward(layer: nn.Module) -> Callable[..., Any]:
    """The ``forward`` that a patched attention layer had before."""
    previous = layer.__dict__.get(STOCK_FORWARD)
    if previous is not None:
        return previous
    return type(layer).forward.__get__(layer)
