"""KVzap: predict from the hidden states what KVzip would keep (arXiv 2601.07891).

Each layer has a linear map or a small MLP. It is trained to give the logarithm of KVzip+'s score:
the largest attention that any query pays to the token when the text is read again, scaled by the
norms of the token's attention output and hidden state::

    linear:  score = W x + b
    mlp:     score = W2 gelu(W1 x + b1) + b2

Scores are comparable across heads and layers; the authors cut by a threshold of -4 behind a window
of 128 tokens, see :class:`~trimkv_kernels.policies.allocation.Threshold`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimkv_kernels.files import read_config, read_tensors
from trimkv_kernels.gates.static import StaticGateConfig, StaticGates, only_file
from trimkv_kernels.policies.base import ModelShape
from trimkv_kernels.policies.gated import StaticGatePolicy, drawn
from trimkv_kernels.policies.registry import register_policy

_PUBLISHED_KEYS = {
    "num_layers": "n_modules",
    "num_kv_heads": "output_dim",
    "input_size": "input_dim",
    "intermediate_size": "hidden_dim",
}


@dataclass(frozen=True)
class KVzapConfig(StaticGateConfig):
    """Sizes of KVzap's heads.

    Args:
        num_layers, num_kv_heads: Of the base model.
        input_size: Width of its hidden states.
        intermediate_size: Width of the MLP's hidden layer, 512 as published; None is linear.
    """

    intermediate_size: int | None = None


class KVzapGates(StaticGates):
    """One head per layer.

    Parameters of layer ``i`` are ``layers.{i}.weight`` and ``.bias`` (linear), or
    ``layers.{i}.0.weight``, ``.0.bias``, ``.2.weight`` and ``.2.bias`` (MLP), as published.
    """

    kind = "kvzap"
    config_type = KVzapConfig
    published_files = ("config.json", "model.safetensors")

    @classmethod
    def make_layer(cls, config: KVzapConfig) -> nn.Module:
        if config.intermediate_size is None:
            return nn.Linear(config.input_size, config.num_kv_heads)
        return nn.Sequential(
            nn.Linear(config.input_size, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, config.num_kv_heads),
        )

    @classmethod
    def read_published(cls, folder: Path) -> tuple[KVzapConfig, dict[str, Tensor]]:
        weights = only_file(folder, "model.safetensors", cls)
        return read_config(folder / "config.json", _published_config), read_tensors(weights)


@register_policy("kvzap")
@dataclass(frozen=True, eq=False)
class KVzap(StaticGatePolicy):
    """Keep what KVzip would keep, predicted from the hidden states (arXiv 2601.07891).

    Checkpoints are read in our layout or as kvpress writes them (``config.json`` with
    ``model_type`` "kvzap", ``model.safetensors``), such as ``nvidia/KVzap-mlp-Qwen3-8B``. The
    layout is taken from the kvpress sources. It was not verified with a published file.

    Args:
        gates: One head per layer.

    Raises:
        TypeError: ``gates`` are not :class:`KVzapGates`.
    """

    gates: KVzapGates

    gates_type = KVzapGates

    @classmethod
    def example(cls, shape: ModelShape) -> KVzap:
        config = KVzapConfig(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            input_size=shape.hidden_size or 16,
            intermediate_size=8,
        )
        return cls(drawn(lambda: KVzapGates(config)))


def _published_config(data: Mapping[str, Any]) -> KVzapConfig:
    if data.get("model_type") != "kvzap":
        raise ValueError(f"model_type must be 'kvzap', got {data.get('model_type')!r}")
    return KVzapConfig.from_dict(
        {name: data[key] for name, key in _PUBLISHED_KEYS.items() if key in data}
    )
