"""What a patched attention layer calls instead of its cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trimkv_kernels.kernels import Rope


@dataclass(frozen=True)
class LayerCall:
    """What an attention layer has of a call's tokens.

    Attributes:
        query: ``[batch, num_heads, q_len, head_dim]``, after RoPE, unless ``rope`` is given.
        key: ``[batch, num_kv_heads, q_len, head_dim]``, likewise.
        value: As ``key``.
        hidden_states: ``[batch, q_len, hidden_size]``, the layer's input.
        scale: Softmax scale.
        self_attention: The model's own attention of these tokens to each other, with its own mask:
            ``[batch, num_heads, q_len, head_dim]``.
        query_nope: ``query`` before RoPE; None with ``rope``.
        key_nope: ``key`` before RoPE; None with ``rope``.
        rope: What is still to be done to ``query`` and ``key``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    hidden_states: Tensor
    scale: float
    self_attention: Callable[[], Tensor]
    query_nope: Tensor | None = None
    key_nope: Tensor | None = None
    rope: Rope | None = None


class AttentionCache(Protocol):
    """Attends for a model's layers: a bounded cache, or a pass of gate training."""

    def fuses_rope(self, q_len: int) -> bool:
        """Whether a call of ``q_len`` tokens is to come with ``rope``."""
        return False

    def attend(self, layer: int, call: LayerCall) -> Tensor:
        """One attention layer's call.

        Args:
            layer: As the model numbers its layers.
            call: The tokens.

        Returns:
            ``[batch, num_heads, q_len, head_dim]``, dtype of ``call.value``.
        """
        ...
