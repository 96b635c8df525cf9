"""Gemma 3, text only: its global layers are bounded, its local ones keep their sliding window."""

from __future__ import annotations

from transformers.models.gemma3 import modeling_gemma3

from trimkv_kernels.integrations.base import FULL, SLIDING, Integration, project_normed_qkv

INTEGRATION = Integration(
    name="Gemma 3",
    causal_model=modeling_gemma3.Gemma3ForCausalLM,
    base_model=modeling_gemma3.Gemma3TextModel,
    attention=modeling_gemma3.Gemma3Attention,
    rotate=modeling_gemma3.apply_rotary_pos_emb,
    eager_attention=modeling_gemma3.eager_attention_forward,
    project=project_normed_qkv,
    layer_types=(FULL, SLIDING),
    note="text models; sliding layers keep transformers' caches, of the window's size",
)
