"""Llama: three projections and RoPE."""

from __future__ import annotations

from transformers.models.llama import modeling_llama

from trimkv_kernels.integrations.base import Integration

INTEGRATION = Integration(
    name="Llama",
    causal_model=modeling_llama.LlamaForCausalLM,
    base_model=modeling_llama.LlamaModel,
    attention=modeling_llama.LlamaAttention,
    rotate=modeling_llama.apply_rotary_pos_emb,
    eager_attention=modeling_llama.eager_attention_forward,
    has_plain_rope=True,
)
