"""Fast KVzip: an attention-like gate that predicts KVzip's scores (arXiv 2601.17668).

Each KV head has a small gate of width ``d = 16`` (``head_dim`` of the config) and 16 base keys
that belong to no token. For each query head ``g`` of the group it estimates how much attention the
token's key would get beside the base keys ``k_base``::

    q_g, k = rms_norm(W_q x + b_q)_g, rms_norm(W_k x)
    score = mean_g 1 / (1 + sum_n exp(k_base_n . q_g / sqrt(d) - (k . q_g / sqrt(d) + b_g)))

Scores lie in [0, 1] and are comparable across heads and layers. The authors always keep the first 4
tokens and the last 2 % of a short context, or the last 4096. Here the cache protects them, with
``sinks`` and ``recent``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimkv_kernels.files import read_torch
from trimkv_kernels.gates.static import StaticGateConfig, StaticGates, only_file
from trimkv_kernels.policies.base import ModelShape
from trimkv_kernels.policies.gated import StaticGatePolicy, drawn
from trimkv_kernels.policies.registry import register_policy

_EPSILON = 1e-6


@dataclass(frozen=True)
class FastKVzipConfig(StaticGateConfig):
    """Sizes of Fast KVzip's gates.

    Args:
        num_layers, num_kv_heads: Of the base model.
        input_size: Width of its hidden states.
        group_size: Query heads that share a KV head.
        head_dim: Width of the gate's own queries and keys.
        num_base_keys: Keys that each token is compared with.
    """

    group_size: int = 1
    head_dim: int = 16
    num_base_keys: int = 16


class FastKVzipGate(nn.Module):
    """The gate of one layer.

    Parameters, with ``H`` KV heads: ``q_proj.weight [H * group_size * head_dim, input_size]``,
    ``q_proj.bias``, ``k_proj.weight [H * head_dim, input_size]``, ``q_norm.weight`` and
    ``k_norm.weight`` ``[head_dim]``, ``k_base [H, 1, num_base_keys, head_dim]``,
    ``b [H, 1, group_size]``, as published.

    Args:
        config: The sizes.
    """

    def __init__(self, config: FastKVzipConfig) -> None:
        super().__init__()
        heads, group, dim = config.num_kv_heads, config.group_size, config.head_dim
        self.q_proj = nn.Linear(config.input_size, heads * group * dim)
        self.k_proj = nn.Linear(config.input_size, heads * dim, bias=False)
        self.q_norm = nn.RMSNorm(dim, eps=_EPSILON)
        self.k_norm = nn.RMSNorm(dim, eps=_EPSILON)
        self.k_base = nn.Parameter(torch.zeros(heads, 1, config.num_base_keys, dim))
        self.b = nn.Parameter(torch.zeros(heads, 1, group))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[batch, seq, input_size]`` to ``[batch, seq, num_kv_heads]`` float32."""
        heads, _, _, dim = self.k_base.shape
        query = self.q_proj(hidden_states).unflatten(-1, (heads, -1, dim))
        key = self.k_proj(hidden_states).unflatten(-1, (heads, 1, dim))
        query, key = _rms_norm(query, self.q_norm), _rms_norm(key, self.k_norm)
        query = query * dim**-0.5
        own = (query * key).sum(-1) + self.b[:, 0].float()  # [batch, seq, heads, group]
        base = torch.einsum("bshgd,hnd->bshgn", query, self.k_base[:, 0].float())
        # 1 / (1 + sum exp(base - own)), without overflow
        return torch.sigmoid(own - base.logsumexp(-1)).mean(-1)


class FastKVzipGates(StaticGates):
    """One :class:`FastKVzipGate` per layer, ``layers.{i}``."""

    kind = "fast_kvzip"
    config_type = FastKVzipConfig
    published_files = ("*.pt",)

    @classmethod
    def make_layer(cls, config: FastKVzipConfig) -> nn.Module:
        return FastKVzipGate(config)

    @classmethod
    def read_published(cls, folder: Path) -> tuple[FastKVzipConfig, dict[str, Tensor]]:
        path = only_file(folder, "*.pt", cls)
        data = read_torch(path)
        layers = data.get("module") if isinstance(data, Mapping) else None
        if not isinstance(layers, list) or not all(_is_state(layer) for layer in layers):
            raise ValueError(f"{path} must hold {{'module': [tensors of each layer]}}")
        tensors = {f"layers.{i}.{key}": x for i, own in enumerate(layers) for key, x in own.items()}
        try:
            config = _config_of(len(layers), tensors)
        except (KeyError, IndexError) as error:
            raise ValueError(f"{path} does not hold Fast KVzip gates: no usable {error}") from error
        return config, tensors


@register_policy("fast_kvzip")
@dataclass(frozen=True, eq=False)
class FastKVzip(StaticGatePolicy):
    """Keep what a small gate expects to be attended to on a second reading (arXiv 2601.17668).

    Checkpoints are read in our layout or as the authors write them: a folder with one torch file
    ``q{group_size}_dim16_sink16.pt`` of ``{"module": [tensors of each layer]}``, such as
    ``Jang-Hyun/Fast-KVzip/qwen3-8b`` on the hub. The layout is taken from the authors' sources.
    It was not verified with a published file.

    Args:
        gates: One gate per layer.

    Raises:
        TypeError: ``gates`` are not :class:`FastKVzipGates`.
    """

    gates: FastKVzipGates

    gates_type = FastKVzipGates

    @classmethod
    def example(cls, shape: ModelShape) -> FastKVzip:
        config = FastKVzipConfig(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            input_size=shape.hidden_size or 16,
            group_size=(shape.num_heads or shape.num_kv_heads) // shape.num_kv_heads,
            head_dim=8,
            num_base_keys=4,
        )
        return cls(drawn(lambda: FastKVzipGates(config)))

    def sizes(self, shape: ModelShape) -> dict[str, int | None]:
        group = None if shape.num_heads is None else shape.num_heads // shape.num_kv_heads
        return {**super().sizes(shape), "group_size": group}


def _rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """In fp32, whatever the dtype of ``x``."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _EPSILON) * norm.weight.float()


def _is_state(layer: Any) -> bool:
    return isinstance(layer, Mapping) and all(isinstance(x, Tensor) for x in layer.values())


def _config_of(num_layers: int, tensors: Mapping[str, Tensor]) -> FastKVzipConfig:
    base = tensors["layers.0.k_base"].shape
    return FastKVzipConfig(
        num_layers=num_layers,
        num_kv_heads=base[0],
        input_size=tensors["layers.0.k_proj.weight"].shape[1],
        group_size=tensors["layers.0.b"].shape[2],
        head_dim=base[3],
        num_base_keys=base[2],
    )
