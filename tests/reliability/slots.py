"""Small caches without a model, for tests of reliability."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import trimkv_kernels as tk
from trimkv_kernels.policies import make_policy

LAYERS, KV_HEADS, HEADS, HEAD_DIM = 2, 2, 4, 4


def cache(policy: str = "key_norm", rows: int = 2, **options: Any) -> tk.BoundedKVCache:
    """A cache on the CPU; options are those of ``BoundedKVCache``."""
    sizes = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    defaults = {"budget": 8, "buffer": 4, "sinks": 1, "recent": 1, "dtype": torch.float32}
    return tk.BoundedKVCache(
        make_policy(policy), batch_size=rows, num_heads=HEADS, device="cpu",
        **{**sizes, **defaults, **options},
    )  # fmt: skip


def feed(slots: tk.BoundedKVCache, tokens: int, seed: int = 0, **options: Any) -> list[Tensor]:
    """One call of random tokens through all layers, and its eviction; the outputs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        shape = (slots.batch_size, heads, tokens, HEAD_DIM)
        return torch.randn(shape, generator=generator).to(slots.dtype)

    outputs = [
        slots.attend(layer, draw(HEADS), draw(KV_HEADS), draw(KV_HEADS), **options)
        for layer in range(LAYERS)
    ]
    slots.evict()
    return outputs


def kept(slots: tk.BoundedKVCache) -> list[Any]:
    """The positions of every head, by layer, row and head."""
    return [
        [[sorted(p for p in head if p >= 0) for head in row] for row in slots.positions(x).tolist()]
        for x in range(LAYERS)
    ]
