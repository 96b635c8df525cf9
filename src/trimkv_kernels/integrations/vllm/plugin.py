"""What vLLM's plugin loader calls, in each of its processes.

It adds names and changes nothing that vLLM has: a model runs on bounded rows if its architecture is
named ``TrimKV...`` in ``--hf-overrides``. The stock architectures stay as they are.
"""

from __future__ import annotations

import logging

TESTED = "0.32.0"
OP = "trimkv_kernels::serve_attention"
ARCHITECTURES = {
    f"TrimKV{family}ForCausalLM": f"{__package__}.models:TrimKV{family}ForCausalLM"
    for family in ("Llama", "Mistral", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe")
}


def register() -> None:
    """Register the architectures, their checks, and the state that they keep for a request.

    Where this version of vLLM has not what that takes, it warns: stock models must start anyway.
    """
    try:
        _register()
    except (ImportError, AttributeError) as error:
        logging.getLogger("vllm.trimkv").warning(
            "bounded rows are not available: trimkv_kernels was tested with vLLM %s, and this one "
            "differs (%s: %s)", TESTED, type(error).__name__, error,
        )  # fmt: skip


def _register() -> None:
    from vllm import ModelRegistry
    from vllm.config import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    from trimkv_kernels.integrations.vllm.checks import BoundedModelConfig

    path = f"{__package__}.metadata.BoundedBackend"
    register_backend(MambaAttentionBackendEnum.CUSTOM, path, is_mamba=True)
    if OP not in CompilationConfig._attention_ops:
        # graphs are split there, as at the layers of vLLM that keep a state
        CompilationConfig._attention_ops.append(OP)
    for name, model in ARCHITECTURES.items():
        ModelRegistry.register_model(name, model)
        MODELS_CONFIG_MAP[name] = BoundedModelConfig
