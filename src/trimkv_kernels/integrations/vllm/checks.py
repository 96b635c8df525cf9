"""What a server with bounded rows is refused, before it loads anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config import VllmConfig
from vllm.model_executor.models.config import MambaModelConfig

if TYPE_CHECKING:
    from trimkv_kernels.integrations.vllm.options import ServingOptions


class BoundedModelConfig(MambaModelConfig):
    """vLLM's hook for an architecture's configuration."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check the options, and plan as for models whose state has a fixed size.

        Raises:
            ValueError: an option is wrong, or bounded rows do not go with another one of vLLM.
        """
        check_config(vllm_config)
        super().verify_and_update_config(vllm_config)


def check_config(vllm_config: VllmConfig) -> ServingOptions:
    """The options of a server.

    Raises:
        ValueError: see :meth:`BoundedModelConfig.verify_and_update_config`.
    """
    # imported here: every vLLM process that finds the plugin imports this module
    from trimkv_kernels.integrations.discovery import FULL, layer_types
    from trimkv_kernels.integrations.vllm.options import ServingOptions

    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    unbounded = "leave it out, or serve the stock architecture"
    reasons = {
        "prefix caching (--enable-prefix-caching): what a row holds depends on the whole text "
        f"before it, so two requests cannot share it; {unbounded}": (
            vllm_config.cache_config.enable_prefix_caching
        ),
        "speculative decoding (--speculative-config): a drafted token that is rejected would have "
        f"to be taken out of the slots again; {unbounded}": (
            vllm_config.speculative_config is not None
        ),
        f"LoRA (--enable-lora): it was not tried; merge the adapter, or {unbounded}": (
            vllm_config.lora_config is not None
        ),
        "pipeline parallelism (--pipeline-parallel-size): it was not tried; use "
        "--tensor-parallel-size or --data-parallel-size": parallel.pipeline_parallel_size > 1,
        "context parallelism (--decode-context-parallel-size): a row is on one device": (
            parallel.decode_context_parallel_size > 1
        ),
        f"KV transfer (--kv-transfer-config): rows stay where they are; {unbounded}": (
            vllm_config.kv_transfer_config is not None
        ),
        "another dtype of the cache (--kv-cache-dtype): slots have the dtype of the model": (
            vllm_config.cache_config.cache_dtype != "auto"
        ),
        "sliding windows: every layer of the model must have full attention": (
            any(kind != FULL for kind in layer_types(config))
        ),
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise ValueError(f"bounded rows (trimkv) do not go with {reason}")
    return ServingOptions.parse(getattr(config, "trimkv", None), vllm_config.model_config.model)
