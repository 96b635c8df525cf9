"""Qwen2 and Qwen2.5: projections with biases."""

from __future__ import annotations

from transformers.models.qwen2 import modeling_qwen2

from trimkv_kernels.integrations.base import FULL, Integration

INTEGRATION = Integration(
    name="Qwen2",
    causal_model=modeling_qwen2.Qwen2ForCausalLM,
    base_model=modeling_qwen2.Qwen2Model,
    attention=modeling_qwen2.Qwen2Attention,
    rotate=modeling_qwen2.apply_rotary_pos_emb,
    eager_attention=modeling_qwen2.eager_attention_forward,
    layer_types=(FULL,),
    has_plain_rope=True,
    note="Qwen2.5 too; refused with `use_sliding_window=True`",
)
