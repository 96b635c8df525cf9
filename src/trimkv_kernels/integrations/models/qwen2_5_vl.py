"""Qwen2.5-VL: as Qwen2, with positions in three axes."""

from __future__ import annotations

from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from trimkv_kernels.integrations.base import FULL, Integration

INTEGRATION = Integration(
    name="Qwen2.5-VL",
    causal_model=modeling_qwen2_5_vl.Qwen2_5_VLForConditionalGeneration,
    base_model=modeling_qwen2_5_vl.Qwen2_5_VLTextModel,
    attention=modeling_qwen2_5_vl.Qwen2_5_VLAttention,
    rotate=modeling_qwen2.apply_rotary_pos_emb,
    eager_attention=modeling_qwen2_5_vl.eager_attention_forward,
    layer_types=(FULL,),
    position_axes=3,
    note="images and videos; refused with `use_sliding_window=True`",
)
