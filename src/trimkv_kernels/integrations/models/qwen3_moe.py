"""Qwen3 with experts: its attention is Qwen3's."""

from __future__ import annotations

from transformers.models.qwen3_moe import modeling_qwen3_moe

from trimkv_kernels.integrations.base import Integration, project_normed_qkv

INTEGRATION = Integration(
    name="Qwen3-MoE",
    causal_model=modeling_qwen3_moe.Qwen3MoeForCausalLM,
    base_model=modeling_qwen3_moe.Qwen3MoeModel,
    attention=modeling_qwen3_moe.Qwen3MoeAttention,
    rotate=modeling_qwen3_moe.apply_rotary_pos_emb,
    eager_attention=modeling_qwen3_moe.eager_attention_forward,
    project=project_normed_qkv,
    has_plain_rope=True,
    note="refused with `use_sliding_window=True`",
)
