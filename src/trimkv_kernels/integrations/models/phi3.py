"""Phi-3 and Phi-4: one fused projection; RoPE may rotate a part of each head."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.phi3 import modeling_phi3

from trimkv_kernels.integrations.base import Integration, States, split_heads


def project_fused_qkv(layer: Any, hidden_states: Tensor) -> States:
    """Query, key and value before RoPE, from one fused projection."""
    config = layer.config
    kv_heads = config.num_key_value_heads
    heads = split_heads(layer, layer.qkv_proj(hidden_states))
    query, key, value = heads.split((config.num_attention_heads, kv_heads, kv_heads), dim=1)
    return query, key, value


INTEGRATION = Integration(
    name="Phi-3",
    causal_model=modeling_phi3.Phi3ForCausalLM,
    base_model=modeling_phi3.Phi3Model,
    attention=modeling_phi3.Phi3Attention,
    rotate=modeling_phi3.apply_rotary_pos_emb,
    eager_attention=modeling_phi3.eager_attention_forward,
    project=project_fused_qkv,
    note="Phi-4 too; those of 4k tokens have a sliding window and are refused",
)
