"""Qwen3-VL: as Qwen3, with positions in three axes and image features added between layers."""

from __future__ import annotations

from transformers.models.qwen3_vl import modeling_qwen3_vl

from trimkv_kernels.integrations.base import Integration, project_normed_qkv

INTEGRATION = Integration(
    name="Qwen3-VL",
    causal_model=modeling_qwen3_vl.Qwen3VLForConditionalGeneration,
    base_model=modeling_qwen3_vl.Qwen3VLTextModel,
    attention=modeling_qwen3_vl.Qwen3VLTextAttention,
    rotate=modeling_qwen3_vl.apply_rotary_pos_emb,
    eager_attention=modeling_qwen3_vl.eager_attention_forward,
    project=project_normed_qkv,
    position_axes=3,
    note="images and videos",
)
