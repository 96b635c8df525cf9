"""Mistral: as Llama. The first release has a sliding window and is refused."""

from __future__ import annotations

from transformers.models.mistral import modeling_mistral

from trimkv_kernels.integrations.base import Integration

INTEGRATION = Integration(
    name="Mistral",
    causal_model=modeling_mistral.MistralForCausalLM,
    base_model=modeling_mistral.MistralModel,
    attention=modeling_mistral.MistralAttention,
    rotate=modeling_mistral.apply_rotary_pos_emb,
    eager_attention=modeling_mistral.eager_attention_forward,
    has_plain_rope=True,
    note="the first release (v0.1) has a sliding window and is refused",
)
