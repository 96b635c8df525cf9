"""transformers' Qwen3: its attention on a bounded cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3 import modeling_qwen3

from trimkv_kernels.integrations.base import Integration, stock_forward
from trimkv_kernels.integrations.hf_cache import BoundedCache


def attention_forward(
    self: Any,  # a Qwen3Attention
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: BoundedCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """``Qwen3Attention.forward`` on a bounded cache; without a cache, the stock one."""
    if past_key_values is None:
        return stock_forward(self)(
            hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query_nope = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
    key_nope = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
    value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
    query, key = modeling_qwen3.apply_rotary_pos_emb(query_nope, key_nope, *position_embeddings)

    def self_attention() -> Tensor:
        attention = ALL_ATTENTION_FUNCTIONS.get(
            self.config._attn_implementation, modeling_qwen3.eager_attention_forward
        )
        output, _ = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, **kwargs
        )
        return output.transpose(1, 2)

    output = past_key_values.attend(
        self.layer_idx,
        query,
        key,
        value,
        hidden_states=hidden_states,
        query_nope=query_nope,
        key_nope=key_nope,
        scale=self.scaling,
        self_attention=self_attention,
    )
    output = output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1).contiguous()
    return self.o_proj(output), None


QWEN3 = Integration(
    name="Qwen3",
    causal_model=modeling_qwen3.Qwen3ForCausalLM,
    base_model=modeling_qwen3.Qwen3Model,
    attention=modeling_qwen3.Qwen3Attention,
    attention_forward=attention_forward,
)
