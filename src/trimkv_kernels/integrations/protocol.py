"""What a patched attention layer calls instead of its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class AttentionCache(Protocol):
    """Attends for a model's layers: a bounded cache, or a pass of gate training."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        hidden_states: Tensor,
        query_nope: Tensor,
        key_nope: Tensor,
        scale: float,
        self_attention: Callable[[], Tensor],
    ) -> Tensor:
        """One attention layer's call.

        Args:
            layer: As the model numbers its layers.
            query: ``[batch, num_heads, q_len, head_dim]``, after RoPE.
            key: ``[batch, num_kv_heads, q_len, head_dim]``, after RoPE, of this call's tokens.
            value: As ``key``.
            hidden_states: ``[batch, q_len, hidden_size]``, the layer's input.
            query_nope: ``query`` before RoPE.
            key_nope: ``key`` before RoPE.
            scale: Softmax scale.
            self_attention: The model's own attention of this call's tokens to each other, with its
                own mask. Shaped as the result.

        Returns:
            ``[batch, num_heads, q_len, head_dim]``, dtype of ``value``.
        """
        ...
