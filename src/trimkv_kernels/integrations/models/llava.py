"""LLaVA: image features among the embeddings of any decoder stack."""

from __future__ import annotations

from transformers.models.llava import modeling_llava

from trimkv_kernels.integrations.base import AnyDecoder

INTEGRATION = AnyDecoder(
    name="LLaVA",
    causal_model=modeling_llava.LlavaForConditionalGeneration,
    note="images; every decoder of this table that reads text alone",
)
