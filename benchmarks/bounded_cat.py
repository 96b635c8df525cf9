"""The rival of `test_decode_step.py`: a bounded cache made of ``torch.cat``, top-k and gather.

This is how retention caches are written on top of transformers: a step concatenates keys, values,
scores' terms and positions, and every ``buffer`` steps each layer keeps the ``budget`` tokens that
score highest. It has the scores of `trimkv_kernels.TrimKV` with ``age_offset=0``::

    score = log_beta * (t - position)

Everything known to make it faster on a CPU is in: no sort (top-k unsorted, kept tokens stay in its
order, which attention does not mind), whole rows gathered by one ``index_select`` rather than
element by element, the prompt never concatenated to nothing, row offsets computed once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from trimkv_kernels.gates import RetentionGates


class BoundedCatLayer(CacheLayerMixin):
    """One layer: ``update`` appends, evicts when due, and returns what this step attends to.

    Args:
        budget: Tokens of each head that survive an eviction.
        buffer: New tokens taken before the next eviction.
    """

    is_sliding = False

    def __init__(self, budget: int, buffer: int) -> None:
        super().__init__()
        self.budget, self.buffer = budget, buffer
        self.seen = 0
        self.new_log_beta: Tensor | None = None  # [batch, num_kv_heads, new], set by the gate
        self.log_beta: Tensor
        self.position: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: the first call's tensors are the cache."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Append ``[batch, num_kv_heads, new, head_dim]``; returns keys and values to attend to."""
        assert self.new_log_beta is not None
        batch, heads, new, _ = key_states.shape
        stop, device = self.seen + new, key_states.device
        position = torch.arange(self.seen, stop, dtype=torch.int32, device=device)
        position = position.expand(batch, heads, new)
        self.seen += new
        if not self.is_initialized:
            self.keys, self.values = key_states, value_states
            self.log_beta, self.position = self.new_log_beta, position
            self.is_initialized = True
        else:
            self.keys = torch.cat((self.keys, key_states), dim=2)
            self.values = torch.cat((self.values, value_states), dim=2)
            self.log_beta = torch.cat((self.log_beta, self.new_log_beta), dim=2)
            self.position = torch.cat((self.position, position), dim=2)
        attended = self.keys, self.values
        if self.keys.shape[2] >= self.budget + self.buffer:
            self._evict()
        return attended

    def _evict(self) -> None:
        score = self.log_beta * (self.seen - self.position)
        kept = score.topk(self.budget, dim=-1, sorted=False).indices
        batch, heads, length = score.shape
        rows = (kept + _first_rows(batch, heads, length, kept.device)).flatten()
        shape = (batch, heads, self.budget, -1)
        self.keys = self.keys.flatten(0, 2).index_select(0, rows).view(shape)
        self.values = self.values.flatten(0, 2).index_select(0, rows).view(shape)
        self.log_beta = self.log_beta.gather(2, kept)
        self.position = self.position.gather(2, kept)

    def get_seq_length(self) -> int:
        """Tokens seen: the position of the next one."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a call attends to."""
        held = self.keys.shape[2] if self.is_initialized else 0
        return held + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class BoundedCatCache(Cache):
    """A transformers ``Cache`` for a model prepared by :func:`attach_gates`; rows without padding.

    Args:
        num_layers: Layers of the model.
        budget: Tokens of each head that survive an eviction.
        buffer: New tokens taken before the next eviction.
    """

    def __init__(self, num_layers: int, budget: int, buffer: int) -> None:
        super().__init__(layers=[BoundedCatLayer(budget, buffer) for _ in range(num_layers)])

    def positions(self, layer: int) -> Tensor:
        """``[batch, num_kv_heads, held]`` int32: the tokens a layer holds, in no order."""
        return self.layers[layer].position


def attach_gates(model: nn.Module, gates: RetentionGates) -> None:
    """Let the gates see what enters each attention layer, and tell the cache in use.

    The attention itself stays stock.
    """

    def rate(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs["past_key_values"]
        log_beta = gates(layer.layer_idx, kwargs["hidden_states"])
        cache.layers[layer.layer_idx].new_log_beta = log_beta

    for module in model.modules():
        if isinstance(module, Qwen3Attention):
            module.register_forward_pre_hook(rate, with_kwargs=True)


@functools.lru_cache(maxsize=8)
def _first_rows(batch: int, heads: int, length: int, device: torch.device) -> Tensor:
    """Row of each head's first token where ``[batch, heads, length]`` is one list of rows."""
    rows = torch.arange(0, batch * heads * length, length, device=device)
    return rows.view(batch, heads, 1)
