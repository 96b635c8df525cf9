"""Qwen2-VL: as Qwen2, with positions in three axes."""

from __future__ import annotations

from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2_vl import modeling_qwen2_vl

from trimkv_kernels.integrations.base import FULL, Integration

INTEGRATION = Integration(
    name="Qwen2-VL",
    causal_model=modeling_qwen2_vl.Qwen2VLForConditionalGeneration,
    base_model=modeling_qwen2_vl.Qwen2VLTextModel,
    attention=modeling_qwen2_vl.Qwen2VLAttention,
    rotate=modeling_qwen2.apply_rotary_pos_emb,
    eager_attention=modeling_qwen2_vl.eager_attention_forward,
    layer_types=(FULL,),
    position_axes=3,
    note="images and videos; refused with `use_sliding_window=True`",
)
