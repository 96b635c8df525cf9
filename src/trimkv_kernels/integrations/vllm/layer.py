"""The attention layers of a vLLM model on bounded rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from trimkv_kernels.cache.call import Inputs
from trimkv_kernels.integrations.vllm.metadata import BoundedMetadata
from trimkv_kernels.integrations.vllm.plugin import OP
from trimkv_kernels.integrations.vllm.rows import Blocks, BoundedRows, Step

_LIBRARY = torch.library.Library("trimkv_kernels", "FRAGMENT")


class BoundedAttention(MambaBase, nn.Module):
    """Takes the place of vLLM's ``Attention``: keeps the pairs, and attends.

    Args:
        layer: The layer's number in the model.
        rows: What all layers do.
        scale: Softmax scale.
        prefix: The layer's name in vLLM.
        vllm_config: Where the layer is registered under its name.
    """

    def __init__(
        self, layer: int, rows: BoundedRows, scale: float, prefix: str, vllm_config: VllmConfig
    ) -> None:
        super().__init__()
        self.layer, self.rows, self.scale, self.prefix = layer, rows, scale, prefix
        self._blocks: Blocks | None = None
        # the stock layer that this one replaces has registered itself there
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors of a row."""
        return tuple(entry.shape for entry in self.rows.entries)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Their dtypes."""
        return tuple(entry.dtype for entry in self.rows.entries)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The kind of the state, for vLLM."""
        return MambaAttentionBackendEnum.CUSTOM

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the memory of all rows."""
        super().bind_kv_cache(kv_cache)
        tensors: Any = self.kv_cache
        self._blocks = self.rows.blocks(tensors)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden_states: Tensor | None = None,
        query_nope: Tensor | None = None,
        key_nope: Tensor | None = None,
    ) -> Tensor:
        """Attend ``[tokens, heads * head_dim]``; what the policy does not need may be None."""
        output = torch.empty_like(query)
        torch.ops.trimkv_kernels.serve_attention(
            query, key, value, hidden_states, query_nope, key_nope, output, self.prefix
        )
        return output

    def run(self, states: Inputs, hidden_states: Tensor | None, output: Tensor) -> None:
        """Do the layer's call on all rows of the step.

        Args:
            states: Queries, keys and values by name, ``[tokens, heads * head_dim]`` or None.
            hidden_states: ``[tokens, hidden_size]`` or None.
            output: Like the queries; written to.
        """
        metadata = get_forward_context().attn_metadata
        if metadata is None or self._blocks is None:  # vLLM measures how much memory is left
            output.zero_()
            return
        found: BoundedMetadata = metadata[self.prefix]
        head_dim = self.rows.shape.head_dim
        heads = {
            name: None if x is None else x.unflatten(-1, (-1, head_dim))
            for name, x in states.items()
        }
        given = output.unflatten(-1, (-1, head_dim))
        if found.step is not None:
            count = len(found.step.rows)
            inputs = {name: None if x is None else x[:count, :, None] for name, x in heads.items()}
            inputs["hidden_states"] = None if hidden_states is None else hidden_states[:count, None]
            step = _without_fillers(found.step)
            result = self.rows.step(self.layer, self._blocks, step, inputs, self.scale)
            given[:count] = result[:, :, 0]
        for row, seen, begin, end in found.readings:
            inputs = {
                name: None if x is None else x[begin:end].transpose(0, 1)[None]
                for name, x in heads.items()
            }
            here = None if hidden_states is None else hidden_states[None, begin:end]
            inputs["hidden_states"] = here
            result = self.rows.read(self.layer, self._blocks, row, seen, inputs, self.scale)
            given[begin:end] = result[0].transpose(0, 1)


def _without_fillers(step: Step) -> Step:
    """A step in which the rows that fill up a captured batch are padding.

    They have block 0, which no request gets. There are none on a CPU.
    """
    return step if step.rows.device.type == "cpu" else replace(step, valid=step.rows != 0)


def _serve_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor | None,
    query_nope: Tensor | None,
    key_nope: Tensor | None,
    output: Tensor,
    layer_name: str,
) -> None:
    layer = get_forward_context().no_compile_layers[layer_name]
    states = {"query": query, "key": key, "value": value}
    layer.run(states | {"query_nope": query_nope, "key_nope": key_nope}, hidden_states, output)


direct_register_custom_op(
    op_name=OP.split("::")[1],
    op_func=_serve_attention,
    mutates_args=["output"],
    fake_impl=lambda *_, **__: None,  # it writes to the output alone
    target_lib=_LIBRARY,
)
