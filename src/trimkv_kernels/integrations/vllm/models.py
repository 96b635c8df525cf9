"""vLLM's models with bounded attention layers. Everything else of them is vLLM's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from trimkv_kernels.integrations.vllm.checks import check_config
from trimkv_kernels.integrations.vllm.layer import BoundedAttention
from trimkv_kernels.integrations.vllm.options import ServingOptions
from trimkv_kernels.integrations.vllm.rows import BoundedRows
from trimkv_kernels.policies.base import ModelShape

logger = init_logger("vllm.trimkv")


class BoundedSelfAttention(nn.Module):
    """A self-attention of vLLM, whose parts it takes over under their names.

    It differs from the stock ones in what it hands to `BoundedAttention`: also the hidden states,
    and queries and keys before RoPE, where the policy reads them.

    Args:
        stock: The self-attention.
        attention: What takes the place of its ``attn``.
    """

    qkv_proj: Any
    q_norm: Any
    k_norm: Any
    rotary_emb: Any
    o_proj: Any
    attn: Any

    def __init__(self, stock: Any, attention: BoundedAttention) -> None:
        super().__init__()
        for name, module in stock.named_children():
            setattr(self, name, attention if name == "attn" else module)
        self._sizes = [stock.q_size, stock.kv_size, stock.kv_size]
        self._head_dim = stock.head_dim
        self._has_norms = hasattr(stock, "q_norm")
        needs = attention.rows.policy.needs
        self._needs_hidden = "hidden_states" in needs.insert
        self._needs_nope = needs.query_moments or bool(
            {"query_nope", "key_nope"} & set(needs.insert)
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """See the stock class."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split(self._sizes, dim=-1)
        if self._has_norms:
            query, key = self._normed(self.q_norm, query), self._normed(self.k_norm, key)
        query_nope = key_nope = None
        if self._needs_nope:  # RoPE may write in place
            query_nope, key_nope = query.clone(), key.clone()
        query, key = self.rotary_emb(positions, query, key)
        hidden = hidden_states if self._needs_hidden else None
        output, _ = self.o_proj(self.attn(query, key, value, hidden, query_nope, key_nope))
        return output

    def _normed(self, norm: Any, states: Tensor) -> Tensor:
        return norm(states.unflatten(-1, (-1, self._head_dim))).flatten(-2)


class Bounded:
    """Replaces the attention layers of a model class of vLLM, which stands behind it in a class.

    To vLLM the model then has no attention, but a state of fixed size for each request.
    """

    has_inner_state = True
    is_attention_free = True
    model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        options = check_config(vllm_config)
        layers = self.model.layers
        rows = _rows(options, vllm_config, [layer.self_attn for layer in layers])
        for index, layer in enumerate(layers):
            stock = layer.self_attn
            name = stock.attn.layer_name
            attention = BoundedAttention(index, rows, stock.scaling, name, vllm_config)
            layer.self_attn = BoundedSelfAttention(stock, attention)
        logger.info(
            "trimkv: %s, sinks %d, recent %d: %d slots for each of %d KV heads in %d layers, "
            "%.1f MB for a request of any length",
            options, rows.sinks, rows.recent, rows.grid.capacity, rows.shape.num_kv_heads,
            len(layers), rows.nbytes * len(layers) / 1e6,
        )  # fmt: skip


def _rows(options: ServingOptions, vllm_config: VllmConfig, layers: list[Any]) -> BoundedRows:
    """What the layers of this process do.

    Raises:
        ValueError: the policy does not fit the model.
    """
    config, model_config = vllm_config.model_config.hf_config, vllm_config.model_config
    first = layers[0]
    total = config.num_key_value_heads
    rank = get_tensor_model_parallel_rank()
    processes = vllm_config.parallel_config.tensor_parallel_size
    rotary = LlamaRotaryEmbedding(config)
    is_plain = len(rotary.inv_freq) == first.head_dim // 2
    shape = ModelShape(
        num_layers=len(layers),
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        # with more processes than KV heads, several have the same head
        kv_head_offset=rank * total // processes,
        total_kv_heads=total,
        head_dim=first.head_dim,
        hidden_size=config.hidden_size,
        dtype=model_config.dtype,
        device=torch.device(vllm_config.device_config.device_type),
        name_or_path=model_config.model,
        inv_freq=rotary.inv_freq if is_plain else None,
        rope_scaling=rotary.attention_scaling,
        scale=first.scaling,
        output_weights=[layer.o_proj.weight for layer in layers],
    )
    return BoundedRows(
        options.policy, shape, options.grid,
        sinks=options.sinks, recent=options.recent, allocation=options.allocation,
    )  # fmt: skip


class TrimKVLlamaForCausalLM(Bounded, LlamaForCausalLM):
    """Llama."""


class TrimKVMistralForCausalLM(Bounded, MistralForCausalLM):
    """Mistral."""


class TrimKVPhi3ForCausalLM(Bounded, Phi3ForCausalLM):
    """Phi-3."""


class TrimKVQwen2ForCausalLM(Bounded, Qwen2ForCausalLM):
    """Qwen2."""


class TrimKVQwen3ForCausalLM(Bounded, Qwen3ForCausalLM):
    """Qwen3."""


class TrimKVQwen3MoeForCausalLM(Bounded, Qwen3MoeForCausalLM):
    """Qwen3 with experts."""
