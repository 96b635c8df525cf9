"""Qwen3: queries and keys are normed per head."""

from __future__ import annotations

from transformers.models.qwen3 import modeling_qwen3

from trimkv_kernels.integrations.base import FULL, Integration, project_normed_qkv

INTEGRATION = Integration(
    name="Qwen3",
    causal_model=modeling_qwen3.Qwen3ForCausalLM,
    base_model=modeling_qwen3.Qwen3Model,
    attention=modeling_qwen3.Qwen3Attention,
    rotate=modeling_qwen3.apply_rotary_pos_emb,
    eager_attention=modeling_qwen3.eager_attention_forward,
    project=project_normed_qkv,
    layer_types=(FULL,),
    has_plain_rope=True,
    note="refused with `use_sliding_window=True`",
)
