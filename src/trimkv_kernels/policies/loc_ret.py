"""LocRet: a retaining head per layer, trained on what answers attend to (arXiv 2410.01805).

The head reads the queries, keys and values of all heads of the layer, before RoPE::

    score = W2 silu(W1 [q; k; v])        one per KV head, no biases

It predicts the largest attention logit that later queries will give the pair, so a pair is scored
once, when it is inserted. While a prompt is read, the authors keep the last 2,500 tokens
("stabilizers") of a budget of 6,000, and never drop its last 100. Here ``recent`` does this.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimkv_kernels.files import read_torch
from trimkv_kernels.gates.static import StaticGateConfig, StaticGates, only_file
from trimkv_kernels.policies.base import ModelShape, Needs, TokenView
from trimkv_kernels.policies.gated import StaticGatePolicy, drawn
from trimkv_kernels.policies.registry import register_policy

_PUBLISHED_KEY = re.compile(r"(?:model\.)?layers\.(\d+)\.self_attn\.(fc[12]\.weight)")


@dataclass(frozen=True)
class LocRetConfig(StaticGateConfig):
    """Sizes of LocRet's retaining heads.

    Args:
        num_layers, num_kv_heads: Of the base model.
        input_size: ``(num_heads + 2 * num_kv_heads) * head_dim`` of the base model.
        intermediate_size: Width of the hidden layer.
    """

    intermediate_size: int = 1024


class RetainingHead(nn.Module):
    """The gate of one layer: ``fc1.weight [intermediate_size, input_size]`` and ``fc2.weight
    [num_kv_heads, intermediate_size]``, as published.

    Args:
        config: The sizes.
    """

    def __init__(self, config: LocRetConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.input_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.num_kv_heads, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """``[batch, seq, input_size]`` to ``[batch, seq, num_kv_heads]``."""
        return cast(Tensor, self.fc2(F.silu(self.fc1(features))))


class LocRetGates(StaticGates):
    """One :class:`RetainingHead` per layer, ``layers.{i}``."""

    kind = "loc_ret"
    config_type = LocRetConfig
    published_files = ("*.bin",)

    @classmethod
    def make_layer(cls, config: LocRetConfig) -> nn.Module:
        return RetainingHead(config)

    @classmethod
    def read_published(cls, folder: Path) -> tuple[LocRetConfig, dict[str, Tensor]]:
        path = only_file(folder, "*.bin", cls)
        data = read_torch(path)
        tensors = {}
        for name, tensor in data.items() if isinstance(data, dict) else ():
            # a file of the whole model has many other keys
            match = _PUBLISHED_KEY.fullmatch(str(name))
            if match and isinstance(tensor, Tensor) and tensor.ndim == 2:
                tensors[f"layers.{match[1]}.{match[2]}"] = tensor
        first, second = tensors.get("layers.0.fc1.weight"), tensors.get("layers.0.fc2.weight")
        if first is None or second is None:
            raise ValueError(
                f"{path} does not hold LocRet's heads: "
                "expected model.layers.{i}.self_attn.fc1.weight and .fc2.weight from layer 0 on"
            )
        config = LocRetConfig(
            num_layers=len({name.split(".")[1] for name in tensors}),
            num_kv_heads=second.shape[0],
            input_size=first.shape[1],
            intermediate_size=first.shape[0],
        )
        return config, tensors


@register_policy("loc_ret")
@dataclass(frozen=True, eq=False)
class LocRet(StaticGatePolicy):
    """Keep what a trained head expects later queries to attend to (Huang et al., arXiv 2410.01805).

    Checkpoints are read in our layout or as the authors' code reads them: a folder with one torch
    file ``*.bin`` of ``model.layers.{i}.self_attn.fc1.weight`` and ``.fc2.weight``; its other
    tensors are ignored. The layout is taken from the authors' sources. It was not verified with a
    published file. If a model normalises queries and keys, they are taken after the norm.

    Args:
        gates: One retaining head per layer.

    Raises:
        TypeError: ``gates`` are not :class:`LocRetGates`.
    """

    gates: LocRetGates

    gates_type = LocRetGates
    needs = Needs(insert=("query_nope", "key_nope", "value"))

    @classmethod
    def example(cls, shape: ModelShape) -> LocRet:
        num_heads = shape.num_heads or shape.num_kv_heads
        config = LocRetConfig(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            input_size=(num_heads + 2 * shape.num_kv_heads) * shape.head_dim,
            intermediate_size=8,
        )
        return cls(drawn(lambda: LocRetGates(config)))

    def sizes(self, shape: ModelShape) -> dict[str, int | None]:
        heads = None if shape.num_heads is None else shape.num_heads + 2 * shape.num_kv_heads
        width = None if heads is None else heads * shape.head_dim
        return {**super().sizes(shape), "input_size": width}

    def features(self, tokens: TokenView) -> Tensor:
        heads = torch.cat((tokens.query_nope, tokens.key_nope, tokens.value), dim=1)
        return heads.transpose(1, 2).flatten(2)
